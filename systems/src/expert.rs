//! Experts: the routed ones as grouped products over ragged groups of rows, the shared ones as one dense SwiGLU, and combine.
//!
//! Legend: t tokens, d model width, e routed experts, k experts a token, f expert width, s width of the shared experts together.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    ops::{elementwise, gemm, grouped_gemm, permute, swiglu},
    tensor::Tensor,
};

use crate::{
    lower::{Lowering, Saved},
    model::Weight,
    routing::{RouteActivations, RouteGradients, Router},
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
    /// Router [e, d].
    pub gate: Weight,
    /// Correction bias \[e\], if the router has one.
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
    h: Tensor,
    a: Tensor,
    y: Tensor,
    shared: Option<SharedActivations>,
    /// Output [t, d].
    pub out: Tensor,
}

/// What I leaves for W.
#[derive(Clone, Copy, Debug)]
pub struct ExpertGradients {
    /// What routing's I left.
    pub route: RouteGradients,
    experts: Gradients,
}

#[derive(Clone, Copy, Debug)]
struct Gradients {
    d_out: Tensor,
    dy: Tensor,
    d_weights: Tensor,
    dh: Tensor,
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
    grads: Option<Gradients>,
    recompute: bool,
}

impl Moe {
    /// Emits F of the whole feed-forward half: route, experts, combine.
    pub fn lower_forward(
        &self,
        l: &mut Lowering,
        layer: usize,
        router: Router,
        x: Tensor,
    ) -> Result<ExpertActivations> {
        let route = self.lower_route(l, layer, router, x)?;
        let (t, d, n, f) = (x.dim(0), x.dim(1), route.rows.dim(0), self.experts_down.value.dim(2));
        let shared = self.shared.map(|(gate_up, down)| SharedActivations {
            gate_up,
            down,
            h: l.alloc("shared gate_up", &[t, gate_up.value.dim(0)]),
            a: l.alloc("shared swiglu", &[t, down.value.dim(1)]),
        });
        let acts = ExpertActivations {
            route,
            h: l.alloc("experts gate_up", &[n, 2 * f]),
            a: l.alloc("experts swiglu", &[n, f]),
            y: l.alloc("experts out", &[n, d]),
            shared,
            out: l.alloc("mlp out", &[t, d]),
        };
        let task = ExpertTask { moe: *self, acts, grads: None, recompute: false };
        l.task(EXPERTS_F, Pass::Forward, task)?;
        l.task(COMBINE_F, Pass::Forward, task)?;
        l.drop_recomputable(Saved::Swiglu, acts.a);
        if let Some(shared) = shared {
            l.drop_recomputable(Saved::Swiglu, shared.a);
        }
        Ok(acts)
    }

    /// Emits I of the whole half.
    pub fn lower_input_grad(
        &self,
        l: &mut Lowering,
        router: Router,
        mut acts: ExpertActivations,
        d_out: Tensor,
    ) -> Result<(ExpertActivations, ExpertGradients)> {
        acts.a = l.alloc_again(Saved::Swiglu, acts.a);
        if let Some(shared) = &mut acts.shared {
            shared.a = l.alloc_again(Saved::Swiglu, shared.a);
        }
        let grads = Gradients {
            d_out,
            dy: l.alloc_like("d experts out", acts.y),
            d_weights: l.alloc_like("d expert weights", acts.route.weights()),
            dh: l.alloc_like("d experts gate_up", acts.h),
            d_rows: l.alloc_like("d expert rows", acts.route.rows),
            shared: acts.shared.map(|s| SharedGradients {
                da: l.alloc_like("d shared swiglu", s.a),
                dh: l.alloc_like("d shared gate_up", s.h),
                d_normed: l.alloc_like("d shared in", acts.route.normed),
            }),
        };
        let task = ExpertTask { moe: *self, acts, grads: Some(grads), recompute: l.recomputes(Saved::Swiglu) };
        l.task(COMBINE_I, Pass::InputGrad, task)?;
        l.task(EXPERTS_I, Pass::InputGrad, task)?;
        let from_experts = (d_out, grads.d_rows, grads.d_weights, grads.shared.map(|s| s.d_normed));
        let route = self.lower_route_input_grad(l, router, acts.route, from_experts)?;
        Ok((acts, ExpertGradients { route, experts: grads }))
    }

    /// Emits W of the whole half.
    pub fn lower_weight_grad(
        &self,
        l: &mut Lowering,
        router: Router,
        acts: ExpertActivations,
        grads: ExpertGradients,
    ) -> Result<()> {
        let task = ExpertTask { moe: *self, acts, grads: Some(grads.experts), recompute: false };
        l.task(EXPERTS_W, Pass::WeightGrad, task)?;
        self.lower_route_weight_grad(l, router, acts.route, grads.route)
    }
}

pub(crate) fn experts_forward(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { moe, acts, .. }, s) = launch.get(id)?;
    let route = &acts.route;
    let offsets = route.order.offsets;
    grouped_gemm::swiglu::forward(s, route.rows, offsets, moe.experts_gate_up.value, acts.h, acts.a)?;
    grouped_gemm::forward(s, acts.a, offsets, moe.experts_down.value, acts.y)?;
    if let Some(shared) = acts.shared {
        gemm::forward(s, route.normed, shared.gate_up.value, None, shared.h)?;
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
    permute::combine(s, acts.y, acts.route.weights(), acts.route.order, acts.out, true)?;
    Ok(())
}

pub(crate) fn combine_input_grad(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { acts, grads, .. }, s) = launch.get(id)?;
    let Some(g) = grads else { return Ok(()) };
    let route = &acts.route;
    permute::combine_grad(s, g.d_out, acts.y, route.weights(), route.order, g.dy, g.d_weights)?;
    if let (Some(shared), Some(g_shared)) = (acts.shared, g.shared) {
        gemm::input_grad(s, g.d_out, shared.down.value, g_shared.da, false)?;
    }
    Ok(())
}

pub(crate) fn experts_input_grad(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { moe, acts, grads, recompute }, s) = launch.get(id)?;
    let Some(g) = grads else { return Ok(()) };
    let offsets = acts.route.order.offsets;
    let again = recompute.then_some(acts.a);
    grouped_gemm::swiglu::input_grad(s, g.dy, offsets, moe.experts_down.value, acts.h, g.dh, again)?;
    grouped_gemm::input_grad(s, g.dh, offsets, moe.experts_gate_up.value, g.d_rows)?;
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
    let route = &acts.route;
    grouped_gemm::weight_grad(s, g.dy, acts.a, route.order.offsets, d_down)?;
    grouped_gemm::weight_grad(s, g.dh, route.rows, route.order.offsets, d_gate_up)?;
    if let (Some(shared), Some(g_shared)) = (acts.shared, g.shared)
        && let (Some(d_gate_up), Some(d_down)) = (shared.gate_up.grad, shared.down.grad)
    {
        gemm::weight_grad(s, g.d_out, shared.a, d_down, None)?;
        gemm::weight_grad(s, g_shared.dh, route.normed, d_gate_up, None)?;
    }
    Ok(())
}
