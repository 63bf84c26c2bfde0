//! Latent attention: assembled against absorbed, and the gradient of assembling.
#![expect(clippy::unwrap_used, reason = "tests")]
use half::bf16;

use super::{fp8_row::Fp8Row, latent::Prefill, *};
use crate::{
    dtype::DType,
    memory::Memory,
    ops::{
        attention::{self, Inputs},
        gemm,
        paged::{Sequence, Sequences},
        rope::{self, Pairs, Rope},
        testing::*,
    },
};

const ROPE: Rope = Rope { theta: 1e3, dim: 4, yarn: None };

#[test]
fn gradients_match_finite_differences() {
    let (t, h, n, r, v, c) = (3, 2, 3, 4, 2, 5);
    let (k_dims, v_dims) = ([t, h, n + r], [t, h, v]);
    for pairs in [Pairs::Interleaved, Pairs::HalfSplit] {
        for (role, out_dims) in [("k", k_dims), ("v", v_dims)] {
            let run = |s: &mut Stream, x: &[Tensor]| {
                let m = s.memory().clone();
                let (k, v) = (m.alloc(DType::F64, &k_dims), m.alloc(DType::F64, &v_dims));
                let table = ROPE.table(&m, DType::F64, 20, pairs);
                let at = m.from_slice(&[t], &[4u32, 0, 19]);
                assemble(s, Projections { kv_a: x[0], kv_b: x[1] }, at, &table, k, v)?;
                Ok(if role == "k" { k } else { v })
            };
            check_gradients(&[(&[t, c + r], 1), (&[t, h, n + v], 2)], &out_dims, run, |s, _, dy, dx| {
                let m = s.memory().clone();
                let (mut dk, mut dv) = (m.alloc(DType::F64, &k_dims), m.alloc(DType::F64, &v_dims));
                for d in [dk, dv] {
                    crate::ops::elementwise::zero(s, d);
                }
                *(if role == "k" { &mut dk } else { &mut dv }) = dy;
                let table = ROPE.table(&m, DType::F64, 20, pairs);
                let at = m.from_slice(&[t], &[4u32, 0, 19]);
                assemble_grad(s, dk, dv, at, &table, Projections { kv_a: dx[0], kv_b: dx[1] })
            });
        }
    }
}

#[test]
fn the_latent_columns_of_the_gradient_are_left_alone() {
    let mut s = stream();
    let m = s.memory().clone();
    let table = ROPE.table(&m, DType::F32, 8, Pairs::Interleaved);
    let (dk, dv) = (m.from_slice(&[1, 1, 4], &[1f32; 4]), m.from_slice(&[1, 1, 1], &[3f32]));
    let (kv_a, kv_b) = (m.from_slice(&[1, 6], &[9f32; 6]), m.alloc(DType::F32, &[1, 1]));
    let at = m.from_slice(&[1], &[0u32]);
    assemble_grad(&mut s, dk, dv, at, &table, Projections { kv_a, kv_b }).unwrap();
    s.synchronize().unwrap();
    assert_eq!(m.download::<f32>(kv_a), [9.0, 9.0, 1.0, 1.0, 1.0, 1.0]);
    assert_eq!(m.download::<f32>(kv_b), [3.0]);
}

/// A layer between its linears, with random weights: h heads, widths n, r, v, latent c, t tokens.
struct Layer {
    h: usize,
    n: usize,
    v: usize,
    c: usize,
    t: usize,
}

const R: usize = 4;
const SCALE: f64 = 0.8;

impl Layer {
    /// q [t, h, n + r], latent [t, c], kv_a [t, c + r], w_kv_b [h (n + v), c].
    fn data<T: Float>(&self) -> [Vec<T>; 4] {
        let Layer { h, n, v, c, t } = *self;
        let cast = |x: Vec<f64>| x.into_iter().map(T::of_f64).collect();
        [
            cast(random(t * h * (n + R), 1)),
            cast(random(t * c, 2)),
            cast(random(t * (c + R), 3)),
            cast(random(h * (n + v) * c, 4)),
        ]
    }

