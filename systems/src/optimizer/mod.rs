//! The optimizer as the last tasks of a step: the gradient's norm over all parameters, then one update task per layer.
//!
//! Where several ranks hold a parameter, each has its part of the moments (ZeRO-1, arXiv 1910.02054): gradients are summed into
//! the part's owner, who updates it and shows it to the others.
//!
//! A gradient that is not finite changes nothing: the update ops look at the norm on the device, and Record reports it.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    dtype::DType,
    memory::Memory,
    ops::{adamw, elementwise, muon, norm},
    tensor::Tensor,
};

use crate::{
    head::LossSums,
    layout::Layout,
    lower::Lowering,
    model::{Model, Parameters},
    model_config::ModelConfig,
    params::{ParamKind, ParamSpec},
    ranks::Ranks,
    rounding,
    routing::ExpertCounts,
    scene::{AdamW, Optimizer},
};

/// Sets gradients, losses and counts to zero.
pub const ZERO: TaskKind = TaskKind("zero_gradients");
/// Squared norm of all gradients.
pub const GRAD_NORM: TaskKind = TaskKind("gradient_norm");
/// Sums gradients over the ranks that hold a parameter.
pub const REDUCE: TaskKind = TaskKind("reduce_gradients");
/// Sums loads over the ranks that hold a layer.
pub const REDUCE_COUNTS: TaskKind = TaskKind("reduce_counts");
/// Sums the squared norm over all ranks.
pub const REDUCE_NORM: TaskKind = TaskKind("reduce_norm");
/// Shows updated weights to the ranks that hold them too.
pub const GATHER: TaskKind = TaskKind("gather_weights");
/// Updates a group of parameters.
pub const UPDATE: TaskKind = TaskKind("optimizer_update");
/// Makes the copies in 8 bits of updated weights.
pub const QUANTIZE: TaskKind = TaskKind("quantize_weights");

/// State of one parameter's optimizer, for this rank's part of it.
#[derive(Clone, Debug)]
pub enum Slot {
    /// First and second moment.
    AdamW {
        /// In the type of moments.
        m: Tensor,
        /// In the type of moments.
        v: Tensor,
    },
    /// Momentum.
    Muon {
        /// At least f32.
        m: Tensor,
        /// Rows and columns of each matrix in the part.
        matrices: Arc<[(usize, usize)]>,
    },
}

/// A parameter's optimizer state, and who has which part of it (ZeRO-1): each holder of the parameter updates its own.
#[derive(Clone, Debug)]
pub struct Shard {
    /// Master weight, if the weight itself is not it.
    pub master: Option<Tensor>,
    /// Moments.
    pub slot: Slot,
    /// Ranks that hold the parameter, ascending.
    pub group: Arc<[u32]>,
    /// Elements of each.
    pub parts: Arc<[Range<usize>]>,
    /// Elements of this rank.
    pub mine: Range<usize>,
}

/// State of the optimizer.
#[derive(Resource)]
pub struct OptimizerState {
    /// What to do.
    pub optimizer: Optimizer,
    /// Per parameter; `None` where nothing is trained.
    pub shards: Vec<Option<Shard>>,
    /// Squared norm of the whole gradient, f64 \[1\].
    pub sum_squares: Tensor,
    /// All ranks.
    world: Arc<[u32]>,
}

impl Shard {
    /// This rank's part of a tensor that is like the parameter.
    pub fn part_of(&self, tensor: Tensor) -> Tensor {
        tensor.slice(self.mine.start, self.mine.len())
    }
}

/// What changes from step to step; set by Admit, read at launch.
#[derive(Resource, Clone, Copy, Debug, Default)]
pub struct UpdateScalars {
    /// Learning rate of this step.
    pub lr: f64,
    /// Number of this update, from 1.
    pub update: u64,
    /// Clip the gradient's norm to this; infinite for never.
    pub max_grad_norm: f64,
}

