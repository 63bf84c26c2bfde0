//! What members of an exchange put down, and what of it goes to another process.
//!
//! Beside rows, which are the payload, a part has: of a source, 4 (e + 1) + 8 n bytes of counts, and 4 for each row that is for its
//! member, or its node, which say whose token it is; of what is passed on, 4 for each row; of rows that return, 4 for each, which
//! say where it belongs; and of each source some 40 to 70 of lengths. Each meeting has an envelope of 256 bytes for each member.

use std::{ops::Range, sync::Arc};

use crate::{
    comm::{
        pack::{Brought, Packed, take},
        wire::{Rows, Wire},
    },
    dtype::Float,
};

/// A source's rows in expert order from `first_row` on, one by one or as the tokens that they are of.
pub(super) struct Tokens<T> {
    pub rows: Rows<T>,
    /// Empty where there is a row for each.
    pub token_of_row: Vec<u32>,
    /// The first row that is here.
    pub first_row: u32,
    pub d: usize,
}

impl<T: Float> Tokens<T> {
    /// Assigns `out` the source's row `row`, which is here.
    #[inline(always)]
    pub fn decode(&self, row: u32, out: &mut [T]) {
        let row = (row - self.first_row) as usize;
        let row = if self.token_of_row.is_empty() { row } else { self.token_of_row[row] as usize };
        self.rows.decode(row, out);
    }

    /// Appends these rows of the source; each token that they are of once.
    fn pack(&self, rows: Range<u32>, to: &mut Packed) {
        let here = (rows.start - self.first_row) as usize..(rows.end - self.first_row) as usize;
        let (tokens, token_of_row) = match self.token_of_row.get(here.clone()) {
            None => (here.map(|row| row as u32).collect(), Vec::new()),
            Some(of_row) => once(of_row),
        };
        to.put(&[rows.start, self.d as u32, self.rows.wire() as u32]);
        to.put(&token_of_row);
        self.rows.pack(&tokens, self.d, to);
    }

    fn take(bytes: &mut &[u8]) -> Option<Self> {
        let [first_row, d, wire] = take::<u32>(bytes)?.try_into().ok()?;
        let token_of_row = take(bytes)?;
        Some(Tokens { rows: Rows::take(Wire::of(wire)?, bytes)?, token_of_row, first_row, d: d as usize })
    }
}

/// Each token of these rows once, ascending, and the place of each row's token among them.
pub(in crate::comm) fn once(token_of_row: &[u32]) -> (Vec<u32>, Vec<u32>) {
    let mut tokens = token_of_row.to_vec();
    tokens.sort_unstable();
    tokens.dedup();
    let place = |token| tokens.partition_point(|&other| other < token) as u32;
    let places = token_of_row.iter().map(|&token| place(token)).collect();
    (tokens, places)
}

/// What a source puts down.
pub(super) struct Sent<T> {
    pub tokens: Arc<Tokens<T>>,
    pub offsets: Vec<u32>,
    /// Tokens that have an expert at each member; none where rows are sent one by one.
    pub tokens_to: Vec<u64>,
    /// Which rows go to each member; a source's own business.
    pub parts: Vec<Range<u32>>,
}

impl<T: Float> Brought for Sent<T> {
    fn pack(&self, member: usize, _: usize) -> Packed {
        let mut packed = Packed::default();
        packed.put(&self.offsets);
        packed.put(&self.tokens_to);
        self.tokens.pack(self.parts[member].clone(), &mut packed);
        packed
    }

    fn unpack(mut bytes: &[u8]) -> Option<Self> {
        Some(Sent {
            offsets: take(&mut bytes)?,
            tokens_to: take(&mut bytes)?,
            tokens: Arc::new(Tokens::take(&mut bytes)?),
            parts: Vec::new(),
        })
    }
}

/// Of a source of another node: what arrived at a member, and which rows are for each of the node's.
pub(super) struct Arrived<T> {
    pub source: usize,
    pub tokens: Arc<Tokens<T>>,
    pub parts: Vec<Range<u32>>,
}

/// What a member passes on inside of its node.
pub(super) struct Passed<T>(pub Vec<Arrived<T>>);

impl<T: Float> Brought for Passed<T> {
    fn pack(&self, member: usize, _: usize) -> Packed {
        let mut packed = Packed::default();
        packed.put(&self.0.iter().map(|arrived| arrived.source as u32).collect::<Vec<_>>());
        self.0.iter().for_each(|arrived| arrived.tokens.pack(arrived.parts[member].clone(), &mut packed));
        packed
    }

    fn unpack(mut bytes: &[u8]) -> Option<Self> {
        let sources: Vec<u32> = take(&mut bytes)?;
        let arrived = sources.into_iter().map(|source| {
            let tokens = Arc::new(Tokens::take(&mut bytes)?);
            Some(Arrived { source: source as usize, tokens, parts: Vec::new() })
        });
        arrived.collect::<Option<_>>().map(Passed)
    }
}

/// What a rank with experts puts down.
pub(super) struct Returned<T> {
    pub rows: Rows<T>,
    /// By source member: row in its expert order, and row here.
    pub places: Vec<Vec<(u32, u32)>>,
    pub num_rows: u64,
    pub d: usize,
}

/// A process gets its own rows back.
impl<T: Float> Brought for Returned<T> {
    fn pack(&self, member: usize, num_members: usize) -> Packed {
        let (places, rows): (Vec<u32>, Vec<u32>) = self.places[member].iter().copied().unzip();
        let mut packed = Packed::default();
        packed.put(&[member as u64, num_members as u64, self.num_rows, self.d as u64, self.rows.wire() as u64]);
        packed.put(&places);
        self.rows.pack(&rows, self.d, &mut packed);
        packed
    }

    fn unpack(mut bytes: &[u8]) -> Option<Self> {
        let [member, num_members, num_rows, d, wire] = take::<u64>(&mut bytes)?.try_into().ok()?;
        let mut places = vec![Vec::new(); num_members as usize];
        *places.get_mut(member as usize)? = take(&mut bytes)?.into_iter().zip(0..).collect();
        Some(Returned { places, num_rows, d: d as usize, rows: Rows::take(Wire::of(wire as u32)?, &mut bytes)? })
    }
}
