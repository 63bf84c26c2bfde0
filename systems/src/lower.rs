//! Lowering: what a pipeline action becomes. One action is a list of tasks, layer by layer; each task is an entity with its
//! tensors, launched by the handler of its kind.
//!
//! Tensors are allocated and released in launch order, so the plan fixes the memory of a step: its peak is known before
//! anything runs, and on `Device::Meta` without touching memory. What a task reads, writes and costs is not declared but
//! found, by launching its handler on a recording stream.

use std::{
    borrow::Cow,
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
};

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{
    dtype::DType,
    memory::Memory,
    ops::norm,
    tensor::{BufferId, Tensor},
};

use crate::{
    attention::AttentionSizes,
    formats::Fp8Formats,
    layout::Layout,
    microbatch::Inputs,
    rounding::{Counter, Counters},
    scene::{Recompute, RecomputeOp},
    serve::cache::{Caches, LayerCache},
};

/// Activations that a scene may choose to compute again instead of keeping.
pub type Saved = RecomputeOp;

/// Builds one graph.
pub struct Lowering<'w> {
    /// The world that holds the tasks.
    pub world: &'w mut World,
    /// Tensors of the microbatch at hand.
    pub inputs: Inputs,
    /// Sizes of the model's attention.
    pub attention: AttentionSizes,
    /// Epsilon of the model's norms.
    pub eps: f64,
    /// Type of activations.
    pub compute: DType,
    /// What of the model is on this rank, and on which others.
    pub layout: Arc<Layout>,
    /// What generation remembers; attention then runs over these.
    pub caches: Option<Caches>,
    /// Layer of the tasks emitted from here on.
    pub layer: Option<u32>,
    /// Microbatch of the tasks emitted from here on.
    pub microbatch: Option<u32>,
    /// Pipeline stage of the tasks emitted from here on.
    pub stage: u32,
    /// Activations are kept for a backward pass.
    pub training: bool,
    /// Every task is followed by one that looks for values that are not finite in what it wrote.
    pub checking: bool,
    /// Forward tasks emitted now repeat earlier ones: they must not count or add to losses twice.
    pub repeating: bool,
    /// The tasks emitted now overlap with those of another microbatch.
    pub overlapping: bool,
    /// How products in 8 bits are made, if any are.
    pub fp8: Option<Fp8Formats>,
    /// What products read again for weight gradients is kept in 8 bits; for plans, which only count it.
    pub keeps_narrow: bool,
    /// Outputs of a token's experts are added up on their way back; for plans.
    pub reduces_on_the_way: bool,
    /// Rows that come to this rank's experts, over those that would if each had its share; for plans. `None`: room for all.
    pub expert_load: Option<f64>,
    /// Where what rounding loses is counted, in a step that is watched.
    pub counters: Option<Counters>,
    /// Room for numbers that ops round as they make them, by shape; used and done with within a task.
    watched: BTreeMap<[usize; 2], Tensor>,
    recompute: Recompute,
    memory: Memory,
    streams: Streams,
    graph: GraphBuilder,
    names: BTreeMap<BufferId, Cow<'static, str>>,
    scope: Vec<Tensor>,
    overlapped: Vec<bool>,
    wire_buffers: BTreeSet<BufferId>,
    /// Bytes that are counted for a buffer, where they are not its own.
    counted: BTreeMap<BufferId, u64>,
    /// Tasks that are recorded now and launched later.
    later: Option<Vec<Recorded>>,
    live: ActivationBytes,
    peak: ActivationBytes,
    /// The most since the task before.
    high: ActivationBytes,
    bytes_by_task: Vec<ActivationBytes>,
}

/// The streams of a rank.
#[derive(Clone, Copy, Debug)]
pub struct Streams {
    /// Where ops compute.
    pub compute: Entity,
    /// Where bytes move between ranks.
    pub comm: Entity,
}

/// Bytes of what lives for a part of a step only.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ActivationBytes {
    /// Kept and passed on on this rank.
    pub activations: u64,
    /// Arrived from, or to be sent to, other ranks.
    pub communication: u64,
}

/// A step as a graph.
#[derive(Clone, Debug)]
pub struct Lowered {
    /// Its tasks.
    pub graph: Graph,
    /// What it allocates at its peak moment.
    pub peak: ActivationBytes,
    /// For each task, whether it is part of an overlapped pair.
    pub overlapped: Vec<bool>,
    /// For each task, the most that was allocated from the task before it to its own launch.
    pub bytes_by_task: Vec<ActivationBytes>,
}

