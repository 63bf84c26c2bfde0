//! `y_no = x_ni w_oi^T` for a few rows of x: a warp a row of w, which is read once for up to eight rows of x.
//!
//! Signature `(x, w, [bias,] y, o, g: u32 groups of neighbours a row)`: sums over a lane's groups in order, then over the lanes by a fixed
//! tree, in f32. The number of x's rows is part of the name; more than eight are more launches. w may be bf16 under f32.
//!
//! Time: w over memory bandwidth; x stays in the first cache.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Pred, Reg},
    fold::{Fold, Team},
    golden::Variant,
    parts::{self, count, element, load, load_vector, strided},
};
use crate::{dtype::DType, ptx, tensor::Tensor};

/// Rows of x that one launch takes.
const MAX_ROWS: usize = 8;

/// What the text depends on.
#[derive(Clone, Copy)]
struct Config {
    x: DType,
    w: DType,
    bias: Option<DType>,
    rows: usize,
    lanes: usize,
}

/// F: assigns y, as [`crate::ops::gemv::forward`]; F32 or Bf16.
pub fn forward(x: Tensor, w: Tensor, bias: Option<Tensor>, y: Tensor) -> Vec<Launch> {
    let (o, i) = (w.dim(0), w.dim(1));
    let n = y.len().checked_div(o).unwrap_or(0);
    let lanes = parts::lanes(&[x, w], i);
    (0..n)
        .step_by(MAX_ROWS)
        .map(|first| {
            let rows = (n - first).min(MAX_ROWS);
            let config = Config { x: x.dtype, w: w.dtype, bias: bias.map(|b| b.dtype), rows, lanes };
            let (x, y) = (x.slice(first * i, rows * i), y.slice(first * o, rows * o));
            let mut args: Vec<Arg> = [x, w].into_iter().chain(bias).chain([y]).map(Arg::Tensor).collect();
            args.extend([o, i / lanes].map(|n| Arg::U32(count(n))));
            Launch { kernel: config.kernel(), grid: Team::Warp.grid(o), args }
        })
        .collect()
}

/// Sums over a warp of the products of the row at `w` and the rows at `x`, of `groups` times `lanes` elements.
pub(super) fn dots(
    k: &mut Assembler,
    (w, w_dtype): (Reg<B64>, DType),
    (x, x_dtype): (&[Reg<B64>], DType),
    (lane, groups, lanes): (Reg<B32>, Reg<B32>, usize),
) -> Vec<Reg<F32>> {
    let sums: Vec<Reg<F32>> = x.iter().map(|_| parts::constant(k, 0.0)).collect();
    strided(k, lane, groups, 32, |k, i| {
        let group = |k: &mut Assembler, row: Reg<B64>, dtype: DType| {
            let at = k.reg::<B64>();
            ptx!(k, "mad.wide.u32 {at}, {i}, {}, {row};", lanes * dtype.size_bytes());
            load_vector(k, at, dtype, lanes)
        };
        let w = group(k, w, w_dtype);
        for (&x, sum) in x.iter().zip(&sums) {
            for (x, w) in group(k, x, x_dtype).iter().zip(&w) {
                ptx!(k, "fma.rn.f32 {sum}, {x}, {w}, {sum};");
            }
        }
    });
    for &sum in &sums {
        Team::Warp.fold(k, sum, Fold::Sum);
    }
    sums
}

impl Config {
    fn kernel(self) -> Kernel {
        let bias = self.bias.map_or(String::new(), |b| format!("_bias_{}", b.name()));
        let types = (self.x.name(), self.w.name());
        let name = format!("gemv_{}_{}{bias}_n{}_x{}", types.0, types.1, self.rows, self.lanes);
        parts::kernel(name, move |k| self.emit(k))
    }

    fn emit(self, k: &mut Assembler) {
        let (x, w) = (k.pointer("x"), k.pointer("w"));
        let bias = self.bias.map(|dtype| (k.pointer("bias"), dtype));
        let (y, o, groups) = (k.pointer("y"), k.u32("o"), k.u32("g"));
        let (row, lane) = Team::Warp.place(k, o);
        let i = k.reg::<B32>();
        ptx!(k, "mul.lo.u32 {i}, {groups}, {};", self.lanes);
        let w = parts::row(k, w, row, i, self.w);
        let rows: Vec<Reg<B64>> = (0..self.rows)
            .map(|j| {
                let j = parts::special(k, &j.to_string());
                parts::row(k, x, j, i, self.x)
            })
            .collect();
        let sums = dots(k, (w, self.w), (&rows, self.x), (lane, groups, self.lanes));
        let bias = bias.map(|(bias, dtype)| {
            let at = element(k, bias, row, dtype);
            load(k, at, dtype)
        });
        let (other, end) = (k.reg::<Pred>(), k.label("end"));
        ptx!(k, "setp.ne.u32 {other}, {lane}, 0;");
        ptx!(k, "@{other} bra {end};");
        for (j, sum) in sums.into_iter().enumerate() {
            if let Some(bias) = bias {
                ptx!(k, "add.rn.f32 {sum}, {sum}, {bias};");
            }
            let j = parts::special(k, &j.to_string());
            let at = parts::row(k, y, j, o, self.x);
            let at = element(k, at, row, self.x);
            parts::store(k, at, sum, self.x);
        }
        k.place(&end);
    }
}

/// What is committed: a generated token's products, and the largest batch.
pub fn variants() -> Vec<Variant> {
    let bf16 = Config { x: DType::Bf16, w: DType::Bf16, bias: None, rows: 1, lanes: 8 };
    let f32 = Config { x: DType::F32, ..bf16 };
    [bf16, Config { rows: 8, ..bf16 }, f32].map(|config| Variant::new(config.kernel(), 96)).into()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::gemv as cpu,
        ptx::case::{Case, Data},
    };

    #[test]
    fn products_are_the_cpus() {
        for (n, o, i) in [(1, 1, 1), (1, 7, 33), (3, 9, 64), (8, 13, 50), (11, 5, 24), (1, 20, 1032)] {
            for (x, w) in [(DType::F32, DType::F32), (DType::F32, DType::Bf16), (DType::Bf16, DType::Bf16)] {
                for bias in [None, Some(x), Some(w)] {
                    let inputs = [
                        Data::random(x, &[n, i], 1),
                        Data::random(w, &[o, i], 2),
                        Data::random(bias.unwrap_or(x), &[o], 3),
                        Data::poison(x, &[n, o]),
                    ];
                    // Sums in another order.
                    Case::new(&inputs)
                        .cpu(|s, t| cpu::forward(s, t[0], t[1], bias.map(|_| t[2]), t[3]))
                        .ptx(|t| forward(t[0], t[1], bias.map(|_| t[2]), t[3]))
                        .close(5e-6);
                }
            }
        }
    }
}
