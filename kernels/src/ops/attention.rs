//! Causal attention over packed documents: `o = softmax(scale q k^T) v`, each token over itself and the earlier tokens of its own
//! document.
//!
//! Shapes: q [t, h, d], k [t, g, d], v [t, g, v], o [t, h, v], lse [t, h]; h heads, g kv heads that divide h (head i uses kv
//! head i / (h / g)). `doc_offsets` [max_docs + 1] u32 holds the documents' first tokens, from 0, padded with t: how many
//! documents there are need not be known on the host. lse, the log of the softmax's denominator, is f32 (f64 for f64): it is
//! all that the gradient needs beside the inputs and o.
//!
//! Work is split by document, kv head and runs of query blocks; `attention/block.rs` has the loop.

mod backward;
pub(crate) mod block;
pub mod cached;
#[cfg(test)]
mod tests;

use std::ops::Range;

use parking_lot::Mutex;
use rayon::prelude::*;

use self::{
    backward::{Outputs, Saved},
    block::{Part, QUERY_BLOCK, Rows, Scratch, Shared},
};
use crate::{
    cost::Cost,
    device::Target,
    dtype::Float,
    error::{Error, Result},
    ops::{are_fast, expect_shape, paged::Table, rope::acc_dtype},
    ptx,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// What attention reads.
#[derive(Clone, Copy, Debug)]
pub struct Inputs {
    /// Queries [t, h, d].
    pub q: Tensor,
    /// Keys [t, g, d].
    pub k: Tensor,
    /// Values [t, g, v].
    pub v: Tensor,
    /// First token of each document u32 [max_docs + 1], padded with t.
    pub doc_offsets: Tensor,
    /// Factor on the scores: see [`super::rope::Rope::softmax_scale`].
    pub scale: f64,
}

/// Gradients of q, k and v, assigned.
#[derive(Clone, Copy, Debug)]
pub struct Grads {
    /// [t, h, d]
    pub dq: Tensor,
    /// [t, g, d]
    pub dk: Tensor,
    /// [t, g, v]
    pub dv: Tensor,
}

/// Widest heads that a kernel has registers and shared memory for.
const WIDEST: usize = 256;

/// Query blocks of one forward task.
const BLOCKS_PER_TASK: usize = 8;
/// Multiply-adds below which waking another thread costs more than the work.
pub(crate) const MIN_PARALLEL_MADDS: usize = 1 << 20;

#[derive(Clone, Copy)]
struct Sizes {
    t: usize,
    h: usize,
    g: usize,
    d: usize,
    v: usize,
}

impl Inputs {
    fn check(&self, o: Tensor, lse: Tensor) -> Result<Sizes> {
        const OP: &str = "attention";
        let (t, h, d) = (self.q.dim(0), self.q.dim(1), self.q.dim(2));
        let (g, v) = (self.k.dim(1), self.v.dim(2));
        expect_shape(OP, "q", self.q, &[t, h, d])?;
        expect_shape(OP, "k", self.k, &[t, g, d])?;
        expect_shape(OP, "v", self.v, &[t, g, v])?;
        expect_shape(OP, "o", o, &[t, h, v])?;
        expect_shape(OP, "lse", lse, &[t, h])?;
        if g == 0 || h % g != 0 {
            let expected = format!("[{t}, g, {d}] with g kv heads that divide the {h} heads");
            return Err(Error::Shape { op: OP, role: "k", expected, found: self.k });
        }
        if lse.dtype != acc_dtype(self.q.dtype) {
            let expected = format!("{:?}", acc_dtype(self.q.dtype));
            return Err(Error::Shape { op: OP, role: "lse", expected, found: lse });
        }
        Ok(Sizes { t, h, g, d, v })
    }

    fn reads(&self) -> [Tensor; 4] {
        [self.q, self.k, self.v, self.doc_offsets]
    }
}

/// Every kv head of every document.
fn parts(offsets: &[u32], n: Sizes, scale: f64) -> Vec<Part<'static>> {
    let ends = (offsets.first(), offsets.last());
    let ordered = offsets.is_sorted() && ends == (Some(&0), Some(&(n.t as u32)));
    assert!(ordered, "attention: `doc_offsets` should rise from 0 to {}, padded with that, found {offsets:?}", n.t);
    let documents = offsets.array_windows::<2>().filter(|[start, end]| start < end);
    let group = n.h / n.g;
    documents
        .flat_map(|&[start, end]| {
            let (start, num_tokens) = (start as usize, (end - start) as usize);
            (0..n.g).map(move |head| Part {
                q: Rows::new(start, n.g, head, group, n.d),
                k: Rows::new(start, n.g, head, 1, n.d),
                v: Rows::new(start, n.g, head, 1, n.v),
                table: Table::IDENTITY,
                o: Rows::new(start, n.g, head, group, n.v),
                num_tokens,
                context: 0,
                scale,
            })
        })
        .collect()
}

/// Calls `run` for every task, on the pool if `madds` are many, with buffers that are handed on from task to task.
pub(crate) fn for_each_task<A: Default + Send, J: Sync>(
    tasks: &[J],
    madds: usize,
    run: impl Fn(&J, &mut Scratch<A>) + Sync,
) {
    if madds < MIN_PARALLEL_MADDS || tasks.len() < 2 {
        let mut scratch = Scratch::default();
        tasks.iter().for_each(|task| run(task, &mut scratch));
        return;
    }
    let pool = Mutex::new(Vec::new());
    tasks.par_iter().with_max_len(1).for_each(|task| {
        let mut scratch = pool.lock().pop().unwrap_or_default();
        run(task, &mut scratch);
        pool.lock().push(scratch);
    });
}

