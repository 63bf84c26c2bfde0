//! A request as an entity: a text that is to be computed, and how much of it is.
//!
//! There is no phase of prompts and one of answers. A request has tokens, some of them computed; what is not computed yet is work, and
//! when all is, the model says what comes next. If its blocks are taken for others it has computed nothing, and does so again.

use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};

use bevy_ecs::prelude::*;
use kernels::ops::{logits::Adjust, sampling::Sampling};
use serde::Serialize;

use super::{
    grammar::Constraint,
    pool::{Hash, Pool},
    request::{Event, Finish, FinishReason, Logprob, Params, Sink, Submission, Task, Token},
    sample::{self, History},
    text::{Detokenizer, Piece},
};
use crate::data::tokenizer::Tokenizer;

/// A request that was taken.
#[derive(Component)]
pub struct Request {
    /// Number; lower ones came first.
    pub id: u64,
    /// Higher goes first.
    pub priority: i32,
    /// What is wanted.
    pub task: Task,
    /// The prompt and what was generated.
    pub tokens: Vec<u32>,
    /// Tokens of the prompt.
    pub num_prompt: usize,
    /// Tokens whose rows are in the cache.
    pub num_computed: usize,
    /// Blocks that it holds, in order of its tokens.
    pub blocks: Vec<u32>,
    /// What the model proposed to itself to come after the last token.
    pub draft: Option<u32>,
    /// Sum of last hidden states so far, for an embedding.
    pub hidden: Vec<f64>,
    hashes: Vec<Hash>,
    cancelled: Arc<AtomicBool>,
    sink: Box<dyn Sink>,
    text: Detokenizer,
    history: History,
    constraint: Option<Constraint>,
    failure: Option<String>,
    is_deaf: bool,
    is_queued: bool,
    num_cached: Option<usize>,
    num_drafted: usize,
    num_accepted: usize,
    times: Times,
}

/// When what happened, in nanoseconds of the clock.
#[derive(Clone, Copy, Debug, Default)]
struct Times {
    came: u64,
    started: Option<u64>,
    first_token: Option<u64>,
    last_token: Option<u64>,
}

/// Where a request is, between two steps.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum State {
    /// It came, and nothing was computed of it.
    Waiting,
    /// It holds blocks of the cache.
    Running,
    /// Its blocks were taken for others; it waits, and will be computed again.
    Preempted,
}

impl Request {
    /// A request that nothing is computed of.
    pub fn new(id: u64, submission: Submission, cancelled: Arc<AtomicBool>, tokenizer: &Arc<Tokenizer>) -> Self {
        let Submission { prompt, task, priority, sink } = submission;
        let (mut stop, mut history, mut constraint) = (Vec::new(), History::default(), None);
        if let Task::Generate(params) = &task {
            stop.clone_from(&params.stop);
            history = History::new(params, &prompt);
            constraint = params.grammar.as_ref().map(|grammar| grammar.start());
        }
        Request {
            id,
            priority,
            task,
            num_prompt: prompt.len(),
            tokens: prompt,
            num_computed: 0,
            blocks: Vec::new(),
            draft: None,
            hidden: Vec::new(),
            hashes: Vec::new(),
            cancelled,
            sink,
            text: Detokenizer::new(tokenizer.clone(), &stop),
            history,
            constraint,
            failure: None,
            is_deaf: false,
            is_queued: true,
            num_cached: None,
            num_drafted: 0,
            num_accepted: 0,
            times: Times { came: kernels::clock::now_nanos(), ..Times::default() },
        }
    }

    /// Its place among others: the least goes first.
    pub fn order(&self) -> (std::cmp::Reverse<i32>, u64) {
        (std::cmp::Reverse(self.priority), self.id)
    }

    /// Tokens that are not computed, a draft not among them.
    pub fn num_pending(&self) -> usize {
        self.tokens.len() - self.num_computed
    }

    /// How the text goes on, if that is wanted.
    pub fn params(&self) -> Option<&Params> {
        match &self.task {
            Task::Generate(params) => Some(params),
            Task::Embed => None,
        }
    }

    /// Tokens that were generated.
    pub fn num_generated(&self) -> usize {
        self.tokens.len() - self.num_prompt
    }

    /// Where it is.
    pub fn state(&self) -> State {
        match () {
            () if self.is_queued => State::Waiting,
            () if self.blocks.is_empty() => State::Preempted,
            () => State::Running,
        }
    }

    /// Seconds since it came.
    pub fn age_secs(&self) -> f64 {
        kernels::clock::now_nanos().saturating_sub(self.times.came) as f64 * 1e-9
    }

    /// Whether nobody waits for it any more.
    pub fn is_cancelled(&self) -> bool {
        self.is_deaf || self.cancelled.load(Ordering::Relaxed)
    }

    /// It no longer counts among those that wait; true the first time.
    pub fn leave_queue(&mut self) -> bool {
        std::mem::replace(&mut self.is_queued, false)
    }

    /// Holds what the cache has of its beginning, all but the last token at most. An embedding needs every token's hidden state, and
    /// takes nothing.
    pub fn find_prefix(&mut self, pool: &mut Pool) {
        if matches!(self.task, Task::Generate(_)) {
            let most = (self.tokens.len() - 1) / pool.page();
            for block in 0..most {
                let Some(found) = pool.find(self.hash(block, pool.page())) else { break };
                self.blocks.push(found);
            }
        }
        self.num_computed = self.blocks.len() * pool.page();
        self.num_cached.get_or_insert(self.num_computed);
        self.times.started.get_or_insert_with(kernels::clock::now_nanos);
    }

