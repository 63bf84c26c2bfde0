//! What a scene may say, how texts win over each other, and what is found wrong; printed messages are pinned in
//! `tests/scene_errors.rs`.
#![expect(clippy::unwrap_used, reason = "tests")]
mod check;

use std::fs;
use std::path::PathBuf;

use super::*;

fn sets(overrides: &[&str]) -> Vec<String> {
    overrides.iter().map(|text| (*text).to_owned()).collect()
}

#[track_caller]
fn parse(text: &str) -> Scene {
    parse_with(text, &[])
}

#[track_caller]
fn parse_with(text: &str, overrides: &[&str]) -> Scene {
    Scene::parse(text, &sets(overrides)).map_err(|errors| errors.to_string()).unwrap().scene
}

/// `path line:column` of every error, in order.
#[track_caller]
fn faults_with(text: &str, overrides: &[&str]) -> Vec<String> {
    let errors = Scene::parse(text, &sets(overrides)).map(|loaded| loaded.scene).unwrap_err();
    let place = |error: &SceneError| {
        let place = error.place.as_ref().unwrap();
        let file = if place.file == "--set" { "--set " } else { "" };
        format!("{} {file}{}:{}", error.path, place.line, place.column)
    };
    errors.errors.iter().map(place).collect()
}

#[track_caller]
fn faults(text: &str) -> Vec<String> {
    faults_with(text, &[])
}

fn example() -> Data {
    Data {
        train: ScenePaths(vec![ScenePath("a.txt".into())]),
        validation: Validation::HeldOut { fraction: 0.1 },
        tokenizer: Tokenizer::Bpe { vocab_size: 300 },
        seq_len: 256,
        cross_document_attention: false,
        refuse_long_documents: false,
    }
}

const DATA: &str = "data: (train: \"a.txt\", tokenizer: Bpe(vocab_size: 300))";

#[test]
fn an_empty_scene_has_no_plugins() {
    let scene = parse("()");
    assert_eq!(scene, Scene { name: "scene".into(), seed: 1, ..Scene::default() });
    assert_eq!((scene.batch.num_microbatches, scene.precision.compute), (1, Compute::F32));
}

#[test]
fn short_forms_mean_their_long_forms() {
    let same = [
        (DATA, "data: (train: [\"a.txt\"], validation: HeldOut(fraction: 0.1), tokenizer: Bpe(vocab_size: 300))"),
        (DATA, "data: Some(Data(train: [(\"a.txt\")], tokenizer: Bpe(vocab_size: 0x12c),),),"),
        (DATA, "/* a /* b */ */ data: (train: r#\"a.txt\"#, // c\n tokenizer: Bpe(vocab_size: 3_00))"),
        ("optimizer: AdamW", "optimizer: AdamW(beta1: 0.9, beta2: .95, eps: 1e-8, weight_decay: 1e-1)"),
        ("optimizer: AdamW()", "optimizer: Some(AdamW((beta1: 0.9)))"),
        ("optimizer: Muon", "optimizer: Muon(adamw: ())"),
        ("train: (steps: 4)", "train: (steps: 4, max_grad_norm: Some(1), max_train_secs: None)"),
        ("mtp: None", ""),
        ("mtp: ()", "mtp: (loss_weight: 0.3)"),
        ("recompute: Off", ""),
        ("schedule: Constant(lr: 1)", "schedule: Constant((lr: 1.0))"),
    ];
    for (short, long) in same {
        // `("a.txt")` is not a path in parentheses but a tuple.
        let long = long.replace("(\"a.txt\")", "\"a.txt\"");
        assert_eq!(parse(&format!("({short})")), parse(&format!("#![enable(implicit_some)]\n({long})")), "{short}");
    }
    assert_eq!(parse(&format!("({DATA})")).data, Some(example()));
}

#[test]
fn every_section_reads() {
    let scene = parse(include_str!("tests/every_section.ron"));
    assert_eq!(scene.recompute, Recompute::Selective(vec![RecomputeOp::Norm, RecomputeOp::Swiglu]));
    assert_eq!(scene.batch.ramp[1], Ramp { step: 50, num_microbatches: 4 });
    assert_eq!(scene.telemetry.unwrap().trace_steps, Some(TraceSteps { start: 3, count: 2 }));
    assert!(matches!(scene.optimizer, Some(Optimizer::Muon(muon)) if muon.adamw.beta2 == 0.99 && muon.ns_steps == 5));
}

