//! NCCL's library, loaded while the program runs: the functions that are used, and its errors in its own words.
//!
//! The names and numbers are those of `nccl.h`, which has kept them since 2.18: what came later is only ever added.

#![expect(non_snake_case, reason = "NCCL's names")]

use std::{
    ffi::{CStr, c_char, c_int, c_uint, c_void},
    mem::ManuallyDrop,
    path::{Path, PathBuf},
    ptr,
};

use libloading::os::unix::{Library, RTLD_LOCAL, RTLD_NOW};

use crate::{
    comm::loaders_words as words,
    error::{Error, Result},
};

/// Names under which the library is looked for.
pub const NAMES: [&str; 2] = ["libnccl.so.2", "libnccl.so"];

/// The oldest that has all that is used, and takes the configuration as it is given here.
pub const OLDEST: u32 = 21800;

/// A communicator; an address.
pub type Handle = usize;

/// `ncclSuccess`, and `ncclInProgress`: a communicator that does not block is not done with the last call.
pub const SUCCESS: c_int = 0;
pub const IN_PROGRESS: c_int = 7;
/// `ncclUint8`.
const BYTE: c_int = 1;

/// `ncclUniqueId`: what members of a communicator find each other by.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct UniqueId(pub [u8; 128]);

/// `ncclConfig_t` as of 2.18; what a newer library has more of, it takes as not set.
#[repr(C)]
struct Config {
    size: usize,
    magic: c_uint,
    version: c_uint,
    blocking: c_int,
    cga_cluster_size: c_int,
    min_ctas: c_int,
    max_ctas: c_int,
    net_name: *const c_char,
    split_share: c_int,
    /// Where newer ones have a field, and older ones nothing.
    traffic_class: c_int,
}

macro_rules! functions {
    ($($name:ident: fn($($type:ty),*),)*) => {
        /// The functions that are used; each returns an error code.
        pub struct Functions {
            $($name: unsafe extern "C" fn($($type),*) -> c_int,)*
            error_string: unsafe extern "C" fn(c_int) -> *const c_char,
            last_error: unsafe extern "C" fn(*mut c_void) -> *const c_char,
            /// The file.
            pub path: PathBuf,
            /// As 23203 for 2.32.3.
            pub version: u32,
            // Dropped never: threads of the library may be in it.
            _library: ManuallyDrop<Library>,
        }

        impl Functions {
            /// Loads the library of this name or path, and asks for its version; the loader's words if it cannot.
            pub fn load(path: &Path) -> std::result::Result<Self, String> {
                // SAFETY: the initializers of the library do nothing to this process but set the library up.
                let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_LOCAL) }.map_err(words)?;
                let mut functions = Functions {
                    // SAFETY: `nccl.h` says what arguments the function of this name has.
                    $($name: *unsafe { library.get(concat!("nccl", stringify!($name), "\0").as_bytes()) }.map_err(words)?,)*
                    // SAFETY: as above.
                    error_string: *unsafe { library.get(b"ncclGetErrorString\0") }.map_err(words)?,
                    // SAFETY: as above.
                    last_error: *unsafe { library.get(b"ncclGetLastError\0") }.map_err(words)?,
                    path: path.to_owned(),
                    version: 0,
                    _library: ManuallyDrop::new(library),
                };
                let mut version = 0;
                // SAFETY: the place is of this frame.
                let code = unsafe { (functions.GetVersion)(&mut version) };
                functions.check("ncclGetVersion", None, code).map_err(|e| e.to_string())?;
                functions.version = version as u32;
                Ok(functions)
            }
        }
    };
}

functions! {
    GetVersion: fn(*mut c_int),
    GetUniqueId: fn(*mut UniqueId),
    CommInitRankConfig: fn(*mut *mut c_void, c_int, UniqueId, c_int, *mut Config),
    CommGetAsyncError: fn(*mut c_void, *mut c_int),
    CommFinalize: fn(*mut c_void),
    CommDestroy: fn(*mut c_void),
    CommAbort: fn(*mut c_void),
    GroupStart: fn(),
    GroupEnd: fn(),
    Send: fn(*const c_void, usize, c_int, c_int, *mut c_void, *mut c_void),
    Recv: fn(*mut c_void, usize, c_int, c_int, *mut c_void, *mut c_void),
}

/// So many bytes at an address of the device, for a member or from it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Piece {
    pub member: usize,
    pub address: u64,
    pub bytes: usize,
}

impl Functions {
    /// `Err` in the library's words, unless all is well or goes on.
    fn check(&self, op: &'static str, comm: Option<Handle>, code: c_int) -> Result<()> {
        if code == SUCCESS || code == IN_PROGRESS {
            return Ok(());
        }
        let text = |text: *const c_char| {
            // SAFETY: the library's texts end with a nul, and stay until the thread's next call.
            let text = (!text.is_null()).then(|| unsafe { CStr::from_ptr(text) }.to_string_lossy().into_owned());
            text.filter(|text| !text.is_empty())
        };
        // SAFETY: any number may be asked for; the communicator is live, or none.
        let words = unsafe {
            let last = (self.last_error)(comm.map_or(ptr::null_mut(), |comm| comm as *mut c_void));
            [text((self.error_string)(code)), text(last)]
        };
        let words: Vec<String> = words.into_iter().flatten().collect();
        let advice = "NCCL_DEBUG=WARN says more; HADAL_NCCL=none does without it";
        Err(Error::Comm { op, message: format!("error {code}: {}; {advice}", words.join(": ")) })
    }

