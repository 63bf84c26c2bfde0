//! Numbers in 12 bits and back, as [`crate::ops::e5m6`] defines them, to the bit.
//!
//! encode (x, packed, scales: addresses, rows, columns, tiles a row: u32), decode (packed, scales, x, rows, columns, tiles). Eight lanes have
//! a tile of 128 columns, 16 neighbours each: 24 bytes of codes, moved by 8 where rows are aligned, else byte by byte. A code is the
//! upper 12 bits of an f16, which is how it is read; it is written by integers, since a number would be rounded twice on its way through f16.
//!
//! Time: bytes over memory bandwidth: an element of bf16 is 2 bytes one way and 1.5 the other. Encoding takes about 14 integer operations
//! an element: at an H200's bandwidth they are as long as the bytes, below it they are not.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B16, B32, B64, F32, Pred, Reg, vector},
    golden::Variant,
    parts::{self, count, element, row},
    quantize::{
        aligned,
        code::{Format, amax, share_max, store_byte},
        rows::{COLUMNS, Slot, grid, place},
    },
};
use crate::{dtype::DType, fp8::TILE, ptx, tensor::Tensor};

/// Past the largest, 65024, it would be rounded to is infinity, and no further.
const E5M6: Format = Format { mantissa: 6, bias: 15, max: 65536.0, nan: 0x7e0 };

/// Bytes of a thread's codes.
const BYTES: usize = COLUMNS * 12 / 8;

/// `x` [t, c] into `packed` U8 [t, 3 ceil(c / 2)] and `scales` U8 [t, ceil(c / 128)].
pub fn encode(x: Tensor, packed: Tensor, scales: Tensor) -> Vec<Launch> {
    launch(encode_kernel, x, [x, packed, scales], packed)
}

/// `x` [t, c] from `packed` and `scales`.
pub fn decode(packed: Tensor, scales: Tensor, x: Tensor) -> Vec<Launch> {
    launch(decode_kernel, x, [packed, scales, x], packed)
}

fn launch(kernel: fn(DType, bool) -> Kernel, x: Tensor, args: [Tensor; 3], packed: Tensor) -> Vec<Launch> {
    let (t, c) = (x.rows(), x.cols());
    if t * c == 0 {
        return vec![];
    }
    let wide = aligned(&[x], COLUMNS) && (packed.offset as usize).is_multiple_of(8);
    let num_tiles = c.div_ceil(TILE);
    let mut args = args.map(Arg::Tensor).to_vec();
    args.extend([t, c, num_tiles].map(|n| Arg::U32(count(n))));
    vec![Launch { kernel: kernel(x.dtype, wide), grid: grid(t, num_tiles), args }]
}

fn name(what: &str, dtype: DType, wide: bool) -> String {
    format!("e5m6_{what}_{}_x{}", dtype.name(), if wide { COLUMNS } else { 1 })
}

/// Address of this thread's codes in row `index`.
fn codes_of(k: &mut Assembler, packed: Reg<B64>, index: Reg<B32>, columns: Reg<B32>, slot: &Slot) -> Reg<B64> {
    let bytes = k.reg::<B32>();
    ptx!(k, "add.u32 {bytes}, {columns}, 1;");
    ptx!(k, "shr.u32 {bytes}, {bytes}, 1;");
    ptx!(k, "mul.lo.u32 {bytes}, {bytes}, 3;");
    let at = row(k, packed, index, bytes, DType::U8);
    let first = k.reg::<B32>();
    ptx!(k, "shr.u32 {first}, {}, 1;", slot.first);
    ptx!(k, "mul.lo.u32 {first}, {first}, 3;");
    element(k, at, first, DType::U8)
}

