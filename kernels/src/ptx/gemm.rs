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

use super::{Arch, Launch, tuning::Table};
use crate::{dtype::DType, tensor::Tensor};

/// What launches are made for.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Target<'a> {
    /// The newest that the device can.
    pub arch: Arch,
    /// Multiprocessors that they may occupy.
    pub num_sms: u32,
    /// Tiles that were measured on the device.
    pub tuning: Option<&'a Table>,
}

/// F: `y_to = x_ti w_oi^T`, plus `bias_o` if given.
pub fn forward(on: Target, x: Tensor, w: Tensor, bias: Option<Tensor>, y: Tensor) -> Vec<Launch> {
    launch(on, &Problem { bias, ..Problem::forward(x, w, y) })
}

/// F onto a residual: `y_to = residual_to + x_ti w_oi^T`; `residual` may be y.
pub fn forward_onto(on: Target, x: Tensor, w: Tensor, residual: Tensor, y: Tensor) -> Vec<Launch> {
    launch(on, &Problem { addend: Some(residual), ..Problem::forward(x, w, y) })
}

/// I: `dx_ti = dy_to w_oi`, or `+=` if `accumulate`.
pub fn input_grad(on: Target, dy: Tensor, w: Tensor, dx: Tensor, accumulate: bool) -> Vec<Launch> {
    launch(on, &Problem { addend: accumulate.then_some(dx), ..Problem::input_grad(dy, w, dx) })
}

/// W: `dw_oi += dy_to^T x_ti`, and `dbias_o += sum_t dy_to` if given. dw may be f32 where dy and x are bf16.
pub fn weight_grad(on: Target, dy: Tensor, x: Tensor, dw: Tensor, dbias: Option<Tensor>) -> Vec<Launch> {
    let problem = Problem::weight_grad(dy, x, dw);
    let mut launches = launch(on, &problem);
    if let Some(dbias) = dbias {
        launches.extend(column_sum::add(dy, problem.k as usize, problem.m as usize, dbias));
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

impl Choice {
    /// As kernels and tables say it: `wgmma_128x256_s4`.
    pub fn name(&self) -> String {
        match self {
            Choice::Simt(tile) => format!("simt_{}", tile.name()),
            Choice::Mma(tile) => format!("mma_{}", tile.name()),
            Choice::Wgmma(tile) => format!("wgmma_{}", tile.name()),
        }
    }

    /// All that there are.
    pub(super) fn all() -> impl Iterator<Item = Choice> {
        let simt = [simt::LARGE, simt::SMALL].map(Choice::Simt);
        let (mma, wgmma) = ([mma::LARGE, mma::SMALL].map(Choice::Mma), wgmma::TILES.map(Choice::Wgmma));
        simt.into_iter().chain(mma).chain(wgmma)
    }

    /// Whether it is the same kernel, whatever its tile.
    fn is_like(self, other: Choice) -> bool {
        std::mem::discriminant(&self) == std::mem::discriminant(&other)
    }

    /// One product by it; it is among [`candidates`].
    pub(super) fn launch(self, on: Target, problem: &Problem) -> Launch {
        match self {
            Choice::Simt(tile) => simt::launch(problem, tile),
            Choice::Mma(tile) => mma::launch(problem, tile),
            Choice::Wgmma(tile) => wgmma::launch(on, problem, tile),
        }
    }
}

/// Which kernel solves a problem on a device: that which was measured to be the quickest, or else `by_model`. Which of mma and wgmma it
/// is, alignment decides alone; their tiles have one order of each sum, so that measurements change no bit of a result.
///
/// # Panics
/// If the operands are neither f32 nor bf16.
pub fn choose(on: Target, problem: &Problem) -> Choice {
    let model = by_model(on, problem);
    let measured = on.tuning.and_then(|table| table.product(on, problem));
    measured.filter(|choice| choice.is_like(model)).unwrap_or(model)
}

/// Which kernel should be the quickest: decided by shapes, types and alignment.
pub(super) fn by_model(on: Target, problem: &Problem) -> Choice {
    match problem.a.tensor.dtype {
        DType::F32 => Choice::Simt(simt::choose(problem)),
        DType::Bf16 => match wgmma::choose(on, problem) {
            Some(tile) => Choice::Wgmma(tile),
            None => Choice::Mma(mma::choose(problem)),
        },
        other => panic!("a product on a GPU is of f32 or bf16, found {other:?}"),
    }
}

/// The kernels that are to choose from.
pub(super) fn candidates(on: Target, problem: &Problem) -> Vec<Choice> {
    let model = by_model(on, problem);
    Choice::all().filter(|choice| choice.is_like(model)).collect()
}

/// The launches of one product; none if there is no element to write.
pub fn launch(on: Target, problem: &Problem) -> Vec<Launch> {
    if problem.is_empty() {
        return vec![];
    }
    vec![choose(on, problem).launch(on, problem)]
}
