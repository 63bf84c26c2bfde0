//! Goes on from a checkpoint, on whatever ranks: each reads by name and offset what it holds, once all that is there was counted.

use std::{ops::Range, path::Path};

use bevy_ecs::prelude::*;
use engine::{checkpoint::BoxError, prelude::*, tensor_pieces::TensorPieces};
use kernels::{dtype::DType, memory::Memory, tensor::Tensor};
use safetensors::Dtype;

use crate::{
    hf::read::HfFolder,
    linear,
    model::{self, Model, Parameters},
    params::{ParamSpec, param_specs},
    save::{State, TrainState, updated_part},
    train::Training,
};

/// Restores this rank's part of what the ranks that wrote `folder` had.
///
/// # Errors
/// If the checkpoint is of another model, optimizer or data set, or not all of it is there; the file and the tensor are named.
pub fn restore(world: &mut World, folder: &Path) -> Result<(), BoxError> {
    let memory = world.resource::<Tensors>().memory().clone();
    let specs = param_specs(&world.resource::<Model>().config);
    let hf = HfFolder::open(folder)?;
    // Every tensor of every expert is there, and none besides.
    check_model(folder, &specs, &hf.model()?.specs)?;
    let parameters = world.resource::<Parameters>();
    for (spec, weight) in parameters.iter() {
        model::upload(&memory, weight.value, &hf.read_param(spec)?);
    }
    let train = folder.join("train");
    let pieces = TensorPieces::open(&train, "optimizer")?;
    check_pieces(world, &train, &specs, &pieces)?;
    for (spec, weight) in parameters.iter() {
        let Some(part) = updated_part(world, weight.index) else { continue };
        for (name, state) in State::ALL {
            let Some(tensor) = state.of(world, weight.index) else { continue };
            let name = format!("{}.{name}", spec.name);
            // The weight is whole on every holder, not only in the part that this rank updates.
            let whole = spec.start..spec.start + spec.num_elements();
            let (tensor, range) = if state == State::Weight { (weight.value, whole) } else { (tensor, part.clone()) };
            put(&memory, tensor, &pieces, &name, range)?;
        }
    }
    let path = train.join("state.json");
    let text = std::fs::read_to_string(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
    let state: TrainState = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    let mut training = world.resource_mut::<Training>();
    training.loader.seek(&state.cursor)?;
    (training.step, training.num_tokens, training.train_secs) = (state.step, state.num_tokens, state.train_secs);
    training.last_seen = state.last_seen;
    world.insert_resource(state.live);
    Ok(linear::quantize_weights(world)?)
}

/// A folder may be whole and of another model.
fn check_model(folder: &Path, ours: &[ParamSpec], found: &[ParamSpec]) -> Result<(), BoxError> {
    let both = ours.iter().zip(found);
    let place = both.clone().position(|(a, b)| (&a.name, &a.shape) != (&b.name, &b.shape));
    let Some(at) = place.or((ours.len() != found.len()).then(|| ours.len().min(found.len()))) else { return Ok(()) };
    let name = |specs: &[ParamSpec]| specs.get(at).map_or("the end".into(), |s| format!("`{}` {:?}", s.name, s.shape));
    Err(format!("{} is of another model: expected {}, found {}", folder.display(), name(ours), name(found)).into())
}

/// Each element of each parameter's state once, and no state that this run has no place for.
fn check_pieces(world: &World, train: &Path, specs: &[ParamSpec], pieces: &TensorPieces) -> Result<(), BoxError> {
    let mut names = Vec::new();
    for spec in specs {
        for (name, _) in State::ALL.into_iter().filter(|(_, state)| state.exists(world, spec)) {
            let name = format!("{}.{name}", spec.name);
            // Rows of what is packed are experts.
            pieces.check(&name, &spec.shape)?;
            names.push(name);
        }
    }
    names.sort();
    match pieces.names().find(|name| names.binary_search_by(|other| other.as_str().cmp(name)).is_err()) {
        None => Ok(()),
        Some(stranger) => Err(format!(
            "{} holds `{stranger}`, which this run has no place for; go on with the optimizer and the precision of train/scene.ron",
            train.display()
        )
        .into()),
    }
}

fn put(
    memory: &Memory,
    tensor: Tensor,
    pieces: &TensorPieces,
    name: &str,
    range: Range<usize>,
) -> Result<(), BoxError> {
    match (pieces.dtype(name), tensor.dtype) {
        (Some(Dtype::F64), DType::F64) => memory.upload(tensor, &pieces.read::<f64>(name, range)?),
        (Some(Dtype::BF16), _) => {
            let values = pieces.read::<half::bf16>(name, range)?;
            let values: Vec<f32> = values.into_iter().map(half::bf16::to_f32).collect();
            model::upload(memory, tensor, &values);
        }
        _ => model::upload(memory, tensor, &pieces.read::<f32>(name, range)?),
    }
    Ok(())
}
