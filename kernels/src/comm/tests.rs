//! Messages, collectives, and what happens when ranks are at odds or gone.

#![expect(clippy::unwrap_used, reason = "tests")]

use std::ops::Range;

use half::bf16;

use super::{
    testing::{on_ranks, on_ranks_that},
    *,
};
use crate::{
    clock,
    device::Device,
    dtype::{DType, Float},
    memory::Memory,
    ops::testing::random,
};

fn data<T: Float>(len: usize, rank: u32) -> Vec<T> {
    random(len, 100 + u64::from(rank)).into_iter().map(T::of_f64).collect()
}

/// The sum in the order of ranks, kept in the accumulator's type.
fn summed<T: Float>(len: usize, ranks: &[u32]) -> Vec<T> {
    let all: Vec<Vec<T>> = ranks.iter().map(|&rank| data(len, rank)).collect();
    let sum = |i: usize| all[1..].iter().fold(all[0][i].to_acc(), |sum, x| sum + x[i].to_acc());
    (0..len).map(|i| T::from_acc(sum(i))).collect()
}

fn parts(len: usize, n: usize) -> Arc<[Range<usize>]> {
    // Uneven, with a gap of one element before each.
    let mut ends: Vec<usize> = (0..=n).map(|i| len * i * i / (n * n)).collect();
    ends[n] = len;
    ends.windows(2).map(|w| (w[0] + 1).min(w[1])..w[1]).collect()
}

#[test]
fn sums_are_in_the_order_of_ranks_and_the_same_everywhere() {
    fn check<T: Float>(n: u32, group: &[u32], len: usize) {
        [false, true].into_iter().for_each(|pack| check_on::<T>(pack, n, group, len));
    }
    fn check_on<T: Float>(pack: bool, n: u32, group: &[u32], len: usize) {
        let group: Arc<[u32]> = group.into();
        let got = on_ranks_that(pack, n, 2, |comm, s| {
            let x = s.memory().from_slice(&[len], &data::<T>(len, comm.rank()));
            if group.contains(&comm.rank()) {
                comm.all_reduce_sum(s, &group, x, 1).unwrap();
            }
            s.synchronize().unwrap();
            s.memory().download::<T>(x)
        });
        for (rank, got) in (0..).zip(got) {
            let want = if group.contains(&rank) { summed(len, &group) } else { data(len, rank) };
            assert!(got == want, "{:?} of {len}, rank {rank} of {group:?}", T::DTYPE);
        }
    }
    for (n, group) in [(1, &[0][..]), (2, &[0, 1]), (4, &[1, 3]), (3, &[0, 1, 2]), (8, &[0, 1, 2, 3, 4, 5, 6, 7])] {
        for len in [1, 100, 16 * 1024 + 7] {
            check::<f32>(n, group, len);
            check::<f64>(n, group, len);
            check::<bf16>(n, group, len);
        }
    }
}

#[test]
fn a_reduce_scatter_and_a_gather_of_parts_is_an_all_reduce_of_them() {
    for (pack, n, len) in [(false, 1, 9), (false, 2, 40), (true, 4, 1000), (false, 4, 1000), (true, 8, 40_000)] {
        on_ranks_that(pack, n, 4, |comm, s| {
            let (group, parts) = (comm.everyone(), parts(len, n as usize));
            let mine = data::<f32>(len + 3, comm.rank());
            // A part of a larger tensor, which the ops do not know.
            let whole = s.memory().from_slice(&[len + 3], &mine);
            let x = whole.slice(2, len);
            comm.reduce_scatter_sum(s, &group, x, parts.clone(), 5).unwrap();
            s.synchronize().unwrap();
            let sums = {
                let mut sums: Vec<f32> =
                    (0..n).map(|r| data::<f32>(len + 3, r)).fold(vec![0.0; len + 3], |mut sum, x| {
                        sum.iter_mut().zip(&x).for_each(|(s, x)| *s += x);
                        sum
                    });
                sums.drain(2..2 + len).collect::<Vec<f32>>()
            };
            let mut want = mine.clone();
            let part = parts[comm.rank() as usize].clone();
            want[2 + part.start..2 + part.end].copy_from_slice(&sums[part]);
            assert!(s.memory().download::<f32>(whole) == want, "scattered on rank {} of {n}", comm.rank());
            comm.all_gather(s, &group, x, parts.clone(), 6).unwrap();
            s.synchronize().unwrap();
            for part in parts.iter() {
                want[2 + part.start..2 + part.end].copy_from_slice(&sums[part.clone()]);
            }
            assert!(s.memory().download::<f32>(whole) == want, "gathered on rank {} of {n}", comm.rank());
        });
    }
}

