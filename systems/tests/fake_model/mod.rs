//! A model that is none: says back what it was told, a token a tick, so that all around a model can be tested without one.
//!
//! It keeps the contract of a real one: answers in the order of the queue as far as there is room, stop texts held back, tickets looked
//! at each step, counters and loads published. What it says depends on the prompt alone.

#![allow(dead_code, reason = "each of the programs that include this uses a part of it")]

use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use kernels::clock::now_nanos;
use systems::{
    data::tokenizer::Tokenizer,
    serve::{
        Counters, Event, Finish, FinishReason, Inbox, LayerLoad, Logprob, Message, Service, Settings, Submission, Task,
        Token, http::Loaded, service,
    },
};

const NUM_LAYERS: usize = 6;
const NUM_EXPERTS: usize = 32;
const TOP_K: usize = 4;

/// How it behaves.
#[derive(Clone, Debug)]
pub struct Options {
    /// Time of a step.
    pub tick: Duration,
    /// Requests that are answered at one time.
    pub max_running: usize,
    /// What is served.
    pub settings: Settings,
}

impl Default for Options {
    fn default() -> Self {
        Options {
            tick: Duration::from_millis(1),
            max_running: 64,
            settings: Settings {
                max_context_tokens: 512,
                max_queued: 64,
                hidden_size: 8,
                cache_bytes_per_token: 1152,
                mha_cache_bytes_per_token: 16384,
                cache_capacity_tokens: 32768,
                ..Settings::default()
            },
        }
    }
}

/// A tokenizer trained on the beginning of Moby-Dick.
pub fn tokenizer() -> Arc<Tokenizer> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../scenes/data/moby-dick.txt");
    let text = std::fs::read_to_string(path).expect("the book");
    let begin = text[..text.floor_char_boundary(60_000)].to_owned();
    Arc::new(Tokenizer::train(&[begin], 600).expect("a tokenizer"))
}

/// The model's thread, and what a server needs of it.
pub struct FakeModel {
    pub service: Service,
    pub tokenizer: Arc<Tokenizer>,
    thread: Option<JoinHandle<()>>,
}

impl FakeModel {
    /// Starts it.
    pub fn start(tokenizer: Arc<Tokenizer>, options: Options) -> Self {
        let settings = Settings { vocab_size: tokenizer.vocab_size(), ..options.settings };
        let (service, inbox) = service::channel(settings);
        let own = tokenizer.clone();
        let (tick, max_running) = (options.tick, options.max_running);
        let thread = std::thread::Builder::new()
            .name("fake-model".into())
            .spawn(move || run(&inbox, &own, tick, max_running))
            .expect("a thread");
        FakeModel { service, tokenizer, thread: Some(thread) }
    }

    /// As a server gets it; `folder` is where a chat template may be.
    pub fn loaded(&self, folder: &Path) -> Loaded {
        Loaded::open(self.service.clone(), self.tokenizer.clone(), folder, None).expect("a readable folder")
    }
}

impl Drop for FakeModel {
    fn drop(&mut self) {
        self.service.close();
        if let Some(thread) = self.thread.take() {
            thread.join().expect("the model ends");
        }
    }
}

/// An answer that grows.
struct Running {
    submission: Submission,
    cancelled: Arc<AtomicBool>,
    reply: Vec<u32>,
    num_said: usize,
    held: String,
    queue_secs: f64,
    begin_nanos: u64,
}

fn run(inbox: &Inbox, tokenizer: &Tokenizer, tick: Duration, max_running: usize) {
    let mut waiting: Vec<(u64, Submission, Arc<AtomicBool>, u64)> = Vec::new();
    let mut running: Vec<Running> = Vec::new();
    let mut counters = Counters::default();
    let mut totals = vec![vec![0u64; NUM_EXPERTS]; NUM_LAYERS];
    while !(inbox.is_closing() && waiting.is_empty() && running.is_empty()) {
        let idle = waiting.is_empty() && running.is_empty();
        for Message::Submit(id, submission, cancelled) in
            inbox.receive(if idle { Duration::from_millis(20) } else { Duration::ZERO })
        {
            waiting.push((id, submission, cancelled, now_nanos()));
        }
        while running.len() < max_running && !waiting.is_empty() {
            let first = (0..waiting.len()).max_by_key(|&at| (waiting[at].1.priority, u64::MAX - waiting[at].0));
            let (_, submission, cancelled, since) = waiting.remove(first.expect("one that waits"));
            inbox.admitted(1);
            counters.num_prompt_tokens += submission.prompt.len() as u64;
            let reply = reply(tokenizer, &submission.prompt);
            let queue_secs = (now_nanos() - since) as f64 * 1e-9;
            let begin_nanos = now_nanos();
            let held = String::new();
            running.push(Running { submission, cancelled, reply, num_said: 0, held, queue_secs, begin_nanos });
        }
        let mut loads = vec![vec![0u32; NUM_EXPERTS]; NUM_LAYERS];
        running.retain_mut(|one| match one.step(tokenizer, &mut loads) {
            None => {
                counters.num_generated_tokens += 1;
                true
            }
            Some(reason) => {
                counters.finished(reason);
                inbox.took((now_nanos() - one.begin_nanos) as f64 * 1e-9);
                false
            }
        });
        for (total, load) in totals.iter_mut().zip(&loads) {
            total.iter_mut().zip(load).for_each(|(total, &load)| *total += u64::from(load));
        }
        counters.num_steps += u64::from(!idle);
        inbox.publish(|stats| {
            stats.num_running = running.len();
            stats.cache_usage = running.len() as f64 / max_running as f64;
            stats.counters = counters.clone();
            let layers = totals.iter().zip(loads).enumerate();
            stats.routing = layers
                .map(|(layer, (total, last_step))| LayerLoad { layer, total: total.clone(), last_step })
                .collect();
        });
        if !running.is_empty() {
            std::thread::sleep(tick);
        }
    }
}

