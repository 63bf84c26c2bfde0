//! Tokens to experts and back on the device: the order is [`sort`]'s, rows are moved and summed here.
//!
//! Signatures (row counts and numbers are u32; `g` is groups of neighbouring elements a row, one access of a thread):
//! - permute (x, token_of_row, rows, n, g): a row's thread copies its groups of the token's row.
//! - gather_sum `(rows, row_of_slot, [weights,] [residual,] y, t, g)`: a token's threads sum its k rows in slot order, from the
//!   residual on, rounding products and sums one by one as the CPU does: the bits are the same. The residual may be y.
//! - combine_grad (dy, rows, weights, row_of_slot, drows, dweights, t, g): a token's threads read dy once for its k rows; the products
//!   are summed over the team by a fixed tree.
//!
//! A team is a warp for short rows and a block for long ones; all but sort take any grid. k is part of the names: the k rows of a
//! token are k loads in flight. Counts and offsets are never read on the host. Time: bytes over memory bandwidth (permute 2 n d
//! elements, gather_sum (k + 1) t d, combine_grad (2 k + 1) t d; t d more for a residual).

mod sort;

pub use sort::{MAX_EXPERTS, sort};

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Pred, Reg},
    fold::{Fold, Team},
    golden::Variant,
    parts::{self, copy_bits, count, element, f32_op, load_u32, load_vector, row, store_vector, strided},
};
use crate::{dtype::DType, ops::permute::Order, ptx, tensor::Tensor};

/// F: gathers x [t, d] into rows [t k, d].
pub fn permute(x: Tensor, order: Order, rows: Tensor) -> Vec<Launch> {
    let (n, lanes) = (order.token_of_row.len(), parts::lanes(&[x, rows], x.cols()));
    let team = Team::of(x.cols() / lanes);
    let args = [x, order.token_of_row, rows].map(Arg::Tensor);
    launch(permute_kernel(x.dtype, lanes, team), team, args.into(), [n, x.cols() / lanes])
}

/// Row `index[i]` of x to row i of `rows`: n rows of d elements, at addresses, whose rows begin as aligned as those of `like`, which are as
/// long.
pub fn gather_rows(x: Arg, index: Arg, rows: Arg, n: usize, like: &[Tensor]) -> Vec<Launch> {
    let (dtype, d) = (like[0].dtype, like[0].cols());
    let lanes = parts::lanes(like, d);
    let team = Team::of(d / lanes);
    launch(permute_kernel(dtype, lanes, team), team, vec![x, index, rows], [n, d / lanes])
}

/// I of permute: `dx_td = sum_j drows[row_of_slot[t, j]]`, or `+=` if `accumulate`.
pub fn permute_grad(drows: Tensor, order: Order, dx: Tensor, accumulate: bool) -> Vec<Launch> {
    gather_sum(drows, None, order, accumulate.then_some(dx), dx)
}

/// F: `y_td = residual_td + sum_j weights[t, j] rows[row_of_slot[t, j]]`; the residual, if there is one, may be y.
pub fn combine(rows: Tensor, weights: Tensor, order: Order, residual: Option<Tensor>, y: Tensor) -> Vec<Launch> {
    gather_sum(rows, Some(weights), order, residual, y)
}

fn gather_sum(rows: Tensor, weights: Option<Tensor>, order: Order, residual: Option<Tensor>, y: Tensor) -> Vec<Launch> {
    let (t, d) = (y.rows(), y.cols());
    let k = rows.rows() / t.max(1);
    let lanes = parts::lanes(&[rows, y, residual.unwrap_or(y)], d);
    let team = Team::of(d / lanes);
    let tensors = [rows, order.row_of_slot].into_iter().chain(weights).chain(residual).chain([y]);
    let kernel = gather_sum_kernel(y.dtype, lanes, team, k, weights.is_some(), residual.is_some());
    launch(kernel, team, tensors.map(Arg::Tensor).collect(), [t, d / lanes])
}

/// I of combine, from dy [t, d]: `drows[r] = weight of r * dy[token of r]`, `dweights[t, j] = <row of (t, j), dy[t]>`.
pub fn combine_grad(
    dy: Tensor,
    rows: Tensor,
    weights: Tensor,
    order: Order,
    drows: Tensor,
    dweights: Tensor,
) -> Vec<Launch> {
    let (t, d, k) = (dy.rows(), dy.cols(), weights.cols());
    let lanes = parts::lanes(&[dy, rows, drows], d);
    let team = Team::of(d / lanes);
    let args = [dy, rows, weights, order.row_of_slot, drows, dweights].map(Arg::Tensor);
    launch(combine_grad_kernel(dy.dtype, lanes, team, k), team, args.into(), [t, d / lanes])
}

