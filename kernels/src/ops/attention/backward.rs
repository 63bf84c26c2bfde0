//! The gradient of one kv head's attention over one document, block by block.
//!
//! Probabilities come back from the scores and the forward's log-sum-exp. With P = e^(S - lse), dP = dO V^T and
//! delta = rowsum(dO * O), the gradient of the scores is dS = P * (dP - delta); then dV = P^T dO, dQ = scale dS K and
//! dK = scale dS^T Q. Source: FlashAttention-2 (arXiv 2307.08691), algorithm 2, with the loop over queries outside.

use num_traits::{One, Zero};

use super::block::{KEY_BLOCK, Part, QUERY_BLOCK, Scratch, Shared, gather, gather_transposed, key_blocks, mask, room};
use crate::{
    dtype::{Float, Real},
    ops::{
        gemm::{Mat, Threads, gemm},
        lanes,
    },
    simd::vectorize,
};

/// What the forward read and left.
#[derive(Clone, Copy)]
pub(super) struct Saved<'a, T: Float> {
    pub q: &'a [T],
    pub k: &'a [T],
    pub v: &'a [T],
    pub o: &'a [T],
    pub lse: &'a [T::Acc],
    pub d_o: &'a [T],
}

/// Where the gradients go; each kv head of each document writes its own rows.
pub(super) struct Outputs<'a, T> {
    pub dq: Shared<'a, T>,
    pub dk: Shared<'a, T>,
    pub dv: Shared<'a, T>,
}

/// Assigns the gradients of `part`'s rows of q, k and v.
pub(super) fn input_grad<T: Float>(part: &Part, x: Saved<T>, out: &Outputs<T>, scratch: &mut Scratch<T::Acc>) {
    let (d, width, num_keys) = (part.q.width, part.v.width, part.num_tokens);
    gather(x.k, part.k, 0..num_keys, T::Acc::one(), &mut scratch.k_kd);
    gather_transposed(x.k, part.k, num_keys, &mut scratch.k_dk);
    gather_transposed(x.v, part.v, num_keys, &mut scratch.v_vk);
    room(&mut scratch.dk_kd, num_keys * d).fill(T::Acc::zero());
    room(&mut scratch.dv_kv, num_keys * width).fill(T::Acc::zero());
    for first in (0..part.num_rows()).step_by(QUERY_BLOCK) {
        query_block(part, first, x, out, scratch);
    }
    for key in 0..num_keys {
        // SAFETY: only the task of this document and kv head touches these rows.
        let (dk, dv) = unsafe { (out.dk.slice(part.k.range(key)), out.dv.slice(part.v.range(key))) };
        store(dk, &scratch.dk_kd[key * d..], T::Acc::one());
        store(dv, &scratch.dv_kv[key * width..], T::Acc::one());
    }
}

fn store<T: Float>(out: &mut [T], x: &[T::Acc], scale: T::Acc) {
    for (out, &x) in out.iter_mut().zip(x) {
        *out = T::from_acc(x * scale);
    }
}

fn query_block<T: Float>(part: &Part, first: usize, x: Saved<T>, out: &Outputs<T>, s: &mut Scratch<T::Acc>) {
    let (d, width) = (part.q.width, part.v.width);
    let rows = first..(first + QUERY_BLOCK).min(part.num_rows());
    let r = rows.len();
    let scale = T::Acc::of_f64(part.scale);
    gather(x.q, part.q, rows.clone(), scale, &mut s.q_rd);
    gather(x.d_o, part.o, rows.clone(), T::Acc::one(), &mut s.o_rv);
    let (lse_r, delta_r) = (room(&mut s.max_r, r), room(&mut s.sum_r, r));
    vectorize(
        #[inline(always)]
        || {
            for (i, row) in rows.clone().enumerate() {
                lse_r[i] = x.lse[part.lse_index(row)];
                delta_r[i] = lanes::dot(&x.d_o[part.o.range(row)], &x.o[part.o.range(row)]);
            }
        },
    );
    let p_rk = room(&mut s.scores_rk, r * KEY_BLOCK);
    let ds_rk = room(&mut s.dscores_rk, r * KEY_BLOCK);
    let dq_rd = room(&mut s.dq_rd, r * d);
    let (q_rd, do_rv) = (Mat::new(&s.q_rd, r, d), Mat::new(&s.o_rv, r, width));
    for keys in key_blocks(part.visible(rows.end - 1)) {
        let n = keys.len();
        let k_dk = Mat::strided(&s.k_dk[keys.start * d..], d, n, KEY_BLOCK);
        let v_vk = Mat::strided(&s.v_vk[keys.start * width..], width, n, KEY_BLOCK);
        gemm(q_rd, k_dk, 0.0, p_rk, KEY_BLOCK, Threads::One);
        gemm(do_rv, v_vk, 0.0, ds_rk, KEY_BLOCK, Threads::One);
        vectorize(
            #[inline(always)]
            || {
                for i in 0..r {
                    let visible = part.visible(first + i).saturating_sub(keys.start).min(n);
                    let at = i * KEY_BLOCK..(i + 1) * KEY_BLOCK;
                    let ds = &mut ds_rk[at.clone()];
                    ds[visible..].fill(T::Acc::zero());
                    softmax_grad(mask(&mut p_rk[at], visible), ds, lse_r[i], delta_r[i]);
                }
            },
        );
        let (p_rk, ds_rk) = (Mat::strided(p_rk, r, n, KEY_BLOCK), Mat::strided(ds_rk, r, n, KEY_BLOCK));
        let beta = if keys.start == 0 { 0.0 } else { 1.0 };
        gemm(p_rk.t(), do_rv, 1.0, &mut s.dv_kv[keys.start * width..], width, Threads::One);
        gemm(ds_rk, Mat::new(&s.k_kd[keys.start * d..], n, d), beta, dq_rd, d, Threads::One);
        gemm(ds_rk.t(), q_rd, 1.0, &mut s.dk_kd[keys.start * d..], d, Threads::One);
    }
    for (row, dq) in rows.zip(dq_rd.chunks_exact(d)) {
        // SAFETY: only the task of this document and kv head touches these rows.
        store(unsafe { out.dq.slice(part.q.range(row)) }, dq, scale);
    }
}

/// `p = e^(p - lse)`, `ds = p (ds - delta)`
#[inline(always)]
fn softmax_grad<A: Real>(p: &mut [A], ds: &mut [A], lse: A, delta: A) {
    for (p, ds) in p.iter_mut().zip(ds) {
        *p = (*p - lse).exp_fast();
        *ds = *p * (*ds - delta);
    }
}
