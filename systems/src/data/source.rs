//! Documents from files: plain text, JSON lines and Parquet. Every error names the file and the place in it, because a corpus
//! with one bad line among millions is the usual case.
//!
//! What a document is:
//! - `.txt`: the whole file is one document, unless it contains `<|endoftext|>`: that marker separates documents and is no
//!   part of them (empty pieces, as after a final marker, are dropped). Bytes are otherwise kept as they are.
//! - `.jsonl`: one JSON object per line, the string field `text` is the document; blank lines are skipped.
//! - `.parquet`: each row of the top-level string column `text` is a document (cargo feature `parquet`).
//!
//! A list of files gives the documents of the first file, then those of the second, and so on.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use serde_json::Value;
use thiserror::Error;

use super::tokenizer::END_OF_TEXT;

/// What a source file holds, told from its extension.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Format {
    /// UTF-8 text.
    Text,
    /// One JSON object with a `text` field per line.
    Jsonl,
    /// A Parquet file with a `text` column.
    Parquet,
    /// Pre-tokenized: a `.bin` file of tokens with its `.idx` beside it (see [`super::shard`]).
    Shard,
}

/// Why documents could not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum SourceError {
    /// No file was named.
    #[error("the corpus lists no file; name at least one .txt, .jsonl, .parquet or .bin file")]
    NoFiles,
    /// The extension says nothing.
    #[error("{}: expected a name ending in .txt, .jsonl, .parquet or .bin; rename the file after what it holds", .0.display())]
    UnknownFormat(PathBuf),
    /// Tokens and texts in one list.
    #[error("{}: expected {expected} like the files listed before it, found {found}; list either texts or pre-tokenized shards", path.display())]
    Mixed {
        /// The file that differs from the first one.
        path: PathBuf,
        /// What the first file is.
        expected: &'static str,
        /// What this one is.
        found: &'static str,
    },
    /// The file could not be opened or read.
    #[error("cannot read the corpus file {}: {source}; check the path, it is relative to the scene's folder", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file is not text.
    #[error("{}: expected UTF-8 text, found an invalid byte at offset {offset}; convert the file to UTF-8", path.display())]
    NotUtf8 {
        /// The file.
        path: PathBuf,
        /// Bytes before the first invalid one.
        offset: usize,
    },
    /// The file holds no document.
    #[error("{}: expected at least one document, found {found}; remove the file from the list", path.display())]
    Empty {
        /// The file.
        path: PathBuf,
        /// What is there instead.
        found: &'static str,
    },
    /// A line of a JSONL file is wrong.
    #[error("{}:{line}: expected a JSON object with a non-empty string field `text`, found {found}", path.display())]
    Line {
        /// The file.
        path: PathBuf,
        /// Counted from 1.
        line: usize,
        /// What the line holds.
        found: String,
    },
    /// A Parquet file cannot be used.
    #[error("{}: expected a Parquet file with a top-level string column `text`, found {found}", path.display())]
    Parquet {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        found: String,
    },
    /// A row of a Parquet file is wrong.
    #[error("{}, row {row}: expected a non-empty UTF-8 string in column `text`, found {found}", path.display())]
    Row {
        /// The file.
        path: PathBuf,
        /// Counted from 0 over the whole file.
        row: usize,
        /// What the row holds.
        found: &'static str,
    },
    /// This build cannot read Parquet.
    #[error("{}: this build reads no Parquet; build with `--features parquet`, or convert the file to .jsonl", .0.display())]
    NoParquet(PathBuf),
}

impl Format {
    /// The format of the file named `path`; nothing is opened.
    ///
    /// # Errors
    /// [`SourceError::UnknownFormat`] for any other extension than txt, jsonl, parquet and bin (in any case).
    pub fn of(path: &Path) -> Result<Format, SourceError> {
        let extension = path.extension().and_then(|e| e.to_str()).unwrap_or_default().to_ascii_lowercase();
        match extension.as_str() {
            "txt" => Ok(Format::Text),
            "jsonl" => Ok(Format::Jsonl),
            "parquet" => Ok(Format::Parquet),
            "bin" => Ok(Format::Shard),
            _ => Err(SourceError::UnknownFormat(path.to_owned())),
        }
    }
}

