//! Kernels below CUDA: PTX text made by Rust functions, and what it takes to launch one.
//!
//! A kernel module (`ptx/<op>.rs`) has pure functions from tensors to [`Launch`]es: text, grid and arguments. Nothing here
//! touches a device, so that the same launch runs on a GPU through the driver and in the interpreter of `ptxsim` in tests.
//!
//! Kernels are deterministic: no floating-point atomics, one order of every sum.

pub mod adamw;
pub mod asm;
pub mod attention;
pub mod balance;
#[cfg(test)]
pub(crate) mod case;
pub mod cross_entropy;
pub mod dequantize;
pub mod e5m6;
pub mod elementwise;
pub mod embedding;
pub mod fault;
pub mod fold;
pub mod fp8_gemm;
pub mod fp8_grouped_gemm;
pub mod gate;
pub mod gemm;
pub mod gemv;
pub mod golden;
pub mod grouped_gemm;
pub mod latent;
pub mod latent_fp8;
pub mod mla;
pub mod norm;
pub mod paged;
pub mod parts;
pub mod permute;
pub mod quantize;
pub mod rms_norm;
pub mod rope;
pub mod sampling;
pub mod sum_parts;
pub mod swiglu;
#[cfg(test)]
pub(crate) mod testing;
pub mod tuning;

use std::sync::Arc;

pub use fault::Fault;

use crate::{dtype::DType, tensor::Tensor};

/// PTX version of every module: accepted by drivers from 545 on.
pub const VERSION: &str = "8.3";

/// What a kernel needs of a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Arch {
    /// Ampere and later: mma.sync, cp.async.
    Sm80,
    /// Hopper and later: TMA, mbarrier with transaction counts, clusters.
    Sm90,
    /// Hopper only: wgmma, setmaxnreg, tensormap.replace.
    Sm90a,
}

impl Arch {
    /// As `.target` and file names say it.
    pub fn target(self) -> &'static str {
        match self {
            Arch::Sm80 => "sm_80",
            Arch::Sm90 => "sm_90",
            Arch::Sm90a => "sm_90a",
        }
    }
}

/// One entry point and how it is launched.
pub struct Kernel {
    /// Name of the entry, the golden file's stem and the cache's key: the same name always means the same text.
    pub name: String,
    /// What its text needs.
    pub arch: Arch,
    /// Threads of a block.
    pub block: u32,
    /// Dynamic shared memory of a block, in bytes.
    pub shared_bytes: u32,
    /// Whether it does all of its work with any number of blocks: then a stream may launch fewer, so that others have the rest of
    /// the device ([`crate::device::Share`]).
    pub any_grid: bool,
    /// Makes the text; called once per process and name.
    pub emit: Box<dyn Fn() -> String + Send>,
}

/// One argument, in the order of the kernel's parameters.
#[derive(Clone, Debug, PartialEq)]
pub enum Arg {
    /// Address of a tensor's first element.
    Tensor(Tensor),
    /// Address of so many bytes that are the launch's own until it ends; contents unspecified. Launches of one op
    /// that name the same `slot` see the same bytes.
    Scratch {
        /// Which of the op's scratch buffers.
        slot: u8,
        /// Its size.
        bytes: u64,
    },
    /// A number.
    U32(u32),
    /// A number.
    U64(u64),
    /// A number.
    F32(f32),
    /// A number.
    F64(f64),
    /// How TMA sees a tensor.
    Map(TensorMap),
    /// Address of these bytes, some KiB at most: numbers that the host makes anew for each launch.
    Bytes(Arc<[u8]>),
    /// Where the kernel says what it finds wrong.
    Fault(Fault),
}

/// A tensor as boxes that TMA copies (`cuTensorMapEncodeTiled`). Elements of one row are contiguous; the innermost axis is
/// first.
#[derive(Clone, Debug, PartialEq)]
pub struct TensorMap {
    /// Where the first element is; its type is the map's.
    pub tensor: Tensor,
    /// Extents in elements, innermost first.
    pub dims: Vec<u64>,
    /// Strides of all axes but the innermost, in bytes: multiples of 16.
    pub strides: Vec<u64>,
    /// Extents of a box in elements, innermost first.
    pub box_dims: Vec<u32>,
    /// Bytes of the swizzle: 0, 32, 64 or 128.
    pub swizzle: u32,
}

/// One launch of a kernel.
pub struct Launch {
    /// What.
    pub kernel: Kernel,
    /// Blocks.
    pub grid: [u32; 3],
    /// With what.
    pub args: Vec<Arg>,
}

impl Kernel {
    /// The same, of which it is known that it does all of its work with any number of blocks.
    #[must_use]
    pub(crate) fn for_any_grid(self) -> Self {
        Kernel { any_grid: true, ..self }
    }
}

impl Launch {
    /// The same with no more blocks than `most`, if the kernel takes any grid.
    pub(crate) fn of_at_most(mut self, most: u32) -> Self {
        if self.kernel.any_grid {
            self.grid[0] = self.grid[0].min(most.max(1));
        }
        self
    }

    /// Whether it may be the same another time: what comes with a launch is its own.
    pub(crate) fn repeats(&self) -> bool {
        !self.args.iter().any(|arg| matches!(arg, Arg::Bytes(_)))
    }

    /// Whether both do the same to the same tensors, to the bits of their numbers.
    pub(crate) fn is_same(&self, other: &Launch) -> bool {
        let same = |a: &Arg, b: &Arg| match (a, b) {
            (Arg::F32(a), Arg::F32(b)) => a.to_bits() == b.to_bits(),
            (Arg::F64(a), Arg::F64(b)) => a.to_bits() == b.to_bits(),
            (Arg::Bytes(_), _) => false,
            (a, b) => a == b,
        };
        let kernel = |launch: &Launch| (launch.kernel.block, launch.kernel.shared_bytes, launch.grid);
        kernel(self) == kernel(other)
            && self.kernel.name == other.kernel.name
            && self.args.len() == other.args.len()
            && self.args.iter().zip(&other.args).all(|(a, b)| same(a, b))
    }
}

/// What a graph is recorded from, in order.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "no device"))]
pub(crate) enum Item<'a> {
    /// Launches of a task.
    Launch(&'a Arc<str>, &'a [Launch]),
    /// A moment whose time is wanted.
    Moment,
}

/// A tensor that only the launches of one op see, in place of scratch where they want a tensor. There is one in an op, of one size or
/// ever smaller ones, each seen whole; a device gives it bytes when it is launched.
pub fn scratch_tensor(dtype: DType, dims: &[usize]) -> Tensor {
    Tensor { buffer: SCRATCH, offset: 0, dtype, shape: crate::tensor::Shape::new(dims) }
}

/// No memory has so many buffers.
pub(crate) const SCRATCH: crate::tensor::BufferId = crate::tensor::BufferId(u32::MAX);

/// Its scratch; kernels number theirs from 0.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "no device"))]
pub(crate) const SCRATCH_SLOT: u8 = 200;

/// Where a stream has what other ranks sent it, until it is added up.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "no device"))]
pub(crate) const NCCL_SLOT: u8 = 201;
