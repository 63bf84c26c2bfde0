//! A product's inner loop: up to sixteen rows of w, widened and transposed into a panel, under every row of x.
//!
//! A number of y is summed over blocks of 64 along the rows: a chain of fused multiply-adds in each, then the blocks in their order.
//! So its bits depend neither on the rows of x beside it nor on the processor; one without fused multiply-adds makes them in
//! software, slowly.

use std::array::from_fn;

use crate::dtype::{DType, Element, Float, Real};

/// Outputs of a panel: one AVX-512 register of f32, two of AVX2.
pub const WIDTH: usize = 16;
/// Numbers of a row whose products are one chain.
const BLOCK: usize = 64;
/// Numbers of a row in a panel: with f32, half of a first cache.
const DEPTH: usize = 4 * BLOCK;
/// Bytes of x that stay in the second cache while panels pass.
const X_BYTES: usize = 128 << 10;
/// Side of the squares that are transposed in registers.
const SIDE: usize = 8;

/// Adds `x_ni w_pi^T` to `y_np`: rows of `i`, and `WIDTH` of w or fewer; numbers of y past them are anything.
#[inline(always)]
pub fn product<W: Float>(w: &[W], x: &[W::Acc], i: usize, y: &mut [[W::Acc; WIDTH]]) {
    let mut panel = [[W::Acc::default(); WIDTH]; DEPTH];
    let num_rows = (X_BYTES / (i * size_of::<W::Acc>())).max(1);
    for (x, y) in x.chunks(num_rows * i).zip(y.chunks_mut(num_rows)) {
        for from in (0..i).step_by(DEPTH) {
            let panel = &mut panel[..DEPTH.min(i - from)];
            pack(w, i, from, panel);
            let (mut x, mut y) = (&x[from..], &mut *y);
            while !y.is_empty() {
                // So many rows and blocks that their sums fill the registers, and that no row is left alone.
                let done = match y.len() {
                    1 => tile::<_, 1, 4>(panel, x, i, y),
                    2 => tile::<_, 2, 2>(panel, x, i, y),
                    3 => tile::<_, 3, 2>(panel, x, i, y),
                    4 | 7 | 8 => tile::<_, 4, 1>(panel, x, i, y),
                    5 => tile::<_, 5, 1>(panel, x, i, y),
                    _ => tile::<_, 6, 1>(panel, x, i, y),
                };
                y = &mut y[done..];
                x = x.get(done * i..).unwrap_or_default();
            }
        }
    }
}

/// The first `R` rows, `B` blocks side by side while there are so many; `R`.
#[inline(always)]
fn tile<A: Real, const R: usize, const B: usize>(
    panel: &[[A; WIDTH]],
    x: &[A],
    i: usize,
    y: &mut [[A; WIDTH]],
) -> usize {
    let x: [&[A]; R] = from_fn(|r| &x[r * i..][..panel.len()]);
    let y: &mut [[A; WIDTH]; R] = y.first_chunk_mut().expect("the caller gives R rows");
    let mut at = 0;
    while at + B * BLOCK <= panel.len() {
        blocks::<A, R, B>(&panel[at..][..B * BLOCK], x.map(|x| &x[at..][..B * BLOCK]), y);
        at += B * BLOCK;
    }
    while at < panel.len() {
        let len = BLOCK.min(panel.len() - at);
        blocks::<A, R, 1>(&panel[at..][..len], x.map(|x| &x[at..][..len]), y);
        at += len;
    }
    R
}

#[inline(always)]
fn blocks<A: Real, const R: usize, const B: usize>(panel: &[[A; WIDTH]], x: [&[A]; R], y: &mut [[A; WIDTH]; R]) {
    let len = panel.len() / B;
    let panel: [&[[A; WIDTH]]; B] = from_fn(|b| &panel[b * len..][..len]);
    let x: [[&[A]; R]; B] = from_fn(|b| x.map(|x| &x[b * len..][..len]));
    let mut sums = [[[A::default(); WIDTH]; R]; B];
    for k in 0..len {
        for b in 0..B {
            let w = &panel[b][k];
            for r in 0..R {
                let x = x[b][r][k];
                for (sum, &w) in sums[b][r].iter_mut().zip(w) {
                    *sum = x.mul_add(w, *sum);
                }
            }
        }
    }
    for sums in sums {
        for (y, sums) in y.iter_mut().zip(sums) {
            y.iter_mut().zip(sums).for_each(|(y, sum)| *y += sum);
        }
    }
}

/// `panel_kp = w_pk` for the numbers of each row from `from` on; the last row stands for rows that w lacks.
#[inline(always)]
fn pack<W: Float>(w: &[W], i: usize, from: usize, panel: &mut [[W::Acc; WIDTH]]) {
    let last = w.len() / i - 1;
    let rows: [&[W]; WIDTH] = from_fn(|p| &w[p.min(last) * i + from..][..panel.len()]);
    let done = transpose(&rows, panel);
    for (k, out) in (done..).zip(&mut panel[done..]) {
        *out = rows.map(|row| row[k].to_acc());
    }
}

