//! Checkpoints of a training run: a Hugging Face folder, plus `train/` with what resuming needs to the last bit (optimizer
//! state, masters, data cursor, counters).

use std::{ops::Range, path::Path};

use bevy_ecs::prelude::*;
use engine::{checkpoint::BoxError, prelude::*, tensor_file::TensorFile};
use kernels::{dtype::DType, memory::Memory, tensor::Tensor};
use serde::{Deserialize, Serialize};

use crate::{
    data::{cursor::Cursor, tokenizer::Tokenizer},
    hf::{
        config::{ConfigDocument, HfConfig},
        read::HfFolder,
        write::{SaveDtype, WriteOptions, write_folder},
    },
    linear,
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

/// A parameter of this rank's list, and which elements of the whole parameter this rank speaks for.
type Part<'a> = (usize, &'a ParamSpec, Range<usize>);

/// The whole of a parameter's values, gathered on the first rank from those that speak for parts of it; empty elsewhere. Every
/// rank calls this for the same parameters in the same order.
///
/// # Errors
/// If a rank is lost.
pub fn gather<'a>(
    world: &'a World,
    spec: &ParamSpec,
    part: impl Fn(&'a World, usize) -> Option<Range<usize>>,
    values: impl Fn(&'a World, Part<'a>) -> Vec<f64>,
) -> Result<Vec<f64>, BoxError> {
    let (ranks, parameters) = (world.resource::<Ranks>(), world.resource::<Parameters>());
    let mine = parameters.find(&spec.name).and_then(|weight| {
        let local = &parameters.specs[weight.index];
        Some((weight.index, local, part(world, weight.index)?))
    });
    let mine = mine.map(|(index, local, range)| {
        let at = local.start + range.start;
        (at, values(world, (index, local, range)))
    });
    // What a device could not give back is not to be saved.
    world.resource::<Tensors>().memory().failure()?;
    if ranks.layout.is_solo() {
        return Ok(mine.map_or_else(Vec::new, |(_, values)| values));
    }
    let mut bytes = Vec::new();
    if let Some((at, values)) = mine {
        bytes.extend((at as u64).to_le_bytes());
        bytes.extend(values.iter().flat_map(|x| x.to_le_bytes()));
    }
    let all = ranks.comm.all_gather_bytes(bytes)?;
    if !ranks.is_first() {
        return Ok(Vec::new());
    }
    let word = |bytes: &[u8]| <[u8; 8]>::try_from(bytes).unwrap_or_default();
    let mut whole = vec![f64::NAN; spec.num_elements()];
    for part in all.iter().filter(|part| part.len() > 8) {
        let at = u64::from_le_bytes(word(&part[..8])) as usize;
        for (out, bytes) in whole[at..].iter_mut().zip(part[8..].chunks_exact(8)) {
            *out = f64::from_le_bytes(word(bytes));
        }
    }
    Ok(whole)
}

/// All of a parameter that this rank holds, if it speaks for it: the first of those that hold the same does.
pub fn held_part(world: &World, index: usize) -> Option<Range<usize>> {
    let (ranks, model) = (world.resource::<Ranks>(), world.resource::<Model>());
    let spec = &world.resource::<Parameters>().specs[index];
    let holders = ranks.layout.holders(&model.config, spec);
    (holders.first() == Some(&ranks.layout.rank)).then(|| 0..spec.num_elements())
}

/// The part of a parameter that this rank's optimizer updates.
pub fn updated_part(world: &World, index: usize) -> Option<Range<usize>> {
    world.resource::<OptimizerState>().shards[index].as_ref().map(|shard| shard.mine.clone())
}

fn wide(memory: &Memory, tensor: Tensor) -> Vec<f64> {
    kernels::with_float!(tensor.dtype, T => {
        memory.read::<T>(tensor).iter().map(|x| kernels::dtype::Float::as_f64(*x)).collect()
    })
}

fn weight_values(world: &World, (index, _, range): Part) -> Vec<f64> {
    let weight = world.resource::<Parameters>().weights[index].value;
    wide(world.resource::<Tensors>().memory(), weight.slice(range.start, range.len()))
}

fn narrow(values: Vec<f64>) -> Vec<f32> {
    values.into_iter().map(|x| x as f32).collect()
}

/// Writes the model as a Hugging Face folder; all ranks take part, and the first, which has a `folder`, writes.
///
/// # Errors
/// If a file cannot be written, a weight is not finite, or a rank is lost.
pub fn write_model(world: &World, tokenizer: Option<&Tokenizer>, folder: Option<&Path>) -> Result<(), BoxError> {
    let model = world.resource::<Model>();
    let specs = param_specs(&model.config);
    let whole = |spec: &ParamSpec| Ok::<_, BoxError>(narrow(gather(world, spec, held_part, weight_values)?));
    let Some(folder) = folder else { return specs.iter().try_for_each(|spec| whole(spec).map(drop)) };
    let dtype = if model.compute == DType::Bf16 { SaveDtype::Bf16 } else { SaveDtype::F32 };
    let mut config = HfConfig::from_model(&model.config);
    let eos = tokenizer.map(Tokenizer::end_of_text);
    if let Some(eos) = eos {
        let ids = serde_json::from_value(serde_json::json!(eos))?;
        (config.bos_token_id, config.eos_token_id) = (serde_json::from_value(serde_json::json!(eos))?, ids);
    }
    let name = if dtype == SaveDtype::Bf16 { "bfloat16" } else { "float32" };
    let document = ConfigDocument::from_config(config)?.storing(Some(name))?;
    let options = WriteOptions::hub(&specs, dtype);
    write_folder(folder, &document, &specs, &options, whole)?;
    if let Some(tokenizer) = tokenizer {
        tokenizer.save(&folder.join("tokenizer.json"))?;
    }
    let generation = serde_json::json!({ "bos_token_id": eos, "eos_token_id": eos, "do_sample": true });
    std::fs::write(folder.join("generation_config.json"), serde_json::to_string_pretty(&generation)?)?;
    Ok(())
}

