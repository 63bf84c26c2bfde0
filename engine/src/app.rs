//! The engine as a plugin, and the loop that runs an app until something says stop.
//!
//! There is one way out: the [`Exit`] resource. Systems that fail or panic come here too, through one error handler, so that
//! a run ends with the first failure as its reason and never by unwinding through `main`.

use std::{
    cell::RefCell,
    panic::{AssertUnwindSafe, catch_unwind},
};

use bevy_app::{PluginsState, prelude::*};
use bevy_ecs::{
    error::{BevyError, ErrorContext},
    prelude::*,
    schedule::{ScheduleLabel, SingleThreadedExecutor},
};
use kernels::{device::Device, memory::Memory};

use crate::{
    clock::Clock,
    control::Control,
    dispatch::{Handlers, Timeline},
    error::panic_message,
    graph::Plans,
    step::{self, Finish},
    task::TaskKind,
    telemetry::Telemetry,
    tensors::Tensors,
};

/// Why a run ended. A system can end a run by returning one as its error.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ExitReason {
    /// All that was asked for is done.
    #[error("finished")]
    Finished,
    /// A request asked to stop.
    #[error("stopped on request")]
    Stopped,
    /// The operating system asked (the signal's number).
    #[error("stopped by signal {0}")]
    Signal(i32),
    /// A budget of time, steps or money is used up; which.
    #[error("budget reached: {0}")]
    Budget(String),
    /// Numbers are no longer finite; where.
    #[error("diverged: {0}")]
    Diverged(String),
    /// The plan cannot run on this device; why.
    #[error("infeasible: {0}")]
    Infeasible(String),
    /// Another rank is gone; which, and how that was seen.
    #[error("peer lost: {0}")]
    PeerLost(String),
    /// Anything else that failed.
    #[error("{0}")]
    Error(String),
}

impl ExitReason {
    /// Whether the run failed, so that its state is not to be trusted or kept.
    pub fn is_failure(&self) -> bool {
        !matches!(self, ExitReason::Finished | ExitReason::Stopped | ExitReason::Signal(_) | ExitReason::Budget(_))
    }
}

/// Whether the run is to stop, and why. Set by any system, read by [`run`].
#[derive(Resource, Debug, Default)]
pub struct Exit(Option<ExitReason>);

impl Exit {
    /// Asks to stop. The first reason stands, except that a failure replaces a reason that is none.
    pub fn stop(&mut self, reason: ExitReason) {
        let replaces = match &self.0 {
            None => true,
            Some(old) => reason.is_failure() && !old.is_failure(),
        };
        if replaces {
            self.0 = Some(reason);
        }
    }

    /// The reason, once there is one.
    pub fn reason(&self) -> Option<&ExitReason> {
        self.0.as_ref()
    }
}

thread_local! {
    /// First failure of a system on this thread: an error handler is a plain function, and an app lives on one thread.
    static FAILURE: RefCell<Option<ExitReason>> = const { RefCell::new(None) };
}

fn on_error(mut error: BevyError, context: ErrorContext) {
    let reason = if let Some(payload) = error.take_payload() {
        let message = panic_message(&*payload);
        ExitReason::Error(format!("{} `{}` panicked: {message}", context.kind(), context.name()))
    } else if let Some(reason) = error.downcast_ref::<ExitReason>() {
        reason.clone()
    } else {
        let message = error.to_string().trim_end().to_owned();
        match error.downcast_ref::<kernels::error::Error>() {
            Some(kernels::error::Error::NotFinite { .. }) => ExitReason::Diverged(message),
            Some(kernels::error::Error::OutOfMemory { .. }) => ExitReason::Infeasible(message),
            _ => ExitReason::Error(message),
        }
    };
    FAILURE.with_borrow_mut(|first| {
        first.get_or_insert(reason);
    });
}

/// Whether a system on this thread has failed.
pub(crate) fn has_failed() -> bool {
    FAILURE.with_borrow(Option::is_some)
}

