//! Every kernel in every form and raggedness; numbers that are hard; the rule that chooses.

use super::{
    harness::{Case, DENSE, Numbers},
    *,
};
use crate::{
    device::Device,
    dtype::DType,
    memory::Memory,
    ptx::{
        Arch,
        gemm::harness::{AMPERE, HOPPER, How},
    },
};

const ALL_NUMBERS: [Numbers; 3] = [Numbers::Gaussian, Numbers::Outliers, Numbers::Positive];

/// What both kernels are asked for.
fn every_form(on: Target, unit: usize) {
    for (seed, numbers) in (1..).zip(ALL_NUMBERS) {
        let case = Case { numbers, ..DENSE };
        Case { m: 72, n: 144, k: 272, ..case }.check(on, seed);
        Case { m: 3, n: 5 * unit, k: 17 * unit, output: DType::F32, ..case }.check(on, seed);
        Case { m: 65, n: 7 * unit, k: unit, accumulate: true, ..case }.check(on, seed);
        let tiled = Case { tiled: true, output: DType::F32, accumulate: true, ..case };
        Case { m: 72, n: 144, k: 272, ..tiled }.check(on, seed);
        Case { m: 5 * unit, n: unit, k: 9 * unit, ..tiled }.check(on, seed);
    }
    for (seed, counts) in (5..).zip([&[5, 0, 1, 70][..], &[0, 0, 3], &[2; 37], &[0, 0]]) {
        let case = Case { n: 9 * unit, k: 10 * unit, counts, how: How::Offsets, ..DENSE };
        case.check(on, seed);
        Case { n: 2 * unit, how: How::Counts(70), output: DType::F32, ..case }.check(on, seed);
        let tiled = Case { tiled: true, m: 4 * unit, n: 3 * unit, output: DType::F32, accumulate: true, ..case };
        tiled.check(on, seed);
    }
}

#[test]
fn by_mma() {
    every_form(AMPERE, 16);
    let tiled = Case { tiled: true, output: DType::F32, accumulate: true, ..DENSE };
    for (seed, (m, n, k)) in (1..).zip([(3, 5, 131), (66, 67, 7), (1, 1, 1)]) {
        Case { m, n, k, ..DENSE }.check(AMPERE, seed);
        Case { m, n, k, ..tiled }.check(AMPERE, seed);
    }
    // Nothing to sum is zero.
    Case { m: 3, n: 4, k: 0, ..DENSE }.check(AMPERE, 1);
    let counts = &[3, 0, 130, 1];
    Case { n: 7, k: 33, counts, how: How::Offsets, ..DENSE }.check(AMPERE, 2);
    Case { m: 7, n: 33, counts, how: How::Offsets, ..tiled }.check(AMPERE, 3);
}

#[test]
fn by_wgmma() {
    every_form(HOPPER, 16);
}

/// Each tile, whatever is chosen for so few multiprocessors.
#[test]
fn every_tile_in_every_form() {
    let four = Target { num_sms: 4, ..HOPPER };
    for (seed, tile) in (1..).zip(wgmma::FOR_BLOCKS) {
        let by_tile = |problem: &Problem| vec![wgmma::launch(four, problem, tile)];
        let case = Case { n: 208, k: 400, ..DENSE };
        Case { m: tile.bm as usize + 8, ..case }.check_by(&by_tile, seed);
        Case { m: 40, output: DType::F32, accumulate: true, ..case }.check_by(&by_tile, seed);
        let counts = &[7, 0, 65, tile.bm as usize + 70];
        Case { k: 144, counts, how: How::Offsets, ..case }.check_by(&by_tile, seed);
        Case { n: 48, k: 144, counts, how: How::Counts(tile.bm as usize + 80), ..case }.check_by(&by_tile, seed);
    }
    for (seed, tile) in (1..).zip(wgmma::FOR_TILES) {
        let by_tile = |problem: &Problem| vec![wgmma::launch(four, problem, tile)];
        let case = Case { tiled: true, n: 144, output: DType::F32, accumulate: true, ..DENSE };
        Case { m: tile.bm as usize + 8, k: 400, ..case }.check_by(&by_tile, seed);
        Case { m: 144, counts: &[7, 0, 129, 256], how: How::Offsets, ..case }.check_by(&by_tile, seed);
    }
}

