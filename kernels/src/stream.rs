//! Streams: named FIFO queues of ops with CUDA's semantics, so that ordering bugs show on a CPU.
//!
//! A CPU stream is a thread; the host enqueues closures and runs ahead. Streams are ordered by events only. In debug builds a
//! [`Hazards`] tracker, shared by the streams of a device, knows the last writer and readers of each buffer and reports an
//! access that no event orders, whether or not the threads happened to collide.
//!
//! On a GPU the thread launches kernels on a CUDA stream instead, and its events are the GPU's. An op without a kernel for what it is
//! given runs on the thread, between what was launched before and after it, on copies of its tensors; it is counted by its name.

mod event;
mod hazards;
mod here;
mod repeat;
mod worker;

use std::{
    num::NonZeroUsize,
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

pub use event::{Event, Waited};
pub use hazards::Hazards;
use hazards::VectorClock;
pub use here::Here;
use parking_lot::Mutex;
use repeat::Repeats;
use worker::{Worker, own_pool};

use crate::{
    cost::Cost,
    cuda::Lane,
    device::{Device, Share, Target},
    error::{Error, Result},
    memory::Memory,
    ptx::{Launch, tuning::Table},
    tensor::Tensor,
};

type Job = Box<dyn FnOnce(&mut Here<'_>) -> Waited + Send>;

enum Message {
    Batch(Vec<Message>),
    /// The batch that comes again under this key.
    Again {
        key: u64,
        messages: Vec<Message>,
    },
    /// On the stream's thread, which may put more on the GPU.
    Run {
        task: Arc<str>,
        op: &'static str,
        job: Job,
    },
    /// On the GPU.
    Launch {
        task: Arc<str>,
        launches: Vec<Launch>,
    },
    Record(Event),
    Wait(Event),
}

/// A FIFO of ops on one device.
pub struct Stream {
    name: String,
    memory: Memory,
    backend: Backend,
    task: Arc<str>,
    hazards: Arc<Hazards>,
    index: usize,
    clock: VectorClock,
    recording: Option<Recording>,
    batch_invariant: bool,
    /// Only ever used through `&mut self`; the lock makes the stream `Sync`, so that it can be a component.
    batch: Mutex<Option<Batch>>,
}

/// What is to be handed over.
#[derive(Default)]
struct Batch {
    messages: Vec<Message>,
    /// If it is to come again, and whole.
    key: Option<u64>,
}

/// What the ops of a task touch and cost, found by launching them without running them.
#[derive(Clone, Debug, Default)]
pub struct Recording {
    /// Tensors read, in order, repeats kept.
    pub reads: Vec<Tensor>,
    /// Tensors written, in order, repeats kept.
    pub writes: Vec<Tensor>,
    /// Sum over the ops.
    pub cost: Cost,
    /// Meetings with other ranks, in order.
    pub rendezvous: Vec<Rendezvous>,
}

/// An op that needs another rank to do its part. Tags are the caller's; ranks are those of the whole run.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Rendezvous {
    /// A message leaves.
    Send {
        /// Rank that it goes to.
        to: u32,
        /// Its tag.
        tag: u64,
    },
    /// A message is waited for.
    Receive {
        /// Rank that it comes from.
        from: u32,
        /// Its tag.
        tag: u64,
    },
    /// All of a group wait for each other.
    Collective {
        /// The group, ascending.
        group: Arc<[u32]>,
        /// The call's tag.
        tag: u64,
    },
}

/// What of its device a stream's ops run on.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Part {
    /// Parallel loops run on so many threads of the stream's own, its worker among them: several ranks on one machine then have cores of
    /// their own. Without a number they share the process' pool.
    pub num_threads: Option<NonZeroUsize>,
    /// Multiprocessors of a GPU that its launches may occupy. A stream that has some for itself goes before others.
    pub share: Share,
}

