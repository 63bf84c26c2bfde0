//! The thread of a stream: runs what it is handed, one after the other, or launches it on the stream's GPU.

use std::{
    num::NonZeroUsize,
    panic::{AssertUnwindSafe, catch_unwind},
    sync::{Arc, mpsc},
};

use super::{Event, Here, Message, Waited, event::Failure, repeat::Repeats};
use crate::{
    cuda::Lane,
    error::{Error, Result},
    memory::Memory,
    ptx::Launch,
};

pub(super) struct Worker {
    pub(super) name: String,
    pub(super) memory: Memory,
    pub(super) failure: Failure,
    /// Since the last event.
    pub(super) waited: Waited,
    /// Where launches go, if the memory is a GPU's.
    pub(super) lane: Option<Lane>,
    pub(super) repeats: Repeats,
}

/// A pool with the calling thread in it, if one is asked for. Parallel loops on this thread then use it.
pub(super) fn own_pool(
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
    pub(super) fn run(&mut self, receiver: &mpsc::Receiver<Message>) {
        while let Ok(message) = receiver.recv() {
            self.handle(message);
        }
    }

    /// After a failure the stream drains without running: events still fire, so nobody hangs.
    fn has_failed(&self) -> bool {
        self.failure.lock().is_some() || self.memory.failure().is_err()
    }

    /// The same, or a kernel has found something wrong, which whoever waits next is told.
    pub(super) fn is_over(&self) -> bool {
        self.lane.as_ref().is_some_and(Lane::has_fault) || self.has_failed()
    }

    pub(super) fn handle(&mut self, message: Message) {
        match message {
            Message::Batch(messages) => messages.into_iter().for_each(|message| self.handle(message)),
            Message::Again { key, messages } => self.again(key, messages),
            Message::Record(event) => self.record(&event),
            Message::Wait(event) => self.wait(&event),
            Message::Run { task, op, job } => {
                if self.is_over() {
                    return;
                }
                let mut here = Here::new(&self.memory, self.lane.as_mut(), op, &task);
                match catch_unwind(AssertUnwindSafe(|| job(&mut here))) {
                    Ok(waited) => self.waited += waited,
                    Err(panic) => self.fail(&task, panic),
                }
            }
            Message::Launch { task, launches } => self.launch(&task, &launches),
        }
    }

    pub(super) fn launch(&mut self, task: &Arc<str>, launches: &[Launch]) {
        if self.is_over() {
            return;
        }
        let Some(lane) = &mut self.lane else { return };
        match catch_unwind(AssertUnwindSafe(|| lane.launch(&self.memory, task, launches))) {
            Ok(launched) => self.note(launched),
            Err(panic) => self.fail(task, panic),
        }
    }

    fn record(&mut self, event: &Event) {
        let waited = std::mem::take(&mut self.waited);
        match self.lane.as_ref().filter(|_| !self.has_failed()).map(Lane::record) {
            None => event.signal(waited),
            Some(Ok(mark)) => event.launched(Arc::new(mark), &self.failure, waited),
            Some(Err(e)) => {
                self.note(Err(e));
                event.signal(waited);
            }
        }
    }

    fn wait(&mut self, event: &Event) {
        let Some(lane) = &self.lane else {
            event.synchronize();
            return;
        };
        if let Some(mark) = event.mark() {
            let waits = lane.wait(&mark);
            self.note(waits);
        }
    }

    pub(super) fn note(&self, result: Result<()>) {
        if let Err(e) = result {
            self.failure.lock().get_or_insert(e);
        }
    }

    fn fail(&self, task: &Arc<str>, panic: Box<dyn std::any::Any + Send>) {
        let message = panic
            .downcast_ref::<String>()
            .cloned()
            .or_else(|| panic.downcast_ref::<&str>().map(|s| (*s).to_owned()))
            .unwrap_or_else(|| "a panic without a message".to_owned());
        let error = match panic.downcast::<Error>() {
            Ok(error) => *error,
            Err(_) => Error::Task { stream: self.name.clone(), task: task.to_string(), message },
        };
        *self.failure.lock() = Some(error);
    }
}
