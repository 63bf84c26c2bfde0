//! Streams: named FIFO queues of ops with CUDA's semantics, so that ordering bugs show on a CPU.
//!
//! A CPU stream is a thread; the host enqueues closures and runs ahead. Streams are ordered by events only. In debug builds a
//! [`Hazards`] tracker, shared by the streams of a device, knows the last writer and readers of each buffer and reports an
//! access that no event orders, whether or not the threads happened to collide.

mod hazards;

use std::{
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
    thread::JoinHandle,
};

use parking_lot::{Condvar, Mutex};

pub use hazards::Hazards;
use hazards::VectorClock;

use crate::{
    clock,
    cost::Cost,
    error::{Error, Result},
    memory::Memory,
    tensor::Tensor,
};

/// A moment in a stream: reached when all that was enqueued before it is done.
#[derive(Clone)]
pub struct Event {
    state: Arc<EventState>,
    /// What is ordered before whoever waits for this event: per stream, the number of ops.
    seen: Arc<VectorClock>,
}

/// What ops that need other ranks waited for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Waited {
    /// Time that passed until the other ranks were there, before anything was copied.
    pub nanos: u64,
    /// Of ops that share out work: how much of it came to this rank, and the most that came to any.
    pub load: Option<(u64, u64)>,
}

impl std::ops::AddAssign for Waited {
    fn add_assign(&mut self, o: Waited) {
        self.nanos += o.nanos;
        self.load = match (self.load, o.load) {
            (Some((mine, most)), Some((m, n))) => Some((mine + m, most + n)),
            (a, b) => a.or(b),
        };
    }
}

struct EventState {
    done: Mutex<Option<(u64, Waited)>>,
    reached: Condvar,
}

impl Event {
    fn new(seen: VectorClock) -> Self {
        Event { state: Arc::new(EventState { done: Mutex::new(None), reached: Condvar::new() }), seen: Arc::new(seen) }
    }

    fn signal(&self, waited: Waited) {
        *self.state.done.lock() = Some((clock::now_nanos(), waited));
        self.state.reached.notify_all();
    }

    /// Blocks until the event is reached; returns when that was, in nanoseconds of [`clock::now_nanos`].
    pub fn synchronize(&self) -> u64 {
        let mut done = self.state.done.lock();
        loop {
            match *done {
                Some((nanos, _)) => return nanos,
                None => self.state.reached.wait(&mut done),
            }
        }
    }

    /// When the event was reached, if it was.
    pub fn done_nanos(&self) -> Option<u64> {
        self.state.done.lock().map(|(nanos, _)| nanos)
    }

    /// What the ops since the event before it on its stream waited for other ranks, in sum; nothing if it was not reached yet.
    pub fn waited(&self) -> Waited {
        self.state.done.lock().map(|(_, waited)| waited).unwrap_or_default()
    }
}

type Job = Box<dyn FnOnce(&Memory) -> Waited + Send>;

enum Message {
    Batch(Vec<Message>),
    Run { task: Arc<str>, job: Job },
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
    /// Only ever used through `&mut self`; the lock makes the stream `Sync`, so that it can be a component.
    batch: Mutex<Option<Vec<Message>>>,
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

enum Backend {
    Cpu {
        sender: Option<mpsc::SyncSender<Message>>,
        thread: Option<JoinHandle<()>>,
        failure: Arc<Mutex<Option<Error>>>,
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
        Self::build(name, memory, hazards, None)
    }

    /// The same, but parallel loops of its ops run on `num_threads` threads of the stream's own, its worker among them: several
    /// ranks on one machine then have cores of their own. Results do not depend on the number.
    pub fn with_threads(
        name: &str,
        memory: &Memory,
        hazards: &Arc<Hazards>,
        num_threads: NonZeroUsize,
    ) -> Result<Self> {
        Self::build(name, memory, hazards, Some(num_threads))
    }

    fn build(name: &str, memory: &Memory, hazards: &Arc<Hazards>, num_threads: Option<NonZeroUsize>) -> Result<Self> {
        let index = { hazards.add_stream() };
        let backend = match memory.device() {
            crate::device::Device::Meta => Backend::Meta,
            crate::device::Device::Cpu => Self::spawn(name, memory, num_threads)?,
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
            batch: Mutex::new(None),
        })
    }

