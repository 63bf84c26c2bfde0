//! Parity with an implementation no one here wrote: Hugging Face transformers and torch, through the fixtures of
//! `tests/oracle`. Logits, loss, every gradient, and twenty steps of AdamW.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{path::PathBuf, sync::Arc};

use bevy_app::App;
use engine::{prelude::*, tensor_file::TensorFile};
use systems::{
    api::Progress,
    data::tokenizer::Tokenizer,
    data::{packing::Batch, token_file::read_token_file},
    generate::{Answer, run_to_rest},
    local::Silent,
    model::{self, Model, Parameters},
    optimizer::{OptimizerState, UpdateScalars},
    probe::{Checkpoint, Probe},
    ranks::Ranks,
    scene::{AdamW, Compute, Optimizer},
    serve::{Capacity, Params, ServePlugin, Server, Task},
    session::run_plan,
    work::Work,
};

const CASES: [&str; 6] =
    ["deepseek_v3_qlora", "deepseek_v3_noqlora", "deepseek_v2", "deepseek_v2_grouped", "qwen2", "qwen2_untied"];

struct Case {
    name: &'static str,
    dir: PathBuf,
    batch: Batch,
    dims: [usize; 2],
    expected: TensorFile<'static>,
}

fn each_case(check: impl Fn(Case)) {
    for name in CASES {
        let dir = PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../tests/oracle/fixtures").join(name);
        let tokens = read_token_file(&dir.join("tokens.safetensors"), usize::MAX).unwrap();
        let expected = TensorFile::read(&dir.join("expected.safetensors")).unwrap();
        let dims = [tokens.batch, tokens.seq_len];
        check(Case { name, dir, batch: Batch::of_rows(tokens.ids, tokens.seq_len), dims, expected });
    }
}

impl Case {
    fn app(&self, compute: Compute, trainable: bool) -> App {
        let progress: Arc<dyn Progress> = Arc::new(Silent);
        Checkpoint::load(&self.dir, (compute, kernels::device::Device::Cpu), 80, trainable, &progress).unwrap().app
    }

    fn values(&self, name: &str) -> Vec<f32> {
        self.expected.get::<f32>(name, self.expected.dims(name).unwrap()).unwrap()
    }
}

/// 1 - 2<x,y> / (|x|^2 + |y|^2) in f64; 0 if both are zero.
fn calc_diff(x: &[f32], y: &[f32]) -> f64 {
    let dot = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
    let norms = dot(x, x) + dot(y, y);
    if norms == 0.0 { 0.0 } else { 1.0 - 2.0 * dot(x, y) / norms }
}

#[test]
fn logits_and_loss_are_those_of_transformers() {
    each_case(|case| {
        let mut app = case.app(Compute::F32, false);
        let probe = Probe::new(&app, &case.batch);
        let (loss, logits) = probe.logits(&mut app).unwrap();
        let got = model::download(app.world().resource::<Tensors>().memory(), logits);
        let want = case.values("logits");
        assert_eq!(case.expected.dims("logits").unwrap(), [case.dims[0], case.dims[1], logits.cols()]);
        let worst = got.iter().zip(&want).map(|(g, w)| (g - w).abs()).fold(0f32, f32::max);
        assert!(worst < 1e-4, "{}: logits differ by {worst}", case.name);
        let want = f64::from(case.values("loss")[0]);
        assert!((loss - want).abs() < 1e-5, "{}: loss {loss}, theirs {want}", case.name);
    });
}

/// The prompt and what the model says after it.
fn generate(app: &mut App, prompt: &[u32], num_new: usize) -> Vec<u32> {
    let text = "a tokenizer is asked for, and its text is not looked at ".repeat(9);
    let tokenizer = Arc::new(Tokenizer::train(&[text], 257).unwrap());
    let service = Server::start(app.world_mut(), tokenizer, Capacity::one(80)).unwrap();
    app.world_mut().resource_mut::<Server>().then = Some(Work::Rest);
    let params = Params { max_tokens: num_new, temperature: 0.0, ignore_eos: true, ..Params::default() };
    let answer = Answer::ask(&service, prompt.to_vec(), Task::Generate(params), None).unwrap();
    app.insert_resource(Work::Serve).add_plugins(ServePlugin);
    run_to_rest(app).unwrap();
    [prompt, &answer.get().tokens].concat()
}

#[test]
fn greedy_generation_over_the_cache_is_that_of_transformers() {
    each_case(|case| {
        let want = case.expected.get::<i64>("generated", &[1, 20]).unwrap();
        let want: Vec<u32> = want.iter().map(|&t| t as u32).collect();
        let mut app = case.app(Compute::F32, false);
        assert_eq!(generate(&mut app, &want[..8], 12), want, "{}", case.name);
    });
}

#[test]
fn sixty_four_tokens_are_those_of_transformers() {
    each_case(|case| {
        let file = TensorFile::read(&case.dir.join("continuation.safetensors")).unwrap();
        let want: Vec<u32> = file.get::<i64>("tokens", &[1, 72]).unwrap().iter().map(|&t| t as u32).collect();
        let mut app = case.app(Compute::F32, false);
        assert_eq!(generate(&mut app, &want[..8], 64), want, "{}", case.name);
    });
}

#[test]
fn every_gradient_is_that_of_torch() {
    each_case(|case| {
        let mut app = case.app(Compute::F32, true);
        let probe = Probe::new(&app, &case.batch);
        let key = probe.plan_step(&mut app).unwrap();
        run_plan(&mut app, &key).unwrap();
        let world = app.world();
        let (memory, mut compared) = (world.resource::<Tensors>().memory(), 0);
        for (spec, weight) in world.resource::<Parameters>().iter() {
            let Some(grad) = weight.grad else { continue };
            let got = model::download(memory, grad);
            for view in &spec.views {
                let want = case.values(&format!("grad.{}", view.hf_name));
                let diff = calc_diff(&got[view.offset..][..view.num_elements()], &want);
                assert!(diff < 1e-8, "{}: gradient of {} differs by {diff:e}", case.name, view.hf_name);
                compared += 1;
            }
        }
        let theirs = case.expected.names().filter(|name| name.starts_with("grad.")).count();
        assert_eq!(compared, theirs, "{}: every gradient of theirs is compared", case.name);
    });
}

#[test]
fn twenty_steps_of_adamw_follow_the_same_losses() {
    each_case(|case| {
        let mut app = case.app(Compute::F32, true);
        let adamw = AdamW { beta1: 0.9, beta2: 0.95, eps: 1e-8, weight_decay: 0.1 };
        let world = app.world_mut();
        let memory = world.resource::<Tensors>().memory().clone();
        let state = {
            let (config, ranks) = (&world.resource::<Model>().config, world.resource::<Ranks>());
            let parameters = world.resource::<Parameters>();
            OptimizerState::allocate(
                (Optimizer::AdamW(adamw), kernels::dtype::DType::F32),
                parameters,
                config,
                &ranks.layout,
                &memory,
            )
        };
        world.insert_resource(state);
        world.insert_resource(UpdateScalars { lr: 1e-3, update: 1, max_grad_norm: f64::INFINITY });
        let probe = Probe::new(&app, &case.batch);
        let key = probe.plan_step(&mut app).unwrap();
        for (step, want) in case.values("adamw_losses").iter().enumerate() {
            app.world_mut().resource_mut::<UpdateScalars>().update = step as u64 + 1;
            run_plan(&mut app, &key).unwrap();
            let got = probe.loss(&app);
            assert!((got - f64::from(*want)).abs() < 1e-4, "{}: step {step}: loss {got}, theirs {want}", case.name);
        }
    });
}
