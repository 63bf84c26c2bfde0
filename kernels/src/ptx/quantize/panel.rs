//! A panel of 128 rows in the registers of a block, and its way into memory with rows and columns exchanged.
//!
//! Thread (c, q) of 8 x 32 has rows 4 q..4 q + 4 and `width` columns from c `width` on, 8 or 16. Rows are read by 16 bytes a thread, 8 threads
//! a row. The codes of a column's four rows are one word: all 32 of a column are 128 bytes of shared memory, which leave as
//! neighbours of the transposed row. Word q of a column lies at place (q + 4 c) mod 32: the warp that writes has 8 columns and 4 neighbouring q, all
//! on different banks, and who reads finds 16 bytes together. One barrier between the two.

use super::code::{load_one, load_wide, store_byte};
use crate::{
    dtype::DType,
    ptx,
    ptx::{
        asm::{Assembler, B32, B64, F32, Pred, Reg, vector},
        parts::{BLOCK, element, row, special},
    },
};

/// Rows of a panel: those of a tile.
pub(super) const ROWS: usize = crate::fp8::TILE;

/// This thread's part of a panel.
#[derive(Clone, Copy)]
pub(super) struct Place {
    /// Columns of a thread.
    pub width: usize,
    /// Column part of the thread, below 8.
    pub c: Reg<B32>,
    /// Row part, below 32.
    pub q: Reg<B32>,
    /// The panel's first column.
    pub first_column: Reg<B32>,
    /// The thread's first column.
    pub column: Reg<B32>,
}

impl Place {
    /// In the panel whose columns are the `panel`-th group.
    pub fn new(k: &mut Assembler, width: usize, panel: Reg<B32>) -> Self {
        let [c, q, first_column, column] = [(); 4].map(|()| k.reg::<B32>());
        let tid = special(k, "%tid.x");
        ptx!(k, "and.b32 {c}, {tid}, 7;");
        ptx!(k, "shr.u32 {q}, {tid}, 3;");
        ptx!(k, "mul.lo.u32 {first_column}, {panel}, {};", 8 * width);
        ptx!(k, "mad.lo.u32 {column}, {c}, {width}, {first_column};");
        Place { width, c, q, first_column, column }
    }

    /// Which of the thread's four rows are there, of `rows` of the panel.
    pub fn rows(&self, k: &mut Assembler, rows: Reg<B32>) -> [Reg<Pred>; 4] {
        [0, 1, 2, 3].map(|r| {
            let (local, there) = (k.reg::<B32>(), k.reg::<Pred>());
            ptx!(k, "mad.lo.u32 {local}, {}, 4, {r};", self.q);
            ptx!(k, "setp.lt.u32 {there}, {local}, {rows};");
            there
        })
    }

    /// Whether column `j` of the thread is there as well.
    pub fn column(&self, k: &mut Assembler, j: usize, columns: Reg<B32>, row: Reg<Pred>) -> Reg<Pred> {
        let (column, there) = (k.reg::<B32>(), k.reg::<Pred>());
        ptx!(k, "add.u32 {column}, {}, {j};", self.column);
        ptx!(k, "setp.lt.and.u32 {there}, {column}, {columns}, {row};");
        there
    }

    /// Addresses of the thread's first column in its four rows; the panel begins at row `first` of a tensor of `columns`.
    pub fn addresses(
        &self,
        k: &mut Assembler,
        base: Reg<B64>,
        first: Reg<B32>,
        columns: Reg<B32>,
        dtype: DType,
    ) -> [Reg<B64>; 4] {
        let (index, pitch) = (k.reg::<B32>(), k.reg::<B64>());
        ptx!(k, "mad.lo.u32 {index}, {}, 4, {first};", self.q);
        ptx!(k, "mul.wide.u32 {pitch}, {columns}, {};", dtype.size_bytes());
        let at = row(k, base, index, columns, dtype);
        let mut at = element(k, at, self.column, dtype);
        [0, 1, 2, 3].map(|r| {
            if r > 0 {
                let next = k.reg::<B64>();
                ptx!(k, "add.u64 {next}, {at}, {pitch};");
                at = next;
            }
            at
        })
    }

