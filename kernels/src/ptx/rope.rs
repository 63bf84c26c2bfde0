//! Rotary position embedding in place: one thread a few neighbouring pairs, tables of cosines and sines as [`RopeTable`] has
//! them.
//!
//! Signature: (x, positions, cos, sin, n: u32 items, items a token, items a head, head, offset, half, max_positions: u32, sign:
//! f32, fault); sign is -1 for the inverse. Rounded operation by operation as the CPU op: equal to it to the bit. Moves the rotated
//! elements once in and once out. A position past the table is told of, and taken for the first.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Pred, Reg},
    fault::{Fault, Report},
    golden::Variant,
    parts::{self, count, div_rem, element, f32_op, flat, flat_grid, load_u32, load_vector, row, store_vector},
};
use crate::{
    dtype::DType,
    ops::rope::{Pairs, RopeTable},
    ptx,
    tensor::Tensor,
};

/// F: turns `x[.., offset .. offset + dim]` of x [t, h, head] or [t, head] in place by `positions` (u32, one a token).
pub fn forward(x: Tensor, offset: usize, positions: Tensor, table: &RopeTable) -> Vec<Launch> {
    rotate(x, offset, positions, table, 1.0)
}

/// I: turns the gradient back, in place.
pub fn input_grad(dx: Tensor, offset: usize, positions: Tensor, table: &RopeTable) -> Vec<Launch> {
    rotate(dx, offset, positions, table, -1.0)
}

fn rotate(x: Tensor, offset: usize, positions: Tensor, table: &RopeTable, sign: f32) -> Vec<Launch> {
    let (t, head, half) = (x.dim(0), x.cols(), table.dim() / 2);
    if x.is_empty() || half == 0 {
        return vec![];
    }
    let lanes = parts::lanes(&[x], head);
    let pairs = pairs_at_once(table.pairs, lanes);
    let pairs = if offset.is_multiple_of(lanes) && half.is_multiple_of(pairs) { pairs } else { 1 };
    let per_head = half / pairs;
    let per_token = x.len() / (t * head) * per_head;
    let mut args = [x, positions, table.cos, table.sin].map(Arg::Tensor).to_vec();
    args.extend(
        [t * per_token, per_token, per_head, head, offset, half, table.max_positions()].map(|n| Arg::U32(count(n))),
    );
    args.extend([Arg::F32(sign), Arg::Fault(Fault::Position)]);
    vec![Launch { kernel: rotate_kernel(x.dtype, table.pairs, pairs), grid: flat_grid(t * per_token, 1), args }]
}

/// Pairs in vectors of so many elements.
fn pairs_at_once(pairs: Pairs, lanes: usize) -> usize {
    match pairs {
        Pairs::Interleaved => (lanes / 2).max(1),
        Pairs::HalfSplit => lanes,
    }
}

/// As kernels' names say it.
pub(super) fn pairs_name(pairs: Pairs) -> &'static str {
    match pairs {
        Pairs::Interleaved => "interleaved",
        Pairs::HalfSplit => "half_split",
    }
}

/// A table of `half` columns on a device.
pub(super) struct TableArgs {
    /// Address of the cosines.
    pub cos: Reg<B64>,
    /// Address of the sines.
    pub sin: Reg<B64>,
    /// Its columns.
    pub half: Reg<B32>,
    /// Its rows.
    pub max_positions: Reg<B32>,
    /// What is told of a position past it.
    pub fault: Report,
}

impl TableArgs {
    /// Cosines and sines of `n` neighbouring pairs at a position; past the table, of the first, which is told of.
    pub fn load(&self, k: &mut Assembler, position: Reg<B32>, first: Reg<B32>, n: usize) -> [Vec<Reg<F32>>; 2] {
        let past = k.reg::<Pred>();
        ptx!(k, "setp.ge.u32 {past}, {position}, {};", self.max_positions);
        self.fault.tell(k, past, position, position);
        let row_of = k.reg::<B32>();
        ptx!(k, "selp.b32 {row_of}, 0, {position}, {past};");
        [self.cos, self.sin].map(|base| {
            let at = row(k, base, row_of, self.half, DType::F32);
            let at = element(k, at, first, DType::F32);
            load_vector(k, at, DType::F32, n)
        })
    }
}

/// (a cos - b sin, a sin + b cos).
pub(super) fn turn(k: &mut Assembler, a: Reg<F32>, b: Reg<F32>, cos: Reg<F32>, sin: Reg<F32>) -> (Reg<F32>, Reg<F32>) {
    let (x, y) = (f32_op(k, "mul", a, cos), f32_op(k, "mul", b, sin));
    let new_a = f32_op(k, "sub", x, y);
    let (x, y) = (f32_op(k, "mul", a, sin), f32_op(k, "mul", b, cos));
    (new_a, f32_op(k, "add", x, y))
}

