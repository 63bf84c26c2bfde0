//! FP8 as DeepSeek's checkpoints store it: E4M3 codes with one f32 factor per block, `w = code * scale_inv`.

use kernels::fp8::E4M3;

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

#[cfg(test)]
mod tests {
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
}
