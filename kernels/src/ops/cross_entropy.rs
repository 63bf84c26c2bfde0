//! Cross-entropy fused with the head: nll_t = logsumexp_v(h_td w_vd^T) - logit at the target, without the logits [t, v].
//!
//! Tokens go through in chunks whose logits stay in cache. The three passes need the same logits, so a training step asks for
//! all of them at once ([`Passes`]); apart, each recomputes them.
//! With p = softmax(logits) and the mean's scale: dlogits = scale (p - onehot(target)), dh = dlogits w, dw += dlogits^T h.

use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::{Float, Real},
    error::Result,
    ops::{
        are_fast, expect_shape,
        gemm::{self as linear, Mat, Threads, gemm},
        is_fast,
    },
    ptx,
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// A target that is not counted and has no gradient.
pub const IGNORE: u32 = u32::MAX;

/// Tokens whose logits exist at a time.
const CHUNK: usize = 256;

/// What to compute; `None` is skipped.
#[derive(Clone, Copy, Debug)]
pub struct Passes {
    /// F: negative log-likelihood in nats per token, f32 or f64 like `h`'s accumulator \[t\]; 0 where ignored.
    pub nll: Option<Tensor>,
    /// I: gradient of `h` [t, d], assigned.
    pub dh: Option<Tensor>,
    /// W: gradient of `w` [v, d], added to.
    pub dw: Option<Tensor>,
}

/// Runs the passes asked for on `h` [t, d], `w` [v, d] and `targets` u32 \[t\]; gradients are of `scale` times the sum of nll.
pub fn run(s: &mut Stream, h: Tensor, w: Tensor, targets: Tensor, scale: f64, passes: Passes) -> Result<()> {
    let (t, d, v) = (targets.len(), w.dim(1), w.dim(0));
    expect_shape("cross_entropy", "h", h, &[t, d])?;
    if let Some(nll) = passes.nll {
        expect_shape("cross_entropy", "nll", nll, &[t])?;
    }
    if let Some(dh) = passes.dh {
        expect_shape("cross_entropy", "dh", dh, &[t, d])?;
    }
    if let Some(dw) = passes.dw {
        expect_shape("cross_entropy", "dw", dw, &[v, d])?;
    }
    let writes: Vec<Tensor> = [passes.nll, passes.dh, passes.dw].into_iter().flatten().collect();
    s.account(cost(t, v, d, h.dtype.size_bytes(), passes));
    let kernels = |on: &Target| {
        (are_fast(&[h, w]) && passes.dh.is_none_or(|dh| dh.dtype == h.dtype) && passes.dw.is_none_or(is_fast))
            .then(|| chunked_kernels(on.into(), h, w, targets, scale, passes))
    };
    s.launch_kernel(&[h, w, targets], &writes, kernels, move |m| {
        with_float!(h.dtype, T => {
            let (h, w, targets) = (m.read::<T>(h), m.read::<T>(w), m.read::<u32>(targets));
            let mut nll = passes.nll.map(|x| m.write::<<T as Float>::Acc>(x));
            let mut dh = passes.dh.map(|x| m.write::<T>(x));
            let mut dw = passes.dw.map(|x| m.write::<T>(x));
            let mut logits = vec![T::of_f64(0.0); CHUNK.min(t) * v];
            let mut losses = vec![<T as Float>::Acc::of_f64(0.0); CHUNK.min(t)];
            for first in (0..t).step_by(CHUNK) {
                let rows = CHUNK.min(t - first);
                let (h, targets) = (&h[first * d..][..rows * d], &targets[first..][..rows]);
                let (logits, losses) = (&mut logits[..rows * v], &mut losses[..rows]);
                gemm(Mat::new(h, rows, d), Mat::new(&w, v, d).t(), 0.0, logits, v, Threads::All);
                softmax_rows(logits, targets, losses, scale, v);
                if let Some(nll) = &mut nll {
                    nll[first..first + rows].copy_from_slice(losses);
                }
                if let Some(dh) = &mut dh {
                    let dh = &mut dh[first * d..][..rows * d];
                    gemm(Mat::new(logits, rows, v), Mat::new(&w, v, d), 0.0, dh, d, Threads::All);
                }
                if let Some(dw) = &mut dw {
                    gemm(Mat::new(logits, rows, v).t(), Mat::new(h, rows, d), 1.0, dw, d, Threads::All);
                }
            }
        });
    });
    Ok(())
}

