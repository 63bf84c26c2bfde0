//! A communicator: a folder, and one piece of work at a time, which a thread does.

use std::{
    collections::BTreeMap,
    fs,
    path::{Path, PathBuf},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{Builder, JoinHandle, sleep},
    time::Duration,
};

use crate::{driver::Driver, group::Transfer};

/// An `ncclResult_t`.
pub(crate) type Code = i32;

pub(crate) const UNHANDLED_CUDA_ERROR: Code = 1;
pub(crate) const SYSTEM_ERROR: Code = 2;
pub(crate) const INVALID_ARGUMENT: Code = 4;
pub(crate) const INVALID_USAGE: Code = 5;
pub(crate) const REMOTE_ERROR: Code = 6;
pub(crate) const IN_PROGRESS: Code = 7;

/// What went wrong.
pub(crate) struct Failed {
    pub(crate) code: Code,
    pub(crate) why: String,
}

impl Failed {
    pub(crate) fn cuda(why: String) -> Self {
        Failed { code: UNHANDLED_CUDA_ERROR, why }
    }

    pub(crate) fn argument(why: impl Into<String>) -> Self {
        Failed { code: INVALID_ARGUMENT, why: why.into() }
    }

    pub(crate) fn usage(why: impl Into<String>) -> Self {
        Failed { code: INVALID_USAGE, why: why.into() }
    }
}

impl From<std::io::Error> for Failed {
    fn from(e: std::io::Error) -> Self {
        Failed { code: SYSTEM_ERROR, why: e.to_string() }
    }
}

/// What was sent by this process.
#[derive(Default)]
pub(crate) struct Stats {
    pub(crate) comms: AtomicU64,
    pub(crate) aborted: AtomicU64,
    pub(crate) groups: AtomicU64,
    pub(crate) sends: AtomicU64,
    pub(crate) bytes: AtomicU64,
}

pub(crate) static STATS: Stats = Stats {
    comms: AtomicU64::new(0),
    aborted: AtomicU64::new(0),
    groups: AtomicU64::new(0),
    sends: AtomicU64::new(0),
    bytes: AtomicU64::new(0),
};

/// What a communicator is in.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum State {
    Busy,
    Ready,
    Finalized,
    Failed(Code),
}

pub(crate) struct Comm {
    pub(crate) num_members: usize,
    me: usize,
    context: usize,
    folder: PathBuf,
    state: Mutex<State>,
    is_aborted: AtomicBool,
    /// Messages so far that were sent to each member, and received from it.
    counts: Mutex<BTreeMap<(bool, usize), u64>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Appears whole.
fn put_file(path: &Path, data: &[u8]) -> std::io::Result<()> {
    let mut part = path.as_os_str().to_owned();
    part.push(".part");
    fs::write(&part, data)?;
    fs::rename(&part, path)
}

impl Comm {
    /// Begins to meet the other members in the folder.
    pub(crate) fn begin(folder: PathBuf, num_members: usize, me: usize, may_share: bool) -> Result<Arc<Self>, Failed> {
        let context = Driver::get()?.context()?;
        let comm = Arc::new(Comm {
            num_members,
            me,
            context,
            folder,
            state: Mutex::new(State::Ready),
            is_aborted: AtomicBool::new(false),
            counts: Mutex::default(),
            thread: Mutex::default(),
        });
        STATS.comms.fetch_add(1, Ordering::Relaxed);
        comm.start(State::Ready, move |comm| comm.meet(may_share))?;
        Ok(comm)
    }

    pub(crate) fn state(&self) -> State {
        *lock(&self.state)
    }

    /// `Err` unless it is at rest.
    pub(crate) fn expect_rest(&self) -> Result<(), Failed> {
        match self.state() {
            State::Ready => Ok(()),
            State::Busy => {
                Err(Failed::usage("the communicator is in progress: ask ncclCommGetAsyncError until it is not"))
            }
            State::Finalized => Err(Failed::usage("the communicator is finalized")),
            State::Failed(_) => Err(Failed::usage("the communicator has failed")),
        }
    }

    /// Does the work on a thread; what it comes to is the state then, `after` if all goes well.
    fn start(
        self: &Arc<Self>,
        after: State,
        work: impl FnOnce(&Comm) -> Result<(), Failed> + Send + 'static,
    ) -> Result<(), Failed> {
        self.expect_rest()?;
        *lock(&self.state) = State::Busy;
        let comm = self.clone();
        let body = move || {
            let done = Driver::get().and_then(|driver| driver.enter(comm.context)).and_then(|()| work(&comm));
            let state = match done {
                Ok(()) => after,
                Err(failed) => {
                    if !comm.is_aborted.load(Ordering::Acquire) {
                        crate::api::explain(&failed);
                    }
                    State::Failed(failed.code)
                }
            };
            *lock(&comm.state) = state;
        };
        let thread = Builder::new().name("ptxsim nccl".into()).spawn(body)?;
        if let Some(before) = lock(&self.thread).replace(thread) {
            let _ = before.join();
        }
        Ok(())
    }

