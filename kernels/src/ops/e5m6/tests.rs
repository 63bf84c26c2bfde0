//! The format by its definition: all codes, the places between them, and tiles to the bit.

#![expect(clippy::unwrap_used, reason = "tests")]

use half::bf16;

use super::*;
use crate::ops::testing::*;

/// By the definition of the format.
fn value(code: u16) -> f64 {
    let (e, m) = (i32::from(code >> 6 & 31), f64::from(code & 63));
    let magnitude = match (e, m) {
        (0, m) => m / 64.0 * 2f64.powi(-14),
        (31, 0.0) => f64::INFINITY,
        (31, _) => f64::NAN,
        (e, m) => (1.0 + m / 64.0) * 2f64.powi(e - 15),
    };
    if code & 0x800 == 0 { magnitude } else { -magnitude }
}

/// By halving: finite codes ascend with their values.
fn nearest(x: f64) -> u16 {
    let sign = if x.is_sign_negative() { 0x800 } else { 0 };
    let x = x.abs();
    let (mut low, mut high) = (0, 31 << 6);
    // As if there was one more number past the largest, which stands for infinity.
    let value = |code: u16| if code == 31 << 6 { 65536.0 } else { value(code) };
    if x >= 65536.0 {
        return sign | high;
    }
    while high - low > 1 {
        let middle = (low + high) / 2;
        if value(middle) <= x { low = middle } else { high = middle }
    }
    let (below, above) = (x - value(low), value(high) - x);
    sign | if below < above || (below == above && low % 2 == 0) { low } else { high }
}

#[test]
fn every_code_is_its_value_and_comes_back() {
    for code in 0..1 << 12 {
        let (got, want) = (decode_e5m6(code), value(code));
        assert_eq!(got.is_sign_negative(), code & 0x800 != 0, "{code:#x}");
        if want.is_nan() {
            assert!(got.is_nan() && encode_e5m6(got) == code & 0x800 | 0x7e0, "{code:#x}");
        } else {
            assert_eq!(f64::from(got), want, "{code:#x}");
            assert_eq!(encode_e5m6(got), code, "{code:#x}");
        }
    }
    assert_eq!((value(0x7bf), value(1)), (65024.0, 2f64.powi(-20)));
}

#[test]
fn rounding_is_to_the_nearest_code_with_ties_to_even() {
    for code in 0..31 << 6 {
        let next = if code == 0x7bf { 65536.0 } else { value(code + 1) };
        let tie = ((value(code) + next) / 2.0) as f32;
        for x in [value(code) as f32, tie] {
            for x in [x.next_down(), x, x.next_up(), -x.next_down(), -x, -x.next_up()] {
                assert_eq!(encode_e5m6(x), nearest(f64::from(x)), "{x:e} beside {code:#x}");
            }
        }
    }
    for x in [65280.0, 1e30, f32::MAX, f32::INFINITY] {
        assert_eq!((encode_e5m6(x), encode_e5m6(-x)), (0x7c0, 0xfc0), "{x}");
    }
}

#[test]
fn scales_are_the_least_powers_of_two_that_hold_the_largest_number() {
    let edge = |e: i32| 65024.0 * 2f32.powi(e);
    let mut all = vec![1e-4, 1.0, 448.0, 65536.0, 1e38, f32::MAX];
    all.extend((-25..=111).flat_map(|e| [edge(e).next_down(), edge(e), edge(e).next_up()]));
    for amax in all {
        let scale = power_of_two(scale_byte(amax));
        assert!(amax / scale <= 65024.0 && amax / scale > 65024.0 / 2.0, "{amax}: {scale}");
    }
}

/// Codes of x [t, c] unpacked, and scales, by the definition.
fn defined(x: &[f32], c: usize) -> (Vec<u16>, Vec<f64>) {
    let (mut codes, mut scales) = (Vec::new(), Vec::new());
    for x in x.chunks(c).flat_map(|row| row.chunks(TILE)) {
        let amax = x.iter().filter(|x| !x.is_nan()).fold(1e-4f32, |amax, x| amax.max(x.abs()));
        let scale =
            (-40..=113).map(|e| 2f64.powi(e)).find(|s| f64::from(amax) <= 65024.0 * s).unwrap_or(2f64.powi(113));
        scales.push(scale);
        let code = |x: &f32| {
            if x.is_nan() { (x.to_bits() >> 20) as u16 & 0x800 | 0x7e0 } else { nearest(f64::from(*x) / scale) }
        };
        codes.extend(x.iter().map(code));
    }
    (codes, scales)
}

