//! A model in an app: the parts that training, evaluation and generation share, and the loading of weights into them.

use std::{num::NonZero, sync::Arc};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::{device::Device, dtype::DType, memory::Memory, stream::Part};

use crate::{
    api::Progress,
    attention::{AttentionSizes, Rotary, gqa, mla},
    dense, dispatch, embedding, expert,
    formats::Formats,
    head,
    head::LossSums,
    lower::{self, Lowering, Streams},
    mesh::Coordinates,
    microbatch::Inputs,
    model::{self, Model, Parameters},
    model_config::ModelConfig,
    mtp,
    observe::Rank,
    on_gpu::OnGpu,
    optimizer,
    pipeline::{stage, transfer},
    ranks::Ranks,
    rounding,
    routing::{self, ExpertCounts, RoutingState},
    scene::{Compute, Recompute},
    serve::cache::StepSequences,
    weights::{self, Weights},
    work::{Turn, Work, begin_turn},
};

/// What every part of a session needs.
#[derive(Resource, Clone)]
pub struct Session {
    /// Who is told.
    pub progress: Arc<dyn Progress>,
    /// Entities of the streams.
    pub streams: Streams,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Number formats.
    pub formats: Formats,
}

/// Why a session could not be started or ended badly.
#[derive(Debug, thiserror::Error)]
#[error("{message}")]
pub struct SessionError {
    /// What happened and what to do.
    pub message: String,
    /// Exit code of the process: 1 for a runtime error, 2 for bad input, 3 for what does not fit.
    pub exit_code: u8,
}

impl SessionError {
    /// A runtime error.
    pub fn runtime(error: impl std::fmt::Display) -> Self {
        SessionError { message: error.to_string(), exit_code: 1 }
    }

    /// A device's error: what does not fit has its own exit code.
    pub fn device(error: kernels::error::Error) -> Self {
        let exit_code = if matches!(error, kernels::error::Error::OutOfMemory { .. }) { 3 } else { 1 };
        SessionError { message: error.to_string(), exit_code }
    }

    /// Bad input.
    pub fn input(error: impl std::fmt::Display) -> Self {
        SessionError { message: error.to_string(), exit_code: 2 }
    }

    /// Exit code of the process.
    pub fn exit_code(&self) -> u8 {
        self.exit_code
    }
}

/// The handlers of all tasks a model is made of.
pub struct ModelPlugin;

impl Plugin for ModelPlugin {
    fn build(&self, app: &mut App) {
        app.init_resource::<StepSequences>()
            .init_resource::<RoutingState>()
            .init_resource::<ExpertCounts>()
            .init_resource::<Work>();
        app.init_resource::<Turn>().add_systems(Step, begin_turn.before(StepSystems::Admit));
        app.on_task(embedding::EMBED_F, embedding::embed_forward)
            .on_task(embedding::EMBED_W, embedding::embed_weight_grad)
            .on_task(mla::MLA_F, mla::mla_forward)
            .on_task(mla::MLA_CACHED, mla::mla_cached)
            .on_task(gqa::GQA_CACHED, gqa::gqa_cached)
            .on_task(mla::MLA_R, mla::mla_recompute)
            .on_task(mla::MLA_I, mla::mla_input_grad)
            .on_task(mla::MLA_W, mla::mla_weight_grad)
            .on_task(gqa::GQA_F, gqa::gqa_forward)
            .on_task(gqa::GQA_I, gqa::gqa_input_grad)
            .on_task(gqa::GQA_W, gqa::gqa_weight_grad)
            .on_task(dense::MLP_F, dense::mlp_forward)
            .on_task(dense::MLP_I, dense::mlp_input_grad)
            .on_task(dense::MLP_W, dense::mlp_weight_grad)
            .on_task(routing::ROUTE_F, routing::route_forward)
            .on_task(routing::ROUTE_I, routing::route_input_grad)
            .on_task(routing::ROUTE_W, routing::route_weight_grad)
            .on_task(routing::BIAS_UPDATE, routing::bias_update)
            .on_task(expert::EXPERTS_F, expert::experts_forward)
            .on_task(expert::EXPERTS_I, expert::experts_input_grad)
            .on_task(expert::EXPERTS_W, expert::experts_weight_grad)
            .on_task(dispatch::DISPATCH_F, dispatch::move_rows)
            .on_task(dispatch::RETURN_F, dispatch::move_rows)
            .on_task(dispatch::SEND_I, dispatch::move_rows)
            .on_task(dispatch::RETURN_I, dispatch::move_rows)
            .on_task(transfer::SEND_F, transfer::transfer)
            .on_task(transfer::RECEIVE_F, transfer::transfer)
            .on_task(transfer::SEND_B, transfer::transfer)
            .on_task(transfer::RECEIVE_B, transfer::transfer)
            .on_task(expert::COMBINE_F, expert::combine_forward)
            .on_task(expert::COMBINE_I, expert::combine_input_grad)
            .on_task(head::NORM_F, head::norm_forward)
            .on_task(head::NORM_B, head::norm_backward)
            .on_task(head::HEAD_F, head::head_forward)
            .on_task(head::LOGITS_F, head::logits_forward)
            .on_task(mtp::JOIN_F, mtp::join_forward)
            .on_task(mtp::JOIN_I, mtp::join_input_grad)
            .on_task(mtp::JOIN_W, mtp::join_weight_grad)
            .on_task(lower::CHECK_FINITE, lower::check_finite)
            .on_task(stage::ADD_GRAD, stage::add_gradient)
            .on_task(optimizer::ZERO, optimizer::zero_gradients)
            .on_task(optimizer::GRAD_NORM, optimizer::gradient_norm)
            .on_task(optimizer::REDUCE, optimizer::reduce_gradients)
            .on_task(optimizer::REDUCE_COUNTS, optimizer::reduce_counts)
            .on_task(optimizer::REDUCE_NORM, optimizer::reduce_norm)
            .on_task(optimizer::GATHER, optimizer::gather_weights)
            .on_task(optimizer::UPDATE, optimizer::optimizer_update)
            .on_task(optimizer::QUANTIZE, optimizer::quantize_weights)
            .on_task(rounding::COUNT, rounding::count_weights);
    }
}

