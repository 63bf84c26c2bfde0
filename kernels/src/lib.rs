//! What a device can do: tensors, memory, streams and ops, on processors and on NVIDIA GPUs.
#![expect(unsafe_code, reason = "GEMM and drivers take pointers; every block says why it is sound")]

pub mod check;
pub mod clock;
pub mod comm;
pub mod cost;
#[cfg(feature = "cuda")]
pub mod cuda;
#[cfg(not(feature = "cuda"))]
#[path = "cuda_absent.rs"]
pub mod cuda;
pub mod device;
pub mod dtype;
pub mod error;
pub mod fp8;
pub mod memory;
pub mod mmap;
pub mod ops;
pub mod overlap;
pub mod ptx;
pub mod simd;
pub mod speed;
pub mod stream;
pub mod tensor;
