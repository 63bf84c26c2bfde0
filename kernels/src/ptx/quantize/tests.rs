//! Each kernel against its op, bit by bit, in both ways to round; what is not a number, too; and barriers taken away.

use super::*;
use crate::{
    device::{Share, Target},
    fp8::{E4M3, Scaling, padded},
    memory::Memory,
    ops::{permute::Order, quantize as cpu, rms_norm as cpu_norm, swiglu as cpu_swiglu, testing::random},
    ptx::{
        self,
        case::{Case, Data},
    },
};
use DType::{Bf16, F32, U8, U32};

/// Both scalings, by the instruction and by integers.
fn recipes() -> Vec<(Scaling, Recipe)> {
    let [hopper, ampere] = [(9, 0), (8, 0)].map(|compute| Target {
        compute,
        num_sms: 2,
        shared_bytes: 0,
        share: Share::All,
        tuning: None,
    });
    let scalings = [Scaling::Real, Scaling::PowerOfTwo];
    let recipe = |scaling| [&hopper, &ampere].map(|on| (scaling, Recipe::new(on, scaling)));
    scalings.into_iter().flat_map(recipe).collect()
}

/// Numbers of all sizes, and now and then one that is none.
fn wild(dtype: DType, dims: &[usize], seed: u64) -> Data {
    let mut x = Data::random(dtype, dims, seed);
    let exponents = random(x.2.len(), seed + 100);
    for (i, (x, e)) in x.2.iter_mut().zip(exponents).enumerate() {
        // Each 512 numbers of a size of their own.
        *x *= 10f64.powf(2.0 * e + ((i / 512 * 7) % 60) as f64 - 30.0);
        match (i * 7919) % 2003 {
            0 => *x = f64::NAN,
            1 => *x = -f64::NAN,
            2 => *x = f64::INFINITY,
            3 => *x = -f64::INFINITY,
            4 => *x = -0.0,
            _ => {}
        }
    }
    x
}

/// Outputs of [r, c] tiles, to be assigned.
fn poisoned(r: usize, c: usize) -> [Data; 2] {
    [Data::poison(U8, &[r, c]), Data::poison(F32, &Tiles::scale_shape(r, c))]
}

fn pair(x: &[Tensor]) -> Tiles {
    Tiles { codes: x[0], scales: x[1] }
}

fn inputs(first: &[Data], q: [Data; 2]) -> Vec<Data> {
    first.iter().cloned().chain(q).collect()
}

/// Scales of rows that there are: what is past them is not defined.
const SHAPES: [[usize; 2]; 7] = [[1, 1], [5, 16], [3, 128], [9, 144], [4, 200], [7, 131], [2, 1040]];

#[test]
fn tiles_are_the_cpus() {
    for (scaling, recipe) in recipes() {
        for (dtype, [t, i]) in [F32, Bf16].into_iter().flat_map(|dtype| SHAPES.map(|shape| (dtype, shape))) {
            Case::new(&inputs(&[wild(dtype, &[t, i], 1)], poisoned(t, i)))
                .cpu(|s, x| cpu::tiles(s, x[0], pair(&x[1..]), scaling))
                .ptx(|x| tiles(x[0], pair(&x[1..]), recipe))
                .equal();
        }
    }
}

/// Rows whose scale is 1, so that all 256 codes, the ties between them and their neighbours are met as they are.
fn around_codes() -> Data {
    let mut x = vec![];
    for code in 0..=255u8 {
        let value = E4M3[code as usize];
        let tie = if code & 0x7f < 0x7e { (value + E4M3[code as usize + 1]) / 2.0 } else { value };
        x.extend([value, value.next_up(), value.next_down(), tie, tie.next_up(), tie.next_down()]);
    }
    x.retain(|x| x.is_nan() || x.abs() <= 448.0);
    let rows: Vec<f64> =
        x.chunks(127).flat_map(|x| x.iter().copied().chain([448.0; 128]).take(128)).map(f64::from).collect();
    Data(F32, vec![rows.len() / 128, 128], rows)
}

#[test]
fn every_code_and_every_tie_is_met() {
    let x = around_codes();
    let t = x.1[0];
    for (scaling, recipe) in recipes() {
        let case = Case::new(&inputs(std::slice::from_ref(&x), poisoned(t, 128)))
            .cpu(|s, x| cpu::tiles(s, x[0], pair(&x[1..]), scaling))
            .ptx(|x| tiles(x[0], pair(&x[1..]), recipe));
        let met: std::collections::BTreeSet<u64> = case.got[1].iter().map(|code| *code as u64).collect();
        assert_eq!(met.len(), 256, "all codes");
        case.equal();
    }
}

