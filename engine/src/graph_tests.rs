//! Edges from buffers, the waits that remain, and the refusal of deadlocks.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use kernels::{device::Device, dtype::DType, memory::Memory, tensor::Tensor};

use super::*;
use crate::tensors::Tensors;

struct Bench {
    world: World,
    streams: [Entity; 3],
    buffers: Vec<Tensor>,
    builder: GraphBuilder,
    tasks: Vec<Entity>,
}

impl Bench {
    fn new() -> Self {
        let mut world = World::new();
        world.insert_resource(Tensors::new(Memory::new(Device::Meta)));
        world.init_resource::<Plans>();
        let streams = ["a", "b", "c"].map(|name| Queue::spawn(&mut world, 0, name).unwrap());
        let buffers = (0..6).map(|_| world.resource_mut::<Tensors>().alloc("test", DType::F32, &[1])).collect();
        Bench { world, streams, buffers, builder: GraphBuilder::new(), tasks: Vec::new() }
    }

    /// A task written as `stream reads>writes`, as in `a 01>2`; its label is its number in launch order.
    fn push(&mut self, text: &str) -> Entity {
        let (stream, access) = text.split_once(' ').unwrap();
        let (reads, writes) = access.split_once('>').unwrap();
        let tensors = |digits: &str| -> Vec<Tensor> {
            digits.bytes().map(|digit| self.buffers[usize::from(digit - b'0')]).collect()
        };
        let stream = self.streams[usize::from(stream.as_bytes()[0] - b'a')];
        let task = Task::new(TaskKind("t"), stream, self.tasks.len().to_string());
        let task = task.reads(&tensors(reads)).writes(&tensors(writes));
        let entity = self.builder.push(&mut self.world, task, ());
        self.tasks.push(entity);
        entity
    }

    fn build(&mut self) -> Result<Graph> {
        std::mem::take(&mut self.builder).build(&self.world)
    }
}

