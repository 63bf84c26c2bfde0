//! `y_no = x_ni w_oi^T` by dot products: what generation does with every weight, once a step.
//!
//! For a few rows of x one read of the weight is the whole cost, so there is no packing: each row of w is dotted with the rows of x
//! while it is in the first cache. A small product stays on the calling thread, where it is faster than waking another. w may be bf16
//! under f32 activations; it is widened in registers. (Panels of sixteen outputs, transposed and widened in the first cache, under fused
//! multiply-adds, were faster from 8 to 32 rows on and a quarter as fast for one.)
//!
//! The bits of a row of y follow from its row of x and from w alone: not from how many rows are beside it, nor from the threads.

use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::Float,
    error::{Error, Result},
    ops::{expect_shape, gemm::Threads, is_fast, lanes},
    ptx,
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
};

/// Weight bytes, once for each four rows of x, from which the pool is used.
const MIN_PARALLEL_BYTES: usize = 1 << 20;
/// Weight bytes one thread takes at a time, at most.
const CHUNK_BYTES: usize = 128 << 10;
/// Bytes of x that stay in the first cache.
const X_BYTES: usize = 16 << 10;
/// Rows of w dotted at once.
const BLOCK: usize = 4;

/// Runs `$body` with `$t` and `$w` bound to the types of activations and weights: equal, or bf16 weights under f32.
macro_rules! with_weight {
    ($x:expr, $weight:expr, $t:ident, $w:ident => $body:expr) => {
        match ($x.dtype, $weight.dtype) {
            ($crate::dtype::DType::F32, $crate::dtype::DType::Bf16) => {
                type $t = f32;
                type $w = ::half::bf16;
                $body
            }
            (dtype, _) => $crate::with_float!(dtype, $t => {
                type $w = $t;
                $body
            }),
        }
    };
}
pub(crate) use with_weight;

/// `Err` unless the weight has the activations' type, or is bf16 under f32.
pub(crate) fn expect_weight(op: &'static str, x: Tensor, weight: Tensor) -> Result<()> {
    use crate::dtype::DType::{Bf16, F32};
    if x.dtype == weight.dtype || (x.dtype, weight.dtype) == (F32, Bf16) {
        return Ok(());
    }
    let expected = format!("{:?}, or Bf16 under F32", x.dtype);
    Err(Error::Shape { op, role: "weight", expected, found: weight })
}

/// Assigns `y_on = w_oi x_ni^T`: row o of y holds the products of row o of w. `i` is the row length.
///
/// # Panics
/// If a slice is shorter than `y` implies.
pub fn gemv<T: Float, W: Float<Acc = T::Acc>>(w: &[W], x: &[T], i: usize, y_on: &mut [T::Acc], threads: Threads) {
    let n = x.len() / i.max(1);
    let o = y_on.len() / n.max(1);
    assert!(o * n == y_on.len() && o * i == w.len() && n * i == x.len(), "sizes of a product agree");
    if y_on.is_empty() {
        return;
    }
    if threads == Threads::One || size_of_val(w) * n.div_ceil(BLOCK) < MIN_PARALLEL_BYTES {
        return vectorize(
            #[inline(always)]
            || rows(w, x, i, n, y_on),
        );
    }
    let share = o.div_ceil(2 * rayon::current_num_threads());
    let chunk = (CHUNK_BYTES / (i * size_of::<W>())).clamp(1, share).next_multiple_of(BLOCK);
    y_on.par_chunks_mut(chunk * n).zip(w.par_chunks(chunk * i)).for_each(|(y, w)| {
        vectorize(
            #[inline(always)]
            || rows(w, x, i, n, y),
        )
    });
}

#[inline(always)]
fn rows<T: Float, W: Float<Acc = T::Acc>>(w: &[W], x: &[T], i: usize, n: usize, y: &mut [T::Acc]) {
    let per_block = (X_BYTES / (i * size_of::<T>()).max(1)).max(BLOCK) / BLOCK * BLOCK;
    for first in (0..n).step_by(per_block) {
        let x = &x[first * i..(first + per_block).min(n) * i];
        for (w, y) in w.chunks(BLOCK * i).zip(y.chunks_mut(BLOCK * n)) {
            for (j, x) in (first..).zip(x.chunks_exact(i)) {
                if w.len() == BLOCK * i {
                    for (b, sum) in lanes::dot4(w, x).into_iter().enumerate() {
                        y[b * n + j] = sum;
                    }
                } else {
                    for (w, y) in w.chunks_exact(i).zip(y.chunks_exact_mut(n)) {
                        y[j] = lanes::dot(w, x);
                    }
                }
            }
        }
    }
}

/// `y_no = beta y_no + x_ni w_oi^T`; what y holds is not read where beta is 0.
///
/// # Panics
/// If sizes do not agree.
pub(super) fn linear<T: Float, W: Float<Acc = T::Acc>>(
    x: &[T],
    w: &[W],
    i: usize,
    y: &mut [T],
    beta: f64,
    threads: Threads,
) {
    let n = x.len() / i.max(1);
    let mut y_on = vec![T::Acc::default(); y.len()];
    gemv(w, x, i, &mut y_on, threads);
    let o = y.len() / n.max(1);
    for (j, y) in y.chunks_exact_mut(o.max(1)).enumerate() {
        for (y, &sum) in y.iter_mut().zip(y_on[j..].iter().step_by(n)) {
            let old = if beta == 0.0 { T::Acc::default() } else { T::Acc::of_f64(beta) * y.to_acc() };
            *y = T::from_acc(old + sum);
        }
    }
}

