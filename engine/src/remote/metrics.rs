//! `GET /metrics`: a run's last step, as Prometheus reads it. Names are those of the log, after `hadal_`.

use std::fmt;

use prometheus_client::{
    collector::Collector,
    encoding::{DescriptorEncoder, EncodeMetric, prometheus_text},
    metrics::gauge::ConstGauge,
    registry::Registry,
};
use serde_json::{Map, Value};

/// Status and last step as text.
pub(super) fn text(status: &Value, last: &Value) -> Result<String, fmt::Error> {
    let name = status["name"].as_str().unwrap_or_default().to_owned();
    let mut registry = Registry::with_labels([("run".into(), name.into())].into_iter());
    let mut gauges = Vec::new();
    for (name, help) in [("step", "Steps done"), ("num_ranks", "Ranks of the run")] {
        gauges.extend(status[name].as_f64().map(|value| (format!("hadal_{name}"), help, value)));
    }
    gauges.push(("hadal_is_paused".into(), "1 where the run is paused", f64::from(status["state"] == "paused")));
    let none = Map::new();
    let scalars = last["scalars"].as_object().unwrap_or(&none);
    let of_log = |(name, value): (&String, &Value)| {
        Some((format!("hadal_{}", plain(name)), "Of the last step, as in log.jsonl", value.as_f64()?))
    };
    gauges.extend(scalars.iter().filter_map(of_log));
    registry.register_collector(Box::new(Gauges(gauges)));
    let mut text = String::new();
    prometheus_text::encode(&mut text, &registry)?;
    Ok(text)
}

/// Only what Prometheus takes in a name.
fn plain(name: &str) -> String {
    name.chars().map(|c| if c.is_ascii_alphanumeric() { c } else { '_' }).collect()
}

#[derive(Debug)]
struct Gauges(Vec<(String, &'static str, f64)>);

impl Collector for Gauges {
    fn encode(&self, mut encoder: DescriptorEncoder<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|(name, help, value)| {
            let gauge = ConstGauge::new(*value);
            gauge.encode(encoder.encode_descriptor(name, help, None, gauge.metric_type())?)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_step_is_read_by_prometheus() {
        let status = serde_json::json!({ "name": "tiny", "step": 4, "num_ranks": 2, "state": "running" });
        let last = serde_json::json!({ "step": 4, "scalars": { "lr": 0.5, "busy_secs/stream 1": 2.5, "x": null } });
        let text = text(&status, &last).expect("text");
        for line in [
            "# TYPE hadal_lr gauge",
            "hadal_lr{run=\"tiny\"} 0.5",
            "hadal_busy_secs_stream_1{run=\"tiny\"} 2.5",
            "hadal_step{run=\"tiny\"} 4.0",
            "hadal_is_paused{run=\"tiny\"} 0.0",
        ] {
            assert!(text.lines().any(|found| found == line), "{line}\n{text}");
        }
        assert!(!text.contains("hadal_x"), "{text}");
    }
}
