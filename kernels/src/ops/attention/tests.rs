//! Attention against its definition, its gradient and its caches.
#![expect(clippy::unwrap_used, reason = "tests")]
use super::{cached::KvCache, *};
use crate::{
    dtype::DType,
    memory::Memory,
    ops::{paged::Sequences, testing::*},
};

/// Heads, kv heads, widths of q and v, and the documents' first tokens padded with the last.
struct Case {
    h: usize,
    g: usize,
    d: usize,
    v: usize,
    offsets: &'static [u32],
}

impl Case {
    fn t(&self) -> usize {
        self.offsets[self.offsets.len() - 1] as usize
    }

    fn dims(&self) -> [[usize; 3]; 3] {
        [[self.t(), self.h, self.d], [self.t(), self.g, self.d], [self.t(), self.g, self.v]]
    }

    fn data(&self) -> [Vec<f64>; 3] {
        let [q, k, v] = self.dims().map(|d| d.iter().product());
        [random(q, 1), random(k, 2), random(v, 3)]
    }

    fn inputs(&self, m: &Memory, [q, k, v]: [Tensor; 3]) -> Inputs {
        Inputs { q, k, v, doc_offsets: m.from_slice(&[self.offsets.len()], self.offsets), scale: 0.7 }
    }

    fn outputs(&self, m: &Memory, dtype: DType) -> (Tensor, Tensor) {
        (m.alloc(dtype, &[self.t(), self.h, self.v]), m.alloc(acc_dtype(dtype), &[self.t(), self.h]))
    }

    /// o and lse of `data` in type T.
    fn run<T: Float>(&self, data: &[Vec<f64>; 3]) -> (Vec<f64>, Vec<f64>) {
        let mut s = stream();
        let m = s.memory().clone();
        let tensor = |i: usize| {
            let x: Vec<T> = data[i].iter().map(|&x| T::of_f64(x)).collect();
            m.from_slice(&self.dims()[i], &x)
        };
        let x = self.inputs(&m, std::array::from_fn(tensor));
        let (o, lse) = self.outputs(&m, T::DTYPE);
        forward(&mut s, x, o, lse).unwrap();
        s.synchronize().unwrap();
        let wide = |x: f64| x;
        (
            m.download::<T>(o).iter().map(|x| wide(x.as_f64())).collect(),
            m.download::<T::Acc>(lse).iter().map(|x| wide(x.as_f64())).collect(),
        )
    }

    /// The definition.
    fn naive(&self, [q, k, v]: &[Vec<f64>; 3]) -> (Vec<f64>, Vec<f64>) {
        let (mut o, mut lse) = (Vec::new(), Vec::new());
        let mut start = 0;
        for i in 0..self.t() {
            start = self.offsets.iter().map(|&s| s as usize).filter(|&s| s <= i).max().unwrap_or(start);
            for h in 0..self.h {
                let g = h / (self.h / self.g);
                let row = |x: &[f64], t: usize, heads: usize, head: usize, w: usize| -> Vec<f64> {
                    x[(t * heads + head) * w..][..w].to_vec()
                };
                let q = row(q, i, self.h, h, self.d);
                let e: Vec<f64> = (start..=i)
                    .map(|j| row(k, j, self.g, g, self.d).iter().zip(&q).map(|(k, q)| 0.7 * k * q).sum::<f64>().exp())
                    .collect();
                let sum: f64 = e.iter().sum();
                lse.push(sum.ln());
                for c in 0..self.v {
                    o.push((start..=i).zip(&e).map(|(j, e)| e * v[(j * self.g + g) * self.v + c]).sum::<f64>() / sum);
                }
            }
        }
        (o, lse)
    }
}

/// One token, lonely documents, ends beside block edges, several key blocks, groups of heads that straddle query blocks.
const CASES: [Case; 6] = [
    Case { h: 1, g: 1, d: 2, v: 3, offsets: &[0, 1] },
    Case { h: 2, g: 2, d: 5, v: 3, offsets: &[0, 1, 2, 9, 9, 9] },
    Case { h: 4, g: 2, d: 6, v: 4, offsets: &[0, 63, 127, 192, 257, 257] },
    Case { h: 3, g: 1, d: 17, v: 16, offsets: &[0, 300, 301] },
    Case { h: 5, g: 1, d: 4, v: 18, offsets: &[0, 130] },
    Case { h: 2, g: 1, d: 8, v: 8, offsets: &[0, 700] },
];

