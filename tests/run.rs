//! A scene from training to text, through the binary: `run`, an interrupt, `--resume`, `generate`, `eval`, and runs that go
//! wrong.

use std::{
    fs,
    path::{Path, PathBuf},
    process::{Child, Command, Output, Stdio},
    time::Duration,
};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

fn hadal(args: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hadal"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR")).env("RUST_BACKTRACE", "0");
    command
}

fn output(args: &[&str]) -> (i32, String, String) {
    let Output { status, stdout, stderr } = hadal(args).output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (status.code().expect("an exit code"), text(stdout), text(stderr))
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&fs::read_to_string(path).expect("the report is there")).expect("JSON")
}

fn run_args(dir: &Path, sets: &[&str]) -> Vec<String> {
    let mut args: Vec<String> = vec!["run".into(), "scenes/tiny.ron".into()];
    args.extend([format!("--set=telemetry.dir={:?}", dir.join("runs").to_str().expect("UTF-8"))]);
    args.extend(sets.iter().map(|set| format!("--set={set}")));
    args
}

fn strs(args: &[String]) -> Vec<&str> {
    args.iter().map(String::as_str).collect()
}

/// Loss of every training step of a run's log.
fn losses(run: &Path) -> Vec<(u64, String)> {
    let log = fs::read_to_string(run.join("log.jsonl")).expect("a log");
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    lines.filter_map(|l| Some((l["step"].as_u64()?, l.get("loss_nats_per_token")?.to_string()))).collect()
}

#[test]
fn a_run_is_interrupted_resumed_read_and_measured() {
    let (whole, parts) = (tempfile::tempdir().expect("a folder"), tempfile::tempdir().expect("a folder"));
    let report_path = whole.path().join("report.json");
    let mut args = run_args(whole.path(), &[]);
    args.extend(["--json".into(), report_path.to_str().expect("UTF-8").into()]);
    let (code, _, stderr) = output(&strs(&args));
    assert_eq!(code, 0, "{stderr}");
    let report = json(&report_path);
    for key in [
        "num_params",
        "num_activated_params",
        "train_secs",
        "tokens_per_sec",
        "val_loss_nats_per_token",
        "val_bits_per_byte",
        "max_vio",
        "num_dead_experts",
        "checkpoint_dir",
        "exit_reason",
    ] {
        assert!(!report[key].is_null(), "the report has `{key}`: {report}");
    }
    assert_eq!(report["exit_reason"], "finished");
    assert!(report["overhead_share"].as_f64().expect("a number") < 0.2, "{report}");

    // The same, with an interrupt on the way.
    let run = parts.path().join("runs/tiny");
    let (mut child, send) = under_way(parts.path(), &["telemetry.log_every_steps=1"], 4);
    send(Signal::INT);
    assert_eq!(child.wait().expect("it ends").code(), Some(130));
    let first = losses(&run).len();
    assert!((4..30).contains(&first), "interrupted after {first} of 30 steps");
    let mut args = run_args(parts.path(), &[]);
    args.push("--resume".into());
    let (code, _, stderr) = output(&strs(&args));
    assert_eq!(code, 0, "{stderr}");
    assert_eq!(losses(&run), losses(&whole.path().join("runs/tiny")), "every loss, to the last digit");
    let weights = |run: &Path| fs::read(run.join("latest/model.safetensors")).expect("weights");
    assert_eq!(weights(&run), weights(&whole.path().join("runs/tiny")), "every weight, to the last bit");

    // What it left can be read.
    let checkpoint = run.join("latest");
    let checkpoint = checkpoint.to_str().expect("UTF-8");
    let words = ["generate", checkpoint, "--prompt", "Call me", "--max-new-tokens", "12", "--temperature", "0"];
    let (code, text, stderr) = output(&words);
    assert_eq!(code, 0, "{stderr}");
    assert!(!text.trim().is_empty());
    assert_eq!(output(&words).1, text, "greedy text is the same twice");

    // The book's last tenth, measured from outside, is what the run measured.
    let book = fs::read_to_string("scenes/data/moby-dick.txt").expect("the book");
    let mut cut = book.len() * 9 / 10;
    while !book.is_char_boundary(cut) {
        cut += 1;
    }
    let held_out = whole.path().join("held-out.txt");
    fs::write(&held_out, &book[cut..]).expect("written");
    let report_path = whole.path().join("eval.json");
    let paths = [held_out.to_str(), report_path.to_str()].map(|p| p.expect("UTF-8"));
    let (code, _, stderr) = output(&["eval", checkpoint, "--data", paths[0], "--seq-len", "64", "--json", paths[1]]);
    assert_eq!(code, 0, "{stderr}");
    let eval = json(&report_path);
    let (bits, perplexity) = (eval["bits_per_byte"].as_f64(), eval["perplexity"].as_f64());
    let run_bits = report["val_bits_per_byte"].as_f64().expect("a number");
    assert!((bits.expect("bits per byte") - run_bits).abs() < 0.2, "{eval}, the run's {run_bits} over a part");
    assert!((perplexity.expect("perplexity").ln() - eval["loss_nats_per_token"].as_f64().expect("loss")).abs() < 1e-9);
}

