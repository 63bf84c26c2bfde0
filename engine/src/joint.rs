//! The graphs of many ranks run together under computed durations, where tasks of one rank meet those of others.
//!
//! Times follow from waits alone: a task starts when its stream is free, what it waits for has ended and the host has
//! launched it. So streams can be advanced in any order, each as far as it gets, and every task is looked at about once;
//! no queue of events is needed. A stream that cannot go on is left with the one thing that it waits for, and if no
//! stream can go on, following those things leads round the deadlock.

mod meetings;

use std::{collections::BTreeSet, sync::Arc};

use kernels::stream::Rendezvous;

use crate::{
    error::{Error, Result},
    graph::Graph,
};
use meetings::{Meeting, Meetings, Part};

/// The tasks of one rank in launch order, in columns.
#[derive(Clone, Debug, Default)]
pub struct RankTasks {
    /// The rank; rendezvous name it.
    pub rank: u32,
    /// Nanoseconds that the host takes to launch a task. It launches them in order and never waits: task `i` cannot start
    /// before `(i + 1) * host_nanos`.
    pub host_nanos: u64,
    durations_nanos: Vec<u64>,
    streams: Vec<u32>,
    /// End of each task's part of `deps`.
    deps_end: Vec<u32>,
    deps: Vec<u32>,
    labels: Vec<Arc<str>>,
    /// By task, ascending.
    rendezvous: Vec<(u32, Rendezvous)>,
    /// By task, ascending.
    extra_wait_nanos: Vec<(u32, u64)>,
}

impl RankTasks {
    /// No tasks yet.
    pub fn new(rank: u32) -> Self {
        RankTasks { rank, ..Self::default() }
    }

    /// The tasks of `graph`, which take `durations_nanos` each.
    ///
    /// # Panics
    /// If there is not one duration per task.
    pub fn of(rank: u32, graph: &Graph, durations_nanos: &[u64]) -> Self {
        assert_eq!(durations_nanos.len(), graph.order.len(), "one duration per task");
        let mut tasks = RankTasks::new(rank);
        for (i, &nanos) in durations_nanos.iter().enumerate() {
            tasks.push(graph.stream_of[i], &graph.deps[i], nanos, graph.spans[i].label.clone());
        }
        tasks.rendezvous.clone_from(&graph.rendezvous);
        tasks
    }

    /// Adds a task on `stream` that waits for the tasks `deps` of this rank; returns its index.
    pub fn push(&mut self, stream: u32, deps: &[u32], duration_nanos: u64, label: impl Into<Arc<str>>) -> u32 {
        self.streams.push(stream);
        self.deps.extend_from_slice(deps);
        self.deps_end.push(self.deps.len() as u32);
        self.durations_nanos.push(duration_nanos);
        self.labels.push(label.into());
        self.len() as u32 - 1
    }

    /// The task added last meets another rank. It may do so several times: it then waits for all at once.
    ///
    /// # Panics
    /// If there is no task.
    pub fn meet(&mut self, rendezvous: Rendezvous) {
        let task = self.len().checked_sub(1);
        self.rendezvous.push((task.expect("a task to meet with") as u32, rendezvous));
    }

    /// Task `task` waits for so much longer than the simulation knows, as for ranks that are not simulated and have more to
    /// do. To be called for ascending tasks.
    ///
    /// # Panics
    /// If it comes before one that waits already.
    pub fn wait_longer(&mut self, task: u32, nanos: u64) {
        assert!(
            self.extra_wait_nanos.last().is_none_or(|(last, _)| *last < task),
            "waits are added by ascending tasks"
        );
        self.extra_wait_nanos.push((task, nanos));
    }

    /// Number of tasks.
    pub fn len(&self) -> usize {
        self.durations_nanos.len()
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.durations_nanos.is_empty()
    }

    /// Names of the tasks, for errors.
    pub fn labels(&self) -> &[Arc<str>] {
        &self.labels
    }

    fn deps_of(&self, task: usize) -> &[u32] {
        let begin = task.checked_sub(1).map_or(0, |before| self.deps_end[before]);
        &self.deps[begin as usize..self.deps_end[task] as usize]
    }
}

