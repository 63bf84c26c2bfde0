//! What the tests share: recorded steps that are made the same each time, a source and a workbench that do as they are told.

#![allow(dead_code, reason = "each test uses a part")]

pub mod raster;

use std::{
    collections::VecDeque,
    path::{Path, PathBuf},
    sync::{Arc, Mutex},
    time::Duration,
};

use editor::{
    app::EditorApp,
    source::{Source, SourceEvent, Wake, chrome::kind},
    workbench::{Diagnostic, FormField, FormSection, Opened, PlannedStep, SceneReport, WhatIf, Workbench},
};
use egui_kittest::Harness;
use engine::{
    task::{Pass, Role},
    telemetry::{Snapshot, Span},
};
use serde_json::{Value, json};

/// Layers with experts, and experts of each.
pub const LAYERS: u32 = 4;
pub const EXPERTS: usize = 16;

/// A random number that is the same everywhere.
fn random(seed: u64) -> u64 {
    let x = (seed + 1).wrapping_mul(0x9E37_79B9_7F4A_7C15);
    (x ^ (x >> 29)).wrapping_mul(0xBF58_476D_1CE4_E5B9) >> 33
}

/// One step of two ranks under 1F1B with four microbatches; `pace` is the percentage of the usual time that a pass takes.
pub fn spans(pace: u64) -> Vec<Span> {
    let mut spans: Vec<Span> = Vec::new();
    let mut free = [[0u64; 2]; 2];
    let order = |rank: u32| -> Vec<(Pass, u32)> {
        let (f, i) = (Pass::Forward, Pass::InputGrad);
        if rank == 0 {
            vec![(f, 0), (f, 1), (i, 0), (f, 2), (i, 1), (f, 3), (i, 2), (i, 3)]
        } else {
            vec![(f, 0), (i, 0), (f, 1), (i, 1), (f, 2), (i, 2), (f, 3), (i, 3)]
        }
    };
    let orders = [order(0), order(1)];
    let mut next = [0usize; 2];
    let find = |spans: &[Span], rank: u32, pass: Pass, microbatch: u32, role: Role| {
        spans.iter().position(|s| (s.rank, s.pass, s.microbatch, s.role) == (rank, Some(pass), Some(microbatch), role))
    };
    while next.iter().zip(&orders).any(|(at, order)| *at < order.len()) {
        for rank in 0..2u32 {
            let at = rank as usize;
            let Some(&(pass, microbatch)) = orders[at].get(next[at]) else { continue };
            let other = 1 - rank;
            let needs_other = (rank == 1) == (pass == Pass::Forward);
            let sent = find(&spans, other, pass, microbatch, Role::Compute);
            if needs_other && sent.is_none() {
                continue;
            }
            next[at] += 1;
            let mut span = Span {
                label: format!(
                    "{}, layer {rank}, microbatch {microbatch}",
                    if pass == Pass::Forward { "attention_forward" } else { "attention_input_grad" }
                )
                .into(),
                kind: kind(if pass == Pass::Forward { "attention_forward" } else { "attention_input_grad" }),
                pass: Some(pass),
                stage: rank,
                layer: Some(rank),
                microbatch: Some(microbatch),
                cost: Default::default(),
                rank,
                stream: "compute".into(),
                start_nanos: 0,
                end_nanos: 0,
                waited_for: None,
                role: Role::Compute,
                wait_nanos: 0,
                load: None,
            };
            span.cost.product_flops = 1_000_000;
            let mut start = free[at][0];
            if let Some(sent) = sent.filter(|_| needs_other) {
                let begin = free[at][1].max(spans[sent].end_nanos);
                let mut transfer = Span {
                    label: format!("receive, microbatch {microbatch}").into(),
                    kind: kind("receive"),
                    stream: "comm".into(),
                    role: Role::Receive,
                    start_nanos: begin,
                    end_nanos: begin + 30_000,
                    load: Some((100 + u64::from(rank) * 40, 140)),
                    ..span.clone()
                };
                transfer.cost = Default::default();
                transfer.cost.intra_node_bytes = 1 << 20;
                free[at][1] = transfer.end_nanos;
                start = start.max(transfer.end_nanos);
                span.waited_for = Some(spans.len() as u32);
                spans.push(transfer);
            }
            let nanos = (if pass == Pass::Forward { 100_000 } else { 200_000 }) * pace / 100;
            (span.start_nanos, span.end_nanos) = (start, start + nanos);
            free[at][0] = span.end_nanos;
            spans.push(span);
        }
    }
    spans
}

