//! Attention on this machine, f32: milliseconds and GFLOP/s of forward and input gradient at training shapes, and microseconds
//! of one generated token over a cache of latents.
#![expect(clippy::print_stdout, clippy::unwrap_used, reason = "a benchmark")]

use std::sync::Arc;

use kernels::{
    clock,
    device::Device,
    dtype::DType,
    memory::Memory,
    ops::{
        attention::{self, Grads, Inputs},
        mla::latent,
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
}

fn generate() {
    for ([h, n, r, v, c], at) in
        [([4, 32, 16, 32, 64], 512), ([16, 128, 64, 128, 512], 512), ([16, 128, 64, 128, 512], 4096)]
    {
        let m = Memory::new(Device::Cpu);
        let mut s = Stream::new("bench", &m, &Arc::default()).unwrap();
        let (q, o) = (m.alloc(DType::F32, &[1, h, n + r]), m.alloc(DType::F32, &[1, h, v]));
        let (w, cache) = (m.alloc(DType::F32, &[h * (n + v), c]), m.alloc(DType::F32, &[at + 1, c + r]));
        let all = Sequences::one(at + 1, 1, at);
        let ms = best_ms(&mut s, 50, |s| latent::forward(s, q, w, cache, &all, 0.1, o).unwrap());
        let cost = latent::cost(1, at, [h, n, r, v, c], 4, 4);
        println!(
            "1 token over {at}, h {h}, n {n}, r {r}, v {v}, c {c}: {:.0} us, {:.0} GFLOP/s, {:.0} GB/s",
            ms * 1e3,
            cost.flops() as f64 / ms / 1e6,
            cost.read_bytes as f64 / ms / 1e6
        );
    }
}
