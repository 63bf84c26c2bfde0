//! Sums over a whole tensor, in f64: of squares for the gradient's norm, and plain; and the search for what is not finite.
//!
//! `sum` (x, partial, n: u32): block b adds up its share of x in strides of the grid, and writes partial\[b\]; the grid follows
//! from n alone, so the order of additions does too. `finish` (partial, n: u32, factor: f64, acc): one block; acc += factor *
//! sum. `check_finite` (x, n: u32, fault). Scratch 0: partial, f64 a block. Time: bytes of x over memory bandwidth.

use std::sync::Arc;

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, F64, Pred, Reg, f32_literal},
    fault::{Fault, Report},
    fold::{self, Fold},
    golden::Variant,
    parts::{
        self, BLOCK, count, element, flat, flat_grid, global_index, load_f64, load_vector, special, store_f64, strided,
        widen,
    },
};
use crate::{dtype::DType, ptx, tensor::Tensor};

/// Elements of a block's share, as far as [`MAX_BLOCKS`] allows.
const SHARE: usize = 8192;
const MAX_BLOCKS: usize = 1024;

/// `acc` f64 \[1\] += sum of squares of `x`.
pub fn sum_squares_acc(x: Tensor, acc: Tensor) -> Vec<Launch> {
    sum(x, acc, true)
}

/// `acc` f64 \[1\] += sum of `x`.
pub fn sum_acc(x: Tensor, acc: Tensor) -> Vec<Launch> {
    sum(x, acc, false)
}

fn sum(x: Tensor, acc: Tensor, square: bool) -> Vec<Launch> {
    if x.is_empty() {
        return vec![];
    }
    let blocks = x.len().div_ceil(SHARE).min(MAX_BLOCKS);
    let lanes = if x.dtype == DType::F64 { 1 } else { parts::lanes(&[x], 0) };
    let partial = Arg::Scratch { slot: 0, bytes: 8 * blocks as u64 };
    let args = vec![Arg::Tensor(x), partial.clone(), Arg::U32(count(x.len()))];
    let first = Launch { kernel: sum_kernel(x.dtype, lanes, square), grid: [blocks as u32, 1, 1], args };
    vec![first, finish(partial, blocks, 1.0, acc)]
}

/// acc (F32 or F64, \[1\]) += factor * sum of n f64 at `partial`.
pub(super) fn finish(partial: Arg, n: usize, factor: f64, acc: Tensor) -> Launch {
    let args = vec![partial, Arg::U32(count(n)), Arg::F64(factor), Arg::Tensor(acc)];
    Launch { kernel: finish_kernel(acc.dtype), grid: [1, 1, 1], args }
}

/// Tells of a NaN or an infinity in `x`.
pub fn check_finite(x: Tensor, task: Arc<str>, tensor: Arc<str>) -> Vec<Launch> {
    let (n, lanes) = (x.len(), if x.dtype == DType::F64 { 1 } else { parts::lanes(&[x], 0) });
    if n == 0 {
        return vec![];
    }
    let args = vec![Arg::Tensor(x), Arg::U32(count(n)), Arg::Fault(Fault::NotFinite { task, tensor })];
    vec![Launch { kernel: check_finite_kernel(x.dtype, lanes), grid: flat_grid(n, lanes), args }]
}

/// Thread 0 of the block stores a sum over the block.
pub(super) fn store_partial(k: &mut Assembler, partial: Reg<B64>, sum: Reg<F64>) {
    fold::block(k, sum, Fold::Sum, BLOCK);
    let (tid, b, other) = (special(k, "%tid.x"), special(k, "%ctaid.x"), k.reg::<Pred>());
    ptx!(k, "setp.ne.u32 {other}, {tid}, 0;");
    let at = element(k, partial, b, DType::F64);
    ptx!(k, "@!{other} st.global.f64 [{at}], {sum};");
}

/// A sum that has none yet.
pub(super) fn zero_f64(k: &mut Assembler) -> Reg<F64> {
    let sum = k.reg::<F64>();
    ptx!(k, "mov.f64 {sum}, 0d0000000000000000;");
    sum
}

fn sum_kernel(dtype: DType, lanes: usize, square: bool) -> Kernel {
    let what = if square { "sum_squares" } else { "sum" };
    parts::kernel(format!("{what}_{}_x{lanes}", dtype.name()), move |k| {
        let (x, partial, n) = (k.pointer("x"), k.pointer("partial"), k.u32("n"));
        let sum = zero_f64(k);
        let add = |k: &mut Assembler, v: Reg<F64>| match square {
            true => ptx!(k, "fma.rn.f64 {sum}, {v}, {v}, {sum};"),
            false => ptx!(k, "add.rn.f64 {sum}, {sum}, {v};"),
        };
        let (i, step, groups) = (global_index(k), special(k, "%nctaid.x"), k.reg::<B32>());
        ptx!(k, "mul.lo.u32 {step}, {step}, {BLOCK};");
        ptx!(k, "div.u32 {groups}, {n}, {lanes};");
        strided(k, i, groups, step, |k, group| {
            let at = k.reg::<B64>();
            ptx!(k, "mad.wide.u32 {at}, {group}, {}, {x};", lanes * dtype.size_bytes());
            if dtype == DType::F64 {
                let v = load_f64(k, at, dtype);
                return add(k, v);
            }
            for v in load_vector(k, at, dtype, lanes) {
                let v = widen(k, v);
                add(k, v);
            }
        });
        if lanes > 1 {
            // Elements of no whole group, one a thread: those are fewer than the first block's threads.
            ptx!(k, "mad.lo.u32 {i}, {groups}, {lanes}, {i};");
            strided(k, i, n, step, |k, i| {
                let at = element(k, x, i, dtype);
                let v = load_f64(k, at, dtype);
                add(k, v);
            });
        }
        store_partial(k, partial, sum);
    })
}

