//! What survives: full disks, cut-off saves, truncation, flipped bits, and whatever else can happen to a file.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, io::Write as _, process::Command};

use super::{commit::STAGES, *};
use crate::tensor_file::TensorFile;

/// Saves a checkpoint that one writes, and keeps the last `keep_last`.
fn save(
    root: &Path,
    step: u64,
    keep_last: usize,
    write: impl FnOnce(&Path) -> Result<(), BoxError>,
) -> Result<PathBuf, Error> {
    let draft = Draft::begin(root, step)?;
    let files = fill(&Draft::folder(root, step), |folder| {
        write(folder)?;
        Ok(files(folder))
    })?;
    draft.commit(files, Keep::last(keep_last))
}

/// Files under `folder`, relative to it, sorted.
fn files(folder: &Path) -> Vec<String> {
    let mut found = Vec::new();
    let mut open = vec![folder.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                open.push(path);
            } else {
                found.push(path.strip_prefix(folder).unwrap().to_str().unwrap().to_owned());
            }
        }
    }
    found.sort();
    found
}

/// Fills a checkpoint with a model file and a state file that hold `value`.
fn model(value: f32) -> impl FnOnce(&Path) -> Result<(), BoxError> {
    move |folder| {
        let data = [value; 100];
        let mut tensors = TensorFile::new();
        tensors.insert("w", &[10, 10], &data);
        tensors.write(&folder.join("model.safetensors"))?;
        fs::create_dir_all(folder.join("train"))?;
        fs::write(folder.join("train/state.json"), format!("{{\"value\": {value}}}"))?;
        Ok(())
    }
}

fn value(path: &Path) -> f32 {
    TensorFile::read(&path.join("model.safetensors")).unwrap().get::<f32>("w", &[10, 10]).unwrap()[0]
}

/// All names under `root/checkpoints`, and what `latest` links to.
fn state(root: &Path) -> (Vec<String>, Option<PathBuf>) {
    let entries = fs::read_dir(root.join("checkpoints")).unwrap();
    let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    (names, fs::read_link(root.join("latest")).ok())
}

fn saved(steps: &[u64]) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    for &step in steps {
        save(dir.path(), step, 10, model(step as f32)).unwrap();
    }
    dir
}

