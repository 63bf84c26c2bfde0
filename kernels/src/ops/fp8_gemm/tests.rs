//! Products against a reference in f64 that multiplies the same quantized numbers, on inputs where a wrong recipe shows; and
//! recipes that are wrong, which must not pass.
//!
//! DeepGEMM compares with the product before quantization, to 1e-3. The noise of quantization is 7e-4 of that whatever the scales, so
//! that it cannot tell scales by tile from one for all, nor sums in 14 bits. Here the noise is in both and the bound is 1e-6.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::{num::NonZeroUsize, sync::Arc};

use super::*;
use crate::{
    device::Device,
    fp8::{E4M3, Scaling},
    memory::Memory,
    ops::{quantize, testing::*},
    stream::Part,
};

const BOUND: f64 = 1e-6;
const INPUTS: [&str; 3] = ["Gaussian", "outliers", "positive"];

/// x [r, k]; every 512th of k is 100 times as large in "outliers".
fn input(name: &str, r: usize, k: usize, seed: u64) -> Vec<f32> {
    let x = if name == "positive" { random(r * k, seed) } else { gaussian(r * k, seed) };
    let number = |(j, x): (usize, f64)| match name {
        "positive" => x.abs(),
        "outliers" if j % k % 512 == 100 => 100.0 * x,
        _ => x,
    };
    x.into_iter().enumerate().map(|j| number(j) as f32).collect()
}

/// Which op: weights have scales by block, columns by row.
#[derive(Clone, Copy, Debug)]
enum Op {
    Product,
    WeightGrad,
}

/// Quantized operands of a product a b^T, and the numbers before.
struct Case {
    t: usize,
    n: usize,
    k: usize,
    x: Vec<f32>,
    w: Vec<f32>,
    /// Values of codes, [t, k] and [n, k].
    a: Vec<f64>,
    b: Vec<f64>,
    /// [blocks of k, t] and [blocks of k, n]
    a_scales: Vec<f64>,
    b_scales: Vec<f64>,
    /// The result of the op, from zeros, in f32.
    result: Vec<f64>,
}

fn values(codes: &[u8]) -> Vec<f64> {
    codes.iter().map(|code| f64::from(E4M3[usize::from(*code)])).collect()
}

fn wide(x: &[f32]) -> Vec<f64> {
    x.iter().map(|x| f64::from(*x)).collect()
}

impl Case {
    fn new(op: Op, input_name: &str, scaling: Scaling) -> Self {
        // Nothing is a multiple of a tile.
        let (t, n, k) = (33, 150, 2048 + 40);
        let mut s = stream();
        let m = s.memory().clone();
        let (x, w) = (input(input_name, t, k, 1), input(input_name, n, k, 2));
        let (xs, ws) = (m.from_slice(&[t, k], &x), m.from_slice(&[n, k], &w));
        let (a, y) = (Tiles::alloc(&m, t, k), m.from_slice(&[t, n], &vec![0f32; t * n]));
        quantize::tiles(&mut s, xs, a, scaling).unwrap();
        let (b_codes, b_scales) = match op {
            Op::Product => {
                let b = Blocks::alloc(&m, &[n, k]);
                quantize::blocks(&mut s, ws, b, None, scaling).unwrap();
                product(&mut s, a, b, None, y).unwrap();
                s.synchronize().unwrap();
                let (scales, across) = (m.download::<f32>(b.scales), k.div_ceil(TILE));
                let by_row = (0..across * n).map(|j| scales[j % n / TILE * across + j / n]).collect();
                (b.codes, by_row)
            }
            Op::WeightGrad => {
                let b = Tiles::alloc(&m, n, k);
                quantize::tiles(&mut s, ws, b, scaling).unwrap();
                weight_grad(&mut s, a, b, y).unwrap();
                s.synchronize().unwrap();
                (b.codes, scales_of(&m, b))
            }
        };
        let codes = |tensor| values(&m.download::<u8>(tensor));
        let (a_scales, result) = (wide(&scales_of(&m, a)), wide(&m.download::<f32>(y)));
        let (a, b, b_scales) = (codes(a.codes), codes(b_codes), wide(&b_scales));
        Case { t, n, k, x, w, a, b, a_scales, b_scales, result }
    }

    /// Each element of the result by `dot(row, column)`.
    fn by_element(&self, dot: impl Fn(usize, usize) -> f64) -> Vec<f64> {
        (0..self.t * self.n).map(|j| dot(j / self.n, j % self.n)).collect()
    }

