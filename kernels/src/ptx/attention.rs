//! Attention on the device, in f32 whatever the tensors' type: causal over packed documents, with its gradient, and over a cache.
//!
//! The maths is that of the CPU op. A row of a kv head is a query head of its group at a token, tokens outermost, so multi-head,
//! grouped and latent attention are the same kernels; widths of q and v may differ and be any. Documents are found on the device by
//! binary search in `doc_offsets`; a key tile or a row tile may hold several, and scores outside a row's document are masked.
//!
//! - forward: a block has up to 64 rows of one kv head and walks over tiles of 32 keys with a running maximum and sum
//!   (FlashAttention-2, arXiv 2307.08691, algorithm 1).
//! - gradient: delta = rowsum(dO * O) to scratch; one kernel by rows for dQ, which walks over keys, and one by keys for dK and dV,
//!   which walks over the rows of all heads of the group. Each output has one writer and each sum one order: no atomics.
//!
//! Exponentials are powers of 2: the factor log2(e) is in the scale of q.
//!
//! Time: all products are FFMA, four bytes of shared memory for 1.7 to 2.7 of them: a few tens of TFLOP/s on an H200, for correctness
//! and f32; the causal half beyond the diagonal is skipped in whole tiles.

mod backward;
pub mod cached;
mod forward;
mod tile;

use self::forward::{Config, Keys};
pub(in crate::ptx) use self::tile::Elements;
use super::{Arg, Launch, golden::Variant, parts::count};
use crate::{
    ops::attention::{Grads, Inputs},
    tensor::Tensor,
};

/// Shared memory of a block, at most (sm_90); 163 KiB on sm_80.
const MAX_SHARED_BYTES: usize = 227 << 10;

/// Sizes of a call in numbers.
#[derive(Clone, Copy)]
struct Sizes {
    t: usize,
    g: usize,
    group: usize,
    d: usize,
    v: usize,
}

impl Sizes {
    fn of(x: &Inputs) -> Self {
        let (h, g) = (x.q.dim(1), x.k.dim(1));
        Sizes { t: x.q.dim(0), g, group: h / g, d: x.q.dim(2), v: x.v.dim(2) }
    }
}

/// The factor on q that makes powers of 2 of exponentials.
fn log2_scale(scale: f64) -> Arg {
    Arg::F32((scale * std::f64::consts::LOG2_E) as f32)
}

/// F: assigns o and lse, as [`crate::ops::attention::forward`]; F32 or Bf16, lse F32.
///
/// # Panics
/// If heads are too wide for the shared memory of a block.
pub fn forward(x: Inputs, o: Tensor, lse: Tensor) -> Vec<Launch> {
    let n = Sizes::of(&x);
    if n.t == 0 {
        return vec![];
    }
    let keys = Keys::Documents;
    let [q, k, v, out] = [x.q, x.k, x.v, o].map(Elements::of);
    let config = Config::new(keys, (q, k, Some(v), out), (n.d, n.v), n.group, n.t * n.group);
    let (kernel, rows) = (config.kernel(), config.tile_rows());
    let mut args: Vec<Arg> = [x.q, x.k, x.v, o, lse, x.doc_offsets].map(Arg::Tensor).into();
    args.push(log2_scale(x.scale));
    args.extend([n.t * n.group, n.t, n.g, n.group, x.doc_offsets.len() - 1].map(|n| Arg::U32(count(n))));
    vec![Launch { kernel, grid: [count((n.t * n.group).div_ceil(rows)), count(n.g), 1], args }]
}

/// I: assigns the gradients from that of o, as [`crate::ops::attention::input_grad`].
///
/// # Panics
/// If heads are too wide for the shared memory of a block.
pub fn input_grad(x: Inputs, o: Tensor, lse: Tensor, d_o: Tensor, grads: Grads) -> Vec<Launch> {
    let n = Sizes::of(&x);
    if n.t == 0 { vec![] } else { backward::input_grad(n, x, o, lse, d_o, grads) }
}

/// What is committed: DeepSeek-V3's heads in training and in generation, and grouped heads of 128.
pub fn variants() -> Vec<Variant> {
    let mut all = forward::variants();
    all.extend(backward::variants());
    all.extend(cached::variants());
    all
}

#[cfg(test)]
mod tests;
