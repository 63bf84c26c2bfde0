//! The counting sort of slots by expert, stable, in two kernels and without a wait of the host.
//!
//! - count (indices, histograms, n, chunk, fault): block b counts the experts of slots `b chunk..(b + 1) chunk` into row b of the
//!   histograms [blocks, e]. An index past the last expert is told of, and taken for the last in both kernels, so that the order is one.
//! - scatter (indices, histograms, offsets, row_of_slot, token_of_row, n, chunk, k, blocks): each block adds up the histograms: an
//!   expert's rows begin after all rows of earlier experts, and a block's after those of earlier blocks. Inside, warp w has its own
//!   contiguous part of the chunk and its own counters; lanes that meet at one expert are ranked by `match.any`.
//!
//! Counters are integers: the order of the atomic additions in shared memory does not show. Barriers of the block: after zeroing, in
//! the prefix sums (which ends counting) and after them; within the last loop a warp's lanes wait for each other before and after
//! the counter moves.
//!
//! Time: 8 n bytes read, 8 n written; the histograms are at most 128 rows and stay in the second cache.

use crate::{
    dtype::DType,
    ops::permute::Order,
    ptx,
    ptx::{
        Arg, Kernel, Launch,
        asm::{Assembler, B32, B64, Pred, Reg},
        fault::{Fault, Report},
        fold::exclusive_scan,
        parts::{self, BLOCK, count, div_rem, element, load_u32, special, strided},
    },
    tensor::Tensor,
};

const WARPS: u32 = BLOCK / 32;
/// Slots of one block, at least.
const MIN_CHUNK: u32 = 1024;
/// Blocks, at most: each reads the histograms of all.
const MAX_BLOCKS: u32 = 128;
/// Experts, at most: a counter each for every warp is 32 KiB of shared memory.
pub const MAX_EXPERTS: usize = 1024;

/// Assigns the order of indices [t, k], as [`crate::ops::permute::sort`].
///
/// # Panics
/// Above [`MAX_EXPERTS`].
pub fn sort(indices: Tensor, order: Order) -> Vec<Launch> {
    let (n, k, e) = (count(indices.len()), count(indices.cols()), order.offsets.len() - 1);
    assert!(e <= MAX_EXPERTS, "sort by expert: at most {MAX_EXPERTS} experts, found {e}");
    let blocks = n.div_ceil(MIN_CHUNK).clamp(1, MAX_BLOCKS);
    let chunk = n.div_ceil(blocks).next_multiple_of(BLOCK).max(BLOCK);
    let blocks = n.div_ceil(chunk).max(1);
    let histograms = Arg::Scratch { slot: 0, bytes: 4 * u64::from(blocks) * e.max(1) as u64 };
    let grid = [blocks, 1, 1];
    let outputs = [order.offsets, order.row_of_slot, order.token_of_row].map(Arg::Tensor);
    let fault = Arg::Fault(Fault::Expert { num: e as u32, per_token: k });
    let counting = Launch {
        kernel: count_kernel(e),
        grid,
        args: vec![Arg::Tensor(indices), histograms.clone(), Arg::U32(n), Arg::U32(chunk), fault],
    };
    if e == 0 && n > 0 {
        return vec![counting];
    }
    let mut args = vec![Arg::Tensor(indices), histograms];
    args.extend(outputs);
    args.extend([n, chunk, k.max(1), blocks].map(Arg::U32));
    vec![counting, Launch { kernel: scatter_kernel(e), grid, args }]
}

/// Slots `first..end` of this block.
fn span(k: &mut Assembler, n: Reg<B32>, chunk: Reg<B32>) -> (Reg<B32>, Reg<B32>) {
    let (block, first, end) = (special(k, "%ctaid.x"), k.reg::<B32>(), k.reg::<B32>());
    ptx!(k, "mul.lo.u32 {first}, {block}, {chunk};");
    ptx!(k, "add.u32 {end}, {first}, {chunk};");
    ptx!(k, "min.u32 {end}, {end}, {n};");
    (first, end)
}

/// Address of word `i` after `base` in shared memory.
fn word(k: &mut Assembler, base: Reg<B32>, i: Reg<B32>) -> Reg<B32> {
    let at = k.reg::<B32>();
    ptx!(k, "mad.lo.u32 {at}, {i}, 4, {base};");
    at
}

fn clear(k: &mut Assembler, base: Reg<B32>, words: u32) {
    let (tid, end) = (special(k, "%tid.x"), k.reg::<B32>());
    ptx!(k, "mov.u32 {end}, {words};");
    strided(k, tid, end, BLOCK, |k, i| {
        let at = word(k, base, i);
        ptx!(k, "st.shared.u32 [{at}], 0;");
    });
}

