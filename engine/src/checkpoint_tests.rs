//! What survives: full disks, cut-off saves, truncation, flipped bits.
#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::{collections::BTreeMap, io::Write as _, process::Command};

use super::*;
use crate::tensor_file::TensorFile;

/// Fills a checkpoint with a model file and a state file that hold `value`.
fn fill(value: f32) -> impl FnOnce(&Path) -> Result<(), BoxError> {
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
        save(dir.path(), step, 10, fill(step as f32)).unwrap();
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
    let manifest: serde_json::Value = serde_json::from_slice(&fs::read(path.join(MANIFEST)).unwrap()).unwrap();
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
    save(dir.path(), 40, 3, fill(4.0)).unwrap();
    assert_eq!(steps(dir.path()), [40, 30, 20]);
    // The run went back to 20 and went on from there.
    save(dir.path(), 25, 2, fill(5.0)).unwrap();
    assert_eq!(steps(dir.path()), [25, 20]);
    save(dir.path(), 26, 0, fill(6.0)).unwrap();
    assert_eq!(steps(dir.path()), [26]);
}

#[test]
fn a_checkpoint_of_the_same_step_is_replaced() {
    let dir = saved(&[10]);
    save(dir.path(), 10, 2, fill(-1.0)).unwrap();
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
    let cases: [(&str, Damage, &str); 7] = [
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
        ("no manifest", |path| fs::remove_file(path.join(MANIFEST)).unwrap(), "train/manifest.json: No such file"),
        ("half a manifest", |path| rewrite(&path.join(MANIFEST), |b| b.truncate(50)), "manifest.json is damaged: EOF"),
        (
            "a manifest of another step",
            |path| {
                fs::copy(path.join("../step-0000010").join(MANIFEST), path.join(MANIFEST)).unwrap();
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
            "step-0000020: permission denied; make it writable for this user",
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
    save(dir.path(), 30, 5, fill(3.0)).unwrap();
    assert_eq!(state(dir.path()).0, ["step-0000010", "step-0000030"]);
}

#[test]
fn a_place_that_is_none_is_named() {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("checkpoints"), "a file").unwrap();
    let error = save(dir.path(), 1, 1, fill(0.0)).unwrap_err().to_string();
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
        save(dir.path(), 10, 2, fill(1.0)).unwrap();
        let before = state(dir.path());
        let contents: BTreeMap<PathBuf, Vec<u8>> = files(dir.path())
            .unwrap()
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
            assert_eq!(fs::read(dir.path().join(&file)).unwrap(), bytes, "{}", file.display());
        }
        assert_eq!(latest_valid(dir.path()).unwrap().step, 10);
        save(dir.path(), 20, 1, fill(2.0)).unwrap();
        assert_eq!(latest_valid(dir.path()).unwrap().step, 20);
    });
    mount(&["umount"]).unwrap();
    outcome.unwrap();
}
