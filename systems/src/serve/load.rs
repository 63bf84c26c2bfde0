//! A load on a serving model: requests that come at random times, and how long each waited for what.
//!
//! Arrivals are a Poisson process: what comes does not depend on what was answered, as with many users. Without a rate all requests come
//! at once, or so many at a time as `concurrency` says. Prompts are random tokens, of which a share is the same for all.

use std::time::Duration;

use rand::{RngExt as _, SeedableRng as _};
use rand_chacha::ChaCha8Rng;
use serde::Serialize;

use super::{Params, Service, Task, host::Host};
use crate::{
    generate::{Answer, Collected},
    session::SessionError,
};

/// What to ask, and how fast.
#[derive(Clone, Debug)]
pub struct Load {
    /// Requests.
    pub num_requests: usize,
    /// Requests a second, at random times; `None` for as fast as `concurrency` allows.
    pub rate: Option<f64>,
    /// Requests at a time at most.
    pub concurrency: usize,
    /// Tokens of a prompt: from the first to the second, all as likely.
    pub prompt_tokens: (usize, usize),
    /// Tokens of an answer: likewise.
    pub new_tokens: (usize, usize),
    /// Tokens that all prompts begin with.
    pub shared_tokens: usize,
    /// Seed of all that is random.
    pub seed: u64,
}

/// Of some values: median, 90th and 99th percentile.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub struct Percentiles {
    /// Half are below.
    pub p50: f64,
    /// Nine in ten are below.
    pub p90: f64,
    /// 99 in a hundred are below.
    pub p99: f64,
}

impl Percentiles {
    /// Of `values`, by nearest rank; zeros for none.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let at = |share: f64| {
            let rank = (share * values.len() as f64).ceil() as usize;
            values.get(rank.saturating_sub(1)).copied().unwrap_or(0.0)
        };
        Percentiles { p50: at(0.5), p90: at(0.9), p99: at(0.99) }
    }
}

/// How a model bore a load.
#[derive(Clone, Debug, Serialize)]
pub struct LoadReport {
    /// Requests answered.
    pub num_requests: usize,
    /// From the first request to the end of the last answer.
    pub secs: f64,
    /// Tokens of prompts.
    pub num_prompt_tokens: usize,
    /// Generated tokens.
    pub num_generated_tokens: usize,
    /// Generated tokens over time.
    pub generated_tokens_per_sec: f64,
    /// Prompts' and generated tokens over time.
    pub total_tokens_per_sec: f64,
    /// From a request's arrival to its first token.
    pub first_token_secs: Percentiles,
    /// Between tokens of an answer.
    pub inter_token_secs: Percentiles,
    /// Tokens of prompts that were found in the cache, over all of them.
    pub cache_hit_share: f64,
    /// Tokens that MTP proposed and that were right, over all it proposed; `None` if it proposed nothing.
    pub acceptance_share: Option<f64>,
    /// Requests whose blocks were taken for others.
    pub num_preemptions: u64,
    /// Steps of the model.
    pub num_steps: u64,
    /// Bytes of cache that a token takes.
    pub cache_bytes_per_token: u64,
    /// The same for plain multi-head attention of the same heads.
    pub mha_cache_bytes_per_token: u64,
}

fn between(rng: &mut ChaCha8Rng, (low, high): (usize, usize)) -> usize {
    rng.random_range(low..=high.max(low))
}