/// Offsets, and rows in all: ragged, empty, one row, a whole tile; some rows of no group.
fn groups() -> [(Vec<u32>, usize); 3] {
    [(vec![0, 0, 1, 130, 130, 258, 300], 300), (vec![0, 128, 128, 257], 260), (vec![0, 0, 0], 0)]
}

#[test]
fn columns_are_the_cpus() {
    for (scaling, recipe) in recipes() {
        for (dtype, [t, i]) in [F32, Bf16].into_iter().flat_map(|dtype| SHAPES.map(|shape| (dtype, shape))) {
            let (t, i) = (37 * t, i.min(200));
            Case::new(&inputs(&[wild(dtype, &[t, i], 1)], poisoned(i, t)))
                .cpu(|s, x| cpu::columns(s, x[0], None, pair(&x[1..]), scaling))
                .ptx(|x| columns(x[0], None, pair(&x[1..]), recipe))
                .equal();
        }
        for (offsets, t) in groups() {
            let (i, e) = (72, offsets.len() - 1);
            let first = [wild(Bf16, &[t, i], 2), Data::u32(&[e + 1], &offsets)];
            Case::new(&inputs(&first, poisoned(i, padded(t, e))))
                .cpu(|s, x| cpu::columns(s, x[0], Some(x[1]), pair(&x[2..]), scaling))
                .ptx(|x| columns(x[0], Some(x[1]), pair(&x[2..]), recipe))
                .equal();
        }
    }
}

/// More groups than a block has threads, of one row or none.
#[test]
fn many_groups_are_found() {
    let (i, e, t, (scaling, recipe)) = (5, 270, 10, recipes()[0]);
    let offsets: Vec<u32> = (0..=e as u32).map(|g| g / 26).collect();
    let first = [Data::random(Bf16, &[t, i], 2), Data::u32(&[e + 1], &offsets)];
    Case::new(&inputs(&first, poisoned(i, padded(t, e))))
        .cpu(|s, x| cpu::columns(s, x[0], Some(x[1]), pair(&x[2..]), scaling))
        .ptx(|x| columns(x[0], Some(x[1]), pair(&x[2..]), recipe))
        .equal();
}

/// Codes of all kinds, and scales of all sizes.
fn codes(t: usize, i: usize) -> [Data; 2] {
    let all = (0..t * i).map(|n| ((n * n * 37 + n / 5) % 256) as f64).collect();
    let shape = Tiles::scale_shape(t, i);
    let scales = Data::random(F32, &shape, 3).map(|x| 10f64.powf(20.0 * x));
    [Data(U8, vec![t, i], all), scales]
}

#[test]
fn codes_are_retiled_as_the_cpu_does() {
    for (scaling, recipe) in recipes() {
        for [t, i] in [[1, 1], [130, 128], [48, 144], [30, 131]] {
            Case::new(&inputs(&codes(t, i), poisoned(i, t)))
                .cpu(|s, x| cpu::retile(s, pair(x), None, pair(&x[2..]), scaling))
                .ptx(|x| retile(pair(x), None, pair(&x[2..]), recipe))
                .equal();
        }
        for (offsets, t) in groups() {
            let (i, e) = (48, offsets.len() - 1);
            let first = [&codes(t, i)[..], &[Data::u32(&[e + 1], &offsets)]].concat();
            Case::new(&inputs(&first, poisoned(i, padded(t, e))))
                .cpu(|s, x| cpu::retile(s, pair(x), Some(x[2]), pair(&x[3..]), scaling))
                .ptx(|x| retile(pair(x), Some(x[2]), pair(&x[3..]), recipe))
                .equal();
        }
    }
}

fn block_pair(x: &[Tensor]) -> Blocks {
    Blocks { codes: x[0], scales: x[1] }
}

