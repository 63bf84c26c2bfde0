//! Tasks per second and memory of the joint simulation, on a pipeline of ranks with sends, receives and collectives:
//! `cargo run --release -p engine --example bench_joint -- 64 4000`.
#![expect(clippy::print_stdout, reason = "a benchmark prints")]

use std::sync::Arc;

use engine::joint::{RankTasks, simulate_ranks};
use kernels::{clock::now_nanos, stream::Rendezvous};

/// Each rank: per microbatch a receive, work, a send and a collective of all ranks.
fn pipeline(num_ranks: u32, num_microbatches: u32) -> Vec<RankTasks> {
    let all: Arc<[u32]> = (0..num_ranks).collect();
    let label: Arc<str> = "task".into();
    let of = |rank: u32| {
        let mut tasks = RankTasks::new(rank);
        for microbatch in 0..num_microbatches {
            let before = tasks.push(1, &[], 1, label.clone());
            if rank > 0 {
                tasks.meet(Rendezvous::Receive { from: rank - 1, tag: 0 });
            }
            let work = tasks.push(0, &[before], 10 + u64::from((rank * 7 + microbatch * 3) % 5), label.clone());
            tasks.push(2, &[work], 1, label.clone());
            if rank + 1 < num_ranks {
                tasks.meet(Rendezvous::Send { to: rank + 1, tag: 0 });
            }
            tasks.push(0, &[], 2, label.clone());
            tasks.meet(Rendezvous::Collective { group: all.clone(), tag: 0 });
        }
        tasks
    };
    (0..num_ranks).map(of).collect()
}

/// Resident memory of this process and its most so far, in MB, where the system tells.
fn resident_mb() -> (u64, u64) {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let kib = |key: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(key))?;
        line.trim().strip_suffix(" kB")?.parse::<u64>().ok()
    };
    (kib("VmRSS:").unwrap_or(0) / 1000, kib("VmHWM:").unwrap_or(0) / 1000)
}

fn main() {
    let mut sizes =
        std::env::args().skip(1).map(|word| word.parse::<u32>().expect("a number of ranks, of microbatches"));
    let (num_ranks, num_microbatches) = (sizes.next().unwrap_or(64), sizes.next().unwrap_or(4000));
    let ranks = pipeline(num_ranks, num_microbatches);
    let (before_mb, _) = resident_mb();
    let mut best = 0f64;
    let mut num_tasks = 0;
    for _ in 0..3 {
        let begin = now_nanos();
        let times = simulate_ranks(&ranks).expect("no deadlock");
        let secs = (now_nanos() - begin) as f64 * 1e-9;
        num_tasks = times.iter().map(Vec::len).sum::<usize>();
        best = best.max(num_tasks as f64 / secs);
    }
    let (_, most_mb) = resident_mb();
    println!("{num_ranks} ranks, {num_tasks} tasks: {:.2} million tasks/s on one core", best / 1e6);
    println!("{before_mb} MB with the tasks, {most_mb} MB at most while simulating");
    assert!(best > 0.5e6, "expected millions of tasks per second, found {best}");
    assert!(most_mb < 500 * (num_tasks as u64).div_ceil(1_000_000), "expected less than 500 MB for a million tasks");
}