pub(super) fn count_kernel(e: usize) -> Kernel {
    parts::kernel(format!("sort_count_e{e}"), move |k| {
        let (indices, histograms, n, chunk) =
            (k.pointer("indices"), k.pointer("histograms"), k.u32("n"), k.u32("chunk"));
        let fault = Report::param(k);
        let name = k.shared(4, "counters", 4 * e.max(1));
        let (counters, tid) = (special(k, &name), special(k, "%tid.x"));
        clear(k, counters, e.max(1) as u32);
        ptx!(k, "bar.sync 0;");
        let (first, end) = span(k, n, chunk);
        ptx!(k, "add.u32 {first}, {first}, {tid};");
        strided(k, first, end, BLOCK, |k, i| {
            let (expert, bad) = (load_u32(k, indices, i), k.reg::<Pred>());
            ptx!(k, "setp.ge.u32 {bad}, {expert}, {e};");
            fault.tell(k, bad, i, expert);
            ptx!(k, "min.u32 {expert}, {expert}, {};", e.max(1) - 1);
            let at = word(k, counters, expert);
            ptx!(k, "red.shared.add.u32 [{at}], 1;");
        });
        ptx!(k, "bar.sync 0;");
        let (block, num_experts, row) = (special(k, "%ctaid.x"), special(k, &e.to_string()), k.reg::<B32>());
        ptx!(k, "mul.lo.u32 {row}, {block}, {e};");
        strided(k, tid, num_experts, BLOCK, |k, i| {
            let (from, to, x) = (word(k, counters, i), k.reg::<B32>(), k.reg::<B32>());
            ptx!(k, "ld.shared.u32 {x}, [{from}];");
            ptx!(k, "add.u32 {to}, {row}, {i};");
            let to = element(k, histograms, to, DType::U32);
            ptx!(k, "st.global.u32 [{to}], {x};");
        });
    })
}

