//! Collectives of processes whose tensors are on GPUs, by NCCL: sums in the order of ranks to the bit, gathers, groups and windows, and
//! ranks that call different things. Under `mpiexec`, on the stand-ins.
//!
//! `HADAL_TEST_MPI` has folders of MPI libraries, as for `tests/mpi.rs` of the whole; the first one, MPICH's, is taken.

use std::{env, fs, ops::Range, path::PathBuf, process::Command, sync::Arc};

use kernels::{
    comm::{Comm, launch, meter::Meter},
    device::Device,
    dtype::DType,
    memory::Memory,
    stream::Stream,
    tensor::Tensor,
};

/// Runs the ignored test as so many processes, all of which pass; what they say, or `None` where there is no MPI.
fn under_mpi(test: &str, num_ranks: u32, settings: &[(&str, &str)]) -> Option<String> {
    let (success, said) = launched(test, num_ranks, settings)?;
    assert!(success, "{said}");
    assert_eq!(said.matches("1 passed").count(), num_ranks as usize, "{said}");
    Some(said)
}

/// The same whether or not they pass, with a loud word where there is no MPI.
fn launched(test: &str, num_ranks: u32, settings: &[(&str, &str)]) -> Option<(bool, String)> {
    let list = env::var_os("HADAL_TEST_MPI").unwrap_or_default();
    let Some(prefix) = env::split_paths(&list).next().filter(|path| path.is_dir()) else {
        eprintln!(
            "!! SKIPPED: HADAL_TEST_MPI names no MPI library; `pip install mpich` in a virtual environment makes one"
        );
        return None;
    };
    let names = ["libmpi_abi.so.1", "libmpi_abi.so.0", "libmpi.so.40", "libmpi.so.12"];
    let library = names.iter().map(|name| prefix.join("lib").join(name)).find(|path| path.exists()).unwrap();
    let folder = env::temp_dir().join(format!("nccl-{}-{test}-{num_ranks}", std::process::id()));
    fs::create_dir_all(&folder).unwrap();
    let output = Command::new(prefix.join("bin/mpiexec"))
        .args(["-n", &num_ranks.to_string()])
        .arg(env::current_exe().unwrap())
        .args([&format!("nccl::{test}"), "--exact", "--ignored", "--nocapture", "--test-threads=1"])
        .env("LD_LIBRARY_PATH", ptxsim_driver::install(&folder).unwrap())
        .env("HADAL_NCCL", ptxsim_nccl::install(&folder).unwrap())
        .env("HADAL_MPI", library)
        // Where the stand-in has its messages.
        .env("TMPDIR", &folder)
        .env("PTXSIM_STATS", "1")
        .envs(settings.iter().copied())
        .output()
        .unwrap();
    fs::remove_dir_all(&folder).unwrap();
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    Some((output.status.success(), text(&output.stdout) + &text(&output.stderr)))
}

/// Joins the other processes; with how their GPUs meet.
fn join() -> (Comm, String, Memory, Stream) {
    let variable = |name: &str| env::var(name).ok();
    let place = launch::discover(None, &variable).unwrap().unwrap();
    let (comm, _) = launch::join(&place, 2, &variable).unwrap();
    let gpus = launch::Gpus::said(Device::Cuda(0), &variable);
    let staging_bytes = variable("STAGING").map_or(gpus.staging_bytes, |text| text.parse().unwrap());
    let way = comm.meet_on_gpus(&launch::Gpus { staging_bytes, ..gpus }).unwrap().unwrap();
    let memory = Memory::open(Device::Cuda(0)).unwrap();
    let s = Stream::new("comm", &memory, &Arc::default()).unwrap();
    (comm, way, memory, s)
}

/// What rank `rank` has: numbers whose sum depends on the order.
fn data(rank: u32, len: usize, seed: u32) -> Vec<f32> {
    let one = |i: usize| {
        let mut x = (i as u32).wrapping_mul(0x9E37_79B9) ^ rank.wrapping_mul(0x85EB_CA6B) ^ seed;
        x = (x ^ (x >> 15)).wrapping_mul(0x2C1B_3C6D);
        x ^= x >> 12;
        (f64::from(x) / f64::from(u32::MAX) - 0.5) as f32 * 10f32.powi((x % 7) as i32 - 3)
    };
    (0..len).map(one).collect()
}

