//! Against an independent f64 computation over dense rows.

#![expect(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::ops::testing::*;

const MINUS: f64 = f64::NEG_INFINITY;

fn words(v: usize, allowed: impl Fn(usize) -> bool) -> Option<Arc<[u32]>> {
    let mut words = vec![0u32; v.div_ceil(32)];
    (0..v).filter(|&token| allowed(token)).for_each(|token| words[token / 32] |= 1 << (token % 32));
    Some(words.into())
}

/// What rows become, in place, or beside themselves.
fn adjusted(x: &[f64], v: usize, rows: &[Adjust], in_place: bool) -> Result<(Vec<f64>, Vec<f64>)> {
    let mut s = stream();
    let logits = s.memory().from_slice(&[x.len() / v, v], x);
    let out = if in_place { logits } else { s.memory().from_slice(&[x.len() / v, v], &vec![f64::NAN; x.len()]) };
    adjust(&mut s, logits, rows, out)?;
    s.synchronize()?;
    Ok((s.memory().download(out), s.memory().download(logits)))
}

/// Token by token.
fn by_definition(x: &[f64], a: &Adjust) -> Vec<f64> {
    let sum = |list: &[(u32, f64)], id: usize| -> f64 {
        list.iter().filter(|(token, _)| *token as usize == id).map(|(_, amount)| amount).sum()
    };
    let one = |(id, &x): (usize, &f64)| {
        let mut y = x + sum(&a.bias, id);
        if a.occurred.contains(&(id as u32)) {
            y = if y > 0.0 { y / a.repetition_penalty } else { y * a.repetition_penalty };
        }
        y += sum(&a.additions, id);
        let word = a.allowed.as_ref().map_or(u32::MAX, |words| words[id / 32]);
        if word & 1 << (id % 32) == 0 { MINUS } else { y }
    };
    x.iter().enumerate().map(one).collect()
}

#[test]
fn rows_change_as_defined_and_others_stay() {
    let v = 71;
    let x: Vec<f64> = random(6 * v, 1).iter().map(|x| 5.0 * x).collect();
    let none = Adjust::default();
    let occurred: Arc<[u32]> = (0..71).step_by(3).collect();
    let generated = [(70, 1), (3, 2), (12, 0)];
    let all = Adjust {
        bias: [(3, 1.5), (64, -7.0), (3, 0.25), (0, 100.0)].into(),
        repetition_penalty: 1.7,
        occurred: occurred.clone(),
        additions: penalties(generated, 0.5, 0.25).into(),
        allowed: words(v, |token| token % 5 != 2),
    };
    let rows = [
        none.clone(),
        all.clone(),
        Adjust { repetition_penalty: 0.8, occurred, ..none.clone() },
        Adjust { allowed: words(v, |token| token == 70), ..none.clone() },
        Adjust { bias: all.bias.clone(), ..none.clone() },
        Adjust { additions: all.additions.clone(), ..none.clone() },
    ];
    for in_place in [true, false] {
        let (got, left) = adjusted(&x, v, &rows, in_place).unwrap();
        for (i, (adjust, x)) in rows.iter().zip(x.chunks(v)).enumerate() {
            for (got, want) in got[i * v..][..v].iter().zip(by_definition(x, adjust)) {
                assert!(*got == want || (got - want).abs() < 1e-12, "row {i}: expected {want}, found {got}");
            }
        }
        assert_eq!(got[..v], x[..v]);
        assert!(in_place || left == x, "the logits are changed only if they are the output");
    }
}

#[test]
fn a_row_does_not_depend_on_its_batch() {
    let v = 3000;
    let x: Vec<f32> = random(9 * v, 5).iter().map(|&x| 4.0 * x as f32).collect();
    let rows: Vec<Adjust> = (0..9)
        .map(|i| Adjust {
            repetition_penalty: 1.0 + 0.1 * f64::from(i),
            occurred: (i..2000).step_by(7).collect(),
            allowed: (i % 3 == 0).then(|| words(v, |token| token % 2 == 0)).flatten(),
            ..Adjust::default()
        })
        .collect();
    let run = |x: &[f32], rows: &[Adjust]| {
        let mut s = stream();
        let logits = s.memory().from_slice(&[rows.len(), v], x);
        adjust(&mut s, logits, rows, logits).unwrap();
        s.synchronize().unwrap();
        s.memory().download::<f32>(logits)
    };
    let together = run(&x, &rows);
    for (i, row) in rows.iter().enumerate() {
        assert_eq!(run(&x[i * v..][..v], std::slice::from_ref(row)), together[i * v..][..v], "row {i}");
    }
}

#[test]
fn penalties_are_presence_once_and_frequency_each_time() {
    assert_eq!(penalties([(5, 3), (1, 1), (2, 0)], 0.5, 0.25), [(5, -1.25), (1, -0.75)]);
    assert_eq!(penalties([(5, 3)], 0.0, -1.0), [(5, 3.0)]);
    assert_eq!(penalties([(5, 3)], 0.0, 0.0), []);
}

