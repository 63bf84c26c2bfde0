//! The model as entities: one per layer, composed of the parts its configuration names, and one per routed expert.
//!
//! Weights are handles into the device's memory; [`Parameters`] is the one list of them, in the order of
//! [`crate::params::param_specs`], that initialization, optimizer, checkpoints and gradients walk.

use std::collections::BTreeMap;

use bevy_ecs::prelude::*;
use kernels::{dtype::DType, memory::Memory, ops::rms_norm, stream::Stream, tensor::Tensor};
use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;

use crate::{
    attention::{Gqa, Mla, MlaQuery},
    dense::Dense,
    expert::{ExpertKey, Moe},
    formats::Formats,
    layout::Layout,
    linear::Fp8Weight,
    model_config::{Attention, ModelConfig},
    mtp::MtpModule,
    observe::Stage,
    params::{ParamKind, ParamSpec},
    weights,
};

/// A parameter's handles.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Weight {
    /// Its place in [`Parameters`].
    pub index: usize,
    /// Value in the compute type; without bytes where [`Fp8Weight::is_all`].
    pub value: Tensor,
    /// Gradient, in the compute type or in f32 beside 8 bits; `None` when nothing is trained.
    pub grad: Option<Tensor>,
    /// Copies in 8 bits, where products take these.
    pub fp8: Option<Fp8Weight>,
}

impl Weight {
    /// I and W of the RMSNorm that this is the weight of, from the gradient `dy` of its output; I adds `residual`, if given. Both are
    /// one pass over the same rows, and what waits for W need not keep them.
    ///
    /// # Errors
    /// If shapes do not fit.
    pub fn norm_grads(
        &self,
        s: &mut Stream,
        x: Tensor,
        rstd: Tensor,
        dy: Tensor,
        residual: Option<Tensor>,
        dx: Tensor,
    ) -> Result<(), kernels::error::Error> {
        rms_norm::input_grad(s, x, self.value, rstd, dy, residual, dx)?;
        match self.grad {
            Some(dw) => rms_norm::weight_grad(s, x, rstd, dy, dw),
            None => Ok(()),
        }
    }
}

/// The parameters that this rank holds.
#[derive(Resource)]
pub struct Parameters {
    /// What each is, and its names on disk.
    pub specs: Vec<ParamSpec>,
    /// Handles, in the order of `specs`.
    pub weights: Vec<Weight>,
    by_name: BTreeMap<String, usize>,
}

impl Parameters {
    /// Allocates the parameters of `specs`; with gradients if `trainable`.
    pub fn allocate(specs: Vec<ParamSpec>, memory: &Memory, formats: &Formats, trainable: bool) -> Self {
        let by_name: BTreeMap<String, usize> =
            specs.iter().enumerate().map(|(i, spec)| (spec.name.clone(), i)).collect();
        let mut weights = Vec::with_capacity(specs.len());
        for (index, spec) in specs.iter().enumerate() {
            let dtype = spec.kind.dtype(formats.compute);
            let bias = spec.name.strip_suffix(".weight").map(|stem| format!("{stem}.bias"));
            let has_bias = bias.is_some_and(|bias| by_name.contains_key(&bias));
            let fp8 = formats.fp8_of(spec).filter(|_| !has_bias);
            // Generation multiplies this one into queries and outputs, in the high format.
            let needs_value = spec.name.ends_with(".kv_b_proj.weight");
            let fp8 = fp8.map(|fp8| Fp8Weight::alloc(memory, &spec.shape, (trainable, needs_value), fp8.scaling));
            let value = weights::alloc_value(memory, dtype, &spec.shape, fp8);
            let summed = if fp8.is_some() { DType::F32 } else { dtype };
            let grad = (trainable && spec.kind.is_trained()).then(|| memory.alloc(summed, &spec.shape));
            weights.push(Weight { index, value, grad, fp8 });
        }
        Parameters { specs, weights, by_name }
    }

    /// The parameter called `name`.
    ///
    /// # Panics
    /// If the configuration has no such parameter: the name was made from the same configuration.
    pub fn get(&self, name: &str) -> Weight {
        self.find(name).unwrap_or_else(|| panic!("the model has no parameter `{name}`"))
    }

    /// The parameter called `name`, if this rank holds it.
    pub fn find(&self, name: &str) -> Option<Weight> {
        self.by_name.get(name).map(|&index| self.weights[index])
    }

    /// Spec and handles, in order.
    pub fn iter(&self) -> impl Iterator<Item = (&ParamSpec, Weight)> {
        self.specs.iter().zip(self.weights.iter().copied())
    }
}

