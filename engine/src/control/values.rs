//! Values that can be changed while a run goes on. Whoever reads a value registers it: the engine knows that there are some, not
//! what they mean.

use bevy_ecs::prelude::*;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

use super::{RpcError, RpcResult};

/// A number that requests may set, and take back.
#[derive(Clone, Copy)]
pub struct LiveValue {
    /// What it is called in requests.
    pub path: &'static str,
    /// What it is, with its unit.
    pub about: &'static str,
    /// The value in force.
    pub get: fn(&World) -> f64,
    /// The value that a request has set, if one has.
    pub set_to: fn(&World) -> Option<f64>,
    /// Sets it, or with `None` gives it back to whoever had it before. The error says which values it takes.
    pub set: fn(&mut World, Option<f64>) -> Result<(), String>,
}

/// All live values, in the order they were registered.
#[derive(Resource, Default)]
pub(super) struct LiveValues(pub(super) Vec<LiveValue>);

/// The parameters of a request as a type.
///
/// # Errors
/// If they do not fit it; the message is serde's.
pub fn params_of<T: DeserializeOwned>(params: &Value) -> Result<T, RpcError> {
    // No parameters are an empty object.
    let empty = json!({});
    let params = if params.is_null() { &empty } else { params };
    if !params.is_object() {
        return Err(RpcError::params("expected parameters by name, as in {\"path\": \"..\"}"));
    }
    T::deserialize(params).map_err(|error| RpcError::params(error.to_string()))
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct SetParams {
    path: String,
    /// Null takes it back; but it is to be said.
    value: Value,
}

/// `run.set`.
pub(super) fn set(world: &mut World, params: &Value) -> RpcResult {
    let SetParams { path, value } = params_of(params)?;
    let value = match value {
        Value::Null => None,
        Value::Number(number) => number.as_f64(),
        other => return Err(RpcError::params(format!("expected a number or null as `value`, found {other}"))),
    };
    let values = &world.resource::<LiveValues>().0;
    let Some(found) = values.iter().find(|live| live.path == path).copied() else {
        let known: Vec<_> = values.iter().map(|live| format!("`{}`", live.path)).collect();
        let known = if known.is_empty() { "none".to_owned() } else { known.join(", ") };
        return Err(RpcError::params(format!("there is no live value `{path}`; there are: {known}")));
    };
    (found.set)(world, value).map_err(|expected| RpcError::params(format!("`{path}`: {expected}")))?;
    Ok(describe(world, &found))
}

/// `run.values`.
pub(super) fn list(world: &mut World, _: &Value) -> RpcResult {
    let values = &world.resource::<LiveValues>().0;
    Ok(values.iter().map(|live| describe(world, live)).collect())
}

fn describe(world: &World, live: &LiveValue) -> Value {
    json!({
        "path": live.path,
        "value": (live.get)(world),
        "set": (live.set_to)(world),
        "about": live.about,
    })
}
