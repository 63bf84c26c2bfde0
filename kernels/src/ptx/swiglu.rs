//! SwiGLU: a = silu(g) u, where h holds g and u side by side. One thread a group of neighbouring columns.
//!
//! forward (h, a, n: u32 groups, groups a row, f): moves 2 t f in and t f out. input_grad (h, da, dh, n, groups a row, f): 3 t
//! f in, 2 t f out. Sigmoid by [`parts::sigmoid`]: 6e-7 relatively.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, B64, F32, Reg, f32_literal},
    golden::Variant,
    parts::{self, count, div_rem, f32_op, flat, flat_grid, load_vector, sigmoid, store_vector},
};
use crate::{dtype::DType, ptx, tensor::Tensor};

/// F: `h` [t, 2f] -> `a` [t, f].
pub fn forward(h: Tensor, a: Tensor) -> Vec<Launch> {
    let lanes = parts::lanes(&[h, a], a.cols());
    launch(forward_kernel(a.dtype, lanes), lanes, a, &[h, a])
}

/// I: `dh` [t, 2f] from `h` and `da` [t, f].
pub fn input_grad(h: Tensor, da: Tensor, dh: Tensor) -> Vec<Launch> {
    let lanes = parts::lanes(&[h, da, dh], da.cols());
    launch(input_grad_kernel(da.dtype, lanes), lanes, da, &[h, da, dh])
}

fn launch(kernel: Kernel, lanes: usize, a: Tensor, tensors: &[Tensor]) -> Vec<Launch> {
    let n = a.len() / lanes;
    if n == 0 {
        return vec![];
    }
    let mut args: Vec<Arg> = tensors.iter().map(|t| Arg::Tensor(*t)).collect();
    args.extend([n, a.cols() / lanes, a.cols()].map(|n| Arg::U32(count(n))));
    vec![Launch { kernel, grid: flat_grid(n, 1), args }]
}

/// Addresses of a group in a row of `a`, and in both halves of a row of `h`.
fn places(k: &mut Assembler, i: Reg<B32>, [per_row, f]: [Reg<B32>; 2], size: [usize; 2]) -> (Reg<B64>, [Reg<B64>; 2]) {
    let (lanes, elem_bytes) = (size[0], size[1]);
    let (index, group) = div_rem(k, i, per_row);
    let (a, g, u) = (k.reg::<B64>(), k.reg::<B64>(), k.reg::<B64>());
    ptx!(k, "mul.wide.u32 {a}, {i}, {};", lanes * elem_bytes);
    // Row i of h begins at 2 f i.
    let double = k.reg::<B32>();
    ptx!(k, "shl.b32 {double}, {f}, 1;");
    ptx!(k, "mul.wide.u32 {g}, {index}, {double};");
    ptx!(k, "mad.wide.u32 {g}, {group}, {lanes}, {g};");
    ptx!(k, "mul.lo.u64 {g}, {g}, {elem_bytes};");
    ptx!(k, "mad.wide.u32 {u}, {f}, {elem_bytes}, {g};");
    (a, [g, u])
}

fn add(k: &mut Assembler, base: Reg<B64>, offset: Reg<B64>) -> Reg<B64> {
    let at = k.reg::<B64>();
    ptx!(k, "add.u64 {at}, {base}, {offset};");
    at
}

/// silu(g) u.
pub(super) fn value(k: &mut Assembler, g: Reg<F32>, u: Reg<F32>) -> Reg<F32> {
    let s = sigmoid(k, g);
    let silu = f32_op(k, "mul", g, s);
    f32_op(k, "mul", silu, u)
}

fn forward_kernel(dtype: DType, lanes: usize) -> Kernel {
    parts::kernel(format!("swiglu_forward_{}_x{lanes}", dtype.name()), move |k| {
        let (h, a) = (k.pointer("h"), k.pointer("a"));
        let (n, sizes) = (k.u32("n"), ["per_row", "f"].map(|name| k.u32(name)));
        flat(k, n, 1, |k, i, _| {
            let (at_a, at_h) = places(k, i, sizes, [lanes, dtype.size_bytes()]);
            let (to, [at_g, at_u]) = (add(k, a, at_a), at_h.map(|at| add(k, h, at)));
            let (g, u) = (load_vector(k, at_g, dtype, lanes), load_vector(k, at_u, dtype, lanes));
            let a: Vec<Reg<F32>> = g.into_iter().zip(u).map(|(g, u)| value(k, g, u)).collect();
            store_vector(k, to, &a, dtype);
        });
    })
}

