//! From a scene to its ranks: mesh, schedule, stages and links, with everything that does not fit together found at once.

use std::{ops::Range, sync::Arc};

use kernels::comm::{Choice, Comm, Spread, Wire};

use crate::{
    layout::Layout,
    mesh::Mesh,
    model_config::ModelConfig,
    params::{ParamKind, ParamSpec, param_specs},
    pipeline::{
        ScheduleKind,
        action::Schedule,
        chunk::{self, Chunk},
        source::ScheduleSource,
        stages,
        verify::verify,
    },
    problem::Problem,
    ranks::Ranks,
    scene::{PipelineSchedule, Reduce, Scene, WireFormat},
    session::SessionError,
};

/// How a scene's model and batch lie on its ranks.
#[derive(Clone, Debug)]
pub struct Distribution {
    /// The ranks of a replica.
    pub mesh: Mesh,
    /// Replicas that train apart; 1 if there is no word of any.
    pub num_replicas: u32,
    /// Order of passes.
    pub schedule: ScheduleSource,
    /// Layers of each stage.
    pub stages: Vec<Range<usize>>,
    stages_of: Vec<Vec<u32>>,
    chunk_order: [Chunk; 10],
    wires: (Wire, Wire),
    choice: Option<Choice>,
    reduce: Reduce,
}

impl Distribution {
    /// How `scene` lies on its ranks.
    ///
    /// # Errors
    /// All that does not fit, each with the nearest values that would.
    pub fn new(scene: &Scene, config: &ModelConfig) -> Result<Self, Vec<Problem>> {
        let mesh = scene.mesh;
        let num_replicas = scene.num_replicas();
        let num_data_ranks = num_data_ranks(scene);
        let mut problems = mesh_problems(scene, config);
        let pipeline = scene.pipeline.clone().unwrap_or_default();
        let chunk_order = match pipeline.overlap_order.as_deref().map(chunk::parse_order) {
            None => chunk::ORDER,
            Some(Ok(order)) => order,
            Some(Err(found)) => {
                problems.extend(found.into_iter().map(|message| Problem::new("pipeline.overlap_order", message)));
                chunk::ORDER
            }
        };
        let schedule = source(&pipeline.schedule).map_err(|problem| problems.push(problem)).ok();
        let Some(schedule) = schedule.filter(|_| mesh.pp > 0) else { return Err(problems) };
        let stages_of = match schedule.stages_of(mesh.pp) {
            Ok(stages_of) => stages_of,
            Err(message) => {
                let message = format!("does not go with mesh.pp = {}: {message}", mesh.pp);
                problems.push(Problem::new("pipeline.schedule", message));
                return Err(problems);
            }
        };
        let counts = microbatch_counts(scene);
        for (path, count) in counts.iter().filter(|(_, count)| count % num_data_ranks == 0) {
            let local = (count / num_data_ranks) as u32;
            if let Err(message) = schedule.build(mesh.pp, local) {
                let message =
                    format!("comes to {local} microbatches a rank, which the schedule does not take: {message}");
                problems.push(Problem::new(path, message));
            }
        }
        let num_stages = stages_of.iter().flatten().max().map_or(1, |last| *last as usize + 1);
        let stages = match lay_stages(config, pipeline.stages.as_deref(), num_stages, mesh.pp as usize) {
            Ok(stages) => stages,
            Err(problem) => {
                problems.push(problem);
                return Err(problems);
            }
        };
        // What follows takes numbers that divide each other.
        if !problems.is_empty() {
            return Err(problems);
        }
        let expert_parallel = scene.expert_parallel.clone().unwrap_or_default();
        let wires = (wire(expert_parallel.dispatch), wire(expert_parallel.combine));
        let reduce = expert_parallel.reduce;
        let choice = config.moe.as_ref().map(|moe| Choice {
            num_experts: moe.n_routed_experts,
            top_k: moe.num_experts_per_tok,
            num_groups: moe.n_group,
            groups_kept: moe.topk_group,
        });
        Ok(Distribution { mesh, num_replicas, schedule, stages, stages_of, chunk_order, wires, choice, reduce })
    }

    /// Ranks of all replicas.
    pub fn num_ranks(&self) -> u32 {
        self.num_replicas * self.mesh.num_ranks()
    }

