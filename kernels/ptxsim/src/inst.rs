//! Instructions as the interpreter executes them: operands are register numbers and constants, modifiers are decoded.

use crate::engines::ops::{BulkOp, CpAsyncOp, MbarOp, WgmmaOp};
use crate::warp::ops::{BarOp, Collective};

/// Number of a register within its entry.
pub(crate) type Reg = u32;
/// One value for each thread of a warp, zero-extended.
pub(crate) type Lanes = [u64; 32];

pub(crate) use crate::types::{Special, Ty};

/// Where a value comes from.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum Src {
    /// A register.
    Reg(Reg),
    /// A constant, of the instruction's type.
    Imm(u64),
    /// A special register.
    Special(Special),
    /// A predicate's complement.
    Not(Reg),
}

/// An address.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) struct Addr {
    pub base: Src,
    pub offset: i64,
}

/// A state space.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Space {
    Generic,
    Global,
    Shared,
    Param,
    Local,
}

/// How an access is ordered with those of other threads.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Order {
    Weak,
    /// Also volatile.
    Relaxed,
    Acquire,
    Release,
    AcqRel,
}

impl Order {
    /// Whether later accesses come after it.
    pub(crate) fn acquires(self) -> bool {
        matches!(self, Order::Acquire | Order::AcqRel)
    }
    /// Whether earlier accesses come before it.
    pub(crate) fn releases(self) -> bool {
        matches!(self, Order::Release | Order::AcqRel)
    }
}

/// What a scalar instruction computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Alu {
    Mov,
    Add,
    Sub,
    MulLo,
    MulHi,
    MulWide,
    MadLo,
    MadHi,
    MadWide,
    Mul24,
    Fma,
    FmaRelu,
    Div,
    Rem,
    Min,
    Max,
    Abs,
    Neg,
    And,
    Or,
    Xor,
    Not,
    Cnot,
    Shl,
    Shr,
    /// Funnel shifts; whether the amount wraps.
    ShfL(bool),
    ShfR(bool),
    Bfe,
    Bfi,
    Prmt(PrmtMode),
    Popc,
    Clz,
    Brev,
    /// Whether as an amount to shift by.
    Bfind(bool),
    Lop3(u8),
    Selp,
    /// Whether the selector is an f32.
    Slct(bool),
    Sad,
    Ex2,
    Lg2,
    Rcp,
    Rsqrt,
    Sqrt,
    Sin,
    Cos,
    Tanh,
    Copysign,
    Testp(Testp),
}

/// How `prmt` reads its selector.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum PrmtMode {
    Index,
    F4e,
    B4e,
    Rc8,
    Ecl,
    Ecr,
    Rc16,
}

/// What `testp` asks.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Testp {
    Finite,
    Infinite,
    Number,
    NotANumber,
    Normal,
    Subnormal,
}

/// A scalar instruction's kind and modifiers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct AluOp {
    pub kind: Alu,
    pub ty: Ty,
    /// Denormals are flushed.
    pub ftz: bool,
    /// Clamped: integers to their range, floats to [0, 1].
    pub sat: bool,
    /// Min and max give NaN if an operand is.
    pub nan: bool,
    /// Within the bounds of the documentation only.
    pub approx: bool,
}

/// A comparison.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Cmp {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    Equ,
    Neu,
    Ltu,
    Leu,
    Gtu,
    Geu,
    Num,
    Nan,
}

/// How a comparison is combined with a predicate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Combine {
    And,
    Or,
    Xor,
}

/// `setp` and `set`.
#[derive(Clone, Debug)]
pub(crate) struct SetpOp {
    pub cmp: Cmp,
    pub ty: Ty,
    pub ftz: bool,
    pub combine: Option<(Combine, Src)>,
    pub d: Option<Reg>,
    /// Where the complement goes.
    pub q: Option<Reg>,
    /// What true is: 1, all ones, or 1.0.
    pub yes: u64,
    pub a: Src,
    pub b: Src,
}

