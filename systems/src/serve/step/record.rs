//! After a serving step: each request is handed what was made of its share, and some of them end by it.

use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{memory::Memory, ops::logits::Logprobs};

use super::{Server, graph::MAX_LOGPROBS};
use crate::{
    model,
    routing::ExpertCounts,
    serve::{
        request::{FinishReason, Logprob, Task},
        requests::Request,
        schedule::{Queues, Share},
    },
};

pub(in crate::serve) fn record(world: &mut World) {
    world.resource_scope(|world, mut server: Mut<Server>| {
        world.resource_scope(|world, mut queues: Mut<Queues>| server.record(world, &mut queues));
    });
}

impl Server {
    fn record(&mut self, world: &mut World, queues: &mut Queues) {
        let step = std::mem::take(&mut self.step);
        let memory = world.resource::<Tensors>().memory().clone();
        self.num_step_tokens = step.shape.tokens;
        if step.shape.tokens > 0 {
            let tensors = self.plans[&step.shape];
            let (mut tokens, mut drafts, mut hidden) = (Vec::new(), Vec::new(), Vec::new());
            if step.shape.chosen > 0 {
                tokens = memory.read::<u32>(tensors.tokens).to_vec();
                if self.capacity.speculate {
                    drafts = memory.read::<u32>(tensors.drafts).to_vec();
                }
            }
            if step.shape.embedded > 0 {
                hidden = model::download(&memory, tensors.hidden);
            }
            let mut rows = Rows {
                tokens: tokens.into_iter(),
                drafts: drafts.into_iter(),
                logprobs: logprobs(&memory, tensors.logprobs, &step.told).into_iter(),
                hidden: &hidden,
                width: tensors.hidden.cols(),
            };
            for share in &step.shares {
                if let Some(reason) = self.advance(world, share, &mut rows) {
                    self.finish(world, queues, share.entity, reason);
                }
            }
            self.counters.num_steps += 1;
            self.count_experts(world, &memory);
        }
        self.counters.num_preemptions = queues.num_preemptions;
        let (num_blocks, num_free) = (self.pool.num_blocks(), self.pool.num_free());
        self.inbox.publish(|stats| {
            stats.num_running = queues.running.len();
            stats.num_blocks = num_blocks;
            stats.num_free_blocks = num_free;
            stats.cache_usage = 1.0 - num_free as f64 / num_blocks.max(1) as f64;
            stats.counters.clone_from(&self.counters);
            stats.routing.clone_from(&self.routing);
        });
    }

    /// Hands a request what the step made of its share; says why it ends, if it does.
    fn advance(&mut self, world: &mut World, share: &Share, rows: &mut Rows) -> Option<FinishReason> {
        let end_of_text = self.tokenizer.end_of_text();
        let max_context = self.capacity.max_context;
        let mut request = world.get_mut::<Request>(share.entity)?;
        let catches_up = share.num_tokens == request.num_pending();
        if let Task::Embed = request.task {
            rows.add_hidden(&mut request.hidden, share.num_tokens);
            request.computed(share.num_tokens, &mut self.pool);
            return catches_up.then_some(FinishReason::Stop);
        }
        if !catches_up {
            request.computed(share.num_tokens, &mut self.pool);
            return None;
        }
        let (chosen, logprob) = rows.next()?;
        let mut proposed = rows.drafts.next();
        let mut ended = request.push(chosen, logprob, end_of_text, max_context);
        self.counters.num_generated_tokens += 1;
        let mut num_computed = share.num_tokens;
        if let Some(draft) = share.draft {
            let ((next, logprob), after) = (rows.next()?, rows.drafts.next());
            let accepted = draft == chosen;
            request.tried_draft(accepted);
            self.counters.num_drafted_tokens += 1;
            if accepted {
                self.counters.num_accepted_tokens += 1;
                (num_computed, proposed) = (num_computed + 1, after);
                if ended.is_none() {
                    ended = request.push(next, logprob, end_of_text, max_context);
                    self.counters.num_generated_tokens += 1;
                }
            }
        }
        request.computed(num_computed, &mut self.pool);
        request.propose(proposed);
        ended
    }

    fn count_experts(&mut self, world: &World, memory: &Memory) {
        let counts = &world.resource::<ExpertCounts>().0;
        for load in &mut self.routing {
            let Some((_, counts)) = counts.iter().find(|(layer, _)| *layer == load.layer) else { continue };
            load.last_step = memory.read::<u32>(*counts).to_vec();
            load.total.iter_mut().zip(&load.last_step).for_each(|(total, last)| *total += u64::from(*last));
            memory.upload(*counts, &vec![0u32; counts.len()]);
        }
    }
}

/// What a step made, taken share by share.
struct Rows<'a> {
    tokens: std::vec::IntoIter<u32>,
    drafts: std::vec::IntoIter<u32>,
    logprobs: std::vec::IntoIter<Option<Logprob>>,
    hidden: &'a [f32],
    width: usize,
}

/// What is told of each row.
fn logprobs(memory: &Memory, from: Logprobs, told: &[Option<usize>]) -> Vec<Option<Logprob>> {
    if told.iter().all(Option::is_none) {
        return vec![None; told.len()];
    }
    let (token, top) = (model::download(memory, from.token), model::download(memory, from.top));
    let ids = memory.read::<u32>(from.top_ids);
    let of_row = |(row, told): (usize, &Option<usize>)| {
        let at = row * MAX_LOGPROBS;
        told.map(|k| Logprob { token: token[row], top: (at..at + k).map(|i| (ids[i], top[i])).collect() })
    };
    told.iter().enumerate().map(of_row).collect()
}

impl Rows<'_> {
    fn next(&mut self) -> Option<(u32, Option<Logprob>)> {
        Some((self.tokens.next()?, self.logprobs.next().flatten()))
    }

    fn add_hidden(&mut self, sums: &mut Vec<f64>, num_tokens: usize) {
        let (rows, rest) = self.hidden.split_at(num_tokens * self.width);
        self.hidden = rest;
        sums.resize(self.width, 0.0);
        for row in rows.chunks_exact(self.width) {
            sums.iter_mut().zip(row).for_each(|(sum, x)| *sum += f64::from(*x));
        }
    }
}
