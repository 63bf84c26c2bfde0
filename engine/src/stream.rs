//! Streams as entities: a `Queue` owns one FIFO of one rank's device.

use std::{num::NonZero, sync::Arc};

use bevy_ecs::prelude::*;
use kernels::stream::Stream;

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
        Self::spawn_with_threads(world, rank, name, None)
    }

    /// The same; with a number, its ops have so many threads of their own.
    ///
    /// # Errors
    /// If the operating system gives no thread.
    ///
    /// # Panics
    /// If the world has no [`Tensors`].
    pub fn spawn_with_threads(world: &mut World, rank: u32, name: &str, num_threads: Option<usize>) -> Result<Entity> {
        let tensors = world.resource::<Tensors>();
        let (memory, hazards) = (tensors.memory(), tensors.hazards());
        let stream = match num_threads.and_then(NonZero::new) {
            None => Stream::new(name, memory, hazards)?,
            Some(num_threads) => Stream::with_threads(name, memory, hazards, num_threads)?,
        };
        Ok(world.spawn((Name::new(name.to_owned()), Queue { stream, name: name.into(), rank })).id())
    }
}

/// Whether streams are told which tasks come again each step, so that a GPU's may launch those that are the same as one
/// ([`Stream::start_repeating_batch`]). What is computed, and when each task ran, is the same either way.
#[derive(Resource, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RepeatsTasks(pub bool);
