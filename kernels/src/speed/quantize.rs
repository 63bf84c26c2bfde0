//! Quantizers, which should be about as fast as the copy.

use super::{Bench, Bf16, F32, Given, U8, U32, offsets};
use crate::{
    error::Result,
    fp8::{Blocks, Scaling, Tiles, padded},
    ops::{e5m6, permute, permute::Order, quantize, rms_norm, swiglu},
    tensor::Tensor,
};

fn tiles(rows: usize, columns: usize) -> [Given; 2] {
    [(U8, vec![rows, columns], None), (F32, Tiles::scale_shape(rows, columns).to_vec(), None)]
}

fn blocks(dims: &[usize]) -> [Given; 2] {
    [(U8, dims.to_vec(), None), (F32, Blocks::scale_shape(dims), None)]
}

fn as_tiles(x: &[Tensor]) -> Tiles {
    Tiles { codes: x[0], scales: x[1] }
}

fn as_blocks(x: &[Tensor]) -> Blocks {
    Blocks { codes: x[0], scales: x[1] }
}

impl Bench<'_> {
    pub(super) fn quantizers(&mut self) -> Result<()> {
        const REAL: Scaling = Scaling::Real;
        let [t, d, f] = [4096, 7168, 2048].map(|size| self.size(size));
        let (x, w) = ((Bf16, vec![t, d], None), (Bf16, vec![d], None));
        let shape = || format!("[{t}, {d}]");
        let given = [&[x.clone()][..], &tiles(t, d)].concat();
        self.measure_on(("quantize::tiles", Bf16), shape(), &given, &|s, x| {
            quantize::tiles(s, x[0], as_tiles(&x[1..]), REAL)
        })?;
        let given = [&[x.clone()][..], &tiles(d, t)].concat();
        self.measure_on(("quantize::columns", Bf16), shape(), &given, &|s, x| {
            quantize::columns(s, x[0], None, as_tiles(&x[1..]), REAL)
        })?;
        let offsets = offsets(8, t);
        let n = offsets[8] as usize;
        let given = [&[(U32, vec![9], Some(offsets))][..], &tiles(n, f), &tiles(f, padded(n, 8))].concat();
        self.measure_on(("quantize::retile", U8), format!("8 x about [{t}, {f}]"), &given, &|s, x| {
            quantize::retile(s, as_tiles(&x[1..]), Some(x[0]), as_tiles(&x[3..]), REAL)
        })?;
        let given = [&[(F32, vec![d, f], None)][..], &blocks(&[d, f]), &blocks(&[f, d])].concat();
        self.measure_on(("quantize::blocks, both ways", F32), format!("[{d}, {f}]"), &given, &|s, x| {
            quantize::blocks(s, x[0], as_blocks(&x[1..]), Some(as_blocks(&x[3..])), REAL)
        })?;
        let given = [&[x.clone(), w, (Bf16, vec![t], None)][..], &tiles(t, d)].concat();
        self.measure_on(("rms_norm::forward_tiles", Bf16), shape(), &given, &|s, x| {
            rms_norm::forward_tiles(s, x[0], x[1], as_tiles(&x[3..]), x[2], 1e-6, REAL)
        })?;
        let given = [&[(Bf16, vec![n, 2 * f], None)][..], &tiles(n, f)].concat();
        self.measure_on(("swiglu::forward_tiles", Bf16), format!("[{n}, {f}]"), &given, &|s, x| {
            swiglu::forward_tiles(s, x[0], as_tiles(&x[1..]), REAL)
        })?;
        let rows = 8 * t;
        let token_of_row = (0..rows).map(|r| (r * 37 % t) as u32).collect();
        let given = [&[x.clone(), (U32, vec![rows], Some(token_of_row))][..], &tiles(rows, d)].concat();
        self.measure_on(("permute::permute_tiles", Bf16), format!("[{t}, 8, {d}]"), &given, &|s, x| {
            let order = Order { offsets: x[1], row_of_slot: x[1], token_of_row: x[1] };
            permute::permute_tiles(s, x[0], order, as_tiles(&x[2..]), REAL)
        })?;
        let packed = [(U8, vec![t, e5m6::packed(d)], None), (U8, vec![t, d.div_ceil(128)], None)];
        let given = [&[x][..], &packed].concat();
        self.measure_on(("e5m6::encode", Bf16), shape(), &given, &|s, x| e5m6::encode(s, x[0], x[1], x[2]))?;
        self.measure_on(("e5m6::decode", Bf16), shape(), &given, &|s, x| e5m6::decode(s, x[1], x[2], x[0]))
    }
}
