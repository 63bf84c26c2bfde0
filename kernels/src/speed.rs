//! How fast a device runs ops: at the shapes of DeepSeek-V3 (those that DeepGEMM is measured at, among them), beside what the same device
//! reaches at all. It is what `hadal bench kernels` prints.
//!
//! An op's time is from one event to the next on its stream, the median of some runs; between them the last level of cache is written
//! over, as weights that come from memory once a step would find it. Operations and bytes are what the op's cost says.

mod fp8;
mod products;
mod quantize;
mod tune;

pub use tune::tune;

use std::sync::Arc;

use half::bf16;
use rand::{RngExt as _, SeedableRng};

use crate::{
    cost::Cost,
    device::{Device, Share},
    dtype::DType::{self, Bf16, F32, F64, U8, U32},
    error::Result,
    fp8::encode_e4m3,
    memory::Memory,
    ops::{adamw, attention, cross_entropy, elementwise, permute, rms_norm, swiglu},
    ptx::tuning::{Product, Row, Table},
    stream::Stream,
    tensor::Tensor,
};

/// Bytes that are written between runs: more than any cache.
const FLUSH_BYTES: usize = 512 << 20;

/// How an op did.
#[derive(Clone, Debug)]
pub struct Speed {
    /// The op.
    pub op: &'static str,
    /// Its type.
    pub dtype: DType,
    /// Its sizes.
    pub shape: String,
    /// Whether the op ran on the host, for want of a kernel.
    pub on_host: bool,
    /// Median.
    pub secs: f64,
    /// Multiplications and additions.
    pub flops: u64,
    /// Read and written, each byte once.
    pub bytes: u64,
    /// Operations per second that DeepGEMM publishes for an H800 at this shape.
    pub published_flops_per_sec: Option<f64>,
}

impl Speed {
    /// Operations per second.
    pub fn flops_per_sec(&self) -> f64 {
        self.flops as f64 / self.secs.max(1e-12)
    }

    /// Bytes per second.
    pub fn bytes_per_sec(&self) -> f64 {
        self.bytes as f64 / self.secs.max(1e-12)
    }
}

/// What a launch costs the host.
#[derive(Clone, Debug)]
pub struct LaunchCost {
    /// Seconds of whoever launches an op on a stream: checks, the kernel's arguments, and handing it over.
    pub enqueue_secs: f64,
    /// Seconds of the stream's thread for one kernel, arguments resolved; on processors, which have none, the same as above.
    pub host_secs: f64,
    /// Seconds for one of a graph of many; or why there is no such.
    pub in_graph: std::result::Result<f64, String>,
}

/// Measures what a launch costs the host: many small kernels, alone and as one graph.
///
/// # Errors
/// The device's.
pub fn launch_cost(device: Device) -> Result<LaunchCost> {
    const LAUNCHES: usize = 512;
    let memory = Memory::open(device)?;
    let mut stream = Stream::new("bench", &memory, &Arc::default())?;
    let x = memory.from_slice(&[32], &[1f32; 32]);
    let begin = crate::clock::now_nanos();
    (0..LAUNCHES).for_each(|_| elementwise::zero(&mut stream, x));
    let enqueue_secs = (crate::clock::now_nanos() - begin) as f64 * 1e-9 / LAUNCHES as f64;
    stream.synchronize()?;
    let Some(gpu) = memory.gpu() else {
        let in_graph = Err("processors have none".to_owned());
        return Ok(LaunchCost { enqueue_secs, host_secs: enqueue_secs, in_graph });
    };
    let mut lane = crate::cuda::Lane::new(gpu, "bench", Share::All)?;
    let launches: Vec<_> = (0..LAUNCHES).flat_map(|_| crate::ptx::elementwise::zero(x)).collect();
    let task = Arc::from("bench");
    lane.launch(&memory, &task, &launches)?;
    lane.synchronize()?;
    let mut best = [f64::INFINITY; 2];
    let graph = lane.capture(&memory, &[crate::ptx::Item::Launch(&task, &launches)]);
    for _ in 0..5 {
        let begin = crate::clock::now_nanos();
        lane.launch(&memory, &task, &launches)?;
        best[0] = best[0].min((crate::clock::now_nanos() - begin) as f64);
        lane.synchronize()?;
        if let Ok(graph) = &graph {
            let begin = crate::clock::now_nanos();
            lane.replay(graph)?;
            best[1] = best[1].min((crate::clock::now_nanos() - begin) as f64);
            lane.synchronize()?;
        }
    }
    let [host_secs, in_graph] = best.map(|nanos| nanos * 1e-9 / launches.len() as f64);
    Ok(LaunchCost { enqueue_secs, host_secs, in_graph: graph.map(|_| in_graph).map_err(|e| e.to_string()) })
}

