//! Grouped GEMM against the loop over experts it replaces.

#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::ops::testing::*;

fn offsets_of(counts: &[usize]) -> Vec<u32> {
    let mut offsets = vec![0u32];
    counts.iter().for_each(|&c| offsets.push(offsets[offsets.len() - 1] + c as u32));
    offsets
}

/// y, dx and dw (which starts at 1) of seeded data in `T`.
fn passes<T: Float>(counts: &[usize], o: usize, i: usize) -> [Vec<f64>; 3] {
    let (n, e) = (counts.iter().sum::<usize>(), counts.len());
    let mut s = stream();
    let m = s.memory().clone();
    let data = |dims: &[usize], seed| {
        let values: Vec<T> = random(dims.iter().product(), seed).into_iter().map(T::of_f64).collect();
        m.from_slice(dims, &values)
    };
    let (x, w, dy) = (data(&[n, i], 1), data(&[e, o, i], 2), data(&[n, o], 3));
    let offsets = m.from_slice(&[e + 1], &offsets_of(counts));
    let (y, dx) = (m.alloc(T::DTYPE, &[n, o]), m.alloc(T::DTYPE, &[n, i]));
    let dw = m.from_slice(&[e, o, i], &vec![T::of_f64(1.0); e * o * i]);
    forward(&mut s, x, offsets, w, y).unwrap();
    input_grad(&mut s, dy, offsets, w, dx).unwrap();
    weight_grad(&mut s, dy, x, offsets, dw).unwrap();
    s.synchronize().unwrap();
    [y, dx, dw].map(|t| m.download::<T>(t).into_iter().map(T::as_f64).collect())
}

fn reference(counts: &[usize], o: usize, i: usize) -> [Vec<f64>; 3] {
    let (n, e) = (counts.iter().sum::<usize>(), counts.len());
    let (x, w, dy) = (random(n * i, 1), random(e * o * i, 2), random(n * o, 3));
    let (mut y, mut dx, mut dw) = (vec![0.0; n * o], vec![0.0; n * i], vec![1.0; e * o * i]);
    let mut row = 0;
    for (e, &count) in counts.iter().enumerate() {
        for r in row..row + count {
            for p in 0..o {
                for q in 0..i {
                    y[r * o + p] += x[r * i + q] * w[(e * o + p) * i + q];
                    dx[r * i + q] += dy[r * o + p] * w[(e * o + p) * i + q];
                    dw[(e * o + p) * i + q] += dy[r * o + p] * x[r * i + q];
                }
            }
        }
        row += count;
    }
    [y, dx, dw]
}

#[test]
fn every_pass_is_the_loop_over_experts() {
    for (name, counts, o, i) in [
        ("even", &[4, 4, 4][..], 5, 3),
        ("ragged with empty experts", &[0, 7, 0, 1, 12, 0], 6, 4),
        ("one expert takes everything", &[0, 0, 900, 0], 70, 33),
        ("one dominates", &[10, 700, 3, 80], 96, 40),
        ("many small", &[3; 64], 16, 16),
        ("no rows", &[0, 0], 4, 4),
        ("decoding", &[1, 0, 1, 1], 48, 64),
    ] {
        for (got, want) in passes::<f64>(counts, o, i).iter().zip(&reference(counts, o, i)) {
            assert_eq!(got.len(), want.len(), "{name}");
            assert_close(got, want, 1e-11);
        }
    }
}

#[test]
fn f32_and_bf16_agree_with_f64_within_their_precision() {
    let counts = [30, 0, 200, 26];
    let want = reference(&counts, 64, 48);
    for (got, want) in passes::<f32>(&counts, 64, 48).iter().zip(&want) {
        assert_close(got, want, 1e-5);
    }
    for (got, want) in passes::<half::bf16>(&counts, 64, 48).iter().zip(&want) {
        // Inputs rounded to 8 bits: an error of 2^-9 of each of up to 200 products of size below 1, mostly cancelling.
        let worst = got.iter().zip(want).map(|(g, w)| (g - w).abs() / (1.0 + w.abs())).fold(0.0, f64::max);
        assert!(worst < 0.05, "{worst}");
    }
}

#[test]
fn results_do_not_depend_on_the_number_of_threads() {
    let counts = [10, 700, 3, 80, 0, 200];
    let passes = |threads| {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap();
        let (o, i) = (96, 40);
        let n = counts.iter().sum::<usize>();
        let z = Sizes { n, e: counts.len(), o, i, by_row: false };
        let data = |n: usize, seed| random(n, seed).into_iter().map(|x| x as f32).collect::<Vec<_>>();
        let (x, w, mut y) = (data(n * i, 1), data(z.e * o * i, 2), vec![0f32; n * o]);
        let mut dw = vec![0f32; z.e * o * i];
        pool.install(|| {
            let tasks = tasks::by_rows(&offsets_of(&counts), z);
            let outs = split(&tasks, &mut y, o, |task| task.rows.clone());
            run(tasks, outs, i, |task, y| task.forward(z, &x, &w, y));
            let tasks = tasks::by_outputs(&offsets_of(&counts), z);
            let place = |task: &Task| task.expert * o + task.outputs.start..task.expert * o + task.outputs.end;
            let outs = split(&tasks, &mut dw, i, place);
            run(tasks, outs, i, |task, dw| task.weight_grad(z, &y, &x, dw));
        });
        (y, dw)
    };
    let one = passes(1);
    assert!(passes(2) == one && passes(5) == one);
}

