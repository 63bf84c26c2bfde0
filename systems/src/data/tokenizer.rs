//! Byte-level BPE tokenizers: loaded from a `tokenizer.json` or trained here. Only byte-level ones, because then every token
//! is a fixed byte string: decoding is a table look-up, and a stream can hold back exactly the bytes of an unfinished character.

use std::borrow::Borrow;
use std::fs;
use std::path::{Path, PathBuf};

use rayon::prelude::*;
use serde_json::Value;
use sha2::{Digest, Sha256};
use thiserror::Error;
use tokenizers::Tokenizer as HfTokenizer;

use super::bpe;
use super::shard::{Sha256Digest, write_atomically};

/// The special token that separates documents; its id is 0 in tokenizers trained here.
pub const END_OF_TEXT: &str = "<|endoftext|>";

/// The smallest vocabulary: `<|endoftext|>` and the 256 bytes.
pub const MIN_VOCAB_SIZE: usize = 257;

/// Names under which published tokenizers keep their end-of-document token, tried in this order.
const END_OF_TEXT_NAMES: [&str; 4] = [END_OF_TEXT, "<｜end▁of▁sentence｜>", "<|end_of_text|>", "</s>"];

/// What can go wrong with a tokenizer.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenizerError {
    /// The file could not be read or written.
    #[error("cannot {operation} the tokenizer {}: {source}", path.display())]
    Io {
        /// `read` or `write`.
        operation: &'static str,
        /// The file.
        path: PathBuf,
        /// The cause.
        source: std::io::Error,
    },
    /// The file is not a tokenizer.json that can be used.
    #[error("{}: expected a byte-level BPE tokenizer.json, found {found}; use another tokenizer or train one", path.display())]
    Unusable {
        /// The file.
        path: PathBuf,
        /// What it is instead.
        found: String,
    },
    /// The requested vocabulary cannot hold the bytes.
    #[error(
        "a trained vocabulary needs at least {MIN_VOCAB_SIZE} tokens (256 bytes and {END_OF_TEXT}), found vocab_size {0}; raise it"
    )]
    TooSmall(usize),
    /// The tokenizer makes ids that the model has no embedding for.
    #[error(
        "the tokenizer has {tokenizer} tokens but the model's vocab_size is {model}; raise model.vocab_size to at least {tokenizer} or use a smaller tokenizer"
    )]
    LargerThanModel {
        /// Largest token id + 1.
        tokenizer: usize,
        /// The model's vocab_size.
        model: usize,
    },
    /// The library failed on a text.
    #[error("cannot {operation}: {message}")]
    Library {
        /// `train`, `encode` or `serialize`.
        operation: &'static str,
        /// The library's words.
        message: String,
    },
}

/// A byte-level BPE tokenizer. The same tokenizer always makes the same ids, on any number of threads.
#[derive(Clone, Debug)]
pub struct Tokenizer {
    /// Sees special tokens in a text as special: for prompts and chat templates.
    special: HfTokenizer,
    /// Sees them as plain characters: for corpora.
    plain: HfTokenizer,
    tokens: Vec<bpe::Token>,
    end_of_text: u32,
    sha256: Sha256Digest,
}

impl Tokenizer {
    /// Loads a `tokenizer.json`. Truncation and padding that it may ask for are turned off.
    ///
    /// # Errors
    /// A file that cannot be read; one that is no byte-level BPE tokenizer; one without a known end-of-text token.
    pub fn load(path: &Path) -> Result<Tokenizer, TokenizerError> {
        let json = fs::read_to_string(path).map_err(|source| TokenizerError::Io {
            operation: "read",
            path: path.to_owned(),
            source,
        })?;
        Tokenizer::from_json(&json).map_err(|found| TokenizerError::Unusable { path: path.to_owned(), found })
    }

