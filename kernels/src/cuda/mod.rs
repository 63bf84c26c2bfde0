//! NVIDIA GPUs through their driver, which is found when it is first asked for: no CUDA toolkit is needed, to build or to run.
//!
//! One [`Gpu`] a device and process: its context, what was loaded on it, and how its clock relates to ours. Memory is made of plain
//! allocations ([`crate::memory`] keeps the lists); streams are [`Lane`]s, each driven by its [`crate::stream::Stream`]'s thread.
//! Nothing here panics for want of a driver: the driver's library is looked for before its first call.

mod bytes;
mod clock;
mod fault;
mod graph;
mod kernel;
mod lane;
mod power;
mod transfer;

use std::{
    collections::BTreeMap,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, OnceLock},
};

use cudarc::driver::{
    CudaContext, CudaEvent, DriverError, result,
    sys::{self, CUdevice_attribute_enum as Attribute},
};
use parking_lot::Mutex;

pub use clock::Mark;
pub use graph::Graph;
pub use lane::Lane;
pub use power::{PowerMeter, nvml_version};

pub use crate::device::GpuInfo;

use crate::{
    device::{Device, Share, Target},
    error::{Error, Result},
};

/// `cuDriverGetVersion` of the first driver that takes `.version 8.3`: CUDA 12.3.
const OLDEST_DRIVER: i32 = 12030;

/// A GPU in use.
pub struct Gpu {
    info: GpuInfo,
    context: Arc<CudaContext>,
    kernels: Mutex<BTreeMap<String, Arc<kernel::Loaded>>>,
    transfers: Mutex<transfer::Transfers>,
    clock: Mutex<clock::Clock>,
    spare_events: Mutex<Vec<CudaEvent>>,
    host_ops: Mutex<BTreeMap<&'static str, u64>>,
}

fn words(e: DriverError) -> String {
    // An error that the driver has no words for is said by its number.
    let said =
        |text: std::result::Result<&std::ffi::CStr, DriverError>| text.ok().map(|t| t.to_string_lossy().into_owned());
    match (said(e.error_name()), said(e.error_string())) {
        (Some(name), Some(text)) => format!("{name}, {text}"),
        _ => format!("error {}", e.0 as u32),
    }
}

fn unusable(ordinal: u32, expected: &str, found: impl Into<String>, advice: &str) -> Error {
    let device = Device::Cuda(ordinal).to_string();
    Error::Device { device, expected: expected.into(), found: found.into(), advice: advice.into() }
}

/// Version of the driver, once it is there and initialised.
fn driver(ordinal: u32) -> Result<i32> {
    let none = |found: &str| {
        unusable(ordinal, "an NVIDIA driver", found, "install one of version 545 or later, or use the device `cpu`")
    };
    // SAFETY: loads a library by its usual names; its initialisers are the driver's.
    if !unsafe { sys::is_culib_present() } {
        return Err(none("no libcuda.so"));
    }
    let mut version = 0;
    // A stub of the library may lack entry points, which its loader answers with a panic.
    let started = catch_unwind(AssertUnwindSafe(|| {
        // SAFETY: the pointer is to a live integer.
        unsafe { sys::cuDriverGetVersion(&mut version) }.result()?;
        result::init()
    }));
    match started {
        Err(_) => Err(none("a libcuda.so that lacks entry points of one")),
        Ok(Err(e)) if e.0 == sys::CUresult::CUDA_ERROR_NO_DEVICE => {
            Err(unusable(ordinal, "an NVIDIA GPU", "a driver without one", "use the device `cpu`"))
        }
        Ok(Err(e)) => Err(none(&format!("one that does not start ({})", words(e)))),
        Ok(Ok(())) => Ok(version),
    }
}

/// The GPUs of this machine, usable or not.
///
/// # Errors
/// [`Error::Device`] if there is no driver, or it finds no GPU.
pub fn devices() -> Result<Vec<GpuInfo>> {
    let version = driver(0)?;
    let failed = |e| unusable(0, "an answer of the driver", words(e), "see the system's log");
    let count = result::device::get_count().map_err(failed)?;
    (0..count as u32).map(|ordinal| look(ordinal, version).map_err(failed)).collect()
}

fn look(ordinal: u32, driver_version: i32) -> std::result::Result<GpuInfo, DriverError> {
    let device = result::device::get(ordinal as i32)?;
    // SAFETY: the handle was just given by the driver.
    let number = |attribute| unsafe { result::device::get_attribute(device, attribute) }.map(|n| n.max(0) as u32);
    let compute = (
        number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)?,
        number(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)?,
    );
    let problem = if driver_version < OLDEST_DRIVER {
        let found = format!("one for CUDA {}.{}", driver_version / 1000, driver_version % 1000 / 10);
        Some(unusable(ordinal, "a driver for CUDA 12.3 or later (version 545)", found, "update the NVIDIA driver"))
    } else if compute < (8, 0) {
        let found = format!("{}.{}", compute.0, compute.1);
        Some(unusable(
            ordinal,
            "a GPU of compute capability 8.0 or more",
            found,
            "use a newer GPU, or the device `cpu`",
        ))
    } else {
        None
    };
    Ok(GpuInfo {
        ordinal,
        name: result::device::get_name(device)?,
        target: Target {
            compute,
            num_sms: number(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?,
            shared_bytes: number(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_BLOCK_OPTIN)?,
            share: Share::All,
            tuning: None,
        },
        // SAFETY: as above.
        memory_bytes: unsafe { result::device::total_mem(device) }? as u64,
        driver_version: driver_version as u32,
        problem,
    })
}