#[test]
fn the_resolved_text_reads_as_the_same_scene() {
    for text in ["()", include_str!("tests/every_section.ron")] {
        let loaded = Scene::parse(text, &[]).unwrap();
        let resolved = loaded.to_ron().unwrap();
        assert_eq!(parse(&resolved), loaded.scene, "{resolved}");
        let (header, body) = resolved.split_once('\n').unwrap();
        let hash: String = Sha256::digest(body.as_bytes()).iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(header, format!("// Hadal {}, sha256 {hash}", env!("CARGO_PKG_VERSION")));
    }
}

#[test]
fn overrides_win_in_order() {
    let text = "(train: (steps: 4), optimizer: AdamW(beta1: 0.5, beta2: 0.6))";
    let optimizer = |overrides: &[&str]| parse_with(text, overrides).optimizer.unwrap();
    let adamw = |beta1, beta2| Optimizer::AdamW(AdamW { beta1, beta2, ..AdamW::default() });
    assert_eq!(parse_with(text, &["train.steps=5", "train.steps = 6"]).train.unwrap().steps, 6);
    assert_eq!(parse_with(text, &["name=\"x=y\""]).name, "x=y");
    assert_eq!(parse_with(text, &["mtp=()", "mtp.loss_weight=0.1"]).mtp, Some(Mtp { loss_weight: 0.1 }));
    assert_eq!(optimizer(&["optimizer.beta1=0.7"]), adamw(0.7, 0.6));
    assert_eq!(optimizer(&["optimizer=AdamW(beta1: 0.7)"]), adamw(0.7, 0.6));
    assert_eq!(optimizer(&["optimizer=Muon"]), Optimizer::Muon(Muon::default()));
    assert_eq!(optimizer(&["optimizer=Muon", "optimizer=AdamW", "optimizer.beta1=0.7"]), adamw(0.7, 0.95));
    assert_eq!(parse_with(text, &["optimizer=None"]).optimizer, None);
}

#[test]
fn all_faults_are_found_at_once_each_told_once() {
    let text = "(
  traim: (steps: 4),
  seed: -1,
  data: (train: 3, tokenizer: Bpe(vocab_sise: 300), seq_len: \"8\"),
  schedule: WarmupStableDecay(warmup_steps: 2.5),
  optimizer: Adam(beta1: 2),
  batch: (ramp: [(step: 0, num_microbatches: 1), (step: x)]),
  recompute: Selective([Norm, Nrom]),
  train: (steps: 4, steps: 5),
)";
    let expected = [
        "traim 2:3",
        "seed 3:9",
        "data.train 4:17",
        "data.tokenizer.vocab_size 4:20",
        "data.tokenizer.vocab_sise 4:35",
        "data.seq_len 4:62",
        "schedule.decay_steps 5:3",
        "schedule.peak_lr 5:3",
        "schedule.warmup_steps 5:45",
        "optimizer 6:14",
        "batch.ramp[1].num_microbatches 7:50",
        "batch.ramp[1].step 7:57",
        "recompute[1] 8:31",
        " 9:21",
    ];
    let mut found = faults(text);
    found[6..8].sort();
    assert_eq!(found, expected);
}

#[test]
fn broken_syntax_is_shown_where_it_breaks() {
    let cases = [
        ("(seed: 1", " 1:1"),
        ("(data: (train: \"a\", seed: 1)", " 1:1"),
        ("(seed: [1, 2)", " 1:13"),
        ("(seed: 1 name: \"x\")", " 1:10"),
        ("(seed 1)", " 1:7"),
        ("(seed: , )", " 1:8"),
        ("(name: \"x)", " 1:8"),
        ("(name: r#\"x\")", " 1:8"),
        ("(/* seed: 1)", " 1:2"),
        ("(seed: 1) 2", " 1:11"),
        ("", " 1:1"),
        ("(é: 1, ü 2)", " 1:10"),
    ];
    for (text, place) in cases {
        assert_eq!(faults(text), [place], "{text}");
    }
    assert_eq!(faults(&"[".repeat(100_000)), [" 1:65"]);
}

