//! Numbers that are built to underflow and to be cut off are counted, and no others; and counts do not depend on how an op lays them out.
#![expect(clippy::unwrap_used, reason = "tests")]

use half::bf16;

use super::*;
use crate::{
    fp8::{Scaling, padded},
    ops::{quantize, testing::*},
};

fn counted(m: &Memory, counts: Tensor) -> Counts {
    Counts::from_array(m.download::<f64>(counts).try_into().unwrap())
}

fn none(m: &Memory) -> Tensor {
    m.from_slice(&[LEN], &[0f64; LEN])
}

/// A tile whose scale is 1: a 448, `small` numbers that become zero, as many that do not though they are least, a zero, and ones.
fn tile(small: usize) -> Vec<f32> {
    let mut x = vec![1.0; TILE];
    x[0] = 448.0;
    x[1] = 0.0;
    for i in 0..small {
        // Half of the least code is a tie, and goes to zero; above it is the least code.
        x[2 + 2 * i] = if i.is_multiple_of(2) { -(2f32.powi(-10)) } else { 2f32.powi(-40) };
        x[3 + 2 * i] = 2f32.powi(-10).next_up();
    }
    x
}

#[test]
fn numbers_that_become_zero_are_counted_in_every_layout() {
    let mut s = stream();
    let m = s.memory().clone();
    // Three rows of two tiles, the last partial: scales 1, and 2 where all is doubled.
    let rows: Vec<Vec<f32>> = (0..3)
        .map(|r| {
            let second = tile(10 + r).into_iter().map(|x| 2.0 * x).take(100);
            tile(r).into_iter().chain(second).collect()
        })
        .collect();
    let c = TILE + 100;
    let x = m.from_slice(&[3, c], &rows.concat());
    let want = Counts {
        amax: 896.0,
        num_nonzero: (3 * (c - 2)) as f64,
        num_underflowed: (1 + 2 + 10 + 11 + 12) as f64,
        num_overflowed: 0.0,
        min_scale: 1.0,
        max_scale: 2.0,
    };
    for scaling in [Scaling::Real, Scaling::PowerOfTwo] {
        let (q, counts) = (Tiles::alloc(&m, 3, c), none(&m));
        quantize::tiles(&mut s, x, q, scaling).unwrap();
        tiles(&mut s, Numbers::Float(x), q, None, counts).unwrap();
        s.synchronize().unwrap();
        assert_eq!(counted(&m, counts), want, "{scaling:?}");
        // The same numbers lying across, in columns.
        let across: Vec<f32> = (0..c).flat_map(|at| rows.iter().map(move |row| row[at])).collect();
        let across = m.from_slice(&[c, 3], &across);
        let (q, counts) = (Tiles::alloc(&m, 3, c), none(&m));
        quantize::columns(&mut s, across, None, q, scaling).unwrap();
        columns(&mut s, Numbers::Float(across), None, q, counts).unwrap();
        s.synchronize().unwrap();
        assert_eq!(counted(&m, counts), want, "{scaling:?}");
    }
    // Counts are added to.
    let (q, counts) = (Tiles::alloc(&m, 3, c), none(&m));
    quantize::tiles(&mut s, x, q, Scaling::Real).unwrap();
    for _ in 0..2 {
        tiles(&mut s, Numbers::Float(x), q, None, counts).unwrap();
    }
    s.synchronize().unwrap();
    assert_eq!(counted(&m, counts), want.and(want));
    assert_eq!(want.and(want).num_underflowed, 72.0);
}

#[test]
fn weights_have_a_scale_for_each_block() {
    let mut s = stream();
    let m = s.memory().clone();
    let dims = [2, 130, 3];
    let mut w = vec![0.5f32; 2 * 130 * 3];
    // Matrix 1, second block of rows: 448 beside numbers that vanish under it; those of other blocks have scales of their own.
    w[390 + 128 * 3] = -448.0;
    w[390 + 129 * 3] = 2f32.powi(-11);
    w[390 + 129 * 3 + 1] = -(2f32.powi(-12));
    w[7] = 2f32.powi(-11);
    let (w, q, counts) = (m.from_slice(&dims, &w), Blocks::alloc(&m, &dims), none(&m));
    quantize::blocks(&mut s, w, q, None, Scaling::Real).unwrap();
    blocks(&mut s, w, q, counts).unwrap();
    s.synchronize().unwrap();
    let scale = f64::from(0.5f32 / 448.0);
    let want = [448.0, 780.0, 2.0, 0.0, scale, 1.0];
    assert_eq!(counted(&m, counts), Counts::from_array(want));
}

