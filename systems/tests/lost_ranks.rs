//! A rank that panics ends the run at once, with its own message, and what was saved before stays whole.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::{
    path::PathBuf,
    sync::{
        Arc,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};

use engine::{checkpoint, prelude::*};
use kernels::clock::now_nanos;
use systems::{
    api::{Progress, RunRequest, StepReport},
    distribute::Distribution,
    evaluate::EvaluationResult,
    local,
    mesh::Mesh,
    ranks::Ranks,
    run::run,
    scene::Scene,
};

/// In nanoseconds.
const SECOND: u64 = 1_000_000_000;

/// Panics in the first rank's report of a step.
#[derive(Default)]
struct PanicsAt {
    step: u64,
    at_nanos: AtomicU64,
}

impl Progress for PanicsAt {
    fn note(&self, _: &str) {}
    fn step(&self, step: &StepReport) {
        if step.step == self.step {
            self.at_nanos.store(now_nanos(), Ordering::Relaxed);
            panic!("a cosmic ray");
        }
    }
    fn evaluated(&self, _: &EvaluationResult) {}
    fn text(&self, _: &str) {}
}

#[test]
fn a_run_ends_within_a_second_and_keeps_its_checkpoint() {
    let dir = tempfile::tempdir().unwrap();
    let scene = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scenes/tiny.ron");
    let sets = [
        &format!("telemetry.dir={:?}", dir.path().to_str().unwrap()),
        "mesh=(pp: 2, ep: 2, dp: 1)",
        "pipeline=(schedule: OneFOneB)",
        "batch.num_microbatches=8",
        "checkpoint.every_steps=4",
        "eval=None",
        "sample=None",
    ];
    let loaded = Scene::load(&scene, &sets.map(str::to_owned)).unwrap();
    let progress = Arc::new(PanicsAt { step: 9, ..PanicsAt::default() });
    let stop = Arc::new(AtomicUsize::new(0));
    let report =
        run(RunRequest { loaded, resume: false, stop, progress: progress.clone(), control: None, comm: None }).unwrap();
    let nanos = now_nanos() - progress.at_nanos.load(Ordering::Relaxed);
    assert_eq!(report.exit_code, 5, "{}", report.exit_reason);
    assert!(report.exit_reason.contains("rank 0") && report.exit_reason.contains("a cosmic ray"), "{report:?}");
    assert!(nanos < SECOND, "{nanos} ns");
    let found = checkpoint::latest_valid(&report.run_dir).unwrap();
    // That of step 8 was under way; it was begun when that of step 4 was durable.
    assert_eq!((found.step, found.skipped.len()), (4, 0));
}

#[test]
fn any_rank_may_be_the_one() {
    let mut scene = Scene { mesh: Mesh { pp: 1, ep: 1, dp: 4, ranks_per_node: 4 }, ..Scene::default() };
    scene.batch.num_microbatches = 4;
    let config = serde_json::from_str::<systems::hf::config::HfConfig>(
        r#"{"model_type": "qwen2", "vocab_size": 8, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 8, "rms_norm_eps": 1e-6,
            "rope_theta": 1e4}"#,
    );
    let distribution = Distribution::new(&scene, &config.unwrap().resolve().unwrap()).unwrap();
    for culprit in 0..4 {
        let begin = now_nanos();
        let outcomes = local::run_ranks(distribution.local(), |ranks: Ranks| {
            assert_ne!(ranks.layout.rank, culprit, "the culprit panics, the others wait for it");
            let reason = match ranks.exchange(&0u32) {
                Ok(_) => ExitReason::Finished,
                Err(error) => ExitReason::PeerLost(error.to_string()),
            };
            Ok(((), reason))
        });
        assert!(now_nanos() - begin < SECOND);
        let reason = local::cause(&outcomes).unwrap();
        let ExitReason::PeerLost(message) = &reason else { panic!("{reason:?}") };
        assert!(message.contains(&format!("rank {culprit}")) && message.contains("the culprit panics"), "{message}");
    }
}
