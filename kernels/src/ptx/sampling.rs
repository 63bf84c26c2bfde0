//! Choosing the next token: a block a row, the row read again for each bit that is looked for.
//!
//! Signature: (logits, draws, tokens, v: u32, index_bits: u32, fault); draws, F64 [n, 5], is what `draws` makes on the host: 1 /
//! temperature (0: the most likely), top_k (v: all), top_p, ln min_p, and the row's uniform number. They are bytes of the launch,
//! since they are others in each.
//!
//! Nothing is sorted. Logits map to integers of the same order; the last token kept by top_k, the last kept by top_p and the
//! drawn one are each found from the highest bit on: a bit stays set if the tokens from there up are still enough, by count or
//! by weight (f64, thread by thread and warp by warp in one order). The last kept by min_p is found in the same way, and without
//! reading the row, since it follows from the largest logit: the same tokens are kept as on the CPU, to the bit. Of equal logits,
//! the place among them is found in the same way by token id. So a row takes at most 3 (bits of a logit + bits of v) readings, from
//! L2: 100 us or so for a vocabulary of 128 Ki; greedy rows take one.
//!
//! Weights are e^((x - max) / T) by [`super::parts::exp`], so a draw may differ from the CPU op's where u falls within 1e-6 of
//! the border of two tokens. A row with NaN, with infinity, or with nothing above minus infinity is told of, and has no token.

mod row;

use rand::RngExt as _;

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, F64, Pred, Reg, f64_literal},
    fault::{Fault, Report},
    golden::Variant,
    parts::{count, element, kernel_of, load_f64, special},
};
use crate::{
    dtype::DType,
    ops::{gate::counter_rng, sampling::Sampling},
    ptx,
    tensor::Tensor,
};
use row::{Row, Tokens, Weight, argmax, quotient};

/// What the kernel reads of each row's sampling: five numbers a row, over a vocabulary of v.
fn draws(rows: &[Sampling], v: usize) -> Vec<f64> {
    let one = |s: &Sampling| {
        let top_k = if s.top_k == 0 { v } else { s.top_k.min(v) };
        let u: f64 = counter_rng(s.seed, 0, s.position).random();
        [s.inverse().unwrap_or(0.0), top_k as f64, s.top_p, s.floor(), u]
    };
    rows.iter().flat_map(one).collect()
}

/// Assigns to tokens, U32 `[n]`, a choice from each row of logits [n, v], F32 or Bf16.
pub fn forward(logits: Tensor, rows: &[Sampling], tokens: Tensor) -> Vec<Launch> {
    let (n, v) = (logits.rows(), logits.cols());
    if logits.is_empty() {
        return vec![];
    }
    let block = match v {
        0..=1024 => 32,
        1025..=16384 => 256,
        _ => 1024,
    };
    let draws: Vec<u8> = draws(rows, v).into_iter().flat_map(f64::to_ne_bytes).collect();
    let mut args = vec![Arg::Tensor(logits), Arg::Bytes(draws.into()), Arg::Tensor(tokens)];
    args.extend([Arg::U32(count(v)), Arg::U32(usize::BITS - v.leading_zeros()), Arg::Fault(Fault::SampledLogits)]);
    vec![Launch { kernel: forward_kernel(logits.dtype, block), grid: [count(n), 1, 1], args }]
}