fn encode_kernel(dtype: DType, wide: bool) -> Kernel {
    parts::kernel(name("encode", dtype, wide), move |k| {
        let (x, packed, scales) = (k.pointer("x"), k.pointer("packed"), k.pointer("scales"));
        let [rows, columns, tiles] = ["rows", "columns", "tiles"].map(|name| k.u32(name));
        let (index, tile, there) = place(k, rows, tiles);
        let slot = Slot::neighbours(k, wide, tile, columns, there);
        let from = row(k, x, index, columns, dtype);
        let x = slot.load(k, from, dtype);
        let most = amax(k, &x);
        share_max(k, most, &[4, 2, 1]);
        // Up by one exponent unless the mantissa is at most that of 65024; stored less 15, so that it becomes at most 65024.
        let (byte, bits, inverse) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<F32>());
        let largest = 65024f32.to_bits() & 0x7f_ffff;
        ptx!(k, "mov.b32 {byte}, {most};");
        ptx!(k, "add.u32 {byte}, {byte}, {};", (1 << 23) - 1 - largest);
        ptx!(k, "shr.u32 {byte}, {byte}, 23;");
        ptx!(k, "sub.u32 {byte}, {byte}, 15;");
        ptx!(k, "sub.u32 {bits}, 254, {byte};");
        ptx!(k, "shl.b32 {bits}, {bits}, 23;");
        ptx!(k, "mov.b32 {inverse}, {bits};");
        let at = row(k, scales, index, tiles, DType::U8);
        let at = element(k, at, tile, DType::U8);
        slot.store_scale(k, at, byte, "u8");
        let codes: Vec<Reg<B32>> = x
            .into_iter()
            .map(|x| {
                let (y, sign) = (k.reg::<F32>(), k.reg::<B32>());
                ptx!(k, "mul.rn.f32 {y}, {x}, {inverse};");
                let code = E5M6.magnitude(k, y);
                ptx!(k, "mov.b32 {sign}, {x};");
                ptx!(k, "shr.u32 {sign}, {sign}, 31;");
                ptx!(k, "bfi.b32 {code}, {sign}, {code}, 11, 1;");
                code
            })
            .collect();
        let pairs: Vec<Reg<B32>> = codes
            .chunks_exact(2)
            .map(|codes| {
                let pair = k.reg::<B32>();
                ptx!(k, "and.b32 {pair}, {}, 0xfff;", codes[0]);
                ptx!(k, "bfi.b32 {pair}, {}, {pair}, 12, 12;", codes[1]);
                pair
            })
            .collect();
        let to = codes_of(k, packed, index, columns, &slot);
        if wide {
            let there = slot.there(k, 0);
            let words: Vec<Reg<B32>> = pairs.chunks_exact(4).flat_map(|pairs| words_of(k, pairs)).collect();
            for (part, words) in words.chunks_exact(2).enumerate() {
                ptx!(k, "@{there} st.global.v2.b32 [{to}+{}], {};", 8 * part, vector(words));
            }
        } else {
            for (i, pair) in pairs.into_iter().enumerate() {
                let there = slot.there(k, 2 * i);
                (0..3).for_each(|byte| store_byte(k, to, 3 * i + byte, pair, byte, there));
            }
        }
    })
}

/// Four pairs, of 24 bits, as three words.
fn words_of(k: &mut Assembler, pairs: &[Reg<B32>]) -> [Reg<B32>; 3] {
    [0, 1, 2].map(|i| {
        let (low, word) = (k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "shr.u32 {low}, {}, {};", pairs[i], 8 * i);
        ptx!(k, "shl.b32 {word}, {}, {};", pairs[i + 1], 24 - 8 * i);
        ptx!(k, "or.b32 {word}, {word}, {low};");
        word
    })
}

/// Three words as four pairs; above their 24 bits there may be others.
fn pairs_of(k: &mut Assembler, words: &[Reg<B32>]) -> [Reg<B32>; 4] {
    let middle = [1, 2].map(|i| {
        let pair = k.reg::<B32>();
        ptx!(k, "shf.r.wrap.b32 {pair}, {}, {}, {};", words[i - 1], words[i], 32 - 8 * i);
        pair
    });
    let last = k.reg::<B32>();
    ptx!(k, "shr.u32 {last}, {}, 8;", words[2]);
    [words[0], middle[0], middle[1], last]
}