/// How a conversion rounds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Round {
    /// To nearest, ties to even.
    Nearest,
    /// To nearest, ties away from zero.
    Away,
    /// Towards zero.
    Zero,
    /// Down.
    Minus,
    /// Up.
    Plus,
}

/// `cvt`.
#[derive(Clone, Debug)]
pub(crate) struct CvtOp {
    pub to: Ty,
    pub from: Ty,
    pub round: Round,
    /// Rounds to an integral value of the float type.
    pub integral: bool,
    pub ftz: bool,
    pub sat: bool,
    pub relu: bool,
    pub d: Reg,
    /// Width of `d`, which may be wider than the type.
    pub d_bits: u32,
    pub a: Src,
    /// Second source: the lower half.
    pub b: Option<Src>,
}

/// What an atomic does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum AtomOp {
    Add,
    Min,
    Max,
    And,
    Or,
    Xor,
    Exch,
    Cas,
    Inc,
    Dec,
}

/// `atom` and `red`.
#[derive(Clone, Debug)]
pub(crate) struct AtomicOp {
    pub op: AtomOp,
    pub ty: Ty,
    pub space: Space,
    pub order: Order,
    /// Where the old values go; empty for `red`.
    pub d: Vec<Option<Reg>>,
    pub s: Vec<Src>,
    pub swap: Option<Src>,
    pub addr: Addr,
}

/// Loads and stores.
#[derive(Clone, Debug)]
pub(crate) struct MemOp {
    pub space: Space,
    pub ty: Ty,
    pub order: Order,
    pub addr: Addr,
    /// Destinations of a load with their widths.
    pub d: Vec<Option<(Reg, u32)>>,
    /// Sources of a store.
    pub s: Vec<Src>,
}

/// What an instruction does.
#[derive(Clone, Debug)]
pub(crate) enum Op {
    Nop,
    Trap,
    Exit,
    Bra(usize),
    Alu {
        op: AluOp,
        d: Reg,
        s: [Src; 4],
    },
    Setp(Box<SetpOp>),
    Cvt(Box<CvtOp>),
    /// Joins values of `bits` each, the first lowest.
    Pack {
        d: Reg,
        bits: u32,
        s: Vec<Src>,
    },
    Unpack {
        d: Vec<Option<Reg>>,
        bits: u32,
        a: Src,
    },
    /// 128 bits from two halves, and back.
    Pack128 {
        d: Reg,
        s: [Src; 2],
    },
    Unpack128 {
        d: [Option<Reg>; 2],
        a: Reg,
    },
    Ld(Box<MemOp>),
    St(Box<MemOp>),
    Atomic(Box<AtomicOp>),
    /// Adds or subtracts a space's window.
    Cvta {
        space: Space,
        to: bool,
        d: Reg,
        a: Src,
    },
    Isspacep {
        space: Space,
        d: Reg,
        a: Src,
    },
    Mapa {
        d: Reg,
        a: Src,
        rank: Src,
        generic: bool,
    },
    /// Of the CTA or wider; whether it orders global memory.
    Fence {
        gpu: bool,
    },
    FenceAsync,
    FenceMbarrierInit,
    Collective(Box<Collective>),
    Bar(Box<BarOp>),
    ClusterBar {
        arrive: bool,
        release: bool,
    },
    Mbar(Box<MbarOp>),
    CpAsync(Box<CpAsyncOp>),
    Bulk(Box<BulkOp>),
    Wgmma(Box<WgmmaOp>),
}

/// One instruction.
#[derive(Clone, Debug)]
pub(crate) struct Inst {
    pub line: u32,
    /// Mnemonic as written.
    pub text: String,
    pub guard: Option<(Reg, bool)>,
    pub op: Op,
    pub reads: Vec<Reg>,
    pub writes: Vec<Reg>,
}