/// Launches for `sizes[0]` teams; none for none.
fn launch(kernel: Kernel, team: Team, mut args: Vec<Arg>, sizes: [usize; 2]) -> Vec<Launch> {
    if sizes[0] == 0 {
        return vec![];
    }
    args.extend(sizes.map(|n| Arg::U32(count(n))));
    vec![Launch { kernel, grid: team.grid(sizes[0]), args }]
}

/// Elements of a row from its groups.
fn columns(k: &mut Assembler, groups: Reg<B32>, lanes: usize) -> Reg<B32> {
    let d = k.reg::<B32>();
    ptx!(k, "mul.lo.u32 {d}, {groups}, {lanes};");
    d
}

/// Address of group `i` of a row.
fn group(k: &mut Assembler, row: Reg<B64>, i: Reg<B32>, dtype: DType, lanes: usize) -> Reg<B64> {
    let at = k.reg::<B64>();
    ptx!(k, "mad.wide.u32 {at}, {i}, {}, {row};", lanes * dtype.size_bytes());
    at
}

fn permute_kernel(dtype: DType, lanes: usize, team: Team) -> Kernel {
    let bytes = dtype.size_bytes();
    parts::kernel(format!("permute_b{}_x{lanes}_{}", 8 * bytes, team.name()), move |k| {
        let (x, tokens, rows, n, groups) =
            (k.pointer("x"), k.pointer("token_of_row"), k.pointer("rows"), k.u32("n"), k.u32("g"));
        let d = columns(k, groups, lanes);
        team.each_row(k, n, |k, r, first| {
            let token = load_u32(k, tokens, r);
            let (from, to) = (row(k, x, token, d, dtype), row(k, rows, r, d, dtype));
            strided(k, first, groups, team.threads(), |k, i| {
                let (from, to) = (group(k, from, i, dtype, lanes), group(k, to, i, dtype, lanes));
                copy_bits(k, from, to, bytes, lanes);
            });
        });
    })
    .for_any_grid()
}

/// A row of a token: its address, its number, and its weight if there are any.
#[derive(Clone, Copy)]
struct Row {
    at: Reg<B64>,
    number: Reg<B32>,
    weight: Option<Reg<F32>>,
}

/// The k rows of token `t`.
fn rows_of(
    k: &mut Assembler,
    (rows, slots, weights): (Reg<B64>, Reg<B64>, Option<Reg<B64>>),
    (t, d): (Reg<B32>, Reg<B32>),
    num: usize,
    dtype: DType,
) -> Vec<Row> {
    let slot = k.reg::<B32>();
    ptx!(k, "mul.lo.u32 {slot}, {t}, {num};");
    let slots = element(k, slots, slot, DType::U32);
    let weights = weights.map(|w| element(k, w, slot, DType::F32));
    (0..num)
        .map(|j| {
            let number = k.reg::<B32>();
            ptx!(k, "ld.global.u32 {number}, [{slots}+{}];", 4 * j);
            let weight = weights.map(|w| {
                let x = k.reg::<F32>();
                ptx!(k, "ld.global.f32 {x}, [{w}+{}];", 4 * j);
                x
            });
            Row { at: row(k, rows, number, d, dtype), number, weight }
        })
        .collect()
}

