//! The consumers: wgmma over the stages, promotion, then the epilogue.

use super::{Block, WIDTH, tiles_of_k};
use crate::{
    ptx,
    ptx::{
        asm::{Assembler, B32, B64, F32, Pred, Reg, vector},
        gemm::{
            epilogue::{Consumer, Writer},
            pipeline::{Descriptor, PANEL_BYTES, Turn, wait},
            schedule::{Finder, Place},
        },
    },
};

/// The scales of B's block in the stage at hand and in the next, and where the one after is.
struct BlockScale {
    now: Reg<F32>,
    next: Reg<F32>,
    at: Reg<B64>,
}

impl BlockScale {
    /// Of the tile at `place`: starts reading the first.
    fn start(k: &mut Assembler, block: &Block, place: &Place) -> Self {
        let scale = BlockScale { now: k.reg(), next: k.reg(), at: k.reg() };
        let [row, rows] = [(); 2].map(|()| k.reg::<B32>());
        ptx!(k, "add.u32 {rows}, {}, 127;", block.params.n);
        ptx!(k, "shr.u32 {rows}, {rows}, 7;");
        ptx!(k, "shr.u32 {row}, {}, 7;", place.n0);
        ptx!(k, "mad.lo.u32 {row}, {}, {rows}, {row};", place.group);
        let per_row = tiles_of_k(k, block.params.k);
        ptx!(k, "mul.wide.u32 {}, {row}, {per_row};", scale.at);
        ptx!(k, "shl.b64 {0}, {0}, 2;", scale.at);
        ptx!(k, "add.u64 {0}, {0}, {1};", scale.at, block.scale_b);
        ptx!(k, "ld.global.nc.f32 {}, [{}];", scale.next, scale.at);
        scale
    }

    /// To the next stage; starts reading the one after, unless this is the last.
    fn advance(&self, k: &mut Assembler, left: Reg<B32>) {
        let q = k.reg::<Pred>();
        ptx!(k, "mov.f32 {}, {};", self.now, self.next);
        ptx!(k, "setp.gt.u32 {q}, {left}, 1;");
        ptx!(k, "add.u64 {0}, {0}, 4;", self.at);
        ptx!(k, "@{q} ld.global.nc.f32 {}, [{}];", self.next, self.at);
    }
}

