//! MLA's keys and values from the two projections, and back.
//!
//! assemble (kv_a, kv_b, positions, cos, sin, k, v, n: u32 groups, groups a token, groups a head, then in elements n, r, v, c,
//! and half, max_positions, fault): one thread a group of neighbouring elements of one head of k or v. A rotated group reads its part
//! of kv_a again for each head, from the caches. Moves kv_b in, k and v out. assemble_grad in two launches: `scatter` (dk, dv,
//! dkv_b, n, groups a head, n, r, v) copies; `shared` (dk, positions, cos, sin, dkv_a, n: u32 pairs, half, h, n, r, c,
//! max_positions, fault) sums one pair over the heads, in their order, in f32, and turns it back. Every element is the CPU op's, to
//! the bit. A position past the table is told of, and taken for the first.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Pred, Reg},
    fault::{Fault, Report},
    golden::Variant,
    parts::{
        self, constant, copy_bits, count, div_rem, element, flat, flat_grid, load_u32, load_vector, row, store,
        store_vector,
    },
    rope::{TableArgs, pairs_name, turn},
};
use crate::{
    dtype::DType,
    ops::{
        mla::{Projections, Sizes},
        rope::{Pairs, RopeTable},
    },
    ptx,
    tensor::Tensor,
};

/// Heads whose loads are on their way together.
const UNROLL: usize = 4;

/// F: assigns k [t, h, n + r] and v [t, h, v]; rotates the shared part by `positions` (u32, one a token).
pub fn assemble(x: Projections, positions: Tensor, table: &RopeTable, k: Tensor, v: Tensor) -> Vec<Launch> {
    let z = Sizes::of(x.kv_a, k, v, table);
    let most = parts::lanes(&[x.kv_a, x.kv_b, k, v], z.n);
    let whole = [z.v, z.c, z.r / 2].iter().all(|n| n.is_multiple_of(most));
    let lanes = if whole { most } else { 1 };
    let per_head = (z.n + z.r + z.v) / lanes;
    let items = z.t * z.h * per_head;
    if items == 0 {
        return vec![];
    }
    let mut args = [x.kv_a, x.kv_b, positions, table.cos, table.sin, k, v].map(Arg::Tensor).to_vec();
    let sizes = [items, z.h * per_head, per_head, z.n, z.r, z.v, z.c, z.r / 2, table.max_positions()];
    args.extend(sizes.map(|n| Arg::U32(count(n))));
    args.push(Arg::Fault(Fault::Position));
    vec![Launch { kernel: assemble_kernel(k.dtype, table.pairs, lanes), grid: flat_grid(items, 1), args }]
}

/// I: from dk and dv, assigns `dx.kv_b` and the last r columns of `dx.kv_a` (summed over heads, turned back). The latent's
/// columns of `dx.kv_a` stay.
pub fn assemble_grad(dk: Tensor, dv: Tensor, positions: Tensor, table: &RopeTable, dx: Projections) -> Vec<Launch> {
    let z = Sizes::of(dx.kv_a, dk, dv, table);
    let most = parts::lanes(&[dx.kv_b, dk, dv], z.n);
    let lanes = if [z.v, z.r].iter().all(|n| n.is_multiple_of(most)) { most } else { 1 };
    let per_head = (z.n + z.v) / lanes;
    let (items, pairs) = (z.t * z.h * per_head, z.t * z.r / 2);
    let mut launches = vec![];
    if items > 0 {
        let mut args = [dk, dv, dx.kv_b].map(Arg::Tensor).to_vec();
        args.extend([items, per_head, z.n, z.r, z.v].map(|n| Arg::U32(count(n))));
        launches.push(Launch { kernel: scatter_kernel(dk.dtype, lanes), grid: flat_grid(items, 1), args });
    }
    if pairs > 0 {
        let mut args = [dk, positions, table.cos, table.sin, dx.kv_a].map(Arg::Tensor).to_vec();
        args.extend([pairs, z.r / 2, z.h, z.n, z.r, z.c, table.max_positions()].map(|n| Arg::U32(count(n))));
        args.push(Arg::Fault(Fault::Position));
        // One access a pair where pairs are neighbours and aligned.
        let wide = table.pairs == Pairs::Interleaved && [dk.offset as usize, z.n].iter().all(|n| n.is_multiple_of(2));
        launches.push(Launch { kernel: shared_kernel(dk.dtype, table.pairs, wide), grid: flat_grid(pairs, 1), args });
    }
    launches
}

