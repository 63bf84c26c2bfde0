//! How much of a layer's communication is hidden behind its computation on one device: what `hadal bench overlap` prints.
//!
//! The computation is that of a DualPipe pair in one mixture-of-experts layer of DeepSeek-V3: F of one microbatch and I and W of another,
//! with the ops of a training step in FP8 (attention with its projections, norms, the rank's experts and the shared one, combine). Left
//! out are the router with its gate and sort, and what belongs to no layer. The communication is a stand-in: copies within the device
//! of the bytes that a token has on its way to four nodes, the most that its group-limited gate allows (DeepSeek-V3 report, section
//! 3.2.2): E4M3 codes and their scales to the experts (dispatch, and the backward pass of combine), bf16 back. A copy reads and writes
//! each byte once at the speed of memory, and waits for no network: what is measured is whether both share the device, and not a link.
//!
//! Order and dependencies are those of DeepSeek's published trace of such a pair (profile-data, `train.json`): while computation does
//! attention F, experts I, experts W, experts F, attention I and W, the other stream does combine of the backward pass, dispatch F, dispatch
//! of the backward pass and combine F. A layer follows another without a gap, as in the steady state of a pipeline.

mod attention;
mod experts;
mod linear;

use std::{num::NonZeroUsize, sync::Arc};

use attention::Attention;
use experts::Experts;
use linear::Room;

use crate::{
    cost::Cost,
    device::{Device, Share, default_comm_sms},
    dtype::DType::{self, U32},
    error::{Error, Result},
    fp8::TILE,
    memory::Memory,
    ops::elementwise,
    ptx::tuning::Table,
    speed::filled as filled_by,
    stream::{Event, Part, Stream},
    tensor::Tensor,
};

/// What to measure.
#[derive(Clone, Debug)]
pub struct Request {
    /// On what.
    pub device: Device,
    /// Layers whose median is taken, after two that are not counted.
    pub runs: usize,
    /// All sizes over this: 1, but for processors and interpreters.
    pub shrink: usize,
    /// Multiprocessors for the copies; without a number, [`default_comm_sms`].
    pub comm_sms: Option<u32>,
    /// Tiles that products are to have.
    pub tuning: Option<Arc<Table>>,
}

/// What was measured, for one layer.
#[derive(Clone, Debug, PartialEq)]
pub struct Overlap {
    /// Multiprocessors of the device, and those of the copies; 0 of processors, and where nothing was set apart.
    pub num_sms: u32,
    /// See there.
    pub comm_sms: u32,
    /// Computation alone on all of the device.
    pub whole_secs: f64,
    /// Computation alone on what the copies leave.
    pub compute_secs: f64,
    /// Copies alone on theirs.
    pub comm_secs: f64,
    /// Both at one time.
    pub both_secs: f64,
    /// Multiplications and additions of the computation.
    pub flops: u64,
    /// Bytes that are copied: read, and written again.
    pub comm_bytes: u64,
    /// Ops that ran on the host, for want of a kernel.
    pub host_ops: u64,
}

/// Share of communication that was hidden in DeepSeek's trace: 108.88 of 113.03 ms over four layers, on an H800 with 20 of 132
/// multiprocessors for communication between 64 ranks.
pub const PUBLISHED_HIDDEN_SHARE: f64 = 108.88 / 113.03;

impl Overlap {
    /// Share of communication that takes no time of its own: 1 if all of it is hidden; below 0 if both together take longer than one
    /// after the other.
    pub fn hidden_share(&self) -> f64 {
        (self.compute_secs + self.comm_secs - self.both_secs) / self.comm_secs.max(1e-12)
    }
}

/// DeepSeek-V3's, as one of 64 ranks with experts has them.
#[derive(Clone, Copy, Debug)]
struct Sizes {
    /// Tokens.
    t: usize,
    /// Model width.
    d: usize,
    /// Experts a token.
    k: usize,
    /// Routed experts of the rank: 256 of 64 ranks.
    experts: usize,
    /// Their width, and the shared expert's.
    width: usize,
    heads: usize,
    /// Numbers of a head: not rotated, rotated, and of a value.
    nope: usize,
    rope: usize,
    value: usize,
    q_latent: usize,
    kv_latent: usize,
    /// Nodes that a token goes to.
    nodes: usize,
}

impl Sizes {
    fn over(shrink: usize) -> Self {
        let size = |n: usize| (n / shrink).max(8).next_multiple_of(8).min(n);
        Sizes {
            t: size(4096),
            d: size(7168),
            k: 8,
            experts: 4,
            width: size(2048),
            heads: (128 / shrink).max(1),
            nope: 128,
            rope: 64,
            value: 128,
            q_latent: size(1536),
            kv_latent: size(512),
            nodes: 4,
        }
    }

