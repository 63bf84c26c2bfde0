//! Pipeline schedules from outside: what the verifier says of broken ones, and `hadal plan --schedule`.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{
    fs,
    path::Path,
    process::{Command, Output},
};

use serde_json::Value;
use systems::pipeline::{action::Schedule, verify::verify};

/// All that is wrong with a schedule, as text.
fn faults(text: &str) -> Vec<String> {
    let faults = verify(&Schedule::from_text(text).unwrap()).expect_err(text);
    faults.iter().map(ToString::to_string).collect()
}

#[test]
fn broken_schedules_are_described_by_their_labels() {
    let cases: [(&str, &str, &[&str]); 14] = [
        ("duplicate F", "0F0 0F0 0B0", &["0F0 occurs twice, on rank 0 (action 0) and on rank 0 (action 1)"]),
        (
            "duplicate F on another rank",
            "0F0 0B0\n0F0 1F0 1B0",
            &["0F0 occurs twice, on rank 0 (action 0) and on rank 1 (action 0)"],
        ),
        ("missing F", "0F0 0B0 0B1 0F2 0B2", &["0F1 is missing"]),
        ("missing W", "0F0 0I0 0F1 0I1 0W1", &["0W0 is missing"]),
        ("missing I", "0F0 0W0", &["0I0 is missing"]),
        (
            "missing backward",
            "0F0 0B0 0F1\n1F0 1B0 1F1 1B1",
            &["the backward of microbatch 1 on stage 0 is missing: 0B1, or 0I1 and 0W1"],
        ),
        ("both kinds of backward", "0F0 0I0 0W0 0B0", &["0B0 and 0I0 compute the same gradient; expected one of them"]),
        ("B and its own W", "0F0 0B0 0W0", &["0B0 and 0W0 compute the same gradient; expected one of them"]),
        ("W before I", "0F0 0W0 0I0", &["rank 0: 0W0 comes before 0I0, which it needs"]),
        ("backward before forward", "0B0 0F0", &["rank 0: 0B0 comes before 0F0, which it needs"]),
        ("activations elsewhere", "0F0\n0B0", &["0F0 is on rank 0, but 0B0 on rank 1; expected one rank"]),
        (
            "pair of one microbatch",
            "0F0&0B0",
            &["rank 0: 0F0&0B0 cannot overlap, since the backward of a microbatch needs all of its forwards"],
        ),
        (
            "swapped receive",
            "0F0 0F1 0B0 0B1\n1F1 1F0 1B0 1B1",
            &[
                "swapped receive: rank 1 comes to 1F1, which needs 0F1 of rank 0, while the next that rank 0 sends is 0F0",
            ],
        ),
        (
            "all at once",
            "0F0 0F0 0B0 0B1\n1F0 1I0 1F1 1B1",
            &["0F0 occurs twice, on rank 0 (action 0) and on rank 0 (action 1)", "0F1 is missing", "1W0 is missing"],
        ),
    ];
    for (name, text, expected) in cases {
        assert_eq!(faults(text), expected, "{name}");
    }
}

#[test]
fn a_deadlock_is_a_cycle_of_labels() {
    // Rank 0 wants a gradient before it sends the microbatch without which rank 1 makes none.
    let said = faults("0F0 0B0 0F1 0B1\n1F0 1F1 1B0 1B1");
    assert_eq!(
        said,
        [
            "deadlock: rank 0: 0B0 waits for rank 1: 1B0 waits for rank 1: 1F1 waits for rank 0: 0F1 waits for rank 0: 0B0"
        ]
    );
    // A pair is one action: neither half starts before both can.
    let said = faults("0F0 0F1&0B0 0B1\n1F0 1F1 1B0 1B1");
    assert_eq!(
        said,
        ["deadlock: rank 0: 0F1&0B0 waits for rank 1: 1B0 waits for rank 1: 1F1 waits for rank 0: 0F1&0B0"]
    );
}

#[test]
fn a_swapped_receive_is_one_even_where_a_deadlock_hides_it() {
    let said = faults("0F0 0F1 0B0 0B1\n1F1 1F0 1B1 1B0");
    assert_eq!(said.len(), 2, "{said:?}");
    assert!(said.iter().all(|fault| fault.starts_with("swapped receive: ")), "{said:?}");
}

#[test]
fn both_directions_and_both_kinds_of_messages_have_an_order_of_their_own() {
    // Two ranks, each the first of one direction: activations and gradients pass each other.
    let schedule = Schedule::from_text("0F0 1F1 0F2 1B1 0B0 1F3 0B2 1B3\n0F1 1F0 1B0 0F3 1F2 0B1 1B2 0B3");
    let checked = verify(&schedule.unwrap()).unwrap();
    assert_eq!(checked.order.len(), 16);
    assert_eq!(checked.peak_activations, [3, 3]);
}

