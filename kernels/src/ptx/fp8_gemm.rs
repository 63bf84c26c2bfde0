//! Products of E4M3 codes with a scale for each tile or block, with the contracts of DeepSeek-V3's recipe (see [`crate::fp8`]).
//!
//! Every product here is one [`Problem`]: C_mn = A_mk B_nk^T, assigned or added, both operands contiguous along k. Codes are
//! multiplied and summed over 128 of k, the sum is multiplied with both scales in f32 and added to C's f32: tensor cores of Hopper
//! keep some 14 bits of a sum of codes, so that sums over a long k are made outside of them ("promotion").
//! - A has [`Tiles`], a scale for each row and 128 of k
//! - B has [`Blocks`], one for each 128 rows and 128 of k (a layer's forward pass and input gradient), or tiles as well (its weight
//!   gradient, where k are tokens)
//!
//! Kernels, by what the device can and how the operands lie; [`choose`] is the rule:
//! - `mma`: sm_80, codes turned to bf16 (each is exact), any alignment
//! - `wgmma`: sm_90a, rows of codes that begin at 16 bytes
//!
//! The sum over k of one element has one order that depends on neither the tile's place nor on the rows beside it.

mod defaults;
#[cfg(test)]
mod harness;
mod mma;
#[cfg(test)]
mod mutants;
#[cfg(test)]
mod tests;
mod wgmma;

pub use defaults::variants;

use super::{
    Launch,
    gemm::{self, Groups, Layout, Matrix, Target},
};
use crate::{
    fp8::{Blocks, TILE, Tiles},
    tensor::Tensor,
};

/// B's scales, F32.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScaleB {
    /// Of its rows as [`Tiles`] have them.
    Tiles(Tensor),
    /// As [`Blocks`] have them.
    Blocks(Tensor),
}

/// C_mn = A_mk B_nk^T with scales, or `+=`.
#[derive(Clone, Copy, Debug)]
pub struct Problem {
    /// Sizes, codes, C and groups; of U8 and [`Layout::Nt`].
    pub product: gemm::Problem,
    /// Scales of A's tiles.
    pub scale_a: Tensor,
    /// Scales of B.
    pub scale_b: ScaleB,
}

/// What a kernel's text depends on, besides its tile.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Spec {
    product: gemm::problem::Spec,
    /// Whether B has tiles and not blocks.
    tiled: bool,
}

impl Spec {
    fn name(&self) -> String {
        format!("{}_{}", if self.tiled { "tiles" } else { "blocks" }, self.product.name())
    }
}

impl Problem {
    /// Of sizes [m, n, k].
    fn new(sizes: [usize; 3], a: Tiles, (codes, scale_b): (Tensor, ScaleB), c: Tensor) -> Self {
        let [_, n, k] = sizes;
        let operands = (Matrix::new(a.codes, k), Matrix::new(codes, k), Matrix::new(c, n));
        Problem { product: gemm::Problem::new(Layout::Nt, sizes, operands), scale_a: a.scales, scale_b }
    }

    /// F or I, assigned; see [`product`].
    pub fn product(a: Tiles, b: Blocks, y: Tensor) -> Self {
        let (n, k) = (b.codes.dim(0), b.codes.dim(1));
        Problem::new([y.len() / n.max(1), n, k], a, (b.codes, ScaleB::Blocks(b.scales)), y)
    }

    /// W; see [`weight_grad`].
    pub fn weight_grad(dyt: Tiles, xt: Tiles, dw: Tensor) -> Self {
        let sizes = [dw.dim(0), dw.dim(1), dyt.codes.dim(1)];
        Problem::new(sizes, dyt, (xt.codes, ScaleB::Tiles(xt.scales)), dw).onto(Some(dw))
    }

    /// F or I of each expert, b [e, m, k]; see [`super::fp8_grouped_gemm::product`].
    pub fn grouped_product(a: Tiles, groups: Groups, b: Blocks, y: Tensor) -> Self {
        let sizes = [y.rows(), b.codes.dim(1), b.codes.dim(2)];
        Problem::new(sizes, a, (b.codes, ScaleB::Blocks(b.scales)), y).grouped(groups)
    }

