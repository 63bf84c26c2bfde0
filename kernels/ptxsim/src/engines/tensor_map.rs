//! Tensor maps as this interpreter writes them, and the boxes they describe.

use super::ops::MapField;
use crate::TensorMapInfo;

/// Marks the 128 bytes as a map.
const MAGIC: u64 = 0x7a;
const DIMS: usize = 2;
const STRIDES: usize = 7;
const BOX: usize = 11;

/// A map as copies use it.
#[derive(Clone, Debug)]
pub(crate) struct TensorMap {
    pub address: u64,
    pub elem: usize,
    pub swizzle: usize,
    pub dims: Vec<u64>,
    /// Of each axis, in bytes.
    pub strides: Vec<u64>,
    pub box_dims: Vec<u64>,
}

/// The 16 words of a map.
pub(crate) fn encode(info: &TensorMapInfo) -> [u64; 16] {
    let mut m = [0; 16];
    m[0] = info.address;
    m[1] = info.dims.len() as u64 | u64::from(info.elem_bytes) << 8 | u64::from(info.swizzle) << 16 | MAGIC << 56;
    m[DIMS..][..info.dims.len()].copy_from_slice(&info.dims);
    m[STRIDES..][..info.strides.len()].copy_from_slice(&info.strides);
    for (w, b) in m[BOX..].iter_mut().zip(&info.box_dims) {
        *w = (*b).into();
    }
    m
}

impl TensorMap {
    /// From the bytes that a kernel was given.
    pub(crate) fn read(bytes: &[u8]) -> Result<TensorMap, String> {
        let word = |i: usize| {
            let mut x = [0; 8];
            x.copy_from_slice(&bytes[8 * i..8 * i + 8]);
            u64::from_le_bytes(x)
        };
        if bytes.len() != 128 || word(1) >> 56 != MAGIC {
            return Err("there is no tensor map at this address".to_owned());
        }
        let rank = (word(1) & 255) as usize;
        if !(1..=5).contains(&rank) {
            return Err(format!("a tensor map of rank {rank}"));
        }
        let elem = word(1) >> 8 & 255;
        let mut strides = vec![elem];
        strides.extend((0..rank - 1).map(|i| word(STRIDES + i)));
        Ok(TensorMap {
            address: word(0),
            elem: elem as usize,
            swizzle: (word(1) >> 16 & 0xffff) as usize,
            dims: (0..rank).map(|i| word(DIMS + i)).collect(),
            strides,
            box_dims: (0..rank).map(|i| word(BOX + i)).collect(),
        })
    }

    /// Bytes of a box in shared memory.
    pub(crate) fn box_bytes(&self) -> usize {
        self.box_dims.iter().product::<u64>() as usize * self.elem
    }

    /// For each row of the box at `coords`: offset in shared memory before swizzling, and for each of its elements the global
    /// address if it is within the tensor. Rows are what is contiguous: one run of the innermost axis.
    pub(crate) fn rows(&self, coords: &[i32]) -> Vec<(usize, Row)> {
        let inner = self.box_dims[0] as i64;
        let outer: u64 = self.box_dims[1..].iter().product();
        (0..outer)
            .map(|row| {
                let (mut q, mut at, mut inside) = (row, self.address, true);
                for (d, c) in coords.iter().enumerate().skip(1) {
                    let x = i64::from(*c) + (q % self.box_dims[d]) as i64;
                    q /= self.box_dims[d];
                    inside &= (0..self.dims[d] as i64).contains(&x);
                    at = at.wrapping_add((x as u64).wrapping_mul(self.strides[d]));
                }
                let first = (-i64::from(coords[0])).clamp(0, inner);
                let last = (self.dims[0] as i64 - i64::from(coords[0])).clamp(first, inner);
                let from = at.wrapping_add(((i64::from(coords[0]) + first) as u64).wrapping_mul(self.elem as u64));
                let (skip, len) = (first as usize * self.elem, (last - first) as usize * self.elem);
                let offset = row as usize * inner as usize * self.elem;
                (offset, Row { skip, len: if inside { len } else { 0 }, from })
            })
            .collect()
    }
}

/// A row of a box: bytes `skip..skip + len` of it come from global address `from`, the others are outside the tensor.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Row {
    pub skip: usize,
    pub len: usize,
    pub from: u64,
}

/// Where the hardware puts the byte of address `a`: 16-byte chunks are exchanged by the bits above 128 bytes.
pub(crate) fn swizzle(a: usize, bytes: usize) -> usize {
    match bytes {
        128 => a ^ ((a >> 7) & 7) << 4,
        64 => a ^ ((a >> 7) & 3) << 4,
        32 => a ^ ((a >> 7) & 1) << 4,
        _ => a,
    }
}

/// Changes a field of a map in memory.
pub(crate) fn replace(bytes: &mut [u8], field: MapField, value: u64) -> Result<(), String> {
    let rank = TensorMap::read(bytes)?.dims.len();
    let word = match field {
        MapField::Address => 0,
        MapField::Dim(i) if i < rank => DIMS + i,
        MapField::Stride(i) if i + 1 < rank => STRIDES + i,
        MapField::Box(i) if i < rank => BOX + i,
        _ => return Err(format!("{field:?} of a tensor map of rank {rank}")),
    };
    bytes[8 * word..8 * word + 8].copy_from_slice(&value.to_le_bytes());
    Ok(())
}
