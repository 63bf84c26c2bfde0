//! Latent attention over a cache of latents: generation.
//!
//! A head's keys and values are linear in the normalized latent c_p of position p: k_p = W_k c_p, v_p = W_v c_p. So
//! q . k_p = (W_k^T q) . c_p and sum_p a_p v_p = W_v (sum_p a_p c_p): absorbing W_k into the query and W_v into the output leaves
//! attention with one shared key head over rows of (c_p, rotated key part), and a cache of c + r numbers a token instead of
//! h (n + r + v). Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1.2.
//!
//! A cache holds the sequences of one layer, as [`crate::ops::paged`] says: rows of numbers [rows, c + r], or of bytes in FP8 ([`Fp8Row`]).
//! The core is that of [`crate::ops::attention::cached`], and as there the bits of a token's output follow from its own sequence alone, on
//! processors. For many new tokens there is a cheaper way, [`super::expanded`].

use rayon::prelude::*;

use super::{
    expanded::{self, expanded},
    fp8_row::Fp8Row,
};
use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float, Real},
    error::{Error, Result},
    fp8::Scaling,
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
        paged::{Sequence, Sequences, Table},
        parallel::for_row_chunks,
        rope::{RopeTable, Turn},
    },
    ptx::{self, quantize::Recipe},
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// Numbers of a decoded cache at a time, at most; more only for a sequence that is longer.
const MAX_DECODED: usize = 16 << 20;

/// Elements of a row of a cache.
fn row_elements(cache: Tensor, c: usize, r: usize) -> usize {
    if is_fp8(cache) { Fp8Row { c, r }.bytes() } else { c + r }
}

fn is_fp8(cache: Tensor) -> bool {
    cache.dtype == DType::U8
}

/// Writes the m new tokens of `sequences` at their rows of the cache, [rows, c + r] of the activations' type or U8
/// [rows, [`Fp8Row::bytes`]]: the normalized latents [m, c], and the last r columns of kv_a [m, c + r] rotated to their positions.
///
/// # Errors
/// If shapes or types differ, or rows are not in the cache.
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
    expect_shape(OP, "latent", latent, &[tokens, c])?;
    expect_shape(OP, "kv_a", kv_a, &[tokens, c + r])?;
    expect_shape(OP, "cache", cache, &[cache.dim(0), row_elements(cache, c, r)])?;
    expect_cache(OP, kv_a, cache)?;
    sequences.check(OP, cache, tokens)?;
    table.check(OP, kv_a)?;
    let table = *table;
    let kernels = |on: &Target| {
        let recipe = Recipe::new(on, Scaling::PowerOfTwo);
        are_fast(&[latent, kv_a]).then(|| ptx::latent::append(latent, kv_a, &table, (cache, recipe), sequences))
    };
    let sequences = sequences.clone();
    s.launch_kernel(&[latent, kv_a, table.cos, table.sin], &[cache], kernels, move |m| {
        with_float!(kv_a.dtype, T => {
            type A = <T as Float>::Acc;
            let (latent, kv_a) = (m.read::<T>(latent), m.read::<T>(kv_a));
            let (cos, sin) = (m.read::<A>(table.cos), m.read::<A>(table.sin));
            let turn = |position| Turn::new(&cos, &sin, table.pairs, r, position, false);
            let new = New { latent: &latent, kv_a: &kv_a, widths: [c, c + r], turn };
            if is_fp8(cache) {
                new.put(&sequences, &mut m.write::<u8>(cache), Fp8Row { c, r }.bytes(), #[inline(always)] |latent, key, row| {
                    Fp8Row { c, r }.encode(latent, key, row);
                });
            } else {
                new.put(&sequences, &mut m.write::<T>(cache), c + r, #[inline(always)] |latent, key, row| {
                    row[..c].copy_from_slice(latent);
                    row[c..].copy_from_slice(key);
                });
            }
        });
    });
    Ok(())
}

