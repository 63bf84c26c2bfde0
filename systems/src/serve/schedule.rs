//! Which tokens of which requests the next step computes.
//!
//! A step has room for so many tokens. Texts that need one more come first: a step that computes a prompt besides does not hold them
//! up. What is left goes to prompts, in shares, so that a short one need not wait for a long one; then to requests that wait. Where the
//! cache is full, the request that came last gives its blocks back and waits again.

use bevy_ecs::prelude::*;

use super::{pool::Pool, requests::Request};

/// What bounds a step.
#[derive(Clone, Copy, Debug)]
pub struct Limits {
    /// Tokens of a step at most.
    pub step_tokens: usize,
    /// Requests that are computed at a time at most.
    pub max_running: usize,
}

/// What a step computes of one request.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Share {
    /// The request.
    pub entity: Entity,
    /// Its next tokens, so many.
    pub num_tokens: usize,
    /// And its draft behind them.
    pub draft: Option<u32>,
}

impl Share {
    /// Rows of the step.
    pub fn num_rows(&self) -> usize {
        self.num_tokens + usize::from(self.draft.is_some())
    }
}

/// All requests, by where they are.
#[derive(Resource, Debug, Default)]
pub struct Queues {
    /// Those with blocks, most urgent first.
    pub running: Vec<Entity>,
    /// Those without, most urgent first.
    pub waiting: Vec<Entity>,
    /// How often blocks were taken from a request.
    pub num_preemptions: u64,
}

/// Prompts that share a step's room, at most.
const SHARES: usize = 4;

impl Queues {
    /// Whether there is nothing to do.
    pub fn is_empty(&self) -> bool {
        self.running.is_empty() && self.waiting.is_empty()
    }

    /// Puts a request among those that wait.
    pub fn wait(&mut self, entity: Entity, requests: &Query<&mut Request>) {
        insert(&mut self.waiting, entity, requests);
    }

    /// Forgets a request.
    pub fn remove(&mut self, entity: Entity) {
        self.running.retain(|other| *other != entity);
        self.waiting.retain(|other| *other != entity);
    }

    /// The shares of the next step.
    pub fn schedule(&mut self, requests: &mut Query<&mut Request>, pool: &mut Pool, limits: Limits) -> Vec<Share> {
        let mut step = Step { shares: Vec::new(), left: limits.step_tokens, preempted: false };
        let pending = |requests: &Query<&mut Request>, entity| requests.get(entity).map_or(0, Request::num_pending);
        let (short, long): (Vec<_>, Vec<_>) =
            self.running.clone().into_iter().partition(|&entity| pending(requests, entity) <= 1);
        for entity in short {
            self.grant(&mut step, entity, usize::MAX, requests, pool);
        }
        let room = limits.max_running.saturating_sub(self.running.len()).min(self.waiting.len());
        let part = (step.left / (long.len() + room).clamp(1, SHARES)).max(pool.page());
        for &entity in &long {
            self.grant(&mut step, entity, part, requests, pool);
        }
        while !step.preempted && step.left > 0 && self.running.len() < limits.max_running {
            let Some(&entity) = self.waiting.first() else { break };
            if !self.admit(&mut step, entity, part, requests, pool) {
                break;
            }
        }
        for entity in self.running.clone() {
            if pending(requests, entity) > 1 {
                self.grant(&mut step, entity, usize::MAX, requests, pool);
            }
        }
        step.shares
    }

    /// Gives a running request up to `most` tokens more of the step.
    fn grant(
        &mut self,
        step: &mut Step,
        entity: Entity,
        most: usize,
        requests: &mut Query<&mut Request>,
        pool: &mut Pool,
    ) {
        if !self.running.contains(&entity) {
            return;
        }
        let granted = step.shares.iter().find(|share| share.entity == entity).map_or(0, |share| share.num_tokens);
        let Ok(request) = requests.get(entity) else { return };
        let num_tokens = (request.num_pending() - granted).min(step.left).min(most);
        if num_tokens == 0 {
            return;
        }
        let catches_up = granted + num_tokens == request.num_pending();
        let draft = request.draft.filter(|_| catches_up && step.left > num_tokens);
        let wanted = request.num_computed + granted + num_tokens + usize::from(draft.is_some());
        loop {
            let Ok(mut request) = requests.get_mut(entity) else { return };
            if request.reserve(pool, wanted) {
                break;
            }
            let Some(&last) = self.running.last() else { return };
            self.preempt(step, last, requests, pool);
            if last == entity {
                return;
            }
        }
        step.left -= num_tokens + usize::from(draft.is_some());
        match step.shares.iter_mut().find(|share| share.entity == entity) {
            Some(share) => (share.num_tokens, share.draft) = (share.num_tokens + num_tokens, draft),
            None => step.shares.push(Share { entity, num_tokens, draft }),
        }
    }

    fn preempt(&mut self, step: &mut Step, entity: Entity, requests: &mut Query<&mut Request>, pool: &mut Pool) {
        if let Ok(mut request) = requests.get_mut(entity) {
            request.release(pool);
        }
        if let Some(at) = step.shares.iter().position(|share| share.entity == entity) {
            step.left += step.shares.remove(at).num_rows();
        }
        self.remove(entity);
        self.wait(entity, requests);
        step.preempted = true;
        self.num_preemptions += 1;
    }

    /// Starts on a request that waits; false if the cache has no room for it now.
    fn admit(
        &mut self,
        step: &mut Step,
        entity: Entity,
        most: usize,
        requests: &mut Query<&mut Request>,
        pool: &mut Pool,
    ) -> bool {
        let Ok(mut request) = requests.get_mut(entity) else {
            self.remove(entity);
            return true;
        };
        request.find_prefix(pool);
        let num_tokens = request.num_pending().min(step.left).min(most);
        let wanted = request.num_computed + num_tokens;
        if !request.reserve(pool, wanted) {
            request.release(pool);
            return false;
        }
        self.waiting.remove(0);
        insert(&mut self.running, entity, requests);
        step.left -= num_tokens;
        step.shares.push(Share { entity, num_tokens, draft: None });
        true
    }
}

/// Puts a request at its place.
fn insert(queue: &mut Vec<Entity>, entity: Entity, requests: &Query<&mut Request>) {
    let order = |entity: &Entity| requests.get(*entity).ok().map(Request::order);
    let at = queue.partition_point(|other| order(other) < order(&entity));
    queue.insert(at, entity);
}

struct Step {
    shares: Vec<Share>,
    left: usize,
    preempted: bool,
}
