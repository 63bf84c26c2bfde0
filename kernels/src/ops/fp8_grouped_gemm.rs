//! [`crate::ops::fp8_gemm`] for experts, each over its own rows, as in [`crate::ops::grouped_gemm`].
//!
//! Rows are sorted by expert; expert e has rows `offsets[e]..offsets[e + 1]`, and offsets may end before the rows do. Columns, in
//! which tokens are summed over, are those of [`crate::ops::quantize::columns`]: each expert's begin at a multiple of 128.

use half::bf16;

use crate::{
    cost::Cost,
    device::Target,
    dtype::{DType, Float},
    error::Result,
    fp8::{Blocks, TILE, Tiles},
    memory::Memory,
    ops::{
        expect::{expect_blocks, expect_tensor, expect_tiles},
        fp8_gemm::{self, Panels, expect_result, promoted, store},
        grouped_gemm::{
            Sizes,
            tasks::{self, Task, run, split},
        },
        quantize::{blocks_bytes, groups, tiles_bytes},
    },
    ptx::{self, grouped_gemm::Rows},
    stream::Stream,
    tensor::Tensor,
};

/// `y = a b_e^T` per expert, promoted every 128 of k, with `a` [n, k], offsets U32 \[e + 1\], `b` [e, m, k] and `y` [n, m] in Bf16 or
/// F32. Rows past the last expert's stay as they are.
///
/// # Errors
/// Tensors of other shapes or types.
pub fn product(s: &mut Stream, a: Tiles, offsets: Tensor, b: Blocks, y: Tensor) -> Result<()> {
    const OP: &str = "grouped FP8 product";
    let (n, k, e, o) = (a.codes.rows(), a.codes.cols(), b.codes.dim(0), b.codes.dim(1));
    expect_tiles(OP, "a", a, n, k)?;
    expect_tensor(OP, "offsets", offsets, DType::U32, &[e + 1])?;
    expect_blocks(OP, "b", b, &[e, o, k])?;
    expect_result(OP, y, &[n, o])?;
    s.account(product_cost(n, e, o, k, y.dtype.size_bytes()));
    let reads = [&a.tensors()[..], &b.tensors(), &[offsets]].concat();
    let z = Sizes { n, e, o, i: k, by_row: false };
    let kernels = |on: &Target| Some(ptx::fp8_grouped_gemm::product(on.into(), a, Rows::Offsets(offsets), b, y));
    s.launch_kernel(&reads, &[y], kernels, move |m| match y.dtype {
        DType::Bf16 => all_products::<bf16>(m, a, offsets, b, y, z),
        _ => all_products::<f32>(m, a, offsets, b, y, z),
    });
    Ok(())
}

fn all_products<T: Float<Acc = f32>>(m: &Memory, a: Tiles, offsets: Tensor, b: Blocks, y: Tensor, z: Sizes) {
    let (codes, scales) = (m.read::<u8>(a.codes), m.read::<f32>(a.scales));
    let (w, w_scales, mut y) = (m.read::<u8>(b.codes), m.read::<f32>(b.scales), m.write::<T>(y));
    let (weight, of_weight) = (z.o * z.i, z.o.div_ceil(TILE) * z.i.div_ceil(TILE));
    let tasks = tasks::by_rows(&m.read::<u32>(offsets), z);
    let outs = split(&tasks, &mut y, z.o, |task| task.rows.clone());
    run(tasks, outs, z.i, |task, y| {
        let a = Panels::of_tiles((&codes, z.i), (&scales, a.scales.dim(1)), task.rows.clone(), 0..z.i);
        let (w, w_scales) = (&w[task.expert * weight..][..weight], &w_scales[task.expert * of_weight..][..of_weight]);
        store(&promoted(&a, &Panels::of_blocks(w, w_scales, z.o, z.i)), y, false);
    });
}

/// `dw_e += dyt_e xt_e^T` per expert, promoted every 128 tokens, with `dyt` [o, p], `xt` [i, p], offsets U32 \[e + 1\] of the rows that
/// the columns were made from, and `dw` F32 [e, o, i]. Experts without rows leave theirs untouched.
///
/// # Errors
/// Tensors of other shapes or types.
pub fn weight_grad(s: &mut Stream, dyt: Tiles, xt: Tiles, offsets: Tensor, dw: Tensor) -> Result<()> {
    const OP: &str = "grouped FP8 weight gradient";
    let (e, o, i, p) = (dw.dim(0), dw.dim(1), dw.dim(2), dyt.codes.cols());
    expect_tiles(OP, "dyt", dyt, o, p)?;
    expect_tiles(OP, "xt", xt, i, p)?;
    expect_tensor(OP, "offsets", offsets, DType::U32, &[e + 1])?;
    expect_tensor(OP, "dw", dw, DType::F32, &[e, o, i])?;
    s.account(weight_grad_cost(p, e, o, i));
    let reads = [&dyt.tensors()[..], &xt.tensors(), &[offsets, dw]].concat();
    let kernels = |on: &Target| Some(ptx::fp8_grouped_gemm::weight_grad(on.into(), dyt, xt, offsets, dw));
    s.launch_kernel(&reads, &[dw], kernels, move |m| {
        let (codes, scales) = (m.read::<u8>(dyt.codes), m.read::<f32>(dyt.scales));
        let (x_codes, x_scales) = (m.read::<u8>(xt.codes), m.read::<f32>(xt.scales));
        let (mut dw, offsets) = (m.write::<f32>(dw), m.read::<u32>(offsets));
        let groups = groups(&offsets, p);
        let tasks = tasks::by_outputs(&offsets, Sizes { n: p, e, o, i, by_row: false });
        let place = |task: &Task| task.expert * o + task.outputs.start..task.expert * o + task.outputs.end;
        let outs = split(&tasks, &mut dw, i, place);
        run(tasks, outs, i, |task, dw| {
            let group = &groups[task.expert];
            // Past these are codes 0 only.
            let columns = group.start..group.start + group.rows.len();
            let dy = (task.outputs.clone(), columns.clone());
            let dy = Panels::of_tiles((&codes, p), (&scales, dyt.scales.dim(1)), dy.0, dy.1);
            let x = Panels::of_tiles((&x_codes, p), (&x_scales, xt.scales.dim(1)), 0..i, columns);
            store(&promoted(&dy, &x), dw, true);
        });
    });
    Ok(())
}

/// Cost of [`product`] over n rows, with e experts that all have some.
pub fn product_cost(n: usize, e: usize, o: usize, k: usize, elem_bytes: usize) -> Cost {
    let one = fp8_gemm::product_cost(n, o, k, elem_bytes, false);
    Cost { read_bytes: one.read_bytes + blocks_bytes(&[e, o, k]) - blocks_bytes(&[o, k]), ..one }
}

/// Cost of [`weight_grad`] over p columns, with e experts that all have some: each reads and writes its gradient.
pub fn weight_grad_cost(p: usize, e: usize, o: usize, i: usize) -> Cost {
    let result = (4 * e * o * i) as u64;
    Cost {
        product_flops: 2 * (p * o * i) as u64,
        read_bytes: tiles_bytes(o, p) + tiles_bytes(i, p) + result,
        written_bytes: result,
        ..Cost::default()
    }
}

#[cfg(test)]
mod tests;
