//! GPipe (arXiv 1811.06965): all forwards, then all backwards. The simplest order, and the one with the most activations: every
//! microbatch of the step is alive at the turn.

use super::action::{Action, Cell, Schedule, Work};

/// The schedule of `ranks` ranks for `microbatches` microbatches; stage r is on rank r.
pub fn gpipe(ranks: u32, microbatches: u32) -> Schedule {
    let pass = |rank, work| (0..microbatches).map(move |m| Action::Single(Cell::new(rank, work, m)));
    let list = |rank| pass(rank, Work::F).chain(pass(rank, Work::B)).collect();
    Schedule { num_stages: ranks, num_microbatches: microbatches, ranks: (0..ranks).map(list).collect() }
}
