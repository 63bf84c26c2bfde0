//! What a checkpoint holds: a Hugging Face folder, plus `train/` with what resuming needs to the last bit (optimizer state, masters,
//! data cursor, counters).
//!
//! A [`Snapshot`] is this rank's part of it, copied while no task runs, and written beside those that do. Weights have the names and
//! files of any Hugging Face folder; of those that hold the same, one rank writes. The optimizer's state has the offsets of whole
//! parameters ([`engine::tensor_pieces`]). So a file says nothing of ranks, and any others can read it.

use std::{
    borrow::Cow,
    ops::Range,
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use bevy_ecs::prelude::*;
use engine::{checkpoint::BoxError, prelude::*, tensor_file::TensorFile, tensor_pieces::piece_name};
use kernels::{
    dtype::{DType, Storage},
    memory::Memory,
    tensor::Tensor,
};
use serde::{Deserialize, Serialize};

use crate::{
    data::{cursor::Cursor, tokenizer::Tokenizer},
    diloco,
    hf::{
        config::{ConfigDocument, HfConfig},
        write::{FolderWriter, INDEX, SaveDtype, WriteOptions},
    },
    live::Live,
    model::{self, Model, Parameters, Weight},
    optimizer::{OptimizerState, Slot},
    params::{ParamKind, ParamSpec, param_specs},
    ranks::Ranks,
    train::Training,
};

/// Where training was; `train/state.json`.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TrainState {
    /// Steps done.
    pub step: u64,
    /// Targets trained on.
    pub num_tokens: u64,
    /// Time in steps.
    pub train_secs: f64,
    /// Next sample.
    pub cursor: Cursor,
    /// For each layer with experts, the last step in which each expert had a token.
    pub last_seen: Vec<Vec<u64>>,
    /// Values that were set while the run went on.
    #[serde(default)]
    pub live: Live,
}

/// Tensors of an optimizer's state, as their pieces are called in `train/optimizer*.safetensors`: `PARAMETER.STATE@OFFSET`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum State {
    /// The weight itself, where the model's file rounds it: f64 to f32, and beside bf16 the router, which is f32.
    Weight,
    Master,
    M,
    V,
    Momentum,
}

/// Whether the model's file, with activations in `compute`, rounds weights of type `dtype`.
fn rounds(compute: DType, dtype: DType) -> bool {
    dtype == DType::F64 || (compute == DType::Bf16 && dtype == DType::F32)
}

