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
    ops::{grouped_gemm, permute, swiglu},
    tensor::Tensor,
};

use crate::{
    dispatch::{self, Arrived},
    linear::{NarrowInput, Rows, Workspace},
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
    /// The normed tokens.
    input: Rows,
    h: Tensor,
    kept: Option<NarrowInput>,
    a: Rows,
}

/// What F leaves for the other passes.
#[derive(Clone, Copy, Debug)]
pub struct ExpertActivations {
    /// What routing left.
    pub route: RouteActivations,
    /// Rows that came to this rank's experts.
    pub arrived: Arrived,
    /// The same, as the experts multiply them.
    input: Rows,
    h: Tensor,
    /// `h` in 8 bits, if it waits as that for the backward pass.
    kept: Option<NarrowInput>,
    a: Rows,
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
    /// Gradient of `a`, where it is not made within a product.
    da: Option<Tensor>,
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
    room: Option<Workspace>,
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
        let (n, f) = (arrived.dims[0], self.experts_down.value.dim(2));
        let shared = self.shared.map(|(gate_up, down)| SharedActivations {
            gate_up,
            down,
            input: match gate_up.fp8 {
                None => Rows::High(route.normed),
                Some(_) => l.alloc_rows("shared in", gate_up, [t, d]),
            },
            h: l.alloc("shared gate_up", &[t, gate_up.value.dim(0)]),
            kept: l.alloc_narrow_swiglu(gate_up, [t, gate_up.value.dim(0)]),
            a: l.alloc_rows("shared swiglu", down, [t, down.value.dim(1)]),
        });
        let y = l.alloc("experts out", &[n, d]);
        let acts = ExpertActivations {
            route,
            arrived,
            input: match (arrived.rows, self.experts_gate_up.fp8) {
                (Rows::High(_), Some(_)) => {
                    l.alloc_rows("expert rows in 8 bits", self.experts_gate_up, [n, d]).in_groups(arrived.offsets)
                }
                (rows, _) => rows,
            },
            h: l.alloc("experts gate_up", &[n, 2 * f]),
            kept: l.alloc_narrow_swiglu(self.experts_gate_up, [n, 2 * f]),
            a: l.alloc_rows("experts swiglu", self.experts_down, [n, f]).in_groups(arrived.offsets),
            y,
            returned: if arrived.is_local() { y } else { l.alloc_wire("returned rows", route.num_rows(), d) },
            shared,
            out: l.alloc("mlp out", &[t, d]),
        };
        l.task(EXPERTS_F, Pass::Forward, self.forward_task(acts))?;
        // What was rounded to 8 bits is done with.
        if let (Rows::High(rows), Rows::Fp8(..)) = (arrived.rows, acts.input) {
            l.release(rows);
        }
        Ok(acts)
    }

    /// Emits the way back of the experts' outputs.
    pub fn lower_return(&self, l: &mut Lowering, acts: ExpertActivations) -> Result<()> {
        dispatch::lower_return(l, dispatch::RETURN_F, Pass::Forward, acts.arrived, acts.y, acts.returned)
    }

    /// Emits the weighted sum of a token's experts, onto the residual and the shared experts.
    pub fn lower_combine(&self, l: &mut Lowering, acts: ExpertActivations) -> Result<()> {
        l.task(COMBINE_F, Pass::Forward, self.forward_task(acts))?;
        l.drop_swiglu(acts.kept, acts.h, acts.a);
        if let Some(shared) = acts.shared {
            l.drop_swiglu(shared.kept, shared.h, shared.a);
            l.keep_narrow(shared.h, 4);
            if let Rows::Fp8(..) = shared.input {
                l.drop_recomputable_rows(Saved::Norm, shared.input);
            }
        }
        acts.route.drop_norm(l);
        if !acts.needs_normed() {
            l.release(acts.route.normed);
        }
        if !acts.arrived.is_local() {
            l.release(acts.y);
            // Sums of a node's outputs are for the tokens; no row is kept for the gradient of its weight, which the experts
            // that put the weight before their last product have of themselves.
            if l.reduces_on_the_way {
                l.release(acts.returned);
            }
        }
        // The inputs of products: 1 byte of 2.
        if let Rows::High(rows) = acts.input {
            l.keep_narrow(rows, 4);
        }
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
        (acts.h, acts.a) = l.alloc_swiglu_again(acts.kept, acts.h, acts.a);
        acts.route = acts.route.with_norm_again(l);
        if l.reduces_on_the_way && !acts.arrived.is_local() {
            acts.returned = l.alloc_like_wire("returned rows", acts.returned);
        }
        if let Some(shared) = &mut acts.shared {
            (shared.h, shared.a) = l.alloc_swiglu_again(shared.kept, shared.h, shared.a);
            shared.input = match shared.input {
                Rows::High(_) => Rows::High(acts.route.normed),
                input => l.alloc_rows_again(Saved::Norm, input),
            };
        }
        let d_returned = l.alloc_like("d experts out", acts.returned);
        let d_arrived = l.alloc("d expert rows", &acts.arrived.dims);
        let ([n, d], local) = (acts.arrived.dims, acts.arrived.is_local());
        let grads = ExpertGradients {
            d_out,
            d_returned,
            dy: if local { d_returned } else { l.alloc_wire("d experts out, sent", n, d) },
            d_weights: l.alloc_like("d expert weights", acts.route.weights()),
            da: self.experts_down.fp8.map(|_| l.alloc("d experts swiglu", &[n, acts.h.dim(1) / 2])),
            dh: l.alloc_like("d experts gate_up", acts.h),
            d_arrived,
            d_rows: if local { d_arrived } else { l.alloc_like_wire("d expert rows, returned", acts.returned) },
            shared: acts.shared.map(|s| SharedGradients {
                da: l.alloc("d shared swiglu", &[s.h.dim(0), s.h.dim(1) / 2]),
                dh: l.alloc_like("d shared gate_up", s.h),
                d_normed: l.alloc_like("d shared in", acts.route.normed),
            }),
        };
        let shared: Vec<_> = acts.shared.iter().map(|shared| (shared.down, acts.route.x.dim(0))).collect();
        self.emit(l, COMBINE_I, Pass::InputGrad, &shared, acts, grads)?;
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
        let mut products = self.expert_products(acts);
        products.extend(acts.shared.map(|shared| (shared.gate_up, acts.route.x.dim(0))));
        self.emit(l, EXPERTS_I, Pass::InputGrad, &products, acts, grads)?;
        grads.da.into_iter().for_each(|da| l.release(da));
        Ok(())
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
        let mut products = self.expert_products(acts);
        let t = acts.route.x.dim(0);
        products.extend(acts.shared.iter().flat_map(|shared| [(shared.gate_up, t), (shared.down, t)]));
        self.emit(l, EXPERTS_W, Pass::WeightGrad, &products, acts, grads)
    }

    fn forward_task(&self, acts: ExpertActivations) -> ExpertTask {
        ExpertTask { moe: *self, acts, grads: None, recompute: false, norm_again: None, room: None }
    }

    /// The products of the routed experts, and how many rows they have.
    fn expert_products(&self, acts: ExpertActivations) -> Vec<(Weight, usize)> {
        [self.experts_gate_up, self.experts_down].map(|weight| (weight, acts.arrived.dims[0])).into()
    }

    /// Emits a task of the backward pass with room for what it multiplies in 8 bits.
    fn emit(
        &self,
        l: &mut Lowering,
        kind: TaskKind,
        pass: Pass,
        products: &[(Weight, usize)],
        acts: ExpertActivations,
        grads: ExpertGradients,
    ) -> Result<()> {
        let norm_again = l.recomputes(Saved::Norm).then_some(l.eps);
        let recompute = l.recomputes(Saved::Swiglu);
        let room = l.alloc_workspace(pass, products);
        l.task(kind, pass, ExpertTask { moe: *self, acts, grads: Some(grads), recompute, norm_again, room })?;
        l.release_workspace(room);
        Ok(())
    }
}

