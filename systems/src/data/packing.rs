//! Packing: a corpus as rows of a fixed length, and rows as batches.
//!
//! The stream is `E D0 E D1 E ... E`, where `E` is the end-of-text token and `Di` the tokens of document i. The input of a
//! position is its token, the target the next one, so each document sees `E` in front of it (its first token is predicted
//! from that alone) and learns to end with `E`; every token of every document is a target exactly once. Row r holds the
//! positions from `r * seq_len`; a document that does not fit goes on in the next row as a new chunk: it starts with its last
//! token of the row before, at position 0, and sees nothing else of that row. The end of the last row is padding.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::corpus::Corpus;

/// The target of a position that has none: padding, or beyond the document. The loss skips it.
pub const IGNORE: u32 = u32::MAX;

/// How documents become rows.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Packing {
    /// Positions of a row.
    pub seq_len: usize,
    /// Id of the end-of-text token that separates documents.
    pub end_of_text: u32,
    /// Depths of multi-token prediction: targets are also given for 1 to this many tokens further on.
    pub num_mtp: usize,
    /// Whether a row is one span of attention, its documents visible to each other and its positions running through.
    pub cross_document_attention: bool,
    /// Whether a document that with its end-of-text token is longer than a row is an error instead of going on in the next row.
    pub refuse_long_documents: bool,
    /// Whether the `E` after a document is a target. Training learns from it; validation counts the text's own tokens only.
    pub end_targets: bool,
}

/// Why a corpus could not be packed.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum PackingError {
    /// Rows without positions.
    #[error("expected a sequence length of at least 1, found 0")]
    NoPositions,
    /// Nothing to pack.
    #[error("the corpus has no tokens to pack into rows")]
    Empty,
    /// A document longer than a row, where that is refused.
    #[error(
        "document {document} has {tokens} tokens and an end-of-text token, more than the sequence length {seq_len}; raise the sequence length or let long documents go on in the next row"
    )]
    LongDocument {
        /// Index of the document in the corpus.
        document: usize,
        /// Its tokens.
        tokens: u64,
        /// Positions of a row.
        seq_len: usize,
    },
}

/// A corpus cut into rows. Row contents depend on the corpus and the packing alone, never on seeds, ranks or batch sizes.
#[derive(Clone, Debug)]
pub struct Rows {
    corpus: Corpus,
    packing: Packing,
    /// Index in the stream of the `E` in front of each document, and of the one after the last document.
    starts: Vec<u64>,
}

/// Rows ready for a model: `n` sequences of `s` positions, flattened row-major.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Batch {
    /// n.
    pub num_sequences: usize,
    /// s.
    pub seq_len: usize,
    /// Input token ids, [n * s]. Padding holds the end-of-text token.
    pub tokens: Vec<u32>,
    /// The next token of each position or [`IGNORE`], [n * s].
    pub targets: Vec<u32>,
    /// Position within the document chunk (within the row under cross-document attention), from 0, [n * s].
    pub positions: Vec<u32>,
    /// Where attention spans start in the n * s flattened positions, ascending, and n * s at the end. Every row starts one;
    /// so does every document unless attention crosses documents; so does padding.
    pub doc_offsets: Vec<u32>,
    mtp: Vec<Vec<u32>>,
    end_of_text: u32,
}

impl Batch {
    /// Rows of `seq_len` given tokens, each a document of its own: every token predicts the next one of its row.
    pub fn of_rows(tokens: Vec<u32>, seq_len: usize) -> Batch {
        let (t, s) = (tokens.len(), seq_len);
        let target = |i: usize| if (i + 1).is_multiple_of(s) { IGNORE } else { tokens[i + 1] };
        Batch {
            num_sequences: t / s,
            seq_len,
            targets: (0..t).map(target).collect(),
            positions: (0..t).map(|i| (i % s) as u32).collect(),
            doc_offsets: (0..=t).step_by(s).map(|i| i as u32).collect(),
            tokens,
            mtp: Vec::new(),
            end_of_text: 0,
        }
    }

    /// Number of multi-token-prediction depths.
    pub fn num_mtp(&self) -> usize {
        self.mtp.len()
    }

    /// Targets of multi-token-prediction depth `depth`, [n * s]: the token `depth + 1` places after each position, or
    /// [`IGNORE`] beyond its document. It may lie in the next row: the stream is read past the row. Depth 0 is
    /// [`Batch::targets`]; panics for depths that the packing did not ask for.
    pub fn mtp_targets(&self, depth: usize) -> &[u32] {
        if depth == 0 { &self.targets } else { &self.mtp[depth - 1] }
    }

    /// Input tokens of depth `depth` (from 1), [n * s]: the token `depth` places after each position. Where that lies beyond
    /// the document the end-of-text token stands in; the depth's target is [`IGNORE`] there.
    pub fn mtp_inputs(&self, depth: usize) -> Vec<u32> {
        let input = |target: &u32| {
            if *target == IGNORE { self.end_of_text } else { *target }
        };
        self.mtp_targets(depth - 1).iter().map(input).collect()
    }

