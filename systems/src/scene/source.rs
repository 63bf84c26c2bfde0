//! The texts a scene is made of: the file, the files it extends, and the `--set` overrides, each read to a tree, the
//! trees merged with the nearest text winning.
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::diagnostic::Finding;
use super::syntax;
use super::tree::{self, At, Field, Kind, Node};

/// Files in one chain of `extends`; more is taken for a mistake.
const MAX_EXTENDS: usize = 16;

/// One text.
#[derive(Clone, Debug)]
pub(super) struct Source {
    /// How messages call it: the path as it was given, or `--set`.
    pub name: String,
    pub text: Arc<str>,
    /// Folder that relative paths in this text start from; `None` leaves them as they are.
    pub dir: Option<PathBuf>,
}

/// All texts of one scene; an [`At`] indexes it.
#[derive(Clone, Debug, Default)]
pub(super) struct Sources(pub Vec<Source>);

impl Sources {
    fn add(&mut self, name: impl Into<String>, text: &str, dir: Option<PathBuf>) -> usize {
        self.0.push(Source { name: name.into(), text: text.into(), dir });
        self.0.len() - 1
    }

    pub fn get(&self, at: At) -> &Source {
        &self.0[at.source]
    }

    /// `path` as seen from the text that names it. Leading `..` are folded; the folder is canonical, so this is safe.
    pub fn resolve(&self, at: At, path: &str) -> PathBuf {
        let mut rest = Path::new(path);
        match &self.get(at).dir {
            Some(dir) if rest.is_relative() => {
                let mut dir = dir.as_path();
                while let (Ok(below), Some(parent)) = (rest.strip_prefix(".."), dir.parent()) {
                    (rest, dir) = (below, parent);
                }
                dir.join(rest.strip_prefix(".").unwrap_or(rest))
            }
            _ => rest.to_owned(),
        }
    }
}

/// What was read: the merged tree, and what is wrong with the texts so far.
pub(super) struct Read {
    pub root: Node,
    pub findings: Vec<Finding>,
}

/// Reads the scene file at `path` and what it extends, then lays `overrides` on it.
///
/// # Errors
/// Findings that leave no whole tree to read: a file that cannot be read, broken syntax, a cycle of `extends`.
pub(super) fn read_file(path: &Path, overrides: &[String], sources: &mut Sources) -> Result<Read, Vec<Finding>> {
    let text = read_text(path, None).map_err(|finding| vec![finding])?;
    read(path.to_owned(), text, true, overrides, sources)
}

/// The same for a text that is to be in a file.
pub(super) fn read_text_of(
    path: &Path,
    text: &str,
    overrides: &[String],
    sources: &mut Sources,
) -> Result<Read, Vec<Finding>> {
    read(path.to_owned(), text.to_owned(), true, overrides, sources)
}

/// The same for a text that is not in a file.
pub(super) fn read_str(text: &str, overrides: &[String], sources: &mut Sources) -> Result<Read, Vec<Finding>> {
    read(PathBuf::from("scene.ron"), text.to_owned(), false, overrides, sources)
}

fn read(
    mut path: PathBuf,
    mut text: String,
    mut in_file: bool,
    overrides: &[String],
    sources: &mut Sources,
) -> Result<Read, Vec<Finding>> {
    let mut layers = Vec::new();
    let mut chain: Vec<PathBuf> = Vec::new();
    let mut findings = Vec::new();
    let fatal = loop {
        let folder = path.parent().unwrap_or(Path::new(""));
        let dir = in_file.then(|| fs::canonicalize(if folder == Path::new("") { Path::new(".") } else { folder }).ok());
        chain.push(fs::canonicalize(&path).unwrap_or_else(|_| path.clone()));
        let source = sources.add(path.display().to_string(), &text, dir.flatten());
        let (mut node, found) = match syntax::parse(&text, source, 0) {
            Ok(read) => read,
            Err(finding) => break Some(finding),
        };
        findings.extend(found);
        let extends = node.take_field("extends");
        layers.push(node);
        let Some(Field { value, .. }) = extends else {
            break None;
        };
        match base_of(&value, folder, &chain) {
            Ok((base, base_text)) => (path, text, in_file) = (base, base_text, true),
            Err(finding) => break Some(finding),
        }
    };
    let whole = fatal.is_none();
    findings.extend(fatal);
    let mut root = layers.into_iter().rev().reduce(tree::merge);
    for text in overrides {
        let source = sources.add("--set", text, std::env::current_dir().ok());
        match read_override(text, source) {
            Ok((node, found)) => {
                findings.extend(found);
                root = root.map(|root| tree::merge(root, node));
            }
            Err(finding) => findings.push(finding),
        }
    }
    match root {
        Some(root) if whole => Ok(Read { root, findings }),
        _ => Err(findings),
    }
}

