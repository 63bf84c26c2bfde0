//! Zero, copy, add: what only moves bytes. Flat, for any grid, 16 bytes a thread and tensor; add in f32 (f64 for f64), rounded once on store.
//!
//! Signatures: zero (y, n: u32); copy, add_acc (x, y, n: u32); copy_columns (x, y, n: u32 groups, groups a row: u32, c, from, e,
//! to: u32 elements); scatter (x, rows, y, n, len: u32, fault), one thread an element. Time: bytes moved over memory bandwidth.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F64, Pred, Reg},
    fault::{Fault, Report},
    golden::Variant,
    parts::{
        self, copy_bits, count, div_rem, element, flat, flat_grid, flat_over_grid, load, load_f64, load_u32,
        load_vector, store, store_vector,
    },
};
use crate::{dtype::DType, ptx, tensor::Tensor};

/// y = 0, any type.
pub fn zero(y: Tensor) -> Vec<Launch> {
    let (n, lanes) = (y.len(), parts::lanes(&[y], 0));
    launch(zero_kernel(y.dtype.size_bytes(), lanes), n, lanes, vec![Arg::Tensor(y), Arg::U32(count(n))])
}

/// y = x, rounded or widened to y's type. F64 and Bf16 do not meet.
pub fn copy(x: Tensor, y: Tensor) -> Vec<Launch> {
    let (n, lanes) = (x.len(), flat_lanes(x, y));
    launch(copy_kernel(x.dtype, y.dtype, lanes), n, lanes, vec![Arg::Tensor(x), Arg::Tensor(y), Arg::U32(count(n))])
}

/// `y[rows[i]] = x[i]`, all u32.
pub fn scatter(x: Tensor, rows: Tensor, y: Tensor) -> Vec<Launch> {
    let mut args: Vec<Arg> = [x, rows, y].map(Arg::Tensor).into();
    args.extend([x.len(), y.len()].map(|n| Arg::U32(count(n))));
    args.push(Arg::Fault(Fault::Row { len: count(y.len()) }));
    launch(scatter_kernel(), x.len(), 1, args)
}

fn scatter_kernel() -> Kernel {
    parts::kernel("scatter_b32".into(), move |k| {
        let (x, rows, y) = (k.pointer("x"), k.pointer("rows"), k.pointer("y"));
        let (n, len) = (k.u32("n"), k.u32("len"));
        let fault = Report::param(k);
        flat(k, n, 1, |k, i, _| {
            let (value, row, wrong) = (load_u32(k, x, i), load_u32(k, rows, i), k.reg::<Pred>());
            ptx!(k, "setp.ge.u32 {wrong}, {row}, {len};");
            fault.tell(k, wrong, i, row);
            let at = element(k, y, row, DType::U32);
            ptx!(k, "@!{wrong} st.global.u32 [{at}], {value};");
        });
    })
}

/// y += x; x may have another type, and is rounded once, with the sum.
pub fn add_acc(x: Tensor, y: Tensor) -> Vec<Launch> {
    let (n, lanes) = (x.len(), if y.dtype == DType::F64 { 1 } else { flat_lanes(x, y) });
    launch(add_acc_kernel(x.dtype, y.dtype, lanes), n, lanes, vec![Arg::Tensor(x), Arg::Tensor(y), Arg::U32(count(n))])
}

/// Columns `from..from + cols` of x [t, c] = columns `to..to + cols` of y [t, e], of one type; other columns of y stay.
pub fn copy_columns(
    (x, from): (Tensor, usize),
    (y, to): (Tensor, usize),
    cols: usize,
    accumulate: bool,
) -> Vec<Launch> {
    let (c, e) = (x.cols(), y.cols());
    let most = parts::lanes(&[x, y], cols);
    let lanes = if [c, e, from, to].iter().all(|n| n.is_multiple_of(most)) { most } else { 1 };
    let groups = x.rows() * (cols / lanes);
    let mut args = vec![Arg::Tensor(x), Arg::Tensor(y)];
    args.extend([groups, cols / lanes, c, from, e, to].map(|n| Arg::U32(count(n))));
    launch(copy_columns_kernel(x.dtype, lanes, accumulate), groups, 1, args)
}