fn decode_kernel(dtype: DType, wide: bool) -> Kernel {
    parts::kernel(name("decode", dtype, wide), move |k| {
        let (packed, scales, x) = (k.pointer("packed"), k.pointer("scales"), k.pointer("x"));
        let [rows, columns, tiles] = ["rows", "columns", "tiles"].map(|name| k.u32(name));
        let (index, tile, there) = place(k, rows, tiles);
        let slot = Slot::neighbours(k, wide, tile, columns, there);
        let (end, outside, bits, scale) = (k.label("end"), k.reg::<Pred>(), k.reg::<B32>(), k.reg::<F32>());
        // Lanes of rows or columns that are not there have nothing to do; none waits for another.
        let there = slot.there(k, 0);
        ptx!(k, "not.pred {outside}, {there};");
        ptx!(k, "@{outside} bra {end};");
        let at = row(k, scales, index, tiles, DType::U8);
        let at = element(k, at, tile, DType::U8);
        ptx!(k, "ld.global.u8 {bits}, [{at}];");
        ptx!(k, "shl.b32 {bits}, {bits}, 23;");
        ptx!(k, "mov.b32 {scale}, {bits};");
        let from = codes_of(k, packed, index, columns, &slot);
        let pairs: Vec<Reg<B32>> = if wide {
            let words = k.regs::<B32>(BYTES / 4);
            for (part, words) in words.chunks_exact(2).enumerate() {
                ptx!(k, "ld.global.v2.b32 {}, [{from}+{}];", vector(words), 8 * part);
            }
            words.chunks_exact(3).flat_map(|words| pairs_of(k, words)).collect()
        } else {
            (0..COLUMNS / 2).map(|i| load_pair(k, from, 3 * i, &slot, 2 * i)).collect()
        };
        let values: Vec<Reg<F32>> = pairs
            .into_iter()
            .flat_map(|pair| [(4, "shl"), (8, "shr")].map(|(shift, op)| value(k, pair, (op, shift), scale)))
            .collect();
        let to = row(k, x, index, columns, dtype);
        slot.store(k, to, values, dtype);
        k.place(&end);
    })
}

/// Three bytes, if column `column` of the slot is there.
fn load_pair(k: &mut Assembler, from: Reg<B64>, offset: usize, slot: &Slot, column: usize) -> Reg<B32> {
    let (there, pair) = (slot.there(k, column), k.reg::<B32>());
    ptx!(k, "mov.b32 {pair}, 0;");
    for byte in 0..3 {
        let bits = k.reg::<B32>();
        ptx!(k, "mov.b32 {bits}, 0;");
        ptx!(k, "@{there} ld.global.u8 {bits}, [{from}+{}];", offset + byte);
        ptx!(k, "bfi.b32 {pair}, {bits}, {pair}, {}, 8;", 8 * byte);
    }
    pair
}

