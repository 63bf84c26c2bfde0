//! Requests to a run, from whoever has a [`ControlHandle`]: an editor in the same process, or a server.
//!
//! A request waits in a bounded channel until the run is between two steps, and is answered there, on the run's thread, so that
//! nothing ever looks at a world in the middle of a step. Asking does not block: what does not fit is refused at once. A request
//! that is never answered, because the run ended, is answered by being dropped.
//!
//! Names and errors are those of JSON-RPC 2.0, in the manner of the Bevy Remote Protocol.

use std::sync::{Arc, Mutex, PoisonError};

use crossbeam::channel::{self, Receiver, Sender, TrySendError};
use serde::{Deserialize, Serialize};
use serde_json::Value;

pub(crate) mod gate;
mod gather;
mod methods;
mod plugin;
mod values;
mod world;

pub use gather::tell_last_step;
pub use methods::{Access, AppControlExt, Method};
pub use plugin::{Control, ControlPlugin, ControlSystems, Note};
pub use values::{LiveValue, params_of};

use crate::telemetry::{self, Feed};

/// Requests that wait for the run to come between two steps.
const MAX_REQUESTS: usize = 256;

/// Why a request failed, as JSON-RPC 2.0 says it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize, thiserror::Error)]
#[error("{message}")]
pub struct RpcError {
    /// One of this type's constants.
    pub code: i64,
    /// What was expected, what was found, and what to do.
    pub message: String,
    /// More, for programs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub data: Option<Value>,
}

impl RpcError {
    /// The text is no JSON.
    pub const PARSE: i64 = -32700;
    /// The JSON is no request.
    pub const INVALID_REQUEST: i64 = -32600;
    /// There is no such method.
    pub const METHOD_NOT_FOUND: i64 = -32601;
    /// The method does not take these parameters.
    pub const INVALID_PARAMS: i64 = -32602;
    /// The method failed.
    pub const FAILED: i64 = -32603;
    /// The run is over.
    pub const OVER: i64 = -32000;
    /// The method needs a token.
    pub const NO_TOKEN: i64 = -32001;
    /// Too many requests wait already.
    pub const BUSY: i64 = -32002;

    /// An error with no data.
    pub fn new(code: i64, message: impl Into<String>) -> Self {
        RpcError { code, message: message.into(), data: None }
    }

    /// Parameters that do not fit.
    pub fn params(message: impl Into<String>) -> Self {
        Self::new(Self::INVALID_PARAMS, message)
    }

    /// A method that failed.
    pub fn failed(message: impl std::fmt::Display) -> Self {
        Self::new(Self::FAILED, message.to_string())
    }

    /// The run is over.
    pub fn over() -> Self {
        Self::new(Self::OVER, "the run is over")
    }
}

/// What a request comes to.
pub type RpcResult = Result<Value, RpcError>;

/// Where the answer to a request goes; dropped, it says that the run is over.
pub struct Reply(Option<Box<dyn FnOnce(RpcResult) + Send + Sync>>);

impl Reply {
    /// An answer is given to `take`, on the run's thread: it must not block.
    pub fn new(take: impl FnOnce(RpcResult) + Send + Sync + 'static) -> Self {
        Reply(Some(Box::new(take)))
    }

    /// Answers.
    pub fn send(mut self, result: RpcResult) {
        if let Some(take) = self.0.take() {
            take(result);
        }
    }
}

impl Drop for Reply {
    fn drop(&mut self) {
        if let Some(take) = self.0.take() {
            take(Err(RpcError::over()));
        }
    }
}

/// A request to a run.
pub struct Request {
    /// Which method.
    pub method: String,
    /// Its parameters by name; null for none.
    pub params: Value,
    /// Whether who asks may change the run.
    pub may_change: bool,
    /// Where the answer goes.
    pub reply: Reply,
}

/// The outer end: asks a run, and listens to it. Clones are the same end.
#[derive(Clone)]
pub struct ControlHandle {
    /// None when the run is over: so no request can be sent between the last look at the channel and its end.
    requests: Arc<Mutex<Option<Sender<Request>>>>,
    feed: Feed,
    may_change: bool,
}

impl ControlHandle {
    /// Asks; the answer will be in the receiver. Never blocks.
    pub fn call(&self, method: impl Into<String>, params: Value) -> Receiver<RpcResult> {
        let (sender, receiver) = channel::bounded(1);
        self.call_with(method, params, move |result| {
            // Whoever asked may have gone.
            let _ = sender.try_send(result);
        });
        receiver
    }

    /// The same; the answer is given to `take`, on the run's thread or on this one. It must not block.
    pub fn call_with(
        &self,
        method: impl Into<String>,
        params: Value,
        take: impl FnOnce(RpcResult) + Send + Sync + 'static,
    ) {
        let request = Request { method: method.into(), params, may_change: self.may_change, reply: Reply::new(take) };
        let sent = match &*self.requests.lock().unwrap_or_else(PoisonError::into_inner) {
            Some(requests) => requests.try_send(request),
            None => Err(TrySendError::Disconnected(request)),
        };
        match sent {
            Ok(()) => {}
            Err(TrySendError::Full(request)) => request.reply.send(Err(RpcError::new(
                RpcError::BUSY,
                format!("{MAX_REQUESTS} requests wait for the step at hand to end already; ask again later"),
            ))),
            Err(TrySendError::Disconnected(request)) => request.reply.send(Err(RpcError::over())),
        }
    }

    /// The same end for somebody who may look, and change nothing.
    #[must_use]
    pub fn read_only(&self) -> Self {
        ControlHandle { may_change: false, ..self.clone() }
    }

    /// Listens to the run's snapshots from the next one on; at most `capacity` (at least one) wait.
    pub fn subscribe(&self, capacity: usize) -> telemetry::Receiver {
        self.feed.subscribe(capacity)
    }

    /// Where the run's snapshots come from.
    pub fn feed(&self) -> &Feed {
        &self.feed
    }
}

/// The run's end. Clones are the same end; when the last is gone, the run is over for those who ask and listen.
#[derive(Clone)]
pub struct Inbox(Arc<Ends>);

struct Ends {
    requests: Receiver<Request>,
    senders: Arc<Mutex<Option<Sender<Request>>>>,
    feed: Feed,
}

impl Drop for Ends {
    fn drop(&mut self) {
        *self.senders.lock().unwrap_or_else(PoisonError::into_inner) = None;
        // Dropped, each is answered that the run is over.
        self.requests.try_iter().for_each(drop);
        self.feed.close();
    }
}

impl Inbox {
    /// The oldest request, if there is one.
    pub(crate) fn try_recv(&self) -> Option<Request> {
        self.0.requests.try_recv().ok()
    }

    /// The same, waiting so long for one.
    pub(crate) fn recv_timeout(&self, timeout: std::time::Duration) -> Option<Request> {
        self.0.requests.recv_timeout(timeout).ok()
    }

    /// Where the run's snapshots go.
    pub fn feed(&self) -> &Feed {
        &self.0.feed
    }
}

/// Both ends of the way to a run that is yet to be started.
pub fn channel() -> (ControlHandle, Inbox) {
    let (sender, requests) = channel::bounded(MAX_REQUESTS);
    let senders = Arc::new(Mutex::new(Some(sender)));
    let feed = Feed::default();
    let handle = ControlHandle { requests: senders.clone(), feed: feed.clone(), may_change: true };
    (handle, Inbox(Arc::new(Ends { requests, senders, feed })))
}

#[cfg(test)]
#[path = "control_tests.rs"]
mod tests;