    /// Number of targets that count.
    pub fn num_targets(&self) -> usize {
        self.targets.iter().filter(|target| **target != IGNORE).count()
    }
}

impl Rows {
    /// Cuts `corpus` into rows.
    ///
    /// # Errors
    /// See [`PackingError`].
    pub fn new(corpus: Corpus, packing: Packing) -> Result<Rows, PackingError> {
        if packing.seq_len == 0 {
            return Err(PackingError::NoPositions);
        }
        let mut starts = vec![0];
        let mut end = 0;
        for document in 0..corpus.num_documents() {
            let tokens = corpus.document_tokens(document);
            if packing.refuse_long_documents && tokens >= packing.seq_len as u64 {
                return Err(PackingError::LongDocument { document, tokens, seq_len: packing.seq_len });
            }
            end += 1 + tokens;
            starts.push(end);
        }
        if end == starts.len() as u64 - 1 {
            return Err(PackingError::Empty);
        }
        Ok(Rows { corpus, packing, starts })
    }

    /// How the rows were made.
    pub fn packing(&self) -> &Packing {
        &self.packing
    }

    /// The packed corpus.
    pub fn corpus(&self) -> &Corpus {
        &self.corpus
    }

    /// Positions of all rows that are not padding.
    pub fn num_positions(&self) -> u64 {
        self.starts[self.starts.len() - 1]
    }

    /// Number of rows, the padded last one included.
    pub fn num_rows(&self) -> u64 {
        self.num_positions().div_ceil(self.packing.seq_len as u64)
    }

    /// The given rows as a batch; rows from [`Rows::num_rows`] on are all padding. Panics if the batch has 2^32 positions.
    pub fn batch(&self, rows: impl IntoIterator<Item = u64>) -> Batch {
        let Packing { seq_len, end_of_text, num_mtp, .. } = self.packing;
        let mut batch = Batch { seq_len, end_of_text, mtp: vec![Vec::new(); num_mtp], ..Batch::default() };
        let mut window = Vec::new();
        for row in rows {
            batch.num_sequences += 1;
            assert!(u32::try_from(batch.num_sequences * seq_len).is_ok(), "a batch has at most 2^32 - 1 positions");
            self.push_row(row, &mut window, &mut batch);
        }
        batch.doc_offsets.push(batch.tokens.len() as u32);
        batch
    }

    fn push_row(&self, row: u64, window: &mut Vec<u32>, batch: &mut Batch) {
        let Packing { seq_len, end_of_text, num_mtp, cross_document_attention, .. } = self.packing;
        let row_len = seq_len as u64;
        let begin = row.saturating_mul(row_len).min(self.num_positions());
        let end = (begin + row_len).min(self.num_positions());
        self.read_stream(begin, end + 1 + num_mtp as u64, window);
        let mut chunk_begin = begin;
        while chunk_begin < end {
            let document = self.starts.partition_point(|start| *start <= chunk_begin) - 1;
            let chunk_end = if cross_document_attention { end } else { end.min(self.starts[document + 1]) };
            let last_target = if cross_document_attention { self.num_positions() } else { self.starts[document + 1] };
            batch.doc_offsets.push(batch.tokens.len() as u32);
            batch.positions.extend(0..(chunk_end - chunk_begin) as u32);
            batch.tokens.extend_from_slice(&window[(chunk_begin - begin) as usize..(chunk_end - begin) as usize]);
            for depth in 0..=num_mtp {
                let targets = if depth == 0 { &mut batch.targets } else { &mut batch.mtp[depth - 1] };
                targets.extend((chunk_begin..chunk_end).map(|position| {
                    let at = position + 1 + depth as u64;
                    let counts =
                        at <= last_target && (self.packing.end_targets || self.starts.binary_search(&at).is_err());
                    if counts { window[(at - begin) as usize] } else { IGNORE }
                }));
            }
            chunk_begin = chunk_end;
        }
        let num_padding = (row_len - (end - begin)) as usize;
        if num_padding > 0 {
            batch.doc_offsets.push(batch.tokens.len() as u32);
            batch.positions.extend(0..num_padding as u32);
            for (ids, id) in [(&mut batch.tokens, end_of_text), (&mut batch.targets, IGNORE)] {
                ids.resize(ids.len() + num_padding, id);
            }
            for targets in &mut batch.mtp {
                targets.resize(targets.len() + num_padding, IGNORE);
            }
        }
    }

    /// The stream's tokens from `begin` to `end`, or to the `E` after the last document.
    fn read_stream(&self, begin: u64, end: u64, window: &mut Vec<u32>) {
        window.clear();
        let end = end.min(self.num_positions() + 1);
        let mut document = self.starts.partition_point(|start| *start <= begin) - 1;
        let mut at = begin;
        while at < end {
            if at == self.starts[document] {
                window.push(self.packing.end_of_text);
                at += 1;
                continue;
            }
            let stop = end.min(self.starts[document + 1]);
            let first = self.starts[document] + 1;
            self.corpus.read(document, at - first..stop - first, window);
            at = stop;
            document += 1;
        }
    }
}

#[cfg(test)]
mod tests;
