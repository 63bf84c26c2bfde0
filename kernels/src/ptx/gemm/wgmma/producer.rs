//! The producer: one thread that keeps the stages filled.

use super::{
    super::{
        pipeline::{L2_HINT, PANEL_BYTES, Turn, wait},
        problem::Kind,
        schedule::Finder,
    },
    A_BYTES, BK, BM, Block, tiles_of_k,
};
use crate::{
    ptx,
    ptx::asm::{Assembler, B32, B64, Pred, Reg},
};

/// Code of the producer warpgroup; ends in a jump to the end.
pub(super) fn emit(k: &mut Assembler, block: &Block) {
    let Block { tile, params, end, .. } = block;
    let (q, elected, next) = (k.reg::<Pred>(), k.reg::<Pred>(), k.label("PRODUCE"));
    // The other warps have nothing to do.
    ptx!(k, "setp.ne.u32 {q}, {}, {};", block.warp, super::CONSUMERS / 32);
    ptx!(k, "@{q} bra {end};");
    ptx!(k, "elect.sync _|{elected}, 0xffffffff;");
    let (number, step, hint) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<B64>());
    ptx!(k, "mov.u32 {number}, %ctaid.x;");
    ptx!(k, "mov.u32 {step}, %nctaid.x;");
    ptx!(k, "mov.b64 {hint}, {L2_HINT};");
    let turn = Turn::new(k);
    let finder = Finder::new(k, block.spec, params, BM, tile.bn);

    k.place(&next);
    let place = finder.find(k, params, number, end);
    let tiles = tiles_of_k(k, place.inner);
    let (fill, filled) = (k.label("FILL"), k.label("FILLED"));
    ptx!(k, "@!{elected} bra {filled};");
    ptx!(k, "setp.eq.u32 {q}, {tiles}, 0;");
    ptx!(k, "@{q} bra {filled};");
    let (at_k, row) = (k.reg::<B32>(), k.reg::<B32>());
    ptx!(k, "mov.u32 {at_k}, {};", place.first_k);
    ptx!(k, "add.u32 {row}, {}, {};", place.first_row, place.m0);

    k.place(&fill);
    let [full, other, to] = [(); 3].map(|()| k.reg::<B32>());
    ptx!(k, "mad.lo.u32 {full}, {}, 8, {};", turn.stage, block.barriers);
    ptx!(k, "xor.b32 {other}, {}, 1;", turn.parity);
    wait(k, full, block.to_empty(), other);
    ptx!(k, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{full}], {};", tile.stage_bytes());
    ptx!(k, "mad.lo.u32 {to}, {}, {}, {};", turn.stage, tile.stage_bytes(), block.base);
    let load = |k: &mut Assembler, map: Reg<B64>, at: &[Reg<B32>]| {
        let at: Vec<String> = at.iter().map(ToString::to_string).collect();
        ptx!(
            k,
            "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [{to}], [{map}, {{{}}}], [{full}], {hint};",
            at.len(),
            at.join(", ")
        );
    };
    if block.spec.layout.a_k_major() {
        load(k, params.a, &[at_k, row]);
        ptx!(k, "add.u32 {to}, {to}, {A_BYTES};");
    } else {
        let col = k.reg::<B32>();
        ptx!(k, "mov.u32 {col}, {};", place.m0);
        for _ in 0..BM / 64 {
            load(k, params.a, &[col, at_k]);
            ptx!(k, "add.u32 {col}, {col}, 64;");
            ptx!(k, "add.u32 {to}, {to}, {PANEL_BYTES};");
        }
    }
    let third = matches!(block.spec.kind, Kind::Rows { .. }).then_some(place.group);
    if block.spec.layout.b_k_major() {
        let at: Vec<_> = [at_k, place.n0].into_iter().chain(third).collect();
        load(k, params.b, &at);
    } else {
        let col = k.reg::<B32>();
        ptx!(k, "mov.u32 {col}, {};", place.n0);
        for _ in 0..tile.bn / 64 {
            let at: Vec<_> = [col, at_k].into_iter().chain(third).collect();
            load(k, params.b, &at);
            ptx!(k, "add.u32 {col}, {col}, 64;");
            ptx!(k, "add.u32 {to}, {to}, {PANEL_BYTES};");
        }
    }
    turn.advance(k, tile.stages);
    ptx!(k, "add.u32 {at_k}, {at_k}, {BK};");
    ptx!(k, "sub.u32 {tiles}, {tiles}, 1;");
    ptx!(k, "setp.ne.u32 {q}, {tiles}, 0;");
    ptx!(k, "@{q} bra {fill};");
    k.place(&filled);
    ptx!(k, "add.u32 {number}, {number}, {step};");
    ptx!(k, "bra {next};");
}
