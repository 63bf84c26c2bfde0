//! The hub that ranks of one process meet at.
//!
//! Messages lie in a queue per pair of ranks. Collectives meet in a room per group and lane: all members put down what they
//! bring, wait until all have, and take what the others brought; nothing is copied on the way. A member may be one meeting
//! ahead of the others, so a room has a short queue of meetings, and each member knows which is its next.
//!
//! Whoever waits sleeps on the condition variable of the pair or room. An abort sets the error first and then wakes each of
//! them under its lock, so no wait can miss it; so does a halt.

use std::{
    any::Any,
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

use parking_lot::{Condvar, Mutex};

use super::HOST_LANE;
use crate::{
    clock,
    dtype::Storage,
    error::{Error, Result},
};

/// Messages of a pair that are sent and not received, before a send waits. A pipeline has two per stage in flight.
pub(super) const MAX_MESSAGES: usize = 1024;

/// What a member of a group says it is doing; all must say the same.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Call {
    pub op: &'static str,
    pub tag: u64,
    /// Types and sizes.
    pub what: String,
}

impl std::fmt::Display for Call {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{} with tag {}", self.op, self.tag)?;
        if self.what.is_empty() { Ok(()) } else { write!(f, " of {}", self.what) }
    }
}

pub(super) struct Hub {
    num_ranks: usize,
    /// By sender, then receiver.
    pairs: Vec<Pair>,
    rooms: Mutex<Rooms>,
    lost: Mutex<Option<Error>>,
    /// By rank, whether its streams wait for nobody any more.
    halted: Vec<AtomicBool>,
    /// Members see of each other only what they pack, as processes do.
    #[cfg(test)]
    pub packs: bool,
}

/// By lane and group.
type Rooms = BTreeMap<(u32, Arc<[u32]>), Arc<Room>>;

#[derive(Default)]
struct Pair {
    messages: Mutex<VecDeque<(u64, Storage)>>,
    changed: Condvar,
}

struct Room {
    state: Mutex<RoomState>,
    changed: Condvar,
}

struct RoomState {
    /// Number of the first meeting in the queue.
    first: u64,
    meetings: VecDeque<Meeting>,
    /// Number of each member's next meeting.
    next: Vec<u64>,
}

struct Meeting {
    call: Call,
    /// Rank that came first and said what it is about.
    opened_by: u32,
    brought: Vec<Option<Arc<dyn Any + Send + Sync>>>,
    num_left: usize,
}

impl Hub {
    pub fn new(num_ranks: u32) -> Self {
        let num_ranks = num_ranks as usize;
        Hub {
            num_ranks,
            pairs: (0..num_ranks * num_ranks).map(|_| Pair::default()).collect(),
            rooms: Mutex::default(),
            lost: Mutex::default(),
            halted: (0..num_ranks).map(|_| AtomicBool::new(false)).collect(),
            #[cfg(test)]
            packs: false,
        }
    }

    fn pair(&self, (from, to): (u32, u32)) -> &Pair {
        &self.pairs[from as usize * self.num_ranks + to as usize]
    }

    /// Queues a message; returns the nanoseconds that the queue was full.
    pub fn send(&self, between: (u32, u32), tag: u64, data: Storage) -> Result<u64> {
        let pair = self.pair(between);
        let mut messages = pair.messages.lock();
        let mut waiting = Wait::default();
        loop {
            self.check(between.0)?;
            if messages.len() < MAX_MESSAGES {
                messages.push_back((tag, data));
                pair.changed.notify_all();
                return Ok(waiting.nanos());
            }
            waiting.begin();
            pair.changed.wait(&mut messages);
        }
    }

    /// The oldest message with this tag, when it is there, and the nanoseconds until then.
    pub fn receive(&self, between: (u32, u32), tag: u64) -> Result<(Storage, u64)> {
        let pair = self.pair(between);
        let mut messages = pair.messages.lock();
        let mut waiting = Wait::default();
        loop {
            self.check(between.1)?;
            let at = messages.iter().position(|(t, _)| *t == tag);
            if let Some((_, data)) = at.and_then(|at| messages.remove(at)) {
                pair.changed.notify_all();
                return Ok((data, waiting.nanos()));
            }
            waiting.begin();
            pair.changed.wait(&mut messages);
        }
    }