/// A step of a recorded run.
pub fn snapshot(step: u64) -> Snapshot {
    let spans = spans(100 + random(step) % 7);
    let end = spans.iter().map(|span| span.end_nanos).max().unwrap() + 20_000;
    let mut histograms = Vec::new();
    for layer in 1..=LAYERS {
        let load = |expert: usize| {
            let noise = random(u64::from(layer) * 1000 + expert as u64) % 60;
            let drift = random(step * 77 + u64::from(layer) * 31 + expert as u64) % 25;
            // Layer 2 has a hot expert, layer 3 one that is dead.
            match (layer, expert) {
                (2, 5) => 400.0,
                (3, 7) => 0.0,
                _ => 80.0 + (noise + drift) as f64,
            }
        };
        let loads: Vec<f64> = (0..EXPERTS).map(load).collect();
        let mean = loads.iter().sum::<f64>() / EXPERTS as f64;
        histograms
            .push((format!("bias/layer {layer}"), loads.iter().map(|l| (mean - l) / 1e4 * step as f64).collect()));
        histograms.push((format!("load/layer {layer}"), loads));
    }
    let bytes: Vec<f64> = (0..18).map(|task: i32| f64::from(9 - (task - 9).abs()) * 3e6 + 1e6).collect();
    histograms.push(("bytes/rank0/activations".into(), bytes));
    let x = step as f64;
    let scalars = [
        ("step_secs", end as f64 * 1e-9),
        ("loss_nats_per_token", 3.0 + 5.0 / (1.0 + 0.2 * x)),
        ("grad_norm", 1.0 + 2.0 / (1.0 + x)),
        ("lr", 1e-3 * (x / 10.0).min(1.0)),
        ("tokens_per_sec", 2000.0 + 10.0 * (random(step) % 10) as f64),
        ("max_vio", 2.3 - 0.01 * x),
        ("idle_fraction", 0.2 + 0.001 * (random(step) % 20) as f64),
        ("bytes/rank0/weights", 6e7),
    ];
    Snapshot {
        step,
        interval_nanos: (0, end),
        spans: spans.into(),
        scalars: scalars.map(|(name, value)| (name.to_owned(), value)).into(),
        histograms,
    }
}

/// A step of a model that serves: its forward tasks, and how many requests there were.
pub fn serving(step: u64) -> Snapshot {
    let trained = snapshot(step);
    let tasks = trained.spans.iter().filter(|span| span.rank == 0 && span.pass == Some(Pass::Forward));
    let running = 4.0 + (step % 5) as f64;
    let scalars = [
        ("step_secs", 0.004),
        ("num_running", running),
        ("num_waiting", (step / 6) as f64),
        ("num_preemptions", 3.0),
        ("num_blocks", 64.0),
        ("num_used_blocks", 20.0 + 2.0 * step as f64 % 40.0),
        ("cache_usage", 0.5),
        ("tokens_per_sec", 2000.0 + 100.0 * (random(step) % 10) as f64),
        ("generated_tokens_per_sec", 250.0 * running),
    ];
    Snapshot {
        spans: tasks.map(|task| Span { waited_for: None, ..task.clone() }).collect(),
        scalars: scalars.map(|(name, value)| (name.to_owned(), value)).into(),
        histograms: trained.histograms.into_iter().filter(|(name, _)| name.starts_with("load/")).collect(),
        ..trained
    }
}

