//! RMSNorm: a warp or a block a row ([`Team`]); the second reading of a row comes from the caches.
//!
//! forward (x, w, y, rstd, rows, c, d: u32, eps: f32): d columns of rows of c. Moves x once and y once.
//! input_grad (x, w, rstd, dy, \[residual,\] dx, rows, c, d: u32). Moves x, dy, dx and the residual, which may be dx, once each.
//! weight_grad in two launches: `partial` (x, rstd, dy, partial, rows, c, d): block (i, j) sums 32 rows of its columns;
//! `column_sums` (partial, n, d, dw): 8 warps share 32 groups of columns, each takes every eighth row, and the first adds
//! the eight and dw: one order, and one rounding. Scratch 0: partial, f32 [rows / 32, d].

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Pred, Reg},
    fold::{Fold, Team},
    golden::Variant,
    parts::{
        self, BLOCK, constant, count, element, f32_op, load, load_vector, return_past, row, special, store,
        store_vector, strided,
    },
};
use crate::{dtype::DType, ptx, tensor::Tensor};

/// Rows of a partial sum: enough blocks for a device, and 1/16 of the traffic for partial sums of bf16.
const ROWS: u32 = 32;

/// F: the first d columns of `x` [t, c] -> `y` [t, d], with weight `w` \[d\]; `rstd` \[t\] is kept for the backward passes.
pub fn forward(x: Tensor, w: Tensor, y: Tensor, rstd: Tensor, eps: f64) -> Vec<Launch> {
    let (t, c, d) = (x.rows(), x.cols(), w.len());
    if t * d == 0 {
        return vec![];
    }
    let (lanes, mut args) = (row_lanes(&[x, w, y], c, d), [x, w, y, rstd].map(Arg::Tensor).to_vec());
    args.extend([t, c, d].map(|n| Arg::U32(count(n))));
    args.push(Arg::F32(eps as f32));
    let team = Team::of(d / lanes);
    vec![Launch { kernel: forward_kernel(x.dtype, team, lanes), grid: team.grid(t), args }]
}

/// I: the gradient of the first d columns of `x`, plus those of `residual` [t, c] if given, goes to the same columns of `dx` [t, c].
pub fn input_grad(x: Tensor, w: Tensor, rstd: Tensor, dy: Tensor, residual: Option<Tensor>, dx: Tensor) -> Vec<Launch> {
    let (t, c, d) = (x.rows(), x.cols(), w.len());
    if t * d == 0 {
        return vec![];
    }
    let lanes = row_lanes(&[x, w, dy, dx, residual.unwrap_or(dx)], c, d);
    let mut args: Vec<Arg> = [x, w, rstd, dy].into_iter().chain(residual).chain([dx]).map(Arg::Tensor).collect();
    args.extend([t, c, d].map(|n| Arg::U32(count(n))));
    let team = Team::of(d / lanes);
    vec![Launch { kernel: input_grad_kernel(x.dtype, team, lanes, residual.is_some()), grid: team.grid(t), args }]
}

/// W: `dw` \[d\] += sum over t of dy_td x_td r_t; dw may be wider than x.
pub fn weight_grad(x: Tensor, rstd: Tensor, dy: Tensor, dw: Tensor) -> Vec<Launch> {
    let (t, c, d) = (x.rows(), x.cols(), dw.len());
    if t * d == 0 {
        return vec![];
    }
    let (lanes, blocks) = (row_lanes(&[x, dy], c, d), count(t).div_ceil(ROWS));
    let partial = Arg::Scratch { slot: 0, bytes: 4 * u64::from(blocks) * d as u64 };
    let mut args = vec![Arg::Tensor(x), Arg::Tensor(rstd), Arg::Tensor(dy), partial.clone()];
    args.extend([t, c, d].map(|n| Arg::U32(count(n))));
    let columns = count(d / lanes).div_ceil(BLOCK);
    let first = Launch { kernel: partial_kernel(x.dtype, lanes), grid: [columns, blocks, 1], args };
    vec![first, column_sums(partial, blocks, dw)]
}

/// dw \[d\] += sum over n of f32 [n, d] at `partial`.
fn column_sums(partial: Arg, n: u32, dw: Tensor) -> Launch {
    let (d, lanes) = (count(dw.len()), if parts::lanes(&[dw], dw.len()) == 1 { 1 } else { 4 });
    let args = vec![partial, Arg::U32(n), Arg::U32(d), Arg::Tensor(dw)];
    Launch { kernel: column_sums_kernel(dw.dtype, lanes), grid: [d.div_ceil(32 * lanes as u32), 1, 1], args }
}