#[test]
fn counts_are_summed_and_do_not_wrap() {
    let results = on_ranks(3, 8, |comm, s| {
        let group = comm.everyone();
        let x = s.memory().from_slice(&[2], &[comm.rank(), 1 << 30]);
        comm.all_reduce_sum(s, &group, x, 0).unwrap();
        s.synchronize().unwrap();
        assert_eq!(s.memory().download::<u32>(x), [3, 3 << 30]);
        comm.all_reduce_sum(s, &group, x, 9).unwrap();
        s.synchronize().unwrap_err().to_string()
    });
    for error in results {
        assert!(error.contains("tag 9: the sum of element 1 is more than U32 holds"), "{error}");
    }
}

#[test]
fn messages_come_by_tag_and_in_order() {
    on_ranks(2, 1, |comm, s| {
        let m = s.memory().clone();
        if comm.rank() == 0 {
            for (tag, value) in [(7, 1u32), (8, 2), (7, 3)] {
                let x = m.from_slice(&[1], &[value]);
                comm.send(s, x, 1, tag).unwrap();
            }
            s.synchronize().unwrap();
            assert_eq!(comm.meter().p2p, LinkBytes { intra_node: 0, inter_node: 12 });
        } else {
            let got: Vec<Tensor> = [8, 7, 7]
                .map(|tag| (m.alloc(DType::U32, &[1, 1]), tag))
                .map(|(x, tag)| {
                    comm.receive(s, x, 0, tag).unwrap();
                    x
                })
                .to_vec();
            s.synchronize().unwrap();
            assert_eq!(got.iter().map(|x| m.download::<u32>(*x)[0]).collect::<Vec<_>>(), [2, 1, 3]);
        }
    });
}

#[test]
fn a_send_waits_only_when_very_many_were_not_received() {
    on_ranks(2, 2, |comm, s| {
        let x = s.memory().from_slice(&[1], &[5u32]);
        let count = local::MAX_MESSAGES + 10;
        for i in 0..count {
            if comm.rank() == 0 {
                comm.send(s, x, 1, 0).unwrap();
            } else {
                comm.receive(s, x, 0, 0).unwrap();
            }
            if comm.rank() == 0 && i == local::MAX_MESSAGES - 1 {
                // So many fit before anything is received.
                s.synchronize().unwrap();
                comm.barrier().unwrap();
            } else if comm.rank() == 1 && i == 0 {
                comm.barrier().unwrap();
            }
        }
        s.synchronize().unwrap();
    });
}

#[test]
fn a_message_of_another_size_names_both_sides() {
    let errors = on_ranks(2, 2, |comm, s| {
        if comm.rank() == 0 {
            let x = s.memory().alloc(DType::F32, &[5]);
            comm.send(s, x, 1, 3).unwrap();
            comm.receive(s, x, 1, 4).unwrap();
        } else {
            let x = s.memory().alloc(DType::F32, &[2, 2]);
            comm.receive(s, x, 0, 3).unwrap();
        }
        s.synchronize().unwrap_err().to_string()
    });
    let want = "receive: rank 0 sent F32 of [5] under tag 3, where rank 1 receives F32 of [2, 2]";
    assert_eq!(errors, [format!("rank 1 is lost: {want}"), want.to_owned()]);
}

#[test]
fn ranks_that_call_different_things_are_told() {
    let errors = on_ranks(2, 2, |comm, s| {
        let x = s.memory().alloc(DType::F32, &[4]);
        let tags = if comm.rank() == 0 { [1, 2] } else { [2, 1] };
        for tag in tags {
            comm.all_reduce_sum(s, &comm.everyone(), x, tag).unwrap();
        }
        s.synchronize().unwrap_err().to_string()
    });
    for error in errors {
        assert!(error.contains("all_reduce_sum with tag 1 of F32 of [4]"), "{error}");
        assert!(error.contains("all_reduce_sum with tag 2 of F32 of [4]"), "{error}");
    }
}

