//! Devices a run can be placed on.

use std::{fmt, str::FromStr, sync::Arc};

use crate::{
    error::Error,
    ptx::{Arch, Kernel, tuning::Table},
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
#[derive(Clone, Debug, PartialEq)]
pub struct Target {
    /// Compute capability, major and minor.
    pub compute: (u32, u32),
    /// Multiprocessors.
    pub num_sms: u32,
    /// Shared memory that a block may have, in bytes.
    pub shared_bytes: u32,
    /// Which multiprocessors the launches may occupy.
    pub share: Share,
    /// Tiles of products that were measured on the device, if any were.
    pub tuning: Option<Arc<Table>>,
}

/// Which multiprocessors a stream's launches may occupy, so that communication runs beside computation and not after it.
///
/// A GPU has no way to say so; this works by numbers of blocks. Products on Hopper are persistent, one block a multiprocessor that stays
/// until all tiles are made: if they are fewer than there are multiprocessors, what another stream launches finds the rest free.
/// Kernels with a block for each part of their work need no such bound: a multiprocessor is free again as soon as one of these ends.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Share {
    /// All.
    #[default]
    All,
    /// All but so many, which another stream has: for computation.
    AllBut(u32),
    /// So many: for communication. Kernels that take any grid ([`Kernel::any_grid`]) have at most so many blocks.
    Only(u32),
}

impl Share {
    /// Computation's and communication's, where communication has so many multiprocessors for itself; all for both where it has none.
    pub fn split(comm_sms: u32) -> (Share, Share) {
        if comm_sms == 0 { (Share::All, Share::All) } else { (Share::AllBut(comm_sms), Share::Only(comm_sms)) }
    }
}

/// Multiprocessors that communication is given where it runs beside computation: 20 of 132 (DeepSeek-V3 report, section 3.2.2), in
/// proportion; none of fewer than 7.
pub fn default_comm_sms(num_sms: u32) -> u32 {
    num_sms * 20 / 132
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

/// What a meter of a GPU's power shows.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum PowerReading {
    /// Energy since some moment in the past.
    Millijoules(u64),
    /// What is drawn now, or was on average in the last second.
    Milliwatts(u32),
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

    /// Multiprocessors of its share.
    pub fn sms_of_share(&self) -> u32 {
        match self.share {
            Share::All => self.num_sms,
            Share::AllBut(others) => self.num_sms.saturating_sub(others).max(1),
            Share::Only(sms) => sms.clamp(1, self.num_sms.max(1)),
        }
    }

    /// Blocks that a kernel may have, of those that take any grid.
    pub fn most_blocks(&self) -> Option<u32> {
        matches!(self.share, Share::Only(_)).then(|| self.sms_of_share())
    }

    /// Whether it has what the kernel needs.
    pub fn fits(&self, kernel: &Kernel) -> bool {
        self.runs(kernel.arch) && kernel.shared_bytes <= self.shared_bytes
    }
}

impl<'a> From<&'a Target> for crate::ptx::gemm::Target<'a> {
    fn from(target: &'a Target) -> Self {
        let arch = [Arch::Sm90a, Arch::Sm90].into_iter().find(|arch| target.runs(*arch)).unwrap_or(Arch::Sm80);
        crate::ptx::gemm::Target { arch, num_sms: target.sms_of_share(), tuning: target.tuning.as_deref() }
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

    #[test]
    fn shares_of_multiprocessors_are_never_empty_and_never_more_than_there_are() {
        let of = |num_sms, share| {
            let target = Target { compute: (9, 0), num_sms, shared_bytes: 0, share, tuning: None };
            (target.sms_of_share(), target.most_blocks())
        };
        assert_eq!(of(132, Share::All), (132, None));
        assert_eq!(of(132, Share::AllBut(20)), (112, None));
        assert_eq!(of(132, Share::Only(20)), (20, Some(20)));
        assert_eq!(of(4, Share::AllBut(4)), (1, None));
        assert_eq!(of(4, Share::Only(0)), (1, Some(1)));
        assert_eq!(of(4, Share::Only(9)), (4, Some(4)));
    }

    #[test]
    fn communication_is_given_what_deepseek_gives_it_in_proportion() {
        assert_eq!([132, 108, 148, 7, 6, 4].map(default_comm_sms), [20, 16, 22, 1, 0, 0]);
    }
}
