//! AdamW with f32 master weights, clipped by the whole gradient's norm, which is read on the device.
//!
//! Signature: (p, m, v, grad, weight where there is one, sum_squares: f64, n: u32, b1, a1, b2, a2, step, root, keep, eps: f32,
//! max_norm: f64). Thread 0 of a block makes the clipping factor (f64) and leaves it in shared memory, -1 where the norm is not
//! finite; one barrier. Every operation is rounded as the CPU op's, in its order: the two agree to the bit. Moves 12 bytes of
//! state and the gradient in, 12 bytes and the weight out, an element; the arithmetic (two roots and quotients) hides behind
//! that.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B32, F32, F64, Pred, Reg},
    golden::Variant,
    parts::{self, count, element, f32_op, flat, flat_grid, load_f64, load_vector, special, store_vector, widen},
};
use crate::{
    dtype::DType,
    ops::adamw::{AdamW, Slots},
    ptx,
    tensor::Tensor,
};

/// Updates a parameter in place; `sum_squares` f64 \[1\] is the whole gradient's squared norm. Nothing changes if that is not
/// finite. Master weights are F32, moments, gradient and weight F32 or Bf16.
pub fn update(hyper: AdamW, slots: Slots, sum_squares: Tensor) -> Vec<Launch> {
    let Slots { master, grad, m, v, weight } = slots;
    let n = master.len();
    if n == 0 {
        return vec![];
    }
    let tensors: Vec<Tensor> = [master, m, v, grad].into_iter().chain(weight).collect();
    let lanes = parts::lanes(&tensors, 0);
    let mut args: Vec<Arg> = tensors.into_iter().chain([sum_squares]).map(Arg::Tensor).collect();
    args.push(Arg::U32(count(n)));
    // Constants as the CPU op rounds them.
    let steps = hyper.step as i32;
    let constants = [
        hyper.beta1,
        1.0 - hyper.beta1,
        hyper.beta2,
        1.0 - hyper.beta2,
        hyper.lr / (1.0 - hyper.beta1.powi(steps)),
        (1.0 - hyper.beta2.powi(steps)).sqrt().recip(),
        1.0 - hyper.lr * hyper.weight_decay,
        hyper.eps,
    ];
    args.extend(constants.map(|x| Arg::F32(x as f32)));
    args.push(Arg::F64(hyper.max_grad_norm));
    let kernel = update_kernel((grad.dtype, m.dtype), weight.map(|w| w.dtype), lanes);
    vec![Launch { kernel, grid: flat_grid(n, lanes), args }]
}

/// What multiplies the gradient, or -1.
fn clip_factor(k: &mut Assembler, sum_squares: Reg<super::asm::B64>, max_norm: Reg<F64>) -> Reg<F64> {
    let shared = k.shared(8, "clip", 8);
    let (tid, other, wait, clip) = (special(k, "%tid.x"), k.reg::<Pred>(), k.label("wait"), k.reg::<F64>());
    ptx!(k, "setp.ne.u32 {other}, {tid}, 0;");
    ptx!(k, "@{other} bra {wait};");
    let (norm, finite) = (load_f64(k, sum_squares, DType::F64), k.reg::<Pred>());
    ptx!(k, "sqrt.rn.f64 {norm}, {norm};");
    ptx!(k, "setp.lt.f64 {finite}, {norm}, 0d7FF0000000000000;");
    ptx!(k, "add.rn.f64 {norm}, {norm}, {};", super::asm::f64_literal(1e-6));
    ptx!(k, "div.rn.f64 {clip}, {max_norm}, {norm};");
    ptx!(k, "min.f64 {clip}, {clip}, {};", super::asm::f64_literal(1.0));
    ptx!(k, "selp.f64 {clip}, {clip}, {}, {finite};", super::asm::f64_literal(-1.0));
    ptx!(k, "st.shared.f64 [{shared}], {clip};");
    k.place(&wait);
    ptx!(k, "bar.sync 0;");
    let clip = k.reg::<F64>();
    ptx!(k, "ld.shared.f64 {clip}, [{shared}];");
    clip
}

fn update_kernel((grad_type, moment_type): (DType, DType), weight_type: Option<DType>, lanes: usize) -> Kernel {
    let weight_name = weight_type.map_or("none", DType::name);
    let moments = if moment_type == DType::F32 { "" } else { "_moments_bf16" };
    parts::kernel(format!("adamw_{}_{weight_name}{moments}_x{lanes}", grad_type.name()), move |k| {
        let [p, m, v, grad] = ["p", "m", "v", "grad"].map(|name| k.pointer(name));
        let weight = weight_type.map(|dtype| (k.pointer("weight"), dtype));
        let (sum_squares, n) = (k.pointer("sum_squares"), k.u32("n"));
        let constants = ["b1", "a1", "b2", "a2", "step", "root", "keep", "eps"].map(|name| k.f32(name));
        let max_norm = k.f64("max_norm");
        let (clip, stop) = (clip_factor(k, sum_squares, max_norm), k.reg::<Pred>());
        ptx!(k, "setp.lt.f64 {stop}, {clip}, 0d0000000000000000;");
        flat(k, n, lanes, |k, i: Reg<B32>, lanes| {
            let at_p = element(k, p, i, DType::F32);
            let [at_m, at_v] = [m, v].map(|base| element(k, base, i, moment_type));
            let (p, as_it_is) = (load_vector(k, at_p, DType::F32, lanes), k.label("as_it_is"));
            ptx!(k, "@{stop} bra {as_it_is};");
            let at_grad = element(k, grad, i, grad_type);
            let grad = load_vector(k, at_grad, grad_type, lanes);
            let (m, v) = (load_vector(k, at_m, moment_type, lanes), load_vector(k, at_v, moment_type, lanes));
            for i in 0..lanes {
                update_one(k, [p[i], m[i], v[i], grad[i]], clip, constants);
            }
            store_vector(k, at_p, &p, DType::F32);
            for (at, x) in [(at_m, &m), (at_v, &v)] {
                store_vector(k, at, x, moment_type);
            }
            k.place(&as_it_is);
            if let Some((weight, dtype)) = weight {
                let to = element(k, weight, i, dtype);
                store_vector(k, to, &p, dtype);
            }
        });
    })
}

