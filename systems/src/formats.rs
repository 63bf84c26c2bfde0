//! Which number formats a model is computed and updated in: the scene's `precision`, by parameter.

use kernels::{dtype::DType, fp8::Scaling};

use crate::{
    params::{ParamKind, ParamSpec},
    scene::{Compute, Kept, Moments, Part, Precision, Scales},
    session::dtype,
};

/// Number formats of a model.
#[derive(Clone, Debug, PartialEq)]
pub struct Formats {
    /// Type of activations and of weights as they are kept.
    pub compute: DType,
    /// Type of the optimizer's moments.
    pub moments: DType,
    /// Products in 8 bits, if there are any.
    pub fp8: Option<Fp8Formats>,
}

/// How products in 8 bits are made.
#[derive(Clone, Debug, PartialEq)]
pub struct Fp8Formats {
    /// What numbers scales are.
    pub scaling: Scaling,
    /// Parts whose products are in the type of activations.
    pub keep_high: Vec<Part>,
    /// Attention's output waits for its weight gradient in E5M6.
    pub narrow_attention_output: bool,
    /// SwiGLU's input waits for the backward pass in E4M3.
    pub narrow_swiglu_input: bool,
}

impl Formats {
    /// What a scene asks for.
    pub fn new(precision: &Precision) -> Self {
        let compute = dtype(precision.compute);
        Formats {
            compute,
            moments: match precision.moments {
                _ if compute == DType::F64 => DType::F64,
                Moments::F32 => DType::F32,
                Moments::Bf16 => DType::Bf16,
            },
            fp8: (precision.compute == Compute::Fp8).then(|| Fp8Formats {
                scaling: match precision.scales {
                    Scales::Real => Scaling::Real,
                    Scales::PowerOfTwo => Scaling::PowerOfTwo,
                },
                keep_high: precision.keep_high.clone(),
                narrow_attention_output: precision.attention_output == Kept::Narrow,
                narrow_swiglu_input: precision.swiglu_input == Kept::Narrow,
            }),
        }
    }

    /// One format for all, as `--precision` names it.
    pub fn of(compute: Compute) -> Self {
        Self::new(&Precision { compute, ..Precision::default() })
    }

    /// How products with a parameter are made in 8 bits, if they are.
    pub fn fp8_of(&self, spec: &ParamSpec) -> Option<&Fp8Formats> {
        let part = part_of(spec)?;
        self.fp8.as_ref().filter(|fp8| !fp8.keep_high.contains(&part))
    }
}

/// The part that a linear layer without a bias belongs to; `None` for what is no such layer.
fn part_of(spec: &ParamSpec) -> Option<Part> {
    let is_linear = matches!(spec.kind, ParamKind::Linear | ParamKind::ExpertLinear);
    let name = spec.name.as_str();
    let parts = [
        (".self_attn.", Part::Projections),
        (".mlp.experts.", Part::Experts),
        (".mlp.shared_experts.", Part::SharedExperts),
        (".mlp.", Part::Dense),
        (".eh_proj.", Part::Mtp),
    ];
    parts.into_iter().find(|(of, _)| is_linear && name.contains(of)).map(|(_, part)| part)
}
