//! Batches that come again: what is launched in the same way each time becomes a graph, which is launched as one.
//!
//! The caller says which batches are the same by a key (a plan's tasks, each step), and nothing else: what a batch holds is found out, and
//! checked, each time. The first time its launches are kept. The second time they are compared, by kernel, grid and the bits of each
//! argument; runs of launches that were the same are recorded and replayed from then on. Each time a run's launches are compared with
//! those it was recorded from before it is replayed, so that a replay does what the launches would have done: their tensors' addresses
//! stay as long as the memory does, scratch that moves is noticed, and numbers are compared. A launch that was once another than before
//! (AdamW's step, a learning rate, a random seed, numbers that come with the launch) stays outside of runs for good, as ops on the host
//! and waits for other streams do; so a batch is recorded again no more often than it has launches.
//!
//! Events between the launches are moments of the graph: tasks keep the times of their own. While somebody has not read those of the
//! last replay, a run is launched one by one, since another replay would overwrite them.

use std::{collections::BTreeMap, mem, ops::Range, sync::Arc};

use super::{Message, Worker};
use crate::{
    cuda::Graph,
    error::Result,
    ptx::{Item, Launch},
};

/// Kernels that a run has at least: of fewer, a replay costs the host as much as the launches.
const LEAST_KERNELS: usize = 4;

/// Batches that are kept; a plan has some dozens.
const MOST_BATCHES: usize = 4096;

/// All batches of a stream that came with a key.
#[derive(Default)]
pub(super) struct Repeats(BTreeMap<u64, Batch>);

/// What is known of a batch, message by message.
#[derive(Default)]
struct Batch {
    known: Vec<Known>,
    /// Ascending, once the batch came twice.
    runs: Option<Vec<Run>>,
}

enum Known {
    /// The launches when they last came, as long as they are the same.
    Launch(Arc<str>, Vec<Launch>),
    /// Others each time.
    Changes,
    Event,
    /// An op on the host or a wait.
    Other,
}

/// Messages that are one graph.
struct Run {
    messages: Range<usize>,
    graph: Option<Graph>,
}

impl Known {
    fn of(message: &Message) -> Self {
        match message {
            Message::Launch { launches, .. } if launches.iter().any(|launch| !launch.repeats()) => Known::Changes,
            // Filled when the message is done with.
            Message::Launch { task, .. } => Known::Launch(task.clone(), vec![]),
            Message::Record(_) => Known::Event,
            Message::Batch(_) | Message::Again { .. } | Message::Run { .. } | Message::Wait(_) => Known::Other,
        }
    }

    /// Whether the message is as it was, so far as that can be.
    fn fits(&self, message: &Message) -> bool {
        match (self, message) {
            (Known::Launch(of, were), Message::Launch { task, launches }) => {
                of == task && were.len() == launches.len() && were.iter().zip(launches).all(|(a, b)| a.is_same(b))
            }
            (Known::Changes, Message::Launch { .. }) | (Known::Event, Message::Record(_)) => true,
            (Known::Other, message) => !matches!(message, Message::Launch { .. } | Message::Record(_)),
            _ => false,
        }
    }

    fn num_kernels(&self) -> usize {
        if let Known::Launch(_, launches) = self { launches.len() } else { 0 }
    }
}

impl Batch {
    /// Notes which of the messages are not as they were; whether the batch has the form that it had.
    fn compare(&mut self, messages: &[Message]) -> bool {
        if self.known.len() != messages.len() {
            return false;
        }
        let mut changed = false;
        for (known, message) in self.known.iter_mut().zip(messages) {
            if known.fits(message) {
                continue;
            }
            if !matches!((&*known, message), (Known::Launch(..), Message::Launch { .. })) {
                return false;
            }
            *known = Known::Changes;
            changed = true;
        }
        if changed || self.runs.is_none() {
            self.find_runs();
        }
        true
    }

