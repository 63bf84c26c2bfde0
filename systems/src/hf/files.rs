//! The files of a folder: which hold weights, which belong to the tokenizer, and what a safetensors header says.
//!
//! Nothing here trusts what it reads: names are checked before they are opened.

use super::read_error::ReadError;
use engine::{checkpoint, tensor_file};
use safetensors::tensor::Metadata;
use serde_json::Value;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::path::{Path, PathBuf};

/// Reads and checks a safetensors header; returns where the data begins, and the tensors, sorted by offset.
pub(super) fn read_header(path: &Path, file: &File) -> Result<(u64, Metadata), ReadError> {
    tensor_file::read_header(path, file).map_err(|error| match error {
        checkpoint::Error::Io { path, source, .. } => ReadError::Io { path, source },
        checkpoint::Error::Damaged { path, reason } => ReadError::File { path, reason },
        other => ReadError::File { path: path.to_path_buf(), reason: other.to_string() },
    })
}

/// The files that hold a folder's weights.
pub(super) struct WeightFiles {
    /// Plain file names.
    pub(super) names: Vec<String>,
    /// The index of sharded weights: its path, and the file name of each tensor.
    pub(super) index: Option<(PathBuf, BTreeMap<String, String>)>,
}

impl WeightFiles {
    /// Finds them as transformers does, but refuses a folder with two sets.
    pub(super) fn find(dir: &Path) -> Result<Self, ReadError> {
        let single = "model.safetensors";
        let path = dir.join("model.safetensors.index.json");
        let error = |path: &Path, reason: &str| ReadError::File { path: path.to_path_buf(), reason: reason.into() };
        match (dir.join(single).is_file(), path.is_file()) {
            (true, false) => return Ok(WeightFiles { names: vec![single.into()], index: None }),
            (false, true) => {}
            (true, true) => return Err(error(dir, "has both model.safetensors and an index of shards: remove one")),
            (false, false) => {
                return Err(error(dir, "has neither model.safetensors nor model.safetensors.index.json"));
            }
        }
        let index: Value = serde_json::from_str(&read_text(&path)?).map_err(|e| error(&path, &e.to_string()))?;
        let Some(map) = index.get("weight_map").and_then(Value::as_object) else {
            return Err(error(&path, "expected an object `weight_map`"));
        };
        let mut weight_map = BTreeMap::new();
        for (name, file) in map {
            // A plain file name: an index must not reach out of its folder.
            let plain = file.as_str().filter(|f| f.ends_with(".safetensors") && !f.contains(['/', '\\']));
            let Some(file) = plain else {
                return Err(error(&path, &format!("{name}: expected the name of a safetensors file, found {file}")));
            };
            weight_map.insert(name.clone(), file.to_string());
        }
        let names: BTreeSet<String> = weight_map.values().cloned().collect();
        Ok(WeightFiles { names: names.into_iter().collect(), index: Some((path, weight_map)) })
    }
}

/// Tokenizer, chat template, remote code, licence: files beside the weights that a copy of the model needs.
pub(super) fn other_files(dir: &Path) -> Result<Vec<PathBuf>, ReadError> {
    let io = |source| ReadError::Io { path: dir.to_path_buf(), source };
    let mut found = Vec::new();
    for item in fs::read_dir(dir).map_err(io)? {
        let path = item.map_err(io)?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy().to_string();
        let extension = path.extension().unwrap_or_default().to_string_lossy().to_string();
        let is_text = ["json", "txt", "model", "jinja", "py", "md"].contains(&extension.as_str());
        let is_ours =
            ["config.json", "generation_config.json"].contains(&name.as_str()) || name.ends_with(".index.json");
        if path.is_file() && !is_ours && (is_text || name.starts_with("LICENSE")) {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

pub(super) fn read_text(path: &Path) -> Result<String, ReadError> {
    fs::read_to_string(path).map_err(|source| ReadError::Io { path: path.to_path_buf(), source })
}
