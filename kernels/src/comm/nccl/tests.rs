//! The library's functions as they are called here, on the stand-ins for it and for the driver.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::{thread, time::Duration};

use ptxsim_driver::run_ignored as on_standin;

use super::{
    abi::{Functions, Handle, Piece},
    *,
};
use crate::{cuda::Lane, device::Share, memory::Memory, tensor::Tensor};

/// The stand-in, and a folder for it that is not removed: the library stays loaded.
fn standin() -> Functions {
    let folder = std::env::temp_dir().join(format!("ptxsim-nccl-of-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let functions = Functions::load(&ptxsim_nccl::install(&folder).unwrap()).unwrap();
    std::fs::remove_dir_all(&folder).unwrap();
    functions
}

/// Asks until all are at rest, some seconds at most.
fn settle(f: &Functions, comms: &[Handle]) -> Result<bool> {
    for _ in 0..50_000 {
        if comms.iter().try_fold(true, |all, &comm| Ok(f.is_settled(comm)? && all))? {
            return Ok(true);
        }
        thread::sleep(Duration::from_micros(100));
    }
    Ok(false)
}

fn piece(memory: &Memory, member: usize, of: Tensor) -> Piece {
    Piece { member, address: memory.address(of).unwrap(), bytes: of.size_bytes() as usize }
}

fn exchange(f: &Functions, comm: Handle, sends: &[Piece], receives: &[Piece], lane: &Lane) -> Result<()> {
    // SAFETY: the pieces are of tensors of the test's memory, which lives longer than the lane.
    unsafe { f.exchange(comm, sends, receives, lane.handle()) }
}

fn parts() -> (Memory, Arc<Gpu>, Lane) {
    let memory = Memory::open(Device::Cuda(0)).unwrap();
    let gpu = memory.gpu().unwrap().clone();
    gpu.bind().unwrap();
    let lane = Lane::new(&gpu, "test", Share::All).unwrap();
    (memory, gpu, lane)
}

#[test]
fn a_communicator_of_one_goes_every_way() {
    let said = on_standin("comm::nccl::tests::of_one", &[("PTXSIM_STATS", "1")]);
    assert!(said.contains("ptxsim nccl: 4 communicators, 3 aborted, 4 groups, 2 sends of 20 bytes"), "{said}");
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn of_one() {
    let f = standin();
    assert_eq!(f.version, 23203);
    let (memory, _gpu, lane) = parts();
    let make = || {
        let comm = f.begin(1, f.unique_id().unwrap(), 0, None).unwrap();
        assert!(settle(&f, &[comm]).unwrap());
        comm
    };
    let x = memory.from_slice(&[3], &[1f32, 2.0, 3.0]);
    let y = memory.from_slice(&[3], &[0f32; 3]);

    let comm = make();
    exchange(&f, comm, &[piece(&memory, 0, x)], &[piece(&memory, 0, y)], &lane).unwrap();
    assert!(settle(&f, &[comm]).unwrap() && lane.is_done().unwrap());
    assert_eq!(memory.download::<f32>(y), [1.0, 2.0, 3.0]);
    exchange(&f, comm, &[], &[], &lane).unwrap();
    f.finalize(comm).unwrap();
    assert!(settle(&f, &[comm]).unwrap());
    f.destroy(comm).unwrap();
    let error = f.is_settled(comm).unwrap_err().to_string();
    assert!(error.starts_with("ncclCommGetAsyncError: error 4: invalid argument: no such communicator"), "{error}");

    // Sizes that differ.
    let comm = make();
    exchange(&f, comm, &[piece(&memory, 0, x.slice(0, 2))], &[piece(&memory, 0, y)], &lane).unwrap();
    let error = settle(&f, &[comm]).unwrap_err().to_string();
    assert!(error.contains("member 0 sent 8 bytes, where 0 receives 12"), "{error}");
    assert!(error.ends_with("HADAL_NCCL=none does without it"), "{error}");
    f.abort(comm);

    // What nothing is sent for is waited for, and nothing else is done until then.
    let comm = make();
    exchange(&f, comm, &[], &[piece(&memory, 0, y)], &lane).unwrap();
    thread::sleep(Duration::from_millis(20));
    assert!(!f.is_settled(comm).unwrap());
    let error = exchange(&f, comm, &[piece(&memory, 0, x)], &[], &lane).unwrap_err().to_string();
    assert!(error.starts_with("ncclSend: error 5: invalid usage: the communicator is in progress"), "{error}");
    f.abort(comm);
    assert!(f.is_settled(comm).is_err());

    // Members that are not there, and transfers that overlap.
    let comm = make();
    let error = exchange(&f, comm, &[piece(&memory, 1, x)], &[], &lane).unwrap_err().to_string();
    assert!(error.contains("there is no member 1 of 1"), "{error}");
    let error = exchange(&f, comm, &[piece(&memory, 0, x)], &[piece(&memory, 0, x.slice(1, 2))], &lane).unwrap_err();
    assert!(error.to_string().contains("overlaps"), "{error}");
    exchange(&f, comm, &[], &[piece(&memory, 0, y)], &lane).unwrap();
    f.abort(comm);
}

#[test]
fn two_members_meet_and_share_a_gpu_only_if_they_may() {
    on_standin("comm::nccl::tests::of_two", &[("NCCL_MULTI_RANK_GPU_ENABLE", "1")]);
    on_standin("comm::nccl::tests::of_two", &[]);
    let old = [("NCCL_MULTI_RANK_GPU_ENABLE", "1"), ("PTXSIM_NCCL_VERSION", "22907")];
    on_standin("comm::nccl::tests::of_two", &old);
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn of_two() {
    let f = standin();
    let (memory, gpu, a) = parts();
    let b = Lane::new(&gpu, "other", Share::All).unwrap();
    let id = f.unique_id().unwrap();
    let comms = [0, 1].map(|me| f.begin(2, id, me, Some(4)).unwrap());
    let may_share = std::env::var_os("NCCL_MULTI_RANK_GPU_ENABLE").is_some() && f.version >= SHARES_GPUS;
    let met = settle(&f, &comms);
    if !may_share {
        let error = met.unwrap_err().to_string();
        comms.into_iter().for_each(|comm| f.abort(comm));
        return assert!(error.contains("Duplicate GPU detected"), "{error}");
    }
    assert!(met.unwrap());
    let data = [[1f32, 2.0, 3.0, 4.0], [10.0, 20.0, 30.0, 40.0]];
    let [x, y] = data.map(|data| memory.from_slice(&[4], &data));
    // Each sends its second half and receives into its first, twice in a row.
    for _ in 0..2 {
        for (i, (x, lane)) in [(x, &a), (y, &b)].into_iter().enumerate() {
            let (out, into) = (piece(&memory, 1 - i, x.slice(2, 2)), piece(&memory, 1 - i, x.slice(0, 2)));
            exchange(&f, comms[i], &[out], &[into], lane).unwrap();
        }
        assert!(settle(&f, &comms).unwrap());
    }
    assert_eq!(memory.download::<f32>(x), [30.0, 40.0, 3.0, 4.0]);
    assert_eq!(memory.download::<f32>(y), [3.0, 4.0, 30.0, 40.0]);
    // A member that ends takes the other's wait along when that is aborted, and not before.
    exchange(&f, comms[0], &[piece(&memory, 1, x)], &[], &a).unwrap();
    f.abort(comms[1]);
    assert!(!f.is_settled(comms[0]).unwrap());
    f.abort(comms[0]);
}
