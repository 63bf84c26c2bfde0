//! Work that would make the window wait, on a thread of its own: one piece at a time, looked for in each frame.

use crossbeam::channel::{self, Receiver, TryRecvError};

use crate::source::Wake;

/// A place for one piece of work and its result.
pub struct Background<T> {
    receiver: Option<Receiver<T>>,
}

impl<T> Default for Background<T> {
    fn default() -> Self {
        Background { receiver: None }
    }
}

impl<T: Send + 'static> Background<T> {
    /// Starts `work` on a thread called `name`, and wakes the window up when it is done. What was started before is given up: its
    /// result is not looked at.
    ///
    /// # Errors
    /// If the system gives no thread.
    pub fn start(&mut self, name: &str, wake: Wake, work: impl FnOnce() -> T + Send + 'static) -> std::io::Result<()> {
        let (sender, receiver) = channel::bounded(1);
        std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Nobody listens any more if the window was closed or asked for something newer.
            let _ = sender.send(work());
            wake();
        })?;
        self.receiver = Some(receiver);
        Ok(())
    }

    /// Whether a result is still to come.
    pub fn is_busy(&self) -> bool {
        self.receiver.is_some()
    }

    /// The result, once.
    pub fn poll(&mut self) -> Option<T> {
        match self.receiver.as_ref()?.try_recv() {
            Ok(result) => {
                self.receiver = None;
                Some(result)
            }
            Err(TryRecvError::Empty) => None,
            // The work panicked: there is no result, and the next one may start.
            Err(TryRecvError::Disconnected) => {
                self.receiver = None;
                None
            }
        }
    }
}
