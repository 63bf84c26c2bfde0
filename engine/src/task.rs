//! Tasks: one op group of one pass of one layer of one microbatch, on one stream.
//!
//! A task entity holds what the engine needs to order, launch and show it; what its handler needs is one more component on
//! the same entity, of a type that only the handler's plugin knows.

use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, PoisonError},
};

use bevy_ecs::{prelude::*, system::SystemParam};
use kernels::{
    cost::Cost,
    stream::{Rendezvous, Stream},
    tensor::Tensor,
};

use crate::{error::Error, stream::Queue};

/// What a task does; picks its handler. Unique over all plugins.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskKind(pub &'static str);

/// Kinds that come from elsewhere; one with more has names that are no kinds.
const MAX_READ_KINDS: usize = 4096;
/// Bytes of the name of a kind that comes from elsewhere.
const MAX_KIND_LEN: usize = 256;

impl TaskKind {
    /// The kind called `name`, read from a file or a connection. Names live as long as the process, so that there is a limit to
    /// how many there are and how long: none beyond it.
    pub fn read(name: &str) -> Option<Self> {
        static KINDS: Mutex<BTreeSet<&'static str>> = Mutex::new(BTreeSet::new());
        let mut kinds = KINDS.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = kinds.get(name) {
            return Some(TaskKind(known));
        }
        if kinds.len() >= MAX_READ_KINDS || name.len() > MAX_KIND_LEN {
            return None;
        }
        let name: &'static str = Box::leak(name.to_owned().into_boxed_str());
        kinds.insert(name);
        Some(TaskKind(name))
    }
}

impl fmt::Display for TaskKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.0)
    }
}

/// Which pass over the layers a task belongs to, as the zero-bubble papers name them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Pass {
    /// F: forward.
    Forward,
    /// I: gradient of the input.
    InputGrad,
    /// W: gradient of the weights.
    WeightGrad,
}

impl Pass {
    /// F, I or W.
    pub const fn letter(self) -> &'static str {
        match self {
            Pass::Forward => "F",
            Pass::InputGrad => "I",
            Pass::WeightGrad => "W",
        }
    }
}

impl fmt::Display for Pass {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.letter())
    }
}

/// What a task's time is spent on: the device's own work, or meeting other ranks.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Role {
    /// Meets nobody.
    #[default]
    Compute,
    /// Sends to a rank.
    Send,
    /// Receives from a rank.
    Receive,
    /// Meets a group of ranks.
    Collective,
}

impl Role {
    /// All, in order.
    pub const ALL: [Role; 4] = [Role::Compute, Role::Send, Role::Receive, Role::Collective];

    /// As in traces.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Compute => "compute",
            Role::Send => "send",
            Role::Receive => "receive",
            Role::Collective => "collective",
        }
    }

    /// The role of a task that meets others in `rendezvous`. Of several, the one that can wait longest decides: for a whole
    /// group, then for a sender, then for a receiver.
    pub fn of(rendezvous: &[Rendezvous]) -> Self {
        let role = |met: &Rendezvous| match met {
            Rendezvous::Send { .. } => Role::Send,
            Rendezvous::Receive { .. } => Role::Receive,
            Rendezvous::Collective { .. } => Role::Collective,
        };
        rendezvous.iter().map(role).max().unwrap_or_default()
    }
}

/// A unit of launch. Made once per plan and launched again every step.
#[derive(Component, Clone, Debug)]
pub struct Task {
    /// Picks the handler.
    pub kind: TaskKind,
    /// Pass, for work that has one (an optimizer step has none).
    pub pass: Option<Pass>,
    /// Names the task in errors and traces.
    pub label: Arc<str>,
    /// Entity with the [`Queue`] it runs on.
    pub stream: Entity,
    /// Pipeline stage.
    pub stage: u32,
    /// Layer, if it is of one.
    pub layer: Option<u32>,
    /// Microbatch, if it is of one.
    pub microbatch: Option<u32>,
    /// What it asks of the device.
    pub cost: Cost,
    /// Tensors it reads.
    pub reads: Vec<Tensor>,
    /// Tensors it writes (those it updates are in both lists).
    pub writes: Vec<Tensor>,
    /// What it meets other ranks in.
    pub rendezvous: Vec<Rendezvous>,
}

