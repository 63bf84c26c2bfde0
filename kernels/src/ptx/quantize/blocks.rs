//! Weights to codes with a scale for each 128 x 128 block, and the same codes transposed, for the products that read a weight along its other side.
//!
//! Signature: (w, codes, scales, \[transposed, its scales\]: addresses, r rows, c columns: u32). A block has a block: a [panel](super::panel) of
//! 128 rows and columns, matrix %ctaid.z. Codes are made once, row by row, and exchanged four by four in registers.
//!
//! Barriers: in the fold of the amax, and in the panel's exchange.
//!
//! Time: bytes over memory bandwidth: an element of f32 is 4 bytes in and 1 out, 2 with the transposed. A block has 64 KiB on their way (32 of
//! bf16).

use super::{
    code::{Recipe, amax, store_byte, transpose},
    panel::{Place, ROWS},
};
use crate::{
    dtype::DType,
    ptx,
    ptx::{
        Kernel,
        asm::{Assembler, B32, B64, F32, Pred, Reg, vector},
        fold::{self, Fold},
        parts::{BLOCK, element, special},
    },
};

/// Columns of a thread.
const WIDTH: usize = 16;

/// `wide`: whether rows of the input and the codes are aligned, and those of the transposed codes.
pub(super) fn kernel(dtype: DType, [wide, wide_out]: [bool; 2], transposed: bool, recipe: Recipe) -> Kernel {
    let mut name = format!("quantize_blocks_{}_x{}", dtype.name(), if wide { 16 } else { 1 });
    if transposed {
        name += &format!("_t{}", if wide_out { 16 } else { 1 });
    }
    recipe.kernel(&name, move |k| {
        let (w, codes, scales) = (k.pointer("w"), k.pointer("codes"), k.pointer("scales"));
        let other = transposed.then(|| (k.pointer("transposed"), k.pointer("transposed_scales")));
        let (r, c) = (k.u32("r"), k.u32("c"));
        let (panel, block, matrix) = (special(k, "%ctaid.x"), special(k, "%ctaid.y"), special(k, "%ctaid.z"));
        let place = Place::new(k, WIDTH, panel);
        let (first, rows, size) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<B64>());
        ptx!(k, "mul.lo.u32 {first}, {block}, {ROWS};");
        ptx!(k, "sub.u32 {rows}, {r}, {first};");
        ptx!(k, "min.u32 {rows}, {rows}, {ROWS};");
        // Numbers before this matrix.
        ptx!(k, "mul.wide.u32 {size}, {r}, {c};");
        let before = k.reg::<B64>();
        ptx!(k, "cvt.u64.u32 {before}, {matrix};");
        ptx!(k, "mul.lo.u64 {before}, {before}, {size};");
        let offset = |k: &mut Assembler, base: Reg<B64>, bytes: usize| {
            let at = k.reg::<B64>();
            ptx!(k, "mad.lo.u64 {at}, {before}, {bytes}, {base};");
            at
        };
        let (w, codes) = (offset(k, w, dtype.size_bytes()), offset(k, codes, 1));
        let there = place.rows(k, rows);
        let at = place.addresses(k, w, first, c, dtype);
        let x = place.load(k, at, there, c, (dtype, wide));
        let most = amax(k, &x.concat());
        fold::block(k, most, Fold::Max, BLOCK);
        let (scale, inverse) = recipe.scale(k, most);
        let [across, down] = [(c, panel), (r, block)].map(|(n, i)| (tiles(k, n), i));
        store_scale(k, scales, scale, matrix, [down, across]);
        let words: [Vec<Reg<B32>>; 4] =
            x.map(|x| x.chunks_exact(4).map(|x| recipe.encode(k, [x[0], x[1], x[2], x[3]], None, inverse)).collect());
        let to = place.addresses(k, codes, first, c, DType::U8);
        for (r, words) in words.iter().enumerate() {
            if wide {
                let there = place.column(k, 0, c, there[r]);
                ptx!(k, "@{there} st.global.v4.b32 [{}], {};", to[r], vector(words));
                continue;
            }
            for j in 0..WIDTH {
                let there = place.column(k, j, c, there[r]);
                store_byte(k, to[r], j, words[j / 4], j % 4, there);
            }
        }
        if let Some((other, other_scales)) = other {
            store_scale(k, other_scales, scale, matrix, [across, down]);
            let by_column: Vec<Reg<B32>> =
                (0..WIDTH / 4).flat_map(|word| transpose(k, [0, 1, 2, 3].map(|r| words[r][word]))).collect();
            let tile = k.shared(16, "tile", Place::shared_bytes(WIDTH));
            let (tile, other) = (special(k, &tile), offset(k, other, 1));
            place.put(k, tile, &by_column);
            ptx!(k, "bar.sync 0;");
            place.store(k, tile, (other, r, first), c, wide_out);
        }
    })
}

/// Tiles of `n`.
fn tiles(k: &mut Assembler, n: Reg<B32>) -> Reg<B32> {
    let tiles = k.reg::<B32>();
    ptx!(k, "add.u32 {tiles}, {n}, {};", ROWS - 1);
    ptx!(k, "div.u32 {tiles}, {tiles}, {ROWS};");
    tiles
}

/// Stores the scale of a block: how many there are, and which it is, along both sides of its matrix.
fn store_scale(
    k: &mut Assembler,
    base: Reg<B64>,
    scale: Reg<F32>,
    matrix: Reg<B32>,
    [(rows, row), (columns, column)]: [(Reg<B32>, Reg<B32>); 2],
) {
    let (index, tid, first) = (k.reg::<B32>(), special(k, "%tid.x"), k.reg::<Pred>());
    ptx!(k, "mad.lo.u32 {index}, {matrix}, {rows}, {row};");
    ptx!(k, "mad.lo.u32 {index}, {index}, {columns}, {column};");
    ptx!(k, "setp.eq.u32 {first}, {tid}, 0;");
    let to = element(k, base, index, DType::F32);
    ptx!(k, "@{first} st.global.f32 [{to}], {scale};");
}