    /// The thread's numbers, row by row; zeros where there are none.
    pub fn load(
        &self,
        k: &mut Assembler,
        at: [Reg<B64>; 4],
        rows: [Reg<Pred>; 4],
        columns: Reg<B32>,
        (dtype, wide): (DType, bool),
    ) -> [Vec<Reg<F32>>; 4] {
        [0, 1, 2, 3].map(|r| {
            if wide {
                let there = self.column(k, 0, columns, rows[r]);
                return load_wide(k, at[r], dtype, self.width, there);
            }
            (0..self.width)
                .map(|j| {
                    let there = self.column(k, j, columns, rows[r]);
                    load_one(k, at[r], j * dtype.size_bytes(), dtype, there)
                })
                .collect()
        })
    }

    /// Bytes of shared memory for the codes.
    pub fn shared_bytes(width: usize) -> usize {
        8 * width * ROWS
    }

    /// Puts the codes of the thread's rows of each of its columns into shared memory at `tile`.
    pub fn put(&self, k: &mut Assembler, tile: Reg<B32>, words: &[Reg<B32>]) {
        let (at, turned) = (k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "mad.lo.u32 {turned}, {}, 4, {};", self.c, self.q);
        ptx!(k, "and.b32 {turned}, {turned}, 31;");
        ptx!(k, "mad.lo.u32 {at}, {}, {}, {tile};", self.c, self.width * ROWS);
        ptx!(k, "mad.lo.u32 {at}, {turned}, 4, {at};");
        words.iter().enumerate().for_each(|(j, word)| ptx!(k, "st.shared.b32 [{at}+{}], {word};", j * ROWS));
    }

    /// Stores what all threads have put, after a barrier: columns are rows of `codes`, which have `pitch` elements, and the panel's rows begin
    /// at element `start` of them. What is past `columns` or `pitch` is not stored.
    pub fn store(
        &self,
        k: &mut Assembler,
        tile: Reg<B32>,
        (codes, pitch, start): (Reg<B64>, Reg<B32>, Reg<B32>),
        columns: Reg<B32>,
        wide: bool,
    ) {
        let (part, line, token) = (special(k, "%tid.x"), special(k, "%tid.x"), k.reg::<B32>());
        ptx!(k, "and.b32 {part}, {part}, 7;");
        ptx!(k, "shr.u32 {line}, {line}, 3;");
        ptx!(k, "mad.lo.u32 {token}, {part}, 16, {start};");
        for pass in (0..8 * self.width).step_by(BLOCK as usize / 8) {
            let [local, column, from] = [(); 3].map(|()| k.reg::<B32>());
            let (in_columns, words) = (k.reg::<Pred>(), k.regs::<B32>(4));
            ptx!(k, "add.u32 {local}, {line}, {pass};");
            ptx!(k, "add.u32 {column}, {}, {local};", self.first_column);
            ptx!(k, "setp.lt.u32 {in_columns}, {column}, {columns};");
            ptx!(k, "shr.u32 {from}, {local}, {};", self.width.trailing_zeros());
            ptx!(k, "add.u32 {from}, {from}, {part};");
            ptx!(k, "and.b32 {from}, {from}, 7;");
            ptx!(k, "mad.lo.u32 {from}, {from}, 16, {tile};");
            ptx!(k, "mad.lo.u32 {from}, {local}, {ROWS}, {from};");
            ptx!(k, "ld.shared.v4.b32 {}, [{from}];", vector(&words));
            let to = row(k, codes, column, pitch, DType::U8);
            let to = element(k, to, token, DType::U8);
            let there = |k: &mut Assembler, byte: usize| {
                let (at, there) = (k.reg::<B32>(), k.reg::<Pred>());
                ptx!(k, "add.u32 {at}, {token}, {byte};");
                ptx!(k, "setp.lt.and.u32 {there}, {at}, {pitch}, {in_columns};");
                there
            };
            if wide {
                let there = there(k, 0);
                ptx!(k, "@{there} st.global.v4.b32 [{to}], {};", vector(&words));
            } else {
                for byte in 0..16 {
                    let there = there(k, byte);
                    store_byte(k, to, byte, words[byte / 4], byte % 4, there);
                }
            }
        }
    }
}
