//! Rows to codes with a scale for each 128 columns, whatever the rows are made from: a tensor, a tensor's rows in another order, or
//! the halves of a SwiGLU.
//!
//! Signature: (x, \[token_of_row,\] codes, scales: addresses, rows, columns, tiles a row, pitch of the scales: u32). Eight lanes have a
//! tile, 16 columns each, and a warp has the same tile of four neighbouring rows, so that their scales are 16 bytes in a row. No
//! shared memory, no barrier.
//!
//! Time: bytes over memory bandwidth. An element of bf16 is 2 bytes in and 1 out (SwiGLU: 4 in), and 1/32 for its scale; a thread has
//! 32 bytes on their way, 64 of f32 or for SwiGLU.

use super::code::{Recipe, amax, load_one, load_wide, share_max, store_byte};
use crate::{
    dtype::DType,
    ptx,
    ptx::{
        Kernel,
        asm::{Assembler, B32, B64, Class, F32, Pred, Reg, vector},
        parts::{div_rem, element, return_past, row, special, store, store_vector},
        swiglu,
    },
};

/// Columns of a lane.
pub(in crate::ptx) const COLUMNS: usize = 16;

/// What rows are made from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Source {
    /// Rows of a tensor.
    Rows,
    /// Row `token_of_row[r]` of a tensor.
    Permuted,
    /// silu(g) u, where a tensor's rows hold g and u side by side.
    Swiglu,
}

/// A lane's 16 columns of a tile: neighbours, or every eighth where rows are not aligned.
#[derive(Clone, Copy)]
pub(in crate::ptx) struct Slot {
    /// Whether they are moved together.
    pub wide: bool,
    /// From one of its columns to the next.
    step: usize,
    /// Which of the eight lanes of a tile this is.
    pub lane: Reg<B32>,
    /// Its first column.
    pub first: Reg<B32>,
    /// Columns of a row.
    columns: Reg<B32>,
    /// Whether the row is there.
    row: Reg<Pred>,
}

impl Slot {
    /// This thread's part of tile `tile` of a row that is there if `row`.
    pub fn new(k: &mut Assembler, wide: bool, tile: Reg<B32>, columns: Reg<B32>, row: Reg<Pred>) -> Self {
        let (lane, first) = (special(k, "%tid.x"), k.reg::<B32>());
        ptx!(k, "and.b32 {lane}, {lane}, 7;");
        ptx!(k, "mul.lo.u32 {first}, {lane}, {};", if wide { COLUMNS } else { 1 });
        ptx!(k, "mad.lo.u32 {first}, {tile}, 128, {first};");
        Slot { wide, step: if wide { 1 } else { 8 }, lane, first, columns, row }
    }

    /// The same, of neighbours in any case.
    pub fn neighbours(k: &mut Assembler, wide: bool, tile: Reg<B32>, columns: Reg<B32>, row: Reg<Pred>) -> Self {
        Slot { wide, ..Slot::new(k, true, tile, columns, row) }
    }

    /// Whether column `offset` after the first is there.
    pub fn there(&self, k: &mut Assembler, offset: usize) -> Reg<Pred> {
        let (there, column) = (k.reg::<Pred>(), k.reg::<B32>());
        ptx!(k, "add.u32 {column}, {}, {offset};", self.first);
        ptx!(k, "setp.lt.and.u32 {there}, {column}, {}, {};", self.columns, self.row);
        there
    }

    /// The columns of the row at `row`; those past the last are zeros.
    pub fn load(&self, k: &mut Assembler, row: Reg<B64>, dtype: DType) -> Vec<Reg<F32>> {
        let at = element(k, row, self.first, dtype);
        if self.wide {
            let there = self.there(k, 0);
            return load_wide(k, at, dtype, COLUMNS, there);
        }
        (0..COLUMNS)
            .map(|j| {
                let there = self.there(k, self.step * j);
                load_one(k, at, self.step * j * dtype.size_bytes(), dtype, there)
            })
            .collect()
    }

    /// Quantizes the columns into the row of codes at `row`; returns the scale, which all lanes of the tile have. Every lane of the warp must
    /// come here.
    pub fn quantize(&self, k: &mut Assembler, recipe: Recipe, x: &[Reg<F32>], row: Reg<B64>) -> Reg<F32> {
        let most = amax(k, x);
        share_max(k, most, &[4, 2, 1]);
        let (scale, inverse) = recipe.scale(k, most);
        let words: Vec<Reg<B32>> =
            x.chunks_exact(4).map(|x| recipe.encode(k, [x[0], x[1], x[2], x[3]], None, inverse)).collect();
        let to = element(k, row, self.first, DType::U8);
        if self.wide {
            let there = self.there(k, 0);
            ptx!(k, "@{there} st.global.v4.b32 [{to}], {};", vector(&words));
        } else {
            for j in 0..COLUMNS {
                let there = self.there(k, self.step * j);
                store_byte(k, to, self.step * j, words[j / 4], j % 4, there);
            }
        }
        scale
    }

