//! Times of the FP8 recipe on processors beside bf16: products of a layer and of experts, and quantizers beside a copy.
//!
//! `cargo run --release -p kernels --example bench_fp8`. Machines are noisy: rounds alternate between the subjects and the median
//! counts.

#![expect(clippy::print_stdout, reason = "the result of a benchmark is what it prints")]

use std::sync::Arc;

use half::bf16;
use kernels::{
    clock::now_nanos,
    device::Device,
    dtype::DType,
    error::Result,
    fp8::{Blocks, Scaling, Tiles, padded},
    memory::Memory,
    ops::{e5m6, elementwise, fp8_gemm, fp8_grouped_gemm, gemm, grouped_gemm, permute, quantize, rms_norm, swiglu},
    stream::Stream,
    tensor::Tensor,
};

const ROUNDS: usize = 21;

type Op = Box<dyn Fn(&mut Stream) -> Result<()>>;

fn main() -> Result<()> {
    let memory = Memory::new(Device::Cpu);
    let mut s = Stream::new("bench", &memory, &Arc::default())?;
    println!("threads {}; microseconds, medians of {ROUNDS}", rayon::current_num_threads());
    println!("{:>22} {:>28} {:>9} {:>9} {:>6}", "shape", "op", "bf16", "FP8", "ratio");
    for (t, o, i) in [(512, 256, 256), (512, 1024, 1024), (2048, 256, 704), (2048, 1408, 256), (2048, 1024, 1024)] {
        layer(&mut s, t, o, i)?;
    }
    for (n, e, o, i) in [(8192, 32, 192, 256), (8192, 32, 256, 96), (2048, 32, 192, 256)] {
        experts(&mut s, n, e, o, i)?;
    }
    for (t, i) in [(512, 256), (2048, 256), (2048, 1024)] {
        quantizers(&mut s, t, i)?;
    }
    Ok(())
}

/// Numbers between -1/2 and 1/2.
fn filled(s: &Stream, dims: &[usize]) -> Tensor {
    let number = |j: usize| bf16::from_f32((j * 37 % 101) as f32 / 101.0 - 0.5);
    s.memory().from_slice(dims, &(0..dims.iter().product()).map(number).collect::<Vec<_>>())
}

fn zeros(s: &Stream, dtype: DType, dims: &[usize]) -> Tensor {
    s.memory().alloc(dtype, dims)
}

/// Prints a line for each op, its bf16 first.
fn print(s: &mut Stream, shape: &str, ops: Vec<(&str, Op, Op)>) -> Result<()> {
    let mut nanos = vec![[Vec::new(), Vec::new()]; ops.len()];
    for _ in 0..ROUNDS {
        for ((_, wide, narrow), nanos) in ops.iter().zip(&mut nanos) {
            for (op, nanos) in [wide, narrow].into_iter().zip(nanos) {
                let start = now_nanos();
                op(s)?;
                s.synchronize()?;
                nanos.push(now_nanos() - start);
            }
        }
    }
    for ((name, ..), nanos) in ops.iter().zip(nanos) {
        let [wide, narrow] = nanos.map(|mut nanos| {
            nanos.sort_unstable();
            nanos[ROUNDS / 2] as f64 / 1e3
        });
        println!("{shape:>22} {name:>28} {wide:>9.0} {narrow:>9.0} {:>6.2}", narrow / wide);
    }
    Ok(())
}

fn layer(s: &mut Stream, t: usize, o: usize, i: usize) -> Result<()> {
    let m = s.memory().clone();
    let (x, w, dy) = (filled(s, &[t, i]), filled(s, &[o, i]), filled(s, &[t, o]));
    let (y, dx) = (zeros(s, DType::Bf16, &[t, o]), zeros(s, DType::Bf16, &[t, i]));
    let (dw, dw32) = (zeros(s, DType::Bf16, &[o, i]), zeros(s, DType::F32, &[o, i]));
    let (xq, dyq) = (Tiles::alloc(&m, t, i), Tiles::alloc(&m, t, o));
    let (xt, dyt) = (Tiles::alloc(&m, i, t), Tiles::alloc(&m, o, t));
    let (wq, wt) = (Blocks::alloc(&m, &[o, i]), Blocks::alloc(&m, &[i, o]));
    quantize::tiles(s, x, xq, Scaling::Real)?;
    quantize::tiles(s, dy, dyq, Scaling::Real)?;
    quantize::columns(s, x, None, xt, Scaling::Real)?;
    quantize::columns(s, dy, None, dyt, Scaling::Real)?;
    quantize::blocks(s, w, wq, Some(wt), Scaling::Real)?;
    let ops: Vec<(&str, Op, Op)> = vec![
        (
            "F",
            Box::new(move |s| gemm::forward(s, x, w, None, y)),
            Box::new(move |s| fp8_gemm::product(s, xq, wq, None, y)),
        ),
        (
            "I",
            Box::new(move |s| gemm::input_grad(s, dy, w, dx, false)),
            Box::new(move |s| fp8_gemm::product(s, dyq, wt, None, dx)),
        ),
        (
            "W",
            Box::new(move |s| gemm::weight_grad(s, dy, x, dw, None)),
            Box::new(move |s| fp8_gemm::weight_grad(s, dyt, xt, dw32)),
        ),
    ];
    print(s, &format!("{t} {o} {i}"), ops)
}

