//! Runs launches in the interpreter on tensors of a CPU memory: a kernel's test is then the CPU op on one copy of the inputs,
//! the launches on another, and a comparison.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::collections::BTreeMap;

use ptxsim::{Machine, Module, TensorMapInfo};

use super::{Arg, Launch, TensorMap};
use crate::{
    dtype::{DType, Element},
    memory::Memory,
    tensor::{BufferId, Tensor},
};

/// The whole buffer's bytes.
fn bytes_of(memory: &Memory, whole: Tensor) -> Vec<u8> {
    fn cast<T: Element + bytemuck::Pod>(memory: &Memory, t: Tensor) -> Vec<u8> {
        bytemuck::cast_slice(&memory.download::<T>(t)).to_vec()
    }
    match whole.dtype {
        DType::F64 => cast::<f64>(memory, whole),
        DType::F32 => cast::<f32>(memory, whole),
        DType::Bf16 => cast::<half::bf16>(memory, whole),
        DType::U32 => cast::<u32>(memory, whole),
        DType::U8 => cast::<u8>(memory, whole),
    }
}

fn put_bytes(memory: &Memory, whole: Tensor, bytes: &[u8]) {
    fn cast<T: Element + bytemuck::Pod>(memory: &Memory, t: Tensor, bytes: &[u8]) {
        let mut elements = vec![T::default(); t.len()];
        bytemuck::cast_slice_mut(&mut elements).copy_from_slice(bytes);
        memory.upload(t, &elements);
    }
    match whole.dtype {
        DType::F64 => cast::<f64>(memory, whole, bytes),
        DType::F32 => cast::<f32>(memory, whole, bytes),
        DType::Bf16 => cast::<half::bf16>(memory, whole, bytes),
        DType::U32 => cast::<u32>(memory, whole, bytes),
        DType::U8 => cast::<u8>(memory, whole, bytes),
    }
}

/// Runs the launches of one op, in order, under one seed of the interpreter's asynchrony.
pub fn run(memory: &Memory, seed: u64, launches: &[Launch]) -> Result<(), String> {
    run_with(memory, seed, launches, |_| ())
}

/// The same on a machine that is told more before.
pub fn run_with(
    memory: &Memory,
    seed: u64,
    launches: &[Launch],
    prepare: impl FnOnce(&mut Machine),
) -> Result<(), String> {
    let mut machine = Machine::new(seed);
    prepare(&mut machine);
    let mut buffers: BTreeMap<BufferId, (u64, Tensor)> = BTreeMap::new();
    let mut scratch: BTreeMap<u8, u64> = BTreeMap::new();
    let mut faults = vec![];
    for launch in launches {
        for arg in &launch.args {
            match arg {
                Arg::Tensor(tensor) | Arg::Map(TensorMap { tensor, .. }) => {
                    buffers.entry(tensor.buffer).or_insert_with(|| {
                        let whole = memory.whole(*tensor);
                        let bytes = bytes_of(memory, whole);
                        let address = machine.alloc(bytes.len() as u64);
                        machine.write(address, &bytes).unwrap();
                        (address, whole)
                    });
                }
                Arg::Scratch { slot, bytes } => {
                    scratch.entry(*slot).or_insert_with(|| machine.alloc(*bytes));
                }
                Arg::Fault(fault) => faults.push(fault.clone()),
                _ => {}
            }
        }
    }
    let words = machine.alloc(16);
    machine.write(words, &[0; 16]).unwrap();
    let mut site = 0u32;
    let address = |tensor: &Tensor| buffers[&tensor.buffer].0 + tensor.offset * tensor.dtype.size_bytes() as u64;
    for launch in launches {
        let text = (launch.kernel.emit)();
        let module = Module::parse(&text).map_err(|e| format!("{}: {e}", launch.kernel.name))?;
        let params: Vec<Vec<u8>> = launch
            .args
            .iter()
            .map(|arg| match arg {
                Arg::Tensor(tensor) => address(tensor).to_le_bytes().to_vec(),
                Arg::Scratch { slot, .. } => scratch[slot].to_le_bytes().to_vec(),
                Arg::U32(x) => x.to_le_bytes().to_vec(),
                Arg::U64(x) => x.to_le_bytes().to_vec(),
                Arg::F32(x) => x.to_le_bytes().to_vec(),
                Arg::F64(x) => x.to_le_bytes().to_vec(),
                Arg::Map(map) => TensorMapInfo {
                    address: address(&map.tensor),
                    elem_bytes: map.tensor.dtype.size_bytes() as u32,
                    dims: map.dims.clone(),
                    strides: map.strides.clone(),
                    box_dims: map.box_dims.clone(),
                    swizzle: map.swizzle,
                }
                .encode()
                .unwrap()
                .to_vec(),
                Arg::Bytes(bytes) => {
                    let at = machine.alloc(bytes.len() as u64);
                    machine.write(at, bytes).unwrap();
                    at.to_le_bytes().to_vec()
                }
                Arg::Fault(_) => {
                    site += 1;
                    [words.to_le_bytes(), u64::from(site).to_le_bytes()].concat()
                }
            })
            .collect();
        let block = [launch.kernel.block, 1, 1];
        machine
            .launch(&module, launch.grid, block, launch.kernel.shared_bytes, &params)
            .map_err(|e| format!("{}: {e}", launch.kernel.name))?;
    }
    let mut found = [0; 16];
    machine.read(words, &mut found).unwrap();
    let [claimed, ready, a, b]: [u32; 4] = bytemuck::cast(found);
    assert_eq!(claimed, ready, "what is claimed is told");
    if let Some(fault) = (ready as usize).checked_sub(1).map(|site| &faults[site]) {
        return Err(fault.error([a, b], "test", "set-up").to_string());
    }
    for (address, whole) in buffers.into_values() {
        let mut bytes = vec![0; whole.size_bytes() as usize];
        machine.read(address, &mut bytes).unwrap();
        put_bytes(memory, whole, &bytes);
    }
    Ok(())
}

/// DeepGEMM's measure: 1 - 2 <x, y> / (<x, x> + <y, y>); 0 for equal tensors.
pub fn calc_diff(got: &[f64], want: &[f64]) -> f64 {
    assert_eq!(got.len(), want.len());
    let (mut dot, mut norms) = (0.0, 0.0);
    for (x, y) in got.iter().zip(want) {
        assert!(x.is_finite(), "found {x}, expected {y}");
        dot += x * y;
        norms += x * x + y * y;
    }
    if norms == 0.0 { 0.0 } else { 1.0 - 2.0 * dot / norms }
}