/// Fills whole squares of the panel in registers, which compilers do not make of the plain loop; up to where. Of f32 and bf16.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transpose<W: Float>(rows: &[&[W]; WIDTH], panel: &mut [[W::Acc; WIDTH]]) -> usize {
    let Some(v3) = pulp::x86::V3::try_new().filter(|_| W::Acc::DTYPE == DType::F32) else { return 0 };
    let squares = panel.as_chunks_mut::<SIDE>().0;
    let num_squares = squares.len();
    for (at, panel) in squares.iter_mut().enumerate() {
        for half in [0, SIDE] {
            let mut square = [v3.splat_f32x8(0.0); SIDE];
            for (row, from) in square.iter_mut().zip(&rows[half..]) {
                let from: &[W; SIDE] = from[at * SIDE..].first_chunk().expect("as long as the panel");
                *row = widened(v3, from);
            }
            for (out, row) in panel.iter_mut().zip(transposed(v3, square)) {
                out[half..][..SIDE].copy_from_slice(&bytemuck::cast::<[f32; SIDE], [W::Acc; SIDE]>(pulp::cast(row)));
            }
        }
    }
    num_squares * SIDE
}

#[cfg(not(target_arch = "x86_64"))]
fn transpose<W: Float>(_: &[&[W]; WIDTH], _: &mut [[W::Acc; WIDTH]]) -> usize {
    0
}

/// f32, or bf16, as f32.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn widened<W: Float>(v3: pulp::x86::V3, row: &[W; SIDE]) -> pulp::f32x8 {
    match W::DTYPE {
        DType::F32 => pulp::cast(bytemuck::cast::<_, [f32; SIDE]>(*row)),
        _ => {
            let bits = v3.convert_u16x8_to_u32x8(pulp::cast(bytemuck::cast::<_, [u16; SIDE]>(*row)));
            pulp::cast(v3.shl_const_u32x8::<16>(bits))
        }
    }
}

/// Pairs, then fours, of each half of a register, then the halves.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn transposed(v3: pulp::x86::V3, square: [pulp::f32x8; SIDE]) -> [pulp::f32x8; SIDE] {
    let avx = v3.avx;
    // Macros, because closures would be compiled without these instructions.
    macro_rules! both {
        ($a:expr, $b:expr, $low:ident, $high:ident $(, $low_half:literal, $high_half:literal)?) => {
            (avx.$low$(::<$low_half>)?($a, $b), avx.$high$(::<$high_half>)?($a, $b))
        };
    }
    macro_rules! pairs {
        ($a:expr, $b:expr) => {
            both!($a, $b, _mm256_unpacklo_ps, _mm256_unpackhi_ps)
        };
    }
    macro_rules! fours {
        ($a:expr, $b:expr) => {
            both!($a, $b, _mm256_shuffle_ps, _mm256_shuffle_ps, 0x44, 0xee)
        };
    }
    macro_rules! halves {
        ($a:expr, $b:expr) => {
            both!($a, $b, _mm256_permute2f128_ps, _mm256_permute2f128_ps, 0x20, 0x31)
        };
    }
    let [a, b, c, d, e, f, g, h] = square;
    let ((a, b), (c, d)) = (pairs!(pulp::cast(a), pulp::cast(b)), pairs!(pulp::cast(c), pulp::cast(d)));
    let ((e, f), (g, h)) = (pairs!(pulp::cast(e), pulp::cast(f)), pairs!(pulp::cast(g), pulp::cast(h)));
    let ((a, b), (c, d)) = (fours!(a, c), fours!(b, d));
    let ((e, f), (g, h)) = (fours!(e, g), fours!(f, h));
    let ((a, e), (b, f)) = (halves!(a, e), halves!(b, f));
    let ((c, g), (d, h)) = (halves!(c, g), halves!(d, h));
    [
        pulp::cast(a),
        pulp::cast(b),
        pulp::cast(c),
        pulp::cast(d),
        pulp::cast(e),
        pulp::cast(f),
        pulp::cast(g),
        pulp::cast(h),
    ]
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::{ops::testing::random, simd::vectorize};

    /// The order that the head of this file defines.
    fn by_definition<W: Float>(w: &[W], x: &[W::Acc]) -> W::Acc {
        let chain = |(w, x): (&[W], &[W::Acc])| {
            w.iter().zip(x).fold(W::Acc::default(), |sum, (w, x)| num_traits::Float::mul_add(*x, w.to_acc(), sum))
        };
        w.chunks(BLOCK).zip(x.chunks(BLOCK)).map(chain).fold(W::Acc::default(), |sum, block| sum + block)
    }

    fn check<W: Float>(num_rows: usize, num_outputs: usize, i: usize) {
        let of = |len, seed| random(len, seed).into_iter();
        let x: Vec<W::Acc> = of(num_rows * i, 1).map(W::Acc::of_f64).collect();
        let w: Vec<W> = of(num_outputs * i, 2).map(W::of_f64).collect();
        let zeros = vec![[W::Acc::default(); WIDTH]; num_rows];
        let (mut wide, mut plain) = (zeros.clone(), zeros);
        vectorize(
            #[inline(always)]
            || product(&w, &x, i, &mut wide),
        );
        product(&w, &x, i, &mut plain);
        for (r, x) in x.chunks_exact(i).enumerate() {
            for (p, w) in w.chunks_exact(i).enumerate() {
                let want = by_definition(w, x).as_f64();
                let found = [wide[r][p].as_f64(), plain[r][p].as_f64()];
                assert_eq!(found, [want; 2], "row {r} of {num_rows}, output {p} of {num_outputs}, {i} numbers");
            }
        }
    }

    #[test]
    fn bits_follow_from_the_row_alone_whatever_the_instruction_set() {
        for num_rows in (1..=9).chain([13, 20, 200]) {
            for (num_outputs, i) in [(16, 256), (1, 1), (5, 7), (16, 65), (3, 130), (16, 521)] {
                check::<f32>(num_rows, num_outputs, i);
                check::<bf16>(num_rows, num_outputs, i);
                check::<f64>(num_rows, num_outputs, i);
            }
        }
    }
}
