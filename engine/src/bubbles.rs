//! Bubbles: why compute streams were idle. Every nanosecond of a step in which a compute stream ran no task has one cause, so
//! that the causes of a rank sum to its idle time, measured or computed.
//!
//! A gap before a task is cut by going back from the task along what it waited for. A transfer that the stream waited for is
//! waiting for its peers, moving bytes, behind other transfers, not yet launched, or waits for something itself; then that
//! is looked at, as far back as the gap reaches. Only spans are needed, so a virtual run is judged like a real one.

use std::{collections::BTreeMap, fmt, sync::Arc};

use serde::{Deserialize, Serialize};

use crate::{task::Role, telemetry::Span};

/// Why a compute stream was idle.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum BubbleCause {
    /// Before the stream's first pass of the step (its first task, if it has no pass): the pipeline fills.
    WarmUp,
    /// After the stream's last pass, waiting for others to end theirs, and after its last task: the pipeline drains.
    CoolDown,
    /// The next task needs a result that is not there yet: another rank's, or one of another stream that computes.
    Dependency,
    /// A transfer that it waits for could run, but others were before it on its stream, or its peer was not ready to receive.
    CommunicationWait,
    /// Bytes that it waits for are moving.
    CommunicationCopy,
    /// In a collective, for ranks with more load: as long as this rank's compute would have taken longer with theirs.
    LoadImbalance,
    /// In a collective, for ranks that came later than loads explain.
    Straggler,
    /// All that it waits for had ended, and it had not begun: the host had not launched it, or the stream not taken it up.
    Launch,
}

impl BubbleCause {
    /// All, in order.
    pub const ALL: [BubbleCause; 8] = [
        BubbleCause::WarmUp,
        BubbleCause::CoolDown,
        BubbleCause::Dependency,
        BubbleCause::CommunicationWait,
        BubbleCause::CommunicationCopy,
        BubbleCause::LoadImbalance,
        BubbleCause::Straggler,
        BubbleCause::Launch,
    ];

    /// Whether it is a wait for what other ranks do.
    const fn is_for_others(self) -> bool {
        matches!(self, BubbleCause::Dependency | BubbleCause::LoadImbalance | BubbleCause::Straggler)
    }

    /// As in logs, traces and reports.
    pub const fn name(self) -> &'static str {
        match self {
            BubbleCause::WarmUp => "warm_up",
            BubbleCause::CoolDown => "cool_down",
            BubbleCause::Dependency => "dependency",
            BubbleCause::CommunicationWait => "communication_wait",
            BubbleCause::CommunicationCopy => "communication_copy",
            BubbleCause::LoadImbalance => "load_imbalance",
            BubbleCause::Straggler => "straggler",
            BubbleCause::Launch => "launch",
        }
    }
}

impl fmt::Display for BubbleCause {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// Whether a stream of this name computes: only then is its idle time a bubble.
pub fn is_compute(stream: &str) -> bool {
    stream.starts_with("compute")
}

/// Whether the task moves bytes between ranks: because of what it meets, or because of its stream.
fn is_communication(span: &Span) -> bool {
    span.role != Role::Compute || span.stream.starts_with("comm")
}

/// Idle time of a compute stream within a step.
#[derive(Clone, Debug, PartialEq)]
pub struct Bubble {
    /// Rank of the stream.
    pub rank: u32,
    /// Name of the stream.
    pub stream: Arc<str>,
    /// Begin.
    pub start_nanos: u64,
    /// End.
    pub end_nanos: u64,
    /// Why.
    pub cause: BubbleCause,
    /// The task that had to end, move on or begin, if it is not the stream's own next one.
    pub waited_for: Option<Arc<str>>,
}

/// The idle times of the step's compute streams from begin to end, by rank and stream, then by time.
///
/// `spans` are in launch order, as in a snapshot; what lies outside of the interval is left out. A step's compute streams are
/// those of which `is_compute` holds and that have a span in it. Waiting inside of a task of a compute stream is that task's
/// time, and no bubble.
///
/// # Panics
/// If the interval ends before it begins.
pub fn bubbles(spans: &[Span], is_compute: impl Fn(&str) -> bool, interval_nanos: (u64, u64)) -> Vec<Bubble> {
    let step = Step::new(spans, is_compute);
    let mut bubbles = Vec::new();
    step.cut(interval_nanos, &mut |lane: &Lane, slice: Slice| {
        bubbles.push(Bubble {
            rank: lane.rank,
            stream: lane.stream.clone(),
            start_nanos: slice.from,
            end_nanos: slice.to,
            cause: slice.cause,
            waited_for: slice.task.map(|task| spans[task as usize].label.clone()),
        });
    });
    bubbles.sort_by(|a, b| (a.rank, &a.stream, a.start_nanos).cmp(&(b.rank, &b.stream, b.start_nanos)));
    bubbles
}

/// Where the time of a rank's compute streams went. Busy and idle sum to the interval, times the streams.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RankBubbles {
    /// The rank.
    pub rank: u32,
    /// In tasks.
    pub busy_nanos: u64,
    /// In none.
    pub idle_nanos: u64,
    /// The idle time by cause, causes that did not occur left out.
    pub by_cause: BTreeMap<BubbleCause, u64>,
}

