//! `GET /metrics`: what Prometheus asks for, under vLLM's names after a prefix of one's own, so that a board made for one shows the
//! other.
//!
//! What the model counts is read when it is asked for; how long requests take is measured where their events come by, on the model's
//! thread, so that a slow client is not taken for a slow model. Loads of experts are aggregates here; all of them are at `/v1/routing`.

use std::{fmt, sync::Arc};

use kernels::ops::balance::max_vio;
use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, prometheus_text},
    metrics::{counter::ConstCounter, gauge::ConstGauge, histogram::Histogram},
    registry::Registry,
};

use crate::serve::{Event, FinishReason, Stats};

const FIRST_TOKEN_SECS: [f64; 22] = [
    0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0,
    160.0, 640.0, 2560.0,
];
const INTER_TOKEN_SECS: [f64; 19] =
    [0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0];
const REQUEST_SECS: [f64; 21] = [
    0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0, 960.0,
    1920.0, 7680.0,
];

/// Times of requests.
#[derive(Debug)]
pub(super) struct Metrics {
    prefix: String,
    model_name: String,
    first_token_secs: Histogram,
    inter_token_secs: Histogram,
    e2e_secs: Histogram,
    queue_secs: Histogram,
    prefill_secs: Histogram,
    decode_secs: Histogram,
}

impl Metrics {
    /// None yet.
    pub(super) fn new(prefix: &str, model_name: &str) -> Self {
        let request = || Histogram::new(REQUEST_SECS);
        Metrics {
            prefix: prefix.into(),
            model_name: model_name.into(),
            first_token_secs: Histogram::new(FIRST_TOKEN_SECS),
            inter_token_secs: Histogram::new(INTER_TOKEN_SECS),
            e2e_secs: request(),
            queue_secs: request(),
            prefill_secs: request(),
            decode_secs: request(),
        }
    }

    /// All of them as text; of the model, if there is one.
    pub(super) fn text(&self, stats: Option<Stats>) -> Result<String, fmt::Error> {
        let labels = [("model_name".into(), self.model_name.clone().into())];
        let mut registry = Registry::with_labels(labels.into_iter());
        let name = |name: &str| format!("{}:{name}", self.prefix);
        for (suffix, help, histogram) in [
            ("time_to_first_token_seconds", "From a request to its first token, in seconds", &self.first_token_secs),
            ("inter_token_latency_seconds", "Between two tokens of an answer, in seconds", &self.inter_token_secs),
            ("e2e_request_latency_seconds", "From a request to its last token, in seconds", &self.e2e_secs),
            ("request_queue_time_seconds", "From a request to its first computed token, in seconds", &self.queue_secs),
            (
                "request_prefill_time_seconds",
                "From there to the first token of the answer, in seconds",
                &self.prefill_secs,
            ),
            ("request_decode_time_seconds", "From there to the last, in seconds", &self.decode_secs),
        ] {
            registry.register(name(suffix), help, histogram.clone());
        }
        if let Some(stats) = stats {
            registry.register_collector(Box::new(OfModel { prefix: self.prefix.clone(), stats }));
        }
        let mut text = String::new();
        prometheus_text::encode(&mut text, &registry)?;
        Ok(text)
    }
}

/// What the model counts.
#[derive(Debug)]
struct OfModel {
    prefix: String,
    stats: Stats,
}

impl Collector for OfModel {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        let Stats { num_running, num_waiting, cache_usage, counters, routing, .. } = &self.stats;
        let name = |name: &str| format!("{}:{name}", self.prefix);
        for (suffix, help, value) in [
            ("num_requests_running", "Requests that are computed", *num_running as f64),
            ("num_requests_waiting", "Requests that wait", *num_waiting as f64),
            ("kv_cache_usage_perc", "Share of the cache's blocks that requests hold; 1 is all", *cache_usage),
        ] {
            let gauge = ConstGauge::new(value);
            gauge.encode(encoder.encode_descriptor(&name(suffix), help, None, gauge.metric_type())?)?;
        }
        for (suffix, help, value) in [
            ("prompt_tokens", "Tokens of prompts, computed or found in the cache", counters.num_prompt_tokens),
            ("generation_tokens", "Tokens generated", counters.num_generated_tokens),
            ("num_preemptions", "Requests whose blocks were taken for others", counters.num_preemptions),
            ("prefix_cache_queries", "Tokens that were looked for in the cache", counters.num_prompt_tokens),
            ("prefix_cache_hits", "Tokens that were found in the cache", counters.num_cached_tokens),
            ("spec_decode_num_draft_tokens", "Tokens that the model proposed to itself", counters.num_drafted_tokens),
            ("spec_decode_num_accepted_tokens", "Those that were right", counters.num_accepted_tokens),
        ] {
            let counter = ConstCounter::new(value);
            counter.encode(encoder.encode_descriptor(&name(suffix), help, None, counter.metric_type())?)?;
        }
        let finished = ConstCounter::new(0u64);
        let (full_name, help) = (name("request_success"), "Requests that ended, by reason");
        let mut family = encoder.encode_descriptor(&full_name, help, None, finished.metric_type())?;
        for (reason, count) in &counters.num_finished {
            ConstCounter::new(*count).encode(family.encode_family(&[("finished_reason", *reason)])?)?;
        }
        let load = ConstGauge::new(0.0f64);
        let help = "Most loaded expert over the mean, minus 1, since the model was loaded";
        let full_name = name("expert_load_max_vio");
        let mut family = encoder.encode_descriptor(&full_name, help, None, load.metric_type())?;
        for layer in routing {
            let value = ConstGauge::new(max_vio(&layer.total));
            value.encode(family.encode_family(&[("layer", layer.layer.to_string())])?)?;
        }
        Ok(())
    }
}