/// When a task ran. `end - start` is its duration and its wait.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TaskTime {
    /// When it has its stream and all that it waits for on its own rank.
    pub start_nanos: u64,
    /// When it is done.
    pub end_nanos: u64,
    /// How long of that it waited for other ranks.
    pub wait_nanos: u64,
}

/// `end_nanos` of a task that has not ended.
const RUNNING: u64 = u64::MAX;
/// No task, stream or meeting.
const NONE: u32 = u32::MAX;

/// Times of all tasks of `ranks`, in their order.
///
/// - A send is on its way when its task has worked for its duration. It waits for nobody.
/// - A receive ends when its own duration is over and the send has been worked for; the rest is its wait. The n-th receive
///   from a rank with a tag meets that rank's n-th send with it.
/// - A collective is begun by all of its group that are simulated when the last of them starts its task; each ends by its
///   own duration. Members that are not simulated are taken to be like those that are.
/// - Sends to and receives from ranks that are not simulated are never waited for.
///
/// # Errors
/// [`Error::Deadlock`] with the labels of tasks that wait for each other, [`Error::Unmatched`] if a simulated rank never
/// does what another waits for, [`Error::Ranks`] if a rank is given twice or tasks wait for one that is not there.
pub fn simulate_ranks(ranks: &[RankTasks]) -> Result<Vec<Vec<TaskTime>>> {
    check(ranks)?;
    let meetings = Meetings::of(ranks)?;
    let mut simulation = Simulation::new(ranks, meetings);
    simulation.run();
    match simulation.lanes.iter().position(|lane| lane.next != NONE) {
        Some(stuck) => Err(simulation.deadlock(stuck)),
        None => Ok(simulation.times),
    }
}

fn check(ranks: &[RankTasks]) -> Result<()> {
    let mut known = BTreeSet::new();
    for tasks in ranks {
        if !known.insert(tasks.rank) {
            return Err(Error::Ranks(format!("rank {} is given twice; each rank has one list of tasks", tasks.rank)));
        }
        let num_tasks = tasks.len();
        if let Some(dep) = tasks.deps.iter().find(|&&dep| dep as usize >= num_tasks) {
            let message = format!("rank {}: a task waits for task {dep}, but there are {num_tasks}", tasks.rank);
            return Err(Error::Ranks(message));
        }
    }
    Ok(())
}

/// A stream of a rank.
struct Lane {
    rank: u32,
    /// Task that is next; `NONE` at the end.
    next: u32,
    /// Whether that task's start is known, and it now waits for others.
    started: bool,
    free_nanos: u64,
    waits_for: WaitsFor,
    /// Next in the list of lanes that wait for the same.
    next_waiting: u32,
}

#[derive(Clone, Copy)]
enum WaitsFor {
    Nothing,
    /// A task of the same rank.
    Task(u32),
    Meeting(u32),
}

struct Simulation<'a> {
    ranks: &'a [RankTasks],
    meetings: Meetings,
    lanes: Vec<Lane>,
    /// Index of the lane of each rank's streams.
    lane_of: Vec<Vec<u32>>,
    /// For each task the one after it on its stream.
    after: Vec<Vec<u32>>,
    /// For each task the first lane that waits for its end.
    waiting: Vec<Vec<u32>>,
    times: Vec<Vec<TaskTime>>,
    ready: Vec<u32>,
}

