//! What of a training run can be changed while it goes on. A value that is set stays until it is set again or taken back; a
//! checkpoint keeps it, so that a resumed run goes on under it.

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;
use serde::{Deserialize, Serialize};

use crate::{model::Model, train::Training, work::Work};

/// Values that requests have set, in place of those that the scene gives.
#[derive(Resource, Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Live {
    /// Learning rate, in place of the schedule's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub lr: Option<f64>,
    /// What a step adds to or takes from a router's correction bias, in place of the scene's.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub bias_speed: Option<f64>,
}

impl Live {
    /// The learning rate in force in a step, counted from 0.
    pub fn lr_at(&self, training: &Training, step: u64) -> f64 {
        self.lr.unwrap_or_else(|| training.schedule.lr_at(step, training.train.steps))
    }

    /// The bias speed in force in a step, counted from 0; 0 without routing.
    pub fn bias_speed_at(&self, training: &Training, step: u64) -> f64 {
        let routing = training.scene.routing.as_ref();
        self.bias_speed.or_else(|| Some(routing?.bias_speed_at(step, training.train.steps))).unwrap_or_default()
    }
}

/// Lets requests see where training is, and set what can be set.
pub struct LivePlugin;

impl Plugin for LivePlugin {
    fn build(&self, app: &mut App) {
        app.init_resource::<Live>()
            .live_value(LiveValue {
                path: "lr",
                about: "learning rate of the steps from here on; null gives it back to the schedule",
                get: |world| {
                    let training = world.resource::<Training>();
                    world.resource::<Live>().lr_at(training, training.step)
                },
                set_to: |world| world.resource::<Live>().lr,
                set: |world, value| {
                    world.resource_mut::<Live>().lr = sensible(value)?;
                    Ok(())
                },
            })
            .status_field("step", |world| world.resource::<Training>().step.into())
            .status_field("num_steps", |world| world.resource::<Training>().train.steps.into())
            .status_field("work", |world| format!("{:?}", world.resource::<Work>()).to_lowercase().into());
        let has_bias = world_has_bias(app.world());
        if has_bias {
            app.live_value(LiveValue {
                path: "bias_speed",
                about: "what a step adds to or takes from a correction bias; null gives it back to the scene",
                get: |world| {
                    let training = world.resource::<Training>();
                    world.resource::<Live>().bias_speed_at(training, training.step)
                },
                set_to: |world| world.resource::<Live>().bias_speed,
                set: |world, value| {
                    world.resource_mut::<Live>().bias_speed = sensible(value)?;
                    Ok(())
                },
            });
        }
    }
}

/// Whether the model's routers have a correction bias that moves.
fn world_has_bias(world: &World) -> bool {
    let has_routing = world.resource::<Training>().scene.routing.is_some();
    has_routing && world.resource::<Model>().config.moe.as_ref().is_some_and(|moe| moe.correction_bias)
}

/// No rate or speed of more is meant: a typing error must not end a run.
const MOST: f64 = 100.0;

fn sensible(value: Option<f64>) -> Result<Option<f64>, String> {
    match value {
        Some(value) if !(0.0..=MOST).contains(&value) => {
            Err(format!("expected a number from 0 to {MOST}, found {value}"))
        }
        value => Ok(value),
    }
}
