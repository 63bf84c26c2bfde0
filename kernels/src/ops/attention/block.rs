//! The attention of one kv head over one span of keys, block by block.
//!
//! Query rows are (token, head of the group) pairs, tokens outermost: all heads that share a key head make one tall matrix, so
//! multi-head, grouped and latent (one key head for all) attention are the same code. Blocks of query rows meet blocks of keys
//! in two products; the softmax between keeps a running maximum and sum, so scores never leave the second cache. Keys beyond a
//! block's last visible one are not touched. Block sizes are constants: the bits do not depend on the number of threads.
//!
//! Letters: r query rows, k keys, d width of q and k, v width of v and o.

use std::{marker::PhantomData, ops::Range};

use num_traits::{Float as _, One, Zero};

use crate::{
    dtype::{Float, Real},
    ops::{
        gemm::{Mat, Threads, gemm},
        lanes::{self, LANES},
        paged::Table,
    },
    simd::vectorize,
};

/// Query rows in a block.
pub(crate) const QUERY_BLOCK: usize = 64;
/// Keys in a block; a multiple of the lanes.
pub(crate) const KEY_BLOCK: usize = 128;

/// Where rows of heads lie in a slice: row r is head `r % group` of token `r / group`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Rows {
    pub first: usize,
    pub token_stride: usize,
    pub head_stride: usize,
    pub group: usize,
    pub width: usize,
}

impl Rows {
    /// The heads of `kv_head` from `token` on, in [t, kv_heads * group, width].
    pub(crate) fn new(token: usize, kv_heads: usize, kv_head: usize, group: usize, width: usize) -> Self {
        let token_stride = kv_heads * group * width;
        let first = token * token_stride + kv_head * group * width;
        Rows { first, token_stride, head_stride: width, group, width }
    }

    pub(crate) fn range(&self, row: usize) -> Range<usize> {
        let at = self.first + row / self.group * self.token_stride + row % self.group * self.head_stride;
        at..at + self.width
    }
}

/// Queries of one kv head that see the same span of keys, each up to its own position.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Part<'a> {
    pub q: Rows,
    pub k: Rows,
    pub v: Rows,
    /// Where keys and values of a position are; read by [`forward_rows`] only, the others' are in order.
    pub table: Table<'a>,
    pub o: Rows,
    /// Query tokens.
    pub num_tokens: usize,
    /// Keys before the first query's own.
    pub context: usize,
    /// Factor on the scores.
    pub scale: f64,
}

impl Part<'_> {
    pub(crate) fn num_rows(&self) -> usize {
        self.num_tokens * self.q.group
    }

    /// Number of keys that a query row sees.
    pub(crate) fn visible(&self, row: usize) -> usize {
        self.context + row / self.q.group + 1
    }

    /// The first of `rows` that sees key `key`.
    fn first_to_see(&self, key: usize, rows: &Range<usize>) -> usize {
        (key.saturating_sub(self.context) * self.q.group).clamp(rows.start, rows.end)
    }

    /// Index of a row in [t, h], where o is [t, h, v].
    pub(crate) fn lse_index(&self, row: usize) -> usize {
        self.o.range(row).start / self.o.width
    }
}

/// An output that tasks write at once, each its own rows.
pub(crate) struct Shared<'a, T> {
    data: *mut T,
    len: usize,
    marker: PhantomData<&'a mut [T]>,
}

// SAFETY: it is an exclusive borrow of a slice, handed out in disjoint pieces (the contract of `slice`).
unsafe impl<T: Send> Sync for Shared<'_, T> {}

impl<'a, T> Shared<'a, T> {
    pub(crate) fn new(data: &'a mut [T]) -> Self {
        Shared { data: data.as_mut_ptr(), len: data.len(), marker: PhantomData }
    }

    /// # Safety
    /// No two overlapping ranges are alive at once, over all threads.
    #[expect(clippy::mut_from_ref, reason = "pieces are disjoint by contract")]
    pub(crate) unsafe fn slice(&self, range: Range<usize>) -> &mut [T] {
        assert!(range.start <= range.end && range.end <= self.len, "a row lies in its tensor");
        // SAFETY: in bounds by the assertion, exclusive by the caller's promise and the borrow in `new`.
        unsafe { std::slice::from_raw_parts_mut(self.data.add(range.start), range.len()) }
    }
}

