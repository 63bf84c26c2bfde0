//! Attention of new tokens over a cache of keys and values: generation, and the prompt in chunks.
//!
//! A cache holds one sequence: row p of k [capacity, g, d] and v [capacity, g, v] is position p. New tokens are appended and
//! then attend to every row up to their own, so a chunk of a prompt and a generated token are the same call.

use super::{
    block::{self, Part, QUERY_BLOCK, Rows, Shared},
    for_each_task, madds, runs,
};
use crate::{
    cost::Cost,
    device::Target,
    dtype::Float,
    error::{Error, Result},
    ops::{are_fast, expect_shape},
    ptx,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// Query rows up to which dot products beat packing the keys for products of matrices.
const MAX_DOT_ROWS: usize = 16;
/// Query rows of one task, for dot products.
const DOT_ROWS_PER_TASK: usize = 4;

/// Keys and values of one sequence and layer.
#[derive(Clone, Copy, Debug)]
pub struct KvCache {
    /// [capacity, g, d]
    pub k: Tensor,
    /// [capacity, g, v]
    pub v: Tensor,
}

/// `Err` unless rows `at..at + n` lie in a cache of `capacity` rows.
pub(crate) fn expect_room(op: &'static str, cache: Tensor, at: usize, n: usize) -> Result<()> {
    if at + n <= cache.dim(0) {
        return Ok(());
    }
    let expected = format!("at least {} rows to hold {n} more after {at}", at + n);
    Err(Error::Shape { op, role: "cache", expected, found: cache })
}

/// Writes the keys [n, g, d] and values [n, g, v] of `n` tokens at rows `at..at + n`.
pub fn append(s: &mut Stream, k: Tensor, v: Tensor, cache: KvCache, at: usize) -> Result<()> {
    const OP: &str = "append to the cache";
    let n = k.dim(0);
    expect_shape(OP, "k", k, &[n, cache.k.dim(1), cache.k.dim(2)])?;
    expect_shape(OP, "v", v, &[n, cache.v.dim(1), cache.v.dim(2)])?;
    for (new, old) in [(k, cache.k), (v, cache.v)] {
        expect_room(OP, old, at, n)?;
        let width = new.len() / n.max(1);
        let kernels = |_: &Target| {
            (new.dtype == old.dtype).then(|| ptx::elementwise::copy(new, old.slice(at * width, new.len())))
        };
        s.launch_kernel(&[new], &[old], kernels, move |m| {
            with_float!(new.dtype, T => {
                m.write::<T>(old)[at * width..(at + n) * width].copy_from_slice(&m.read::<T>(new));
            });
        });
    }
    Ok(())
}

/// Assigns o [n, h, v]: tokens q [n, h, d] at positions `at..at + n`, already appended, over rows `0..=` their own.
pub fn forward(s: &mut Stream, q: Tensor, cache: KvCache, at: usize, scale: f64, o: Tensor) -> Result<()> {
    const OP: &str = "cached attention";
    let (n, h) = (q.dim(0), q.dim(1));
    let (capacity, g, d, width) = (cache.k.dim(0), cache.k.dim(1), cache.k.dim(2), cache.v.dim(2));
    expect_shape(OP, "q", q, &[n, h, d])?;
    expect_shape(OP, "v cache", cache.v, &[capacity, g, width])?;
    expect_shape(OP, "o", o, &[n, h, width])?;
    expect_room(OP, cache.k, at, n)?;
    if g == 0 || h % g != 0 {
        let expected = format!("[{capacity}, g, {d}] with g kv heads that divide the {h} heads");
        return Err(Error::Shape { op: OP, role: "k cache", expected, found: cache.k });
    }
    let part = move |head: usize| Part {
        q: Rows::new(0, g, head, h / g, d),
        k: Rows::new(0, g, head, 1, d),
        v: Rows::new(0, g, head, 1, width),
        o: Rows::new(0, g, head, h / g, width),
        num_tokens: n,
        context: at,
        scale,
    };
    let kernels = |_: &Target| {
        (are_fast(&[q, cache.k, cache.v, o]) && d <= super::WIDEST && width <= super::WIDEST)
            .then(|| ptx::attention::cached::forward(q, cache, at, scale, o))
    };
    s.launch_kernel(&[q, cache.k, cache.v], &[o], kernels, move |m| {
        with_float!(q.dtype, T => {
            let (q, k, v) = (m.read::<T>(q), m.read::<T>(cache.k), m.read::<T>(cache.v));
            let parts: Vec<Part> = (0..g).map(part).collect();
            attend::<T, T, T>(&parts, &q, &k, &v, &mut m.write::<T>(o));
        });
    });
    Ok(())
}

/// Attention of `parts`, by dot products where there are few query rows, else by blocks.
pub(crate) fn attend<Q, T, O>(parts: &[Part], q: &[Q], k: &[T], v: &[T], o: &mut [O])
where
    Q: Float,
    T: Float<Acc = Q::Acc>,
    O: Float<Acc = Q::Acc>,
{
    let few = parts.iter().all(|p| p.num_rows() <= MAX_DOT_ROWS);
    let len = if few { DOT_ROWS_PER_TASK } else { QUERY_BLOCK * super::BLOCKS_PER_TASK };
    let madds = madds(parts);
    let len = if few && madds < super::MIN_PARALLEL_MADDS { MAX_DOT_ROWS } else { len };
    let tasks: Vec<_> = parts.iter().flat_map(|p| runs(p, len)).collect();
    let o = Shared::new(o);
    for_each_task(&tasks, madds, |(part, rows), scratch| {
        let store = |row: usize, o_v: &[Q::Acc], _: Q::Acc| {
            // SAFETY: a row of o belongs to one head and token, hence to one task.
            let o = unsafe { o.slice(part.o.range(row)) };
            o.iter_mut().zip(o_v).for_each(|(o, &x)| *o = O::from_acc(x));
        };
        if few {
            block::forward_rows(part, rows.clone(), (q, k, v), scratch, store);
        } else {
            block::forward(part, rows.clone(), (q, k, v), scratch, store);
        }
    });
}

/// Cost of `n` new tokens after `at` cached ones; the array as in [`super::cost`].
pub fn cost(n: usize, at: usize, [h, g, d, v]: [usize; 4], elem_bytes: usize) -> Cost {
    let pairs = super::causal_pairs((at + n) as u64) - super::causal_pairs(at as u64);
    let read = (n * h * d + (at + n) * g * (d + v)) * elem_bytes;
    let bytes = Cost::stream(0, read as u64, (n * h * v * elem_bytes) as u64);
    Cost { core_flops: 2 * pairs * (h * (d + v)) as u64, ..bytes }
}
