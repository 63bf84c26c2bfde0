//! Every kernel in every layout, form of groups and raggedness; the rule that chooses; the contracts.

#![expect(clippy::unwrap_used, reason = "tests")]

use half::bf16;

use super::{
    harness::{AMPERE, Case, DENSE, HOPPER, How},
    *,
};
use crate::{
    device::Device,
    dtype::{DType, Float},
    memory::Memory,
    ops::testing::random,
    ptx::testing,
};

#[test]
fn f32_products_of_every_layout_and_raggedness() {
    for (seed, layout) in (0..).zip([Layout::Nt, Layout::Nn, Layout::Tn]) {
        let case = Case { layout, ..DENSE };
        Case { m: 68, n: 72, k: 20, ..case }.check::<f32>(AMPERE, seed);
        Case { m: 5, n: 7, k: 19, pad: 3, accumulate: true, ..case }.check::<f32>(AMPERE, seed);
        Case { m: 70, n: 68, k: 20, pad: 4, onto: true, ..case }.check::<f32>(AMPERE, seed);
        Case { m: 5, n: 7, k: 3, onto: true, ..case }.check::<f32>(AMPERE, seed);
        Case { m: 3, n: 8, k: 0, onto: true, ..case }.check::<f32>(AMPERE, seed);
        Case { m: 1, n: 65, k: 33, bias: true, ..case }.check::<f32>(AMPERE, seed);
        Case { m: 8, n: 8, k: 4, pad: 4, bias: true, ..case }.check::<f32>(AMPERE, seed);
        Case { m: 3, n: 4, k: 0, ..case }.check::<f32>(AMPERE, seed);
    }
}

#[test]
fn f32_large_tiles() {
    let problem = |m, n| {
        let memory = Memory::new(Device::Cpu);
        let [a, b, c] = [(m, 16), (n, 16), (m, n)].map(|(r, c)| Matrix::new(memory.alloc(DType::F32, &[r, c]), c));
        choose(AMPERE, &Problem::new(Layout::Nt, [m, n, 16], (a, b, c)))
    };
    assert_ne!(problem(128 * 16, 64 * 8), problem(128 * 16, 64 * 7));
    for layout in [Layout::Nt, Layout::Tn] {
        let case = Case { layout, m: 130, n: 60, k: 18, accumulate: true, ..DENSE };
        case.check_by::<f32>(&|problem| vec![simt::launch(problem, simt::LARGE)], 1);
    }
}

#[test]
fn f32_groups() {
    groups::<f32>(AMPERE, &[DType::F32]);
}

/// Groups of all kinds, aligned and not.
fn groups<T: Float>(on: Target, outputs: &[DType]) {
    for (seed, counts) in (0..).zip([&[5, 0, 1, 70][..], &[0, 0, 3], &[2; 37], &[0, 0]]) {
        let output = outputs[seed as usize % outputs.len()];
        for layout in [Layout::Nt, Layout::Nn] {
            let case = Case { layout, n: 40, k: 24, counts, how: How::Offsets, output, ..DENSE };
            case.check::<T>(on, seed);
            Case { how: How::Counts(70), n: 5, k: 7, ..case }.check::<T>(on, seed);
        }
        let case =
            Case { layout: Layout::Tn, m: 16, n: 24, counts, how: How::Offsets, accumulate: true, output, ..DENSE };
        case.check::<T>(on, seed);
        Case { how: How::Counts(70), m: 5, n: 7, pad: 1, ..case }.check::<T>(on, seed);
    }
}

