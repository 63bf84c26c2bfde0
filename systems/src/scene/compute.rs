//! Sections on how a run computes: on what device, in which number format, and what it computes again instead of keeping.

use serde::{Deserialize, Serialize};

/// What a run's tensors and ops are on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Device {
    /// This machine's processors.
    #[default]
    Cpu,
    /// An NVIDIA GPU, by the driver's number; all ranks of the run share it.
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
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Precision {
    /// Format that activations and weights are multiplied in.
    pub compute: Compute,
}

/// Number format of the model's products.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compute {
    /// 32-bit floating point.
    #[default]
    F32,
    /// bfloat16 with 32-bit accumulation.
    Bf16,
    /// 8-bit floating point with a scale for each block, other work in bfloat16. It can be planned, not run yet.
    Fp8,
    /// 64-bit floating point, for proofs.
    F64,
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
