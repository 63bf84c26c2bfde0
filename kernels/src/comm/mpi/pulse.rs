//! The pulse: every process tells the first one, and the first one tells every other, that it lives and what it is in. MPI itself
//! notices neither a process that is stopped nor, everywhere, one that is dead; a launcher does not either.
//!
//! Two threads. One speaks and listens. The other only looks at the clock and at what was heard, so that it can end the process also
//! where a call of the library does not return: it marks who is lost, so that all waits end, and after a while ends what is left.

use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    thread::{self, JoinHandle},
    time::Duration,
};

use parking_lot::Mutex;

use super::{
    abi::Handle,
    neighbours,
    notices::Notices,
    world::{Request, World, bytes},
};
use crate::{
    clock,
    comm::watch::{Deadline, Limits, Report, Seen, Watch, judge},
    dtype::{DType, Storage},
    error::{Error, Result},
};

/// Bytes of a report, as JSON; waits that do not fit are left out.
const REPORT: usize = 4096;
/// Times a process speaks until it counts as silent.
const NUM_BEATS: f64 = 8.0;
/// Exit code of a process that lost another (`hadal`'s contract).
const PEER_LOST: i32 = 5;

/// The threads of a process; they say farewell when this goes.
pub struct Pulse {
    board: Arc<Board>,
    speaker: Option<JoinHandle<()>>,
}

/// What the two threads share.
struct Board {
    rank: u32,
    watch: Arc<Watch>,
    notices: Arc<Notices>,
    limits: Limits,
    heard: Mutex<Vec<Heard>>,
    /// When the speaker last came around.
    turned_nanos: AtomicU64,
    is_ending: AtomicBool,
    has_ended: AtomicBool,
}

/// What was heard of a rank.
struct Heard {
    rank: u32,
    report: Option<Report>,
    heard_nanos: u64,
    changed_nanos: u64,
}

impl Pulse {
    /// Collective.
    pub fn start(world: &Arc<World>, notices: &Arc<Notices>, watch: &Arc<Watch>, limits: Limits) -> Result<Self> {
        let comm = world.duplicate()?;
        world.obey(watch);
        let now = clock::now_nanos();
        let heard = |rank| Heard { rank, report: None, heard_nanos: now, changed_nanos: now };
        // The first hears all; the others hear the first, and know of themselves.
        let ranks = if world.rank == 0 { (0..world.num_ranks).collect() } else { vec![0, world.rank] };
        let board = Arc::new(Board {
            rank: world.rank,
            watch: watch.clone(),
            notices: notices.clone(),
            limits,
            heard: Mutex::new(ranks.into_iter().map(heard).collect()),
            turned_nanos: AtomicU64::new(now),
            is_ending: AtomicBool::new(false),
            has_ended: AtomicBool::new(false),
        });
        let peers = if world.rank == 0 { world.others().collect() } else { vec![0] };
        let open = |peer| Line::open(world, comm, peer);
        let lines = peers.into_iter().map(open).collect::<Result<Vec<_>>>()?;
        let speaker = {
            let (board, world) = (board.clone(), world.clone());
            spawn("pulse", move || board.speak(&world, comm, lines))?
        };
        let watchdog = board.clone();
        spawn("watchdog", move || watchdog.watch())?;
        Ok(Pulse { board, speaker: Some(speaker) })
    }
}

impl Pulse {
    /// How long it takes at most until whoever is gone is known.
    pub fn patience(&self) -> Duration {
        Duration::from_secs_f64(2.5 * self.board.limits.min_secs)
    }
}

fn spawn(name: &str, body: impl FnOnce() + Send + 'static) -> Result<JoinHandle<()>> {
    let thread = thread::Builder::new().name(name.into()).spawn(body);
    thread.map_err(|e| Error::Comm { op: "watch_over", message: format!("no thread `{name}`: {e}") })
}

impl Drop for Pulse {
    /// Says farewell, and waits for that of the others; not for a rank that is lost.
    fn drop(&mut self) {
        self.board.is_ending.store(true, Ordering::Release);
        let Some(speaker) = self.speaker.take() else { return };
        speaker.thread().unpark();
        let mut num_waits_lost = 0;
        while !self.board.has_ended.load(Ordering::Acquire) {
            if self.board.notices.lost().is_some() {
                num_waits_lost += 1;
            }
            if num_waits_lost > 200 {
                return;
            }
            thread::sleep(Duration::from_millis(1));
        }
        let _ = speaker.join();
    }
}

/// To and from one peer.
struct Line {
    peer: u32,
    coming: Option<Request>,
    going: Option<Request>,
    has_said_last: bool,
}

impl Line {
    fn open(world: &World, comm: Handle, peer: u32) -> Result<Self> {
        let coming = Some(world.receive(comm, peer, 0, Storage::zeros(DType::U8, REPORT))?);
        Ok(Line { peer, coming, going: None, has_said_last: false })
    }

    /// Listens, and speaks unless what was said before is still under way.
    fn turn(&mut self, world: &World, comm: Handle, board: &Board, report: &Report) -> Result<()> {
        while let Some(coming) = &mut self.coming {
            if !world.is_done(coming)? {
                break;
            }
            let report = decode(bytes(&coming.take_received()));
            let is_last = report.is_last;
            board.hear(self.peer, report);
            self.coming = if is_last {
                None
            } else {
                Some(world.receive(comm, self.peer, 0, Storage::zeros(DType::U8, REPORT))?)
            };
        }
        if let Some(going) = &mut self.going
            && world.is_done(going)?
        {
            self.going = None;
        }
        if self.going.is_none() && !self.has_said_last {
            self.going = Some(world.send(comm, self.peer, 0, Storage::U8(encode(report)))?);
            self.has_said_last = report.is_last;
        }
        Ok(())
    }

