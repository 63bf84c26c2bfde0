//! Numbers from FP8: what [`crate::ops::quantize::tiles`] made, back as activations.

use crate::{
    cost::Cost,
    device::Target,
    dtype::Float,
    error::Result,
    fp8::{Scaling, TILE, Tiles, decode_e4m3},
    ops::{
        expect::{expect_float, expect_tiles},
        is_fast,
        parallel::for_row_chunks,
        quantize::tiles_bytes,
    },
    ptx::{self, quantize::Recipe},
    stream::Stream,
    tensor::Tensor,
    with_float,
};

/// Assigns x [t, c] from its tiles: f32(code * scale), rounded to x's type.
pub fn tiles(s: &mut Stream, q: Tiles, x: Tensor) -> Result<()> {
    const OP: &str = "dequantize tiles";
    let (t, c) = (x.rows(), x.cols());
    expect_float(OP, "x", x)?;
    expect_tiles(OP, "q", q, t, c)?;
    s.account(Cost::stream(x.len() as u64, tiles_bytes(t, c), x.size_bytes()));
    // Codes are read alike under all scales.
    let kernels = |on: &Target| is_fast(x).then(|| ptx::dequantize::tiles(q, x, Recipe::new(on, Scaling::Real)));
    s.launch_kernel(&q.tensors(), &[x], kernels, move |m| {
        let (codes, scales) = (m.read::<u8>(q.codes), m.read::<f32>(q.scales));
        let pitch = q.scales.dim(1);
        with_float!(x.dtype, T => {
            for_row_chunks(&mut m.write::<T>(x), c, #[inline(always)] |first, rows| {
                for (row, x) in (first..).zip(rows.chunks_exact_mut(c)) {
                    let tiles = x.chunks_mut(TILE).zip(codes[row * c..][..c].chunks(TILE));
                    for (tile, (x, codes)) in tiles.enumerate() {
                        let scale = scales[tile * pitch + row];
                        x.iter_mut().zip(codes).for_each(|(x, code)| *x = T::of_f64(f64::from(decode_e4m3(*code) * scale)));
                    }
                }
            });
        });
    });
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use half::bf16;

    use super::*;
    use crate::{
        dtype::DType,
        ops::{quantize, testing::*},
    };

    #[test]
    fn what_is_rounded_comes_back_as_what_it_was_rounded_to() {
        for (t, c) in [(1, 1), (3, 128), (5, 300)] {
            let mut s = stream();
            let memory = s.memory().clone();
            let values: Vec<f32> = random(t * c, 1).into_iter().map(|x| x as f32 * 3.0).collect();
            let (x, q) = (memory.from_slice(&[t, c], &values), Tiles::alloc(&memory, t, c));
            let (wide, narrow) = (memory.alloc(DType::F32, &[t, c]), memory.alloc(DType::Bf16, &[t, c]));
            quantize::tiles(&mut s, x, q, Scaling::Real).unwrap();
            tiles(&mut s, q, wide).unwrap();
            tiles(&mut s, q, narrow).unwrap();
            s.synchronize().unwrap();
            let (codes, scales) = (memory.download::<u8>(q.codes), memory.download::<f32>(q.scales));
            let want: Vec<f32> = (0..t * c)
                .map(|at| decode_e4m3(codes[at]) * scales[at % c / TILE * t.next_multiple_of(4) + at / c])
                .collect();
            assert_eq!(memory.download::<f32>(wide), want);
            assert_eq!(memory.download::<bf16>(narrow), want.iter().map(|x| bf16::from_f32(*x)).collect::<Vec<_>>());
            // 3 bits of mantissa: 1/16 of a number at most, or of the least normal one of its tile.
            for (got, x) in want.iter().zip(&values) {
                assert!((got - x).abs() <= x.abs() / 16.0 + 3.0 / 448.0 / 64.0, "{got} for {x}");
            }
        }
        let mut s = stream();
        let memory = s.memory().clone();
        let (q, x) = (Tiles::alloc(&memory, 4, 128), memory.alloc(DType::F32, &[4, 129]));
        assert!(tiles(&mut s, q, x).unwrap_err().to_string().contains("dequantize tiles"));
    }
}
