//! Order, events, failures and threads of streams.

#![expect(clippy::unwrap_used, reason = "tests")]
use super::*;
use crate::{device::Device, dtype::DType};

fn two_streams() -> (Memory, Stream, Stream, Tensor) {
    let memory = Memory::new(Device::Cpu);
    let hazards = Arc::default();
    let a = Stream::new("a", &memory, &hazards).unwrap();
    let b = Stream::new("b", &memory, &hazards).unwrap();
    let x = memory.alloc(DType::F32, &[4]);
    (memory, a, b, x)
}

#[test]
fn ops_run_in_order_and_events_order_streams() {
    let (memory, mut a, mut b, x) = two_streams();
    for i in 0..100 {
        a.launch(&[], &[x], move |m| m.write::<f32>(x)[0] = i as f32);
    }
    let event = a.record();
    b.wait(&event);
    b.launch(&[x], &[x], move |m| m.write::<f32>(x)[0] *= 2.0);
    b.synchronize().unwrap();
    assert_eq!(memory.download::<f32>(x)[0], 198.0);
}

#[test]
#[cfg(debug_assertions)]
#[should_panic(expected = "`reader` reads")]
fn a_missing_edge_is_reported_with_both_tasks() {
    let (_, mut a, mut b, x) = two_streams();
    a.begin_task(&Arc::from("writer"));
    a.launch(&[], &[x], |_| ());
    b.begin_task(&Arc::from("reader"));
    b.launch(&[x], &[], |_| ());
}

#[test]
fn a_failing_op_names_its_task_and_stops_what_follows() {
    let (memory, mut a, _, x) = two_streams();
    a.begin_task(&Arc::from("head"));
    a.launch(&[], &[x], |_| panic!("boom"));
    a.launch(&[], &[x], move |m| m.write::<f32>(x)[0] = 1.0);
    let error = a.synchronize().unwrap_err().to_string();
    assert_eq!(error, "task `head` failed on stream `a`: boom");
    assert_eq!(memory.download::<f32>(x)[0], 0.0);
}

#[test]
fn an_event_tells_what_was_waited_for_since_the_last() {
    let (_, mut a, ..) = two_streams();
    for (nanos, load) in [(5, None), (7, Some((1, 4))), (0, Some((2, 2)))] {
        a.launch_waiting("meeting", &[], &[], move |_| Waited { nanos, load });
    }
    let (first, second) = (a.record(), a.record());
    second.synchronize();
    assert_eq!(first.waited(), Waited { nanos: 12, load: Some((3, 6)) });
    assert_eq!(second.waited(), Waited::default());
}

#[test]
fn an_error_raised_in_a_job_is_the_streams_failure() {
    let (_, mut a, ..) = two_streams();
    a.launch_waiting("meeting", &[], &[], |_| {
        std::panic::resume_unwind(Box::new(Error::PeerLost { rank: 3, message: "gone".into() }))
    });
    assert!(matches!(a.synchronize(), Err(Error::PeerLost { rank: 3, .. })));
}

#[test]
fn a_streams_own_threads_take_its_parallel_loops_and_matrix_products() {
    use rayon::prelude::*;
    let (memory, hazards) = (Memory::new(Device::Cpu), Arc::default());
    let part = Part { num_threads: NonZeroUsize::new(3), ..Part::default() };
    let mut s = Stream::with_part("own", &memory, &hazards, part).unwrap();
    let (seen, names) = mpsc::sync_channel(1);
    s.launch(&[], &[], move |_| {
        let barrier = std::sync::Barrier::new(3);
        // Each of the three must be in its own item at once, or the barrier holds them for ever.
        let mut names: Vec<_> = (0..3)
            .into_par_iter()
            .with_max_len(1)
            .map(|_| {
                barrier.wait();
                std::thread::current().name().map(str::to_owned)
            })
            .collect();
        names.sort();
        seen.send((rayon::current_num_threads(), names)).unwrap();
    });
    s.synchronize().unwrap();
    let (num_threads, names) = names.recv().unwrap();
    assert_eq!((num_threads, names), (3, ["own", "own.1", "own.2"].map(|n| Some(n.to_owned())).to_vec()));
    // `gemm` with `Parallelism::Rayon(0)` asks the same function for its number of threads.
    let (x, y) = (memory.from_slice(&[96, 96], &[1f32; 96 * 96]), memory.alloc(DType::F32, &[96, 96]));
    crate::ops::gemm::forward(&mut s, x, x, None, y).unwrap();
    s.synchronize().unwrap();
    assert!(memory.download::<f32>(y).iter().all(|&v| v == 96.0));
    drop(s);
    let left = || {
        std::fs::read_dir("/proc/self/task")
            .into_iter()
            .flatten()
            .filter(|task| {
                let name = task.as_ref().map(|task| std::fs::read_to_string(task.path().join("comm")));
                matches!(name, Ok(Ok(name)) if name.starts_with("own"))
            })
            .count()
    };
    // Threads end after the stream is dropped, not before the drop returns.
    let ended = (0..200).any(|_| {
        left() == 0 || {
            std::thread::sleep(std::time::Duration::from_millis(5));
            false
        }
    });
    assert!(ended, "{} threads outlive their stream", left());
}

#[test]
fn communication_has_few_blocks_and_persistent_products_leave_it_room() {
    use crate::{
        fp8::{Blocks, Tiles},
        ptx,
    };
    let memory = Memory::new(Device::Cpu);
    let bf16 = |dims: &[usize]| memory.alloc(DType::Bf16, dims);
    let (x, w, y) = (bf16(&[4096, 64]), bf16(&[4096, 64]), bf16(&[4096, 4096]));
    let (codes, weights) = (Tiles::alloc(&memory, 4096, 128), Blocks::alloc(&memory, &[4096, 128]));
    let u32s = |n: usize| memory.alloc(DType::U32, &[n]);
    let order = crate::ops::permute::Order { offsets: u32s(5), row_of_slot: u32s(8192), token_of_row: u32s(8192) };
    let (rows, weights_tk) = (bf16(&[8192, 64]), memory.alloc(DType::F32, &[4096, 2]));
    let grids = |share| {
        let on = Target { compute: (9, 0), num_sms: 132, shared_bytes: 227 << 10, share, tuning: None };
        let launches = vec![
            ptx::gemm::forward((&on).into(), x, w, None, y),
            ptx::fp8_gemm::product((&on).into(), codes, weights, None, y),
            ptx::elementwise::copy(y, y),
            ptx::permute::permute(x, order, rows),
            ptx::permute::combine(rows, weights_tk, order, None, x),
        ];
        within(&on, launches.into_iter().flatten().collect())
            .unwrap()
            .iter()
            .map(|launch| launch.grid[0])
            .collect::<Vec<_>>()
    };
    assert_eq!(grids(Share::All), [132, 132, 8192, 1024, 512]);
    assert_eq!(grids(Share::AllBut(20)), [112, 112, 8192, 1024, 512]);
    assert_eq!(grids(Share::Only(20)), [20; 5]);
}