    /// Bytes of a microbatch's tokens on their way: in 8 bits with scales, and in bf16.
    fn dispatch_bytes(&self) -> usize {
        self.t * self.nodes * (self.d + 4 * self.d.div_ceil(TILE))
    }

    fn combine_bytes(&self) -> usize {
        self.t * self.nodes * 2 * self.d
    }
}

/// Numbers as measurements of ops have them; none where tensors have no bytes.
fn filled(memory: &Memory, dtype: DType, dims: &[usize]) -> Tensor {
    if memory.device() == Device::Meta { memory.alloc(dtype, dims) } else { filled_by(memory, dtype, dims) }
}

/// Communication: from one buffer to another.
#[derive(Clone, Copy)]
struct Transfer {
    from: Tensor,
    to: Tensor,
}

impl Transfer {
    fn new(memory: &Memory, bytes: usize) -> Self {
        let [from, to] = [(); 2].map(|()| memory.alloc(U32, &[bytes / 4]));
        Transfer { from, to }
    }

    fn launch(self, s: &mut Stream) -> Result<()> {
        elementwise::copy(s, self.from, self.to)
    }
}

/// A layer of two microbatches.
struct Pair {
    attention: Attention,
    experts: Experts,
    /// What comes into F and I, between attention and experts, and out.
    x: [Tensor; 3],
    dy: [Tensor; 3],
    dispatch: Transfer,
    combine: Transfer,
    /// The same for the gradients: the backward pass of combine sends in 8 bits, that of dispatch in bf16.
    combine_grad: Transfer,
    dispatch_grad: Transfer,
}

impl Pair {
    fn new(memory: &Memory, z: &Sizes) -> Self {
        let (n, most_rows) = (z.t * z.k, (z.t * z.k).max(z.heads * (z.nope + z.value)).max(2 * z.d));
        let most = [n * z.d, n * 2 * z.width, z.t * z.heads * (z.nope + z.value)].into_iter().max().unwrap_or(0);
        // Columns of experts begin at multiples of a tile.
        let most = most + z.experts * TILE * z.d.max(2 * z.width);
        let room = Room::new(memory, most, most_rows + z.experts * TILE);
        let rows = |(): ()| filled(memory, DType::Bf16, &[z.t, z.d]);
        Pair {
            attention: Attention::new(memory, z, room),
            experts: Experts::new(memory, z, room),
            x: [(); 3].map(rows),
            dy: [(); 3].map(rows),
            dispatch: Transfer::new(memory, z.dispatch_bytes()),
            combine: Transfer::new(memory, z.combine_bytes()),
            combine_grad: Transfer::new(memory, z.dispatch_bytes()),
            dispatch_grad: Transfer::new(memory, z.combine_bytes()),
        }
    }

    fn transfers(&self) -> [Transfer; 4] {
        [self.combine_grad, self.dispatch, self.dispatch_grad, self.combine]
    }

    /// F of attention, from the sum of the experts' outputs of the layer before.
    fn attention_forward(&self, s: &mut Stream) -> Result<()> {
        self.experts.combine(s, self.x[0])?;
        self.attention.forward(s, self.x[0], self.x[1])
    }

    fn experts_input_grad(&self, s: &mut Stream) -> Result<()> {
        self.experts.input_grad(s, self.dy[0])
    }

    fn experts_weight_grad(&self, s: &mut Stream) -> Result<()> {
        self.experts.weight_grad(s, self.dy[0])
    }

    fn experts_forward(&self, s: &mut Stream) -> Result<()> {
        self.experts.forward(s, self.x[1], self.x[2])
    }

    /// I of attention, and what the layer above, whose backward pass is next, sends first.
    fn attention_input_grad(&self, s: &mut Stream) -> Result<()> {
        self.experts.dispatch_grad(s)?;
        self.attention.input_grad(s, self.x[1], self.dy[1], self.dy[2])?;
        self.experts.combine_grad(s, self.dy[0])
    }

    fn attention_weight_grad(&self, s: &mut Stream) -> Result<()> {
        self.attention.weight_grad(s, self.dy[1])
    }

    fn compute(&self, s: &mut Stream) -> Result<()> {
        self.attention_forward(s)?;
        self.experts_input_grad(s)?;
        self.experts_weight_grad(s)?;
        self.experts_forward(s)?;
        self.attention_input_grad(s)?;
        self.attention_weight_grad(s)
    }

    fn communicate(&self, s: &mut Stream) -> Result<()> {
        self.transfers().into_iter().try_for_each(|transfer| transfer.launch(s))
    }

