//! A run's folder is one run's at a time: two that write to it would take each other's checkpoints away.

use std::{
    fs::{self, File, OpenOptions, TryLockError},
    io::Write as _,
    path::Path,
};

use crate::session::SessionError;

/// The file that is locked, and says by whom.
const FILE: &str = "run.lock";

/// A folder that is taken until this is dropped, or its process ends in whatever way.
pub struct Claim {
    _file: Option<File>,
}

/// Takes a run's folder, which is there. On a file system without locks nothing is taken.
///
/// # Errors
/// If another run has it.
pub fn claim(dir: &Path) -> Result<Claim, SessionError> {
    let path = dir.join(FILE);
    let cannot = |e| SessionError::runtime(format!("cannot write {}: {e}", path.display()));
    let mut file = OpenOptions::new().create(true).append(true).open(&path).map_err(cannot)?;
    match file.try_lock() {
        Ok(()) => {}
        Err(TryLockError::WouldBlock) => {
            let by = fs::read_to_string(&path).unwrap_or_default();
            return Err(SessionError::input(format!(
                "{} is being written to by another run ({}); wait for its end, stop it, or give this one another name (--set \
                 name='\"other\"')",
                dir.display(),
                if by.trim().is_empty() { "it did not say which" } else { by.trim() }
            )));
        }
        Err(TryLockError::Error(_)) => return Ok(Claim { _file: None }),
    }
    let host = fs::read_to_string("/proc/sys/kernel/hostname").unwrap_or_default();
    file.set_len(0).map_err(cannot)?;
    writeln!(file, "process {} on {}", std::process::id(), host.trim()).map_err(cannot)?;
    Ok(Claim { _file: Some(file) })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]
    use super::*;

    #[test]
    fn a_folder_is_one_runs_until_that_ends() {
        let dir = tempfile::tempdir().unwrap();
        let first = claim(dir.path()).unwrap();
        let refused = claim(dir.path()).err().unwrap();
        assert_eq!(refused.exit_code, 2);
        assert!(refused.message.contains(&format!("process {} on ", std::process::id())), "{}", refused.message);
        drop(first);
        claim(dir.path()).unwrap();
        claim(dir.path()).unwrap();
    }
}
