//! Routing: which experts see a token, and in which order its copies lie. Where all experts are on one rank, the copies are made
//! at once: dispatch is a permutation then. Else they are sent ([`crate::dispatch`]).
//!
//! Balance is kept without an auxiliary loss (arXiv 2408.15664): a bias that only chooses, and never weighs, moves by a fixed
//! step after each optimizer step, down where an expert had more than the mean load and up where less. Loads are counted once
//! a token: forward tasks that repeat others for recomputation do not count.
//!
//! Legend: t tokens, d model width, e routed experts, k experts a token.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    dtype::DType,
    memory::Memory,
    ops::{
        balance::{self, SequenceLoss},
        elementwise,
        gate::{self, Gate},
        gemm, permute, rms_norm,
    },
    stream::Stream,
    tensor::Tensor,
};

use crate::{
    expert::Moe,
    layout::Layout,
    linear::Rows,
    lower::{Lowering, Saved},
    microbatch::Inputs,
    model::Model,
    model_config::{self, ModelConfig},
    ranks::Ranks,
    scene::RoutingMode,
};

/// F of routing: norm, scores, choice, permutation.
pub const ROUTE_F: TaskKind = TaskKind("route_forward");
/// I of routing.
pub const ROUTE_I: TaskKind = TaskKind("route_input_grad");
/// W of routing.
pub const ROUTE_W: TaskKind = TaskKind("route_weight_grad");
/// Moves the correction bias after a step.
pub const BIAS_UPDATE: TaskKind = TaskKind("bias_update");

/// What of routing changes from step to step, or between runs; read at launch.
#[derive(Resource, Clone, Debug)]
pub struct RoutingState {
    /// Who chooses.
    pub mode: RoutingMode,
    /// Step of the bias (gamma) now.
    pub bias_speed: f64,
    /// Weight of the sequence-wise auxiliary loss.
    pub sequence_aux_loss: f64,
    /// Weight of the z-loss.
    pub z_loss: f64,
    /// Optimizer step, for random choice.
    pub step: u64,
    /// Microbatches of the step: auxiliary losses are averaged over them.
    pub num_microbatches: usize,
    /// Seed of random choice.
    pub seed: u64,
}

impl Default for RoutingState {
    fn default() -> Self {
        RoutingState {
            mode: RoutingMode::Learned,
            bias_speed: 0.0,
            sequence_aux_loss: 0.0,
            z_loss: 0.0,
            step: 0,
            num_microbatches: 1,
            seed: 0,
        }
    }
}

/// Tokens per expert of the step, u32 \[e\] for each layer with experts on this rank: `(layer, counts)`. Until the end of a step
/// they are of this rank's tokens, then of all.
#[derive(Resource, Clone, Debug, Default)]
pub struct ExpertCounts(pub Vec<(usize, Tensor)>);

impl ExpertCounts {
    /// Zero counts of `config`'s layers that are on this rank.
    pub fn allocate(config: &ModelConfig, layout: &Layout, memory: &Memory) -> Self {
        let Some(moe) = &config.moe else { return ExpertCounts::default() };
        let layers = 0..config.num_hidden_layers + config.num_nextn_predict_layers;
        let is_here = |i: usize| config.is_moe_layer(i) && layout.my_stages().contains(&layout.stage_of_layer(i));
        let moe_layers = layers.filter(|&i| is_here(i));
        let zeros = vec![0u32; moe.n_routed_experts];
        ExpertCounts(moe_layers.map(|i| (i, memory.from_slice(&[zeros.len()], &zeros))).collect())
    }

    fn of(&self, layer: usize) -> Option<Tensor> {
        self.0.iter().find(|(i, _)| *i == layer).map(|(_, counts)| *counts)
    }
}

/// A model's router: its gate, and how many experts there are and are chosen.
#[derive(Clone, Copy, Debug)]
pub struct Router {
    gate: Gate,
    num_experts: usize,
    top_k: usize,
}

impl Router {
    /// Routed experts of a layer, on all ranks.
    pub fn num_experts(&self) -> usize {
        self.num_experts
    }