impl ActivationBytes {
    /// Both.
    pub fn total(&self) -> u64 {
        self.activations + self.communication
    }
}

impl<'w> Lowering<'w> {
    /// Starts a graph whose tasks run on `streams`.
    pub fn new(
        world: &'w mut World,
        (memory, streams, layout): (Memory, Streams, Arc<Layout>),
        (attention, eps, compute): (AttentionSizes, f64, DType),
        inputs: Inputs,
        recompute: Recompute,
        training: bool,
    ) -> Self {
        Lowering {
            world,
            inputs,
            attention,
            eps,
            compute,
            layout,
            caches: None,
            layer: None,
            microbatch: None,
            stage: 0,
            training,
            checking: false,
            repeating: false,
            overlapping: false,
            fp8: None,
            keeps_narrow: false,
            reduces_on_the_way: false,
            expert_load: None,
            counters: None,
            watched: BTreeMap::new(),
            recompute,
            memory,
            streams,
            graph: GraphBuilder::default(),
            names: BTreeMap::new(),
            scope: Vec::new(),
            overlapped: Vec::new(),
            wire_buffers: BTreeSet::new(),
            counted: BTreeMap::new(),
            later: None,
            live: ActivationBytes::default(),
            peak: ActivationBytes::default(),
            high: ActivationBytes::default(),
            bytes_by_task: Vec::new(),
        }
    }

    /// An activation of the compute type, alive until its scope or itself is released.
    pub fn alloc(&mut self, name: &'static str, dims: &[usize]) -> Tensor {
        self.alloc_as(name, self.compute, dims)
    }

    /// An activation of the type sums are kept in: f64 beside f64, else f32.
    pub fn alloc_acc(&mut self, name: &'static str, dims: &[usize]) -> Tensor {
        let dtype = if self.compute == DType::F64 { DType::F64 } else { DType::F32 };
        self.alloc_as(name, dtype, dims)
    }

    /// An activation of a given type.
    pub fn alloc_as(&mut self, name: &'static str, dtype: DType, dims: &[usize]) -> Tensor {
        let tensor = self.memory.alloc(dtype, dims);
        self.names.insert(tensor.buffer, name.into());
        self.scope.push(tensor);
        self.live.activations += tensor.size_bytes();
        self.note_peak();
        tensor
    }

    /// Where this layer's roundings are counted, if they are: in a step that is watched, the first time that a task is emitted.
    pub fn counter(&self) -> Option<Counter> {
        let counters = self.counters.filter(|_| !self.repeating)?;
        Some(counters.layer(self.layer?))
    }

    /// Room of the compute type for what is counted in a task.
    pub fn watched_room(&mut self, dims: [usize; 2]) -> Tensor {
        if let Some(room) = self.watched.get(&dims) {
            return *room;
        }
        let room = self.memory.alloc(self.compute, &dims);
        self.live.activations += room.size_bytes();
        self.note_peak();
        self.watched.insert(dims, room);
        room
    }

    /// Rows [n, d] of the compute type that come from or go to other ranks.
    pub fn alloc_wire(&mut self, name: &'static str, n: usize, d: usize) -> Tensor {
        let tensor = self.alloc(name, &[n, d]);
        self.wire_buffers.insert(tensor.buffer);
        self.live.activations -= tensor.size_bytes();
        self.live.communication += tensor.size_bytes();
        tensor
    }

    /// The same with the shape of another tensor.
    pub fn alloc_like_wire(&mut self, name: &'static str, other: Tensor) -> Tensor {
        self.alloc_wire(name, other.dim(0), other.dim(1))
    }

    /// Counts a tensor at `eighths` of its size from here on, if the plan is to keep products' operands in a narrow format.
    pub fn keep_narrow(&mut self, tensor: Tensor, eighths: u64) {
        if !self.keeps_narrow {
            return;
        }
        let full = self.counted.get(&tensor.buffer).copied().unwrap_or(tensor.size_bytes());
        let narrow = tensor.size_bytes() * eighths / 8;
        self.counted.insert(tensor.buffer, narrow);
        let live = if self.wire_buffers.contains(&tensor.buffer) {
            &mut self.live.communication
        } else {
            &mut self.live.activations
        };
        *live = *live + narrow - full;
    }

