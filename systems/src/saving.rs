//! Checkpoints beside training. Between two steps each rank copies its part, and the next step begins; threads write, sync and sum
//! up the parts. Once a step, while that goes on, the ranks tell each other how far they are. When all parts are durable, the first
//! rank writes the manifest and moves `latest`, in a thread too. There is one at a time: the next, the end of the run and whoever asks
//! for a checkpoint wait for it.
//!
//! A part that cannot be written ends the run, with the checkpoint before as the last.

use std::{
    path::{Path, PathBuf},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    thread::JoinHandle,
    time::Duration,
};

use bevy_ecs::prelude::*;
use engine::{
    checkpoint::{self, Draft, Found, Keep, Listed},
    error::panic_message,
};
use serde::{Deserialize, Serialize};

use crate::{
    data::tokenizer::Tokenizer,
    model::Model,
    ranks::Ranks,
    save::{About, Snapshot},
    scene,
    train::Training,
};

/// How often it is looked whether what is waited for is done.
const POLL: Duration = Duration::from_millis(1);

/// A run's checkpoints.
#[derive(Resource)]
pub struct Saving {
    dir: PathBuf,
    keep: Keep,
    about: Arc<About>,
    ranks: Ranks,
    under_way: Option<UnderWay>,
    /// Step of the checkpoint that was begun last, or that the run went on from.
    step: Option<u64>,
    latest: Option<PathBuf>,
}

/// A job of a thread.
type Job<T> = JoinHandle<Result<T, checkpoint::Error>>;

/// A checkpoint that is not durable yet.
struct UnderWay {
    step: u64,
    /// Tells the thread that nobody wants it any more.
    given_up: Arc<AtomicBool>,
    writing: Option<Job<Vec<Listed>>>,
    /// This rank's files, once they are durable.
    files: Option<Vec<Listed>>,
    /// Of the first rank, until all parts are durable.
    draft: Option<Draft>,
    committing: Option<Job<PathBuf>>,
    is_committed: bool,
}

/// How far a rank is.
#[derive(Serialize, Deserialize)]
enum Vote {
    Writing,
    /// Its files are durable.
    Durable(Vec<Listed>),
    /// The checkpoint is.
    Committed,
}

impl Saving {
    /// Checkpoints in run directory `dir`, of which nothing is saved yet, or the step that it goes on from.
    pub fn new(
        world: &World,
        dir: &Path,
        section: Option<&scene::Checkpoint>,
        (tokenizer, scene_text): (Arc<Tokenizer>, String),
        from_step: Option<u64>,
    ) -> Self {
        let section = section.cloned().unwrap_or_default();
        let ranks = world.resource::<Ranks>().clone();
        let parts = ranks.layout.spoken_specs(&world.resource::<Model>().config);
        Saving {
            dir: dir.to_owned(),
            keep: Keep { last: section.keep_last, every_steps: section.keep_every_steps },
            about: Arc::new(About { tokenizer, scene_text, parts }),
            ranks,
            under_way: None,
            step: from_step,
            latest: from_step.map(|_| dir.join("latest")),
        }
    }

    /// The newest checkpoint that is durable.
    pub fn latest(&self) -> Option<&Path> {
        self.latest.as_deref()
    }

    fn begin(&mut self, world: &World) -> Result {
        self.finish()?;
        let step = world.resource::<Training>().step;
        let draft = if self.ranks.is_first() { Some(Draft::begin(&self.dir, step)?) } else { None };
        // From here on there is a folder for all.
        self.ranks.everyone.barrier()?;
        let snapshot = Snapshot::take(world, self.about.clone())?;
        let (folder, given_up) = (Draft::folder(&self.dir, step), Arc::new(AtomicBool::new(false)));
        let writing = {
            let (given_up, comm) = (given_up.clone(), self.ranks.comm.clone());
            let fill = move || {
                comm.watch().enter_phase("checkpoint_write", step);
                checkpoint::fill(&folder, |folder| snapshot.write(folder, &given_up))
            };
            spawn(&self.ranks, "write", fill)?
        };
        self.under_way = Some(UnderWay {
            step,
            given_up,
            writing: Some(writing),
            files: None,
            draft,
            committing: None,
            is_committed: false,
        });
        self.step = Some(step);
        Ok(())
    }

    /// Looks how far all ranks are, and does what is next.
    fn advance(&mut self, waits: bool) -> Result {
        let Some(save) = &mut self.under_way else { return Ok(()) };
        if let Err(error) = save.look(&self.ranks, waits) {
            self.under_way = None;
            return Err(error);
        }
        self.ranks.comm.watch().enter_phase("checkpoint_vote", save.step);
        let votes = self.ranks.exchange(&save.vote())?;
        if let Some(Vote::Committed) = votes.first() {
            self.latest = Some(checkpoint::path(&self.dir, save.step));
            self.under_way = None;
            return Ok(());
        }
        let parts: Option<Vec<_>> = votes.into_iter().map(Vote::files).collect();
        if let Some(parts) = parts
            && let Some(draft) = save.draft.take()
        {
            let keep = self.keep;
            let commit = move || draft.commit(parts.into_iter().flatten().collect(), keep);
            save.committing = Some(spawn(&self.ranks, "commit", commit)?);
        }
        Ok(())
    }

    fn finish(&mut self) -> Result {
        while self.under_way.is_some() {
            self.advance(true)?;
        }
        Ok(())
    }
}

