//! The training loader: an endless sequence of samples, and the cursor that says where a run is in it. Sample g is row
//! `order(seed, epoch)[index]` with epoch = g / rows, index = g % rows: nothing else, so a run resumes at any sample on any
//! number of ranks with any batch size.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use super::packing::{Batch, Rows};
use super::shuffle::Order;

/// Where a run is in its data, with what it needs to notice that the data changed. Part of a checkpoint.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cursor {
    /// Epoch of the next sample, from 0.
    pub epoch: u64,
    /// Index of the next sample in its epoch, from 0: global over all ranks.
    pub sample: u64,
    /// Seed of the row order.
    pub seed: u64,
    /// Rows of an epoch.
    pub num_rows: u64,
    /// Positions of a row.
    pub seq_len: u64,
    /// [`Corpus::digest`](super::corpus::Corpus::digest) of the corpus.
    pub corpus: String,
}

/// Why a loader could not be made or moved.
#[derive(Clone, Debug, PartialEq, Eq, Error)]
#[non_exhaustive]
pub enum CursorError {
    /// The checkpoint's data is not this data.
    #[error(
        "the data cursor was saved with {field} = {saved}, but this run has {field} = {found}; resume with the same data, or start a new run from the weights"
    )]
    Changed {
        /// The field of [`Cursor`] that differs.
        field: &'static str,
        /// Its value in the cursor.
        saved: String,
        /// Its value in the loader.
        found: String,
    },
    /// The cursor points past its epoch.
    #[error("the data cursor is at sample {sample} of an epoch of {num_rows} samples; the checkpoint is damaged")]
    OutOfRange {
        /// The cursor's sample.
        sample: u64,
        /// Samples of an epoch.
        num_rows: u64,
    },
    /// Row indices are 32 bits.
    #[error("the corpus has {0} rows, at most 4294967295 can be shuffled; raise the sequence length")]
    TooManyRows(u64),
}

/// Draws batches from shuffled rows, epoch after epoch.
#[derive(Clone, Debug)]
pub struct Loader {
    rows: Rows,
    seed: u64,
    next: u64,
    order: (u64, Order),
}

impl Loader {
    /// A loader at the first sample.
    ///
    /// # Errors
    /// [`CursorError::TooManyRows`].
    pub fn new(rows: Rows, seed: u64) -> Result<Loader, CursorError> {
        let num_rows = rows.num_rows();
        let order = Order::new(seed, 0, u32::try_from(num_rows).map_err(|_| CursorError::TooManyRows(num_rows))?);
        Ok(Loader { rows, seed, next: 0, order: (0, order) })
    }

    /// The rows drawn from.
    pub fn rows(&self) -> &Rows {
        &self.rows
    }

    /// Samples that were drawn.
    pub fn num_drawn(&self) -> u64 {
        self.next
    }

    /// Where the loader is.
    pub fn cursor(&self) -> Cursor {
        self.cursor_after(self.next)
    }

    /// Where it is after so many samples.
    pub fn cursor_after(&self, num_drawn: u64) -> Cursor {
        let num_rows = self.rows.num_rows();
        Cursor {
            epoch: num_drawn / num_rows,
            sample: num_drawn % num_rows,
            seed: self.seed,
            num_rows,
            seq_len: self.rows.packing().seq_len as u64,
            corpus: self.rows.corpus().digest(),
        }
    }

    /// Goes to where `cursor` was taken.
    ///
    /// # Errors
    /// A cursor of other data, another sequence length or another seed; a damaged one.
    pub fn seek(&mut self, cursor: &Cursor) -> Result<(), CursorError> {
        let here = self.cursor();
        for (field, saved, found) in [
            ("seed", cursor.seed.to_string(), here.seed.to_string()),
            ("seq_len", cursor.seq_len.to_string(), here.seq_len.to_string()),
            ("corpus", cursor.corpus.clone(), here.corpus),
            ("num_rows", cursor.num_rows.to_string(), here.num_rows.to_string()),
        ] {
            if saved != found {
                return Err(CursorError::Changed { field, saved, found });
            }
        }
        let out_of_range = CursorError::OutOfRange { sample: cursor.sample, num_rows: here.num_rows };
        if cursor.sample >= here.num_rows {
            return Err(out_of_range);
        }
        let begin = cursor.epoch.checked_mul(here.num_rows).and_then(|begin| begin.checked_add(cursor.sample));
        self.next = begin.ok_or(out_of_range)?;
        Ok(())
    }

    /// The next `num_sequences` samples.
    pub fn next_batch(&mut self, num_sequences: usize) -> Batch {
        let begin = self.next;
        self.next += num_sequences as u64;
        self.batch_at(begin, num_sequences)
    }

    /// Leaves out `num_sequences` samples: those that other ranks draw.
    pub fn skip(&mut self, num_sequences: usize) {
        self.next += num_sequences as u64;
    }

    /// Samples `begin..begin + num_sequences`, counted over all epochs; the cursor stays. An epoch's last batch goes on into
    /// the next epoch.
    pub fn batch_at(&mut self, begin: u64, num_sequences: usize) -> Batch {
        let rows: Vec<u64> = (begin..begin + num_sequences as u64).map(|sample| self.row_of(sample)).collect();
        self.rows.batch(rows)
    }

    fn row_of(&mut self, sample: u64) -> u64 {
        let num_rows = self.rows.num_rows();
        let epoch = sample / num_rows;
        if self.order.0 != epoch {
            self.order = (epoch, Order::new(self.seed, epoch, num_rows as u32));
        }
        self.order.1.row(sample % num_rows)
    }
}

#[cfg(test)]
mod tests;
