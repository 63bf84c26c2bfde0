//! AdamW (arXiv 1711.05101) with f32 master weights:
//! m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, p = p (1 - lr wd) - lr m' / (sqrt(v') + eps), with m' = m / (1 - b1^n) and
//! v' = v / (1 - b2^n), where g is the clipped gradient.

use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float},
    error::Result,
    ops::{elementwise, expect_shape, is_fast, norm::clip_factor},
    ptx,
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// Hyper-parameters of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct AdamW {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the first moment.
    pub beta1: f64,
    /// Decay of the second moment.
    pub beta2: f64,
    /// Added to the root of the second moment.
    pub eps: f64,
    /// Decoupled weight decay; 0 for norms and biases.
    pub weight_decay: f64,
    /// Updates made before this one, plus one.
    pub step: u64,
    /// Largest norm of the whole gradient.
    pub max_grad_norm: f64,
}

/// Tensors of one parameter's update, all of one shape.
#[derive(Clone, Copy, Debug)]
pub struct Slots {
    /// Master weight, f32 (f64 in gradient checks).
    pub master: Tensor,
    /// Gradient, any float type.
    pub grad: Tensor,
    /// First moment, like the master.
    pub m: Tensor,
    /// Second moment, like the master.
    pub v: Tensor,
    /// Where the rounded weight goes, when compute has another type than the master.
    pub weight: Option<Tensor>,
}

/// Updates a parameter in place; `sum_squares` f64 \[1\] is the whole gradient's squared norm. Nothing changes if that is not
/// finite.
pub fn update(s: &mut Stream, hyper: AdamW, slots: Slots, sum_squares: Tensor) -> Result<()> {
    let dims: Vec<usize> = slots.master.shape.dims().collect();
    for (role, tensor) in [("grad", slots.grad), ("m", slots.m), ("v", slots.v)] {
        expect_shape("adamw", role, tensor, &dims)?;
    }
    let Slots { master, grad, m, v, weight } = slots;
    s.account(cost(master.len(), grad.dtype.size_bytes()));
    if let Some(weight) = weight {
        expect_shape("adamw", "weight", weight.reshape(&dims), &dims)?;
        s.account(elementwise::cost(master.len(), 1, weight.dtype.size_bytes()));
    }
    let writes: Vec<Tensor> = [master, m, v].into_iter().chain(weight).collect();
    let has = master.dtype == DType::F32 && is_fast(grad) && weight.is_none_or(is_fast);
    let kernels = |_: &Target| has.then(|| ptx::adamw::update(hyper, slots, sum_squares));
    s.launch_kernel(&[grad, sum_squares], &writes, kernels, move |memory| {
        if let Some(clip) = clip_factor(memory.read::<f64>(sum_squares)[0], hyper.max_grad_norm) {
            with_float!(grad.dtype, G => with_float!(master.dtype, T => {
                let grad = memory.read::<G>(grad);
                let (mut p, mut m, mut v) = (memory.write::<T>(master), memory.write::<T>(m), memory.write::<T>(v));
                update_slice::<T, G>(hyper, clip, &grad, &mut p, &mut m, &mut v);
            }));
        }
        if let Some(weight) = weight {
            elementwise::copy_now(memory, master, weight);
        }
    });
    Ok(())
}

fn update_slice<T: Float, G: Float>(h: AdamW, clip: f64, grad: &[G], p: &mut [T], m: &mut [T], v: &mut [T]) {
    let n = h.step as i32;
    let c = |x: f64| <T as Float>::of_f64(x).to_acc();
    let (b1, b2, a1, a2) = (c(h.beta1), c(h.beta2), c(1.0 - h.beta1), c(1.0 - h.beta2));
    let (step, root) = (c(h.lr / (1.0 - h.beta1.powi(n))), c((1.0 - h.beta2.powi(n)).sqrt().recip()));
    let (keep, eps) = (c(1.0 - h.lr * h.weight_decay), c(h.eps));
    const CHUNK: usize = 16 * 1024;
    let chunks = p.par_chunks_mut(CHUNK).zip(m.par_chunks_mut(CHUNK)).zip(v.par_chunks_mut(CHUNK));
    chunks.zip(grad.par_chunks(CHUNK)).for_each(|(((p, m), v), grad)| {
        vectorize(
            #[inline(always)]
            || {
                for (((p, m), v), g) in p.iter_mut().zip(m).zip(v).zip(grad) {
                    let g = <T as Float>::of_f64(g.as_f64() * clip).to_acc();
                    let m1 = b1 * m.to_acc() + a1 * g;
                    let v1 = b2 * v.to_acc() + a2 * g * g;
                    let delta = step * m1 / (num_traits::Float::sqrt(v1) * root + eps);
                    *p = T::from_acc(p.to_acc() * keep - delta);
                    (*m, *v) = (T::from_acc(m1), T::from_acc(v1));
                }
            },
        );
    });
}

/// Cost of updating `len` parameters with f32 state.
pub fn cost(len: usize, grad_bytes: usize) -> Cost {
    let n = len as u64;
    Cost::stream(14 * n, n * (12 + grad_bytes as u64), 12 * n)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::testing::*;

    fn one_update(sum_squares: f64, max_grad_norm: f64) -> Vec<f32> {
        let mut s = stream();
        let memory = s.memory().clone();
        let f = |x: f32| memory.from_slice(&[1], &[x]);
        let slots = Slots { master: f(1.0), grad: f(4.0), m: f(0.5), v: f(0.25), weight: None };
        let hyper = AdamW { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3, max_grad_norm };
        let acc = memory.from_slice(&[1], &[sum_squares]);
        update(&mut s, hyper, slots, acc).unwrap();
        s.synchronize().unwrap();
        [slots.master, slots.m, slots.v].iter().map(|&t| memory.download::<f32>(t)[0]).collect()
    }

    #[test]
    fn one_update_by_hand() {
        // g = 4: m = 0.85, v = 1.0375; m' = 0.85/0.271, v' = 1.0375/0.142625
        let got = one_update(16.0, f64::INFINITY);
        let want = 1.0 * (1.0 - 0.01) - 0.1 * (0.85 / 0.271) / ((1.0375f64 / 0.142_625).sqrt() + 1e-8);
        for (g, w) in got.iter().zip([want, 0.85, 1.0375]) {
            assert!((f64::from(*g) - w).abs() < 1e-6, "{g} for {w}");
        }
    }

    #[test]
    fn the_gradient_is_clipped_and_a_nan_changes_nothing() {
        let clipped = one_update(16.0, 1.0);
        assert!((f64::from(clipped[1]) - (0.45 + 0.1)).abs() < 1e-5, "g = 1 after clipping: {clipped:?}");
        assert_eq!(one_update(f64::NAN, 1.0), [1.0, 0.5, 0.25]);
    }
}
