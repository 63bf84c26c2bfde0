//! SIGINT and SIGTERM: the first asks the run to stop after its step, with a checkpoint; the second ends the process at
//! once. Both with 128 + the signal's number, as a shell would say.

use std::{
    io,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicUsize},
    },
};

use signal_hook::{
    consts::{SIGINT, SIGTERM},
    flag,
};

/// Listens; the number of the last signal will stand in what is returned, 0 until then.
///
/// # Errors
/// The system's, if a signal cannot be taken over.
pub fn listen() -> io::Result<Arc<AtomicUsize>> {
    let stop = Arc::new(AtomicUsize::new(0));
    let asked = Arc::new(AtomicBool::new(false));
    for signal in [SIGINT, SIGTERM] {
        // In this order, for they run in it: the first signal must not find its own mark.
        flag::register_conditional_shutdown(signal, 128 + signal, Arc::clone(&asked))?;
        flag::register(signal, Arc::clone(&asked))?;
        flag::register_usize(signal, Arc::clone(&stop), signal as usize)?;
    }
    Ok(stop)
}

/// Name of a signal of [`listen`].
pub fn name(signal: usize) -> &'static str {
    if signal == SIGINT as usize { "SIGINT" } else { "SIGTERM" }
}
