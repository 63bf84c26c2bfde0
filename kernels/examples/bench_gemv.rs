//! Products of one row with a weight, as generation does them: microseconds and GB/s of weight read.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark")]

use std::sync::Arc;

use kernels::{clock, device::Device, dtype::DType, memory::Memory, ops::gemv, stream::Stream};

fn main() {
    let m = Memory::new(Device::Cpu);
    let mut s = Stream::new("bench", &m, &Arc::default()).unwrap();
    for (n, o, i) in [(1, 256, 256), (1, 1024, 256), (1, 4096, 256), (4, 4096, 256), (1, 4096, 4096)] {
        for weight in [DType::F32, DType::Bf16] {
            let x = m.from_slice(&[n, i], &vec![0.5f32; n * i]);
            let (w, y) = (m.alloc(weight, &[o, i]), m.alloc(DType::F32, &[n, o]));
            const RUNS: usize = 200;
            let best = (0..5).map(|_| {
                let start = clock::now_nanos();
                for _ in 0..RUNS {
                    gemv::forward(&mut s, x, w, None, y).unwrap();
                }
                s.synchronize().unwrap();
                (clock::now_nanos() - start) as f64 / RUNS as f64
            });
            let nanos = best.fold(f64::INFINITY, f64::min);
            let gb_per_sec = w.size_bytes() as f64 / nanos;
            println!("{n} x {i} by {o} of {weight:?}: {:.1} us, {gb_per_sec:.1} GB/s", nanos / 1e3);
        }
    }
}
