//! The gate on the device: a warp a token, scores in registers, the choice by comparisons of whole words.
//!
//! Signatures (all rows F32 or U32, t: u32):
//! - forward `(logits, [bias,] scores, indices, weights, counts, factor: f32, t, fault)`; `counts` is zero before. With random routing
//!   `indices` is an input, from a kernel of its own.
//! - input_grad `(scores, indices, dweights, [dscores,] dlogits, factor: f32, t)`.
//!
//! Lane l of a warp holds experts l, l + 32, ...: loads are coalesced, and e, k and the groups are part of the names, so that all
//! loops over a lane's experts are unrolled. A warp's part of shared memory holds its scores, and under a group limit also corrected
//! scores (four words of padding after 32 keep a warp's groups in different banks), the groups' scores and which groups are kept;
//! warps do not wait for each other.
//!
//! The choice: an f32 becomes a u32 of the same order, 0 for an expert that is not within reach or already taken. A round takes the
//! largest word of the warp (`redux.sync.max`) and of the experts that have it the first (`redux.sync.min`): ties go to the lower
//! index. A group is kept if fewer than `keep` groups score more, or as much with a lower index. A NaN logit is told of, and
//! scores that are NaN are taken for 0.
//!
//! Softmax sums over lanes, and e^x is the device's: scores are within 1e-6 of the CPU's, and choices differ only where corrected
//! scores are that near. Counts are integers, so the order of the atomic additions does not show.
//!
//! Time: 8 bytes a logit, far below that of the experts; about 500 instructions a warp and token for 256 experts.

mod choose;
mod random;

use self::choose::Choice;
use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Pred, Reg, f32_literal},
    elementwise,
    fault::{Fault, Report},
    fold::{self, Fold, Team},
    golden::Variant,
    parts::{self, BLOCK, count, element, special},
};
use crate::{
    dtype::DType,
    ops::gate::{Gate, GroupScore, Mode, Outputs, Score},
    ptx,
    tensor::Tensor,
};

/// Experts, at most: 16 a lane.
pub const MAX_EXPERTS: usize = 512;
/// Groups, at most.
pub const MAX_GROUPS: usize = 64;
const EPSILON: f32 = 1e-20;

/// What the text of a gate's kernels depends on.
#[derive(Clone, Copy, Debug)]
struct Config {
    gate: Gate,
    e: usize,
    k: usize,
    bias: bool,
}

/// F: routes the tokens of F32 logits [t, e], as [`crate::ops::gate::forward`].
///
/// # Panics
/// Above [`MAX_EXPERTS`] or [`MAX_GROUPS`].
pub fn forward(gate: Gate, logits: Tensor, bias: Option<Tensor>, out: Outputs) -> Vec<Launch> {
    let (t, e, k) = (logits.rows(), logits.cols(), out.indices.cols());
    let groups = gate.groups.map_or(1, |g| g.num);
    assert!(e <= MAX_EXPERTS && groups <= MAX_GROUPS, "gate: {e} experts in {groups} groups");
    let mut launches = elementwise::zero(out.counts);
    if t == 0 {
        return launches;
    }
    if let Mode::Random { seed, step } = gate.mode {
        launches.push(random::random_distinct(seed, step, e, out.indices));
    }
    let tensors = [logits].into_iter().chain(bias).chain([out.scores, out.indices, out.weights, out.counts]);
    let mut args: Vec<Arg> = tensors.map(Arg::Tensor).collect();
    args.extend([Arg::F32(gate.routed_scaling_factor as f32), Arg::U32(count(t)), Arg::Fault(Fault::GateLogit)]);
    let kernel = forward_kernel(Config { gate, e, k, bias: bias.is_some() });
    launches.push(Launch { kernel, grid: Team::Warp.grid(t), args });
    launches
}

