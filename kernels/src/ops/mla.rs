//! Keys and values out of latents (DeepSeek-V2 report, Equations 9 to 19): what lies between the linears of MLA.
//!
//! kv [t, h, n + v] holds each head's no-position key beside its value; the rotary key is the last r columns of the latent's
//! projection [t, c + r], one for all heads. Assembling copies both into k [t, h, n + r] and v [t, h, v], turning the rotary
//! key on the way; the gradient takes them apart, sums the rotary key's over the heads and turns it back.

use crate::{
    cost::Cost,
    dtype::Float,
    error::Result,
    ops::{
        expect_shape,
        parallel::{for_row_chunks, for_row_chunks2},
        rope::{RopeTable, Turn},
    },
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// F: `kv` and the last r columns of `latent` -> `k`, `v`.
pub fn assemble(
    s: &mut Stream,
    (kv, latent): (Tensor, Tensor),
    positions: Tensor,
    table: &RopeTable,
    (k, v): (Tensor, Tensor),
) -> Result<()> {
    let (t, h, qk, dv, r) = (k.dim(0), k.dim(1), k.dim(2), v.dim(2), table.dim());
    let (n, c) = (qk - r, latent.cols() - r);
    expect_shape("mla assemble", "kv", kv.reshape(&[t, kv.len() / t.max(1)]), &[t, h * (n + dv)])?;
    expect_shape("mla assemble", "latent", latent, &[t, c + r])?;
    table.check("mla assemble", k)?;
    s.account(cost(t, h * (qk + dv), k.dtype.size_bytes()));
    let table = *table;
    s.launch(&[kv, latent, positions, table.cos, table.sin], &[k, v], move |m| {
        with_float!(k.dtype, T => {
            type A = <T as Float>::Acc;
            let (kv, latent, positions) = (m.read::<T>(kv), m.read::<T>(latent), m.read::<u32>(positions));
            let (cos, sin) = (m.read::<A>(table.cos), m.read::<A>(table.sin));
            let (mut k, mut v) = (m.write::<T>(k), m.write::<T>(v));
            for_row_chunks2((&mut k, h * qk), (&mut v, h * dv), #[inline(always)] |first, k, v| {
                let mut turned = vec![T::default(); r];
                for (i, (k, v)) in k.chunks_exact_mut(h * qk).zip(v.chunks_exact_mut(h * dv)).enumerate() {
                    let at = first + i;
                    turned.copy_from_slice(&latent[at * (c + r) + c..][..r]);
                    Turn::new(&cos, &sin, table.pairs, r, positions[at] as usize, false).apply(&mut turned);
                    let heads = kv[at * h * (n + dv)..][..h * (n + dv)].chunks_exact(n + dv);
                    for ((kv, k), v) in heads.zip(k.chunks_exact_mut(qk)).zip(v.chunks_exact_mut(dv)) {
                        k[..n].copy_from_slice(&kv[..n]);
                        k[n..].copy_from_slice(&turned);
                        v.copy_from_slice(&kv[n..]);
                    }
                }
            });
        });
    });
    Ok(())
}

/// I: `dk`, `dv` -> `dkv`, and the last r columns of `dlatent`; its other columns stay as they are.
pub fn assemble_grad(
    s: &mut Stream,
    (dk, dv): (Tensor, Tensor),
    positions: Tensor,
    table: &RopeTable,
    (dkv, dlatent): (Tensor, Tensor),
) -> Result<()> {
    let (t, h, qk, v, r) = (dk.dim(0), dk.dim(1), dk.dim(2), dv.dim(2), table.dim());
    let (n, c) = (qk - r, dlatent.cols() - r);
    expect_shape("mla assemble gradient", "dkv", dkv.reshape(&[t, dkv.len() / t.max(1)]), &[t, h * (n + v)])?;
    expect_shape("mla assemble gradient", "dlatent", dlatent, &[t, c + r])?;
    table.check("mla assemble gradient", dk)?;
    s.account(cost(t, h * (qk + v), dk.dtype.size_bytes()));
    let table = *table;
    s.launch(&[dk, dv, positions, table.cos, table.sin, dlatent], &[dkv, dlatent], move |m| {
        with_float!(dk.dtype, T => {
            type A = <T as Float>::Acc;
            let (dk, dv, positions) = (m.read::<T>(dk), m.read::<T>(dv), m.read::<u32>(positions));
            let (cos, sin) = (m.read::<A>(table.cos), m.read::<A>(table.sin));
            for_row_chunks(&mut m.write::<T>(dkv), h * (n + v), #[inline(always)] |first, rows| {
                for (i, row) in rows.chunks_exact_mut(h * (n + v)).enumerate() {
                    for (head, out) in row.chunks_exact_mut(n + v).enumerate() {
                        let at = (first + i) * h + head;
                        out[..n].copy_from_slice(&dk[at * qk..][..n]);
                        out[n..].copy_from_slice(&dv[at * v..][..v]);
                    }
                }
            });
            for_row_chunks(&mut m.write::<T>(dlatent), c + r, #[inline(always)] |first, rows| {
                let mut sum = vec![A::default(); r];
                for (i, row) in rows.chunks_exact_mut(c + r).enumerate() {
                    let at = first + i;
                    sum.fill(A::default());
                    for head in dk[at * h * qk..][..h * qk].chunks_exact(qk) {
                        sum.iter_mut().zip(&head[n..]).for_each(|(sum, x)| *sum += x.to_acc());
                    }
                    Turn::new(&cos, &sin, table.pairs, r, positions[at] as usize, true).apply(&mut sum);
                    row[c..].iter_mut().zip(&sum).for_each(|(out, &x)| *out = T::from_acc(x));
                }
            });
        });
    });
    Ok(())
}

/// Cost of either pass over `t` tokens with `cols` columns of keys and values.
pub fn cost(t: usize, cols: usize, elem_bytes: usize) -> Cost {
    let bytes = (t * cols * elem_bytes) as u64;
    Cost::stream((t * cols) as u64, bytes, bytes)
}