fn upload(memory: &Memory, dtype: DType, x: &[f32]) -> Tensor {
    match dtype {
        DType::F32 => memory.from_slice(&[x.len()], x),
        DType::Bf16 => memory.from_slice(&[x.len()], &x.iter().map(|x| half::bf16::from_f32(*x)).collect::<Vec<_>>()),
        DType::F64 => memory.from_slice(&[x.len()], &x.iter().map(|x| f64::from(*x)).collect::<Vec<_>>()),
        _ => memory.from_slice(&[x.len()], &x.iter().map(|x| x.to_bits() >> 8).collect::<Vec<_>>()),
    }
}

/// As bits, whatever the type.
fn bits(memory: &Memory, x: Tensor) -> Vec<u64> {
    match x.dtype {
        DType::F32 => memory.download::<f32>(x).into_iter().map(|x| u64::from(x.to_bits())).collect(),
        DType::Bf16 => memory.download::<half::bf16>(x).into_iter().map(|x| u64::from(x.to_bits())).collect(),
        DType::F64 => memory.download::<f64>(x).into_iter().map(f64::to_bits).collect(),
        _ => memory.download::<u32>(x).into_iter().map(u64::from).collect(),
    }
}

fn even(len: usize, n: usize) -> Arc<[Range<usize>]> {
    (0..n).map(|i| len * i / n..len * (i + 1) / n).collect()
}

/// Each collective on tensors of several sizes and types, on one end.
fn all_ops(comm: &Comm, group: &Arc<[u32]>, memory: &Memory, s: &mut Stream) -> (Vec<Vec<u64>>, Meter) {
    let mut results = Vec::new();
    let n = group.len();
    comm.take_meter();
    for dtype in [DType::F32, DType::Bf16, DType::F64, DType::U32] {
        // All at once, and in parts; a part that is empty, and parts that are not all of it.
        for (seed, len) in [(1, 1), (2, 999), (3, 17_000)] {
            let x = upload(memory, dtype, &data(comm.rank(), len, seed));
            comm.all_reduce_sum(s, group, x, 7).unwrap();
            results.push(x);
        }
        let mut ragged = even(1000, n).to_vec();
        ragged[0] = 3..3;
        for parts in [even(5000, n), even(1003, n), ragged.into()] {
            let x = upload(memory, dtype, &data(comm.rank(), 5001, 4));
            comm.reduce_scatter_sum(s, group, x.slice(1, 5000), parts.clone(), 8).unwrap();
            comm.all_gather(s, group, x.slice(1, 5000), parts, 9).unwrap();
            results.push(x);
        }
    }
    s.synchronize().unwrap();
    (results.into_iter().map(|x| bits(memory, x)).collect(), comm.take_meter())
}

/// The same on ranks that are threads, on a CPU.
fn on_threads(num_ranks: u32, window: Option<u32>, group: &Arc<[u32]>, rank: u32) -> (Vec<Vec<u64>>, Meter) {
    let ends = Comm::local(num_ranks, 2);
    std::thread::scope(|scope| {
        let ranks: Vec<_> = ends
            .into_iter()
            .map(|comm| {
                let body = move || {
                    let comm = window.map_or(comm.clone(), |size| comm.window(comm.rank() / size * size, size));
                    let memory = Memory::new(Device::Cpu);
                    let mut s = Stream::new("cpu", &memory, &Arc::default()).unwrap();
                    group.contains(&comm.rank()).then(|| all_ops(&comm, group, &memory, &mut s))
                };
                std::thread::Builder::new().spawn_scoped(scope, body).unwrap()
            })
            .collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).nth(rank as usize).unwrap().unwrap()
    })
}

#[test]
fn collectives_of_processes_on_gpus_have_the_bits_and_the_bytes_of_threads() {
    // In one round, and in many.
    for (num_ranks, staging) in [(2, "67108864"), (4, "67108864"), (4, "3000")] {
        let Some(said) = under_mpi("members", num_ranks, &[("STAGING", staging)]) else { return };
        let sent: u64 = said
            .lines()
            .filter_map(|line| line.split_once(" sends of ")?.1.split(' ').next()?.parse::<u64>().ok())
            .sum();
        assert!(said.contains("GPUs meet over NCCL 2.32.3") && sent > 100_000, "{sent} bytes went by NCCL: {said}");
    }
}

