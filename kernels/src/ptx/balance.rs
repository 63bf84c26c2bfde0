//! Balance of experts: counts, the correction bias, the sequence-wise loss and the router's z-loss.
//!
//! Everything is small ([t, e] f32): a warp a token, f32 within it, f64 over tokens. add_counts (counts, total, n: u32, fault) tells
//! of a sum past u32. bias_update (counts, bias, e: u32, speed: f32), one block. sequence_load (indices, f, slots a
//! sequence, e: u32, factor: f64, fault): block q counts sequence q by integer atomics in dynamic shared memory of 4 e bytes, and
//! writes f, f32 [sequences, e]; scratch 1. sequence_loss (scores, f, partial, t, e, row_len) and z_loss (logits, partial, t,
//! e): 8 tokens a block, partial f64 a block, scratch 0; then `finish_sum` of [`super::norm`]. The gradients: (scores, f,
//! dscores, t, e, row_len, factor: f32), (logits, dlogits, t, e, factor).

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, F64, Pred, Reg, f32_literal},
    fault::{Fault, Report},
    fold::{self, Fold, Team},
    golden::Variant,
    norm::{finish, store_partial, zero_f64},
    parts::{
        self, BLOCK, constant, count, div_rem, element, exp, f32_op, flat, flat_grid, ln, load, load_u32, row, special,
        store, strided,
    },
};
use crate::{dtype::DType, ops::balance::SequenceLoss, ptx, tensor::Tensor};

const TEAM: Team = Team::Warp;

/// `total_e += counts_e`, U32.
pub fn accumulate_counts(counts: Tensor, total: Tensor) -> Vec<Launch> {
    let n = counts.len();
    let args = vec![Arg::Tensor(counts), Arg::Tensor(total), Arg::U32(count(n)), Arg::Fault(Fault::Count)];
    if n == 0 { vec![] } else { vec![Launch { kernel: counts_kernel(), grid: flat_grid(n, 1), args }] }
}

/// `bias_e += speed` where counts_e is below the mean, `-= speed` where above, unchanged where equal. U32 and F32.
pub fn bias_update(counts: Tensor, speed: f32, bias: Tensor) -> Vec<Launch> {
    let e = counts.len();
    let args = vec![Arg::Tensor(counts), Arg::Tensor(bias), Arg::U32(count(e)), Arg::F32(speed)];
    if e == 0 { vec![] } else { vec![Launch { kernel: bias_kernel(), grid: [1, 1, 1], args }] }
}

/// f, [sequences, e], in scratch 1.
fn load_launch(l: SequenceLoss, scores: Tensor, indices: Tensor) -> (Launch, Arg) {
    let (t, e, k) = (scores.rows(), scores.cols(), indices.cols());
    let f = Arg::Scratch { slot: 1, bytes: 4 * (t / l.row_len * e) as u64 };
    let mut kernel = load_kernel();
    kernel.shared_bytes = 4 * count(e);
    let factor = e as f64 / (k * l.row_len) as f64;
    let mut args = vec![Arg::Tensor(indices), f.clone(), Arg::U32(count(k * l.row_len)), Arg::U32(count(e))];
    args.extend([Arg::F64(factor), Arg::Fault(Fault::Expert { num: count(e), per_token: count(k) })]);
    (Launch { kernel, grid: [count(t / l.row_len), 1, 1], args }, f)
}

/// F: `loss += mean over sequences of L`, from the gate's scores F32 [t, e] and indices [t, k]; loss is F32 or F64 of one
/// element.
pub fn sequence_loss(l: SequenceLoss, scores: Tensor, indices: Tensor, loss: Tensor) -> Vec<Launch> {
    let t = scores.rows();
    if scores.is_empty() {
        return vec![];
    }
    let (load, f) = load_launch(l, scores, indices);
    let (partial, blocks) = partial(t);
    let mut args = vec![Arg::Tensor(scores), f, partial.clone()];
    args.extend([t, scores.cols(), l.row_len].map(|n| Arg::U32(count(n))));
    let tokens = Launch { kernel: sequence_loss_kernel(), grid: TEAM.grid(t), args };
    vec![load, tokens, finish(partial, blocks, l.alpha / t as f64, loss)]
}