impl Task {
    /// A task with no pass, layer, microbatch, cost, tensors or other ranks, of stage 0.
    pub fn new(kind: TaskKind, stream: Entity, label: impl Into<Arc<str>>) -> Self {
        Task {
            kind,
            pass: None,
            label: label.into(),
            stream,
            stage: 0,
            layer: None,
            microbatch: None,
            cost: Cost::default(),
            reads: Vec::new(),
            writes: Vec::new(),
            rendezvous: Vec::new(),
        }
    }

    /// Sets the pass.
    #[must_use]
    pub fn pass(mut self, pass: Pass) -> Self {
        self.pass = Some(pass);
        self
    }

    /// Sets the pipeline stage.
    #[must_use]
    pub fn stage(mut self, stage: u32) -> Self {
        self.stage = stage;
        self
    }

    /// Sets the layer.
    #[must_use]
    pub fn layer(mut self, layer: u32) -> Self {
        self.layer = Some(layer);
        self
    }

    /// Sets the microbatch.
    #[must_use]
    pub fn microbatch(mut self, microbatch: u32) -> Self {
        self.microbatch = Some(microbatch);
        self
    }

    /// Sets the cost.
    #[must_use]
    pub fn cost(mut self, cost: Cost) -> Self {
        self.cost = cost;
        self
    }

    /// Adds tensors it reads.
    #[must_use]
    pub fn reads(mut self, tensors: &[Tensor]) -> Self {
        self.reads.extend_from_slice(tensors);
        self
    }

    /// Adds tensors it writes.
    #[must_use]
    pub fn writes(mut self, tensors: &[Tensor]) -> Self {
        self.writes.extend_from_slice(tensors);
        self
    }
}

/// What a handler is given: its task, its arguments `A` from the same entity, and the stream to enqueue ops on.
///
/// ```
/// # use bevy_ecs::prelude::*;
/// # use engine::prelude::*;
/// # use kernels::tensor::Tensor;
/// #[derive(Component)]
/// struct DoubleArgs { x: Tensor }
///
/// fn double(In(id): In<Entity>, mut launch: Launch<DoubleArgs>) -> Result {
///     let (_task, &DoubleArgs { x }, stream) = launch.get(id)?;
///     stream.launch(&[x], &[x], move |memory| memory.write::<f32>(x).iter_mut().for_each(|v| *v *= 2.0));
///     Ok(())
/// }
/// ```
#[derive(SystemParam)]
pub struct Launch<'w, 's, A: Component> {
    tasks: Query<'w, 's, (&'static Task, &'static A)>,
    queues: Query<'w, 's, &'static mut Queue>,
}

impl<A: Component> Launch<'_, '_, A> {
    /// The task, its arguments and its stream.
    ///
    /// # Errors
    /// If the entity lacks a [`Task`] or `A`, or its stream entity has no [`Queue`].
    pub fn get(&mut self, id: Entity) -> Result<(&Task, &A, &mut Stream)> {
        let (task, args) = self.tasks.get(id)?;
        let missing = || Error::NoStream { task: task.label.clone(), stream: task.stream.to_string() };
        let queue = self.queues.get_mut(task.stream).map_err(|_| missing())?;
        Ok((task, args, &mut queue.into_inner().stream))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_longest_wait_decides_the_role() {
        let send = Rendezvous::Send { to: 1, tag: 0 };
        let receive = Rendezvous::Receive { from: 1, tag: 0 };
        let collective = Rendezvous::Collective { group: Arc::from([0, 1]), tag: 0 };
        assert_eq!(Role::of(&[]), Role::Compute);
        assert_eq!(Role::of(std::slice::from_ref(&send)), Role::Send);
        assert_eq!(Role::of(&[receive.clone(), send.clone()]), Role::Receive);
        assert_eq!(Role::of(&[send, collective, receive]), Role::Collective);
    }
}
