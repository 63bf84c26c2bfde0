//! The sum of what several ranks have, in their order: what a member of a collective does with the parts that the others sent it.
//!
//! Signature: sum_parts (parts, x, n: u32, num_parts: u32, me: u32, stride: u32 bytes). x is part `me`, and becomes the sum; the others
//! lie in `parts`, each in its slot. For any grid, 16 bytes a thread and part; in f32 (f64 for f64) from the first part on, rounded once
//! on store: the bits are those of the sum on a host. Time: bytes of the parts over memory bandwidth.

use super::{
    Arg, Kernel, Launch,
    asm::{Assembler, B64, Pred},
    golden::Variant,
    parts::{
        self, count, element, flat_grid, flat_over_grid, load_f64, load_vector, special, store_f64, store_vector,
        strided,
    },
};
use crate::{dtype::DType, ptx, tensor::Tensor};

/// Bytes from one slot to the next, for so many elements: every slot begins where 16 bytes are read at once.
pub fn slot_bytes(dtype: DType, len: usize) -> usize {
    (len * dtype.size_bytes()).next_multiple_of(16)
}

/// x = the sum of `num_parts` parts in their order: x is part `me`, part i lies i slots of [`slot_bytes`] into `parts`.
///
/// # Panics
/// If slots are of 4 GiB or more, or x is of no float type.
pub fn sum_parts(parts: Arg, x: Tensor, num_parts: usize, me: usize) -> Vec<Launch> {
    let (n, stride) = (x.len(), slot_bytes(x.dtype, x.len()));
    let lanes = if x.dtype == DType::F64 { 1 } else { parts::lanes(&[x], 0) };
    let mut args = vec![parts, Arg::Tensor(x)];
    args.extend([n, num_parts, me, stride].map(|n| Arg::U32(count(n))));
    let kernel = sum_parts_kernel(x.dtype, lanes);
    if n == 0 { vec![] } else { vec![Launch { kernel, grid: flat_grid(n, lanes), args }] }
}

fn sum_parts_kernel(dtype: DType, lanes: usize) -> Kernel {
    assert!(dtype.is_float(), "parts are summed in f32 or f64, found {dtype:?}");
    let emit = move |k: &mut Assembler| {
        let (parts, x, n) = (k.pointer("parts"), k.pointer("x"), k.u32("n"));
        let (num_parts, me, stride) = (k.u32("num_parts"), k.u32("me"), k.u32("stride"));
        let (zero, one) = (special(k, "0"), special(k, "1"));
        flat_over_grid(k, n, lanes, |k, i, lanes| {
            let (at_x, slot) = (element(k, x, i, dtype), element(k, parts, i, dtype));
            let at_part = |k: &mut Assembler, part| {
                let (at, is_mine) = (k.reg::<B64>(), k.reg::<Pred>());
                ptx!(k, "mad.wide.u32 {at}, {part}, {stride}, {slot};");
                ptx!(k, "setp.eq.u32 {is_mine}, {part}, {me};");
                ptx!(k, "selp.b64 {at}, {at_x}, {at}, {is_mine};");
                at
            };
            let first = at_part(k, zero);
            if dtype == DType::F64 {
                let sum = load_f64(k, first, dtype);
                strided(k, one, num_parts, 1, |k, part| {
                    let at = at_part(k, part);
                    let next = load_f64(k, at, dtype);
                    ptx!(k, "add.rn.f64 {sum}, {sum}, {next};");
                });
                return store_f64(k, at_x, sum, dtype);
            }
            let sums = load_vector(k, first, dtype, lanes);
            strided(k, one, num_parts, 1, |k, part| {
                let at = at_part(k, part);
                for (sum, next) in sums.iter().zip(load_vector(k, at, dtype, lanes)) {
                    ptx!(k, "add.rn.f32 {sum}, {sum}, {next};");
                }
            });
            store_vector(k, at_x, &sums, dtype);
        });
    };
    parts::kernel(format!("sum_parts_{}_x{lanes}", dtype.name()), emit).for_any_grid()
}