/// Buffers of one task, kept for the next.
#[derive(Default)]
pub(crate) struct Scratch<A> {
    pub(super) q_rd: Vec<A>,
    pub(super) scores_rk: Vec<A>,
    pub(super) max_r: Vec<A>,
    pub(super) sum_r: Vec<A>,
    pub(super) o_rv: Vec<A>,
    pub(super) k_kd: Vec<A>,
    pub(super) k_dk: Vec<A>,
    pub(super) v_kv: Vec<A>,
    pub(super) v_vk: Vec<A>,
    pub(super) dscores_rk: Vec<A>,
    pub(super) dq_rd: Vec<A>,
    pub(super) dk_kd: Vec<A>,
    pub(super) dv_kv: Vec<A>,
}

/// The first `len` elements of a buffer that grows.
pub(super) fn room<A: Real>(buffer: &mut Vec<A>, len: usize) -> &mut [A] {
    if buffer.len() < len {
        buffer.resize(len, A::zero());
    }
    &mut buffer[..len]
}

/// Copies rows, times `scale`, to a contiguous matrix.
pub(super) fn gather<T: Float>(x: &[T], rows: Rows, of: Range<usize>, scale: T::Acc, out: &mut Vec<T::Acc>) {
    let out = room(out, of.len() * rows.width);
    vectorize(
        #[inline(always)]
        || {
            for (row, out) in of.zip(out.chunks_exact_mut(rows.width)) {
                for (out, x) in out.iter_mut().zip(&x[rows.range(row)]) {
                    *out = x.to_acc() * scale;
                }
            }
        },
    );
}

/// Copies the first `n` rows to blocks of `KEY_BLOCK` columns: row r is column `r % KEY_BLOCK` of its block.
pub(super) fn gather_transposed<T: Float>(x: &[T], rows: Rows, n: usize, out: &mut Vec<T::Acc>) {
    let out = room(out, n.div_ceil(KEY_BLOCK) * KEY_BLOCK * rows.width);
    vectorize(
        #[inline(always)]
        || {
            for first in (0..n).step_by(LANES) {
                // Past the last row the last one is repeated; nothing reads those columns.
                let sources: [&[T]; LANES] = std::array::from_fn(|i| &x[rows.range((first + i).min(n - 1))]);
                let at = first / KEY_BLOCK * KEY_BLOCK * rows.width + first % KEY_BLOCK;
                for c in 0..rows.width {
                    let column: [T::Acc; LANES] = std::array::from_fn(
                        #[inline(always)]
                        |i| sources[i][c].to_acc(),
                    );
                    out[at + c * KEY_BLOCK..][..LANES].copy_from_slice(&column);
                }
            }
        },
    );
}

/// Blocks of `KEY_BLOCK` among the first `num_keys`.
pub(super) fn key_blocks(num_keys: usize) -> impl Iterator<Item = Range<usize>> {
    (0..num_keys).step_by(KEY_BLOCK).map(move |k| k..(k + KEY_BLOCK).min(num_keys))
}

/// Splits a row of scores at the last visible key: minus infinity fills it up to whole lanes, zero from there on.
#[inline(always)]
pub(super) fn mask<A: Real>(row: &mut [A], visible: usize) -> &mut [A] {
    let whole = visible.next_multiple_of(LANES);
    row[visible..whole].fill(A::neg_infinity());
    row[whole..].fill(A::zero());
    &mut row[..whole]
}

