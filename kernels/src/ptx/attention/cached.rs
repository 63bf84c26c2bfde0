//! Attention over a cache: new keys are copied to their rows, and new tokens see every row up to their own.
//!
//! One generated token has few query rows, so its keys are cut into parts, each a block with its own running softmax (the forward
//! kernel); a merge kernel then weighs the parts' outputs by their denominators. How many parts there are follows from the sizes
//! alone.
//!
//! merge (o_parts [parts, n, v] f32, lse_parts [parts, n], log2, o [n, v], n, v, parts: u32): a warp a row, parts in order.
//!
//! Time: the cache over memory bandwidth, once the parts are as many as multiprocessors.

use super::{
    forward::{Config, Keys},
    log2_scale,
    tile::Elements,
};
use crate::{
    dtype::DType,
    ops::{
        attention::cached::KvCache,
        paged::{Run, Sequences},
    },
    ptx,
    ptx::{
        Arg, Kernel, Launch,
        asm::{Assembler, B32, B64, F32, Reg},
        elementwise,
        fold::Team,
        golden::Variant,
        paged::rows,
        parts::{self, count, element, special, strided},
    },
    tensor::Tensor,
};

/// Blocks that a launch has at least, if there are keys enough: two a multiprocessor of an H200.
const MIN_BLOCKS: usize = 264;
/// Keys of a part, at least.
const MIN_KEYS_PER_PART: usize = 128;

/// Writes rows of new tokens at theirs in a cache, as [`crate::ops::attention::cached::append`].
pub fn append(new: Tensor, cache: Tensor, sequences: &Sequences) -> Vec<Launch> {
    let width = cache.len() / cache.dim(0).max(1);
    let copy = |run: Run| {
        let from = new.slice(run.tokens.start * width, run.tokens.len() * width);
        elementwise::copy(from, cache.slice(run.row * width, from.len()))
    };
    sequences.runs().flat_map(copy).collect()
}

/// Assigns o [n, h, v] of the new tokens q [n, h, d] of `sequences`, as [`crate::ops::attention::cached::forward`].
///
/// # Panics
/// If heads are too wide for the shared memory of a block.
pub fn forward(q: Tensor, cache: KvCache, sequences: &Sequences, scale: f64, o: Tensor) -> Vec<Launch> {
    let (g, h) = (cache.k.dim(1), q.dim(1));
    let (d, width) = (q.cols(), o.cols());
    let mut launches = Vec::new();
    for (first, sequence) in sequences.iter() {
        let tokens = sequence.num_new;
        let part = |x: Tensor| x.slice(first * h * x.cols(), tokens * h * x.cols()).reshape(&[tokens, h, x.cols()]);
        let (q, o) = (part(q), part(o));
        let [(k, k_copy), (v, v_copy)] =
            [(cache.k, 2), (cache.v, 3)].map(|(x, slot)| rows(x, sequences, sequence, slot));
        launches.extend(k_copy.into_iter().chain(v_copy));
        let query = Query { tokens, at: sequence.context, g, group: h / g.max(1), d, width, scale };
        let elements = [Elements::of(q), Elements::of(cache.k), Elements::of(o)];
        let values = Some((v, Elements::of(cache.v)));
        launches.extend(attend(query, elements, Arg::Tensor(q), (k, values), Arg::Tensor(o), 0));
    }
    launches
}

/// New tokens and the heads they have.
#[derive(Clone, Copy)]
pub(in crate::ptx) struct Query {
    pub tokens: usize,
    pub at: usize,
    pub g: usize,
    pub group: usize,
    pub d: usize,
    pub width: usize,
    pub scale: f64,
}

/// Elements of f32 scratch in rows of `width`.
pub(in crate::ptx) fn scratch_elements(width: usize) -> Elements {
    Elements { dtype: DType::F32, lanes: if width.is_multiple_of(4) { 4 } else { 1 } }
}

