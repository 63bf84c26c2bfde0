//! The way to a serving model, from any thread: a bounded queue in, and counters out.
//!
//! A [`Service`] is given to whoever asks; the model's thread holds the [`Inbox`] at its other end. A full queue is an answer, and not
//! a wait.

use std::{
    collections::BTreeMap,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};

use crossbeam::channel::{Receiver, Sender, TrySendError, bounded};
use parking_lot::Mutex;
use serde::Serialize;

use super::request::{FinishReason, Submission, Task};

/// What a model serves, fixed when it was loaded.
#[derive(Clone, Debug, Default, Serialize)]
pub struct Settings {
    /// Tokens of a prompt and its answer at most.
    pub max_context_tokens: usize,
    /// Requests that wait at most; more are refused.
    pub max_queued: usize,
    /// Rows of the vocabulary.
    pub vocab_size: usize,
    /// Width of an embedding.
    pub hidden_size: usize,
    /// Bytes of cache that a token takes.
    pub cache_bytes_per_token: u64,
    /// The same for plain multi-head attention of as many heads as wide.
    pub mha_cache_bytes_per_token: u64,
    /// Tokens that the cache has room for.
    pub cache_capacity_tokens: usize,
}

/// Why a request was not taken.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum Refused {
    /// As many wait as may.
    #[error("{num_waiting} requests wait, as many as may; try again in {retry_after_secs} s")]
    QueueFull {
        /// Requests that wait.
        num_waiting: usize,
        /// When there may be room.
        retry_after_secs: u64,
    },
    /// No model will ever answer it.
    #[error(
        "expected at most {max_tokens} tokens, the model's context; found {num_prompt_tokens} in the prompt and \
         {num_new_tokens} asked for"
    )]
    TooLong {
        /// Of the prompt.
        num_prompt_tokens: usize,
        /// To generate.
        num_new_tokens: usize,
        /// The model's context.
        max_tokens: usize,
    },
    /// A prompt without tokens, or with one that the model does not know.
    #[error("{0}")]
    Invalid(String),
    /// The model is about to end.
    #[error("the server is shutting down")]
    Closing,
}

/// What comes to the model's thread.
pub enum Message {
    /// A request, under its number.
    Submit(u64, Submission, Arc<AtomicBool>),
}

/// One of the things that may be known of a request that was taken; it can be cancelled by this.
#[derive(Clone, Debug)]
pub struct Ticket {
    /// Number, ascending.
    pub id: u64,
    cancelled: Arc<AtomicBool>,
}

impl Ticket {
    /// Ends the request at the next step. One that has ended is left alone.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }
}

/// Numbers that only grow.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Counters {
    /// Tokens of prompts that were begun.
    pub num_prompt_tokens: u64,
    /// Those that were found in the cache.
    pub num_cached_tokens: u64,
    /// Tokens generated.
    pub num_generated_tokens: u64,
    /// Tokens that MTP proposed.
    pub num_drafted_tokens: u64,
    /// Those that were right.
    pub num_accepted_tokens: u64,
    /// Requests whose blocks were taken for others, and that were computed again.
    pub num_preemptions: u64,
    /// Steps of the model.
    pub num_steps: u64,
    /// Requests that ended, by reason.
    pub num_finished: BTreeMap<&'static str, u64>,
}

/// Experts that tokens of one layer chose.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct LayerLoad {
    /// Which layer.
    pub layer: usize,
    /// Tokens by expert since the model was loaded.
    pub total: Vec<u64>,
    /// Tokens by expert in the last step.
    pub last_step: Vec<u32>,
}

/// How it goes.
#[derive(Clone, Debug, Default, PartialEq, Serialize)]
pub struct Stats {
    /// Requests that are computed.
    pub num_running: usize,
    /// Requests that wait.
    pub num_waiting: usize,
    /// Share of the cache's blocks that requests hold.
    pub cache_usage: f64,
    /// Blocks of the cache, and those that nobody holds.
    pub num_blocks: usize,
    /// See `num_blocks`.
    pub num_free_blocks: usize,
    /// What was done.
    pub counters: Counters,
    /// Loads of experts.
    pub routing: Vec<LayerLoad>,
}

struct Shared {
    settings: Settings,
    stats: Mutex<Stats>,
    num_queued: AtomicUsize,
    next_id: Mutex<u64>,
    closing: AtomicBool,
    /// Seconds that a request took of late, in thousandths.
    recent_millis: AtomicUsize,
}

/// Where requests go.
#[derive(Clone)]
pub struct Service {
    sender: Sender<Message>,
    shared: Arc<Shared>,
}

/// Where they come from: the model's end.
pub struct Inbox {
    receiver: Receiver<Message>,
    shared: Arc<Shared>,
}

