//! Multi-head latent attention (DeepSeek-V2 report, section 2.1): queries, keys and values come from low-rank latents, and
//! one rotary key is shared by all heads. Training multiplies the latents up; generation attends to the latents themselves.
//!
//! Legend: t tokens, d model width, h heads, n/r/v width of the no-position, rotary and value part of a head, q/c query and
//! key-value latent width.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    ops::{attention, mla, rope},
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

/// F of latent attention.
pub const MLA_F: TaskKind = TaskKind("attention_forward");
/// I of latent attention.
pub const MLA_I: TaskKind = TaskKind("attention_input_grad");
/// W of latent attention.
pub const MLA_W: TaskKind = TaskKind("attention_weight_grad");
/// What of F is computed again before I.
pub const MLA_R: TaskKind = TaskKind("attention_recompute");
/// F over a cache of latents.
pub const MLA_CACHED: TaskKind = TaskKind("attention_cached");

/// Epsilon of the norms on the latents; every implementation fixes it, whatever `rms_norm_eps` says.
const LATENT_EPS: f64 = 1e-6;

/// Weights of latent attention.
#[derive(Component, Clone, Copy, Debug)]
pub struct Mla {
    /// input_layernorm \[d\].
    pub norm: Weight,
    /// Query projection.
    pub query: MlaQuery,
    /// kv_a_proj_with_mqa [c + r, d].
    pub kv_down: Weight,
    /// kv_a_layernorm \[c\].
    pub kv_norm: Weight,
    /// kv_b_proj [h (n + v), c].
    pub kv_up: Weight,
    /// o_proj [d, h v].
    pub out: Weight,
}

/// Query projection, with or without a latent.
#[derive(Clone, Copy, Debug)]
#[expect(clippy::large_enum_variant, reason = "one a layer")]
pub enum MlaQuery {
    /// q_proj [h (n + r), d].
    Full(Weight),
    /// Down to the latent, norm, and up.
    LowRank {
        /// q_a_proj [q, d].
        down: Weight,
        /// q_a_layernorm \[q\].
        norm: Weight,
        /// q_b_proj [h (n + r), q].
        up: Weight,
    },
}

#[derive(Clone, Copy, Debug)]
struct LatentQuery {
    latent: Tensor,
    normed: Rows,
    rstd: Tensor,
}

/// What F leaves for the other passes.
#[derive(Clone, Copy, Debug)]
pub struct MlaActivations {
    x: Tensor,
    normed: Rows,
    rstd: Tensor,
    latent_query: Option<LatentQuery>,
    q: Tensor,
    kv_latent: Tensor,
    kv_normed: Rows,
    kv_rstd: Tensor,
    kv: Tensor,
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
pub struct MlaGradients {
    d_out: Tensor,
    d_o: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dkv: Tensor,
    d_kv_normed: Tensor,
    d_kv_latent: Tensor,
    /// Gradients of the query latent, after and before its norm.
    d_query: Option<(Tensor, Tensor)>,
    d_normed: Tensor,
    /// Gradient of the input [t, d].
    pub dx: Tensor,
}

#[derive(Component, Clone, Copy)]
pub(crate) struct MlaTask {
    mla: Mla,
    sizes: AttentionSizes,
    inputs: Inputs,
    eps: f64,
    acts: MlaActivations,
    grads: Option<MlaGradients>,
    recompute: (bool, bool),
    cache: Option<Tensor>,
    room: Option<Workspace>,
}

impl Mla {
    fn task(&self, l: &Lowering, acts: MlaActivations, grads: Option<MlaGradients>) -> MlaTask {
        let recompute = (l.recomputes(Saved::Norm), l.recomputes(Saved::MlaUp));
        MlaTask {
            mla: *self,
            sizes: l.attention,
            inputs: l.inputs,
            eps: l.eps,
            acts,
            grads,
            recompute,
            cache: None,
            room: None,
        }
    }

    fn linear_weights(&self) -> Vec<Weight> {
        let query = match self.query {
            MlaQuery::Full(w) => vec![w],
            MlaQuery::LowRank { down, up, .. } => vec![down, up],
        };
        query.into_iter().chain([self.kv_down, self.kv_up, self.out]).collect()
    }

    /// Emits a task with room for what it multiplies in 8 bits.
    fn emit(&self, l: &mut Lowering, kind: TaskKind, pass: Pass, weights: &[Weight], task: MlaTask) -> Result<()> {
        let products: Vec<_> = weights.iter().map(|weight| (*weight, task.acts.x.dim(0))).collect();
        let room = l.alloc_workspace(pass, &products);
        l.task(kind, pass, MlaTask { room, ..task })?;
        l.release_workspace(room);
        Ok(())
    }

