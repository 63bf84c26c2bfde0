//! Grouped GEMM with SwiGLU at its edge, while the rows are still in the cache.
//!
//! An expert is y = a w_down^T with a = silu(h_gate) * h_up and [h_gate | h_up] = x w_gate_up^T. h is what the backward pass
//! keeps; a is cheap to make again from it.
//! - F: h_n(2f) and a_nf from x, in one pass
//! - I: dh_n(2f) from dy through w_down and the activation, without storing da; a again, if W of w_down needs it
//!
//! The rest of the expert (y, dx and the weight gradients) is plain grouped GEMM.

use super::{Sizes, check, run, split, tasks};
use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float, Real},
    error::Result,
    ops::{
        are_fast,
        expect::{expect_tensor, expect_that},
    },
    ptx::{self, gemm::Matrix, grouped_gemm::Rows},
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// F: assigns `h = x w_gate_up^T`, [n, 2f], and `a = silu(h[:, ..f]) * h[:, f..]`, [n, f], per expert, from x [n, i],
/// offsets U32 \[e + 1\] and w_gate_up [e, 2f, i] (gate rows first).
pub fn forward(s: &mut Stream, x: Tensor, offsets: Tensor, w_gate_up: Tensor, h: Tensor, a: Tensor) -> Result<()> {
    const OP: &str = "grouped SwiGLU";
    let z = check(OP, offsets, ("w_gate_up", w_gate_up), ("x", x), ("h", h))?;
    let z = Sizes { by_row: s.is_batch_invariant(), ..z };
    expect_that(OP, "w_gate_up", w_gate_up, z.o.is_multiple_of(2), || "[e, 2f, i]".into())?;
    let f = z.o / 2;
    expect_tensor(OP, "a", a, x.dtype, &[z.n, f])?;
    s.account(forward_cost(z.n, z.e, f, z.i, x.dtype.size_bytes()));
    let kernels = |on: &Target| {
        are_fast(&[x, w_gate_up, h, a]).then(|| {
            let mut launches = ptx::grouped_gemm::forward(on.into(), x, Rows::Offsets(offsets), w_gate_up, h);
            launches.extend(ptx::swiglu::forward(h, a));
            launches
        })
    };
    s.launch_kernel(&[x, offsets, w_gate_up], &[h, a], kernels, move |m| {
        with_float!(x.dtype, T => {
            let (x, w, mut h, mut a) = (m.read::<T>(x), m.read::<T>(w_gate_up), m.write::<T>(h), m.write::<T>(a));
            let tasks = tasks::by_rows(&m.read::<u32>(offsets), z);
            let outs = split(&tasks, &mut h, z.o, |task| task.rows.clone());
            let outs: Vec<_> = outs.into_iter().zip(split(&tasks, &mut a, f, |task| task.rows.clone())).collect();
            run(tasks, outs, z.i, |task, (h, a)| {
                task.forward(z, &x, &w, h);
                activate(h, a, f);
            });
        });
    });
    Ok(())
}

/// I of activation and down-projection: assigns dh [n, 2f] from dy [n, d], offsets U32 \[e + 1\], w_down [e, d, f] and
/// `forward`'s h [n, 2f]; and a [n, f] again, if given.
pub fn input_grad(
    s: &mut Stream,
    dy: Tensor,
    offsets: Tensor,
    w_down: Tensor,
    h: Tensor,
    dh: Tensor,
    a: Option<Tensor>,
) -> Result<()> {
    const OP: &str = "grouped SwiGLU input gradient";
    let (n, e, d, f) = (dy.rows(), w_down.dim(0), w_down.dim(1), w_down.dim(2));
    expect_tensor(OP, "offsets", offsets, DType::U32, &[e + 1])?;
    expect_tensor(OP, "dy", dy, dy.dtype, &[n, d])?;
    expect_tensor(OP, "w_down", w_down, dy.dtype, &[e, d, f])?;
    expect_tensor(OP, "h", h, dy.dtype, &[n, 2 * f])?;
    expect_tensor(OP, "dh", dh, dy.dtype, &[n, 2 * f])?;
    if let Some(a) = a {
        expect_tensor(OP, "a", a, dy.dtype, &[n, f])?;
    }
    let z = Sizes { n, e, o: d, i: f, by_row: false };
    let writes: Vec<Tensor> = std::iter::once(dh).chain(a).collect();
    s.account(input_grad_cost(n, e, d, f, dy.dtype.size_bytes()));
    let kernels = |on: &Target| {
        are_fast(&[dy, w_down, h, dh]).then(|| {
            let da = a.unwrap_or_else(|| ptx::scratch_tensor(dy.dtype, &[n, f]));
            let mut launches =
                ptx::grouped_gemm::input_grad(on.into(), dy, Rows::Offsets(offsets), w_down, Matrix::new(da, f));
            launches.extend(ptx::swiglu::input_grad(h, da, dh));
            launches.extend(a.into_iter().flat_map(|a| ptx::swiglu::forward(h, a)));
            launches
        })
    };
    s.launch_kernel(&[dy, offsets, w_down, h], &writes, kernels, move |m| {
        with_float!(dy.dtype, T => {
            let (dy, w, h, mut dh) = (m.read::<T>(dy), m.read::<T>(w_down), m.read::<T>(h), m.write::<T>(dh));
            let mut a = a.map(|a| m.write::<T>(a));
            let tasks = tasks::by_rows(&m.read::<u32>(offsets), z);
            let mut a_parts = match &mut a {
                Some(a) => split(&tasks, a, f, |task| task.rows.clone()),
                None => Vec::new(),
            }
            .into_iter();
            let outs = split(&tasks, &mut dh, 2 * f, |task| task.rows.clone());
            let outs: Vec<_> = outs.into_iter().map(|dh| (dh, a_parts.next())).collect();
            run(tasks, outs, z.i, |task, (dh, a)| {
                // da waits in the right half of dh, where its last use overwrites it.
                task.input_grad(z, &dy, &w, &mut dh[f..], 2 * f);
                let h = &h[task.rows.start * 2 * f..task.rows.end * 2 * f];
                deactivate(h, dh, a.unwrap_or_default(), f);
            });
        });
    });
    Ok(())
}

