//! Numbers to FP8 with fine-grained scales, by the recipe of [`crate::fp8`] to the bit.
//!
//! - [`tiles`]: a scale for each 128 columns of a row; fused with what makes the rows: [`permuted_tiles`], [`swiglu_tiles`], [`rms_norm_tiles`]
//! - [`columns`]: a scale for each 128 rows of a column, transposed; [`retile`] is the same from codes
//! - [`blocks`]: a scale for each 128 x 128 block of a weight
//!
//! Kernels are bound by bytes: rows that begin at multiples of 16 bytes are moved by 16 bytes a thread, in whole lines both ways; others
//! element by element. Nothing is atomic, and group offsets are read on the device only.

mod blocks;
pub(in crate::ptx) mod code;
mod columns;
mod norm;
mod panel;
pub(in crate::ptx) mod rows;

pub use code::Recipe;

use super::{Arg, Kernel, Launch, fold::Team, golden::Variant, parts::count, rms_norm};
use crate::{
    dtype::DType,
    fp8::{Blocks, TILE, Tiles},
    tensor::Tensor,
};
use columns::Form;
use rows::{COLUMNS, Source};

/// Whether rows of all tensors begin at multiples of 16 bytes, and of `columns` elements.
pub(in crate::ptx) fn aligned(tensors: &[Tensor], columns: usize) -> bool {
    tensors.iter().all(|t| {
        let size = t.dtype.size_bytes();
        (t.offset as usize * size).is_multiple_of(16) && (t.cols() * size).is_multiple_of(16)
    }) && tensors.iter().all(|t| t.cols().is_multiple_of(columns))
}

/// `x` [t, i] with a scale for each 128 columns, into `q` [t, i].
pub fn tiles(x: Tensor, q: Tiles, recipe: Recipe) -> Vec<Launch> {
    of_rows(Source::Rows, &[x], q, recipe)
}

/// Rows `token_of_row` of `x` [t, i], into `q` [n, i].
pub fn permuted_tiles(x: Tensor, token_of_row: Tensor, q: Tiles, recipe: Recipe) -> Vec<Launch> {
    of_rows(Source::Permuted, &[x, token_of_row], q, recipe)
}

/// silu(g) u, where `h` [t, 2 f] holds g and u side by side, into `q` [t, f].
pub fn swiglu_tiles(h: Tensor, q: Tiles, recipe: Recipe) -> Vec<Launch> {
    of_rows(Source::Swiglu, &[h], q, recipe)
}

fn of_rows(source: Source, inputs: &[Tensor], q: Tiles, recipe: Recipe) -> Vec<Launch> {
    let (n, i) = (q.codes.rows(), q.codes.cols());
    if n * i == 0 {
        return vec![];
    }
    let wide = aligned(&[inputs[0], q.codes], COLUMNS) && i.is_multiple_of(COLUMNS);
    let mut args: Vec<Arg> = inputs.iter().copied().chain(q.tensors()).map(Arg::Tensor).collect();
    let num_tiles = i.div_ceil(TILE);
    args.extend([n, i, num_tiles, q.scales.cols()].map(|n| Arg::U32(count(n))));
    let kernel = rows::kernel(source, inputs[0].dtype, wide, recipe);
    vec![Launch { kernel, grid: rows::grid(n, num_tiles), args }]
}

/// The first d columns of `x` [t, c], normalized with weight `w` \[d\], into `q` [t, d]; `rstd` \[t\] is kept for the backward passes.
pub fn rms_norm_tiles(x: Tensor, w: Tensor, q: Tiles, rstd: Tensor, eps: f64, recipe: Recipe) -> Vec<Launch> {
    let (t, c, d) = (x.rows(), x.cols(), w.len());
    if t * d == 0 {
        return vec![];
    }
    let lanes = rms_norm::row_lanes(&[x, w], c, d);
    let wide = aligned(&[x, w, q.codes], 1) && d.is_multiple_of(COLUMNS);
    let team = Team::of(d / lanes);
    let mut args = [x, w, q.codes, q.scales, rstd].map(Arg::Tensor).to_vec();
    args.extend([t, c, d, d.div_ceil(TILE), q.scales.cols()].map(|n| Arg::U32(count(n))));
    args.push(Arg::F32(eps as f32));
    vec![Launch { kernel: norm::kernel(x.dtype, team, lanes, wide, recipe), grid: team.grid(t), args }]
}

