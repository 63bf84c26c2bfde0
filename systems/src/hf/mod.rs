//! Hugging Face folders in and out, so that a checkpoint of Hadal is one that every other tool reads.
//!
//! `config` and `resolve` turn config.json into a model and back; `read` and `write` move the weights between the names
//! on disk and the packed parameters of [`crate::params`]; `fp8` is how DeepSeek's released weights are stored.

mod check;
pub mod config;
mod files;
pub mod fp8;
pub mod read;
mod read_error;
mod resolve;
mod stored;
pub mod write;

use read::{HfFolder, ReadError};
use std::path::Path;
use write::{Dtypes, SaveDtype, WriteError, WriteOptions, Written, write_folder};

/// Why a folder cannot be converted.
#[derive(Debug, thiserror::Error)]
pub enum ConvertError {
    /// The source cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The destination cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// config.json cannot be rendered.
    #[error("cannot render config.json: {0}")]
    Config(#[from] serde_json::Error),
}

/// Reads the folder `source` and writes it to `destination`; returns what was written, and notes for the user.
///
/// Without a `dtype`, every tensor keeps its type and its bytes, and config.json its text, except that FP8 weights become
/// bf16. With one, all weights are stored in it, correction biases in f32; FP8 is for linear layers, beside bf16.
///
/// # Errors
/// If the source is not a complete model, or the destination holds weights or cannot be written.
pub fn convert(
    source: &Path,
    destination: &Path,
    dtype: Option<SaveDtype>,
    shard_bytes: u64,
) -> Result<(Written, Vec<String>), ConvertError> {
    let folder = HfFolder::open(source)?;
    let model = folder.model()?;
    let options = WriteOptions {
        dtypes: dtype.map_or_else(|| folder.dtypes(), Dtypes::All),
        shard_bytes,
        aliases: folder.aliases(&model.specs),
        generation_config: folder.generation_config().map(str::to_string),
        copied_files: folder.other_files().to_vec(),
    };
    let config = match dtype {
        None if !folder.is_quantized() => folder.config().clone(),
        Some(SaveDtype::Fp8) => folder.config().storing(Some(SaveDtype::Fp8.torch_name()))?.quantized()?,
        _ => folder.config().storing(dtype.map(SaveDtype::torch_name))?,
    };
    let written = write_folder(destination, &config, &model.specs, &options, |spec| folder.read_param(spec))?;
    Ok((written, model.notes))
}

#[cfg(test)]
mod tests;
