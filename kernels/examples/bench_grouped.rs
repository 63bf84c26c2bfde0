//! GFLOP/s of grouped GEMM, pass by pass, beside one large product of the same operations.
//!
//! `cargo run --release -p kernels --example bench_grouped`. Machines are noisy: rounds alternate between the subjects and
//! the median counts. Rows are routed in even shares, and then with the skew of a router that nothing balances.

#![expect(clippy::print_stdout, reason = "the result of a benchmark is what it prints")]

use std::sync::Arc;

use kernels::{
    clock::now_nanos,
    device::Device,
    dtype::DType,
    error::Result,
    memory::Memory,
    ops::{
        gemm,
        grouped_gemm::{self as grouped, swiglu},
    },
    stream::Stream,
    tensor::Tensor,
};

const ROUNDS: usize = 31;

type Pass = Box<dyn Fn(&mut Stream) -> Result<()>>;

fn main() -> Result<()> {
    let memory = Memory::new(Device::Cpu);
    let mut s = Stream::new("bench", &memory, &Arc::default())?;
    println!(
        "threads {}; GFLOP/s, medians of {ROUNDS}; `large` is one product of the same size",
        rayon::current_num_threads()
    );
    println!(
        "{:>26} {:>8} {:>8} {:>8} {:>8} {:>8} {:>9} {:>9}",
        "rows experts i o load", "F", "I", "W", "large F", "large W", "F swiglu", "I swiglu"
    );
    for (n, e, i, o) in
        [(8192, 32, 256, 192), (8192, 32, 96, 256), (8192, 64, 256, 192), (8192, 64, 96, 256), (8, 32, 256, 192)]
    {
        for (load, counts) in [("even", even(n, e)), ("skewed", skewed(n, e))] {
            let medians = measure(&mut s, n, &counts, i, o)?;
            print!("{:>26}", format!("{n} {e} {i} {o} {load}"));
            for gflops in medians {
                print!(" {gflops:>8.1}");
            }
            println!();
        }
    }
    Ok(())
}

fn even(n: usize, e: usize) -> Vec<usize> {
    (0..e).map(|i| n * (i + 1) / e - n * i / e).collect()
}

/// Shares that fall as 1 / rank.
fn skewed(n: usize, e: usize) -> Vec<usize> {
    let total: f64 = (1..=e).map(|r| 1.0 / r as f64).sum();
    let mut at = 0.0;
    let mut edges: Vec<usize> = (1..=e)
        .map(|r| {
            at += n as f64 / r as f64 / total;
            at.round() as usize
        })
        .collect();
    edges.insert(0, 0);
    edges.windows(2).map(|w| w[1] - w[0]).collect()
}

/// F, I, W, large F, large W, F with SwiGLU (o = 2f), I with SwiGLU (of the down-projection that goes with it).
fn measure(s: &mut Stream, n: usize, counts: &[usize], i: usize, o: usize) -> Result<[f64; 7]> {
    let m = s.memory().clone();
    let (e, f) = (counts.len(), o / 2);
    let filled = |dims: &[usize]| {
        let len = dims.iter().product();
        m.from_slice(dims, &(0..len).map(|j: usize| (j * 37 % 101) as f32 / 101.0 - 0.5).collect::<Vec<f32>>())
    };
    let mut offsets = vec![0u32];
    counts.iter().for_each(|&c| offsets.push(offsets[offsets.len() - 1] + c as u32));
    let offsets = m.from_slice(&[e + 1], &offsets);
    let (x, w, y) = (filled(&[n, i]), filled(&[e, o, i]), filled(&[n, o]));
    let (dx, dw, a, h) = (filled(&[n, i]), filled(&[e, o, i]), filled(&[n, f]), filled(&[n, o]));
    let (w_one, dw_one, w_down) = (filled(&[o, i]), filled(&[o, i]), filled(&[e, i, f]));
    let all: [Tensor; 11] = [x, w, y, dx, dw, a, h, w_one, dw_one, w_down, offsets];
    let passes: [Pass; 7] = [
        Box::new(move |s| grouped::forward(s, x, offsets, w, y)),
        Box::new(move |s| grouped::input_grad(s, y, offsets, w, dx)),
        Box::new(move |s| grouped::weight_grad(s, y, x, offsets, dw)),
        Box::new(move |s| gemm::forward(s, x, w_one, None, y)),
        Box::new(move |s| gemm::weight_grad(s, y, x, dw_one, None)),
        Box::new(move |s| swiglu::forward(s, x, offsets, w, y, a)),
        Box::new(move |s| swiglu::input_grad(s, x, offsets, w_down, h, y, Some(a))),
    ];
    let flops = [2.0, 2.0, 2.0, 2.0, 2.0, 2.0, 1.0].map(|k| k * (n * i * o) as f64);
    let mut nanos: [Vec<u64>; 7] = Default::default();
    for _ in 0..ROUNDS {
        for (pass, nanos) in passes.iter().zip(&mut nanos) {
            // The values stay small whatever the order: no infinities, no subnormals.
            m.write::<f32>(y).fill(0.25);
            let start = now_nanos();
            pass(s)?;
            s.synchronize()?;
            nanos.push(now_nanos() - start);
        }
    }
    all.into_iter().for_each(|t| m.release(t));
    debug_assert_eq!(x.dtype, DType::F32);
    let mut out = [0.0; 7];
    for ((out, mut nanos), flops) in out.iter_mut().zip(nanos).zip(flops) {
        nanos.sort_unstable();
        *out = flops / nanos[ROUNDS / 2] as f64;
    }
    Ok(out)
}
