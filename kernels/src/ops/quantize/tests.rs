//! Quantizers against the definition of the recipe, to the bit, on what is easy to get wrong.

#![expect(clippy::unwrap_used, reason = "tests")]

use half::bf16;

use super::*;
use crate::{fp8::definition, memory::Memory, ops::testing::*};

const SCALINGS: [Scaling; 2] = [Scaling::Real, Scaling::PowerOfTwo];

/// Numbers of all magnitudes, some runs of zeros, of numbers below the floor of amax and of what is not finite.
fn hard(n: usize, seed: u64) -> Vec<f32> {
    let x = random(n, seed);
    let number = |(j, x): (usize, f64)| match (j / 37 + seed as usize) % 11 {
        0 => 0.0,
        1 => (x * 1e-7) as f32,
        2 => [448.0, -448.0, 0.0, -0.0, 1e-45, -1e-39][j % 6],
        3 if j % 3 == 0 => f32::NAN,
        4 if j % 191 == 0 => [f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN][j % 4],
        other => (x * 2f64.powi((j / 91) as i32 % 30 - 15 + other as i32)) as f32,
    };
    x.into_iter().enumerate().map(number).collect()
}

/// Codes [r, c] and scales [tiles, r] of x, by the definition.
fn defined(x: &[f32], c: usize, scaling: Scaling) -> (Vec<u8>, Vec<f32>) {
    let (r, num_tiles) = (x.len() / c.max(1), c.div_ceil(TILE));
    let (mut codes, mut scales) = (Vec::new(), vec![0.0; r * num_tiles]);
    for (row, x) in x.chunks(c.max(1)).enumerate() {
        for (tile, x) in x.chunks(TILE).enumerate() {
            let scale = definition::scale(x, scaling);
            scales[tile * r + row] = scale as f32;
            codes.extend(x.iter().map(|&x| definition::code(x, scale)));
        }
    }
    (codes, scales)
}

fn transposed(x: &[f32], c: usize) -> Vec<f32> {
    let r = x.len() / c.max(1);
    (0..x.len()).map(|j| x[j % r * c + j / r]).collect()
}

/// Bit for bit, but for the sign of what is not a number: products give it differently from processor to processor.
fn assert_tiles(m: &Memory, got: Tiles, (codes, scales): &(Vec<u8>, Vec<f32>), what: &str) {
    assert_eq!(scales_of(m, got), *scales, "scales, {what}");
    for (j, (got, want)) in m.download::<u8>(got.codes).iter().zip(codes).enumerate() {
        assert!(got == want || (got & want) & 0x7f == 0x7f, "code {j}, {what}: expected {want:#x}, found {got:#x}");
    }
}

fn as_type<T: Float>(m: &Memory, dims: &[usize], x: &[f32]) -> (Tensor, Vec<f32>) {
    let x: Vec<T> = x.iter().map(|&x| T::of_f64(f64::from(x))).collect();
    (m.from_slice(dims, &x), x.iter().map(|x| x.as_f64() as f32).collect())
}

fn tiles_are_defined<T: Float>(t: usize, i: usize, scaling: Scaling, seed: u64) {
    let mut s = stream();
    let m = s.memory().clone();
    let (tensor, x) = as_type::<T>(&m, &[t, i], &hard(t * i, seed));
    let (q, qt) = (poisoned_tiles(&m, t, i), poisoned_tiles(&m, i, t));
    let what = format!("{t} x {i} of {:?}, {scaling:?}, seed {seed}", T::DTYPE);
    tiles(&mut s, tensor, q, scaling).unwrap();
    columns(&mut s, tensor, None, qt, scaling).unwrap();
    s.synchronize().unwrap();
    assert_tiles(&m, q, &defined(&x, i, scaling), &what);
    assert_tiles(&m, qt, &defined(&transposed(&x, i), t, scaling), &format!("transposed {what}"));
}

#[test]
fn tiles_and_columns_are_defined_to_the_bit() {
    for (seed, (t, i)) in
        [(0, 8), (1, 1), (2, 128), (3, 127), (129, 5), (5, 129), (300, 70), (130, 400)].iter().enumerate()
    {
        for scaling in SCALINGS {
            tiles_are_defined::<f32>(*t, *i, scaling, seed as u64);
            tiles_are_defined::<bf16>(*t, *i, scaling, seed as u64);
            tiles_are_defined::<f64>(*t, *i, scaling, seed as u64);
        }
    }
}

