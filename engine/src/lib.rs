//! The workflow engine: steps, tasks, graph, dispatch, clock, telemetry, traces and checkpoints. It knows no model.

pub mod app;
pub mod bubbles;
pub mod bubbles_table;
pub mod calibrate;
pub mod checkpoint;
pub mod clock;
pub mod control;
mod dispatch;
pub mod durations;
pub mod error;
pub mod graph;
mod hand_over;
pub mod hardware;
pub mod joint;
pub mod log;
#[cfg(feature = "remote")]
pub mod remote;
pub mod step;
pub mod stream;
pub mod task;
pub mod telemetry;
pub mod tensor_file;
pub mod tensor_pieces;
pub mod tensorboard;
pub mod tensors;
pub mod trace;

/// What a plugin needs: one import, so that a change of `bevy_ecs` is met in one place.
pub mod prelude {
    pub use bevy_app::prelude::{App, Plugin, Startup, Update};
    pub use bevy_ecs::prelude::*;

    pub use crate::{
        app::{AppTaskExt as _, EnginePlugin, Exit, ExitReason},
        clock::Clock,
        control::{Access, AppControlExt as _, LiveValue, Method, RpcError, RpcResult, params_of},
        dispatch::Peers,
        graph::{Graph, GraphBuilder, PlanKey, Plans, Recorded},
        hardware::{DeviceSpec, Format},
        step::{Finish, Step, StepIndex, StepSystems},
        stream::Queue,
        task::{Launch, Pass, Role, Task, TaskKind},
        telemetry::{Snapshot, Span, Telemetry},
        tensors::Tensors,
    };
}
