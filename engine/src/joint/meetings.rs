//! Which task of which rank meets which: found once, by sorting, before anything is simulated.

use std::{collections::BTreeMap, ops::Range, sync::Arc};

use kernels::stream::Rendezvous;

use super::{NONE, RankTasks};
use crate::error::{Error, Result};

/// Something that several ranks do together, or that one does for another.
pub(super) struct Meeting {
    /// Tasks that are waited for.
    pub missing: u32,
    /// When the last of those that came was there.
    pub nanos: u64,
    /// First lane that waits.
    pub waiting: u32,
}

/// What a task has to do with a meeting.
#[derive(Clone, Copy)]
pub(super) struct Part {
    pub meeting: u32,
    pub is_collective: bool,
    pub is_send: bool,
}

/// All meetings, and the parts of each rank's tasks in them.
pub(super) struct Meetings {
    pub all: Vec<Meeting>,
    /// Of all ranks, by rank and then as in [`RankTasks`].
    pub parts: Vec<Part>,
    /// Task of each part.
    tasks: Vec<u32>,
    /// Where each rank's parts begin; one more at the end.
    begins: Vec<usize>,
    /// After what `parts_of` found last, per rank: tasks are mostly asked for in order.
    hints: Vec<usize>,
}

/// Tells meetings apart but for how often they happened: of a group with a tag, or from a rank to another with one.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
struct Key {
    /// [`NONE`] for what is sent.
    group: u32,
    from: u32,
    to: u32,
    tag: u64,
}

struct Entry {
    key: Key,
    /// Rank as an index, for a collective; else 0 for the send and 1 for the receive.
    side: u32,
    part: u32,
}

impl Meetings {
    /// Matches the n-th of each side.
    ///
    /// # Errors
    /// If a simulated rank does something less often than those that it does it with.
    pub fn of(ranks: &[RankTasks]) -> Result<Self> {
        let index: BTreeMap<u32, u32> = ranks.iter().zip(0..).map(|(tasks, i)| (tasks.rank, i)).collect();
        let mut groups: BTreeMap<Arc<[u32]>, u32> = BTreeMap::new();
        let (mut entries, mut tasks, mut begins) = (Vec::new(), Vec::new(), vec![0]);
        for (i, rank) in ranks.iter().enumerate() {
            // Groups are shared, so that most are recognized by where they are.
            let mut last: Option<(&Arc<[u32]>, u32)> = None;
            for (task, rendezvous) in &rank.rendezvous {
                let (key, side) = match rendezvous {
                    Rendezvous::Send { to, tag } => (Key { group: NONE, from: rank.rank, to: *to, tag: *tag }, 0),
                    Rendezvous::Receive { from, tag } => {
                        (Key { group: NONE, from: *from, to: rank.rank, tag: *tag }, 1)
                    }
                    Rendezvous::Collective { group, tag } => {
                        let known = last.filter(|(same, _)| Arc::ptr_eq(same, group)).map(|(_, id)| id);
                        let next = groups.len() as u32;
                        let id = known.unwrap_or_else(|| *groups.entry(group.clone()).or_insert(next));
                        if known.is_none() && !group.contains(&rank.rank) {
                            let label = &rank.labels[*task as usize];
                            let message = format!(
                                "rank {}: task `{label}` is of a collective of ranks {group:?}, which it is not among",
                                rank.rank
                            );
                            return Err(Error::Ranks(message));
                        }
                        last = Some((group, id));
                        (Key { group: id, from: 0, to: 0, tag: *tag }, i as u32)
                    }
                };
                entries.push(Entry { key, side, part: tasks.len() as u32 });
                tasks.push(*task);
            }
            begins.push(tasks.len());
        }
        // Stable, so that what a rank does more than once stays in its order.
        entries.sort_by_key(|entry| (entry.key, entry.side));
        let groups: Vec<Arc<[u32]>> = {
            let mut by_id: Vec<_> = groups.into_iter().map(|(group, id)| (id, group)).collect();
            by_id.sort();
            by_id.into_iter().map(|(_, group)| group).collect()
        };
        let mut meetings = Meetings {
            all: Vec::new(),
            parts: vec![Part { meeting: NONE, is_collective: false, is_send: false }; tasks.len()],
            hints: begins[..ranks.len()].to_vec(),
            tasks,
            begins,
        };
        for same in entries.chunk_by(|a, b| a.key == b.key) {
            meetings.add(ranks, &index, &groups, same)?;
        }
        Ok(meetings)
    }