/// Neighbours that a thread takes of rows of d columns, or of the first d of c.
pub(super) fn row_lanes(tensors: &[Tensor], c: usize, d: usize) -> usize {
    let most = parts::lanes(tensors, d);
    if c.is_multiple_of(most) { most } else { 1 }
}

/// 1 / d for the mean, as a divisor: d as f32.
fn as_f32(k: &mut Assembler, n: Reg<B32>) -> Reg<F32> {
    let x = k.reg::<F32>();
    ptx!(k, "cvt.rn.f32.u32 {x}, {n};");
    x
}

fn groups_of(k: &mut Assembler, d: Reg<B32>, lanes: usize) -> Reg<B32> {
    let groups = k.reg::<B32>();
    ptx!(k, "shr.u32 {groups}, {d}, {};", lanes.trailing_zeros());
    groups
}

/// 1 / sqrt(mean of x^2 + eps) over the first d columns of the row at `x`, which all threads of the team get.
pub(super) fn reciprocal(
    k: &mut Assembler,
    (team, lane): (Team, Reg<B32>),
    x: Reg<B64>,
    d: Reg<B32>,
    eps: Reg<F32>,
    (dtype, lanes): (DType, usize),
) -> Reg<F32> {
    let (groups, sum) = (groups_of(k, d, lanes), constant(k, 0.0));
    strided(k, lane, groups, team.threads(), |k, group| {
        let from = k.reg();
        ptx!(k, "mad.wide.u32 {from}, {group}, {}, {x};", lanes * dtype.size_bytes());
        for x in load_vector(k, from, dtype, lanes) {
            ptx!(k, "fma.rn.f32 {sum}, {x}, {x}, {sum};");
        }
    });
    team.fold(k, sum, Fold::Sum);
    let d = as_f32(k, d);
    ptx!(k, "div.rn.f32 {sum}, {sum}, {d};");
    ptx!(k, "add.rn.f32 {sum}, {sum}, {eps};");
    ptx!(k, "sqrt.rn.f32 {sum}, {sum};");
    ptx!(k, "rcp.rn.f32 {sum}, {sum};");
    sum
}

/// Stores a row's number as element `index`, by the first thread of the team.
pub(super) fn store_by_first(
    k: &mut Assembler,
    lane: Reg<B32>,
    base: Reg<B64>,
    index: Reg<B32>,
    x: Reg<F32>,
    dtype: DType,
) {
    let (other, skip) = (k.reg::<Pred>(), k.label("skip"));
    ptx!(k, "setp.ne.u32 {other}, {lane}, 0;");
    ptx!(k, "@{other} bra {skip};");
    let to = element(k, base, index, dtype);
    store(k, to, x, dtype);
    k.place(&skip);
}

fn forward_kernel(dtype: DType, team: Team, lanes: usize) -> Kernel {
    let name = format!("rms_norm_forward_{}_{}_x{lanes}", dtype.name(), team.name());
    parts::kernel(name, move |k| {
        let (x, w, y, rstd) = (k.pointer("x"), k.pointer("w"), k.pointer("y"), k.pointer("rstd"));
        let (rows, c, d, eps) = (k.u32("rows"), k.u32("c"), k.u32("d"), k.f32("eps"));
        let (index, lane) = team.place(k, rows);
        let (x, y) = (row(k, x, index, c, dtype), row(k, y, index, d, dtype));
        let r = reciprocal(k, (team, lane), x, d, eps, (dtype, lanes));
        store_by_first(k, lane, rstd, index, r, dtype);
        let (groups, size) = (groups_of(k, d, lanes), lanes * dtype.size_bytes());
        let at = |k: &mut Assembler, base, group| {
            let at = k.reg();
            ptx!(k, "mad.wide.u32 {at}, {group}, {size}, {base};");
            at
        };
        strided(k, lane, groups, team.threads(), |k, group| {
            let (from_x, from_w, to) = (at(k, x, group), at(k, w, group), at(k, y, group));
            let (x, w) = (load_vector(k, from_x, dtype, lanes), load_vector(k, from_w, dtype, lanes));
            for (x, w) in x.iter().zip(w) {
                ptx!(k, "mul.rn.f32 {x}, {x}, {r};");
                ptx!(k, "mul.rn.f32 {x}, {x}, {w};");
            }
            store_vector(k, to, &x, dtype);
        });
    })
}