/// Gradients of one element with respect to g and u.
fn gradient(k: &mut Assembler, g: Reg<F32>, u: Reg<F32>, da: Reg<F32>) -> (Reg<F32>, Reg<F32>) {
    let s = sigmoid(k, g);
    let (silu, rest) = (f32_op(k, "mul", g, s), k.reg::<F32>());
    // da u (s + silu (1 - s))
    ptx!(k, "sub.rn.f32 {rest}, {}, {s};", f32_literal(1.0));
    ptx!(k, "fma.rn.f32 {rest}, {silu}, {rest}, {s};");
    let du = f32_op(k, "mul", da, silu);
    let dg = f32_op(k, "mul", da, u);
    ptx!(k, "mul.rn.f32 {dg}, {dg}, {rest};");
    (dg, du)
}

fn input_grad_kernel(dtype: DType, lanes: usize) -> Kernel {
    parts::kernel(format!("swiglu_input_grad_{}_x{lanes}", dtype.name()), move |k| {
        let (h, da, dh) = (k.pointer("h"), k.pointer("da"), k.pointer("dh"));
        let (n, sizes) = (k.u32("n"), ["per_row", "f"].map(|name| k.u32(name)));
        flat(k, n, 1, |k, i, _| {
            let (at_a, at_h) = places(k, i, sizes, [lanes, dtype.size_bytes()]);
            let (from, [at_g, at_u]) = (add(k, da, at_a), at_h.map(|at| add(k, h, at)));
            let (g, u) = (load_vector(k, at_g, dtype, lanes), load_vector(k, at_u, dtype, lanes));
            let da = load_vector(k, from, dtype, lanes);
            let mut grads = (vec![], vec![]);
            for ((g, u), da) in g.into_iter().zip(u).zip(da) {
                let (dg, du) = gradient(k, g, u, da);
                grads.0.push(dg);
                grads.1.push(du);
            }
            let [to_g, to_u] = at_h.map(|at| add(k, dh, at));
            store_vector(k, to_g, &grads.0, dtype);
            store_vector(k, to_u, &grads.1, dtype);
        });
    })
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    let all = [(DType::Bf16, 8), (DType::F32, 4)];
    all.into_iter()
        .flat_map(|(dtype, lanes)| [forward_kernel(dtype, lanes), input_grad_kernel(dtype, lanes)])
        .map(|kernel| Variant::new(kernel, 32))
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::swiglu as cpu,
        ptx::case::{Case, Data},
    };

    #[test]
    fn both_passes_are_the_cpus() {
        for dtype in [DType::F32, DType::Bf16] {
            for (t, f) in [(1, 1), (7, 5), (3, 24), (5, 520)] {
                let h = Data::random(dtype, &[t, 2 * f], 1).map(|x| 6.0 * x);
                // 1e-6: the sigmoid's.
                Case::new(&[h.clone(), Data::poison(dtype, &[t, f])])
                    .cpu(|s, x| cpu::forward(s, x[0], x[1]))
                    .ptx(|x| forward(x[0], x[1]))
                    .close(1e-6);
                Case::new(&[h, Data::random(dtype, &[t, f], 2), Data::poison(dtype, &[t, 2 * f])])
                    .cpu(|s, x| cpu::input_grad(s, x[0], x[1], x[2]))
                    .ptx(|x| input_grad(x[0], x[1], x[2]))
                    .close(1e-6);
            }
        }
    }

    #[test]
    fn no_rows_are_no_launch() {
        let m = crate::memory::Memory::new(crate::device::Device::Cpu);
        assert!(forward(m.alloc(DType::F32, &[0, 16]), m.alloc(DType::F32, &[0, 8])).is_empty());
    }

    #[test]
    fn large_gates_neither_overflow_nor_vanish() {
        let h = Data(DType::F32, vec![1, 8], vec![-200.0, -80.0, 80.0, 200.0, 1.0, 1.0, 1.0, 1.0]);
        Case::new(&[h, Data::poison(DType::F32, &[1, 4])])
            .cpu(|s, x| cpu::forward(s, x[0], x[1]))
            .ptx(|x| forward(x[0], x[1]))
            .close(1e-6);
    }
}
