//! Bytes that come with a launch: numbers that the host makes anew each time. They are copied in the order of the stream, from pinned
//! memory that is not written again before the device has them, into memory that the launches after it may write only once it is done.

use cudarc::driver::{CudaEvent, CudaStream, DriverError, result};

use super::Gpu;
use crate::error::Result;

/// Copies that may be on their way before the host waits for one.
const PIECES: usize = 8;
/// Bytes of a piece, at least.
const LEAST_BYTES: usize = 4096;

struct Piece {
    host: *mut u8,
    device: u64,
    bytes: usize,
    /// Reached when the device has the host's bytes.
    copied: CudaEvent,
}

/// Room for what comes with a lane's launches.
#[derive(Default)]
pub(super) struct Pieces {
    all: Vec<Piece>,
    next: usize,
}

// SAFETY: the pieces are their lane's own.
unsafe impl Send for Pieces {}

impl Pieces {
    /// Enqueues a copy of the bytes; their address for what is launched on `stream` next.
    pub(super) fn push(&mut self, gpu: &Gpu, stream: &CudaStream, bytes: &[u8]) -> Result<u64> {
        let at = self.next % PIECES;
        self.next += 1;
        let failed = gpu.failed("copying with a launch");
        if let Some(piece) = self.all.get(at) {
            piece.copied.synchronize().map_err(&failed)?;
        }
        if self.all.get(at).is_none_or(|piece| piece.bytes < bytes.len()) {
            let new = Piece::new(gpu, bytes.len())?;
            match self.all.get_mut(at) {
                Some(old) => std::mem::replace(old, new).free(gpu),
                None => self.all.push(new),
            }
        }
        let piece = &self.all[at];
        let copy = || -> std::result::Result<u64, DriverError> {
            // SAFETY: the piece is as long, and the device is done with it.
            let staged = unsafe { std::slice::from_raw_parts_mut(piece.host, bytes.len()) };
            staged.copy_from_slice(bytes);
            // SAFETY: the piece is not written before `copied`, nor freed before all work is done.
            unsafe { result::memcpy_htod_async(piece.device, staged, stream.cu_stream()) }?;
            piece.copied.record(stream)?;
            Ok(piece.device)
        };
        copy().map_err(failed)
    }

    /// Gives all back; waits for what uses them.
    pub(super) fn free(&mut self, gpu: &Gpu) {
        self.all.drain(..).for_each(|piece| piece.free(gpu));
    }
}

impl Piece {
    fn new(gpu: &Gpu, bytes: usize) -> Result<Self> {
        let bytes = bytes.next_power_of_two().max(LEAST_BYTES);
        let device = gpu.alloc(bytes as u64)?;
        let make = || -> std::result::Result<Self, DriverError> {
            let copied = gpu.context.new_event(None)?;
            // SAFETY: freed by `free`, once.
            let host = unsafe { result::malloc_host(bytes, 0) }?;
            Ok(Piece { host: host.cast(), device, bytes, copied })
        };
        make().map_err(|e| {
            gpu.free(device);
            gpu.failed("copying with a launch")(e)
        })
    }

    fn free(self, gpu: &Gpu) {
        gpu.free(self.device);
        // SAFETY: allocated by `new`. The driver has waited for all work when the other half was freed; a failure is one that other
        // calls have met.
        let _ = unsafe { result::free_host(self.host.cast()) };
    }
}
