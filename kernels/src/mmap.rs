//! Read-only memory maps of files: token shards and checkpoints are read where they lie, by every rank of a machine, without
//! a copy per rank. It lives here because mapping is `unsafe` and this is the only crate that may say so.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

/// The bytes of a file, mapped read-only; they stay readable after the file is renamed or unlinked.
#[derive(Debug)]
pub struct Mapped(memmap2::Mmap);

/// Maps the whole file at `path`. An empty file gives an empty slice.
///
/// Contract: nobody shortens or rewrites the file in place while it is mapped. What Hadal maps is written under a temporary
/// name and renamed, so an update makes a new file and leaves mapped ones alone.
///
/// # Errors
/// Those of opening, inspecting and mapping the file.
pub fn map_file(path: &Path) -> io::Result<Mapped> {
    let file = File::open(path)?;
    if !file.metadata()?.is_file() {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "not a regular file"));
    }
    map(&file).map(Mapped)
}

#[expect(unsafe_code, reason = "there is no safe way to map a file: another process can always change it")]
fn map(file: &File) -> io::Result<memmap2::Mmap> {
    // SAFETY: the mapping is private to this value, read-only and unmapped when it is dropped, so memory safety rests on the
    // file keeping its bytes; `map_file` states that contract, and Hadal replaces such files by rename only.
    unsafe { memmap2::MmapOptions::new().map(file) }
}

impl Deref for Mapped {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.0
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic with the failing expression")]
    use super::*;

    fn scratch(name: &str) -> std::path::PathBuf {
        let dir = std::env::temp_dir().join(format!("hadal-mmap-{}-{name}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        dir
    }

    #[test]
    fn a_map_holds_the_bytes_and_outlives_the_name() {
        let dir = scratch("bytes");
        for bytes in [&b""[..], b"x", &[7; 10_000]] {
            let path = dir.join("file");
            std::fs::write(&path, bytes).unwrap();
            let mapped = map_file(&path).unwrap();
            std::fs::remove_file(&path).unwrap();
            assert_eq!(&*mapped, bytes);
        }
        std::fs::remove_dir_all(dir).unwrap();
    }

    #[test]
    fn a_missing_file_and_a_folder_are_errors() {
        let dir = scratch("errors");
        assert_eq!(map_file(&dir.join("none")).unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(map_file(&dir).is_err());
        std::fs::remove_dir_all(dir).unwrap();
    }
}