/// I: assigns dlogits [t, e], as [`crate::ops::gate::input_grad`].
///
/// # Panics
/// Above [`MAX_EXPERTS`].
pub fn input_grad(
    gate: Gate,
    scores: Tensor,
    indices: Tensor,
    dweights: Tensor,
    dscores: Option<Tensor>,
    dlogits: Tensor,
) -> Vec<Launch> {
    let (t, e, k) = (scores.rows(), scores.cols(), indices.cols());
    assert!(e <= MAX_EXPERTS, "gate: {e} experts");
    if t == 0 {
        return vec![];
    }
    let tensors = [scores, indices, dweights].into_iter().chain(dscores).chain([dlogits]);
    let mut args: Vec<Arg> = tensors.map(Arg::Tensor).collect();
    args.extend([Arg::F32(gate.routed_scaling_factor as f32), Arg::U32(count(t))]);
    let kernel = input_grad_kernel(gate, e, k, dscores.is_some());
    vec![Launch { kernel, grid: Team::Warp.grid(t), args }]
}

fn score_name(score: Score) -> &'static str {
    match score {
        Score::Softmax => "softmax",
        Score::Sigmoid => "sigmoid",
    }
}

impl Config {
    fn name(&self) -> String {
        let mut name = format!("gate_{}_e{}_k{}", score_name(self.gate.score), self.e, self.k);
        match (self.gate.mode, self.gate.groups) {
            (Mode::Forced, _) => name += "_forced",
            (Mode::Random { .. }, _) => name += "_random",
            (Mode::Learned, Some(groups)) => {
                let score = if groups.score == GroupScore::Max { "max" } else { "top2" };
                name += &format!("_g{}_{}_{score}", groups.num, groups.keep);
            }
            (Mode::Learned, None) => (),
        }
        for (on, suffix) in [(self.bias, "_bias"), (self.gate.norm_topk_prob, "_norm")] {
            name += if on { suffix } else { "" };
        }
        name
    }
}

/// A lane's experts of one token: registers, and a predicate where not all lanes have one.
struct Experts {
    lane: Reg<B32>,
    live: Vec<Option<Reg<Pred>>>,
}

impl Experts {
    fn new(k: &mut Assembler, lane: Reg<B32>, e: usize) -> Self {
        let live = (0..e.div_ceil(32)).map(|i| {
            (32 * (i + 1) > e).then(|| {
                let live = k.reg::<Pred>();
                ptx!(k, "setp.lt.u32 {live}, {lane}, {};", e - 32 * i);
                live
            })
        });
        Experts { lane, live: live.collect() }
    }

    fn guard(&self, i: usize) -> String {
        self.live[i].map_or(String::new(), |live| format!("@{live} "))
    }

    /// Address of the lane's first element of row `token` of [t, e].
    fn at(&self, k: &mut Assembler, base: Reg<B64>, token: Reg<B32>, e: usize) -> Reg<B64> {
        let cols = special(k, &e.to_string());
        let row = parts::row(k, base, token, cols, DType::F32);
        element(k, row, self.lane, DType::F32)
    }

    /// The lane's elements; `absent` where it has none.
    fn load(&self, k: &mut Assembler, at: Reg<B64>, absent: f32) -> Vec<Reg<F32>> {
        (0..self.live.len())
            .map(|i| {
                let x = parts::constant(k, absent);
                ptx!(k, "{}ld.global.f32 {x}, [{at}+{}];", self.guard(i), 128 * i);
                x
            })
            .collect()
    }

    fn store(&self, k: &mut Assembler, at: Reg<B64>, x: &[Reg<F32>]) {
        for (i, x) in x.iter().enumerate() {
            ptx!(k, "{}st.global.f32 [{at}+{}], {x};", self.guard(i), 128 * i);
        }
    }
}

/// Sum over a lane's registers, then over the warp.
fn sum(k: &mut Assembler, x: &[Reg<F32>]) -> Reg<F32> {
    let total = parts::constant(k, 0.0);
    for x in x {
        ptx!(k, "add.rn.f32 {total}, {total}, {x};");
    }
    fold::warp(k, total, Fold::Sum);
    total
}

