//! Every view, driven by the names of its parts as a screen reader has them, on recorded steps: no display, no GPU, no run.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::sync::Arc;

use common::{FakeBench, FakeSource, editor, recorded, settle, snapshot};
use editor::{
    desk::{Link, Selected},
    source::{SourceEvent, chrome, file::FileSource},
};
use egui::{
    Key, Modifiers, Theme,
    accesskit::{Role, Toggled},
};
use egui_kittest::kittest::{NodeT, Queryable};
use engine::telemetry::Snapshot;

const SIZE: [f32; 2] = [1280.0, 720.0];

#[test]
fn the_timeline_zooms_moves_and_names_its_lanes() {
    let (mut h, _) = recorded(SIZE, Theme::Dark, 12);
    h.get_by_label_contains("measured: rank 0 compute, 8 tasks, idle");
    h.get_by_label_contains("measured: rank 1 comm, 4 tasks");
    h.get_by_label("timeline shows 100.0% of the step from 0.0%");
    h.get_by_label("Zoom in").click();
    h.run();
    h.get_by_label("timeline shows 66.7% of the step from 16.7%");
    h.key_press(Key::Minus);
    h.run();
    h.get_by_label("timeline shows 100.0% of the step from 0.0%");

    // With the control key, the wheel zooms at the pointer: the place under it stays.
    let rect = h.get_by_label("measured step 12").rect();
    let left = rect.left() + editor::views::timeline_paint::GUTTER;
    let around = 0.9;
    h.hover_at(egui::pos2(left + around * (rect.right() - left), rect.center().y));
    h.run();
    h.event_modifiers(egui::Event::Zoom(2.0), Modifiers::COMMAND);
    h.run();
    h.get_by_label("timeline shows 50.0% of the step from 45.0%");
    h.get_by_label("Whole step").click();
    h.run();
    h.get_by_label("timeline shows 100.0% of the step from 0.0%");
    h.check_accessibility();
}

#[test]
fn a_hovered_task_says_what_it_is_and_what_it_waited_for() {
    let (mut h, _) = recorded(SIZE, Theme::Dark, 3);
    let rect = h.get_by_label("measured step 3").rect();
    let lane = h.get_by_label_contains("measured: rank 1 compute").rect();
    // The first task of rank 1 begins when the first forward pass of rank 0 was received.
    let plot = editor::views::timeline_paint::GUTTER;
    let now = h.state().desk.now().unwrap().clone();
    let (at, task) = now.spans.iter().enumerate().find(|(_, s)| s.rank == 1 && &*s.stream == "compute").unwrap();
    let middle = (task.start_nanos + task.end_nanos) as f32 / 2.0 / now.interval_nanos.1 as f32;
    h.hover_at(egui::pos2(rect.left() + plot + middle * (rect.width() - plot), lane.center().y));
    h.run_steps(8);
    h.get_by_label_contains("waited for: receive, microbatch 0");
    let lanes = editor::views::lanes::Lanes::new(now.clone());
    assert_eq!(lanes.chain(at as u32).len(), 2, "the task and the transfer; the sender is another rank's");
}

#[test]
fn the_cursor_over_step_and_rank_is_one_for_all_views() {
    let (mut h, source) = recorded(SIZE, Theme::Dark, 12);
    assert!(h.state().desk.cursor.step.is_none());
    h.key_press(Key::ArrowLeft);
    h.run();
    assert_eq!(h.state().desk.now().unwrap().step, 11);
    h.get_by_label("measured step 11");
    h.get_by_label("loads of 4 layers with 16 experts in step 11");
    // What comes in does not move it, until it is told to follow.
    source.step(13);
    h.run();
    h.get_by_label("measured step 11");
    h.key_press(Key::End);
    h.run();
    h.get_by_label("measured step 13");
    let (mut h, _) = recorded(SIZE, Theme::Dark, 2);
    h.key_press(Key::ArrowDown);
    h.run();
    assert_eq!(h.state().desk.cursor.rank, Some(0));
    assert!(h.query_by_label_contains("measured: rank 1 compute").is_none());
    h.key_press(Key::ArrowUp);
    h.run();
    h.get_by_label_contains("measured: rank 1 compute");
}

