//! DualPipeV (Sea AI Lab and DeepSeek, 2025): one half of [DualPipe](super::dualpipe), folded. Rank r holds stages r and
//! `2 * ranks - 1 - r`, so that the same number of stages needs half of the ranks, and no stage is held twice.

use super::{
    action::{Cell, Schedule},
    dualpipe::lanes,
};

/// The schedule of `ranks` ranks, with twice as many stages, for at least `2 * ranks` `microbatches`.
pub fn dualpipev(ranks: u32, microbatches: u32) -> Schedule {
    let list = |rank: u32| {
        lanes(rank, ranks, microbatches, |lane, work, m| {
            Cell::new(if lane == 0 { rank } else { 2 * ranks - 1 - rank }, work, m)
        })
    };
    Schedule { num_stages: 2 * ranks, num_microbatches: microbatches, ranks: (0..ranks).map(list).collect() }
}