#[test]
fn gradients_match_finite_differences() {
    let (counts, o, i) = ([3, 0, 2], 4, 3);
    let offsets = |s: &Stream| s.memory().from_slice(&[4], &offsets_of(&counts));
    check_gradients(
        &[(&[5, i], 1), (&[3, o, i], 2)],
        &[5, o],
        |s, x| {
            let y = s.memory().alloc(DType::F64, &[5, o]);
            let offsets = offsets(s);
            forward(s, x[0], offsets, x[1], y)?;
            Ok(y)
        },
        |s, x, dy, dx| {
            let offsets = offsets(s);
            input_grad(s, dy, offsets, x[1], dx[0])?;
            weight_grad(s, dy, x[0], offsets, dx[1])
        },
    );
}

#[test]
fn contracts_are_checked() {
    let mut s = stream();
    let m = s.memory().clone();
    let (x, w, y) = (m.alloc(DType::F32, &[4, 3]), m.alloc(DType::F32, &[2, 5, 3]), m.alloc(DType::F32, &[4, 5]));
    let offsets = m.from_slice(&[3], &[0u32, 1, 5]);
    let error = forward(&mut s, x, offsets, w, x).unwrap_err().to_string();
    assert_eq!(error, "grouped linear: `y` should be F32 of [4, 5], found F32 of [4, 3]");
    forward(&mut s, x, offsets, w, y).unwrap();
    assert!(s.synchronize().unwrap_err().to_string().contains("offsets lie within the rows of x"));
}

/// y, h, a, dh, the second a, dx and dw as bits, of an expert layer over the first rows of buffers of `room` rows, which hold
/// NaN after them and in every output; counts of each expert.
fn layer<T: Float>(counts: &[usize], room: usize, i: usize, f: usize) -> Vec<Vec<f64>> {
    let (n, e) = (counts.iter().sum::<usize>(), counts.len());
    let mut s = stream();
    let m = s.memory().clone();
    let nan = T::of_f64(f64::NAN);
    let cast = |x: Vec<f64>| x.into_iter().map(T::of_f64).collect::<Vec<T>>();
    let rows = |cols: usize, seed| {
        let mut values = cast(random(n * cols, seed));
        values.resize(room * cols, nan);
        m.from_slice(&[room, cols], &values)
    };
    let out = |cols: usize| m.from_slice(&[room, cols], &vec![nan; room * cols]);
    let (x, dy) = (rows(i, 1), rows(i, 2));
    let w1 = m.from_slice(&[e, 2 * f, i], &cast(random(e * 2 * f * i, 3)));
    let w2 = m.from_slice(&[e, i, f], &cast(random(e * i * f, 4)));
    let offsets = m.from_slice(&[e + 1], &offsets_of(counts));
    let (h, a, y, dh, again, dx) = (out(2 * f), out(f), out(i), out(2 * f), out(f), out(i));
    let dw = m.from_slice(&[e, i, f], &cast(vec![0.0; e * i * f]));
    swiglu::forward(&mut s, x, offsets, w1, h, a).unwrap();
    forward(&mut s, a, offsets, w2, y).unwrap();
    swiglu::input_grad(&mut s, dy, offsets, w2, h, dh, Some(again)).unwrap();
    input_grad(&mut s, dh, offsets, w1, dx).unwrap();
    weight_grad(&mut s, dy, a, offsets, dw).unwrap();
    s.synchronize().unwrap();
    let mut results = Vec::new();
    for (t, cols) in [(y, i), (h, 2 * f), (a, f), (dh, 2 * f), (again, f), (dx, i)] {
        let values: Vec<f64> = m.download::<T>(t).into_iter().map(T::as_f64).collect();
        assert!(values[n * cols..].iter().all(|x| x.is_nan()), "rows past the last offset are left alone");
        results.push(values[..n * cols].to_vec());
    }
    results.push(m.download::<T>(dw).into_iter().map(T::as_f64).collect());
    results
}

#[test]
fn bits_depend_neither_on_the_room_nor_on_the_rows_beside() {
    fn check<T: Float>(i: usize, f: usize) {
        // Three experts' rows in a row: the middle one alone has to give the same, in buffers of any size.
        for count in [1, 2, 3, 9, 64, 65, 150] {
            let alone = layer::<T>(&[count], count.max(64), i, f);
            for room in [150, 1000, 6000] {
                assert_eq!(
                    layer::<T>(&[count], room.max(count), i, f),
                    alone,
                    "{count} rows, {i} x {f}, room for {room}"
                );
            }
            // More rows of the same expert behind these: all that is by row stays.
            let more = layer::<T>(&[count + 70], 300, i, f);
            for ((more, alone), cols) in more.iter().zip(&alone).zip([i, 2 * f, f, 2 * f, f, i]) {
                assert_eq!(more[..count * cols], alone[..], "{count} rows of {}, {i} x {f}", count + 70);
            }
        }
    }
    for (i, f) in [(8, 8), (24, 9), (64, 33), (100, 65), (600, 30), (700, 70)] {
        check::<f64>(i, f);
        check::<f32>(i, f);
    }
    check::<half::bf16>(40, 24);
}
