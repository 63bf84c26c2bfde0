//! Products against the definition in f64, gradients against finite differences, and a row's bits among other rows.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::ops::testing::*;

#[test]
fn products_match_the_definition_for_every_stride() {
    let (m, k, n) = (7, 5, 9);
    let (a, b) = (random(m * k, 1), random(k * n, 2));
    let at: Vec<f64> = (0..k * m).map(|j| a[(j % m) * k + j / m]).collect();
    let bt: Vec<f64> = (0..n * k).map(|j| b[(j % k) * n + j / k]).collect();
    let want: Vec<f64> =
        (0..m * n).map(|j| (0..k).map(|l| a[(j / n) * k + l] * b[l * n + j % n]).sum::<f64>() + 2.0).collect();
    for (a, b) in [
        (Mat::new(&a, m, k), Mat::new(&b, k, n)),
        (Mat::new(&at, k, m).t(), Mat::new(&b, k, n)),
        (Mat::new(&a, m, k), Mat::new(&bt, n, k).t()),
    ] {
        let mut c = vec![1.0; m * n];
        gemm(a, b, 2.0, &mut c, n, Threads::One);
        assert_close(&c, &want, 1e-12);
    }
}

/// Whether each row of a product over all rows has the bits that it has among any other number of rows.
fn rows_stand_alone<T: Float>(k: usize, n: usize, transposed: bool, beta: f64) -> bool {
    const ROWS: usize = 200;
    let cast = |x: Vec<f64>| x.into_iter().map(T::of_f64).collect::<Vec<T>>();
    let (a, b, c) = (cast(random(ROWS * k, 1)), cast(random(k * n, 2)), cast(random(ROWS * n, 3)));
    let b = if transposed { Mat::new(&b, n, k).t() } else { Mat::new(&b, k, n) };
    let mut all = c.clone();
    gemm_by_row(Mat::new(&a, ROWS, k), b, beta, &mut all, n);
    let counts = [1, 2, 3, 4, 5, 7, 8, 13, 16, 31, 33, 63, 64, 65, 100, 129, 199];
    counts.into_iter().all(|rows| {
        let first = (rows * 7) % (ROWS - rows + 1);
        let mut some = c[first * n..(first + rows) * n].to_vec();
        gemm_by_row(Mat::new(&a[first * k..][..rows * k], rows, k), b, beta, &mut some, n);
        some == all[first * n..(first + rows) * n]
    })
}

#[test]
fn a_row_has_the_same_bits_beside_any_other_rows() {
    for k in [1, 2, 3, 8, 17, 64, 100, 257, 512, 513, 700, 1100] {
        for n in [1, 2, 3, 5, 7, 8, 16, 17, 31, 33, 63, 64, 65, 100, 127, 129, 250, 300] {
            for (transposed, beta) in [(true, 0.0), (false, 0.0), (false, 1.0)] {
                let shape = (k, n, transposed, beta);
                assert!(rows_stand_alone::<f32>(k, n, transposed, beta), "f32 {shape:?}");
                assert!(rows_stand_alone::<f64>(k, n, transposed, beta), "f64 {shape:?}");
            }
        }
        assert!(rows_stand_alone::<half::bf16>(k, 48, true, 0.0), "bf16 {k}");
    }
}

#[test]
fn products_by_row_match_the_definition() {
    for (m, k, n) in [(1, 5, 9), (3, 700, 7), (2, 1100, 64), (20, 600, 65), (4, 0, 3)] {
        let (a, b) = (random(m * k, 1), random(k * n, 2));
        let want: Vec<f64> =
            (0..m * n).map(|j| (0..k).map(|l| a[(j / n) * k + l] * b[l * n + j % n]).sum::<f64>() + 2.0).collect();
        // Rows of c two elements apart, which stay as they are.
        let mut c = vec![1.0; m * (n + 2)];
        gemm_by_row(Mat::new(&a, m, k), Mat::new(&b, k, n), 2.0, &mut c, n + 2);
        for (c, want) in c.chunks_exact(n + 2).zip(want.chunks_exact(n)) {
            assert_close(&c[..n], want, 1e-12);
            assert_eq!(c[n..], [1.0, 1.0]);
        }
    }
}

#[test]
fn linear_gradients_match_finite_differences() {
    let (t, o, i) = (4, 3, 5);
    check_gradients(
        &[(&[t, i], 1), (&[o, i], 2), (&[o], 3)],
        &[t, o],
        |s, x| {
            let y = s.memory().alloc(crate::dtype::DType::F64, &[t, o]);
            forward(s, x[0], x[1], Some(x[2]), y)?;
            Ok(y)
        },
        |s, x, dy, dx| {
            input_grad(s, dy, x[1], dx[0], false)?;
            weight_grad(s, dy, x[0], dx[1], Some(dx[2]))
        },
    );
}