/// Requests as a run lists them, in no order.
fn requests() -> Value {
    let request = |id: u64, state: &str, [prompt, computed, generated]: [u64; 3], priority: i64, age_secs: f64| {
        let view = json!({
            "id": id, "priority": priority, "state": state, "num_prompt_tokens": prompt, "num_computed_tokens": computed,
            "num_generated_tokens": generated, "max_new_tokens": 64, "num_blocks": computed.div_ceil(16), "age_secs": age_secs,
        });
        json!({ "entity": 1000 + id, "name": format!("request {id}"), "components": { "Request": view } })
    };
    let list = [
        request(41, "running", [120, 160, 41], 0, 4.25),
        request(38, "running", [31, 90, 60], 0, 9.5),
        request(44, "waiting", [700, 0, 0], 0, 0.35),
        request(42, "preempted", [200, 0, 17], -1, 3.1),
        request(43, "running", [512, 128, 0], 2, 0.8),
        request(45, "waiting", [12, 0, 0], 0, 0.02),
    ];
    json!({ "entities": list, "num_left_out": 0 })
}

/// What a source is told to give, and what it was asked.
#[derive(Default)]
pub struct Script {
    pub events: VecDeque<SourceEvent>,
    pub calls: Vec<(String, Value)>,
}

/// A source that does as it is told, and answers as a run would.
#[derive(Clone, Default)]
pub struct FakeSource(pub Arc<Mutex<Script>>);

impl FakeSource {
    pub fn tell(&self, event: SourceEvent) {
        self.0.lock().unwrap().events.push_back(event);
    }

    pub fn step(&self, step: u64) {
        self.tell(SourceEvent::Snapshot(Arc::new(snapshot(step))));
    }

    /// The same of a model that serves.
    pub fn serves(&self, step: u64) {
        self.tell(SourceEvent::Snapshot(Arc::new(serving(step))));
    }

    pub fn called(&self, method: &str) -> Vec<Value> {
        self.0
            .lock()
            .unwrap()
            .calls
            .iter()
            .filter(|(name, _)| name == method)
            .map(|(_, params)| params.clone())
            .collect()
    }
}

impl Source for FakeSource {
    fn name(&self) -> &str {
        "http://127.0.0.1:7000"
    }

    fn poll(&mut self) -> Vec<SourceEvent> {
        self.0.lock().unwrap().events.drain(..).collect()
    }

    fn call(&mut self, method: &str, params: Value) -> Option<u64> {
        let mut script = self.0.lock().unwrap();
        let id = script.calls.len() as u64 + 1;
        let is_paused = script.calls.iter().rev().find_map(|(name, _)| match name.as_str() {
            "run.pause" | "run.step" => Some(true),
            "run.resume" => Some(false),
            _ => None,
        });
        let result = match method {
            "run.status" => {
                json!({ "name": "fake", "state": if is_paused == Some(true) { "paused" } else { "running" } })
            }
            "run.values" => json!([{ "path": "lr", "value": 0.001 }]),
            "world.list" => json!([
                { "entity": 1, "name": "rank 0", "components": ["Rank"], "parent": null },
                { "entity": 2, "name": "layer 1", "components": ["Layer"], "parent": 1 },
                { "entity": 3, "name": "expert 7", "components": ["ExpertKey", "ExpertLoad"], "parent": 2 },
            ]),
            "world.query" => requests(),
            "world.get" => {
                json!({ "entity": params["entity"], "components": { "ExpertLoad": 12, "ExpertKey": { "layer": 1, "expert": 7 } } })
            }
            _ => json!({}),
        };
        script.calls.push((method.to_owned(), params));
        script.events.push_back(SourceEvent::Reply { id, result: Ok(result) });
        Some(id)
    }
}

/// A workbench for scenes of one line: `wrong` is wrong, and DualPipe is twice as fast as 1F1B.
#[derive(Default)]
pub struct FakeBench {
    /// Given out by `open` and `run`, in order.
    pub sources: Mutex<VecDeque<FakeSource>>,
}

impl Workbench for FakeBench {
    fn check(&self, _: Option<&Path>, text: &str) -> SceneReport {
        let schedule = text.split("schedule: ").nth(1).and_then(|rest| rest.split([')', ',']).next()).unwrap_or("");
        let form = vec![FormSection {
            name: "pipeline".into(),
            fields: vec![FormField {
                path: "pipeline.schedule".into(),
                value: schedule.into(),
                written_at: None,
                choices: vec!["OneFOneB".into(), "DualPipe".into()],
            }],
        }];
        let diagnostics = text.find("wrong").map(|at| Diagnostic {
            line: text[..at].matches('\n').count() + 1,
            column: at - text[..at].rfind('\n').map_or(0, |newline| newline + 1) + 1,
            length: 5,
            message: "unknown field `wrong`".into(),
            help: Some("there is `right`".into()),
        });
        SceneReport { diagnostics: diagnostics.into_iter().collect(), form }
    }

