//! Checkpoints that survive crashes, full disks and flipped bits.
//!
//! A checkpoint is a folder. It is written under a temporary name, listed with checksums in its manifest, synced, and only
//! then renamed; `latest` moves after that, and old ones go last. So whatever happens, what was there before is still there,
//! and what has a checkpoint's name is whole or is found not to be.

use std::{
    fs::{self, File},
    io::{self, ErrorKind, Read},
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, RenameFlags, renameat_with};
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
        ErrorKind::PermissionDenied => "make it writable for this user, or choose another run directory",
        ErrorKind::ReadOnlyFilesystem => "mount it writable, or choose another run directory",
        ErrorKind::NotFound => "check that the path exists",
        _ => "look at this path and its disk",
    }
}

pub(crate) fn io_error<'a>(operation: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> Error + use<'a> {
    move |source| Error::Io { operation, path: path.to_owned(), source }
}

const FOLDER: &str = "checkpoints";
const TEMPORARY: &str = ".tmp-";
const MANIFEST: &str = "train/manifest.json";
const LATEST: &str = "latest";

/// All files of a checkpoint but this one.
#[derive(Debug, Serialize, Deserialize)]
struct Manifest {
    step: u64,
    files: Vec<Listed>,
}

#[derive(Debug, Serialize, Deserialize)]
struct Listed {
    /// Relative to the checkpoint, with `/`.
    path: String,
    size_bytes: u64,
    sha256: String,
}

fn folder_name(step: u64) -> String {
    format!("step-{step:07}")
}

/// Saves a checkpoint of `step` in run directory `root` and returns its folder, `root/checkpoints/step-0000100`.
///
/// `fill` writes any files into the folder it is given. `root/latest` then links to the new checkpoint, and all but
/// `keep_last` checkpoints (at least the new one stays) are removed: first those of later steps, which belong to a run that
/// was abandoned, then the oldest. A checkpoint of the same step is replaced.
///
/// # Errors
/// If anything cannot be written. What was there before is then untouched, `latest` included, and no part of the new one
/// is left. (If only removing old ones fails, the new one stands, and the next save tries again.)
pub fn save(
    root: &Path,
    step: u64,
    keep_last: usize,
    fill: impl FnOnce(&Path) -> Result<(), BoxError>,
) -> Result<PathBuf, Error> {
    let folder = root.join(FOLDER);
    fs::create_dir_all(&folder).map_err(io_error("make", &folder))?;
    remove_temporaries(&folder)?;
    let temporary = Temporary(folder.join(format!("{TEMPORARY}{}", folder_name(step))));
    fs::create_dir(&temporary.0).map_err(io_error("make", &temporary.0))?;
    fill(&temporary.0).map_err(|error| fill_error(&temporary.0, error))?;
    write_manifest(&temporary.0, step)?;
    sync_tree(&temporary.0)?;

    let path = folder.join(folder_name(step));
    if path.exists() {
        replace(&temporary.0, &path).map_err(io_error("replace", &path))?;
    } else {
        fs::rename(&temporary.0, &path).map_err(io_error("rename to", &path))?;
    }
    sync(&folder)?;
    link_latest(root, step)?;
    prune(&folder, step, keep_last)?;
    Ok(path)
}

/// Exchanges two folders in one step, so that at every moment there is a checkpoint. File systems that cannot (NFS) do it in
/// two; the old one has a temporary name in between.
fn replace(new: &Path, old: &Path) -> io::Result<()> {
    if renameat_with(CWD, new, CWD, old, RenameFlags::EXCHANGE).is_ok() {
        return Ok(());
    }
    let aside = new.with_extension("replaced");
    fs::rename(old, &aside)?;
    fs::rename(new, old).inspect_err(|_| {
        let _ = fs::rename(&aside, old);
    })?;
    fs::remove_dir_all(&aside)
}

/// A folder that is removed when done with, however that comes about.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Renamed away if all went well; else the error on its way out says more than this one would.
        let _ = fs::remove_dir_all(&self.0);
    }
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

fn remove_temporaries(folder: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(folder).map_err(io_error("list", folder))? {
        let path = entry.map_err(io_error("list", folder))?.path();
        if path.file_name().is_some_and(|name| name.to_string_lossy().starts_with(TEMPORARY)) {
            fs::remove_dir_all(&path).map_err(io_error("remove", &path))?;
        }
    }
    Ok(())
}

/// Files under `folder`, relative to it, sorted.
fn files(folder: &Path) -> Result<Vec<PathBuf>, Error> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).map_err(io_error("list", &dir))? {
            let path = entry.map_err(io_error("list", &dir))?.path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.push(path.strip_prefix(folder).unwrap_or(&path).to_owned());
            }
        }
    }
    found.sort();
    Ok(found)
}

