//! Joint simulation by hand, against a simulation by small time steps, and at scale.
#![expect(clippy::unwrap_used, reason = "tests")]

use super::*;

fn group(ranks: &[u32]) -> Arc<[u32]> {
    ranks.into()
}

fn send(to: u32) -> Rendezvous {
    Rendezvous::Send { to, tag: 0 }
}

fn receive(from: u32) -> Rendezvous {
    Rendezvous::Receive { from, tag: 0 }
}

fn collective(ranks: &[u32]) -> Rendezvous {
    Rendezvous::Collective { group: group(ranks), tag: 0 }
}

/// Label, stream, dependencies, nanoseconds, what it meets.
type Row<'a> = (&'a str, u32, &'a [u32], u64, &'a [Rendezvous]);

fn rank(rank: u32, tasks: &[Row]) -> RankTasks {
    let mut list = RankTasks::new(rank);
    for (label, stream, deps, nanos, meets) in tasks {
        list.push(*stream, deps, *nanos, *label);
        meets.iter().for_each(|meeting| list.meet(meeting.clone()));
    }
    list
}

/// Start, end and wait of each task of each rank.
fn times(ranks: &[RankTasks]) -> Vec<Vec<(u64, u64, u64)>> {
    let of = |time: &TaskTime| (time.start_nanos, time.end_nanos, time.wait_nanos);
    simulate_ranks(ranks).unwrap().iter().map(|times| times.iter().map(of).collect()).collect()
}

fn error(ranks: &[RankTasks]) -> String {
    simulate_ranks(ranks).unwrap_err().to_string()
}

#[test]
fn a_receive_ends_no_earlier_than_its_send() {
    let sender = rank(0, &[("F", 0, &[], 10, &[]), ("send", 1, &[0], 3, &[send(1)])]);
    let receiver = rank(1, &[("receive", 1, &[], 2, &[receive(0)]), ("F", 0, &[0], 5, &[])]);
    let late = rank(1, &[("work", 1, &[], 20, &[]), ("receive", 1, &[], 2, &[receive(0)])]);
    assert_eq!(times(&[sender.clone(), receiver]), [[(0, 10, 0), (10, 13, 0)], [(0, 13, 11), (13, 18, 0)]]);
    // The send does not wait for a receiver that comes late, and the receiver takes its own time.
    assert_eq!(times(&[sender, late]), [[(0, 10, 0), (10, 13, 0)], [(0, 20, 0), (20, 22, 0)]]);
}

#[test]
fn sends_and_receives_are_matched_in_their_order_and_by_tag() {
    let tagged = |tag| Rendezvous::Send { to: 1, tag };
    let from = |tag| Rendezvous::Receive { from: 0, tag };
    let sender =
        rank(0, &[("a", 0, &[], 10, &[tagged(0)]), ("b", 0, &[], 10, &[tagged(7)]), ("c", 0, &[], 10, &[tagged(0)])]);
    let receiver =
        rank(1, &[("c'", 0, &[], 0, &[from(7)]), ("a'", 1, &[], 0, &[from(0)]), ("c'", 1, &[], 0, &[from(0)])]);
    assert_eq!(times(&[sender, receiver])[1], [(0, 20, 20), (0, 10, 10), (10, 30, 20)]);
}

#[test]
fn ranks_that_exchange_in_one_task_do_not_wait_in_a_circle() {
    let one = rank(0, &[("swap", 0, &[], 4, &[send(1), receive(1)])]);
    let other = rank(1, &[("late", 0, &[], 10, &[]), ("swap", 0, &[], 4, &[send(0), receive(0)])]);
    assert_eq!(times(&[one, other]), [vec![(0, 14, 10)], vec![(0, 10, 0), (10, 14, 0)]]);
}

#[test]
fn a_collective_begins_when_the_last_of_those_present_is_there() {
    let all = || [collective(&[0, 1, 2, 3])];
    let member =
        |id, nanos| rank(id, &[("F", 0, &[], nanos, &[]), ("all", 1, &[0], 5, &all()), ("next", 0, &[], 1, &[])]);
    // Rank 3 is not simulated.
    let found = times(&[member(0, 10), member(1, 30), member(2, 20)]);
    assert_eq!(found[0], [(0, 10, 0), (10, 35, 20), (10, 11, 0)], "only the stream that takes part waits");
    assert_eq!(found[1], [(0, 30, 0), (30, 35, 0), (30, 31, 0)]);
    assert_eq!(found[2], [(0, 20, 0), (20, 35, 10), (20, 21, 0)]);
    assert_eq!(times(&[member(0, 10)]), [[(0, 10, 0), (10, 15, 0), (10, 11, 0)]], "alone it waits for nobody");
    let mut slow = rank(0, &[("all", 0, &[], 5, &all())]);
    slow.wait_longer(slow.len() as u32 - 1, 3);
    assert_eq!(times(&[slow]), [[(0, 8, 3)]]);
}

