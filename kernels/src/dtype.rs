//! Element types of tensors and the arithmetic ops do on them.
//!
//! Ops are written once over [`Float`]: they load to the accumulator type, compute there, and round once on store.
//! f32 is the working type, bf16 halves memory, f64 exists so that gradients can be checked by finite differences.

use half::bf16;
use num_traits::NumAssign;
use serde::{Deserialize, Serialize};

/// Element type of a tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub enum DType {
    /// IEEE binary64; gradient checks.
    F64,
    /// IEEE binary32.
    F32,
    /// bfloat16; computed in f32, rounded to nearest even on store.
    Bf16,
    /// Token ids, counts, offsets, expert indices.
    U32,
    /// Bytes: codes of [`crate::fp8`].
    U8,
}

impl DType {
    /// Whether elements are floating-point numbers, and not counts or codes.
    pub const fn is_float(self) -> bool {
        matches!(self, DType::F64 | DType::F32 | DType::Bf16)
    }

    /// As kernels and reports call it.
    pub const fn name(self) -> &'static str {
        match self {
            DType::F64 => "f64",
            DType::F32 => "f32",
            DType::Bf16 => "bf16",
            DType::U32 => "u32",
            DType::U8 => "u8",
        }
    }

    /// Size of one element in bytes.
    pub const fn size_bytes(self) -> usize {
        match self {
            DType::F64 => 8,
            DType::F32 | DType::U32 => 4,
            DType::Bf16 => 2,
            DType::U8 => 1,
        }
    }
}

/// The bytes of one buffer, typed.
#[derive(Clone, Debug)]
pub enum Storage {
    /// f64 elements.
    F64(Vec<f64>),
    /// f32 elements.
    F32(Vec<f32>),
    /// bf16 elements.
    Bf16(Vec<bf16>),
    /// u32 elements.
    U32(Vec<u32>),
    /// u8 elements.
    U8(Vec<u8>),
}

impl Storage {
    /// `len` zeros.
    pub fn zeros(dtype: DType, len: usize) -> Self {
        match dtype {
            DType::F64 => Storage::F64(vec![0.0; len]),
            DType::F32 => Storage::F32(vec![0.0; len]),
            DType::Bf16 => Storage::Bf16(vec![bf16::ZERO; len]),
            DType::U32 => Storage::U32(vec![0; len]),
            DType::U8 => Storage::U8(vec![0; len]),
        }
    }

