//! Latent attention over a cache of latents for many new tokens: keys and values are made once, head by head, and thrown away.
//!
//! In latent space a pair of query and key costs 2 c + r multiply-adds a head, with keys and values n + r + v, less than a third of it at
//! DeepSeek-V3's sizes. What it takes is the up-projection of every row that is read and not only of the new ones. Source: the two ways of
//! DeepSeek-V2 (arXiv 2405.04434, section 2.1.2), absorbed for generation and naive for prompts.
//!
//! A head is a task: its keys and values are [len, n + r + v] numbers, two products from the latents and the head's part of the weight,
//! and its attention is that of training, [`crate::ops::attention`], in blocks. The bits of a row follow from the rows beside it.

use super::latent::{Call, Sizes};
use crate::{
    dtype::Float,
    ops::{
        attention::{
            block::{self, Part, QUERY_BLOCK, Rows, Shared},
            for_each_task, runs,
        },
        gemm::{Mat, Threads, gemm},
        paged::{Sequence, Table},
    },
};

/// New tokens from which the ways are compared; for fewer both wait for the weight and the cache, and expanding reads no less.
pub const MIN_NEW_TOKENS: usize = 64;
/// Query rows that keys are packed for at a time.
const ROWS_AT_A_TIME: usize = 8 * QUERY_BLOCK;

/// Multiply-adds of `new` tokens after `context` others with sizes `[h, n, r, v, c]`: absorbed, and expanded.
pub fn multiply_adds(new: usize, context: usize, [h, n, r, v, c]: [usize; 5]) -> [u64; 2] {
    let of = |x: usize| x as u64;
    let pairs = of(new) * of(context) + of(new) * of(new + 1) / 2;
    let up = of(c * (n + v));
    let absorbed = of(new) * up + pairs * of(2 * c + r);
    let expanded = of(context + new) * up + pairs * of(n + r + v);
    [of(h) * absorbed, of(h) * expanded]
}

/// Whether to make keys and values: from [`MIN_NEW_TOKENS`] new tokens on, where that is fewer multiply-adds. A prompt from its start
/// always, if 2 c > n + v; in the middle of one from about c (n + v) / (2 c - n - v) new tokens on: 171 at DeepSeek-V3's sizes, 64 at
/// those of the quickstart, whatever the context.
pub fn is_cheaper(new: usize, context: usize, sizes: [usize; 5]) -> bool {
    let [absorbed, expanded] = multiply_adds(new, context, sizes);
    new >= MIN_NEW_TOKENS && expanded < absorbed
}

/// Assigns the rows of o [m, h, v] of one sequence, given with its first token.
pub(super) fn expanded<T: Float, W: Float<Acc = T::Acc>>(
    Call { z, q, w, cached, sequences, scale }: Call<T, W>,
    (first, sequence): (usize, &Sequence),
    o: &mut [T],
) {
    let Sizes { h, n, r, v, c } = z;
    let (len, width, zero) = (sequence.len(), c + r, T::Acc::default());
    let mut rows = vec![zero; len * width];
    cached.numbers(z, sequences.table(sequence), &mut rows);
    let heads: Vec<usize> = (0..h).collect();
    let [_, madds] = multiply_adds(sequence.num_new, sequence.context, [h, n, r, v, c]);
    let o = Shared::new(o);
    for_each_task(&heads, madds as usize, |&head, scratch| {
        let w_jc: Vec<T::Acc> = w[head * (n + v) * c..][..(n + v) * c].iter().map(|x| x.to_acc()).collect();
        let (latents, (w_nc, w_vc)) = (Mat::strided(&rows, len, c, width), w_jc.split_at(n * c));
        let (mut k, mut values) = (vec![zero; len * (n + r)], vec![zero; len * v]);
        gemm(latents, Mat::new(w_nc, n, c).t(), 0.0, &mut k, n + r, Threads::One);
        gemm(latents, Mat::new(w_vc, v, c).t(), 0.0, &mut values, v, Threads::One);
        for (k, row) in k.chunks_exact_mut(n + r).zip(rows.chunks_exact(width)) {
            k[n..].copy_from_slice(&row[c..]);
        }
        let part = Part {
            q: Rows::new(first, h, head, 1, n + r),
            k: Rows::new(0, 1, 0, 1, n + r),
            v: Rows::new(0, 1, 0, 1, v),
            o: Rows::new(first, h, head, 1, v),
            table: Table::IDENTITY,
            num_tokens: sequence.num_new,
            context: sequence.context,
            scale,
        };
        for (part, rows) in runs(&part, ROWS_AT_A_TIME) {
            block::forward::<T, T::Acc>(&part, rows, (q, &k, &values), scratch, |row, o_v, _| {
                // SAFETY: a row of o belongs to one head and token, and a head to one task.
                let o = unsafe { o.slice(part.o.range(row)) };
                o.iter_mut().zip(o_v).for_each(|(o, &x)| *o = T::from_acc(x));
            });
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    const DEEPSEEK_V3: [usize; 5] = [128, 128, 64, 128, 512];
    const QUICKSTART: [usize; 5] = [4, 32, 16, 32, 64];

    #[test]
    fn the_cheaper_way_is_taken() {
        // Counted by hand for two heads: n 2, r 1, v 2, c 4; 3 tokens after 5 are 5 + 6 + 7 + 1 + 1 + 1 = 21 pairs.
        assert_eq!(multiply_adds(3, 5, [2, 2, 1, 2, 4]), [2 * (3 * 16 + 21 * 9), 2 * (8 * 16 + 21 * 5)]);
        // From the start, more new tokens save more: the same projections, 1088 against 320 a pair.
        let [absorbed, expanded] = multiply_adds(4096, 0, DEEPSEEK_V3);
        assert!((2.99..3.01).contains(&(absorbed as f64 / expanded as f64)), "{absorbed} {expanded}");
        for (sizes, always_from) in [(DEEPSEEK_V3, 171), (QUICKSTART, 64)] {
            assert!(is_cheaper(64, 0, sizes) && !is_cheaper(63, 0, sizes) && !is_cheaper(1, 100_000, sizes));
            assert!(is_cheaper(always_from, 1 << 20, sizes) && !is_cheaper(always_from - 1, 1 << 20, sizes));
        }
        // Between them the context decides.
        assert!(is_cheaper(64, 19, DEEPSEEK_V3) && !is_cheaper(64, 20, DEEPSEEK_V3));
        assert!(is_cheaper(128, 193, DEEPSEEK_V3) && !is_cheaper(128, 194, DEEPSEEK_V3));
        // Latents wider than what they stand for are the other way round.
        assert!(!is_cheaper(4096, 0, [4, 32, 16, 32, 24]));
    }
}
