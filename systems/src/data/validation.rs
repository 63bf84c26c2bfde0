//! Validation over held-out text: every token of it predicted exactly once, in order, and the result in bits per byte, which
//! can be compared between tokenizers and with compressors.
//!
//! The rule: rows of the sequence length in corpus order, no overlap, no shuffling. A document's first token is predicted from
//! the end-of-text token in front of it, and the first token of a row from the last token of the row before. The end-of-text
//! tokens themselves are not counted: they are no bytes of the text.

use std::f64::consts::LN_2;
use std::ops::Range;

use super::corpus::Corpus;
use super::packing::{Batch, Packing, PackingError, Rows};

/// The held-out text as rows.
#[derive(Clone, Debug)]
pub struct Validation {
    rows: Rows,
    num_bytes: u64,
    num_targets: u64,
}

impl Validation {
    /// Packs `corpus` in order with `packing`, its `end_targets` and `refuse_long_documents` turned off.
    ///
    /// # Errors
    /// See [`PackingError`].
    pub fn new(corpus: Corpus, packing: Packing) -> Result<Validation, PackingError> {
        let (num_bytes, num_targets) = (corpus.num_bytes(), corpus.num_tokens());
        let rows = Rows::new(corpus, Packing { end_targets: false, refuse_long_documents: false, ..packing })?;
        Ok(Validation { rows, num_bytes, num_targets })
    }

    /// UTF-8 bytes of the held-out text.
    pub fn num_bytes(&self) -> u64 {
        self.num_bytes
    }

    /// Tokens of the held-out text; all batches together have this many targets.
    pub fn num_targets(&self) -> u64 {
        self.num_targets
    }

    /// Number of rows.
    pub fn num_rows(&self) -> u64 {
        self.rows.num_rows()
    }

    /// The rows `rows` as a batch. Rows past the last one are padding, so that all batches can have one shape.
    pub fn batch(&self, rows: Range<u64>) -> Batch {
        self.rows.batch(rows)
    }

    /// All rows, `num_sequences` (at least 1) at a time; the last batch is filled up with padding.
    pub fn batches(&self, num_sequences: usize) -> impl Iterator<Item = Batch> + '_ {
        let step = num_sequences.max(1);
        (0..self.num_rows()).step_by(step).map(move |first| self.batch(first..first + step as u64))
    }

    /// Bits per byte of UTF-8 from the sum of the negative log likelihoods (natural) of all targets.
    pub fn bits_per_byte(&self, total_nats: f64) -> f64 {
        total_nats / LN_2 / self.num_bytes as f64
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests panic with the failing expression")]
    use std::sync::Arc;

    use super::*;
    use crate::data::packing::IGNORE;
    use crate::data::shard::Shard;

    fn validation(documents: &[&[u32]], seq_len: usize) -> Result<Validation, PackingError> {
        let packing = Packing {
            seq_len,
            end_of_text: 0,
            num_mtp: 0,
            cross_document_attention: false,
            refuse_long_documents: true,
            end_targets: true,
        };
        let shard = Shard::from_documents(documents.iter().map(|d| (d.to_vec(), 3 * d.len() as u64)));
        Validation::new(Corpus::new([Arc::new(shard)]), packing)
    }

    #[test]
    fn each_token_of_the_text_is_a_target_once_and_in_order() {
        let documents: &[&[u32]] = &[&[1, 2, 3, 4, 5, 6, 7], &[8], &[], &[9, 10, 11]];
        for seq_len in [1, 2, 3, 5, 100] {
            for num_sequences in [1, 2, 3, 100] {
                let validation = validation(documents, seq_len).unwrap();
                let batches: Vec<Batch> = validation.batches(num_sequences).collect();
                assert!(batches.iter().all(|batch| batch.num_sequences == num_sequences), "batches differ in shape");
                let targets =
                    batches.iter().flat_map(|batch| &batch.targets).copied().filter(|target| *target != IGNORE);
                assert_eq!(targets.collect::<Vec<_>>(), (1..=11).collect::<Vec<_>>());
                assert_eq!(validation.num_targets(), 11);
            }
        }
    }

    #[test]
    fn each_token_is_predicted_from_the_one_before() {
        let batch = validation(&[&[1, 2, 3], &[4]], 2).unwrap().batch(0..3);
        assert_eq!(batch.tokens, [0, 1, 2, 3, 0, 4]);
        assert_eq!(batch.targets, [1, 2, 3, IGNORE, 4, IGNORE]);
        assert_eq!(batch.positions, [0, 1, 0, 1, 0, 1]);
    }

    #[test]
    fn bits_per_byte_of_a_uniform_guess() {
        // 4 tokens among 256 equally likely ones, 8 bits each, for 12 bytes.
        let validation = validation(&[&[1, 2, 3], &[4]], 2).unwrap();
        let bits = validation.bits_per_byte(4.0 * 256f64.ln());
        assert_eq!(validation.num_bytes(), 12);
        assert!((bits - 4.0 * 8.0 / 12.0).abs() < 1e-12, "{bits}");
    }

    #[test]
    fn nothing_to_validate_is_an_error() {
        assert_eq!(validation(&[], 4).unwrap_err(), PackingError::Empty);
    }
}
