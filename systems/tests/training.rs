//! Training as equalities: the same scene gives the same bits, a stopped run goes on as if it had not stopped, computing
//! activations again changes nothing, and a batch may come in parts.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
};

use systems::{
    api::{Progress, RunReport, RunRequest, StepReport},
    evaluate::EvaluationResult,
    run::run,
    scene::Scene,
};

/// Remembers losses, and asks to stop after a step.
struct Watch {
    losses: Mutex<Vec<(u64, f64, f64)>>,
    notes: Mutex<Vec<String>>,
    stop_after: u64,
    stop: Arc<AtomicUsize>,
}

impl Progress for Watch {
    fn note(&self, text: &str) {
        self.notes.lock().unwrap().push(text.to_owned());
    }
    fn step(&self, step: &StepReport) {
        self.losses.lock().unwrap().push((step.step, step.loss_nats_per_token, step.max_vio));
        if step.step == self.stop_after {
            self.stop.store(2, Ordering::Relaxed);
        }
    }
    fn evaluated(&self, _: &EvaluationResult) {}
    fn text(&self, _: &str) {}
}

struct Outcome {
    report: RunReport,
    losses: Vec<(u64, f64, f64)>,
    notes: Vec<String>,
}

fn train(dir: &Path, sets: &[&str], resume: bool, stop_after: u64) -> Outcome {
    let scene = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scenes/tiny.ron");
    let mut overrides = vec![
        format!("telemetry.dir={:?}", dir.to_str().unwrap()),
        "train.steps=16".into(),
        "telemetry.tensorboard=false".into(),
        "eval=None".into(),
        "sample=None".into(),
        "checkpoint.every_steps=5".into(),
        "schedule=WarmupStableDecay(peak_lr: 3e-3, warmup_steps: 3, decay_steps: 5, final_lr_ratio: 0.1)".into(),
    ];
    overrides.extend(sets.iter().map(|s| (*s).to_owned()));
    let loaded = Scene::load(&scene, &overrides).unwrap();
    let stop = Arc::new(AtomicUsize::new(0));
    let watch = Arc::new(Watch { losses: Mutex::default(), notes: Mutex::default(), stop_after, stop: stop.clone() });
    let report = run(RunRequest { loaded, resume, stop, progress: watch.clone(), control: None, comm: None }).unwrap();
    let (losses, notes) = (watch.losses.lock().unwrap().clone(), watch.notes.lock().unwrap().clone());
    Outcome { report, losses, notes }
}

/// Of all files, where several ranks wrote some.
fn weights(outcome: &Outcome) -> Vec<u8> {
    let entries = std::fs::read_dir(outcome.report.run_dir.join("latest")).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.retain(|path| path.extension().is_some_and(|extension| extension == "safetensors"));
    files.sort();
    files.iter().flat_map(|path| std::fs::read(path).unwrap()).collect()
}

fn optimizer(outcome: &Outcome) -> Vec<u8> {
    std::fs::read(outcome.report.run_dir.join("latest/train/optimizer.safetensors")).unwrap()
}

#[test]
fn the_same_scene_gives_the_same_bits() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let (a, b) = (train(a.path(), &[], false, 0), train(b.path(), &[], false, 0));
    assert_eq!(a.report.exit_code, 0);
    assert_eq!(a.losses.len(), 16);
    assert_eq!(a.losses, b.losses);
    assert_eq!(weights(&a), weights(&b));
    let other_dir = tempfile::tempdir().unwrap();
    let other = train(other_dir.path(), &["seed=2"], false, 0);
    assert_ne!(a.losses, other.losses, "the seed matters");
}

