//! Token shards: documents as token ids in a pair of files, memory-mapped, so that every rank of a machine reads the same
//! pages and a start costs no tokenization. The same pair is the cache and the format for pre-tokenized corpora.
//!
//! `NAME.bin`: the tokens of all documents, one after the other, little-endian u16 or u32, without separators.
//! `NAME.idx`, little-endian:
//!
//! | bytes | field |
//! |---|---|
//! | 0..8 | magic `HADALIDX` |
//! | 8..12 | version, u32: 1 |
//! | 12..16 | bytes per token, u32: 2 or 4 |
//! | 16..24 | number of tokens, u64 |
//! | 24..32 | number of documents, u64 |
//! | 32..40 | UTF-8 bytes of all documents, u64 |
//! | 40..72 | SHA-256 of the documents |
//! | 72..104 | SHA-256 of the tokenizer |
//! | 104.. | documents + 1 token offsets, u64, then documents + 1 byte offsets, u64: where each document starts, and the end |
//!
//! Both are written under temporary names, synced and renamed, the index last: a crash leaves no pair that opens. Shards of a
//! cache are named after their hashes, so an edited corpus or another tokenizer never meets an old shard.

mod write;

use std::fs;
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};

use kernels::mmap::{Mapped, map_file};
use sha2::{Digest, Sha256};
use thiserror::Error;

pub use write::ShardWriter;
pub(super) use write::write_atomically;

const MAGIC: &[u8; 8] = b"HADALIDX";
const VERSION: u32 = 1;
const HEADER_BYTES: usize = 104;

/// A SHA-256 digest.
pub type Sha256Digest = [u8; 32];

/// Why a shard could not be written or opened.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum ShardError {
    /// A file operation failed.
    #[error("cannot {operation} the token shard file {}: {source}", path.display())]
    Io {
        /// `create`, `write`, `open`, ...
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// A file is not what the format says.
    #[error("{}: expected {expected}, found {found}; delete the shard and tokenize again", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What the format asks for.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A token has no embedding, or does not fit the shard's width.
    #[error("{}: document {document} has token id {id} at index {index}, the vocabulary has {vocab_size} tokens; use the tokenizer the shard was made with", path.display())]
    TokenRange {
        /// The .bin file.
        path: PathBuf,
        /// Index of the document.
        document: usize,
        /// Index of the token in the document.
        index: usize,
        /// The token id.
        id: u32,
        /// Number of tokens allowed.
        vocab_size: usize,
    },
}

/// What a shard was made from: a shard with other origins is stale.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Origin {
    /// Digest of the documents.
    pub source: Sha256Digest,
    /// Digest of the tokenizer.
    pub tokenizer: Sha256Digest,
}

/// Documents as token ids, read-only.
#[derive(Debug)]
pub struct Shard {
    path: PathBuf,
    tokens: Tokens,
    origin: Origin,
    token_offsets: Vec<u64>,
    byte_offsets: Vec<u64>,
}

#[derive(Debug)]
enum Tokens {
    U16(Mapped),
    U32(Mapped),
    Owned(Vec<u32>),
}

impl Shard {
    /// Opens the shard whose token file is `bin`; its index lies beside it with the extension `idx`.
    ///
    /// # Errors
    /// A missing file, or a pair that breaks the format anywhere but in the token values ([`Shard::check_vocab`] reads those).
    pub fn open(bin: &Path) -> Result<Shard, ShardError> {
        let idx = bin.with_extension("idx");
        let index = fs::read(&idx).map_err(|source| ShardError::Io { operation: "open", path: idx.clone(), source })?;
        let header = Header::parse(&idx, &index)?;
        let mapped =
            map_file(bin).map_err(|source| ShardError::Io { operation: "map", path: bin.to_owned(), source })?;
        let expected = header.num_tokens.checked_mul(u64::from(header.token_bytes));
        if expected != Some(mapped.len() as u64) {
            return Err(ShardError::Invalid {
                path: bin.to_owned(),
                expected: format!("{} tokens of {} bytes", header.num_tokens, header.token_bytes),
                found: format!("a file of {} bytes", mapped.len()),
            });
        }
        let tokens = if header.token_bytes == 2 { Tokens::U16(mapped) } else { Tokens::U32(mapped) };
        let Header { origin, token_offsets, byte_offsets, .. } = header;
        Ok(Shard { path: bin.to_owned(), tokens, origin, token_offsets, byte_offsets })
    }

    /// A shard in memory from (token ids, UTF-8 bytes) of each document; its origin is the tokens, with a tokenizer of zeros.
    pub fn from_documents(documents: impl IntoIterator<Item = (Vec<u32>, u64)>) -> Shard {
        let (mut tokens, mut token_offsets, mut byte_offsets) = (Vec::new(), vec![0], vec![0]);
        let mut hash = Sha256::new();
        for (document, num_bytes) in documents {
            hash.update((document.len() as u64).to_le_bytes());
            document.iter().for_each(|id| hash.update(id.to_le_bytes()));
            tokens.extend(document);
            token_offsets.push(tokens.len() as u64);
            byte_offsets.push(byte_offsets[byte_offsets.len() - 1] + num_bytes);
        }
        let path = PathBuf::from("(memory)");
        let origin = Origin { source: hash.finalize().into(), tokenizer: [0; 32] };
        Shard { path, tokens: Tokens::Owned(tokens), origin, token_offsets, byte_offsets }
    }

