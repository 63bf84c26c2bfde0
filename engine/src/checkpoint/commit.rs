//! From a temporary folder to a checkpoint, in stages. Wherever it is cut off between two of them, the checkpoint before is whole, and
//! is `latest` until the new one is.

use std::{
    fs, io,
    io::ErrorKind,
    path::{Path, PathBuf},
};

use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::{
    DIGEST, Error, FOLDER, LATEST, Listed, MANIFEST, Manifest, TRAIN, digest_of, folder_name, io_error, path, steps,
    sync,
};

const TEMPORARY: &str = ".tmp-";

/// Which checkpoints stay when there is a new one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Keep {
    /// So many of the newest; at least one.
    pub last: usize,
    /// And each of a multiple of so many steps.
    pub every_steps: Option<u64>,
}

impl Keep {
    /// The newest `last`.
    pub fn last(last: usize) -> Self {
        Keep { last, every_steps: None }
    }
}

/// A checkpoint in the making: a folder with a temporary name, which is removed if it does not become one.
#[derive(Debug)]
pub struct Draft {
    root: PathBuf,
    step: u64,
    temporary: Temporary,
}

/// A draft whose files are durable.
pub(super) struct Commit {
    draft: Draft,
    manifest: Manifest,
    keep: Keep,
}

/// A part of a commit.
pub(super) type Stage = fn(&Commit) -> Result<(), Error>;

/// Nothing is removed before the last stage.
pub(super) const STAGES: [Stage; 7] = [
    Commit::write_manifest,
    Commit::write_digest,
    Commit::sync_folders,
    Commit::publish,
    Commit::sync_checkpoints,
    Commit::move_latest,
    Commit::prune,
];

impl Draft {
    /// Makes the folder for a checkpoint of `step` in run directory `root`, and removes what was cut off before.
    ///
    /// # Errors
    /// If it cannot be made.
    pub fn begin(root: &Path, step: u64) -> Result<Self, Error> {
        let folder = root.join(FOLDER);
        fs::create_dir_all(&folder).map_err(io_error("make", &folder))?;
        remove_temporaries(&folder)?;
        let temporary = Temporary(Self::folder(root, step));
        let train = temporary.0.join(TRAIN);
        fs::create_dir_all(&train).map_err(io_error("make", &train))?;
        Ok(Draft { root: root.to_owned(), step, temporary })
    }

    /// Where a draft's files go, so that others can write theirs.
    pub fn folder(root: &Path, step: u64) -> PathBuf {
        root.join(FOLDER).join(format!("{TEMPORARY}{}", folder_name(step)))
    }

    /// Makes it the checkpoint `root/checkpoints/step-0000100`, which `root/latest` then links to, and returns its folder. `files`
    /// are what everybody has filled in. Checkpoints that need not be kept are removed after that: first those of later steps,
    /// which belong to a run that was abandoned, then the oldest. One of the same step is replaced.
    ///
    /// # Errors
    /// If anything cannot be written. What was there before is then untouched, `latest` included, and no part of the new one
    /// is left. (If only removing old ones fails, the new one stands, and the next tries again.)
    pub fn commit(self, files: Vec<Listed>, keep: Keep) -> Result<PathBuf, Error> {
        let commit = self.listing(files, keep);
        STAGES.iter().try_for_each(|stage| stage(&commit))?;
        Ok(commit.path())
    }

    pub(super) fn listing(self, mut files: Vec<Listed>, keep: Keep) -> Commit {
        files.sort_by(|a, b| a.path.cmp(&b.path));
        Commit { manifest: Manifest { step: self.step, files }, draft: self, keep }
    }
}

impl Commit {
    fn temporary(&self) -> &Path {
        &self.draft.temporary.0
    }

    fn path(&self) -> PathBuf {
        path(&self.draft.root, self.draft.step)
    }

    fn checkpoints(&self) -> PathBuf {
        self.draft.root.join(FOLDER)
    }

    fn write_manifest(&self) -> Result<(), Error> {
        let path = self.temporary().join(TRAIN).join(MANIFEST);
        let text = serde_json::to_string_pretty(&self.manifest);
        let text = text.map_err(|error| io_error("write", &path)(error.into()))?;
        fs::write(&path, text).map_err(io_error("write", &path))?;
        sync(&path)
    }

    fn write_digest(&self) -> Result<(), Error> {
        let train = self.temporary().join(TRAIN);
        let manifest = fs::read(train.join(MANIFEST)).map_err(io_error("read", &train))?;
        let path = train.join(DIGEST);
        fs::write(&path, digest_of(&manifest)).map_err(io_error("write", &path))?;
        sync(&path)
    }

    fn sync_folders(&self) -> Result<(), Error> {
        sync_folders(self.temporary())
    }

    fn publish(&self) -> Result<(), Error> {
        let path = self.path();
        if path.exists() {
            replace(self.temporary(), &path).map_err(io_error("replace", &path))
        } else {
            fs::rename(self.temporary(), &path).map_err(io_error("rename to", &path))
        }
    }

    fn sync_checkpoints(&self) -> Result<(), Error> {
        sync(&self.checkpoints())
    }

    fn move_latest(&self) -> Result<(), Error> {
        let root = &self.draft.root;
        let (latest, fresh) = (root.join(LATEST), root.join(".latest.tmp"));
        match fs::remove_file(&fresh) {
            Err(error) if error.kind() != ErrorKind::NotFound => return Err(io_error("remove", &fresh)(error)),
            _ => {}
        }
        let target = Path::new(FOLDER).join(folder_name(self.draft.step));
        std::os::unix::fs::symlink(target, &fresh).map_err(io_error("make", &fresh))?;
        fs::rename(&fresh, &latest).map_err(io_error("move", &latest))?;
        sync(root)
    }

    fn prune(&self) -> Result<(), Error> {
        let (folder, newest) = (self.checkpoints(), self.draft.step);
        let mut steps = steps(&folder)?;
        steps.sort_unstable_by_key(|&step| (step > newest, std::cmp::Reverse(step)));
        let stays = |step: u64| self.keep.every_steps.is_some_and(|every| step <= newest && step.is_multiple_of(every));
        for step in steps.into_iter().skip(self.keep.last.max(1)).filter(|&step| !stays(step)) {
            // Renamed first: a removal that is cut off leaves a temporary, never half a checkpoint.
            let path = folder.join(folder_name(step));
            let doomed = Temporary(folder.join(format!("{TEMPORARY}pruned-{}", folder_name(step))));
            fs::rename(&path, &doomed.0).map_err(io_error("remove", &path))?;
        }
        Ok(())
    }
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
#[derive(Debug)]
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        // Renamed away if all went well; else the error on its way out says more than this one would.
        let _ = fs::remove_dir_all(&self.0);
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

/// The names in a folder and in those under it; the files themselves are durable.
fn sync_folders(folder: &Path) -> Result<(), Error> {
    for entry in fs::read_dir(folder).map_err(io_error("list", folder))? {
        let path = entry.map_err(io_error("list", folder))?.path();
        if path.is_dir() {
            sync_folders(&path)?;
        }
    }
    sync(folder)
}