    /// Sum over k of scaled products, with scales as they are looked up.
    fn with_scales(&self, scales: impl Fn(usize, usize, usize) -> f64) -> Vec<f64> {
        self.by_element(|row, column| {
            let (a, b) = (&self.a[row * self.k..][..self.k], &self.b[column * self.k..][..self.k]);
            let blocks = a.chunks(TILE).zip(b.chunks(TILE)).enumerate();
            blocks.map(|(l, (a, b))| scales(l, row, column) * dot(a, b)).sum()
        })
    }

    fn a_scale(&self, block: usize, row: usize) -> f64 {
        self.a_scales[block * self.t + row]
    }

    fn b_scale(&self, block: usize, column: usize) -> f64 {
        self.b_scales[block * self.n + column]
    }

    fn reference(&self) -> Vec<f64> {
        self.with_scales(|block, row, column| self.a_scale(block, row) * self.b_scale(block, column))
    }

    /// As a tensor core sums: 32 products at a time, aligned with the accumulator and cut to 13 bits below the largest. The
    /// accumulator becomes f32 after each `promotion` products.
    fn with_short_sums(&self, promotion: usize) -> Vec<f64> {
        self.by_element(|row, column| {
            let (a, b) = (&self.a[row * self.k..][..self.k], &self.b[column * self.k..][..self.k]);
            let scale = |l: usize| self.a_scale(l / TILE, row) * self.b_scale(l / TILE, column);
            let products: Vec<f64> = (0..self.k).map(|l| a[l] * b[l] * scale(l)).collect();
            products.chunks(promotion).map(|products| products.chunks(32).fold(0.0, short_sum)).sum()
        })
    }
}

fn dot(a: &[f64], b: &[f64]) -> f64 {
    a.iter().zip(b).map(|(a, b)| a * b).sum()
}

fn short_sum(acc: f64, products: &[f64]) -> f64 {
    let largest = products.iter().fold(acc.abs(), |most, x| most.max(x.abs()));
    let unit = 2f64.powi(largest.log2().floor() as i32 - 13);
    products.iter().chain([&acc]).map(|x| (x / unit).trunc() * unit).sum()
}

/// On which inputs `result` is not the reference.
fn failures(op: Op, result: impl Fn(&Case) -> Vec<f64>) -> Vec<&'static str> {
    let fails = |name: &&str| {
        [Scaling::Real, Scaling::PowerOfTwo].into_iter().any(|scaling| {
            let case = Case::new(op, name, scaling);
            let diff = calc_diff(&result(&case), &case.reference());
            diff.is_nan() || diff >= BOUND
        })
    };
    INPUTS.into_iter().filter(fails).collect()
}

#[test]
fn products_are_those_of_the_quantized_numbers() {
    for op in [Op::Product, Op::WeightGrad] {
        assert_eq!(failures(op, |case| case.result.clone()), [""; 0], "{op:?}");
    }
}

/// One scale for all of x, one for all of w: what FP8 is without fine-grained scales.
fn scaled_per_tensor(case: &Case) -> Vec<f64> {
    let quantized = |x: &[f32]| {
        let mut codes = vec![0; x.len()];
        let scale = quantize::encode_tile(x, &mut codes, Scaling::Real);
        values(&codes).iter().map(|x| x * f64::from(scale)).collect::<Vec<_>>()
    };
    let (a, b) = (quantized(&case.x), quantized(&case.w));
    case.by_element(|row, column| dot(&a[row * case.k..][..case.k], &b[column * case.k..][..case.k]))
}

#[test]
fn wrong_recipes_fail() {
    for op in [Op::Product, Op::WeightGrad] {
        let per_tensor = failures(op, scaled_per_tensor);
        assert!(per_tensor.contains(&"outliers"), "scales per tensor pass on outliers, {op:?}");
        let unpromoted = failures(op, |case| case.with_short_sums(case.k));
        assert!(unpromoted.contains(&"positive"), "sums in 13 bits without promotion pass, {op:?}");
        let other_row = |case: &Case| {
            case.with_scales(|l, row, column| case.a_scale(l, (row + 1) % case.t) * case.b_scale(l, column))
        };
        assert_eq!(failures(op, other_row), INPUTS, "scales of the next row pass, {op:?}");
        let other_rows = |case: &Case| {
            let other = |column: usize| (column + TILE) % case.n;
            case.with_scales(|l, row, column| case.a_scale(l, row) * case.b_scale(l, other(column)))
        };
        assert!(!failures(op, other_rows).is_empty(), "scales of a block of other outputs pass, {op:?}");
        let other_block = |case: &Case| {
            let next = |l: usize| (l + 1) % case.k.div_ceil(TILE);
            case.with_scales(|l, row, column| case.a_scale(l, row) * case.b_scale(next(l), column))
        };
        assert!(!failures(op, other_block).is_empty(), "scales of the next block of k pass, {op:?}");
    }
}