/// Address of element `column` of row `index` of rows of `cols`.
fn at(k: &mut Assembler, base: Reg<B64>, index: Reg<B32>, cols: Reg<B32>, column: Reg<B32>, dtype: DType) -> Reg<B64> {
    let at = row(k, base, index, cols, dtype);
    element(k, at, column, dtype)
}

fn sum(k: &mut Assembler, a: Reg<B32>, b: Reg<B32>) -> Reg<B32> {
    let c = k.reg::<B32>();
    ptx!(k, "add.u32 {c}, {a}, {b};");
    c
}

fn difference(k: &mut Assembler, a: Reg<B32>, b: Reg<B32>) -> Reg<B32> {
    let c = k.reg::<B32>();
    ptx!(k, "sub.u32 {c}, {a}, {b};");
    c
}

fn assemble_kernel(dtype: DType, pairs: Pairs, lanes: usize) -> Kernel {
    let name = format!("mla_assemble_{}_{}_x{lanes}", dtype.name(), pairs_name(pairs));
    parts::kernel(name, move |k| {
        let [kv_a, kv_b, positions, cos, sin] = ["kv_a", "kv_b", "positions", "cos", "sin"].map(|n| k.pointer(n));
        let (keys, values) = (k.pointer("k"), k.pointer("v"));
        let [items, per_token, per_head, n, r] = ["items", "per_token", "per_head", "n", "r"].map(|n| k.u32(n));
        let [v, c, half, max_positions] = ["v_dim", "c", "half", "max_positions"].map(|n| k.u32(n));
        let table = TableArgs { cos, sin, half, max_positions, fault: Report::param(k) };
        flat(k, items, 1, |k, i, _| {
            let token = div_rem(k, i, per_token).0;
            let (index, column) = div_rem(k, i, per_head);
            ptx!(k, "mul.lo.u32 {column}, {column}, {lanes};");
            let (d, up) = (sum(k, n, r), sum(k, n, v));
            let (here, value, rotated) = (k.reg::<Pred>(), k.label("value"), k.label("rotated"));
            ptx!(k, "setp.ge.u32 {here}, {column}, {d};");
            ptx!(k, "@{here} bra {value};");
            ptx!(k, "setp.ge.u32 {here}, {column}, {n};");
            ptx!(k, "@{here} bra {rotated};");
            let (from, to) = (at(k, kv_b, index, up, column, dtype), at(k, keys, index, d, column, dtype));
            copy_bits(k, from, to, dtype.size_bytes(), lanes);
            ptx!(k, "ret;");
            k.place(&value);
            let (j, source) = (difference(k, column, d), difference(k, column, r));
            let (from, to) = (at(k, kv_b, index, up, source, dtype), at(k, values, index, v, j, dtype));
            copy_bits(k, from, to, dtype.size_bytes(), lanes);
            ptx!(k, "ret;");
            k.place(&rotated);
            let (position, j, a) = (load_u32(k, positions, token), difference(k, column, n), sum(k, c, r));
            let source = at(k, kv_a, token, a, c, dtype);
            let y = rotated_part(k, source, j, &table, position, (dtype, pairs, lanes));
            let to = at(k, keys, index, d, column, dtype);
            store_vector(k, to, &y, dtype);
        });
    })
}

/// Elements `j .. j + lanes` of the rotated part at `source`.
fn rotated_part(
    k: &mut Assembler,
    source: Reg<B64>,
    j: Reg<B32>,
    table: &TableArgs,
    position: Reg<B32>,
    (dtype, pairs, lanes): (DType, Pairs, usize),
) -> Vec<Reg<F32>> {
    let (first, partner, second) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<Pred>());
    if pairs == Pairs::Interleaved && lanes > 1 {
        let from = element(k, source, j, dtype);
        let x = load_vector(k, from, dtype, lanes);
        ptx!(k, "shr.u32 {first}, {j}, 1;");
        let [cos, sin] = table.load(k, position, first, lanes / 2);
        let mut y = vec![];
        for (x, (cos, sin)) in x.chunks(2).zip(cos.into_iter().zip(sin)) {
            let (a, b) = turn(k, x[0], x[1], cos, sin);
            y.extend([a, b]);
        }
        return y;
    }
    // The partners are elsewhere: this thread computes the half of each pair that is its own.
    match pairs {
        Pairs::Interleaved => {
            let odd = k.reg::<B32>();
            ptx!(k, "and.b32 {odd}, {j}, 1;");
            ptx!(k, "setp.ne.u32 {second}, {odd}, 0;");
            ptx!(k, "xor.b32 {partner}, {j}, 1;");
            ptx!(k, "shr.u32 {first}, {j}, 1;");
        }
        Pairs::HalfSplit => {
            ptx!(k, "setp.ge.u32 {second}, {j}, {};", table.half);
            let (below, above) = (difference(k, j, table.half), sum(k, j, table.half));
            ptx!(k, "selp.u32 {partner}, {below}, {above}, {second};");
            ptx!(k, "selp.u32 {first}, {below}, {j}, {second};");
        }
    }
    let (own, other) = (element(k, source, j, dtype), element(k, source, partner, dtype));
    let (own, other) = (load_vector(k, own, dtype, lanes), load_vector(k, other, dtype, lanes));
    let [cos, sin] = table.load(k, position, first, lanes);
    let each = own.into_iter().zip(other).zip(cos.into_iter().zip(sin));
    each.map(|((own, other), (cos, sin))| {
        let as_first = turn(k, own, other, cos, sin).0;
        let as_second = turn(k, other, own, cos, sin).1;
        ptx!(k, "selp.f32 {as_first}, {as_second}, {as_first}, {second};");
        as_first
    })
    .collect()
}

