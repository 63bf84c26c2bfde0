//! From a tile of f32 sums in shared memory to C: whole pieces of 16 bytes where C allows it.
//!
//! In shared memory a row has `bn` floats; the 32 bytes with columns 8g..8g + 8 of row r lie at place `g ^ (r % 4)` of the row, so
//! that neither the accumulators' pairs nor whole pieces meet a bank twice. A thread has the same columns in each of its rows.

use super::{
    super::{
        asm::{Assembler, B16, B32, B64, F32, Pred, Reg, vector},
        parts::{pack, unpack},
    },
    problem::Spec,
    schedule::{Params, Place},
};
use crate::{dtype::DType, ptx};

/// Bytes of a tile.
pub(in crate::ptx) fn tile_bytes(bm: u32, bn: u32) -> u32 {
    bm * bn * 4
}

/// Where the pairs of an accumulator fragment go: row `row` (of which `row_of_lane` has the last two bits) and columns
/// `8 granule + 2 pair..`.
pub(in crate::ptx) fn pair_place(
    k: &mut Assembler,
    base: Reg<B32>,
    bn: u32,
    row: Reg<B32>,
    granule: Reg<B32>,
    pair: Reg<B32>,
) -> Reg<B32> {
    let (at, x) = (k.reg::<B32>(), k.reg::<B32>());
    ptx!(k, "and.b32 {x}, {row}, 3;");
    ptx!(k, "xor.b32 {x}, {x}, {granule};");
    ptx!(k, "mad.lo.u32 {at}, {row}, {}, {base};", bn * 4);
    ptx!(k, "mad.lo.u32 {at}, {x}, 32, {at};");
    ptx!(k, "mad.lo.u32 {at}, {pair}, 8, {at};");
    at
}

/// Writes the tile at `base` with so many threads, numbered by `thread`: adds the bias or the addend, rounds once.
///
/// All of the addend is on its way before the first element is stored: it may be C, so no read may pass a store.
#[expect(clippy::too_many_arguments, reason = "a tile, where it is, and who writes it")]
pub(in crate::ptx) fn write(
    k: &mut Assembler,
    spec: &Spec,
    params: &Params,
    place: &Place,
    (bm, bn): (u32, u32),
    base: Reg<B32>,
    thread: Reg<B32>,
    threads: u32,
) {
    let size = spec.output.size_bytes() as u32;
    let piece = 16 / size;
    let (per_row, rows_a_turn) = (bn / piece, threads * piece / bn);
    assert!(rows_a_turn.is_multiple_of(4) && bm.is_multiple_of(rows_a_turn), "each turn is whole rows");
    let c = if spec.kind.is_inner() { params.to_group(k, params.c, place.group, size as usize) } else { params.c };
    let [row, col, at, granule, end] = [(); 5].map(|()| k.reg::<B32>());
    ptx!(k, "div.u32 {row}, {thread}, {per_row};");
    ptx!(k, "rem.u32 {col}, {thread}, {per_row};");
    ptx!(k, "mul.lo.u32 {col}, {col}, {piece};");
    ptx!(k, "mad.lo.u32 {at}, {row}, {}, {base};", bn * 4);
    ptx!(k, "shr.u32 {granule}, {col}, 3;");
    ptx!(k, "and.b32 {end}, {row}, 3;");
    ptx!(k, "xor.b32 {granule}, {granule}, {end};");
    ptx!(k, "mad.lo.u32 {at}, {granule}, 32, {at};");
    if piece == 4 {
        ptx!(k, "and.b32 {end}, {col}, 4;");
        ptx!(k, "mad.lo.u32 {at}, {end}, 4, {at};");
    }
    ptx!(k, "add.u32 {row}, {row}, {};", place.m0);
    ptx!(k, "add.u32 {col}, {col}, {};", place.n0);
    let wide = spec.wide[2];
    let inside: Vec<Reg<Pred>> = (0..if wide { 1 } else { piece })
        .map(|e| {
            let (q, x) = (k.reg::<Pred>(), k.reg::<B32>());
            ptx!(k, "add.u32 {x}, {col}, {e};");
            ptx!(k, "setp.lt.u32 {q}, {x}, {};", params.n);
            q
        })
        .collect();
    let (to, step, row_of_c) = (k.reg::<B64>(), k.reg::<B64>(), k.reg::<B32>());
    let bias = params.bias.map(|bias| {
        let at = k.reg::<B64>();
        ptx!(k, "mad.wide.u32 {at}, {col}, {size}, {bias};");
        let bits = load(k, spec.output, at, &inside, piece);
        widen(k, spec.output, &bits, &inside)
    });
    ptx!(k, "add.u32 {row_of_c}, {row}, {};", place.first_row);
    ptx!(k, "mul.wide.u32 {to}, {row_of_c}, {};", params.ldc);
    ptx!(k, "mad.lo.u64 {to}, {to}, {size}, {c};");
    ptx!(k, "mad.wide.u32 {to}, {col}, {size}, {to};");
    ptx!(k, "mul.wide.u32 {step}, {}, {};", params.ldc, rows_a_turn * size);
    let turns = bm / rows_a_turn;
    let added: Vec<Vec<Reg<B32>>> = params.to_addend(k).map_or(vec![], |to_addend| {
        let (from, row_of_turn) = (k.reg::<B64>(), k.reg::<B32>());
        ptx!(k, "add.u64 {from}, {to}, {to_addend};");
        ptx!(k, "mov.u32 {row_of_turn}, {row};");
        (0..turns)
            .map(|_| {
                let here = inside_rows(k, &inside, row_of_turn, place);
                let bits = load(k, spec.output, from, &here, piece);
                ptx!(k, "add.u32 {row_of_turn}, {row_of_turn}, {rows_a_turn};");
                ptx!(k, "add.u64 {from}, {from}, {step};");
                bits
            })
            .collect()
    });
    for turn in 0..turns {
        let here = inside_rows(k, &inside, row, place);
        let sums: Vec<Reg<F32>> = k.regs(piece as usize);
        for (half, sums) in sums.chunks_exact(4).enumerate() {
            let offset = turn * rows_a_turn * bn * 4 + 16 * half as u32;
            ptx!(k, "ld.shared.v4.f32 {}, [{at}+{offset}];", vector(sums));
        }
        let added = added.get(turn as usize).map(|bits| widen(k, spec.output, bits, &here));
        for more in added.iter().chain(&bias) {
            for (sum, x) in sums.iter().zip(more) {
                ptx!(k, "add.f32 {sum}, {sum}, {x};");
            }
        }
        put(k, spec.output, to, &here, &sums);
        ptx!(k, "add.u32 {row}, {row}, {rows_a_turn};");
        ptx!(k, "add.u64 {to}, {to}, {step};");
    }
}

