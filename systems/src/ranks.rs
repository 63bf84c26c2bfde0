//! This rank among the others: how it talks to them, and what it agrees on with them once a step.
//!
//! Data moves between ranks in tasks. What the host must know of the others (losses, loads, whether to stop) is told in one
//! exchange at the end of a step, so that all ranks come to the same decisions from the same numbers.
//!
//! A run may be several replicas of one layout, that train apart and meet now and then ([`crate::diloco`]). Each is a window on
//! the run's ranks, which come replica by replica; so what is inside of one need not know that there are others.

use std::sync::{
    Arc,
    atomic::{AtomicU64, Ordering},
};

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
    /// The way to the others of this replica.
    pub comm: Comm,
    /// The way to all ranks of the run.
    pub everyone: Comm,
    /// Who holds what of this replica.
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
    /// Bytes that this rank told others in exchanges.
    pub(crate) told_bytes: Arc<AtomicU64>,
}

impl Ranks {
    /// The one rank of a session that has no others.
    pub fn solo(num_layers: usize) -> Self {
        Ranks::new(Comm::solo(), Layout::solo(num_layers), ScheduleSource::Kind(ScheduleKind::OneFOneB))
    }

    /// A rank that sends rows as they are, and overlaps as DeepSeek does.
    ///
    /// # Panics
    /// If the ranks of `everyone` are not those of one or more replicas of the layout.
    pub fn new(everyone: Comm, layout: Layout, schedule: ScheduleSource) -> Self {
        let num_ranks = layout.mesh.num_ranks();
        assert!(everyone.num_ranks().is_multiple_of(num_ranks), "replicas of {num_ranks} ranks each");
        let comm = everyone.window(everyone.rank() / num_ranks * num_ranks, num_ranks);
        let expert_group = layout.mesh.expert_group(layout.rank);
        let (dispatch_wire, combine_wire) = (Wire::default(), Wire::default());
        Ranks {
            comm,
            everyone,
            layout: Arc::new(layout),
            schedule,
            chunk_order: chunk::ORDER,
            expert_group,
            dispatch_wire,
            combine_wire,
            spread: Spread::default(),
            reduces_on_the_way: false,
            told_bytes: Arc::default(),
        }
    }

    /// Whether this rank speaks for all: it logs, and writes files.
    pub fn is_first(&self) -> bool {
        self.number() == 0
    }

    /// This rank's number in the run.
    pub fn number(&self) -> u32 {
        self.everyone.rank()
    }

    /// Replicas of the run, present or not.
    pub fn num_replicas(&self) -> u32 {
        self.everyone.num_ranks() / self.layout.mesh.num_ranks()
    }

    /// The replica that this rank is of.
    pub fn replica(&self) -> u32 {
        self.number() / self.layout.mesh.num_ranks()
    }

    /// Ranks of the run that see different parts of the batch.
    pub fn num_data_ranks(&self) -> u32 {
        self.num_replicas() * self.layout.mesh.num_data_ranks()
    }

    /// Which part of the batch this rank sees, below [`Ranks::num_data_ranks`].
    pub fn data_rank(&self) -> u32 {
        let mesh = &self.layout.mesh;
        self.replica() * mesh.num_data_ranks() + mesh.data_rank(self.layout.rank)
    }

    /// Number in the whole step of this rank's microbatch `local`: they are dealt out in turn.
    pub fn global_microbatch(&self, local: u32) -> u32 {
        local * self.num_data_ranks() + self.data_rank()
    }

    /// Bytes of what [`Ranks::exchange`] sent since the last call.
    pub fn take_told_bytes(&self) -> u64 {
        self.told_bytes.swap(0, Ordering::Relaxed)
    }

    /// Shows `mine` to all ranks of the run; returns every rank's, by rank.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn exchange<T: Serialize + DeserializeOwned>(&self, mine: &T) -> Result<Vec<T>, BevyError> {
        let mine = serde_json::to_vec(mine)?;
        self.told_bytes.fetch_add(mine.len() as u64 * u64::from(self.everyone.num_ranks() - 1), Ordering::Relaxed);
        let all = self.everyone.all_gather_bytes(mine)?;
        all.iter().map(|bytes| Ok(serde_json::from_slice(bytes)?)).collect()
    }
}
