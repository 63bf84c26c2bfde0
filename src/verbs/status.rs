//! `hadal status`: one screen of how a run stands, asked over the network.

use std::{process::ExitCode, sync::Arc, thread, time::Duration};

use engine::{
    control::RpcError,
    remote::client::{Client, ClientEvent},
};
use kernels::clock;
use serde_json::{Value, json};

use crate::{
    cli::StatusArgs,
    failure::Failure,
    report::{Output, Table},
    units,
};

/// How often it looks for the answer.
const TICK: Duration = Duration::from_millis(20);

/// Asks a run.
///
/// # Errors
/// If nobody answers in time.
pub fn status(args: &StatusArgs, output: &Output) -> Result<ExitCode, Failure> {
    let token = args.token.clone();
    let client = Client::connect(&args.url, token, Arc::new(|| ()));
    let began = clock::now_nanos();
    let failed = |why: &str| failed(args, (clock::now_nanos() - began) / 1_000_000_000, why);
    let asked = [client.call("run.status", Value::Null), client.call("run.last", Value::Null)];
    let mut answers = [None, None];
    let mut lost: Option<String> = None;
    // A request waits for the step at hand.
    let mut num_ticks = u64::from(args.timeout_secs) * 1000 / TICK.as_millis() as u64;
    while answers.iter().any(Option::is_none) && num_ticks > 0 {
        match client.try_event() {
            Some(ClientEvent::Reply { id, result }) => {
                let at = asked.iter().position(|asked| *asked == id);
                // Why there is no connection is said beside.
                let answer = result.map_err(|error| match &lost {
                    Some(lost) if error.code == RpcError::OVER => failed(lost),
                    _ => failed(&error.to_string()),
                })?;
                at.into_iter().for_each(|at| answers[at] = Some(answer.clone()));
            }
            Some(ClientEvent::Lost { why }) => lost = Some(why),
            Some(_) => {}
            None => {
                num_ticks -= 1;
                thread::sleep(TICK);
            }
        }
    }
    let [Some(status), Some(last)] = answers else { return Err(failed(lost.as_deref().unwrap_or("it gave none"))) };
    output.result(&json!({ "status": status, "last": last }), &screen(&status, &last))?;
    Ok(ExitCode::SUCCESS)
}

fn failed(args: &StatusArgs, secs: u64, why: &str) -> Failure {
    Failure::Other {
        exit_code: 1,
        message: format!("no answer from {} in {secs} s: {why}", args.url),
        help: Some(
            "a run listens if its scene has a section `remote`; its address is in remote.json in its folder".into(),
        ),
    }
}

fn screen(status: &Value, last: &Value) -> String {
    let number = |name: &str| last["scalars"][name].as_f64();
    let with = |name: &str, text: &dyn Fn(f64) -> String| number(name).map(text);
    let count = |name: &str| status[name].as_u64().unwrap_or_default();
    let mut table = Table::default();
    let steps = match status["num_steps"].as_u64() {
        Some(all) => format!("{} of {}", units::grouped(count("step")), units::grouped(all)),
        None => units::grouped(count("step")),
    };
    table
        .row("step", format!("{steps}, {}", status["state"].as_str().unwrap_or("of unknown state")))
        .row("ranks", units::grouped(count("num_ranks")))
        .maybe("training loss", with("loss_nats_per_token", &|x| format!("{x:.4} nats per token")))
        .maybe("gradient norm", with("grad_norm", &|x| format!("{x:.3}")))
        .maybe("learning rate", with("lr", &|x| format!("{x:.2e}")))
        .maybe("speed", with("tokens_per_sec", &|x| format!("{} tokens/s", units::grouped(x as u64))))
        .maybe("step time", with("step_secs", &units::duration))
        .maybe("model FLOPs used", with("mfu", &|x| format!("{:.1}%", 100.0 * x)))
        .maybe("experts", with("max_vio", &|x| format!("MaxVio {x:.2} in the worst layer")))
        .maybe("tokens", with("num_tokens", &|x| units::count(x as u64)))
        .maybe(
            "slowest rank",
            number("slowest_rank")
                .zip(number("slowest_rank_times_median"))
                .map(|(rank, times)| format!("rank {rank:.0}, {times:.2} times the median's work")),
        )
        .maybe("cost", with("cost_usd", &|x| format!("{x:.2} $")))
        .maybe("power", with("power_watts", &|x| format!("{x:.0} W, measured")))
        .maybe("energy", with("energy_kwh", &|x| format!("{x:.3} kWh")))
        .maybe("budget", with("budget_share", &|x| format!("{:.0}% spent", 100.0 * x)));
    table.render(status["name"].as_str().unwrap_or("a run"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_run_does_not_tell_has_no_row() {
        let status = json!({ "name": "tiny", "step": 1200, "num_ranks": 4, "state": "paused" });
        let last = json!({ "step": 1200, "scalars": { "loss_nats_per_token": 2.5, "slowest_rank": 2.0, "slowest_rank_times_median": 1.5 } });
        let text = screen(&status, &last);
        for part in ["tiny", "1,200, paused", "2.5000 nats per token", "rank 2, 1.50 times the median's work"] {
            assert!(text.contains(part), "{part}\n{text}");
        }
        assert!(!text.contains("cost") && !text.contains("budget"), "{text}");
        assert!(screen(&status, &Value::Null).contains("1,200, paused"));
    }
}
