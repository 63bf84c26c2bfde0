//! A kernel's test in one expression: inputs, the CPU op, the launches, and how near they must be. Every buffer is compared,
//! also those that must not change, and the launches give the same bits under each seed of the interpreter.

#![expect(clippy::unwrap_used, reason = "tests")]

use half::bf16;

use super::{Launch, testing};
use crate::{
    device::Device,
    dtype::DType,
    error::Result,
    memory::Memory,
    ops::testing::{random, stream},
    stream::Stream,
    tensor::Tensor,
};

const SEEDS: [u64; 2] = [1, 2];

/// What a tensor is made from: type, extents, values.
#[derive(Clone, Debug)]
pub(crate) struct Data(pub DType, pub Vec<usize>, pub Vec<f64>);

impl Data {
    /// Values in (-1, 1).
    pub fn random(dtype: DType, dims: &[usize], seed: u64) -> Self {
        Data(dtype, dims.to_vec(), random(dims.iter().product(), seed))
    }

    /// What an output holds before it is assigned: NaN, or a number that is none.
    pub fn poison(dtype: DType, dims: &[usize]) -> Self {
        let poison = match dtype {
            DType::U32 => f64::from(0xdead_beefu32),
            DType::U8 => f64::from(0xa5u8),
            _ => f64::NAN,
        };
        Data(dtype, dims.to_vec(), vec![poison; dims.iter().product()])
    }

    /// Numbers of u32.
    pub fn u32(dims: &[usize], values: &[u32]) -> Self {
        Data(DType::U32, dims.to_vec(), values.iter().map(|&x| f64::from(x)).collect())
    }

    /// The same with each value changed.
    pub fn map(mut self, f: impl Fn(f64) -> f64) -> Self {
        self.2.iter_mut().for_each(|x| *x = f(*x));
        self
    }

    /// As a tensor, rounded to its type.
    pub fn upload(&self, memory: &Memory) -> Tensor {
        let (dims, x) = (&self.1, self.2.iter());
        match self.0 {
            DType::F64 => memory.from_slice(dims, &self.2),
            DType::F32 => memory.from_slice(dims, &x.map(|x| *x as f32).collect::<Vec<_>>()),
            DType::Bf16 => memory.from_slice(dims, &x.map(|x| bf16::from_f64(*x)).collect::<Vec<_>>()),
            DType::U32 => memory.from_slice(dims, &x.map(|x| *x as u32).collect::<Vec<_>>()),
            DType::U8 => memory.from_slice(dims, &x.map(|x| *x as u8).collect::<Vec<_>>()),
        }
    }
}

/// A tensor's elements, exactly.
pub(crate) fn values(memory: &Memory, t: Tensor) -> Vec<f64> {
    match t.dtype {
        DType::F64 => memory.download::<f64>(t),
        DType::F32 => memory.download::<f32>(t).into_iter().map(f64::from).collect(),
        DType::Bf16 => memory.download::<bf16>(t).into_iter().map(f64::from).collect(),
        DType::U32 => memory.download::<u32>(t).into_iter().map(f64::from).collect(),
        DType::U8 => memory.download::<u8>(t).into_iter().map(f64::from).collect(),
    }
}

/// Takes line number `place` of those that hold `needle` out of the texts; `None` if they are fewer.
fn drop_line(launches: &mut [Launch], needle: &str, mut place: usize) -> Option<String> {
    for launch in launches {
        let text = (launch.kernel.emit)();
        let found: Vec<usize> = text.lines().enumerate().filter(|(_, l)| l.contains(needle)).map(|(i, _)| i).collect();
        if let Some(&at) = found.get(place) {
            let kept: String =
                text.lines().enumerate().filter(|(i, _)| *i != at).map(|(_, l)| format!("{l}\n")).collect();
            launch.kernel.emit = Box::new(move || kept.clone());
            return Some(format!("line {} of {}", at + 1, launch.kernel.name));
        }
        place -= found.len();
    }
    None
}

/// Inputs, and what was computed from them.
pub(crate) struct Case {
    inputs: Vec<Data>,
    pub want: Vec<Vec<f64>>,
    pub got: Vec<Vec<f64>>,
}

impl Case {
    /// Tensors of both sides.
    pub fn new(inputs: &[Data]) -> Self {
        Case { inputs: inputs.to_vec(), want: vec![], got: vec![] }
    }

    fn upload(&self, memory: &Memory) -> Vec<Tensor> {
        self.inputs.iter().map(|x| x.upload(memory)).collect()
    }

    /// What is right, by the CPU op.
    pub fn cpu(mut self, op: impl FnOnce(&mut Stream, &[Tensor]) -> Result<()>) -> Self {
        let mut s = stream();
        let memory = s.memory().clone();
        let tensors = self.upload(&memory);
        op(&mut s, &tensors).unwrap();
        s.synchronize().unwrap();
        self.want = tensors.into_iter().map(|t| values(&memory, t)).collect();
        self
    }