impl Running {
    /// One step; why it ended, if it did.
    fn step(&mut self, tokenizer: &Tokenizer, loads: &mut [Vec<u32>]) -> Option<FinishReason> {
        let params = match &self.submission.task {
            Task::Generate(params) => params.clone(),
            Task::Embed => {
                let num_tokens = self.submission.prompt.len();
                let embedding = embedding(&self.submission.prompt);
                self.submission.sink.send(Event::Embedding(embedding, num_tokens));
                return Some(FinishReason::Stop);
            }
        };
        if self.cancelled.load(Ordering::Relaxed) {
            return Some(self.finish(FinishReason::Cancelled, String::new()));
        }
        // An end of text of the reply's own, seed or not.
        let Some(&id) = self.reply.get(self.num_said) else {
            let held = std::mem::take(&mut self.held);
            return Some(self.finish(FinishReason::Stop, held));
        };
        self.num_said += 1;
        for (layer, load) in loads.iter_mut().enumerate() {
            for choice in 0..TOP_K {
                // The mixer of SplitMix64, so that each layer has favourites of its own.
                let mut hash =
                    (u64::from(id) << 16 | (layer * TOP_K + choice) as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15);
                hash = (hash ^ (hash >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
                hash = (hash ^ (hash >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
                // Squared, so that some experts are liked more.
                let unit = (hash >> 40) as f64 / (1u64 << 24) as f64;
                load[(unit * unit * NUM_EXPERTS as f64) as usize] += 1;
            }
        }
        if params.stop_tokens.contains(&id) {
            let held = std::mem::take(&mut self.held);
            return Some(self.finish(FinishReason::Stop, held));
        }
        self.held.push_str(&tokenizer.decode(&[id], true));
        let stopped = params.stop.iter().filter_map(|stop| self.held.find(stop.as_str())).min();
        if let Some(at) = stopped {
            self.held.truncate(at);
        }
        let certain = self.held.len() - if stopped.is_some() { 0 } else { may_begin(&self.held, &params.stop) };
        let text: String = self.held.drain(..certain).collect();
        let logprob = params.logprobs.map(|count| logprob(id, count, tokenizer.vocab_size()));
        if !self.submission.sink.send(Event::Token(Token { id, text, logprob })) {
            return Some(FinishReason::Cancelled);
        }
        if stopped.is_some() {
            return Some(self.finish(FinishReason::Stop, String::new()));
        }
        if self.num_said >= params.max_tokens {
            let held = std::mem::take(&mut self.held);
            return Some(self.finish(FinishReason::Length, held));
        }
        None
    }

    fn finish(&mut self, reason: FinishReason, text: String) -> FinishReason {
        let decode_secs = (now_nanos() - self.begin_nanos) as f64 * 1e-9;
        self.submission.sink.send(Event::Finished(Finish {
            reason,
            text,
            num_prompt_tokens: self.submission.prompt.len(),
            num_cached_tokens: self.submission.prompt.len() / 2,
            num_generated_tokens: self.num_said,
            num_drafted_tokens: 0,
            num_accepted_tokens: 0,
            queue_secs: self.queue_secs,
            prefill_secs: 0.0,
            decode_secs,
        }));
        reason
    }
}

/// The longest end of `text` with which a stop text begins, in bytes.
fn may_begin(text: &str, stops: &[String]) -> usize {
    let longest = |stop: &String| {
        (1..stop.len()).rev().find(|&length| stop.is_char_boundary(length) && text.ends_with(&stop[..length]))
    };
    stops.iter().filter_map(longest).max().unwrap_or(0)
}

/// What the last speaker said, or all of a prompt that is no chat.
fn reply(tokenizer: &Tokenizer, prompt: &[u32]) -> Vec<u32> {
    let text = tokenizer.decode(prompt, true);
    let said = text.rsplit("User:").next().unwrap_or_default();
    let said = said.split("\n\nAssistant:").next().unwrap_or_default();
    tokenizer.encode(said).expect("tokens of a text")
}

fn logprob(id: u32, count: usize, vocab_size: usize) -> Logprob {
    let top = (0..count).map(|rank| ((id + rank as u32) % vocab_size as u32, -0.25 - rank as f32)).collect();
    Logprob { token: -0.25, top }
}

/// Numbers that depend on the tokens and their order.
pub fn embedding(prompt: &[u32]) -> Vec<f32> {
    let at = |axis: usize| {
        let sum: f32 =
            prompt.iter().enumerate().map(|(place, &id)| ((id as usize * (axis + 1) + place) % 17) as f32).sum();
        sum / prompt.len() as f32
    };
    (0..8).map(at).collect()
}
