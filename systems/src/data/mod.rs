//! From files to batches: documents ([`source`]), the held-out part ([`split`]), token ids ([`tokenizer`]), shards of them on
//! disk ([`shard`]), rows ([`packing`]), the order and the cursor ([`shuffle`], [`cursor`]), and validation ([`validation`]).
//! No ECS here: [`prepare`] is called once, before a world exists, and each rank owns a loader.
//!
//! ```text
//! files -> documents -> split -+-> train -> tokenizer (trained on this part only)
//!                              |     |          |
//!                              |     +-- encode +-> shard -> Corpus -> Rows -> Loader -> Batch
//!                              +-> held out ----+-> shard -> Corpus -> Validation  ->  Batch
//! ```

mod bpe;
pub mod corpus;
pub mod cursor;
pub mod packing;
pub mod shard;
pub mod shuffle;
pub mod source;
#[cfg(feature = "parquet")]
mod source_parquet;
pub mod split;
pub mod token_file;
pub mod tokenizer;
pub mod validation;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use sha2::{Digest, Sha256};
use thiserror::Error;

use corpus::{Corpus, hex};
use shard::{Origin, Sha256Digest, Shard, ShardError, ShardWriter};
use source::SourceError;
use split::{HeldOut, SplitError};
use tokenizer::{Tokenizer, TokenizerError};

/// Documents that are tokenized at a time: bounds the memory between tokenizer and shard.
const DOCUMENTS_AT_A_TIME: usize = 1024;

/// Where the tokenizer comes from.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum TokenizerSource {
    /// A `tokenizer.json`.
    File(PathBuf),
    /// Trained on the training part, at most this many tokens; kept in the cache folder.
    Train {
        /// Most tokens to make, at least [`tokenizer::MIN_VOCAB_SIZE`].
        vocab_size: usize,
    },
}

/// What to make a data set from.
#[derive(Clone, Debug, PartialEq)]
pub struct DataSpec {
    /// Text files, or pre-tokenized shards (`.bin`), in order.
    pub files: Vec<PathBuf>,
    /// The part for validation, if any.
    pub held_out: Option<HeldOut>,
    /// The tokenizer.
    pub tokenizer: TokenizerSource,
    /// Hadal's cache folder: trained tokenizers and shards, named after what they were made from. It may be deleted any time.
    pub cache: PathBuf,
}

/// A data set: the tokenizer and the tokenized parts.
#[derive(Clone, Debug)]
pub struct Data {
    /// The tokenizer.
    pub tokenizer: Arc<Tokenizer>,
    /// The part to train on.
    pub train: Corpus,
    /// The part to validate on; empty when none was asked for.
    pub held_out: Corpus,
}

