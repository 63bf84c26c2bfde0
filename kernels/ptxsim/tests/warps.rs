//! Lanes together: shuffles, votes, divergence, barriers; and the races when a barrier is missing.

#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "each test uses a part")]
mod common;

use common::snippet::{Snippet, fault, run};

fn lanes(body: &str) -> Vec<u32> {
    run(&format!("{body}\nst.global.b32 [%rd0], %r3;")).unwrap()
}

#[test]
fn shuffles() {
    let all = |f: &dyn Fn(u32) -> u32| (0..32).map(f).collect::<Vec<_>>();
    assert_eq!(lanes("shfl.sync.bfly.b32 %r3, %r1, 16, 31, -1;"), all(&|l| l ^ 16));
    assert_eq!(lanes("shfl.sync.idx.b32 %r3, %r1, 5, 31, -1;"), all(&|_| 5));
    assert_eq!(lanes("shfl.sync.down.b32 %r3, %r1, 4, 31, -1;"), all(&|l| if l + 4 < 32 { l + 4 } else { l }));
    assert_eq!(lanes("shfl.sync.up.b32 %r3, %r1, 4, 0, -1;"), all(&|l| if l >= 4 { l - 4 } else { l }));
    // Segments of 8: the upper bits of c are the segment mask.
    assert_eq!(lanes("shfl.sync.idx.b32 %r3, %r1, 1, 0x181f, -1;"), all(&|l| l / 8 * 8 + 1));
    assert_eq!(
        lanes("shfl.sync.down.b32 %r10|%p1, %r1, 4, 0x181f, -1; selp.u32 %r3, 1, 0, %p1;"),
        all(&|l| u32::from(l % 8 < 4))
    );
}

#[test]
fn votes_and_matches() {
    let all = |f: &dyn Fn(u32) -> u32| (0..32).map(f).collect::<Vec<_>>();
    assert_eq!(lanes("setp.lt.u32 %p1, %r1, 3; vote.sync.ballot.b32 %r3, %p1, -1;"), all(&|_| 7));
    assert_eq!(
        lanes("setp.lt.u32 %p1, %r1, 3; vote.sync.any.pred %p2, !%p1, -1; selp.u32 %r3, 1, 0, %p2;"),
        all(&|_| 1)
    );
    assert_eq!(lanes("shr.u32 %r10, %r1, 3; match.any.sync.b32 %r3, %r10, -1;"), all(&|l| 0xff << (l / 8 * 8)));
    assert_eq!(lanes("redux.sync.add.u32 %r3, %r1, -1;"), all(&|_| 496));
    assert_eq!(lanes("neg.s32 %r10, %r1; redux.sync.min.s32 %r3, %r10, -1;"), all(&|_| -31i32 as u32));
    let elected = lanes("elect.sync _|%p1, -1; selp.u32 %r3, 1, 0, %p1;");
    assert_eq!(elected.iter().sum::<u32>(), 1);
}

#[test]
fn groups_that_diverge_meet_again() {
    // Odd lanes loop; the shuffle of all lanes comes after.
    let body = "mov.u32 %r10, 0; and.b32 %r11, %r1, 1; setp.eq.u32 %p1, %r11, 0; @%p1 bra even;\n\
                again: add.u32 %r10, %r10, 1; setp.lt.u32 %p2, %r10, %r1; @%p2 bra again;\n\
                even: shfl.sync.bfly.b32 %r3, %r10, 1, 31, -1;";
    let want: Vec<u32> = (0..32).map(|l| if l % 2 == 0 { l + 1 } else { 0 }).collect();
    for seed in 1..9 {
        let body = format!("{body}\nst.global.b32 [%rd0], %r3;");
        assert_eq!(Snippet { body: &body, seed, ..Snippet::default() }.run().unwrap(), want);
    }
    // Subsets with masks of their own.
    let body = "and.b32 %r11, %r1, 16; setp.eq.u32 %p1, %r11, 0; @%p1 bra low;\n\
                shfl.sync.bfly.b32 %r3, %r1, 1, 31, 0xffff0000; bra end;\n\
                low: shfl.sync.bfly.b32 %r3, %r1, 2, 31, 0x0000ffff;\nend:";
    let want: Vec<u32> = (0..32).map(|l| if l < 16 { l ^ 2 } else { l ^ 1 }).collect();
    assert_eq!(lanes(body), want);
}

