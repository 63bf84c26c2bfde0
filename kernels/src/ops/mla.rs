//! Multi-head latent attention: what lies between its linear layers and the attention core.
//!
//! Per token, `kv_a` \[c + r\] holds a latent of width c and one key part of width r that is rotated and shared by all heads; the
//! up-projection `kv_b` [h, n + v] of the normalized latent holds each head's remaining key part (n) and its value (v). Then
//! k = (k_n of kv_b, rotated k_r of kv_a), v = v of kv_b. The two arrive fused here: one pass reads both and writes k and v.
//! The norm of the latent columns is another op's; this one neither reads nor writes them.
//!
//! Source: DeepSeek-V2 (arXiv 2405.04434), section 2.1. Training and long prompts use [`assemble`] and
//! [`super::attention`]; generation uses the latent itself as the cache, in [`latent`], of numbers or of FP8 ([`fp8_row`]); [`expanded`] is
//! its way with long prompts.

pub mod expanded;
pub mod fp8_row;
pub mod latent;

use crate::{
    cost::Cost,
    device::Target,
    dtype::Float,
    error::{Error, Result},
    ops::{
        are_fast, expect_shape, lanes,
        parallel::for_row_chunks2,
        rope::{RopeTable, Turn},
    },
    ptx,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// t tokens, h heads.
#[derive(Clone, Copy)]
pub(crate) struct Sizes {
    pub(crate) t: usize,
    pub(crate) h: usize,
    /// Unrotated key part of a head.
    pub(crate) n: usize,
    /// Rotated key part.
    pub(crate) r: usize,
    pub(crate) v: usize,
    /// Width of the latent.
    pub(crate) c: usize,
}

impl Sizes {
    /// Of tensors that are known to fit together.
    pub(crate) fn of(kv_a: Tensor, k: Tensor, v: Tensor, table: &RopeTable) -> Self {
        let r = table.dim();
        Sizes { t: k.dim(0), h: k.dim(1), n: k.dim(2) - r, r, v: v.dim(2), c: kv_a.cols() - r }
    }
}

/// Checks shapes of k [t, h, n + r], v [t, h, v], kv_a [t, c + r] and kv_b [t, h, n + v], or of their gradients.
fn sizes(op: &'static str, table: &RopeTable, [kv_a, kv_b, k, v]: [Tensor; 4], positions: Tensor) -> Result<Sizes> {
    let r = table.dim();
    let wrong = |role, expected, found| Err(Error::Shape { op, role, expected, found });
    if k.dim(2) < r {
        return wrong("k", format!("heads of at least the {r} rotated elements"), k);
    }
    if kv_a.cols() < r {
        return wrong("kv_a", format!("rows of at least the {r} rotated elements"), kv_a);
    }
    let sizes = Sizes::of(kv_a, k, v, table);
    let Sizes { t, h, n, r, v: value, c } = sizes;
    expect_shape(op, "k", k, &[t, h, n + r])?;
    expect_shape(op, "v", v, &[t, h, value])?;
    expect_shape(op, "kv_a", kv_a, &[t, c + r])?;
    expect_shape(op, "kv_b", kv_b.reshape_or_self(&[t, h, n + value]), &[t, h, n + value])?;
    expect_shape(op, "positions", positions, &[t])?;
    table.check(op, k)?;
    Ok(sizes)
}

trait ReshapeOrSelf {
    /// The same bytes under `dims`, if they are as many.
    fn reshape_or_self(self, dims: &[usize]) -> Self;
}

impl ReshapeOrSelf for Tensor {
    fn reshape_or_self(self, dims: &[usize]) -> Self {
        if self.len() == dims.iter().product::<usize>() { self.reshape(dims) } else { self }
    }
}

/// The two tensors that keys and values come from, or their gradients.
#[derive(Clone, Copy, Debug)]
pub struct Projections {
    /// [t, c + r]: the latent (not touched) and the unrotated shared key part.
    pub kv_a: Tensor,
    /// [t, h, n + v], or the same as [t, h * (n + v)]: each head's key part and value.
    pub kv_b: Tensor,
}

/// F: assigns k [t, h, n + r] and v [t, h, v]; rotates the shared part by `positions` (u32, one a token).
pub fn assemble(
    s: &mut Stream,
    x: Projections,
    positions: Tensor,
    table: &RopeTable,
    k: Tensor,
    v: Tensor,
) -> Result<()> {
    let z = sizes("assemble", table, [x.kv_a, x.kv_b, k, v], positions)?;
    if z.t == 0 {
        return Ok(());
    }
    let table = *table;
    let kernels =
        |_: &Target| are_fast(&[x.kv_a, x.kv_b, k, v]).then(|| ptx::mla::assemble(x, positions, &table, k, v));
    s.launch_kernel(&[x.kv_a, x.kv_b, positions, table.cos, table.sin], &[k, v], kernels, move |m| {
        with_float!(k.dtype, T => {
            type A = <T as Float>::Acc;
            let (kv_a, kv_b, at) = (m.read::<T>(x.kv_a), m.read::<T>(x.kv_b), m.read::<u32>(positions));
            let (cos, sin) = (m.read::<A>(table.cos), m.read::<A>(table.sin));
            let (kv_a, kv_b, at, cos, sin) = (&kv_a[..], &kv_b[..], &at[..], &cos[..], &sin[..]);
            let (d, outs) = (z.n + z.r, (&mut m.write::<T>(k)[..], &mut m.write::<T>(v)[..]));
            for_row_chunks2((outs.0, z.h * d), (outs.1, z.h * z.v), #[inline(always)] |first, k, v| {
                for (i, (k, v)) in k.chunks_exact_mut(z.h * d).zip(v.chunks_exact_mut(z.h * z.v)).enumerate() {
                    let t = first + i;
                    let kv_b = &kv_b[t * z.h * (z.n + z.v)..];
                    let heads = k.chunks_exact_mut(d).zip(v.chunks_exact_mut(z.v));
                    for ((k, v), kv_b) in heads.zip(kv_b.chunks_exact(z.n + z.v)) {
                        k[..z.n].copy_from_slice(&kv_b[..z.n]);
                        v.copy_from_slice(&kv_b[z.n..]);
                    }
                    k[z.n..d].copy_from_slice(&kv_a[t * (z.c + z.r) + z.c..][..z.r]);
                    Turn::new(cos, sin, table.pairs, z.r, at[t] as usize, false).apply(&mut k[z.n..d]);
                    let (head, others) = k.split_at_mut(d);
                    others.chunks_exact_mut(d).for_each(|k| k[z.n..].copy_from_slice(&head[z.n..]));
                }
            });
        });
    });
    Ok(())
}

