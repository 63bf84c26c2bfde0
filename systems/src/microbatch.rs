//! Microbatches: entities that carry packed tokens through the stages. Admit fills them; the graph is planned once for their
//! shape and reads the same tensors every step.

use bevy_ecs::prelude::*;
use kernels::{dtype::DType, memory::Memory, tensor::Tensor};

use crate::data::packing::Batch;

/// Most MTP modules a model may have.
pub const MAX_MTP: usize = 4;

/// Device tensors of one microbatch of t tokens.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Inputs {
    /// Token ids u32 \[t\].
    pub tokens: Tensor,
    /// Next tokens u32 \[t\]; [`crate::data::packing::IGNORE`] where there is none.
    pub targets: Tensor,
    /// Position in the document u32 \[t\].
    pub positions: Tensor,
    /// First token of each document u32 \[t + 1\], filled up with t.
    pub doc_offsets: Tensor,
    /// Per MTP module: the token it is given, and the one it predicts, u32 \[t\].
    pub mtp: [Option<(Tensor, Tensor)>; MAX_MTP],
    /// Tokens of one sequence; t is a multiple.
    pub seq_len: usize,
}

impl Inputs {
    /// Allocates the tensors of `num_sequences` sequences of `seq_len` tokens.
    pub fn allocate(memory: &Memory, num_sequences: usize, seq_len: usize, num_mtp: usize) -> Self {
        let t = num_sequences * seq_len;
        let row = || memory.alloc(DType::U32, &[t]);
        Inputs {
            tokens: row(),
            targets: row(),
            positions: row(),
            doc_offsets: memory.alloc(DType::U32, &[t + 1]),
            mtp: std::array::from_fn(|k| (k < num_mtp).then(|| (row(), row()))),
            seq_len,
        }
    }

    /// Tokens in the microbatch.
    pub fn num_tokens(&self) -> usize {
        self.tokens.len()
    }

    /// Copies a batch in; the streams must be idle.
    ///
    /// # Panics
    /// If the batch has another number of tokens.
    pub fn upload(&self, memory: &Memory, batch: &Batch) {
        let t = self.num_tokens();
        memory.upload(self.tokens, &batch.tokens);
        memory.upload(self.targets, &batch.targets);
        memory.upload(self.positions, &batch.positions);
        let mut offsets = batch.doc_offsets.clone();
        offsets.resize(t + 1, t as u32);
        memory.upload(self.doc_offsets, &offsets);
        for (k, (tokens, targets)) in (1..).zip(self.mtp.iter().flatten()) {
            memory.upload(*tokens, &batch.mtp_inputs(k));
            memory.upload(*targets, batch.mtp_targets(k));
        }
    }
}

/// A microbatch of the step at hand.
#[derive(Component, Clone, Copy, Debug)]
pub struct Microbatch {
    /// Number in the step.
    pub index: u32,
    /// Its tensors.
    pub inputs: Inputs,
}