#[test]
fn a_fault_in_an_override_points_into_the_override() {
    let cases = [
        ("train.stepps=5", "train.stepps --set 1:7"),
        ("train.steps=many", "train.steps --set 1:13"),
        ("train.steps", " --set 1:1"),
        ("train..steps=1", " --set 1:7"),
        ("train.steps=(1", " --set 1:13"),
        ("extends=\"x\"", " --set 1:1"),
        ("sed=1", "sed --set 1:1"),
    ];
    for (text, place) in cases {
        assert_eq!(faults_with("(train: (steps: 4))", &[text]), [place], "{text}");
        // It hides no other.
        assert_eq!(faults_with("(train: (steps: 4), zzz: 1)", &[text]), ["zzz 1:21", place], "{text}");
    }
}

struct Folder(tempfile::TempDir);

impl Folder {
    fn new(files: &[(&str, &str)]) -> Self {
        let folder = tempfile::tempdir().unwrap();
        for (name, text) in files {
            let path = folder.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        Folder(folder)
    }

    fn path(&self, name: &str) -> PathBuf {
        fs::canonicalize(self.0.path()).unwrap().join(name)
    }
}

#[test]
fn a_file_extends_another_and_paths_keep_their_folder() {
    let folder = Folder::new(&[
        (
            "base/base.ron",
            "(seed: 7, data: (train: \"../text/a.txt\", tokenizer: File(\"./t.json\")), batch: (num_microbatches: 2))",
        ),
        ("mid.ron", "(extends: \"base/base.ron\", name: \"mid\", batch: (microbatch_sequences: 4))"),
        ("top.ron", "(extends: \"mid.ron\", data: (validation: File(\"v.txt\")), batch: (num_microbatches: 3))"),
        ("text/a.txt", "a"),
        ("v.txt", "v"),
    ]);
    let loaded = Scene::load(&folder.path("top.ron"), &[]).unwrap();
    let Scene { name, seed, data, batch, .. } = &loaded.scene;
    assert_eq!((name.as_str(), *seed), ("mid", 7));
    assert_eq!(*batch, Batch { microbatch_sequences: 4, num_microbatches: 3, ramp: Vec::new() });
    let data = data.as_ref().unwrap();
    assert_eq!(data.train.0, [ScenePath(folder.path("text/a.txt"))]);
    assert_eq!(data.tokenizer, Tokenizer::File(ScenePath(folder.path("base/t.json"))));
    assert_eq!(data.validation, Validation::File(ScenePath(folder.path("v.txt"))));
    assert_eq!(loaded.sources().count(), 3);

    // The missing tokenizer is blamed on the file that names it.
    let problems = loaded.scene.check(folder.0.path());
    let errors = loaded.errors(&problems);
    assert_eq!(errors.errors.len(), 1, "{errors}");
    let place = errors.errors[0].place.as_ref().unwrap();
    assert_eq!((place.file.as_str(), place.line), (folder.path("base/base.ron").to_str().unwrap(), 1));

    // Elsewhere, the resolved text is the same scene.
    let resolved = folder.path("text/scene.ron");
    fs::write(&resolved, loaded.to_ron().unwrap()).unwrap();
    assert_eq!(Scene::load(&resolved, &[]).unwrap().scene, loaded.scene);
}

#[test]
fn a_scene_is_called_after_its_file() {
    let folder = Folder::new(&[("quick.start.ron", "()")]);
    assert_eq!(Scene::load(&folder.path("quick.start.ron"), &[]).unwrap().scene.name, "quick.start");
}

#[test]
fn a_chain_that_does_not_end_well_says_where() {
    let long: Vec<_> = (0..20).map(|n| (format!("{n}.ron"), format!("(extends: \"{}.ron\")", n + 1))).collect();
    let mut files: Vec<(&str, &str)> = long.iter().map(|(name, text)| (name.as_str(), text.as_str())).collect();
    files.extend([
        ("self.ron", "(extends: \"./self.ron\")"),
        ("a.ron", "(\n  extends: \"b.ron\")"),
        ("b.ron", "(extends: \"a.ron\")"),
        ("lost.ron", "(extends: \"nowhere.ron\")"),
        ("word.ron", "(extends: base)"),
    ]);
    let folder = Folder::new(&files);
    let cases = [
        ("self.ron", "self.ron", "self.ron -> self.ron"),
        ("a.ron", "b.ron", "a.ron -> b.ron -> a.ron"),
        ("lost.ron", "lost.ron", "nowhere.ron"),
        ("word.ron", "word.ron", "must be the path of a scene file, but is the word `base`"),
        ("0.ron", "15.ron", "more than 16 files"),
    ];
    for (name, blamed, message) in cases {
        let errors = Scene::load(&folder.path(name), &[]).map(|loaded| loaded.scene).unwrap_err();
        let place = errors.errors[0].place.as_ref().unwrap();
        assert_eq!(PathBuf::from(&place.file), folder.path(blamed), "{errors}");
        assert!(errors.errors[0].message.contains(message), "{errors}");
    }
    let errors = Scene::load(&folder.path("none.ron"), &[]).map(|loaded| loaded.scene).unwrap_err();
    assert!(errors.errors[0].place.is_none() && errors.to_string().contains("none.ron"), "{errors}");
}

#[test]
fn later_findings_point_at_the_value_or_the_section_it_would_stand_in() {
    let loaded = Scene::parse(
        "(\n  mtp: (\n    loss_weight: 0.5,\n  ),\n  optimizer: AdamW((eps: 1)),\n  data: (train: \"a\", tokenizer: File(\"t\")),\n)",
        &sets(&["seed=3"]),
    )
    .unwrap();
    let cases = [
        ("mtp.loss_weight", "scene.ron:3:18"),
        ("mtp.depth.first", "scene.ron:2:3"),
        ("mtp", "scene.ron:2:3"),
        ("optimizer.eps", "scene.ron:5:26"),
        ("data.train[0]", "scene.ron:6:17"),
        ("data.tokenizer", "scene.ron:6:33"),
        ("seed", "--set:1:6"),
        ("model.n_group", "scene.ron:1:1"),
        ("", "scene.ron:1:1"),
    ];
    for (path, expected) in cases {
        let errors = loaded.errors(&[Problem::new(path, "is odd")]);
        let Place { file, line, column, .. } = errors.errors[0].place.clone().unwrap();
        assert_eq!(format!("{file}:{line}:{column}"), expected, "{path}");
    }
}

#[test]
fn no_damage_to_a_text_is_a_panic() {
    let text = include_str!("tests/every_section.ron");
    let mut num_faulty = 0;
    for (at, c) in text.char_indices() {
        let (before, after) = (&text[..at], &text[at + c.len_utf8()..]);
        let damaged = [before.to_owned(), format!("{before}{after}"), format!("{before}é({after}")];
        for text in damaged {
            if let Err(errors) = Scene::parse(&text, &[]) {
                assert!(!errors.errors.is_empty(), "{text}");
                assert!(errors.graphical(80, false).len() + errors.to_string().len() > 0);
                num_faulty += 1;
            }
        }
    }
    assert!(num_faulty > text.len(), "{num_faulty}");
}

#[test]
fn a_text_that_is_not_saved_stands_for_the_file_at_its_path() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("base.ron"), "(seed: 7, train: (steps: 5))").unwrap();
    fs::create_dir(dir.path().join("texts")).unwrap();
    fs::write(dir.path().join("texts/a.txt"), "a").unwrap();
    let path = dir.path().join("edited.ron");
    // What is saved is not looked at, and need not be there.
    for saved in [None, Some("(seed: 1)"), Some("nonsense")] {
        saved.into_iter().for_each(|text| fs::write(&path, text).unwrap());
        let text = format!("(extends: \"base.ron\", {})", DATA.replace("a.txt", "texts/a.txt"));
        let loaded = Scene::load_text(&path, &text, &sets(&["train.steps=6"])).unwrap();
        let scene = loaded.scene;
        assert_eq!((&*scene.name, scene.seed, scene.train.unwrap().steps), ("edited", 7, 6));
        let ScenePath(train) = &scene.data.unwrap().train.0[0];
        assert_eq!(train, &dir.path().canonicalize().unwrap().join("texts/a.txt"), "paths are seen from its folder");
    }
    let errors = Scene::load_text(&path, "(\n    sed: 1,\n)", &[]).unwrap_err();
    let place = errors.errors[0].place.as_ref().unwrap();
    assert_eq!((&*place.file, place.line, place.column), (&*path.display().to_string(), 2, 5));
}
