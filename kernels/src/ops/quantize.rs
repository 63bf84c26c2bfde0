//! Numbers to FP8, by the recipe of [`crate::fp8`]: for each product the codes in the order that it sums over.
//!
//! - [`tiles`] has scales along a row: the left operand of y = x w^T, and of dx = dy w
//! - [`columns`] has them along tokens, and is transposed: both operands of dw = dy^T x, which sums over tokens
//! - [`retile`] is the same from what [`tiles`] made, where x itself is not kept
//! - [`blocks`] is for weights; transposed, it is the same numbers
//!
//! For experts, whose rows are ragged, each group's columns begin at a multiple of 128 ([`crate::fp8::padded`]), so that no tile
//! has rows of two.

use std::ops::Range;

use rayon::prelude::*;

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float},
    error::Result,
    fp8::{Blocks, MIN_AMAX, Scaling, TILE, Tiles, decode_e4m3, encode_scaled, padded},
    ops::{
        expect::{expect_blocks, expect_float, expect_tensor, expect_that, expect_tiles},
        is_fast,
        parallel::{for_row_chunks2, for_row_chunks3},
    },
    ptx::{self, quantize::Recipe},
    simd::vectorize,
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// Rounded to nearest f32.
#[inline(always)]
pub(crate) fn to_f32<T: Float>(x: T) -> f32 {
    x.to_acc().as_f64() as f32
}

/// Rounded to nearest, ties to even.
#[inline(always)]
pub(crate) fn from_f32<T: Float>(x: f32) -> T {
    T::from_acc(T::Acc::of_f64(f64::from(x)))
}

/// The bits of |x|, which order as their numbers do; 0 for NaN. A maximum over them vectorizes, one over floats does not.
#[inline(always)]
fn magnitude_bits(x: f32) -> u32 {
    let bits = x.to_bits() & 0x7fff_ffff;
    if bits > f32::INFINITY.to_bits() { 0 } else { bits }
}

/// The largest magnitude, NaN left out, and at least [`MIN_AMAX`].
//
// Loops here are `for`: a closure in an adapter is a function of its own, which may be compiled for the baseline.
#[inline(always)]
pub(crate) fn amax<T: Float>(x: &[T]) -> f32 {
    let mut most = MIN_AMAX.to_bits();
    for x in x {
        most = most.max(magnitude_bits(to_f32(*x)));
    }
    f32::from_bits(most)
}

#[inline(always)]
fn encode<T: Float>(x: &[T], scale: f32, codes: &mut [u8]) {
    let inverse = scale.recip();
    for (code, x) in codes.iter_mut().zip(x) {
        *code = encode_scaled(to_f32(*x), inverse);
    }
}

/// Codes of a tile; returns its scale.
#[inline(always)]
pub(crate) fn encode_tile<T: Float>(x: &[T], codes: &mut [u8], scaling: Scaling) -> f32 {
    let scale = scaling.scale(amax(x));
    encode(x, scale, codes);
    scale
}

/// Assigns codes and scales of [`Tiles`] with `c` columns: `fill(r, y)` assigns row r to y, and what it returns is put `beside`.
#[inline(always)]
pub(crate) fn encode_rows<E: Send>(
    (codes, scales): (&mut [u8], &mut [f32]),
    c: usize,
    scaling: Scaling,
    beside: &mut [E],
    fill: impl Fn(usize, &mut [f32]) -> E + Sync,
) {
    let num_tiles = c.div_ceil(TILE);
    let mut by_row = vec![0.0; beside.len() * num_tiles];
    for_row_chunks3(
        (codes, c),
        (&mut by_row, num_tiles),
        beside,
        #[inline(always)]
        |first, codes, scales, beside| {
            let mut y = vec![0.0; c];
            let rows = codes.chunks_exact_mut(c).zip(scales.chunks_exact_mut(num_tiles)).zip(beside);
            for (row, ((codes, scales), beside)) in (first..).zip(rows) {
                *beside = fill(row, &mut y);
                for ((y, codes), scale) in y.chunks(TILE).zip(codes.chunks_mut(TILE)).zip(scales) {
                    *scale = encode_tile(y, codes, scaling);
                }
            }
        },
    );
    transpose_scales(&by_row, num_tiles, scales);
}

