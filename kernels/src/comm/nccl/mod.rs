//! Sums, gathers and rows to experts between GPUs of several processes by NCCL, which is loaded at run time and bootstrapped over MPI.
//!
//! NCCL only moves bytes here, by grouped sends and receives: its own reductions have an order of their own, and sums of this crate are
//! in the order of ranks, so that losses have the same bits on every engine. [`collectives`] and [`rows`] say who sends what.
//!
//! Nothing may wait for ever. So an op of NCCL is put on the stream only when all members are there with what they bring: each waits
//! for its own GPU, then all meet over MPI (`Member::meet`), which is also where ranks that call different things are told so; always,
//! in release builds too. Until it is done the stream's thread asks the communicator, which does not block, and the stream, and looks
//! for notices of ranks that gave up; if there is one, every communicator is aborted, and the GPU lets go. A kernel of NCCL therefore
//! never waits for a rank that computes, and while one is under way, this process puts nothing else of NCCL on its GPU, and frees no
//! memory on that stream: there is no cycle of waits.
//!
//! That needs one stream in a process: the first that comes, on the first lane. Ops of other lanes go by the host.
//!
//! What stays with MPI, and why: messages of pipelines, because a send must not wait for its receiver, and one of NCCL would, on the GPU,
//! where it may keep what the receiver waits for from running; rows that are encoded for their way to experts, because the host encodes
//! them; counts (u32), because their sum is checked, and what ranks tell each other of rows.

mod abi;
mod collectives;
mod rows;
mod way;

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::Arc,
    thread::{self, ThreadId},
};

use abi::{Functions, Handle, UniqueId, version_text};
use parking_lot::Mutex;
use serde::{Deserialize, Serialize};

pub(super) use collectives::{all_reduce_at_once, gather, reduce_scatter};
pub(super) use rows::{dispatch, return_rows, send_rows};

use super::{
    Comm, first_that_loads,
    launch::{Gpus, Nccl},
    local::Call,
    mpi,
};
use crate::{
    cuda::{self, Gpu},
    device::Device,
    error::{Error, Result},
};

/// From this version on two ranks may share a GPU, if they are told to.
const SHARES_GPUS: u32 = 23000;

/// A loaded library, and a process's communicators.
pub(super) struct Engine {
    functions: Functions,
    gpu: Arc<Gpu>,
    staging_bytes: usize,
    /// By group, in the numbers of the run.
    comms: Mutex<BTreeMap<Arc<[u32]>, Handle>>,
    /// Whose stream it is.
    thread: Mutex<Option<ThreadId>>,
}

/// What a process says of itself before NCCL is used.
#[derive(Clone, Debug, Serialize, Deserialize)]
struct Said {
    /// The library's version and file, or why there is none.
    nccl: std::result::Result<(u32, PathBuf), String>,
    /// The GPU, or why there is none.
    gpu: std::result::Result<String, String>,
    /// Whether NCCL is told that ranks may share a GPU.
    may_share: bool,
}

/// The first library of these that loads.
fn load(library: &Nccl) -> std::result::Result<Functions, String> {
    let names = match library {
        Nccl::Off => return Err("HADAL_NCCL is `none`".into()),
        Nccl::At(path) => vec![path.clone()],
        Nccl::Usual => abi::NAMES.map(PathBuf::from).to_vec(),
    };
    first_that_loads(names, Functions::load).map_err(|why| format!("no NCCL library loads: {}", why.join("; ")))
}

fn in_words(version: u32, path: &Path) -> String {
    format!("NCCL {} ({})", version_text(version), path.display())
}

/// What this machine has, in words; why there is none, if there is none.
pub(super) fn found(library: &Nccl) -> std::result::Result<String, String> {
    load(library).map(|functions| in_words(functions.version, &functions.path))
}

