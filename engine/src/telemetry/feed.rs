//! Where snapshots go: to any number of listeners, who may come and go while a run goes on.
//!
//! Each listener has a bounded channel that drops the oldest. Ranks of one process share a feed: what they tell of one step is one
//! snapshot for who listens, put together by the first listener that asks for it, on the listener's thread; what ranks of other
//! processes tell is brought here first ([`crate::control`]). With nobody listening a publication is a lock and a look at an empty list.

use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex, MutexGuard, OnceLock, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

use crossbeam::channel::{self, RecvTimeoutError, TryRecvError, TrySendError};

use super::{Snapshot, join};

/// Where the snapshots of a run go. Clones are the same feed.
#[derive(Clone, Default)]
pub struct Feed(Arc<Mutex<State>>);

struct State {
    num_ranks: usize,
    /// Steps that not all ranks have told of; a rank is one step ahead at most.
    pending: BTreeMap<u64, Vec<Option<Arc<Snapshot>>>>,
    subscribers: Vec<Subscriber>,
    closed: bool,
    num_dropped: u64,
}

impl Default for State {
    fn default() -> Self {
        State { num_ranks: 1, pending: BTreeMap::new(), subscribers: Vec::new(), closed: false, num_dropped: 0 }
    }
}

/// A step as its ranks told of it.
struct Parts {
    ranks: Vec<Arc<Snapshot>>,
    whole: OnceLock<Arc<Snapshot>>,
}

impl Parts {
    fn whole(&self) -> Arc<Snapshot> {
        match &self.ranks[..] {
            [only] => only.clone(),
            ranks => self.whole.get_or_init(|| Arc::new(merge(ranks))).clone(),
        }
    }
}

/// Snapshots of one step by rank as one: the spans of all, the values of the first.
fn merge(ranks: &[Arc<Snapshot>]) -> Snapshot {
    let first = &ranks[0];
    let begin = ranks.iter().map(|rank| rank.interval_nanos.0).min().unwrap_or_default();
    let end = ranks.iter().map(|rank| rank.interval_nanos.1).max().unwrap_or_default();
    Snapshot {
        step: first.step,
        interval_nanos: (begin, end),
        spans: join(ranks.iter().map(|rank| &*rank.spans)).into(),
        scalars: first.scalars.clone(),
        histograms: first.histograms.clone(),
    }
}

struct Subscriber {
    sender: channel::Sender<Arc<Parts>>,
    /// To drop the oldest; so the channel alone cannot tell whether anyone listens: `dropped` is shared with who does.
    oldest: channel::Receiver<Arc<Parts>>,
    dropped: Arc<AtomicU64>,
    wake: Option<Arc<dyn Fn() + Send + Sync>>,
}

impl Subscriber {
    fn wake(&self) {
        if let Some(wake) = &self.wake {
            wake();
        }
    }
}

/// A listener's end.
pub struct Receiver {
    receiver: channel::Receiver<Arc<Parts>>,
    dropped: Arc<AtomicU64>,
}

impl Receiver {
    /// The oldest snapshot not yet received, if any.
    ///
    /// # Errors
    /// `Empty`, or `Disconnected` when the run is over and all was received.
    pub fn try_recv(&self) -> Result<Arc<Snapshot>, TryRecvError> {
        self.receiver.try_recv().map(|parts| parts.whole())
    }

    /// Drops the oldest snapshot not yet received: for who only wants to know that there was one.
    ///
    /// # Errors
    /// As [`Receiver::try_recv`].
    pub fn skip(&self) -> Result<(), TryRecvError> {
        self.receiver.try_recv().map(drop)
    }

    /// The same as [`Receiver::try_recv`], waiting for one.
    ///
    /// # Errors
    /// `Timeout`, or `Disconnected` when the run is over and all was received.
    pub fn recv_timeout(&self, timeout: Duration) -> Result<Arc<Snapshot>, RecvTimeoutError> {
        self.receiver.recv_timeout(timeout).map(|parts| parts.whole())
    }

    /// How many snapshots were dropped because this end was slow.
    pub fn num_dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }
}

impl Feed {
    /// Listens from the next publication on; at most `capacity` (at least one) snapshots wait. Of a feed that is closed nothing
    /// will come.
    pub fn subscribe(&self, capacity: usize) -> Receiver {
        self.subscribe_and_wake(capacity, None)
    }

    /// The same; `wake` is called on the run's thread after each publication and when the run is over. It must not block, and not
    /// use the feed.
    pub fn subscribe_and_wake(&self, capacity: usize, wake: Option<Arc<dyn Fn() + Send + Sync>>) -> Receiver {
        let (sender, receiver) = channel::bounded(capacity.max(1));
        let dropped = Arc::new(AtomicU64::new(0));
        let mut state = self.state();
        if !state.closed {
            let subscriber = Subscriber { sender, oldest: receiver.clone(), dropped: dropped.clone(), wake };
            state.subscribers.push(subscriber);
        }
        Receiver { receiver, dropped }
    }

    /// From here on, a step is whole when so many ranks told of it.
    pub fn set_num_ranks(&self, num_ranks: usize) {
        self.state().num_ranks = num_ranks.max(1);
    }

    /// How many listen, and how many snapshots were dropped for all listeners so far because they were slow.
    pub fn listeners(&self) -> (usize, u64) {
        let mut state = self.state();
        state.forget_gone();
        (state.subscribers.len(), state.num_dropped)
    }