#[inline(always)]
fn sigmoid<A: Real>(x: A) -> A {
    A::one() / (A::one() + (-x).exp_fast())
}

fn activate<T: Float>(h: &[T], a: &mut [T], f: usize) {
    vectorize(
        #[inline(always)]
        || {
            for (a, h) in a.chunks_exact_mut(f).zip(h.chunks_exact(2 * f)) {
                let (gate, up) = h.split_at(f);
                for ((a, gate), up) in a.iter_mut().zip(gate).zip(up) {
                    let gate = gate.to_acc();
                    *a = T::from_acc(gate * sigmoid(gate) * up.to_acc());
                }
            }
        },
    );
}

/// Columns at a time: what is read and what is written then lie in separate places, as vectorizing needs.
const BLOCK: usize = 64;

/// Turns [anything | da] into [dgate | dup]; a, unless it is empty, becomes what `activate` made.
fn deactivate<T: Float>(h: &[T], dh: &mut [T], a: &mut [T], f: usize) {
    vectorize(
        #[inline(always)]
        || {
            let mut a_rows = a.chunks_exact_mut(f);
            for (dh, h) in dh.chunks_exact_mut(2 * f).zip(h.chunks_exact(2 * f)) {
                let ((gate, up), (dgate, dup)) = (h.split_at(f), dh.split_at_mut(f));
                let mut a = a_rows.next().unwrap_or_default().chunks_mut(BLOCK);
                let inputs = gate.chunks(BLOCK).zip(up.chunks(BLOCK));
                let outputs = dgate.chunks_mut(BLOCK).zip(dup.chunks_mut(BLOCK));
                for ((gate, up), (dgate, dup)) in inputs.zip(outputs) {
                    deactivate_block(gate, up, dgate, dup, a.next().unwrap_or_default());
                }
            }
        },
    );
}

#[inline(always)]
fn deactivate_block<T: Float>(gate: &[T], up: &[T], dgate: &mut [T], dup: &mut [T], a: &mut [T]) {
    let (zero, one) = (T::Acc::of_f64(0.0), T::Acc::of_f64(1.0));
    let (mut gate_grad, mut up_grad, mut product) = ([zero; BLOCK], [zero; BLOCK], [zero; BLOCK]);
    let results = gate_grad.iter_mut().zip(&mut up_grad).zip(&mut product);
    for (((g, u), y), ((gate, up), da)) in results.zip(gate.iter().zip(up).zip(&*dup)) {
        let (gate, up, da) = (gate.to_acc(), up.to_acc(), da.to_acc());
        let p = sigmoid(gate);
        *g = da * up * p * (one + gate * (one - p));
        *u = da * gate * p;
        *y = gate * p * up;
    }
    dgate.iter_mut().zip(gate_grad).for_each(|(d, g)| *d = T::from_acc(g));
    dup.iter_mut().zip(up_grad).for_each(|(d, u)| *d = T::from_acc(u));
    a.iter_mut().zip(product).for_each(|(a, y)| *a = T::from_acc(y));
}

/// Cost of `forward` over n rows: the product and the store of a.
pub fn forward_cost(n: usize, e: usize, f: usize, i: usize, elem_bytes: usize) -> Cost {
    super::forward_cost(n, e, 2 * f, i, elem_bytes) + Cost::stream(5 * (n * f) as u64, 0, (n * f * elem_bytes) as u64)
}

