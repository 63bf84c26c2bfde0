//! The end of the model: final norm, head and cross-entropy. The loss is where gradients start, so a training forward makes
//! the head's gradients at once, while the logits of a chunk are in cache; the full logits never exist.
//!
//! Legend: t tokens, d model width, v vocabulary.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    dtype::DType,
    memory::Memory,
    ops::{cross_entropy, elementwise, gemm, norm, rms_norm},
    tensor::Tensor,
};

use crate::{lower::Lowering, model::Weight};

/// F of a norm in front of a head.
pub const NORM_F: TaskKind = TaskKind("norm_forward");
/// I and W of that norm.
pub const NORM_B: TaskKind = TaskKind("norm_backward");
/// Head and loss; with gradients when training.
pub const HEAD_F: TaskKind = TaskKind("head_forward");
/// Head's logits, for generation and `eval --logits`.
pub const LOGITS_F: TaskKind = TaskKind("logits_forward");

/// What the loss of a step is divided by and weighed with; set by Admit, read at launch.
#[derive(Resource, Clone, Copy, Debug, Default)]
pub struct LossScale {
    /// 1 / target tokens of the whole step.
    pub main: f64,
    /// The same for each MTP module, times its weight.
    pub mtp: f64,
}

/// Losses of each microbatch of a step, f64 \[1\] each, in nats; zeroed by the step's first task. They are kept apart, so that their
/// sum does not depend on which rank has which microbatch.
#[derive(Resource, Clone, Debug)]
pub struct LossSums(pub Vec<MicrobatchLosses>);

/// Losses of one microbatch.
#[derive(Clone, Debug)]
pub struct MicrobatchLosses {
    /// Next-token loss.
    pub main: Tensor,
    /// Loss of each MTP module.
    pub mtp: Vec<Tensor>,
}

impl LossSums {
    /// Zeroed sums of `num_microbatches` microbatches.
    pub fn allocate(memory: &Memory, num_microbatches: usize, num_mtp: usize) -> Self {
        let sum = || memory.from_slice(&[1], &[0f64]);
        let losses = |_| MicrobatchLosses { main: sum(), mtp: (0..num_mtp).map(|_| sum()).collect() };
        LossSums((0..num_microbatches).map(losses).collect())
    }

    /// All of them.
    pub fn tensors(&self) -> impl Iterator<Item = Tensor> {
        self.0.iter().flat_map(|losses| std::iter::once(losses.main).chain(losses.mtp.iter().copied()))
    }
}

/// Norm activations.
#[derive(Clone, Copy, Debug)]
pub struct NormActivations {
    x: Tensor,
    rstd: Tensor,
    /// Output [t, d].
    pub out: Tensor,
}

#[derive(Component, Clone, Copy)]
pub(crate) struct NormTask {
    weight: Weight,
    eps: f64,
    acts: NormActivations,
    grads: Option<(Tensor, Tensor)>,
}

/// Emits F of a norm.
pub fn lower_norm(l: &mut Lowering, weight: Weight, x: Tensor) -> Result<NormActivations> {
    let acts = NormActivations { x, rstd: l.alloc("norm rstd", &[x.dim(0)]), out: l.alloc_like("normed", x) };
    l.task(NORM_F, Pass::Forward, NormTask { weight, eps: l.eps, acts, grads: None })?;
    Ok(acts)
}

/// Emits I and W of a norm: the gradient of its input from that of its output.
pub fn lower_norm_backward(l: &mut Lowering, weight: Weight, acts: NormActivations, dy: Tensor) -> Result<Tensor> {
    let dx = l.alloc_like("d norm in", acts.x);
    l.task(NORM_B, Pass::InputGrad, NormTask { weight, eps: l.eps, acts, grads: Some((dy, dx)) })?;
    Ok(dx)
}

pub(crate) fn norm_forward(In(id): In<Entity>, mut launch: Launch<NormTask>) -> Result {
    let (_, &NormTask { weight, eps, acts, .. }, s) = launch.get(id)?;
    Ok(rms_norm::forward(s, acts.x, weight.value, acts.out, acts.rstd, eps)?)
}

pub(crate) fn norm_backward(In(id): In<Entity>, mut launch: Launch<NormTask>) -> Result {
    let (_, &NormTask { weight, acts, grads, .. }, s) = launch.get(id)?;
    let Some((dy, dx)) = grads else { return Ok(()) };
    Ok(weight.norm_grads(s, acts.x, acts.rstd, dy, None, dx)?)
}

/// Which of a step's losses.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Loss {
    /// Next token.
    Main,
    /// MTP module k.
    Mtp(usize),
}

#[derive(Component, Clone, Copy)]
pub(crate) struct HeadTask {
    loss: Loss,
    weight: Weight,
    h: Tensor,
    targets: Tensor,
    nll: Tensor,
    sum: Tensor,
    dh: Option<Tensor>,
}

/// Emits head and loss on normed `h` [t, d]; returns the gradient of `h` when training.
pub fn lower_head(l: &mut Lowering, loss: Loss, weight: Weight, h: Tensor, targets: Tensor) -> Result<Option<Tensor>> {
    let losses = &l.world.resource::<LossSums>().0[l.microbatch.unwrap_or(0) as usize];
    let sum = match loss {
        Loss::Main => losses.main,
        Loss::Mtp(k) => losses.mtp[k],
    };
    let nll = l.alloc_acc("loss", &[h.dim(0)]);
    let dh = l.training.then(|| l.alloc_like("d head in", h));
    l.task(HEAD_F, Pass::Forward, HeadTask { loss, weight, h, targets, nll, sum, dh })?;
    Ok(dh)
}

pub(crate) fn head_forward(In(id): In<Entity>, mut launch: Launch<HeadTask>, scale: Option<Res<LossScale>>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let scale = scale.map_or(LossScale::default(), |s| *s);
    let scale = if task.loss == Loss::Main { scale.main } else { scale.mtp };
    let dw = task.dh.and(task.weight.grad);
    let passes = cross_entropy::Passes { nll: Some(task.nll), dh: task.dh, dw };
    cross_entropy::run(s, task.h, task.weight.value, task.targets, scale, passes)?;
    Ok(norm::sum_acc(s, task.nll, task.sum)?)
}

#[derive(Component, Clone, Copy)]
pub(crate) struct LogitsTask {
    weight: Weight,
    h: Tensor,
    logits: Tensor,
    wide: Tensor,
}

/// Emits the logits of normed `h` [n, d] -> f32 or f64 [n, v].
pub fn lower_logits(l: &mut Lowering, weight: Weight, h: Tensor) -> Result<Tensor> {
    let dims = [h.dim(0), weight.value.dim(0)];
    let logits = l.alloc("logits", &dims);
    let wide = if l.compute == DType::Bf16 { l.alloc_acc("logits", &dims) } else { logits };
    l.task(LOGITS_F, Pass::Forward, LogitsTask { weight, h, logits, wide })?;
    Ok(wide)
}

pub(crate) fn logits_forward(In(id): In<Entity>, mut launch: Launch<LogitsTask>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    gemm::forward(s, task.h, task.weight.value, None, task.logits)?;
    if task.wide.buffer != task.logits.buffer {
        elementwise::copy(s, task.logits, task.wide)?;
    }
    Ok(())
}
