//! The section `diloco`: replicas that train apart and meet once a round (DiLoCo, arXiv 2311.08105).

use serde::{Deserialize, Serialize};

use super::{Batch, Checks, Compute, Ramp, Scene};

/// Low-communication training: the run is `replicas` times the mesh, and its ranks are counted replica by replica. A step's
/// microbatches are dealt to all of them, as if replicas were data ranks: so as many steps see as many tokens as with `mesh.dp`
/// times as large. But a replica updates its parameters from its own gradients, and only after `inner_steps` steps, a round, do all move
/// what they have in common.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Diloco {
    /// Replicas, each of them a whole mesh.
    pub replicas: u32,
    /// Steps of a round; the run's last step ends a round, too.
    pub inner_steps: u64,
    /// What the mean of how far replicas came moves.
    pub outer: Outer,
    /// How that crosses; `None` loses nothing.
    pub compress: Option<Compress>,
    /// Who is not there, and when. The first replica always is: it logs, it saves, and who joins is told by it.
    pub absent: Vec<Absence>,
}

/// The outer optimizer.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub enum Outer {
    /// SGD with Nesterov's momentum.
    Nesterov(Nesterov),
}

/// SGD with Nesterov's momentum; its defaults are DiLoCo's.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Nesterov {
    /// Learning rate.
    pub lr: f64,
    /// Decay of the momentum.
    pub momentum: f64,
}

/// How pseudo-gradients are rounded on their way, once before they are added up (in f64) and once after.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compress {
    /// bfloat16: half the bytes.
    Bf16,
    /// A signed byte for each number and an f32 scale for each 256: a quarter of the bytes.
    Int8,
}

/// A replica that is not there for some rounds.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Absence {
    /// Which.
    pub replica: u32,
    /// When.
    pub rounds: Rounds,
}

/// Rounds of a run.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rounds {
    /// First one, from 0.
    pub start: u64,
    /// How many.
    pub count: u64,
}

impl Default for Diloco {
    fn default() -> Self {
        let outer = Outer::Nesterov(Nesterov::default());
        Diloco { replicas: 1, inner_steps: 100, outer, compress: None, absent: Vec::new() }
    }
}

impl Default for Nesterov {
    fn default() -> Self {
        Nesterov { lr: 0.7, momentum: 0.9 }
    }
}

impl Diloco {
    /// Whether a replica is meant to be there in a round.
    pub fn is_present(&self, replica: u32, round: u64) -> bool {
        let away = |absence: &&Absence| {
            let Rounds { start, count } = absence.rounds;
            absence.replica == replica && round >= start && round - start < count
        };
        !self.absent.iter().any(|absence| away(&absence))
    }

    /// The round that a step is of, both from 0.
    pub fn round_of(&self, step: u64) -> u64 {
        step / self.inner_steps.max(1)
    }

    pub(super) fn check(&self, checks: &mut Checks, scene: &Scene) {
        let at = |name: &str| format!("diloco.{name}");
        checks.count(&at("replicas"), u64::from(self.replicas));
        checks.count(&at("inner_steps"), self.inner_steps);
        let Outer::Nesterov(Nesterov { lr, momentum }) = &self.outer;
        checks.positive(&at("outer.lr"), *lr);
        checks.decay_rate(&at("outer.momentum"), *momentum);
        for (i, Absence { replica, rounds }) in self.absent.iter().enumerate() {
            checks.expect(
                (1..self.replicas).contains(replica),
                &at(&format!("absent[{i}].replica")),
                || match replica {
                    0 => "is 0, but the first replica is always there: it logs and saves".to_owned(),
                    _ => format!(
                        "is {replica}, but the replicas that may be absent are 1 to {}",
                        self.replicas.max(1) - 1
                    ),
                },
            );
            checks.count(&at(&format!("absent[{i}].rounds.count")), rounds.count);
        }
        checks.expect(scene.precision.compute != Compute::F64, "precision.compute", || {
            "is F64, but what replicas have in common is kept in f32".to_owned()
        });
        let every = scene.eval.as_ref().map_or(0, |eval| eval.every_steps);
        checks.expect(every.is_multiple_of(self.inner_steps.max(1)), "eval.every_steps", || {
            let inner = self.inner_steps;
            format!("is {every}, no multiple of diloco.inner_steps = {inner}: within a round, replicas differ")
        });
    }
}

