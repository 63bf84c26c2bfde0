//! Reductions over a slice in a fixed number of lanes.
//!
//! A compiler may not reorder a floating-point sum, so a plain one runs at one element per add. Here the order is ours: sixteen
//! partial sums, then a tree. It vectorizes under [`crate::simd::vectorize`], and gives the same bits on every instruction set.

use crate::dtype::{Float, Real};

/// Partial results kept side by side: one AVX-512 register of f32.
pub const LANES: usize = 16;

#[inline(always)]
fn tree<A: Real>(mut lanes: [A; LANES], join: impl Fn(A, A) -> A) -> A {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

#[inline(always)]
fn larger<A: Real>(a: A, b: A) -> A {
    if a > b { a } else { b }
}

/// Largest element; minus infinity for none.
#[inline(always)]
pub fn max<A: Real>(x: &[A]) -> A {
    let mut lanes = [A::neg_infinity(); LANES];
    let (chunks, rest) = x.as_chunks::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] = larger(lanes[i], chunk[i]);
        }
    }
    rest.iter().fold(tree(lanes, larger), |a, &b| larger(a, b))
}

/// `x = e^(x - shift)`; returns the sum.
#[inline(always)]
pub fn exp_and_sum<A: Real>(x: &mut [A], shift: A) -> A {
    let mut lanes = [A::zero(); LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for i in 0..LANES {
            chunk[i] = (chunk[i] - shift).exp_fast();
            lanes[i] += chunk[i];
        }
    }
    let mut sum = tree(lanes, |a, b| a + b);
    for x in rest {
        *x = (*x - shift).exp_fast();
        sum += *x;
    }
    sum
}

/// Dot products of each row of `a` with `b`; the rows' chains of additions hide each other's latency.
#[inline(always)]
pub fn dots<const R: usize, T: Float, U: Float<Acc = T::Acc>>(a: [&[T]; R], b: &[U]) -> [T::Acc; R] {
    let mut lanes = [[num_traits::Zero::zero(); LANES]; R];
    let (b_chunks, b_rest) = b.as_chunks::<LANES>();
    let a = a.map(|row| row[..b.len()].as_chunks::<LANES>());
    for (c, b) in b_chunks.iter().enumerate() {
        for r in 0..R {
            let chunk = &a[r].0[c];
            for i in 0..LANES {
                lanes[r][i] += chunk[i].to_acc() * b[i].to_acc();
            }
        }
    }
    std::array::from_fn(
        #[inline(always)]
        |r| {
            let mut sum = tree(lanes[r], |a, b| a + b);
            for (x, y) in a[r].1.iter().zip(b_rest) {
                sum += x.to_acc() * y.to_acc();
            }
            sum
        },
    )
}

/// `a . b`
#[inline(always)]
pub fn dot<T: Float, U: Float<Acc = T::Acc>>(a: &[T], b: &[U]) -> T::Acc {
    dots([a], b)[0]
}

/// `y += scale x`
#[inline(always)]
pub fn add_scaled<T: Float>(y: &mut [T::Acc], scale: T::Acc, x: &[T]) {
    for (y, x) in y.iter_mut().zip(x) {
        *y += scale * x.to_acc();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{ops::testing::random, simd::vectorize};

    #[test]
    fn reductions_match_their_definition_at_every_length() {
        for n in [0, 1, 15, 16, 17, 100] {
            let (a, b) = (random(n, 1), random(n, 2));
            let want: f64 = a.iter().zip(&b).map(|(x, y)| x * y).sum();
            assert!((vectorize(|| dot(&a, &b)) - want).abs() < 1e-13);
            assert_eq!(vectorize(|| max(&a)), a.iter().copied().fold(f64::NEG_INFINITY, f64::max));
            let mut e = a.clone();
            let sum = vectorize(|| exp_and_sum(&mut e, 0.5));
            let want: Vec<f64> = a.iter().map(|x| (x - 0.5).exp()).collect();
            assert_eq!(e, want);
            assert!((sum - want.iter().sum::<f64>()).abs() < 1e-12);
        }
    }

    #[test]
    fn the_instruction_set_does_not_change_the_bits() {
        let x: Vec<f32> = random(1003, 3).iter().map(|&x| x as f32).collect();
        let y: Vec<f32> = random(1003, 4).iter().map(|&x| x as f32).collect();
        assert_eq!(dot(&x, &y).to_bits(), vectorize(|| dot(&x, &y)).to_bits());
    }
}
