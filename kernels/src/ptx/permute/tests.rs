//! Sorting, moving and summing rows against the CPU ops: orders, moved rows and sums to the bit, products of rows closely.

use rand::{RngExt as _, SeedableRng};

use super::*;
use crate::{
    ops::permute as cpu,
    ptx::case::{Case, Data},
};

const DTYPES: [DType; 2] = [DType::F32, DType::Bf16];

fn indices(t: usize, k: usize, e: usize, seed: u64) -> Vec<u32> {
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    // Skewed, so that some experts get many slots and some none.
    (0..t * k).map(|_| rng.random_range(0..e as u32).min(rng.random_range(0..e as u32))).collect()
}

/// The order's tensors, poisoned.
fn empty_order(n: usize, e: usize) -> [Data; 3] {
    [e + 1, n, n].map(|n| Data::poison(DType::U32, &[n]))
}

fn order_of(t: &[Tensor]) -> Order {
    Order { offsets: t[0], row_of_slot: t[1], token_of_row: t[2] }
}

/// The order's tensors, sorted.
fn order(t: usize, k: usize, e: usize, seed: u64) -> [Data; 3] {
    let indices = indices(t, k, e, seed);
    let mut order: Vec<usize> = (0..t * k).collect();
    order.sort_by_key(|&slot| indices[slot]);
    let mut row_of_slot = vec![0; t * k];
    order.iter().enumerate().for_each(|(row, &slot)| row_of_slot[slot] = row as u32);
    let tokens: Vec<u32> = order.iter().map(|slot| (slot / k) as u32).collect();
    let offsets: Vec<u32> = (0..=e as u32).map(|e| indices.iter().filter(|&&i| i < e).count() as u32).collect();
    [Data::u32(&[e + 1], &offsets), Data::u32(&[t * k], &row_of_slot), Data::u32(&[t * k], &tokens)]
}

#[test]
fn orders_are_the_cpus() {
    for (t, k, e, seed) in
        [(6, 2, 4, 1), (0, 2, 4, 2), (1, 1, 1, 3), (40, 8, 256, 4), (333, 3, 7, 5), (400, 6, 300, 6), (1100, 1, 64, 7)]
    {
        let slots = Data::u32(&[t, k], &indices(t, k, e, seed));
        let inputs: Vec<Data> = [slots].into_iter().chain(empty_order(t * k, e)).collect();
        Case::new(&inputs)
            .cpu(|s, x| cpu::sort(s, x[0], order_of(&x[1..])))
            .ptx(|x| sort(x[0], order_of(&x[1..])))
            .equal();
    }
}

#[test]
fn each_barrier_of_a_block_is_needed() {
    let slots = Data::u32(&[150, 2], &indices(150, 2, 5, 4));
    let inputs: Vec<Data> = [slots].into_iter().chain(empty_order(300, 5)).collect();
    // A warp's barriers stand next to `match`, where the interpreter's lanes meet anyway.
    Case::new(&inputs).mutants("bar.sync", |x| sort(x[0], order_of(&x[1..])));
}

#[test]
fn an_expert_that_does_not_exist_is_told_of() {
    for (e, chosen) in [(4, [0, 1, 2, 4]), (4, [0, u32::MAX, 2, 3]), (0, [0, 0, 0, 0])] {
        let inputs: Vec<Data> = [Data::u32(&[1, 4], &chosen)].into_iter().chain(empty_order(4, e)).collect();
        let case = Case::new(&inputs);
        case.same_error(|s, x| cpu::sort(s, x[0], order_of(&x[1..])), |_, x| sort(x[0], order_of(&x[1..])));
    }
}

