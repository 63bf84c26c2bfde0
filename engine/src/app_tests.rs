//! How a run ends, and what each part of a step sees.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use kernels::error::Error as DeviceError;

use super::*;
use crate::{
    step::{Step, StepIndex, StepSystems, check_ambiguities},
    telemetry::Telemetry,
};

#[derive(Resource, Default, Debug, PartialEq)]
struct Ran(Vec<&'static str>);

fn note(name: &'static str) -> impl Fn(ResMut<Ran>) {
    move |mut ran: ResMut<Ran>| ran.0.push(name)
}

fn app() -> App {
    let mut app = App::new();
    app.add_plugins(EnginePlugin::default()).init_resource::<Ran>();
    app.add_systems(
        Step,
        (
            note("keep").in_set(StepSystems::Keep),
            note("record").in_set(StepSystems::Record),
            note("dispatch").in_set(StepSystems::Dispatch).after(crate::dispatch::dispatch),
            note("plan").in_set(StepSystems::Plan),
            note("admit").in_set(StepSystems::Admit),
        ),
    );
    app
}

fn stop_at(step: u64) -> impl Fn(Res<StepIndex>, ResMut<Exit>) {
    move |index: Res<StepIndex>, mut exit: ResMut<Exit>| {
        if index.0 == step {
            exit.stop(ExitReason::Finished);
        }
    }
}

const PARTS: [&str; 5] = ["admit", "plan", "dispatch", "record", "keep"];

#[test]
fn each_set_runs_once_per_step_in_order() {
    let mut app = app();
    app.add_systems(Step, stop_at(3).in_set(StepSystems::Keep));
    assert_eq!(run(&mut app), ExitReason::Finished);
    assert_eq!(app.world().resource::<Ran>().0, [PARTS; 3].concat());
    assert_eq!(app.world().resource::<StepIndex>().0, 3);
    assert_eq!(app.world().resource::<Telemetry>().last().unwrap().step, 3);
}

#[test]
fn a_reason_set_in_update_skips_the_step() {
    let mut app = app();
    app.add_systems(Update, |mut exit: ResMut<Exit>| exit.stop(ExitReason::Signal(15)));
    assert_eq!(run(&mut app), ExitReason::Signal(15));
    assert_eq!(app.world().resource::<Ran>().0, [""; 0]);
    assert_eq!(app.world().resource::<StepIndex>().0, 0);
}

#[test]
fn a_step_that_admits_nothing_is_not_counted_and_one_that_finishes_is_kept() {
    for (part, num_counted, ran) in [
        (StepSystems::Admit, 1, [&PARTS[..], &["admit"][..]].concat()),
        (StepSystems::Dispatch, 2, [PARTS; 2].concat()),
        (StepSystems::Record, 2, [PARTS; 2].concat()),
    ] {
        let mut app = app();
        app.add_systems(Step, stop_at(2).in_set(part));
        assert_eq!(run(&mut app), ExitReason::Finished);
        assert_eq!(app.world().resource::<StepIndex>().0, num_counted, "{part:?}");
        assert_eq!(app.world().resource::<Ran>().0.len(), ran.len(), "{part:?}");
    }
}

#[test]
fn failures_stop_the_run_with_the_first_one() {
    type Break = fn(&mut App);
    let not_finite = || DeviceError::NotFinite { task: "head".into(), tensor: "y".into(), value: f64::NAN };
    let diverged = not_finite().to_string();
    let cases: [(&str, Break, ExitReason, usize); 6] = [
        (
            "an error in Plan skips what follows",
            |app| {
                app.add_systems(Step, (|| -> Result { Err("no such shape".into()) }).in_set(StepSystems::Plan));
            },
            ExitReason::Error("no such shape".into()),
            1,
        ),
        (
            "a reason as an error keeps its kind",
            |app| {
                let fail = || -> Result { Err(ExitReason::Infeasible("needs 2 GB".into()).into()) };
                app.add_systems(Step, fail.in_set(StepSystems::Plan));
            },
            ExitReason::Infeasible("needs 2 GB".into()),
            1,
        ),
        (
            "a number that is not finite is a divergence",
            |app| {
                let error = || DeviceError::NotFinite { task: "head".into(), tensor: "y".into(), value: f64::NAN };
                app.add_systems(Step, (move || -> Result { Err(error().into()) }).in_set(StepSystems::Keep));
            },
            ExitReason::Diverged(diverged),
            4,
        ),
        (
            "the first failure wins",
            |app| {
                let (a, b) = (|| -> Result { Err("first".into()) }, || -> Result { Err("second".into()) });
                app.add_systems(Step, (a, b).chain().in_set(StepSystems::Admit));
            },
            ExitReason::Error("first".into()),
            0,
        ),
        (
            "a failure replaces a reason that is none",
            |app| {
                app.add_systems(Step, stop_at(1).in_set(StepSystems::Record));
                app.add_systems(Step, (|| -> Result { Err("disk full".into()) }).in_set(StepSystems::Record));
            },
            ExitReason::Error("disk full".into()),
            3,
        ),
        (
            "a failure in Startup runs no step",
            |app| {
                app.add_systems(Startup, || -> Result { Err("no such file".into()) });
            },
            ExitReason::Error("no such file".into()),
            0,
        ),
    ];
    for (name, break_it, reason, num_before) in cases {
        let mut app = app();
        break_it(&mut app);
        assert_eq!(run(&mut app), reason, "{name}");
        // Systems of one set have no order among them, so the failing part may have noted itself or not.
        let ran = &app.world().resource::<Ran>().0;
        assert!(ran.len() == num_before || ran.len() == num_before + 1, "{name}: {ran:?}");
    }
}

#[test]
fn a_panic_in_a_system_is_a_failure_with_its_message() {
    let mut app = app();
    fn careless() {
        panic!("index 7 of 3");
    }
    app.add_systems(Step, careless.in_set(StepSystems::Admit));
    let ExitReason::Error(message) = run(&mut app) else { panic!("expected an error") };
    assert!(message.contains("careless` panicked: index 7 of 3"), "{message}");
}

#[test]
fn finish_runs_once_unless_the_run_failed() {
    for (fail, expected) in [(false, vec!["admit", "plan", "dispatch", "record", "keep", "finish"]), (true, vec![])] {
        let mut app = app();
        app.add_systems(Step, stop_at(1).in_set(StepSystems::Record));
        app.add_systems(
            Step,
            (move || -> Result { if fail { Err("x".into()) } else { Ok(()) } }).before(StepSystems::Admit),
        );
        app.add_systems(Finish, note("finish"));
        assert_eq!(run(&mut app).is_failure(), fail);
        assert_eq!(app.world().resource::<Ran>().0, expected);
    }
}

#[test]
fn no_two_systems_of_a_step_are_ambiguous() {
    let mut plain = App::new();
    plain.add_plugins(EnginePlugin::default());
    assert_eq!(check_ambiguities(&mut plain), Ok(()));

    let mut app = App::new();
    app.add_plugins(EnginePlugin::default()).init_resource::<Ran>();
    fn one(mut ran: ResMut<Ran>) {
        ran.0.push("1");
    }
    fn two(mut ran: ResMut<Ran>) {
        ran.0.push("2");
    }
    app.add_systems(Step, (one, two).in_set(StepSystems::Admit));
    let report = check_ambiguities(&mut app).unwrap_err();
    assert!(report.contains("one") && report.contains("two") && report.contains("Ran"), "{report}");
}
