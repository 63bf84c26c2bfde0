//! Moments in streams, and what was waited for until then.

use std::{sync::Arc, time::Duration};

use parking_lot::{Condvar, Mutex};

use super::hazards::VectorClock;
use crate::{clock, cuda::Mark, error::Error};

/// How often it is looked whether a GPU has come to a moment, by those who do not wait for ever.
const LOOK: Duration = Duration::from_micros(50);

/// A moment in a stream: reached when all that was enqueued before it is done.
#[derive(Clone)]
pub struct Event {
    state: Arc<EventState>,
    /// What is ordered before whoever waits for this event: per stream, the number of ops.
    pub(super) seen: Arc<VectorClock>,
}

/// What ops that need other ranks waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited {
    /// Time that passed until the other ranks were there, before anything was copied.
    pub nanos: u64,
    /// Of ops that share out work: how much of it came to this rank, and the most that came to any.
    pub load: Option<(u64, u64)>,
}

impl std::ops::AddAssign for Waited {
    fn add_assign(&mut self, o: Waited) {
        self.nanos += o.nanos;
        self.load = match (self.load, o.load) {
            (Some((mine, most)), Some((m, n))) => Some((mine + m, most + n)),
            (a, b) => a.or(b),
        };
    }
}

/// Where a stream's first failure goes.
pub(super) type Failure = Arc<Mutex<Option<Error>>>;

#[derive(Clone)]
enum Progress {
    /// The stream's thread has not come to it.
    Enqueued,
    /// The GPU will come to it; what it fails of until then is the stream's failure.
    Launched(Arc<Mark>, Failure),
    /// Nanoseconds of [`clock::now_nanos`].
    Reached(u64),
}

struct EventState {
    progress: Mutex<(Progress, Waited)>,
    moved: Condvar,
}

impl Event {
    pub(super) fn new(seen: VectorClock) -> Self {
        let progress = Mutex::new((Progress::Enqueued, Waited::default()));
        Event { state: Arc::new(EventState { progress, moved: Condvar::new() }), seen: Arc::new(seen) }
    }

    fn advance(&self, progress: Progress, waited: Waited) {
        *self.state.progress.lock() = (progress, waited);
        self.state.moved.notify_all();
    }

    pub(super) fn signal(&self, waited: Waited) {
        self.advance(Progress::Reached(clock::now_nanos()), waited);
    }

    /// The GPU signals it: what comes before it was launched.
    pub(super) fn launched(&self, mark: Arc<Mark>, failure: &Failure, waited: Waited) {
        self.advance(Progress::Launched(mark, failure.clone()), waited);
    }

    fn resolve(&self, mark: &Mark, failure: &Failure) -> u64 {
        let nanos = mark.synchronize().unwrap_or_else(|e| {
            failure.lock().get_or_insert(e);
            clock::now_nanos()
        });
        self.state.progress.lock().0 = Progress::Reached(nanos);
        nanos
    }

    /// Blocks until the stream's thread has come to it; the GPU's mark, if it is the GPU's to reach.
    pub(super) fn mark(&self) -> Option<Arc<Mark>> {
        let mut progress = self.state.progress.lock();
        loop {
            match &progress.0 {
                Progress::Enqueued => self.state.moved.wait(&mut progress),
                Progress::Launched(mark, _) => return Some(mark.clone()),
                Progress::Reached(_) => return None,
            }
        }
    }

    /// Blocks until the event is reached; returns when that was, in nanoseconds of [`clock::now_nanos`].
    pub fn synchronize(&self) -> u64 {
        let mut guard = self.state.progress.lock();
        loop {
            match guard.0.clone() {
                Progress::Enqueued => self.state.moved.wait(&mut guard),
                Progress::Launched(mark, failure) => {
                    drop(guard);
                    return self.resolve(&mark, &failure);
                }
                Progress::Reached(nanos) => return nanos,
            }
        }
    }

    /// Blocks until the event is reached, or so long; whether it is.
    pub fn is_reached_within(&self, most: Duration) -> bool {
        let began = clock::now_nanos();
        loop {
            let left = most.saturating_sub(Duration::from_nanos(clock::now_nanos() - began));
            let mut progress = self.state.progress.lock();
            match progress.0.clone() {
                Progress::Reached(_) => return true,
                Progress::Launched(mark, failure) if mark.is_reached() => {
                    drop(progress);
                    self.resolve(&mark, &failure);
                    return true;
                }
                _ if left.is_zero() => return false,
                Progress::Enqueued => {
                    let _woken_or_late = self.state.moved.wait_for(&mut progress, left);
                }
                Progress::Launched(..) => {
                    drop(progress);
                    std::thread::sleep(LOOK);
                }
            }
        }
    }

    /// When the event was reached, if it was.
    pub fn done_nanos(&self) -> Option<u64> {
        let progress = self.state.progress.lock().0.clone();
        match progress {
            Progress::Enqueued => None,
            Progress::Launched(mark, failure) => mark.is_reached().then(|| self.resolve(&mark, &failure)),
            Progress::Reached(nanos) => Some(nanos),
        }
    }

    /// What the ops since the event before it on its stream waited for other ranks, in sum; nothing if it was not reached yet.
    pub fn waited(&self) -> Waited {
        self.state.progress.lock().1
    }
}
