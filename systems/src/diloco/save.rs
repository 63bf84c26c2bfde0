//! What a checkpoint keeps of replicas beside what it keeps of any run, which is the first replica's: theta and the outer momentum, the other
//! replicas' weights, moments and biases, and who is there. So a run goes on from any step with the bits that it would have had.
//!
//! On another number of replicas it goes on, too: those that are new have theta's weights, and the first replica's moments and biases; those
//! that are no more are left out. A checkpoint of a run without replicas is one that all of them begin with.

use std::{collections::BTreeMap, path::Path};

use bevy_ecs::prelude::*;
use engine::{
    checkpoint::BoxError,
    prelude::*,
    tensor_file::TensorFile,
    tensor_pieces::{TensorPieces, piece_name},
};
use kernels::tensor::Tensor;
use serde::{Deserialize, Serialize};

use super::Diloco;
use crate::{
    linear,
    model::{self, Model, Parameters},
    optimizer::{OptimizerState, Slot},
    params::{ParamKind, param_specs},
    ranks::Ranks,
};

/// Stem of the files of pieces.
const STEM: &str = "diloco";
const STATE: &str = "train/diloco.json";

/// `train/diloco.json`.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct State {
    /// Replicas of the run that saved.
    replicas: u32,
    /// Those that were there.
    present: Vec<u32>,
    /// What was asked of them.
    asked: BTreeMap<u32, bool>,
}

/// Tensors of a parameter, as they are called in the file. The first two are all replicas', and the first replica brings them; the
/// others are each replica's own, and kept of all but the first, whose are kept as any run's.
const NAMES: [&str; 6] = ["theta", "outer_momentum", "local", "m", "v", "momentum"];
const COMMON: usize = 2;

/// This rank's tensors of parameter `index`, by their place in [`NAMES`], and the first of their elements in the whole parameter.
fn tensors(world: &World, index: usize) -> (usize, Vec<(usize, Tensor)>) {
    let parameters = world.resource::<Parameters>();
    let (spec, weight) = (&parameters.specs[index], parameters.weights[index]);
    let Some(held) = &world.resource::<Diloco>().held[index] else {
        // All ranks of a replica that hold a bias have the same.
        return (0, if spec.kind == ParamKind::ExpertBias { vec![(2, weight.value)] } else { Vec::new() });
    };
    let mut all = vec![(0, held.slots.theta), (1, held.slots.v), (2, held.slots.local)];
    let Some(shard) = &world.resource::<OptimizerState>().shards[index] else { return (0, Vec::new()) };
    match shard.slot {
        Slot::AdamW { m, v } => all.extend([(3, m), (4, v)]),
        Slot::Muon { m, .. } => all.push((5, m)),
    }
    (spec.start + shard.mine.start, all)
}

/// This rank's part of what replicas need, to be written beside training; nothing, where there are none.
pub struct Part {
    number: u32,
    num_ranks: u32,
    /// Pieces by name, of f32.
    pieces: Vec<(String, Vec<f32>)>,
    /// Of the first rank, what is written once.
    state: Option<String>,
}

impl Part {
    /// Copies it.
    ///
    /// # Errors
    /// If who is there has no JSON form.
    pub fn take(world: &World) -> Result<Option<Self>, BoxError> {
        let Some(diloco) = world.get_resource::<Diloco>() else { return Ok(None) };
        let (ranks, parameters) = (world.resource::<Ranks>(), world.resource::<Parameters>());
        let (memory, config) = (world.resource::<Tensors>().memory(), &world.resource::<Model>().config);
        let mut pieces = Vec::new();
        for (index, spec) in parameters.specs.iter().enumerate() {
            let (at, tensors) = tensors(world, index);
            let speaks = spec.kind != ParamKind::ExpertBias
                || ranks.layout.holders(config, spec).first() == Some(&ranks.layout.rank);
            for (name, tensor) in tensors.into_iter().filter(|(name, _)| (ranks.replica() == 0) == (*name < COMMON)) {
                if speaks && !tensor.is_empty() {
                    let name = piece_name(&name_of(name, ranks.replica(), &spec.name), at);
                    pieces.push((name, model::download(memory, tensor)));
                }
            }
        }
        let state =
            State { replicas: ranks.num_replicas(), present: diloco.present.clone(), asked: diloco.asked.clone() };
        let state = ranks.is_first().then(|| serde_json::to_string_pretty(&state)).transpose()?;
        Ok(Some(Part { number: ranks.number(), num_ranks: ranks.everyone.num_ranks(), pieces, state }))
    }

