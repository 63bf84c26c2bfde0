//! Traces are read as they were written: our own, a run's folder, and one of the shape that DeepSeek published.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

mod common;

use std::{fs, path::Path};

use editor::{
    overlap::{Overlap, overlap},
    source::{
        Source, SourceEvent, chrome,
        file::{FileSource, HIDDEN_SHARE},
    },
};
use engine::{
    task::{Pass, Role},
    telemetry::Snapshot,
    trace::TraceWriter,
};

fn written(steps: &[Snapshot]) -> String {
    let mut writer = TraceWriter::new(Vec::new()).unwrap();
    steps.iter().for_each(|step| writer.push(step).unwrap());
    String::from_utf8(writer.finish().unwrap()).unwrap()
}

#[test]
fn our_own_trace_comes_back_whole() {
    let steps = [common::snapshot(3), common::snapshot(4)];
    let text = written(&steps);
    let read = chrome::parse(&text).unwrap();
    assert_eq!(read.len(), 2);
    for (read, step) in read.iter().zip(&steps) {
        assert_eq!((read.step, read.interval_nanos), (step.step, step.interval_nanos));
        assert_eq!(read.spans, step.spans);
    }
    // A run that was cut off leaves half an event.
    let cut = &text[..text.len() - 60];
    let cut = chrome::parse(cut).unwrap();
    assert_eq!((cut.len(), cut[0].spans.len()), (2, steps[0].spans.len()));
}

#[test]
fn a_folder_has_the_figures_of_its_log_and_the_tasks_of_its_trace() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("trace.json"), written(&[common::snapshot(2)])).unwrap();
    let lines = "{\"step\":1,\"lr\":0.5,\"load/layer 1\":[1,2]}\n{\"step\":2,\"lr\":0.25}\n{\"step\":3,\"l";
    fs::write(dir.path().join("log.jsonl"), lines).unwrap();
    let mut source = FileSource::open(dir.path()).unwrap();
    let steps: Vec<_> = source
        .poll()
        .into_iter()
        .filter_map(|event| match event {
            SourceEvent::Snapshot(snapshot) => Some(snapshot),
            _ => None,
        })
        .collect();
    assert_eq!(steps.iter().map(|step| (step.step, step.spans.len())).collect::<Vec<_>>(), [(1, 0), (2, 24)]);
    assert_eq!((steps[0].scalar("lr"), steps[1].scalar("lr")), (Some(0.5), Some(0.25)));
    assert_eq!(steps[0].histograms, [("load/layer 1".to_owned(), vec![1.0, 2.0])]);
    assert!(steps[1].scalar(HIDDEN_SHARE).is_some());
    assert!(source.call("run.pause", serde_json::Value::Null).is_none());
    assert!(FileSource::open(&dir.path().join("none")).is_err());
}

#[test]
fn a_run_begins_at_the_last_step_that_was_traced() {
    let dir = tempfile::tempdir().unwrap();
    let lines: Vec<String> = (1..=9).map(|step| format!("{{\"step\":{step},\"lr\":0.5}}")).collect();
    fs::write(dir.path().join("log.jsonl"), lines.join("\n")).unwrap();
    let begins_at = || FileSource::open(dir.path()).unwrap().begins_at();
    assert_eq!(begins_at(), None, "without tasks, at the newest");
    for (traced, begin) in [(&[2, 3][..], Some(3)), (&[9], None)] {
        let steps: Vec<Snapshot> = traced.iter().map(|step| common::snapshot(*step)).collect();
        fs::write(dir.path().join("trace.json"), written(&steps)).unwrap();
        assert_eq!(begins_at(), begin);
    }
}

#[test]
fn a_step_that_a_log_tells_twice_has_each_figure_once() {
    let dir = tempfile::tempdir().unwrap();
    let lines = "{\"step\":1,\"lr\":1.0,\"load/layer 1\":[1]}\n{\"step\":1,\"lr\":0.5,\"load/layer 1\":[2]}\n{\"step\":1,\"x\":3.0}\n";
    fs::write(dir.path().join("log.jsonl"), lines).unwrap();
    let events = FileSource::open(dir.path()).unwrap().poll();
    let step = events.iter().find_map(|event| match event {
        SourceEvent::Snapshot(snapshot) => Some(snapshot),
        _ => None,
    });
    let step = step.unwrap();
    assert_eq!(step.scalars, [("lr".to_owned(), 0.5), ("x".to_owned(), 3.0)]);
    assert_eq!(step.histograms, [("load/layer 1".to_owned(), vec![2.0])]);
}

