//! What kernels by wgmma are put together from: stages in turn, waits, descriptors, tensor maps.

use super::{
    super::{
        TensorMap,
        asm::{Assembler, B32, B64, Pred, Reg},
    },
    problem::Matrix,
};
use crate::ptx;

/// Bytes of 64 rows of 128: a swizzled panel.
pub(in crate::ptx) const PANEL_BYTES: u32 = 64 * 128;

/// Cache hint: no preference (EVICT_NORMAL).
pub(in crate::ptx) const L2_HINT: &str = "0x1000000000000000";

/// Waits until the phase of that parity is over.
pub(in crate::ptx) fn wait(k: &mut Assembler, barrier: Reg<B32>, offset: u32, parity: Reg<B32>) {
    let (again, q) = (k.label("WAIT"), k.reg::<Pred>());
    k.place(&again);
    ptx!(k, "mbarrier.try_wait.parity.shared::cta.b64 {q}, [{barrier}+{offset}], {parity}, 0x989680;");
    ptx!(k, "@!{q} bra {again};");
}

/// A stage in turn, and the parity of its round.
pub(in crate::ptx) struct Turn {
    pub stage: Reg<B32>,
    pub parity: Reg<B32>,
}

impl Turn {
    /// The first, in the first round.
    pub fn new(k: &mut Assembler) -> Self {
        let turn = Turn { stage: k.reg(), parity: k.reg() };
        ptx!(k, "mov.u32 {}, 0;", turn.stage);
        ptx!(k, "mov.u32 {}, 0;", turn.parity);
        turn
    }

    /// To the next of `stages`.
    pub fn advance(&self, k: &mut Assembler, stages: u32) {
        let Turn { stage, parity } = self;
        let (q, same) = (k.reg::<Pred>(), k.label("SAME_ROUND"));
        ptx!(k, "add.u32 {stage}, {stage}, 1;");
        ptx!(k, "setp.ne.u32 {q}, {stage}, {stages};");
        ptx!(k, "@{q} bra {same};");
        ptx!(k, "mov.u32 {stage}, 0;");
        ptx!(k, "xor.b32 {parity}, {parity}, 1;");
        k.place(&same);
    }
}

/// Descriptor of a 128-byte-swizzled operand: from one eight rows (or eight of k) to the next 1024 bytes.
const DESCRIPTOR_HIGH: u32 = 1 << 30 | 1024 >> 4;

/// An operand's descriptors: the low word is the address and, for panels, the bytes from one to the next.
pub(in crate::ptx) struct Descriptor {
    low: Reg<B32>,
    high: Reg<B32>,
    /// What 32 bytes of k add to the low word.
    step: u32,
}

impl Descriptor {
    /// Of the operand at `base` of the first stage.
    pub fn new(k: &mut Assembler, base: Reg<B32>, k_major: bool) -> Self {
        let (low, high) = (k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "shr.u32 {low}, {base}, 4;");
        ptx!(k, "and.b32 {low}, {low}, 0x3fff;");
        if !k_major {
            ptx!(k, "or.b32 {low}, {low}, {};", (PANEL_BYTES >> 4) << 16);
        }
        ptx!(k, "mov.u32 {high}, {DESCRIPTOR_HIGH};");
        Descriptor { low, high, step: if k_major { 32 } else { 2048 } >> 4 }
    }

    /// The descriptors of a stage of 128 bytes of k, one for each 32.
    pub fn of_stage(&self, k: &mut Assembler, stage: Reg<B32>, stage_bytes: u32) -> Vec<Reg<B64>> {
        let low = k.reg::<B32>();
        ptx!(k, "mad.lo.u32 {low}, {stage}, {}, {};", stage_bytes >> 4, self.low);
        (0..4)
            .map(|j| {
                let (at, whole) = (k.reg::<B32>(), k.reg::<B64>());
                ptx!(k, "add.u32 {at}, {low}, {};", j * self.step);
                ptx!(k, "mov.b64 {whole}, {{{at}, {}}};", self.high);
                whole
            })
            .collect()
    }
}

/// A matrix in boxes whose rows are at most 128 bytes; `dims` are innermost first, the third with elements from one to the next.
pub(in crate::ptx) fn map(matrix: Matrix, dims: &[u32; 2], box_dims: [u32; 2], third: Option<(u32, u32)>) -> TensorMap {
    let size = matrix.tensor.dtype.size_bytes() as u64;
    let mut map = TensorMap {
        tensor: matrix.tensor,
        dims: dims.map(u64::from).to_vec(),
        strides: vec![u64::from(matrix.stride) * size],
        box_dims: box_dims.to_vec(),
        swizzle: 128,
    };
    if let Some((num, stride)) = third {
        map.dims.push(num.into());
        map.strides.push(u64::from(stride) * size);
        map.box_dims.push(1);
    }
    map
}
