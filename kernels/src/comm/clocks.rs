//! How far the clocks of processes are apart: each counts from when it first asked.
//!
//! A rank asks the first for its time, again and again, and believes the quickest answer: the first read its clock at some time
//! between question and answer, so that half of the way there and back is the most by which the middle of them can be wrong.

use super::Comm;
use crate::{
    clock::now_nanos,
    dtype::Storage,
    error::{Error, Result},
};

/// Questions of each rank.
const NUM_QUESTIONS: usize = 64;
/// Of questions and answers; tasks have no such tag.
const TAG: u64 = u64::MAX;

/// A rank's clock beside the first rank's, when they were compared.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct ClockOffset {
    /// What to add to the rank's time for the first rank's.
    pub add_nanos: i64,
    /// How wrong that is at most.
    pub error_nanos: u64,
}

impl ClockOffset {
    /// A time of the rank as one of the first.
    pub fn apply(self, nanos: u64) -> u64 {
        nanos.saturating_add_signed(self.add_nanos)
    }
}

impl Comm {
    /// This rank's clock beside the first rank's. All ranks call it; it blocks the caller. Ranks of one process have one clock.
    ///
    /// # Errors
    /// If a rank is lost.
    pub fn clock_offset(&self) -> Result<ClockOffset> {
        if !self.is_across_processes() {
            return Ok(ClockOffset::default());
        }
        self.compare_clocks(now_nanos).inspect_err(|error| self.give_up(error))
    }

    fn compare_clocks(&self, now: impl Fn() -> u64) -> Result<ClockOffset> {
        let hub = self.hub("clock_offset")?;
        if self.rank == 0 {
            for from in 1..self.num_ranks {
                for _ in 0..NUM_QUESTIONS {
                    hub.receive((from, 0), TAG)?;
                    hub.send((0, from), TAG, Storage::U8(now().to_le_bytes().to_vec()))?;
                }
            }
            return Ok(ClockOffset::default());
        }
        let mut best = ClockOffset { add_nanos: 0, error_nanos: u64::MAX };
        for _ in 0..NUM_QUESTIONS {
            let asked = now();
            hub.send((self.rank, 0), TAG, Storage::U8(Vec::new()))?;
            let (answer, _) = hub.receive((0, self.rank), TAG)?;
            let answered = now();
            let Storage::U8(answer) = answer else { return Err(not_a_time()) };
            let first = u64::from_le_bytes(answer.try_into().map_err(|_| not_a_time())?);
            let error_nanos = (answered - asked).div_ceil(2);
            if error_nanos < best.error_nanos {
                best = ClockOffset { add_nanos: first.wrapping_sub(asked.midpoint(answered)) as i64, error_nanos };
            }
        }
        Ok(best)
    }
}

fn not_a_time() -> Error {
    Error::Comm { op: "clock_offset", message: "the first rank answered what is no time".into() }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::comm::testing::on_ranks;

    #[test]
    fn offsets_are_within_the_error_that_they_say() {
        let offsets = on_ranks(3, 2, |comm, _| {
            let late = u64::from(comm.rank()) * 1_000_000_000;
            comm.compare_clocks(|| now_nanos() + late).map(|offset| (late, offset))
        });
        for offset in offsets {
            let (late, offset) = offset.expect("no rank is lost");
            let wrong = (offset.add_nanos + late as i64).unsigned_abs();
            assert!(wrong <= offset.error_nanos, "{late} ns late: {offset:?}");
            assert!(
                offset.error_nanos < 100_000_000,
                "threads of a process answer within a tenth of a second: {offset:?}"
            );
        }
    }
}