#[test]
fn nothing_to_change_is_no_work() {
    let mut s = stream();
    let logits = s.memory().alloc(DType::F32, &[2, 8]);
    s.start_recording();
    let idle = Adjust { repetition_penalty: 3.0, ..Adjust::default() };
    adjust(&mut s, logits, &[Adjust::default(), idle], logits).unwrap();
    let none = s.finish_recording();
    assert_eq!((none.writes.len(), none.cost), (0, Cost::default()));
    s.start_recording();
    let one = Adjust { bias: [(1, 1.0)].into(), ..Adjust::default() };
    adjust(&mut s, logits, &[Adjust::default(), one], logits).unwrap();
    assert_eq!(s.finish_recording().cost.written_bytes, 8 * 4);
}

#[test]
fn amounts_of_any_size_leave_a_row_to_choose_from() {
    let x = [1.0f32, -2.0, 0.5, f32::NEG_INFINITY];
    for (amount, penalty) in [(1e300, 1e300), (-1e300, 1e-300), (1e300, 1e-300), (-1e300, 1e300)] {
        let row = Adjust {
            bias: [(0, amount), (3, amount)].into(),
            repetition_penalty: penalty,
            occurred: [0, 1, 2, 3].into(),
            allowed: Some([0b1001].into()),
            ..Adjust::default()
        };
        let mut s = stream();
        let logits = s.memory().from_slice(&[1, 4], &x);
        adjust(&mut s, logits, &[row], logits).unwrap();
        let tokens = s.memory().alloc(DType::U32, &[1]);
        crate::ops::sampling::forward(&mut s, logits, &[crate::ops::sampling::Sampling::GREEDY], tokens).unwrap();
        s.synchronize().unwrap();
        let after = s.memory().download::<f32>(logits);
        assert!(after[0].is_finite() && after[1..].iter().all(|x| *x == f32::NEG_INFINITY), "{after:?}");
        assert_eq!(s.memory().download::<u32>(tokens), [0]);
    }
}

#[test]
fn what_is_wrong_is_refused_with_its_row() {
    let none = Adjust::default();
    let bias = |token, amount| Adjust { bias: [(token, amount)].into(), ..Adjust::default() };
    let occurred =
        |penalty, tokens: &[u32]| Adjust { repetition_penalty: penalty, occurred: tokens.into(), ..none.clone() };
    for (bad, expected) in [
        (bias(0, f64::NAN), "in row 1 a finite bias of token 0, found NaN"),
        (bias(33, f64::INFINITY), "a finite bias of token 33, found inf"),
        (bias(40, 1.0), "tokens below 40, the size of the vocabulary, found 40"),
        (Adjust { additions: [(7, f64::NAN)].into(), ..none.clone() }, "a finite addition of token 7, found NaN"),
        (Adjust { additions: [(1 << 31, 0.0)].into(), ..none.clone() }, "found 2147483648"),
        (occurred(f64::NAN, &[]), "a finite repetition penalty above 0, found NaN"),
        (occurred(0.0, &[1]), "a finite repetition penalty above 0, found 0"),
        (occurred(2.0, &[40]), "found 40"),
        (occurred(2.0, &[3, 3]), "ascending order, each once"),
        (Adjust { allowed: Some([1].into()), ..none.clone() }, "2 words of allowed tokens, found 1"),
        // Bits past the vocabulary are no tokens.
        (Adjust { allowed: Some([0, 1 << 8].into()), ..none.clone() }, "at least one allowed token, found none"),
    ] {
        let error = adjusted(&[0.0; 80], 40, &[none.clone(), bad], true).unwrap_err().to_string();
        assert!(error.contains(expected), "{error}");
    }
    assert!(adjusted(&[0.0; 80], 40, std::slice::from_ref(&none), true).unwrap_err().to_string().contains("in 1 rows"));
    let mut s = stream();
    let [logits, narrow] = [3, 2].map(|v| s.memory().alloc(DType::F32, &[1, v]));
    let error = adjust(&mut s, logits, std::slice::from_ref(&none), narrow).unwrap_err().to_string();
    assert!(error.contains("`out` should be F32 of") && error.contains("or in another buffer"), "{error}");
    let bf16 = s.memory().alloc(DType::Bf16, &[1, 3]);
    assert!(adjust(&mut s, bf16, &[none], bf16).is_err());
}

#[test]
fn a_mask_does_not_hide_what_is_no_number() {
    let row = Adjust { allowed: Some([1].into()), ..Adjust::default() };
    let error = adjusted(&[0.0, 1.0, 2.0, f64::NAN], 2, &[row.clone(), row], true).unwrap_err();
    assert!(matches!(&error, Error::NotFinite { tensor, .. } if tensor == "logits of row 1"), "{error}");
}

struct Told<T> {
    token: Vec<T>,
    ids: Vec<u32>,
    top: Vec<T>,
}

