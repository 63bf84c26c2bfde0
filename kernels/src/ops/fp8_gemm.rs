//! Matrix products of FP8 codes: the passes of a linear layer whose operands have scales for each 128 numbers that are summed
//! over (DeepSeek-V3 technical report, section 3.3; DeepGEMM).
//!
//! With x, dy and w quantized by [`crate::ops::quantize`], w [o, i] and x [t, i]:
//! - F: y = x w^T, [`product`] of x's tiles and w's blocks
//! - I: dx = dy w, [`product`] of dy's tiles and w's transposed blocks
//! - W: dw += dy^T x, [`weight_grad`] of the columns of both
//!
//! A block of 128 products is summed as codes, in f32; its sum is scaled and added to the result's accumulator, in f32. Tensor
//! cores sum FP8 with fewer bits than that, so there this promotion every 128 is what keeps long sums exact enough; here it is the
//! order of the sum. Results are rounded once.

use std::ops::Range;

use half::bf16;
use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float},
    error::Result,
    fp8::{Blocks, TILE, Tiles, decode_e4m3},
    ops::{
        elementwise,
        expect::{expect_blocks, expect_residual, expect_tensor, expect_that, expect_tiles},
        gemm::{Mat, gemm_by_row},
        quantize::{blocks_bytes, tiles_bytes},
    },
    ptx,
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
};

/// An operand with its codes as numbers: for each block of 128 of the columns that are summed over, all rows side by side.
pub(super) struct Panels {
    rows: usize,
    k: usize,
    /// [blocks, rows, 128]; the last block has the columns that are left.
    values: Vec<f32>,
    /// [blocks, rows]
    scales: Vec<f32>,
}

impl Panels {
    /// `rows` and `columns` of codes with `stride` columns. Columns begin at a block's first; `scale(block, row)` is as stored.
    pub fn decode(
        codes: &[u8],
        stride: usize,
        rows: Range<usize>,
        columns: Range<usize>,
        scale: impl Fn(usize, usize) -> f32,
    ) -> Self {
        let (first, k) = (columns.start, columns.len());
        let mut values = vec![0.0; rows.len() * k];
        if !values.is_empty() {
            values.par_chunks_mut(rows.len() * TILE).enumerate().for_each(|(block, panel)| {
                let width = panel.len() / rows.len();
                let from = rows.clone().map(|row| &codes[row * stride + first + block * TILE..][..width]);
                vectorize(
                    #[inline(always)]
                    || {
                        for (out, codes) in panel.chunks_exact_mut(width).zip(from) {
                            for (out, code) in out.iter_mut().zip(codes) {
                                *out = decode_e4m3(*code);
                            }
                        }
                    },
                );
            });
        }
        let of_block = |block| rows.clone().map(move |row| (block, row));
        let scales = (first / TILE..(first + k).div_ceil(TILE)).flat_map(of_block);
        let scales = scales.map(|(block, row)| scale(block, row)).collect();
        Panels { rows: rows.len(), k, values, scales }
    }

    /// Of tiles whose scales have the pitch `pitch`.
    pub fn of_tiles(
        (codes, stride): (&[u8], usize),
        (scales, pitch): (&[f32], usize),
        rows: Range<usize>,
        columns: Range<usize>,
    ) -> Self {
        Self::decode(codes, stride, rows, columns, |block, row| scales[block * pitch + row])
    }

    /// Of all blocks of a matrix [n, k].
    pub fn of_blocks(codes: &[u8], scales: &[f32], n: usize, k: usize) -> Self {
        let across = k.div_ceil(TILE);
        Self::decode(codes, k, 0..n, 0..k, |block, row| scales[row / TILE * across + block])
    }

    /// `rows` of a block.
    fn matrix(&self, block: usize, rows: Range<usize>) -> Mat<'_, f32> {
        let width = TILE.min(self.k - block * TILE);
        let panel = &self.values[self.rows * block * TILE..][..self.rows * width];
        Mat::new(&panel[rows.start * width..rows.end * width], rows.len(), width)
    }
}