    /// The token file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// What the shard was made from.
    pub fn origin(&self) -> Origin {
        self.origin
    }

    /// Number of documents.
    pub fn num_documents(&self) -> usize {
        self.token_offsets.len() - 1
    }

    /// Number of tokens of all documents.
    pub fn num_tokens(&self) -> u64 {
        self.token_offsets[self.num_documents()]
    }

    /// UTF-8 bytes of all documents.
    pub fn num_bytes(&self) -> u64 {
        self.byte_offsets[self.num_documents()]
    }

    /// Number of tokens of one document.
    pub fn document_tokens(&self, document: usize) -> u64 {
        self.token_offsets[document + 1] - self.token_offsets[document]
    }

    /// UTF-8 bytes of one document.
    pub fn document_bytes(&self, document: usize) -> u64 {
        self.byte_offsets[document + 1] - self.byte_offsets[document]
    }

    /// Appends the tokens `range` of a document to `out`; panics when the range is outside of it.
    pub fn read(&self, document: usize, range: Range<u64>, out: &mut Vec<u32>) {
        assert!(range.end <= self.document_tokens(document), "{range:?} is outside of document {document}");
        let base = self.token_offsets[document];
        let span = (base + range.start) as usize..(base + range.end) as usize;
        match &self.tokens {
            Tokens::U16(bytes) => {
                let (pairs, _) = bytes[2 * span.start..2 * span.end].as_chunks::<2>();
                out.extend(pairs.iter().map(|pair| u32::from(u16::from_le_bytes(*pair))));
            }
            Tokens::U32(bytes) => {
                let (quads, _) = bytes[4 * span.start..4 * span.end].as_chunks::<4>();
                out.extend(quads.iter().map(|quad| u32::from_le_bytes(*quad)));
            }
            Tokens::Owned(tokens) => out.extend_from_slice(&tokens[span]),
        }
    }

    /// Reads every token once and refuses ids that are not below `vocab_size`.
    ///
    /// # Errors
    /// [`ShardError::TokenRange`] with the place of the first such token.
    pub fn check_vocab(&self, vocab_size: usize) -> Result<(), ShardError> {
        let mut tokens = Vec::new();
        for document in 0..self.num_documents() {
            tokens.clear();
            self.read(document, 0..self.document_tokens(document), &mut tokens);
            if let Some(index) = tokens.iter().position(|id| *id as usize >= vocab_size) {
                let (path, id) = (self.path.clone(), tokens[index]);
                return Err(ShardError::TokenRange { path, document, index, id, vocab_size });
            }
        }
        Ok(())
    }
}

struct Header {
    token_bytes: u32,
    num_tokens: u64,
    origin: Origin,
    token_offsets: Vec<u64>,
    byte_offsets: Vec<u64>,
}

impl Header {
    /// Checks everything before it trusts a length: the index may be truncated, damaged or made to crash its reader.
    fn parse(path: &Path, index: &[u8]) -> Result<Header, ShardError> {
        let invalid = |expected: &str, found: String| ShardError::Invalid {
            path: path.to_owned(),
            expected: expected.to_owned(),
            found,
        };
        let Some((header, offsets)) = index.split_at_checked(HEADER_BYTES) else {
            return Err(invalid("an index of at least 104 bytes", format!("{} bytes", index.len())));
        };
        if &header[..8] != MAGIC {
            return Err(invalid(
                "an index that starts with `HADALIDX`",
                format!("{:?}", header[..8].escape_ascii().to_string()),
            ));
        }
        let word = |at: usize| u32::from_le_bytes(array(&header[at..]));
        let long = |at: usize| u64::from_le_bytes(array(&header[at..]));
        if word(8) != VERSION {
            return Err(invalid("index version 1", format!("version {}", word(8))));
        }
        let token_bytes = word(12);
        if token_bytes != 2 && token_bytes != 4 {
            return Err(invalid("2 or 4 bytes per token", format!("{token_bytes}")));
        }
        let (num_tokens, num_documents, num_bytes) = (long(16), long(24), long(32));
        let size = num_documents.checked_add(1).and_then(|n| n.checked_mul(16));
        if size != Some(offsets.len() as u64) {
            return Err(invalid(
                &format!("offsets of {num_documents} documents"),
                format!("{} bytes of offsets", offsets.len()),
            ));
        }
        let (token_offsets, byte_offsets) = offsets.split_at(offsets.len() / 2);
        let ascending = |name: &str, bytes: &[u8], total: u64| {
            let values: Vec<u64> = bytes.as_chunks::<8>().0.iter().map(|long| u64::from_le_bytes(*long)).collect();
            if values.first() == Some(&0) && values.last() == Some(&total) && values.is_sorted() {
                Ok(values)
            } else {
                Err(invalid(&format!("{name} offsets that ascend from 0 to {total}"), "others".to_owned()))
            }
        };
        Ok(Header {
            token_bytes,
            num_tokens,
            origin: Origin { source: array(&header[40..]), tokenizer: array(&header[72..]) },
            token_offsets: ascending("token", token_offsets, num_tokens)?,
            byte_offsets: ascending("byte", byte_offsets, num_bytes)?,
        })
    }
}

/// The first `N` bytes; the callers have checked the length.
fn array<const N: usize>(bytes: &[u8]) -> [u8; N] {
    let mut out = [0; N];
    out.copy_from_slice(&bytes[..N]);
    out
}

#[cfg(test)]
mod tests;