#[test]
fn experts_are_selected_and_those_that_stand_out_are_named() {
    let (mut h, _) = recorded(SIZE, Theme::Light, 12);
    h.get_by_label("1 dead: L3.E7");
    h.get_by_label_contains("1 hot: L2.E5");
    h.get_by_label_contains("layer 2, MaxVio 1.").click();
    h.run();
    assert_eq!(h.state().desk.selected, Some(Selected { layer: 2, expert: 5 }));
    h.get_by_label("selected layer 2 expert 5");
    h.get_by_label("loads of layer 2 over 12 steps");
    // By pointing: the fourth expert of the third row.
    let map = h.get_by_label("loads of 4 layers with 16 experts in step 12").rect();
    let cell = map.min + map.size() * egui::vec2(3.5 / 16.0, 2.5 / 4.0);
    h.hover_at(cell);
    h.drag_at(cell);
    h.drop_at(cell);
    h.run();
    h.get_by_label("selected layer 3 expert 3");
    h.check_accessibility();
}

#[test]
fn what_if_plans_with_the_loads_of_the_step() {
    let (mut h, _) = recorded([1280.0, 1000.0], Theme::Dark, 4);
    h.state_mut().desk.open_scene(None, "(schedule: OneFOneB)".into());
    h.step();
    h.get_by_label("Plan it").click();
    for _ in 0..200 {
        h.step();
        if h.query_by_label("experts balanced").is_some() {
            break;
        }
        std::thread::sleep(std::time::Duration::from_millis(5));
    }
    h.get_by_label("as measured");
    h.get_by_label("2 nodes a token");
    h.get_by_label("planned with the loads of step 4");
    h.get_by_label_contains("-8.");
}

#[test]
fn an_edited_schedule_changes_the_plan_beside_the_measured_step() {
    let (mut h, _) = recorded(SIZE, Theme::Dark, 5);
    h.state_mut().desk.open("small.ron", false);
    settle(&mut h, |app| app.desk.document.as_ref().is_some_and(|d| d.planned.is_some() && !d.is_busy()));
    assert_eq!(h.state().desk.tracks.len(), 1, "a scene does not take the place of a run");
    let planned = |h: &egui_kittest::Harness<'static, editor::app::EditorApp>| {
        h.state().desk.document.as_ref().unwrap().planned.as_ref().unwrap().snapshot.interval_nanos.1
    };
    let before = planned(&h);
    h.get_by_label_contains("predicted: rank 0 compute");
    h.get_by_label_contains("measured: rank 0 compute");
    h.state_mut().show("Scene");
    h.step();
    h.get_by_label("Form").click();
    h.step();
    h.step();
    h.get_by_label("pipeline.schedule").click();
    h.step();
    h.step();
    h.get_by_label("DualPipe").click();
    settle(&mut h, |app| app.desk.document.as_ref().is_some_and(|d| d.text.contains("DualPipe") && !d.is_busy()));
    assert!(planned(&h) < before, "{} is not below {before}", planned(&h));
    assert!(h.state().desk.document.as_ref().unwrap().is_modified());

    // Typed text is checked in place.
    h.get_by_label("Text").click();
    h.step();
    h.step();
    let text = h.get_by_label("scene text");
    text.focus();
    h.step();
    h.get_by_label("scene text").type_text("wrong");
    settle(&mut h, |app| app.desk.document.as_ref().is_some_and(|d| !d.report.diagnostics.is_empty()));
    h.get_by_label("5:1: unknown field `wrong`");
    h.check_accessibility();
}

