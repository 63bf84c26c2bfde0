//! Two ranks of which one is told to stop in the middle of a step.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
    time::Duration,
};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use kernels::{comm::Comm, dtype::DType, tensor::Tensor};

use crate::{control::ControlPlugin, prelude::*, step::StepIndex};

const WORK: TaskKind = TaskKind("work");
const MEET: TaskKind = TaskKind("meet");
const CHANGE: TaskKind = TaskKind("change");
/// Ops of a step, of 5 ms each after the first step.
const NUM_OPS: usize = 400;
const NUM_STEPS: u64 = 3;

#[derive(Component)]
struct Args(Tensor);

#[derive(Resource, Clone)]
struct Shared {
    comm: Comm,
    /// Of the rank that is told, in its second step.
    signal: Arc<AtomicUsize>,
    num_ops: Arc<AtomicUsize>,
}

fn work(In(id): In<Entity>, mut launch: Launch<Args>, shared: Res<Shared>, step: Res<StepIndex>) -> Result {
    let (_, &Args(x), stream) = launch.get(id)?;
    for i in 0..NUM_OPS {
        let (shared, step) = (shared.clone(), step.0);
        stream.launch(&[x], &[x], move |_| {
            shared.num_ops.fetch_add(1, Ordering::Relaxed);
            if step == 2 {
                thread::sleep(Duration::from_millis(5));
                if i == 3 && shared.comm.rank() == 1 {
                    shared.signal.store(15, Ordering::Relaxed);
                }
            }
        });
    }
    Ok(())
}

fn meet(In(id): In<Entity>, mut launch: Launch<Args>, shared: Res<Shared>) -> Result {
    let (_, &Args(x), stream) = launch.get(id)?;
    Ok(shared.comm.all_reduce_sum(stream, &shared.comm.everyone(), x, 1)?)
}

fn change(In(id): In<Entity>, mut launch: Launch<Args>) -> Result {
    let (_, &Args(total), stream) = launch.get(id)?;
    stream.launch(&[total], &[total], move |memory| memory.write::<f32>(total)[0] += 1.0);
    Ok(())
}

fn plan(world: &mut World) -> Result {
    let key = PlanKey("step".into());
    if world.resource_mut::<Plans>().activate(&key) {
        return Ok(());
    }
    let stream = Queue::spawn(world, 0, "compute")?;
    let mut tensors = world.resource_mut::<Tensors>();
    let [x, total] = ["x", "total"].map(|name| tensors.alloc_named(name, "state", DType::F32, &[1]));
    let mut graph = GraphBuilder::new();
    graph.push_recorded(world, Task::new(WORK, stream, "work"), Args(x))?;
    graph.push_recorded(world, Task::new(MEET, stream, "meet"), Args(x))?;
    graph.gate();
    graph.push_recorded(world, Task::new(CHANGE, stream, "change"), Args(total))?;
    let graph = graph.build(world)?;
    world.resource_mut::<Plans>().insert(key, graph);
    Ok(())
}

/// What a rank ends with: why, after how many steps, of which how many changed something, and how many ops it ran.
fn run_rank(comm: Comm, signal: Arc<AtomicUsize>, finish_step: Duration) -> (ExitReason, u64, f32, usize) {
    let num_ops = Arc::<AtomicUsize>::default();
    let mut app = App::new();
    app.add_plugins((
        EnginePlugin::default(),
        ControlPlugin {
            name: "r".into(),
            comm: comm.clone(),
            inbox: None,
            feeds_are_apart: false,
            signal: signal.clone(),
            finish_step,
            note: Arc::new(|_| {}),
        },
    ))
    .insert_resource(Shared { comm: comm.clone(), signal, num_ops: num_ops.clone() })
    .on_task(WORK, work)
    .on_task(MEET, meet)
    .on_task(CHANGE, change)
    .add_systems(Step, plan.in_set(StepSystems::Plan))
    .add_systems(
        Step,
        (|step: Res<StepIndex>, mut exit: ResMut<Exit>| {
            if step.0 == NUM_STEPS {
                exit.stop(ExitReason::Finished);
            }
        })
        .in_set(StepSystems::Keep),
    );
    let reason = crate::app::run(&mut app);
    // What the host brings to others goes on.
    comm.barrier().unwrap();
    let world = app.world();
    let tensors = world.resource::<Tensors>();
    let total = tensors.memory().download::<f32>(tensors.get("total").unwrap())[0];
    (reason, world.resource::<StepIndex>().0, total, num_ops.load(Ordering::Relaxed))
}

/// Both ranks, which hear of the same signals.
fn run(finish_step: Duration) -> Vec<(ExitReason, u64, f32, usize)> {
    let signal = Arc::<AtomicUsize>::default();
    let ended = Mutex::new(Vec::new());
    thread::scope(|scope| {
        for comm in Comm::local(2, 2) {
            let (signal, ended) = (signal.clone(), &ended);
            scope.spawn(move || {
                let ran = run_rank(comm, signal, finish_step);
                ended.lock().unwrap().push(ran);
            });
        }
    });
    ended.into_inner().unwrap()
}

#[test]
fn a_step_that_takes_too_long_is_given_up_before_it_changes_anything() {
    for (reason, num_steps, changed, num_ops) in run(Duration::ZERO) {
        assert_eq!((reason, num_steps, changed), (ExitReason::Signal(15), 1, 1.0));
        assert!((NUM_OPS + 1..2 * NUM_OPS).contains(&num_ops), "{num_ops} ops");
    }
}

#[test]
fn a_step_that_ends_soon_is_finished() {
    for (reason, num_steps, changed, num_ops) in run(Duration::from_secs(600)) {
        assert_eq!((reason, num_steps, changed), (ExitReason::Signal(15), 2, 2.0));
        assert_eq!(num_ops, 2 * NUM_OPS);
    }
}
