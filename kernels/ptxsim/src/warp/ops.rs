//! Operands of instructions that a warp or a CTA executes together.

use crate::inst::{Addr, AtomOp, Reg, Src, Ty};

/// How `shfl` picks the lane to read.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Shfl {
    Up,
    Down,
    Bfly,
    Idx,
}

/// What `vote` and `bar.red` tell.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Vote {
    All,
    Any,
    Uni,
    Ballot,
    Popc,
}

/// What needs the lanes of a warp to be at one place.
#[derive(Clone, Debug)]
pub(crate) enum Collective {
    Shfl { mode: Shfl, d: Option<Reg>, p: Option<Reg>, a: Src, b: Src, c: Src, mask: Src },
    Vote { mode: Vote, d: Reg, a: Src, mask: Src },
    Match { all: bool, d: Option<Reg>, p: Option<Reg>, a: Src, mask: Src },
    Redux { op: AtomOp, ty: Ty, d: Reg, a: Src, mask: Src },
    Elect { d: Option<Reg>, p: Option<Reg>, mask: Src },
    BarWarp { mask: Src },
    ActiveMask { d: Reg },
    LdMatrix { trans: bool, d: Vec<Reg>, addr: Addr },
    StMatrix { trans: bool, s: Vec<Src>, addr: Addr },
    Mma { k: usize, ta: Ty, tb: Ty, d: Vec<Reg>, a: Vec<Src>, b: Vec<Src>, c: Vec<Src> },
    SetMaxNReg,
}

/// `bar` and `barrier`.
#[derive(Clone, Debug)]
pub(crate) struct BarOp {
    pub id: Src,
    pub count: Option<Src>,
    /// False for `arrive`.
    pub wait: bool,
    /// Whether all lanes of the warp must come together.
    pub aligned: bool,
    pub red: Option<(Vote, Reg, Src)>,
}
