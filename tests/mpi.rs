//! Ranks that are processes: a run under `mpiexec` ends with the losses and the weights that it has with ranks that are threads, to the
//! bit, puts as many bytes on its links, and reports on all ranks; what the launcher and the scene disagree on is refused; and when one process goes, the others say whom they lost.
//!
//! `HADAL_TEST_MPI` has the folders of MPI libraries with their `bin/mpiexec`, first the one for all tests (MPICH from PyPI, say).

#[path = "mpi/begin.rs"]
mod begin;
#[path = "mpi/faults.rs"]
mod faults;
#[cfg(feature = "cuda")]
#[path = "mpi/gpus.rs"]
mod gpus;
#[path = "mpi/stopped.rs"]
mod stopped;
#[cfg(feature = "remote")]
#[path = "mpi/watched.rs"]
mod watched;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

use kernels::comm::{Choice, Spread};
use serde_json::{Map, Value};

/// Libraries to test, or a loud word that nothing is.
fn libraries() -> Vec<PathBuf> {
    let all: Vec<PathBuf> =
        env::var_os("HADAL_TEST_MPI").map(|list| env::split_paths(&list).collect()).unwrap_or_default();
    if all.is_empty() {
        eprintln!(
            "!! SKIPPED: HADAL_TEST_MPI names no MPI library; `pip install mpich` in a virtual environment makes one"
        );
    }
    all
}

fn library_file(prefix: &Path) -> PathBuf {
    let names = ["libmpi_abi.so.1", "libmpi_abi.so.0", "libmpi.so.40", "libmpi.so.12"];
    let found = names.iter().map(|name| prefix.join("lib").join(name)).find(|path| path.exists());
    found.expect("the folder has an MPI library")
}

/// `hadal` with these arguments as `num_ranks` processes.
fn mpiexec(prefix: &Path, num_ranks: usize, args: &[String]) -> Command {
    let mut command = Command::new(prefix.join("bin/mpiexec"));
    if library_file(prefix).ends_with("libmpi.so.40") {
        command.args(["--oversubscribe"]);
    }
    command.args(["-n", &num_ranks.to_string(), env!("CARGO_BIN_EXE_hadal")]).args(args);
    command.current_dir(env!("CARGO_MANIFEST_DIR")).env("HADAL_MPI", library_file(prefix)).env("RUST_BACKTRACE", "0");
    // Open MPI does not start for root unless it is told twice.
    for name in ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"] {
        command.env(name, "1").env(name.replace("OMPI", "PRTE"), "1");
    }
    command
}

fn args(dir: &Path, sets: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = vec!["run".into(), "scenes/tiny.ron".into()];
    let dir = dir.to_str().expect("UTF-8");
    let here = format!("telemetry.dir={dir:?}");
    args.push(format!("--json={dir}/report.json"));
    let all = [
        "train.steps=4",
        "checkpoint.every_steps=2",
        "eval.every_steps=4",
        "routing.bias_warm_down_steps=1",
        "schedule=WarmupStableDecay(peak_lr: 3e-3, warmup_steps: 1, decay_steps: 1)",
        "telemetry.trace_steps=(start: 1, count: 1)",
    ];
    args.extend(all.into_iter().chain([here.as_str()]).chain(sets.iter().copied()).map(|set| format!("--set={set}")));
    args
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned() + &String::from_utf8_lossy(&output.stdout)
}

type Steps = Vec<Map<String, Value>>;
type Files = Vec<(PathBuf, Vec<u8>)>;

/// Of each training step, the loss and the bytes on links, by rank and by kind; and the bytes of every file of the last checkpoint but
/// those that tell the time.
fn outcome(dir: &Path) -> (Steps, Files) {
    let run = dir.join("tiny");
    let log = fs::read_to_string(run.join("log.jsonl")).expect("a log");
    let lines = log.lines().map(|line| serde_json::from_str::<Map<String, Value>>(line).expect("JSON"));
    let told = |key: &str| key == "step" || key == "loss_nats_per_token" || key.starts_with("link_bytes/");
    let steps = lines
        .filter(|line| line.contains_key("lr"))
        .map(|line| line.into_iter().filter(|(key, _)| told(key)).collect::<Map<String, Value>>());
    let mut files = Vec::new();
    let mut folders = vec![run.join("latest")];
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(folder).expect("a checkpoint") {
            let path = entry.expect("an entry").path();
            match path.extension().and_then(|e| e.to_str()) {
                _ if path.is_dir() => folders.push(path),
                Some("safetensors") => {
                    let bytes = fs::read(&path).expect("a file");
                    files.push((path.strip_prefix(&run).expect("within").to_owned(), bytes));
                }
                _ => {}
            }
        }
    }
    files.sort();
    (steps.collect(), files)
}