/// Which of a piece are inside in this row: one predicate for all of it, or one for each element.
fn inside_rows(k: &mut Assembler, inside: &[Reg<Pred>], row: Reg<B32>, place: &Place) -> Vec<Reg<Pred>> {
    let row_inside = k.reg::<Pred>();
    ptx!(k, "setp.lt.u32 {row_inside}, {row}, {};", place.rows);
    let both = |inside: &Reg<Pred>| {
        let here = k.reg();
        ptx!(k, "and.pred {here}, {inside}, {row_inside};");
        here
    };
    inside.iter().map(both).collect()
}

/// The bits of a piece, zeros where it is not inside: four words, or a register for each element.
fn load(k: &mut Assembler, dtype: DType, at: Reg<B64>, inside: &[Reg<Pred>], piece: u32) -> Vec<Reg<B32>> {
    let whole = inside.len() == 1;
    let bits: Vec<Reg<B32>> = k.regs(if whole { 4 } else { piece as usize });
    for x in &bits {
        ptx!(k, "mov.b32 {x}, 0;");
    }
    if whole {
        ptx!(k, "@{} ld.global.v4.b32 {}, [{at}];", inside[0], vector(&bits));
        return bits;
    }
    let ty = if dtype == DType::Bf16 { "u16" } else { "u32" };
    for (e, (x, q)) in bits.iter().zip(inside).enumerate() {
        ptx!(k, "@{q} ld.global.{ty} {x}, [{at}+{}];", e * dtype.size_bytes());
    }
    bits
}

/// What was loaded, as f32.
fn widen(k: &mut Assembler, dtype: DType, bits: &[Reg<B32>], inside: &[Reg<Pred>]) -> Vec<Reg<F32>> {
    let (whole, is_bf16) = (inside.len() == 1, dtype == DType::Bf16);
    if whole && is_bf16 {
        return bits.iter().flat_map(|word| <[_; 2]>::from(unpack(k, *word))).collect();
    }
    let as_f32 = |bits: &Reg<B32>| {
        let x = k.reg::<F32>();
        if is_bf16 {
            ptx!(k, "shl.b32 {bits}, {bits}, 16;");
        }
        ptx!(k, "mov.b32 {x}, {bits};");
        x
    };
    bits.iter().map(as_f32).collect()
}

/// Rounds and stores a piece.
fn put(k: &mut Assembler, dtype: DType, at: Reg<B64>, inside: &[Reg<Pred>], sums: &[Reg<F32>]) {
    match (dtype == DType::Bf16, inside.len() == 1) {
        (true, true) => {
            let words: Vec<Reg<B32>> = sums.chunks_exact(2).map(|pair| pack(k, pair[0], pair[1])).collect();
            ptx!(k, "@{} st.global.v4.b32 [{at}], {};", inside[0], vector(&words));
        }
        (true, false) => {
            for (e, (sum, q)) in sums.iter().zip(inside).enumerate() {
                let bits = k.reg::<B16>();
                ptx!(k, "cvt.rn.bf16.f32 {bits}, {sum};");
                ptx!(k, "@{q} st.global.b16 [{at}+{}], {bits};", 2 * e);
            }
        }
        (false, true) => ptx!(k, "@{} st.global.v4.f32 [{at}], {};", inside[0], vector(sums)),
        (false, false) => {
            for (e, (sum, q)) in sums.iter().zip(inside).enumerate() {
                ptx!(k, "@{q} st.global.f32 [{at}+{}], {sum};", 4 * e);
            }
        }
    }
}