#[test]
fn rows_move_and_sum_as_on_the_cpu() {
    // Rows of a warp and of a block, whole accesses and single elements.
    for (t, k, e, d) in [(5, 2, 4, 64), (9, 3, 2, 7), (3, 8, 16, 2056), (2, 1, 1, 300)] {
        for dtype in DTYPES {
            let n = t * k;
            let order = order(t, k, e, 3);
            let inputs = |more: &[Data]| -> Vec<Data> { order.iter().chain(more).cloned().collect() };
            let rows = Data::random(dtype, &[n, d], 1);
            let weights = Data::random(DType::F32, &[t, k], 4);
            Case::new(&inputs(&[Data::random(dtype, &[t, d], 1), Data::poison(dtype, &[n, d])]))
                .cpu(|s, x| cpu::permute(s, x[3], order_of(x), x[4]))
                .ptx(|x| permute(x[3], order_of(x), x[4]))
                .equal();
            for accumulate in [false, true] {
                let y = if accumulate { Data::random(dtype, &[t, d], 2) } else { Data::poison(dtype, &[t, d]) };
                Case::new(&inputs(&[rows.clone(), y.clone()]))
                    .cpu(|s, x| cpu::permute_grad(s, x[3], order_of(x), x[4], accumulate))
                    .ptx(|x| permute_grad(x[3], order_of(x), x[4], accumulate))
                    .equal();
                Case::new(&inputs(&[rows.clone(), weights.clone(), y]))
                    .cpu(|s, x| cpu::combine(s, x[3], x[4], order_of(x), accumulate.then_some(x[5]), x[5]))
                    .ptx(|x| combine(x[3], x[4], order_of(x), accumulate.then_some(x[5]), x[5]))
                    .equal();
            }
            let (residual, y) = (Data::random(dtype, &[t, d], 2), Data::poison(dtype, &[t, d]));
            Case::new(&inputs(&[rows.clone(), weights.clone(), residual, y]))
                .cpu(|s, x| cpu::combine(s, x[3], x[4], order_of(x), Some(x[5]), x[6]))
                .ptx(|x| combine(x[3], x[4], order_of(x), Some(x[5]), x[6]))
                .equal();
            let more = [
                Data::random(dtype, &[t, d], 5),
                rows.clone(),
                weights.clone(),
                Data::poison(dtype, &[n, d]),
                Data::poison(DType::F32, &[t, k]),
            ];
            // A sum of d products of numbers below 1 in another order; most are near 0, so the bound is absolute.
            Case::new(&inputs(&more))
                .cpu(|s, x| cpu::combine_grad(s, x[3], x[4], x[5], order_of(x), x[6], x[7]))
                .ptx(|x| combine_grad(x[3], x[4], x[5], order_of(x), x[6], x[7]))
                .close(2e-8 * (d as f64).max(50.0));
        }
    }
}

#[test]
fn few_blocks_move_and_sum_all_rows() {
    // Rows of a warp, and of a block with one sum and with several.
    for (t, k, e, d) in [(21, 2, 4, 64), (4, 1, 2, 2056), (3, 3, 2, 2056)] {
        let order = order(t, k, e, 3);
        let (n, bf16) = (t * k, DType::Bf16);
        for most in [1, 2] {
            let few = |launches: Vec<Launch>| -> Vec<Launch> {
                let few: Vec<Launch> = launches.into_iter().map(|launch| launch.of_at_most(most)).collect();
                assert!(few.iter().all(|launch| launch.grid[0] <= most), "the grid is any");
                few
            };
            let inputs = |more: &[Data]| -> Vec<Data> { order.iter().chain(more).cloned().collect() };
            let (x, rows) = (Data::random(bf16, &[t, d], 1), Data::random(bf16, &[n, d], 2));
            let weights = Data::random(DType::F32, &[t, k], 4);
            Case::new(&inputs(&[x.clone(), Data::poison(bf16, &[n, d])]))
                .cpu(|s, x| cpu::permute(s, x[3], order_of(x), x[4]))
                .ptx(|x| few(permute(x[3], order_of(x), x[4])))
                .equal();
            Case::new(&inputs(&[rows.clone(), weights.clone(), x.clone(), Data::poison(bf16, &[t, d])]))
                .cpu(|s, x| cpu::combine(s, x[3], x[4], order_of(x), Some(x[5]), x[6]))
                .ptx(|x| few(combine(x[3], x[4], order_of(x), Some(x[5]), x[6])))
                .equal();
            let grads = [Data::poison(bf16, &[n, d]), Data::poison(DType::F32, &[t, k])];
            let case = Case::new(&inputs(&[&[x, rows, weights][..], &grads].concat()));
            let launches = |x: &[Tensor]| few(combine_grad(x[3], x[4], x[5], order_of(x), x[6], x[7]));
            if k == 1 && most == 1 {
                case.mutants("bar.sync", launches);
            }
            case.cpu(|s, x| cpu::combine_grad(s, x[3], x[4], x[5], order_of(x), x[6], x[7]))
                .ptx(launches)
                .close(2e-8 * (d as f64).max(50.0));
        }
    }
}
