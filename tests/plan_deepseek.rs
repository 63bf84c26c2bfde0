//! DeepSeek-V3's published training numbers, out of `hadal plan scenes/deepseek_v3.ron`: what is exact, what is within a tenth, and
//! what the plan does not explain.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{path::Path, process::Command};

use serde_json::Value;

fn plan(args: &[&str]) -> (i32, Value, String) {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let ran = Command::new(env!("CARGO_BIN_EXE_hadal"))
        .current_dir(root)
        .arg("plan")
        .args(args)
        .args(["--json", "-"])
        .output()
        .unwrap();
    let stderr = String::from_utf8_lossy(&ran.stderr).into_owned();
    let document = serde_json::from_slice(&ran.stdout).unwrap_or(Value::Null);
    (ran.status.code().unwrap(), document, stderr)
}

#[test]
fn the_published_training_run_is_planned() {
    let (code, plan, stderr) = plan(&["scenes/deepseek_v3.ron"]);
    assert_eq!(code, 0, "{stderr}");
    let number = |key: &str| plan[key].as_f64().unwrap_or_else(|| panic!("no number `{key}` in {plan}"));

    // Counted: README_WEIGHTS, and table 1 of arXiv 2505.09343.
    assert_eq!(number("num_params"), 671_026_419_200.0);
    assert_eq!(number("num_activated_params"), 37_552_297_472.0);
    assert_eq!(number("kv_bytes_per_token"), 70_272.0);
    assert!((number("flops_per_token") / 250.5e9 - 1.0).abs() < 1e-3, "{}", number("flops_per_token"));

    // Predicted from hardware/h800.ron: table 4 of arXiv 2505.09343, table 1 of the DeepSeek-V3 report.
    for (key, published) in [
        ("step_secs", 19.926),
        ("tokens_per_day", 272.80e9),
        ("gpu_hours_per_trillion_tokens", 180.2e3),
        ("cost_usd", 5.328e6),
    ] {
        let error = number(key) / published - 1.0;
        assert!(error.abs() < 0.1, "{key} is {:.4e}, published {published:.4e}: {:+.1}%", number(key), 100.0 * error);
    }

    let bytes = plan["peak_bytes_per_rank"].as_array().unwrap();
    assert_eq!(bytes.len(), 16);
    for rank in bytes {
        let of = |class: &str| rank[class].as_u64().unwrap();
        let sum = ["weights", "gradients", "optimizer", "activations", "communication"].map(of).iter().sum::<u64>();
        assert_eq!(of("total"), sum);
        assert!(sum <= 80_000_000_000, "{rank}");
    }
    let causes = plan["idle_secs_by_cause"].as_object().unwrap();
    let sum: f64 = causes.values().map(|secs| secs.as_f64().unwrap()).sum();
    assert!((sum - number("bubble_secs")).abs() < 1e-6, "causes sum to the idle time");
    let ranks = plan["idle_secs_by_cause_per_rank"].as_array().unwrap();
    let of_rank = |rank: &Value| rank.as_object().unwrap().values().map(|secs| secs.as_f64().unwrap()).sum::<f64>();
    let mean = ranks.iter().map(of_rank).sum::<f64>() / ranks.len() as f64;
    assert!(ranks.len() == 16 && (mean - number("bubble_secs")).abs() < 1e-6, "{mean}");
    assert!((number("bubble_secs") / number("step_secs") - number("idle_fraction")).abs() < 1e-9);
    for key in ["mfu", "energy_kwh"] {
        assert!(number(key) > 0.0, "{key}");
    }
}

#[test]
fn skewed_routing_costs_time_and_has_a_cause() {
    let args = ["scenes/deepseek_v3.ron", "--set", "batch.ramp=[]", "--set", "batch.num_microbatches=4096"];
    let (_, balanced, _) = plan(&args);
    let (_, skewed, stderr) = plan(&[&args[..], &["--load", "zipf:0.3"]].concat());
    let secs = |plan: &Value, key: &str| plan[key].as_f64().unwrap_or_else(|| panic!("{key}: {stderr}"));
    assert!(secs(&skewed, "load_max_over_mean") > 1.2);
    assert!(secs(&skewed, "step_secs") > 1.02 * secs(&balanced, "step_secs"));
    let imbalance = |plan: &Value| plan["idle_secs_by_cause"]["load_imbalance"].as_f64().unwrap();
    assert_eq!(imbalance(&balanced), 0.0);
    assert!(imbalance(&skewed) > 0.0);
}