    /// Keys and values written out, and the attention of training.
    fn naive(&self) -> Vec<f64> {
        let Layer { h, n, v, c, t } = *self;
        let mut s = stream();
        let m = s.memory().clone();
        let [q, latent, kv_a, w] = self.data::<f64>();
        let q = m.from_slice(&[t, h, n + R], &q);
        let kv_b = m.alloc(DType::F64, &[t, h * (n + v)]);
        gemm::forward(&mut s, m.from_slice(&[t, c], &latent), m.from_slice(&[h * (n + v), c], &w), None, kv_b).unwrap();
        let table = ROPE.table(&m, DType::F64, t, Pairs::Interleaved);
        let at = m.from_slice(&[t], &(0..t as u32).collect::<Vec<_>>());
        rope::forward(&mut s, q, n, at, &table).unwrap();
        let (k, values) = (m.alloc(DType::F64, &[t, h, n + R]), m.alloc(DType::F64, &[t, h, v]));
        let x = Projections { kv_a: m.from_slice(&[t, c + R], &kv_a), kv_b };
        assemble(&mut s, x, at, &table, k, values).unwrap();
        let (o, lse) = (m.alloc(DType::F64, &[t, h, v]), m.alloc(DType::F64, &[t, h]));
        let doc_offsets = m.from_slice(&[2], &[0u32, t as u32]);
        attention::forward(&mut s, Inputs { q, k, v: values, doc_offsets, scale: SCALE }, o, lse).unwrap();
        s.synchronize().unwrap();
        m.download(o)
    }

    /// The cache of latents, filled in `chunks`.
    fn absorbed<T: Float, W: Float>(&self, chunks: &[usize]) -> Vec<f64> {
        let Layer { h, n, v, c, t } = *self;
        let mut s = stream();
        let m = s.memory().clone();
        let [q, latent, kv_a, _] = self.data::<T>();
        let w = m.from_slice(&[h * (n + v), c], &self.data::<W>()[3]);
        let table = ROPE.table(&m, T::DTYPE, t, Pairs::Interleaved);
        let cache = m.from_slice(&[t + 2, c + R], &vec![T::of_f64(f64::NAN); (t + 2) * (c + R)]);
        let (mut at, mut out) = (0, Vec::new());
        for &len in chunks {
            let all = Sequences::one(t + 2, len, at);
            let part = |x: &[T], dims: &[usize]| {
                let row: usize = dims.iter().product();
                let dims: Vec<usize> = std::iter::once(len).chain(dims.iter().copied()).collect();
                m.from_slice(&dims, &x[at * row..(at + len) * row])
            };
            let positions = m.from_slice(&[len], &(at as u32..(at + len) as u32).collect::<Vec<_>>());
            let q = part(&q, &[h, n + R]);
            rope::forward(&mut s, q, n, positions, &table).unwrap();
            latent::append(&mut s, part(&latent, &[c]), part(&kv_a, &[c + R]), &table, cache, &all).unwrap();
            let o = m.alloc(T::DTYPE, &[len, h, v]);
            latent::forward(&mut s, q, w, cache, &all, (SCALE, Prefill::Absorbed), o).unwrap();
            s.synchronize().unwrap();
            out.extend(m.download::<T>(o).iter().map(|x| x.as_f64()));
            at += len;
        }
        out
    }
}

const LAYERS: [Layer; 3] = [
    Layer { h: 3, n: 5, v: 6, c: 9, t: 21 },
    Layer { h: 4, n: 32, v: 32, c: 64, t: 150 },
    Layer { h: 40, n: 4, v: 3, c: 16, t: 19 },
];

#[test]
fn attention_in_latent_space_is_attention() {
    for layer in &LAYERS {
        let (want, t) = (layer.naive(), layer.t);
        for chunks in [vec![t], vec![1; t], vec![t / 2, 1, 3, t - t / 2 - 4]] {
            assert_close(&layer.absorbed::<f64, f64>(&chunks), &want, 1e-12);
        }
    }
}

#[test]
fn lower_precisions_follow() {
    for layer in &LAYERS {
        let want = layer.naive();
        let chunks = [layer.t - 2, 1, 1];
        assert_close(&layer.absorbed::<f32, f32>(&chunks), &want, 1e-4);
        let mixed = layer.absorbed::<f32, bf16>(&chunks);
        let all_bf16 = layer.absorbed::<bf16, bf16>(&chunks);
        for (got, tolerance) in [(mixed, 0.05), (all_bf16, 0.1)] {
            let error: f64 = got.iter().zip(&want).map(|(g, w)| (g - w).powi(2)).sum();
            let norm: f64 = want.iter().map(|w| w * w).sum();
            assert!((error / norm).sqrt() < tolerance, "relative error {}", (error / norm).sqrt());
        }
    }
}

