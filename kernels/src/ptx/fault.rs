//! What kernels find wrong with what they are given, and how they say it: in words of memory that the host reads when it next meets the
//! stream. A `trap` would say it too, but no device works after one, and it does not tell what was wrong.
//!
//! A stream has four u32: claimed, ready, a, b. Whoever finds a fault claims them by `atom.cas` with the number of its site, which is
//! its task with its [`Fault`]; if it is the first, it writes two numbers of the fault's own, and then, past a fence, `ready`. The kernel
//! goes on with something harmless, because others follow before the host knows: it stays within its tensors whatever it was given.
//!
//! Parameter: 16 bytes, the words' address and the site. Faultless threads pay for one predicated branch.

use std::sync::Arc;

use super::asm::{Assembler, B32, B64, Pred, Reg};
use crate::{error::Error, ops, ptx};

/// What a kernel looks out for, with what it takes to say it as the op on the CPU does. Its two numbers, a and b, are told of each.
#[derive(Clone, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Fault {
    /// A gate's logit that is NaN; token, 0.
    GateLogit,
    /// Logits to sample from with NaN or infinity, or nothing above minus infinity; row, bits of the f32.
    SampledLogits,
    /// A NaN or an infinity; low and high word of it as f64.
    NotFinite {
        /// Task that looks for it.
        task: Arc<str>,
        /// The tensor's name.
        tensor: Arc<str>,
    },
    /// A token that the embedding has no row for; its position, the token.
    Token {
        /// Rows.
        vocabulary: u32,
    },
    /// A target that is no token; 0, the target.
    Target {
        /// Tokens.
        vocabulary: u32,
    },
    /// An expert that does not exist; its slot, the expert.
    Expert {
        /// Experts that do.
        num: u32,
        /// Slots of a token.
        per_token: u32,
    },
    /// A count past u32; the expert, 0.
    Count,
    /// A position past the rope table; 0, the position.
    Position,
    /// A row to write that is not there; its place in the list, the row.
    Row {
        /// Rows that are.
        len: u32,
    },
}

impl Fault {
    /// The error that the op on the CPU raises, in a task of a stream.
    #[cfg_attr(not(any(feature = "cuda", test)), expect(dead_code, reason = "no device"))]
    pub(crate) fn error(&self, [a, b]: [u32; 2], stream: &str, task: &str) -> Error {
        let message = match self {
            Fault::GateLogit => return ops::gate::not_a_number(a as usize),
            Fault::SampledLogits => return ops::sampling::unusable_logits(a as usize, f32::from_bits(b).into()),
            Fault::NotFinite { task, tensor } => {
                return ops::norm::not_finite(task, tensor, f64::from_bits(u64::from(a) | u64::from(b) << 32));
            }
            Fault::Token { vocabulary } => ops::embedding::no_such_token(a as usize, b, *vocabulary as usize),
            Fault::Target { vocabulary } => ops::cross_entropy::no_such_target(b, *vocabulary as usize),
            Fault::Expert { num, per_token } => {
                ops::permute::no_such_expert((a / (*per_token).max(1)) as usize, b, *num as usize)
            }
            Fault::Count => ops::balance::too_many(a as usize),
            Fault::Position => ops::rope::past_the_table(b as usize),
            Fault::Row { len } => ops::elementwise::no_such_row(a as usize, b, *len as usize),
        };
        Error::Task { stream: stream.to_owned(), task: task.to_owned(), message }
    }
}

/// A kernel's parameter for a [`super::Arg::Fault`].
pub(super) struct Report(&'static str);

impl Report {
    /// Declares it as the next.
    pub(super) fn param(k: &mut Assembler) -> Self {
        k.param_bytes(8, "fault", 16);
        Report("fault")
    }

    /// Where `wrong`, tells of the fault, unless one was told of before.
    pub(super) fn tell(&self, k: &mut Assembler, wrong: Reg<Pred>, a: Reg<B32>, b: Reg<B32>) {
        let (fine, words, site, before, late) =
            (k.label("fine"), k.reg::<B64>(), k.reg::<B32>(), k.reg::<B32>(), k.reg::<Pred>());
        ptx!(k, "@!{wrong} bra {fine};");
        ptx!(k, "ld.param.u64 {words}, [{}];", self.0);
        ptx!(k, "ld.param.u32 {site}, [{}+8];", self.0);
        ptx!(k, "cvta.to.global.u64 {words}, {words};");
        ptx!(k, "atom.global.cas.b32 {before}, [{words}], 0, {site};");
        ptx!(k, "setp.ne.u32 {late}, {before}, 0;");
        ptx!(k, "@{late} bra {fine};");
        ptx!(k, "st.global.v2.u32 [{words}+8], {{{a}, {b}}};");
        ptx!(k, "membar.sys;");
        ptx!(k, "st.global.u32 [{words}+4], {site};");
        k.place(&fine);
    }
}