    /// Trains on `documents`: at most `vocab_size` tokens, fewer when no pair of tokens occurs twice any more. Id 0 is
    /// `<|endoftext|>`, ids 1 to 256 are the bytes. The result depends on the documents and the size alone.
    ///
    /// # Errors
    /// A `vocab_size` below [`MIN_VOCAB_SIZE`].
    pub fn train(documents: &[String], vocab_size: usize) -> Result<Tokenizer, TokenizerError> {
        if vocab_size < MIN_VOCAB_SIZE {
            return Err(TokenizerError::TooSmall(vocab_size));
        }
        let library = |message| TokenizerError::Library { operation: "train a tokenizer", message };
        let json = bpe::train(documents, vocab_size).map_err(|error| library(error.to_string()))?;
        Tokenizer::from_json(&json).map_err(library)
    }

    fn from_json(json: &str) -> Result<Tokenizer, String> {
        let value: Value = serde_json::from_str(json).map_err(|error| format!("invalid JSON ({error})"))?;
        let of_type = |part: &str| value.pointer(part).and_then(Value::as_str).unwrap_or("none").to_owned();
        for (part, expected) in [("/model/type", "BPE"), ("/decoder/type", "ByteLevel")] {
            if of_type(part) != expected {
                return Err(format!("{} {:?} instead of {expected:?}", &part[1..], of_type(part)));
            }
        }
        let mut special: HfTokenizer = json.parse().map_err(|error: tokenizers::Error| error.to_string())?;
        special.with_truncation(None).map_err(|error| error.to_string())?.with_padding(None);
        let end_of_text = END_OF_TEXT_NAMES
            .iter()
            .find_map(|name| special.token_to_id(name))
            .ok_or_else(|| format!("none of the end-of-text tokens {}", END_OF_TEXT_NAMES.join(" ")))?;
        let tokens = bpe::tokens(&special)?;
        let canonical = special.to_string(false).map_err(|error| error.to_string())?;
        let mut plain = special.clone();
        plain.set_encode_special_tokens(true);
        Ok(Tokenizer { special, plain, tokens, end_of_text, sha256: Sha256::digest(canonical).into() })
    }

    /// The tokenizer as the text of a `tokenizer.json`.
    ///
    /// # Errors
    /// Those of the library's serializer.
    pub fn to_json(&self) -> Result<String, TokenizerError> {
        let library = |error: tokenizers::Error| TokenizerError::Library {
            operation: "serialize the tokenizer",
            message: error.to_string(),
        };
        self.special.to_string(true).map_err(library)
    }

    /// Writes `tokenizer.json` under a temporary name and renames it to `path`.
    ///
    /// # Errors
    /// A failed write.
    pub fn save(&self, path: &Path) -> Result<(), TokenizerError> {
        let json = self.to_json()?;
        write_atomically(path, json.as_bytes()).map_err(|source| TokenizerError::Io {
            operation: "write",
            path: path.to_owned(),
            source,
        })
    }

    /// The largest token id + 1: rows that an embedding must have.
    pub fn vocab_size(&self) -> usize {
        self.tokens.len()
    }

    /// Refuses a model with fewer embeddings than there are tokens; more are fine.
    ///
    /// # Errors
    /// [`TokenizerError::LargerThanModel`] with both sizes.
    pub fn check_model(&self, model_vocab_size: usize) -> Result<(), TokenizerError> {
        let tokenizer = self.vocab_size();
        if tokenizer > model_vocab_size {
            return Err(TokenizerError::LargerThanModel { tokenizer, model: model_vocab_size });
        }
        Ok(())
    }

    /// Id of the token that separates documents.
    pub fn end_of_text(&self) -> u32 {
        self.end_of_text
    }

    /// Digest of the tokenizer's canonical JSON.
    pub fn sha256(&self) -> Sha256Digest {
        self.sha256
    }