/// Why a data set could not be made.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum DataError {
    /// Reading documents.
    #[error(transparent)]
    Source(#[from] SourceError),
    /// Splitting them.
    #[error(transparent)]
    Split(#[from] SplitError),
    /// The tokenizer.
    #[error(transparent)]
    Tokenizer(#[from] TokenizerError),
    /// Shards.
    #[error(transparent)]
    Shard(#[from] ShardError),
    /// Training a tokenizer needs text.
    #[error("{}: a tokenizer cannot be trained on a pre-tokenized shard; name the tokenizer.json the shard was made with", .0.display())]
    NoText(PathBuf),
    /// The shard's tokens mean something else.
    #[error("{}: the shard was made with another tokenizer than the one given; name the tokenizer.json the shard was made with, or tokenize again", .0.display())]
    OtherTokenizer(PathBuf),
}

/// Reads, splits, tokenizes and caches. The same files give the same data set, from the cache or without it.
///
/// # Errors
/// See [`DataError`].
pub fn prepare(spec: &DataSpec) -> Result<Data, DataError> {
    if source::are_shards(&spec.files)? {
        return prepare_shards(spec);
    }
    let documents = source::read_documents(&spec.files)?;
    let (train, held_out) = match spec.held_out {
        Some(share) => share.split(documents)?,
        None => (documents, Vec::new()),
    };
    let tokenizer = match &spec.tokenizer {
        TokenizerSource::File(path) => Tokenizer::load(path)?,
        TokenizerSource::Train { vocab_size } => cached_tokenizer(&spec.cache, &train, *vocab_size)?,
    };
    let corpus = |documents: &[String]| match documents {
        [] => Ok(Corpus::default()),
        documents => cached_shard(&spec.cache, documents, &tokenizer).map(|shard| Corpus::new([Arc::new(shard)])),
    };
    let (train, held_out) = (corpus(&train)?, corpus(&held_out)?);
    Ok(Data { tokenizer: Arc::new(tokenizer), train, held_out })
}

fn prepare_shards(spec: &DataSpec) -> Result<Data, DataError> {
    let tokenizer = match &spec.tokenizer {
        TokenizerSource::File(path) => Tokenizer::load(path)?,
        TokenizerSource::Train { .. } => return Err(DataError::NoText(spec.files[0].clone())),
    };
    let mut shards = Vec::new();
    for path in &spec.files {
        let shard = Shard::open(path)?;
        if shard.origin().tokenizer != tokenizer.sha256() {
            return Err(DataError::OtherTokenizer(path.clone()));
        }
        shard.check_vocab(tokenizer.vocab_size())?;
        shards.push(Arc::new(shard));
    }
    let all = Corpus::new(shards);
    let num_train = match spec.held_out {
        None => all.num_documents(),
        Some(share) => {
            let bytes: Vec<u64> = (0..all.num_documents()).map(|document| all.document_bytes(document)).collect();
            share.split_at_document(&bytes)?
        }
    };
    let (train, held_out) = all.split_at(num_train);
    Ok(Data { tokenizer: Arc::new(tokenizer), train, held_out })
}

/// The shard of `documents` from the cache folder, made there if it is not.
///
/// # Errors
/// Those of encoding and writing. A damaged shard in the cache is made again.
pub fn cached_shard(cache: &Path, documents: &[String], tokenizer: &Tokenizer) -> Result<Shard, DataError> {
    let origin = Origin { source: digest(documents), tokenizer: tokenizer.sha256() };
    let name = format!("tokens-{}-{}.bin", hex(&origin.source[..8]), hex(&origin.tokenizer[..8]));
    let bin = cache.join(name);
    match Shard::open(&bin) {
        Ok(shard) if shard.origin() == origin => Ok(shard),
        _ => write_shard(&bin, documents, tokenizer),
    }
}

/// Tokenizes `documents` into the shard whose token file is `bin`.
///
/// # Errors
/// Those of encoding and writing.
pub fn write_shard(bin: &Path, documents: &[String], tokenizer: &Tokenizer) -> Result<Shard, DataError> {
    let origin = Origin { source: digest(documents), tokenizer: tokenizer.sha256() };
    let mut writer = ShardWriter::create(bin, tokenizer.vocab_size(), origin)?;
    for documents in documents.chunks(DOCUMENTS_AT_A_TIME) {
        for (tokens, document) in tokenizer.encode_documents(documents)?.iter().zip(documents) {
            writer.push(tokens, document.len() as u64)?;
        }
    }
    Ok(writer.finish()?)
}

fn cached_tokenizer(cache: &Path, documents: &[String], vocab_size: usize) -> Result<Tokenizer, DataError> {
    let path = cache.join(format!("tokenizer-{}-{vocab_size}.json", hex(&digest(documents)[..8])));
    if let Ok(tokenizer) = Tokenizer::load(&path) {
        return Ok(tokenizer);
    }
    let tokenizer = Tokenizer::train(documents, vocab_size)?;
    tokenizer.save(&path)?;
    Ok(tokenizer)
}

/// SHA-256 of documents and the boundaries between them.
fn digest(documents: &[String]) -> Sha256Digest {
    let mut hash = Sha256::new();
    for document in documents {
        hash.update((document.len() as u64).to_le_bytes());
        hash.update(document);
    }
    hash.finalize().into()
}

#[cfg(test)]
mod tests;
