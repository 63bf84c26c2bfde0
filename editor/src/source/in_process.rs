//! A run in this process: what a client is to a run elsewhere, without the wire.

use std::time::Duration;

use crossbeam::channel::{self, Receiver, RecvTimeoutError, Sender};
use engine::{control::ControlHandle, telemetry};
use serde_json::Value;

use super::{Source, SourceEvent, Wake};

/// Steps that wait for the window at most.
const CAPACITY: usize = 64;
/// Answers that wait for the window at most.
const MAX_REPLIES: usize = 256;

/// A run on threads of this process.
pub struct InProcess {
    name: String,
    handle: ControlHandle,
    events: Receiver<SourceEvent>,
    replies: (Sender<SourceEvent>, Receiver<SourceEvent>),
    wake: Wake,
    next_id: u64,
    /// Stops the run when the window has no more use for it.
    on_drop: Option<Box<dyn FnOnce() + Send>>,
}

impl InProcess {
    /// Listens to the run behind `handle`. The other end that is given is for its last words.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn new(
        name: String,
        handle: ControlHandle,
        wake: Wake,
        on_drop: Box<dyn FnOnce() + Send>,
    ) -> std::io::Result<(Self, Sender<SourceEvent>)> {
        let (sender, events) = channel::bounded(CAPACITY);
        let telemetry = handle.subscribe(CAPACITY);
        let (forwarded, woken) = (sender.clone(), wake.clone());
        std::thread::Builder::new().name("telemetry".into()).spawn(move || forward(&telemetry, &forwarded, &woken))?;
        // Nobody fails to listen to this: the channel is new and empty.
        let _ = sender.try_send(SourceEvent::Connected(name.clone()));
        let replies = channel::bounded(MAX_REPLIES);
        Ok((InProcess { name, handle, events, replies, wake, next_id: 0, on_drop: Some(on_drop) }, sender))
    }
}

impl Source for InProcess {
    fn name(&self) -> &str {
        &self.name
    }

    fn poll(&mut self) -> Vec<SourceEvent> {
        self.events.try_iter().chain(self.replies.1.try_iter()).collect()
    }

    fn call(&mut self, method: &str, params: Value) -> Option<u64> {
        self.next_id += 1;
        let (id, sender, wake) = (self.next_id, self.replies.0.clone(), self.wake.clone());
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

/// Passes snapshots on until the run is over. A window that is slow makes this thread wait, and then the telemetry drops the oldest:
/// the run is never slowed.
fn forward(receiver: &telemetry::Receiver, sender: &Sender<SourceEvent>, wake: &Wake) {
    let mut num_dropped = 0;
    loop {
        match receiver.recv_timeout(Duration::from_secs(1)) {
            Ok(snapshot) => {
                if receiver.num_dropped() != num_dropped {
                    num_dropped = receiver.num_dropped();
                    if sender.send(SourceEvent::Dropped(num_dropped)).is_err() {
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
