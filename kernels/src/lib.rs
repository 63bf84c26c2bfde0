//! What a device can do: tensors, memory, streams and ops, on the CPU today.
#![expect(unsafe_code, reason = "GEMM takes pointers; every block says why it is sound")]

pub mod clock;
pub mod comm;
pub mod cost;
pub mod device;
pub mod dtype;
pub mod error;
pub mod memory;
pub mod mmap;
pub mod ops;
pub mod ptx;
pub mod simd;
pub mod stream;
pub mod tensor;
