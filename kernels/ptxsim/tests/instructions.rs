//! What scalar instructions compute.

#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "each test uses a part")]
mod common;

use common::snippet::{run, value};

fn check(cases: &[(&str, u32)]) {
    for (body, want) in cases {
        let got = value(body);
        assert_eq!(got, *want, "{body}: {got:#x}, not {want:#x}");
    }
}

#[test]
fn integers() {
    check(&[
        ("mov.u32 %r10, 0x80000000; add.u32 %r3, %r10, %r10;", 0),
        ("mov.s32 %r10, -7; div.s32 %r3, %r10, 2;", -3i32 as u32),
        ("mov.s32 %r10, -7; rem.s32 %r3, %r10, 2;", -1i32 as u32),
        ("mov.u32 %r10, 0xffffffff; mul.hi.u32 %r3, %r10, %r10;", 0xffff_fffe),
        ("mov.s32 %r10, -1; mul.hi.s32 %r3, %r10, %r10;", 0),
        (
            "mov.s32 %r10, -2; mul.wide.s32 %rd10, %r10, 3; shr.s64 %rd10, %rd10, 1; cvt.u32.u64 %r3, %rd10;",
            -3i32 as u32,
        ),
        ("mov.s32 %r10, -5; min.s32 %r3, %r10, 3;", -5i32 as u32),
        ("mov.s32 %r10, -5; min.u32 %r3, %r10, 3;", 3),
        ("mov.s32 %r10, -5; abs.s32 %r3, %r10;", 5),
        ("mov.u32 %r10, 1; shl.b32 %r3, %r10, 32;", 0),
        ("mov.s32 %r10, -8; shr.s32 %r3, %r10, 40;", 0xffff_ffff),
        ("mov.u32 %r10, 0x12345678; mov.u32 %r11, 0x9abcdef0; shf.l.wrap.b32 %r3, %r10, %r11, 8;", 0xbcde_f012),
        ("mov.u32 %r10, 0x12345678; mov.u32 %r11, 0x9abcdef0; shf.r.wrap.b32 %r3, %r10, %r11, 8;", 0xf012_3456),
        ("mov.u32 %r10, 0x12345678; mov.u32 %r11, 0x9abcdef0; prmt.b32 %r3, %r10, %r11, 0x7410;", 0x9af0_5678),
        ("mov.u32 %r10, 0x80; prmt.b32 %r3, %r10, 0, 0x0008;", 0x8080_80ff),
        ("mov.u32 %r10, 0xf0f0; popc.b32 %r3, %r10;", 8),
        ("mov.u32 %r10, 0x00800000; clz.b32 %r3, %r10;", 8),
        ("mov.u32 %r10, 0x00800000; bfind.u32 %r3, %r10;", 23),
        ("mov.u32 %r10, 1; brev.b32 %r3, %r10;", 0x8000_0000),
        ("mov.u32 %r10, 0xabcd; bfe.u32 %r3, %r10, 4, 8;", 0xbc),
        ("mov.u32 %r10, 0xabcd; bfe.s32 %r3, %r10, 4, 8;", 0xffff_ffbc),
        ("mov.u32 %r10, 0xff; mov.u32 %r11, 0; bfi.b32 %r3, %r10, %r11, 8, 4;", 0xf00),
        ("mov.u32 %r10, 0xf0; mov.u32 %r11, 0xcc; mov.u32 %r12, 0xaa; lop3.b32 %r3, %r10, %r11, %r12, 0x96;", 0x96),
        ("mov.u32 %r10, 5; setp.gt.u32 %p1, %r10, 3; selp.b32 %r3, 1, 2, %p1;", 1),
        ("mov.u32 %r10, 5; setp.gt.and.u32 %p1|%p2, %r10, 3, %p3; selp.b32 %r3, 1, 2, !%p2;", 1),
        ("mov.u32 %r10, 5; set.gt.u32.u32 %r3, %r10, 3;", 0xffff_ffff),
        ("mov.b32 %r10, 0x00050003; mov.b32 {%h1, %h2}, %r10; mov.b32 %r3, {%h2, %h1};", 0x0003_0005),
    ]);
}

