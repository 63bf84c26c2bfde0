//! Attention against the CPU ops: widths, documents, groups and caches.

#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::{
    dtype::DType,
    ops::{
        attention::{self as cpu, cached::KvCache},
        paged::{Sequence, Sequences},
        testing::stream,
    },
    ptx::case::{Case, Data, values},
};

const DTYPES: [DType; 2] = [DType::F32, DType::Bf16];

/// Heads, kv heads, widths of q and v, and the documents' first tokens padded with the last.
struct Shape {
    h: usize,
    g: usize,
    d: usize,
    v: usize,
    offsets: &'static [u32],
}

/// One token, lonely documents, ends beside tile edges, groups that straddle tiles, widths that no vector divides, DeepSeek-V3's.
const SHAPES: [Shape; 7] = [
    Shape { h: 1, g: 1, d: 2, v: 3, offsets: &[0, 1] },
    Shape { h: 2, g: 2, d: 5, v: 3, offsets: &[0, 1, 2, 9, 9, 9] },
    Shape { h: 2, g: 1, d: 8, v: 16, offsets: &[0, 31, 64, 65, 97] },
    Shape { h: 6, g: 2, d: 24, v: 8, offsets: &[0, 30, 30, 31, 43] },
    Shape { h: 1, g: 1, d: 17, v: 72, offsets: &[0, 20, 21, 22, 70] },
    Shape { h: 1, g: 1, d: 192, v: 128, offsets: &[0, 37, 40] },
    Shape { h: 3, g: 1, d: 64, v: 64, offsets: &[0, 23] },
];

impl Shape {
    fn t(&self) -> usize {
        self.offsets[self.offsets.len() - 1] as usize
    }

    /// Extents of q, k, v and o.
    fn dims(&self) -> [[usize; 3]; 4] {
        let (t, Shape { h, g, d, v, .. }) = (self.t(), self);
        [[t, *h, *d], [t, *g, *d], [t, *g, *v], [t, *h, *v]]
    }

    /// The types to try: the widest heads take a while to interpret.
    fn dtypes(&self) -> &'static [DType] {
        if self.d > 100 { &[DType::Bf16] } else { &DTYPES }
    }

    /// q, k, v, offsets.
    fn inputs(&self, dtype: DType) -> Vec<Data> {
        let [q, k, v, _] = self.dims();
        let x = |dims: &[usize], seed| Data::random(dtype, dims, seed).map(|x| 2.0 * x);
        vec![x(&q, 1), x(&k, 2), x(&v, 3), Data::u32(&[self.offsets.len()], self.offsets)]
    }
}

/// Scores of a few units, as trained heads have.
fn inputs(x: &[Tensor]) -> Inputs {
    Inputs { q: x[0], k: x[1], v: x[2], doc_offsets: x[3], scale: scale(x[0]) }
}

fn scale(q: Tensor) -> f64 {
    1.5 / (q.cols() as f64).sqrt()
}

#[test]
fn outputs_are_the_cpus() {
    for shape in &SHAPES {
        for &dtype in shape.dtypes() {
            let [_, _, _, o] = shape.dims();
            let mut data = shape.inputs(dtype);
            data.extend([Data::poison(dtype, &o), Data::poison(DType::F32, &o[..2])]);
            // Sums in another order, and 2^x within 2 ulp of scores of a few units.
            Case::new(&data)
                .cpu(|s, x| cpu::forward(s, inputs(x), x[4], x[5]))
                .ptx(|x| forward(inputs(x), x[4], x[5]))
                .close(5e-6);
        }
    }
}

#[test]
fn gradients_are_the_cpus() {
    for shape in &SHAPES {
        for &dtype in shape.dtypes() {
            let [q, k, v, o] = shape.dims();
            let mut data = shape.inputs(dtype);
            data.extend([Data::poison(dtype, &o), Data::poison(DType::F32, &o[..2])]);
            let mut s = stream();
            let m = s.memory().clone();
            let x: Vec<Tensor> = data.iter().map(|x| x.upload(&m)).collect();
            cpu::forward(&mut s, inputs(&x), x[4], x[5]).unwrap();
            s.synchronize().unwrap();
            (data[4].2, data[5].2) = (values(&m, x[4]), values(&m, x[5]));
            data.push(Data::random(dtype, &o, 4));
            data.extend([q, k, v].map(|dims| Data::poison(dtype, &dims)));
            let grads = |x: &[Tensor]| Grads { dq: x[7], dk: x[8], dv: x[9] };
            Case::new(&data)
                .cpu(|s, x| cpu::input_grad(s, inputs(x), x[4], x[5], x[6], grads(x)))
                .ptx(|x| input_grad(inputs(x), x[4], x[5], x[6], grads(x)))
                .close(2e-5);
        }
    }
}

