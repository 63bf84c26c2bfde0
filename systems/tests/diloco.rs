//! Replicas that train apart: the outer step against histories that were computed elsewhere, and whole runs: what is the same as without,
//! what an absence, an interrupt and another number of replicas do, and what crosses.
#![expect(clippy::unwrap_used, clippy::panic, reason = "tests")]

use std::{
    collections::BTreeMap,
    path::{Path, PathBuf},
    sync::{Arc, atomic::AtomicUsize},
};

use engine::{
    control,
    log::{self, Line},
    tensor_file::TensorFile,
};
use half::bf16;
use kernels::{
    comm::{Coding, Comm},
    device::Device,
    memory::Memory,
    ops::outer::{self, Crossing, Nesterov, Pieces, Slots},
    stream::Stream,
};
use serde::Deserialize;
use systems::{
    api::{RunReport, RunRequest},
    local::Silent,
    params::{ParamKind, param_specs},
    run::run,
    scene::Scene,
};

#[derive(Deserialize)]
struct History {
    number: u64,
    coding: String,
    lr: f64,
    momentum: f64,
    len: usize,
    rounds: Vec<Round>,
}

#[derive(Deserialize)]
struct Round {
    present: Vec<u32>,
    theta: Vec<u32>,
    v: Vec<u32>,
}

/// From -0.5 to 0.5, exact in f32; as `golden/make_outer_steps.py` has it.
fn noise(k: u64) -> f64 {
    f64::from((k.wrapping_mul(2_654_435_761) as u32) >> 8) / f64::from(1 << 24) - 0.5
}

fn bits(memory: &Memory, x: kernels::tensor::Tensor) -> Vec<u32> {
    memory.download::<f32>(x).iter().map(|x| x.to_bits()).collect()
}

/// One replica's part in a history, in which it leaves and joins as that says; its theta and momentum after each round that it is in.
fn replay(history: &History, comm: &Comm) -> Vec<Option<(Vec<u32>, Vec<u32>)>> {
    let (coding, crossing) = match history.coding.as_str() {
        "F32" => (Coding::F32, Crossing::Parameters),
        "Bf16" => (Coding::Bf16, Crossing::PseudoGradient),
        "Int8" => (Coding::Int8, Crossing::PseudoGradient),
        other => panic!("a coding `{other}`"),
    };
    let memory = Memory::new(Device::Cpu);
    let mut s = Stream::new("replica", &memory, &Arc::default()).unwrap();
    let (len, me) = (history.len, comm.rank());
    let tensor = |f: &dyn Fn(usize) -> f32| memory.from_slice(&[len], &(0..len).map(f).collect::<Vec<f32>>());
    let slots = Slots {
        theta: tensor(&|i| (noise((history.number << 20) + i as u64) / 8.0) as f32),
        v: tensor(&|_| 0.0),
        crossing: tensor(&|_| 0.0),
        local: tensor(&|_| 0.0),
        weight: None,
    };
    let pieces = Pieces { ranges: std::iter::once(0..len).collect(), squares: memory.from_slice(&[1], &[0f64]) };
    let hyper = Nesterov { lr: history.lr, momentum: history.momentum };
    let mut found = Vec::new();
    for (r, round) in (0..).zip(&history.rounds) {
        let group: Arc<[u32]> = round.present.clone().into();
        let is_there = group.contains(&me);
        if is_there {
            let theta = memory.download::<f32>(slots.theta);
            let key = (history.number << 20) + ((1 + r * 4 + u64::from(me)) << 12);
            let moved = |i: usize| noise(key + i as u64) / f64::from(1 << (4 + i % 7));
            let local = |i: usize| (f64::from(theta[i]) + moved(i)) as f32;
            memory.upload(slots.local, &(0..len).map(local).collect::<Vec<f32>>());
            outer::bring(&mut s, slots, crossing, &pieces).unwrap();
            comm.all_reduce_mean(&mut s, &group, slots.crossing, coding, 1).unwrap();
            outer::step(&mut s, hyper, slots, crossing, &pieces).unwrap();
        }
        // Who joins the next round is sent what the others have.
        for &joins in history.rounds.get(r as usize + 1).iter().flat_map(|next| &next.present) {
            if round.present.contains(&joins) {
                continue;
            }
            for tensor in [slots.theta, slots.v] {
                match me {
                    0 => comm.send(&mut s, tensor, joins, 2).unwrap(),
                    _ if me == joins => comm.receive(&mut s, tensor, 0, 2).unwrap(),
                    _ => {}
                }
            }
        }
        s.synchronize().unwrap();
        found.push(is_there.then(|| (bits(&memory, slots.theta), bits(&memory, slots.v))));
    }
    found
}