/// In place: p, m and v of one element.
fn update_one(k: &mut Assembler, [p, m, v, grad]: [Reg<F32>; 4], clip: Reg<F64>, constants: [Reg<F32>; 8]) {
    let [b1, a1, b2, a2, step, root, keep, eps] = constants;
    let (wide, g) = (widen(k, grad), k.reg::<F32>());
    ptx!(k, "mul.rn.f64 {wide}, {wide}, {clip};");
    ptx!(k, "cvt.rn.f32.f64 {g}, {wide};");
    // m = b1 m + a1 g
    let from_g = f32_op(k, "mul", a1, g);
    ptx!(k, "mul.rn.f32 {m}, {b1}, {m};");
    ptx!(k, "add.rn.f32 {m}, {m}, {from_g};");
    // v = b2 v + a2 g g
    let square = f32_op(k, "mul", a2, g);
    ptx!(k, "mul.rn.f32 {square}, {square}, {g};");
    ptx!(k, "mul.rn.f32 {v}, {b2}, {v};");
    ptx!(k, "add.rn.f32 {v}, {v}, {square};");
    // p = p keep - step m / (sqrt(v) root + eps)
    let below = k.reg::<F32>();
    ptx!(k, "sqrt.rn.f32 {below}, {v};");
    ptx!(k, "mul.rn.f32 {below}, {below}, {root};");
    ptx!(k, "add.rn.f32 {below}, {below}, {eps};");
    let delta = f32_op(k, "mul", step, m);
    ptx!(k, "div.rn.f32 {delta}, {delta}, {below};");
    ptx!(k, "mul.rn.f32 {p}, {p}, {keep};");
    ptx!(k, "sub.rn.f32 {p}, {p}, {delta};");
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    use DType::{Bf16, F32};
    let all = [
        ((Bf16, F32), Some(Bf16), 8),
        ((F32, F32), Some(Bf16), 8),
        ((F32, F32), None, 4),
        ((Bf16, F32), None, 8),
        ((F32, Bf16), Some(Bf16), 8),
        ((Bf16, Bf16), Some(Bf16), 8),
    ];
    all.into_iter().map(|(types, weight, lanes)| Variant::new(update_kernel(types, weight, lanes), 64)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        ops::adamw as cpu,
        ptx::case::{Case, Data},
    };

    #[test]
    fn an_update_is_the_cpus_to_the_bit() {
        let hyper =
            AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 7, max_grad_norm: 1.0 };
        use DType::{Bf16, F32};
        let types = [
            (F32, F32, None),
            (Bf16, F32, None),
            (F32, F32, Some(Bf16)),
            (Bf16, F32, Some(F32)),
            (F32, Bf16, Some(Bf16)),
            (Bf16, Bf16, None),
        ];
        for (n, (grad, moments, weight)) in [0, 1, 3, 300, 2051].into_iter().flat_map(|n| types.map(|t| (n, t))) {
            for sum_squares in [0.25, 90.0, f64::NAN, f64::INFINITY] {
                let v = Data::random(moments, &[n], 3).map(f64::abs);
                let mut x = vec![
                    Data::random(F32, &[n], 1),
                    Data::random(moments, &[n], 2),
                    v,
                    Data::random(grad, &[n], 4),
                    Data(DType::F64, vec![1], vec![sum_squares]),
                ];
                x.extend(weight.map(|dtype| Data::poison(dtype, &[n])));
                let slots =
                    |x: &[Tensor]| Slots { master: x[0], m: x[1], v: x[2], grad: x[3], weight: x.get(5).copied() };
                for max_grad_norm in [1.0, f64::INFINITY] {
                    let hyper = AdamW { max_grad_norm, ..hyper };
                    Case::new(&x)
                        .cpu(|s, x| cpu::update(s, hyper, slots(x), x[4]))
                        .ptx(|x| update(hyper, slots(x), x[4]))
                        .close(0.0);
                }
            }
        }
    }

    #[test]
    fn the_barrier_is_needed() {
        let hyper =
            AdamW { lr: 1e-3, beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1, step: 7, max_grad_norm: 1.0 };
        let mut x: Vec<Data> = (1..5).map(|seed| Data::random(DType::F32, &[900], seed).map(f64::abs)).collect();
        x.push(Data(DType::F64, vec![1], vec![4.0]));
        let slots = |x: &[Tensor]| Slots { master: x[0], m: x[1], v: x[2], grad: x[3], weight: None };
        let launches = |x: &[Tensor]| update(hyper, slots(x), x[4]);
        Case::new(&x).ptx(launches).mutants("bar.sync", launches);
    }
}