    /// Ids of a text in which nothing is special: `<|endoftext|>` in it is thirteen characters like any others.
    ///
    /// # Errors
    /// Those of the library.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        encode(&self.plain, text)
    }

    /// Ids of a text in which the names of special tokens stand for them. Nothing is added in front or at the end.
    ///
    /// # Errors
    /// Those of the library.
    pub fn encode_with_special(&self, text: &str) -> Result<Vec<u32>, TokenizerError> {
        encode(&self.special, text)
    }

    /// Ids of each document as by [`Tokenizer::encode`], documents in parallel.
    ///
    /// # Errors
    /// Those of the library.
    pub fn encode_documents(&self, documents: &[String]) -> Result<Vec<Vec<u32>>, TokenizerError> {
        documents.par_iter().map(|document| self.encode(document)).collect()
    }

    /// The text of `ids`; bytes that are no UTF-8 become U+FFFD, ids that are not assigned become nothing.
    pub fn decode(&self, ids: &[u32], skip_special: bool) -> String {
        let bytes: Vec<u8> = ids.iter().flat_map(|id| self.bytes_of(*id, skip_special)).copied().collect();
        String::from_utf8_lossy(&bytes).into_owned()
    }

    /// The id of a token by its name in `tokenizer.json`, such as `<|im_end|>`.
    pub fn token_id(&self, name: &str) -> Option<u32> {
        self.special.token_to_id(name)
    }

    /// A decoder for a stream of ids.
    pub fn decode_stream(&self, skip_special: bool) -> DecodeStream<&Tokenizer> {
        DecodeStream::new(self, skip_special)
    }

    /// The bytes that `id` stands for: none if it is not assigned, or special and those are skipped.
    pub fn bytes_of(&self, id: u32, skip_special: bool) -> &[u8] {
        match self.tokens.get(id as usize) {
            Some(token) if !(skip_special && token.is_special) => &token.bytes,
            _ => &[],
        }
    }

    /// Whether `id` is a special token.
    pub fn is_special(&self, id: u32) -> bool {
        self.tokens.get(id as usize).is_some_and(|token| token.is_special)
    }
}

fn encode(tokenizer: &HfTokenizer, text: &str) -> Result<Vec<u32>, TokenizerError> {
    let library =
        |error: tokenizers::Error| TokenizerError::Library { operation: "encode a text", message: error.to_string() };
    Ok(tokenizer.encode_fast(text, false).map_err(library)?.get_ids().to_vec())
}

/// Decodes ids as they come. What it gives out never changes later: the pieces, concatenated, are [`Tokenizer::decode`]. It borrows
/// its tokenizer or, as an [`std::sync::Arc`], shares it.
#[derive(Clone, Debug)]
pub struct DecodeStream<T> {
    tokenizer: T,
    skip_special: bool,
    /// The beginning of a character, at most 3 bytes between calls.
    pending: Vec<u8>,
}

impl<T: Borrow<Tokenizer>> DecodeStream<T> {
    /// Before the first id.
    pub fn new(tokenizer: T, skip_special: bool) -> Self {
        DecodeStream { tokenizer, skip_special, pending: Vec::new() }
    }

    /// The text that `id` completes, empty while a character is unfinished.
    pub fn push(&mut self, id: u32) -> String {
        self.pending.extend_from_slice(self.tokenizer.borrow().bytes_of(id, self.skip_special));
        let mut complete = self.pending.len();
        if let Some(last) = self.pending.utf8_chunks().last()
            && let Err(error) = std::str::from_utf8(last.invalid())
            && error.error_len().is_none()
        {
            complete -= last.invalid().len();
        }
        let text = String::from_utf8_lossy(&self.pending[..complete]).into_owned();
        self.pending.drain(..complete);
        text
    }

    /// The end of the stream: an unfinished character becomes U+FFFD.
    pub fn finish(&mut self) -> String {
        String::from_utf8_lossy(&std::mem::take(&mut self.pending)).into_owned()
    }
}

#[cfg(test)]
mod tests;
