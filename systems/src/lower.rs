//! Lowering: what a pipeline action becomes. One action is a list of tasks, layer by layer; each task is an entity with its
//! tensors, launched by the handler of its kind.
//!
//! Tensors are allocated and released in launch order, so the plan fixes the memory of a step: its peak is known before
//! anything runs, and on `Device::Meta` without touching memory. What a task reads, writes and costs is not declared but
//! found, by launching its handler on a recording stream.

use std::{borrow::Cow, collections::BTreeMap, sync::Arc};

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
    generate::{Caches, LayerCache},
    microbatch::Inputs,
    scene::{Recompute, RecomputeOp},
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
    /// What generation remembers; attention then runs over these.
    pub caches: Option<Caches>,
    /// Layer of the tasks emitted from here on.
    pub layer: Option<u32>,
    /// Microbatch of the tasks emitted from here on.
    pub microbatch: Option<u32>,
    /// Activations are kept for a backward pass.
    pub training: bool,
    /// Every task is followed by one that looks for values that are not finite in what it wrote.
    pub checking: bool,
    /// Forward tasks emitted now repeat earlier ones: they must not count or add to losses twice.
    pub repeating: bool,
    recompute: Recompute,
    memory: Memory,
    stream: Entity,
    graph: GraphBuilder,
    names: BTreeMap<BufferId, Cow<'static, str>>,
    scope: Vec<Tensor>,
}

impl<'w> Lowering<'w> {
    /// Starts a graph whose tasks run on `stream`.
    pub fn new(
        world: &'w mut World,
        (memory, stream): (Memory, Entity),
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
            caches: None,
            layer: None,
            microbatch: None,
            training,
            checking: false,
            repeating: false,
            recompute,
            memory,
            stream,
            graph: GraphBuilder::default(),
            names: BTreeMap::new(),
            scope: Vec::new(),
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
        tensor
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
            self.memory.release(tensor);
        }
    }

    /// Ends the scope: hands over what was allocated since the last call.
    pub fn take_scope(&mut self) -> Vec<Tensor> {
        std::mem::take(&mut self.scope)
    }

    /// Gives a scope back, except `keep`, which moves to the current scope.
    pub fn release_scope(&mut self, scope: Vec<Tensor>, keep: Option<Tensor>) {
        for tensor in scope {
            if keep.is_some_and(|k| k.buffer == tensor.buffer) {
                self.scope.push(tensor);
            } else {
                self.memory.release(tensor);
            }
        }
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

    /// Emits a task.
    pub fn task(&mut self, kind: TaskKind, pass: impl Into<Option<Pass>>, args: impl Component) -> Result<()> {
        let mut label = kind.0.to_owned();
        for (name, at) in [("layer", self.layer), ("microbatch", self.microbatch)] {
            if let Some(at) = at {
                label += &format!(", {name} {at}");
            }
        }
        let task = Task {
            pass: pass.into(),
            layer: self.layer,
            microbatch: self.microbatch,
            ..Task::new(kind, self.stream, label)
        };
        let label = task.label.clone();
        let id = self.graph.push_recorded(self.world, task, args)?;
        let written = self.world.get::<Task>(id).map(|task| task.writes.clone()).unwrap_or_default();
        if self.checking && !written.is_empty() {
            let name = |t: &Tensor| self.names.get(&t.buffer).cloned().unwrap_or("a tensor".into());
            let tensors = written.iter().filter(|t| t.dtype != DType::U32).map(|t| (*t, name(t))).collect();
            let check = Task::new(CHECK_FINITE, self.stream, format!("check of {label}"));
            self.graph.push_recorded(self.world, check, CheckTask { of: label, tensors })?;
        }
        Ok(())
    }

    /// Names tensors that were not allocated here: weights and their gradients.
    pub fn name(&mut self, tensor: Tensor, name: String) {
        self.names.insert(tensor.buffer, name.into());
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
        norm::check_finite(s, *tensor, task.of.clone(), name.to_string());
    }
    Ok(())
}