    /// Generation keeps latents: what is normed stays in the high format there.
    fn allocate(&self, l: &mut Lowering, x: Tensor, generates: bool) -> MlaActivations {
        let rows = |l: &mut Lowering, name, weight, dims: [usize; 2]| match generates {
            true => Rows::High(l.alloc(name, &dims)),
            false => l.alloc_rows(name, weight, dims),
        };
        let (t, d) = (x.dim(0), x.dim(1));
        let AttentionSizes { heads: h, qk, v, .. } = l.attention;
        let (c_r, c) = (self.kv_down.value.dim(0), self.kv_norm.value.len());
        let latent_query = match self.query {
            MlaQuery::Full(_) => None,
            MlaQuery::LowRank { norm, up, .. } => Some(LatentQuery {
                latent: l.alloc("query latent", &[t, norm.value.len()]),
                normed: rows(l, "query latent normed", up, [t, norm.value.len()]),
                rstd: l.alloc("query latent rstd", &[t]),
            }),
        };
        MlaActivations {
            x,
            normed: rows(l, "attention normed", self.kv_down, [t, d]),
            rstd: l.alloc("attention rstd", &[t]),
            latent_query,
            q: l.alloc("query", &[t, h, qk]),
            kv_latent: l.alloc("key-value latent", &[t, c_r]),
            kv_normed: rows(l, "key-value latent normed", self.kv_up, [t, c]),
            kv_rstd: l.alloc("key-value latent rstd", &[t]),
            kv: l.alloc("keys and values", &[t, self.kv_up.value.dim(0)]),
            k: l.alloc("key", &[t, h, qk]),
            v: l.alloc("value", &[t, h, v]),
            o: l.alloc("attention heads", &[t, h, v]),
            kept: l.alloc_narrow_output(self.out, [t, h * v]),
            lse: l.alloc_acc("attention logsumexp", &[t, h]),
            out: l.alloc("attention out", &[t, d]),
        }
    }

    /// Emits F.
    pub fn lower_forward(&self, l: &mut Lowering, x: Tensor) -> Result<MlaActivations> {
        let acts = self.allocate(l, x, false);
        let task = self.task(l, acts, None);
        self.emit(l, MLA_F, Pass::Forward, &[self.out], task)?;
        l.release(acts.kv);
        l.drop_recomputable_rows(Saved::Norm, acts.normed);
        // The input of the last product, in E5M6 (DeepSeek-V3 report, section 3.3.3): 12 bits of 16.
        l.keep_narrow(acts.o, 6);
        if acts.kept.is_some() {
            l.release(acts.o);
        }
        for tensor in [acts.q, acts.k, acts.v] {
            l.drop_recomputable(Saved::MlaUp, tensor);
        }
        Ok(acts)
    }

    /// Emits F of new tokens over `cache` ([`mla::latent::append`] says of what rows), which they are appended to. Only the output is of use after it.
    pub fn lower_cached(&self, l: &mut Lowering, x: Tensor, cache: Tensor) -> Result<MlaActivations> {
        let acts = self.allocate(l, x, true);
        let task = MlaTask { cache: Some(cache), ..self.task(l, acts, None) };
        self.emit(l, MLA_CACHED, Pass::Forward, &self.linear_weights(), task)?;
        Ok(acts)
    }