    /// Brings `mine` as member `me` of `group` to its next meeting on this lane; what all brought, by member, when all are there, and
    /// the nanoseconds until then.
    pub fn meet<T: Any + Send + Sync>(
        &self,
        (lane, group): (u32, &Arc<[u32]>),
        me: usize,
        call: Call,
        mine: T,
    ) -> Result<(Vec<Arc<T>>, u64)> {
        let room = self.rooms.lock().entry((lane, group.clone())).or_insert_with(|| Room::new(group.len())).clone();
        let mut state = room.state.lock();
        let check = || if lane == HOST_LANE { self.check_lost() } else { self.check(group[me]) };
        check()?;
        let number = state.next[me];
        state.next[me] += 1;
        state.bring(number, group, me, call, Arc::new(mine))?;
        room.changed.notify_all();
        let mut waiting = Wait::default();
        let brought = loop {
            check()?;
            if let Some(brought) = state.take(number) {
                break brought;
            }
            waiting.begin();
            room.changed.wait(&mut state);
        };
        drop(state);
        let typed = brought.into_iter().map(|value| value.downcast::<T>()).collect::<std::result::Result<Vec<_>, _>>();
        let typed = typed.map_err(|_| Error::Comm { op: "meet", message: "members brought different types".into() })?;
        Ok((typed, waiting.nanos()))
    }

    pub fn abort(&self, rank: u32, message: &str) {
        self.lost.lock().get_or_insert_with(|| Error::PeerLost { rank, message: message.to_owned() });
        self.wake();
    }

    /// The ops of a rank's streams that wait, or will, end.
    pub fn halt(&self, rank: u32) {
        self.halted[rank as usize].store(true, Ordering::Release);
        self.wake();
    }

    fn wake(&self) {
        for pair in &self.pairs {
            drop(pair.messages.lock());
            pair.changed.notify_all();
        }
        let rooms: Vec<Arc<Room>> = self.rooms.lock().values().cloned().collect();
        for room in rooms {
            drop(room.state.lock());
            room.changed.notify_all();
        }
    }

    pub fn lost(&self) -> Option<Error> {
        self.lost.lock().clone()
    }

    fn check_lost(&self) -> Result<()> {
        self.lost().map_or(Ok(()), Err)
    }

    /// For what a stream of `rank` waits for.
    fn check(&self, rank: u32) -> Result<()> {
        self.check_lost()?;
        if self.halted[rank as usize].load(Ordering::Acquire) { Err(Error::Halted) } else { Ok(()) }
    }
}

impl Room {
    fn new(num_members: usize) -> Arc<Self> {
        let state = RoomState { first: 0, meetings: VecDeque::new(), next: vec![0; num_members] };
        Arc::new(Room { state: Mutex::new(state), changed: Condvar::new() })
    }
}

impl RoomState {
    fn bring(
        &mut self,
        number: u64,
        group: &[u32],
        me: usize,
        call: Call,
        mine: Arc<dyn Any + Send + Sync>,
    ) -> Result<()> {
        let at = (number - self.first) as usize;
        if at == self.meetings.len() {
            let brought = vec![None; group.len()];
            self.meetings.push_back(Meeting { call: call.clone(), opened_by: group[me], brought, num_left: 0 });
        }
        let meeting = &mut self.meetings[at];
        if meeting.call != call {
            let message = format!(
                "rank {} calls {call}, where rank {} calls {}, as meeting {number} of the group {group:?}; all members of a \
                 group call the same collectives in the same order",
                group[me], meeting.opened_by, meeting.call
            );
            return Err(Error::Comm { op: call.op, message });
        }
        meeting.brought[me] = Some(mine);
        Ok(())
    }

    /// What all brought to this meeting, if all did; each member takes it once.
    fn take(&mut self, number: u64) -> Option<Vec<Arc<dyn Any + Send + Sync>>> {
        let meeting = &mut self.meetings[(number - self.first) as usize];
        let brought: Vec<_> = meeting.brought.iter().cloned().collect::<Option<_>>()?;
        meeting.num_left += 1;
        while self.meetings.front().is_some_and(|m| m.num_left == m.brought.len()) {
            self.meetings.pop_front();
            self.first += 1;
        }
        Some(brought)
    }
}

/// Measures a wait, if there is one.
#[derive(Default)]
struct Wait(Option<u64>);

impl Wait {
    fn begin(&mut self) {
        self.0.get_or_insert_with(clock::now_nanos);
    }

    fn nanos(&self) -> u64 {
        self.0.map_or(0, |began| clock::now_nanos() - began)
    }
}