    /// The router of a model's layers.
    pub fn new(moe: &model_config::Moe) -> Self {
        let groups = gate::Groups {
            num: moe.n_group,
            keep: moe.topk_group,
            score: match moe.group_score {
                model_config::GroupScore::Top2Sum => gate::GroupScore::Top2Sum,
                model_config::GroupScore::Max => gate::GroupScore::Max,
            },
        };
        let gate = Gate {
            score: match moe.scoring_func {
                model_config::ScoringFunc::Sigmoid => gate::Score::Sigmoid,
                model_config::ScoringFunc::Softmax => gate::Score::Softmax,
            },
            groups: (moe.n_group > 1).then_some(groups),
            norm_topk_prob: moe.norm_topk_prob,
            routed_scaling_factor: moe.routed_scaling_factor,
            mode: gate::Mode::Learned,
        };
        Router { gate, num_experts: moe.n_routed_experts, top_k: moe.num_experts_per_tok }
    }
}

/// What F leaves for dispatch, combine and the other passes.
#[derive(Clone, Copy, Debug)]
pub struct RouteActivations {
    /// Input of the feed-forward half [t, d].
    pub x: Tensor,
    rstd: Tensor,
    /// Normed input [t, d].
    pub normed: Tensor,
    /// The same in the router's type.
    wide: Tensor,
    logits: Tensor,
    chosen: gate::Outputs,
    total: Option<Tensor>,
    /// Where each token's copies lie.
    pub order: permute::Order,
    /// Tokens in expert order [t k, d], where all experts are on this rank.
    pub rows: Option<Rows>,
}

impl RouteActivations {
    /// Whether the router's backward pass reads the norm's output itself, and not a copy in its own type.
    pub fn reads_normed(&self) -> bool {
        self.wide.buffer == self.normed.buffer
    }

    /// Weight of each chosen expert [t, k].
    pub fn weights(&self) -> Tensor {
        self.chosen.weights
    }

    /// t k.
    pub fn num_rows(&self) -> usize {
        self.order.row_of_slot.len()
    }

    /// The chosen experts, u32 [t, k].
    pub fn chosen(&self) -> Tensor {
        self.chosen.indices
    }
}

/// What I leaves for W.
#[derive(Clone, Copy, Debug)]
pub struct RouteGradients {
    /// Gradient of the block's output [t, d].
    pub d_out: Tensor,
    /// Gradient of the rows [t k, d], from the experts.
    pub d_rows: Tensor,
    /// Gradient of the weights [t, k], from combine.
    pub d_weights: Tensor,
    /// Gradient of the normed input through the shared experts [t, d], if any.
    pub d_shared: Option<Tensor>,
    /// Gradient of the scores [t, e], from the sequence-wise auxiliary loss, if that is on.
    d_scores: Option<Tensor>,
    d_logits: Tensor,
    narrow: Tensor,
    d_normed: Tensor,
    /// Gradient of the input [t, d].
    pub dx: Tensor,
}

#[derive(Component, Clone, Copy)]
pub(crate) struct RouteTask {
    moe: Moe,
    gate: Gate,
    inputs: Inputs,
    eps: f64,
    repeating: bool,
    acts: RouteActivations,
    grads: Option<RouteGradients>,
}

impl RouteActivations {
    /// Gives back what the norm makes again, if the backward pass is to do that.
    pub fn drop_norm(&self, l: &mut Lowering) {
        l.drop_recomputable(Saved::Norm, self.normed);
        if self.wide.buffer != self.normed.buffer {
            l.drop_recomputable(Saved::Norm, self.wide);
        }
    }

    /// With room for what [`RouteActivations::drop_norm`] gave back.
    pub fn with_norm_again(mut self, l: &mut Lowering) -> Self {
        let is_one = self.wide.buffer == self.normed.buffer;
        self.normed = l.alloc_again(Saved::Norm, self.normed);
        self.wide = if is_one { self.normed } else { l.alloc_again(Saved::Norm, self.wide) };
        self
    }

    /// The norm, and its output in the router's type.
    pub(crate) fn norm(&self, s: &mut Stream, weight: Tensor, eps: f64) -> Result {
        rms_norm::forward(s, self.x, weight, self.normed, self.rstd, eps)?;
        if self.wide.buffer != self.normed.buffer {
            elementwise::copy(s, self.normed, self.wide)?;
        }
        Ok(())
    }
}

