//! Products of a batch-invariant stream, which serving makes, beside those of training: rows of x from one to many.
//! `cargo run --release -p kernels --example bench_by_row`
#![expect(clippy::unwrap_used, clippy::print_stdout, reason = "a benchmark")]

use std::sync::Arc;

use kernels::{
    clock,
    device::Device,
    dtype::DType,
    memory::Memory,
    ops::{elementwise, gemm},
    stream::Stream,
};

/// Median of `n` runs, in seconds.
fn median(s: &mut Stream, n: usize, mut run: impl FnMut(&mut Stream)) -> f64 {
    let mut secs: Vec<f64> = (0..n)
        .map(|_| {
            let start = clock::now_nanos();
            run(s);
            s.synchronize().unwrap();
            (clock::now_nanos() - start) as f64 * 1e-9
        })
        .collect();
    secs.sort_by(f64::total_cmp);
    secs[n / 2]
}

fn main() {
    let m = Memory::new(Device::Cpu);
    let mut s = Stream::new("bench", &m, &Arc::default()).unwrap();
    println!("{:>6} {:>5} {:>5}  {:5}  {:>14}  {:>14}", "rows", "i", "o", "", "by row GFLOP/s", "free GFLOP/s");
    for dtype in [DType::F32, DType::Bf16] {
        for (i, o) in [(256, 192), (256, 1408), (256, 3072), (1024, 1024)] {
            for n in [1, 4, 8, 32, 256] {
                let fill = |s: &mut Stream, dims: &[usize]| {
                    let len = dims.iter().product();
                    let values: Vec<f32> = (0..len).map(|i: usize| (i * 37 % 101) as f32 / 50.0 - 1.0).collect();
                    let (from, to) = (m.from_slice(dims, &values), m.alloc(dtype, dims));
                    elementwise::copy(s, from, to).unwrap();
                    to
                };
                let (x, w, y) = (fill(&mut s, &[n, i]), fill(&mut s, &[o, i]), fill(&mut s, &[n, o]));
                let rate = [true, false].map(|by_row| {
                    s.set_batch_invariant(by_row);
                    let secs = median(&mut s, 30, |s| gemm::forward(s, x, w, None, y).unwrap());
                    2.0 * (n * i * o) as f64 / secs * 1e-9
                });
                println!("{n:>6} {i:>5} {o:>5}  {:5}  {:>14.1}  {:>14.1}", dtype.name(), rate[0], rate[1]);
            }
        }
    }
}
