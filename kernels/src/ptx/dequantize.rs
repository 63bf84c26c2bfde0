//! FP8 back to numbers: code * scale in f32, rounded to the type of activations.
//!
//! Signature: (codes, scales, x: addresses, rows, columns, tiles a row, pitch of the scales: u32). Eight lanes have a tile of 128 columns,
//! 16 neighbours each; no shared memory, no barrier.
//!
//! Time: bytes over memory bandwidth: an element of bf16 is 1 byte in and 2 out, and 1/32 for its scale.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Pred, Reg, vector},
    golden::Variant,
    parts::{count, element, f32_op, row},
    quantize::{
        Recipe, aligned,
        rows::{COLUMNS, Slot, grid, place},
    },
};
use crate::{
    dtype::DType,
    fp8::{TILE, Tiles},
    ptx,
    tensor::Tensor,
};

/// `x` [t, c] from its tiles. What numbers the scales are makes no difference.
pub fn tiles(q: Tiles, x: Tensor, recipe: Recipe) -> Vec<Launch> {
    let (t, c) = (x.rows(), x.cols());
    if t * c == 0 {
        return vec![];
    }
    let wide = aligned(&[x, q.codes], COLUMNS);
    let num_tiles = c.div_ceil(TILE);
    let mut args = [q.codes, q.scales, x].map(Arg::Tensor).to_vec();
    args.extend([t, c, num_tiles, q.scales.cols()].map(|n| Arg::U32(count(n))));
    vec![Launch { kernel: kernel(x.dtype, wide, recipe), grid: grid(t, num_tiles), args }]
}

fn kernel(dtype: DType, wide: bool, recipe: Recipe) -> Kernel {
    let name = format!("dequantize_tiles_{}_x{}", dtype.name(), if wide { COLUMNS } else { 1 });
    recipe.kernel(&name, move |k| {
        let [codes, scales, x] = ["codes", "scales", "x"].map(|name| k.pointer(name));
        let [rows, columns, tiles, pitch] = ["rows", "columns", "tiles", "pitch"].map(|name| k.u32(name));
        let (index, tile, there) = place(k, rows, tiles);
        let slot = Slot::neighbours(k, wide, tile, columns, there);
        let (end, outside, scale) = (k.label("end"), k.reg::<Pred>(), k.reg::<F32>());
        // Lanes of rows or columns that are not there have nothing to do; none waits for another.
        let there = slot.there(k, 0);
        ptx!(k, "not.pred {outside}, {there};");
        ptx!(k, "@{outside} bra {end};");
        let at = row(k, scales, tile, pitch, DType::F32);
        let at = element(k, at, index, DType::F32);
        ptx!(k, "ld.global.f32 {scale}, [{at}];");
        let from = row(k, codes, index, columns, DType::U8);
        let from = element(k, from, slot.first, DType::U8);
        let words = k.regs::<B32>(COLUMNS / 4);
        if wide {
            ptx!(k, "ld.global.v4.b32 {}, [{from}];", vector(&words));
        } else {
            load_bytes(k, from, &slot, &words);
        }
        let values: Vec<Reg<F32>> = words.iter().flat_map(|word| numbers(k, *word, scale, recipe)).collect();
        let to = row(k, x, index, columns, dtype);
        slot.store(k, to, values, dtype);
        k.place(&end);
    })
}

/// Codes one by one, zeros where there are none.
pub(super) fn load_bytes(k: &mut Assembler, from: Reg<B64>, slot: &Slot, words: &[Reg<B32>]) {
    for (i, word) in words.iter().enumerate() {
        ptx!(k, "mov.b32 {word}, 0;");
        for byte in 0..4 {
            let (there, code) = (slot.there(k, 4 * i + byte), k.reg::<B32>());
            ptx!(k, "mov.b32 {code}, 0;");
            ptx!(k, "@{there} ld.global.u8 {code}, [{from}+{}];", 4 * i + byte);
            ptx!(k, "bfi.b32 {word}, {code}, {word}, {}, 8;", 8 * byte);
        }
    }
}

/// The four numbers of a word of codes.
pub(super) fn numbers(k: &mut Assembler, codes: Reg<B32>, scale: Reg<F32>, recipe: Recipe) -> [Reg<F32>; 4] {
    let magnitudes = recipe.magnitudes(k, codes);
    [0, 1, 2, 3].map(|byte| {
        let (x, sign, bits) = (f32_op(k, "mul", magnitudes[byte], scale), k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "shl.b32 {sign}, {codes}, {};", 24 - 8 * byte);
        ptx!(k, "mov.b32 {bits}, {x};");
        // bits | sign & 0x80000000
        ptx!(k, "lop3.b32 {bits}, {bits}, {sign}, 0x80000000, 0xf8;");
        ptx!(k, "mov.b32 {x}, {bits};");
        x
    })
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    let recipes = Recipe::committed().into_iter().filter(|recipe| recipe.is_real());
    recipes.map(|recipe| Variant::new(kernel(DType::Bf16, true, recipe), 64)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::dequantize as cpu,
        ptx::case::{Case, Data},
    };

    /// Any bytes are codes, NaN among them, under scales of all sizes.
    #[test]
    fn numbers_are_the_cpus() {
        for recipe in Recipe::committed().into_iter().filter(|recipe| recipe.is_real()) {
            for (dtype, [t, c]) in [DType::F32, DType::Bf16]
                .into_iter()
                .flat_map(|d| [[1, 1], [5, 16], [3, 144], [9, 131]].map(|s| (d, s)))
            {
                let dims = Tiles::scale_shape(t, c);
                let mut codes = Data::poison(DType::U8, &[t, c]);
                codes.2.iter_mut().enumerate().for_each(|(i, x)| *x = ((i * i * 37 + i / 7) % 256) as f64);
                let mut scales = Data::random(DType::F32, &dims, 1).map(f64::abs);
                scales.2.iter_mut().enumerate().for_each(|(i, x)| *x *= 2f64.powi(i as i32 * 29 % 60 - 30));
                let tiles = |x: &[Tensor]| Tiles { codes: x[0], scales: x[1] };
                Case::new(&[codes, scales, Data::poison(dtype, &[t, c])])
                    .cpu(|s, x| cpu::tiles(s, tiles(x), x[2]))
                    .ptx(|x| super::tiles(tiles(x), x[2], recipe))
                    .equal();
            }
        }
    }
}