impl RankBubbles {
    /// Idle time over all time; 0 of none.
    pub fn idle_fraction(&self) -> f64 {
        self.idle_nanos as f64 / (self.busy_nanos + self.idle_nanos).max(1) as f64
    }

    fn add(&mut self, other: &RankBubbles) {
        self.busy_nanos += other.busy_nanos;
        self.idle_nanos += other.idle_nanos;
        for (&cause, nanos) in &other.by_cause {
            *self.by_cause.entry(cause).or_default() += nanos;
        }
    }
}

/// Where the time of compute streams went, by rank; of one step, or of several together.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Accounting {
    /// Steps that are in it.
    pub num_steps: u64,
    /// From begin to end, over all steps.
    pub total_nanos: u64,
    /// Ranks that have a compute stream, in order.
    pub ranks: Vec<RankBubbles>,
}

/// Accounts for the idle time of a step. Begin and end are the caller's, so that ranks that do not share a world can be
/// measured over the same interval; arguments are those of [`bubbles`].
///
/// # Panics
/// If the interval ends before it begins.
pub fn account(spans: &[Span], is_compute: impl Fn(&str) -> bool, (begin_nanos, end_nanos): (u64, u64)) -> Accounting {
    let step = Step::new(spans, is_compute);
    let mut by_cause = vec![[0; BubbleCause::ALL.len()]; step.lanes.len()];
    step.cut((begin_nanos, end_nanos), &mut |lane: &Lane, slice: Slice| {
        by_cause[lane.index][slice.cause as usize] += slice.to - slice.from;
    });
    let total_nanos = end_nanos - begin_nanos;
    let mut ranks: BTreeMap<u32, RankBubbles> = BTreeMap::new();
    for (lane, by_cause) in step.lanes.iter().zip(by_cause).filter(|(lane, _)| lane.is_compute) {
        let rank = ranks.entry(lane.rank).or_insert_with(|| RankBubbles { rank: lane.rank, ..RankBubbles::default() });
        let idle_nanos: u64 = by_cause.iter().sum();
        rank.busy_nanos += total_nanos - idle_nanos;
        rank.idle_nanos += idle_nanos;
        for (cause, nanos) in BubbleCause::ALL.into_iter().zip(by_cause).filter(|(_, nanos)| *nanos > 0) {
            *rank.by_cause.entry(cause).or_default() += nanos;
        }
    }
    Accounting { num_steps: 1, total_nanos, ranks: ranks.into_values().collect() }
}

impl Accounting {
    /// Adds another step. A rank that was not in it so far comes in.
    pub fn then(&mut self, next: &Accounting) {
        self.num_steps += next.num_steps;
        self.total_nanos += next.total_nanos;
        for rank in &next.ranks {
            match self.ranks.binary_search_by_key(&rank.rank, |known| known.rank) {
                Ok(at) => self.ranks[at].add(rank),
                Err(at) => self.ranks.insert(at, rank.clone()),
            }
        }
    }

    /// Adds ranks of other worlds, accounted for over the same steps.
    pub fn beside(&mut self, others: impl IntoIterator<Item = RankBubbles>) {
        self.ranks.extend(others);
        self.ranks.sort_by_key(|rank| rank.rank);
    }

    /// Idle time over all time of the ranks' compute streams; none without any.
    pub fn idle_fraction(&self) -> Option<f64> {
        let idle: u64 = self.ranks.iter().map(|rank| rank.idle_nanos).sum();
        let busy: u64 = self.ranks.iter().map(|rank| rank.busy_nanos).sum();
        (!self.ranks.is_empty()).then(|| idle as f64 / (idle + busy).max(1) as f64)
    }

    /// Idle time of a cause, over all ranks and steps.
    pub fn nanos(&self, cause: BubbleCause) -> u64 {
        self.ranks.iter().filter_map(|rank| rank.by_cause.get(&cause)).sum()
    }

    /// Seconds that a rank was idle for this cause in a step: the mean over ranks and steps.
    pub fn mean_secs(&self, cause: BubbleCause) -> f64 {
        self.mean(self.nanos(cause))
    }

