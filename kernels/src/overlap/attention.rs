//! Multi-head latent attention in FP8, with DeepSeek-V3's sizes: F, I and W of one layer.
//!
//! Legend: t tokens, d model width, h heads of n + r numbers (r of them rotated) and v of a value, q and c latents of query and of keys
//! and values.

use super::{
    Sizes, filled,
    linear::{Linear, Room, SCALING, tiles},
};
use crate::{
    dtype::DType::{Bf16, F32},
    error::Result,
    fp8::Tiles,
    memory::Memory,
    ops::{
        attention::{self, Grads, Inputs},
        mla::{self, Projections},
        quantize, rms_norm,
        rope::{self, Pairs, Rope, RopeTable},
    },
    stream::Stream,
    tensor::Tensor,
};

const EPS: f64 = 1e-6;

/// A norm's weight, its gradient, and what its F leaves.
#[derive(Clone, Copy)]
struct Norm {
    w: Tensor,
    dw: Tensor,
    rstd: Tensor,
    out: Tiles,
}

impl Norm {
    fn new(memory: &Memory, t: usize, width: usize) -> Self {
        let vector = |n| filled(memory, Bf16, &[n]);
        Norm { w: vector(width), dw: memory.alloc(Bf16, &[width]), rstd: vector(t), out: tiles(memory, t, width) }
    }

    fn forward(&self, s: &mut Stream, x: Tensor) -> Result<()> {
        rms_norm::forward_tiles(s, x, self.w, self.out, self.rstd, EPS, SCALING)
    }

    fn grads(&self, s: &mut Stream, x: Tensor, dy: Tensor, residual: Option<Tensor>, dx: Tensor) -> Result<()> {
        rms_norm::input_grad(s, x, self.w, self.rstd, dy, residual, dx)?;
        rms_norm::weight_grad(s, x, self.rstd, dy, self.dw)
    }
}

/// Weights, activations and gradients of a layer's attention.
pub(super) struct Attention {
    norm: Norm,
    q_down: Linear,
    q_norm: Norm,
    q_up: Linear,
    kv_down: Linear,
    kv_norm: Norm,
    kv_up: Linear,
    out: Linear,
    table: RopeTable,
    positions: Tensor,
    documents: Tensor,
    nope: usize,
    room: Room,
    // Activations.
    q_latent: Tensor,
    q: Tensor,
    kv_latent: Tensor,
    kv: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    o_tiles: Tiles,
    lse: Tensor,
    // Gradients.
    d_o: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    dkv: Tensor,
    d_kv_normed: Tensor,
    d_kv_latent: Tensor,
    d_q_normed: Tensor,
    d_q_latent: Tensor,
    d_normed: Tensor,
}

/// [t, h, w] as [t, h w].
fn flat(x: Tensor) -> Tensor {
    x.reshape(&[x.dim(0), x.len() / x.dim(0)])
}

impl Attention {
    pub fn new(memory: &Memory, z: &Sizes, room: Room) -> Self {
        let &Sizes { t, d, heads: h, nope, rope, value, q_latent, kv_latent, .. } = z;
        let bf16 = |dims: &[usize]| filled(memory, Bf16, dims);
        let empty = |dims: &[usize]| memory.alloc(Bf16, dims);
        let positions: Vec<u32> = (0..t as u32).collect();
        let table = Rope { theta: 1e4, dim: rope, yarn: None };
        Attention {
            norm: Norm::new(memory, t, d),
            q_down: Linear::new(memory, q_latent, d),
            q_norm: Norm::new(memory, t, q_latent),
            q_up: Linear::new(memory, h * (nope + rope), q_latent),
            kv_down: Linear::new(memory, kv_latent + rope, d),
            kv_norm: Norm::new(memory, t, kv_latent),
            kv_up: Linear::new(memory, h * (nope + value), kv_latent),
            out: Linear::new(memory, d, h * value),
            table: table.table(memory, Bf16, t, Pairs::Interleaved),
            positions: memory.from_slice(&[t], &positions),
            documents: memory.from_slice(&[2], &[0, t as u32]),
            nope,
            room,
            q_latent: bf16(&[t, q_latent]),
            q: bf16(&[t, h, nope + rope]),
            kv_latent: bf16(&[t, kv_latent + rope]),
            kv: bf16(&[t, h * (nope + value)]),
            k: bf16(&[t, h, nope + rope]),
            v: bf16(&[t, h, value]),
            o: bf16(&[t, h, value]),
            o_tiles: tiles(memory, t, h * value),
            lse: memory.alloc(F32, &[t, h]),
            d_o: empty(&[t, h, value]),
            dq: empty(&[t, h, nope + rope]),
            dk: empty(&[t, h, nope + rope]),
            dv: empty(&[t, h, value]),
            dkv: empty(&[t, h * (nope + value)]),
            d_kv_normed: empty(&[t, kv_latent]),
            d_kv_latent: empty(&[t, kv_latent + rope]),
            d_q_normed: empty(&[t, q_latent]),
            d_q_latent: empty(&[t, q_latent]),
            d_normed: empty(&[t, d]),
        }
    }