fn scores(k: &mut Assembler, score: Score, x: &[Reg<F32>]) -> Vec<Reg<F32>> {
    if score == Score::Sigmoid {
        return x.iter().map(|&x| parts::sigmoid(k, x)).collect();
    }
    let max = parts::constant(k, f32::NEG_INFINITY);
    for x in x {
        ptx!(k, "max.f32 {max}, {max}, {x};");
    }
    fold::warp(k, max, Fold::Max);
    let y: Vec<Reg<F32>> = x
        .iter()
        .map(|&x| {
            let less = parts::f32_op(k, "sub", x, max);
            parts::exp(k, less)
        })
        .collect();
    let (total, inverse) = (sum(k, &y), k.reg::<F32>());
    ptx!(k, "rcp.rn.f32 {inverse}, {total};");
    y.iter().map(|&y| parts::f32_op(k, "mul", y, inverse)).collect()
}

/// The value that lane `j % 32` has in `x[j / 32]`.
fn broadcast(k: &mut Assembler, x: &[Reg<F32>], j: usize) -> Reg<F32> {
    let y = k.reg::<F32>();
    ptx!(k, "shfl.sync.idx.b32 {y}, {}, {}, 31, 0xffffffff;", x[j / 32], j % 32);
    y
}

/// For each register of k values a warp holds, lane by lane, whether this lane has one.
fn has_slot(k: &mut Assembler, lane: Reg<B32>, num: usize) -> Vec<Reg<Pred>> {
    (0..num.div_ceil(32))
        .map(|q| {
            let has = k.reg::<Pred>();
            ptx!(k, "setp.lt.u32 {has}, {lane}, {};", num - 32 * q);
            has
        })
        .collect()
}

fn forward_kernel(config: Config) -> Kernel {
    parts::kernel(config.name(), move |k| emit_forward(k, config))
}

fn emit_forward(k: &mut Assembler, config: Config) {
    let Config { gate, e, k: num, bias } = config;
    let logits = k.pointer("logits");
    let bias = bias.then(|| k.pointer("bias"));
    let (out, indices, weights, counts) =
        (k.pointer("scores"), k.pointer("indices"), k.pointer("weights"), k.pointer("counts"));
    let (factor, t, fault) = (k.f32("factor"), k.u32("t"), Report::param(k));
    let (token, lane) = Team::Warp.place(k, t);
    let experts = Experts::new(k, lane, e);
    let at = experts.at(k, logits, token, e);
    let x = experts.load(k, at, f32::NEG_INFINITY);
    let s = scores(k, gate.score, &x);
    let any = k.reg::<Pred>();
    for (i, s) in s.iter().enumerate() {
        let bad = k.reg::<Pred>();
        // A lane without an expert has NaN only if all of the token's scores are.
        ptx!(k, "setp.nan.f32 {bad}, {s}, {s};");
        ptx!(k, "selp.f32 {s}, {}, {s}, {bad};", f32_literal(0.0));
        match i {
            0 => ptx!(k, "mov.pred {any}, {bad};"),
            _ => ptx!(k, "or.pred {any}, {any}, {bad};"),
        }
    }
    let none = special(k, "0");
    fault.tell(k, any, token, none);
    let at = experts.at(k, out, token, e);
    experts.store(k, at, &s);
    let choice = Choice::new(k, lane, e, gate.groups.filter(|_| gate.mode == Mode::Learned));
    choice.share_scores(k, &experts, &s);

    let has = has_slot(k, lane, num);
    let slot = k.reg::<B32>();
    ptx!(k, "mad.lo.u32 {slot}, {token}, {num}, {lane};");
    let (index_at, weight_at) = (element(k, indices, slot, DType::U32), element(k, weights, slot, DType::F32));
    let chosen: Vec<Reg<B32>> = match gate.mode {
        Mode::Learned => {
            let bias = bias.map(|bias| {
                let at = element(k, bias, lane, DType::F32);
                experts.load(k, at, 0.0)
            });
            let corrected = match bias {
                Some(bias) => s.iter().zip(bias).map(|(&s, b)| parts::f32_op(k, "add", s, b)).collect(),
                None => s.clone(),
            };
            choice.choose(k, &experts, &corrected, num)
        }
        Mode::Forced => (0..num.div_ceil(32))
            .map(|q| {
                let (expert, first) = (k.reg::<B32>(), k.reg::<B32>());
                ptx!(k, "rem.u32 {first}, {token}, {e};");
                ptx!(k, "add.u32 {expert}, {lane}, {};", 32 * q);
                ptx!(k, "mad.lo.u32 {expert}, {first}, {num}, {expert};");
                ptx!(k, "rem.u32 {expert}, {expert}, {e};");
                expert
            })
            .collect(),
        Mode::Random { .. } => has
            .iter()
            .enumerate()
            .map(|(q, has)| {
                let expert = special(k, "0");
                ptx!(k, "@{has} ld.global.u32 {expert}, [{index_at}+{}];", 128 * q);
                expert
            })
            .collect(),
    };

    k.note("weights of the chosen: lane j has slots j, j + 32, ...");
    let values: Vec<Reg<F32>> = chosen.iter().map(|&expert| choice.score_of(k, expert)).collect();
    if gate.norm_topk_prob {
        let total = parts::constant(k, 0.0);
        for j in 0..num {
            let s = broadcast(k, &values, j);
            ptx!(k, "add.rn.f32 {total}, {total}, {s};");
        }
        ptx!(k, "add.rn.f32 {total}, {total}, {};", f32_literal(EPSILON));
        ptx!(k, "div.rn.f32 {factor}, {factor}, {total};");
    }
    for (q, ((expert, s), has)) in chosen.iter().zip(&values).zip(&has).enumerate() {
        ptx!(k, "mul.rn.f32 {s}, {s}, {factor};");
        ptx!(k, "@{has} st.global.f32 [{weight_at}+{}], {s};", 128 * q);
        if !matches!(gate.mode, Mode::Random { .. }) {
            ptx!(k, "@{has} st.global.u32 [{index_at}+{}], {expert};", 128 * q);
        }
        let at = element(k, counts, *expert, DType::U32);
        ptx!(k, "@{has} red.global.add.u32 [{at}], 1;");
    }
}

