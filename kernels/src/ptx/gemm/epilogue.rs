//! From the accumulators of a warpgroup to its 64 rows of C, some columns at a time: for all kernels by wgmma.
//!
//! In general a consumer turns `width` columns of floats into rows in its part of shared memory and writes them as [`super::output`]
//! does. Where C is bf16, assigned and wide, and all 64 rows are the group's (dense C ends where its map does), 64 columns are
//! rounded and stored by stmatrix into a 128-byte-swizzled panel, of which there are one or two, and TMA writes it while the next is
//! made.
//!
//! Barrier 1 + g is that of consumer g alone: all have written a part before it is read, and read it before it is written again.
//! TMA reads what was written before `fence.proxy.async` and the barrier; the thread that started it waits until the panel that is
//! written next has been read.

use super::{
    output,
    pipeline::PANEL_BYTES,
    problem::{Kind, Spec},
    schedule::{Params, Place},
};
use crate::{
    dtype::DType,
    ptx,
    ptx::{
        asm::{Assembler, B32, B64, F32, Label, Pred, Reg, vector},
        parts::pack,
    },
};

/// Whether whole parts are written by TMA.
pub(in crate::ptx) fn by_tma(spec: &Spec) -> bool {
    spec.output == DType::Bf16 && !spec.addend && !spec.bias && spec.wide[2] && !spec.kind.is_inner()
}

/// A warpgroup that writes, and its room in shared memory.
pub(in crate::ptx) struct Writer<'a> {
    spec: &'a Spec,
    params: &'a Params,
    lane: Reg<B32>,
    /// Columns that are turned into rows at a time.
    width: u32,
    /// The consumer's bytes in shared memory, its thread and its barrier.
    staging: Reg<B32>,
    thread: Reg<B32>,
    barrier: Reg<B32>,
}

/// What a writer is made for: the kernel's kind, the thread's place, and how many columns it turns into rows at a time (32 or 64).
pub(in crate::ptx) struct Consumer<'a> {
    pub spec: &'a Spec,
    pub params: &'a Params,
    pub tid: Reg<B32>,
    pub lane: Reg<B32>,
    /// Number of the warpgroup.
    pub group: Reg<B32>,
    pub width: u32,
}

/// Bytes in which a consumer turns so many columns into rows.
pub(in crate::ptx) const fn staging_bytes(width: u32) -> u32 {
    64 * width * 4
}

impl<'a> Writer<'a> {
    /// The writers' bytes lie `offset` after `base`, aligned to 1024.
    pub fn new(k: &mut Assembler, of: &Consumer<'a>, base: Reg<B32>, offset: u32) -> Self {
        let [staging, thread, barrier] = [(); 3].map(|()| k.reg::<B32>());
        ptx!(k, "mad.lo.u32 {staging}, {}, {}, {base};", of.group, staging_bytes(of.width));
        ptx!(k, "add.u32 {staging}, {staging}, {offset};");
        ptx!(k, "and.b32 {thread}, {}, 127;", of.tid);
        ptx!(k, "add.u32 {barrier}, {}, 1;", of.group);
        let Consumer { spec, params, lane, width, .. } = *of;
        Writer { spec, params, lane, width, staging, thread, barrier }
    }

    /// Writes the sums of 64 rows that begin at the place.
    pub fn write(&self, k: &mut Assembler, place: &Place, acc: &[Reg<F32>], c_map: Option<Reg<B64>>) {
        let (done, by_rows) = (k.label("PART_WRITTEN"), k.label("BY_ROWS"));
        if let Some(c_map) = c_map {
            self.by_tma(k, place, acc, c_map, &by_rows);
            if self.spec.kind == Kind::One {
                return;
            }
            ptx!(k, "bra {done};");
            k.place(&by_rows);
        }
        self.by_rows(k, place, acc, &done);
        k.place(&done);
    }

    fn sync(&self, k: &mut Assembler) {
        ptx!(k, "bar.sync {}, 128;", self.barrier);
    }

