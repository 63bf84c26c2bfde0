//! Memory of one device: buffers behind handles, with byte counts.
//!
//! `alloc` takes a free buffer of the same size class before it makes a new one, so that a plan which allocates and releases
//! in launch order (as CUDA's stream-ordered allocators do) reuses memory. On `Device::Meta` buffers have sizes and no bytes:
//! the same plan then tells the peak without touching memory.
//!
//! Reading and writing take a lock that is never waited for: two tasks that meet on one buffer lack an edge between them, and
//! that is reported instead of hidden.
//!
//! On a GPU, reading gives the host a copy, and writing one that is uploaded when it is dropped: set-up, Record and ops without a
//! kernel need not know where tensors are. A failure (no bytes left, a copy that failed) is kept, and met by whoever asks next:
//! [`Memory::failure`], and each stream over the memory, which runs nothing any more.

use std::{collections::BTreeMap, ops, sync::Arc};

use parking_lot::{ArcRwLockReadGuard, ArcRwLockWriteGuard, Mutex, RawRwLock, RwLock};

use crate::{
    cuda::{self, Gpu},
    device::Device,
    dtype::{DType, Element, Storage},
    error::{Error, Result},
    tensor::{BufferId, Shape, Tensor},
};

#[derive(Clone)]
struct Buffer {
    /// Elements, or none of their type where the host has none; its lock guards them in either case.
    storage: Arc<RwLock<Storage>>,
    /// Elements it was made for.
    len: usize,
    /// Where they are on a GPU; 0 if they are not.
    address: u64,
}

/// All buffers of one device. Cheap to clone; clones share the buffers.
#[derive(Clone)]
pub struct Memory {
    device: Device,
    inner: Arc<RwLock<Inner>>,
    failure: Arc<Mutex<Option<Error>>>,
    gpu: Option<Arc<Gpu>>,
}

#[derive(Default)]
struct Inner {
    /// Where the buffers go back to.
    gpu: Option<Arc<Gpu>>,
    buffers: Vec<Buffer>,
    free: BTreeMap<(DTypeKey, usize), Vec<BufferId>>,
    live_bytes: u64,
    peak_bytes: u64,
    reserved_bytes: u64,
}

type DTypeKey = u8;

fn key(tensor: &Tensor) -> (DTypeKey, usize) {
    (tensor.dtype as u8, tensor.len())
}

/// The tensor's elements among its buffer's.
fn range(tensor: &Tensor) -> ops::Range<usize> {
    let start = tensor.offset as usize;
    start..start + tensor.len()
}

impl Drop for Inner {
    fn drop(&mut self) {
        if let Some(gpu) = &self.gpu {
            self.buffers.iter().filter(|buffer| buffer.address != 0).for_each(|buffer| gpu.free(buffer.address));
        }
    }
}

type ReadGuard = ArcRwLockReadGuard<RawRwLock, Storage>;
type WriteGuard = ArcRwLockWriteGuard<RawRwLock, Storage>;

/// Shared view of a tensor's elements.
pub struct Ref<T: Element> {
    storage: ReadGuard,
    range: ops::Range<usize>,
    element: std::marker::PhantomData<T>,
    /// The buffer's, if `storage` is a copy of it.
    _held: Option<ReadGuard>,
}

/// Exclusive view of a tensor's elements.
pub struct RefMut<T: Element> {
    storage: WriteGuard,
    range: ops::Range<usize>,
    element: std::marker::PhantomData<T>,
    upload: Option<Upload>,
}

/// Where a copy goes when it is dropped.
struct Upload {
    memory: Memory,
    tensor: Tensor,
    _held: WriteGuard,
}

impl<T: Element> ops::Deref for Ref<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match T::slice(&self.storage) {
            Some(s) => &s[self.range.clone()],
            None => panic!("expected a {:?} buffer, found {:?}", T::DTYPE, self.storage.dtype()),
        }
    }
}

impl<T: Element> ops::Deref for RefMut<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match T::slice(&self.storage) {
            Some(s) => &s[self.range.clone()],
            None => panic!("expected a {:?} buffer, found {:?}", T::DTYPE, self.storage.dtype()),
        }
    }
}