/// Codes and scales of x, rows of `c` columns.
pub(crate) fn encode_tiles<T: Float>(x: &[T], c: usize, scaling: Scaling, (codes, scales): (&mut [u8], &mut [f32])) {
    let num_tiles = c.div_ceil(TILE);
    let mut by_row = vec![0.0; x.len() / c.max(1) * num_tiles];
    for_row_chunks2(
        (codes, c),
        (&mut by_row, num_tiles),
        #[inline(always)]
        |first, codes, scales| {
            let rows = codes.chunks_exact_mut(c).zip(scales.chunks_exact_mut(num_tiles));
            for ((codes, scales), x) in rows.zip(x[first * c..].chunks_exact(c)) {
                for ((x, codes), scale) in x.chunks(TILE).zip(codes.chunks_mut(TILE)).zip(scales) {
                    *scale = encode_tile(x, codes, scaling);
                }
            }
        },
    );
    transpose_scales(&by_row, num_tiles, scales);
}

/// From [r, tiles], as rows are worked on, to [tiles, p], as they are stored.
fn transpose_scales(by_row: &[f32], num_tiles: usize, scales: &mut [f32]) {
    let pitch = scales.len() / num_tiles.max(1);
    for (r, row) in by_row.chunks_exact(num_tiles.max(1)).enumerate() {
        row.iter().enumerate().for_each(|(tile, scale)| scales[tile * pitch + r] = *scale);
    }
}

/// `x` [t, i] with a scale for each 128 columns, into `q` [t, i].
pub fn tiles(s: &mut Stream, x: Tensor, q: Tiles, scaling: Scaling) -> Result<()> {
    const OP: &str = "quantize tiles";
    let (t, i) = (x.rows(), x.cols());
    expect_float(OP, "x", x)?;
    expect_tiles(OP, "q", q, t, i)?;
    s.account(tiles_cost(t, i, x.dtype.size_bytes()));
    let kernels = |on: &Target| is_fast(x).then(|| ptx::quantize::tiles(x, q, Recipe::new(on, scaling)));
    s.launch_kernel(&[x], &q.tensors(), kernels, move |m| {
        let (mut codes, mut scales) = (m.write::<u8>(q.codes), m.write::<f32>(q.scales));
        with_float!(x.dtype, T => encode_tiles(&m.read::<T>(x), i, scaling, (&mut codes, &mut scales)));
    });
    Ok(())
}

/// A group of rows, and where its columns begin in the transpose.
#[derive(Clone, Debug, PartialEq)]
pub(crate) struct Group {
    pub rows: Range<usize>,
    pub start: usize,
}

/// The groups that offsets say, each on its own tiles.
///
/// # Panics
/// If offsets do not ascend from 0 to at most `n`.
pub(crate) fn groups(offsets: &[u32], n: usize) -> Vec<Group> {
    let last = offsets.last().copied().unwrap_or(0) as usize;
    assert!(offsets.first() == Some(&0) && last <= n, "offsets lie within {n} rows: found {offsets:?}");
    assert!(offsets.is_sorted(), "offsets ascend");
    let mut start = 0;
    let group = |w: &[u32]| {
        let group = Group { rows: w[0] as usize..w[1] as usize, start };
        start += group.rows.len().next_multiple_of(TILE);
        group
    };
    offsets.windows(2).map(group).collect()
}

/// Columns of x that are transposed together; a tile has a multiple of it.
const WIDTH: usize = 64;