/// A run that goes on, and what sends it signals; returned when its log has as many steps.
fn under_way(dir: &Path, sets: &[&str], num_steps: usize) -> (Child, impl Fn(Signal) + use<>) {
    let args = run_args(dir, sets);
    let mut command = hadal(&strs(&args));
    let child = command.stderr(Stdio::null()).stdout(Stdio::null()).spawn().expect("the program starts");
    let log = dir.join("runs/tiny/log.jsonl");
    while fs::read_to_string(&log).map_or(0, |text| text.lines().count()) < num_steps {
        std::thread::sleep(Duration::from_millis(2));
    }
    let process = Pid::from_child(&child);
    (child, move |signal| kill_process(process, signal).expect("the signal is sent"))
}

#[test]
fn preemption_saves_a_checkpoint_which_the_sigterm_that_follows_does_not_lose() {
    for signals in [&[Signal::USR1, Signal::TERM][..], &[Signal::USR2], &[Signal::TERM, Signal::TERM]] {
        let dir = tempfile::tempdir().expect("a folder");
        let (mut child, send) = under_way(dir.path(), &[], 4);
        signals.iter().for_each(|signal| send(*signal));
        assert_eq!(child.wait().expect("it ends").code(), Some(143), "{signals:?}");
        let run = dir.path().join("runs/tiny");
        let num_steps = losses(&run).len();
        assert!((4..30).contains(&num_steps), "{num_steps} of 30 steps");
        let latest = fs::read_link(run.join("latest")).expect("a checkpoint");
        assert!(latest.ends_with(format!("step-{num_steps:07}")), "{} after {num_steps} steps", latest.display());
    }
}

#[test]
fn a_second_sigterm_ends_a_step_that_takes_too_long() {
    let dir = tempfile::tempdir().expect("a folder");
    // From the third step on, so many microbatches that nobody waits for them.
    let (mut child, send) = under_way(dir.path(), &["batch.ramp=[(step: 2, num_microbatches: 3000)]"], 2);
    std::thread::sleep(Duration::from_millis(300));
    send(Signal::TERM);
    std::thread::sleep(Duration::from_millis(900));
    assert_eq!(child.try_wait().expect("it can be asked"), None, "the first one waits for the step");
    send(Signal::TERM);
    assert_eq!(child.wait().expect("it ends").code(), Some(143));
    assert!(!dir.path().join("runs/tiny/latest").exists());
}

