//! Interleaved 1F1B (Megatron-LM, arXiv 2104.04473, section 2.2): a rank holds several chunks of the model, `ranks` stages
//! apart, so that a microbatch comes around sooner and the bubble shrinks by the number of chunks, for as many times the
//! messages.

use super::action::{Action, Cell, Schedule, Work};

/// The schedule of `ranks` ranks for `microbatches` microbatches, a multiple of `ranks`; stage `c * ranks + r` is chunk c of
/// rank r. A rank takes `ranks` microbatches through a chunk before it turns to the next.
pub fn interleaved(ranks: u32, microbatches: u32, chunks: u32) -> Schedule {
    let total = microbatches * chunks;
    let list = |rank: u32| {
        // The turn-th forward, or backward, of the rank.
        let cell = |work, turn: u32| {
            let chunk = turn / ranks % chunks;
            let chunk = if work == Work::F { chunk } else { chunks - 1 - chunk };
            let microbatch = turn / (ranks * chunks) * ranks + turn % ranks;
            Action::Single(Cell::new(chunk * ranks + rank, work, microbatch))
        };
        let warm_up = ((ranks - 1 - rank) * 2 + (chunks - 1) * ranks).min(total);
        let steady = (0..total - warm_up).flat_map(|turn| [cell(Work::F, turn + warm_up), cell(Work::B, turn)]);
        let drain = (total - warm_up..total).map(|turn| cell(Work::B, turn));
        (0..warm_up).map(|turn| cell(Work::F, turn)).chain(steady).chain(drain).collect()
    };
    Schedule { num_stages: ranks * chunks, num_microbatches: microbatches, ranks: (0..ranks).map(list).collect() }
}
