//! Latent attention over a cache of latents ([`crate::ops::mla::latent`]): generation.
//!
//! Up-projections are absorbed: queries and outputs of heads are in latent space in f32 scratch, between four kernels.
//! - rotate (kv_a, cos, sin, cache, items, width, pitch, half, at: u32): a pair of a token's shared key part a thread, into the cache; the
//!   latents beside it are copied, or encoded ([`super::latent_fp8`]).
//! - absorb (q, w, out, h, n, r, v: u32): a block a head and token; a warp has every eighth row of the head's part of w, a lane
//!   neighbouring columns, and the warps' sums meet in shared memory [8, c], in order.
//! - the cached attention, with one key head for all and values that are the first c columns of the keys.
//! - expand (x, w, o, h, n, v, c groups, first: u32): a warp a row of w, for up to eight tokens at once, as in [`super::gemv`].
//!
//! Time: w once a token in absorb, once in eight in expand, and the cache, over memory bandwidth.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Pred, Reg},
    attention::{
        Elements,
        cached::{Query, attend, scratch_elements},
    },
    elementwise,
    fold::Team,
    gemv::dots,
    golden::Variant,
    latent_fp8,
    paged::rows,
    parts::{self, BLOCK, count, div_rem, element, f32_op, load, load_vector, row, special, store, strided},
    quantize::Recipe,
    rope::pairs_name,
};
use crate::{
    dtype::DType,
    ops::{
        mla::fp8_row::Fp8Row,
        paged::{Run, Sequences},
        rope::{Pairs, RopeTable},
    },
    ptx,
    tensor::Tensor,
};

const WARPS: usize = BLOCK as usize / 32;
/// Width of a latent, at most: the warps' sums are 48 KiB.
pub const MAX_LATENT: usize = 1536;
/// Tokens that one launch of expand takes.
const MAX_TOKENS: usize = 8;

/// Writes the latents [m, c] and the rotated last r columns of kv_a [m, c + r] of new tokens at their rows, as
/// [`crate::ops::mla::latent::append`]; the recipe is that of a cache in FP8.
///
/// # Panics
/// If a position is past the table.
pub fn append(
    latent: Tensor,
    kv_a: Tensor,
    table: &RopeTable,
    (cache, recipe): (Tensor, Recipe),
    sequences: &Sequences,
) -> Vec<Launch> {
    let (c, width, half) = (latent.cols(), kv_a.cols(), table.dim() / 2);
    let mut launches = Vec::new();
    for Run { tokens, position, row } in sequences.runs() {
        let (first, tokens) = (tokens.start, tokens.len());
        assert!(
            position + tokens <= table.max_positions(),
            "position {} is past the rope table",
            position + tokens - 1
        );
        let part = |x: Tensor, row: usize| x.slice(row * x.cols(), tokens * x.cols()).reshape(&[tokens, x.cols()]);
        let (latent, rows) = (part(latent, first), part(cache, row));
        let from = |x: Tensor, row: usize, column: usize| x.slice(row * x.cols() + column, tokens * x.cols() - column);
        // Where the key parts go, elements from one to the next, and what these are.
        let (keys, pitch, dtype) = if cache.dtype == DType::U8 {
            let layout = Fp8Row { c, r: width - c };
            launches.extend(latent_fp8::encode(latent, rows, layout, recipe));
            (from(cache, row, layout.key_at()), layout.bytes() / 2, DType::Bf16)
        } else {
            launches.extend(elementwise::copy_columns((latent, 0), (rows, 0), c, false));
            (from(cache, row, c), width, cache.dtype)
        };
        let items = tokens * half;
        if items > 0 {
            let mut args: Vec<Arg> = [from(kv_a, first, c), table.cos, table.sin, keys].map(Arg::Tensor).into();
            args.extend([items, width, pitch, half, position].map(|n| Arg::U32(count(n))));
            let kernel = rotate_kernel(kv_a.dtype, dtype, table.pairs);
            launches.push(Launch { kernel, grid: parts::flat_grid(items, 1), args });
        }
    }
    launches
}

