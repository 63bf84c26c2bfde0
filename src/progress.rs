//! What a run says while it works, on stderr: a bar where there is a terminal, else a line every few steps.

use std::sync::{
    Arc, Mutex, MutexGuard, PoisonError,
    atomic::{AtomicUsize, Ordering},
};

use indicatif::{ProgressBar, ProgressStyle};
use systems::{
    api::{Progress, StepReport},
    evaluate::EvaluationResult,
};

use crate::{report, signals, terminal, units};

/// Progress of training.
pub struct TrainingProgress {
    log_every_steps: u64,
    stop: Arc<AtomicUsize>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    bar: Option<ProgressBar>,
    pace: Option<Pace>,
    /// `step 20/400`, for what is said between two steps.
    place: String,
    told_of_stop: bool,
}

/// Moving averages over about ten steps, so that one slow step does not move the estimate much.
#[derive(Clone, Copy, Debug)]
struct Pace {
    step_secs: f64,
    step_tokens: f64,
}

impl Pace {
    fn after(before: Option<Pace>, step: &StepReport) -> Pace {
        let now = Pace { step_secs: step.step_secs, step_tokens: step.num_tokens as f64 };
        let mix = |before: f64, now: f64| 0.9 * before + 0.1 * now;
        before.map_or(now, |before| Pace {
            step_secs: mix(before.step_secs, now.step_secs),
            step_tokens: mix(before.step_tokens, now.step_tokens),
        })
    }

    fn tokens_per_sec(self) -> u64 {
        (self.step_tokens / self.step_secs) as u64
    }

    /// `2m 31s left`; nothing at the end.
    fn remaining(self, step: &StepReport) -> String {
        match step.num_steps.saturating_sub(step.step) {
            0 => String::new(),
            steps => format!("  {} left", units::duration(self.step_secs * steps as f64)),
        }
    }
}

impl TrainingProgress {
    /// Progress with a line every `log_every_steps`; `stop` is where a signal leaves its number.
    pub fn new(log_every_steps: u64, stop: Arc<AtomicUsize>) -> Self {
        TrainingProgress { log_every_steps: log_every_steps.max(1), stop, state: Mutex::default() }
    }

    /// Leaves the bar as it stands, and the cursor below it.
    pub fn finish(&self) {
        if let Some(bar) = self.state().bar.take() {
            bar.abandon();
            eprintln!();
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// A line above the bar.
    fn say(&self, text: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| eprintln!("{text}")),
            None => eprintln!("{text}"),
        }
    }
}

impl Progress for TrainingProgress {
    fn note(&self, text: &str) {
        self.state().say(text);
    }

    fn step(&self, step: &StepReport) {
        let mut state = self.state();
        let pace = Pace::after(state.pace, step);
        state.pace = Some(pace);
        state.place = place(step);
        if terminal::is_interactive() {
            let bar = state.bar.get_or_insert_with(|| new_bar(step));
            // In this order: a new position is drawn now and then, a new message always.
            bar.set_position(step.step);
            bar.set_message(bar_text(step, pace));
        } else if step.step == 1 || step.step == step.num_steps || step.step.is_multiple_of(self.log_every_steps) {
            state.say(&line(step, pace));
        }
        let signal = self.stop.load(Ordering::Relaxed);
        if signal != 0 && !state.told_of_stop {
            state.told_of_stop = true;
            let name = signals::name(signal);
            state.say(&format!("{name}: stopping here, with a checkpoint; once more stops at once, without"));
        }
    }

    fn evaluated(&self, result: &EvaluationResult) {
        let state = self.state();
        let loss = loss(result.loss_nats_per_token, result.bits_per_byte);
        let tokens = units::grouped(result.num_tokens);
        state.say(format!("{}  validation: {loss}, over {tokens} tokens", state.place).trim_start());
    }

    /// The sample is part of the result.
    fn text(&self, _text: &str) {}
}

fn new_bar(step: &StepReport) -> ProgressBar {
    let template = "{bar:20} {pos}/{len} {wide_msg}";
    // The template is a constant; were it broken, the default would do.
    let style = ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar());
    ProgressBar::new(step.num_steps).with_style(style.progress_chars("━╸─"))
}

