//! The way back through a stage: gradients of inputs step by step, and those of weights at once or kept for their own action.

use std::collections::BTreeSet;

use engine::prelude::*;
use kernels::tensor::Tensor;

use super::{
    super::{
        action::Cell,
        chunk::Chunk,
        layer::{LayerBackward, LayerForward},
        transfer::{self, Direction},
        walk::{BackwardWalk, Deferred, Step},
    },
    ADD_GRAD, AddTask, Stages,
};
use crate::{embedding, head, lower::Lowering};

impl Stages {
    pub(super) fn backward_step(
        &mut self,
        l: &mut Lowering,
        cell: Cell,
        walk: &mut BackwardWalk,
        step: Step,
    ) -> Result<()> {
        let no_gradient = || -> BevyError { "the head made no gradient: the forward was not for training".into() };
        match step {
            Step::Enter if cell.stage + 1 == self.layout.num_stages() => {}
            Step::Enter => {
                walk.d = Some(match self.neighbour(cell.stage + 1, cell.microbatch)? {
                    Some(peer) => self.receive(l, Direction::Backward, peer, cell.stage)?,
                    None => {
                        let d = self.take_handed(Direction::Backward, cell)?;
                        l.adopt(d);
                        d
                    }
                });
            }
            Step::ModuleHead(k) => {
                let module = &walk.forward.modules[k];
                l.layer = module.layer.as_ref().map(|layer| layer.index as u32);
                let (norm, dh) = (module.norm.ok_or_else(no_gradient)?, module.dh.ok_or_else(no_gradient)?);
                let d = head::lower_norm_backward(l, self.model.mtp[k].norm, norm, dh)?;
                if let Some(from) = walk.d_hidden {
                    l.task(ADD_GRAD, Pass::InputGrad, AddTask { from, into: d })?;
                }
                walk.d = Some(d);
            }
            Step::Join(k) => self.join_backward(l, walk, k)?,
            Step::Head => {
                let dh = walk.forward.dh.ok_or_else(no_gradient)?;
                if let Some(from) = walk.d_hidden {
                    l.task(ADD_GRAD, Pass::InputGrad, AddTask { from, into: dh })?;
                }
                let norm = walk.forward.norm.ok_or_else(no_gradient)?;
                walk.d = Some(head::lower_norm_backward(l, self.weight(self.model.norm)?, norm, dh)?);
            }
            Step::Layer(i, chunk) => {
                // Another stage of this rank may take the gradient after this one's weight gradients are done.
                let hands_over = i == 0 && cell.stage > 0 && self.neighbour(cell.stage - 1, cell.microbatch)?.is_none();
                let forward = |walk: &mut BackwardWalk| walk.forward.layers.pop();
                self.layer_backward(l, walk, chunk, forward, hands_over)?;
            }
            Step::Module(k, chunk) => {
                let forward = |walk: &mut BackwardWalk| walk.forward.modules[k].layer.take();
                self.layer_backward(l, walk, chunk, forward, false)?;
            }
            Step::Leave => {
                let d = walk.d.ok_or_else(no_gradient)?;
                if cell.stage == 0 {
                    self.finish_or_defer(l, walk, Deferred::Embedding(l.inputs.tokens, d), None)?;
                } else if let Some(peer) = self.neighbour(cell.stage - 1, cell.microbatch)? {
                    transfer::lower_send(l, Direction::Backward, d, peer, cell.stage - 1)?;
                } else {
                    l.disown(d);
                    self.handed.insert((Direction::Backward, cell.stage - 1, cell.microbatch), d);
                }
            }
        }
        Ok(())
    }

    fn join_backward(&mut self, l: &mut Lowering, walk: &mut BackwardWalk, k: usize) -> Result<()> {
        let Some(module) = walk.forward.modules.pop() else { return Err("a module did not go forward".into()) };
        let d = walk.d.ok_or("a module has no gradient")?;
        l.layer = Some((self.model.config.num_hidden_layers + k) as u32);
        let join = self.model.mtp[k].lower_input_grad(l, module.join, d)?;
        walk.d_hidden = Some(join.d_hidden);
        let rest = l.take_scope();
        self.finish_or_defer(l, walk, Deferred::Join(k, module.join, join), None)?;
        self.finish_or_defer(l, walk, Deferred::Embedding(module.tokens, join.d_embedded), None)?;
        self.finish_or_defer(l, walk, Deferred::Scope(module.scope), None)?;
        self.finish_or_defer(l, walk, Deferred::Scope(rest), walk.d_hidden)?;
        l.layer = None;
        Ok(())
    }