/// The type that activations and weights are kept in where products are computed in `format`.
pub fn dtype_of(format: Format) -> DType {
    match format {
        Format::Fp8 | Format::Bf16 => DType::Bf16,
        Format::F32 => DType::F32,
        Format::F64 => DType::F64,
    }
}

/// The format of a scene's products.
pub fn format_of(compute: Compute) -> Format {
    match compute {
        Compute::F32 => Format::F32,
        Compute::Bf16 => Format::Bf16,
        Compute::Fp8 => Format::Fp8,
        Compute::F64 => Format::F64,
    }
}

/// The type of activations and weights.
pub fn dtype(compute: Compute) -> DType {
    dtype_of(format_of(compute))
}

/// How a session's model is set up.
pub struct ModelSetup<'a> {
    /// Shapes and formulas.
    pub config: &'a ModelConfig,
    /// Type of activations and weights.
    pub formats: Formats,
    /// Positions that will be used.
    pub max_positions: usize,
    /// Gradients are wanted.
    pub trainable: bool,
    /// What the backward pass computes again.
    pub recompute: Recompute,
    /// Who is told.
    pub progress: Arc<dyn Progress>,
    /// This rank, its peers and its part of the model.
    pub ranks: Ranks,
    /// Threads of this rank's ops; `None` shares those of the process.
    pub num_threads: Option<usize>,
    /// What it is on, under the wall's time.
    pub device: Device,
    /// What a scene says of the device, if that is a GPU.
    pub on_gpu: OnGpu,
    /// The wall's time; or a computed one, and then no weights.
    pub clock: Clock,
}

