//! Who gave up, and why. Each rank has a receive open for every other's word of that; whoever waits looks there.

use std::sync::{
    Arc,
    atomic::{AtomicBool, AtomicU64, Ordering},
};

use parking_lot::Mutex;

use super::{
    abi::Handle,
    world::{Request, World, bytes},
};
use crate::{
    clock,
    dtype::{DType, Storage},
    error::{Error, Result},
};

/// Bytes of a notice: a rank, and why it gave up, cut.
const NOTICE: usize = 1024;
/// How often notices are looked for.
const LOOK_NANOS: u64 = 1_000_000;

pub struct Notices {
    world: Arc<World>,
    comm: Handle,
    open: Mutex<Vec<Request>>,
    sent: Mutex<Vec<Request>>,
    looked_nanos: AtomicU64,
    is_lost: AtomicBool,
    lost: Mutex<Option<Error>>,
}

impl Notices {
    /// Collective.
    pub fn open(world: &Arc<World>) -> Result<Self> {
        let comm = world.duplicate()?;
        let open = world.others().map(|from| world.receive(comm, from, 0, Storage::zeros(DType::U8, NOTICE)));
        Ok(Notices {
            world: world.clone(),
            comm,
            open: Mutex::new(open.collect::<Result<_>>()?),
            sent: Mutex::default(),
            looked_nanos: AtomicU64::new(0),
            is_lost: AtomicBool::new(false),
            lost: Mutex::default(),
        })
    }

    /// Looks for notices, now and then.
    pub fn look(&self) -> Result<()> {
        let now = clock::now_nanos();
        if now.saturating_sub(self.looked_nanos.load(Ordering::Relaxed)) <= LOOK_NANOS {
            return Ok(());
        }
        self.looked_nanos.store(now, Ordering::Relaxed);
        for request in &mut *self.open.lock() {
            if self.world.is_done(request)? {
                let notice = request.take_received();
                let notice = bytes(&notice);
                if let Some((rank, message)) = notice.split_first_chunk() {
                    let message = message.split(|&b| b == 0).next().unwrap_or_default();
                    self.lose(u32::from_le_bytes(*rank), &String::from_utf8_lossy(message));
                }
            }
        }
        let mut sent = self.sent.lock();
        sent.retain_mut(|request| self.world.is_done(request).is_ok_and(|is_done| !is_done));
        Ok(())
    }

    /// Marks a rank as lost, the first one for good; whether this is the first.
    pub fn lose(&self, rank: u32, message: &str) -> bool {
        let mut lost = self.lost.lock();
        let is_first = lost.is_none();
        lost.get_or_insert_with(|| Error::PeerLost { rank, message: message.to_owned() });
        self.is_lost.store(true, Ordering::Release);
        is_first
    }

    /// Tells all others.
    pub fn tell(&self, rank: u32, message: &str) {
        let mut notice = rank.to_le_bytes().to_vec();
        notice.extend(message.bytes().take(NOTICE - 5));
        notice.resize(NOTICE, 0);
        for to in self.world.others() {
            // Who cannot be told is lost itself, or ends when the launcher sees this process end.
            if let Ok(request) = self.world.send(self.comm, to, 0, Storage::U8(notice.clone())) {
                self.sent.lock().push(request);
            }
        }
        let _ = self.look();
    }

    pub fn lost(&self) -> Option<Error> {
        if self.is_lost.load(Ordering::Acquire) { self.lost.lock().clone() } else { None }
    }

    pub fn check(&self) -> Result<()> {
        self.lost().map_or(Ok(()), Err)
    }

    /// Stops listening; for the end of a run that lost nobody.
    pub fn close(&self) -> Result<()> {
        self.open.lock().drain(..).try_for_each(|request| self.world.cancel(request))
    }
}