    fn layer_backward(
        &self,
        l: &mut Lowering,
        walk: &mut BackwardWalk,
        chunk: Chunk,
        forward: impl FnOnce(&mut BackwardWalk) -> Option<LayerForward>,
        hands_over: bool,
    ) -> Result<()> {
        let d = walk.d.ok_or("a layer has no gradient")?;
        if walk.open.is_none() {
            let forward = forward(walk).ok_or("a layer goes backward before it went forward")?;
            walk.open = Some(LayerBackward::begin(l, forward, self.router)?);
        }
        let Some(layer) = &mut walk.open else { return Ok(()) };
        match chunk {
            Chunk::CombineB => layer.combine(l, d)?,
            Chunk::MlpB => layer.mlp(l, d)?,
            Chunk::DispatchB => layer.dispatch(l)?,
            Chunk::MlpW => layer.mlp_weights(l)?,
            Chunk::AttentionB => {
                let dx = layer.attention(l, self.router)?;
                if hands_over && !walk.weights {
                    l.disown(dx);
                }
                layer.own(l.take_scope());
                walk.d = Some(dx);
            }
            Chunk::AttentionW => layer.attention_weights(l, self.router)?,
            _ => return Err(format!("a backward has no chunk {chunk}").into()),
        }
        let is_last = if walk.weights { Chunk::AttentionW } else { Chunk::AttentionB };
        if chunk == is_last
            && let Some(layer) = walk.open.take()
        {
            if walk.weights {
                layer.release(l, walk.d);
            } else {
                let deferred = self.defer_weights(l, layer, &walk.deferred, walk.d)?;
                walk.deferred.push(deferred);
            }
        }
        l.layer = None;
        Ok(())
    }

    /// Weight gradients for later. Of the layer's memory only what they read is kept, what those of the layers after it read, and `next`, which the stage goes on with.
    fn defer_weights(
        &self,
        l: &mut Lowering,
        layer: LayerBackward,
        after: &[Deferred],
        next: Option<Tensor>,
    ) -> Result<Deferred> {
        // A check behind each task needs the task's place in the order.
        if l.checking {
            return Ok(Deferred::Layer(layer));
        }
        let tasks = l.record_for_later(|l| {
            layer.mlp_weights(l)?;
            layer.attention_weights(l, self.router)
        })?;
        let later = after.iter().flat_map(Deferred::tasks).chain(&tasks);
        let used: BTreeSet<_> = later.flat_map(Recorded::uses).map(|tensor| tensor.buffer).collect();
        let is_kept =
            |tensor: &Tensor| used.contains(&tensor.buffer) || next.is_some_and(|n| n.buffer == tensor.buffer);
        let (kept, free): (Vec<_>, Vec<_>) = layer.into_scope().into_iter().partition(is_kept);
        l.release_scope(free, None);
        // What products read is [t, x]; what norms read has the width of the model.
        let is_operand = |t: &&Tensor| t.dtype == l.compute && t.cols() != self.model.config.hidden_size;
        let operands: Vec<Tensor> = kept.iter().filter(is_operand).copied().collect();
        operands.into_iter().for_each(|tensor| l.keep_narrow(tensor, 4));
        Ok(Deferred::Tasks(tasks, kept))
    }

    fn finish_or_defer(
        &self,
        l: &mut Lowering,
        walk: &mut BackwardWalk,
        item: Deferred,
        keep: Option<Tensor>,
    ) -> Result<()> {
        if walk.weights {
            return self.lower_deferred(l, item, keep);
        }
        walk.deferred.push(item);
        Ok(())
    }

    pub(super) fn weight_grad(&mut self, l: &mut Lowering, stage: u32, microbatch: u32) -> Result<()> {
        let deferred = self.deferred.remove(&(stage, microbatch));
        let deferred = deferred.ok_or_else(|| format!("{stage}W{microbatch}: no input gradient went before"))?;
        for item in deferred {
            self.lower_deferred(l, item, None)?;
        }
        Ok(())
    }

    fn lower_deferred(&self, l: &mut Lowering, item: Deferred, keep: Option<Tensor>) -> Result<()> {
        match item {
            Deferred::Layer(layer) => {
                layer.mlp_weights(l)?;
                layer.attention_weights(l, self.router)?;
                layer.release(l, keep);
                l.layer = None;
                Ok(())
            }
            Deferred::Tasks(tasks, scope) => {
                l.launch_later(tasks);
                l.release_scope(scope, keep);
                Ok(())
            }
            Deferred::Join(k, acts, grads) => {
                l.layer = Some((self.model.config.num_hidden_layers + k) as u32);
                self.model.mtp[k].lower_weight_grad(l, acts, grads)
            }
            Deferred::Embedding(tokens, dx) => {
                l.layer = None;
                embedding::lower_weight_grad(l, self.weight(self.model.embedding)?, tokens, dx)
            }
            Deferred::Scope(scope) => {
                l.release_scope(scope, keep);
                Ok(())
            }
        }
    }
}