/// Assigns codes [i, columns] and their scales: `load(r, c, x)` assigns x\[r, c..\].
fn encode_columns(
    (codes, scales): (&mut [u8], &mut [f32]),
    columns: usize,
    groups: &[Group],
    scaling: Scaling,
    load: impl Fn(usize, usize, &mut [f32]) + Sync,
) {
    let num_tiles = columns.div_ceil(TILE);
    if columns == 0 {
        return;
    }
    let mut by_row = vec![1.0; codes.len() / columns * num_tiles];
    let chunks = codes.par_chunks_mut(WIDTH * columns).zip(by_row.par_chunks_mut(WIDTH * num_tiles));
    chunks.enumerate().for_each(|(chunk, (codes, scales))| {
        vectorize(
            #[inline(always)]
            || {
                codes.fill(0);
                let mut block = [[0.0; WIDTH]; TILE];
                for group in groups {
                    for (tile, first) in group.rows.clone().step_by(TILE).enumerate() {
                        let at = group.start + tile * TILE;
                        let block = &mut block[..TILE.min(group.rows.end - first)];
                        let width = codes.len() / columns;
                        for (row, x) in (first..).zip(&mut *block) {
                            load(row, chunk * WIDTH, &mut x[..width]);
                        }
                        let scales = scales.chunks_exact_mut(num_tiles).map(|row| &mut row[at / TILE]);
                        encode_block(block, scaling, codes.chunks_exact_mut(columns).map(|row| &mut row[at..]), scales);
                    }
                }
            },
        );
    });
    transpose_scales(&by_row, num_tiles, scales);
}

/// Quantizes the columns of a block, and assigns them to the rows of codes.
#[inline(always)]
fn encode_block<'a>(
    block: &[[f32; WIDTH]],
    scaling: Scaling,
    codes: impl Iterator<Item = &'a mut [u8]>,
    scales: impl Iterator<Item = &'a mut f32>,
) {
    let mut most = [MIN_AMAX.to_bits(); WIDTH];
    for x in block {
        for c in 0..WIDTH {
            most[c] = most[c].max(magnitude_bits(x[c]));
        }
    }
    let of_columns = most.map(|bits| scaling.scale(f32::from_bits(bits)));
    let inverse = of_columns.map(f32::recip);
    let mut by_row = [[0; WIDTH]; TILE];
    for (x, codes) in block.iter().zip(&mut by_row) {
        for c in 0..WIDTH {
            codes[c] = encode_scaled(x[c], inverse[c]);
        }
    }
    for (c, row) in codes.enumerate() {
        for (code, codes) in row.iter_mut().zip(&by_row[..block.len()]) {
            *code = codes[c];
        }
    }
    scales.zip(of_columns).for_each(|(out, scale)| *out = scale);
}

/// Checks `q` [i, t], or [i, padded(t, e)] with offsets U32 \[e + 1\]; what is read besides x.
pub(super) fn check_columns(op: &'static str, (t, i): (usize, usize), offsets: Option<Tensor>, q: Tiles) -> Result<()> {
    let columns = match offsets {
        Some(offsets) => {
            expect_tensor(op, "offsets", offsets, DType::U32, &[offsets.len().max(1)])?;
            padded(t, offsets.len() - 1)
        }
        None => t,
    };
    expect_tiles(op, "q", q, i, columns)
}

pub(super) fn groups_of(m: &crate::memory::Memory, offsets: Option<Tensor>, t: usize) -> Vec<Group> {
    offsets.map_or_else(|| vec![Group { rows: 0..t, start: 0 }], |offsets| groups(&m.read::<u32>(offsets), t))
}

/// `x` [t, i], transposed, with a scale for each 128 tokens, into `q` [i, t]; with `offsets` U32 \[e + 1\] into
/// [i, padded(t, e)], each group's tokens from its own tile on, and code 0 where there are none.
pub fn columns(s: &mut Stream, x: Tensor, offsets: Option<Tensor>, q: Tiles, scaling: Scaling) -> Result<()> {
    const OP: &str = "quantize columns";
    let (t, i) = (x.rows(), x.cols());
    expect_float(OP, "x", x)?;
    check_columns(OP, (t, i), offsets, q)?;
    s.account(columns_cost(t, q.codes.cols(), i, x.dtype.size_bytes()));
    let reads: Vec<Tensor> = std::iter::once(x).chain(offsets).collect();
    let kernels = |on: &Target| is_fast(x).then(|| ptx::quantize::columns(x, offsets, q, Recipe::new(on, scaling)));
    s.launch_kernel(&reads, &q.tensors(), kernels, move |m| {
        let (mut codes, mut scales) = (m.write::<u8>(q.codes), m.write::<f32>(q.scales));
        let groups = groups_of(m, offsets, t);
        with_float!(x.dtype, T => {
            let x = m.read::<T>(x);
            encode_columns((&mut codes, &mut scales), q.codes.cols(), &groups, scaling, #[inline(always)] |row, first, out| {
                for (out, x) in out.iter_mut().zip(&x[row * i + first..]) {
                    *out = to_f32(*x);
                }
            });
        });
    });
    Ok(())
}

