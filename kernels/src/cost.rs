//! What a task asks of a device. Planning, roofline reports and the virtual clock read nothing else.

use std::ops::{Add, AddAssign};

/// Floating-point operations and bytes moved. A multiply-add is two operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Floating-point operations.
    pub flops: u64,
    /// Bytes read from device memory.
    pub read_bytes: u64,
    /// Bytes written to device memory.
    pub written_bytes: u64,
    /// Bytes put on links between ranks of one node.
    pub intra_node_bytes: u64,
    /// Bytes put on links between nodes.
    pub inter_node_bytes: u64,
}

impl Cost {
    /// Cost of a matrix product [m, k] x [k, n] with elements of `elem_bytes`.
    pub fn gemm(m: usize, n: usize, k: usize, elem_bytes: usize) -> Self {
        let (m, n, k, e) = (m as u64, n as u64, k as u64, elem_bytes as u64);
        Cost { flops: 2 * m * n * k, read_bytes: (m * k + k * n) * e, written_bytes: m * n * e, ..Cost::default() }
    }

    /// Cost of putting so many bytes on the links, beside what it takes to read and write them.
    pub fn wire(intra_node_bytes: u64, inter_node_bytes: u64) -> Self {
        Cost { intra_node_bytes, inter_node_bytes, ..Cost::default() }
    }

    /// Cost of an op that reads and writes so many bytes with `flops` operations.
    pub fn stream(flops: u64, read_bytes: u64, written_bytes: u64) -> Self {
        Cost { flops, read_bytes, written_bytes, ..Cost::default() }
    }
}

impl Add for Cost {
    type Output = Cost;
    fn add(self, o: Cost) -> Cost {
        Cost {
            flops: self.flops + o.flops,
            read_bytes: self.read_bytes + o.read_bytes,
            written_bytes: self.written_bytes + o.written_bytes,
            intra_node_bytes: self.intra_node_bytes + o.intra_node_bytes,
            inter_node_bytes: self.inter_node_bytes + o.inter_node_bytes,
        }
    }
}

impl AddAssign for Cost {
    fn add_assign(&mut self, o: Cost) {
        *self = *self + o;
    }
}

impl std::iter::Sum for Cost {
    fn sum<I: Iterator<Item = Cost>>(iter: I) -> Cost {
        iter.fold(Cost::default(), Add::add)
    }
}