#[test]
fn wrong_calls_say_what_is_wrong() {
    let mut s = stream();
    let m = s.memory().clone();
    let f32s = |dims: &[usize]| m.alloc(DType::F32, dims);
    let table = ROPE.table(&m, DType::F32, 8, Pairs::Interleaved);
    let (q, w, o) = (f32s(&[2, 3, 9]), f32s(&[3 * 11, 7]), f32s(&[2, 3, 6]));
    let way = (1.0, Prefill::Absorbed);
    let error =
        latent::forward(&mut s, q, w, f32s(&[8, 11]), &Sequences::one(8, 2, 7), way, o).unwrap_err().to_string();
    assert!(error.contains("at least 9 rows to hold 2 more after 7"), "{error}");
    let error =
        latent::forward(&mut s, q, w, f32s(&[8, 12]), &Sequences::one(8, 2, 0), way, o).unwrap_err().to_string();
    assert!(error.contains("`q` should be [2, 3, 10]"), "{error}");
    let bytes = m.alloc(DType::U8, &[8, 27]);
    let error = latent::forward(&mut s, q, w, bytes, &Sequences::one(8, 2, 0), way, o).unwrap_err().to_string();
    assert!(error.contains("`cache` should be [8, 20]"), "{error}");
    let at = m.from_slice(&[2], &[0u32, 1]);
    let x = Projections { kv_a: f32s(&[2, 11]), kv_b: f32s(&[2, 3, 10]) };
    let error = assemble(&mut s, x, at, &table, q, o).unwrap_err().to_string();
    assert!(error.contains("`kv_b` should be [2, 3, 11]"), "{error}");
}

/// What three sequences of 5, 9 and 2 tokens give, fed in `steps`: of each step, how many tokens of which.
fn in_company(fp8: bool, steps: &[&[(usize, usize)]], pages: [&[u32]; 3]) -> Vec<Vec<u32>> {
    let (h, n, v, c) = (3, 8, 8, 16);
    let mut s = stream();
    let m = s.memory().clone();
    let lens = [5, 9, 2];
    let data =
        |seed, width: usize| lens.map(|t| random(t * width, seed + t as u64).iter().map(|&x| x as f32).collect());
    let [q, latent, kv_a]: [[Vec<f32>; 3]; 3] = [data(1, h * (n + R)), data(20, c), data(40, c + R)];
    let w: Vec<f32> = random(h * (n + v) * c, 9).iter().map(|&x| x as f32).collect();
    let w = m.from_slice(&[h * (n + v), c], &w);
    let table = ROPE.table(&m, DType::F32, 16, Pairs::Interleaved);
    let cache = match fp8 {
        true => m.from_slice(&[32, Fp8Row { c, r: R }.bytes()], &vec![0xffu8; 32 * Fp8Row { c, r: R }.bytes()]),
        false => m.from_slice(&[32, c + R], &vec![f32::NAN; 32 * (c + R)]),
    };
    let (mut done, mut out) = ([0; 3], vec![Vec::new(); 3]);
    for step in steps {
        let rows = |x: &[Vec<f32>; 3], width: usize| -> Vec<f32> {
            let part = |&(i, num): &(usize, usize)| x[i][done[i] * width..(done[i] + num) * width].to_vec();
            step.iter().flat_map(part).collect()
        };
        let t: usize = step.iter().map(|(_, num)| num).sum();
        let of = |&(i, num_new): &(usize, usize)| Sequence { num_new, context: done[i], pages: pages[i].into() };
        let all = Sequences::new(step.iter().map(of).collect::<Vec<_>>(), 4);
        let (q, o) = (m.from_slice(&[t, h, n + R], &rows(&q, h * (n + R))), m.alloc(DType::F32, &[t, h, v]));
        let (latent, kv_a) = (m.from_slice(&[t, c], &rows(&latent, c)), m.from_slice(&[t, c + R], &rows(&kv_a, c + R)));
        latent::append(&mut s, latent, kv_a, &table, cache, &all).unwrap();
        latent::forward(&mut s, q, w, cache, &all, (SCALE, Prefill::Absorbed), o).unwrap();
        s.synchronize().unwrap();
        let o = m.download::<f32>(o);
        let mut at = 0;
        for &(i, num) in *step {
            out[i].extend(o[at..at + num * h * v].iter().map(|x| x.to_bits()));
            (at, done[i]) = (at + num * h * v, done[i] + num);
        }
    }
    out
}

#[test]
fn a_sequence_has_its_bits_in_any_company_and_on_any_pages() {
    for fp8 in [false, true] {
        let alone = in_company(fp8, &[&[(0, 5)], &[(1, 9)], &[(2, 2)]], [&[0, 1], &[2, 3, 4], &[5]]);
        let together = &[&[(0, 5), (1, 9), (2, 2)][..]][..];
        for steps in [together, &[&[(1, 3), (0, 1)], &[(2, 1)], &[(0, 4), (2, 1), (1, 5)], &[(1, 1)]]] {
            assert_eq!(in_company(fp8, steps, [&[7, 2], &[3, 0, 5], &[1]]), alone);
        }
    }
}

