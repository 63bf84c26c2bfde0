//! From accumulators to C, 64 columns at a time.
//!
//! In general a consumer turns its 64 x 64 floats into rows in its 16 KiB of shared memory and writes them as [`super::super::output`]
//! does. Where C is bf16, assigned and wide, and all 64 rows are the group's (dense C ends where its map does), they are rounded and
//! stored by stmatrix into a 128-byte-swizzled panel, of which there are two, and TMA writes it while the next is made.
//!
//! Barrier 1 + g is that of consumer g alone: all have written a part before it is read, and read it before it is written again.
//! TMA reads what was written before `fence.proxy.async` and the barrier; the thread that started it waits until the panel before
//! last is read.

use super::{
    super::{
        output,
        problem::{Kind, Spec},
        schedule::Place,
    },
    Block, PANEL_BYTES, STAGING_BYTES, is_bf16,
};
use crate::{
    ptx,
    ptx::{
        asm::{Assembler, B32, B64, F32, Label, Pred, Reg, vector},
        parts::pack,
    },
};

/// Whether whole parts are written by TMA.
pub(super) fn by_tma(spec: &Spec) -> bool {
    is_bf16(spec) && !spec.addend && !spec.bias && spec.wide[2] && !matches!(spec.kind, Kind::Inner { .. })
}

/// A consumer's part of a tile, and where it goes.
struct Part<'a> {
    block: &'a Block<'a>,
    /// The tile's place, moved to the consumer's rows.
    place: Place,
    /// The consumer's bytes in shared memory, its thread and its barrier.
    staging: Reg<B32>,
    thread: Reg<B32>,
    barrier: Reg<B32>,
}

/// Writes the sums of one tile.
pub(super) fn emit(
    k: &mut Assembler,
    block: &Block,
    place: &Place,
    group: Reg<B32>,
    acc: &[Reg<F32>],
    c_map: Option<Reg<B64>>,
) {
    let [m0, staging, thread, barrier] = [(); 4].map(|()| k.reg::<B32>());
    ptx!(k, "mad.lo.u32 {m0}, {group}, 64, {};", place.m0);
    ptx!(k, "mad.lo.u32 {staging}, {group}, {STAGING_BYTES}, {};", block.base);
    ptx!(k, "add.u32 {staging}, {staging}, {};", block.tile.staging());
    ptx!(k, "and.b32 {thread}, {}, 127;", block.tid);
    ptx!(k, "add.u32 {barrier}, {group}, 1;");
    let part = Part { block, place: Place { m0, ..*place }, staging, thread, barrier };
    let (done, by_rows) = (k.label("PART_WRITTEN"), k.label("BY_ROWS"));
    if let Some(c_map) = c_map {
        part.by_tma(k, acc, c_map, &by_rows);
        if block.spec.kind == Kind::One {
            return;
        }
        ptx!(k, "bra {done};");
        k.place(&by_rows);
    }
    part.by_rows(k, acc, &done);
    k.place(&done);
}