impl ParamKind {
    /// The type a parameter of this kind has when products are computed in `compute`. The router is always at least f32:
    /// its scores decide who works.
    pub fn dtype(self, compute: DType) -> DType {
        match (self, compute) {
            (ParamKind::ExpertBias, _) => DType::F32,
            (_, DType::F64) => DType::F64,
            (ParamKind::Gate, _) => DType::F32,
            (_, compute) => compute,
        }
    }

    /// Whether gradients move it.
    pub fn is_trained(self) -> bool {
        self != ParamKind::ExpertBias
    }

    /// Whether weight decay and Muon apply: matrices, and not vectors.
    pub fn is_matrix(self) -> bool {
        !matches!(self, ParamKind::Norm | ParamKind::Bias | ParamKind::ExpertBias)
    }
}

/// A decoder layer; its parts are components beside this one.
#[derive(Component, Clone, Copy, Debug)]
pub struct Layer {
    /// Position, MTP modules counted on from the last layer.
    pub index: usize,
}

/// What the layers are run between.
#[derive(Resource, Clone, Debug)]
pub struct Model {
    /// Shapes and formulas.
    pub config: ModelConfig,
    /// Decoder layers that this rank holds, by number.
    pub layers: BTreeMap<usize, Entity>,
    /// MTP modules in order, on the rank of the last stage.
    pub mtp: Vec<MtpModule>,
    /// Embedding [v, d], where it is looked up.
    pub embedding: Option<Weight>,
    /// Final norm \[d\], on the rank of the last stage.
    pub norm: Option<Weight>,
    /// Head [v, d], on the rank of the last stage; the embedding when tied.
    pub head: Option<Weight>,
    /// Type of activations.
    pub compute: DType,
}

impl Model {
    /// The entity of decoder layer `index`.
    ///
    /// # Errors
    /// If another rank holds it.
    pub fn layer(&self, index: usize) -> Result<Entity> {
        self.layers.get(&index).copied().ok_or_else(|| format!("layer {index} is on another rank").into())
    }

    /// All decoder layers that this rank holds, those of MTP modules last.
    pub fn all_layers(&self) -> impl Iterator<Item = Entity> {
        self.layers.values().copied().chain(self.mtp.iter().map(|module| module.layer))
    }
}

/// Draws every weight from a normal distribution of standard deviation `initializer_range`; norms are 1, biases 0.
///
/// Each parameter has a stream of its own, named by its place in the list of the whole model, so that its values do not depend on
/// the others, nor on which rank holds it.
pub fn initial_values(spec: &ParamSpec, config: &ModelConfig, seed: u64) -> Vec<f32> {
    let len = spec.num_elements();
    match spec.kind {
        ParamKind::Norm => vec![1.0; len],
        ParamKind::Bias | ParamKind::ExpertBias => vec![0.0; len],
        _ => {
            let mut rng = ChaCha8Rng::seed_from_u64(seed);
            rng.set_stream(spec.index as u64 + 1);
            let end = spec.start + len;
            let mut values = Vec::with_capacity(end + 1);
            while values.len() < end {
                // Box and Muller: two uniform numbers give two normal ones.
                let radius = (-2.0 * (1.0 - rng.random::<f64>()).ln()).sqrt() * config.initializer_range;
                let angle = rng.random::<f64>() * std::f64::consts::TAU;
                values.extend([(radius * angle.cos()) as f32, (radius * angle.sin()) as f32]);
            }
            values.truncate(end);
            values.split_off(spec.start)
        }
    }
}

/// Writes `values` into a parameter, in whatever type it has.
pub fn upload(memory: &Memory, tensor: Tensor, values: &[f32]) {
    kernels::with_float!(tensor.dtype, T => {
        let mut out = memory.write::<T>(tensor);
        for (out, &x) in out.iter_mut().zip(values) {
            *out = <T as kernels::dtype::Float>::of_f64(f64::from(x));
        }
    });
}

/// Reads a parameter as f32.
pub fn download(memory: &Memory, tensor: Tensor) -> Vec<f32> {
    kernels::with_float!(tensor.dtype, T => {
        memory.read::<T>(tensor).iter().map(|x| kernels::dtype::Float::as_f64(*x) as f32).collect()
    })
}

