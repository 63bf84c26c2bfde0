//! One rank equals many: on real local ranks, under every schedule and mesh, each microbatch's losses have the bits of one rank's,
//! and the gradient is the same.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
};

use bevy_app::App;
use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::comm::Comm;
use systems::{
    data::{
        corpus::Corpus,
        packing::{Packing, Rows},
        shard::Shard,
    },
    distribute::Distribution,
    formats::Formats,
    head::{LossScale, LossSums},
    hf::config::HfConfig,
    local::{self, Silent},
    lower::Saved,
    mesh::Mesh,
    microbatch::Inputs,
    model::{Parameters, initial_values},
    model_config::ModelConfig,
    optimizer::{OptimizerState, UpdateScalars},
    params::{ParamKind, ParamSpec, param_specs},
    ranks::Ranks,
    save,
    scene::{
        AdamW, Batch, Compute, ExpertParallel, Optimizer, Pipeline, PipelineSchedule, Recompute, Scene, ScenePath,
    },
    session::{ModelSetup, SessionError, app_with_model, run_plan},
    train::{self, TrainPlugin},
    weights::Weights,
};

const MTP_WEIGHT: f64 = 0.3;
const SEQ_LEN: usize = 8;

/// Sixteen layers, the first dense, of eight experts each.
fn model(num_mtp: usize) -> ModelConfig {
    let config = r#"{"model_type": "deepseek_v3", "vocab_size": 29, "hidden_size": 8, "intermediate_size": 12,
        "moe_intermediate_size": 4, "num_hidden_layers": 16, "num_attention_heads": 2, "n_shared_experts": 1,
        "n_routed_experts": 8, "routed_scaling_factor": 2.5, "kv_lora_rank": 6, "q_lora_rank": 5,
        "qk_rope_head_dim": 4, "v_head_dim": 3, "qk_nope_head_dim": 5, "n_group": 4, "topk_group": 2,
        "num_experts_per_tok": 3, "first_k_dense_replace": 1, "norm_topk_prob": true, "max_position_embeddings": 16,
        "initializer_range": 0.3, "rms_norm_eps": 1e-6, "tie_word_embeddings": false}"#;
    let config = serde_json::from_str::<HfConfig>(config).unwrap().resolve().unwrap();
    ModelConfig { num_nextn_predict_layers: num_mtp, ..config }
}

/// A step on some ranks.
#[derive(Clone)]
struct Case {
    mesh: (u32, u32, u32),
    schedule: PipelineSchedule,
    num_microbatches: usize,
    compute: Compute,
    num_mtp: usize,
    recompute: Recompute,
}

impl Case {
    fn new(mesh: (u32, u32, u32), schedule: PipelineSchedule, num_microbatches: usize) -> Self {
        Case { mesh, schedule, num_microbatches, compute: Compute::F64, num_mtp: 1, recompute: Recompute::Off }
    }
}

/// Losses of each microbatch as bits, main first, and the gradient of every parameter.
#[derive(Clone, Debug, PartialEq)]
struct Step {
    losses: Vec<Vec<u64>>,
    gradients: BTreeMap<String, Vec<f64>>,
}

