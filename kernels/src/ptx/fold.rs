//! Folds over the threads of a warp or a block, always in the same order, so that a result is the same in every run.

use super::{
    asm::{Assembler, B32, B64, Class, F32, F64, Pred, Reg},
    parts::{BLOCK, special},
};
use crate::ptx;

/// How two values become one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fold {
    /// Addition.
    Sum,
    /// The larger.
    Max,
}

/// A class that folds.
pub trait Number: Class {
    /// Type of its instructions.
    const NAME: &'static str;
    /// Its size.
    const BYTES: usize;
    /// The value of the lane whose number differs in the bits of `mask`.
    fn exchange(k: &mut Assembler, x: Reg<Self>, mask: u32) -> Reg<Self>;
}

fn exchange_words(k: &mut Assembler, x: Reg<B32>, mask: u32) {
    ptx!(k, "shfl.sync.bfly.b32 {x}, {x}, {mask}, 31, 0xffffffff;");
}

impl Number for F32 {
    const NAME: &'static str = "f32";
    const BYTES: usize = 4;
    fn exchange(k: &mut Assembler, x: Reg<F32>, mask: u32) -> Reg<F32> {
        let y = k.reg::<F32>();
        ptx!(k, "shfl.sync.bfly.b32 {y}, {x}, {mask}, 31, 0xffffffff;");
        y
    }
}

impl Number for B32 {
    const NAME: &'static str = "u32";
    const BYTES: usize = 4;
    fn exchange(k: &mut Assembler, x: Reg<B32>, mask: u32) -> Reg<B32> {
        let y = k.reg::<B32>();
        ptx!(k, "shfl.sync.bfly.b32 {y}, {x}, {mask}, 31, 0xffffffff;");
        y
    }
}

macro_rules! wide {
    ($class:ident, $name:literal) => {
        impl Number for $class {
            const NAME: &'static str = $name;
            const BYTES: usize = 8;
            fn exchange(k: &mut Assembler, x: Reg<$class>, mask: u32) -> Reg<$class> {
                let (low, high, y) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<$class>());
                ptx!(k, "mov.b64 {{{low}, {high}}}, {x};");
                exchange_words(k, low, mask);
                exchange_words(k, high, mask);
                ptx!(k, "mov.b64 {y}, {{{low}, {high}}};");
                y
            }
        }
    };
}
wide!(F64, "f64");
wide!(B64, "u64");

fn combine<C: Number>(k: &mut Assembler, fold: Fold, x: Reg<C>, y: Reg<C>) {
    let op = match fold {
        // Rounded by itself: fused into a product, lanes would differ in the last bit.
        Fold::Sum if C::NAME.starts_with('f') => "add.rn",
        Fold::Sum => "add",
        Fold::Max => "max",
    };
    ptx!(k, "{op}.{} {x}, {x}, {y};", C::NAME);
}

/// Folds `x` over the 32 lanes of a warp, all of which get the result. Every lane must come here.
pub fn warp<C: Number>(k: &mut Assembler, x: Reg<C>, fold: Fold) {
    for mask in [16, 8, 4, 2, 1] {
        let y = C::exchange(k, x, mask);
        combine(k, fold, x, y);
    }
}

/// Folds `x` over a block of `threads`, all of which get the result and must come here. In a loop, a barrier must follow.
pub fn block<C: Number>(k: &mut Assembler, x: Reg<C>, fold: Fold, threads: u32) {
    let num_warps = threads / 32;
    warp(k, x, fold);
    if num_warps == 1 {
        return;
    }
    let name = k.label("fold").to_string();
    let shared = k.shared(8, name.trim_start_matches('$'), num_warps as usize * C::BYTES);
    let (tid, at, lane, other) = (special(k, "%tid.x"), k.reg::<B32>(), k.reg::<B32>(), k.reg::<Pred>());
    ptx!(k, "and.b32 {lane}, {tid}, 31;");
    ptx!(k, "setp.ne.u32 {other}, {lane}, 0;");
    ptx!(k, "shr.u32 {tid}, {tid}, 5;");
    ptx!(k, "mov.u32 {at}, {shared};");
    ptx!(k, "mad.lo.u32 {tid}, {tid}, {}, {at};", C::BYTES);
    ptx!(k, "@!{other} st.shared.{} [{tid}], {x};", C::NAME);
    ptx!(k, "bar.sync 0;");
    for w in 0..num_warps {
        let y = k.reg::<C>();
        ptx!(k, "ld.shared.{} {y}, [{at}+{}];", C::NAME, w as usize * C::BYTES);
        if w == 0 {
            ptx!(k, "mov.{} {x}, {y};", C::NAME);
        } else {
            combine(k, fold, x, y);
        }
    }
}

