//! Ranks that are processes, over MPI.
//!
//! A meeting is one all-to-all of envelopes, that say what each member calls and how much it has for each other, and then all-to-alls
//! of that, in rounds that MPI can count. A sum stays what it is on one process: the members' parts in the order of ranks. So it has the same
//! bits. A message is an envelope and its bytes, and waits at the receiver until it is asked for by its tag.
//!
//! Nothing blocks inside of MPI: every call is of the kind that returns at once, and whoever waits asks again and again, which is
//! also what makes the library get on with things, and sees whether somebody has given up.

mod abi;
mod neighbours;
mod notices;
mod pulse;
mod world;

use std::{
    collections::{BTreeMap, VecDeque},
    hash::{DefaultHasher, Hash as _, Hasher as _},
    path::Path,
    sync::{
        Arc, OnceLock,
        atomic::{AtomicBool, Ordering},
        mpsc,
    },
    thread,
    time::Duration,
};

use abi::{Functions, Handle};
use notices::Notices;
use parking_lot::Mutex;
use pulse::Pulse;
use world::{Request, World, bytes};

use super::{
    HOST_LANE, first_that_loads,
    local::{Call, MAX_MESSAGES},
    nccl,
    pack::{Brought, Met, Packed},
    watch::{Limits, Watch},
};
use crate::{
    clock,
    dtype::{DType, Storage},
    error::{Error, Result},
};

/// The loaded library and this process's place.
pub(super) struct Hub {
    world: Arc<World>,
    notices: Arc<Notices>,
    messages: Handle,
    groups: Mutex<Groups>,
    /// By sender.
    inboxes: Vec<Mutex<Inbox>>,
    outbox: Mutex<Vec<Request>>,
    pulse: Mutex<Option<Pulse>>,
    /// Whether streams wait for nobody any more: then MPI ends with what they left under way.
    is_halted: AtomicBool,
    /// What moves tensors between GPUs, if that is not MPI.
    nccl: OnceLock<nccl::Engine>,
}

/// Communicators by lane and group.
type Groups = BTreeMap<(u32, Arc<[u32]>), Handle>;

/// Bytes of an envelope of a meeting: how much for this member, how much at most for any; then, what must be the same for all, a
/// digest of the call, and the call, cut, for a person to read.
const ENVELOPE: usize = 256;
/// Where in it that begins which must be the same.
const SAID: usize = 2 * size_of::<u64>();
/// How long MPI may take to end with something under way.
const PATIENCE_AT_END: Duration = Duration::from_secs(3);
/// Numbers of an envelope of a message: tag, type, length.
const HEADER: usize = 6;
const HEADERS: u16 = 0;
const BODIES: u16 = 1;

/// Messages of one sender.
#[derive(Default)]
struct Inbox {
    header: Option<Request>,
    body: Option<(u64, Request)>,
    messages: VecDeque<(u64, Storage)>,
}

impl Hub {
    /// Starts the first library of these that loads; `None`, with what the loader said of each, if none does.
    pub fn start(libraries: &[&Path]) -> Result<std::result::Result<Self, Vec<String>>> {
        let functions = match first_that_loads(libraries, Functions::load) {
            Ok(functions) => functions,
            Err(why) => return Ok(Err(why)),
        };
        let world = Arc::new(World::start(functions)?);
        let (messages, notices) = (world.duplicate()?, Arc::new(Notices::open(&world)?));
        let inboxes = (0..world.num_ranks).map(|_| Mutex::default()).collect();
        Ok(Ok(Hub {
            world,
            notices,
            messages,
            groups: Mutex::default(),
            inboxes,
            outbox: Mutex::default(),
            pulse: Mutex::default(),
            is_halted: AtomicBool::new(false),
            nccl: OnceLock::new(),
        }))
    }

    /// Version and file of the first library of these that loads, or what the loader said of each.
    pub fn find(libraries: &[&Path]) -> std::result::Result<String, Vec<String>> {
        first_that_loads(libraries, Functions::load).map(|functions| World::unstarted(functions).version())
    }

    /// Starts to tell the others that this rank lives, to look whether they do, and to look after those that are near. Collective.
    pub fn watch_over(&self, watch: &Arc<Watch>, limits: Limits) -> Result<()> {
        let pulse = Pulse::start(&self.world, &self.notices, watch, limits)?;
        *self.pulse.lock() = Some(pulse);
        neighbours::meet(self).map_err(|error| self.explain(error))
    }