    /// Through floats in shared memory.
    fn by_rows(&self, k: &mut Assembler, place: &Place, acc: &[Reg<F32>], done: &Label) {
        let [row, pair, n0, granule] = [(); 4].map(|()| k.reg::<B32>());
        let q = k.reg::<Pred>();
        ptx!(k, "shr.u32 {row}, {}, 5;", self.thread);
        ptx!(k, "shl.b32 {row}, {row}, 4;");
        ptx!(k, "shr.u32 {pair}, {}, 2;", self.lane);
        ptx!(k, "add.u32 {row}, {row}, {pair};");
        ptx!(k, "and.b32 {pair}, {}, 3;", self.lane);
        let places: Vec<Reg<B32>> = (0..self.width / 8)
            .map(|j| {
                ptx!(k, "mov.u32 {granule}, {j};");
                output::pair_place(k, self.staging, self.width, row, granule, pair)
            })
            .collect();
        ptx!(k, "mov.u32 {n0}, {};", place.n0);
        for acc in acc.chunks_exact((self.width / 2) as usize) {
            ptx!(k, "setp.ge.u32 {q}, {n0}, {};", self.params.n);
            ptx!(k, "@{q} bra {done};");
            self.sync(k);
            for (at, acc) in places.iter().zip(acc.chunks_exact(4)) {
                ptx!(k, "st.shared.v2.f32 [{at}], {};", vector(&acc[..2]));
                ptx!(k, "st.shared.v2.f32 [{at}+{}], {};", 8 * self.width * 4, vector(&acc[2..]));
            }
            self.sync(k);
            let (here, size) = (Place { n0, ..*place }, (64, self.width));
            output::write(k, self.spec, self.params, &here, size, self.staging, self.thread, 128);
            ptx!(k, "add.u32 {n0}, {n0}, {};", self.width);
        }
    }

    /// Through bf16 in shared memory, and by TMA; or goes to `by_rows` where some of the rows are not the group's.
    fn by_tma(&self, k: &mut Assembler, place: &Place, acc: &[Reg<F32>], c_map: Reg<B64>, by_rows: &Label) {
        let [row, col, line, twist, n0] = [(); 5].map(|()| k.reg::<B32>());
        let (q, leads) = (k.reg::<Pred>(), k.reg::<Pred>());
        ptx!(k, "setp.eq.u32 {leads}, {}, 0;", self.thread);
        if self.spec.kind != Kind::One {
            // Panels that TMA still reads are to become floats.
            let whole = k.label("WHOLE_ROWS");
            ptx!(k, "add.u32 {row}, {}, 64;", place.m0);
            ptx!(k, "setp.le.u32 {q}, {row}, {};", place.rows);
            ptx!(k, "@{q} bra {whole};");
            ptx!(k, "@{leads} cp.async.bulk.wait_group.read 0;");
            ptx!(k, "bra {by_rows};");
            k.place(&whole);
        }
        ptx!(k, "add.u32 {row}, {}, {};", place.first_row, place.m0);
        ptx!(k, "mov.u32 {n0}, {};", place.n0);
        // A lane's row of four 8 x 8 matrices: rows 0..8 and 8..16 of 8 columns, then of the next 8.
        ptx!(k, "and.b32 {twist}, {}, 7;", self.lane);
        ptx!(k, "shr.u32 {line}, {}, 5;", self.thread);
        ptx!(k, "shl.b32 {line}, {line}, 4;");
        ptx!(k, "and.b32 {col}, {}, 15;", self.lane);
        ptx!(k, "add.u32 {line}, {line}, {col};");
        ptx!(k, "mad.lo.u32 {line}, {line}, 128, {};", self.staging);
        ptx!(k, "shr.u32 {col}, {}, 4;", self.lane);
        let places: Vec<Reg<B32>> = (0..4)
            .map(|j| {
                let at = k.reg::<B32>();
                ptx!(k, "add.u32 {at}, {col}, {};", 2 * j);
                ptx!(k, "xor.b32 {at}, {at}, {twist};");
                ptx!(k, "mad.lo.u32 {at}, {at}, 16, {line};");
                at
            })
            .collect();
        let panels = staging_bytes(self.width) / PANEL_BYTES;
        // A tile of one panel always uses the first.
        let pending = if acc.len() > 32 { panels - 1 } else { 0 };
        for (panel, acc) in acc.chunks_exact(32).enumerate() {
            let offset = (panel as u32 % panels) * PANEL_BYTES;
            ptx!(k, "@{leads} cp.async.bulk.wait_group.read {pending};");
            self.sync(k);
            for (at, acc) in places.iter().zip(acc.chunks_exact(8)) {
                let words: Vec<Reg<B32>> = acc.chunks_exact(2).map(|pair| pack(k, pair[0], pair[1])).collect();
                ptx!(k, "stmatrix.sync.aligned.m8n8.x4.shared.b16 [{at}+{offset}], {};", vector(&words));
            }
            ptx!(k, "fence.proxy.async.shared::cta;");
            self.sync(k);
            let at = k.reg::<B32>();
            ptx!(k, "add.u32 {at}, {}, {offset};", self.staging);
            ptx!(k, "setp.lt.u32 {q}, {n0}, {};", self.params.n);
            ptx!(k, "and.pred {q}, {q}, {leads};");
            ptx!(k, "@{q} cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [{c_map}, {{{n0}, {row}}}], [{at}];");
            ptx!(k, "@{leads} cp.async.bulk.commit_group;");
            ptx!(k, "add.u32 {n0}, {n0}, 64;");
        }
    }
}
