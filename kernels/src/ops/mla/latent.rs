//! Latent attention over a cache of latents: generation.
//!
//! A head's keys and values are linear in the normalized latent c_p of position p: k_p = W_k c_p, v_p = W_v c_p. So
//! q . k_p = (W_k^T q) . c_p and sum_p a_p v_p = W_v (sum_p a_p c_p): absorbing W_k into the query and W_v into the output leaves
//! attention with one shared key head over rows of (c_p, rotated key part), and a cache of c + r numbers a token instead of
//! h (n + r + v). Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
//!
//! A cache holds the sequences of one layer, as [`crate::ops::paged`] says. The core is that of [`crate::ops::attention::cached`], and as
//! there the bits of a token's output follow from its own sequence alone, on processors.

use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::Float,
    error::{Error, Result},
    ops::{
        are_fast,
        attention::{
            MIN_PARALLEL_MADDS,
            block::{Part, Rows},
            cached::attend,
        },
        expect_shape,
        gemv::{expect_weight, with_weight},
        is_fast, lanes,
        paged::Sequences,
        rope::{RopeTable, Turn},
    },
    ptx,
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// Writes the m new tokens of `sequences` at their rows of the cache [rows, c + r]: the normalized latents [m, c], and the last r
/// columns of kv_a [m, c + r] rotated to their positions.
///
/// # Errors
/// If shapes differ, or rows are not in the cache.
pub fn append(
    s: &mut Stream,
    latent: Tensor,
    kv_a: Tensor,
    table: &RopeTable,
    cache: Tensor,
    sequences: &Sequences,
) -> Result<()> {
    const OP: &str = "append to the latent cache";
    let (tokens, c, r) = (latent.dim(0), latent.cols(), table.dim());
    let width = c + r;
    expect_shape(OP, "latent", latent, &[tokens, c])?;
    expect_shape(OP, "kv_a", kv_a, &[tokens, width])?;
    expect_shape(OP, "cache", cache, &[cache.dim(0), width])?;
    sequences.check(OP, cache, tokens)?;
    table.check(OP, cache)?;
    let table = *table;
    let kernels = |_: &Target| {
        (are_fast(&[latent, kv_a, cache])).then(|| ptx::latent::append(latent, kv_a, &table, cache, sequences))
    };
    let sequences = sequences.clone();
    s.launch_kernel(&[latent, kv_a, table.cos, table.sin], &[cache], kernels, move |m| {
        with_float!(cache.dtype, T => {
            type A = <T as Float>::Acc;
            let (latent, kv_a, mut cache) = (m.read::<T>(latent), m.read::<T>(kv_a), m.write::<T>(cache));
            let (cos, sin) = (m.read::<A>(table.cos), m.read::<A>(table.sin));
            for run in sequences.runs() {
                let rows = cache[run.row * width..].chunks_exact_mut(width);
                for (i, row) in rows.take(run.tokens.len()).enumerate() {
                    let (token, position) = (run.tokens.start + i, run.position + i);
                    row[..c].copy_from_slice(&latent[token * c..][..c]);
                    row[c..].copy_from_slice(&kv_a[token * width + c..][..r]);
                    Turn::new(&cos, &sin, table.pairs, r, position, false).apply(&mut row[c..]);
                }
            }
        });
    });
    Ok(())
}

#[derive(Clone, Copy)]
struct Sizes {
    tokens: usize,
    h: usize,
    n: usize,
    v: usize,
    c: usize,
    r: usize,
}

/// Assigns o [m, h, v]: the new tokens q [m, h, n + r] (rotated) of `sequences`, already appended to the cache [rows, c + r], over
/// the rows of their sequence up to their own. `w_kv_b` [h * (n + v), c] is the up-projection, of q's type or bf16 under f32. The
/// scratch is m * h * (2 c + r) numbers: feed long prompts in chunks.
///
/// # Errors
/// If shapes or types differ, or rows are not in the cache.
pub fn forward(
    s: &mut Stream,
    q: Tensor,
    w_kv_b: Tensor,
    cache: Tensor,
    sequences: &Sequences,
    scale: f64,
    o: Tensor,
) -> Result<()> {
    const OP: &str = "absorbed attention";
    let (tokens, h, v, c) = (q.dim(0), q.dim(1), o.dim(2), w_kv_b.dim(1));
    let wrong = |role, expected, found| Err(Error::Shape { op: OP, role, expected, found });
    if h == 0 || w_kv_b.dim(0) < h * v || cache.cols() < c {
        return wrong("w_kv_b", format!("[{h} * (n + {v}), c] for a cache of rows c + r"), w_kv_b);
    }
    let (n, r) = (w_kv_b.dim(0) / h - v, cache.cols() - c);
    expect_shape(OP, "w_kv_b", w_kv_b, &[h * (n + v), c])?;
    expect_shape(OP, "q", q, &[tokens, h, n + r])?;
    expect_shape(OP, "o", o, &[tokens, h, v])?;
    expect_shape(OP, "cache", cache, &[cache.dim(0), c + r])?;
    sequences.check(OP, cache, tokens)?;
    expect_weight(OP, q, w_kv_b)?;
    if cache.dtype != q.dtype {
        return wrong("cache", format!("{:?}", q.dtype), cache);
    }
    let z = Sizes { tokens, h, n, v, c, r };
    let kernels = |_: &Target| {
        (are_fast(&[q, cache, o]) && is_fast(w_kv_b) && c <= ptx::latent::MAX_LATENT)
            .then(|| ptx::latent::forward(q, w_kv_b, cache, sequences, scale, o))
    };
    let sequences = sequences.clone();
    s.launch_kernel(&[q, w_kv_b, cache], &[o], kernels, move |m| {
        with_weight!(q, w_kv_b, T, W => {
            let (q, w, cache) = (m.read::<T>(q), m.read::<W>(w_kv_b), m.read::<T>(cache));
            absorbed::<T, W>(z, &q, &w, &cache, &sequences, scale, &mut m.write::<T>(o));
        });
    });
    Ok(())
}