pub(super) fn scatter_kernel(e: usize) -> Kernel {
    parts::kernel(format!("sort_scatter_e{e}"), move |k| {
        let (indices, histograms, offsets, row_of_slot, token_of_row) = (
            k.pointer("indices"),
            k.pointer("histograms"),
            k.pointer("offsets"),
            k.pointer("row_of_slot"),
            k.pointer("token_of_row"),
        );
        let (n, chunk, slots_per_token, blocks) = (k.u32("n"), k.u32("chunk"), k.u32("k"), k.u32("blocks"));
        let (counters, sums) = (k.shared(4, "counters", 4 * (WARPS as usize * e).max(1)), k.shared(4, "sums", 4 * 8));
        let (counters, sums, tid, block) =
            (special(k, &counters), special(k, &sums), special(k, "%tid.x"), special(k, "%ctaid.x"));
        let (lane, warp) = (k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "and.b32 {lane}, {tid}, 31;");
        ptx!(k, "shr.u32 {warp}, {tid}, 5;");
        clear(k, counters, WARPS * e as u32);
        ptx!(k, "bar.sync 0;");

        k.note("this warp's slots, and its counters of them");
        let (first, end) = span(k, n, chunk);
        let (part, mine) = (k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "div.u32 {part}, {chunk}, {WARPS};");
        ptx!(k, "mad.lo.u32 {first}, {warp}, {part}, {first};");
        ptx!(k, "add.u32 {part}, {first}, {part};");
        ptx!(k, "min.u32 {end}, {end}, {part};");
        ptx!(k, "mad.lo.u32 {mine}, {warp}, {}, {counters};", 4 * e);
        let at = k.reg::<B32>();
        ptx!(k, "add.u32 {at}, {first}, {lane};");
        strided(k, at, end, 32, |k, i| {
            let expert = load_u32(k, indices, i);
            ptx!(k, "min.u32 {expert}, {expert}, {};", e.max(1) - 1);
            let at = word(k, mine, expert);
            ptx!(k, "red.shared.add.u32 [{at}], 1;");
        });

        k.note("counters, after the scan's barrier, become each warp's next row");
        let carry = special(k, "0");
        for tile in (0..e).step_by(BLOCK as usize) {
            let (expert, none) = (k.reg::<B32>(), k.reg::<Pred>());
            ptx!(k, "add.u32 {expert}, {tid}, {tile};");
            ptx!(k, "setp.ge.u32 {none}, {expert}, {e};");
            let (total, before) = (special(k, "0"), special(k, "0"));
            let from = element(k, histograms, expert, DType::U32);
            let (zero, counted) = (special(k, "0"), k.label("counted"));
            ptx!(k, "@{none} bra {counted};");
            strided(k, zero, blocks, 1, |k, b| {
                let (x, earlier) = (k.reg::<B32>(), k.reg::<Pred>());
                ptx!(k, "ld.global.u32 {x}, [{from}];");
                ptx!(k, "add.u64 {from}, {from}, {};", 4 * e);
                ptx!(k, "add.u32 {total}, {total}, {x};");
                ptx!(k, "setp.lt.u32 {earlier}, {b}, {block};");
                ptx!(k, "@{earlier} add.u32 {before}, {before}, {x};");
            });
            k.place(&counted);
            let (start, all) = exclusive_scan(k, total, sums);
            ptx!(k, "add.u32 {start}, {start}, {carry};");
            ptx!(k, "add.u32 {carry}, {carry}, {all};");
            let (writes, to, done) = (k.reg::<Pred>(), element(k, offsets, expert, DType::U32), k.label("done"));
            ptx!(k, "@{none} bra {done};");
            ptx!(k, "setp.eq.u32 {writes}, {block}, 0;");
            ptx!(k, "@{writes} st.global.u32 [{to}], {start};");
            ptx!(k, "add.u32 {start}, {start}, {before};");
            let (at, x) = (word(k, counters, expert), k.reg::<B32>());
            for w in 0..WARPS as usize {
                ptx!(k, "ld.shared.u32 {x}, [{at}+{}];", 4 * w * e);
                ptx!(k, "st.shared.u32 [{at}+{}], {start};", 4 * w * e);
                ptx!(k, "add.u32 {start}, {start}, {x};");
            }
            k.place(&done);
            ptx!(k, "bar.sync 0;");
        }
        let (leads, last) = (k.reg::<Pred>(), k.reg::<B32>());
        ptx!(k, "or.b32 {last}, {tid}, {block};");
        ptx!(k, "setp.eq.u32 {leads}, {last}, 0;");
        ptx!(k, "@{leads} st.global.u32 [{offsets}+{}], {n};", 4 * e);

        k.note("slots in order, 32 at a time; lanes past the end match each other and do nothing");
        let earlier_lanes = k.reg::<B32>();
        ptx!(k, "shl.b32 {earlier_lanes}, 1, {lane};");
        ptx!(k, "sub.u32 {earlier_lanes}, {earlier_lanes}, 1;");
        strided(k, first, end, 32, |k, i| {
            let (slot, live, expert, peers, rank) =
                (k.reg::<B32>(), k.reg::<Pred>(), k.reg::<B32>(), k.reg::<B32>(), k.reg::<B32>());
            ptx!(k, "add.u32 {slot}, {i}, {lane};");
            ptx!(k, "setp.lt.u32 {live}, {slot}, {end};");
            ptx!(k, "mov.u32 {expert}, 0xffffffff;");
            let from = element(k, indices, slot, DType::U32);
            ptx!(k, "@{live} ld.global.u32 {expert}, [{from}];");
            ptx!(k, "@{live} min.u32 {expert}, {expert}, {};", e.max(1) - 1);
            ptx!(k, "match.any.sync.b32 {peers}, {expert}, 0xffffffff;");
            ptx!(k, "and.b32 {rank}, {peers}, {earlier_lanes};");
            ptx!(k, "popc.b32 {rank}, {rank};");
            let (at, next, leads, row) = (word(k, mine, expert), k.reg::<B32>(), k.reg::<Pred>(), k.reg::<B32>());
            ptx!(k, "@{live} ld.shared.u32 {next}, [{at}];");
            ptx!(k, "add.u32 {row}, {next}, {rank};");
            ptx!(k, "bar.warp.sync 0xffffffff;");
            ptx!(k, "setp.eq.and.u32 {leads}, {rank}, 0, {live};");
            ptx!(k, "popc.b32 {peers}, {peers};");
            ptx!(k, "add.u32 {next}, {next}, {peers};");
            ptx!(k, "@{leads} st.shared.u32 [{at}], {next};");
            ptx!(k, "bar.warp.sync 0xffffffff;");
            let (token, _) = div_rem(k, slot, slots_per_token);
            let (to_row, to_token): (Reg<B64>, Reg<B64>) =
                (element(k, row_of_slot, slot, DType::U32), element(k, token_of_row, row, DType::U32));
            ptx!(k, "@{live} st.global.u32 [{to_row}], {row};");
            ptx!(k, "@{live} st.global.u32 [{to_token}], {token};");
        });
    })
}
