//! The command line from outside: what goes to stdout and to stderr, and with which exit code. Only verbs that do not
//! train; those that do have tests of their own.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Command, Output},
};

use serde_json::Value;
use tempfile::TempDir;

/// A result of the program, as text.
struct Ran {
    line: String,
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{}\nstdout:\n{}\nstderr:\n{}", self.line, self.stdout, self.stderr);
        self
    }

    #[track_caller]
    fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            let said = self.stdout.contains(part) || self.stderr.contains(part);
            assert!(said, "{}\ndoes not say: {part}\nstdout:\n{}\nstderr:\n{}", self.line, self.stdout, self.stderr);
        }
        self
    }

    /// stdout as one JSON document, and nothing else.
    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{}\n{e}:\n{}", self.line, self.stdout))
    }
}

/// Runs `hadal` in the workspace, its words separated by spaces.
fn hadal(line: &str) -> Ran {
    hadal_in(Path::new(env!("CARGO_MANIFEST_DIR")), line)
}

fn hadal_in(folder: &Path, line: &str) -> Ran {
    let words: Vec<&str> = line.split_whitespace().collect();
    let mut command = Command::new(env!("CARGO_BIN_EXE_hadal"));
    let Output { status, stdout, stderr } =
        command.args(words).current_dir(folder).output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    Ran {
        line: format!("hadal {line}"),
        code: status.code().expect("an exit code"),
        stdout: text(stdout),
        stderr: text(stderr),
    }
}

fn fixture(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/fixtures").join(name)
}

fn scratch() -> TempDir {
    tempfile::tempdir().expect("a scratch folder")
}

#[test]
fn released_models_have_their_published_sizes() {
    hadal("check scenes/deepseek_v3.ron")
        .exits(0)
        .says(&["671.03B total, 37.55B activated per token; MTP 11.61B more"]);
    hadal("check scenes/deepseek_v2_lite.ron").exits(0).says(&["15.71B total, 2.66B activated per token"]);
    let ran = hadal("check scenes/deepseek_v3.ron --json").exits(0);
    let model = &ran.json()["model"];
    assert_eq!(model["num_params_without_mtp"], 671_026_419_200_u64);
    assert_eq!(model["num_activated_params"], 37_552_297_472_u64);
    assert_eq!(model["num_params"], 671_026_419_200_u64 + 11_610_068_224);
}

#[test]
fn every_scene_is_valid() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenes");
    let entries = fs::read_dir(&folder).expect("scenes").map(|entry| entry.expect("an entry").path());
    let scenes: Vec<PathBuf> = entries.filter(|path| path.extension().is_some_and(|e| e == "ron")).collect();
    assert!(scenes.len() >= 4, "{scenes:?}");
    let table = fs::read_to_string(folder.join("README.md")).expect("scenes/README.md");
    for scene in scenes {
        let ran = hadal(&format!("check {}", scene.display())).exits(0).says(&["valid"]);
        let sizes = ran.stdout.split_once("parameters  ").and_then(|(_, rest)| rest.split_once(" activated"));
        let (total, activated) = sizes.and_then(|(sizes, _)| sizes.split_once(" total, ")).expect("its parameters");
        let name = scene.file_name().expect("a name").to_string_lossy();
        let row = table.lines().find(|line| line.contains(&*name));
        let is_there = row.is_some_and(|row| row.contains(&format!("{total} ({activated})")));
        assert!(is_there, "scenes/README.md needs {total} ({activated}) for {name}, but has: {row:?}");
    }
}

#[test]
fn all_that_is_wrong_with_a_scene_is_said_at_once() {
    let ran = hadal(
        "check scenes/quickstart.ron --set model.n_routed_experts=30 --set train.steps=0 \
         --set data.seq_len=512 --set data.tokenizer.vocab_size=4000 --set data.train=\"none.txt\"",
    );
    let ran = ran.exits(2).says(&[
        "error: `model.n_group` 4 does not divide n_routed_experts = 30",
        "`train.steps` must be 1 or more, but is 0",
        "`data.seq_len` is 512, but the model has max_position_embeddings = 256",
        "`data.tokenizer.vocab_size` makes 4000 tokens, but the model has vocab_size = 3072",
        "none.txt` is no file",
    ]);
    assert_eq!(ran.stdout, "");
}