fn flat_lanes(x: Tensor, y: Tensor) -> usize {
    let mixed = x.dtype != y.dtype && [x, y].iter().any(|t| t.dtype == DType::F64);
    if mixed { 1 } else { parts::lanes(&[x, y], 0) }
}

fn launch(kernel: Kernel, n: usize, lanes: usize, args: Vec<Arg>) -> Vec<Launch> {
    if n == 0 { vec![] } else { vec![Launch { kernel, grid: flat_grid(n, lanes), args }] }
}

/// A kernel for any grid: on a communication stream it has that stream's share of the device.
fn moving(name: String, emit: impl Fn(&mut Assembler) + Send + 'static) -> Kernel {
    parts::kernel(name, emit).for_any_grid()
}

fn zero_kernel(elem_bytes: usize, lanes: usize) -> Kernel {
    moving(format!("zero_b{}_x{lanes}", 8 * elem_bytes), move |k| {
        let (y, n) = (k.pointer("y"), k.u32("n"));
        let zero = parts::special(k, "0");
        flat_over_grid(k, n, lanes, |k, i, lanes| {
            let at = k.reg::<B64>();
            ptx!(k, "mad.wide.u32 {at}, {i}, {elem_bytes}, {y};");
            match elem_bytes * lanes {
                2 => ptx!(k, "st.global.b16 [{at}], 0;"),
                4 => ptx!(k, "st.global.b32 [{at}], {zero};"),
                8 => ptx!(k, "st.global.v2.b32 [{at}], {{{zero}, {zero}}};"),
                _ => ptx!(k, "st.global.v4.b32 [{at}], {{{zero}, {zero}, {zero}, {zero}}};"),
            }
        });
    })
}

fn copy_kernel(from: DType, to: DType, lanes: usize) -> Kernel {
    let bytes = from.size_bytes();
    let name = match (from, to) {
        _ if from == to => format!("copy_b{}_x{lanes}", 8 * bytes),
        (DType::F64 | DType::F32, DType::F32 | DType::F64) | (DType::F32, DType::Bf16) | (DType::Bf16, DType::F32) => {
            format!("copy_{}_{}_x{lanes}", from.name(), to.name())
        }
        _ => panic!("no kernel copies {from:?} to {to:?}"),
    };
    moving(name, move |k| {
        let (x, y, n) = (k.pointer("x"), k.pointer("y"), k.u32("n"));
        flat_over_grid(k, n, lanes, |k, i, lanes| {
            let (at_x, at_y) = (element(k, x, i, from), element(k, y, i, to));
            if from == to {
                return copy_bits(k, at_x, at_y, bytes, lanes);
            }
            let values = load_vector(k, at_x, from, lanes);
            store_vector(k, at_y, &values, to);
        });
    })
}

fn add_acc_kernel(from: DType, to: DType, lanes: usize) -> Kernel {
    let name = format!("add_acc_{}_{}_x{lanes}", from.name(), to.name());
    moving(name, move |k| {
        let (x, y, n) = (k.pointer("x"), k.pointer("y"), k.u32("n"));
        flat_over_grid(k, n, lanes, |k, i, lanes| {
            let (at_x, at_y) = (element(k, x, i, from), element(k, y, i, to));
            if to == DType::F64 {
                let (a, b, sum) = (load_f64(k, at_x, from), load_f64(k, at_y, to), k.reg::<F64>());
                ptx!(k, "add.rn.f64 {sum}, {b}, {a};");
                ptx!(k, "st.global.f64 [{at_y}], {sum};");
                return;
            }
            add_in_place(k, at_x, from, at_y, to, lanes);
        });
    })
}

