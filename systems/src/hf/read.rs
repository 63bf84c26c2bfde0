//! Reads a Hugging Face folder: config.json, tokenizer files, and weights in safetensors, single or sharded.
//!
//! Files come from strangers. A header is bounded and checked against the file's length before anything is allocated
//! from it, and every tensor a model needs is checked for name, shape and type before the first is read; whatever is
//! missing, different or left over is named. Reads are positional and in bounded pieces, so that a folder far larger
//! than memory can be read view by view, by several threads at once.

use super::config::ConfigDocument;
use super::files::{WeightFiles, other_files, read_header, read_text};
use super::fp8;
pub use super::read_error::{Finding, ReadError};
use super::write::{Dtypes, SaveDtype};
use crate::model_config::ModelConfig;
use crate::params::{ParamSpec, View, param_specs};
use safetensors::tensor::Dtype;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Bytes read at once; few in tests, so that small tensors come in pieces, too.
const PIECE_BYTES: usize = if cfg!(test) { 50 } else { 8 << 20 };

/// Where a tensor lies.
#[derive(Clone, Debug)]
struct Entry {
    file: usize,
    /// First byte, from the beginning of the file.
    start: u64,
    dtype: Dtype,
    shape: Vec<usize>,
}

/// A model as a folder holds it.
#[derive(Clone, Debug, PartialEq)]
pub struct FolderModel {
    /// The model; without MTP modules where the folder has no weights for them.
    pub config: ModelConfig,
    /// Its parameters, all present with the right shapes.
    pub specs: Vec<ParamSpec>,
    /// Things a user should know, one sentence each.
    pub notes: Vec<String>,
}

/// An open folder.
#[derive(Debug)]
pub struct HfFolder {
    dir: PathBuf,
    config: ConfigDocument,
    generation_config: Option<String>,
    other_files: Vec<PathBuf>,
    files: Vec<(PathBuf, File)>,
    tensors: BTreeMap<String, Entry>,
}

impl HfFolder {
    /// Opens a folder and reads all headers, no weights.
    ///
    /// # Errors
    /// [`ReadError::Io`], [`ReadError::Config`] (wrong types only; meaning is [`HfFolder::model`]'s), [`ReadError::File`].
    pub fn open(dir: impl AsRef<Path>) -> Result<Self, ReadError> {
        let dir = dir.as_ref().to_path_buf();
        let config_path = dir.join("config.json");
        let config = ConfigDocument::parse(&read_text(&config_path)?)
            .map_err(|problems| ReadError::Config { path: config_path, problems })?;
        let generation_path = dir.join("generation_config.json");
        let generation_config = generation_path.is_file().then(|| read_text(&generation_path)).transpose()?;
        let other_files = other_files(&dir)?;

        let weight_files = WeightFiles::find(&dir)?;
        let mut folder =
            HfFolder { dir, config, generation_config, other_files, files: Vec::new(), tensors: BTreeMap::new() };
        for name in weight_files.names {
            folder.add_file(&name)?;
        }
        if let Some((path, weight_map)) = weight_files.index {
            folder.check_index(path, &weight_map)?;
        }
        Ok(folder)
    }

    /// config.json.
    pub fn config(&self) -> &ConfigDocument {
        &self.config
    }

    /// Text of generation_config.json, if there is one.
    pub fn generation_config(&self) -> Option<&str> {
        self.generation_config.as_deref()
    }

    /// Paths of the tokenizer's files and whatever else belongs to the model but is neither weights nor configuration.
    pub fn other_files(&self) -> &[PathBuf] {
        &self.other_files
    }

    /// Path of a file of the folder by its name (`tokenizer.json`), if present.
    pub fn other_file(&self, name: &str) -> Option<&Path> {
        let is_it = |path: &&PathBuf| path.file_name().is_some_and(|n| n == name);
        self.other_files.iter().find(is_it).map(PathBuf::as_path)
    }

