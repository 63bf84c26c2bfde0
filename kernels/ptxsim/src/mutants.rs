//! Kernels with one mistake in their protocol: a test of a kernel is good if it notices each of them.

/// A text that differs from the original in one place.
#[derive(Clone, Debug)]
pub struct Mutant {
    /// What was changed, with the line.
    pub what: String,
    /// The changed text.
    pub text: String,
}

/// One statement of the text: where its instruction begins after labels, where it ends before the semicolon.
struct Statement<'a> {
    line: usize,
    from: usize,
    to: usize,
    mnemonic: &'a str,
    /// What follows the mnemonic.
    operands: &'a str,
}

/// The text with comments blanked out, byte for byte.
fn without_comments(text: &str) -> String {
    let mut out: Vec<u8> = text.as_bytes().to_vec();
    let (mut i, mut line, mut block) = (0, false, false);
    while i < out.len() {
        let next = out.get(i + 1).copied();
        if out[i] == b'\n' {
            line = false;
        } else if line || block {
            let ends = block && out[i] == b'*' && next == Some(b'/');
            out[i] = b' ';
            if ends {
                out[i + 1] = b' ';
                block = false;
            }
        } else if out[i] == b'/' && matches!(next, Some(b'/' | b'*')) {
            (line, block) = (next == Some(b'/'), next == Some(b'*'));
            out[i] = b' ';
            out[i + 1] = b' ';
        }
        i += 1;
    }
    String::from_utf8(out).unwrap_or_default()
}

fn statements(code: &str) -> Vec<Statement<'_>> {
    let body = code.find(".entry").and_then(|e| code[e..].find('{').map(|b| e + b + 1)).unwrap_or(code.len());
    let mut all = vec![];
    let mut from = body;
    for (to, _) in code[body..].match_indices(';').map(|(i, s)| (body + i, s)) {
        let mut start = from;
        // Labels and scopes before the instruction stay.
        loop {
            start += code[start..to].len() - code[start..to].trim_start().len();
            let rest = &code[start..to];
            let word = rest.find(|c: char| !(c.is_ascii_alphanumeric() || "_$%".contains(c))).unwrap_or(rest.len());
            if rest.starts_with(['{', '}']) {
                start += 1;
            } else if word > 0 && rest[word..].starts_with(':') {
                start += word + 1;
            } else {
                break;
            }
        }
        let rest = &code[start..to];
        let guard = if rest.starts_with('@') { rest.find(char::is_whitespace).unwrap_or(0) } else { 0 };
        let bare = rest[guard..].trim_start();
        let (mnemonic, operands) = bare.split_once(char::is_whitespace).unwrap_or((bare, ""));
        if !mnemonic.is_empty() {
            let line = code[..start].matches('\n').count() + 1;
            all.push(Statement { line, from: start, to, mnemonic, operands });
        }
        from = to + 1;
    }
    all
}

/// Operands at the top level.
fn split(operands: &str) -> Vec<&str> {
    let (mut depth, mut from, mut all) = (0, 0, vec![]);
    for (i, c) in operands.char_indices() {
        match c {
            '{' | '[' => depth += 1,
            '}' | ']' => depth -= 1,
            ',' if depth == 0 => {
                all.push(operands[from..i].trim());
                from = i + 1;
            }
            _ => {}
        }
    }
    all.push(operands[from..].trim());
    all
}

/// Whether leaving it out loses an ordering.
fn droppable(m: &str) -> bool {
    let waits = m.contains("wait") && !m.contains("try_wait") && !m.contains("test_wait") && !m.contains("griddep");
    m.starts_with("fence")
        || m.starts_with("membar")
        || m.starts_with("wgmma.fence")
        || m.starts_with("bar.")
        || m.starts_with("barrier.")
        || m.starts_with("mbarrier.arrive")
        || m.contains("commit_group")
        || waits
}

/// One mutant for each fence, wait, barrier, arrival and commit dropped, each parity flipped, each wait for groups weakened by
/// one, each count of bytes and of arrivals changed up and down.
pub fn mutants(text: &str) -> Vec<Mutant> {
    let code = without_comments(text);
    let mut all = vec![];
    for s in statements(&code) {
        let mut add = |what: &str, new: String| {
            let what = format!("line {}: {what} `{} {}`", s.line, s.mnemonic, short(s.operands));
            all.push(Mutant { what, text: format!("{}{new}{}", &text[..s.from], &text[s.to..]) });
        };
        let (m, ops) = (s.mnemonic, split(s.operands));
        let head = code[s.from..s.to].split(m).next().unwrap_or_default();
        // The statement with operand `i` replaced.
        let with = |i: usize, new: &str| {
            let mut ops = ops.clone();
            if let Some(o) = ops.get_mut(i) {
                *o = new;
            }
            format!("{head}{m} {}", ops.join(", "))
        };
        // Operand `i` changed by `f` if a constant, by `instruction` if a register.
        let changed = |i: usize, f: &dyn Fn(i64) -> i64, instruction: &str, by: i64| match ops.get(i)?.parse::<i64>() {
            Ok(x) => Some(with(i, &f(x).to_string())),
            Err(_) => Some(format!(
                "{{ .reg .b32 %mutant; {instruction} %mutant, {}, {by}; {}; }}",
                ops.get(i)?,
                with(i, "%mutant")
            )),
        };
        if droppable(m) {
            add("drop", String::new());
        }
        if m.contains("try_wait") || m.contains("test_wait") {
            add("no wait at", format!("{head}setp.eq.u32 {}, 0, 0", ops[0]));
            if m.contains("parity")
                && let Some(new) = changed(2, &|x| x ^ 1, "xor.b32", 1)
            {
                add("other parity at", new);
            }
        }
        if m.contains("expect_tx") {
            for by in [-16, 16] {
                if let Some(new) = changed(ops.len() - 1, &|x| x + by, "add.u32", by) {
                    add(if by < 0 { "fewer bytes at" } else { "more bytes at" }, new);
                }
            }
        }
        if m.starts_with("mbarrier.init") {
            for by in [-1, 1] {
                if (ops.get(1) != Some(&"1") || by > 0)
                    && let Some(new) = changed(1, &|x| x + by, "add.u32", by)
                {
                    add(if by < 0 { "fewer arrivals at" } else { "more arrivals at" }, new);
                }
            }
        }
        if m.contains("wait_group")
            && let Some(new) = changed(0, &|x| x + 1, "add.u32", 1)
        {
            add("weaker", new);
        }
        if (m.starts_with("bar.sync") || m.starts_with("bar.arrive")) && ops.len() == 2 {
            for by in [-32, 32] {
                if let Some(new) = changed(1, &|x| x + by, "add.u32", by) {
                    add(if by < 0 { "fewer threads at" } else { "more threads at" }, new);
                }
            }
        }
    }
    all
}

fn short(operands: &str) -> String {
    operands.split_whitespace().collect::<Vec<_>>().join(" ").chars().take(60).collect()
}
