//! Every form of instruction that kernels for sm_80 to sm_90a need is understood.

#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "each test uses a part")]
mod common;

use common::snippet::Snippet;
use ptxsim::Module;

fn floats(n: usize) -> String {
    format!("{{{}}}", (0..n).map(|i| format!("%f{i}")).collect::<Vec<_>>().join(", "))
}

#[test]
fn all_forms_parse() {
    let (f4, f32s, f64s) = (floats(4), floats(32), floats(64));
    let a = "{%r10, %r11, %r12, %r13}";
    let forms = [
        &format!("wgmma.mma_async.sync.aligned.m64n128k16.f32.bf16.bf16 {f64s}, %rd10, %rd11, %p1, 1, -1, 0, 1;"),
        &format!("wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {f32s}, {a}, %rd11, 1, 1, 1, 1;"),
        &format!("wgmma.mma_async.sync.aligned.m64n64k16.f32.f16.f16 {f32s}, %rd10, %rd11, 1, 1, 1, 0, 0;"),
        &format!("wgmma.mma_async.sync.aligned.m64n128k32.f32.e4m3.e4m3 {f64s}, %rd10, %rd11, 0, 1, 1;"),
        &format!("wgmma.mma_async.sync.aligned.m64n64k32.f32.e4m3.e5m2 {f32s}, {a}, %rd11, 0, 1, 1;"),
        &format!("wgmma.mma_async.sync.aligned.m64n64k8.f32.tf32.tf32 {f32s}, {a}, %rd11, 0, 1, 1;"),
        "wgmma.fence.sync.aligned; wgmma.commit_group.sync.aligned; wgmma.wait_group.sync.aligned 1;",
        "setmaxnreg.inc.sync.aligned.u32 232; setmaxnreg.dec.sync.aligned.u32 40;",
        "elect.sync %r10|%p1, 0xffffffff;",
        "mbarrier.init.shared::cta.b64 [%r2], 1; mbarrier.init.shared.b64 [%r2+8], %r10; mbarrier.inval.shared::cta.b64 [%r2];",
        "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%r2], 64; mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%r2], 64;",
        "mbarrier.arrive.release.cluster.shared::cluster.b64 _, [%r10]; mbarrier.arrive.noComplete.shared.b64 %rd10, [%r2], 1;",
        "mbarrier.arrive_drop.shared.b64 %rd10, [%r2];",
        "mbarrier.try_wait.parity.shared::cta.b64 %p1, [%r2], %r10, 0x989680; mbarrier.test_wait.shared.b64 %p1, [%r2], %rd10;",
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 %p1, [%r2], 1;",
        "fence.mbarrier_init.release.cluster; fence.proxy.async; fence.proxy.async.shared::cta; fence.proxy.async.global;",
        "fence.acq_rel.gpu; fence.sc.sys; fence.acq_rel.cluster; membar.gl; membar.cta; fence.proxy.alias;",
        "fence.proxy.tensormap::generic.acquire.gpu [%rd10], 128; fence.proxy.tensormap::generic.release.gpu;",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd10, {%r10, %r11}], [%r12];",
        "cp.async.bulk.tensor.2d.shared::cta.global.tile.mbarrier::complete_tx::bytes [%r2], [%rd10, {%r10, 0}], [%r12];",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster [%r2], [%rd10, {%r10, %r11}], [%r12], %h1;",
        "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster.L2::cache_hint [%r2], [%rd10, {%r10, %r11}], [%r12], %h1, %rd11;",
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%r2], [%rd10, {%r10, %r11, %r13}], [%r12], %rd11;",
        "cp.async.bulk.tensor.2d.global.shared::cta.bulk_group [%rd10, {%r10, %r11}], [%r2];",
        "cp.reduce.async.bulk.tensor.2d.global.shared::cta.add.bulk_group [%rd10, {%r10, %r11}], [%r2];",
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%r2], [%rd10], 128, [%r12];",
        "cp.async.bulk.shared::cluster.shared::cta.mbarrier::complete_tx::bytes [%r10], [%r2], 128, [%r12];",
        "cp.async.bulk.global.shared::cta.bulk_group [%rd10], [%r2], %r10;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.f32 [%rd10], [%r2], 128;",
        "cp.reduce.async.bulk.global.shared::cta.bulk_group.add.noftz.bf16 [%rd10], [%r2], 128;",
        "cp.async.bulk.commit_group; cp.async.bulk.wait_group 0; cp.async.bulk.wait_group.read 1;",
        "cp.async.bulk.prefetch.tensor.2d.L2.global.tile [%rd10, {%r10, %r11}]; cp.async.bulk.prefetch.L2.global [%rd10], 128;",
        "tensormap.replace.tile.global_address.shared::cta.b1024.b64 [%r2], %rd10; tensormap.replace.tile.global_dim.global.b1024.b32 [%rd10], 1, %r10;",
        "tensormap.replace.tile.global_stride.shared::cta.b1024.b64 [%r2], 0, %rd10;",
        "prefetch.tensormap [%rd10]; prefetch.global.L2 [%rd10]; griddepcontrol.wait; griddepcontrol.launch_dependents; nanosleep.u32 100;",
        "barrier.cluster.arrive.release.aligned; barrier.cluster.wait.acquire.aligned; barrier.cluster.arrive.relaxed.aligned;",
        "ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%r10, %r11, %r12, %r13}, [%r2]; ldmatrix.sync.aligned.m8n8.x2.trans.shared::cta.b16 {%r10, %r11}, [%r2];",
        "stmatrix.sync.aligned.m8n8.x4.shared.b16 [%r2], {%r10, %r11, %r12, %r13};",
        &format!("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {f4}, {a}, {{%r14, %r15}}, {f4};"),
        &format!("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {f4}, {a}, {{%r14, %r15}}, {f4};"),
        &format!("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {f4}, {a}, {{%r14, %r15}}, {f4};"),
        "cvt.rn.satfinite.e4m3x2.f32 %h1, %f1, %f2; cvt.rn.f16x2.e4m3x2 %r10, %h1; cvt.rn.bf16x2.f32 %r10, %f1, %f2; cvt.rna.tf32.f32 %r10, %f1;",
        "fma.rn.bf16x2 %r10, %r11, %r12, %r13; add.rn.bf16x2 %r10, %r11, %r12; add.bf16x2 %r10, %r11, %r12; max.bf16x2 %r10, %r11, %r12;",
        "ex2.approx.ftz.f32 %f1, %f2; tanh.approx.f32 %f1, %f2; lg2.approx.f32 %f1, %f2; rcp.approx.ftz.f32 %f1, %f2; rsqrt.approx.f32 %f1, %f2; sin.approx.f32 %f1, %f2;",
        "div.full.f32 %f1, %f2, %f3; div.approx.f32 %f1, %f2, %f3; div.rn.f64 %fd1, %fd2, %fd3; sqrt.rn.f64 %fd1, %fd2; rcp.rn.f32 %f1, %f2;",
        "ld.global.nc.L1::no_allocate.L2::256B.v4.s32 {%r10, %r11, %r12, %r13}, [%rd10]; ld.global.nc.L2::cache_hint.v2.f32 {%f1, %f2}, [%rd10], %rd11;",
        "st.global.L1::no_allocate.v4.s32 [%rd10], {%r10, %r11, %r12, %r13}; ld.acquire.sys.global.b32 %r10, [%rd10]; st.release.sys.global.b32 [%rd10], %r10;",
        "ld.relaxed.gpu.global.u64 %rd11, [%rd10]; ld.volatile.global.v4.u32 {%r10, %r11, %r12, %r13}, [%rd10]; st.volatile.shared.u32 [%r2], %r10;",
        "red.release.gpu.global.add.u32 [%rd10], %r10; atom.acq_rel.gpu.global.add.u64 %rd11, [%rd10], %rd12; atom.shared.cas.b32 %r10, [%r2], %r11, %r12;",
        &format!("red.global.v4.f32.add [%rd10], {f4};"),
        "red.global.v4.bf16x2.add.noftz [%rd10], {%r10, %r11, %r12, %r13}; atom.global.add.noftz.bf16x2 %r10, [%rd10], %r11;",
        "multimem.ld_reduce.relaxed.sys.global.add.acc::f32.v4.bf16x2 {%r10, %r11, %r12, %r13}, [%rd10]; multimem.red.relaxed.sys.global.add.f32 [%rd10], %f1;",
        &format!("multimem.st.relaxed.sys.global.v4.f32 [%rd10], {f4};"),
        "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.s64 [%r10], {%rd10, %rd11}, [%r12];",
        "createpolicy.fractional.L2::evict_first.b64 %rd10, 1.0; redux.sync.max.u32 %r10, %r11, -1; match.all.sync.b32 %r10|%p1, %r11, -1;",
        "mov.u32 %r10, %cluster_ctarank; mov.u64 %rd10, %globaltimer; mov.u64 %rd11, %clock64; mov.u32 %r10, %lanemask_lt; mov.u32 %r10, %clusterid.x;",
        "bar.sync 1, 64; bar.arrive 2, %r10; barrier.sync 0; barrier.cta.sync.aligned 3, 64; bar.red.or.pred %p1, 0, %p2; bar.warp.sync 0xff;",
        "{ .reg .b128 %q<2>; ld.global.b128 %q1, [%rd10]; mov.b128 {%rd11, %rd12}, %q1; mov.b128 %q0, {%rd12, %rd11}; st.global.b128 [%rd10], %q0; }",
        "discard.global.L2 [%rd10], 128; applypriority.global.L2::evict_normal [%rd10], 128; activemask.b32 %r10; isspacep.shared %p1, %rd10;",
        "mapa.shared::cluster.u32 %r10, %r2, %r11; mapa.u64 %rd10, %rd11, %r10; cvta.shared.u64 %rd10, %rd11; cvta.to.shared.u64 %rd10, %rd11; trap;",
        "{ .local .align 8 .b8 stack[64]; mov.u32 %r10, stack; st.local.u32 [%r10], %r11; ld.local.v2.u32 {%r10, %r11}, [stack+8]; .reg .pred %mine; setp.eq.u32 %mine, 1, 1; }",
        "cp.async.ca.shared.global [%r2], [%rd10], 8; cp.async.cg.shared.global.L2::128B [%r2], [%rd10], 16, %r10; cp.async.mbarrier.arrive.noinc.shared.b64 [%r2];",
    ];
    for body in forms {
        let text = Snippet { body, ..Snippet::default() }.text();
        if let Err(e) = Module::parse(&text) {
            panic!("{body}: {e}");
        }
    }
}