    /// Writes it into a checkpoint's folder, which has a folder `train`; returns the files, relative to it.
    ///
    /// # Errors
    /// If a file cannot be written.
    pub fn write(&self, folder: &Path) -> Result<Vec<String>, BoxError> {
        let mut file = TensorFile::new();
        self.pieces.iter().for_each(|(name, values)| file.insert(name.as_str(), &[values.len()], values));
        let mut files = vec![format!("train/{STEM}-{:05}-of-{:05}.safetensors", self.number + 1, self.num_ranks)];
        file.write(&folder.join(&files[0]))?;
        if let Some(state) = &self.state {
            std::fs::write(folder.join(STATE), state)?;
            files.push(STATE.to_owned());
        }
        Ok(files)
    }
}

fn name_of(name: usize, replica: u32, parameter: &str) -> String {
    let name = NAMES.get(name).copied().unwrap_or_default();
    if replica == 0 { format!("{parameter}.{name}") } else { format!("replica{replica}.{parameter}.{name}") }
}

/// Restores this rank's part of what [`Part::write`] wrote, on whatever replicas and ranks, after all else of the checkpoint. Nothing, where
/// there are no replicas.
///
/// # Errors
/// If the checkpoint is of another model; the file and the tensor are named.
pub fn restore(world: &mut World, folder: &Path) -> Result<(), BoxError> {
    let Some(mut diloco) = world.remove_resource::<Diloco>() else { return Ok(()) };
    let memory = world.resource::<Tensors>().memory().clone();
    let step = world.resource::<crate::train::Training>().step;
    diloco.begin_at(&memory);
    diloco.present = diloco.present_in(diloco.settings.round_of(step));
    world.insert_resource(diloco);
    let path = folder.join(STATE);
    if !path.exists() {
        return Ok(());
    }
    let pieces = TensorPieces::open(&folder.join("train"), STEM)?;
    let text = std::fs::read_to_string(&path).map_err(|e| format!("read {}: {e}", path.display()))?;
    let saved: State = serde_json::from_str(&text).map_err(|e| format!("{}: {e}", path.display()))?;
    let replica = world.resource::<Ranks>().replica();
    let parameters = world.resource::<Parameters>();
    for spec in param_specs(&world.resource::<Model>().config) {
        let Some(weight) = parameters.find(&spec.name) else { continue };
        let (at, tensors) = tensors(world, weight.index);
        let read = |name: usize, of: u32| pieces.read::<f32>(&name_of(name, of, &spec.name), 0..spec.num_elements());
        let is_trained = spec.kind.is_trained();
        let mut trains = None;
        for (name, tensor) in tensors {
            let part = at..at + tensor.len();
            let values = match name {
                _ if name < COMMON => read(name, 0)?,
                // The first replica's are those of the checkpoint, and who is new has its moments and biases.
                _ if replica > 0 && replica < saved.replicas => read(name, replica)?,
                2 if replica > 0 && is_trained => read(0, 0)?,
                _ => continue,
            };
            model::upload(&memory, tensor, &values[part]);
            if name == 2 {
                trains = Some(values);
            }
        }
        // Weights are whole on every holder, not only in the part that this rank updates.
        let trains = match trains {
            None if replica > 0 && is_trained => {
                Some(if replica < saved.replicas { read(2, replica)? } else { read(0, 0)? })
            }
            trains => trains,
        };
        if let Some(values) = trains {
            let start = parameters.specs[weight.index].start;
            model::upload(&memory, weight.value, &values[start..start + weight.value.len()]);
        }
    }
    let mut diloco = world.resource_mut::<Diloco>();
    diloco.asked = saved.asked;
    let is_there = |replica: &u32| {
        if *replica < saved.replicas { saved.present.contains(replica) } else { diloco.present.contains(replica) }
    };
    diloco.present = (0..diloco.settings.replicas).filter(is_there).collect();
    Ok(linear::quantize_weights(world)?)
}