#[test]
fn a_run_is_attached_lost_and_found_again() {
    let source = FakeSource::default();
    let bench = FakeBench::default();
    bench.sources.lock().unwrap().push_back(source.clone());
    let mut h = editor(SIZE, Theme::Dark, bench);
    h.step();
    h.key_press_modifiers(Modifiers::COMMAND, Key::O);
    h.step();
    h.step();
    h.get_by_label("File, folder or address").type_text("http://127.0.0.1:7000");
    h.step();
    h.get_by_label("Open it").click();
    settle(&mut h, |app| app.desk.tracks.len() == 1);
    h.get_by_label_contains("127.0.0.1:7000: connecting");
    source.tell(SourceEvent::Connected("fake".into()));
    (1..=3).for_each(|step| source.step(step));
    settle(&mut h, |app| app.desk.run_state.as_deref() == Some("running"));
    h.get_by_label_contains("127.0.0.1:7000: running");
    h.get_by_label("measured step 3");

    source.tell(SourceEvent::Lost("connection refused".into()));
    settle(&mut h, |app| app.desk.tracks[0].link == Link::Lost("connection refused".into()));
    h.get_by_label_contains("lost: connection refused; trying again");
    h.get_by_label("measured step 3");
    assert!(!h.state().desk.is_live());

    source.tell(SourceEvent::Connected("fake".into()));
    source.tell(SourceEvent::Dropped(4));
    source.step(8);
    settle(&mut h, |app| app.desk.is_live() && app.desk.now().unwrap().step == 8);
    h.get_by_label("measured step 8");
    h.get_by_label("4 steps left out");
}

#[test]
fn a_run_is_paused_stepped_and_stopped_and_its_values_are_set() {
    let (mut h, source) = recorded(SIZE, Theme::Dark, 3);
    h.get_by_label("Pause").click();
    settle(&mut h, |app| app.desk.is_paused());
    h.get_by_label("Resume");
    h.key_press(Key::Period);
    h.step();
    h.key_press(Key::Space);
    settle(&mut h, |app| !app.desk.is_paused());
    h.get_by_label("Checkpoint").click();
    h.step();
    h.get_by_label("Stop").click();
    h.step();
    for method in ["run.pause", "run.step", "run.resume", "run.checkpoint", "run.stop"] {
        assert_eq!(source.called(method).len(), 1, "{method}");
    }
    h.state_mut().show("World");
    h.run_steps(6);
    h.get_by_label("lr").click();
    h.step();
    h.get_by_label("lr").set_value_accesskit(0.5);
    h.run_steps(3);
    h.key_press(Key::Enter);
    h.run_steps(3);
    let set = source.called("run.set");
    assert_eq!(set.last().map(|params| (&params["path"], params["value"].as_f64())), Some((&"lr".into(), Some(0.5))));
}

#[test]
fn the_world_is_a_tree_with_an_inspector() {
    let (mut h, source) = recorded(SIZE, Theme::Light, 2);
    h.state_mut().show("World");
    h.run_steps(4);
    h.get_by_label("3 entities");
    h.get_by_label("open rank 0").click();
    h.run_steps(3);
    h.get_by_label("open layer 1").click();
    h.run_steps(3);
    h.get_by_label("expert 7").click();
    h.run_steps(4);
    h.get_by_label("expert 7 (entity 3)");
    h.get_by_label("ExpertLoad:");
    assert_eq!(source.called("world.get")[0]["entity"], 3);
    h.get_by_label("close layer 1").click();
    h.run_steps(3);
    assert!(h.query_by_label("expert 7").is_none());
    h.check_accessibility();
}

