//! Work that streams were given, and the order in which it is done: none before something waits for it, and then any that the streams and
//! their events allow, as a seed decides.

use std::{
    collections::VecDeque,
    sync::{Arc, OnceLock},
    time::Instant,
};

use crate::{
    errors::{LAUNCH_FAILED, Outcome},
    state::{Function, Gpu},
};

#[expect(clippy::disallowed_methods, reason = "the device's own clock")]
fn now() -> Instant {
    Instant::now()
}

/// When a record of an event was reached.
pub(crate) type Mark = Arc<OnceLock<Instant>>;

/// Bytes of the host.
#[derive(Clone)]
pub(crate) enum HostBytes {
    /// Copied when the call was made: the host's memory may be paged out.
    Copied(Arc<[u8]>),
    /// Pinned: read when its turn has come.
    Pinned(usize, usize),
}

/// One piece of work.
#[derive(Clone)]
pub(crate) enum Op {
    Launch(Arc<KernelLaunch>),
    ToDevice {
        to: u64,
        from: HostBytes,
    },
    /// To pinned memory.
    ToHost {
        to: usize,
        from: u64,
        len: usize,
    },
    Copy {
        to: u64,
        from: u64,
        len: usize,
    },
    Fill {
        to: u64,
        byte: u8,
        len: usize,
    },
    Record(Mark),
    /// Of the event with that handle, in a graph.
    RecordInside(u64),
    Wait(Mark),
}

/// A kernel with its arguments, copied when it was launched.
pub(crate) struct KernelLaunch {
    pub(crate) function: Arc<Function>,
    pub(crate) grid: [u32; 3],
    pub(crate) block: [u32; 3],
    pub(crate) shared_bytes: u32,
    pub(crate) params: Vec<Vec<u8>>,
}

/// A stream's work, oldest first.
#[derive(Default)]
pub(crate) struct Queue {
    pub(crate) ops: VecDeque<Op>,
    /// What a capture has collected, while there is one.
    pub(crate) capture: Option<Vec<Op>>,
}

/// Work that may be put off before some is done unasked.
const MOST_PENDING: usize = 4096;

impl Gpu {
    /// A number below `n`, from the seed.
    pub(crate) fn chance(&mut self, n: usize) -> usize {
        // Knuth's MMIX generator; the high bits are the good ones.
        self.random = self.random.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.random >> 33) as usize) % n.max(1)
    }

    /// Puts work on a stream: to its end, or into its capture.
    pub(crate) fn enqueue(&mut self, stream: u64, op: Op) -> Outcome {
        let queue = self.queue(stream)?;
        if let Some(capture) = &mut queue.capture {
            capture.push(op);
            return Ok(());
        }
        queue.ops.push_back(op);
        self.num_pending += 1;
        // Now and then some work is early, so that nobody relies on its being late.
        let early = if self.num_pending > MOST_PENDING { MOST_PENDING / 2 } else { usize::from(self.chance(8) == 0) };
        for _ in 0..early {
            if !self.advance()? {
                break;
            }
        }
        Ok(())
    }

    /// Does one piece of work of a stream that can go on; `false` if none can.
    pub(crate) fn advance(&mut self) -> Outcome<bool> {
        let ready = |queue: &Queue| match queue.ops.front() {
            None => false,
            Some(Op::Wait(mark)) => mark.get().is_some(),
            Some(_) => true,
        };
        let able: Vec<u64> = self.queues.iter().filter(|(_, queue)| ready(queue)).map(|(id, _)| *id).collect();
        if able.is_empty() {
            return Ok(false);
        }
        let chosen = able[self.chance(able.len())];
        if let Some(op) = self.queue(chosen)?.ops.pop_front() {
            self.num_pending -= 1;
            self.perform(op)?;
        }
        Ok(true)
    }

    /// Does work until `done`.
    pub(crate) fn advance_until(&mut self, mut done: impl FnMut(&Gpu) -> bool) -> Outcome {
        while !done(self) {
            if !self.advance()? {
                eprintln!("ptxsim: no stream can go on: each waits for an event that will not come");
                return self.poison();
            }
        }
        Ok(())
    }

    pub(crate) fn drain(&mut self) -> Outcome {
        self.advance_until(|gpu| gpu.num_pending == 0)
    }

    pub(crate) fn drain_stream(&mut self, stream: u64) -> Outcome {
        self.queue(stream)?;
        self.advance_until(|gpu| gpu.queues.get(&stream).is_none_or(|queue| queue.ops.is_empty()))
    }

    fn perform(&mut self, op: Op) -> Outcome {
        let done = match op {
            Op::Wait(_) => Ok(()),
            Op::Record(mark) => {
                let _ = mark.set(now());
                Ok(())
            }
            Op::RecordInside(event) => self.reach(event, Mark::new(OnceLock::from(now()))),
            Op::ToDevice { to, from: HostBytes::Copied(bytes) } => self.machine.write(to, &bytes),
            Op::ToDevice { to, from: HostBytes::Pinned(at, len) } => {
                // SAFETY: pinned memory is ours, and freeing it waits for all work.
                self.machine.write(to, unsafe { std::slice::from_raw_parts(at as *const u8, len) })
            }
            Op::ToHost { to, from, len } => {
                // SAFETY: as above.
                self.machine.read(from, unsafe { std::slice::from_raw_parts_mut(to as *mut u8, len) })
            }
            Op::Copy { to, from, len } => {
                let mut bytes = vec![0; len];
                self.machine.read(from, &mut bytes).and_then(|()| self.machine.write(to, &bytes))
            }
            Op::Fill { to, byte, len } => self.machine.write(to, &vec![byte; len]),
            Op::Launch(launch) => {
                let KernelLaunch { function, grid, block, shared_bytes, params } = &*launch;
                let begin = now();
                let ran =
                    self.share_mapped(|machine| machine.launch(&function.module, *grid, *block, *shared_bytes, params));
                self.stats.count(function.module.name(), begin.elapsed(), &ran);
                ran.map(|_| ()).map_err(|e| format!("{}: {e}", function.module.name()))
            }
        };
        done.or_else(|e| {
            eprintln!("ptxsim: {e}");
            self.poison()
        })
    }

    /// As on hardware, nothing works after a kernel failed.
    fn poison(&mut self) -> Outcome {
        self.poisoned = true;
        for queue in self.queues.values_mut() {
            for op in queue.ops.drain(..) {
                if let Op::Record(mark) = op {
                    let _ = mark.set(now());
                }
            }
        }
        self.num_pending = 0;
        Err(LAUNCH_FAILED)
    }
}
