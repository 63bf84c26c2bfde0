//! The entry points, under the names and with the arguments of `nccl.h`. Handles are numbers, checked on each call.
#![allow(non_snake_case, reason = "the names are NCCL's")]
#![allow(missing_docs, clippy::missing_safety_doc, reason = "what they do, and want, is in NCCL's manual")]

use std::{
    collections::BTreeMap,
    env,
    ffi::{CStr, CString, OsStr, c_char, c_int, c_void},
    fs,
    io::Write as _,
    os::unix::ffi::OsStrExt as _,
    path::PathBuf,
    sync::{
        Arc, Mutex, Once,
        atomic::{AtomicU64, Ordering},
    },
};

use crate::{
    comm::{Code, Comm, Failed, IN_PROGRESS, STATS, State, lock},
    group::{self, Transfer},
};

/// By handle.
static COMMS: Mutex<BTreeMap<usize, Arc<Comm>>> = Mutex::new(BTreeMap::new());
static NEXT: AtomicU64 = AtomicU64::new(0xACC1_0000);
/// What went wrong, the last one last. Kept: whoever asked has the address.
static ERRORS: Mutex<Vec<CString>> = Mutex::new(Vec::new());

#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId([u8; 128]);

/// The beginning of `ncclConfig_t`.
#[repr(C)]
pub struct Config {
    size: usize,
    magic: u32,
    version: u32,
    blocking: c_int,
}

/// Says what is wrong, on stderr and to whoever asks for the last error.
pub(crate) fn explain(failed: &Failed) {
    eprintln!("ptxsim nccl: {}", failed.why);
    lock(&ERRORS).push(CString::new(failed.why.as_str()).unwrap_or_default());
}

/// A call's code; `true` is for what goes on.
fn code(done: Result<bool, Failed>) -> Code {
    match done {
        Ok(goes_on) => IN_PROGRESS * Code::from(goes_on),
        Err(failed) => {
            explain(&failed);
            failed.code
        }
    }
}

fn comm(handle: usize) -> Result<Arc<Comm>, Failed> {
    let found = lock(&COMMS).get(&handle).cloned();
    found.ok_or_else(|| Failed::argument("no such communicator: it was never made, or is destroyed or aborted"))
}

fn version() -> c_int {
    env::var("PTXSIM_NCCL_VERSION").ok().and_then(|text| text.parse().ok()).unwrap_or(23203)
}

