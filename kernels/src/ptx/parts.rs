//! What kernels are put together from: indices, addresses, loads and stores as f32, functions. Folds over warps and blocks are
//! in [`super::fold`].
//!
//! Every tensor's buffer begins at a multiple of 256 bytes, as allocators of devices see to; a part of a buffer may begin
//! anywhere. How many neighbouring elements a thread takes at once ([`lanes`]) follows from that and is part of a kernel's
//! name.
//!
//! Memory-bound kernels move at most 16 bytes a thread and access; 8 blocks of [`BLOCK`] threads a multiprocessor then have 32
//! KiB in flight for each tensor, which is what the bandwidth of an H200 times its latency asks for.

use super::{
    Arch, Kernel, VERSION,
    asm::{Assembler, B16, B32, B64, Class, F32, F64, Label, Pred, Reg, f32_literal, vector},
};
use crate::{dtype::DType, ptx, tensor::Tensor};

/// Threads of a block, unless a kernel says otherwise.
pub const BLOCK: u32 = 256;

/// A kernel for Ampere and later in blocks of [`BLOCK`] threads; `emit` writes its parameters and its body.
pub fn kernel(name: String, emit: impl Fn(&mut Assembler) + Send + 'static) -> Kernel {
    kernel_of(name, BLOCK, emit)
}

/// The same in blocks of another size, which the name says.
pub fn kernel_of(name: String, block: u32, emit: impl Fn(&mut Assembler) + Send + 'static) -> Kernel {
    kernel_for(Arch::Sm80, name, block, emit)
}

/// The same for what `arch` names; a name that has a text for each says which.
pub fn kernel_for(arch: Arch, name: String, block: u32, emit: impl Fn(&mut Assembler) + Send + 'static) -> Kernel {
    let text = {
        let name = name.clone();
        move || {
            let mut k = Assembler::new(&name);
            k.directive(format!(".maxntid {block}, 1, 1"));
            emit(&mut k);
            ptx!(k, "ret;");
            k.finish(VERSION, arch.target())
        }
    };
    Kernel { name, arch, block, shared_bytes: 0, any_grid: false, emit: Box::new(text) }
}

/// A count as kernels take it.
///
/// # Panics
/// Above 2^32 - 2^20, so that indices a step past the end do not wrap.
pub fn count(n: usize) -> u32 {
    u32::try_from(n).ok().filter(|n| *n <= u32::MAX - (1 << 20)).unwrap_or_else(|| panic!("{n} elements in one launch"))
}

/// Neighbouring elements that a thread takes at once: as many as 16 bytes of the narrowest type hold, if all tensors are
/// aligned for that and `multiple` (the row's length, or 0 where rows do not matter) allows; else one.
pub fn lanes(tensors: &[Tensor], multiple: usize) -> usize {
    let widest = tensors.iter().map(|t| 16 / t.dtype.size_bytes()).max().unwrap_or(1);
    let fits = |t: &Tensor| (t.offset as usize).is_multiple_of(widest.min(16 / t.dtype.size_bytes()));
    if multiple.is_multiple_of(widest) && tensors.iter().all(fits) { widest } else { 1 }
}

/// A special register or constant as a register: `%tid.x`.
pub fn special(k: &mut Assembler, name: &str) -> Reg<B32> {
    let r = k.reg::<B32>();
    ptx!(k, "mov.u32 {r}, {name};");
    r
}

/// Number of this thread in the grid.
pub fn global_index(k: &mut Assembler) -> Reg<B32> {
    let (i, block) = (special(k, "%tid.x"), special(k, "%ctaid.x"));
    ptx!(k, "mad.lo.u32 {i}, {block}, {BLOCK}, {i};");
    i
}

/// Returns where `a >= b`; neither a warp fold nor a barrier may follow unless all threads concerned agree.
pub fn return_past(k: &mut Assembler, a: Reg<B32>, b: impl std::fmt::Display) {
    let past = k.reg::<Pred>();
    ptx!(k, "setp.ge.u32 {past}, {a}, {b};");
    ptx!(k, "@{past} ret;");
}

