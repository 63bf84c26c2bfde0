//! Zero-bubble schedules with handmade orders (arXiv 2401.10241, section 2): the backward is split into I, on which the
//! rank before waits, and W, on which nobody does, so that W fills what would be bubbles.
//!
//! Both alternate F and I like 1F1B and hold W back; they differ in how far a rank runs ahead. Rank r may hold back
//! `r` (H1) or `2r` (H2) of them: this is what a later rank has left of the activations that rank 0 needs anyway.

use super::action::{Action, Cell, Schedule, Work};

/// ZB-H1, also called ZB1P: the activations of 1F1B, about a third of its bubble. Stage r is on rank r.
pub fn zb_h1(ranks: u32, microbatches: u32) -> Schedule {
    split(ranks, microbatches, |rank| Ahead { forwards: ranks - 1 - rank, weights: rank })
}

/// ZB-H2: twice the activations, no bubble between the first and the last action of a rank at F = I = W. Stage r is on rank r.
pub fn zb_h2(ranks: u32, microbatches: u32) -> Schedule {
    split(ranks, microbatches, |rank| Ahead { forwards: 2 * (ranks - 1 - rank), weights: 2 * rank })
}

/// How far a rank runs ahead.
struct Ahead {
    /// Forwards before the first that an I follows.
    forwards: u32,
    /// Weight gradients held back.
    weights: u32,
}

fn split(ranks: u32, microbatches: u32, ahead: impl Fn(u32) -> Ahead) -> Schedule {
    let list = |rank: u32| {
        let Ahead { forwards, weights } = ahead(rank);
        let cell = |work, m| Action::Single(Cell::new(rank, work, m));
        let warm_up = forwards.min(microbatches);
        let mut actions: Vec<Action> = (0..warm_up).map(|m| cell(Work::F, m)).collect();
        for m in 0..microbatches {
            if m + warm_up < microbatches {
                actions.push(cell(Work::F, m + warm_up));
            }
            actions.push(cell(Work::I, m));
            if m >= weights {
                actions.push(cell(Work::W, m - weights));
            }
        }
        actions.extend((microbatches.saturating_sub(weights)..microbatches).map(|m| cell(Work::W, m)));
        actions
    };
    Schedule { num_stages: ranks, num_microbatches: microbatches, ranks: (0..ranks).map(list).collect() }
}
