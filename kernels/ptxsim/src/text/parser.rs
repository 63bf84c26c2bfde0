//! Statements of the one entry of a module: declarations are resolved here, instructions keep their modifiers as words.

use std::collections::HashMap;

pub(crate) use super::operand::Operand;
use super::{
    Pos,
    lexer::{Token, tokens},
    operand::{Name, integer, place},
};
use crate::inst::{Reg, Ty};

/// One instruction.
#[derive(Clone, Debug)]
pub(crate) struct Statement {
    pub pos: Pos,
    /// Predicate, and whether it is negated.
    pub guard: Option<(Reg, bool)>,
    /// Mnemonic with modifiers, as written.
    pub text: String,
    pub operands: Vec<Operand>,
    /// Index of the statement that a branch goes to.
    pub target: usize,
}

/// A declared register.
#[derive(Clone, Debug)]
pub(crate) struct RegInfo {
    pub name: String,
    pub ty: Ty,
}

/// A parameter of the entry.
#[derive(Clone, Debug)]
pub(crate) struct Param {
    pub name: String,
    pub offset: usize,
    pub bytes: usize,
}

/// The entry of a module.
#[derive(Debug, Default)]
pub(crate) struct Entry {
    pub name: String,
    pub params: Vec<Param>,
    pub statements: Vec<Statement>,
    pub regs: Vec<RegInfo>,
    /// Bytes of static shared memory.
    pub shared_bytes: usize,
    /// Where dynamic shared memory starts: after the static, aligned as declared.
    pub dynamic_at: usize,
    pub local_bytes: usize,
    /// Threads of a block at most, from `.maxntid` or `.reqntid`.
    pub max_threads: u32,
    /// Blocks of a cluster along each axis.
    pub cluster: [u32; 3],
    pub target: String,
}

pub(super) struct Parser {
    tokens: Vec<(Token, Pos)>,
    at: usize,
    pub(super) entry: Entry,
    pub(super) scopes: Vec<(usize, HashMap<String, Name>)>,
    num_scopes: usize,
    labels: HashMap<(usize, String), usize>,
    /// Statement, label, scopes around it from the outermost.
    branches: Vec<(usize, String, Vec<usize>)>,
    dynamic_align: usize,
    entries: usize,
}

/// Reads a module of one entry.
pub(crate) fn parse(text: &str) -> Result<Entry, String> {
    let mut p = Parser {
        tokens: tokens(text)?,
        at: 0,
        entry: Entry { max_threads: 1024, cluster: [1; 3], ..Entry::default() },
        scopes: vec![(0, HashMap::new())],
        num_scopes: 1,
        labels: HashMap::new(),
        branches: vec![],
        dynamic_align: 16,
        entries: 0,
    };
    p.module()?;
    p.finish()
}

impl Parser {
    fn peek(&self) -> &Token {
        &self.tokens[self.at.min(self.tokens.len() - 1)].0
    }
    pub(super) fn pos(&self) -> Pos {
        self.tokens[self.at.min(self.tokens.len() - 1)].1
    }
    fn next(&mut self) -> Token {
        let t = self.peek().clone();
        self.at += 1;
        t
    }
    pub(super) fn is(&self, c: char) -> bool {
        *self.peek() == Token::Punct(c)
    }
    pub(super) fn eat(&mut self, c: char) -> bool {
        let hit = self.is(c);
        self.at += usize::from(hit);
        hit
    }
    pub(super) fn expect(&mut self, c: char) -> Result<(), String> {
        if self.eat(c) { Ok(()) } else { self.wanted(&format!("`{c}`")) }
    }
    pub(super) fn wanted<T>(&self, what: &str) -> Result<T, String> {
        self.pos().error(format!("expected {what}, found {}", self.peek()))
    }
    pub(super) fn word(&mut self, what: &str) -> Result<String, String> {
        match self.peek() {
            Token::Word(w) => {
                let w = w.clone();
                self.at += 1;
                Ok(w)
            }
            _ => self.wanted(what),
        }
    }
    fn is_word(&self, w: &str) -> bool {
        matches!(self.peek(), Token::Word(x) if x == w)
    }
    pub(super) fn number(&mut self, what: &str) -> Result<u64, String> {
        let pos = self.pos();
        let w = self.word(what)?;
        match integer(&w) {
            Some(n) => Ok(n),
            None => pos.error(format!("expected {what}, found `{w}`")),
        }
    }