#[test]
fn all_codes_come_back() {
    // A tile for each sign, with 448 in it, so that the scale is the one it was made with.
    let mut s = stream();
    let m = s.memory().clone();
    for scale in [1.0, 0.5, 2f32.powi(60), 2f32.powi(-20)] {
        let x: Vec<f32> = (0..=255).map(|code| decode_e4m3(code) * scale).collect();
        let (x, q) = (m.from_slice(&[1, 256], &x), poisoned_tiles(&m, 1, 256));
        for scaling in SCALINGS {
            tiles(&mut s, x, q, scaling).unwrap();
            s.synchronize().unwrap();
            assert_tiles(&m, q, &((0..=255).collect(), vec![scale; 2]), &format!("{scaling:?}"));
        }
    }
}

#[test]
fn what_is_small_or_not_finite_is_as_the_recipe_says() {
    let mut s = stream();
    let m = s.memory().clone();
    let floor = MIN_AMAX / 448.0;
    for (x, scaling, codes, scale) in [
        ([0.0, -0.0], Scaling::Real, [0, 0x80], floor),
        ([1e-5, -1e-4], Scaling::Real, [0x63, 0xfe], floor),
        ([0.0, 1e-4], Scaling::PowerOfTwo, [0, 0x7d], 2f32.powi(-22)),
        ([f32::NAN, 448.0], Scaling::Real, [0x7f, 0x7e], 1.0),
        ([f32::NAN, -f32::NAN], Scaling::PowerOfTwo, [0x7f, 0xff], 2f32.powi(-22)),
        // 1 / infinity is 0, and infinity times that is not a number; signs stay.
        ([1.0, f32::INFINITY], Scaling::Real, [0, 0x7f], f32::INFINITY),
        ([-1.0, -f32::INFINITY], Scaling::Real, [0x80, 0xff], f32::INFINITY),
        ([1.0, f32::INFINITY], Scaling::PowerOfTwo, [0, 0x7e], 2f32.powi(120)),
    ] {
        let (x, q) = (m.from_slice(&[1, 2], &x), poisoned_tiles(&m, 1, 2));
        tiles(&mut s, x, q, scaling).unwrap();
        s.synchronize().unwrap();
        assert_tiles(&m, q, &(codes.to_vec(), vec![scale]), "");
    }
}

const COUNTS: [&[usize]; 5] = [&[3, 0, 1, 129, 128], &[0, 0], &[], &[257], &[1, 1, 1, 127, 0]];

/// Of x [t, i]: the columns of each group on its own, at the place that is its; 0 and 1.0 where there are none.
fn padded_columns(x: &[f32], i: usize, counts: &[usize], scaling: Scaling) -> (Vec<u8>, Vec<f32>) {
    let p = padded(x.len() / i, counts.len());
    let (mut codes, mut scales) = (vec![0; i * p], vec![1.0; i * p / TILE]);
    let (mut row, mut start) = (0, 0);
    for &count in counts {
        let (c, s) = defined(&transposed(&x[row * i..(row + count) * i], i), count, scaling);
        for j in 0..i * count {
            codes[j / count * p + start + j % count] = c[j];
        }
        scales[start / TILE * i..][..s.len()].copy_from_slice(&s);
        (row, start) = (row + count, start + count.div_ceil(TILE) * TILE);
    }
    (codes, scales)
}

#[test]
fn each_groups_columns_begin_at_a_tile() {
    let mut s = stream();
    let m = s.memory().clone();
    for (seed, counts) in COUNTS.iter().enumerate() {
        for (room, i) in [(0, 70), (5, 128), (200, 3)] {
            for scaling in SCALINGS {
                let t = counts.iter().sum::<usize>() + room;
                let mut offsets = vec![0u32];
                counts.iter().for_each(|&c| offsets.push(offsets[offsets.len() - 1] + c as u32));
                let p = padded(t, counts.len());
                let what = format!("{counts:?} and {room} more, {i} columns, {scaling:?}");
                let x = hard(t * i, seed as u64);
                let (xs, offsets) = (m.from_slice(&[t, i], &x), m.from_slice(&[offsets.len()], &offsets));
                let (q, tiled, again) = (poisoned_tiles(&m, i, p), poisoned_tiles(&m, t, i), poisoned_tiles(&m, i, p));
                columns(&mut s, xs, Some(offsets), q, scaling).unwrap();
                tiles(&mut s, xs, tiled, scaling).unwrap();
                retile(&mut s, tiled, Some(offsets), again, scaling).unwrap();
                s.synchronize().unwrap();
                assert_tiles(&m, q, &padded_columns(&x, i, counts, scaling), &what);
                let (codes, scales) = (m.download::<u8>(tiled.codes), scales_of(&m, tiled));
                let value = |j: usize| (definition::value(codes[j]) as f32) * scales[j % i / TILE * t + j / i];
                let values: Vec<f32> = (0..t * i).map(value).collect();
                assert_tiles(&m, again, &padded_columns(&values, i, counts, scaling), &format!("{what}, again"));
            }
        }
    }
}