/// What a run reports, without times and folders.
fn report(dir: &Path) -> [Value; 4] {
    let report = fs::read_to_string(dir.join("report.json")).expect("a report");
    let report: Value = serde_json::from_str(&report).expect("JSON");
    let idle = &report["idle"];
    for side in ["predicted", "measured"] {
        let secs = &idle[side]["step_secs"];
        assert!(secs.as_f64().is_some_and(|secs| secs > 0.0), "{side}: {idle}");
    }
    [&idle["links"], &idle["num_steps"], &report["traffic"], &report["peak_tensor_bytes"]].map(Value::clone)
}

/// What both have in common, of threads and of processes.
struct Same {
    steps: Steps,
    report: [Value; 4],
}

/// Runs with threads and with processes, and compares.
fn check(prefix: &Path, num_ranks: usize, sets: &[&str]) -> Same {
    let (threads, processes) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let local = Command::new(env!("CARGO_BIN_EXE_hadal"))
        .args(args(threads.path(), sets))
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("the program starts");
    assert!(local.status.success(), "{sets:?}: {}", text(&local));
    // Slower than it needs to be is no failure, waiting for ever is.
    let mpi = mpiexec(prefix, num_ranks, &args(processes.path(), sets)).output().expect("mpiexec starts");
    assert!(mpi.status.success(), "{sets:?}: {}", text(&mpi));
    assert!(text(&mpi).contains(&format!("{num_ranks} processes by ")), "{}", text(&mpi));
    let (want, found) = (outcome(threads.path()), outcome(processes.path()));
    assert_eq!(want.0.len(), 4, "a loss a step");
    assert!(want.0.iter().all(|step| step.contains_key("link_bytes/dispatch/inter_node")), "{:?}", want.0);
    assert_eq!(want.0, found.0, "losses and links of {sets:?}");
    assert!(want.1.len() >= 2, "weights and optimizer");
    for ((path, want), (other, bytes)) in want.1.iter().zip(&found.1) {
        assert!(path == other && want == bytes, "{} of {sets:?} has the same bytes", path.display());
    }
    let report = report(processes.path());
    assert_eq!(self::report(threads.path()), report, "reports of {sets:?}");
    assert!(report.iter().all(|part| !part.is_null()), "{report:?}");
    for line in ["cause", "sent in its node", "sent to others"] {
        assert_eq!(text(&local).contains(line), text(&mpi).contains(line), "{line} of {sets:?}: {}", text(&mpi));
    }
    let trace = fs::read_to_string(processes.path().join("tiny/trace.json")).expect("a trace");
    let trace: Vec<Value> = serde_json::from_str(&trace).expect("JSON");
    for rank in 0..num_ranks {
        let has = |what: &str| trace.iter().any(|event| event["pid"] == rank && event[what].is_number());
        assert!(has("ts"), "the trace has tasks of rank {rank}");
        let is_clock = |event: &&Value| event["name"] == "clock" && event["pid"] == rank;
        let error_us = trace.iter().find(is_clock).map(|clock| clock["args"]["error_us"].as_f64().expect("a number"));
        assert_eq!(error_us.is_some(), rank > 0, "the clock of rank {rank}");
    }
    Same { steps: found.0, report }
}

const MESHES: [(usize, &[&str]); 11] = [
    (2, &["mesh.pp=2"]),
    (2, &["mesh.ep=2"]),
    (2, &["mesh.dp=2"]),
    (
        4,
        &[
            "mesh.pp=2",
            "mesh.ep=2",
            "pipeline=(schedule: DualPipe)",
            "batch.num_microbatches=8",
            "batch.microbatch_sequences=1",
        ],
    ),
    (
        4,
        &[
            "mesh.ep=2",
            "mesh.dp=2",
            "mesh.ranks_per_node=2",
            "batch.num_microbatches=4",
            "expert_parallel=(dispatch: Fp8, combine: Bf16)",
        ],
    ),
    (4, &["mesh.pp=2", "mesh.dp=2", "pipeline=(schedule: ZbH1)", "batch.num_microbatches=4"]),
    (
        4,
        &[
            "mesh.ep=2",
            "batch.num_microbatches=4",
            "diloco=(replicas: 2, inner_steps: 2, compress: Int8, absent: [(replica: 1, rounds: (start: 0, count: 1))])",
        ],
    ),
    (
        3,
        &[
            "batch.num_microbatches=3",
            "diloco=(replicas: 3, inner_steps: 2, absent: [(replica: 1, rounds: (start: 1, count: 1))])",
        ],
    ),
    (4, &["mesh.ep=4", "mesh.ranks_per_node=2", "batch.num_microbatches=4", "expert_parallel=(dispatch: Fp8)"]),
    // The fourth rank is on a node of its own.
    (4, &["mesh.ep=4", "mesh.ranks_per_node=3", "batch.num_microbatches=4"]),
    // Two experts, three and three.
    (3, &["mesh.ep=3", "mesh.ranks_per_node=2", "batch.num_microbatches=3", "expert_parallel=(combine: Bf16)"]),
];

