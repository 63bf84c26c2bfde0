//! RON text to a tree of values with places. Only the structure is read here (names, keys, brackets, commas), which is
//! what lets a message point at a key, at both of two equal keys, or at the bracket that is never closed.
use super::diagnostic::Finding;
use super::tree::{At, Field, Kind, Node};

/// Brackets within brackets before a text is refused, so that no text can exhaust the stack.
const MAX_DEPTH: usize = 64;

/// Reads one value that fills `text[from..]`. Keys given twice are findings and the first one stays; anything else that
/// is wrong with the structure ends the reading.
pub(super) fn parse(text: &str, source: usize, from: usize) -> Result<(Node, Vec<Finding>), Finding> {
    let mut reader = Reader { text, source, pos: from, depth: 0, findings: Vec::new() };
    if from == 0 {
        reader.pos += text.strip_prefix('\u{feff}').map_or(0, |rest| text.len() - rest.len());
        reader.attributes()?;
    }
    let node = reader.value()?;
    reader.trivia()?;
    match reader.peek() {
        None => Ok((node, reader.findings)),
        Some(_) => Err(reader.unexpected("the end of the text", None)),
    }
}

struct Reader<'a> {
    text: &'a str,
    source: usize,
    pos: usize,
    depth: usize,
    findings: Vec<Finding>,
}

