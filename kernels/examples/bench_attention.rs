//! Attention on this machine, f32: milliseconds and GFLOP/s of forward and input gradient at training shapes, microseconds of one
//! generated token over a cache of latents, in f32 and in FP8, and milliseconds of a prompt both ways.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark")]

use std::sync::Arc;

use kernels::{
    clock,
    device::Device,
    dtype::DType,
    memory::Memory,
    ops::{
        attention::{self, Grads, Inputs},
        mla::{
            expanded,
            fp8_row::Fp8Row,
            latent::{self, Prefill},
        },
        paged::Sequences,
    },
    stream::Stream,
};

/// Best of `n` runs, in milliseconds.
fn best_ms(s: &mut Stream, n: usize, mut run: impl FnMut(&mut Stream)) -> f64 {
    (0..n)
        .map(|_| {
            let start = clock::now_nanos();
            run(s);
            s.synchronize().unwrap();
            (clock::now_nanos() - start) as f64 / 1e6
        })
        .fold(f64::INFINITY, f64::min)
}

fn main() {
    for (docs, len, [h, g, d, v]) in
        [(8, 256, [4, 4, 48, 32]), (1, 4096, [4, 4, 48, 32]), (8, 256, [8, 2, 64, 64]), (1, 2048, [4, 4, 192, 128])]
    {
        let t = docs * len;
        let m = Memory::new(Device::Cpu);
        let mut s = Stream::new("bench", &m, &Arc::default()).unwrap();
        let fill = |dims: &[usize]| {
            let n: usize = dims.iter().product();
            m.from_slice(dims, &(0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect::<Vec<_>>())
        };
        let offsets: Vec<u32> = (0..=docs).map(|i| (i * len) as u32).collect();
        let doc_offsets = m.from_slice(&[docs + 1], &offsets);
        let scale = 1.0 / (d as f64).sqrt();
        let x = Inputs { q: fill(&[t, h, d]), k: fill(&[t, g, d]), v: fill(&[t, g, v]), doc_offsets, scale };
        let (o, lse, d_o) = (fill(&[t, h, v]), m.alloc(DType::F32, &[t, h]), fill(&[t, h, v]));
        let grads = Grads { dq: fill(&[t, h, d]), dk: fill(&[t, g, d]), dv: fill(&[t, g, v]) };
        let pairs = docs as u64 * attention::causal_pairs(len as u64);
        let forward = best_ms(&mut s, 30, |s| attention::forward(s, x, o, lse).unwrap());
        let backward = best_ms(&mut s, 30, |s| attention::input_grad(s, x, o, lse, d_o, grads).unwrap());
        let gflops = |flops: u64, ms: f64| flops as f64 / ms / 1e6;
        println!(
            "{docs} x {len} tokens, h {h}, g {g}, d {d}, v {v}: forward {forward:.2} ms, {:.0} GFLOP/s; \
             input gradient {backward:.2} ms, {:.0} GFLOP/s",
            gflops(attention::cost(t, pairs, [h, g, d, v], 4).flops(), forward),
            gflops(attention::input_grad_cost(t, pairs, [h, g, d, v], 4).flops(), backward),
        );
    }
    generate();
    prefill();
}

fn generate() {
    for ([h, n, r, v, c], at) in
        [([4, 32, 16, 32, 64], 512), ([16, 128, 64, 128, 512], 512), ([16, 128, 64, 128, 512], 4096)]
    {
        let m = Memory::new(Device::Cpu);
        let mut s = Stream::new("bench", &m, &Arc::default()).unwrap();
        let (q, o) = (m.alloc(DType::F32, &[1, h, n + r]), m.alloc(DType::F32, &[1, h, v]));
        let w = m.alloc(DType::F32, &[h * (n + v), c]);
        let rows = m.alloc(DType::F32, &[at + 1, c + r]);
        let fp8 = m.alloc(DType::U8, &[at + 1, Fp8Row { c, r }.bytes()]);
        let all = Sequences::one(at + 1, 1, at);
        let way = (0.1, Prefill::Absorbed);
        let [ms, fp8_ms] =
            [rows, fp8].map(|cache| best_ms(&mut s, 50, |s| latent::forward(s, q, w, cache, &all, way, o).unwrap()));
        let cost = latent::cost(1, at, [h, n, r, v, c], 4, 4);
        println!(
            "1 token over {at}, h {h}, n {n}, r {r}, v {v}, c {c}: {:.0} us, {:.0} GFLOP/s, {:.0} GB/s; FP8 cache {:.0} us",
            ms * 1e3,
            cost.flops() as f64 / ms / 1e6,
            cost.read_bytes as f64 / ms / 1e6,
            fp8_ms * 1e3,
        );
    }
}

fn prefill() {
    let (quickstart, deepseek) = ([4, 32, 16, 32, 64], [16, 128, 64, 128, 512]);
    for (sizes, new, at) in [
        (quickstart, 1000, 0),
        (quickstart, 64, 936),
        (deepseek, 1000, 0),
        (deepseek, 512, 488),
        (deepseek, 192, 808),
        (deepseek, 128, 872),
    ] {
        let [h, n, r, v, c] = sizes;
        let m = Memory::new(Device::Cpu);
        let mut s = Stream::new("bench", &m, &Arc::default()).unwrap();
        let fill = |dims: &[usize]| {
            let n: usize = dims.iter().product();
            m.from_slice(dims, &(0..n).map(|i| ((i * 37 % 101) as f32 - 50.0) / 50.0).collect::<Vec<_>>())
        };
        let (q, o) = (fill(&[new, h, n + r]), m.alloc(DType::F32, &[new, h, v]));
        let (w, cache) = (fill(&[h * (n + v), c]), fill(&[at + new, c + r]));
        let all = Sequences::one(at + new, new, at);
        let [absorbed, by_cost] = [Prefill::Absorbed, Prefill::ByCost]
            .map(|prefill| best_ms(&mut s, 5, |s| latent::forward(s, q, w, cache, &all, (0.01, prefill), o).unwrap()));
        let [madds, fewer] = expanded::multiply_adds(new, at, sizes);
        println!(
            "{new} tokens after {at}, h {h}, n {n}, r {r}, v {v}, c {c}: absorbed {absorbed:.1} ms, by cost {by_cost:.1} ms ({:.1} times \
             as fast; multiply-adds {:.2} to 1)",
            absorbed / by_cost,
            madds as f64 / fewer as f64,
        );
    }
}
