//! Grouped-query attention (arXiv 2305.13245), as in qwen2 and llama: query heads share fewer key and value heads.
//!
//! Legend: t tokens, d model width, h query heads, g key-value heads, w head width.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    ops::{
        attention::{self, cached::KvCache},
        rope,
    },
    stream::Stream,
    tensor::Tensor,
};

use super::{AttentionSizes, Rotary};
use crate::{
    linear::{NarrowOutput, Rows, Workspace, weight_grads},
    lower::{Lowering, Saved},
    microbatch::Inputs,
    model::Weight,
    serve::cache::StepSequences,
};

/// F of grouped-query attention.
pub const GQA_F: TaskKind = TaskKind("attention_forward_gqa");
/// F over a cache of keys and values.
pub const GQA_CACHED: TaskKind = TaskKind("attention_cached_gqa");
/// I of grouped-query attention.
pub const GQA_I: TaskKind = TaskKind("attention_input_grad_gqa");
/// W of grouped-query attention.
pub const GQA_W: TaskKind = TaskKind("attention_weight_grad_gqa");

/// A projection and its bias.
pub type Projection = (Weight, Option<Weight>);

/// Weights of grouped-query attention.
#[derive(Component, Clone, Copy, Debug)]
pub struct Gqa {
    /// input_layernorm \[d\].
    pub norm: Weight,
    /// q_proj [h w, d].
    pub query: Projection,
    /// k_proj [g w, d].
    pub key: Projection,
    /// v_proj [g w, d].
    pub value: Projection,
    /// o_proj [d, h w].
    pub out: Weight,
}

/// What F leaves for the other passes.
#[derive(Clone, Copy, Debug)]
pub struct GqaActivations {
    x: Tensor,
    normed: Rows,
    rstd: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    /// `o` in fewer bits, if it waits as that for the backward pass.
    kept: Option<NarrowOutput>,
    lse: Tensor,
    /// Output [t, d].
    pub out: Tensor,
}

/// What I leaves for W.
#[derive(Clone, Copy, Debug)]
pub struct GqaGradients {
    d_out: Tensor,
    d_o: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    d_normed: Tensor,
    /// Gradient of the input [t, d].
    pub dx: Tensor,
}

#[derive(Component, Clone, Copy)]
pub(crate) struct GqaTask {
    gqa: Gqa,
    sizes: AttentionSizes,
    inputs: Inputs,
    eps: f64,
    acts: GqaActivations,
    grads: Option<GqaGradients>,
    renorm: bool,
    cache: Option<KvCache>,
    room: Option<Workspace>,
}

impl Gqa {
    fn task(&self, l: &Lowering, acts: GqaActivations, grads: Option<GqaGradients>) -> GqaTask {
        let renorm = grads.is_some() && l.recomputes(Saved::Norm);
        let (sizes, inputs, eps) = (l.attention, l.inputs, l.eps);
        GqaTask { gqa: *self, sizes, inputs, eps, acts, grads, renorm, cache: None, room: None }
    }

    /// Emits a task with room for what it multiplies in 8 bits.
    fn emit(&self, l: &mut Lowering, kind: TaskKind, pass: Pass, task: GqaTask) -> Result<()> {
        let weights = [self.query.0, self.key.0, self.value.0, self.out];
        let room = l.alloc_workspace(pass, &weights.map(|weight| (weight, task.acts.x.dim(0))));
        l.task(kind, pass, GqaTask { room, ..task })?;
        l.release_workspace(room);
        Ok(())
    }

    fn allocate(&self, l: &mut Lowering, x: Tensor) -> GqaActivations {
        let (t, d) = (x.dim(0), x.dim(1));
        let AttentionSizes { heads, kv_heads, qk, v, .. } = l.attention;
        // Of three projections, those with a bias are high: all or none.
        let normed = l.alloc_rows("attention normed", self.query.0, [t, d]);
        GqaActivations {
            x,
            normed,
            rstd: l.alloc("attention rstd", &[t]),
            q: l.alloc("query", &[t, heads, qk]),
            k: l.alloc("key", &[t, kv_heads, qk]),
            v: l.alloc("value", &[t, kv_heads, v]),
            o: l.alloc("attention heads", &[t, heads, v]),
            kept: l.alloc_narrow_output(self.out, [t, heads * v]),
            lse: l.alloc_acc("attention logsumexp", &[t, heads]),
            out: l.alloc("attention out", &[t, d]),
        }
    }

    /// Emits F of new tokens over `cache`, which they are appended to. Only the output is of use after it.
    pub fn lower_cached(&self, l: &mut Lowering, x: Tensor, cache: KvCache) -> Result<GqaActivations> {
        let acts = self.allocate(l, x);
        let task = GqaTask { cache: Some(cache), ..self.task(l, acts, None) };
        self.emit(l, GQA_CACHED, Pass::Forward, task)?;
        Ok(acts)
    }

    /// Emits F.
    pub fn lower_forward(&self, l: &mut Lowering, x: Tensor) -> Result<GqaActivations> {
        let acts = self.allocate(l, x);
        let task = self.task(l, acts, None);
        self.emit(l, GQA_F, Pass::Forward, task)?;
        l.drop_recomputable_rows(Saved::Norm, acts.normed);
        if acts.kept.is_some() {
            l.release(acts.o);
        }
        Ok(acts)
    }