impl<'a> Simulation<'a> {
    fn new(ranks: &'a [RankTasks], meetings: Meetings) -> Self {
        let (mut lanes, mut lane_of, mut after) = (Vec::new(), Vec::new(), Vec::new());
        for (rank, tasks) in ranks.iter().enumerate() {
            let num_streams = tasks.streams.iter().max().map_or(0, |&last| last as usize + 1);
            let mut next = vec![NONE; num_streams];
            let mut after_each = vec![NONE; tasks.len()];
            for (task, &stream) in tasks.streams.iter().enumerate().rev() {
                after_each[task] = std::mem::replace(&mut next[stream as usize], task as u32);
            }
            let first = lanes.len() as u32;
            lane_of.push((first..first + num_streams as u32).collect());
            after.push(after_each);
            lanes.extend(next.into_iter().map(|next| Lane {
                rank: rank as u32,
                next,
                started: false,
                free_nanos: 0,
                waits_for: WaitsFor::Nothing,
                next_waiting: NONE,
            }));
        }
        let pending = TaskTime { end_nanos: RUNNING, ..TaskTime::default() };
        Simulation {
            ranks,
            meetings,
            ready: (0..lanes.len() as u32).rev().collect(),
            lanes,
            lane_of,
            after,
            waiting: ranks.iter().map(|tasks| vec![NONE; tasks.len()]).collect(),
            times: ranks.iter().map(|tasks| vec![pending; tasks.len()]).collect(),
        }
    }

    fn run(&mut self) {
        while let Some(lane) = self.ready.pop() {
            while self.advance(lane) {}
        }
    }

    /// Runs the next task of a lane; false if there is none, or it has to wait.
    fn advance(&mut self, lane: u32) -> bool {
        let Lane { rank, next: task, started, free_nanos, .. } = self.lanes[lane as usize];
        if task == NONE {
            return false;
        }
        let (rank, i) = (rank as usize, task as usize);
        let tasks = &self.ranks[rank];
        if !started {
            let mut start_nanos = free_nanos.max((i as u64 + 1) * tasks.host_nanos);
            for &dep in tasks.deps_of(i) {
                let end = self.times[rank][dep as usize].end_nanos;
                if end == RUNNING {
                    self.wait(lane, WaitsFor::Task(dep));
                    return false;
                }
                start_nanos = start_nanos.max(end);
            }
            self.times[rank][i].start_nanos = start_nanos;
            self.lanes[lane as usize].started = true;
        }
        let parts = self.meetings.parts_of(rank, task);
        if !started {
            self.arrive(rank, i, parts.clone());
        }
        let Some(end_nanos) = self.end(lane, rank, i, parts) else { return false };
        let time = &mut self.times[rank][i];
        time.end_nanos = end_nanos;
        time.wait_nanos = end_nanos - time.start_nanos - tasks.durations_nanos[i];
        let next = self.after[rank][i];
        let lane = &mut self.lanes[lane as usize];
        (lane.next, lane.started, lane.free_nanos) = (next, false, end_nanos);
        let first = std::mem::replace(&mut self.waiting[rank][i], NONE);
        self.wake(first);
        true
    }

    /// Tells the collectives of a task that it is there.
    fn arrive(&mut self, rank: usize, task: usize, parts: std::ops::Range<usize>) {
        let start_nanos = self.times[rank][task].start_nanos;
        for part in parts {
            let Part { meeting, is_collective, .. } = self.meetings.parts[part];
            if is_collective {
                let Meeting { missing, nanos, .. } = &mut self.meetings.all[meeting as usize];
                *missing -= 1;
                *nanos = (*nanos).max(start_nanos);
                if *missing == 0 {
                    let first = std::mem::replace(&mut self.meetings.all[meeting as usize].waiting, NONE);
                    self.wake(first);
                }
            }
        }
    }

    /// When a task that has started ends; none if it has to wait. First come its collectives, then it works, then its sends
    /// are on their way, then it needs what it receives: two tasks that send to and receive from each other are no cycle.
    fn end(&mut self, lane: u32, rank: usize, task: usize, parts: std::ops::Range<usize>) -> Option<u64> {
        let tasks = &self.ranks[rank];
        let mut begin_nanos = self.times[rank][task].start_nanos;
        for part in parts.clone() {
            let Part { meeting, is_collective, .. } = self.meetings.parts[part];
            if is_collective {
                begin_nanos = begin_nanos.max(self.resolved(lane, meeting)?);
            }
        }
        let extra = tasks.extra_wait_nanos.binary_search_by_key(&(task as u32), |(task, _)| *task);
        let extra_nanos = extra.map_or(0, |found| tasks.extra_wait_nanos[found].1);
        let worked_nanos = begin_nanos + extra_nanos + tasks.durations_nanos[task];
        for part in parts.clone() {
            let Part { meeting, is_send, .. } = self.meetings.parts[part];
            let Meeting { missing, nanos, waiting } = &mut self.meetings.all[meeting as usize];
            if is_send && *missing > 0 {
                (*missing, *nanos) = (0, worked_nanos);
                let first = std::mem::replace(waiting, NONE);
                self.wake(first);
            }
        }
        let mut end_nanos = worked_nanos;
        for part in parts {
            let Part { meeting, is_collective, is_send } = self.meetings.parts[part];
            if !is_collective && !is_send {
                end_nanos = end_nanos.max(self.resolved(lane, meeting)?);
            }
        }
        Some(end_nanos)
    }

