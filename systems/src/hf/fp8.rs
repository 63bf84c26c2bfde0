//! FP8 as DeepSeek's checkpoints store it: E4M3 codes with one f32 factor per block, `w = code * scale_inv`.
//!
//! The format is `fn` ("finite"): 4 exponent bits with bias 7, 3 mantissa bits, no infinities, NaN only at 0x7f and
//! 0xff, largest value 448. Every code is decoded by table, because a checkpoint has billions of them and 256 answers.

/// The value of every E4M3 code.
pub const E4M3: [f32; 256] = {
    let mut table = [0.0; 256];
    let mut code = 0;
    while code < 256 {
        table[code] = decode_e4m3(code as u8);
        code += 1;
    }
    table
};

/// The value of one E4M3 code; NaN for 0x7f and 0xff.
pub const fn decode_e4m3(code: u8) -> f32 {
    let sign = (code as u32 & 0x80) << 24;
    let exponent = (code as u32 >> 3) & 0xf;
    let mantissa = code as u32 & 7;
    let magnitude = if exponent == 15 && mantissa == 7 {
        f32::NAN.to_bits()
    } else if exponent == 0 {
        (mantissa as f32 / 512.0).to_bits()
    } else {
        (exponent + 127 - 7) << 23 | mantissa << 20
    };
    f32::from_bits(sign | magnitude)
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

#[cfg(test)]
mod tests {
    use super::*;

    /// The definition in real numbers: (-1)^s 2^(e-7) (1 + m/8), or (-1)^s 2^-6 m/8 where e is 0.
    fn by_definition(code: u8) -> f64 {
        let (sign, e, m) = (code / 128, i32::from(code / 8 % 16), f64::from(code % 8));
        let magnitude = match e {
            0 => 2f64.powi(-6) * m / 8.0,
            _ => 2f64.powi(e - 7) * (1.0 + m / 8.0),
        };
        if sign == 1 { -magnitude } else { magnitude }
    }

    #[test]
    fn every_code_has_the_value_of_the_definition() {
        for code in 0..=255u8 {
            let value = E4M3[code as usize];
            if code & 0x7f == 0x7f {
                assert!(value.is_nan(), "{code:#04x} is NaN");
            } else {
                assert_eq!(f64::from(value), by_definition(code), "{code:#04x}");
                assert_eq!(value.is_sign_negative(), code >= 0x80, "{code:#04x}");
            }
        }
    }

    #[test]
    fn landmarks() {
        for (code, value) in
            [(0x7e, 448.0), (0xfe, -448.0), (0x38, 1.0), (0x08, 0.015625), (0x01, 0.001953125), (0x00, 0.0)]
        {
            assert_eq!(decode_e4m3(code), value, "{code:#04x}");
        }
        assert!((1..=0x7e).all(|c| E4M3[c] > E4M3[c - 1]), "codes are sorted");
    }

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
                let expected = by_definition(codes[r * columns + c]) as f32 * scale;
                assert_eq!(whole[r * columns + c], expected, "row {r}, column {c}");
            }
        }
        // Any cut into rows gives the same numbers.
        let mut tail = vec![0.0; 2 * columns];
        dequantize_rows(&codes[3 * columns..], columns, 3, &scales, block, &mut tail);
        assert_eq!(tail, whole[3 * columns..]);
    }
}
