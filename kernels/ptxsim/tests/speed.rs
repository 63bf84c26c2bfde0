//! How fast: an elementwise kernel must stay cheap enough for every test of one.

#![expect(clippy::unwrap_used, reason = "tests")]
#![expect(clippy::disallowed_methods, reason = "a measurement")]

#[expect(dead_code, reason = "each test uses a part")]
mod common;

use common::snippet::Snippet;
use ptxsim::{Machine, Module};

#[test]
fn elementwise_kernels_are_fast() {
    let body = "cvt.rn.f32.u32 %f1, %r6; mov.u32 %r10, 0;\n\
                again: ld.global.f32 %f2, [%rd0]; fma.rn.f32 %f2, %f1, 0f3F000000, %f2; mul.f32 %f3, %f2, %f2;\n\
                add.f32 %f2, %f3, %f1; max.f32 %f2, %f2, 0f00000000; st.global.f32 [%rd0], %f2; add.u32 %r10, %r10, 1;\n\
                setp.lt.u32 %p1, %r10, 16; @%p1 bra again;";
    let module = Module::parse(&Snippet { body, ..Snippet::default() }.text()).unwrap();
    let mut m = Machine::new(3);
    let n = 256 * 64;
    let at = m.alloc(4 * n);
    m.write(at, &vec![0; 4 * n as usize]).unwrap();
    let params = [at.to_le_bytes().to_vec(), at.to_le_bytes().to_vec()];
    let begin = std::time::Instant::now();
    let stats = m.launch(&module, [64, 1, 1], [256, 1, 1], 0, &params).unwrap();
    let rate = stats.thread_instructions as f64 / begin.elapsed().as_secs_f64();
    // Far below what it is alone on a machine (see the crate's notes), so that a busy one does not fail it.
    assert!(rate > 5e6, "{:.1} million thread instructions a second", rate / 1e6);
    if std::env::var_os("PTXSIM_SPEED").is_some() {
        panic!("{:.1} million thread instructions a second, {}", rate / 1e6, stats.thread_instructions);
    }
}
