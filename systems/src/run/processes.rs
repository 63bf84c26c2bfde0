//! A run whose ranks are processes: which is this one's, who is lost, and what the first is told of the others at the end, so that
//! it reports on all.
//!
//! There is a limit to what the first takes in: of many ranks with many tasks each sends fewer steps, or none, and then there is
//! nothing to compare; and a trace that is too long stays in the file that its process wrote.

use std::{
    fs::{self, File},
    io::{self, BufWriter},
    path::Path,
};

use engine::{app::ExitReason, trace::TraceWriter};
use kernels::comm::{ClockOffset, Comm};
use serde::{Deserialize, Serialize};

use crate::{distribute::Distribution, measure::RankSteps, ranks::Ranks, session::SessionError};

/// Bytes of steps that the first process takes in, of all together; and as many of traces.
const MAX_BYTES: usize = 256 << 20;

/// What a process ends with.
pub(super) struct Own<'a> {
    pub steps: Option<RankSteps>,
    pub peak_tensor_bytes: u64,
    pub trace: Option<TraceWriter<BufWriter<File>>>,
    pub trace_file: &'a Path,
}

/// What all ended with: on the first; on the others nothing, and their own peak.
pub(super) struct Gathered {
    /// By rank, of those that have some.
    pub steps: Vec<RankSteps>,
    pub peak_tensor_bytes: u64,
    /// Whether all that was told could be read, and the trace be written.
    pub whole: io::Result<()>,
}

/// What a process tells the first.
#[derive(Serialize, Deserialize)]
struct Told {
    rank: u32,
    peak_tensor_bytes: u64,
    add_nanos: i64,
    error_nanos: u64,
    steps: Option<Vec<u8>>,
    /// A document of its own, by its own clock.
    trace: Option<Vec<u8>>,
}

impl Own<'_> {
    /// Tells the first process, if all ended well; all do. Whoever is lost by now is found by [`lost_process`].
    pub fn gather(mut self, comm: &Comm, ended_well: bool) -> Gathered {
        let all = if ended_well && comm.lost().is_none() { self.tell(comm) } else { Vec::new() };
        let mut gathered = Gathered { steps: Vec::new(), peak_tensor_bytes: self.peak_tensor_bytes, whole: Ok(()) };
        for told in all {
            let added = self.add(&told, &mut gathered);
            gathered.whole = gathered.whole.and(added);
        }
        if let Some(trace) = self.trace {
            gathered.whole = gathered.whole.and(trace.finish().map(drop));
        }
        gathered
    }

    /// What all told, on the first. Whatever fails here, the others are met.
    fn tell(&mut self, comm: &Comm) -> Vec<Vec<u8>> {
        let Ok(offset) = comm.clock_offset() else { return Vec::new() };
        let max_bytes = MAX_BYTES / comm.num_ranks() as usize;
        let trace = self.trace.take_if(|_| comm.rank() > 0).map(TraceWriter::finish);
        let trace = trace.and_then(|written| written.and_then(|_| fs::read(self.trace_file)).ok());
        let told = Told {
            rank: comm.rank(),
            peak_tensor_bytes: self.peak_tensor_bytes,
            add_nanos: offset.add_nanos,
            error_nanos: offset.error_nanos,
            steps: self.steps.as_ref().and_then(|steps| steps.to_bytes(offset, max_bytes)),
            trace: trace.filter(|trace| trace.len() <= max_bytes),
        };
        comm.bytes_to_first(postcard::to_allocvec(&told).unwrap_or_default()).unwrap_or_default()
    }

    fn add(&mut self, told: &[u8], gathered: &mut Gathered) -> io::Result<()> {
        let told: Told = postcard::from_bytes(told).map_err(io::Error::other)?;
        gathered.peak_tensor_bytes = gathered.peak_tensor_bytes.max(told.peak_tensor_bytes);
        if let Some(steps) = told.steps {
            gathered.steps.push(RankSteps::from_bytes(&steps).map_err(io::Error::other)?);
        }
        if let Some((ours, theirs)) = self.trace.as_mut().zip(told.trace) {
            let offset = ClockOffset { add_nanos: told.add_nanos, error_nanos: told.error_nanos };
            ours.append(told.rank, &theirs, offset)?;
        }
        Ok(())
    }
}

/// The process that is gone, and why, if one is; this one too, unless what it found is so for all.
pub(super) fn lost_process(comm: &Comm, own: Option<&ExitReason>) -> Option<ExitReason> {
    match (comm.lost()?, own) {
        (_, Some(ExitReason::Diverged(_) | ExitReason::Infeasible(_))) => None,
        (kernels::error::Error::PeerLost { rank, message }, _) => Some(reason_of_peer(rank, &message)),
        _ => None,
    }
}

/// What another rank's last words come to for this one. If it said that numbers diverged, or that memory does not suffice, then that is
/// the reason everywhere: for whoever sees one of the exit codes only, it is no loss that another start would mend.
fn reason_of_peer(rank: u32, said: &str) -> ExitReason {
    for reason in [ExitReason::Diverged as fn(String) -> ExitReason, ExitReason::Infeasible] {
        if let Some(what) = said.strip_prefix(&reason(String::new()).to_string()) {
            return reason(format!("rank {rank}: {what}"));
        }
    }
    ExitReason::PeerLost(format!("rank {rank}: {said}"))
}

/// The ranks of this process: its own among others, or all.
pub(super) fn ranks_here(distribution: &Distribution, comm: Option<&Comm>) -> Result<Vec<Ranks>, SessionError> {
    let num_ranks = distribution.num_ranks();
    let (replicas, or_replicas) = match distribution.num_replicas {
        1 => (String::new(), ""),
        n => (format!(" in each of {n} replicas"), " or diloco.replicas"),
    };
    match comm {
        Some(comm) if comm.num_ranks() != num_ranks => Err(SessionError::input(format!(
            "the scene's mesh has {} ranks{replicas}, and the launcher started {} processes; start {num_ranks}, or set mesh.pp, \
             mesh.ep, mesh.dp{or_replicas} so that there are {}",
            distribution.mesh.num_ranks(),
            comm.num_ranks(),
            comm.num_ranks()
        ))),
        Some(comm) => Ok(vec![distribution.ranks(comm.clone())]),
        None if num_ranks == 1 => Ok(vec![distribution.ranks(Comm::solo())]),
        None => Ok(distribution.local()),
    }
}

#[cfg(test)]
mod tests {
    use super::{super::exit_code, *};

    #[test]
    fn all_ranks_end_with_the_code_of_the_one_that_failed() {
        for (reason, code, text) in [
            (ExitReason::Diverged("a NaN".into()), 4, "diverged: rank 1: a NaN"),
            (ExitReason::Infeasible("no memory".into()), 3, "infeasible: rank 1: no memory"),
            (ExitReason::Error("no disk".into()), 5, "peer lost: rank 1: no disk"),
        ] {
            let found = reason_of_peer(1, &reason.to_string());
            assert_eq!((exit_code(&found), found.to_string().as_str()), (code, text));
        }
    }
}
