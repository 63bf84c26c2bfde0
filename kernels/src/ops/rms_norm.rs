//! RMSNorm (arXiv 1910.07467): y_td = x_td r_t w_d with r_t = 1 / sqrt(mean_d x_td^2 + eps).
//!
//! The input may be the first d columns of wider rows: a projection that yields a latent and a rotary key side by side is
//! normalized in place of its latent, without a copy.
//!
//! In a residual layer x + f(norm(x)) the gradient of x is that of the sum plus the norm's: I adds them in its one pass. Forward, the
//! product or the combine that ends f(..) adds x and writes the sum, which the next norm reads: 4 t d elements moved with the norm. Were
//! x added by the norm, f(..) would be written, rounded and read first: 5 t d.

use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::{Float, Real},
    error::Result,
    fp8::{Scaling, Tiles},
    ops::{
        are_fast,
        expect::{expect_float, expect_residual, expect_tensor, expect_tiles},
        expect_shape, is_fast,
        parallel::{for_row_chunks, for_row_chunks2},
        quantize::{self, encode_rows, to_f32},
    },
    ptx::{self, quantize::Recipe},
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// F: the first d columns of `x` [t, c] -> `y` [t, d], with weight `w` \[d\]; `rstd` \[t\] is kept for the backward passes.
pub fn forward(s: &mut Stream, x: Tensor, w: Tensor, y: Tensor, rstd: Tensor, eps: f64) -> Result<()> {
    let (t, c, d) = (x.rows(), x.cols(), w.len());
    expect_shape("rms_norm", "y", y, &[t, d])?;
    expect_shape("rms_norm", "rstd", rstd, &[t])?;
    s.account(cost(t, d, x.dtype.size_bytes()));
    let kernels = |_: &Target| are_fast(&[x, w, y, rstd]).then(|| ptx::rms_norm::forward(x, w, y, rstd, eps));
    s.launch_kernel(&[x, w], &[y, rstd], kernels, move |m| {
        with_float!(x.dtype, T => {
            let (x, w) = (m.read::<T>(x), m.read::<T>(w));
            let (mut y, mut rstd) = (m.write::<T>(y), m.write::<T>(rstd));
            for_row_chunks2((&mut y, d), (&mut rstd, 1), #[inline(always)] |first, y, rstd| {
                for (i, (y, rstd)) in y.chunks_exact_mut(d).zip(rstd).enumerate() {
                    let x = &x[(first + i) * c..][..d];
                    let r = inverse_rms(x, eps);
                    *rstd = T::from_acc(r);
                    for j in 0..d {
                        y[j] = T::from_acc(x[j].to_acc() * r * w[j].to_acc());
                    }
                }
            });
        });
    });
    Ok(())
}

/// F into FP8: as [`forward`], but y goes to `q` [t, d] with the bits that it has in f32, not rounded to the type of `x` in between.
pub fn forward_tiles(
    s: &mut Stream,
    x: Tensor,
    w: Tensor,
    q: Tiles,
    rstd: Tensor,
    eps: f64,
    scaling: Scaling,
) -> Result<()> {
    const OP: &str = "rms_norm into FP8";
    let (t, c, d) = (x.rows(), x.cols(), w.len());
    expect_float(OP, "x", x)?;
    expect_tensor(OP, "w", w, x.dtype, &[d])?;
    expect_tensor(OP, "rstd", rstd, x.dtype, &[t])?;
    expect_tiles(OP, "q", q, t, d)?;
    s.account(cost_tiles(t, d, x.dtype.size_bytes()));
    let kernels =
        |on: &Target| is_fast(x).then(|| ptx::quantize::rms_norm_tiles(x, w, q, rstd, eps, Recipe::new(on, scaling)));
    s.launch_kernel(&[x, w], &[q.codes, q.scales, rstd], kernels, move |m| {
        with_float!(x.dtype, T => {
            let (x, w, mut rstd) = (m.read::<T>(x), m.read::<T>(w), m.write::<T>(rstd));
            let (mut codes, mut scales) = (m.write::<u8>(q.codes), m.write::<f32>(q.scales));
            encode_rows((&mut codes, &mut scales), d, scaling, &mut rstd, #[inline(always)] |row, y| {
                let x = &x[row * c..][..d];
                let r = inverse_rms(x, eps);
                for j in 0..d {
                    y[j] = to_f32(x[j].to_acc() * r * w[j].to_acc());
                }
                T::from_acc(r)
            });
        });
    });
    Ok(())
}