/// Calls `run(head, its part of out)`, on the pool if the weight is read often enough for that to pay.
fn for_each_head<A: Send>(out: &mut [A], per_head: usize, madds: usize, run: impl Fn(usize, &mut [A]) + Sync) {
    if madds < MIN_PARALLEL_MADDS {
        out.chunks_exact_mut(per_head).enumerate().for_each(|(h, out)| run(h, out));
    } else {
        out.par_chunks_exact_mut(per_head).enumerate().for_each(|(h, out)| run(h, out));
    }
}

fn absorbed<T: Float, W: Float<Acc = T::Acc>>(
    z: Sizes,
    q: &[T],
    w: &[W],
    cache: &[T],
    sequences: &Sequences,
    scale: f64,
    o: &mut [T],
) {
    let Sizes { tokens, h, n, v, c, r } = z;
    if tokens == 0 || n + v == 0 {
        return;
    }
    let width = c + r;
    let zero = T::Acc::default();
    // Queries and outputs in latent space lie head by head, [h, m, width]: each head's weight is applied to its own block.
    let mut q_hmw = vec![zero; h * tokens * width];
    for_each_head(&mut q_hmw, tokens * width, h * tokens * n * c, |head, q_mw| {
        let w_nc = &w[head * (n + v) * c..][..n * c];
        let q_rows = |t: usize| &q[(t * h + head) * (n + r)..][..n + r];
        absorb_query(z, q_rows, w_nc, q_mw);
    });
    let rows = |first: usize, stride: usize| Rows {
        first: first * stride,
        token_stride: stride,
        head_stride: tokens * stride,
        group: h,
        width: stride,
    };
    let key = Rows { first: 0, token_stride: width, head_stride: 0, group: 1, width };
    let part = |(first, sequence)| Part {
        q: rows(first, width),
        k: key,
        v: Rows { width: c, ..key },
        o: rows(first, c),
        table: sequences.table(sequence),
        num_tokens: sequence.num_new,
        context: sequence.context,
        scale,
    };
    let parts: Vec<Part> = sequences.iter().map(part).collect();
    let mut o_hmc = vec![zero; h * tokens * c];
    attend::<T::Acc, T, T::Acc>(&parts, &q_hmw, cache, cache, &mut o_hmc);
    let mut o_hmv = q_hmw;
    o_hmv.resize(h * tokens * v, zero);
    for_each_head(&mut o_hmv, tokens * v, h * tokens * v * c, |head, o_mv| {
        let w_vc = &w[(head * (n + v) + n) * c..][..v * c];
        expand_output(z, &o_hmc[head * tokens * c..][..tokens * c], w_vc, o_mv);
    });
    for (i, o_v) in o.chunks_exact_mut(v).enumerate() {
        let (t, head) = (i / h, i % h);
        for (o, &x) in o_v.iter_mut().zip(&o_hmv[(head * tokens + t) * v..]) {
            *o = T::from_acc(x);
        }
    }
}

/// One head: `q_mw = (q_n W_nc, q_r)`, token by token.
fn absorb_query<'a, T: Float, W: Float<Acc = T::Acc>>(
    Sizes { n, c, r, .. }: Sizes,
    q: impl Fn(usize) -> &'a [T],
    w_nc: &[W],
    q_mw: &mut [T::Acc],
) {
    vectorize(
        #[inline(always)]
        || {
            for (t, row) in q_mw.chunks_exact_mut(c + r).enumerate() {
                let (q_n, q_r) = q(t).split_at(n);
                for (x, w_c) in q_n.iter().zip(w_nc.chunks_exact(c)) {
                    lanes::add_scaled(&mut row[..c], x.to_acc(), w_c);
                }
                for (out, x) in row[c..].iter_mut().zip(q_r) {
                    *out = x.to_acc();
                }
            }
        },
    );
}

/// One head: `o_mv = o_mc W_vc^T`, token by token.
fn expand_output<A, W>(Sizes { v, c, .. }: Sizes, o_mc: &[A], w_vc: &[W], o_mv: &mut [A])
where
    A: crate::dtype::Real,
    W: Float<Acc = A>,
{
    vectorize(
        #[inline(always)]
        || {
            for (o_c, o_v) in o_mc.chunks_exact(c).zip(o_mv.chunks_exact_mut(v)) {
                let (fours, rest) = o_v.as_chunks_mut::<4>();
                let split = fours.len() * 4 * c;
                for (out, w) in fours.iter_mut().zip(w_vc.chunks_exact(4 * c)) {
                    *out = lanes::dot4(w, o_c);
                }
                for (out, w) in rest.iter_mut().zip(w_vc[split..].chunks_exact(c)) {
                    *out = lanes::dot(w, o_c);
                }
            }
        },
    );
}

/// Cost of `m` new tokens after `at` cached ones, with heads and widths `[h, n, r, v, c]`.
pub fn cost(m: usize, at: usize, [h, n, r, v, c]: [usize; 5], elem_bytes: usize, weight_bytes: usize) -> Cost {
    let core = crate::ops::attention::cached::cost(m, at, [h, 1, c + r, c], elem_bytes);
    let weight = h * (n + v) * c;
    Cost {
        product_flops: 2 * (m * weight) as u64,
        read_bytes: (((at + m) * (c + r) + m * h * (n + r)) * elem_bytes + weight * weight_bytes) as u64,
        written_bytes: (m * h * v * elem_bytes) as u64,
        cast_elements: (m * h * (n + c)) as u64,
        ..core
    }
}
