//! A signal in the middle of a step that does not wait for its end: all ranks give the step up, save those before it, and end with 143;
//! and the run goes on from there.

use std::process::Command;

use super::{args, faults::supervised, libraries, mpiexec, outcome, processes, text};

/// Ranks of meshes where others meet the one that is told to end, in messages, in dispatch and in sums; and DiLoCo, with a replica that is
/// away.
const MESHES: [(usize, &[&str]); 3] = [
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
    (4, &["mesh.ep=2", "mesh.dp=2", "batch.num_microbatches=8"]),
    (
        3,
        &[
            "batch.num_microbatches=6",
            "diloco=(replicas: 3, inner_steps: 2, absent: [(replica: 1, rounds: (start: 1, count: 1))])",
        ],
    ),
];
/// What one of its ranks is in, in step 4, when its process is told to end.
const TOLD: &str =
    "watchdog=(finish_step_secs: 0, faults: [(rank: 2, step: 4, at: \"attention_forward\", how: Terminate)])";

fn sets_of(mesh: &[&'static str]) -> Vec<&'static str> {
    [mesh, &["train.steps=6", "checkpoint.every_steps=2"]].concat()
}

#[test]
fn all_processes_give_the_step_up_and_the_run_goes_on_to_the_same_bits() {
    let Some(prefix) = libraries().first().cloned() else { return };
    for (num_ranks, mesh) in MESHES {
        let sets = sets_of(mesh);
        let [whole, stopped] = [0, 1].map(|_| tempfile::tempdir().expect("a folder"));
        let output = mpiexec(&prefix, num_ranks, &args(whole.path(), &sets)).output().expect("mpiexec starts");
        assert!(output.status.success(), "{}", text(&output));

        let told = args(stopped.path(), &[&sets[..], &[TOLD]].concat());
        let (codes, said) = supervised(&mpiexec(&prefix, num_ranks, &told), stopped.path()).expect("it ends in time");
        assert!(codes.len() == num_ranks && codes.values().all(|&code| code == 143), "{codes:?} of {mesh:?}\n{said}");
        assert!(said.contains("step 4 is given up in the middle"), "{said}");
        assert!(processes(stopped.path()).is_empty(), "no process is left");
        let (steps, _) = outcome(stopped.path());
        assert_eq!(steps.len(), 3, "steps that were done");

        let mut goes_on = args(stopped.path(), &sets);
        goes_on.push("--resume".into());
        let output = mpiexec(&prefix, num_ranks, &goes_on).output().expect("mpiexec starts");
        assert!(output.status.success(), "{}", text(&output));
        assert!(text(&output).contains("step-0000003"), "{}", text(&output));
        assert!(outcome(whole.path()) == outcome(stopped.path()), "losses, links, weights and optimizer of {mesh:?}");
    }
}

#[test]
fn the_launcher_ends_with_the_code_of_its_ranks() {
    for prefix in libraries() {
        let dir = tempfile::tempdir().expect("a folder");
        let told = TOLD.replace("rank: 2", "rank: 1");
        let sets = [&sets_of(&["mesh.ep=2"])[..], &[&told]].concat();
        let output = mpiexec(&prefix, 2, &args(dir.path(), &sets)).output().expect("mpiexec starts");
        assert_eq!(output.status.code(), Some(143), "{}", text(&output));
    }
}

#[test]
fn ranks_that_are_threads_give_the_step_up_too() {
    for mesh in [&[][..], &["mesh.ep=2", "mesh.dp=2", "batch.num_microbatches=8"]] {
        let sets = sets_of(mesh);
        let [whole, stopped] = [0, 1].map(|_| tempfile::tempdir().expect("a folder"));
        let run = |dir: &tempfile::TempDir, more: &[&str], code: i32| {
            let sets: Vec<&str> = sets.iter().chain(more).copied().filter(|set| *set != "--resume").collect();
            let mut command = Command::new(env!("CARGO_BIN_EXE_hadal"));
            command.args(args(dir.path(), &sets)).args(more.iter().filter(|set| **set == "--resume"));
            let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("the program starts");
            assert_eq!(output.status.code(), Some(code), "{}", text(&output));
            text(&output)
        };
        run(&whole, &[], 0);
        let said = run(&stopped, &[&TOLD.replace("rank: 2", "rank: 0")], 143);
        assert!(said.contains("step 4 is given up in the middle"), "{said}");
        run(&stopped, &["--resume"], 0);
        assert!(outcome(whole.path()) == outcome(stopped.path()), "losses, weights and optimizer of {mesh:?}");
    }
}
