//! Runs PTX where there is no GPU: an interpreter that looks for hazards; for tests.
//!
//! [`Module::parse`] reads one entry and decodes it; [`Machine`] is a device with memory, and runs grids. A launch is correct
//! only if it is under every interleaving, so the seed of a machine decides which of the allowed ones happens: warps freeze,
//! lanes that have diverged run in any order, copies land late, tensor instructions compute when they are waited for.
//! What PTX leaves undefined is an error that names the line: out of bounds, misalignment, reads of shared memory that nobody
//! wrote, races between warps and between CTAs, registers and operands touched in flight, missing proxy fences, deadlock.

mod clock;
mod decode;
mod engines;
mod exec;
mod global;
mod inst;
mod mutants;
mod num;
mod sched;
mod shared;
mod state;
mod text;
mod types;
mod warp;

pub use mutants::{Mutant, mutants};

/// A parsed module with one entry.
#[derive(Debug)]
pub struct Module(decode::Func);

impl Module {
    /// Reads PTX text.
    ///
    /// # Errors
    /// Where the text is not understood: line, column, what was expected and what was found.
    pub fn parse(text: &str) -> Result<Module, String> {
        decode::decode(text::parser::parse(text)?).map(Module)
    }
    /// Name of the entry.
    pub fn name(&self) -> &str {
        &self.0.name
    }
    /// Sizes of the entry's parameters in bytes.
    pub fn param_sizes(&self) -> Vec<usize> {
        self.0.params.iter().map(|p| p.bytes).collect()
    }
}

/// What a launch did.
#[derive(Clone, Copy, Debug, Default)]
pub struct Stats {
    /// Instructions executed, counted once a thread.
    pub thread_instructions: u64,
}

/// What `cuTensorMapEncodeTiled` is given.
#[derive(Clone, Debug)]
pub struct TensorMapInfo {
    /// Where the first element is.
    pub address: u64,
    /// Bytes of an element; a reduction adds elements of 2 as bf16, of 4 as f32, of 8 as f64.
    pub elem_bytes: u32,
    /// Extents in elements, innermost first.
    pub dims: Vec<u64>,
    /// Strides of all axes but the innermost, in bytes.
    pub strides: Vec<u64>,
    /// Extents of a box in elements, innermost first.
    pub box_dims: Vec<u32>,
    /// Bytes of the swizzle: 0, 32, 64 or 128.
    pub swizzle: u32,
}

impl TensorMapInfo {
    /// The 128 bytes that a kernel gets.
    ///
    /// # Errors
    /// What the driver would refuse.
    pub fn encode(&self) -> Result<[u8; 128], String> {
        let rank = self.dims.len();
        let inner = u64::from(self.box_dims.first().copied().unwrap_or(0)) * u64::from(self.elem_bytes);
        let refused = if !(1..=5).contains(&rank) {
            Some("1 to 5 axes")
        } else if self.strides.len() + 1 != rank || self.box_dims.len() != rank {
            Some("a stride of each axis but the innermost, and an extent of the box of each axis")
        } else if !matches!(self.elem_bytes, 1 | 2 | 4 | 8) {
            Some("elements of 1, 2, 4 or 8 bytes")
        } else if !self.address.is_multiple_of(16) {
            Some("an address that is a multiple of 16")
        } else if self.strides.iter().any(|s| s % 16 != 0 || *s >= 1 << 40) {
            Some("strides that are multiples of 16 below 2^40")
        } else if self.dims.iter().any(|d| *d == 0 || *d > 1 << 32) {
            Some("extents from 1 to 2^32")
        } else if self.box_dims.iter().any(|b| *b == 0 || *b > 256) {
            Some("extents of the box from 1 to 256")
        } else if !matches!(self.swizzle, 0 | 32 | 64 | 128) {
            Some("a swizzle of 0, 32, 64 or 128 bytes")
        } else if inner % 16 != 0 {
            Some("rows of the box that are multiples of 16 bytes")
        } else if self.swizzle != 0 && inner > u64::from(self.swizzle) {
            Some("rows of the box within the swizzle")
        } else {
            None
        };
        if let Some(wanted) = refused {
            return Err(format!("no tensor map without {wanted}: {self:?}"));
        }
        let mut bytes = [0; 128];
        for (b, w) in bytes.chunks_exact_mut(8).zip(engines::tensor_map::encode(self)) {
            b.copy_from_slice(&w.to_le_bytes());
        }
        Ok(bytes)
    }
}