/// 1 / sqrt(mean of the squares + eps)
#[inline(always)]
fn inverse_rms<T: Float>(x: &[T], eps: f64) -> T::Acc {
    let squares = sum(
        x.len(),
        #[inline(always)]
        |j| x[j].to_acc() * x[j].to_acc(),
    );
    let mean = squares / T::Acc::of_f64(x.len() as f64);
    num_traits::Float::recip(num_traits::Float::sqrt(mean + T::Acc::of_f64(eps)))
}

/// Eight partial sums, so that the loop vectorizes and the order of additions is fixed.
#[inline(always)]
fn sum<A: Real>(n: usize, f: impl Fn(usize) -> A) -> A {
    let mut acc = [A::zero(); 16];
    let whole = n / 16 * 16;
    let mut i = 0;
    while i < whole {
        for (l, a) in acc.iter_mut().enumerate() {
            *a += f(i + l);
        }
        i += 16;
    }
    let mut total = A::zero();
    for a in acc {
        total += a;
    }
    while i < n {
        total += f(i);
        i += 1;
    }
    total
}

/// I: the gradient of the first d columns of `x`, plus those columns of `residual` [t, c] if given, goes to the same columns of `dx`
/// [t, c], rounded once; in place where `residual` is `dx`. Other columns of `dx` stay.
///
/// # Errors
/// If shapes or types differ, or `residual` shares a buffer with `dx` without being it.
pub fn input_grad(
    s: &mut Stream,
    x: Tensor,
    w: Tensor,
    rstd: Tensor,
    dy: Tensor,
    residual: Option<Tensor>,
    dx: Tensor,
) -> Result<()> {
    const OP: &str = "rms_norm input gradient";
    let (t, c, d) = (x.rows(), x.cols(), w.len());
    expect_shape(OP, "dy", dy, &[t, d])?;
    expect_shape(OP, "dx", dx.reshape(&[t, c]), &[t, c])?;
    if let Some(residual) = residual {
        expect_residual(OP, residual, dx)?;
    }
    let (added, size) = (if residual.is_some() { t * d } else { 0 }, x.dtype.size_bytes());
    s.account(input_grad_cost(t, d, size).adding(added, size));
    let reads: Vec<Tensor> = [x, w, rstd, dy].into_iter().chain(residual).collect();
    let kernels =
        |_: &Target| are_fast(&[x, w, rstd, dy, dx]).then(|| ptx::rms_norm::input_grad(x, w, rstd, dy, residual, dx));
    s.launch_kernel(&reads, &[dx], kernels, move |m| {
        with_float!(x.dtype, T => {
            let onto = residual.is_some();
            let residual = residual.filter(|r| *r != dx).map(|r| m.read::<T>(r));
            let (x, w, rstd, dy) = (m.read::<T>(x), m.read::<T>(w), m.read::<T>(rstd), m.read::<T>(dy));
            let mut dx = m.write::<T>(dx);
            for_row_chunks(&mut dx, c, #[inline(always)] |first, dx| {
                for (i, dx) in dx.chunks_exact_mut(c).enumerate() {
                    let row = first + i;
                    if let Some(residual) = &residual {
                        dx[..d].copy_from_slice(&residual[row * c..][..d]);
                    }
                    let (x, dy, r) = (&x[row * c..][..d], &dy[row * d..][..d], rstd[row].to_acc());
                    let dot = sum(d, #[inline(always)] |j| x[j].to_acc() * dy[j].to_acc() * w[j].to_acc());
                    let k = dot * r * r * r / <T as Float>::Acc::of_f64(d as f64);
                    for j in 0..d {
                        let g = dy[j].to_acc() * w[j].to_acc() * r - x[j].to_acc() * k;
                        dx[j] = T::from_acc(if onto { dx[j].to_acc() + g } else { g });
                    }
                }
            });
        });
    });
    Ok(())
}

