//! What a run can be asked: the engine's own methods, and those that plugins add.

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value, json};

use super::{
    LiveValue, RpcError, RpcResult,
    plugin::Control,
    values::{self, LiveValues},
    world::{self, Exposed, ExposedKind},
};
use crate::telemetry::Telemetry;

/// What a method does to the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Nothing: anyone may look.
    Reads,
    /// Nothing, and `rank` among the parameters says on which rank; if it is left out, on the first.
    ReadsAnyRank,
    /// Changes how the run goes on, on the rank that was asked.
    Changes,
    /// The same, and is done by every rank, between the same two steps.
    ChangesAllRanks,
}

/// Something that a run can be asked.
#[derive(Clone, Copy)]
pub struct Method {
    /// Its name, as `run.status`.
    pub name: &'static str,
    /// One line: parameters, and what comes back. If it begins with `{}`, there are no parameters.
    pub about: &'static str,
    /// Whom it concerns.
    pub access: Access,
    /// Does it, between two steps.
    pub run: fn(&mut World, &Value) -> RpcResult,
}

/// All methods, in the order they were registered.
#[derive(Resource, Default)]
pub(super) struct Methods(pub(super) Vec<Method>);

/// What the run's status has beside what the engine knows.
#[derive(Resource, Default)]
pub(super) struct StatusFields(Vec<StatusField>);