impl ExpertActivations {
    /// Whether the backward pass reads the norm's output in the high format.
    fn needs_normed(&self) -> bool {
        let of_router = self.route.reads_normed();
        of_router || self.shared.is_some_and(|shared| matches!(shared.input, Rows::High(_)))
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
    let offsets = acts.arrived.offsets;
    match (acts.input, acts.a) {
        (Rows::High(rows), Rows::High(a)) => {
            grouped_gemm::swiglu::forward(s, rows, offsets, moe.experts_gate_up.value, acts.h, a)?;
        }
        _ => {
            if let Rows::High(rows) = acts.arrived.rows {
                acts.input.round(s, rows)?;
            }
            moe.experts_gate_up.forward_grouped(s, acts.input, offsets, acts.h)?;
            acts.a.swiglu(s, acts.h, acts.kept)?;
        }
    }
    moe.experts_down.forward_grouped(s, acts.a, offsets, acts.y)?;
    if let Some(shared) = acts.shared {
        shared.input.round(s, acts.route.normed)?;
        shared.gate_up.forward(s, shared.input, None, None, shared.h)?;
        shared.a.swiglu(s, shared.h, shared.kept)?;
    }
    Ok(())
}

pub(crate) fn combine_forward(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { acts, .. }, s) = launch.get(id)?;
    let (route, mut residual) = (&acts.route, acts.route.x);
    if let Some(shared) = acts.shared {
        shared.down.forward_onto(s, shared.a, None, residual, acts.out)?;
        residual = acts.out;
    }
    Ok(permute::combine(s, acts.returned, route.weights(), route.order, Some(residual), acts.out)?)
}

