//! Who keeps whom waiting: from what ranks tell of themselves, as pure data.

use super::{Report, Wait};

/// A rank, as somebody who listens to it sees it.
#[derive(Clone, Debug, Default)]
pub struct Seen {
    pub rank: u32,
    /// What it told last; nothing yet, if this is none.
    pub report: Option<Report>,
    /// Since it last spoke.
    pub silent_nanos: u64,
    /// Since it last did anything.
    pub unchanged_nanos: u64,
}

impl Seen {
    fn is_done(&self) -> bool {
        self.report.as_ref().is_some_and(|report| report.is_last)
    }

    fn waits(&self) -> &[Wait] {
        self.report.as_ref().map_or(&[], |report| &report.waits)
    }

    /// `in step 4, in attention_forward`.
    fn place(&self) -> String {
        let Some(report) = &self.report else { return "it never spoke".into() };
        let mut text = format!("in step {}", report.step);
        if !report.doing.is_empty() {
            text += &format!(", its host in {}", report.doing);
        }
        for wait in &report.waits {
            text += &format!(", in {}", describe(wait));
        }
        text
    }
}

fn describe(wait: &Wait) -> String {
    let Wait { op, tag, number, of, .. } = wait;
    match (wait.is_message, of.first()) {
        (true, Some(peer)) => format!("{op} with rank {peer} (tag {tag})"),
        _ if of.len() > 16 => format!("{op} (tag {tag}), number {number} of its group of {} ranks", of.len()),
        _ => format!("{op} (tag {tag}), number {number} of the group {of:?}"),
    }
}

/// How long a rank may be silent, and how long it may be waited for, with why so long.
pub struct Deadline {
    pub silent_nanos: u64,
    pub wait_nanos: u64,
    pub why: String,
}

/// The rank that is lost, if one is, and how that is known: who has been silent too long; else who does not come to what others wait
/// in, and itself waits for nobody.
pub fn judge(seen: &[Seen], deadline: &Deadline) -> Option<(u32, String)> {
    let secs = |nanos: u64| nanos as f64 * 1e-9;
    let silent = seen.iter().filter(|one| !one.is_done() && one.silent_nanos > deadline.silent_nanos);
    if let Some(lost) = silent.max_by_key(|one| one.silent_nanos) {
        let message = format!(
            "not heard of for {:.1} s (watchdog.min_secs is {:.1}): stopped, dead or cut off; last seen {}",
            secs(lost.silent_nanos),
            secs(deadline.silent_nanos),
            lost.place()
        );
        return Some((lost.rank, message));
    }
    let mut waits = Vec::new();
    for one in seen.iter().filter(|one| one.unchanged_nanos > deadline.wait_nanos) {
        for wait in one.waits().iter().filter(|wait| wait.age_nanos > deadline.wait_nanos) {
            waits.extend(seen.iter().filter(|other| is_missing(one, wait, other)).map(|other| (one, wait, other)));
        }
    }
    let stands = |one: &&Seen| one.unchanged_nanos > deadline.wait_nanos;
    let waits_itself = |one: &Seen| waits.iter().any(|(waiting, ..)| waiting.rank == one.rank);
    let because = format!("the deadline is {:.1} s: {}", secs(deadline.wait_nanos), deadline.why);
    let missing = || waits.iter().filter(|(_, _, missing)| stands(missing));
    if let Some((waiting, wait, lost)) = missing().find(|(_, _, missing)| !waits_itself(missing)) {
        let message = format!(
            "does not come to {}, where rank {} has waited for {:.1} s ({because}); it is {}",
            describe(wait),
            waiting.rank,
            secs(wait.age_nanos),
            lost.place()
        );
        return Some((lost.rank, message));
    }
    // All who are waited for wait themselves.
    let (_, _, lost) = missing().next()?;
    let all: Vec<String> = waits.iter().map(|(one, ..)| format!("rank {} is {}", one.rank, one.place())).collect();
    let mut all: Vec<&str> = all.iter().map(String::as_str).collect();
    all.dedup();
    Some((lost.rank, format!("ranks wait for each other ({because}): {}", all.join("; "))))
}

