//! Ranks of one process: a thread each, with an app of its own. Nothing is shared between them but what was read from files, and
//! the hub that they communicate through.

use std::panic::{AssertUnwindSafe, catch_unwind};

use engine::prelude::*;

use crate::{
    api::{Progress, StepReport},
    evaluate::EvaluationResult,
    ranks::Ranks,
    session::SessionError,
};

/// For ranks that do not speak for all.
pub struct Silent;

impl Progress for Silent {
    fn note(&self, _: &str) {}
    fn step(&self, _: &StepReport) {}
    fn evaluated(&self, _: &EvaluationResult) {}
    fn text(&self, _: &str) {}
}

/// How a rank ended; `None` if it panicked.
pub type Outcome<T> = Option<Result<(T, ExitReason), SessionError>>;

/// Threads for the ops of each of `num_ranks` ranks: the machine's, shared out. A single rank uses those of the process.
pub fn threads_per_rank(num_ranks: usize) -> Option<usize> {
    (num_ranks > 1).then(|| (rayon::current_num_threads() / num_ranks).max(1))
}

/// Runs `body` for each rank on a thread of its own, the first on this one, and waits for all. If one panics or fails, the others
/// are told at once.
pub fn run_ranks<T: Send>(
    ranks: Vec<Ranks>,
    body: impl Fn(Ranks) -> Result<(T, ExitReason), SessionError> + Sync,
) -> Vec<Outcome<T>> {
    let guarded = |ranks: Ranks| {
        let (comm, rank) = (ranks.everyone.clone(), ranks.number());
        match catch_unwind(AssertUnwindSafe(|| body(ranks))) {
            Ok(Ok(done)) => Some(Ok(done)),
            Ok(Err(error)) => {
                comm.abort(rank, &error.to_string());
                Some(Err(error))
            }
            Err(panic) => {
                comm.abort(rank, &engine::error::panic_message(&*panic));
                None
            }
        }
    };
    let mut ranks = ranks.into_iter();
    let Some(first) = ranks.next() else { return Vec::new() };
    std::thread::scope(|scope| {
        let guarded = &guarded;
        let mut others = Vec::new();
        for rank in ranks {
            let name = format!("rank {}", rank.number());
            let comm = rank.everyone.clone();
            let spawned = std::thread::Builder::new().name(name).spawn_scoped(scope, move || guarded(rank));
            if let Err(error) = &spawned {
                comm.abort(comm.rank(), &format!("the operating system gave no thread: {error}"));
            }
            others.push(spawned.ok());
        }
        let first = guarded(first);
        let others = others.into_iter().map(|thread| thread.and_then(|thread| thread.join().ok()).flatten());
        std::iter::once(first).chain(others).collect()
    })
}

/// Why a run of several ranks failed, if it did: the reason of the rank that failed first, which the others only lost.
pub fn cause<T>(outcomes: &[Outcome<T>]) -> Option<ExitReason> {
    if outcomes.len() < 2 {
        return None;
    }
    let reasons = || outcomes.iter().filter_map(|outcome| outcome.as_ref()?.as_ref().ok()).map(|(_, reason)| reason);
    let own = reasons().find(|reason| matches!(reason, ExitReason::Diverged(_) | ExitReason::Infeasible(_)));
    let lost = || reasons().find(|reason| matches!(reason, ExitReason::PeerLost(_)));
    let failed = (0..).zip(outcomes).find_map(|(rank, outcome)| match outcome {
        Some(Ok((_, ExitReason::Error(message)))) => Some(ExitReason::PeerLost(format!("rank {rank}: {message}"))),
        _ => None,
    });
    own.cloned().or(failed).or_else(|| lost().cloned())
}
