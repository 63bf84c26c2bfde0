//! A quasi-assembler: a kernel is a Rust function of its configuration, and every line it emits is literal PTX.
//!
//! Rust supplies what PTX has not: typed registers, labels, unrolling, and layouts computed from constants. No instruction is
//! modelled; the assembler of the driver is the type checker, and the interpreter in `ptxsim` the proof.
//! [`ptx!`](macro@crate::ptx) writes one instruction with registers in braces:
//!
//! ```
//! use kernels::{ptx, ptx::asm::{Assembler, B32, F32, vector}};
//! let mut k = Assembler::new("twice");
//! let (i, x) = (k.reg::<B32>(), k.regs::<F32>(2));
//! ptx!(k, "mov.u32 {i}, %tid.x;");
//! ptx!(k, "ld.shared.v2.f32 {}, [{i}];", vector(&x));
//! ```

use std::{
    fmt::{self, Write as _},
    marker::PhantomData,
};

/// A class of registers.
pub trait Class: Copy {
    /// Its type in PTX.
    const TYPE: &'static str;
    /// How names of its registers begin.
    const PREFIX: &'static str;
    /// Its place among the classes.
    const INDEX: usize;
}

macro_rules! classes {
    ($($(#[$doc:meta])* $name:ident $type:literal $prefix:literal $index:literal;)*) => {
        $($(#[$doc])* #[derive(Clone, Copy, Debug)]
        pub struct $name;
        impl Class for $name {
            const TYPE: &'static str = $type;
            const PREFIX: &'static str = $prefix;
            const INDEX: usize = $index;
        })*
        const CLASSES: &[(&str, &str)] = &[$(($type, $prefix)),*];
    };
}
classes! {
    /// Predicates.
    Pred ".pred" "%p" 0;
    /// 16 bits: bf16, f16.
    B16 ".b16" "%h" 1;
    /// 32 bits: integers, pairs of bf16.
    B32 ".b32" "%r" 2;
    /// 64 bits: addresses, descriptors.
    B64 ".b64" "%rd" 3;
    /// f32.
    F32 ".f32" "%f" 4;
    /// f64.
    F64 ".f64" "%fd" 5;
}

/// A register; displayed as its name.
#[derive(Clone, Copy, Debug)]
pub struct Reg<C: Class>(u32, PhantomData<C>);

impl<C: Class> fmt::Display for Reg<C> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}{}", C::PREFIX, self.0)
    }
}

/// A place to jump to; displayed as its name.
#[derive(Clone, Debug)]
pub struct Label(String);

impl fmt::Display for Label {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// Registers as a vector operand: `{%f0, %f1}`.
pub fn vector<C: Class>(registers: &[Reg<C>]) -> String {
    let names: Vec<String> = registers.iter().map(Reg::to_string).collect();
    format!("{{{}}}", names.join(", "))
}

/// An f32 constant as PTX writes it, to the bit: `0f3F800000`.
pub fn f32_literal(x: f32) -> String {
    format!("0f{:08X}", x.to_bits())
}

/// An f64 constant as PTX writes it, to the bit.
pub fn f64_literal(x: f64) -> String {
    format!("0d{:016X}", x.to_bits())
}

/// Text of one kernel as it grows.
#[derive(Debug)]
pub struct Assembler {
    name: String,
    params: Vec<String>,
    directives: Vec<String>,
    module: Vec<String>,
    shared: Vec<String>,
    counts: [u32; CLASSES.len()],
    labels: u32,
    body: String,
}

impl Assembler {
    /// A kernel of that name without a line.
    pub fn new(name: &str) -> Self {
        Assembler {
            name: name.to_owned(),
            params: vec![],
            directives: vec![],
            module: vec![],
            shared: vec![],
            counts: [0; CLASSES.len()],
            labels: 0,
            body: String::new(),
        }
    }

    /// Declares the next parameter, `ty` as `.u64`; returns its name for `ld.param`.
    pub fn param(&mut self, ty: &str, name: &str) -> String {
        self.params.push(format!(".param {ty} {name}"));
        name.to_owned()
    }

    /// Declares the next parameter as an address in global memory, and loads it.
    pub fn pointer(&mut self, name: &str) -> Reg<B64> {
        self.param(".u64", name);
        let r = self.reg::<B64>();
        self.line(format!("ld.param.u64 {r}, [{name}];"));
        self.line(format!("cvta.to.global.u64 {r}, {r};"));
        r
    }