    /// The rank at the other end of `comm`, which has those of one or more replicas.
    pub fn ranks(&self, comm: Comm) -> Ranks {
        let layout =
            Layout::new(self.mesh, comm.rank() % self.mesh.num_ranks(), self.stages.clone(), self.stages_of.clone());
        let ranks = Ranks::new(comm, layout, self.schedule.clone());
        let spread = self.choice.map_or_else(Spread::default, |choice| {
            let nodes: Vec<u32> = ranks.expert_group.iter().map(|&rank| ranks.comm.node_of(rank)).collect();
            Spread::expected(choice, &nodes, ranks.layout.mesh.coordinates(ranks.layout.rank).ep as usize)
        });
        Ranks {
            chunk_order: self.chunk_order,
            dispatch_wire: self.wires.0,
            combine_wire: self.wires.1,
            spread,
            reduces_on_the_way: self.reduce == Reduce::Node,
            ..ranks
        }
    }

    /// The same under another schedule of as many stages.
    ///
    /// # Errors
    /// If it is for another number of ranks or stages.
    pub fn with_schedule(&self, schedule: ScheduleSource) -> Result<Self, SessionError> {
        let stages_of = schedule.stages_of(self.mesh.pp).map_err(SessionError::input)?;
        let num_stages = stages_of.iter().flatten().max().map_or(0, |last| *last as usize + 1);
        if num_stages != self.stages.len() {
            let message = format!("expected a schedule of {} stages, found {num_stages}", self.stages.len());
            return Err(SessionError::input(message));
        }
        Ok(Distribution { schedule, stages_of, ..self.clone() })
    }

    /// All ranks in this process.
    pub fn local(&self) -> Vec<Ranks> {
        let comms = Comm::local(self.num_ranks(), self.mesh.ranks_per_node);
        comms.into_iter().map(|comm| self.ranks(comm)).collect()
    }

    /// A rank of one replica, that is only planned for.
    pub fn planned(&self, rank: u32) -> Ranks {
        self.ranks(Comm::planned(rank, self.mesh.num_ranks(), self.mesh.ranks_per_node))
    }
}

fn wire(format: WireFormat) -> Wire {
    match format {
        WireFormat::Exact => Wire::Exact,
        WireFormat::Bf16 => Wire::Bf16,
        WireFormat::Fp8 => Wire::Fp8,
    }
}

/// Ranks of all replicas that see different parts of the batch.
fn num_data_ranks(scene: &Scene) -> usize {
    (scene.num_replicas() * scene.mesh.num_data_ranks().max(1)) as usize
}

/// Numbers of microbatches that steps have, and where they are written.
fn microbatch_counts(scene: &Scene) -> Vec<(String, usize)> {
    let ramp = scene.batch.ramp.iter().enumerate();
    let ramp = ramp.map(|(i, ramp)| (format!("batch.ramp[{i}].num_microbatches"), ramp.num_microbatches));
    std::iter::once(("batch.num_microbatches".to_owned(), scene.batch.num_microbatches)).chain(ramp).collect()
}

/// The multiples of `of` around `value`, 0 left out, as text.
fn multiples_around(value: usize, of: usize) -> String {
    let below = value / of * of;
    let list = [below, below + of].map(|x| (x > 0).then(|| x.to_string()));
    list.into_iter().flatten().collect::<Vec<_>>().join(" or ")
}

fn mesh_problems(scene: &Scene, config: &ModelConfig) -> Vec<Problem> {
    let mesh = scene.mesh;
    let mut problems = Vec::new();
    for (name, value) in [("pp", mesh.pp), ("ep", mesh.ep), ("dp", mesh.dp), ("ranks_per_node", mesh.ranks_per_node)] {
        if value == 0 {
            problems.push(Problem::new(format!("mesh.{name}"), "must be 1 or more, but is 0"));
        }
    }
    let ep = mesh.ep.max(1) as usize;
    match &config.moe {
        None if ep > 1 => {
            let message = format!("is {ep}, but the model has no experts");
            problems.push(Problem::new("mesh.ep", message).help("mesh.ep: 1; dp spreads the batch"));
        }
        Some(moe) if ep > moe.n_routed_experts => {
            let num_experts = moe.n_routed_experts;
            let message =
                format!("is {ep}, but with {num_experts} routed experts a layer not every rank would have one");
            problems.push(Problem::new("mesh.ep", message).help(format!("mesh.ep: {num_experts} or fewer")));
        }
        _ => {}
    }
    let num_data_ranks = num_data_ranks(scene);
    let replicas = scene.diloco.as_ref().map_or_else(String::new, |d| format!("diloco.replicas {} x ", d.replicas));
    for (path, count) in microbatch_counts(scene) {
        if count > 0 && count % num_data_ranks != 0 {
            let message = format!(
                "is {count}, which the {num_data_ranks} data ranks ({replicas}mesh.ep {} x mesh.dp {}) do not divide",
                mesh.ep, mesh.dp
            );
            let help = format!("{path}: {}", multiples_around(count, num_data_ranks));
            problems.push(Problem::new(path, message).help(help));
        }
    }
    problems
}

