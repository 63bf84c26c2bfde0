//! The device layer on the stand-in driver: memory, streams, events, fallbacks, and each way in which a GPU can be of no use.
//!
//! A test that is ignored is the body of one that runs it in a process of its own, which finds the stand-in as its driver.

#![cfg(feature = "cuda")]
#![expect(clippy::unwrap_used, reason = "tests")]

mod graphs;
mod nccl;
mod ops;

use std::sync::Arc;

use kernels::{
    cuda, device::Device, dtype::DType, error::Error, memory::Memory, ops::elementwise::add_acc, stream::Stream,
    tensor::Tensor,
};
use ptxsim_driver::run_ignored as on_standin;

fn gpu() -> Memory {
    Memory::open(Device::Cuda(0)).unwrap()
}

fn stream(memory: &Memory) -> Stream {
    Stream::new("gpu", memory, &Arc::default()).unwrap()
}

/// `x += one` as a kernel.
fn increment(s: &mut Stream, one: Tensor, x: Tensor) {
    add_acc(s, one, x).unwrap();
}

#[test]
fn without_a_driver_it_is_said_what_is_missing() {
    if cuda::devices().is_ok() {
        return;
    }
    let error = Memory::open(Device::Cuda(1)).map(|_| ()).unwrap_err().to_string();
    assert!(error.starts_with("cuda:1 cannot be used: expected an NVIDIA driver, found"), "{error}");
    assert!(error.ends_with("or use the device `cpu`"), "{error}");
    // Whoever did not ask meets it at the first stream that is to run.
    let memory = Memory::new(Device::Cuda(1));
    let x = memory.from_slice(&[2], &[1f32, 2.0]);
    assert_eq!(memory.download::<f32>(x), [0.0, 0.0]);
    assert_eq!(memory.failure().unwrap_err().to_string(), error);
}

