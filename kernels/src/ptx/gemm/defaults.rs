//! The variants that a training step of aligned shapes uses.

use super::{
    super::golden::Variant,
    column_sum, mma,
    problem::{Kind, Layout, Spec},
    simt, wgmma,
};
use crate::dtype::DType;

/// The usual variants. mma: two blocks of 256 threads fit a multiprocessor; wgmma: what 384 threads share.
pub fn variants() -> Vec<Variant> {
    let sums = [DType::F32, DType::Bf16].map(|dtype| Variant::new(column_sum::kernel(dtype), 32));
    let mut variants = Vec::from(sums);
    for spec in specs(DType::F32, DType::F32) {
        variants.push(Variant::new(simt::kernel(spec, simt::SMALL), 96));
    }
    variants
        .extend(specs(DType::F32, DType::F32).first().map(|spec| Variant::new(simt::kernel(*spec, simt::LARGE), 168)));
    let into_f32 = specs(DType::Bf16, DType::F32).into_iter().filter(|spec| spec.layout == Layout::Tn);
    for spec in specs(DType::Bf16, DType::Bf16).into_iter().chain(into_f32) {
        variants.push(Variant::new(mma::kernel(spec, mma::SMALL), 96));
        variants.push(Variant::new(mma::kernel(spec, mma::LARGE), 128));
        variants.extend(
            [wgmma::NARROW, wgmma::SMALL, wgmma::LARGE].map(|tile| Variant::new(wgmma::kernel(spec, tile), 168)),
        );
    }
    variants
}

/// The passes of dense and grouped layers, all aligned.
fn specs(input: DType, output: DType) -> Vec<Spec> {
    let (rows, inner) = (Kind::Rows { masked: false }, Kind::Inner { masked: false });
    let passes = [
        (Layout::Nt, Kind::One, false),
        (Layout::Nt, Kind::One, true),
        (Layout::Nn, Kind::One, false),
        (Layout::Tn, Kind::One, true),
        (Layout::Nt, rows, false),
        (Layout::Nn, rows, false),
        (Layout::Tn, inner, true),
    ];
    let spec = |(layout, kind, addend)| Spec { layout, kind, input, output, addend, bias: false, wide: [true; 3] };
    passes.map(spec).to_vec()
}