#[test]
fn requests_are_listed_sorted_and_counted_and_a_run_that_trains_has_none() {
    let source = FakeSource::default();
    source.tell(SourceEvent::Connected("fake".into()));
    (1..=12).for_each(|step| source.serves(step));
    let mut h = editor(SIZE, Theme::Dark, FakeBench::default());
    h.state_mut().desk.attach(Box::new(source.clone()), false);
    settle(&mut h, |app| app.desk.now().is_some_and(|now| now.step == 12));
    h.state_mut().show_only("Requests");
    h.run_steps(6);
    assert_eq!(source.called("world.query")[0]["components"][0], "Request");
    h.get_by_label("6 running; over 12 steps up to step 12");
    h.get_by_label("44 blocks used, of 64; over 12 steps up to step 12");
    h.get_by_label(
        "request 43, running: 128 of 576 tokens computed, prompt 512, new 0 of 64, 8 blocks, priority 2, 800 ms",
    );
    let tops = |h: &egui_kittest::Harness<'static, editor::app::EditorApp>| -> Vec<f32> {
        let tops = [38, 41, 42, 43, 44, 45].map(|id| h.get_by_label_contains(&format!("request {id}, ")).rect().top());
        tops.into()
    };
    assert!(tops(&h).is_sorted(), "by number: {:?}", tops(&h));
    h.get_by_label("sort by age").click();
    h.run_steps(3);
    assert!(tops(&h).iter().rev().is_sorted(), "the youngest came last: {:?}", tops(&h));
    h.get_by_label("sorted by age, ascending").click();
    h.run_steps(3);
    h.get_by_label("sorted by age, descending");
    assert!(tops(&h).is_sorted(), "{:?}", tops(&h));

    // Another step, another question; a look at an old step leaves the table.
    let asked = source.called("world.query").len();
    source.serves(13);
    h.run_steps(6);
    assert_eq!(source.called("world.query").len(), asked + 1);
    h.state_mut().desk.cursor.step = Some(7);
    h.run_steps(3);
    h.get_by_label("6 running; over 7 steps up to step 7");
    h.get_by_label("gauges are of the step under the cursor, the table is of now");
    source.tell(SourceEvent::Lost("connection refused".into()));
    h.run_steps(4);
    h.get_by_label("as it was when the run was last heard of");
    h.check_accessibility();

    let (mut h, source) = recorded(SIZE, Theme::Light, 3);
    h.state_mut().show_only("Requests");
    h.run_steps(4);
    h.get_by_label("nobody asks this run: its steps are not those of a model that serves");
    assert!(source.called("world.query").is_empty(), "its steps say that there are none");
    let mut h = editor(SIZE, Theme::Light, FakeBench::default());
    h.state_mut().show_only("Requests");
    h.run_steps(3);
    h.get_by_label_contains("no requests: attach to a model that serves");
}

#[test]
fn memory_marks_its_peak_and_curves_are_there_for_what_is_told() {
    let (mut h, _) = recorded(SIZE, Theme::Dark, 6);
    for title in ["loss, nats a token", "gradient norm", "learning rate", "tokens/s", "MaxVio", "idle share"] {
        h.get_by_label(&format!("curve {title}"));
    }
    assert!(h.query_by_label("curve money, USD").is_none(), "the run told nothing of money");
    h.state_mut().show("Memory");
    h.run_steps(3);
    h.get_by_label_contains("measured memory of rank 0, peak 83.9 MiB");
    h.check_accessibility();
}

/// A recorded run of nine steps of which the third and fourth have tasks.
fn traced() -> FileSource {
    let step = |number| match number {
        3 | 4 => snapshot(number),
        // What a log tells: neither tasks nor bytes over them.
        _ => Snapshot { step: number, spans: Vec::new().into(), histograms: Vec::new(), ..snapshot(number) },
    };
    FileSource::of("runs/a".into(), (1..=9).map(step).collect())
}

#[test]
fn a_step_without_tasks_says_which_steps_have_them() {
    let mut h = editor(SIZE, Theme::Dark, FakeBench::default());
    h.state_mut().desk.attach(Box::new(traced()), false);
    settle(&mut h, |app| app.desk.now().is_some_and(|now| now.step == 4));
    h.get_by_label("measured step 4");
    for (key, step) in [(Key::End, 9), (Key::ArrowLeft, 8)] {
        h.key_press(key);
        h.run();
        h.get_by_label(&format!("step {step} has no tasks; steps 3 to 4 have"));
    }
    assert!(h.query_by_label_contains("measured step").is_none(), "no other step stands for the one under the cursor");
    h.get_by_label("Go to step 4").click();
    h.run();
    h.get_by_label("measured step 4");
    assert!(h.query_by_label_contains("has no tasks").is_none());

    h.state_mut().show_only("Memory");
    h.run_steps(3);
    h.get_by_label_contains("measured memory of rank 0, peak");
    h.state_mut().desk.cursor.step = Some(1);
    h.run_steps(3);
    h.get_by_label("step 1 has no bytes over its tasks; steps 3 to 4 have");
    h.get_by_label("measured peaks of rank 0, 57.2 MiB together");
    h.get_by_label("Go to step 3").click();
    h.run_steps(3);
    h.get_by_label_contains("measured memory of rank 0, peak");
    h.check_accessibility();
}

