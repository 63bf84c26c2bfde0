//! Ranks that are processes: a run under `mpiexec` ends with the losses and the weights that it has with ranks that are threads, to the
//! bit; what the launcher and the scene disagree on is refused; and when one process goes, the others say whom they lost.
//!
//! `HADAL_TEST_MPI` has the folders of MPI libraries with their `bin/mpiexec`, first the one for all tests (MPICH from PyPI, say).

#[path = "mpi/faults.rs"]
mod faults;

use std::{
    env, fs,
    path::{Path, PathBuf},
    process::{Command, Output, Stdio},
    thread,
    time::Duration,
};

use serde_json::Value;

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
    let here = format!("telemetry.dir={:?}", dir.to_str().expect("UTF-8"));
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

type Losses = Vec<(u64, String)>;
type Files = Vec<(PathBuf, Vec<u8>)>;

/// Losses by step, and the bytes of every file of the last checkpoint but those that tell the time.
fn outcome(dir: &Path) -> (Losses, Files) {
    let run = dir.join("tiny");
    let log = fs::read_to_string(run.join("log.jsonl")).expect("a log");
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let losses = lines.filter_map(|l| Some((l["step"].as_u64()?, l.get("loss_nats_per_token")?.to_string())));
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
    (losses.collect(), files)
}

fn check(prefix: &Path, num_ranks: usize, sets: &[&str]) {
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
    assert_eq!(want.0, found.0, "losses of {sets:?}");
    assert!(want.1.len() >= 2, "weights and optimizer");
    for ((path, want), (other, found)) in want.1.iter().zip(&found.1) {
        assert!(path == other && want == found, "{} of {sets:?} has the same bytes", path.display());
    }
}

const MESHES: [(usize, &[&str]); 8] = [
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
];

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
        MESHES.into_iter().for_each(|(num_ranks, sets)| check(prefix, num_ranks, sets));
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