/// Tensors of an optimizer's state, as they are called in `train/optimizer.safetensors`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
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
    const ALL: [(&'static str, State); 5] = [
        ("weight", State::Weight),
        ("master", State::Master),
        ("m", State::M),
        ("v", State::V),
        ("momentum", State::Momentum),
    ];

    /// This rank's part of the state, if its kind of optimizer has it.
    fn of(self, world: &World, index: usize) -> Option<Tensor> {
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
    fn exists(self, world: &World, spec: &ParamSpec) -> bool {
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

/// Writes `train/`; all ranks take part, and the first, which has a `folder`, writes.
///
/// # Errors
/// If a file cannot be written, or a rank is lost.
pub fn write_train_state(world: &World, folder: Option<&Path>) -> Result<(), BoxError> {
    let config = &world.resource::<Model>().config;
    let memory = world.resource::<Tensors>().memory();
    let mut whole: Vec<(String, Vec<usize>, Vec<f64>)> = Vec::new();
    for spec in param_specs(config) {
        for (name, state) in State::ALL {
            if state.exists(world, &spec) {
                let values = |world: &World, (index, ..): Part| {
                    state.of(world, index).map_or_else(Vec::new, |tensor| wide(memory, tensor))
                };
                let values = gather(world, &spec, updated_part, values)?;
                whole.push((format!("{}.{name}", spec.name), spec.shape.clone(), values));
            }
        }
    }
    let Some(folder) = folder else { return Ok(()) };
    let training = world.resource::<Training>();
    let dir = folder.join("train");
    std::fs::create_dir_all(&dir)?;
    let is_wide = world.resource::<Model>().compute == DType::F64;
    let narrow: Vec<_> = whole.iter().map(|(.., v)| if is_wide { Vec::new() } else { narrow(v.clone()) }).collect();
    let mut file = TensorFile::new();
    for ((name, dims, wide), narrow) in whole.iter().zip(&narrow) {
        if is_wide {
            file.insert(name.as_str(), dims, wide);
        } else {
            file.insert(name.as_str(), dims, narrow);
        }
    }
    file.write(&dir.join("optimizer.safetensors"))?;
    let state = TrainState {
        step: training.step,
        num_tokens: training.num_tokens,
        train_secs: training.train_secs,
        cursor: training.loader.cursor(),
        last_seen: training.last_seen.clone(),
        live: world.get_resource::<Live>().copied().unwrap_or_default(),
    };
    std::fs::write(dir.join("state.json"), serde_json::to_string_pretty(&state)?)?;
    Ok(())
}

/// Restores this rank's part of what [`write_model`] and [`write_train_state`] wrote, on whatever ranks.
///
/// # Errors
/// If the checkpoint is of another model, optimizer or data set; the file and the tensor are named.
pub fn restore(world: &mut World, folder: &Path) -> Result<(), BoxError> {
    let hf = HfFolder::open(folder)?;
    hf.model()?;
    let memory = world.resource::<Tensors>().memory().clone();
    let parameters = world.resource::<Parameters>();
    for (spec, weight) in parameters.iter() {
        model::upload(&memory, weight.value, &hf.read_param(spec)?);
    }
    let file = TensorFile::read(&folder.join("train/optimizer.safetensors"))?;
    for whole in param_specs(&world.resource::<Model>().config) {
        let Some(weight) = parameters.find(&whole.name) else { continue };
        let start = parameters.specs[weight.index].start;
        for (name, state) in State::ALL {
            let (Some(tensor), Some(part)) = (state.of(world, weight.index), updated_part(world, weight.index)) else {
                continue;
            };
            let name = format!("{}.{name}", whole.name);
            let part = start + part.start..start + part.end;
            match tensor.dtype {
                DType::F64 => memory.upload(tensor, &file.get::<f64>(&name, &whole.shape)?[part]),
                _ => model::upload(&memory, tensor, &file.get::<f32>(&name, &whole.shape)?[part]),
            }
            // The weight is whole on every holder, not only in the part that this rank updates.
            if state == State::Weight {
                let part = start..start + weight.value.len();
                match weight.value.dtype {
                    DType::F64 => memory.upload(weight.value, &file.get::<f64>(&name, &whole.shape)?[part]),
                    _ => model::upload(&memory, weight.value, &file.get::<f32>(&name, &whole.shape)?[part]),
                }
            }
        }
    }
    let path = folder.join("train/state.json");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
    let state: TrainState = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut training = world.resource_mut::<Training>();
    training.loader.seek(&state.cursor)?;
    (training.step, training.num_tokens, training.train_secs) = (state.step, state.num_tokens, state.train_secs);
    training.last_seen = state.last_seen;
    world.insert_resource(state.live);
    Ok(linear::quantize_weights(world)?)
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
