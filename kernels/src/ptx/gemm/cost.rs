//! How long tiles of a product take: a model small enough to be wrong in an obvious way, shared by all kernels by wgmma.
//!
//! A multiprocessor makes one tile after the other, and a tile takes as long as the slower of two: its products on tensor cores,
//! and its operands from L2. All candidates have the same k, so that times are for one element of it, and what a kernel does
//! besides is left out. What a model cannot know, `hadal bench kernels --tune` measures.

use super::{Target, problem::Problem};

/// What of a kernel's tile takes time.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::ptx) struct Size {
    /// Rows and columns of one block's tile.
    pub bm: u32,
    pub bn: u32,
    /// Blocks of a cluster, one below the other: each reads its part of B for all.
    pub blocks: u32,
}

/// Bytes of operands that a multiprocessor gets from L2 a clock while all do.
const L2_BYTES: f64 = 48.0;
/// Bytes of operands whose products tensor cores of a multiprocessor make a clock, along k: 4096 of one byte, 2048 of two.
const PRODUCT_BYTES: f64 = 4096.0;

/// Clocks for each element of k.
fn clocks(on: Target, problem: &Problem, Size { bm, bn, blocks }: Size) -> f64 {
    let size = problem.a.tensor.dtype.size_bytes() as f64;
    let [products, rows] = [f64::from(bm * bn), f64::from(bm) + f64::from(bn) / f64::from(blocks)];
    let turns = problem.max_tiles(bm * blocks, bn).div_ceil((on.num_sms / blocks).max(1));
    f64::from(turns) * size * (products / PRODUCT_BYTES).max(rows / L2_BYTES)
}

/// The quickest of some kernels; the first of those that are equally quick.
pub(in crate::ptx) fn quickest<T>(
    on: Target,
    problem: &Problem,
    candidates: impl IntoIterator<Item = (T, Size)>,
) -> Option<T> {
    let timed = candidates.into_iter().map(|(tile, size)| (tile, clocks(on, problem, size)));
    timed.min_by(|a, b| a.1.total_cmp(&b.1)).map(|(tile, _)| tile)
}