/// Code of the consumer warpgroups; the end follows.
pub(super) fn emit(k: &mut Assembler, block: &Block, c_map: Option<Reg<B64>>) {
    let Block { spec, tile, params, .. } = block;
    let parts = tile.parts();
    let [group, number, a_base, b_base, own_scale] = [(); 5].map(|()| k.reg::<B32>());
    let q = k.reg::<Pred>();
    ptx!(k, "shr.u32 {group}, {}, 2;", block.warp);
    ptx!(k, "mov.u32 {number}, {};", block.first);
    ptx!(k, "mad.lo.u32 {a_base}, {group}, {}, {};", parts * PANEL_BYTES, block.base);
    ptx!(k, "add.u32 {b_base}, {}, {};", block.base, tile.a_bytes());
    let a: Vec<Descriptor> = (0..parts)
        .map(|_| {
            let descriptor = Descriptor::new(k, a_base, true);
            ptx!(k, "add.u32 {a_base}, {a_base}, {PANEL_BYTES};");
            descriptor
        })
        .collect();
    let b = Descriptor::new(k, b_base, true);
    // A thread's first row is of its warp's 16, and of its lane.
    let row = k.reg::<B32>();
    ptx!(k, "and.b32 {row}, {}, 3;", block.warp);
    ptx!(k, "shl.b32 {row}, {row}, 4;");
    ptx!(k, "shr.u32 {own_scale}, {}, 2;", block.lane);
    ptx!(k, "add.u32 {row}, {row}, {own_scale};");
    ptx!(k, "mad.lo.u32 {row}, {group}, {}, {row};", parts * 64);
    ptx!(k, "mad.lo.u32 {own_scale}, {row}, 4, {};", block.base);
    ptx!(k, "add.u32 {own_scale}, {own_scale}, {};", tile.scales());
    let column_scale = spec.tiled.then(|| {
        let at = k.reg::<B32>();
        ptx!(k, "and.b32 {at}, {}, 3;", block.lane);
        ptx!(k, "mad.lo.u32 {at}, {at}, 8, {};", block.base);
        ptx!(k, "add.u32 {at}, {at}, {};", tile.scales() + 4 * tile.bm);
        at
    });
    let release = Release::new(k, block);
    let turn = Turn::new(k);
    let finder = Finder::new(k, &spec.product, params, block.rows(), tile.bn);
    let consumer = Consumer { spec: &spec.product, params, tid: block.tid, lane: block.lane, group, width: WIDTH };
    let writer = Writer::new(k, &consumer, block.base, tile.staging());
    let acc: Vec<Reg<F32>> = k.regs((tile.bn / 2) as usize);
    let sums: Vec<Vec<Reg<F32>>> = (0..parts).map(|_| k.regs(acc.len())).collect();
    let (next, multiply, written) = (k.label("CONSUME_TILE"), k.label("MULTIPLY"), k.label("WRITTEN"));
    let last = k.label("LAST_WRITTEN");

    k.place(&next);
    let place = finder.find(k, params, number, &last);
    let left = tiles_of_k(k, place.inner);
    ptx!(k, "setp.eq.u32 {q}, {left}, 0;");
    ptx!(k, "@{q} bra {written};");
    block.to_own_rows(k, place.m0);
    let block_scale = (!spec.tiled).then(|| BlockScale::start(k, block, &place));
    for sum in sums.iter().flatten() {
        ptx!(k, "mov.f32 {sum}, 0f00000000;");
    }
    k.place(&multiply);
    let full = k.reg::<B32>();
    ptx!(k, "mad.lo.u32 {full}, {}, 8, {};", turn.stage, block.barriers);
    wait(k, full, 0, turn.parity);
    if let Some(scale) = &block_scale {
        scale.advance(k, left);
    }
    let stage_scales = k.reg::<B32>();
    ptx!(k, "mul.lo.u32 {stage_scales}, {}, {};", turn.stage, tile.scale_bytes(spec.tiled));
    let rows = row_scales(k, own_scale, stage_scales, parts);
    let columns = match (column_scale, &block_scale) {
        (Some(at), _) => column_scales(k, at, stage_scales, tile.bn),
        (None, Some(scale)) => vec![scale.now],
        (None, None) => vec![],
    };
    let b = b.of_stage(k, turn.stage, tile.stage_bytes());
    for (part, ((a, rows), sums)) in a.iter().zip(&rows).zip(&sums).enumerate() {
        let a = a.of_stage(k, turn.stage, tile.stage_bytes());
        ptx!(k, "wgmma.fence.sync.aligned;");
        for (j, (a, b)) in a.iter().zip(&b).enumerate() {
            let (n, acc, onto) = (tile.bn, vector(&acc), u8::from(j > 0));
            ptx!(k, "wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {acc}, {a}, {b}, {onto}, 1, 1;");
        }
        ptx!(k, "wgmma.commit_group.sync.aligned;");
        ptx!(k, "wgmma.wait_group.sync.aligned 0;");
        if part + 1 == parts as usize {
            release.emit(k, block, full);
        }
        promote(k, &acc, rows, &columns, sums);
    }
    turn.advance(k, tile.stages);
    ptx!(k, "sub.u32 {left}, {left}, 1;");
    ptx!(k, "setp.ne.u32 {q}, {left}, 0;");
    ptx!(k, "@{q} bra {multiply};");
    let m0 = k.reg::<B32>();
    ptx!(k, "mad.lo.u32 {m0}, {group}, {}, {};", parts * 64, place.m0);
    for (part, sums) in sums.iter().enumerate() {
        if part > 0 {
            ptx!(k, "add.u32 {m0}, {m0}, 64;");
        }
        writer.write(k, &Place { m0, ..place }, sums, c_map);
    }
    k.place(&written);
    ptx!(k, "add.u32 {number}, {number}, {};", block.step);
    ptx!(k, "bra {next};");
    k.place(&last);
    if c_map.is_some() {
        // Shared memory is the block's until TMA has read it; threads that started nothing pass.
        ptx!(k, "cp.async.bulk.wait_group.read 0;");
    }
}

