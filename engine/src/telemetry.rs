//! What a run tells about itself: spans, scalars and histograms, once per step, to whoever listens.
//!
//! Listeners get an `Arc` of one [`Snapshot`] per step through a bounded channel that drops the oldest: a slow editor misses
//! steps and is told how many, and the run never waits for it.

use std::{collections::BTreeMap, sync::Arc};

use bevy_ecs::prelude::*;
use kernels::{comm::ClockOffset, cost::Cost};
use serde::{Deserialize, Serialize};

pub mod bytes;
mod feed;

pub use feed::{Feed, Receiver};

use crate::{
    bubbles::{Accounting, BubbleCause},
    task::{Pass, Role, Task, TaskKind},
};

/// When a task ran, and what it was. Times are nanoseconds of the run's clock.
#[derive(Clone, Debug, PartialEq)]
pub struct Span {
    /// The task's name.
    pub label: Arc<str>,
    /// What it does.
    pub kind: TaskKind,
    /// Pass, if it has one.
    pub pass: Option<Pass>,
    /// Pipeline stage.
    pub stage: u32,
    /// Layer, if it is of one.
    pub layer: Option<u32>,
    /// Microbatch, if it is of one.
    pub microbatch: Option<u32>,
    /// What it asked of the device.
    pub cost: Cost,
    /// Rank of the stream.
    pub rank: u32,
    /// Name of the stream.
    pub stream: Arc<str>,
    /// Start on the stream, after its waits.
    pub start_nanos: u64,
    /// End on the stream.
    pub end_nanos: u64,
    /// Index in the snapshot of the task on another stream that it waited for last.
    pub waited_for: Option<u32>,
    /// Whether it meets other ranks, and how.
    pub role: Role,
    /// Of its time, what it waited for other ranks at its begin, before bytes moved.
    pub wait_nanos: u64,
    /// For a collective that knows it: the load of this rank, and of the most loaded one.
    pub load: Option<(u64, u64)>,
}

impl Span {
    /// The span of `task`, with no stream and no times yet.
    pub(crate) fn of(task: &Task) -> Self {
        Span {
            label: task.label.clone(),
            kind: task.kind,
            pass: task.pass,
            stage: task.stage,
            layer: task.layer,
            microbatch: task.microbatch,
            cost: task.cost,
            rank: 0,
            stream: "".into(),
            start_nanos: 0,
            end_nanos: 0,
            waited_for: None,
            role: Role::of(&task.rendezvous),
            wait_nanos: 0,
            load: None,
        }
    }

    /// Nanoseconds it took.
    pub fn nanos(&self) -> u64 {
        self.end_nanos - self.start_nanos
    }
}

/// The spans of several ranks as those of one snapshot: what each waited for is still the same task.
pub fn join<'a>(ranks: impl IntoIterator<Item = &'a [Span]>) -> Vec<Span> {
    let mut all = Vec::new();
    for spans in ranks {
        let before = all.len() as u32;
        let moved = |span: &Span| Span { waited_for: span.waited_for.map(|task| task + before), ..span.clone() };
        all.extend(spans.iter().map(moved));
    }
    all
}

/// One step as seen from outside.
#[derive(Clone, Debug, Default)]
pub struct Snapshot {
    /// Number of the step, as whoever recorded it counts steps.
    pub step: u64,
    /// When it began and ended; its spans lie in between.
    pub interval_nanos: (u64, u64),
    /// A span per task, in launch order.
    pub spans: Arc<[Span]>,
    /// Values by name, units in the name, in the order they were added.
    pub scalars: Vec<(String, f64)>,
    /// Distributions by name: one value per thing (per layer, per device), not binned.
    pub histograms: Vec<(String, Vec<f64>)>,
}

impl Snapshot {
    /// The scalar called `name`.
    pub fn scalar(&self, name: &str) -> Option<f64> {
        self.scalars.iter().find(|(key, _)| key == name).map(|(_, value)| *value)
    }

    /// The tasks of the step by another clock, without its values.
    #[must_use]
    pub fn tasks_by_clock(&self, offset: ClockOffset) -> Self {
        let (begin, end) = self.interval_nanos;
        let moved = |span: &Span| Span {
            start_nanos: offset.apply(span.start_nanos),
            end_nanos: offset.apply(span.end_nanos),
            ..span.clone()
        };
        Snapshot {
            step: self.step,
            interval_nanos: (offset.apply(begin), offset.apply(end)),
            spans: self.spans.iter().map(moved).collect(),
            ..Snapshot::default()
        }
    }
}

