//! Kernels written for Hopper run and are right, under several seeds.

#![expect(clippy::unwrap_used, reason = "tests")]

#[expect(dead_code, reason = "each test uses a part")]
mod common;

use common::{fp8_gemm, mla_decode, tile_bf16};

const TILE: &str = include_str!("kernels/tile_bf16.ptx");
const GEMM: &str = include_str!("kernels/fp8_gemm_128x128_s5.ptx");
const MLA: &str = include_str!("kernels/mla_decode.ptx");

#[test]
fn one_tile_of_bf16() {
    for seed in 1..6 {
        let error = tile_bf16(TILE, seed).unwrap();
        assert!(error < 1e-4, "seed {seed}: {error}");
    }
}

#[test]
fn product_of_e4m3() {
    for (shape, grid, seed) in [((128, 128, 128), 1, 1), ((256, 256, 768), 3, 2), ((200, 256, 1024), 2, 3)] {
        let error = fp8_gemm(GEMM, shape, grid, seed).unwrap();
        assert!(error < 4e-3, "{shape:?}: {error}");
    }
}

#[test]
fn attention_over_a_latent_cache() {
    for (tokens, seed) in [(64, 1), (150, 2)] {
        let error = mla_decode(MLA, tokens, seed).unwrap();
        assert!(error < 2e-3, "{tokens} tokens: {error}");
    }
}
