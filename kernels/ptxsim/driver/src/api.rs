//! The entry points, under the names and with the arguments of `cuda.h`. Handles are numbers, checked on each call.
#![allow(non_snake_case, reason = "the names are the driver's")]
#![allow(missing_docs, clippy::missing_safety_doc, reason = "what they do, and want, is in the driver's manual")]

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Mutex, MutexGuard, PoisonError},
};

use ptxsim::TensorMapInfo;

use crate::{
    errors::{
        Code, INVALID_CONTEXT, INVALID_DEVICE, INVALID_HANDLE, INVALID_VALUE, LAUNCH_FAILED, NO_DEVICE,
        NOT_INITIALIZED, NOT_READY, Outcome, STREAM_CAPTURE_UNSUPPORTED, UNKNOWN, describe,
    },
    queue::Op,
    settings::BUS,
    state::{CONTEXT, CURRENT, Gpu},
};

static GPU: Mutex<Option<Gpu>> = Mutex::new(None);

fn lock() -> MutexGuard<'static, Option<Gpu>> {
    GPU.lock().unwrap_or_else(PoisonError::into_inner)
}

fn code(outcome: std::thread::Result<Outcome>) -> Code {
    match outcome {
        Ok(Ok(())) => 0,
        Ok(Err(code)) => code,
        Err(payload) => {
            let message = payload.downcast_ref::<String>().cloned().unwrap_or_default();
            eprintln!("ptxsim: {message}");
            UNKNOWN
        }
    }
}

/// A call that needs no context, nor that anything was initialised.
fn any(call: impl FnOnce(&mut Gpu) -> Outcome) -> Code {
    code(catch_unwind(AssertUnwindSafe(|| call(lock().get_or_insert_with(Gpu::new)))))
}

/// A call after `cuInit`.
fn started(call: impl FnOnce(&mut Gpu) -> Outcome) -> Code {
    any(|gpu| if gpu.initialized { call(gpu) } else { Err(NOT_INITIALIZED) })
}

/// A call in the thread's current context.
fn within(call: impl FnOnce(&mut Gpu) -> Outcome) -> Code {
    started(|gpu| match (CURRENT.get(), gpu.poisoned) {
        (0, _) => Err(INVALID_CONTEXT),
        (_, true) => Err(LAUNCH_FAILED),
        _ => call(gpu),
    })
}

/// The same, for calls that may wait, which a capturing thread may not make.
fn waiting(call: impl FnOnce(&mut Gpu) -> Outcome) -> Code {
    within(|gpu| gpu.may_wait().and_then(|()| call(gpu)))
}

unsafe fn put<T>(to: *mut T, value: T) -> Outcome {
    if to.is_null() {
        return Err(INVALID_VALUE);
    }
    // SAFETY: an out pointer that is not null has room for its type.
    unsafe { to.write(value) };
    Ok(())
}

fn device(gpu: &Gpu, ordinal: c_int) -> Outcome {
    if (0..gpu.settings.num_devices).contains(&ordinal) { Ok(()) } else { Err(INVALID_DEVICE) }
}

