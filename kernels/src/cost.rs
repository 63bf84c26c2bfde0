//! What a task asks of a device. Planning, roofline reports and the virtual clock read nothing else.
//!
//! Floating-point operations are kept apart by the unit and the number format that runs them, since the rates differ by
//! more than ten: products of linear layers run in the compute format, the fused products of core attention in the
//! high-precision one, and all else on vector units.

use std::ops::{Add, AddAssign};

/// Floating-point operations and bytes moved. A multiply-add is two operations.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Cost {
    /// Operations of matrix products of linear layers, in the compute format.
    pub product_flops: u64,
    /// Operations of core attention (scores and values) forward, in the high-precision format.
    pub core_flops: u64,
    /// The same of its input gradient, whose kernels reach another rate; the scores' second computation is in it.
    pub core_grad_flops: u64,
    /// All other operations.
    pub vector_flops: u64,
    /// Bytes read from device memory.
    pub read_bytes: u64,
    /// Bytes written to device memory.
    pub written_bytes: u64,
    /// Of the bytes read and written, those of ops without products: no computation hides them. Recordings fill it in.
    pub streamed_bytes: u64,
    /// Elements of activations and their gradients that products read: what a device that multiplies in a narrower
    /// format than it stores has to convert. Each product counts its own, also where two read the same tensor.
    pub cast_elements: u64,
    /// Bytes put on links to ranks of the same node.
    pub intra_node_bytes: u64,
    /// Bytes put on links to ranks of other nodes.
    pub inter_node_bytes: u64,
}

impl Cost {
    /// Cost of a matrix product [m, k] x [k, n] with elements of `elem_bytes`, of which none is converted.
    pub fn gemm(m: usize, n: usize, k: usize, elem_bytes: usize) -> Self {
        let (m, n, k, e) = (m as u64, n as u64, k as u64, elem_bytes as u64);
        Cost {
            product_flops: 2 * m * n * k,
            read_bytes: (m * k + k * n) * e,
            written_bytes: m * n * e,
            ..Cost::default()
        }
    }

    /// Cost of putting so many bytes on the links, beside what it takes to read and write them.
    pub fn wire(intra_node_bytes: u64, inter_node_bytes: u64) -> Self {
        Cost { intra_node_bytes, inter_node_bytes, ..Cost::default() }
    }

    /// Cost of an op that reads and writes so many bytes with `flops` operations on vector units.
    pub fn stream(flops: u64, read_bytes: u64, written_bytes: u64) -> Self {
        Cost { vector_flops: flops, read_bytes, written_bytes, ..Cost::default() }
    }

    /// The same with `elements` that a narrower format would have to convert.
    #[must_use]
    pub fn casting(self, elements: usize) -> Self {
        Cost { cast_elements: self.cast_elements + elements as u64, ..self }
    }

    /// The same with `elements` of `elem_bytes` each that are read and added to what is written: a residual.
    #[must_use]
    pub fn adding(self, elements: usize, elem_bytes: usize) -> Self {
        self + Cost::stream(elements as u64, (elements * elem_bytes) as u64, 0)
    }

    /// As the cost of one op: if it has no products and uses no link, all its bytes are streamed.
    #[must_use]
    pub fn of_one_op(self) -> Self {
        let has_products = self.product_flops + self.core_flops + self.core_grad_flops > 0;
        let uses_links = self.intra_node_bytes + self.inter_node_bytes > 0;
        let streamed_bytes = if has_products || uses_links { 0 } else { self.memory_bytes() };
        Cost { streamed_bytes, ..self }
    }

    /// Operations of all classes.
    pub fn flops(&self) -> u64 {
        self.product_flops + self.core_flops + self.core_grad_flops + self.vector_flops
    }

    /// Bytes read and written.
    pub fn memory_bytes(&self) -> u64 {
        self.read_bytes + self.written_bytes
    }

    /// Fields by name, in the order they are declared; for files.
    pub fn fields(&self) -> [(&'static str, u64); 10] {
        [
            ("product_flops", self.product_flops),
            ("core_flops", self.core_flops),
            ("core_grad_flops", self.core_grad_flops),
            ("vector_flops", self.vector_flops),
            ("read_bytes", self.read_bytes),
            ("written_bytes", self.written_bytes),
            ("streamed_bytes", self.streamed_bytes),
            ("cast_elements", self.cast_elements),
            ("intra_node_bytes", self.intra_node_bytes),
            ("inter_node_bytes", self.inter_node_bytes),
        ]
    }

    /// The field called `name`, as in [`Cost::fields`].
    pub fn field_mut(&mut self, name: &str) -> Option<&mut u64> {
        Some(match name {
            "product_flops" => &mut self.product_flops,
            "core_flops" => &mut self.core_flops,
            "core_grad_flops" => &mut self.core_grad_flops,
            "vector_flops" => &mut self.vector_flops,
            "read_bytes" => &mut self.read_bytes,
            "written_bytes" => &mut self.written_bytes,
            "streamed_bytes" => &mut self.streamed_bytes,
            "cast_elements" => &mut self.cast_elements,
            "intra_node_bytes" => &mut self.intra_node_bytes,
            "inter_node_bytes" => &mut self.inter_node_bytes,
            _ => return None,
        })
    }
}

impl Add for Cost {
    type Output = Cost;
    fn add(self, o: Cost) -> Cost {
        Cost {
            product_flops: self.product_flops + o.product_flops,
            core_flops: self.core_flops + o.core_flops,
            core_grad_flops: self.core_grad_flops + o.core_grad_flops,
            vector_flops: self.vector_flops + o.vector_flops,
            read_bytes: self.read_bytes + o.read_bytes,
            written_bytes: self.written_bytes + o.written_bytes,
            streamed_bytes: self.streamed_bytes + o.streamed_bytes,
            cast_elements: self.cast_elements + o.cast_elements,
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

#[cfg(test)]
#[path = "cost_tests.rs"]
mod tests;
