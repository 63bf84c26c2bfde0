//! Writes a Hugging Face folder that transformers loads: config.json, generation_config.json, the tokenizer's files,
//! and weights in safetensors, in shards of bounded size.
//!
//! Sizes are known before the first weight is, so every tensor has its place in its file from the beginning, and weights
//! may come in any order and as small as one view at a time. The index and config.json are written last: a folder that
//! was interrupted has no config.json, and no reader takes it for a checkpoint.

pub use super::stored::{Dtypes, SaveDtype};
use super::{codes::Codes, config::ConfigDocument, fp8};
use crate::params::{ParamSpec, View};
use safetensors::tensor::{Metadata, TensorInfo};
use serde_json::{Map, Value, json};
use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::error::Error;
use std::fs::{self, File};
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

/// Shard size of the hub, in bytes.
pub const DEFAULT_SHARD_BYTES: u64 = 5_000_000_000;
/// The file that says which tensor is in which file.
pub(crate) const INDEX: &str = "model.safetensors.index.json";
/// Values encoded at once; few in tests, so that small tensors go in pieces, too.
const PIECE_VALUES: usize = if cfg!(test) { 5 } else { 1 << 20 };

/// How a folder is written.
#[derive(Clone, Debug)]
pub struct WriteOptions {
    /// Type of each tensor.
    pub dtypes: Dtypes,
    /// Largest sum of tensor bytes in one file; a tensor larger than this has a file of its own.
    pub shard_bytes: u64,
    /// Aliases ([`ParamSpec::aliases`]) that are written as copies.
    pub aliases: BTreeSet<String>,
    /// Text of generation_config.json; where absent, it is made of the config's token ids.
    pub generation_config: Option<String>,
    /// Files that are copied under their own names: the tokenizer's.
    pub copied_files: Vec<PathBuf>,
}

impl WriteOptions {
    /// All weights in one type, shards and copies as on the hub: MTP modules carry embedding and head, a tied head is not
    /// written.
    pub fn hub(specs: &[ParamSpec], dtype: SaveDtype) -> Self {
        let aliases = specs.iter().flat_map(|spec| &spec.aliases);
        WriteOptions {
            dtypes: Dtypes::All(dtype),
            shard_bytes: DEFAULT_SHARD_BYTES,
            aliases: aliases.filter(|name| *name != "lm_head.weight").cloned().collect(),
            generation_config: None,
            copied_files: Vec::new(),
        }
    }
}

/// Why a folder cannot be written.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// A file cannot be created, written or copied.
    #[error("cannot write {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: io::Error,
    },
    /// The folder is a checkpoint already, or part of one; the two would mix.
    #[error("{dir} already holds {file}: choose a folder without weights and config.json")]
    Occupied {
        /// The folder.
        dir: PathBuf,
        /// One of its files.
        file: String,
    },
    /// The model or its names cannot be stored.
    #[error("{path}: {reason}")]
    Unwritable {
        /// The file.
        path: PathBuf,
        /// What was expected and what was found.
        reason: String,
    },
    /// The source of the weights failed.
    #[error("cannot get {name}: {source}")]
    Source {
        /// The parameter.
        name: String,
        /// Its reason.
        source: Box<dyn Error + Send + Sync>,
    },
    /// A parameter came with the wrong number of values.
    #[error("{name}: expected {expected} values, found {found}")]
    Length {
        /// The parameter.
        name: String,
        /// Elements of its shape.
        expected: usize,
        /// Values given.
        found: usize,
    },
    /// A view is not in the list this folder was begun with.
    #[error("{name} is not a tensor of this folder")]
    Unknown {
        /// The tensor.
        name: String,
    },
    /// Some tensors never came.
    #[error("{num_missing} tensors were not written, {first} the first of them")]
    Incomplete {
        /// How many.
        num_missing: usize,
        /// The first by name.
        first: String,
    },
    /// A weight is NaN or infinite, or becomes so in the type it is stored in.
    #[error("{name} holds {value} at element {index}, which {dtype:?} cannot store as a finite number")]
    NotFinite {
        /// The tensor.
        name: String,
        /// First such element.
        index: usize,
        /// Its value.
        value: f32,
        /// The type.
        dtype: SaveDtype,
    },
}