fn input_grad_kernel(dtype: DType, team: Team, lanes: usize, onto: bool) -> Kernel {
    let what = if onto { "input_grad_onto" } else { "input_grad" };
    parts::kernel(format!("rms_norm_{what}_{}_{}_x{lanes}", dtype.name(), team.name()), move |k| {
        let (x, w, rstd) = (k.pointer("x"), k.pointer("w"), k.pointer("rstd"));
        let dy = k.pointer("dy");
        let residual = onto.then(|| k.pointer("residual"));
        let dx = k.pointer("dx");
        let (rows, c, d) = (k.u32("rows"), k.u32("c"), k.u32("d"));
        let (index, lane) = team.place(k, rows);
        let [x, dx] = [x, dx].map(|base| row(k, base, index, c, dtype));
        let residual = residual.map(|base| row(k, base, index, c, dtype));
        let dy = row(k, dy, index, d, dtype);
        let (groups, size) = (groups_of(k, d, lanes), lanes * dtype.size_bytes());
        let load_three = |k: &mut Assembler, group| {
            [x, w, dy].map(|base| {
                let at = k.reg();
                ptx!(k, "mad.wide.u32 {at}, {group}, {size}, {base};");
                load_vector(k, at, dtype, lanes)
            })
        };
        let from = element(k, rstd, index, dtype);
        let (r, dot) = (load(k, from, dtype), constant(k, 0.0));
        strided(k, lane, groups, team.threads(), |k, group| {
            let [x, w, dy] = load_three(k, group);
            for ((x, w), dy) in x.iter().zip(w).zip(dy) {
                let product = f32_op(k, "mul", *x, dy);
                ptx!(k, "fma.rn.f32 {dot}, {product}, {w}, {dot};");
            }
        });
        team.fold(k, dot, Fold::Sum);
        // minus dot r^3 / d
        let d = as_f32(k, d);
        for _ in 0..3 {
            ptx!(k, "mul.rn.f32 {dot}, {dot}, {r};");
        }
        ptx!(k, "div.rn.f32 {dot}, {dot}, {d};");
        ptx!(k, "neg.f32 {dot}, {dot};");
        strided(k, lane, groups, team.threads(), |k, group| {
            let ([x, w, dy], to) = (load_three(k, group), k.reg());
            ptx!(k, "mad.wide.u32 {to}, {group}, {size}, {dx};");
            let added = residual.map_or(vec![], |residual| {
                let from = k.reg();
                ptx!(k, "mad.wide.u32 {from}, {group}, {size}, {residual};");
                load_vector(k, from, dtype, lanes)
            });
            for (i, ((x, w), dy)) in x.iter().zip(w).zip(dy).enumerate() {
                ptx!(k, "mul.rn.f32 {w}, {w}, {dy};");
                ptx!(k, "mul.rn.f32 {w}, {w}, {r};");
                ptx!(k, "fma.rn.f32 {x}, {x}, {dot}, {w};");
                if let Some(added) = added.get(i) {
                    ptx!(k, "add.rn.f32 {x}, {x}, {added};");
                }
            }
            store_vector(k, to, &x, dtype);
        });
    })
}

