//! The world as requests see it: entities with a component that a plugin has exposed, and the step's tasks.
//!
//! Tasks are entities too, thousands of them; they are shown as the graph they make, and not one by one.

use bevy_ecs::{component::ComponentId, prelude::*};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::{RpcError, RpcResult, params_of};
use crate::{graph::Plans, telemetry::Span};

/// A component type that requests see.
pub(super) struct ExposedKind {
    pub(super) name: &'static str,
    pub(super) id: ComponentId,
    pub(super) view: Box<dyn Fn(EntityRef) -> Option<Value> + Send + Sync>,
}

/// All of them, in the order they were registered.
#[derive(Resource, Default)]
pub(super) struct Exposed(pub(super) Vec<ExposedKind>);

/// More entities than this are not listed at once: it is done between two steps.
const MAX_ENTITIES: usize = 20_000;

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct ListParams {
    #[serde(default)]
    with: Option<String>,
    #[serde(default = "max_entities")]
    limit: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct QueryParams {
    components: Vec<String>,
    #[serde(default = "max_entities")]
    limit: usize,
}

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct GetParams {
    entity: u64,
}

fn max_entities() -> usize {
    MAX_ENTITIES
}

/// `world.list`.
pub(super) fn list(world: &mut World, params: &Value) -> RpcResult {
    let ListParams { with, limit } = params_of(params)?;
    let with: Vec<String> = with.into_iter().collect();
    entities(world, &with, limit, |entity, exposed| {
        exposed.iter().filter(|kind| entity.contains_id(kind.id)).map(|kind| kind.name).collect()
    })
}

/// `world.query`.
pub(super) fn query(world: &mut World, params: &Value) -> RpcResult {
    let QueryParams { components, limit } = params_of(params)?;
    entities(world, &components, limit, |entity, exposed| {
        let wanted = exposed.iter().filter(|kind| components.iter().any(|name| name == kind.name));
        Value::Object(values(entity, wanted))
    })
}

/// `world.get`.
pub(super) fn get(world: &mut World, params: &Value) -> RpcResult {
    let GetParams { entity: bits } = params_of(params)?;
    let found = Entity::try_from_bits(bits).and_then(|entity| world.get_entity(entity).ok());
    let Some(entity) = found else {
        return Err(RpcError::params(format!("there is no entity {bits}; `world.list` lists those there are")));
    };
    let exposed = world.get_resource::<Exposed>().map_or(&[][..], |exposed| &exposed.0);
    let mut fields = head(entity);
    fields.insert("components".into(), Value::Object(values(entity, exposed.iter())));
    Ok(Value::Object(fields))
}

/// Entities that have all the components `with`, or any exposed one if none is named.
fn entities(
    world: &mut World,
    with: &[String],
    limit: usize,
    components: impl Fn(EntityRef, &[ExposedKind]) -> Value,
) -> RpcResult {
    let ids = {
        let exposed = world.get_resource::<Exposed>().map_or(&[][..], |exposed| &exposed.0);
        known_ids(exposed, with)?
    };
    // Who asks for some components need not wait for a look at every task.
    let mut all = QueryBuilder::<EntityRef>::new(world);
    ids.iter().for_each(|&id| {
        all.with_id(id);
    });
    let all = all.build();
    let world: &World = world;
    let exposed = world.get_resource::<Exposed>().map_or(&[][..], |exposed| &exposed.0);
    let is_wanted = |entity: &EntityRef| !ids.is_empty() || exposed.iter().any(|kind| entity.contains_id(kind.id));
    let limit = limit.min(MAX_ENTITIES);
    let (mut list, mut num_more) = (Vec::new(), 0);
    for entity in all.iter_manual(world).filter(is_wanted) {
        if list.len() == limit {
            num_more += 1;
            continue;
        }
        let mut fields = head(entity);
        fields.insert("components".into(), components(entity, exposed));
        list.push(Value::Object(fields));
    }
    Ok(json!({ "entities": list, "num_left_out": num_more }))
}

/// Ids of the components that are called `with`.
fn known_ids(exposed: &[ExposedKind], with: &[String]) -> Result<Vec<ComponentId>, RpcError> {
    let id_of = |name: &String| {
        let found = exposed.iter().find(|kind| kind.name == name).map(|kind| kind.id);
        found.ok_or_else(|| {
            let known: Vec<_> = exposed.iter().map(|kind| format!("`{}`", kind.name)).collect();
            RpcError::params(format!("no component `{name}` can be seen; there are: {}", known.join(", ")))
        })
    };
    with.iter().map(id_of).collect()
}

fn head(entity: EntityRef) -> Map<String, Value> {
    let name = entity.get::<Name>().map(|name| name.as_str());
    let parent = entity.get::<ChildOf>().map(|child| child.parent().to_bits());
    super::methods::object([("entity", entity.id().to_bits().into()), ("name", name.into()), ("parent", parent.into())])
}

fn values<'a>(entity: EntityRef, kinds: impl Iterator<Item = &'a ExposedKind>) -> Map<String, Value> {
    kinds.filter_map(|kind| Some((kind.name.to_owned(), (kind.view)(entity)?))).collect()
}

/// `graph.get`.
pub(super) fn graph(world: &mut World, _: &Value) -> RpcResult {
    let plans = world.resource::<Plans>();
    let Some(graph) = plans.active_graph().map_err(RpcError::failed)? else {
        return Ok(json!({ "plan": null, "tasks": [] }));
    };
    let task = |(span, deps): (&Span, &Vec<u32>)| {
        json!({
            "label": &*span.label,
            "kind": span.kind.0,
            "pass": span.pass.map(|pass| pass.letter()),
            "stream": &*span.stream,
            "rank": span.rank,
            "stage": span.stage,
            "layer": span.layer,
            "microbatch": span.microbatch,
            "deps": deps,
        })
    };
    let tasks: Vec<Value> = graph.spans.iter().zip(&graph.deps).map(task).collect();
    Ok(json!({ "plan": plans.active.as_ref().map(ToString::to_string), "tasks": tasks }))
}
