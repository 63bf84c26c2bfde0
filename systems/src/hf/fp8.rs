//! FP8 as DeepSeek's checkpoints store it: E4M3 codes with one f32 factor per block, `w = code * scale_inv`.

use kernels::{
    fp8::{E4M3, Scaling, TILE},
    ops::quantize::encode_blocks,
};

/// Rows and columns that share a factor in what is written.
pub const BLOCK: [usize; 2] = [TILE, TILE];

/// Name of the factors of tensor `name`.
pub fn scale_name(name: &str) -> String {
    format!("{name}_scale_inv")
}

/// Rows and columns: the last dimension, and all before it.
pub fn as_matrix(shape: &[usize]) -> [usize; 2] {
    match shape.split_last() {
        Some((&columns, rows)) => [rows.iter().product(), columns],
        None => [1, 1],
    }
}

/// Shape of the factors of a `[rows, columns]` matrix; the last block of a row or column may be partial.
pub fn scale_shape(shape: [usize; 2], block: [usize; 2]) -> [usize; 2] {
    [shape[0].div_ceil(block[0]), shape[1].div_ceil(block[1])]
}

/// Decodes whole rows `first_row..` of a matrix with `num_columns` columns.
///
/// `codes` and `out` hold the same rows; `scales` holds the factors of the whole matrix, row-major
/// `[ceil(rows / block[0]), ceil(num_columns / block[1])]`.
pub fn dequantize_rows(
    codes: &[u8],
    num_columns: usize,
    first_row: usize,
    scales: &[f32],
    block: [usize; 2],
    out: &mut [f32],
) {
    let scales_per_row = num_columns.div_ceil(block[1]);
    let rows = codes.chunks_exact(num_columns).zip(out.chunks_exact_mut(num_columns));
    for (row, (codes, out)) in rows.enumerate() {
        let scales = &scales[(first_row + row) / block[0] * scales_per_row..][..scales_per_row];
        let blocks = codes.chunks(block[1]).zip(out.chunks_mut(block[1]));
        for ((codes, out), scale) in blocks.zip(scales) {
            for (out, &code) in out.iter_mut().zip(codes) {
                *out = E4M3[code as usize] * scale;
            }
        }
    }
}

/// Codes of a matrix [rows, columns], and its factors for [`BLOCK`], row-major; or the place of a value that is not finite.
pub fn quantize(values: &[f32], [rows, columns]: [usize; 2]) -> Result<(Vec<u8>, Vec<f32>), usize> {
    if let Some(at) = values.iter().position(|value| !value.is_finite()) {
        return Err(at);
    }
    let num_scales = scale_shape([rows, columns], BLOCK).iter().product();
    let (mut codes, mut scales) = (vec![0; values.len()], vec![0.0; num_scales]);
    if !values.is_empty() {
        encode_blocks(values, rows, columns, Scaling::Real, (&mut codes, &mut scales));
    }
    Ok((codes, scales))
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    #[test]
    fn each_block_has_its_factor_and_the_last_ones_may_be_partial() {
        let (rows, columns, block) = (5, 7, [2, 3]);
        assert_eq!(scale_shape([rows, columns], block), [3, 3]);
        let codes: Vec<u8> = (0..rows * columns).map(|i| (i * 3 % 120) as u8).collect();
        let scales: Vec<f32> = (1..=9).map(|i| i as f32 * 0.37).collect();
        let mut whole = vec![0.0; rows * columns];
        dequantize_rows(&codes, columns, 0, &scales, block, &mut whole);
        for r in 0..rows {
            for c in 0..columns {
                let scale = scales[r / 2 * 3 + c / 3];
                let expected = E4M3[usize::from(codes[r * columns + c])] * scale;
                assert_eq!(whole[r * columns + c], expected, "row {r}, column {c}");
            }
        }
        // Any cut into rows gives the same numbers.
        let mut tail = vec![0.0; 2 * columns];
        dequantize_rows(&codes[3 * columns..], columns, 3, &scales, block, &mut tail);
        assert_eq!(tail, whole[3 * columns..]);
    }

    #[test]
    fn what_is_quantized_comes_back_within_its_rounding() {
        for [rows, columns] in [[1, 1], [130, 5], [3, 300], [257, 129]] {
            let values: Vec<f32> = (0..rows * columns).map(|i| ((i * i + 7 * i) % 1009) as f32 / 504.0 - 1.0).collect();
            let (codes, scales) = quantize(&values, [rows, columns]).unwrap();
            assert_eq!((codes.len(), scales.len()), (values.len(), rows.div_ceil(128) * columns.div_ceil(128)));
            let mut back = vec![0.0; values.len()];
            dequantize_rows(&codes, columns, 0, &scales, BLOCK, &mut back);
            for (i, (got, want)) in back.iter().zip(&values).enumerate() {
                let scale = scales[i / columns / 128 * columns.div_ceil(128) + i % columns / 128];
                assert!((got - want).abs() <= (want.abs() / 16.0).max(scale / 1024.0) * 1.0001, "{got} for {want}");
            }
            // The largest of each block is kept.
            let most = |x: &[f32]| x.iter().fold(0f32, |most, x| most.max(x.abs()));
            assert!((most(&back) - most(&values)).abs() < 1e-6);
        }
        assert_eq!(quantize(&[1.0, f32::NAN, f32::INFINITY], [1, 3]), Err(1));
        assert_eq!(quantize(&[], [0, 4]), Ok((vec![], vec![])));
    }
}