    fn spawn(name: &str, memory: &Memory, num_threads: Option<NonZeroUsize>) -> Result<Backend> {
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
        };
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
        Ok(Backend::Cpu { sender: Some(sender), thread: Some(thread), failure })
    }

    /// Name of the stream and its thread.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The memory its ops work on.
    pub fn memory(&self) -> &Memory {
        &self.memory
    }

    /// Ops launched from here on belong to `task`; errors name it.
    pub fn begin_task(&mut self, task: &Arc<str>) {
        self.task = task.clone();
    }

    /// Enqueues an op that reads and writes the given tensors. On `Meta` nothing runs.
    pub fn launch(&mut self, reads: &[Tensor], writes: &[Tensor], job: impl FnOnce(&Memory) + Send + 'static) {
        self.launch_waiting(reads, writes, move |memory| {
            job(memory);
            Waited::default()
        });
    }

    /// [`Stream::launch`] for an op that may wait for other ranks; what it returns is summed up for the next event.
    pub fn launch_waiting(
        &mut self,
        reads: &[Tensor],
        writes: &[Tensor],
        job: impl FnOnce(&Memory) -> Waited + Send + 'static,
    ) {
        if let Some(recording) = &mut self.recording {
            recording.reads.extend(reads);
            recording.writes.extend(writes);
            return;
        }
        self.clock[self.index] += 1;
        if cfg!(debug_assertions) {
            self.hazards.check(self.index, &self.clock, &self.task, reads, writes);
        }
        if let Backend::Cpu { .. } = self.backend {
            self.send(Message::Run { task: self.task.clone(), job: Box::new(job) });
        }
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
        self.recording.is_none() && matches!(self.backend, Backend::Cpu { .. })
    }

    /// An event that is reached when all that was enqueued so far is done.
    pub fn record(&mut self) -> Event {
        let event = Event::new(self.clock.clone());
        match self.backend {
            Backend::Cpu { .. } => self.send(Message::Record(event.clone())),
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
        if let Backend::Cpu { .. } = self.backend {
            self.send(Message::Wait(event.clone()));
        }
    }

    /// Blocks until the stream is empty; the first failure since the last call is returned here.
    pub fn synchronize(&mut self) -> Result<()> {
        self.finish_batch();
        self.record().synchronize();
        self.failure()
    }

    /// The first failure of an op since the last call, if any; does not block.
    pub fn failure(&self) -> Result<()> {
        match &self.backend {
            Backend::Cpu { failure, .. } => failure.lock().take().map_or(Ok(()), Err),
            Backend::Meta => Ok(()),
        }
    }

    /// From here to [`Stream::finish_batch`] ops are handed to the stream some dozens at a time: waking its thread for each
    /// costs more than a small op takes. No other stream may wait for an event of a batch before the batch is finished.
    pub fn start_batch(&mut self) {
        self.batch.get_mut().get_or_insert_default();
    }

    /// Hands over what is left of a batch.
    pub fn finish_batch(&mut self) {
        if let Some(batch) = self.batch.get_mut().take().filter(|batch| !batch.is_empty()) {
            self.hand_over(Message::Batch(batch));
        }
    }

    fn send(&mut self, message: Message) {
        let Some(batch) = self.batch.get_mut() else { return self.hand_over(message) };
        batch.push(message);
        if batch.len() >= BATCH_LEN {
            let full = std::mem::take(batch);
            self.hand_over(Message::Batch(full));
        }
    }

    fn hand_over(&self, message: Message) {
        if let Backend::Cpu { sender: Some(sender), .. } = &self.backend {
            // The worker outlives every sender: it only ends when the sender is dropped.
            let _ = sender.send(message);
        }
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        if let Backend::Cpu { sender, thread, .. } = &mut self.backend {
            drop(sender.take());
            if let Some(thread) = thread.take() {
                let _ = thread.join();
            }
        }
    }
}

struct Worker {
    name: String,
    memory: Memory,
    failure: Arc<Mutex<Option<Error>>>,
    /// Since the last event.
    waited: Waited,
}

/// A pool with the calling thread in it, if one is asked for. Parallel loops on this thread then use it.
fn own_pool(
    name: &str,
    num_threads: Option<NonZeroUsize>,
) -> Result<Option<rayon::ThreadPool>, rayon::ThreadPoolBuildError> {
    let Some(num_threads) = num_threads else { return Ok(None) };
    let name = name.to_owned();
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(num_threads.get())
        .use_current_thread()
        .thread_name(move |i| format!("{name}.{i}"));
    pool.build().map(Some)
}

impl Worker {
    fn run(&mut self, receiver: &mpsc::Receiver<Message>) {
        while let Ok(message) = receiver.recv() {
            self.handle(message);
        }
    }

    fn handle(&mut self, message: Message) {
        match message {
            Message::Batch(messages) => messages.into_iter().for_each(|message| self.handle(message)),
            Message::Record(event) => event.signal(std::mem::take(&mut self.waited)),
            Message::Wait(event) => {
                event.synchronize();
            }
            Message::Run { task, job } => {
                // After a failure the stream drains without running: events still fire, so nobody hangs.
                if self.failure.lock().is_some() {
                    return;
                }
                match catch_unwind(AssertUnwindSafe(|| job(&self.memory))) {
                    Ok(waited) => self.waited += waited,
                    Err(panic) => self.fail(&task, panic),
                }
            }
        }
    }

    fn fail(&self, task: &str, panic: Box<dyn std::any::Any + Send>) {
        let message = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_else(|| "a panic without a message".to_owned());
        let error = match panic.downcast::<Error>() {
            Ok(error) => *error,
            Err(_) => Error::Task { stream: self.name.clone(), task: task.to_owned(), message },
        };
        *self.failure.lock() = Some(error);
    }
}

#[cfg(test)]
mod tests;
