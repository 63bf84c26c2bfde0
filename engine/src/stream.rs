//! Streams as entities: a `Queue` owns one FIFO of one rank's device.

use std::sync::Arc;

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
    /// Spawns a stream over the memory of [`Tensors`].
    ///
    /// # Errors
    /// If the operating system gives no thread.
    ///
    /// # Panics
    /// If the world has no [`Tensors`]: add the engine's plugin first.
    pub fn spawn(world: &mut World, rank: u32, name: &str) -> Result<Entity> {
        let tensors = world.resource::<Tensors>();
        let stream = Stream::new(name, tensors.memory(), tensors.hazards())?;
        Ok(world.spawn((Name::new(name.to_owned()), Queue { stream, name: name.into(), rank })).id())
    }
}
