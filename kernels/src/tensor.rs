//! A tensor is a small handle: which buffer, from which element on, what shape, what type. The bytes live in
//! [`crate::memory::Memory`].

use crate::dtype::DType;

/// Names a buffer of a [`crate::memory::Memory`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BufferId(pub u32);

/// Up to four extents, outermost first. Tensors are contiguous and row-major.
#[derive(Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    dims: [u32; 4],
    rank: u8,
}

impl Shape {
    /// A shape of one to four extents.
    ///
    /// # Panics
    /// If there are more than four extents, or one exceeds u32.
    pub fn new(dims: &[usize]) -> Self {
        assert!(dims.len() <= 4, "a tensor has at most four extents, found {dims:?}");
        let mut out = [1; 4];
        for (o, &d) in out.iter_mut().zip(dims) {
            *o = u32::try_from(d).unwrap_or_else(|_| panic!("an extent fits in u32, found {dims:?}"));
        }
        Shape { dims: out, rank: dims.len() as u8 }
    }

    /// Extents.
    pub fn dims(&self) -> impl ExactSizeIterator<Item = usize> + '_ {
        self.dims[..usize::from(self.rank)].iter().map(|&d| d as usize)
    }

    /// Number of elements.
    pub fn len(&self) -> usize {
        self.dims().product()
    }

    /// Whether an extent is zero.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl std::fmt::Debug for Shape {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_list().entries(self.dims()).finish()
    }
}

impl PartialEq<[usize]> for Shape {
    fn eq(&self, other: &[usize]) -> bool {
        self.dims().eq(other.iter().copied())
    }
}

/// Handle of a contiguous row-major tensor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tensor {
    /// Where the bytes are.
    pub buffer: BufferId,
    /// Element of the buffer that it begins at: 0 but for a part of another tensor.
    pub offset: u64,
    /// Element type.
    pub dtype: DType,
    /// Extents.
    pub shape: Shape,
}

impl Tensor {
    /// Number of elements.
    pub fn len(&self) -> usize {
        self.shape.len()
    }

    /// Whether it has no element.
    pub fn is_empty(&self) -> bool {
        self.shape.is_empty()
    }

    /// Size in bytes.
    pub fn size_bytes(&self) -> u64 {
        self.len() as u64 * self.dtype.size_bytes() as u64
    }

    /// Extent of axis `i`; 1 past the rank.
    pub fn dim(&self, i: usize) -> usize {
        self.shape.dims[i] as usize
    }

    /// Product of all extents but the last.
    pub fn rows(&self) -> usize {
        self.len() / self.cols().max(1)
    }

    /// Last extent.
    pub fn cols(&self) -> usize {
        self.shape.dims().last().unwrap_or(1)
    }

    /// The same bytes under another shape.
    ///
    /// # Panics
    /// If the number of elements differs.
    #[must_use]
    pub fn reshape(mut self, dims: &[usize]) -> Self {
        let shape = Shape::new(dims);
        assert_eq!(shape.len(), self.len(), "reshape {:?} -> {dims:?}", self.shape);
        self.shape = shape;
        self
    }

    /// Elements `start..start + len` of the flat tensor, as a tensor of its own, \[len\]: the same bytes, not a copy. Streams order
    /// accesses by buffer, so two parts of one are one to them.
    ///
    /// # Panics
    /// If it reaches past the tensor.
    #[must_use]
    pub fn slice(mut self, start: usize, len: usize) -> Self {
        assert!(start + len <= self.len(), "elements {start}..{} of a tensor of {:?}", start + len, self.shape);
        self.offset += start as u64;
        self.shape = Shape::new(&[len]);
        self
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{device::Device, memory::Memory};

    #[test]
    fn a_part_of_a_part_is_read_and_written_in_place() {
        let memory = Memory::new(Device::Cpu);
        let x = memory.from_slice(&[2, 4], &[0u32, 1, 2, 3, 4, 5, 6, 7]);
        let part = x.slice(2, 5).slice(1, 3);
        assert_eq!((part.offset, part.len(), part.dim(0)), (3, 3, 3));
        assert_eq!(memory.download::<u32>(part), [3, 4, 5]);
        memory.write::<u32>(part).fill(9);
        assert_eq!(memory.download::<u32>(x), [0, 1, 2, 9, 9, 9, 6, 7]);
        assert_eq!(memory.download::<u32>(part.reshape(&[3, 1])), [9, 9, 9]);
        assert_eq!(memory.download::<u32>(x.slice(8, 0)), [0u32; 0]);
    }

    #[test]
    #[should_panic(expected = "elements 6..9 of a tensor of [2, 4]")]
    fn a_part_lies_within() {
        let memory = Memory::new(Device::Cpu);
        let _ = memory.alloc(DType::F32, &[2, 4]).slice(6, 3);
    }
}