#[test]
fn outer_steps_have_the_history_that_was_computed_elsewhere() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/golden/outer_steps.json");
    let histories: Vec<History> = serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap();
    assert_eq!(histories.len(), 4);
    for history in &histories {
        let ends = Comm::local(3, 1);
        let found: Vec<_> = std::thread::scope(|scope| {
            let replicas: Vec<_> = ends
                .iter()
                .map(|comm| {
                    let name = format!("replica {}", comm.rank());
                    std::thread::Builder::new().name(name).spawn_scoped(scope, || replay(history, comm)).unwrap()
                })
                .collect();
            replicas.into_iter().map(|replica| replica.join().unwrap()).collect()
        });
        for (r, round) in history.rounds.iter().enumerate() {
            for replica in 0..3u32 {
                let name = format!("{} of {}, round {r}, replica {replica}", history.coding, history.len);
                match &found[replica as usize][r] {
                    None => assert!(!round.present.contains(&replica), "{name}"),
                    Some((theta, v)) => {
                        assert!(*theta == round.theta, "theta, {name}");
                        assert!(*v == round.v, "momentum, {name}");
                    }
                }
            }
        }
    }
}

/// A run of `scenes/tiny.ron` in `dir`, with values set over some of all these runs.
fn tiny(dir: &Path, resume: bool, sets: &[&str]) -> RunReport {
    asked(dir, resume, sets, &[])
}

/// The same, asked for these methods before its first step, each with a replica.
fn asked(dir: &Path, resume: bool, sets: &[&str], methods: &[(&str, u32)]) -> RunReport {
    let scene = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scenes/tiny.ron");
    let here = format!("telemetry.dir={:?}", dir.to_str().unwrap());
    let common = [
        here.as_str(),
        "telemetry.trace_steps=None",
        "sample=None",
        "eval=None",
        "batch=(microbatch_sequences: 2, num_microbatches: 4)",
        "schedule=Constant(lr: 3e-3)",
        "routing.bias_warm_down_steps=0",
    ];
    let sets: Vec<String> = common.iter().chain(sets).map(|set| (*set).to_owned()).collect();
    let loaded = Scene::load(&scene, &sets).unwrap();
    let problems = loaded.scene.check(Path::new(""));
    assert!(problems.is_empty(), "{problems:?}");
    let stop = Arc::new(AtomicUsize::new(0));
    let (handle, inbox) = control::channel();
    let answers: Vec<_> = methods
        .iter()
        .map(|(method, replica)| handle.call(*method, serde_json::json!({ "replica": replica })))
        .collect();
    let control = Some((handle, inbox));
    let report = run(RunRequest { loaded, resume, stop, progress: Arc::new(Silent), control, comm: None }).unwrap();
    for (answer, (method, replica)) in answers.iter().zip(methods) {
        let answer = answer.recv().unwrap();
        assert_eq!(answer.is_ok(), *replica > 0, "{method}: {answer:?}");
    }
    assert_eq!(report.exit_code, 0, "{}", report.exit_reason);
    report
}

/// Tensors of the newest checkpoint as f32, which holds bf16, by kind of file and name; those that are in pieces are put together.
fn checkpoint(dir: &Path) -> BTreeMap<String, Vec<f32>> {
    let folder = dir.join("tiny/latest");
    let mut pieces: BTreeMap<String, BTreeMap<usize, Vec<f32>>> = BTreeMap::new();
    for part in ["", "train/"] {
        for entry in folder.join(part).read_dir().unwrap() {
            let path = entry.unwrap().path();
            let file_name = path.file_name().unwrap().to_str().unwrap();
            let Some(stem) = file_name.strip_suffix(".safetensors") else { continue };
            let kind = stem.split('-').next().unwrap();
            let file = TensorFile::read(&path).unwrap();
            for tensor in file.names() {
                let dims = file.dims(tensor).unwrap().to_vec();
                let narrow = || file.get::<bf16>(tensor, &dims).unwrap().into_iter().map(bf16::to_f32).collect();
                let values = file.get::<f32>(tensor, &dims).unwrap_or_else(|_| narrow());
                let (name, start) = tensor.rsplit_once('@').unwrap_or((tensor, "0"));
                let whole = pieces.entry(format!("{part}{kind}.safetensors {name}")).or_default();
                assert!(whole.insert(start.parse().unwrap(), values).is_none(), "{file_name}: {tensor} twice");
            }
        }
    }
    let whole = |(name, pieces): (String, BTreeMap<usize, Vec<f32>>)| {
        let mut values = Vec::new();
        for (start, piece) in pieces {
            assert_eq!(start, values.len(), "{name} has no gap");
            values.extend(piece);
        }
        (name, values)
    };
    pieces.into_iter().map(whole).collect()
}

