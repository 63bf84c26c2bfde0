//! Tests of requests to a run: between which steps they take effect, on which ranks, and how they fail.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    collections::BTreeSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use kernels::comm::Comm;
use serde_json::json;

use super::*;
use crate::{
    app::{EnginePlugin, Exit, ExitReason},
    bubbles::Accounting,
    step::{Step, StepIndex, StepSystems},
    telemetry::{Snapshot, StepTimes, Telemetry, tests::span},
};

#[derive(Resource, Default)]
struct Speed(Option<f64>);

#[derive(Component, serde::Serialize)]
struct Part {
    number: u32,
}

/// The speed in each step, by rank.
type Story = Arc<Mutex<Vec<Vec<f64>>>>;

/// What was told of requests.
type Notes = Arc<Mutex<Vec<String>>>;

struct Run {
    handle: ControlHandle,
    signal: Arc<AtomicUsize>,
    comm: Comm,
    story: Story,
    notes: Notes,
    ranks: Vec<JoinHandle<ExitReason>>,
}

/// A run of so many ranks that goes on until it is stopped, but for 10,000 steps at most.
fn start(num_ranks: u32) -> Run {
    start_with(num_ranks, false)
}

/// The same, with a feed for each rank, as processes have.
fn start_with(num_ranks: u32, feeds_are_apart: bool) -> Run {
    let (handle, inbox) = channel();
    inbox.feed().set_num_ranks(if feeds_are_apart { 1 } else { num_ranks as usize });
    let signal = Arc::new(AtomicUsize::new(0));
    let story: Story = Arc::new(Mutex::new(vec![Vec::new(); num_ranks as usize]));
    let notes = Notes::default();
    let spawn = |comm: Comm| {
        let inbox = if feeds_are_apart && comm.rank() > 0 { channel().1 } else { inbox.clone() };
        let (signal, story, notes) = (signal.clone(), story.clone(), notes.clone());
        let body = move || {
            let rank = comm.rank() as usize;
            let mut app = App::new();
            app.add_plugins((
                EnginePlugin::default(),
                ControlPlugin {
                    name: "r".into(),
                    comm,
                    inbox: Some(inbox),
                    feeds_are_apart,
                    signal,
                    finish_step: Duration::from_millis(20),
                    note: Arc::new(move |line| notes.lock().unwrap().push(line.to_owned())),
                },
            ))
            .init_resource::<Speed>()
            .live_value(LiveValue {
                path: "speed",
                about: "a speed",
                get: |world| world.resource::<Speed>().0.unwrap_or(1.0),
                set_to: |world| world.resource::<Speed>().0,
                set: |world, value| match value {
                    Some(value) if value > 9.0 => Err("expected 9 at most".into()),
                    value => {
                        world.resource_mut::<Speed>().0 = value;
                        Ok(())
                    }
                },
            })
            .expose::<Part>("Part")
            .status_field("color", |_| "red".into())
            .add_systems(
                Step,
                (move |speed: Res<Speed>, index: Res<StepIndex>, mut exit: ResMut<Exit>| {
                    story.lock().unwrap()[rank].push(speed.0.unwrap_or(1.0));
                    std::thread::sleep(Duration::from_micros(200));
                    if index.0 >= 10_000 {
                        exit.stop(ExitReason::Finished);
                    }
                })
                .in_set(StepSystems::Admit),
            );
            app.add_systems(
                Step,
                (move |mut telemetry: ResMut<Telemetry>| {
                    let spans = [span("a", rank as u32, "compute", 5, 10 + rank as u64)];
                    telemetry.open(spans.into(), (5, 20), StepTimes::default(), Accounting::default());
                })
                .in_set(StepSystems::Record),
            );
            let whole = app.world_mut().spawn((Part { number: 1 }, Name::new("whole"))).id();
            app.world_mut().spawn((Part { number: 2 + rank as u32 }, ChildOf(whole)));
            app.world_mut().spawn(Name::new("not shown"));
            crate::app::run(&mut app)
        };
        std::thread::Builder::new().name("a rank".into()).spawn(body).unwrap()
    };
    let comms = if num_ranks == 1 { vec![Comm::solo()] } else { Comm::local(num_ranks, 1) };
    let comm = comms[0].clone();
    let ranks = comms.into_iter().map(spawn).collect();
    Run { handle, signal, comm, story, notes, ranks }
}

impl Run {
    fn ask(&self, method: &str, params: Value) -> RpcResult {
        self.handle.call(method, params).recv_timeout(Duration::from_secs(20)).unwrap()
    }

    fn step(&self) -> u64 {
        self.ask("run.status", Value::Null).unwrap()["step"].as_u64().unwrap()
    }

    fn end(self) -> (Vec<ExitReason>, Vec<Vec<f64>>) {
        let reasons = self.ranks.into_iter().map(|rank| rank.join().unwrap()).collect();
        (reasons, std::mem::take(&mut *self.story.lock().unwrap()))
    }
}

