//! Why a verb did not do what it was asked, with the exit code for it.

use std::{fmt::Display, process::ExitCode};

use serde_json::{Value, json};
use systems::{scene::SceneErrors, session::SessionError};

use crate::terminal;

/// Exit code of an error at run time.
pub const RUNTIME: u8 = 1;
/// Exit code of wrong usage, and of a scene that is not valid.
pub const USAGE: u8 = 2;
/// Exit code where another rank is gone.
pub const PEER_LOST: u8 = 5;

/// Why a verb failed.
#[derive(Debug)]
pub enum Failure {
    /// The scene is wrong.
    Scene(SceneErrors),
    /// The same as of the first process, which says it; the exit code.
    SaidByFirst(u8),
    /// Anything else.
    Other {
        /// Exit code of the process.
        exit_code: u8,
        /// What happened, to what, and why.
        message: String,
        /// What to do.
        help: Option<String>,
    },
}

impl Failure {
    /// An error at run time.
    pub fn runtime(message: impl Display) -> Self {
        Failure::Other { exit_code: RUNTIME, message: message.to_string(), help: None }
    }

    /// Another rank is gone.
    pub fn from_peer(error: &kernels::error::Error) -> Self {
        Failure::Other { exit_code: PEER_LOST, message: error.to_string(), help: None }
    }

    /// A request that cannot be meant.
    pub fn usage(message: impl Display, help: impl Into<String>) -> Self {
        Failure::Other { exit_code: USAGE, message: message.to_string(), help: Some(help.into()) }
    }

    /// What happened, in a line or more, for where there is no terminal.
    pub fn message(&self) -> String {
        match self {
            Failure::Scene(errors) => errors.to_string(),
            Failure::SaidByFirst(_) => "as of rank 0".to_owned(),
            Failure::Other { message, .. } => message.clone(),
        }
    }

    /// Exit code of the process.
    pub fn code(&self) -> u8 {
        match self {
            Failure::Scene(_) => USAGE,
            Failure::SaidByFirst(exit_code) | Failure::Other { exit_code, .. } => *exit_code,
        }
    }

    /// Says it on stderr: drawn on a terminal, else in plain lines.
    pub fn tell(&self) -> ExitCode {
        match self {
            Failure::Scene(errors) if terminal::is_interactive() => {
                eprintln!("{}", errors.graphical(terminal::width(), terminal::has_color()));
            }
            Failure::Scene(errors) => eprintln!("{errors}"),
            Failure::SaidByFirst(_) => {}
            Failure::Other { message, help, .. } => {
                let (red, plain) = if terminal::has_color() { ("\x1b[1;31m", "\x1b[0m") } else { ("", "") };
                eprintln!("{red}error:{plain} {message}");
                if let Some(help) = help {
                    eprintln!("  help: {help}");
                }
            }
        }
        ExitCode::from(self.code())
    }

    /// The same as a JSON document.
    pub fn document(&self) -> Value {
        let errors: Vec<Value> = match self {
            Failure::Scene(errors) => {
                let error = |error: &systems::scene::SceneError| {
                    let place = error.place.as_ref();
                    json!({
                        "path": error.path,
                        "message": error.message,
                        "help": error.help,
                        "file": place.map(|place| &place.file),
                        "line": place.map(|place| place.line),
                        "column": place.map(|place| place.column),
                    })
                };
                errors.errors.iter().map(error).collect()
            }
            Failure::SaidByFirst(_) => vec![json!({ "message": self.message() })],
            Failure::Other { message, help, .. } => vec![json!({ "message": message, "help": help })],
        };
        json!({ "exit_code": self.code(), "errors": errors })
    }
}

impl From<SceneErrors> for Failure {
    fn from(errors: SceneErrors) -> Self {
        Failure::Scene(errors)
    }
}

impl From<SessionError> for Failure {
    fn from(error: SessionError) -> Self {
        Failure::Other { exit_code: error.exit_code(), message: error.to_string(), help: None }
    }
}
