//! Products with what is odd about them, run in the interpreter and compared with sums in f64 of the same codes times scales.

use half::bf16;

use super::{Problem, ScaleB, launch};
use crate::{
    device::Device,
    dtype::DType,
    fp8::{Blocks, Scaling, TILE, Tiles, decode_e4m3, encode_e4m3},
    memory::Memory,
    ops::testing::random,
    ptx::{
        Launch,
        gemm::{Groups, Target, harness::How},
        testing,
    },
};

/// What numbers are multiplied.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Numbers {
    /// About normal, around 0.
    Gaussian,
    /// The same, one channel of k in 61 a hundred times as large.
    Outliers,
    /// Between 0 and 1, so that sums grow; one in each tile is 1, so that scales are the same.
    Positive,
}

/// A product with its sizes and what is odd about it.
#[derive(Clone, Copy, Debug)]
pub(super) struct Case<'a> {
    /// Whether B has tiles.
    pub tiled: bool,
    pub m: usize,
    pub n: usize,
    pub k: usize,
    pub counts: &'a [usize],
    /// Offsets are of rows, or of padded k if B has tiles.
    pub how: How,
    pub accumulate: bool,
    pub output: DType,
    pub numbers: Numbers,
}

pub(super) const DENSE: Case = Case {
    tiled: false,
    m: 0,
    n: 0,
    k: 0,
    counts: &[],
    how: How::One,
    accumulate: false,
    output: DType::Bf16,
    numbers: Numbers::Gaussian,
};

/// Codes by rows, and a scale for each element's tile or block.
#[derive(Clone)]
struct Side {
    codes: Vec<u8>,
    scales: Vec<f32>,
}

impl Side {
    fn value(&self, at: usize, scale: usize) -> f64 {
        f64::from(decode_e4m3(self.codes[at])) * f64::from(self.scales[scale])
    }
}

/// Rows of numbers.
fn numbers(what: Numbers, rows: usize, cols: usize, seed: u64) -> Vec<f64> {
    let sum_of_three = |x: &[f64]| x.iter().sum::<f64>();
    let mut x: Vec<f64> = random(3 * rows * cols, seed).chunks(3).map(sum_of_three).collect();
    for (i, x) in x.iter_mut().enumerate() {
        match what {
            Numbers::Gaussian => {}
            Numbers::Outliers if (i % cols.max(1)).is_multiple_of(61) => *x *= 100.0,
            Numbers::Outliers => {}
            Numbers::Positive if (i % cols.max(1)).is_multiple_of(TILE) => *x = 1.0,
            Numbers::Positive => *x = x.abs() / 3.0,
        }
    }
    x
}

/// Quantizes rows of `cols` by blocks of `high` x 128; scales are [ceil(rows / high), ceil(cols / 128)] of `rows` each.
fn quantize(x: &[f64], rows: usize, cols: usize, high: usize) -> Side {
    let wide = cols.div_ceil(TILE);
    let mut side = Side { codes: vec![0; x.len()], scales: vec![0.0; rows.div_ceil(high) * wide] };
    for (at, scale) in side.scales.iter_mut().enumerate() {
        let (first_row, first_col) = (at / wide * high, at % wide * TILE);
        let elements = || {
            let rows = first_row..(first_row + high).min(rows);
            rows.flat_map(|r| (first_col..(first_col + TILE).min(cols)).map(move |c| r * cols + c))
        };
        let amax = elements().fold(crate::fp8::MIN_AMAX, |m, i| m.max(x[i].abs() as f32));
        *scale = Scaling::Real.scale(amax);
        for i in elements() {
            side.codes[i] = encode_e4m3(x[i] as f32 * (1.0 / *scale));
        }
    }
    side
}

