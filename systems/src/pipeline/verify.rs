//! Whether a schedule can run, and if not, all that is wrong with it, by the labels of the cells.
//!
//! What is proven: every microbatch goes through every stage once, forwards and backwards; all of a microbatch on a stage is on
//! one rank, in an order that has the activations there; two ranks send and receive in the same order; nobody waits
//! forever if each rank does its list in order. Sends are taken to be buffered, so that only receives wait.
//!
//! Between two ranks there are two FIFO channels in each direction: activations (from a F to the F of the next stage) and
//! gradients (from an I or B to that of the stage before). One channel for both would be too strict: where a pipeline is
//! bidirectional or folded, both kinds go between the same two ranks, and no published schedule keeps one order for them.

use std::{
    collections::{BTreeMap, VecDeque},
    fmt,
};

use super::{
    action::{Action, Cell, Schedule, Work},
    places::{MAX_PLACES, Place, Places},
};

/// What is known of a schedule that can run.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Checked {
    /// An order of all actions in which each comes after what it waits for: rank, and index in its list. The
    /// lists of the ranks are interleaved, as they would be in time.
    pub order: Vec<(u32, u32)>,
    /// For each rank, the most microbatch-stages that hold activations at a time. One is counted from the start of its F until
    /// the end of its B, or of its W where the backward is split: the weight gradient needs the inputs that the F kept. In
    /// a pair, both are counted. This is the count of the published tables: PP for 1F1B and ZB-H1, PP + 1 for DualPipe.
    pub peak_activations: Vec<u32>,
}

/// Actions with their places, each waiting for the next, and the last for the first.
pub type Cycle = Vec<(At, Action)>;

/// Something wrong with a schedule.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Fault {
    /// More stages times microbatches than are looked at.
    TooLarge {
        /// Stages of the schedule.
        num_stages: u32,
        /// Microbatches of the schedule.
        num_microbatches: u32,
    },
    /// A cell with a stage or microbatch that the schedule does not have.
    OutOfRange(Cell, At),
    /// A cell that occurs again.
    Twice(Cell, At, At),
    /// A cell that does not occur.
    Missing(Cell),
    /// No B, no I and no W of a stage and a microbatch.
    MissingBackward(u32, u32),
    /// B next to I or W: the gradient would be computed twice.
    Both(Cell, Cell),
    /// Two cells of one microbatch on one stage that are on two ranks.
    Apart(Cell, At, Cell, At),
    /// On its rank, the first cell comes before the second, which it needs.
    TooEarly(Cell, Cell, At),
    /// The two cells of a pair depend on each other.
    Dependent(Action, At),
    /// A rank receives in another order than the other sends.
    SwappedReceive {
        /// The sending rank.
        from: u32,
        /// The receiving rank.
        to: u32,
        /// What the sender sends first.
        sent: Cell,
        /// What the sender computes for the cell that the receiver turns to first.
        wanted: Cell,
        /// The cell that the receiver turns to first.
        receiver: Cell,
    },
    /// A cycle.
    Deadlock(Cycle),
}

/// A place in the lists, for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct At {
    /// The rank.
    pub rank: u32,
    /// The index in its list.
    pub index: u32,
}

impl From<Place> for At {
    fn from(Place { rank, index }: Place) -> Self {
        At { rank, index }
    }
}

impl fmt::Display for At {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "rank {} (action {})", self.rank, self.index)
    }
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Fault::TooLarge { num_stages, num_microbatches } => write!(
                f,
                "{num_stages} stages and {num_microbatches} microbatches are too many: their product may be {MAX_PLACES} at most"
            ),
            Fault::OutOfRange(cell, at) => write!(f, "{cell} on {at} is of a stage or microbatch that is not there"),
            Fault::Twice(cell, first, second) => write!(f, "{cell} occurs twice, on {first} and on {second}"),
            Fault::Missing(cell) => write!(f, "{cell} is missing"),
            Fault::MissingBackward(stage, m) => {
                write!(
                    f,
                    "the backward of microbatch {m} on stage {stage} is missing: {stage}B{m}, or {stage}I{m} and {stage}W{m}"
                )
            }
            Fault::Both(full, part) => write!(f, "{full} and {part} compute the same gradient; expected one of them"),
            Fault::Apart(a, at_a, b, at_b) => {
                write!(f, "{a} is on rank {}, but {b} on rank {}; expected one rank", at_a.rank, at_b.rank)
            }
            Fault::TooEarly(cell, needed, at) => {
                write!(f, "rank {}: {cell} comes before {needed}, which it needs", at.rank)
            }
            Fault::Dependent(pair, at) => write!(
                f,
                "rank {}: {pair} cannot overlap, since the backward of a microbatch needs all of its forwards",
                at.rank
            ),
            Fault::SwappedReceive { from, to, sent, wanted, receiver } => write!(
                f,
                "swapped receive: rank {to} comes to {receiver}, which needs {wanted} of rank {from}, while the next that \
                 rank {from} sends is {sent}"
            ),
            Fault::Deadlock(cycle) => {
                write!(f, "deadlock: ")?;
                for (at, action) in cycle {
                    write!(f, "rank {}: {action} waits for ", at.rank)?;
                }
                cycle.first().map_or(Ok(()), |(at, action)| write!(f, "rank {}: {action}", at.rank))
            }
        }
    }
}