/// Attention of q over the cache into o; values are the first columns of the keys if there are none. `elements` are those of q, keys
/// and o. Takes scratch slots from `slot` on, two.
pub(in crate::ptx) fn attend(
    n: Query,
    [q_elements, k_elements, o_elements]: [Elements; 3],
    q: Arg,
    (keys, values): (Arg, Option<(Arg, Elements)>),
    o: Arg,
    slot: u8,
) -> Vec<Launch> {
    let num_rows = n.tokens * n.group;
    if num_rows * n.g == 0 {
        return vec![];
    }
    let config = |parts, o_elements| {
        let v = values.as_ref().map(|(_, elements)| *elements);
        let elements = (q_elements, k_elements, v, o_elements);
        Config::new(Keys::Cache { parts }, elements, (n.d, n.width), n.group, num_rows)
    };
    let num_keys = n.at + n.tokens;
    let tiles = num_rows.div_ceil(config(true, scratch_elements(n.width)).tile_rows());
    let wanted = MIN_BLOCKS.div_ceil(tiles * n.g).min(num_keys / MIN_KEYS_PER_PART).max(1);
    let keys_per_part = num_keys.div_ceil(wanted).next_multiple_of(32);
    let num_parts = num_keys.div_ceil(keys_per_part);
    let launch = |config: Config, outputs: &[Arg]| {
        let mut args = vec![q.clone(), keys.clone()];
        args.extend(values.iter().map(|(values, _)| values.clone()));
        args.extend_from_slice(outputs);
        args.push(log2_scale(n.scale));
        args.extend([num_rows, num_keys, n.g, n.group, n.at, keys_per_part].map(|n| Arg::U32(count(n))));
        let grid = [count(num_rows.div_ceil(config.tile_rows())), count(n.g), count(num_parts)];
        Launch { kernel: config.kernel(), grid, args }
    };
    if num_parts == 1 {
        return vec![launch(config(false, o_elements), &[o])];
    }
    let all = num_rows * n.g;
    let o_parts = Arg::Scratch { slot, bytes: 4 * (num_parts * all * n.width) as u64 };
    let lse_parts = Arg::Scratch { slot: slot + 1, bytes: 4 * (num_parts * all) as u64 };
    let mut merge_args = vec![o_parts.clone(), lse_parts.clone(), o];
    merge_args.extend([all, n.width, num_parts].map(|n| Arg::U32(count(n))));
    vec![
        launch(config(true, scratch_elements(n.width)), &[o_parts, lse_parts]),
        Launch { kernel: merge_kernel(o_elements.dtype), grid: Team::Warp.grid(all), args: merge_args },
    ]
}

fn merge_kernel(dtype: DType) -> Kernel {
    parts::kernel(format!("attention_merge_{}", dtype.name()), move |k| {
        let (o_parts, lse_parts, o) = (k.pointer("o_parts"), k.pointer("lse_parts"), k.pointer("o"));
        let (n, width, num_parts) = (k.u32("n"), k.u32("v"), k.u32("parts"));
        let (row, lane) = Team::Warp.place(k, n);
        let (lse, zero) = (element(k, lse_parts, row, DType::F32), special(k, "0"));
        let (lse_stride, o_stride) = (k.reg::<B64>(), k.reg::<B64>());
        ptx!(k, "mul.wide.u32 {lse_stride}, {n}, 4;");
        ptx!(k, "cvt.u64.u32 {o_stride}, {width};");
        ptx!(k, "mul.lo.u64 {o_stride}, {o_stride}, {lse_stride};");
        let max = parts::constant(k, f32::NEG_INFINITY);
        for_parts(k, (zero, num_parts), (lse, lse_stride), |k, x| {
            ptx!(k, "max.f32 {max}, {max}, {x};");
        });
        let sum = parts::constant(k, 0.0);
        for_parts(k, (zero, num_parts), (lse, lse_stride), |k, x| {
            let weight = weight(k, x, max);
            ptx!(k, "add.rn.f32 {sum}, {sum}, {weight};");
        });
        ptx!(k, "rcp.rn.f32 {sum}, {sum};");
        let (from, to) = (parts::row(k, o_parts, row, width, DType::F32), parts::row(k, o, row, width, dtype));
        strided(k, lane, width, 32, |k, column| {
            let (total, at) = (parts::constant(k, 0.0), element(k, from, column, DType::F32));
            for_parts(k, (zero, num_parts), (lse, lse_stride), |k, x| {
                let (weight, y) = (weight(k, x, max), k.reg::<F32>());
                ptx!(k, "ld.global.f32 {y}, [{at}];");
                ptx!(k, "add.u64 {at}, {at}, {o_stride};");
                ptx!(k, "fma.rn.f32 {total}, {weight}, {y}, {total};");
            });
            ptx!(k, "mul.rn.f32 {total}, {total}, {sum};");
            let to = element(k, to, column, dtype);
            parts::store(k, to, total, dtype);
        });
    })
}

/// Calls `body` with the log2 of each part's denominator.
fn for_parts(
    k: &mut Assembler,
    (zero, num_parts): (Reg<B32>, Reg<B32>),
    (lse, stride): (Reg<B64>, Reg<B64>),
    body: impl FnOnce(&mut Assembler, Reg<F32>),
) {
    let at = k.reg::<B64>();
    ptx!(k, "mov.u64 {at}, {lse};");
    strided(k, zero, num_parts, 1, |k, _| {
        let x = k.reg::<F32>();
        ptx!(k, "ld.global.f32 {x}, [{at}];");
        ptx!(k, "add.u64 {at}, {at}, {stride};");
        body(k, x);
    });
}

fn weight(k: &mut Assembler, log2: Reg<F32>, max: Reg<F32>) -> Reg<F32> {
    let y = k.reg::<F32>();
    ptx!(k, "sub.rn.f32 {y}, {log2}, {max};");
    ptx!(k, "ex2.approx.ftz.f32 {y}, {y};");
    y
}

pub(super) fn variants() -> Vec<Variant> {
    [DType::Bf16, DType::F32].map(|dtype| Variant::new(merge_kernel(dtype), 40)).into()
}