    /// Sums and gathers on GPUs go this way from here on.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "there is none"))]
    pub fn use_nccl(&self, engine: nccl::Engine) {
        let _already = self.nccl.set(engine);
    }

    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "there is none"))]
    pub fn nccl(&self) -> Option<&nccl::Engine> {
        self.nccl.get()
    }

    /// Asks until it is done; ends with an error when a rank is lost.
    #[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "NCCL's"))]
    pub fn wait_until(&self, is_done: &mut dyn FnMut() -> Result<bool>) -> Result<()> {
        let mut waiting = Wait::of_stream();
        let mut wait = || {
            while !is_done()? {
                self.pause(&mut waiting)?;
            }
            Ok(())
        };
        wait().map_err(|error| self.explain(error))
    }

    /// Names under which libraries are looked for.
    pub fn names() -> [&'static str; 4] {
        abi::NAMES
    }

    pub fn rank(&self) -> u32 {
        self.world.rank
    }

    pub fn num_ranks(&self) -> u32 {
        self.world.num_ranks
    }

    pub fn version(&self) -> String {
        self.world.version()
    }

    /// Gets on with what was sent. Whoever drives a rank calls it now and then; waits do so themselves.
    pub fn progress(&self) -> Result<()> {
        self.get_on().map_err(|error| self.explain(error))
    }

    /// Where the library fails, the cause may be another process that is gone: waits for what the watchdog makes of it.
    fn explain(&self, error: Error) -> Error {
        let is_the_librarys =
            matches!(&error, Error::Comm { op, .. } if op.starts_with("MPI_") || op.starts_with("nccl"));
        let patience = self.pulse.lock().as_ref().filter(|_| is_the_librarys).map_or(Duration::ZERO, Pulse::patience);
        let began = clock::now_nanos();
        while u128::from(clock::now_nanos() - began) < patience.as_nanos() && self.lost().is_none() {
            thread::sleep(Duration::from_millis(5));
        }
        self.lost().unwrap_or(error)
    }

    fn get_on(&self) -> Result<()> {
        let mut failed = Ok(());
        self.outbox.lock().retain_mut(|request| match self.world.is_done(request) {
            Ok(is_done) => !is_done,
            Err(error) => {
                failed = Err(error);
                false
            }
        });
        failed?;
        self.notices.look()
    }

    pub fn send(&self, between: (u32, u32), tag: u64, data: Storage) -> Result<u64> {
        self.put(between, tag, data).map_err(|error| self.explain(error))
    }

    pub fn receive(&self, between: (u32, u32), tag: u64) -> Result<(Storage, u64)> {
        self.take(between, tag).map_err(|error| self.explain(error))
    }

    pub fn meet<T: Brought>(&self, on: (u32, &Arc<[u32]>), me: usize, call: &Call, mine: T) -> Result<Met<T>> {
        self.come(on, me, call, mine).map_err(|error| self.explain(error))
    }

    fn put(&self, (_, to): (u32, u32), tag: u64, data: Storage) -> Result<u64> {
        let mut waiting = Wait::of_stream();
        while self.outbox.lock().len() >= MAX_MESSAGES {
            self.pause(&mut waiting)?;
        }
        self.notices.check()?;
        let [low, high] = halves(tag);
        let [len_low, len_high] = halves(data.len() as u64);
        let header = Storage::U32(vec![low, high, data.dtype() as u32, len_low, len_high, 0]);
        {
            // Both under the lock: of two streams' messages, headers and bodies come in the same order.
            let mut outbox = self.outbox.lock();
            outbox.push(self.world.send(self.messages, to, HEADERS, header)?);
            outbox.push(self.world.send(self.messages, to, BODIES, data)?);
        }
        self.get_on()?;
        Ok(waiting.nanos())
    }

    fn take(&self, (from, _): (u32, u32), tag: u64) -> Result<(Storage, u64)> {
        let mut waiting = Wait::of_stream();
        loop {
            {
                let mut inbox = self.inboxes[from as usize].lock();
                self.advance(from, &mut inbox)?;
                let at = inbox.messages.iter().position(|(t, _)| *t == tag);
                if let Some((_, data)) = at.and_then(|at| inbox.messages.remove(at)) {
                    return Ok((data, waiting.nanos()));
                }
            }
            self.pause(&mut waiting)?;
        }
    }

    /// Takes in what has come from a rank.
    fn advance(&self, from: u32, inbox: &mut Inbox) -> Result<()> {
        while inbox.messages.len() < MAX_MESSAGES {
            if let Some((_, body)) = &mut inbox.body {
                if !self.world.is_done(body)? {
                    return Ok(());
                }
                let (tag, mut body) = inbox.body.take().expect("it is there");
                inbox.messages.push_back((tag, body.take_received()));
            }
            let header = match &mut inbox.header {
                Some(header) => header,
                none => {
                    none.insert(self.world.receive(self.messages, from, HEADERS, Storage::zeros(DType::U32, HEADER))?)
                }
            };
            if !self.world.is_done(header)? {
                return Ok(());
            }
            let header = inbox.header.take().expect("it is there").take_received();
            let Storage::U32(header) = &header else { unreachable!("as it was asked for") };
            let dtype = [DType::F64, DType::F32, DType::Bf16, DType::U32, DType::U8];
            let dtype = dtype.into_iter().find(|&dtype| dtype as u32 == header[2]).unwrap_or(DType::U8);
            let into = Storage::zeros(dtype, joined([header[3], header[4]]) as usize);
            let tag = joined([header[0], header[1]]);
            inbox.body = Some((tag, self.world.receive(self.messages, from, BODIES, into)?));
        }
        Ok(())
    }

    fn come<T: Brought>(&self, (lane, group): (u32, &Arc<[u32]>), me: usize, call: &Call, mine: T) -> Result<Met<T>> {
        let n = group.len();
        let mine = Arc::new(mine);
        if n == 1 {
            return Ok(Met { all: vec![mine], nanos: 0, handed_bytes: Some(vec![0]) });
        }
        let comm = self.group(lane, group)?;
        let mut waiting = if lane == HOST_LANE { Wait::default() } else { Wait::of_stream() };
        let packed = (0..n).map(|to| if to == me { Packed::default() } else { mine.pack(to, n) });
        let (parts, handed): (Vec<Vec<u8>>, Vec<u64>) =
            packed.map(|packed| (packed.bytes, packed.num_payload_bytes)).unzip();
        let most = parts.iter().map(Vec::len).max().unwrap_or(0);
        let call = call.to_string();
        let mut said = digest(&call).to_le_bytes().to_vec();
        said.extend(call.bytes().take(ENVELOPE - SAID - said.len()));
        said.resize(ENVELOPE - SAID, 0);
        let mut envelopes = Vec::with_capacity(n * ENVELOPE);
        for part in &parts {
            envelopes.extend([part.len(), most].iter().flat_map(|&x| (x as u64).to_le_bytes()));
            envelopes.extend_from_slice(&said);
        }
        let mut request = self.world.all_to_all(comm, envelopes, ENVELOPE)?;
        self.wait(&mut request, &mut waiting)?;
        let envelopes = request.take_received();
        let number = |at: usize| bytes(&envelopes)[at..].first_chunk().map_or(0, |b| u64::from_le_bytes(*b) as usize);
        for (i, envelope) in bytes(&envelopes).chunks_exact(ENVELOPE).enumerate() {
            let theirs = &envelope[SAID..];
            if theirs != said {
                let (mine, theirs) = (group[me], String::from_utf8_lossy(&theirs[size_of::<u64>()..]));
                let message = format!(
                    "rank {mine} calls {call}, where rank {} calls {}, in the group {group:?}; all members of a group call the \
                     same collectives in the same order",
                    group[i],
                    theirs.trim_end_matches('\0')
                );
                return Err(Error::Comm { op: "meeting", message });
            }
        }
        let coming: Vec<usize> = (0..n).map(|i| if i == me { 0 } else { number(i * ENVELOPE) }).collect();
        let most = (0..n).map(|i| number(i * ENVELOPE + 8)).max().unwrap_or(0).max(most);
        // The same number of rounds for all, of pieces of which n fit a count.
        let piece = (self.world.max_piece / n).max(1);
        let mut came: Vec<Vec<u8>> = coming.iter().map(|&len| Vec::with_capacity(len)).collect();
        for at in (0..most).step_by(piece) {
            let cut = |len: usize| at.min(len)..(at + piece).min(len);
            let to: Vec<usize> = parts.iter().map(|part| cut(part.len()).len()).collect();
            let mut data = Vec::with_capacity(to.iter().sum());
            parts.iter().for_each(|part| data.extend_from_slice(&part[cut(part.len())]));
            let from: Vec<usize> = coming.iter().map(|&len| cut(len).len()).collect();
            let mut request = self.world.all_to_all_v(comm, data, &to, &from)?;
            self.wait(&mut request, &mut waiting)?;
            let received = request.take_received();
            let mut rest = bytes(&received);
            for (came, len) in came.iter_mut().zip(from) {
                came.extend_from_slice(rest.split_off(..len).unwrap_or_default());
            }
        }
        let mut all = Vec::with_capacity(n);
        for (i, came) in came.iter().enumerate() {
            all.push(if i == me {
                mine.clone()
            } else {
                let message = || format!("rank {} sent {} bytes that are not what {call} sends", group[i], came.len());
                Arc::new(T::unpack(came).ok_or_else(|| Error::Comm { op: "meeting", message: message() })?)
            });
        }
        Ok(Met { all, nanos: waiting.nanos(), handed_bytes: Some(handed) })
    }

    /// The communicator of a group on a lane; made by its members when they first meet.
    fn group(&self, lane: u32, group: &Arc<[u32]>) -> Result<Handle> {
        if let Some(comm) = self.groups.lock().get(&(lane, group.clone())) {
            return Ok(*comm);
        }
        // Not under the lock: members of another group may be waited for here.
        let comm = self.world.group(group, (lane & 0x7fff) as u16)?;
        self.groups.lock().insert((lane, group.clone()), comm);
        Ok(comm)
    }

    fn wait(&self, request: &mut Request, waiting: &mut Wait) -> Result<()> {
        while !self.world.is_done(request)? {
            self.pause(waiting)?;
        }
        Ok(())
    }

    fn pause(&self, waiting: &mut Wait) -> Result<()> {
        self.get_on()?;
        self.notices.check()?;
        if waiting.is_of_stream && self.is_halted() {
            return Err(Error::Halted);
        }
        waiting.pause();
        Ok(())
    }

    /// What streams wait for, they wait for no longer.
    pub fn halt(&self) {
        self.is_halted.store(true, Ordering::Release);
    }

    fn is_halted(&self) -> bool {
        self.is_halted.load(Ordering::Acquire)
    }

    pub fn abort(&self, rank: u32, message: &str) {
        if self.notices.lose(rank, message) {
            self.notices.tell(rank, message);
        }
    }

    pub fn lost(&self) -> Option<Error> {
        self.notices.lost()
    }
}

