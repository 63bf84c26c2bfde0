//! What a rank is in, so that a run that stands still says who keeps it waiting, and not only that it waits.
//!
//! Ops between ranks enter and leave here, the host says which task it launches and which phase it is in, and a counter goes up with
//! each. That costs some 100 ns an op. What is under way is told to the first rank, which compares; the last ops are kept in a ring, for
//! a trace of how it came about. [`Fault`]s strike here too: where the host or an op enters.

mod fault;
mod judge;

use std::{
    collections::{BTreeMap, VecDeque},
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

pub use fault::{Fault, How};
pub(super) use judge::{Deadline, Seen, judge};

use crate::{clock, stream::Rendezvous};

/// When a rank counts as lost.
#[derive(Clone, Debug, PartialEq)]
pub struct Limits {
    /// Seconds that a process may be silent; its watchdog speaks eight times as often. Also the least that ranks wait for each other.
    pub min_secs: f64,
    /// Seconds that a rank may be waited for before the first step is done.
    pub first_step_secs: f64,
    /// After it: so many times the slowest of the last steps.
    pub steps: f64,
    /// Where the last ops of this rank are written when a rank is lost, as a Chrome trace.
    pub dump: Option<PathBuf>,
}

impl Default for Limits {
    fn default() -> Self {
        Limits { min_secs: 30.0, first_step_secs: 600.0, steps: 10.0, dump: None }
    }
}

/// Steps whose times a deadline follows.
const NUM_TIMED_STEPS: usize = 16;
/// Ops in the ring.
const NUM_KEPT_OPS: usize = 1024;
/// Waits in a report, the oldest; a rank has a few streams.
const NUM_REPORTED_WAITS: usize = 4;

/// One rank's record; its streams and its host share it.
#[derive(Default)]
pub struct Watch {
    rank: u32,
    num_done: AtomicU64,
    has_faults: AtomicBool,
    is_cut: AtomicBool,
    asks_to_halt: AtomicBool,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    step: u64,
    step_began_nanos: Option<u64>,
    step_nanos: VecDeque<u64>,
    doing: &'static str,
    under_way: Vec<Op>,
    ring: VecDeque<Op>,
    numbers: BTreeMap<(u32, Arc<[u32]>), u64>,
    num_ops: u64,
    faults: Vec<Fault>,
}

/// An op between ranks.
#[derive(Clone, Debug)]
struct Op {
    id: u64,
    name: &'static str,
    step: u64,
    lane: u32,
    on: Rendezvous,
    /// Which of its group's it is, on its lane; 0 for messages.
    number: u64,
    began_nanos: u64,
    ended_nanos: Option<u64>,
}

/// What a rank tells of itself.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Report {
    /// Goes up with all it does.
    pub num_done: u64,
    pub step: u64,
    /// What its host is in.
    pub doing: String,
    pub waits: Vec<Wait>,
    /// It, or one that it heard of, cannot wait for the end of the step.
    pub asks_to_halt: bool,
    /// The last one: it is done.
    pub is_last: bool,
}

/// An op that waits for others, or may.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub(super) struct Wait {
    pub op: String,
    pub tag: u64,
    pub lane: u32,
    pub number: u64,
    /// Those who have to come: all of a group, or the sender of a message.
    pub of: Vec<u32>,
    pub is_message: bool,
    pub age_nanos: u64,
}

impl Watch {
    pub(super) fn new(rank: u32) -> Self {
        Watch { rank, ..Watch::default() }
    }