#[test]
fn promotion_every_128_is_what_keeps_short_sums_near() {
    for op in [Op::Product, Op::WeightGrad] {
        let case = Case::new(op, "positive", Scaling::Real);
        let [with, without] = [TILE, case.k].map(|n| calc_diff(&case.with_short_sums(n), &case.reference()));
        assert!(with < 1e-5 && without > 100.0 * with, "{op:?}: {with:e} and {without:e}");
    }
}

/// Tiles of seeded numbers, [r, c].
fn some_tiles(s: &mut Stream, r: usize, c: usize, seed: u64) -> Tiles {
    let m = s.memory().clone();
    let (x, q) = (m.from_slice(&[r, c], &random(r * c, seed)), Tiles::alloc(&m, r, c));
    quantize::tiles(s, x, q, Scaling::Real).unwrap();
    q
}

fn some_blocks(s: &mut Stream, dims: &[usize], seed: u64) -> Blocks {
    let m = s.memory().clone();
    let (w, q) = (m.from_slice(dims, &random(dims.iter().product(), seed)), Blocks::alloc(&m, dims));
    quantize::blocks(s, w, q, None, Scaling::Real).unwrap();
    q
}

#[test]
fn results_are_rounded_once_after_what_was_there_is_added() {
    for (t, n, k) in [(1, 1, 1), (3, 300, 128), (130, 70, 300), (0, 4, 5)] {
        let mut s = stream();
        let m = s.memory().clone();
        let (a, b) = (some_tiles(&mut s, t, k, 1), some_blocks(&mut s, &[n, k], 2));
        let old = random_bf16(t * n, 3);
        let (sums, y) = (m.from_slice(&[t, n], &vec![f32::NAN; t * n]), m.from_slice(&[t, n], &old));
        product(&mut s, a, b, None, sums).unwrap();
        product(&mut s, a, b, Some(y), y).unwrap();
        s.synchronize().unwrap();
        let sums = m.download::<f32>(sums);
        let want: Vec<bf16> = sums.iter().zip(&old).map(|(sum, old)| bf16::from_f32(old.to_f32() + sum)).collect();
        assert_eq!(m.download::<bf16>(y), want, "{t} x {n} x {k}");
        let elsewhere = m.from_slice(&[t, n], &old);
        product(&mut s, a, b, Some(elsewhere), y).unwrap();
        s.synchronize().unwrap();
        assert_eq!(m.download::<bf16>(y), want, "{t} x {n} x {k}, from elsewhere");
        product(&mut s, a, b, None, y).unwrap();
        s.synchronize().unwrap();
        let want: Vec<bf16> = sums.iter().map(|sum| bf16::from_f32(*sum)).collect();
        assert_eq!(m.download::<bf16>(y), want, "{t} x {n} x {k}");
    }
}

#[test]
fn a_row_has_the_same_bits_beside_other_rows_and_on_any_number_of_threads() {
    let results = |t: usize, n: usize, k: usize, threads: usize| {
        let memory = Memory::new(Device::Cpu);
        let threads = NonZeroUsize::new(threads).unwrap();
        let mut s =
            Stream::with_part("test", &memory, &Arc::default(), Part { num_threads: Some(threads), ..Part::default() })
                .unwrap();
        let (a, b, bt) = (some_tiles(&mut s, t, k, 1), some_blocks(&mut s, &[n, k], 2), some_tiles(&mut s, n, k, 2));
        let (y, dw) = (memory.alloc(DType::F32, &[t, n]), memory.from_slice(&[t, n], &vec![1f32; t * n]));
        product(&mut s, a, b, None, y).unwrap();
        weight_grad(&mut s, a, bt, dw).unwrap();
        s.synchronize().unwrap();
        [y, dw].map(|y| memory.download::<f32>(y))
    };
    for (n, k) in [(1, 40), (17, 300), (300, 700)] {
        let all = results(300, n, k, 1);
        assert_eq!(results(300, n, k, 3), all);
        for t in [1, 2, 31, 128, 129, 200] {
            for (some, all) in results(t, n, k, 2).iter().zip(&all) {
                assert_eq!(some[..], all[..t * n], "{t} rows, {n} x {k}");
            }
        }
    }
}

