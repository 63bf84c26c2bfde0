//! The gate against its definition, its modes and its gradient.

#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::ops::testing::*;

const PLAIN: Gate =
    Gate { score: Score::Sigmoid, groups: None, norm_topk_prob: true, routed_scaling_factor: 2.5, mode: Mode::Learned };

fn groups(num: usize, keep: usize, score: GroupScore) -> Option<Groups> {
    Some(Groups { num, keep, score })
}

#[derive(Debug, PartialEq)]
struct Routed {
    scores: Vec<f64>,
    indices: Vec<u32>,
    weights: Vec<f64>,
    counts: Vec<u32>,
}

fn outputs(s: &Stream, dtype: DType, t: usize, e: usize, k: usize) -> Outputs {
    let m = s.memory();
    Outputs {
        scores: m.alloc(dtype, &[t, e]),
        indices: m.alloc(DType::U32, &[t, k]),
        weights: m.alloc(dtype, &[t, k]),
        counts: m.alloc(DType::U32, &[e]),
    }
}

fn route(gate: Gate, (e, k): (usize, usize), logits: &[f64], bias: Option<&[f32]>) -> Result<Routed> {
    let mut s = stream();
    let m = s.memory().clone();
    let t = logits.len() / e;
    let x = m.from_slice(&[t, e], logits);
    let out = outputs(&s, DType::F64, t, e, k);
    forward(&mut s, gate, x, bias.map(|b| m.from_slice(&[e], b)), out)?;
    s.synchronize()?;
    Ok(Routed {
        scores: m.download(out.scores),
        indices: m.download(out.indices),
        weights: m.download(out.weights),
        counts: m.download(out.counts),
    })
}

/// The definition, by sorting.
fn reference(gate: Gate, (e, k): (usize, usize), logits: &[f64], bias: &[f32]) -> Routed {
    let descending = |values: &[f64], n: usize| {
        let mut order: Vec<usize> = (0..values.len()).collect();
        order.sort_by(|&a, &b| values[b].total_cmp(&values[a]).then(a.cmp(&b)));
        order.truncate(n);
        order
    };
    let mut out = Routed { scores: vec![], indices: vec![], weights: vec![], counts: vec![0; e] };
    for x in logits.chunks(e) {
        let sum: f64 = x.iter().map(|x| x.exp()).sum();
        let scores: Vec<f64> = match gate.score {
            Score::Sigmoid => x.iter().map(|x| 1.0 / (1.0 + (-x).exp())).collect(),
            Score::Softmax => x.iter().map(|x| x.exp() / sum).collect(),
        };
        let mut corrected: Vec<f64> = scores.iter().zip(bias).map(|(s, &b)| s + f64::from(b)).collect();
        if let Some(Groups { num, keep, score }) = gate.groups {
            let taken = if score == GroupScore::Max { 1 } else { 2 };
            let best: Vec<f64> =
                corrected.chunks(e / num).map(|g| descending(g, taken).iter().map(|&i| g[i]).sum()).collect();
            let kept = descending(&best, keep);
            for (i, c) in corrected.iter_mut().enumerate() {
                if !kept.contains(&(i / (e / num))) {
                    *c = f64::NEG_INFINITY;
                }
            }
        }
        let chosen = descending(&corrected, k);
        let total: f64 = if gate.norm_topk_prob { chosen.iter().map(|&i| scores[i]).sum() } else { 1.0 };
        out.weights.extend(chosen.iter().map(|&i| scores[i] / total * gate.routed_scaling_factor));
        chosen.iter().for_each(|&i| out.counts[i] += 1);
        out.indices.extend(chosen.iter().map(|&i| i as u32));
        out.scores.extend(scores);
    }
    out
}

#[test]
fn routing_matches_the_definition() {
    let v2 = Gate { score: Score::Softmax, norm_topk_prob: false, routed_scaling_factor: 16.0, ..PLAIN };
    for (name, gate, sizes) in [
        ("V3 without groups", PLAIN, (8, 3)),
        ("V3", Gate { groups: groups(8, 4, GroupScore::Top2Sum), ..PLAIN }, (64, 8)),
        ("V3, one expert a group", Gate { groups: groups(6, 3, GroupScore::Top2Sum), ..PLAIN }, (6, 2)),
        ("all groups kept", Gate { groups: groups(4, 4, GroupScore::Top2Sum), ..PLAIN }, (8, 8)),
        ("V2-Lite", v2, (64, 6)),
        ("V2", Gate { groups: groups(8, 3, GroupScore::Max), ..v2 }, (160, 6)),
        ("top-1", Gate { norm_topk_prob: false, ..PLAIN }, (5, 1)),
    ] {
        // 700 tokens are more than one chunk of the thread pool for the wider gates.
        let logits: Vec<f64> = random(700 * sizes.0, 1).iter().map(|x| 3.0 * x).collect();
        let bias: Vec<f32> = random(sizes.0, 2).iter().map(|&b| 0.3 * b as f32).collect();
        let got = route(gate, sizes, &logits, Some(&bias)).unwrap();
        let want = reference(gate, sizes, &logits, &bias);
        assert_eq!((&got.indices, &got.counts), (&want.indices, &want.counts), "{name}");
        assert_close(&got.scores, &want.scores, 1e-12);
        assert_close(&got.weights, &want.weights, 1e-12);
        assert_eq!(got.counts.iter().sum::<u32>() as usize, 700 * sizes.1, "{name}: no token is dropped");
        assert_eq!(route(gate, sizes, &logits, Some(&bias)).unwrap(), got, "{name}: the same twice");
    }
}