#[test]
fn ranks_that_are_not_simulated_are_not_waited_for() {
    assert_eq!(
        times(&[rank(0, &[("r", 0, &[], 2, &[receive(9)]), ("s", 0, &[], 2, &[send(8)])])]),
        [[(0, 2, 0), (2, 4, 0)]]
    );
}

#[test]
fn a_task_starts_no_earlier_than_the_host_has_launched_it() {
    let mut tasks =
        rank(0, &[("a", 0, &[], 25, &[]), ("b", 1, &[], 1, &[]), ("c", 1, &[], 1, &[]), ("d", 0, &[], 1, &[])]);
    tasks.host_nanos = 10;
    assert_eq!(times(&[tasks]), [[(10, 35, 0), (20, 21, 0), (30, 31, 0), (40, 41, 0)]]);
}

#[test]
fn a_deadlock_names_the_tasks_that_wait_for_each_other() {
    // Both receive before they send, on one stream.
    let ranks = [
        rank(0, &[("receive a", 0, &[], 1, &[receive(1)]), ("send b", 0, &[], 1, &[send(1)])]),
        rank(1, &[("receive b", 0, &[], 1, &[receive(0)]), ("send a", 0, &[], 1, &[send(0)])]),
    ];
    assert_eq!(
        error(&ranks),
        "deadlock: `rank 0: receive a` waits for `rank 1: send a`, which waits for `rank 1: receive b`, which waits for \
         `rank 0: send b`, which waits for `rank 0: receive a`"
    );
    // Collectives in another order. Rank 2 only waits for them, and is not in the circle.
    let (both, all) = (collective(&[0, 1]), collective(&[0, 1, 2]));
    let ranks = [
        rank(2, &[("all", 0, &[], 1, std::slice::from_ref(&all))]),
        rank(0, &[("all", 0, &[], 1, std::slice::from_ref(&all)), ("both", 0, &[], 1, std::slice::from_ref(&both))]),
        rank(1, &[("both", 0, &[], 1, std::slice::from_ref(&both)), ("all", 0, &[], 1, std::slice::from_ref(&all))]),
    ];
    assert_eq!(
        error(&ranks),
        "deadlock: `rank 1: both` waits for `rank 0: both`, which waits for `rank 0: all`, which waits for `rank 1: all`, \
         which waits for `rank 1: both`"
    );
    assert_eq!(error(&[rank(0, &[("a", 0, &[0], 1, &[])])]), "deadlock: `rank 0: a` waits for `rank 0: a`");
}

#[test]
fn what_nobody_answers_is_told_before_it_is_waited_for() {
    let idle = || rank(1, &[("work", 0, &[], 1, &[])]);
    for (ranks, want) in [
        (
            [rank(0, &[("r", 0, &[], 1, &[receive(1)])]), idle()],
            "rank 0: task `r` receives from it with tag 0, but rank 1 sends 0 of these; the graphs of the two were not made \
             alike",
        ),
        (
            [rank(0, &[("s", 0, &[], 1, &[send(1)])]), idle()],
            "rank 0: task `s` sends to it with tag 0, but rank 1 receives 0 of these; the graphs of the two were not made alike",
        ),
        (
            [rank(0, &[("c", 0, &[], 1, &[collective(&[0, 1])])]), idle()],
            "rank 0: task `c` takes part in collective 0 with tag 0 of ranks [0, 1], but rank 1 takes part in 0 of these; the \
             graphs of the two were not made alike",
        ),
        (
            [rank(0, &[("c", 0, &[], 1, &[collective(&[1, 2])])]), idle()],
            "rank 0: task `c` is of a collective of ranks [1, 2], which it is not among",
        ),
        ([idle(), idle()], "rank 1 is given twice; each rank has one list of tasks"),
        ([rank(0, &[("a", 0, &[5], 1, &[])]), idle()], "rank 0: a task waits for task 5, but there are 1"),
    ] {
        assert_eq!(error(&ranks), want);
    }
}

/// A pipeline of ranks with one microbatch after the other: sends to the next rank, receives from the one before, and a
/// collective of all ranks after each.
fn pipeline(num_ranks: u32, num_microbatches: u32) -> Vec<RankTasks> {
    let all: Arc<[u32]> = (0..num_ranks).collect();
    let label: Arc<str> = "task".into();
    let of = |id: u32| {
        let mut tasks = RankTasks::new(id);
        for microbatch in 0..num_microbatches {
            let before = tasks.push(1, &[], 1, label.clone());
            if id > 0 {
                tasks.meet(receive(id - 1));
            }
            let work = tasks.push(0, &[before], 10 + u64::from((id * 7 + microbatch * 3) % 5), label.clone());
            tasks.push(2, &[work], 1, label.clone());
            if id + 1 < num_ranks {
                tasks.meet(send(id + 1));
            }
            tasks.push(0, &[], 2, label.clone());
            tasks.meet(Rendezvous::Collective { group: all.clone(), tag: 0 });
        }
        tasks
    };
    (0..num_ranks).map(of).collect()
}

