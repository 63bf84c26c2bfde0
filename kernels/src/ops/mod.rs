//! Ops: one file each, with the contract (shapes, formula, source), the CPU code, the launch, the cost and the tests.
//!
//! Passes are apart: `forward` (F), `input_grad` (I) and `weight_grad` (W). Activation gradients are assigned unless a
//! function says `_acc`; weight gradients are added to, so that microbatches accumulate.
//!
//! Shape letters: t tokens, d model width, f feed-forward width, o output width, i input width, h heads, e experts, v vocabulary.

pub mod adamw;
pub mod attention;
pub mod balance;
pub mod cross_entropy;
pub mod dequantize;
pub mod e5m6;
pub mod elementwise;
pub mod embedding;
pub(crate) mod expect;
pub mod fp8_gemm;
pub mod fp8_grouped_gemm;
pub mod gate;
pub mod gemm;
pub mod gemv;
pub mod grouped_gemm;
pub mod lanes;
pub mod logits;
pub mod mla;
pub mod muon;
pub mod norm;
pub mod outer;
pub mod paged;
pub mod parallel;
pub mod permute;
pub mod quantize;
pub mod rms_norm;
pub mod rope;
pub mod rounding;
pub mod sampling;
pub mod swiglu;
#[cfg(test)]
pub(crate) mod testing;

/// Whether the tensor is of a type that kernels are written for.
pub(crate) fn is_fast(tensor: crate::tensor::Tensor) -> bool {
    use crate::dtype::DType;
    matches!(tensor.dtype, DType::F32 | DType::Bf16)
}

/// Whether the tensors are of one such type.
pub(crate) fn are_fast(tensors: &[crate::tensor::Tensor]) -> bool {
    tensors.iter().all(|tensor| is_fast(*tensor) && tensor.dtype == tensors[0].dtype)
}

/// `Err` if `tensor` has not the shape its contract wants.
pub(crate) fn expect_shape(
    op: &'static str,
    role: &'static str,
    tensor: crate::tensor::Tensor,
    dims: &[usize],
) -> crate::error::Result<()> {
    if tensor.shape == *dims {
        return Ok(());
    }
    Err(crate::error::Error::Shape { op, role, expected: format!("{dims:?}"), found: tensor })
}
