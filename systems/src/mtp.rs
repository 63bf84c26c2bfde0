//! Multi-token prediction (DeepSeek-V3 report, section 2.2): module k joins the hidden state at a position with the embedding
//! of the token k places on, runs a layer of its own, and predicts the token after that, through the main head.
//!
//! eh_proj takes the normed embedding first and the normed hidden state second, as the released weights do (the report's
//! Equation 21 has them the other way round). The first module is given the state after the final norm, which is what
//! serving engines feed the released module; each next one the state of the module before.
//!
//! Legend: t tokens, d model width.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    ops::{elementwise, rms_norm},
    tensor::Tensor,
};

use crate::{
    linear::{Rows, Workspace},
    lower::Lowering,
    model::Weight,
};

/// F of joining embedding and hidden state.
pub const JOIN_F: TaskKind = TaskKind("mtp_join_forward");
/// I of the join.
pub const JOIN_I: TaskKind = TaskKind("mtp_join_input_grad");
/// W of the join.
pub const JOIN_W: TaskKind = TaskKind("mtp_join_weight_grad");

/// Weights of one module, and its layer.
#[derive(Clone, Copy, Debug)]
pub struct MtpModule {
    /// Norm of the embedding \[d\].
    pub enorm: Weight,
    /// Norm of the hidden state \[d\].
    pub hnorm: Weight,
    /// Both, side by side, back to the model width [d, 2d].
    pub eh_proj: Weight,
    /// The decoder layer.
    pub layer: Entity,
    /// Norm in front of the shared head \[d\].
    pub norm: Weight,
}

/// What F leaves for the other passes.
#[derive(Clone, Copy, Debug)]
pub struct JoinActivations {
    embedded: Tensor,
    hidden: Tensor,
    normed: [Tensor; 2],
    rstd: [Tensor; 2],
    joined: Tensor,
    /// Output [t, d].
    pub out: Tensor,
}

/// What I leaves for W.
#[derive(Clone, Copy, Debug)]
pub struct JoinGradients {
    d_out: Tensor,
    d_joined: Tensor,
    d_normed: [Tensor; 2],
    /// Gradient of the embedding [t, d].
    pub d_embedded: Tensor,
    /// Gradient of the hidden state [t, d].
    pub d_hidden: Tensor,
}

#[derive(Component, Clone, Copy)]
pub(crate) struct JoinTask {
    module: MtpModule,
    eps: f64,
    acts: JoinActivations,
    grads: Option<JoinGradients>,
    room: Option<Workspace>,
}

impl MtpModule {
    /// Emits F of the join.
    pub fn lower_forward(&self, l: &mut Lowering, embedded: Tensor, hidden: Tensor) -> Result<JoinActivations> {
        let (t, d) = (hidden.dim(0), hidden.dim(1));
        let acts = JoinActivations {
            embedded,
            hidden,
            normed: [(); 2].map(|()| l.alloc("mtp normed", &[t, d])),
            rstd: [(); 2].map(|()| l.alloc("mtp rstd", &[t])),
            joined: l.alloc("mtp joined", &[t, 2 * d]),
            out: l.alloc("mtp in", &[t, d]),
        };
        self.emit(l, JOIN_F, Pass::Forward, acts, None)?;
        Ok(acts)
    }

    /// Emits I of the join.
    pub fn lower_input_grad(&self, l: &mut Lowering, acts: JoinActivations, d_out: Tensor) -> Result<JoinGradients> {
        let grads = JoinGradients {
            d_out,
            d_joined: l.alloc_like("d mtp joined", acts.joined),
            d_normed: [(); 2].map(|()| l.alloc_like("d mtp normed", acts.hidden)),
            d_embedded: l.alloc_like("d mtp embedding", acts.hidden),
            d_hidden: l.alloc_like("d mtp hidden", acts.hidden),
        };
        self.emit(l, JOIN_I, Pass::InputGrad, acts, Some(grads))?;
        Ok(grads)
    }

    /// Emits W of the join.
    pub fn lower_weight_grad(&self, l: &mut Lowering, acts: JoinActivations, grads: JoinGradients) -> Result<()> {
        self.emit(l, JOIN_W, Pass::WeightGrad, acts, Some(grads))
    }

    fn emit(
        &self,
        l: &mut Lowering,
        kind: TaskKind,
        pass: Pass,
        acts: JoinActivations,
        grads: Option<JoinGradients>,
    ) -> Result<()> {
        let room = l.alloc_workspace(pass, &[(self.eh_proj, acts.hidden.dim(0))]);
        l.task(kind, pass, JoinTask { module: *self, eps: l.eps, acts, grads, room })?;
        l.release_workspace(room);
        Ok(())
    }
}

impl JoinTask {
    /// The two halves: input, norm, and where its columns begin.
    fn halves(&self) -> [(usize, Tensor, Weight); 2] {
        [(0, self.acts.embedded, self.module.enorm), (1, self.acts.hidden, self.module.hnorm)]
    }
}

pub(crate) fn join_forward(In(id): In<Entity>, mut launch: Launch<JoinTask>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let (a, d) = (&task.acts, task.acts.hidden.dim(1));
    for (i, x, norm) in task.halves() {
        rms_norm::forward(s, x, norm.value, a.normed[i], a.rstd[i], task.eps)?;
        elementwise::copy_columns(s, (a.normed[i], 0), (a.joined, i * d), d, false)?;
    }
    task.module.eh_proj.forward(s, Rows::High(a.joined), task.room, None, a.out)
}

pub(crate) fn join_input_grad(In(id): In<Entity>, mut launch: Launch<JoinTask>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let (a, d) = (&task.acts, task.acts.hidden.dim(1));
    let Some(g) = task.grads else { return Ok(()) };
    task.module.eh_proj.input_grad(s, g.d_out, task.room, g.d_joined, false)?;
    for (i, x, norm) in task.halves() {
        elementwise::copy_columns(s, (g.d_joined, i * d), (g.d_normed[i], 0), d, false)?;
        let dx = [g.d_embedded, g.d_hidden][i];
        norm.norm_grads(s, x, a.rstd[i], g.d_normed[i], None, dx)?;
    }
    Ok(())
}

pub(crate) fn join_weight_grad(In(id): In<Entity>, mut launch: Launch<JoinTask>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let Some(g) = task.grads else { return Ok(()) };
    task.module.eh_proj.weight_grad(s, g.d_out, Rows::High(task.acts.joined), task.room)
}
