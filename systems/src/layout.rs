//! What of a model each rank holds, and who else holds it: a pure function of scene and rank, the same on every rank.
//!
//! A parameter that several ranks hold (data-parallel copies, the two directions of DualPipe, an embedding that the last stage
//! needs too) is summed over its holders, whatever the reason. So one list, [`Layout::holders`], says all there is to say about
//! gradient reduction and about the shards of ZeRO-1 (arXiv 1910.02054): each holder updates its part and shows it to the others.

use std::{ops::Range, sync::Arc};

use kernels::comm::shares;

use crate::{
    mesh::Mesh,
    model_config::ModelConfig,
    params::{ParamKind, ParamSpec, param_specs_where},
};

/// How a model lies on the ranks.
#[derive(Clone, Debug, PartialEq)]
pub struct Layout {
    /// The ranks.
    pub mesh: Mesh,
    /// This rank.
    pub rank: u32,
    /// Layers of each pipeline stage; modules for multi-token prediction belong to the last stage and are not counted here.
    pub stages: Vec<Range<usize>>,
    /// Stages of each pipeline position.
    stages_of: Vec<Vec<u32>>,
}

/// Where in the model a parameter is used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    First,
    Last,
    FirstAndLast,
    Layer(usize),
}

impl Layout {
    /// All of a model on one rank.
    pub fn solo(num_layers: usize) -> Self {
        let stages = std::iter::once(0..num_layers).collect();
        Layout::new(Mesh::default(), 0, stages, vec![vec![0]])
    }

    /// A layout from its parts: the layers of each stage, and the stages of each pipeline position.
    pub fn new(mesh: Mesh, rank: u32, stages: Vec<Range<usize>>, stages_of: Vec<Vec<u32>>) -> Self {
        Layout { mesh, rank, stages, stages_of }
    }

    /// Number of pipeline stages.
    pub fn num_stages(&self) -> u32 {
        self.stages.len() as u32
    }

    /// Stages that this rank holds, ascending.
    pub fn my_stages(&self) -> &[u32] {
        &self.stages_of[self.mesh.coordinates(self.rank).pp as usize]
    }

    /// Whether this rank holds the embedding's end of the model.
    pub fn has_first(&self) -> bool {
        self.my_stages().contains(&0)
    }

    /// Whether this rank holds the head's end of the model.
    pub fn has_last(&self) -> bool {
        self.my_stages().contains(&(self.num_stages() - 1))
    }

    /// Whether there is one rank.
    pub fn is_solo(&self) -> bool {
        self.mesh.num_ranks() == 1
    }

    /// Stage of a layer; modules for multi-token prediction are on the last.
    pub fn stage_of_layer(&self, layer: usize) -> u32 {
        let found = self.stages.iter().position(|layers| layers.contains(&layer));
        found.map_or(self.num_stages() - 1, |stage| stage as u32)
    }

    /// The first pipeline position that holds `stage`: where its state is taken from, and where it runs outside of training.
    pub fn first_position(&self, stage: u32) -> u32 {
        let found = self.stages_of.iter().position(|stages| stages.contains(&stage));
        found.map_or(0, |position| position as u32)
    }

    /// The experts of `num_experts` that this rank holds.
    pub fn my_experts(&self, num_experts: usize) -> Range<usize> {
        let at = self.mesh.coordinates(self.rank).ep as usize;
        shares::experts_of(at, self.mesh.ep as usize, num_experts)
    }

    /// The parameters that this rank holds, those of experts cut to its share, with their number in the whole model's list.
    pub fn my_specs(&self, config: &ModelConfig) -> Vec<ParamSpec> {
        let experts = config.moe.as_ref().map_or(0..0, |moe| self.my_experts(moe.n_routed_experts));
        let mine = |kind, layer| self.held_at(self.mesh.coordinates(self.rank).pp, place(config, kind, layer));
        param_specs_where(config, experts, mine)
    }

    /// The ranks that hold the same part of `spec` as `rank` does, ascending, `rank` included if it holds any.
    pub fn holders(&self, config: &ModelConfig, spec: &ParamSpec) -> Arc<[u32]> {
        self.holders_for(self.rank, config, spec)
    }

    /// The same from another rank's point of view.
    pub fn holders_for(&self, rank: u32, config: &ModelConfig, spec: &ParamSpec) -> Arc<[u32]> {
        let place = place(config, spec.kind, spec.layer);
        let sharded = spec.kind == ParamKind::ExpertLinear;
        let ep = self.mesh.coordinates(rank).ep;
        let holds = |&r: &u32| {
            let at = self.mesh.coordinates(r);
            self.held_at(at.pp, place) && (!sharded || at.ep == ep)
        };
        (0..self.mesh.num_ranks()).filter(holds).collect()
    }

    /// Which of those that hold the same part of `spec` as this rank speaks for it: one, and each in its turn.
    pub fn speaker(&self, config: &ModelConfig, spec: &ParamSpec) -> u32 {
        let holders = self.holders(config, spec);
        holders.get(spec.index % holders.len().max(1)).copied().unwrap_or(self.rank)
    }

    /// The parameters that each rank speaks for, by rank: together each part of each parameter once, however often it is held.
    pub fn spoken_specs(&self, config: &ModelConfig) -> Vec<Vec<ParamSpec>> {
        let of = |rank| {
            let layout = Layout { rank, ..self.clone() };
            let specs = layout.my_specs(config).into_iter();
            specs.filter(|spec| layout.speaker(config, spec) == rank).collect()
        };
        (0..self.mesh.num_ranks()).map(of).collect()
    }

    fn held_at(&self, pp: u32, place: Place) -> bool {
        let last = self.num_stages() - 1;
        let stages = &self.stages_of[pp as usize];
        match place {
            Place::First => stages.contains(&0),
            Place::Last => stages.contains(&last),
            Place::FirstAndLast => stages.contains(&0) || stages.contains(&last),
            Place::Layer(layer) => stages.contains(&self.stage_of_layer(layer)),
        }
    }
}

fn place(config: &ModelConfig, kind: ParamKind, layer: Option<usize>) -> Place {
    match (layer, kind) {
        (Some(layer), _) => Place::Layer(layer),
        // The last stage looks tokens up again for multi-token prediction, and multiplies by a tied embedding.
        (None, ParamKind::Embedding) if config.num_nextn_predict_layers > 0 || config.tie_word_embeddings => {
            Place::FirstAndLast
        }
        (None, ParamKind::Embedding) => Place::First,
        (None, _) => Place::Last,
    }
}