fn code(result: RpcResult) -> i64 {
    result.unwrap_err().code
}

#[test]
fn a_run_is_paused_stepped_changed_and_stopped() {
    for num_ranks in [1, 3] {
        let run = start(num_ranks);
        let paused = run.ask("run.pause", Value::Null).unwrap();
        assert_eq!((&paused["state"], &paused["num_ranks"]), (&json!("paused"), &json!(num_ranks)));
        assert_eq!(paused["color"], "red");
        let at = run.step();
        std::thread::sleep(Duration::from_millis(60));
        assert_eq!(run.step(), at, "a paused run stands");
        assert_eq!(run.ask("run.step", Value::Null).unwrap()["step"], at + 1, "answered when it is done");
        let set = run.ask("run.set", json!({ "path": "speed", "value": 5 })).unwrap();
        assert_eq!(set, json!({ "path": "speed", "value": 5.0, "set": 5.0, "about": "a speed" }));
        assert_eq!(run.ask("run.step", Value::Null).unwrap()["step"], at + 2);
        let back = run.ask("run.set", json!({ "path": "speed", "value": null })).unwrap();
        assert_eq!((&back["value"], &back["set"]), (&json!(1.0), &Value::Null));
        assert_eq!(run.ask("run.resume", json!({})).unwrap()["state"], "running");
        let notes = std::mem::take(&mut *run.notes.lock().unwrap());
        let told = ["run.pause", "run.step", "run.set {\"path\":\"speed\",\"value\":5}"];
        assert!(
            told.iter().zip(&notes).all(|(told, note)| *note == format!("asked from outside: {told}")),
            "{notes:?}"
        );
        while run.step() < at + 5 {}
        assert_eq!(run.ask("run.stop", Value::Null).unwrap(), Value::Null);
        let handle = run.handle.clone();
        let (reasons, stories) = run.end();
        assert!(reasons.iter().all(|reason| *reason == ExitReason::Stopped), "{reasons:?}");
        assert!(stories.iter().all(|story| *story == stories[0]), "every rank has the same steps");
        let fast: Vec<_> = stories[0].iter().enumerate().filter(|(_, speed)| **speed == 5.0).map(|(i, _)| i).collect();
        assert_eq!(fast, [at as usize + 1], "the value was in force in the one step that followed");
        assert_eq!(code(handle.call("run.status", Value::Null).recv().unwrap()), RpcError::OVER);
    }
}

#[test]
fn a_signal_stops_all_ranks_after_the_same_step_and_a_paused_run_too() {
    for pause in [false, true] {
        let run = start(2);
        if pause {
            run.ask("run.pause", Value::Null).unwrap();
        }
        std::thread::sleep(Duration::from_millis(20));
        run.signal.store(15, Ordering::Relaxed);
        let (reasons, stories) = run.end();
        assert_eq!(reasons, [ExitReason::Signal(15), ExitReason::Signal(15)]);
        assert_eq!(stories[0].len(), stories[1].len());
    }
}

#[test]
fn a_paused_run_notices_that_a_rank_is_lost() {
    let run = start(2);
    run.ask("run.pause", Value::Null).unwrap();
    run.comm.abort(1, "it fell over");
    let (reasons, _) = run.end();
    assert!(reasons.iter().all(|reason| reason.to_string().contains("it fell over")), "{reasons:?}");
}

#[test]
fn wrong_requests_are_answered_with_what_was_expected() {
    let run = start(1);
    for (method, params, want, says) in [
        ("run.fly", json!(null), RpcError::METHOD_NOT_FOUND, "`rpc.discover`"),
        ("run.set", json!(null), RpcError::INVALID_PARAMS, "missing field `path`"),
        ("run.set", json!({ "path": "speed" }), RpcError::INVALID_PARAMS, "missing field `value`"),
        ("run.set", json!({ "path": "lr", "value": 1 }), RpcError::INVALID_PARAMS, "there are: `speed`"),
        ("run.set", json!({ "path": "speed", "value": 10 }), RpcError::INVALID_PARAMS, "`speed`: expected 9 at most"),
        ("run.set", json!({ "path": "speed", "value": "1" }), RpcError::INVALID_PARAMS, "number or null"),
        ("run.set", json!(["speed", 1]), RpcError::INVALID_PARAMS, "by name"),
        ("world.get", json!({ "entity": 12345 }), RpcError::INVALID_PARAMS, "no entity 12345"),
        ("world.list", json!({ "with": "Whole" }), RpcError::INVALID_PARAMS, "there are: `Part`"),
        ("world.list", json!({ "rank": 1 }), RpcError::INVALID_PARAMS, "below 1, found 1"),
        ("run.pause", json!({ "for": 3 }), RpcError::INVALID_PARAMS, "takes no parameters, found `for`"),
        ("world.list", json!({ "width": 3 }), RpcError::INVALID_PARAMS, "unknown field `width`"),
    ] {
        let error = run.ask(method, params).unwrap_err();
        assert_eq!(error.code, want, "{method}: {error}");
        assert!(error.message.contains(says), "{method}: {error}");
    }
    let looking = run.handle.read_only();
    let ask = |method: &str| looking.call(method, Value::Null).recv().unwrap();
    for method in ["run.pause", "run.resume", "run.step", "run.stop", "run.set"] {
        assert_eq!(code(ask(method)), RpcError::NO_TOKEN, "{method}");
    }
    assert!(ask("run.status").is_ok() && ask("rpc.discover").is_ok() && ask("graph.get").is_ok());
    run.ask("run.stop", Value::Null).unwrap();
    run.end();
}

