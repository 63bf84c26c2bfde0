//! A lane's words for what its kernels find wrong ([`crate::ptx::fault`]), and what they say when they are read.
//!
//! The words are pinned memory of the host that the device sees too: kernels write them only when something is wrong, and whoever has
//! waited for an event reads them without asking the driver.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering::Acquire, Ordering::Relaxed},
    },
};

use cudarc::driver::{DriverError, result, sys};
use parking_lot::Mutex;

use super::Gpu;
use crate::{
    error::{Error, Result},
    ptx::Fault,
};

/// Claimed, ready, and the fault's two numbers.
type Words = [AtomicU32; 4];

/// What a task may find wrong.
type Site = (Arc<str>, Fault);

/// The words of one lane, shared with whoever waits for it.
pub(super) struct Faults {
    gpu: Arc<Gpu>,
    stream: String,
    words: *const Words,
    /// Where the device sees them.
    address: u64,
    sites: Mutex<Sites>,
}

#[derive(Default)]
struct Sites {
    /// Site n + 1 is the nth.
    all: Vec<Site>,
    numbers: BTreeMap<Site, u32>,
}

// SAFETY: the words are atomic, and everything else is of types that may be shared.
unsafe impl Send for Faults {}
// SAFETY: as above.
unsafe impl Sync for Faults {}

impl Faults {
    /// Those of the stream called `stream`.
    pub(super) fn new(gpu: &Arc<Gpu>, stream: &str) -> Result<Self> {
        let make = || -> std::result::Result<(*const Words, u64), DriverError> {
            gpu.context.bind_to_thread()?;
            // SAFETY: freed when this is dropped, once.
            let at = unsafe { result::malloc_host(size_of::<Words>(), sys::CU_MEMHOSTALLOC_DEVICEMAP) }?;
            // SAFETY: the memory is new, and has room for the words.
            unsafe { at.cast::<[u32; 4]>().write([0; 4]) };
            let mut address = 0;
            // SAFETY: the memory was just allocated for both; the pointer is to a live integer.
            unsafe { sys::cuMemHostGetDevicePointer_v2(&mut address, at, 0) }.result()?;
            Ok((at.cast_const().cast(), address))
        };
        let (words, address) = make().map_err(gpu.failed("making a stream"))?;
        Ok(Faults { gpu: gpu.clone(), stream: stream.to_owned(), words, address, sites: Mutex::default() })
    }

    fn words(&self) -> &Words {
        // SAFETY: they live as long as this does, and are only ever used as atomics by the host.
        unsafe { &*self.words }
    }

    /// What a kernel of `task` takes to tell of `fault`: the words' address, and the number to write.
    pub(super) fn site(&self, task: &Arc<str>, fault: &Fault) -> (u64, u64) {
        let mut sites = self.sites.lock();
        let site = (task.clone(), fault.clone());
        if let Some(number) = sites.numbers.get(&site) {
            return (self.address, u64::from(*number));
        }
        sites.all.push(site.clone());
        let number = sites.all.len() as u32;
        sites.numbers.insert(site, number);
        (self.address, u64::from(number))
    }

    /// Whether something was found, as far as the kernels have come.
    pub(super) fn any(&self) -> bool {
        self.words()[1].load(Relaxed) != 0
    }

    /// What was found first; the words are then free for the next.
    pub(super) fn take(&self) -> Result<()> {
        let [claimed, ready, a, b] = self.words();
        let Some(at) = (ready.load(Acquire) as usize).checked_sub(1) else { return Ok(()) };
        let found = [a.load(Relaxed), b.load(Relaxed)];
        ready.store(0, Relaxed);
        claimed.store(0, Relaxed);
        let sites = self.sites.lock();
        let site = sites.all.get(at);
        Err(site.map_or_else(
            || Error::Driver {
                device: self.gpu.device(),
                call: "reading what kernels found",
                message: format!("there is no site {at}"),
            },
            |(task, fault)| fault.error(found, &self.stream, task),
        ))
    }
}

impl Drop for Faults {
    fn drop(&mut self) {
        if self.gpu.context.bind_to_thread().is_ok() {
            // SAFETY: allocated by `new`; the driver waits for what uses it. A failure is one that other calls have met.
            let _ = unsafe { result::free_host(self.words.cast_mut().cast()) };
        }
    }
}
