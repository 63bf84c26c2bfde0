//! What the next step is: an optimizer step, a batch of evaluation, or tokens of requests. What a step does follows from the
//! microbatches that Admit brings in; this resource says whose turn it is to bring them.

use bevy_ecs::prelude::*;
use engine::telemetry::Telemetry;

/// Whose turn it is.
#[derive(Resource, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Work {
    /// An optimizer step.
    Train,
    /// A batch of held-out text.
    Evaluate,
    /// Requests to answer.
    Serve,
    /// The same optimizer step again, checking every tensor, to name the first that is not finite.
    LocateNotFinite,
    /// Nothing is left to do.
    #[default]
    Rest,
}

/// Whose turn the step at hand is: [`Work`] as it was when the step began. Whoever ends a turn sets [`Work`], and the change
/// counts from the next step on.
#[derive(Resource, Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Turn(pub Work);

/// Run condition: the step at hand is the turn of `work`.
pub fn turn_of(work: Work) -> impl Fn(Res<Turn>) -> bool + Clone {
    move |now: Res<Turn>| now.0 == work
}

/// Listeners follow training; batches of evaluation, tokens and repeated steps come in between. Steps of a model that does nothing but
/// serve are told by [`crate::serve::watch`].
pub(crate) fn begin_turn(work: Res<Work>, mut turn: ResMut<Turn>, mut telemetry: ResMut<Telemetry>) {
    turn.0 = *work;
    telemetry.set_told(*work == Work::Train);
}