/// F: `y_no = x_ni w_oi^T`, plus `bias_o` (of x's or w's type) if given. The contract of [`super::gemm::forward`].
pub fn forward(s: &mut Stream, x: Tensor, w: Tensor, bias: Option<Tensor>, y: Tensor) -> Result<()> {
    let (o, i) = (w.dim(0), w.dim(1));
    let n = x.len() / i.max(1);
    if x.len() != n * i || y.len() != n * o || y.dtype != x.dtype {
        expect_shape("linear", "x", x, &[n, i])?;
        let expected = format!("{:?} of [{n}, {o}]", x.dtype);
        return Err(Error::Shape { op: "linear", role: "y", expected, found: y });
    }
    expect_weight("linear", x, w)?;
    if let Some(bias) = bias {
        expect_shape("linear", "bias", bias, &[o])?;
        expect_weight("linear", x, bias)?;
    }
    let reads: Vec<Tensor> = [x, w].into_iter().chain(bias).collect();
    let kernels =
        |_: &Target| (reads.iter().all(|t| is_fast(*t)) && is_fast(y)).then(|| ptx::gemv::forward(x, w, bias, y));
    s.launch_kernel(&reads, &[y], kernels, move |m| {
        with_weight!(x, w, T, W => {
            let (w_dtype, x, w, mut y) = (w.dtype, m.read::<T>(x), m.read::<W>(w), m.write::<T>(y));
            match bias {
                Some(bias) if bias.dtype == w_dtype => fill::<T, W>(&mut y, &m.read::<W>(bias)),
                Some(bias) => fill::<T, T>(&mut y, &m.read::<T>(bias)),
                None => (),
            }
            linear::<T, W>(&x, &w, i, &mut y, if bias.is_some() { 1.0 } else { 0.0 }, Threads::All);
        });
    });
    Ok(())
}

/// Each row of y is the bias; one of bf16 is a number of f32 too.
fn fill<T: Float, B: Float<Acc = T::Acc>>(y: &mut [T], bias: &[B]) {
    for y in y.chunks_exact_mut(bias.len().max(1)) {
        y.iter_mut().zip(bias).for_each(|(y, bias)| *y = T::from_acc(bias.to_acc()));
    }
}

/// Cost over `n` rows of x; the weight's elements have `weight_bytes` each, the others `elem_bytes`.
pub fn cost(n: usize, o: usize, i: usize, elem_bytes: usize, weight_bytes: usize) -> Cost {
    let (n, o, i) = (n as u64, o as u64, i as u64);
    let read_bytes = o * i * weight_bytes as u64 + n * i * elem_bytes as u64;
    Cost {
        product_flops: 2 * n * o * i,
        cast_elements: n * i,
        ..Cost::stream(0, read_bytes, n * o * elem_bytes as u64)
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::{
        dtype::DType,
        ops::{gemm, testing::*},
    };

    fn cast<T: Float>(x: &[f64]) -> Vec<T> {
        x.iter().map(|&x| T::of_f64(x)).collect()
    }

    /// The op's y, and the f64 product of the operands as rounded.
    fn run<T: Float, W: Float>(n: usize, o: usize, i: usize, bias: bool) -> (Vec<f64>, Vec<f64>) {
        let mut s = stream();
        let m = s.memory().clone();
        let (x, w, b): (Vec<T>, Vec<W>, Vec<W>) =
            (cast(&random(n * i, 1)), cast(&random(o * i, 2)), cast(&random(o, 3)));
        let wide = |v: &[W]| v.iter().map(|v| v.as_f64()).collect::<Vec<_>>();
        let x_f64: Vec<f64> = x.iter().map(|v| v.as_f64()).collect();
        let y = m.alloc(T::DTYPE, &[n, o]);
        let b_given = bias.then(|| m.from_slice(&[o], &b));
        forward(&mut s, m.from_slice(&[n, i], &x), m.from_slice(&[o, i], &w), b_given, y).unwrap();
        let want = m.alloc(DType::F64, &[n, o]);
        let b_f64 = bias.then(|| m.from_slice(&[o], &wide(&b)));
        gemm::forward(&mut s, m.from_slice(&[n, i], &x_f64), m.from_slice(&[o, i], &wide(&w)), b_f64, want).unwrap();
        s.synchronize().unwrap();
        (m.download::<T>(y).iter().map(|v| v.as_f64()).collect(), m.download(want))
    }

    #[test]
    fn every_shape_and_type_matches_the_matrix_product() {
        use half::bf16;
        for (n, o, i) in [(1, 1, 1), (1, 7, 33), (3, 4, 16), (8, 13, 50), (70, 9, 129), (1, 1030, 300), (2, 1030, 300)]
        {
            for bias in [false, true] {
                let (got, want) = run::<f64, f64>(n, o, i, bias);
                assert_close(&got, &want, 1e-12);
                let (got, want) = run::<f32, f32>(n, o, i, bias);
                assert_close(&got, &want, 1e-4);
                let (got, want) = run::<f32, bf16>(n, o, i, bias);
                assert_close(&got, &want, 1e-4);
                let (got, want) = run::<bf16, bf16>(n, o, i, bias);
                assert_close(&got, &want, 1.0 / 128.0);
            }
        }
    }

    #[test]
    fn wrong_types_are_refused() {
        let mut s = stream();
        let m = s.memory().clone();
        let x = m.alloc(DType::Bf16, &[1, 4]);
        let (w, y) = (m.alloc(DType::F32, &[2, 4]), m.alloc(DType::Bf16, &[1, 2]));
        let error = forward(&mut s, x, w, None, y).unwrap_err().to_string();
        assert!(error.contains("`weight` should be Bf16, or Bf16 under F32, found F32"), "{error}");
    }
}