    fn is_over(&self) -> bool {
        self.has_said_last && self.coming.is_none() && self.going.is_none()
    }
}

fn encode(report: &Report) -> Vec<u8> {
    let mut report = report.clone();
    loop {
        let mut text = serde_json::to_vec(&report).unwrap_or_default();
        if text.len() <= REPORT || report.waits.pop().is_none() {
            text.resize(REPORT, b' ');
            return text;
        }
    }
}

fn decode(text: &[u8]) -> Report {
    serde_json::from_slice(text).unwrap_or_default()
}

impl Board {
    fn interval(&self) -> Duration {
        Duration::from_secs_f64((self.limits.min_secs / NUM_BEATS).clamp(0.01, 1.0))
    }

    /// The speaker's body.
    fn speak(&self, world: &World, comm: Handle, mut lines: Vec<Line>) {
        let mut has_told = false;
        while !lines.iter().all(Line::is_over) {
            let is_ending = self.is_ending.load(Ordering::Acquire);
            let report = Report { is_last: is_ending, ..self.watch.report() };
            self.hear(self.rank, report.clone());
            for line in &mut lines {
                if let Err(error) = line.turn(world, comm, self, &report) {
                    self.notices.lose(line.peer, &error.to_string());
                }
            }
            if let Some(Error::PeerLost { rank, message }) = self.notices.lost()
                && !std::mem::replace(&mut has_told, true)
            {
                self.notices.tell(rank, &message);
            }
            let _ = self.notices.look();
            if is_ending && has_told {
                break;
            }
            self.turned_nanos.store(clock::now_nanos(), Ordering::Release);
            thread::park_timeout(if is_ending { Duration::from_millis(2) } else { self.interval() });
        }
        self.has_ended.store(true, Ordering::Release);
    }

    fn hear(&self, rank: u32, report: Report) {
        if report.asks_to_halt {
            self.watch.ask_to_halt();
        }
        let now = clock::now_nanos();
        let mut heard = self.heard.lock();
        if let Some(of) = heard.iter_mut().find(|heard| heard.rank == rank) {
            of.heard_nanos = now;
            if of.report.as_ref().is_none_or(|before| before.num_done != report.num_done) {
                of.changed_nanos = now;
            }
            of.report = Some(report);
        }
    }

    /// The watchdog's body.
    fn watch(&self) {
        let mut looked = clock::now_nanos();
        while !self.has_ended.load(Ordering::Acquire) {
            if let Some(lost) = self.notices.lost() {
                self.end(&lost);
            }
            thread::sleep(self.interval());
            let now = clock::now_nanos();
            if (now - looked) as f64 * 1e-9 > self.limits.min_secs / 2.0 {
                // This process itself was stopped: it heard nobody.
                let forgive = |heard: &mut Heard| (heard.heard_nanos, heard.changed_nanos) = (now, now);
                self.heard.lock().iter_mut().for_each(forgive);
            }
            looked = now;
            if let Some((rank, message)) = self.judge(now) {
                self.notices.lose(rank, &message);
            }
        }
    }

    fn judge(&self, now: u64) -> Option<(u32, String)> {
        let nanos = |secs: f64| (secs * 1e9) as u64;
        let since_turn = now.saturating_sub(self.turned_nanos.load(Ordering::Acquire));
        if since_turn > nanos(4.0 * self.limits.min_secs) {
            let message = format!("a call of its MPI library has not returned for {:.1} s", since_turn as f64 * 1e-9);
            return Some((self.rank, message));
        }
        let is_first = self.rank == 0;
        let (wait_secs, why) = self.watch.deadline(&self.limits);
        // The first knows all, so its word goes before that of others, who know only whether it is there.
        let deadline = Deadline {
            silent_nanos: nanos(self.limits.min_secs * if is_first { 1.0 } else { 1.5 }),
            wait_nanos: if is_first { nanos(wait_secs) } else { u64::MAX },
            why,
        };
        let seen = |heard: &Heard| Seen {
            rank: heard.rank,
            report: heard.report.clone(),
            // A listener that was late heard late.
            silent_nanos: now.saturating_sub(heard.heard_nanos).saturating_sub(since_turn),
            unchanged_nanos: now.saturating_sub(heard.changed_nanos).saturating_sub(since_turn),
        };
        let seen: Vec<Seen> = self.heard.lock().iter().map(seen).collect();
        judge(&seen, &deadline)
    }

    /// Writes down how it came about, and ends what has not ended by itself after a while: this process, and neighbours that are stopped.
    fn end(&self, lost: &Error) {
        if let Some(path) = &self.limits.dump
            && let Err(error) = std::fs::write(path, self.watch.trace())
        {
            eprintln!("cannot write {}: {error}", path.display());
        }
        thread::sleep(Duration::from_secs_f64(self.limits.min_secs));
        eprintln!("error: {lost}; rank {} did not end by itself in {} s and is ended", self.rank, self.limits.min_secs);
        neighbours::end_stopped();
        // SAFETY: nothing runs after this, and nothing has to: exit handlers of a library that hangs would hang too.
        unsafe { libc::_exit(PEER_LOST) };
    }
}