/// What was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Written {
    /// Tensors, copies included.
    pub num_tensors: usize,
    /// Bytes of all tensors.
    pub num_bytes: u64,
    /// Names of the weight files.
    pub files: Vec<String>,
}

/// Writes a model, one parameter after the other; `source` gives the packed values of a parameter and is called once for
/// each, in order.
///
/// # Errors
/// Any [`WriteError`]; the folder is then incomplete, and has no config.json.
pub fn write_folder<E: Into<Box<dyn Error + Send + Sync>>>(
    dir: impl AsRef<Path>,
    config: &ConfigDocument,
    specs: &[ParamSpec],
    options: &WriteOptions,
    mut source: impl FnMut(&ParamSpec) -> Result<Vec<f32>, E>,
) -> Result<Written, WriteError> {
    let mut writer = FolderWriter::create(dir, specs, options)?;
    for spec in specs {
        let fail = |e: E| WriteError::Source { name: spec.name.clone(), source: e.into() };
        writer.write_param(spec, &source(spec).map_err(fail)?)?;
    }
    writer.finish(config)
}

/// The place of a tensor.
#[derive(Debug)]
struct Slot {
    file: usize,
    /// First byte, from the beginning of the file.
    start: u64,
    dtype: SaveDtype,
    shape: Vec<usize>,
}

impl Slot {
    fn num_bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.num_bytes()) as u64
    }
}

/// A folder in the making, which takes parameters or single views in any order.
#[derive(Debug)]
pub struct FolderWriter {
    dir: PathBuf,
    options: WriteOptions,
    /// The file of each tensor, and the bytes of all, where several write files or one writes several.
    index: Option<(Map<String, Value>, u64)>,
    files: Vec<(String, File)>,
    slots: BTreeMap<String, Slot>,
    copies: BTreeMap<String, Vec<String>>,
    pending: BTreeSet<String>,
}

impl FolderWriter {
    /// Makes the folder if needed, and the weight files with their headers.
    ///
    /// # Errors
    /// [`WriteError::Occupied`], [`WriteError::Io`], [`WriteError::Unwritable`].
    pub fn create(dir: impl AsRef<Path>, specs: &[ParamSpec], options: &WriteOptions) -> Result<Self, WriteError> {
        let dir = dir.as_ref().to_path_buf();
        let io = |source| WriteError::Io { path: dir.clone(), source };
        fs::create_dir_all(&dir).map_err(io)?;
        for item in fs::read_dir(&dir).map_err(io)? {
            let file = item.map_err(io)?.file_name().to_string_lossy().to_string();
            let is_index = file.ends_with(".safetensors.index.json");
            if file.ends_with(".safetensors") || is_index || file == "config.json" {
                return Err(WriteError::Occupied { dir, file });
            }
        }
        Self::create_part(dir, &[specs], 0, options)
    }

    /// As one of several who write a folder together, each its own parameters into files of its own: `parts` are the parameters of
    /// each, and this one's are those of `part`. The folder is there, without weights.
    ///
    /// # Errors
    /// As [`FolderWriter::create`].
    pub fn create_part(
        dir: impl AsRef<Path>,
        parts: &[impl AsRef<[ParamSpec]>],
        part: usize,
        options: &WriteOptions,
    ) -> Result<Self, WriteError> {
        let mut plans: Vec<_> = parts.iter().map(|specs| plan(specs.as_ref(), options)).collect();
        let num_files: usize = plans.iter().map(|(shards, _)| shards.len()).sum();
        let file_name = |i: usize| match num_files {
            1 => "model.safetensors".to_string(),
            _ => format!("model-{:05}-of-{num_files:05}.safetensors", i + 1),
        };
        let index = (num_files > 1).then(|| {
            let shards = (0..).zip(plans.iter().flat_map(|(shards, _)| shards));
            let tensors = shards.flat_map(|(i, shard)| shard.iter().map(move |tensor| (i, tensor)));
            // By name, whoever writes what.
            let (mut places, mut num_bytes) = (BTreeMap::new(), 0);
            for (i, tensor) in tensors {
                num_bytes += tensor.num_bytes();
                places.insert(tensor.name.clone(), Value::from(file_name(i)));
            }
            (places.into_iter().collect(), num_bytes)
        });
        let first_file = plans[..part].iter().map(|(shards, _)| shards.len()).sum::<usize>();
        let (mut shards, copies) = plans.swap_remove(part);
        let mut writer = FolderWriter {
            dir: dir.as_ref().to_path_buf(),
            options: options.clone(),
            index,
            files: Vec::new(),
            slots: BTreeMap::new(),
            copies,
            pending: BTreeSet::new(),
        };
        for (i, shard) in shards.iter_mut().enumerate() {
            writer.create_file(file_name(first_file + i), shard)?;
        }
        writer.pending = writer.slots.keys().cloned().collect();
        Ok(writer)
    }

