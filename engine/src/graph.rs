//! From tasks in launch order to a graph: which task waits for which, and proof that none waits forever.
//!
//! Edges come from the buffers that tasks read and write, plus explicit ones for what buffers cannot say. Of those, only the
//! edges that no stream's FIFO and no other wait already implies are kept. The order is the caller's, so every rank that
//! pushes the same tasks launches them alike.

use std::{
    collections::{BTreeMap, HashMap, VecDeque},
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
};

use bevy_ecs::prelude::*;
use kernels::{
    cost::Cost,
    stream::{Recording, Rendezvous},
    tensor::{BufferId, Tensor},
};

use crate::{
    dispatch,
    error::{Error, Result},
    hand_over::hand_overs,
    joint::TaskTime,
    stream::Queue,
    task::{Role, Task, TaskKind},
    telemetry::Span,
};

/// What is launched in one step, in which order, and what waits for what.
#[derive(Debug, Clone)]
pub struct Graph {
    /// Task entities in launch order.
    pub order: Vec<Entity>,
    /// For each task, tasks on other streams to wait for, as indices into `order`, latest first.
    pub deps: Vec<Vec<u32>>,
    /// Kinds that occur, in order of first use.
    pub kinds: Vec<TaskKind>,
    /// Streams that occur, in order of first use.
    pub streams: Vec<Entity>,
    /// Where tasks meet those of other ranks: indices into `order`, ascending, each as often as it meets one.
    pub rendezvous: Vec<(u32, Rendezvous)>,
    /// For each task, its index into `kinds`.
    pub(crate) kind_of: Vec<u32>,
    /// For each task, its index into `streams`.
    pub stream_of: Vec<u32>,
    /// For each task, its span without times.
    pub spans: Vec<Span>,
    /// The first task that changes what the step began from, if it has such.
    pub(crate) gate: Option<usize>,
    /// Another for each graph of the process.
    pub(crate) id: u64,
    /// For each task, whether its stream is handed what it holds back once the task is launched: see [`crate::hand_over`].
    pub(crate) hands_over: Vec<bool>,
}

impl Graph {
    /// Labels in launch order.
    pub fn labels(&self) -> impl Iterator<Item = &str> {
        self.spans.iter().map(|span| &*span.label)
    }

    /// What each task does and asks of a device, in launch order.
    pub fn costs(&self) -> impl Iterator<Item = (TaskKind, &Cost)> {
        self.spans.iter().map(|span| (span.kind, &span.cost))
    }

    /// Spans of the tasks under computed times: [`spans_at`].
    pub fn spans_at(&self, times: &[TaskTime]) -> Vec<Span> {
        spans_at(&self.spans, &self.deps, times)
    }

    /// When each task starts and ends if task `i` takes `durations_nanos[i]` and the streams are free at `begin_nanos`:
    /// start is the latest of the stream's last end and the ends of what it waits for.
    ///
    /// # Panics
    /// If there is not one duration per task.
    pub fn simulate(&self, durations_nanos: &[u64], begin_nanos: u64) -> Vec<(u64, u64)> {
        assert_eq!(durations_nanos.len(), self.order.len(), "one duration per task");
        let mut free = vec![begin_nanos; self.streams.len()];
        let mut times = Vec::with_capacity(self.order.len());
        for ((&stream, deps), &duration) in self.stream_of.iter().zip(&self.deps).zip(durations_nanos) {
            let free = &mut free[stream as usize];
            let ready = deps.iter().map(|&dep| (times[dep as usize] as (u64, u64)).1).max().unwrap_or(0);
            let start = ready.max(*free);
            *free = start + duration;
            times.push((start, *free));
        }
        times
    }
}

/// The tasks' spans under computed times, given what each waits for on other streams.
///
/// # Panics
/// If there is not one time per task.
pub fn spans_at(spans: &[Span], deps: &[Vec<u32>], times: &[TaskTime]) -> Vec<Span> {
    assert_eq!(times.len(), spans.len(), "one time per task");
    let span = |((span, deps), time): ((&Span, &Vec<u32>), &TaskTime)| Span {
        start_nanos: time.start_nanos,
        end_nanos: time.end_nanos,
        wait_nanos: time.wait_nanos,
        waited_for: deps.iter().copied().max_by_key(|&dep| times[dep as usize].end_nanos),
        ..span.clone()
    };
    spans.iter().zip(deps).zip(times).map(span).collect()
}

