//! The driver that the process has loaded.

use std::{
    ffi::{c_int, c_void},
    mem::ManuallyDrop,
    sync::OnceLock,
};

use libloading::os::unix::Library;

use crate::comm::Failed;

macro_rules! functions {
    ($($name:ident: fn($($arg:ident: $type:ty),*),)*) => {
        /// The functions of it that are used.
        #[expect(non_snake_case, reason = "the driver's names")]
        pub(crate) struct Driver {
            $($name: unsafe extern "C" fn($($type),*) -> u32,)*
            _library: ManuallyDrop<Library>,
        }

        impl Driver {
            fn load() -> Result<Self, String> {
                // SAFETY: the library is the process's driver, which is loaded already.
                let library = unsafe { Library::new("libcuda.so.1") }.map_err(|e| e.to_string())?;
                Ok(Driver {
                    // SAFETY: the driver's manual says what arguments the function of this name has.
                    $($name: *unsafe { library.get(concat!(stringify!($name), "\0").as_bytes()) }.map_err(|e| e.to_string())?,)*
                    _library: ManuallyDrop::new(library),
                })
            }
        }
    };
}

functions! {
    cuCtxGetCurrent: fn(context: *mut usize),
    cuCtxSetCurrent: fn(context: usize),
    cuDeviceGetUuid_v2: fn(uuid: *mut [u8; 16], device: c_int),
    cuStreamSynchronize: fn(stream: *mut c_void),
    cuStreamQuery: fn(stream: *mut c_void),
    cuMemcpyDtoH_v2: fn(to: *mut u8, from: u64, bytes: usize),
    cuMemcpyHtoD_v2: fn(to: u64, from: *const u8, bytes: usize),
}

/// `CUDA_ERROR_NOT_READY`.
const NOT_READY: u32 = 600;

/// `Err` with what was asked, unless the driver is content.
fn check(call: &str, code: u32) -> Result<(), Failed> {
    if code == 0 { Ok(()) } else { Err(Failed::cuda(format!("{call}: the driver's error {code}"))) }
}

impl Driver {
    pub(crate) fn get() -> Result<&'static Driver, Failed> {
        static DRIVER: OnceLock<Result<Driver, String>> = OnceLock::new();
        DRIVER.get_or_init(Driver::load).as_ref().map_err(|e| Failed::cuda(format!("no driver: {e}")))
    }

    /// The calling thread's context.
    pub(crate) fn context(&self) -> Result<usize, Failed> {
        let mut context = 0;
        // SAFETY: the place is of this frame.
        check("cuCtxGetCurrent", unsafe { (self.cuCtxGetCurrent)(&mut context) })?;
        if context == 0 { Err(Failed::cuda("the thread has no current context".into())) } else { Ok(context) }
    }

    pub(crate) fn enter(&self, context: usize) -> Result<(), Failed> {
        // SAFETY: the context is another thread's current one.
        check("cuCtxSetCurrent", unsafe { (self.cuCtxSetCurrent)(context) })
    }

    pub(crate) fn uuid(&self) -> Result<[u8; 16], Failed> {
        let mut uuid = [0; 16];
        // SAFETY: the place is of this frame; the stand-in has one device.
        check("cuDeviceGetUuid", unsafe { (self.cuDeviceGetUuid_v2)(&mut uuid, 0) })?;
        Ok(uuid)
    }

    pub(crate) fn wait_for(&self, stream: usize) -> Result<(), Failed> {
        // SAFETY: the driver checks its handles.
        check("cuStreamSynchronize", unsafe { (self.cuStreamSynchronize)(stream as *mut c_void) })
    }

    pub(crate) fn is_idle(&self, stream: usize) -> Result<bool, Failed> {
        // SAFETY: as above.
        match unsafe { (self.cuStreamQuery)(stream as *mut c_void) } {
            NOT_READY => Ok(false),
            code => check("cuStreamQuery", code).map(|()| true),
        }
    }

    pub(crate) fn read(&self, address: u64, bytes: usize) -> Result<Vec<u8>, Failed> {
        let mut data = vec![0; bytes];
        // SAFETY: the place has as many bytes; the driver checks the address.
        check("cuMemcpyDtoH", unsafe { (self.cuMemcpyDtoH_v2)(data.as_mut_ptr(), address, bytes) })?;
        Ok(data)
    }

    pub(crate) fn write(&self, address: u64, data: &[u8]) -> Result<(), Failed> {
        // SAFETY: as above.
        check("cuMemcpyHtoD", unsafe { (self.cuMemcpyHtoD_v2)(address, data.as_ptr(), data.len()) })
    }
}