/// Measures one request.
pub(super) struct Timer {
    metrics: Arc<Metrics>,
    submitted_nanos: u64,
    last_token_nanos: Option<u64>,
}

impl Timer {
    /// From now on.
    pub(super) fn new(metrics: Arc<Metrics>, now_nanos: u64) -> Self {
        Timer { metrics, submitted_nanos: now_nanos, last_token_nanos: None }
    }

    /// Something came at this time.
    pub(super) fn see(&mut self, event: &Event, now_nanos: u64) {
        let secs_since = |nanos: u64| now_nanos.saturating_sub(nanos) as f64 * 1e-9;
        match event {
            Event::Token(_) => {
                match self.last_token_nanos {
                    None => self.metrics.first_token_secs.observe(secs_since(self.submitted_nanos)),
                    Some(last) => self.metrics.inter_token_secs.observe(secs_since(last)),
                }
                self.last_token_nanos = Some(now_nanos);
            }
            // One that was given up says nothing of how long an answer takes.
            Event::Finished(finish) if finish.reason != FinishReason::Cancelled => {
                self.metrics.e2e_secs.observe(secs_since(self.submitted_nanos));
                self.metrics.queue_secs.observe(finish.queue_secs);
                self.metrics.prefill_secs.observe(finish.prefill_secs);
                self.metrics.decode_secs.observe(finish.decode_secs);
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::serve::{Counters, Finish, LayerLoad, Token};

    fn finish(reason: FinishReason) -> Event {
        Event::Finished(Finish {
            reason,
            text: String::new(),
            num_prompt_tokens: 1,
            num_cached_tokens: 0,
            num_generated_tokens: 3,
            num_drafted_tokens: 0,
            num_accepted_tokens: 0,
            queue_secs: 0.4,
            prefill_secs: 1.2,
            decode_secs: 3.0,
        })
    }

    #[test]
    fn requests_are_measured_by_their_events() {
        let metrics = Arc::new(Metrics::new("hadal", "m \"1\""));
        let secs = |secs: f64| (secs * 1e9) as u64;
        let mut timer = Timer::new(metrics.clone(), secs(1.0));
        for at in [1.5, 1.52, 1.58] {
            timer.see(&Event::Token(Token::default()), secs(at));
        }
        timer.see(&finish(FinishReason::Stop), secs(1.6));
        let mut given_up = Timer::new(metrics.clone(), secs(1.0));
        given_up.see(&finish(FinishReason::Cancelled), secs(90.0));
        let text = metrics.text(None).unwrap();
        let label = r#"model_name="m \"1\"""#;
        for line in [
            format!("hadal:time_to_first_token_seconds_bucket{{{label},le=\"0.25\"}} 0"),
            format!("hadal:time_to_first_token_seconds_bucket{{{label},le=\"0.5\"}} 1"),
            format!("hadal:inter_token_latency_seconds_bucket{{{label},le=\"0.025\"}} 1"),
            format!("hadal:inter_token_latency_seconds_count{{{label}}} 2"),
            format!("hadal:e2e_request_latency_seconds_count{{{label}}} 1"),
            format!("hadal:request_queue_time_seconds_sum{{{label}}} 0.4"),
            format!("hadal:request_prefill_time_seconds_sum{{{label}}} 1.2"),
            format!("hadal:request_decode_time_seconds_sum{{{label}}} 3.0"),
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("num_requests_running"));
    }

    #[test]
    fn what_the_model_counts_has_the_names_of_vllm() {
        let counters = Counters {
            num_prompt_tokens: 70,
            num_cached_tokens: 64,
            num_generated_tokens: 9,
            num_drafted_tokens: 8,
            num_accepted_tokens: 6,
            num_preemptions: 2,
            num_steps: 5,
            num_finished: [("abort", 1), ("stop", 3)].into(),
        };
        let routing = vec![LayerLoad { layer: 3, total: vec![6, 1, 1, 0], last_step: vec![0; 4] }];
        let stats = Stats { num_running: 2, num_waiting: 1, cache_usage: 0.25, counters, routing, ..Stats::default() };
        let text = Metrics::new("vllm", "m").text(Some(stats)).unwrap();
        for line in [
            "# TYPE vllm:num_requests_running gauge",
            "vllm:num_requests_running{model_name=\"m\"} 2.0",
            "vllm:num_requests_waiting{model_name=\"m\"} 1.0",
            "vllm:kv_cache_usage_perc{model_name=\"m\"} 0.25",
            "vllm:prompt_tokens_total{model_name=\"m\"} 70",
            "vllm:generation_tokens_total{model_name=\"m\"} 9",
            "vllm:num_preemptions_total{model_name=\"m\"} 2",
            "vllm:prefix_cache_queries_total{model_name=\"m\"} 70",
            "vllm:prefix_cache_hits_total{model_name=\"m\"} 64",
            "vllm:spec_decode_num_draft_tokens_total{model_name=\"m\"} 8",
            "vllm:spec_decode_num_accepted_tokens_total{model_name=\"m\"} 6",
            "vllm:request_success_total{model_name=\"m\",finished_reason=\"abort\"} 1",
            "vllm:request_success_total{model_name=\"m\",finished_reason=\"stop\"} 3",
            "vllm:expert_load_max_vio{model_name=\"m\",layer=\"3\"} 2.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
    }
}