#[test]
fn a_run_of_several_ranks_says_where_idle_time_and_bytes_went() {
    let dir = tempfile::tempdir().expect("a folder");
    let report_path = dir.path().join("report.json");
    let sets = [
        "mesh=(pp: 2, ep: 2, dp: 1, ranks_per_node: 2)",
        "pipeline=(schedule: DualPipe)",
        "batch.num_microbatches=8",
        "expert_parallel=(dispatch: Fp8, combine: Bf16)",
        "telemetry.trace_steps=(start: 3, count: 1)",
    ];
    let mut args = run_args(dir.path(), &sets);
    args.extend(["--json".into(), report_path.to_str().expect("UTF-8").into()]);
    let (code, stdout, stderr) = output(&strs(&args));
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("predicted s") && stdout.contains("measured s") && stdout.contains("sent to others"));
    let report = json(&report_path);
    for side in ["predicted", "measured"] {
        let idle = &report["idle"][side];
        let number = |key: &str| idle[key].as_f64().expect("a number");
        let causes = idle["idle_secs_by_cause"].as_object().expect("causes");
        let sum: f64 = causes.values().map(|secs| secs.as_f64().expect("seconds")).sum();
        let all = number("idle_fraction") * number("step_secs");
        assert!(number("step_secs") > 0.0 && causes.len() == 8);
        assert!((sum - all).abs() < 0.01 * all.max(1e-6), "{side}: causes {sum}, idle {all}");
    }
    let bytes = |key: &str| report["idle"]["links"][key].as_f64().expect("bytes");
    for class in ["intra_node_bytes", "inter_node_bytes"] {
        let (predicted, measured) = (bytes(&format!("predicted_{class}")), bytes(&format!("measured_{class}")));
        assert!(measured > 0.0 && (predicted / measured - 1.0).abs() < 0.2, "{class}: {predicted}, {measured}");
    }
    // The trace has all ranks, and each gap of their compute streams has a cause.
    let trace = fs::read_to_string(dir.path().join("runs/tiny/trace.json")).expect("a trace");
    let events: Vec<Value> = serde_json::from_str(&trace).expect("JSON");
    let ranks: std::collections::BTreeSet<_> = events.iter().filter_map(|event| event["pid"].as_u64()).collect();
    assert_eq!(ranks.len(), 4);
    let mut bubbles = events.iter().filter(|event| event["name"] == "bubble");
    assert!(bubbles.all(|bubble| bubble["args"]["cause"].is_string()));
}

/// Every token goes to all of eight experts, so that links carry what is expected to the byte, to two, three and three of them also.
#[test]
fn bytes_on_links_are_those_predicted_where_ranks_have_other_numbers_of_experts() {
    for (mesh, microbatches) in [("ep: 3, ranks_per_node: 2", 3), ("ep: 5, ranks_per_node: 2", 5), ("ep: 3, dp: 2", 6)]
    {
        let dir = tempfile::tempdir().expect("a folder");
        let report_path = dir.path().join("report.json");
        let (mesh, microbatches) = (format!("mesh=({mesh})"), format!("batch.num_microbatches={microbatches}"));
        let sets = [
            mesh.as_str(),
            &microbatches,
            "train.steps=5",
            "telemetry.trace_steps=None",
            "schedule=Constant(lr: 3e-3)",
            "model.num_experts_per_tok=8",
            "model.topk_group=4",
        ];
        let mut args = run_args(dir.path(), &sets);
        args.extend(["--json".into(), report_path.to_str().expect("UTF-8").into()]);
        let (code, _, stderr) = output(&strs(&args));
        assert_eq!(code, 0, "{stderr}");
        let links = &json(&report_path)["idle"]["links"];
        for class in ["intra_node_bytes", "inter_node_bytes"] {
            let [predicted, measured] = ["predicted", "measured"].map(|side| links[format!("{side}_{class}")].as_u64());
            assert!(measured.is_some() && predicted == measured, "{mesh}: {links}");
        }
        assert!(links["measured_intra_node_bytes"].as_u64() > Some(0), "{mesh}: {links}");
    }
}

#[test]
fn a_run_on_priced_hardware_keeps_its_bill() {
    let dir = tempfile::tempdir().expect("a folder");
    let sets = ["plan=(hardware: \"scenes/hardware/h100.ron\")", "train.max_train_secs=3600"];
    let (code, _, stderr) = output(&strs(&run_args(dir.path(), &sets)));
    assert_eq!(code, 0, "{stderr}");
    let log = fs::read_to_string(dir.path().join("runs/tiny/log.jsonl")).expect("a log");
    let lines: Vec<Value> = log.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let steps: Vec<&Value> = lines.iter().filter(|line| line.get("lr").is_some()).collect();
    let number = |line: &Value, key: &str| line[key].as_f64().unwrap_or_else(|| panic!("no `{key}` in {line}"));
    for pair in steps.windows(2) {
        for key in ["cost_usd", "energy_kwh"] {
            assert!(number(pair[0], key) > 0.0 && number(pair[0], key) < number(pair[1], key), "{key}");
        }
    }
    let last = steps.last().expect("steps");
    assert!((0.0..1.0).contains(&number(last, "mfu")) && number(last, "mfu") > 0.0, "{last}");
    // An hour costs the device's price, and what was used is less.
    assert!(number(last, "budget_usd") > number(last, "cost_usd") && number(last, "budget_usd") < 100.0, "{last}");
    assert!(number(last, "budget_kwh") > number(last, "energy_kwh"));
}