/// A loss with its units.
pub fn loss(nats_per_token: f64, bits_per_byte: Option<f64>) -> String {
    match bits_per_byte {
        Some(bits) => format!("{nats_per_token:.4} nats per token, {bits:.4} bits per byte"),
        None => format!("{nats_per_token:.4} nats per token"),
    }
}

/// What matters most first: a narrow terminal cuts the end.
fn bar_text(step: &StepReport, pace: Pace) -> String {
    format!(
        " loss {:.4}{}{}  {} tokens/s  {} tokens  MaxVio {:.2}",
        step.loss_nats_per_token,
        pace.remaining(step),
        spent(step),
        units::grouped(pace.tokens_per_sec()),
        units::count(step.total_tokens),
        step.max_vio,
    )
}

/// `  1.20 of 5 $`, of a run with a budget.
fn spent(step: &StepReport) -> String {
    step.spent.map(|spent| format!("  {spent}")).unwrap_or_default()
}

fn place(step: &StepReport) -> String {
    let width = step.num_steps.to_string().len();
    format!("step {:>width$}/{}", step.step, step.num_steps)
}

fn line(step: &StepReport, pace: Pace) -> String {
    let mtp: String = step.mtp_loss_nats_per_token.iter().map(|loss| format!("  mtp {loss:.4}")).collect();
    let idle = match step.num_idle_experts {
        0 => String::new(),
        experts => format!("  idle experts {experts}"),
    };
    let spent = spent(step);
    format!(
        "{}  loss {:.4}{mtp}  grad {:.2}  lr {:.2e}  {} tokens/s  {} tokens  MaxVio {:.2}{idle}{spent}{}",
        place(step),
        step.loss_nats_per_token,
        step.grad_norm,
        step.lr,
        units::grouped(pace.tokens_per_sec()),
        units::count(step.total_tokens),
        step.max_vio,
        pace.remaining(step),
    )
}

/// For verbs that do not train: notes on stderr, and generated text on stdout if it is for people.
pub struct TextProgress {
    /// Whether generated text goes to stdout as it comes.
    pub to_stdout: bool,
}

impl Progress for TextProgress {
    fn note(&self, text: &str) {
        eprintln!("{text}");
    }

    fn step(&self, _step: &StepReport) {}

    fn evaluated(&self, _result: &EvaluationResult) {}

    fn text(&self, text: &str) {
        if self.to_stdout {
            report::stream(text);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(step: u64, step_secs: f64) -> StepReport {
        StepReport {
            step,
            num_steps: 400,
            loss_nats_per_token: 6.12345,
            mtp_loss_nats_per_token: vec![6.5],
            grad_norm: 1.25,
            lr: 3e-3,
            num_tokens: 2048,
            total_tokens: 2048 * step,
            step_secs,
            tokens_per_sec: 2048.0 / step_secs,
            max_vio: 0.412,
            num_idle_experts: 0,
            overhead_share: 0.01,
            spent: None,
        }
    }

    #[test]
    fn a_line_says_where_the_run_is() {
        let report = step(100, 0.5);
        let found = line(&report, Pace::after(None, &report));
        let expected = "step 100/400  loss 6.1235  mtp 6.5000  grad 1.25  lr 3.00e-3  4,096 tokens/s  \
                        204.80K tokens  MaxVio 0.41  2m 30s left";
        assert_eq!(found, expected);
        let found = line(&StepReport { num_idle_experts: 3, ..report }, Pace::after(None, &step(1, 0.5)));
        assert!(found.contains("MaxVio 0.41  idle experts 3  2m 30s left"), "{found}");
    }

    #[test]
    fn one_slow_step_moves_the_estimate_little() {
        let steady = Pace::after(None, &step(1, 1.0));
        let after = Pace::after(Some(steady), &step(2, 2.0));
        assert_eq!(after.tokens_per_sec(), 1861);
        assert_eq!(after.remaining(&step(398, 1.0)), "  2.2 s left");
        assert_eq!(after.remaining(&step(400, 1.0)), "");
    }
}
