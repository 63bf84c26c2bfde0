//! The consumers: wgmma over the stages, then the epilogue.

use super::{
    super::{
        epilogue::{Consumer, Writer},
        pipeline::{Descriptor, PANEL_BYTES, Turn, wait},
        schedule::{Finder, Place},
    },
    A_BYTES, BK, BM, Block, CONSUMERS, WIDTH, tiles_of_k,
};
use crate::{
    ptx,
    ptx::asm::{Assembler, B32, B64, F32, Pred, Reg, vector},
};

/// Code of the consumer warpgroups; the end follows.
pub(super) fn emit(k: &mut Assembler, block: &Block, c_map: Option<Reg<B64>>) {
    let Block { spec, tile, params, .. } = block;
    let k_major = (spec.layout.a_k_major(), spec.layout.b_k_major());
    let stage_bytes = tile.stage_bytes();
    let [group, number, step, a_base, b_base] = [(); 5].map(|()| k.reg::<B32>());
    let (q, first) = (k.reg::<Pred>(), k.reg::<Pred>());
    ptx!(k, "shr.u32 {group}, {}, 2;", block.warp);
    ptx!(k, "mov.u32 {number}, %ctaid.x;");
    ptx!(k, "mov.u32 {step}, %nctaid.x;");
    // 64 rows of A are 8 KiB in either layout.
    ptx!(k, "mad.lo.u32 {a_base}, {group}, {PANEL_BYTES}, {};", block.base);
    ptx!(k, "add.u32 {b_base}, {}, {A_BYTES};", block.base);
    let (a, b) = (Descriptor::new(k, a_base, k_major.0), Descriptor::new(k, b_base, k_major.1));
    let turn = Turn::new(k);
    let finder = Finder::new(k, spec, params, BM, tile.bn);
    let acc: Vec<Reg<F32>> = k.regs((tile.bn / 2) as usize);
    let (next, multiply, written) = (k.label("CONSUME_TILE"), k.label("MULTIPLY"), k.label("WRITTEN"));
    let last = k.label("LAST_WRITTEN");

    k.place(&next);
    let place = finder.find(k, params, number, &last);
    let tiles = tiles_of_k(k, place.inner);
    let [done, full, before] = [(); 3].map(|()| k.reg::<B32>());
    ptx!(k, "setp.eq.u32 {q}, {tiles}, 0;");
    ptx!(k, "@{q} bra {written};");
    ptx!(k, "mov.u32 {done}, 0;");
    ptx!(k, "mov.u32 {before}, 0;");
    for x in &acc {
        ptx!(k, "mov.f32 {x}, 0f00000000;");
    }
    k.place(&multiply);
    ptx!(k, "mad.lo.u32 {full}, {}, 8, {};", turn.stage, block.barriers);
    wait(k, full, 0, turn.parity);
    if spec.kind.is_inner() {
        zero_tail(k, block, &place, &turn, group, done);
    }
    let descriptors_a = a.of_stage(k, turn.stage, stage_bytes);
    let descriptors_b = b.of_stage(k, turn.stage, stage_bytes);
    ptx!(k, "setp.ne.u32 {first}, {done}, 0;");
    ptx!(k, "wgmma.fence.sync.aligned;");
    for (a, b) in descriptors_a.iter().zip(&descriptors_b) {
        ptx!(
            k,
            "wgmma.mma_async.sync.aligned.m64n{}k16.f32.bf16.bf16 {}, {a}, {b}, 1, 1, 1, {}, {};",
            tile.bn,
            vector(&acc),
            u8::from(!k_major.0),
            u8::from(!k_major.1)
        );
    }
    ptx!(k, "wgmma.commit_group.sync.aligned;");
    ptx!(k, "wgmma.wait_group.sync.aligned 1;");
    // Of the tile before, which is read now.
    ptx!(k, "setp.eq.u32 {q}, {}, 0;", block.lane);
    ptx!(k, "and.pred {q}, {q}, {first};");
    ptx!(k, "@{q} mbarrier.arrive.shared::cta.b64 _, [{before}+{}];", block.to_empty());
    ptx!(k, "mov.u32 {before}, {full};");
    turn.advance(k, tile.stages);
    ptx!(k, "add.u32 {done}, {done}, 1;");
    ptx!(k, "setp.lt.u32 {q}, {done}, {tiles};");
    ptx!(k, "@{q} bra {multiply};");
    ptx!(k, "wgmma.wait_group.sync.aligned 0;");
    ptx!(k, "setp.eq.u32 {q}, {}, 0;", block.lane);
    ptx!(k, "@{q} mbarrier.arrive.shared::cta.b64 _, [{before}+{}];", block.to_empty());
    let m0 = k.reg::<B32>();
    ptx!(k, "mad.lo.u32 {m0}, {group}, 64, {};", place.m0);
    let consumer = Consumer { spec, params, tid: block.tid, lane: block.lane, group, width: WIDTH };
    let writer = Writer::new(k, &consumer, block.base, tile.staging());
    writer.write(k, &Place { m0, ..place }, &acc, c_map);
    k.place(&written);
    ptx!(k, "add.u32 {number}, {number}, {step};");
    ptx!(k, "bra {next};");
    k.place(&last);
    if c_map.is_some() {
        // Shared memory is the block's until TMA has read it; threads that started nothing pass.
        ptx!(k, "cp.async.bulk.wait_group.read 0;");
    }
}

/// Zeros the rows of k past the group's in the last tile of k, of both operands.
fn zero_tail(k: &mut Assembler, block: &Block, place: &Place, turn: &Turn, group: Reg<B32>, done: Reg<B32>) {
    let [valid, row, at, zero] = [(); 4].map(|()| k.reg::<B32>());
    let (q, whole) = (k.reg::<Pred>(), k.label("WHOLE"));
    ptx!(k, "mul.lo.u32 {valid}, {done}, {BK};");
    ptx!(k, "sub.u32 {valid}, {}, {valid};", place.inner);
    ptx!(k, "setp.ge.u32 {q}, {valid}, {BK};");
    ptx!(k, "@{q} bra {whole};");
    // A thread has one piece of 16 bytes of every sixteenth row, in every second panel.
    ptx!(k, "mad.lo.u32 {at}, {}, {}, {};", turn.stage, block.tile.stage_bytes(), block.base);
    ptx!(k, "mad.lo.u32 {at}, {group}, {PANEL_BYTES}, {at};");
    ptx!(k, "and.b32 {row}, {}, 127;", block.tid);
    ptx!(k, "mad.lo.u32 {at}, {row}, 16, {at};");
    ptx!(k, "shr.u32 {row}, {row}, 3;");
    ptx!(k, "mov.u32 {zero}, 0;");
    let panels = (BM + block.tile.bn) / 64;
    for turn in 0..BK / 16 {
        ptx!(k, "setp.ge.u32 {q}, {row}, {valid};");
        for panel in (0..panels).step_by(2) {
            if panel + 1 == panels {
                let first = k.reg::<Pred>();
                ptx!(k, "setp.eq.u32 {first}, {group}, 0;");
                ptx!(k, "and.pred {q}, {q}, {first};");
            }
            let offset = panel * PANEL_BYTES + turn * 16 * 128;
            ptx!(k, "@{q} st.shared.v4.b32 [{at}+{offset}], {};", vector(&[zero; 4]));
        }
        ptx!(k, "add.u32 {row}, {row}, 16;");
    }
    ptx!(k, "fence.proxy.async.shared::cta;");
    ptx!(k, "bar.sync 3, {CONSUMERS};");
    k.place(&whole);
}