fn forward_kernel(dtype: DType, block: u32) -> Kernel {
    kernel_of(format!("sampling_{}_{block}", dtype.name()), block, move |k| {
        let [logits, draws, tokens] = ["logits", "draws", "tokens"].map(|n| k.pointer(n));
        let (v, index_bits, fault) = (k.u32("v"), k.u32("index_bits"), Report::param(k));
        let (tid, n, chosen) = (special(k, "%tid.x"), special(k, "%ctaid.x"), k.reg::<B32>());
        let logits = super::parts::row(k, logits, n, v, dtype);
        let (max, inverse, store, drawing) = (k.reg::<F32>(), k.reg::<F32>(), k.label("store"), k.reg::<Pred>());
        let r = Row { logits, dtype, v, tid, block, max, inverse };
        let (best, largest, unusable) = argmax(k, r);
        let bits = k.reg::<B32>();
        ptx!(k, "mov.b32 {bits}, {largest};");
        fault.tell(k, unusable, n, bits);
        ptx!(k, "@{unusable} ret;");
        ptx!(k, "mov.f32 {max}, {largest};");
        ptx!(k, "mov.u32 {chosen}, {best};");
        let five = special(k, "5");
        let at = super::parts::row(k, draws, n, five, DType::F64);
        let [inverse_t, top_k, top_p, floor, u] = [0, 8, 16, 24, 32].map(|offset| {
            let from = k.reg::<B64>();
            ptx!(k, "add.u64 {from}, {at}, {offset};");
            load_f64(k, from, DType::F64)
        });
        ptx!(k, "cvt.rn.f32.f64 {inverse}, {inverse_t};");
        ptx!(k, "setp.eq.f64 {drawing}, {inverse_t}, 0d0000000000000000;");
        ptx!(k, "@{drawing} bra {store};");

        let (all, part, more) = (k.reg::<F64>(), k.label("part"), k.reg::<Pred>());
        ptx!(k, "cvt.rn.f64.u32 {all}, {v};");
        ptx!(k, "setp.lt.f64 {more}, {top_k}, {all};");
        ptx!(k, "@{more} bra {part};");
        ptx!(k, "setp.lt.f64 {more}, {top_p}, {};", f64_literal(1.0));
        ptx!(k, "@{more} bra {part};");
        ptx!(k, "setp.gt.f64 {more}, {floor}, {};", f64_literal(f64::NEG_INFINITY));
        ptx!(k, "@{more} bra {part};");
        // All tokens, in the order of their ids: the last before which u of the weight does not lie.
        let target = r.total(k, Tokens::IdBelow(None), v, Weight::Probability);
        ptx!(k, "mul.rn.f64 {target}, {target}, {u};");
        let id = r.search(k, index_bits, Tokens::IdBelow(None), Weight::Probability, "le", target);
        choose(k, chosen, id, v);
        ptx!(k, "bra {store};");

        k.place(&part);
        draw_from_part(k, r, [top_k, top_p, floor, u], index_bits, chosen);
        k.place(&store);
        let other = k.reg::<Pred>();
        let to = element(k, tokens, n, DType::U32);
        ptx!(k, "setp.ne.u32 {other}, {tid}, 0;");
        ptx!(k, "@!{other} st.global.u32 [{to}], {chosen};");
    })
}

/// A token that exists; the most likely stays chosen where rounding led past the end.
fn choose(k: &mut Assembler, chosen: Reg<B32>, id: Reg<B32>, v: Reg<B32>) {
    let exists = k.reg::<Pred>();
    ptx!(k, "setp.lt.u32 {exists}, {id}, {v};");
    ptx!(k, "selp.b32 {chosen}, {id}, {chosen}, {exists};");
}