impl<T: Element> ops::DerefMut for RefMut<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let found = self.storage.dtype();
        match T::slice_mut(&mut self.storage) {
            Some(s) => &mut s[self.range.clone()],
            None => panic!("expected a {:?} buffer, found {found:?}", T::DTYPE),
        }
    }
}

impl<T: Element> Drop for RefMut<T> {
    fn drop(&mut self) {
        if let Some(Upload { memory, tensor, .. }) = &self.upload
            && let Some(elements) = T::slice(&self.storage)
        {
            memory.put(*tensor, bytemuck::cast_slice(&elements[self.range.clone()]));
        }
    }
}

impl Memory {
    /// Empty memory of `device`. If that is a GPU that cannot be opened, this is the memory's first failure.
    pub fn new(device: Device) -> Self {
        let (gpu, failure) = match device {
            Device::Cuda(ordinal) => cuda::open(ordinal).map_or_else(|e| (None, Some(e)), |gpu| (Some(gpu), None)),
            Device::Cpu | Device::Meta => (None, None),
        };
        let mut inner = Inner::default();
        inner.gpu.clone_from(&gpu);
        Memory { device, inner: Arc::new(RwLock::new(inner)), failure: Arc::new(Mutex::new(failure)), gpu }
    }

    /// The same, for devices that may not be there.
    ///
    /// # Errors
    /// Those of [`cuda::open`].
    pub fn open(device: Device) -> Result<Self> {
        let memory = Memory::new(device);
        memory.failure().map(|()| memory)
    }

    /// The GPU that the buffers are on, if they are.
    pub fn gpu(&self) -> Option<&Arc<Gpu>> {
        self.gpu.as_ref()
    }

    /// What went wrong first, if anything: since then tensors may be without bytes, and no stream runs.
    ///
    /// # Errors
    /// A GPU that cannot be opened, [`Error::OutOfMemory`], or a copy that failed.
    pub fn failure(&self) -> Result<()> {
        self.failure.lock().clone().map_or(Ok(()), Err)
    }

    fn note(&self, result: Result<()>) {
        if let Err(e) = result {
            self.failure.lock().get_or_insert(e);
        }
    }

    /// The device the buffers are on.
    pub fn device(&self) -> Device {
        self.device
    }

    /// A tensor of `dims`. Its contents are unspecified: what was there before, or zeros, or on a GPU anything. If the device has no
    /// bytes for it, that is the memory's failure.
    pub fn alloc(&self, dtype: DType, dims: &[usize]) -> Tensor {
        let shape = Shape::new(dims);
        let mut tensor = Tensor { buffer: BufferId(0), offset: 0, dtype, shape };
        let mut inner = self.inner.write();
        if let Some(id) = inner.free.get_mut(&key(&tensor)).and_then(Vec::pop) {
            tensor.buffer = id;
        } else {
            tensor.buffer = BufferId(inner.buffers.len() as u32);
            let len = if self.device == Device::Cpu { tensor.len() } else { 0 };
            let storage = Arc::new(RwLock::new(Storage::zeros(dtype, len)));
            let address = self.gpu.as_ref().map_or(Ok(0), |gpu| gpu.alloc(tensor.size_bytes()));
            let address = address.unwrap_or_else(|e| {
                self.note(Err(e));
                0
            });
            inner.buffers.push(Buffer { storage, len: tensor.len(), address });
            inner.reserved_bytes += tensor.size_bytes();
        }
        inner.live_bytes += tensor.size_bytes();
        inner.peak_bytes = inner.peak_bytes.max(inner.live_bytes);
        tensor
    }

    /// A tensor with a shape and no bytes, for who only asks for sizes. To read or write it fails: on a GPU as a tensor without bytes,
    /// elsewhere by a panic.
    pub fn shape_only(&self, dtype: DType, dims: &[usize]) -> Tensor {
        let mut inner = self.inner.write();
        let buffer = BufferId(inner.buffers.len() as u32);
        inner.buffers.push(Buffer { storage: Arc::new(RwLock::new(Storage::zeros(dtype, 0))), len: 0, address: 0 });
        Tensor { buffer, offset: 0, dtype, shape: Shape::new(dims) }
    }