/// I: `dscores = scale * d loss / d scores`, F32 [t, e].
pub fn sequence_loss_grad(
    l: SequenceLoss,
    scale: f64,
    scores: Tensor,
    indices: Tensor,
    dscores: Tensor,
) -> Vec<Launch> {
    let t = scores.rows();
    if scores.is_empty() {
        return vec![];
    }
    let (load, f) = load_launch(l, scores, indices);
    let mut args = vec![Arg::Tensor(scores), f, Arg::Tensor(dscores)];
    args.extend([t, scores.cols(), l.row_len].map(|n| Arg::U32(count(n))));
    args.push(Arg::F32((l.alpha * scale / t as f64) as f32));
    vec![load, Launch { kernel: sequence_grad_kernel(), grid: TEAM.grid(t), args }]
}

/// F: `loss += coef * mean over tokens of logsumexp(logits_te)^2`, logits F32; loss is F32 or F64 of one element.
pub fn z_loss(coef: f64, logits: Tensor, loss: Tensor) -> Vec<Launch> {
    let t = logits.rows();
    if logits.is_empty() {
        return vec![];
    }
    let (partial, blocks) = partial(t);
    let mut args = vec![Arg::Tensor(logits), partial.clone()];
    args.extend([t, logits.cols()].map(|n| Arg::U32(count(n))));
    vec![Launch { kernel: z_loss_kernel(), grid: TEAM.grid(t), args }, finish(partial, blocks, coef / t as f64, loss)]
}

/// I: `dlogits += scale * d z-loss / d logits`, F32 [t, e].
pub fn z_loss_grad_acc(coef: f64, scale: f64, logits: Tensor, dlogits: Tensor) -> Vec<Launch> {
    let t = logits.rows();
    if logits.is_empty() {
        return vec![];
    }
    let mut args = vec![Arg::Tensor(logits), Arg::Tensor(dlogits)];
    args.extend([t, logits.cols()].map(|n| Arg::U32(count(n))));
    args.push(Arg::F32((2.0 * coef * scale / t as f64) as f32));
    vec![Launch { kernel: z_grad_kernel(), grid: TEAM.grid(t), args }]
}

/// A sum a block of 8 tokens.
fn partial(t: usize) -> (Arg, usize) {
    let blocks = TEAM.grid(t)[0] as usize;
    (Arg::Scratch { slot: 0, bytes: 8 * blocks as u64 }, blocks)
}

fn counts_kernel() -> Kernel {
    parts::kernel("add_counts".into(), |k| {
        let (counts, total, n) = (k.pointer("counts"), k.pointer("total"), k.u32("n"));
        let fault = Report::param(k);
        flat(k, n, 1, |k, i, _| {
            let (a, b, wrapped) = (load_u32(k, counts, i), load_u32(k, total, i), k.reg::<Pred>());
            ptx!(k, "add.u32 {b}, {b}, {a};");
            ptx!(k, "setp.lt.u32 {wrapped}, {b}, {a};");
            fault.tell(k, wrapped, i, a);
            let to = element(k, total, i, DType::U32);
            ptx!(k, "st.global.u32 [{to}], {b};");
        });
    })
}

fn bias_kernel() -> Kernel {
    parts::kernel("bias_update".into(), |k| {
        let (counts, bias, e, speed) = (k.pointer("counts"), k.pointer("bias"), k.u32("e"), k.f32("speed"));
        let (tid, total) = (special(k, "%tid.x"), k.reg::<B64>());
        ptx!(k, "mov.u64 {total}, 0;");
        strided(k, tid, e, BLOCK, |k, i| {
            let (c, wide) = (load_u32(k, counts, i), k.reg::<B64>());
            ptx!(k, "cvt.u64.u32 {wide}, {c};");
            ptx!(k, "add.u64 {total}, {total}, {wide};");
        });
        fold::block(k, total, Fold::Sum, BLOCK);
        strided(k, tid, e, BLOCK, |k, i| {
            // count < total / e, without rounding.
            let (c, scaled, below, above) = (load_u32(k, counts, i), k.reg::<B64>(), k.reg::<Pred>(), k.reg::<Pred>());
            ptx!(k, "mul.wide.u32 {scaled}, {c}, {e};");
            ptx!(k, "setp.lt.u64 {below}, {scaled}, {total};");
            ptx!(k, "setp.gt.u64 {above}, {scaled}, {total};");
            let at = element(k, bias, i, DType::F32);
            let b = load(k, at, DType::F32);
            ptx!(k, "@{below} add.rn.f32 {b}, {b}, {speed};");
            ptx!(k, "@{above} sub.rn.f32 {b}, {b}, {speed};");
            store(k, at, b, DType::F32);
        });
    })
}

