//! Muon (Jordan et al. 2024; scaled as in arXiv 2502.16982, section 2.2): momentum, made nearly orthogonal by a Newton-Schulz
//! iteration per matrix, with the update's RMS matched to AdamW's: p = p (1 - lr wd) - lr 0.2 sqrt(max(r, c)) O.
//!
//! A packed parameter (experts; gate and up side by side) is updated matrix by matrix, in parallel.

use std::sync::Arc;

use rayon::prelude::*;

use crate::{
    cost::Cost,
    dtype::Float,
    error::Result,
    ops::{
        elementwise, expect_shape,
        gemm::{Mat, Threads, gemm},
        norm::clip_factor,
    },
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// Hyper-parameters of one update.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Muon {
    /// Learning rate, on AdamW's scale.
    pub lr: f64,
    /// Decay of the momentum.
    pub momentum: f64,
    /// Look ahead by one momentum step.
    pub nesterov: bool,
    /// Newton-Schulz iterations.
    pub ns_steps: usize,
    /// Decoupled weight decay.
    pub weight_decay: f64,
    /// Largest norm of the whole gradient.
    pub max_grad_norm: f64,
}

/// Tensors of one parameter's update, all of one shape.
#[derive(Clone, Copy, Debug)]
pub struct Slots {
    /// Master weight.
    pub master: Tensor,
    /// Gradient.
    pub grad: Tensor,
    /// Momentum.
    pub m: Tensor,
    /// Where the rounded weight goes, when compute has another type than the master.
    pub weight: Option<Tensor>,
}

/// Updates the matrices of a parameter in place. `matrices` are (rows, cols), one behind the other, covering it.
pub fn update(
    s: &mut Stream,
    hyper: Muon,
    slots: Slots,
    matrices: Arc<[(usize, usize)]>,
    sum_squares: Tensor,
) -> Result<()> {
    let len: usize = matrices.iter().map(|(r, c)| r * c).sum();
    for (role, tensor) in [("master", slots.master), ("grad", slots.grad), ("m", slots.m)] {
        expect_shape("muon", role, tensor.reshape(&[tensor.len()]), &[len])?;
    }
    let Slots { master, grad, m, weight } = slots;
    s.account(matrices.iter().map(|&(r, c)| cost(r, c, hyper.ns_steps)).sum());
    s.launch(&[grad, sum_squares], &[master, m], move |memory| {
        let Some(clip) = clip_factor(memory.read::<f64>(sum_squares)[0], hyper.max_grad_norm) else { return };
        with_float!(grad.dtype, G => with_float!(master.dtype, T => {
            let grad = memory.read::<G>(grad);
            let (mut p, mut m) = (memory.write::<T>(master), memory.write::<T>(m));
            let (mut p, mut m, mut grad) = (&mut p[..], &mut m[..], &grad[..]);
            let mut jobs = Vec::with_capacity(matrices.len());
            for &(r, c) in matrices.iter() {
                let (p1, m1, g1);
                (p1, p) = p.split_at_mut(r * c);
                (m1, m) = m.split_at_mut(r * c);
                (g1, grad) = grad.split_at(r * c);
                jobs.push((p1, m1, g1, r, c));
            }
            let threads = if jobs.len() == 1 { Threads::All } else { Threads::One };
            jobs.into_par_iter().for_each(|(p, m, g, r, c)| update_matrix::<T, G>(hyper, clip, p, m, g, (r, c), threads));
        }));
    });
    if let Some(weight) = weight {
        elementwise::copy(s, master, weight)?;
    }
    Ok(())
}

fn update_matrix<T: Float, G: Float>(
    h: Muon,
    clip: f64,
    p: &mut [T],
    m: &mut [T],
    g: &[G],
    (r, c): (usize, usize),
    threads: Threads,
) {
    let update: Vec<f32> = m
        .iter_mut()
        .zip(g)
        .map(|(m, g)| {
            let g = g.as_f64() * clip;
            let m1 = h.momentum * m.as_f64() + g;
            *m = T::of_f64(m1);
            (if h.nesterov { h.momentum * m1 + g } else { m1 }) as f32
        })
        .collect();
    let o = orthogonalize(&update, r, c, h.ns_steps, threads);
    let step = h.lr * 0.2 * (r.max(c) as f64).sqrt();
    let keep = 1.0 - h.lr * h.weight_decay;
    for (p, o) in p.iter_mut().zip(&o) {
        *p = T::of_f64(p.as_f64() * keep - step * f64::from(*o));
    }
}