#[test]
fn a_stopped_run_goes_on_to_the_last_bit() {
    for set in
        ["optimizer=AdamW()", "optimizer=Muon()", "precision.compute=Bf16", "precision=(compute: Fp8, moments: Bf16)"]
    {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let whole = train(whole.path(), &[set], false, 0);
        let first = train(parts.path(), &[set], false, 7);
        assert_eq!((first.report.exit_code, first.report.num_steps), (130, 7));
        let second = train(parts.path(), &[set], true, 0);
        assert_eq!(second.report.exit_code, 0);
        assert_eq!([first.losses, second.losses.clone()].concat(), whole.losses);
        assert_eq!(weights(&second), weights(&whole), "expert biases included");
        assert_eq!(optimizer(&second), optimizer(&whole));
        let log = engine::log::read(&second.report.run_dir.join("log.jsonl")).unwrap();
        let steps: Vec<u64> = log.iter().filter(|l| l.scalar("lr").is_some()).map(|l| l.step).collect();
        assert_eq!(steps, (1..=16).collect::<Vec<_>>(), "the log has each step once");
    }
}

#[test]
fn computing_activations_again_changes_no_bit() {
    let dir = tempfile::tempdir().unwrap();
    let kept = train(dir.path(), &["train.steps=6"], false, 0);
    for recompute in
        ["Layer", "Selective([Norm])", "Selective([MlaUp])", "Selective([Swiglu])", "Selective([Norm, MlaUp, Swiglu])"]
    {
        let dir = tempfile::tempdir().unwrap();
        let again = train(dir.path(), &["train.steps=6", &format!("recompute={recompute}")], false, 0);
        assert_eq!(again.losses, kept.losses, "{recompute}: losses and loads, counted once a token");
        assert_eq!(weights(&again), weights(&kept), "{recompute}");
        assert!(
            again.report.peak_tensor_bytes < kept.report.peak_tensor_bytes,
            "{recompute} saves memory: {} of {} bytes",
            again.report.peak_tensor_bytes,
            kept.report.peak_tensor_bytes
        );
    }
}

#[test]
fn a_batch_may_come_in_parts() {
    let (a, b) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let sets = |n: usize, m: usize| {
        [
            format!("batch.microbatch_sequences={n}"),
            format!("batch.num_microbatches={m}"),
            "precision.compute=F64".to_owned(),
            "train.steps=4".to_owned(),
            "routing.sequence_aux_loss=0.01".to_owned(),
        ]
    };
    let run =
        |dir: &Path, sets: [String; 5]| train(dir, &sets.iter().map(String::as_str).collect::<Vec<_>>(), false, 0);
    let (whole, parts) = (run(a.path(), sets(8, 1)), run(b.path(), sets(2, 4)));
    for ((_, a, _), (_, b, _)) in whole.losses.iter().zip(&parts.losses) {
        assert!((a - b).abs() < 1e-9, "{a} in one, {b} in four parts");
    }
}

#[test]
fn every_precision_and_routing_mode_trains() {
    for set in [
        "precision.compute=Bf16",
        "precision.compute=F64",
        "precision.compute=Fp8",
        "precision=(compute: Fp8, moments: Bf16, scales: PowerOfTwo, attention_output: Narrow, swiglu_input: Narrow)",
        "routing.mode=Forced",
        "routing.mode=Random",
        "routing.z_loss=0.001",
    ] {
        let dir = tempfile::tempdir().unwrap();
        let outcome = train(dir.path(), &[set, "train.steps=12"], false, 0);
        let (first, last) = (outcome.losses[0].1, outcome.losses[11].1);
        assert!(last < first - 0.5, "{set}: the loss falls from {first} to {last}");
        if set == "routing.mode=Forced" {
            assert!(outcome.report.max_vio < 1e-9, "forced routing is balanced: {}", outcome.report.max_vio);
        }
    }
}

/// A key of an object of the log, as a number.
fn number(row: &serde_json::Value, key: &str) -> f64 {
    row[key].as_f64().unwrap_or_else(|| panic!("no `{key}` in {row}"))
}