fn put<T>(to: *mut T, value: T) -> Result<bool, Failed> {
    if to.is_null() {
        return Err(Failed::argument("a place for the result is not there"));
    }
    // SAFETY: an out pointer that is not null has room for its type.
    unsafe { to.write(value) };
    Ok(false)
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetVersion(to: *mut c_int) -> Code {
    code(put(to, version()))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetErrorString(code: Code) -> *const c_char {
    let text = match code {
        0 => c"no error",
        1 => c"unhandled cuda error",
        2 => c"unhandled system error",
        3 => c"internal error",
        4 => c"invalid argument",
        5 => c"invalid usage",
        6 => c"remote process exited or there was a network error",
        7 => c"NCCL operation in progress",
        _ => c"unknown result code",
    };
    text.as_ptr()
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGetLastError(_: *mut c_void) -> *const c_char {
    lock(&ERRORS).last().map_or(c"".as_ptr(), |text| text.as_ptr())
}

/// Runs when the process ends, if what was sent is to be told.
extern "C" fn tell() {
    let [comms, aborted, groups, sends, bytes] =
        [&STATS.comms, &STATS.aborted, &STATS.groups, &STATS.sends, &STATS.bytes].map(|n| n.load(Ordering::Relaxed));
    let told = format!(
        "ptxsim nccl: {comms} communicators, {aborted} aborted, {groups} groups, {sends} sends of {bytes} bytes\n"
    );
    // At once: several processes tell.
    let _ = std::io::stderr().write_all(told.as_bytes());
}

unsafe extern "C" {
    fn atexit(call: extern "C" fn()) -> c_int;
}

fn tell_at_exit() {
    static ONCE: Once = Once::new();
    if env::var_os("PTXSIM_STATS").is_some() {
        ONCE.call_once(|| {
            // SAFETY: the function takes nothing, gives nothing, and stays loaded.
            let _ = unsafe { atexit(tell) };
        });
    }
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclGetUniqueId(to: *mut UniqueId) -> Code {
    let make = || {
        let number = NEXT.fetch_add(1, Ordering::Relaxed);
        let folder = env::temp_dir().join(format!("ptxsim-nccl-{}-{number:x}", std::process::id()));
        fs::create_dir_all(&folder)?;
        let name = folder.as_os_str().as_bytes();
        let mut id = UniqueId([0; 128]);
        // The last byte stays a nul.
        let Some(place) = id.0[..127].get_mut(..name.len()) else {
            return Err(Failed::argument(format!("{} is too long a name", folder.display())));
        };
        place.copy_from_slice(name);
        put(to, id)
    };
    code(make())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommInitRankConfig(
    to: *mut usize,
    num_members: c_int,
    id: UniqueId,
    me: c_int,
    config: *const Config,
) -> Code {
    tell_at_exit();
    let make = || {
        // SAFETY: a configuration that is not null has these fields at least.
        let config = unsafe { config.as_ref() }.ok_or_else(|| Failed::argument("there is no configuration"))?;
        if config.magic != 0xcafe_beef || config.size < size_of::<Config>() || config.version < 21400 {
            return Err(Failed::argument("the configuration was not initialized"));
        }
        if config.blocking != 0 {
            return Err(Failed::argument("communicators block elsewhere, not here: set blocking to 0"));
        }
        let (Ok(num_members), Ok(me)) = (usize::try_from(num_members), usize::try_from(me)) else {
            return Err(Failed::argument("a number of members or a rank is negative"));
        };
        let name = CStr::from_bytes_until_nul(&id.0).map_err(|_| Failed::argument("the unique id is none"))?;
        let folder = PathBuf::from(OsStr::from_bytes(name.to_bytes()));
        if me >= num_members || !folder.is_dir() {
            return Err(Failed::argument(format!("rank {me} of {num_members} in {}", folder.display())));
        }
        let may_share = version() >= 23000 && env::var("NCCL_MULTI_RANK_GPU_ENABLE").is_ok_and(|text| text == "1");
        let comm = Comm::begin(folder, num_members, me, may_share)?;
        let handle = NEXT.fetch_add(1, Ordering::Relaxed) as usize;
        lock(&COMMS).insert(handle, comm);
        put(to, handle)?;
        Ok(true)
    };
    code(make())
}

#[unsafe(no_mangle)]
pub unsafe extern "C" fn ncclCommGetAsyncError(handle: usize, to: *mut Code) -> Code {
    code(comm(handle).and_then(|comm| {
        put(
            to,
            match comm.state() {
                State::Busy => IN_PROGRESS,
                State::Ready | State::Finalized => 0,
                State::Failed(code) => code,
            },
        )
    }))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommFinalize(handle: usize) -> Code {
    code(comm(handle).and_then(|comm| comm.finalize().map(|()| true)))
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommDestroy(handle: usize) -> Code {
    let destroy = || {
        comm(handle)?.destroy()?;
        lock(&COMMS).remove(&handle);
        Ok(false)
    };
    code(destroy())
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclCommAbort(handle: usize) -> Code {
    let abort = || {
        comm(handle)?.abort();
        lock(&COMMS).remove(&handle);
        Ok(false)
    };
    code(abort())
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupStart() -> Code {
    group::start();
    0
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclGroupEnd() -> Code {
    code(group::end())
}

fn transfer(
    is_send: bool,
    (address, count, kind): (u64, usize, c_int),
    peer: c_int,
    handle: usize,
    stream: usize,
) -> Code {
    let put = || {
        let sizes = [1, 1, 4, 4, 8, 8, 2, 4, 8, 2, 1, 1];
        let size = usize::try_from(kind)
            .ok()
            .and_then(|kind| sizes.get(kind))
            .ok_or_else(|| Failed::argument(format!("there is no type {kind}")))?;
        let peer = usize::try_from(peer).map_err(|_| Failed::argument(format!("there is no member {peer}")))?;
        group::put(is_send, Transfer { peer, address, bytes: count * size }, (handle, comm(handle)?), stream)
    };
    code(put())
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclSend(from: u64, count: usize, kind: c_int, peer: c_int, handle: usize, stream: usize) -> Code {
    transfer(true, (from, count, kind), peer, handle, stream)
}

#[unsafe(no_mangle)]
pub extern "C" fn ncclRecv(to: u64, count: usize, kind: c_int, peer: c_int, handle: usize, stream: usize) -> Code {
    transfer(false, (to, count, kind), peer, handle, stream)
}
