//! A GPU's part of the program on the stand-in for the driver: training as on the CPU, what `doctor` tells, and each way in which a GPU
//! can be of no use, with its exit code.

#![cfg(feature = "cuda")]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;

/// The program with the stand-in as its driver, and how it ended.
fn hadal(folder: &Path, args: &[&str], settings: &[(&str, &str)]) -> (i32, String, String) {
    let driver = folder.join("driver");
    fs::create_dir_all(&driver).expect("a folder");
    let mut command = Command::new(env!("CARGO_BIN_EXE_hadal"));
    command.args(args).current_dir(env!("CARGO_MANIFEST_DIR")).env("RUST_BACKTRACE", "0");
    command.env("LD_LIBRARY_PATH", ptxsim_driver::install(&driver).expect("the stand-in is built"));
    let Output { status, stdout, stderr } =
        command.envs(settings.iter().copied()).output().expect("the program starts");
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).expect("UTF-8");
    (status.code().expect("an exit code"), text(stdout), text(stderr))
}

/// Five steps of the smallest scene, with less text in a step: an interpreter is slow.
fn train(folder: &Path, name: &str, sets: &[&str], settings: &[(&str, &str)]) -> (i32, String) {
    let sets = [
        &format!("telemetry.dir={:?}", folder.join("runs").to_str().expect("UTF-8")),
        &format!("name={name:?}"),
        "train.steps=5",
        "data.seq_len=32",
        "batch.microbatch_sequences=1",
        "schedule=Constant(lr: 3e-3)",
        "telemetry.trace_steps=None",
        "telemetry.log_every_steps=1",
        "eval=None",
        "sample=None",
        "checkpoint=None",
    ]
    .into_iter()
    .chain(sets.iter().copied())
    .map(|set| format!("--set={set}"))
    .collect::<Vec<_>>();
    let report = folder.join(format!("{name}.json"));
    let args = ["run", "scenes/tiny.ron", "--json", report.to_str().expect("UTF-8")];
    let args: Vec<&str> = args.into_iter().chain(sets.iter().map(String::as_str)).collect();
    let (code, stdout, stderr) = hadal(folder, &args, settings);
    (code, stdout + &stderr)
}

/// Losses and gradient norms of a run's steps.
fn figures(folder: &Path, name: &str) -> Vec<f64> {
    let log = fs::read_to_string(folder.join("runs").join(name).join("log.jsonl")).expect("a log");
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let of =
        |line: Value| ["loss_nats_per_token", "mtp_loss_nats_per_token/0", "grad_norm"].map(|key| line[key].as_f64());
    lines.filter_map(|line| of(line).into_iter().collect::<Option<Vec<f64>>>()).flatten().collect()
}

fn trains_as_the_cpu_does(precision: &str, tolerance: f64, settings: &[(&str, &str)]) {
    let folder = tempfile::tempdir().expect("a folder");
    let precision = format!("precision=({precision})");
    let (code, output) = train(folder.path(), "cpu", &[&precision], settings);
    assert_eq!(code, 0, "{output}");
    let (code, output) = train(folder.path(), "gpu", &[&precision, "device=Cuda(0)"], settings);
    assert_eq!(code, 0, "{output}");
    assert!(!output.contains("runs on the host"), "every op of a step has a kernel: {output}");
    let (cpu, gpu) = (figures(folder.path(), "cpu"), figures(folder.path(), "gpu"));
    assert_eq!((cpu.len(), gpu.len()), (15, 15), "three figures in each of five steps");
    for (i, (cpu, gpu)) in cpu.iter().zip(&gpu).enumerate() {
        // Two losses, and the gradient's norm: in bf16 the CPU rounds sums over tokens after each of few tokens, kernels once.
        let tolerance = if i % 3 == 2 { 30.0 * tolerance } else { tolerance };
        assert!((cpu - gpu).abs() <= tolerance * cpu.abs(), "figure {i}: {cpu} on the CPU, {gpu} on the stand-in");
    }
}

#[test]
fn training_in_f32_has_the_losses_of_the_cpu() {
    trains_as_the_cpu_does("compute: F32", 1e-6, &[("PTXSIM_SEED", "3")]);
}

#[test]
fn training_in_bf16_has_the_losses_of_the_cpu() {
    trains_as_the_cpu_does("compute: Bf16", 1e-3, &[]);
}

