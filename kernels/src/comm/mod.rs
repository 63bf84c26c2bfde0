//! Communication between ranks, as ops on streams.
//!
//! A [`Comm`] is one rank's end. What it promises does not depend on the engine behind it. [`local`](Comm::local): N ranks are N threads
//! of a process, each with a memory and streams of its own, that share nothing but a hub. [`mpi`](Comm::mpi): they are processes; with
//! [`meet_on_gpus`](Comm::meet_on_gpus), sums and gathers of tensors on GPUs go by NCCL. All give the same bits. [`Comm::planned`] has no engine: streams on [`Device::Meta`](crate::device::Device::Meta) and recordings need none.
//!
//! - Messages ([`Comm::send`], [`Comm::receive`]) are matched by sender, receiver and tag, in order. A send does not wait.
//! - Collectives ([`Comm::all_reduce_sum`], ...) are called by all ranks of a group in one order. Their tag does not match them,
//!   it is compared: ranks that call different things are told so. Collectives that two streams run beside each other have no
//!   common order; give each stream a [`Comm::lane`] of its own, as one gives it a communicator of its own elsewhere.
//! - [`exchange`] moves rows to the ranks of their experts and back.
//! - [`Comm::all_reduce_mean`] is a mean over ranks that are far apart, in few bytes.
//! - [`Comm::window`] is a part of a run's ranks, numbered as if there were no others.
//!
//! Sums are in the order of ranks, so their bits are the same on every rank. An op between ranks blocks its stream's thread,
//! never the host. A rank that cannot go on calls [`Comm::abort`], and nobody waits for it; ops that find ranks at odds do so
//! themselves. Whoever drives a rank must do it when a stream fails for another reason, or when its thread unwinds.

pub mod average;
mod clocks;
pub mod collectives;
pub mod exchange;
pub mod launch;
mod local;
mod messages;
pub mod meter;
mod mpi;
#[cfg(feature = "cuda")]
mod nccl;
#[cfg(not(feature = "cuda"))]
#[path = "nccl_absent.rs"]
mod nccl;
mod pack;
pub mod shares;
pub mod spread;
pub mod watch;
pub mod wire;

use std::{
    panic::{AssertUnwindSafe, catch_unwind, resume_unwind},
    path::Path,
    sync::Arc,
};

use local::Call;
use meter::{LinkBytes, Meter, Traffic};
use parking_lot::Mutex;

pub use average::Coding;
pub use clocks::ClockOffset;
pub use exchange::{Exchange, Received};
use pack::{Brought, ForFirst, Met};
pub use spread::{Choice, Spread};
use watch::{Limits, Watch};
pub use wire::Wire;

use crate::{
    cost::Cost,
    dtype::Storage,
    error::{Error, Result},
    stream::{Here, Rendezvous, Stream, Waited},
    tensor::Tensor,
};

/// Runs `$body` with `$t` bound to the Rust type of any `$dtype`.
macro_rules! with_element {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::DType::U32 => {
                type $t = u32;
                $body
            }
            dtype => $crate::with_float!(dtype, $t => $body),
        }
    };
}
use with_element;

/// One rank's end of the communication of a run, or of a window on its ranks. Cheap to clone; clones are the same rank and share its
/// meter.
#[derive(Clone)]
pub struct Comm {
    /// In the window, as all numbers of ranks that callers say.
    rank: u32,
    /// Number in the run of the window's first rank.
    first: u32,
    num_ranks: u32,
    ranks_per_node: u32,
    lane: u32,
    hub: Option<Hub>,
    meter: Arc<Mutex<Meter>>,
    watch: Arc<Watch>,
}

/// What is behind an end.
#[derive(Clone)]
enum Hub {
    /// Ranks are threads.
    Local(Arc<local::Hub>),
    /// Ranks are processes.
    Mpi(Arc<mpi::Hub>),
}

impl Hub {
    fn send(&self, between: (u32, u32), tag: u64, data: Storage) -> Result<u64> {
        match self {
            Hub::Local(hub) => hub.send(between, tag, data),
            Hub::Mpi(hub) => hub.send(between, tag, data),
        }
    }

    fn receive(&self, between: (u32, u32), tag: u64) -> Result<(Storage, u64)> {
        match self {
            Hub::Local(hub) => hub.receive(between, tag),
            Hub::Mpi(hub) => hub.receive(between, tag),
        }
    }

    /// What all members of a group brought.
    fn meet<T: Brought>(&self, on: (u32, &Arc<[u32]>), me: usize, call: Call, mine: T) -> Result<Met<T>> {
        match self {
            #[cfg(test)]
            Hub::Local(hub) if hub.packs => testing::meet_packed(hub, on, me, call, mine),
            Hub::Local(hub) => {
                let (all, nanos) = hub.meet(on, me, call, mine)?;
                Ok(Met { all, nanos, handed_bytes: None })
            }
            Hub::Mpi(hub) => hub.meet(on, me, &call, mine),
        }
    }

