//! Whole apps of two streams and three kinds of tasks, under both clocks.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use kernels::{cost::Cost, dtype::DType, stream::Rendezvous, tensor::Tensor};

use super::*;
use crate::{
    bubbles::BubbleCause,
    hardware::{Format, Sourced, tests::spec},
    joint::{RankTasks, simulate_ranks},
    prelude::*,
};

const FILL: TaskKind = TaskKind("fill");
const ADD: TaskKind = TaskKind("add");
const SUM: TaskKind = TaskKind("sum");

#[derive(Component)]
struct FillArgs {
    out: Tensor,
    value: f32,
}

#[derive(Component)]
struct AddArgs {
    x: Tensor,
    y: Tensor,
}

fn fill(In(id): In<Entity>, mut launch: Launch<FillArgs>) -> Result {
    let (_, &FillArgs { out, value }, stream) = launch.get(id)?;
    stream.launch(&[], &[out], move |memory| memory.write::<f32>(out).fill(value));
    Ok(())
}

/// y += x
fn add(In(id): In<Entity>, mut launch: Launch<AddArgs>) -> Result {
    let (_, &AddArgs { x, y }, stream) = launch.get(id)?;
    stream.launch(&[x, y], &[y], move |memory| {
        let x = memory.read::<f32>(x);
        memory.write::<f32>(y).iter_mut().zip(x.iter()).for_each(|(y, x)| *y += x);
    });
    Ok(())
}

/// y\[0\] = sum of x
fn sum(In(id): In<Entity>, mut launch: Launch<AddArgs>, step: Res<StepIndex>) -> Result {
    let (_, &AddArgs { x, y }, stream) = launch.get(id)?;
    let step = step.0 as f32;
    stream.launch(&[x], &[y], move |memory| {
        memory.write::<f32>(y)[0] = memory.read::<f32>(x).iter().sum::<f32>() + 1000.0 * step;
    });
    Ok(())
}

/// On two streams: x = 1 | y = 2, total += x | total += y, out = sum(total). `total` lives from step to step.
fn plan(world: &mut World) -> Result {
    let key = PlanKey("one".into());
    if world.resource::<Plans>().contains(&key) {
        return Ok(());
    }
    let compute = Queue::spawn(world, 0, "compute")?;
    let comm = Queue::spawn(world, 0, "comm")?;
    let mut tensors = world.resource_mut::<Tensors>();
    let mut tensor = |name, len| tensors.alloc_named(name, "activations", DType::F32, &[len]);
    let (x, y, total, out) = (tensor("x", 8), tensor("y", 8), tensor("total", 8), tensor("out", 1));
    let (mut graph, cost) = (GraphBuilder::new(), Cost::stream(1000, 0, 0));
    let task = |kind, stream, label: &str| Task::new(kind, stream, label).cost(cost);
    graph.push(world, task(FILL, compute, "fill x").writes(&[x]), FillArgs { out: x, value: 1.0 });
    graph.push(world, task(FILL, comm, "fill y").writes(&[y]), FillArgs { out: y, value: 2.0 });
    graph.push(world, task(ADD, compute, "add x").reads(&[x, total]).writes(&[total]), AddArgs { x, y: total });
    graph.push(world, task(ADD, comm, "add y").reads(&[y, total]).writes(&[total]), AddArgs { x: y, y: total });
    let last = task(SUM, compute, "sum").pass(Pass::Forward).layer(3).microbatch(1).stage(2);
    graph.push(world, last.reads(&[total]).writes(&[out]), AddArgs { x: total, y: out });
    let graph = graph.build(world)?;
    world.resource_mut::<Plans>().insert(key, graph);
    Ok(())
}

#[derive(Resource, Default)]
struct Outs(Vec<f32>);

fn app(clock: Clock, num_steps: u64) -> App {
    let mut app = App::new();
    app.add_plugins(EnginePlugin { clock }).init_resource::<Outs>();
    app.on_task(FILL, fill).on_task(ADD, add).on_task(SUM, sum);
    app.add_systems(Step, plan.in_set(StepSystems::Plan));
    app.add_systems(
        Step,
        (move |step: Res<StepIndex>, tensors: Res<Tensors>, mut exit: ResMut<Exit>, mut outs: ResMut<Outs>| {
            if tensors.memory().device() == kernels::device::Device::Cpu {
                outs.0.extend(tensors.memory().download::<f32>(tensors.get("out").unwrap()));
            }
            if step.0 == num_steps {
                exit.stop(ExitReason::Finished);
            }
        })
        .in_set(StepSystems::Keep),
    );
    app
}

/// A device on which 1000 operations take a nanosecond, and so does a launch times 4.
fn clock() -> Clock {
    let launch_secs = Sourced::new(4e-9, "test");
    Clock::Virtual { device: Box::new(DeviceSpec { launch_secs, ..spec() }), format: Format::F32 }
}

