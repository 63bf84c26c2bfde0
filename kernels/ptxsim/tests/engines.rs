//! Asynchronous hardware: mbarriers, copies of all kinds, tensor instructions; each with the hazards around it.

#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "each test uses a part")]
mod common;

use common::{
    Random, from_bf16,
    snippet::{Snippet, fault, run},
    to_bf16,
};
use ptxsim::{Machine, Module, TensorMapInfo};

const INIT: &str = "setp.eq.u32 %p15, %r0, 0; @%p15 mbarrier.init.shared::cta.b64 [%r2], 32; @%p15 fence.mbarrier_init.release.cluster; bar.sync 0;";

#[test]
fn phases_of_an_mbarrier() {
    let body = format!(
        "{INIT}\n\
         mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0; selp.u32 %r3, 1, 0, %p1;\n\
         first: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 1; @!%p2 bra first;\n\
         bar.sync 0;\n\
         mbarrier.arrive.shared::cta.b64 %rd10, [%r2];\n\
         again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra again;\n\
         token: mbarrier.try_wait.shared::cta.b64 %p2, [%r2], %rd10; @!%p2 bra token;\n\
         st.global.u32 [%rd0], %r3;"
    );
    assert_eq!(run(&body).unwrap(), [0; 32]);
    let e = fault(&format!("{INIT}\nmbarrier.arrive.shared::cta.b64 _, [%r2], 3;"));
    assert!(e.contains("over-arrival"), "{e}");
    let e = fault(&format!(
        "{INIT}\nmbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 16; w: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra w;"
    ));
    assert!(e.contains("deadlock") && e.contains("512 bytes pending"), "{e}");
    let e = fault("mbarrier.arrive.shared::cta.b64 _, [%r2];");
    assert!(e.contains("not initialised"), "{e}");
    let e = fault(&format!("{INIT}\nst.shared.u32 [%r2+4], 0;"));
    assert!(e.contains("is an mbarrier"), "{e}");
    let e = fault(&INIT.replace("bar.sync 0;", "mbarrier.arrive.shared::cta.b64 _, [%r2];"));
    assert!(e.contains("may not be visible"), "{e}");
}

#[test]
fn copies_by_threads() {
    let input: Vec<u32> = (0..128).map(|i| i * 3).collect();
    let body = "mul.lo.u32 %r10, %r0, 16; add.u32 %r11, %r2, %r10; cvt.u64.u32 %rd10, %r10; add.u64 %rd10, %rd10, %rd2;\n\
                cp.async.cg.shared.global [%r11], [%rd10], 16; cp.async.commit_group;\n\
                cp.async.ca.shared.global [%r11+1024], [%rd10], 4, 2; cp.async.commit_group;\n\
                cp.async.wait_group 1; WAIT ld.shared.u32 %r3, [%r11+4];\n\
                cp.async.wait_all; ld.shared.u32 %r12, [%r11+1024]; add.u32 %r3, %r3, %r12; st.global.u32 [%rd0], %r3;";
    for seed in 1..5 {
        let body = body.replace("WAIT", "");
        let out = Snippet { body: &body, input: input.clone(), seed, ..Snippet::default() }.run().unwrap();
        assert_eq!(out, (0..32u32).map(|t| (4 * t + 1) * 3 + ((12 * t) & 0xffff)).collect::<Vec<_>>());
        for (from, to, why) in [
            ("cp.async.wait_group 1;", "", "copy in flight"),
            ("cp.async.wait_group 1;", "cp.async.wait_group 2;", "copy in flight"),
            ("cp.async.wait_all;", "", "copy in flight"),
            ("ld.shared.u32 %r3, [%r11+4];", "xor.b32 %r13, %r11, 16; ld.shared.u32 %r3, [%r13];", "no bar.warp.sync"),
        ] {
            let body = body.replace(from, to);
            let e = Snippet { body: &body, input: input.clone(), seed, ..Snippet::default() }.run().unwrap_err();
            assert!(e.contains(why), "{to}: {e}");
        }
    }
}