/// `x` [t, i], transposed, with a scale for each 128 tokens, into `q` [i, t]; with `offsets` U32 \[e + 1\] into
/// [i, padded(t, e)], each group's tokens from its own tile on, and code 0 where there are none.
pub fn columns(x: Tensor, offsets: Option<Tensor>, q: Tiles, recipe: Recipe) -> Vec<Launch> {
    of_columns(x, None, offsets, q, recipe)
}

/// The same of what the codes and scales of `x` [t, i] say.
pub fn retile(x: Tiles, offsets: Option<Tensor>, q: Tiles, recipe: Recipe) -> Vec<Launch> {
    of_columns(x.codes, Some(x.scales), offsets, q, recipe)
}

fn of_columns(x: Tensor, x_scales: Option<Tensor>, offsets: Option<Tensor>, q: Tiles, recipe: Recipe) -> Vec<Launch> {
    let (n, i, out) = (x.rows(), x.cols(), q.codes.cols());
    if i * out == 0 {
        return vec![];
    }
    let mut form = Form { dtype: x.dtype, grouped: offsets.is_some(), wide_in: false, wide_out: false };
    (form.wide_in, form.wide_out) = (aligned(&[x], form.width()), aligned(&[q.codes], 1));
    let mut args = vec![Arg::Tensor(x)];
    args.extend(x_scales.iter().flat_map(|scales| [Arg::Tensor(*scales), Arg::U32(count(scales.cols()))]));
    args.extend(q.tensors().map(Arg::Tensor));
    args.extend([n, i, out, q.scales.cols()].map(|n| Arg::U32(count(n))));
    args.extend(offsets.iter().flat_map(|offsets| [Arg::Tensor(*offsets), Arg::U32(count(offsets.len() - 1))]));
    let grid = [count(i).div_ceil(form.panel() as u32), count(out).div_ceil(TILE as u32), 1];
    vec![Launch { kernel: columns::kernel(form, recipe), grid, args }]
}

/// `w` [o, i] or [e, o, i] with a scale for each 128 x 128 block, into `q` of that shape and, if wanted, `transposed` [i, o] or [e, i, o]: the
/// same codes and scales.
pub fn blocks(w: Tensor, q: Blocks, transposed: Option<Blocks>, recipe: Recipe) -> Vec<Launch> {
    if w.is_empty() {
        return vec![];
    }
    let dims: Vec<usize> = w.shape.dims().collect();
    let [.., r, c] = dims[..] else { panic!("a matrix, or several: found {w:?}") };
    let wide = [aligned(&[w, q.codes], COLUMNS), transposed.is_some_and(|q| aligned(&[q.codes], COLUMNS))];
    let outputs = q.tensors().into_iter().chain(transposed.iter().flat_map(Blocks::tensors));
    let mut args: Vec<Arg> = std::iter::once(w).chain(outputs).map(Arg::Tensor).collect();
    args.extend([r, c].map(|n| Arg::U32(count(n))));
    let grid = [count(c).div_ceil(TILE as u32), count(r).div_ceil(TILE as u32), count(w.len() / (r * c))];
    vec![Launch { kernel: blocks::kernel(w.dtype, wide, transposed.is_some(), recipe), grid, args }]
}

/// What is committed: DeepSeek-V3's own recipe by Hopper's instruction; of the others, some of each kind.
pub fn variants() -> Vec<Variant> {
    let [real, pow2, integers] = Recipe::committed();
    let bf16 = |grouped| Form { dtype: DType::Bf16, grouped, wide_in: true, wide_out: true };
    let codes = |grouped| Form { dtype: DType::U8, ..bf16(grouped) };
    let mut all = vec![];
    let mut add = |kernel: Kernel, max_registers| all.push(Variant::new(kernel, max_registers));
    for recipe in [real, pow2, integers] {
        add(rows::kernel(Source::Rows, DType::Bf16, true, recipe), 40);
        add(columns::kernel(bf16(true), recipe), 64);
        add(columns::kernel(codes(true), recipe), 64);
        add(blocks::kernel(DType::F32, [true; 2], true, recipe), 84);
        add(norm::kernel(DType::Bf16, Team::Block, 8, true, recipe), 42);
    }
    for source in [Source::Permuted, Source::Swiglu] {
        add(rows::kernel(source, DType::Bf16, true, real), 42);
    }
    add(norm::kernel(DType::Bf16, Team::Warp, 8, true, real), 48);
    add(columns::kernel(bf16(false), real), 64);
    add(columns::kernel(codes(false), real), 64);
    add(blocks::kernel(DType::Bf16, [true; 2], true, real), 84);
    all
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests;