fn source(schedule: &PipelineSchedule) -> Result<ScheduleSource, Problem> {
    let kind = match schedule {
        PipelineSchedule::GPipe => ScheduleKind::GPipe,
        PipelineSchedule::OneFOneB => ScheduleKind::OneFOneB,
        PipelineSchedule::Interleaved { chunks } => ScheduleKind::Interleaved { chunks: *chunks },
        PipelineSchedule::ZbH1 => ScheduleKind::ZbH1,
        PipelineSchedule::ZbH2 => ScheduleKind::ZbH2,
        PipelineSchedule::Zbv => ScheduleKind::Zbv,
        PipelineSchedule::DualPipe => ScheduleKind::DualPipe,
        PipelineSchedule::DualPipeV => ScheduleKind::DualPipeV,
        PipelineSchedule::File(path) => {
            let at = |message: String| Problem::new("pipeline.schedule", message);
            let name = path.0.display();
            let text = std::fs::read_to_string(&path.0).map_err(|e| at(format!("cannot read {name}: {e}")))?;
            let schedule = Schedule::from_text(&text).map_err(|e| at(format!("{name}: {e}")))?;
            verify(&schedule).map_err(|faults| {
                let faults: Vec<String> = faults.iter().take(20).map(|fault| format!("\n  {fault}")).collect();
                at(format!("{name} cannot run:{}", faults.concat()))
            })?;
            return Ok(ScheduleSource::Text(Arc::new(schedule)));
        }
    };
    Ok(ScheduleSource::Kind(kind))
}

fn lay_stages(
    config: &ModelConfig,
    counts: Option<&[usize]>,
    num_stages: usize,
    pp: usize,
) -> Result<Vec<Range<usize>>, Problem> {
    let num_layers = config.num_hidden_layers;
    if let Some(counts) = counts {
        return stages::explicit(counts, num_layers, num_stages)
            .map_err(|e| Problem::new("pipeline.stages", e.to_string()));
    }
    if num_stages > num_layers {
        let message = format!("comes to {num_stages} stages, more than the {num_layers} layers of the model");
        let help = format!("mesh.pp: {} or fewer", (num_layers * pp / num_stages).max(1));
        return Err(Problem::new("mesh.pp", message).help(help));
    }
    let weights = StageWeights::new(config);
    Ok(stages::balance(&weights.layers, weights.first, weights.last, num_stages))
}

/// What a token costs in each part of a model, in activated parameters: products are most of a pass.
struct StageWeights {
    layers: Vec<f64>,
    first: f64,
    last: f64,
}

impl StageWeights {
    fn new(config: &ModelConfig) -> Self {
        let mut layers = vec![0.0; config.num_hidden_layers];
        let mut last = 0.0;
        let share = config.moe.as_ref().map_or(1.0, |moe| moe.num_experts_per_tok as f64 / moe.n_routed_experts as f64);
        let weight = |spec: &ParamSpec| {
            let share = if spec.kind == ParamKind::ExpertLinear { share } else { 1.0 };
            spec.num_elements() as f64 * share
        };
        let mut head = 0.0;
        for spec in param_specs(config) {
            match (spec.layer, spec.kind) {
                (Some(layer), _) if layer < layers.len() => layers[layer] += weight(&spec),
                (Some(_), _) => last += weight(&spec),
                // Looking a token up costs next to nothing; multiplying by the head does, once for each loss.
                (None, ParamKind::Head) => head = weight(&spec),
                (None, ParamKind::Embedding) if config.tie_word_embeddings => head = weight(&spec),
                (None, _) => {}
            }
        }
        last += head * (1 + config.num_nextn_predict_layers) as f64;
        StageWeights { layers, first: 0.0, last }
    }
}
