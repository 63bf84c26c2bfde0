//! Each mistake in the protocol of a sample kernel is noticed: a fault, or a wrong result.

#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "each test uses a part")]
mod common;

use ptxsim::mutants;

/// Mutants of a kernel that a run notices under none of the seeds.
fn unnoticed(text: &str, seeds: std::ops::Range<u64>, run: impl Fn(&str, u64) -> bool) -> Vec<String> {
    let all = mutants(text);
    assert!(all.len() > 5, "only {} mutants", all.len());
    all.into_iter().filter(|m| seeds.clone().all(|s| run(&m.text, s))).map(|m| m.what).collect()
}

#[test]
fn of_one_tile_of_bf16() {
    let text = include_str!("kernels/tile_bf16.ptx");
    let left = unnoticed(text, 1..7, |t, seed| common::tile_bf16(t, seed).is_ok_and(|e| e < 1e-4));
    assert_eq!(left, Vec::<String>::new());
}

/// Mistakes that cannot be observed, by the beginning of what they are, and why.
const HARMLESS: &[(&str, &str)] = &[(
    "line 429: drop `bar.warp.sync 0xffffffff`",
    "the lanes have been together at wgmma.wait_group since they read the slot that lane 0 then releases",
)];

#[test]
fn of_a_product_of_e4m3() {
    let text = include_str!("kernels/fp8_gemm_128x128_s5.ptx");
    let left = unnoticed(text, 1..5, |t, seed| common::fp8_gemm(t, (256, 256, 1024), 2, seed).is_ok_and(|e| e < 4e-3));
    let left: Vec<_> = left.iter().filter(|w| !HARMLESS.iter().any(|(h, _)| w.starts_with(h))).collect();
    assert_eq!(left, Vec::<&String>::new());
}
