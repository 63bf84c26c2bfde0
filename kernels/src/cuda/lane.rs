//! A CUDA stream: launches with their arguments resolved, in order.

use std::{collections::BTreeMap, ffi::c_void, sync::Arc};

use cudarc::driver::{
    CudaStream, DriverError, result,
    sys::{
        self, CUtensorMap, CUtensorMapDataType_enum as MapType, CUtensorMapFloatOOBfill_enum as Fill,
        CUtensorMapInterleave_enum as Interleave, CUtensorMapL2promotion_enum as Promotion,
        CUtensorMapSwizzle_enum as Swizzle,
    },
};

use super::{Gpu, bytes::Pieces, fault::Faults, words};
use crate::{
    device::{Share, Target},
    dtype::DType,
    error::{Error, Result},
    memory::Memory,
    ptx::{self, Arg, Launch, TensorMap},
    tensor::Tensor,
};

/// A tensor map as kernels take it: the driver's newer headers align it more than its older ones.
#[repr(C, align(128))]
#[derive(Clone, Copy)]
struct AlignedMap(CUtensorMap);

/// What a map is made from: all of [`TensorMap`], with the tensor's address.
type MapKey = (u64, u8, Vec<u64>, Vec<u64>, Vec<u32>, u32);

/// Maps that are kept; a run has some dozens.
const MOST_MAPS: usize = 4096;

/// A stream of a GPU. One thread drives it.
pub struct Lane {
    gpu: Arc<Gpu>,
    stream: Arc<CudaStream>,
    /// Address and size by slot: what ops need beside their tensors, shared by all of the stream, since one follows the other.
    scratch: BTreeMap<u8, (u64, u64)>,
    /// Counts the times that scratch was at another address afterwards.
    scratch_version: u64,
    maps: BTreeMap<MapKey, AlignedMap>,
    bytes: Pieces,
    faults: Arc<Faults>,
    /// Blocks that a kernel which takes any grid may have.
    most_blocks: Option<u32>,
}

/// What [`ptx::fault`] takes: an address and a number.
#[repr(C)]
#[derive(Clone, Copy)]
struct FaultSite(u64, u64);

/// An argument's bytes, where the driver can take their address.
#[derive(Clone, Copy)]
enum Value {
    U32(u32),
    U64(u64),
    F32(f32),
    F64(f64),
    Map(AlignedMap),
    Fault(FaultSite),
}

impl Value {
    fn address(&self) -> *mut c_void {
        let at: *const c_void = match self {
            Value::U32(x) => std::ptr::from_ref(x).cast(),
            Value::U64(x) => std::ptr::from_ref(x).cast(),
            Value::F32(x) => std::ptr::from_ref(x).cast(),
            Value::F64(x) => std::ptr::from_ref(x).cast(),
            Value::Map(x) => std::ptr::from_ref(x).cast(),
            Value::Fault(x) => std::ptr::from_ref(x).cast(),
        };
        at.cast_mut()
    }
}

impl Lane {
    /// A new stream, ordered with others by events only; `name` is for errors. Where one that has multiprocessors for itself and another
    /// have blocks waiting, its go first: without that they would wait until the last block of the other's kernel has begun.
    pub(crate) fn new(gpu: &Arc<Gpu>, name: &str, share: Share) -> Result<Self> {
        // Lower is earlier, and 0 is the default.
        let priority = if matches!(share, Share::Only(_)) { -1 } else { 0 };
        let stream = gpu.context.new_stream_with_priority(priority).map_err(gpu.failed("making a stream"))?;
        let faults = Arc::new(Faults::new(gpu, name)?);
        let (scratch, maps, bytes) = (BTreeMap::new(), BTreeMap::new(), Pieces::default());
        let most_blocks = Target { share, ..gpu.target() }.most_blocks();
        Ok(Lane { gpu: gpu.clone(), stream, scratch, scratch_version: 0, maps, bytes, faults, most_blocks })
    }

    /// The driver's handle, for another library that puts work on the stream.
    pub(crate) fn handle(&self) -> *mut c_void {
        self.stream.cu_stream().cast()
    }