    /// Emits I.
    pub fn lower_input_grad(
        &self,
        l: &mut Lowering,
        mut acts: GqaActivations,
        d_out: Tensor,
    ) -> Result<(GqaActivations, GqaGradients)> {
        acts.normed = l.alloc_rows_again(Saved::Norm, acts.normed);
        if acts.kept.is_some() {
            acts.o = l.alloc_like("attention heads", acts.o);
        }
        let grads = GqaGradients {
            d_out,
            d_o: l.alloc_like("d attention heads", acts.o),
            dq: l.alloc_like("d query", acts.q),
            dk: l.alloc_like("d key", acts.k),
            dv: l.alloc_like("d value", acts.v),
            d_normed: l.alloc_like("d attention normed", acts.x),
            dx: l.alloc_like("d attention in", acts.x),
        };
        let task = self.task(l, acts, Some(grads));
        self.emit(l, GQA_I, Pass::InputGrad, task)?;
        Ok((acts, grads))
    }

    /// Emits W.
    pub fn lower_weight_grad(&self, l: &mut Lowering, acts: GqaActivations, grads: GqaGradients) -> Result<()> {
        let task = self.task(l, acts, Some(grads));
        self.emit(l, GQA_W, Pass::WeightGrad, task)
    }
}

impl GqaTask {
    /// Input to rotated queries, keys and values.
    fn project(&self, s: &mut Stream, rotary: &Rotary) -> Result {
        let (a, gqa) = (&self.acts, &self.gqa);
        a.normed.norm(s, a.x, gqa.norm.value, a.rstd, self.eps)?;
        for ((w, bias), y) in [(gqa.query, a.q), (gqa.key, a.k), (gqa.value, a.v)] {
            w.forward(s, a.normed, None, bias.map(|b| b.value), flat(y))?;
        }
        for x in [a.q, a.k] {
            rope::forward(s, x, self.sizes.nope, self.inputs.positions, &rotary.0)?;
        }
        Ok(())
    }

    fn attention(&self) -> attention::Inputs {
        let (a, doc_offsets, scale) = (&self.acts, self.inputs.doc_offsets, self.sizes.scale);
        attention::Inputs { q: a.q, k: a.k, v: a.v, doc_offsets, scale }
    }
}

pub(crate) fn gqa_forward(In(id): In<Entity>, mut launch: Launch<GqaTask>, rotary: Res<Rotary>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let (a, gqa) = (&task.acts, &task.gqa);
    task.project(s, &rotary)?;
    s.account(task.sizes.core_cost(&task.inputs, a.q.dtype));
    attention::forward(s, task.attention(), a.o, a.lse)?;
    gqa.out.forward_onto(s, Rows::High(flat(a.o)), task.room, a.x, a.out)?;
    a.kept.map_or(Ok(()), |kept| kept.encode(s, flat(a.o)))
}

pub(crate) fn gqa_cached(
    In(id): In<Entity>,
    mut launch: Launch<GqaTask>,
    rotary: Res<Rotary>,
    sequences: Res<StepSequences>,
) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let (a, gqa) = (&task.acts, &task.gqa);
    let Some(cache) = task.cache else { return Ok(()) };
    task.project(s, &rotary)?;
    attention::cached::append(s, a.k, a.v, cache, &sequences.all)?;
    attention::cached::forward(s, a.q, cache, &sequences.all, task.sizes.scale, a.o)?;
    gqa.out.forward_onto(s, Rows::High(flat(a.o)), task.room, a.x, a.out)
}

pub(crate) fn gqa_input_grad(In(id): In<Entity>, mut launch: Launch<GqaTask>, rotary: Res<Rotary>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let (a, gqa) = (&task.acts, &task.gqa);
    let (Some(g), room) = (task.grads, task.room) else { return Ok(()) };
    if task.renorm {
        a.normed.norm(s, a.x, gqa.norm.value, a.rstd, task.eps)?;
    }
    if let Some(kept) = a.kept {
        kept.decode(s, flat(a.o))?;
    }
    gqa.out.input_grad(s, g.d_out, room, flat(g.d_o), false)?;
    let grads = attention::Grads { dq: g.dq, dk: g.dk, dv: g.dv };
    s.account(task.sizes.core_input_grad_cost(&task.inputs, a.q.dtype));
    attention::input_grad(s, task.attention(), a.o, a.lse, g.d_o, grads)?;
    for dx in [g.dq, g.dk] {
        rope::input_grad(s, dx, task.sizes.nope, task.inputs.positions, &rotary.0)?;
    }
    for ((w, _), dy, accumulate) in [(gqa.query, g.dq, false), (gqa.key, g.dk, true), (gqa.value, g.dv, true)] {
        w.input_grad(s, flat(dy), room, g.d_normed, accumulate)?;
    }
    Ok(gqa.norm.norm_grads(s, a.x, a.rstd, g.d_normed, Some(g.d_out), g.dx)?)
}

pub(crate) fn gqa_weight_grad(In(id): In<Entity>, mut launch: Launch<GqaTask>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let (a, gqa) = (&task.acts, &task.gqa);
    let (Some(g), room) = (task.grads, task.room) else { return Ok(()) };
    gqa.out.weight_grad(s, g.d_out, Rows::High(flat(a.o)), room)?;
    let projections = [(gqa.query, g.dq), (gqa.key, g.dk), (gqa.value, g.dv)];
    weight_grads(s, a.normed, room, &projections.map(|((w, bias), dy)| (w, flat(dy), bias.and_then(|b| b.grad))))
}

/// [t, h, w] as [t, h w].
fn flat(x: Tensor) -> Tensor {
    x.reshape(&[x.dim(0), x.len() / x.dim(0)])
}
