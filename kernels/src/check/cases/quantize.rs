//! Quantizers: codes are compared bit by bit. What is quantized after functions whose last bits differ between devices is of numbers for
//! which they do not: sums of small integers, and gates so large that they are open or shut.

use super::{Fill, List, Sizes, Tolerance, chosen, offsets, t};
use crate::{
    dtype::DType::{self, U8, U32},
    fp8::{Blocks, Scaling, Tiles, padded},
    ops::{dequantize, e5m6, permute, quantize, rms_norm, swiglu},
    tensor::Tensor,
};

type Input = (DType, Vec<usize>, Fill);

fn tiles(rows: usize, columns: usize) -> [Input; 2] {
    let scales = Tiles::scale_shape(rows, columns);
    [t(U8, &[rows, columns], Fill::Poison), t(DType::F32, &scales, Fill::Poison)]
}

fn blocks(dims: &[usize]) -> [Input; 2] {
    [t(U8, dims, Fill::Poison), t(DType::F32, &Blocks::scale_shape(dims), Fill::Poison)]
}

fn as_tiles(x: &[Tensor]) -> Tiles {
    Tiles { codes: x[0], scales: x[1] }
}

fn as_blocks(x: &[Tensor]) -> Blocks {
    Blocks { codes: x[0], scales: x[1] }
}

fn with(inputs: &[Input], outputs: [Input; 2]) -> Vec<Input> {
    [inputs, &outputs].concat()
}

impl List {
    pub(super) fn quantizers(&mut self, z: Sizes, dtype: DType) {
        let near = Tolerance::elementwise(DType::F32);
        let (n, c, e) = (z.t, 4 * z.d, z.e);
        let x = |rows: usize| t(dtype, &[rows, c], Fill::Random);
        for scaling in [Scaling::Real, Scaling::PowerOfTwo] {
            let shape = || format!("[{n}, {c}] {scaling:?}");
            self.add(("quantize::tiles", dtype, near), shape(), with(&[x(n)], tiles(n, c)), move |s, x| {
                quantize::tiles(s, x[0], as_tiles(&x[1..]), scaling)
            });
            self.add(("quantize::columns", dtype, near), shape(), with(&[x(n)], tiles(c, n)), move |s, x| {
                quantize::columns(s, x[0], None, as_tiles(&x[1..]), scaling)
            });
            let rows = z.t * z.k;
            let out = tiles(c, padded(rows, e));
            let shape_of_groups = || format!("[{rows}, {c}] of {e} {scaling:?}");
            let tensors = with(&[x(rows), offsets(z)], out.clone());
            self.add(("quantize::columns", dtype, near), shape_of_groups(), tensors, move |s, x| {
                quantize::columns(s, x[0], Some(x[1]), as_tiles(&x[2..]), scaling)
            });
            // Tiles first: they are what is read.
            let tensors = [&[x(rows), offsets(z)][..], &tiles(rows, c), &out].concat();
            self.add(("quantize::retile", dtype, near), shape_of_groups(), tensors, move |s, x| {
                quantize::tiles(s, x[0], as_tiles(&x[2..]), scaling)?;
                quantize::retile(s, as_tiles(&x[2..]), Some(x[1]), as_tiles(&x[4..]), scaling)
            });
            let w = t(dtype, &[e, z.f, c], Fill::Random);
            let tensors = [&[w][..], &blocks(&[e, z.f, c]), &blocks(&[e, c, z.f])].concat();
            let shape_of_weights = format!("[{e}, {}, {c}] {scaling:?}", z.f);
            self.add(("quantize::blocks", dtype, near), shape_of_weights, tensors, move |s, x| {
                quantize::blocks(s, x[0], as_blocks(&x[1..]), Some(as_blocks(&x[3..])), scaling)
            });
            self.fused(z, dtype, scaling);
        }
        let tensors = [&[x(n)][..], &tiles(n, c), &[t(dtype, &[n, c], Fill::Poison)]].concat();
        self.add(("quantize::tiles and dequantize", dtype, near), format!("[{n}, {c}]"), tensors, |s, x| {
            quantize::tiles(s, x[0], as_tiles(&x[1..]), Scaling::Real)?;
            dequantize::tiles(s, as_tiles(&x[1..]), x[3])
        });
        let packed = [t(U8, &[n, e5m6::packed(c)], Fill::Poison), t(U8, &[n, c.div_ceil(128)], Fill::Poison)];
        let tensors = [&[x(n)][..], &packed, &[t(dtype, &[n, c], Fill::Poison)]].concat();
        self.add(("e5m6::encode and decode", dtype, near), format!("[{n}, {c}]"), tensors, |s, x| {
            e5m6::encode(s, x[0], x[1], x[2])?;
            e5m6::decode(s, x[1], x[2], x[3])
        });
    }

    fn fused(&mut self, z: Sizes, dtype: DType, scaling: Scaling) {
        let near = Tolerance::elementwise(dtype);
        let (n, d) = (z.t, z.d);
        let whole = (0..n * (d + z.r)).map(|i| (i * i % 17) as f64 - 8.0).collect();
        let x = t(dtype, &[n, d + z.r], Fill::Values(whole));
        let inputs = [x, t(dtype, &[d], Fill::Random), t(dtype, &[n], Fill::Poison)];
        let shape = || format!("[{n}, {d}] {scaling:?}");
        self.add(("rms_norm::forward_tiles", dtype, near), shape(), with(&inputs, tiles(n, d)), move |s, x| {
            rms_norm::forward_tiles(s, x[0], x[1], as_tiles(&x[3..]), x[2], 1e-6, scaling)
        });
        let gate = |i: usize| if i % 7 == 3 { -200.0 } else { (32 + i % 64) as f64 };
        let value = |i: usize| ((i * 31 % 1009) as f64 - 500.0) / 128.0;
        let h = (0..n * 2 * z.f).map(|i| if (i / z.f).is_multiple_of(2) { gate(i) } else { value(i) }).collect();
        let h = t(dtype, &[n, 2 * z.f], Fill::Values(h));
        let shape_of_h = format!("[{n}, {}] {scaling:?}", z.f);
        self.add(("swiglu::forward_tiles", dtype, near), shape_of_h, with(&[h], tiles(n, z.f)), move |s, x| {
            swiglu::forward_tiles(s, x[0], as_tiles(&x[1..]), scaling)
        });
        let rows = n * z.k;
        let slots = || t(U32, &[rows], Fill::Poison);
        let indices = t(U32, &[n, z.k], Fill::U32(chosen(z)));
        let order = [indices, t(U32, &[z.e + 1], Fill::Poison), slots(), slots()];
        let tensors = [&order[..], &[t(dtype, &[n, d], Fill::Random)], &tiles(rows, d)].concat();
        self.add(("permute::permute_tiles", dtype, near), shape(), tensors, move |s, x| {
            let order = permute::Order { offsets: x[1], row_of_slot: x[2], token_of_row: x[3] };
            permute::sort(s, x[0], order)?;
            permute::permute_tiles(s, x[4], order, as_tiles(&x[5..]), scaling)
        });
    }
}
