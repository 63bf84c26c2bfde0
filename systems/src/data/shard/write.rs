//! Writing shards: under temporary names first, so that a crash or a full disk leaves nothing that opens.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::{HEADER_BYTES, MAGIC, Origin, Shard, ShardError, VERSION};

/// Writes a shard document by document; nothing appears under its name before [`ShardWriter::finish`].
#[derive(Debug)]
pub struct ShardWriter {
    bin: PathBuf,
    temporary: Temporary,
    file: BufWriter<File>,
    vocab_size: usize,
    origin: Origin,
    token_offsets: Vec<u64>,
    byte_offsets: Vec<u64>,
}

impl ShardWriter {
    /// Starts the shard whose token file will be `bin`, in u16 when `vocab_size` allows it, and makes its folder.
    ///
    /// # Errors
    /// Those of making the folder and the temporary file.
    pub fn create(bin: &Path, vocab_size: usize, origin: Origin) -> Result<ShardWriter, ShardError> {
        if let Some(folder) = bin.parent() {
            fs::create_dir_all(folder).map_err(|source| ShardError::Io {
                operation: "make the folder of",
                path: bin.to_owned(),
                source,
            })?;
        }
        let temporary = Temporary::beside(bin);
        let file = File::create(&temporary.0).map_err(|source| ShardError::Io {
            operation: "create",
            path: temporary.0.clone(),
            source,
        })?;
        let (token_offsets, byte_offsets) = (vec![0], vec![0]);
        let file = BufWriter::new(file);
        Ok(ShardWriter { bin: bin.to_owned(), temporary, file, vocab_size, origin, token_offsets, byte_offsets })
    }

    fn token_bytes(&self) -> u32 {
        if self.vocab_size <= 1 << 16 { 2 } else { 4 }
    }

    /// Appends a document of `num_bytes` UTF-8 bytes.
    ///
    /// # Errors
    /// A token id that is not below the vocabulary's size; a failed write.
    pub fn push(&mut self, tokens: &[u32], num_bytes: u64) -> Result<(), ShardError> {
        let document = self.token_offsets.len() - 1;
        if let Some(index) = tokens.iter().position(|id| *id as usize >= self.vocab_size) {
            let (path, id, vocab_size) = (self.bin.clone(), tokens[index], self.vocab_size);
            return Err(ShardError::TokenRange { path, document, index, id, vocab_size });
        }
        let token_bytes = self.token_bytes() as usize;
        let mut write = || tokens.iter().try_for_each(|id| self.file.write_all(&id.to_le_bytes()[..token_bytes]));
        write().map_err(|source| ShardError::Io { operation: "write", path: self.temporary.0.clone(), source })?;
        self.token_offsets.push(self.token_offsets[document] + tokens.len() as u64);
        self.byte_offsets.push(self.byte_offsets[document] + num_bytes);
        Ok(())
    }

    /// Syncs and names both files, and opens the shard.
    ///
    /// # Errors
    /// A failed write, sync or rename; those of [`Shard::open`].
    pub fn finish(mut self) -> Result<Shard, ShardError> {
        let num_documents = self.token_offsets.len() - 1;
        let mut index = Vec::with_capacity(HEADER_BYTES + 16 * (num_documents + 1));
        index.extend_from_slice(MAGIC);
        index.extend_from_slice(&VERSION.to_le_bytes());
        index.extend_from_slice(&self.token_bytes().to_le_bytes());
        for total in [self.token_offsets[num_documents], num_documents as u64, self.byte_offsets[num_documents]] {
            index.extend_from_slice(&total.to_le_bytes());
        }
        index.extend_from_slice(&self.origin.source);
        index.extend_from_slice(&self.origin.tokenizer);
        for offset in self.token_offsets.iter().chain(&self.byte_offsets) {
            index.extend_from_slice(&offset.to_le_bytes());
        }
        let sync = |file: &mut BufWriter<File>| file.flush().and_then(|()| file.get_ref().sync_all());
        sync(&mut self.file)
            .and_then(|()| fs::rename(&self.temporary.0, &self.bin))
            .map_err(|source| ShardError::Io { operation: "finish", path: self.bin.clone(), source })?;
        let idx = self.bin.with_extension("idx");
        write_atomically(&idx, &index).map_err(|source| ShardError::Io { operation: "write", path: idx, source })?;
        Shard::open(&self.bin)
    }
}

/// Writes `bytes` under a temporary name, syncs, and renames it to `path`, whose folder is made.
pub(crate) fn write_atomically(path: &Path, bytes: &[u8]) -> io::Result<()> {
    if let Some(folder) = path.parent() {
        fs::create_dir_all(folder)?;
    }
    let temporary = Temporary::beside(path);
    let mut file = File::create(&temporary.0)?;
    file.write_all(bytes)?;
    file.sync_all()?;
    fs::rename(&temporary.0, path)
}

/// A name nobody else uses, beside the final one; the file is removed if it was not renamed.
#[derive(Debug)]
struct Temporary(PathBuf);

impl Temporary {
    fn beside(path: &Path) -> Temporary {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let mut name = path.as_os_str().to_owned();
        name.push(format!(".{}-{}.tmp", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed)));
        Temporary(PathBuf::from(name))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // Gone already when it was renamed; otherwise a leftover that nobody will miss.
        let _ = fs::remove_file(&self.0);
    }
}