enum Backend {
    Thread {
        sender: Option<mpsc::SyncSender<Message>>,
        thread: Option<JoinHandle<()>>,
        failure: event::Failure,
        /// What kernels are chosen by, if the thread launches them.
        target: Option<Target>,
    },
    Meta,
}

/// Messages handed over at a time.
const BATCH_LEN: usize = 48;

/// Ops in flight per stream before the host waits: far more than a step has, so a step never blocks on it.
const QUEUE_LEN: usize = 1 << 16;

impl Stream {
    /// A stream over `memory`; streams that share `hazards` are checked against each other in debug builds. Parallel loops of
    /// its ops run on the process' pool of threads.
    pub fn new(name: &str, memory: &Memory, hazards: &Arc<Hazards>) -> Result<Self> {
        Self::with_part(name, memory, hazards, Part::default())
    }

    /// The same with a part of the device. Results do not depend on it.
    pub fn with_part(name: &str, memory: &Memory, hazards: &Arc<Hazards>, part: Part) -> Result<Self> {
        let index = hazards.add_stream();
        let backend = match memory.device() {
            Device::Meta => Backend::Meta,
            Device::Cpu | Device::Cuda(_) => Self::spawn(name, memory, part)?,
        };
        Ok(Stream {
            name: name.to_owned(),
            memory: memory.clone(),
            backend,
            task: Arc::from("set-up"),
            hazards: hazards.clone(),
            index,
            clock: vec![0; index + 1],
            recording: None,
            batch_invariant: false,
            batch: Mutex::new(None),
        })
    }

    fn spawn(name: &str, memory: &Memory, Part { num_threads, share }: Part) -> Result<Backend> {
        let (sender, receiver) = mpsc::sync_channel::<Message>(QUEUE_LEN);
        let failure = Arc::new(Mutex::new(None));
        let no_thread = |e: &dyn std::fmt::Display| Error::Task {
            stream: name.to_owned(),
            task: "start".into(),
            message: format!("the operating system gave no thread: {e}"),
        };
        let mut worker = Worker {
            name: name.to_owned(),
            memory: memory.clone(),
            failure: failure.clone(),
            waited: Waited::default(),
            lane: memory.gpu().map(|gpu| Lane::new(gpu, name, share)).transpose()?,
            repeats: Repeats::default(),
        };
        let target = memory.gpu().map(|gpu| Target { share, ..gpu.target() });
        let (started, pool) = mpsc::sync_channel(1);
        let run = move || match own_pool(&worker.name, num_threads) {
            Ok(pool) => {
                let _ = started.send(Ok(()));
                worker.run(&receiver);
                drop(pool);
            }
            Err(e) => {
                let _ = started.send(Err(e.to_string()));
            }
        };
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(run).map_err(|e| no_thread(&e))?;
        if let Ok(Err(e)) = pool.recv() {
            return Err(no_thread(&e));
        }
        Ok(Backend::Thread { sender: Some(sender), thread: Some(thread), failure, target })
    }

    /// Name of the stream and its thread.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The memory its ops work on.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Products launched from here on have the tiles of `table` where it has their sizes; elsewhere than on a GPU this says nothing.
    ///
    /// # Errors
    /// If the table was measured on another device.
    pub fn set_tuning(&mut self, table: &Arc<Table>) -> Result<()> {
        if let Some(gpu) = self.memory.gpu() {
            table.check(gpu.info())?;
        }
        if let Backend::Thread { target: Some(target), .. } = &mut self.backend {
            target.tuning = Some(table.clone());
        }
        Ok(())
    }

    /// Whether the bits of a row of a product must follow from that row alone, on processors: from its own token, and not from the tokens
    /// beside it. Products of many rows are slower for it, so training does without.
    pub fn set_batch_invariant(&mut self, batch_invariant: bool) {
        self.batch_invariant = batch_invariant;
    }

    /// See [`Stream::set_batch_invariant`].
    pub fn is_batch_invariant(&self) -> bool {
        self.batch_invariant
    }

    /// Ops launched from here on belong to `task`; errors name it.
    pub fn begin_task(&mut self, task: &Arc<str>) {
        self.task = task.clone();
    }