fn rotate_kernel(dtype: DType, to_dtype: DType, pairs: Pairs) -> Kernel {
    let name = format!("latent_rotate_{}_{}_{}", dtype.name(), to_dtype.name(), pairs_name(pairs));
    parts::kernel(name, move |k| {
        let (kv_a, cos, sin, cache) = (k.pointer("kv_a"), k.pointer("cos"), k.pointer("sin"), k.pointer("cache"));
        let (n, width, pitch, half, at) = (k.u32("n"), k.u32("width"), k.u32("pitch"), k.u32("half"), k.u32("at"));
        let i = parts::global_index(k);
        parts::return_past(k, i, n);
        let (token, pair) = div_rem(k, i, half);
        let (first, second) = (k.reg::<B32>(), k.reg::<B32>());
        match pairs {
            Pairs::Interleaved => {
                ptx!(k, "shl.b32 {first}, {pair}, 1;");
                ptx!(k, "add.u32 {second}, {first}, 1;");
            }
            Pairs::HalfSplit => {
                ptx!(k, "mov.u32 {first}, {pair};");
                ptx!(k, "add.u32 {second}, {first}, {half};");
            }
        }
        let position = k.reg::<B32>();
        ptx!(k, "add.u32 {position}, {token}, {at};");
        let factor = |k: &mut Assembler, table: Reg<B64>| {
            let row = row(k, table, position, half, DType::F32);
            let at = element(k, row, pair, DType::F32);
            load(k, at, DType::F32)
        };
        let (cos, sin) = (factor(k, cos), factor(k, sin));
        let (from, to) = (row(k, kv_a, token, width, dtype), row(k, cache, token, pitch, to_dtype));
        let (x_at, y_at) = (element(k, from, first, dtype), element(k, from, second, dtype));
        let (x, y) = (load(k, x_at, dtype), load(k, y_at, dtype));
        let (x_cos, y_sin, x_sin, y_cos) =
            (f32_op(k, "mul", x, cos), f32_op(k, "mul", y, sin), f32_op(k, "mul", x, sin), f32_op(k, "mul", y, cos));
        let (x, y) = (f32_op(k, "sub", x_cos, y_sin), f32_op(k, "add", x_sin, y_cos));
        let (x_at, y_at) = (element(k, to, first, to_dtype), element(k, to, second, to_dtype));
        store(k, x_at, x, to_dtype);
        store(k, y_at, y, to_dtype);
    })
}

/// Assigns o [m, h, v] of the rotated queries [m, h, n + r] of the new tokens of `sequences`, as
/// [`crate::ops::mla::latent::forward`]. The scratch is m h (2 c + r) numbers of f32, and more if the cache is cut into parts; rows of FP8
/// are decoded to scratch first, those of a sequence at a time.
///
/// # Panics
/// Above [`MAX_LATENT`].
pub fn forward(
    q: Tensor,
    w_kv_b: Tensor,
    (cache, recipe): (Tensor, Recipe),
    sequences: &Sequences,
    scale: f64,
    o: Tensor,
) -> Vec<Launch> {
    let mut launches = Vec::new();
    for (first, sequence) in sequences.iter() {
        let (h, tokens) = (q.dim(1), sequence.num_new);
        let part = |x: Tensor| x.slice(first * h * x.cols(), tokens * h * x.cols()).reshape(&[tokens, h, x.cols()]);
        let keys = if cache.dtype == DType::U8 {
            let c = w_kv_b.dim(1);
            let layout = Fp8Row { c, r: q.cols() + o.cols() - w_kv_b.dim(0) / h.max(1) };
            let (rows, decode) = latent_fp8::rows((cache, layout, recipe), q.dtype, (sequences, sequence), 4);
            launches.extend(decode);
            let widest = 16 / q.dtype.size_bytes();
            let lanes = if (c + layout.r).is_multiple_of(widest) { widest } else { 1 };
            (rows, Elements { dtype: q.dtype, lanes }, c + layout.r)
        } else {
            let (rows, copy) = rows(cache, sequences, sequence, 4);
            launches.extend(copy);
            (rows, Elements::of(cache), cache.cols())
        };
        launches.extend(forward_one(part(q), w_kv_b, keys, sequence.context, scale, part(o)));
    }
    launches
}