    /// Emits I.
    pub fn lower_input_grad(
        &self,
        l: &mut Lowering,
        mut acts: MlaActivations,
        d_out: Tensor,
    ) -> Result<(MlaActivations, MlaGradients)> {
        let (t, d) = (acts.x.dim(0), acts.x.dim(1));
        let AttentionSizes { heads: h, qk, v, .. } = l.attention;
        acts.normed = l.alloc_rows_again(Saved::Norm, acts.normed);
        if acts.kept.is_some() {
            acts.o = l.alloc_like("attention heads", acts.o);
        }
        for tensor in [&mut acts.q, &mut acts.k, &mut acts.v] {
            *tensor = l.alloc_again(Saved::MlaUp, *tensor);
        }
        if l.recomputes(Saved::Norm) || l.recomputes(Saved::MlaUp) {
            acts.kv = l.alloc("keys and values", &[t, self.kv_up.value.dim(0)]);
            let task = self.task(l, acts, None);
            l.task(MLA_R, Pass::InputGrad, task)?;
            l.release(acts.kv);
        }
        let like = |l: &mut Lowering, name, x: Tensor| l.alloc_like(name, x);
        let grads = MlaGradients {
            d_out,
            d_o: like(l, "d attention heads", acts.o),
            dq: l.alloc("d query", &[t, h, qk]),
            dk: l.alloc("d key", &[t, h, qk]),
            dv: l.alloc("d value", &[t, h, v]),
            dkv: l.alloc("d keys and values", &[t, self.kv_up.value.dim(0)]),
            d_kv_normed: l.alloc("d key-value latent normed", &[t, self.kv_norm.value.len()]),
            d_kv_latent: like(l, "d key-value latent", acts.kv_latent),
            d_query: acts
                .latent_query
                .map(|q| (l.alloc_like("d query latent normed", q.latent), l.alloc_like("d query latent", q.latent))),
            d_normed: l.alloc("d attention normed", &[t, d]),
            dx: l.alloc("d attention in", &[t, d]),
        };
        let task = self.task(l, acts, Some(grads));
        self.emit(l, MLA_I, Pass::InputGrad, &self.linear_weights(), task)?;
        Ok((acts, grads))
    }

    /// Emits W.
    pub fn lower_weight_grad(&self, l: &mut Lowering, acts: MlaActivations, grads: MlaGradients) -> Result<()> {
        let task = self.task(l, acts, Some(grads));
        self.emit(l, MLA_W, Pass::WeightGrad, &self.linear_weights(), task)
    }
}

impl MlaTask {
    fn norm(&self, s: &mut Stream) -> Result {
        let a = &self.acts;
        Ok(a.normed.norm(s, a.x, self.mla.norm.value, a.rstd, self.eps)?)
    }

    /// Input to latents.
    fn down(&self, s: &mut Stream) -> Result {
        let (a, mla) = (&self.acts, &self.mla);
        self.norm(s)?;
        if let (MlaQuery::LowRank { down, norm, .. }, Some(q)) = (mla.query, a.latent_query) {
            down.forward(s, a.normed, self.room, None, q.latent)?;
            q.normed.norm(s, q.latent, norm.value, q.rstd, LATENT_EPS)?;
        }
        mla.kv_down.forward(s, a.normed, self.room, None, a.kv_latent)?;
        Ok(a.kv_normed.norm(s, a.kv_latent, mla.kv_norm.value, a.kv_rstd, LATENT_EPS)?)
    }

    /// Latent to rotated queries.
    fn queries(&self, s: &mut Stream, rotary: &Rotary) -> Result {
        let (a, sizes) = (&self.acts, &self.sizes);
        let q = a.q.reshape(&[a.q.dim(0), sizes.heads * sizes.qk]);
        match (self.mla.query, a.latent_query) {
            (MlaQuery::LowRank { up, .. }, Some(latent)) => up.forward(s, latent.normed, self.room, None, q)?,
            (MlaQuery::Full(w), _) => w.forward(s, a.normed, self.room, None, q)?,
            _ => {}
        }
        Ok(rope::forward(s, a.q, sizes.nope, self.inputs.positions, &rotary.0)?)
    }

    fn attention(&self) -> attention::Inputs {
        let (a, doc_offsets, scale) = (&self.acts, self.inputs.doc_offsets, self.sizes.scale);
        attention::Inputs { q: a.q, k: a.k, v: a.v, doc_offsets, scale }
    }

    /// Latents to rotated queries, keys and values.
    fn up(&self, s: &mut Stream, rotary: &Rotary) -> Result {
        let a = &self.acts;
        self.queries(s, rotary)?;
        self.mla.kv_up.forward(s, a.kv_normed, None, None, a.kv)?;
        let latents = mla::Projections { kv_a: a.kv_latent, kv_b: a.kv };
        mla::assemble(s, latents, self.inputs.positions, &rotary.0, a.k, a.v)?;
        Ok(())
    }
}

pub(crate) fn mla_forward(In(id): In<Entity>, mut launch: Launch<MlaTask>, rotary: Res<Rotary>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let (a, mla) = (&task.acts, &task.mla);
    task.down(s)?;
    task.up(s, &rotary)?;
    s.account(task.sizes.core_cost(&task.inputs, a.q.dtype));
    attention::forward(s, task.attention(), a.o, a.lse)?;
    mla.out.forward_onto(s, Rows::High(flat(a.o)), task.room, a.x, a.out)?;
    a.kept.map_or(Ok(()), |kept| kept.encode(s, flat(a.o)))
}

pub(crate) fn mla_cached(
    In(id): In<Entity>,
    mut launch: Launch<MlaTask>,
    rotary: Res<Rotary>,
    sequences: Res<StepSequences>,
) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let (a, mla) = (&task.acts, &task.mla);
    let Some(cache) = task.cache else { return Ok(()) };
    task.down(s)?;
    task.queries(s, &rotary)?;
    mla::latent::append(s, a.kv_normed.high()?, a.kv_latent, &rotary.0, cache, &sequences.all)?;
    let way = (task.sizes.scale, sequences.prefill);
    mla::latent::forward(s, a.q, mla.kv_up.value, cache, &sequences.all, way, a.o)?;
    mla.out.forward_onto(s, Rows::High(flat(a.o)), task.room, a.x, a.out)
}