/// Name, and how its value is found.
type StatusField = (&'static str, fn(&World) -> Value);

/// The methods that every run has. `run.step` is answered after the step, so its answer is the plugin's.
pub(super) const METHODS: [Method; 16] = [
    Method {
        name: "rpc.discover",
        about: "{} -> the methods, each with one line",
        access: Access::Reads,
        run: discover,
    },
    Method {
        name: "run.status",
        about: "{} -> name, step, state (running or paused), num_ranks, num_listeners, num_dropped, ..",
        access: Access::Reads,
        run: |world, _| Ok(status(world)),
    },
    Method {
        name: "run.last",
        about: "{} -> {step, scalars: {name: value}} of the last step that was done; null before the first",
        access: Access::Reads,
        run: |world, _| {
            let last = world.get_resource::<Telemetry>().and_then(Telemetry::last);
            Ok(last.map_or(Value::Null, |last| {
                // JSON has no number for what is not finite.
                let scalars = last.scalars.iter().map(|(name, value)| (name.clone(), json!(value)));
                json!({ "step": last.step, "scalars": scalars.collect::<Map<String, Value>>() })
            }))
        },
    },
    Method {
        name: "run.pause",
        about: "{} -> the status; the step at hand is done first",
        access: Access::Changes,
        run: |world, _| {
            world.resource_mut::<Control>().pause();
            Ok(status(world))
        },
    },
    Method {
        name: "run.resume",
        about: "{} -> the status",
        access: Access::Changes,
        run: |world, _| {
            world.resource_mut::<Control>().resume();
            Ok(status(world))
        },
    },
    Method {
        name: RUN_STEP,
        about: "{} -> the status when one more step is done; the run is then paused",
        access: Access::Changes,
        run: |world, _| Ok(status(world)),
    },
    Method {
        name: "run.stop",
        about: "{} -> null; the run ends in good order, with a checkpoint",
        access: Access::ChangesAllRanks,
        run: |world, _| {
            world.resource_mut::<crate::app::Exit>().stop(crate::app::ExitReason::Stopped);
            Ok(Value::Null)
        },
    },
    Method {
        name: "run.set",
        about: "{path, value} -> the value as `run.values` has it; null takes a value back",
        access: Access::ChangesAllRanks,
        run: values::set,
    },
    Method {
        name: "run.values",
        about: "{} -> what `run.set` can change: [{path, value in force, set, about}]",
        access: Access::Reads,
        run: values::list,
    },
    Method {
        name: "world.list",
        about: "{with: component?, limit: 20000, rank: 0} -> entities of a rank: [{entity, name, components, parent}]",
        access: Access::ReadsAnyRank,
        run: world::list,
    },
    Method {
        name: "world.get",
        about: "{entity, rank: 0} -> {entity, name, parent, components: {name: value}}",
        access: Access::ReadsAnyRank,
        run: world::get,
    },
    Method {
        name: "world.query",
        about: "{components: [name], limit: 20000, rank: 0} -> entities that have them all: [{entity, name, components: {name: value}}]",
        access: Access::ReadsAnyRank,
        run: world::query,
    },
    Method {
        name: "graph.get",
        about: "{rank: 0} -> the step's tasks of a rank: [{label, kind, pass, stream, stage, layer, microbatch, deps}]",
        access: Access::ReadsAnyRank,
        run: world::graph,
    },
    // A connection does these by itself; here they are listed.
    Method {
        name: "telemetry.subscribe",
        about: "{format: binary or json} -> {version}; then each step's snapshot, over a WebSocket",
        access: Access::Reads,
        run: needs_socket,
    },
    Method {
        name: "rpc.unwatch",
        about: "{id} -> null; ends what a method that only reads began with `+watch` behind its name: it is answered again after each step that changes its answer",
        access: Access::Reads,
        run: needs_socket,
    },
    Method { name: "telemetry.unsubscribe", about: "{} -> null", access: Access::Reads, run: needs_socket },
];

fn needs_socket(_: &mut World, _: &Value) -> RpcResult {
    Err(RpcError::new(RpcError::INVALID_REQUEST, "this is for a WebSocket, in a request by itself: GET /rpc"))
}

/// The method whose answer waits for the step.
pub(super) const RUN_STEP: &str = "run.step";

impl Access {
    /// Whether it leaves the run as it was.
    pub fn only_reads(self) -> bool {
        matches!(self, Access::Reads | Access::ReadsAnyRank)
    }
}

impl Method {
    /// `Err` if there are parameters, and the method has none.
    pub(super) fn check_params(&self, params: &Value) -> Result<(), RpcError> {
        match params.as_object().and_then(|params| params.keys().next()) {
            Some(name) if self.about.starts_with("{}") => {
                Err(RpcError::params(format!("`{}` takes no parameters, found `{name}`", self.name)))
            }
            _ => Ok(()),
        }
    }
}

fn discover(world: &mut World, _: &Value) -> RpcResult {
    let methods = &world.resource::<Methods>().0;
    let line = |method: &Method| json!({ "name": method.name, "about": method.about, "needs_token": !method.access.only_reads() });
    Ok(json!({ "methods": methods.iter().map(line).collect::<Vec<_>>() }))
}

/// How the run stands.
pub(super) fn status(world: &World) -> Value {
    let mut fields = world.resource::<Control>().status(world);
    if let Some(more) = world.get_resource::<StatusFields>() {
        fields.extend(more.0.iter().map(|(name, get)| ((*name).to_owned(), get(world))));
    }
    Value::Object(fields)
}

/// Does what a request asks for; the error if there is no such method is the same everywhere.
pub(super) fn find(world: &World, name: &str) -> Result<Method, RpcError> {
    let methods = &world.resource::<Methods>().0;
    methods.iter().find(|method| method.name == name).copied().ok_or_else(|| {
        let message = format!("there is no method `{name}`; `rpc.discover` lists those there are");
        RpcError::new(RpcError::METHOD_NOT_FOUND, message)
    })
}

/// Registers what can be asked about an app, and changed in it.
pub trait AppControlExt {
    /// A method.
    ///
    /// # Panics
    /// If there is one of this name.
    fn method(&mut self, method: Method) -> &mut Self;

    /// A value that `run.set` can change.
    ///
    /// # Panics
    /// If there is one of this path.
    fn live_value(&mut self, value: LiveValue) -> &mut Self;

    /// Lets `world.list` and the like show components of type `C`, as they serialize.
    fn expose<C: Component + Serialize>(&mut self, name: &'static str) -> &mut Self;

    /// The same, for components of which something else is to be shown than all they hold.
    fn expose_as<C: Component>(&mut self, name: &'static str, view: fn(&C) -> Value) -> &mut Self;

    /// A field of `run.status`.
    fn status_field(&mut self, name: &'static str, get: fn(&World) -> Value) -> &mut Self;
}

impl AppControlExt for App {
    fn method(&mut self, method: Method) -> &mut Self {
        let methods = &mut self.world_mut().get_resource_or_init::<Methods>().0;
        assert!(methods.iter().all(|known| known.name != method.name), "there is a method `{}` already", method.name);
        methods.push(method);
        self
    }

    fn live_value(&mut self, value: LiveValue) -> &mut Self {
        let values = &mut self.world_mut().get_resource_or_init::<LiveValues>().0;
        assert!(values.iter().all(|known| known.path != value.path), "there is a live value `{}` already", value.path);
        values.push(value);
        self
    }

    fn expose<C: Component + Serialize>(&mut self, name: &'static str) -> &mut Self {
        self.expose_as::<C>(name, |component| serde_json::to_value(component).unwrap_or(Value::Null))
    }

    fn expose_as<C: Component>(&mut self, name: &'static str, view: fn(&C) -> Value) -> &mut Self {
        let view = move |entity: EntityRef| entity.get::<C>().map(view);
        let world = self.world_mut();
        let id = world.register_component::<C>();
        world.get_resource_or_init::<Exposed>().0.push(ExposedKind { name, id, view: Box::new(view) });
        self
    }

    fn status_field(&mut self, name: &'static str, get: fn(&World) -> Value) -> &mut Self {
        self.world_mut().get_resource_or_init::<StatusFields>().0.push((name, get));
        self
    }
}

/// An object from its fields.
pub(super) fn object<const N: usize>(fields: [(&str, Value); N]) -> Map<String, Value> {
    fields.into_iter().map(|(name, value)| (name.to_owned(), value)).collect()
}
