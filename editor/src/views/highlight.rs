//! Colours of RON in the text field, and underlines where something is wrong.

use egui::{Color32, FontId, Stroke, TextFormat, text::LayoutJob};

use crate::{
    theme::{OKABE_ITO, Palette},
    workbench::Diagnostic,
};

/// What a piece of text is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Token {
    /// `// ...`
    Comment,
    /// `"..."`
    Text,
    /// `1e-3`
    Number,
    /// A word before a colon.
    Key,
    /// Any other word: a variant, `true`, `None`.
    Word,
    /// Brackets, commas, blanks.
    Other,
}

/// Cuts a text into pieces; together they are the text.
pub fn tokens(text: &str) -> Vec<(&str, Token)> {
    let mut tokens = Vec::new();
    let mut rest = text;
    while let Some(first) = rest.chars().next() {
        let until = |ends: &dyn Fn(char) -> bool| rest.find(ends).unwrap_or(rest.len());
        let (len, token) = if rest.starts_with("//") {
            (until(&|c| c == '\n'), Token::Comment)
        } else if rest.starts_with("/*") {
            (rest.find("*/").map_or(rest.len(), |end| end + 2), Token::Comment)
        } else if first == '"' {
            (string_len(rest), Token::Text)
        } else if first.is_ascii_digit()
            || (matches!(first, '-' | '+') && rest[1..].starts_with(|c: char| c.is_ascii_digit()))
        {
            let end = rest[1..]
                .find(|c: char| !(c.is_alphanumeric() || matches!(c, '.' | '_' | '-' | '+')))
                .map_or(rest.len(), |at| at + 1);
            (end, Token::Number)
        } else if first.is_alphabetic() || first == '_' {
            let end = until(&|c: char| !(c.is_alphanumeric() || c == '_'));
            let is_key = rest[end..].trim_start().starts_with(':');
            (end, if is_key { Token::Key } else { Token::Word })
        } else {
            let begins = |c: char| c.is_alphanumeric() || matches!(c, '_' | '"' | '/' | '-' | '+');
            (rest[first.len_utf8()..].find(begins).map_or(rest.len(), |at| at + first.len_utf8()), Token::Other)
        };
        let (piece, after) = rest.split_at(len.max(first.len_utf8()));
        tokens.push((piece, token));
        rest = after;
    }
    tokens
}

fn string_len(text: &str) -> usize {
    let mut escaped = false;
    for (at, c) in text.char_indices().skip(1) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            '"' => return at + 1,
            _ => {}
        }
    }
    text.len()
}

fn color(token: Token, palette: Palette, plain: Color32) -> Color32 {
    let tone = |color: Color32| {
        if palette.is_dark { color } else { color.lerp_to_gamma(Color32::BLACK, 0.35) }
    };
    match token {
        Token::Comment => plain.gamma_multiply(0.6),
        Token::Text => tone(Color32::from_rgb(0x2E, 0xC4, 0x96)),
        Token::Number => tone(OKABE_ITO[0]),
        Token::Key => tone(OKABE_ITO[1]),
        Token::Word => tone(OKABE_ITO[6]),
        Token::Other => plain,
    }
}

/// Bytes of the text that a diagnostic is about.
fn place(text: &str, diagnostic: &Diagnostic) -> Option<std::ops::Range<usize>> {
    let line = diagnostic.line.checked_sub(1)?;
    let start = if line == 0 { 0 } else { text.match_indices('\n').nth(line - 1)?.0 + 1 };
    let byte = |chars: usize| text[start..].char_indices().nth(chars).map_or(text.len(), |(at, _)| start + at);
    let from = byte(diagnostic.column.saturating_sub(1));
    Some(from..byte(diagnostic.column.saturating_sub(1) + diagnostic.length.max(1)).max(from))
}

/// The text laid out in colours, with what is wrong underlined.
pub fn layout(text: &str, diagnostics: &[Diagnostic], font: FontId, palette: Palette, plain: Color32) -> LayoutJob {
    let wrong: Vec<std::ops::Range<usize>> = diagnostics.iter().filter_map(|d| place(text, d)).collect();
    let mut job = LayoutJob::default();
    let mut at = 0;
    for (piece, token) in tokens(text) {
        let mut rest = piece;
        while !rest.is_empty() {
            // Up to the next place where an underline begins or ends.
            let is_wrong = wrong.iter().any(|range| range.contains(&at));
            let edges = wrong
                .iter()
                .flat_map(|range| [range.start, range.end])
                .filter(|edge| *edge > at && *edge < at + rest.len());
            let len = edges.min().map_or(rest.len(), |edge| edge - at);
            let (now, after) = rest.split_at(len);
            let underline = if is_wrong { Stroke::new(2.0, palette.error()) } else { Stroke::NONE };
            let format = TextFormat {
                font_id: font.clone(),
                color: color(token, palette, plain),
                underline,
                ..TextFormat::default()
            };
            job.append(now, 0.0, format);
            at += len;
            rest = after;
        }
    }
    job
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pieces_are_the_text_and_say_what_they_are() {
        let text = "(\n  name: \"a \\\" b\", // why\n  lr: -1e-3, kind: Bpe(8), é: true,\n)";
        let pieces = tokens(text);
        assert_eq!(pieces.iter().map(|(piece, _)| *piece).collect::<String>(), text);
        let of = |token| pieces.iter().filter(|(_, is)| *is == token).map(|(piece, _)| *piece).collect::<Vec<_>>();
        assert_eq!(of(Token::Key), ["name", "lr", "kind", "é"]);
        assert_eq!(of(Token::Number), ["-1e-3", "8"]);
        assert_eq!(
            (of(Token::Text), of(Token::Comment), of(Token::Word)),
            (vec!["\"a \\\" b\""], vec!["// why"], vec!["Bpe", "true"])
        );
    }

    #[test]
    fn any_text_is_laid_out() {
        for text in ["", "\"never closed", "/* neither", "-", "é", "/", "a:\n\n\"", "- +"] {
            assert_eq!(tokens(text).iter().map(|(piece, _)| *piece).collect::<String>(), text);
            let wrong = Diagnostic { line: 1, column: 1, length: 3, ..Diagnostic::default() };
            let palette = Palette { is_dark: true };
            assert_eq!(layout(text, &[wrong], FontId::default(), palette, Color32::WHITE).text, text);
        }
    }
}