/// Agrees with all ranks on whether NCCL is used; how tensors go, in words.
pub(super) fn meet(comm: &Comm, hub: &mpi::Hub, gpus: &Gpus) -> Result<String> {
    let gpu = match gpus.device {
        Device::Cuda(ordinal) => cuda::open(ordinal).and_then(|gpu| Ok((gpu.uuid()?, gpu))).map_err(|e| e.to_string()),
        other => Err(format!("{other} is no GPU")),
    };
    let loaded = load(&gpus.nccl);
    let mine = Said {
        nccl: loaded.as_ref().map(|f| (f.version, f.path.clone())).map_err(Clone::clone),
        gpu: gpu.as_ref().map(|(uuid, _)| uuid.clone()).map_err(Clone::clone),
        may_share: gpus.may_share,
    };
    let told = comm.all_gather_bytes(serde_json::to_vec(&mine).unwrap_or_default())?;
    let unclear = |e: serde_json::Error| Error::Comm { op: "meet_on_gpus", message: format!("what a rank says: {e}") };
    let all = told.iter().map(|said| serde_json::from_slice(said).map_err(unclear)).collect::<Result<Vec<Said>>>()?;
    let by_host = |why: String| format!("GPUs meet by the host, over MPI: {why}");
    if let Err(why) = agree(&all) {
        return Ok(by_host(why));
    }
    let (Ok(functions), Ok((_, gpu))) = (loaded, gpu) else { return Ok(by_host("this rank has none".into())) };
    let words = format!("GPUs meet over {}", in_words(functions.version, &functions.path));
    let staging_bytes = gpus.staging_bytes;
    hub.use_nccl(Engine { functions, gpu, staging_bytes, comms: Mutex::default(), thread: Mutex::default() });
    Ok(words)
}

/// Why these ranks cannot use NCCL, if they cannot; the same on each.
fn agree(all: &[Said]) -> std::result::Result<(), String> {
    let mut first: Option<u32> = None;
    for (rank, said) in all.iter().enumerate() {
        let of_rank = |why: &String| format!("{why} (rank {rank})");
        let (version, _) = said.nccl.as_ref().map_err(of_rank)?;
        said.gpu.as_ref().map_err(of_rank)?;
        if *version < abi::OLDEST {
            let (oldest, found) = (version_text(abi::OLDEST), version_text(*version));
            return Err(format!("expected NCCL {oldest} or later, found {found} (rank {rank})"));
        }
        let of_first = *first.get_or_insert(*version);
        if of_first != *version {
            let (a, b) = (version_text(of_first), version_text(*version));
            return Err(format!("rank 0 has NCCL {a}, and rank {rank} {b}; all need the same"));
        }
    }
    let mut ranks = BTreeMap::new();
    for (rank, said) in all.iter().enumerate() {
        let Some(other) = ranks.insert(said.gpu.clone(), rank) else { continue };
        let version = first.unwrap_or_default();
        if version < SHARES_GPUS {
            let (found, shares) = (version_text(version), version_text(SHARES_GPUS));
            return Err(format!(
                "ranks {other} and {rank} are on one GPU, which NCCL {found} refuses; {shares} can do it"
            ));
        }
        if !all.iter().all(|said| said.may_share) {
            return Err(format!(
                "ranks {other} and {rank} are on one GPU, which NCCL refuses unless NCCL_MULTI_RANK_GPU_ENABLE=1 is set for \
                 all ranks"
            ));
        }
    }
    Ok(())
}

impl Engine {
    /// The communicator of a group, in which this rank is `me`; made by all its members when they first meet.
    fn comm(&self, hub: &mpi::Hub, group: &Arc<[u32]>, me: usize, most_blocks: Option<u32>) -> Result<Handle> {
        self.gpu.bind()?;
        let mine = thread::current().id();
        if *self.thread.lock().get_or_insert(mine) != mine {
            let message = "NCCL is for one stream, and two have come to it; give the second a lane of its own, which goes by the host";
            return Err(Error::Comm { op: "nccl", message: message.into() });
        }
        if let Some(comm) = self.comms.lock().get(group) {
            return Ok(*comm);
        }
        let id = if me == 0 { self.functions.unique_id()?.0.to_vec() } else { Vec::new() };
        let call = Call { op: "nccl_communicator", tag: 0, what: String::new() };
        let met = hub.meet((0, group), me, &call, id)?;
        let id = met.all[0].as_slice().try_into().map_err(|_| Error::Comm {
            op: "nccl",
            message: format!(
                "rank {} sent {} bytes as a communicator's name, expected 128",
                group[0],
                met.all[0].len()
            ),
        })?;
        let comm = self.functions.begin(group.len(), UniqueId(id), me, most_blocks)?;
        // Known before it is made, so that a rank that is lost meanwhile ends it.
        self.comms.lock().insert(group.clone(), comm);
        self.until(hub, || self.functions.is_settled(comm))?;
        Ok(comm)
    }

