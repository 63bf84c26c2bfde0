//! Ranks that hold the same parameter hold the same bits: they started from the same, and every sum is in the order of ranks. Where
//! they do not, a device or its memory is at fault, silently; so they compare hashes now and then.

use std::{
    collections::BTreeMap,
    hash::{DefaultHasher, Hasher as _},
};

use bevy_app::prelude::*;
use bevy_ecs::prelude::*;
use engine::prelude::*;
use kernels::error::Error;

use crate::{
    model::Parameters,
    params::ParamSpec,
    ranks::Ranks,
    train::{self, Training},
    work::{Work, turn_of},
};

/// Compares at an interval, where ranks are several.
pub struct ReplicasPlugin {
    /// Steps between two comparisons.
    pub every_steps: u64,
}

#[derive(Resource)]
struct EverySteps(u64);

impl Plugin for ReplicasPlugin {
    fn build(&self, app: &mut App) {
        // Before the step is saved: what differs is not to be kept.
        app.insert_resource(EverySteps(self.every_steps.max(1)))
            .add_systems(Step, compare.in_set(StepSystems::Record).after(train::record).run_if(turn_of(Work::Train)));
    }
}

/// Of each parameter's part, by name and first element.
type Hashes = BTreeMap<String, u64>;

fn compare(world: &mut World) -> Result {
    let (every, step) = (world.resource::<EverySteps>().0, world.resource::<Training>().step);
    let ranks = world.resource::<Ranks>();
    if !step.is_multiple_of(every) || ranks.everyone.num_ranks() == 1 {
        return Ok(());
    }
    let all = ranks.exchange(&hashes(world))?;
    match different(&all) {
        None => Ok(()),
        Some((rank, parameter, holders)) => {
            let message = format!(
                "its weights `{parameter}` differ after step {step} from those of the other ranks that hold them ({holders:?}): a \
                 device or its memory is at fault, or the ranks do not run the same program"
            );
            Err(Error::PeerLost { rank, message }.into())
        }
    }
}

fn hashes(world: &World) -> Hashes {
    let (parameters, memory) = (world.resource::<Parameters>(), world.resource::<Tensors>().memory());
    let hash = |weight: kernels::tensor::Tensor| {
        let mut hasher = DefaultHasher::new();
        kernels::with_float!(weight.dtype, T => hasher.write(bytemuck::cast_slice(&memory.read::<T>(weight))));
        hasher.finish()
    };
    // Replicas that train apart are different on purpose.
    let ranks = world.resource::<Ranks>();
    let of_whom = if ranks.num_replicas() > 1 { format!("replica{}.", ranks.replica()) } else { String::new() };
    let name = |spec: &ParamSpec| format!("{of_whom}{}@{}", spec.name, spec.start);
    parameters.iter().map(|(spec, weight)| (name(spec), hash(weight.value))).collect()
}

/// A rank that differs from the others in a parameter, which, and all its holders: where most agree, one that does not.
fn different(all: &[Hashes]) -> Option<(u32, String, Vec<u32>)> {
    let mut holders: BTreeMap<&str, Vec<(u32, u64)>> = BTreeMap::new();
    for (rank, hashes) in (0..).zip(all) {
        hashes.iter().for_each(|(name, &hash)| holders.entry(name).or_default().push((rank, hash)));
    }
    holders.into_iter().find_map(|(name, held)| {
        let agree = |hash: u64| held.iter().filter(|(_, other)| *other == hash).count();
        // With two, nobody knows; the later one is named.
        let (rank, hash) = held.iter().rev().min_by_key(|(_, hash)| agree(*hash))?;
        (agree(*hash) < held.len()).then(|| (*rank, name.to_owned(), held.iter().map(|(rank, _)| *rank).collect()))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_one_that_differs_from_most_is_named() {
        let hashes = |a: u64, b: Option<u64>| -> Hashes {
            [("a@0".to_owned(), a)].into_iter().chain(b.map(|b| ("b@64".to_owned(), b))).collect()
        };
        assert_eq!(different(&[hashes(1, None), hashes(1, Some(2)), hashes(1, Some(2))]), None);
        let found = different(&[hashes(1, Some(3)), hashes(1, None), hashes(1, Some(2)), hashes(1, Some(2))]);
        assert_eq!(found, Some((0, "b@64".into(), vec![0, 2, 3])));
        assert_eq!(different(&[hashes(1, None), hashes(2, None)]), Some((1, "a@0".into(), vec![0, 1])));
    }
}