/// [`columns`] of `x` [t, i] from its tiles: of f32(code * scale).
pub fn retile(s: &mut Stream, x: Tiles, offsets: Option<Tensor>, q: Tiles, scaling: Scaling) -> Result<()> {
    const OP: &str = "quantize tiles again";
    let (t, i) = (x.codes.rows(), x.codes.cols());
    expect_tiles(OP, "x", x, t, i)?;
    check_columns(OP, (t, i), offsets, q)?;
    s.account(retile_cost(t, q.codes.cols(), i));
    let reads: Vec<Tensor> = x.tensors().into_iter().chain(offsets).collect();
    let kernels = |on: &Target| Some(ptx::quantize::retile(x, offsets, q, Recipe::new(on, scaling)));
    s.launch_kernel(&reads, &q.tensors(), kernels, move |m| {
        let (mut codes, mut scales) = (m.write::<u8>(q.codes), m.write::<f32>(q.scales));
        let (from, from_scales) = (m.read::<u8>(x.codes), m.read::<f32>(x.scales));
        let (groups, pitch) = (groups_of(m, offsets, t), x.scales.dim(1));
        encode_columns(
            (&mut codes, &mut scales),
            q.codes.cols(),
            &groups,
            scaling,
            #[inline(always)]
            |row, first, out| {
                let scale = from_scales[first / TILE * pitch + row];
                let from = &from[row * i + first..];
                for (out, code) in out.iter_mut().zip(from) {
                    let x = decode_e4m3(*code);
                    *out = (x * scale).copysign(x);
                }
            },
        );
    });
    Ok(())
}

/// Weights `w` [o, i] or [e, o, i] with a scale for each 128 x 128, into `q` of the same shape; and the same codes and scales
/// `transposed`, [i, o] or [e, i, o].
pub fn blocks(s: &mut Stream, w: Tensor, q: Blocks, transposed: Option<Blocks>, scaling: Scaling) -> Result<()> {
    const OP: &str = "quantize blocks";
    let dims: Vec<usize> = w.shape.dims().collect();
    expect_float(OP, "w", w)?;
    expect_that(OP, "w", w, matches!(dims.len(), 2 | 3), || "[o, i] or [e, o, i]".into())?;
    expect_blocks(OP, "q", q, &dims)?;
    let (o, i) = (dims[dims.len() - 2], w.cols());
    if let Some(transposed) = transposed {
        let dims = [&dims[..dims.len() - 2], &[i, o]].concat();
        expect_blocks(OP, "transposed", transposed, &dims)?;
    }
    s.account(blocks_cost(&dims, w.dtype.size_bytes(), transposed.is_some()));
    let writes: Vec<Tensor> = q.tensors().into_iter().chain(transposed.iter().flat_map(Blocks::tensors)).collect();
    let kernels = |on: &Target| is_fast(w).then(|| ptx::quantize::blocks(w, q, transposed, Recipe::new(on, scaling)));
    s.launch_kernel(&[w], &writes, kernels, move |m| {
        if w.is_empty() {
            return;
        }
        let (mut codes, mut scales) = (m.write::<u8>(q.codes), m.write::<f32>(q.scales));
        with_float!(w.dtype, T => encode_blocks(&m.read::<T>(w), o, i, scaling, (&mut codes, &mut scales)));
        if let Some(transposed) = transposed {
            transpose(&codes, o, i, &mut m.write::<u8>(transposed.codes));
            transpose(&scales, o.div_ceil(TILE), i.div_ceil(TILE), &mut m.write::<f32>(transposed.scales));
        }
    });
    Ok(())
}