    /// What is right, by other means: all tensors from all inputs.
    pub fn want(mut self, f: impl FnOnce(&[Vec<f64>]) -> Vec<Vec<f64>>) -> Self {
        let inputs: Vec<Vec<f64>> = self.inputs.iter().map(|x| x.2.clone()).collect();
        self.want = f(&inputs);
        self
    }

    /// What the launches make of it.
    pub fn ptx(self, launches: impl Fn(&[Tensor]) -> Vec<Launch>) -> Self {
        self.ptx_with(|_, t| launches(t))
    }

    /// The same, where the launches need more tensors of that memory.
    pub fn ptx_with(mut self, launches: impl Fn(&Memory, &[Tensor]) -> Vec<Launch>) -> Self {
        for seed in SEEDS {
            // Approximate functions are anything within their bounds, by seed.
            let mut approximate = false;
            let got = self.run(seed, |memory, t| {
                let launches = launches(memory, t);
                approximate = launches.iter().any(|launch| (launch.kernel.emit)().contains(".approx"));
                launches
            });
            let got = got.unwrap();
            let same = |a: &Vec<f64>, b: &Vec<f64>| a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits());
            assert!(
                approximate || self.got.is_empty() || self.got.iter().zip(&got).all(|(a, b)| same(a, b)),
                "runs differ"
            );
            self.got = got;
        }
        self
    }

    /// All tensors after the launches, which may put more tensors into the memory; `Err` if a launch fails.
    pub fn run(
        &self,
        seed: u64,
        launches: impl FnOnce(&Memory, &[Tensor]) -> Vec<Launch>,
    ) -> std::result::Result<Vec<Vec<f64>>, String> {
        let memory = Memory::new(Device::Cpu);
        let tensors = self.upload(&memory);
        let launches = launches(&memory, &tensors);
        testing::run(&memory, seed, &launches)?;
        Ok(tensors.into_iter().map(|t| values(&memory, t)).collect())
    }

    /// The launches find wrong what the CPU op does, and say it with the same words.
    pub fn same_error(
        &self,
        op: impl FnOnce(&mut Stream, &[Tensor]) -> Result<()>,
        launches: impl FnOnce(&Memory, &[Tensor]) -> Vec<Launch>,
    ) {
        let mut s = stream();
        let tensors = self.upload(&s.memory().clone());
        op(&mut s, &tensors).unwrap();
        let want = s.synchronize().unwrap_err().to_string();
        assert_eq!(self.run(1, launches), Err(want));
    }

    /// Drops each line of the launches' texts that holds `needle`, one at a time: each time, in one of 8 runs, the interpreter must
    /// refuse, or the result must be another than under the same seed without the loss.
    pub fn mutants(&self, needle: &str, launches: impl Fn(&[Tensor]) -> Vec<Launch>) {
        let whole: Vec<_> = (1..=8).map(|seed| self.run(seed, |_, t| launches(t)).unwrap()).collect();
        let same = |a: &[Vec<f64>], b: &[Vec<f64>]| {
            a.iter().flatten().zip(b.iter().flatten()).all(|(a, b)| a.to_bits() == b.to_bits())
        };
        for place in 0.. {
            let mut dropped = None;
            let missed = (1..=8).zip(&whole).all(|(seed, whole)| {
                let result = self.run(seed, |_, t| {
                    let mut launches = launches(t);
                    dropped = drop_line(&mut launches, needle, place);
                    launches
                });
                dropped.is_some() && result.is_ok_and(|got| same(&got, whole))
            });
            match dropped {
                Some(dropped) => assert!(!missed, "not missed: {dropped}"),
                None => return assert!(place > 0, "no line holds {needle}"),
            }
        }
    }

    /// Bit by bit, but for the sign of a zero and what kind of NaN it is.
    pub fn equal(self) {
        self.check(|dtype, got, want| got == want || got.is_nan() && want.is_nan() && dtype.is_float());
    }

    /// Within `tolerance`, absolutely for values below 1, else relatively; neighbouring bf16 are near enough.
    pub fn close(self, tolerance: f64) {
        self.check(|dtype, got, want| {
            let neighbours = || {
                let order = |x: f64| {
                    let bits = bf16::from_f64(x).to_bits() as i16;
                    i32::from(if bits < 0 { i16::MIN.wrapping_sub(bits) } else { bits })
                };
                dtype == DType::Bf16 && (order(got) - order(want)).abs() <= 1
            };
            got == want
                || got.is_nan() && want.is_nan()
                || (got - want).abs() <= tolerance * want.abs().max(1.0)
                || neighbours() && !got.is_nan() && !want.is_nan()
        });
    }

    fn check(&self, near: impl Fn(DType, f64, f64) -> bool) {
        assert!(self.want.len() == self.got.len() && !self.got.is_empty(), "both sides have run");
        for (n, (got, want)) in self.got.iter().zip(&self.want).enumerate() {
            let Data(dtype, dims, _) = &self.inputs[n];
            for (i, (&got, &want)) in got.iter().zip(want).enumerate() {
                assert!(
                    near(*dtype, got, want),
                    "tensor {n} {dtype:?} {dims:?}, element {i}: expected {want}, found {got}"
                );
            }
        }
    }
}
