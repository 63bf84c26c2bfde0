//! What members bring to a meeting, as bytes for those that are other processes. Lists, each after its length.

use std::{ops::Range, sync::Arc};

use bytemuck::{AnyBitPattern, NoUninit};

/// What a member brings to a meeting.
pub(super) trait Brought: Send + Sync + Sized + 'static {
    /// What `member` of `num_members` has to have of it.
    fn pack(&self, member: usize, num_members: usize) -> Vec<u8>;
    /// From those bytes; `None` if they are none that [`Brought::pack`] makes.
    fn unpack(bytes: &[u8]) -> Option<Self>;
}

/// Appends a list.
pub(super) fn put<T: NoUninit>(to: &mut Vec<u8>, list: &[T]) {
    to.extend((list.len() as u64).to_le_bytes());
    to.extend(bytemuck::cast_slice::<T, u8>(list));
}

/// Takes the list that was appended first.
pub(super) fn take<T: AnyBitPattern + NoUninit>(from: &mut &[u8]) -> Option<Vec<T>> {
    let (len, rest) = from.split_first_chunk()?;
    let size = usize::try_from(u64::from_le_bytes(*len)).ok()?.checked_mul(size_of::<T>())?;
    let (list, rest) = rest.split_at_checked(size)?;
    *from = rest;
    Some(elements(list))
}

fn elements<T: AnyBitPattern>(bytes: &[u8]) -> Vec<T> {
    bytes.chunks_exact(size_of::<T>()).map(bytemuck::pod_read_unaligned).collect()
}

impl<T: NoUninit + AnyBitPattern + Send + Sync> Brought for Vec<T> {
    fn pack(&self, _: usize, _: usize) -> Vec<u8> {
        bytemuck::cast_slice(self).to_vec()
    }

    fn unpack(bytes: &[u8]) -> Option<Self> {
        bytes.len().is_multiple_of(size_of::<T>()).then(|| elements(bytes))
    }
}

/// A member's elements from `first` on. Its own are all here; another member gets those that it adds up.
pub(super) struct Addends<T> {
    pub first: usize,
    pub data: Vec<T>,
    /// Who adds up what; everybody all of it, if it is not said.
    pub parts: Option<Arc<[Range<usize>]>>,
}

impl<T: NoUninit + AnyBitPattern + Send + Sync> Brought for Addends<T> {
    fn pack(&self, member: usize, _: usize) -> Vec<u8> {
        let range = self.parts.as_ref().map_or(0..self.data.len(), |parts| parts[member].clone());
        let mut bytes = (range.start as u64).to_le_bytes().to_vec();
        bytes.extend(bytemuck::cast_slice::<T, u8>(&self.data[range]));
        bytes
    }

    fn unpack(bytes: &[u8]) -> Option<Self> {
        let (first, data) = bytes.split_first_chunk()?;
        Some(Addends { first: u64::from_le_bytes(*first) as usize, data: Vec::unpack(data)?, parts: None })
    }
}
