//! Cross-entropy between the products of the head: from a chunk's logits to its losses and, in place, to its gradients.
//!
//! Signature: (logits, targets, nll, v: u32, scale: f32, fault); a block a row, 1024 threads where the row is long enough. Pass 1
//! keeps, in each thread, the largest logit m and the sum of e^(x - m), scaled anew when m grows; the block folds both
//! (barriers of [`fold::block`]); pass 2 writes scale (p - onehot). Every thread reads the target's logit before the first
//! barrier, that is before any is overwritten. Reads the row twice (once from memory, as far as the chunk stays in L2) and
//! writes it once.
//!
//! Errors: a probability p below the largest is off by a factor within 1 +- (2^-22 + |ln p| 2^-24), the largest by 2^-22; a
//! loss by 3e-7 and one rounding of the largest logit.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Pred, Reg, f32_literal},
    fault::{Fault, Report},
    fold::{self, Fold},
    golden::Variant,
    parts::{
        self, constant, count, element, f32_op, kernel_of, ln, load, load_u32, load_vector, row, special, store_vector,
        strided,
    },
};
use crate::{dtype::DType, ops::cross_entropy::IGNORE, ptx, tensor::Tensor};

/// A chunk's logits [rows, v], F32 or Bf16, from a multiple of 16 bytes on.
#[derive(Clone, Debug)]
pub struct Logits {
    /// Where: a tensor or a launch's scratch.
    pub at: Arg,
    /// Element type.
    pub dtype: DType,
    /// Vocabulary.
    pub v: usize,
}

/// `nll` F32 \[rows\] = logsumexp(logits) - the target's logit in nats, 0 where the target is [`IGNORE`]; with a `scale`,
/// logits become scale times its gradient, 0 where ignored. A target of v or more is
/// told of, and its row left as it is.
pub fn softmax_rows(logits: Logits, targets: Tensor, nll: Arg, scale: Option<f64>) -> Vec<Launch> {
    let Logits { at, dtype, v } = logits;
    let rows = targets.len();
    if rows * v == 0 {
        return vec![];
    }
    let most = 16 / dtype.size_bytes();
    let aligned = match &at {
        Arg::Tensor(t) => parts::lanes(&[*t], v) > 1,
        _ => v.is_multiple_of(most),
    };
    let lanes = if aligned { most } else { 1 };
    let block = if v / lanes >= 1024 { 1024 } else { parts::BLOCK };
    let mut args = vec![at, Arg::Tensor(targets), nll, Arg::U32(count(v)), Arg::F32(scale.unwrap_or(0.0) as f32)];
    args.push(Arg::Fault(Fault::Target { vocabulary: count(v) }));
    vec![Launch { kernel: rows_kernel(dtype, lanes, block, scale.is_some()), grid: [count(rows), 1, 1], args }]
}

/// e^(x - m): 1 where they are equal.
fn power(k: &mut Assembler, x: Reg<F32>, m: Reg<F32>) -> Reg<F32> {
    let y = f32_op(k, "sub", x, m);
    ptx!(k, "mul.rn.f32 {y}, {y}, {};", f32_literal(std::f32::consts::LOG2_E));
    ptx!(k, "ex2.approx.ftz.f32 {y}, {y};");
    y
}

fn rows_kernel(dtype: DType, lanes: usize, block: u32, gradient: bool) -> Kernel {
    let what = if gradient { "cross_entropy_grad" } else { "cross_entropy" };
    kernel_of(format!("{what}_{}_x{lanes}_{block}", dtype.name()), block, move |k| {
        let [logits, targets, nll] = ["logits", "targets", "nll"].map(|n| k.pointer(n));
        let (v, scale, fault) = (k.u32("v"), k.f32("scale"), Report::param(k));
        let (tid, index, groups) = (special(k, "%tid.x"), special(k, "%ctaid.x"), k.reg::<B32>());
        ptx!(k, "shr.u32 {groups}, {v}, {};", lanes.trailing_zeros());
        let x = row(k, logits, index, v, dtype);
        let to_nll = element(k, nll, index, DType::F32);
        let target = load_u32(k, targets, index);
        let (counted, no, first) = (k.label("counted"), k.reg::<Pred>(), k.reg::<Pred>());
        ptx!(k, "setp.eq.u32 {first}, {tid}, 0;");
        ptx!(k, "setp.ne.u32 {no}, {target}, {};", IGNORE);
        ptx!(k, "@{no} bra {counted};");
        let zero = constant(k, 0.0);
        if gradient {
            strided(k, tid, groups, block, |k, group| {
                let at = group_at(k, x, group, lanes, dtype);
                store_vector(k, at, &vec![zero; lanes], dtype);
            });
        }
        ptx!(k, "@{first} st.global.f32 [{to_nll}], {zero};");
        ptx!(k, "ret;");
        k.place(&counted);
        ptx!(k, "setp.ge.u32 {no}, {target}, {v};");
        fault.tell(k, no, index, target);
        ptx!(k, "@{no} ret;");
        let at_target = element(k, x, target, dtype);
        let at_target = load(k, at_target, dtype);

        // Far below every logit that counts, and finite times log2 e.
        let (m, sum) = (constant(k, -1e38), constant(k, 0.0));
        strided(k, tid, groups, block, |k, group| {
            let at = group_at(k, x, group, lanes, dtype);
            let (x, largest) = (load_vector(k, at, dtype, lanes), k.reg::<F32>());
            ptx!(k, "mov.f32 {largest}, {m};");
            for x in &x {
                ptx!(k, "max.f32 {largest}, {largest}, {x};");
            }
            let rescale = power(k, m, largest);
            ptx!(k, "mul.rn.f32 {sum}, {sum}, {rescale};");
            ptx!(k, "mov.f32 {m}, {largest};");
            for x in x {
                let p = power(k, x, largest);
                ptx!(k, "add.rn.f32 {sum}, {sum}, {p};");
            }
        });
        let largest = k.reg::<F32>();
        ptx!(k, "mov.f32 {largest}, {m};");
        fold::block(k, largest, Fold::Max, block);
        let rescale = power(k, m, largest);
        ptx!(k, "mul.rn.f32 {sum}, {sum}, {rescale};");
        fold::block(k, sum, Fold::Sum, block);

        let loss = ln(k, sum);
        ptx!(k, "add.rn.f32 {loss}, {loss}, {largest};");
        ptx!(k, "sub.rn.f32 {loss}, {loss}, {at_target};");
        ptx!(k, "@{first} st.global.f32 [{to_nll}], {loss};");
        if gradient {
            ptx!(k, "div.rn.f32 {sum}, {scale}, {sum};");
            write_gradient(k, x, [tid, groups, target], [largest, sum, scale], (dtype, lanes, block));
        }
    })
}