    /// Element type.
    pub fn dtype(&self) -> DType {
        match self {
            Storage::F64(_) => DType::F64,
            Storage::F32(_) => DType::F32,
            Storage::Bf16(_) => DType::Bf16,
            Storage::U32(_) => DType::U32,
            Storage::U8(_) => DType::U8,
        }
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        match self {
            Storage::F64(v) => v.len(),
            Storage::F32(v) => v.len(),
            Storage::Bf16(v) => v.len(),
            Storage::U32(v) => v.len(),
            Storage::U8(v) => v.len(),
        }
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// A type that a buffer can hold.
pub trait Element: bytemuck::Pod + Default + PartialEq + Send + Sync + std::fmt::Debug + 'static {
    /// Its tag.
    const DTYPE: DType;
    /// The elements of `storage`, if they are of this type.
    fn slice(storage: &Storage) -> Option<&[Self]>;
    /// The same, mutably.
    fn slice_mut(storage: &mut Storage) -> Option<&mut [Self]>;
}

macro_rules! element {
    ($type:ty, $variant:ident) => {
        impl Element for $type {
            const DTYPE: DType = DType::$variant;
            fn slice(storage: &Storage) -> Option<&[Self]> {
                if let Storage::$variant(v) = storage { Some(v) } else { None }
            }
            fn slice_mut(storage: &mut Storage) -> Option<&mut [Self]> {
                if let Storage::$variant(v) = storage { Some(v) } else { None }
            }
        }
    };
}
element!(f64, F64);
element!(f32, F32);
element!(bf16, Bf16);
element!(u32, U32);
element!(u8, U8);

/// Accumulator arithmetic: f32 or f64.
pub trait Real: Float<Acc = Self> + num_traits::Float + NumAssign + std::iter::Sum {
    /// e^x within 2 ulp for f32 where the result is normal (0 below -87.3), written so that compilers vectorize it.
    fn exp_fast(self) -> Self;
}

/// A floating-point element: what activations, weights and gradients are made of.
pub trait Float: Element {
    /// The type sums are kept in.
    type Acc: Real;
    /// Widens.
    fn to_acc(self) -> Self::Acc;
    /// Rounds to nearest even.
    fn from_acc(acc: Self::Acc) -> Self;
    /// From a constant.
    fn of_f64(x: f64) -> Self;
    /// To f64, exactly.
    fn as_f64(self) -> f64;
}

impl Float for f64 {
    type Acc = f64;
    fn to_acc(self) -> f64 {
        self
    }
    fn from_acc(acc: f64) -> f64 {
        acc
    }
    #[inline(always)]
    fn of_f64(x: f64) -> f64 {
        x
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        self
    }
}

impl Float for f32 {
    type Acc = f32;
    #[inline(always)]
    fn to_acc(self) -> f32 {
        self
    }
    #[inline(always)]
    fn from_acc(acc: f32) -> f32 {
        acc
    }
    #[inline(always)]
    fn of_f64(x: f64) -> f32 {
        x as f32
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        f64::from(self)
    }
}

impl Float for bf16 {
    type Acc = f32;
    #[inline(always)]
    fn to_acc(self) -> f32 {
        f32::from_bits(u32::from(self.to_bits()) << 16)
    }
    #[inline(always)]
    fn from_acc(acc: f32) -> bf16 {
        bf16::from_f32(acc)
    }
    #[inline(always)]
    fn of_f64(x: f64) -> bf16 {
        bf16::from_f32(to_odd(x))
    }
    #[inline(always)]
    fn as_f64(self) -> f64 {
        f64::from(self)
    }
}

/// To f32 towards zero, with the last bit set where that lost something: what is then rounded to fewer bits is rounded once.
/// (`bf16::from_f64` looks at the upper half of the f64 only, and takes what is a little above a tie for one.)
#[inline(always)]
fn to_odd(x: f64) -> f32 {
    let near = x as f32;
    if f64::from(near) == x || x.is_nan() {
        return near;
    }
    let bits = near.to_bits() - u32::from(f64::from(near).abs() > x.abs());
    f32::from_bits(bits | 1)
}

impl Real for f64 {
    fn exp_fast(self) -> f64 {
        self.exp()
    }
}

impl Real for f32 {
    #[inline(always)]
    fn exp_fast(self) -> f32 {
        // Cody and Waite: e^x = 2^n e^r with |r| <= ln2/2, and a degree-6 Taylor polynomial of e^r (error below 1 ulp).
        const LN2_HIGH: f32 = 0.693_359_4;
        const LN2_LOW: f32 = -2.121_944_4e-4;
        const SHIFT: f32 = 12_582_912.0; // 1.5 * 2^23: adding it rounds to an integer in the low bits
        let x = self.clamp(-87.3, 88.7);
        let shifted = x * std::f32::consts::LOG2_E + SHIFT;
        let n = shifted - SHIFT;
        let r = (x - n * LN2_HIGH) - n * LN2_LOW;
        let mut p = 1.0 / 5040.0;
        for c in [1.0 / 720.0, 1.0 / 120.0, 1.0 / 24.0, 1.0 / 6.0, 0.5, 1.0, 1.0] {
            p = p * r + c;
        }
        // 2^n in two factors, because n = 128 has no single one.
        let n = (shifted.to_bits() as i32).wrapping_sub(SHIFT.to_bits() as i32);
        let half = n >> 1;
        let y = p * f32::from_bits(((half + 127) as u32) << 23) * f32::from_bits(((n - half + 127) as u32) << 23);
        let y = if self < -87.3 { 0.0 } else { y };
        if self.is_nan() { self } else { y }
    }
}

/// Runs `$body` with `$t` bound to the Rust type of a floating-point `$dtype`; anything else is a wrong call and panics
/// with the dtype, because op launchers check dtypes first.
#[macro_export]
macro_rules! with_float {
    ($dtype:expr, $t:ident => $body:expr) => {
        match $dtype {
            $crate::dtype::DType::F64 => {
                type $t = f64;
                $body
            }
            $crate::dtype::DType::F32 => {
                type $t = f32;
                $body
            }
            $crate::dtype::DType::Bf16 => {
                type $t = ::half::bf16;
                $body
            }
            other => panic!("expected a floating-point tensor, found {other:?}"),
        }
    };
}

/// Largest finite magnitude below which a softmax mask is safe: used as "minus infinity" where subtraction follows.
pub fn lowest<A: Real>() -> A {
    A::min_value()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_fast_is_within_two_ulp_of_exp() {
        for i in -870_000..880_000 {
            let x = i as f32 * 1e-4;
            let (got, want) = (x.exp_fast(), f64::from(x).exp());
            assert!((f64::from(got) - want).abs() <= 2.4e-7 * want, "exp({x}) = {want}, got {got}");
        }
    }

    #[test]
    fn bf16_is_rounded_once_from_f64() {
        for bits in (0..0x7f7f_u16).step_by(7) {
            let (low, high) = (bf16::from_bits(bits), bf16::from_bits(bits + 1));
            let even = if bits % 2 == 0 { low } else { high };
            let tie = (low.to_f64() + high.to_f64()) / 2.0;
            for sign in [1.0, -1.0] {
                let of = |x: f64| bf16::of_f64(sign * x).to_f64() * sign;
                let found = [of(tie.next_down()), of(tie), of(tie.next_up()), of(low.to_f64())];
                assert_eq!(found, [low, even, high, low].map(bf16::to_f64), "around {tie:e}");
            }
        }
        assert_eq!([bf16::of_f64(1e300), bf16::of_f64(-1e300)], [bf16::INFINITY, bf16::NEG_INFINITY]);
        assert_eq!((bf16::of_f64(f64::INFINITY), bf16::of_f64(1e-300)), (bf16::INFINITY, bf16::ZERO));
        assert!(bf16::of_f64(f64::NAN).is_nan());
    }

    #[test]
    fn exp_fast_keeps_its_edges() {
        assert_eq!(f32::NEG_INFINITY.exp_fast(), 0.0);
        assert_eq!(0f32.exp_fast(), 1.0);
        assert!(f32::NAN.exp_fast().is_nan());
    }
}