#[test]
fn every_shape_matches_the_definition() {
    for case in &CASES {
        let data = case.data();
        let (o, lse) = case.run::<f64>(&data);
        let want = case.naive(&data);
        assert_close(&o, &want.0, 1e-13);
        assert_close(&lse, &want.1, 1e-13);
        assert_close(&case.run::<f32>(&data).0, &want.0, 2e-6);
        assert_close(&case.run::<half::bf16>(&data).0, &want.0, 2e-2);
    }
}

#[test]
fn no_token_sees_another_document_or_its_future() {
    let case = &CASES[2];
    let data = case.data();
    let before = case.run::<f32>(&data);
    let at = 100; // in the second document, 63..127
    let mut changed = data.clone();
    for (x, width) in changed[1..].iter_mut().zip([case.g * case.d, case.g * case.v]) {
        x[at * width..(at + 1) * width].fill(5.0);
    }
    let after = case.run::<f32>(&changed);
    for t in 0..case.t() {
        let row = t * case.h * case.v..(t + 1) * case.h * case.v;
        let same = before.0[row.clone()] == after.0[row];
        assert_eq!(same, !(at..127).contains(&t), "token {t}");
    }
}

#[test]
fn gradients_match_finite_differences() {
    let cases = [
        Case { h: 2, g: 2, d: 3, v: 2, offsets: &[0, 1, 6, 6] },
        Case { h: 4, g: 2, d: 3, v: 2, offsets: &[0, 4, 9] },
        Case { h: 5, g: 1, d: 2, v: 1, offsets: &[0, 14, 15] },
        Case { h: 1, g: 1, d: 1, v: 2, offsets: &[0, 3, 138] },
    ];
    for case in &cases {
        let dims = case.dims();
        check_gradients(
            &[(&dims[0], 1), (&dims[1], 2), (&dims[2], 3)],
            &[case.t(), case.h, case.v],
            |s, x| {
                let m = s.memory().clone();
                let (o, lse) = case.outputs(&m, DType::F64);
                forward(s, case.inputs(&m, [x[0], x[1], x[2]]), o, lse)?;
                Ok(o)
            },
            |s, x, d_o, dx| {
                let m = s.memory().clone();
                let x = case.inputs(&m, [x[0], x[1], x[2]]);
                let (o, lse) = case.outputs(&m, DType::F64);
                forward(s, x, o, lse)?;
                input_grad(s, x, o, lse, d_o, Grads { dq: dx[0], dk: dx[1], dv: dx[2] })
            },
        );
    }
}

fn gradient<T: Float>(case: &Case) -> Vec<f64> {
    let mut s = stream();
    let m = s.memory().clone();
    let cast = |dims: &[usize], x: &[f64]| m.from_slice(dims, &x.iter().map(|&x| T::of_f64(x)).collect::<Vec<T>>());
    let (data, dims) = (case.data(), case.dims());
    let x = case.inputs(&m, std::array::from_fn(|i| cast(&dims[i], &data[i])));
    let (o, lse) = case.outputs(&m, T::DTYPE);
    let o_dims = [case.t(), case.h, case.v];
    let d_o = cast(&o_dims, &random(o_dims.iter().product(), 4));
    let [dq, dk, dv] = dims.map(|d| m.alloc(T::DTYPE, &d));
    forward(&mut s, x, o, lse).unwrap();
    input_grad(&mut s, x, o, lse, d_o, Grads { dq, dk, dv }).unwrap();
    s.synchronize().unwrap();
    [dq, dk, dv].iter().flat_map(|&d| m.download::<T>(d)).map(|x| x.as_f64()).collect()
}

#[test]
fn f32_and_bf16_gradients_follow_f64() {
    for case in &CASES[..5] {
        let want = gradient::<f64>(case);
        assert_close(&gradient::<f32>(case), &want, 1e-5);
        assert_close(&gradient::<half::bf16>(case), &want, 6e-2);
    }
}