    /// Records the tasks that `emit` emits, for [`Lowering::launch_later`].
    ///
    /// # Errors
    /// Those of `emit`.
    pub fn record_for_later(&mut self, emit: impl FnOnce(&mut Self) -> Result<()>) -> Result<Vec<Recorded>> {
        self.later = Some(Vec::new());
        let emitted = emit(self);
        let later = self.later.take().unwrap_or_default();
        emitted.map(|()| later)
    }

    /// Puts recorded tasks here in the launch order.
    pub fn launch_later(&mut self, tasks: Vec<Recorded>) {
        for task in tasks {
            self.note_task();
            self.graph.push_ready(self.world, task);
        }
    }

    fn note_peak(&mut self) {
        if self.live.total() > self.peak.total() {
            self.peak = self.live;
        }
        if self.live.total() > self.high.total() {
            self.high = self.live;
        }
    }

    fn note_task(&mut self) {
        self.overlapped.push(self.overlapping);
        self.bytes_by_task.push(self.high);
        self.high = self.live;
    }

    fn give_back(&mut self, tensor: Tensor) {
        let bytes = self.counted.remove(&tensor.buffer).unwrap_or(tensor.size_bytes());
        if self.wire_buffers.remove(&tensor.buffer) {
            self.live.communication -= bytes;
        } else {
            self.live.activations -= bytes;
        }
        self.memory.release(tensor);
    }

    /// An activation with the type and shape of another.
    pub fn alloc_like(&mut self, name: &'static str, other: Tensor) -> Tensor {
        let dims: Vec<usize> = other.shape.dims().collect();
        self.alloc_as(name, other.dtype, &dims)
    }

    /// Gives an activation of the current scope back before the scope ends.
    pub fn release(&mut self, tensor: Tensor) {
        if let Some(at) = self.scope.iter().rposition(|t| t.buffer == tensor.buffer) {
            self.scope.remove(at);
            self.give_back(tensor);
        }
    }

    /// Ends the scope: hands over what was allocated since the last call.
    pub fn take_scope(&mut self) -> Vec<Tensor> {
        std::mem::take(&mut self.scope)
    }

    /// Makes `scope` the current one, and hands over what was; for work that is emitted in turns.
    pub fn swap_scope(&mut self, scope: &mut Vec<Tensor>) {
        std::mem::swap(&mut self.scope, scope);
    }

    /// Takes `tensor` out of the current scope; whoever wants it released adopts it.
    pub fn disown(&mut self, tensor: Tensor) {
        self.scope.retain(|t| t.buffer != tensor.buffer);
    }

    /// Adds `tensor` to the current scope.
    pub fn adopt(&mut self, tensor: Tensor) {
        self.scope.push(tensor);
    }

    /// Gives a scope back, except `keep`, which moves to the current scope.
    pub fn release_scope(&mut self, scope: Vec<Tensor>, keep: Option<Tensor>) {
        for tensor in scope {
            if keep.is_some_and(|k| k.buffer == tensor.buffer) {
                self.scope.push(tensor);
            } else {
                self.give_back(tensor);
            }
        }
    }

    /// Whether all experts of a layer are on this rank.
    pub fn has_all_experts(&self) -> bool {
        self.layout.mesh.ep == 1
    }

    /// Room for the rows that come to this rank's `e` experts from ranks of `t` tokens with `k` experts each: all that may
    /// come, or in a plan as many as its load says.
    pub fn max_expert_rows(&self, t: usize, k: usize, e: usize) -> usize {
        match self.expert_load {
            Some(load) => ((t * k) as f64 * load).ceil() as usize,
            None => self.layout.mesh.ep as usize * t * k.min(e),
        }
    }

    /// Names a transfer: peers must agree on it.
    pub fn tag(&self, kind: TaskKind) -> u64 {
        let kind = kind.0.bytes().fold(0u64, |hash, byte| hash.wrapping_mul(31).wrapping_add(u64::from(byte)));
        let (layer, microbatch) = (self.layer.unwrap_or(0xffff), self.microbatch.unwrap_or(0xffff));
        (kind & 0xffff) << 48
            | u64::from(self.stage & 0xff) << 40
            | u64::from(layer & 0xffff) << 24
            | u64::from(microbatch & 0xff_ffff)
    }

    /// Whether the backward pass computes `what` again.
    pub fn recomputes(&self, what: Saved) -> bool {
        self.training && matches!(&self.recompute, Recompute::Selective(list) if list.contains(&what))
    }

    /// Whether whole layers are computed again.
    pub fn recomputes_layers(&self) -> bool {
        self.training && self.recompute == Recompute::Layer
    }