#[test]
fn a_watched_run_has_the_bits_of_one_that_is_not() {
    let narrow = "scales: PowerOfTwo, attention_output: Narrow, swiglu_input: Narrow";
    let again = "recompute=Selective([Norm, Swiglu])";
    let on_ranks = "mesh=(pp: 1, ep: 2, dp: 1)";
    for (precision, set) in [("", "seed=1"), (narrow, "seed=1"), ("", again), ("", on_ranks), ("", "recompute=Layer")] {
        let run = |watch: u64| {
            let dir = tempfile::tempdir().unwrap();
            let precision = format!("precision=(compute: Fp8, watch_every_steps: {watch}, {precision})");
            let outcome = train(dir.path(), &["train.steps=6", &precision, set], false, 0);
            assert_eq!(outcome.report.exit_code, 0, "{}", outcome.report.exit_reason);
            (weights(&outcome), outcome, dir)
        };
        let (plain_weights, plain, _plain) = run(0);
        let (watched_weights, watched, _watched) = run(3);
        assert_eq!(plain.losses, watched.losses, "{precision} {set}");
        assert!(plain_weights == watched_weights, "{precision} {set}: every weight, to the last bit");
        assert!(plain.report.fp8_rounding.is_none());
        let report = watched.report.fp8_rounding.unwrap();
        assert_eq!(report.step, 6);
        let log = engine::log::read(&watched.report.run_dir.join("log.jsonl")).unwrap();
        let steps: Vec<u64> = log.iter().filter(|line| line.fields.contains_key("fp8")).map(|line| line.step).collect();
        assert_eq!(steps, [3, 6]);
        let last = log.iter().find(|line| line.step == 6).unwrap();
        let rows = last.fields["fp8"].as_array().unwrap();
        // Three layers and the module for the token after the next, each with five kinds of operands.
        assert_eq!((rows.len(), report.lost.len()), (4 * 5, 4 * 5), "{rows:?}");
        for row in rows {
            let [underflow, overflow] = ["underflow_share", "overflow_share"].map(|key| number(row, key));
            assert!((0.0..0.5).contains(&underflow) && overflow == 0.0, "{row}");
            let [amax, least, most] = ["amax", "min_scale", "max_scale"].map(|key| number(row, key));
            assert!(amax > 0.0 && 0.0 < least && least <= most, "{row}");
            // The largest scale is that of the largest number: over 448, or up to twice that; or of the least that scales are made for.
            let real = amax.max(1e-4) / 448.0;
            assert!((real * 0.99..real * 2.02).contains(&most), "{row}");
        }
        let worst = rows.iter().filter(|row| row["tensor"] == "gradients").map(|row| number(row, "underflow_share"));
        let worst = worst.fold(0.0, f64::max);
        assert_eq!(last.scalar("fp8/underflow_share/gradients"), Some(worst));
        assert!(!last.fields.keys().any(|key| key.starts_with("fp8_layers")), "the rows have them");
    }
}

#[test]
fn a_damaged_checkpoint_is_skipped_aloud() {
    let dir = tempfile::tempdir().unwrap();
    let first = train(dir.path(), &["train.steps=10"], false, 0);
    let newest = first.report.run_dir.join("checkpoints/step-0000010/model.safetensors");
    let mut bytes = std::fs::read(&newest).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    std::fs::write(&newest, bytes).unwrap();
    let second = train(dir.path(), &["train.steps=12"], true, 0);
    assert_eq!(second.losses[0].0, 6, "from the checkpoint before");
    assert!(second.notes.iter().any(|n| n.contains("skipped") && n.contains("step-0000010")), "{:?}", second.notes);
}

#[test]
fn what_is_not_finite_is_named_and_stops_the_run() {
    let dir = tempfile::tempdir().unwrap();
    let outcome = train(dir.path(), &["schedule=Constant(lr: 1e30)"], false, 0);
    assert_eq!(outcome.report.exit_code, 4);
    let reason = &outcome.report.exit_reason;
    assert!(reason.contains("layer") || reason.contains("embed"), "the task is named: {reason}");
    assert!(reason.contains('`'), "the tensor is named: {reason}");
    assert!(!outcome.report.run_dir.join("latest").exists(), "a diverged run leaves no checkpoint of its own");
}
