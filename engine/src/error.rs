//! What can go wrong before and while a plan is launched, by task labels: entity ids mean nothing to a reader.

use std::sync::Arc;

use crate::{hardware::Missing, task::TaskKind};

/// Error of planning or dispatch.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// Nobody registered how to run a kind of task.
    #[error("task `{task}` is of kind `{kind}`, which no plugin handles; register it with `app.on_task`")]
    MissingHandler {
        /// The kind.
        kind: TaskKind,
        /// The first task of that kind.
        task: Arc<str>,
    },
    /// A handler's parameters could not be had.
    #[error("the handler of `{kind}` did not run for task `{task}`: {reason}")]
    Skipped {
        /// The kind.
        kind: TaskKind,
        /// The task.
        task: Arc<str>,
        /// What bevy_ecs says.
        reason: String,
    },
    /// A handler panicked on the host.
    #[error("task `{task}` panicked while it was launched: {message}")]
    Panicked {
        /// The task.
        task: Arc<str>,
        /// The panic's message.
        message: String,
    },
    /// Tasks wait for each other.
    #[error("deadlock: {}", describe_cycle(cycle))]
    Deadlock {
        /// Labels, each waiting for the next; the last is the first again.
        cycle: Vec<Arc<str>>,
    },
    /// A task waits for one that the host launches after it.
    #[error("task `{task}` waits for `{dependency}`, which is launched after it: push `{dependency}` first")]
    LaunchOrder {
        /// The waiting task.
        task: Arc<str>,
        /// What it waits for.
        dependency: Arc<str>,
    },
    /// An explicit edge names an entity that is no task of this graph.
    #[error("an edge names {entity}, which was not pushed to this graph")]
    UnknownTask {
        /// The entity.
        entity: String,
    },
    /// A task is on an entity that is no stream.
    #[error("task `{task}` is on {stream}, which has no `Queue`; spawn it with `Queue::spawn`")]
    NoStream {
        /// The task.
        task: Arc<str>,
        /// The entity it names.
        stream: String,
    },
    /// The active key has no graph.
    #[error("the active plan is `{key}`, but there is no such plan; there are: {known}")]
    UnknownPlan {
        /// The active key.
        key: String,
        /// Keys there are.
        known: String,
    },
    /// A rank waits for another that never does its part.
    #[error("rank {rank}: task `{task}` {does}, but rank {peer} {lacks}; the graphs of the two were not made alike")]
    Unmatched {
        /// The rank.
        rank: u32,
        /// Its task.
        task: Arc<str>,
        /// What the task does.
        does: String,
        /// The other rank.
        peer: u32,
        /// What that rank does not do.
        lacks: String,
    },
    /// Ranks to be simulated together that cannot be.
    #[error("{0}")]
    Ranks(String),
    /// A computed time needs figures that the description of the hardware does not give.
    #[error("{}", describe_missing(.0))]
    MissingFigures(Vec<Missing>),
    /// A device operation failed.
    #[error(transparent)]
    Device(#[from] kernels::error::Error),
}

fn describe_cycle(cycle: &[Arc<str>]) -> String {
    let mut text = String::new();
    for (i, pair) in cycle.windows(2).enumerate() {
        let (task, on) = (&pair[0], &pair[1]);
        text += &if i == 0 { format!("`{task}` waits for `{on}`") } else { format!(", which waits for `{on}`") };
    }
    text
}

fn describe_missing(missing: &[Missing]) -> String {
    missing.iter().map(ToString::to_string).collect::<Vec<_>>().join("\n")
}

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// The message of a caught panic.
pub fn panic_message(payload: &(dyn std::any::Any + Send)) -> String {
    payload
        .downcast_ref::<String>()
        .cloned()
        .or_else(|| payload.downcast_ref::<&str>().map(|s| (*s).to_owned()))
        .or_else(|| payload.downcast_ref::<kernels::error::Error>().map(ToString::to_string))
        .unwrap_or_else(|| "a panic without a message".to_owned())
}