#[test]
fn ranks_that_do_not_fit_are_refused_with_what_would() {
    let sets = "--set mesh.pp=8 --set mesh.ep=40 --set mesh.dp=5 --set batch.num_microbatches=7";
    for verb in ["check", "run", "plan"] {
        hadal(&format!("{verb} scenes/pipeline.ron {sets}")).exits(2).says(&[
            "`mesh.pp` comes to 8 stages, more than the 6 layers of the model",
            "mesh.pp: 6 or fewer",
            "`mesh.ep` is 40, but with 32 routed experts a layer not every rank would have one",
            "mesh.ep: 32 or fewer",
            "`batch.num_microbatches` is 7, which the 200 data ranks (mesh.ep 40 x mesh.dp 5) do not divide",
            "batch.num_microbatches: 200",
            "3 errors in the scene",
        ]);
    }
    let uneven = "--set mesh.ep=3 --set batch.num_microbatches=24";
    let ran = hadal(&format!("check scenes/pipeline.ron {uneven}")).exits(0);
    assert!(
        ran.stdout.contains("12: pp 4, ep 3, dp 1, 8 a node; DualPipe; 10 or 11 experts a layer each"),
        "{}",
        ran.stdout
    );
    hadal("check scenes/pipeline.ron --set batch.num_microbatches=6")
        .exits(2)
        .says(&["the number of microbatches must be at least twice the ranks (2 * 4), but is 6", "nearest: 8"]);
    hadal("plan scenes/deepseek_v3.ron --hardware scenes/tiny.ron").exits(2).says(&["the hardware lacks the field"]);
}

#[test]
fn errors_name_file_line_and_column() {
    let folder = scratch();
    let scene = folder.path().join("wrong.ron");
    fs::write(&scene, "(\n  train: (steps: 4, max_grad_nrom: 1),\n)\n").expect("a scene");
    let ran = hadal(&format!("check {}", scene.display())).exits(2);
    let place = format!("{}:2:21: error: `train` has no field `max_grad_nrom`", scene.display());
    ran.says(&[&place, "help: did you mean `max_grad_norm`?", " 2 |   train: (steps: 4,", "^^^^^^"]);

    let ran = hadal(&format!("check {} --json -", scene.display())).exits(2);
    let document = ran.json();
    assert_eq!(document["exit_code"], 2);
    let error = &document["errors"][0];
    assert_eq!((&error["line"], &error["column"]), (&2.into(), &21.into()), "{error}");
    assert_eq!(error["help"], "did you mean `max_grad_norm`?");
}

#[test]
fn a_vocabulary_file_must_fit_the_model() {
    let folder = scratch();
    let tokenizer = folder.path().join("tokenizer.json");
    fs::write(&tokenizer, "{}").expect("a file");
    hadal(&format!("check scenes/tiny.ron --set data.tokenizer=File(\"{}\")", tokenizer.display()))
        .exits(2)
        .says(&["`data.tokenizer` cannot be used", "tokenizer.json"]);
}

#[test]
fn wrong_usage_exits_with_2() {
    let cases = [
        ("", "Usage"),
        ("chek scenes/tiny.ron", "'check'"),
        ("check", "<SCENE>"),
        ("check --json scenes/tiny.ron", "<SCENE>"),
        ("run scenes/tiny.ron --resume --fresh", "cannot be used with"),
        ("eval x", "--data"),
        ("generate x", "--prompt"),
        ("convert a b --shard-size 5", "has no unit"),
        ("check no/such.ron", "no/such.ron"),
        ("check scenes/tiny.ron --set train.stepps=1", "did you mean `steps`?"),
        ("run scenes/deepseek_v3.ron", "add a section `train`"),
    ];
    for (line, part) in cases {
        let ran = hadal(line).exits(2).says(&[part]);
        assert_eq!(ran.stdout, "", "{line}");
    }
}

