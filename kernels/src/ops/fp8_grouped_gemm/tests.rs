//! Experts' products: each has the bits of its expert's alone, and all are a layer's in f64 within the noise of quantization.

#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::{
    fp8::{Scaling, padded},
    ops::{quantize, testing::*},
};

const COUNTS: [&[usize]; 6] =
    [&[3, 0, 1, 129, 128], &[0, 0], &[0, 0, 400, 0], &[257], &[1, 0, 1, 1], &[70, 130, 1, 0, 0, 5]];

/// A layer of experts, its data, and its passes by FP8.
struct Layer {
    counts: &'static [usize],
    n: usize,
    o: usize,
    i: usize,
    x: Vec<f64>,
    w: Vec<f64>,
    dy: Vec<f64>,
    /// y, dx and dw as they are before.
    old: [Vec<f32>; 3],
    passes: [Vec<f32>; 3],
    /// The same from [`fp8_gemm`], expert by expert, in the same places.
    alone: [Vec<f32>; 3],
}

fn quantized(s: &mut Stream, x: &[f64], dims: [usize; 2], scaling: Scaling) -> (Tiles, Tiles) {
    let m = s.memory().clone();
    let xs = m.from_slice(&dims, x);
    let (q, qt) = (Tiles::alloc(&m, dims[0], dims[1]), Tiles::alloc(&m, dims[1], dims[0]));
    quantize::tiles(s, xs, q, scaling).unwrap();
    quantize::columns(s, xs, None, qt, scaling).unwrap();
    (q, qt)
}

fn weights(s: &mut Stream, w: &[f64], dims: &[usize], scaling: Scaling) -> (Blocks, Blocks) {
    let m = s.memory().clone();
    let (matrices, last) = dims.split_at(dims.len() - 2);
    let (q, qt) = (Blocks::alloc(&m, dims), Blocks::alloc(&m, &[matrices, &[last[1], last[0]]].concat()));
    let w = m.from_slice(dims, w);
    quantize::blocks(s, w, q, Some(qt), scaling).unwrap();
    (q, qt)
}

impl Layer {
    /// With `room` rows past the last expert's.
    fn new(counts: &'static [usize], room: usize, o: usize, i: usize, scaling: Scaling) -> Self {
        let (n, e) = (counts.iter().sum::<usize>() + room, counts.len());
        let mut s = stream();
        let m = s.memory().clone();
        let mut offsets = vec![0u32];
        counts.iter().for_each(|&c| offsets.push(offsets[offsets.len() - 1] + c as u32));
        let offsets = m.from_slice(&[e + 1], &offsets);
        let (x, w, dy) = (gaussian(n * i, 1), gaussian(e * o * i, 2), gaussian(n * o, 3));
        let old = [n * o, n * i, e * o * i].map(|len| random(len, 4).iter().map(|x| *x as f32).collect::<Vec<_>>());
        let dims = [vec![n, o], vec![n, i], vec![e, o, i]];
        let [y, dx, dw] = [0, 1, 2].map(|j| m.from_slice(&dims[j], &old[j]));

        let (xs, dys) = (m.from_slice(&[n, i], &x), m.from_slice(&[n, o], &dy));
        let p = padded(n, e);
        let (xt, dyt) = (poisoned_tiles(&m, i, p), poisoned_tiles(&m, o, p));
        let ((xq, _), (dyq, _)) = (quantized(&mut s, &x, [n, i], scaling), quantized(&mut s, &dy, [n, o], scaling));
        let (wq, wt) = weights(&mut s, &w, &[e, o, i], scaling);
        quantize::columns(&mut s, xs, Some(offsets), xt, scaling).unwrap();
        quantize::columns(&mut s, dys, Some(offsets), dyt, scaling).unwrap();
        product(&mut s, xq, offsets, wq, y).unwrap();
        product(&mut s, dyq, offsets, wt, dx).unwrap();
        weight_grad(&mut s, dyt, xt, offsets, dw).unwrap();
        s.synchronize().unwrap();
        let passes = [y, dx, dw].map(|t| m.download::<f32>(t));

        let mut alone = old.clone();
        let mut row = 0;
        for (expert, &count) in counts.iter().enumerate().filter(|(_, count)| **count > 0) {
            let of = |x: &[f64], c: usize| x[row * c..(row + count) * c].to_vec();
            let (xq, xt) = quantized(&mut s, &of(&x, i), [count, i], scaling);
            let (dyq, dyt) = quantized(&mut s, &of(&dy, o), [count, o], scaling);
            let (wq, wt) = weights(&mut s, &w[expert * o * i..][..o * i], &[o, i], scaling);
            let places = [row * o..(row + count) * o, row * i..(row + count) * i, expert * o * i..(expert + 1) * o * i];
            let dims = [[count, o], [count, i], [o, i]];
            let [y, dx, dw] = [0, 1, 2].map(|j| m.from_slice(&dims[j], &old[j][places[j].clone()]));
            fp8_gemm::product(&mut s, xq, wq, None, y).unwrap();
            fp8_gemm::product(&mut s, dyq, wt, None, dx).unwrap();
            fp8_gemm::weight_grad(&mut s, dyt, xt, dw).unwrap();
            s.synchronize().unwrap();
            for (j, tensor) in [y, dx, dw].into_iter().enumerate() {
                alone[j][places[j].clone()].copy_from_slice(&m.download::<f32>(tensor));
            }
            row += count;
        }
        Layer { counts, n, o, i, x, w, dy, old, passes, alone }
    }

