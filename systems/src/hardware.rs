//! `bench hardware`: what this machine's processors do, as a description of hardware that plans can be made for.
//!
//! What is measured is what the cost model asks for, with the ops that runs use. What cannot be measured (prices, watts,
//! other nodes) is left out, and a plan that needs it says so.

use std::sync::{Arc, mpsc};

use bytemuck::Pod;
use engine::{
    calibrate::Corrections,
    hardware::{DeviceSpec, Link, PerFormat, Sourced},
};
use kernels::{
    clock::now_nanos,
    device::Device,
    dtype::{DType, Float},
    memory::Memory,
    ops::{
        attention::{self, Grads, Inputs},
        gemm::{Mat, Threads, gemm},
    },
    stream::Stream,
};
use rayon::prelude::*;

use crate::session::SessionError;

/// Measurements of each thing; the best is the peak, the median what is reached.
const NUM_RUNS: usize = 9;

/// What to measure on, and what only the caller knows.
#[derive(Clone, Debug)]
pub struct HardwareRequest {
    /// What the description is called.
    pub name: String,
    /// Threads that a rank has; `None` for as many as there are.
    pub num_threads: Option<usize>,
    /// Hardware threads of the machine.
    pub num_machine_threads: usize,
    /// Memory of the machine.
    pub memory_bytes: u64,
    /// Source of what is measured: who, on what, when.
    pub measured_by: String,
}

/// Measures this machine.
///
/// # Errors
/// If threads cannot be had, or an op fails.
pub fn measure(request: &HardwareRequest) -> Result<DeviceSpec, SessionError> {
    if let Some(num_threads) = request.num_threads {
        let pool = rayon::ThreadPoolBuilder::new().num_threads(num_threads).thread_name(|i| format!("ops {i}"));
        pool.build_global().map_err(SessionError::runtime)?;
    }
    let num_threads = rayon::current_num_threads();
    let by = &request.measured_by;
    // Four digits are more than a second measurement would agree on.
    let given = |value: f64, what: &str| Sourced::new(four_digits(value), format!("{by}: {what}"));
    let told = |what: &str| format!("the system of this machine: {what}");

    let [bf16, f32, f64] = [products::<half::bf16>(), products::<f32>(), products::<f64>()];
    let peak = |(peak, _): (f64, f64)| Some(given(peak, "best product of 1024 x 1024 matrices"));
    let share = |(peak, reached): (f64, f64)| {
        Some(given((reached / peak).min(1.0), "median product [2048, 512] x [512, 1024] over the best"))
    };
    let (core, core_grad) = core()?;
    let core_share = |rate: f64, what: &str| given((rate / f32.0).min(1.0), what);
    let copied = copies();
    let (launch_secs, host_launch_secs) = launches()?;
    let (latency_secs, moved) = peers()?;
    Ok(DeviceSpec {
        name: request.name.clone(),
        file: String::new(),
        num_sms: Sourced::new(num_threads as u32, "threads that were measured on"),
        comm_sms: Sourced::new(0, "ranks on one machine copy with the threads that compute"),
        peak_flops_per_sec: PerFormat { fp8: None, bf16: peak(bf16), f32: peak(f32), f64: peak(f64) },
        product_efficiency: PerFormat { fp8: None, bf16: share(bf16), f32: share(f32), f64: share(f64) },
        core_efficiency: core_share(core, "forward in f32, 1024 tokens, 4 heads of 64, over the best product"),
        core_grad_efficiency: core_share(
            core_grad,
            "gradient in f32, 1024 tokens, 4 heads of 64, over the best product",
        ),
        memory_bytes: Sourced::new(request.memory_bytes, told("memory")),
        memory_bytes_per_sec: given(copied.0, "best copy of 128 MiB by all threads, reads and writes"),
        memory_efficiency: given((copied.1 / copied.0).min(1.0), "median copy over the best"),
        cast_efficiency: None,
        intra_node: Some(Link {
            bytes_per_sec: given(moved, "median copy of 64 MiB that another thread wrote, by one thread"),
            latency_secs: given(latency_secs, "half of a round trip between two threads"),
        }),
        inter_node: None,
        ranks_per_node: Sourced::new(
            (request.num_machine_threads / num_threads).max(1) as u32,
            told("hardware threads over the threads of a rank"),
        ),
        launch_secs: given(launch_secs, "median span of a task with an empty op"),
        host_launch_secs: given(host_launch_secs, "time to enqueue a task with an empty op, mean of 2000"),
        idle_watts: None,
        busy_watts: None,
        pue: None,
        price_per_hour: None,
        corrections: Corrections::default(),
    })
}