#[test]
fn a_plan_is_not_called_measured() {
    let mut h = editor(SIZE, Theme::Dark, FakeBench::default());
    let mut plan = snapshot(0);
    plan.scalars = vec![(chrome::PLANNED.into(), 1.0)];
    h.state_mut().desk.attach(Box::new(FileSource::of("plan.json".into(), vec![plan.clone()])), false);
    settle(&mut h, |app| app.desk.now().is_some());
    h.get_by_label("planned step 0");
    h.get_by_label_contains("planned plan.json: 1.");
    assert!(h.query_by_label_contains("measured").is_none());
    h.state_mut().desk.attach(Box::new(FileSource::of("plan.json".into(), vec![plan])), true);
    settle(&mut h, |app| app.desk.tracks.len() == 2 && app.desk.tracks[1].history.range().is_some());
    h.get_by_label("compared plan step 0");
}

#[test]
fn curves_are_taken_away_and_brought_back_and_stand_values_of_any_size() {
    let (mut h, source) = recorded(SIZE, Theme::Dark, 6);
    let mut wild = snapshot(7);
    wild.scalars = vec![
        ("loss_nats_per_token".into(), 1e30),
        ("val_loss_nats_per_token".into(), f64::NAN),
        ("grad_norm".into(), f64::INFINITY),
        ("lr".into(), f64::MAX),
        ("tokens_per_sec".into(), f64::MIN),
        ("overhead_share".into(), 0.1),
    ];
    source.tell(SourceEvent::Snapshot(Arc::new(wild)));
    let mut after = snapshot(8);
    after.scalars.push(("overhead_share".into(), 0.2));
    source.tell(SourceEvent::Snapshot(Arc::new(after)));
    settle(&mut h, |app| app.desk.now().is_some_and(|now| now.step == 8));
    h.state_mut().show_only("Curves");
    h.run_steps(6);
    // Whatever the values, plots stay in columns that are equally wide, and inside of the window.
    let titles = ["loss, nats a token", "gradient norm", "learning rate", "tokens/s", "MaxVio", "idle share"];
    let rects = titles.map(|title| h.get_by_label(&format!("curve {title}")).rect());
    for rect in rects {
        assert!((rect.width() - rects[0].width()).abs() < 1.0 && rect.width() > 200.0, "{rects:?}");
        assert!(rect.right() <= SIZE[0] && rect.bottom() <= SIZE[1], "{rects:?}");
    }
    h.get_by_label("show overhead share").click();
    h.run_steps(3);
    assert!(h.get_by_label("show overhead share").accesskit_node().toggled() == Some(Toggled::False));
    h.get_by_label("show overhead share").click();
    h.run_steps(3);
    assert!(h.get_by_label("show overhead share").accesskit_node().toggled() == Some(Toggled::True));
    h.check_accessibility();
}

#[test]
fn keys_have_a_sheet_and_two_sources_are_compared() {
    let (mut h, _) = recorded(SIZE, Theme::Light, 6);
    h.key_press(Key::Questionmark);
    h.run_steps(3);
    h.get_by_label("Keys and colours");
    h.get_by_label("follow the newest step");
    h.key_press(Key::Questionmark);
    h.run_steps(3);
    assert!(h.query_by_label("follow the newest step").is_none());

    let other = FakeSource::default();
    other.tell(SourceEvent::Snapshot(Arc::new(snapshot(2))));
    other.tell(SourceEvent::Ended("1 recorded steps".into()));
    h.state_mut().desk.attach(Box::new(other), true);
    settle(&mut h, |app| app.desk.tracks.len() == 2 && app.desk.tracks[1].history.steps().len() == 1);
    h.get_by_label("measured step 6");
    h.get_by_label("compared step 2");
}

#[test]
fn an_empty_window_says_what_to_do() {
    let mut h = editor(SIZE, Theme::Dark, FakeBench::default());
    h.run();
    h.get_by_label("no step with tasks yet: run the scene, or open a trace");
    h.get_by_label("no loads of experts yet: run a scene with experts, or open a run's folder");
    h.get_by_label("Run").click();
    h.run();
    assert!(h.get_all_by_role(Role::Button).count() > 5);
    h.state_mut().desk.open("nowhere", false);
    settle(&mut h, |app| app.desk.message_is_error);
    h.get_by_label("nowhere: there is none");
    assert!(h.get_by_label("Pause").accesskit_node().is_disabled());
}
