//! What a frame costs on the CPU, tessellation included: a step of 100,000 tasks and 58 layers of 256 experts, all in view; and
//! what the window costs when nothing changes. One core, no GPU, no display.
//!
//!     cargo run --release -p editor --example bench_frame

#![expect(clippy::print_stdout, reason = "a benchmark says what it measured")]

use std::{path::Path, path::PathBuf, sync::Arc};

use editor::{
    app::EditorApp,
    source::{Source, SourceEvent, Wake, chrome::kind},
    workbench::{Diagnostic, Opened, PlannedStep, SceneReport, WhatIf, Workbench},
};
use eframe::App as _;
use egui::{Context, Event, Modifiers, Pos2, RawInput, Rect, vec2};
use engine::{
    task::{Pass, Role},
    telemetry::{Snapshot, Span},
};
use kernels::clock::now_nanos;
use serde_json::Value;

const NUM_SPANS: usize = 100_000;
const NUM_RANKS: u32 = 16;
const LAYERS: u32 = 58;
const EXPERTS: usize = 256;
const FRAMES: usize = 120;
/// A frame at 60 Hz.
const GOAL_MILLIS: f64 = 16.7;
/// Share of a core when nothing changes.
const GOAL_IDLE: f64 = 0.02;

struct Recorded(Vec<SourceEvent>);

impl Source for Recorded {
    fn name(&self) -> &str {
        "recorded"
    }

    fn poll(&mut self) -> Vec<SourceEvent> {
        std::mem::take(&mut self.0)
    }

    fn call(&mut self, _: &str, _: Value) -> Option<u64> {
        None
    }
}

struct NoBench;

impl Workbench for NoBench {
    fn check(&self, _: Option<&Path>, _: &str) -> SceneReport {
        SceneReport::default()
    }

    fn set(&self, _: &str, _: &str, _: &str) -> Result<String, String> {
        Err("no scenes here".into())
    }

    fn plan(&self, _: Option<&Path>, _: &str, _: &WhatIf) -> Result<PlannedStep, Vec<Diagnostic>> {
        Err(vec![Diagnostic::anywhere("no plans here")])
    }

    fn run(&self, _: Option<&Path>, _: &str, _: bool, _: Wake) -> Result<Box<dyn Source>, String> {
        Err("no runs here".into())
    }

    fn open(&self, _: &str, _: Wake) -> Result<Opened, String> {
        Err("no files here".into())
    }
}

/// Streams that compute and that transfer, on each rank, with small gaps.
fn step(number: u64) -> Snapshot {
    let mut seed = number * 7919 + 1;
    let mut random = move || {
        seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        seed >> 40
    };
    let mut spans = Vec::with_capacity(NUM_SPANS);
    let mut free = vec![[0u64; 2]; NUM_RANKS as usize];
    for i in 0..NUM_SPANS {
        let (rank, lane) = (i as u32 / 2 % NUM_RANKS, i % 2);
        let pass = [Pass::Forward, Pass::InputGrad, Pass::WeightGrad][random() as usize % 3];
        let start = free[rank as usize][lane] + random() % 900;
        let end = start + 500 + random() % 6000;
        free[rank as usize][lane] = end;
        spans.push(Span {
            label: "task".into(),
            kind: kind(["attention", "experts", "dispatch", "combine"][random() as usize % 4]),
            pass: Some(pass),
            stage: rank,
            layer: Some(i as u32 % LAYERS),
            microbatch: Some(i as u32 / 4096),
            cost: Default::default(),
            rank,
            stream: if lane == 0 { "compute".into() } else { "comm".into() },
            start_nanos: start,
            end_nanos: end,
            waited_for: (i > 40).then_some(i as u32 - 33),
            role: if lane == 0 { Role::Compute } else { Role::Collective },
            wait_nanos: 0,
            load: None,
        });
    }
    let end = free.iter().flatten().copied().max().unwrap_or(0);
    let loads = |layer| (format!("load/layer {layer}"), (0..EXPERTS).map(|_| (random() % 100) as f64 + 50.0).collect());
    let histograms = (3..3 + LAYERS).map(loads).collect();
    let scalars = ["loss_nats_per_token", "grad_norm", "lr", "tokens_per_sec", "max_vio", "idle_fraction"]
        .map(|name| (name.to_owned(), 1.0 + (number as f64).sin().abs()));
    Snapshot { step: number, interval_nanos: (0, end), spans: spans.into(), scalars: scalars.into(), histograms }
}

/// Nanoseconds that this thread has run, told in steps of some milliseconds: what others do on the machine does not count. Wall
/// time where Linux does not tell.
fn thread_nanos() -> u64 {
    let stat = std::fs::read_to_string("/proc/thread-self/schedstat").ok();
    let told = stat.and_then(|stat| stat.split_whitespace().next()?.parse().ok()).filter(|nanos| *nanos > 0);
    told.unwrap_or_else(now_nanos)
}

