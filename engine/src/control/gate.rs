//! The gate of a step: up to there it has changed nothing that it began from, and from there on it is finished.
//!
//! A signal waits for the end of the step at hand, but not for ever: schedulers kill what does not end in time. A rank whose step then is
//! not at its gate comes there at once, and so do all who hear of it; together they give the step up. What streams have not begun is
//! not run, and the run ends as it was before the step, which a checkpoint can hold. So no rank can be beyond a gate that another has
//! given up at.

use std::{sync::atomic::Ordering, time::Duration};

use bevy_ecs::prelude::*;
use kernels::{clock::now_nanos, stream::Event};

use super::plugin::Control;
use crate::{
    app::{Exit, ExitReason},
    step::StepIndex,
    stream::Queue,
};

/// How often it is looked for signals, and got on with what was sent.
const LOOK: Duration = Duration::from_millis(2);

/// When a signal was first seen in the step at hand.
#[derive(Default)]
pub(crate) struct Seen(Option<u64>);

/// Whether a rank, this one or another, cannot wait any longer for the end of the step: then all come to the gate at once.
pub(crate) fn is_called(world: &World, seen: &mut Seen) -> bool {
    world.get_resource::<Control>().is_some_and(|control| control.is_called(seen))
}

/// Waits until what was launched of the step is done, or a rank cannot wait any longer; whether the step goes on, which all ranks are
/// told alike.
pub(crate) fn passes(world: &mut World, launched: &[(Event, Event)], seen: &mut Seen) -> Result<bool> {
    let Some(control) = world.get_resource::<Control>() else { return Ok(true) };
    let comm = control.comm.clone();
    let is_done = control.wait(launched, seen)?;
    let mine = if is_done { 0 } else { control.signal.load(Ordering::Relaxed) };
    let all = comm.all_gather_bytes(vec![mine as u8])?;
    let Some(signal) = all.iter().flatten().copied().find(|&signal| signal != 0) else {
        world.resource_mut::<Control>().has_passed_gate = true;
        return Ok(true);
    };
    // In this order: no op of this rank then works with what another could not bring.
    let mut queues = world.query::<&Queue>();
    queues.iter(world).for_each(|queue| queue.stream.halt());
    comm.halt();
    for (_, end) in launched {
        end.synchronize();
    }
    for queue in queues.iter(world) {
        let _given_up = queue.stream.failure();
    }
    let step = world.resource::<StepIndex>().0;
    let control = world.resource::<Control>();
    (control.note)(&format!("step {step} is given up in the middle: a signal does not wait longer for its end"));
    world.resource_mut::<Exit>().stop(ExitReason::Signal(i32::from(signal)));
    Ok(false)
}

impl Control {
    fn is_called(&self, Seen(seen): &mut Seen) -> bool {
        let watch = self.comm.watch();
        if self.signal.load(Ordering::Relaxed) != 0 {
            let now = now_nanos();
            if u128::from(now - *seen.get_or_insert(now)) >= self.finish_step.as_nanos() {
                watch.ask_to_halt();
            }
        }
        // In their first step ranks make what they meet by, and cannot be called away.
        self.has_passed_gate && watch.asks_to_halt()
    }

    /// Waits for the events; false if a rank cannot wait any longer.
    fn wait(&self, launched: &[(Event, Event)], seen: &mut Seen) -> Result<bool> {
        for (_, end) in launched {
            loop {
                if self.is_called(seen) {
                    return Ok(false);
                }
                if end.is_reached_within(LOOK) {
                    break;
                }
                self.comm.progress()?;
            }
        }
        Ok(!self.is_called(seen))
    }
}

#[cfg(test)]
#[path = "gate_tests.rs"]
mod tests;