#[test]
fn lanes_have_orders_of_their_own() {
    on_ranks(2, 2, |comm, s| {
        let mut second = Stream::new("second", s.memory(), &Arc::default()).unwrap();
        let (x, y) = (s.memory().from_slice(&[1], &[1u32]), s.memory().from_slice(&[1], &[2u32]));
        let (group, other) = (comm.everyone(), comm.lane(1));
        for first in [comm.rank() == 0, comm.rank() == 1] {
            if first {
                comm.all_reduce_sum(s, &group, x, 1).unwrap();
            } else {
                other.all_reduce_sum(&mut second, &group, y, 2).unwrap();
            }
        }
        s.synchronize().unwrap();
        second.synchronize().unwrap();
        assert_eq!([x, y].map(|x| s.memory().download::<u32>(x)[0]), [2, 4]);
    });
}

#[test]
fn a_rank_that_is_gone_wakes_everyone_within_a_second() {
    type Blocked = fn(&Comm, &mut Stream) -> Error;
    let blocked: [(&str, Blocked); 4] = [
        ("receive", |comm, s| {
            let x = s.memory().alloc(DType::F32, &[1]);
            comm.receive(s, x, 2, 0).unwrap();
            s.synchronize().unwrap_err()
        }),
        ("collective", |comm, s| {
            let x = s.memory().alloc(DType::F32, &[1]);
            comm.all_reduce_sum(s, &comm.everyone(), x, 0).unwrap();
            s.synchronize().unwrap_err()
        }),
        ("host gather", |comm, _| comm.all_gather_bytes(vec![1]).unwrap_err()),
        ("barrier", |comm, _| comm.barrier().unwrap_err()),
    ];
    for (name, wait) in blocked {
        let results = on_ranks(3, 3, |comm, s| {
            if comm.rank() == 2 {
                std::thread::sleep(std::time::Duration::from_millis(100));
                assert!(comm.lost().is_none());
                comm.abort(2, "its node burns");
                comm.abort(0, "later");
                (clock::now_nanos(), comm.lost().unwrap())
            } else {
                let error = wait(&comm, s);
                // What is called later fails as well.
                assert!(comm.barrier().is_err());
                (clock::now_nanos(), error)
            }
        });
        let gone = results[2].0;
        for (rank, (at, error)) in results.into_iter().enumerate() {
            assert_eq!(error.to_string(), "rank 2 is lost: its node burns", "{name}, rank {rank}");
            assert!(at < gone + 1_000_000_000, "{name}: rank {rank} took {} ms", (at - gone) / 1_000_000);
        }
    }
}

#[test]
fn the_host_gathers_by_rank() {
    for n in [1, 5] {
        let all = on_ranks(n, 8, |comm, _| {
            comm.barrier().unwrap();
            comm.all_gather_bytes(vec![comm.rank() as u8; comm.rank() as usize]).unwrap()
        });
        assert!(all.iter().all(|all| all.iter().enumerate().all(|(r, bytes)| *bytes == vec![r as u8; r])));
    }
}

#[test]
fn a_wait_is_told_apart_from_work() {
    on_ranks(2, 2, |comm, s| {
        let x = s.memory().alloc(DType::F32, &[1]);
        if comm.rank() == 0 {
            std::thread::sleep(std::time::Duration::from_millis(30));
        }
        comm.all_reduce_sum(s, &comm.everyone(), x, 0).unwrap();
        let event = s.record();
        event.synchronize();
        // The late one hardly waits; the other does, at least for the time that it surely was early.
        let waited = event.waited();
        assert_eq!(waited.load, None);
        assert!(comm.rank() == 0 || waited.nanos > 5_000_000, "{waited:?}");
    });
}