impl State {
    pub(crate) const ALL: [(&'static str, State); 5] = [
        ("weight", State::Weight),
        ("master", State::Master),
        ("m", State::M),
        ("v", State::V),
        ("momentum", State::Momentum),
    ];

    /// This rank's part of the state, if its kind of optimizer has it.
    pub(crate) fn of(self, world: &World, index: usize) -> Option<Tensor> {
        let shard = world.resource::<OptimizerState>().shards[index].as_ref()?;
        let weight = world.resource::<Parameters>().weights[index].value;
        match (self, &shard.slot) {
            (State::Weight, _) => {
                let is_rounded = rounds(world.resource::<Model>().compute, weight.dtype);
                is_rounded.then(|| shard.part_of(weight))
            }
            (State::Master, _) => shard.master,
            (State::M, Slot::AdamW { m, .. }) => Some(*m),
            (State::V, Slot::AdamW { v, .. }) => Some(*v),
            (State::Momentum, Slot::Muon { m, .. }) => Some(*m),
            _ => None,
        }
    }

    /// Whether any rank has it: decided from what all ranks know.
    pub(crate) fn exists(self, world: &World, spec: &ParamSpec) -> bool {
        let muon = world.resource::<OptimizerState>().uses_muon(spec.kind);
        let compute = world.resource::<Model>().compute;
        spec.kind.is_trained()
            && match self {
                State::Weight => rounds(compute, spec.kind.dtype(compute)),
                State::Master => spec.kind.dtype(compute) == DType::Bf16,
                State::M | State::V => !muon,
                State::Momentum => muon,
            }
    }
}

/// The elements of a whole parameter that this rank's optimizer updates.
pub fn updated_part(world: &World, index: usize) -> Option<Range<usize>> {
    let start = world.resource::<Parameters>().specs[index].start;
    let shard = world.resource::<OptimizerState>().shards[index].as_ref()?;
    Some(start + shard.mine.start..start + shard.mine.end)
}

/// What of a run's checkpoints is the same in each.
pub struct About {
    /// Made of text.
    pub tokenizer: Arc<Tokenizer>,
    /// The scene.
    pub scene_text: String,
    /// The parameters that each rank writes, by rank.
    pub parts: Vec<Vec<ParamSpec>>,
}

/// This rank's part of a checkpoint, in the host's memory.
pub struct Snapshot {
    about: Arc<About>,
    rank: usize,
    options: WriteOptions,
    /// Of the parameters that this rank writes, in order.
    weights: Vec<Storage>,
    /// Pieces by name.
    state: Vec<(String, Storage)>,
    /// What is written once.
    once: Option<(ConfigDocument, TrainState)>,
    /// What replicas that train apart have besides, and all that those after the first have.
    apart: Option<diloco::Part>,
    is_of_first_replica: bool,
}

impl Snapshot {
    /// Copies what this rank is to write; its streams are idle.
    ///
    /// # Errors
    /// If the device does not give it.
    pub fn take(world: &World, about: Arc<About>) -> Result<Self, BoxError> {
        let (ranks, model) = (world.resource::<Ranks>(), world.resource::<Model>());
        let (parameters, memory) = (world.resource::<Parameters>(), world.resource::<Tensors>().memory());
        let rank = ranks.layout.rank as usize;
        let value = |spec: &ParamSpec| parameters.find(&spec.name).map(|weight| copy(memory, weight.value));
        let apart = diloco::Part::take(world)?;
        let is_of_first_replica = ranks.replica() == 0;
        if !is_of_first_replica {
            memory.failure()?;
            let (options, weights, state) = (WriteOptions::hub(&[], SaveDtype::F32), Vec::new(), Vec::new());
            return Ok(Snapshot { about, rank, options, weights, state, once: None, apart, is_of_first_replica });
        }
        let weights = about.parts[rank].iter().filter_map(value).collect();
        let mut state = Vec::new();
        for (index, spec) in parameters.specs.iter().enumerate() {
            let Some(part) = updated_part(world, index).filter(|part| !part.is_empty()) else { continue };
            for (name, tensor) in State::ALL.map(|(name, state)| (name, state.of(world, index))) {
                let name = piece_name(&format!("{}.{name}", spec.name), part.start);
                state.extend(tensor.map(|tensor| (name, copy(memory, tensor))));
            }
        }
        let dtype = if model.compute == DType::Bf16 { SaveDtype::Bf16 } else { SaveDtype::F32 };
        let eos = about.tokenizer.end_of_text();
        let generation = serde_json::json!({ "bos_token_id": eos, "eos_token_id": eos, "do_sample": true });
        let options = WriteOptions {
            generation_config: Some(serde_json::to_string_pretty(&generation)?),
            ..WriteOptions::hub(&param_specs(&model.config), dtype)
        };
        let once = if ranks.is_first() { Some((document(model, eos, dtype)?, TrainState::of(world))) } else { None };
        // What a device could not give back is not to be saved.
        memory.failure()?;
        Ok(Snapshot { about, rank, options, weights, state, once, apart, is_of_first_replica })
    }

    /// Writes it into a checkpoint's folder, which has a folder `train`; returns the files, relative to it.
    ///
    /// # Errors
    /// If a file cannot be written or a weight is not finite; or if it was given up, soon after that.
    pub fn write(&self, folder: &Path, given_up: &AtomicBool) -> Result<Vec<String>, BoxError> {
        let mut files = if self.is_of_first_replica { self.write_run(folder, given_up)? } else { Vec::new() };
        if let Some(apart) = &self.apart {
            files.extend(apart.write(folder)?);
        }
        Ok(files)
    }

