//! Reductions over a slice in a fixed number of lanes.
//!
//! A compiler may not reorder a floating-point sum, so a plain one runs at one element per add. Here the order is ours: sixteen
//! partial sums, then a tree. It vectorizes under [`crate::simd::vectorize`], and gives the same bits on every instruction set.

use num_traits::Zero;

use crate::dtype::{Float, Real};

/// Partial results kept side by side: one AVX-512 register of f32.
pub const LANES: usize = 16;

/// Joins the lanes. Not inlined, and given a copy: seen beside the loops that fill the lanes, it would make compilers split these into
/// its halves, or keep the lanes in memory.
#[inline(never)]
fn tree<A: Real>(lanes: &[A; LANES], join: impl Fn(A, A) -> A) -> A {
    let mut lanes = *lanes;
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] = join(lanes[i], lanes[i + width]);
        }
        width /= 2;
    }
    lanes[0]
}

/// Sums the lanes of four rows in the order of [`tree`], all four side by side in its last steps. Not inlined, for the same reason.
#[inline(never)]
fn sums<A: Real>(rows: &[[A; LANES]; 4]) -> [A; 4] {
    let quarters: [[A; 4]; 4] = std::array::from_fn(|r| {
        std::array::from_fn(|i| (rows[r][i] + rows[r][i + 8]) + (rows[r][i + 4] + rows[r][i + 12]))
    });
    let column = |i: usize| -> [A; 4] { std::array::from_fn(|r| quarters[r][i]) };
    let [a, b, c, d] = [column(0), column(1), column(2), column(3)];
    std::array::from_fn(|r| (a[r] + c[r]) + (b[r] + d[r]))
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
    let top = tree(&{ lanes }, larger);
    rest.iter().fold(top, |a, &b| larger(a, b))
}

/// `x = e^(x - shift)`; returns the sum.
#[inline(always)]
pub fn exp_and_sum<A: Real>(x: &mut [A], shift: A) -> A {
    let mut lanes = [A::zero(); LANES];
    let (chunks, rest) = x.as_chunks_mut::<LANES>();
    for chunk in chunks {
        for x in &mut *chunk {
            *x = (*x - shift).exp_fast();
        }
        for i in 0..LANES {
            lanes[i] += chunk[i];
        }
    }
    let mut sum = tree(&{ lanes }, |a, b| a + b);
    for x in rest {
        *x = (*x - shift).exp_fast();
        sum += *x;
    }
    sum
}

#[inline(always)]
fn multiply_add<T: Float, U: Float<Acc = T::Acc>>(lanes: &mut [T::Acc; LANES], a: &[T; LANES], b: &[U; LANES]) {
    for i in 0..LANES {
        lanes[i] += a[i].to_acc() * b[i].to_acc();
    }
}

#[inline(always)]
fn dot_from<T: Float, U: Float<Acc = T::Acc>>(mut sum: T::Acc, a: &[T], b: &[U]) -> T::Acc {
    for (x, y) in a.iter().zip(b) {
        sum += x.to_acc() * y.to_acc();
    }
    sum
}

/// `a . b`
#[inline(always)]
pub fn dot<T: Float, U: Float<Acc = T::Acc>>(a: &[T], b: &[U]) -> T::Acc {
    let mut lanes = [T::Acc::zero(); LANES];
    let ((a, a_rest), (b, b_rest)) = (a.as_chunks::<LANES>(), b.as_chunks::<LANES>());
    for (a, b) in a.iter().zip(b) {
        multiply_add(&mut lanes, a, b);
    }
    let sum = tree(&{ lanes }, |a, b| a + b);
    dot_from(sum, a_rest, b_rest)
}

/// Dot products of the four rows of `a` [4, n] with `b`: four chains of additions hide each other's latency.
///
/// # Panics
/// If `a` is not four times as long as `b`.
#[inline(always)]
pub fn dot4<T: Float, U: Float<Acc = T::Acc>>(a: &[T], b: &[U]) -> [T::Acc; 4] {
    let n = b.len();
    assert_eq!(a.len(), 4 * n, "four rows as long as the other operand");
    let (a0, a1, a2, a3) = (&a[..n], &a[n..2 * n], &a[2 * n..3 * n], &a[3 * n..]);
    let [mut l0, mut l1, mut l2, mut l3] = [[T::Acc::zero(); LANES]; 4];
    let (chunks, rest) = b.as_chunks::<LANES>();
    let (c0, c1) = (a0.as_chunks::<LANES>().0.iter(), a1.as_chunks::<LANES>().0.iter());
    let (c2, c3) = (a2.as_chunks::<LANES>().0.iter(), a3.as_chunks::<LANES>().0.iter());
    for ((((b, a0), a1), a2), a3) in chunks.iter().zip(c0).zip(c1).zip(c2).zip(c3) {
        multiply_add(&mut l0, a0, b);
        multiply_add(&mut l1, a1, b);
        multiply_add(&mut l2, a2, b);
        multiply_add(&mut l3, a3, b);
    }
    let [s0, s1, s2, s3] = sums(&[l0, l1, l2, l3]);
    let at = n - rest.len();
    [
        dot_from(s0, &a0[at..], rest),
        dot_from(s1, &a1[at..], rest),
        dot_from(s2, &a2[at..], rest),
        dot_from(s3, &a3[at..], rest),
    ]
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
    fn rows_beside_each_other_do_not_change_the_bits() {
        for n in [0, 5, 16, 100] {
            let (a, b) = (random(4 * n, 1), random(4 * n, 2));
            for j in 0..4 {
                let b = &b[j * n..(j + 1) * n];
                for (i, x) in vectorize(|| dot4(&a, b)).into_iter().enumerate() {
                    assert_eq!(x.to_bits(), dot(&a[i * n..(i + 1) * n], b).to_bits());
                }
            }
        }
    }

    #[test]
    fn the_instruction_set_does_not_change_the_bits() {
        let x: Vec<f32> = random(1003, 3).iter().map(|&x| x as f32).collect();
        let y: Vec<f32> = random(1003, 4).iter().map(|&x| x as f32).collect();
        assert_eq!(dot(&x, &y).to_bits(), vectorize(|| dot(&x, &y)).to_bits());
    }
}
