//! The producer: one thread that keeps the stages filled.

use super::{BK, Block, tiles_of_k};
use crate::{
    ptx,
    ptx::{
        asm::{Assembler, B16, B32, B64, Pred, Reg},
        gemm::{
            pipeline::{L2_HINT, Turn, wait},
            problem::Kind,
            schedule::Finder,
        },
    },
};

/// Code of the producer warpgroup; ends in a jump to the end.
pub(super) fn emit(k: &mut Assembler, block: &Block) {
    let Block { spec, tile, params, end, .. } = block;
    let (q, elected, next) = (k.reg::<Pred>(), k.reg::<Pred>(), k.label("PRODUCE"));
    // The other warps have nothing to do.
    ptx!(k, "setp.ne.u32 {q}, {}, {};", block.warp, tile.consumer_threads() / 32);
    ptx!(k, "@{q} bra {end};");
    ptx!(k, "elect.sync _|{elected}, 0xffffffff;");
    let (number, hint) = (k.reg::<B32>(), k.reg::<B64>());
    ptx!(k, "mov.u32 {number}, {};", block.first);
    ptx!(k, "mov.b64 {hint}, {L2_HINT};");
    let all = block.rank.map(|_| k.reg::<B16>());
    if let Some(all) = all {
        ptx!(k, "mov.u16 {all}, {};", (1 << tile.blocks) - 1);
    }
    let turn = Turn::new(k);
    let finder = Finder::new(k, &spec.product, params, block.rows(), tile.bn);

    k.place(&next);
    let place = finder.find(k, params, number, end);
    let tiles = tiles_of_k(k, place.inner);
    let (fill, filled) = (k.label("FILL"), k.label("FILLED"));
    ptx!(k, "@!{elected} bra {filled};");
    ptx!(k, "setp.eq.u32 {q}, {tiles}, 0;");
    ptx!(k, "@{q} bra {filled};");
    let [at_k, at_scale, row, b_row] = [(); 4].map(|()| k.reg::<B32>());
    ptx!(k, "mov.u32 {at_k}, {};", place.first_k);
    ptx!(k, "add.u32 {row}, {}, {};", place.first_row, place.m0);
    block.to_own_rows(k, row);
    // Of B this block reads a part, for all of the cluster.
    let b_rows = tile.bn / tile.blocks;
    match block.rank {
        Some(rank) => ptx!(k, "mad.lo.u32 {b_row}, {rank}, {b_rows}, {};", place.n0),
        None => ptx!(k, "mov.u32 {b_row}, {};", place.n0),
    }

    k.place(&fill);
    let [full, other, to] = [(); 3].map(|()| k.reg::<B32>());
    ptx!(k, "mad.lo.u32 {full}, {}, 8, {};", turn.stage, block.barriers);
    ptx!(k, "xor.b32 {other}, {}, 1;", turn.parity);
    wait(k, full, block.to_empty(), other);
    let bytes = tile.stage_bytes() + tile.scale_bytes(spec.tiled);
    ptx!(k, "mbarrier.arrive.expect_tx.shared::cta.b64 _, [{full}], {bytes};");
    let load = |k: &mut Assembler, map: Reg<B64>, at: &[Reg<B32>], to_all: Option<Reg<B16>>| {
        let at: Vec<String> = at.iter().map(ToString::to_string).collect();
        let (multicast, mask) = to_all.map_or(Default::default(), |mask| (".multicast::cluster", format!("{mask}, ")));
        ptx!(
            k,
            "cp.async.bulk.tensor.{}d.shared::cluster.global.mbarrier::complete_tx::bytes{multicast}.L2::cache_hint [{to}], [{map}, {{{}}}], [{full}], {mask}{hint};",
            at.len(),
            at.join(", ")
        );
    };
    ptx!(k, "mad.lo.u32 {to}, {}, {}, {};", turn.stage, tile.stage_bytes(), block.base);
    load(k, params.a, &[at_k, row], None);
    if let Some(rank) = block.rank {
        ptx!(k, "mad.lo.u32 {to}, {rank}, {}, {to};", b_rows * BK);
    }
    ptx!(k, "add.u32 {to}, {to}, {};", tile.a_bytes());
    let third = matches!(spec.product.kind, Kind::Rows { .. }).then_some(place.group);
    let at: Vec<_> = [at_k, b_row].into_iter().chain(third).collect();
    load(k, params.b, &at, all);
    ptx!(k, "mad.lo.u32 {to}, {}, {}, {};", turn.stage, tile.scale_bytes(spec.tiled), block.base);
    ptx!(k, "add.u32 {to}, {to}, {};", tile.scales());
    ptx!(k, "shr.u32 {at_scale}, {at_k}, {};", BK.trailing_zeros());
    load(k, block.scale_a, &[row, at_scale], None);
    if spec.tiled {
        ptx!(k, "add.u32 {to}, {to}, {};", 4 * tile.bm);
        load(k, block.scale_b, &[place.n0, at_scale], None);
    }
    turn.advance(k, tile.stages);
    ptx!(k, "add.u32 {at_k}, {at_k}, {BK};");
    ptx!(k, "sub.u32 {tiles}, {tiles}, 1;");
    ptx!(k, "setp.ne.u32 {q}, {tiles}, 0;");
    ptx!(k, "@{q} bra {fill};");
    k.place(&filled);
    ptx!(k, "add.u32 {number}, {number}, {};", block.step);
    ptx!(k, "bra {next};");
}