/// Three sequences on scattered pages: one long, one of a single new token, one from its start.
fn three() -> Sequences {
    let of = |num_new, context, pages: &[u32]| Sequence { num_new, context, pages: pages.into() };
    Sequences::new([of(70, 9, &[3, 0, 6, 1, 9]), of(1, 20, &[8, 2]), of(66, 0, &[4, 5, 7, 10, 11])], 16)
}

/// Queries of [`three`], a weight, and rows of latents and keys [192, c + r], of the layer's sizes.
fn inputs_of_three<T: Float>(m: &Memory, [h, n, r, v, c]: [usize; 5]) -> [Tensor; 3] {
    let cast = |dims: &[usize], seed| {
        let x = random(dims.iter().product(), seed);
        m.from_slice(dims, &x.into_iter().map(T::of_f64).collect::<Vec<T>>())
    };
    [cast(&[137, h, n + r], 1), cast(&[h * (n + v), c], 2), cast(&[192, c + r], 3)]
}

#[test]
fn a_cache_in_fp8_is_one_of_the_numbers_it_says() {
    for [h, n, r, v, c] in [[3, 5, 4, 6, 130], [4, 32, 16, 32, 64]] {
        let (mut s, layout) = (stream(), Fp8Row { c, r });
        let m = s.memory().clone();
        let [q, w, rows] = inputs_of_three::<f32>(&m, [h, n, r, v, c]);
        let numbers = m.download::<f32>(rows);
        let (mut bytes, mut said) = (vec![0; 192 * layout.bytes()], vec![0f32; 192 * (c + r)]);
        for ((x, bytes), said) in
            numbers.chunks(c + r).zip(bytes.chunks_mut(layout.bytes())).zip(said.chunks_mut(c + r))
        {
            layout.encode(&x[..c], &x[c..], bytes);
            layout.decode(bytes, said);
        }
        let (bytes, said) = (m.from_slice(&[192, layout.bytes()], &bytes), m.from_slice(&[192, c + r], &said));
        let mut forward = |cache, prefill| {
            let o = m.alloc(DType::F32, &[137, h, v]);
            latent::forward(&mut s, q, w, cache, &three(), (0.1, prefill), o).unwrap();
            s.synchronize().unwrap();
            m.download::<f32>(o)
        };
        for prefill in [Prefill::Absorbed, Prefill::ByCost] {
            assert_eq!(forward(bytes, prefill), forward(said, prefill), "{prefill:?}");
        }
        // What 3 bits of mantissa cost.
        let wide = |x: Vec<f32>| x.into_iter().map(f64::from).collect::<Vec<f64>>();
        let [got, want] = [bytes, rows].map(|cache| wide(forward(cache, Prefill::Absorbed)));
        let diff = calc_diff(&got, &want);
        assert!(diff > 1e-6 && diff < 2e-3, "{diff}");
    }
}

#[test]
fn keys_and_values_are_made_where_that_is_cheaper_and_give_the_same() {
    fn both<T: Float>(sizes: [usize; 5]) -> [Vec<f64>; 2] {
        let [h, _, _, v, _] = sizes;
        let mut s = stream();
        let m = s.memory().clone();
        let [q, w, rows] = inputs_of_three::<T>(&m, sizes);
        [Prefill::Absorbed, Prefill::ByCost].map(|prefill| {
            let o = m.from_slice(&[137, h, v], &vec![T::of_f64(f64::NAN); 137 * h * v]);
            latent::forward(&mut s, q, w, rows, &three(), (0.1, prefill), o).unwrap();
            s.synchronize().unwrap();
            m.download::<T>(o).into_iter().map(|x| x.as_f64()).collect()
        })
    }
    for sizes in [[3, 5, 4, 6, 130], [4, 32, 16, 32, 64], [2, 128, 64, 128, 512]] {
        let [absorbed, by_cost] = both::<f64>(sizes);
        assert_close(&by_cost, &absorbed, 1e-12);
        // The sequence of one new token is as it was, and the others went another way.
        let token = sizes[0] * sizes[3];
        assert_eq!(by_cost[70 * token..71 * token], absorbed[70 * token..71 * token]);
        assert!(by_cost[..70 * token] != absorbed[..70 * token] && by_cost[71 * token..] != absorbed[71 * token..]);
        let [absorbed, by_cost] = both::<f32>(sizes);
        assert_close(&by_cost, &absorbed, 1e-4);
        let [absorbed, by_cost] = both::<bf16>(sizes);
        assert!(calc_diff(&by_cost, &absorbed) < 1e-4);
    }
}
