//! What is asked of one row of logits, by all threads of a block: the largest, and the numbers found bit by bit.

use crate::{
    dtype::DType,
    ptx,
    ptx::{
        asm::{Assembler, B32, B64, F32, F64, Pred, Reg, f64_literal},
        fold::{self, Fold},
        norm::zero_f64,
        parts::{element, exp, f32_op, load, special, strided, widen},
    },
};

/// What all searches of a row share.
#[derive(Clone, Copy)]
pub(super) struct Row {
    /// Address of its first logit.
    pub logits: Reg<B64>,
    /// F32 or Bf16.
    pub dtype: DType,
    /// Vocabulary.
    pub v: Reg<B32>,
    /// This thread.
    pub tid: Reg<B32>,
    /// Threads.
    pub block: u32,
    /// Its largest logit.
    pub max: Reg<F32>,
    /// 1 / temperature.
    pub inverse: Reg<F32>,
}

/// What each token counts.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Weight {
    /// 1.
    One,
    /// e^((x - max) / T).
    Probability,
}

/// Which tokens count, for a number that is tried.
#[derive(Clone, Copy)]
pub(super) enum Tokens {
    /// Those whose key is at least that.
    KeyFrom,
    /// Those of smaller id; only those of this key, if one is given.
    IdBelow(Option<Reg<B32>>),
}

impl Row {
    /// Order-preserving: keys compare as logits do, both zeros alike, NaN above all. bf16 leaves 16 bits.
    fn key(self, k: &mut Assembler, x: Reg<F32>) -> Reg<B32> {
        let (zero, bits, mask, nan) = (k.reg::<F32>(), k.reg::<B32>(), k.reg::<B32>(), k.reg::<Pred>());
        ptx!(k, "add.rn.f32 {zero}, {x}, 0f00000000;");
        ptx!(k, "mov.b32 {bits}, {zero};");
        ptx!(k, "shr.s32 {mask}, {bits}, 31;");
        ptx!(k, "or.b32 {mask}, {mask}, 0x80000000;");
        ptx!(k, "xor.b32 {bits}, {bits}, {mask};");
        ptx!(k, "setp.nan.f32 {nan}, {x}, {x};");
        ptx!(k, "selp.b32 {bits}, 0xffffffff, {bits}, {nan};");
        if self.key_bits() == 16 {
            ptx!(k, "shr.u32 {bits}, {bits}, 16;");
        }
        bits
    }

    /// Bits of a key.
    pub fn key_bits(self) -> u32 {
        if self.dtype == DType::Bf16 { 16 } else { 32 }
    }

