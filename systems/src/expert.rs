//! Experts: the routed ones as grouped products over ragged groups of rows, the shared ones as one dense SwiGLU, and combine.
//!
//! Each step of a pass is emitted by itself, so that a pipeline can put others between: the rows of one microbatch are on their
//! way while the experts work on another's.
//!
//! Legend: t tokens, d model width, e routed experts on this rank, k experts a token, n rows that may arrive, f expert width, s
//! width of the shared experts together.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    ops::{elementwise, gemm, grouped_gemm, permute, swiglu},
    tensor::Tensor,
};

use crate::{
    dispatch::{self, Arrived},
    lower::{Lowering, Saved},
    model::Weight,
    routing::RouteActivations,
};

/// F of the experts.
pub const EXPERTS_F: TaskKind = TaskKind("experts_forward");
/// I of the experts.
pub const EXPERTS_I: TaskKind = TaskKind("experts_input_grad");
/// W of the experts.
pub const EXPERTS_W: TaskKind = TaskKind("experts_weight_grad");
/// F of combine.
pub const COMBINE_F: TaskKind = TaskKind("combine_forward");
/// I of combine.
pub const COMBINE_I: TaskKind = TaskKind("combine_input_grad");

/// A routed expert: an entity, so that its load can be seen and its replicas placed.
#[derive(Component, Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[require(ExpertLoad)]
pub struct ExpertKey {
    /// Layer.
    pub layer: u16,
    /// Number in the layer.
    pub expert: u16,
}

/// Tokens that chose an expert in the last step.
#[derive(Component, Clone, Copy, Debug, Default)]
pub struct ExpertLoad(pub u32);

/// Weights of a mixture-of-experts layer.
#[derive(Component, Clone, Copy, Debug)]
pub struct Moe {
    /// post_attention_layernorm \[d\].
    pub norm: Weight,
    /// Router [all experts, d].
    pub gate: Weight,
    /// Correction bias \[all experts\], if the router has one.
    pub bias: Option<Weight>,
    /// Gate and up projections of the routed experts [e, 2f, d].
    pub experts_gate_up: Weight,
    /// Down projections [e, d, f].
    pub experts_down: Weight,
    /// Gate and up [2s, d] and down [d, s] of the shared experts.
    pub shared: Option<(Weight, Weight)>,
}

#[derive(Clone, Copy, Debug)]
struct SharedActivations {
    gate_up: Weight,
    down: Weight,
    h: Tensor,
    a: Tensor,
}

/// What F leaves for the other passes.
#[derive(Clone, Copy, Debug)]
pub struct ExpertActivations {
    /// What routing left.
    pub route: RouteActivations,
    /// Rows that came to this rank's experts.
    pub arrived: Arrived,
    h: Tensor,
    a: Tensor,
    /// Outputs of this rank's experts, as their rows.
    y: Tensor,
    /// Outputs for this rank's tokens [t k, d]: `y` itself where all experts are here.
    returned: Tensor,
    shared: Option<SharedActivations>,
    /// Output [t, d].
    pub out: Tensor,
}

/// What I leaves for W.
#[derive(Clone, Copy, Debug)]
pub struct ExpertGradients {
    d_out: Tensor,
    /// Gradient of `returned`.
    d_returned: Tensor,
    /// Gradient of `y`.
    dy: Tensor,
    d_weights: Tensor,
    dh: Tensor,
    /// Gradient of the arrived rows.
    d_arrived: Tensor,
    /// Gradient of the rows that this rank sent [t k, d].
    d_rows: Tensor,
    shared: Option<SharedGradients>,
}

#[derive(Clone, Copy, Debug)]
struct SharedGradients {
    da: Tensor,
    dh: Tensor,
    d_normed: Tensor,
}

#[derive(Component, Clone, Copy)]
pub(crate) struct ExpertTask {
    moe: Moe,
    acts: ExpertActivations,
    grads: Option<ExpertGradients>,
    /// Compute SwiGLU, and the norm with this epsilon, again.
    recompute: bool,
    norm_again: Option<f64>,
}

