//! How ops use the cores: contiguous chunks of rows on a thread pool, vectorized inside.
//!
//! Closures are inlined into [`vectorize`] by force: one that is not is compiled for the baseline.
//!
//! Chunk sizes depend on the problem and never on the number of threads, so that results do not either.

use rayon::prelude::*;

use crate::simd::vectorize;

/// Elements below which waking another thread costs more than the work.
pub const MIN_PARALLEL_ELEMENTS: usize = 16 * 1024;

/// Rows in a chunk of about 16 Ki elements.
fn rows_per_chunk(cols: usize) -> usize {
    (MIN_PARALLEL_ELEMENTS / cols.max(1)).max(1)
}

/// Calls `f(first_row, rows)` for chunks of whole rows of `out`, in parallel if it pays.
#[inline]
pub fn for_row_chunks<T: Send>(out: &mut [T], cols: usize, f: impl Fn(usize, &mut [T]) + Sync) {
    let rows = rows_per_chunk(cols);
    if out.len() <= MIN_PARALLEL_ELEMENTS {
        vectorize(
            #[inline(always)]
            || f(0, out),
        );
        return;
    }
    out.par_chunks_mut(rows * cols).enumerate().for_each(|(i, chunk)| {
        vectorize(
            #[inline(always)]
            || f(i * rows, chunk),
        )
    });
}

/// The same over two outputs with the same number of rows.
#[inline]
pub fn for_row_chunks2<T: Send, U: Send>(
    (a, a_cols): (&mut [T], usize),
    (b, b_cols): (&mut [U], usize),
    f: impl Fn(usize, &mut [T], &mut [U]) + Sync,
) {
    let rows = rows_per_chunk(a_cols.max(b_cols));
    if a.len().max(b.len()) <= MIN_PARALLEL_ELEMENTS {
        vectorize(
            #[inline(always)]
            || f(0, a, b),
        );
        return;
    }
    a.par_chunks_mut(rows * a_cols).zip(b.par_chunks_mut(rows * b_cols)).enumerate().for_each(|(i, (a, b))| {
        vectorize(
            #[inline(always)]
            || f(i * rows, a, b),
        )
    });
}

/// The same over three outputs with the same number of rows, of which the last has one element a row.
#[inline]
pub fn for_row_chunks3<T: Send, U: Send, V: Send>(
    (a, a_cols): (&mut [T], usize),
    (b, b_cols): (&mut [U], usize),
    c: &mut [V],
    f: impl Fn(usize, &mut [T], &mut [U], &mut [V]) + Sync,
) {
    let rows = rows_per_chunk(a_cols.max(b_cols));
    if a.len().max(b.len()) <= MIN_PARALLEL_ELEMENTS {
        vectorize(
            #[inline(always)]
            || f(0, a, b, c),
        );
        return;
    }
    let chunks = a.par_chunks_mut(rows * a_cols).zip(b.par_chunks_mut(rows * b_cols)).zip(c.par_chunks_mut(rows));
    chunks.enumerate().for_each(|(i, ((a, b), c))| {
        vectorize(
            #[inline(always)]
            || f(i * rows, a, b, c),
        )
    });
}