#[test]
fn bulk_copies_in_one_dimension() {
    let input: Vec<u32> = (0..64).collect();
    let body = "setp.ne.u32 %p1, %r0, 0; @%p1 bra wait;\n\
                mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster;\n\
                mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 256; add.u32 %r10, %r2, 1024;\n\
                cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r10], [%rd2], 256, [%r2];\n\
                wait: bar.sync 0; again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra again;\n\
                mul.lo.u32 %r10, %r0, 8; add.u32 %r10, %r10, %r2; ld.shared.u32 %r11, [%r10+1024]; add.u32 %r11, %r11, 5;\n\
                st.shared.u32 [%r10+1024], %r11; FENCE bar.sync 0; @%p1 bra end; add.u32 %r10, %r2, 1024;\n\
                COPY cp.async.bulk.commit_group; cp.async.bulk.wait_group.read 0; LATER\nend:";
    let copy = "cp.async.bulk.global.shared::cta.bulk_group [%rd1], [%r10], 256;";
    let body = body.replace("FENCE", "fence.proxy.async.shared::cta;").replace("COPY", copy);
    let run = |body: &str, seed| {
        Snippet { body, input: input.clone(), output: vec![1f32.to_bits(); 64], seed, ..Snippet::default() }.run()
    };
    for seed in 1..6 {
        let body = body.replace("LATER", "st.shared.u32 [%r2+1024], 9;");
        let want: Vec<u32> = (0..64).map(|i| if i % 2 == 0 { i + 5 } else { i }).collect();
        assert_eq!(run(&body, seed).unwrap(), want);
        let e = run(&body.replace("cp.async.bulk.wait_group.read 0;", ""), seed).unwrap_err();
        assert!(e.contains("still read by an instruction in flight"), "{e}");
        let e =
            run(&body.replace("cp.async.bulk.wait_group.read 0; st.shared.u32 [%r2+1024], 9;", ""), seed).unwrap_err();
        assert!(e.contains("exits while a bulk store"), "{e}");
        let e = run(&body.replace("fence.proxy.async.shared::cta;", ""), seed).unwrap_err();
        assert!(e.contains("without fence.proxy.async"), "{e}");
        let e = run(&body.replace("fence.mbarrier_init.release.cluster;", ""), seed).unwrap_err();
        assert!(e.contains("fence.mbarrier_init"), "{e}");
    }
    // Added to what is there.
    let add = body
        .replace("LATER", "")
        .replace(copy, "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd1], [%r10], 256;");
    let out = run(&add, 1).unwrap();
    assert_eq!(out[3], 1f32.to_bits());
    assert_eq!(out[2], (1f32 + f32::from_bits(7)).to_bits());
}

/// The byte of shared memory that holds byte `b` of row `r`, for rows of `inner` bytes.
fn swizzled(offset: usize, span: usize) -> usize {
    let chunk = offset / 16 % 8;
    let row = offset / 128 % 8;
    match span {
        128 => offset / 128 * 128 + (chunk ^ row) * 16 + offset % 16,
        64 => offset / 128 * 128 + (chunk ^ row & 3) * 16 + offset % 16,
        32 => offset / 128 * 128 + (chunk ^ row & 1) * 16 + offset % 16,
        _ => offset,
    }
}