pub(crate) fn combine_input_grad(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { moe, acts, grads, norm_again, room, .. }, s) = launch.get(id)?;
    let Some(g) = grads else { return Ok(()) };
    let route = &acts.route;
    if let Some(eps) = norm_again {
        route.norm(s, moe.norm.value, eps)?;
        if let Some(shared) = acts.shared {
            shared.input.round(s, route.normed)?;
        }
    }
    permute::combine_grad(s, g.d_out, acts.returned, route.weights(), route.order, g.d_returned, g.d_weights)?;
    if let (Some(shared), Some(g_shared)) = (acts.shared, g.shared) {
        shared.down.input_grad(s, g.d_out, room, g_shared.da, false)?;
    }
    Ok(())
}

pub(crate) fn experts_input_grad(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { moe, acts, grads, recompute, room, .. }, s) = launch.get(id)?;
    let Some(g) = grads else { return Ok(()) };
    let offsets = acts.arrived.offsets;
    match (acts.a, g.da) {
        (Rows::High(a), None) => {
            let again = recompute.then_some(a);
            grouped_gemm::swiglu::input_grad(s, g.dy, offsets, moe.experts_down.value, acts.h, g.dh, again)?;
        }
        (a, Some(da)) => {
            a.swiglu_again(s, acts.h, acts.kept, recompute)?;
            moe.experts_down.input_grad_grouped(s, g.dy, offsets, room, da)?;
            swiglu::input_grad(s, acts.h, da, g.dh)?;
        }
        (Rows::Fp8(..), None) => return Err("experts in 8 bits have no room for a gradient".into()),
    }
    moe.experts_gate_up.input_grad_grouped(s, g.dh, offsets, room, g.d_arrived)?;
    if let (Some(shared), Some(g_shared)) = (acts.shared, g.shared) {
        shared.a.swiglu_again(s, shared.h, shared.kept, recompute)?;
        swiglu::input_grad(s, shared.h, g_shared.da, g_shared.dh)?;
        shared.gate_up.input_grad(s, g_shared.dh, room, g_shared.d_normed, false)?;
    }
    Ok(())
}

pub(crate) fn experts_weight_grad(In(id): In<Entity>, mut launch: Launch<ExpertTask>) -> Result {
    let (_, &ExpertTask { moe, acts, grads, room, .. }, s) = launch.get(id)?;
    let Some(g) = grads else { return Ok(()) };
    let offsets = acts.arrived.offsets;
    moe.experts_down.weight_grad_grouped(s, g.dy, acts.a, offsets, room)?;
    moe.experts_gate_up.weight_grad_grouped(s, g.dh, acts.input, offsets, room)?;
    if let (Some(shared), Some(g_shared)) = (acts.shared, g.shared) {
        shared.down.weight_grad(s, g.d_out, shared.a, room)?;
        shared.gate_up.weight_grad(s, g_shared.dh, shared.input, room)?;
    }
    Ok(())
}