/// An app with this rank's part of a model, whose weights come from `weights`.
///
/// # Errors
/// Those of `weights`, the device's if it cannot be used or is full, and the operating system's if it gives no thread.
pub fn app_with_model(setup: ModelSetup, weights: Weights) -> Result<App, SessionError> {
    let mut app = App::new();
    if setup.clock == Clock::Wall {
        app.insert_resource(Tensors::new(Memory::open(setup.device).map_err(SessionError::device)?));
    }
    app.add_plugins((EnginePlugin { clock: setup.clock.clone() }, ModelPlugin));
    let world = app.world_mut();
    let memory = world.resource::<Tensors>().memory().clone();
    let ModelSetup {
        config,
        formats,
        max_positions,
        trainable,
        recompute,
        progress,
        ranks,
        num_threads,
        on_gpu,
        clock,
        ..
    } = setup;
    let rank = ranks.number();
    let shares = on_gpu.shares(&memory, ranks.layout.mesh.num_ranks())?;
    let mut stream = |name, num_threads: Option<usize>, share| {
        let part = Part { num_threads: num_threads.and_then(NonZero::new), share };
        let entity = Queue::spawn_with_part(world, rank, name, part).map_err(SessionError::runtime)?;
        if let (Some(table), Some(mut queue)) = (&shares.tuning, world.get_mut::<Queue>(entity)) {
            queue.stream.set_tuning(table).map_err(SessionError::input)?;
        }
        Ok::<_, SessionError>(entity)
    };
    let streams = Streams {
        compute: stream("compute", num_threads, shares.compute)?,
        comm: stream("comm", Some(1), shares.comm)?,
    };
    let Coordinates { pp, dp, ep } = ranks.layout.mesh.coordinates(ranks.layout.rank);
    let rank = world.spawn((Rank { rank, pp, dp, ep }, Name::new(format!("rank {rank}")))).id();
    world.entity_mut(rank).add_children(&[streams.compute, streams.comm]);
    let specs = ranks.layout.my_specs(config);
    let parameters = Parameters::allocate(specs, &memory, &formats, trainable);
    let compute = formats.compute;
    if clock == Clock::Wall {
        let is_folder = matches!(weights, Weights::Folder(_));
        let report = weights::fill(&memory, &parameters, weights)?;
        report.sentence().filter(|_| is_folder).into_iter().for_each(|told| progress.note(&told));
        world.insert_resource(report);
    }
    let model = model::spawn(world, config, &ranks.layout, &parameters, compute, rank);
    world.insert_resource(Rotary::new(config, &memory, compute, max_positions));
    world.insert_resource(ExpertCounts::allocate(config, &ranks.layout, &memory));
    world.insert_resource(LossSums::allocate(&memory, 1, config.num_nextn_predict_layers));
    world.insert_resource(parameters);
    world.insert_resource(model);
    world.insert_resource(ranks);
    world.insert_resource(Session { progress, streams, recompute, formats });
    memory.failure().map_err(SessionError::device)?;
    Ok(app)
}

/// Runs one step of the plan `key` and returns when it is done; nothing else takes a turn.
///
/// # Errors
/// Whatever the step failed with.
pub fn run_plan(app: &mut App, key: &PlanKey) -> Result<(), SessionError> {
    fn stop(mut exit: ResMut<Exit>) {
        exit.stop(ExitReason::Finished);
    }
    #[derive(Resource)]
    struct StopsAfterOne;
    if !app.world().contains_resource::<StopsAfterOne>() {
        app.insert_resource(StopsAfterOne).add_systems(Step, stop.in_set(StepSystems::Keep));
    }
    app.insert_resource(Exit::default()).insert_resource(Work::Rest);
    app.world_mut().resource_mut::<Plans>().active = Some(key.clone());
    match engine::app::run(app) {
        ExitReason::Finished => Ok(()),
        reason => Err(SessionError::runtime(reason)),
    }
}

impl<'w> Lowering<'w> {
    /// Starts a graph over the session's model.
    ///
    /// # Errors
    /// None yet; a stage that holds a part of the model will have some.
    pub fn for_session(world: &'w mut World, inputs: Inputs, training: bool) -> Result<Self> {
        let model = world.resource::<Model>();
        let sizes = (AttentionSizes::new(&model.config), model.config.rms_norm_eps, model.compute);
        let session = world.resource::<Session>();
        let (streams, recompute, fp8) = (session.streams, session.recompute.clone(), session.formats.fp8.clone());
        let layout = world.resource::<Ranks>().layout.clone();
        let memory: Memory = world.resource::<Tensors>().memory().clone();
        let named: Vec<_> = world
            .resource::<Parameters>()
            .iter()
            .flat_map(|(spec, w)| {
                [Some((w.value, spec.name.clone())), w.grad.map(|g| (g, format!("gradient of {}", spec.name)))]
            })
            .flatten()
            .collect();
        let mut lowering = Lowering::new(world, (memory, streams, layout), sizes, inputs, recompute, training);
        lowering.fp8 = fp8;
        for (tensor, name) in named {
            lowering.name(tensor, name);
        }
        Ok(lowering)
    }
}