/// A kernel that loads a box, shows shared memory, and stores the box again.
fn box_kernel(coords: &[i32], bytes: usize) -> String {
    let rank = coords.len();
    let c: Vec<String> = coords.iter().map(|c| c.to_string()).collect();
    let c = c.join(", ");
    format!(
        ".version 8.3\n.target sm_90\n.address_size 64\n.visible .entry boxes(.param .align 64 .b8 map[128], .param .align 64 .b8 map2[128], .param .u64 out)\n\
         {{ .shared .align 1024 .b8 s[65536]; .shared .align 8 .b8 bar[8]; .reg .pred %p<4>; .reg .b32 %r<16>; .reg .b64 %rd<8>;\n\
         mov.b64 %rd0, map; cvta.param.u64 %rd0, %rd0; mov.b64 %rd3, map2; cvta.param.u64 %rd3, %rd3; ld.param.u64 %rd1, [out]; mov.u32 %r0, %tid.x; mov.u32 %r1, s; mov.u32 %r2, bar;\n\
         setp.ne.u32 %p0, %r0, 0; @%p0 bra go;\n\
         mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster;\n\
         mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], {bytes};\n\
         cp.async.bulk.tensor.{rank}d.shared::cluster.global.tile.mbarrier::complete_tx::bytes [%r1], [%rd0, {{{c}}}], [%r2];\n\
         go: bar.sync 0; w: mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], 0; @!%p1 bra w;\n\
         mul.lo.u32 %r3, %r0, 4; l: add.u32 %r4, %r1, %r3; ld.shared.u32 %r5, [%r4]; cvt.u64.u32 %rd2, %r3; add.u64 %rd2, %rd2, %rd1;\n\
         st.global.u32 [%rd2], %r5; add.u32 %r3, %r3, 256; setp.lt.u32 %p2, %r3, {bytes}; @%p2 bra l; @%p0 bra end;\n\
         cp.async.bulk.tensor.{rank}d.global.shared::cta.tile.bulk_group [%rd3, {{{c}}}], [%r1]; cp.async.bulk.commit_group; cp.async.bulk.wait_group 0;\n\
         end: ret; }}"
    )
}