#[test]
fn three_steps_on_two_streams_give_the_right_numbers() {
    let mut app = app(Clock::Wall, 3);
    assert_eq!(crate::app::run(&mut app), ExitReason::Finished);
    assert_eq!(app.world().resource::<Outs>().0, [1024.0, 2048.0, 3072.0]);

    let snapshot = app.world().resource::<Telemetry>().last().unwrap().clone();
    let labels: Vec<&str> = snapshot.spans.iter().map(|span| &*span.label).collect();
    assert_eq!(labels, ["fill x", "fill y", "add x", "add y", "sum"]);
    for (task, dep) in [(2, 0), (3, 1), (3, 2), (4, 2), (4, 3)] {
        let (task, dep) = (&snapshot.spans[task], &snapshot.spans[dep]);
        assert!(dep.end_nanos <= task.start_nanos, "{} starts before {} ends", task.label, dep.label);
    }
    let sum = &snapshot.spans[4];
    assert_eq!((sum.pass, sum.layer, sum.microbatch, sum.stage), (Some(Pass::Forward), Some(3), Some(1), 2));
    assert_eq!(sum.waited_for, Some(3));
    let scalar = |name: &str| snapshot.scalar(name).unwrap();
    let busy_secs = scalar("busy_secs/stream/compute") + scalar("busy_secs/stream/comm");
    assert!(scalar("step_secs") >= scalar("overhead_secs") && scalar("step_secs") > 0.0);
    assert!(busy_secs + scalar("overhead_secs") >= scalar("step_secs") * 0.999);
    let by_cause = BubbleCause::ALL.map(|cause| scalar(&format!("bubble_secs/{cause}")));
    let idle_secs = by_cause.iter().sum::<f64>();
    assert!((idle_secs + scalar("busy_secs/stream/compute") - scalar("step_secs")).abs() < 1e-12);
    assert!((idle_secs / scalar("step_secs") - scalar("idle_fraction")).abs() < 1e-9);
}

#[test]
fn the_same_graph_under_a_virtual_clock_gives_computed_times() {
    let mut app = app(clock(), 2);
    assert_eq!(crate::app::run(&mut app), ExitReason::Finished);
    // Each task takes 1000 / 1e12 s + 4 ns = 5 ns; the second step begins when the first ends.
    let snapshot = app.world().resource::<Telemetry>().last().unwrap().clone();
    let times: Vec<_> = snapshot.spans.iter().map(|span| (span.start_nanos - 20, span.end_nanos - 20)).collect();
    assert_eq!(times, [(0, 5), (0, 5), (5, 10), (10, 15), (15, 20)]);
    assert_eq!(snapshot.scalar("step_secs"), Some(20.0 * 1e-9));
    assert_eq!(snapshot.scalar("overhead_secs"), Some(0.0));
    // From 10 to 15 compute waits for the other stream, before its only task that is part of a pass.
    assert_eq!((snapshot.interval_nanos, snapshot.scalar("idle_fraction")), ((20, 40), Some(0.25)));
    for cause in BubbleCause::ALL {
        let secs = if cause == BubbleCause::WarmUp { 5.0 * 1e-9 } else { 0.0 };
        assert_eq!(snapshot.scalar(&format!("bubble_secs/{cause}")), Some(secs), "{cause}");
    }
    assert_eq!(app.world().resource::<Tensors>().peak_bytes(), 100);
}

fn fails(break_it: impl FnOnce(&mut App)) -> ExitReason {
    let mut app = app(Clock::Wall, 3);
    break_it(&mut app);
    crate::app::run(&mut app)
}

/// Adds a task of kind `X` in front of the plan.
fn with_extra_task(app: &mut App) {
    fn plan_more(world: &mut World) -> Result {
        let stream = Queue::spawn(world, 0, "compute")?;
        let mut graph = GraphBuilder::new();
        graph.push(world, Task::new(TaskKind("x"), stream, "the x of layer 3"), ());
        let graph = graph.build(world)?;
        world.resource_mut::<Plans>().insert(PlanKey("x".into()), graph);
        Ok(())
    }
    app.add_systems(Step, plan_more.in_set(StepSystems::Plan).after(plan));
}

#[test]
fn failures_of_tasks_name_them() {
    let missing = fails(with_extra_task).to_string();
    assert_eq!(
        missing,
        "task `the x of layer 3` is of kind `x`, which no plugin handles; register it with `app.on_task`"
    );

    type Handler = fn(In<Entity>, Query<&mut Queue>, Query<&Task>) -> Result;
    let cases: [(Handler, &str); 3] = [
        (|_, _, _| Err("shapes differ".into()), "task `the x of layer 3`: shapes differ"),
        (|_, _, _| panic!("index 9"), "task `the x of layer 3` panicked while it was launched: index 9"),
        (
            |In(id), mut queues, tasks| {
                let stream = &mut queues.get_mut(tasks.get(id)?.stream)?.into_inner().stream;
                stream.launch(&[], &[], |_| panic!("out of range"));
                Ok(())
            },
            "task `the x of layer 3` failed on stream `compute`: out of range",
        ),
    ];
    for (handler, message) in cases {
        let reason = fails(|app| {
            with_extra_task(app);
            app.on_task(TaskKind("x"), handler);
        });
        assert_eq!(reason, ExitReason::Error(message.into()));
    }
}