    /// Seconds that a rank's compute streams were idle in a step: the mean over ranks and steps.
    pub fn mean_idle_secs(&self) -> f64 {
        self.mean(self.ranks.iter().map(|rank| rank.idle_nanos).sum())
    }

    /// Seconds that a rank's compute streams ran tasks in a step: the mean over ranks and steps.
    pub fn mean_busy_secs(&self) -> f64 {
        self.mean(self.ranks.iter().map(|rank| rank.busy_nanos).sum())
    }

    /// Seconds from begin to end of a step: the mean over steps.
    pub fn step_secs(&self) -> f64 {
        self.total_nanos as f64 * 1e-9 / self.num_steps.max(1) as f64
    }

    /// The rank that was idle for the largest part; of equals the first.
    pub fn worst_rank(&self) -> Option<&RankBubbles> {
        self.ranks.iter().rev().max_by(|a, b| a.idle_fraction().total_cmp(&b.idle_fraction()))
    }

    fn mean(&self, nanos: u64) -> f64 {
        nanos as f64 * 1e-9 / (self.num_steps.max(1) as f64 * self.ranks.len().max(1) as f64)
    }
}

/// No task.
const NONE: u32 = u32::MAX;

/// A stream of the step.
struct Lane<'a> {
    index: usize,
    rank: u32,
    stream: &'a Arc<str>,
    is_compute: bool,
    last: u32,
}

/// A piece of a gap: all of it has one cause.
#[derive(Clone, Copy)]
struct Slice {
    from: u64,
    to: u64,
    cause: BubbleCause,
    /// The task that is to blame, if any.
    task: Option<u32>,
}

/// In `from..to` a gap waits for `task`, which ends at `to` or later; directly, or as one of those before a transfer in its
/// stream's queue.
#[derive(Clone, Copy)]
struct Blame {
    task: u32,
    from: u64,
    to: u64,
    is_queued: bool,
}

/// Where a span stands.
#[derive(Clone, Copy)]
struct Place {
    lane: u32,
    /// The one before on the same stream.
    before: u32,
    /// The latest one before of the same rank that computes.
    compute_before: u32,
}

/// Spans with what they leave out: the order on each stream.
struct Step<'a> {
    spans: &'a [Span],
    lanes: Vec<Lane<'a>>,
    /// For each span.
    places: Vec<Place>,
}

impl<'a> Step<'a> {
    fn new(spans: &'a [Span], is_compute: impl Fn(&str) -> bool) -> Self {
        let mut lanes: Vec<Lane> = Vec::new();
        // By rank: its lanes, and its last task that computes.
        let mut ranks: BTreeMap<u32, (Vec<usize>, u32)> = BTreeMap::new();
        let place = |(task, span): (usize, &'a Span)| {
            let (of_rank, last_compute) = ranks.entry(span.rank).or_insert((Vec::new(), NONE));
            let same = |stream: &Arc<str>| Arc::ptr_eq(stream, &span.stream) || *stream == span.stream;
            let known = of_rank.iter().copied().find(|&lane| same(lanes[lane].stream));
            let index = known.unwrap_or_else(|| {
                let index = lanes.len();
                let (rank, stream, is_compute) = (span.rank, &span.stream, is_compute(&span.stream));
                lanes.push(Lane { index, rank, stream, is_compute, last: NONE });
                of_rank.push(index);
                index
            });
            let lane = &mut lanes[index];
            let (before, compute_before) = (std::mem::replace(&mut lane.last, task as u32), *last_compute);
            if lane.is_compute && span.role == Role::Compute {
                *last_compute = task as u32;
            }
            Place { lane: index as u32, before, compute_before }
        };
        let places = spans.iter().enumerate().map(place).collect();
        Step { spans, lanes, places }
    }

    /// Gives the slices of all gaps of all compute streams, in no order that matters.
    fn cut(&self, (begin, end): (u64, u64), give: &mut impl FnMut(&Lane, Slice)) {
        assert!(begin <= end, "expected a step that ends after it begins, found {begin} to {end}");
        let mut free = vec![begin; self.lanes.len()];
        let mut open = Vec::new();
        let passes = self.passes();
        for ((task, span), place) in self.spans.iter().enumerate().zip(&self.places) {
            let lane = &self.lanes[place.lane as usize];
            if !lane.is_compute {
                continue;
            }
            let free = &mut free[lane.index];
            let (from, to) = (*free, span.start_nanos.min(end));
            if from < to {
                let (first, last) = passes[lane.index].unwrap_or((task, usize::MAX));
                if task <= first && (place.before == NONE || passes[lane.index].is_some()) {
                    give(lane, Slice { from, to, cause: BubbleCause::WarmUp, task: None });
                } else {
                    let mut give = |slice: Slice| {
                        let drains = task > last && slice.cause.is_for_others();
                        let cause = if drains { BubbleCause::CoolDown } else { slice.cause };
                        give(lane, Slice { cause, ..slice });
                    };
                    self.cut_gap(task, (from, to), &mut open, &mut give);
                }
            }
            *free = span.end_nanos.clamp(*free, end);
        }
        for lane in self.lanes.iter().filter(|lane| lane.is_compute && free[lane.index] < end) {
            give(lane, Slice { from: free[lane.index], to: end, cause: BubbleCause::CoolDown, task: None });
        }
    }