    /// W of each expert, over its part of the padded tokens; see [`super::fp8_grouped_gemm::weight_grad`].
    pub fn grouped_weight_grad(dyt: Tiles, xt: Tiles, offsets: Tensor, dw: Tensor) -> Self {
        let sizes = [dw.dim(1), dw.dim(2), dyt.codes.dim(1)];
        let groups = Groups::PaddedInner { offsets, num: dw.dim(0) as u32 };
        Problem::new(sizes, dyt, (xt.codes, ScaleB::Tiles(xt.scales)), dw).onto(Some(dw)).grouped(groups)
    }

    /// Onto another matrix, or what is in C.
    fn onto(mut self, addend: Option<Tensor>) -> Self {
        self.product.addend = addend;
        self
    }

    /// By experts.
    fn grouped(mut self, groups: Groups) -> Self {
        self.product.groups = groups;
        self
    }

    fn spec(&self) -> Spec {
        Spec { product: self.product.spec(), tiled: matches!(self.scale_b, ScaleB::Tiles(_)) }
    }
}

/// Numbers from one 128 of k to the next among scales of tiles.
fn pitch(rows: u32) -> u32 {
    Tiles::scale_shape(rows as usize, TILE)[1] as u32
}

/// F with b = W, I with a = dy and b = W transposed: `y_tn = residual_tn + a_tk b_nk^T`; y is bf16 or f32.
pub fn product(on: Target, a: Tiles, b: Blocks, residual: Option<Tensor>, y: Tensor) -> Vec<Launch> {
    launch(on, &Problem::product(a, b, y).onto(residual))
}

/// W: `dw_oi += dyt_ot xt_it^T` from gradients and activations by columns; dw is f32.
pub fn weight_grad(on: Target, dyt: Tiles, xt: Tiles, dw: Tensor) -> Vec<Launch> {
    launch(on, &Problem::weight_grad(dyt, xt, dw))
}

/// The kernels there are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Choice {
    /// By mma.sync on bf16.
    Mma,
    /// By wgmma.
    Wgmma(wgmma::Tile),
}

impl Choice {
    /// As kernels and tables say it: `wgmma_256x128_s4_c2`.
    pub fn name(&self) -> String {
        match self {
            Choice::Mma => "mma".into(),
            Choice::Wgmma(tile) => format!("wgmma_{}", tile.name()),
        }
    }

    /// All that there are.
    pub(super) fn all() -> impl Iterator<Item = Choice> {
        let wgmma = wgmma::FOR_BLOCKS.iter().chain(&wgmma::FOR_TILES).map(|tile| Choice::Wgmma(*tile));
        std::iter::once(Choice::Mma).chain(wgmma)
    }

    /// One product by it; it is among [`candidates`].
    pub(super) fn launch(self, on: Target, problem: &Problem) -> Launch {
        match self {
            Choice::Mma => mma::launch(problem),
            Choice::Wgmma(tile) => wgmma::launch(on, problem, tile),
        }
    }
}

/// Which kernel solves a problem on a device: that which was measured to be the quickest, or else `by_model`. Measurements change no
/// bit of a result, as in [`gemm::choose`].
pub fn choose(on: Target, problem: &Problem) -> Choice {
    let measured = on.tuning.and_then(|table| table.fp8_product(on, problem));
    measured.filter(|choice| candidates(on, problem).contains(choice)).unwrap_or_else(|| by_model(on, problem))
}

/// Which kernel should be the quickest: decided by shapes, types and alignment.
pub(super) fn by_model(on: Target, problem: &Problem) -> Choice {
    wgmma::choose(on, problem).map_or(Choice::Mma, Choice::Wgmma)
}

/// The kernels that are to choose from.
pub(super) fn candidates(on: Target, problem: &Problem) -> Vec<Choice> {
    match wgmma::candidates(on, problem) {
        [] => vec![Choice::Mma],
        tiles => tiles.iter().map(|tile| Choice::Wgmma(*tile)).collect(),
    }
}

/// The launches of one product; none if there is no element to write.
pub fn launch(on: Target, problem: &Problem) -> Vec<Launch> {
    if problem.product.is_empty() {
        return vec![];
    }
    vec![choose(on, problem).launch(on, problem)]
}
