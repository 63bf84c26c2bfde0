//! Contract checks of ops whose tensors differ in dtype: routing mixes u32 indices, f32 scores and bf16 rows, so a shape
//! alone does not tell a swapped argument.

use crate::{
    dtype::DType,
    error::{Error, Result},
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

/// The type that sums over elements of `dtype` are kept in, as [`crate::dtype::Float::Acc`].
pub(crate) fn acc_dtype(dtype: DType) -> DType {
    if dtype == DType::F64 { DType::F64 } else { DType::F32 }
}
