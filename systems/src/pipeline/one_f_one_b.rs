//! 1F1B (PipeDream-Flush, arXiv 2006.09503): each rank runs ahead by as many forwards as there are ranks behind it, then
//! alternates, so that at most `ranks` microbatches hold activations. With one rank it is gradient accumulation.

use super::action::{Action, Cell, Schedule, Work};

/// The schedule of `ranks` ranks for `microbatches` microbatches; stage r is on rank r.
pub fn one_f_one_b(ranks: u32, microbatches: u32) -> Schedule {
    let list = |rank: u32| {
        let warm_up = (ranks - 1 - rank).min(microbatches);
        let forward = |m| Action::Single(Cell::new(rank, Work::F, m));
        let backward = |m| Action::Single(Cell::new(rank, Work::B, m));
        let steady = (0..microbatches - warm_up).flat_map(|m| [forward(m + warm_up), backward(m)]);
        (0..warm_up).map(forward).chain(steady).chain((microbatches - warm_up..microbatches).map(backward)).collect()
    };
    Schedule { num_stages: ranks, num_microbatches: microbatches, ranks: (0..ranks).map(list).collect() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_rank_accumulates_gradients() {
        assert_eq!(one_f_one_b(1, 3).to_text(), "0F0 0B0 0F1 0B1 0F2 0B2\n");
    }

    #[test]
    fn four_ranks_warm_up_and_drain() {
        let want = "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3\n1F0 1F1 1F2 1B0 1F3 1B1 1B2 1B3\n\
                    2F0 2F1 2B0 2F2 2B1 2F3 2B2 2B3\n3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3\n";
        assert_eq!(one_f_one_b(4, 4).to_text(), want);
    }
}