impl<'a> Reader<'a> {
    fn rest(&self) -> &'a str {
        &self.text[self.pos..]
    }

    fn peek(&self) -> Option<char> {
        self.rest().chars().next()
    }

    fn at(&self, start: usize) -> At {
        At { source: self.source, start, end: self.pos }
    }

    fn eat(&mut self, token: &str) -> bool {
        let found = self.rest().starts_with(token);
        if found {
            self.pos += token.len();
        }
        found
    }

    fn eat_while(&mut self, keep: impl Fn(char) -> bool) -> &'a str {
        let rest = self.rest();
        let len = rest.find(|c| !keep(c)).unwrap_or(rest.len());
        self.pos += len;
        &rest[..len]
    }

    /// Skips white space and comments.
    fn trivia(&mut self) -> Result<(), Finding> {
        loop {
            self.eat_while(char::is_whitespace);
            let start = self.pos;
            if self.eat("//") {
                self.eat_while(|c| c != '\n');
            } else if self.eat("/*") {
                let mut open = 1;
                while open > 0 {
                    if self.eat("/*") {
                        open += 1;
                    } else if self.eat("*/") {
                        open -= 1;
                    } else if let Some(c) = self.peek() {
                        self.pos += c.len_utf8();
                    } else {
                        let at = At { source: self.source, start, end: start + 2 };
                        return Err(
                            Finding::new(at, "a comment is never closed", "opened here").help("close it with `*/`")
                        );
                    }
                }
            } else {
                return Ok(());
            }
        }
    }

    /// Skips `#![enable(..)]`: the extensions that scenes need are always on.
    fn attributes(&mut self) -> Result<(), Finding> {
        self.trivia()?;
        while self.eat("#![") {
            self.eat_while(|c| c != ']' && c != '\n');
            if !self.eat("]") {
                return Err(self.unexpected("`]`", None));
            }
            self.trivia()?;
        }
        Ok(())
    }

    fn value(&mut self) -> Result<Node, Finding> {
        self.trivia()?;
        let start = self.pos;
        let kind = match self.peek() {
            Some('(') => self.parenthesis(None)?,
            Some('[') => Kind::List(self.bracketed('[', ']', Self::value)?),
            Some('{') => Kind::Map(self.bracketed('{', '}', |reader| {
                let key = reader.value()?;
                reader.colon("the key")?;
                Ok((key, reader.value()?))
            })?),
            Some(c) if c.is_ascii_digit() || matches!(c, '+' | '-' | '.') => Kind::Number(self.number().to_owned()),
            Some('"' | '\'') => self.quoted(start)?,
            Some('r' | 'b') if self.quote_prefix().is_some() => self.quoted(start)?,
            Some(c) if c.is_alphabetic() || c == '_' => {
                let name = self.eat_while(is_word).to_owned();
                let end = self.pos;
                self.trivia()?;
                if self.peek() == Some('(') {
                    self.parenthesis(Some(name))?
                } else {
                    self.pos = end;
                    Kind::Word(name)
                }
            }
            _ => return Err(self.unexpected("a value", None)),
        };
        Ok(match kind {
            // `Some` may be written and may be left out, so it carries nothing.
            Kind::Tuple { name: Some(name), mut items } if name == "Some" && items.len() == 1 => items.remove(0),
            Kind::Struct { name: Some(name), fields } if name == "Some" => {
                Node { at: self.at(start), kind: Kind::Struct { name: None, fields } }
            }
            kind => Node { at: self.at(start), kind },
        })
    }

    /// `(key: value, ..)` or `(value, ..)`.
    fn parenthesis(&mut self, name: Option<String>) -> Result<Kind, Finding> {
        let open = self.pos;
        self.pos += 1;
        self.trivia()?;
        let empty = self.peek() == Some(')');
        let word = self.eat_while(is_word);
        self.trivia()?;
        let has_keys = match self.peek() {
            Some(':') => !word.is_empty(),
            // A colon is forgotten; but `r` and `b` start strings, and digits numbers.
            None | Some(',' | '(' | ')' | ']' | '}') => false,
            Some(_) => word.starts_with(char::is_alphabetic) && !matches!(word, "r" | "b" | "br"),
        };
        self.pos = open;
        if !has_keys && !empty {
            return Ok(Kind::Tuple { name, items: self.bracketed('(', ')', Self::value)? });
        }
        let mut fields: Vec<Field> = Vec::new();
        for field in self.bracketed('(', ')', Self::field)? {
            match fields.iter().find(|first| first.key == field.key) {
                None => fields.push(field),
                Some(first) => {
                    let line = self.text[..first.key_at.start].matches('\n').count() + 1;
                    let message = format!("the field `{}` is given twice", field.key);
                    let finding = Finding::new(field.key_at, message, "given again here");
                    self.findings.push(finding.help(format!("keep one of the two; the first is in line {line}")));
                }
            }
        }
        Ok(Kind::Struct { name, fields })
    }

    fn field(&mut self) -> Result<Field, Finding> {
        let start = self.pos;
        let key = self.eat_while(is_word).to_owned();
        if key.is_empty() {
            return Err(self.unexpected("a field name", None));
        }
        let key_at = self.at(start);
        self.colon(&format!("the field name `{key}`"))?;
        Ok(Field { key, key_at, value: self.value()? })
    }

    fn colon(&mut self, after: &str) -> Result<(), Finding> {
        self.trivia()?;
        if self.eat(":") { Ok(()) } else { Err(self.unexpected(&format!("`:` after {after}"), None)) }
    }

    fn bracketed<T>(
        &mut self,
        open: char,
        close: char,
        item: impl Fn(&mut Self) -> Result<T, Finding>,
    ) -> Result<Vec<T>, Finding> {
        let start = self.pos;
        self.pos += open.len_utf8();
        let open_at = self.at(start);
        self.depth += 1;
        if self.depth > MAX_DEPTH {
            let message = format!("brackets are nested more than {MAX_DEPTH} deep");
            return Err(Finding::new(open_at, message, "the innermost bracket"));
        }
        let unclosed = || Finding::new(open_at, format!("`{open}` is never closed"), "opened here");
        let mut items = Vec::new();
        loop {
            self.trivia()?;
            match self.peek() {
                None => return Err(unclosed().help(format!("close it with `{close}`"))),
                Some(c) if c == close => break,
                Some(_) => items.push(item(self)?),
            }
            self.trivia()?;
            match self.peek() {
                None => return Err(unclosed().help(format!("close it with `{close}`"))),
                Some(c) if c == close => break,
                Some(',') => self.pos += 1,
                Some(')' | ']' | '}') => return Err(self.unexpected(&format!("`{close}`"), None)),
                Some(_) => {
                    let help = "put a comma after the value before it";
                    return Err(self.unexpected(&format!("`,` or `{close}`"), Some(help)));
                }
            }
        }
        self.pos += close.len_utf8();
        self.depth -= 1;
        Ok(items)
    }

    fn number(&mut self) -> &'a str {
        let start = self.pos;
        self.pos += 1;
        loop {
            let exponent = self.text[start..self.pos].ends_with(['e', 'E']) && !self.text[start..].starts_with("0x");
            match self.peek() {
                Some(c) if is_word(c) || c == '.' || (exponent && matches!(c, '+' | '-')) => self.pos += c.len_utf8(),
                _ => return &self.text[start..self.pos],
            }
        }
    }

    /// Bytes before the quote and number of hashes, if a string starts here.
    fn quote_prefix(&self) -> Option<(usize, Option<usize>)> {
        let rest = self.rest();
        let letters = ["br", "r", "b", ""].into_iter().find(|prefix| {
            rest.strip_prefix(prefix).is_some_and(|rest| {
                let quoted = rest.trim_start_matches('#');
                quoted.starts_with('"') && (prefix.contains('r') || quoted.len() == rest.len())
                    || (!prefix.contains('r') && rest.starts_with('\''))
            })
        })?;
        let rest = &rest[letters.len()..];
        let hashes = rest.len() - rest.trim_start_matches('#').len();
        Some((letters.len() + hashes, letters.contains('r').then_some(hashes)))
    }

    fn quoted(&mut self, start: usize) -> Result<Kind, Finding> {
        let (prefix_len, raw) = self.quote_prefix().unwrap_or((0, None));
        self.pos += prefix_len;
        let quote = self.peek().unwrap_or('"');
        self.pos += quote.len_utf8();
        let close = format!("{quote}{}", "#".repeat(raw.unwrap_or(0)));
        loop {
            if self.eat(&close) {
                return Ok(Kind::Text(self.text[start..self.pos].to_owned()));
            }
            if raw.is_none() && self.eat("\\") && self.peek().is_none() {
                continue;
            }
            match self.peek() {
                Some(c) => self.pos += c.len_utf8(),
                None => {
                    let at = At { source: self.source, start, end: start + prefix_len + 1 };
                    let help = format!("close it with `{close}`");
                    return Err(Finding::new(at, "a string is never closed", "opened here").help(help));
                }
            }
        }
    }

    /// Something else stands where `expected` should.
    fn unexpected(&mut self, expected: &str, help: Option<&str>) -> Finding {
        let start = self.pos;
        let found = match self.peek() {
            None => "the end of the text".to_owned(),
            Some(c) => {
                if self.eat_while(is_word).is_empty() {
                    self.pos += c.len_utf8();
                }
                format!("`{}`", &self.text[start..self.pos])
            }
        };
        let at = self.at(start);
        let finding = Finding::new(at, format!("expected {expected}, found {found}"), format!("expected {expected}"));
        Finding { help: help.map(str::to_owned), ..finding }
    }
}

fn is_word(c: char) -> bool {
    c.is_alphanumeric() || c == '_'
}