impl UnderWay {
    /// Takes what threads have done; waits for them if asked to.
    fn look(&mut self, ranks: &Ranks, waits: bool) -> Result {
        let is_at_work = |save: &Self| {
            let writes = save.writing.as_ref().is_some_and(|job| !job.is_finished());
            writes || save.committing.as_ref().is_some_and(|job| !job.is_finished())
        };
        while waits && is_at_work(self) {
            // A disk that is slow is no rank that hangs.
            ranks.comm.watch().touch();
            std::thread::sleep(POLL);
        }
        // Once a rank is lost, others take away the folder that this one may still write into.
        let because = |error| ranks.comm.lost().map_or(error, Into::into);
        if let Some(job) = self.writing.take_if(|job| waits || job.is_finished()) {
            self.files = Some(join(job).map_err(because)?);
        }
        if let Some(job) = self.committing.take_if(|job| waits || job.is_finished()) {
            join(job).map_err(because)?;
            self.is_committed = true;
        }
        Ok(())
    }

    fn vote(&self) -> Vote {
        match &self.files {
            _ if self.is_committed => Vote::Committed,
            Some(files) => Vote::Durable(files.clone()),
            None => Vote::Writing,
        }
    }
}

impl Vote {
    fn files(self) -> Option<Vec<Listed>> {
        match self {
            Vote::Durable(files) => Some(files),
            Vote::Writing | Vote::Committed => None,
        }
    }
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        // Nobody writes into a draft's folder when it is removed; what is being committed becomes a checkpoint.
        self.given_up.store(true, Ordering::Relaxed);
        let _ = self.writing.take().map(JoinHandle::join);
        let _ = self.committing.take().map(JoinHandle::join);
    }
}

fn spawn<T: Send + 'static>(
    ranks: &Ranks,
    what: &str,
    work: impl FnOnce() -> Result<T, checkpoint::Error> + Send + 'static,
) -> Result<Job<T>> {
    let name = format!("{what} {}", ranks.number());
    let spawned = std::thread::Builder::new().name(name).spawn(work);
    spawned.map_err(|error| format!("the operating system gave no thread to save with: {error}").into())
}

fn join<T>(job: Job<T>) -> Result<T> {
    match job.join() {
        Ok(done) => Ok(done?),
        Err(panic) => Err(format!("saving panicked: {}", panic_message(&*panic)).into()),
    }
}

/// Begins a checkpoint of the steps done so far; the one before is durable then. All ranks do so between the same steps.
///
/// # Errors
/// If the one before or this one cannot be saved, or a rank is lost.
pub fn begin(world: &mut World) -> Result {
    world.resource_scope(|world, mut saving: Mut<Saving>| saving.begin(world))
}

/// Once a step: gets on with the checkpoint under way.
pub fn advance(mut saving: ResMut<Saving>) -> Result {
    saving.advance(false)
}

/// Waits until no checkpoint is under way. All ranks do so between the same steps.
///
/// # Errors
/// If it cannot be saved, or a rank is lost.
pub fn finish(world: &mut World) -> Result {
    world.resource_mut::<Saving>().finish()
}

/// Begins a checkpoint unless there is one of these steps, waits for it, and returns its folder.
///
/// # Errors
/// If it cannot be saved, or a rank is lost.
pub fn save(world: &mut World) -> Result<PathBuf> {
    let step = world.resource::<Training>().step;
    if world.resource::<Saving>().step != Some(step) {
        begin(world)?;
    }
    finish(world)?;
    let latest = world.resource::<Saving>().latest().map(Path::to_owned);
    latest.ok_or_else(|| "nothing is saved yet".into())
}

/// The checkpoint of run directory `dir` to go on from, as [`checkpoint::latest_valid`]; each rank reads a share of the files, and all
/// come to the same one. None where there never was any.
///
/// # Errors
/// If there are some and none is whole, ranks see different ones, a file cannot be read although it is there, the folder cannot be
/// listed, or a rank is lost: to begin anew would cost what may be mended.
pub fn latest_valid(ranks: &Ranks, dir: &Path) -> Result<Found> {
    let steps = checkpoint::candidates(dir)?;
    let all = ranks.exchange(&steps)?;
    if let Some((rank, other)) = (0..).zip(&all).find(|(_, other)| **other != all[0]) {
        return Err(format!(
            "rank {rank} sees checkpoints of the steps {other:?} in {}, rank 0 of {:?}: put the run directory (telemetry.dir) on \
             a file system that all ranks share",
            dir.display(),
            all[0]
        )
        .into());
    }
    let mut found = Found::default();
    for step in steps {
        let path = checkpoint::path(dir, step);
        let share = (ranks.number() as usize, all.len());
        let problem = checkpoint::verify_share(&path, step, share).err();
        let problem = problem.map(|error| (checkpoint::is_damage(&error), error.to_string()));
        // One that cannot be read says more than one that is damaged.
        match ranks.exchange(&problem)?.into_iter().flatten().min() {
            Some((true, damage)) => found.skipped.push((path, damage)),
            Some((false, why)) => {
                return Err(format!("{why}; to go on from an older checkpoint, move {} away", path.display()).into());
            }
            None => {
                (found.path, found.step) = (Some(path), step);
                break;
            }
        }
    }
    match found.skipped.first() {
        Some((path, damage)) if found.path.is_none() => Err(format!(
            "none of the {} checkpoints in {} is whole, and nothing was changed; {}: {damage}; `--fresh` in place of `--resume` \
             moves the run aside and begins anew",
            found.skipped.len(),
            dir.display(),
            path.display()
        )
        .into()),
        _ => Ok(found),
    }
}
