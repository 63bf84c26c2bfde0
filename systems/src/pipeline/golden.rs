//! Small schedules as text files, so that a change of an order is seen. `UPDATE_GOLDEN=1` writes them anew.
#![expect(clippy::unwrap_used, reason = "tests")]

use std::{env, fs, path::Path};

use super::{ScheduleKind, action::Schedule};

#[test]
fn schedules_are_as_written_down() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/pipeline/golden");
    let cases = [
        ("gpipe", 4, 4),
        ("1f1b", 4, 8),
        ("interleaved:2", 4, 8),
        ("zb-h1", 4, 8),
        ("zb-h2", 4, 8),
        ("zbv", 4, 8),
        ("dualpipe", 4, 8),
        ("dualpipe", 8, 20),
        ("dualpipev", 2, 6),
        ("dualpipev", 4, 10),
    ];
    for (name, ranks, microbatches) in cases {
        let schedule = name.parse::<ScheduleKind>().unwrap().build(ranks, microbatches).unwrap();
        let path = folder.join(format!("{}-{ranks}-{microbatches}.txt", name.replace(':', "-")));
        let title = format!("# {name}: {ranks} ranks, {microbatches} microbatches\n");
        let text = title + &schedule.to_text();
        if env::var_os("UPDATE_GOLDEN").is_some() {
            fs::create_dir_all(&folder).unwrap();
            fs::write(&path, &text).unwrap();
        }
        let golden = fs::read_to_string(&path).unwrap_or_default();
        assert_eq!(golden, text, "{} differs; UPDATE_GOLDEN=1 writes it anew", path.display());
        assert_eq!(Schedule::from_text(&golden).unwrap(), schedule);
    }
}
