//! DualPipe (DeepSeek-V3, arXiv 2412.19437, section 3.2.1): half of the microbatches enters at rank 0, the other half at the
//! last rank, so that in the middle of the step every rank has a forward and a backward to overlap, each hiding the all-to-all
//! of the other. Every stage is held by two ranks: stage s of the second direction is on rank `ranks - 1 - s`.
//!
//! The eight steps of a rank follow the counts that DeepSeek published with it; `lanes` is shared with
//! [DualPipeV](super::dualpipev), which is one half of it, folded.

use std::collections::VecDeque;

use super::action::{Action, Cell, Schedule, Work};

/// The schedule of an even number of `ranks` for an even number of `microbatches`, at least `2 * ranks`. Microbatches of
/// the first half enter at rank 0, the others at the last rank.
pub fn dualpipe(ranks: u32, microbatches: u32) -> Schedule {
    let half = microbatches / 2;
    let list = |rank: u32| {
        // Seen from either end the lists are the same: lane 0 enters at this rank's end.
        let from_end = rank.min(ranks - 1 - rank);
        let is_front = rank < ranks / 2;
        lanes(from_end, ranks / 2, half, |lane, work, m| {
            let is_first_direction = (lane == 0) == is_front;
            let stage = if is_first_direction { rank } else { ranks - 1 - rank };
            Cell::new(stage, work, if is_first_direction { m } else { m + half })
        })
    };
    Schedule { num_stages: ranks, num_microbatches: microbatches, ranks: (0..ranks).map(list).collect() }
}

/// The list of the rank that is `from_end` ranks away from where lane 0 enters and `depth - 1 - from_end` away from
/// where lanes meet, for `microbatches` in each lane, at least `2 * depth`. `cell` says what a lane's microbatch is called.
pub(super) fn lanes(
    from_end: u32,
    depth: u32,
    microbatches: u32,
    cell: impl Fn(usize, Work, u32) -> Cell,
) -> Vec<Action> {
    let to_meeting = depth - 1 - from_end;
    let mut list = List { next_f: [0; 2], next_b: [0; 2], weights: VecDeque::new(), actions: Vec::new(), cell };
    // 1, 2: fill, lane 0 alone until lane 1 arrives.
    for _ in 0..2 * to_meeting {
        list.forward(0);
    }
    for _ in 0..from_end + 1 {
        list.forward(0);
        list.forward(1);
    }
    // 3: lane 1 turns; its weight gradients fill the time until lane 0 does.
    for _ in 0..to_meeting {
        list.input_grad(1);
        list.weight_grad();
        list.forward(1);
    }
    // 4: the steady part. Where lanes meet the first pair is not overlapped, since others wait for its forward.
    for turn in 0..microbatches + from_end + 1 - 2 * depth {
        if turn == 0 && to_meeting == 0 {
            list.forward(0);
            list.backward(1);
        } else {
            list.pair(0, 1);
        }
        list.pair(1, 0);
    }
    // 5: lane 0 has no more forwards.
    for _ in 0..to_meeting {
        list.backward(1);
        list.pair(1, 0);
    }
    // 6: drain; in the second half weight gradients are held back, as others wait for the input gradients.
    for turn in 0..2 * (from_end + 1) {
        let lane = if turn % 2 == 0 { 1 } else { 0 };
        if turn <= from_end {
            list.backward(lane);
        } else {
            list.input_grad(lane);
        }
    }
    // 7, 8: what was held back.
    for _ in 0..to_meeting {
        list.weight_grad();
        list.input_grad(0);
    }
    for _ in 0..from_end + 1 {
        list.weight_grad();
    }
    list.actions
}

/// A list that is being written, with the next microbatch of each lane.
struct List<C> {
    next_f: [u32; 2],
    next_b: [u32; 2],
    /// Input gradients whose weight gradients are still to do, oldest first.
    weights: VecDeque<(usize, u32)>,
    actions: Vec<Action>,
    cell: C,
}

impl<C: Fn(usize, Work, u32) -> Cell> List<C> {
    fn next_forward(&mut self, lane: usize) -> Cell {
        self.next_f[lane] += 1;
        (self.cell)(lane, Work::F, self.next_f[lane] - 1)
    }

    fn next_backward(&mut self, lane: usize, work: Work) -> Cell {
        self.next_b[lane] += 1;
        (self.cell)(lane, work, self.next_b[lane] - 1)
    }

    fn forward(&mut self, lane: usize) {
        let cell = self.next_forward(lane);
        self.actions.push(Action::Single(cell));
    }

    fn backward(&mut self, lane: usize) {
        let cell = self.next_backward(lane, Work::B);
        self.actions.push(Action::Single(cell));
    }

    fn pair(&mut self, forward_lane: usize, backward_lane: usize) {
        let forward = self.next_forward(forward_lane);
        let backward = self.next_backward(backward_lane, Work::B);
        self.actions.push(Action::Pair { forward, backward });
    }

    fn input_grad(&mut self, lane: usize) {
        self.weights.push_back((lane, self.next_b[lane]));
        let cell = self.next_backward(lane, Work::I);
        self.actions.push(Action::Single(cell));
    }

    fn weight_grad(&mut self) {
        if let Some((lane, m)) = self.weights.pop_front() {
            self.actions.push(Action::Single((self.cell)(lane, Work::W, m)));
        }
    }
}