    fn inputs(&self) -> Inputs {
        let scale = 1.0 / (self.q.dim(2) as f64).sqrt();
        Inputs { q: self.q, k: self.k, v: self.v, doc_offsets: self.documents, scale }
    }

    /// Tokens, pairs of them, and heads and widths, for the core's cost.
    fn core(&self) -> (usize, u64, [usize; 4]) {
        let (t, h) = (self.q.dim(0), self.q.dim(1));
        (t, attention::causal_pairs(t as u64), [h, h, self.q.dim(2), self.v.dim(2)])
    }

    /// `y = x + attention(norm(x))`, [t, d].
    pub fn forward(&self, s: &mut Stream, x: Tensor, y: Tensor) -> Result<()> {
        self.norm.forward(s, x)?;
        self.q_down.forward(s, self.norm.out, None, self.q_latent)?;
        self.q_norm.forward(s, self.q_latent)?;
        self.kv_down.forward(s, self.norm.out, None, self.kv_latent)?;
        self.kv_norm.forward(s, self.kv_latent)?;
        self.q_up.forward(s, self.q_norm.out, None, flat(self.q))?;
        rope::forward(s, self.q, self.nope, self.positions, &self.table)?;
        self.kv_up.forward(s, self.kv_norm.out, None, self.kv)?;
        let latents = Projections { kv_a: self.kv_latent, kv_b: self.kv };
        mla::assemble(s, latents, self.positions, &self.table, self.k, self.v)?;
        let (t, pairs, widths) = self.core();
        s.account(attention::cost(t, pairs, widths, 2));
        attention::forward(s, self.inputs(), self.o, self.lse)?;
        quantize::tiles(s, flat(self.o), self.o_tiles, SCALING)?;
        self.out.forward(s, self.o_tiles, Some(x), y)
    }

    /// `dx` from `dy`, both [t, d].
    pub fn input_grad(&self, s: &mut Stream, x: Tensor, dy: Tensor, dx: Tensor) -> Result<()> {
        self.out.input_grad(s, dy, self.room, flat(self.d_o), false)?;
        let grads = Grads { dq: self.dq, dk: self.dk, dv: self.dv };
        let (t, pairs, widths) = self.core();
        s.account(attention::input_grad_cost(t, pairs, widths, 2));
        attention::input_grad(s, self.inputs(), self.o, self.lse, self.d_o, grads)?;
        rope::input_grad(s, self.dq, self.nope, self.positions, &self.table)?;
        let latents = Projections { kv_a: self.d_kv_latent, kv_b: self.dkv };
        mla::assemble_grad(s, self.dk, self.dv, self.positions, &self.table, latents)?;
        self.kv_up.input_grad(s, self.dkv, self.room, self.d_kv_normed, false)?;
        self.kv_norm.grads(s, self.kv_latent, self.d_kv_normed, None, self.d_kv_latent)?;
        self.kv_down.input_grad(s, self.d_kv_latent, self.room, self.d_normed, false)?;
        self.q_up.input_grad(s, flat(self.dq), self.room, self.d_q_normed, false)?;
        self.q_norm.grads(s, self.q_latent, self.d_q_normed, None, self.d_q_latent)?;
        self.q_down.input_grad(s, self.d_q_latent, self.room, self.d_normed, true)?;
        self.norm.grads(s, x, self.d_normed, Some(dy), dx)
    }

    /// W of its linear layers.
    pub fn weight_grad(&self, s: &mut Stream, dy: Tensor) -> Result<()> {
        self.out.weight_grad(s, dy, self.o_tiles, self.room)?;
        self.kv_up.weight_grad(s, self.dkv, self.kv_norm.out, self.room)?;
        self.q_up.weight_grad(s, flat(self.dq), self.q_norm.out, self.room)?;
        self.kv_down.weight_grad(s, self.d_kv_latent, self.norm.out, self.room)?;
        self.q_down.weight_grad(s, self.d_q_latent, self.norm.out, self.room)
    }
}