/// Bytes of a step to the other ranks of the node, and to the other node.
fn predicted_and_measured(links: &Value) -> [(f64, f64); 2] {
    ["intra", "inter"].map(|class| {
        let [predicted, measured] = ["predicted", "measured"].map(|side| {
            let bytes = &links[format!("{side}_{class}_node_bytes")];
            bytes.as_u64().expect("bytes") as f64
        });
        (predicted, measured)
    })
}

const TWO_NODES: [&str; 3] = ["mesh.ep=4", "mesh.ranks_per_node=2", "batch.num_microbatches=4"];

/// Bytes that a copy of each token for each layer with experts is in a step: 4 microbatches of 4 sequences of 64 tokens; two layers, and
/// one for multi-token prediction; 64 columns of f32.
const COPY_BYTES: f64 = (4 * 4 * 64 * 3 * 64 * 4) as f64;

/// Of dispatch to the other node, the mean over steps.
fn far_dispatch_bytes(steps: &[Map<String, Value>]) -> f64 {
    let bytes = steps.iter().map(|step| step["link_bytes/dispatch/inter_node"].as_f64().expect("bytes"));
    bytes.sum::<f64>() / steps.len() as f64
}

#[test]
fn bytes_on_links_are_what_the_plan_says_where_the_routing_leaves_nothing_open() {
    let Some(prefix) = libraries().first().cloned() else { return };
    // Every token goes to all experts.
    let sets = [&TWO_NODES[..], &["model.num_experts_per_tok=8", "model.topk_group=4"]].concat();
    let Same { steps, report: [links, ..] } = check(&prefix, 4, &sets);
    for (predicted, measured) in predicted_and_measured(&links) {
        assert!(predicted > 0.0, "{links}");
        assert_eq!(predicted, measured, "{links}");
    }
    // Forward once to the other node; backward a row for each of the four experts there.
    assert_eq!(far_dispatch_bytes(&steps), COPY_BYTES * (1.0 + 4.0));
}

#[test]
fn bytes_on_links_are_near_what_uniform_routing_is_expected_to_make() {
    let Some(prefix) = libraries().first().cloned() else { return };
    let Same { steps, report: [links, ..] } = check(&prefix, 4, &TWO_NODES);
    // The router is young, and text is no chance: tokens that are alike go the same way.
    let is_near = |found: f64, expected: f64| (found / expected - 1.0).abs() < 0.1;
    for (predicted, measured) in predicted_and_measured(&links) {
        assert!(is_near(measured, predicted), "{links}");
    }
    // 2 of 8 experts, in 2 of 4 groups. Backward a row for each expert, of which half are there.
    let choice = Choice { num_experts: 8, top_k: 2, num_groups: 4, groups_kept: 2 };
    let spread = Spread::expected(choice, &[0, 0, 1, 1], 0);
    let (found, expected) = (far_dispatch_bytes(&steps), COPY_BYTES * (spread.nodes_afar + 1.0));
    assert!(is_near(found, expected), "found {found}, expected {expected}");
}

/// Over two stages or four, with a layer for each.
const SCHEDULES: [&str; 8] =
    ["GPipe", "OneFOneB", "Interleaved(chunks: 2)", "ZbH1", "ZbH2", "Zbv", "DualPipe", "DualPipeV"];

#[test]
fn every_schedule_has_the_bits_of_threads() {
    let Some(prefix) = libraries().first().cloned() else { return };
    for schedule in SCHEDULES {
        let schedule = format!("pipeline=(schedule: {schedule})");
        let sets = [
            "mesh.pp=2",
            "model.num_hidden_layers=4",
            "batch.num_microbatches=4",
            "batch.microbatch_sequences=1",
            &schedule,
        ];
        check(&prefix, 2, &sets);
    }
}