#[test]
fn collectives_that_lack_a_lane() {
    let e = fault("setp.eq.u32 %p1, %r1, 7; @%p1 ret; shfl.sync.idx.b32 %r3, %r1, 0, 31, -1;");
    assert!(e.contains("exited"), "{e}");
    let e = fault("setp.eq.u32 %p1, %r1, 7; @%p1 bra on; bar.warp.sync -1; on:");
    assert!(e.contains("exited") || e.contains("deadlock"), "{e}");
    let e = fault("setp.lt.u32 %p1, %r1, 16; @%p1 shfl.sync.idx.b32 %r3, %r1, 0, 31, 0xff00;");
    assert!(e.contains("own member mask"), "{e}");
    let e = fault("shfl.sync.idx.b32 %r3, %r1, 40, 31, 0xff; ");
    assert!(e.contains("member mask"), "{e}");
}

#[test]
fn barriers_of_a_block() {
    let reverse = "mul.lo.u32 %r10, %r0, 4; add.u32 %r10, %r10, %r2; st.shared.u32 [%r10], %r0;\n\
                   BAR\n\
                   sub.u32 %r11, 127, %r0; mul.lo.u32 %r11, %r11, 4; add.u32 %r11, %r11, %r2;\n\
                   ld.shared.u32 %r3, [%r11]; st.global.u32 [%rd0], %r3;";
    let block = 128;
    for seed in 1..6 {
        let body = reverse.replace("BAR", "bar.sync 0;");
        let out = Snippet { body: &body, block, seed, ..Snippet::default() }.run().unwrap();
        assert_eq!(out, (0..128).rev().collect::<Vec<u32>>());
        let body = reverse.replace("BAR", "");
        let e = Snippet { body: &body, block, seed, ..Snippet::default() }.run().unwrap_err();
        assert!(e.contains("races with a write") || e.contains("uninitialised"), "{e}");
        // Producers that go on, consumers that wait.
        let body = "setp.ge.u32 %p1, %r0, 64; @%p1 bra consume;\n\
                    mul.lo.u32 %r10, %r0, 4; add.u32 %r10, %r10, %r2; st.shared.u32 [%r10], %r0; bar.arrive 1, 128; ret;\n\
                    consume: bar.sync 1, 128; sub.u32 %r11, %r0, 64; mul.lo.u32 %r11, %r11, 4; add.u32 %r11, %r11, %r2;\n\
                    ld.shared.u32 %r3, [%r11]; st.global.u32 [%rd0], %r3;";
        let out = Snippet { body, block, seed, ..Snippet::default() }.run().unwrap();
        assert_eq!(out[64..], (0..64).collect::<Vec<u32>>()[..]);
        let body = "setp.lt.u32 %p1, %r0, 40; bar.red.popc.u32 %r3, 0, %p1; st.global.u32 [%rd0], %r3;";
        assert_eq!(Snippet { body, block, seed, ..Snippet::default() }.run().unwrap(), [40; 128]);
    }
    let e =
        Snippet { body: "setp.lt.u32 %p1, %r0, 32; @%p1 bar.sync 0;", block, ..Snippet::default() }.run().unwrap_err();
    assert!(e.contains("deadlock") && e.contains("barrier 0: 32 of 128"), "{e}");
}

#[test]
fn lanes_of_a_warp_race_too() {
    let swap = "mul.lo.u32 %r10, %r0, 4; add.u32 %r10, %r10, %r2; st.shared.u32 [%r10], %r0;\n\
                SYNC xor.b32 %r11, %r10, 4; ld.shared.u32 %r3, [%r11]; st.global.u32 [%rd0], %r3;";
    assert_eq!(run(&swap.replace("SYNC", "bar.warp.sync -1;")).unwrap()[..2], [1, 0]);
    let e = fault(&swap.replace("SYNC", ""));
    assert!(e.contains("no bar.warp.sync between"), "{e}");
    // Overwriting what another lane has read.
    let e = fault(
        "mul.lo.u32 %r10, %r0, 4; add.u32 %r10, %r10, %r2; st.shared.u32 [%r10], %r0; bar.warp.sync -1;\n\
                   xor.b32 %r11, %r10, 4; ld.shared.u32 %r3, [%r11]; st.shared.u32 [%r10], 99;",
    );
    assert!(e.contains("races with a read"), "{e}");
}