/// For each part the scales of a thread's two rows, 8 apart.
fn row_scales(k: &mut Assembler, own: Reg<B32>, stage: Reg<B32>, parts: u32) -> Vec<Vec<Reg<F32>>> {
    let at = k.reg::<B32>();
    ptx!(k, "add.u32 {at}, {own}, {stage};");
    (0..parts)
        .map(|part| {
            let scales = k.regs::<F32>(2);
            for (half, scale) in (0..).zip(&scales) {
                ptx!(k, "ld.shared.f32 {scale}, [{at}+{}];", 4 * (64 * part + 8 * half));
            }
            scales
        })
        .collect()
}

/// Those of a thread's columns: two of each eight.
fn column_scales(k: &mut Assembler, own: Reg<B32>, stage: Reg<B32>, bn: u32) -> Vec<Reg<F32>> {
    let (at, scales) = (k.reg::<B32>(), k.regs::<F32>((bn / 4) as usize));
    ptx!(k, "add.u32 {at}, {own}, {stage};");
    for (eight, pair) in scales.chunks_exact(2).enumerate() {
        ptx!(k, "ld.shared.v2.f32 {}, [{at}+{}];", vector(pair), 32 * eight);
    }
    scales
}

/// sums += acc * (row's scale * column's scale); with one scale for all columns, the two products are made once.
fn promote(k: &mut Assembler, acc: &[Reg<F32>], rows: &[Reg<F32>], columns: &[Reg<F32>], sums: &[Reg<F32>]) {
    let product = |k: &mut Assembler, row: Reg<F32>, column: Reg<F32>| {
        let both = k.reg::<F32>();
        ptx!(k, "mul.rn.f32 {both}, {row}, {column};");
        both
    };
    let for_all: Vec<Reg<F32>> = match columns {
        [one] => rows.iter().map(|row| product(k, *row, *one)).collect(),
        _ => vec![],
    };
    for (i, (acc, sum)) in acc.iter().zip(sums).enumerate() {
        // Of four, two are of one row and two of the next, each of the same two columns.
        let half = i / 2 % 2;
        let scale = match for_all.get(half) {
            Some(scale) => *scale,
            None => product(k, rows[half], columns[i / 4 * 2 + i % 2]),
        };
        ptx!(k, "fma.rn.f32 {sum}, {acc}, {scale}, {sum};");
    }
}

/// How a warp says that it has read a stage: one lane for each block of the cluster.
struct Release {
    arrives: Reg<Pred>,
    /// What leads from a block's own barrier to that of the lane's block.
    to_block: Option<Reg<B32>>,
}

impl Release {
    fn new(k: &mut Assembler, block: &Block) -> Self {
        let arrives = k.reg::<Pred>();
        ptx!(k, "setp.lt.u32 {arrives}, {}, {};", block.lane, block.tile.blocks);
        let to_block = block.rank.map(|_| {
            let (to, lane) = (k.reg::<B32>(), k.reg::<B32>());
            ptx!(k, "min.u32 {lane}, {}, {};", block.lane, block.tile.blocks - 1);
            ptx!(k, "mapa.shared::cluster.u32 {to}, {}, {lane};", block.barriers);
            ptx!(k, "sub.u32 {to}, {to}, {};", block.barriers);
            to
        });
        Release { arrives, to_block }
    }

    fn emit(&self, k: &mut Assembler, block: &Block, full: Reg<B32>) {
        let q = self.arrives;
        // Scales are read by all lanes. (They meet at wgmma, but PTX does not say that this orders their reads.)
        ptx!(k, "bar.warp.sync 0xffffffff;");
        match self.to_block {
            None => ptx!(k, "@{q} mbarrier.arrive.shared::cta.b64 _, [{full}+{}];", block.to_empty()),
            Some(to_block) => {
                let at = k.reg::<B32>();
                ptx!(k, "add.u32 {at}, {full}, {to_block};");
                ptx!(k, "@{q} mbarrier.arrive.release.cluster.shared::cluster.b64 _, [{at}+{}];", block.to_empty());
            }
        }
    }
}