impl Moe {
    fn route_task(
        &self,
        l: &Lowering,
        router: Router,
        acts: RouteActivations,
        grads: Option<RouteGradients>,
    ) -> RouteTask {
        RouteTask { moe: *self, gate: router.gate, inputs: l.inputs, eps: l.eps, repeating: l.repeating, acts, grads }
    }

    /// Emits F of routing.
    pub fn lower_route(&self, l: &mut Lowering, layer: usize, router: Router, x: Tensor) -> Result<RouteActivations> {
        let (t, d) = (x.dim(0), x.dim(1));
        let (e, k) = (router.num_experts, router.top_k);
        let normed = l.alloc("mlp normed", &[t, d]);
        let total = l.world.get_resource::<ExpertCounts>().and_then(|c| c.of(layer));
        let acts = RouteActivations {
            x,
            rstd: l.alloc("mlp rstd", &[t]),
            normed,
            wide: if l.compute == self.gate.value.dtype { normed } else { l.alloc_acc("router in", &[t, d]) },
            logits: l.alloc_acc("router logits", &[t, e]),
            chosen: gate::Outputs {
                scores: l.alloc_acc("router scores", &[t, e]),
                indices: l.alloc_as("chosen experts", DType::U32, &[t, k]),
                weights: l.alloc_acc("expert weights", &[t, k]),
                counts: l.alloc_as("tokens per expert", DType::U32, &[e]),
            },
            total,
            order: permute::Order {
                offsets: l.alloc_as("expert offsets", DType::U32, &[e + 1]),
                row_of_slot: l.alloc_as("row of slot", DType::U32, &[t * k]),
                token_of_row: l.alloc_as("token of row", DType::U32, &[t * k]),
            },
            rows: l.has_all_experts().then(|| l.alloc_rows("expert rows", self.experts_gate_up, [t * k, d])),
        };
        let task = self.route_task(l, router, acts, None);
        l.task(ROUTE_F, Pass::Forward, task)?;
        Ok(acts)
    }

    /// Emits I of routing; `grads` of rows, weights and shared experts are there already.
    pub fn lower_route_input_grad(
        &self,
        l: &mut Lowering,
        router: Router,
        acts: RouteActivations,
        (d_out, d_rows, d_weights, d_shared): (Tensor, Tensor, Tensor, Option<Tensor>),
    ) -> Result<RouteGradients> {
        let d_logits = l.alloc_like("d router logits", acts.logits);
        let balanced = l.world.get_resource::<RoutingState>().is_some_and(|r| r.sequence_aux_loss > 0.0);
        let grads = RouteGradients {
            d_out,
            d_rows,
            d_weights,
            d_shared,
            d_scores: balanced.then(|| l.alloc_like("d router scores", acts.logits)),
            d_logits,
            narrow: if acts.wide.buffer == acts.normed.buffer {
                d_logits
            } else {
                l.alloc_like("d router in", acts.wide)
            },
            d_normed: l.alloc_like("d mlp normed", acts.x),
            dx: l.alloc_like("d mlp in", acts.x),
        };
        let task = self.route_task(l, router, acts, Some(grads));
        l.task(ROUTE_I, Pass::InputGrad, task)?;
        Ok(grads)
    }

    /// Emits W of routing.
    pub fn lower_route_weight_grad(
        &self,
        l: &mut Lowering,
        router: Router,
        acts: RouteActivations,
        grads: RouteGradients,
    ) -> Result<()> {
        let task = self.route_task(l, router, acts, Some(grads));
        l.task(ROUTE_W, Pass::WeightGrad, task)
    }
}

fn mode(state: &RoutingState, ranks: &Ranks, task: &Task) -> gate::Mode {
    match state.mode {
        RoutingMode::Learned => gate::Mode::Learned,
        RoutingMode::Forced => gate::Mode::Forced,
        RoutingMode::Random => {
            let place = u64::from(task.layer.unwrap_or(0)) << 32
                | u64::from(ranks.global_microbatch(task.microbatch.unwrap_or(0)));
            gate::Mode::Random { seed: state.seed ^ place.wrapping_mul(0x9e37_79b9_7f4a_7c15), step: state.step }
        }
    }
}