fn group_at(k: &mut Assembler, base: Reg<B64>, group: Reg<B32>, lanes: usize, dtype: DType) -> Reg<B64> {
    let at = k.reg::<B64>();
    ptx!(k, "mad.wide.u32 {at}, {group}, {}, {base};", lanes * dtype.size_bytes());
    at
}

/// x = factor e^(x - largest), less scale at the target.
fn write_gradient(
    k: &mut Assembler,
    x: Reg<B64>,
    [tid, groups, target]: [Reg<B32>; 3],
    [largest, factor, scale]: [Reg<F32>; 3],
    (dtype, lanes, block): (DType, usize, u32),
) {
    strided(k, tid, groups, block, |k, group| {
        let at = group_at(k, x, group, lanes, dtype);
        let p: Vec<Reg<F32>> = load_vector(k, at, dtype, lanes)
            .into_iter()
            .map(|x| {
                let p = power(k, x, largest);
                f32_op(k, "mul", p, factor)
            })
            .collect();
        let (first, offset, elsewhere, here) = (k.reg::<B32>(), k.reg::<B32>(), k.label("elsewhere"), k.reg::<Pred>());
        ptx!(k, "mul.lo.u32 {first}, {group}, {lanes};");
        ptx!(k, "sub.u32 {offset}, {target}, {first};");
        ptx!(k, "setp.ge.u32 {here}, {offset}, {lanes};");
        ptx!(k, "@{here} bra {elsewhere};");
        for (i, p) in p.iter().enumerate() {
            ptx!(k, "setp.eq.u32 {here}, {offset}, {i};");
            ptx!(k, "@{here} sub.rn.f32 {p}, {p}, {scale};");
        }
        k.place(&elsewhere);
        store_vector(k, at, &p, dtype);
    });
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    let mut all = vec![];
    for ((dtype, lanes), block) in [(DType::Bf16, 8), (DType::F32, 4)].into_iter().flat_map(|d| [(d, 256), (d, 1024)]) {
        all.extend([false, true].map(|gradient| rows_kernel(dtype, lanes, block, gradient)));
    }
    all.into_iter().map(|kernel| Variant::new(kernel, 32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::Device,
        memory::Memory,
        ops::cross_entropy as cpu,
        ptx::{
            case::{Case, Data, values},
            testing::calc_diff,
        },
    };

    /// Losses and gradients in f64.
    fn reference(x: &[f64], targets: &[f64], v: usize, scale: f64) -> (Vec<f64>, Vec<f64>) {
        let rows = x.chunks(v).zip(targets).map(|(x, &target)| {
            if target == f64::from(IGNORE) {
                return (0.0, vec![0.0; v]);
            }
            let max = x.iter().fold(f64::NEG_INFINITY, |a, b| a.max(*b));
            let sum: f64 = x.iter().map(|x| (x - max).exp()).sum();
            let mut p: Vec<f64> = x.iter().map(|x| (x - max).exp() / sum * scale).collect();
            p[target as usize] -= scale;
            (sum.ln() + max - x[target as usize], p)
        });
        let (nll, p): (Vec<f64>, Vec<Vec<f64>>) = rows.unzip();
        (nll, p.concat())
    }

    fn targets(rows: usize, v: usize) -> Data {
        let ids: Vec<u32> = (0..rows as u32).map(|i| if i % 4 == 1 { IGNORE } else { i * 77 % v as u32 }).collect();
        Data::u32(&[rows], &ids)
    }

    #[test]
    fn losses_and_gradients_are_those_of_f64() {
        for dtype in [DType::F32, DType::Bf16] {
            for (rows, v, size) in [(0, 8, 1.0), (5, 6, 3.0), (4, 256, 20.0), (3, 1000, 5.0), (2, 8200, 8.0)] {
                for scale in [None, Some(0.5)] {
                    let logits = Data::random(dtype, &[rows, v], 1).map(|x| size * x);
                    let m = Memory::new(Device::Cpu);
                    let rounded = values(&m, logits.upload(&m));
                    let targets = targets(rows, v);
                    let (nll, grad) = reference(&rounded, &targets.2, v, scale.unwrap_or_default());
                    let want = if scale.is_some() { grad } else { rounded };
                    let case = Case::new(&[logits, targets, Data::poison(DType::F32, &[rows])])
                        .want(|x| vec![want, x[1].clone(), nll])
                        .ptx(|x| {
                            softmax_rows(Logits { at: Arg::Tensor(x[0]), dtype, v }, x[1], Arg::Tensor(x[2]), scale)
                        });
                    if dtype == DType::F32 && rows > 0 {
                        assert!(calc_diff(&case.got[0], &case.want[0]) < 1e-12);
                    }
                    case.close(1e-6);
                }
            }
        }
    }

    #[test]
    fn each_barrier_is_needed() {
        let inputs = [Data::random(DType::F32, &[1, 2000], 1), Data::u32(&[1], &[3]), Data::poison(DType::F32, &[1])];
        let launches = |x: &[Tensor]| {
            softmax_rows(
                Logits { at: Arg::Tensor(x[0]), dtype: DType::F32, v: 2000 },
                x[1],
                Arg::Tensor(x[2]),
                Some(1.0),
            )
        };
        Case::new(&inputs).ptx(launches).mutants("bar.sync", launches);
    }

    #[test]
    fn it_is_what_the_cpu_does_between_its_products() {
        // With the identity as the head, logits are h, and the gradient of h is that of the logits.
        let (t, v) = (9, 12);
        let identity: Vec<f32> = (0..v * v).map(|i| f32::from(i % (v + 1) == 0)).collect();
        let h = Data::random(DType::F32, &[t, v], 1).map(|x| 4.0 * x);
        Case::new(&[h, targets(t, v), Data::poison(DType::F32, &[t])])
            .cpu(|s, x| {
                let m = s.memory().clone();
                let (w, dh) = (m.from_slice(&[v, v], &identity), m.alloc(DType::F32, &[t, v]));
                let passes = cpu::Passes { nll: Some(x[2]), dh: Some(dh), dw: None };
                cpu::run(s, x[0], w, x[1], 0.25, passes)?;
                crate::ops::elementwise::copy(s, dh, x[0])
            })
            .ptx(|x| {
                softmax_rows(
                    Logits { at: Arg::Tensor(x[0]), dtype: DType::F32, v },
                    x[1],
                    Arg::Tensor(x[2]),
                    Some(0.25),
                )
            })
            .close(1e-6);
    }

    #[test]
    fn masked_logits_have_no_probability_and_wrong_targets_are_told_of() {
        let run = |logits: [f64; 4], target| {
            let x = [
                Data(DType::F32, vec![1, 4], logits.to_vec()),
                Data::u32(&[1], &[target]),
                Data::poison(DType::F32, &[1]),
            ];
            Case::new(&x).run(1, |_, x| {
                softmax_rows(
                    Logits { at: Arg::Tensor(x[0]), dtype: DType::F32, v: 4 },
                    x[1],
                    Arg::Tensor(x[2]),
                    Some(1.0),
                )
            })
        };
        let minus = f64::NEG_INFINITY;
        let certain = run([minus, 3.0, minus, minus], 1).unwrap_or_default();
        assert_eq!(certain[0], [0.0; 4]);
        assert!(certain[2][0].abs() < 3e-7, "{certain:?}");
        assert!(run([0.0, f64::NAN, 0.0, 0.0], 0).is_ok_and(|x| x[2][0].is_nan()));
        let said = "task `set-up` failed on stream `test`: expected a target below the vocabulary of 4, found 4";
        assert_eq!(run([0.0; 4], 4), Err(said.into()));
    }

    #[test]
    fn a_target_past_the_vocabulary_is_told_of_as_by_the_cpu() {
        let h = [Data::random(DType::F32, &[2, 4], 1), Data::random(DType::F32, &[4, 4], 2)];
        Case::new(&[&h[..], &[Data::u32(&[2], &[1, 9]), Data::poison(DType::F32, &[2])]].concat()).same_error(
            |s, x| cpu::run(s, x[0], x[1], x[2], 1.0, cpu::Passes { nll: Some(x[3]), dh: None, dw: None }),
            |_, x| {
                let logits = Logits { at: Arg::Tensor(x[0]), dtype: DType::F32, v: 4 };
                softmax_rows(logits, x[2], Arg::Tensor(x[3]), None)
            },
        );
    }
}