    /// The logit of a key.
    pub fn logit(self, k: &mut Assembler, key: Reg<B32>) -> Reg<F32> {
        let (bits, mask, x) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<F32>());
        ptx!(k, "shl.b32 {bits}, {key}, {};", 32 - self.key_bits());
        // Its top bit says that the number is not negative.
        ptx!(k, "not.b32 {mask}, {bits};");
        ptx!(k, "shr.s32 {mask}, {mask}, 31;");
        ptx!(k, "or.b32 {mask}, {mask}, 0x80000000;");
        ptx!(k, "xor.b32 {bits}, {bits}, {mask};");
        if self.key_bits() == 16 {
            ptx!(k, "and.b32 {bits}, {bits}, 0xffff0000;");
        }
        ptx!(k, "mov.b32 {x}, {bits};");
        x
    }

    /// (x - max) / T.
    fn below(self, k: &mut Assembler, x: Reg<F32>) -> Reg<F32> {
        let x = f32_op(k, "sub", x, self.max);
        f32_op(k, "mul", x, self.inverse)
    }

    /// The lowest key whose logit is not below `floor`, at most 0, as [`Row::below`] has it.
    pub fn lowest(self, k: &mut Assembler, floor: Reg<F64>) -> Reg<B32> {
        let (key, bit, tried, least) = (special(k, "0"), k.reg::<B32>(), k.reg::<B32>(), k.reg::<F32>());
        let (top, out, lower) = (k.label("bit"), k.label("found"), k.reg::<Pred>());
        ptx!(k, "cvt.rn.f32.f64 {least}, {floor};");
        ptx!(k, "mov.u32 {bit}, {};", 1u32 << (self.key_bits() - 1));
        k.place(&top);
        ptx!(k, "add.u32 {tried}, {key}, {bit};");
        let x = self.logit(k, tried);
        let x = self.below(k, x);
        // Of what is no number too: the lowest keys.
        ptx!(k, "setp.ltu.f32 {lower}, {x}, {least};");
        ptx!(k, "selp.b32 {key}, {tried}, {key}, {lower};");
        ptx!(k, "shr.u32 {bit}, {bit}, 1;");
        ptx!(k, "setp.eq.u32 {lower}, {bit}, 0;");
        ptx!(k, "@{lower} bra {out};");
        ptx!(k, "bra {top};");
        k.place(&out);
        ptx!(k, "add.u32 {key}, {key}, 1;");
        key
    }

    /// e^((x - max) / T).
    pub fn weight(self, k: &mut Assembler, x: Reg<F32>) -> Reg<F64> {
        let x = self.below(k, x);
        let w = exp(k, x);
        widen(k, w)
    }

    /// What the tokens chosen by `tokens` and `tried` count together.
    pub fn total(self, k: &mut Assembler, tokens: Tokens, tried: Reg<B32>, weight: Weight) -> Reg<F64> {
        let (sum, end) = (zero_f64(k), k.reg::<B32>());
        match tokens {
            Tokens::KeyFrom => ptx!(k, "mov.u32 {end}, {};", self.v),
            Tokens::IdBelow(_) => ptx!(k, "min.u32 {end}, {tried}, {};", self.v),
        }
        strided(k, self.tid, end, self.block, |k, i| {
            let (at, next, skip) = (element(k, self.logits, i, self.dtype), k.label("next"), k.reg::<Pred>());
            let x = load(k, at, self.dtype);
            match tokens {
                Tokens::KeyFrom => {
                    let key = self.key(k, x);
                    ptx!(k, "setp.lt.u32 {skip}, {key}, {tried};");
                    ptx!(k, "@{skip} bra {next};");
                }
                Tokens::IdBelow(Some(only)) => {
                    let key = self.key(k, x);
                    ptx!(k, "setp.ne.u32 {skip}, {key}, {only};");
                    ptx!(k, "@{skip} bra {next};");
                }
                Tokens::IdBelow(None) => {}
            }
            match weight {
                Weight::One => ptx!(k, "add.rn.f64 {sum}, {sum}, {};", f64_literal(1.0)),
                Weight::Probability => {
                    let w = self.weight(k, x);
                    ptx!(k, "add.rn.f64 {sum}, {sum}, {w};");
                }
            }
            k.place(&next);
        });
        fold::block(k, sum, Fold::Sum, self.block);
        sum
    }

    /// The largest number of `bits` bits, found from the highest on, whose total compares with `target` as `holds` says.
    pub fn search(
        self,
        k: &mut Assembler,
        bits: Reg<B32>,
        tokens: Tokens,
        weight: Weight,
        holds: &str,
        target: Reg<F64>,
    ) -> Reg<B32> {
        let (found, bit, tried) = (special(k, "0"), k.reg::<B32>(), k.reg::<B32>());
        let (top, out, done, good) = (k.label("bit"), k.label("found"), k.reg::<Pred>(), k.reg::<Pred>());
        ptx!(k, "sub.u32 {bit}, {bits}, 1;");
        ptx!(k, "shl.b32 {bit}, 1, {bit};");
        k.place(&top);
        ptx!(k, "or.b32 {tried}, {found}, {bit};");
        let total = self.total(k, tokens, tried, weight);
        // Before the next round's sums go where these are still read.
        if self.block > 32 {
            ptx!(k, "bar.sync 0;");
        }
        ptx!(k, "setp.{holds}.f64 {good}, {total}, {target};");
        ptx!(k, "selp.b32 {found}, {tried}, {found}, {good};");
        ptx!(k, "shr.u32 {bit}, {bit}, 1;");
        ptx!(k, "setp.eq.u32 {done}, {bit}, 0;");
        ptx!(k, "@{done} bra {out};");
        ptx!(k, "bra {top};");
        k.place(&out);
        found
    }

    /// What counts above a key.
    pub fn above(self, k: &mut Assembler, key: Reg<B32>, weight: Weight) -> Reg<F64> {
        let next = k.reg::<B32>();
        ptx!(k, "add.u32 {next}, {key}, 1;");
        self.total(k, Tokens::KeyFrom, next, weight)
    }
}

/// First place of the largest logit, the logit, and whether it is no finite number: NaN where there is one.
pub(super) fn argmax(k: &mut Assembler, r: Row) -> (Reg<B32>, Reg<F32>, Reg<Pred>) {
    let wide = Row { dtype: DType::F32, ..r };
    let best = k.reg::<B64>();
    ptx!(k, "mov.u64 {best}, 0;");
    strided(k, r.tid, r.v, r.block, |k, i| {
        let at = element(k, r.logits, i, r.dtype);
        let x = load(k, at, r.dtype);
        let (key, down, both) = (wide.key(k, x), k.reg::<B32>(), k.reg::<B64>());
        ptx!(k, "not.b32 {down}, {i};");
        ptx!(k, "mov.b64 {both}, {{{down}, {key}}};");
        ptx!(k, "max.u64 {best}, {best}, {both};");
    });
    fold::block(k, best, Fold::Max, r.block);
    let (token, key, wrong) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<Pred>());
    ptx!(k, "mov.b64 {{{token}, {key}}}, {best};");
    ptx!(k, "not.b32 {token}, {token};");
    // Keys of infinity and of minus infinity.
    ptx!(k, "setp.ge.u32 {wrong}, {key}, 0xff800000;");
    ptx!(k, "setp.le.or.u32 {wrong}, {key}, 0x007fffff, {wrong};");
    let max = wide.logit(k, key);
    (token, max, wrong)
}

/// a / b for b from 2^-126 to 1, within an ulp; the assembler's own division would be a call, and registers around it would
/// spill.
pub(super) fn quotient(k: &mut Assembler, a: Reg<F64>, b: Reg<F64>) -> Reg<F64> {
    let (r, minus, error, q) = (k.reg::<F64>(), k.reg::<F64>(), k.reg::<F64>(), k.reg::<F64>());
    ptx!(k, "rcp.approx.ftz.f64 {r}, {b};");
    ptx!(k, "neg.f64 {minus}, {b};");
    for _ in 0..2 {
        ptx!(k, "fma.rn.f64 {error}, {minus}, {r}, {};", f64_literal(1.0));
        ptx!(k, "fma.rn.f64 {r}, {r}, {error}, {r};");
    }
    ptx!(k, "mul.rn.f64 {q}, {a}, {r};");
    ptx!(k, "fma.rn.f64 {error}, {minus}, {q}, {a};");
    ptx!(k, "fma.rn.f64 {q}, {error}, {r}, {q};");
    q
}