fn there_and_back<T: Float>(t: usize, c: usize) {
    let mut s = stream();
    let m = s.memory().clone();
    let number = |(j, x): (usize, f64)| match j / 50 % 7 {
        0 => 0.0,
        1 => x * 1e-7,
        2 if j % 3 == 0 => f64::NAN,
        3 if j % 97 == 0 => [f64::INFINITY, f64::NEG_INFINITY, f64::from(f32::MAX)][j % 3],
        other => x * 2f64.powi((j / 91) as i32 % 30 - 15 + other as i32),
    };
    let x: Vec<T> = random(t * c, 1).into_iter().enumerate().map(|j| T::of_f64(number(j))).collect();
    let values: Vec<f32> = x.iter().map(|x| x.as_f64() as f32).collect();
    let (codes, scales) = defined(&values, c);
    let bytes = m.from_slice(&[t, packed(c)], &vec![0xa5u8; t * packed(c)]);
    let scale_bytes = m.from_slice(&[t, c.div_ceil(TILE)], &vec![0xa5u8; t * c.div_ceil(TILE)]);
    let (x, back) = (m.from_slice(&[t, c], &x), m.from_slice(&[t, c], &vec![T::of_f64(7.0); t * c]));
    encode(&mut s, x, bytes, scale_bytes).unwrap();
    decode(&mut s, bytes, scale_bytes, back).unwrap();
    s.synchronize().unwrap();
    let what = format!("{t} x {c} of {:?}", T::DTYPE);
    let got_scales: Vec<f64> = m.download::<u8>(scale_bytes).iter().map(|b| f64::from(power_of_two(*b))).collect();
    assert_eq!(got_scales, scales, "{what}");
    let (bytes, back) = (m.download::<u8>(bytes), m.download::<T>(back));
    for j in 0..t * c {
        let (row, column) = (j / c, j % c);
        // Bit by bit, as the file's head says it: code 2 p begins at bit 24 p of a row, code 2 p + 1 twelve bits on.
        let bit = |b: usize| u16::from(bytes[row * packed(c) + b / 8] >> (b % 8) & 1);
        let code = (0..12).map(|b| bit(12 * column + b) << b).sum::<u16>();
        assert_eq!(code, codes[j], "{what}: {} at {row}, {column}", values[j]);
        // In f32, where what was rounded up to 2^128 is infinity.
        let want = (value(code) * scales[row * c.div_ceil(TILE) + column / TILE]) as f32;
        let want = T::of_f64(f64::from(want));
        assert!(back[j] == want || (back[j].as_f64().is_nan() && want.as_f64().is_nan()), "{what}: {row}, {column}");
    }
    if c % 2 == 1 {
        assert!(bytes.chunks(packed(c)).all(|row| row[packed(c) - 1] == 0 && row[packed(c) - 2] < 16), "{what}");
    }
}

#[test]
fn tiles_are_defined_to_the_bit_and_come_back() {
    for (t, c) in [(0, 4), (1, 1), (3, 2), (2, 127), (5, 129), (4, 128), (90, 300)] {
        there_and_back::<f32>(t, c);
        there_and_back::<f64>(t, c);
        there_and_back::<bf16>(t, c);
    }
}

#[test]
fn numbers_come_back_within_half_a_step_of_six_bits() {
    // An error of at most 2^-7 of the number, or 2^-21 of what the tile's largest is scaled to.
    let mut s = stream();
    let m = s.memory().clone();
    let (t, c) = (20, 300);
    let x = gaussian(t * c, 1);
    let (packed, scales) = (m.alloc(DType::U8, &[t, packed(c)]), m.alloc(DType::U8, &[t, c.div_ceil(TILE)]));
    let (tensor, back) = (m.from_slice(&[t, c], &x), m.alloc(DType::F64, &[t, c]));
    encode(&mut s, tensor, packed, scales).unwrap();
    decode(&mut s, packed, scales, back).unwrap();
    s.synchronize().unwrap();
    let back = m.download::<f64>(back);
    for (x, back) in x.iter().zip(&back) {
        assert!((x - back).abs() <= x.abs() / 127.9 + 1e-9, "{x}: {back}");
    }
    assert!(encode(&mut s, tensor, scales, packed).is_err());
}
