//! Hugging Face folders in and out, so that a checkpoint of Hadal is one that every other tool reads.
//!
//! `config` and `resolve` turn config.json into a model and back; `read` and `write` move the weights between the names
//! on disk and the packed parameters of [`crate::params`]; `fp8` is how DeepSeek's released weights are stored, and `codes` reads them as
//! they are.

mod check;
pub mod codes;
pub mod config;
mod files;
pub mod fp8;
pub mod read;
mod read_error;
mod resolve;
mod stored;
pub mod write;

use crate::params::ParamSpec;
use read::{HfFolder, ReadError};
use std::path::Path;
use write::{Dtypes, FolderWriter, SaveDtype, WriteError, WriteOptions, Written};

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
/// bf16. With one, all weights are stored in it, correction biases in f32; FP8 is for linear layers, beside bf16, and
/// what is in it already, in blocks of 128 x 128, keeps its codes and factors.
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
    let mut writer = FolderWriter::create(destination, &model.specs, &options)?;
    for spec in &model.specs {
        copy_param(&folder, spec, dtype, &mut writer)?;
    }
    Ok((writer.finish(&config)?, model.notes))
}

/// Writes a parameter as it was read: from FP8 to FP8 its codes, since rounding what was rounded by another scale rounds again.
fn copy_param(
    folder: &HfFolder,
    spec: &ParamSpec,
    dtype: Option<SaveDtype>,
    writer: &mut FolderWriter,
) -> Result<(), ConvertError> {
    if dtype != Some(SaveDtype::Fp8) || !spec.aliases.is_empty() {
        return Ok(writer.write_param(spec, &folder.read_param(spec)?)?);
    }
    for view in &spec.views {
        match folder.read_view_codes(view)?.filter(|_| writer.stores_codes(view)) {
            Some(codes) => writer.write_codes(view, &codes)?,
            None => {
                let mut values = vec![0.0; view.num_elements()];
                folder.read_view(view, &mut values)?;
                writer.write_view(view, &values)?;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests;