    /// Stores the columns of the row at `row`, of neighbours of which the first is there.
    pub fn store(&self, k: &mut Assembler, row: Reg<B64>, values: Vec<Reg<F32>>, dtype: DType) {
        let to = element(k, row, self.first, dtype);
        if self.wide {
            return store_vector(k, to, &values, dtype);
        }
        for (j, value) in values.into_iter().enumerate() {
            let (there, at, skip) = (self.there(k, j), k.reg::<B64>(), k.label("skip"));
            ptx!(k, "@!{there} bra {skip};");
            ptx!(k, "add.u64 {at}, {to}, {};", j * dtype.size_bytes());
            store(k, at, value, dtype);
            k.place(&skip);
        }
    }

    /// Stores what a tile has once, by its first lane.
    pub fn store_scale<C: Class>(&self, k: &mut Assembler, at: Reg<B64>, scale: Reg<C>, ty: &str) {
        let first = k.reg::<Pred>();
        ptx!(k, "setp.eq.and.u32 {first}, {}, 0, {};", self.lane, self.row);
        ptx!(k, "@{first} st.global.{ty} [{at}], {scale};");
    }
}

/// A warp's tile of four rows: this lane's row and the tile; warps past the last row return.
pub(in crate::ptx) fn place(k: &mut Assembler, rows: Reg<B32>, tiles: Reg<B32>) -> (Reg<B32>, Reg<B32>, Reg<Pred>) {
    let (warp, lane, there) = (special(k, "%tid.x"), special(k, "%tid.x"), k.reg::<Pred>());
    let block = special(k, "%ctaid.x");
    ptx!(k, "shr.u32 {warp}, {warp}, 5;");
    ptx!(k, "mad.lo.u32 {warp}, {block}, 8, {warp};");
    let (row, tile) = div_rem(k, warp, tiles);
    ptx!(k, "shl.b32 {row}, {row}, 2;");
    return_past(k, row, rows);
    ptx!(k, "bfe.u32 {lane}, {lane}, 3, 2;");
    ptx!(k, "add.u32 {row}, {row}, {lane};");
    ptx!(k, "setp.lt.u32 {there}, {row}, {rows};");
    (row, tile, there)
}

/// Blocks for [`place`].
pub(in crate::ptx) fn grid(rows: usize, tiles: usize) -> [u32; 3] {
    [ptx::parts::count(rows.div_ceil(4) * tiles).div_ceil(8), 1, 1]
}

pub(super) fn kernel(source: Source, dtype: DType, wide: bool, recipe: Recipe) -> Kernel {
    let what = match source {
        Source::Rows => "",
        Source::Permuted => "_permuted",
        Source::Swiglu => "_swiglu",
    };
    let lanes = if wide { COLUMNS } else { 1 };
    let name = format!("quantize_tiles{what}_{}_x{lanes}", dtype.name());
    recipe.kernel(&name, move |k| {
        let x = k.pointer("x");
        let tokens = (source == Source::Permuted).then(|| k.pointer("token_of_row"));
        let (codes, scales) = (k.pointer("codes"), k.pointer("scales"));
        let [rows, columns, tiles, pitch] = ["rows", "columns", "tiles", "pitch"].map(|name| k.u32(name));
        let (index, tile, there) = place(k, rows, tiles);
        let slot = Slot::new(k, wide, tile, columns, there);
        let from = tokens.map_or(index, |tokens| {
            let (at, token) = (element(k, tokens, index, DType::U32), k.reg::<B32>());
            ptx!(k, "mov.u32 {token}, 0;");
            ptx!(k, "@{there} ld.global.u32 {token}, [{at}];");
            token
        });
        let values = if source == Source::Swiglu {
            let double = k.reg::<B32>();
            ptx!(k, "shl.b32 {double}, {columns}, 1;");
            let g = row(k, x, from, double, dtype);
            let u = element(k, g, columns, dtype);
            let (g, u) = (slot.load(k, g, dtype), slot.load(k, u, dtype));
            g.into_iter().zip(u).map(|(g, u)| swiglu::value(k, g, u)).collect()
        } else {
            let x = row(k, x, from, columns, dtype);
            slot.load(k, x, dtype)
        };
        let to = row(k, codes, index, columns, DType::U8);
        let scale = slot.quantize(k, recipe, &values, to);
        let to = row(k, scales, tile, pitch, DType::F32);
        let to = element(k, to, index, DType::F32);
        slot.store_scale(k, to, scale, "f32");
    })
}