fn read_text(path: &Path, asked_at: Option<At>) -> Result<String, Finding> {
    fs::read_to_string(path).map_err(|error| {
        let message = format!("cannot read the scene file `{}`: {error}", path.display());
        Finding::new(asked_at, message, "named here")
    })
}

/// Path and text of the file that `extends: value` names.
fn base_of(value: &Node, folder: &Path, chain: &[PathBuf]) -> Result<(PathBuf, String), Finding> {
    let name: Option<String> = match &value.kind {
        Kind::Text(text) => ron::from_str(text).ok(),
        _ => None,
    };
    let fault = |message: String, label| {
        let finding = Finding::new(value.at, message, label);
        Finding { path: "extends".to_owned(), ..finding }
    };
    let Some(name) = name else {
        let message = format!("`extends` must be the path of a scene file, but is {}", value.describe());
        return Err(fault(message, "expected a string"));
    };
    let path = folder.join(name);
    let real = fs::canonicalize(&path).unwrap_or_else(|_| path.clone());
    if let Some(first) = chain.iter().position(|file| *file == real) {
        let names = chain[first..].iter().chain([&real]).map(|file| {
            file.file_name().map_or_else(|| file.display().to_string(), |name| name.to_string_lossy().into_owned())
        });
        let message = format!("`extends` goes in a circle: {}", names.collect::<Vec<_>>().join(" -> "));
        return Err(fault(message, "closes the circle").help("let one of these files extend nothing"));
    }
    if chain.len() == MAX_EXTENDS {
        return Err(fault(format!("`extends` is chained through more than {MAX_EXTENDS} files"), "one too many"));
    }
    let text = read_text(&path, Some(value.at))?;
    Ok((path, text))
}

/// `path.to.key=RON` as a tree that holds only that key.
fn read_override(text: &str, source: usize) -> Result<(Node, Vec<Finding>), Finding> {
    let at = |start: usize, end: usize| At { source, start, end };
    let form = "write it as `path.to.key=RON`, e.g. `--set train.steps=100`";
    let Some(equals) = text.find('=') else {
        return Err(Finding::new(at(0, text.len()), "an override has no `=`", "expected `=`").help(form));
    };
    let mut keys = Vec::new();
    let mut start = 0;
    for part in text[..equals].split('.') {
        let key = part.trim();
        let key_start = start + part.len() - part.trim_start().len();
        let key_at = at(key_start, key_start + key.len());
        if key.is_empty() || !key.chars().all(|c| c.is_alphanumeric() || c == '_') {
            return Err(Finding::new(key_at, format!("`{key}` is not a field name"), "expected a name").help(form));
        }
        if keys.is_empty() && key == "extends" {
            let help = "name the other scene file on the command line instead";
            return Err(Finding::new(key_at, "`extends` cannot be set", "only a file can extend a file").help(help));
        }
        keys.push((key.to_owned(), key_at));
        start += part.len() + 1;
    }
    let (value, findings) = syntax::parse(text, source, equals + 1)?;
    let node = keys.into_iter().rev().fold(value, |value, (key, key_at)| {
        let fields = vec![Field { key, key_at, value }];
        Node { at: at(0, text.len()), kind: Kind::Struct { name: None, fields } }
    });
    Ok((node, findings))
}
