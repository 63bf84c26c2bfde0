//! Products with what is odd about them, run in the interpreter and compared with sums in f64 of the same (rounded) inputs.

use half::bf16;

use super::{Groups, Layout, Matrix, Problem, Target, launch};
use crate::{
    device::Device,
    dtype::{DType, Float},
    memory::Memory,
    ops::testing::random,
    ptx::{Arch, Launch, testing},
    tensor::Tensor,
};

/// Few multiprocessors, so that blocks have more than one tile.
pub(in crate::ptx) const AMPERE: Target = Target { arch: Arch::Sm80, num_sms: 4, tuning: None };
pub(in crate::ptx) const HOPPER: Target = Target { arch: Arch::Sm90a, num_sms: 2, tuning: None };

/// How a case's groups are given.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(in crate::ptx) enum How {
    One,
    Offsets,
    Counts(usize),
}

/// A product with its sizes and what is odd about it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case<'a> {
    pub layout: Layout,
    /// Sizes of C and k; where they are grouped, of rows (Nt, Nn) or k (Tn) those of each group are `counts`.
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub counts: &'a [usize],
    pub how: How,
    /// Elements that rows of a, b and c are longer than what is used of them.
    pub pad: usize,
    /// Whether to add to what is in C, or to another matrix.
    pub accumulate: bool,
    pub onto: bool,
    pub bias: bool,
    pub output: DType,
}

pub(super) const DENSE: Case = Case {
    layout: Layout::Nt,
    m: 0,
    n: 0,
    k: 0,
    counts: &[],
    how: How::One,
    pad: 0,
    accumulate: false,
    onto: false,
    bias: false,
    output: DType::F32,
};