/// `for i in (first..end).step_by(step)`, unsigned.
pub fn strided(
    k: &mut Assembler,
    first: Reg<B32>,
    end: Reg<B32>,
    step: impl std::fmt::Display,
    body: impl FnOnce(&mut Assembler, Reg<B32>),
) {
    let (i, past, top, out) = (k.reg::<B32>(), k.reg::<Pred>(), k.label("loop"), k.label("out"));
    ptx!(k, "mov.u32 {i}, {first};");
    ptx!(k, "setp.ge.u32 {past}, {i}, {end};");
    ptx!(k, "@{past} bra {out};");
    k.place(&top);
    body(k, i);
    ptx!(k, "add.u32 {i}, {i}, {step};");
    ptx!(k, "setp.lt.u32 {past}, {i}, {end};");
    ptx!(k, "@{past} bra {top};");
    k.place(&out);
}

/// `for i in (first..end).step_by(step)`, unsigned, for a thread's part of a grid's work: `first` is below `end`, and `step`, of all
/// threads together, may be anything above 0. After the last the thread goes on at `out`.
pub fn over_grid(
    k: &mut Assembler,
    (i, end): (Reg<B32>, Reg<B32>),
    step: Reg<B32>,
    out: &Label,
    body: impl FnOnce(&mut Assembler, Reg<B32>),
) {
    let (left, last, top) = (k.reg::<B32>(), k.reg::<Pred>(), k.label("again"));
    k.place(&top);
    body(k, i);
    // A sum of i and the step might be past 2^32.
    ptx!(k, "sub.u32 {left}, {end}, {i};");
    ptx!(k, "setp.le.u32 {last}, {left}, {step};");
    ptx!(k, "@{last} bra {out};");
    ptx!(k, "add.u32 {i}, {i}, {step};");
    ptx!(k, "bra {top};");
}

/// `per_block` times the blocks of the grid.
pub fn of_grid(k: &mut Assembler, per_block: u32) -> Reg<B32> {
    let blocks = special(k, "%nctaid.x");
    ptx!(k, "mul.lo.u32 {blocks}, {blocks}, {per_block};");
    blocks
}

/// A flat tensor of `n` elements, `lanes` neighbours a thread: `body(k, first, lanes)` for whole groups, and with one lane for
/// each element of the rest. The grid is [`flat_grid`].
pub fn flat(k: &mut Assembler, n: Reg<B32>, lanes: usize, body: impl Fn(&mut Assembler, Reg<B32>, usize)) {
    let i = global_index(k);
    if lanes == 1 {
        return_past(k, i, n);
        return body(k, i, 1);
    }
    let (end, partial, tail) = (k.reg::<B32>(), k.reg::<Pred>(), k.label("tail"));
    ptx!(k, "mul.lo.u32 {i}, {i}, {lanes};");
    ptx!(k, "add.u32 {end}, {i}, {lanes};");
    ptx!(k, "setp.gt.u32 {partial}, {end}, {n};");
    ptx!(k, "@{partial} bra {tail};");
    body(k, i, lanes);
    ptx!(k, "ret;");
    k.place(&tail);
    strided(k, i, n, 1, |k, i| body(k, i, 1));
}

/// [`flat`] for any grid: with fewer blocks a thread goes on with the groups that lie as many further as the grid has. A body may not
/// return. For what communication launches; a loop costs registers, which a kernel that has all blocks need not spend.
pub fn flat_over_grid(k: &mut Assembler, n: Reg<B32>, lanes: usize, body: impl Fn(&mut Assembler, Reg<B32>, usize)) {
    let (i, end) = (global_index(k), k.label("end"));
    if lanes == 1 {
        return_past(k, i, n);
        let step = of_grid(k, BLOCK);
        over_grid(k, (i, n), step, &end, |k, i| body(k, i, 1));
        return k.place(&end);
    }
    let (next, partial, tail) = (k.reg::<B32>(), k.reg::<Pred>(), k.label("tail"));
    ptx!(k, "mul.lo.u32 {i}, {i}, {lanes};");
    let step = of_grid(k, BLOCK * lanes as u32);
    ptx!(k, "setp.ge.u32 {partial}, {i}, {n};");
    ptx!(k, "@{partial} bra {end};");
    over_grid(k, (i, n), step, &end, |k, i| {
        ptx!(k, "add.u32 {next}, {i}, {lanes};");
        ptx!(k, "setp.gt.u32 {partial}, {next}, {n};");
        ptx!(k, "@{partial} bra {tail};");
        body(k, i, lanes);
    });
    k.place(&tail);
    strided(k, i, n, 1, |k, i| body(k, i, 1));
    k.place(&end);
}