#[test]
fn numbers_past_the_largest_code_are_counted() {
    let mut s = stream();
    let m = s.memory().clone();
    // Under a scale that is made for smaller numbers, as one from a step before would be.
    let mut x = vec![1.0f32; 2 * TILE];
    (x[3], x[4], x[5], x[200], x[201]) = (928.1, -5000.0, 928.0, 897.0, f32::INFINITY);
    let (x, q, counts) = (m.from_slice(&[2, TILE], &x), Tiles::alloc(&m, 2, TILE), none(&m));
    m.upload(q.scales, &[2.0f32, 2.0, 0.0, 0.0]);
    let codes: Vec<u8> = m.download::<f32>(x).iter().map(|x| crate::fp8::encode_scaled(*x, 0.5)).collect();
    m.upload(q.codes, &codes);
    tiles(&mut s, Numbers::Float(x), q, None, counts).unwrap();
    s.synchronize().unwrap();
    let want = Counts::from_array([f64::INFINITY, 256.0, 0.0, 3.0, 2.0, 2.0]);
    assert_eq!(counted(&m, counts), want, "928 of 2 x 464 is rounded to 448, and 928.1 is cut off");
    // What is no number is not counted.
    let mut x = vec![f32::NAN; TILE];
    x[0] = 3.0;
    let (x, q, counts) = (m.from_slice(&[1, TILE], &x), Tiles::alloc(&m, 1, TILE), none(&m));
    quantize::tiles(&mut s, x, q, Scaling::PowerOfTwo).unwrap();
    tiles(&mut s, Numbers::Float(x), q, None, counts).unwrap();
    s.synchronize().unwrap();
    let found = counted(&m, counts);
    assert_eq!((found.amax, found.num_nonzero, found.num_overflowed), (3.0, 1.0, 0.0));
}

#[test]
fn groups_and_numbers_in_8_bits_are_counted_as_they_are() {
    let mut s = stream();
    let m = s.memory().clone();
    // 200 rows, of which groups have 150; what is past them may be anything, and is.
    let (t, c, e) = (200, 5, 3);
    let mut x: Vec<bf16> = random(t * c, 4).into_iter().map(|x| bf16::from_f64(x.powi(9))).collect();
    x[150 * c..].fill(bf16::from_f32(1e30));
    let offsets = m.from_slice(&[e + 1], &[0u32, 20, 20, 150]);
    let narrow = Tiles::alloc(&m, t, c);
    let x = m.from_slice(&[t, c], &x);
    quantize::tiles(&mut s, x, narrow, Scaling::Real).unwrap();
    let (wide, of_tiles) = (m.alloc(DType::F32, &[t, c]), none(&m));
    crate::ops::dequantize::tiles(&mut s, narrow, wide).unwrap();
    tiles(&mut s, Numbers::Float(x), narrow, Some(offsets), of_tiles).unwrap();
    let [float, codes] = [Numbers::Float(wide), Numbers::Tiles(narrow)].map(|numbers| {
        let (q, counts) = (Tiles::alloc(&m, c, padded(t, e)), none(&m));
        match numbers {
            Numbers::Float(x) => quantize::columns(&mut s, x, Some(offsets), q, Scaling::Real).unwrap(),
            Numbers::Tiles(x) => quantize::retile(&mut s, x, Some(offsets), q, Scaling::Real).unwrap(),
        }
        columns(&mut s, numbers, Some(offsets), q, counts).unwrap();
        s.synchronize().unwrap();
        // Slowly, from the definition.
        let (x, codes) = (m.download::<f32>(wide), m.download::<u8>(q.codes));
        let place = |row: usize| if row < 20 { row } else { 128 + row - 20 };
        let all = (0..150 * c).filter(|at| x[*at] != 0.0);
        let lost = all.clone().filter(|at| codes[at % c * padded(t, e) + place(at / c)] & 0x7f == 0);
        let found = counted(&m, counts);
        assert_eq!((found.num_nonzero, found.num_underflowed), (all.count() as f64, lost.count() as f64));
        assert!(found.num_underflowed > 0.0 && found.num_overflowed == 0.0 && found.amax < 2.0, "{found:?}");
        found
    });
    assert_eq!(float, codes);
    let found = counted(&m, of_tiles);
    assert!(found.amax <= 1.0 && found.num_nonzero == (150 * c) as f64, "{found:?}");
    // Wrong shapes are refused.
    let error = tiles(&mut s, Numbers::Float(x), narrow, None, wide).unwrap_err().to_string();
    assert!(error.contains("count rounding of tiles") && error.contains("counts"), "{error}");
}