impl Case<'_> {
    /// Where each group's rows or part of k begins, and how many there are; and of how many in all.
    fn parts(&self, all: usize) -> (Vec<(usize, usize)>, usize) {
        match self.how {
            How::One => (vec![(0, all)], all),
            How::Offsets => {
                let ends = self.counts.iter().scan(0, |sum, &count| {
                    *sum += count;
                    Some((*sum - count, count))
                });
                // Room past the last one's.
                (ends.collect(), self.counts.iter().sum::<usize>() + 3)
            }
            How::Counts(capacity) => (
                self.counts.iter().enumerate().map(|(e, &c)| (e * capacity, c)).collect(),
                self.counts.len() * capacity,
            ),
        }
    }

    fn groups(&self, memory: &Memory, is_rows: bool) -> Groups {
        let num = self.counts.len() as u32;
        let mut offsets = vec![0u32];
        self.counts.iter().for_each(|&c| offsets.push(offsets[offsets.len() - 1] + c as u32));
        let offsets = || memory.from_slice(&[offsets.len()], &offsets);
        let counts: Vec<u32> = self.counts.iter().map(|&c| c as u32).collect();
        let counts = || memory.from_slice(&[counts.len()], &counts);
        match (self.how, is_rows) {
            (How::One, _) => Groups::One,
            (How::Offsets, true) => Groups::Rows { offsets: offsets(), num },
            (How::Offsets, false) => Groups::Inner { offsets: offsets(), num },
            (How::Counts(c), true) => Groups::MaskedRows { counts: counts(), num, capacity: c as u32 },
            (How::Counts(c), false) => Groups::MaskedInner { counts: counts(), num, capacity: c as u32 },
        }
    }

    /// Runs it in T with one seed of the interpreter and of data, and compares.
    pub fn check<T: Float>(&self, on: Target, seed: u64) {
        self.check_by::<T>(&|problem| launch(on, problem), seed);
    }

    /// As `check`, by launches of the caller's.
    pub fn check_by<T: Float>(&self, launches: &dyn Fn(&Problem) -> Vec<Launch>, seed: u64) {
        self.run::<T>(launches, seed).unwrap_or_else(|e| panic!("{self:?}, seed {seed}: {e}"));
    }

    /// What is wrong with it, if something is.
    pub fn run<T: Float>(&self, launches: &dyn Fn(&Problem) -> Vec<Launch>, seed: u64) -> Result<(), String> {
        let Case { layout, n, pad, .. } = *self;
        let is_rows = layout != Layout::Tn;
        let num = self.counts.len().max(1);
        let (row_parts, m) = if is_rows { self.parts(self.m) } else { (vec![(0, self.m)], self.m) };
        let (k_parts, inner) = if is_rows { (vec![(0, self.k)], self.k) } else { self.parts(self.k) };

        let memory = Memory::new(Device::Cpu);
        let rounded = |len: usize, seed| -> Vec<T> { random(len, seed).into_iter().map(T::of_f64).collect() };
        let (a_rows, a_cols) = if layout == Layout::Tn { (inner, m) } else { (m, inner) };
        let (b_rows, b_cols) = if layout == Layout::Nt { (n, inner) } else { (inner, n) };
        let weights = if is_rows { num } else { 1 };
        let (lda, ldb, ldc) = (a_cols + pad, b_cols + pad, n + pad);
        let (mut a, mut b) = (rounded(a_rows * lda, seed * 4 + 1), rounded(weights * b_rows * ldb, seed * 4 + 2));
        // What is nobody's is not to be touched: rows of A, and of B where k is grouped.
        let parts = if is_rows { &row_parts } else { &k_parts };
        let is_somebodys = |row: &usize| parts.iter().any(|(first, count)| (*first..first + count).contains(row));
        let others = |rows: usize| (0..rows).filter(|row| self.how != How::One && !is_somebodys(row));
        others(a_rows).for_each(|row| a[row * lda..][..lda].fill(T::of_f64(f64::NAN)));
        others(if is_rows { 0 } else { b_rows }).for_each(|row| b[row * ldb..][..ldb].fill(T::of_f64(f64::NAN)));
        let c_rows = m * if is_rows { 1 } else { num };
        let added: Vec<f64> =
            random(c_rows * ldc, seed * 4 + 3).into_iter().map(|x| bf16::from_f64(x).to_f64()).collect();
        let old = if self.accumulate { added.clone() } else { vec![f64::NAN; c_rows * ldc] };
        let bias: Vec<f64> = random(n, seed * 4 + 4)
            .into_iter()
            .map(|x| if self.bias { bf16::from_f64(x).to_f64() } else { 0.0 })
            .collect();

        let put = |values: &[f64]| match self.output {
            DType::Bf16 => {
                memory.from_slice(&[values.len()], &values.iter().map(|&x| bf16::from_f64(x)).collect::<Vec<_>>())
            }
            _ => memory.from_slice(&[values.len()], &values.iter().map(|&x| x as f32).collect::<Vec<_>>()),
        };
        let (a_t, b_t) = (memory.from_slice(&[a.len()], &a), memory.from_slice(&[b.len()], &b));
        let c_t = put(&old);
        let addend = if self.accumulate { Some(c_t) } else { self.onto.then(|| put(&added)) };
        let problem = Problem {
            bias: self.bias.then(|| put(&bias)),
            addend,
            groups: self.groups(&memory, is_rows),
            ..Problem::new(layout, [m, n, inner], (Matrix::new(a_t, lda), Matrix::new(b_t, ldb), Matrix::new(c_t, ldc)))
        };
        testing::run(&memory, seed, &launches(&problem))?;
        let get = |t: Tensor| -> Vec<f64> {
            match self.output {
                DType::Bf16 => memory.download::<bf16>(t).into_iter().map(bf16::to_f64).collect(),
                _ => memory.download::<f32>(t).into_iter().map(f64::from).collect(),
            }
        };
        let got = get(c_t);
        if addend.is_some_and(|addend| addend != c_t && get(addend) != added) {
            return Err("what is added has changed".to_owned());
        }

        let at_a = |row: usize, q: usize| a[if layout == Layout::Tn { q * lda + row } else { row * lda + q }].as_f64();
        let at_b = |e: usize, q: usize, col: usize| {
            let at = if layout == Layout::Nt { col * ldb + q } else { q * ldb + col };
            b[e * b_rows * ldb + at].as_f64()
        };
        let mut want = old.clone();
        for e in 0..num {
            let (first, rows) = row_parts[if is_rows { e } else { 0 }];
            let (first_k, inner) = k_parts[if is_rows { 0 } else { e }];
            for row in first..first + rows {
                for (col, bias) in bias.iter().enumerate() {
                    let sum: f64 = (first_k..first_k + inner)
                        .map(|q| at_a(row, q) * at_b(if is_rows { e } else { 0 }, q, col))
                        .sum();
                    let at = (row + if is_rows { 0 } else { e * m }) * ldc + col;
                    want[at] = sum + bias + if addend.is_some() { added[at] } else { 0.0 };
                }
            }
        }
        self.compare(&got, &want)
    }

    fn compare(&self, got: &[f64], want: &[f64]) -> Result<(), String> {
        let (mut some, mut wanted) = (vec![], vec![]);
        for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
            if want.is_nan() {
                if !got.is_nan() {
                    return Err(format!("element {at} is to be left alone, found {got}"));
                }
                continue;
            }
            some.push(got);
            wanted.push(want);
            let ulp = 2f64.powi(want.abs().max(1e-30).log2().floor() as i32 - 7);
            // f32 sums of values below 1 are off by some 1e-6, which counts where they cancel.
            let near = if self.output == DType::Bf16 { ulp + 2e-6 } else { 1e-3 };
            if got.is_nan() || (got - want).abs() > near {
                return Err(format!("element {at} is {got}, expected {want}"));
            }
        }
        let diff = testing::calc_diff(&some, &wanted);
        if self.output == DType::F32 && diff >= 1e-10 { Err(format!("differs by {diff}")) } else { Ok(()) }
    }
}