fn gather_sum_kernel(dtype: DType, lanes: usize, team: Team, num: usize, weighted: bool, onto: bool) -> Kernel {
    let op = if weighted { "combine" } else { "permute_grad" };
    let residual = if onto { "_onto" } else { "" };
    let name = format!("{op}{residual}_{}_k{num}_x{lanes}_{}", dtype.name(), team.name());
    parts::kernel(name, move |k| {
        let (rows, slots) = (k.pointer("rows"), k.pointer("row_of_slot"));
        let weights = weighted.then(|| k.pointer("weights"));
        let residual = onto.then(|| k.pointer("residual"));
        let (y, t, groups) = (k.pointer("y"), k.u32("t"), k.u32("g"));
        let d = columns(k, groups, lanes);
        team.each_row(k, t, |k, token, first| {
            let (rows, y) = (rows_of(k, (rows, slots, weights), (token, d), num, dtype), row(k, y, token, d, dtype));
            let residual = residual.map(|residual| row(k, residual, token, d, dtype));
            strided(k, first, groups, team.threads(), |k, i| {
                let to = group(k, y, i, dtype, lanes);
                let sums = match residual {
                    Some(residual) => {
                        let from = group(k, residual, i, dtype, lanes);
                        load_vector(k, from, dtype, lanes)
                    }
                    None => (0..lanes).map(|_| parts::constant(k, 0.0)).collect(),
                };
                let values: Vec<_> = rows
                    .iter()
                    .map(|row| {
                        let from = group(k, row.at, i, dtype, lanes);
                        (load_vector(k, from, dtype, lanes), row.weight)
                    })
                    .collect();
                for (values, weight) in values {
                    for (sum, x) in sums.iter().zip(values) {
                        if let Some(weight) = weight {
                            ptx!(k, "mul.rn.f32 {x}, {weight}, {x};");
                        }
                        ptx!(k, "add.rn.f32 {sum}, {sum}, {x};");
                    }
                }
                store_vector(k, to, &sums, dtype);
            });
        });
    })
    .for_any_grid()
}

fn combine_grad_kernel(dtype: DType, lanes: usize, team: Team, num: usize) -> Kernel {
    parts::kernel(format!("combine_grad_{}_k{num}_x{lanes}_{}", dtype.name(), team.name()), move |k| {
        let (dy, rows, weights, slots) =
            (k.pointer("dy"), k.pointer("rows"), k.pointer("weights"), k.pointer("row_of_slot"));
        let (drows, dweights, t, groups) = (k.pointer("drows"), k.pointer("dweights"), k.u32("t"), k.u32("g"));
        let d = columns(k, groups, lanes);
        team.each_row(k, t, |k, token, first| {
            let dy = row(k, dy, token, d, dtype);
            let from = rows_of(k, (rows, slots, Some(weights)), (token, d), num, dtype);
            let to: Vec<Reg<B64>> = from.iter().map(|r| row(k, drows, r.number, d, dtype)).collect();
            let sums: Vec<Reg<F32>> = (0..num).map(|_| parts::constant(k, 0.0)).collect();
            strided(k, first, groups, team.threads(), |k, i| {
                let at = group(k, dy, i, dtype, lanes);
                let g = load_vector(k, at, dtype, lanes);
                for ((row, &to), sum) in from.iter().zip(&to).zip(&sums) {
                    let (at, to) = (group(k, row.at, i, dtype, lanes), group(k, to, i, dtype, lanes));
                    let x = load_vector(k, at, dtype, lanes);
                    for (x, g) in x.iter().zip(&g) {
                        ptx!(k, "fma.rn.f32 {sum}, {x}, {g}, {sum};");
                    }
                    if let Some(weight) = row.weight {
                        let scaled: Vec<Reg<F32>> = g.iter().map(|g| f32_op(k, "mul", weight, g)).collect();
                        store_vector(k, to, &scaled, dtype);
                    }
                }
            });
            for &sum in &sums {
                team.fold(k, sum, Fold::Sum);
            }
            let (other, slot, end) = (k.reg::<Pred>(), k.reg::<B32>(), k.label("told"));
            ptx!(k, "setp.ne.u32 {other}, {first}, 0;");
            ptx!(k, "@{other} bra {end};");
            ptx!(k, "mul.lo.u32 {slot}, {token}, {num};");
            let at = element(k, dweights, slot, DType::F32);
            for (j, sum) in sums.iter().enumerate() {
                ptx!(k, "st.global.f32 [{at}+{}], {sum};", 4 * j);
            }
            k.place(&end);
            if team == Team::Block && num == 1 {
                // The next row's sum is written where this one's is read; more sums have barriers between these.
                ptx!(k, "bar.sync 0;");
            }
        });
    })
    .for_any_grid()
}

/// What is committed: DeepSeek-V3's 256 experts, eight a token.
pub fn variants() -> Vec<Variant> {
    let mut all = vec![
        Variant::new(sort::count_kernel(256), 32),
        Variant::new(sort::scatter_kernel(256), 40),
        Variant::new(permute_kernel(DType::Bf16, 8, Team::Block), 32),
    ];
    for onto in [false, true] {
        for weighted in [false, true] {
            all.push(Variant::new(gather_sum_kernel(DType::Bf16, 8, Team::Block, 8, weighted, onto), 96));
        }
    }
    all.push(Variant::new(combine_grad_kernel(DType::Bf16, 8, Team::Block, 8), 128));
    all
}

#[cfg(test)]
mod tests;