pub(crate) fn mla_recompute(In(id): In<Entity>, mut launch: Launch<MlaTask>, rotary: Res<Rotary>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let (norm, up) = task.recompute;
    if norm {
        task.norm(s)?;
    }
    if up {
        task.up(s, &rotary)?;
    }
    Ok(())
}

pub(crate) fn mla_input_grad(In(id): In<Entity>, mut launch: Launch<MlaTask>, rotary: Res<Rotary>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let (a, mla, sizes) = (&task.acts, &task.mla, &task.sizes);
    let (Some(g), room) = (task.grads, task.room) else { return Ok(()) };
    if let Some(kept) = a.kept {
        kept.decode(s, flat(a.o))?;
    }
    mla.out.input_grad(s, g.d_out, room, flat(g.d_o), false)?;
    let grads = attention::Grads { dq: g.dq, dk: g.dk, dv: g.dv };
    s.account(sizes.core_input_grad_cost(&task.inputs, a.q.dtype));
    attention::input_grad(s, task.attention(), a.o, a.lse, g.d_o, grads)?;
    rope::input_grad(s, g.dq, sizes.nope, task.inputs.positions, &rotary.0)?;
    let latents = mla::Projections { kv_a: g.d_kv_latent, kv_b: g.dkv };
    mla::assemble_grad(s, g.dk, g.dv, task.inputs.positions, &rotary.0, latents)?;
    mla.kv_up.input_grad(s, g.dkv, room, g.d_kv_normed, false)?;
    mla.kv_norm.norm_grads(s, a.kv_latent, a.kv_rstd, g.d_kv_normed, None, g.d_kv_latent)?;
    mla.kv_down.input_grad(s, g.d_kv_latent, room, g.d_normed, false)?;
    match (mla.query, a.latent_query, g.d_query) {
        (MlaQuery::LowRank { down, norm, up }, Some(q), Some((d_normed, d_latent))) => {
            up.input_grad(s, flat(g.dq), room, d_normed, false)?;
            norm.norm_grads(s, q.latent, q.rstd, d_normed, None, d_latent)?;
            down.input_grad(s, d_latent, room, g.d_normed, true)?;
        }
        (MlaQuery::Full(w), ..) => w.input_grad(s, flat(g.dq), room, g.d_normed, true)?,
        _ => {}
    }
    Ok(mla.norm.norm_grads(s, a.x, a.rstd, g.d_normed, Some(g.d_out), g.dx)?)
}

pub(crate) fn mla_weight_grad(In(id): In<Entity>, mut launch: Launch<MlaTask>) -> Result {
    let (_, &task, s) = launch.get(id)?;
    let (a, mla) = (&task.acts, &task.mla);
    let (Some(g), room) = (task.grads, task.room) else { return Ok(()) };
    mla.out.weight_grad(s, g.d_out, Rows::High(flat(a.o)), room)?;
    mla.kv_up.weight_grad(s, g.dkv, a.kv_normed, room)?;
    let kv_down = (mla.kv_down, g.d_kv_latent, None);
    match (mla.query, a.latent_query, g.d_query) {
        (MlaQuery::LowRank { down, up, .. }, Some(q), Some((_, d_latent))) => {
            up.weight_grad(s, flat(g.dq), q.normed, room)?;
            weight_grads(s, a.normed, room, &[kv_down, (down, d_latent, None)])
        }
        (MlaQuery::Full(w), ..) => weight_grads(s, a.normed, room, &[kv_down, (w, flat(g.dq), None)]),
        _ => Ok(()),
    }
}

/// [t, h, w] as [t, h w].
fn flat(x: Tensor) -> Tensor {
    x.reshape(&[x.dim(0), x.len() / x.dim(0)])
}