#[test]
fn the_world_is_seen_through_what_is_exposed() {
    let run = start(1);
    let list = run.ask("world.list", Value::Null).unwrap();
    let entities = list["entities"].as_array().unwrap();
    assert_eq!(entities.len(), 2, "{list}");
    let whole = entities.iter().find(|entity| entity["name"] == "whole").unwrap();
    let part = entities.iter().find(|entity| entity["name"].is_null()).unwrap();
    assert_eq!((&part["parent"], &part["components"]), (&whole["entity"], &json!(["Part"])));
    let got = run.ask("world.get", json!({ "entity": part["entity"] })).unwrap();
    assert_eq!(got["components"], json!({ "Part": { "number": 2 } }));
    let queried = run.ask("world.query", json!({ "components": ["Part"], "limit": 1 })).unwrap();
    assert_eq!((queried["entities"].as_array().unwrap().len(), &queried["num_left_out"]), (1, &json!(1)));
    run.ask("run.stop", Value::Null).unwrap();
    run.end();
}

#[test]
fn every_rank_can_be_looked_at() {
    for paused in [false, true] {
        let run = start(3);
        if paused {
            run.ask("run.pause", Value::Null).unwrap();
        }
        for rank in 0..3 {
            let queried = run.ask("world.query", json!({ "components": ["Part"], "rank": rank })).unwrap();
            let of = |entity: &Value| entity["components"]["Part"]["number"].as_u64();
            let numbers: BTreeSet<_> = queried["entities"].as_array().unwrap().iter().filter_map(of).collect();
            assert_eq!(numbers, [1, 2 + rank].into());
        }
        assert_eq!(code(run.ask("world.get", json!({ "entity": 12345, "rank": 2 }))), RpcError::INVALID_PARAMS);
        run.ask("run.stop", Value::Null).unwrap();
        run.end();
    }
}

#[test]
fn a_listener_sees_all_ranks_whether_or_not_they_share_a_feed() {
    for feeds_are_apart in [false, true] {
        let run = start_with(3, feeds_are_apart);
        let listener = run.handle.subscribe(1024);
        let from = run.step();
        while run.step() < from + 100 {}
        run.ask("run.pause", Value::Null).unwrap();
        let paused_at = run.ask("run.step", Value::Null).unwrap()["step"].as_u64().unwrap();
        let mut steps = Vec::new();
        while steps.last().is_none_or(|last: &Arc<Snapshot>| last.step < paused_at) {
            steps.push(listener.recv_timeout(Duration::from_secs(20)).unwrap());
        }
        let (whole, figures): (Vec<_>, Vec<_>) = steps.iter().partition(|step| !step.spans.is_empty());
        for step in &whole {
            let ends: Vec<_> = step.spans.iter().map(|span| (span.rank, span.end_nanos)).collect();
            assert_eq!(ends, [(0, 10), (1, 11), (2, 12)], "step {}", step.step);
        }
        let numbers: Vec<u64> = steps.iter().map(|step| step.step).collect();
        assert!(
            steps.len() >= 100 && numbers.is_sorted() && numbers.ends_with(&[paused_at]),
            "each once, in order, to {paused_at}: {numbers:?}"
        );
        assert!(whole.len() >= 2 && (figures.is_empty() || feeds_are_apart), "{} of {}", whole.len(), steps.len());
        assert!(steps.iter().all(|step| step.scalar("step_secs").is_some()), "figures of every step");
        run.ask("run.stop", Value::Null).unwrap();
        run.end();
    }
}

#[test]
fn what_does_not_fit_is_refused_at_once_and_the_rest_at_the_end() {
    let (handle, inbox) = channel();
    let waiting: Vec<_> = (0..MAX_REQUESTS).map(|_| handle.call("run.status", Value::Null)).collect();
    assert_eq!(code(handle.call("run.status", Value::Null).recv().unwrap()), RpcError::BUSY);
    let listener = handle.subscribe(1);
    drop(inbox);
    assert!(waiting.into_iter().all(|answer| code(answer.recv().unwrap()) == RpcError::OVER));
    assert_eq!(listener.try_recv().unwrap_err(), channel::TryRecvError::Disconnected);
}
