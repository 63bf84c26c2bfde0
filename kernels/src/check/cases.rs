//! The ops that are checked, with sizes: aligned ones, odd ones, and those of a layer.

mod fp8_products;
mod quantize;

use super::{Case, Fill, Run, Scale, Tolerance};
use crate::{
    dtype::DType::{self, Bf16, F32, F64, U32},
    error::Result,
    ops::{
        adamw::{self, AdamW},
        attention, balance, cross_entropy, elementwise, embedding,
        gate::{self, Gate, GroupScore, Groups, Mode, Score},
        gemm, gemv, grouped_gemm, mla, norm, permute, rms_norm,
        rope::{self, Pairs, Rope},
        sampling::{self, Sampling},
        swiglu,
    },
    stream::Stream,
    tensor::Tensor,
};

/// t tokens, d model width, f feed-forward width, v vocabulary, e experts, k chosen, h heads of n + r elements, n for values, c latent.
#[derive(Clone, Copy)]
struct Sizes {
    t: usize,
    d: usize,
    f: usize,
    v: usize,
    e: usize,
    k: usize,
    h: usize,
    n: usize,
    r: usize,
    c: usize,
}

const ALIGNED: Sizes = Sizes { t: 40, d: 64, f: 32, v: 96, e: 4, k: 2, h: 2, n: 16, r: 8, c: 16 };
const ODD: Sizes = Sizes { t: 37, d: 35, f: 19, v: 61, e: 6, k: 3, h: 3, n: 10, r: 6, c: 9 };
const LAYER: Sizes = Sizes { t: 1000, d: 2048, f: 1408, v: 8192, e: 16, k: 4, h: 16, n: 128, r: 64, c: 512 };

/// What is added to what an op assigns: nothing, what is there, or the tensor after it.
const RESIDUALS: [(&str, Option<usize>); 3] = [("", None), (" in place", Some(0)), (" onto another", Some(1))];

/// All cases.
pub fn cases(scale: Scale) -> Vec<Case> {
    let sizes: &[Sizes] = match scale {
        Scale::Small => &[ALIGNED, ODD],
        Scale::Full => &[ALIGNED, ODD, LAYER],
    };
    let mut list = List(Vec::new());
    for &z in sizes {
        for dtype in [F32, Bf16] {
            list.moves(z, dtype);
            list.norms(z, dtype);
            list.activations(z, dtype);
            list.products(z, dtype);
            list.experts(z, dtype);
            list.heads(z, dtype);
            list.quantizers(z, dtype);
        }
        fp8_products::add(&mut list, z);
        list.routing(z);
        list.optimizer(z);
    }
    list.0
}

struct List(Vec<Case>);

fn boxed(run: impl Fn(&mut Stream, &[Tensor]) -> Result<()> + Send + 'static) -> Run {
    Box::new(run)
}

/// A tensor.
fn t(dtype: DType, dims: &[usize], fill: Fill) -> (DType, Vec<usize>, Fill) {
    (dtype, dims.to_vec(), fill)
}

fn u32s(numbers: Vec<u32>) -> (DType, Vec<usize>, Fill) {
    (U32, vec![numbers.len()], Fill::U32(numbers))
}

fn tokens(z: Sizes) -> (DType, Vec<usize>, Fill) {
    u32s((0..z.t).map(|i| (i * i * 7 % z.v) as u32).collect())
}

fn positions(z: Sizes) -> (DType, Vec<usize>, Fill) {
    u32s((0..z.t).map(|i| (i % 31) as u32).collect())
}

/// Chosen experts of each token, all different.
fn chosen(z: Sizes) -> Vec<u32> {
    // The last expert gets nothing.
    (0..z.t).flat_map(|i| (0..z.k).map(move |j| ((i * i + j) % (z.e - 1)) as u32)).collect()
}