/// Where the time of a step went.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct StepTimes {
    /// From the begin of the step to the end of its last task.
    pub step_secs: f64,
    /// Of that, while no stream of this world ran a task: what the engine costs, as opposed to what it schedules.
    pub overhead_secs: f64,
    /// From the end of the last task of the step before to the begin of this one: records, logs, checkpoints.
    pub between_secs: f64,
    /// Seconds busy by stream (`compute`, or `rank1/compute` where a world holds several ranks), in order of first use.
    pub busy_secs_by_stream: Vec<(String, f64)>,
    /// Seconds busy by kind of task, over all streams.
    pub busy_secs_by_kind: BTreeMap<TaskKind, f64>,
}

impl StepTimes {
    /// Accounts for a step that began and ended at the given times; `between_secs` is the caller's.
    pub fn of(spans: &[Span], begin_nanos: u64, end_nanos: u64) -> Self {
        let secs = |nanos: u64| nanos as f64 * 1e-9;
        let several_ranks = spans.iter().any(|span| span.rank != spans[0].rank);
        let mut streams: Vec<(u32, &Arc<str>, u64)> = Vec::new();
        let mut kinds: BTreeMap<TaskKind, u64> = BTreeMap::new();
        for span in spans {
            match streams.iter_mut().find(|(rank, name, _)| *rank == span.rank && **name == span.stream) {
                Some((.., nanos)) => *nanos += span.nanos(),
                None => streams.push((span.rank, &span.stream, span.nanos())),
            }
            *kinds.entry(span.kind).or_default() += span.nanos();
        }
        let name = |rank, stream: &str| if several_ranks { format!("rank{rank}/{stream}") } else { stream.to_owned() };
        StepTimes {
            step_secs: secs(end_nanos - begin_nanos),
            overhead_secs: secs(end_nanos - begin_nanos - covered_nanos(spans, begin_nanos, end_nanos)),
            between_secs: 0.0,
            busy_secs_by_stream: streams.iter().map(|(rank, s, nanos)| (name(*rank, s), secs(*nanos))).collect(),
            busy_secs_by_kind: kinds.into_iter().map(|(kind, nanos)| (kind, secs(nanos))).collect(),
        }
    }
}

/// Nanoseconds within `[begin, end]` at which at least one span runs.
fn covered_nanos(spans: &[Span], begin: u64, end: u64) -> u64 {
    let clip = |span: &Span| (span.start_nanos.clamp(begin, end), span.end_nanos.clamp(begin, end));
    let mut intervals: Vec<(u64, u64)> = spans.iter().map(clip).collect();
    intervals.sort_unstable();
    let (mut covered, mut reached) = (0, begin);
    for (from, to) in intervals {
        covered += to.saturating_sub(from.max(reached));
        reached = reached.max(to);
    }
    covered
}

/// What listeners are told of the step being recorded.
#[derive(Default)]
enum Told {
    /// All of it.
    #[default]
    Step,
    /// Nothing of it, but this, which belongs to a step that they were told of before.
    Figures(Snapshot),
    /// Nothing.
    Nothing,
}

/// What listeners get of the steps that they are told of.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Detail {
    /// All that this world has.
    #[default]
    Whole,
    /// All, together with what others have, once that was fetched.
    Held,
    /// All but spans.
    Figures,
}

/// The step being recorded, and the listeners.
#[derive(Resource, Default)]
pub struct Telemetry {
    current: Snapshot,
    /// The step's number for listeners, if it is not that of the engine.
    number: Option<u64>,
    told: Told,
    detail: Detail,
    held: Option<Arc<Snapshot>>,
    num_told: u64,
    times: StepTimes,
    bubbles: Accounting,
    last: Option<Arc<Snapshot>>,
    feed: Feed,
    /// Which of the ranks that share the feed this is.
    rank: usize,
}

impl Telemetry {
    /// Listens from the next publication on; at most `capacity` (at least one) snapshots wait.
    pub fn subscribe(&mut self, capacity: usize) -> Receiver {
        self.feed.subscribe(capacity)
    }

    /// Publishes to `feed` from here on, as the rank with this number among those that do.
    pub fn attach(&mut self, feed: Feed, rank: usize) {
        (self.feed, self.rank) = (feed, rank);
    }

    /// Adds a value to the step's snapshot, units in the name; one of the same name is replaced.
    pub fn scalar(&mut self, name: impl Into<String>, value: f64) {
        put(&mut self.current.scalars, name.into(), value);
    }

