//! Devices a run can be placed on.

use std::{fmt, str::FromStr};

use crate::{
    error::Error,
    ptx::{Arch, Kernel},
};

/// Where tensors live and ops run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Device {
    /// This machine's processors.
    Cpu,
    /// An NVIDIA GPU, by the driver's number.
    Cuda(u32),
    /// Shapes and byte counts only: ops check their contracts and do nothing.
    Meta,
}

impl fmt::Display for Device {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Device::Cpu => f.write_str("cpu"),
            Device::Cuda(ordinal) => write!(f, "cuda:{ordinal}"),
            Device::Meta => f.write_str("meta"),
        }
    }
}

impl FromStr for Device {
    type Err = String;

    /// `cpu`, `cuda` (the first) or `cuda:1`.
    fn from_str(text: &str) -> Result<Self, String> {
        let cuda = |number: &str| number.parse().ok().map(Device::Cuda);
        let device = match text {
            "cpu" => Some(Device::Cpu),
            "cuda" => Some(Device::Cuda(0)),
            _ => text.strip_prefix("cuda:").and_then(cuda),
        };
        device.ok_or_else(|| format!("expected a device, `cpu` or `cuda:0`, found `{text}`"))
    }
}

/// What kernels are chosen by.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Target {
    /// Compute capability, major and minor.
    pub compute: (u32, u32),
    /// Multiprocessors.
    pub num_sms: u32,
    /// Shared memory that a block may have, in bytes.
    pub shared_bytes: u32,
}

/// What is known of a GPU before it is used.
#[derive(Clone, Debug)]
pub struct GpuInfo {
    /// The driver's number of it.
    pub ordinal: u32,
    /// Marketing name.
    pub name: String,
    /// What kernels are chosen by.
    pub target: Target,
    /// All of its memory.
    pub memory_bytes: u64,
    /// CUDA version that the driver serves, as 12040 for 12.4.
    pub driver_version: u32,
    /// Why runs cannot use it, if they cannot.
    pub problem: Option<Error>,
}

impl Target {
    /// Whether the device runs kernels of `arch`.
    pub fn runs(&self, arch: Arch) -> bool {
        match arch {
            Arch::Sm80 => self.compute >= (8, 0),
            Arch::Sm90 => self.compute >= (9, 0),
            // Not forward compatible.
            Arch::Sm90a => self.compute == (9, 0),
        }
    }

    /// Whether it has what the kernel needs.
    pub fn fits(&self, kernel: &Kernel) -> bool {
        self.runs(kernel.arch) && kernel.shared_bytes <= self.shared_bytes
    }
}

impl From<&Target> for crate::ptx::gemm::Target {
    fn from(target: &Target) -> Self {
        let arch = [Arch::Sm90a, Arch::Sm90].into_iter().find(|arch| target.runs(*arch)).unwrap_or(Arch::Sm80);
        crate::ptx::gemm::Target { arch, num_sms: target.num_sms }
    }
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;

    #[test]
    fn a_device_is_read_as_it_is_said() {
        for device in [Device::Cpu, Device::Cuda(0), Device::Cuda(3)] {
            assert_eq!(device.to_string().parse::<Device>().unwrap(), device);
        }
        assert_eq!("cuda".parse::<Device>().unwrap(), Device::Cuda(0));
        for wrong in ["gpu", "cuda:", "cuda:x", "meta"] {
            assert!(wrong.parse::<Device>().unwrap_err().contains(wrong));
        }
    }
}