/// The GPU of that number; opened once a process.
///
/// # Errors
/// [`Error::Device`] if there is no driver, it is too old, there is no such GPU, or it is too old; it says what was expected, what
/// was found, and what to do.
pub fn open(ordinal: u32) -> Result<Arc<Gpu>> {
    static OPEN: OnceLock<Mutex<BTreeMap<u32, Arc<Gpu>>>> = OnceLock::new();
    let mut open = OPEN.get_or_init(Mutex::default).lock();
    if let Some(gpu) = open.get(&ordinal) {
        return Ok(gpu.clone());
    }
    let found = devices().map_err(|e| match e {
        Error::Device { expected, found, advice, .. } => unusable(ordinal, &expected, found, &advice),
        other => other,
    })?;
    let count = found.len();
    let info = found.into_iter().nth(ordinal as usize).ok_or_else(|| {
        let expected = format!("a number below {count}, for the {count} of this machine");
        unusable(ordinal, &expected, ordinal.to_string(), "see `hadal doctor`")
    })?;
    if let Some(problem) = info.problem {
        return Err(problem);
    }
    let gpu = Arc::new(Gpu::new(info)?);
    open.insert(ordinal, gpu.clone());
    Ok(gpu)
}

impl Gpu {
    fn new(info: GpuInfo) -> Result<Self> {
        let make = || {
            let context = CudaContext::new(info.ordinal as usize)?;
            // SAFETY: order between streams is the engine's business, by events; `CudaSlice`s are not used.
            unsafe { context.disable_event_tracking() };
            let transfers = transfer::Transfers::new(&context)?;
            let clock = clock::Clock::new(&context)?;
            Ok((context, transfers, clock))
        };
        let (context, transfers, clock) = make().map_err(|e: DriverError| {
            unusable(info.ordinal, "a context", words(e), "see whether another process holds the GPU (`nvidia-smi`)")
        })?;
        Ok(Gpu {
            info,
            context,
            kernels: Mutex::default(),
            transfers: Mutex::new(transfers),
            clock: Mutex::new(clock),
            spare_events: Mutex::default(),
            host_ops: Mutex::default(),
        })
    }

    /// What it is.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// What kernels are chosen by.
    pub fn target(&self) -> Target {
        self.info.target.clone()
    }

    /// Ops that ran on the host for want of a kernel, and how often, by name.
    pub fn host_ops(&self) -> BTreeMap<&'static str, u64> {
        self.host_ops.lock().clone()
    }

    pub(crate) fn count_host_op(&self, op: &'static str) {
        *self.host_ops.lock().entry(op).or_default() += 1;
    }

    /// Makes it the device of the calling thread.
    pub(crate) fn bind(&self) -> Result<()> {
        self.context.bind_to_thread().map_err(self.failed("choosing the device"))
    }

    /// What no other GPU has, nor part of one.
    ///
    /// # Errors
    /// The driver's.
    pub fn uuid(&self) -> Result<String> {
        let failed = self.failed("asking for the UUID");
        let device = result::device::get(self.info.ordinal as i32).map_err(&failed)?;
        let mut uuid = sys::CUuuid { bytes: [0; 16] };
        // SAFETY: the device is open, and the place is of the type.
        unsafe { sys::cuDeviceGetUuid_v2(&mut uuid, device) }.result().map_err(&failed)?;
        Ok(uuid.bytes.iter().map(|byte| format!("{:02x}", *byte as u8)).collect())
    }

    fn device(&self) -> String {
        Device::Cuda(self.info.ordinal).to_string()
    }

    /// Puts a driver's error in words.
    fn failed(&self, call: &'static str) -> impl Fn(DriverError) -> Error + '_ {
        move |e| Error::Driver { device: self.device(), call, message: words(e) }
    }

    /// Free and all bytes of its memory.
    ///
    /// # Errors
    /// The driver's.
    pub fn memory_bytes(&self) -> Result<(u64, u64)> {
        let (free, total) = self.context.mem_get_info().map_err(self.failed("asking for free memory"))?;
        Ok((free as u64, total as u64))
    }

    /// Address of so many new bytes; at least 256-byte aligned.
    ///
    /// # Errors
    /// [`Error::OutOfMemory`], or another of the driver's.
    pub(crate) fn alloc(&self, bytes: u64) -> Result<u64> {
        let failed = self.failed("allocating");
        self.context.bind_to_thread().map_err(&failed)?;
        // SAFETY: the bytes are freed by `free`, once.
        match unsafe { result::malloc_sync(bytes.max(16) as usize) } {
            Ok(address) => Ok(address),
            Err(e) if e.0 == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY => {
                let (free_bytes, total_bytes) = self.memory_bytes()?;
                Err(Error::OutOfMemory { device: self.device(), asked_bytes: bytes, free_bytes, total_bytes })
            }
            Err(e) => Err(failed(e)),
        }
    }

    /// Gives bytes back; waits for what uses them.
    pub(crate) fn free(&self, address: u64) {
        // A failure is one that other calls have met: the context is gone.
        if self.context.bind_to_thread().is_ok() {
            // SAFETY: the address is from `alloc`, and its owner is dropped.
            let _ = unsafe { result::free_sync(address) };
        }
    }
}