#[test]
fn bf16_by_mma_in_every_layout_and_raggedness() {
    for (seed, layout) in (1..).zip([Layout::Nt, Layout::Nn, Layout::Tn]) {
        let case = Case { layout, ..DENSE };
        Case { m: 72, n: 80, k: 72, ..case }.check::<bf16>(AMPERE, seed);
        Case { m: 64, n: 64, k: 168, pad: 8, output: DType::Bf16, accumulate: true, ..case }
            .check::<bf16>(AMPERE, seed);
        Case { m: 5, n: 7, k: 35, pad: 2, accumulate: true, ..case }.check::<bf16>(AMPERE, seed);
        Case { m: 66, n: 72, k: 40, pad: 8, output: DType::Bf16, onto: true, ..case }.check::<bf16>(AMPERE, seed);
        Case { m: 5, n: 7, k: 9, pad: 1, output: DType::Bf16, onto: true, ..case }.check::<bf16>(AMPERE, seed);
        Case { m: 3, n: 8, k: 0, onto: true, ..case }.check::<bf16>(AMPERE, seed);
        Case { m: 1, n: 65, k: 33, bias: true, output: DType::Bf16, ..case }.check::<bf16>(AMPERE, seed);
        Case { m: 8, n: 8, k: 8, bias: true, ..case }.check::<bf16>(AMPERE, seed);
        Case { m: 3, n: 8, k: 0, ..case }.check::<bf16>(AMPERE, seed);
        let large = Case { m: 130, n: 136, k: 40, output: DType::Bf16, ..case };
        large.check_by::<bf16>(&|problem| vec![mma::launch(problem, mma::LARGE)], seed);
    }
}

#[test]
fn bf16_groups_by_mma() {
    groups::<bf16>(AMPERE, &[DType::F32, DType::Bf16]);
}

#[test]
fn bf16_by_wgmma_contiguous_along_k() {
    by_wgmma(Layout::Nt, 1);
}

#[test]
fn bf16_by_wgmma_in_other_layouts() {
    by_wgmma(Layout::Nn, 2);
    by_wgmma(Layout::Tn, 3);
}

fn by_wgmma(layout: Layout, seed: u64) {
    let case = Case { layout, ..DENSE };
    Case { m: 136, n: 136, k: 72, ..case }.check::<bf16>(HOPPER, seed);
    Case { m: 264, n: 72, k: 520, pad: 8, output: DType::Bf16, ..case }.check::<bf16>(HOPPER, seed);
    Case { m: 8, n: 16, k: 8, bias: true, output: DType::Bf16, ..case }.check::<bf16>(HOPPER, seed);
    Case { m: 8, n: 200, k: 200, accumulate: true, output: DType::Bf16, ..case }.check::<bf16>(HOPPER, seed);
    Case { m: 8, n: 8, k: 0, onto: true, output: DType::Bf16, ..case }.check::<bf16>(HOPPER, seed);
    // Each tile, whatever is chosen for so few multiprocessors.
    for (tile, n) in [(wgmma::LARGE, 264), (wgmma::SMALL, 136), (wgmma::NARROW, 72)] {
        let by_tile = |problem: &Problem| vec![wgmma::launch(HOPPER, problem, tile)];
        let case = Case { m: 72, n, k: 136, ..case };
        Case { accumulate: true, ..case }.check_by::<bf16>(&by_tile, seed);
        if layout == Layout::Nt {
            // C alone is not moved in whole pieces.
            Case { n: n - 1, onto: true, ..case }.check_by::<bf16>(&by_tile, seed);
        }
        Case { m: 200, pad: 8, onto: true, output: DType::Bf16, ..case }.check_by::<bf16>(&by_tile, seed);
        Case { m: 264, output: DType::Bf16, ..case }.check_by::<bf16>(&by_tile, seed);
    }
}