#[test]
fn the_kernel_follows_from_device_shape_and_alignment() {
    let memory = Memory::new(Device::Cpu);
    let h200 = Target { arch: Arch::Sm90a, num_sms: 132, tuning: None };
    let chosen = |on: Target, [m, n, k]: [usize; 3]| {
        let a = Tiles::alloc(&memory, m, k);
        let b = Blocks::alloc(&memory, &[n, k]);
        let y = memory.alloc(DType::Bf16, &[m, n]);
        match choose(on, &Problem::new([m, n, k], a, (b.codes, ScaleB::Blocks(b.scales)), y)) {
            Choice::Mma => [0, 0, 0],
            Choice::Wgmma(tile) => [tile.bm, tile.bn, tile.blocks],
        }
    };
    assert_eq!(chosen(AMPERE, [64, 64, 64]), [0, 0, 0]);
    assert_eq!(chosen(h200, [64, 64, 72]), [0, 0, 0]);
    assert_eq!(chosen(h200, [1, 2112, 512]), [64, 32, 1]);
    assert_eq!(chosen(h200, [128, 2112, 128]), [64, 32, 1]);
    assert_eq!(chosen(h200, [4096, 2112, 128]), [128, 128, 2]);
    assert_eq!(chosen(h200, [4096, 7168, 128]), [256, 128, 2]);
}

/// The first rows of a product, as bits, of so many.
fn first_rows(on: Target, rows: usize) -> Vec<u8> {
    let (n, k) = (80, 272);
    let memory = Memory::new(Device::Cpu);
    let codes = |n: usize| (0..n).map(|i| (i * 37 % 120) as u8).collect::<Vec<_>>();
    let a = Tiles::alloc(&memory, rows, k);
    let b = Blocks::alloc(&memory, &[n, k]);
    memory.upload(a.codes, &codes(rows * k));
    memory.upload(b.codes, &codes(n * k));
    for (scales, by) in [(a.scales, 0.37f32), (b.scales, 0.11)] {
        // The same for a row, whatever the pitch.
        let wide = scales.dim(1);
        let x: Vec<f32> = (0..scales.len()).map(|i| by + 0.01 * ((i / wide * 7 + i % wide) % 13) as f32).collect();
        memory.upload(scales, &x);
    }
    let y = memory.alloc(DType::F32, &[rows, n]);
    crate::ptx::testing::run(&memory, 1, &product(on, a, b, None, y)).unwrap_or_else(|e| panic!("{e}"));
    memory.download::<f32>(y)[..3 * n].iter().flat_map(|x| x.to_bits().to_le_bytes()).collect()
}

#[test]
fn a_row_has_the_same_bits_beside_any_other_rows() {
    for on in [AMPERE, HOPPER, Target { num_sms: 132, ..HOPPER }] {
        let alone = first_rows(on, 3);
        assert!([64, 65, 150, 300].into_iter().all(|rows| first_rows(on, rows) == alone), "{on:?}");
    }
}

/// A sum of one product is each code's value, NaN among them.
#[test]
fn every_code_is_multiplied_as_its_value() {
    for on in [AMPERE, HOPPER] {
        let memory = Memory::new(Device::Cpu);
        let (a, b) = (Tiles::alloc(&memory, 256, 16), Blocks::alloc(&memory, &[16, 16]));
        let mut codes = vec![0; 256 * 16];
        (0..256).for_each(|code| codes[code * 16 + code % 16] = code as u8);
        memory.upload(a.codes, &codes);
        // The unit matrix: 0x38 is 1.
        memory.upload(b.codes, &(0..256).map(|i| if i % 17 == 0 { 0x38u8 } else { 0 }).collect::<Vec<_>>());
        memory.upload(a.scales, &[2f32; 256]);
        memory.upload(b.scales, &[0.25f32]);
        let y = memory.alloc(DType::F32, &[256, 16]);
        crate::ptx::testing::run(&memory, 1, &product(on, a, b, None, y)).unwrap_or_else(|e| panic!("{e}"));
        let y: Vec<f32> = memory.download(y);
        for code in 0..256 {
            let (got, want) = (y[code * 16 + code % 16], crate::fp8::decode_e4m3(code as u8) / 2.0);
            assert!(got == want || got.is_nan() && want.is_nan(), "{on:?} {code:#x}: expected {want}, found {got}");
        }
    }
}

