//! SwiGLU (arXiv 2002.05202): a_tf = silu(g_tf) u_tf, where h [t, 2f] holds g and u side by side.

use crate::{
    cost::Cost,
    device::Target,
    dtype::{Float, Real},
    error::Result,
    fp8::{Scaling, Tiles},
    ops::{
        are_fast,
        expect::{expect_float, expect_tiles},
        expect_shape, is_fast,
        parallel::for_row_chunks,
        quantize::{self, encode_rows, to_f32},
    },
    ptx::{self, quantize::Recipe},
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// One element: silu(g) u.
#[inline(always)]
pub fn value<A: Real>(g: A, u: A) -> A {
    g / (A::one() + (-g).exp_fast()) * u
}

/// Gradients of one element with respect to g and u.
#[inline(always)]
pub fn gradient<A: Real>(g: A, u: A, da: A) -> (A, A) {
    let sigmoid = A::one() / (A::one() + (-g).exp_fast());
    let silu = g * sigmoid;
    (da * u * (sigmoid + silu * (A::one() - sigmoid)), da * silu)
}

/// One row: `a` \[f\] from `h` \[2f\].
#[inline(always)]
pub fn forward_row<T: Float>(h: &[T], a: &mut [T]) {
    let f = a.len();
    let (g, u) = (&h[..f], &h[f..2 * f]);
    for j in 0..f {
        a[j] = T::from_acc(value(g[j].to_acc(), u[j].to_acc()));
    }
}

/// One row: `dh` \[2f\] from `h` \[2f\] and `da` \[f\].
#[inline(always)]
pub fn input_grad_row<T: Float>(h: &[T], da: &[T], dh: &mut [T]) {
    let f = da.len();
    let ((g, u), (dg, du)) = (h.split_at(f), dh.split_at_mut(f));
    let (u, du) = (&u[..f], &mut du[..f]);
    for j in 0..f {
        let (x, y) = gradient(g[j].to_acc(), u[j].to_acc(), da[j].to_acc());
        (dg[j], du[j]) = (T::from_acc(x), T::from_acc(y));
    }
}

/// F: `h` [t, 2f] -> `a` [t, f].
pub fn forward(s: &mut Stream, h: Tensor, a: Tensor) -> Result<()> {
    let (t, f) = (a.rows(), a.cols());
    expect_shape("swiglu", "h", h.reshape(&[t, h.len() / t.max(1)]), &[t, 2 * f])?;
    s.account(cost(t, f, h.dtype.size_bytes()));
    let kernels = |_: &Target| are_fast(&[h, a]).then(|| ptx::swiglu::forward(h, a));
    s.launch_kernel(&[h], &[a], kernels, move |m| {
        with_float!(h.dtype, T => {
            let (h, mut a) = (m.read::<T>(h), m.write::<T>(a));
            for_row_chunks(&mut a, f, #[inline(always)] |first, rows| {
                for (i, row) in rows.chunks_exact_mut(f).enumerate() {
                    forward_row(&h[(first + i) * 2 * f..][..2 * f], row);
                }
            });
        });
    });
    Ok(())
}

/// F into FP8: as [`forward`], but a goes to `q` [t, f] with the bits that it has in f32, not rounded to the type of `h` in between.
pub fn forward_tiles(s: &mut Stream, h: Tensor, q: Tiles, scaling: Scaling) -> Result<()> {
    const OP: &str = "swiglu into FP8";
    let (t, f) = (q.codes.rows(), q.codes.cols());
    expect_float(OP, "h", h)?;
    expect_shape(OP, "h", h.reshape(&[t, h.len() / t.max(1)]), &[t, 2 * f])?;
    expect_tiles(OP, "q", q, t, f)?;
    s.account(cost_tiles(t, f, h.dtype.size_bytes()));
    let kernels = |on: &Target| is_fast(h).then(|| ptx::quantize::swiglu_tiles(h, q, Recipe::new(on, scaling)));
    s.launch_kernel(&[h], &q.tensors(), kernels, move |m| {
        with_float!(h.dtype, T => {
            let h = m.read::<T>(h);
            let (mut codes, mut scales) = (m.write::<u8>(q.codes), m.write::<f32>(q.scales));
            encode_rows((&mut codes, &mut scales), f, scaling, &mut vec![(); t], #[inline(always)] |row, a| {
                let (g, u) = h[row * 2 * f..][..2 * f].split_at(f);
                for j in 0..f {
                    a[j] = to_f32(value(g[j].to_acc(), u[j].to_acc()));
                }
            });
        });
    });
    Ok(())
}