#[test]
fn a_checkpoint_is_saved_listed_and_found() {
    let dir = saved(&[100]);
    let found = latest_valid(dir.path()).unwrap();
    let path = dir.path().join("checkpoints/step-0000100");
    assert_eq!((found.path.as_deref(), found.step, found.skipped.len()), (Some(&*path), 100, 0));
    assert_eq!(value(&dir.path().join("latest")), 100.0);
    let manifest: serde_json::Value =
        serde_json::from_slice(&fs::read(path.join(TRAIN).join(MANIFEST)).unwrap()).unwrap();
    let listed = |i: usize| manifest["files"][i]["path"].as_str().unwrap().to_owned();
    assert_eq!([listed(0), listed(1)], ["model.safetensors", "train/state.json"]);
    assert_eq!(manifest["files"][1]["size_bytes"], r#"{"value": 100}"#.len());
    // By `printf '{"value": 100}' | sha256sum`.
    let sha256 = "7c805b237d04568d51089ed93cb18821782f604f51496a864421bca1c4f7641a";
    assert_eq!(manifest["files"][1]["sha256"], sha256);
}

#[test]
fn an_empty_run_directory_has_none() {
    let dir = tempfile::tempdir().unwrap();
    let found = latest_valid(dir.path()).unwrap();
    assert!(found.path.is_none() && found.skipped.is_empty());
}

#[test]
fn old_checkpoints_go_and_abandoned_ones_first() {
    let dir = saved(&[10, 20, 30]);
    let steps = |root: &Path| steps(&root.join(FOLDER)).unwrap();
    save(dir.path(), 40, 3, model(4.0)).unwrap();
    assert_eq!(steps(dir.path()), [40, 30, 20]);
    // The run went back to 20 and went on from there.
    save(dir.path(), 25, 2, model(5.0)).unwrap();
    assert_eq!(steps(dir.path()), [25, 20]);
    save(dir.path(), 26, 0, model(6.0)).unwrap();
    assert_eq!(steps(dir.path()), [26]);
}

#[test]
fn some_checkpoints_are_kept_for_ever() {
    let dir = tempfile::tempdir().unwrap();
    let keep = Keep { last: 2, every_steps: Some(20) };
    for step in (5..=60).step_by(5) {
        let draft = Draft::begin(dir.path(), step).unwrap();
        let files = fill(&Draft::folder(dir.path(), step), |_| Ok(Vec::new())).unwrap();
        draft.commit(files, keep).unwrap();
        let mut kept: Vec<u64> = (20..=step).step_by(20).chain([step.saturating_sub(5).max(5), step]).collect();
        kept.sort_unstable_by(|a, b| b.cmp(a));
        kept.dedup();
        assert_eq!(steps(&dir.path().join(FOLDER)).unwrap(), kept, "at step {step}");
    }
}

#[test]
fn wherever_a_commit_is_cut_off_the_one_before_stays() {
    for step in [20, 10] {
        for num_stages in 0..=STAGES.len() {
            let dir = saved(&[5, 10]);
            let draft = Draft::begin(dir.path(), step).unwrap();
            let listed = fill(&Draft::folder(dir.path(), step), |folder| {
                model(-1.0)(folder)?;
                Ok(files(folder))
            });
            let commit = draft.listing(listed.unwrap(), Keep::last(1));
            STAGES.iter().take(num_stages).for_each(|stage| stage(&commit).unwrap());
            // As a process that is killed: nothing is tidied up.
            std::mem::forget(commit);
            let found = latest_valid(dir.path()).unwrap();
            let latest = value(&dir.path().join("latest"));
            let name = format!("step {step}, {num_stages} stages");
            // One of the same step takes its place at once, in the fourth.
            let is_new = num_stages >= if step == 20 { 6 } else { 4 };
            assert_eq!((found.skipped.len(), value(&found.path.unwrap())), (0, latest), "{name}");
            assert_eq!(latest, if is_new { -1.0 } else { 10.0 }, "{name}");
            let pruned = num_stages == STAGES.len();
            assert_eq!(
                path(dir.path(), 5).exists(),
                !pruned,
                "{name}: nothing is removed before the new one is durable"
            );
            // The next save clears what was left.
            save(dir.path(), 30, 5, model(3.0)).unwrap();
            assert_eq!(latest_valid(dir.path()).unwrap().step, 30);
            assert!(state(dir.path()).0.iter().all(|name| name.starts_with("step-")), "{name}");
        }
    }
}

/// Draws numbers (SplitMix64, Steele et al. 2014).
struct Random(u64);

impl Random {
    fn below(&mut self, end: usize) -> usize {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ x >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ x >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ x >> 31) % end as u64) as usize
    }
}

#[test]
fn ten_thousand_corruptions_and_none_goes_unnoticed() {
    let dir = tempfile::tempdir().unwrap();
    for step in [10, 20] {
        save(dir.path(), step, 2, |folder| {
            for shard in ["model-00001-of-00002", "model-00002-of-00002", "train/optimizer"] {
                let data: Vec<f32> = (0..60).map(|i| (i + step) as f32).collect();
                let mut tensors = TensorFile::new();
                tensors.insert(shard, &[60], &data);
                tensors.write(&folder.join(format!("{shard}.safetensors")))?;
            }
            for name in ["config.json", "model.safetensors.index.json", "train/state.json", "train/scene.ron"] {
                fs::write(folder.join(name), format!("{{\"{name}\": {step}}}"))?;
            }
            Ok(())
        })
        .unwrap();
    }
    let newest = path(dir.path(), 20);
    let contents: Vec<(String, Vec<u8>)> =
        files(&newest).into_iter().map(|file| (file.clone(), fs::read(newest.join(&file)).unwrap())).collect();
    assert_eq!(contents.len(), 9, "manifest and digest among them");
    let mut random = Random(7);
    let mut kinds = [0; 4];
    for i in 0..10_000 {
        let (file, bytes) = &contents[random.below(contents.len())];
        let (at, kind) = (random.below(bytes.len()), random.below(4));
        let damaged = newest.join(file);
        let mut changed = bytes.clone();
        let what = match kind {
            0 => {
                fs::remove_file(&damaged).unwrap();
                "removed".to_owned()
            }
            1 => {
                changed.truncate(at);
                fs::write(&damaged, changed).unwrap();
                format!("cut after {at} bytes")
            }
            2 => {
                changed[at] ^= 1 + random.below(255) as u8;
                fs::write(&damaged, changed).unwrap();
                format!("another byte {at}")
            }
            _ => {
                changed[at] ^= 1 << random.below(8);
                fs::write(&damaged, changed).unwrap();
                format!("a flipped bit in byte {at}")
            }
        };
        kinds[kind] += 1;
        let found = latest_valid(dir.path()).unwrap();
        assert_eq!((found.step, found.skipped.len()), (10, 1), "{i}: {file}, {what}");
        let (skipped, why) = &found.skipped[0];
        // A manifest and a digest that differ: nobody knows which of them it was, and both are named.
        let named = if file.contains("manifest") { "manifest" } else { file };
        assert!(*skipped == newest && why.contains(named), "{i}: {file}, {what}: {why}");
        fs::write(&damaged, bytes).unwrap();
    }
    assert!(kinds.iter().all(|&num| num > 2000), "{kinds:?}");
    assert_eq!(latest_valid(dir.path()).unwrap().step, 20, "what was put back is whole");
}