/// The contract functions beside the CPU ops of the same names, in f32.
#[test]
fn passes_are_those_of_the_cpu() {
    use crate::{
        ops,
        ptx::{
            case::{Case as Op, Data},
            fp8_grouped_gemm as grouped,
            grouped_gemm::Rows,
        },
    };
    let (t, k, n, e) = (21, 144, 48, 3);
    let counts = [5, 0, 13];
    let columns = crate::fp8::padded(t, e);
    let used = |column: usize| column < counts[0] || (128..128 + counts[2]).contains(&column);
    let codes = |dims: &[usize], inside: &dyn Fn(usize) -> bool| {
        let cols = dims[dims.len() - 1];
        let code = |i: usize| if inside(i % cols) { (i * 37 % 127 + i / 127 % 2 * 128) as f64 } else { 0.0 };
        Data(DType::U8, dims.to_vec(), (0..dims.iter().product()).map(code).collect())
    };
    let scales = |dims: &[usize], seed| Data::random(DType::F32, dims, seed).map(|x| x.abs() / 448.0);
    let all = |_: usize| true;
    let tiles = |rows: usize, cols: usize, inside: &dyn Fn(usize) -> bool, seed| {
        [codes(&[rows, cols], inside), scales(&Tiles::scale_shape(rows, cols), seed)]
    };
    let blocks = |dims: &[usize], seed| [codes(dims, &all), scales(&Blocks::scale_shape(dims), seed)];
    let offsets = || Data::u32(&[e + 1], &[0, 5, 5, 18]);
    let random = |dims: &[usize]| Data::random(DType::F32, dims, 9);
    let first = |x: &[Tensor]| Tiles { codes: x[0], scales: x[1] };
    let weight = |x: &[Tensor]| Blocks { codes: x[2], scales: x[3] };
    let second = |x: &[Tensor]| Tiles { codes: x[2], scales: x[3] };
    for on in [AMPERE, HOPPER] {
        // Onto nothing, what is there, and another matrix.
        let poison = || Data::poison(DType::F32, &[t, n]);
        for more in [vec![poison()], vec![random(&[t, n])], vec![poison(), random(&[t, n])]] {
            let is_onto = more[0].2.iter().all(|x| !x.is_nan());
            let residual = |x: &[Tensor]| x.get(5).copied().or(is_onto.then_some(x[4]));
            Op::new(&[&tiles(t, k, &all, 1)[..], &blocks(&[n, k], 2), &more].concat())
                .cpu(|s, x| ops::fp8_gemm::product(s, first(x), weight(x), residual(x), x[4]))
                .ptx(|x| product(on, first(x), weight(x), residual(x), x[4]))
                .close(1e-5);
        }
        Op::new(&[&tiles(n, t, &all, 1)[..], &tiles(k, t, &all, 2), &[random(&[n, k])]].concat())
            .cpu(|s, x| ops::fp8_gemm::weight_grad(s, first(x), second(x), x[4]))
            .ptx(|x| weight_grad(on, first(x), second(x), x[4]))
            .close(1e-5);
        let more = [offsets(), Data::poison(DType::F32, &[t, n])];
        Op::new(&[&tiles(t, k, &all, 1)[..], &blocks(&[e, n, k], 2), &more].concat())
            .cpu(|s, x| ops::fp8_grouped_gemm::product(s, first(x), x[4], weight(x), x[5]))
            .ptx(|x| grouped::product(on, first(x), Rows::Offsets(x[4]), weight(x), x[5]))
            .close(1e-5);
        let more = [offsets(), random(&[e, n, k])];
        Op::new(&[&tiles(n, columns, &used, 1)[..], &tiles(k, columns, &used, 2), &more].concat())
            .cpu(|s, x| ops::fp8_grouped_gemm::weight_grad(s, first(x), second(x), x[4], x[5]))
            .ptx(|x| grouped::weight_grad(on, first(x), second(x), x[4], x[5]))
            .close(1e-5);
    }
}