#[test]
fn bf16_groups_by_wgmma() {
    groups::<bf16>(HOPPER, &[DType::F32, DType::Bf16]);
    let counts = &[7, 0, 65, 130];
    for (tile, n) in [(wgmma::LARGE, 264), (wgmma::SMALL, 136), (wgmma::NARROW, 72)] {
        let by_tile = |problem: &Problem| vec![wgmma::launch(HOPPER, problem, tile)];
        let case = Case { n, counts, how: How::Offsets, ..DENSE };
        Case { layout: Layout::Nn, k: 72, output: DType::Bf16, ..case }.check_by::<bf16>(&by_tile, 5);
        Case { layout: Layout::Tn, m: 136, accumulate: true, ..case }.check_by::<bf16>(&by_tile, 6);
        let case = Case { how: How::Counts(136), ..case };
        Case { layout: Layout::Nt, k: 72, output: DType::Bf16, ..case }.check_by::<bf16>(&by_tile, 7);
        Case { layout: Layout::Tn, m: 136, accumulate: true, ..case }.check_by::<bf16>(&by_tile, 8);
    }
}

/// The contract functions beside the CPU ops of the same names, in f32.
#[test]
fn passes_are_those_of_the_cpu() {
    use crate::{ops, ptx::grouped_gemm as grouped, stream::Stream};
    let (t, o, i, counts) = (9, 12, 20, [4u32, 0, 3]);
    let data = |dims: &[usize], seed: u64| -> Vec<f32> {
        random(dims.iter().product(), seed).into_iter().map(|x| x as f32).collect()
    };
    let run = |gpu: bool| {
        let memory = Memory::new(Device::Cpu);
        let put = |dims: &[usize], seed| memory.from_slice(dims, &data(dims, seed));
        let (x, w, dy, bias) = (put(&[t, i], 1), put(&[o, i], 2), put(&[t, o], 3), put(&[o], 4));
        let (y, dx, dw, dbias) = (put(&[t, o], 5), put(&[t, i], 6), put(&[o, i], 7), put(&[o], 8));
        let (y2, dx2, y3) = (put(&[t, o], 9), put(&[t, i], 10), put(&[t, o], 15));
        let offsets = memory.from_slice(&[4], &[0, counts[0], counts[0], counts[0] + counts[2]]);
        let (we, dwe) = (put(&[3, o, i], 11), put(&[3, o, i], 12));
        let (ye, dxe) = (put(&[t, o], 13), put(&[t, i], 14));
        if gpu {
            let rows = grouped::Rows::Offsets(offsets);
            let launches = [
                forward(AMPERE, x, w, Some(bias), y),
                forward_onto(AMPERE, x, w, y2, y2),
                forward_onto(AMPERE, x, w, y2, y3),
                input_grad(AMPERE, dy, w, dx, false),
                input_grad(AMPERE, dy, w, dx2, true),
                weight_grad(AMPERE, dy, x, dw, Some(dbias)),
                grouped::forward(AMPERE, x, rows, we, ye),
                grouped::input_grad(AMPERE, dy, rows, we, Matrix::new(dxe, i)),
                grouped::weight_grad(AMPERE, dy, x, rows, dwe),
            ];
            testing::run(&memory, 7, &launches.into_iter().flatten().collect::<Vec<_>>()).unwrap();
        } else {
            let mut s = Stream::new("cpu", &memory, &Default::default()).unwrap();
            ops::gemm::forward(&mut s, x, w, Some(bias), y).unwrap();
            ops::gemm::forward_onto(&mut s, x, w, y2, y2).unwrap();
            ops::gemm::forward_onto(&mut s, x, w, y2, y3).unwrap();
            ops::gemm::input_grad(&mut s, dy, w, dx, false).unwrap();
            ops::gemm::input_grad(&mut s, dy, w, dx2, true).unwrap();
            ops::gemm::weight_grad(&mut s, dy, x, dw, Some(dbias)).unwrap();
            ops::grouped_gemm::forward(&mut s, x, offsets, we, ye).unwrap();
            ops::grouped_gemm::input_grad(&mut s, dy, offsets, we, dxe).unwrap();
            ops::grouped_gemm::weight_grad(&mut s, dy, x, offsets, dwe).unwrap();
            s.synchronize().unwrap();
        }
        [y, dx, dw, dbias, y2, y3, dx2, ye, dxe, dwe].map(|t| memory.download::<f32>(t))
    };
    for (got, want) in run(true).iter().zip(&run(false)) {
        let close = got.iter().zip(want).all(|(g, w)| (g - w).abs() <= 1e-5 * w.abs().max(1.0));
        assert!(close, "{got:?} {want:?}");
    }
}

