//! Calibration recovers what synthetic spans were made with, through a trace file as well.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::{
    hardware::tests::spec,
    telemetry::{Snapshot, Span, tests::span},
    trace::TraceWriter,
};

fn cost(flops: u64) -> Cost {
    Cost { vector_flops: flops, ..Cost::default() }
}

/// Spans of two kinds on a device whose launch takes 7 us, whose `a` takes 1.7 times and whose `b` 0.4 times what the
/// model says; every tenth was preempted.
fn measured() -> (Corrections, Vec<Sample>) {
    let kind_factors = [("a".to_owned(), 1.7), ("b".to_owned(), 0.4)].into();
    let truth = Corrections { kind_factors, launch_secs: Some(7e-6) };
    let device = DeviceSpec { corrections: truth.clone(), ..spec() };
    let samples = (0..200u64).map(|i| {
        let (kind, cost) = (["a", "b"][(i % 2) as usize], cost(1_000_000 * (1 + i * 7 % 31)));
        let secs = device.task_secs(kind, &cost, Format::F32).unwrap();
        let delay_secs = if i % 10 == 9 { 3e-3 } else { 0.0 };
        Sample { kind: kind.to_owned(), cost, secs: secs + delay_secs }
    });
    (truth, samples.collect())
}

fn assert_same(found: &Corrections, truth: &Corrections) {
    let close = |a: f64, b: f64| (a - b).abs() <= 1e-6 * b;
    assert!(close(found.launch_secs.unwrap(), truth.launch_secs.unwrap()), "{found:?}");
    assert_eq!(found.kind_factors.keys().collect::<Vec<_>>(), truth.kind_factors.keys().collect::<Vec<_>>());
    for (kind, factor) in &truth.kind_factors {
        assert!(close(found.factor(kind), *factor), "{kind}: {found:?}");
    }
}

#[test]
fn synthetic_durations_are_recovered() {
    let (truth, samples) = measured();
    assert_same(&fit(&spec(), Format::F32, &samples).unwrap(), &truth);
    // What the device is corrected by already makes no difference.
    let corrected = DeviceSpec { corrections: truth.clone(), ..spec() };
    assert_same(&fit(&corrected, Format::F32, &samples).unwrap(), &truth);
}

#[test]
fn tasks_of_one_size_give_a_factor_and_leave_the_launch_as_it_was() {
    let device = spec();
    let task = |flops: u64, secs| Sample { kind: "k".into(), cost: cost(flops), secs };
    // The model says 2 us for the launch and 10 us for the work.
    let samples = [task(10_000_000, 32e-6), task(10_000_000, 22e-6), task(10_000_000, 1.0)];
    let found = fit(&device, Format::F32, &samples).unwrap();
    assert_eq!(found.launch_secs, None);
    assert!((found.factor("k") - 3.0).abs() < 1e-9, "{found:?}");
    assert_eq!(found.factor("other"), 1.0);
    assert_eq!(fit(&device, Format::F32, &[task(0, 1e-6)]).unwrap(), Corrections::default());
    assert_eq!(fit(&device, Format::F32, &[]).unwrap(), Corrections::default());
    assert!(fit(&device, Format::F64, &samples).is_err());
}

/// A trace file of `spans`, or its first third.
fn trace(spans: Vec<Span>, cut: bool) -> tempfile::NamedTempFile {
    let mut writer = TraceWriter::new(Vec::new()).unwrap();
    writer.push(&Snapshot { spans: spans.into(), ..Snapshot::default() }).unwrap();
    let mut bytes = writer.finish().unwrap();
    if cut {
        bytes.truncate(bytes.len() / 3);
    }
    let file = tempfile::NamedTempFile::new().unwrap();
    fs::write(file.path(), bytes).unwrap();
    file
}

#[test]
fn a_trace_says_what_its_tasks_cost() {
    let (truth, samples) = measured();
    let mut begin = 0;
    let spans: Vec<Span> = samples
        .iter()
        .map(|sample| {
            let nanos = (sample.secs * 1e9).round() as u64;
            let kind = crate::task::TaskKind(if sample.kind == "a" { "a" } else { "b" });
            begin += nanos + 5;
            Span { kind, cost: sample.cost, ..span("t", 0, "compute", begin - nanos, begin) }
        })
        .collect();
    let whole = read_trace(trace(spans.clone(), false).path()).unwrap();
    assert_eq!(whole.len(), samples.len(), "tasks, and no bubbles");
    assert!(whole.iter().zip(&samples).all(|(a, b)| (&a.kind, a.cost) == (&b.kind, b.cost)));
    let found = fit(&spec(), Format::F32, &whole).unwrap();
    assert!((found.factor("a") - 1.7).abs() < 1e-3 && (found.factor("b") - 0.4).abs() < 1e-3, "{found:?} {truth:?}");
    let part = read_trace(trace(spans, true).path()).unwrap();
    assert!((1..samples.len()).contains(&part.len()) && part == whole[..part.len()], "{}", part.len());
}

#[test]
fn a_trace_that_cannot_be_used_says_why() {
    let file = trace(vec![span("t", 0, "compute", 0, 5)], false);
    let error = read_trace(file.path()).unwrap_err().to_string();
    assert!(error.contains("has 1 tasks and none says what it cost"), "{error}");
    fs::write(file.path(), "[\n{\"ph\": },\n{}\n]").unwrap();
    let error = read_trace(file.path()).unwrap_err().to_string();
    assert!(error.contains(":2: expected an event"), "{error}");
    let writer = TraceWriter::planned(Vec::new()).unwrap();
    fs::write(file.path(), writer.finish().unwrap()).unwrap();
    let error = read_trace(file.path()).unwrap_err().to_string();
    assert!(error.contains("expected a trace of a run, found one of a plan"), "{error}");
    assert!(read_trace(Path::new("none.json")).unwrap_err().to_string().starts_with("cannot read the trace none.json"));
}