#[test]
fn help_has_examples_and_the_version_is_this_one() {
    hadal("--help").exits(0).says(&["hadal run scenes/quickstart.ron", "Exit codes"]);
    for verb in ["run", "check", "eval", "generate", "convert"] {
        hadal(&format!("{verb} --help")).exits(0).says(&["Examples:", "--json"]);
    }
    hadal("--version").exits(0).says(&[env!("CARGO_PKG_VERSION")]);
}

#[test]
fn an_earlier_run_is_not_touched_unasked() {
    let folder = scratch();
    let earlier = folder.path().join("runs/tiny/checkpoints/step-0000030");
    fs::create_dir_all(&earlier).expect("a folder");
    let scene = Path::new(env!("CARGO_MANIFEST_DIR")).join("scenes/tiny.ron");
    let ran = hadal_in(folder.path(), &format!("run {}", scene.display()));
    ran.exits(2).says(&["runs/tiny holds the checkpoints of an earlier run", "--resume", "--fresh"]);
    assert!(earlier.exists());
}

#[test]
fn convert_keeps_bytes_and_changes_formats() {
    let folder = scratch();
    let source = fixture("deepseek_v3_qlora");
    let kept = folder.path().join("kept");
    let line = |to: &Path, rest: &str| format!("convert {} {} {rest}", source.display(), to.display());
    hadal(&line(&kept, "")).exits(0).says(&["tensors", "files"]);
    let read = |folder: &Path| fs::read(folder.join("model.safetensors")).expect("weights");
    let tensors = |bytes: &[u8]| {
        let file = safetensors::SafeTensors::deserialize(bytes).expect("safetensors");
        let mut tensors: Vec<_> =
            file.iter().map(|(name, t)| (name.to_owned(), t.dtype(), t.shape().to_vec(), t.data().to_vec())).collect();
        tensors.sort();
        tensors
    };
    assert_eq!(tensors(&read(&source)), tensors(&read(&kept)));

    let half = folder.path().join("half");
    let ran = hadal(&line(&half, "--dtype bf16 --shard-size 40kB --json")).exits(0);
    let document = ran.json();
    let files = document["files"].as_array().expect("a list");
    assert!(files.len() > 1, "{document}");
    assert_eq!(document["num_tensors"], tensors(&read(&source)).len());
    for file in files {
        let path = half.join(file.as_str().expect("a name"));
        assert!(fs::metadata(path).expect("a weight file").len() < 40_000 + 20_000, "{file}");
    }

    // A folder that holds a checkpoint is not written to.
    hadal(&line(&kept, "")).exits(1).says(&["error:", "config.json"]);
    hadal(&format!("convert {} {}", folder.path().join("none").display(), folder.path().join("x").display()))
        .exits(1)
        .says(&["none"]);
}

#[test]
fn doctor_tells_what_is_there() {
    let ran = hadal("doctor --json").exits(0);
    let document = ran.json();
    assert_eq!(document["version"], env!("CARGO_PKG_VERSION"));
    assert!(document["gpus"].is_array());
    assert_eq!(document["runs_dir_writable"], true);
    assert!(document["num_threads"].as_u64().is_some_and(|threads| threads > 0), "{document}");
    hadal("doctor").exits(0).says(&["processor", "memory", "GPU"]);
}

#[test]
fn json_goes_to_a_file_beside_the_text_and_failures_are_documents_too() {
    let folder = scratch();
    let file = folder.path().join("result.json");
    let ran = hadal(&format!("check scenes/tiny.ron --json {}", file.display())).exits(0).says(&["valid"]);
    assert!(!ran.stdout.is_empty());
    let document = |path: &Path| -> Value {
        serde_json::from_str(&fs::read_to_string(path).expect("the result")).expect("a JSON document")
    };
    assert_eq!(document(&file)["name"], "tiny");
    hadal(&format!("eval no/such --data x --json {}", file.display())).exits(2);
    assert_eq!(document(&file)["exit_code"], 2);
    // That the file cannot be written is known before anything is done.
    hadal("check scenes/tiny.ron --json no/such/folder.json").exits(1).says(&["cannot write no/such/folder.json"]);
}