/// Whether `one` waits for `other`, who is not there.
fn is_missing(one: &Seen, wait: &Wait, other: &Seen) -> bool {
    let same = |theirs: &Wait| (theirs.lane, theirs.number, &theirs.of) == (wait.lane, wait.number, &wait.of);
    other.rank != one.rank
        && wait.of.contains(&other.rank)
        && (wait.is_message || !other.waits().iter().any(|theirs| !theirs.is_message && same(theirs)))
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: u64 = 1_000_000_000;

    fn deadline() -> Deadline {
        Deadline { silent_nanos: 3 * SECOND, wait_nanos: 10 * SECOND, why: "as a test has it".into() }
    }

    fn collective(op: &str, number: u64, of: &[u32], secs: u64) -> Wait {
        let (op, of, age_nanos) = (op.into(), of.to_vec(), secs * SECOND);
        Wait { op, tag: 7, lane: 0, number, of, is_message: false, age_nanos }
    }

    fn message(from: u32, secs: u64) -> Wait {
        Wait { is_message: true, ..collective("receive", 0, &[from], secs) }
    }

    /// A rank that spoke just now, and has done nothing for so many seconds.
    fn seen(rank: u32, unchanged_secs: u64, waits: Vec<Wait>) -> Seen {
        let report = Report { num_done: 5, step: 4, doing: "attention_forward".into(), waits, ..Report::default() };
        Seen { rank, report: Some(report), silent_nanos: 0, unchanged_nanos: unchanged_secs * SECOND }
    }

    #[test]
    fn who_is_silent_is_lost() {
        let mut ranks = vec![seen(0, 4, vec![collective("dispatch", 3, &[0, 1], 4)]), seen(1, 4, vec![])];
        assert_eq!(judge(&ranks, &deadline()), None);
        ranks[1].silent_nanos = 4 * SECOND;
        let (rank, message) = judge(&ranks, &deadline()).expect("a verdict");
        assert_eq!(rank, 1);
        assert!(message.contains("not heard of for 4.0 s") && message.contains("in step 4"), "{message}");
        ranks[1].report.as_mut().expect("a report").is_last = true;
        assert_eq!(judge(&ranks, &deadline()), None, "one that is done may be silent");
    }

    #[test]
    fn who_does_not_come_is_lost_and_not_who_waits() {
        // 0 waits for a message of 1, which waits for 2 in a collective; 2 does something for ever.
        let ranks = [
            seen(0, 12, vec![message(1, 12)]),
            seen(1, 13, vec![collective("dispatch", 31, &[1, 2], 13)]),
            seen(2, 14, vec![]),
        ];
        let (rank, message) = judge(&ranks, &deadline()).expect("a verdict");
        assert_eq!(rank, 2);
        assert!(message.contains("does not come to dispatch (tag 7), number 31 of the group [1, 2]"), "{message}");
        assert!(message.contains("where rank 1 has waited for 13.0 s"), "{message}");
        assert!(message.contains("its host in attention_forward"), "{message}");
    }

    #[test]
    fn a_member_that_is_elsewhere_is_missing_where_the_others_are() {
        let waits = |numbers: [u64; 3]| -> Vec<Seen> {
            let wait = |number| vec![collective("all_gather", number, &[0, 1, 2], 11)];
            (0..).zip(numbers).map(|(rank, number)| seen(rank, 11, wait(number))).collect()
        };
        let (_, message) = judge(&waits([5, 5, 6]), &deadline()).expect("a verdict");
        assert!(message.contains("ranks wait for each other") && message.contains("number 6"), "{message}");
        assert_eq!(judge(&waits([5, 5, 5]), &deadline()), None, "all are there: it is under way");
    }

    #[test]
    fn who_works_is_not_lost() {
        let waiting = seen(0, 12, vec![collective("dispatch", 3, &[0, 1], 12)]);
        assert_eq!(judge(&[waiting.clone(), seen(1, 2, vec![])], &deadline()), None);
        assert!(judge(&[waiting, seen(1, 11, vec![])], &deadline()).is_some());
    }
}
