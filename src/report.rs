//! Where results go: a few lines on stdout for people, or one JSON document for programs, or both.

use std::{
    fs::{self, OpenOptions},
    io::{self, ErrorKind, Write},
    path::{Path, PathBuf},
};

use serde::Serialize;

use crate::failure::Failure;

/// Where results go.
#[derive(Debug)]
pub struct Output {
    json: Option<PathBuf>,
}

impl Output {
    /// Output with a JSON document in `json`, `-` for stdout.
    ///
    /// # Errors
    /// If the file cannot be written: better before a long run than after it.
    pub fn open(json: Option<&Path>) -> Result<Self, Failure> {
        if let Some(path) = json.filter(|path| *path != Path::new("-")) {
            let opened = OpenOptions::new().create(true).append(true).open(path);
            opened.map_err(|e| Failure::runtime(format!("cannot write {}: {e}", path.display())))?;
        }
        Ok(Output { json: json.map(Path::to_path_buf) })
    }

    /// Whether stdout is for people.
    pub fn is_text(&self) -> bool {
        self.json.as_deref() != Some(Path::new("-"))
    }

    /// Gives the result both ways, as far as wanted.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn result(&self, document: &impl Serialize, text: &str) -> Result<(), Failure> {
        if self.is_text() {
            to_stdout(text)?;
        }
        self.write_json(document)
    }

    /// Writes the JSON document, if one is wanted.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn write_json(&self, document: &impl Serialize) -> Result<(), Failure> {
        let Some(path) = &self.json else { return Ok(()) };
        let text = serde_json::to_string_pretty(document)
            .map_err(|e| Failure::runtime(format!("cannot write the result as JSON: {e}")))?;
        if self.is_text() {
            fs::write(path, text + "\n").map_err(|e| Failure::runtime(format!("cannot write {}: {e}", path.display())))
        } else {
            to_stdout(&text)
        }
    }
}

/// Writes `text`, and a newline if it does not end with one. Nobody listening any more is no error.
///
/// # Errors
/// If stdout cannot be written to.
pub fn to_stdout(text: &str) -> Result<(), Failure> {
    let end = if text.ends_with('\n') { "" } else { "\n" };
    let mut stdout = io::stdout().lock();
    match write!(stdout, "{text}{end}").and_then(|()| stdout.flush()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(Failure::runtime(format!("cannot write to stdout: {e}"))),
        _ => Ok(()),
    }
}

/// Writes a piece of text at once. That nobody listens any more will show when the result is written.
pub fn stream(text: &str) {
    let mut stdout = io::stdout().lock();
    // An error here comes again with the end of the text.
    let _ = stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush());
}

/// Names and values in two columns.
#[derive(Debug, Default)]
pub struct Table(Vec<(&'static str, String)>);

impl Table {
    /// Adds a line.
    pub fn row(&mut self, name: &'static str, value: impl Into<String>) -> &mut Self {
        self.0.push((name, value.into()));
        self
    }

    /// Adds a line if there is a value.
    pub fn maybe(&mut self, name: &'static str, value: Option<String>) -> &mut Self {
        if let Some(value) = value {
            self.row(name, value);
        }
        self
    }

    /// The lines under a title.
    pub fn render(&self, title: &str) -> String {
        let width = self.0.iter().map(|(name, _)| name.len()).max().unwrap_or_default();
        let mut text = format!("{title}\n");
        for (name, value) in &self.0 {
            // Values of several lines stay in their column.
            let value = value.trim_end().replace('\n', &format!("\n{:width$}    ", ""));
            text += format!("  {name:width$}  {value}").trim_end();
            text.push('\n');
        }
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_table_keeps_its_columns() {
        let mut table = Table::default();
        table.row("loss", "3.1").row("checkpoint", "a\nb\n").maybe("sample", None).maybe("seed", Some("7".into()));
        let expected = "title\n  loss        3.1\n  checkpoint  a\n              b\n  seed        7\n";
        assert_eq!(table.render("title"), expected);
    }
}