    /// Adds a distribution to the step's snapshot; one of the same name is replaced.
    pub fn histogram(&mut self, name: impl Into<String>, values: Vec<f64>) {
        put(&mut self.current.histograms, name.into(), values);
    }

    /// Gives the step being recorded a number of its own: listeners, logs and traces count the steps that matter to them, and
    /// the engine may do others in between.
    pub fn number(&mut self, step: u64) {
        self.number = Some(step);
    }

    /// Whether listeners are told of the step being recorded; if nobody says, they are.
    pub fn set_told(&mut self, told: bool) {
        self.told = if told { Told::Step } else { Told::Nothing };
    }

    /// Tells listeners figures that belong to a step that they were told of before, instead of the step being recorded.
    pub fn add_to(&mut self, step: u64, scalars: Vec<(String, f64)>) {
        for (name, value) in &scalars {
            self.scalar(name.clone(), *value);
        }
        self.told = Told::Figures(Snapshot { step, scalars, ..Snapshot::default() });
    }

    /// What listeners get of the steps from here on.
    pub(crate) fn set_detail(&mut self, detail: Detail) {
        self.detail = detail;
    }

    /// The step that listeners are to be told of, when what others have of it was fetched.
    pub(crate) fn held(&self) -> Option<&Snapshot> {
        self.held.as_deref()
    }

    /// The same, which is for the caller to tell.
    pub(crate) fn take_held(&mut self) -> Option<Arc<Snapshot>> {
        self.held.take()
    }

    /// Tells listeners of a step as several ranks had it, the first of them first.
    pub(crate) fn publish_parts(&self, ranks: Vec<Arc<Snapshot>>) {
        self.feed.publish_parts(ranks);
    }

    /// How many steps listeners were told of, or would have been, had there been any.
    pub fn num_told(&self) -> u64 {
        self.num_told
    }

    /// Spans of the step being recorded, in launch order.
    pub fn spans(&self) -> &Arc<[Span]> {
        &self.current.spans
    }

    /// Where the time of the step being recorded went.
    pub fn times(&self) -> &StepTimes {
        &self.times
    }

    /// Why the compute streams of the step being recorded were idle.
    pub fn bubbles(&self) -> &Accounting {
        &self.bubbles
    }

    /// The step recorded last, whether or not listeners were told of it.
    pub fn last(&self) -> Option<&Arc<Snapshot>> {
        self.last.as_ref()
    }

    /// Opens the record of a step with what the engine itself knows.
    pub(crate) fn open(
        &mut self,
        spans: Arc<[Span]>,
        interval_nanos: (u64, u64),
        times: StepTimes,
        bubbles: Accounting,
    ) {
        self.current.spans = spans;
        self.current.interval_nanos = interval_nanos;
        self.scalar("step_secs", times.step_secs);
        self.scalar("overhead_secs", times.overhead_secs);
        self.scalar("between_secs", times.between_secs);
        // Every cause in every step, so that a log has the same columns from its first line to its last.
        if let Some(idle_fraction) = bubbles.idle_fraction() {
            self.scalar("idle_fraction", idle_fraction);
            for cause in BubbleCause::ALL {
                self.scalar(format!("bubble_secs/{cause}"), bubbles.mean_secs(cause));
            }
        }
        self.bubbles = bubbles;
        for (stream, secs) in &times.busy_secs_by_stream {
            self.scalar(format!("busy_secs/stream/{stream}"), *secs);
        }
        for (kind, secs) in &times.busy_secs_by_kind {
            self.scalar(format!("busy_secs/kind/{kind}"), *secs);
        }
        self.times = times;
    }

    /// Closes the record and sends it.
    pub(crate) fn publish(&mut self, step: u64) {
        let mut snapshot = std::mem::take(&mut self.current);
        snapshot.step = self.number.take().unwrap_or(step);
        let snapshot = Arc::new(snapshot);
        self.last = Some(snapshot.clone());
        match std::mem::take(&mut self.told) {
            Told::Step => {
                self.num_told += 1;
                match self.detail {
                    Detail::Whole => self.feed.publish(self.rank, snapshot),
                    Detail::Held => self.held = Some(snapshot),
                    Detail::Figures => {
                        let figures = Snapshot { spans: Arc::default(), ..(*snapshot).clone() };
                        self.feed.publish(self.rank, Arc::new(figures));
                    }
                }
            }
            Told::Figures(figures) => self.feed.publish(self.rank, Arc::new(figures)),
            Told::Nothing => {}
        }
    }
}