    /// The longest runs of launches that stay, and the events between them. Graphs of runs that are as they were stay.
    fn find_runs(&mut self) {
        let mut before: BTreeMap<(usize, usize), Option<Graph>> = self
            .runs
            .take()
            .into_iter()
            .flatten()
            .map(|run| ((run.messages.start, run.messages.end), run.graph))
            .collect();
        let inside = |known: &Known| matches!(known, Known::Launch(..) | Known::Event);
        let mut runs = Vec::new();
        let mut start = 0;
        for part in self.known.split_inclusive(|known| !inside(known)) {
            let len = part.iter().take_while(|known| inside(known)).count();
            if part.iter().map(Known::num_kernels).sum::<usize>() >= LEAST_KERNELS {
                let graph = before.remove(&(start, start + len)).flatten();
                runs.push(Run { messages: start..start + len, graph });
            }
            start += part.len();
        }
        self.runs = Some(runs);
    }
}

impl Worker {
    /// A batch that may have come before.
    pub(super) fn again(&mut self, key: u64, messages: Vec<Message>) {
        if self.lane.is_none() || self.is_over() {
            return messages.into_iter().for_each(|message| self.handle(message));
        }
        if self.repeats.0.len() >= MOST_BATCHES {
            self.repeats.0.clear();
        }
        let mut batch = self.repeats.0.remove(&key).unwrap_or_default();
        if !batch.compare(&messages) {
            batch = Batch { known: messages.iter().map(Known::of).collect(), runs: None };
        }
        let mut messages: Vec<Option<Message>> = messages.into_iter().map(Some).collect();
        let mut runs = batch.runs.take();
        let mut done = 0;
        for run in runs.iter_mut().flatten() {
            let Range { start, end } = run.messages.clone();
            self.each(&mut batch.known[done..start], &mut messages[done..start]);
            if !self.replay(run, &batch.known, &mut messages[start..end]) {
                self.each(&mut batch.known[start..end], &mut messages[start..end]);
            }
            done = end;
        }
        self.each(&mut batch.known[done..], &mut messages[done..]);
        batch.runs = runs;
        self.repeats.0.insert(key, batch);
    }

    /// Messages one by one; what they launch is kept.
    fn each(&mut self, known: &mut [Known], messages: &mut [Option<Message>]) {
        for (known, message) in known.iter_mut().zip(messages) {
            match (known, message.take()) {
                (_, None) => {}
                (Known::Launch(_, kept), Some(Message::Launch { task, launches })) => {
                    self.launch(&task, &launches);
                    *kept = launches;
                }
                (_, Some(message)) => self.handle(message),
            }
        }
    }

    /// Does the messages as one; `false` if they have to be done one by one.
    fn replay(&mut self, run: &mut Run, known: &[Known], messages: &mut [Option<Message>]) -> bool {
        if self.is_over() || run.graph.as_ref().is_some_and(Graph::is_watched) {
            return false;
        }
        let marks = self.graph(run, known);
        let Ok(marks) = marks else {
            self.note(marks.map(drop));
            return false;
        };
        let mut marks = marks.into_iter();
        let mut mark = None;
        for message in messages {
            match message.take() {
                Some(Message::Record(event)) => {
                    // Events with nothing between them are one moment.
                    mark = mark.or_else(|| marks.next());
                    if let Some(mark) = &mark {
                        event.launched(mark.clone(), &self.failure, mem::take(&mut self.waited));
                    }
                }
                _ => mark = None,
            }
        }
        true
    }

    /// Launches the run's graph, which is recorded if it is not there or not right any more.
    fn graph(&mut self, run: &mut Run, known: &[Known]) -> Result<Vec<Arc<crate::cuda::Mark>>> {
        let Some(lane) = &mut self.lane else { return Ok(vec![]) };
        let graph = match run.graph.take().filter(|graph| graph.is_of(lane)) {
            Some(graph) => graph,
            None => {
                let mut items = Vec::new();
                for known in &known[run.messages.clone()] {
                    match known {
                        Known::Launch(task, launches) => items.push(Item::Launch(task, launches)),
                        _ if matches!(items.last(), Some(Item::Moment)) => {}
                        _ => items.push(Item::Moment),
                    }
                }
                lane.capture(&self.memory, &items)?
            }
        };
        let marks = lane.replay(&graph);
        run.graph = Some(graph);
        marks
    }
}
