//! What members bring to a meeting, as bytes for those that are other processes, and what comes of it. Bytes are lists, each after its
//! length.

use std::{ops::Range, sync::Arc};

use bytemuck::{AnyBitPattern, NoUninit};

/// What a member brings to a meeting.
pub(super) trait Brought: Send + Sync + Sized + 'static {
    /// What `member` of `num_members` has to have of it.
    fn pack(&self, member: usize, num_members: usize) -> Packed;
    /// From those bytes; `None` if they are none that [`Brought::pack`] makes.
    fn unpack(bytes: &[u8]) -> Option<Self>;
}

/// What one member has to have, as bytes.
#[derive(Default)]
pub(super) struct Packed {
    pub bytes: Vec<u8>,
    /// So many of them are elements as they are encoded, which is what meters count. The others say whose and where they are.
    pub num_payload_bytes: u64,
}

impl Packed {
    /// Appends a list.
    pub fn put<T: NoUninit>(&mut self, list: &[T]) {
        self.bytes.extend((list.len() as u64).to_le_bytes());
        self.bytes.extend(bytemuck::cast_slice::<T, u8>(list));
    }

    /// Appends a list of elements.
    pub fn put_payload<T: NoUninit>(&mut self, list: &[T]) {
        self.put(list);
        self.num_payload_bytes += size_of_val(list) as u64;
    }
}

/// What comes of a meeting.
pub(super) struct Met<T> {
    /// What each member brought; of others, what this one has to have.
    pub all: Vec<Arc<T>>,
    /// Until all had.
    pub nanos: u64,
    /// Payload that was handed to the engine for each member; `None` where members share memory and nothing is copied.
    pub handed_bytes: Option<Vec<u64>>,
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
    fn pack(&self, _: usize, _: usize) -> Packed {
        let bytes = bytemuck::cast_slice(self).to_vec();
        Packed { num_payload_bytes: bytes.len() as u64, bytes }
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
    fn pack(&self, member: usize, _: usize) -> Packed {
        let range = self.parts.as_ref().map_or(0..self.data.len(), |parts| parts[member].clone());
        let mut bytes = (range.start as u64).to_le_bytes().to_vec();
        let elements = bytemuck::cast_slice::<T, u8>(&self.data[range]);
        bytes.extend(elements);
        Packed { bytes, num_payload_bytes: elements.len() as u64 }
    }

    fn unpack(bytes: &[u8]) -> Option<Self> {
        let (first, data) = bytes.split_first_chunk()?;
        Some(Addends { first: u64::from_le_bytes(*first) as usize, data: Vec::unpack(data)?, parts: None })
    }
}

/// Bytes for the first member.
pub(super) struct ForFirst(pub Vec<u8>);

impl Brought for ForFirst {
    fn pack(&self, member: usize, _: usize) -> Packed {
        if member == 0 { self.0.pack(0, 0) } else { Packed::default() }
    }

    fn unpack(bytes: &[u8]) -> Option<Self> {
        Some(ForFirst(bytes.to_vec()))
    }
}
