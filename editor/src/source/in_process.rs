//! A run in this process: what a client is to a run elsewhere, without the wire.

use crossbeam::channel::{self, Receiver, Sender};
use engine::{control::ControlHandle, telemetry};
use serde_json::Value;

use super::{Source, SourceEvent, Wake};

/// Steps that wait for the window at most; then the oldest give way, and the run is never slowed.
const CAPACITY: usize = 64;
/// Answers that wait for the window at most.
const MAX_REPLIES: usize = 256;

/// A run on threads of this process.
pub struct InProcess {
    name: String,
    handle: ControlHandle,
    telemetry: telemetry::Receiver,
    num_dropped: u64,
    events: (Sender<SourceEvent>, Receiver<SourceEvent>),
    wake: Wake,
    next_id: u64,
    /// Stops the run when the window has no more use for it.
    on_drop: Option<Box<dyn FnOnce() + Send>>,
}

impl InProcess {
    /// Listens to the run behind `handle`. The other end that is given is for its last words.
    pub fn new(
        name: String,
        handle: ControlHandle,
        wake: Wake,
        on_drop: Box<dyn FnOnce() + Send>,
    ) -> (Self, Sender<SourceEvent>) {
        let telemetry = handle.feed().subscribe_and_wake(CAPACITY, Some(wake.clone()));
        let events = channel::bounded(MAX_REPLIES);
        let sender = events.0.clone();
        // It fits: the channel is new.
        let _ = sender.try_send(SourceEvent::Connected(name.clone()));
        let on_drop = Some(on_drop);
        (InProcess { name, handle, telemetry, num_dropped: 0, events, wake, next_id: 0, on_drop }, sender)
    }
}

impl Source for InProcess {
    fn name(&self) -> &str {
        &self.name
    }

    fn poll(&mut self) -> Vec<SourceEvent> {
        let mut events: Vec<SourceEvent> = Vec::new();
        while let Ok(snapshot) = self.telemetry.try_recv() {
            events.push(SourceEvent::Snapshot(snapshot));
        }
        if self.telemetry.num_dropped() != self.num_dropped {
            self.num_dropped = self.telemetry.num_dropped();
            events.push(SourceEvent::Dropped(self.num_dropped));
        }
        // After the steps: last words are the last.
        events.extend(self.events.1.try_iter());
        events
    }

    fn call(&mut self, method: &str, params: Value) -> Option<u64> {
        self.next_id += 1;
        let (id, sender, wake) = (self.next_id, self.events.0.clone(), self.wake.clone());
        self.handle.call_with(method, params, move |result| {
            // On the run's thread: a window that takes no answers gets none.
            let _ = sender.try_send(SourceEvent::Reply { id, result: result.map_err(|error| error.to_string()) });
            wake();
        });
        Some(id)
    }
}

impl Drop for InProcess {
    fn drop(&mut self) {
        if let Some(on_drop) = self.on_drop.take() {
            on_drop();
        }
    }
}