/// Sums of `x` over the earlier threads of a block of [`BLOCK`], and over all; `sums` is the address of a shared word for each warp. A
/// barrier must follow before the next call.
pub fn exclusive_scan(k: &mut Assembler, x: Reg<B32>, sums: Reg<B32>) -> (Reg<B32>, Reg<B32>) {
    let (tid, lane, warp) = (special(k, "%tid.x"), k.reg::<B32>(), k.reg::<B32>());
    ptx!(k, "and.b32 {lane}, {tid}, 31;");
    ptx!(k, "shr.u32 {warp}, {tid}, 5;");
    let (sum, other, take) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<Pred>());
    ptx!(k, "mov.u32 {sum}, {x};");
    for step in [1, 2, 4, 8, 16] {
        ptx!(k, "shfl.sync.up.b32 {other}, {sum}, {step}, 0, 0xffffffff;");
        ptx!(k, "setp.ge.u32 {take}, {lane}, {step};");
        ptx!(k, "@{take} add.u32 {sum}, {sum}, {other};");
    }
    let at = k.reg::<B32>();
    ptx!(k, "mad.lo.u32 {at}, {warp}, 4, {sums};");
    ptx!(k, "setp.eq.u32 {take}, {lane}, 31;");
    ptx!(k, "@{take} st.shared.u32 [{at}], {sum};");
    ptx!(k, "bar.sync 0;");
    let (all, before) = (special(k, "0"), k.reg::<B32>());
    ptx!(k, "sub.u32 {before}, {sum}, {x};");
    for w in 0..BLOCK / 32 {
        ptx!(k, "ld.shared.u32 {other}, [{sums}+{}];", 4 * w);
        ptx!(k, "add.u32 {all}, {all}, {other};");
        ptx!(k, "setp.gt.u32 {take}, {warp}, {w};");
        ptx!(k, "@{take} add.u32 {before}, {before}, {other};");
    }
    (before, all)
}

/// Threads that share a row: a warp for short rows, a block for long ones. Part of a kernel's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Team {
    /// 32 threads; a block has several rows.
    Warp,
    /// A block.
    Block,
}

impl Team {
    /// For rows of so many groups of neighbouring elements: a block where each of its threads has work.
    pub fn of(groups: usize) -> Self {
        if groups >= BLOCK as usize { Team::Block } else { Team::Warp }
    }

    /// As kernels' names say it.
    pub fn name(self) -> &'static str {
        match self {
            Team::Warp => "warp",
            Team::Block => "block",
        }
    }

    /// Its threads.
    pub fn threads(self) -> u32 {
        match self {
            Team::Warp => 32,
            Team::Block => BLOCK,
        }
    }

    /// Rows of a block.
    pub fn rows_per_block(self) -> u32 {
        BLOCK / self.threads()
    }

    /// Blocks for so many rows.
    pub fn grid(self, rows: usize) -> [u32; 3] {
        [super::parts::count(rows).div_ceil(self.rows_per_block()), 1, 1]
    }

    /// This thread's row, and its number in the team; teams past the last of `rows` rows return.
    pub fn place(self, k: &mut Assembler, rows: Reg<B32>) -> (Reg<B32>, Reg<B32>) {
        let (tid, row) = (special(k, "%tid.x"), special(k, "%ctaid.x"));
        if self == Team::Block {
            return (row, tid);
        }
        let (warp, lane) = (k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "shr.u32 {warp}, {tid}, 5;");
        ptx!(k, "and.b32 {lane}, {tid}, 31;");
        ptx!(k, "mad.lo.u32 {row}, {row}, {}, {warp};", self.rows_per_block());
        super::parts::return_past(k, row, rows);
        (row, lane)
    }

    /// `body(k, row, number in the team)` for each of `rows` rows, whatever the grid is: with one of [`Team::grid`] a team has one row,
    /// with fewer blocks it goes on with the rows that lie as many further as the grid has teams. A body may not return.
    pub fn each_row(self, k: &mut Assembler, rows: Reg<B32>, body: impl FnOnce(&mut Assembler, Reg<B32>, Reg<B32>)) {
        let (row, thread) = self.place(k, rows);
        let (step, end) = (super::parts::of_grid(k, self.rows_per_block()), k.label("end"));
        super::parts::over_grid(k, (row, rows), step, &end, |k, row| body(k, row, thread));
        k.place(&end);
    }

    /// Folds over the team, whose threads all get the result.
    pub fn fold<C: Number>(self, k: &mut Assembler, x: Reg<C>, fold: Fold) {
        match self {
            Team::Warp => warp(k, x, fold),
            Team::Block => block(k, x, fold, BLOCK),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        dtype::DType,
        ptx::{
            Arg, Launch,
            case::{Case, Data},
            parts::{constant, element, kernel_of, load, store, strided},
        },
        tensor::Tensor,
    };

    /// y of each thread = sum over i of the block's fold of x_i of all threads, x [5, 64].
    fn folds(fold: Fold, x: &[Tensor]) -> Vec<Launch> {
        let kernel = kernel_of("folds".into(), 64, move |k| {
            let (x, y, n) = (k.pointer("x"), k.pointer("y"), k.u32("n"));
            let (tid, total) = (special(k, "%tid.x"), constant(k, 0.0));
            strided(k, tid, n, 64, |k, i| {
                let at = element(k, x, i, DType::F32);
                let x = load(k, at, DType::F32);
                block(k, x, fold, 64);
                ptx!(k, "bar.sync 0;");
                ptx!(k, "add.rn.f32 {total}, {total}, {x};");
            });
            let to = element(k, y, tid, DType::F32);
            store(k, to, total, DType::F32);
        });
        vec![Launch { kernel, grid: [1, 1, 1], args: vec![Arg::Tensor(x[0]), Arg::Tensor(x[1]), Arg::U32(320)] }]
    }

    #[test]
    fn blocks_fold_and_need_both_barriers() {
        for fold in [Fold::Sum, Fold::Max] {
            let case = Case::new(&[Data::random(DType::F32, &[5, 64], 1), Data::poison(DType::F32, &[64])])
                .want(|x| {
                    let each = x[0].chunks(64).map(|x| match fold {
                        Fold::Sum => x.iter().sum::<f64>(),
                        Fold::Max => x.iter().copied().fold(f64::MIN, f64::max),
                    });
                    vec![x[0].clone(), vec![each.sum(); 64]]
                })
                .ptx(|x| folds(fold, x));
            case.mutants("bar.sync", |x| folds(fold, x));
            case.close(1e-5);
        }
    }
}