    /// Declares the next parameter as a u32, and loads it.
    pub fn u32(&mut self, name: &str) -> Reg<B32> {
        self.param(".u32", name);
        let r = self.reg::<B32>();
        self.line(format!("ld.param.u32 {r}, [{name}];"));
        r
    }

    /// Declares the next parameter as an f32, and loads it.
    pub fn f32(&mut self, name: &str) -> Reg<F32> {
        self.param(".f32", name);
        let r = self.reg::<F32>();
        self.line(format!("ld.param.f32 {r}, [{name}];"));
        r
    }

    /// Declares the next parameter as an f64, and loads it.
    pub fn f64(&mut self, name: &str) -> Reg<F64> {
        self.param(".f64", name);
        let r = self.reg::<F64>();
        self.line(format!("ld.param.f64 {r}, [{name}];"));
        r
    }

    /// Declares the next parameter as so many bytes.
    pub fn param_bytes(&mut self, align: usize, name: &str, num_bytes: usize) {
        self.params.push(format!(".param .align {align} .b8 {name}[{num_bytes}]"));
    }

    /// Declares the next parameter as a tensor map; returns its address.
    pub fn tensor_map(&mut self, name: &str) -> Reg<B64> {
        self.param_bytes(64, name, 128);
        let r = self.reg::<B64>();
        self.line(format!("mov.b64 {r}, {name};"));
        self.line(format!("cvta.param.u64 {r}, {r};"));
        r
    }

    /// A directive of the entry, as `.maxntid 256, 1, 1`.
    pub fn directive(&mut self, text: impl Into<String>) {
        self.directives.push(text.into());
    }

    /// Declares dynamic shared memory, sized at launch; returns its name.
    pub fn dynamic_shared(&mut self, align: usize, name: &str) -> String {
        self.module.push(format!(".extern .shared .align {align} .b8 {name}[];"));
        name.to_owned()
    }

    /// Declares static shared memory of so many bytes; returns its name.
    pub fn shared(&mut self, align: usize, name: &str, num_bytes: usize) -> String {
        self.shared.push(format!(".shared .align {align} .b8 {name}[{num_bytes}];"));
        name.to_owned()
    }

    /// A new register.
    pub fn reg<C: Class>(&mut self) -> Reg<C> {
        let index = self.counts[C::INDEX];
        self.counts[C::INDEX] += 1;
        Reg(index, PhantomData)
    }

    /// New registers.
    pub fn regs<C: Class>(&mut self, n: usize) -> Vec<Reg<C>> {
        (0..n).map(|_| self.reg()).collect()
    }

    /// A new label; `hint` is the part of its name for readers.
    pub fn label(&mut self, hint: &str) -> Label {
        self.labels += 1;
        Label(format!("${hint}_{}", self.labels))
    }

    /// Puts a label here.
    pub fn place(&mut self, label: &Label) {
        let _ = writeln!(self.body, "{label}:");
    }

    /// One instruction; [`ptx!`](macro@crate::ptx) formats it.
    pub fn line(&mut self, text: impl AsRef<str>) {
        let _ = writeln!(self.body, "    {}", text.as_ref());
    }

    /// A comment on a line of its own.
    pub fn note(&mut self, text: &str) {
        let _ = writeln!(self.body, "    // {text}");
    }

    /// The module's text: one entry, for `target` as `sm_90a`.
    ///
    /// # Panics
    /// If it is not ASCII: ptxas 13 refuses other bytes even in comments.
    pub fn finish(self, version: &str, target: &str) -> String {
        let mut text = format!(".version {version}\n.target {target}\n.address_size 64\n\n");
        for line in &self.module {
            let _ = writeln!(text, "{line}");
        }
        let _ = writeln!(text, ".visible .entry {}(\n    {}\n)", self.name, self.params.join(",\n    "));
        for line in &self.directives {
            let _ = writeln!(text, "{line}");
        }
        text.push_str("{\n");
        for line in &self.shared {
            let _ = writeln!(text, "    {line}");
        }
        for (count, (ty, prefix)) in self.counts.iter().zip(CLASSES).filter(|(count, _)| **count > 0) {
            let _ = writeln!(text, "    .reg {ty} {prefix}<{count}>;");
        }
        text.push_str(&self.body);
        text.push_str("}\n");
        assert!(text.is_ascii(), "kernel `{}` has a character that is not ASCII", self.name);
        text
    }
}

/// Writes one instruction into an [`Assembler`], formatted as by `format!`.
#[macro_export]
macro_rules! ptx {
    ($assembler:expr, $($text:tt)*) => { $assembler.line(format!($($text)*)) };
}