    /// Enqueues an op that reads and writes the given tensors. On `Meta` nothing runs.
    pub fn launch<F: FnOnce(&Memory) + Send + 'static>(&mut self, reads: &[Tensor], writes: &[Tensor], job: F) {
        self.launch_kernel(reads, writes, |_| None, job);
    }

    /// [`Stream::launch`] for an op that may wait for other ranks, told of as `op`; what it returns is summed up for the next event. On a
    /// GPU it is done by the GPU or by the host, as the job finds it.
    pub fn launch_waiting(
        &mut self,
        op: &'static str,
        reads: &[Tensor],
        writes: &[Tensor],
        job: impl FnOnce(&mut Here<'_>) -> Waited + Send + 'static,
    ) {
        if self.enlist(reads, writes) {
            self.run(op, job);
        }
    }

    /// [`Stream::launch`] for an op with kernels: on a GPU these are launched, if there are any for what the op is given, and the job
    /// is not run.
    pub fn launch_kernel<F: FnOnce(&Memory) + Send + 'static>(
        &mut self,
        reads: &[Tensor],
        writes: &[Tensor],
        kernels: impl FnOnce(&Target) -> Option<Vec<Launch>>,
        job: F,
    ) {
        if !self.enlist(reads, writes) {
            return;
        }
        let target = match &self.backend {
            Backend::Thread { target, .. } => target.as_ref(),
            Backend::Meta => None,
        };
        let launches = target.and_then(|on| kernels(on).and_then(|launches| within(on, launches)));
        match launches {
            Some(launches) => self.send(Message::Launch { task: self.task.clone(), launches }),
            None => self.run(op_name::<F>(), move |here| {
                job(here.host().unwrap_or_else(|error| error.raise()));
                Waited::default()
            }),
        }
    }

    /// Notes what the next op touches; whether it is to run.
    fn enlist(&mut self, reads: &[Tensor], writes: &[Tensor]) -> bool {
        if let Some(recording) = &mut self.recording {
            recording.reads.extend(reads);
            recording.writes.extend(writes);
            return false;
        }
        self.clock[self.index] += 1;
        if cfg!(debug_assertions) {
            self.hazards.check(self.index, &self.clock, &self.task, reads, writes);
        }
        matches!(self.backend, Backend::Thread { .. })
    }

    fn run(&mut self, op: &'static str, job: impl FnOnce(&mut Here<'_>) -> Waited + Send + 'static) {
        self.send(Message::Run { task: self.task.clone(), op, job: Box::new(job) });
    }

    /// From here to [`Stream::finish_recording`] ops check their contracts and note what they touch; nothing runs.
    pub fn start_recording(&mut self) {
        self.recording = Some(Recording::default());
    }

    /// Ends a recording and returns it.
    pub fn finish_recording(&mut self) -> Recording {
        self.recording.take().unwrap_or_default()
    }

    /// Adds an op's cost to a recording; ops call it beside `launch`.
    pub fn account(&mut self, cost: Cost) {
        if let Some(recording) = &mut self.recording {
            recording.cost += cost.of_one_op();
        }
    }

    /// Adds a meeting with other ranks to a recording; ops between ranks call it beside `launch`.
    pub fn meet(&mut self, rendezvous: impl FnOnce() -> Rendezvous) {
        if let Some(recording) = &mut self.recording {
            recording.rendezvous.push(rendezvous());
        }
    }

    /// Whether what is launched now will run.
    pub fn runs(&self) -> bool {
        self.recording.is_none() && matches!(self.backend, Backend::Thread { .. })
    }

    /// An event that is reached when all that was enqueued so far is done.
    pub fn record(&mut self) -> Event {
        let event = Event::new(self.clock.clone());
        match self.backend {
            Backend::Thread { .. } => self.send(Message::Record(event.clone())),
            Backend::Meta => event.signal(Waited::default()),
        }
        event
    }

    /// What is enqueued from here on runs after `event`.
    pub fn wait(&mut self, event: &Event) {
        if self.clock.len() < event.seen.len() {
            self.clock.resize(event.seen.len(), 0);
        }
        for (mine, theirs) in self.clock.iter_mut().zip(event.seen.iter()) {
            *mine = (*mine).max(*theirs);
        }
        if let Backend::Thread { .. } = self.backend {
            self.send(Message::Wait(event.clone()));
        }
    }

    /// Blocks until the stream is empty; the first failure since the last call is returned here.
    pub fn synchronize(&mut self) -> Result<()> {
        self.finish_batch();
        self.record().synchronize();
        self.failure()
    }

    /// The first failure of an op since the last call, or the memory's, if any; does not block.
    pub fn failure(&self) -> Result<()> {
        match &self.backend {
            Backend::Thread { failure, .. } => failure.lock().take().map_or_else(|| self.memory.failure(), Err),
            Backend::Meta => Ok(()),
        }
    }

    /// What was enqueued and has not begun is not run: the stream drains, its events are reached, and [`Stream::failure`] is
    /// [`Error::Halted`], after which the stream can be used again. What a GPU has already taken, it runs.
    pub fn halt(&self) {
        if let Backend::Thread { failure, .. } = &self.backend {
            failure.lock().get_or_insert(Error::Halted);
        }
    }

    /// From here to [`Stream::finish_batch`] ops are handed to the stream some dozens at a time: waking its thread for each
    /// costs more than a small op takes. No other stream may wait for an event of a batch before the batch is finished.
    pub fn start_batch(&mut self) {
        self.batch.get_mut().get_or_insert_default();
    }

    /// The same for a batch of some dozens of tasks that is handed over whole, and comes again under `key`, most likely with the same
    /// ops: on a GPU those that are the same each time become a graph. The key is another for each batch that
    /// comes again on this stream.
    pub fn start_repeating_batch(&mut self, key: u64) {
        self.finish_batch();
        *self.batch.get_mut() = Some(Batch { messages: Vec::new(), key: Some(key) });
    }

    /// Hands over what is left of a batch.
    pub fn finish_batch(&mut self) {
        let Some(Batch { messages, key }) = self.batch.get_mut().take() else { return };
        match key {
            _ if messages.is_empty() => {}
            Some(key) => self.hand_over(Message::Again { key, messages }),
            None => self.hand_over(Message::Batch(messages)),
        }
    }

    fn send(&mut self, message: Message) {
        let Some(batch) = self.batch.get_mut() else { return self.hand_over(message) };
        batch.messages.push(message);
        if batch.key.is_none() && batch.messages.len() >= BATCH_LEN {
            let full = std::mem::take(&mut batch.messages);
            self.hand_over(Message::Batch(full));
        }
    }

    fn hand_over(&self, message: Message) {
        if let Backend::Thread { sender: Some(sender), .. } = &self.backend {
            // The worker outlives every sender: it only ends when the sender is dropped.
            let _ = sender.send(message);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Backend::Thread { sender, thread, .. } = &mut self.backend {
            drop(sender.take());
            if let Some(thread) = thread.take() {
                let _ = thread.join();
            }
        }
    }
}

/// Launches as a stream of that target has them, if its device has what they need.
fn within(on: &Target, launches: Vec<Launch>) -> Option<Vec<Launch>> {
    if !launches.iter().all(|launch| on.fits(&launch.kernel)) {
        return None;
    }
    let most = on.most_blocks().unwrap_or(u32::MAX);
    Some(launches.into_iter().map(|launch| launch.of_at_most(most)).collect())
}

/// How an op is called where it is told of: the function that made the job, below `ops`.
fn op_name<F>() -> &'static str {
    let name = std::any::type_name::<F>();
    let name = name.strip_suffix("::{{closure}}").unwrap_or(name);
    name.split_once("::ops::").map_or(name, |(_, op)| op)
}

#[cfg(test)]
mod tests;
