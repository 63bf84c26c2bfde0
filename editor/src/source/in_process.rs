//! A run in this process: its telemetry, and a way to stop it.

use std::time::Duration;

use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender};
use engine::telemetry;
use serde_json::Value;

use super::{Source, SourceEvent, Wake};

/// Steps that wait for the window at most.
pub const CAPACITY: usize = 64;

/// What answers calls: gives the answer at once, or later through the sender.
pub type Answer = Box<dyn FnMut(u64, &str, Value, &Sender<SourceEvent>) -> bool + Send>;

/// A run on threads of this process.
pub struct InProcess {
    name: String,
    events: Receiver<SourceEvent>,
    sender: Sender<SourceEvent>,
    answer: Answer,
    next_id: u64,
    /// Stops the run when the window goes.
    on_drop: Option<Box<dyn FnOnce() + Send>>,
}

impl InProcess {
    /// A source and the end that events are put into. `answer` is given each call, and says whether it takes it.
    pub fn new(name: String, answer: Answer, on_drop: Box<dyn FnOnce() + Send>) -> (Self, Sender<SourceEvent>) {
        let (sender, events) = channel::bounded(4 * CAPACITY);
        (InProcess { name, events, sender: sender.clone(), answer, next_id: 0, on_drop: Some(on_drop) }, sender)
    }
}

impl Source for InProcess {
    fn name(&self) -> &str {
        &self.name
    }

    fn poll(&mut self) -> Vec<SourceEvent> {
        self.events.try_iter().collect()
    }

    fn call(&mut self, method: &str, params: Value) -> Option<u64> {
        self.next_id += 1;
        (self.answer)(self.next_id, method, params, &self.sender).then_some(self.next_id)
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        if let Some(on_drop) = self.on_drop.take() {
            on_drop();
        }
    }
}

/// Passes snapshots on until the run is over; for a thread of its own. A full channel makes it wait, and then the telemetry drops
/// the oldest: the run is never slowed.
pub fn forward(receiver: &telemetry::Receiver, sender: &Sender<SourceEvent>, wake: &Wake) {
    let mut dropped = 0;
    loop {
        match receiver.recv_timeout(Duration::from_secs(1)) {
            Ok(snapshot) => {
                let now_dropped = receiver.num_dropped();
                if now_dropped != dropped {
                    dropped = now_dropped;
                    if sender.send(SourceEvent::Dropped(dropped)).is_err() {
                        return;
                    }
                }
                if sender.send(SourceEvent::Snapshot(snapshot)).is_err() {
                    return;
                }
                wake();
            }
            Err(RecvTimeoutError::Timeout) => {}
            Err(RecvTimeoutError::Disconnected) => return,
        }
    }
}
