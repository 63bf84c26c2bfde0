//! Scales and codes: what quantizers compute between their loads and their stores, to the bit as [`crate::fp8`] defines it.
//!
//! On Hopper and later an instruction rounds to E4M3: to nearest, ties to even, held at 448, subnormals as numbers; it loses the sign
//! of a NaN, as the multiplication before it does. Before, twelve integer and float operations do the same. The sign is taken from
//! the number, so that it is that of the definition in both. At three bytes an element the bandwidth of an H200 asks a
//! multiprocessor for six elements a clock, of 64 integer operations: the twelve would be the bound there, and are for devices
//! that have no such instruction.

use crate::{
    device::Target,
    dtype::DType,
    fp8::{MAX, MIN_AMAX, Scaling},
    ptx,
    ptx::{
        Arch, Kernel,
        asm::{Assembler, B16, B32, B64, Class, F32, Pred, Reg, f32_literal},
        fold::Number,
        parts::{self, BLOCK, constant, operand, suffix, unpack},
    },
};

/// How kernels of a device quantize.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Recipe {
    scaling: Scaling,
    /// Whether there is an instruction for E4M3.
    converts: bool,
}

impl Recipe {
    /// For a device.
    pub fn new(on: &Target, scaling: Scaling) -> Self {
        Recipe { scaling, converts: on.runs(Arch::Sm90) }
    }

    /// Those whose kernels are committed: both scalings by the instruction, and by integers.
    pub(in crate::ptx) fn committed() -> [Self; 3] {
        let recipe = |scaling, converts| Recipe { scaling, converts };
        [recipe(Scaling::Real, true), recipe(Scaling::PowerOfTwo, true), recipe(Scaling::Real, false)]
    }

    /// Whether scales may be any number.
    pub(in crate::ptx) fn is_real(self) -> bool {
        self.scaling == Scaling::Real
    }

    /// A kernel in blocks of [`BLOCK`] threads; its name says the recipe.
    pub(in crate::ptx) fn kernel(self, name: &str, emit: impl Fn(&mut Assembler) + Send + 'static) -> Kernel {
        let (arch, how) = if self.converts { (Arch::Sm90, "cvt") } else { (Arch::Sm80, "int") };
        let scaling = match self.scaling {
            Scaling::Real => "real",
            Scaling::PowerOfTwo => "pow2",
        };
        parts::kernel_for(arch, format!("{name}_{scaling}_{how}"), BLOCK, emit)
    }

    /// The scale of a tile from its amax, and one over it.
    pub(in crate::ptx) fn scale(self, k: &mut Assembler, amax: Reg<F32>) -> (Reg<F32>, Reg<F32>) {
        let (scale, inverse) = (k.reg::<F32>(), k.reg::<F32>());
        ptx!(k, "div.rn.f32 {scale}, {amax}, {};", f32_literal(MAX));
        match self.scaling {
            Scaling::Real => ptx!(k, "rcp.rn.f32 {inverse}, {scale};"),
            Scaling::PowerOfTwo => {
                let bits = k.reg::<B32>();
                ptx!(k, "mov.b32 {bits}, {scale};");
                ptx!(k, "add.u32 {bits}, {bits}, {};", (1 << 23) - 1);
                ptx!(k, "shr.u32 {bits}, {bits}, 23;");
                ptx!(k, "min.u32 {bits}, {bits}, {};", 127 + 120);
                ptx!(k, "shl.b32 {bits}, {bits}, 23;");
                ptx!(k, "mov.b32 {scale}, {bits};");
                // Exponents add up to that of one, twice.
                ptx!(k, "sub.u32 {bits}, {}, {bits};", 254u32 << 23);
                ptx!(k, "mov.b32 {inverse}, {bits};");
            }
        }
        (scale, inverse)
    }

    /// Codes of four numbers, the first in the lowest byte. Signs are theirs, or those of the bytes of `signs`.
    pub(in crate::ptx) fn encode(
        self,
        k: &mut Assembler,
        x: [Reg<F32>; 4],
        signs: Option<Reg<B32>>,
        inverse: Reg<F32>,
    ) -> Reg<B32> {
        let y = x.map(|x| {
            let y = k.reg::<F32>();
            ptx!(k, "mul.rn.f32 {y}, {x}, {inverse};");
            y
        });
        let codes = k.reg::<B32>();
        if self.converts {
            let (low, high) = (k.reg::<B16>(), k.reg::<B16>());
            ptx!(k, "cvt.rn.satfinite.e4m3x2.f32 {low}, {}, {};", y[1], y[0]);
            ptx!(k, "cvt.rn.satfinite.e4m3x2.f32 {high}, {}, {};", y[3], y[2]);
            ptx!(k, "mov.b32 {codes}, {{{low}, {high}}};");
        } else {
            let bytes = y.map(|y| E4M3.magnitude(k, y));
            gather_bytes(k, codes, bytes, 0);
        }
        let signs = signs.unwrap_or_else(|| {
            let signs = k.reg::<B32>();
            gather_bytes(k, signs, x, 3);
            signs
        });
        // codes | signs & 0x80808080
        ptx!(k, "lop3.b32 {codes}, {codes}, {signs}, 0x80808080, 0xf8;");
        codes
    }