    /// Names of all tensors, sorted.
    pub fn tensor_names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// The model of this folder, with every tensor checked: after this, reading fails only by damage.
    ///
    /// # Errors
    /// [`ReadError::Config`] with all that is wrong in config.json; [`ReadError::Weights`] with all tensors that are
    /// missing, different or not used; [`ReadError::File`] for experts packed as transformers 5 has them in memory.
    pub fn model(&self) -> Result<FolderModel, ReadError> {
        let mut config = self.config.config().resolve().map_err(|problems| {
            let path = self.dir.join("config.json");
            ReadError::Config { path, problems }
        })?;
        let mut notes = Vec::new();
        let first_mtp = config.num_hidden_layers;
        let has_weights = |layer: usize| {
            let prefix = format!("model.layers.{layer}.");
            self.tensors.range(prefix.clone()..).next().is_some_and(|(name, _)| name.starts_with(&prefix))
        };
        if config.num_nextn_predict_layers > 0
            && !(first_mtp..first_mtp + config.num_nextn_predict_layers).any(has_weights)
        {
            notes.push(format!(
                "config.json has num_nextn_predict_layers = {}, but the folder has no weights for them: read without MTP",
                config.num_nextn_predict_layers
            ));
            config.num_nextn_predict_layers = 0;
        }
        let specs = param_specs(&config);
        self.check_weights(&config, &specs, &mut notes)?;
        Ok(FolderModel { config, specs, notes })
    }

    /// A whole packed parameter as f32; FP8 weights with their factors applied.
    ///
    /// # Errors
    /// As [`HfFolder::read_view`], and [`ReadError::AliasDiffers`].
    pub fn read_param(&self, spec: &ParamSpec) -> Result<Vec<f32>, ReadError> {
        let mut values = vec![0.0; spec.num_elements()];
        for view in &spec.views {
            self.read_view(view, &mut values[view.offset..][..view.num_elements()])?;
        }
        for alias in spec.aliases.iter().filter(|alias| self.tensors.contains_key(*alias)) {
            self.compare(alias, &spec.name, &values)?;
        }
        Ok(values)
    }

    /// One piece of a parameter, for a rank that needs no more: `out` has as many elements as the view. Does not look at
    /// aliases.
    ///
    /// # Errors
    /// [`ReadError::Io`], [`ReadError::NotFinite`], and [`ReadError::Weights`] if the tensor is not as
    /// [`HfFolder::model`] checked it.
    pub fn read_view(&self, view: &View, out: &mut [f32]) -> Result<(), ReadError> {
        let entry = self.entry(&view.hf_name, &view.shape)?;
        self.pieces(&view.hf_name, entry, |first, values| {
            out[first..][..values.len()].copy_from_slice(values);
            Ok(())
        })
    }

    /// The aliases of these parameters that the folder has, as [`super::write::WriteOptions::aliases`] wants them.
    pub fn aliases(&self, specs: &[ParamSpec]) -> BTreeSet<String> {
        let all = specs.iter().flat_map(|spec| &spec.aliases);
        all.filter(|alias| self.tensors.contains_key(*alias)).cloned().collect()
    }

    /// How each tensor is stored, so that a writer can keep it; FP8 becomes bf16.
    pub fn dtypes(&self) -> Dtypes {
        let dtype = |entry: &Entry| match entry.dtype {
            Dtype::F32 => SaveDtype::F32,
            Dtype::F16 => SaveDtype::F16,
            _ => SaveDtype::Bf16,
        };
        Dtypes::PerTensor(self.tensors.iter().map(|(name, entry)| (name.clone(), dtype(entry))).collect())
    }

    /// Whether some weights are in FP8.
    pub fn is_quantized(&self) -> bool {
        self.tensors.values().any(|entry| entry.dtype == Dtype::F8_E4M3)
    }

    fn add_file(&mut self, name: &str) -> Result<(), ReadError> {
        let path = self.dir.join(name);
        let io = |source| ReadError::Io { path: path.clone(), source };
        let file = File::open(&path).map_err(io)?;
        let (data_start, metadata) = read_header(&path, &file)?;
        let damaged = |reason: String| ReadError::File { path: path.clone(), reason };
        for name in metadata.offset_keys() {
            let Some(info) = metadata.info(&name) else { continue };
            let entry = Entry {
                file: self.files.len(),
                start: data_start + info.data_offsets.0 as u64,
                dtype: info.dtype,
                shape: info.shape.clone(),
            };
            if let Some(earlier) = self.tensors.insert(name.clone(), entry) {
                let other = self.files.get(earlier.file).map_or(&path, |(path, _)| path);
                return Err(damaged(format!("holds {name}, and so does {}", other.display())));
            }
        }
        self.files.push((path, file));
        Ok(())
    }