/// Extents, box, where it begins, bytes of an element, swizzle.
type BoxCase = (&'static [u64], &'static [u32], &'static [i32], u32, u32);

#[test]
fn boxes_of_tensors() {
    let cases: &[BoxCase] = &[
        (&[64], &[64], &[0], 4, 0),
        (&[100], &[64], &[64], 4, 0),
        (&[64, 16], &[64, 8], &[0, 8], 2, 128),
        (&[64, 20], &[64, 16], &[0, 10], 2, 128),
        (&[64, 16], &[32, 16], &[-8, -3], 2, 64),
        (&[48, 16], &[16, 16], &[40, 3], 2, 32),
        (&[32, 8], &[16, 8], &[8, 0], 4, 0),
        (&[128, 6, 5], &[128, 4, 2], &[0, 3, 4], 1, 128),
        (&[32, 3, 4, 2], &[32, 2, 2, 2], &[0, 1, 3, 0], 4, 128),
        (&[16, 3, 2, 2, 3], &[16, 2, 2, 1, 2], &[0, 2, 0, 1, 1], 4, 64),
    ];
    for (i, (dims, box_dims, coords, elem, swizzle)) in cases.iter().enumerate() {
        let elem = *elem as usize;
        let (n, size) = (dims.iter().product::<u64>() as usize, box_dims.iter().product::<u32>() as usize);
        let bytes = size * elem;
        let mut strides = vec![];
        let mut stride = dims[0] * elem as u64;
        for d in &dims[1..] {
            strides.push(stride);
            stride *= d;
        }
        let data: Vec<u8> = (0..n * elem).map(|i| (i * 7 + i / 256) as u8 | 1).collect();
        let mut m = Machine::new(i as u64);
        let (from, to, out) = (m.alloc(data.len() as u64), m.alloc(data.len() as u64), m.alloc(bytes as u64));
        m.write(from, &data).unwrap();
        m.write(to, &vec![0; data.len()]).unwrap();
        let map = |address| {
            TensorMapInfo {
                address,
                elem_bytes: elem as u32,
                dims: dims.to_vec(),
                strides: strides.clone(),
                box_dims: box_dims.to_vec(),
                swizzle: *swizzle,
            }
            .encode()
            .unwrap()
            .to_vec()
        };
        let module = Module::parse(&box_kernel(coords, bytes)).unwrap();
        m.launch(&module, [1; 3], [64, 1, 1], 0, &[map(from), map(to), out.to_le_bytes().to_vec()]).unwrap();
        let (mut shared, mut stored) = (vec![0; bytes], vec![0; data.len()]);
        m.read(out, &mut shared).unwrap();
        m.read(to, &mut stored).unwrap();
        let mut want_stored = vec![0; data.len()];
        for e in 0..size {
            let (mut q, mut at, mut inside, mut pitch) = (e, 0usize, true, 1usize);
            for d in 0..dims.len() {
                let x = coords[d] + (q % box_dims[d] as usize) as i32;
                q /= box_dims[d] as usize;
                inside &= x >= 0 && (x as u64) < dims[d];
                at = at.wrapping_add((x as usize).wrapping_mul(pitch));
                pitch *= dims[d] as usize;
            }
            for b in 0..elem {
                let want = if inside { data[at * elem + b] } else { 0 };
                assert_eq!(shared[swizzled(e * elem + b, *swizzle as usize)], want, "case {i}, element {e}");
                if inside {
                    want_stored[at * elem + b] = want;
                }
            }
        }
        assert_eq!(stored, want_stored, "case {i}");
    }
}

/// How an operand lies in shared memory.
#[derive(Clone, Copy, Debug)]
struct Layout {
    mn_major: bool,
    span: usize,
}

/// A descriptor at `start`, and the bytes of an operand of `rows` x 16.
fn operand(x: &[f32], rows: usize, l: Layout, start: usize) -> (u64, Vec<u8>) {
    let pitch = if l.span == 0 { 16 } else { l.span };
    // Groups of 8 rows (or of 8 k) follow each other, then panels.
    let (sbo, lbo) = match (l.mn_major, l.span) {
        (false, 0) => (256, 128),
        (false, _) => (8 * pitch, 16),
        (true, 0) => (256, 128),
        (true, _) => (8 * pitch, 16 * pitch),
    };
    let mut bytes = vec![0; 16384];
    for r in 0..rows {
        for k in 0..16 {
            let at = match (l.mn_major, l.span) {
                (false, 0) => r / 8 * sbo + k / 8 * lbo + r % 8 * 16 + k % 8 * 2,
                (false, _) => r / 8 * sbo + r % 8 * pitch + 2 * k,
                // Without a swizzle the roles of the two strides are exchanged.
                (true, 0) => r / 8 * sbo + k / 8 * lbo + k % 8 * 16 + r % 8 * 2,
                (true, _) => 2 * r / pitch * lbo + k / 8 * sbo + k % 8 * pitch + 2 * r % pitch,
            };
            let at = swizzled(at, l.span);
            bytes[at..at + 2].copy_from_slice(&to_bf16(x[r * 16 + k]).to_le_bytes());
        }
    }
    let code = match l.span {
        128 => 1u64,
        64 => 2,
        32 => 3,
        _ => 0,
    };
    (code << 62 | (sbo as u64 >> 4) << 32 | (lbo as u64 >> 4) << 16 | start as u64 >> 4, bytes)
}

const WGMMA: &str = "setp.ne.u32 %p1, %r0, 0; @%p1 bra wait; mov.u32 %r10, smem; add.u32 %r10, %r10, 32768; add.u32 %r12, %r2, 0;\n\
    mbarrier.init.shared::cta.b64 [%r10], 1; fence.mbarrier_init.release.cluster;\n\
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r10], 32768;\n\
    cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r12], [%rd2], 32768, [%r10];\n\
    wait: bar.sync 0; mov.u32 %r10, smem; again: mbarrier.try_wait.parity.shared::cta.b64 %p2, [%r10+32768], 0; @!%p2 bra again;\n\
    mov.b64 %rd10, DESC_A; mov.b64 %rd11, DESC_B; FRAGMENT\n\
    wgmma.fence.sync.aligned;\n\
    wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3, %f4, %f5, %f6, %f7}, OPERANDS;\n\
    wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 0;\n\
    mul.wide.u32 %rd12, %r0, 32; add.u64 %rd12, %rd12, %rd1;\n\
    st.global.v4.f32 [%rd12], {%f0, %f1, %f2, %f3}; st.global.v4.f32 [%rd12+16], {%f4, %f5, %f6, %f7};";

fn wgmma(body: &str, input: Vec<u32>, seed: u64) -> Result<Vec<f32>, String> {
    let shared = ".shared .align 1024 .b8 smem[32784];";
    let s = Snippet { body, shared, block: 128, input, output: vec![0; 1024], seed, ..Snippet::default() };
    Ok(s.run()?.into_iter().map(f32::from_bits).collect())
}

#[test]
fn products_of_a_warpgroup_in_every_layout() {
    let mut random = Random::new(5);
    let mut matrix = |rows: usize| (0..rows * 16).map(|_| from_bf16(to_bf16(random.next()))).collect::<Vec<f32>>();
    let (a, b) = (matrix(64), matrix(16));
    let spans = [0, 32, 64, 128];
    let layouts: Vec<Layout> =
        spans.into_iter().flat_map(|span| [false, true].map(|mn_major| Layout { mn_major, span })).collect();
    for (i, la) in layouts.iter().enumerate() {
        for lb in &layouts {
            // 16 rows of B do not fill the panels of the wider spans.
            if lb.mn_major && lb.span > 32 {
                continue;
            }
            let ((da, bytes_a), (db, bytes_b)) = (operand(&a, 64, *la, 0), operand(&b, 16, *lb, 16384));
            let bytes: Vec<u8> = [bytes_a, bytes_b].concat();
            let input: Vec<u32> = bytes.chunks(4).map(|c| u32::from_le_bytes(c.try_into().unwrap())).collect();
            let from_registers = i == 0;
            let operands = if from_registers {
                format!("{{%r20, %r21, %r22, %r23}}, %rd11, 0, 1, 1, {}", u8::from(lb.mn_major))
            } else {
                format!("%rd10, %rd11, 0, 1, -1, {}, {}", u8::from(la.mn_major), u8::from(lb.mn_major))
            };
            // A fragment by ordinary loads: K-major without swizzle, rows of 16 bytes.
            let fragment = "shr.u32 %r11, %r0, 5; shl.b32 %r11, %r11, 9; shr.u32 %r13, %r1, 2; shl.b32 %r13, %r13, 4; add.u32 %r11, %r11, %r13;\n\
                and.b32 %r13, %r1, 3; shl.b32 %r13, %r13, 2; add.u32 %r11, %r11, %r13; add.u32 %r11, %r11, %r2;\n\
                ld.shared.b32 %r20, [%r11]; ld.shared.b32 %r21, [%r11+256]; ld.shared.b32 %r22, [%r11+128]; ld.shared.b32 %r23, [%r11+384];";
            let body = WGMMA
                .replace("DESC_A", &da.to_string())
                .replace("DESC_B", &db.to_string())
                .replace("FRAGMENT", if from_registers { fragment } else { "" })
                .replace("OPERANDS", &operands);
            let d = wgmma(&body, input.clone(), 3).unwrap();
            let sign = if from_registers { 1.0 } else { -1.0 };
            for t in 0..128 {
                for j in 0..8 {
                    let (row, col) = (16 * (t / 32) + t % 32 / 4 + 8 * (j / 2 % 2), 8 * (j / 4) + 2 * (t % 4) + j % 2);
                    let want: f32 = (0..16).map(|k| sign * a[row * 16 + k] * b[col * 16 + k]).sum();
                    assert!((d[t * 8 + j] - want).abs() < 1e-5, "{la:?} {lb:?} thread {t} register {j}");
                }
            }
            if !from_registers {
                continue;
            }
            for (from, to, why) in [
                ("wgmma.fence.sync.aligned;", "", "no wgmma.fence followed"),
                ("wgmma.wait_group.sync.aligned 0;", "", "not waited for"),
                (
                    "wgmma.wait_group.sync.aligned 0;",
                    "mov.u32 %r20, 0; wgmma.wait_group.sync.aligned 0;",
                    "operand of a wgmma",
                ),
                (
                    "wgmma.wait_group.sync.aligned 0;",
                    "st.shared.u32 [%r2+16384], 0; wgmma.wait_group.sync.aligned 0;",
                    "still read",
                ),
                ("wgmma.fence.sync.aligned;", "setp.eq.u32 %p3, %r0, 5; @%p3 ret; wgmma.fence.sync.aligned;", "exited"),
            ] {
                let e = wgmma(&body.replace(from, to), input.clone(), 1).unwrap_err();
                assert!(e.contains(why), "{to}: {e}");
            }
        }
    }
}

#[test]
fn stores_to_another_block() {
    let body = "mov.u32 %r10, %cluster_ctarank; setp.ne.u32 %p1, %r0, 0; @%p1 bra go;\n\
                mbarrier.init.shared::cta.b64 [%r2], 1; fence.mbarrier_init.release.cluster;\n\
                mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 8;\n\
                go: barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned; @%p1 bra wait;\n\
                xor.b32 %r11, %r10, 1; mapa.shared::cluster.u32 %r12, %r2, %r11; add.u32 %r13, %r10, 40;\n\
                st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.u32 [%r12+64], {%r13, %r13}, [%r12];\n\
                wait: mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p2, [%r2], 0; @!%p2 bra wait;\n\
                ld.shared.u32 %r3, [%r2+64]; st.global.u32 [%rd0], %r3; barrier.cluster.arrive.aligned; barrier.cluster.wait.aligned;";
    let directives = ".explicitcluster\n.reqnctapercluster 2, 1, 1";
    for seed in 1..6 {
        let out = Snippet { body, directives, grid: 2, seed, ..Snippet::default() }.run().unwrap();
        assert_eq!([out[0], out[32]], [41, 40]);
    }
}

#[test]
fn accesses_out_of_place() {
    for (body, why) in [
        ("ld.global.u32 %r3, [%rd1+126];", "misaligned"),
        ("ld.global.u32 %r3, [%rd1+128];", "out of bounds: byte 128 of an allocation of 128"),
        ("ld.global.u32 %r3, [%rd1+100000];", "out of bounds"),
        ("ld.shared.u32 %r3, [%r2];", "uninitialised"),
        ("ld.shared.u32 %r3, [%r2+16384];", "out of bounds"),
        ("mov.u64 %rd10, 64; ld.u32 %r3, [%rd10];", "is in no space"),
        ("mov.u32 %r10, 0; div.u32 %r3, %r1, %r10;", "division by zero"),
        ("trap;", "trap executed"),
    ] {
        let e = fault(body);
        assert!(e.contains(why), "{body}: {e}");
        assert!(e.contains("snippet:"), "{e}");
    }
    let mut m = Machine::new(1);
    let module = Module::parse(&Snippet { body: "st.global.u32 [%rd1], 1;", ..Snippet::default() }.text()).unwrap();
    let at = m.alloc(4);
    m.free(at).unwrap();
    assert!(m.free(at).is_err());
    let params = [at.to_le_bytes().to_vec(), at.to_le_bytes().to_vec()];
    let e = m.launch(&module, [1; 3], [1, 1, 1], 0, &params).unwrap_err();
    assert!(e.contains("was freed"), "{e}");
    let e = m.launch(&module, [1; 3], [2048, 1, 1], 0, &params).unwrap_err();
    assert!(e.contains("block of 2048"), "{e}");
}