/// Whether the listed files are pre-tokenized shards (true) or texts (false).
///
/// # Errors
/// An empty list, an unknown extension, or a list with both.
pub fn are_shards(paths: &[PathBuf]) -> Result<bool, SourceError> {
    let first = Format::of(paths.first().ok_or(SourceError::NoFiles)?)? == Format::Shard;
    let name = |shard| {
        if shard { "a pre-tokenized shard" } else { "a text file" }
    };
    for path in paths {
        let shard = Format::of(path)? == Format::Shard;
        if shard != first {
            return Err(SourceError::Mixed { path: path.clone(), expected: name(first), found: name(shard) });
        }
    }
    Ok(first)
}

/// All documents of the text files in `paths`, in order; none is empty and there is at least one per file.
///
/// # Errors
/// See [`SourceError`]; the first problem found stops the reading.
pub fn read_documents(paths: &[PathBuf]) -> Result<Vec<String>, SourceError> {
    if are_shards(paths)? {
        let path = paths[0].clone();
        return Err(SourceError::Mixed { path, expected: "a text file", found: "a pre-tokenized shard" });
    }
    let mut documents = Vec::new();
    for path in paths {
        let before = documents.len();
        match Format::of(path)? {
            Format::Text => read_text(path, &mut documents)?,
            Format::Jsonl => read_jsonl(path, &mut documents)?,
            Format::Parquet => read_parquet(path, &mut documents)?,
            Format::Shard => unreachable!("are_shards refused mixed lists"),
        }
        if documents.len() == before {
            return Err(SourceError::Empty { path: path.clone(), found: "only empty lines or separators" });
        }
    }
    Ok(documents)
}

fn read_utf8(path: &Path) -> Result<String, SourceError> {
    let bytes = fs::read(path).map_err(|source| SourceError::Io { path: path.to_owned(), source })?;
    if bytes.is_empty() {
        return Err(SourceError::Empty { path: path.to_owned(), found: "an empty file" });
    }
    String::from_utf8(bytes)
        .map_err(|error| SourceError::NotUtf8 { path: path.to_owned(), offset: error.utf8_error().valid_up_to() })
}

fn read_text(path: &Path, documents: &mut Vec<String>) -> Result<(), SourceError> {
    let text = read_utf8(path)?;
    if text.contains(END_OF_TEXT) {
        documents.extend(text.split(END_OF_TEXT).filter(|piece| !piece.trim().is_empty()).map(str::to_owned));
    } else if !text.trim().is_empty() {
        documents.push(text);
    }
    Ok(())
}

fn read_jsonl(path: &Path, documents: &mut Vec<String>) -> Result<(), SourceError> {
    for (index, line) in read_utf8(path)?.lines().enumerate() {
        if line.trim().is_empty() {
            continue;
        }
        let document =
            text_field(line).map_err(|found| SourceError::Line { path: path.to_owned(), line: index + 1, found })?;
        documents.push(document);
    }
    Ok(())
}

fn text_field(line: &str) -> Result<String, String> {
    match serde_json::from_str(line) {
        Err(error) => Err(format!("invalid JSON ({error})")),
        Ok(Value::Object(mut fields)) => match fields.remove("text") {
            Some(Value::String(text)) if text.is_empty() => Err("an empty text".to_owned()),
            Some(Value::String(text)) => Ok(text),
            Some(other) => Err(format!("{} in `text`", kind(&other))),
            None => {
                let names: Vec<&str> = fields.keys().take(8).map(String::as_str).collect();
                Err(format!("no such field (the fields are: {})", names.join(", ")))
            }
        },
        Ok(other) => Err(format!("{} instead of an object", kind(&other))),
    }
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(not(feature = "parquet"))]
fn read_parquet(path: &Path, _: &mut Vec<String>) -> Result<(), SourceError> {
    Err(SourceError::NoParquet(path.to_owned()))
}

#[cfg(feature = "parquet")]
use super::source_parquet::read_parquet;

#[cfg(test)]
mod tests;