fn scatter_kernel(dtype: DType, lanes: usize) -> Kernel {
    parts::kernel(format!("mla_assemble_grad_b{}_x{lanes}", 8 * dtype.size_bytes()), move |k| {
        let [dk, dv, kv_b] = ["dk", "dv", "kv_b"].map(|n| k.pointer(n));
        let [items, per_head, n, r, v] = ["items", "per_head", "n", "r", "v_dim"].map(|n| k.u32(n));
        flat(k, items, 1, |k, i, _| {
            let (index, column) = div_rem(k, i, per_head);
            ptx!(k, "mul.lo.u32 {column}, {column}, {lanes};");
            let (d, up, value, of_key) = (sum(k, n, r), sum(k, n, v), k.reg::<Pred>(), k.reg::<B64>());
            ptx!(k, "setp.ge.u32 {value}, {column}, {n};");
            let j = difference(k, column, n);
            let (from_k, from_v) = (at(k, dk, index, d, column, dtype), at(k, dv, index, v, j, dtype));
            ptx!(k, "selp.b64 {of_key}, {from_v}, {from_k}, {value};");
            let to = at(k, kv_b, index, up, column, dtype);
            copy_bits(k, of_key, to, dtype.size_bytes(), lanes);
        });
    })
}

fn shared_kernel(dtype: DType, pairs: Pairs, wide: bool) -> Kernel {
    let access = if wide { "x2" } else { "x1" };
    let name = format!("mla_shared_key_grad_{}_{}_{access}", dtype.name(), pairs_name(pairs));
    parts::kernel(name, move |k| {
        let [dk, positions, cos, sin, kv_a] = ["dk", "positions", "cos", "sin", "kv_a"].map(|n| k.pointer(n));
        let [items, half, h, n, r] = ["items", "half", "h", "n", "r"].map(|n| k.u32(n));
        let (c, max_positions) = (k.u32("c"), k.u32("max_positions"));
        let table = TableArgs { cos, sin, half, max_positions, fault: Report::param(k) };
        flat(k, items, 1, |k, i, _| {
            let (token, pair) = div_rem(k, i, half);
            let (first, d, stride) = (k.reg::<B32>(), sum(k, n, r), k.reg::<B64>());
            let shift = usize::from(pairs == Pairs::Interleaved);
            ptx!(k, "shl.b32 {first}, {pair}, {shift};");
            ptx!(k, "mul.wide.u32 {stride}, {d}, {};", dtype.size_bytes());
            let (index, column, from) = (k.reg::<B32>(), sum(k, n, first), k.reg::<B64>());
            ptx!(k, "mul.lo.u32 {index}, {token}, {h};");
            let start = at(k, dk, index, d, column, dtype);
            ptx!(k, "mov.u64 {from}, {start};");
            let (a, b) = (constant(k, 0.0), constant(k, 0.0));
            let add = |k: &mut Assembler, heads: usize| {
                let loaded: Vec<_> =
                    (0..heads).map(|_| load_pair(k, from, half, stride, (dtype, pairs, wide))).collect();
                for (x, y) in loaded {
                    ptx!(k, "add.rn.f32 {a}, {a}, {x};");
                    ptx!(k, "add.rn.f32 {b}, {b}, {y};");
                }
            };
            let (zero, whole) = (parts::special(k, "0"), k.reg::<B32>());
            ptx!(k, "and.b32 {whole}, {h}, {};", -(UNROLL as i32));
            parts::strided(k, zero, whole, UNROLL, |k, _| add(k, UNROLL));
            parts::strided(k, whole, h, 1, |k, _| add(k, 1));
            let position = load_u32(k, positions, token);
            let [cos, sin] = table.load(k, position, pair, 1);
            ptx!(k, "neg.f32 {}, {};", sin[0], sin[0]);
            let (a, b) = turn(k, a, b, cos[0], sin[0]);
            let (cols, column) = (sum(k, c, r), sum(k, c, first));
            let to = at(k, kv_a, token, cols, column, dtype);
            store(k, to, a, dtype);
            let one = parts::special(k, "1");
            let to = element(k, to, if pairs == Pairs::HalfSplit { half } else { one }, dtype);
            store(k, to, b, dtype);
        });
    })
}

