//! This rank among the others: how it talks to them, and what it agrees on with them once a step.
//!
//! Data moves between ranks in tasks. What the host must know of the others (losses, loads, whether to stop) is told in one
//! exchange at the end of a step, so that all ranks come to the same decisions from the same numbers.

use std::sync::Arc;

use bevy_ecs::prelude::*;
use kernels::comm::{Comm, Spread, Wire};
use serde::{Serialize, de::DeserializeOwned};

use crate::{
    layout::Layout,
    pipeline::{
        ScheduleKind,
        chunk::{self, Chunk},
        source::ScheduleSource,
    },
};

/// A rank and its peers.
#[derive(Resource, Clone)]
pub struct Ranks {
    /// The way to the others.
    pub comm: Comm,
    /// Who holds what.
    pub layout: Arc<Layout>,
    /// Order of passes.
    pub schedule: ScheduleSource,
    /// Order of chunks where a forward and a backward overlap.
    pub chunk_order: [Chunk; 10],
    /// Ranks among which experts are spread.
    pub expert_group: Arc<[u32]>,
    /// Format of rows on their way to experts.
    pub dispatch_wire: Wire,
    /// Format of rows on their way back.
    pub combine_wire: Wire,
    /// Ranks and nodes that a token is expected to be sent to, for plans.
    pub spread: Spread,
    /// Outputs of a token's experts are added up on their way back; for plans.
    pub reduces_on_the_way: bool,
}

impl Ranks {
    /// The one rank of a session that has no others.
    pub fn solo(num_layers: usize) -> Self {
        Ranks::new(Comm::solo(), Layout::solo(num_layers), ScheduleSource::Kind(ScheduleKind::OneFOneB))
    }

    /// A rank that sends rows as they are, and overlaps as DeepSeek does.
    pub fn new(comm: Comm, layout: Layout, schedule: ScheduleSource) -> Self {
        let expert_group = layout.mesh.expert_group(layout.rank);
        let (dispatch_wire, combine_wire) = (Wire::default(), Wire::default());
        Ranks {
            comm,
            layout: Arc::new(layout),
            schedule,
            chunk_order: chunk::ORDER,
            expert_group,
            dispatch_wire,
            combine_wire,
            spread: Spread::default(),
            reduces_on_the_way: false,
        }
    }

    /// Whether this rank speaks for all: it logs, and writes files.
    pub fn is_first(&self) -> bool {
        self.layout.rank == 0
    }

    /// Number in the whole step of this rank's microbatch `local`: they are dealt out in turn.
    pub fn global_microbatch(&self, local: u32) -> u32 {
        let mesh = &self.layout.mesh;
        local * mesh.num_data_ranks() + mesh.data_rank(self.layout.rank)
    }

    /// Shows `mine` to all ranks; returns every rank's, by rank.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn exchange<T: Serialize + DeserializeOwned>(&self, mine: &T) -> Result<Vec<T>, BevyError> {
        let all = self.comm.all_gather_bytes(serde_json::to_vec(mine)?)?;
        all.iter().map(|bytes| Ok(serde_json::from_slice(bytes)?)).collect()
    }
}