/// Where each expert's rows begin.
fn offsets(z: Sizes) -> (DType, Vec<usize>, Fill) {
    let mut offsets = vec![0; z.e + 1];
    chosen(z).iter().for_each(|&e| offsets[e as usize + 1] += 1);
    for e in 0..z.e {
        offsets[e + 1] += offsets[e];
    }
    u32s(offsets)
}

impl List {
    fn add(
        &mut self,
        (op, dtype, tolerance): (&'static str, DType, Tolerance),
        shape: String,
        tensors: Vec<(DType, Vec<usize>, Fill)>,
        run: impl Fn(&mut Stream, &[Tensor]) -> Result<()> + Send + 'static,
    ) {
        self.0.push(Case { op, dtype, shape, tolerance, tensors, run: boxed(run) });
    }

    fn moves(&mut self, z: Sizes, dtype: DType) {
        use Fill::{Poison, Random};
        let near = Tolerance::elementwise(dtype);
        let (rows, wide) = ([z.t, z.d], [z.t, z.d + z.r]);
        let shape = || format!("[{}, {}]", z.t, z.d);
        let x = || t(dtype, &rows, Random);
        self.add(("elementwise::zero", dtype, near), shape(), vec![t(dtype, &rows, Poison)], |s, x| {
            elementwise::zero(s, x[0]);
            Ok(())
        });
        for to in [dtype, if dtype == F32 { Bf16 } else { F32 }] {
            let near = Tolerance::elementwise(to);
            let shape = format!("{} to {to:?}", shape());
            self.add(("elementwise::copy", dtype, near), shape, vec![x(), t(to, &rows, Poison)], |s, x| {
                elementwise::copy(s, x[0], x[1])
            });
        }
        self.add(("elementwise::add_acc", dtype, near), shape(), vec![x(), x()], |s, x| {
            elementwise::add_acc(s, x[0], x[1])
        });
        for accumulate in [false, true] {
            let run = move |s: &mut Stream, x: &[Tensor]| {
                elementwise::copy_columns(s, (x[0], 0), (x[1], z.r), z.d, accumulate)
            };
            self.add(("elementwise::copy_columns", dtype, near), shape(), vec![x(), t(dtype, &wide, Random)], run);
        }
        let w = t(dtype, &[z.v, z.d], Random);
        let of_tokens = |last| vec![tokens(z), w.clone(), last];
        self.add(("embedding::forward", dtype, near), shape(), of_tokens(t(dtype, &rows, Poison)), |s, x| {
            embedding::forward(s, x[0], x[1], x[2])
        });
        let sums = Tolerance::rounded_sum(dtype);
        self.add(("embedding::weight_grad", dtype, sums), shape(), of_tokens(x()), |s, x| {
            embedding::weight_grad(s, x[0], x[2], x[1])
        });
        let sum = |square: bool| {
            move |s: &mut Stream, x: &[Tensor]| {
                if square { norm::sum_squares_acc(s, x[0], x[1]) } else { norm::sum_acc(s, x[0], x[1]) }
            }
        };
        let acc = || t(F64, &[1], Fill::Values(vec![0.5]));
        self.add(("norm::sum_squares_acc", dtype, Tolerance::elementwise(F32)), shape(), vec![x(), acc()], sum(true));
        self.add(("norm::sum_acc", dtype, Tolerance::elementwise(F32)), shape(), vec![x(), acc()], sum(false));
    }

    fn norms(&mut self, z: Sizes, dtype: DType) {
        use Fill::{Poison, Positive, Random};
        let near = Tolerance::elementwise(dtype);
        let shape = || format!("[{}, {}] of {}", z.t, z.d, z.d + z.r);
        let wide = [z.t, z.d + z.r];
        let (x, w) = (t(dtype, &wide, Random), t(dtype, &[z.d], Random));
        let outs = [t(dtype, &[z.t, z.d], Poison), t(dtype, &[z.t], Poison)];
        let forward = [vec![x.clone(), w.clone()], outs.to_vec()].concat();
        self.add(("rms_norm::forward", dtype, near), shape(), forward, |s, x| {
            rms_norm::forward(s, x[0], x[1], x[2], x[3], 1e-6)
        });
        let (rstd, dy) = (t(dtype, &[z.t], Positive), t(dtype, &[z.t, z.d], Random));
        for (what, residual) in RESIDUALS {
            let mut tensors = vec![x.clone(), w.clone(), rstd.clone(), dy.clone(), t(dtype, &wide, Random)];
            tensors.extend((residual == Some(1)).then(|| x.clone()));
            self.add(("rms_norm::input_grad", dtype, near), shape() + what, tensors, move |s, x| {
                rms_norm::input_grad(s, x[0], x[1], x[2], x[3], residual.map(|at| x[4 + at]), x[4])
            });
        }
        let sums = Tolerance::product(dtype);
        self.add(("rms_norm::weight_grad", dtype, sums), shape(), vec![x, rstd, dy, w], |s, x| {
            rms_norm::weight_grad(s, x[0], x[1], x[2], x[3])
        });
    }

    fn activations(&mut self, z: Sizes, dtype: DType) {
        use Fill::{Poison, Random};
        let near = Tolerance::elementwise(dtype);
        let (h, a) = ([z.t, 2 * z.f], [z.t, z.f]);
        let shape = || format!("[{}, {}]", z.t, z.f);
        self.add(
            ("swiglu::forward", dtype, near),
            shape(),
            vec![t(dtype, &h, Random), t(dtype, &a, Poison)],
            |s, x| swiglu::forward(s, x[0], x[1]),
        );
        let tensors = vec![t(dtype, &h, Random), t(dtype, &a, Random), t(dtype, &h, Poison)];
        self.add(("swiglu::input_grad", dtype, near), shape(), tensors, |s, x| swiglu::input_grad(s, x[0], x[1], x[2]));
        for pairs in [Pairs::Interleaved, Pairs::HalfSplit] {
            let shape = format!("[{}, {}, {} + {}] {pairs:?}", z.t, z.h, z.n, z.r);
            let x = t(dtype, &[z.t, z.h, z.n + z.r], Random);
            for back in [false, true] {
                let run = move |s: &mut Stream, x: &[Tensor]| {
                    let table = rope(z).table(s.memory(), dtype, 32, pairs);
                    let turn = if back { rope::input_grad } else { rope::forward };
                    turn(s, x[0], z.n, x[1], &table)
                };
                let op = if back { "rope::input_grad" } else { "rope::forward" };
                self.add((op, dtype, near), shape.clone(), vec![x.clone(), positions(z)], run);
            }
            let (a, b) = ([z.t, z.c + z.r], [z.t, z.h, 2 * z.n]);
            let (k, v) = ([z.t, z.h, z.n + z.r], [z.t, z.h, z.n]);
            let all = |fills: [Fill; 4]| {
                let dims: [&[usize]; 4] = [&a, &b, &k, &v];
                let mut tensors: Vec<_> = dims.iter().zip(fills).map(|(dims, fill)| t(dtype, dims, fill)).collect();
                tensors.push(positions(z));
                tensors
            };
            let tensors = all([Random, Random, Poison, Poison]);
            self.add(("mla::assemble", dtype, near), shape.clone(), tensors, move |s, x| {
                let table = rope(z).table(s.memory(), dtype, 32, pairs);
                mla::assemble(s, mla::Projections { kv_a: x[0], kv_b: x[1] }, x[4], &table, x[2], x[3])
            });
            let tensors = all([Random, Poison, Random, Random]);
            self.add(("mla::assemble_grad", dtype, near), shape, tensors, move |s, x| {
                let table = rope(z).table(s.memory(), dtype, 32, pairs);
                mla::assemble_grad(s, x[2], x[3], x[4], &table, mla::Projections { kv_a: x[0], kv_b: x[1] })
            });
        }
    }

    fn products(&mut self, z: Sizes, dtype: DType) {
        use Fill::{Poison, Random};
        let near = Tolerance::product(dtype);
        let (i, o) = (z.d, z.f);
        let shape = || format!("[{}, {i}] x [{o}, {i}]", z.t);
        let [x, w, bias] = [vec![z.t, i], vec![o, i], vec![o]].map(|dims| t(dtype, &dims, Random));
        let y = |fill| t(dtype, &[z.t, o], fill);
        self.add(("gemm::forward", dtype, near), shape(), vec![x.clone(), w.clone(), y(Poison)], |s, x| {
            gemm::forward(s, x[0], x[1], None, x[2])
        });
        let tensors = vec![x.clone(), w.clone(), y(Poison), bias.clone()];
        self.add(("gemm::forward", dtype, near), format!("{} + bias", shape()), tensors, |s, x| {
            gemm::forward(s, x[0], x[1], Some(x[3]), x[2])
        });
        for (what, residual) in RESIDUALS {
            let Some(residual) = residual else { continue };
            let outs = if residual == 0 { vec![y(Random)] } else { vec![y(Poison), y(Random)] };
            let tensors = [vec![x.clone(), w.clone()], outs].concat();
            self.add(("gemm::forward_onto", dtype, near), shape() + what, tensors, move |s, x| {
                gemm::forward_onto(s, x[0], x[1], x[2 + residual], x[2])
            });
        }
        for accumulate in [false, true] {
            let dx = t(dtype, &[z.t, i], if accumulate { Random } else { Poison });
            self.add(("gemm::input_grad", dtype, near), shape(), vec![y(Random), w.clone(), dx], move |s, x| {
                gemm::input_grad(s, x[0], x[1], x[2], accumulate)
            });
        }
        self.add(("gemm::weight_grad", dtype, near), shape(), vec![y(Random), x.clone(), w.clone()], |s, x| {
            gemm::weight_grad(s, x[0], x[1], x[2], None)
        });
        let (sums, shape) = (Tolerance::rounded_sum(dtype), format!("{} + bias", shape()));
        self.add(("gemm::weight_grad", dtype, sums), shape, vec![y(Random), x, w, bias], |s, x| {
            gemm::weight_grad(s, x[0], x[1], x[2], Some(x[3]))
        });
        let [one, w, y] = [(vec![1, i], Random), (vec![o, i], Random), (vec![1, o], Poison)]
            .map(|(dims, fill)| t(dtype, &dims, fill));
        self.add(("gemv::forward", dtype, near), format!("[1, {i}] x [{o}, {i}]"), vec![one, w, y], |s, x| {
            gemv::forward(s, x[0], x[1], None, x[2])
        });
    }

    fn experts(&mut self, z: Sizes, dtype: DType) {
        use Fill::{Poison, Random};
        let (near, moved) = (Tolerance::product(dtype), Tolerance::elementwise(dtype));
        let (n, e, d, f) = (z.t * z.k, z.e, z.d, z.f);
        let shape = || format!("[{n}, {d}] x {e} of [{f}, {d}]");
        let m = |dims: &[usize], fill| t(dtype, dims, fill);
        let tensors = vec![m(&[n, d], Random), offsets(z), m(&[e, f, d], Random), m(&[n, f], Poison)];
        self.add(("grouped_gemm::forward", dtype, near), shape(), tensors, |s, x| {
            grouped_gemm::forward(s, x[0], x[1], x[2], x[3])
        });
        let tensors = vec![m(&[n, f], Random), offsets(z), m(&[e, f, d], Random), m(&[n, d], Poison)];
        self.add(("grouped_gemm::input_grad", dtype, near), shape(), tensors, |s, x| {
            grouped_gemm::input_grad(s, x[0], x[1], x[2], x[3])
        });
        let tensors = vec![m(&[n, f], Random), m(&[n, d], Random), offsets(z), m(&[e, f, d], Random)];
        self.add(("grouped_gemm::weight_grad", dtype, near), shape(), tensors, |s, x| {
            grouped_gemm::weight_grad(s, x[0], x[1], x[2], x[3])
        });
        let (h, a) = ([n, 2 * f], [n, f]);
        let tensors = vec![m(&[n, d], Random), offsets(z), m(&[e, 2 * f, d], Random), m(&h, Poison), m(&a, Poison)];
        self.add(("grouped_gemm::swiglu::forward", dtype, near), shape(), tensors, |s, x| {
            grouped_gemm::swiglu::forward(s, x[0], x[1], x[2], x[3], x[4])
        });
        for again in [false, true] {
            let mut tensors = vec![m(&[n, d], Random), offsets(z), m(&[e, d, f], Random), m(&h, Random), m(&h, Poison)];
            tensors.extend(again.then(|| m(&a, Poison)));
            self.add(("grouped_gemm::swiglu::input_grad", dtype, near), shape(), tensors, |s, x| {
                grouped_gemm::swiglu::input_grad(s, x[0], x[1], x[2], x[3], x[4], x.get(5).copied())
            });
        }
        // The order of rows first: it is what the others read.
        let acc = if dtype == F64 { F64 } else { F32 };
        let order = |x: &[Tensor]| permute::Order { offsets: x[1], row_of_slot: x[2], token_of_row: x[3] };
        let with_order = |more: Vec<(DType, Vec<usize>, Fill)>| {
            let slots = || t(U32, &[n], Poison);
            let indices = t(U32, &[z.t, z.k], Fill::U32(chosen(z)));
            [vec![indices, t(U32, &[e + 1], Poison), slots(), slots()], more].concat()
        };
        let shape = || format!("[{}, {}, {d}]", z.t, z.k);
        let (tokens, rows, weights) = (|fill| m(&[z.t, d], fill), |fill| m(&[n, d], fill), t(acc, &[z.t, z.k], Random));
        self.add(("permute::permute", dtype, moved), shape(), with_order(vec![tokens(Random), rows(Poison)]), {
            move |s, x| {
                permute::sort(s, x[0], order(x))?;
                permute::permute(s, x[4], order(x), x[5])
            }
        });
        for accumulate in [false, true] {
            let to = || tokens(if accumulate { Random } else { Poison });
            let tensors = with_order(vec![rows(Random), to()]);
            self.add(("permute::permute_grad", dtype, moved), shape(), tensors, move |s, x| {
                permute::sort(s, x[0], order(x))?;
                permute::permute_grad(s, x[4], order(x), x[5], accumulate)
            });
        }
        for (what, residual) in RESIDUALS {
            let mut tensors =
                vec![rows(Random), weights.clone(), tokens(if residual == Some(0) { Random } else { Poison })];
            tensors.extend((residual == Some(1)).then(|| tokens(Random)));
            self.add(("permute::combine", dtype, moved), shape() + what, with_order(tensors), move |s, x| {
                permute::sort(s, x[0], order(x))?;
                permute::combine(s, x[4], x[5], order(x), residual.map(|at| x[6 + at]), x[6])
            });
        }
        let dweights = t(acc, &[z.t, z.k], Poison);
        let tensors = with_order(vec![tokens(Random), rows(Random), weights, rows(Poison), dweights]);
        self.add(("permute::combine_grad", dtype, near), shape(), tensors, move |s, x| {
            permute::sort(s, x[0], order(x))?;
            permute::combine_grad(s, x[4], x[5], x[6], order(x), x[7], x[8])
        });
    }

    fn heads(&mut self, z: Sizes, dtype: DType) {
        use Fill::{Poison, Random};
        let near = Tolerance::product(dtype);
        let (tokens, d, h) = (z.t, z.n + z.r, z.h);
        let scale = 1.0 / (d as f64).sqrt();
        // Two documents, and room for a third.
        let documents = || u32s([0, tokens / 3, tokens, tokens].map(|x| x as u32).to_vec());
        for g in [h, 1] {
            let shape = format!("{tokens} tokens, {h} heads on {g}, {d} and {}", z.n);
            let m = |dims: &[usize], fill| t(dtype, dims, fill);
            let inputs = vec![
                m(&[tokens, h, d], Random),
                m(&[tokens, g, d], Random),
                m(&[tokens, g, z.n], Random),
                documents(),
                m(&[tokens, h, z.n], Poison),
                t(F32, &[tokens, h], Poison),
            ];
            let read = move |x: &[Tensor]| attention::Inputs { q: x[0], k: x[1], v: x[2], doc_offsets: x[3], scale };
            self.add(("attention::forward", dtype, near), shape.clone(), inputs.clone(), move |s, x| {
                attention::forward(s, read(x), x[4], x[5])
            });
            let grads = vec![
                m(&[tokens, h, z.n], Random),
                m(&[tokens, h, d], Poison),
                m(&[tokens, g, d], Poison),
                m(&[tokens, g, z.n], Poison),
            ];
            self.add(("attention::input_grad", dtype, near), shape, [inputs, grads].concat(), move |s, x| {
                attention::forward(s, read(x), x[4], x[5])?;
                let grads = attention::Grads { dq: x[7], dk: x[8], dv: x[9] };
                attention::input_grad(s, read(x), x[4], x[5], x[6], grads)
            });
        }
        let shape = format!("[{tokens}, {}] x [{}, {}]", z.d, z.v, z.d);
        let targets: Vec<u32> =
            (0..tokens).map(|i| if i % 7 == 3 { cross_entropy::IGNORE } else { (i * i * 5 % z.v) as u32 }).collect();
        let tensors = vec![
            t(dtype, &[tokens, z.d], Random),
            t(dtype, &[z.v, z.d], Random),
            u32s(targets),
            t(F32, &[tokens], Poison),
            t(dtype, &[tokens, z.d], Poison),
            t(dtype, &[z.v, z.d], Random),
        ];
        self.add(("cross_entropy::run", dtype, near), shape, tensors, |s, x| {
            let passes = cross_entropy::Passes { nll: Some(x[3]), dh: Some(x[4]), dw: Some(x[5]) };
            cross_entropy::run(s, x[0], x[1], x[2], 0.25, passes)
        });
        let rows: Vec<Sampling> = (0..4)
            .map(|i| Sampling {
                temperature: 0.5 * i as f64,
                top_k: i * 3,
                top_p: 0.9,
                min_p: 0.2 * (i / 2) as f64,
                seed: 7,
                position: i as u64,
            })
            .collect();
        let tensors = vec![t(dtype, &[4, z.v], Random), t(U32, &[4], Poison)];
        self.add(("sampling::forward", dtype, near), format!("[4, {}]", z.v), tensors, move |s, x| {
            sampling::forward(s, x[0], &rows, x[1])
        });
    }

    fn routing(&mut self, z: Sizes) {
        use Fill::{Poison, Positive, Random};
        let near = Tolerance::elementwise(F32);
        let (tokens, e, k) = (z.t, z.e, z.k);
        let groups = Groups { num: 2, keep: 2, score: GroupScore::Top2Sum };
        let gates = [(Score::Softmax, None, false), (Score::Sigmoid, None, true), (Score::Sigmoid, Some(groups), true)];
        for (score, groups, norm_topk_prob) in gates {
            let gate = Gate { score, groups, norm_topk_prob, routed_scaling_factor: 2.5, mode: Mode::Learned };
            let shape =
                format!("[{tokens}, {e}] {k} chosen, {score:?}{}", if groups.is_some() { ", groups" } else { "" });
            let tensors = vec![
                t(F32, &[tokens, e], Random),
                t(F32, &[e], Random),
                t(F32, &[tokens, e], Poison),
                t(U32, &[tokens, k], Poison),
                t(F32, &[tokens, k], Poison),
                t(U32, &[e], Poison),
            ];
            let route = move |s: &mut Stream, x: &[Tensor]| {
                let out = gate::Outputs { scores: x[2], indices: x[3], weights: x[4], counts: x[5] };
                gate::forward(s, gate, x[0], Some(x[1]), out)
            };
            self.add(("gate::forward", F32, near), shape.clone(), tensors.clone(), route);
            let more = vec![t(F32, &[tokens, k], Random), t(F32, &[tokens, e], Random), t(F32, &[tokens, e], Poison)];
            self.add(("gate::input_grad", F32, near), shape, [tensors, more].concat(), move |s, x| {
                route(s, x)?;
                gate::input_grad(s, gate, x[2], x[3], x[6], Some(x[7]), x[8])
            });
        }
        let shape = || format!("[{tokens}, {e}]");
        let indices = || t(U32, &[tokens, k], Fill::U32(chosen(z)));
        let l = balance::SequenceLoss { alpha: 0.3, row_len: tokens };
        let (scores, loss) = (|| t(F32, &[tokens, e], Positive), || t(F64, &[1], Fill::Values(vec![0.5])));
        self.add(("balance::sequence_loss", F32, near), shape(), vec![scores(), indices(), loss()], move |s, x| {
            balance::sequence_loss(s, l, x[0], x[1], x[2])
        });
        let tensors = vec![scores(), indices(), t(F32, &[tokens, e], Poison)];
        self.add(("balance::sequence_loss_grad", F32, near), shape(), tensors, move |s, x| {
            balance::sequence_loss_grad(s, l, 0.5, x[0], x[1], x[2])
        });
        self.add(("balance::z_loss", F32, near), shape(), vec![scores(), loss()], |s, x| {
            balance::z_loss(s, 1e-2, x[0], x[1])
        });
        self.add(("balance::z_loss_grad_acc", F32, near), shape(), vec![scores(), scores()], |s, x| {
            balance::z_loss_grad_acc(s, 1e-2, 0.5, x[0], x[1])
        });
        let counts = || u32s((0..e as u32).map(|i| i * 3 % 7).collect());
        self.add(("balance::accumulate_counts", U32, near), format!("[{e}]"), vec![counts(), counts()], |s, x| {
            balance::accumulate_counts(s, x[0], x[1])
        });
        self.add(
            ("balance::bias_update", F32, near),
            format!("[{e}]"),
            vec![counts(), t(F32, &[e], Random)],
            |s, x| balance::bias_update(s, x[0], 1e-3, x[1]),
        );
    }

    fn optimizer(&mut self, z: Sizes) {
        use Fill::{Poison, Positive, Random};
        let hyper =
            AdamW { lr: 0.1, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 3, max_grad_norm: 1.0 };
        let dims = [z.d, z.f];
        for (grad, moments) in [(F32, F32), (Bf16, F32), (F32, Bf16)] {
            let tensors = vec![
                t(F32, &dims, Random),
                t(grad, &dims, Random),
                t(moments, &dims, Random),
                t(moments, &dims, Positive),
                t(F64, &[1], Fill::Values(vec![9.0])),
                t(Bf16, &dims, Poison),
            ];
            let near = Tolerance { element: 1.0 / 128.0, calc_diff: 1e-6 };
            let shape = format!("[{}, {}] of {grad:?}, moments {moments:?}", z.d, z.f);
            self.add(("adamw::update", F32, near), shape, tensors, move |s, x| {
                let slots = adamw::Slots { master: x[0], grad: x[1], m: x[2], v: x[3], weight: Some(x[5]) };
                adamw::update(s, hyper, slots, x[4])
            });
        }
    }
}

fn rope(z: Sizes) -> Rope {
    Rope { dim: z.r, theta: 10_000.0, yarn: None }
}