#[test]
fn too_many_cells_are_refused_and_not_looked_for() {
    assert!(faults("4000000000F4000000000")[0].contains("are too many: their product may be 1048576 at most"));
    assert!(faults("4294967295F0 0F4294967295")[0].contains("too many"));
}

struct Ran {
    line: String,
    code: i32,
    stdout: String,
    stderr: String,
}

impl Ran {
    #[track_caller]
    fn exits(self, code: i32) -> Self {
        assert_eq!(self.code, code, "{}\nstdout:\n{}\nstderr:\n{}", self.line, self.stdout, self.stderr);
        self
    }

    #[track_caller]
    fn says(self, parts: &[&str]) -> Self {
        for part in parts {
            let said = self.stdout.contains(part) || self.stderr.contains(part);
            assert!(said, "{}\ndoes not say: {part}\nstdout:\n{}\nstderr:\n{}", self.line, self.stdout, self.stderr);
        }
        self
    }

    #[track_caller]
    fn json(&self) -> Value {
        serde_json::from_str(&self.stdout).unwrap_or_else(|e| panic!("{}\n{e}:\n{}", self.line, self.stdout))
    }
}

/// Runs `hadal plan`, its words separated by spaces.
fn plan(line: &str) -> Ran {
    let mut command = Command::new(env!("CARGO_BIN_EXE_hadal"));
    let command = command.arg("plan").args(line.split_whitespace()).current_dir(env!("CARGO_MANIFEST_DIR"));
    let Output { status, stdout, stderr } = command.output().unwrap();
    let text = |bytes| String::from_utf8(bytes).unwrap();
    Ran { line: format!("hadal plan {line}"), code: status.code().unwrap(), stdout: text(stdout), stderr: text(stderr) }
}

#[test]
fn any_schedule_can_be_played_at_any_costs() {
    let check = |line: &str, makespan: f64, idle: &[f64], peak: &[u32]| {
        let document = plan(&format!("{line} --json -")).exits(0).json();
        assert_eq!(document["makespan"], makespan, "{line}");
        assert_eq!(document["idle"], Value::from(idle), "{line}");
        assert_eq!(document["peak_activations"], Value::from(peak), "{line}");
        for (rank, row) in document["ranks"].as_array().unwrap().iter().enumerate() {
            assert_eq!(row["rank"], rank);
            assert_eq!(row["idle"], idle[rank]);
            assert_eq!(row["busy"].as_f64().unwrap() + idle[rank], makespan);
            assert_eq!(row["peak_activations"], peak[rank]);
        }
    };
    check("--schedule dualpipe --pp 8 --microbatches 20 --costs f=1,i=1,w=1,fb=3", 66.0, &[6.0; 8], &[9; 8]);
    check("--schedule zb-h1 --pp 8 --microbatches 20", 67.0, &[7.0; 8], &[8; 8]);
    check("--schedule 1f1b --pp 8 --microbatches 20", 81.0, &[21.0; 8], &[8, 7, 6, 5, 4, 3, 2, 1]);
    check("--schedule gpipe --pp 2 --microbatches 3 --costs f=2,b=5", 28.0, &[7.0; 2], &[3; 2]);
    check("--schedule interleaved:2 --pp 2 --microbatches 2", 15.0, &[3.0; 2], &[4, 3]);
    check("--schedule dualpipev --pp 4 --microbatches 12", 78.0, &[6.0; 4], &[9; 4]);
    check("--schedule 1f1b --pp 1 --microbatches 5", 15.0, &[0.0], &[1]);

    let document = plan("--schedule zb1p --pp 4 --microbatches 8 --costs f=1.5,w=0.5 --json").exits(0).json();
    assert_eq!((&document["schedule"], &document["pp"]), (&"zb-h1".into(), &4.into()));
    assert_eq!((&document["num_microbatches"], &document["num_stages"]), (&8.into(), &4.into()));
    assert_eq!(document["costs"], serde_json::json!({ "f": 1.5, "i": 1.0, "w": 0.5, "b": 1.5, "fb": 3.0 }));
    assert_eq!(document["published_idle"], document["idle"][0]);
}

#[test]
fn a_person_gets_a_table_and_a_timeline() {
    let ran = plan("--schedule dualpipe --pp 2 --microbatches 4").exits(0).says(&[
        "dualpipe: 2 ranks, 2 stages, 4 microbatches",
        "costs     F 1, I 1, W 1, B 2, F&B 3",
        "makespan  12",
        "bubble    0.0% of all time, 0 on the worst rank; 0 by the formula",
        "rank  idle  busy  peak activations  stages",
        "   1     0    12                 3  0 1",
    ]);
    let timeline = "0 F0--f2--F1--b2------f3&B0-------b3------I1--W1--";
    assert_eq!(ran.stdout.lines().find(|line| line.contains("0 F0")).map(str::trim), Some(timeline), "{}", ran.stdout);
    plan("--schedule 1f1b --pp 4 --microbatches 100").exits(0).says(&["timeline  too long for this width"]);
}