#[test]
fn negative_biases_leak_no_expert_out_of_the_chosen_groups() {
    // Every corrected score is below 0: a mask of 0 would make the forbidden experts the best ones.
    let gate = Gate { groups: groups(4, 1, GroupScore::Top2Sum), ..PLAIN };
    let logits = random(50 * 16, 3);
    let routed = route(gate, (16, 4), &logits, Some(&[-9.0; 16])).unwrap();
    for (t, chosen) in routed.indices.chunks(4).enumerate() {
        assert!(chosen.iter().all(|i| i / 4 == chosen[0] / 4), "token {t} goes to {chosen:?}, across groups of 4");
    }
    assert_eq!(routed.indices, reference(gate, (16, 4), &logits, &[-9.0; 16]).indices);
}

#[test]
fn the_bias_chooses_and_does_not_weigh() {
    let gate = Gate { norm_topk_prob: false, routed_scaling_factor: 1.0, ..PLAIN };
    let routed = route(gate, (4, 2), &[0.0, 0.0, 2.0, 0.0], Some(&[0.0, 0.0, -1.0, 5.0])).unwrap();
    assert_eq!(routed.indices, [3, 0]);
    assert_eq!(routed.weights, [0.5, 0.5]);
}

#[test]
fn top_2_sum_prefers_two_good_experts_to_one_best() {
    let logits = [0.0, 0.0, 3.0, -9.0, 1.0, 1.5, -1.0, -1.0];
    for (score, want) in [(GroupScore::Top2Sum, [5, 4]), (GroupScore::Max, [2, 3])] {
        let routed = route(Gate { groups: groups(4, 1, score), ..PLAIN }, (8, 2), &logits, None).unwrap();
        assert_eq!(routed.indices, want, "{score:?}");
    }
}

#[test]
fn ties_go_to_the_lower_index() {
    let gate = Gate { groups: groups(3, 2, GroupScore::Max), ..PLAIN };
    assert_eq!(route(gate, (6, 3), &[0.0; 6], None).unwrap().indices, [0, 1, 2]);
}

#[test]
fn forced_routing_is_balanced_distinct_and_weighs_by_score() {
    for (t, e, k) in [(12, 8, 2), (7, 5, 3), (9, 4, 4), (3, 7, 5)] {
        let logits = random(t * e, 4);
        let routed = route(Gate { mode: Mode::Forced, ..PLAIN }, (e, k), &logits, None).unwrap();
        let (low, high) = (routed.counts.iter().min().unwrap(), routed.counts.iter().max().unwrap());
        assert!(high - low <= 1, "t {t} e {e} k {k}: counts {:?}", routed.counts);
        for ((slots, w), s) in routed.indices.chunks(k).zip(routed.weights.chunks(k)).zip(routed.scores.chunks(e)) {
            let total: f64 = slots.iter().map(|&i| s[i as usize]).sum();
            let want: Vec<f64> = slots.iter().map(|&i| s[i as usize] / total * 2.5).collect();
            assert_close(w, &want, 1e-12);
            assert!(distinct(slots));
        }
    }
}

fn distinct(slots: &[u32]) -> bool {
    slots.iter().enumerate().all(|(j, i)| !slots[..j].contains(i))
}

#[test]
fn random_routing_is_uniform_distinct_and_repeatable() {
    let (t, e, k) = (4000, 8, 3);
    let run = |seed, step, t: usize| {
        route(Gate { mode: Mode::Random { seed, step }, ..PLAIN }, (e, k), &random(t * e, 5), None).unwrap()
    };
    let routed = run(1, 2, t);
    assert!(routed.indices.chunks(k).all(distinct));
    // 1500 slots an expert, standard deviation 31: five of them.
    assert!(routed.counts.iter().all(|&c| c.abs_diff(1500) < 155), "{:?}", routed.counts);
    // Slot 0 alone is uniform over e - k + 1 experts by Floyd's algorithm; the set is what is uniform: count pairs.
    let mut pairs = vec![0u32; e * e];
    for slots in routed.indices.chunks(k) {
        slots.iter().for_each(|&a| slots.iter().for_each(|&b| pairs[(a * e as u32 + b) as usize] += 1));
    }
    let expected = t as f64 * (k * (k - 1)) as f64 / (e * (e - 1)) as f64;
    for a in 0..e {
        for b in 0..a {
            let n = f64::from(pairs[a * e + b]);
            assert!((n - expected).abs() < 5.0 * expected.sqrt(), "experts {a} and {b}: {n} of {expected}");
        }
    }
    assert_eq!(run(1, 2, t), routed);
    assert_eq!(run(1, 2, 10).indices, routed.indices[..30], "a token's experts do not depend on the others");
    assert_ne!(run(1, 3, t).indices, routed.indices);
    assert_ne!(run(2, 2, t).indices, routed.indices);
}