/// The same of one sequence, whose rows follow each other.
fn forward_one(
    q: Tensor,
    w_kv_b: Tensor,
    (keys, key_elements, width): (Arg, Elements, usize),
    at: usize,
    scale: f64,
    o: Tensor,
) -> Vec<Launch> {
    let (tokens, h, v, c) = (q.dim(0), q.dim(1), o.dim(2), w_kv_b.dim(1));
    let (n, r) = (w_kv_b.dim(0) / h.max(1) - v, width - c);
    assert!(c <= MAX_LATENT, "absorbed attention: latents of {c}");
    if tokens * h * v == 0 {
        return vec![];
    }
    let scratch = |slot, width: usize| Arg::Scratch { slot, bytes: 4 * (tokens * h * width) as u64 };
    let (q_latent, o_latent) = (scratch(0, width), scratch(1, c));
    let lanes = parts::lanes(&[w_kv_b], c);
    let mut args = vec![Arg::Tensor(q), Arg::Tensor(w_kv_b), q_latent.clone()];
    args.extend([h, n, r, v].map(|n| Arg::U32(count(n))));
    let kernel = absorb_kernel(q.dtype, w_kv_b.dtype, lanes, c);
    let mut launches = vec![Launch { kernel, grid: [count(h), count(tokens), 1], args }];
    let query = Query { tokens, at, g: 1, group: h, d: width, width: c, scale };
    let elements = [scratch_elements(width), key_elements, scratch_elements(c)];
    launches.extend(attend(query, elements, q_latent, (keys, None), o_latent.clone(), 2));
    launches.extend((0..tokens).step_by(MAX_TOKENS).map(|first| {
        let kernel = expand_kernel(o.dtype, w_kv_b.dtype, lanes, (tokens - first).min(MAX_TOKENS));
        let mut args = vec![o_latent.clone(), Arg::Tensor(w_kv_b), Arg::Tensor(o)];
        args.extend([h, n, v, c / lanes, first].map(|n| Arg::U32(count(n))));
        Launch { kernel, grid: Team::Warp.grid(h * v), args }
    }));
    launches
}

fn absorb_kernel(q_dtype: DType, w_dtype: DType, lanes: usize, c: usize) -> Kernel {
    let name = format!("latent_absorb_{}_{}_x{lanes}_c{c}", q_dtype.name(), w_dtype.name());
    parts::kernel(name, move |k| {
        let (q, w, out) = (k.pointer("q"), k.pointer("w"), k.pointer("out"));
        let (h, n, r, v) = (k.u32("h"), k.u32("n"), k.u32("r"), k.u32("v"));
        let (head, token, tid) = (special(k, "%ctaid.x"), special(k, "%ctaid.y"), special(k, "%tid.x"));
        let (lane, warp, index) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "and.b32 {lane}, {tid}, 31;");
        ptx!(k, "shr.u32 {warp}, {tid}, 5;");
        ptx!(k, "mad.lo.u32 {index}, {token}, {h}, {head};");
        let (q_width, out_width, first_row) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "add.u32 {q_width}, {n}, {r};");
        ptx!(k, "add.u32 {out_width}, {r}, {c};");
        ptx!(k, "add.u32 {first_row}, {n}, {v};");
        ptx!(k, "mul.lo.u32 {first_row}, {first_row}, {head};");
        let (q, out) = (row(k, q, index, q_width, q_dtype), row(k, out, index, out_width, DType::F32));

        k.note("sums of this warp's rows");
        let groups = c / lanes;
        let inside: Vec<Option<Reg<Pred>>> = (0..groups.div_ceil(32))
            .map(|g| {
                (32 * (g + 1) > groups).then(|| {
                    let outside = k.reg::<Pred>();
                    ptx!(k, "setp.ge.u32 {outside}, {lane}, {};", groups - 32 * g);
                    outside
                })
            })
            .collect();
        let sums: Vec<Vec<Reg<F32>>> =
            inside.iter().map(|_| (0..lanes).map(|_| parts::constant(k, 0.0)).collect()).collect();
        let cols = special(k, &c.to_string());
        strided(k, warp, n, WARPS, |k, i| {
            let (at, w_row) = (element(k, q, i, q_dtype), k.reg::<B32>());
            let x = load(k, at, q_dtype);
            ptx!(k, "add.u32 {w_row}, {first_row}, {i};");
            let at = row(k, w, w_row, cols, w_dtype);
            let base = k.reg::<B64>();
            ptx!(k, "mad.wide.u32 {base}, {lane}, {}, {at};", lanes * w_dtype.size_bytes());
            for (g, (outside, sums)) in inside.iter().zip(&sums).enumerate() {
                let (at, skip) = (k.reg::<B64>(), k.label("skip"));
                if let Some(outside) = outside {
                    ptx!(k, "@{outside} bra {skip};");
                }
                ptx!(k, "add.u64 {at}, {base}, {};", 32 * g * lanes * w_dtype.size_bytes());
                for (sum, w) in sums.iter().zip(load_vector(k, at, w_dtype, lanes)) {
                    ptx!(k, "fma.rn.f32 {sum}, {x}, {w}, {sum};");
                }
                k.place(&skip);
            }
        });

        k.note("sums of all warps, and the rotated part as it is");
        let name = k.shared(16, "sums", 4 * WARPS * c.max(1));
        let (base, mine) = (special(k, &name), k.reg::<B32>());
        ptx!(k, "mad.lo.u32 {mine}, {warp}, {}, {base};", 4 * c);
        ptx!(k, "mad.lo.u32 {mine}, {lane}, {}, {mine};", 4 * lanes);
        for (g, (outside, sums)) in inside.iter().zip(&sums).enumerate() {
            let guard = outside.map_or(String::new(), |outside| format!("@!{outside} "));
            for (e, sum) in sums.iter().enumerate() {
                ptx!(k, "{guard}st.shared.f32 [{mine}+{}], {sum};", 4 * (32 * g * lanes + e));
            }
        }
        ptx!(k, "bar.sync 0;");
        strided(k, tid, cols, BLOCK, |k, i| {
            let (at, total, x) = (k.reg::<B32>(), parts::constant(k, 0.0), k.reg::<F32>());
            ptx!(k, "mad.lo.u32 {at}, {i}, 4, {base};");
            for warp in 0..WARPS {
                ptx!(k, "ld.shared.f32 {x}, [{at}+{}];", 4 * warp * c);
                ptx!(k, "add.rn.f32 {total}, {total}, {x};");
            }
            let to = element(k, out, i, DType::F32);
            ptx!(k, "st.global.f32 [{to}], {total};");
        });
        strided(k, tid, r, BLOCK, |k, i| {
            let (from, to) = (k.reg::<B32>(), k.reg::<B32>());
            ptx!(k, "add.u32 {from}, {n}, {i};");
            ptx!(k, "add.u32 {to}, {cols}, {i};");
            let (from, to) = (element(k, q, from, q_dtype), element(k, out, to, DType::F32));
            let x = load(k, from, q_dtype);
            ptx!(k, "st.global.f32 [{to}], {x};");
        });
    })
}