/// Newton-Schulz iteration with the quintic of Jordan et al.: singular values of `x` [r, c] go to about 1.
fn orthogonalize(x: &[f32], r: usize, c: usize, steps: usize, threads: Threads) -> Vec<f32> {
    const A: f32 = 3.4445;
    const B: f32 = -4.7750;
    const C: f32 = 2.0315;
    let norm = x.iter().map(|v| f64::from(*v) * f64::from(*v)).sum::<f64>().sqrt() as f32 + 1e-7;
    let mut x: Vec<f32> = x.iter().map(|v| v / norm).collect();
    // The Gram matrix is taken on the short side.
    let n = r.min(c);
    let wide = r <= c;
    let (mut gram, mut square, mut next) = (vec![0f32; n * n], vec![0f32; n * n], vec![0f32; r * c]);
    for _ in 0..steps {
        let xm = Mat::new(&x, r, c);
        if wide {
            gemm(xm, xm.t(), 0.0, &mut gram, n, threads);
        } else {
            gemm(xm.t(), xm, 0.0, &mut gram, n, threads);
        }
        let g = Mat::new(&gram, n, n);
        gemm(g, g, 0.0, &mut square, n, threads);
        for (i, (s, g)) in square.iter_mut().zip(&gram).enumerate() {
            *s = B * g + C * *s + if i % (n + 1) == 0 { A } else { 0.0 };
        }
        let f = Mat::new(&square, n, n);
        if wide {
            gemm(f, xm, 0.0, &mut next, c, threads);
        } else {
            gemm(xm, f, 0.0, &mut next, c, threads);
        }
        std::mem::swap(&mut x, &mut next);
    }
    x
}

/// Cost of one update of an [r, c] matrix.
pub fn cost(r: usize, c: usize, ns_steps: usize) -> Cost {
    let (n, l) = (r.min(c), r.max(c));
    (0..ns_steps).map(|_| Cost::gemm(n, n, l, 4) + Cost::gemm(n, n, n, 4) + Cost::gemm(n, l, n, 4)).sum()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ops::testing::*;

    #[test]
    fn singular_values_go_to_about_one_on_either_orientation() {
        for (r, c) in [(6, 10), (10, 6)] {
            let x: Vec<f32> = random(r * c, 7).iter().map(|&v| v as f32).collect();
            let o = orthogonalize(&x, r, c, 5, Threads::One);
            let n = r.min(c);
            let om = Mat::new(&o, r, c);
            let mut gram = vec![0f32; n * n];
            let (a, b) = if r <= c { (om, om.t()) } else { (om.t(), om) };
            gemm(a, b, 0.0, &mut gram, n, Threads::One);
            let trace: f32 = (0..n).map(|i| gram[i * (n + 1)]).sum();
            assert!((0.5 * n as f32..1.5 * n as f32).contains(&trace), "squared singular values sum to {trace} of {n}");
            let off: f32 =
                gram.iter().enumerate().filter(|(i, _)| i % (n + 1) != 0).map(|(_, v)| v.abs()).fold(0.0, f32::max);
            assert!(off < 0.5, "the Gram matrix is near the identity, found {off} beside the diagonal");
        }
    }

    #[test]
    #[expect(clippy::unwrap_used, reason = "tests")]
    fn packed_matrices_are_updated_one_by_one() {
        let mut s = stream();
        let memory = s.memory().clone();
        let hyper = Muon {
            lr: 0.1,
            momentum: 0.9,
            nesterov: true,
            ns_steps: 5,
            weight_decay: 0.0,
            max_grad_norm: f64::INFINITY,
        };
        let g: Vec<f32> = random(24, 5).iter().map(|&v| v as f32).collect();
        let acc = memory.from_slice(&[1], &[1f64]);
        let mut run = |g: &[f32], matrices: &[(usize, usize)]| {
            let zeros = vec![0f32; g.len()];
            let slots = Slots {
                master: memory.from_slice(&[g.len()], &zeros),
                grad: memory.from_slice(&[g.len()], g),
                m: memory.from_slice(&[g.len()], &zeros),
                weight: None,
            };
            update(&mut s, hyper, slots, matrices.into(), acc).unwrap();
            s.synchronize().unwrap();
            memory.download::<f32>(slots.master)
        };
        let both = run(&g, &[(3, 4), (4, 3)]);
        let apart = [run(&g[..12], &[(3, 4)]), run(&g[12..], &[(4, 3)])].concat();
        assert_eq!(both, apart);
    }
}