    /// Both, each waiting for what it needs; `before` are the layer's before: gradients of attention there, and combine.
    fn overlapped(
        &self,
        compute: &mut Stream,
        comm: &mut Stream,
        before: Option<(Event, Event)>,
    ) -> Result<(Event, Event)> {
        let transfer = |comm: &mut Stream, after: &Event, transfer: Transfer| {
            comm.wait(after);
            transfer.launch(comm).map(|()| comm.record())
        };
        let (attention_grads, combined) = before.unwrap_or_else(|| (compute.record(), comm.record()));
        let combine_grad = transfer(comm, &attention_grads, self.combine_grad)?;
        compute.wait(&combined);
        self.attention_forward(compute)?;
        let dispatch = transfer(comm, &compute.record(), self.dispatch)?;
        compute.wait(&combine_grad);
        self.experts_input_grad(compute)?;
        let dispatch_grad = transfer(comm, &compute.record(), self.dispatch_grad)?;
        self.experts_weight_grad(compute)?;
        compute.wait(&dispatch);
        self.experts_forward(compute)?;
        let combined = transfer(comm, &compute.record(), self.combine)?;
        compute.wait(&dispatch_grad);
        self.attention_input_grad(compute)?;
        let attention_grads = compute.record();
        self.attention_weight_grad(compute)?;
        Ok((attention_grads, combined))
    }
}

/// Median seconds from one layer's end to the next's; of so many layers after two.
fn median(s: &mut Stream, runs: usize, mut layer: impl FnMut(&mut Stream) -> Result<()>) -> Result<f64> {
    let mut ends = vec![];
    for _ in 0..runs + 2 {
        layer(s)?;
        ends.push(s.record());
    }
    s.synchronize()?;
    let ends: Vec<u64> = ends.iter().map(Event::synchronize).collect();
    let mut nanos: Vec<u64> =
        ends.array_windows::<2>().skip(1).map(|[start, end]| end.saturating_sub(*start)).collect();
    nanos.sort_unstable();
    Ok(nanos.get(nanos.len() / 2).copied().unwrap_or(0) as f64 * 1e-9)
}

/// Measures. On processors, threads stand for streams: nothing is set apart for the copies.
///
/// # Errors
/// The device's; [`Error::Device`] if the copies would have all of its multiprocessors, or the tuning table is another device's.
pub fn run(request: &Request) -> Result<Overlap> {
    let memory = Memory::open(request.device)?;
    let num_sms = memory.gpu().map_or(0, |gpu| gpu.target().num_sms);
    let comm_sms = if num_sms == 0 { 0 } else { request.comm_sms.unwrap_or_else(|| default_comm_sms(num_sms)) };
    if num_sms > 0 && comm_sms >= num_sms {
        return Err(Error::Device {
            device: request.device.to_string(),
            expected: format!("fewer multiprocessors for communication than its {num_sms}"),
            found: comm_sms.to_string(),
            advice: format!("use `--comm-sms {}`, or leave it out", default_comm_sms(num_sms)),
        });
    }
    let (rest, own) = Share::split(comm_sms);
    let sizes = Sizes::over(request.shrink);
    let pair = Pair::new(&memory, &sizes);
    memory.failure()?;
    let hazards = Arc::default();
    let stream = |name: &str, share, num_threads| {
        let mut stream = Stream::with_part(name, &memory, &hazards, Part { num_threads, share })?;
        request.tuning.as_ref().map_or(Ok(()), |table| stream.set_tuning(table))?;
        Ok::<_, Error>(stream)
    };
    let mut whole = stream("whole", Share::All, None)?;
    let (mut compute, mut comm) = (stream("compute", rest, None)?, stream("comm", own, NonZeroUsize::new(1))?);
    let cost = |s: &mut Stream, run: &dyn Fn(&mut Stream) -> Result<()>| -> Result<Cost> {
        s.start_recording();
        let ran = run(s);
        let recording = s.finish_recording();
        ran.map(|()| recording.cost)
    };
    let (work, moved) = (cost(&mut compute, &|s| pair.compute(s))?, cost(&mut comm, &|s| pair.communicate(s))?);
    let runs = request.runs;
    let whole_secs = median(&mut whole, runs, |s| pair.compute(s))?;
    compute.wait(&whole.record());
    let compute_secs = median(&mut compute, runs, |s| pair.compute(s))?;
    let comm_secs = median(&mut comm, runs, |s| pair.communicate(s))?;
    let mut before = None;
    let both_secs = median(&mut compute, runs, |s| {
        before = Some(pair.overlapped(s, &mut comm, before.take())?);
        Ok(())
    })?;
    comm.synchronize()?;
    let host_ops = memory.gpu().map_or(0, |gpu| gpu.host_ops().values().sum());
    let (flops, comm_bytes) = (work.flops(), moved.written_bytes);
    Ok(Overlap { num_sms, comm_sms, whole_secs, compute_secs, comm_secs, both_secs, flops, comm_bytes, host_ops })
}

#[cfg(test)]
mod tests;