fn finish_kernel(dtype: DType) -> Kernel {
    parts::kernel(format!("finish_sum_{}", dtype.name()), move |k| {
        let (partial, n, factor, acc) = (k.pointer("partial"), k.u32("n"), k.f64("factor"), k.pointer("acc"));
        let (sum, tid) = (zero_f64(k), special(k, "%tid.x"));
        strided(k, tid, n, BLOCK, |k, i| {
            let at = element(k, partial, i, DType::F64);
            let v = load_f64(k, at, DType::F64);
            ptx!(k, "add.rn.f64 {sum}, {sum}, {v};");
        });
        fold::block(k, sum, Fold::Sum, BLOCK);
        parts::return_past(k, tid, 1);
        let old = load_f64(k, acc, dtype);
        ptx!(k, "fma.rn.f64 {sum}, {sum}, {factor}, {old};");
        store_f64(k, acc, sum, dtype);
    })
}

fn check_finite_kernel(dtype: DType, lanes: usize) -> Kernel {
    parts::kernel(format!("check_finite_{}_x{lanes}", dtype.name()), move |k| {
        let (x, n, fault) = (k.pointer("x"), k.u32("n"), Report::param(k));
        flat(k, n, lanes, |k, i, lanes| {
            let at = element(k, x, i, dtype);
            let (bad, found) = (k.reg::<Pred>(), k.reg::<F64>());
            if dtype == DType::F64 {
                let size = k.reg::<F64>();
                ptx!(k, "ld.global.f64 {found}, [{at}];");
                ptx!(k, "abs.f64 {size}, {found};");
                ptx!(k, "setp.geu.f64 {bad}, {size}, 0d7FF0000000000000;");
            } else {
                // 0 x is 0, or NaN where x is not finite.
                let sum = k.reg::<F32>();
                ptx!(k, "mov.f32 {sum}, {};", f32_literal(0.0));
                let all = load_vector(k, at, dtype, lanes);
                for v in &all {
                    ptx!(k, "fma.rn.f32 {sum}, {v}, {}, {sum};", f32_literal(0.0));
                }
                ptx!(k, "setp.neu.f32 {bad}, {sum}, {};", f32_literal(0.0));
                // The first of them, where there is one.
                let (first, this) = (k.reg::<F32>(), k.reg::<Pred>());
                ptx!(k, "mov.f32 {first}, {};", all[0]);
                for v in all.iter().rev() {
                    ptx!(k, "mul.rn.f32 {sum}, {v}, {};", f32_literal(0.0));
                    ptx!(k, "setp.neu.f32 {this}, {sum}, {};", f32_literal(0.0));
                    ptx!(k, "selp.f32 {first}, {v}, {first}, {this};");
                }
                ptx!(k, "cvt.f64.f32 {found}, {first};");
            }
            let (low, high) = (k.reg::<B32>(), k.reg::<B32>());
            ptx!(k, "mov.b64 {{{low}, {high}}}, {found};");
            fault.tell(k, bad, low, high);
        });
    })
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    use DType::{Bf16, F32, F64};
    let mut all = vec![finish_kernel(F32), finish_kernel(F64)];
    for (dtype, lanes) in [(Bf16, 8), (F32, 4), (F64, 1)] {
        all.extend([true, false].map(|square| sum_kernel(dtype, lanes, square)));
        all.push(check_finite_kernel(dtype, lanes));
    }
    all.into_iter().map(|kernel| Variant::new(kernel, 32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        memory::Memory,
        ops::norm as cpu,
        ptx::case::{Case, Data},
        stream::Stream,
    };

    #[test]
    fn sums_are_those_of_f64() {
        for (n, skip) in [(0, 0), (1, 0), (7, 1), (1000, 0), (20_001, 0), (9_000, 5)] {
            for dtype in [DType::F32, DType::Bf16, DType::F64] {
                let inputs = [Data::random(dtype, &[n + skip], 1), Data(DType::F64, vec![1], vec![0.25])];
                Case::new(&inputs)
                    .cpu(|s, t| cpu::sum_squares_acc(s, t[0].slice(skip, n), t[1]))
                    .ptx(|t| sum_squares_acc(t[0].slice(skip, n), t[1]))
                    .close(1e-13 * n.max(1) as f64);
                Case::new(&inputs)
                    .cpu(|s, t| cpu::sum_acc(s, t[0].slice(skip, n), t[1]))
                    .ptx(|t| sum_acc(t[0].slice(skip, n), t[1]))
                    .close(1e-13 * n.max(1) as f64);
            }
        }
    }

    #[test]
    fn what_is_not_finite_is_found_wherever_it_is() {
        for dtype in [DType::F32, DType::Bf16, DType::F64] {
            for (at, value) in
                [(0, 1.0), (0, f64::NAN), (3, f64::INFINITY), (600, f64::INFINITY), (602, f64::NEG_INFINITY)]
            {
                let mut x = Data::random(dtype, &[603], 1);
                x.2[at] = value;
                let names: [Arc<str>; 2] = ["3 F layer 1".into(), "scores".into()];
                let [task, name] = &names;
                let case = Case::new(&[x]);
                let launches = |_: &Memory, t: &[Tensor]| check_finite(t[0], task.clone(), name.clone());
                if value.is_finite() {
                    assert!(case.run(1, launches).is_ok());
                    continue;
                }
                let cpu = |s: &mut Stream, t: &[Tensor]| {
                    cpu::check_finite(s, t[0], task.clone(), name.clone());
                    Ok(())
                };
                case.same_error(cpu, launches);
            }
        }
    }
}