    /// Gives the buffer back. The handle must not be used by anything launched later.
    ///
    /// # Panics
    /// If the tensor is a part of a buffer: a buffer is given back whole, once.
    pub fn release(&self, tensor: Tensor) {
        let mut inner = self.inner.write();
        let whole = inner.buffers[tensor.buffer.0 as usize].len;
        assert!(
            tensor.offset == 0 && tensor.len() == whole,
            "{tensor:?} is a part of a buffer of {whole} elements: release the whole"
        );
        inner.live_bytes -= tensor.size_bytes();
        inner.free.entry(key(&tensor)).or_default().push(tensor.buffer);
    }

    /// Bytes allocated and not released now.
    pub fn live_bytes(&self) -> u64 {
        self.inner.read().live_bytes
    }

    /// Most bytes that were live at once.
    pub fn peak_bytes(&self) -> u64 {
        self.inner.read().peak_bytes
    }

    /// Bytes held from the system, free lists included.
    pub fn reserved_bytes(&self) -> u64 {
        self.inner.read().reserved_bytes
    }

    fn buffer(&self, tensor: Tensor) -> Buffer {
        self.inner.read().buffers[tensor.buffer.0 as usize].clone()
    }

    /// Address of the first element on the GPU.
    ///
    /// # Errors
    /// [`Error::Driver`] if it is not there.
    pub(crate) fn address(&self, tensor: Tensor) -> Result<u64> {
        match self.buffer(tensor).address {
            0 => Err(Error::Driver {
                device: self.device.to_string(),
                call: "taking a tensor's address",
                message: format!("{tensor:?} has no bytes there"),
            }),
            address => Ok(address + tensor.offset * tensor.dtype.size_bytes() as u64),
        }
    }

    /// Copies a tensor's bytes to the GPU. Once the memory has failed, nothing.
    fn put(&self, tensor: Tensor, bytes: &[u8]) {
        if let Some(gpu) = self.gpu.as_ref().filter(|_| self.failure.lock().is_none()) {
            self.note(self.address(tensor).and_then(|address| gpu.upload(address, bytes)));
        }
    }

    /// A copy of a tensor's elements on the GPU; zeros once the memory has failed.
    fn fetch<T: Element>(&self, tensor: Tensor) -> Arc<RwLock<Storage>> {
        assert_eq!(T::DTYPE, tensor.dtype, "a tensor is read and written as what it is");
        let mut storage = Storage::zeros(tensor.dtype, tensor.len());
        if let (Some(gpu), Some(elements)) = (&self.gpu, T::slice_mut(&mut storage))
            && self.failure.lock().is_none()
        {
            let bytes = bytemuck::cast_slice_mut(elements);
            self.note(self.address(tensor).and_then(|address| gpu.download(address, bytes)));
        }
        Arc::new(RwLock::new(storage))
    }

    /// The elements, shared; a copy, if the device is a GPU.
    ///
    /// # Panics
    /// If a task is writing them (an edge is missing), or the type is another.
    pub fn read<T: Element>(&self, tensor: Tensor) -> Ref<T> {
        let guard = self.buffer(tensor).storage.try_read_arc();
        let guard =
            guard.unwrap_or_else(|| panic!("{tensor:?} is read while another task writes it: an edge is missing"));
        let element = std::marker::PhantomData;
        match self.device {
            Device::Cuda(_) => {
                let storage = self.fetch::<T>(tensor).read_arc();
                Ref { storage, range: 0..tensor.len(), element, _held: Some(guard) }
            }
            Device::Cpu | Device::Meta => Ref { storage: guard, range: range(&tensor), element, _held: None },
        }
    }