/// Blocks for [`flat`].
pub fn flat_grid(n: usize, lanes: usize) -> [u32; 3] {
    [count(n).div_ceil(BLOCK * lanes as u32), 1, 1]
}

/// a / b and a % b, unsigned.
pub fn div_rem(k: &mut Assembler, a: Reg<B32>, b: impl std::fmt::Display) -> (Reg<B32>, Reg<B32>) {
    let (q, r) = (k.reg::<B32>(), k.reg::<B32>());
    ptx!(k, "div.u32 {q}, {a}, {b};");
    ptx!(k, "mul.lo.u32 {r}, {q}, {b};");
    ptx!(k, "sub.u32 {r}, {a}, {r};");
    (q, r)
}

/// Address of element `i` of `dtype`.
pub fn element(k: &mut Assembler, base: Reg<B64>, i: Reg<B32>, dtype: DType) -> Reg<B64> {
    let at = k.reg::<B64>();
    ptx!(k, "mad.wide.u32 {at}, {i}, {}, {base};", dtype.size_bytes());
    at
}

/// Address of row `i` of `cols` elements; exact beyond 2^32 elements.
pub fn row(k: &mut Assembler, base: Reg<B64>, i: Reg<B32>, cols: Reg<B32>, dtype: DType) -> Reg<B64> {
    let (at, n) = (k.reg::<B64>(), k.reg::<B64>());
    ptx!(k, "mul.wide.u32 {n}, {i}, {cols};");
    ptx!(k, "mad.lo.u64 {at}, {n}, {}, {base};", dtype.size_bytes());
    at
}

/// An element as f32.
pub fn load(k: &mut Assembler, at: Reg<B64>, dtype: DType) -> Reg<F32> {
    load_vector(k, at, dtype, 1)[0]
}

/// Rounds to nearest even.
pub fn store(k: &mut Assembler, at: Reg<B64>, x: Reg<F32>, dtype: DType) {
    store_vector(k, at, &[x], dtype);
}

/// Elements that one access moves when `n` are wanted: at most 16 bytes.
fn access(dtype: DType, n: usize) -> usize {
    n.min(16 / dtype.size_bytes())
}

/// `n` neighbouring elements as f32, by accesses of up to 16 bytes; the address is a multiple of an access's size.
/// F64 is rounded.
pub fn load_vector(k: &mut Assembler, at: Reg<B64>, dtype: DType, n: usize) -> Vec<Reg<F32>> {
    let x = k.regs::<F32>(n);
    let step = access(dtype, n);
    for (part, x) in x.chunks(step).enumerate() {
        let offset = part * step * dtype.size_bytes();
        match dtype {
            DType::Bf16 if step == 1 => {
                let bits = k.reg::<B32>();
                ptx!(k, "ld.global.u16 {bits}, [{at}+{offset}];");
                ptx!(k, "shl.b32 {bits}, {bits}, 16;");
                ptx!(k, "mov.b32 {}, {bits};", x[0]);
            }
            DType::Bf16 => {
                let pairs = k.regs::<B32>(step / 2);
                ptx!(k, "ld.global{}.b32 {}, [{at}+{offset}];", suffix(pairs.len()), operand(&pairs));
                for (pair, x) in pairs.iter().zip(x.chunks(2)) {
                    let (low, high) = unpack(k, *pair);
                    ptx!(k, "mov.f32 {}, {low};", x[0]);
                    ptx!(k, "mov.f32 {}, {high};", x[1]);
                }
            }
            DType::F64 => {
                let wide = k.regs::<F64>(step);
                ptx!(k, "ld.global{}.f64 {}, [{at}+{offset}];", suffix(step), operand(&wide));
                for (x, wide) in x.iter().zip(wide) {
                    ptx!(k, "cvt.rn.f32.f64 {x}, {wide};");
                }
            }
            _ => ptx!(k, "ld.global{}.f32 {}, [{at}+{offset}];", suffix(step), operand(x)),
        }
    }
    x
}

