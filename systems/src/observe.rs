//! What a training step tells of itself beside its loss: bytes by class and over the step, bytes on links, correction biases.
//! And what of the world can be looked at from outside.
//!
//! Each rank tells its figures in the exchange that a step has anyway; the first rank writes them into its snapshot.

use std::{collections::BTreeMap, sync::Arc};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::{prelude::*, telemetry::Telemetry};
use kernels::comm::meter::{LinkBytes, Meter};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::{
    attention::{Gqa, Mla, MlaQuery},
    dense::Dense,
    expert::{ExpertKey, ExpertLoad, Moe},
    lower::{ActivationBytes, Lowered},
    model::{Layer, Model, Parameters, Weight},
    optimizer::OptimizerState,
    rounding,
};

/// Classes of bytes, as they are called in scalars.
const CLASSES: [&str; 5] = ["weights", "gradients", "optimizer", "activations", "communication"];

/// Bytes live when each task is launched. One value a task and step is too much for a log.
const LIVE_BYTES: &str = "live_bytes/task";
/// Correction biases of a layer; what moved them, the loads, is in the log.
const BIAS: &str = "bias/";

/// Whether a distribution belongs into `log.jsonl`.
pub fn is_logged(histogram: &str) -> bool {
    histogram != LIVE_BYTES && !histogram.starts_with(BIAS) && !histogram.starts_with(rounding::HISTOGRAMS)
}

/// What is known of the memory of each plan since it was lowered.
#[derive(Resource, Default)]
pub struct PlannedBytes(BTreeMap<PlanKey, (ClassBytes, Arc<[u64]>)>);

/// Bytes of each of [`CLASSES`], the last two at the step's peak moment.
type ClassBytes = [u64; CLASSES.len()];

impl PlannedBytes {
    /// Keeps what is known of a plan that was just lowered.
    pub fn keep(world: &mut World, key: &PlanKey, lowered: &Lowered) {
        let parameters = world.resource::<Parameters>();
        let copies = parameters.weights.iter().filter_map(|weight| weight.fp8).map(|fp8| fp8.num_bytes()).sum::<u64>();
        let weights = parameters.weights.iter().map(|weight| weight.value.size_bytes()).sum::<u64>() + copies;
        let gradients = parameters.weights.iter().filter_map(|weight| weight.grad).map(|grad| grad.size_bytes()).sum();
        let optimizer = world.get_resource::<OptimizerState>().map_or(0, OptimizerState::num_bytes);
        let classes = [weights, gradients, optimizer, lowered.peak.activations, lowered.peak.communication];
        let live = lowered.bytes_by_task.iter().map(ActivationBytes::total).collect();
        let known = (classes, live);
        world.get_resource_or_init::<PlannedBytes>().0.insert(key.clone(), known);
    }

    fn active(world: &World) -> Option<&(ClassBytes, Arc<[u64]>)> {
        world.get_resource::<PlannedBytes>()?.0.get(world.resource::<Plans>().active.as_ref()?)
    }
}

/// What this rank sent in the last training step.
#[derive(Resource, Clone, Copy, Debug, Default)]
pub struct Sent(pub Meter);

/// What a rank tells the others of its step.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Figures {
    bytes: ClassBytes,
    /// Intra-node, then inter-node: messages, dispatch, combine, reductions.
    links: [(u64, u64); KINDS.len()],
    /// Layer, and the correction bias of each of its experts, from the rank that speaks for the layer.
    biases: Vec<(usize, Vec<f32>)>,
}

/// Kinds of traffic, as they are called in scalars.
const KINDS: [&str; 4] = ["p2p", "dispatch", "combine", "reduce"];

impl Figures {
    /// Of the step that this rank has just done.
    pub fn of(world: &World, speaks_for: impl Fn(usize) -> bool) -> Self {
        let Meter { p2p, dispatch, combine, reduce } =
            world.get_resource::<Sent>().map_or_else(Meter::default, |s| s.0);
        let pair = |bytes: LinkBytes| (bytes.intra_node, bytes.inter_node);
        let memory = world.resource::<Tensors>().memory();
        let bias = |entity: Entity| {
            let layer = world.get::<Layer>(entity)?.index;
            let bias = world.get::<Moe>(entity)?.bias?.value;
            speaks_for(layer).then(|| (layer, memory.read::<f32>(bias).to_vec()))
        };
        Figures {
            bytes: PlannedBytes::active(world).map_or_else(Default::default, |(classes, _)| *classes),
            links: [p2p, dispatch, combine, reduce].map(pair),
            biases: world.resource::<Model>().all_layers().filter_map(bias).collect(),
        }
    }