/// Who used a buffer last.
#[derive(Default)]
struct Users {
    writer: Option<u32>,
    readers: Vec<u32>,
}

/// A task that is in no graph yet, with what it uses.
pub struct Recorded {
    entity: Entity,
    span: (TaskKind, Entity, Span),
    recording: Recording,
}

impl Recorded {
    /// Spawns `task` with what its handler needs, and records it.
    ///
    /// # Errors
    /// The handler's.
    pub fn new(world: &mut World, task: Task, arguments: impl Bundle) -> bevy_ecs::error::Result<Self> {
        let mut span = (task.kind, task.stream, Span::of(&task));
        let entity = world.spawn((task, arguments)).id();
        let recording = dispatch::record(world, entity)?;
        span.2.role = Role::of(&recording.rendezvous);
        Ok(Recorded { entity, span, recording })
    }

    /// Tensors that it reads or writes.
    pub fn uses(&self) -> impl Iterator<Item = &Tensor> {
        self.recording.reads.iter().chain(&self.recording.writes)
    }
}

/// Collects tasks in launch order.
#[derive(Default)]
pub struct GraphBuilder {
    order: Vec<Entity>,
    index: HashMap<Entity, u32>,
    deps: Vec<Vec<u32>>,
    tasks: Vec<(TaskKind, Entity, Span)>,
    users: HashMap<BufferId, Users>,
    explicit: Vec<(Entity, Entity)>,
    rendezvous: Vec<(u32, Rendezvous)>,
    gate: Option<usize>,
}

impl GraphBuilder {
    /// An empty graph.
    pub fn new() -> Self {
        Self::default()
    }

    /// Spawns `task` with what its handler needs. It waits for every earlier task whose buffers it uses: to read what was
    /// written (RAW), and to write what was read (WAR) or written (WAW).
    pub fn push(&mut self, world: &mut World, task: Task, arguments: impl Bundle) -> Entity {
        let span = (task.kind, task.stream, Span::of(&task));
        let declared = Recording {
            reads: task.reads.clone(),
            writes: task.writes.clone(),
            cost: task.cost,
            ..Recording::default()
        };
        let entity = world.spawn((task, arguments)).id();
        self.link(entity, span, &declared);
        entity
    }

    /// The same for a task whose tensors, cost and rendezvous are not declared but found: its handler is launched on a
    /// stream that notes what ops touch and runs none of them. So a task cannot use a buffer that its edges do not know.
    ///
    /// # Errors
    /// The handler's: an op's contract that is not kept is found here, before anything runs.
    pub fn push_recorded(
        &mut self,
        world: &mut World,
        task: Task,
        arguments: impl Bundle,
    ) -> bevy_ecs::error::Result<Entity> {
        let recorded = Recorded::new(world, task, arguments)?;
        Ok(self.push_ready(world, recorded))
    }

    /// The same for a task that was recorded before: its place in the order is here.
    pub fn push_ready(&mut self, world: &mut World, recorded: Recorded) -> Entity {
        let Recorded { entity, span, recording } = recorded;
        self.link(entity, span, &recording);
        if let Some(mut task) = world.get_mut::<Task>(entity) {
            (task.reads, task.writes, task.cost) = (recording.reads, recording.writes, recording.cost);
            task.rendezvous = recording.rendezvous;
        }
        entity
    }

    fn link(&mut self, entity: Entity, mut span: (TaskKind, Entity, Span), recording: &Recording) {
        let me = self.order.len() as u32;
        let mut deps = Vec::new();
        for tensor in &recording.reads {
            let users = self.users.entry(tensor.buffer).or_default();
            deps.extend(users.writer);
            users.readers.push(me);
        }
        for tensor in &recording.writes {
            let users = self.users.entry(tensor.buffer).or_default();
            deps.extend(users.writer);
            deps.extend(users.readers.drain(..).filter(|&reader| reader != me));
            users.writer = Some(me);
        }
        deps.retain(|&dep| dep != me);
        self.deps.push(deps);
        span.2.cost = recording.cost;
        self.rendezvous.extend(recording.rendezvous.iter().map(|meeting| (me, meeting.clone())));
        self.tasks.push(span);
        self.order.push(entity);
        self.index.insert(entity, me);
    }

