//! The last steps of a rank as bytes, for another process, with times by the first rank's clock.

use std::sync::Arc;

use engine::{
    prelude::*,
    telemetry::bytes::{from_bytes, to_bytes},
};
use kernels::{
    comm::{ClockOffset, meter::LinkBytes},
    stream::Rendezvous,
};
use serde::{Deserialize, Serialize};

use super::{Outline, RankSteps, StepOfRank};
use crate::traffic::{Class, Traffic};

/// [`RankSteps`] as plain data.
#[derive(Serialize, Deserialize)]
struct Told {
    rank: u32,
    stream_of: Vec<u32>,
    deps: Vec<Vec<u32>>,
    met: Vec<(u32, Met)>,
    /// Snapshots, and bytes sent intra-node and inter-node.
    steps: Vec<(Vec<u8>, u64, u64)>,
    traffic: Vec<(Class, String, u64, u64)>,
}

/// [`Rendezvous`] as plain data.
#[derive(Serialize, Deserialize)]
enum Met {
    Send(u32, u64),
    Receive(u32, u64),
    Collective(Vec<u32>, u64),
}

impl From<&Rendezvous> for Met {
    fn from(met: &Rendezvous) -> Self {
        match met {
            Rendezvous::Send { to, tag } => Met::Send(*to, *tag),
            Rendezvous::Receive { from, tag } => Met::Receive(*from, *tag),
            Rendezvous::Collective { group, tag } => Met::Collective(group.to_vec(), *tag),
        }
    }
}

impl From<Met> for Rendezvous {
    fn from(met: Met) -> Self {
        match met {
            Met::Send(to, tag) => Rendezvous::Send { to, tag },
            Met::Receive(from, tag) => Rendezvous::Receive { from, tag },
            Met::Collective(group, tag) => Rendezvous::Collective { group: group.into(), tag },
        }
    }
}

impl RankSteps {
    /// As bytes, by the first rank's clock; the newest steps that fit into so many, none if no step does.
    pub(crate) fn to_bytes(&self, offset: ClockOffset, max_bytes: usize) -> Option<Vec<u8>> {
        let RankSteps { rank, outline, steps, traffic } = self;
        let (mut told, mut num_bytes) = (Vec::new(), 0);
        for StepOfRank { snapshot, sent } in steps.iter().rev() {
            let bytes = to_bytes(&snapshot.tasks_by_clock(offset)).ok()?;
            num_bytes += bytes.len();
            if num_bytes > max_bytes {
                break;
            }
            told.push((bytes, sent.intra_node, sent.inter_node));
        }
        told.reverse();
        let rows = traffic.rows();
        let told = (!told.is_empty()).then(|| Told {
            rank: *rank,
            stream_of: outline.stream_of.clone(),
            deps: outline.deps.clone(),
            met: outline.rendezvous.iter().map(|(task, met)| (*task, met.into())).collect(),
            steps: told,
            traffic: rows.map(|row| (row.class, row.format.into(), row.read_bytes, row.written_bytes)).collect(),
        })?;
        postcard::to_allocvec(&told).ok()
    }

    /// From those bytes.
    ///
    /// # Errors
    /// If they are others.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Result<Self, String> {
        let told: Told = postcard::from_bytes(bytes).map_err(|error| format!("steps of a rank: {error}"))?;
        let Told { rank, stream_of, deps, met, steps, traffic } = told;
        let step = |(bytes, intra_node, inter_node): (Vec<u8>, u64, u64)| {
            let snapshot = from_bytes(&bytes).map_err(|error| format!("a step of rank {rank}: {error}"))?;
            let found = (snapshot.spans.len(), stream_of.len());
            if found.0 != found.1 || found.0 != deps.len() {
                return Err(format!("a step of rank {rank} has {} tasks, and its graph {}", found.0, found.1));
            }
            Ok(StepOfRank { snapshot: Arc::new(snapshot), sent: LinkBytes { intra_node, inter_node } })
        };
        let steps = steps.into_iter().map(step).collect::<Result<Vec<_>, String>>()?;
        let first = steps.first().ok_or_else(|| format!("rank {rank} tells of no step"))?;
        let without_times = |span: &Span| Span {
            start_nanos: 0,
            end_nanos: 0,
            waited_for: None,
            wait_nanos: 0,
            load: None,
            ..span.clone()
        };
        let outline = Outline {
            spans: first.snapshot.spans.iter().map(without_times).collect(),
            rendezvous: met.into_iter().map(|(task, met)| (task, met.into())).collect(),
            stream_of,
            deps,
        };
        let traffic = traffic.into_iter().map(|(class, format, read, written)| (class, format, (read, written)));
        let traffic =
            Traffic::from_rows(traffic).ok_or_else(|| format!("rank {rank} tells of a format that is none"))?;
        Ok(RankSteps { rank, outline, steps, traffic })
    }
}
