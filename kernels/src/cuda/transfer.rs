//! Bytes between the host and the device, through pinned memory in pieces, so that one piece is copied by the host while the other is on
//! its way. They are set-up, Record and ops without a kernel: all wait.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, result};

use super::Gpu;
use crate::error::Result;

/// Bytes of a piece.
const PIECE: usize = 4 << 20;

struct Piece {
    at: *mut u8,
    /// Reached when the device is done with it.
    done: CudaEvent,
}

// SAFETY: the memory is the piece's own, and it is used under the lock that the transfers are in.
unsafe impl Send for Piece {}

pub(super) struct Transfers {
    stream: Arc<CudaStream>,
    pieces: [Piece; 2],
}

impl Transfers {
    pub(super) fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        let piece = || {
            // SAFETY: stays until the process ends, as the device it belongs to does.
            let at = unsafe { result::malloc_host(PIECE, 0) }?;
            Ok(Piece { at: at.cast(), done: context.new_event(None)? })
        };
        Ok(Transfers { stream: context.new_stream()?, pieces: [piece()?, piece()?] })
    }

    fn upload(&self, address: u64, bytes: &[u8]) -> std::result::Result<(), DriverError> {
        for (i, chunk) in bytes.chunks(PIECE).enumerate() {
            let piece = &self.pieces[i % 2];
            piece.done.synchronize()?;
            // SAFETY: the device is done with the piece, which is as long as any chunk.
            let staged = unsafe { std::slice::from_raw_parts_mut(piece.at, chunk.len()) };
            staged.copy_from_slice(chunk);
            // SAFETY: the piece stays, and is not written before `done`.
            unsafe { result::memcpy_htod_async(address + (i * PIECE) as u64, staged, self.stream.cu_stream()) }?;
            piece.done.record(&self.stream)?;
        }
        self.stream.synchronize()
    }

    fn download(&self, address: u64, bytes: &mut [u8]) -> std::result::Result<(), DriverError> {
        let ask = |i: usize, len: usize| {
            let piece = &self.pieces[i % 2];
            // SAFETY: what the piece held before was copied out by the host.
            let staged = unsafe { std::slice::from_raw_parts_mut(piece.at, len) };
            // SAFETY: the piece stays, and is not read before `done`.
            unsafe { result::memcpy_dtoh_async(staged, address + (i * PIECE) as u64, self.stream.cu_stream()) }?;
            piece.done.record(&self.stream)
        };
        let mut chunks = bytes.chunks_mut(PIECE).enumerate().peekable();
        if let Some((_, first)) = chunks.peek() {
            ask(0, first.len())?;
        }
        while let Some((i, chunk)) = chunks.next() {
            if let Some((next, later)) = chunks.peek() {
                ask(*next, later.len())?;
            }
            let piece = &self.pieces[i % 2];
            piece.done.synchronize()?;
            // SAFETY: the bytes have arrived.
            chunk.copy_from_slice(unsafe { std::slice::from_raw_parts(piece.at, chunk.len()) });
        }
        Ok(())
    }
}

impl Gpu {
    /// Copies to the device; the bytes are there when this returns.
    pub(crate) fn upload(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let failed = self.failed("copying to the device");
        self.context.bind_to_thread().map_err(&failed)?;
        self.transfers.lock().upload(address, bytes).map_err(failed)
    }

    /// Copies from the device.
    pub(crate) fn download(&self, address: u64, bytes: &mut [u8]) -> Result<()> {
        let failed = self.failed("copying from the device");
        self.context.bind_to_thread().map_err(&failed)?;
        self.transfers.lock().download(address, bytes).map_err(failed)
    }
}