    /// Whether all that was put on the stream is done.
    pub(crate) fn is_done(&self) -> Result<bool> {
        self.gpu.bind()?;
        // SAFETY: the stream is live.
        match unsafe { sys::cuStreamQuery(self.stream.cu_stream()) } {
            sys::CUresult::CUDA_SUCCESS => Ok(true),
            sys::CUresult::CUDA_ERROR_NOT_READY => Ok(false),
            code => Err(self.gpu.failed("running a kernel")(DriverError(code))),
        }
    }

    /// Blocks that kernels which take any grid may have, if the stream has so many multiprocessors for itself.
    pub(crate) fn most_blocks(&self) -> Option<u32> {
        self.most_blocks
    }

    /// The launches with no more blocks than the stream's share has.
    pub(crate) fn within_share(&self, launches: Vec<Launch>) -> Vec<Launch> {
        let most = self.most_blocks.unwrap_or(u32::MAX);
        launches.into_iter().map(|launch| launch.of_at_most(most)).collect()
    }

    pub(super) fn scratch_version(&self) -> u64 {
        self.scratch_version
    }

    pub(super) fn faults(&self) -> &Arc<Faults> {
        &self.faults
    }

    /// Whether a kernel has found something wrong that nobody was told of: what follows is not worth launching.
    pub(crate) fn has_fault(&self) -> bool {
        self.faults.any()
    }

    pub(crate) fn gpu(&self) -> &Arc<Gpu> {
        &self.gpu
    }

    pub(super) fn stream(&self) -> &CudaStream {
        &self.stream
    }

    pub(super) fn shared_stream(&self) -> &Arc<CudaStream> {
        &self.stream
    }

    /// Loads the kernels, grows the scratch and encodes the maps of the launches.
    pub(crate) fn prepare(&mut self, memory: &Memory, task: &Arc<str>, launches: &[Launch]) -> Result<()> {
        for launch in launches {
            self.gpu.kernel(&launch.kernel)?;
            launch.args.iter().try_for_each(|arg| self.value(memory, task, arg).map(drop))?;
        }
        Ok(())
    }

    /// Waits for all that was launched. What a kernel found wrong is an error here.
    pub(crate) fn synchronize(&self) -> Result<()> {
        self.stream.synchronize().map_err(self.gpu.failed("running a kernel"))?;
        self.faults.take()
    }

    /// Enqueues the launches of one op of `task`.
    pub(crate) fn launch(&mut self, memory: &Memory, task: &Arc<str>, launches: &[Launch]) -> Result<()> {
        self.gpu.context.bind_to_thread().map_err(self.gpu.failed("choosing the device"))?;
        for launch in launches {
            let loaded = self.gpu.kernel(&launch.kernel)?;
            let values = launch.args.iter().map(|arg| self.value(memory, task, arg)).collect::<Result<Vec<_>>>()?;
            let mut params: Vec<*mut c_void> = values.iter().map(Value::address).collect();
            let [x, y, z] = launch.grid;
            if launch.grid.contains(&0) {
                continue;
            }
            // SAFETY: the function stays loaded; the parameters are those of its text, whose tests run it with these; what they point to
            // is copied before the call returns; the tensors live in `memory`, whose buffers are freed after its streams.
            let launched = unsafe {
                result::launch_kernel(
                    loaded.function,
                    (x, y, z),
                    (launch.kernel.block, 1, 1),
                    launch.kernel.shared_bytes,
                    self.stream.cu_stream(),
                    &mut params,
                )
            };
            launched.map_err(|e| Error::Driver {
                device: self.gpu.device(),
                call: "launching a kernel",
                message: format!("`{}` over {:?} blocks: {}", launch.kernel.name, launch.grid, words(e)),
            })?;
        }
        Ok(())
    }

    /// Enqueues a copy from one place of the device to another.
    pub(crate) fn copy(&self, to: u64, from: u64, bytes: usize) -> Result<()> {
        // SAFETY: the caller's tensors and scratch are live, as those of a launch.
        let copied = unsafe { result::memcpy_dtod_async(to, from, bytes, self.stream.cu_stream()) };
        copied.map_err(self.gpu.failed("copying on the device"))
    }

