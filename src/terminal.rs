//! What stderr is: a terminal or a file, how wide, with colors or without.

use std::{env, io::IsTerminal};

/// Whether stderr is a terminal that can redraw a line.
pub fn is_interactive() -> bool {
    std::io::stderr().is_terminal() && env::var_os("TERM").is_some_and(|term| term != "dumb")
}

/// Whether to color what goes to stderr: on a terminal, unless `NO_COLOR` is set (<https://no-color.org>).
pub fn has_color() -> bool {
    is_interactive() && env::var_os("NO_COLOR").is_none_or(|value| value.is_empty())
}

/// Columns of the terminal, within what is good to read.
pub fn width() -> usize {
    let columns = rustix::termios::tcgetwinsize(std::io::stderr()).map_or(0, |size| usize::from(size.ws_col));
    match columns {
        0 => 80,
        columns => columns.clamp(40, 120),
    }
}
