//! From PTX text to statements with resolved names; what the instructions mean is [`crate::decode`]'s.

pub(crate) mod lexer;
mod operand;
pub(crate) mod parser;

/// Where in the text something is.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Pos {
    pub line: u32,
    pub column: u32,
}

impl Pos {
    /// An error there.
    pub(crate) fn error<T>(self, message: impl std::fmt::Display) -> Result<T, String> {
        Err(format!("line {}, column {}: {message}", self.line, self.column))
    }
}