    /// The index and the files must agree, else one of them is of another checkpoint.
    fn check_index(&self, path: PathBuf, weight_map: &BTreeMap<String, String>) -> Result<(), ReadError> {
        let file_of = |entry: &Entry| self.files[entry.file].0.file_name().map(|name| name.to_string_lossy());
        for (name, file) in weight_map {
            let found = self.tensors.get(name).and_then(file_of);
            if found.as_deref() != Some(file) {
                let place = found.map_or("no file".to_string(), |found| found.to_string());
                let reason = format!("{name} should be in {file}, but is in {place}");
                return Err(ReadError::File { path, reason });
            }
        }
        match self.tensors.iter().find(|(name, _)| !weight_map.contains_key(*name)) {
            None => Ok(()),
            Some((name, entry)) => {
                let file = file_of(entry).unwrap_or_default();
                Err(ReadError::File { path, reason: format!("does not list {name}, which {file} holds") })
            }
        }
    }

    fn check_weights(
        &self,
        config: &ModelConfig,
        specs: &[ParamSpec],
        notes: &mut Vec<String>,
    ) -> Result<(), ReadError> {
        if let Some(name) = self.tensors.keys().find(|name| name.ends_with(".mlp.experts.gate_up_proj")) {
            let reason = format!(
                "{name} holds all experts in one tensor, as transformers 5 has them in memory; expected one tensor per \
                 expert, as on the hub: save the model with `save_pretrained`, which writes them so"
            );
            return Err(ReadError::File { path: self.dir.clone(), reason });
        }
        let mut findings = Vec::new();
        let mut used = BTreeSet::new();
        for spec in specs {
            for view in &spec.views {
                self.check_tensor(&view.hf_name, &view.shape, true, &mut used, &mut findings);
            }
            for alias in &spec.aliases {
                self.check_tensor(alias, &spec.shape, false, &mut used, &mut findings);
            }
        }
        let mut num_frequencies = 0;
        for name in self.tensors.keys().filter(|name| !used.contains(*name)) {
            if name.ends_with(".rotary_emb.inv_freq") {
                num_frequencies += 1;
                continue;
            }
            findings.push(Finding::Unused { name: name.clone(), hint: unused_hint(config, name) });
        }
        if num_frequencies > 0 {
            notes.push(format!(
                "{num_frequencies} tensors rotary_emb.inv_freq are not read: config.json says the frequencies"
            ));
        }
        if findings.is_empty() {
            return Ok(());
        }
        Err(ReadError::Weights { dir: self.dir.clone(), findings })
    }

    /// Checks one tensor and, for FP8, its factors.
    fn check_tensor(
        &self,
        name: &str,
        shape: &[usize],
        required: bool,
        used: &mut BTreeSet<String>,
        findings: &mut Vec<Finding>,
    ) {
        used.insert(name.to_string());
        let Some(entry) = self.tensors.get(name) else {
            if required {
                findings.push(Finding::Missing { name: name.to_string(), shape: shape.to_vec() });
            }
            return;
        };
        if entry.shape != shape {
            let (expected, found) = (shape.to_vec(), entry.shape.clone());
            findings.push(Finding::Shape { name: name.to_string(), expected, found });
        }
        match entry.dtype {
            Dtype::F32 | Dtype::BF16 | Dtype::F16 => {}
            Dtype::F8_E4M3 if !name.ends_with("_scale_inv") => {
                // A factor belongs to a matrix; a vector in FP8 would be a matrix of one row.
                let matrix = fp8::as_matrix(shape);
                let scale_shape = fp8::scale_shape(matrix, self.block());
                self.check_tensor(&fp8::scale_name(name), &scale_shape, true, used, findings);
            }
            other => findings.push(Finding::Dtype { name: name.to_string(), found: format!("{other:?}") }),
        }
    }

    /// Rows and columns that share a factor in this folder.
    pub(super) fn block(&self) -> [usize; 2] {
        let quantization = self.config.config().quantization_config.as_ref();
        quantization.and_then(|q| q.weight_block_size).unwrap_or([128, 128]).map(|n| n.max(1))
    }

    /// The tensor, if it is as expected.
    fn entry(&self, name: &str, shape: &[usize]) -> Result<&Entry, ReadError> {
        let mut findings = Vec::new();
        self.check_tensor(name, shape, true, &mut BTreeSet::new(), &mut findings);
        match self.tensors.get(name) {
            Some(entry) if findings.is_empty() => Ok(entry),
            _ => Err(ReadError::Weights { dir: self.dir.clone(), findings }),
        }
    }

