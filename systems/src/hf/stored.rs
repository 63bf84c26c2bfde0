//! The types that weights are stored in, and which tensor has which.

use safetensors::tensor::Dtype;
use std::collections::BTreeMap;

use crate::params::ParamKind;

/// A type to store weights in.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum SaveDtype {
    /// 32-bit floats.
    F32,
    /// Truncated 32-bit floats, rounded to nearest even.
    Bf16,
    /// IEEE half precision, rounded to nearest even.
    F16,
    /// E4M3 with an f32 factor for each 128 x 128 block, as DeepSeek-V3 is released: linear layers, and bf16 for all else.
    Fp8,
}

impl SaveDtype {
    /// As config.json calls it.
    pub fn torch_name(self) -> &'static str {
        match self {
            SaveDtype::F32 => "float32",
            // What is not in 8 bits.
            SaveDtype::Bf16 | SaveDtype::Fp8 => "bfloat16",
            SaveDtype::F16 => "float16",
        }
    }

    pub(super) fn num_bytes(self) -> usize {
        self.stored().bitsize() / 8
    }

    pub(super) fn stored(self) -> Dtype {
        match self {
            SaveDtype::F32 => Dtype::F32,
            SaveDtype::Bf16 => Dtype::BF16,
            SaveDtype::F16 => Dtype::F16,
            SaveDtype::Fp8 => Dtype::F8_E4M3,
        }
    }

    /// Appends values one by one, which is not how FP8 is stored; stops with the index of one that is not finite, before or by the
    /// conversion.
    pub(super) fn encode(self, values: &[f32], out: &mut Vec<u8>) -> Result<(), usize> {
        for (i, value) in values.iter().enumerate() {
            let is_finite = match self {
                SaveDtype::F32 => {
                    out.extend(value.to_le_bytes());
                    value.is_finite()
                }
                SaveDtype::Bf16 => {
                    let stored = half::bf16::from_f32(*value);
                    out.extend(stored.to_le_bytes());
                    stored.is_finite()
                }
                SaveDtype::F16 => {
                    let stored = half::f16::from_f32(*value);
                    out.extend(stored.to_le_bytes());
                    stored.is_finite()
                }
                SaveDtype::Fp8 => false,
            };
            if !is_finite {
                return Err(i);
            }
        }
        Ok(())
    }
}

/// Which type each tensor is stored in.
#[derive(Clone, Debug)]
pub enum Dtypes {
    /// One type, for FP8 only linear layers; f32 for `e_score_correction_bias`: its steps (0.001) are too small for bf16.
    All(SaveDtype),
    /// By name, as [`super::read::HfFolder::dtypes`] gives it; names it lacks are f32.
    PerTensor(BTreeMap<String, SaveDtype>),
}

impl Dtypes {
    pub(super) fn of(&self, name: &str, kind: ParamKind) -> SaveDtype {
        match self {
            Dtypes::All(_) if kind == ParamKind::ExpertBias => SaveDtype::F32,
            // As in the released weights, the join of MTP modules stays as it is.
            Dtypes::All(SaveDtype::Fp8) => match kind {
                ParamKind::Linear | ParamKind::ExpertLinear if !name.contains(".eh_proj.") => SaveDtype::Fp8,
                _ => SaveDtype::Bf16,
            },
            Dtypes::All(dtype) => *dtype,
            Dtypes::PerTensor(dtypes) => dtypes.get(name).copied().unwrap_or(SaveDtype::F32),
        }
    }
}
