//! A thread's group: what it has put together between its start and its end.

use std::{cell::RefCell, sync::Arc};

use crate::comm::{Comm, Failed};

/// So many bytes at an address of the device, to a member or from it.
pub(crate) struct Transfer {
    pub(crate) peer: usize,
    pub(crate) address: u64,
    pub(crate) bytes: usize,
}

impl Transfer {
    fn overlaps(&self, other: &Transfer) -> bool {
        self.address < other.address + other.bytes as u64 && other.address < self.address + self.bytes as u64
    }
}

#[derive(Default)]
struct Group {
    depth: usize,
    on: Option<(usize, Arc<Comm>, usize)>,
    sends: Vec<Transfer>,
    receives: Vec<Transfer>,
    /// The first call that was wrong: the group is then not run.
    failed: Option<i32>,
}

thread_local! {
    static GROUP: RefCell<Group> = RefCell::default();
}

pub(crate) fn start() {
    GROUP.with_borrow_mut(|group| group.depth += 1);
}

/// Puts a transfer into the thread's group, or does it as a group of its own.
pub(crate) fn put(
    is_send: bool,
    transfer: Transfer,
    (handle, comm): (usize, Arc<Comm>),
    stream: usize,
) -> Result<bool, Failed> {
    GROUP.with_borrow_mut(|group| {
        let add = || {
            comm.expect_rest()?;
            if transfer.peer >= comm.num_members {
                return Err(Failed::argument(format!("there is no member {} of {}", transfer.peer, comm.num_members)));
            }
            let on = group.on.get_or_insert((handle, comm.clone(), stream));
            if (on.0, on.2) != (handle, stream) {
                return Err(Failed::usage("a group is of one communicator and one stream here"));
            }
            if is_send {
                group.sends.push(transfer)
            } else {
                group.receives.push(transfer)
            }
            Ok(())
        };
        match add() {
            Ok(()) if group.depth > 0 => Ok(false),
            Ok(()) => run(group),
            Err(failed) => {
                group.failed.get_or_insert(failed.code);
                Err(failed)
            }
        }
    })
}

/// Ends the thread's group; whether something is in progress then.
pub(crate) fn end() -> Result<bool, Failed> {
    GROUP.with_borrow_mut(|group| match group.depth {
        0 => Err(Failed::usage("a group ends that was not started")),
        1 => {
            group.depth = 0;
            run(group)
        }
        _ => {
            group.depth -= 1;
            Ok(false)
        }
    })
}

fn run(group: &mut Group) -> Result<bool, Failed> {
    let Group { on, sends, receives, failed, .. } = std::mem::take(group);
    if let Some(code) = failed {
        return Err(Failed { code, why: "a call of the group was wrong".into() });
    }
    let Some((_, comm, stream)) = on else { return Ok(false) };
    for (i, receive) in receives.iter().enumerate() {
        if sends.iter().chain(&receives[..i]).any(|other| other.overlaps(receive)) {
            return Err(Failed::usage("what a group receives overlaps with what it sends, or receives besides"));
        }
    }
    comm.run(stream, sends, receives).map(|()| true)
}