    /// Writes all views of a packed parameter, and its copies.
    ///
    /// # Errors
    /// [`WriteError::Length`], and as [`FolderWriter::write_view`].
    pub fn write_param(&mut self, spec: &ParamSpec, values: &[f32]) -> Result<(), WriteError> {
        let (expected, found) = (spec.num_elements(), values.len());
        if expected != found {
            return Err(WriteError::Length { name: spec.name.clone(), expected, found });
        }
        spec.views.iter().try_for_each(|view| self.write_view(view, &values[view.offset..][..view.num_elements()]))
    }

    /// Writes one view, and its copies.
    ///
    /// # Errors
    /// [`WriteError::Unknown`], [`WriteError::Length`], [`WriteError::NotFinite`], [`WriteError::Io`].
    pub fn write_view(&mut self, view: &View, values: &[f32]) -> Result<(), WriteError> {
        self.write_tensor(&view.hf_name, values)?;
        let copies = self.copies.get(&view.hf_name).cloned().unwrap_or_default();
        copies.iter().try_for_each(|copy| self.write_tensor(copy, values))
    }

    /// Whether a view is stored as codes and factors.
    pub fn stores_codes(&self, view: &View) -> bool {
        self.slots.get(&view.hf_name).is_some_and(|slot| slot.dtype == SaveDtype::Fp8)
    }

    /// Writes the codes and factors of a view that [`FolderWriter::stores_codes`]; only parameters without copies have any.
    ///
    /// # Errors
    /// [`WriteError::Unknown`], [`WriteError::Length`], [`WriteError::NotFinite`], [`WriteError::Io`].
    pub fn write_codes(&mut self, view: &View, Codes { codes, scales }: &Codes) -> Result<(), WriteError> {
        let name = &view.hf_name;
        let Some(slot) = self.slots.get(name).filter(|slot| slot.dtype == SaveDtype::Fp8) else {
            return Err(WriteError::Unknown { name: name.clone() });
        };
        if slot.num_bytes() != codes.len() as u64 {
            return Err(WriteError::Length { name: name.clone(), expected: view.num_elements(), found: codes.len() });
        }
        let (file_name, file) = &self.files[slot.file];
        file.write_all_at(codes, slot.start)
            .map_err(|source| WriteError::Io { path: self.dir.join(file_name), source })?;
        self.pending.remove(name);
        self.write_tensor(&fp8::scale_name(name), scales)
    }

    /// Checks that every tensor came, and syncs the weights: all that is to do for those who write a part, but for one.
    ///
    /// # Errors
    /// [`WriteError::Incomplete`], [`WriteError::Io`].
    pub fn finish_part(&self) -> Result<Written, WriteError> {
        if let Some(first) = self.pending.first() {
            return Err(WriteError::Incomplete { num_missing: self.pending.len(), first: first.clone() });
        }
        for (name, file) in &self.files {
            file.sync_all().map_err(|source| WriteError::Io { path: self.dir.join(name), source })?;
        }
        Ok(Written {
            num_tensors: self.slots.len(),
            num_bytes: self.slots.values().map(Slot::num_bytes).sum(),
            files: self.files.iter().map(|(name, _)| name.clone()).collect(),
        })
    }