impl OptimizerState {
    /// Allocates zeroed state for this rank's parts of `parameters`; masters start as the weights.
    pub fn allocate(
        (optimizer, moments): (Optimizer, DType),
        parameters: &Parameters,
        config: &ModelConfig,
        layout: &Layout,
        memory: &Memory,
    ) -> Self {
        let shard = |(spec, weight): (&ParamSpec, crate::model::Weight)| {
            weight.grad?;
            let group = layout.holders(config, spec);
            let muon = uses_muon(&optimizer, spec.kind);
            let parts = if muon { by_matrix(spec, group.len()) } else { evenly(spec.num_elements(), group.len()) };
            let mine = parts[group.iter().position(|&rank| rank == layout.rank)?].clone();
            let wide = if weight.value.dtype == DType::F64 { DType::F64 } else { DType::F32 };
            let state = |dtype| {
                let tensor = memory.alloc(dtype, &[mine.len()]);
                zero_now(memory, tensor);
                tensor
            };
            let master = (weight.value.dtype != wide).then(|| {
                let tensor = memory.alloc(wide, &[mine.len()]);
                if memory.device() != kernels::device::Device::Meta {
                    let part = weight.value.slice(mine.start, mine.len());
                    crate::model::upload(memory, tensor, &crate::model::download(memory, part));
                }
                tensor
            });
            let slot = if muon {
                Slot::Muon { m: state(wide), matrices: matrices_in(spec, &mine) }
            } else {
                Slot::AdamW { m: state(moments), v: state(moments) }
            };
            Some(Shard { master, slot, group, parts, mine })
        };
        let shards = parameters.iter().map(shard).collect();
        let sum_squares = memory.from_slice(&[1], &[0f64]);
        OptimizerState { optimizer, shards, sum_squares, world: (0..layout.mesh.num_ranks()).collect() }
    }

    /// Whether parameters of `kind` are under Muon.
    pub fn uses_muon(&self, kind: ParamKind) -> bool {
        uses_muon(&self.optimizer, kind)
    }

    /// Bytes of masters and moments on this rank.
    pub fn num_bytes(&self) -> u64 {
        let bytes = |shard: &Shard| {
            let moments = match &shard.slot {
                Slot::AdamW { m, v } => m.size_bytes() + v.size_bytes(),
                Slot::Muon { m, .. } => m.size_bytes(),
            };
            moments + shard.master.map_or(0, |master| master.size_bytes())
        };
        self.shards.iter().flatten().map(bytes).sum()
    }

    fn adamw(&self) -> &AdamW {
        match &self.optimizer {
            Optimizer::AdamW(adamw) => adamw,
            Optimizer::Muon(muon) => &muon.adamw,
        }
    }
}

fn zero_now(memory: &Memory, tensor: Tensor) {
    if memory.device() != kernels::device::Device::Meta {
        kernels::with_float!(tensor.dtype, T => memory.write::<T>(tensor).fill(<T as kernels::dtype::Float>::of_f64(0.0)));
    }
}

/// `len` elements in `n` parts of equal length up to one.
fn evenly(len: usize, n: usize) -> Arc<[Range<usize>]> {
    (0..n).map(|i| len * i / n..len * (i + 1) / n).collect()
}

/// The matrices of a packed parameter in `n` runs of equal number up to one: Muon needs each as a whole.
fn by_matrix(spec: &ParamSpec, n: usize) -> Arc<[Range<usize>]> {
    let at = |view: usize| spec.views.get(view).map_or(spec.num_elements(), |view| view.offset);
    evenly(spec.views.len(), n).iter().map(|views| at(views.start)..at(views.end)).collect()
}

/// Sets the sums of losses to zero at once; the streams must be idle.
pub fn zero_losses(memory: &Memory, sums: &LossSums) {
    sums.tensors().for_each(|sum| zero_now(memory, sum));
}

/// Muon is for the matrices between the embedding and the head; the router keeps AdamW, since its rows are experts.
fn uses_muon(optimizer: &Optimizer, kind: ParamKind) -> bool {
    matches!(optimizer, Optimizer::Muon(_)) && matches!(kind, ParamKind::Linear | ParamKind::ExpertLinear)
}

fn matrices_in(spec: &ParamSpec, part: &Range<usize>) -> Arc<[(usize, usize)]> {
    spec.views.iter().filter(|v| part.contains(&v.offset)).map(|v| (v.shape[0], v.shape[1])).collect()
}

#[derive(Component, Clone, Copy)]
pub(crate) struct WholeTask;

#[derive(Component, Clone)]
pub(crate) struct GroupTask(Vec<usize>);

/// Emits what a step starts with.
pub fn lower_zero(l: &mut Lowering) -> Result<()> {
    l.task(ZERO, None, WholeTask)
}