/// A code is another where the two round a number differently in front of it.
#[test]
fn training_in_fp8_has_the_losses_of_the_cpu() {
    trains_as_the_cpu_does("compute: Fp8", 3e-3, &[]);
}

#[test]
fn an_ampere_gpu_trains_in_fp8_with_all_that_can_be_narrow() {
    let precision = "compute: Fp8, moments: Bf16, scales: PowerOfTwo, attention_output: Narrow, swiglu_input: Narrow";
    trains_as_the_cpu_does(precision, 3e-3, &[("PTXSIM_COMPUTE", "8.6")]);
}

#[test]
fn an_ampere_gpu_trains_too() {
    trains_as_the_cpu_does("compute: Bf16", 1e-3, &[("PTXSIM_COMPUTE", "8.0")]);
}

#[test]
fn training_by_graphs_has_the_losses_of_training_without_to_the_bit() {
    let folder = tempfile::tempdir().expect("a folder");
    // The rate is another in steps 1 to 3, and the same from then on.
    let sets = [
        "device=Cuda(0)",
        "precision.compute=Bf16",
        "schedule=WarmupStableDecay(peak_lr: 3e-3, warmup_steps: 3, decay_steps: 1)",
        "train.steps=6",
    ];
    let run = |name: &str, graphs: &str| {
        let (code, output) = train(folder.path(), name, &[&sets[..], &[graphs]].concat(), &[("PTXSIM_STATS", "1")]);
        assert_eq!(code, 0, "{output}");
        let said = output.lines().find(|line| line.contains("graphs of")).unwrap_or_default().to_owned();
        (figures(folder.path(), name), said)
    };
    let ((plain, none), (by_graphs, some)) = (run("plain", "graphs=false"), run("graphs", "graphs=true"));
    assert_eq!(plain.len(), 18, "three figures in each of six steps");
    assert_eq!(plain, by_graphs);
    assert_eq!(none, "ptxsim: 0 graphs of 0 kernels");
    let kernels = some.split(' ').rev().nth(1).and_then(|number| number.parse::<u64>().ok());
    assert!(kernels > Some(1000), "{some}");
}

#[test]
fn what_is_wrong_with_a_gpu_is_said_with_the_right_exit_code() {
    let folder = tempfile::tempdir().expect("a folder");
    let cases: [(&str, &str, i32, &str); 6] = [
        ("PTXSIM_DEVICES", "0", 1, "cuda:0 cannot be used: expected an NVIDIA GPU, found a driver without one"),
        (
            "PTXSIM_DRIVER",
            "12020",
            1,
            "expected a driver for CUDA 12.3 or later (version 545), found one for CUDA 12.2",
        ),
        ("PTXSIM_COMPUTE", "7.5", 1, "expected a GPU of compute capability 8.0 or more, found 7.5"),
        ("PTXSIM_MEMORY", "1000000", 3, "cuda:0 is out of memory: asked for"),
        ("PTXSIM_MEMORY", "5200000", 3, "cuda:0 is out of memory: asked for"),
        ("PTXSIM_REFUSE", "rms_norm_forward", 1, "cannot be loaded on cuda:0: CUDA_ERROR_INVALID_PTX"),
    ];
    for (i, (name, value, exit_code, said)) in cases.into_iter().enumerate() {
        let (code, output) = train(folder.path(), &format!("run{i}"), &["device=Cuda(0)"], &[(name, value)]);
        assert_eq!(code, exit_code, "{name}={value}: {output}");
        assert!(output.contains(said), "{name}={value}: {output}");
        assert!(!output.contains("panicked"), "{name}={value}: {output}");
    }
}

