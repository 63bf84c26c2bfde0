//! sum_o += sum_t x_to: a bias's gradient, f32 or bf16.
//!
//! Signature: (x, sum: addresses, rows, cols: u32). A block of 256 threads has 32 columns; a thread adds every eighth row of one
//! in f32, and the first warp adds the eight sums in order. Rounded once, after what was there is added.
//!
//! Bound by reading x once: 64 or 128 bytes in a row, 8 rows a block at a time.

use super::super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Pred},
    parts::{self, element, load, row, special, store},
};
use crate::{dtype::DType, ptx, tensor::Tensor};

const COLS: u32 = 32;
const LINES: u32 = 8;

/// `sum_o += sum_t x_to` for x [rows, cols].
pub(super) fn add(x: Tensor, rows: usize, cols: usize, sum: Tensor) -> Option<Launch> {
    if rows == 0 || cols == 0 {
        return None;
    }
    let grid = [(cols as u32).div_ceil(COLS), 1, 1];
    let args = vec![Arg::Tensor(x), Arg::Tensor(sum), Arg::U32(rows as u32), Arg::U32(cols as u32)];
    Some(Launch { kernel: kernel(x.dtype), grid, args })
}

/// The kernel of a type.
pub(super) fn kernel(dtype: DType) -> Kernel {
    parts::kernel_of(format!("column_sum_{}", dtype.name()), COLS * LINES, move |k| emit(k, dtype))
}

fn emit(k: &mut Assembler, dtype: DType) {
    let (x, sum, rows, cols) = (k.pointer("x"), k.pointer("sum"), k.u32("rows"), k.u32("cols"));
    let partial = k.shared(16, "partial", (COLS * LINES * 4) as usize);
    let (tid, block, total) = (special(k, "%tid.x"), special(k, "%ctaid.x"), k.reg::<F32>());
    let [col, line, at] = [(); 3].map(|()| k.reg::<B32>());
    let (outside, past, step) = (k.reg::<Pred>(), k.reg::<Pred>(), k.reg::<B64>());
    let (next, summed, end) = (k.label("NEXT"), k.label("SUMMED"), k.label("END"));
    ptx!(k, "and.b32 {at}, {tid}, {};", COLS - 1);
    ptx!(k, "mad.lo.u32 {col}, {block}, {COLS}, {at};");
    ptx!(k, "div.u32 {line}, {tid}, {COLS};");
    let start = row(k, x, line, cols, dtype);
    let from = element(k, start, col, dtype);
    ptx!(k, "mul.wide.u32 {step}, {cols}, {};", dtype.size_bytes() as u32 * LINES);
    ptx!(k, "mov.f32 {total}, 0f00000000;");
    ptx!(k, "setp.ge.u32 {outside}, {col}, {cols};");
    ptx!(k, "@{outside} bra {summed};");
    k.place(&next);
    ptx!(k, "setp.ge.u32 {past}, {line}, {rows};");
    ptx!(k, "@{past} bra {summed};");
    let value = load(k, from, dtype);
    ptx!(k, "add.f32 {total}, {total}, {value};");
    ptx!(k, "add.u64 {from}, {from}, {step};");
    ptx!(k, "add.u32 {line}, {line}, {LINES};");
    ptx!(k, "bra {next};");
    k.place(&summed);
    ptx!(k, "mov.u32 {at}, {partial};");
    ptx!(k, "mad.lo.u32 {at}, {tid}, 4, {at};");
    ptx!(k, "st.shared.f32 [{at}], {total};");
    ptx!(k, "bar.sync 0;");
    ptx!(k, "setp.ge.u32 {past}, {tid}, {COLS};");
    ptx!(k, "@{past} bra {end};");
    ptx!(k, "@{outside} bra {end};");
    for line in 1..LINES {
        ptx!(k, "ld.shared.f32 {value}, [{at}+{}];", line * COLS * 4);
        ptx!(k, "add.f32 {total}, {total}, {value};");
    }
    let to = element(k, sum, col, dtype);
    let old = load(k, to, dtype);
    ptx!(k, "add.f32 {total}, {total}, {old};");
    store(k, to, total, dtype);
    k.place(&end);
}