#[test]
fn the_number_of_threads_does_not_change_the_bits() {
    let case = Case { h: 4, g: 2, d: 24, v: 16, offsets: &[0, 1000, 1300, 2000] };
    let with = |n: usize| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(n).build().unwrap();
        // The stream's thread is not in the pool, so tasks are run here as its closures do.
        let x = case.data();
        pool.install(|| {
            let parts = parts(case.offsets, Sizes { t: case.t(), h: 4, g: 2, d: 24, v: 16 }, 0.7);
            let tasks: Vec<_> = parts.iter().flat_map(|p| runs(p, 512)).collect();
            let mut o = vec![0f64; case.t() * 4 * 16];
            let shared = Shared::new(&mut o);
            for_each_task(&tasks, usize::MAX, |(part, rows), scratch| {
                block::forward::<f64, f64>(part, rows.clone(), (&x[0], &x[1], &x[2]), scratch, |row, o_v, _| {
                    // SAFETY: as in `forward`.
                    unsafe { shared.slice(part.o.range(row)) }.copy_from_slice(o_v);
                });
            });
            o
        })
    };
    assert_eq!(with(1), with(3));
}

#[test]
fn a_cache_filled_in_chunks_gives_the_whole() {
    for case in [&CASES[4], &Case { h: 8, g: 2, d: 6, v: 4, offsets: &[0, 290] }] {
        let data = case.data();
        let want = case.run::<f64>(&data).0;
        let mut s = stream();
        let m = s.memory().clone();
        let [_, [t, g, d], [_, _, v]] = case.dims();
        let cache = KvCache { k: m.alloc(DType::F64, &[t + 3, g, d]), v: m.alloc(DType::F64, &[t + 3, g, v]) };
        for chunks in [vec![t], vec![1; t], vec![t / 3, 1, 2, t - t / 3 - 3]] {
            m.write::<f64>(cache.k).fill(f64::NAN); // what lies past the valid rows must not matter
            m.write::<f64>(cache.v).fill(f64::NAN);
            let (mut at, mut got) = (0, Vec::new());
            for n in chunks {
                let all = Sequences::one(t + 3, n, at);
                let slice = |i: usize| {
                    let [_, heads, width] = case.dims()[i];
                    m.from_slice(&[n, heads, width], &data[i][at * heads * width..(at + n) * heads * width])
                };
                cached::append(&mut s, slice(1), slice(2), cache, &all).unwrap();
                let o = m.alloc(DType::F64, &[n, case.h, case.v]);
                cached::forward(&mut s, slice(0), cache, &all, 0.7, o).unwrap();
                s.synchronize().unwrap();
                got.extend(m.download::<f64>(o));
                at += n;
            }
            assert_close(&got, &want, 1e-12);
        }
    }
}

#[test]
fn wrong_calls_say_what_is_wrong() {
    let mut s = stream();
    let m = s.memory().clone();
    let case = Case { h: 3, g: 2, d: 4, v: 4, offsets: &[0, 4] };
    let tensors = case.dims().map(|d| m.alloc(DType::F32, &d));
    let (o, lse) = case.outputs(&m, DType::F32);
    let error = forward(&mut s, case.inputs(&m, tensors), o, lse).unwrap_err().to_string();
    assert!(error.contains("g kv heads that divide the 3 heads"), "{error}");

    let case = Case { h: 2, g: 2, d: 4, v: 4, offsets: &[0, 3, 2, 4] };
    let tensors = case.dims().map(|d| m.alloc(DType::F32, &d));
    let (o, lse) = case.outputs(&m, DType::F32);
    forward(&mut s, case.inputs(&m, tensors), o, lse).unwrap();
    let error = s.synchronize().unwrap_err().to_string();
    assert!(error.contains("`doc_offsets` should rise from 0 to 4"), "{error}");

    let cache = KvCache { k: m.alloc(DType::F32, &[5, 2, 4]), v: m.alloc(DType::F32, &[5, 2, 4]) };
    let error =
        cached::append(&mut s, tensors[1], tensors[2], cache, &Sequences::one(5, 4, 2)).unwrap_err().to_string();
    assert!(error.contains("at least 6 rows to hold 4 more after 2"), "{error}");
}