#[test]
fn schedules_are_measured_beside_their_plans() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (code, _, stderr) = output(&["bench", "hardware", "--threads", "1", "--save", &path("core.ron")]);
    assert_eq!(code, 0, "{stderr}");
    let sets = ["mesh.pp=2", "batch.num_microbatches=4"].map(|set| format!("--set={set}"));
    let runs = format!("--set=telemetry.dir={:?}", path("runs"));
    let (hardware, result) = (path("core.ron"), path("result.json"));
    let mut args = vec!["bench", "schedules", "--scene", "scenes/tiny.ron", "--hardware", &hardware, "--steps", "3"];
    args.extend([&*runs, &*sets[0], &*sets[1], "--json", &*result]);
    let (code, stdout, stderr) = output(&args);
    assert_eq!(code, 0, "{stderr}");
    let report = json(Path::new(&result));
    let lines = report["lines"].as_array().expect("lines");
    // Three layers are too few for schedules of four stages, and that is told.
    assert_eq!(lines.len(), 6, "{stdout}");
    assert!(stderr.contains("Zbv is left out") && stderr.contains("more than the 3 layers"), "{stderr}");
    for line in lines {
        let number = |key: &str| line[key].as_f64().expect("a number");
        assert!(number("predicted_step_secs") > 0.0 && number("measured_step_secs") > 0.0, "{line}");
        assert!((0.0..1.0).contains(&number("predicted_idle_fraction")), "{line}");
    }
}

#[test]
fn runs_that_go_wrong_say_where_and_exit_as_documented() {
    let dir = tempfile::tempdir().expect("a folder");
    let bad_text = dir.path().join("bad.txt");
    fs::write(&bad_text, b"fine so far \xff").expect("written");
    let empty = dir.path().join("empty.txt");
    fs::write(&empty, b"").expect("written");
    let set = |key: &str, path: &PathBuf| format!("{key}={:?}", path.to_str().expect("UTF-8"));
    let cases: [(&[String], i32, &[&str]); 6] = [
        (&["data.refuse_long_documents=true".into()], 2, &["document 0", "sequence length 64"]),
        (&["schedule=Constant(lr: 1e30)".into()], 4, &["NaN", "`"]),
        (&["train.max_train_secs=0.05".into()], 6, &["budget"]),
        (&[set("data.train", &bad_text)], 2, &["bad.txt", "12"]),
        (&[set("data.train", &empty)], 2, &["empty.txt"]),
        (&["model.vocab_size=300".into()], 2, &["vocab", "512", "300"]),
    ];
    for (i, (sets, code, says)) in cases.into_iter().enumerate() {
        let sets: Vec<&str> = sets.iter().map(String::as_str).collect();
        let args = run_args(&dir.path().join(i.to_string()), &sets);
        let (got, stdout, stderr) = output(&strs(&args));
        assert_eq!(got, code, "{sets:?}\n{stdout}\n{stderr}");
        for part in says {
            assert!(stderr.contains(part) || stdout.contains(part), "{sets:?} says `{part}`:\n{stdout}\n{stderr}");
        }
    }
}

