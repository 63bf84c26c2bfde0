//! Whether a device computes what the processors do: every op, on the device under test and on the CPU, from the same inputs, and how far
//! apart the results are. It is what `hadal doctor --device cuda:0` prints, and what tests run on the stand-in.

mod cases;

use std::{fmt::Write as _, sync::Arc};

use half::bf16;
use rand::{RngExt as _, SeedableRng};

pub use cases::cases;

use crate::{
    device::Device,
    dtype::DType,
    error::{Error, Result},
    memory::Memory,
    stream::Stream,
    tensor::Tensor,
};

/// How large the cases are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Some dozens of elements along each axis, aligned and not: for an interpreter.
    Small,
    /// Those, and a layer of a model.
    Full,
}

/// What a tensor holds before the op.
#[derive(Clone, Debug)]
enum Fill {
    /// Values in (-1, 1).
    Random,
    /// Values in (0, 1).
    Positive,
    /// These numbers.
    U32(Vec<u32>),
    /// These values.
    Values(Vec<f64>),
    /// What an op that assigns must not leave: NaN, or a number that is none.
    Poison,
}

/// How near the results must be.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Tolerance {
    /// Of an element, as a fraction of the larger of itself and the tensor's root mean square.
    pub element: f64,
    /// Of a tensor, 1 - 2 <x, y> / (<x, x> + <y, y>), as DeepGEMM measures it.
    pub calc_diff: f64,
}

impl Tolerance {
    /// Elements that are computed alone: one unit in the last place of bf16; of f32 some, since functions differ.
    fn elementwise(dtype: DType) -> Self {
        let element = if dtype == DType::Bf16 { 1.0 / 128.0 } else { 1e-5 };
        Tolerance { element, calc_diff: if dtype == DType::Bf16 { 1e-5 } else { 1e-9 } }
    }

    /// Sums of products in f32, in another order.
    fn product(dtype: DType) -> Self {
        let element = if dtype == DType::Bf16 { 1.0 / 64.0 } else { 2e-4 };
        Tolerance { element, calc_diff: if dtype == DType::Bf16 { 1e-6 } else { 1e-9 } }
    }
}

impl Tolerance {
    /// Sums that the CPU rounds to the tensor's type after each addition, and kernels once: over some rows of bf16.
    fn rounded_sum(dtype: DType) -> Self {
        if dtype == DType::Bf16 { Tolerance { element: 1.0 / 16.0, calc_diff: 2e-4 } } else { Self::product(dtype) }
    }
}

type Run = Box<dyn Fn(&mut Stream, &[Tensor]) -> Result<()> + Send>;

/// An op with its inputs.
pub struct Case {
    /// Its name, as its module and function say it.
    pub op: &'static str,
    /// Of what is computed.
    pub dtype: DType,
    /// Sizes, for people.
    pub shape: String,
    /// How near the results must be.
    pub tolerance: Tolerance,
    tensors: Vec<(DType, Vec<usize>, Fill)>,
    run: Run,
}

/// What a case gave.
#[derive(Clone, Debug)]
pub struct Row {
    /// The op.
    pub op: &'static str,
    /// Its type.
    pub dtype: DType,
    /// Its sizes.
    pub shape: String,
    /// Largest error of an element; see [`Tolerance::element`].
    pub max_error: f64,
    /// Largest of a tensor; see [`Tolerance::calc_diff`].
    pub calc_diff: f64,
    /// What was allowed.
    pub tolerance: Tolerance,
    /// Whether the op ran on the host, for want of a kernel.
    pub on_host: bool,
    /// Seconds on the device, the second time it ran.
    pub secs: Option<f64>,
    /// Why there is no result, if there is none.
    pub failure: Option<String>,
}

impl Row {
    /// Whether the device did as it should.
    pub fn is_ok(&self) -> bool {
        self.failure.is_none() && self.max_error <= self.tolerance.element && self.calc_diff <= self.tolerance.calc_diff
    }
}