/// Columns of a result that are worked on together, so that sums stay in the cache.
const WIDTH: usize = 256;

/// `a b^T` [rows of a, rows of b], promoted block by block. A row's bits depend on its row of a and on b alone.
pub(super) fn promoted(a: &Panels, b: &Panels) -> Vec<f32> {
    let n = b.rows;
    let mut acc = vec![0.0; a.rows * n];
    let mut sums = vec![0.0; a.rows * n.min(WIDTH)];
    for first in (0..n).step_by(WIDTH) {
        let columns = first..n.min(first + WIDTH);
        let width = columns.len();
        for block in 0..a.k.div_ceil(TILE) {
            let sums = &mut sums[..a.rows * width];
            gemm_by_row(a.matrix(block, 0..a.rows), b.matrix(block, columns.clone()).t(), 0.0, sums, width);
            let of_rows = &a.scales[block * a.rows..][..a.rows];
            let of_columns = &b.scales[block * n..][columns.clone()];
            vectorize(
                #[inline(always)]
                || {
                    let acc = acc.chunks_exact_mut(n).map(|row| &mut row[columns.clone()]);
                    for ((acc, sums), row) in acc.zip(sums.chunks_exact(width)).zip(of_rows) {
                        for ((acc, sum), column) in acc.iter_mut().zip(sums).zip(of_columns) {
                            *acc += sum * (row * column);
                        }
                    }
                },
            );
        }
    }
    acc
}

/// Rounds the sums to the type of `y`, or sums onto what is there.
pub(super) fn store<T: Float<Acc = f32>>(sums: &[f32], y: &mut [T], onto: bool) {
    vectorize(
        #[inline(always)]
        || {
            for (y, sum) in y.iter_mut().zip(sums) {
                *y = T::from_acc(if onto { y.to_acc() + sum } else { *sum });
            }
        },
    );
}

/// Rows of a result that one core works on at a time.
const ROWS: usize = 128;

/// `y = residual + a b^T`, promoted every 128 of k, with `a` [t, k], `b` [n, k] and `y` [t, n] in Bf16 or F32; the residual, if there is
/// one, is added in f32 before the sum is rounded. In place where `residual` is `y`.
///
/// # Errors
/// Tensors of other shapes or types, or a residual that shares a buffer with `y` without being it.
pub fn product(s: &mut Stream, a: Tiles, b: Blocks, residual: Option<Tensor>, y: Tensor) -> Result<()> {
    const OP: &str = "FP8 product";
    let (t, k, n) = (a.codes.rows(), a.codes.cols(), b.codes.rows());
    expect_tiles(OP, "a", a, t, k)?;
    expect_blocks(OP, "b", b, &[n, k])?;
    expect_result(OP, y, &[t, n])?;
    residual.map_or(Ok(()), |residual| expect_residual(OP, residual, y))?;
    s.account(product_cost(t, n, k, y.dtype.size_bytes(), residual.is_some()));
    let reads: Vec<Tensor> = [a.tensors(), b.tensors()].concat().into_iter().chain(residual).collect();
    let kernels = |on: &Target| Some(ptx::fp8_gemm::product(on.into(), a, b, residual, y));
    s.launch_kernel(&reads, &[y], kernels, move |m| {
        let (a_codes, a_scales) = (m.read::<u8>(a.codes), m.read::<f32>(a.scales));
        let b = Panels::of_blocks(&m.read::<u8>(b.codes), &m.read::<f32>(b.scales), n, k);
        let rows_of = |rows| {
            let a = Panels::of_tiles((&a_codes, k), (&a_scales, a.scales.dim(1)), rows, 0..k);
            promoted(&a, &b)
        };
        let elsewhere = residual.filter(|residual| *residual != y);
        elsewhere.into_iter().for_each(|residual| elementwise::copy_now(m, residual, y));
        let onto = residual.is_some();
        match y.dtype {
            DType::Bf16 => by_rows(&mut m.write::<bf16>(y), n, |rows, y| store(&rows_of(rows), y, onto)),
            _ => by_rows(&mut m.write::<f32>(y), n, |rows, y| store(&rows_of(rows), y, onto)),
        }
    });
    Ok(())
}