/// The pair at `from`, which moves on by a head.
fn load_pair(
    k: &mut Assembler,
    from: Reg<B64>,
    half: Reg<B32>,
    stride: Reg<B64>,
    (dtype, pairs, wide): (DType, Pairs, bool),
) -> (Reg<F32>, Reg<F32>) {
    let x = match pairs {
        Pairs::Interleaved if wide => load_vector(k, from, dtype, 2),
        Pairs::Interleaved => super::rope::two(k, from, dtype),
        Pairs::HalfSplit => {
            let other = element(k, from, half, dtype);
            vec![parts::load(k, from, dtype), parts::load(k, other, dtype)]
        }
    };
    ptx!(k, "add.u64 {from}, {from}, {stride};");
    (x[0], x[1])
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    let mut all = vec![];
    for (dtype, lanes) in [(DType::Bf16, 8), (DType::F32, 4)] {
        all.push(scatter_kernel(dtype, lanes));
        for pairs in [Pairs::Interleaved, Pairs::HalfSplit] {
            all.push(assemble_kernel(dtype, pairs, lanes));
            all.push(shared_kernel(dtype, pairs, pairs == Pairs::Interleaved));
        }
    }
    all.into_iter().map(|kernel| Variant::new(kernel, 40)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::{mla as cpu, rope::Rope},
        ptx::case::{Case, Data},
    };

    #[test]
    fn keys_values_and_their_gradients_are_the_cpus_to_the_bit() {
        // t, h, n, r, v, c
        let shapes = [
            [0, 2, 8, 16, 8, 8],
            [3, 2, 16, 16, 24, 32],
            [5, 5, 6, 4, 3, 5],
            [2, 3, 5, 2, 1, 0],
            [4, 16, 128, 64, 128, 512],
        ];
        let types = [DType::F32, DType::Bf16].into_iter();
        for (dtype, pairs) in types.flat_map(|d| [(d, Pairs::Interleaved), (d, Pairs::HalfSplit)]) {
            for [t, h, n, r, v, c] in shapes {
                let rope = Rope { theta: 1e4, dim: r, yarn: None };
                let positions = Data::random(DType::U32, &[t], 2).map(|x| (x.abs() * 30.0).floor());
                let (a, b, k) = ([t, c + r], [t, h, n + v], [t, h, n + r]);
                let split = |x: &[Tensor]| (Projections { kv_a: x[0], kv_b: x[1] }, x[2], x[3], x[4]);
                let (a, b) = (Data::random(dtype, &a, 1), Data::random(dtype, &b, 2));
                Case::new(&[a.clone(), b, positions.clone(), Data::poison(dtype, &k), Data::poison(dtype, &[t, h, v])])
                    .cpu(|s, x| {
                        let (table, (x, at, k, v)) = (rope.table(s.memory(), dtype, 30, pairs), split(x));
                        cpu::assemble(s, x, at, &table, k, v)
                    })
                    .ptx_with(|m, x| {
                        let (table, (x, at, k, v)) = (rope.table(m, dtype, 30, pairs), split(x));
                        assemble(x, at, &table, k, v)
                    })
                    .equal();
                let grads = [Data::random(dtype, &k, 3), Data::random(dtype, &[t, h, v], 4)];
                let [dk, dv] = grads;
                Case::new(&[a, Data::poison(dtype, &[t, h * (n + v)]), positions, dk, dv])
                    .cpu(|s, x| {
                        let (table, (x, at, k, v)) = (rope.table(s.memory(), dtype, 30, pairs), split(x));
                        cpu::assemble_grad(s, k, v, at, &table, x)
                    })
                    .ptx_with(|m, x| {
                        let (table, (x, at, k, v)) = (rope.table(m, dtype, 30, pairs), split(x));
                        assemble_grad(k, v, at, &table, x)
                    })
                    .equal();
            }
        }
    }
}