/// I: `dh` [t, 2f] from `h` and `da` [t, f].
pub fn input_grad(s: &mut Stream, h: Tensor, da: Tensor, dh: Tensor) -> Result<()> {
    let (t, f) = (da.rows(), da.cols());
    expect_shape("swiglu input gradient", "dh", dh.reshape(&[t, dh.len() / t.max(1)]), &[t, 2 * f])?;
    s.account(cost(2 * t, f, h.dtype.size_bytes()));
    let kernels = |_: &Target| are_fast(&[h, da, dh]).then(|| ptx::swiglu::input_grad(h, da, dh));
    s.launch_kernel(&[h, da], &[dh], kernels, move |m| {
        with_float!(h.dtype, T => {
            let (h, da, mut dh) = (m.read::<T>(h), m.read::<T>(da), m.write::<T>(dh));
            for_row_chunks(&mut dh, 2 * f, #[inline(always)] |first, rows| {
                for (i, row) in rows.chunks_exact_mut(2 * f).enumerate() {
                    let at = first + i;
                    input_grad_row(&h[at * 2 * f..][..2 * f], &da[at * f..][..f], row);
                }
            });
        });
    });
    Ok(())
}

/// Cost of the forward pass over `t` rows of width `f`.
pub fn cost(t: usize, f: usize, elem_bytes: usize) -> Cost {
    let n = (t * f) as u64;
    Cost::stream(6 * n, 2 * n * elem_bytes as u64, n * elem_bytes as u64)
}

/// Cost of the forward pass into FP8.
pub fn cost_tiles(t: usize, f: usize, elem_bytes: usize) -> Cost {
    let (plain, quantized) = (cost(t, f, elem_bytes), quantize::tiles_cost(t, f, 0));
    Cost::stream(plain.vector_flops + quantized.vector_flops, plain.read_bytes, quantized.written_bytes)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::{dtype::DType, ops::testing::*};

    #[test]
    fn gradient_matches_finite_differences() {
        check_gradients(
            &[(&[5, 8], 1)],
            &[5, 4],
            |s, x| {
                let a = s.memory().alloc(DType::F64, &[5, 4]);
                forward(s, x[0], a)?;
                Ok(a)
            },
            |s, x, dy, dx| input_grad(s, x[0], dy, dx[0]),
        );
    }

    /// Of the same numbers, in bf16 and in f32.
    #[test]
    fn tiles_are_those_of_the_activation_in_f32() {
        let (t, f) = (70, 300);
        let mut s = stream();
        let m = s.memory().clone();
        let h = random_bf16(t * 2 * f, 1);
        let wide: Vec<f32> = h.iter().map(|x| x.to_f32()).collect();
        let (h, wide, a) =
            (m.from_slice(&[t, 2 * f], &h), m.from_slice(&[t, 2 * f], &wide), m.alloc(DType::F32, &[t, f]));
        forward(&mut s, wide, a).unwrap();
        for scaling in [Scaling::Real, Scaling::PowerOfTwo] {
            let [want, got] = [(); 2].map(|()| poisoned_tiles(&m, t, f));
            quantize::tiles(&mut s, a, want, scaling).unwrap();
            forward_tiles(&mut s, h, got, scaling).unwrap();
            s.synchronize().unwrap();
            assert_same_tiles(&m, got, want);
        }
    }
}