    /// What generation remembers of `layer`.
    pub fn cache(&self, layer: usize) -> Option<LayerCache> {
        self.caches.as_ref().map(|caches| caches.0[layer])
    }

    /// Releases an activation that the backward pass computes again.
    pub fn drop_recomputable(&mut self, what: Saved, tensor: Tensor) {
        if self.recomputes(what) {
            self.release(tensor);
        }
    }

    /// The tensor to compute again what [`Lowering::drop_recomputable`] released; the same one if nothing was.
    pub fn alloc_again(&mut self, what: Saved, tensor: Tensor) -> Tensor {
        if self.recomputes(what) { self.alloc_like("recomputed", tensor) } else { tensor }
    }

    /// Emits a task on the compute stream.
    pub fn task(&mut self, kind: TaskKind, pass: impl Into<Option<Pass>>, args: impl Component) -> Result<()> {
        self.emit(self.streams.compute, kind, pass.into(), args)
    }

    /// Emits a task on the communication stream.
    pub fn transfer(&mut self, kind: TaskKind, pass: impl Into<Option<Pass>>, args: impl Component) -> Result<()> {
        self.emit(self.streams.comm, kind, pass.into(), args)
    }

    fn emit(&mut self, stream: Entity, kind: TaskKind, pass: Option<Pass>, args: impl Component) -> Result<()> {
        let label = self.label(kind);
        if self.later.is_none() {
            self.note_task();
        }
        let task = Task {
            pass,
            stage: self.stage,
            layer: self.layer,
            microbatch: self.microbatch,
            ..Task::new(kind, stream, label)
        };
        if let Some(later) = &mut self.later {
            later.push(Recorded::new(self.world, task, args)?);
            return Ok(());
        }
        if !self.checking {
            self.graph.push_recorded(self.world, task, args)?;
            return Ok(());
        }
        let label = task.label.clone();
        let id = self.graph.push_recorded(self.world, task, args)?;
        let written = self.world.get::<Task>(id).map(|task| task.writes.clone()).unwrap_or_default();
        let name = |t: &Tensor| self.names.get(&t.buffer).cloned().unwrap_or("a tensor".into());
        let tensors: Vec<_> = written.iter().filter(|t| t.dtype.is_float()).map(|t| (*t, name(t))).collect();
        if !tensors.is_empty() {
            let check = Task::new(CHECK_FINITE, stream, format!("check of {label}"));
            self.graph.push_recorded(self.world, check, CheckTask { of: label, tensors })?;
        }
        Ok(())
    }

    fn label(&self, kind: TaskKind) -> String {
        use std::fmt::Write as _;
        let mut label = String::with_capacity(48);
        label.push_str(kind.0);
        for (name, at) in [("layer", self.layer), ("microbatch", self.microbatch)] {
            if let Some(at) = at {
                // Writing to a string does not fail.
                let _ = write!(label, ", {name} {at}");
            }
        }
        label
    }

    /// Names tensors that were not allocated here: weights and their gradients.
    pub fn name(&mut self, tensor: Tensor, name: String) {
        self.names.insert(tensor.buffer, name.into());
    }

    /// What is emitted from here on changes what the step began from: see [`GraphBuilder::gate`].
    pub fn gate(&mut self) {
        self.graph.gate();
    }

    /// Ends the graph of a step, with what is known of it beside the tasks; not for one that is checked.
    pub fn finish_step(self) -> Result<Lowered> {
        let Lowering { peak, overlapped, bytes_by_task, .. } = self;
        self.watched.values().for_each(|room| self.memory.release(*room));
        Ok(Lowered { graph: self.graph.build(self.world)?, peak, overlapped, bytes_by_task })
    }

    /// Ends the graph.
    pub fn finish(self) -> Result<Graph> {
        Ok(self.graph.build(self.world)?)
    }
}

/// Looks for a NaN or an infinity.
pub const CHECK_FINITE: TaskKind = TaskKind("check_finite");

#[derive(Component, Clone)]
pub(crate) struct CheckTask {
    of: Arc<str>,
    tensors: Vec<(Tensor, Cow<'static, str>)>,
}

pub(crate) fn check_finite(In(id): In<Entity>, mut launch: Launch<CheckTask>) -> Result {
    let (_, task, s) = launch.get(id)?;
    for (tensor, name) in &task.tensors {
        norm::check_finite(s, *tensor, task.of.clone(), Arc::from(&**name));
    }
    Ok(())
}