#[test]
fn each_barrier_of_a_block_is_needed() {
    let shape = &SHAPES[2];
    let [q, k, v, o] = shape.dims();
    let mut data = shape.inputs(DType::F32);
    data.extend([Data::poison(DType::F32, &o), Data::poison(DType::F32, &o[..2])]);
    Case::new(&data).mutants("bar.sync", |x| forward(inputs(x), x[4], x[5]));
    // Any o and lse do.
    data[4] = Data::random(DType::F32, &o, 5);
    data[5] = Data::random(DType::F32, &o[..2], 6);
    data.push(Data::random(DType::F32, &o, 4));
    data.extend([q, k, v].map(|dims| Data::poison(DType::F32, &dims)));
    let grads = |x: &[Tensor]| Grads { dq: x[7], dk: x[8], dv: x[9] };
    Case::new(&data).mutants("bar.sync", |x| input_grad(inputs(x), x[4], x[5], x[6], grads(x)));
}

#[test]
fn caches_are_filled_as_the_cpus() {
    for dtype in DTYPES {
        for (n, at) in [(3, 4), (1, 0), (0, 2)] {
            let inputs = [
                Data::random(dtype, &[n, 2, 5], 1),
                Data::random(dtype, &[n, 2, 8], 2),
                Data::random(dtype, &[9, 2, 5], 3),
                Data::random(dtype, &[9, 2, 8], 4),
            ];
            let cache = |x: &[Tensor]| KvCache { k: x[2], v: x[3] };
            let all = Sequences::one(9, n, at);
            Case::new(&inputs)
                .cpu(|s, x| cpu::cached::append(s, x[0], x[1], cache(x), &all))
                .ptx(|x| {
                    [(0, 2), (1, 3)].into_iter().flat_map(|(new, old)| cached::append(x[new], x[old], &all)).collect()
                })
                .equal();
        }
    }
}

#[test]
fn cached_outputs_are_the_cpus() {
    // Heads, kv heads, widths of q and v, new tokens, cached ones: one part, several, a chunk of a prompt, groups beyond a tile.
    for (h, g, d, v, n, at) in [
        (2, 2, 8, 8, 1, 0),
        (4, 2, 16, 24, 1, 299),
        (2, 1, 5, 3, 3, 270),
        (2, 1, 16, 16, 40, 13),
        (40, 1, 8, 8, 1, 40),
        (1, 1, 8, 8, 70, 200),
    ] {
        for dtype in DTYPES {
            let capacity = at + n + 3;
            // What lies past the valid rows must not matter.
            let cache = |width: usize, seed| {
                let mut cache = Data::random(dtype, &[capacity, g, width], seed).map(|x| 2.0 * x);
                cache.2[(at + n) * g * width..].fill(f64::NAN);
                cache
            };
            let data = [Data::random(dtype, &[n, h, d], 1), cache(d, 2), cache(v, 3), Data::poison(dtype, &[n, h, v])];
            let cache = |x: &[Tensor]| KvCache { k: x[1], v: x[2] };
            let all = Sequences::one(capacity, n, at);
            Case::new(&data)
                .cpu(|s, x| cpu::cached::forward(s, x[0], cache(x), &all, scale(x[0]), x[3]))
                .ptx(|x| cached::forward(x[0], cache(x), &all, scale(x[0]), x[3]))
                .close(5e-6);
        }
    }
}

#[test]
fn sequences_on_scattered_pages_are_the_cpus() {
    let sequences = || {
        let of = |num_new, context, pages: &[u32]| Sequence { num_new, context, pages: pages.into() };
        Sequences::new([of(3, 6, &[5, 0, 7]), of(1, 0, &[3]), of(2, 5, &[1, 2])], 4)
    };
    for (dtype, (h, g, d, v)) in DTYPES.into_iter().zip([(4, 2, 8, 16), (2, 2, 5, 3)]) {
        let cache = |width: usize, seed| Data::random(dtype, &[32, g, width], seed);
        let new = |width: usize, seed| Data::random(dtype, &[6, g, width], seed);
        let inputs = [new(d, 1), new(v, 2), cache(d, 3), cache(v, 4)];
        Case::new(&inputs)
            .cpu(|s, x| cpu::cached::append(s, x[0], x[1], KvCache { k: x[2], v: x[3] }, &sequences()))
            .ptx(|x| [(0, 2), (1, 3)].iter().flat_map(|&(a, b)| cached::append(x[a], x[b], &sequences())).collect())
            .equal();
        let inputs = [Data::random(dtype, &[6, h, d], 1), cache(d, 3), cache(v, 4), Data::poison(dtype, &[6, h, v])];
        let caches = |x: &[Tensor]| KvCache { k: x[1], v: x[2] };
        Case::new(&inputs)
            .cpu(|s, x| cpu::cached::forward(s, x[0], caches(x), &sequences(), scale(x[0]), x[3]))
            .ptx(|x| cached::forward(x[0], caches(x), &sequences(), scale(x[0]), x[3]))
            .close(5e-6);
    }
}
