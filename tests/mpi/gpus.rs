//! Processes whose tensors are on GPUs, on the stand-ins for the driver and for NCCL: what goes by NCCL has the bits and the bytes of what
//! goes by MPI, and a rank that is gone while others are in an op of NCCL is named.

use std::{collections::BTreeMap, fs, path::Path, process::Command};

use serde_json::{Map, Value};

use super::{faults::supervised, libraries, mpiexec, processes, text};

/// A short run of the smallest scene: an interpreter is slow.
fn args(dir: &Path, sets: &[&str]) -> Vec<String> {
    let here = format!("telemetry.dir={:?}", dir.to_str().expect("UTF-8"));
    let all = [
        "device=Cuda(0)",
        "train.steps=2",
        "routing.bias_warm_down_steps=1",
        "data.seq_len=32",
        "batch.microbatch_sequences=1",
        "batch.num_microbatches=2",
        "schedule=Constant(lr: 3e-3)",
        "telemetry.trace_steps=None",
        "telemetry.log_every_steps=1",
        "eval=None",
        "sample=None",
        "checkpoint=None",
        "watchdog=(min_secs: 3.0, first_step_secs: 120, steps: 100, faults: [])",
    ];
    let sets = all.into_iter().chain([here.as_str()]).chain(sets.iter().copied()).map(|set| format!("--set={set}"));
    ["run".to_owned(), "scenes/tiny.ron".into()].into_iter().chain(sets).collect()
}

/// The same launcher, with the stand-ins.
fn on_standins(mut command: Command, dir: &Path) -> Command {
    command.env("LD_LIBRARY_PATH", ptxsim_driver::install(dir).expect("the stand-in is built"));
    command.env("HADAL_NCCL", ptxsim_nccl::install(dir).expect("the stand-in is built")).env("PTXSIM_STATS", "1");
    // Where the stand-in has its messages.
    command.env("TMPDIR", dir);
    command
}

/// Of each step, what it comes to and the bytes on links.
fn steps(dir: &Path) -> Vec<Map<String, Value>> {
    let log = fs::read_to_string(dir.join("tiny/log.jsonl")).expect("a log");
    let lines = log.lines().map(|line| serde_json::from_str::<Map<String, Value>>(line).expect("JSON"));
    let told = |key: &str| {
        ["step", "loss_nats_per_token", "mtp_loss_nats_per_token/0", "grad_norm"].contains(&key)
            || key.starts_with("link_bytes/")
    };
    let steps = lines.filter(|line| line.contains_key("lr"));
    steps.map(|line| line.into_iter().filter(|(key, _)| told(key)).collect()).collect()
}

/// Bytes that the stand-ins for NCCL say they sent.
fn sent_bytes(said: &str) -> u64 {
    let of_line = |line: &str| line.split_once(" sends of ")?.1.split(' ').next()?.parse::<u64>().ok();
    said.lines().filter_map(of_line).sum()
}

#[test]
fn what_goes_by_nccl_has_the_bits_and_the_bytes_of_what_goes_by_mpi() {
    let Some(prefix) = libraries().first().cloned() else { return };
    let meshes: [(usize, &[&str]); 6] = [
        (2, &["mesh.dp=2"]),
        (2, &["mesh.ep=2", "precision.compute=Bf16"]),
        (2, &["mesh.pp=2"]),
        (4, &["mesh.dp=2", "mesh.ep=2", "mesh.ranks_per_node=2", "batch.num_microbatches=4"]),
        // Tokens are passed on inside of nodes; and the third rank is alone in its node, where experts are two, three and three.
        (4, &["mesh.ep=4", "mesh.ranks_per_node=2", "batch.num_microbatches=4"]),
        (3, &["mesh.ep=3", "mesh.ranks_per_node=2", "batch.num_microbatches=3"]),
    ];
    for (num_ranks, sets) in meshes {
        let run = |by_nccl: bool| {
            let dir = tempfile::tempdir().expect("a folder");
            let mut command = on_standins(mpiexec(&prefix, num_ranks, &args(dir.path(), sets)), dir.path());
            if !by_nccl {
                command.env("HADAL_NCCL", "none");
            }
            let output = command.output().expect("mpiexec starts");
            let said = text(&output);
            assert!(output.status.success(), "{sets:?}: {said}");
            let way = if by_nccl {
                "GPUs meet over NCCL 2.32.3 ("
            } else {
                "GPUs meet by the host, over MPI: HADAL_NCCL is `none`"
            };
            assert_eq!(said.matches(way).count(), 1, "{sets:?}: {said}");
            (steps(dir.path()), said)
        };
        let ((want, by_host), (found, by_nccl)) = (run(false), run(true));
        assert_eq!(want.len(), 2, "a line a step: {by_host}");
        assert_eq!(want, found, "{sets:?}");
        let of_kind = |kind: &str| -> f64 {
            let of_class = |step: &Map<String, Value>, class: &str| {
                step[&format!("link_bytes/{kind}/{class}_node")].as_f64().expect("bytes")
            };
            want.iter().map(|step| of_class(step, "intra") + of_class(step, "inter")).sum()
        };
        let (reduced, moved) = (of_kind("reduce"), of_kind("dispatch") + of_kind("combine"));
        assert_eq!(moved > 0.0, sets.iter().any(|set| set.starts_with("mesh.ep")), "{sets:?}: {moved} bytes of rows");
        let (sent, none) = (sent_bytes(&by_nccl) as f64, sent_bytes(&by_host));
        assert_eq!(none, 0, "{by_host}");
        // All that is summed and gathered, but for some hundred bytes of counts, and all rows.
        let all = reduced + moved;
        let is_all = sent > moved + 0.99 * reduced && sent <= all && reduced > 1e5;
        assert!(is_all, "{sets:?}: {sent} bytes by NCCL, {all} on links, {moved} of rows: {by_nccl}");
        assert!(!by_nccl.contains(" 0 communicators") && by_nccl.contains(" 0 aborted"), "{by_nccl}");
    }
}

#[test]
fn a_rank_that_is_gone_in_an_op_of_nccl_is_named_by_the_others() {
    let Some(prefix) = libraries().first().cloned() else { return };
    if prefix.join("lib/libmpi.so.40").exists() {
        eprintln!("!! SKIPPED: faults are tested under MPICH's launcher, which comes first in HADAL_TEST_MPI");
        return;
    }
    for how in ["Exit", "Kill"] {
        let dir = tempfile::tempdir().expect("a folder");
        let fault = format!("watchdog.faults=[(rank: 1, step: 2, at: \"nccl\", how: {how})]");
        let ranks = on_standins(mpiexec(&prefix, 2, &args(dir.path(), &["mesh.dp=2", &fault])), dir.path());
        let (codes, said) = supervised(&ranks, dir.path()).unwrap_or_else(|why| panic!("{how}: {why}"));
        let codes: BTreeMap<u32, bool> = codes.into_iter().map(|(rank, code)| (rank, code == 5)).collect();
        assert_eq!(codes.get(&0), Some(&true), "the first rank ends with exit code 5: {codes:?}\n{said}");
        assert_ne!(codes.get(&1), Some(&true), "{codes:?}\n{said}");
        let named = ["peer lost: rank 1: ", "error: rank 1 is lost: "];
        assert!(named.iter().any(|named| said.contains(named)), "{said}");
        assert!(said.contains(" 1 aborted"), "the communicator was aborted: {said}");
        assert!(processes(dir.path()).is_empty(), "no process is left");
    }
}