#[test]
fn blocks_are_the_cpus_both_ways() {
    let shapes: [&[usize]; 6] = [&[1, 1], &[128, 128], &[130, 272], &[3, 144, 48], &[2, 200, 131], &[0, 16]];
    for (scaling, recipe) in recipes() {
        for (dtype, dims) in [F32, Bf16].into_iter().flat_map(|dtype| shapes.map(|dims| (dtype, dims))) {
            let mut other = dims.to_vec();
            other[dims.len() - 2..].reverse();
            let out = |dims: &[usize]| [Data::poison(U8, dims), Data::poison(F32, &Blocks::scale_shape(dims))];
            let all = [&[wild(dtype, dims, 1)][..], &out(dims), &out(&other)].concat();
            Case::new(&all)
                .cpu(|s, x| cpu::blocks(s, x[0], block_pair(&x[1..]), Some(block_pair(&x[3..])), scaling))
                .ptx(|x| blocks(x[0], block_pair(&x[1..]), Some(block_pair(&x[3..])), recipe))
                .equal();
            Case::new(&all[..3])
                .cpu(|s, x| cpu::blocks(s, x[0], block_pair(&x[1..]), None, scaling))
                .ptx(|x| blocks(x[0], block_pair(&x[1..]), None, recipe))
                .equal();
        }
    }
}

#[test]
fn permuted_rows_are_the_cpus() {
    let (t, tokens) = (6, [3, 0, 5, 5, 1, 2, 4, 0, 3]);
    for (scaling, recipe) in recipes() {
        for (dtype, d) in [(F32, 16), (Bf16, 272), (Bf16, 35)] {
            let first = [wild(dtype, &[t, d], 1), Data::u32(&[9], &tokens)];
            Case::new(&inputs(&first, poisoned(9, d)))
                .cpu(|s, x| {
                    let order = Order { offsets: x[1], row_of_slot: x[1], token_of_row: x[1] };
                    crate::ops::permute::permute_tiles(s, x[0], order, pair(&x[2..]), scaling)
                })
                .ptx(|x| permuted_tiles(x[0], x[1], pair(&x[2..]), recipe))
                .equal();
        }
    }
}

/// x as it is, and widened to f32.
fn both_widths(x: &Data) -> [Data; 2] {
    let m = Memory::new(crate::device::Device::Cpu);
    let t = x.upload(&m);
    [x.clone(), Data(F32, x.1.clone(), ptx::case::values(&m, t))]
}

/// Approximate functions have the same value in one run: that of the kernel which has its output in f32.
#[test]
fn swiglu_is_its_kernels_in_f32_and_nearly_the_cpus() {
    for (scaling, recipe) in recipes() {
        for (dtype, t, f) in [(F32, 5, 16), (Bf16, 9, 272), (Bf16, 3, 131)] {
            let [h, wide] = both_widths(&Data::random(dtype, &[t, 2 * f], 1).map(|x| 6.0 * x));
            let [codes, scales] = poisoned(t, f);
            let all = [wide, Data::poison(F32, &[t, f]), codes.clone(), scales.clone(), h.clone(), codes, scales];
            for seed in 1..4 {
                let got = Case::new(&all).run(seed, |_, x| {
                    let plain = ptx::swiglu::forward(x[0], x[1]);
                    let quantized = tiles(x[1], pair(&x[2..]), recipe);
                    plain.into_iter().chain(quantized).chain(swiglu_tiles(x[4], pair(&x[5..]), recipe)).collect()
                });
                let got = got.unwrap();
                assert_eq!(got[5], got[2], "codes of {dtype:?} [{t}, {f}]");
                let bits = |x: &[f64]| x.iter().map(|x| x.to_bits()).collect::<Vec<_>>();
                assert_eq!(bits(&got[6]), bits(&got[3]), "scales of {dtype:?} [{t}, {f}]");
            }
            let case = Case::new(&inputs(&[h], poisoned(t, f)))
                .cpu(|s, x| cpu_swiglu::forward_tiles(s, x[0], pair(&x[1..]), scaling))
                .ptx(|x| swiglu_tiles(x[0], pair(&x[1..]), recipe));
            nearly(&case);
        }
    }
}

/// The next code at most, and that seldom: numbers of which one is at a tie, by a last bit.
fn nearly(case: &Case) {
    let differ = case.got[1].iter().zip(&case.want[1]).filter(|(got, want)| got != want);
    assert!(differ.clone().all(|(got, want)| (got - want).abs() == 1.0), "neighbouring codes");
    assert!(differ.count() * 500 <= case.got[1].len(), "few codes differ");
    for (got, want) in case.got[2].iter().zip(&case.want[2]) {
        assert!(got.is_nan() && want.is_nan() || (got - want).abs() <= 2e-6 * want, "scale {got}, not {want}");
    }
}

