//! AdamW (arXiv 1711.05101) with f32 master weights, and moments in f32 or bf16 (DeepSeek-V3 report, section 3.3.3):
//! m = b1 m + (1-b1) g, v = b2 v + (1-b2) g^2, p = p (1 - lr wd) - lr m' / (sqrt(v') + eps), with m' = m / (1 - b1^n) and
//! v' = v / (1 - b2^n), where g is the clipped gradient.

use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float},
    error::Result,
    ops::{elementwise, expect::expect_tensor, expect_shape, is_fast, norm::clip_factor},
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
    /// First moment, like the master or bf16.
    pub m: Tensor,
    /// Second moment, like the first.
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
    expect_tensor("adamw", "v", v, m.dtype, &dims)?;
    s.account(cost(master.len(), grad.dtype.size_bytes(), m.dtype.size_bytes()));
    if let Some(weight) = weight {
        expect_shape("adamw", "weight", weight.reshape(&dims), &dims)?;
        s.account(elementwise::cost(master.len(), 1, weight.dtype.size_bytes()));
    }
    let writes: Vec<Tensor> = [master, m, v].into_iter().chain(weight).collect();
    let has = master.dtype == DType::F32 && is_fast(grad) && is_fast(m) && weight.is_none_or(is_fast);
    let kernels = |_: &Target| has.then(|| ptx::adamw::update(hyper, slots, sum_squares));
    s.launch_kernel(&[grad, sum_squares, master, m, v], &writes, kernels, move |memory| {
        if let Some(clip) = clip_factor(memory.read::<f64>(sum_squares)[0], hyper.max_grad_norm) {
            with_float!(grad.dtype, G => with_float!(master.dtype, T => with_float!(m.dtype, M => {
                let grad = memory.read::<G>(grad);
                let (mut p, mut m, mut v) = (memory.write::<T>(master), memory.write::<M>(m), memory.write::<M>(v));
                update_slice::<T, G, M>(hyper, clip, &grad, &mut p, (&mut m, &mut v));
            })));
        }
        if let Some(weight) = weight {
            elementwise::copy_now(memory, master, weight);
        }
    });
    Ok(())
}

fn update_slice<T: Float, G: Float, M: Float>(
    h: AdamW,
    clip: f64,
    grad: &[G],
    p: &mut [T],
    (m, v): (&mut [M], &mut [M]),
) {
    let n = h.step as i32;
    let moment = |x: M| <T as Float>::of_f64(x.as_f64()).to_acc();
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
                    let m1 = b1 * moment(*m) + a1 * g;
                    let v1 = b2 * moment(*v) + a2 * g * g;
                    let delta = step * m1 / (num_traits::Float::sqrt(v1) * root + eps);
                    *p = T::from_acc(p.to_acc() * keep - delta);
                    (*m, *v) = (M::of_f64(m1.as_f64()), M::of_f64(v1.as_f64()));
                }
            },
        );
    });
}

/// Cost of updating `len` parameters with f32 masters.
pub fn cost(len: usize, grad_bytes: usize, moment_bytes: usize) -> Cost {
    let (n, state) = (len as u64, 4 + 2 * moment_bytes as u64);
    Cost::stream(14 * n, n * (state + grad_bytes as u64), n * state)
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

    #[test]
    fn moments_in_bf16_are_rounded_and_the_weight_is_made_from_what_was_not() {
        let mut s = stream();
        let memory = s.memory().clone();
        let hyper = AdamW {
            lr: 0.1,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step: 3,
            max_grad_norm: f64::INFINITY,
        };
        let wide = |x: &[f32]| memory.from_slice(&[3], x);
        let narrow =
            |x: &[f32]| memory.from_slice(&[3], &x.iter().map(|&x| half::bf16::from_f32(x)).collect::<Vec<_>>());
        // Moments that bf16 holds, and a gradient that takes them to values that it does not.
        let (p, g, m, v) = ([1.0, -2.0, 0.5], [4.0, 0.3, -1e-3], [0.5, -0.25, 2.0], [0.25, 0.125, 4.0]);
        let acc = memory.from_slice(&[1], &[16.0]);
        let f32s = Slots { master: wide(&p), grad: wide(&g), m: wide(&m), v: wide(&v), weight: None };
        let bf16s = Slots { master: wide(&p), grad: wide(&g), m: narrow(&m), v: narrow(&v), weight: None };
        update(&mut s, hyper, f32s, acc).unwrap();
        update(&mut s, hyper, bf16s, acc).unwrap();
        s.synchronize().unwrap();
        assert_eq!(memory.download::<f32>(f32s.master), memory.download::<f32>(bf16s.master));
        for (wide, narrow) in [(f32s.m, bf16s.m), (f32s.v, bf16s.v)] {
            let rounded: Vec<_> = memory.download::<f32>(wide).into_iter().map(half::bf16::from_f32).collect();
            assert_eq!(memory.download::<half::bf16>(narrow), rounded);
            assert_ne!(rounded[0].to_f32(), memory.download::<f32>(wide)[0]);
        }
        let mixed = Slots { v: wide(&v), ..bf16s };
        assert!(update(&mut s, hyper, mixed, acc).unwrap_err().to_string().contains("adamw"));
    }
}