fn run(case: &Case) -> Step {
    let config = model(case.num_mtp);
    let (pp, ep, dp) = case.mesh;
    let scene = Scene {
        mesh: Mesh { pp, ep, dp, ranks_per_node: 2 },
        pipeline: Some(Pipeline { schedule: case.schedule.clone(), ..Pipeline::default() }),
        batch: Batch { num_microbatches: case.num_microbatches, microbatch_sequences: 4, ramp: Vec::new() },
        expert_parallel: Some(ExpertParallel::default()),
        ..Scene::default()
    };
    let distribution = Distribution::new(&scene, &config).unwrap();
    let ranks = if pp * ep * dp == 1 { vec![distribution.ranks(Comm::solo())] } else { distribution.local() };
    let whole = Mutex::new(None);
    let losses = Mutex::new(BTreeMap::new());
    let outcomes = local::run_ranks(ranks, |ranks| {
        let mut app = app(case, &config, ranks);
        let world = app.world_mut();
        let num_local = case.num_microbatches / (ep * dp) as usize;
        let inputs = microbatches(world, case, num_local);
        let graph = train::lower_step(world, inputs, train::Options::default()).unwrap().graph;
        let key = PlanKey("step".into());
        world.resource_mut::<Plans>().insert(key.clone(), graph);
        run_plan(&mut app, &key)?;
        let world = app.world();
        let memory = world.resource::<Tensors>().memory();
        let ranks = world.resource::<Ranks>();
        let position = ranks.layout.mesh.coordinates(ranks.layout.rank).pp;
        let schedule = ranks.schedule.build(pp, num_local as u32).unwrap();
        for (m, sums) in (0..).zip(&world.resource::<LossSums>().0) {
            if schedule.rank_of(schedule.num_stages - 1, m) == Some(position) {
                let all = std::iter::once(sums.main).chain(sums.mtp.iter().copied());
                let bits = all.map(|sum| memory.read::<f64>(sum)[0].to_bits()).collect::<Vec<_>>();
                losses.lock().unwrap().insert(ranks.global_microbatch(m), bits);
            }
        }
        let mut gradients = BTreeMap::new();
        for spec in param_specs(&config).iter().filter(|spec| spec.kind != ParamKind::ExpertBias) {
            gradients.insert(spec.name.clone(), gather(world, spec).map_err(SessionError::runtime)?);
        }
        if ranks.is_first() {
            *whole.lock().unwrap() = Some(gradients);
        }
        Ok(((), ExitReason::Finished))
    });
    for outcome in outcomes {
        outcome.expect("a rank panicked").unwrap();
    }
    Step {
        losses: losses.into_inner().unwrap().into_values().collect(),
        gradients: whole.into_inner().unwrap().unwrap(),
    }
}

/// A parameter's whole gradient, from the parts that ranks update, on the first of them.
fn gather(world: &World, spec: &ParamSpec) -> Result<Vec<f64>> {
    let parameters = world.resource::<Parameters>();
    let mine = parameters.find(&spec.name).and_then(|weight| {
        let (part, start) = (save::updated_part(world, weight.index)?, parameters.specs[weight.index].start);
        Some((part.start, wide(world, weight.grad?.slice(part.start - start, part.len()))))
    });
    let bits = mine.map(|(at, values)| (at, values.into_iter().map(f64::to_bits).collect::<Vec<_>>()));
    let all = world.resource::<Ranks>().exchange(&bits)?;
    let mut whole = vec![f64::NAN; spec.num_elements()];
    for (at, values) in all.into_iter().flatten() {
        for (out, bits) in whole[at..].iter_mut().zip(values) {
            *out = f64::from_bits(bits);
        }
    }
    Ok(whole)
}

fn wide(world: &World, tensor: kernels::tensor::Tensor) -> Vec<f64> {
    let memory = world.resource::<Tensors>().memory();
    kernels::with_float!(tensor.dtype, T => {
        memory.read::<T>(tensor).iter().map(|x| kernels::dtype::Float::as_f64(*x)).collect()
    })
}

fn app(case: &Case, config: &ModelConfig, ranks: Ranks) -> App {
    let layout = ranks.layout.clone();
    let setup = ModelSetup {
        config,
        formats: Formats::of(case.compute),
        max_positions: 16,
        trainable: true,
        recompute: case.recompute.clone(),
        progress: Arc::new(Silent),
        ranks,
        num_threads: Some(1),
        device: kernels::device::Device::Cpu,
        on_gpu: Default::default(),
        clock: Clock::Wall,
    };
    let mut app = app_with_model(setup, Weights::of(|spec| Ok(initial_values(spec, config, 3)))).unwrap();
    app.add_plugins(TrainPlugin);
    let world = app.world_mut();
    let memory = world.resource::<Tensors>().memory().clone();
    let optimizer = Optimizer::AdamW(AdamW::default());
    let formats = Formats::of(case.compute);
    let state = OptimizerState::allocate(
        (optimizer, formats.moments),
        world.resource::<Parameters>(),
        config,
        &layout,
        &memory,
    );
    world.insert_resource(state);
    world.insert_resource(UpdateScalars { lr: 1e-3, update: 1, max_grad_norm: 1.0 });
    world.insert_resource(LossSums::allocate(&memory, case.num_microbatches, case.num_mtp));
    app
}