/// y += x for neighbouring elements.
fn add_in_place(k: &mut Assembler, at_x: Reg<B64>, from: DType, at_y: Reg<B64>, to: DType, lanes: usize) {
    let (a, b) = (load_vector(k, at_x, from, lanes), load_vector(k, at_y, to, lanes));
    for (a, b) in a.iter().zip(&b) {
        ptx!(k, "add.rn.f32 {b}, {b}, {a};");
    }
    store_vector(k, at_y, &b, to);
}

fn copy_columns_kernel(dtype: DType, lanes: usize, accumulate: bool) -> Kernel {
    let name = match accumulate {
        true => format!("add_columns_{}_x{lanes}", dtype.name()),
        false => format!("copy_columns_b{}_x{lanes}", 8 * dtype.size_bytes()),
    };
    moving(name, move |k| {
        let (x, y, n, per_row) = (k.pointer("x"), k.pointer("y"), k.u32("n"), k.u32("per_row"));
        let (c, from, e, to) = (k.u32("c"), k.u32("from"), k.u32("e"), k.u32("to"));
        flat_over_grid(k, n, 1, |k, i, _| {
            let (row, group) = div_rem(k, i, per_row);
            let place = |k: &mut Assembler, base, cols, first| {
                let (at, column) = (parts::row(k, base, row, cols, dtype), k.reg::<B32>());
                ptx!(k, "mad.lo.u32 {column}, {group}, {lanes}, {first};");
                element(k, at, column, dtype)
            };
            let (at_x, at_y) = (place(k, x, c, from), place(k, y, e, to));
            if accumulate && lanes == 1 {
                let (a, b) = (load(k, at_x, dtype), load(k, at_y, dtype));
                let sum = parts::f32_op(k, "add", b, a);
                store(k, at_y, sum, dtype);
            } else if accumulate {
                add_in_place(k, at_x, dtype, at_y, dtype, lanes);
            } else {
                copy_bits(k, at_x, at_y, dtype.size_bytes(), lanes);
            }
        });
    })
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    use DType::{Bf16, F32, F64, U32};
    let mut all = vec![zero_kernel(2, 8), zero_kernel(4, 4), zero_kernel(8, 2), scatter_kernel()];
    all.extend(
        [(Bf16, Bf16, 8), (U32, U32, 4), (F64, F64, 2), (F32, Bf16, 8), (Bf16, F32, 8)]
            .map(|(a, b, n)| copy_kernel(a, b, n)),
    );
    all.extend(
        [(Bf16, Bf16, 8), (F32, F32, 4), (Bf16, F32, 8), (F32, F64, 1), (F64, F64, 1)]
            .map(|(a, b, n)| add_acc_kernel(a, b, n)),
    );
    for accumulate in [false, true] {
        all.extend([copy_columns_kernel(Bf16, 8, accumulate), copy_columns_kernel(F32, 4, accumulate)]);
    }
    all.into_iter().map(|kernel| Variant::new(kernel, 32)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        error::Result,
        ops::elementwise as cpu,
        ptx::case::{Case, Data},
        stream::Stream,
    };

    const DTYPES: [DType; 2] = [DType::F32, DType::Bf16];

    #[test]
    fn rows_are_scattered_as_the_cpus() {
        for rows in [vec![], vec![3.0, 0.0, 5.0]] {
            let n = rows.len();
            let inputs = [
                Data(DType::U32, vec![n], vec![7.0; n]),
                Data(DType::U32, vec![n], rows),
                Data(DType::U32, vec![6], vec![1.0; 6]),
            ];
            Case::new(&inputs).cpu(|s, t| cpu::scatter(s, t[0], t[1], t[2])).ptx(|t| scatter(t[0], t[1], t[2])).equal();
        }
    }

    #[test]
    fn a_row_that_is_not_there_is_told_of() {
        let case = Case::new(&[Data::u32(&[2], &[1, 2]), Data::u32(&[2], &[0, 6]), Data::u32(&[6], &[1; 6])]);
        case.same_error(|s, t| cpu::scatter(s, t[0], t[1], t[2]), |_, t| scatter(t[0], t[1], t[2]));
    }

    #[test]
    fn zero_copy_and_add_do_as_the_cpu_to_the_bit() {
        for (n, skip) in [(0, 0), (1, 0), (255, 0), (1000, 6), (4096 + 5, 8)] {
            for (from, to) in DTYPES.into_iter().flat_map(|a| DTYPES.map(|b| (a, b))).chain([(DType::F32, DType::F64)])
            {
                let inputs = [Data::random(from, &[n + skip], 1), Data::random(to, &[n + skip], 2)];
                let part = move |t: &[Tensor]| [t[0].slice(skip, n), t[1].slice(skip, n)];
                type Op = fn(&mut Stream, Tensor, Tensor) -> Result<()>;
                type Launches = fn(Tensor, Tensor) -> Vec<Launch>;
                let ops: [(Op, Launches); 2] = [(cpu::copy, copy), (cpu::add_acc, add_acc)];
                for (op, kernel) in ops {
                    Case::new(&inputs)
                        .cpu(|s, t| op(s, part(t)[0], part(t)[1]))
                        .ptx(|t| kernel(part(t)[0], part(t)[1]))
                        // bf16 by way of f64 rounds a few values the other way on the CPU.
                        .close(0.0);
                }
                Case::new(&inputs)
                    .cpu(|s, t| {
                        cpu::zero(s, part(t)[1]);
                        Ok(())
                    })
                    .ptx(|t| zero(part(t)[1]))
                    .equal();
            }
        }
        let counts = [Data::u32(&[7], &[9; 7]), Data::u32(&[7], &[1; 7])];
        Case::new(&counts).cpu(|s, t| cpu::copy(s, t[0], t[1])).ptx(|t| copy(t[0], t[1])).equal();
    }

    #[test]
    fn few_blocks_reach_every_element_and_none_twice() {
        // The last group is whole, or a part of one; the last round of blocks is whole, or not.
        for (n, most) in [(4096 + 5, 1), (4096 + 5, 2), (6144, 1), (6144, 2), (7000, 3), (12, 1)] {
            for (from, to) in [(DType::F32, DType::F32), (DType::Bf16, DType::Bf16), (DType::F32, DType::F64)] {
                let few = |launches: Vec<Launch>| -> Vec<Launch> {
                    let few: Vec<Launch> = launches.into_iter().map(|launch| launch.of_at_most(most)).collect();
                    assert!(few.iter().all(|launch| launch.grid[0] <= most), "the grid is any");
                    few
                };
                let inputs = [Data::random(from, &[n], 1), Data::random(to, &[n], 2)];
                Case::new(&inputs).cpu(|s, t| cpu::add_acc(s, t[0], t[1])).ptx(|t| few(add_acc(t[0], t[1]))).close(0.0);
                Case::new(&inputs).cpu(|s, t| cpu::copy(s, t[0], t[1])).ptx(|t| few(copy(t[0], t[1]))).equal();
            }
        }
    }

    #[test]
    fn columns_move_and_others_stay() {
        for (t, c, from, e, to, cols) in
            [(3, 64, 16, 40, 8, 24), (5, 9, 2, 7, 1, 5), (0, 8, 0, 8, 0, 8), (2, 8, 0, 8, 0, 0)]
        {
            for (dtype, accumulate) in DTYPES.into_iter().flat_map(|d| [(d, false), (d, true)]) {
                Case::new(&[Data::random(dtype, &[t, c], 1), Data::random(dtype, &[t, e], 2)])
                    .cpu(|s, x| cpu::copy_columns(s, (x[0], from), (x[1], to), cols, accumulate))
                    .ptx(|x| copy_columns((x[0], from), (x[1], to), cols, accumulate))
                    .equal();
            }
        }
    }
}