fn values(fill: &Fill, dtype: DType, len: usize, seed: u64) -> Vec<f64> {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(seed);
    match fill {
        Fill::Random => (0..len).map(|_| random.random_range(-1.0..1.0)).collect(),
        Fill::Positive => (0..len).map(|_| random.random_range(0.0..1.0)).collect(),
        Fill::U32(numbers) => numbers.iter().map(|&n| f64::from(n)).collect(),
        Fill::Values(values) => values.clone(),
        Fill::Poison if dtype == DType::U32 => vec![f64::from(0xdead_beef_u32); len],
        Fill::Poison if dtype == DType::U8 => vec![f64::from(0xa5_u8); len],
        Fill::Poison => vec![f64::NAN; len],
    }
}

fn upload(memory: &Memory, dtype: DType, dims: &[usize], values: &[f64]) -> Tensor {
    match dtype {
        DType::F64 => memory.from_slice(dims, values),
        DType::F32 => memory.from_slice(dims, &values.iter().map(|&x| x as f32).collect::<Vec<_>>()),
        DType::Bf16 => memory.from_slice(dims, &values.iter().map(|&x| bf16::from_f64(x)).collect::<Vec<_>>()),
        DType::U32 => memory.from_slice(dims, &values.iter().map(|&x| x as u32).collect::<Vec<_>>()),
        DType::U8 => memory.from_slice(dims, &values.iter().map(|&x| x as u8).collect::<Vec<_>>()),
    }
}

fn download(memory: &Memory, tensor: Tensor) -> Vec<f64> {
    match tensor.dtype {
        DType::F64 => memory.download::<f64>(tensor),
        DType::F32 => memory.download::<f32>(tensor).into_iter().map(f64::from).collect(),
        DType::Bf16 => memory.download::<bf16>(tensor).into_iter().map(f64::from).collect(),
        DType::U32 => memory.download::<u32>(tensor).into_iter().map(f64::from).collect(),
        DType::U8 => memory.download::<u8>(tensor).into_iter().map(f64::from).collect(),
    }
}

/// Largest error of an element, and calc_diff.
fn compare(dtype: DType, got: &[f64], want: &[f64]) -> (f64, f64) {
    let known = want.iter().filter(|w| w.is_finite());
    let (squares, count) = known.fold((0.0, 0usize), |(sum, n), w| (sum + w * w, n + 1));
    let rms = (squares / count.max(1) as f64).sqrt();
    let (mut worst, mut dot, mut norms) = (0f64, 0.0, 0.0);
    for (&g, &w) in got.iter().zip(want) {
        let same = g == w || g.is_nan() && w.is_nan();
        if same && !w.is_finite() {
            continue;
        }
        if !same && (!dtype.is_float() || !g.is_finite() || !w.is_finite()) {
            return (f64::INFINITY, f64::INFINITY);
        }
        worst = worst.max((g - w).abs() / w.abs().max(rms).max(f64::MIN_POSITIVE));
        dot += g * w;
        norms += g * g + w * w;
    }
    (worst, if norms == 0.0 { 0.0 } else { (1.0 - 2.0 * dot / norms).max(0.0) })
}

impl Case {
    /// A stream on `memory` with the case's tensors.
    fn prepare(&self, memory: &Memory) -> Result<(Stream, Vec<Tensor>)> {
        let stream = Stream::new("check", memory, &Arc::default())?;
        let make = |(i, (dtype, dims, fill)): (usize, &(DType, Vec<usize>, Fill))| {
            let values = values(fill, *dtype, dims.iter().product(), 1 + i as u64);
            upload(memory, *dtype, dims, &values)
        };
        let tensors = self.tensors.iter().enumerate().map(make).collect();
        memory.failure()?;
        Ok((stream, tensors))
    }

    fn results(&self, memory: &Memory) -> Result<Vec<Vec<f64>>> {
        let (mut stream, tensors) = self.prepare(memory)?;
        (self.run)(&mut stream, &tensors)?;
        stream.synchronize()?;
        Ok(tensors.iter().map(|tensor| download(memory, *tensor)).collect())
    }