#[test]
fn processes_have_the_bits_of_threads() {
    if let Some(prefix) = libraries().first() {
        for (num_ranks, sets) in MESHES {
            check(prefix, num_ranks, sets);
        }
    }
}

#[test]
fn the_same_program_runs_over_other_libraries() {
    for prefix in libraries().iter().skip(1) {
        check(prefix, 2, &["mesh.ep=2"]);
    }
}

#[test]
fn a_scene_of_another_size_is_refused_with_both_numbers() {
    let Some(prefix) = libraries().first().cloned() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let output = mpiexec(&prefix, 2, &args(dir.path(), &["mesh.pp=3"])).output().expect("mpiexec starts");
    let said = text(&output);
    assert!(said.contains("mesh has 3 ranks, and the launcher started 2 processes"), "{said}");
    assert_eq!(output.status.code(), Some(2), "{said}");
}

/// Processes of a run in this folder, by rank.
fn processes(dir: &Path) -> Vec<(u32, String)> {
    let wanted = dir.to_str().expect("UTF-8");
    let all = fs::read_dir("/proc").expect("processes").filter_map(|entry| {
        let path = entry.ok()?.path();
        let number = path.file_name()?.to_str()?.parse::<u32>().ok()?.to_string();
        let read = |name: &str| Some(String::from_utf8_lossy(&fs::read(path.join(name)).ok()?).into_owned());
        let (line, variables) = (read("cmdline")?, read("environ")?);
        let is_rank = line.split('\0').next()?.ends_with("hadal") && line.contains(wanted);
        let rank = variables.split('\0').find_map(|pair| pair.strip_prefix("PMI_RANK="))?.parse().ok()?;
        is_rank.then_some((rank, number))
    });
    all.collect()
}

#[test]
fn a_rank_that_fails_is_named_by_the_others() {
    let Some(prefix) = libraries().first().cloned() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    // The first rank cannot save its checkpoint.
    fs::create_dir_all(dir.path().join("tiny")).expect("a folder");
    fs::write(dir.path().join("tiny/checkpoints"), "").expect("a file");
    let output = mpiexec(&prefix, 2, &args(dir.path(), &["mesh.pp=2"])).output().expect("mpiexec starts");
    let said = text(&output);
    assert!(said.contains("rank 1: peer lost: rank 0: "), "{said}");
    assert!(said.contains("error: peer lost: rank 0: cannot make ") && said.contains("File exists"), "{said}");
    assert!(processes(dir.path()).is_empty());
}

#[test]
fn a_process_that_is_killed_takes_the_others_along() {
    let Some(prefix) = libraries().first().cloned() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let sets = ["mesh.dp=2", "train.steps=100000", "eval.every_steps=100000"];
    let mut launcher =
        mpiexec(&prefix, 2, &args(dir.path(), &sets)).stderr(Stdio::null()).spawn().expect("mpiexec starts");
    let log = dir.path().join("tiny/log.jsonl");
    let is_under_way = || fs::read_to_string(&log).is_ok_and(|log| log.lines().count() > 2);
    (0..600).take_while(|_| !is_under_way()).for_each(|_| thread::sleep(Duration::from_millis(50)));
    let (_, process) = processes(dir.path()).into_iter().find(|(rank, _)| *rank == 1).expect("the second rank runs");
    assert!(Command::new("kill").args(["-9", &process]).status().expect("kill").success());
    let status = launcher.wait().expect("mpiexec ends");
    assert!(!status.success(), "{status}");
    assert_eq!(processes(dir.path()), [], "no process is left");
}

#[test]
fn without_a_library_it_says_what_was_tried() {
    let output = Command::new(env!("CARGO_BIN_EXE_hadal"))
        .args(["run", "scenes/tiny.ron"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .envs([("RANK", "0"), ("WORLD_SIZE", "2"), ("HADAL_MPI", "/nowhere/libmpi.so")])
        .output()
        .expect("the program starts");
    let said = text(&output);
    assert!(
        said.contains("rank 0 of 2 (RANK and WORLD_SIZE) needs an MPI library") && said.contains("/nowhere/libmpi.so"),
        "{said}"
    );
    let output = Command::new(env!("CARGO_BIN_EXE_hadal"))
        .args(["run", "scenes/tiny.ron"])
        .envs([("RANK", "0"), ("WORLD_SIZE", "2"), ("PMI_RANK", "1"), ("PMI_SIZE", "2")])
        .output()
        .expect("the program starts");
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output).contains("the launcher contradicts itself"), "{}", text(&output));
}