    /// First and last task of each stream that is part of a pass.
    fn passes(&self) -> Vec<Option<(usize, usize)>> {
        let mut passes = vec![None; self.lanes.len()];
        for ((task, span), place) in self.spans.iter().enumerate().zip(&self.places) {
            if span.pass.is_some() {
                let (_, last) = passes[place.lane as usize].get_or_insert((task, task));
                *last = task;
            }
        }
        passes
    }

    /// Cuts the gap `from..to` before `next`, latest slice first.
    fn cut_gap(&self, next: usize, (from, to): (u64, u64), open: &mut Vec<Blame>, give_any: &mut impl FnMut(Slice)) {
        let mut give = |from: u64, to: u64, cause, task: Option<u32>| {
            if from < to {
                give_any(Slice { from, to, cause, task });
            }
        };
        let ready = self.end_of(self.spans[next].waited_for, from, to);
        give(ready, to, BubbleCause::Launch, None);
        open.extend(self.spans[next].waited_for.map(|task| Blame { task, from, to: ready, is_queued: false }));
        while let Some(Blame { task, from, to, is_queued }) = open.pop() {
            if from >= to {
                continue;
            }
            let span = &self.spans[task as usize];
            let blamed = Some(task);
            if !is_communication(span) {
                give(from, to, BubbleCause::Dependency, blamed);
                continue;
            }
            let begun = span.start_nanos.clamp(from, to);
            if is_queued {
                give(begun, to, BubbleCause::CommunicationWait, blamed);
            } else {
                let moving = (span.start_nanos + span.wait_nanos).clamp(begun, to);
                give(moving, to, BubbleCause::CommunicationCopy, blamed);
                match span.role {
                    Role::Receive => give(begun, moving, BubbleCause::Dependency, blamed),
                    Role::Send | Role::Compute => give(begun, moving, BubbleCause::CommunicationWait, blamed),
                    Role::Collective => {
                        // Had ranks differed by their loads only, the wait would have ended here.
                        let level = (span.start_nanos + self.imbalance_nanos(task)).clamp(begun, moving);
                        give(level, moving, BubbleCause::Straggler, blamed);
                        give(begun, level, BubbleCause::LoadImbalance, blamed);
                    }
                }
            }
            let before = Some(self.places[task as usize].before).filter(|&before| before != NONE);
            let ready = self.end_of(span.waited_for, from, begun);
            let free = self.end_of(before, from, begun);
            give(ready.max(free), begun, BubbleCause::Launch, blamed);
            // As long as its inputs are not there, the queue does not matter.
            open.extend(span.waited_for.map(|task| Blame { task, from, to: ready, is_queued: false }));
            open.extend(before.map(|task| Blame { task, from: ready, to: free, is_queued: true }));
        }
    }

    /// When `task` ended, within `from..to`.
    fn end_of(&self, task: Option<u32>, from: u64, to: u64) -> u64 {
        task.map_or(from, |task| self.spans[task as usize].end_nanos.clamp(from, to))
    }

    /// How much longer the compute before collective `task` would have taken under the largest load than under this rank's;
    /// at most what it waited. That compute is the latest of the same layer, microbatch and pass.
    fn imbalance_nanos(&self, task: u32) -> u64 {
        let span = &self.spans[task as usize];
        let Some((mine, most)) = span.load.filter(|(mine, most)| mine < most) else { return 0 };
        let mut compute = self.places[task as usize].compute_before;
        while compute != NONE {
            let found = &self.spans[compute as usize];
            if (found.layer, found.microbatch, found.pass) == (span.layer, span.microbatch, span.pass) {
                // Without any load of its own a rank cannot tell how long the others' takes: load explains all of it.
                let own_nanos = u128::from(found.nanos());
                let longer = (own_nanos * u128::from(most - mine)).checked_div(u128::from(mine));
                return longer.and_then(|nanos| u64::try_from(nanos).ok()).unwrap_or(u64::MAX).min(span.wait_nanos);
            }
            compute = self.places[compute as usize].compute_before;
        }
        0
    }
}

#[cfg(test)]
#[path = "bubbles_tests.rs"]
mod tests;