    fn value(&mut self, memory: &Memory, task: &Arc<str>, arg: &Arg) -> Result<Value> {
        Ok(match arg {
            Arg::Tensor(tensor) => Value::U64(self.address(memory, *tensor)?),
            Arg::Scratch { slot, bytes } => Value::U64(self.scratch(*slot, *bytes)?),
            Arg::U32(x) => Value::U32(*x),
            Arg::U64(x) => Value::U64(*x),
            Arg::F32(x) => Value::F32(*x),
            Arg::F64(x) => Value::F64(*x),
            Arg::Map(map) => {
                let address = self.address(memory, map.tensor)?;
                Value::Map(self.map(address, map)?)
            }
            Arg::Bytes(bytes) => Value::U64(self.bytes.push(&self.gpu, &self.stream, bytes)?),
            Arg::Fault(fault) => {
                let (address, site) = self.faults.site(task, fault);
                Value::Fault(FaultSite(address, site))
            }
        })
    }

    fn address(&mut self, memory: &Memory, tensor: Tensor) -> Result<u64> {
        if tensor.buffer == ptx::SCRATCH {
            return self.scratch(ptx::SCRATCH_SLOT, tensor.size_bytes());
        }
        memory.address(tensor)
    }

    /// Grows as it is asked to; giving back the smaller one waits for what uses it.
    pub(crate) fn scratch(&mut self, slot: u8, bytes: u64) -> Result<u64> {
        match self.scratch.get(&slot) {
            Some((address, size)) if *size >= bytes => return Ok(*address),
            Some((address, _)) => self.gpu.free(*address),
            None => {}
        }
        self.scratch.remove(&slot);
        let address = self.gpu.alloc(bytes)?;
        self.scratch_version += 1;
        self.scratch.insert(slot, (address, bytes));
        Ok(address)
    }

    fn map(&mut self, address: u64, map: &TensorMap) -> Result<AlignedMap> {
        let TensorMap { tensor, dims, strides, box_dims, swizzle } = map;
        let key = (address, tensor.dtype as u8, dims.clone(), strides.clone(), box_dims.clone(), *swizzle);
        if let Some(known) = self.maps.get(&key) {
            return Ok(*known);
        }
        let dtype = match tensor.dtype {
            DType::F64 => MapType::CU_TENSOR_MAP_DATA_TYPE_FLOAT64,
            DType::F32 => MapType::CU_TENSOR_MAP_DATA_TYPE_FLOAT32,
            DType::Bf16 => MapType::CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
            DType::U32 => MapType::CU_TENSOR_MAP_DATA_TYPE_UINT32,
            DType::U8 => MapType::CU_TENSOR_MAP_DATA_TYPE_UINT8,
        };
        let swizzle = match swizzle {
            32 => Swizzle::CU_TENSOR_MAP_SWIZZLE_32B,
            64 => Swizzle::CU_TENSOR_MAP_SWIZZLE_64B,
            128 => Swizzle::CU_TENSOR_MAP_SWIZZLE_128B,
            _ => Swizzle::CU_TENSOR_MAP_SWIZZLE_NONE,
        };
        let rank = dims.len();
        let steps = vec![1u32; rank];
        let fits = (1..=5).contains(&rank) && strides.len() + 1 == rank && box_dims.len() == rank;
        let mut encoded = AlignedMap(CUtensorMap { opaque: [0; 16] });
        let code = if fits {
            // SAFETY: the lists have `rank` numbers, one fewer of strides; the map is aligned as the newest driver wants it.
            unsafe {
                sys::cuTensorMapEncodeTiled(
                    &mut encoded.0,
                    dtype,
                    rank as u32,
                    address as *mut c_void,
                    dims.as_ptr(),
                    strides.as_ptr(),
                    box_dims.as_ptr(),
                    steps.as_ptr(),
                    Interleave::CU_TENSOR_MAP_INTERLEAVE_NONE,
                    swizzle,
                    Promotion::CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
                    Fill::CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
                )
            }
        } else {
            sys::CUresult::CUDA_ERROR_INVALID_VALUE
        };
        code.result().map_err(|e| Error::Driver {
            device: self.gpu.device(),
            call: "encoding a tensor map",
            message: format!("{map:?} at {address:#x}: {}", words(e)),
        })?;
        if self.maps.len() >= MOST_MAPS {
            self.maps.clear();
        }
        self.maps.insert(key, encoded);
        Ok(encoded)
    }
}

impl Drop for Lane {
    fn drop(&mut self) {
        // What was launched may use tensors whose memory goes next.
        let _ = self.stream.synchronize();
        for (address, _) in self.scratch.values() {
            self.gpu.free(*address);
        }
        self.bytes.free(&self.gpu);
    }
}