fn rotate_kernel(dtype: DType, pairs: Pairs, at_once: usize) -> Kernel {
    let name = format!("rope_{}_{}_x{at_once}", dtype.name(), pairs_name(pairs));
    parts::kernel(name, move |k| {
        let [x, positions, cos, sin] = ["x", "positions", "cos", "sin"].map(|name| k.pointer(name));
        let (n, per_token, per_head) = (k.u32("n"), k.u32("per_token"), k.u32("per_head"));
        let (head, offset, half, max_positions) =
            (k.u32("head"), k.u32("offset"), k.u32("half"), k.u32("max_positions"));
        let (sign, fault) = (k.f32("sign"), Report::param(k));
        let table = TableArgs { cos, sin, half, max_positions, fault };
        flat(k, n, 1, |k, i, _| {
            let (token, first) = (div_rem(k, i, per_token).0, k.reg::<B32>());
            let (index, group) = div_rem(k, i, per_head);
            ptx!(k, "mul.lo.u32 {first}, {group}, {at_once};");
            let position = load_u32(k, positions, token);
            let [cos, sin] = table.load(k, position, first, at_once);
            for sin in &sin {
                ptx!(k, "mul.rn.f32 {sin}, {sin}, {sign};");
            }
            let at = row(k, x, index, head, dtype);
            let at = element(k, at, offset, dtype);
            match pairs {
                Pairs::Interleaved => {
                    ptx!(k, "shl.b32 {first}, {first}, 1;");
                    let at = element(k, at, first, dtype);
                    let size = dtype.size_bytes();
                    // A single pair may not be aligned for one access.
                    let x = if at_once == 1 { two(k, at, dtype) } else { load_vector(k, at, dtype, 2 * at_once) };
                    let mut y = vec![];
                    for (x, (cos, sin)) in x.chunks(2).zip(cos.into_iter().zip(sin)) {
                        let (a, b) = turn(k, x[0], x[1], cos, sin);
                        y.extend([a, b]);
                    }
                    if at_once > 1 {
                        return store_vector(k, at, &y, dtype);
                    }
                    let next = k.reg::<B64>();
                    ptx!(k, "add.u64 {next}, {at}, {size};");
                    store_vector(k, at, &y[..1], dtype);
                    store_vector(k, next, &y[1..], dtype);
                }
                Pairs::HalfSplit => {
                    let at_a = element(k, at, first, dtype);
                    let at_b = element(k, at_a, half, dtype);
                    let (a, b) = (load_vector(k, at_a, dtype, at_once), load_vector(k, at_b, dtype, at_once));
                    let pairs = a.into_iter().zip(b).zip(cos.into_iter().zip(sin));
                    let (a, b): (Vec<_>, Vec<_>) = pairs.map(|((a, b), (cos, sin))| turn(k, a, b, cos, sin)).unzip();
                    store_vector(k, at_a, &a, dtype);
                    store_vector(k, at_b, &b, dtype);
                }
            }
        });
    })
}

/// Two neighbours by two accesses.
pub(super) fn two(k: &mut Assembler, at: Reg<B64>, dtype: DType) -> Vec<Reg<F32>> {
    let next = k.reg::<B64>();
    ptx!(k, "add.u64 {next}, {at}, {};", dtype.size_bytes());
    [at, next].into_iter().flat_map(|at| load_vector(k, at, dtype, 1)).collect()
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    let mut all = vec![];
    for (dtype, lanes) in [(DType::Bf16, 8), (DType::F32, 4)] {
        for pairs in [Pairs::Interleaved, Pairs::HalfSplit] {
            all.push(rotate_kernel(dtype, pairs, pairs_at_once(pairs, lanes)));
        }
    }
    all.into_iter().map(|kernel| Variant::new(kernel, 40)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        memory::Memory,
        ops::rope::{self as cpu, Rope, Yarn},
        ptx::case::{Case, Data},
    };

    #[test]
    fn heads_turn_as_the_cpu_turns_them_to_the_bit() {
        let yarn = Yarn {
            factor: 40.0,
            original_max_position_embeddings: 64,
            beta_fast: 32.0,
            beta_slow: 1.0,
            mscale: Some(1.0),
            mscale_all_dim: None,
        };
        let both = [Pairs::Interleaved, Pairs::HalfSplit].into_iter().flat_map(|p| [(p, None), (p, Some(yarn))]);
        for (pairs, yarn) in both {
            for (dtype, inverse) in [DType::F32, DType::Bf16].into_iter().flat_map(|d| [(d, false), (d, true)]) {
                for (t, h, head, offset, dim) in
                    [(0, 2, 8, 0, 8), (3, 2, 24, 8, 16), (40, 3, 192, 128, 64), (5, 1, 7, 1, 6), (2, 4, 9, 3, 2)]
                {
                    let rope = Rope { theta: 1e4, dim, yarn };
                    let positions = Data::random(DType::U32, &[t], 2).map(|x| (x.abs() * 99.0).floor());
                    let case = Case::new(&[Data::random(dtype, &[t, h, head], 1), positions]).cpu(|s, x| {
                        let table = rope.table(s.memory(), dtype, 100, pairs);
                        let op = if inverse { cpu::input_grad } else { cpu::forward };
                        op(s, x[0], offset, x[1], &table)
                    });
                    case.ptx_with(|m, x| {
                        let table = rope.table(m, dtype, 100, pairs);
                        let kernel = if inverse { input_grad } else { forward };
                        kernel(x[0], offset, x[1], &table)
                    })
                    .equal();
                }
            }
        }
    }

    #[test]
    fn a_position_past_the_table_is_told_of() {
        let inputs = [Data::random(DType::F32, &[2, 4], 1), Data::u32(&[2], &[0, 8])];
        let table = |m: &Memory| Rope { theta: 1e4, dim: 4, yarn: None }.table(m, DType::F32, 8, Pairs::HalfSplit);
        Case::new(&inputs).same_error(
            |s, x| {
                let table = table(s.memory());
                cpu::forward(s, x[0], 0, x[1], &table)
            },
            |m, x| forward(x[0], 0, x[1], &table(m)),
        );
    }
}
