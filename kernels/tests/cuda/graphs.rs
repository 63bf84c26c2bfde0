//! Batches that come again as graphs: the same numbers, and times that stay.

use super::*;

#[test]
fn batches_that_come_again_are_graphs_and_do_what_launches_do() {
    for seed in ["1", "2", "3"] {
        let said = on_standin("graphs::repeated", &[("PTXSIM_SEED", seed), ("PTXSIM_STATS", "1")]);
        // Steps 1 to 3 are one run of 8 kernels. From the change on there is one of 5, and too few behind it; in step 7 it is launched one
        // by one, since its last times are not read.
        assert!(said.contains("ptxsim: 7 graphs of 44 kernels"), "{said}");
    }
}

/// Nine steps of a batch on one stream, with another that waits for it. A number changes for good in step 4, scratch moves before step 5,
/// and the times of step 6 are read after step 7.
fn steps_of_a_batch(repeating: bool) -> (Vec<f32>, Vec<u64>) {
    use kernels::{
        ops::{balance::bias_update, norm::sum_squares_acc},
        stream::Event,
    };
    let memory = gpu();
    let hazards = Arc::default();
    let mut a = Stream::new("a", &memory, &hazards).unwrap();
    let mut b = Stream::new("b", &memory, &hazards).unwrap();
    let floats = |n: usize, x: f32| memory.from_slice(&[n], &vec![x; n]);
    let [one, x, y, z, bias] = [1.0, 0.0, 0.0, 0.0, 0.5].map(|value| floats(300, value));
    let many = floats(40_000, 0.5);
    let (counts, acc) = (memory.from_slice(&[300], &[3u32; 300]), memory.from_slice(&[1], &[0f64]));
    memory.upload(counts.slice(0, 1), &[7u32]);
    let (mut late, mut nanos): (Vec<Event>, Vec<u64>) = (vec![], vec![]);
    for step in 0..9 {
        if step == 5 {
            sum_squares_acc(&mut a, many, acc).unwrap();
        }
        if repeating {
            a.start_repeating_batch(1);
        }
        let mut events = vec![];
        let mut task = |a: &mut Stream, name: &str, run: &dyn Fn(&mut Stream)| {
            a.begin_task(&Arc::from(name));
            events.push(a.record());
            run(a);
            events.push(a.record());
        };
        task(&mut a, "increments", &|a| (0..3).for_each(|_| increment(a, one, x)));
        task(&mut a, "squares", &|a| sum_squares_acc(a, x, acc).unwrap());
        let speed = if step < 4 { 0.25 } else { 0.125 };
        task(&mut a, "bias", &|a| bias_update(a, counts, speed, bias).unwrap());
        task(&mut a, "sums", &|a| {
            increment(a, x, y);
            increment(a, bias, y);
        });
        a.finish_batch();
        b.wait(&events[events.len() - 1]);
        add_acc(&mut b, y, z).unwrap();
        a.wait(&b.record());
        if step != 6 {
            // First this step's, so that it has run when those of the step before are read.
            let mine: Vec<u64> = events.iter().map(Event::synchronize).collect();
            nanos.extend(late.drain(..).map(|event| event.synchronize()));
            nanos.extend(mine);
        } else {
            late = events;
        }
    }
    a.synchronize().unwrap();
    b.synchronize().unwrap();
    let all = [x, y, z, bias].into_iter().flat_map(|t| memory.download::<f32>(t)).collect::<Vec<f32>>();
    (all.into_iter().chain([memory.download::<f64>(acc)[0] as f32]).collect(), nanos)
}

#[test]
#[ignore = "run by the test above it, in a process of its own whose driver is the stand-in; alone it would find this machine's"]
fn repeated() {
    let ((one_by_one, _), (as_graphs, nanos)) = (steps_of_a_batch(false), steps_of_a_batch(true));
    assert_eq!(one_by_one, as_graphs);
    assert_eq!(nanos.len(), 9 * 8);
    assert!(nanos.is_sorted(), "{nanos:?}");
}