impl Moe {
    /// Emits F of the experts on what arrived.
    pub fn lower_experts(
        &self,
        l: &mut Lowering,
        route: RouteActivations,
        arrived: Arrived,
    ) -> Result<ExpertActivations> {
        let (t, d) = (route.x.dim(0), route.x.dim(1));
        let (n, f) = (arrived.rows.dim(0), self.experts_down.value.dim(2));
        let shared = self.shared.map(|(gate_up, down)| SharedActivations {
            gate_up,
            down,
            h: l.alloc("shared gate_up", &[t, gate_up.value.dim(0)]),
            a: l.alloc("shared swiglu", &[t, down.value.dim(1)]),
        });
        let y = l.alloc("experts out", &[n, d]);
        let acts = ExpertActivations {
            route,
            arrived,
            h: l.alloc("experts gate_up", &[n, 2 * f]),
            a: l.alloc("experts swiglu", &[n, f]),
            y,
            returned: if arrived.is_local() { y } else { l.alloc_wire("returned rows", route.num_rows(), d) },
            shared,
            out: l.alloc("mlp out", &[t, d]),
        };
        l.task(
            EXPERTS_F,
            Pass::Forward,
            ExpertTask { moe: *self, acts, grads: None, recompute: false, norm_again: None },
        )?;
        Ok(acts)
    }

    /// Emits the way back of the experts' outputs.
    pub fn lower_return(&self, l: &mut Lowering, acts: ExpertActivations) -> Result<()> {
        dispatch::lower_return(l, dispatch::RETURN_F, Pass::Forward, acts.arrived, acts.y, acts.returned)
    }

    /// Emits the weighted sum of a token's experts, onto the residual and the shared experts.
    pub fn lower_combine(&self, l: &mut Lowering, acts: ExpertActivations) -> Result<()> {
        l.task(
            COMBINE_F,
            Pass::Forward,
            ExpertTask { moe: *self, acts, grads: None, recompute: false, norm_again: None },
        )?;
        l.drop_recomputable(Saved::Swiglu, acts.a);
        if let Some(shared) = acts.shared {
            l.drop_recomputable(Saved::Swiglu, shared.a);
            l.keep_narrow(shared.h, 4);
        }
        acts.route.drop_norm(l);
        if !acts.arrived.is_local() {
            l.release(acts.y);
            // Sums of a node's outputs are for the tokens; no row is kept for the gradient of its weight, which the experts
            // that put the weight before their last product have of themselves.
            if l.reduces_on_the_way {
                l.release(acts.returned);
            }
        }
        // The inputs of products: 1 byte of 2.
        l.keep_narrow(acts.arrived.rows, 4);
        l.keep_narrow(acts.h, 4);
        Ok(())
    }

    /// Emits I of the weighted sum, and sends what it leaves to the experts.
    pub fn lower_combine_input_grad(
        &self,
        l: &mut Lowering,
        mut acts: ExpertActivations,
        d_out: Tensor,
    ) -> Result<(ExpertActivations, ExpertGradients)> {
        acts.a = l.alloc_again(Saved::Swiglu, acts.a);
        acts.route = acts.route.with_norm_again(l);
        if l.reduces_on_the_way && !acts.arrived.is_local() {
            acts.returned = l.alloc_like_wire("returned rows", acts.returned);
        }
        if let Some(shared) = &mut acts.shared {
            shared.a = l.alloc_again(Saved::Swiglu, shared.a);
        }
        let d_returned = l.alloc_like("d experts out", acts.returned);
        let d_arrived = l.alloc_like("d expert rows", acts.arrived.rows);
        let local = acts.arrived.is_local();
        let grads = ExpertGradients {
            d_out,
            d_returned,
            dy: if local { d_returned } else { l.alloc_like_wire("d experts out, sent", acts.arrived.rows) },
            d_weights: l.alloc_like("d expert weights", acts.route.weights()),
            dh: l.alloc_like("d experts gate_up", acts.h),
            d_arrived,
            d_rows: if local { d_arrived } else { l.alloc_like_wire("d expert rows, returned", acts.returned) },
            shared: acts.shared.map(|s| SharedGradients {
                da: l.alloc_like("d shared swiglu", s.a),
                dh: l.alloc_like("d shared gate_up", s.h),
                d_normed: l.alloc_like("d shared in", acts.route.normed),
            }),
        };
        l.task(COMBINE_I, Pass::InputGrad, self.task(l, acts, grads))?;
        dispatch::lower_send(l, acts.route.order, acts.arrived, grads.d_returned, grads.dy)?;
        Ok((acts, grads))
    }

    /// Emits I of the experts.
    pub fn lower_experts_input_grad(
        &self,
        l: &mut Lowering,
        acts: ExpertActivations,
        grads: ExpertGradients,
    ) -> Result<()> {
        l.task(EXPERTS_I, Pass::InputGrad, self.task(l, acts, grads))
    }

    /// Emits the way back of the rows' gradients.
    pub fn lower_return_grad(&self, l: &mut Lowering, acts: ExpertActivations, grads: ExpertGradients) -> Result<()> {
        dispatch::lower_return(l, dispatch::RETURN_I, Pass::InputGrad, acts.arrived, grads.d_arrived, grads.d_rows)
    }