fn expand_kernel(o_dtype: DType, w_dtype: DType, lanes: usize, tokens: usize) -> Kernel {
    let name = format!("latent_expand_{}_{}_n{tokens}_x{lanes}", w_dtype.name(), o_dtype.name());
    parts::kernel(name, move |k| {
        let (x, w, o) = (k.pointer("x"), k.pointer("w"), k.pointer("o"));
        let (h, n, v, groups, first) = (k.u32("h"), k.u32("n"), k.u32("v"), k.u32("g"), k.u32("first"));
        let (all, c) = (k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "mul.lo.u32 {all}, {h}, {v};");
        ptx!(k, "mul.lo.u32 {c}, {groups}, {lanes};");
        let (output, lane) = Team::Warp.place(k, all);
        let (head, column) = div_rem(k, output, v);
        let w_row = k.reg::<B32>();
        ptx!(k, "add.u32 {w_row}, {n}, {v};");
        ptx!(k, "mad.lo.u32 {w_row}, {w_row}, {head}, {column};");
        ptx!(k, "add.u32 {w_row}, {w_row}, {n};");
        let w = row(k, w, w_row, c, w_dtype);
        let places: Vec<Reg<B32>> = (0..tokens)
            .map(|j| {
                let place = k.reg::<B32>();
                ptx!(k, "add.u32 {place}, {first}, {j};");
                ptx!(k, "mad.lo.u32 {place}, {place}, {h}, {head};");
                place
            })
            .collect();
        let rows: Vec<Reg<B64>> = places.iter().map(|&place| row(k, x, place, c, DType::F32)).collect();
        let sums = dots(k, (w, w_dtype), (&rows, DType::F32), (lane, groups, lanes));
        let (other, end) = (k.reg::<Pred>(), k.label("end"));
        ptx!(k, "setp.ne.u32 {other}, {lane}, 0;");
        ptx!(k, "@{other} bra {end};");
        for (sum, place) in sums.into_iter().zip(places) {
            let at = row(k, o, place, v, o_dtype);
            let at = element(k, at, column, o_dtype);
            store(k, at, sum, o_dtype);
        }
        k.place(&end);
    })
}