    /// In f64, without quantization.
    fn reference(&self) -> [Vec<f64>; 3] {
        let (o, i) = (self.o, self.i);
        let mut passes = self.old.clone().map(|x| x.into_iter().map(f64::from).collect::<Vec<_>>());
        let mut row = 0;
        for (e, &count) in self.counts.iter().enumerate() {
            for r in row..row + count {
                passes[0][r * o..][..o].fill(0.0);
                passes[1][r * i..][..i].fill(0.0);
                for p in 0..o {
                    for q in 0..i {
                        let at = (e * o + p) * i + q;
                        passes[0][r * o + p] += self.x[r * i + q] * self.w[at];
                        passes[1][r * i + q] += self.dy[r * o + p] * self.w[at];
                        passes[2][at] += self.dy[r * o + p] * self.x[r * i + q];
                    }
                }
            }
            row += count;
        }
        passes
    }
}

#[test]
fn each_expert_has_the_bits_that_it_has_alone() {
    for counts in COUNTS {
        for (room, o, i) in [(0, 70, 40), (9, 1, 1), (300, 130, 300)] {
            for scaling in [Scaling::Real, Scaling::PowerOfTwo] {
                let layer = Layer::new(counts, room, o, i, scaling);
                for (pass, (got, want)) in ["F", "I", "W"].iter().zip(layer.passes.iter().zip(&layer.alone)) {
                    assert!(got == want, "{pass} of {counts:?} and {room} rows more, {o} x {i}, {scaling:?}");
                }
            }
        }
    }
}

#[test]
fn the_passes_are_those_in_f64_within_the_noise_of_quantization() {
    for scaling in [Scaling::Real, Scaling::PowerOfTwo] {
        let layer = Layer::new(&[150, 0, 1, 129, 200], 40, 140, 200, scaling);
        let want = layer.reference();
        let rows = layer.n - 40;
        for (pass, (name, cols)) in [("F", layer.o), ("I", layer.i)].iter().enumerate() {
            let got: Vec<f64> = layer.passes[pass].iter().map(|x| f64::from(*x)).collect();
            let diff = calc_diff(&got[..rows * cols], &want[pass][..rows * cols]);
            assert!((4e-4..9e-4).contains(&diff), "{name}, {scaling:?}: {diff:e}");
            assert_eq!(got[rows * cols..], want[pass][rows * cols..], "rows past the last expert's stay");
        }
        for (e, count) in layer.counts.iter().enumerate() {
            let size = layer.o * layer.i;
            let got: Vec<f64> = layer.passes[2][e * size..][..size].iter().map(|x| f64::from(*x)).collect();
            let diff = calc_diff(&got, &want[2][e * size..][..size]);
            assert!(diff < 9e-4 && (*count > 0 || diff == 0.0), "W of expert {e}, {scaling:?}: {diff:e}");
        }
    }
}

#[test]
fn results_in_bf16_are_those_in_f32_rounded() {
    let (n, o, i) = (140, 70, 150);
    let mut s = stream();
    let m = s.memory().clone();
    let offsets = m.from_slice(&[3], &[0u32, 131, 140]);
    let (a, _) = quantized(&mut s, &gaussian(n * i, 1), [n, i], Scaling::Real);
    let (b, _) = weights(&mut s, &gaussian(2 * o * i, 2), &[2, o, i], Scaling::Real);
    let (y, rounded) = (m.alloc(DType::F32, &[n, o]), m.alloc(DType::Bf16, &[n, o]));
    product(&mut s, a, offsets, b, y).unwrap();
    product(&mut s, a, offsets, b, rounded).unwrap();
    s.synchronize().unwrap();
    let want: Vec<bf16> = m.download::<f32>(y).into_iter().map(bf16::from_f32).collect();
    assert_eq!(m.download::<bf16>(rounded), want);
}

#[test]
fn tensors_of_other_shapes_are_refused() {
    let mut s = stream();
    let m = s.memory().clone();
    let said = |result: Result<()>| result.unwrap_err().to_string();
    let (a, b, y) = (Tiles::alloc(&m, 4, 8), Blocks::alloc(&m, &[3, 5, 8]), m.alloc(DType::F32, &[4, 5]));
    let (offsets, short) = (m.alloc(DType::U32, &[4]), m.alloc(DType::U32, &[3]));
    assert!(said(product(&mut s, a, short, b, y)).contains("`offsets` should be U32 of [4]"));
    let (dyt, dw) = (Tiles::alloc(&m, 5, 384), m.alloc(DType::F32, &[3, 5, 8]));
    assert!(said(weight_grad(&mut s, dyt, a, offsets, dw)).contains("`xt` should be U8 of [8, 384]"));
}