    fn abort(&self, rank: u32, message: &str) {
        match self {
            Hub::Local(hub) => hub.abort(rank, message),
            Hub::Mpi(hub) => hub.abort(rank, message),
        }
    }

    fn lost(&self) -> Option<Error> {
        match self {
            Hub::Local(hub) => hub.lost(),
            Hub::Mpi(hub) => hub.lost(),
        }
    }

    fn halt(&self, rank: u32) {
        match self {
            Hub::Local(hub) => hub.halt(rank),
            Hub::Mpi(hub) => hub.halt(),
        }
    }
}

/// The lane of what the host does; no stream has it.
const HOST_LANE: u32 = u32::MAX;

impl Comm {
    /// The only rank of a run of one.
    pub fn solo() -> Self {
        Self::end(0, 1, 1, Some(Hub::Local(Arc::new(local::Hub::new(1)))))
    }

    /// All ends of `num_ranks` ranks in this process, by rank; ranks are counted onto nodes of `ranks_per_node`, which links are
    /// metered by.
    ///
    /// # Panics
    /// If either is 0.
    pub fn local(num_ranks: u32, ranks_per_node: u32) -> Vec<Self> {
        let hub = Hub::Local(Arc::new(local::Hub::new(num_ranks)));
        (0..num_ranks).map(|rank| Self::end(rank, num_ranks, ranks_per_node, Some(hub.clone()))).collect()
    }

    /// This process's end among those that a launcher started, through MPI; `None`, with what the loader said of each library, if
    /// there is none. Once in a process.
    ///
    /// # Errors
    /// If MPI does not start.
    ///
    /// # Panics
    /// If `ranks_per_node` is 0.
    pub fn mpi(libraries: &[&Path], ranks_per_node: u32) -> Result<std::result::Result<(Self, String), Vec<String>>> {
        Ok(mpi::Hub::start(libraries)?.map(|hub| {
            let (rank, num_ranks, version) = (hub.rank(), hub.num_ranks(), hub.version());
            (Self::end(rank, num_ranks, ranks_per_node, Some(Hub::Mpi(Arc::new(hub)))), version)
        }))
    }