/// Cost of `input_grad` over n rows: the product, the read of h and the store of dh instead of da; without a.
pub fn input_grad_cost(n: usize, e: usize, d: usize, f: usize, elem_bytes: usize) -> Cost {
    let (h, half) = ((2 * n * f * elem_bytes) as u64, (n * f * elem_bytes) as u64);
    super::input_grad_cost(n, e, d, f, elem_bytes) + Cost::stream(12 * (n * f) as u64, h, half)
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::ops::{grouped_gemm as plain, testing::*};

    const OFFSETS: [u32; 5] = [0, 3, 3, 4, 7];
    const N: usize = 7;
    const E: usize = 4;
    const I: usize = 3;
    const F: usize = 5;
    const D: usize = 2;

    /// y [n, d] of a whole expert layer; also h and a.
    fn expert(s: &mut Stream, x: &[Tensor]) -> Result<[Tensor; 3]> {
        let m = s.memory().clone();
        let offsets = m.from_slice(&[E + 1], &OFFSETS);
        let [h, a, y] = [2 * F, F, D].map(|c| m.alloc(DType::F64, &[N, c]));
        forward(s, x[0], offsets, x[1], h, a)?;
        plain::forward(s, a, offsets, x[2], y)?;
        Ok([y, h, a])
    }

    #[test]
    fn an_expert_is_its_definition() {
        let mut s = stream();
        let m = s.memory().clone();
        let (x, w1, w2) = (random(N * I, 1), random(E * 2 * F * I, 2), random(E * D * F, 3));
        let tensors = [m.from_slice(&[N, I], &x), m.from_slice(&[E, 2 * F, I], &w1), m.from_slice(&[E, D, F], &w2)];
        let [y, ..] = expert(&mut s, &tensors).unwrap();
        s.synchronize().unwrap();
        let mut want = vec![0.0; N * D];
        for n in 0..N {
            let e = (0..E).find(|&e| n < OFFSETS[e + 1] as usize).unwrap();
            let h = |r: usize| (0..I).map(|i| x[n * I + i] * w1[(e * 2 * F + r) * I + i]).sum::<f64>();
            for d in 0..D {
                let a = |f: usize| h(f) / (1.0 + (-h(f)).exp()) * h(F + f);
                want[n * D + d] = (0..F).map(|f| a(f) * w2[(e * D + d) * F + f]).sum();
            }
        }
        assert_close(&m.download::<f64>(y), &want, 1e-12);
    }

    #[test]
    fn an_experts_gradients_match_finite_differences() {
        check_gradients(
            &[(&[N, I], 1), (&[E, 2 * F, I], 2), (&[E, D, F], 3)],
            &[N, D],
            |s, x| expert(s, x).map(|[y, ..]| y),
            |s, x, dy, dx| {
                let m = s.memory().clone();
                let [_, h, a] = expert(s, x)?;
                let offsets = m.from_slice(&[E + 1], &OFFSETS);
                let (dh, again) = (m.alloc(DType::F64, &[N, 2 * F]), m.alloc(DType::F64, &[N, F]));
                input_grad(s, dy, offsets, x[2], h, dh, Some(again))?;
                s.synchronize()?;
                assert_eq!(m.download::<f64>(again), m.download::<f64>(a), "the recomputed activation is the first");
                plain::weight_grad(s, dy, again, offsets, dx[2])?;
                plain::weight_grad(s, dh, x[0], offsets, dx[1])?;
                plain::input_grad(s, dh, offsets, x[1], dx[0])?;
                input_grad(s, dy, offsets, x[2], h, again.reshape(&[N, F]), None).unwrap_err();
                Ok(())
            },
        );
    }

    #[test]
    fn far_gates_saturate_without_nan() {
        let mut s = stream();
        let m = s.memory().clone();
        let (x, offsets) = (m.from_slice(&[2, 1], &[1000f32, -1000.0]), m.from_slice(&[2], &[0u32, 2]));
        let w = m.from_slice(&[1, 2, 1], &[1f32, 1.0]);
        let (h, a, dh) = (m.alloc(DType::F32, &[2, 2]), m.alloc(DType::F32, &[2, 1]), m.alloc(DType::F32, &[2, 2]));
        forward(&mut s, x, offsets, w, h, a).unwrap();
        let (dy, w_down) = (m.from_slice(&[2, 1], &[1f32, 1.0]), m.from_slice(&[1, 1, 1], &[1f32]));
        input_grad(&mut s, dy, offsets, w_down, h, dh, None).unwrap();
        s.synchronize().unwrap();
        let (a, dh) = (m.download::<f32>(a), m.download::<f32>(dh));
        assert!((a[0] - 1e6).abs() < 1.0 && a[1].abs() < 1e-30, "{a:?}");
        assert_eq!(dh[..2], [1000.0, 1000.0]);
        assert!(dh[2..].iter().all(|d| d.abs() < 1e-30), "{dh:?}");
    }
}