#[test]
fn gradients_match_finite_differences() {
    // Forced keeps the choice; Learned keeps it where no two logits are within the step, as here.
    let softmax = Gate { score: Score::Softmax, ..PLAIN };
    for gate in [
        PLAIN,
        Gate { groups: groups(3, 2, GroupScore::Top2Sum), ..PLAIN },
        Gate { norm_topk_prob: false, ..PLAIN },
        Gate { mode: Mode::Forced, ..PLAIN },
        softmax,
        Gate { norm_topk_prob: false, ..softmax },
        Gate { mode: Mode::Random { seed: 3, step: 0 }, ..softmax },
    ] {
        let (t, e, k) = (4, 6, 2);
        // The second output column block is the scores, so that dscores is checked with dweights.
        let run = move |s: &mut Stream, x: Tensor| {
            let out = outputs(s, DType::F64, t, e, k);
            forward(s, gate, x, None, out).map(|()| out)
        };
        check_gradients(
            &[(&[t, e], 7)],
            &[t * (k + e)],
            |s, x| {
                let out = run(s, x[0])?;
                let both = s.memory().alloc(DType::F64, &[t * (k + e)]);
                s.launch(&[out.weights, out.scores], &[both], move |m| {
                    let mut both = m.write::<f64>(both);
                    both[..t * k].copy_from_slice(&m.read::<f64>(out.weights));
                    both[t * k..].copy_from_slice(&m.read::<f64>(out.scores));
                });
                Ok(both)
            },
            |s, x, dy, dx| {
                let out = run(s, x[0])?;
                let m = s.memory().clone();
                let dy = m.download::<f64>(dy);
                let (dw, ds) = (m.from_slice(&[t, k], &dy[..t * k]), m.from_slice(&[t, e], &dy[t * k..]));
                input_grad(s, gate, out.scores, out.indices, dw, Some(ds), dx[0])
            },
        );
    }
}

#[test]
fn without_auxiliary_losses_dlogits_is_assigned() {
    let mut s = stream();
    let m = s.memory().clone();
    let scores = m.from_slice(&[1, 2], &[0.5f32, 0.5]);
    let (indices, dw) = (m.from_slice(&[1, 1], &[1u32]), m.from_slice(&[1, 1], &[2f32]));
    let dx = m.from_slice(&[1, 2], &[9f32, 9.0]);
    let gate = Gate { norm_topk_prob: false, routed_scaling_factor: 1.0, ..PLAIN };
    input_grad(&mut s, gate, scores, indices, dw, None, dx).unwrap();
    s.synchronize().unwrap();
    assert_eq!(m.download::<f32>(dx), [0.0, 0.5]);
}

#[test]
fn a_nan_names_its_token() {
    for score in [Score::Sigmoid, Score::Softmax] {
        let mut logits = vec![0.0; 12];
        logits[9] = f64::NAN;
        let error = route(Gate { score, ..PLAIN }, (4, 2), &logits, None).unwrap_err();
        assert!(
            matches!(&error, crate::error::Error::NotFinite { tensor, .. } if tensor == "logits of token 2"),
            "{error}"
        );
    }
}

#[test]
fn contracts_are_checked() {
    let wide = Gate { groups: groups(4, 1, GroupScore::Max), ..PLAIN };
    for (gate, sizes, want) in [
        (PLAIN, (4, 5), "at most 4 experts"),
        (wide, (8, 3), "at most 2 experts"),
        (Gate { groups: groups(3, 1, GroupScore::Max), ..PLAIN }, (8, 2), "that 3 groups divide"),
    ] {
        let error = route(gate, sizes, &vec![0.0; sizes.0], None).unwrap_err().to_string();
        assert!(error.contains(want), "{error}");
    }
    let mut s = stream();
    let logits = s.memory().alloc(DType::Bf16, &[1, 4]);
    let out = outputs(&s, DType::Bf16, 1, 4, 2);
    assert!(forward(&mut s, PLAIN, logits, None, out).unwrap_err().to_string().contains("F32 or F64"));
}
