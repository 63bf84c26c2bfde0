//! Processes of the run on the same machine. One that is stopped (SIGSTOP) hears of nothing and never ends by itself, and not every
//! launcher ends it. So whoever ends because a rank is lost kills those that are stopped, as its last act: a launcher may end all as soon
//! as it sees one that was killed, and by then this one has spoken.
//!
//! Only those that are stopped: one that hangs or is cut off ends by itself, and says why; one that a debugger holds is the debugger's.

use std::{
    fs, process,
    sync::{Arc, OnceLock},
};

use rustix::process::{Pid, Signal, kill_process};

use super::{Hub, Wait, digest, notices::Notices, world::bytes};
use crate::error::Result;

/// Other processes of the run, by rank, and where it is said that a rank is lost.
struct Neighbours {
    notices: Arc<Notices>,
    processes: Vec<(u32, Process)>,
}

/// A process, wherever it is.
#[derive(Clone, Copy, Debug, PartialEq)]
struct Process {
    /// Digest of machine, its start, and name space of process numbers; 0 if the system does not say.
    space: u64,
    id: u64,
    /// Ticks from the machine's start to the process's; another process that gets the same number has another start.
    began: u64,
}

/// This process's; MPI starts once in a process.
static NEIGHBOURS: OnceLock<Neighbours> = OnceLock::new();

/// Learns who is on the same machine; from here on this process calls [`end_stopped`] when it exits. Collective.
pub fn meet(hub: &Hub) -> Result<()> {
    let (me, world) = (Process::this(), &hub.world);
    let mine = me.to_bytes();
    let mut request = world.all_to_all(hub.messages, mine.repeat(world.num_ranks as usize), mine.len())?;
    hub.wait(&mut request, &mut Wait::default())?;
    let all = request.take_received();
    let all = (0..).zip(bytes(&all).chunks_exact(mine.len()).map(Process::from_bytes));
    let is_near = |of: &(u32, Process)| of.0 != world.rank && me.space != 0 && of.1.space == me.space;
    let neighbours = Neighbours { notices: hub.notices.clone(), processes: all.filter(is_near).collect() };
    if NEIGHBOURS.set(neighbours).is_ok() {
        // SAFETY: the function is there as long as the program, and takes and returns nothing.
        unsafe { libc::atexit(end_stopped) };
    }
    Ok(())
}

/// Kills neighbours that are stopped, if a rank is lost; what comes after this may not be reached.
pub extern "C" fn end_stopped() {
    let Some(neighbours) = NEIGHBOURS.get().filter(|of| of.notices.lost().is_some()) else { return };
    for (rank, process) in &neighbours.processes {
        if process.is_stopped() {
            eprintln!("rank {rank} is stopped and cannot end by itself: its process {} is killed", process.id);
            process.kill();
        }
    }
}

impl Process {
    fn this() -> Self {
        let id = u64::from(process::id());
        let space = || {
            let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id").ok()?;
            let numbers = fs::read_link("/proc/self/ns/pid").ok()?;
            Some(digest(&format!("{boot} {}", numbers.display())))
        };
        match (space(), look(id)) {
            (Some(space), Some((_, began))) => Process { space, id, began },
            _ => Process { space: 0, id, began: 0 },
        }
    }

    fn to_bytes(self) -> [u8; 24] {
        bytemuck::cast([self.space, self.id, self.began])
    }

    fn from_bytes(bytes: &[u8]) -> Self {
        let [space, id, began] = bytemuck::pod_read_unaligned(bytes);
        Process { space, id, began }
    }

    fn is_stopped(self) -> bool {
        look(self.id) == Some(('T', self.began))
    }

    fn kill(self) {
        // One that was killed in the meantime is what was wanted.
        let _ = i32::try_from(self.id).ok().and_then(Pid::from_raw).map(|id| kill_process(id, Signal::KILL));
    }
}

/// What a process of this machine is in (`R`, `S`, `T`: stopped, ...), and ticks from the machine's start to its own (proc_pid_stat(5)).
fn look(id: u64) -> Option<(char, u64)> {
    let stat = fs::read_to_string(format!("/proc/{id}/stat")).ok()?;
    // The name, in parentheses, may have any sign in it.
    let mut fields = stat.rsplit_once(')')?.1.split_whitespace();
    Some((fields.next()?.chars().next()?, fields.nth(18)?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use std::{
        process::{Child, Command, Stdio},
        thread,
        time::Duration,
    };

    use super::*;

    fn sleeper() -> (Child, Process) {
        let child = Command::new("sleep").arg("60").stdin(Stdio::null()).spawn().expect("sleep starts");
        let id = u64::from(child.id());
        let (_, began) = look(id).expect("it is there");
        (child, Process { id, began, ..Process::this() })
    }

    fn signal(child: &Child, signal: Signal) {
        kill_process(Pid::from_child(child), signal).expect("it is there");
    }

    fn until_in(process: Process, state: char) {
        while look(process.id).map(|(state, _)| state) != Some(state) {
            thread::sleep(Duration::from_millis(1));
        }
    }

    fn end(mut child: Child) {
        let _ = child.kill();
        child.wait().expect("it was started");
    }

    #[test]
    fn only_a_process_that_is_stopped_counts_as_stopped() {
        let (child, process) = sleeper();
        assert!(!process.is_stopped());
        signal(&child, Signal::STOP);
        until_in(process, 'T');
        assert!(process.is_stopped());
        signal(&child, Signal::CONT);
        until_in(process, 'S');
        assert!(!process.is_stopped());
        end(child);
        assert!(!process.is_stopped(), "it is gone");
    }

    #[test]
    fn another_process_with_the_same_number_is_not_meant() {
        let (child, process) = sleeper();
        signal(&child, Signal::STOP);
        until_in(process, 'T');
        assert!(!Process { began: process.began + 1, ..process }.is_stopped());
        end(child);
    }

    #[test]
    fn a_process_comes_over_as_it_is() {
        let me = Process::this();
        assert_ne!(me.space, 0);
        assert_eq!(Process::from_bytes(&me.to_bytes()), me);
    }
}
