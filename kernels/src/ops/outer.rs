//! The outer step of low-communication training (DiLoCo, arXiv 2311.08105): replicas train on their own for a round; then what all have
//! in common, theta, moves by the mean of how far each came, the pseudo-gradient d, under Nesterov's momentum as SGD has it elsewhere
//! (Sutskever et al. 2013 in PyTorch's form): v = mu v + d, theta = theta - lr (d + mu v). Each replica goes on from theta.
//!
//! What crosses between replicas is either the pseudo-gradient, which a coarse coding keeps small errors of; or, where nothing is to be
//! lost, the parameters themselves: f32 holds each, but not the distance of two. With lr 1 and mu 0 theta is then the mean to the last bit.
//!
//! Arithmetic is in f64, and theta and v are f32. Squares of pseudo-gradients are summed over pieces of a parameter (its experts), in
//! f64 over fixed blocks, in their order.

use std::{ops::Range, sync::Arc};

use rayon::prelude::*;

use crate::{
    cost::Cost,
    dtype::DType,
    error::Result,
    memory::Memory,
    ops::{elementwise, expect::expect_tensor, expect_shape},
    stream::Stream,
    tensor::Tensor,
};

/// SGD with Nesterov's momentum.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Nesterov {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the momentum (mu).
    pub momentum: f64,
}

/// What a replica brings to the mean, and the mean is of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Crossing {
    /// Its parameters.
    Parameters,
    /// The pseudo-gradient: theta less its parameters.
    PseudoGradient,
}

/// Ranges of flat tensors, and where their sums go: f64, one each.
#[derive(Clone, Debug)]
pub struct Pieces {
    /// Ascending; together they are all of it.
    pub ranges: Arc<[Range<usize>]>,
    /// Squared norm of each.
    pub squares: Tensor,
}

/// Tensors of one parameter's part, all of one length and f32, but `weight`.
#[derive(Clone, Copy, Debug)]
pub struct Slots {
    /// What all replicas have in common.
    pub theta: Tensor,
    /// Momentum.
    pub v: Tensor,
    /// What is on its way: [`Crossing`].
    pub crossing: Tensor,
    /// What this replica trains.
    pub local: Tensor,
    /// Where it goes rounded, where products take another type.
    pub weight: Option<Tensor>,
}

/// Elements at a time; sums are over these.
const CHUNK: usize = 8192;

/// Assigns `crossing` what this replica brings, and `pieces` the squared norms of its pseudo-gradient.
///
/// # Errors
/// If shapes or types differ.
pub fn bring(s: &mut Stream, slots: Slots, crossing: Crossing, pieces: &Pieces) -> Result<()> {
    check(slots, pieces)?;
    let Slots { theta, crossing: x, local, .. } = slots;
    s.account(elementwise::cost(theta.len(), 2, 4));
    let Pieces { ranges, squares } = pieces.clone();
    s.launch(&[theta, local], &[x, squares], move |m| {
        let (theta, local, mut x) = (m.read::<f32>(theta), m.read::<f32>(local), m.write::<f32>(x));
        let one = |theta: &f32, local: &f32, x: &mut f32| {
            let d = f64::from(*theta) - f64::from(*local);
            *x = if crossing == Crossing::Parameters { *local } else { d as f32 };
            d
        };
        let sums = ranges.iter().map(|range| {
            let (theta, local) = (theta[range.clone()].par_chunks(CHUNK), local[range.clone()].par_chunks(CHUNK));
            let chunks = x[range.clone()].par_chunks_mut(CHUNK).zip(theta).zip(local);
            let sum = |((x, theta), local): ((&mut [f32], &[f32]), &[f32])| {
                x.iter_mut().zip(theta).zip(local).map(|((x, theta), local)| one(theta, local, x).powi(2)).sum::<f64>()
            };
            chunks.map(sum).collect::<Vec<f64>>().iter().sum::<f64>()
        });
        m.write::<f64>(squares).iter_mut().zip(sums.collect::<Vec<_>>()).for_each(|(to, sum)| *to = sum);
    });
    Ok(())
}

