//! Streams as entities: a `Queue` owns one FIFO of one rank's device.

use std::sync::Arc;

use bevy_ecs::prelude::*;
use kernels::stream::{Part, Stream};

use crate::{error::Result, tensors::Tensors};

/// A stream of a rank. A real run holds its own rank's; a plan may hold every rank's.
#[derive(Component)]
pub struct Queue {
    /// The FIFO.
    pub stream: Stream,
    /// Name, as in spans: `compute`, `comm`.
    pub name: Arc<str>,
    /// Rank that it belongs to.
    pub rank: u32,
}

impl Queue {
    /// Spawns a stream over the memory of [`Tensors`], whose ops share the threads of the process.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    ///
    /// # Panics
    /// If the world has no [`Tensors`]: add the engine's plugin first.
    pub fn spawn(world: &mut World, rank: u32, name: &str) -> Result<Entity> {
        Self::spawn_with_part(world, rank, name, Part::default())
    }

    /// The same with a part of the device.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    ///
    /// # Panics
    /// If the world has no [`Tensors`].
    pub fn spawn_with_part(world: &mut World, rank: u32, name: &str, part: Part) -> Result<Entity> {
        let tensors = world.resource::<Tensors>();
        let (memory, hazards) = (tensors.memory(), tensors.hazards());
        let stream = Stream::with_part(name, memory, hazards, part)?;
        Ok(world.spawn((Name::new(name.to_owned()), Queue { stream, name: name.into(), rank })).id())
    }
}

/// Whether streams are told which tasks come again each step, so that a GPU's may launch those that are the same as one
/// ([`Stream::start_repeating_batch`]). What is computed, and when each task ran, is the same either way.
#[derive(Resource, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepeatsTasks(pub bool);