/// This rank's microbatches of the step's text.
fn microbatches(world: &mut World, case: &Case, num_local: usize) -> Vec<Inputs> {
    let documents = (0..800u32).map(|i| {
        let len = 3 + i * 7 % 11;
        ((0..len).map(|j| 1 + (i * 31 + j * j * 17 + j) % 28).collect::<Vec<u32>>(), u64::from(len))
    });
    let packing = Packing {
        seq_len: SEQ_LEN,
        end_of_text: 0,
        num_mtp: case.num_mtp,
        cross_document_attention: false,
        refuse_long_documents: false,
        end_targets: true,
    };
    let rows = Rows::new(Corpus::new([Arc::new(Shard::from_documents(documents))]), packing).unwrap();
    let batches: Vec<_> = (0..case.num_microbatches as u64).map(|m| rows.batch(4 * m..4 * m + 4)).collect();
    let num_targets: usize = batches.iter().map(|batch| batch.num_targets()).sum();
    world.insert_resource(LossScale { main: 1.0 / num_targets as f64, mtp: MTP_WEIGHT / num_targets as f64 });
    let memory = world.resource::<Tensors>().memory().clone();
    let ranks = world.resource::<Ranks>();
    let upload = |m: usize| {
        let inputs = Inputs::allocate(&memory, 4, SEQ_LEN, case.num_mtp);
        inputs.upload(&memory, &batches[ranks.global_microbatch(m as u32) as usize]);
        inputs
    };
    (0..num_local).map(upload).collect()
}

/// 1 - 2<x, y> / (|x|^2 + |y|^2), as DualPipe's examples measure it.
fn calc_diff(x: &[f64], y: &[f64]) -> f64 {
    let dot = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| a * b).sum::<f64>();
    let norms = dot(x, x) + dot(y, y);
    if norms == 0.0 { 0.0 } else { 1.0 - 2.0 * dot(x, y) / norms }
}

fn check(case: &Case, one: &Step) {
    let many = run(case);
    let name = format!("{:?} {:?} {:?}", case.mesh, case.schedule, case.compute);
    assert_eq!(many.losses.len(), case.num_microbatches, "{name}");
    assert_eq!(many.losses, one.losses, "{name}: bits of each microbatch's losses");
    let most = match case.compute {
        Compute::F64 => 1e-13,
        Compute::F32 => 1e-10,
        // Operands of weight gradients have a scale for each 128 tokens: those that an expert has of all ranks, in their order.
        // And gradients of what is not in 8 bits are added up in bf16, in the schedule's order.
        Compute::Bf16 | Compute::Fp8 => 1e-3,
    };
    for (parameter, gradient) in &one.gradients {
        let diff = calc_diff(gradient, &many.gradients[parameter]);
        assert!(diff.abs() < most, "{name}: gradient of {parameter} differs by {diff:e}");
    }
}

/// All schedules on `pp` ranks against one rank, which needs no schedule.
fn all_schedules(pp: u32, compute: Compute) {
    let num_microbatches = 2 * pp.max(2) as usize;
    let with = |mesh, schedule| Case { compute, ..Case::new(mesh, schedule, num_microbatches) };
    let one = run(&with((1, 1, 1), PipelineSchedule::GPipe));
    assert!(one.gradients.values().all(|g| g.iter().any(|x| *x != 0.0)), "every parameter has a gradient");
    for schedule in PipelineSchedule::BUILT {
        if pp == 1 && schedule == PipelineSchedule::DualPipe {
            continue;
        }
        check(&with((pp, 1, 1), schedule), &one);
    }
}

#[test]
fn every_schedule_on_one_rank() {
    all_schedules(1, Compute::F64);
    all_schedules(1, Compute::F32);
}

