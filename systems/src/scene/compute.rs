//! Sections on how a run computes: on what device, in which number format, and what it computes again instead of keeping.

use serde::{Deserialize, Serialize};

/// What a run's tensors and ops are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Device {
    /// This machine's processors.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by the driver's number: of each process the one that it sees under it. Ranks that are threads share it.
    Cuda(u32),
}

impl From<Device> for kernels::device::Device {
    fn from(device: Device) -> Self {
        match device {
            Device::Cpu => kernels::device::Device::Cpu,
            Device::Cuda(ordinal) => kernels::device::Device::Cuda(ordinal),
        }
    }
}

/// Number formats.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Precision {
    /// Format that activations and weights are multiplied in.
    pub compute: Compute,
    /// Format of the weights that the optimizer updates.
    pub master: Master,
    /// Format of the optimizer's moments.
    pub moments: Moments,
    /// With `compute: Fp8`, parts whose products stay in bf16.
    pub keep_high: Vec<Part>,
    /// With `compute: Fp8`, what numbers scales are.
    pub scales: Scales,
    /// With `compute: Fp8`, how the input of attention's last product is kept for the backward pass.
    pub attention_output: Kept,
    /// With `compute: Fp8`, how SwiGLU's input is kept for the backward pass, which computes its output again.
    pub swiglu_input: Kept,
    /// With `compute: Fp8`, what rounding loses is counted in every so many-th step; 0 for never.
    pub watch_every_steps: u64,
}

impl Default for Precision {
    fn default() -> Self {
        Precision {
            compute: Compute::default(),
            master: Master::default(),
            moments: Moments::default(),
            keep_high: Part::ALWAYS_HIGH.to_vec(),
            scales: Scales::default(),
            attention_output: Kept::default(),
            swiglu_input: Kept::default(),
            watch_every_steps: 0,
        }
    }
}

/// Number format of the model's products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compute {
    /// 32-bit floating point.
    #[default]
    F32,
    /// bfloat16 with 32-bit accumulation.
    Bf16,
    /// 8-bit floating point with a scale for each 128 numbers, or each block of 128 x 128 weights; other work in bfloat16.
    Fp8,
    /// 64-bit floating point, for proofs.
    F64,
}

/// Number format of master weights.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Master {
    /// 32-bit floating point; 64-bit beside `compute: F64`.
    #[default]
    F32,
}

/// Number format of moments.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Moments {
    /// 32-bit floating point; 64-bit beside `compute: F64`.
    #[default]
    F32,
    /// bfloat16, rounded after each update (DeepSeek-V3 report, section 3.3.3).
    Bf16,
}

/// A part of a model, as number formats are chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Part {
    /// Token embedding.
    Embedding,
    /// Output head.
    Head,
    /// Router.
    Gate,
    /// RMSNorm.
    Norms,
    /// Core attention: scores and values.
    Attention,
    /// Linear layers around attention. Those with a bias are high always.
    Projections,
    /// Feed-forward layers without experts.
    Dense,
    /// Routed experts.
    Experts,
    /// Shared experts.
    SharedExperts,
    /// The product that joins embedding and hidden state in MTP modules.
    Mtp,
}

impl std::fmt::Display for Part {
    /// As in scenes.
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Part::Embedding => "embedding",
            Part::Head => "head",
            Part::Gate => "gate",
            Part::Norms => "norms",
            Part::Attention => "attention",
            Part::Projections => "projections",
            Part::Dense => "dense",
            Part::Experts => "experts",
            Part::SharedExperts => "shared_experts",
            Part::Mtp => "mtp",
        })
    }
}

impl Part {
    /// Parts that nothing multiplies in 8 bits (DeepSeek-V3 report, section 3.3.1).
    pub const ALWAYS_HIGH: [Part; 5] = [Part::Embedding, Part::Head, Part::Gate, Part::Norms, Part::Attention];
}

/// What numbers the scales of 8-bit numbers are.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Scales {
    /// Any.
    #[default]
    Real,
    /// Powers of two (UE8M0).
    PowerOfTwo,
}

/// How an activation is kept for the backward pass.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Kept {
    /// In the high format: bf16.
    #[default]
    High,
    /// Rounded to fewer bits: attention's output to E5M6 with powers of two as scales, SwiGLU's input to E4M3 (DeepSeek-V3
    /// report, section 3.3.3).
    Narrow,
}

/// What the backward pass computes again instead of keeping.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Recompute {
    /// Nothing.
    #[default]
    Off,
    /// These operations.
    Selective(Vec<RecomputeOp>),
    /// Whole layers.
    Layer,
}

/// An operation that is cheap to compute again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum RecomputeOp {
    /// RMSNorm.
    Norm,
    /// Up-projections of latent attention.
    MlaUp,
    /// SwiGLU.
    Swiglu,
}
