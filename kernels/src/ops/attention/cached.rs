//! Attention of new tokens over a cache of keys and values: generation, and prompts in chunks.
//!
//! New tokens are appended to the cache and then attend to every row of their sequence up to their own, so a chunk of a prompt and a
//! generated token are the same call, and several sequences are too. On processors the bits of a token's output follow from its own
//! sequence alone.

use super::{
    block::{self, Part, Rows, Shared},
    for_each_task, madds, runs,
};
use crate::{
    cost::Cost,
    device::Target,
    dtype::Float,
    error::{Error, Result},
    ops::{are_fast, expect_shape, paged::Sequences},
    ptx,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// Query rows of one task: as many read a key while it is in the first cache.
const ROWS_PER_TASK: usize = 16;
/// The same where rows are few, so that each thread has some.
const FEW_ROWS_PER_TASK: usize = 4;

/// Keys and values of one layer.
#[derive(Clone, Copy, Debug)]
pub struct KvCache {
    /// [rows, g, d]
    pub k: Tensor,
    /// [rows, g, v]
    pub v: Tensor,
}

/// Writes the keys [n, g, d] and values [n, g, v] of the `n` new tokens of `sequences` at their rows.
///
/// # Errors
/// If shapes differ, or rows are not in the cache.
pub fn append(s: &mut Stream, k: Tensor, v: Tensor, cache: KvCache, sequences: &Sequences) -> Result<()> {
    const OP: &str = "append to the cache";
    let n = k.dim(0);
    expect_shape(OP, "k", k, &[n, cache.k.dim(1), cache.k.dim(2)])?;
    expect_shape(OP, "v", v, &[n, cache.v.dim(1), cache.v.dim(2)])?;
    for (new, old) in [(k, cache.k), (v, cache.v)] {
        sequences.check(OP, old, n)?;
        let kernels =
            |_: &Target| (new.dtype == old.dtype).then(|| ptx::attention::cached::append(new, old, sequences));
        let sequences = sequences.clone();
        s.launch_kernel(&[new], &[old], kernels, move |m| {
            let width = old.len() / old.dim(0).max(1);
            with_float!(new.dtype, T => {
                let (new, mut old) = (m.read::<T>(new), m.write::<T>(old));
                for run in sequences.runs() {
                    let new = &new[run.tokens.start * width..run.tokens.end * width];
                    old[run.row * width..][..new.len()].copy_from_slice(new);
                }
            });
        });
    }
    Ok(())
}

/// Assigns o [n, h, v]: the new tokens q [n, h, d] of `sequences`, already appended, over the rows of their sequence up to their own.
///
/// # Errors
/// If shapes differ, or rows are not in the cache.
pub fn forward(s: &mut Stream, q: Tensor, cache: KvCache, sequences: &Sequences, scale: f64, o: Tensor) -> Result<()> {
    const OP: &str = "cached attention";
    let (n, h) = (q.dim(0), q.dim(1));
    let (capacity, g, d, width) = (cache.k.dim(0), cache.k.dim(1), cache.k.dim(2), cache.v.dim(2));
    expect_shape(OP, "q", q, &[n, h, d])?;
    expect_shape(OP, "v cache", cache.v, &[capacity, g, width])?;
    expect_shape(OP, "o", o, &[n, h, width])?;
    sequences.check(OP, cache.k, n)?;
    if g == 0 || h % g != 0 {
        let expected = format!("[{capacity}, g, {d}] with g kv heads that divide the {h} heads");
        return Err(Error::Shape { op: OP, role: "k cache", expected, found: cache.k });
    }
    let kernels = |_: &Target| {
        (are_fast(&[q, cache.k, cache.v, o]) && d <= super::WIDEST && width <= super::WIDEST)
            .then(|| ptx::attention::cached::forward(q, cache, sequences, scale, o))
    };
    let sequences = sequences.clone();
    s.launch_kernel(&[q, cache.k, cache.v], &[o], kernels, move |m| {
        let part = |(first, sequence), head: usize| {
            let table = sequences.table(sequence);
            Part {
                q: Rows::new(first, g, head, h / g, d),
                k: Rows::new(0, g, head, 1, d),
                v: Rows::new(0, g, head, 1, width),
                o: Rows::new(first, g, head, h / g, width),
                table,
                num_tokens: sequence.num_new,
                context: sequence.context,
                scale,
            }
        };
        with_float!(q.dtype, T => {
            let (q, k, v) = (m.read::<T>(q), m.read::<T>(cache.k), m.read::<T>(cache.v));
            let parts: Vec<Part> = sequences.iter().flat_map(|at| (0..g).map(move |head| part(at, head))).collect();
            attend::<T, T, T>(&parts, &q, &k, &v, &mut m.write::<T>(o));
        });
    });
    Ok(())
}

/// Attention of `parts`, each row by itself.
pub(crate) fn attend<Q, T, O>(parts: &[Part], q: &[Q], k: &[T], v: &[T], o: &mut [O])
where
    Q: Float,
    T: Float<Acc = Q::Acc>,
    O: Float<Acc = Q::Acc>,
{
    let few = parts.iter().map(Part::num_rows).sum::<usize>() <= 2 * ROWS_PER_TASK;
    let madds = madds(parts);
    let alone = few && madds >= super::MIN_PARALLEL_MADDS;
    let len = if alone { FEW_ROWS_PER_TASK } else { ROWS_PER_TASK };
    let tasks: Vec<_> = parts.iter().flat_map(|p| runs(p, len)).collect();
    let o = Shared::new(o);
    for_each_task(&tasks, madds, |(part, rows), scratch| {
        let store = |row: usize, o_v: &[Q::Acc], _: Q::Acc| {
            // SAFETY: a row of o belongs to one head and token, hence to one task.
            let o = unsafe { o.slice(part.o.range(row)) };
            o.iter_mut().zip(o_v).for_each(|(o, &x)| *o = O::from_acc(x));
        };
        block::forward_rows(part, rows.clone(), (q, k, v), scratch, store);
    });
}

/// Cost of `n` new tokens after `at` cached ones; the array as in [`super::cost`].
pub fn cost(n: usize, at: usize, [h, g, d, v]: [usize; 4], elem_bytes: usize) -> Cost {
    let pairs = super::causal_pairs((at + n) as u64) - super::causal_pairs(at as u64);
    let read = (n * h * d + (at + n) * g * (d + v)) * elem_bytes;
    let bytes = Cost::stream(0, read as u64, (n * h * v * elem_bytes) as u64);
    Cost { core_flops: 2 * pairs * (h * (d + v)) as u64, ..bytes }
}