    fn module(&mut self) -> Result<(), String> {
        loop {
            let pos = self.pos();
            match self.next() {
                Token::End => return Ok(()),
                Token::Word(w) => match w.as_str() {
                    ".version" | ".address_size" => {
                        self.word("a number")?;
                    }
                    ".target" => {
                        self.entry.target = self.word("a target")?;
                        while self.eat(',') {
                            self.word("a target")?;
                        }
                    }
                    ".visible" | ".weak" | ".extern" => {}
                    ".shared" => self.variable(true)?,
                    ".entry" => {
                        self.entries += 1;
                        if self.entries > 1 {
                            return pos.error("expected one entry, found a second");
                        }
                        self.function()?;
                    }
                    ".file" | ".loc" | ".pragma" | ".section" => self.skip_line(pos.line),
                    _ => return pos.error(format!("expected a directive of a module, found `{w}`")),
                },
                t => return pos.error(format!("expected a directive of a module, found {t}")),
            }
        }
    }

    fn skip_line(&mut self, line: u32) {
        while self.pos().line == line && *self.peek() != Token::End {
            self.at += 1;
        }
    }

    fn dims(&mut self) -> Result<[u32; 3], String> {
        let mut dims = [1; 3];
        for (i, d) in dims.iter_mut().enumerate() {
            if i > 0 && !self.eat(',') {
                break;
            }
            *d = u32::try_from(self.number("a count")?).unwrap_or(u32::MAX);
        }
        Ok(dims)
    }

    fn function(&mut self) -> Result<(), String> {
        self.entry.name = self.word("the entry's name")?;
        if self.eat('(') {
            let mut at = 0usize;
            while !self.eat(')') {
                if !self.is_word(".param") {
                    return self.wanted("`.param`");
                }
                self.at += 1;
                let (name, bytes, align) = self.declarator()?;
                at = at.next_multiple_of(align);
                self.entry.params.push(Param { name, offset: at, bytes });
                at += bytes;
                if !self.is(')') {
                    self.expect(',')?;
                }
            }
        }
        while !self.is('{') {
            let pos = self.pos();
            match self.word("a directive of the entry or `{`")?.as_str() {
                ".maxntid" | ".reqntid" => {
                    self.entry.max_threads = self.dims()?.iter().fold(1, |n: u32, d| n.saturating_mul(*d));
                }
                ".reqnctapercluster" => self.entry.cluster = self.dims()?,
                ".explicitcluster" | ".noreturn" => {}
                ".minnctapersm" | ".maxnreg" | ".maxclusterrank" | ".maxnctapersm" => {
                    self.number("a count")?;
                }
                ".pragma" => self.skip_line(pos.line),
                w => return pos.error(format!("expected a directive of the entry or `{{`, found `{w}`")),
            }
        }
        self.at += 1;
        self.body()
    }

    /// `.align n .type name[count]`, with the modifiers of parameters: name, bytes, alignment.
    fn declarator(&mut self) -> Result<(String, usize, usize), String> {
        let (mut ty, mut align) = (None, None);
        loop {
            let pos = self.pos();
            let w = self.word("a type or a name")?;
            match w.as_str() {
                ".align" => {
                    let n = self.number("an alignment")?;
                    if !n.is_power_of_two() || n > 1 << 16 {
                        return pos.error(format!("expected a power of two up to 65536 as alignment, found {n}"));
                    }
                    align = Some(n as usize);
                }
                ".ptr" | ".global" | ".const" => {}
                _ if w.starts_with('.') => match Ty::parse(&w[1..]) {
                    Some(t) => ty = Some(t),
                    None => return pos.error(format!("expected a type, found `{w}`")),
                },
                _ => {
                    let Some(ty) = ty else { return pos.error(format!("expected a type, found `{w}`")) };
                    let size = ty.bits() as usize / 8;
                    let mut bytes = size;
                    if self.eat('[') {
                        bytes = if self.is(']') { 0 } else { size.saturating_mul(self.number("a count")? as usize) };
                        self.expect(']')?;
                    }
                    if bytes > 1 << 24 {
                        return pos.error(format!("expected at most 16 MiB, found {bytes} bytes"));
                    }
                    return Ok((w, bytes, align.unwrap_or(size.max(1))));
                }
            }
        }
    }

    fn variable(&mut self, shared: bool) -> Result<(), String> {
        let (name, bytes, align) = self.declarator()?;
        self.expect(';')?;
        let entry = &mut self.entry;
        let value = if bytes == 0 && shared {
            self.dynamic_align = self.dynamic_align.max(align);
            Name::Dynamic
        } else {
            let at = if shared { &mut entry.shared_bytes } else { &mut entry.local_bytes };
            *at = at.next_multiple_of(align);
            let here = *at as u64;
            *at += bytes;
            if shared { Name::Shared(here) } else { Name::Local(here) }
        };
        self.declare(name, value);
        Ok(())
    }

    fn declare(&mut self, name: String, value: Name) {
        if let Some((_, names)) = self.scopes.last_mut() {
            names.insert(name, value);
        }
    }

