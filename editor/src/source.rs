//! Where snapshots come from and commands go to: a run in this process, a run elsewhere, or a file. Views cannot tell which.

pub mod chrome;
pub mod file;
pub mod in_process;
#[cfg(feature = "remote")]
pub mod remote;

use std::sync::Arc;

use engine::telemetry::Snapshot;
use serde_json::Value;

/// Wakes the window up: something is there to be polled. May be called from any thread.
pub type Wake = Arc<dyn Fn() + Send + Sync>;

/// Where snapshots come from and commands go to. Nothing here waits.
pub trait Source: Send {
    /// For titles and the status bar.
    fn name(&self) -> &str;

    /// The step to look at first; none follows the newest.
    fn begins_at(&self) -> Option<u64> {
        None
    }

    /// What happened since the last call, oldest first.
    fn poll(&mut self) -> Vec<SourceEvent>;

    /// Sends a command to the run; the number comes back with the reply. None if there is nobody to ask.
    fn call(&mut self, method: &str, params: Value) -> Option<u64>;
}

/// Something that a source tells.
#[derive(Clone, Debug)]
pub enum SourceEvent {
    /// There is a run at the other end: its name.
    Connected(String),
    /// The run cannot be reached, and why; the source tries again by itself.
    Lost(String),
    /// A step.
    Snapshot(Arc<Snapshot>),
    /// So many steps were left out so far, because this end was slow.
    Dropped(u64),
    /// The answer to a call, or what was wrong with it.
    Reply {
        /// What [`Source::call`] gave.
        id: u64,
        /// The answer.
        result: Result<Value, String>,
    },
    /// No more will come, and why.
    Ended(String),
}
