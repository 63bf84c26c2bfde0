//! Texts that are not understood say where and why.

#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "each test uses a part")]
mod common;

use common::snippet::fault;
use ptxsim::{Module, TensorMapInfo};

#[test]
fn errors_name_place_and_wish() {
    for (body, parts) in [
        ("add.u33 %r3, %r1, 1;", &["expected a type", "add.u33", "column"][..]),
        ("add.u32.fast %r3, %r1, 1;", &["modifier `.fast` is not known"]),
        ("add.u32 %r3, %r1;", &["expected 3 operands, found 2"]),
        ("add.u64 %r3, %r1, %r1;", &["expected a register of 64 bits, found `%r3` of 32"]),
        ("add.u32 %q, %r1, 1;", &["register `%q` is not declared"]),
        ("bra nowhere;", &["label `nowhere` is nowhere"]),
        ("frobnicate.b32 %r3, %r1;", &["frobnicate"]),
        ("cvt.f32.f64 %f1, %fd1;", &["expected a rounding mode"]),
        ("cvt.s32.f32 %r3, %f1;", &["expected .rni"]),
        ("div.f32 %f1, %f1, %f1;", &["expected .rn or .approx"]),
        ("ld.global.u32 %r3, %rd1;", &["expected `[address]` as operand 2"]),
        ("ld.global.v2.u32 %r3, [%rd1];", &["expected 2 destinations, found 1"]),
        ("shfl.bfly.b32 %r3, %r1, 1, 31, -1;", &["expected .sync"]),
        ("mov.u32 %r3 %r1;", &["expected `,` or `;`, found `%r1`"]),
        ("wgmma.mma_async.sync.aligned.m64n12k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, 1, 1, 1, 0, 0;", &["m64n8k16"]),
        ("setp.lo.s32.foo %p1, %r1, 0;", &["modifier `.foo` is not known"]),
    ] {
        let e = fault(body);
        assert!(e.starts_with("line "), "{body}: {e}");
        for p in parts {
            assert!(e.contains(p), "{body}: {e} lacks {p}");
        }
    }
}

#[test]
fn broken_texts_are_errors() {
    let whole = include_str!("kernels/tile_bf16.ptx");
    assert!(Module::parse("").unwrap_err().contains("expected an entry"));
    // Cut anywhere, it is an error or another kernel, never a panic.
    for end in (0..whole.len()).step_by(97) {
        let _ = Module::parse(&whole[..end]);
    }
    let module = Module::parse(whole).unwrap();
    assert_eq!(module.name(), "tile_bf16_64x128x64");
    assert_eq!(module.param_sizes(), [128, 128, 8, 4]);
}

#[test]
fn maps_that_the_driver_refuses() {
    let good = TensorMapInfo {
        address: 0x7f00_0000_0100,
        elem_bytes: 2,
        dims: vec![64, 100],
        strides: vec![128],
        box_dims: vec![64, 64],
        swizzle: 128,
    };
    assert!(good.encode().is_ok());
    let refused = |change: &dyn Fn(&mut TensorMapInfo)| {
        let mut map = good.clone();
        change(&mut map);
        map.encode().unwrap_err()
    };
    assert!(refused(&|m| m.address += 8).contains("address"));
    assert!(refused(&|m| m.strides[0] = 120).contains("strides"));
    assert!(refused(&|m| m.dims.clear()).contains("axes"));
    assert!(refused(&|m| m.strides.clear()).contains("stride of each axis"));
    assert!(refused(&|m| m.box_dims[0] = 128).contains("swizzle"));
    assert!(refused(&|m| m.box_dims[1] = 257).contains("box"));
    assert!(refused(&|m| m.swizzle = 16).contains("swizzle"));
}