/// A device: memory, and a seed that decides how late asynchronous work is.
pub struct Machine {
    global: global::Global,
    seed: u64,
    numerics: u64,
    fp8_sum_bits: Option<u32>,
    launches: u64,
}

impl Machine {
    /// A device without allocations.
    pub fn new(seed: u64) -> Self {
        Machine { global: global::Global::default(), seed, numerics: 0, fp8_sum_bits: None, launches: 0 }
    }
    /// Chooses another outcome of approximate instructions within their documented bounds. It does not depend on the seed: as
    /// on a device, the same operands give the same result.
    pub fn set_numerics(&mut self, numerics: u64) {
        self.numerics = numerics;
    }
    /// How exact `wgmma` of 8-bit floats is: with bits given, each instruction aligns its products and what they are added to to the
    /// largest of them, and keeps so many bits of the fraction, as Hopper does with 13; without, it sums in f32.
    pub fn set_fp8_sum_bits(&mut self, bits: Option<u32>) {
        self.fp8_sum_bits = bits;
    }
    /// Address of so many new bytes, aligned to 256; all ones.
    pub fn alloc(&mut self, bytes: u64) -> u64 {
        self.global.alloc(bytes)
    }
    /// Gives them back; addresses are not used again.
    ///
    /// # Errors
    /// If there is no such allocation.
    pub fn free(&mut self, address: u64) -> Result<(), String> {
        self.global.free(address)
    }
    /// Writes bytes.
    ///
    /// # Errors
    /// If they are not within one allocation.
    pub fn write(&mut self, address: u64, bytes: &[u8]) -> Result<(), String> {
        if !bytes.is_empty() {
            self.global.slice(address, bytes.len())?.copy_from_slice(bytes);
        }
        Ok(())
    }
    /// Reads bytes.
    ///
    /// # Errors
    /// If they are not within one allocation.
    pub fn read(&self, address: u64, bytes: &mut [u8]) -> Result<(), String> {
        if !bytes.is_empty() {
            bytes.copy_from_slice(self.global.view(address, bytes.len())?);
        }
        Ok(())
    }
    /// Runs a grid to its end. `params` are the bytes of each parameter, `shared_bytes` those of dynamic shared memory.
    ///
    /// # Errors
    /// What the driver would refuse, and every fault and hazard of the kernel.
    pub fn launch(
        &mut self,
        module: &Module,
        grid: [u32; 3],
        block: [u32; 3],
        shared_bytes: u32,
        params: &[Vec<u8>],
    ) -> Result<Stats, String> {
        let func = &module.0;
        if params.len() != func.params.len() {
            return Err(format!("{}: expected {} parameters, found {}", func.name, func.params.len(), params.len()));
        }
        let mut bytes = vec![0; func.params.last().map_or(0, |p| p.offset + p.bytes)];
        for (p, value) in func.params.iter().zip(params) {
            if value.len() != p.bytes {
                return Err(format!("{}: `{}` is {} bytes, found {}", func.name, p.name, p.bytes, value.len()));
            }
            bytes[p.offset..p.offset + p.bytes].copy_from_slice(value);
        }
        self.launches += 1;
        let seed = self.seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(self.launches);
        let grid = sched::Grid {
            func,
            grid,
            block,
            dynamic_bytes: shared_bytes,
            params: bytes,
            seed,
            numerics: self.numerics,
            fp8_sum_bits: self.fp8_sum_bits,
        };
        let thread_instructions = grid.run(&mut self.global)?;
        Ok(Stats { thread_instructions })
    }
}