#[test]
fn a_run_is_neither_written_to_twice_nor_begun_anew_unasked() {
    let dir = tempfile::tempdir().expect("a folder");
    let run = dir.path().join("runs/tiny");
    let quick = [
        "checkpoint.every_steps=2",
        "eval=None",
        "sample=None",
        "schedule=Constant(lr: 1e-3)",
        "routing.bias_warm_down_steps=0",
    ];
    let quick = [&quick[..], &["telemetry.trace_steps=None"]].concat();
    let resume = |more: &[&str]| {
        let mut args = run_args(dir.path(), &[&quick[..], more].concat());
        args.push("--resume".into());
        output(&strs(&args))
    };
    let (mut child, send) = under_way(dir.path(), &[&quick[..], &["train.steps=100000"]].concat(), 3);
    let (code, _, said) = resume(&[]);
    let by = format!("runs/tiny is being written to by another run (process {} on ", child.id());
    assert!(code == 2 && said.contains(&by), "{code}: {said}");
    send(Signal::TERM);
    assert_eq!(child.wait().expect("it ends").code(), Some(143));

    // All steps are done: there is none more.
    let (num_steps, log) = (losses(&run).len(), fs::read_to_string(run.join("log.jsonl")).expect("a log"));
    let (code, told, said) = resume(&[&format!("train.steps={num_steps}")]);
    assert!(code == 0 && said.contains("all steps of the scene are done already"), "{code}: {said}{told}");
    assert_eq!(losses(&run).len(), num_steps, "{said}");

    // A run that is damaged is left as it is.
    for folder in fs::read_dir(run.join("checkpoints")).expect("checkpoints") {
        let path = folder.expect("a checkpoint").path().join("model.safetensors");
        fs::write(&path, "cut off").expect("it is written");
    }
    for ranks in ["mesh.ep=1", "mesh.ep=2"] {
        let (code, _, said) = resume(&[ranks]);
        assert!(code == 1 && said.contains("is whole, and nothing was changed"), "{code}: {said}");
        assert!(said.contains("model.safetensors is damaged: expected "), "{said}");
    }
    assert_eq!(fs::read_to_string(run.join("log.jsonl")).expect("a log"), log);
}

#[test]
fn a_full_disk_leaves_the_checkpoint_before_it() {
    let dir = tempfile::tempdir().expect("a folder");
    let (code, _, stderr) = output(&strs(&run_args(dir.path(), &["train.steps=18"])));
    assert_eq!(code, 0, "{stderr}");
    let run = dir.path().join("runs/tiny");
    let before = fs::read(run.join("latest/model.safetensors")).expect("weights");
    // A limit on the size of a file stands in for a full disk: the weights (about 1.2 MB) do not fit.
    let mut args = run_args(dir.path(), &["train.steps=22"]);
    args.push("--resume".into());
    let quoted: Vec<String> = args.iter().map(|a| format!("'{a}'")).collect();
    let script = format!("trap '' XFSZ; ulimit -S -f 600; exec {} {}", env!("CARGO_BIN_EXE_hadal"), quoted.join(" "));
    let result = Command::new("bash")
        .args(["-c", &script])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .expect("bash starts");
    let stderr = String::from_utf8_lossy(&result.stderr).into_owned();
    assert_eq!(result.status.code(), Some(1), "{stderr}");
    assert!(stderr.contains("step-0000022"), "the error names the checkpoint: {stderr}");
    assert_eq!(fs::read(run.join("latest/model.safetensors")).expect("weights"), before, "the one before is whole");
    let left: Vec<_> =
        fs::read_dir(run.join("checkpoints")).expect("a folder").flatten().map(|e| e.file_name()).collect();
    assert_eq!(left.len(), 2, "nothing half written is left: {left:?}");
}