#[test]
fn a_handler_that_lacks_its_arguments_is_an_error() {
    let reason = fails(|app| {
        with_extra_task(app);
        app.on_task(TaskKind("x"), add);
    });
    let message = reason.to_string();
    assert!(message.starts_with("task `the x of layer 3`: "), "{message}");
}

/// Prints what a task costs the host beyond its handler; asserts only what a loaded machine meets too.
#[test]
fn launching_a_task_costs_microseconds() {
    const NUM_TASKS: usize = 2000;
    fn nothing(_: In<Entity>) -> Result {
        Ok(())
    }
    fn plan(world: &mut World) -> Result {
        if world.resource::<Plans>().active.is_some() {
            return Ok(());
        }
        let streams = [Queue::spawn(world, 0, "compute")?, Queue::spawn(world, 0, "comm")?];
        let mut graph = GraphBuilder::new();
        for i in 0..NUM_TASKS {
            graph.push(world, Task::new(ADD, streams[i / 8 % 2], format!("task {i}")), ());
        }
        let graph = graph.build(world)?;
        world.resource_mut::<Plans>().insert(PlanKey("n".into()), graph);
        Ok(())
    }
    #[derive(Resource, Default)]
    struct HostNanos(Vec<u64>);
    for clock in [Clock::Wall, clock()] {
        let mut app = App::new();
        app.add_plugins(EnginePlugin { clock: clock.clone() }).init_resource::<HostNanos>();
        app.on_task(ADD, nothing);
        let start = |mut nanos: ResMut<HostNanos>| nanos.0.push(now_nanos());
        let stop = |mut nanos: ResMut<HostNanos>| {
            let last = nanos.0.last_mut().unwrap();
            *last = now_nanos() - *last;
        };
        app.add_systems(
            Step,
            (
                plan.in_set(StepSystems::Plan),
                start.in_set(StepSystems::Plan).after(plan),
                stop.in_set(StepSystems::Dispatch).after(dispatch),
            ),
        );
        for _ in 0..20 {
            app.update();
        }
        let nanos = *app.world().resource::<HostNanos>().0.iter().min().unwrap() as f64 / NUM_TASKS as f64;
        eprintln!("dispatch under {clock:?}: {nanos:.0} ns of host time per task");
        assert!(nanos < 50_000.0);
    }
}

#[test]
fn ranks_meet_by_what_their_handlers_record() {
    #[derive(Component)]
    struct Meets(Vec<Rendezvous>);
    fn meet(In(id): In<Entity>, mut launch: Launch<Meets>) -> Result {
        let (_, Meets(meetings), stream) = launch.get(id)?;
        meetings.iter().for_each(|meeting| stream.meet(|| meeting.clone()));
        stream.account(Cost { intra_node_bytes: 20_000, ..Cost::default() });
        Ok(())
    }
    let (device, clock) = (spec(), clock());
    let tasks = |rank: u32, meetings: Vec<Vec<Rendezvous>>| {
        let mut app = App::new();
        app.add_plugins(EnginePlugin { clock: clock.clone() }).on_task(ADD, meet);
        let world = app.world_mut();
        let (stream, mut graph) = (Queue::spawn(world, rank, "comm").unwrap(), GraphBuilder::new());
        for (i, meetings) in meetings.iter().enumerate() {
            let task = Task::new(ADD, stream, format!("task {i}"));
            graph.push_recorded(world, task, Meets(meetings.clone())).unwrap();
        }
        let graph = graph.build(world).unwrap();
        let met: Vec<_> = (0..).zip(meetings).flat_map(|(i, all)| all.into_iter().map(move |one| (i, one))).collect();
        assert_eq!(graph.rendezvous, met);
        let nanos = graph.costs().map(|(kind, cost)| device.task_nanos(kind.0, cost, Format::F32));
        RankTasks::of(rank, &graph, &nanos.collect::<Result<Vec<_>, Error>>().unwrap())
    };
    let (send, receive) = (Rendezvous::Send { to: 1, tag: 4 }, Rendezvous::Receive { from: 0, tag: 4 });
    let all = Rendezvous::Collective { group: [0, 1].into(), tag: 0 };
    let ranks = [tasks(0, vec![vec![], vec![send], vec![all.clone()]]), tasks(1, vec![vec![receive], vec![all]])];
    // 2 us for the launch, 1 us for the latency, 2 us for the bytes.
    let ends = simulate_ranks(&ranks).unwrap().into_iter().map(|times| times.into_iter().map(|time| time.end_nanos));
    assert_eq!(ends.map(Vec::from_iter).collect::<Vec<_>>(), [vec![5_000, 10_000, 15_000], vec![10_000, 15_000]]);
}
