//! Grouped products of E4M3 codes: every expert's linear layer over its own rows; counts are read on the device.
//!
//! Where an expert's rows are, [`Rows`] says. Weight gradients sum over tokens, which lie along columns there, and each expert's
//! begin at a multiple of 128: the padding holds zeros, so that a tile of 128 and its scale are one expert's.
//!
//! The kernels are those of [`super::fp8_gemm`].

use super::{
    Launch,
    fp8_gemm::{self, Problem},
    gemm::Target,
    grouped_gemm::{Rows, by_rows},
};
use crate::{
    fp8::{Blocks, Tiles},
    tensor::Tensor,
};

/// `y_nm = a_nk b_e^T` per expert, from a [n, k] and b [e, m, k]; rows past the last expert's are left alone.
pub fn product(on: Target, a: Tiles, rows: Rows, b: Blocks, y: Tensor) -> Vec<Launch> {
    let groups = by_rows(rows, y.rows(), b.codes.dim(0));
    fp8_gemm::launch(on, &Problem::grouped_product(a, groups, b, y))
}

/// W: `dw_eoi += dyt_oP xt_iP^T` per expert over its columns of dyt [o, P] and xt [i, P]; offsets U32 [e + 1] count tokens without
/// padding. dw is f32.
pub fn weight_grad(on: Target, dyt: Tiles, xt: Tiles, offsets: Tensor, dw: Tensor) -> Vec<Launch> {
    fp8_gemm::launch(on, &Problem::grouped_weight_grad(dyt, xt, offsets, dw))
}