    /// Magnitudes of four codes, exactly.
    pub(in crate::ptx) fn magnitudes(self, k: &mut Assembler, codes: Reg<B32>) -> [Reg<F32>; 4] {
        let (bits, x) = (k.reg::<B32>(), [(); 4].map(|()| k.reg::<F32>()));
        ptx!(k, "and.b32 {bits}, {codes}, 0x7f7f7f7f;");
        if self.converts {
            let pairs = [(); 2].map(|()| k.reg::<B16>());
            ptx!(k, "mov.b32 {{{}, {}}}, {bits};", pairs[0], pairs[1]);
            for (pair, x) in pairs.iter().zip(x.chunks(2)) {
                let (halves, parts) = (k.reg::<B32>(), [(); 2].map(|()| k.reg::<B16>()));
                ptx!(k, "cvt.rn.f16x2.e4m3x2 {halves}, {pair};");
                ptx!(k, "mov.b32 {{{}, {}}}, {halves};", parts[0], parts[1]);
                parts.iter().zip(x).for_each(|(part, x)| ptx!(k, "cvt.f32.f16 {x}, {part};"));
            }
            return x;
        }
        for (byte, x) in x.iter().enumerate() {
            let (code, nan) = (k.reg::<B32>(), k.reg::<Pred>());
            ptx!(k, "bfe.u32 {code}, {bits}, {}, 8;", 8 * byte);
            ptx!(k, "setp.eq.u32 {nan}, {code}, 127;");
            // The exponent's bias from 7 to 127, by a product that is exact for subnormals too.
            ptx!(k, "shl.b32 {code}, {code}, 20;");
            ptx!(k, "mov.b32 {x}, {code};");
            ptx!(k, "mul.rn.f32 {x}, {x}, {};", f32_literal(2f32.powi(127 - 7)));
            ptx!(k, "selp.f32 {x}, {}, {x}, {nan};", f32_literal(f32::NAN));
        }
        x
    }
}

/// Largest magnitude, NaN left out, and at least [`MIN_AMAX`].
pub(in crate::ptx) fn amax(k: &mut Assembler, x: &[Reg<F32>]) -> Reg<F32> {
    // Chains of eight: each waits for the operation before.
    let partial: Vec<Reg<F32>> = x
        .chunks(8)
        .map(|x| {
            let (most, magnitude) = (constant(k, MIN_AMAX), k.reg::<F32>());
            for x in x {
                ptx!(k, "abs.f32 {magnitude}, {x};");
                ptx!(k, "max.f32 {most}, {most}, {magnitude};");
            }
            most
        })
        .collect();
    partial[1..].iter().for_each(|x| ptx!(k, "max.f32 {}, {}, {x};", partial[0], partial[0]));
    partial[0]
}

/// The maximum over lanes whose numbers differ in the bits of `masks`. Every lane of the warp must come here.
pub(in crate::ptx) fn share_max(k: &mut Assembler, x: Reg<F32>, masks: &[u32]) {
    for &mask in masks {
        let y = F32::exchange(k, x, mask);
        ptx!(k, "max.f32 {x}, {x}, {y};");
    }
}

/// A small floating point format.
pub(in crate::ptx) struct Format {
    /// Bits of the mantissa.
    pub mantissa: u32,
    /// Bias of the exponent.
    pub bias: u32,
    /// What larger numbers are taken for.
    pub max: f32,
    /// The code of what is not a number.
    pub nan: u32,
}

const E4M3: Format = Format { mantissa: 3, bias: 7, max: MAX, nan: 0x7f };

impl Format {
    /// The code of |y| in the low bits (of the others, what they are is not said): to nearest, ties to even.
    pub(in crate::ptx) fn magnitude(&self, k: &mut Assembler, y: Reg<F32>) -> Reg<B32> {
        let (size, held, nan, small) = (k.reg::<F32>(), k.reg::<F32>(), k.reg::<Pred>(), k.reg::<Pred>());
        let (normal, odd, subnormal) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<B32>());
        let shift = 23 - self.mantissa;
        ptx!(k, "abs.f32 {size}, {y};");
        ptx!(k, "min.f32 {held}, {size}, {};", f32_literal(self.max));
        ptx!(k, "mov.b32 {normal}, {held};");
        ptx!(k, "bfe.u32 {odd}, {normal}, {shift}, 1;");
        // Half of the last place less one, and the exponent's bias from 127.
        ptx!(k, "add.u32 {normal}, {normal}, {};", ((1 << (shift - 1)) - 1u32).wrapping_sub((127 - self.bias) << 23));
        ptx!(k, "add.u32 {normal}, {normal}, {odd};");
        ptx!(k, "shr.u32 {normal}, {normal}, {shift};");
        // What is added has the least subnormal as its last place: multiples of it remain in the low bits.
        let least = 2f32.powi(1 - self.bias as i32 - self.mantissa as i32);
        ptx!(k, "add.rn.f32 {held}, {held}, {};", f32_literal(least * 2f32.powi(23)));
        ptx!(k, "mov.b32 {subnormal}, {held};");
        ptx!(k, "setp.lt.f32 {small}, {size}, {};", f32_literal(2f32.powi(1 - self.bias as i32)));
        ptx!(k, "selp.b32 {normal}, {subnormal}, {normal}, {small};");
        ptx!(k, "setp.nan.f32 {nan}, {size}, {size};");
        ptx!(k, "selp.b32 {normal}, {}, {normal}, {nan};", self.nan);
        normal
    }
}

