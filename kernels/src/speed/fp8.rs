//! Products of FP8 codes at the shapes that DeepGEMM is measured at, beside what its first release says it reaches on an H800: the
//! table of its README of 2025-02-25 (commit a6d97a1), TFLOP/s.

use super::{Bench, Given, PRODUCTS, offsets};
use crate::{
    dtype::DType::{self, Bf16, F32, U8, U32},
    error::Result,
    fp8::{Blocks, Tiles, padded},
    ops::{fp8_gemm, fp8_grouped_gemm},
    ptx::{
        fp8_gemm::Problem,
        gemm::Groups,
        tuning::Product::{self, Fp8},
    },
    tensor::Tensor,
};

/// For each of [`PRODUCTS`], with 4096 and with 128 rows; of one it says nothing.
const PUBLISHED: [(f64, f64); 7] =
    [(1058.0, 352.0), (0.0, 0.0), (990.0, 535.0), (590.0, 358.0), (1358.0, 645.0), (1304.0, 533.0), (1025.0, 510.0)];

/// Experts, about how many rows of each, sizes of a weight, and TFLOP/s of rows in a row.
const EXPERTS: [(usize, usize, usize, usize, f64); 4] = [
    (4, 8192, 4096, 7168, 1297.0),
    (4, 8192, 7168, 2048, 1099.0),
    (8, 4096, 4096, 7168, 1288.0),
    (8, 4096, 7168, 2048, 1093.0),
];

fn m(dtype: DType, dims: &[usize]) -> Given {
    (dtype, dims.to_vec(), None)
}

fn tiles(rows: usize, cols: usize) -> [Given; 2] {
    [m(U8, &[rows, cols]), m(F32, &Tiles::scale_shape(rows, cols))]
}

fn blocks(dims: &[usize]) -> [Given; 2] {
    [m(U8, dims), m(F32, &Blocks::scale_shape(dims))]
}

/// The first four tensors.
fn operands(x: &[Tensor]) -> (Tiles, Blocks) {
    (Tiles { codes: x[0], scales: x[1] }, Blocks { codes: x[2], scales: x[3] })
}

fn both_tiles(x: &[Tensor]) -> (Tiles, Tiles) {
    (Tiles { codes: x[0], scales: x[1] }, Tiles { codes: x[2], scales: x[3] })
}

impl Bench<'_> {
    /// What is published is of the whole size.
    fn published(&self, tflops: f64) -> Option<f64> {
        (tflops > 0.0 && self.request.shrink == 1).then_some(tflops * 1e12)
    }

    pub(super) fn fp8_products(&mut self) -> Result<()> {
        for rows in [4096, 128, 1] {
            for ((n, k), (of_many, of_few)) in PRODUCTS.into_iter().zip(PUBLISHED) {
                let (n, k, rows) = (self.size(n), self.size(k), rows.min(self.size(rows)));
                let tensors = [&tiles(rows, k)[..], &blocks(&[n, k]), &[m(Bf16, &[rows, n])]].concat();
                let published = match rows {
                    4096 => self.published(of_many),
                    128 => self.published(of_few),
                    _ => None,
                };
                let name = ("fp8_gemm::product", U8);
                let shape = format!("[{rows}, {k}] x [{n}, {k}]");
                let product = &|x: &[Tensor]| {
                    let (a, b) = operands(x);
                    Fp8(Problem::product(a, b, x[4]))
                };
                self.measure_product(name, shape, &tensors, published, product, &|s, x| {
                    let (a, b) = operands(x);
                    fp8_gemm::product(s, a, b, None, x[4])
                })?;
            }
        }
        for (o, i) in [(4096, 7168), (7168, 2048)] {
            let [t, o, i] = [4096, o, i].map(|size| self.size(size));
            let tensors = [&tiles(o, t)[..], &tiles(i, t), &[m(F32, &[o, i])]].concat();
            let shape = format!("[{o}, {t}] x [{i}, {t}]");
            let product = &|x: &[Tensor]| {
                let (dyt, xt) = both_tiles(x);
                Fp8(Problem::weight_grad(dyt, xt, x[4]))
            };
            self.measure_product(("fp8_gemm::weight_grad", U8), shape, &tensors, None, product, &|s, x| {
                let (dyt, xt) = both_tiles(x);
                fp8_gemm::weight_grad(s, dyt, xt, x[4])
            })?;
        }
        Ok(())
    }

    pub(super) fn fp8_experts(&mut self) -> Result<()> {
        for (e, rows, o, i, tflops) in EXPERTS {
            let [rows, o, i] = [rows, o, i].map(|size| self.size(size));
            let offsets = offsets(e, rows);
            let n = offsets[e] as usize;
            let shape = || format!("{e} x about [{rows}, {i}] x [{o}, {i}]");
            let table = || (U32, vec![e + 1], Some(offsets.clone()));
            let tensors = [&tiles(n, i)[..], &blocks(&[e, o, i]), &[table(), m(Bf16, &[n, o])]].concat();
            let (name, published) = (("fp8_grouped_gemm::product", U8), self.published(tflops));
            let num = e as u32;
            let product = &|x: &[Tensor]| {
                let (a, b) = operands(x);
                Fp8(Problem::grouped_product(a, Groups::Rows { offsets: x[4], num }, b, x[5]))
            };
            self.measure_product(name, shape(), &tensors, published, product, &|s, x| {
                let (a, b) = operands(x);
                fp8_grouped_gemm::product(s, a, x[4], b, x[5])
            })?;
            let columns = padded(n, e);
            let more = [table(), m(F32, &[e, o, i])];
            let tensors = [&tiles(o, columns)[..], &tiles(i, columns), &more].concat();
            let product = &|x: &[Tensor]| -> Product {
                let (dyt, xt) = both_tiles(x);
                Fp8(Problem::grouped_weight_grad(dyt, xt, x[4], x[5]))
            };
            self.measure_product(("fp8_grouped_gemm::weight_grad", U8), shape(), &tensors, None, product, &|s, x| {
                let (dyt, xt) = both_tiles(x);
                fp8_grouped_gemm::weight_grad(s, dyt, xt, x[4], x[5])
            })?;
        }
        Ok(())
    }
}
