//! Rows of a sequence in a cache with pages ([`crate::ops::paged`]): where they are, brought together if they lie apart.
//!
//! gather (x, y, pages, n, per_row, shift, mask: u32): a vector of neighbours a thread; row i of y is row `i & mask` of page
//! `pages[i >> shift]` of x. Time: the sequence's rows twice over memory bandwidth, and once more by attention.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, Reg},
    golden::Variant,
    parts::{self, copy_bits, count, div_rem, flat, load_u32},
};
use crate::{
    dtype::DType,
    ops::paged::{Sequence, Sequences},
    ptx,
    tensor::Tensor,
};

/// The rows of a sequence, one after the other, and what brings them there: nothing if its pages follow each other. Takes scratch
/// `slot`.
pub(super) fn rows(cache: Tensor, sequences: &Sequences, sequence: &Sequence, slot: u8) -> (Arg, Vec<Launch>) {
    let (width, len) = (cache.len() / cache.dim(0).max(1), sequence.len());
    if let Some(first) = sequences.contiguous(sequence) {
        return (Arg::Tensor(cache.slice(first * width, len * width)), vec![]);
    }
    let y = Arg::Scratch { slot, bytes: (len * width * cache.dtype.size_bytes()) as u64 };
    let lanes = parts::lanes(&[cache], width);
    let ((pages, of_page), items) = (page_table(sequences, sequence), len * width / lanes);
    let mut args = vec![Arg::Tensor(cache), y.clone(), pages];
    args.extend([items, width / lanes].map(|n| Arg::U32(count(n))));
    args.extend(of_page);
    let kernel = gather_kernel(cache.dtype.size_bytes(), lanes);
    (y, vec![Launch { kernel, grid: parts::flat_grid(items, 1), args }])
}

/// The pages of a sequence, and shift and mask of a position in them.
pub(super) fn page_table(sequences: &Sequences, sequence: &Sequence) -> (Arg, [Arg; 2]) {
    let pages: Vec<u8> = sequences.pages(sequence).iter().flat_map(|page| page.to_le_bytes()).collect();
    let page = sequences.page();
    (Arg::Bytes(pages.into()), [page.trailing_zeros() as usize, page - 1].map(|n| Arg::U32(count(n))))
}

/// Row of a position: `position & mask` of page `pages[position >> shift]`.
pub(super) fn row_of(k: &mut Assembler, pages: Reg<B64>, position: Reg<B32>, [shift, mask]: [Reg<B32>; 2]) -> Reg<B32> {
    let (page, row) = (k.reg::<B32>(), k.reg::<B32>());
    ptx!(k, "shr.u32 {page}, {position}, {shift};");
    let page = load_u32(k, pages, page);
    ptx!(k, "and.b32 {row}, {position}, {mask};");
    ptx!(k, "shl.b32 {page}, {page}, {shift};");
    ptx!(k, "or.b32 {row}, {row}, {page};");
    row
}

fn gather_kernel(elem_bytes: usize, lanes: usize) -> Kernel {
    parts::kernel(format!("gather_pages_b{}_x{lanes}", 8 * elem_bytes), move |k| {
        let (x, y, pages) = (k.pointer("x"), k.pointer("y"), k.pointer("pages"));
        let (n, per_row, shift, mask) = (k.u32("n"), k.u32("per_row"), k.u32("shift"), k.u32("mask"));
        flat(k, n, 1, |k, i, _| {
            let (row, column) = div_rem(k, i, per_row);
            let from = row_of(k, pages, row, [shift, mask]);
            let (at_x, at_y, part) = (k.reg::<B64>(), k.reg::<B64>(), k.reg::<B64>());
            let bytes = elem_bytes * lanes;
            ptx!(k, "mul.wide.u32 {part}, {column}, {bytes};");
            ptx!(k, "mul.wide.u32 {at_x}, {from}, {per_row};");
            ptx!(k, "mad.lo.u64 {at_x}, {at_x}, {bytes}, {part};");
            ptx!(k, "add.u64 {at_x}, {at_x}, {x};");
            ptx!(k, "mad.wide.u32 {at_y}, {i}, {bytes}, {y};");
            copy_bits(k, at_x, at_y, elem_bytes, lanes);
        });
    })
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    let kernels = [gather_kernel(DType::Bf16.size_bytes(), 8), gather_kernel(1, 16)];
    kernels.map(|kernel| Variant::new(kernel, 32)).into()
}
