//! Contract checks of ops whose tensors differ in dtype: routing mixes u32 indices, f32 scores and bf16 rows, so a shape
//! alone does not tell a swapped argument.

use crate::{
    dtype::DType,
    error::{Error, Result},
    fp8::{Blocks, Tiles},
    tensor::Tensor,
};

/// `Err` if `tensor` is not `dtype` of `dims`.
pub(crate) fn expect_tensor(
    op: &'static str,
    role: &'static str,
    tensor: Tensor,
    dtype: DType,
    dims: &[usize],
) -> Result<()> {
    if tensor.dtype == dtype && tensor.shape == *dims {
        return Ok(());
    }
    Err(Error::Shape { op, role, expected: format!("{dtype:?} of {dims:?}"), found: tensor })
}

/// `Err` unless `residual`, which an op adds to what it assigns to `y`, is `y` itself or a tensor like it in another buffer.
pub(crate) fn expect_residual(op: &'static str, residual: Tensor, y: Tensor) -> Result<()> {
    let is_alike = (residual.dtype, residual.shape) == (y.dtype, y.shape);
    expect_that(op, "residual", residual, is_alike && (residual == y || residual.buffer != y.buffer), || {
        format!("{:?} of {:?}, the output itself or in another buffer", y.dtype, y.shape)
    })
}

/// `Err` with `wanted` in words, unless `holds`.
pub(crate) fn expect_that(
    op: &'static str,
    role: &'static str,
    found: Tensor,
    holds: bool,
    wanted: impl FnOnce() -> String,
) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::Shape { op, role, expected: wanted(), found }) }
}

/// `Err` if codes or scales are not those of `rows` rows of `columns` with a scale for each 128 columns.
pub(crate) fn expect_tiles(
    op: &'static str,
    role: &'static str,
    tiles: Tiles,
    rows: usize,
    columns: usize,
) -> Result<()> {
    expect_tensor(op, role, tiles.codes, DType::U8, &[rows, columns])?;
    expect_scales(op, role, tiles.scales, &Tiles::scale_shape(rows, columns))
}

/// `Err` if codes or scales are not those of a matrix of shape `dims`, or of several, with a scale for each 128 x 128.
pub(crate) fn expect_blocks(op: &'static str, role: &'static str, blocks: Blocks, dims: &[usize]) -> Result<()> {
    expect_tensor(op, role, blocks.codes, DType::U8, dims)?;
    expect_scales(op, role, blocks.scales, &Blocks::scale_shape(dims))
}

fn expect_scales(op: &'static str, role: &'static str, scales: Tensor, dims: &[usize]) -> Result<()> {
    let holds = scales.dtype == DType::F32 && scales.shape == *dims;
    expect_that(op, role, scales, holds, || format!("beside scales F32 of {dims:?}"))
}

/// `Err` if `tensor` is not of floating-point numbers.
pub(crate) fn expect_float(op: &'static str, role: &'static str, tensor: Tensor) -> Result<()> {
    expect_that(op, role, tensor, tensor.dtype.is_float(), || "of floating-point numbers".into())
}

/// The type that sums over elements of `dtype` are kept in, as [`crate::dtype::Float::Acc`].
pub(crate) fn acc_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}