#[test]
fn many_write_and_many_verify() {
    let dir = saved(&[10]);
    let draft = Draft::begin(dir.path(), 20).unwrap();
    let folder = Draft::folder(dir.path(), 20);
    let part = |name: &str| {
        fill(&folder, |folder| {
            fs::write(folder.join(name), name)?;
            Ok(vec![name.to_owned()])
        })
    };
    let all: Vec<Listed> = ["c", "a", "b"].into_iter().flat_map(|name| part(name).unwrap()).collect();
    let path = draft.commit(all, Keep::last(2)).unwrap();
    verify(&path, 20).unwrap();
    fs::write(path.join("b"), "B").unwrap();
    let shares: Vec<bool> = (0..3).map(|which| verify_share(&path, 20, (which, 3)).is_ok()).collect();
    assert_eq!(shares, [true, false, true]);
    assert!(verify(&path, 20).is_err());
}

#[test]
fn a_checkpoint_of_the_same_step_is_replaced() {
    let dir = saved(&[10]);
    save(dir.path(), 10, 2, model(-1.0)).unwrap();
    let found = latest_valid(dir.path()).unwrap().path.unwrap();
    assert_eq!(value(&found), -1.0);
    assert_eq!(state(dir.path()).0, ["step-0000010"]);
}

#[test]
fn damage_is_found_and_the_one_before_is_used() {
    type Damage = fn(&Path);
    fn rewrite(path: &Path, change: impl FnOnce(&mut Vec<u8>)) {
        let mut bytes = fs::read(path).unwrap();
        change(&mut bytes);
        fs::write(path, bytes).unwrap();
    }
    let cases: [(&str, Damage, &str); 8] = [
        (
            "truncation",
            |path| rewrite(&path.join("model.safetensors"), |bytes| bytes.truncate(bytes.len() - 7)),
            "model.safetensors is damaged: expected ",
        ),
        (
            "a flipped bit",
            |path| rewrite(&path.join("model.safetensors"), |bytes| *bytes.last_mut().unwrap() ^= 1),
            "model.safetensors is damaged: expected SHA-256 ",
        ),
        ("a missing file", |path| fs::remove_file(path.join("train/state.json")).unwrap(), "train/state.json: No such"),
        (
            "no manifest",
            |path| fs::remove_file(path.join(TRAIN).join(MANIFEST)).unwrap(),
            "train/manifest.json: No such file",
        ),
        (
            "no digest",
            |path| fs::remove_file(path.join(TRAIN).join(DIGEST)).unwrap(),
            "train/manifest.sha256: No such file",
        ),
        (
            "half a manifest",
            |path| rewrite(&path.join(TRAIN).join(MANIFEST), |b| b.truncate(50)),
            "manifest.json is damaged: it is `",
        ),
        (
            "a manifest of another step",
            |path| {
                for name in [MANIFEST, DIGEST] {
                    fs::copy(path.join("../step-0000010/train").join(name), path.join(TRAIN).join(name)).unwrap();
                }
            },
            "manifest.json is damaged: it is of step 10, the folder's name says 20",
        ),
        (
            "no file at all",
            |path| fs::remove_dir_all(path).and_then(|()| fs::create_dir(path)).unwrap(),
            "No such file",
        ),
    ];
    for (name, damage, reason) in cases {
        let dir = saved(&[10, 20]);
        let newest = dir.path().join("checkpoints/step-0000020");
        damage(&newest);
        let found = latest_valid(dir.path()).unwrap();
        assert_eq!(found.step, 10, "{name}");
        assert_eq!(value(&found.path.unwrap()), 10.0, "{name}");
        let [(path, why)] = &found.skipped[..] else { panic!("{name}: one is skipped") };
        assert_eq!(*path, newest, "{name}");
        assert!(why.contains(reason), "{name}: {why}");
    }
}

