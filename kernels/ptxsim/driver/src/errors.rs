//! Error codes of the driver that the stand-in gives, with their names.

use std::ffi::CStr;

/// A `CUresult`.
pub(crate) type Code = u32;

/// What a call gives.
pub(crate) type Outcome<T = ()> = Result<T, Code>;

const fn c_str(text: &'static str) -> &'static CStr {
    match CStr::from_bytes_with_nul(text.as_bytes()) {
        Ok(text) => text,
        Err(_) => panic!("expected one nul, at the end"),
    }
}

macro_rules! codes {
    ($($name:ident = $code:literal, $text:literal;)*) => {
        $(pub(crate) const $name: Code = $code;)*
        /// Name and description of a code.
        pub(crate) fn describe(code: Code) -> Option<(&'static CStr, &'static CStr)> {
            Some(match code {
                0 => (c"CUDA_SUCCESS", c"no error"),
                $($code => (
                    const { c_str(concat!("CUDA_ERROR_", stringify!($name), "\0")) },
                    const { c_str(concat!($text, "\0")) },
                ),)*
                _ => return None,
            })
        }
    };
}

codes! {
    INVALID_VALUE = 1, "invalid argument";
    OUT_OF_MEMORY = 2, "out of memory";
    NOT_INITIALIZED = 3, "initialization error";
    NO_DEVICE = 100, "no CUDA-capable device is detected";
    INVALID_DEVICE = 101, "invalid device ordinal";
    INVALID_CONTEXT = 201, "invalid device context";
    NO_BINARY_FOR_GPU = 209, "no kernel image is available for execution on the device";
    INVALID_PTX = 218, "a PTX JIT compilation failed";
    UNSUPPORTED_PTX_VERSION = 222, "the provided PTX was compiled with an unsupported toolchain.";
    INVALID_HANDLE = 400, "invalid resource handle";
    NOT_FOUND = 500, "named symbol not found";
    NOT_READY = 600, "device not ready";
    LAUNCH_OUT_OF_RESOURCES = 701, "too many resources requested for launch";
    LAUNCH_FAILED = 719, "unspecified launch failure";
    STREAM_CAPTURE_UNSUPPORTED = 900, "operation not permitted when stream is capturing";
    UNKNOWN = 999, "unknown error";
}
