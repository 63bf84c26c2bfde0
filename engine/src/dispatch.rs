//! Dispatch: goes through the active graph once, in its order, and later collects when everything ran.
//!
//! Under the wall clock the host enqueues and runs ahead; streams wait for each other through events, and the host waits only
//! in [`collect`]. Under the virtual clock nothing is launched: times follow from costs.

use std::{
    mem,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::Arc,
};

use bevy_ecs::{
    error::ContextExt as _,
    prelude::*,
    system::{BoxedSystem, RunSystemError},
};
use kernels::{
    clock::now_nanos,
    comm::Comm,
    stream::{Event, Recording, Waited},
};

use crate::{
    bubbles,
    clock::Clock,
    control::gate,
    error::{Error, panic_message},
    graph::{Graph, Plans},
    stream::{Queue, RepeatsTasks},
    task::{Task, TaskKind},
    telemetry::{Span, StepTimes, Telemetry},
};

/// The way to other ranks, where messages are under way only while this process attends to them: dispatch does, between tasks.
#[derive(Resource)]
pub struct Peers(pub Comm);

type Handler = BoxedSystem<In<Entity>, Result>;

/// One handler per kind of task.
#[derive(Resource, Default)]
pub(crate) struct Handlers {
    kinds: Vec<TaskKind>,
    systems: Vec<Handler>,
}

impl Handlers {
    pub(crate) fn insert(&mut self, kind: TaskKind, handler: Handler) {
        assert!(!self.kinds.contains(&kind), "tasks of kind `{kind}` have a handler already");
        self.kinds.push(kind);
        self.systems.push(handler);
    }

    /// Index of the handler of each kind in `graph`.
    fn resolve(&self, graph: &Graph) -> Result<Vec<usize>, Error> {
        let missing = |i: usize, kind| {
            let task = graph.kind_of.iter().position(|&k| k as usize == i).unwrap_or(0);
            Error::MissingHandler { kind, task: graph.spans[task].label.clone() }
        };
        let find =
            |(i, kind): (usize, &TaskKind)| self.kinds.iter().position(|k| k == kind).ok_or_else(|| missing(i, *kind));
        graph.kinds.iter().enumerate().map(find).collect()
    }
}

/// Times of the step in flight.
#[derive(Resource, Default)]
pub(crate) struct Timeline {
    begin_nanos: u64,
    /// Whether Dispatch ran to its end in this step.
    dispatched: bool,
    /// End of the step before, once there was one.
    previous_end_nanos: Option<u64>,
    graph: Option<Arc<Graph>>,
    /// Wall clock: start and end of each task, to be reached.
    events: Vec<(Event, Event)>,
    /// Virtual clock: start and end of each task.
    times: Vec<(u64, u64)>,
}

impl Timeline {
    pub(crate) fn begin(&mut self, clock: &Clock) {
        self.begin_nanos = match clock {
            Clock::Wall => now_nanos(),
            Clock::Virtual { .. } => self.previous_end_nanos.unwrap_or(0),
        };
        self.dispatched = false;
        self.graph = None;
        self.events.clear();
        self.times.clear();
    }

    pub(crate) fn dispatched(&self) -> bool {
        self.dispatched
    }

    /// Waits for all tasks; start and end of each, and what it waited for other ranks in between.
    fn resolve(&mut self) -> Vec<(u64, u64, Waited)> {
        if self.events.is_empty() {
            return self.times.drain(..).map(|(start, end)| (start, end, Waited::default())).collect();
        }
        // A stream reaches the end of a task after its start; a device's clock may be read a little late for one of them.
        let times = self.events.drain(..).map(|(start, end)| {
            let end_nanos = end.synchronize();
            (start.done_nanos().map_or(end_nanos, |nanos| nanos.min(end_nanos)), end_nanos, end.waited())
        });
        times.collect()
    }
}

/// Launches the active graph, or computes its times.
pub(crate) fn dispatch(world: &mut World) -> Result {
    let graph = world.resource::<Plans>().active_graph()?.cloned();
    let dispatched = graph.map_or(Ok(true), |graph| dispatch_graph(world, graph))?;
    world.resource_mut::<Timeline>().dispatched = dispatched;
    Ok(())
}

