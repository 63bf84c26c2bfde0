//! Costs against the formulas of the textbook, as recorded by launching the ops.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;
use crate::{
    device::Device,
    dtype::DType,
    fp8::{Blocks, Scaling, Tiles},
    memory::Memory,
    ops::{
        attention, cross_entropy, fp8_gemm, fp8_grouped_gemm, gemm, gemv, grouped_gemm, mla::latent, permute, quantize,
        rms_norm, swiglu,
    },
    stream::Stream,
    tensor::Tensor,
};

/// The cost of what `launch` launches, in bf16 on shapes alone.
fn recorded(launch: impl FnOnce(&mut Stream, &dyn Fn(&[usize]) -> Tensor)) -> Cost {
    let memory = Memory::new(Device::Meta);
    let mut stream = Stream::new("meta", &memory, &Default::default()).unwrap();
    stream.start_recording();
    launch(&mut stream, &|shape| memory.alloc(DType::Bf16, shape));
    stream.finish_recording().cost
}

#[test]
fn each_pass_of_a_linear_layer_is_one_product() {
    let (t, o, i) = (64, 48, 32);
    let forward = recorded(|s, x| gemm::forward(s, x(&[t, i]), x(&[o, i]), None, x(&[t, o])).unwrap());
    let input_grad = recorded(|s, x| gemm::input_grad(s, x(&[t, o]), x(&[o, i]), x(&[t, i]), false).unwrap());
    let weight_grad = recorded(|s, x| gemm::weight_grad(s, x(&[t, o]), x(&[t, i]), x(&[o, i]), None).unwrap());
    let (x, y, w) = ((t * i) as u64, (t * o) as u64, (o * i) as u64);
    for (pass, cost, read, written, cast) in [
        ("F", forward, x + w, y, x),
        ("I", input_grad, y + w, x, y),
        // Adds to what is there, so that it reads it as well.
        ("W", weight_grad, x + y + w, w, x + y),
    ] {
        let product_flops = 2 * (t * o * i) as u64;
        let (read_bytes, written_bytes) = (2 * read, 2 * written);
        let want = Cost { product_flops, read_bytes, written_bytes, cast_elements: cast, ..Cost::default() };
        assert_eq!(cost, want, "{pass}");
        assert_eq!(cost.flops(), product_flops, "{pass}");
    }
}

#[test]
fn a_residual_is_read_once_and_nothing_more_is_written() {
    let (t, d, k, f) = (24, 16, 2, 40);
    let td = (2 * t * d) as u64;
    let bytes = |cost: Cost| (cost.read_bytes, cost.written_bytes, cost.streamed_bytes);
    let linear = |s: &mut Stream, x: &dyn Fn(&[usize]) -> Tensor, onto: bool| {
        let (a, w, y) = (x(&[t, f]), x(&[d, f]), x(&[t, d]));
        if onto { gemm::forward_onto(s, a, w, x(&[t, d]), y) } else { gemm::forward(s, a, w, None, y) }.unwrap();
    };
    let combine = |s: &mut Stream, x: &dyn Fn(&[usize]) -> Tensor, onto: bool| {
        let [offsets, row_of_slot, token_of_row] = [5, t * k, t * k].map(|n| s.memory().alloc(DType::U32, &[n]));
        let (order, weights) =
            (permute::Order { offsets, row_of_slot, token_of_row }, s.memory().alloc(DType::F32, &[t, k]));
        permute::combine(s, x(&[t * k, d]), weights, order, onto.then(|| x(&[t, d])), x(&[t, d])).unwrap();
    };
    let norm = |s: &mut Stream, x: &dyn Fn(&[usize]) -> Tensor, onto: bool| {
        let residual = onto.then(|| x(&[t, d]));
        rms_norm::input_grad(s, x(&[t, d]), x(&[d]), x(&[t]), x(&[t, d]), residual, x(&[t, d])).unwrap();
    };
    type Op<'a> = &'a dyn Fn(&mut Stream, &dyn Fn(&[usize]) -> Tensor, bool);
    for (op, of, is_streamed) in [("linear", &linear as Op, false), ("combine", &combine, true), ("norm", &norm, true)]
    {
        let [plain, onto] = [false, true].map(|onto| bytes(recorded(|s, x| of(s, x, onto))));
        let streamed = if is_streamed { td } else { 0 };
        assert_eq!(onto, (plain.0 + td, plain.1, plain.2 + streamed), "{op}");
        assert_eq!(plain.1, td, "{op}");
    }
}