/// Tokens whose logits a GPU has at a time: 128 Mi numbers at most, so that they are some blocks high and within its memory.
fn gpu_chunk(t: usize, v: usize) -> usize {
    ((128 << 20) / v.max(1)).max(256).min(t.max(1))
}

/// Logits of a chunk of tokens to scratch, their softmax and gradient in place, and the products with it.
fn chunked_kernels(
    on: ptx::gemm::Target,
    h: Tensor,
    w: Tensor,
    targets: Tensor,
    scale: f64,
    passes: Passes,
) -> Vec<ptx::Launch> {
    let (t, d, v) = (targets.len(), w.dim(1), w.dim(0));
    let chunk = gpu_chunk(t, v);
    let scale = (passes.dh.is_some() || passes.dw.is_some()).then_some(scale);
    let mut launches = Vec::new();
    for first in (0..t).step_by(chunk) {
        let n = chunk.min(t - first);
        let rows = |x: Tensor| x.slice(first * d, n * d).reshape(&[n, d]);
        let logits = ptx::scratch_tensor(h.dtype, &[n, v]);
        launches.extend(ptx::gemm::forward(on, rows(h), w, None, logits));
        let at = ptx::cross_entropy::Logits { at: ptx::Arg::Tensor(logits), dtype: h.dtype, v };
        let nll = match passes.nll {
            Some(nll) => ptx::Arg::Tensor(nll.slice(first, n)),
            None => ptx::Arg::Scratch { slot: 0, bytes: 4 * n as u64 },
        };
        launches.extend(ptx::cross_entropy::softmax_rows(at, targets.slice(first, n), nll, scale));
        launches.extend(passes.dh.into_iter().flat_map(|dh| ptx::gemm::input_grad(on, logits, w, rows(dh), false)));
        launches.extend(passes.dw.into_iter().flat_map(|dw| ptx::gemm::weight_grad(on, logits, rows(h), dw, None)));
    }
    launches
}

/// What is said of a target that is no token.
pub(crate) fn no_such_target(target: u32, v: usize) -> String {
    format!("expected a target below the vocabulary of {v}, found {target}")
}

/// Turns each row of logits into its gradient and its loss.
fn softmax_rows<T: Float>(logits: &mut [T], targets: &[u32], losses: &mut [T::Acc], scale: f64, v: usize) {
    logits.par_chunks_mut(v).zip(targets).zip(losses).for_each(|((row, &target), loss)| {
        vectorize(
            #[inline(always)]
            || {
                if target == IGNORE {
                    row.fill(T::of_f64(0.0));
                    *loss = T::Acc::of_f64(0.0);
                    return;
                }
                let target = target as usize;
                assert!(target < v, "{}", no_such_target(target as u32, v));
                let mut lanes = [row[0].to_acc(); 16];
                for chunk in row.chunks(16) {
                    for (lane, x) in lanes.iter_mut().zip(chunk) {
                        *lane = if x.to_acc() > *lane { x.to_acc() } else { *lane };
                    }
                }
                let max = lanes.iter().fold(lanes[0], |a, &b| if b > a { b } else { a });
                let at_target = row[target].to_acc();
                let mut sums = [T::Acc::of_f64(0.0); 16];
                for chunk in row.chunks_mut(16) {
                    for (sum, x) in sums.iter_mut().zip(chunk) {
                        let e = (x.to_acc() - max).exp_fast();
                        *sum += e;
                        *x = T::from_acc(e);
                    }
                }
                let mut sum = T::Acc::of_f64(0.0);
                for s in sums {
                    sum += s;
                }
                *loss = num_traits::Float::ln(sum) + max - at_target;
                let factor = T::Acc::of_f64(scale) / sum;
                for x in row.iter_mut() {
                    *x = T::from_acc(x.to_acc() * factor);
                }
                row[target] = T::from_acc(row[target].to_acc() - T::Acc::of_f64(scale));
            },
        );
    });
}