fn assert_same(a: &BTreeMap<String, Vec<f32>>, b: &BTreeMap<String, Vec<f32>>, what: &str) {
    assert!(a.keys().eq(b.keys()), "{what}: the same tensors");
    for (name, values) in a {
        assert!(values.iter().map(|x| x.to_bits()).eq(b[name].iter().map(|x| x.to_bits())), "{what}: {name}");
    }
}

fn lines(dir: &Path) -> Vec<Line> {
    log::read(&dir.join("tiny/log.jsonl")).unwrap()
}

fn losses(dir: &Path) -> Vec<(u64, f64)> {
    lines(dir).iter().filter_map(|line| Some((line.step, line.scalar("loss_nats_per_token")?))).collect()
}

#[test]
fn one_replica_that_meets_itself_each_step_trains_as_without() {
    for compute in ["F32", "Bf16"] {
        let (plain, meets) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let precision = format!("precision.compute={compute}");
        let sets = ["train.steps=5", "checkpoint.every_steps=5", &precision];
        tiny(plain.path(), false, &sets);
        let diloco = "diloco=(replicas: 1, inner_steps: 1, outer: Nesterov(lr: 1.0, momentum: 0.0))";
        tiny(meets.path(), false, &[&sets[..], &[diloco]].concat());
        assert_eq!(losses(plain.path()), losses(meets.path()));
        let mut found = checkpoint(meets.path());
        found.retain(|name, _| !name.contains("diloco"));
        assert_same(&checkpoint(plain.path()), &found, compute);
    }
}

/// At the end of a round every replica that was there has theta's weights.
fn assert_all_have_theta(found: &BTreeMap<String, Vec<f32>>, replicas: &[u32]) {
    let theta = |name: &str| &found[&format!("train/diloco.safetensors {name}.theta")];
    let names: Vec<&str> = found
        .keys()
        .filter_map(|name| name.strip_prefix("train/diloco.safetensors ")?.strip_suffix(".theta"))
        .collect();
    assert!(names.len() > 30, "{names:?}");
    for name in names {
        for replica in replicas {
            let local = &found[&format!("train/diloco.safetensors replica{replica}.{name}.local")];
            assert!(local == theta(name), "{name} of replica {replica}");
        }
        if let Some(first) = found.get(&format!("model.safetensors {name}")) {
            assert!(first == theta(name), "{name} of the first replica");
        }
    }
}

const THREE: &str = "diloco=(replicas: 4, inner_steps: 3, absent: [(replica: 2, rounds: (start: 1, count: 1)),
    (replica: 1, rounds: (start: 0, count: 2)), (replica: 3, rounds: (start: 2, count: 9))])";

#[test]
fn replicas_leave_and_join_and_all_that_are_there_have_the_same() {
    let dir = tempfile::tempdir().unwrap();
    let report =
        tiny(dir.path(), false, &["train.steps=9", "checkpoint.every_steps=9", THREE, "eval=(every_steps: 3)"]);
    assert!(report.val_loss_nats_per_token.is_some());
    assert_all_have_theta(&checkpoint(dir.path()), &[1, 2]);
    let lines = lines(dir.path());
    let trained: Vec<&Line> = lines.iter().filter(|line| line.scalar("loss_nats_per_token").is_some()).collect();
    assert_eq!(trained.len(), 9);
    let there: Vec<_> =
        trained.iter().filter_map(|line| Some((line.step, line.scalar("outer/num_replicas")?))).collect();
    assert_eq!(there, [(3, 3.0), (6, 2.0), (9, 3.0)]);
    // So many targets as those that are there see: 4 sequences of 2 for each, less those that have none.
    let tokens: Vec<f64> = trained.iter().map(|line| line.scalar("num_tokens").unwrap()).collect();
    let per_step: Vec<f64> = std::iter::once(tokens[0]).chain(tokens.windows(2).map(|w| w[1] - w[0])).collect();
    for (step, tokens) in per_step.iter().enumerate() {
        let replicas = there[step / 3].1;
        assert!((tokens / replicas - 126.0).abs() < 3.0, "step {step}: {tokens} targets of {replicas} replicas");
    }
    let val: Vec<f64> = lines.iter().filter_map(|line| line.scalar("val_loss_nats_per_token")).collect();
    assert!(val.len() == 3 && val[2] < val[0], "{val:?}");
}