/// 32 experts on three ranks are 10, 11 and 11: the second one is planned, and the first one waits for it.
#[test]
fn ranks_that_do_not_divide_the_experts_are_planned_by_the_fullest() {
    let on = |ep: u32| {
        let (mesh, microbatches) = (format!("mesh=(ep: {ep})"), format!("batch.num_microbatches={}", 4 * ep));
        let args = ["scenes/quickstart.ron", "--hardware", "scenes/hardware/h100.ron"];
        let sets = [mesh.as_str(), &microbatches, "batch.ramp=[]", "precision.compute=Bf16"];
        let (code, plan, stderr) =
            plan(&args.into_iter().chain(sets.into_iter().flat_map(|set| ["--set", set])).collect::<Vec<_>>());
        assert_eq!(code, 0, "ep {ep}: {stderr}");
        plan
    };
    let [two, three, four] = [2, 3, 4].map(on);
    let bytes = |plan: &Value, class: &str| plan["peak_bytes_per_rank"][0][class].as_i64().unwrap();
    // 16, 11 and 8 experts.
    for class in ["weights", "gradients"] {
        let (all, some) = (bytes(&two, class) - bytes(&four, class), bytes(&three, class) - bytes(&four, class));
        assert!(all > 0 && 8 * some == 3 * all, "{class}: {all} and {some}");
    }
    assert_eq!([&two, &three, &four].map(|plan| bytes(plan, "rank")), [0, 1, 0]);
    // A rank has as many rows of experts whatever their number; the fullest has 11 * 3 / 32 of them.
    let activations = |plan: &Value| bytes(plan, "activations") as f64 / bytes(&four, "activations") as f64;
    assert!((activations(&two) - 1.0).abs() < 1e-3, "{}", activations(&two));
    assert!(activations(&three) > 1.002 && activations(&three) < 33.0 / 32.0, "{}", activations(&three));
    let load = |plan: &Value| plan["load_max_over_mean"].as_f64().unwrap();
    assert!((load(&three) - 33.0 / 32.0).abs() < 1e-12 && load(&two) == 1.0, "{}", load(&three));
    let waits = |plan: &Value| plan["idle_secs_by_cause"]["load_imbalance"].as_f64().unwrap();
    assert!(waits(&three) > 0.0 && waits(&four) == 0.0, "{}", waits(&three));
}

#[test]
fn what_does_not_fit_is_refused_with_what_would() {
    let (code, plan, stderr) = plan(&[
        "scenes/deepseek_v3.ron",
        "--set",
        "recompute=Off",
        "--set",
        "batch.ramp=[]",
        "--set",
        "batch.num_microbatches=4096",
    ]);
    assert_eq!(code, 3);
    assert_eq!(plan["fits"], false);
    assert!(stderr.contains("does not fit: rank") && stderr.contains("a H800 has 74.5 GiB"), "{stderr}");
    assert!(stderr.contains("fits: pp"), "layouts that fit are named: {stderr}");
}

#[test]
fn the_timeline_is_a_trace_whose_bubbles_have_causes() {
    let dir = tempfile::tempdir().unwrap();
    let trace = dir.path().join("plan.json");
    let (code, _, stderr) = plan(&[
        "scenes/pipeline.ron",
        "--hardware",
        "scenes/hardware/h100.ron",
        "--set",
        "precision.compute=Bf16",
        "--trace",
        trace.to_str().unwrap(),
    ]);
    assert_eq!(code, 0, "{stderr}");
    let events: Vec<Value> = serde_json::from_str(&std::fs::read_to_string(&trace).unwrap()).unwrap();
    let ranks: std::collections::BTreeSet<u64> = events.iter().filter_map(|event| event["pid"].as_u64()).collect();
    assert_eq!(ranks.into_iter().collect::<Vec<_>>(), [0, 1, 2, 3]);
    let bubbles: Vec<&Value> = events.iter().filter(|event| event["name"] == "bubble").collect();
    assert!(!bubbles.is_empty() && bubbles.iter().all(|bubble| bubble["args"]["cause"].is_string()));

    // The trace says that it is a plan's, so that nobody takes it for measured.
    let trace = trace.to_str().unwrap();
    let (code, _, stderr) =
        plan(&["scenes/pipeline.ron", "--hardware", "scenes/hardware/h100.ron", "--calibrate", trace]);
    assert_eq!(code, 2, "{stderr}");
    assert!(stderr.contains("expected a trace of a run, found one of a plan"), "{stderr}");
}

#[test]
fn a_search_says_what_it_leaves_out() {
    let scene = ["scenes/tiny.ron", "--hardware", "scenes/hardware/h100.ron", "--search", "2"];
    let sets = ["precision.compute=Bf16", "mesh.pp=2", "batch.num_microbatches=4", "pipeline.schedule=OneFOneB"];
    let args: Vec<&str> = scene.into_iter().chain(sets.iter().flat_map(|set| ["--set", set])).collect();
    let note = "note: the search leaves out `pipeline.stages` of the scene";
    let (code, _, stderr) = plan(&args);
    assert!(code == 0 && !stderr.contains("note:"), "{code} {stderr}");
    let (code, _, stderr) = plan(&[&args[..], &["--set", "pipeline.stages=[2,1]"]].concat());
    assert!(code == 0 && stderr.matches(note).count() == 1, "{code} {stderr}");
}