#[test]
fn waits_follow_from_buffers_and_only_needed_ones_stay() {
    type Case = (&'static str, &'static [&'static str], &'static [&'static [u32]]);
    let cases: [Case; 9] = [
        ("read after write", &["a >0", "b 0>"], &[&[], &[0]]),
        ("write after read", &["a >0", "a 0>", "b >0"], &[&[], &[], &[1]]),
        ("write after write", &["a >0", "b >0"], &[&[], &[0]]),
        ("two readers do not wait for each other", &["a 0>", "b 0>"], &[&[], &[]]),
        ("a FIFO needs no wait", &["a >0", "a 0>1", "a 1>2"], &[&[], &[], &[]]),
        ("the latest of one stream is enough", &["a >0", "a >1", "b 01>"], &[&[], &[], &[1]]),
        ("what the FIFO before waited for is known", &["a >0", "b 0>1", "b 0>2"], &[&[], &[0], &[]]),
        ("a wait through a third stream is enough", &["a >0", "b 0>1", "c 01>"], &[&[], &[0], &[1]]),
        ("an update reads and writes", &["a >0", "b 0>0", "a 0>"], &[&[], &[0], &[1]]),
    ];
    for (name, tasks, deps) in cases {
        let mut bench = Bench::new();
        for task in tasks {
            bench.push(task);
        }
        let graph = bench.build().unwrap();
        assert_eq!(graph.deps, deps, "{name}");
        assert_eq!(graph.order, bench.tasks, "{name}");
    }
}

#[test]
fn explicit_edges_are_waits_too() {
    let mut bench = Bench::new();
    let send = bench.push("a >0");
    let receive = bench.push("b >1");
    bench.builder.after(receive, send);
    assert_eq!(bench.build().unwrap().deps, [vec![], vec![0]]);
}

#[test]
fn deadlocks_are_reported_by_label_before_anything_runs() {
    type Edges = &'static [(usize, usize)];
    let cases: [(&str, &[&str], Edges, &str); 4] = [
        (
            "two sends that wait for each other's receive",
            &["a >0", "b >1", "a >2", "b >3"],
            &[(0, 3), (1, 2)],
            "deadlock: `0` waits for `3`, which waits for `1`, which waits for `2`, which waits for `0`",
        ),
        ("through a buffer", &["a >0", "b 0>1"], &[(0, 1)], "deadlock: `0` waits for `1`, which waits for `0`"),
        ("on itself", &["a >0"], &[(0, 0)], "deadlock: `0` waits for `0`"),
        (
            "only the order is wrong",
            &["a >0", "b >1"],
            &[(0, 1)],
            "task `0` waits for `1`, which is launched after it: push `1` first",
        ),
    ];
    for (name, tasks, edges, message) in cases {
        let mut bench = Bench::new();
        for task in tasks {
            bench.push(task);
        }
        for &(task, dependency) in edges {
            bench.builder.after(bench.tasks[task], bench.tasks[dependency]);
        }
        assert_eq!(bench.build().unwrap_err().to_string(), message, "{name}");
    }
}

#[test]
fn strangers_are_refused() {
    let mut bench = Bench::new();
    let task = bench.push("a >0");
    let stranger = bench.world.spawn_empty().id();
    bench.builder.after(task, stranger);
    assert!(matches!(bench.build(), Err(Error::UnknownTask { .. })));

    let lost = Task::new(TaskKind("t"), stranger, "lost");
    bench.builder.push(&mut bench.world, lost, ());
    let message = bench.build().unwrap_err().to_string();
    assert!(message.starts_with("task `lost` is on "), "{message}");
}

#[test]
fn simulated_times_respect_streams_and_waits() {
    let mut bench = Bench::new();
    for task in ["a >0", "b 0>1", "a >2", "a 1>3"] {
        bench.push(task);
    }
    let times = bench.build().unwrap().simulate(&[5, 10, 3, 1], 100);
    assert_eq!(times, [(100, 105), (105, 115), (105, 108), (115, 116)]);
}

#[test]
fn kept_waits_imply_every_derived_edge() {
    // Random graphs: under adversarial durations, no task starts before all that it depends on has ended.
    let mut state = 7u64;
    let mut random = |n: u64| {
        state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
        (state >> 33) % n
    };
    for _ in 0..200 {
        let mut bench = Bench::new();
        for _ in 0..30 {
            let stream = ["a", "b", "c"][random(3) as usize];
            let text = format!("{stream} {}>{}", random(6), random(6));
            bench.push(&text);
        }
        let raw = bench.builder.deps.clone();
        let graph = bench.build().unwrap();
        let durations: Vec<u64> = (0..30).map(|_| random(100)).collect();
        let times = graph.simulate(&durations, 0);
        for (task, deps) in raw.iter().enumerate() {
            for &dep in deps {
                assert!(times[dep as usize].1 <= times[task].0, "{task} starts before {dep} ends");
            }
        }
        let (kept, derived): (usize, usize) = (graph.deps.iter().map(Vec::len).sum(), raw.iter().map(Vec::len).sum());
        assert!(kept < derived, "some edge is always implied here");
    }
}

#[test]
fn a_plan_is_despawned_with_its_tasks() {
    let mut bench = Bench::new();
    let task = bench.push("a >0");
    let graph = bench.build().unwrap();
    let key = PlanKey("4 microbatches".into());
    bench.world.resource_mut::<Plans>().insert(key.clone(), graph);
    assert!(bench.world.resource::<Plans>().active_graph().unwrap().is_some());
    assert!(Plans::despawn(&mut bench.world, &key));
    assert!(bench.world.get_entity(task).is_err());
    assert!(bench.world.resource::<Plans>().active.is_none());
    assert!(!Plans::despawn(&mut bench.world, &key));

    bench.world.resource_mut::<Plans>().active = Some(key);
    let message = bench.world.resource::<Plans>().active_graph().unwrap_err().to_string();
    assert!(message.contains("`4 microbatches`"), "{message}");
}