fn partial_kernel(dtype: DType, lanes: usize) -> Kernel {
    parts::kernel(format!("rms_norm_weight_grad_{}_x{lanes}", dtype.name()), move |k| {
        let (x, rstd, dy, partial) = (k.pointer("x"), k.pointer("rstd"), k.pointer("dy"), k.pointer("partial"));
        let (rows, c, d) = (k.u32("rows"), k.u32("c"), k.u32("d"));
        let (column, block) = (parts::global_index(k), special(k, "%ctaid.y"));
        ptx!(k, "mul.lo.u32 {column}, {column}, {lanes};");
        return_past(k, column, d);
        let (first, end, whole) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "mul.lo.u32 {first}, {block}, {ROWS};");
        ptx!(k, "add.u32 {end}, {first}, {ROWS};");
        ptx!(k, "min.u32 {end}, {end}, {rows};");
        let sums: Vec<Reg<F32>> = (0..lanes).map(|_| constant(k, 0.0)).collect();
        // Four rows at a time, so that eight loads are on their way; then the rest one by one.
        let add = |k: &mut Assembler, first: Reg<B32>, n: usize| {
            let loaded: Vec<_> = (0..n)
                .map(|i| {
                    let index = k.reg::<B32>();
                    ptx!(k, "add.u32 {index}, {first}, {i};");
                    let (x, dy) = (row(k, x, index, c, dtype), row(k, dy, index, d, dtype));
                    let (x, dy) = (element(k, x, column, dtype), element(k, dy, column, dtype));
                    let r = element(k, rstd, index, dtype);
                    (load(k, r, dtype), load_vector(k, x, dtype, lanes), load_vector(k, dy, dtype, lanes))
                })
                .collect();
            for (r, x, dy) in loaded {
                for ((sum, x), dy) in sums.iter().zip(x).zip(dy) {
                    let product = f32_op(k, "mul", x, dy);
                    ptx!(k, "fma.rn.f32 {sum}, {product}, {r}, {sum};");
                }
            }
        };
        ptx!(k, "sub.u32 {whole}, {end}, {first};");
        ptx!(k, "and.b32 {whole}, {whole}, -4;");
        ptx!(k, "add.u32 {whole}, {first}, {whole};");
        strided(k, first, whole, 4, |k, i| add(k, i, 4));
        strided(k, whole, end, 1, |k, i| add(k, i, 1));
        let to = row(k, partial, block, d, DType::F32);
        let to = element(k, to, column, DType::F32);
        store_vector(k, to, &sums, DType::F32);
    })
}