/// Emits all that follows the last gradient: sums over the holders of a parameter, norm, updates, the new weights' way to
/// the other holders, and their copies in 8 bits.
pub fn lower_update(l: &mut Lowering) -> Result<()> {
    let mut groups: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
    for (spec, weight) in l.world.resource::<Parameters>().iter() {
        if weight.grad.is_some() {
            groups.entry(spec.layer).or_default().push(weight.index);
        }
    }
    // Layers whose gradients are ready first come first: those of the last stage's end.
    for (layer, group) in groups.iter().rev() {
        l.layer = layer.map(|i| i as u32);
        let group = shared_of(l, group);
        if !group.is_empty() {
            l.transfer(REDUCE, None, GroupTask(group))?;
        }
    }
    l.layer = None;
    if !l.layout.is_solo() {
        l.transfer(REDUCE_COUNTS, None, WholeTask)?;
    }
    l.task(GRAD_NORM, None, WholeTask)?;
    if !l.layout.is_solo() {
        l.transfer(REDUCE_NORM, None, WholeTask)?;
    }
    l.gate();
    for (layer, group) in groups {
        l.layer = layer.map(|i| i as u32);
        l.task(UPDATE, None, GroupTask(group.clone()))?;
        let narrow = lower_show(l, &group)?;
        if !narrow.is_empty() {
            rounding::lower_count(l, &narrow)?;
        }
    }
    l.layer = None;
    Ok(())
}

/// Those of `group` that several ranks hold.
fn shared_of(l: &Lowering, group: &[usize]) -> Vec<usize> {
    let shards = &l.world.resource::<OptimizerState>().shards;
    let is_shared = |index: &usize| shards[*index].as_ref().is_some_and(|shard| shard.group.len() > 1);
    group.iter().copied().filter(is_shared).collect()
}

/// Emits the way of weights whose parts have changed to the other holders, and their copies in 8 bits; returns those that have such.
pub(crate) fn lower_show(l: &mut Lowering, group: &[usize]) -> Result<Vec<usize>> {
    let shared = shared_of(l, group);
    let weights = &l.world.resource::<Parameters>().weights;
    let narrow: Vec<usize> = group.iter().copied().filter(|&index| weights[index].fp8.is_some()).collect();
    if !shared.is_empty() {
        l.transfer(GATHER, None, GroupTask(shared))?;
    }
    if !narrow.is_empty() {
        l.task(QUANTIZE, None, GroupTask(narrow.clone()))?;
    }
    Ok(narrow)
}

/// Names a collective over the holders of parameter `index`.
pub(crate) fn tag(kind: u64, index: usize) -> u64 {
    1 << 62 | kind << 32 | index as u64
}

pub(crate) fn reduce_gradients(
    In(id): In<Entity>,
    mut launch: Launch<GroupTask>,
    parameters: Res<Parameters>,
    state: Res<OptimizerState>,
    ranks: Res<Ranks>,
) -> Result {
    let (_, group, s) = launch.get(id)?;
    for &index in &group.0 {
        if let (Some(grad), Some(shard)) = (parameters.weights[index].grad, &state.shards[index]) {
            let tag = tag(1, parameters.specs[index].index);
            ranks.comm.reduce_scatter_sum(s, &shard.group, grad, shard.parts.clone(), tag)?;
        }
    }
    Ok(())
}

pub(crate) fn gather_weights(
    In(id): In<Entity>,
    mut launch: Launch<GroupTask>,
    parameters: Res<Parameters>,
    state: Res<OptimizerState>,
    ranks: Res<Ranks>,
) -> Result {
    let (_, group, s) = launch.get(id)?;
    for &index in &group.0 {
        if let Some(shard) = &state.shards[index] {
            let tag = tag(2, parameters.specs[index].index);
            ranks.comm.all_gather(s, &shard.group, parameters.weights[index].value, shard.parts.clone(), tag)?;
        }
    }
    Ok(())
}

/// Loads are counted where tokens are, and balanced where experts are chosen: on all ranks alike.
pub(crate) fn reduce_counts(
    In(id): In<Entity>,
    mut launch: Launch<WholeTask>,
    counts: Res<ExpertCounts>,
    parameters: Res<Parameters>,
    (ranks, model): (Res<Ranks>, Res<Model>),
) -> Result {
    let (.., s) = launch.get(id)?;
    for (layer, counts) in &counts.0 {
        let gate = format!("model.layers.{layer}.mlp.gate.weight");
        let Some(spec) = parameters.specs.iter().find(|spec| spec.name == gate) else { continue };
        let group = ranks.layout.holders(&model.config, spec);
        if group.len() > 1 {
            ranks.comm.all_reduce_sum(s, &group, *counts, tag(3, *layer))?;
        }
    }
    Ok(())
}