/// Moves theta by the mean in `crossing`, and takes `local` and `weight` there. Assigns `pieces` the squared norms of the mean
/// pseudo-gradient.
///
/// # Errors
/// If shapes or types differ.
pub fn step(s: &mut Stream, hyper: Nesterov, slots: Slots, crossing: Crossing, pieces: &Pieces) -> Result<()> {
    check(slots, pieces)?;
    let Slots { theta, v, crossing: x, local, weight } = slots;
    let n = theta.len() as u64;
    s.account(Cost::stream(8 * n, 12 * n, 12 * n));
    let Pieces { ranges, squares } = pieces.clone();
    let writes: Vec<Tensor> = [theta, v, local, squares].into_iter().chain(weight).collect();
    s.launch(&[theta, v, x], &writes, move |m| {
        {
            let (mut theta, mut v) = (m.write::<f32>(theta), m.write::<f32>(v));
            let x = m.read::<f32>(x);
            let sums = ranges.iter().map(|range| {
                let (theta, v) = (theta[range.clone()].par_chunks_mut(CHUNK), v[range.clone()].par_chunks_mut(CHUNK));
                let chunks = theta.zip(v).zip(x[range.clone()].par_chunks(CHUNK));
                let sum = |((theta, v), x): ((&mut [f32], &mut [f32]), &[f32])| {
                    let all = theta.iter_mut().zip(v).zip(x);
                    all.map(|((theta, v), x)| move_one(hyper, crossing, theta, v, *x).powi(2)).sum::<f64>()
                };
                chunks.map(sum).collect::<Vec<f64>>().iter().sum::<f64>()
            });
            m.write::<f64>(squares).iter_mut().zip(sums.collect::<Vec<_>>()).for_each(|(to, sum)| *to = sum);
        }
        follow_now(m, theta, local, weight);
    });
    Ok(())
}

/// Takes `local` and `weight` to theta: what a replica begins with that joins.
///
/// # Errors
/// If shapes or types differ.
pub fn follow(s: &mut Stream, slots: Slots) -> Result<()> {
    let Slots { theta, local, weight, .. } = slots;
    check_slots(slots)?;
    s.account(elementwise::cost(theta.len(), 1, 4));
    let writes: Vec<Tensor> = std::iter::once(local).chain(weight).collect();
    s.launch(&[theta], &writes, move |m| follow_now(m, theta, local, weight));
    Ok(())
}

/// One element's outer step; returns its pseudo-gradient.
fn move_one(hyper: Nesterov, crossing: Crossing, theta: &mut f32, v: &mut f32, x: f32) -> f64 {
    let Nesterov { lr, momentum } = hyper;
    let (at, x) = (f64::from(*theta), f64::from(x));
    // The second form of theta - lr d rounds nothing where lr is 1.
    let (d, after) = match crossing {
        Crossing::PseudoGradient => (x, at - lr * x),
        Crossing::Parameters => (at - x, (1.0 - lr) * at + lr * x),
    };
    let moved = momentum * f64::from(*v) + d;
    *theta = (after - lr * momentum * moved) as f32;
    *v = moved as f32;
    d
}

fn follow_now(m: &Memory, theta: Tensor, local: Tensor, weight: Option<Tensor>) {
    elementwise::copy_now(m, theta, local);
    if let Some(weight) = weight {
        elementwise::copy_now(m, theta, weight);
    }
}

fn check_slots(slots: Slots) -> Result<()> {
    let dims = [slots.theta.len()];
    for (role, tensor) in [("theta", slots.theta), ("v", slots.v), ("crossing", slots.crossing), ("local", slots.local)]
    {
        expect_tensor("outer", role, tensor, DType::F32, &dims)?;
    }
    slots.weight.map_or(Ok(()), |weight| expect_shape("outer", "weight", weight, &dims))
}