fn column_sums_kernel(dtype: DType, lanes: usize) -> Kernel {
    let num_warps = BLOCK / 32;
    parts::kernel(format!("column_sums_{}_x{lanes}", dtype.name()), move |k| {
        let (partial, n, d, dw) = (k.pointer("partial"), k.u32("n"), k.u32("d"), k.pointer("dw"));
        let shared = k.shared(16, "sums", (BLOCK as usize) * lanes * 4);
        let (tid, column) = (special(k, "%tid.x"), special(k, "%ctaid.x"));
        let (warp, lane, at) = (k.reg::<B32>(), k.reg::<B32>(), special(k, &shared));
        ptx!(k, "shr.u32 {warp}, {tid}, 5;");
        ptx!(k, "and.b32 {lane}, {tid}, 31;");
        ptx!(k, "mad.lo.u32 {column}, {column}, 32, {lane};");
        ptx!(k, "mul.lo.u32 {column}, {column}, {lanes};");
        let (outside, wait) = (k.reg::<Pred>(), k.label("wait"));
        ptx!(k, "setp.ge.u32 {outside}, {column}, {d};");
        ptx!(k, "@{outside} bra {wait};");
        let sums: Vec<Reg<F32>> = (0..lanes).map(|_| constant(k, 0.0)).collect();
        strided(k, warp, n, num_warps, |k, i| {
            let from = row(k, partial, i, d, DType::F32);
            let from = element(k, from, column, DType::F32);
            for (sum, x) in sums.iter().zip(load_vector(k, from, DType::F32, lanes)) {
                ptx!(k, "add.rn.f32 {sum}, {sum}, {x};");
            }
        });
        let mine = k.reg::<B32>();
        ptx!(k, "mad.lo.u32 {mine}, {tid}, {}, {at};", 4 * lanes);
        for (i, sum) in sums.iter().enumerate() {
            ptx!(k, "st.shared.f32 [{mine}+{}], {sum};", 4 * i);
        }
        k.place(&wait);
        ptx!(k, "bar.sync 0;");
        return_past(k, tid, 32);
        return_past(k, column, d);
        for w in 1..num_warps as usize {
            for (i, sum) in sums.iter().enumerate() {
                let x = k.reg::<F32>();
                ptx!(k, "ld.shared.f32 {x}, [{mine}+{}];", (w * 32 * lanes + i) * 4);
                ptx!(k, "add.rn.f32 {sum}, {sum}, {x};");
            }
        }
        let to = element(k, dw, column, dtype);
        for (sum, old) in sums.iter().zip(load_vector(k, to, dtype, lanes)) {
            ptx!(k, "add.rn.f32 {sum}, {sum}, {old};");
        }
        store_vector(k, to, &sums, dtype);
    })
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    let mut all = vec![];
    for (dtype, lanes) in [(DType::Bf16, 8), (DType::F32, 4)] {
        for team in [Team::Warp, Team::Block] {
            all.push(forward_kernel(dtype, team, lanes));
            all.extend([false, true].map(|onto| input_grad_kernel(dtype, team, lanes, onto)));
        }
        all.extend([partial_kernel(dtype, lanes), column_sums_kernel(dtype, 4)]);
    }
    all.into_iter().map(|kernel| Variant::new(kernel, 48)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::rms_norm as cpu,
        ptx::case::{Case, Data},
    };

    const SHAPES: [[usize; 3]; 7] =
        [[0, 8, 8], [1, 8, 8], [5, 21, 18], [3, 72, 64], [9, 1032, 1024], [2, 2056, 2048], [2, 4100, 4099]];

    fn inputs(dtype: DType, [t, c, d]: [usize; 3]) -> Vec<Data> {
        let rstd = Data::random(dtype, &[t], 4).map(|x| x + 1.5);
        vec![Data::random(dtype, &[t, c], 1), Data::random(dtype, &[d], 2), rstd, Data::random(dtype, &[t, d], 3)]
    }

    #[test]
    fn forward_is_the_cpus() {
        for dtype in [DType::F32, DType::Bf16] {
            for [t, c, d] in SHAPES {
                let mut x = inputs(dtype, [t, c, d]);
                (x[2], x[3]) = (Data::poison(dtype, &[t]), Data::poison(dtype, &[t, d]));
                // A sum of squares in another order: 1e-6.
                Case::new(&x)
                    .cpu(|s, x| cpu::forward(s, x[0], x[1], x[3], x[2], 1e-6))
                    .ptx(|x| forward(x[0], x[1], x[3], x[2], 1e-6))
                    .close(1e-6);
            }
        }
    }

    #[test]
    fn each_barrier_is_needed() {
        let x = inputs(DType::F32, [2, 1028, 1024]);
        let all = |x: &[Tensor]| {
            let mut launches = forward(x[0], x[1], x[3], x[2], 1e-6);
            launches.extend(weight_grad(x[0], x[2], x[3], x[1]));
            launches
        };
        Case::new(&x).ptx(all).mutants("bar.sync", all);
    }

    #[test]
    fn input_grad_is_the_cpus_and_leaves_other_columns() {
        for dtype in [DType::F32, DType::Bf16] {
            // Assigned, onto what is there, and onto a residual from elsewhere.
            for ([t, c, d], residual) in SHAPES.into_iter().flat_map(|s| [None, Some(4), Some(5)].map(|r| (s, r))) {
                let mut x = inputs(dtype, [t, c, d]);
                let (dx, poison) = (Data::random(dtype, &[t, c], 5), Data::poison(dtype, &[t, c]));
                x.extend(if residual == Some(4) { [dx, poison] } else { [poison, dx] });
                let residual = |x: &[Tensor]| residual.map(|i: usize| x[i]);
                // Sums of d products of size 1 in another order, times r^3 / d.
                Case::new(&x)
                    .cpu(|s, x| cpu::input_grad(s, x[0], x[1], x[2], x[3], residual(x), x[4]))
                    .ptx(|x| input_grad(x[0], x[1], x[2], x[3], residual(x), x[4]))
                    .close(2e-6);
            }
        }
    }

    #[test]
    fn weight_grad_is_the_sum_in_f64() {
        for dtype in [DType::F32, DType::Bf16] {
            for shape in [[0, 8, 8], [1, 8, 8], [70, 21, 18], [300, 72, 64], [33, 2056, 2048]] {
                let mut x = inputs(dtype, shape);
                x[1] = Data::random(DType::F32, &[shape[2]], 6);
                let wide = |x: &Data| {
                    let m = crate::memory::Memory::new(crate::device::Device::Cpu);
                    let t = x.upload(&m);
                    ptx::case::values(&m, t)
                };
                let f64s: Vec<Data> = x.iter().map(|x| Data(DType::F64, x.1.clone(), wide(x))).collect();
                let f64s = [f64s[0].clone(), f64s[2].clone(), f64s[3].clone()];
                Case::new(&x)
                    .cpu(|s, x| {
                        let m = s.memory().clone();
                        let [a, r, dy] = [0, 1, 2].map(|i| f64s[i].upload(&m));
                        let dw = m.alloc(DType::F64, &[shape[2]]);
                        crate::ops::elementwise::copy(s, x[1], dw)?;
                        cpu::weight_grad(s, a, r, dy, dw)?;
                        crate::ops::elementwise::copy(s, dw, x[1])
                    })
                    .ptx(|x| weight_grad(x[0], x[2], x[3], x[1]))
                    // f32 sums of up to 300 terms of size 2.
                    .close(3e-6);
            }
        }
    }
}