    /// A new one, that one member makes for all.
    pub fn unique_id(&self) -> Result<UniqueId> {
        let mut id = UniqueId([0; 128]);
        // SAFETY: the place is of the type.
        let code = unsafe { (self.GetUniqueId)(&mut id) };
        self.check("ncclGetUniqueId", None, code).map(|()| id)
    }

    /// Begins to make a communicator that does not block, on the thread's device, whose kernels have so many blocks at most.
    pub fn begin(&self, num_members: usize, id: UniqueId, me: usize, most_blocks: Option<u32>) -> Result<Handle> {
        let undefined = c_int::MIN;
        let mut config = Config {
            size: size_of::<Config>(),
            magic: 0xcafe_beef,
            version: OLDEST,
            blocking: 0,
            cga_cluster_size: undefined,
            min_ctas: undefined,
            max_ctas: most_blocks.map_or(undefined, |blocks| blocks as c_int),
            net_name: ptr::null(),
            split_share: undefined,
            traffic_class: undefined,
        };
        let mut comm = ptr::null_mut();
        // SAFETY: the places are of this frame, and the library copies the configuration.
        let code = unsafe { (self.CommInitRankConfig)(&mut comm, num_members as c_int, id, me as c_int, &mut config) };
        self.check("ncclCommInitRankConfig", None, code).map(|()| comm as Handle)
    }

    /// Whether the communicator is done with the last call.
    pub fn is_settled(&self, comm: Handle) -> Result<bool> {
        let mut state = SUCCESS;
        // SAFETY: the communicator is live.
        let code = unsafe { (self.CommGetAsyncError)(comm as *mut c_void, &mut state) };
        self.check("ncclCommGetAsyncError", Some(comm), code)?;
        self.check("ncclCommGetAsyncError", Some(comm), state)?;
        Ok(state == SUCCESS)
    }

    /// Puts sends and receives on the stream, as one: none waits for another.
    ///
    /// # Safety
    /// The pieces are memory of the thread's device that stays until the stream has done its work; the stream is live.
    pub unsafe fn exchange(
        &self,
        comm: Handle,
        sends: &[Piece],
        receives: &[Piece],
        stream: *mut c_void,
    ) -> Result<()> {
        let handle = comm as *mut c_void;
        // SAFETY: a group is of this thread.
        self.check("ncclGroupStart", Some(comm), unsafe { (self.GroupStart)() })?;
        let mut put = Ok(());
        for Piece { member, address, bytes } in sends {
            // SAFETY: the caller's promise.
            let code =
                unsafe { (self.Send)(*address as *const c_void, *bytes, BYTE, *member as c_int, handle, stream) };
            put = put.and_then(|()| self.check("ncclSend", Some(comm), code));
        }
        for Piece { member, address, bytes } in receives {
            // SAFETY: the caller's promise.
            let code = unsafe { (self.Recv)(*address as *mut c_void, *bytes, BYTE, *member as c_int, handle, stream) };
            put = put.and_then(|()| self.check("ncclRecv", Some(comm), code));
        }
        // SAFETY: as above; also after a failure, since a group that was started has to end.
        let ended = unsafe { (self.GroupEnd)() };
        put.and_then(|()| self.check("ncclGroupEnd", Some(comm), ended))
    }

    /// Begins to end a communicator that is at rest; all members do.
    pub fn finalize(&self, comm: Handle) -> Result<()> {
        // SAFETY: the communicator is live.
        let code = unsafe { (self.CommFinalize)(comm as *mut c_void) };
        self.check("ncclCommFinalize", Some(comm), code)
    }

    /// Gives back what a communicator has that was finalized; it is used no more.
    pub fn destroy(&self, comm: Handle) -> Result<()> {
        // SAFETY: as above.
        let code = unsafe { (self.CommDestroy)(comm as *mut c_void) };
        self.check("ncclCommDestroy", None, code)
    }

    /// Ends a communicator whatever is under way; it is used no more. Of no other thread's use at the time.
    pub fn abort(&self, comm: Handle) {
        // SAFETY: as above. What it fails of cannot be mended: the run is at its end.
        let _ = unsafe { (self.CommAbort)(comm as *mut c_void) };
    }
}

/// As people write it.
pub fn version_text(version: u32) -> String {
    format!("{}.{}.{}", version / 10000, version / 100 % 100, version % 100)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn versions_are_written_as_people_do() {
        for (version, text) in [(23203, "2.32.3"), (21800, "2.18.0"), (23004, "2.30.4")] {
            assert_eq!(version_text(version), text);
        }
    }

    #[test]
    fn the_configuration_has_the_layout_of_the_header() {
        assert_eq!((size_of::<Config>(), std::mem::offset_of!(Config, net_name)), (48, 32));
        assert_eq!(size_of::<UniqueId>(), 128);
    }
}