/// Stores neighbouring elements as [`load_vector`] loads them, rounded to nearest even.
pub fn store_vector(k: &mut Assembler, at: Reg<B64>, x: &[Reg<F32>], dtype: DType) {
    let step = access(dtype, x.len());
    for (part, x) in x.chunks(step).enumerate() {
        let offset = part * step * dtype.size_bytes();
        match dtype {
            DType::Bf16 if step == 1 => {
                let bits = k.reg::<B16>();
                ptx!(k, "cvt.rn.bf16.f32 {bits}, {};", x[0]);
                ptx!(k, "st.global.b16 [{at}+{offset}], {bits};");
            }
            DType::Bf16 => {
                let pairs: Vec<Reg<B32>> = x.chunks(2).map(|x| pack(k, x[0], x[1])).collect();
                ptx!(k, "st.global{}.b32 [{at}+{offset}], {};", suffix(pairs.len()), operand(&pairs));
            }
            DType::F64 => {
                let wide: Vec<Reg<F64>> = x.iter().map(|x| widen(k, *x)).collect();
                ptx!(k, "st.global{}.f64 [{at}+{offset}], {};", suffix(step), operand(&wide));
            }
            _ => ptx!(k, "st.global{}.f32 [{at}+{offset}], {};", suffix(step), operand(x)),
        }
    }
}

/// `n` neighbouring elements' bits, for moves that change nothing: registers of 32 bits, or of 16 for one element of two bytes.
pub fn copy_bits(k: &mut Assembler, from: Reg<B64>, to: Reg<B64>, elem_bytes: usize, n: usize) {
    if elem_bytes * n == 2 {
        let bits = k.reg::<B16>();
        ptx!(k, "ld.global.b16 {bits}, [{from}];");
        ptx!(k, "st.global.b16 [{to}], {bits};");
        return;
    }
    let words = k.regs::<B32>(elem_bytes * n / 4);
    for (part, words) in words.chunks(4).enumerate() {
        ptx!(k, "ld.global{}.b32 {}, [{from}+{}];", suffix(words.len()), operand(words), 16 * part);
    }
    for (part, words) in words.chunks(4).enumerate() {
        ptx!(k, "st.global{}.b32 [{to}+{}], {};", suffix(words.len()), 16 * part, operand(words));
    }
}

/// How an access of so many elements says that it is a vector.
pub(super) fn suffix(n: usize) -> &'static str {
    match n {
        1 => "",
        2 => ".v2",
        _ => ".v4",
    }
}

/// One register, or several as a vector.
pub(super) fn operand<C: Class>(x: &[Reg<C>]) -> String {
    if let [one] = x { one.to_string() } else { vector(x) }
}

/// The two bf16 of a pair as f32: the lower address first.
pub fn unpack(k: &mut Assembler, pair: Reg<B32>) -> (Reg<F32>, Reg<F32>) {
    let (bits, low, high) = (k.regs::<B32>(2), k.reg::<F32>(), k.reg::<F32>());
    ptx!(k, "shl.b32 {}, {pair}, 16;", bits[0]);
    ptx!(k, "and.b32 {}, {pair}, 0xffff0000;", bits[1]);
    ptx!(k, "mov.b32 {low}, {};", bits[0]);
    ptx!(k, "mov.b32 {high}, {};", bits[1]);
    (low, high)
}

/// Two f32 as a pair of bf16, rounded to nearest even.
pub fn pack(k: &mut Assembler, low: Reg<F32>, high: Reg<F32>) -> Reg<B32> {
    let pair = k.reg::<B32>();
    ptx!(k, "cvt.rn.bf16x2.f32 {pair}, {high}, {low};");
    pair
}

