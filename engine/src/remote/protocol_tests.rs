//! Tests of what goes over the wire: that it comes back as it was, and that nonsense is no harm.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use kernels::cost::Cost;

use super::*;
use crate::{
    task::{Pass, Role},
    telemetry::tests::span,
};

fn a_snapshot() -> Snapshot {
    let mut first = span("norm of layer 0", 0, "compute", 1_000, 1_900);
    first.pass = Some(Pass::WeightGrad);
    (first.layer, first.microbatch, first.stage) = (Some(0), Some(3), 2);
    first.cost = Cost { product_flops: 1, core_flops: 2, inter_node_bytes: u64::MAX, ..Cost::gemm(3, 4, 5, 2) };
    let mut second = span("send", 1, "comm", 900, 2_500);
    (second.role, second.waited_for, second.wait_nanos, second.load) = (Role::Send, Some(0), 7, Some((3, 9)));
    Snapshot {
        step: 41,
        interval_nanos: (1_000, 3_000),
        spans: vec![first, second].into(),
        scalars: vec![("step_secs".into(), 0.25), ("bad".into(), f64::INFINITY)],
        histograms: vec![("h".into(), vec![1.0, -0.5])],
    }
}

#[test]
fn a_snapshot_comes_back_as_it_was() {
    let sent = a_snapshot();
    let Frame { num_dropped, snapshot } = decode(&frame(5, &encode(&sent).unwrap())).unwrap();
    assert_eq!(num_dropped, 5);
    assert_eq!((snapshot.step, snapshot.interval_nanos), (sent.step, sent.interval_nanos));
    assert_eq!(snapshot.spans, sent.spans);
    assert_eq!((&snapshot.scalars, &snapshot.histograms), (&sent.scalars, &sent.histograms));
    let again = decode(&frame(5, &encode(&sent).unwrap())).unwrap();
    assert!(std::ptr::eq(again.snapshot.spans[0].kind.0, snapshot.spans[0].kind.0), "a kind's name is kept once");
}

#[test]
fn a_frame_of_another_version_says_so() {
    let mut bytes = frame(0, &encode(&a_snapshot()).unwrap());
    bytes[0] = VERSION + 1;
    let message = decode(&bytes).unwrap_err().to_string();
    assert!(message.contains("expected frames of version 1, found version 2"), "{message}");
}

#[test]
fn a_damaged_frame_is_an_error_and_no_more() {
    let whole = frame(0, &encode(&a_snapshot()).unwrap());
    for len in 0..whole.len() {
        assert!(decode(&whole[..len]).is_err(), "the first {len} bytes");
    }
    // Every byte, changed in every bit: it may be read as something else, but it is read.
    for at in HEADER_BYTES..whole.len() {
        for bit in 0..8 {
            let mut changed = whole.clone();
            changed[at] ^= 1 << bit;
            if let Ok(Frame { snapshot, .. }) = decode(&changed) {
                let num_spans = snapshot.spans.len();
                assert!(
                    snapshot.spans.iter().all(|span| span.waited_for.is_none_or(|task| (task as usize) < num_spans))
                );
                assert!(snapshot.spans.iter().all(|span| span.wait_nanos <= span.nanos()));
            }
        }
    }
    // A length of four billion is not believed.
    let mut endless = vec![VERSION];
    endless.extend([0; 8]);
    endless.extend([0, 0, 0, 0xff, 0xff, 0xff, 0xff, 0x0f]);
    assert!(decode(&endless).is_err());
}

#[test]
fn answers_are_read_as_they_are_written() {
    let error = RpcError { data: Some(json!({ "line": 3 })), ..RpcError::params("expected more") };
    for result in [Ok(json!({ "a": [1] })), Ok(Value::Null), Err(error)] {
        let text = response(&json!(7), result.clone()).to_string();
        assert_eq!(read_response(&text), Some((7, result)));
    }
    assert_eq!(read_response(r#"{"jsonrpc":"2.0","method":"telemetry.step"}"#), None);
}

/// What a step costs to encode, and how large it is; run with `--ignored --nocapture`.
#[test]
#[ignore = "prints how long encoding takes here and asserts nothing: a bound would test the machine"]
fn the_cost_of_a_large_step() {
    let spans: Vec<_> = (0..10_000u32)
        .map(|i| {
            let start = u64::from(i) * 90_000;
            let mut span = span(
                &format!("kind {}, layer {}, microbatch {}", i % 40, i % 61, i % 64),
                i % 16,
                "compute",
                start,
                start + 80_000,
            );
            (span.layer, span.microbatch, span.cost) = (Some(i % 61), Some(i % 64), Cost::gemm(4096, 2048, 7168, 2));
            span
        })
        .collect();
    let histograms = (0..58).map(|layer| (format!("load/layer {layer}"), (0..256).map(f64::from).collect())).collect();
    let snapshot =
        Snapshot { step: 1, interval_nanos: (0, 900_000_000), spans: spans.into(), scalars: Vec::new(), histograms };
    let time = |work: &mut dyn FnMut()| {
        let begin = kernels::clock::now_nanos();
        work();
        (kernels::clock::now_nanos() - begin) as f64 * 1e-6
    };
    let mut bytes = Vec::new();
    let encode_millis = time(&mut || bytes = frame(0, &encode(&snapshot).unwrap()));
    let decode_millis = time(&mut || drop(decode(&bytes).unwrap()));
    eprintln!(
        "10,000 spans and 58 x 256 loads: {} kB, encoded in {encode_millis:.2} ms, decoded in {decode_millis:.2} ms",
        bytes.len() / 1000
    );
}