    /// `task` waits for `dependency` although they share no buffer, as a receive waits for its send.
    pub fn after(&mut self, task: Entity, dependency: Entity) {
        self.explicit.push((task, dependency));
    }

    /// Tasks from here on change what the step began from: they are launched when all ranks have come to their gates and nobody
    /// gives the step up. In the same steps all ranks have one, and one only.
    pub fn gate(&mut self) {
        self.gate = Some(self.order.len());
    }

    /// Number of tasks so far.
    pub fn len(&self) -> usize {
        self.order.len()
    }

    /// Whether there is no task.
    pub fn is_empty(&self) -> bool {
        self.order.is_empty()
    }

    /// The graph.
    ///
    /// # Errors
    /// If tasks wait for each other or for one that is launched later, an edge names a stranger, or a task's stream is none.
    pub fn build(mut self, world: &World) -> Result<Graph> {
        for &(task, dependency) in &self.explicit {
            let find = |entity: Entity| {
                let known = self.index.get(&entity).copied();
                known.ok_or_else(|| Error::UnknownTask { entity: entity.to_string() })
            };
            let (task, dependency) = (find(task)?, find(dependency)?);
            self.deps[task as usize].push(dependency);
        }
        let (mut kinds, mut streams) = (Vec::new(), Vec::new());
        let (mut kind_of, mut stream_of) = (Vec::new(), Vec::new());
        let mut spans = Vec::with_capacity(self.tasks.len());
        for (kind, stream, mut span) in self.tasks {
            let queue = world.get::<Queue>(stream);
            let queue =
                queue.ok_or_else(|| Error::NoStream { task: span.label.clone(), stream: stream.to_string() })?;
            (span.stream, span.rank) = (queue.name.clone(), queue.rank);
            kind_of.push(position(&mut kinds, kind));
            stream_of.push(position(&mut streams, stream));
            spans.push(span);
        }
        check_order(&self.deps, &stream_of, &spans)?;
        let deps = needed_waits(&self.deps, &stream_of, streams.len());
        let (order, rendezvous, gate) = (self.order, self.rendezvous, self.gate);
        let hands_over = hand_overs(&deps, &stream_of, &rendezvous);
        let id = NEXT_ID.fetch_add(1, Ordering::Relaxed);
        Ok(Graph { order, deps, kinds, streams, rendezvous, kind_of, stream_of, spans, gate, id, hands_over })
    }
}

static NEXT_ID: AtomicU64 = AtomicU64::new(0);

/// Index of `item` in a short list, to which it is added if new.
fn position<T: PartialEq>(list: &mut Vec<T>, item: T) -> u32 {
    let found = list.iter().position(|x| *x == item);
    found.unwrap_or_else(|| {
        list.push(item);
        list.len() - 1
    }) as u32
}

/// Refuses edges to a task that is launched later, and says who then waits for whom.
fn check_order(deps: &[Vec<u32>], stream_of: &[u32], spans: &[Span]) -> Result<()> {
    let later = deps.iter().enumerate().find_map(|(task, deps)| {
        let dep = deps.iter().find(|&&dep| dep as usize >= task)?;
        Some((task, *dep as usize))
    });
    let Some((task, dependency)) = later else { return Ok(()) };
    let label = |i: usize| spans[i].label.clone();
    Err(match path(deps, stream_of, dependency, task) {
        Some(path) => Error::Deadlock { cycle: std::iter::once(task).chain(path).map(label).collect() },
        None => Error::LaunchOrder { task: label(task), dependency: label(dependency) },
    })
}

/// The shortest way from `from` to `to` along "waits for", which includes the task before on the same stream.
fn path(deps: &[Vec<u32>], stream_of: &[u32], from: usize, to: usize) -> Option<Vec<usize>> {
    let mut before = vec![None; deps.len()];
    let mut last = BTreeMap::new();
    for (task, stream) in stream_of.iter().enumerate() {
        before[task] = last.insert(stream, task);
    }
    let mut came_from = HashMap::from([(from, from)]);
    let mut open = VecDeque::from([from]);
    while let Some(task) = open.pop_front() {
        if task == to {
            let mut path = vec![to];
            while path[path.len() - 1] != from {
                path.push(came_from[&path[path.len() - 1]]);
            }
            path.reverse();
            return Some(path);
        }
        for next in deps[task].iter().map(|&dep| dep as usize).chain(before[task]) {
            came_from.entry(next).or_insert_with(|| {
                open.push_back(next);
                task
            });
        }
    }
    None
}