#[test]
fn blocks_of_a_grid_race() {
    let e = Snippet { body: "st.global.u32 [%rd1], %r4;", grid: 4, ..Snippet::default() }.run().unwrap_err();
    assert!(e.contains("races with a write by CTA"), "{e}");
    // The same value is no race, nor are atomics.
    Snippet { body: "st.global.u32 [%rd1], 5;", grid: 4, ..Snippet::default() }.run().unwrap();
    let out = Snippet { body: "red.global.add.u32 [%rd1], 1;", grid: 4, ..Snippet::default() }.run().unwrap();
    assert_eq!(out[0], 128);
    // Halves of a word are not the same bytes.
    let halves = "setp.ne.u32 %p1, %r0, 0; @%p1 ret; shl.b32 %r10, %r4, 1; cvt.u64.u32 %rd10, %r10; add.u64 %rd10, %rd10, %rd1;\n\
                  ld.global.u16 %h1, [%rd10]; cvt.u16.u32 %h1, %r10; st.global.u16 [%rd10], %h1;";
    let out = Snippet { body: halves, grid: 4, ..Snippet::default() }.run().unwrap();
    assert_eq!(out[..2], [0x0002_0000, 0x0006_0004]);
}

/// The last block to come adds up what all have written.
#[test]
fn blocks_may_hand_over_through_a_counter() {
    let text = "setp.ne.u32 %p1, %r0, 0; @%p1 ret; add.u32 %r10, %r4, 1;\n\
                mul.lo.u32 %r11, %r4, 4; cvt.u64.u32 %rd10, %r11; add.u64 %rd10, %rd10, %rd1; st.global.u32 [%rd10+128], %r10;\n\
                FENCE atom.global.add.u32 %r12, [%rd1], 1; setp.ne.u32 %p1, %r12, 7; @%p1 ret; FENCE\n\
                mov.u32 %r3, 0; mov.u32 %r13, 0; mov.u64 %rd11, %rd1;\n\
                again: ld.global.u32 %r14, [%rd11+128]; add.u32 %r3, %r3, %r14; add.u64 %rd11, %rd11, 4; add.u32 %r13, %r13, 1;\n\
                setp.lt.u32 %p1, %r13, 8; @%p1 bra again; st.global.u32 [%rd1+4], %r3;";
    for seed in 1..9 {
        let body = text.replace("FENCE", "fence.acq_rel.gpu;");
        let out = Snippet { body: &body, grid: 8, seed, ..Snippet::default() }.run().unwrap();
        assert_eq!(out[1], 36);
        let body = text.replace("FENCE", "");
        let e = Snippet { body: &body, grid: 8, seed, ..Snippet::default() }.run().unwrap_err();
        assert!(e.contains("races"), "{e}");
    }
}

/// Blocks that wait for each other are there together.
#[test]
fn blocks_may_wait_for_each_other() {
    let body = "setp.ne.u32 %p1, %r0, 0; @%p1 bra end; red.release.gpu.global.add.u32 [%rd1], 1;\n\
                wait: ld.acquire.gpu.global.u32 %r10, [%rd1]; setp.lt.u32 %p2, %r10, 100; @%p2 bra wait;\nend:";
    let out = Snippet { body, grid: 100, ..Snippet::default() }.run().unwrap();
    assert_eq!(out[0], 100);
    let never = body.replace("%r10, 100;", "%r10, 101;");
    let e = Snippet { body: &never, grid: 3, ..Snippet::default() }.run().unwrap_err();
    assert!(e.contains("deadlock") || e.contains("livelock"), "{e}");
}