#[test]
#[ignore = "run by the test above it, as several processes on stand-ins"]
fn members() {
    let (comm, way, memory, mut s) = join();
    eprintln!("{way}");
    assert!(way.starts_with("GPUs meet over NCCL 2.32.3 ("), "{way}");
    let n = comm.num_ranks();
    let mut groups = vec![comm.everyone()];
    if n > 2 {
        groups.extend([Arc::from([0, 2, 3]), Arc::from([1, 3])]);
    }
    for group in groups.iter().filter(|group| group.contains(&comm.rank())) {
        let (found, bytes) = all_ops(&comm, group, &memory, &mut s);
        let (want, meter) = on_threads(n, None, group, comm.rank());
        assert!(found == want, "the bits of rank {} in {group:?}", comm.rank());
        assert_eq!(bytes, meter, "the bytes of rank {} in {group:?}", comm.rank());
    }
    if n > 2 {
        let (window, group): (Comm, Arc<[u32]>) = (comm.window(comm.rank() / 2 * 2, 2), Arc::from([0, 1]));
        let (found, bytes) = all_ops(&window, &group, &memory, &mut s);
        let (want, meter) = on_threads(n, Some(2), &group, comm.rank());
        assert!(found == want && bytes == meter, "rank {} in a window", comm.rank());
    }
    // Sums of counts and other lanes go by the host, and what goes by NCCL does not.
    let hosts = memory.gpu().unwrap().host_ops();
    let expected = (groups.iter().filter(|group| group.contains(&comm.rank())).count() + usize::from(n > 2)) as u64;
    assert_eq!(hosts.get("all_reduce_sum").copied(), Some(3 * expected), "{hosts:?}");
    let x = upload(&memory, DType::F32, &data(comm.rank(), 100, 5));
    comm.lane(1).all_reduce_sum(&mut s, &comm.everyone(), x, 7).unwrap();
    s.synchronize().unwrap();
    assert_eq!(memory.gpu().unwrap().host_ops().get("all_reduce_sum").copied(), Some(3 * expected + 1));
    comm.barrier().unwrap();
}

#[test]
fn ranks_that_call_different_things_are_told_so_before_anything_moves() {
    // A process that ends without MPI's farewell takes the other along, and the launcher is not content.
    let Some((_, said)) = launched("at_odds", 2, &[]) else { return };
    assert_eq!(said.matches("told so: ").count(), 2, "{said}");
    assert!(said.contains("0 groups, 0 sends") && !said.contains("FAILED"), "{said}");
}

#[test]
#[ignore = "run by the test above it, as several processes on stand-ins"]
fn at_odds() {
    let (comm, _, memory, mut s) = join();
    let x = memory.from_slice(&[10], &[1f32; 10]);
    let x = if comm.rank() == 0 { x } else { x.slice(0, 9) };
    comm.all_reduce_sum(&mut s, &comm.everyone(), x, 7).unwrap();
    let error = s.synchronize().unwrap_err().to_string();
    assert!(
        error.contains("all members of a group call the same collectives") || error.contains(" is lost: "),
        "{error}"
    );
    eprintln!("told so: {error}");
    // The other is to say it too.
    std::thread::sleep(std::time::Duration::from_secs(1));
}

#[test]
fn what_keeps_ranks_from_nccl_is_said_and_mpi_does_it() {
    let nowhere = PathBuf::from("/nowhere/libnccl.so.2");
    for (settings, why) in [
        (vec![("HADAL_NCCL", "none")], "HADAL_NCCL is `none` (rank 0)"),
        (vec![("HADAL_NCCL", nowhere.to_str().unwrap())], "no NCCL library loads: /nowhere/libnccl.so.2: "),
        (
            vec![("PTXSIM_UUID", "7")],
            "ranks 0 and 1 are on one GPU, which NCCL refuses unless NCCL_MULTI_RANK_GPU_ENABLE=1",
        ),
        (
            vec![("PTXSIM_UUID", "7"), ("PTXSIM_NCCL_VERSION", "22907"), ("NCCL_MULTI_RANK_GPU_ENABLE", "1")],
            "ranks 0 and 1 are on one GPU, which NCCL 2.29.7 refuses",
        ),
    ] {
        let Some(said) = under_mpi("without", 2, &[&settings[..], &[("EXPECTED", why)]].concat()) else { return };
        assert!(!said.contains("communicators"), "{said}");
    }
    // Two on one GPU, where they may.
    under_mpi("members", 2, &[("PTXSIM_UUID", "7"), ("NCCL_MULTI_RANK_GPU_ENABLE", "1")]);
}

#[test]
#[ignore = "run by the test above it, as several processes on stand-ins"]
fn without() {
    let (comm, way, memory, mut s) = join();
    let why = env::var("EXPECTED").unwrap();
    assert!(way.starts_with(&format!("GPUs meet by the host, over MPI: {why}")), "{way}");
    let x = memory.from_slice(&[3], &[1f32, 2.0, 3.0]);
    comm.all_reduce_sum(&mut s, &comm.everyone(), x, 7).unwrap();
    s.synchronize().unwrap();
    assert_eq!(memory.download::<f32>(x), [2.0, 4.0, 6.0]);
    comm.barrier().unwrap();
}
