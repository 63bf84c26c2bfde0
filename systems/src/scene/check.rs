//! What types cannot say about a scene: ranges, files that exist, sections that need each other. Every finding is a
//! [`Problem`] with a dotted path, so that the loader can point at it and other checks (the model's, the layout's) can
//! add theirs.
use std::path::Path;

use super::Scene;
use super::schedule::{Constant, Cosine, Schedule, WarmupStableDecay};
use super::{
    compute::{Compute, Device, Kept, Moments, Part, Precision, Recompute, Scales},
    sections::{AdamW, Batch, Budget, Data, Optimizer, Routing, ScenePath, Tokenizer, Train, Validation},
};
use crate::problem::Problem;

/// A byte-level vocabulary holds every byte and one special token at least.
const MIN_BPE_VOCAB: usize = 257;

/// `problems` of a part, seen from the whole: `n_group` of `model` is `model.n_group`.
pub fn prefix(problems: Vec<Problem>, section: &str) -> Vec<Problem> {
    let join = |path: String| {
        if path.is_empty() { section.to_owned() } else { format!("{section}.{path}") }
    };
    problems.into_iter().map(|problem| Problem { path: join(problem.path), ..problem }).collect()
}

impl Scene {
    /// Everything that is wrong with the values of this scene, the model's inside left to its own check. Paths that are
    /// not absolute yet start from `base_dir`.
    pub fn check(&self, base_dir: &Path) -> Vec<Problem> {
        let mut checks = Checks { base_dir, problems: Vec::new() };
        checks.scene(self);
        checks.problems
    }
}

pub(super) struct Checks<'a> {
    base_dir: &'a Path,
    problems: Vec<Problem>,
}