/// What is committed: DeepSeek-V3's latents.
pub fn variants() -> Vec<Variant> {
    use DType::Bf16;
    vec![
        Variant::new(rotate_kernel(Bf16, Bf16, Pairs::Interleaved), 40),
        Variant::new(absorb_kernel(Bf16, Bf16, 8, 512), 64),
        Variant::new(expand_kernel(Bf16, Bf16, 8, 1), 48),
    ]
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        device::Device,
        memory::Memory,
        ops::{
            mla::latent::{self as cpu, Prefill},
            paged::Sequence,
            rope::Rope,
        },
        ptx::case::{Case, Data},
    };

    const R: usize = 4;
    const SCALE: f64 = 0.8;

    fn recipe() -> Recipe {
        Recipe::committed()[1]
    }

    fn rope(pairs: Pairs) -> impl Fn(&Memory) -> RopeTable {
        move |m| Rope { theta: 1e3, dim: R, yarn: None }.table(m, DType::F32, 20, pairs)
    }

    #[test]
    fn the_cache_is_the_cpus_to_the_bit() {
        for (dtype, pairs) in [(DType::F32, Pairs::HalfSplit), (DType::Bf16, Pairs::Interleaved)] {
            for (tokens, at, c) in [(3, 5, 8), (1, 0, 9), (0, 2, 8)] {
                let inputs = [
                    Data::random(dtype, &[tokens, c], 1),
                    Data::random(dtype, &[tokens, c + R], 2),
                    Data::random(dtype, &[12, c + R], 3),
                ];
                let table = rope(pairs);
                Case::new(&inputs)
                    .cpu(|s, x| {
                        let table = table(&s.memory().clone());
                        cpu::append(s, x[0], x[1], &table, x[2], &Sequences::one(12, tokens, at))
                    })
                    .ptx_with(|m, x| append(x[0], x[1], &table(m), (x[2], recipe()), &Sequences::one(12, tokens, at)))
                    .equal();
            }
        }
    }

    #[test]
    fn outputs_are_the_cpus() {
        // Heads, n, v, c, new tokens, cached ones: a part of a tile, many parts, groups that straddle tiles, many tokens.
        for (h, n, v, c, tokens, at) in
            [(3, 5, 6, 9, 2, 0), (4, 16, 8, 32, 1, 299), (20, 4, 3, 16, 9, 7), (2, 8, 8, 40, 1, 130)]
        {
            for (x, w) in [(DType::F32, DType::F32), (DType::F32, DType::Bf16), (DType::Bf16, DType::Bf16)] {
                let capacity = at + tokens + 2;
                let all = Sequences::one(capacity, tokens, at);
                let mut cache = Data::random(x, &[capacity, c + R], 3);
                // What lies past the valid rows must not matter.
                cache.2[(at + tokens) * (c + R)..].fill(f64::NAN);
                let inputs = [
                    Data::random(x, &[tokens, h, n + R], 1),
                    Data::random(w, &[h * (n + v), c], 2),
                    cache,
                    Data::poison(x, &[tokens, h, v]),
                ];
                // Four sums in other orders one after another.
                Case::new(&inputs)
                    .cpu(|s, t| cpu::forward(s, t[0], t[1], t[2], &all, (SCALE, Prefill::Absorbed), t[3]))
                    .ptx(|t| forward(t[0], t[1], (t[2], recipe()), &all, SCALE, t[3]))
                    .close(1e-5);
            }
        }
        let memory = Memory::new(Device::Cpu);
        let q = memory.alloc(DType::F32, &[0, 2, 8]);
        let (w, cache) = (memory.alloc(DType::F32, &[16, 4]), memory.alloc(DType::F32, &[3, 8]));
        let o = memory.alloc(DType::F32, &[0, 2, 4]);
        assert!(forward(q, w, (cache, recipe()), &Sequences::one(3, 0, 1), SCALE, o).is_empty());
    }

    #[test]
    fn sequences_on_scattered_pages_are_the_cpus() {
        let of = |num_new, context, pages: &[u32]| Sequence { num_new, context, pages: pages.into() };
        let all = Sequences::new([of(2, 3, &[2, 0]), of(1, 4, &[1, 3])], 4);
        let (h, n, v, c) = (2, 4, 4, 8);
        for dtype in [DType::F32, DType::Bf16] {
            let cache = || Data::random(dtype, &[16, c + R], 3);
            let inputs = [Data::random(dtype, &[3, c], 1), Data::random(dtype, &[3, c + R], 2), cache()];
            let table = rope(Pairs::Interleaved);
            Case::new(&inputs)
                .cpu(|s, x| {
                    let table = table(&s.memory().clone());
                    cpu::append(s, x[0], x[1], &table, x[2], &all)
                })
                .ptx_with(|m, x| append(x[0], x[1], &table(m), (x[2], recipe()), &all))
                .equal();
            let inputs = [
                Data::random(dtype, &[3, h, n + R], 1),
                Data::random(dtype, &[h * (n + v), c], 2),
                cache(),
                Data::poison(dtype, &[3, h, v]),
            ];
            Case::new(&inputs)
                .cpu(|s, t| cpu::forward(s, t[0], t[1], t[2], &all, (SCALE, Prefill::Absorbed), t[3]))
                .ptx(|t| forward(t[0], t[1], (t[2], recipe()), &all, SCALE, t[3]))
                .close(1e-5);
        }
    }
}