    /// Asks until it gives something; ends when the communicator is aborted.
    fn until<T>(&self, mut ask: impl FnMut() -> Result<Option<T>, Failed>) -> Result<T, Failed> {
        loop {
            if self.is_aborted.load(Ordering::Acquire) {
                return Err(Failed::usage("aborted"));
            }
            if let Some(found) = ask()? {
                return Ok(found);
            }
            sleep(Duration::from_micros(100));
        }
    }

    /// Puts down a file, and waits for those of all members.
    fn gather(&self, what: &str, mine: &[u8]) -> Result<Vec<Vec<u8>>, Failed> {
        put_file(&self.folder.join(format!("{what}-{}", self.me)), mine)?;
        (0..self.num_members)
            .map(|i| self.until(|| Ok(fs::read(self.folder.join(format!("{what}-{i}"))).ok())))
            .collect()
    }

    fn meet(&self, may_share: bool) -> Result<(), Failed> {
        let gpus = self.gather("member", &Driver::get()?.uuid()?)?;
        let is_shared = |i: usize| gpus[..i].contains(&gpus[i]);
        match (0..gpus.len()).find(|&i| is_shared(i)) {
            Some(i) if !may_share => {
                Err(Failed::usage(format!("Duplicate GPU detected: member {i} is on the GPU of another")))
            }
            _ => Ok(()),
        }
    }

    /// Begins to do a group's transfers, behind what is on the stream.
    pub(crate) fn run(
        self: &Arc<Self>,
        stream: usize,
        sends: Vec<Transfer>,
        receives: Vec<Transfer>,
    ) -> Result<(), Failed> {
        STATS.groups.fetch_add(1, Ordering::Relaxed);
        self.start(State::Ready, move |comm| comm.transfer(stream, &sends, &receives))
    }

    /// The file of the next message to a member, or from it.
    fn next(&self, is_sent: bool, peer: usize) -> PathBuf {
        let mut counts = lock(&self.counts);
        let count = counts.entry((is_sent, peer)).or_default();
        *count += 1;
        let (from, to) = if is_sent { (self.me, peer) } else { (peer, self.me) };
        self.folder.join(format!("message-{from}-{to}-{count}"))
    }

    fn transfer(&self, stream: usize, sends: &[Transfer], receives: &[Transfer]) -> Result<(), Failed> {
        let driver = Driver::get()?;
        driver.wait_for(stream)?;
        let mut on_their_way = Vec::new();
        for send in sends {
            let path = self.next(true, send.peer);
            put_file(&path, &driver.read(send.address, send.bytes)?)?;
            STATS.sends.fetch_add(1, Ordering::Relaxed);
            STATS.bytes.fetch_add(send.bytes as u64, Ordering::Relaxed);
            on_their_way.push(path);
        }
        for receive in receives {
            let path = self.next(false, receive.peer);
            let data = self.until(|| Ok(fs::read(&path).ok()))?;
            if data.len() != receive.bytes {
                fs::rename(&path, path.with_extension("refused"))?;
                return Err(Failed::usage(format!(
                    "member {} sent {} bytes, where {} receives {}",
                    receive.peer,
                    data.len(),
                    self.me,
                    receive.bytes
                )));
            }
            if !driver.is_idle(stream)? {
                return Err(Failed::usage(
                    "work was put on the stream before the group was: ask ncclCommGetAsyncError",
                ));
            }
            driver.write(receive.address, &data)?;
            fs::remove_file(&path)?;
        }
        for path in on_their_way {
            self.until(|| {
                if path.with_extension("refused").exists() {
                    return Err(Failed { code: REMOTE_ERROR, why: "the receiver refused a message".into() });
                }
                Ok((!path.exists()).then_some(()))
            })?;
        }
        Ok(())
    }

    pub(crate) fn finalize(self: &Arc<Self>) -> Result<(), Failed> {
        self.start(State::Finalized, |comm| comm.gather("end", &[]).map(drop))
    }

    /// Gives back what a finalized one has.
    pub(crate) fn destroy(&self) -> Result<(), Failed> {
        if self.state() != State::Finalized {
            return Err(Failed::usage("a communicator is finalized, and at rest, before it is destroyed"));
        }
        self.stop();
        self.leave();
        Ok(())
    }

    /// The last member clears the folder.
    fn leave(&self) {
        // The folder may be another's to clear, who does so now.
        let _ = put_file(&self.folder.join(format!("gone-{}", self.me)), &[]);
        if (0..self.num_members).all(|i| self.folder.join(format!("gone-{i}")).exists()) {
            let _ = fs::remove_dir_all(&self.folder);
        }
    }

    /// Ends whatever is under way.
    pub(crate) fn abort(&self) {
        STATS.aborted.fetch_add(1, Ordering::Relaxed);
        self.is_aborted.store(true, Ordering::Release);
        self.stop();
        self.leave();
    }

    fn stop(&self) {
        if let Some(thread) = lock(&self.thread).take() {
            let _ = thread.join();
        }
    }
}