/// `Err` unless a cache holds what activations are made of, or FP8.
fn expect_cache(op: &'static str, x: Tensor, cache: Tensor) -> Result<()> {
    if is_fp8(cache) || cache.dtype == x.dtype {
        return Ok(());
    }
    let expected = format!("{:?}, or rows of FP8 in U8", x.dtype);
    Err(Error::Shape { op, role: "cache", expected, found: cache })
}

/// New tokens, and how the key part of one is rotated to a position.
struct New<'a, T, F> {
    latent: &'a [T],
    kv_a: &'a [T],
    /// Of their rows.
    widths: [usize; 2],
    turn: F,
}

impl<'a, T: Float, F: Fn(usize) -> Turn<'a, T::Acc>> New<'_, T, F> {
    /// Calls `put(latent, rotated key part, row)` for each, with rows of so many elements.
    #[inline(always)]
    fn put<E>(&self, sequences: &Sequences, cache: &mut [E], row_elements: usize, put: impl Fn(&[T], &[T], &mut [E])) {
        let [c, width] = self.widths;
        vectorize(
            #[inline(always)]
            || {
                let mut key = Vec::new();
                for run in sequences.runs() {
                    let rows = cache[run.row * row_elements..].chunks_exact_mut(row_elements);
                    for (i, row) in rows.take(run.tokens.len()).enumerate() {
                        let token = run.tokens.start + i;
                        key.clear();
                        key.extend_from_slice(&self.kv_a[token * width + c..(token + 1) * width]);
                        (self.turn)(run.position + i).apply(&mut key);
                        put(&self.latent[token * c..][..c], &key, row);
                    }
                }
            },
        );
    }
}

#[derive(Clone, Copy)]
pub(super) struct Sizes {
    pub h: usize,
    pub n: usize,
    pub r: usize,
    pub v: usize,
    pub c: usize,
}

/// How rows of a cache are kept.
#[derive(Clone, Copy)]
pub(super) enum Cached<'a, T> {
    Numbers(&'a [T]),
    Fp8(&'a [u8]),
}

impl<T: Float> Cached<'_, T> {
    /// Assigns the rows of a sequence [len, c + r], one after the other, as numbers.
    pub(super) fn numbers(self, z: Sizes, table: Table, out: &mut [T::Acc]) {
        let (layout, width) = (Fp8Row { c: z.c, r: z.r }, z.c + z.r);
        for_row_chunks(
            out,
            width,
            #[inline(always)]
            |first, rows| {
                for (position, out) in (first..).zip(rows.chunks_exact_mut(width)) {
                    let row = table.row(position);
                    match self {
                        Cached::Numbers(cache) => {
                            out.iter_mut().zip(&cache[row * width..]).for_each(|(out, x)| *out = x.to_acc());
                        }
                        Cached::Fp8(cache) => layout.decode(&cache[row * layout.bytes()..][..layout.bytes()], out),
                    }
                }
            },
        );
    }
}

/// Which way attention takes through the latents of a sequence.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Prefill {
    /// Always in latent space: on processors a token's bits follow from its own sequence alone, however it is cut.
    #[default]
    Absorbed,
    /// On processors with keys and values where they are cheaper, [`expanded::is_cheaper`]. Cutting a prompt in other places then changes bits.
    ByCost,
}