/// `part`'s rows in runs of `len`.
pub(crate) fn runs<'a>(part: &Part<'a>, len: usize) -> impl Iterator<Item = (Part<'a>, Range<usize>)> + use<'a> {
    let (part, rows) = (*part, part.num_rows());
    (0..rows).step_by(len).map(move |r| (part, r..(r + len).min(rows)))
}

/// Multiply-adds of the two products over all parts.
pub(crate) fn madds(parts: &[Part]) -> usize {
    let per_part = |p: &Part| p.num_rows() * (p.context + p.num_tokens.div_ceil(2)) * (p.q.width + p.v.width);
    parts.iter().map(per_part).sum()
}

/// F: assigns o and lse.
pub fn forward(s: &mut Stream, x: Inputs, o: Tensor, lse: Tensor) -> Result<()> {
    let n = x.check(o, lse)?;
    let kernels = |_: &Target| {
        (are_fast(&[x.q, x.k, x.v, o]) && n.d <= WIDEST && n.v <= WIDEST).then(|| ptx::attention::forward(x, o, lse))
    };
    s.launch_kernel(&x.reads(), &[o, lse], kernels, move |m| {
        with_float!(x.q.dtype, T => {
            let (q, k, v) = (m.read::<T>(x.q), m.read::<T>(x.k), m.read::<T>(x.v));
            let (mut o, mut lse) = (m.write::<T>(o), m.write::<<T as Float>::Acc>(lse));
            let parts = parts(&m.read::<u32>(x.doc_offsets), n, x.scale);
            let tasks: Vec<_> = parts.iter().flat_map(|p| runs(p, BLOCKS_PER_TASK * QUERY_BLOCK)).collect();
            let (o, lse) = (Shared::new(&mut o), Shared::new(&mut lse));
            for_each_task(&tasks, madds(&parts), |(part, rows), scratch| {
                block::forward::<T, T>(part, rows.clone(), (&q, &k, &v), scratch, |row, o_v, lse_row| {
                    let at = part.lse_index(row);
                    // SAFETY: a row of o and of lse belongs to one document, head and token, hence to one task.
                    let (o, lse) = unsafe { (o.slice(part.o.range(row)), lse.slice(at..at + 1)) };
                    o.iter_mut().zip(o_v).for_each(|(o, &x)| *o = T::from_acc(x));
                    lse[0] = lse_row;
                });
            });
        });
    });
    Ok(())
}

/// I: assigns the gradients from that of o; `o` and `lse` are the forward's.
pub fn input_grad(s: &mut Stream, x: Inputs, o: Tensor, lse: Tensor, d_o: Tensor, grads: Grads) -> Result<()> {
    const OP: &str = "attention input gradient";
    let n = x.check(o, lse)?;
    expect_shape(OP, "do", d_o, &[n.t, n.h, n.v])?;
    expect_shape(OP, "dq", grads.dq, &[n.t, n.h, n.d])?;
    expect_shape(OP, "dk", grads.dk, &[n.t, n.g, n.d])?;
    expect_shape(OP, "dv", grads.dv, &[n.t, n.g, n.v])?;
    let reads: Vec<Tensor> = x.reads().into_iter().chain([o, lse, d_o]).collect();
    let kernels = |_: &Target| {
        (are_fast(&[x.q, o, d_o, grads.dq, grads.dk, grads.dv]) && n.d <= WIDEST && n.v <= WIDEST)
            .then(|| ptx::attention::input_grad(x, o, lse, d_o, grads))
    };
    s.launch_kernel(&reads, &[grads.dq, grads.dk, grads.dv], kernels, move |m| {
        with_float!(x.q.dtype, T => {
            let (q, k, v, o, d_o) = (m.read::<T>(x.q), m.read::<T>(x.k), m.read::<T>(x.v), m.read::<T>(o), m.read::<T>(d_o));
            let lse = m.read::<<T as Float>::Acc>(lse);
            let (mut dq, mut dk, mut dv) = (m.write::<T>(grads.dq), m.write::<T>(grads.dk), m.write::<T>(grads.dv));
            let parts = parts(&m.read::<u32>(x.doc_offsets), n, x.scale);
            let saved = Saved { q: &q, k: &k, v: &v, o: &o, lse: &lse, d_o: &d_o };
            let out = Outputs { dq: Shared::new(&mut dq), dk: Shared::new(&mut dk), dv: Shared::new(&mut dv) };
            for_each_task(&parts, madds(&parts), |part, scratch| backward::input_grad(part, saved, &out, scratch));
        });
    });
    Ok(())
}

/// (query, key) pairs of a causal document of `len` tokens.
pub fn causal_pairs(len: u64) -> u64 {
    len * (len + 1) / 2
}

/// Cost of the forward over documents with so many (query, key) pairs in total; the array is heads, kv heads, and the
/// widths of q and v.
pub fn cost(t: usize, pairs: u64, [h, g, d, v]: [usize; 4], elem_bytes: usize) -> Cost {
    let lse_bytes = elem_bytes.max(4);
    let read = t * (h * d + g * (d + v)) * elem_bytes;
    let written = t * h * (v * elem_bytes + lse_bytes);
    Cost { core_flops: 2 * pairs * (h * (d + v)) as u64, ..Cost::stream(0, read as u64, written as u64) }
}

/// Cost of the input gradient: five products, three over d and two over v.
pub fn input_grad_cost(t: usize, pairs: u64, [h, g, d, v]: [usize; 4], elem_bytes: usize) -> Cost {
    let qkv = t * (h * d + g * (d + v)) * elem_bytes;
    let read = qkv + t * h * (2 * v * elem_bytes + elem_bytes.max(4));
    Cost { core_grad_flops: 2 * pairs * (h * (3 * d + 2 * v)) as u64, ..Cost::stream(0, read as u64, qkv as u64) }
}