#[test]
fn a_run_that_is_stopped_within_a_round_goes_on_with_its_bits() {
    // Under Muon a rank may have no part of a matrix.
    let (adamw, muon) = ("optimizer=AdamW(beta1: 0.9)", "optimizer=Muon(momentum: 0.95)");
    let cases =
        [("None", "mesh=(ep: 1)", adamw), ("Int8", "mesh=(ep: 1, dp: 2)", muon), ("Bf16", "mesh=(ep: 2)", adamw)];
    for (compress, mesh, optimizer) in cases {
        let (whole, parts) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let diloco = format!(
            "diloco=(replicas: 2, inner_steps: 3, compress: {compress}, absent: [(replica: 1, rounds: (start: 1, count: 1))])"
        );
        tiny(whole.path(), false, &["train.steps=11", "checkpoint.every_steps=100", mesh, optimizer, &diloco]);
        // Saved after 4 steps and 8, where rounds end after 3, 6, 9 and 11; what was saved later is lost.
        let sets = ["train.steps=11", "checkpoint=(every_steps: 4, keep_last: 5)", mesh, optimizer, &diloco];
        tiny(parts.path(), false, &sets);
        for lost in [&["step-0000011"][..], &["step-0000008", "step-0000011"]] {
            for name in lost {
                std::fs::remove_dir_all(parts.path().join("tiny/checkpoints").join(name)).unwrap();
            }
            tiny(parts.path(), true, &sets);
            assert_eq!(losses(whole.path()), losses(parts.path()), "{compress} {mesh}");
            assert_same(&checkpoint(whole.path()), &checkpoint(parts.path()), compress);
        }
    }
}

#[test]
fn a_run_goes_on_with_more_replicas_and_with_fewer() {
    let dir = tempfile::tempdir().unwrap();
    let sets = |replicas: u32, steps: u64| {
        [
            format!("diloco=(replicas: {replicas}, inner_steps: 3)"),
            format!("train.steps={steps}"),
            "checkpoint.every_steps=100".to_owned(),
        ]
    };
    let run = |replicas, steps| {
        let sets = sets(replicas, steps);
        tiny(dir.path(), steps > 4, &sets.iter().map(String::as_str).collect::<Vec<_>>())
    };
    run(2, 4);
    run(4, 9);
    assert_all_have_theta(&checkpoint(dir.path()), &[1, 2, 3]);
    run(1, 12);
    let without = ["train.steps=13", "checkpoint.every_steps=100"];
    tiny(dir.path(), true, &without);
    run(2, 16);
    assert_all_have_theta(&checkpoint(dir.path()), &[1]);
    let losses = losses(dir.path());
    assert_eq!(losses.len(), 16);
    assert!(losses[15].1 < losses[0].1 - 0.3, "{losses:?}");
}

#[test]
fn a_replica_leaves_and_joins_when_it_is_asked_to() {
    let dir = tempfile::tempdir().unwrap();
    let sets = |steps: &'static str| ["diloco=(replicas: 4, inner_steps: 2)", "checkpoint.every_steps=100", steps];
    // It is settled already who is in the first round, and the first replica does not go.
    let leave = [("diloco.leave", 1), ("diloco.leave", 2), ("diloco.leave", 0)];
    asked(dir.path(), false, &sets("train.steps=4"), &leave);
    // What was asked for stays, also when the run goes on: one is asked to come back, the other is not.
    asked(dir.path(), true, &sets("train.steps=8"), &[("diloco.join", 2)]);
    let replicas: Vec<f64> = lines(dir.path()).iter().filter_map(|line| line.scalar("outer/num_replicas")).collect();
    assert_eq!(replicas, [4.0, 2.0, 2.0, 3.0]);
    assert_all_have_theta(&checkpoint(dir.path()), &[2, 3]);
}

