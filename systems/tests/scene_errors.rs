//! What a person reads when a scene is wrong, pinned as text. `UPDATE_GOLDEN=1` writes it anew: read the difference.
#![expect(clippy::unwrap_used, reason = "tests")]
use std::fmt::Write;
use std::path::Path;

use systems::scene::{Scene, SceneErrors};

/// What is wrong, the scene, the overrides.
const CASES: &[(&str, &str, &[&str])] = &[
    ("unknown field", "(\n  train: (steps: 4, max_grad_nrom: 1.0),\n)", &[]),
    ("unknown field, nothing near", "(mtp: (zzz: 1))", &[]),
    ("unknown section", "(optimiser: AdamW)", &[]),
    ("string for a number", "(train: (steps: \"400\"))", &[]),
    ("float for a whole number", "(train: (steps: 1e6))", &[]),
    ("fraction for a whole number", "(train: (steps: 1.5))", &[]),
    ("negative count", "(train: (steps: -3))", &[]),
    ("word for a string", "(name: quick)", &[]),
    ("struct for a number", "(mtp: (loss_weight: (x: 0.3)))", &[]),
    ("braces for a struct", "(mtp: {\"loss_weight\": 0.3})", &[]),
    ("list for a struct", "(batch: [8, 1])", &[]),
    ("missing fields", "(\n  schedule: WarmupStableDecay(\n    warmup_steps: 3,\n  ),\n)", &[]),
    ("unknown variant", "(schedule: Cosin(peak_lr: 1))", &[]),
    ("unknown variant, nothing near", "(recompute: Everything)", &[]),
    ("struct where a variant belongs", "(optimizer: (beta1: 0.9))", &[]),
    ("fields on a variant that has none", "(routing: (mode: Forced(1)))", &[]),
    ("duplicate field", "(\n  seed: 1,\n  name: \"x\",\n  seed: 2,\n)", &[]),
    ("never closed", "(\n  train: (steps: 4,\n  seed: 1,\n)\n", &[]),
    ("comma forgotten", "(\n  seed: 1\n  name: \"x\",\n)", &[]),
    ("tabs and wide characters", "(\n\tname: \"é\", seeed: 1)", &[]),
    ("unknown key in an override", "(train: (steps: 4))", &["train.step=5"]),
    ("wrong type in an override", "(train: (steps: 4))", &["seed=2", "train.steps=five"]),
    ("override without a value", "(train: (steps: 4))", &["train.steps"]),
    (
        "several at once",
        "(\n  sed: 1,\n  train: (steps: \"x\"),\n  data: (train: 1, seq_len: 2.5),\n)",
        &["mtp.weight=1"],
    ),
    (
        "values",
        "(\n  mtp: (loss_weight: -1),\n  eval: (),\n  sample: (\n    temperature: 1.0,\n  ),\n  schedule: Constant(lr: 0.0),\n)",
        &["mtp.loss_weight=-2"],
    ),
];

fn errors(text: &str, overrides: &[&str]) -> SceneErrors {
    let overrides: Vec<String> = overrides.iter().map(|text| (*text).to_owned()).collect();
    match Scene::parse(text, &overrides) {
        Ok(loaded) => loaded.errors(&loaded.scene.check(Path::new("."))),
        Err(errors) => errors,
    }
}

#[track_caller]
fn check_golden(name: &str, found: &str) {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden").join(name);
    if std::env::var_os("UPDATE_GOLDEN").is_some() {
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(&path, found).unwrap();
    }
    let expected = std::fs::read_to_string(&path).unwrap_or_default();
    for (line, (found, expected)) in found.lines().zip(expected.lines()).enumerate() {
        assert_eq!(found, expected, "{name}:{}", line + 1);
    }
    assert_eq!(found.len(), expected.len(), "{name}");
}

#[test]
fn plain_messages() {
    let mut text = String::new();
    for (name, scene, overrides) in CASES {
        let errors = errors(scene, overrides);
        assert!(!errors.errors.is_empty(), "{name}");
        writeln!(text, "== {name}\n{errors}\n").unwrap();
    }
    check_golden("scene_errors.txt", &text);
}

#[test]
fn messages_for_a_terminal() {
    let (_, scene, overrides) = CASES.iter().find(|(name, ..)| *name == "several at once").unwrap();
    check_golden("scene_errors_graphical.txt", &errors(scene, overrides).graphical(80, false));
    assert!(errors(scene, overrides).graphical(80, true).contains("\u{1b}["));
}
