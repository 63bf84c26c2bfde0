//! Walks: a forward or backward of one microbatch through one stage, as a list of steps that are emitted one at a time, so that
//! two walks can be interleaved.

use std::collections::VecDeque;

use engine::prelude::*;
use kernels::tensor::Tensor;

use super::{
    chunk::Chunk,
    layer::{LayerBackward, LayerForward},
};
use crate::{
    head::NormActivations,
    mtp::{JoinActivations, JoinGradients},
};

/// One step of a walk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Step {
    /// Embedding, or the tensor of the neighbour stage.
    Enter,
    /// A chunk of a layer of the stage.
    Layer(usize, Chunk),
    /// Final norm, head and loss.
    Head,
    /// Embedding and hidden state of module k.
    Join(usize),
    /// A chunk of module k's layer.
    Module(usize, Chunk),
    /// Norm and head of module k.
    ModuleHead(usize),
    /// On to the neighbour stage, or the embedding's weight gradient.
    Leave,
}

impl Step {
    pub fn chunk(self) -> Option<Chunk> {
        match self {
            Step::Layer(_, chunk) | Step::Module(_, chunk) => Some(chunk),
            _ => None,
        }
    }
}

/// Steps of a forward through layers that are mixtures of experts or not, then, on the last stage, the head and the modules.
pub(super) fn forward_steps(layers: &[bool], modules: Option<&[bool]>) -> VecDeque<Step> {
    use Chunk::{AttentionF, CombineF, DispatchF, MlpF};
    let chunks =
        |is_moe: bool| if is_moe { &[AttentionF, DispatchF, MlpF, CombineF][..] } else { &[AttentionF, MlpF][..] };
    let mut steps = VecDeque::from([Step::Enter]);
    for (i, &is_moe) in layers.iter().enumerate() {
        steps.extend(chunks(is_moe).iter().map(|&chunk| Step::Layer(i, chunk)));
    }
    if let Some(modules) = modules {
        steps.push_back(Step::Head);
        for (k, &is_moe) in modules.iter().enumerate() {
            steps.push_back(Step::Join(k));
            steps.extend(chunks(is_moe).iter().map(|&chunk| Step::Module(k, chunk)));
            steps.push_back(Step::ModuleHead(k));
        }
    }
    steps.push_back(Step::Leave);
    steps
}

/// Steps of a backward through the same; with `weights`, each layer's weight gradients beside its input gradient.
pub(super) fn backward_steps(layers: &[bool], modules: Option<&[bool]>, weights: bool) -> VecDeque<Step> {
    use Chunk::{AttentionB, AttentionW, CombineB, DispatchB, MlpB, MlpW};
    let chunks = move |is_moe: bool| {
        let all = [
            (CombineB, is_moe),
            (MlpB, true),
            (DispatchB, is_moe),
            (MlpW, weights),
            (AttentionB, true),
            (AttentionW, weights),
        ];
        all.into_iter().filter(|(_, wanted)| *wanted).map(|(chunk, _)| chunk)
    };
    let mut steps = VecDeque::from([Step::Enter]);
    if let Some(modules) = modules {
        for (k, &is_moe) in modules.iter().enumerate().rev() {
            steps.push_back(Step::ModuleHead(k));
            steps.extend(chunks(is_moe).map(|chunk| Step::Module(k, chunk)));
            steps.push_back(Step::Join(k));
        }
        steps.push_back(Step::Head);
    }
    for (i, &is_moe) in layers.iter().enumerate().rev() {
        steps.extend(chunks(is_moe).map(|chunk| Step::Layer(i, chunk)));
    }
    steps.push_back(Step::Leave);
    steps
}

/// What a forward leaves for the backward.
#[derive(Default)]
pub(super) struct Forward {
    pub layers: Vec<LayerForward>,
    pub norm: Option<NormActivations>,
    pub dh: Option<Tensor>,
    pub modules: Vec<ModuleForward>,
    pub scope: Vec<Tensor>,
}

impl Forward {
    /// Takes `tensor` out of the memory that is given back with this forward.
    pub fn disown(&mut self, tensor: Tensor) {
        let scopes = self.layers.iter_mut().map(|layer| &mut layer.scope).chain([&mut self.scope]);
        scopes.for_each(|scope| scope.retain(|t| t.buffer != tensor.buffer));
    }
}

/// A module for multi-token prediction on its way forward.
pub(super) struct ModuleForward {
    pub join: JoinActivations,
    pub tokens: Tensor,
    pub layer: Option<LayerForward>,
    pub norm: Option<NormActivations>,
    pub dh: Option<Tensor>,
    pub scope: Vec<Tensor>,
}

/// A forward under way.
pub(super) struct ForwardWalk {
    pub steps: VecDeque<Step>,
    pub x: Option<Tensor>,
    pub open: Option<LayerForward>,
    pub forward: Forward,
    pub scope: Vec<Tensor>,
}

/// Weight gradients for later, and memory that they need.
#[expect(clippy::large_enum_variant, reason = "a few are made per plan, and handles are copied freely")]
pub(super) enum Deferred {
    Layer(LayerBackward),
    Tasks(Vec<Recorded>, Vec<Tensor>),
    Join(usize, JoinActivations, JoinGradients),
    Embedding(Tensor, Tensor),
    Scope(Vec<Tensor>),
}

impl Deferred {
    /// Tasks that are already made.
    pub fn tasks(&self) -> &[Recorded] {
        match self {
            Deferred::Tasks(tasks, _) => tasks,
            _ => &[],
        }
    }
}

/// A backward under way.
pub(super) struct BackwardWalk {
    pub steps: VecDeque<Step>,
    pub weights: bool,
    /// Gradient of what the next step's forward gave out.
    pub d: Option<Tensor>,
    /// Gradient of the hidden state that a module took.
    pub d_hidden: Option<Tensor>,
    pub open: Option<LayerBackward>,
    pub forward: Forward,
    pub deferred: Vec<Deferred>,
    pub scope: Vec<Tensor>,
}