#[test]
fn a_grouped_layer_is_a_product_over_all_rows_and_the_weights_of_all() {
    let (n, e, o, i) = (96, 4, 16, 8);
    let plain = [gemm::forward_cost, gemm::input_grad_cost, gemm::weight_grad_cost].map(|cost| cost(n, o, i, 2));
    let grouped = [grouped_gemm::forward_cost, grouped_gemm::input_grad_cost, grouped_gemm::weight_grad_cost];
    let weights = ((e - 1) * o * i * 2) as u64;
    for (pass, (grouped, plain)) in grouped.map(|cost| cost(n, e, o, i, 2)).into_iter().zip(plain).enumerate() {
        let written_bytes = plain.written_bytes + if pass == 2 { weights } else { 0 };
        assert_eq!(grouped, Cost { read_bytes: plain.read_bytes + weights, written_bytes, ..plain }, "pass {pass}");
    }
}

#[test]
fn in_fp8_a_product_moves_a_byte_a_number_and_four_for_each_128() {
    let (t, o, i) = (64, 256, 384);
    let memory = Memory::new(Device::Meta);
    let (x, dyt, xt) = (Tiles::alloc(&memory, t, i), Tiles::alloc(&memory, o, t), Tiles::alloc(&memory, i, t));
    let w = Blocks::alloc(&memory, &[o, i]);
    let forward = recorded(|s, y| fp8_gemm::product(s, x, w, None, y(&[t, o])).unwrap());
    let added = recorded(|s, y| {
        let y = y(&[t, o]);
        fp8_gemm::product(s, x, w, Some(y), y).unwrap();
    });
    let dw = memory.alloc(DType::F32, &[o, i]);
    let weight_grad = recorded(|s, _| fp8_gemm::weight_grad(s, dyt, xt, dw).unwrap());
    let flops = 2 * (t * o * i) as u64;
    let want = |read: usize, written: usize| Cost {
        product_flops: flops,
        read_bytes: read as u64,
        written_bytes: written as u64,
        ..Cost::default()
    };
    let (x_bytes, w_bytes) = (t * i + 4 * t * 3, o * i + 4 * 2 * 3);
    assert_eq!(forward, want(x_bytes + w_bytes, 2 * t * o));
    assert_eq!(added, want(x_bytes + w_bytes + 2 * t * o, 2 * t * o));
    assert_eq!(weight_grad, want((o + i) * (t + 4) + 4 * o * i, 4 * o * i));
    let e = 5;
    let grouped = fp8_grouped_gemm::product_cost(t, e, o, i, 2);
    assert_eq!(grouped, want(x_bytes + e * w_bytes, 2 * t * o));
}