#[test]
fn each_way_to_be_of_no_use_is_told_apart() {
    let ways = [
        (
            "PTXSIM_DEVICES",
            "0",
            "cuda:0 cannot be used: expected an NVIDIA GPU, found a driver without one; use the device `cpu`",
        ),
        (
            "PTXSIM_DRIVER",
            "12020",
            "cuda:0 cannot be used: expected a driver for CUDA 12.3 or later (version 545), found one for CUDA 12.2; \
             update the NVIDIA driver",
        ),
        (
            "PTXSIM_COMPUTE",
            "7.5",
            "cuda:0 cannot be used: expected a GPU of compute capability 8.0 or more, found 7.5; use a newer GPU, or \
             the device `cpu`",
        ),
    ];
    for (name, value, error) in ways {
        on_standin("of_no_use", &[(name, value), ("EXPECTED_ERROR", error)]);
    }
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn of_no_use() {
    let error = Memory::open(Device::Cuda(0)).map(|_| ()).unwrap_err().to_string();
    assert_eq!(error, std::env::var("EXPECTED_ERROR").unwrap());
}

#[test]
fn a_number_that_no_gpu_has_is_refused() {
    on_standin("no_such_gpu", &[]);
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn no_such_gpu() {
    let error = Memory::open(Device::Cuda(4)).map(|_| ()).unwrap_err().to_string();
    let expected =
        "cuda:4 cannot be used: expected a number below 1, for the 1 of this machine, found 4; see `hadal doctor`";
    assert_eq!(error, expected);
    let info = &cuda::devices().unwrap()[0];
    assert_eq!((info.target.compute, info.memory_bytes, info.driver_version), ((9, 0), 1 << 30, 12040));
}

#[test]
fn memory_holds_what_it_is_given() {
    on_standin("memory", &[]);
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn memory() {
    let memory = gpu();
    let gpu = memory.gpu().unwrap().clone();
    let (before, _) = gpu.memory_bytes().unwrap();
    // More than two pieces of pinned memory, and no multiple of one.
    let many: Vec<u32> = (0..(5 << 20) + 3).collect();
    let x = memory.from_slice(&[many.len()], &many);
    assert_eq!(memory.download::<u32>(x), many);
    let part = x.slice(7, 5);
    memory.write::<u32>(part)[1] = 99;
    assert_eq!(memory.download::<u32>(part), [7, 99, 9, 10, 11]);
    assert_eq!(&memory.read::<u32>(x)[5..14], [5, 6, 7, 99, 9, 10, 11, 12, 13]);
    memory.release(x);
    assert_eq!(memory.alloc(DType::U32, &[many.len()]).buffer, x.buffer);
    let empty = memory.from_slice::<f32>(&[0, 4], &[]);
    assert_eq!(memory.download::<f32>(empty), [0f32; 0]);
    assert!(gpu.memory_bytes().unwrap().0 < before);
    drop(memory);
    assert_eq!(gpu.memory_bytes().unwrap().0, before, "memory that is dropped gives its bytes back");
}

#[test]
fn a_full_device_says_what_was_asked_for_and_what_is_free() {
    on_standin("full", &[("PTXSIM_MEMORY", "100000")]);
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn full() {
    let memory = gpu();
    let mut s = stream(&memory);
    let one = memory.from_slice(&[1000], &[1f32; 1000]);
    s.synchronize().unwrap();
    let x = memory.alloc(DType::F32, &[30_000]);
    let error = memory.failure().unwrap_err();
    let Error::OutOfMemory { asked_bytes, free_bytes, total_bytes, .. } = error else { panic!("{error}") };
    assert_eq!((asked_bytes, total_bytes), (120_000, 100_000));
    assert!(free_bytes <= 96_000, "{free_bytes}");
    // The streams of that memory do nothing more, and say why.
    increment(&mut s, x, x);
    increment(&mut s, one, one);
    let error = s.synchronize().unwrap_err().to_string();
    assert!(error.starts_with("cuda:0 is out of memory: asked for 120000 bytes, found"), "{error}");
}

#[test]
fn a_kernel_that_does_not_load_is_named_with_the_compilers_words() {
    on_standin("refused", &[("PTXSIM_REFUSE", "add_acc_f32_f32")]);
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn refused() {
    let memory = gpu();
    let mut s = stream(&memory);
    let one = memory.from_slice(&[3], &[1f32; 3]);
    increment(&mut s, one, one);
    let error = s.synchronize().unwrap_err().to_string();
    let expected = "kernel `add_acc_f32_f32_x4` cannot be loaded on cuda:0: CUDA_ERROR_INVALID_PTX, a PTX JIT compilation \
                    failed\nptxas fatal";
    assert!(error.starts_with(expected), "{error}");
}

#[test]
fn events_order_streams_whatever_is_late() {
    for seed in ["1", "2", "3", "4"] {
        on_standin("ordered", &[("PTXSIM_SEED", seed)]);
    }
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn ordered() {
    let memory = gpu();
    let hazards = Arc::default();
    let mut a = Stream::new("a", &memory, &hazards).unwrap();
    let mut b = Stream::new("b", &memory, &hazards).unwrap();
    let one = memory.from_slice(&[300], &[1f32; 300]);
    let x = memory.from_slice(&[300], &[0f32; 300]);
    for _ in 0..20 {
        increment(&mut a, one, x);
        let event = a.record();
        b.wait(&event);
        add_acc(&mut b, x, x).unwrap();
        let event = b.record();
        a.wait(&event);
    }
    a.synchronize().unwrap();
    assert_eq!(memory.download::<f32>(x), [((1u64 << 21) - 2) as f32; 300]);
}

#[test]
fn an_event_that_nobody_waits_for_shows() {
    on_standin("unordered", &[]);
}

/// The stand-in is worth something: without events the two streams' sums differ from the ordered one.
#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn unordered() {
    let memory = gpu();
    let (mut a, mut b) = (stream(&memory), stream(&memory));
    let one = memory.from_slice(&[300], &[1f32; 300]);
    let x = memory.from_slice(&[300], &[0f32; 300]);
    for _ in 0..20 {
        increment(&mut a, one, x);
        add_acc(&mut b, x, x).unwrap();
    }
    a.synchronize().unwrap();
    b.synchronize().unwrap();
    assert_ne!(memory.download::<f32>(x), [((1u64 << 21) - 2) as f32; 300]);
}

#[test]
fn an_op_without_a_kernel_runs_on_the_host_in_its_turn() {
    on_standin("on_the_host", &[]);
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn on_the_host() {
    let memory = gpu();
    let mut s = stream(&memory);
    let one = memory.from_slice(&[300], &[1f32; 300]);
    let x = memory.from_slice(&[300], &[0f32; 300]);
    for _ in 0..5 {
        increment(&mut s, one, x);
        s.launch(&[x], &[x], move |m| m.write::<f32>(x).iter_mut().for_each(|v| *v *= 2.0));
    }
    s.synchronize().unwrap();
    assert_eq!(memory.download::<f32>(x), [62.0; 300]);
    let host: Vec<_> = memory.gpu().unwrap().host_ops().into_iter().collect();
    assert_eq!(host, [("cuda::on_the_host", 5)]);
    assert_eq!(memory.gpu().unwrap().loaded_kernels(), ["add_acc_f32_f32_x4"]);
}

#[test]
fn events_tell_the_hosts_time() {
    on_standin("times", &[]);
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn times() {
    let memory = gpu();
    let mut s = stream(&memory);
    let one = memory.from_slice(&[3000], &[1f32; 3000]);
    let begin = kernels::clock::now_nanos();
    let launch = |_| {
        increment(&mut s, one, one);
        s.record()
    };
    let events: Vec<_> = (0..10).map(launch).collect();
    let last = events[9].synchronize();
    assert_eq!(events[9].done_nanos(), Some(last));
    let end = kernels::clock::now_nanos();
    let nanos: Vec<u64> = events.iter().map(|event| event.done_nanos().unwrap()).collect();
    assert!(nanos.is_sorted(), "{nanos:?}");
    // A base is known to some tens of microseconds, on a machine whose threads may be taken off.
    let slack = 2_000_000;
    assert!(nanos[0] + slack > begin && last < end + slack, "{begin} {nanos:?} {end}");
}

#[test]
fn a_failing_task_is_named_and_the_stream_drains() {
    on_standin("failing", &[]);
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn failing() {
    let memory = gpu();
    let mut s = stream(&memory);
    let x = memory.from_slice(&[3], &[1f32; 3]);
    s.begin_task(&Arc::from("boiler"));
    s.launch(&[], &[x], |_| panic!("boom"));
    increment(&mut s, x, x);
    let error = s.synchronize().unwrap_err().to_string();
    assert_eq!(error, "task `boiler` failed on stream `gpu`: boom");
    assert_eq!(memory.download::<f32>(x), [1.0; 3]);
    s.synchronize().unwrap();
}
