//! What is wrong with a scene, and where: file, line, column, the source line, what was expected and what to do.
//! One finding is data; it prints as plain `file:line:column` text (logs, CI, editors) or through miette (terminals).
use std::fmt;

use miette::{Diagnostic, GraphicalReportHandler, GraphicalTheme, LabeledSpan, NamedSource, SourceCode};

use super::source::Sources;
use super::tree::At;

/// How messages call the whole.
const SCENE: &str = "the scene";

/// A finding before it is joined with the text it stands in.
#[derive(Clone, Debug)]
pub(super) struct Finding {
    pub at: Option<At>,
    pub path: String,
    pub message: String,
    pub label: Box<str>,
    pub help: Option<String>,
}

impl Finding {
    pub fn new(at: impl Into<Option<At>>, message: impl Into<String>, label: impl Into<Box<str>>) -> Self {
        Finding { at: at.into(), path: String::new(), message: message.into(), label: label.into(), help: None }
    }

    pub fn help(mut self, help: impl Into<String>) -> Self {
        self.help = Some(help.into());
        self
    }
}

/// Where a finding stands.
#[derive(Clone, Debug)]
pub struct Place {
    /// The scene file as it was named, or `--set`.
    pub file: String,
    /// Line, from 1.
    pub line: usize,
    /// Column in characters, from 1.
    pub column: usize,
    /// The whole line, without its end.
    pub source_line: String,
    /// Characters of the line that the finding is about; at least 1.
    pub width: usize,
    offset: usize,
    length: usize,
    source: NamedSource<std::sync::Arc<str>>,
}

/// One thing that is wrong with a scene. As an error its text is the message alone; see [`SceneError::plain`].
#[derive(Clone, Debug)]
pub struct SceneError {
    /// Dotted path of the field, e.g. `schedule.peak_lr`; empty when the text itself is broken.
    pub path: String,
    /// What was expected and what was found.
    pub message: String,
    /// The same in a few words, for under the source line.
    pub label: String,
    /// What to do.
    pub help: Option<String>,
    /// Where; `None` if there is no text, as when the scene file cannot be read.
    pub place: Option<Place>,
}

/// Everything that is wrong with a scene, in the order of the text. Prints as plain text; see [`SceneErrors::graphical`].
#[derive(Clone, Debug)]
pub struct SceneErrors {
    /// Never empty when returned as an error.
    pub errors: Vec<SceneError>,
    /// What the texts are: the scene, or something that a scene names.
    subject: &'static str,
}

impl SceneErrors {
    pub(super) fn new(mut findings: Vec<Finding>, sources: &Sources) -> Self {
        findings.sort_by_key(|finding| finding.at);
        let errors = findings.into_iter().map(|finding| SceneError {
            place: finding.at.map(|at| Place::new(at, sources)),
            path: finding.path,
            message: finding.message,
            label: finding.label.into(),
            help: finding.help,
        });
        SceneErrors { errors: errors.collect(), subject: SCENE }
    }

    /// The same errors about something else than a scene.
    pub(super) fn about(mut self, subject: &'static str) -> Self {
        for error in &mut self.errors {
            error.message = error.message.replacen(SCENE, subject, 1);
        }
        SceneErrors { subject, ..self }
    }

    /// The same errors drawn for a terminal `width` columns wide, with colors if `color`.
    pub fn graphical(&self, width: usize, color: bool) -> String {
        let theme = if color { GraphicalTheme::unicode() } else { GraphicalTheme::unicode_nocolor() };
        let handler = GraphicalReportHandler::new_themed(theme).with_width(width).with_links(false);
        let mut text = String::new();
        for error in &self.errors {
            if handler.render_report(&mut text, error).is_err() {
                text.push_str(&error.plain());
            }
            text.push('\n');
        }
        text + &self.summary()
    }

    fn summary(&self) -> String {
        match self.errors.len() {
            1 => format!("1 error in {}", self.subject),
            count => format!("{count} errors in {}", self.subject),
        }
    }
}

impl Place {
    fn new(at: At, sources: &Sources) -> Self {
        let source = sources.get(at);
        let text = &source.text;
        let line_start = text[..at.start].rfind('\n').map_or(0, |newline| newline + 1);
        let line_end = text[at.start..].find('\n').map_or(text.len(), |len| at.start + len);
        let source_line = text[line_start..line_end].trim_end_matches('\r');
        // A value of several lines is shown by its first.
        let end = at.end.min(line_start + source_line.len()).max(at.start);
        Place {
            file: source.name.clone(),
            line: text[..at.start].matches('\n').count() + 1,
            column: text[line_start..at.start].chars().count() + 1,
            source_line: source_line.to_owned(),
            width: text[at.start..end].chars().count().max(1),
            offset: at.start,
            length: end - at.start,
            source: NamedSource::new(&source.name, source.text.clone()),
        }
    }
}

impl SceneError {
    /// `file:line:column: error: message`, the source line, the label under it, the help.
    pub fn plain(&self) -> String {
        let mut text = format!("error: {}", self.message);
        if let Some(place) = &self.place {
            let Place { file, line, column, source_line, width, .. } = place;
            let number = line.to_string();
            let gutter = " ".repeat(number.len());
            // Tabs stay tabs, so that the carets stand under the value in any terminal.
            let blank = |c| if c == '\t' { '\t' } else { ' ' };
            let indent: String = source_line.chars().take(column - 1).map(blank).collect();
            let carets = "^".repeat(*width);
            text = format!(
                "{file}:{line}:{column}: {text}\n {number} | {source_line}\n {gutter} | {indent}{carets} {}",
                self.label
            );
        }
        match &self.help {
            Some(help) => format!("{text}\n  help: {help}"),
            None => text,
        }
    }
}

/// The message alone; miette draws the rest. See [`SceneError::plain`].
impl fmt::Display for SceneError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for SceneError {}

impl Diagnostic for SceneError {
    fn help<'a>(&'a self) -> Option<Box<dyn fmt::Display + 'a>> {
        self.help.as_ref().map(|help| Box::new(help) as _)
    }

    fn source_code(&self) -> Option<&dyn SourceCode> {
        self.place.as_ref().map(|place| &place.source as _)
    }

    fn labels(&self) -> Option<Box<dyn Iterator<Item = LabeledSpan> + '_>> {
        let place = self.place.as_ref()?;
        let label = LabeledSpan::new(Some(self.label.clone()), place.offset, place.length);
        Some(Box::new(std::iter::once(label)))
    }
}

impl fmt::Display for SceneErrors {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for error in &self.errors {
            writeln!(f, "{}\n", error.plain())?;
        }
        f.write_str(&self.summary())
    }
}

impl std::error::Error for SceneErrors {}

impl Diagnostic for SceneErrors {
    fn related<'a>(&'a self) -> Option<Box<dyn Iterator<Item = &'a dyn Diagnostic> + 'a>> {
        Some(Box::new(self.errors.iter().map(|error| error as &dyn Diagnostic)))
    }
}
