//! Processes that do not begin: those that were given different things to do, and those that others wait for in vain.

use std::process::Command;

use super::{args, libraries, mpiexec, text};

/// Two processes of a run and two that are started otherwise: the code that they end with, and what they say.
fn two_and_two(others: &[&str]) -> Option<(i32, String)> {
    let prefix = libraries().first().cloned()?;
    let dir = tempfile::tempdir().expect("a folder");
    let mesh = ["mesh.pp=2", "mesh.ep=2"];
    let mut command: Command = mpiexec(&prefix, 2, &args(dir.path(), &mesh));
    command.args([":", "-n", "2", env!("CARGO_BIN_EXE_hadal")]).args(args(dir.path(), &[&mesh[..], others].concat()));
    let output = command.output().expect("mpiexec starts");
    Some((output.status.code().expect("a code"), text(&output)))
}

#[test]
fn processes_with_different_scenes_do_not_train_together() {
    let Some((code, said)) = two_and_two(&["optimizer=AdamW(beta1: 0.8, beta2: 0.95, weight_decay: 0.1)"]) else {
        return;
    };
    assert_eq!(code, 2, "{said}");
    assert!(
        said.contains("rank 2 is to run another scene than rank 0, or has another program or command line"),
        "{said}"
    );
    assert!(!said.contains("step "), "{said}");
}

#[test]
fn who_cannot_begin_tells_the_others() {
    let Some((code, said)) = two_and_two(&["model.hidden_size=0"]) else { return };
    assert_eq!(code, 2, "{said}");
    assert!(said.contains("rank 2 cannot begin: ") && said.contains("model.hidden_size"), "{said}");
}

#[test]
fn what_is_wrong_for_all_is_said_once() {
    let Some(prefix) = libraries().first().cloned() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let output = mpiexec(&prefix, 4, &args(dir.path(), &["mesh.dp=4", "model.hidden_size=0"])).output();
    let output = output.expect("mpiexec starts");
    let said = text(&output);
    assert_eq!(output.status.code(), Some(2), "{said}");
    assert_eq!(said.matches("1 error in the scene").count(), 1, "{said}");
}

#[test]
fn who_does_not_start_is_not_waited_for_without_an_end() {
    let Some(prefix) = libraries().first().cloned() else { return };
    let dir = tempfile::tempdir().expect("a folder");
    let sets = ["mesh.dp=2", "watchdog.first_step_secs=4"];
    let mut command = mpiexec(&prefix, 1, &args(dir.path(), &sets));
    command.args([":", "-n", "1", "sleep", "60"]);
    let output = command.output().expect("mpiexec starts");
    let said = text(&output);
    assert!(!output.status.success(), "{said}");
    assert!(
        said.contains("rank 0 waited 4 s for MPI to begin with all 2 processes (watchdog.first_step_secs)"),
        "{said}"
    );
}