/// Both ends.
pub fn channel(settings: Settings) -> (Service, Inbox) {
    let (sender, receiver) = bounded(settings.max_queued.max(1));
    let shared = Arc::new(Shared {
        settings,
        stats: Mutex::default(),
        num_queued: AtomicUsize::new(0),
        next_id: Mutex::new(0),
        closing: AtomicBool::new(false),
        recent_millis: AtomicUsize::new(1000),
    });
    (Service { sender, shared: shared.clone() }, Inbox { receiver, shared })
}

impl Service {
    /// Hands a request in. Its sink is told all else.
    ///
    /// # Errors
    /// If it can never be answered, or not now.
    pub fn submit(&self, submission: Submission) -> Result<Ticket, Refused> {
        let Settings { max_context_tokens, max_queued, vocab_size, .. } = self.shared.settings;
        if self.is_closing() {
            return Err(Refused::Closing);
        }
        let num_new_tokens = match &submission.task {
            Task::Generate(params) => params.max_tokens,
            Task::Embed => 0,
        };
        let num_prompt_tokens = submission.prompt.len();
        if num_prompt_tokens.saturating_add(num_new_tokens) > max_context_tokens {
            return Err(Refused::TooLong { num_prompt_tokens, num_new_tokens, max_tokens: max_context_tokens });
        }
        if num_prompt_tokens == 0 {
            return Err(Refused::Invalid("expected a prompt of at least one token, found none".into()));
        }
        if let Some(token) = submission.prompt.iter().find(|&&token| token as usize >= vocab_size) {
            let expected = format!("expected tokens below {vocab_size}, the size of the vocabulary");
            return Err(Refused::Invalid(format!("{expected}; found {token}")));
        }
        let full = |num_waiting| {
            let millis = self.shared.recent_millis.load(Ordering::Relaxed);
            Refused::QueueFull { num_waiting, retry_after_secs: millis.div_ceil(1000).max(1) as u64 }
        };
        let waiting = self.shared.num_queued.fetch_add(1, Ordering::AcqRel);
        if waiting >= max_queued {
            self.shared.num_queued.fetch_sub(1, Ordering::AcqRel);
            return Err(full(waiting));
        }
        let cancelled = Arc::new(AtomicBool::new(false));
        // Numbers are given in the order of the queue.
        let mut next = self.shared.next_id.lock();
        let id = *next;
        match self.sender.try_send(Message::Submit(id, submission, cancelled.clone())) {
            Ok(()) => {
                *next += 1;
                Ok(Ticket { id, cancelled })
            }
            Err(error) => {
                self.shared.num_queued.fetch_sub(1, Ordering::AcqRel);
                Err(match error {
                    TrySendError::Full(_) => full(waiting),
                    TrySendError::Disconnected(_) => Refused::Closing,
                })
            }
        }
    }

    /// What the model was loaded for.
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// How it goes, as of the last step.
    pub fn stats(&self) -> Stats {
        Stats { num_waiting: self.shared.num_queued.load(Ordering::Acquire), ..self.shared.stats.lock().clone() }
    }

    /// Takes no more requests; the model's thread ends when those it has are done.
    pub fn close(&self) {
        self.shared.closing.store(true, Ordering::Release);
    }

    /// Whether it was closed.
    pub fn is_closing(&self) -> bool {
        self.shared.closing.load(Ordering::Acquire)
    }
}

impl Inbox {
    /// What came; waits for so long if there is nothing.
    pub fn receive(&self, wait: std::time::Duration) -> Vec<Message> {
        let first = if wait.is_zero() { self.receiver.try_recv().ok() } else { self.receiver.recv_timeout(wait).ok() };
        first.into_iter().chain(self.receiver.try_iter()).collect()
    }

    /// What the model was loaded for.
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// A request that waited is computed, or gone: there is room for another.
    pub fn admitted(&self, count: usize) {
        self.shared.num_queued.fetch_sub(count, Ordering::AcqRel);
    }

    /// Requests took so long of late; what a refused one is told to wait follows from it.
    pub fn took(&self, secs: f64) {
        let before = self.shared.recent_millis.load(Ordering::Relaxed) as f64;
        self.shared.recent_millis.store((before * 0.9 + secs * 100.0) as usize, Ordering::Relaxed);
    }

    /// Says how it goes.
    pub fn publish(&self, change: impl FnOnce(&mut Stats)) {
        change(&mut self.shared.stats.lock());
    }

    /// Whether no more will come.
    pub fn is_closing(&self) -> bool {
        self.shared.closing.load(Ordering::Acquire)
    }
}

impl Counters {
    /// Counts an end.
    pub fn finished(&mut self, reason: FinishReason) {
        let name = match reason {
            FinishReason::Stop => "stop",
            FinishReason::Length => "length",
            FinishReason::Cancelled => "abort",
        };
        *self.num_finished.entry(name).or_default() += 1;
    }
}