fn told<T: Float>(x: &[T], v: usize, tokens: &[u32], rows: &[Option<usize>], k: usize) -> Result<Told<T>> {
    let mut s = stream();
    let n = tokens.len();
    let m = s.memory().clone();
    let logits = m.from_slice(&[n, v], x);
    let tokens = m.from_slice(&[n], tokens);
    let poison = T::of_f64(77.0);
    let out = Logprobs {
        token: m.from_slice(&[n], &vec![poison; n]),
        top_ids: m.from_slice(&[n, k], &vec![77u32; n * k]),
        top: m.from_slice(&[n, k], &vec![poison; n * k]),
    };
    logprobs(&mut s, logits, tokens, rows, out)?;
    s.synchronize()?;
    Ok(Told { token: m.download(out.token), ids: m.download(out.top_ids), top: m.download(out.top) })
}

/// Log-softmax by its definition.
fn by_softmax(x: &[f64]) -> Vec<f64> {
    let sum: f64 = x.iter().map(|x| x.exp()).sum();
    x.iter().map(|x| (x.exp() / sum).ln()).collect()
}

#[test]
fn logprobs_are_those_of_log_softmax() {
    let v = 203;
    // Multiples of a quarter, so that many are equal.
    let x: Vec<f64> = random(5 * v, 3).iter().map(|x| (x * 24.0).round() / 4.0).collect();
    let (tokens, rows, k) = ([4, 202, 0, 9, 77], [Some(3), None, Some(0), Some(20), Some(7)], 20);
    let f64s = told(&x, v, &tokens, &rows, k).unwrap();
    let f32s = told(&x.iter().map(|&x| x as f32).collect::<Vec<_>>(), v, &tokens, &rows, k).unwrap();
    assert_eq!(f64s.ids, f32s.ids);
    for (i, (asked, x)) in rows.iter().zip(x.chunks(v)).enumerate() {
        let want = by_softmax(x);
        let mut order: Vec<u32> = (0..v as u32).collect();
        order.sort_by(|&a, &b| x[b as usize].total_cmp(&x[a as usize]).then(a.cmp(&b)));
        let top = asked.unwrap_or(0);
        let row = i * k..i * k + top;
        assert_eq!(f64s.ids[row.clone()], order[..top]);
        for at in row {
            let want = want[f64s.ids[at] as usize];
            assert!((f64s.top[at] - want).abs() < 1e-12 && (f64::from(f32s.top[at]) - want).abs() < 2e-6);
        }
        // What was not asked for stays.
        assert!(f64s.ids[i * k + top..][..k - top].iter().all(|&id| id == 77));
        assert!(f64s.top[i * k + top..][..k - top].iter().all(|&x| x == 77.0));
        if asked.is_none() {
            assert_eq!(f64s.token[i], 77.0);
            continue;
        }
        let want = want[tokens[i] as usize];
        assert!((f64s.token[i] - want).abs() < 1e-12 && (f64::from(f32s.token[i]) - want).abs() < 2e-6);
    }
}

#[test]
fn large_logits_and_forbidden_ones_have_logprobs() {
    let x = [1e4f32, 1e4 - 1.0, -1e4, f32::NEG_INFINITY, f32::NEG_INFINITY];
    let told = told(&x, 5, &[4], &[Some(5)], 5).unwrap();
    let ln = -(1.0 + (-1f64).exp()).ln();
    assert_eq!(told.ids, [0, 1, 2, 3, 4]);
    assert_close(&told.top[..2].iter().map(|&x| x.into()).collect::<Vec<_>>(), &[ln, ln - 1.0], 1e-6);
    assert!(told.top[2] < -1.9e4 && told.top[3] == f32::NEG_INFINITY && told.token == [f32::NEG_INFINITY]);
}

#[test]
fn logprobs_of_a_row_do_not_depend_on_its_batch() {
    let v = 4001;
    let x: Vec<f32> = random(7 * v, 8).iter().map(|&x| 6.0 * x as f32).collect();
    let tokens: Vec<u32> = (0..7).map(|i| i * 500).collect();
    let all = told(&x, v, &tokens, &[Some(4); 7], 4).unwrap();
    for i in 0..7 {
        let one = told(&x[i * v..][..v], v, &tokens[i..=i], &[Some(4)], 4).unwrap();
        assert_eq!((one.token[0], &one.top[..]), (all.token[i], &all.top[4 * i..][..4]), "row {i}");
    }
}

#[test]
fn logprobs_refuse_what_has_none() {
    for bad in [f64::NAN, f64::INFINITY] {
        let error = told(&[0.0, 1.0, bad, 2.0], 2, &[0, 0], &[None, Some(1)], 1).err().unwrap();
        assert!(matches!(&error, Error::NotFinite { tensor, .. } if tensor == "logits of row 1"), "{error}");
        assert!(told(&[0.0, 1.0, bad, 2.0], 2, &[0, 0], &[Some(1), None], 1).is_ok(), "nobody asked");
    }
    assert!(told(&[MINUS; 2], 2, &[0], &[Some(1)], 1).is_err());
    let error = |tokens: &[u32], top, k| told(&[0.0, 1.0], 2, tokens, &[Some(top)], k).err().unwrap().to_string();
    assert!(error(&[0], 2, 1).contains("at least 2 columns"));
    assert!(error(&[0], 3, 3).contains("of at least 3 tokens"));
    assert!(error(&[2], 1, 1).contains("expected tokens below 2, the size of the vocabulary, found 2 in row 0"));
}
