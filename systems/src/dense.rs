//! A dense feed-forward layer: x + down(swiglu(gate_up(norm(x)))).
//!
//! Legend: t tokens, d model width, f feed-forward width.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    ops::{elementwise, gemm, rms_norm, swiglu},
    tensor::Tensor,
};

use crate::{
    lower::{Lowering, Saved},
    model::Weight,
};

/// F of a dense feed-forward layer.
pub const MLP_F: TaskKind = TaskKind("mlp_forward");
/// I of a dense feed-forward layer.
pub const MLP_I: TaskKind = TaskKind("mlp_input_grad");
/// W of a dense feed-forward layer.
pub const MLP_W: TaskKind = TaskKind("mlp_weight_grad");

/// Weights of a dense feed-forward layer.
#[derive(Component, Clone, Copy, Debug)]
pub struct Dense {
    /// post_attention_layernorm \[d\].
    pub norm: Weight,
    /// Gate and up projection side by side [2f, d].
    pub gate_up: Weight,
    /// Down projection [d, f].
    pub down: Weight,
}

/// What F leaves for the other passes.
#[derive(Clone, Copy, Debug)]
pub struct DenseActivations {
    x: Tensor,
    rstd: Tensor,
    normed: Tensor,
    h: Tensor,
    a: Tensor,
    /// Output [t, d].
    pub out: Tensor,
}

/// What I leaves for W.
#[derive(Clone, Copy, Debug)]
pub struct DenseGradients {
    d_out: Tensor,
    da: Tensor,
    dh: Tensor,
    d_normed: Tensor,
    /// Gradient of the input [t, d].
    pub dx: Tensor,
}

#[derive(Component, Clone, Copy)]
pub(crate) struct MlpTask {
    dense: Dense,
    eps: f64,
    acts: DenseActivations,
    grads: Option<DenseGradients>,
    /// Compute the norm's and the activation's output again.
    recompute: (bool, bool),
}

impl Dense {
    /// Emits F.
    pub fn lower_forward(&self, l: &mut Lowering, x: Tensor) -> Result<DenseActivations> {
        let (t, d, f) = (x.dim(0), x.dim(1), self.down.value.dim(1));
        let acts = DenseActivations {
            x,
            rstd: l.alloc("mlp rstd", &[t]),
            normed: l.alloc("mlp normed", &[t, d]),
            h: l.alloc("mlp gate_up", &[t, 2 * f]),
            a: l.alloc("mlp swiglu", &[t, f]),
            out: l.alloc("mlp out", &[t, d]),
        };
        l.task(
            MLP_F,
            Pass::Forward,
            MlpTask { dense: *self, eps: l.eps, acts, grads: None, recompute: (false, false) },
        )?;
        l.drop_recomputable(Saved::Norm, acts.normed);
        l.drop_recomputable(Saved::Swiglu, acts.a);
        Ok(acts)
    }

    /// Emits I; returns the activations too, since some may be computed again.
    pub fn lower_input_grad(
        &self,
        l: &mut Lowering,
        mut acts: DenseActivations,
        d_out: Tensor,
    ) -> Result<(DenseActivations, DenseGradients)> {
        acts.normed = l.alloc_again(Saved::Norm, acts.normed);
        acts.a = l.alloc_again(Saved::Swiglu, acts.a);
        let (t, d, f) = (acts.x.dim(0), acts.x.dim(1), self.down.value.dim(1));
        let grads = DenseGradients {
            d_out,
            da: l.alloc("mlp d swiglu", &[t, f]),
            dh: l.alloc("mlp d gate_up", &[t, 2 * f]),
            d_normed: l.alloc("mlp d normed", &[t, d]),
            dx: l.alloc("mlp d in", &[t, d]),
        };
        let recompute = (l.recomputes(Saved::Norm), l.recomputes(Saved::Swiglu));
        l.task(MLP_I, Pass::InputGrad, MlpTask { dense: *self, eps: l.eps, acts, grads: Some(grads), recompute })?;
        Ok((acts, grads))
    }

    /// Emits W.
    pub fn lower_weight_grad(&self, l: &mut Lowering, acts: DenseActivations, grads: DenseGradients) -> Result<()> {
        let recompute = (false, false);
        l.task(MLP_W, Pass::WeightGrad, MlpTask { dense: *self, eps: l.eps, acts, grads: Some(grads), recompute })
    }
}

pub(crate) fn mlp_forward(In(id): In<Entity>, mut launch: Launch<MlpTask>) -> Result {
    let (_, &MlpTask { dense, eps, acts, .. }, s) = launch.get(id)?;
    rms_norm::forward(s, acts.x, dense.norm.value, acts.normed, acts.rstd, eps)?;
    gemm::forward(s, acts.normed, dense.gate_up.value, None, acts.h)?;
    swiglu::forward(s, acts.h, acts.a)?;
    elementwise::copy(s, acts.x, acts.out)?;
    gemm::forward_acc(s, acts.a, dense.down.value, acts.out)?;
    Ok(())
}

pub(crate) fn mlp_input_grad(In(id): In<Entity>, mut launch: Launch<MlpTask>) -> Result {
    let (_, &MlpTask { dense, eps, acts, grads, recompute: (norm, activation) }, s) = launch.get(id)?;
    let Some(g) = grads else { return Ok(()) };
    if norm {
        rms_norm::forward(s, acts.x, dense.norm.value, acts.normed, acts.rstd, eps)?;
    }
    if activation {
        swiglu::forward(s, acts.h, acts.a)?;
    }
    gemm::input_grad(s, g.d_out, dense.down.value, g.da, false)?;
    swiglu::input_grad(s, acts.h, g.da, g.dh)?;
    gemm::input_grad(s, g.dh, dense.gate_up.value, g.d_normed, false)?;
    elementwise::copy(s, g.d_out, g.dx)?;
    Ok(dense.norm.norm_grads(s, acts.x, acts.rstd, g.d_normed, g.dx, true)?)
}

pub(crate) fn mlp_weight_grad(In(id): In<Entity>, mut launch: Launch<MlpTask>) -> Result {
    let (_, &MlpTask { dense, acts, grads, .. }, s) = launch.get(id)?;
    let (Some(g), Some(d_down), Some(d_gate_up)) = (grads, dense.down.grad, dense.gate_up.grad) else { return Ok(()) };
    gemm::weight_grad(s, g.d_out, acts.a, d_down, None)?;
    gemm::weight_grad(s, g.dh, acts.normed, d_gate_up, None)?;
    Ok(())
}
