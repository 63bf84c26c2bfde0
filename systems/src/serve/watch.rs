//! A model that serves as others see it: what its steps tell, which requests there are, and what it can be asked beside them.
//!
//! Requests and snapshots are those of a training run ([`crate::observe`]), and so are `run.pause`, `run.step` and `run.stop`. It has no
//! value to set and no checkpoint to save, and says so to who asks. Of a request its numbers are seen, never its text or its tokens.

use std::sync::{Arc, atomic::AtomicUsize};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::{
    control::{Control, ControlPlugin, ControlSystems, Inbox, Note},
    prelude::*,
};
use kernels::comm::Comm;
use serde::Serialize;

use super::{
    requests::{Request, State},
    schedule::Queues,
    service::Counters,
    step::{Server, record_step},
};
use crate::{
    expert::{ExpertKey, ExpertLoad},
    observe::ObservePlugin,
    work::{Work, turn_of},
};

/// Lets a model that serves be watched, paused and stopped.
#[derive(Clone)]
pub struct WatchPlugin {
    /// What it is called.
    pub name: String,
    /// Where it is asked, and where its steps go.
    pub inbox: Inbox,
    /// Is told in words what was changed from outside.
    pub note: Note,
}

impl Plugin for WatchPlugin {
    fn build(&self, app: &mut App) {
        let control = ControlPlugin {
            name: self.name.clone(),
            comm: Comm::solo(),
            inbox: Some(self.inbox.clone()),
            feeds_are_apart: false,
            // A signal lets answers end, which is the host's to see to.
            signal: Arc::new(AtomicUsize::new(0)),
            finish_step: std::time::Duration::MAX,
            note: self.note.clone(),
        };
        app.init_resource::<Before>()
            .add_plugins((control, ObservePlugin))
            .expose_as::<Request>("Request", |request| {
                serde_json::to_value(RequestView::of(request)).unwrap_or_default()
            })
            .status_field("step", |world| world.resource::<Server>().counters().num_steps.into())
            .status_field("work", |world| format!("{:?}", world.resource::<Work>()).to_lowercase().into())
            .status_field("num_running", |world| world.resource::<Queues>().running.len().into())
            .status_field("num_waiting", |world| world.resource::<Queues>().waiting.len().into())
            .add_systems(Update, resume_to_end.before(ControlSystems))
            .add_systems(Step, tell.in_set(StepSystems::Record).after(record_step).run_if(turn_of(Work::Serve)))
            .add_systems(Finish, end_requests);
    }
}

/// What others may know of a request.
#[derive(Clone, Debug, PartialEq, Serialize)]
pub struct RequestView {
    /// Number; lower ones came first.
    pub id: u64,
    /// Higher goes first.
    pub priority: i32,
    /// Where it is.
    pub state: State,
    /// Tokens of its prompt.
    pub num_prompt_tokens: usize,
    /// Tokens whose rows are in the cache.
    pub num_computed_tokens: usize,
    /// Tokens that were generated.
    pub num_generated_tokens: usize,
    /// Tokens that are to be generated at most; 0 for an embedding.
    pub max_new_tokens: usize,
    /// Blocks of the cache that it holds.
    pub num_blocks: usize,
    /// Seconds since it came.
    pub age_secs: f64,
}

impl RequestView {
    /// That of a request.
    pub fn of(request: &Request) -> Self {
        RequestView {
            id: request.id,
            priority: request.priority,
            state: request.state(),
            num_prompt_tokens: request.num_prompt,
            num_computed_tokens: request.num_computed,
            num_generated_tokens: request.num_generated(),
            max_new_tokens: request.params().map_or(0, |params| params.max_tokens),
            num_blocks: request.blocks.len(),
            age_secs: request.age_secs(),
        }
    }
}

/// What was done before the step at hand.
#[derive(Resource, Default)]
struct Before(Counters);

/// Adds the figures of a serving step to its record, and has it told, under its number among those that had something to do. Counts of
/// requests and blocks are those after the step.
fn tell(
    server: Res<Server>,
    queues: Res<Queues>,
    mut before: ResMut<Before>,
    mut telemetry: ResMut<Telemetry>,
    mut experts: Query<(&ExpertKey, &mut ExpertLoad)>,
) {
    let counters = server.counters();
    let num_generated = counters.num_generated_tokens - before.0.num_generated_tokens;
    let num_tokens = server.num_step_tokens();
    if num_tokens == 0 {
        return;
    }
    let (num_blocks, num_free) = (server.pool().num_blocks(), server.pool().num_free());
    let secs = telemetry.times().step_secs.max(1e-9);
    for (name, value) in [
        ("num_running", queues.running.len() as f64),
        ("num_waiting", queues.waiting.len() as f64),
        ("num_preemptions", counters.num_preemptions as f64),
        ("num_blocks", num_blocks as f64),
        ("num_used_blocks", (num_blocks - num_free) as f64),
        ("cache_usage", 1.0 - num_free as f64 / num_blocks.max(1) as f64),
        ("num_step_tokens", num_tokens as f64),
        ("num_generated_tokens", num_generated as f64),
        ("tokens_per_sec", num_tokens as f64 / secs),
        ("generated_tokens_per_sec", num_generated as f64 / secs),
    ] {
        telemetry.scalar(name, value);
    }
    let routing = server.routing();
    for load in routing {
        let loads = load.last_step.iter().map(|&tokens| f64::from(tokens)).collect();
        telemetry.histogram(format!("load/layer {}", load.layer), loads);
    }
    for (key, mut load) in &mut experts {
        if let Some(layer) = routing.iter().find(|layer| layer.layer == usize::from(key.layer)) {
            load.0 = layer.last_step[usize::from(key.expert)];
        }
    }
    before.0.clone_from(counters);
    telemetry.number(counters.num_steps);
    telemetry.set_told(true);
}

/// A server that is to end answers what it has taken: paused, it never would.
fn resume_to_end(server: Res<Server>, mut control: ResMut<Control>) {
    if server.is_closing() {
        control.resume();
    }
}

/// Stopped on request, it tells those who wait.
fn end_requests(world: &mut World) {
    world.resource_scope(|world, mut server: Mut<Server>| {
        world.resource_scope(|world, mut queues: Mut<Queues>| server.end_all(world, &mut queues));
    });
}