/// Attention of the query rows `rows` (a multiple of [`QUERY_BLOCK`] first); calls `out(row, o_v, lse)` for each.
pub(crate) fn forward<Q: Float, T: Float<Acc = Q::Acc>>(
    part: &Part,
    rows: Range<usize>,
    (q, k, v): (&[Q], &[T], &[T]),
    scratch: &mut Scratch<Q::Acc>,
    mut out: impl FnMut(usize, &[Q::Acc], Q::Acc),
) {
    let (d, width) = (part.q.width, part.v.width);
    let num_keys = part.visible(rows.end - 1);
    gather_transposed(k, part.k, num_keys, &mut scratch.k_dk);
    gather(v, part.v, 0..num_keys, Q::Acc::one(), &mut scratch.v_kv);
    for first in rows.clone().step_by(QUERY_BLOCK) {
        let block = first..(first + QUERY_BLOCK).min(rows.end);
        let r = block.len();
        gather(q, part.q, block.clone(), Q::Acc::of_f64(part.scale), &mut scratch.q_rd);
        let scores_rk = room(&mut scratch.scores_rk, r * KEY_BLOCK);
        let (max_r, sum_r) = (room(&mut scratch.max_r, r), room(&mut scratch.sum_r, r));
        max_r.fill(Q::Acc::neg_infinity());
        sum_r.fill(Q::Acc::zero());
        let o_rv = room(&mut scratch.o_rv, r * width);
        for keys in key_blocks(part.visible(block.end - 1)) {
            let n = keys.len();
            let k_dk = &scratch.k_dk[keys.start * d..];
            let (q_rd, k_dk) = (Mat::new(&scratch.q_rd, r, d), Mat::strided(k_dk, d, n, KEY_BLOCK));
            gemm(q_rd, k_dk, 0.0, scores_rk, KEY_BLOCK, Threads::One);
            vectorize(
                #[inline(always)]
                || {
                    for i in 0..r {
                        let visible = part.visible(first + i).saturating_sub(keys.start).min(n);
                        let row = mask(&mut scores_rk[i * KEY_BLOCK..(i + 1) * KEY_BLOCK], visible);
                        let before = max_r[i];
                        let top = lanes::max(row).max(before);
                        if visible == 0 {
                            continue;
                        }
                        let sum = lanes::exp_and_sum(row, top);
                        let fade = (before - top).exp_fast();
                        (max_r[i], sum_r[i]) = (top, sum_r[i] * fade + sum);
                        if keys.start > 0 {
                            o_rv[i * width..(i + 1) * width].iter_mut().for_each(|o| *o *= fade);
                        }
                    }
                },
            );
            let beta = if keys.start == 0 { 0.0 } else { 1.0 };
            let v_kv = Mat::new(&scratch.v_kv[keys.start * width..], n, width);
            gemm(Mat::strided(scores_rk, r, n, KEY_BLOCK), v_kv, beta, o_rv, width, Threads::One);
        }
        for (i, o_v) in o_rv.chunks_exact_mut(width).enumerate() {
            let inverse = sum_r[i].recip();
            o_v.iter_mut().for_each(|o| *o *= inverse);
            out(block.start + i, o_v, max_r[i] + sum_r[i].ln());
        }
    }
}

/// The same by dot products over the keys where they lie, in an order that follows from a row's own position: its bits are the same in
/// any company. What a cache is read by.
pub(crate) fn forward_rows<Q: Float, T: Float<Acc = Q::Acc>>(
    part: &Part,
    rows: Range<usize>,
    (q, k, v): (&[Q], &[T], &[T]),
    scratch: &mut Scratch<Q::Acc>,
    mut out: impl FnMut(usize, &[Q::Acc], Q::Acc),
) {
    const DOTS: usize = 4;
    let (d, width, r) = (part.q.width, part.v.width, rows.len());
    let num_keys = part.visible(rows.end - 1);
    gather(q, part.q, rows.clone(), Q::Acc::of_f64(part.scale), &mut scratch.q_rd);
    let q_rd = &scratch.q_rd[..r * d];
    let o_rv = room(&mut scratch.o_rv, r * width);
    o_rv.fill(Q::Acc::zero());
    let scores_rk = room(&mut scratch.scores_rk, r * num_keys);
    vectorize(
        #[inline(always)]
        || {
            for key in 0..num_keys {
                let k_d = &k[part.k.range(part.table.row(key))];
                let mut i = part.first_to_see(key, &rows) - rows.start;
                while i + DOTS <= r {
                    let four = lanes::dot4(&q_rd[i * d..(i + DOTS) * d], k_d);
                    for (j, score) in four.into_iter().enumerate() {
                        scores_rk[(i + j) * num_keys + key] = score;
                    }
                    i += DOTS;
                }
                for i in i..r {
                    scores_rk[i * num_keys + key] = lanes::dot(&q_rd[i * d..(i + 1) * d], k_d);
                }
            }
        },
    );
    let (max_r, sum_r) = (room(&mut scratch.max_r, r), room(&mut scratch.sum_r, r));
    vectorize(
        #[inline(always)]
        || {
            for (i, row) in scores_rk.chunks_exact_mut(num_keys).enumerate() {
                let seen = &mut row[..part.visible(rows.start + i)];
                max_r[i] = lanes::max(seen);
                sum_r[i] = lanes::exp_and_sum(seen, max_r[i]);
            }
            for key in 0..num_keys {
                let v_v = &v[part.v.range(part.table.row(key))];
                let first = part.first_to_see(key, &rows) - rows.start;
                for (i, o_v) in o_rv.chunks_exact_mut(width).enumerate().skip(first) {
                    lanes::add_scaled(o_v, scores_rk[i * num_keys + key], v_v);
                }
            }
        },
    );
    for (i, o_v) in o_rv.chunks_exact_mut(width).enumerate() {
        let inverse = sum_r[i].recip();
        o_v.iter_mut().for_each(|o| *o *= inverse);
        out(rows.start + i, o_v, max_r[i] + sum_r[i].ln());
    }
}
