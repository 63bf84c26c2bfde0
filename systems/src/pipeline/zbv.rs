//! ZBV (arXiv 2405.15362): the pipeline is folded, so that rank r holds stages r and 2P-1-r, the last stage is on the
//! rank of the first, and at F = I = W no rank waits between its first and its last action, with the activations of 1F1B.

use super::action::{Action, Cell, Schedule, Work};

/// The schedule of `ranks` ranks, with twice as many stages, for `microbatches` microbatches. It is made for
/// at least `2 * ranks - 1` of them, and with fewer those that are not there are left out.
pub fn zbv(ranks: u32, microbatches: u32) -> Schedule {
    let list = |rank| Folded::new(ranks, rank, microbatches).list();
    Schedule { num_stages: 2 * ranks, num_microbatches: microbatches, ranks: (0..ranks).map(list).collect() }
}

/// One rank; arm 0 goes down the ranks, arm 1 comes back.
struct Folded {
    ranks: u32,
    rank: u32,
    microbatches: u32,
    /// The next microbatch of F, I and W for each arm.
    next: [[u32; 2]; 3],
    actions: Vec<Action>,
}

impl Folded {
    fn new(ranks: u32, rank: u32, microbatches: u32) -> Self {
        Folded { ranks, rank, microbatches, next: [[0; 2]; 3], actions: Vec::new() }
    }

    fn push(&mut self, work: Work, arm: usize) {
        let row = match work {
            Work::F => 0,
            Work::I | Work::B => 1,
            Work::W => 2,
        };
        let microbatch = self.next[row][arm];
        self.next[row][arm] += 1;
        if microbatch < self.microbatches {
            let stage = if arm == 0 { self.rank } else { 2 * self.ranks - 1 - self.rank };
            self.actions.push(Action::Single(Cell::new(stage, work, microbatch)));
        }
    }

    fn backward(&mut self, arm: usize) {
        self.push(Work::I, arm);
        self.push(Work::W, arm);
    }

    fn list(mut self) -> Vec<Action> {
        let (before, from_here) = (self.rank, self.ranks - self.rank);
        let planned = self.microbatches.max(2 * self.ranks - 1);
        // Until the first microbatch comes back on arm 1, then both arms, then backwards of arm 1.
        for _ in 0..2 * from_here - 1 {
            self.push(Work::F, 0);
        }
        for _ in 0..before {
            self.push(Work::F, 1);
            self.push(Work::F, 0);
        }
        for _ in 0..from_here {
            self.push(Work::F, 1);
            self.backward(1);
        }
        while self.next[0][1] < planned {
            if self.next[0][0] < planned {
                self.push(Work::F, 0);
            }
            self.backward(0);
            self.push(Work::F, 1);
            self.backward(1);
        }
        // Nobody waits for W: first the input gradients that ranks before this one wait for.
        for _ in 0..before {
            self.push(Work::I, 0);
            self.push(Work::I, 1);
        }
        for _ in 0..from_here {
            self.backward(0);
        }
        for arm in [1, 0] {
            while self.next[2][arm] < planned {
                self.push(Work::W, arm);
            }
        }
        self.actions
    }
}
