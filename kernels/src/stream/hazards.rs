//! Accesses that no event orders: the last writer and readers of each buffer, and what each stream has seen of the others.

use std::{collections::HashMap, sync::Arc};

use parking_lot::Mutex;

use crate::tensor::{BufferId, Tensor};

/// For each stream, how many of its tasks are known to have ended.
pub(super) type VectorClock = Vec<u64>;

#[derive(Default)]
struct Access {
    writer: Option<(usize, u64, Arc<str>)>,
    readers: Vec<(usize, u64, Arc<str>)>,
}

/// Last users of each buffer, over all streams of one device.
#[derive(Default)]
pub struct Hazards {
    inner: Mutex<HazardsInner>,
}

#[derive(Default)]
struct HazardsInner {
    accesses: HashMap<BufferId, Access>,
    num_streams: usize,
}

impl Hazards {
    /// The number of one more stream.
    pub(super) fn add_stream(&self) -> usize {
        let mut inner = self.inner.lock();
        inner.num_streams += 1;
        inner.num_streams - 1
    }

    pub(super) fn check(
        &self,
        stream: usize,
        clock: &VectorClock,
        task: &Arc<str>,
        reads: &[Tensor],
        writes: &[Tensor],
    ) {
        let mut inner = self.inner.lock();
        let seen = |s: usize, n: u64| s == stream || clock.get(s).is_some_and(|&c| c >= n);
        let now = clock[stream];
        for tensor in reads {
            let access = inner.accesses.entry(tensor.buffer).or_default();
            if let Some((s, n, label)) = &access.writer
                && !seen(*s, *n)
            {
                panic!("`{task}` reads {tensor:?}, which `{label}` writes on another stream: an edge is missing");
            }
            access.readers.retain(|(s, ..)| *s != stream);
            access.readers.push((stream, now, task.clone()));
        }
        for tensor in writes {
            let access = inner.accesses.entry(tensor.buffer).or_default();
            for (s, n, label) in access.writer.iter().chain(&access.readers) {
                if !seen(*s, *n) {
                    panic!("`{task}` writes {tensor:?}, which `{label}` uses on another stream: an edge is missing");
                }
            }
            access.readers.clear();
            access.writer = Some((stream, now, task.clone()));
        }
    }
}