impl Part<'_> {
    fn sync(&self, k: &mut Assembler) {
        ptx!(k, "bar.sync {}, 128;", self.barrier);
    }

    /// Through floats in shared memory.
    fn by_rows(&self, k: &mut Assembler, acc: &[Reg<F32>], done: &Label) {
        let [row, pair, n0, granule] = [(); 4].map(|()| k.reg::<B32>());
        let q = k.reg::<Pred>();
        ptx!(k, "shr.u32 {row}, {}, 5;", self.thread);
        ptx!(k, "shl.b32 {row}, {row}, 4;");
        ptx!(k, "shr.u32 {pair}, {}, 2;", self.block.lane);
        ptx!(k, "add.u32 {row}, {row}, {pair};");
        ptx!(k, "and.b32 {pair}, {}, 3;", self.block.lane);
        let places: Vec<Reg<B32>> = (0..8)
            .map(|j| {
                ptx!(k, "mov.u32 {granule}, {j};");
                output::pair_place(k, self.staging, 64, row, granule, pair)
            })
            .collect();
        ptx!(k, "mov.u32 {n0}, {};", self.place.n0);
        for acc in acc.chunks_exact(32) {
            ptx!(k, "setp.ge.u32 {q}, {n0}, {};", self.block.params.n);
            ptx!(k, "@{q} bra {done};");
            self.sync(k);
            for (place, acc) in places.iter().zip(acc.chunks_exact(4)) {
                ptx!(k, "st.shared.v2.f32 [{place}], {};", vector(&acc[..2]));
                ptx!(k, "st.shared.v2.f32 [{place}+{}], {};", 8 * 64 * 4, vector(&acc[2..]));
            }
            self.sync(k);
            let (block, place) = (self.block, Place { n0, ..self.place });
            output::write(k, block.spec, &block.params, &place, (64, 64), self.staging, self.thread, 128);
            ptx!(k, "add.u32 {n0}, {n0}, 64;");
        }
    }

    /// Through bf16 in shared memory, and by TMA; or goes to `by_rows` where some of the rows are not the group's.
    fn by_tma(&self, k: &mut Assembler, acc: &[Reg<F32>], c_map: Reg<B64>, by_rows: &Label) {
        let [row, col, line, twist, n0] = [(); 5].map(|()| k.reg::<B32>());
        let (q, leads) = (k.reg::<Pred>(), k.reg::<Pred>());
        ptx!(k, "setp.eq.u32 {leads}, {}, 0;", self.thread);
        if self.block.spec.kind != Kind::One {
            // Panels that TMA still reads are to become floats.
            let whole = k.label("WHOLE_ROWS");
            ptx!(k, "add.u32 {row}, {}, 64;", self.place.m0);
            ptx!(k, "setp.le.u32 {q}, {row}, {};", self.place.rows);
            ptx!(k, "@{q} bra {whole};");
            ptx!(k, "@{leads} cp.async.bulk.wait_group.read 0;");
            ptx!(k, "bra {by_rows};");
            k.place(&whole);
        }
        ptx!(k, "add.u32 {row}, {}, {};", self.place.first_row, self.place.m0);
        ptx!(k, "mov.u32 {n0}, {};", self.place.n0);
        // A lane's row of four 8 x 8 matrices: rows 0..8 and 8..16 of 8 columns, then of the next 8.
        ptx!(k, "and.b32 {twist}, {}, 7;", self.block.lane);
        ptx!(k, "shr.u32 {line}, {}, 5;", self.thread);
        ptx!(k, "shl.b32 {line}, {line}, 4;");
        ptx!(k, "and.b32 {col}, {}, 15;", self.block.lane);
        ptx!(k, "add.u32 {line}, {line}, {col};");
        ptx!(k, "mad.lo.u32 {line}, {line}, 128, {};", self.staging);
        ptx!(k, "shr.u32 {col}, {}, 4;", self.block.lane);
        let places: Vec<Reg<B32>> = (0..4)
            .map(|j| {
                let at = k.reg::<B32>();
                ptx!(k, "add.u32 {at}, {col}, {};", 2 * j);
                ptx!(k, "xor.b32 {at}, {at}, {twist};");
                ptx!(k, "mad.lo.u32 {at}, {at}, 16, {line};");
                at
            })
            .collect();
        // A tile of one panel always uses the first.
        let pending = if acc.len() > 32 { 1 } else { 0 };
        for (panel, acc) in acc.chunks_exact(32).enumerate() {
            let offset = (panel as u32 % 2) * PANEL_BYTES;
            ptx!(k, "@{leads} cp.async.bulk.wait_group.read {pending};");
            self.sync(k);
            for (place, acc) in places.iter().zip(acc.chunks_exact(8)) {
                let words: Vec<Reg<B32>> = acc.chunks_exact(2).map(|pair| pack(k, pair[0], pair[1])).collect();
                ptx!(k, "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{place}+{offset}], {};", vector(&words));
            }
            ptx!(k, "fence.proxy.async.shared::cta;");
            self.sync(k);
            let at = k.reg::<B32>();
            ptx!(k, "add.u32 {at}, {}, {offset};", self.staging);
            ptx!(k, "setp.lt.u32 {q}, {n0}, {};", self.block.params.n);
            ptx!(k, "and.pred {q}, {q}, {leads};");
            ptx!(k, "@{q} cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [{c_map}, {{{n0}, {row}}}], [{at}];");
            ptx!(k, "@{leads} cp.async.bulk.commit_group;");
            ptx!(k, "add.u32 {n0}, {n0}, 64;");
        }
    }
}