    /// When all are at a meeting, or none and `lane` waits for it.
    fn resolved(&mut self, lane: u32, meeting: u32) -> Option<u64> {
        let Meeting { missing, nanos, .. } = self.meetings.all[meeting as usize];
        if missing > 0 {
            self.wait(lane, WaitsFor::Meeting(meeting));
            return None;
        }
        Some(nanos)
    }

    fn wait(&mut self, lane: u32, what: WaitsFor) {
        let rank = self.lanes[lane as usize].rank as usize;
        let list = match what {
            WaitsFor::Nothing => return,
            WaitsFor::Task(task) => &mut self.waiting[rank][task as usize],
            WaitsFor::Meeting(meeting) => &mut self.meetings.all[meeting as usize].waiting,
        };
        let next_waiting = std::mem::replace(list, lane);
        let lane = &mut self.lanes[lane as usize];
        (lane.waits_for, lane.next_waiting) = (what, next_waiting);
    }

    fn wake(&mut self, first: u32) {
        let mut lane = first;
        while lane != NONE {
            self.ready.push(lane);
            let woken = &mut self.lanes[lane as usize];
            woken.waits_for = WaitsFor::Nothing;
            lane = std::mem::replace(&mut woken.next_waiting, NONE);
        }
    }

    fn label(&self, rank: u32, task: u32) -> Arc<str> {
        let tasks = &self.ranks[rank as usize];
        format!("rank {}: {}", tasks.rank, tasks.labels[task as usize]).into()
    }

    /// Follows what stuck lanes wait for until one comes again.
    fn deadlock(&self, stuck: usize) -> Error {
        let mut path: Vec<(u32, u32)> = Vec::new();
        let mut lane = stuck as u32;
        loop {
            let Lane { rank, next: task, waits_for, .. } = self.lanes[lane as usize];
            let seen = path.iter().position(|&seen| seen == (rank, task));
            path.push((rank, task));
            if let Some(first) = seen {
                let cycle = path[first..].iter().map(|&(rank, task)| self.label(rank, task)).collect();
                return Error::Deadlock { cycle };
            }
            let (rank, awaited) = match waits_for {
                WaitsFor::Task(dep) => (rank, dep),
                WaitsFor::Meeting(meeting) => self.absent(meeting),
                WaitsFor::Nothing => (rank, task),
            };
            lane = self.lane(rank, awaited);
            // What is waited for may stand behind the task that its own stream is stuck at.
            if self.lanes[lane as usize].next != awaited {
                path.push((rank, awaited));
            }
        }
    }

    fn lane(&self, rank: u32, task: u32) -> u32 {
        let rank = rank as usize;
        self.lane_of[rank][self.ranks[rank].streams[task as usize] as usize]
    }

    /// A task that a meeting still waits for.
    fn absent(&self, meeting: u32) -> (u32, u32) {
        let members = self.meetings.members(meeting);
        let absent = members.iter().copied().find(|&(rank, task)| {
            let lane = &self.lanes[self.lane(rank, task) as usize];
            lane.next != task || !lane.started
        });
        // All have started: it is a send whose own task waits for a collective.
        absent.unwrap_or(members[0])
    }
}

#[cfg(test)]
#[path = "joint_tests.rs"]
mod tests;