    /// Hands a tensor's values over in order, some rows at a time, with the index of the first.
    fn pieces(
        &self,
        name: &str,
        entry: &Entry,
        mut visit: impl FnMut(usize, &[f32]) -> Result<(), ReadError>,
    ) -> Result<(), ReadError> {
        let scales = if entry.dtype == Dtype::F8_E4M3 { self.read_scales(name, &entry.shape)? } else { Vec::new() };
        let [rows, columns] = fp8::as_matrix(&entry.shape);
        let width = entry.dtype.bitsize() / 8;
        let rows_at_once = (PIECE_BYTES / (columns * width).max(1)).clamp(1, rows.max(1));
        let (path, file) = &self.files[entry.file];
        let mut bytes = vec![0; rows_at_once * columns * width];
        let mut values = vec![0.0; rows_at_once * columns];
        for first_row in (0..rows).step_by(rows_at_once) {
            let num_values = rows_at_once.min(rows - first_row) * columns;
            let (bytes, values) = (&mut bytes[..num_values * width], &mut values[..num_values]);
            let first = first_row * columns;
            file.read_exact_at(bytes, entry.start + (first * width) as u64)
                .map_err(|source| ReadError::Io { path: path.clone(), source })?;
            match entry.dtype {
                Dtype::F8_E4M3 => fp8::dequantize_rows(bytes, columns, first_row, &scales, self.block(), values),
                dtype => decode(dtype, bytes, values),
            }
            if let Some(i) = values.iter().position(|v| !v.is_finite()) {
                return Err(ReadError::NotFinite { name: name.to_string(), index: first + i, value: values[i] });
            }
            visit(first, values)?;
        }
        Ok(())
    }

    pub(super) fn read_scales(&self, name: &str, shape: &[usize]) -> Result<Vec<f32>, ReadError> {
        let name = fp8::scale_name(name);
        let shape = fp8::scale_shape(fp8::as_matrix(shape), self.block());
        let entry = self.entry(&name, &shape)?;
        let mut scales = vec![0.0; shape.iter().product()];
        self.pieces(&name, entry, |first, values| {
            scales[first..][..values.len()].copy_from_slice(values);
            Ok(())
        })?;
        Ok(scales)
    }

    /// The type that a tensor is stored in.
    pub(super) fn stored_dtype(&self, name: &str) -> Option<Dtype> {
        self.tensors.get(name).map(|entry| entry.dtype)
    }

    /// The bytes of a tensor whose elements are bytes, as many as `out` has.
    pub(super) fn read_bytes(&self, name: &str, shape: &[usize], out: &mut [u8]) -> Result<(), ReadError> {
        let entry = self.entry(name, shape)?;
        let (path, file) = &self.files[entry.file];
        file.read_exact_at(out, entry.start).map_err(|source| ReadError::Io { path: path.clone(), source })
    }

    fn compare(&self, alias: &str, name: &str, expected: &[f32]) -> Result<(), ReadError> {
        let Some(entry) = self.tensors.get(alias) else { return Ok(()) };
        self.pieces(alias, entry, |first, values| {
            let expected = &expected[first..][..values.len()];
            let differs = |(a, b): (&f32, &f32)| a.to_bits() != b.to_bits();
            match values.iter().zip(expected).position(differs) {
                None => Ok(()),
                Some(i) => Err(ReadError::AliasDiffers {
                    alias: alias.to_string(),
                    name: name.to_string(),
                    index: first + i,
                    expected: expected[i],
                    found: values[i],
                }),
            }
        })
    }
}

/// Little-endian values to f32, exactly; bf16 keeps even the payload of a NaN.
fn decode(dtype: Dtype, bytes: &[u8], out: &mut [f32]) {
    match dtype {
        Dtype::BF16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_bits(u32::from(u16::from_le_bytes(*b)) << 16);
            }
        }
        Dtype::F16 => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = half::f16::from_le_bytes(*b).to_f32();
            }
        }
        _ => {
            for (out, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                *out = f32::from_le_bytes(*b);
            }
        }
    }
}

fn unused_hint(config: &ModelConfig, name: &str) -> Option<String> {
    let layer: usize = name.strip_prefix("model.layers.")?.split('.').next()?.parse().ok()?;
    let needed = (layer + 1).checked_sub(config.num_hidden_layers).filter(|n| *n > 0)?;
    Some(format!("an MTP module? Then config.json needs num_nextn_predict_layers = {needed}"))
}