    /// Emits W of the experts.
    pub fn lower_experts_weight_grad(
        &self,
        l: &mut Lowering,
        acts: ExpertActivations,
        grads: ExpertGradients,
    ) -> Result<()> {
        l.task(EXPERTS_W, Pass::WeightGrad, self.task(l, acts, grads))
    }

    fn task(&self, l: &Lowering, acts: ExpertActivations, grads: ExpertGradients) -> ExpertTask {
        let norm_again = l.recomputes(Saved::Norm).then_some(l.eps);
        ExpertTask { moe: *self, acts, grads: Some(grads), recompute: l.recomputes(Saved::Swiglu), norm_again }
    }
}

impl ExpertGradients {
    /// What routing's I takes: gradients of the output, of the sent rows, of the weights, and through the shared experts.
    pub fn for_route(&self) -> (Tensor, Tensor, Tensor, Option<Tensor>) {
        (self.d_out, self.d_rows, self.d_weights, self.shared.map(|s| s.d_normed))
    }
}

pub(crate) fn experts_forward(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { moe, acts, .. }, s) = launch.get(id)?;
    let Arrived { rows, offsets, .. } = acts.arrived;
    grouped_gemm::swiglu::forward(s, rows, offsets, moe.experts_gate_up.value, acts.h, acts.a)?;
    grouped_gemm::forward(s, acts.a, offsets, moe.experts_down.value, acts.y)?;
    if let Some(shared) = acts.shared {
        gemm::forward(s, acts.route.normed, shared.gate_up.value, None, shared.h)?;
        swiglu::forward(s, shared.h, shared.a)?;
    }
    Ok(())
}

pub(crate) fn combine_forward(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { acts, .. }, s) = launch.get(id)?;
    elementwise::copy(s, acts.route.x, acts.out)?;
    if let Some(shared) = acts.shared {
        gemm::forward_acc(s, shared.a, shared.down.value, acts.out)?;
    }
    permute::combine(s, acts.returned, acts.route.weights(), acts.route.order, acts.out, true)?;
    Ok(())
}

pub(crate) fn combine_input_grad(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { moe, acts, grads, norm_again, .. }, s) = launch.get(id)?;
    let Some(g) = grads else { return Ok(()) };
    let route = &acts.route;
    if let Some(eps) = norm_again {
        route.norm(s, moe.norm.value, eps)?;
    }
    permute::combine_grad(s, g.d_out, acts.returned, route.weights(), route.order, g.d_returned, g.d_weights)?;
    if let (Some(shared), Some(g_shared)) = (acts.shared, g.shared) {
        gemm::input_grad(s, g.d_out, shared.down.value, g_shared.da, false)?;
    }
    Ok(())
}

pub(crate) fn experts_input_grad(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { moe, acts, grads, recompute, .. }, s) = launch.get(id)?;
    let Some(g) = grads else { return Ok(()) };
    let offsets = acts.arrived.offsets;
    let again = recompute.then_some(acts.a);
    grouped_gemm::swiglu::input_grad(s, g.dy, offsets, moe.experts_down.value, acts.h, g.dh, again)?;
    grouped_gemm::input_grad(s, g.dh, offsets, moe.experts_gate_up.value, g.d_arrived)?;
    if let (Some(shared), Some(g_shared)) = (acts.shared, g.shared) {
        if recompute {
            swiglu::forward(s, shared.h, shared.a)?;
        }
        swiglu::input_grad(s, shared.h, g_shared.da, g_shared.dh)?;
        gemm::input_grad(s, g_shared.dh, shared.gate_up.value, g_shared.d_normed, false)?;
    }
    Ok(())
}

pub(crate) fn experts_weight_grad(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { moe, acts, grads, .. }, s) = launch.get(id)?;
    let (Some(g), Some(d_gate_up), Some(d_down)) = (grads, moe.experts_gate_up.grad, moe.experts_down.grad) else {
        return Ok(());
    };
    let Arrived { rows, offsets, .. } = acts.arrived;
    grouped_gemm::weight_grad(s, g.dy, acts.a, offsets, d_down)?;
    grouped_gemm::weight_grad(s, g.dh, rows, offsets, d_gate_up)?;
    if let (Some(shared), Some(g_shared)) = (acts.shared, g.shared)
        && let (Some(d_gate_up), Some(d_down)) = (shared.gate_up.grad, shared.down.grad)
    {
        gemm::weight_grad(s, g.d_out, shared.a, d_down, None)?;
        gemm::weight_grad(s, g_shared.dh, acts.route.normed, d_gate_up, None)?;
    }
    Ok(())
}
