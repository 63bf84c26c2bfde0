//! Token embedding: F copies rows; W adds each token's gradient to its row, in token order, without atomics.
//!
//! F: (tokens, w, y, n: u32 groups, groups a row, d, v, fault): one thread a group of neighbouring elements. Reads and writes t d
//! elements.
//!
//! W in two launches, by way of scratch 0: `order`, u32 [t, 2], the tokens and their positions in a stable sort by token.
//! `rank` (tokens, order, t, v, fault): the place of a position is the number of smaller tokens and of earlier equal ones, counted by
//! one thread over all t (t^2 comparisons of integers; shared memory holds [`parts::BLOCK`] tokens at a time, with barriers
//! before and after each tile is written). `gather` (order, dy, dw, t, d, v): block (r, c) is idle unless place r is the first of
//! its token; then each thread adds up its columns over the token's places, four at a time so that their loads are on their way
//! together, in f32, and rounds once. Reads t d elements of dy, and of dw those that are written. A token of v or more is told of, and left out.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Pred, Reg},
    fault::{Fault, Report},
    golden::Variant,
    parts::{
        self, BLOCK, copy_bits, count, div_rem, element, flat, flat_grid, global_index, load_u32, load_vector,
        return_past, special, store_vector, strided,
    },
};
use crate::{dtype::DType, ptx, tensor::Tensor};

/// F: rows of `w` [v, d] chosen by `tokens` u32 \[t\] -> `y` [t, d].
pub fn forward(tokens: Tensor, w: Tensor, y: Tensor) -> Vec<Launch> {
    let (t, v, d) = (tokens.len(), w.dim(0), w.dim(1));
    let lanes = parts::lanes(&[w, y], d);
    let (groups, per_row) = (t * d / lanes, d / lanes);
    if groups == 0 {
        return vec![];
    }
    let mut args = vec![Arg::Tensor(tokens), Arg::Tensor(w), Arg::Tensor(y)];
    args.extend([groups, per_row, d, v].map(|n| Arg::U32(count(n))));
    args.push(Arg::Fault(Fault::Token { vocabulary: count(v) }));
    vec![Launch { kernel: forward_kernel(w.dtype.size_bytes(), lanes), grid: flat_grid(groups, 1), args }]
}

/// W: `dw` [v, d] += `dy` [t, d] at the rows of `tokens`, in token order; dw may be wider than dy.
pub fn weight_grad(tokens: Tensor, dy: Tensor, dw: Tensor) -> Vec<Launch> {
    let (t, v, d) = (tokens.len(), dw.dim(0), dw.dim(1));
    if t * d == 0 {
        return vec![];
    }
    let lanes = parts::lanes(&[dy, dw], d);
    let order = Arg::Scratch { slot: 0, bytes: 8 * t as u64 };
    let columns = count(d / lanes).div_ceil(BLOCK);
    vec![
        Launch {
            kernel: rank_kernel(),
            grid: flat_grid(t, 1),
            args: vec![
                Arg::Tensor(tokens),
                order.clone(),
                Arg::U32(count(t)),
                Arg::U32(count(v)),
                Arg::Fault(Fault::Token { vocabulary: count(v) }),
            ],
        },
        Launch {
            kernel: gather_kernel(dy.dtype, dw.dtype, lanes),
            grid: [count(t), columns, 1],
            args: [order, Arg::Tensor(dy), Arg::Tensor(dw)]
                .into_iter()
                .chain([t, d, v].map(|n| Arg::U32(count(n))))
                .collect(),
        },
    ]
}