pub(crate) fn reduce_norm(
    In(id): In<Entity>,
    mut launch: Launch<WholeTask>,
    state: Res<OptimizerState>,
    ranks: Res<Ranks>,
) -> Result {
    let (.., s) = launch.get(id)?;
    Ok(ranks.comm.all_reduce_sum(s, &state.world, state.sum_squares, tag(4, 0))?)
}

pub(crate) fn zero_gradients(
    In(id): In<Entity>,
    mut launch: Launch<WholeTask>,
    parameters: Res<Parameters>,
    sums: Option<Res<LossSums>>,
    counts: Option<Res<ExpertCounts>>,
) -> Result {
    let (.., s) = launch.get(id)?;
    let grads = parameters.weights.iter().filter_map(|w| w.grad);
    let sums = sums.iter().flat_map(|sums| sums.tensors());
    let counts = counts.iter().flat_map(|c| c.0.iter().map(|(_, counts)| *counts));
    for tensor in grads.chain(sums).chain(counts) {
        elementwise::zero(s, tensor);
    }
    Ok(())
}

pub(crate) fn gradient_norm(
    In(id): In<Entity>,
    mut launch: Launch<WholeTask>,
    parameters: Res<Parameters>,
    state: Res<OptimizerState>,
) -> Result {
    let (.., s) = launch.get(id)?;
    elementwise::zero(s, state.sum_squares);
    for (weight, shard) in parameters.weights.iter().zip(&state.shards) {
        if let (Some(grad), Some(shard)) = (weight.grad, shard) {
            norm::sum_squares_acc(s, shard.part_of(grad), state.sum_squares)?;
        }
    }
    Ok(())
}

pub(crate) fn quantize_weights(
    In(id): In<Entity>,
    mut launch: Launch<GroupTask>,
    parameters: Res<Parameters>,
) -> Result {
    let (_, group, s) = launch.get(id)?;
    for &index in &group.0 {
        parameters.weights[index].quantize(s)?;
    }
    Ok(())
}

pub(crate) fn optimizer_update(
    In(id): In<Entity>,
    mut launch: Launch<GroupTask>,
    parameters: Res<Parameters>,
    state: Res<OptimizerState>,
    scalars: Res<UpdateScalars>,
) -> Result {
    let (_, group, s) = launch.get(id)?;
    for &index in &group.0 {
        let (spec, weight) = (&parameters.specs[index], parameters.weights[index]);
        let (Some(grad), Some(shard)) = (weight.grad, &state.shards[index]) else { continue };
        let (grad, value, master) = (shard.part_of(grad), shard.part_of(weight.value), shard.master);
        let decays = |weight_decay: f64| if spec.kind.is_matrix() { weight_decay } else { 0.0 };
        let (master, rounded) = (master.unwrap_or(value), master.map(|_| value));
        match (&shard.slot, &state.optimizer) {
            (Slot::Muon { m, matrices }, Optimizer::Muon(muon)) => {
                let hyper = muon::Muon {
                    lr: scalars.lr * muon.lr_multiplier,
                    momentum: muon.momentum,
                    nesterov: muon.nesterov,
                    ns_steps: muon.ns_steps,
                    weight_decay: muon.weight_decay,
                    max_grad_norm: scalars.max_grad_norm,
                };
                let slots = muon::Slots { master, grad, m: *m, weight: rounded };
                muon::update(s, hyper, slots, matrices.clone(), state.sum_squares)?;
            }
            (Slot::AdamW { m, v }, _) => {
                let a = state.adamw();
                let hyper = adamw::AdamW {
                    lr: scalars.lr,
                    beta1: a.beta1,
                    beta2: a.beta2,
                    eps: a.eps,
                    weight_decay: decays(a.weight_decay),
                    step: scalars.update,
                    max_grad_norm: scalars.max_grad_norm,
                };
                let slots = adamw::Slots { master, grad, m: *m, v: *v, weight: rounded };
                adamw::update(s, hyper, slots, state.sum_squares)?;
            }
            (Slot::Muon { .. }, Optimizer::AdamW(_)) => {
                return Err(format!("`{}` has Muon state under AdamW", spec.name).into());
            }
        }
    }
    Ok(())
}