    /// Waits; if that ends in an error, every communicator is aborted, so that the GPU waits for nobody.
    fn until(&self, hub: &mpi::Hub, mut is_done: impl FnMut() -> Result<bool>) -> Result<()> {
        hub.wait_until(&mut is_done).inspect_err(|_| self.abort())
    }

    /// Aborts all communicators.
    pub fn abort(&self) {
        let comms = std::mem::take(&mut *self.comms.lock());
        comms.into_values().for_each(|comm| self.functions.abort(comm));
    }

    /// Ends all communicators in good order; all ranks do.
    pub fn end(&self, hub: &mpi::Hub) -> Result<()> {
        self.gpu.bind()?;
        let comms: Vec<Handle> = self.comms.lock().values().copied().collect();
        comms.iter().try_for_each(|&comm| self.functions.finalize(comm))?;
        let mut all_settled = || comms.iter().try_fold(true, |all, &comm| Ok(self.functions.is_settled(comm)? && all));
        self.until(hub, &mut all_settled)?;
        self.comms.lock().clear();
        comms.iter().try_for_each(|&comm| self.functions.destroy(comm))
    }
}

#[cfg(test)]
mod tests;

#[cfg(test)]
mod agreements {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn said(version: u32, gpu: &str) -> Said {
        Said { nccl: Ok((version, "libnccl.so.2".into())), gpu: Ok(gpu.into()), may_share: false }
    }

    #[test]
    fn ranks_use_nccl_if_all_can_and_else_say_who_cannot() {
        let shared = |version| Said { may_share: true, ..said(version, "a") };
        let none = Said { nccl: Err("HADAL_NCCL is `none`".into()), ..said(0, "c") };
        let no_gpu = Said { gpu: Err("no driver".into()), ..said(23203, "") };
        let cases = [
            (vec![said(23203, "a"), said(23203, "b")], None),
            (vec![shared(23203), shared(23203)], None),
            (vec![said(23203, "a"), none], Some("HADAL_NCCL is `none` (rank 1)")),
            (vec![said(23203, "a"), no_gpu], Some("no driver (rank 1)")),
            (vec![said(21703, "a")], Some("expected NCCL 2.18.0 or later, found 2.17.3 (rank 0)")),
            (
                vec![said(23203, "a"), said(22907, "b")],
                Some("rank 0 has NCCL 2.32.3, and rank 1 2.29.7; all need the same"),
            ),
            (vec![shared(22907), shared(22907)], Some("ranks 0 and 1 are on one GPU, which NCCL 2.29.7 refuses")),
            (
                vec![said(23203, "b"), said(23203, "a"), said(23203, "a")],
                Some("ranks 1 and 2 are on one GPU, which NCCL refuses unless NCCL_MULTI_RANK_GPU_ENABLE=1"),
            ),
        ];
        for (all, want) in cases {
            let found = agree(&all);
            match want {
                None => assert_eq!(found, Ok(()), "{all:?}"),
                Some(want) => assert!(found.as_ref().is_err_and(|why| why.contains(want)), "{found:?} of {all:?}"),
            }
        }
    }

    #[test]
    fn what_does_not_load_is_said_with_the_loaders_words() {
        let why = found(&Nccl::At("/nowhere/libnccl.so.2".into())).unwrap_err();
        assert!(why.starts_with("no NCCL library loads: /nowhere/libnccl.so.2: "), "{why}");
        assert_eq!(found(&Nccl::Off).unwrap_err(), "HADAL_NCCL is `none`");
    }
}