impl std::error::Error for Fault {}

/// Proves that `schedule` can run.
///
/// # Errors
/// All that is wrong with it. What order of receives and deadlocks there are is looked at only if all cells are there once.
pub fn verify(schedule: &Schedule) -> Result<Checked, Vec<Fault>> {
    let (num_stages, num_microbatches) = (schedule.num_stages, schedule.num_microbatches);
    if u64::from(num_stages) * u64::from(num_microbatches) > MAX_PLACES {
        return Err(vec![Fault::TooLarge { num_stages, num_microbatches }]);
    }
    let mut faults = out_of_range(schedule);
    if !faults.is_empty() {
        return Err(faults);
    }
    let (places, again) = Places::new(schedule);
    faults.extend(again.into_iter().map(|(cell, first, second)| Fault::Twice(cell, first.into(), second.into())));
    for stage in 0..num_stages {
        for microbatch in 0..num_microbatches {
            incomplete(&places, stage, microbatch, &mut faults);
        }
    }
    let is_complete = faults.is_empty();
    dependent_pairs(schedule, &mut faults);
    if !is_complete {
        return Err(faults);
    }
    let can_wait_for_itself = !faults.is_empty();
    swapped_receives(schedule, &places, &mut faults);
    // A cell that comes too early waits for itself; one fault is enough.
    match if can_wait_for_itself { Ok(Vec::new()) } else { order(schedule, &places) } {
        Ok(order) if faults.is_empty() => Ok(Checked { order, peak_activations: peak_activations(schedule) }),
        Ok(_) => Err(faults),
        Err(cycle) => {
            faults.push(Fault::Deadlock(cycle));
            Err(faults)
        }
    }
}

fn out_of_range(schedule: &Schedule) -> Vec<Fault> {
    let is_out = |cell: &Cell| cell.stage >= schedule.num_stages || cell.microbatch >= schedule.num_microbatches;
    actions(schedule)
        .flat_map(|(at, action)| action.cells().filter(is_out).map(move |cell| Fault::OutOfRange(cell, at)))
        .collect()
}

/// What is missing, doubled, on another rank or too early of one microbatch on one stage.
fn incomplete(places: &Places, stage: u32, microbatch: u32, faults: &mut Vec<Fault>) {
    let cell = |work| Cell::new(stage, work, microbatch);
    let [f, i, w, b] = [Work::F, Work::I, Work::W, Work::B].map(|work| places.get(cell(work)));
    if f.is_none() {
        faults.push(Fault::Missing(cell(Work::F)));
    }
    match (b, i, w) {
        (Some(_), None, None) | (None, Some(_), Some(_)) => {}
        (None, None, None) => faults.push(Fault::MissingBackward(stage, microbatch)),
        (None, Some(_), None) => faults.push(Fault::Missing(cell(Work::W))),
        (None, None, Some(_)) => faults.push(Fault::Missing(cell(Work::I))),
        (Some(_), i, _) => faults.push(Fault::Both(cell(Work::B), cell(if i.is_some() { Work::I } else { Work::W }))),
    }
    for (before, after) in [(Work::F, Work::I), (Work::F, Work::B), (Work::I, Work::W)] {
        let (Some(first), Some(second)) = (places.get(cell(before)), places.get(cell(after))) else { continue };
        if first.rank != second.rank {
            faults.push(Fault::Apart(cell(before), first.into(), cell(after), second.into()));
        } else if second < first {
            faults.push(Fault::TooEarly(cell(after), cell(before), second.into()));
        }
    }
}

fn dependent_pairs(schedule: &Schedule, faults: &mut Vec<Fault>) {
    for (at, action) in actions(schedule) {
        if let Action::Pair { forward, backward } = action
            && forward.microbatch == backward.microbatch
        {
            faults.push(Fault::Dependent(action, at));
        }
    }
}