#[test]
fn blocks_have_one_scale_and_so_has_their_transpose() {
    let mut s = stream();
    let m = s.memory().clone();
    for (seed, dims) in [&[1, 1][..], &[128, 256], &[130, 70], &[3, 200, 129], &[2, 1, 300], &[0, 5]].iter().enumerate()
    {
        for scaling in SCALINGS {
            let (o, i): (usize, usize) = (dims[dims.len() - 2], dims[dims.len() - 1]);
            let (down, across) = (o.div_ceil(TILE), i.div_ceil(TILE));
            let x = hard(dims.iter().product(), seed as u64);
            let w = m.from_slice(dims, &x);
            let transposed_dims = [&dims[..dims.len() - 2], &[i, o]].concat();
            let [q, alone, qt] = [dims.to_vec(), dims.to_vec(), transposed_dims].map(|dims| {
                let blocks = Blocks::alloc(&m, &dims);
                m.write::<u8>(blocks.codes).fill(0xa5);
                m.write::<f32>(blocks.scales).fill(f32::NAN);
                blocks
            });
            blocks(&mut s, w, q, Some(qt), scaling).unwrap();
            blocks(&mut s, w, alone, None, scaling).unwrap();
            s.synchronize().unwrap();
            let [codes, alone_codes, codes_t] = [q, alone, qt].map(|q| m.download::<u8>(q.codes));
            let [scales, alone_scales, scales_t] = [q, alone, qt].map(|q| m.download::<f32>(q.scales));
            assert_eq!((&codes, &scales), (&alone_codes, &alone_scales));
            for (e, x) in x.chunks((o * i).max(1)).enumerate() {
                for block in 0..down * across {
                    let (r, c) = (block / across * TILE, block % across * TILE);
                    let place = |r: usize, c: usize| (e * o + r) * i + c;
                    let members = || (r..o.min(r + TILE)).flat_map(move |r| (c..i.min(c + TILE)).map(move |c| (r, c)));
                    let scale = definition::scale(&members().map(|(r, c)| x[r * i + c]).collect::<Vec<_>>(), scaling);
                    assert_eq!(f64::from(scales[e * down * across + block]), scale, "{dims:?}, block {block}");
                    let other = block % across * down + block / across;
                    assert_eq!(f64::from(scales_t[e * down * across + other]), scale, "{dims:?}, block {block}");
                    for (r, c) in members() {
                        let want = definition::code(x[r * i + c], scale);
                        let got = codes[place(r, c)];
                        assert!(
                            got == want || (got & want) & 0x7f == 0x7f,
                            "{dims:?}, matrix {e}, row {r}, column {c}"
                        );
                        assert_eq!(codes_t[e * o * i + c * o + r], got, "{dims:?}, matrix {e}, row {r}, column {c}");
                    }
                }
            }
        }
    }
}

#[test]
fn tensors_of_other_shapes_are_refused() {
    let mut s = stream();
    let m = s.memory().clone();
    let x = m.alloc(DType::F32, &[130, 64]);
    let said = |result: Result<()>| result.unwrap_err().to_string();
    let q = Tiles::alloc(&m, 130, 65);
    assert!(said(tiles(&mut s, x, q, Scaling::Real)).contains("`q` should be U8 of [130, 64]"));
    let q = Tiles { scales: m.alloc(DType::F32, &[1, 130]), ..Tiles::alloc(&m, 130, 64) };
    assert!(said(tiles(&mut s, x, q, Scaling::Real)).contains("`q` should be beside scales F32 of [1, 132]"));
    let q = Tiles::alloc(&m, 130, 64);
    assert!(said(tiles(&mut s, q.codes, q, Scaling::Real)).contains("`x` should be of floating-point numbers"));
    assert!(said(columns(&mut s, x, None, q, Scaling::Real)).contains("`q` should be U8 of [64, 130]"));
    let offsets = m.alloc(DType::U32, &[4]);
    assert!(said(retile(&mut s, q, Some(offsets), q, Scaling::Real)).contains("`q` should be U8 of [64, 512]"));
    let q = Blocks::alloc(&m, &[130, 64]);
    assert!(said(blocks(&mut s, x, q, Some(q), Scaling::Real)).contains("`transposed` should be U8 of [64, 130]"));
}
