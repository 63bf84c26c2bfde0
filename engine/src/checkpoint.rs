//! Checkpoints that survive crashes, full disks and flipped bits.
//!
//! A checkpoint is a folder that one or many write into, each its own files. It has a temporary name until all of them are
//! synced and listed with checksums in its manifest; `latest` moves after that, and old ones go last ([`Draft`]). So whatever
//! happens, what was there before is still there, and what has a checkpoint's name is whole or is found not to be
//! ([`latest_valid`]).

mod commit;
mod find;

pub use commit::{Draft, Keep};
pub use find::{Found, candidates, is_damage, latest_valid, verify, verify_share};

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read},
    path::{Path, PathBuf},
};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

/// A checkpoint cannot be written or read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused.
    #[error("cannot {operation} {}: {source}; {}", path.display(), advice(source))]
    Io {
        /// Make, write, sync, ...
        operation: &'static str,
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Whoever fills the checkpoint failed.
    #[error("cannot fill checkpoint {}: {source}", path.display())]
    Fill {
        /// The temporary folder.
        path: PathBuf,
        /// What went wrong.
        source: BoxError,
    },
    /// A file is not what it should be.
    #[error("{} is damaged: {reason}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// In what way.
        reason: String,
    },
    /// A tensor is not what it should be.
    #[error("{}: `{name}`: expected {expected}, found {found}", path.display())]
    Tensor {
        /// File.
        path: PathBuf,
        /// Tensor.
        name: String,
        /// Type and extents.
        expected: String,
        /// Type and extents.
        found: String,
    },
}

/// Any error of whoever fills a checkpoint.
pub type BoxError = Box<dyn std::error::Error + Send + Sync>;

fn advice(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded | ErrorKind::FileTooLarge => {
            "free space there, keep fewer checkpoints, or put the run directory on another disk"
        }
        ErrorKind::PermissionDenied => "give this user access to it, or choose another run directory",
        ErrorKind::ReadOnlyFilesystem => "mount it writable, or choose another run directory",
        ErrorKind::NotFound => "check that the path exists",
        _ => "look at this path and its disk",
    }
}

pub(crate) fn io_error<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + use<'a> {
    move |source| Error::Io { operation, path: path.to_owned(), source }
}

const FOLDER: &str = "checkpoints";
const LATEST: &str = "latest";
/// Where the manifest and what is no part of the model are.
const TRAIN: &str = "train";
const MANIFEST: &str = "manifest.json";
/// The manifest's own checksum, as `sha256sum` writes it.
const DIGEST: &str = "manifest.sha256";

/// All files of a checkpoint but this one and its digest, by path.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    step: u64,
    files: Vec<Listed>,
}

/// A file of a checkpoint that is durable.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listed {
    /// Relative to the checkpoint, with `/`.
    pub path: String,
    /// Length.
    pub size_bytes: u64,
    /// Checksum in hexadecimal.
    pub sha256: String,
}

fn folder_name(step: u64) -> String {
    format!("step-{step:07}")
}

/// The folder that a checkpoint of `step` has in run directory `root`.
pub fn path(root: &Path, step: u64) -> PathBuf {
    root.join(FOLDER).join(folder_name(step))
}

/// Writes files into the folder of a [`Draft`], and makes them durable: `write` returns their paths, relative to it. Many may do
/// so at a time, with files of their own.
///
/// # Errors
/// If a file cannot be written.
pub fn fill(folder: &Path, write: impl FnOnce(&Path) -> Result<Vec<String>, BoxError>) -> Result<Vec<Listed>, Error> {
    let files = write(folder).map_err(|error| fill_error(folder, error))?;
    let listed = |path: String| {
        let file = folder.join(&path);
        sync(&file)?;
        let (size_bytes, sha256) = checksum(&file)?;
        Ok(Listed { path, size_bytes, sha256 })
    };
    files.into_iter().map(listed).collect()
}

/// An error of ours or of the operating system says itself where and why; others get the folder.
fn fill_error(path: &Path, error: BoxError) -> Error {
    let error = match error.downcast::<Error>() {
        Ok(ours) => return *ours,
        Err(other) => other,
    };
    match error.downcast::<io::Error>() {
        Ok(source) => io_error("write into", path)(*source),
        Err(source) => Error::Fill { path: path.to_owned(), source },
    }
}

/// Size in bytes and SHA-256 in hexadecimal.
fn checksum(path: &Path) -> Result<(u64, String), Error> {
    let mut file = File::open(path).map_err(io_error("read", path))?;
    let (mut hasher, mut size_bytes) = (Sha256::new(), 0);
    let mut chunk = vec![0; 1 << 20];
    loop {
        let len = match file.read(&mut chunk) {
            Ok(0) => break,
            Ok(len) => len,
            Err(error) if error.kind() == ErrorKind::Interrupted => continue,
            Err(error) => return Err(io_error("read", path)(error)),
        };
        hasher.update(&chunk[..len]);
        size_bytes += len as u64;
    }
    Ok((size_bytes, hex(&hasher.finalize())))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What stands in the manifest's digest.
fn digest_of(manifest: &[u8]) -> String {
    format!("{}  {MANIFEST}\n", hex(&Sha256::digest(manifest)))
}

/// Makes a file, or the names in a folder, durable.
fn sync(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|file| file.sync_all()).map_err(io_error("sync", path))
}

/// Steps that have a folder, the greatest first.
fn steps(folder: &Path) -> Result<Vec<u64>, Error> {
    let entries = match fs::read_dir(folder) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries.map_err(io_error("list", folder))?,
    };
    let mut steps = Vec::new();
    for entry in entries {
        let name = entry.map_err(io_error("list", folder))?.file_name();
        let step = name.to_string_lossy().strip_prefix("step-").and_then(|digits| digits.parse().ok());
        steps.extend(step.filter(|&step| *folder_name(step) == *name));
    }
    steps.sort_unstable_by(|a, b| b.cmp(a));
    Ok(steps)
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
