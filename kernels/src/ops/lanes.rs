//! Reductions over a slice in a fixed number of lanes.
//!
//! A compiler may not reorder a floating-point sum, so a plain one runs at one element per add. Here the order is ours: sixteen
//! partial sums, then a tree. It vectorizes under [`crate::simd::vectorize`], and gives the same bits on every instruction set.

use num_traits::Zero;

use crate::dtype::{Float, Real};

/// Partial results kept side by side: one AVX-512 register of f32.
pub const LANES: usize = 16;

/// Joins the lanes of each row. Not inlined, and given copies: seen beside the loops that fill the lanes, it would make
/// compilers split these into its halves, or keep the lanes in memory.
#[inline(never)]
fn tree<const R: usize, A: Real>(lanes: &mut [[A; LANES]; R], join: impl Fn(A, A) -> A) -> [A; R] {
    let mut width = LANES / 2;
    while width > 0 {
        for row in &mut *lanes {
            for i in 0..width {
                row[i] = join(row[i], row[i + width]);
            }
        }
        width /= 2;
    }
    std::array::from_fn(|r| lanes[r][0])
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
    let [top] = tree(&mut [lanes], larger);
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
    let [mut sum] = tree(&mut [lanes], |a, b| a + b);
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
    let [sum] = tree(&mut [lanes], |a, b| a + b);
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
    let [s0, s1, s2, s3] = tree(&mut [l0, l1, l2, l3], |a, b| a + b);
    let at = n - rest.len();
    [
        dot_from(s0, &a0[at..], rest),
        dot_from(s1, &a1[at..], rest),
        dot_from(s2, &a2[at..], rest),
        dot_from(s3, &a3[at..], rest),
    ]
}

/// Dot products of the four rows of `a` [4, n] with the four of `b` [4, n], each with the bits of [`dot`]: what is loaded is used four
/// times.
///
/// # Panics
/// If they are not equally long, or no four rows.
#[inline(always)]
pub fn dot4x4<T: Float, U: Float<Acc = T::Acc>>(a: &[T], b: &[U]) -> [[T::Acc; 4]; 4] {
    let n = b.len() / 4;
    assert!(a.len() == 4 * n && b.len() == 4 * n, "four rows of one length on both sides");
    let a_rows: [&[T]; 4] = std::array::from_fn(|r| &a[r * n..(r + 1) * n]);
    let b_rows: [&[U]; 4] = std::array::from_fn(|r| &b[r * n..(r + 1) * n]);
    let a_chunks = a_rows.map(|row| row.as_chunks::<LANES>().0);
    let b_chunks = b_rows.map(|row| row.as_chunks::<LANES>().0);
    let num_chunks = n / LANES;
    let (a_chunks, b_chunks) = (a_chunks.map(|c| &c[..num_chunks]), b_chunks.map(|c| &c[..num_chunks]));
    let [mut l0, mut l1, mut l2, mut l3] = [[[T::Acc::zero(); LANES]; 4]; 4];
    for c in 0..num_chunks {
        let a: [[T::Acc; LANES]; 4] =
            [widen(&a_chunks[0][c]), widen(&a_chunks[1][c]), widen(&a_chunks[2][c]), widen(&a_chunks[3][c])];
        for (j, b) in b_chunks.iter().enumerate() {
            let b = widen(&b[c]);
            for (lanes, a) in [&mut l0, &mut l1, &mut l2, &mut l3].into_iter().zip(&a) {
                for i in 0..LANES {
                    lanes[j][i] += a[i] * b[i];
                }
            }
        }
    }
    let at = num_chunks * LANES;
    let mut out = [[T::Acc::zero(); 4]; 4];
    for ((out, lanes), a) in out.iter_mut().zip([&mut l0, &mut l1, &mut l2, &mut l3]).zip(a_rows) {
        let sums = tree(lanes, |a, b| a + b);
        for ((out, sum), b) in out.iter_mut().zip(sums).zip(b_rows) {
            *out = dot_from(sum, &a[at..], &b[at..]);
        }
    }
    out
}

#[inline(always)]
fn widen<T: Float>(x: &[T; LANES]) -> [T::Acc; LANES] {
    let mut out = [T::Acc::zero(); LANES];
    for i in 0..LANES {
        out[i] = x[i].to_acc();
    }
    out
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
            let all = vectorize(|| dot4x4(&a, &b));
            for (i, row) in all.iter().enumerate() {
                let b_row = |j: usize| &b[j * n..(j + 1) * n];
                for (j, x) in row.iter().enumerate() {
                    assert_eq!(x.to_bits(), dot(&a[i * n..(i + 1) * n], b_row(j)).to_bits());
                }
                let four = dot4(&a, b_row(i));
                assert!((0..4).all(|k| four[k].to_bits() == all[k][i].to_bits()));
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
