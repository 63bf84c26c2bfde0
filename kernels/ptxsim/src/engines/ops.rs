//! Operands of asynchronous instructions.

use crate::inst::{Addr, AtomOp, Reg, Src, Ty};

/// `mbarrier` and what arrives at one.
#[derive(Clone, Debug)]
pub(crate) enum MbarOp {
    Init {
        addr: Addr,
        count: Src,
    },
    Inval {
        addr: Addr,
    },
    Arrive {
        addr: Addr,
        d: Option<Reg>,
        count: Src,
        expect: Option<Src>,
        drop: bool,
        no_complete: bool,
    },
    ExpectTx {
        addr: Addr,
        bytes: Src,
    },
    CompleteTx {
        addr: Addr,
        bytes: Src,
    },
    /// `state` is a parity or a token.
    Wait {
        d: Reg,
        addr: Addr,
        state: Src,
        parity: bool,
        may_fail: bool,
    },
    PendingCount {
        d: Reg,
        a: Src,
    },
}

/// `cp.async`.
#[derive(Clone, Debug)]
pub(crate) enum CpAsyncOp {
    Copy { dst: Addr, src: Addr, bytes: usize, src_bytes: Option<Src>, ignore: Option<Src> },
    Commit,
    Wait(usize),
    WaitAll,
    Arrive { addr: Addr, noinc: bool },
}

/// The global side of a bulk copy.
#[derive(Clone, Debug)]
pub(crate) enum Far {
    /// A box of a tensor map.
    Tensor {
        /// Address of the map.
        map: Addr,
        /// Where the box begins, innermost first.
        coords: Vec<Src>,
    },
    /// So many bytes.
    Flat {
        /// Where.
        at: Addr,
        /// How many.
        bytes: Src,
    },
}

/// `cp.async.bulk`, `cp.reduce.async.bulk`, `st.async`, `tensormap.replace`.
#[derive(Clone, Debug)]
pub(crate) enum BulkOp {
    Load {
        far: Far,
        dst: Addr,
        bar: Addr,
        multicast: Option<Src>,
    },
    /// Shared memory of this CTA to that of another.
    Send {
        dst: Addr,
        src: Addr,
        bytes: Src,
        bar: Addr,
    },
    Store {
        far: Far,
        src: Addr,
        reduce: Option<(AtomOp, Option<Ty>)>,
    },
    StAsync {
        dst: Addr,
        s: Vec<Src>,
        ty: Ty,
        bar: Addr,
        add: Option<AtomOp>,
    },
    Commit,
    Wait {
        groups: usize,
        read: bool,
    },
    ReplaceMap {
        addr: Addr,
        field: MapField,
        value: Src,
    },
}

/// A field of a tensor map that `tensormap.replace` changes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum MapField {
    Address,
    Dim(usize),
    Stride(usize),
    Box(usize),
}

/// `wgmma`.
#[derive(Clone, Debug)]
pub(crate) enum WgmmaOp {
    Fence,
    Commit,
    Wait(usize),
    Mma(Box<WgmmaMma>),
}

/// Where the A operand of a `wgmma.mma_async` is.
#[derive(Clone, Debug)]
pub(crate) enum OperandA {
    /// A descriptor.
    Shared(Src),
    /// Four registers.
    Regs(Vec<Reg>),
}

/// `wgmma.mma_async`.
#[derive(Clone, Debug)]
pub(crate) struct WgmmaMma {
    pub n: usize,
    /// Elements along k.
    pub k: usize,
    pub ta: Ty,
    pub tb: Ty,
    pub d: Vec<Reg>,
    pub a: OperandA,
    pub b: Src,
    pub scale_d: Src,
    /// 1 or -1.
    pub sign_a: f32,
    pub sign_b: f32,
    /// MN-major.
    pub trans_a: bool,
    pub trans_b: bool,
}