/// Spawns the stages, layers and experts that `layout` gives this rank over allocated parameters, as parts of the entity `rank`,
/// and returns the model.
pub fn spawn(
    world: &mut World,
    config: &ModelConfig,
    layout: &Layout,
    parameters: &Parameters,
    compute: DType,
    rank: Entity,
) -> Model {
    let mut layers = BTreeMap::new();
    let mut last_stage = None;
    for &index in layout.my_stages() {
        let stage = world.spawn((Stage { index }, Name::new(format!("stage {index}")), ChildOf(rank))).id();
        for layer in layout.stages[index as usize].clone() {
            layers.insert(layer, spawn_layer(world, config, layout, parameters, (layer, stage)));
        }
        if index + 1 == layout.num_stages() {
            last_stage = Some(stage);
        }
    }
    let num_layers = config.num_hidden_layers;
    let mtp_layers = if layout.has_last() { num_layers..num_layers + config.num_nextn_predict_layers } else { 0..0 };
    let mtp = mtp_layers
        .map(|i| MtpModule {
            enorm: parameters.get(&format!("model.layers.{i}.enorm.weight")),
            hnorm: parameters.get(&format!("model.layers.{i}.hnorm.weight")),
            eh_proj: parameters.get(&format!("model.layers.{i}.eh_proj.weight")),
            layer: spawn_layer(world, config, layout, parameters, (i, last_stage.unwrap_or(rank))),
            norm: parameters.get(&format!("model.layers.{i}.shared_head.norm.weight")),
        })
        .collect();
    let embedding = parameters.find("model.embed_tokens.weight");
    let head = if config.tie_word_embeddings { embedding } else { parameters.find("lm_head.weight") };
    let norm = parameters.find("model.norm.weight");
    let head = head.filter(|_| layout.has_last());
    Model { config: config.clone(), layers, mtp, embedding, norm, head, compute }
}

fn spawn_layer(
    world: &mut World,
    config: &ModelConfig,
    layout: &Layout,
    parameters: &Parameters,
    (index, stage): (usize, Entity),
) -> Entity {
    let get = |name: &str| parameters.get(&format!("model.layers.{index}.{name}"));
    let mut layer = world.spawn((Layer { index }, Name::new(format!("layer {index}")), ChildOf(stage)));
    match config.attention {
        Attention::Mla { q_lora_rank, .. } => layer.insert(Mla {
            norm: get("input_layernorm.weight"),
            query: match q_lora_rank {
                None => MlaQuery::Full(get("self_attn.q_proj.weight")),
                Some(_) => MlaQuery::LowRank {
                    down: get("self_attn.q_a_proj.weight"),
                    norm: get("self_attn.q_a_layernorm.weight"),
                    up: get("self_attn.q_b_proj.weight"),
                },
            },
            kv_down: get("self_attn.kv_a_proj_with_mqa.weight"),
            kv_norm: get("self_attn.kv_a_layernorm.weight"),
            kv_up: get("self_attn.kv_b_proj.weight"),
            out: get("self_attn.o_proj.weight"),
        }),
        Attention::Gqa { attention_bias, .. } => {
            let bias = |name: &str| attention_bias.then(|| get(name));
            layer.insert(Gqa {
                norm: get("input_layernorm.weight"),
                query: (get("self_attn.q_proj.weight"), bias("self_attn.q_proj.bias")),
                key: (get("self_attn.k_proj.weight"), bias("self_attn.k_proj.bias")),
                value: (get("self_attn.v_proj.weight"), bias("self_attn.v_proj.bias")),
                out: get("self_attn.o_proj.weight"),
            })
        }
    };
    let Some(moe) = config.moe.as_ref().filter(|_| config.is_moe_layer(index)) else {
        layer.insert(Dense {
            norm: get("post_attention_layernorm.weight"),
            gate_up: get("mlp.gate_up_proj"),
            down: get("mlp.down_proj.weight"),
        });
        return layer.id();
    };
    layer.insert(Moe {
        norm: get("post_attention_layernorm.weight"),
        gate: get("mlp.gate.weight"),
        bias: moe.correction_bias.then(|| get("mlp.gate.e_score_correction_bias")),
        experts_gate_up: get("mlp.experts.gate_up_proj"),
        experts_down: get("mlp.experts.down_proj"),
        shared: (moe.n_shared_experts > 0)
            .then(|| (get("mlp.shared_experts.gate_up_proj"), get("mlp.shared_experts.down_proj.weight"))),
    });
    let layer = layer.id();
    world.spawn_batch(layout.my_experts(moe.n_routed_experts).map(move |expert| {
        let key = ExpertKey { layer: index as u16, expert: expert as u16 };
        (key, Name::new(format!("expert {expert}")), ChildOf(layer))
    }));
    layer
}
