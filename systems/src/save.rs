//! Checkpoints of a training run: a Hugging Face folder, plus `train/` with what resuming needs to the last bit (optimizer
//! state, masters, data cursor, counters).

use std::path::Path;

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
    model::{self, Model, Parameters, Weight},
    optimizer::{OptimizerState, Slot},
    params::{ParamKind, ParamSpec},
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
}

/// Writes the model as a Hugging Face folder.
///
/// # Errors
/// If a file cannot be written or a weight is not finite.
pub fn write_model(world: &World, tokenizer: Option<&Tokenizer>, folder: &Path) -> Result<(), BoxError> {
    let (model, parameters) = (world.resource::<Model>(), world.resource::<Parameters>());
    let memory = world.resource::<Tensors>().memory();
    let dtype = if model.compute == DType::Bf16 { SaveDtype::Bf16 } else { SaveDtype::F32 };
    let mut config = HfConfig::from_model(&model.config);
    let eos = tokenizer.map(Tokenizer::end_of_text);
    if let Some(eos) = eos {
        let ids = serde_json::from_value(serde_json::json!(eos))?;
        (config.bos_token_id, config.eos_token_id) = (serde_json::from_value(serde_json::json!(eos))?, ids);
    }
    let name = if dtype == SaveDtype::Bf16 { "bfloat16" } else { "float32" };
    let document = ConfigDocument::from_config(config)?.storing(Some(name))?;
    let options = WriteOptions::hub(&parameters.specs, dtype);
    let mut index = 0;
    write_folder(folder, &document, &parameters.specs, &options, |_| {
        index += 1;
        Ok::<_, BoxError>(model::download(memory, parameters.weights[index - 1].value))
    })?;
    if let Some(tokenizer) = tokenizer {
        tokenizer.save(&folder.join("tokenizer.json"))?;
    }
    let generation = serde_json::json!({ "bos_token_id": eos, "eos_token_id": eos, "do_sample": true });
    std::fs::write(folder.join("generation_config.json"), serde_json::to_string_pretty(&generation)?)?;
    Ok(())
}

/// A tensor of a parameter's state, and its name in `train/optimizer.safetensors`.
fn state_tensors(parameters: &Parameters, optimizer: &OptimizerState) -> Vec<(String, Tensor)> {
    let mut list = Vec::new();
    for ((spec, weight), slot) in parameters.iter().zip(&optimizer.slots) {
        if weight.value.dtype == DType::F64 {
            list.push((format!("{}.weight64", spec.name), weight.value));
        }
        let Some((master, slot)) = slot else { continue };
        list.extend(master.map(|t| (format!("{}.master", spec.name), t)));
        match slot {
            Slot::AdamW { m, v } => {
                list.push((format!("{}.m", spec.name), *m));
                list.push((format!("{}.v", spec.name), *v));
            }
            Slot::Muon { m, .. } => list.push((format!("{}.momentum", spec.name), *m)),
        }
    }
    list
}

/// Writes `train/`.
///
/// # Errors
/// If a file cannot be written.
pub fn write_train_state(world: &World, folder: &Path) -> Result<(), BoxError> {
    let (parameters, optimizer) = (world.resource::<Parameters>(), world.resource::<OptimizerState>());
    let memory = world.resource::<Tensors>().memory();
    let training = world.resource::<Training>();
    let dir = folder.join("train");
    std::fs::create_dir_all(&dir)?;
    let tensors = state_tensors(parameters, optimizer);
    let narrow: Vec<_> =
        tensors.iter().filter(|(_, t)| t.dtype == DType::F32).map(|(n, t)| (n, t, memory.read::<f32>(*t))).collect();
    let wide: Vec<_> =
        tensors.iter().filter(|(_, t)| t.dtype == DType::F64).map(|(n, t)| (n, t, memory.read::<f64>(*t))).collect();
    let mut file = TensorFile::new();
    let dims = |t: &Tensor| t.shape.dims().collect::<Vec<_>>();
    for (name, tensor, data) in &narrow {
        file.insert(name.as_str(), &dims(tensor), data);
    }
    for (name, tensor, data) in &wide {
        file.insert(name.as_str(), &dims(tensor), data);
    }
    file.write(&dir.join("optimizer.safetensors"))?;
    let state = TrainState {
        step: training.step,
        num_tokens: training.num_tokens,
        train_secs: training.train_secs,
        cursor: training.loader.cursor(),
        last_seen: training.last_seen.clone(),
    };
    std::fs::write(dir.join("state.json"), serde_json::to_string_pretty(&state)?)?;
    Ok(())
}

/// Restores what [`write_model`] and [`write_train_state`] wrote.
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
    for (name, tensor) in state_tensors(parameters, world.resource::<OptimizerState>()) {
        let dims: Vec<usize> = tensor.shape.dims().collect();
        match tensor.dtype {
            DType::F64 => memory.upload(tensor, &file.get::<f64>(&name, &dims)?),
            _ => memory.upload(tensor, &file.get::<f32>(&name, &dims)?),
        }
    }
    let path = folder.join("train/state.json");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
    let state: TrainState = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut training = world.resource_mut::<Training>();
    training.loader.seek(&state.cursor)?;
    (training.step, training.num_tokens, training.train_secs) = (state.step, state.num_tokens, state.train_secs);
    training.last_seen = state.last_seen;
    Ok(())
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