#[test]
fn floats() {
    let f = |x: f32| x.to_bits();
    let nan = 0x7fff_ffff;
    check(&[
        ("mov.f32 %f1, 0f7FC00000; mov.f32 %f2, 0f3F800000; min.f32 %f3, %f1, %f2; mov.b32 %r3, %f3;", f(1.0)),
        ("mov.f32 %f1, 0f7FC00000; mov.f32 %f2, 0f3F800000; max.NaN.f32 %f3, %f1, %f2; mov.b32 %r3, %f3;", nan),
        ("mov.f32 %f1, 0f80000000; mov.f32 %f2, 0f00000000; min.f32 %f3, %f2, %f1; mov.b32 %r3, %f3;", 0x8000_0000),
        ("mov.f32 %f1, 0f00000001; add.f32 %f3, %f1, %f1; mov.b32 %r3, %f3;", 2),
        ("mov.f32 %f1, 0f00000001; add.ftz.f32 %f3, %f1, %f1; mov.b32 %r3, %f3;", 0),
        ("mov.f32 %f1, 0f80000001; mul.ftz.f32 %f3, %f1, 0f3F800000; mov.b32 %r3, %f3;", 0x8000_0000),
        ("mov.f32 %f1, 0f40000000; add.sat.f32 %f3, %f1, %f1; mov.b32 %r3, %f3;", f(1.0)),
        ("mov.f32 %f1, 0f3F800001; fma.rn.f32 %f3, %f1, %f1, 0fBF800002; mov.b32 %r3, %f3;", f(2f32.powi(-46))),
        ("mov.f32 %f1, 0f3F800000; div.rn.f32 %f3, %f1, 0f40400000; mov.b32 %r3, %f3;", f(1.0 / 3.0)),
        ("mov.f32 %f1, 0f40000000; sqrt.rn.f32 %f3, %f1; mov.b32 %r3, %f3;", f(2f32.sqrt())),
        ("mov.f32 %f1, 0f00000000; ex2.approx.ftz.f32 %f3, %f1; mov.b32 %r3, %f3;", f(1.0)),
        ("mov.f64 %fd1, 0d3FF0000000000001; cvt.rn.f32.f64 %f3, %fd1; mov.b32 %r3, %f3;", f(1.0)),
        ("mov.f64 %fd1, 0d3FF0000000000001; cvt.rp.f32.f64 %f3, %fd1; mov.b32 %r3, %f3;", f(1f32.next_up())),
        ("mov.f32 %f1, 0f7F800000; setp.lt.f32 %p1, %f1, %f1; selp.u32 %r3, 1, 0, %p1;", 0),
        ("mov.f32 %f1, 0f7FC00000; setp.ltu.f32 %p1, %f1, %f1; selp.u32 %r3, 1, 0, %p1;", 1),
        ("mov.f32 %f1, 0f7FC00000; setp.ne.f32 %p1, %f1, %f1; selp.u32 %r3, 1, 0, %p1;", 0),
        ("mov.f32 %f1, 0f7F800000; testp.finite.f32 %p1, %f1; selp.u32 %r3, 1, 0, %p1;", 0),
    ]);
}