    /// A register of 128 bits is two slots.
    fn push_reg(&mut self, name: String, ty: Ty) {
        self.entry.regs.push(RegInfo { name: name.clone(), ty });
        if ty == Ty::B128 {
            self.entry.regs.push(RegInfo { name, ty: Ty::B64 });
        }
    }

    fn registers(&mut self) -> Result<(), String> {
        let pos = self.pos();
        let w = self.word("a type")?;
        let Some(ty) = w.strip_prefix('.').and_then(Ty::parse) else {
            return pos.error(format!("expected a type, found `{w}`"));
        };
        loop {
            let name = self.word("a register's name")?;
            let first = self.entry.regs.len() as Reg;
            if self.eat('<') {
                let n = self.number("a count")?;
                if n > 100_000 {
                    return pos.error(format!("expected at most 100000 registers, found {n}"));
                }
                self.expect('>')?;
                for i in 0..n {
                    self.push_reg(format!("{name}{i}"), ty);
                }
                self.declare(format!("{name}<"), Name::Range(first, n as u32));
            } else {
                self.push_reg(name.clone(), ty);
                self.declare(name, Name::Reg(first));
            }
            if !self.eat(',') {
                return self.expect(';');
            }
        }
    }

    fn body(&mut self) -> Result<(), String> {
        self.open();
        loop {
            let pos = self.pos();
            match self.next() {
                Token::Punct('{') => self.open(),
                Token::Punct('}') => {
                    self.scopes.pop();
                    if self.scopes.len() == 1 {
                        return Ok(());
                    }
                }
                Token::Punct(';') => {}
                Token::Punct('@') => {
                    let negated = self.eat('!');
                    let name = self.word("a predicate")?;
                    let Some(Name::Reg(reg)) = self.find(&name) else {
                        return pos.error(format!("expected a predicate, found `{name}`"));
                    };
                    if self.entry.regs[reg as usize].ty != Ty::Pred {
                        return pos.error(format!("expected a predicate, found `{name}`"));
                    }
                    let at = self.pos();
                    let text = self.word("an instruction")?;
                    self.instruction(at, text, Some((reg, negated)))?;
                }
                Token::Word(w) => match w.as_str() {
                    ".reg" => self.registers()?,
                    ".shared" => self.variable(true)?,
                    ".local" => self.variable(false)?,
                    ".loc" | ".file" => self.skip_line(pos.line),
                    ".pragma" => {
                        while !self.eat(';') {
                            if self.next() == Token::End {
                                return self.wanted("`;`");
                            }
                        }
                    }
                    _ if self.is(':') => {
                        self.at += 1;
                        let scope = self.scopes.last().map_or(0, |s| s.0);
                        if self.labels.insert((scope, w.clone()), self.entry.statements.len()).is_some() {
                            return pos.error(format!("label `{w}` is here a second time"));
                        }
                    }
                    _ => self.instruction(pos, w, None)?,
                },
                t => return pos.error(format!("expected a statement, found {t}")),
            }
        }
    }

    fn open(&mut self) {
        self.scopes.push((self.num_scopes, HashMap::new()));
        self.num_scopes += 1;
    }

    fn instruction(&mut self, pos: Pos, text: String, guard: Option<(Reg, bool)>) -> Result<(), String> {
        let mut operands = vec![];
        if text == "bra" || text == "bra.uni" {
            let label = self.word("a label")?;
            let path = self.scopes.iter().map(|s| s.0).collect();
            self.branches.push((self.entry.statements.len(), label, path));
            self.expect(';')?;
        } else if !self.eat(';') {
            loop {
                operands.push(self.operand()?);
                if self.eat(',') {
                    continue;
                }
                if self.eat(';') {
                    break;
                }
                return self.wanted("`,` or `;`");
            }
        }
        self.entry.statements.push(Statement { pos, guard, text, operands, target: 0 });
        Ok(())
    }

    fn finish(mut self) -> Result<Entry, String> {
        if self.entries == 0 {
            return self.wanted("an entry");
        }
        for (at, label, path) in self.branches {
            let target = path.iter().rev().find_map(|s| self.labels.get(&(*s, label.clone())));
            match target {
                Some(t) => self.entry.statements[at].target = *t,
                None => return self.entry.statements[at].pos.error(format!("label `{label}` is nowhere")),
            }
        }
        let end = Pos { line: self.tokens.last().map_or(0, |t| t.1.line), column: 1 };
        self.entry.statements.push(Statement {
            pos: end,
            guard: None,
            text: "ret".to_owned(),
            operands: vec![],
            target: 0,
        });
        self.entry.dynamic_at = self.entry.shared_bytes.next_multiple_of(self.dynamic_align);
        let dynamic = self.entry.dynamic_at as u64;
        for s in &mut self.entry.statements {
            s.operands.iter_mut().for_each(|o| place(o, dynamic));
        }
        Ok(self.entry)
    }
}
