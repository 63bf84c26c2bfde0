//! A stand-in for the CUDA driver over the interpreter, for tests: placed as `libcuda.so` in a folder of `LD_LIBRARY_PATH`, it lets an
//! unchanged program run its kernels where there is no GPU.
//!
//! It is a stricter device than any real one. Work of a stream is put off until a call has to wait for it, and then streams advance in
//! an order that a seed decides: an event that nobody waited for shows as a wrong result. Handles that were never made, copies outside
//! of an allocation, calls without a current context and launches beyond the limits are errors of their own codes. An error of a kernel
//! poisons the context, as on hardware, and is explained on stderr.
//!
//! Environment, read here only:
//!
//! | variable | is | if unset |
//! |---|---|---|
//! | `PTXSIM_SEED` | seed of the interpreter and of the order of streams | 1 |
//! | `PTXSIM_DEVICES` | number of devices, 0 or 1 | 1 |
//! | `PTXSIM_DRIVER` | what `cuDriverGetVersion` says | 12040 |
//! | `PTXSIM_COMPUTE` | compute capability, as `8.6` | 9.0 |
//! | `PTXSIM_SMS` | number of multiprocessors | 4 |
//! | `PTXSIM_MEMORY` | bytes of device memory | 1 GiB |
//! | `PTXSIM_UUID` | number in the UUID of the device | another in each process |
//! | `PTXSIM_REFUSE` | a kernel whose name contains this does not load | none |
//! | `PTXSIM_MILLIJOULES` | what the energy counter of NVML's stand-in grows by with each reading | there is none |
//! | `PTXSIM_MILLIWATTS` | what the device draws, by the same | not told |
//! | `PTXSIM_STATS` | at exit of the process, tell on stderr what ran | no |
#![expect(unsafe_code, reason = "the entry points are C functions over pointers")]
#![allow(clippy::print_stderr, reason = "a driver has no other way to explain itself")]

mod api;
mod errors;
mod graph;
mod nvml;
mod queue;
mod settings;
mod state;

use std::{
    io,
    path::{Path, PathBuf},
    process::{Command, Output},
};

/// File name of this library as cargo builds it.
const BUILT: &str = "libptxsim_driver.so";

/// Puts the library into `folder` under the names that programs look for, and returns the folder: the value of `LD_LIBRARY_PATH` of a
/// child process that is to find it. The name that cargo gives it is another one, so that nothing finds it by accident.
///
/// # Errors
/// If the library was not built beside the running test, or cannot be linked to.
pub fn install(folder: &Path) -> io::Result<PathBuf> {
    link(folder, &["libcuda.so", "libcuda.so.1"])
}

/// Puts the same library into `folder` as NVML too.
///
/// # Errors
/// Those of [`install`].
pub fn install_nvml(folder: &Path) -> io::Result<PathBuf> {
    link(folder, &["libnvidia-ml.so.1"])
}

fn link(folder: &Path, names: &[&str]) -> io::Result<PathBuf> {
    let program = std::env::current_exe()?;
    let near =
        program.ancestors().skip(1).take(3).flat_map(|folder| [folder.join(BUILT), folder.join("deps").join(BUILT)]);
    let built = near.into_iter().find(|path| path.is_file());
    let built = built.ok_or_else(|| io::Error::other(format!("there is no {BUILT} beside {}", program.display())))?;
    for name in names {
        let link = folder.join(name);
        if !link.exists() {
            std::os::unix::fs::symlink(&built, link)?;
        }
    }
    Ok(folder.to_owned())
}

/// Runs one ignored test of the running test program in a process of its own, which finds this library as its driver: the library is
/// chosen when a process first looks for it, and its settings are the process'. What it says on stderr.
///
/// # Panics
/// If it fails, or is not run.
pub fn run_ignored(test: &str, settings: &[(&str, &str)]) -> String {
    let folder = std::env::temp_dir().join(format!("ptxsim-{}-{}", std::process::id(), test.replace("::", "-")));
    let run = || {
        std::fs::create_dir_all(&folder)?;
        let output = Command::new(std::env::current_exe()?)
            .args([test, "--exact", "--ignored", "--nocapture", "--test-threads=1"])
            .env("LD_LIBRARY_PATH", install(&folder)?)
            .envs(settings.iter().copied())
            .output();
        std::fs::remove_dir_all(&folder)?;
        output
    };
    let Output { status, stdout, stderr } = run().expect("the stand-in is built, and the test starts");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    let (stdout, stderr) = (text(&stdout), text(&stderr));
    assert!(status.success() && stdout.contains("1 passed"), "{settings:?}\n{stdout}\n{stderr}");
    stderr
}