impl Checks<'_> {
    pub(super) fn expect(&mut self, holds: bool, path: &str, message: impl FnOnce() -> String) {
        if !holds {
            self.problems.push(Problem::new(path, message()));
        }
    }

    pub(super) fn positive(&mut self, path: &str, value: f64) {
        self.expect(value > 0.0 && value.is_finite(), path, || format!("must be above 0, but is {value}"));
    }

    fn not_negative(&mut self, path: &str, value: f64) {
        self.expect(value >= 0.0 && value.is_finite(), path, || format!("must be 0 or more, but is {value}"));
    }

    fn share(&mut self, path: &str, value: f64) {
        self.expect((0.0..=1.0).contains(&value), path, || format!("must be between 0 and 1, but is {value}"));
    }

    pub(super) fn decay_rate(&mut self, path: &str, value: f64) {
        self.expect((0.0..1.0).contains(&value), path, || format!("must be at least 0 and below 1, but is {value}"));
    }

    pub(super) fn count(&mut self, path: &str, value: u64) {
        self.expect(value > 0, path, || "must be 1 or more, but is 0".to_owned());
    }

    fn file(&mut self, path: &str, file: &ScenePath) {
        let full = self.base_dir.join(&file.0);
        if !full.is_file() {
            let what = if full.is_dir() { "is a folder, not a file" } else { "is no file" };
            let message = format!("`{}` {what}", full.display());
            let help = "paths start from the folder of the scene file that names them";
            self.problems.push(Problem::new(path, message).help(help));
        }
    }

    fn scene(&mut self, scene: &Scene) {
        let name_is_folder =
            !scene.name.is_empty() && !scene.name.starts_with('.') && !scene.name.contains(['/', '\\']);
        self.expect(name_is_folder, "name", || {
            format!(
                "names the run's folder, so it must not be empty, start with `.` or hold a slash, but is {:?}",
                scene.name
            )
        });
        if let Some(init) = &scene.init {
            let folder = self.base_dir.join(&init.0);
            let file = folder.join("config.json");
            self.expect(file.is_file(), "init", || {
                format!("`{}` is no checkpoint: it has no config.json", folder.display())
            });
        }
        self.needs(scene);
        if let Some(data) = &scene.data {
            self.data(data);
        }
        self.batch(&scene.batch);
        if let Some(plan) = &scene.plan {
            plan.seq_len.into_iter().for_each(|len| self.count("plan.seq_len", len as u64));
            plan.num_tokens.into_iter().for_each(|tokens| self.positive("plan.num_tokens", tokens));
        }
        if let Some(routing) = &scene.routing {
            self.routing(routing, scene.train.as_ref());
        }
        if let Some(mtp) = &scene.mtp {
            self.not_negative("mtp.loss_weight", mtp.loss_weight);
        }
        if let Some(optimizer) = &scene.optimizer {
            self.optimizer(optimizer);
        }
        if let Some(schedule) = &scene.schedule {
            self.schedule(schedule, scene.train.as_ref());
        }
        if let Some(train) = &scene.train {
            self.count("train.steps", train.steps);
            train.max_grad_norm.into_iter().for_each(|norm| self.positive("train.max_grad_norm", norm));
            train.max_train_secs.into_iter().for_each(|secs| self.positive("train.max_train_secs", secs));
        }
        if let Some(diloco) = &scene.diloco {
            diloco.check(self, scene);
        }
        self.precision(&scene.precision);
        self.expect(!scene.graphs || scene.device != Device::Cpu, "graphs", || {
            "is for GPUs, and the `device` is `Cpu`".into()
        });
        self.on_gpu(scene);
        if let Recompute::Selective(ops) = &scene.recompute {
            self.expect(!ops.is_empty(), "recompute", || "selects no operation; `Off` says so".to_owned());
            for (index, op) in ops.iter().enumerate() {
                self.expect(!ops[..index].contains(op), "recompute", || format!("selects `{op:?}` twice"));
            }
        }
        self.observers(scene);
    }

    fn on_gpu(&mut self, scene: &Scene) {
        let on_cpu = scene.device == Device::Cpu;
        self.expect(scene.comm_sms.is_none() || !on_cpu || scene.plan.is_some(), "comm_sms", || {
            "is for GPUs and plans, but the `device` is `Cpu` and there is no section `plan`".into()
        });
        if let Some(table) = &scene.tuning {
            self.expect(!on_cpu, "tuning", || "is for GPUs, and the `device` is `Cpu`".into());
            self.file("tuning", table);
        }
    }

    fn needs(&mut self, scene: &Scene) {
        let has_model = scene.model.is_some() || scene.init.is_some();
        let needs = [
            (scene.train.is_some(), "train", scene.data.is_some(), "data"),
            (scene.train.is_some(), "train", has_model, "model"),
            (scene.train.is_some(), "train", scene.optimizer.is_some(), "optimizer"),
            (scene.train.is_some(), "train", scene.schedule.is_some(), "schedule"),
            (scene.eval.is_some(), "eval", scene.data.is_some(), "data"),
            (scene.sample.is_some(), "sample", has_model, "model"),
        ];
        for (_, section, _, needed) in needs.into_iter().filter(|&(given, _, has, _)| given && !has) {
            let alternative = if needed == "model" { " (or `init`, to start from a checkpoint)" } else { "" };
            let problem = Problem::new(section, format!("needs a section `{needed}`, which the scene has not"));
            self.problems.push(problem.help(format!("add `{needed}: ..`{alternative}, or take `{section}` out")));
        }
    }

    fn data(&mut self, data: &Data) {
        self.expect(!data.train.0.is_empty(), "data.train", || "names no file".to_owned());
        for (index, file) in data.train.0.iter().enumerate() {
            self.file(&format!("data.train[{index}]"), file);
        }
        match &data.validation {
            Validation::HeldOut { fraction } => {
                self.expect(*fraction > 0.0 && *fraction < 1.0, "data.validation.fraction", || {
                    format!("must be above 0 and below 1, but is {fraction}")
                });
            }
            Validation::File(file) => self.file("data.validation", file),
        }
        match &data.tokenizer {
            Tokenizer::Bpe { vocab_size } => {
                self.expect(*vocab_size >= MIN_BPE_VOCAB, "data.tokenizer.vocab_size", || {
                    format!("must be {MIN_BPE_VOCAB} or more (256 bytes and a special token), but is {vocab_size}")
                })
            }
            Tokenizer::File(file) => self.file("data.tokenizer", file),
        }
        self.expect(data.seq_len >= 2, "data.seq_len", || {
            format!("must be 2 or more (a token and the one to predict), but is {}", data.seq_len)
        });
    }

    fn batch(&mut self, batch: &Batch) {
        self.count("batch.microbatch_sequences", batch.microbatch_sequences as u64);
        self.count("batch.num_microbatches", batch.num_microbatches as u64);
        for (index, ramp) in batch.ramp.iter().enumerate() {
            self.count(&format!("batch.ramp[{index}].num_microbatches"), ramp.num_microbatches as u64);
            if let Some(before) = index.checked_sub(1).map(|before| &batch.ramp[before]) {
                self.expect(ramp.step > before.step, &format!("batch.ramp[{index}].step"), || {
                    format!("must come after step {} of the entry before, but is {}", before.step, ramp.step)
                });
            }
        }
    }

    fn precision(&mut self, precision: &Precision) {
        let Precision {
            compute, moments, keep_high, scales, attention_output, swiglu_input, watch_every_steps, ..
        } = precision;
        for part in Part::ALWAYS_HIGH.iter().filter(|part| !keep_high.contains(part)) {
            let message = format!("leaves out `{part}`, which nothing multiplies in 8 bits");
            self.problems.push(Problem::new("precision.keep_high", message).help(format!("add `{part}`")));
        }
        for (index, part) in keep_high.iter().enumerate() {
            self.expect(!keep_high[..index].contains(part), "precision.keep_high", || format!("names `{part}` twice"));
        }
        self.expect(*compute != Compute::F64 || *moments == Moments::F32, "precision.moments", || {
            "is Bf16 beside `compute: F64`, which is for proofs and rounds nothing".to_owned()
        });
        let narrow = [
            ("scales", *scales != Scales::default()),
            ("attention_output", *attention_output != Kept::default()),
            ("swiglu_input", *swiglu_input != Kept::default()),
            ("watch_every_steps", *watch_every_steps != 0),
        ];
        for (key, _) in narrow.into_iter().filter(|(_, is_set)| *is_set && *compute != Compute::Fp8) {
            let problem =
                Problem::new(format!("precision.{key}"), format!("is for `compute: Fp8`, but that is {compute:?}"));
            self.problems.push(problem.help(format!("take `{key}` out, or set `compute: Fp8`")));
        }
    }

    fn routing(&mut self, routing: &Routing, train: Option<&Train>) {
        self.not_negative("routing.bias_update_speed", routing.bias_update_speed);
        self.not_negative("routing.sequence_aux_loss", routing.sequence_aux_loss);
        self.not_negative("routing.z_loss", routing.z_loss);
        if let Some(Train { steps, .. }) = train {
            self.expect(routing.bias_warm_down_steps <= *steps, "routing.bias_warm_down_steps", || {
                format!("is {}, more than the {steps} steps of `train`", routing.bias_warm_down_steps)
            });
        }
    }

    fn optimizer(&mut self, optimizer: &Optimizer) {
        match optimizer {
            Optimizer::AdamW(adamw) => self.adamw("optimizer", adamw),
            Optimizer::Muon(muon) => {
                self.decay_rate("optimizer.momentum", muon.momentum);
                self.count("optimizer.ns_steps", muon.ns_steps as u64);
                self.not_negative("optimizer.weight_decay", muon.weight_decay);
                self.positive("optimizer.lr_multiplier", muon.lr_multiplier);
                self.adamw("optimizer.adamw", &muon.adamw);
            }
        }
    }

    fn adamw(&mut self, path: &str, adamw: &AdamW) {
        self.decay_rate(&format!("{path}.beta1"), adamw.beta1);
        self.decay_rate(&format!("{path}.beta2"), adamw.beta2);
        self.positive(&format!("{path}.eps"), adamw.eps);
        self.not_negative(&format!("{path}.weight_decay"), adamw.weight_decay);
    }

    fn schedule(&mut self, schedule: &Schedule, train: Option<&Train>) {
        let (warmup_steps, decay_steps) = match schedule {
            Schedule::Constant(Constant { lr }) => return self.positive("schedule.lr", *lr),
            Schedule::WarmupStableDecay(WarmupStableDecay { peak_lr, warmup_steps, decay_steps, final_lr_ratio }) => {
                self.positive("schedule.peak_lr", *peak_lr);
                self.share("schedule.final_lr_ratio", *final_lr_ratio);
                (*warmup_steps, *decay_steps)
            }
            Schedule::Cosine(Cosine { peak_lr, warmup_steps, final_lr_ratio }) => {
                self.positive("schedule.peak_lr", *peak_lr);
                self.share("schedule.final_lr_ratio", *final_lr_ratio);
                (*warmup_steps, 0)
            }
        };
        let Some(&Train { steps, .. }) = train else {
            return;
        };
        if warmup_steps > steps {
            let message = format!("is {warmup_steps}, more than the {steps} steps of `train`");
            self.problems.push(Problem::new("schedule.warmup_steps", message));
        } else if decay_steps > steps - warmup_steps {
            let message = format!(
                "is {decay_steps}, but after the warm-up only {} of the {steps} steps are left",
                steps - warmup_steps
            );
            self.problems.push(Problem::new("schedule.decay_steps", message));
        }
    }

    fn observers(&mut self, scene: &Scene) {
        if let Some(eval) = &scene.eval {
            self.count("eval.every_steps", eval.every_steps);
            eval.max_tokens.into_iter().for_each(|tokens| self.count("eval.max_tokens", tokens as u64));
        }
        if let Some(checkpoint) = &scene.checkpoint {
            self.count("checkpoint.every_steps", checkpoint.every_steps);
            self.count("checkpoint.keep_last", checkpoint.keep_last as u64);
            checkpoint.keep_every_steps.into_iter().for_each(|steps| self.count("checkpoint.keep_every_steps", steps));
        }
        if let Some(Budget { cost_usd, energy_kwh, hours }) = &scene.budget {
            for (name, limit) in [("cost_usd", cost_usd), ("energy_kwh", energy_kwh), ("hours", hours)] {
                limit.iter().for_each(|&limit| self.positive(&format!("budget.{name}"), limit));
            }
            // What the hardware's file gives is seen when a run begins.
            let has_hardware = scene.plan.as_ref().is_some_and(|plan| plan.hardware.is_some());
            for (name, limit, what) in
                [("cost_usd", cost_usd, "`price_per_hour`"), ("energy_kwh", energy_kwh, "its watts")]
            {
                let may_be_measured = name == "energy_kwh" && scene.device != Device::Cpu;
                self.expect(limit.is_none() || has_hardware || may_be_measured, &format!("budget.{name}"), || {
                    Budget::needs_hardware(what)
                });
            }
        }
        if let Some(sample) = &scene.sample {
            self.count("sample.max_new_tokens", sample.max_new_tokens as u64);
            self.not_negative("sample.temperature", sample.temperature);
            self.expect(sample.top_p > 0.0 && sample.top_p <= 1.0, "sample.top_p", || {
                format!("must be above 0 and at most 1, but is {}", sample.top_p)
            });
        }
        let watchdog = &scene.watchdog;
        if let Some(steps) = watchdog.compare_weights_every_steps {
            self.count("watchdog.compare_weights_every_steps", steps);
        }
        self.positive("watchdog.min_secs", watchdog.min_secs);
        self.positive("watchdog.first_step_secs", watchdog.first_step_secs);
        self.positive("watchdog.steps", watchdog.steps);
        self.not_negative("watchdog.finish_step_secs", watchdog.finish_step_secs);
        for (i, fault) in watchdog.faults.iter().enumerate() {
            self.expect(fault.rank < scene.num_ranks(), &format!("watchdog.faults[{i}].rank"), || {
                format!("is {}, but the run has {} ranks", fault.rank, scene.num_ranks())
            });
        }
        if let Some(remote) = &scene.remote {
            if let Err(message) = remote.address() {
                self.problems.push(Problem::new("remote.bind", message));
            }
            self.expect(cfg!(feature = "remote"), "remote", || {
                "cannot be had: this program was built without the feature `remote`".to_owned()
            });
        }
        if let Some(telemetry) = &scene.telemetry {
            self.count("telemetry.log_every_steps", telemetry.log_every_steps);
            if let Some(trace) = &telemetry.trace_steps {
                self.count("telemetry.trace_steps.count", trace.count);
                if let Some(train) = &scene.train {
                    self.expect(trace.start < train.steps, "telemetry.trace_steps.start", || {
                        format!(
                            "is {}, but the last of the {} steps of `train` is {}",
                            trace.start,
                            train.steps,
                            train.steps.saturating_sub(1)
                        )
                    });
                }
            }
        }
    }
}