    /// Adds the figures of all ranks, by rank, to the step's record.
    pub fn tell(world: &mut World, all: &[&Figures]) {
        let live = PlannedBytes::active(world).map(|(_, live)| live.clone());
        let mut telemetry = world.resource_mut::<Telemetry>();
        let several = all.len() > 1;
        for (rank, figures) in all.iter().enumerate() {
            let of_rank = if several { format!("rank{rank}/") } else { String::new() };
            for (class, bytes) in CLASSES.iter().zip(figures.bytes) {
                telemetry.scalar(format!("bytes/{of_rank}{class}"), bytes as f64);
            }
            if several {
                let (intra, inter) = figures.links.iter().fold((0, 0), |sum, kind| (sum.0 + kind.0, sum.1 + kind.1));
                telemetry.scalar(format!("link_bytes/{of_rank}intra_node"), intra as f64);
                telemetry.scalar(format!("link_bytes/{of_rank}inter_node"), inter as f64);
            }
        }
        if several {
            for (i, kind) in KINDS.iter().enumerate() {
                let sum = |of: fn(&(u64, u64)) -> u64| all.iter().map(|figures| of(&figures.links[i])).sum::<u64>();
                telemetry.scalar(format!("link_bytes/{kind}/intra_node"), sum(|bytes| bytes.0) as f64);
                telemetry.scalar(format!("link_bytes/{kind}/inter_node"), sum(|bytes| bytes.1) as f64);
            }
        }
        let mut biases: Vec<_> = all.iter().flat_map(|figures| &figures.biases).collect();
        biases.sort_unstable_by_key(|(layer, _)| *layer);
        for (layer, bias) in biases {
            telemetry.histogram(format!("{BIAS}layer {layer}"), bias.iter().map(|&x| f64::from(x)).collect());
        }
        if let Some(live) = live {
            telemetry.histogram(LIVE_BYTES, live.iter().map(|&bytes| bytes as f64).collect());
        }
    }
}

/// A rank, as an entity that its streams and stages belong to.
#[derive(Component, Clone, Copy, Debug, Serialize)]
pub struct Rank {
    /// Number.
    pub rank: u32,
    /// Position in the pipeline.
    pub pp: u32,
    /// Among ranks that see other data.
    pub dp: u32,
    /// Among ranks that hold other experts.
    pub ep: u32,
}

/// A pipeline stage, as an entity that its layers belong to.
#[derive(Component, Clone, Copy, Debug, Serialize)]
pub struct Stage {
    /// Number.
    pub index: u32,
}

/// Shows the model's entities to who asks for them.
pub struct ObservePlugin;

impl Plugin for ObservePlugin {
    fn build(&self, app: &mut App) {
        app.expose::<Rank>("Rank")
            .expose::<Stage>("Stage")
            .expose_as::<Queue>("Stream", |queue| json!({ "name": &*queue.name, "rank": queue.rank }))
            .expose_as::<Layer>("Layer", |layer| json!({ "index": layer.index }))
            .expose_as::<Mla>("Mla", |mla| {
                let query = match mla.query {
                    MlaQuery::Full(query) => json!({ "q_proj": shape(query) }),
                    MlaQuery::LowRank { down, up, .. } => json!({ "q_a_proj": shape(down), "q_b_proj": shape(up) }),
                };
                json!({ "query": query, "kv_a_proj": shape(mla.kv_down), "kv_b_proj": shape(mla.kv_up), "o_proj": shape(mla.out) })
            })
            .expose_as::<Gqa>("Gqa", |gqa| {
                json!({
                    "q_proj": shape(gqa.query.0),
                    "k_proj": shape(gqa.key.0),
                    "v_proj": shape(gqa.value.0),
                    "o_proj": shape(gqa.out),
                    "has_bias": gqa.query.1.is_some(),
                })
            })
            .expose_as::<Dense>("Dense", |dense| json!({ "gate_up": shape(dense.gate_up), "down": shape(dense.down) }))
            .expose_as::<Moe>("Moe", |moe| {
                json!({
                    "gate": shape(moe.gate),
                    "experts_gate_up": shape(moe.experts_gate_up),
                    "experts_down": shape(moe.experts_down),
                    "has_correction_bias": moe.bias.is_some(),
                    "shared_gate_up": moe.shared.map(|(gate_up, _)| shape(gate_up)),
                })
            })
            .expose_as::<ExpertKey>("Expert", |key| json!({ "layer": key.layer, "expert": key.expert }))
            .expose_as::<ExpertLoad>("Load", |load| json!({ "num_tokens": load.0 }));
    }
}

/// A parameter's part on this rank: `[64, 128] f32`.
fn shape(weight: Weight) -> Value {
    format!("{:?} {}", weight.value.shape, weight.value.dtype.name()).into()
}