/// A draw from the most likely tokens, most likely first.
fn draw_from_part(
    k: &mut Assembler,
    r: Row,
    [top_k, top_p, floor, u]: [Reg<F64>; 4],
    index_bits: Reg<B32>,
    chosen: Reg<B32>,
) {
    let key_bits = special(k, &r.key_bits().to_string());
    // The last kept key, how much weight is above it, and how many tokens of it are kept.
    let (last, ties, above) = (k.reg::<B32>(), k.reg::<F64>(), k.reg::<F64>());
    let key = r.search(k, key_bits, Tokens::KeyFrom, Weight::One, "ge", top_k);
    ptx!(k, "mov.u32 {last}, {key};");
    let before = r.above(k, key, Weight::One);
    ptx!(k, "sub.rn.f64 {ties}, {top_k}, {before};");
    let mass = r.above(k, key, Weight::Probability);
    ptx!(k, "mov.f64 {above}, {mass};");
    let kept = |k: &mut Assembler| {
        let (x, total) = (r.logit(k, last), k.reg::<F64>());
        let w = r.weight(k, x);
        ptx!(k, "fma.rn.f64 {total}, {ties}, {w}, {above};");
        (total, w)
    };
    let (whole, all) = (k.label("whole"), k.reg::<Pred>());
    ptx!(k, "setp.ge.f64 {all}, {top_p}, {};", f64_literal(1.0));
    ptx!(k, "@{all} bra {whole};");
    // The smallest set that reaches top_p of that.
    let wanted = kept(k).0;
    ptx!(k, "mul.rn.f64 {wanted}, {wanted}, {top_p};");
    let key = r.search(k, key_bits, Tokens::KeyFrom, Weight::Probability, "ge", wanted);
    let (same, unlimited) = (k.reg::<Pred>(), k.reg::<F64>());
    ptx!(k, "setp.eq.u32 {same}, {key}, {last};");
    ptx!(k, "cvt.rn.f64.u32 {unlimited}, {};", r.v);
    ptx!(k, "selp.f64 {ties}, {ties}, {unlimited}, {same};");
    ptx!(k, "max.u32 {last}, {last}, {key};");
    let mass = r.above(k, last, Weight::Probability);
    ptx!(k, "mov.f64 {above}, {mass};");
    let (w, needed) = (kept(k).1, k.reg::<F64>());
    ptx!(k, "sub.rn.f64 {needed}, {wanted}, {above};");
    let needed = quotient(k, needed, w);
    ptx!(k, "cvt.rpi.f64.f64 {needed}, {needed};");
    ptx!(k, "max.f64 {needed}, {needed}, {};", f64_literal(1.0));
    ptx!(k, "min.f64 {ties}, {ties}, {needed};");
    k.place(&whole);
    // Of that, what is not below the floor; all tokens of the last key, if that is another.
    let (drawing, higher) = (k.label("drawing"), k.reg::<Pred>());
    ptx!(k, "setp.le.f64 {all}, {floor}, {};", f64_literal(f64::NEG_INFINITY));
    ptx!(k, "@{all} bra {drawing};");
    let key = r.lowest(k, floor);
    ptx!(k, "setp.gt.u32 {higher}, {key}, {last};");
    ptx!(k, "@!{higher} bra {drawing};");
    ptx!(k, "mov.u32 {last}, {key};");
    let (from, mass) = (r.total(k, Tokens::KeyFrom, last, Weight::One), r.above(k, last, Weight::One));
    ptx!(k, "sub.rn.f64 {ties}, {from}, {mass};");
    let mass = r.above(k, last, Weight::Probability);
    ptx!(k, "mov.f64 {above}, {mass};");
    k.place(&drawing);
    // The drawn key, and which of its tokens.
    let target = kept(k).0;
    ptx!(k, "mul.rn.f64 {target}, {target}, {u};");
    let key = r.search(k, key_bits, Tokens::KeyFrom, Weight::Probability, "gt", target);
    let (drawn, nth, one) = (k.reg::<Pred>(), k.reg::<F64>(), k.reg::<F64>());
    ptx!(k, "setp.eq.u32 {drawn}, {key}, {last};");
    ptx!(k, "max.u32 {key}, {key}, {last};");
    let mass = r.above(k, key, Weight::Probability);
    let x = r.logit(k, key);
    let w = r.weight(k, x);
    ptx!(k, "sub.rn.f64 {nth}, {target}, {mass};");
    let nth = quotient(k, nth, w);
    ptx!(k, "cvt.rmi.f64.f64 {nth}, {nth};");
    ptx!(k, "mov.f64 {one}, {};", f64_literal(1.0));
    ptx!(k, "add.rn.f64 {nth}, {nth}, {one};");
    ptx!(k, "max.f64 {nth}, {nth}, {one};");
    // Of the last key, only as many as are kept; of another, rounding may lead past the last by one at most.
    let (limit, from) = (k.reg::<F64>(), r.total(k, Tokens::KeyFrom, key, Weight::One));
    let before = r.above(k, key, Weight::One);
    ptx!(k, "sub.rn.f64 {from}, {from}, {before};");
    ptx!(k, "selp.f64 {limit}, {ties}, {from}, {drawn};");
    ptx!(k, "min.f64 {nth}, {nth}, {limit};");
    let id = r.search(k, index_bits, Tokens::IdBelow(Some(key)), Weight::One, "lt", nth);
    choose(k, chosen, id, r.v);
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    let all =
        [DType::F32, DType::Bf16].into_iter().flat_map(|dtype| [256, 1024].map(|block| forward_kernel(dtype, block)));
    all.map(|kernel| Variant::new(kernel, 48)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::sampling as cpu,
        ptx::case::{Case, Data},
    };

    const FREE: Sampling = Sampling { temperature: 1.0, top_k: 0, top_p: 1.0, min_p: 0.0, seed: 7, position: 0 };

    fn check(logits: Data, rows: &[Sampling]) {
        Case::new(&[logits, Data::poison(DType::U32, &[rows.len()])])
            .cpu(|s, x| cpu::forward(s, x[0], rows, x[1]))
            .ptx(|x| forward(x[0], rows, x[1]))
            .equal();
    }

    #[test]
    fn tokens_are_the_cpus() {
        let mut rows = vec![Sampling::GREEDY];
        let kept = [(0, 1.0), (5, 1.0), (0, 0.7), (9, 0.5), (1, 1.0), (0, 0.0), (99, 0.999), (3, 0.1)];
        let kept = kept.map(|(top_k, top_p)| (top_k, top_p, 0.0));
        let shares = [
            (0, 1.0, 0.1),
            (0, 1.0, 0.5),
            (0, 1.0, 1.0),
            (6, 1.0, 0.2),
            (0, 0.6, 0.02),
            (9, 0.9, 0.3),
            (0, 1.0, 1e-30),
        ];
        for (i, (top_k, top_p, min_p)) in kept.into_iter().chain(shares).enumerate() {
            rows.extend([0.7, 2.0].map(|temperature| Sampling {
                temperature,
                top_k,
                top_p,
                min_p,
                position: i as u64,
                ..FREE
            }));
        }
        for dtype in [DType::F32, DType::Bf16] {
            let logits = Data::random(dtype, &[rows.len(), 37], 3).map(|x| 4.0 * x);
            check(logits.clone(), &rows);
            // Few values, so that most are equal to others.
            check(logits.clone().map(|x| (x / 2.0).round()), &rows);
            // Forbidden tokens, which no temperature lets in.
            let forbidden = |x: f64| if x < 1.0 { f64::NEG_INFINITY } else { x };
            check(logits.clone().map(forbidden), &rows);
            let hot: Vec<Sampling> = rows.iter().map(|row| Sampling { temperature: 1e300, ..*row }).collect();
            check(logits.map(forbidden), &hot);
        }
    }

    #[test]
    fn what_min_p_keeps_is_what_the_cpu_keeps() {
        // Neighbouring numbers around the border, of which one rounding more or less would keep others.
        for dtype in [DType::F32, DType::Bf16] {
            let step = if dtype == DType::F32 { 2e-7 } else { 0.01 };
            let row: Vec<f64> = (0..37).map(|i| 1.3 + (i % 2 * 700 + i) as f64 * step).collect();
            let rows: Vec<Sampling> = (0..48)
                .map(|i| {
                    let share = (-700.0 * step + (i % 12) as f64 * step / 3.0).exp();
                    Sampling { min_p: share, temperature: 0.9, position: i, ..FREE }
                })
                .collect();
            check(Data(dtype, vec![rows.len(), 37], row.repeat(rows.len())), &rows);
        }
    }

    #[test]
    fn long_rows_are_shared_by_a_block() {
        let rows = [
            Sampling::GREEDY,
            Sampling { top_k: 300, top_p: 0.9, ..FREE },
            Sampling { min_p: 0.05, top_p: 0.9, ..FREE },
        ];
        check(Data::random(DType::Bf16, &[3, 1025], 5).map(|x| 4.0 * x), &rows);
    }

    #[test]
    fn each_barrier_is_needed() {
        let rows = [
            Sampling { top_k: 300, top_p: 0.9, ..FREE },
            Sampling { seed: 8, ..FREE },
            // The border is at a logit of 3 where the largest is 4.
            Sampling { min_p: (-1f64).exp(), seed: 9, ..FREE },
        ];
        let mut logits = Data::random(DType::Bf16, &[3, 1026], 5).map(|x| 4.0 * x);
        // Many at the border, so that it matters how many there are.
        logits.2[2 * 1026..].iter_mut().for_each(|x| *x = x.round());
        let case = Case::new(&[logits, Data::poison(DType::U32, &[3])]);
        let launches = |x: &[Tensor]| forward(x[0], &rows, x[1]);
        case.mutants("bar.sync", launches);
    }

    #[test]
    fn the_first_of_the_largest_is_taken_and_what_is_no_number_is_told_of() {
        let minus = f64::NEG_INFINITY;
        for dtype in [DType::F32, DType::Bf16] {
            check(Data(dtype, vec![1, 4], vec![0.0, -0.0, minus, -1.0]), &[Sampling::GREEDY]);
            for bad in [[minus; 4], [1.0, f64::NAN, 2.0, 3.0], [1.0, f64::INFINITY, 2.0, 3.0]] {
                let x = [[1.0, 3.0, 2.0, 0.0], bad].concat();
                let case = Case::new(&[Data(dtype, vec![2, 4], x), Data::poison(DType::U32, &[2])]);
                for sampling in [Sampling::GREEDY, FREE] {
                    let rows = [sampling; 2];
                    case.same_error(|s, x| cpu::forward(s, x[0], &rows, x[1]), |_, x| forward(x[0], &rows, x[1]));
                }
            }
        }
    }
}