/// What is committed.
pub fn variants() -> Vec<Variant> {
    [(DType::Bf16, 8), (DType::F32, 4), (DType::F64, 1)]
        .map(|(dtype, lanes)| Variant::new(sum_parts_kernel(dtype, lanes), 32))
        .into()
}

#[cfg(test)]
mod tests {
    use half::bf16;

    use super::*;
    use crate::ptx::case::{Case, Data};

    /// In the order of parts, in the type that sums are kept in.
    fn sum(dtype: DType, parts: impl Iterator<Item = f64>) -> f64 {
        let sum_f32 = |parts: &mut dyn Iterator<Item = f64>| parts.map(|x| x as f32).reduce(|a, b| a + b);
        let mut parts = parts;
        match dtype {
            DType::F64 => parts.reduce(|a, b| a + b).unwrap_or(0.0),
            DType::Bf16 => bf16::from_f32(sum_f32(&mut parts).unwrap_or(0.0)).to_f64(),
            _ => f64::from(sum_f32(&mut parts).unwrap_or(0.0)),
        }
    }

    #[test]
    fn parts_are_summed_in_their_order_to_the_bit() {
        for dtype in [DType::F32, DType::Bf16, DType::F64] {
            for (num_parts, me, len, skip) in
                [(1, 0, 9, 0), (2, 0, 255, 0), (2, 1, 4096 + 5, 8), (5, 3, 1000, 3), (4, 2, 1, 0), (3, 1, 0, 0)]
            {
                let slot = slot_bytes(dtype, len) / dtype.size_bytes();
                // Of sizes that differ, so that another order gives other bits; a slot's end, and the slot of x, hold no number.
                let scale = |i: usize| 10f64.powi((i * 7 % 5) as i32 - 2);
                let mut parts = Data::random(dtype, &[num_parts, slot], 1);
                for (i, value) in parts.2.iter_mut().enumerate() {
                    let is_used = i % slot.max(1) < len && i / slot.max(1) != me;
                    *value = if is_used { *value * scale(i) } else { f64::NAN };
                }
                let x = Data::random(dtype, &[len + skip], 2);
                let case = Case::new(&[parts, x]).want(|inputs| {
                    let round = |x: &f64| match dtype {
                        DType::F64 => *x,
                        DType::Bf16 => bf16::from_f64(*x).to_f64(),
                        _ => f64::from(*x as f32),
                    };
                    let rounded = |x: &[f64]| x.iter().map(round).collect::<Vec<_>>();
                    let (parts, mut x) = (rounded(&inputs[0]), rounded(&inputs[1]));
                    for i in 0..len {
                        let part = |p: usize| if p == me { x[skip + i] } else { parts[p * slot + i] };
                        x[skip + i] = sum(dtype, (0..num_parts).map(part).collect::<Vec<_>>().into_iter());
                    }
                    vec![parts, x]
                });
                case.ptx(|t| sum_parts(Arg::Tensor(t[0]), t[1].slice(skip, len), num_parts, me)).equal();
            }
        }
    }

    #[test]
    fn few_blocks_reach_every_element() {
        let (n, slot) = (7000, slot_bytes(DType::F32, 7000) / 4);
        let inputs = [Data::random(DType::F32, &[2, slot], 1), Data::random(DType::F32, &[n], 2)];
        let launches = |most: u32| {
            move |t: &[Tensor]| -> Vec<Launch> {
                let all = sum_parts(Arg::Tensor(t[0]), t[1], 2, 1);
                all.into_iter().map(|launch| launch.of_at_most(most)).collect()
            }
        };
        let whole = Case::new(&inputs).ptx(launches(100)).got;
        let few = Case::new(&inputs).want(|_| whole).ptx(launches(3));
        few.equal();
    }
}