/// Milliseconds of the UI pass and of tessellation.
fn frame(ctx: &Context, app: &mut EditorApp, eframe: &mut eframe::Frame, events: Vec<Event>, at: f64) -> (f64, f64) {
    let input = RawInput {
        screen_rect: Some(Rect::from_min_size(Pos2::ZERO, vec2(1600.0, 900.0))),
        time: Some(at),
        events,
        ..RawInput::default()
    };
    let begin = now_nanos();
    app.logic(ctx, eframe);
    let output = ctx.run_ui(input, |ui| app.ui(ui, eframe));
    let middle = now_nanos();
    let primitives = ctx.tessellate(output.shapes.clone(), 1.0);
    let end = now_nanos();
    assert!(!primitives.is_empty(), "nothing was drawn");
    output.drop_without_applying_deltas();
    ((middle - begin) as f64 * 1e-6, (end - middle) as f64 * 1e-6)
}

fn median(mut values: Vec<f64>) -> (f64, f64) {
    values.sort_by(f64::total_cmp);
    (values[values.len() / 2], values[values.len() * 95 / 100])
}

/// Seconds of CPU that this process has used.
fn cpu_secs() -> f64 {
    let stat = std::fs::read_to_string("/proc/self/stat").unwrap_or_default();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap_or_default().split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).unwrap_or(0.0);
    (ticks(11) + ticks(12)) / 100.0
}

fn main() {
    let ctx = Context::default();
    let mut eframe = eframe::Frame::_new_kittest();
    let picker = Arc::new(|_| None::<PathBuf>);
    let mut app = EditorApp::new(&ctx, None, Arc::new(NoBench), picker);
    let steps: Vec<SourceEvent> = (1..=3).map(|number| SourceEvent::Snapshot(Arc::new(step(number)))).collect();
    app.desk.attach(Box::new(Recorded(steps)), false);
    let mut at = 0.0;
    let mut next = |events: Vec<Event>, app: &mut EditorApp| {
        at += 1.0 / 60.0;
        frame(&ctx, app, &mut eframe, events, at)
    };
    let first = next(Vec::new(), &mut app);
    println!("{NUM_SPANS} tasks on {} lanes, {LAYERS} x {EXPERTS} experts, 1600 x 900 points", 2 * NUM_RANKS);
    println!("first frame of a step:  {:6.2} ms", first.0 + first.1);

    let tell = |name: &str, goal: Option<f64>, begin: u64, frames: Vec<(f64, f64)>| {
        let cpu = (thread_nanos() - begin) as f64 * 1e-6 / frames.len() as f64;
        let (ui, _) = median(frames.iter().map(|frame| frame.0).collect());
        let (tessellation, _) = median(frames.iter().map(|frame| frame.1).collect());
        let (all, _) = median(frames.iter().map(|frame| frame.0 + frame.1).collect());
        let is_fast = goal.is_none_or(|goal| cpu < goal);
        let verdict = match goal {
            Some(_) if is_fast => "ok",
            Some(_) => "TOO SLOW",
            None => "(once a step)",
        };
        println!(
            "{name:22}  {cpu:6.2} ms of CPU a frame  {verdict}; by the wall {all:.2}: UI {ui:.2}, tessellation {tessellation:.2}"
        );
        is_fast
    };
    for _ in 0..5 {
        next(Vec::new(), &mut app);
    }
    let begin = thread_nanos();
    let whole = (0..FRAMES).map(|_| next(Vec::new(), &mut app)).collect();
    let mut is_fast = tell("the whole step:", Some(GOAL_MILLIS), begin, whole);
    let pointer = |i: usize| Event::PointerMoved(Pos2::new(300.0 + 3.0 * (i % 100) as f32, 260.0));
    let begin = thread_nanos();
    let hovered = (0..FRAMES).map(|i| next(vec![pointer(i)], &mut app)).collect();
    is_fast &= tell("under the pointer:", Some(GOAL_MILLIS), begin, hovered);
    let begin = thread_nanos();
    let zoomed = (0..FRAMES)
        .map(|i| next(vec![pointer(i), Event::Zoom(if i < FRAMES / 2 { 1.08 } else { 1.0 / 1.08 })], &mut app))
        .collect();
    is_fast &= tell("zooming:", Some(GOAL_MILLIS), begin, zoomed);
    let key = |key| Event::Key { key, physical_key: None, pressed: true, repeat: false, modifiers: Modifiers::NONE };
    let begin = thread_nanos();
    let moved = (0..FRAMES)
        .map(|i| next(vec![key(if i % 2 == 0 { egui::Key::ArrowLeft } else { egui::Key::ArrowRight })], &mut app))
        .collect();
    // Each such frame works a step of 100,000 tasks out anew: not what has to come 60 times a second.
    tell("another step each:", None, begin, moved);

    // As a window does it: a frame only when one is asked for.
    let (begin_cpu, begin) = (cpu_secs(), now_nanos());
    let secs = 5.0;
    let asked = Arc::new(std::sync::atomic::AtomicU64::new(0));
    let counter = asked.clone();
    ctx.set_request_repaint_callback(move |_| {
        counter.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
    });
    let mut frames = 0;
    while (now_nanos() - begin) as f64 * 1e-9 < secs {
        std::thread::sleep(std::time::Duration::from_millis(16));
        if asked.swap(0, std::sync::atomic::Ordering::Relaxed) > 0 {
            next(Vec::new(), &mut app);
            frames += 1;
        }
    }
    let idle = (cpu_secs() - begin_cpu) / ((now_nanos() - begin) as f64 * 1e-9);
    println!("nothing changes:        {frames} frames in {secs} s, {:.2}% of a core", 100.0 * idle);
    if !is_fast || idle > GOAL_IDLE {
        std::process::exit(1);
    }
}
