//! 1F1B (PipeDream-Flush, arXiv 2006.09503): each rank runs ahead by as many forwards as there are ranks behind it, then
//! alternates, so that at most `ranks` microbatches hold activations. With one rank it is gradient accumulation.

use super::action::{Action, Work};

/// The actions of each of `ranks` ranks for `microbatches` microbatches; stage r is on rank r.
pub fn one_f_one_b(ranks: u32, microbatches: u32) -> Vec<Vec<Action>> {
    let rank_actions = |rank: u32| {
        let warm_up = (ranks - 1 - rank).min(microbatches);
        let forward = |m| Action::new(rank, Work::F, m);
        let backward = |m| Action::new(rank, Work::B, m);
        let steady = (0..microbatches - warm_up).flat_map(|m| [forward(m + warm_up), backward(m)]);
        (0..warm_up).map(forward).chain(steady).chain((microbatches - warm_up..microbatches).map(backward)).collect()
    };
    (0..ranks).map(rank_actions).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pipeline::action::to_text;

    #[test]
    fn one_rank_accumulates_gradients() {
        assert_eq!(to_text(&one_f_one_b(1, 3)), "0F0 0B0 0F1 0B1 0F2 0B2\n");
    }

    #[test]
    fn four_ranks_warm_up_and_drain() {
        let want = "0F0 0F1 0F2 0F3 0B0 0B1 0B2 0B3\n1F0 1F1 1F2 1B0 1F3 1B1 1B2 1B3\n\
                    2F0 2F1 2B0 2F2 2B1 2F3 2B2 2B3\n3F0 3B0 3F1 3B1 3F2 3B2 3F3 3B3\n";
        assert_eq!(to_text(&one_f_one_b(4, 4)), want);
    }

    #[test]
    fn every_microbatch_is_done_once_and_at_most_ranks_are_alive() {
        for (ranks, microbatches) in [(1, 1), (4, 2), (4, 9), (8, 8)] {
            for (rank, actions) in one_f_one_b(ranks, microbatches).iter().enumerate() {
                let (mut alive, mut peak) = (0u32, 0);
                for action in actions {
                    match action.work {
                        Work::F => alive += 1,
                        _ => alive -= 1,
                    }
                    peak = peak.max(alive);
                }
                assert_eq!(actions.len() as u32, 2 * microbatches);
                assert_eq!((alive, peak), (0, (ranks - rank as u32).min(microbatches)));
            }
        }
    }
}