/// Byte `byte` of each of four registers.
fn gather_bytes<C: Class>(k: &mut Assembler, to: Reg<B32>, x: [Reg<C>; 4], byte: u32) {
    let pairs = [(); 2].map(|()| k.reg::<B32>());
    for (pair, x) in pairs.iter().zip(x.chunks(2)) {
        ptx!(k, "prmt.b32 {pair}, {}, {}, {:#x};", x[0], x[1], byte | (byte + 4) << 4);
    }
    ptx!(k, "prmt.b32 {to}, {}, {}, 0x5410;", pairs[0], pairs[1]);
}

/// Four rows of four bytes as four columns.
pub(in crate::ptx) fn transpose(k: &mut Assembler, rows: [Reg<B32>; 4]) -> [Reg<B32>; 4] {
    let [low, high] = [0, 2].map(|first| {
        [0x5140, 0x7362].map(|selector| {
            let pair = k.reg::<B32>();
            ptx!(k, "prmt.b32 {pair}, {}, {}, {selector:#x};", rows[first], rows[first + 1]);
            pair
        })
    });
    [(0, 0x5410), (0, 0x7632), (1, 0x5410), (1, 0x7632)].map(|(half, selector)| {
        let column = k.reg::<B32>();
        ptx!(k, "prmt.b32 {column}, {}, {}, {selector:#x};", low[half], high[half]);
        column
    })
}

/// Neighbouring words, or zeros unless `there`; accesses of 16 bytes.
pub(in crate::ptx) fn load_words(k: &mut Assembler, at: Reg<B64>, n: usize, there: Reg<Pred>) -> Vec<Reg<B32>> {
    let words = k.regs::<B32>(n);
    words.iter().for_each(|word| ptx!(k, "mov.b32 {word}, 0;"));
    for (part, words) in words.chunks(4).enumerate() {
        let (suffix, words) = (suffix(words.len()), operand(words));
        ptx!(k, "@{there} ld.global{suffix}.b32 {words}, [{at}+{}];", 16 * part);
    }
    words
}

/// `n` neighbouring numbers as f32, or zeros unless `there`; accesses of 16 bytes.
pub(in crate::ptx) fn load_wide(
    k: &mut Assembler,
    at: Reg<B64>,
    dtype: DType,
    n: usize,
    there: Reg<Pred>,
) -> Vec<Reg<F32>> {
    let words = load_words(k, at, n * dtype.size_bytes() / 4, there);
    let mut x = vec![];
    for word in words {
        if dtype == DType::Bf16 {
            x.extend(<[_; 2]>::from(unpack(k, word)));
        } else {
            x.push(k.reg::<F32>());
            ptx!(k, "mov.b32 {}, {word};", x[x.len() - 1]);
        }
    }
    x
}

/// One number as f32, or zero unless `there`.
pub(in crate::ptx) fn load_one(
    k: &mut Assembler,
    at: Reg<B64>,
    offset: usize,
    dtype: DType,
    there: Reg<Pred>,
) -> Reg<F32> {
    let (bits, x) = (k.reg::<B32>(), k.reg::<F32>());
    let access = if dtype == DType::Bf16 { "u16" } else { "b32" };
    ptx!(k, "mov.b32 {bits}, 0;");
    ptx!(k, "@{there} ld.global.{access} {bits}, [{at}+{offset}];");
    if dtype == DType::Bf16 {
        ptx!(k, "shl.b32 {bits}, {bits}, 16;");
    }
    ptx!(k, "mov.b32 {x}, {bits};");
    x
}

/// Stores byte `byte` of a word where `there`.
pub(in crate::ptx) fn store_byte(
    k: &mut Assembler,
    at: Reg<B64>,
    offset: usize,
    word: Reg<B32>,
    byte: usize,
    there: Reg<Pred>,
) {
    let bits = k.reg::<B32>();
    ptx!(k, "shr.u32 {bits}, {word}, {};", 8 * byte);
    ptx!(k, "@{there} st.global.u8 [{at}+{offset}], {bits};");
}
