//! Kernels on a device: text to function, once a name.

use std::{
    ffi::{CString, c_void},
    sync::Arc,
};

use cudarc::driver::{
    result,
    sys::{self, CUfunction, CUfunction_attribute_enum, CUjit_option_enum as Jit, CUmodule},
};

use super::{Gpu, words};
use crate::{
    error::{Error, Result},
    ptx::{Kernel, golden},
};

/// A kernel that the driver has compiled. It stays until the process ends, as its device does.
pub(super) struct Loaded {
    pub(super) function: CUfunction,
}

// SAFETY: a handle that the driver lets any thread use, with its context current.
unsafe impl Send for Loaded {}
// SAFETY: as above.
unsafe impl Sync for Loaded {}

/// Bytes that a compiler may fill with what it does not like.
const LOG_BYTES: usize = 16 << 10;

impl Gpu {
    /// The kernel of that name, compiled when it is first asked for.
    pub(super) fn kernel(&self, kernel: &Kernel) -> Result<Arc<Loaded>> {
        if let Some(loaded) = self.kernels.lock().get(&kernel.name) {
            return Ok(loaded.clone());
        }
        let loaded = Arc::new(self.load(kernel)?);
        self.kernels.lock().insert(kernel.name.clone(), loaded.clone());
        Ok(loaded)
    }

    /// Names of the kernels that were loaded.
    pub fn loaded_kernels(&self) -> Vec<String> {
        self.kernels.lock().keys().cloned().collect()
    }

    fn load(&self, kernel: &Kernel) -> Result<Loaded> {
        let refuse = |message: String| Error::Kernel { kernel: kernel.name.clone(), device: self.device(), message };
        let target = self.target();
        if !target.runs(kernel.arch) {
            let (major, minor) = target.compute;
            return Err(refuse(format!("it needs {}, the device is of {major}.{minor}", kernel.arch.target())));
        }
        let committed = golden::text(kernel.arch, &kernel.name);
        let text = committed.map_or_else(|| (kernel.emit)(), str::to_owned);
        let nul = |_| refuse("its text has a nul".into());
        let (text, name) = (CString::new(text).map_err(nul)?, CString::new(kernel.name.as_str()).map_err(nul)?);
        self.context.bind_to_thread().map_err(|e| refuse(words(e)))?;
        let module = module(&text).map_err(refuse)?;
        // SAFETY: the module was just loaded and is not unloaded.
        let function = unsafe { result::module::get_function(module, name) }.map_err(|e| refuse(words(e)))?;
        if kernel.shared_bytes > 48 << 10 {
            let most = CUfunction_attribute_enum::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            // SAFETY: the function is of a loaded module.
            let set = unsafe { result::function::set_function_attribute(function, most, kernel.shared_bytes as i32) };
            set.map_err(|e| refuse(format!("{} bytes of shared memory: {}", kernel.shared_bytes, words(e))))?;
        }
        Ok(Loaded { function })
    }
}

/// Compiles; `Err` is the driver's code and its compiler's log.
fn module(text: &CString) -> std::result::Result<CUmodule, String> {
    let mut log = vec![0u8; LOG_BYTES];
    let mut options = [Jit::CU_JIT_ERROR_LOG_BUFFER, Jit::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    // The driver takes a number as if it were a pointer.
    let mut values: [*mut c_void; 2] = [log.as_mut_ptr().cast(), LOG_BYTES as *mut c_void];
    let mut module = std::ptr::null_mut();
    // SAFETY: the text ends with a nul, and the two options have values of their kinds, which live until the call returns.
    let loaded = unsafe {
        sys::cuModuleLoadDataEx(&mut module, text.as_ptr().cast(), 2, options.as_mut_ptr(), values.as_mut_ptr())
            .result()
    };
    loaded.map(|()| module).map_err(|e| {
        let len = log.iter().position(|b| *b == 0).unwrap_or(LOG_BYTES);
        let log = String::from_utf8_lossy(&log[..len]);
        [words(e), log.trim().to_owned()].into_iter().filter(|s| !s.is_empty()).collect::<Vec<_>>().join("\n")
    })
}