/// `dw += dyt xt^T`, promoted every 128 tokens, with `dyt` [o, t], `xt` [i, t] and `dw` F32 [o, i].
///
/// # Errors
/// Tensors of other shapes or types.
pub fn weight_grad(s: &mut Stream, dyt: Tiles, xt: Tiles, dw: Tensor) -> Result<()> {
    const OP: &str = "FP8 weight gradient";
    let (o, i, t) = (dyt.codes.rows(), xt.codes.rows(), dyt.codes.cols());
    expect_tiles(OP, "dyt", dyt, o, t)?;
    expect_tiles(OP, "xt", xt, i, t)?;
    expect_tensor(OP, "dw", dw, DType::F32, &[o, i])?;
    s.account(weight_grad_cost(t, o, i));
    let reads = [&dyt.tensors()[..], &xt.tensors(), &[dw]].concat();
    let kernels = |on: &Target| Some(ptx::fp8_gemm::weight_grad(on.into(), dyt, xt, dw));
    s.launch_kernel(&reads, &[dw], kernels, move |m| {
        let (codes, scales) = (m.read::<u8>(dyt.codes), m.read::<f32>(dyt.scales));
        let (x_codes, x_scales) = (m.read::<u8>(xt.codes), m.read::<f32>(xt.scales));
        let x = Panels::of_tiles((&x_codes, t), (&x_scales, xt.scales.dim(1)), 0..i, 0..t);
        by_rows(&mut m.write::<f32>(dw), i, |rows, dw| {
            let dy = Panels::of_tiles((&codes, t), (&scales, dyt.scales.dim(1)), rows, 0..t);
            store(&promoted(&dy, &x), dw, true);
        });
    });
    Ok(())
}

/// `Err` if y is not a product's result of `dims`.
pub(super) fn expect_result(op: &'static str, y: Tensor, dims: &[usize]) -> Result<()> {
    let holds = matches!(y.dtype, DType::Bf16 | DType::F32) && y.shape == *dims;
    expect_that(op, "y", y, holds, || format!("Bf16 or F32 of {dims:?}"))
}

/// Calls `f` with ranges of rows and these rows of `out`, on all cores.
fn by_rows<T: Send>(out: &mut [T], cols: usize, f: impl Fn(Range<usize>, &mut [T]) + Sync) {
    if !out.is_empty() {
        out.par_chunks_mut(ROWS * cols).enumerate().for_each(|(i, out)| {
            let first = i * ROWS;
            f(first..first + out.len() / cols, out);
        });
    }
}

/// Cost of [`product`] with a result of `elem_bytes` an element.
pub fn product_cost(t: usize, n: usize, k: usize, elem_bytes: usize, has_residual: bool) -> Cost {
    let result = (t * n * elem_bytes) as u64;
    Cost {
        product_flops: 2 * (t * n * k) as u64,
        read_bytes: tiles_bytes(t, k) + blocks_bytes(&[n, k]) + if has_residual { result } else { 0 },
        written_bytes: result,
        ..Cost::default()
    }
}

/// Cost of [`weight_grad`] over t tokens.
pub fn weight_grad_cost(t: usize, o: usize, i: usize) -> Cost {
    let result = (4 * o * i) as u64;
    Cost {
        product_flops: 2 * (t * o * i) as u64,
        read_bytes: tiles_bytes(o, t) + tiles_bytes(i, t) + result,
        written_bytes: result,
        ..Cost::default()
    }
}

#[cfg(test)]
mod tests;
