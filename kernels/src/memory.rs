//! Memory of one device: buffers behind handles, with byte counts.
//!
//! `alloc` takes a free buffer of the same size class before it makes a new one, so that a plan which allocates and releases
//! in launch order (as CUDA's stream-ordered allocators do) reuses memory. On `Device::Meta` buffers have sizes and no bytes:
//! the same plan then tells the peak without touching memory.
//!
//! Reading and writing take a lock that is never waited for: two tasks that meet on one buffer lack an edge between them, and
//! that is reported instead of hidden.

use std::{collections::BTreeMap, ops, sync::Arc};

use parking_lot::{ArcRwLockReadGuard, ArcRwLockWriteGuard, RawRwLock, RwLock};

use crate::{
    device::Device,
    dtype::{DType, Element, Storage},
    tensor::{BufferId, Shape, Tensor},
};

#[derive(Clone)]
struct Buffer {
    storage: Arc<RwLock<Storage>>,
    /// Elements it was made for; the storage of `Meta` has none.
    len: usize,
}

/// All buffers of one device. Cheap to clone; clones share the buffers.
#[derive(Clone)]
pub struct Memory {
    device: Device,
    inner: Arc<RwLock<Inner>>,
}

#[derive(Default)]
struct Inner {
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

/// Shared view of a tensor's elements.
pub struct Ref<T: Element>(ArcRwLockReadGuard<RawRwLock, Storage>, ops::Range<usize>, std::marker::PhantomData<T>);

/// Exclusive view of a tensor's elements.
pub struct RefMut<T: Element>(ArcRwLockWriteGuard<RawRwLock, Storage>, ops::Range<usize>, std::marker::PhantomData<T>);

impl<T: Element> ops::Deref for Ref<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match T::slice(&self.0) {
            Some(s) => &s[self.1.clone()],
            None => panic!("expected a {:?} buffer, found {:?}", T::DTYPE, self.0.dtype()),
        }
    }
}

impl<T: Element> ops::Deref for RefMut<T> {
    type Target = [T];
    fn deref(&self) -> &[T] {
        match T::slice(&self.0) {
            Some(s) => &s[self.1.clone()],
            None => panic!("expected a {:?} buffer, found {:?}", T::DTYPE, self.0.dtype()),
        }
    }
}

impl<T: Element> ops::DerefMut for RefMut<T> {
    fn deref_mut(&mut self) -> &mut [T] {
        let found = self.0.dtype();
        match T::slice_mut(&mut self.0) {
            Some(s) => &mut s[self.1.clone()],
            None => panic!("expected a {:?} buffer, found {found:?}", T::DTYPE),
        }
    }
}

impl Memory {
    /// Empty memory of `device`.
    pub fn new(device: Device) -> Self {
        Memory { device, inner: Arc::default() }
    }

    /// The device the buffers are on.
    pub fn device(&self) -> Device {
        self.device
    }

    /// A tensor of `dims`. Its contents are unspecified: what was there before, or zeros.
    pub fn alloc(&self, dtype: DType, dims: &[usize]) -> Tensor {
        let shape = Shape::new(dims);
        let mut tensor = Tensor { buffer: BufferId(0), offset: 0, dtype, shape };
        let mut inner = self.inner.write();
        if let Some(id) = inner.free.get_mut(&key(&tensor)).and_then(Vec::pop) {
            tensor.buffer = id;
        } else {
            tensor.buffer = BufferId(inner.buffers.len() as u32);
            let len = if self.device == Device::Meta { 0 } else { tensor.len() };
            let storage = Arc::new(RwLock::new(Storage::zeros(dtype, len)));
            inner.buffers.push(Buffer { storage, len: tensor.len() });
            inner.reserved_bytes += tensor.size_bytes();
        }
        inner.live_bytes += tensor.size_bytes();
        inner.peak_bytes = inner.peak_bytes.max(inner.live_bytes);
        tensor
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

    /// The elements, shared.
    ///
    /// # Panics
    /// If a task is writing them (an edge is missing), or the type is another.
    pub fn read<T: Element>(&self, tensor: Tensor) -> Ref<T> {
        let guard = self.buffer(tensor).storage.try_read_arc();
        let guard =
            guard.unwrap_or_else(|| panic!("{tensor:?} is read while another task writes it: an edge is missing"));
        Ref(guard, range(&tensor), std::marker::PhantomData)
    }

    /// The elements, exclusively.
    ///
    /// # Panics
    /// If another task is using them (an edge is missing), or the type is another.
    pub fn write<T: Element>(&self, tensor: Tensor) -> RefMut<T> {
        let guard = self.buffer(tensor).storage.try_write_arc();
        let guard =
            guard.unwrap_or_else(|| panic!("{tensor:?} is written while another task uses it: an edge is missing"));
        RefMut(guard, range(&tensor), std::marker::PhantomData)
    }

    /// Copies `data` in; for set-up, with no task in flight on it.
    pub fn upload<T: Element>(&self, tensor: Tensor, data: &[T]) {
        self.write::<T>(tensor).copy_from_slice(data);
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
