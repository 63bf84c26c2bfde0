//! The variants that a training step of aligned shapes uses.

use super::{Spec, mma, wgmma};
use crate::{
    dtype::DType,
    ptx::{
        gemm::{Layout, problem},
        golden::Variant,
    },
};
use problem::Kind;

/// The usual variants. mma: two blocks of 128 threads fit a multiprocessor; wgmma: what the threads of three or two warpgroups share,
/// before consumers take 232.
pub fn variants() -> Vec<Variant> {
    let rows = Kind::Rows { masked: false };
    let passes = [
        (Kind::One, false, DType::Bf16, false),
        (Kind::One, false, DType::Bf16, true),
        (rows, false, DType::Bf16, false),
        (Kind::One, true, DType::F32, true),
        (Kind::PaddedInner, true, DType::F32, true),
    ];
    let mut variants = vec![];
    for (kind, tiled, output, addend) in passes {
        let (layout, input, wide) = (Layout::Nt, DType::U8, [true; 3]);
        let spec = Spec { product: problem::Spec { layout, kind, input, output, addend, bias: false, wide }, tiled };
        variants.push(Variant::new(mma::kernel(spec), 200));
        let tiles = if tiled { &wgmma::FOR_TILES[..2] } else { &wgmma::FOR_BLOCKS[..4] };
        variants.extend(tiles.iter().map(|tile| Variant::new(wgmma::kernel(spec, *tile), 168)));
        if kind == Kind::One && !addend {
            let few = &wgmma::FOR_BLOCKS[4..];
            variants.extend(few.iter().map(|tile| Variant::new(wgmma::kernel(spec, *tile), 255)));
        }
    }
    variants
}
