//! The optimizer as the last tasks of a step: the gradient's norm over all parameters, then one update task per layer.
//!
//! A gradient that is not finite changes nothing: the update ops look at the norm on the device, and Record reports it.

use std::{collections::BTreeMap, sync::Arc};

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
    lower::Lowering,
    model::Parameters,
    params::{ParamKind, ParamSpec},
    routing::ExpertCounts,
    scene::{AdamW, Optimizer},
};

/// Sets gradients, losses and counts to zero.
pub const ZERO: TaskKind = TaskKind("zero_gradients");
/// Squared norm of all gradients.
pub const GRAD_NORM: TaskKind = TaskKind("gradient_norm");
/// Updates a group of parameters.
pub const UPDATE: TaskKind = TaskKind("optimizer_update");

/// State of one parameter's optimizer.
#[derive(Clone, Debug)]
pub enum Slot {
    /// First and second moment.
    AdamW {
        /// Like the parameter, at least f32.
        m: Tensor,
        /// Like the parameter, at least f32.
        v: Tensor,
    },
    /// Momentum.
    Muon {
        /// Like the parameter, at least f32.
        m: Tensor,
        /// Rows and columns of each matrix in the packed parameter.
        matrices: Arc<[(usize, usize)]>,
    },
}

/// State of the optimizer.
#[derive(Resource)]
pub struct OptimizerState {
    /// What to do.
    pub optimizer: Optimizer,
    /// Per parameter: master weight, if the weight itself is not it, and state. `None` where nothing is trained.
    pub slots: Vec<Option<(Option<Tensor>, Slot)>>,
    /// Squared norm of the whole gradient, f64 \[1\].
    pub sum_squares: Tensor,
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
    /// Allocates zeroed state for `parameters`; masters start as the weights.
    pub fn allocate(optimizer: Optimizer, parameters: &Parameters, memory: &Memory) -> Self {
        let slot = |(spec, weight): (&ParamSpec, crate::model::Weight)| {
            weight.grad?;
            let wide = if weight.value.dtype == DType::F64 { DType::F64 } else { DType::F32 };
            let state = || {
                let tensor = memory.alloc(wide, &spec.shape);
                zero_now(memory, tensor);
                tensor
            };
            let master = (weight.value.dtype != wide).then(|| {
                let tensor = memory.alloc(wide, &spec.shape);
                if memory.device() != kernels::device::Device::Meta {
                    crate::model::upload(memory, tensor, &crate::model::download(memory, weight.value));
                }
                tensor
            });
            let slot = match optimizer {
                Optimizer::Muon(_) if uses_muon(spec.kind) => Slot::Muon { m: state(), matrices: matrices(spec) },
                _ => Slot::AdamW { m: state(), v: state() },
            };
            Some((master, slot))
        };
        let slots = parameters.iter().map(slot).collect();
        let sum_squares = memory.from_slice(&[1], &[0f64]);
        OptimizerState { optimizer, slots, sum_squares }
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

/// Sets the sums of losses to zero at once; the streams must be idle.
pub fn zero_losses(memory: &Memory, sums: &LossSums) {
    for sum in std::iter::once(sums.main).chain(sums.mtp.iter().copied()) {
        zero_now(memory, sum);
    }
}

/// Muon is for the matrices between the embedding and the head; the router keeps AdamW, since its rows are experts.
fn uses_muon(kind: ParamKind) -> bool {
    matches!(kind, ParamKind::Linear | ParamKind::ExpertLinear)
}

fn matrices(spec: &ParamSpec) -> Arc<[(usize, usize)]> {
    spec.views.iter().map(|v| (v.shape[0], v.shape[1])).collect()
}

#[derive(Component, Clone, Copy)]
pub(crate) struct WholeTask;

#[derive(Component, Clone)]
pub(crate) struct UpdateTask(Vec<usize>);

/// Emits what a step starts with.
pub fn lower_zero(l: &mut Lowering) -> Result<()> {
    l.task(ZERO, None, WholeTask)
}

/// Emits norm and updates.
pub fn lower_update(l: &mut Lowering) -> Result<()> {
    l.task(GRAD_NORM, None, WholeTask)?;
    let mut groups: BTreeMap<Option<usize>, Vec<usize>> = BTreeMap::new();
    for (spec, weight) in l.world.resource::<Parameters>().iter() {
        if weight.grad.is_some() {
            groups.entry(spec.layer).or_default().push(weight.index);
        }
    }
    for (layer, group) in groups {
        l.layer = layer.map(|i| i as u32);
        l.task(UPDATE, None, UpdateTask(group))?;
    }
    l.layer = None;
    Ok(())
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
    let sums = sums.iter().flat_map(|sums| std::iter::once(sums.main).chain(sums.mtp.iter().copied()));
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
    for grad in parameters.weights.iter().filter_map(|w| w.grad) {
        norm::sum_squares_acc(s, grad, state.sum_squares)?;
    }
    Ok(())
}

pub(crate) fn optimizer_update(
    In(id): In<Entity>,
    mut launch: Launch<UpdateTask>,
    parameters: Res<Parameters>,
    state: Res<OptimizerState>,
    scalars: Res<UpdateScalars>,
) -> Result {
    let (_, group, s) = launch.get(id)?;
    for &index in &group.0 {
        let (spec, weight) = (&parameters.specs[index], parameters.weights[index]);
        let (Some(grad), Some((master, slot))) = (weight.grad, &state.slots[index]) else { continue };
        let decays = |weight_decay: f64| if spec.kind.is_matrix() { weight_decay } else { 0.0 };
        let (master, rounded) = (master.unwrap_or(weight.value), master.map(|_| weight.value));
        match (slot, &state.optimizer) {
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
