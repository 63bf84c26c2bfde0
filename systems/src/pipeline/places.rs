//! Where each cell of a schedule is, as a table, and which cells it waits for.

use super::action::{Cell, Schedule, Work};

/// Stages times microbatches that a schedule may have: far more than any step, few enough for tables.
pub(super) const MAX_PLACES: u64 = 1 << 20;

/// A place in the ranks' lists.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Place {
    pub rank: u32,
    pub index: u32,
}

/// The place of each cell.
pub(super) struct Places {
    num_stages: u32,
    num_microbatches: u32,
    table: Vec<[Option<Place>; 4]>,
}

impl Places {
    /// The first place of each cell, and what comes again: the cell, its first place, its second.
    pub fn new(schedule: &Schedule) -> (Self, Vec<(Cell, Place, Place)>) {
        let (num_stages, num_microbatches) = (schedule.num_stages, schedule.num_microbatches);
        let table = vec![[None; 4]; num_stages as usize * num_microbatches as usize];
        let mut places = Places { num_stages, num_microbatches, table };
        let mut again = Vec::new();
        for (rank, actions) in (0..).zip(&schedule.ranks) {
            for (index, action) in (0..).zip(actions) {
                let place = Place { rank, index };
                for cell in action.cells() {
                    let at = places.index(cell.stage, cell.microbatch);
                    let slot = &mut places.table[at][cell.work as usize];
                    match *slot {
                        Some(first) => again.push((cell, first, place)),
                        None => *slot = Some(place),
                    }
                }
            }
        }
        (places, again)
    }

    fn index(&self, stage: u32, microbatch: u32) -> usize {
        stage as usize * self.num_microbatches as usize + microbatch as usize
    }

    pub fn get(&self, cell: Cell) -> Option<Place> {
        self.table[self.index(cell.stage, cell.microbatch)][cell.work as usize]
    }

    /// The cell that computes the input gradient: I, or B.
    pub fn input_grad(&self, stage: u32, microbatch: u32) -> Option<(Cell, Place)> {
        let found = |work| {
            let cell = Cell::new(stage, work, microbatch);
            self.get(cell).map(|place| (cell, place))
        };
        found(Work::I).or_else(|| found(Work::B))
    }

    /// The cell of another stage that `cell` gets its input from, if any.
    pub fn neighbor(&self, cell: Cell) -> Option<(Cell, Place)> {
        match cell.work {
            Work::F => {
                let before = Cell::new(cell.stage.checked_sub(1)?, Work::F, cell.microbatch);
                self.get(before).map(|place| (before, place))
            }
            Work::I | Work::B if cell.stage + 1 < self.num_stages => self.input_grad(cell.stage + 1, cell.microbatch),
            _ => None,
        }
    }

    /// The cell of the same stage that `cell` comes after, if any.
    pub fn own(&self, cell: Cell) -> Option<(Cell, Place)> {
        let before = match cell.work {
            Work::F => return None,
            Work::I | Work::B => Work::F,
            Work::W => Work::I,
        };
        let before = Cell { work: before, ..cell };
        self.get(before).map(|place| (before, place))
    }
}