    /// What `rank` tells of a step.
    pub(crate) fn publish(&self, rank: usize, snapshot: Arc<Snapshot>) {
        let mut state = self.state();
        if state.subscribers.is_empty() {
            state.pending.clear();
            return;
        }
        let (num_ranks, step) = (state.num_ranks, snapshot.step);
        let parts = state.pending.entry(step).or_insert_with(|| vec![None; num_ranks]);
        if let Some(part) = parts.get_mut(rank) {
            *part = Some(snapshot);
        }
        if parts.iter().any(Option::is_none) {
            // Whoever came to listen in the middle of a step waits for parts that were told before.
            while state.pending.len() > 2 {
                state.pending.pop_first();
            }
            return;
        }
        let ranks: Vec<_> = state.pending.remove(&step).into_iter().flatten().flatten().collect();
        state.pending.retain(|&pending, _| pending > step);
        state.send(&Arc::new(Parts { ranks, whole: OnceLock::new() }));
    }

    /// A step as several ranks had it, the first of them first.
    pub(crate) fn publish_parts(&self, ranks: Vec<Arc<Snapshot>>) {
        self.state().send(&Arc::new(Parts { ranks, whole: OnceLock::new() }));
    }

    /// The run is over: listeners get what is left, and then are told.
    pub(crate) fn close(&self) {
        let mut state = self.state();
        state.closed = true;
        for subscriber in std::mem::take(&mut state.subscribers) {
            let wake = subscriber.wake.clone();
            drop(subscriber);
            if let Some(wake) = wake {
                wake();
            }
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn forget_gone(&mut self) {
        self.subscribers.retain(|subscriber| Arc::strong_count(&subscriber.dropped) > 1);
    }

    fn send(&mut self, parts: &Arc<Parts>) {
        self.forget_gone();
        for subscriber in &self.subscribers {
            let mut unsent = parts.clone();
            while let Err(TrySendError::Full(back)) = subscriber.sender.try_send(unsent) {
                if subscriber.oldest.try_recv().is_ok() {
                    subscriber.dropped.fetch_add(1, Ordering::Relaxed);
                    self.num_dropped += 1;
                }
                unsent = back;
            }
            subscriber.wake();
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;
    use crate::telemetry::tests::span;

    fn snapshot(step: u64, rank: u32, interval_nanos: (u64, u64)) -> Arc<Snapshot> {
        let mut second = span("b", rank, "comm", 5, 9);
        second.waited_for = Some(0);
        let spans = vec![span("a", rank, "compute", 0, 5), second].into();
        let scalars = vec![("rank".to_owned(), f64::from(rank))];
        Arc::new(Snapshot { step, interval_nanos, spans, scalars, histograms: Vec::new() })
    }

    #[test]
    fn ranks_of_a_process_tell_one_story() {
        let feed = Feed::default();
        feed.set_num_ranks(2);
        let listener = feed.subscribe(4);
        feed.publish(1, snapshot(1, 1, (3, 12)));
        assert_eq!(listener.try_recv().unwrap_err(), TryRecvError::Empty);
        // A rank may be ahead by a step.
        feed.publish(1, snapshot(2, 1, (13, 20)));
        feed.publish(0, snapshot(1, 0, (1, 10)));
        let whole = listener.try_recv().unwrap();
        assert_eq!((whole.step, whole.interval_nanos, whole.scalar("rank")), (1, (1, 12), Some(0.0)));
        let waits: Vec<_> = whole.spans.iter().map(|span| (span.rank, span.waited_for)).collect();
        assert_eq!(waits, [(0, None), (0, Some(0)), (1, None), (1, Some(2))]);
        feed.publish(0, snapshot(2, 0, (11, 19)));
        assert_eq!(listener.try_recv().unwrap().step, 2);
    }

    #[test]
    fn who_comes_in_the_middle_of_a_step_gets_the_next() {
        let feed = Feed::default();
        feed.set_num_ranks(2);
        feed.publish(0, snapshot(1, 0, (0, 1)));
        let listener = feed.subscribe(4);
        feed.publish(1, snapshot(1, 1, (0, 1)));
        for step in 2..5 {
            (0..2).for_each(|rank| feed.publish(rank, snapshot(step, rank as u32, (0, 1))));
        }
        let steps: Vec<_> = std::iter::from_fn(|| listener.try_recv().ok()).map(|s| s.step).collect();
        assert_eq!(steps, [2, 3, 4]);
    }

    #[test]
    fn the_end_is_told_after_the_last_step() {
        let feed = Feed::default();
        let woken = Arc::new(AtomicU64::new(0));
        let count = woken.clone();
        let wake = Arc::new(move || {
            count.fetch_add(1, Ordering::Relaxed);
        });
        let listener = feed.subscribe_and_wake(1, Some(wake));
        feed.publish(0, snapshot(1, 0, (0, 1)));
        feed.publish(0, snapshot(2, 0, (0, 1)));
        assert_eq!(feed.listeners(), (1, 1));
        feed.close();
        assert_eq!(listener.try_recv().unwrap().step, 2);
        assert_eq!(listener.try_recv().unwrap_err(), TryRecvError::Disconnected);
        assert_eq!(feed.subscribe(1).try_recv().unwrap_err(), TryRecvError::Disconnected);
        assert_eq!(woken.load(Ordering::Relaxed), 3, "twice published, once closed");
    }
}