/// Codes and scales of matrices [o, i], one after the other, which are not empty: what [`blocks`] makes.
pub fn encode_blocks<T: Float>(
    w: &[T],
    o: usize,
    i: usize,
    scaling: Scaling,
    (codes, scales): (&mut [u8], &mut [f32]),
) {
    let (down, across) = (o.div_ceil(TILE), i.div_ceil(TILE));
    let matrices = w.chunks(o * i).zip(codes.chunks_mut(o * i)).zip(scales.chunks_mut(down * across));
    let rows_of_blocks: Vec<_> = matrices
        .flat_map(|((w, codes), scales)| {
            w.chunks(TILE * i).zip(codes.chunks_mut(TILE * i)).zip(scales.chunks_mut(across))
        })
        .collect();
    rows_of_blocks.into_par_iter().for_each(|((w, codes), scales)| {
        vectorize(
            #[inline(always)]
            || {
                for (block, scale) in scales.iter_mut().enumerate() {
                    let part = block * TILE..i.min((block + 1) * TILE);
                    let mut most = MIN_AMAX;
                    for row in w.chunks_exact(i) {
                        most = most.max(amax(&row[part.clone()]));
                    }
                    *scale = scaling.scale(most);
                    for (row, codes) in w.chunks_exact(i).zip(codes.chunks_exact_mut(i)) {
                        encode(&row[part.clone()], *scale, &mut codes[part.clone()]);
                    }
                }
            },
        );
    });
}

/// Matrices [o, i], one after the other, to [i, o]; not empty.
pub fn transpose<T: Copy + Default + Send + Sync>(from: &[T], o: usize, i: usize, to: &mut [T]) {
    let strips: Vec<_> = from
        .chunks(o * i)
        .zip(to.chunks_mut(o * i))
        .flat_map(|(from, to)| to.chunks_mut(WIDTH * o).enumerate().map(move |(strip, to)| (from, strip * WIDTH, to)))
        .collect();
    strips.into_par_iter().for_each(|(from, first, to)| {
        let width = to.len() / o;
        for start in (0..o).step_by(WIDTH) {
            let mut block = [[T::default(); WIDTH]; WIDTH];
            let block = &mut block[..WIDTH.min(o - start)];
            for (r, row) in block.iter_mut().enumerate() {
                row[..width].copy_from_slice(&from[(start + r) * i + first..][..width]);
            }
            for (c, row) in to.chunks_exact_mut(o).enumerate() {
                row[start..].iter_mut().zip(&*block).for_each(|(out, row)| *out = row[c]);
            }
        }
    });
}

/// Operations that an element takes: its magnitude, the maximum, the product and the rounding.
const FLOPS: usize = 4;

/// Bytes of codes and of a scale for each 128 of them, [r, c].
pub fn tiles_bytes(r: usize, c: usize) -> u64 {
    (r * c + 4 * r * c.div_ceil(TILE)) as u64
}

/// The same with a scale for each 128 x 128, [r, c] or [e, r, c].
pub fn blocks_bytes(dims: &[usize]) -> u64 {
    let count = |dims: &[usize]| dims.iter().product::<usize>();
    (count(dims) + 4 * count(&Blocks::scale_shape(dims))) as u64
}

/// Cost of [`tiles`] from elements of `elem_bytes`.
pub fn tiles_cost(t: usize, i: usize, elem_bytes: usize) -> Cost {
    Cost::stream((FLOPS * t * i) as u64, (t * i * elem_bytes) as u64, tiles_bytes(t, i))
}

/// Cost of [`columns`] over t tokens, into `padded` columns.
pub fn columns_cost(t: usize, padded: usize, i: usize, elem_bytes: usize) -> Cost {
    Cost::stream((FLOPS * t * i) as u64, (t * i * elem_bytes) as u64, tiles_bytes(i, padded))
}

/// Cost of [`retile`] over t tokens, into `padded` columns.
pub fn retile_cost(t: usize, padded: usize, i: usize) -> Cost {
    Cost::stream(((FLOPS + 1) * t * i) as u64, tiles_bytes(t, i), tiles_bytes(i, padded))
}

/// Cost of [`blocks`] of shape `dims`.
pub fn blocks_cost(dims: &[usize], elem_bytes: usize, transposed: bool) -> Cost {
    let n: usize = dims.iter().product();
    let written = blocks_bytes(dims) * if transposed { 2 } else { 1 };
    Cost::stream((FLOPS * n) as u64, (n * elem_bytes) as u64, written)
}

#[cfg(test)]
mod tests;