#[test]
fn the_kernel_follows_from_device_type_and_alignment() {
    let memory = Memory::new(Device::Cpu);
    let chosen = |on: Target, dtype: DType, [m, n, k]: [usize; 3], stride: usize, offset: usize| {
        let tensor =
            |rows: usize, stride: usize| memory.alloc(dtype, &[rows * stride + offset]).slice(offset, rows * stride);
        let operands =
            (Matrix::new(tensor(m, stride), stride), Matrix::new(tensor(n, k), k), Matrix::new(tensor(m, n), n));
        choose(on, &Problem::new(Layout::Nt, [m, n, k], operands))
    };
    let h200 = Target { arch: Arch::Sm90a, num_sms: 132, tuning: None };
    assert_eq!(chosen(h200, DType::F32, [64, 64, 64], 64, 0), Choice::Simt(simt::SMALL));
    assert_eq!(chosen(h200, DType::F32, [2048, 2048, 64], 64, 0), Choice::Simt(simt::LARGE));
    assert_eq!(chosen(AMPERE, DType::Bf16, [64, 64, 64], 64, 0), Choice::Mma(mma::SMALL));
    assert_eq!(chosen(AMPERE, DType::Bf16, [2048, 2048, 64], 64, 0), Choice::Mma(mma::LARGE));
    assert_eq!(chosen(h200, DType::Bf16, [64, 64, 64], 64, 0), Choice::Wgmma(wgmma::NARROW));
    assert_eq!(chosen(h200, DType::Bf16, [4096, 512, 64], 64, 0), Choice::Wgmma(wgmma::SMALL));
    assert_eq!(chosen(h200, DType::Bf16, [4096, 7168, 64], 64, 0), Choice::Wgmma(wgmma::LARGE));
    // Rows of A that begin at no 16 bytes: by their stride, by where the first begins.
    assert_eq!(chosen(h200, DType::Bf16, [64, 64, 64], 68, 0), Choice::Mma(mma::SMALL));
    assert_eq!(chosen(h200, DType::Bf16, [64, 64, 64], 64, 4), Choice::Mma(mma::SMALL));
    assert_eq!(chosen(h200, DType::Bf16, [64, 64, 64], 72, 8), Choice::Wgmma(wgmma::NARROW));
    assert_eq!(chosen(h200, DType::Bf16, [64, 64, 60], 64, 0), Choice::Mma(mma::SMALL));
}

/// The first rows of a product, as bits, of so many.
fn first_rows(on: Target, dtype: DType, rows: usize) -> Vec<f32> {
    let (n, k) = (72, 200);
    let memory = Memory::new(Device::Cpu);
    let put = |dims: &[usize], seed| {
        let values = random(dims.iter().product(), seed);
        match dtype {
            DType::Bf16 => memory.from_slice(dims, &values.into_iter().map(bf16::from_f64).collect::<Vec<_>>()),
            _ => memory.from_slice(dims, &values.into_iter().map(|x| x as f32).collect::<Vec<_>>()),
        }
    };
    let (x, w, y) = (put(&[rows, k], 1), put(&[n, k], 2), memory.alloc(DType::F32, &[rows, n]));
    testing::run(&memory, 1, &forward(on, x, w, None, y)).unwrap();
    memory.download::<f32>(y)[..3 * n].to_vec()
}

#[test]
fn a_row_has_the_same_bits_beside_any_other_rows() {
    for (on, dtype) in [(AMPERE, DType::F32), (AMPERE, DType::Bf16), (HOPPER, DType::Bf16)] {
        let alone = first_rows(on, dtype, 3);
        assert!([64, 65, 150].into_iter().all(|rows| first_rows(on, dtype, rows) == alone), "{on:?} {dtype:?}");
    }
}