    /// Adds the meetings of one key.
    fn add(
        &mut self,
        ranks: &[RankTasks],
        index: &BTreeMap<u32, u32>,
        groups: &[Arc<[u32]>],
        entries: &[Entry],
    ) -> Result<()> {
        let Key { group, from, to, tag } = entries[0].key;
        let is_collective = group != NONE;
        let sides: Vec<&[Entry]> = entries.chunk_by(|a, b| a.side == b.side).collect();
        let most = sides.iter().map(|side| side.len()).max().unwrap_or(0);
        // Ranks that are simulated and do it less often than others. What is not simulated is not waited for.
        let expected: Vec<(u32, u32)> = if is_collective {
            groups[group as usize].iter().filter_map(|rank| Some((*rank, *index.get(rank)?))).collect()
        } else {
            [(from, 0), (to, 1)].into_iter().filter(|(rank, _)| index.contains_key(rank)).collect()
        };
        for &(rank, side) in &expected {
            let found = sides.iter().find(|entries| entries[0].side == side).map_or(0, |entries| entries.len());
            let Some(more) = sides.iter().find(|entries| entries.len() > found) else { continue };
            let part = more[found].part as usize;
            let (owner, task) = self.owner(part);
            let (does, lacks) = match (is_collective, more[0].side) {
                (true, _) => (
                    format!("takes part in collective {found} with tag {tag} of ranks {:?}", groups[group as usize]),
                    format!("takes part in {found} of these"),
                ),
                (false, 0) => (format!("sends to it with tag {tag}"), format!("receives {found} of these")),
                (false, _) => (format!("receives from it with tag {tag}"), format!("sends {found} of these")),
            };
            let tasks = &ranks[owner as usize];
            let label = tasks.labels[task as usize].clone();
            return Err(Error::Unmatched { rank: tasks.rank, task: label, does, peer: rank, lacks });
        }
        let first = self.all.len() as u32;
        // A receive waits for its send, if there is one; a collective for all that take part.
        let missing = if is_collective { expected.len() } else { usize::from(entries[0].side == 0) };
        self.all.extend((0..most).map(|_| Meeting { missing: missing as u32, nanos: 0, waiting: NONE }));
        for side in sides {
            for (meeting, entry) in (first..).zip(side) {
                let is_send = !is_collective && entry.side == 0;
                self.parts[entry.part as usize] = Part { meeting, is_collective, is_send };
            }
        }
        Ok(())
    }

    /// Rank, as an index, and task of a part.
    fn owner(&self, part: usize) -> (u32, u32) {
        let rank = self.begins.partition_point(|&begin| begin <= part) - 1;
        (rank as u32, self.tasks[part])
    }

    /// Where the parts of a task are in `parts`.
    pub fn parts_of(&mut self, rank: usize, task: u32) -> Range<usize> {
        let (begin, end) = (self.begins[rank], self.begins[rank + 1]);
        let tasks = &self.tasks[begin..end];
        let hint = self.hints[rank] - begin;
        let is_first = tasks.get(hint).is_none_or(|&of| of >= task) && (hint == 0 || tasks[hint - 1] < task);
        let first = if is_first { hint } else { tasks.partition_point(|&of| of < task) };
        let num_parts = tasks[first..].iter().take_while(|&&of| of == task).count();
        self.hints[rank] = begin + first + num_parts;
        begin + first..begin + first + num_parts
    }

    /// Ranks, as indices, and tasks that a meeting waits for; for errors.
    pub fn members(&self, meeting: u32) -> Vec<(u32, u32)> {
        let parts = self.parts.iter().enumerate().filter(|(_, part)| part.meeting == meeting);
        parts.filter(|(_, part)| part.is_collective || part.is_send).map(|(i, _)| self.owner(i)).collect()
    }
}