    /// From here on sums and gathers of tensors on these GPUs go by NCCL, if all ranks can; how they go, in words. All ranks call it, where
    /// they are processes. For one stream only, on the first lane: others go by the host.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn meet_on_gpus(&self, gpus: &launch::Gpus) -> Result<Option<String>> {
        match &self.hub {
            Some(Hub::Mpi(hub)) if self.num_ranks > 1 => nccl::meet(self, hub, gpus).map(Some),
            _ => Ok(None),
        }
    }

    /// Whether other ranks are other processes.
    pub fn is_across_processes(&self) -> bool {
        matches!(self.hub, Some(Hub::Mpi(_))) && self.num_ranks > 1
    }

    /// Gets on with what was sent, where that needs this process: whoever drives a rank calls it between tasks.
    ///
    /// # Errors
    /// If the engine failed.
    pub fn progress(&self) -> Result<()> {
        match &self.hub {
            Some(Hub::Mpi(hub)) => hub.progress(),
            _ => Ok(()),
        }
    }

    /// What this rank is in.
    pub fn watch(&self) -> &Watch {
        &self.watch
    }

    /// Starts to watch over the others, where they are processes: one that is silent or does not come when it is waited for is lost
    /// after these limits, as if it had given up, and a process that then does not end by itself is ended, with exit code 5. All
    /// ranks do so.
    ///
    /// # Errors
    /// If the engine failed.
    pub fn watch_over(&self, limits: Limits) -> Result<()> {
        match &self.hub {
            Some(Hub::Mpi(hub)) if self.num_ranks > 1 => hub.watch_over(&self.watch, limits),
            _ => Ok(()),
        }
    }

    /// An end without an engine, to record ops and to launch them on `Meta`.
    ///
    /// # Panics
    /// If there is no such rank, or `ranks_per_node` is 0.
    pub fn planned(rank: u32, num_ranks: u32, ranks_per_node: u32) -> Self {
        Self::end(rank, num_ranks, ranks_per_node, None)
    }

    fn end(rank: u32, num_ranks: u32, ranks_per_node: u32, hub: Option<Hub>) -> Self {
        assert!(rank < num_ranks && ranks_per_node > 0, "rank {rank} of {num_ranks}, {ranks_per_node} to a node");
        let watch = Arc::new(Watch::new(rank));
        Comm { rank, first: 0, num_ranks, ranks_per_node, lane: 0, hub, meter: Arc::default(), watch }
    }

    /// The same end with the ranks `first..first + num_ranks` only, which are numbered from 0 there: a part of a run that is laid out as
    /// if it were one of its own. Only [`Rendezvous`], and who is told of as lost, keep the numbers of the run.
    ///
    /// # Panics
    /// If this rank is not one of them, or there are not so many.
    #[must_use]
    pub fn window(&self, first: u32, num_ranks: u32) -> Self {
        let ranks = first..first + num_ranks;
        assert!(ranks.contains(&self.rank) && ranks.end <= self.num_ranks, "rank {} in {ranks:?}", self.rank);
        Comm { rank: self.rank - first, first: self.first + first, num_ranks, ..self.clone() }
    }

    /// The same end with a meter of its own.
    #[must_use]
    pub fn metered_apart(&self) -> Self {
        Comm { meter: Arc::default(), ..self.clone() }
    }

    /// A rank's number in the run.
    fn in_run(&self, rank: u32) -> u32 {
        self.first + rank
    }

    /// A group by the numbers of the run.
    fn group_in_run(&self, group: &Arc<[u32]>) -> Arc<[u32]> {
        if self.first == 0 { group.clone() } else { group.iter().map(|&rank| self.in_run(rank)).collect() }
    }

    /// The same end, with collectives that meet only those of the same lane: for a second stream. Lanes start at 0, the first.
    #[must_use]
    pub fn lane(&self, lane: u32) -> Self {
        Comm { lane: lane.min(HOST_LANE - 1), ..self.clone() }
    }

    /// This rank.
    pub fn rank(&self) -> u32 {
        self.rank
    }

    /// Ranks of the run.
    pub fn num_ranks(&self) -> u32 {
        self.num_ranks
    }

    /// Ranks on each node; the last may have fewer.
    pub fn ranks_per_node(&self) -> u32 {
        self.ranks_per_node
    }

    /// The node that a rank is on.
    pub fn node_of(&self, rank: u32) -> u32 {
        self.in_run(rank) / self.ranks_per_node
    }

    /// All ranks, as a group.
    pub fn everyone(&self) -> Arc<[u32]> {
        (0..self.num_ranks).collect()
    }

    /// Bytes sent so far, or since [`Comm::take_meter`].
    pub fn meter(&self) -> Meter {
        *self.meter.lock()
    }

    /// The same, and starts again from 0.
    pub fn take_meter(&self) -> Meter {
        std::mem::take(&mut *self.meter.lock())
    }

    /// The bytes of every rank, by rank. Blocks the caller; not for use in a step.
    pub fn all_gather_bytes(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let all = self.host_meeting("all_gather_bytes", bytes)?;
        Ok(all.iter().map(|bytes| bytes.to_vec()).collect())
    }

    /// On the first rank the bytes of every rank, by rank; none on the others. Blocks the caller; not for use in a step.
    pub fn bytes_to_first(&self, bytes: Vec<u8>) -> Result<Vec<Vec<u8>>> {
        let all = self.host_meeting("bytes_to_first", ForFirst(bytes))?;
        let is_first = self.rank == 0;
        Ok(all.into_iter().filter(|_| is_first).map(|bytes| bytes.0.clone()).collect())
    }

    /// Blocks the caller until all ranks are here.
    pub fn barrier(&self) -> Result<()> {
        self.host_meeting::<Vec<u8>>("barrier", Vec::new()).map(drop)
    }

    fn host_meeting<T: Brought>(&self, op: &'static str, mine: T) -> Result<Vec<Arc<T>>> {
        let hub = self.hub(op)?;
        let call = Call { op, tag: 0, what: String::new() };
        let group = self.group_in_run(&self.everyone());
        let _under_way = self.watch.enter(op, HOST_LANE, Rendezvous::Collective { group: group.clone(), tag: 0 });
        let met = hub.meet((HOST_LANE, &group), self.rank as usize, call, mine);
        met.inspect_err(|error| self.give_up(error)).map(|met| met.all)
    }

    /// Gives up for `rank`: whoever waits or will wait in an op of this run gets [`Error::PeerLost`] at once. The first call's
    /// rank and message stand.
    pub fn abort(&self, rank: u32, message: &str) {
        if let Some(hub) = &self.hub {
            hub.abort(self.in_run(rank), message);
        }
    }

    /// What was given up for, if it was.
    pub fn lost(&self) -> Option<Error> {
        self.hub.as_ref()?.lost()
    }

    /// Ops of this rank's streams that wait for others end with [`Error::Halted`] from here on, and never work again: all ranks have
    /// agreed that nobody needs them. What the host brings to others goes on.
    pub fn halt(&self) {
        if let Some(hub) = &self.hub {
            hub.halt(self.in_run(self.rank));
        }
    }

    /// Aborts for an error of this rank's own.
    fn give_up(&self, error: &Error) {
        if !matches!(error, Error::PeerLost { .. } | Error::Halted) {
            self.abort(self.rank, &error.to_string());
        }
    }

    fn hub(&self, op: &'static str) -> Result<&Hub> {
        self.hub.as_ref().ok_or_else(|| Error::Comm {
            op,
            message: format!(
                "rank {} is planned and has no engine; record, launch on Meta, or use Comm::local",
                self.rank
            ),
        })
    }

    /// The common part of ops: records the meeting, the cost and the tensors, and runs `job` on the stream; its error aborts.
    fn launch(
        &self,
        s: &mut Stream,
        op: &'static str,
        (reads, writes): (&[Tensor], &[Tensor]),
        rendezvous: impl FnOnce() -> Rendezvous,
        cost: Cost,
        job: impl FnOnce(&Comm, &Hub, &mut Here) -> Result<Waited> + Send + 'static,
    ) -> Result<()> {
        if s.runs() {
            self.hub(op)?;
        }
        let on = rendezvous();
        s.meet(|| on.clone());
        s.account(cost);
        let comm = self.clone();
        s.launch_waiting(op, reads, writes, move |here| {
            let watched = || {
                // Who has not what it brings is not there yet.
                here.ready()?;
                let _under_way = comm.watch.enter(op, comm.lane, on);
                comm.hub(op).and_then(|hub| job(&comm, hub, here))
            };
            match catch_unwind(AssertUnwindSafe(watched)) {
                Ok(Ok(waited)) => waited,
                Ok(Err(error)) => {
                    comm.give_up(&error);
                    // Not a panic: there is no message to print, the stream hands the error on.
                    resume_unwind(Box::new(error))
                }
                Err(panic) => {
                    comm.abort(comm.rank, &format!("{op} panicked"));
                    resume_unwind(panic)
                }
            }
        });
        Ok(())
    }

    /// Meters bytes. Where some were handed to an engine, they are as many.
    fn count(&self, traffic: Traffic, bytes: LinkBytes, handed: Option<LinkBytes>) {
        debug_assert!(
            handed.is_none_or(|handed| handed == bytes),
            "rank {} meters {bytes:?} of {traffic:?}, where {handed:?} were handed over",
            self.rank
        );
        *self.meter.lock().of(traffic) += bytes;
    }

    /// So many bytes on the links to each of a group.
    fn bytes_to(&self, group: &[u32], bytes: impl Iterator<Item = u64>) -> LinkBytes {
        group.iter().zip(bytes).map(|(&to, bytes)| self.link_bytes(to, bytes)).sum()
    }

    /// So many bytes on the link to `to`; none to oneself.
    fn link_bytes(&self, to: u32, bytes: u64) -> LinkBytes {
        match (to == self.rank, self.node_of(to) == self.node_of(self.rank)) {
            (true, _) => LinkBytes::default(),
            (_, true) => LinkBytes { intra_node: bytes, inter_node: 0 },
            (_, false) => LinkBytes { intra_node: 0, inter_node: bytes },
        }
    }

    fn expect_peer(&self, op: &'static str, peer: u32) -> Result<()> {
        if peer < self.num_ranks {
            return Ok(());
        }
        let message = format!("rank {} names rank {peer}, ranks are 0..{}", self.rank, self.num_ranks);
        Err(Error::Comm { op, message })
    }

    /// This rank's place in a group, which must ascend and have it.
    fn place_in(&self, op: &'static str, group: &[u32]) -> Result<usize> {
        let fits = group.is_sorted_by(|a, b| a < b) && group.last().is_some_and(|&last| last < self.num_ranks);
        group.iter().position(|&rank| rank == self.rank).filter(|_| fits).ok_or_else(|| {
            let message = format!(
                "rank {} of {} calls it for the group {group:?}; a group has its callers, ascending",
                self.rank, self.num_ranks
            );
            Error::Comm { op, message }
        })
    }
}

/// What the loader says of a library; its error by itself says that it failed.
fn loaders_words(e: libloading::Error) -> String {
    let said = std::error::Error::source(&e).map(ToString::to_string);
    said.unwrap_or_else(|| e.to_string())
}

/// The first library of these that loads, or why each is not used.
fn first_that_loads<F>(
    paths: impl IntoIterator<Item = impl AsRef<Path>>,
    load: impl Fn(&Path) -> std::result::Result<F, String>,
) -> std::result::Result<F, Vec<String>> {
    let mut why = Vec::new();
    for path in paths {
        match load(path.as_ref()) {
            Ok(functions) => return Ok(functions),
            Err(message) => {
                // The loader names the file, and others do not.
                let name = path.as_ref().display().to_string();
                why.push(if message.starts_with(&name) { message } else { format!("{name}: {message}") });
            }
        }
    }
    Err(why)
}

#[cfg(test)]
pub(crate) mod testing;
#[cfg(test)]
mod tests;