fn load_kernel() -> Kernel {
    parts::kernel("sequence_load".into(), |k| {
        let counts = k.dynamic_shared(16, "counts");
        let (indices, f, slots, e) = (k.pointer("indices"), k.pointer("f"), k.u32("slots"), k.u32("e"));
        let (factor, fault) = (k.f64("factor"), Report::param(k));
        let (tid, sequence, base) = (special(k, "%tid.x"), special(k, "%ctaid.x"), special(k, &counts));
        let place = |k: &mut Assembler, i| {
            let at = k.reg::<B32>();
            ptx!(k, "mad.lo.u32 {at}, {i}, 4, {base};");
            at
        };
        strided(k, tid, e, BLOCK, |k, i| {
            let at = place(k, i);
            ptx!(k, "st.shared.u32 [{at}], 0;");
        });
        ptx!(k, "bar.sync 0;");
        let own = row(k, indices, sequence, slots, DType::U32);
        strided(k, tid, slots, BLOCK, |k, i| {
            let (expert, wrong) = (load_u32(k, own, i), k.reg::<Pred>());
            ptx!(k, "setp.ge.u32 {wrong}, {expert}, {e};");
            let slot = k.reg::<B32>();
            ptx!(k, "mad.lo.u32 {slot}, {sequence}, {slots}, {i};");
            fault.tell(k, wrong, slot, expert);
            let at = place(k, expert);
            ptx!(k, "@!{wrong} red.shared.add.u32 [{at}], 1;");
        });
        ptx!(k, "bar.sync 0;");
        let own = row(k, f, sequence, e, DType::F32);
        strided(k, tid, e, BLOCK, |k, i| {
            let (at, c, x, y) = (place(k, i), k.reg::<B32>(), k.reg::<F64>(), k.reg::<F32>());
            ptx!(k, "ld.shared.u32 {c}, [{at}];");
            ptx!(k, "cvt.rn.f64.u32 {x}, {c};");
            ptx!(k, "mul.rn.f64 {x}, {x}, {factor};");
            ptx!(k, "cvt.rn.f32.f64 {y}, {x};");
            let to = element(k, own, i, DType::F32);
            store(k, to, y, DType::F32);
        });
    })
}

/// This warp's token and lane, and whether there is none: unlike [`Team::place`], all threads go on to the block's sum.
fn token_of(k: &mut Assembler, t: Reg<B32>) -> (Reg<B32>, Reg<B32>, Reg<Pred>) {
    let (tid, token, warp, lane) = (special(k, "%tid.x"), special(k, "%ctaid.x"), k.reg::<B32>(), k.reg::<B32>());
    let outside = k.reg::<Pred>();
    ptx!(k, "shr.u32 {warp}, {tid}, 5;");
    ptx!(k, "and.b32 {lane}, {tid}, 31;");
    ptx!(k, "mad.lo.u32 {token}, {token}, {}, {warp};", TEAM.rows_per_block());
    ptx!(k, "setp.ge.u32 {outside}, {token}, {t};");
    (token, lane, outside)
}

/// A value a warp, of which only lane 0's counts, summed over the block.
fn sum_over_warps(k: &mut Assembler, partial: Reg<B64>, lane: Reg<B32>, sum: Reg<F64>) {
    let other = k.reg::<Pred>();
    ptx!(k, "setp.ne.u32 {other}, {lane}, 0;");
    ptx!(k, "selp.f64 {sum}, 0d0000000000000000, {sum}, {other};");
    store_partial(k, partial, sum);
}