    /// An op begins; it ends when what is returned goes. A fault that is meant for it strikes.
    pub(super) fn enter(&self, name: &'static str, lane: u32, on: Rendezvous) -> Entered<'_> {
        self.strike(name);
        let mut state = self.state.lock();
        let number = match &on {
            Rendezvous::Collective { group, .. } => {
                let number = state.numbers.entry((lane, group.clone())).or_default();
                *number += 1;
                *number
            }
            _ => 0,
        };
        state.num_ops += 1;
        let (id, step) = (state.num_ops, state.step);
        state.under_way.push(Op {
            id,
            name,
            step,
            lane,
            on,
            number,
            began_nanos: clock::now_nanos(),
            ended_nanos: None,
        });
        drop(state);
        self.touch();
        Entered { watch: self, id }
    }

    /// The host gets on with a kind of task.
    pub fn enter_host(&self, name: &'static str) {
        self.strike(name);
        self.state.lock().doing = name;
        self.touch();
    }

    /// The host, or a thread of its own, begins a phase that belongs to a step which may be over.
    pub fn enter_phase(&self, name: &'static str, step: u64) {
        self.strike_at(name, step);
        self.state.lock().doing = name;
        self.touch();
    }

    /// Something was done.
    pub fn touch(&self) {
        self.num_done.fetch_add(1, Ordering::Relaxed);
    }

    /// Training begins this step; deadlines follow the time of those before.
    pub fn begin_step(&self, step: u64) {
        let now = clock::now_nanos();
        let mut state = self.state.lock();
        if let Some(began) = state.step_began_nanos.replace(now) {
            state.step_nanos.push_back(now - began);
            if state.step_nanos.len() > NUM_TIMED_STEPS {
                state.step_nanos.pop_front();
            }
        }
        state.step = step;
    }

    /// Seconds that a rank may be waited for, and why so many.
    pub(super) fn deadline(&self, limits: &Limits) -> (f64, String) {
        let slowest = self.state.lock().step_nanos.iter().max().copied();
        match slowest.map(|nanos| nanos as f64 * 1e-9) {
            None => (limits.first_step_secs, "watchdog.first_step_secs, no step is done yet".into()),
            Some(secs) if secs * limits.steps > limits.min_secs => {
                (secs * limits.steps, format!("{} times the slowest of the last steps, {secs:.1} s", limits.steps))
            }
            Some(_) => (limits.min_secs, "watchdog.min_secs".into()),
        }
    }

    pub(super) fn report(&self) -> Report {
        let state = self.state.lock();
        let now = clock::now_nanos();
        let wait = |op: &Op| {
            let (of, tag, is_message) = match &op.on {
                Rendezvous::Send { to, tag } => (vec![*to], *tag, true),
                Rendezvous::Receive { from, tag } => (vec![*from], *tag, true),
                Rendezvous::Collective { group, tag } => (group.to_vec(), *tag, false),
            };
            let age_nanos = now - op.began_nanos;
            Wait { op: op.name.into(), tag, lane: op.lane, number: op.number, of, is_message, age_nanos }
        };
        Report {
            num_done: self.num_done.load(Ordering::Relaxed),
            step: state.step,
            doing: state.doing.into(),
            waits: state.under_way.iter().take(NUM_REPORTED_WAITS).map(wait).collect(),
            asks_to_halt: self.asks_to_halt(),
            is_last: false,
        }
    }

    /// The last ops, those under way with them, as a Chrome trace: a process a rank, a thread a lane.
    pub(super) fn trace(&self) -> String {
        let state = self.state.lock();
        let now = clock::now_nanos();
        let event = |op: &Op| {
            let with: &dyn std::fmt::Debug = match &op.on {
                Rendezvous::Send { to, .. } => to,
                Rendezvous::Receive { from, .. } => from,
                Rendezvous::Collective { group, .. } => group,
            };
            let micros = |nanos: u64| nanos as f64 * 1e-3;
            serde_json::json!({
                "name": op.name,
                "ph": "X",
                "pid": self.rank,
                "tid": op.lane,
                "ts": micros(op.began_nanos),
                "dur": micros(op.ended_nanos.unwrap_or(now).saturating_sub(op.began_nanos)),
                "args": {
                    "step": op.step,
                    "number": op.number,
                    "with": format!("{with:?}"),
                    "under_way": op.ended_nanos.is_none(),
                },
            })
        };
        let events: Vec<_> = state.ring.iter().chain(&state.under_way).map(event).collect();
        serde_json::json!({ "displayTimeUnit": "ms", "traceEvents": events }).to_string()
    }

    /// The step at hand is to be given up, if all agree: the ranks of other processes hear of it within seconds.
    pub fn ask_to_halt(&self) {
        self.asks_to_halt.store(true, Ordering::Relaxed);
    }

    /// Whether this rank asked, or heard that another did.
    pub fn asks_to_halt(&self) -> bool {
        self.asks_to_halt.load(Ordering::Relaxed)
    }

    /// Whether this rank's link is cut, by a fault.
    pub(super) fn is_cut(&self) -> bool {
        self.is_cut.load(Ordering::Relaxed)
    }

    /// Faults that are to strike this rank, those of others left out.
    pub fn expect_faults(&self, faults: &[Fault]) {
        let mine: Vec<Fault> = faults.iter().filter(|fault| fault.rank == self.rank).cloned().collect();
        self.has_faults.store(!mine.is_empty(), Ordering::Relaxed);
        self.state.lock().faults = mine;
    }

    /// Faults that found no place to strike.
    pub fn faults_left(&self) -> Vec<Fault> {
        self.state.lock().faults.clone()
    }

    /// The fault that is meant for this place, if there is one.
    pub(super) fn strike(&self, name: &str) {
        if self.has_faults.load(Ordering::Relaxed) {
            let step = self.state.lock().step;
            self.strike_at(name, step);
        }
    }

    fn strike_at(&self, name: &str, step: u64) {
        if !self.has_faults.load(Ordering::Relaxed) {
            return;
        }
        let mut state = self.state.lock();
        let due = state.faults.iter().position(|fault| fault.step == step && fault.at == name);
        let fault = due.map(|due| state.faults.remove(due));
        drop(state);
        if let Some(fault) = fault {
            match fault.how {
                How::Cut => self.is_cut.store(true, Ordering::Relaxed),
                how => how.strike(&fault),
            }
        }
    }
}

/// An op that is under way; it ends with this.
pub(super) struct Entered<'a> {
    watch: &'a Watch,
    id: u64,
}

impl Drop for Entered<'_> {
    fn drop(&mut self) {
        let mut state = self.watch.state.lock();
        if let Some(at) = state.under_way.iter().position(|op| op.id == self.id) {
            let op = state.under_way.remove(at);
            state.ring.push_back(Op { ended_nanos: Some(clock::now_nanos()), ..op });
            if state.ring.len() > NUM_KEPT_OPS {
                state.ring.pop_front();
            }
        }
        drop(state);
        self.watch.touch();
    }
}