#[test]
fn conversions() {
    check(&[
        // Ties to even, in both halves; the first source is the upper.
        ("mov.f32 %f1, 0f3F808000; mov.f32 %f2, 0f3F818000; cvt.rn.bf16x2.f32 %r3, %f1, %f2;", 0x3f80_3f82),
        ("mov.f32 %f1, 0f7FC00000; cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r3, %h1;", 0x7fff),
        ("mov.f32 %f1, 0f7F7FFFFF; cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r3, %h1;", 0x7f80),
        ("mov.f32 %f1, 0f7F7FFFFF; cvt.rz.bf16.f32 %h1, %f1; cvt.u32.u16 %r3, %h1;", 0x7f7f),
        ("mov.f32 %f1, 0f00008000; cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r3, %h1;", 0),
        ("mov.f32 %f1, 0f00018000; cvt.rn.bf16.f32 %h1, %f1; cvt.u32.u16 %r3, %h1;", 2),
        ("mov.f32 %f1, 0f477FE000; cvt.rn.f16.f32 %h1, %f1; cvt.u32.u16 %r3, %h1;", 0x7bff),
        ("mov.f32 %f1, 0f33800000; cvt.rn.f16.f32 %h1, %f1; cvt.u32.u16 %r3, %h1;", 1),
        (
            "mov.f32 %f1, 0f43E80000; mov.f32 %f2, 0fC47A0000; cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2; cvt.u32.u16 %r3, %h1;",
            0x7efe,
        ),
        ("mov.b16 %h1, 0x387f; cvt.rn.f16x2.e4m3x2 %r3, %h1;", 0x3c00_7fff),
        ("mov.f32 %f1, 0fC0200000; cvt.rni.s32.f32 %r3, %f1;", -2i32 as u32),
        ("mov.f32 %f1, 0fC0200000; cvt.rzi.s32.f32 %r3, %f1;", -2i32 as u32),
        ("mov.f32 %f1, 0fC0200000; cvt.rmi.s32.f32 %r3, %f1;", -3i32 as u32),
        ("mov.f32 %f1, 0fC0200000; cvt.rzi.u32.f32 %r3, %f1;", 0),
        ("mov.f32 %f1, 0f7FC00000; cvt.rzi.s32.f32 %r3, %f1;", 0),
        ("mov.f32 %f1, 0f7F800000; cvt.rzi.s32.f32 %r3, %f1;", i32::MAX as u32),
        ("mov.u32 %r10, 0x1000001; cvt.rn.f32.u32 %f1, %r10; mov.b32 %r3, %f1;", 16_777_216f32.to_bits()),
        ("mov.u32 %r10, 0x1000001; cvt.rp.f32.u32 %f1, %r10; mov.b32 %r3, %f1;", 16_777_218f32.to_bits()),
        ("mov.b16 %h1, 0xff80; cvt.s32.s16 %r3, %h1;", -128i32 as u32),
        ("mov.u32 %r10, 0x1ff; cvt.u8.u32 %r3, %r10;", 0xff),
        ("mov.u32 %r10, 0x1ff; cvt.sat.s8.u32 %r3, %r10;", 127),
        ("mov.f32 %f1, 0f40200000; cvt.rni.f32.f32 %f2, %f1; mov.b32 %r3, %f2;", 2f32.to_bits()),
    ]);
}

#[test]
fn halves() {
    check(&[
        ("mov.b32 %r10, 0x3f804000; mov.b32 %r11, 0x3f803f80; fma.rn.bf16x2 %r3, %r10, %r11, %r11;", 0x4000_4040),
        ("mov.b32 %r10, 0x3f804000; add.rn.bf16x2 %r3, %r10, %r10;", 0x4000_4080),
        ("mov.b16 %h1, 0x3c00; add.f16 %h2, %h1, %h1; cvt.u32.u16 %r3, %h2;", 0x4000),
        ("mov.b32 %r10, 0x3f80bf80; abs.bf16x2 %r3, %r10;", 0x3f80_3f80),
    ]);
}

#[test]
fn atomics_of_all_lanes_add_up() {
    let out = run("red.global.add.u32 [%rd1], 1;").unwrap();
    assert_eq!(out[0], 32);
    let out = run("atom.global.add.u32 %r3, [%rd1+128], 0; st.global.u32 [%rd0], %r3;").unwrap_err();
    assert!(out.contains("out of bounds"), "{out}");
    let out = run("mov.s32 %r10, -3; red.global.min.s32 [%rd1], %r10; red.global.max.u32 [%rd1+4], %r1;").unwrap();
    assert_eq!(out[..2], [-3i32 as u32, 31]);
    let out =
        run("atom.global.cas.b32 %r3, [%rd1], 0, 7; setp.eq.u32 %p1, %r3, 0; @%p1 red.global.add.u32 [%rd1+4], 1;");
    assert_eq!(out.unwrap()[..2], [7, 1]);
    let out = run("mov.b32 %r10, 0x3f803f80; red.global.add.noftz.bf16x2 [%rd1], %r10;").unwrap();
    assert_eq!(out[0], 0x4200_4200);
}

#[test]
fn vectors_and_small_types_in_memory() {
    let out = run("setp.ne.u32 %p1, %r1, 0; @%p1 ret; mov.u32 %r10, 0x80; st.global.v4.b32 [%rd1], {%r10, 2, 3, 4};\
                   ld.global.s8 %r11, [%rd1]; ld.global.v2.u16 {%h1, %h2}, [%rd1+4]; cvt.u32.u16 %r12, %h1;\
                   st.global.v2.u32 [%rd1+16], {%r11, %r12}; mov.b64 %rd10, {%r12, %r11}; st.global.b64 [%rd1+24], %rd10;")
    .unwrap();
    assert_eq!(out[..8], [0x80, 2, 3, 4, 0xffff_ff80, 2, 2, 0xffff_ff80]);
}