#[test]
fn norms_are_their_kernels_in_f32_and_the_cpus() {
    let shapes = [[0, 16, 16], [5, 32, 16], [3, 150, 131], [9, 336, 272], [2, 4112, 4096]];
    for (scaling, recipe) in recipes() {
        for (dtype, [t, c, d]) in [F32, Bf16].into_iter().flat_map(|dtype| shapes.map(|shape| (dtype, shape))) {
            // Sums of squares of small integers are exact in any order.
            let whole = |dims: &[usize], seed| Data::random(dtype, dims, seed).map(|x| (8.0 * x).round());
            let first = [whole(&[t, c], 1), Data::random(dtype, &[d], 2), Data::poison(dtype, &[t])];
            Case::new(&inputs(&first, poisoned(t, d)))
                .cpu(|s, x| cpu_norm::forward_tiles(s, x[0], x[1], pair(&x[3..]), x[2], 1e-6, scaling))
                .ptx(|x| rms_norm_tiles(x[0], x[1], pair(&x[3..]), x[2], 1e-6, recipe))
                .equal();
        }
        // Of any numbers, those of the kernels one after the other, whose sums have the same order.
        for [t, c, d] in [[3, 150, 131], [9, 336, 272], [2, 4112, 4096]] {
            let (x, w) = (Data::random(F32, &[t, c], 1), Data::random(F32, &[d], 2));
            let [y, rstd] = [Data::poison(F32, &[t, d]), Data::poison(F32, &[t])];
            let [codes, scales] = poisoned(t, d);
            let all = [x, w, y, rstd.clone(), codes.clone(), scales.clone(), rstd, codes, scales];
            let got = Case::new(&all).run(1, |_, x| {
                let mut launches = rms_norm::forward(x[0], x[1], x[2], x[3], 1e-6);
                launches.extend(tiles(x[2], pair(&x[4..]), recipe));
                launches.extend(rms_norm_tiles(x[0], x[1], pair(&x[7..]), x[6], 1e-6, recipe));
                launches
            });
            let got: Vec<Vec<u64>> = got.unwrap().iter().map(|x| x.iter().map(|x| x.to_bits()).collect()).collect();
            assert_eq!(got[3..6], got[6..9], "[{t}, {c}, {d}]");
        }
    }
}

#[test]
fn parts_of_buffers_go_element_by_element() {
    let (scaling, recipe) = recipes()[0];
    let x = wild(Bf16, &[3 * 32 + 1], 1);
    let part = |x: &[Tensor]| x[0].slice(1, 3 * 32).reshape(&[3, 32]);
    Case::new(&inputs(std::slice::from_ref(&x), poisoned(3, 32)))
        .cpu(|s, x| cpu::tiles(s, part(x), pair(&x[1..]), scaling))
        .ptx(|x| tiles(part(x), pair(&x[1..]), recipe))
        .equal();
    Case::new(&inputs(std::slice::from_ref(&x), poisoned(32, 3)))
        .cpu(|s, x| cpu::columns(s, part(x), None, pair(&x[1..]), scaling))
        .ptx(|x| columns(part(x), None, pair(&x[1..]), recipe))
        .equal();
}

#[test]
fn each_barrier_is_needed() {
    let (_, recipe) = recipes()[0];
    let offsets = Data::u32(&[258], &(0..258).map(|g| g.max(200) - 200).collect::<Vec<_>>());
    let i = 64;
    let first = [Data::random(Bf16, &[57, i], 1), offsets];
    let run = |x: &[Tensor]| columns(x[0], Some(x[1]), pair(&x[2..]), recipe);
    Case::new(&inputs(&first, poisoned(i, padded(57, 257)))).mutants("bar.sync", run);
    let out = [Data::poison(U8, &[128, 128]), Data::poison(F32, &[1, 1])];
    let all = [&[Data::random(F32, &[128, 128], 1)][..], &out, &out].concat();
    Case::new(&all).mutants("bar.sync", |x| blocks(x[0], block_pair(&x[1..]), Some(block_pair(&x[3..])), recipe));
}

#[test]
fn nothing_is_no_launch() {
    let (m, (_, recipe)) = (Memory::new(crate::device::Device::Cpu), recipes()[0]);
    assert!(tiles(m.alloc(F32, &[0, 16]), Tiles::alloc(&m, 0, 16), recipe).is_empty());
    assert!(columns(m.alloc(F32, &[0, 16]), None, Tiles::alloc(&m, 16, 0), recipe).is_empty());
    assert!(blocks(m.alloc(F32, &[0, 16]), Blocks::alloc(&m, &[0, 16]), None, recipe).is_empty());
    let order = m.alloc(U32, &[0]);
    assert!(permuted_tiles(m.alloc(F32, &[3, 16]), order, Tiles::alloc(&m, 0, 16), recipe).is_empty());
}