/// I: from dk and dv, assigns `dx.kv_b` and the last r columns of `dx.kv_a` (summed over heads, turned back). The
/// latent's columns of `dx.kv_a` are left to the norm's gradient.
pub fn assemble_grad(
    s: &mut Stream,
    dk: Tensor,
    dv: Tensor,
    positions: Tensor,
    table: &RopeTable,
    dx: Projections,
) -> Result<()> {
    let z = sizes("assemble gradient", table, [dx.kv_a, dx.kv_b, dk, dv], positions)?;
    if z.t == 0 {
        return Ok(());
    }
    let table = *table;
    let kernels = |_: &Target| {
        are_fast(&[dk, dv, dx.kv_a, dx.kv_b]).then(|| ptx::mla::assemble_grad(dk, dv, positions, &table, dx))
    };
    s.launch_kernel(&[dk, dv, positions, table.cos, table.sin], &[dx.kv_a, dx.kv_b], kernels, move |m| {
        with_float!(dk.dtype, T => {
            type A = <T as Float>::Acc;
            let (dk, dv, at) = (m.read::<T>(dk), m.read::<T>(dv), m.read::<u32>(positions));
            let (cos, sin) = (m.read::<A>(table.cos), m.read::<A>(table.sin));
            let (dk, dv, at, cos, sin) = (&dk[..], &dv[..], &at[..], &cos[..], &sin[..]);
            let (a, b) = (z.c + z.r, z.h * (z.n + z.v));
            let outs = (&mut m.write::<T>(dx.kv_a)[..], &mut m.write::<T>(dx.kv_b)[..]);
            for_row_chunks2((outs.0, a), (outs.1, b), #[inline(always)] |first, kv_a, kv_b| {
                let mut sum = vec![A::default(); z.r];
                for (i, (kv_a, kv_b)) in kv_a.chunks_exact_mut(a).zip(kv_b.chunks_exact_mut(b)).enumerate() {
                    let t = first + i;
                    let (dk, dv) = (&dk[t * z.h * (z.n + z.r)..], &dv[t * z.h * z.v..]);
                    let heads = dk.chunks_exact(z.n + z.r).zip(dv.chunks_exact(z.v));
                    sum.fill(A::default());
                    for (kv_b, (dk, dv)) in kv_b.chunks_exact_mut(z.n + z.v).zip(heads) {
                        kv_b[..z.n].copy_from_slice(&dk[..z.n]);
                        kv_b[z.n..].copy_from_slice(dv);
                        lanes::add_scaled(&mut sum, 1.0, &dk[z.n..]);
                    }
                    Turn::new(cos, sin, table.pairs, z.r, at[t] as usize, true).apply(&mut sum);
                    for (out, &x) in kv_a[z.c..].iter_mut().zip(&sum) {
                        *out = T::from_acc(x);
                    }
                }
            });
        });
    });
    Ok(())
}

/// Cost of either pass: every element of k, v and their sources moves once.
pub fn cost(t: usize, h: usize, [n, r, v]: [usize; 3], elem_bytes: usize) -> Cost {
    let (up, k) = (t * h * (n + v), t * h * (n + r + v));
    Cost::stream((3 * t * r) as u64, ((up + t * r) * elem_bytes) as u64, (k * elem_bytes) as u64)
}

#[cfg(test)]
mod tests;
