//! A stand-in for NVML, in as far as power is measured by it, under the names and with the arguments of `nvml.h`. It has two GPUs: the
//! driver's, and before it one on another bus, whose figures are out of all proportion: whoever goes by number gets that one.
//!
//! The driver's counts `PTXSIM_MILLIJOULES` more with each reading, and draws `PTXSIM_MILLIWATTS`; what is not set is not supported.
#![allow(non_snake_case, reason = "the names are NVML's")]
#![allow(missing_docs, clippy::missing_safety_doc, reason = "what they do, and want, is in NVML's manual")]

use std::{
    ffi::{CStr, c_char, c_uint},
    sync::atomic::{AtomicBool, AtomicU64, Ordering},
};

use crate::settings::{BUS, millijoules, milliwatts};

const UNINITIALIZED: u32 = 1;
const INVALID_ARGUMENT: u32 = 2;
const NOT_SUPPORTED: u32 = 3;
const NOT_FOUND: u32 = 6;

/// Bus of the other GPU, and what it counts with a reading.
const OTHER: (usize, u64) = (0x17, 1_000_000_000_000);

static STARTED: AtomicBool = AtomicBool::new(false);
static COUNTED: AtomicU64 = AtomicU64::new(0);

fn started(code: impl FnOnce() -> u32) -> u32 {
    if STARTED.load(Ordering::SeqCst) { code() } else { UNINITIALIZED }
}

unsafe fn put<T>(to: *mut T, value: T) -> u32 {
    if to.is_null() {
        return INVALID_ARGUMENT;
    }
    // SAFETY: an out pointer that is not null has room for its type.
    unsafe { to.write(value) };
    0
}

unsafe fn put_text(to: *mut c_char, len: c_uint, text: &str) -> u32 {
    if to.is_null() || text.len() >= len as usize {
        return INVALID_ARGUMENT;
    }
    // SAFETY: there is room for `len` bytes, which are more than the text and its end.
    unsafe {
        std::ptr::copy_nonoverlapping(text.as_ptr(), to.cast(), text.len());
        to.add(text.len()).write(0);
    }
    0
}

/// Handles are numbers of buses.
fn is_device(handle: usize) -> bool {
    handle == BUS as usize || handle == OTHER.0
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlInit_v2() -> u32 {
    STARTED.store(true, Ordering::SeqCst);
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn nvmlShutdown() -> u32 {
    STARTED.store(false, Ordering::SeqCst);
    0
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlSystemGetNVMLVersion(version: *mut c_char, len: c_uint) -> u32 {
    // SAFETY: the manual's promises about pointers.
    started(|| unsafe { put_text(version, len, "12.550.ptxsim") })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByIndex_v2(index: c_uint, device: *mut usize) -> u32 {
    let Some(handle) = [OTHER.0, BUS as usize].get(index as usize).copied() else { return INVALID_ARGUMENT };
    // SAFETY: the manual's promises about pointers.
    started(|| unsafe { put(device, handle) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetHandleByPciBusId_v2(id: *const c_char, device: *mut usize) -> u32 {
    started(|| {
        // SAFETY: the id ends with a nul, as the manual says.
        let Ok(id) = unsafe { CStr::from_ptr(id) }.to_str() else { return INVALID_ARGUMENT };
        let parts: Vec<_> = id.split([':', '.']).map(|part| usize::from_str_radix(part, 16)).collect();
        match parts[..] {
            // SAFETY: the manual's promises about pointers.
            [Ok(0), Ok(bus), Ok(0), Ok(0)] if is_device(bus) => unsafe { put(device, bus) },
            [Ok(_), Ok(_), Ok(_), Ok(_)] => NOT_FOUND,
            _ => INVALID_ARGUMENT,
        }
    })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetUUID(device: usize, uuid: *mut c_char, len: c_uint) -> u32 {
    if !is_device(device) {
        return INVALID_ARGUMENT;
    }
    let text = format!("GPU-00000000-0000-0000-0000-0000000000{device:02x}");
    // SAFETY: the manual's promises about pointers.
    started(|| unsafe { put_text(uuid, len, &text) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetTotalEnergyConsumption(device: usize, millijoules_taken: *mut u64) -> u32 {
    let more = match (device, millijoules()) {
        (device, _) if !is_device(device) => return INVALID_ARGUMENT,
        (device, _) if device == OTHER.0 => OTHER.1,
        (_, Some(more)) => more,
        (_, None) => return NOT_SUPPORTED,
    };
    // SAFETY: the manual's promises about pointers.
    started(|| unsafe { put(millijoules_taken, COUNTED.fetch_add(more, Ordering::SeqCst) + more) })
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn nvmlDeviceGetPowerUsage(device: usize, power: *mut c_uint) -> u32 {
    let Some(drawn) = milliwatts().filter(|_| device == BUS as usize) else { return NOT_SUPPORTED };
    // SAFETY: the manual's promises about pointers.
    started(|| unsafe { put(power, drawn) })
}
