//! What of the measurement is a fact of its own: bytes, operations, order, and what a share of time comes to.

#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;

#[test]
fn a_token_is_sent_to_four_nodes_in_8_bits_and_comes_back_in_16() {
    let z = Sizes::over(1);
    // 7168 codes and 56 scales; 4096 tokens.
    assert_eq!(z.dispatch_bytes(), 4096 * 4 * (7168 + 224));
    assert_eq!(z.combine_bytes(), 4096 * 4 * 14336);
}

#[test]
fn all_that_is_hidden_is_1_and_nothing_is_0() {
    let of = |both_secs| Overlap {
        num_sms: 132,
        comm_sms: 20,
        whole_secs: 9.0,
        compute_secs: 10.0,
        comm_secs: 4.0,
        both_secs,
        flops: 0,
        comm_bytes: 0,
        host_ops: 0,
    };
    assert_eq!([10.0, 11.0, 14.0, 15.0].map(|both| of(both).hidden_share()), [1.0, 0.75, 0.0, -0.25]);
    assert!((PUBLISHED_HIDDEN_SHARE - 0.963).abs() < 5e-4);
}

/// What is launched at full size, by shapes alone: three passes of all products, and 3.5 of attention's core, which the trace's 67.2
/// TFLOP of four layers have too.
#[test]
fn the_work_of_a_layer_is_that_of_the_published_trace() {
    let memory = Memory::new(Device::Meta);
    let pair = Pair::new(&memory, &Sizes::over(1));
    let mut s = Stream::new("meta", &memory, &Arc::default()).unwrap();
    s.start_recording();
    pair.compute(&mut s).unwrap();
    let flops = s.finish_recording().cost.flops() as f64;
    assert!((flops / (67.2e12 / 4.0) - 1.0).abs() < 0.05, "{flops:.4e}");
}

#[test]
fn it_runs_on_processors_with_threads_for_streams() {
    let request = Request { device: Device::Cpu, runs: 1, shrink: 128, comm_sms: None, tuning: None };
    let found = run(&request).unwrap();
    let z = Sizes::over(128);
    assert_eq!((found.num_sms, found.comm_sms), (0, 0));
    assert_eq!(found.comm_bytes as usize, 2 * (z.dispatch_bytes() + z.combine_bytes()));
    assert!(found.flops > 0 && found.compute_secs > 0.0 && found.comm_secs > 0.0 && found.both_secs > 0.0);
}