fn forward_kernel(elem_bytes: usize, lanes: usize) -> Kernel {
    parts::kernel(format!("embedding_forward_b{}_x{lanes}", 8 * elem_bytes), move |k| {
        let (tokens, w, y) = (k.pointer("tokens"), k.pointer("w"), k.pointer("y"));
        let (n, per_row, d, v) = (k.u32("n"), k.u32("per_row"), k.u32("d"), k.u32("v"));
        let fault = Report::param(k);
        flat(k, n, 1, |k, i, _| {
            let (row, group) = div_rem(k, i, per_row);
            let (token, wrong) = (load_u32(k, tokens, row), k.reg::<Pred>());
            ptx!(k, "setp.ge.u32 {wrong}, {token}, {v};");
            fault.tell(k, wrong, row, token);
            ptx!(k, "@{wrong} ret;");
            let (from, to) = (k.reg::<B64>(), k.reg::<B64>());
            let bytes = elem_bytes * lanes;
            for (at, row, base) in [(from, token, w), (to, row, y)] {
                ptx!(k, "mul.wide.u32 {at}, {row}, {d};");
                ptx!(k, "mad.lo.u64 {at}, {at}, {elem_bytes}, {base};");
                ptx!(k, "mad.wide.u32 {at}, {group}, {bytes}, {at};");
            }
            copy_bits(k, from, to, elem_bytes, lanes);
        });
    })
}

fn rank_kernel() -> Kernel {
    parts::kernel("embedding_rank".into(), move |k| {
        let (tokens, order, t, v) = (k.pointer("tokens"), k.pointer("order"), k.u32("t"), k.u32("v"));
        let fault = Report::param(k);
        let tile = k.shared(16, "tile", 4 * BLOCK as usize);
        let (i, tid, place) = (global_index(k), special(k, "%tid.x"), special(k, "0"));
        let (outside, token, wrong) = (k.reg::<Pred>(), k.reg::<B32>(), k.reg::<Pred>());
        ptx!(k, "setp.ge.u32 {outside}, {i}, {t};");
        // Past the end, a token that is larger than all and counts for none.
        ptx!(k, "mov.u32 {token}, 0xffffffff;");
        let own = element(k, tokens, i, DType::U32);
        ptx!(k, "@!{outside} ld.global.u32 {token}, [{own}];");
        ptx!(k, "setp.lt.u32 {wrong}, {i}, {t};");
        ptx!(k, "setp.ge.and.u32 {wrong}, {token}, {v}, {wrong};");
        fault.tell(k, wrong, i, token);
        let (zero, at) = (special(k, "0"), k.reg::<B32>());
        ptx!(k, "mov.u32 {at}, {tile};");
        let mine = k.reg::<B32>();
        ptx!(k, "mad.lo.u32 {mine}, {tid}, 4, {at};");
        strided(k, zero, t, BLOCK, |k, first| {
            let (j, past, other) = (k.reg::<B32>(), k.reg::<Pred>(), k.reg::<B32>());
            ptx!(k, "add.u32 {j}, {first}, {tid};");
            ptx!(k, "setp.ge.u32 {past}, {j}, {t};");
            ptx!(k, "mov.u32 {other}, 0xffffffff;");
            let from = element(k, tokens, j, DType::U32);
            ptx!(k, "@!{past} ld.global.u32 {other}, [{from}];");
            ptx!(k, "bar.sync 0;");
            ptx!(k, "st.shared.u32 [{mine}], {other};");
            ptx!(k, "bar.sync 0;");
            // Before i, equal tokens count; from i on, only smaller ones: past the end there is none of either.
            let (c, at_c, end) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<B32>());
            ptx!(k, "mov.u32 {c}, {first};");
            ptx!(k, "mov.u32 {at_c}, {at};");
            ptx!(k, "add.u32 {end}, {first}, {BLOCK};");
            strided(k, c, end, 4, |k, c| {
                let four = k.regs::<B32>(4);
                ptx!(k, "ld.shared.v4.u32 {}, [{at_c}];", super::asm::vector(&four));
                ptx!(k, "add.u32 {at_c}, {at_c}, 16;");
                for (step, other) in four.into_iter().enumerate() {
                    let (before, counts, j) = (k.reg::<Pred>(), k.reg::<Pred>(), k.reg::<B32>());
                    ptx!(k, "add.u32 {j}, {c}, {step};");
                    ptx!(k, "setp.lt.u32 {before}, {j}, {i};");
                    ptx!(k, "setp.eq.and.u32 {counts}, {other}, {token}, {before};");
                    ptx!(k, "setp.lt.or.u32 {counts}, {other}, {token}, {counts};");
                    ptx!(k, "@{counts} add.u32 {place}, {place}, 1;");
                }
            });
        });
        let to = k.reg::<B64>();
        ptx!(k, "mad.wide.u32 {to}, {place}, 8, {order};");
        ptx!(k, "@!{outside} st.global.v2.u32 [{to}], {{{token}, {i}}};");
    })
}