    /// The same, and writes index, tokenizer and configuration.
    ///
    /// # Errors
    /// [`WriteError::Incomplete`], [`WriteError::Io`].
    pub fn finish(self, config: &ConfigDocument) -> Result<Written, WriteError> {
        let written = self.finish_part()?;
        if let Some((weight_map, num_bytes)) = &self.index {
            let index = json!({"metadata": {"total_size": num_bytes}, "weight_map": weight_map});
            self.write_text(INDEX, &pretty(&index))?;
        }
        for source in &self.options.copied_files {
            let path = self.dir.join(source.file_name().unwrap_or_default());
            let io = |e| WriteError::Io { path: path.clone(), source: e };
            fs::copy(source, &path).and_then(|_| File::open(&path)?.sync_all()).map_err(io)?;
        }
        match &self.options.generation_config {
            Some(text) => self.write_text("generation_config.json", text)?,
            None => self.write_text("generation_config.json", &pretty(&generation_config(config)))?,
        }
        self.write_text("config.json", config.text())?;
        let io = |source| WriteError::Io { path: self.dir.clone(), source };
        File::open(&self.dir).and_then(|dir| dir.sync_all()).map_err(io)?;
        Ok(written)
    }

    /// Creates a weight file and writes its header. Wider types come first, so that every tensor is aligned.
    fn create_file(&mut self, file_name: String, shard: &mut [Planned]) -> Result<(), WriteError> {
        let path = self.dir.join(&file_name);
        shard.sort_by_key(|tensor| std::cmp::Reverse(tensor.dtype.num_bytes()));
        let mut end = 0;
        let mut tensors = Vec::new();
        for tensor in shard.iter() {
            let start = end;
            end += tensor.num_bytes() as usize;
            let (dtype, shape) = (tensor.dtype.stored(), tensor.shape.clone());
            tensors.push((tensor.name.clone(), TensorInfo { dtype, shape, data_offsets: (start, end) }));
        }
        let unwritable = |reason: String| WriteError::Unwritable { path: path.clone(), reason };
        let format = HashMap::from([("format".to_string(), "pt".to_string())]);
        let metadata = Metadata::new(Some(format), tensors).map_err(|e| unwritable(e.to_string()))?;
        let mut header = serde_json::to_vec(&metadata).map_err(|e| unwritable(e.to_string()))?;
        header.resize(header.len().next_multiple_of(8), b' ');
        let data_start = 8 + header.len() as u64;

        let io = |source| WriteError::Io { path: path.clone(), source };
        let file = File::create_new(&path).map_err(io)?;
        file.set_len(data_start + end as u64).map_err(io)?;
        file.write_all_at(&(header.len() as u64).to_le_bytes(), 0).map_err(io)?;
        file.write_all_at(&header, 8).map_err(io)?;
        let mut start = data_start;
        for Planned { name, dtype, shape } in shard.iter() {
            let slot = Slot { file: self.files.len(), start, dtype: *dtype, shape: shape.clone() };
            start += slot.num_bytes();
            if self.slots.insert(name.clone(), slot).is_some() {
                return Err(unwritable(format!("two tensors have the name {name}")));
            }
        }
        self.files.push((file_name, file));
        Ok(())
    }

