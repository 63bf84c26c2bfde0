//! A stand-in for NCCL, for tests: named by `HADAL_NCCL`, it lets processes whose GPUs are stand-ins exchange what is in their memory. It
//! has the functions that Hadal uses, for communicators that do not block.
//!
//! It takes the driver that the process has loaded, and reads and writes device memory through it. Members find each other in a folder
//! that the unique id names, and messages are files of it: a send is over when its receiver has taken the file.
//!
//! What NCCL does on a stream, a thread does here: it waits for the stream when a group ends, and until the group is over, sends and
//! receives matched, the communicator is in progress. So the stream's order is kept for whoever waits as NCCL's manual asks, and who
//! does not is told. It is stricter than NCCL: sizes that differ between sender and receiver, transfers that overlap, a group on two
//! streams, and any use of a communicator that is busy, ended or aborted are errors, with words on stderr. Without a match a group is in
//! progress for ever, and can be aborted. Two ranks on one GPU are refused, as NCCL does by default.
//!
//! Environment, read here only:
//!
//! | variable | is | if unset |
//! |---|---|---|
//! | `PTXSIM_NCCL_VERSION` | what `ncclGetVersion` says | 23203 |
//! | `PTXSIM_STATS` | at exit of the process, tell on stderr what was sent | no |
#![expect(unsafe_code, reason = "the entry points are C functions over pointers")]
#![allow(clippy::print_stderr, reason = "a library that stands in has no other way to explain itself")]

mod api;
mod comm;
mod driver;
mod group;

use std::{
    io,
    path::{Path, PathBuf},
};

/// File name of this library as cargo builds it.
const BUILT: &str = "libptxsim_nccl.so";

/// Puts the library into `folder` under the name that NCCL has, and returns the file: the value of `HADAL_NCCL`.
///
/// # Errors
/// If the library was not built beside the running test, or cannot be linked to.
pub fn install(folder: &Path) -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let near =
        program.ancestors().skip(1).take(3).flat_map(|folder| [folder.join(BUILT), folder.join("deps").join(BUILT)]);
    let built = near.into_iter().find(|path| path.is_file());
    let built = built.ok_or_else(|| io::Error::other(format!("there is no {BUILT} beside {}", program.display())))?;
    let link = folder.join("libnccl.so.2");
    if !link.exists() {
        std::os::unix::fs::symlink(&built, &link)?;
    }
    Ok(link)
}
