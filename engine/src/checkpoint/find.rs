//! The checkpoint to go on from: whole ones are told from damaged ones by their manifest, and the manifest by its digest.

use std::{
    fs, io,
    path::{Path, PathBuf},
};

use super::{
    DIGEST, Error, FOLDER, LATEST, MANIFEST, Manifest, TRAIN, checksum, digest_of, folder_name, io_error, path, steps,
};

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

/// The steps of run directory `root` that have a checkpoint, whole or not: the one that `latest` names, then the greatest first.
///
/// # Errors
/// If the folder cannot be listed.
pub fn candidates(root: &Path) -> Result<Vec<u64>, Error> {
    let mut steps = steps(&root.join(FOLDER))?;
    if let Ok(target) = fs::read_link(root.join(LATEST)) {
        let is_latest = |step: &u64| target.file_name().is_some_and(|name| *name == *folder_name(*step));
        steps.sort_by_key(|step| !is_latest(step));
    }
    Ok(steps)
}

/// Whether the checkpoint itself is wrong: it lacks a file, or has another. One that cannot be read now may be whole.
pub fn is_damage(error: &Error) -> bool {
    match error {
        Error::Io { source, .. } => {
            matches!(
                source.kind(),
                io::ErrorKind::NotFound | io::ErrorKind::NotADirectory | io::ErrorKind::IsADirectory
            )
        }
        _ => true,
    }
}

/// The first of [`candidates`] that is whole. Reads every byte of those it looks at.
///
/// # Errors
/// If the folder cannot be listed, or a file not be read although it is there. A damaged checkpoint is no error: it is skipped.
pub fn latest_valid(root: &Path) -> Result<Found, Error> {
    let mut found = Found::default();
    for step in candidates(root)? {
        let path = path(root, step);
        match verify(&path, step) {
            Ok(()) => {
                (found.path, found.step) = (Some(path), step);
                break;
            }
            Err(error) if is_damage(&error) => found.skipped.push((path, error.to_string())),
            Err(error) => return Err(error),
        }
    }
    Ok(found)
}

/// Compares a checkpoint with its manifest, and that with its digest.
///
/// # Errors
/// Names the first file that is missing or differs.
pub fn verify(folder: &Path, step: u64) -> Result<(), Error> {
    verify_share(folder, step, (0, 1))
}

/// The same for one of `num` who look at every `num`th file: `(which, num)`. All look at the manifest.
///
/// # Errors
/// As [`verify`].
pub fn verify_share(folder: &Path, step: u64, (which, num): (usize, usize)) -> Result<(), Error> {
    let path = folder.join(TRAIN).join(MANIFEST);
    let damaged = |path: &Path, reason: String| Err(Error::Damaged { path: path.to_owned(), reason });
    let text = fs::read(&path).map_err(io_error("read", &path))?;
    let digest_path = folder.join(TRAIN).join(DIGEST);
    let digest = fs::read(&digest_path).map_err(io_error("read", &digest_path))?;
    let expected = digest_of(&text);
    if digest != expected.as_bytes() {
        let found = String::from_utf8_lossy(&digest).trim_end().to_owned();
        return damaged(&path, format!("it is `{}`, but {DIGEST} says `{found}`", expected.trim_end()));
    }
    let manifest: Manifest = match serde_json::from_slice(&text) {
        Ok(manifest) => manifest,
        Err(error) => return damaged(&path, error.to_string()),
    };
    if manifest.step != step {
        return damaged(&path, format!("it is of step {}, the folder's name says {step}", manifest.step));
    }
    for listed in manifest.files.iter().skip(which).step_by(num) {
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