/// What to measure.
#[derive(Clone, Debug)]
pub struct Request {
    /// On what.
    pub device: Device,
    /// Runs whose median is taken, after two that are not counted.
    pub runs: usize,
    /// All sizes over this, and no cache written over: 1, but for a device that is an interpreter.
    pub shrink: usize,
    /// Tiles that products are to have.
    pub tuning: Option<Arc<Table>>,
}

struct Bench<'a> {
    request: Request,
    found: Found<'a>,
}

/// What is measured, and who is told of each as soon as it is there.
enum Found<'a> {
    /// Ops.
    Speeds(Vec<Speed>, &'a mut dyn FnMut(&Speed)),
    /// The tiles of products.
    Tiles(Vec<Row>, &'a mut dyn FnMut(&Row)),
}

/// A tensor: type, extents, and its numbers, if these matter.
type Given = (DType, Vec<usize>, Option<Vec<u32>>);

type Run<'a> = &'a dyn Fn(&mut Stream, &[Tensor]) -> Result<()>;

/// The product that an op is.
type ProductOf<'a> = &'a dyn Fn(&[Tensor]) -> Product;

/// Measures each op; `tell` sees each when it is there. The copy is first, and the products follow: they are the device's ceilings.
///
/// # Errors
/// The device's.
pub fn run(request: Request, mut tell: impl FnMut(&Speed)) -> Result<Vec<Speed>> {
    let mut bench = Bench { request, found: Found::Speeds(Vec::new(), &mut tell) };
    bench.moves()?;
    bench.all_products()?;
    bench.quantizers()?;
    bench.others()?;
    match bench.found {
        Found::Speeds(all, _) => Ok(all),
        Found::Tiles(..) => Ok(Vec::new()),
    }
}

/// (N, K) of DeepGEMM's tests.
const PRODUCTS: [(usize, usize); 7] =
    [(2112, 7168), (576, 7168), (24576, 1536), (32768, 512), (7168, 16384), (4096, 7168), (7168, 2048)];

impl Bench<'_> {
    fn all_products(&mut self) -> Result<()> {
        self.products()?;
        self.experts()?;
        self.fp8_products()?;
        self.fp8_experts()
    }

    /// A size of a layer, as this request has it.
    fn size(&self, n: usize) -> usize {
        (n / self.request.shrink).max(8).next_multiple_of(8).min(n)
    }

    fn measure(
        &mut self,
        (op, dtype): (&'static str, DType),
        shape: String,
        tensors: &[(DType, Vec<usize>)],
        run: Run<'_>,
    ) -> Result<()> {
        let fills = tensors.iter().map(|(dtype, dims)| (*dtype, dims.clone(), None)).collect::<Vec<_>>();
        self.measure_on((op, dtype), shape, &fills, run)
    }

    /// The same, some of whose tensors are given as numbers.
    fn measure_on(
        &mut self,
        (op, dtype): (&'static str, DType),
        shape: String,
        tensors: &[Given],
        run: Run<'_>,
    ) -> Result<()> {
        self.measure_beside((op, dtype), shape, tensors, None, run)
    }

    /// The same for a product, of which the tiles may be asked for, and beside what is published of another.
    fn measure_product(
        &mut self,
        name: (&'static str, DType),
        shape: String,
        tensors: &[Given],
        published_flops_per_sec: Option<f64>,
        product: ProductOf<'_>,
        run: Run<'_>,
    ) -> Result<()> {
        match self.found {
            Found::Speeds(..) => self.measure_beside(name, shape, tensors, published_flops_per_sec, run),
            Found::Tiles(..) => self.measure_tiles(tensors, product),
        }
    }

    fn measure_beside(
        &mut self,
        (op, dtype): (&'static str, DType),
        shape: String,
        tensors: &[Given],
        published_flops_per_sec: Option<f64>,
        run: Run<'_>,
    ) -> Result<()> {
        let Found::Speeds(all, tell) = &mut self.found else { return Ok(()) };
        let Setting { memory, tensors, flush } = Setting::new(&self.request, tensors)?;
        let mut stream = Stream::new("bench", &memory, &Arc::default())?;
        if let Some(table) = &self.request.tuning {
            stream.set_tuning(table)?;
        }
        let cost = recorded(&mut stream, &tensors, run)?;
        let on_host = || memory.gpu().map_or(0, |gpu| gpu.host_ops().values().sum::<u64>());
        let before = on_host();
        let secs = median(&mut stream, self.request.runs, flush, &mut |s| run(s, &tensors))?;
        let bytes = cost.read_bytes + cost.written_bytes;
        let (on_host, flops) = (on_host() > before, cost.flops());
        let speed = Speed { op, dtype, shape, on_host, secs, flops, bytes, published_flops_per_sec };
        tell(&speed);
        all.push(speed);
        Ok(())
    }

    fn moves(&mut self) -> Result<()> {
        for mib in [64, 1024] {
            let n = self.size(mib << 18);
            let dims = vec![n];
            let tensors = [(F32, dims.clone()), (F32, dims)];
            self.measure(("elementwise::copy", F32), format!("[{n}]"), &tensors, &|s, x| {
                elementwise::copy(s, x[0], x[1])
            })?;
        }
        Ok(())
    }

    fn others(&mut self) -> Result<()> {
        let [t, d, f, v] = [4096, 7168, 2048, 129_280].map(|size| self.size(size));
        let tensors = [(Bf16, vec![t, d]), (Bf16, vec![d]), (Bf16, vec![t, d]), (Bf16, vec![t])];
        self.measure(("rms_norm::forward", Bf16), format!("[{t}, {d}]"), &tensors, &|s, x| {
            rms_norm::forward(s, x[0], x[1], x[2], x[3], 1e-6)
        })?;
        let rows = (Bf16, vec![t, d]);
        let tensors = [rows.clone(), (Bf16, vec![d]), (Bf16, vec![t]), rows.clone(), rows.clone(), rows];
        self.measure(("rms_norm::input_grad", Bf16), format!("[{t}, {d}] onto another"), &tensors, &|s, x| {
            rms_norm::input_grad(s, x[0], x[1], x[2], x[3], Some(x[4]), x[5])
        })?;
        let tensors = [(Bf16, vec![t, 2 * f]), (Bf16, vec![t, f])];
        self.measure(("swiglu::forward", Bf16), format!("[{t}, {f}]"), &tensors, &|s, x| {
            swiglu::forward(s, x[0], x[1])
        })?;
        let (k, e) = (8, 256);
        let chosen: Vec<u32> = (0..t).flat_map(|i| (0..k).map(move |j| ((i * 37 + j * 31) % e) as u32)).collect();
        let m = |dtype, dims: &[usize]| (dtype, dims.to_vec(), None);
        let n = t * k;
        let tensors = [
            (U32, vec![t, k], Some(chosen)),
            m(U32, &[e + 1]),
            m(U32, &[n]),
            m(U32, &[n]),
            m(Bf16, &[t, d]),
            m(Bf16, &[n, d]),
            m(F32, &[t, k]),
            m(Bf16, &[t, d]),
        ];
        let order = |x: &[Tensor]| permute::Order { offsets: x[1], row_of_slot: x[2], token_of_row: x[3] };
        let shape = || format!("[{t}, {k}, {d}] of {e} experts");
        self.measure_on(("permute::sort and permute", Bf16), shape(), &tensors, &|s, x| {
            permute::sort(s, x[0], order(x))?;
            permute::permute(s, x[4], order(x), x[5])
        })?;
        self.measure_on(("permute::sort and combine", Bf16), shape() + " onto another", &tensors, &|s, x| {
            permute::sort(s, x[0], order(x))?;
            permute::combine(s, x[5], x[6], order(x), Some(x[4]), x[7])
        })?;
        let targets: Vec<u32> = (0..t).map(|i| (i * 31 % v) as u32).collect();
        let tensors = [
            m(Bf16, &[t, d]),
            m(Bf16, &[v, d]),
            (U32, vec![t], Some(targets)),
            m(F32, &[t]),
            m(Bf16, &[t, d]),
            m(Bf16, &[v, d]),
        ];
        self.measure_on(("cross_entropy::run", Bf16), format!("[{t}, {d}] x [{v}, {d}]"), &tensors, &|s, x| {
            let passes = cross_entropy::Passes { nll: Some(x[3]), dh: Some(x[4]), dw: Some(x[5]) };
            cross_entropy::run(s, x[0], x[1], x[2], 1e-3, passes)
        })?;
        let n = self.size(64 << 20);
        let [p, grad, first, second] = [F32; 4].map(|dtype| m(dtype, &[n]));
        let tensors = [p, grad, first, second, m(F64, &[1]), m(Bf16, &[n])];
        let hyper = adamw::AdamW {
            lr: 1e-3,
            beta1: 0.9,
            beta2: 0.95,
            eps: 1e-8,
            weight_decay: 0.1,
            step: 3,
            max_grad_norm: 1.0,
        };
        self.measure_on(("adamw::update", F32), format!("[{n}]"), &tensors, &|s, x| {
            let slots = adamw::Slots { master: x[0], grad: x[1], m: x[2], v: x[3], weight: Some(x[5]) };
            adamw::update(s, hyper, slots, x[4])
        })?;
        let (h, w, u) = (16, 192, 128);
        let documents = vec![0, t as u32];
        let tensors = [
            m(Bf16, &[t, h, w]),
            m(Bf16, &[t, h, w]),
            m(Bf16, &[t, h, u]),
            (U32, vec![2], Some(documents)),
            m(Bf16, &[t, h, u]),
            m(F32, &[t, h]),
        ];
        self.measure_on(
            ("attention::forward", Bf16),
            format!("{t} tokens, {h} heads of {w} and {u}"),
            &tensors,
            &|s, x| {
                s.account(attention::cost(t, attention::causal_pairs(t as u64), [h, h, w, u], 2));
                let inputs = attention::Inputs { q: x[0], k: x[1], v: x[2], doc_offsets: x[3], scale: 0.07 };
                attention::forward(s, inputs, x[4], x[5])
            },
        )
    }
}

/// Where something is measured.
struct Setting {
    memory: Memory,
    tensors: Vec<Tensor>,
    /// What is written over between runs.
    flush: Option<Tensor>,
}

impl Setting {
    fn new(request: &Request, tensors: &[Given]) -> Result<Self> {
        let memory = Memory::open(request.device)?;
        let tensors = tensors
            .iter()
            .map(|(dtype, dims, numbers)| match numbers {
                Some(numbers) => memory.from_slice(dims, numbers),
                None => filled(&memory, *dtype, dims),
            })
            .collect();
        let flush = (request.shrink == 1).then(|| memory.alloc(F32, &[FLUSH_BYTES / 4]));
        memory.failure()?;
        Ok(Setting { memory, tensors, flush })
    }
}

/// Seconds between the events around what `run` launches: the median of so many runs, after two.
fn median(
    stream: &mut Stream,
    runs: usize,
    flush: Option<Tensor>,
    run: &mut dyn FnMut(&mut Stream) -> Result<()>,
) -> Result<f64> {
    let mut nanos = Vec::new();
    for i in 0..runs + 2 {
        if let Some(flush) = flush {
            elementwise::zero(stream, flush);
        }
        let start = stream.record();
        run(stream)?;
        let end = stream.record();
        stream.synchronize()?;
        if i >= 2 {
            nanos.push(end.synchronize().saturating_sub(start.synchronize()));
        }
    }
    nanos.sort_unstable();
    Ok(nanos[nanos.len() / 2] as f64 * 1e-9)
}

/// Rows of `e` experts, each 0.7 to 1.3 of `rows`.
fn offsets(e: usize, rows: usize) -> Vec<u32> {
    let mut offsets = vec![0];
    for i in 0..e {
        offsets.push(offsets[i] + (rows * (7 + i * 5 % 7) / 10) as u32);
    }
    offsets
}

fn recorded(stream: &mut Stream, tensors: &[Tensor], run: Run<'_>) -> Result<Cost> {
    stream.start_recording();
    let ran = run(stream, tensors);
    let recording = stream.finish_recording();
    ran.map(|()| recording.cost)
}

/// Values in (-1, 1), over and over: products of zeros take less power, and are faster.
pub(crate) fn filled(memory: &Memory, dtype: DType, dims: &[usize]) -> Tensor {
    let mut random = rand_chacha::ChaCha8Rng::seed_from_u64(1);
    let some: Vec<f32> = (0..65_521).map(|_| random.random_range(-1.0..1.0)).collect();
    let values = some.iter().copied().cycle().take(dims.iter().product());
    match dtype {
        Bf16 => memory.from_slice(dims, &values.map(bf16::from_f32).collect::<Vec<_>>()),
        F32 => memory.from_slice(dims, &values.collect::<Vec<_>>()),
        F64 => memory.from_slice(dims, &values.map(|x| f64::from(x).abs()).collect::<Vec<_>>()),
        U32 => memory.from_slice(dims, &vec![0u32; dims.iter().product()]),
        U8 => memory.from_slice(dims, &values.map(encode_e4m3).collect::<Vec<_>>()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn experts_have_about_their_rows() {
        assert_eq!(offsets(4, 10), [0, 7, 19, 29, 37]);
    }
}