    fn write_run(&self, folder: &Path, given_up: &AtomicBool) -> Result<Vec<String>, BoxError> {
        let mut writer = FolderWriter::create_part(folder, &self.about.parts, self.rank, &self.options)?;
        for (spec, values) in self.about.parts[self.rank].iter().zip(&self.weights) {
            if given_up.load(Ordering::Relaxed) {
                return Err("given up".into());
            }
            for view in &spec.views {
                writer.write_view(view, &narrow(values, view.offset..view.offset + view.num_elements()))?;
            }
        }
        let mut files;
        if let Some((config, state)) = &self.once {
            files = writer.finish(config)?.files;
            files.extend(["config.json", "generation_config.json", "tokenizer.json"].map(str::to_owned));
            files.extend(folder.join(INDEX).exists().then(|| INDEX.to_owned()));
            self.about.tokenizer.save(&folder.join("tokenizer.json"))?;
            for (name, text) in [
                ("train/state.json", serde_json::to_string_pretty(state)?),
                ("train/scene.ron", self.about.scene_text.clone()),
            ] {
                std::fs::write(folder.join(name), text)?;
                files.push(name.to_owned());
            }
        } else {
            files = writer.finish_part()?.files;
        }
        let mut file = TensorFile::new();
        for (name, values) in &self.state {
            match values {
                Storage::F64(values) => file.insert(name.as_str(), &[values.len()], values),
                Storage::F32(values) => file.insert(name.as_str(), &[values.len()], values),
                Storage::Bf16(values) => file.insert(name.as_str(), &[values.len()], values),
                Storage::U32(_) | Storage::U8(_) => return Err(format!("{name} is not made of floats").into()),
            }
        }
        let name = match self.about.parts.len() {
            1 => "train/optimizer.safetensors".to_owned(),
            num_ranks => format!("train/optimizer-{:05}-of-{num_ranks:05}.safetensors", self.rank + 1),
        };
        file.write(&folder.join(&name))?;
        files.push(name);
        Ok(files)
    }
}

/// config.json.
fn document(model: &Model, eos: u32, dtype: SaveDtype) -> Result<ConfigDocument, BoxError> {
    let mut config = HfConfig::from_model(&model.config);
    let id = serde_json::json!(eos);
    (config.bos_token_id, config.eos_token_id) = (serde_json::from_value(id.clone())?, serde_json::from_value(id)?);
    Ok(ConfigDocument::from_config(config)?.storing(Some(dtype.torch_name()))?)
}

impl TrainState {
    fn of(world: &World) -> Self {
        let training = world.resource::<Training>();
        TrainState {
            step: training.step,
            num_tokens: training.num_tokens,
            train_secs: training.train_secs,
            cursor: training.cursor(),
            last_seen: training.last_seen.clone(),
            live: world.get_resource::<Live>().copied().unwrap_or_default(),
        }
    }
}

fn copy(memory: &Memory, tensor: Tensor) -> Storage {
    match tensor.dtype {
        DType::F64 => Storage::F64(memory.download(tensor)),
        DType::F32 => Storage::F32(memory.download(tensor)),
        DType::Bf16 => Storage::Bf16(memory.download(tensor)),
        DType::U32 => Storage::U32(memory.download(tensor)),
        DType::U8 => Storage::U8(memory.download(tensor)),
    }
}

/// Some values as f32, which a model's file has at most.
fn narrow(values: &Storage, range: Range<usize>) -> Cow<'_, [f32]> {
    match values {
        Storage::F64(values) => values[range].iter().map(|&x| x as f32).collect(),
        Storage::F32(values) => values[range].into(),
        Storage::Bf16(values) => values[range].iter().map(|x| x.to_f32()).collect(),
        Storage::U32(values) => values[range].iter().map(|&x| x as f32).collect(),
        Storage::U8(values) => values[range].iter().map(|&x| f32::from(x)).collect(),
    }
}

/// Every parameter's gradient under its Hugging Face names, as f32, written to `path`.
///
/// # Errors
/// If the file cannot be written.
pub fn write_gradients(world: &World, path: &Path) -> Result<(), BoxError> {
    let memory: &Memory = world.resource::<Tensors>().memory();
    let parameters = world.resource::<Parameters>();
    let values: Vec<(&ParamSpec, Vec<f32>)> = parameters
        .iter()
        .filter(|(spec, _)| spec.kind != ParamKind::ExpertBias)
        .filter_map(|(spec, Weight { grad, .. })| Some((spec, model::download(memory, grad?))))
        .collect();
    let mut file = TensorFile::new();
    for (spec, values) in &values {
        for view in &spec.views {
            file.insert(view.hf_name.as_str(), &view.shape, &values[view.offset..][..view.num_elements()]);
        }
    }
    Ok(file.write(path)?)
}