    fn write_tensor(&mut self, name: &str, values: &[f32]) -> Result<(), WriteError> {
        let Some(slot) = self.slots.get(name) else {
            return Err(WriteError::Unknown { name: name.to_string() });
        };
        let (expected, found) = (slot.shape.iter().product(), values.len());
        if expected != found {
            return Err(WriteError::Length { name: name.to_string(), expected, found });
        }
        let (file_name, file) = &self.files[slot.file];
        let not_finite = |index: usize| WriteError::NotFinite {
            name: name.to_string(),
            index,
            value: values[index],
            dtype: slot.dtype,
        };
        let io = |source| WriteError::Io { path: self.dir.join(file_name), source };
        let mut scales = None;
        if slot.dtype == SaveDtype::Fp8 {
            let codes;
            (codes, scales) = match fp8::quantize(values, fp8::as_matrix(&slot.shape)) {
                Ok((codes, scales)) => (codes, Some(scales)),
                Err(index) => return Err(not_finite(index)),
            };
            file.write_all_at(&codes, slot.start).map_err(io)?;
        } else {
            let mut bytes = Vec::new();
            let mut at = slot.start;
            for (i, values) in values.chunks(PIECE_VALUES).enumerate() {
                bytes.clear();
                slot.dtype.encode(values, &mut bytes).map_err(|at| not_finite(i * PIECE_VALUES + at))?;
                file.write_all_at(&bytes, at).map_err(io)?;
                at += bytes.len() as u64;
            }
        }
        self.pending.remove(name);
        scales.map_or(Ok(()), |scales| self.write_tensor(&fp8::scale_name(name), &scales))
    }

    fn write_text(&self, name: &str, text: &str) -> Result<(), WriteError> {
        let path = self.dir.join(name);
        let io = |source| WriteError::Io { path: path.clone(), source };
        fs::write(&path, text).and_then(|()| File::open(&path)?.sync_all()).map_err(io)
    }
}

/// A tensor that will have a slot.
#[derive(Clone)]
struct Planned {
    name: String,
    dtype: SaveDtype,
    shape: Vec<usize>,
}

impl Planned {
    fn num_bytes(&self) -> u64 {
        (self.shape.iter().product::<usize>() * self.dtype.num_bytes()) as u64
    }
}

/// Tensors by shard, in the order of the parameters, copies last; and the copies of each tensor.
fn plan(specs: &[ParamSpec], options: &WriteOptions) -> (Vec<Vec<Planned>>, BTreeMap<String, Vec<String>>) {
    let mut tensors = Vec::new();
    let mut copied = Vec::new();
    let mut copies: BTreeMap<String, Vec<String>> = BTreeMap::new();
    for spec in specs {
        let planned = |name: &String, shape: &[usize]| Planned {
            name: name.clone(),
            dtype: options.dtypes.of(name, spec.kind),
            shape: shape.to_vec(),
        };
        for view in &spec.views {
            let tensor = planned(&view.hf_name, &view.shape);
            let scales = (tensor.dtype == SaveDtype::Fp8).then(|| Planned {
                name: fp8::scale_name(&view.hf_name),
                dtype: SaveDtype::F32,
                shape: fp8::scale_shape(fp8::as_matrix(&view.shape), fp8::BLOCK).to_vec(),
            });
            tensors.extend([Some(tensor), scales].into_iter().flatten());
        }
        for alias in spec.aliases.iter().filter(|alias| options.aliases.contains(*alias)) {
            copied.push(planned(alias, &spec.shape));
            copies.entry(spec.views[0].hf_name.clone()).or_default().push(alias.clone());
        }
    }
    tensors.extend(copied);

    let mut shards: Vec<Vec<Planned>> = Vec::new();
    let mut size = 0;
    for tensor in tensors {
        if shards.is_empty() || size > 0 && size + tensor.num_bytes() > options.shard_bytes {
            shards.push(Vec::new());
            size = 0;
        }
        size += tensor.num_bytes();
        if let Some(shard) = shards.last_mut() {
            shard.push(tensor);
        }
    }
    (shards, copies)
}

/// The token ids of a config, as transformers' generation reads them.
fn generation_config(config: &ConfigDocument) -> Value {
    let config = config.config();
    let ids = [
        ("bos_token_id", &config.bos_token_id),
        ("eos_token_id", &config.eos_token_id),
        ("pad_token_id", &config.pad_token_id),
    ];
    let mut document = Map::from_iter([("_from_model_config".to_string(), true.into())]);
    for (key, id) in ids {
        if let Some(id) = id {
            document.insert(key.into(), json!(id));
        }
    }
    document.into()
}

fn pretty(value: &Value) -> String {
    format!("{value:#}\n")
}
