//! Token files: ids given instead of a text, to compare a model with another implementation on exactly the same input.
//! A safetensors file with an int64 tensor `input_ids` of shape [batch, sequence].

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use safetensors::{Dtype, SafeTensors};
use thiserror::Error;

/// Name of the tensor.
const INPUT_IDS: &str = "input_ids";

/// Sequences of token ids, all of one length.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TokenFile {
    /// Number of sequences.
    pub batch: usize,
    /// Tokens of each.
    pub seq_len: usize,
    /// Token ids, [batch * seq_len], row-major.
    pub ids: Vec<u32>,
}

/// Why a token file could not be read.
#[derive(Debug, Error)]
#[non_exhaustive]
pub enum TokenFileError {
    /// The file could not be read.
    #[error("cannot read the token file {}: {source}", path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        source: io::Error,
    },
    /// The file holds something else.
    #[error("{}: expected a safetensors file with an int64 tensor `input_ids` of shape [batch, sequence], found {found}", path.display())]
    Invalid {
        /// The file.
        path: PathBuf,
        /// What the file holds.
        found: String,
    },
    /// An id that the model has no embedding for.
    #[error("{}: input_ids[{row}, {column}] is {id}, expected 0 to {} (the model's vocab_size is {vocab_size}); use the model's tokenizer", path.display(), vocab_size - 1)]
    IdRange {
        /// The file.
        path: PathBuf,
        /// Sequence.
        row: usize,
        /// Position in it.
        column: usize,
        /// The value there.
        id: i64,
        /// Number of embeddings.
        vocab_size: usize,
    },
}

/// Reads the token file at `path` for a model of `vocab_size` (at least 1) embeddings.
///
/// # Errors
/// See [`TokenFileError`].
pub fn read_token_file(path: &Path, vocab_size: usize) -> Result<TokenFile, TokenFileError> {
    let invalid = |found: String| TokenFileError::Invalid { path: path.to_owned(), found };
    let bytes = fs::read(path).map_err(|source| TokenFileError::Io { path: path.to_owned(), source })?;
    let tensors = SafeTensors::deserialize(&bytes).map_err(|error| invalid(error.to_string()))?;
    let tensor = tensors.tensor(INPUT_IDS).map_err(|_| {
        let mut names = tensors.names();
        names.sort_unstable();
        invalid(format!("the tensors [{}]", names.join(", ")))
    })?;
    let (Dtype::I64, &[batch, seq_len]) = (tensor.dtype(), tensor.shape()) else {
        return Err(invalid(format!("`input_ids` of type {:?} and shape {:?}", tensor.dtype(), tensor.shape())));
    };
    if batch == 0 || seq_len == 0 {
        return Err(invalid(format!("no ids in shape [{batch}, {seq_len}]")));
    }
    let ids = tensor.data().as_chunks::<8>().0.iter().enumerate().map(|(at, bytes)| {
        let id = i64::from_le_bytes(*bytes);
        match u32::try_from(id) {
            Ok(small) if (small as usize) < vocab_size => Ok(small),
            _ => Err(TokenFileError::IdRange {
                path: path.to_owned(),
                row: at / seq_len,
                column: at % seq_len,
                id,
                vocab_size,
            }),
        }
    });
    Ok(TokenFile { batch, seq_len, ids: ids.collect::<Result<_, _>>()? })
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic with the failing expression")]
    use super::*;
    use safetensors::tensor::{TensorView, serialize};

    fn read(name: &str, dtype: Dtype, shape: &[usize], ids: &[i64]) -> Result<TokenFile, String> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        let bytes: Vec<u8> = ids.iter().flat_map(|id| id.to_le_bytes()).collect();
        let view = TensorView::new(dtype, shape.to_vec(), &bytes).unwrap();
        fs::write(&path, serialize([(name, view)], None).unwrap()).unwrap();
        read_token_file(&path, 100).map_err(|error| error.to_string())
    }

    #[test]
    fn ids_come_row_by_row() {
        let file = read("input_ids", Dtype::I64, &[2, 3], &[0, 1, 2, 97, 98, 99]).unwrap();
        assert_eq!(file, TokenFile { batch: 2, seq_len: 3, ids: vec![0, 1, 2, 97, 98, 99] });
    }

    #[test]
    fn errors_name_what_was_found() {
        let cases = [
            (read("tokens", Dtype::I64, &[1, 2], &[0, 1]), "found the tensors [tokens]"),
            (read("input_ids", Dtype::F64, &[1, 2], &[0, 1]), "found `input_ids` of type F64 and shape [1, 2]"),
            (read("input_ids", Dtype::I64, &[2], &[0, 1]), "found `input_ids` of type I64 and shape [2]"),
            (read("input_ids", Dtype::I64, &[1, 1, 2], &[0, 1]), "shape [1, 1, 2]"),
            (read("input_ids", Dtype::I64, &[0, 2], &[]), "found no ids in shape [0, 2]"),
            (read("input_ids", Dtype::I64, &[2, 2], &[0, 1, 2, 100]), "input_ids[1, 1] is 100, expected 0 to 99"),
            (read("input_ids", Dtype::I64, &[2, 2], &[0, 1, -1, 100]), "input_ids[1, 0] is -1"),
            (read("input_ids", Dtype::I64, &[1, 1], &[1 << 32]), "input_ids[0, 0] is 4294967296"),
        ];
        for (result, expected) in cases {
            let error = result.unwrap_err();
            assert!(error.contains(expected), "{error:?} lacks {expected:?}");
        }
    }

    #[test]
    fn files_that_are_no_safetensors_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("t.safetensors");
        assert!(read_token_file(&path, 1).unwrap_err().to_string().starts_with("cannot read the token file"));
        for bytes in [&b""[..], b"garbage", &[255; 16]] {
            fs::write(&path, bytes).unwrap();
            let error = read_token_file(&path, 1).unwrap_err().to_string();
            assert!(error.contains("expected a safetensors file"), "{error}");
        }
    }
}