/// y and the residual after a product onto a residual, and y in f64 from the operands as rounded.
fn onto<T: Float>(in_place: bool) -> [Vec<f64>; 3] {
    let (t, o, i) = (5, 7, 40);
    let mut s = stream();
    let m = s.memory().clone();
    let rounded = |len, seed| random(len, seed).into_iter().map(T::of_f64).collect::<Vec<T>>();
    let wide = |x: &[T]| x.iter().map(|x| x.as_f64()).collect::<Vec<_>>();
    let (x, w, old) = (rounded(t * i, 1), rounded(o * i, 2), rounded(t * o, 3));
    let residual = m.from_slice(&[t, o], &old);
    let y = if in_place { residual } else { m.from_slice(&[t, o], &vec![T::of_f64(f64::NAN); t * o]) };
    forward_onto(&mut s, m.from_slice(&[t, i], &x), m.from_slice(&[o, i], &w), residual, y).unwrap();
    s.synchronize().unwrap();
    let (x, w) = (wide(&x), wide(&w));
    let product = |at: usize| (0..i).map(|j| x[at / o * i + j] * w[at % o * i + j]).sum::<f64>();
    let want = wide(&old).iter().enumerate().map(|(at, old)| old + product(at)).collect();
    [wide(&m.download(y)), wide(&m.download(residual)), want]
}

#[test]
fn a_product_onto_a_residual_is_rounded_once_and_may_be_in_place() {
    fn check<T: Float>(tolerance: f64) {
        let ([y, residual, want], [in_place, ..]) = (onto::<T>(false), onto::<T>(true));
        assert_close(&y, &want, tolerance);
        assert_eq!(y, in_place);
        let old: Vec<f64> = random(y.len(), 3).into_iter().map(|x| T::of_f64(x).as_f64()).collect();
        assert_eq!(residual, old);
    }
    check::<f64>(1e-12);
    check::<f32>(1e-5);
    check::<half::bf16>(1.0 / 256.0);
}

#[test]
fn a_residual_is_the_output_or_elsewhere() {
    let mut s = stream();
    let m = s.memory().clone();
    let [x, w, both] = [[2, 4], [3, 4], [4, 3]].map(|dims| m.alloc(crate::dtype::DType::F32, &dims));
    let [upper, lower] = [0, 6].map(|first| both.slice(first, 6).reshape(&[2, 3]));
    for residual in [upper, w] {
        let error = forward_onto(&mut s, x, w, residual, lower).unwrap_err().to_string();
        let wanted = "`residual` should be F32 of [2, 3], the output itself or in another buffer";
        assert!(error.contains(wanted), "{error}");
    }
}

#[test]
fn bf16_products_round_once() {
    let a: Vec<half::bf16> = random(6 * 8, 3).iter().map(|&x| half::bf16::from_f64(x)).collect();
    let b: Vec<half::bf16> = random(8 * 4, 4).iter().map(|&x| half::bf16::from_f64(x)).collect();
    let mut c = vec![half::bf16::ZERO; 24];
    gemm(Mat::new(&a, 6, 8), Mat::new(&b, 8, 4), 0.0, &mut c, 4, Threads::One);
    for (j, got) in c.iter().enumerate() {
        let want: f64 = (0..8).map(|l| f64::from(a[(j / 4) * 8 + l]) * f64::from(b[l * 4 + j % 4])).sum();
        assert!((f64::from(*got) - want).abs() <= want.abs() / 256.0 + 1e-6, "{got} for {want}");
    }
}

#[test]
fn on_a_batch_invariant_stream_a_row_has_its_bits_in_any_company() {
    let (o, i) = (37, 130);
    let x: Vec<f32> = random(70 * i, 1).iter().map(|&x| x as f32).collect();
    let w: Vec<f32> = random(o * i, 2).iter().map(|&x| x as f32).collect();
    let run = |rows: std::ops::Range<usize>, onto: bool| {
        let mut s = stream();
        s.set_batch_invariant(true);
        let m = s.memory().clone();
        let n = rows.len();
        let (x, w) = (m.from_slice(&[n, i], &x[rows.start * i..rows.end * i]), m.from_slice(&[o, i], &w));
        let y = m.from_slice(&[n, o], &vec![0.5f32; n * o]);
        if onto { forward_onto(&mut s, x, w, y, y) } else { forward(&mut s, x, w, None, y) }.unwrap();
        s.synchronize().unwrap();
        m.download::<f32>(y).iter().map(|x| x.to_bits()).collect::<Vec<_>>()
    };
    for onto in [false, true] {
        let together = run(0..70, onto);
        for rows in [0..1, 3..7, 1..68, 69..70] {
            assert_eq!(run(rows.clone(), onto), together[rows.start * o..rows.end * o], "rows {rows:?}");
        }
    }
}