fn check(slots: Slots, pieces: &Pieces) -> Result<()> {
    check_slots(slots)?;
    expect_tensor("outer", "squares", pieces.squares, DType::F64, &[pieces.ranges.len()])
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use half::bf16;

    use super::*;
    use crate::ops::testing::*;

    fn slots(m: &Memory, theta: &[f32], local: &[f32]) -> (Slots, Pieces) {
        let f = |x: &[f32]| m.from_slice(&[x.len()], x);
        let n = theta.len();
        let slots =
            Slots { theta: f(theta), v: f(&vec![0.0; n]), crossing: f(&vec![0.0; n]), local: f(local), weight: None };
        let pieces = Pieces { ranges: [0..n / 2, n / 2..n].into(), squares: m.from_slice(&[2], &[f64::NAN; 2]) };
        (slots, pieces)
    }

    #[test]
    fn two_steps_by_hand() {
        let mut s = stream();
        let m = s.memory().clone();
        for crossing in [Crossing::Parameters, Crossing::PseudoGradient] {
            let (slots, pieces) = slots(&m, &[1.0, 2.0], &[0.5, 4.0]);
            let weight = m.from_slice(&[2], &[bf16::ZERO; 2]);
            let slots = Slots { weight: Some(weight), ..slots };
            let hyper = Nesterov { lr: 0.5, momentum: 0.5 };
            bring(&mut s, slots, crossing, &pieces).unwrap();
            step(&mut s, hyper, slots, crossing, &pieces).unwrap();
            s.synchronize().unwrap();
            // d = (0.5, -2), v = d, theta - 0.5 (d + 0.5 d)
            assert_eq!(m.download::<f32>(slots.theta), [0.625, 3.5]);
            assert_eq!(m.download::<f32>(slots.v), [0.5, -2.0]);
            assert_eq!(m.download::<f64>(pieces.squares), [0.25, 4.0]);
            assert_eq!(m.download::<f32>(slots.local), [0.625, 3.5]);
            assert_eq!(m.download::<bf16>(weight).map_f32(), [0.625, 3.5]);
            // The replica stands still: only the momentum moves. d = 0, v = 0.5 v, theta - 0.5 * 0.5 v
            bring(&mut s, slots, crossing, &pieces).unwrap();
            step(&mut s, hyper, slots, crossing, &pieces).unwrap();
            s.synchronize().unwrap();
            assert_eq!(m.download::<f32>(slots.theta), [0.5625, 3.75]);
            assert_eq!(m.download::<f64>(pieces.squares), [0.0, 0.0]);
        }
    }

    trait MapF32 {
        fn map_f32(&self) -> Vec<f32>;
    }

    impl MapF32 for Vec<bf16> {
        fn map_f32(&self) -> Vec<f32> {
            self.iter().map(|x| x.to_f32()).collect()
        }
    }

    #[test]
    fn with_lr_1_and_no_momentum_theta_is_the_parameters_to_the_bit() {
        let mut s = stream();
        let m = s.memory().clone();
        let values = |seed, size: f64| -> Vec<f32> {
            random(20_001, seed).into_iter().map(|x| (x * x * x * size) as f32).collect()
        };
        let (theta, local) = (values(1, 1.0), values(2, 1e-4));
        let (slots, pieces) = slots(&m, &theta, &local);
        bring(&mut s, slots, Crossing::Parameters, &pieces).unwrap();
        step(&mut s, Nesterov { lr: 1.0, momentum: 0.0 }, slots, Crossing::Parameters, &pieces).unwrap();
        s.synchronize().unwrap();
        assert!(m.download::<f32>(slots.theta) == local);
        let square = |(a, b): (&f32, &f32)| (f64::from(*a) - f64::from(*b)).powi(2);
        let want: f64 = theta.iter().zip(&local).map(square).sum();
        let got: f64 = m.download::<f64>(pieces.squares).iter().sum();
        assert!((got - want).abs() < 1e-9 * want, "{got} for {want}");
    }

    #[test]
    fn who_joins_follows_and_shapes_are_checked() {
        let mut s = stream();
        let m = s.memory().clone();
        let (slots, pieces) = slots(&m, &[1.0, 2.0], &[0.5, 4.0]);
        follow(&mut s, slots).unwrap();
        s.synchronize().unwrap();
        assert_eq!(m.download::<f32>(slots.local), [1.0, 2.0]);
        let wrong = Slots { v: m.from_slice(&[3], &[0f32; 3]), ..slots };
        for error in [
            bring(&mut s, wrong, Crossing::Parameters, &pieces),
            follow(&mut s, wrong),
            step(&mut s, Nesterov { lr: 1.0, momentum: 0.0 }, wrong, Crossing::Parameters, &pieces),
        ] {
            let error = error.unwrap_err().to_string();
            assert!(error.contains("outer") && error.contains("`v`"), "{error}");
        }
    }
}
