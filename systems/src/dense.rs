//! A dense feed-forward layer: x + down(swiglu(gate_up(norm(x)))).
//!
//! Legend: t tokens, d model width, f feed-forward width.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{ops::swiglu, tensor::Tensor};

use crate::{
    linear::{NarrowInput, Rows, Workspace},
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
    normed: Rows,
    h: Tensor,
    /// `h` in 8 bits, if it waits as that for the backward pass.
    kept: Option<NarrowInput>,
    a: Rows,
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
    room: Option<Workspace>,
}

impl Dense {
    /// Emits F.
    pub fn lower_forward(&self, l: &mut Lowering, x: Tensor) -> Result<DenseActivations> {
        let (t, d, f) = (x.dim(0), x.dim(1), self.down.value.dim(1));
        let acts = DenseActivations {
            x,
            rstd: l.alloc("mlp rstd", &[t]),
            normed: l.alloc_rows("mlp normed", self.gate_up, [t, d]),
            h: l.alloc("mlp gate_up", &[t, 2 * f]),
            kept: l.alloc_narrow_swiglu(self.gate_up, [t, 2 * f]),
            a: l.alloc_rows("mlp swiglu", self.down, [t, f]),
            out: l.alloc("mlp out", &[t, d]),
        };
        l.task(
            MLP_F,
            Pass::Forward,
            MlpTask { dense: *self, eps: l.eps, acts, grads: None, recompute: (false, false), room: None },
        )?;
        l.drop_recomputable_rows(Saved::Norm, acts.normed);
        l.drop_swiglu(acts.kept, acts.h, acts.a);
        Ok(acts)
    }

    /// Emits I; returns the activations too, since some may be computed again.
    pub fn lower_input_grad(
        &self,
        l: &mut Lowering,
        mut acts: DenseActivations,
        d_out: Tensor,
    ) -> Result<(DenseActivations, DenseGradients)> {
        acts.normed = l.alloc_rows_again(Saved::Norm, acts.normed);
        (acts.h, acts.a) = l.alloc_swiglu_again(acts.kept, acts.h, acts.a);
        let (t, d, f) = (acts.x.dim(0), acts.x.dim(1), self.down.value.dim(1));
        let grads = DenseGradients {
            d_out,
            da: l.alloc("mlp d swiglu", &[t, f]),
            dh: l.alloc("mlp d gate_up", &[t, 2 * f]),
            d_normed: l.alloc("mlp d normed", &[t, d]),
            dx: l.alloc("mlp d in", &[t, d]),
        };
        let recompute = (l.recomputes(Saved::Norm), l.recomputes(Saved::Swiglu));
        let room = l.alloc_workspace(Pass::InputGrad, &[(self.gate_up, t), (self.down, t)]);
        let task = MlpTask { dense: *self, eps: l.eps, acts, grads: Some(grads), recompute, room };
        l.task(MLP_I, Pass::InputGrad, task)?;
        l.release_workspace(room);
        Ok((acts, grads))
    }

    /// Emits W.
    pub fn lower_weight_grad(&self, l: &mut Lowering, acts: DenseActivations, grads: DenseGradients) -> Result<()> {
        let t = acts.x.dim(0);
        let room = l.alloc_workspace(Pass::WeightGrad, &[(self.gate_up, t), (self.down, t)]);
        let recompute = (false, false);
        let task = MlpTask { dense: *self, eps: l.eps, acts, grads: Some(grads), recompute, room };
        l.task(MLP_W, Pass::WeightGrad, task)?;
        l.release_workspace(room);
        Ok(())
    }
}

pub(crate) fn mlp_forward(In(id): In<Entity>, mut launch: Launch<MlpTask>) -> Result {
    let (_, &MlpTask { dense, eps, acts, .. }, s) = launch.get(id)?;
    acts.normed.norm(s, acts.x, dense.norm.value, acts.rstd, eps)?;
    dense.gate_up.forward(s, acts.normed, None, None, acts.h)?;
    acts.a.swiglu(s, acts.h, acts.kept)?;
    dense.down.forward_onto(s, acts.a, None, acts.x, acts.out)
}

pub(crate) fn mlp_input_grad(In(id): In<Entity>, mut launch: Launch<MlpTask>) -> Result {
    let (_, &MlpTask { dense, eps, acts, grads, recompute: (norm, activation), room }, s) = launch.get(id)?;
    let Some(g) = grads else { return Ok(()) };
    if norm {
        acts.normed.norm(s, acts.x, dense.norm.value, acts.rstd, eps)?;
    }
    acts.a.swiglu_again(s, acts.h, acts.kept, activation)?;
    dense.down.input_grad(s, g.d_out, room, g.da, false)?;
    swiglu::input_grad(s, acts.h, g.da, g.dh)?;
    dense.gate_up.input_grad(s, g.dh, room, g.d_normed, false)?;
    Ok(dense.norm.norm_grads(s, acts.x, acts.rstd, g.d_normed, Some(g.d_out), g.dx)?)
}

pub(crate) fn mlp_weight_grad(In(id): In<Entity>, mut launch: Launch<MlpTask>) -> Result {
    let (_, &MlpTask { dense, acts, grads, room, .. }, s) = launch.get(id)?;
    let Some(g) = grads else { return Ok(()) };
    dense.down.weight_grad(s, g.d_out, acts.a, room)?;
    dense.gate_up.weight_grad(s, g.dh, acts.normed, room)
}