#[test]
fn every_schedule_on_two_ranks() {
    all_schedules(2, Compute::F64);
    all_schedules(2, Compute::F32);
    all_schedules(2, Compute::Fp8);
}

#[test]
fn every_schedule_on_four_ranks() {
    all_schedules(4, Compute::F64);
    all_schedules(4, Compute::F32);
}

#[test]
fn every_schedule_on_eight_ranks() {
    all_schedules(8, Compute::F64);
    all_schedules(8, Compute::F32);
}

/// A stage's input is the output of another stage of the same rank, whose weight gradients may be done first.
#[test]
fn weight_gradients_may_come_in_any_order() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("late.txt");
    let one = run(&Case::new((1, 1, 1), PipelineSchedule::GPipe, 2));
    for text in ["0F0 1F0 1I0 0I0 0F1 1F1 1I1 0I1 0W0 1W0 0W1 1W1", "0F0 1F0 0F1 1F1 1I1 1I0 0I0 0W0 0I1 1W1 0W1 1W0"] {
        std::fs::write(&path, text).unwrap();
        let schedule = PipelineSchedule::File(ScenePath(path.clone()));
        check(&Case::new((1, 1, 1), schedule, 2), &one);
    }
}

#[test]
fn activations_computed_again_on_many_ranks() {
    let saved = [Saved::Norm, Saved::MlaUp, Saved::Swiglu].to_vec();
    for recompute in [Recompute::Layer, Recompute::Selective(saved)] {
        let with = |mesh, schedule| Case { recompute: recompute.clone(), ..Case::new(mesh, schedule, 8) };
        let one = run(&Case::new((1, 1, 1), PipelineSchedule::GPipe, 8));
        for schedule in [PipelineSchedule::DualPipe, PipelineSchedule::Zbv, PipelineSchedule::ZbH1] {
            check(&with((2, 2, 1), schedule), &one);
        }
    }
}

#[test]
fn pipelines_of_experts_and_data() {
    let with = |mesh, schedule| Case::new(mesh, schedule, 16);
    let one = run(&with((1, 1, 1), PipelineSchedule::GPipe));
    for schedule in PipelineSchedule::BUILT {
        for mesh in [(2, 2, 1), (2, 1, 2), (2, 2, 2), (2, 4, 1)] {
            check(&with(mesh, schedule.clone()), &one);
        }
    }
    for (mesh, schedule) in [((4, 2, 1), PipelineSchedule::OneFOneB), ((4, 2, 1), PipelineSchedule::DualPipe)] {
        check(&with(mesh, schedule), &one);
    }
}

/// Eight experts on three ranks and on five: two or three each, one or two.
#[test]
fn experts_that_ranks_do_not_divide() {
    for compute in [Compute::F64, Compute::F32, Compute::Fp8] {
        let with = |mesh, schedule| Case { compute, ..Case::new(mesh, schedule, 30) };
        let one = run(&with((1, 1, 1), PipelineSchedule::OneFOneB));
        for mesh in [(1, 3, 1), (1, 5, 1), (1, 3, 2), (2, 3, 1)] {
            check(&with(mesh, PipelineSchedule::OneFOneB), &one);
        }
    }
    let with = |mesh, schedule| Case::new(mesh, schedule, 24);
    let one = run(&with((1, 1, 1), PipelineSchedule::GPipe));
    for schedule in PipelineSchedule::BUILT {
        check(&with((2, 3, 1), schedule.clone()), &one);
        check(&with((2, 3, 2), schedule), &one);
    }
}

#[test]
fn experts_and_data_on_many_ranks() {
    for compute in [Compute::F64, Compute::F32, Compute::Fp8] {
        let with = |mesh, schedule| Case { compute, ..Case::new(mesh, schedule, 16) };
        let one = run(&with((1, 1, 1), PipelineSchedule::OneFOneB));
        for ep in [1, 2, 4] {
            for dp in [1, 2] {
                check(&with((1, ep, dp), PipelineSchedule::OneFOneB), &one);
            }
        }
    }
}