    fn set(&self, text: &str, field: &str, value: &str) -> Result<String, String> {
        assert_eq!(field, "pipeline.schedule");
        let (before, after) = text.split_once("schedule: ").ok_or("no schedule")?;
        let end = after.find(')').ok_or("no end")?;
        Ok(format!("{before}schedule: {value}{}", &after[end..]))
    }

    fn plan(&self, _: Option<&Path>, text: &str, what_if: &WhatIf) -> Result<PlannedStep, Vec<Diagnostic>> {
        let mut pace = if text.contains("DualPipe") { 50 } else { 100 };
        pace += if what_if.is_balanced { 0 } else { 10 } + what_if.node_limit.unwrap_or(0) as u64;
        let spans = spans(pace);
        let end = spans.iter().map(|span| span.end_nanos).max().unwrap();
        let scalars =
            vec![("step_secs".into(), end as f64 * 1e-9), ("idle_fraction".into(), 0.25), ("run_secs".into(), 5000.0)];
        let snapshot = Snapshot { interval_nanos: (0, end), spans: spans.into(), scalars, ..Snapshot::default() };
        Ok(PlannedStep { snapshot: snapshot.into(), notes: vec!["a note of the plan".into()] })
    }

    fn run(&self, _: Option<&Path>, _: &str, _: bool, _: Wake) -> Result<Box<dyn Source>, String> {
        let source = self.sources.lock().unwrap().pop_front().ok_or("no run was prepared")?;
        Ok(Box::new(source))
    }

    fn open(&self, target: &str, _: Wake) -> Result<Opened, String> {
        if target.ends_with(".ron") {
            let text = "(\n    // A small scene.\n    pipeline: (schedule: OneFOneB),\n)\n".to_owned();
            return Ok(Opened::Scene { path: PathBuf::from(target), text });
        }
        let source = self.sources.lock().unwrap().pop_front();
        source.map(|source| Opened::Source(Box::new(source))).ok_or_else(|| format!("{target}: there is none"))
    }
}

/// An editor without a window.
pub fn editor(size: [f32; 2], theme: egui::Theme, bench: FakeBench) -> Harness<'static, EditorApp> {
    editor_with(size, 1.0, theme, bench, raster::Textures::default())
}

/// The same, with its textures kept for pictures.
pub fn editor_with(
    size: [f32; 2],
    scale: f32,
    theme: egui::Theme,
    bench: FakeBench,
    textures: raster::Textures,
) -> Harness<'static, EditorApp> {
    let picker = Arc::new(|_| Some(PathBuf::from("picked.ron")));
    Harness::builder()
        .with_size(size)
        .with_pixels_per_point(scale)
        .with_theme(theme)
        .with_max_steps(12)
        .renderer(textures)
        .build_eframe(|cc| EditorApp::new(&cc.egui_ctx, None, Arc::new(bench), picker))
}

/// An editor that follows a run which told of so many steps, with a scene open beside it.
pub fn recorded(size: [f32; 2], theme: egui::Theme, num_steps: u64) -> (Harness<'static, EditorApp>, FakeSource) {
    let source = FakeSource::default();
    source.tell(SourceEvent::Connected("fake".into()));
    (1..=num_steps).for_each(|step| source.step(step));
    let mut harness = editor(size, theme, FakeBench::default());
    harness.state_mut().desk.attach(Box::new(source.clone()), false);
    settle(&mut harness, |app| app.desk.now().is_some_and(|now| now.step == num_steps));
    (harness, source)
}

/// Frames until something holds; what is done on other threads takes time.
pub fn settle(harness: &mut Harness<'static, EditorApp>, holds: impl Fn(&EditorApp) -> bool) {
    for _ in 0..500 {
        harness.step();
        if holds(harness.state()) {
            harness.step();
            harness.step();
            return;
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    panic!("it did not come to be: {}", harness.state().desk.message);
}