fn input_grad_kernel(gate: Gate, e: usize, num: usize, dscores: bool) -> Kernel {
    let mut name = format!("gate_grad_{}_e{e}_k{num}", score_name(gate.score));
    for (on, suffix) in [(gate.norm_topk_prob, "_norm"), (dscores, "_ds")] {
        name += if on { suffix } else { "" };
    }
    parts::kernel(name, move |k| {
        let (scores, indices, dweights) = (k.pointer("scores"), k.pointer("indices"), k.pointer("dweights"));
        let dscores = dscores.then(|| k.pointer("dscores"));
        let (dlogits, factor, t) = (k.pointer("dlogits"), k.f32("factor"), k.u32("t"));
        let (token, lane) = Team::Warp.place(k, t);
        let experts = Experts::new(k, lane, e);
        let at = experts.at(k, scores, token, e);
        let s = experts.load(k, at, 0.0);
        let dx = match dscores {
            Some(dscores) => {
                let at = experts.at(k, dscores, token, e);
                experts.load(k, at, 0.0)
            }
            None => s.iter().map(|_| parts::constant(k, 0.0)).collect(),
        };
        let has = has_slot(k, lane, num);
        let (slot, cols) = (k.reg::<B32>(), special(k, &e.to_string()));
        ptx!(k, "mad.lo.u32 {slot}, {token}, {num}, {lane};");
        let row = parts::row(k, scores, token, cols, DType::F32);
        let (index_at, weight_at) = (element(k, indices, slot, DType::U32), element(k, dweights, slot, DType::F32));
        let (mut chosen, mut of_chosen, mut dw) = (vec![], vec![], vec![]);
        for (q, has) in has.iter().enumerate() {
            let (i, x, g) = (special(k, "0"), parts::constant(k, 0.0), parts::constant(k, 0.0));
            ptx!(k, "@{has} ld.global.u32 {i}, [{index_at}+{}];", 128 * q);
            ptx!(k, "@{has} ld.global.f32 {g}, [{weight_at}+{}];", 128 * q);
            let at = element(k, row, i, DType::F32);
            ptx!(k, "@{has} ld.global.f32 {x}, [{at}];");
            chosen.push(i);
            of_chosen.push(x);
            dw.push(g);
        }
        let shared = parts::constant(k, 0.0);
        if gate.norm_topk_prob {
            k.note("z = sum of the chosen scores; w_j = factor s_j / z");
            let z = parts::constant(k, 0.0);
            for j in 0..num {
                let (s, g) = (broadcast(k, &of_chosen, j), broadcast(k, &dw, j));
                ptx!(k, "add.rn.f32 {z}, {z}, {s};");
                let product = parts::f32_op(k, "mul", s, g);
                ptx!(k, "add.rn.f32 {shared}, {shared}, {product};");
            }
            ptx!(k, "add.rn.f32 {z}, {z}, {};", f32_literal(EPSILON));
            ptx!(k, "div.rn.f32 {shared}, {shared}, {z};");
            ptx!(k, "div.rn.f32 {factor}, {factor}, {z};");
        }
        for j in 0..num {
            let (expert, g) = (k.reg::<B32>(), broadcast(k, &dw, j));
            ptx!(k, "shfl.sync.idx.b32 {expert}, {}, {}, 31, 0xffffffff;", chosen[j / 32], j % 32);
            ptx!(k, "sub.rn.f32 {g}, {g}, {shared};");
            ptx!(k, "mul.rn.f32 {g}, {g}, {factor};");
            ptx!(k, "sub.u32 {expert}, {expert}, {lane};");
            for (i, dx) in dx.iter().enumerate() {
                let here = k.reg::<Pred>();
                ptx!(k, "setp.eq.u32 {here}, {expert}, {};", 32 * i);
                ptx!(k, "@{here} add.rn.f32 {dx}, {dx}, {g};");
            }
        }
        if gate.score == Score::Sigmoid {
            let one = parts::constant(k, 1.0);
            for (dx, &s) in dx.iter().zip(&s) {
                let rest = parts::f32_op(k, "sub", one, s);
                ptx!(k, "mul.rn.f32 {rest}, {rest}, {s};");
                ptx!(k, "mul.rn.f32 {dx}, {dx}, {rest};");
            }
        } else {
            let products: Vec<Reg<F32>> = dx.iter().zip(&s).map(|(&d, s)| parts::f32_op(k, "mul", d, s)).collect();
            let mean = sum(k, &products);
            for (dx, s) in dx.iter().zip(&s) {
                ptx!(k, "sub.rn.f32 {dx}, {dx}, {mean};");
                ptx!(k, "mul.rn.f32 {dx}, {dx}, {s};");
            }
        }
        let at = experts.at(k, dlogits, token, e);
        experts.store(k, at, &dx);
    })
}

/// What is committed: the gates of DeepSeek-V3 and V2-Lite.
pub fn variants() -> Vec<Variant> {
    use crate::ops::gate::Groups;
    let v3 = Gate {
        score: Score::Sigmoid,
        groups: Some(Groups { num: 8, keep: 4, score: GroupScore::Top2Sum }),
        norm_topk_prob: true,
        routed_scaling_factor: 2.5,
        mode: Mode::Learned,
    };
    let lite = Gate { score: Score::Softmax, groups: None, norm_topk_prob: false, ..v3 };
    vec![
        Variant::new(forward_kernel(Config { gate: v3, e: 256, k: 8, bias: true }), 80),
        Variant::new(forward_kernel(Config { gate: lite, e: 64, k: 6, bias: false }), 64),
        Variant::new(input_grad_kernel(v3, 256, 8, true), 80),
        Variant::new(input_grad_kernel(lite, 64, 6, false), 64),
        Variant::new(random::kernel(256, 8), 96),
    ]
}

#[cfg(test)]
mod tests;