pub(crate) fn route_forward(
    In(id): In<Entity>,
    mut launch: Launch<RouteTask>,
    state: Res<RoutingState>,
    ranks: Res<Ranks>,
) -> Result {
    let (task, &RouteTask { moe, gate, eps, repeating, acts, .. }, s) = launch.get(id)?;
    let gate = Gate { mode: mode(&state, &ranks, task), ..gate };
    acts.norm(s, moe.norm.value, eps)?;
    gemm::forward(s, acts.wide, moe.gate.value, None, acts.logits)?;
    let bias = moe.bias.map(|b| b.value);
    gate::forward(s, gate, acts.logits, bias, acts.chosen)?;
    permute::sort(s, acts.chosen.indices, acts.order)?;
    if let Some(rows) = acts.rows {
        rows.permute(s, acts.normed, acts.order)?;
    }
    if let (false, Some(total)) = (repeating, acts.total) {
        balance::accumulate_counts(s, acts.chosen.counts, total)?;
    }
    Ok(())
}

pub(crate) fn route_input_grad(
    In(id): In<Entity>,
    mut launch: Launch<RouteTask>,
    state: Res<RoutingState>,
    ranks: Res<Ranks>,
) -> Result {
    let (task, &RouteTask { moe, gate, inputs, acts, grads, .. }, s) = launch.get(id)?;
    let gate = Gate { mode: mode(&state, &ranks, task), ..gate };
    let Some(g) = grads else { return Ok(()) };
    let scale = 1.0 / state.num_microbatches as f64;
    let gate::Outputs { scores, indices, .. } = acts.chosen;
    if let Some(d_scores) = g.d_scores {
        let loss = SequenceLoss { alpha: state.sequence_aux_loss, row_len: inputs.seq_len };
        balance::sequence_loss_grad(s, loss, scale, scores, indices, d_scores)?;
    }
    gate::input_grad(s, gate, scores, indices, g.d_weights, g.d_scores, g.d_logits)?;
    if state.z_loss > 0.0 {
        balance::z_loss_grad_acc(s, state.z_loss, scale, acts.logits, g.d_logits)?;
    }
    permute::permute_grad(s, g.d_rows, acts.order, g.d_normed, false)?;
    if let Some(d_shared) = g.d_shared {
        elementwise::add_acc(s, d_shared, g.d_normed)?;
    }
    if g.narrow.buffer == g.d_logits.buffer {
        gemm::input_grad(s, g.d_logits, moe.gate.value, g.d_normed, true)?;
    } else {
        gemm::input_grad(s, g.d_logits, moe.gate.value, g.narrow, false)?;
        elementwise::add_acc(s, g.narrow, g.d_normed)?;
    }
    Ok(moe.norm.norm_grads(s, acts.x, acts.rstd, g.d_normed, Some(g.d_out), g.dx)?)
}

pub(crate) fn route_weight_grad(In(id): In<Entity>, mut launch: Launch<RouteTask>) -> Result {
    let (_, &RouteTask { moe, acts, grads, .. }, s) = launch.get(id)?;
    let (Some(g), Some(d_gate)) = (grads, moe.gate.grad) else { return Ok(()) };
    Ok(gemm::weight_grad(s, g.d_logits, acts.wide, d_gate, None)?)
}

#[derive(Component, Clone, Copy)]
pub(crate) struct BiasTask {
    counts: Tensor,
    bias: Tensor,
}

/// Emits the bias updates that end a step.
pub fn lower_bias_updates(l: &mut Lowering) -> Result<()> {
    let Some(counts) = l.world.get_resource::<ExpertCounts>().cloned() else { return Ok(()) };
    let layers: Vec<Entity> = l.world.resource::<Model>().all_layers().collect();
    for entity in layers {
        let index = l.world.get::<crate::model::Layer>(entity).map_or(0, |layer| layer.index);
        let bias = l.world.get::<Moe>(entity).and_then(|moe| moe.bias);
        if let (Some(bias), Some(counts)) = (bias, counts.of(index)) {
            l.layer = Some(index as u32);
            l.task(BIAS_UPDATE, None, BiasTask { counts, bias: bias.value })?;
        }
    }
    l.layer = None;
    Ok(())
}

pub(crate) fn bias_update(In(id): In<Entity>, mut launch: Launch<BiasTask>, state: Res<RoutingState>) -> Result {
    let (_, &BiasTask { counts, bias }, s) = launch.get(id)?;
    if state.bias_speed > 0.0 {
        balance::bias_update(s, counts, state.bias_speed as f32, bias)?;
    }
    Ok(())
}