/// Whether it was launched to its end: a step may be given up at its gate.
fn dispatch_graph(world: &mut World, graph: Arc<Graph>) -> Result<bool> {
    let spec = match world.resource::<Clock>() {
        Clock::Wall => None,
        Clock::Virtual { device, format } => Some((device.clone(), *format)),
    };
    world.resource_scope(|world, mut timeline: Mut<Timeline>| {
        timeline.graph = Some(graph.clone());
        match spec {
            Some((device, format)) => {
                let nanos = graph.costs().map(|(kind, cost)| device.task_nanos(kind.0, cost, format));
                timeline.times = graph.simulate(&nanos.collect::<Result<Vec<_>, Error>>()?, timeline.begin_nanos);
                Ok(true)
            }
            None => world.resource_scope(|world, mut handlers: Mut<Handlers>| {
                launch(world, &graph, &mut handlers, &mut timeline.events)
            }),
        }
    })
}

fn launch(world: &mut World, graph: &Graph, handlers: &mut Handlers, events: &mut Vec<(Event, Event)>) -> Result<bool> {
    let handler_of_kind = handlers.resolve(graph)?;
    order_streams(world);
    events.reserve(graph.order.len());
    // With one stream nobody else waits for its events, so its ops may be handed over in batches.
    let repeats = world.get_resource::<RepeatsTasks>().is_some_and(|repeats| repeats.0);
    let alone = graph.streams.first().copied().filter(|_| graph.streams.len() == 1 && !repeats);
    let start = |world: &mut World| {
        if let Some(mut queue) = alone.and_then(|stream| world.get_mut::<Queue>(stream)) {
            queue.stream.start_batch();
        }
    };
    start(world);
    let finish = |world: &mut World, on: usize| {
        if let Some(mut queue) = world.get_mut::<Queue>(graph.streams[on]) {
            queue.stream.finish_batch();
        }
    };
    let peers = world.get_resource::<Peers>().map(|peers| peers.0.clone());
    let mut held = vec![false; graph.streams.len()];
    let mut task = 0;
    let mut seen = gate::Seen::default();
    // One guard around the whole loop: a handler's panic names the task that was being launched.
    let launched = catch_unwind(AssertUnwindSafe(|| -> Result<bool> {
        loop {
            // The host runs ahead, but not for ever: of a long step it may be here until the end.
            if graph.gate.is_some_and(|gate| task == gate || (task < gate && gate::is_called(world, &mut seen))) {
                (0..graph.streams.len()).for_each(|on| finish(world, on));
                held.fill(false);
                if !gate::passes(world, events, &mut seen)? {
                    return Ok(false);
                }
                start(world);
            }
            if task == graph.order.len() {
                return Ok(true);
            }
            let handler = handler_of_kind[graph.kind_of[task] as usize];
            let on = graph.stream_of[task] as usize;
            if repeats
                && !mem::replace(&mut held[on], true)
                && let Some(mut queue) = world.get_mut::<Queue>(graph.streams[on])
            {
                queue.stream.start_repeating_batch(graph.id << 32 | task as u64);
            }
            if let Some(peers) = &peers {
                peers.watch().enter_host(graph.kinds[graph.kind_of[task] as usize].0);
            }
            launch_task(world, graph, task, &mut handlers.systems[handler], events)?;
            peers.as_ref().map_or(Ok(()), Comm::progress)?;
            if repeats && graph.hands_over[task] {
                finish(world, on);
                held[on] = false;
            }
            task += 1;
        }
    }));
    // Also after a failure: what was launched runs, and its events are reached.
    (0..graph.streams.len()).for_each(|on| finish(world, on));
    launched.unwrap_or_else(|payload| {
        let task = graph.spans.get(task).map_or_else(|| "the gate".into(), |span| span.label.clone());
        Err(Error::Panicked { task, message: panic_message(&*payload) }.into())
    })
}

fn launch_task(
    world: &mut World,
    graph: &Graph,
    task: usize,
    handler: &mut Handler,
    events: &mut Vec<(Event, Event)>,
) -> Result {
    let label = &graph.spans[task].label;
    let on = graph.streams[graph.stream_of[task] as usize];
    let no_stream = || Error::NoStream { task: label.clone(), stream: on.to_string() };
    let stream = &mut world.get_mut::<Queue>(on).ok_or_else(no_stream)?.into_inner().stream;
    for &dep in &graph.deps[task] {
        stream.wait(&events[dep as usize].1);
    }
    stream.begin_task(label);
    let start = stream.record();
    let in_task = || format!("task `{label}`");
    match handler.run(graph.order[task], world) {
        Ok(result) => result.with_context(in_task)?,
        Err(RunSystemError::Failed(error)) => return Err(error).with_context(in_task),
        Err(RunSystemError::Skipped(reason)) => {
            let kind = graph.kinds[graph.kind_of[task] as usize];
            return Err(Error::Skipped { kind, task: label.clone(), reason: reason.to_string() }.into());
        }
    }
    let end = world.get_mut::<Queue>(on).ok_or_else(no_stream)?.stream.record();
    events.push((start, end));
    Ok(())
}