/// Cost of the passes in one go: one product for the logits, one more for each gradient that is asked for.
pub fn cost(t: usize, v: usize, d: usize, elem_bytes: usize, passes: Passes) -> Cost {
    let dh = passes.dh.map(|_| linear::input_grad_cost(t, v, d, elem_bytes));
    let dw = passes.dw.map(|_| linear::weight_grad_cost(t, v, d, elem_bytes));
    [Some(linear::forward_cost(t, v, d, elem_bytes)), dh, dw].into_iter().flatten().sum()
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::{dtype::DType, ops::testing::*};

    const TARGETS: [u32; 3] = [1, IGNORE, 6];

    fn run_f64(s: &mut Stream, x: &[Tensor], passes: Passes, scale: f64) -> Result<()> {
        let targets = s.memory().from_slice(&[3], &TARGETS);
        run(s, x[0], x[1], targets, scale, passes)
    }

    #[test]
    fn gradients_match_finite_differences_and_ignored_targets_have_none() {
        // check_gradients projects with its own weights; the nll's projection is emulated by one scale per row, so the sum is
        // checked here with equal weights by scaling dy away.
        let (d, v) = (4, 7);
        let mut s = stream();
        let memory = s.memory().clone();
        let (h, w) = (random(3 * d, 1), random(v * d, 2));
        let x = [memory.from_slice(&[3, d], &h), memory.from_slice(&[v, d], &w)];
        let nll = memory.alloc(DType::F64, &[3]);
        let (dh, dw) = (memory.alloc(DType::F64, &[3, d]), memory.alloc(DType::F64, &[v, d]));
        run_f64(&mut s, &x, Passes { nll: Some(nll), dh: Some(dh), dw: Some(dw) }, 0.5).unwrap();
        s.synchronize().unwrap();
        let grads = [memory.download::<f64>(dh), memory.download::<f64>(dw)];
        let mut loss = |which: usize, i: usize, delta: f64| {
            memory.write::<f64>(x[which])[i] += delta;
            run_f64(&mut s, &x, Passes { nll: Some(nll), dh: None, dw: None }, 0.5).unwrap();
            s.synchronize().unwrap();
            memory.write::<f64>(x[which])[i] -= delta;
            0.5 * memory.download::<f64>(nll).iter().sum::<f64>()
        };
        for (which, grad) in grads.iter().enumerate() {
            for (i, g) in grad.iter().enumerate() {
                let numeric = (loss(which, i, 1e-5) - loss(which, i, -1e-5)) / 2e-5;
                assert!((g - numeric).abs() < 1e-8, "tensor {which}, element {i}: {numeric} by differences, found {g}");
            }
        }
        assert!(grads[0][d..2 * d].iter().all(|&g| g == 0.0));
    }

    #[test]
    fn passes_apart_equal_passes_together() {
        let (t, d, v) = (600, 8, 33);
        let mut s = stream();
        let memory = s.memory().clone();
        let x = [memory.from_slice(&[t, d], &random(t * d, 1)), memory.from_slice(&[v, d], &random(v * d, 2))];
        let ids: Vec<u32> = (0..t as u32).map(|i| i % v as u32).collect();
        let targets = memory.from_slice(&[t], &ids);
        let mut out = Vec::new();
        for together in [true, false] {
            let (nll, dh) = (memory.alloc(DType::F64, &[t]), memory.alloc(DType::F64, &[t, d]));
            let dw = memory.from_slice(&[v, d], &vec![0f64; v * d]);
            let (n, i, w) = (Some(nll), Some(dh), Some(dw));
            let all = [Passes { nll: n, dh: i, dw: w }];
            let apart = [
                Passes { nll: n, dh: None, dw: None },
                Passes { nll: None, dh: i, dw: None },
                Passes { nll: None, dh: None, dw: w },
            ];
            for passes in if together { &all[..] } else { &apart[..] } {
                run(&mut s, x[0], x[1], targets, 0.1, *passes).unwrap();
            }
            s.synchronize().unwrap();
            out.push([nll, dh, dw].map(|t| memory.download::<f64>(t)));
        }
        assert_eq!(out[0], out[1]);
    }
}
