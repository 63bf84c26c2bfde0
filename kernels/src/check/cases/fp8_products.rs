//! Products of FP8 codes: dense, of experts, and their weight gradients.

use super::{
    Fill::{self, Poison, Positive, Random},
    List, Sizes, chosen, t, u32s,
};
use crate::{
    check::Tolerance,
    dtype::DType::{self, Bf16, F32, U8},
    fp8::{Blocks, TILE, Tiles, padded},
    ops::{fp8_gemm, fp8_grouped_gemm},
};

type Given = (DType, Vec<usize>, Fill);

/// Codes [rows, cols] that are numbers, 0 where a column is not `inside`.
fn codes(dims: &[usize], inside: impl Fn(usize) -> bool) -> Given {
    let cols = dims[dims.len() - 1].max(1);
    // 127 of every 128 codes are numbers.
    let code = |i: usize| ((i * 37 + i / 251) % 127 + i / 127 % 2 * 128) as f64;
    let values = (0..dims.iter().product()).map(|i| if inside(i % cols) { code(i) } else { 0.0 });
    t(U8, dims, Fill::Values(values.collect()))
}

fn tiles(rows: usize, cols: usize, inside: impl Fn(usize) -> bool) -> [Given; 2] {
    [codes(&[rows, cols], inside), t(F32, &Tiles::scale_shape(rows, cols), Positive)]
}

fn blocks(dims: &[usize]) -> [Given; 2] {
    [codes(dims, |_| true), t(F32, &Blocks::scale_shape(dims), Positive)]
}

/// Where each expert's rows begin.
fn offsets(z: Sizes) -> Vec<u32> {
    let chosen = chosen(z);
    (0..=z.e).map(|e| chosen.iter().filter(|&&to| (to as usize) < e).count() as u32).collect()
}

pub(super) fn add(list: &mut List, z: Sizes) {
    let (i, o, e, n) = (z.d, z.f, z.e, z.t * z.k);
    let wide = Tolerance::product(F32);
    for dtype in [F32, Bf16] {
        let near = Tolerance::product(dtype);
        // Onto nothing, and onto another matrix.
        for onto in [false, true] {
            let matrices = [Poison, Random].map(|fill| t(dtype, &[z.t, o], fill));
            let tensors = [&tiles(z.t, i, |_| true)[..], &blocks(&[o, i]), &matrices].concat();
            let shape = format!("[{}, {i}] x [{o}, {i}]", z.t);
            list.add(("fp8_gemm::product", dtype, near), shape, tensors, move |s, x| {
                let (a, b) = (Tiles { codes: x[0], scales: x[1] }, Blocks { codes: x[2], scales: x[3] });
                fp8_gemm::product(s, a, b, onto.then_some(x[5]), x[4])
            });
        }
        let more = [u32s(offsets(z)), t(dtype, &[n, o], Poison)];
        let tensors = [&tiles(n, i, |_| true)[..], &blocks(&[e, o, i]), &more].concat();
        let shape = format!("[{n}, {i}] x {e} of [{o}, {i}]");
        list.add(("fp8_grouped_gemm::product", dtype, near), shape, tensors, |s, x| {
            let (a, b) = (Tiles { codes: x[0], scales: x[1] }, Blocks { codes: x[2], scales: x[3] });
            fp8_grouped_gemm::product(s, a, x[4], b, x[5])
        });
    }
    let both = |x: &[crate::tensor::Tensor]| (Tiles { codes: x[0], scales: x[1] }, Tiles { codes: x[2], scales: x[3] });
    let all = |_: usize| true;
    let tensors = [&tiles(o, z.t, all)[..], &tiles(i, z.t, all), &[t(F32, &[o, i], Random)]].concat();
    let shape = format!("[{o}, {}] x [{i}, {}]", z.t, z.t);
    list.add(("fp8_gemm::weight_grad", F32, wide), shape, tensors, move |s, x| {
        let (dyt, xt) = both(x);
        fp8_gemm::weight_grad(s, dyt, xt, x[4])
    });
    let (columns, rows) = (padded(n, e), offsets(z));
    let mut used = vec![false; columns];
    let mut begin = 0;
    for count in rows.windows(2).map(|w| (w[1] - w[0]) as usize) {
        used[begin..begin + count].fill(true);
        begin += count.next_multiple_of(TILE);
    }
    let inside = |column: usize| used[column];
    let more = [u32s(rows), t(F32, &[e, o, i], Random)];
    let tensors = [&tiles(o, columns, inside)[..], &tiles(i, columns, inside), &more].concat();
    let shape = format!("[{o}, {columns}] x [{i}, {columns}] of {e}");
    list.add(("fp8_grouped_gemm::weight_grad", F32, wide), shape, tensors, move |s, x| {
        let (dyt, xt) = both(x);
        fp8_grouped_gemm::weight_grad(s, dyt, xt, x[4], x[5])
    });
}