#[test]
fn a_cluster_shares_its_memory() {
    let body = "mov.u32 %r10, %cluster_ctarank; add.u32 %r11, %r10, 70; st.shared.u32 [%r2], %r11;\n\
                barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;\n\
                xor.b32 %r12, %r10, 1; mapa.shared::cluster.u32 %r13, %r2, %r12; ld.shared::cluster.u32 %r3, [%r13];\n\
                st.global.u32 [%rd0], %r3; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;";
    let directives = ".explicitcluster\n.reqnctapercluster 2, 1, 1";
    for seed in 1..6 {
        let out = Snippet { body, directives, grid: 4, seed, ..Snippet::default() }.run().unwrap();
        assert_eq!([out[0], out[32], out[64], out[96]], [71, 70, 71, 70]);
    }
    let missing = body.replacen("barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;", "", 1);
    let e = Snippet { body: &missing, directives, grid: 2, ..Snippet::default() }.run().unwrap_err();
    assert!(e.contains("uninitialised") || e.contains("races"), "{e}");
}

#[test]
fn products_of_a_warp() {
    // A is 16 x 16, B is the identity: D = A. A[r][c] = r + 16 c as bf16, exact up to 256.
    let body = "shr.u32 %r10, %r1, 2; and.b32 %r11, %r1, 3; shl.b32 %r11, %r11, 1;\n\
                ENTRY(20, 0, 0) ENTRY(21, 8, 0) ENTRY(22, 0, 8) ENTRY(23, 8, 8)\n\
                setp.eq.u32 %p1, %r10, %r11; add.u32 %r12, %r11, 1; setp.eq.u32 %p2, %r10, %r12;\n\
                selp.b32 %r30, 0x3f80, 0, %p1; selp.b32 %r31, 0x3f800000, 0, %p2; or.b32 %r30, %r30, %r31;\n\
                mov.f32 %f0, 0f00000000;\n\
                mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%f1, %f2, %f3, %f4}, {%r20, %r21, %r22, %r23}, {%r30, %r31}, {%f0, %f0, %f0, %f0};\n\
                cvt.rzi.u32.f32 %r40, %f1; cvt.rzi.u32.f32 %r41, %f4; shl.b32 %r41, %r41, 16; or.b32 %r3, %r40, %r41; st.global.u32 [%rd0], %r3;";
    let entry = |reg: u32, row: u32, col: u32| {
        format!(
            "add.u32 %r12, %r10, {row}; add.u32 %r13, %r11, {col}; shl.b32 %r13, %r13, 4; add.u32 %r12, %r12, %r13;\n\
             cvt.rn.f32.u32 %f10, %r12; add.u32 %r12, %r12, 16; cvt.rn.f32.u32 %f11, %r12; cvt.rn.bf16x2.f32 %r{reg}, %f11, %f10;\n"
        )
    };
    let mut text =
        body.replace("{%r30, %r31}, {%f0", "{%r30, %r32}, {%f0").replace("mov.f32 %f0", "mov.u32 %r32, 0; mov.f32 %f0");
    for (r, row, col) in [(20, 0, 0), (21, 8, 0), (22, 0, 8), (23, 8, 8)] {
        text = text.replace(&format!("ENTRY({r}, {row}, {col})"), &entry(r, row, col));
    }
    let out = run(&text).unwrap();
    for (l, x) in (0u32..).zip(out) {
        let (row, col) = (l / 4, 2 * (l % 4));
        assert_eq!((x & 0xffff, x >> 16), (row + 16 * col, row + 8 + 16 * (col + 1)), "lane {l}");
    }
}

#[test]
fn matrices_move_between_memory_and_lanes() {
    // Rows of 16 bytes; stored as fragments, read back transposed.
    let body = "shl.b32 %r10, %r1, 4; add.u32 %r10, %r10, %r2; mul.lo.u32 %r11, %r1, 0x00020002; add.u32 %r11, %r11, 0x00010000;\n\
                and.b32 %r12, %r1, 7; shl.b32 %r12, %r12, 4; add.u32 %r12, %r12, %r2;\n\
                stmatrix.sync.aligned.m8n8.x1.shared.b16 [%r12], {%r11}; bar.warp.sync -1;\n\
                ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%r3}, [%r12]; st.global.u32 [%rd0], %r3;";
    let out = run(body).unwrap();
    for (l, x) in (0u32..).zip(out) {
        let at = |r: u32, c: u32| 2 * (4 * r + c / 2) + c % 2;
        assert_eq!((x & 0xffff, x >> 16), (at(2 * (l % 4), l / 4), at(2 * (l % 4) + 1, l / 4)));
    }
    let e = fault(&body.replace("bar.warp.sync -1;", ""));
    assert!(e.contains("no bar.warp.sync"), "{e}");
}