/// sum_i f_i s_i and sum_i s_i + epsilon of a token.
fn dot_and_sum(k: &mut Assembler, s: Reg<B64>, f: Reg<B64>, lane: Reg<B32>, e: Reg<B32>) -> (Reg<F32>, Reg<F32>) {
    let (dot, sum) = (constant(k, 0.0), constant(k, 0.0));
    strided(k, lane, e, 32, |k, i| {
        let (at_s, at_f) = (element(k, s, i, DType::F32), element(k, f, i, DType::F32));
        let (s, f) = (load(k, at_s, DType::F32), load(k, at_f, DType::F32));
        ptx!(k, "fma.rn.f32 {dot}, {f}, {s}, {dot};");
        ptx!(k, "add.rn.f32 {sum}, {sum}, {s};");
    });
    fold::warp(k, dot, Fold::Sum);
    fold::warp(k, sum, Fold::Sum);
    ptx!(k, "add.rn.f32 {sum}, {sum}, {};", f32_literal(1e-20));
    (dot, sum)
}

fn sequence_loss_kernel() -> Kernel {
    parts::kernel("sequence_loss".into(), |k| {
        let [scores, f, partial] = ["scores", "f", "partial"].map(|n| k.pointer(n));
        let (t, e, row_len) = (k.u32("t"), k.u32("e"), k.u32("row_len"));
        let ((token, lane, outside), total, skip) = (token_of(k, t), zero_f64(k), k.label("skip"));
        ptx!(k, "@{outside} bra {skip};");
        let sequence = div_rem(k, token, row_len).0;
        let (s, f) = (row(k, scores, token, e, DType::F32), row(k, f, sequence, e, DType::F32));
        let (dot, sum) = dot_and_sum(k, s, f, lane, e);
        ptx!(k, "div.rn.f32 {dot}, {dot}, {sum};");
        ptx!(k, "cvt.f64.f32 {total}, {dot};");
        k.place(&skip);
        sum_over_warps(k, partial, lane, total);
    })
}

fn sequence_grad_kernel() -> Kernel {
    parts::kernel("sequence_loss_grad".into(), |k| {
        let [scores, f, dscores] = ["scores", "f", "dscores"].map(|n| k.pointer(n));
        let (t, e, row_len, factor) = (k.u32("t"), k.u32("e"), k.u32("row_len"), k.f32("factor"));
        let (token, lane) = TEAM.place(k, t);
        let sequence = div_rem(k, token, row_len).0;
        let (s, f) = (row(k, scores, token, e, DType::F32), row(k, f, sequence, e, DType::F32));
        let ds = row(k, dscores, token, e, DType::F32);
        let (mean, sum) = dot_and_sum(k, s, f, lane, e);
        ptx!(k, "div.rn.f32 {mean}, {mean}, {sum};");
        strided(k, lane, e, 32, |k, i| {
            let (from, to) = (element(k, f, i, DType::F32), element(k, ds, i, DType::F32));
            let f = load(k, from, DType::F32);
            ptx!(k, "sub.rn.f32 {f}, {f}, {mean};");
            ptx!(k, "mul.rn.f32 {f}, {factor}, {f};");
            ptx!(k, "div.rn.f32 {f}, {f}, {sum};");
            store(k, to, f, DType::F32);
        });
    })
}

/// Largest of a row, and the sum of e^(x - largest).
fn max_and_sum(k: &mut Assembler, x: Reg<B64>, lane: Reg<B32>, e: Reg<B32>) -> (Reg<F32>, Reg<F32>) {
    let (max, sum) = (constant(k, f32::NEG_INFINITY), constant(k, 0.0));
    strided(k, lane, e, 32, |k, i| {
        let at = element(k, x, i, DType::F32);
        let x = load(k, at, DType::F32);
        ptx!(k, "max.f32 {max}, {max}, {x};");
    });
    fold::warp(k, max, Fold::Max);
    strided(k, lane, e, 32, |k, i| {
        let at = element(k, x, i, DType::F32);
        let x = load(k, at, DType::F32);
        let x = f32_op(k, "sub", x, max);
        let p = exp(k, x);
        ptx!(k, "add.rn.f32 {sum}, {sum}, {p};");
    });
    fold::warp(k, sum, Fold::Sum);
    (max, sum)
}