#[test]
fn quantizers_are_streams() {
    let (t, i) = (64, 384);
    let memory = Memory::new(Device::Meta);
    let (q, qt) = (Tiles::alloc(&memory, t, i), Tiles::alloc(&memory, i, t));
    let (b, bt) = (Blocks::alloc(&memory, &[t, i]), Blocks::alloc(&memory, &[i, t]));
    let real = Scaling::Real;
    let (codes, wide) = ((t * i) as u64, (2 * t * i) as u64);
    let (by_row, by_column) = (codes + 4 * t as u64 * 3, codes + 4 * i as u64);
    for (cost, read, written) in [
        (recorded(|s, x| quantize::tiles(s, x(&[t, i]), q, real).unwrap()), wide, by_row),
        (recorded(|s, x| quantize::columns(s, x(&[t, i]), None, qt, real).unwrap()), wide, by_column),
        (recorded(|s, _| quantize::retile(s, q, None, qt, real).unwrap()), by_row, by_column),
        (recorded(|s, x| quantize::blocks(s, x(&[t, i]), b, Some(bt), real).unwrap()), wide, 2 * (codes + 12)),
        (recorded(|s, h| swiglu::forward_tiles(s, h(&[t, 2 * i]), q, real).unwrap()), 2 * wide, by_row),
    ] {
        assert_eq!((cost.read_bytes, cost.written_bytes, cost.streamed_bytes), (read, written, read + written));
        assert_eq!(cost.flops(), cost.vector_flops);
    }
}

#[test]
fn core_attention_is_half_a_square_and_its_gradient_five_products() {
    let (t, h) = (4096u64, 128u64);
    let pairs = attention::causal_pairs(t);
    for (d, v, gradient_share) in [(128u64, 128u64, 2.5), (192, 128, 832.0 / 320.0)] {
        let sizes = [h, h, d, v].map(|size| size as usize);
        let forward = attention::cost(t as usize, pairs, sizes, 2);
        let backward = attention::input_grad_cost(t as usize, pairs, sizes, 2);
        let want = (2 * h * (d + v) * t * t / 2) as f64;
        let ratio = forward.core_flops as f64 / want;
        assert!((ratio - 1.0).abs() < 2.0 / t as f64, "{d} {v}: {ratio}");
        assert_eq!((forward.flops(), backward.flops()), (forward.core_flops, backward.core_grad_flops));
        assert_eq!(backward.core_grad_flops as f64 / forward.core_flops as f64, gradient_share);
    }
}

#[test]
fn generation_costs_what_its_products_cost() {
    let (n, o, i) = (1, 24, 40);
    assert_eq!(gemv::cost(n, o, i, 4, 2).product_flops, gemm::forward_cost(n, o, i, 4).product_flops);
    // One token after 99 others: 100 pairs of the latent's width, and both halves of the up-projection.
    let [h, nope, r, v, c] = [4, 8, 2, 8, 16];
    let cost = latent::cost(1, 99, [h, nope, r, v, c], 4, 4);
    assert_eq!(cost.core_flops, (2 * 100 * h * (c + r + c)) as u64);
    assert_eq!(cost.product_flops, (2 * h * (nope + v) * c) as u64);
}

#[test]
fn the_head_has_a_product_for_each_thing_asked_for() {
    let (t, v, d) = (8, 32, 4);
    let run = |dh: bool, dw: bool| {
        recorded(|s, x| {
            let passes = cross_entropy::Passes { nll: None, dh: dh.then(|| x(&[t, d])), dw: dw.then(|| x(&[v, d])) };
            let targets = s.memory().alloc(DType::U32, &[t]);
            cross_entropy::run(s, x(&[t, d]), x(&[v, d]), targets, 1.0, passes).unwrap();
        })
    };
    let one = (2 * t * v * d) as u64;
    for (dh, dw, num_products) in [(false, false, 1), (true, false, 2), (true, true, 3)] {
        assert_eq!(run(dh, dw).product_flops, num_products * one);
    }
}

#[test]
fn every_field_is_added_and_has_its_name() {
    let mut cost = Cost::default();
    for (i, (name, _)) in Cost::default().fields().into_iter().enumerate() {
        *cost.field_mut(name).unwrap() = 1 << i;
    }
    assert_eq!(cost.field_mut("flops"), None);
    assert_eq!(cost.fields().map(|(_, value)| value), std::array::from_fn(|i| 1 << i));
    let sum: Cost = [cost, cost].into_iter().sum();
    assert_eq!(sum.fields().map(|(_, value)| value), std::array::from_fn(|i| 2 << i));
}