#[test]
fn a_plans_trace_is_known_for_one() {
    let is_planned = |text: &str| chrome::parse(text).unwrap()[0].scalar(chrome::PLANNED).is_some();
    let mut writer = TraceWriter::planned(Vec::new()).unwrap();
    writer.push(&common::snapshot(0)).unwrap();
    let planned = String::from_utf8(writer.finish().unwrap()).unwrap();
    assert!(is_planned(&planned));
    assert!(!is_planned(&written(&[common::snapshot(0)])), "what does not say so was measured");
}

#[test]
fn a_trace_of_deepseeks_shape_tells_how_much_communication_is_hidden() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/profile.json");
    let read = chrome::parse(&fs::read_to_string(path).unwrap()).unwrap();
    let [step] = &read[..] else { panic!("one step") };
    // Kernels only: neither the CPU's side nor the annotations are tasks.
    assert_eq!(step.spans.len(), 8);
    let dispatch = step.spans.iter().find(|span| span.label.contains("dispatch")).unwrap();
    assert_eq!((dispatch.role, dispatch.pass, &*dispatch.stream), (Role::Collective, Some(Pass::Forward), "comm 16"));
    let attention = step.spans.iter().find(|span| span.label.contains("flash_fwd")).unwrap();
    assert_eq!(
        (attention.pass, attention.kind.0, &*attention.stream),
        (Some(Pass::InputGrad), "flash_fwd_splitkv", "compute 7")
    );
    // Transfers run from 100 to 300, 400 to 500 and 800 to 900; the device computes from 0 to 250, 420 to 600 and 600 to 800.
    assert_eq!(overlap(&step.spans), Overlap { communication_nanos: 400_000, hidden_nanos: 230_000 });
    assert_eq!(overlap(&step.spans).share(), Some(0.575));
    let lanes = editor::views::lanes::Lanes::new(step.clone().into());
    assert_eq!(
        lanes.lanes[0].gaps.iter().map(|gap| (gap.start, gap.cause)).collect::<Vec<_>>(),
        [(250_000, None), (800_000, None)]
    );
}

#[test]
fn overlap_is_of_one_rank_and_counts_time_once() {
    use engine::telemetry::Span;
    let base = common::spans(100)[0].clone();
    let span = |rank, stream: &str, start_nanos, end_nanos| Span {
        rank,
        stream: stream.into(),
        start_nanos,
        end_nanos,
        ..base.clone()
    };
    let check = |spans: &[Span], communication_nanos, hidden_nanos| {
        assert_eq!(overlap(spans), Overlap { communication_nanos, hidden_nanos });
    };
    check(&[], 0, 0);
    check(&[span(0, "comm", 0, 10)], 10, 0);
    check(&[span(0, "comm", 0, 10), span(1, "compute", 0, 10)], 10, 0);
    check(&[span(0, "comm", 0, 10), span(0, "comm 2", 5, 15), span(0, "compute", 8, 30)], 15, 7);
    check(
        &[span(0, "comm", 0, 10), span(0, "compute", 2, 4), span(0, "compute b", 3, 5), span(0, "compute", 9, 20)],
        10,
        4,
    );
    assert_eq!(overlap(&[]).share(), None);
}

#[test]
fn what_is_no_trace_is_refused_with_a_reason() {
    for (text, why) in [
        ("", "expected a Chrome trace"),
        ("nonsense", "expected a Chrome trace"),
        ("[]", "expected tasks"),
        ("{\"traceEvents\": 3}", "expected a Chrome trace"),
        ("[{\"ph\":\"X\",\"name\":\"cpu_op\",\"cat\":\"cpu_op\",\"ts\":1,\"dur\":2}]", "1 are slices of another sort"),
    ] {
        let error = chrome::parse(text).unwrap_err();
        assert!(error.contains(why), "{text}: {error}");
    }
}