fn z_loss_kernel() -> Kernel {
    parts::kernel("z_loss".into(), |k| {
        let (logits, partial, t, e) = (k.pointer("logits"), k.pointer("partial"), k.u32("t"), k.u32("e"));
        let ((token, lane, outside), total, skip) = (token_of(k, t), zero_f64(k), k.label("skip"));
        ptx!(k, "@{outside} bra {skip};");
        let x = row(k, logits, token, e, DType::F32);
        let (max, sum) = max_and_sum(k, x, lane, e);
        let log = ln(k, sum);
        ptx!(k, "add.rn.f32 {max}, {max}, {log};");
        ptx!(k, "cvt.f64.f32 {total}, {max};");
        ptx!(k, "mul.rn.f64 {total}, {total}, {total};");
        k.place(&skip);
        sum_over_warps(k, partial, lane, total);
    })
}

fn z_grad_kernel() -> Kernel {
    parts::kernel("z_loss_grad".into(), |k| {
        let (logits, dlogits, t, e) = (k.pointer("logits"), k.pointer("dlogits"), k.u32("t"), k.u32("e"));
        let factor = k.f32("factor");
        let (token, lane) = TEAM.place(k, t);
        let (x, dx) = (row(k, logits, token, e, DType::F32), row(k, dlogits, token, e, DType::F32));
        let (max, sum) = max_and_sum(k, x, lane, e);
        // factor logsumexp / sum
        let g = ln(k, sum);
        ptx!(k, "add.rn.f32 {g}, {g}, {max};");
        ptx!(k, "mul.rn.f32 {g}, {g}, {factor};");
        ptx!(k, "div.rn.f32 {g}, {g}, {sum};");
        strided(k, lane, e, 32, |k, i| {
            let (from, to) = (element(k, x, i, DType::F32), element(k, dx, i, DType::F32));
            let (x, d) = (load(k, from, DType::F32), load(k, to, DType::F32));
            let x = f32_op(k, "sub", x, max);
            let p = exp(k, x);
            ptx!(k, "fma.rn.f32 {d}, {g}, {p}, {d};");
            store(k, to, d, DType::F32);
        });
    })
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    let small = [counts_kernel(), bias_kernel(), load_kernel(), sequence_loss_kernel(), sequence_grad_kernel()];
    small.into_iter().chain([z_loss_kernel(), z_grad_kernel()]).map(|kernel| Variant::new(kernel, 32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::balance as cpu,
        ptx::case::{Case, Data},
    };

    fn one(dtype: DType, x: f64) -> Data {
        Data(dtype, vec![1], vec![x])
    }

    #[test]
    fn counts_add_and_the_bias_moves_against_them() {
        for e in [0, 1, 8, 300] {
            let counts = Data::random(DType::U32, &[e], 1).map(|x| (x.abs() * 5.0).floor());
            Case::new(&[counts.clone(), Data::u32(&[e], &vec![7; e])])
                .cpu(|s, x| cpu::accumulate_counts(s, x[0], x[1]))
                .ptx(|x| accumulate_counts(x[0], x[1]))
                .equal();
            Case::new(&[counts, Data::random(DType::F32, &[e], 2)])
                .cpu(|s, x| cpu::bias_update(s, x[0], 0.001, x[1]))
                .ptx(|x| bias_update(x[0], 0.001, x[1]))
                .equal();
        }
        let full = [Data::u32(&[1], &[u32::MAX]), Data::u32(&[1], &[1])];
        Case::new(&full).same_error(|s, x| cpu::accumulate_counts(s, x[0], x[1]), |_, x| accumulate_counts(x[0], x[1]));
        let even = [Data::u32(&[3], &[5, 6, 4]), Data::random(DType::F32, &[3], 2)];
        Case::new(&even).cpu(|s, x| cpu::bias_update(s, x[0], 0.5, x[1])).ptx(|x| bias_update(x[0], 0.5, x[1])).equal();
    }

    #[test]
    fn the_sequence_loss_and_its_gradient_are_the_cpus() {
        for (sequences, row_len, e, k) in [(0, 3, 4, 2), (2, 3, 4, 2), (3, 21, 40, 6), (1, 1, 300, 8)] {
            let (t, l) = (sequences * row_len, SequenceLoss { alpha: 0.3, row_len });
            let scores = Data::random(DType::F32, &[t, e], 1).map(|x| x + 1.01);
            let indices = Data::random(DType::U32, &[t, k], 2).map(|x| (x.abs() * e as f64).floor());
            for dtype in [DType::F32, DType::F64] {
                Case::new(&[scores.clone(), indices.clone(), one(dtype, 10.0)])
                    .cpu(|s, x| cpu::sequence_loss(s, l, x[0], x[1], x[2]))
                    .ptx(|x| sequence_loss(l, x[0], x[1], x[2]))
                    .close(1e-6);
            }
            Case::new(&[scores, indices, Data::poison(DType::F32, &[t, e])])
                .cpu(|s, x| cpu::sequence_loss_grad(s, l, 100.0, x[0], x[1], x[2]))
                .ptx(|x| sequence_loss_grad(l, 100.0, x[0], x[1], x[2]))
                .close(1e-6);
        }
    }

    #[test]
    fn an_expert_that_does_not_exist_is_told_of() {
        let l = SequenceLoss { alpha: 0.3, row_len: 3 };
        let scores = Data::random(DType::F32, &[6, 4], 1).map(|x| x + 1.01);
        for (at, expert) in [(9, 4), (2, u32::MAX)] {
            let mut indices = vec![3; 12];
            indices[at] = expert;
            let indices = Data::u32(&[6, 2], &indices);
            Case::new(&[scores.clone(), indices.clone(), one(DType::F32, 0.0)]).same_error(
                |s, x| cpu::sequence_loss(s, l, x[0], x[1], x[2]),
                |_, x| sequence_loss(l, x[0], x[1], x[2]),
            );
            Case::new(&[scores.clone(), indices, Data::poison(DType::F32, &[6, 4])]).same_error(
                |s, x| cpu::sequence_loss_grad(s, l, 1.0, x[0], x[1], x[2]),
                |_, x| sequence_loss_grad(l, 1.0, x[0], x[1], x[2]),
            );
        }
    }

    #[test]
    fn each_barrier_is_needed() {
        let l = SequenceLoss { alpha: 0.3, row_len: 90 };
        let scores = Data::random(DType::F32, &[90, 300], 1).map(|x| x + 1.01);
        let indices = Data::random(DType::U32, &[90, 6], 2).map(|x| (x.abs() * 300.0).floor());
        let launches = |x: &[Tensor]| sequence_loss(l, x[0], x[1], x[2]);
        Case::new(&[scores, indices, one(DType::F64, 0.0)]).ptx(launches).mutants("bar.sync", launches);
    }

    #[test]
    fn the_z_loss_and_its_gradient_are_the_cpus() {
        for (t, e) in [(0, 4), (1, 1), (19, 8), (5, 300)] {
            let logits = Data::random(DType::F32, &[t, e], 1).map(|x| 9.0 * x);
            for dtype in [DType::F32, DType::F64] {
                // lse^2 is up to 200: 1e-6 of the loss.
                Case::new(&[logits.clone(), one(dtype, 0.5)])
                    .cpu(|s, x| cpu::z_loss(s, 0.01, x[0], x[1]))
                    .ptx(|x| z_loss(0.01, x[0], x[1]))
                    .close(1e-6);
            }
            Case::new(&[logits, Data::random(DType::F32, &[t, e], 2)])
                .cpu(|s, x| cpu::z_loss_grad_acc(s, 0.1, 2.0, x[0], x[1]))
                .ptx(|x| z_loss_grad_acc(0.1, 2.0, x[0], x[1]))
                .close(2e-6);
        }
    }
}
