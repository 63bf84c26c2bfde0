//! RMSNorm whose output is codes: y is not rounded in between, and never in memory.
//!
//! Signature: (x, w, codes, scales, rstd: addresses, rows, c, d, tiles a row, pitch of the scales: u32, eps: f32). A warp or a block has a row,
//! as in [`crate::ptx::rms_norm`], whose sum of squares this is; then eight lanes have a tile at a time. The second reading of the row comes from
//! the caches. The fold over a block has its barrier.
//!
//! Time: bytes over memory bandwidth: an element of bf16 is 2 bytes in and 1 out.

use super::{
    code::Recipe,
    rows::{COLUMNS, Slot},
};
use crate::{
    dtype::DType,
    ptx,
    ptx::{
        Kernel,
        asm::{B32, F32, Pred, Reg},
        fold::Team,
        parts::{element, f32_op, row, strided},
        rms_norm,
    },
};

/// `lanes` neighbours at a time for the sum of squares, as many as [`rms_norm::forward`] takes.
pub(super) fn kernel(dtype: DType, team: Team, lanes: usize, wide: bool, recipe: Recipe) -> Kernel {
    let columns = if wide { COLUMNS } else { 1 };
    let name = format!("quantize_rms_norm_{}_{}_x{lanes}_x{columns}", dtype.name(), team.name());
    recipe.kernel(&name, move |k| {
        let (x, w, codes) = (k.pointer("x"), k.pointer("w"), k.pointer("codes"));
        let (scales, rstd) = (k.pointer("scales"), k.pointer("rstd"));
        let [rows, c, d, tiles, pitch] = ["rows", "c", "d", "tiles", "pitch"].map(|name| k.u32(name));
        let eps = k.f32("eps");
        let (index, lane) = team.place(k, rows);
        let (x, to) = (row(k, x, index, c, dtype), row(k, codes, index, d, DType::U8));
        let r = rms_norm::reciprocal(k, (team, lane), x, d, eps, (dtype, lanes));
        rms_norm::store_by_first(k, lane, rstd, index, r, dtype);
        // The first of the four tiles of this warp.
        let (warp, within) = (k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "shr.u32 {warp}, {lane}, 5;");
        ptx!(k, "shl.b32 {warp}, {warp}, 2;");
        ptx!(k, "bfe.u32 {within}, {lane}, 3, 2;");
        strided(k, warp, tiles, team.threads() / 8, |k, first| {
            let (tile, there) = (k.reg::<B32>(), k.reg::<Pred>());
            ptx!(k, "add.u32 {tile}, {first}, {within};");
            ptx!(k, "setp.lt.u32 {there}, {tile}, {tiles};");
            let slot = Slot::new(k, wide, tile, d, there);
            let (x, w) = (slot.load(k, x, dtype), slot.load(k, w, dtype));
            let y: Vec<Reg<F32>> = x
                .into_iter()
                .zip(w)
                .map(|(x, w)| {
                    let y = f32_op(k, "mul", x, r);
                    f32_op(k, "mul", y, w)
                })
                .collect();
            let scale = slot.quantize(k, recipe, &y, to);
            let at = row(k, scales, tile, pitch, DType::F32);
            let at = element(k, at, index, DType::F32);
            slot.store_scale(k, at, scale, "f32");
        });
    })
}