fn write_manifest(folder: &Path, step: u64) -> Result<(), Error> {
    let listed = |path: PathBuf| {
        let (size_bytes, sha256) = checksum(&folder.join(&path))?;
        let names: Vec<_> = path.iter().map(|name| name.to_string_lossy()).collect();
        Ok(Listed { path: names.join("/"), size_bytes, sha256 })
    };
    let files = files(folder)?.into_iter().map(listed).collect::<Result<_, Error>>()?;
    let path = folder.join(MANIFEST);
    let text = serde_json::to_string_pretty(&Manifest { step, files });
    let text = text.map_err(|error| io_error("write", &path)(error.into()))?;
    let dir = folder.join("train");
    fs::create_dir_all(&dir).map_err(io_error("make", &dir))?;
    fs::write(&path, text).map_err(io_error("write", &path))
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
    let hex = hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect();
    Ok((size_bytes, hex))
}

/// Makes a file, or the names in a folder, durable.
fn sync(path: &Path) -> Result<(), Error> {
    File::open(path).and_then(|file| file.sync_all()).map_err(io_error("sync", path))
}

fn sync_tree(folder: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(folder).map_err(io_error("list", folder))? {
        let path = entry.map_err(io_error("list", folder))?.path();
        if path.is_dir() { sync_tree(&path)? } else { sync(&path)? }
    }
    sync(folder)
}

fn link_latest(root: &Path, step: u64) -> Result<(), Error> {
    let (latest, fresh) = (root.join(LATEST), root.join(".latest.tmp"));
    match fs::remove_file(&fresh) {
        Err(error) if error.kind() != ErrorKind::NotFound => return Err(io_error("remove", &fresh)(error)),
        _ => {}
    }
    std::os::unix::fs::symlink(Path::new(FOLDER).join(folder_name(step)), &fresh).map_err(io_error("make", &fresh))?;
    fs::rename(&fresh, &latest).map_err(io_error("move", &latest))?;
    sync(root)
}

/// Steps that have a folder, the next best to `latest` first.
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

fn prune(folder: &Path, newest: u64, keep_last: usize) -> Result<(), Error> {
    let mut steps = steps(folder)?;
    steps.sort_unstable_by_key(|&step| (step > newest, std::cmp::Reverse(step)));
    for step in steps.into_iter().skip(keep_last.max(1)) {
        // Renamed first: a removal that is cut off leaves a temporary, never half a checkpoint.
        let path = folder.join(folder_name(step));
        let doomed = Temporary(folder.join(format!("{TEMPORARY}pruned-{}", folder_name(step))));
        fs::rename(&path, &doomed.0).map_err(io_error("remove", &path))?;
    }
    Ok(())
}

/// What [`latest_valid`] found.
#[derive(Debug, Default)]
pub struct Found {
    /// The checkpoint, if there is a whole one.
    pub path: Option<PathBuf>,
    /// Its step.
    pub step: u64,
    /// Newer ones that are damaged, and how.
    pub skipped: Vec<(PathBuf, String)>,
}

/// The checkpoint of run directory `root` to go on from: the one that `latest` names, or else that of the greatest step,
/// whichever is whole. Reads every byte of those it looks at.
///
/// # Errors
/// If the folder cannot be listed. A damaged checkpoint is no error: it is skipped.
pub fn latest_valid(root: &Path) -> Result<Found, Error> {
    let folder = root.join(FOLDER);
    let mut steps = steps(&folder)?;
    if let Ok(target) = fs::read_link(root.join(LATEST)) {
        let is_latest = |step: &u64| target.file_name().is_some_and(|name| *name == *folder_name(*step));
        steps.sort_by_key(|step| !is_latest(step));
    }
    let mut found = Found::default();
    for step in steps {
        let path = folder.join(folder_name(step));
        match verify(&path, step) {
            Ok(()) => {
                (found.path, found.step) = (Some(path), step);
                break;
            }
            Err(error) => found.skipped.push((path, error.to_string())),
        }
    }
    Ok(found)
}

/// Compares a checkpoint with its manifest.
///
/// # Errors
/// Names the first file that is missing or differs.
pub fn verify(folder: &Path, step: u64) -> Result<(), Error> {
    let path = folder.join(MANIFEST);
    let damaged = |path: &Path, reason: String| Err(Error::Damaged { path: path.to_owned(), reason });
    let text = fs::read(&path).map_err(io_error("read", &path))?;
    let manifest: Manifest = match serde_json::from_slice(&text) {
        Ok(manifest) => manifest,
        Err(error) => return damaged(&path, error.to_string()),
    };
    if manifest.step != step {
        return damaged(&path, format!("it is of step {}, the folder's name says {step}", manifest.step));
    }
    for listed in &manifest.files {
        let path = folder.join(&listed.path);
        let (size_bytes, sha256) = checksum(&path)?;
        if size_bytes != listed.size_bytes {
            return damaged(&path, format!("expected {} bytes, found {size_bytes}", listed.size_bytes));
        }
        if sha256 != listed.sha256 {
            return damaged(&path, format!("expected SHA-256 {}, found {sha256}", listed.sha256));
        }
    }
    Ok(())
}

#[cfg(test)]
#[path = "checkpoint_tests.rs"]
mod tests;