/// Keeps the waits that nothing else implies.
///
/// `done[t][s]` is how many tasks of stream `s` are known to have ended when task `t` starts. A wait for a task that is
/// known to have ended is dropped. Later tasks are looked at first: an earlier one may be implied by a later one, never the
/// other way around.
fn needed_waits(deps: &[Vec<u32>], stream_of: &[u32], num_streams: usize) -> Vec<Vec<u32>> {
    let mut done: Vec<Vec<u32>> = Vec::with_capacity(deps.len());
    let mut rank_in_stream = Vec::with_capacity(deps.len());
    let mut last: Vec<Option<usize>> = vec![None; num_streams];
    let mut num_in_stream = vec![0u32; num_streams];
    let mut kept = Vec::with_capacity(deps.len());
    for (task, deps) in deps.iter().enumerate() {
        let stream = stream_of[task] as usize;
        let mut known = last[stream].map_or_else(|| vec![0; num_streams], |previous| done[previous].clone());
        known[stream] = num_in_stream[stream];
        let mut candidates = deps.clone();
        candidates.sort_unstable_by(|a, b| b.cmp(a));
        candidates.retain(|&dep| {
            let dep = dep as usize;
            let needed = known[stream_of[dep] as usize] <= rank_in_stream[dep];
            if needed {
                for (mine, theirs) in known.iter_mut().zip(&done[dep]) {
                    *mine = (*mine).max(*theirs);
                }
                known[stream_of[dep] as usize] = rank_in_stream[dep] + 1;
            }
            needed
        });
        kept.push(candidates);
        done.push(known);
        rank_in_stream.push(num_in_stream[stream]);
        num_in_stream[stream] += 1;
        last[stream] = Some(task);
    }
    kept
}

/// What a graph was built for: schedule, number of microbatches, shapes.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct PlanKey(pub String);

impl fmt::Display for PlanKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Graphs that were built, and the one of this step.
#[derive(Resource, Default)]
pub struct Plans {
    graphs: BTreeMap<PlanKey, Arc<Graph>>,
    /// The graph that Dispatch launches; none: nothing is launched.
    pub active: Option<PlanKey>,
}

impl Plans {
    /// Whether there is a graph for `key`.
    pub fn contains(&self, key: &PlanKey) -> bool {
        self.graphs.contains_key(key)
    }

    /// Makes the graph for `key` the active one; `false` if there is none yet.
    pub fn activate(&mut self, key: &PlanKey) -> bool {
        let found = self.contains(key);
        if found {
            self.active = Some(key.clone());
        }
        found
    }

    /// The graph for `key`.
    pub fn get(&self, key: &PlanKey) -> Option<&Arc<Graph>> {
        self.graphs.get(key)
    }

    /// Keeps `graph` and makes it the active one.
    ///
    /// # Panics
    /// If there is a graph for `key`: its tasks would be left behind. [`Plans::despawn`] it first.
    pub fn insert(&mut self, key: PlanKey, graph: Graph) {
        assert!(!self.contains(&key), "there is a plan `{key}` already");
        self.graphs.insert(key.clone(), Arc::new(graph));
        self.active = Some(key);
    }

    /// The active graph, if any.
    ///
    /// # Errors
    /// If the active key has no graph.
    pub fn active_graph(&self) -> Result<Option<&Arc<Graph>>> {
        let Some(key) = &self.active else { return Ok(None) };
        let known = || self.graphs.keys().map(|key| format!("`{key}`")).collect::<Vec<_>>().join(", ");
        let graph = self.graphs.get(key);
        graph.map(Some).ok_or_else(|| Error::UnknownPlan { key: key.to_string(), known: known() })
    }

    /// Forgets the graph for `key` and despawns its tasks. Returns whether there was one.
    pub fn despawn(world: &mut World, key: &PlanKey) -> bool {
        let mut plans = world.resource_mut::<Plans>();
        let Some(graph) = plans.graphs.remove(key) else { return false };
        if plans.active.as_ref() == Some(key) {
            plans.active = None;
        }
        for &task in &graph.order {
            world.despawn(task);
        }
        true
    }
}

#[cfg(test)]
#[path = "graph_tests.rs"]
mod tests;