/// Puts `load` on a model, and waits for all answers.
///
/// # Errors
/// If a request is refused, or the model fails.
pub fn run(host: &Host, load: &Load) -> Result<LoadReport, SessionError> {
    let service = &host.service;
    let mut rng = ChaCha8Rng::seed_from_u64(load.seed);
    let vocab = service.settings().vocab_size as u32;
    let shared: Vec<u32> = (0..load.shared_tokens).map(|_| rng.random_range(0..vocab)).collect();
    let begin = kernels::clock::now_nanos();
    let before = service.stats().counters;
    let (mut answers, mut due) = (Vec::new(), begin);
    for i in 0..load.num_requests {
        let mut prompt = shared.clone();
        prompt.extend((0..between(&mut rng, load.prompt_tokens).max(1)).map(|_| rng.random_range(0..vocab)));
        let params = Params {
            max_tokens: between(&mut rng, load.new_tokens),
            temperature: 0.0,
            seed: i as u64,
            ignore_eos: true,
            ..Params::default()
        };
        if let Some(rate) = load.rate {
            due += (-(1.0 - rng.random::<f64>()).ln() / rate * 1e9) as u64;
            wait_until(host, || kernels::clock::now_nanos() >= due)?;
        }
        wait_until(host, || running(&answers) < load.concurrency)?;
        let asked = kernels::clock::now_nanos();
        let answer = Answer::ask(service, prompt, Task::Generate(params), None);
        answers.push((asked, answer.map_err(SessionError::input)?));
    }
    wait_until(host, || running(&answers) == 0)?;
    let collected: Vec<(u64, Collected)> = answers.iter().map(|(asked, answer)| (*asked, answer.get())).collect();
    Ok(report(service, &collected, (begin, kernels::clock::now_nanos()), &before))
}

fn running(answers: &[(u64, Answer)]) -> usize {
    answers.iter().filter(|(_, answer)| !answer.is_done()).count()
}

fn wait_until(host: &Host, is_so: impl Fn() -> bool) -> Result<(), SessionError> {
    while !is_so() {
        if host.has_ended() {
            return Err(SessionError::runtime("the model ended before all requests were answered"));
        }
        std::thread::sleep(Duration::from_micros(200));
    }
    Ok(())
}

fn report(
    service: &Service,
    answers: &[(u64, Collected)],
    (begin, end): (u64, u64),
    before: &super::Counters,
) -> LoadReport {
    let secs = (end - begin) as f64 * 1e-9;
    let finishes = || answers.iter().filter_map(|(_, answer)| answer.finish.as_ref());
    let first = |(asked, answer): &(u64, Collected)| {
        answer.token_nanos.first().map(|nanos| nanos.saturating_sub(*asked) as f64 * 1e-9)
    };
    let num_prompt_tokens = finishes().map(|finish| finish.num_prompt_tokens).sum();
    let num_cached: usize = finishes().map(|finish| finish.num_cached_tokens).sum();
    let num_generated_tokens: usize = finishes().map(|finish| finish.num_generated_tokens).sum();
    let after = service.stats().counters;
    let drafted = after.num_drafted_tokens - before.num_drafted_tokens;
    let accepted = after.num_accepted_tokens - before.num_accepted_tokens;
    let settings = service.settings();
    LoadReport {
        num_requests: answers.len(),
        secs,
        num_prompt_tokens,
        num_generated_tokens,
        generated_tokens_per_sec: num_generated_tokens as f64 / secs,
        total_tokens_per_sec: (num_prompt_tokens + num_generated_tokens) as f64 / secs,
        first_token_secs: Percentiles::of(answers.iter().filter_map(first).collect()),
        inter_token_secs: Percentiles::of(answers.iter().flat_map(|(_, answer)| answer.token_secs()).collect()),
        cache_hit_share: num_cached as f64 / (num_prompt_tokens as f64).max(1.0),
        acceptance_share: (drafted > 0).then(|| accepted as f64 / drafted as f64),
        num_preemptions: after.num_preemptions - before.num_preemptions,
        num_steps: after.num_steps - before.num_steps,
        cache_bytes_per_token: settings.cache_bytes_per_token,
        mha_cache_bytes_per_token: settings.mha_cache_bytes_per_token,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_values_that_were_there() {
        let values: Vec<f64> = (1..=200).map(f64::from).collect();
        assert_eq!(Percentiles::of(values), Percentiles { p50: 100.0, p90: 180.0, p99: 198.0 });
        assert_eq!(Percentiles::of(vec![3.0]), Percentiles { p50: 3.0, p90: 3.0, p99: 3.0 });
        assert_eq!(Percentiles::of(Vec::new()), Percentiles::default());
    }
}