fn experts(s: &mut Stream, n: usize, e: usize, o: usize, i: usize) -> Result<()> {
    let m = s.memory().clone();
    // Shares between a half and one and a half of the mean.
    let edge = |g: usize| (n * g / e + if g % 2 == 1 { n / e / 2 } else { 0 }) as u32;
    let edges: Vec<u32> = (0..=e).map(edge).collect();
    let offsets = m.from_slice(&[e + 1], &edges);
    let (x, w, dy) = (filled(s, &[n, i]), filled(s, &[e, o, i]), filled(s, &[n, o]));
    let (y, dx) = (zeros(s, DType::Bf16, &[n, o]), zeros(s, DType::Bf16, &[n, i]));
    let (dw, dw32) = (zeros(s, DType::Bf16, &[e, o, i]), zeros(s, DType::F32, &[e, o, i]));
    let (xq, dyq, p) = (Tiles::alloc(&m, n, i), Tiles::alloc(&m, n, o), padded(n, e));
    let (xt, dyt) = (Tiles::alloc(&m, i, p), Tiles::alloc(&m, o, p));
    let (wq, wt) = (Blocks::alloc(&m, &[e, o, i]), Blocks::alloc(&m, &[e, i, o]));
    quantize::tiles(s, x, xq, Scaling::Real)?;
    quantize::tiles(s, dy, dyq, Scaling::Real)?;
    quantize::columns(s, x, Some(offsets), xt, Scaling::Real)?;
    quantize::columns(s, dy, Some(offsets), dyt, Scaling::Real)?;
    quantize::blocks(s, w, wq, Some(wt), Scaling::Real)?;
    let ops: Vec<(&str, Op, Op)> = vec![
        (
            "experts F",
            Box::new(move |s| grouped_gemm::forward(s, x, offsets, w, y)),
            Box::new(move |s| fp8_grouped_gemm::product(s, xq, offsets, wq, y)),
        ),
        (
            "experts I",
            Box::new(move |s| grouped_gemm::input_grad(s, dy, offsets, w, dx)),
            Box::new(move |s| fp8_grouped_gemm::product(s, dyq, offsets, wt, dx)),
        ),
        (
            "experts W",
            Box::new(move |s| grouped_gemm::weight_grad(s, dy, x, offsets, dw)),
            Box::new(move |s| fp8_grouped_gemm::weight_grad(s, dyt, xt, offsets, dw32)),
        ),
    ];
    print(s, &format!("{n} {e} {o} {i}"), ops)
}

/// Beside what they replace: a copy, or the op that does not quantize.
fn quantizers(s: &mut Stream, t: usize, i: usize) -> Result<()> {
    let m = s.memory().clone();
    let (x, copy, w) = (filled(s, &[t, i]), zeros(s, DType::Bf16, &[t, i]), filled(s, &[i]));
    let (h, rstd) = (filled(s, &[t, 2 * i]), zeros(s, DType::Bf16, &[t]));
    let (q, qt) = (Tiles::alloc(&m, t, i), Tiles::alloc(&m, i, t));
    let (b, bt) = (Blocks::alloc(&m, &[t, i]), Blocks::alloc(&m, &[i, t]));
    let (twelve, scales) = (zeros(s, DType::U8, &[t, e5m6::packed(i)]), zeros(s, DType::U8, &[t, i.div_ceil(128)]));
    let tokens: Vec<u32> = (0..4 * t as u32).map(|row| row / 4).collect();
    let order = permute::Order {
        offsets: m.from_slice(&[2], &[0u32, 4 * t as u32]),
        row_of_slot: m.from_slice(&[4 * t], &(0..4 * t as u32).collect::<Vec<_>>()),
        token_of_row: m.from_slice(&[4 * t], &tokens),
    };
    let (rows, rows_q) = (zeros(s, DType::Bf16, &[4 * t, i]), Tiles::alloc(&m, 4 * t, i));
    let real = Scaling::Real;
    let copied = || -> Op { Box::new(move |s| elementwise::copy(s, x, copy)) };
    let ops: Vec<(&str, Op, Op)> = vec![
        ("copy, tiles", copied(), Box::new(move |s| quantize::tiles(s, x, q, real))),
        ("copy, columns", copied(), Box::new(move |s| quantize::columns(s, x, None, qt, real))),
        ("copy, retile", copied(), Box::new(move |s| quantize::retile(s, q, None, qt, real))),
        ("copy, blocks and transposed", copied(), Box::new(move |s| quantize::blocks(s, x, b, Some(bt), real))),
        ("copy, into E5M6", copied(), Box::new(move |s| e5m6::encode(s, x, twelve, scales))),
        ("copy, from E5M6", copied(), Box::new(move |s| e5m6::decode(s, twelve, scales, copy))),
        (
            "norm, norm into FP8",
            Box::new(move |s| rms_norm::forward(s, x, w, copy, rstd, 1e-6)),
            Box::new(move |s| rms_norm::forward_tiles(s, x, w, q, rstd, 1e-6, real)),
        ),
        (
            "SwiGLU, SwiGLU into FP8",
            Box::new(move |s| swiglu::forward(s, h, copy)),
            Box::new(move |s| swiglu::forward_tiles(s, h, q, real)),
        ),
        (
            "permute, permute into FP8",
            Box::new(move |s| permute::permute(s, x, order, rows)),
            Box::new(move |s| permute::permute_tiles(s, x, order, rows_q, real)),
        ),
    ];
    print(s, &format!("{t} {i}"), ops)
}
