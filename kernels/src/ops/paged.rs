//! Where the new tokens of several sequences lie in a cache that they share.
//!
//! A cache is rows of tokens, cut into pages of a power of two of rows. A sequence has pages of its own, in any order: position p is
//! row `p % page` of its page `p / page`. A sequence alone in a cache is one with a single page. Source: PagedAttention (arXiv
//! 2309.06180), section 4.1.
//!
//! What is computed for a token follows from its own sequence: the sequences beside it, how its prompt was cut and where its pages
//! lie change no bit on processors.

use std::{ops::Range, sync::Arc};

use crate::{
    error::{Error, Result},
    tensor::Tensor,
};

/// A sequence with tokens in the step at hand.
#[derive(Clone, Debug, PartialEq)]
pub struct Sequence {
    /// New tokens; they follow those of the sequence before in q, k, v and o.
    pub num_new: usize,
    /// Tokens in the cache before them.
    pub context: usize,
    /// Pages, in the order of positions; more than are needed is allowed.
    pub pages: Arc<[u32]>,
}

/// The sequences of a step.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Sequences {
    all: Arc<[Sequence]>,
    shift: u32,
}

/// Rows of a cache by position, for one sequence.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Table<'a> {
    pages: &'a [u32],
    shift: u32,
}

/// Tokens that follow each other in their sequence and in the cache.
pub(crate) struct Run {
    /// Among the new tokens of the step.
    pub tokens: Range<usize>,
    /// Position of the first in its sequence.
    pub position: usize,
    /// Its row in the cache.
    pub row: usize,
}

impl Table<'_> {
    /// Position and row are the same.
    pub const IDENTITY: Table<'static> = Table { pages: &[0], shift: usize::BITS - 1 };

    #[inline(always)]
    pub fn row(self, position: usize) -> usize {
        (self.pages[position >> self.shift] as usize) << self.shift | position & ((1 << self.shift) - 1)
    }
}

impl Sequence {
    /// Tokens in the cache after the step.
    pub fn len(&self) -> usize {
        self.context + self.num_new
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

impl Sequences {
    /// Sequences in a cache with pages of `page` rows.
    ///
    /// # Panics
    /// If `page` is no power of two.
    pub fn new(all: impl Into<Arc<[Sequence]>>, page: usize) -> Self {
        assert!(page.is_power_of_two(), "pages have a power of two of rows, found {page}");
        Sequences { all: all.into(), shift: page.trailing_zeros() }
    }

    /// One sequence, whose position p is row p of a cache of `capacity` rows, with `num_new` tokens after `context`.
    pub fn one(capacity: usize, num_new: usize, context: usize) -> Self {
        Self::new([Sequence { num_new, context, pages: [0].into() }], capacity.max(1).next_power_of_two())
    }

    /// Those that have new tokens, each with its first among all of them.
    pub fn iter(&self) -> impl Iterator<Item = (usize, &Sequence)> {
        let each = self.all.iter().scan(0, |next, sequence| {
            let first = *next;
            *next += sequence.num_new;
            Some((first, sequence))
        });
        each.filter(|(_, sequence)| sequence.num_new > 0)
    }

    /// New tokens of all.
    pub fn num_tokens(&self) -> usize {
        self.all.iter().map(|sequence| sequence.num_new).sum()
    }

    /// Rows of a page.
    pub fn page(&self) -> usize {
        1 << self.shift
    }

    pub(crate) fn table<'a>(&self, sequence: &'a Sequence) -> Table<'a> {
        Table { pages: &sequence.pages, shift: self.shift }
    }

    /// New tokens in runs that are contiguous in the cache.
    pub(crate) fn runs(&self) -> impl Iterator<Item = Run> {
        self.iter().flat_map(move |(first, sequence)| {
            let (context, len) = (sequence.context, sequence.len());
            let starts = std::iter::successors(Some(context), move |at| Some((at / self.page() + 1) * self.page()));
            starts.take_while(move |at| *at < len).map(move |at| {
                let end = ((at / self.page() + 1) * self.page()).min(len);
                let tokens = first + at - context..first + end - context;
                Run { tokens, position: at, row: self.table(sequence).row(at) }
            })
        })
    }

    /// Pages that hold tokens of a sequence.
    pub(crate) fn pages<'a>(&self, sequence: &'a Sequence) -> &'a [u32] {
        &sequence.pages[..sequence.len().div_ceil(self.page())]
    }

    /// The row that all rows of a sequence follow, if its pages do follow each other.
    pub(crate) fn contiguous(&self, sequence: &Sequence) -> Option<usize> {
        let pages = self.pages(sequence);
        let follow = pages.array_windows::<2>().all(|[a, b]| a + 1 == *b);
        follow.then(|| pages.first().map_or(0, |&page| (page as usize) << self.shift))
    }

    /// `Err` unless they have `num_tokens` new tokens, and all of their rows lie in `cache`.
    pub(crate) fn check(&self, op: &'static str, cache: Tensor, num_tokens: usize) -> Result<()> {
        let wrong = |expected| Err(Error::Shape { op, role: "cache", expected, found: cache });
        if self.num_tokens() != num_tokens {
            return wrong(format!("sequences with {num_tokens} new tokens, and not {}", self.num_tokens()));
        }
        for (_, sequence) in self.iter() {
            let (num_new, context, len) = (sequence.num_new, sequence.context, sequence.len());
            let num_pages = len.div_ceil(self.page());
            let rows = || format!("at least {len} rows to hold {num_new} more after {context}");
            if sequence.pages.len() < num_pages {
                return wrong(format!("{}, {num_pages} pages and not {}", rows(), sequence.pages.len()));
            }
            let table = self.table(sequence);
            let last_of_page = |page: usize| ((page + 1) * self.page()).min(len) - 1;
            if (0..num_pages).any(|page| table.row(last_of_page(page)) >= cache.dim(0)) {
                return wrong(rows());
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn positions_are_where_their_pages_are() {
        let sequences = [
            Sequence { num_new: 3, context: 3, pages: [2, 0].into() },
            Sequence { num_new: 1, context: 0, pages: [3].into() },
        ];
        let both = Sequences::new(sequences, 4);
        let runs: Vec<_> = both.runs().map(|run| (run.tokens, run.position, run.row)).collect();
        assert_eq!(runs, [(0..1, 3, 11), (1..3, 4, 0), (3..4, 0, 12)]);
        assert_eq!((both.num_tokens(), both.page()), (4, 4));
        let contiguous: Vec<_> = both.iter().map(|(first, s)| (first, both.contiguous(s))).collect();
        assert_eq!(contiguous, [(0, None), (3, Some(12))]);
        let alone = Sequences::one(5, 2, 3);
        let runs: Vec<_> = alone.runs().map(|run| (run.tokens, run.position, run.row)).collect();
        assert_eq!(runs, [(0..2, 3, 3)]);
        assert_eq!(Table::IDENTITY.row(1 << 40), 1 << 40);
    }
}