/// One number of a pair: its code shifted into the upper bits of an f16, and scaled.
fn value(k: &mut Assembler, pair: Reg<B32>, (op, shift): (&str, u32), scale: Reg<F32>) -> Reg<F32> {
    let (bits, half, x) = (k.reg::<B32>(), k.reg::<B16>(), k.reg::<F32>());
    ptx!(k, "{op}.b32 {bits}, {pair}, {shift};");
    ptx!(k, "and.b32 {bits}, {bits}, 0xfff0;");
    ptx!(k, "cvt.u16.u32 {half}, {bits};");
    ptx!(k, "cvt.f32.f16 {x}, {half};");
    ptx!(k, "mul.rn.f32 {x}, {x}, {scale};");
    x
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    let kernels = [encode_kernel(DType::Bf16, true), decode_kernel(DType::Bf16, true)];
    kernels.into_iter().map(|kernel| Variant::new(kernel, 64)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{e5m6 as cpu, testing::random},
        ptx::case::{Case, Data},
    };

    const SHAPES: [[usize; 2]; 6] = [[1, 1], [5, 16], [3, 144], [6, 256], [7, 131], [2, 2000]];

    fn outputs(t: usize, c: usize) -> [Data; 2] {
        [[t, cpu::packed(c)], [t, c.div_ceil(TILE)]].map(|dims| Data::poison(DType::U8, &dims))
    }

    /// Of all sizes, and what is no number.
    fn wild(dtype: DType, t: usize, c: usize) -> Data {
        let mut x = Data::random(dtype, &[t, c], 1);
        for (i, (x, e)) in x.2.iter_mut().zip(random(t * c, 2)).enumerate() {
            *x *= 10f64.powf(6.0 * e + ((i / 200 * 7) % 50) as f64 - 25.0);
            if i % 301 == 7 {
                *x = [f64::NAN, -f64::NAN, f64::INFINITY, -f64::INFINITY, -0.0, 0.0][i / 301 % 6];
            }
        }
        x
    }

    #[test]
    fn codes_are_the_cpus() {
        for (dtype, [t, c]) in [DType::F32, DType::Bf16].into_iter().flat_map(|dtype| SHAPES.map(|s| (dtype, s))) {
            Case::new(&[&[wild(dtype, t, c)][..], &outputs(t, c)].concat())
                .cpu(|s, x| cpu::encode(s, x[0], x[1], x[2]))
                .ptx(|x| encode(x[0], x[1], x[2]))
                .equal();
        }
    }

    /// In a tile whose scale is 1: each finite code, its neighbours among f32, and ties.
    #[test]
    fn every_code_is_written_and_read() {
        let mut x = vec![];
        for code in 0..=0xfffu16 {
            let (value, next) = (cpu::decode_e5m6(code), cpu::decode_e5m6(code + 1));
            let tie = if next.is_finite() { (value + next) / 2.0 } else { value };
            x.extend([value, value.next_up(), value.next_down(), tie, tie.next_up(), tie.next_down()]);
        }
        x.retain(|x| x.abs() <= 65024.0);
        let all: Vec<f64> =
            x.chunks(127).flat_map(|x| x.iter().copied().chain([65024.0; 128]).take(128)).map(f64::from).collect();
        let x = Data(DType::F32, vec![all.len() / 128, 128], all);
        let case = Case::new(&[&[x.clone()][..], &outputs(x.1[0], 128)].concat())
            .cpu(|s, x| cpu::encode(s, x[0], x[1], x[2]))
            .ptx(|x| encode(x[0], x[1], x[2]));
        let pairs = case.got[1].chunks_exact(3).map(|b| b[0] as u32 | (b[1] as u32) << 8 | (b[2] as u32) << 16);
        let met: std::collections::BTreeSet<u32> = pairs.flat_map(|p| [p & 0xfff, p >> 12]).collect();
        assert_eq!(met.len(), 2 * 31 * 64, "all finite codes");
        case.equal();
    }

    /// Any bytes are codes, those of infinities and NaN among them.
    #[test]
    fn numbers_are_the_cpus() {
        for (dtype, [t, c]) in [DType::F32, DType::Bf16].into_iter().flat_map(|dtype| SHAPES.map(|s| (dtype, s))) {
            let [mut packed, mut scales] = outputs(t, c);
            packed.2.iter_mut().enumerate().for_each(|(i, x)| *x = ((i * i * 37 + i / 7) % 256) as f64);
            scales.2.iter_mut().enumerate().for_each(|(i, x)| *x = (98 + i * 29 % 140) as f64);
            Case::new(&[packed, scales, Data::poison(dtype, &[t, c])])
                .cpu(|s, x| cpu::decode(s, x[0], x[1], x[2]))
                .ptx(|x| decode(x[0], x[1], x[2]))
                .equal();
        }
    }

    #[test]
    fn parts_of_buffers_go_element_by_element() {
        let x = wild(DType::F32, 1, 3 * 32 + 1);
        let part = |x: Tensor| x.slice(1, 3 * 32).reshape(&[3, 32]);
        Case::new(&[&[x][..], &outputs(3, 32)].concat())
            .cpu(|s, x| cpu::encode(s, part(x[0]), x[1], x[2]))
            .ptx(|x| encode(part(x[0]), x[1], x[2]))
            .equal();
    }
}