fn four_digits(value: f64) -> f64 {
    format!("{value:.3e}").parse().unwrap_or(value)
}

/// Best and median of `amount` per second over some runs, the first of which is not counted.
fn rates(amount: f64, mut run: impl FnMut()) -> (f64, f64) {
    run();
    let mut secs: Vec<f64> = (0..NUM_RUNS)
        .map(|_| {
            let begin = now_nanos();
            run();
            (now_nanos() - begin).max(1) as f64 * 1e-9
        })
        .collect();
    secs.sort_by(f64::total_cmp);
    (amount / secs[0], amount / secs[NUM_RUNS / 2])
}

/// Operations per second of products: the best, and what a layer's product reaches.
fn products<T: Float>() -> (f64, f64) {
    let run = |m: usize, k: usize, n: usize| {
        let (a, b) = (vec![T::of_f64(1.0); m * k], vec![T::of_f64(1.0); k * n]);
        let mut c = vec![T::of_f64(0.0); m * n];
        let product = || gemm(Mat::new(&a, m, k), Mat::new(&b, k, n), 0.0, &mut c, n, Threads::All);
        rates(2.0 * (m * k * n) as f64, product)
    };
    let (square, layer) = (run(1024, 1024, 1024), run(2048, 512, 1024));
    (square.0.max(layer.0), layer.1)
}

/// Operations per second of the core's forward and input gradient.
fn core() -> Result<(f64, f64), SessionError> {
    let [t, h, d] = [1024, 4, 64];
    let memory = Memory::new(Device::Cpu);
    let mut stream = Stream::new("bench", &memory, &Arc::default()).map_err(SessionError::runtime)?;
    let fill =
        || memory.from_slice(&[t, h, d], &(0..t * h * d).map(|i| (i % 97) as f32 / 97.0 - 0.5).collect::<Vec<_>>());
    let doc_offsets = memory.from_slice(&[2], &[0u32, t as u32]);
    let inputs = Inputs { q: fill(), k: fill(), v: fill(), doc_offsets, scale: 0.125 };
    let (o, lse, d_o) = (fill(), memory.alloc(DType::F32, &[t, h]), fill());
    let grads = Grads { dq: fill(), dk: fill(), dv: fill() };
    let pairs = attention::causal_pairs(t as u64);
    let mut failure = Ok(());
    let mut run = |stream: &mut Stream, backward: bool| {
        let launched = if backward {
            attention::input_grad(stream, inputs, o, lse, d_o, grads)
        } else {
            attention::forward(stream, inputs, o, lse)
        };
        let done = launched.and_then(|()| stream.synchronize());
        if let Err(error) = done {
            failure = Err(SessionError::runtime(error));
        }
    };
    let forward = attention::cost(t, pairs, [h, h, d, d], 4).flops() as f64;
    let gradient = attention::input_grad_cost(t, pairs, [h, h, d, d], 4).flops() as f64;
    let (_, forward) = rates(forward, || run(&mut stream, false));
    let (_, gradient) = rates(gradient, || run(&mut stream, true));
    failure.map(|()| (forward, gradient))
}

/// Bytes per second, read and written, of copies by all threads.
fn copies() -> (f64, f64) {
    const LEN: usize = 16 << 20;
    const CHUNK: usize = 1 << 16;
    let (from, mut to) = (vec![1u64; LEN], vec![0u64; LEN]);
    rates(2.0 * size_of_val(&*from) as f64, || {
        to.par_chunks_mut(CHUNK).zip(from.par_chunks(CHUNK)).for_each(|(to, from)| to.copy_from_slice(from));
    })
}