    /// Tokens of its prompt that were in the cache when it was first computed.
    pub fn num_cached(&self) -> usize {
        self.num_cached.unwrap_or(0).min(self.num_prompt)
    }

    /// Holds blocks for `num_tokens` tokens; false if there are too few, and then those it got are kept.
    pub fn reserve(&mut self, pool: &mut Pool, num_tokens: usize) -> bool {
        while self.blocks.len() * pool.page() < num_tokens {
            match pool.take() {
                Some(block) => self.blocks.push(block),
                None => return false,
            }
        }
        true
    }

    /// Lets go of all blocks: nothing is computed then.
    pub fn release(&mut self, pool: &mut Pool) {
        pool.release(self.blocks.drain(..));
        (self.num_computed, self.draft) = (0, None);
        self.hidden.clear();
    }

    /// `num` more tokens are computed; blocks that are full by that can be found by others.
    pub fn computed(&mut self, num: usize, pool: &mut Pool) {
        let before = self.num_computed / pool.page();
        self.num_computed += num;
        for block in before..self.num_computed / pool.page() {
            let hash = self.hash(block, pool.page());
            pool.publish(self.blocks[block], hash);
        }
    }

    fn hash(&mut self, block: usize, page: usize) -> Hash {
        while self.hashes.len() <= block {
            let at = self.hashes.len();
            let hash = Hash::of(self.hashes.last().copied(), &self.tokens[at * page..(at + 1) * page]);
            self.hashes.push(hash);
        }
        self.hashes[block]
    }

    /// Counts a draft that was tried.
    pub fn tried_draft(&mut self, accepted: bool) {
        self.num_drafted += 1;
        self.num_accepted += usize::from(accepted);
    }

    /// How the token after the last one is chosen, and what is changed in its logits before; with a draft, the one after that, too.
    pub fn next_rows(&mut self, draft: Option<u32>) -> Vec<(Sampling, Adjust, Option<usize>)> {
        let Task::Generate(params) = &self.task else { return Vec::new() };
        let allowed = match self.constraint.as_mut().map(Constraint::mask).transpose() {
            Ok(allowed) => allowed,
            Err(why) => {
                self.failure = Some(why);
                None
            }
        };
        let position = self.tokens.len();
        let row = |history: &History, position: usize, allowed| {
            (sample::sampling(params, position), sample::adjust(params, history, allowed), params.logprobs)
        };
        let mut rows = vec![row(&self.history, position, allowed)];
        if let Some(draft) = draft {
            let mut history = self.history.clone();
            history.push(params, draft);
            rows.push(row(&history, position + 1, None));
        }
        rows
    }

    /// Keeps what the model proposes to come next; where a grammar decides, nothing is proposed.
    pub fn propose(&mut self, draft: Option<u32>) {
        self.draft = draft.filter(|_| self.constraint.is_none());
    }

    /// Takes the next token. Says why the text ends here, if it does.
    pub fn push(
        &mut self,
        id: u32,
        logprob: Option<Logprob>,
        end_of_text: u32,
        max_context: usize,
    ) -> Option<FinishReason> {
        let Task::Generate(params) = &self.task else { return Some(FinishReason::Stop) };
        let now = kernels::clock::now_nanos();
        self.times.first_token.get_or_insert(now);
        self.times.last_token = Some(now);
        self.tokens.push(id);
        self.history.push(params, id);
        let ends = id == end_of_text && !params.ignore_eos || params.stop_tokens.contains(&id);
        let piece = if ends { Piece::default() } else { self.text.push(id) };
        let (text, mut stopped) = (piece.text, piece.is_stopped);
        if let Some(constraint) = self.constraint.as_mut().filter(|_| !ends) {
            self.failure = self.failure.take().or(constraint.accept(id).err());
            stopped |= constraint.is_finished();
        }
        let is_long = self.num_generated() >= params.max_tokens || self.tokens.len() >= max_context;
        self.is_deaf |= !self.sink.send(Event::Token(Token { id, text, logprob }));
        match () {
            () if self.failure.is_some() => Some(FinishReason::Stop),
            () if ends || stopped => Some(FinishReason::Stop),
            () if self.is_cancelled() => Some(FinishReason::Cancelled),
            () if is_long => Some(FinishReason::Length),
            () => None,
        }
    }

    /// Says how it ended, and gives the seconds that it took.
    pub fn finish(&mut self, reason: FinishReason) -> f64 {
        let Times { came, started, first_token, last_token } = self.times;
        let now = kernels::clock::now_nanos();
        let secs = |from: u64, to: u64| to.saturating_sub(from) as f64 * 1e-9;
        let started = started.unwrap_or(now);
        let first = first_token.unwrap_or(now);
        let finish = Finish {
            reason,
            text: self.text.finish().text,
            num_prompt_tokens: self.num_prompt,
            num_cached_tokens: self.num_cached(),
            num_generated_tokens: self.num_generated(),
            num_drafted_tokens: self.num_drafted,
            num_accepted_tokens: self.num_accepted,
            queue_secs: secs(came, started),
            prefill_secs: secs(started, first),
            decode_secs: secs(first, last_token.unwrap_or(first)),
        };
        let event = match self.task {
            _ if self.failure.is_some() => Event::Failed(self.failure.take().unwrap_or_default()),
            Task::Generate(_) => Event::Finished(finish),
            Task::Embed if reason == FinishReason::Cancelled => Event::Finished(finish),
            Task::Embed => {
                let mean = self.hidden.iter().map(|sum| (sum / self.num_prompt as f64) as f32).collect();
                Event::Embedding(mean, self.num_prompt)
            }
        };
        self.sink.send(event);
        secs(came, now)
    }
}