    /// Seconds of the op, when it ran before: from one event to the next.
    fn time(&self, memory: &Memory) -> Result<f64> {
        let (mut stream, tensors) = self.prepare(memory)?;
        let start = stream.record();
        (self.run)(&mut stream, &tensors)?;
        let end = stream.record();
        stream.synchronize()?;
        Ok(end.synchronize().saturating_sub(start.synchronize()) as f64 * 1e-9)
    }

    /// Runs it on `device` and on the CPU; `timed` once more, for the time.
    pub fn check(&self, device: Device, timed: bool) -> Row {
        let mut row = Row {
            op: self.op,
            dtype: self.dtype,
            shape: self.shape.clone(),
            max_error: f64::INFINITY,
            calc_diff: f64::INFINITY,
            tolerance: self.tolerance,
            on_host: false,
            secs: None,
            failure: None,
        };
        if let Err(e) = self.fill(&mut row, device, timed) {
            row.failure = Some(e.to_string());
        }
        row
    }

    fn fill(&self, row: &mut Row, device: Device, timed: bool) -> Result<()> {
        let want = self.results(&Memory::new(Device::Cpu))?;
        let memory = Memory::open(device)?;
        let on_host = || memory.gpu().map_or(0, |gpu| gpu.host_ops().values().sum::<u64>());
        let before = on_host();
        let got = self.results(&memory)?;
        row.on_host = on_host() > before;
        memory.failure()?;
        let errors = self.tensors.iter().zip(got.iter().zip(&want));
        let errors = errors.map(|((dtype, ..), (got, want))| compare(*dtype, got, want));
        (row.max_error, row.calc_diff) = errors.fold((0.0, 0.0), |(a, b), (c, d)| (f64::max(a, c), f64::max(b, d)));
        if timed {
            row.secs = Some(self.time(&memory)?);
        }
        Ok(())
    }
}

/// Checks each op on `device`; `tell` sees each row when it is there.
///
/// # Errors
/// If the device cannot be opened. What fails in a case is in its row.
pub fn run(device: Device, scale: Scale, timed: bool, mut tell: impl FnMut(&Row)) -> Result<Vec<Row>> {
    Memory::open(device)?;
    let mut rows = Vec::new();
    for case in cases(scale) {
        let row = case.check(device, timed);
        tell(&row);
        // Nothing works on a device after a kernel failed there.
        let ends = row.failure.is_some() && Memory::open(device).and_then(|m| probe(&m)).is_err();
        rows.push(row);
        if ends {
            break;
        }
    }
    Ok(rows)
}

fn probe(memory: &Memory) -> Result<()> {
    let x = memory.from_slice(&[1], &[1u32]);
    let read = memory.download::<u32>(x);
    memory.failure()?;
    if read == [1] {
        return Ok(());
    }
    let message = "a number that was copied there came back as another".to_owned();
    Err(Error::Driver { device: memory.device().to_string(), call: "copying", message })
}

/// A line for people.
impl std::fmt::Display for Row {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let ran = if self.on_host { "host" } else { "kernel" };
        let mut line = format!("{} {:?} {}: {ran}", self.op, self.dtype, self.shape);
        match &self.failure {
            Some(failure) => write!(line, ", failed: {failure}")?,
            None => write!(line, ", max error {:.1e}, calc_diff {:.1e}", self.max_error, self.calc_diff)?,
        }
        f.write_str(&line)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cpu_agrees_with_itself_on_every_op() {
        for case in cases(Scale::Small) {
            let row = case.check(Device::Cpu, false);
            assert!(row.is_ok() && row.max_error == 0.0, "{row}");
        }
    }

    #[test]
    fn what_differs_is_seen() {
        assert_eq!(compare(DType::F32, &[1.0, f64::NAN], &[1.0, f64::NAN]), (0.0, 0.0));
        assert_eq!(compare(DType::F32, &[1.0, f64::NAN], &[1.0, 2.0]).0, f64::INFINITY);
        assert_eq!(compare(DType::U32, &[1.0, 3.0], &[1.0, 2.0]).0, f64::INFINITY);
        let (worst, diff) = compare(DType::F32, &[1.0, 2.2], &[1.0, 2.0]);
        assert!((worst - 0.1).abs() < 1e-9 && diff > 1e-4, "{worst} {diff}");
    }
}