/// To f64, exactly.
pub fn widen(k: &mut Assembler, x: Reg<F32>) -> Reg<F64> {
    let y = k.reg::<F64>();
    ptx!(k, "cvt.f64.f32 {y}, {x};");
    y
}

/// An element of any float type as f64, exactly.
pub fn load_f64(k: &mut Assembler, at: Reg<B64>, dtype: DType) -> Reg<F64> {
    if dtype == DType::F64 {
        let x = k.reg::<F64>();
        ptx!(k, "ld.global.f64 {x}, [{at}];");
        return x;
    }
    let x = load(k, at, dtype);
    widen(k, x)
}

/// Rounds to F64 or F32.
pub fn store_f64(k: &mut Assembler, at: Reg<B64>, x: Reg<F64>, dtype: DType) {
    if dtype == DType::F64 {
        ptx!(k, "st.global.f64 [{at}], {x};");
    } else {
        let y = k.reg::<F32>();
        ptx!(k, "cvt.rn.f32.f64 {y}, {x};");
        store(k, at, y, dtype);
    }
}

/// A u32.
pub fn load_u32(k: &mut Assembler, base: Reg<B64>, i: Reg<B32>) -> Reg<B32> {
    let (at, x) = (element(k, base, i, DType::U32), k.reg::<B32>());
    ptx!(k, "ld.global.u32 {x}, [{at}];");
    x
}

/// A constant.
pub fn constant(k: &mut Assembler, x: f32) -> Reg<F32> {
    let r = k.reg::<F32>();
    ptx!(k, "mov.f32 {r}, {};", f32_literal(x));
    r
}

/// The two results of `%1 OP %2` in f32, as `add`, rounded to nearest and never fused with another operation.
pub fn f32_op(k: &mut Assembler, op: &str, a: Reg<F32>, b: impl std::fmt::Display) -> Reg<F32> {
    let r = k.reg::<F32>();
    let rounding = if matches!(op, "min" | "max") { "" } else { ".rn" };
    ptx!(k, "{op}{rounding}.f32 {r}, {a}, {b};");
    r
}

/// e^x with a relative error below 3.5e-7: 0 where that is below 2^-126, infinity above 2^128, NaN for NaN.
///
/// x log2(e) is taken in two parts, because the rounding of the first alone is as large as 2^-18 of the result; the special
/// function unit (2^-22.5 by NVIDIA's documentation) raises 2 to the first.
pub fn exp(k: &mut Assembler, x: Reg<F32>) -> Reg<F32> {
    let log2_e = std::f64::consts::LOG2_E;
    let (high, low) = (log2_e as f32, (log2_e - f64::from(log2_e as f32)) as f32);
    let (y, bounded, rounded, rest, power) =
        (k.reg::<F32>(), k.reg::<F32>(), k.reg::<F32>(), k.reg::<F32>(), k.reg::<F32>());
    let high = f32_literal(high);
    ptx!(k, "mul.rn.f32 {y}, {x}, {high};");
    ptx!(k, "ex2.approx.ftz.f32 {power}, {y};");
    // The rest is finite also where x is not.
    ptx!(k, "max.f32 {bounded}, {x}, {};", f32_literal(-256.0));
    ptx!(k, "min.f32 {bounded}, {bounded}, {};", f32_literal(256.0));
    ptx!(k, "mul.rn.f32 {rounded}, {bounded}, {high};");
    ptx!(k, "neg.f32 {rounded}, {rounded};");
    ptx!(k, "fma.rn.f32 {rest}, {bounded}, {high}, {rounded};");
    ptx!(k, "fma.rn.f32 {rest}, {bounded}, {}, {rest};", f32_literal(low));
    ptx!(k, "fma.rn.f32 {rest}, {rest}, {}, {};", f32_literal(std::f32::consts::LN_2), f32_literal(1.0));
    ptx!(k, "mul.rn.f32 {power}, {power}, {rest};");
    power
}