impl Case<'_> {
    /// Runs it with one seed of the interpreter and of data, and compares.
    pub fn check(&self, on: Target, seed: u64) {
        self.check_by(&|problem| launch(on, problem), seed);
    }

    /// As `check`, by launches of the caller's.
    pub fn check_by(&self, launches: &dyn Fn(&Problem) -> Vec<Launch>, seed: u64) {
        self.run(launches, seed, None).unwrap_or_else(|e| panic!("{self:?}, seed {seed}: {e}"));
    }

    /// Where each group's rows or columns begin, how many it has, and how many there are in all.
    fn parts(&self, all: usize) -> (Vec<(usize, usize)>, usize) {
        let step = |count: usize| if self.tiled { count.next_multiple_of(TILE) } else { count };
        match self.how {
            How::One => (vec![(0, all)], all),
            How::Offsets => {
                let mut begin = 0;
                let parts: Vec<_> = self
                    .counts
                    .iter()
                    .map(|&count| {
                        begin += step(count);
                        (begin - step(count), count)
                    })
                    .collect();
                // Room past the last one's.
                (parts, begin + if self.tiled { TILE } else { 3 })
            }
            How::Counts(capacity) => {
                let parts = self.counts.iter().enumerate().map(|(e, &c)| (e * capacity, c));
                (parts.collect(), self.counts.len() * capacity)
            }
        }
    }

    fn groups(&self, memory: &Memory) -> Groups {
        let num = self.counts.len() as u32;
        let counts: Vec<u32> = self.counts.iter().map(|&c| c as u32).collect();
        let offsets: Vec<u32> = (0..=counts.len()).map(|e| counts[..e].iter().sum()).collect();
        let offsets = || memory.from_slice(&[offsets.len()], &offsets);
        match self.how {
            How::One => Groups::One,
            How::Offsets if self.tiled => Groups::PaddedInner { offsets: offsets(), num },
            How::Offsets => Groups::Rows { offsets: offsets(), num },
            How::Counts(c) => {
                Groups::MaskedRows { counts: memory.from_slice(&[counts.len()], &counts), num, capacity: c as u32 }
            }
        }
    }

    /// What is wrong with it, if something is. Tensor cores keep `sum_bits` of a sum if given.
    pub fn run(
        &self,
        launches: &dyn Fn(&Problem) -> Vec<Launch>,
        seed: u64,
        sum_bits: Option<u32>,
    ) -> Result<(), String> {
        let Case { tiled, n, .. } = *self;
        let num = self.counts.len().max(1);
        let (row_parts, m) = if tiled { (vec![(0, self.m)], self.m) } else { self.parts(self.m) };
        let (k_parts, inner) = if tiled { self.parts(self.k) } else { (vec![(0, self.k)], self.k) };
        let weights = if tiled { 1 } else { num };
        let wide = inner.div_ceil(TILE);

        let of = |rows: usize, seed| numbers(self.numbers, rows, inner, seed);
        let (mut a_values, mut b_values) = (of(m, seed * 4 + 1), of(weights * n, seed * 4 + 2));
        if tiled {
            // Padding holds zeros.
            let inside = |q: usize| k_parts.iter().any(|(first, count)| (*first..first + count).contains(&q));
            for x in [&mut a_values, &mut b_values] {
                let outside = x.iter_mut().enumerate().filter(|(at, _)| !inside(at % inner.max(1)));
                outside.for_each(|(_, x)| *x = 0.0);
            }
        }
        let mut a = quantize(&a_values, m, inner, 1);
        let high = if tiled { 1 } else { TILE };
        let per_matrix = n.div_ceil(high) * wide;
        let mut b = Side { codes: vec![], scales: vec![] };
        for e in 0..weights {
            let side = quantize(&b_values[e * n * inner..][..n * inner], n, inner, high);
            b.codes.extend(side.codes);
            b.scales.extend(side.scales);
        }
        // What is nobody's is not to be touched.
        for row in (0..m).filter(|row| !row_parts.iter().any(|(first, c)| (*first..first + c).contains(row))) {
            a.codes[row * inner..][..inner].fill(0x7f);
            a.scales[row * wide..][..wide].fill(f32::NAN);
        }
        let c_rows = m * if tiled { num } else { 1 };
        let old: Vec<f64> = if self.accumulate {
            random(c_rows * n, seed * 4 + 3).into_iter().map(|x| bf16::from_f64(x).to_f64()).collect()
        } else {
            vec![f64::NAN; c_rows * n]
        };

        let memory = Memory::new(Device::Cpu);
        // Turned to a row for each 128 of k; what is past the last is not read.
        let by_k = |side: &Side, rows: usize| {
            let [down, pitch] = Tiles::scale_shape(rows, inner);
            let mut turned = vec![f32::NAN; down * pitch];
            (0..rows * wide).for_each(|i| turned[i % wide * pitch + i / wide] = side.scales[i]);
            memory.from_slice(&[down, pitch], &turned)
        };
        let dims = |rows: usize| [rows, inner];
        let a_tiles = Tiles { codes: memory.from_slice(&dims(m), &a.codes), scales: by_k(&a, m) };
        let b_codes = memory.from_slice(&dims(weights * n), &b.codes);
        let scale_b = if tiled {
            ScaleB::Tiles(by_k(&b, n))
        } else {
            let shape = Blocks::scale_shape(&[weights, n, inner]);
            ScaleB::Blocks(memory.from_slice(&shape, &b.scales))
        };
        let c_t = match self.output {
            DType::Bf16 => memory.from_slice(&[c_rows, n], &old.iter().map(|&x| bf16::from_f64(x)).collect::<Vec<_>>()),
            _ => memory.from_slice(&[c_rows, n], &old.iter().map(|&x| x as f32).collect::<Vec<_>>()),
        };
        let problem = Problem::new([m, n, inner], a_tiles, (b_codes, scale_b), c_t)
            .onto(self.accumulate.then_some(c_t))
            .grouped(self.groups(&memory));
        testing::run_with(&memory, seed, &launches(&problem), |machine| machine.set_fp8_sum_bits(sum_bits))?;
        let got: Vec<f64> = match self.output {
            DType::Bf16 => memory.download::<bf16>(c_t).into_iter().map(bf16::to_f64).collect(),
            _ => memory.download::<f32>(c_t).into_iter().map(f64::from).collect(),
        };

        let (mut want, mut size) = (old.clone(), vec![0.0; old.len()]);
        for e in 0..num {
            let (first, rows) = row_parts[if tiled { 0 } else { e }];
            let (first_k, inner_here) = k_parts[if tiled { e } else { 0 }];
            for (row, col) in (first..first + rows).flat_map(|row| (0..n).map(move |col| (row, col))) {
                let matrix = if tiled { 0 } else { e };
                let term = |q: usize| {
                    let scale = matrix * per_matrix + col / high * wide + q / TILE;
                    let b = b.value((matrix * n + col) * inner + q, scale);
                    a.value(row * inner + q, row * wide + q / TILE) * b
                };
                let terms = || (first_k..first_k + inner_here).map(term);
                let at = (row + if tiled { e * m } else { 0 }) * n + col;
                want[at] = terms().sum::<f64>() + if self.accumulate { want[at] } else { 0.0 };
                size[at] = terms().map(f64::abs).sum::<f64>();
            }
        }
        self.compare(&got, &want, &size, sum_bits.is_some())
    }

    /// `size` are sums of magnitudes; sums that are kept short are off by more of it, and judged as a whole.
    fn compare(&self, got: &[f64], want: &[f64], size: &[f64], short: bool) -> Result<(), String> {
        let (mut some, mut wanted) = (vec![], vec![]);
        for (at, (&got, &want)) in got.iter().zip(want).enumerate() {
            if want.is_nan() {
                if !got.is_nan() {
                    return Err(format!("element {at} is to be left alone, found {got}"));
                }
                continue;
            }
            some.push(got);
            // The measure is of sums: rounding to bf16 alone makes 1.4e-6 of it.
            wanted.push(if self.output == DType::Bf16 { bf16::from_f64(want).to_f64() } else { want });
            let half_ulp = 2f64.powi(want.abs().max(1e-30).log2().floor() as i32 - 8);
            let rounding = if self.output == DType::Bf16 { half_ulp } else { 2e-7 * want.abs() };
            let near = 1.01 * rounding + if short { 1e-2 } else { 1e-6 } * size[at];
            if got.is_nan() || (got - want).abs() > near {
                return Err(format!("element {at} is {got}, expected {want}"));
            }
        }
        let diff = testing::calc_diff(&some, &wanted);
        if diff >= 1e-6 { Err(format!("differs by {diff}")) } else { Ok(()) }
    }
}
