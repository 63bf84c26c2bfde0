//! The other processes of a run: found through the launcher's variables, and asked whether they are to do the same.

use std::{
    hash::{DefaultHasher, Hash as _, Hasher as _},
    process,
    sync::mpsc,
    time::Duration,
};

use kernels::{
    comm::{Comm, launch},
    device::Device,
};

use crate::{
    cli::RunArgs,
    failure::{Failure, PEER_LOST},
    load::Checked,
};

/// The other processes, if a launcher started this one among several. Who does not come within `max_secs` ends this one: MPI itself would
/// wait for ever.
pub(super) fn join(args: &RunArgs, ranks_per_node: u32, max_secs: f64) -> Result<Option<Comm>, Failure> {
    let variable = |name: &str| std::env::var(name).ok();
    let said = args.rank.zip(args.num_ranks);
    let place =
        launch::discover(said, &variable).map_err(|e| Failure::usage(e, "hadal run --help names the variables"))?;
    let Some(place) = place.filter(|place| place.num_ranks > 1) else { return Ok(None) };
    let (joined, waiting) = mpsc::sync_channel::<()>(1);
    let (rank, num_ranks) = (place.rank, place.num_ranks);
    let patience = move || {
        if waiting.recv_timeout(Duration::try_from_secs_f64(max_secs).unwrap_or(Duration::MAX))
            == Err(mpsc::RecvTimeoutError::Timeout)
        {
            eprintln!(
                "error: rank {rank} waited {max_secs} s for MPI to begin with all {num_ranks} processes \
                 (watchdog.first_step_secs): one did not start, or ended before"
            );
            process::exit(PEER_LOST.into());
        }
    };
    let spawned = std::thread::Builder::new().name("patience".into()).spawn(patience);
    spawned.map_err(|e| Failure::runtime(format!("the operating system gave no thread: {e}")))?;
    let (comm, engine) = launch::join(&place, ranks_per_node, &variable).map_err(Failure::runtime)?;
    drop(joined);
    if rank == 0 {
        eprintln!("{num_ranks} processes by {}, over {engine}", place.source);
    }
    Ok(Some(comm))
}

/// Asks all whether they are to run the same.
///
/// # Errors
/// If another cannot run, or this one cannot for the reason that the first one says; on all, if one's scene, program or command line is
/// another one; or if one is lost.
pub(super) fn agree(comm: &Comm, args: &RunArgs, checked: Result<&Checked, &Failure>) -> Result<(), Failure> {
    let scene =
        checked.map_err(Failure::message).and_then(|checked| checked.loaded.to_ron().map_err(|e| e.to_string()));
    let mine = scene.map(|scene| {
        let mut hasher = DefaultHasher::new();
        (scene, env!("CARGO_PKG_VERSION"), args.resume, args.fresh).hash(&mut hasher);
        hasher.finish()
    });
    let told = serde_json::to_vec(&mine).map_err(Failure::runtime)?;
    let told = comm.all_gather_bytes(told).map_err(|lost| Failure::from_peer(&lost))?;
    let all = told.iter().map(|told| serde_json::from_slice(told)).collect::<Result<Vec<Result<u64, String>>, _>>();
    let all = all.map_err(Failure::runtime)?;
    if let Err(failure) = checked {
        // It has more to say of its own, if it is not what the first says.
        let is_said = comm.rank() > 0 && all[0].as_ref().is_err_and(|said| *said == failure.message());
        return if is_said { Err(Failure::SaidByFirst(failure.code())) } else { Ok(()) };
    }
    for (rank, digest) in all.iter().enumerate() {
        if let Err(why) = digest {
            return Err(Failure::usage(format!("rank {rank} cannot begin: {why}"), "mend that first"));
        }
    }
    match all.iter().position(|digest| *digest != all[0]) {
        None => Ok(()),
        Some(rank) => Err(Failure::usage(
            format!("rank {rank} is to run another scene than rank 0, or has another program or command line"),
            "start all ranks with one command, and have all nodes see the same files",
        )),
    }
}

/// How ranks on GPUs meet, if they are on some: it is found by all together, and said once.
pub(super) fn meet_on_gpus(comm: &Comm, device: Device) -> Result<(), Failure> {
    let Device::Cuda(_) = device else { return Ok(()) };
    let gpus = launch::Gpus::said(device, &|name| std::env::var(name).ok());
    let way = comm.meet_on_gpus(&gpus).map_err(|e| Failure::from_peer(&e))?;
    way.filter(|_| comm.rank() == 0).iter().for_each(|way| eprintln!("{way}"));
    Ok(())
}

/// Whoever waits for this rank is told that it does not come.
pub(super) fn give_up(comm: Option<&Comm>, why: &str) {
    if let Some(comm) = comm {
        comm.abort(comm.rank(), why);
    }
}