/// The natural logarithm of a positive number: within 2e-7 absolutely between 1/2 and 2, else within 3e-7 relatively.
pub fn ln(k: &mut Assembler, x: Reg<F32>) -> Reg<F32> {
    let y = k.reg::<F32>();
    ptx!(k, "lg2.approx.f32 {y}, {x};");
    ptx!(k, "mul.rn.f32 {y}, {y}, {};", f32_literal(std::f32::consts::LN_2));
    y
}

/// 1 / (1 + e^-x) with a relative error below 6e-7; 0 where it is below 2^-126.
pub fn sigmoid(k: &mut Assembler, x: Reg<F32>) -> Reg<F32> {
    let minus = k.reg::<F32>();
    ptx!(k, "neg.f32 {minus}, {x};");
    let e = exp(k, minus);
    ptx!(k, "add.rn.f32 {e}, {e}, {};", f32_literal(1.0));
    ptx!(k, "rcp.approx.ftz.f32 {e}, {e};");
    e
}

#[cfg(test)]
#[expect(clippy::unwrap_used, reason = "tests")]
mod tests {
    use super::*;
    use crate::{
        device::Device,
        memory::Memory,
        ptx::{Arg, Launch, testing},
    };

    type Function = fn(&mut Assembler, Reg<F32>) -> Reg<F32>;

    fn map(f: Function, x: &[f32]) -> Vec<f32> {
        let kernel = kernel("map".into(), move |k| {
            let (x, n) = (k.pointer("x"), k.u32("n"));
            flat(k, n, 1, |k, i, _| {
                let at = element(k, x, i, DType::F32);
                let x = load(k, at, DType::F32);
                let y = f(k, x);
                store(k, at, y, DType::F32);
            });
        });
        let memory = Memory::new(Device::Cpu);
        let t = memory.from_slice(&[x.len()], x);
        let args = vec![Arg::Tensor(t), Arg::U32(x.len() as u32)];
        testing::run(&memory, 1, &[Launch { kernel, grid: flat_grid(x.len(), 1), args }]).unwrap();
        memory.download(t)
    }

    #[test]
    fn functions_are_as_exact_as_they_say_and_keep_their_edges() {
        let x: Vec<f32> = (-870..880).map(|i| i as f32 * 0.1003).collect();
        for (x, y) in x.iter().zip(map(exp, &x)) {
            let want = f64::from(*x).exp();
            let error = (f64::from(y) - want).abs();
            assert!(error <= 3.5e-7 * want + 1.2e-38 || want > 3e38, "exp({x}) = {want}, got {y}");
        }
        assert_eq!(
            map(exp, &[f32::NEG_INFINITY, -200.0, 0.0, 1000.0, f32::INFINITY]),
            [0.0, 0.0, 1.0, 1.0 / 0.0, 1.0 / 0.0]
        );
        assert!(map(exp, &[f32::NAN])[0].is_nan());
        for (x, y) in x.iter().zip(map(sigmoid, &x)) {
            let want = 1.0 / (1.0 + (-f64::from(*x)).exp());
            assert!((f64::from(y) - want).abs() <= 6e-7 * want + 1.2e-38, "sigmoid({x}) = {want}, got {y}");
        }
        let positive: Vec<f32> = x.iter().map(|x| x.abs() + 1e-3).collect();
        for (x, y) in positive.iter().zip(map(ln, &positive)) {
            let want = f64::from(*x).ln();
            assert!((f64::from(y) - want).abs() <= 3e-7 * want.abs().max(0.7), "ln({x}) = {want}, got {y}");
        }
    }

    #[test]
    fn parts_of_tensors_go_element_by_element_unless_they_are_aligned() {
        let memory = Memory::new(Device::Cpu);
        let (x, y) = (memory.alloc(DType::Bf16, &[64]), memory.alloc(DType::F32, &[64]));
        assert_eq!(lanes(&[x, y], 0), 8);
        assert_eq!(lanes(&[y], 0), 4);
        assert_eq!(lanes(&[x, y], 12), 1);
        assert_eq!(lanes(&[x.slice(8, 8), y.slice(4, 8)], 0), 8);
        assert_eq!(lanes(&[x.slice(4, 8), y], 0), 1);
        assert_eq!(lanes(&[x, y.slice(2, 8)], 0), 1);
    }
}