impl Scene {
    /// Ranks of the run.
    pub fn num_ranks(&self) -> u32 {
        self.mesh.num_ranks() * self.num_replicas()
    }

    /// Replicas that train apart; 1 if there is no word of any.
    pub fn num_replicas(&self) -> u32 {
        self.diloco.as_ref().map_or(1, |diloco| diloco.replicas.max(1))
    }

    /// What one of the replicas does between two meetings: it is what is planned.
    #[must_use]
    pub fn of_one_replica(&self) -> Scene {
        let share = |num_microbatches: usize| num_microbatches / self.num_replicas() as usize;
        let ramp = |ramp: &Ramp| Ramp { num_microbatches: share(ramp.num_microbatches), ..ramp.clone() };
        let batch = Batch {
            num_microbatches: share(self.batch.num_microbatches),
            ramp: self.batch.ramp.iter().map(ramp).collect(),
            ..self.batch.clone()
        };
        Scene { batch, diloco: None, ..self.clone() }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use std::path::Path;

    use super::*;

    fn problems(diloco: &str) -> Vec<String> {
        let text = format!("(eval: (every_steps: 200), batch: (num_microbatches: 8), diloco: {diloco})");
        let scene = Scene::parse(&text, &[]).unwrap().scene;
        let found =
            scene.check(Path::new("")).into_iter().map(|problem| format!("{} {}", problem.path, problem.message));
        found.filter(|found| found.contains("diloco")).collect()
    }

    #[test]
    fn a_section_as_it_is_written() {
        let text = "(diloco: (replicas: 4, inner_steps: 50, outer: Nesterov(lr: 0.5), compress: Int8,
            absent: [(replica: 2, rounds: (start: 3, count: 2))]))";
        let diloco = Scene::parse(text, &[]).unwrap().scene.diloco.unwrap();
        assert_eq!(diloco.outer, Outer::Nesterov(Nesterov { lr: 0.5, momentum: 0.9 }));
        assert_eq!(diloco.compress, Some(Compress::Int8));
        let away: Vec<u64> = (0..8).filter(|&round| !diloco.is_present(2, round)).collect();
        assert_eq!(away, [3, 4]);
        assert!((0..8).all(|round| diloco.is_present(1, round)));
        assert_eq!([0, 49, 50, 99, 100].map(|step| diloco.round_of(step)), [0, 0, 1, 1, 2]);
        let none = Scene::parse("(diloco: (replicas: 2, compress: None))", &[]).unwrap();
        assert_eq!(none.scene.diloco.as_ref().unwrap().compress, None);
        let again = Scene::parse(&none.to_ron().unwrap(), &[]).unwrap();
        assert_eq!(again.scene, none.scene);
    }

    #[test]
    fn what_cannot_be_is_said() {
        assert_eq!(problems("(replicas: 4, absent: [(replica: 3, rounds: (start: 0, count: 1))])"), [""; 0]);
        let found = problems("(replicas: 0, inner_steps: 0, outer: Nesterov(lr: 0.0, momentum: 1.0))");
        assert_eq!(found.len(), 4, "{found:?}");
        let found = problems("(replicas: 2, inner_steps: 30)");
        assert!(found[0].contains("is 200, no multiple of diloco.inner_steps = 30"), "{found:?}");
        let absent = "[(replica: 0, rounds: (start: 0, count: 1)), (replica: 2, rounds: (start: 0, count: 0))]";
        let found = problems(&format!("(replicas: 2, absent: {absent})"));
        assert!(found[0].contains("the first replica is always there"), "{found:?}");
        assert!(
            found[1].contains("absent[1].replica is 2, but the replicas that may be absent are 1 to 1"),
            "{found:?}"
        );
        assert!(found[2].contains("absent[1].rounds.count"), "{found:?}");
    }

    #[test]
    fn one_replica_has_its_share() {
        let text = "(batch: (num_microbatches: 8, ramp: [(step: 5, num_microbatches: 16)]), mesh: (dp: 2),
            diloco: (replicas: 4))";
        let scene = Scene::parse(text, &[]).unwrap().scene;
        assert_eq!((scene.num_ranks(), scene.num_replicas()), (8, 4));
        let one = scene.of_one_replica();
        assert_eq!((one.num_ranks(), one.batch.num_microbatches, one.batch.ramp[0].num_microbatches), (2, 2, 4));
    }
}
