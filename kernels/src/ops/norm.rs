//! Gradient norm and the guard in front of the optimizer.
//!
//! Squares are summed in f64 over fixed blocks, in block order, so that the norm does not depend on the number of threads.

use std::sync::Arc;

use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::Float,
    error::{Error, Result},
    ops::expect_shape,
    ptx,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// `acc` f64 \[1\] += sum of squares of `x`.
pub fn sum_squares_acc(s: &mut Stream, x: Tensor, acc: Tensor) -> Result<()> {
    expect_shape("sum_squares", "acc", acc, &[1])?;
    s.account(cost(x.len(), x.dtype.size_bytes()));
    let kernels = |_: &Target| x.dtype.is_float().then(|| ptx::norm::sum_squares_acc(x, acc));
    s.launch_kernel(&[x, acc], &[acc], kernels, move |m| {
        let total = with_float!(x.dtype, T => {
            let x = m.read::<T>(x);
            let blocks: Vec<f64> = x.par_chunks(8192).map(sum_squares::<T>).collect();
            blocks.iter().sum::<f64>()
        });
        m.write::<f64>(acc)[0] += total;
    });
    Ok(())
}

/// `acc` f64 \[1\] += sum of `x` (f32 or f64), in element order.
pub fn sum_acc(s: &mut Stream, x: Tensor, acc: Tensor) -> Result<()> {
    expect_shape("sum", "acc", acc, &[1])?;
    s.account(cost(x.len(), x.dtype.size_bytes()));
    let kernels = |_: &Target| x.dtype.is_float().then(|| ptx::norm::sum_acc(x, acc));
    s.launch_kernel(&[x, acc], &[acc], kernels, move |m| {
        let total: f64 = with_float!(x.dtype, T => m.read::<T>(x).iter().map(|v| v.as_f64()).sum());
        m.write::<f64>(acc)[0] += total;
    });
    Ok(())
}

fn sum_squares<T: Float>(x: &[T]) -> f64 {
    crate::simd::vectorize(
        #[inline(always)]
        || {
            let mut lanes = [0f64; 8];
            for chunk in x.chunks(8) {
                for (lane, v) in lanes.iter_mut().zip(chunk) {
                    *lane += v.as_f64() * v.as_f64();
                }
            }
            lanes.iter().sum()
        },
    )
}

/// Factor that brings a gradient of squared norm `sum_squares` to at most `max_norm`; `None` if the norm is not finite, when
/// an update must not happen.
pub fn clip_factor(sum_squares: f64, max_norm: f64) -> Option<f64> {
    let norm = sum_squares.sqrt();
    norm.is_finite().then(|| (max_norm / (norm + 1e-6)).min(1.0))
}

/// Fails the stream with [`Error::NotFinite`] if `x` holds a NaN or an infinity.
pub fn check_finite(s: &mut Stream, x: Tensor, task: Arc<str>, name: Arc<str>) {
    let kernels = |_: &Target| x.dtype.is_float().then(|| ptx::norm::check_finite(x, task.clone(), name.clone()));
    let (task, name) = (task.clone(), name.clone());
    s.launch_kernel(&[x], &[], kernels, move |m| {
        let bad = with_float!(x.dtype, T => m.read::<T>(x).iter().map(|v| v.as_f64()).find(|v| !v.is_finite()));
        if let Some(value) = bad {
            not_finite(&task, &name, value).raise();
        }
    });
}

/// What is said of a value that is none.
pub(crate) fn not_finite(task: &str, tensor: &str, value: f64) -> Error {
    Error::NotFinite { task: task.to_owned(), tensor: tensor.to_owned(), value }
}

/// Cost of summing `len` squares.
pub fn cost(len: usize, elem_bytes: usize) -> Cost {
    Cost::stream(2 * len as u64, (len * elem_bytes) as u64, 8)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::testing::*;

    #[test]
    fn squares_add_up_over_blocks_and_tensors() {
        let mut s = stream();
        let memory = s.memory().clone();
        let (a, b) = (memory.from_slice(&[20_000], &vec![0.5f32; 20_000]), memory.from_slice(&[3], &[1f32, 2.0, 2.0]));
        let acc = memory.from_slice(&[1], &[0f64]);
        sum_squares_acc(&mut s, a, acc).unwrap();
        sum_squares_acc(&mut s, b, acc).unwrap();
        s.synchronize().unwrap();
        assert_eq!(memory.download::<f64>(acc), [5009.0]);
    }

    #[test]
    fn clipping_scales_down_only_and_refuses_nan() {
        assert_eq!(clip_factor(0.25, 1.0), Some(1.0));
        assert!((clip_factor(16.0, 1.0).unwrap() - 0.25).abs() < 1e-6);
        assert_eq!(clip_factor(f64::NAN, 1.0), None);
    }

    #[test]
    fn a_nan_names_its_task_and_tensor() {
        let mut s = stream();
        let x = s.memory().from_slice(&[2], &[1f32, f32::NAN]);
        check_finite(&mut s, x, "3 F layer 1".into(), "scores".into());
        let error = s.synchronize().unwrap_err().to_string();
        assert!(error.starts_with("3 F layer 1: found NaN in `scores`"), "{error}");
    }
}