#[test]
fn what_crosses_is_counted_and_a_hundredth_of_what_gradients_are() {
    let loaded = Scene::load(&PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../scenes/tiny.ron"), &[]).unwrap();
    let config = loaded.scene.model.as_ref().unwrap().resolve().unwrap();
    let specs = param_specs(&config);
    let trained: usize = specs.iter().filter(|s| s.kind != ParamKind::ExpertBias).map(|s| s.num_elements()).sum();
    let biases: usize = specs.iter().filter(|s| s.kind == ParamKind::ExpertBias).map(|s| s.num_elements()).sum();
    let bytes_of = |diloco: &str, mesh: &str| {
        let dir = tempfile::tempdir().unwrap();
        tiny(dir.path(), false, &["train.steps=4", "checkpoint=None", mesh, diloco]);
        lines(dir.path())
    };
    let sum = |lines: &[Line], name: &str| lines.iter().filter_map(|line| line.scalar(name)).sum::<f64>();
    let plain = bytes_of("diloco=None", "mesh=(dp: 4, ranks_per_node: 1)");
    let gradients = sum(&plain, "link_bytes/reduce/inter_node") / 4.0;
    for (compress, bytes) in [("None", 4.0), ("Bf16", 2.0), ("Int8", 1.0 + 4.0 / 256.0)] {
        let diloco = format!("diloco=(replicas: 4, inner_steps: 2, compress: {compress})");
        let lines = bytes_of(&diloco, "mesh=(dp: 1, ranks_per_node: 1)");
        assert_eq!(sum(&lines, "link_bytes/reduce/inter_node"), 0.0, "gradients stay within their replica");
        let per_round = sum(&lines, "outer/sent_inter_node_bytes") / 2.0;
        assert_eq!(sum(&lines, "outer/sent_intra_node_bytes"), 0.0);
        assert!(sum(&lines, "outer/told_bytes") > 0.0, "figures are counted, too");
        // There and back, from each of 4 to 3 others, a quarter of all.
        let want = 2.0 * 3.0 * (bytes * trained as f64 + 4.0 * biases as f64);
        assert!((per_round / want - 1.0).abs() < 0.02, "{compress}: {per_round} bytes, expected {want}");
        assert!(
            per_round <= 1.001 * gradients * bytes / 4.0 * 1.02,
            "{compress}: {per_round}, of gradients {gradients}"
        );
    }
}

#[test]
fn how_far_experts_came_is_told() {
    let dir = tempfile::tempdir().unwrap();
    let diloco = "diloco=(replicas: 2, inner_steps: 2, absent: [(replica: 1, rounds: (start: 1, count: 1))])";
    // Experts over two ranks, and what is theirs over two more.
    tiny(dir.path(), false, &["train.steps=4", "checkpoint=None", "mesh=(ep: 2, dp: 1)", diloco]);
    let lines = lines(dir.path());
    let norms = |step: u64, name: &str| -> Option<Vec<f64>> {
        let line = lines.iter().find(|line| line.step == step && line.scalar("lr").is_some()).unwrap();
        let values = line.fields.get(name)?.as_array()?;
        Some(values.iter().map(|x| x.as_f64().unwrap()).collect())
    };
    for layer in [1, 2, 3] {
        for of in ["", "replica0/", "replica1/"] {
            let norms = norms(2, &format!("pseudo_gradient/{of}layer {layer}")).unwrap();
            assert!(norms.len() == 8 && norms.iter().all(|norm| *norm > 0.0), "{of} layer {layer}: {norms:?}");
        }
    }
    assert!(norms(1, "pseudo_gradient/layer 1").is_none(), "within a round there is nothing to tell");
    assert!(norms(4, "pseudo_gradient/replica1/layer 1").is_none(), "who is away brings nothing");
    // A mean is at most as long as the mean of lengths; of one replica it is that replica's.
    let at = |step: u64, name: &str| lines.iter().find(|l| l.step == step).unwrap().scalar(name).unwrap();
    let (mean, first, second) = (at(2, "outer/norm"), at(2, "outer/replica0/norm"), at(2, "outer/replica1/norm"));
    assert!(mean > 0.3 * first && mean <= 0.5 * (first + second), "{mean}, of {first} and {second}");
    assert!((at(4, "outer/norm") - at(4, "outer/replica0/norm")).abs() < 1e-5);
    for kind in ["embedding", "head", "norm", "linear", "gate", "expert"] {
        assert!(at(2, &format!("outer/norm/{kind}")) > 0.0, "{kind}");
    }
    assert_eq!(at(2, "outer/num_still_experts"), 0.0);
}