#[test]
fn what_is_printed_can_be_read_again() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("schedule");
    for name in ["1f1b", "interleaved:2", "zb-h2", "zbv", "dualpipe", "dualpipev"] {
        let asked = format!("--schedule {name} --pp 4 --microbatches 8");
        let printed = plan(&format!("{asked} --print")).exits(0).stdout;
        assert_eq!(printed.lines().count(), 4);
        fs::write(&path, format!("# a comment\n\n{printed}")).unwrap();
        let read = plan(&format!("--schedule {} --json -", path.display())).exits(0).json();
        let built = plan(&format!("{asked} --json -")).exits(0).json();
        for key in ["pp", "num_stages", "num_microbatches", "makespan", "ranks"] {
            assert_eq!(read[key], built[key], "{name} {key}");
        }
    }
}

#[test]
fn files_are_verified() {
    let folder = tempfile::tempdir().unwrap();
    let write = |name: &str, text: &str| {
        fs::write(folder.path().join(name), text).unwrap();
        folder.path().join(name).display().to_string()
    };
    let broken = write("broken.txt", "0F0 0F0 0B0 0B1\n1F0 1I0 1F1 1B1\n");
    let said = ["cannot run", "0F0 occurs twice", "0F1 is missing", "1W0 is missing"];
    plan(&format!("--schedule {broken}")).exits(2).says(&said);
    let many = write("many.txt", &(0..100).map(|m| format!("0F{m} ")).collect::<String>());
    plan(&format!("--schedule {many}")).exits(2).says(&["0B0, or 0I0", "and 80 more"]);
    let unread = write("unread.txt", "0F0 0X0\n\n0B0 1B");
    let said = ["unread.txt: line 1: expected", "found `0X0`", "unread.txt: line 3: expected", "found `1B`"];
    plan(&format!("--schedule {unread}")).exits(2).says(&said);
    let fine = write("fine.txt", "0F0 0B0");
    let asked = format!("--schedule {fine} --pp 2 --microbatches 3");
    plan(&asked).exits(2).says(&["--pp 2 is asked for, but", "has 1 ranks", "--microbatches 3", "has 1 microbatches"]);
    let none = folder.path().join("none.txt");
    plan(&format!("--schedule {}", none.display())).exits(2).says(&["cannot read the schedule", "none.txt"]);
    plan(&format!("--schedule {}", write("empty.txt", "# nothing\n"))).exits(2).says(&["found no action"]);
    // Endless, and far too large: refused, not tried.
    if Path::new("/dev/zero").exists() {
        plan("--schedule /dev/zero").exits(2);
    }
    plan(&format!("--schedule {}", write("large.txt", "4000000000F0 0B4000000000"))).exits(2).says(&["too many"]);
}

#[test]
fn all_errors_of_a_request_are_said_at_once_with_the_nearest_values() {
    let cases: [(&str, &[&str]); 12] = [
        ("", &["expected a scene file, --schedule or --experts", "hadal plan SCENE"]),
        ("scenes/tiny.ron --schedule 1f1b", &["cannot be used with"]),
        ("--pp 8", &["--schedule"]),
        ("--schedule dualpipe", &["--pp N is missing", "--microbatches N is missing"]),
        (
            "--schedule dualpipe --pp 7 --microbatches 9 --costs f=-1,x=2,w=w",
            &[
                "no dualpipe schedule for ranks = 7 and microbatches = 9",
                "ranks must be even, but is 7; nearest: 6 or 8",
                "microbatches must be even, but is 9",
                "at least twice the ranks (2 * 7), but is 9; nearest: 14",
                "valid: ranks = 6 with microbatches = 12 or ranks = 8 with microbatches = 16",
                "`f` must be a number from 0",
                "no cost `x`",
                "`w` must be a number from 0",
            ],
        ),
        ("--schedule dualpip", &["did you mean `dualpipe`?", "--pp N is missing", "--microbatches N is missing"]),
        ("--schedule interleaved --pp 2 --microbatches 2", &["as in `interleaved:2`"]),
        ("--schedule interleaved:2 --pp 4 --microbatches 6", &["nearest: 4 or 8"]),
        ("--schedule dualpipev --pp 4 --microbatches 7", &["nearest: 8"]),
        ("--schedule 1f1b --pp 4000000000 --microbatches 4000000000", &["must be at most 1048576"]),
        ("--schedule zbv --pp 500000 --microbatches 1", &["must be at most 1048576"]),
        (
            "--schedule 1f1b --pp 2 --microbatches 2 --print --json - --set a=1",
            &["both write to stdout", "there is none"],
        ),
    ];
    for (line, said) in cases {
        plan(line).exits(2).says(said);
    }
    let document = plan("--schedule dualpipe --pp 7 --microbatches 9 --json -").exits(2).json();
    assert!(document["errors"][0]["message"].as_str().unwrap().contains("nearest: 6 or 8"));
}
