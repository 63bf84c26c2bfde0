//! An MPI library, loaded while the program runs: nothing links to one, so the same program runs with any and without.
//!
//! Libraries agree on the functions and not on what their arguments are: handles are addresses in Open MPI, 32-bit numbers in
//! MPICH, and numbers of a pointer's size in the ABI of MPI 5 (chapter 20), which newer libraries offer beside their own. Which
//! of the three a library speaks is seen from what it exports.

#![expect(non_snake_case, reason = "MPI's names")]

use std::{
    ffi::{CStr, c_char, c_int, c_void},
    mem::ManuallyDrop,
    path::{Path, PathBuf},
};

use libloading::os::unix::{Library, RTLD_GLOBAL, RTLD_NOW};

use crate::comm::loaders_words as words;

/// A communicator, type, group or request; as wide as the widest. Where a library's are of 32 bits, the upper half is 0, and
/// calls pass the lower.
pub type Handle = usize;

/// What a library's handles and constants are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Abi {
    /// MPI 5's own.
    Standard,
    /// Open MPI's.
    OpenMpi,
    /// MPICH's, which Intel MPI and Cray MPICH share.
    Mpich,
}

/// Names under which libraries are looked for: the standard ABI, then Open MPI 4 and 5, then MPICH.
pub const NAMES: [&str; 4] = ["libmpi_abi.so.1", "libmpi_abi.so.0", "libmpi.so.40", "libmpi.so.12"];

/// A function of MPI, which returns an error code.
macro_rules! functions {
    ($($name:ident: fn($($type:ty),*),)*) => {
        /// The functions that are used, and the constants of their arguments.
        pub struct Functions {
            $(pub $name: unsafe extern "C" fn($($type),*) -> c_int,)*
            pub abi: Abi,
            pub world: Handle,
            pub byte: Handle,
            pub errors_return: Handle,
            /// `MPI_STATUS_IGNORE`.
            pub no_status: usize,
            pub thread_multiple: c_int,
            /// The file.
            pub path: PathBuf,
            // Dropped never: a library that was started may not go.
            _library: ManuallyDrop<Library>,
        }

        impl Functions {
            /// Loads the library of this name or path; the loader's words if it cannot.
            pub fn load(path: &Path) -> Result<Self, String> {
                // SAFETY: the initializers of an MPI library do nothing to this process but set the library up. Global, because
                // Open MPI's components look for its symbols in the process.
                let library = unsafe { Library::open(Some(path), RTLD_NOW | RTLD_GLOBAL) }.map_err(words)?;
                let address = |name: &CStr| -> Option<usize> {
                    // SAFETY: only the symbol's address is taken.
                    unsafe { library.get::<*mut c_void>(name.to_bytes_with_nul()) }.ok().map(|s| s.into_raw() as usize)
                };
                let abi = if address(c"ompi_mpi_comm_world").is_some() {
                    Abi::OpenMpi
                } else if address(c"MPI_Abi_get_version").is_some() && is_standard(path) {
                    Abi::Standard
                } else {
                    Abi::Mpich
                };
                let of_open_mpi = |name: &CStr| address(name).ok_or_else(|| format!("no {}", name.to_string_lossy()));
                let (world, byte, errors_return, no_status, thread_multiple) = match abi {
                    Abi::Standard => (0x101, 0x247, 0x143, 0, 4096),
                    Abi::Mpich => (0x4400_0000, 0x4c00_010d, 0x5400_0001, 1, 3),
                    Abi::OpenMpi => (
                        of_open_mpi(c"ompi_mpi_comm_world")?,
                        of_open_mpi(c"ompi_mpi_byte")?,
                        of_open_mpi(c"ompi_mpi_errors_return")?,
                        0,
                        3,
                    ),
                };
                let path = path.to_owned();
                Ok(Functions {
                    // SAFETY: the standard says what arguments the function of this name has; handles are passed in registers,
                    // where callees read as much of them as they need.
                    $($name: *unsafe { library.get(concat!("MPI_", stringify!($name), "\0").as_bytes()) }.map_err(words)?,)*
                    abi, world, byte, errors_return, no_status, thread_multiple, path,
                    _library: ManuallyDrop::new(library),
                })
            }
        }
    };
}

type In = *const c_void;
type Out = *mut c_void;

functions! {
    Init_thread: fn(*mut c_int, *mut c_void, c_int, *mut c_int),
    Finalize: fn(),
    Get_library_version: fn(*mut c_char, *mut c_int),
    Error_string: fn(c_int, *mut c_char, *mut c_int),
    Comm_rank: fn(Handle, *mut c_int),
    Comm_size: fn(Handle, *mut c_int),
    Comm_dup: fn(Handle, *mut Handle),
    Comm_set_errhandler: fn(Handle, Handle),
    Comm_group: fn(Handle, *mut Handle),
    Group_incl: fn(Handle, c_int, *const c_int, *mut Handle),
    Comm_create_group: fn(Handle, Handle, c_int, *mut Handle),
    Isend: fn(In, c_int, Handle, c_int, c_int, Handle, *mut Handle),
    Irecv: fn(Out, c_int, Handle, c_int, c_int, Handle, *mut Handle),
    Test: fn(*mut Handle, *mut c_int, usize),
    Cancel: fn(*mut Handle),
    Wait: fn(*mut Handle, usize),
    Ialltoall: fn(In, c_int, Handle, Out, c_int, Handle, Handle, *mut Handle),
    Ialltoallv: fn(In, *const c_int, *const c_int, Handle, Out, *const c_int, *const c_int, Handle, Handle, *mut Handle),
}

/// MPICH's own library has the function that tells the version of the standard ABI too.
fn is_standard(path: &Path) -> bool {
    path.file_name().is_some_and(|name| name.to_string_lossy().contains("abi"))
}