/// Seconds of a task that does nothing: on its stream, and for the host to enqueue it.
fn launches() -> Result<(f64, f64), SessionError> {
    const NUM_TASKS: usize = 2000;
    let mut stream = Stream::new("bench", &Memory::new(Device::Cpu), &Arc::default()).map_err(SessionError::runtime)?;
    let label: Arc<str> = "empty".into();
    let mut events = Vec::with_capacity(NUM_TASKS);
    let begin = now_nanos();
    for _ in 0..NUM_TASKS {
        stream.begin_task(&label);
        let start = stream.record();
        stream.launch(&[], &[], |_| ());
        events.push((start, stream.record()));
    }
    let host_secs = (now_nanos() - begin) as f64 * 1e-9 / NUM_TASKS as f64;
    stream.synchronize().map_err(SessionError::runtime)?;
    let mut nanos: Vec<u64> = events.iter().map(|(start, end)| end.synchronize() - start.synchronize()).collect();
    nanos.sort_unstable();
    Ok((nanos[NUM_TASKS / 2] as f64 * 1e-9, host_secs))
}

/// Seconds from one thread to another, and bytes per second of a copy of what the other wrote.
fn peers() -> Result<(f64, f64), SessionError> {
    const NUM_ROUNDS: usize = 2000;
    let (to_peer, from_host) = mpsc::sync_channel::<Vec<u64>>(1);
    let (to_host, from_peer) = mpsc::sync_channel::<Vec<u64>>(1);
    let peer = std::thread::Builder::new().name("peer".into()).spawn(move || {
        while let Ok(mut message) = from_host.recv() {
            message.iter_mut().for_each(|x| *x += 1);
            if to_host.send(message).is_err() {
                break;
            }
        }
    });
    let peer = peer.map_err(SessionError::runtime)?;
    let swap = |message: Vec<u64>| {
        to_peer.send(message).ok()?;
        from_peer.recv().ok()
    };
    let gone = || SessionError::runtime("the thread of the other rank ended");
    let begin = now_nanos();
    for _ in 0..NUM_ROUNDS {
        swap(Vec::new()).ok_or_else(gone)?;
    }
    let latency_secs = (now_nanos() - begin) as f64 * 1e-9 / (2 * NUM_ROUNDS) as f64;
    let mut to = vec![0u64; 8 << 20];
    let mut rates: Vec<f64> = Vec::new();
    let mut message = vec![1u64; to.len()];
    for _ in 0..NUM_RUNS {
        message = swap(message).ok_or_else(gone)?;
        let begin = now_nanos();
        to.copy_from_slice(&message);
        // Nobody reads the copy, so that the compiler may leave it out.
        std::hint::black_box(&mut to);
        rates.push(bytes_of(&to) / ((now_nanos() - begin).max(1) as f64 * 1e-9));
    }
    drop(to_peer);
    peer.join().map_err(|_| gone())?;
    rates.sort_by(f64::total_cmp);
    Ok((latency_secs, rates[NUM_RUNS / 2]))
}

fn bytes_of<T: Pod>(slice: &[T]) -> f64 {
    size_of_val(slice) as f64
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use engine::hardware::Format;
    use kernels::cost::Cost;

    use super::*;
    use crate::scene::hardware;

    #[test]
    fn what_is_measured_is_plausible_and_is_read_back() {
        let request = HardwareRequest {
            name: "this_cpu".into(),
            num_threads: None,
            num_machine_threads: 64,
            memory_bytes: 1 << 34,
            measured_by: "measured by a test".into(),
        };
        let spec = measure(&request).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("this_cpu.ron");
        std::fs::write(&path, hardware::to_ron(&spec, "this\nmachine").unwrap()).unwrap();
        let read = hardware::load(&path, &[]).unwrap_or_else(|errors| panic!("{errors}"));
        assert_eq!(read, DeviceSpec { file: path.display().to_string(), ..spec.clone() });
        // Between a slow core and a large server; and the model gives the product back.
        let peak = spec.peak_flops_per_sec.get(Format::F32).unwrap();
        assert!((1e8..1e14).contains(&peak), "{peak}");
        assert!((1e8..1e13).contains(&spec.memory_bytes_per_sec.value), "{:?}", spec.memory_bytes_per_sec);
        let link = spec.intra_node.as_ref().unwrap();
        assert!((1e8..1e12).contains(&link.bytes_per_sec.value), "{link:?}");
        assert!((1e-9..1e-2).contains(&spec.launch_secs.value), "{:?}", spec.launch_secs);
        let cost = Cost::gemm(1024, 1024, 1024, 4);
        let secs = spec.task_secs("k", &cost, Format::F32).unwrap();
        assert!(secs >= cost.flops() as f64 / peak, "{secs}");
        assert!(spec.price(1.0).is_err() && spec.task_secs("k", &cost, Format::Fp8).is_err());
    }
}
