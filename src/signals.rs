//! Signals that ask a run to stop after its step, with a checkpoint: SIGINT and SIGTERM, and SIGUSR1 and SIGUSR2, by which schedulers
//! say that a job will be preempted. They end with 128 + the signal's number, as a shell would say; preemption counts as SIGTERM.
//!
//! A second SIGINT or SIGTERM ends the process at once. Preemption is no first one, for SIGTERM is what follows it while the
//! checkpoint is still being written; and what comes within [`ECHO_NANOS`] is the first one again, since a terminal or a scheduler
//! tells the launcher and its processes, and the launcher tells the processes too. Hence the time, and a thread that reads it.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    thread,
};

use kernels::clock::now_nanos;
use signal_hook::{
    consts::{SIGINT, SIGTERM, SIGUSR1, SIGUSR2},
    iterator::Signals,
    low_level,
};

/// How long after the first signal another one is the same.
const ECHO_NANOS: u64 = 500_000_000;

/// Listens; the number of the first signal will stand in what is returned, 0 until then.
///
/// # Errors
/// The system's, if a signal cannot be taken over.
pub fn listen() -> io::Result<Arc<AtomicUsize>> {
    let stop = Arc::new(AtomicUsize::new(0));
    let seen = Arc::clone(&stop);
    let mut signals = Signals::new([SIGINT, SIGTERM, SIGUSR1, SIGUSR2])?;
    thread::Builder::new().name("signals".into()).spawn(move || {
        let mut heard = Heard::default();
        for signal in signals.forever() {
            let number = if signal == SIGINT { SIGINT } else { SIGTERM };
            if heard.ends(signal, now_nanos()) {
                low_level::exit(128 + number);
            }
            let _ = seen.compare_exchange(0, number as usize, Ordering::Relaxed, Ordering::Relaxed);
        }
    })?;
    Ok(stop)
}

/// What the signals of [`listen`] that have come ask for.
pub fn name(signal: usize) -> &'static str {
    if signal == SIGINT as usize { "SIGINT" } else { "SIGTERM" }
}

/// When the first SIGINT or SIGTERM came.
#[derive(Default)]
struct Heard(Option<u64>);

impl Heard {
    /// Whether `signal`, now, ends the process at once.
    fn ends(&mut self, signal: i32, now_nanos: u64) -> bool {
        let asks_to_end = signal == SIGINT || signal == SIGTERM;
        asks_to_end && now_nanos.saturating_sub(*self.0.get_or_insert(now_nanos)) > ECHO_NANOS
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_second_signal_ends_at_once_but_neither_an_echo_nor_what_follows_a_preemption() {
        type Came = &'static [(i32, u64)];
        const LATER: u64 = 2 * ECHO_NANOS;
        let cases: [(Came, Option<usize>); 7] = [
            (&[(SIGINT, 0), (SIGINT, LATER)], Some(1)),
            (&[(SIGTERM, 0), (SIGINT, LATER)], Some(1)),
            (&[(SIGTERM, 0), (SIGTERM, 1), (SIGTERM, ECHO_NANOS)], None),
            (&[(SIGTERM, 0), (SIGTERM, 1), (SIGTERM, LATER)], Some(2)),
            (&[(SIGUSR1, 0), (SIGUSR1, LATER), (SIGTERM, 2 * LATER)], None),
            (&[(SIGUSR1, 0), (SIGTERM, LATER), (SIGTERM, 2 * LATER)], Some(2)),
            (&[(SIGTERM, 0), (SIGUSR2, LATER)], None),
        ];
        for (signals, want) in cases {
            let mut heard = Heard::default();
            let found = signals.iter().position(|&(signal, now)| heard.ends(signal, now));
            assert_eq!(found, want, "{signals:?}");
        }
    }
}
