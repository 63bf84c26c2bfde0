//! The harness of op tests: seeded data, and gradients against central finite differences in f64.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::sync::Arc;

use rand::{RngExt as _, SeedableRng};

use crate::{device::Device, dtype::DType, error::Result, memory::Memory, stream::Stream, tensor::Tensor};

/// `n` values in (-1, 1).
pub fn random(n: usize, seed: u64) -> Vec<f64> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    (0..n).map(|_| rng.random_range(-1.0..1.0)).collect()
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