#[test]
fn the_passes_of_a_layer_are_those_in_f64_within_the_noise_of_quantization() {
    let (t, o, i) = (150, 140, 200);
    let (x, w, dy) = (gaussian(t * i, 1), gaussian(o * i, 2), gaussian(t * o, 3));
    let sum = |n: usize, f: &dyn Fn(usize) -> f64| (0..n).map(f).sum::<f64>();
    let y: Vec<f64> = (0..t * o).map(|j| dot(&x[j / o * i..][..i], &w[j % o * i..][..i])).collect();
    let dx: Vec<f64> = (0..t * i).map(|j| sum(o, &|r| dy[j / i * o + r] * w[r * i + j % i])).collect();
    let dw: Vec<f64> = (0..o * i).map(|j| sum(t, &|r| dy[r * o + j / i] * x[r * i + j % i])).collect();
    for scaling in [Scaling::Real, Scaling::PowerOfTwo] {
        let mut s = stream();
        let m = s.memory().clone();
        let [xs, ws, dys] = [(&x, [t, i]), (&w, [o, i]), (&dy, [t, o])].map(|(x, dims)| m.from_slice(&dims, x));
        let (xq, dyq, xt, dyt) =
            (Tiles::alloc(&m, t, i), Tiles::alloc(&m, t, o), Tiles::alloc(&m, i, t), Tiles::alloc(&m, o, t));
        let (wq, wt) = (Blocks::alloc(&m, &[o, i]), Blocks::alloc(&m, &[i, o]));
        let [got_y, got_dx, got_dw] = [[t, o], [t, i], [o, i]].map(|dims| m.alloc(DType::F32, &dims));
        m.write::<f32>(got_dw).fill(0.0);
        quantize::tiles(&mut s, xs, xq, scaling).unwrap();
        quantize::tiles(&mut s, dys, dyq, scaling).unwrap();
        quantize::blocks(&mut s, ws, wq, Some(wt), scaling).unwrap();
        quantize::columns(&mut s, xs, None, xt, scaling).unwrap();
        quantize::columns(&mut s, dys, None, dyt, scaling).unwrap();
        product(&mut s, xq, wq, None, got_y).unwrap();
        product(&mut s, dyq, wt, None, got_dx).unwrap();
        weight_grad(&mut s, dyt, xt, got_dw).unwrap();
        s.synchronize().unwrap();
        for (pass, got, want) in [("F", got_y, &y), ("I", got_dx, &dx), ("W", got_dw, &dw)] {
            let diff = calc_diff(&wide(&m.download::<f32>(got)), want);
            assert!((4e-4..9e-4).contains(&diff), "{pass}, {scaling:?}: {diff:e}");
        }
    }
}

#[test]
fn tensors_of_other_shapes_are_refused() {
    let mut s = stream();
    let m = s.memory().clone();
    let (a, b, y) = (Tiles::alloc(&m, 4, 8), Blocks::alloc(&m, &[5, 8]), m.alloc(DType::F32, &[4, 5]));
    let said = |result: Result<()>| result.unwrap_err().to_string();
    let other = Blocks::alloc(&m, &[5, 9]);
    assert!(said(product(&mut s, a, other, None, y)).contains("`b` should be U8 of [5, 8]"));
    let wide = m.alloc(DType::F64, &[4, 5]);
    assert!(said(product(&mut s, a, b, None, wide)).contains("`y` should be Bf16 or F32 of [4, 5]"));
    let xt = Tiles::alloc(&m, 5, 7);
    assert!(said(weight_grad(&mut s, a, xt, y)).contains("`xt` should be U8 of [5, 8]"));
    let (xt, dw) = (Tiles::alloc(&m, 5, 8), m.alloc(DType::Bf16, &[4, 5]));
    assert!(said(weight_grad(&mut s, a, xt, dw)).contains("`dw` should be F32 of [4, 5]"));
}
