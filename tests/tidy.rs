//! What reviewers would otherwise have to look for: every file says what it is, none is too long, and words stay where
//! they belong.

use std::{
    fs,
    path::{Path, PathBuf},
};

/// A file of code is read in one go.
const MAX_LINES: usize = 600;
/// Words of models, which the engine does not know.
const MODEL_WORDS: [&str; 8] = ["attention", "attentions", "expert", "experts", "token", "tokens", "loss", "losses"];

/// Where a token is what a request shows to be let in, and no piece of text.
const DOORS: [&str; 2] = ["engine/src/remote", "engine/src/control"];

/// All Rust files of the workspace, by their path from its root, with their text.
fn rust_files() -> Vec<(PathBuf, String)> {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut files = Vec::new();
    let mut folders: Vec<PathBuf> = ["src", "tests", "benches", "kernels", "engine", "systems", "editor"]
        .iter()
        .map(|name| root.join(name))
        .collect();
    while let Some(folder) = folders.pop() {
        for entry in fs::read_dir(&folder).expect("a folder of the workspace") {
            let path = entry.expect("its entry").path();
            if path.is_dir() && path.file_name().is_some_and(|name| name != "target") {
                folders.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let text = fs::read_to_string(&path).expect("a source file");
                files.push((path.strip_prefix(root).expect("a path below the root").to_path_buf(), text));
            }
        }
    }
    files.sort();
    files
}

/// Fails with all files for which `wrong` says what is wrong.
fn check(wrong: impl Fn(&Path, &str) -> Option<String>) {
    let files = rust_files();
    assert!(files.len() > 50, "only {} files found: is this looking in the right place?", files.len());
    let findings: Vec<String> =
        files.iter().filter_map(|(path, text)| Some(format!("{}: {}", path.display(), wrong(path, text)?))).collect();
    assert!(findings.is_empty(), "\n{}", findings.join("\n"));
}

/// Words of a text in small letters; `num_tokens` and `NumTokens` are two each.
fn words(text: &str) -> Vec<String> {
    let mut words = vec![String::new()];
    let mut before = ' ';
    for c in text.chars() {
        let begins = !c.is_alphabetic() || (c.is_uppercase() && before.is_lowercase());
        if begins {
            words.push(String::new());
        }
        if let (true, Some(word)) = (c.is_alphabetic(), words.last_mut()) {
            word.extend(c.to_lowercase());
        }
        before = c;
    }
    words.retain(|word| !word.is_empty());
    words
}

/// The line without its comment.
fn code(line: &str) -> &str {
    line.split("//").next().unwrap_or_default()
}

#[test]
fn every_file_says_what_it_is() {
    check(|_, text| (!text.starts_with("//! ")).then(|| "does not open with `//!`".into()));
}

#[test]
fn no_file_is_too_long() {
    check(|_, text| {
        let lines = text.lines().count();
        (lines > MAX_LINES).then(|| format!("{lines} lines, more than {MAX_LINES}"))
    });
}

#[test]
fn the_engine_does_not_know_models() {
    check(|path, text| {
        let mut lines = text.lines().enumerate().filter(|_| path.starts_with("engine/src"));
        lines.find_map(|(i, line)| {
            let is_of_models = |word: &String| {
                let opens_doors = word == "token" && DOORS.iter().any(|door| path.to_string_lossy().starts_with(door));
                MODEL_WORDS.contains(&word.as_str()) && !opens_doors
            };
            let word = words(line).into_iter().find(is_of_models)?;
            Some(format!("line {}: says `{word}`", i + 1))
        })
    });
}

#[test]
fn memory_is_touched_by_hand_in_kernels_only() {
    // In two pieces, for this file is looked at as well.
    let word = concat!("un", "safe");
    let is_word = |c: char| c.is_alphanumeric() || c == '_';
    check(|path, text| {
        let mut lines = text.lines().enumerate().filter(|_| !path.starts_with("kernels"));
        let (i, _) = lines.find(|(_, line)| code(line).split(|c| !is_word(c)).any(|found| found == word))?;
        Some(format!("line {}: `{word}`", i + 1))
    });
}

#[test]
fn a_build_without_default_features_has_no_window() {
    let tree = |features: &[&str]| {
        let mut command = std::process::Command::new(env!("CARGO"));
        command.args(["tree", "--offline", "--locked", "--edges", "normal", "--prefix", "none"]).args(features);
        let output = command.current_dir(env!("CARGO_MANIFEST_DIR")).output().expect("cargo starts");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        let text = String::from_utf8_lossy(&output.stdout).into_owned();
        text.lines()
            .filter(|line| ["editor ", "egui ", "eframe ", "winit "].iter().any(|name| line.starts_with(name)))
            .count()
    };
    assert_eq!(tree(&["--no-default-features"]), 0);
    assert!(tree(&[]) >= 4);
}

#[test]
fn words_are_found_inside_of_names() {
    assert_eq!(words("num_tokens: TokenLoss, lossless"), ["num", "tokens", "token", "loss", "lossless"]);
    assert_eq!(words("a `expert`'s GPU"), ["a", "expert", "s", "gpu"]);
}
