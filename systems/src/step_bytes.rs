//! Memory over a step, for whoever asks a run (`step.bytes`): the plan of a step fixes it, so it is told once and not measured.

use bevy_ecs::prelude::*;
use engine::control::{Access, Method, RpcResult};
use serde_json::{Value, json};

use crate::{lower::ActivationBytes, model::Parameters, optimizer::OptimizerState, ranks::Ranks};

/// For each task of the newest training step's plan, in launch order.
#[derive(Resource, Default)]
pub struct StepBytes(pub Vec<ActivationBytes>);

/// The method that tells it.
pub const METHOD: Method = Method {
    name: "step.bytes",
    about: "{} -> memory of the first rank over the tasks of a training step: {rank, weights, gradients, optimizer, activations: \
            [bytes], communication: [bytes]}",
    access: Access::Reads,
    run: tell,
};

fn tell(world: &mut World, _: &Value) -> RpcResult {
    let parameters = world.resource::<Parameters>();
    let weights: u64 = parameters.weights.iter().map(|w| w.value.size_bytes()).sum();
    let gradients: u64 = parameters.weights.iter().filter_map(|w| w.grad).map(|grad| grad.size_bytes()).sum();
    let by_task = world.get_resource::<StepBytes>().map_or(&[][..], |bytes| &bytes.0);
    let of = |class: fn(&ActivationBytes) -> u64| by_task.iter().map(class).collect::<Vec<u64>>();
    Ok(json!({
        "rank": world.resource::<Ranks>().layout.rank,
        "weights": weights,
        "gradients": gradients,
        "optimizer": world.resource::<OptimizerState>().num_bytes(),
        "activations": of(|bytes| bytes.activations),
        "communication": of(|bytes| bytes.communication),
    }))
}