/// Token and position of a place.
fn load_place(k: &mut Assembler, order: Reg<B64>, place: Reg<B32>) -> (Reg<B32>, Reg<B32>) {
    let (at, token, position) = (k.reg::<B64>(), k.reg::<B32>(), k.reg::<B32>());
    ptx!(k, "mad.wide.u32 {at}, {place}, 8, {order};");
    ptx!(k, "ld.global.v2.u32 {{{token}, {position}}}, [{at}];");
    (token, position)
}

fn gather_kernel(from: DType, to: DType, lanes: usize) -> Kernel {
    parts::kernel(format!("embedding_gather_{}_{}_x{lanes}", from.name(), to.name()), move |k| {
        let (order, dy, dw) = (k.pointer("order"), k.pointer("dy"), k.pointer("dw"));
        let (t, d, v) = (k.u32("t"), k.u32("d"), k.u32("v"));
        let (place, column, tid) = (special(k, "%ctaid.x"), special(k, "%ctaid.y"), special(k, "%tid.x"));
        ptx!(k, "mad.lo.u32 {column}, {column}, {BLOCK}, {tid};");
        ptx!(k, "mul.lo.u32 {column}, {column}, {lanes};");
        return_past(k, column, d);
        let (token, own) = load_place(k, order, place);
        return_past(k, token, v);
        let (first, before, same) = (k.label("first"), k.reg::<B32>(), k.reg::<Pred>());
        ptx!(k, "setp.eq.u32 {same}, {place}, 0;");
        ptx!(k, "@{same} bra {first};");
        ptx!(k, "sub.u32 {before}, {place}, 1;");
        let (earlier, _) = load_place(k, order, before);
        ptx!(k, "setp.eq.u32 {same}, {earlier}, {token};");
        ptx!(k, "@{same} ret;");
        k.place(&first);
        let at = parts::row(k, dw, token, d, to);
        let at = element(k, at, column, to);
        let sum = load_vector(k, at, to, lanes);
        let (next, last) = (k.label("next"), k.reg::<B32>());
        ptx!(k, "sub.u32 {last}, {t}, 1;");
        k.place(&next);
        // Of four places those that are the token's; for others its first row is read again, and not added.
        let places: Vec<(Reg<Pred>, Reg<B32>)> = (0..4)
            .map(|i| {
                let (this, bounded, counts) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<Pred>());
                ptx!(k, "add.u32 {this}, {place}, {i};");
                ptx!(k, "min.u32 {bounded}, {this}, {last};");
                let (other, position) = load_place(k, order, bounded);
                ptx!(k, "setp.eq.u32 {counts}, {other}, {token};");
                ptx!(k, "setp.lt.and.u32 {counts}, {this}, {t}, {counts};");
                ptx!(k, "selp.b32 {position}, {position}, {own}, {counts};");
                (counts, position)
            })
            .collect();
        let rows: Vec<Vec<Reg<F32>>> = places
            .iter()
            .map(|(_, position)| {
                let row = parts::row(k, dy, *position, d, from);
                let row = element(k, row, column, from);
                load_vector(k, row, from, lanes)
            })
            .collect();
        for ((counts, _), x) in places.iter().zip(rows) {
            for (sum, x) in sum.iter().zip(x) {
                ptx!(k, "@{counts} add.rn.f32 {sum}, {sum}, {x};");
            }
        }
        ptx!(k, "add.u32 {place}, {place}, 4;");
        ptx!(k, "@{} bra {next};", places[3].0);
        store_vector(k, at, &sum, to);
    })
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    use DType::{Bf16, F32};
    let mut all = vec![forward_kernel(2, 8), forward_kernel(4, 4), rank_kernel()];
    all.extend([(Bf16, Bf16, 8), (F32, F32, 4), (Bf16, F32, 8)].map(|(a, b, n)| gather_kernel(a, b, n)));
    all.into_iter().map(|kernel| Variant::new(kernel, 48)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::embedding as cpu,
        ptx::case::{Case, Data},
    };

    fn tokens(t: usize, v: usize) -> Data {
        // Some often, some never.
        Data::random(DType::U32, &[t], 3).map(|x| ((x * x * x).abs() * v as f64).floor())
    }

    #[test]
    fn rows_are_chosen_and_gradients_are_added_in_token_order() {
        for (t, v, d) in [(0, 5, 8), (1, 1, 8), (300, 40, 24), (7, 600, 5), (513, 9, 8), (20, 9, 2056)] {
            for dtype in [DType::F32, DType::Bf16] {
                Case::new(&[tokens(t, v), Data::random(dtype, &[v, d], 1), Data::poison(dtype, &[t, d])])
                    .cpu(|s, x| cpu::forward(s, x[0], x[1], x[2]))
                    .ptx(|x| forward(x[0], x[1], x[2]))
                    .equal();
            }
            let f32s = [tokens(t, v), Data::random(DType::F32, &[t, d], 1), Data::random(DType::F32, &[v, d], 2)];
            Case::new(&f32s)
                .cpu(|s, x| cpu::weight_grad(s, x[0], x[1], x[2]))
                .ptx(|x| weight_grad(x[0], x[1], x[2]))
                .equal();
        }
    }

    #[test]
    fn a_gradient_of_bf16_is_summed_in_f32() {
        let (t, v, d) = (64, 3, 16);
        let eighths = |x: f64| (8.0 * x).round() / 8.0;
        for to in [DType::F32, DType::Bf16] {
            // Multiples of 1/8: every sum is exact in f32.
            let dy = Data::random(DType::Bf16, &[t, d], 1).map(eighths);
            let dw = Data::random(to, &[v, d], 2).map(eighths);
            let wide = |x: &Data| x.2.iter().map(|x| *x as f32).collect::<Vec<_>>();
            Case::new(&[tokens(t, v), dy.clone(), dw.clone()])
                .cpu(|s, x| {
                    let memory = s.memory().clone();
                    let (dy, sum) = (memory.from_slice(&[t, d], &wide(&dy)), memory.from_slice(&[v, d], &wide(&dw)));
                    cpu::weight_grad(s, x[0], dy, sum)?;
                    crate::ops::elementwise::copy(s, sum, x[2])
                })
                .ptx(|x| weight_grad(x[0], x[1], x[2]))
                .equal();
        }
    }

    #[test]
    fn each_barrier_is_needed() {
        let (t, v, d) = (600, 20, 8);
        let inputs = [tokens(t, v), Data::random(DType::F32, &[t, d], 1), Data::random(DType::F32, &[v, d], 2)];
        let launches = |x: &[Tensor]| weight_grad(x[0], x[1], x[2]);
        Case::new(&inputs).ptx(launches).mutants("bar.sync", launches);
    }

    #[test]
    fn a_token_past_the_vocabulary_is_told_of() {
        for token in [5, u32::MAX] {
            let tokens = Data::u32(&[3], &[0, token, 4]);
            let case = Case::new(&[tokens, Data::random(DType::F32, &[5, 4], 1), Data::random(DType::F32, &[3, 4], 2)]);
            case.same_error(|s, x| cpu::forward(s, x[0], x[1], x[2]), |_, x| forward(x[0], x[1], x[2]));
            case.same_error(|s, x| cpu::weight_grad(s, x[0], x[2], x[1]), |_, x| weight_grad(x[0], x[2], x[1]));
        }
    }
}
