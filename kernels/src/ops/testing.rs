//! The harness of op tests: seeded data, and gradients against central finite differences in f64.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use half::bf16;
use rand::{RngExt as _, SeedableRng};

use crate::{device::Device, dtype::DType, error::Result, fp8::Tiles, memory::Memory, stream::Stream, tensor::Tensor};

/// `n` values in (-1, 1).
pub fn random(n: usize, seed: u64) -> Vec<f64> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
}

/// The same in bf16.
pub fn random_bf16(n: usize, seed: u64) -> Vec<bf16> {
    random(n, seed).into_iter().map(bf16::from_f64).collect()
}

/// Of mean 0 and variance 1: twelve uniform numbers, summed.
pub fn gaussian(n: usize, seed: u64) -> Vec<f64> {
    random(12 * n, seed).chunks(12).map(|x| x.iter().sum::<f64>() / 2.0).collect()
}

/// DeepGEMM's measure of how two results differ: 1 - 2 <x, y> / (|x|^2 + |y|^2); 0 if both are zero.
pub fn calc_diff(x: &[f64], y: &[f64]) -> f64 {
    assert_eq!(x.len(), y.len());
    let dot = |x: &[f64], y: &[f64]| x.iter().zip(y).map(|(x, y)| x * y).sum::<f64>();
    let squares = dot(x, x) + dot(y, y);
    if squares == 0.0 { 0.0 } else { 1.0 - 2.0 * dot(x, y) / squares }
}

/// Tiles that no op has written.
pub fn poisoned_tiles(m: &Memory, rows: usize, columns: usize) -> Tiles {
    let tiles = Tiles::alloc(m, rows, columns);
    m.write::<u8>(tiles.codes).fill(0xa5);
    m.write::<f32>(tiles.scales).fill(f32::NAN);
    tiles
}

/// The scales of tiles, [tiles, rows], without what is past the last row.
pub fn scales_of(m: &Memory, tiles: Tiles) -> Vec<f32> {
    let (scales, rows) = (m.download::<f32>(tiles.scales), tiles.codes.rows());
    scales.chunks(tiles.scales.dim(1).max(1)).flat_map(|tile| &tile[..rows]).copied().collect()
}

/// Codes and scales are the same, bit for bit.
pub fn assert_same_tiles(m: &Memory, got: Tiles, want: Tiles) {
    assert_eq!(m.download::<u8>(got.codes), m.download::<u8>(want.codes));
    assert_eq!(scales_of(m, got), scales_of(m, want));
}

/// A CPU stream.
pub fn stream() -> Stream {
    Stream::new("test", &Memory::new(Device::Cpu), &Arc::default()).unwrap()
}

/// Every element within `tolerance`, absolutely or relative to the wanted one.
pub fn assert_close(got: &[f64], want: &[f64], tolerance: f64) {
    assert_eq!(got.len(), want.len());
    for (i, (g, w)) in got.iter().zip(want).enumerate() {
        assert!((g - w).abs() <= tolerance * w.abs().max(1.0), "element {i}: expected {w}, found {g}");
    }
}

/// Checks every element of every input's gradient. `inputs` are shapes and seeds, `forward` returns the output of shape
/// `out_dims`, and `backward(stream, inputs, dy, dx)` adds to or assigns the zeroed `dx`. The loss is a random projection.
pub fn check_gradients(
    inputs: &[(&[usize], u64)],
    out_dims: &[usize],
    forward: impl Fn(&mut Stream, &[Tensor]) -> Result<Tensor>,
    backward: impl Fn(&mut Stream, &[Tensor], Tensor, &[Tensor]) -> Result<()>,
) {
    let mut s = stream();
    let memory = s.memory().clone();
    let data: Vec<Vec<f64>> = inputs.iter().map(|(dims, seed)| random(dims.iter().product(), *seed)).collect();
    let x: Vec<Tensor> = inputs.iter().zip(&data).map(|((dims, _), d)| memory.from_slice(dims, d)).collect();
    let weights = random(out_dims.iter().product(), 99);
    let loss = |s: &mut Stream| {
        let y = forward(s, &x).unwrap();
        s.synchronize().unwrap();
        let loss: f64 = s.memory().download::<f64>(y).iter().zip(&weights).map(|(y, w)| y * w).sum();
        loss
    };
    loss(&mut s);
    let dy = memory.from_slice(out_dims, &weights);
    let dx: Vec<Tensor> = inputs.iter().map(|(dims, _)| memory.alloc(DType::F64, dims)).collect();
    for d in &dx {
        memory.write::<f64>(*d).fill(0.0);
    }
    backward(&mut s, &x, dy, &dx).unwrap();
    s.synchronize().unwrap();
    let analytic: Vec<Vec<f64>> = dx.iter().map(|&d| memory.download::<f64>(d)).collect();
    const STEP: f64 = 1e-5;
    for (n, values) in data.iter().enumerate() {
        for i in 0..values.len() {
            let mut at = |value: f64| {
                memory.write::<f64>(x[n])[i] = value;
                loss(&mut s)
            };
            let numeric = (at(values[i] + STEP) - at(values[i] - STEP)) / (2.0 * STEP);
            at(values[i]);
            let got = analytic[n][i];
            assert!(
                (got - numeric).abs() <= 1e-7 * numeric.abs().max(1.0),
                "input {n}, element {i}: finite differences give {numeric}, the op {got}"
            );
        }
    }
}