/// Entry points are unsafe as the driver's are: their pointers must be what its manual says.
macro_rules! api {
    ($($how:ident $name:ident($($arg:ident: $type:ty),* $(,)?) |$gpu:ident| $body:block)*) => {
        $(
            #[unsafe(no_mangle)]
            #[allow(unused_variables, reason = "not each argument means something here")]
            pub unsafe extern "C" fn $name($($arg: $type),*) -> Code {
                // SAFETY: the manual's promises about pointers.
                $how(#[allow(unused_variables, unused_unsafe, reason = "not each call needs them")] |$gpu| unsafe { $body })
            }
        )*
    };
}

api! {
    any cuInit(flags: c_uint) |gpu| {
        if gpu.settings.num_devices == 0 {
            return Err(NO_DEVICE);
        }
        if flags != 0 {
            return Err(INVALID_VALUE);
        }
        gpu.initialized = true;
        Ok(())
    }
    any cuDriverGetVersion(version: *mut c_int) |gpu| { put(version, gpu.settings.driver) }
    started cuDeviceGetCount(count: *mut c_int) |gpu| { put(count, gpu.settings.num_devices) }
    started cuDeviceGet(to: *mut c_int, ordinal: c_int) |gpu| {
        device(gpu, ordinal)?;
        put(to, ordinal)
    }
    started cuDeviceGetName(name: *mut c_char, len: c_int, ordinal: c_int) |gpu| {
        device(gpu, ordinal)?;
        let (major, minor) = gpu.settings.compute;
        let text = format!("PTX interpreter {major}.{minor}");
        if len <= 0 || name.is_null() {
            return Err(INVALID_VALUE);
        }
        let n = text.len().min(len as usize - 1);
        std::ptr::copy_nonoverlapping(text.as_ptr(), name.cast(), n);
        put(name.add(n), 0)
    }
    started cuDeviceGetUuid_v2(uuid: *mut [u8; 16], ordinal: c_int) |gpu| {
        device(gpu, ordinal)?;
        put(uuid, gpu.settings.uuid.to_be_bytes())
    }
    started cuDeviceTotalMem_v2(bytes: *mut usize, ordinal: c_int) |gpu| {
        device(gpu, ordinal)?;
        put(bytes, gpu.settings.memory_bytes as usize)
    }
    started cuDeviceGetAttribute(value: *mut c_int, attribute: c_uint, ordinal: c_int) |gpu| {
        device(gpu, ordinal)?;
        let (major, minor) = gpu.settings.compute;
        put(value, match attribute {
            1 => 1024,              // threads of a block
            8 => 48 << 10,          // shared memory of a block
            10 => 32,               // threads of a warp
            16 => gpu.settings.num_sms,
            33 => BUS,
            75 => major,
            76 => minor,
            81 => 228 << 10,        // shared memory of a multiprocessor
            97 => 227 << 10,        // most shared memory of a block
            115 => 0,               // pools of memory
            _ => 0,
        })
    }
    started cuDevicePrimaryCtxRetain(context: *mut usize, ordinal: c_int) |gpu| {
        device(gpu, ordinal)?;
        put(context, CONTEXT)
    }
    started cuDevicePrimaryCtxRelease_v2(ordinal: c_int) |gpu| { device(gpu, ordinal) }
    started cuCtxSetCurrent(context: usize) |gpu| {
        if context != 0 && context != CONTEXT {
            return Err(INVALID_CONTEXT);
        }
        CURRENT.set(context);
        Ok(())
    }
    started cuCtxGetCurrent(context: *mut usize) |gpu| { put(context, CURRENT.get()) }
    waiting cuCtxSynchronize() |gpu| { gpu.drain() }

    waiting cuMemAlloc_v2(address: *mut u64, bytes: usize) |gpu| { put(address, gpu.alloc(bytes as u64)?) }
    waiting cuMemFree_v2(address: u64) |gpu| { gpu.free(address) }
    within cuMemGetInfo_v2(free: *mut usize, total: *mut usize) |gpu| {
        put(free, (gpu.settings.memory_bytes - gpu.used_bytes) as usize)?;
        put(total, gpu.settings.memory_bytes as usize)
    }
    waiting cuMemHostAlloc(at: *mut usize, bytes: usize, flags: c_uint) |gpu| {
        // CU_MEMHOSTALLOC_DEVICEMAP
        put(at, gpu.alloc_pinned(bytes, flags & 2 != 0)?)
    }
    within cuMemHostGetDevicePointer_v2(address: *mut u64, at: usize, flags: c_uint) |gpu| { put(address, gpu.mapped(at)?) }
    waiting cuMemFreeHost(at: usize) |gpu| { gpu.free_pinned(at) }
    within cuMemcpyHtoDAsync_v2(to: u64, from: *const u8, bytes: usize, stream: u64) |gpu| { gpu.copy_to_device(to, from, bytes, stream) }
    waiting cuMemcpyHtoD_v2(to: u64, from: *const u8, bytes: usize) |gpu| {
        gpu.copy_to_device(to, from, bytes, 0)?;
        gpu.drain_stream(0)
    }
    within cuMemcpyDtoHAsync_v2(to: *mut u8, from: u64, bytes: usize, stream: u64) |gpu| { gpu.copy_to_host(to, from, bytes, stream) }
    waiting cuMemcpyDtoH_v2(to: *mut u8, from: u64, bytes: usize) |gpu| {
        gpu.copy_to_host(to, from, bytes, 0)?;
        gpu.drain_stream(0)
    }
    within cuMemcpyDtoDAsync_v2(to: u64, from: u64, bytes: usize, stream: u64) |gpu| {
        gpu.inside(to, bytes)?;
        gpu.inside(from, bytes)?;
        gpu.enqueue(stream, Op::Copy { to, from, len: bytes })
    }
    within cuMemsetD8Async(to: u64, byte: u8, bytes: usize, stream: u64) |gpu| {
        gpu.inside(to, bytes)?;
        gpu.enqueue(stream, Op::Fill { to, byte, len: bytes })
    }

    within cuStreamCreate(stream: *mut u64, flags: c_uint) |gpu| { put(stream, gpu.new_stream()) }
    within cuStreamCreateWithPriority(stream: *mut u64, flags: c_uint, priority: c_int) |gpu| { put(stream, gpu.new_stream()) }
    waiting cuStreamDestroy_v2(stream: u64) |gpu| { gpu.drop_stream(stream) }
    waiting cuStreamSynchronize(stream: u64) |gpu| { gpu.drain_stream(stream) }
    within cuStreamQuery(stream: u64) |gpu| {
        if gpu.queue(stream)?.ops.is_empty() {
            return Ok(());
        }
        // Whoever asks again and again comes to the end.
        gpu.advance()?;
        Err(NOT_READY)
    }
    within cuStreamWaitEvent(stream: u64, event: u64, flags: c_uint) |gpu| { gpu.wait(stream, event) }
    within cuEventCreate(event: *mut u64, flags: c_uint) |gpu| { put(event, gpu.new_event(flags & 2 == 0)) }
    within cuEventDestroy_v2(event: u64) |gpu| { gpu.drop_event(event) }
    within cuEventRecord(event: u64, stream: u64) |gpu| { gpu.record(event, stream) }
    within cuEventRecordWithFlags(event: u64, stream: u64, flags: c_uint) |gpu| {
        match flags {
            0 => gpu.record(event, stream),
            // CU_EVENT_RECORD_EXTERNAL
            1 => gpu.record_inside(event, stream),
            _ => Err(INVALID_VALUE),
        }
    }
    waiting cuEventSynchronize(event: u64) |gpu| {
        match gpu.event(event)?.mark.clone() {
            Some(mark) => gpu.advance_until(|_| mark.get().is_some()),
            None => Ok(()),
        }
    }
    within cuEventQuery(event: u64) |gpu| {
        let Some(mark) = gpu.event(event)?.mark.clone() else { return Ok(()) };
        // It works on while it is asked.
        let _did_some = mark.get().is_some() || gpu.advance()?;
        if mark.get().is_some() { Ok(()) } else { Err(NOT_READY) }
    }
    within cuEventElapsedTime(ms: *mut f32, start: u64, end: u64) |gpu| { put(ms, gpu.elapsed_ms(start, end)?) }

    within cuModuleLoadData(module: *mut u64, text: *const c_char) |gpu| {
        put(module, load(gpu, text, &mut |_| ())?)
    }
    within cuModuleLoadDataEx(
        module: *mut u64, text: *const c_char, num_options: c_uint, options: *const c_uint, values: *mut *mut c_void
    ) |gpu| {
        let option = |wanted: c_uint| (0..num_options as usize).find(|i| *options.add(*i) == wanted).map(|i| *values.add(i));
        // CU_JIT_ERROR_LOG_BUFFER and its size.
        let log = option(5).zip(option(6));
        put(module, load(gpu, text, &mut |message| if let Some((buffer, size)) = log {
            let n = message.len().min((size as usize).saturating_sub(1));
            std::ptr::copy_nonoverlapping(message.as_ptr(), buffer.cast(), n);
            buffer.cast::<u8>().add(n).write(0);
        })?)
    }
    waiting cuModuleUnload(module: u64) |gpu| { gpu.unload(module) }
    within cuModuleGetFunction(function: *mut u64, module: u64, name: *const c_char) |gpu| {
        let name = CStr::from_ptr(name).to_str().map_err(|_| INVALID_VALUE)?;
        put(function, gpu.function(module, name)?)
    }
    within cuFuncGetAttribute(value: *mut c_int, attribute: c_int, function: u64) |gpu| { put(value, 0) }
    within cuFuncSetAttribute(function: u64, attribute: c_int, value: c_int) |gpu| {
        // CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        if attribute == 8 { gpu.allow_shared(function, value.max(0) as u32) } else { Ok(()) }
    }
    within cuLaunchKernel(
        function: u64, grid_x: c_uint, grid_y: c_uint, grid_z: c_uint, block_x: c_uint, block_y: c_uint, block_z: c_uint,
        shared_bytes: c_uint, stream: u64, params: *const *const u8, extra: *const c_void
    ) |gpu| {
        gpu.launch(function, ([grid_x, grid_y, grid_z], [block_x, block_y, block_z]), shared_bytes, stream, params)
    }
    started cuTensorMapEncodeTiled(
        map: *mut [u8; 128], dtype: c_uint, rank: c_uint, address: u64, dims: *const u64, strides: *const u64, box_dims: *const u32,
        element_strides: *const u32, interleave: c_uint, swizzle: c_uint, promotion: c_uint, fill: c_uint
    ) |gpu| {
        let rank = rank as usize;
        let elem_bytes = *[1, 2, 4, 4, 8, 8, 2, 4, 8, 2, 4, 4, 4].get(dtype as usize).ok_or(INVALID_VALUE)?;
        let swizzle = *[0, 32, 64, 128].get(swizzle as usize).ok_or(INVALID_VALUE)?;
        if !(map as usize).is_multiple_of(64) || !(1..=5).contains(&rank) || interleave != 0 {
            return Err(INVALID_VALUE);
        }
        let info = TensorMapInfo {
            address,
            elem_bytes,
            dims: std::slice::from_raw_parts(dims, rank).to_vec(),
            strides: std::slice::from_raw_parts(strides, rank - 1).to_vec(),
            box_dims: std::slice::from_raw_parts(box_dims, rank).to_vec(),
            swizzle,
        };
        let steps = std::slice::from_raw_parts(element_strides, rank);
        if steps.iter().any(|step| *step != 1) || info.strides.iter().any(|stride| *stride >= 1 << 40) {
            return Err(INVALID_VALUE);
        }
        put(map, info.encode().map_err(|_| INVALID_VALUE)?)
    }

    within cuStreamBeginCapture_v2(stream: u64, mode: c_uint) |gpu| { gpu.begin_capture(stream, mode) }
    within cuStreamEndCapture(stream: u64, graph: *mut u64) |gpu| { put(graph, gpu.end_capture(stream)?) }
    within cuStreamIsCapturing(stream: u64, status: *mut c_uint) |gpu| { put(status, c_uint::from(gpu.queue(stream)?.capture.is_some())) }
    within cuGraphInstantiateWithFlags(exec: *mut u64, graph: u64, flags: u64) |gpu| { put(exec, gpu.instantiate(graph)?) }
    within cuGraphLaunch(exec: u64, stream: u64) |gpu| {
        if gpu.queue(stream)?.capture.is_some() {
            return Err(STREAM_CAPTURE_UNSUPPORTED);
        }
        gpu.launch_graph(exec, stream)
    }
    within cuGraphUpload(exec: u64, stream: u64) |gpu| { gpu.graph_execs.get(&exec).map(|_| ()).ok_or(INVALID_HANDLE) }
    within cuGraphExecDestroy(exec: u64) |gpu| { gpu.graph_execs.remove(&exec).map(|_| ()).ok_or(INVALID_HANDLE) }
    within cuGraphDestroy(graph: u64) |gpu| { gpu.graphs.remove(&graph).map(|_| ()).ok_or(INVALID_HANDLE) }

    any cuGetErrorName(error: c_uint, text: *mut *const c_char) |gpu| {
        put(text, describe(error).ok_or(INVALID_VALUE)?.0.as_ptr())
    }
    any cuGetErrorString(error: c_uint, text: *mut *const c_char) |gpu| {
        put(text, describe(error).ok_or(INVALID_VALUE)?.1.as_ptr())
    }
}

unsafe fn load(gpu: &mut Gpu, text: *const c_char, log: &mut dyn FnMut(&str)) -> Outcome<u64> {
    // SAFETY: PTX ends with a nul, as the manual says.
    let text = unsafe { CStr::from_ptr(text) }.to_str().map_err(|_| INVALID_VALUE)?;
    gpu.load(text).map_err(|(code, message)| {
        log(&message);
        code
    })
}

/// Runs when the process ends, if what ran is to be told.
extern "C" fn tell() {
    if let Some(gpu) = &*lock() {
        gpu.stats.tell();
    }
}

unsafe extern "C" {
    fn atexit(call: extern "C" fn()) -> c_int;
}

/// Asks the C library to call [`tell`].
pub(crate) fn tell_at_exit() {
    // SAFETY: the function takes nothing, gives nothing, and stays loaded.
    unsafe { atexit(tell) };
}