#[test]
fn eval_writes_the_logits_and_gradients_of_given_tokens() {
    let dir = tempfile::tempdir().expect("a folder");
    let fixture = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/oracle/fixtures/deepseek_v3_qlora");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let (logits, grads) = (path("logits.safetensors"), path("grads.safetensors"));
    let tokens = fixture.join("tokens.safetensors");
    let words = ["eval", fixture.to_str().expect("UTF-8"), "--tokens", tokens.to_str().expect("UTF-8")];
    let (code, stdout, stderr) =
        output(&[&words[..], &["--logits", &logits, "--grads", &grads, "--json", "-"]].concat());
    assert_eq!(code, 0, "{stderr}");
    let expected = fs::read(fixture.join("expected.safetensors")).expect("the fixture");
    let expected = safetensors::SafeTensors::deserialize(&expected).expect("safetensors");
    let values = |file: &safetensors::SafeTensors, name: &str| -> Vec<f32> {
        let bytes = file.tensor(name).unwrap_or_else(|e| panic!("{name}: {e}")).data().to_vec();
        bytes.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let loss = serde_json::from_str::<Value>(&stdout).expect("JSON")["loss_nats_per_token"].as_f64().expect("a loss");
    assert!((loss - f64::from(values(&expected, "loss")[0])).abs() < 1e-5, "{loss}");
    let file = fs::read(&logits).expect("logits");
    let got = values(&safetensors::SafeTensors::deserialize(&file).expect("safetensors"), "logits");
    for (got, want) in got.iter().zip(values(&expected, "logits")) {
        assert!((got - want).abs() < 1e-4, "{got}, theirs {want}");
    }
    let file = fs::read(&grads).expect("gradients");
    let got = safetensors::SafeTensors::deserialize(&file).expect("safetensors");
    let names: Vec<&str> = expected.names().into_iter().filter_map(|n| n.strip_prefix("grad.")).collect();
    assert_eq!(names.len(), got.len(), "one gradient for each parameter");
    for name in names {
        let (x, y) = (values(&got, name), values(&expected, &format!("grad.{name}")));
        let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        let norms = dot(&x, &x) + dot(&y, &y);
        assert!(norms == 0.0 || 1.0 - 2.0 * dot(&x, &y) / norms < 1e-8, "gradient of {name}");
    }
}

#[test]
fn a_run_in_fp8_says_what_rounding_lost_and_its_checkpoint_is_multiplied_as_it_is_stored() {
    let dir = tempfile::tempdir().expect("a folder");
    let path = |name: &str| dir.path().join(name).to_str().expect("UTF-8").to_owned();
    let mut args =
        run_args(dir.path(), &["precision=(compute: Fp8, watch_every_steps: 2)", "train.steps=17", "eval=None"]);
    let (report_path, report) = (path("report.json"), |name: &str| json(&dir.path().join(name)));
    args.extend(["--json".into(), report_path]);
    let (code, stdout, stderr) = output(&strs(&args));
    assert_eq!(code, 0, "{stderr}");
    assert!(stdout.contains("lost by rounding to 8 bits in step 16, the worst 5 of 20"), "{stdout}");
    let rounding = &report("report.json")["fp8_rounding"];
    assert_eq!((rounding["step"].as_u64(), rounding["lost"].as_array().map(Vec::len)), (Some(16), Some(20)));

    let (bf16, fp8) = (path("runs/tiny/latest"), path("fp8"));
    let (code, _, stderr) = output(&["convert", &bf16, &fp8, "--dtype", "fp8"]);
    assert_eq!(code, 0, "{stderr}");
    let generate = ["generate", "--prompt", "Call me", "--max-new-tokens", "4", "--precision", "fp8", "--json"];
    let weights = |checkpoint: &str, name: &str| {
        let file = path(name);
        let (code, _, stderr) = output(&[&generate[..], &[&file, checkpoint]].concat());
        assert_eq!(code, 0, "{stderr}");
        assert!(stderr.contains("weights in 8 bits: "), "{stderr}");
        report(name)["weights"].clone()
    };
    let number =
        |weights: &Value, key: &str| weights[key].as_u64().unwrap_or_else(|| panic!("no `{key}` in {weights}"));
    let (stored, rounded) = (weights(&fp8, "stored.json"), weights(&bf16, "rounded.json"));
    // Gate and up have 32 or 176 rows, and are packed; down and attention are stored as they are multiplied.
    assert!(number(&stored, "num_fp8_as_stored") > number(&stored, "num_fp8_rounded"), "{stored}");
    assert!(stored["first_fp8_rounded"].as_str().is_some_and(|why| why.contains("no multiple of 128")), "{stored}");
    assert_eq!(number(&rounded, "num_fp8_as_stored"), 0);
    assert_eq!(number(&stored, "bytes"), number(&rounded, "bytes"));
}