/// The same rules, nanosecond by nanosecond: an independent and slow way to the same times.
fn by_small_steps(ranks: &[RankTasks]) -> Vec<Vec<(u64, u64, u64)>> {
    let mut start: Vec<Vec<Option<u64>>> = ranks.iter().map(|tasks| vec![None; tasks.len()]).collect();
    let mut end = start.clone();
    let meets = |rank: usize, task: usize| {
        ranks[rank].rendezvous.iter().filter(move |(of, _)| *of as usize == task).map(|(_, meeting)| meeting)
    };
    // The task of `peer` that does the n-th of what `is_it` says, where this task does the n-th.
    let nth = |peer: usize, is_it: &dyn Fn(&Rendezvous) -> bool, n: usize| {
        let mut found = ranks[peer].rendezvous.iter().filter(|(_, meeting)| is_it(meeting));
        found.nth(n).map(|(task, _)| *task as usize).unwrap()
    };
    let count = |rank: usize, task: usize, meeting: &Rendezvous| {
        ranks[rank].rendezvous.iter().filter(|(of, other)| (*of as usize) < task && other == meeting).count()
    };
    for now in 0.. {
        loop {
            let mut changed = false;
            for (r, tasks) in ranks.iter().enumerate() {
                for t in 0..tasks.len() {
                    let before = (0..t).rev().find(|&other| tasks.streams[other] == tasks.streams[t]);
                    let needs = tasks.deps_of(t).iter().map(|&dep| dep as usize).chain(before);
                    if start[r][t].is_none() && needs.clone().all(|need| end[r][need].is_some_and(|end| end <= now)) {
                        (start[r][t], changed) = (Some(now), true);
                    }
                    let Some(begin) = start[r][t].filter(|_| end[r][t].is_none()) else { continue };
                    let mut earliest = Some(begin + tasks.durations_nanos[t]);
                    for meeting in meets(r, t) {
                        let n = count(r, t, meeting);
                        let known = match meeting {
                            Rendezvous::Send { .. } => Some(0),
                            Rendezvous::Receive { from, .. } => {
                                let to_me = |other: &Rendezvous| matches!(other, Rendezvous::Send { to, .. } if *to as usize == r);
                                end[*from as usize][nth(*from as usize, &to_me, n)]
                            }
                            Rendezvous::Collective { .. } => (0..ranks.len())
                                .map(|peer| start[peer][nth(peer, &|other| other == meeting, n)])
                                .collect::<Option<Vec<_>>>()
                                .map(|starts| starts.into_iter().max().unwrap() + tasks.durations_nanos[t]),
                        };
                        earliest = earliest.zip(known).map(|(a, b)| a.max(b));
                    }
                    if earliest.is_some_and(|earliest| earliest <= now) {
                        (end[r][t], changed) = (Some(now), true);
                    }
                }
            }
            if !changed {
                break;
            }
        }
        if end.iter().flatten().all(Option::is_some) {
            break;
        }
    }
    let time = |((start, end), nanos): ((&Option<u64>, &Option<u64>), &u64)| {
        (start.unwrap(), end.unwrap(), end.unwrap() - start.unwrap() - nanos)
    };
    let of = |r: usize| start[r].iter().zip(&end[r]).zip(&ranks[r].durations_nanos).map(time).collect();
    (0..ranks.len()).map(of).collect()
}

#[test]
fn times_are_those_of_a_simulation_by_small_steps() {
    for (num_ranks, num_microbatches) in [(1, 3), (2, 4), (4, 5), (5, 2)] {
        let ranks = pipeline(num_ranks, num_microbatches);
        assert_eq!(times(&ranks), by_small_steps(&ranks), "{num_ranks} ranks");
    }
}

#[test]
fn the_order_of_the_ranks_changes_nothing() {
    let ranks = pipeline(4, 6);
    let mut reversed = ranks.clone();
    reversed.reverse();
    let mut found = simulate_ranks(&reversed).unwrap();
    found.reverse();
    assert_eq!(found, simulate_ranks(&ranks).unwrap());
}

#[test]
fn a_million_tasks_take_seconds_at_most() {
    let ranks = pipeline(64, 4000);
    let begin = kernels::clock::now_nanos();
    let found = simulate_ranks(&ranks).unwrap();
    let secs = (kernels::clock::now_nanos() - begin) as f64 * 1e-9;
    let num_tasks: usize = found.iter().map(Vec::len).sum();
    assert_eq!(num_tasks, 1_024_000);
    // The example `bench_joint` measures it; here only that nothing is quadratic.
    assert!(secs < 20.0, "{num_tasks} tasks took {secs} s");
}