#[test]
fn recordings_have_the_meetings_and_the_bytes_that_meters_count() {
    const LEN: usize = 1000;
    let launch = |comm: &Comm, s: &mut Stream| {
        let x = s.memory().alloc(DType::F32, &[LEN]);
        let group = comm.everyone();
        let next = (comm.rank() + 1) % comm.num_ranks();
        let last = (comm.rank() + comm.num_ranks() - 1) % comm.num_ranks();
        comm.send(s, x, next, 1).unwrap();
        comm.receive(s, x, last, 1).unwrap();
        comm.all_reduce_sum(s, &group, x, 2).unwrap();
        comm.reduce_scatter_sum(s, &group, x, parts(LEN, 6), 3).unwrap();
        comm.all_gather(s, &group, x, parts(LEN, 6), 4).unwrap();
        comm.all_reduce_sum(s, &group, s.memory().alloc(DType::Bf16, &[20, LEN]), 5).unwrap();
    };
    // Those that pack compare what they meter with what they packed.
    let packing = on_ranks_that(true, 6, 3, |comm, s| {
        launch(&comm, s);
        s.synchronize().unwrap();
        comm.meter()
    });
    on_ranks(6, 3, |comm, s| {
        launch(&comm, s);
        s.synchronize().unwrap();
        let meter = comm.take_meter();
        assert_eq!(meter, packing[comm.rank() as usize]);
        assert_eq!(comm.meter(), Meter::default());
        s.start_recording();
        launch(&comm, s);
        let recording = s.finish_recording();
        assert_eq!(meter.total().cost(), Cost::wire(recording.cost.intra_node_bytes, recording.cost.inter_node_bytes));
        // The next of ranks 2 and 5 is on the other node.
        let far = if comm.rank() % 3 == 2 { 4 * LEN as u64 } else { 0 };
        assert_eq!(meter.p2p, LinkBytes { intra_node: 4 * LEN as u64 - far, inter_node: far });
        let (group, rank) = (comm.everyone(), comm.rank());
        let [to, from] = [(rank + 1) % 6, (rank + 5) % 6];
        let collective = |tag| Rendezvous::Collective { group: group.clone(), tag };
        let first = [Rendezvous::Send { to, tag: 1 }, Rendezvous::Receive { from, tag: 1 }];
        assert_eq!(recording.rendezvous[..2], first);
        assert_eq!(recording.rendezvous[2..], [2, 3, 4, 5].map(collective));
    });
}

#[test]
fn a_planned_end_records_and_does_not_run() {
    let comm = Comm::planned(1, 4, 2);
    let mut meta = Stream::new("meta", &Memory::new(Device::Meta), &Arc::default()).unwrap();
    let x = meta.memory().alloc(DType::F64, &[1 << 20, 1 << 10]);
    comm.all_reduce_sum(&mut meta, &comm.everyone(), x, 0).unwrap();
    meta.synchronize().unwrap();
    let mut cpu = Stream::new("cpu", &Memory::new(Device::Cpu), &Arc::default()).unwrap();
    let x = cpu.memory().alloc(DType::F32, &[1]);
    let error = comm.send(&mut cpu, x, 0, 0).unwrap_err().to_string();
    assert!(error.contains("rank 1 is planned and has no engine"), "{error}");
    cpu.start_recording();
    comm.send(&mut cpu, x, 0, 0).unwrap();
    assert_eq!(cpu.finish_recording().cost.intra_node_bytes, 4);
}

#[test]
fn groups_and_parts_that_do_not_fit_are_refused() {
    let comm = Comm::planned(1, 4, 2);
    let mut s = Stream::new("meta", &Memory::new(Device::Meta), &Arc::default()).unwrap();
    let x = s.memory().alloc(DType::F32, &[8]);
    for group in [&[0, 2][..], &[2, 1], &[1, 1], &[1, 4], &[]] {
        let error = comm.all_reduce_sum(&mut s, &group.into(), x, 0).unwrap_err().to_string();
        assert!(error.contains("a group has its callers, ascending"), "{group:?}: {error}");
    }
    for parts in [vec![0..4, 4..6, 6..8], vec![0..4, 3..8], vec![4..8, 0..4], vec![0..4, 4..9]] {
        let error = comm.all_gather(&mut s, &[0, 1].into(), x, parts.clone().into(), 0).unwrap_err().to_string();
        assert!(error.contains("a group of 2 has 2 parts of 8 elements"), "{parts:?}: {error}");
    }
    assert!(comm.send(&mut s, x, 4, 0).unwrap_err().to_string().contains("names rank 4, ranks are 0..4"));
}
