//! Moments of a device in nanoseconds of the host's clock.
//!
//! The driver tells the milliseconds between two events, as f32: good to a quarter of a microsecond within some seconds. So there is a
//! base event, whose time on the host's clock is known, and a new one every few seconds. A base's time is the one before it plus what
//! passed on the device, so that spans across two bases are right, moved by a little towards what the host saw, since two clocks drift.

use std::sync::Arc;

use cudarc::driver::{CudaContext, CudaEvent, CudaStream, DriverError, sys::CUevent_flags};

use super::{Gpu, Lane, fault::Faults};
use crate::{clock::now_nanos, error::Result};

pub(super) const TIMED: Option<CUevent_flags> = Some(CUevent_flags::CU_EVENT_DEFAULT);

/// Age at which a base is replaced.
const BASE_NANOS: u64 = 2_000_000_000;

/// Most that a base is moved towards the host's clock.
const NUDGE_NANOS: f64 = 20_000.0;

struct Base {
    event: CudaEvent,
    nanos: f64,
}

pub(super) struct Clock {
    /// Idle but for bases, so that they are reached at once.
    stream: Arc<CudaStream>,
    base: Arc<Base>,
}

impl Clock {
    pub(super) fn new(context: &Arc<CudaContext>) -> std::result::Result<Self, DriverError> {
        let stream = context.new_stream()?;
        let (event, nanos) = sample(context, &stream)?;
        Ok(Clock { stream, base: Arc::new(Base { event, nanos }) })
    }

    fn base(&mut self, context: &Arc<CudaContext>) -> std::result::Result<Arc<Base>, DriverError> {
        if now_nanos() as f64 - self.base.nanos > BASE_NANOS as f64 {
            let (event, seen) = sample(context, &self.stream)?;
            let followed = self.base.nanos + f64::from(self.base.event.elapsed_ms(&event)?) * 1e6;
            let nanos = followed + (seen - followed).clamp(-NUDGE_NANOS, NUDGE_NANOS);
            self.base = Arc::new(Base { event, nanos });
        }
        Ok(self.base.clone())
    }
}

/// An event that was reached, and when: of some tries the one that the host saw most sharply.
fn sample(context: &Arc<CudaContext>, stream: &CudaStream) -> std::result::Result<(CudaEvent, f64), DriverError> {
    let mut best: Option<(CudaEvent, f64, u64)> = None;
    for _ in 0..4 {
        let event = context.new_event(TIMED)?;
        let before = now_nanos();
        event.record(stream)?;
        event.synchronize()?;
        let width = now_nanos() - before;
        if best.as_ref().is_none_or(|(_, _, narrowest)| width < *narrowest) {
            best = Some((event, before as f64 + width as f64 / 2.0, width));
        }
    }
    best.map(|(event, nanos, _)| (event, nanos)).ok_or(DriverError(cudarc::driver::sys::CUresult::CUDA_ERROR_UNKNOWN))
}

/// A moment in a lane.
pub struct Mark {
    gpu: Arc<Gpu>,
    faults: Arc<Faults>,
    moment: Moment,
    base: Arc<Base>,
}

enum Moment {
    /// Of an event of the mark's own, which is taken when the mark is dropped.
    Own(Option<CudaEvent>),
    /// Of an event in a graph: it has a time once the mark behind the graph is there.
    Inside(Arc<CudaEvent>, Arc<Mark>),
}

impl Drop for Mark {
    fn drop(&mut self) {
        if let Moment::Own(event) = &mut self.moment {
            self.gpu.spare_events.lock().extend(event.take());
        }
    }
}

impl Mark {
    /// Blocks until the moment is there; returns when that was. What a kernel of the lane found wrong is an error here.
    pub(crate) fn synchronize(&self) -> Result<u64> {
        let wait = || {
            let event = match &self.moment {
                Moment::Own(Some(event)) => event,
                Moment::Own(None) => return Ok(now_nanos()),
                Moment::Inside(event, _) => &**event,
            };
            if let Some(awaited) = self.awaited() {
                awaited.synchronize()?;
            }
            let ms = self.base.event.elapsed_ms(event)?;
            Ok((self.base.nanos + f64::from(ms) * 1e6) as u64)
        };
        let nanos = wait().map_err(self.gpu.failed("waiting for an event"))?;
        self.faults.take().map(|()| nanos)
    }

    /// The event that is waited for.
    fn awaited(&self) -> Option<&CudaEvent> {
        match &self.moment {
            Moment::Own(event) => event.as_ref(),
            Moment::Inside(_, behind) => behind.awaited(),
        }
    }

    /// The moment of an event in a graph that was launched before `behind`.
    pub(super) fn inside(event: &Arc<CudaEvent>, behind: &Arc<Mark>) -> Self {
        Mark {
            gpu: behind.gpu.clone(),
            faults: behind.faults.clone(),
            moment: Moment::Inside(event.clone(), behind.clone()),
            base: behind.base.clone(),
        }
    }

    /// Whether the moment is there, or will never be.
    pub(crate) fn is_reached(&self) -> bool {
        if self.gpu.context.bind_to_thread().is_err() {
            return true;
        }
        self.awaited().is_none_or(|event| event.try_is_complete().unwrap_or(true))
    }
}

impl Lane {
    /// The moment when all that was launched so far is done.
    pub(crate) fn record(&self) -> Result<Mark> {
        let gpu = self.gpu();
        let make = || {
            let base = gpu.clock.lock().base(&gpu.context)?;
            let spare = gpu.spare_events.lock().pop();
            let event = spare.map_or_else(|| gpu.context.new_event(TIMED), Ok)?;
            event.record(self.stream())?;
            Ok(Mark { gpu: gpu.clone(), faults: self.faults().clone(), moment: Moment::Own(Some(event)), base })
        };
        make().map_err(gpu.failed("recording an event"))
    }

    /// What is launched from here on runs after `mark`.
    pub(crate) fn wait(&self, mark: &Mark) -> Result<()> {
        let Some(event) = mark.awaited() else { return Ok(()) };
        self.stream().wait(event).map_err(self.gpu().failed("waiting for an event"))
    }
}