/// What the ops of a task touch and cost: its handler runs, its ops do not.
pub(crate) fn record(world: &mut World, task: Entity) -> Result<Recording> {
    let (kind, on, label) = {
        let task = world.get_entity(task)?.get_components::<&Task>()?;
        (task.kind, task.stream, task.label.clone())
    };
    world.resource_scope(|world, mut handlers: Mut<Handlers>| {
        let missing = || Error::MissingHandler { kind, task: label.clone() };
        let handler = handlers.kinds.iter().position(|k| *k == kind).ok_or_else(missing)?;
        let no_stream = || Error::NoStream { task: label.clone(), stream: on.to_string() };
        world.get_mut::<Queue>(on).ok_or_else(no_stream)?.stream.start_recording();
        let launched = handlers.systems[handler].run(task, world);
        let recording = world.get_mut::<Queue>(on).ok_or_else(no_stream)?.stream.finish_recording();
        match launched {
            Ok(result) => result.with_context(|| format!("task `{label}`"))?,
            Err(RunSystemError::Failed(error)) => return Err(error).with_context(|| format!("task `{label}`")),
            Err(RunSystemError::Skipped(reason)) => {
                return Err(Error::Skipped { kind, task: label.clone(), reason: reason.to_string() }.into());
            }
        }
        Ok(recording)
    })
}

/// Puts all that was enqueued so far, on any stream, before what this step launches: a graph knows nothing of the steps
/// before it.
fn order_streams(world: &mut World) {
    let mut queues = world.query::<&mut Queue>();
    let events: Vec<Event> = queues.iter_mut(world).map(|mut queue| queue.stream.record()).collect();
    for (i, mut queue) in queues.iter_mut(world).enumerate() {
        for (_, event) in events.iter().enumerate().filter(|(j, _)| *j != i) {
            queue.stream.wait(event);
        }
    }
}

/// Waits for the step's tasks and opens its record. An op that failed on a stream fails the step here.
pub(crate) fn collect(
    clock: Res<Clock>,
    mut timeline: ResMut<Timeline>,
    mut telemetry: ResMut<Telemetry>,
    queues: Query<&Queue>,
) -> Result {
    let times = timeline.resolve();
    for queue in &queues {
        queue.stream.failure()?;
    }
    let end_nanos = match *clock {
        Clock::Wall => now_nanos(),
        Clock::Virtual { .. } => times.iter().map(|(_, end, _)| *end).max().unwrap_or(timeline.begin_nanos),
    };
    let spans: Arc<[Span]> = match timeline.graph.take() {
        None => Arc::default(),
        Some(graph) => {
            let span =
                |((span, deps), &(start_nanos, end_nanos, waited)): ((&Span, &Vec<u32>), &(u64, u64, Waited))| Span {
                    start_nanos,
                    end_nanos,
                    waited_for: deps.iter().copied().max_by_key(|&dep| times[dep as usize].1),
                    wait_nanos: waited.nanos.min(end_nanos - start_nanos),
                    load: waited.load,
                    ..span.clone()
                };
            graph.spans.iter().zip(&graph.deps).zip(&times).map(span).collect()
        }
    };
    let mut accounts = StepTimes::of(&spans, timeline.begin_nanos, end_nanos);
    let previous = timeline.previous_end_nanos.unwrap_or(timeline.begin_nanos);
    accounts.between_secs = (timeline.begin_nanos - previous) as f64 * 1e-9;
    timeline.previous_end_nanos = Some(end_nanos);
    let interval_nanos = (timeline.begin_nanos, end_nanos);
    let idle = bubbles::account(&spans, bubbles::is_compute, interval_nanos);
    telemetry.open(spans, interval_nanos, accounts, idle);
    Ok(())
}

#[cfg(test)]
#[path = "dispatch_tests.rs"]
mod tests;