/// W: `dw` \[d\] += sum over t of dy_td x_td r_t.
pub fn weight_grad(s: &mut Stream, x: Tensor, rstd: Tensor, dy: Tensor, dw: Tensor) -> Result<()> {
    let (t, c, d) = (x.rows(), x.cols(), dw.len());
    expect_shape("rms_norm weight gradient", "dy", dy, &[t, d])?;
    s.account(cost(t, d, x.dtype.size_bytes()));
    let kernels = |_: &Target| are_fast(&[x, rstd, dy, dw]).then(|| ptx::rms_norm::weight_grad(x, rstd, dy, dw));
    s.launch_kernel(&[x, rstd, dy], &[dw], kernels, move |m| {
        with_float!(x.dtype, T => {
            let (x, rstd, dy) = (m.read::<T>(x), m.read::<T>(rstd), m.read::<T>(dy));
            column_sums::<T>(&x, c, &rstd, &dy, &mut m.write::<T>(dw));
        });
    });
    Ok(())
}

fn column_sums<T: Float>(x: &[T], c: usize, rstd: &[T], dy: &[T], dw: &mut [T]) {
    let d = dw.len();
    // Partial sums over fixed blocks of rows, added in block order: the same result on any number of threads.
    const ROWS: usize = 128;
    let partial: Vec<Vec<T::Acc>> = rstd
        .par_chunks(ROWS)
        .enumerate()
        .map(|(block, rstd)| {
            vectorize(
                #[inline(always)]
                || {
                    let mut sum = vec![T::of_f64(0.0).to_acc(); d];
                    for (i, r) in rstd.iter().enumerate() {
                        let row = block * ROWS + i;
                        let (x, dy) = (&x[row * c..][..d], &dy[row * d..][..d]);
                        for j in 0..d {
                            sum[j] += x[j].to_acc() * dy[j].to_acc() * r.to_acc();
                        }
                    }
                    sum
                },
            )
        })
        .collect();
    for sums in partial {
        for (w, s) in dw.iter_mut().zip(sums) {
            *w = T::from_acc(w.to_acc() + s);
        }
    }
}

/// Cost of the forward pass, and of W, which reads two tensors and writes none.
pub fn cost(t: usize, d: usize, elem_bytes: usize) -> Cost {
    let n = (t * d) as u64;
    Cost::stream(4 * n, n * elem_bytes as u64, n * elem_bytes as u64)
}

/// Cost of the forward pass into FP8.
pub fn cost_tiles(t: usize, d: usize, elem_bytes: usize) -> Cost {
    let plain = cost(t, d, elem_bytes);
    let quantized = quantize::tiles_cost(t, d, 0);
    Cost::stream(plain.vector_flops + quantized.vector_flops, plain.read_bytes, quantized.written_bytes)
}