impl Hub {
    /// Ends MPI with what streams left under way, so that a launcher sees an end in good order; not if the library waits for that.
    fn finish_early(&self) {
        let (done, is_done) = mpsc::sync_channel(1);
        let world = self.world.clone();
        let finish = move || {
            let _ = done.send(world.finish());
        };
        if thread::Builder::new().name("end of MPI".into()).spawn(finish).is_ok() {
            let _ = is_done.recv_timeout(PATIENCE_AT_END);
        }
    }
}

impl Drop for Hub {
    /// Ends MPI where all went well; else the process ends with what is under way, and its launcher with it.
    fn drop(&mut self) {
        let ends_early = self.is_halted();
        let mut waiting = Wait::default();
        while !ends_early && self.lost().is_none() && !self.outbox.lock().is_empty() {
            if self.pause(&mut waiting).is_err() {
                break;
            }
        }
        if let Some(engine) = self.nccl.take() {
            if ends_early || self.lost().is_some() {
                engine.abort();
            } else {
                // The others wait for this rank to end its communicators too.
                let _ = engine.end(self).inspect_err(|error| self.abort(self.rank(), &error.to_string()));
            }
        }
        drop(self.pulse.lock().take());
        if self.lost().is_some() {
            return;
        }
        if ends_early {
            return self.finish_early();
        }
        let headers = self.inboxes.iter().filter_map(|inbox| inbox.lock().header.take());
        let cancelled = headers.collect::<Vec<_>>().into_iter().try_for_each(|request| self.world.cancel(request));
        let _ = cancelled.and_then(|()| self.notices.close()).and_then(|()| self.world.finish());
    }
}

/// A wait, if there is one: how long it was, and how it is spent.
#[derive(Default)]
struct Wait {
    began: Option<u64>,
    num_pauses: u32,
    is_of_stream: bool,
}

impl Wait {
    /// One that ends when streams are halted.
    fn of_stream() -> Self {
        Wait { is_of_stream: true, ..Wait::default() }
    }

    /// A while that grows: others of this machine may be what is waited for.
    fn pause(&mut self) {
        self.began.get_or_insert_with(clock::now_nanos);
        self.num_pauses += 1;
        match self.num_pauses {
            ..64 => std::hint::spin_loop(),
            64..256 => thread::yield_now(),
            _ => thread::sleep(Duration::from_micros(20)),
        }
    }

    fn nanos(&self) -> u64 {
        self.began.map_or(0, |began| clock::now_nanos() - began)
    }
}

/// Of the same text the same in every process of this program.
fn digest(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

fn halves(x: u64) -> [u32; 2] {
    [x as u32, (x >> 32) as u32]
}

fn joined([low, high]: [u32; 2]) -> u64 {
    u64::from(low) | u64::from(high) << 32
}
