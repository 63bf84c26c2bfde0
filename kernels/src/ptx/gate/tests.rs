//! The gate against the CPU op: every output, every mode, ties, and what must be told of.

use super::*;
use crate::{
    ops::gate::{self as cpu, Groups},
    ptx::case::{Case, Data},
};

const PLAIN: Gate =
    Gate { score: Score::Sigmoid, groups: None, norm_topk_prob: true, routed_scaling_factor: 2.5, mode: Mode::Learned };

fn groups(num: usize, keep: usize, score: GroupScore) -> Option<Groups> {
    Some(Groups { num, keep, score })
}

/// Logits, bias, and the outputs, poisoned.
fn inputs(t: usize, (e, k): (usize, usize), logits: Data) -> [Data; 6] {
    [
        logits,
        Data::random(DType::F32, &[e], 2).map(|b| 0.3 * b),
        Data::poison(DType::F32, &[t, e]),
        Data::poison(DType::U32, &[t, k]),
        Data::poison(DType::F32, &[t, k]),
        Data::poison(DType::U32, &[e]),
    ]
}

fn outputs(x: &[Tensor]) -> Outputs {
    Outputs { scores: x[2], indices: x[3], weights: x[4], counts: x[5] }
}

fn check(gate: Gate, sizes: (usize, usize), bias: bool, t: usize, logits: Data) {
    Case::new(&inputs(t, sizes, logits))
        .cpu(|s, x| cpu::forward(s, gate, x[0], bias.then_some(x[1]), outputs(x)))
        .ptx(|x| forward(gate, x[0], bias.then_some(x[1]), outputs(x)))
        .close(2e-6);
}

fn gates() -> Vec<(Gate, (usize, usize))> {
    let v2 = Gate { score: Score::Softmax, norm_topk_prob: false, routed_scaling_factor: 16.0, ..PLAIN };
    vec![
        (PLAIN, (8, 3)),
        (Gate { groups: groups(8, 4, GroupScore::Top2Sum), ..PLAIN }, (256, 8)),
        (Gate { groups: groups(8, 4, GroupScore::Top2Sum), ..PLAIN }, (64, 8)),
        (Gate { groups: groups(6, 3, GroupScore::Top2Sum), ..PLAIN }, (6, 2)),
        (Gate { groups: groups(4, 4, GroupScore::Top2Sum), ..PLAIN }, (8, 8)),
        (Gate { groups: groups(40, 20, GroupScore::Top2Sum), ..PLAIN }, (80, 40)),
        (v2, (64, 6)),
        (Gate { groups: groups(8, 3, GroupScore::Max), ..v2 }, (160, 6)),
        (Gate { norm_topk_prob: false, ..PLAIN }, (5, 1)),
        (Gate { groups: groups(2, 1, GroupScore::Max), ..PLAIN }, (512, 4)),
    ]
}

#[test]
fn routing_is_the_cpus() {
    for (i, (gate, sizes)) in gates().into_iter().enumerate() {
        for (t, bias) in [(13, true), (1, false)] {
            let logits = Data::random(DType::F32, &[t, sizes.0], 7 + i as u64).map(|x| 3.0 * x);
            check(gate, sizes, bias, t, logits);
        }
    }
    check(PLAIN, (8, 2), true, 0, Data::poison(DType::F32, &[0, 8]));
}

#[test]
fn ties_go_to_the_lower_index() {
    for (gate, sizes) in gates() {
        let t = 9;
        // Three values: most experts and groups tie, and no two sums of different scores. Row 0 is one value.
        let three = |x: f64| [-0.9, 0.0, 1.1][((1.5 * x).round() + 1.0) as usize];
        let mut logits = Data::random(DType::F32, &[t, sizes.0], 3).map(three);
        logits.2[..sizes.0].fill(1.0);
        check(gate, sizes, false, t, logits);
    }
}

#[test]
fn negative_biases_leak_no_expert_out_of_the_chosen_groups() {
    let gate = Gate { groups: groups(4, 1, GroupScore::Top2Sum), ..PLAIN };
    let mut inputs = inputs(20, (16, 4), Data::random(DType::F32, &[20, 16], 3));
    inputs[1].2.fill(-9.0);
    Case::new(&inputs)
        .cpu(|s, x| cpu::forward(s, gate, x[0], Some(x[1]), outputs(x)))
        .ptx(|x| forward(gate, x[0], Some(x[1]), outputs(x)))
        .close(2e-6);
}

#[test]
fn forced_and_random_routing_are_the_cpus_to_the_index() {
    for mode in [Mode::Forced, Mode::Random { seed: 1 << 40 | 5, step: 3 }, Mode::Random { seed: 2, step: 1 << 33 }] {
        for (t, sizes) in [(70, (8, 2)), (9, (4, 4)), (33, (256, 8)), (3, (70, 40)), (7, (5, 3))] {
            let logits = Data::random(DType::F32, &[t, sizes.0], 4);
            check(Gate { mode, ..PLAIN }, sizes, false, t, logits);
        }
    }
}

#[test]
fn each_barrier_of_a_warp_is_needed() {
    // Without groups the only one stands before `redux`, where the interpreter's lanes meet anyway.
    let gate = Gate { groups: groups(8, 4, GroupScore::Top2Sum), ..PLAIN };
    let inputs = inputs(9, (64, 8), Data::random(DType::F32, &[9, 64], 3));
    Case::new(&inputs).mutants("bar.warp.sync", |x| forward(gate, x[0], None, outputs(x)));
}

#[test]
fn a_nan_is_told_of() {
    for score in [Score::Sigmoid, Score::Softmax] {
        let mut logits = Data::random(DType::F32, &[3, 4], 1);
        logits.2[9] = f64::NAN;
        let gate = Gate { score, ..PLAIN };
        Case::new(&inputs(3, (4, 2), logits)).same_error(
            |s, x| cpu::forward(s, gate, x[0], None, outputs(x)),
            |_, x| forward(gate, x[0], None, outputs(x)),
        );
    }
}

#[test]
fn gradients_are_the_cpus() {
    for score in [Score::Sigmoid, Score::Softmax] {
        for norm_topk_prob in [false, true] {
            for (t, e, k) in [(9, 256, 8), (3, 6, 2), (2, 70, 40), (0, 8, 2)] {
                let gate = Gate { score, norm_topk_prob, ..PLAIN };
                // Any scores do; indices are distinct in a row.
                let indices: Vec<u32> = (0..t * k).map(|i| ((i / k * 3 + i % k * 7) % e) as u32).collect();
                let inputs = [
                    Data::random(DType::F32, &[t, e], 1).map(|x| 0.5 + 0.4 * x),
                    Data::u32(&[t, k], &indices),
                    Data::random(DType::F32, &[t, k], 2),
                    Data::random(DType::F32, &[t, e], 3),
                    Data::poison(DType::F32, &[t, e]),
                ];
                for given in [false, true] {
                    Case::new(&inputs)
                        .cpu(|s, x| cpu::input_grad(s, gate, x[0], x[1], x[2], given.then_some(x[3]), x[4]))
                        .ptx(|x| input_grad(gate, x[0], x[1], x[2], given.then_some(x[3]), x[4]))
                        .close(4e-6);
                }
            }
        }
    }
}