impl Drop for Telemetry {
    /// What others have of the last step does not come any more.
    fn drop(&mut self) {
        if let Some(held) = self.held.take() {
            self.feed.publish_parts(vec![held]);
        }
    }
}

fn put<T>(list: &mut Vec<(String, T)>, name: String, value: T) {
    match list.iter_mut().find(|(key, _)| *key == name) {
        Some((_, old)) => *old = value,
        None => list.push((name, value)),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use crossbeam::channel::TryRecvError;

    use super::*;

    /// A span `label` of kind `k` on `rank`'s `stream`.
    pub(crate) fn span(label: &str, rank: u32, stream: &str, start_nanos: u64, end_nanos: u64) -> Span {
        Span {
            label: label.into(),
            kind: TaskKind("k"),
            pass: None,
            stage: 0,
            layer: None,
            microbatch: None,
            cost: Cost::default(),
            rank,
            stream: stream.into(),
            start_nanos,
            end_nanos,
            waited_for: None,
            role: Role::Compute,
            wait_nanos: 0,
            load: None,
        }
    }

    #[test]
    fn a_slow_listener_misses_the_oldest_and_is_told() {
        let mut telemetry = Telemetry::default();
        let slow = telemetry.subscribe(2);
        let gone = telemetry.subscribe(2);
        drop(gone);
        for step in 1..=5 {
            telemetry.scalar("x", step as f64);
            telemetry.scalar("x", step as f64 * 10.0);
            telemetry.publish(step);
        }
        let steps: Vec<u64> = std::iter::from_fn(|| slow.try_recv().ok()).map(|s| s.step).collect();
        assert_eq!((steps, slow.num_dropped()), (vec![4, 5], 3));
        assert_eq!(telemetry.feed.listeners().0, 1, "who hung up is forgotten");
        assert_eq!(telemetry.last().unwrap().scalars, [("x".to_owned(), 50.0)]);
        drop(telemetry);
        assert_eq!(slow.try_recv().unwrap_err(), TryRecvError::Disconnected);
    }

    #[test]
    fn steps_in_between_are_not_told_but_their_figures_are() {
        let mut telemetry = Telemetry::default();
        let listener = telemetry.subscribe(8);
        telemetry.number(7);
        telemetry.scalar("x", 1.0);
        telemetry.publish(20);
        for engine_step in 21..=22 {
            telemetry.set_told(false);
            telemetry.scalar("own", 2.0);
            if engine_step == 22 {
                telemetry.add_to(7, vec![("y".to_owned(), 3.0)]);
            }
            telemetry.publish(engine_step);
            assert_eq!((telemetry.last().unwrap().step, telemetry.num_told()), (engine_step, 1));
        }
        telemetry.publish(23);
        assert_eq!(telemetry.num_told(), 2);
        let told: Vec<_> =
            std::iter::from_fn(|| listener.try_recv().ok()).map(|s| (s.step, s.scalars.clone())).collect();
        let named = |name: &str, value| vec![(name.to_owned(), value)];
        assert_eq!(told, [(7, named("x", 1.0)), (7, named("y", 3.0)), (23, vec![])]);
    }

    #[test]
    fn a_step_accounts_for_its_time() {
        let spans = [
            span("a", 0, "compute", 100, 300),
            span("b", 0, "comm", 250, 400),
            span("c", 0, "compute", 600, 900),
            span("d", 0, "comm", 650, 700),
        ];
        let times = StepTimes::of(&spans, 0, 1000);
        let nanos = |secs: f64| (secs * 1e9).round() as u64;
        assert_eq!((nanos(times.step_secs), nanos(times.overhead_secs)), (1000, 400));
        let by_stream: Vec<_> = times.busy_secs_by_stream.iter().map(|(s, t)| (s.as_str(), nanos(*t))).collect();
        assert_eq!(by_stream, [("compute", 500), ("comm", 200)]);
        assert_eq!(nanos(times.busy_secs_by_kind[&TaskKind("k")]), 700);
    }

    #[test]
    fn streams_of_several_ranks_are_kept_apart() {
        let spans = [span("a", 0, "compute", 0, 10), span("b", 1, "compute", 0, 20)];
        let names: Vec<String> = StepTimes::of(&spans, 0, 20).busy_secs_by_stream.into_iter().map(|(s, _)| s).collect();
        assert_eq!(names, ["rank0/compute", "rank1/compute"]);
    }

    #[test]
    fn a_step_without_tasks_is_all_overhead() {
        let times = StepTimes::of(&[], 5, 10);
        assert_eq!((times.step_secs, times.overhead_secs), (5e-9, 5e-9));
    }
}