/// Cost of I without a residual: reads x and dy, writes dx.
pub fn input_grad_cost(t: usize, d: usize, elem_bytes: usize) -> Cost {
    let n = (t * d) as u64;
    Cost::stream(8 * n, 2 * n * elem_bytes as u64, n * elem_bytes as u64)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use half::bf16;

    use super::*;
    use crate::{dtype::DType, ops::testing::*};

    #[test]
    fn gradients_match_finite_differences_on_a_column_range() {
        let (t, c, d) = (3, 21, 18);
        check_gradients(
            &[(&[t, c], 1), (&[d], 2)],
            &[t, d],
            |s, x| {
                let y = s.memory().alloc(DType::F64, &[t, d]);
                let rstd = s.memory().alloc(DType::F64, &[t]);
                forward(s, x[0], x[1], y, rstd, 1e-6)?;
                Ok(y)
            },
            |s, x, dy, dx| {
                let y = s.memory().alloc(DType::F64, &[t, d]);
                let rstd = s.memory().alloc(DType::F64, &[t]);
                forward(s, x[0], x[1], y, rstd, 1e-6)?;
                input_grad(s, x[0], x[1], rstd, dy, Some(dx[0]), dx[0])?;
                weight_grad(s, x[0], rstd, dy, dx[1])
            },
        );
    }

    /// Of the same numbers: x [t, c] and w in bf16, and both in f32.
    #[test]
    fn tiles_are_those_of_the_norm_in_f32() {
        let (t, c, d) = (70, 310, 300);
        let mut s = stream();
        let m = s.memory().clone();
        let (x, w) = (random_bf16(t * c, 1), random_bf16(d, 2));
        let wide = |x: &[bf16]| x.iter().map(|x| x.to_f32()).collect::<Vec<_>>();
        let narrow = (m.from_slice(&[t, c], &x), m.from_slice(&[d], &w));
        let wide = (m.from_slice(&[t, c], &wide(&x)), m.from_slice(&[d], &wide(&w)));
        let (y, rstd) = (m.alloc(DType::F32, &[t, d]), m.alloc(DType::F32, &[t]));
        let rounded = (m.alloc(DType::Bf16, &[t, d]), m.alloc(DType::Bf16, &[t]), m.alloc(DType::Bf16, &[t]));
        forward(&mut s, wide.0, wide.1, y, rstd, 1e-6).unwrap();
        forward(&mut s, narrow.0, narrow.1, rounded.0, rounded.1, 1e-6).unwrap();
        for scaling in [Scaling::Real, Scaling::PowerOfTwo] {
            let [want, got] = [(); 2].map(|()| poisoned_tiles(&m, t, d));
            quantize::tiles(&mut s, y, want, scaling).unwrap();
            forward_tiles(&mut s, narrow.0, narrow.1, got, rounded.2, 1e-6, scaling).unwrap();
            s.synchronize().unwrap();
            assert_same_tiles(&m, got, want);
            assert_eq!(m.download::<bf16>(rounded.2), m.download::<bf16>(rounded.1));
        }
    }

    #[test]
    #[expect(clippy::unwrap_used, reason = "tests")]
    fn the_gradient_of_a_residual_layer_is_one_pass() {
        let (t, d) = (3, 18);
        let norm = |s: &mut Stream, x: &[Tensor]| -> Result<[Tensor; 2]> {
            let [y, rstd] = [&[t, d][..], &[t]].map(|dims| s.memory().alloc(DType::F64, dims));
            forward(s, x[0], x[1], y, rstd, 1e-6)?;
            Ok([y, rstd])
        };
        check_gradients(
            &[(&[t, d], 1), (&[d], 2)],
            &[t, d],
            |s, x| {
                let [y, _] = norm(s, x)?;
                crate::ops::elementwise::add_acc(s, x[0], y)?;
                Ok(y)
            },
            |s, x, dy, dx| {
                let [_, rstd] = norm(s, x)?;
                input_grad(s, x[0], x[1], rstd, dy, Some(dy), dx[0])?;
                weight_grad(s, x[0], rstd, dy, dx[1])
            },
        );
        // Of wider rows, only the columns that have a gradient; from elsewhere with the bits that it has in place.
        let (c, mut s) = (21, stream());
        let m = s.memory().clone();
        let put = |dims: &[usize], seed| m.from_slice(dims, &random(dims.iter().product(), seed));
        let (x, w, rstd, dy, residual) =
            (put(&[t, c], 1), put(&[d], 2), put(&[t], 3), put(&[t, d], 4), put(&[t, c], 5));
        let before = m.download::<f64>(residual);
        let dx = m.from_slice(&[t, c], &vec![7.0; t * c]);
        input_grad(&mut s, x, w, rstd, dy, Some(residual), dx).unwrap();
        s.synchronize().unwrap();
        assert_eq!(m.download::<f64>(residual), before);
        input_grad(&mut s, x, w, rstd, dy, Some(residual), residual).unwrap();
        s.synchronize().unwrap();
        for (at, (got, in_place)) in m.download::<f64>(dx).into_iter().zip(m.download::<f64>(residual)).enumerate() {
            assert_eq!(got, if at % c < d { in_place } else { 7.0 }, "element {at}");
        }
        let part = residual.slice(0, t * d).reshape(&[t, d]);
        let error = input_grad(&mut s, part, w, rstd, dy, Some(residual), part).unwrap_err().to_string();
        assert!(
            error.contains("`residual` should be F64 of [3, 18], the output itself or in another buffer"),
            "{error}"
        );
    }
}
