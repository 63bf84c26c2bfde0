//! Tokens of PTX: words, which may contain dots and `::`, single punctuation characters, and strings.

use super::Pos;

/// What a token is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) enum Token {
    /// `ld.global.L1::no_allocate.f32`, `%r1`, `.reg`, `0f3F800000`, `12`.
    Word(String),
    /// One of `, ; { } [ ] ( ) < > | ! @ : + - = ~ & * /`.
    Punct(char),
    /// Text between quotes.
    Text(String),
    /// After the last token.
    End,
}

impl std::fmt::Display for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Token::Word(w) => write!(f, "`{w}`"),
            Token::Punct(c) => write!(f, "`{c}`"),
            Token::Text(t) => write!(f, "{t:?}"),
            Token::End => write!(f, "the end of the text"),
        }
    }
}

fn is_word(c: char) -> bool {
    c.is_ascii_alphanumeric() || matches!(c, '_' | '$' | '%' | '.')
}

/// All tokens, the last one [`Token::End`].
pub(crate) fn tokens(text: &str) -> Result<Vec<(Token, Pos)>, String> {
    let chars: Vec<char> = text.chars().collect();
    let mut out = vec![];
    let (mut i, mut pos) = (0, Pos { line: 1, column: 1 });
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    while i < chars.len() {
        let (start, c) = (pos, chars[i]);
        let from = i;
        if c.is_whitespace() {
            i += 1;
        } else if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && chars[i] != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            i += 2;
            while i < chars.len() && !(chars[i] == '*' && at(i + 1) == '/') {
                i += 1;
            }
            if i >= chars.len() {
                return start.error("expected `*/` after `/*`, found the end of the text");
            }
            i += 2;
        } else if c == '"' {
            i += 1;
            while i < chars.len() && chars[i] != '"' {
                i += 1;
            }
            if i >= chars.len() {
                return start.error("expected a closing quote, found the end of the text");
            }
            out.push((Token::Text(chars[from + 1..i].iter().collect()), start));
            i += 1;
        } else if is_word(c) {
            // A single colon ends a label; a double one is part of a word.
            while i < chars.len() && (is_word(chars[i]) || chars[i] == ':' && at(i + 1) == ':') {
                i += if chars[i] == ':' { 2 } else { 1 };
            }
            out.push((Token::Word(chars[from..i].iter().collect()), start));
        } else if ",;{}[]()<>|!@:+-=~&*/".contains(c) {
            out.push((Token::Punct(c), start));
            i += 1;
        } else {
            return start.error(format!("unexpected character {c:?}"));
        }
        for c in &chars[from..i] {
            if *c == '\n' {
                pos = Pos { line: pos.line + 1, column: 1 };
            } else {
                pos.column += 1;
            }
        }
    }
    out.push((Token::End, pos));
    Ok(out)
}