/// Assigns o [m, h, v]: the new tokens q [m, h, n + r] (rotated) of `sequences`, already appended to the cache ([`append`]), over
/// the rows of their sequence up to their own. `w_kv_b` [h * (n + v), c] is the up-projection, of q's type or bf16 under f32. The
/// scratch is m * h * (2 c + r) numbers, and with FP8 c + r for each row that is read: feed long prompts in chunks.
///
/// # Errors
/// If shapes or types differ, or rows are not in the cache.
pub fn forward(
    s: &mut Stream,
    q: Tensor,
    w_kv_b: Tensor,
    cache: Tensor,
    sequences: &Sequences,
    (scale, prefill): (f64, Prefill),
    o: Tensor,
) -> Result<()> {
    const OP: &str = "absorbed attention";
    let (tokens, h, v, c) = (q.dim(0), q.dim(1), o.dim(2), w_kv_b.dim(1));
    let wrong = |role, expected, found| Err(Error::Shape { op: OP, role, expected, found });
    if h == 0 || w_kv_b.dim(0) < h * v || !is_fp8(cache) && cache.cols() < c {
        return wrong("w_kv_b", format!("[{h} * (n + {v}), c] for a cache of rows c + r"), w_kv_b);
    }
    let n = w_kv_b.dim(0) / h - v;
    let r = if is_fp8(cache) { q.dim(2).saturating_sub(n) } else { cache.cols() - c };
    expect_shape(OP, "w_kv_b", w_kv_b, &[h * (n + v), c])?;
    expect_shape(OP, "q", q, &[tokens, h, n + r])?;
    expect_shape(OP, "o", o, &[tokens, h, v])?;
    expect_shape(OP, "cache", cache, &[cache.dim(0), row_elements(cache, c, r)])?;
    sequences.check(OP, cache, tokens)?;
    expect_weight(OP, q, w_kv_b)?;
    expect_cache(OP, q, cache)?;
    let z = Sizes { h, n, r, v, c };
    let kernels = |on: &Target| {
        (are_fast(&[q, o]) && is_fast(w_kv_b) && c <= ptx::latent::MAX_LATENT).then(|| {
            ptx::latent::forward(q, w_kv_b, (cache, Recipe::new(on, Scaling::PowerOfTwo)), sequences, scale, o)
        })
    };
    let sequences = sequences.clone();
    s.launch_kernel(&[q, w_kv_b, cache], &[o], kernels, move |m| {
        with_weight!(q, w_kv_b, T, W => {
            let (q, w, mut o) = (m.read::<T>(q), m.read::<W>(w_kv_b), m.write::<T>(o));
            let mut run = |cached: Cached<T>| {
                let is_cheaper = |sequence: &Sequence| {
                    prefill == Prefill::ByCost && expanded::is_cheaper(sequence.num_new, sequence.context, [h, n, r, v, c])
                };
                let (long, short): (Vec<_>, Vec<_>) = sequences.iter().partition(|(_, sequence)| is_cheaper(sequence));
                let call = Call { z, q: &q, w: &w, cached, sequences: &sequences, scale };
                absorbed(call, &short, &mut o);
                long.into_iter().for_each(|at| expanded(call, at, &mut o));
            };
            if is_fp8(cache) {
                run(Cached::Fp8(&m.read::<u8>(cache)));
            } else {
                run(Cached::Numbers(&m.read::<T>(cache)));
            }
        });
    });
    Ok(())
}

/// What is computed, but for which sequences.
#[derive(Clone, Copy)]
pub(super) struct Call<'a, T, W> {
    pub z: Sizes,
    /// [m, h, n + r]
    pub q: &'a [T],
    /// [h (n + v), c]
    pub w: &'a [W],
    pub cached: Cached<'a, T>,
    pub sequences: &'a Sequences,
    pub scale: f64,
}

/// Calls `run(head, its part of out)`, on the pool if the weight is read often enough for that to pay.
fn for_each_head<A: Send>(out: &mut [A], per_head: usize, madds: usize, run: impl Fn(usize, &mut [A]) + Sync) {
    if madds < MIN_PARALLEL_MADDS {
        out.chunks_exact_mut(per_head).enumerate().for_each(|(h, out)| run(h, out));
    } else {
        out.par_chunks_exact_mut(per_head).enumerate().for_each(|(h, out)| run(h, out));
    }
}