#[test]
fn doctor_shows_the_gpu_and_checks_every_op() {
    let folder = tempfile::tempdir().expect("a folder");
    let (code, stdout, stderr) = hadal(folder.path(), &["doctor"], &[]);
    assert_eq!(code, 0, "{stderr}");
    assert!(
        stdout.contains("cuda:0: PTX interpreter 9.0, compute capability 9.0, 1.0 GiB, driver for CUDA 12.4"),
        "{stdout}"
    );
    let library = ptxsim_nccl::install(folder.path()).expect("the stand-in is built");
    let library = library.to_str().expect("UTF-8");
    let (_, stdout, _) = hadal(folder.path(), &["doctor"], &[("HADAL_NCCL", library)]);
    assert!(stdout.contains(&format!("NCCL 2.32.3 ({library})")), "{stdout}");
    let (_, stdout, _) = hadal(folder.path(), &["doctor", "--json", "-"], &[("HADAL_NCCL", "none")]);
    let document: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((&document["nccl"], &document["nccl_problem"]), (&Value::Null, &"HADAL_NCCL is `none`".into()));
    let (_, stdout, _) = hadal(folder.path(), &["doctor"], &[("PTXSIM_COMPUTE", "7.5")]);
    assert!(stdout.contains("expected a GPU of compute capability 8.0 or more"), "{stdout}");
    let (code, stdout, stderr) = hadal(folder.path(), &["doctor", "--device", "cuda:0", "--quick", "--json", "-"], &[]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let document: Value = serde_json::from_str(&stdout).expect("JSON");
    assert_eq!((&document["device"], &document["num_failed"]), (&"cuda:0".into(), &0.into()));
    assert!(document["rows"].as_array().is_some_and(|rows| rows.len() > 100), "{stdout}");
    // A device that cannot run the kernels is an error, and a wrong op is told by the exit code.
    let args = ["doctor", "--device", "cuda:0", "--quick"];
    let (code, stdout, _) = hadal(folder.path(), &args, &[("PTXSIM_REFUSE", "swiglu")]);
    assert_eq!(code, 1, "{stdout}");
    assert!(stdout.contains("WRONG") && stdout.contains("kernel `swiglu_forward"), "{stdout}");
    let (code, _, stderr) = hadal(folder.path(), &["doctor", "--device", "cuda:7"], &[]);
    assert_eq!(code, 1, "{stderr}");
    assert!(stderr.contains("expected a number below 1"), "{stderr}");
}

#[test]
fn a_checkpoint_speaks_and_is_measured_as_on_the_cpu() {
    let folder = tempfile::tempdir().expect("a folder");
    let (code, output) = train(folder.path(), "cpu", &["checkpoint=(every_steps: 5)"], &[]);
    assert_eq!(code, 0, "{output}");
    let checkpoint = folder.path().join("runs/cpu/latest");
    let text = folder.path().join("text.txt");
    fs::write(&text, "Call me Ishmael. Some years ago, never mind how long precisely.").expect("a file");
    let on = |device: &str| {
        let [checkpoint, text] = [&checkpoint, &text].map(|path| path.to_str().expect("UTF-8"));
        let args = ["eval", checkpoint, "--data", text, "--seq-len", "32", "--device", device, "--json", "-"];
        let (code, stdout, stderr) = hadal(folder.path(), &args, &[]);
        assert_eq!(code, 0, "{stdout}{stderr}");
        let loss = serde_json::from_str::<Value>(&stdout).expect("JSON")["loss_nats_per_token"].as_f64();
        let args = ["generate", checkpoint, "--prompt", "Call", "--max-new-tokens", "6", "--temperature", "0"];
        let (code, said, stderr) = hadal(folder.path(), &[&args[..], &["--device", device]].concat(), &[]);
        assert_eq!(code, 0, "{said}{stderr}");
        (loss.expect("a loss"), said)
    };
    let ((cpu, said), (gpu, said_there)) = (on("cpu"), on("cuda:0"));
    assert!((cpu - gpu).abs() < 1e-6 * cpu, "{cpu} on the CPU, {gpu} on the stand-in");
    assert_eq!(said, said_there);
}

#[test]
fn bench_kernels_measures_each_op_beside_ceilings() {
    let folder = tempfile::tempdir().expect("a folder");
    let args = ["bench", "kernels", "--device", "cuda:0", "--shrink", "256", "--runs", "1", "--json", "-"];
    let (code, stdout, stderr) = hadal(folder.path(), &args, &[]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let document: Value = serde_json::from_str(&stdout).expect("JSON");
    let rows = document["rows"].as_array().expect("rows");
    assert!(rows.len() > 40 && rows.iter().all(|row| row["ran_on"] == "device" && row["secs"].as_f64() > Some(0.0)));
    for key in ["ceiling_bytes_per_sec", "ceiling_flops_per_sec"] {
        assert!(document[key].as_f64() > Some(0.0), "{key}");
    }
    let launch = &document["launch"];
    assert!(launch["host_secs_per_launch"].as_f64() > Some(0.0), "{launch}");
    assert!(launch["host_secs_per_launch_in_graph"].as_f64() > Some(0.0), "{launch}");
}

#[test]
fn tiles_are_measured_into_a_table_that_only_this_gpu_takes() {
    let folder = tempfile::tempdir().expect("a folder");
    let path = folder.path().join("tiles.ron");
    let file = path.to_str().expect("UTF-8");
    let bench = ["bench", "kernels", "--device", "cuda:0", "--shrink", "256", "--runs", "1", "--json", "-"];
    // Eight multiprocessors: one is for communication, and each product is measured on eight and on seven.
    let eight = [("PTXSIM_SMS", "8")];
    let (code, stdout, stderr) = hadal(folder.path(), &[&bench[..], &["--tune", file]].concat(), &eight);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let document: Value = serde_json::from_str(&stdout).expect("JSON");
    let rows = document["rows"].as_array().expect("rows");
    for of in ["bf16 NT into bf16", "bf16 NN into bf16", "bf16 TN into f32", "by rows of", "by k of", "fp8 NT into f32"]
    {
        for sms in ["on 8 SMs", "on 7 SMs"] {
            let has =
                |row: &&Value| row["product"].as_str().is_some_and(|name| name.contains(of) && name.ends_with(sms));
            assert!(rows.iter().any(|row| has(&row)), "{of} {sms}");
        }
    }
    let is_quickest = |row: &Value| row["secs"].as_f64() <= row["model_secs"].as_f64();
    assert!(rows.iter().all(is_quickest), "the model's tile is one of those measured: {stdout}");
    let text = fs::read_to_string(&path).expect("the table");
    assert_eq!(text.lines().filter(|line| line.contains("product: ")).count(), rows.len(), "a row a line: {text}");

    let with_table = [&bench[..], &["--tuning", file]].concat();
    let (code, stdout, stderr) = hadal(folder.path(), &with_table, &eight);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let (code, _, stderr) = hadal(folder.path(), &with_table, &[("PTXSIM_SMS", "9")]);
    assert_eq!(code, 1, "{stderr}");
    let expected = "cuda:0 cannot be used: expected a tuning table measured on ";
    assert!(stderr.contains(expected) && stderr.contains(" with 9 multiprocessors, found one of "), "{stderr}");

    // A scene takes it too, and refuses what is none, or has a tile that is not known.
    let tuned = format!("tuning={file:?}");
    let sets = ["device=Cuda(0)", "precision.compute=Bf16", &tuned];
    let (code, output) = train(folder.path(), "tuned", &sets, &eight);
    assert_eq!(code, 0, "{output}");
    let (code, output) = train(folder.path(), "plain", &sets[..2], &eight);
    assert_eq!(code, 0, "{output}");
    assert_eq!(figures(folder.path(), "tuned"), figures(folder.path(), "plain"), "tiles change no bit");
    let (code, output) = train(folder.path(), "other", &sets, &[]);
    assert_eq!(code, 2, "{output}");
    assert!(
        output.contains("with 4 multiprocessors, found one of ") && output.contains(" with 8; measure"),
        "{output}"
    );
    let tile = rows[0]["tile"].as_str().expect("a name");
    fs::write(&path, text.replacen(&format!("tile: \"{tile}\""), "tile: \"round\"", 1)).expect("written");
    let (code, output) = train(folder.path(), "round", &sets, &eight);
    assert_eq!(code, 2, "{output}");
    assert!(output.contains("tiles.ron: row 1 (") && output.contains("found `round`"), "{output}");
}

#[test]
fn multiprocessors_set_apart_for_communication_change_no_bit() {
    let folder = tempfile::tempdir().expect("a folder");
    // Two ranks have two of fourteen for communication unless the scene says otherwise.
    let sets = ["device=Cuda(0)", "batch.num_microbatches=2", "mesh.dp=2"];
    let sms = [("PTXSIM_SMS", "14")];
    for (name, more) in [("apart", &[][..]), ("shared", &["comm_sms=0"])] {
        let (code, output) = train(folder.path(), name, &[&sets[..], more].concat(), &sms);
        assert_eq!(code, 0, "{output}");
    }
    let (apart, shared) = (figures(folder.path(), "apart"), figures(folder.path(), "shared"));
    assert_eq!((apart.len(), apart), (15, shared));
    let (code, output) = train(folder.path(), "none_left", &[&sets[..], &["comm_sms=14"]].concat(), &sms);
    assert_eq!(code, 2, "{output}");
    assert!(output.contains("expected less than the device's 14, found 14; set it to 2, or leave it out"), "{output}");
}

#[test]
fn bench_overlap_runs_a_layer_beside_copies_on_their_own_multiprocessors() {
    let folder = tempfile::tempdir().expect("a folder");
    let args = ["bench", "overlap", "--device", "cuda:0", "--shrink", "256", "--runs", "1", "--json", "-"];
    let (code, stdout, stderr) = hadal(folder.path(), &args, &[("PTXSIM_SMS", "14")]);
    assert_eq!(code, 0, "{stdout}{stderr}");
    let document: Value = serde_json::from_str(&stdout).expect("JSON");
    let number = |key: &str| document[key].as_f64().expect("a number");
    assert_eq!((number("num_sms"), number("comm_sms"), number("ops_on_host")), (14.0, 2.0, 0.0));
    for key in ["compute_on_all_secs", "compute_secs", "comm_secs", "both_secs", "compute_tflops_per_sec"] {
        assert!(number(key) > 0.0, "{key}");
    }
    let hidden = (number("compute_secs") + number("comm_secs") - number("both_secs")) / number("comm_secs");
    assert!((number("hidden_share") - hidden).abs() < 1e-9, "{stdout}");
    assert!(document["notes"][0].as_str().is_some_and(|note| note.starts_with("sizes are divided")), "{stdout}");

    let (code, _, stderr) = hadal(folder.path(), &[&args[..], &["--comm-sms", "4"]].concat(), &[]);
    assert_eq!(code, 1, "{stderr}");
    let expected =
        "expected fewer multiprocessors for communication than its 4, found 4; use `--comm-sms 0`, or leave it out";
    assert!(stderr.contains(expected), "{stderr}");
}

/// Joules that the stand-in's counter grows by with each reading: a step has two, so that each takes as much.
const JOULES: f64 = 5.0;
const JOULES_PER_KWH: f64 = 3.6e6;

/// How a run on the stand-in ended, what it said, its steps, and its report.
struct Ran {
    code: i32,
    output: String,
    steps: Vec<Value>,
    report: Value,
}

fn run_on_gpu(folder: &Path, name: &str, sets: &[&str], settings: &[(&str, &str)]) -> Ran {
    let (code, output) = train(folder, name, &[&["device=Cuda(0)"], sets].concat(), settings);
    let read = |path: &Path| fs::read_to_string(path).unwrap_or_default();
    let log = read(&folder.join("runs").join(name).join("log.jsonl"));
    let lines = log.lines().map(|line| serde_json::from_str::<Value>(line).expect("JSON"));
    let steps = lines.filter(|line| line.get("lr").is_some()).collect();
    let report = serde_json::from_str(&read(&folder.join(format!("{name}.json")))).unwrap_or_default();
    Ran { code, output, steps, report }
}

fn number(line: &Value, key: &str) -> f64 {
    line[key].as_f64().unwrap_or_else(|| panic!("no `{key}` in {line}"))
}

fn is_near(found: f64, expected: f64) -> bool {
    (found / expected - 1.0).abs() < 1e-9
}

/// The stand-in for NVML has another GPU too, in front of this one, that takes very much.
#[test]
fn energy_is_measured_where_nvml_is_and_the_budget_is_of_what_was_measured() {
    let folder = tempfile::tempdir().expect("a folder");
    let on = |name: &str, sets: &[&str], settings: &[(&str, &str)]| run_on_gpu(folder.path(), name, sets, settings);
    let counter = ("PTXSIM_MILLIJOULES", "5000");

    // Without the library nothing is measured, and energy is known of described hardware only.
    let without = on("without", &[], &[counter]);
    assert_eq!((without.code, without.steps.len()), (0, 5), "{}", without.output);
    let has_energy = |line: &Value| ["power_watts", "energy_kwh"].iter().any(|key| !line[key].is_null());
    assert!(!without.steps.iter().any(has_energy) && without.report["energy_source"].is_null(), "{}", without.report);
    let hardware = "plan=(hardware: \"scenes/hardware/h100.ron\")";
    let modelled = on("modelled", &[hardware], &[counter]);
    assert_eq!(modelled.report["energy_source"], "hardware_watts", "{}", modelled.output);
    assert!(modelled.output.contains("energy is modelled: the watts of `plan.hardware`"), "{}", modelled.output);
    // Three steps and a half by the counter, a part of a step by the watts.
    let budget = format!("budget=(energy_kwh: {:e})", 3.5 * JOULES / JOULES_PER_KWH);
    let unknown = on("unknown", &[&budget], &[counter]);
    assert_eq!(unknown.code, 2, "{}", unknown.output);
    assert!(unknown.output.contains("needs `plan.hardware` with its watts"), "{}", unknown.output);
    let (_, stdout, _) = hadal(folder.path(), &["doctor"], &[]);
    let line = stdout.lines().find(|line| line.trim_start().starts_with("power")).expect("a line").to_owned();
    assert!(line.contains("not measured: libnvidia-ml.so.1") || line.contains("by NVML"), "{line}");

    ptxsim_driver::install_nvml(&folder.path().join("driver")).expect("the stand-in is built");
    let (_, stdout, _) = hadal(folder.path(), &["doctor"], &[]);
    assert!(stdout.contains("of GPUs is measured, by NVML 12.550.ptxsim"), "{stdout}");
    let with = on("with", &[hardware], &[counter]);
    assert_eq!((with.code, with.steps.len()), (0, 5), "{}", with.output);
    let said = "power of GPU-00000000-0000-0000-0000-00000000003b is measured: the energy counters of NVML";
    assert_eq!(with.output.matches(said).count(), 1, "{}", with.output);
    for (i, step) in (1..).zip(&with.steps) {
        let joules = number(step, "power_watts") * number(step, "step_secs");
        let so_far = number(step, "energy_kwh") * JOULES_PER_KWH;
        assert!(is_near(joules, JOULES) && is_near(so_far, f64::from(i) * JOULES), "step {i}: {joules} J, {so_far} J");
    }
    assert_eq!(with.report["energy_source"], "nvml_energy_counter");
    assert!(is_near(number(&with.report, "energy_kwh"), 5.0 * JOULES / JOULES_PER_KWH), "{}", with.report);
    assert!(with.output.contains("25.0 J, measured: the energy counters of NVML"), "{}", with.output);
    assert_eq!(figures(folder.path(), "with"), figures(folder.path(), "without"), "no number is another");
    let spent = on("spent", &[hardware, &budget, "checkpoint=(every_steps: 100)"], &[counter]);
    assert_eq!((spent.code, spent.steps.len()), (6, 4), "the fourth step is the first past it: {}", spent.output);
    assert!(folder.path().join("runs/spent/checkpoints/step-0000004").is_dir());
}

#[test]
fn power_of_the_moment_is_what_there_is_without_a_counter_and_a_shared_gpu_is_counted_once() {
    let folder = tempfile::tempdir().expect("a folder");
    let driver = folder.path().join("driver");
    fs::create_dir_all(&driver).expect("a folder");
    ptxsim_driver::install_nvml(&driver).expect("the stand-in is built");
    let sets = ["mesh.dp=2", "batch.num_microbatches=2"];
    let ran = run_on_gpu(folder.path(), "shared", &sets, &[("PTXSIM_MILLIWATTS", "300000")]);
    assert_eq!((ran.code, ran.steps.len()), (0, 5), "{}", ran.output);
    for step in &ran.steps {
        assert!(["power_watts", "power_watts/rank0", "power_watts/rank1"].iter().all(|key| number(step, key) == 300.0));
    }
    let secs: f64 = ran.steps.iter().map(|step| number(step, "step_secs")).sum();
    assert!(is_near(number(&ran.report, "energy_kwh"), 300.0 * secs / JOULES_PER_KWH), "{}", ran.report);
    assert_eq!(ran.report["energy_source"], "nvml_power");
    // A GPU that can tell neither is as none.
    let ran = run_on_gpu(folder.path(), "neither", &[], &[]);
    assert_eq!((ran.code, ran.report["energy_source"].is_null()), (0, true), "{}", ran.output);
    assert!(ran.steps.iter().all(|step| step["power_watts"].is_null()), "{:?}", ran.steps);
}
