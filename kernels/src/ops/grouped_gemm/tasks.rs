//! Cutting a grouped product into tasks of one core each, and running them.
//!
//! The largest task starts first and an idle core takes the next, so the end is ragged by one small task at most. Cuts are made
//! where one task would exceed 1/32 of the rows, whatever the number of cores: each product repacks its expert's weight, and
//! below 64 rows that is slower than the waiting it saves.

use std::{cmp::Reverse, ops::Range};

use super::Sizes;

/// A part of one expert's product.
#[derive(Clone, Debug, PartialEq)]
pub(in crate::ops) struct Task {
    pub expert: usize,
    /// Of x and y.
    pub rows: Range<usize>,
    /// Of the expert's weight.
    pub outputs: Range<usize>,
}

impl Task {
    fn work(&self) -> usize {
        self.rows.len() * self.outputs.len()
    }
}

/// Parts that one expert with all rows is cut into; [`cut`] lets a part be a quarter larger.
const NUM_PARTS: usize = 40;
/// Rows below which a product is not cut.
const MIN_ROWS: usize = 64;
/// Outputs below which a weight gradient is not cut.
const MIN_OUTPUTS: usize = 32;
/// Multiply-adds below which the caller does all: about what waking the pool costs.
const MIN_PARALLEL_WORK: usize = 1 << 19;

/// Whole experts, but cut by rows where one has more than its share.
pub(in crate::ops) fn by_rows(offsets: &[u32], z: Sizes) -> Vec<Task> {
    let most = (z.n / NUM_PARTS).max(MIN_ROWS);
    let mut tasks = Vec::with_capacity(z.e + NUM_PARTS);
    for (expert, rows) in experts(offsets, z) {
        for rows in cut(rows, most) {
            tasks.push(Task { expert, rows, outputs: 0..z.o });
        }
    }
    tasks
}

/// Whole experts, but cut by outputs where one has more than its share of the rows.
pub(in crate::ops) fn by_outputs(offsets: &[u32], z: Sizes) -> Vec<Task> {
    let most = (z.n / NUM_PARTS).max(MIN_ROWS);
    let mut tasks = Vec::with_capacity(z.e + NUM_PARTS);
    for (expert, rows) in experts(offsets, z) {
        let width = (z.o * most / rows.len()).max(MIN_OUTPUTS);
        for outputs in cut(0..z.o, width) {
            tasks.push(Task { expert, rows: rows.clone(), outputs });
        }
    }
    tasks
}

/// Experts with rows, and which.
fn experts(offsets: &[u32], z: Sizes) -> impl Iterator<Item = (usize, Range<usize>)> {
    let last = offsets.last().copied().unwrap_or(0) as usize;
    assert!(offsets[0] == 0 && last <= z.n, "offsets lie within the rows of x: found {offsets:?} for {} rows", z.n);
    assert!(offsets.is_sorted(), "offsets ascend");
    offsets.windows(2).map(|w| w[0] as usize..w[1] as usize).enumerate().filter(|(_, rows)| !rows.is_empty())
}

/// `range` in as few parts as keep each within about `most`, of equal length up to one.
fn cut(range: Range<usize>, most: usize) -> impl Iterator<Item = Range<usize>> {
    // A quarter more than the share is not worth two smaller products.
    let parts = (range.len() * 4).div_ceil(most * 5).max(1);
    let at = move |part: usize| range.start + range.len() * part / parts;
    (0..parts).map(move |part| at(part)..at(part + 1))
}

/// The rows of `out` that each task writes, as `place` says; places ascend and do not overlap.
pub(in crate::ops) fn split<'a, T>(
    tasks: &[Task],
    out: &'a mut [T],
    cols: usize,
    place: impl Fn(&Task) -> Range<usize>,
) -> Vec<&'a mut [T]> {
    let (mut rest, mut at) = (out, 0);
    let parts = tasks.iter().map(|task| {
        let place = place(task);
        let (_, tail) = std::mem::take(&mut rest).split_at_mut((place.start - at) * cols);
        let (part, tail) = tail.split_at_mut(place.len() * cols);
        (rest, at) = (tail, place.end);
        part
    });
    parts.collect()
}

/// Calls `f` with each task and its output, on all cores if it pays.
pub(in crate::ops) fn run<S: Send>(tasks: Vec<Task>, outs: Vec<S>, work_per_item: usize, f: impl Fn(&Task, S) + Sync) {
    let mut jobs: Vec<(Task, S)> = tasks.into_iter().zip(outs).collect();
    let work: usize = jobs.iter().map(|(task, _)| task.work()).sum();
    if jobs.len() < 2 || work * work_per_item < MIN_PARALLEL_WORK {
        return jobs.into_iter().for_each(|(task, out)| f(&task, out));
    }
    jobs.sort_by_key(|(task, _)| Reverse(task.work()));
    rayon::scope_fifo(|scope| {
        for (task, out) in jobs {
            let f = &f;
            scope.spawn_fifo(move |_| f(&task, out));
        }
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn tasks(
        cut: fn(&[u32], Sizes) -> Vec<Task>,
        counts: &[usize],
        o: usize,
    ) -> Vec<(usize, Range<usize>, Range<usize>)> {
        let mut offsets = vec![0u32];
        counts.iter().for_each(|&c| offsets.push(offsets[offsets.len() - 1] + c as u32));
        let z = Sizes { n: counts.iter().sum(), e: counts.len(), o, i: 8, by_row: false };
        cut(&offsets, z).into_iter().map(|t| (t.expert, t.rows, t.outputs)).collect()
    }

    #[test]
    fn small_experts_are_whole_and_empty_ones_absent() {
        let want = [(0, 0..3, 0..9), (2, 3..10, 0..9)];
        assert_eq!(tasks(by_rows, &[3, 0, 7, 0], 9), want);
        assert_eq!(tasks(by_outputs, &[3, 0, 7, 0], 9), want);
    }

    #[test]
    fn a_dominant_expert_is_cut_into_shares() {
        let mut counts = [64; 33];
        counts[5] = 6144;
        let rows = tasks(by_rows, &counts, 256);
        let shares: Vec<_> = rows.iter().filter(|t| t.0 == 5).map(|t| t.1.len()).collect();
        assert!(shares.len() >= 24 && shares.iter().all(|&r| (160..=256).contains(&r)), "{shares:?}");
        assert_eq!(rows.iter().map(|t| t.1.len()).sum::<usize>(), 6144 + 32 * 64);
        let outputs: Vec<_> = tasks(by_outputs, &counts, 256).into_iter().filter(|t| t.0 == 5).map(|t| t.2).collect();
        assert!(outputs.len() >= 4 && outputs[0].start == 0 && outputs.last().is_some_and(|r| r.end == 256));
        assert!(outputs.windows(2).all(|w| w[0].end == w[1].start), "{outputs:?}");
    }

    #[test]
    #[should_panic(expected = "offsets lie within the rows of x: found [0, 5] for 4 rows")]
    fn offsets_of_other_rows_are_refused() {
        by_rows(&[0, 5], Sizes { n: 4, e: 1, o: 1, i: 1, by_row: false });
    }
}