#[test]
fn failures_leave_what_was_there() {
    type Fill = fn(&Path) -> Result<(), BoxError>;
    let cases: [(&str, Fill, &str); 4] = [
        (
            "a full device",
            |folder| {
                fs::write(folder.join("part"), "some")?;
                // The operating system's own refusal.
                let full = Path::new("/dev/full");
                let write = File::options().write(true).open(full).and_then(|mut file| file.write_all(&[0; 64]));
                Ok(write.map_err(io_error("write", full))?)
            },
            "cannot write /dev/full: No space left on device (os error 28); free space there",
        ),
        (
            "an error with no path",
            |_| Err(io::Error::from(ErrorKind::PermissionDenied).into()),
            "step-0000020: permission denied; give this user access to it",
        ),
        ("any other error", |_| Err("state is not finite".into()), "step-0000020: state is not finite"),
        (
            "a panic",
            |folder| {
                fs::write(folder.join("part"), "some")?;
                panic!("a bug");
            },
            "",
        ),
    ];
    for (name, fill, message) in cases {
        let dir = saved(&[10]);
        let before = state(dir.path());
        let result = std::panic::catch_unwind(|| save(dir.path(), 20, 1, fill));
        if let Ok(result) = result {
            let error = result.unwrap_err().to_string();
            assert!(error.contains(message), "{name}: {error}");
        }
        assert_eq!(state(dir.path()), before, "{name}");
        assert_eq!(latest_valid(dir.path()).unwrap().step, 10, "{name}");
    }
}

#[test]
fn a_save_that_was_cut_off_is_ignored_and_cleared() {
    let dir = saved(&[10]);
    let half = dir.path().join("checkpoints/.tmp-step-0000020");
    fs::create_dir_all(half.join("train")).unwrap();
    fs::write(half.join("model.safetensors"), "half").unwrap();
    assert_eq!(latest_valid(dir.path()).unwrap().step, 10);
    save(dir.path(), 30, 5, model(3.0)).unwrap();
    assert_eq!(state(dir.path()).0, ["step-0000010", "step-0000030"]);
}

#[test]
fn a_place_that_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("checkpoints"), "a file").unwrap();
    let error = save(dir.path(), 1, 1, model(0.0)).unwrap_err().to_string();
    assert!(error.starts_with("cannot make ") && error.contains("checkpoints: "), "{error}");
}

/// A real disk that is too small, where the tests may mount one; `failures_leave_what_was_there` covers the rest.
#[test]
fn a_disk_that_fills_up_while_saving_loses_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let mount = |args: &[&str]| Command::new(args[0]).args(&args[1..]).arg(dir.path()).output();
    let mounted = mount(&["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs"]);
    if !mounted.is_ok_and(|output| output.status.success()) {
        eprintln!("not run: no permission to mount a tmpfs");
        return;
    }
    let outcome = std::panic::catch_unwind(|| {
        save(dir.path(), 10, 2, model(1.0)).unwrap();
        let before = state(dir.path());
        let contents: BTreeMap<String, Vec<u8>> = files(dir.path())
            .into_iter()
            .map(|file| (file.clone(), fs::read(dir.path().join(&file)).unwrap()))
            .collect();
        let error = save(dir.path(), 20, 2, |folder| {
            let data = vec![0f32; 100_000];
            let mut tensors = TensorFile::new();
            tensors.insert("w", &[100_000], &data);
            Ok(tensors.write(&folder.join("model.safetensors"))?)
        });
        let error = error.unwrap_err().to_string();
        assert!(error.contains("model.safetensors: No space left on device"), "{error}");
        assert!(error.contains("free space there"), "{error}");
        assert_eq!(state(dir.path()), before);
        for (file, bytes) in contents {
            assert_eq!(fs::read(dir.path().join(&file)).unwrap(), bytes, "{file}");
        }
        assert_eq!(latest_valid(dir.path()).unwrap().step, 10);
        save(dir.path(), 20, 1, model(2.0)).unwrap();
        assert_eq!(latest_valid(dir.path()).unwrap().step, 20);
    });
    mount(&["umount"]).unwrap();
    outcome.unwrap();
}