/// Compares, for each channel, the order of its sends with that of its receives.
fn swapped_receives(schedule: &Schedule, places: &Places, faults: &mut Vec<Fault>) {
    /// A message, as its sender and as its receiver know it.
    type Message = (Cell, Cell);
    let mut received: BTreeMap<(u32, u32, bool), Vec<Message>> = BTreeMap::new();
    for (at, action) in actions(schedule) {
        for cell in action.cells() {
            if let Some((sent, from)) = places.neighbor(cell).filter(|(_, from)| from.rank != at.rank) {
                received.entry((from.rank, at.rank, cell.work == Work::F)).or_default().push((sent, cell));
            }
        }
    }
    for ((from, to, _), messages) in received {
        // Stable, so that the messages of one action, of which there is one to a channel, stay.
        let mut sends = messages.clone();
        sends.sort_by_key(|(sent, _)| places.get(*sent));
        let swapped = sends.iter().zip(&messages).find(|(sent, received)| sent != received);
        if let Some((&(sent, _), &(wanted, receiver))) = swapped {
            faults.push(Fault::SwappedReceive { from, to, sent, wanted, receiver });
        }
    }
}

/// All actions with their places, rank by rank.
fn actions(schedule: &Schedule) -> impl Iterator<Item = (At, Action)> {
    let ranks = (0..).zip(&schedule.ranks);
    ranks.flat_map(|(rank, list)| (0..).zip(list).map(move |(index, action)| (At { rank, index }, *action)))
}

/// The order of [`Checked`], or the cycle that makes it impossible.
fn order(schedule: &Schedule, places: &Places) -> Result<Vec<(u32, u32)>, Cycle> {
    let nodes: Vec<(At, Action)> = actions(schedule).collect();
    let starts: Vec<usize> = schedule
        .ranks
        .iter()
        .scan(0, |sum, list| {
            *sum += list.len();
            Some(*sum - list.len())
        })
        .collect();
    let node = |rank: u32, index: u32| starts[rank as usize] + index as usize;
    let before = |&(at, action): &(At, Action)| {
        let own = at.index.checked_sub(1).map(|index| node(at.rank, index));
        let inputs = action.cells().flat_map(|cell| [places.neighbor(cell), places.own(cell)]);
        let inputs = inputs.flatten().map(|(_, place)| node(place.rank, place.index));
        own.into_iter().chain(inputs).collect::<Vec<usize>>()
    };
    let mut after: Vec<Vec<usize>> = vec![Vec::new(); nodes.len()];
    let mut waits_for = vec![0; nodes.len()];
    for (i, node) in nodes.iter().enumerate() {
        for previous in before(node) {
            after[previous].push(i);
            waits_for[i] += 1;
        }
    }
    // A queue makes levels: all that can run at once comes before what waits for it.
    let mut queue: VecDeque<usize> = (0..nodes.len()).filter(|i| waits_for[*i] == 0).collect();
    let mut order = Vec::with_capacity(nodes.len());
    while let Some(i) = queue.pop_front() {
        order.push((nodes[i].0.rank, nodes[i].0.index));
        for &next in &after[i] {
            waits_for[next] -= 1;
            if waits_for[next] == 0 {
                queue.push_back(next);
            }
        }
    }
    let Some(stuck) = waits_for.iter().position(|count| *count > 0) else { return Ok(order) };
    // Whatever is stuck waits for something stuck; following that comes around.
    let mut path = vec![stuck];
    let mut seen = BTreeMap::from([(stuck, 0)]);
    loop {
        let last = path[path.len() - 1];
        // A message tells more than the place in the list, which comes first.
        let next = before(&nodes[last]).into_iter().rev().find(|i| waits_for[*i] > 0).unwrap_or(last);
        if let Some(&start) = seen.get(&next) {
            let cycle = &path[start..];
            return Err(cycle.iter().map(|i| nodes[*i]).collect());
        }
        seen.insert(next, path.len());
        path.push(next);
    }
}

fn peak_activations(schedule: &Schedule) -> Vec<u32> {
    let peak = |list: &Vec<Action>| {
        let (mut alive, mut peak) = (0u32, 0);
        for cell in list.iter().flat_map(|action| action.cells()) {
            match cell.work {
                Work::F => alive += 1,
                Work::B | Work::W => alive -= 1,
                Work::I => {}
            }
            peak = peak.max(alive);
        }
        peak
    };
    schedule.ranks.iter().map(peak).collect()
}