/// Run condition of what launches work: nothing has failed or asked to stop or to wait.
pub(crate) fn running(exit: Res<Exit>, control: Option<Res<Control>>) -> bool {
    exit.0.is_none() && !has_failed() && control.is_none_or(|control| control.goes_on())
}

fn take_failure(mut exit: ResMut<Exit>) {
    if let Some(failure) = FAILURE.take() {
        exit.stop(failure);
    }
}

/// The engine. Its fields are its configuration.
#[derive(Clone, Debug, Default)]
pub struct EnginePlugin {
    /// Wall: tasks are launched, tensors have bytes. Virtual: times are computed, tensors have sizes only.
    pub clock: Clock,
}

impl Plugin for EnginePlugin {
    fn build(&self, app: &mut App) {
        FAILURE.set(None);
        app.set_error_handler(on_error);
        let device = match self.clock {
            Clock::Wall => Device::Cpu,
            Clock::Virtual { .. } => Device::Meta,
        };
        let world = app.world_mut();
        if !world.contains_resource::<Tensors>() {
            world.insert_resource(Tensors::new(Memory::new(device)));
        }
        app.insert_resource(self.clock.clone())
            .init_resource::<Exit>()
            .init_resource::<Handlers>()
            .init_resource::<Plans>()
            .init_resource::<Telemetry>()
            .init_resource::<Timeline>();
        step::install(app);
        // Errors reach the thread that runs the app only if systems run on it.
        for label in [PreStartup.intern(), Startup.intern(), PostStartup.intern(), Update.intern(), Last.intern()] {
            app.edit_schedule(label, |schedule| {
                schedule.set_executor(SingleThreadedExecutor::new());
            });
        }
        app.add_systems(Last, take_failure);
    }
}

/// Registers how tasks are run.
pub trait AppTaskExt {
    /// Tasks of `kind` are launched by `handler`, a system that takes the task's entity. It enqueues ops and returns; it does
    /// not wait for them, and does not allocate tensors.
    ///
    /// # Panics
    /// If `kind` has a handler: two plugins claim the same work.
    fn on_task<M>(&mut self, kind: TaskKind, handler: impl IntoSystem<In<Entity>, Result, M> + 'static) -> &mut Self;
}

impl AppTaskExt for App {
    fn on_task<M>(&mut self, kind: TaskKind, handler: impl IntoSystem<In<Entity>, Result, M> + 'static) -> &mut Self {
        let mut system = IntoSystem::into_system(handler);
        system.initialize(self.world_mut());
        self.world_mut().get_resource_or_init::<Handlers>().insert(kind, Box::new(system));
        self
    }
}

/// Runs `app` step after step until its [`Exit`] has a reason, then [`Finish`] unless the run failed. Does not unwind.
///
/// The app must have an [`EnginePlugin`], and a system that ends the run at some time.
pub fn run(app: &mut App) -> ExitReason {
    guard(app, |app| {
        while app.plugins_state() == PluginsState::Adding {
            std::thread::yield_now();
        }
        if app.plugins_state() != PluginsState::Cleaned {
            app.finish();
            app.cleanup();
        }
    });
    while app.world().resource::<Exit>().reason().is_none() {
        guard(app, App::update);
    }
    if app.world().resource::<Exit>().reason().is_some_and(|reason| !reason.is_failure()) {
        guard(app, |app| app.world_mut().run_schedule(Finish));
    }
    app.world().resource::<Exit>().reason().cloned().unwrap_or(ExitReason::Finished)
}

/// Panics outside of systems (a plugin's `finish`, a schedule that cannot be built) end the run like any failure.
fn guard(app: &mut App, work: impl FnOnce(&mut App)) {
    let result = catch_unwind(AssertUnwindSafe(|| work(app)));
    let failure = FAILURE.take();
    let mut exit = app.world_mut().get_resource_or_init::<Exit>();
    if let Some(failure) = failure {
        exit.stop(failure);
    }
    if let Err(payload) = result {
        exit.stop(ExitReason::Error(format!("the engine panicked: {}", panic_message(&*payload))));
    }
}

#[cfg(test)]
#[path = "app_tests.rs"]
mod tests;