    /// The elements, exclusively; a copy that is uploaded when it is dropped, if the device is a GPU.
    ///
    /// # Panics
    /// If another task is using them (an edge is missing), or the type is another.
    pub fn write<T: Element>(&self, tensor: Tensor) -> RefMut<T> {
        let guard = self.buffer(tensor).storage.try_write_arc();
        let guard =
            guard.unwrap_or_else(|| panic!("{tensor:?} is written while another task uses it: an edge is missing"));
        let element = std::marker::PhantomData;
        match self.device {
            Device::Cuda(_) => {
                let upload = Upload { memory: self.clone(), tensor, _held: guard };
                let storage = self.fetch::<T>(tensor).write_arc();
                RefMut { storage, range: 0..tensor.len(), element, upload: Some(upload) }
            }
            Device::Cpu | Device::Meta => RefMut { storage: guard, range: range(&tensor), element, upload: None },
        }
    }

    /// Copies `data` in; for set-up, with no task in flight on it.
    pub fn upload<T: Element>(&self, tensor: Tensor, data: &[T]) {
        if self.gpu.is_none() {
            return self.write::<T>(tensor).copy_from_slice(data);
        }
        assert_eq!(
            (T::DTYPE, tensor.len()),
            (tensor.dtype, data.len()),
            "{tensor:?} is filled with as many elements of its type"
        );
        self.put(tensor, bytemuck::cast_slice(data));
    }

    /// A new tensor holding `data`.
    pub fn from_slice<T: Element>(&self, dims: &[usize], data: &[T]) -> Tensor {
        let tensor = self.alloc(T::DTYPE, dims);
        if self.device != Device::Meta {
            self.upload(tensor, data);
        }
        tensor
    }

    /// The whole buffer that a tensor is in, or a part of, as one row.
    pub fn whole(&self, tensor: Tensor) -> Tensor {
        let len = self.buffer(tensor).len;
        Tensor { offset: 0, shape: Shape::new(&[len]), ..tensor }
    }

    /// Copies the elements out; for tests and Record, after a synchronize.
    pub fn download<T: Element>(&self, tensor: Tensor) -> Vec<T> {
        self.read::<T>(tensor).to_vec()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_released_buffer_serves_the_next_tensor_of_its_size() {
        let memory = Memory::new(Device::Cpu);
        let a = memory.alloc(DType::F32, &[4, 2]);
        memory.release(a);
        let b = memory.alloc(DType::F32, &[8]);
        assert_eq!(a.buffer, b.buffer);
        assert_eq!((memory.live_bytes(), memory.peak_bytes(), memory.reserved_bytes()), (32, 32, 32));
    }

    #[test]
    fn meta_counts_bytes_and_holds_none() {
        let memory = Memory::new(Device::Meta);
        let t = memory.alloc(DType::Bf16, &[1 << 20, 1 << 10]);
        assert_eq!((t.size_bytes(), memory.peak_bytes()), (2 << 30, 2 << 30));
    }

    #[test]
    fn a_shape_alone_takes_no_bytes() {
        let memory = Memory::new(Device::Cpu);
        let t = memory.shape_only(DType::Bf16, &[3, 4]);
        assert_eq!((t.dim(1), t.size_bytes(), memory.live_bytes(), memory.reserved_bytes()), (4, 24, 0, 0));
        let read = || memory.read::<half::bf16>(t).len();
        assert!(std::panic::catch_unwind(std::panic::AssertUnwindSafe(read)).is_err(), "there is nothing to read");
        assert_ne!(memory.alloc(DType::Bf16, &[3, 4]).buffer, t.buffer);
    }

    #[test]
    #[should_panic(expected = "an edge is missing")]
    fn a_write_beside_a_read_is_reported() {
        let memory = Memory::new(Device::Cpu);
        let t = memory.from_slice(&[2], &[1f32, 2.0]);
        let _reader = memory.read::<f32>(t);
        memory.write::<f32>(t);
    }

    #[test]
    #[should_panic(expected = "is a part of a buffer of 4 elements: release the whole")]
    fn a_part_is_not_released() {
        let memory = Memory::new(Device::Meta);
        memory.release(memory.alloc(DType::F32, &[4]).slice(0, 2));
    }
}
