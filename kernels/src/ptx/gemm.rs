//! Matrix products on tensor cores and, in f32, on ordinary ones; dense and grouped by expert.
//!
//! Every product here is one [`Problem`]: C_mn = A_mk B_kn, or D_mn + A_mk B_kn where D may be C, where the two operands lie as a pass of a linear
//! layer finds them (see [`crate::ops::gemm`]):
//! - [`Layout::Nt`], F: A [m, k], B [n, k]: both contiguous along k
//! - [`Layout::Nn`], I: A [m, k], B [k, n]
//! - [`Layout::Tn`], W: A [k, m], B [k, n]: neither contiguous along k
//!
//! [`Groups`] says which rows (or, for W, which part of k) belong to which expert; the numbers lie on the device, and blocks find
//! their expert there.
//!
//! Kernels, by what the device can and how the operands lie; [`choose`] is the rule:
//! - `simt`: f32, sm_80
//! - `mma`: bf16, sm_80, any alignment
//! - `wgmma`: bf16, sm_90a, rows of A and B that begin at 16 bytes
//!
//! Each element is one sum over k in one order that depends on neither the tile's place nor on the rows beside it: a row's result
//! has the same bits whatever rows are beside it. Sums are f32, rounded once; D is added to the sum before that.

mod column_sum;
pub(super) mod cost;
mod defaults;
pub(super) mod epilogue;
#[cfg(test)]
pub(in crate::ptx) mod harness;
mod mma;
#[cfg(test)]
pub(super) mod mutants;
pub(super) mod output;
pub(super) mod pipeline;
pub(super) mod problem;
pub(super) mod schedule;
mod simt;
#[cfg(test)]
mod tests;
mod wgmma;

pub use defaults::variants;
pub use problem::{Groups, Layout, Matrix, Problem};

use super::{Arch, Launch};
use crate::{dtype::DType, tensor::Tensor};

/// What launches are made for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// The newest that the device can.
    pub arch: Arch,
    /// Its multiprocessors.
    pub num_sms: u32,
}

/// F: `y_to = x_ti w_oi^T`, plus `bias_o` if given.
pub fn forward(on: Target, x: Tensor, w: Tensor, bias: Option<Tensor>, y: Tensor) -> Vec<Launch> {
    let (o, i) = (w.dim(0), w.dim(1));
    let t = x.len() / i.max(1);
    let operands = (Matrix::new(x, i), Matrix::new(w, i), Matrix::new(y, o));
    launch(on, &Problem { bias, ..Problem::new(Layout::Nt, [t, o, i], operands) })
}

/// F onto a residual: `y_to = residual_to + x_ti w_oi^T`; `residual` may be y.
pub fn forward_onto(on: Target, x: Tensor, w: Tensor, residual: Tensor, y: Tensor) -> Vec<Launch> {
    let (o, i) = (w.dim(0), w.dim(1));
    let t = x.len() / i.max(1);
    let operands = (Matrix::new(x, i), Matrix::new(w, i), Matrix::new(y, o));
    launch(on, &Problem { addend: Some(residual), ..Problem::new(Layout::Nt, [t, o, i], operands) })
}

/// I: `dx_ti = dy_to w_oi`, or `+=` if `accumulate`.
pub fn input_grad(on: Target, dy: Tensor, w: Tensor, dx: Tensor, accumulate: bool) -> Vec<Launch> {
    let (o, i) = (w.dim(0), w.dim(1));
    let t = dx.len() / i.max(1);
    let operands = (Matrix::new(dy, o), Matrix::new(w, i), Matrix::new(dx, i));
    launch(on, &Problem { addend: accumulate.then_some(dx), ..Problem::new(Layout::Nn, [t, i, o], operands) })
}

/// W: `dw_oi += dy_to^T x_ti`, and `dbias_o += sum_t dy_to` if given. dw may be f32 where dy and x are bf16.
pub fn weight_grad(on: Target, dy: Tensor, x: Tensor, dw: Tensor, dbias: Option<Tensor>) -> Vec<Launch> {
    let (o, i) = (dw.dim(0), dw.dim(1));
    let t = x.len() / i.max(1);
    let operands = (Matrix::new(dy, o), Matrix::new(x, i), Matrix::new(dw, i));
    let mut launches = launch(on, &Problem { addend: Some(dw), ..Problem::new(Layout::Tn, [o, i, t], operands) });
    if let Some(dbias) = dbias {
        launches.extend(column_sum::add(dy, t, o, dbias));
    }
    launches
}

/// The kernels there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// f32 on ordinary cores.
    Simt(simt::Tile),
    /// bf16 by mma.sync.
    Mma(mma::Tile),
    /// bf16 by wgmma.
    Wgmma(wgmma::Tile),
}

/// Which kernel solves a problem on a device: decided by shapes, types and alignment alone.
///
/// # Panics
/// If the operands are neither f32 nor bf16.
pub fn choose(on: Target, problem: &Problem) -> Choice {
    match problem.a.tensor.dtype {
        DType::F32 => Choice::Simt(simt::choose(problem)),
        DType::Bf16 => match wgmma::choose(on, problem) {
            Some(tile) => Choice::Wgmma(tile),
            None => Choice::Mma(mma::choose(problem)),
        },
        other => panic!("a product on a GPU is of f32 or bf16, found {other:?}"),
    }
}

/// The launches of one product; none if there is no element to write.
pub fn launch(on: Target, problem: &Problem) -> Vec<Launch> {
    if problem.is_empty() {
        return vec![];
    }
    match choose(on, problem) {
        Choice::Simt(tile) => vec![simt::launch(problem, tile)],
        Choice::Mma(tile) => vec![mma::launch(problem, tile)],
        Choice::Wgmma(tile) => vec![wgmma::launch(on, problem, tile)],
    }
}