/// `of` are sequences with their first tokens.
fn absorbed<T: Float, W: Float<Acc = T::Acc>>(call: Call<T, W>, of: &[(usize, &Sequence)], o: &mut [T]) {
    let Call { z, q, w, .. } = call;
    let Sizes { h, n, r, v, c } = z;
    // Tokens of these sequences, one after the other.
    let all: Vec<usize> = of.iter().flat_map(|(first, sequence)| *first..first + sequence.num_new).collect();
    let (tokens, width) = (all.len(), c + r);
    if tokens == 0 || n + v == 0 {
        return;
    }
    let zero = T::Acc::default();
    // Queries and outputs in latent space lie head by head, [h, m, width]: each head's weight is applied to its own block.
    let mut q_hmw = vec![zero; h * tokens * width];
    for_each_head(&mut q_hmw, tokens * width, h * tokens * n * c, |head, q_mw| {
        let w_nc = &w[head * (n + v) * c..][..n * c];
        let q_rows = |t: usize| &q[(all[t] * h + head) * (n + r)..][..n + r];
        absorb_query(z, q_rows, w_nc, q_mw);
    });
    let mut o_hmc = vec![zero; h * tokens * c];
    in_latent_space(call, of, &q_hmw, &mut o_hmc);
    let mut o_hmv = q_hmw;
    o_hmv.resize(h * tokens * v, zero);
    for_each_head(&mut o_hmv, tokens * v, h * tokens * v * c, |head, o_mv| {
        let w_vc = &w[(head * (n + v) + n) * c..][..v * c];
        expand_output(z, &o_hmc[head * tokens * c..][..tokens * c], w_vc, o_mv);
    });
    for (t, token) in all.into_iter().enumerate() {
        for (head, o_v) in o[token * h * v..][..h * v].chunks_exact_mut(v).enumerate() {
            for (o, &x) in o_v.iter_mut().zip(&o_hmv[(head * tokens + t) * v..]) {
                *o = T::from_acc(x);
            }
        }
    }
}

/// Attention with one key head for all, over the cache as it is, or as what its bytes say: each sequence's rows are decoded once for all
/// heads, which costs less than a tile's worth of scores each time they are read.
fn in_latent_space<T: Float, W>(
    Call { z, cached, sequences, scale, .. }: Call<T, W>,
    of: &[(usize, &Sequence)],
    q_hmw: &[T::Acc],
    o_hmc: &mut [T::Acc],
) {
    let Sizes { h, r, c, .. } = z;
    let (width, tokens) = (c + r, o_hmc.len() / (h * c).max(1));
    let rows = |first: usize, stride: usize| Rows {
        first: first * stride,
        token_stride: stride,
        head_stride: tokens * stride,
        group: h,
        width: stride,
    };
    let key = |first: usize, width: usize| Rows {
        first: first * (c + r),
        token_stride: c + r,
        head_stride: 0,
        group: 1,
        width,
    };
    let firsts = of.iter().scan(0, |next, (_, sequence)| {
        let first = *next;
        *next += sequence.num_new;
        Some((first, *sequence))
    });
    let all: Vec<(usize, &Sequence)> = firsts.filter(|(_, sequence)| sequence.num_new > 0).collect();
    let part = |(first, sequence): (usize, &Sequence), first_row: usize, table| Part {
        q: rows(first, width),
        k: key(first_row, width),
        v: key(first_row, c),
        o: rows(first, c),
        table,
        num_tokens: sequence.num_new,
        context: sequence.context,
        scale,
    };
    if let Cached::Numbers(cache) = cached {
        let parts: Vec<Part> = all.iter().map(|&at| part(at, 0, sequences.table(at.1))).collect();
        return attend::<T::Acc, T, T::Acc>(&parts, q_hmw, cache, cache, o_hmc);
    }
    let mut numbers = Vec::new();
    let mut rest = &all[..];
    while let Some((_, first)) = rest.first() {
        let mut num_rows = first.len();
        let more = rest[1..].iter().take_while(|(_, sequence)| {
            num_rows += sequence.len();
            num_rows * width <= MAX_DECODED
        });
        let (now, later) = rest.split_at(1 + more.count());
        rest = later;
        numbers.resize(now.iter().map(|(_, sequence)| sequence.len()).sum::<usize>() * width, T::Acc::default());
        let (mut parts, mut first_row) = (Vec::new(), 0);
        for &at in now {
            let out = &mut numbers[first_row * width..(first_row + at.1.len()) * width];
            cached.numbers(z, sequences.table(at.1), out);
            parts.push(part(at, first_row, Table::IDENTITY));
            first_row += at.1.len();
        }
        attend::<T::Acc, T::Acc, T::Acc>(&parts, q_hmw, &numbers, &numbers, o_hmc);
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
    A: Real,
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
