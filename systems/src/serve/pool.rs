//! Blocks of the cache: who holds which, and which are still of use to somebody who comes later.
//!
//! A block is as many tokens as a page has. Requests whose texts begin alike hold the same blocks: a full block is found by a hash of
//! its tokens and of all before them. A block that nobody holds keeps what it has until it is needed for something else; the one
//! that was let go first goes first. Source: PagedAttention (arXiv 2309.06180), sections 4.2 to 4.4.

use std::collections::BTreeMap;

use sha2::{Digest as _, Sha256};

/// What a full block holds: its tokens, and all before them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Hash([u8; 16]);

impl Hash {
    /// Of the tokens of a block, after those of `before`.
    pub fn of(before: Option<Hash>, tokens: &[u32]) -> Hash {
        let mut hasher = Sha256::new();
        hasher.update(before.map_or([0; 16], |before| before.0));
        for token in tokens {
            hasher.update(token.to_le_bytes());
        }
        let mut hash = [0; 16];
        hash.copy_from_slice(&hasher.finalize()[..16]);
        Hash(hash)
    }
}

/// A block.
#[derive(Clone, Copy, Debug, Default)]
struct Block {
    num_holders: u32,
    hash: Option<Hash>,
    /// When it was let go; its place among the idle ones.
    idle_since: u64,
}

/// All blocks of a cache.
#[derive(Clone, Debug)]
pub struct Pool {
    page: usize,
    blocks: Vec<Block>,
    by_hash: BTreeMap<Hash, u32>,
    idle: BTreeMap<u64, u32>,
    now: u64,
}

impl Pool {
    /// Blocks of `page` tokens, none of them held.
    pub fn new(num_blocks: usize, page: usize) -> Self {
        let blocks = (0..num_blocks).map(|i| Block { idle_since: i as u64, ..Block::default() }).collect();
        let idle = (0..num_blocks).map(|i| (i as u64, i as u32)).collect();
        Pool { page, blocks, by_hash: BTreeMap::new(), idle, now: num_blocks as u64 }
    }

    /// Tokens of a block.
    pub fn page(&self) -> usize {
        self.page
    }

    /// All blocks.
    pub fn num_blocks(&self) -> usize {
        self.blocks.len()
    }

    /// Blocks that nobody holds.
    pub fn num_free(&self) -> usize {
        self.idle.len()
    }

    /// A block to write to: the one that nobody has held for longest. `None` if all are held.
    pub fn take(&mut self) -> Option<u32> {
        let (_, id) = self.idle.pop_first()?;
        let block = &mut self.blocks[id as usize];
        block.num_holders = 1;
        if let Some(hash) = block.hash.take() {
            self.by_hash.remove(&hash);
        }
        Some(id)
    }

    /// The block with these tokens, held once more.
    pub fn find(&mut self, hash: Hash) -> Option<u32> {
        let id = *self.by_hash.get(&hash)?;
        let block = &mut self.blocks[id as usize];
        if block.num_holders == 0 {
            self.idle.remove(&block.idle_since);
        }
        block.num_holders += 1;
        Some(id)
    }

    /// Says what a full block holds, so that others find it. If another block has the same, that one is found.
    pub fn publish(&mut self, id: u32, hash: Hash) {
        let block = &mut self.blocks[id as usize];
        if block.hash.is_none() && !self.by_hash.contains_key(&hash) {
            block.hash = Some(hash);
            self.by_hash.insert(hash, id);
        }
    }

    /// Lets go of the blocks of a text, given in its order. The last tokens are the first to be forgotten.
    ///
    /// # Panics
    /// If nobody holds one of them.
    pub fn release(&mut self, blocks: impl DoubleEndedIterator<Item = u32>) {
        for id in blocks.rev() {
            let block = &mut self.blocks[id as usize];
            assert!(block.num_holders > 0, "block {id} is held by nobody");
            block.num_holders -= 1;
            if block.num_holders == 0 {
                (block.idle_since, self.now) = (self.now, self.now + 1);
                self.idle.insert(block.idle_since, id);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;

    fn hashes(tokens: &[u32], page: usize) -> Vec<Hash> {
        tokens
            .chunks_exact(page)
            .scan(None, |before, tokens| {
                *before = Some(Hash::of(*before, tokens));
                *before
            })
            .collect()
    }

    #[test]
    fn a_block_is_found_by_its_tokens_and_all_before_them() {
        let mut pool = Pool::new(3, 2);
        let text = hashes(&[1, 2, 3, 4], 2);
        let blocks = [pool.take().unwrap(), pool.take().unwrap()];
        for (block, hash) in blocks.into_iter().zip(&text) {
            pool.publish(block, *hash);
        }
        pool.release(blocks.into_iter());
        assert_eq!(pool.num_free(), 3);
        assert_eq!(pool.find(text[0]), Some(blocks[0]));
        assert_eq!(pool.find(text[0]), Some(blocks[0]));
        // The same tokens after others are another block.
        assert_eq!(pool.find(hashes(&[9, 9, 3, 4], 2)[1]), None);
        assert_eq!(pool.num_free(), 2);
        pool.release([blocks[0]].into_iter());
        assert_eq!(pool.num_free(), 2, "somebody still holds it");
    }

    #[test]
    fn the_end_of_the_oldest_text_is_forgotten_first() {
        let mut pool = Pool::new(4, 1);
        let texts = [hashes(&[1, 2], 1), hashes(&[3, 4], 1)];
        for text in &texts {
            let blocks = [pool.take().unwrap(), pool.take().unwrap()];
            blocks.iter().zip(text).for_each(|(block, hash)| pool.publish(*block, *hash));
            pool.release(blocks.into_iter());
        }
        let taken = pool.take().unwrap();
        assert_eq!(pool.find(texts[0][1]), None);
        assert!(pool.find(texts[0][0]).is_some() && pool.find(texts[1][1]).is_some());
        assert_ne!(pool.take(), Some(taken));
        assert_eq!((pool.take(), pool.num_free()), (None, 0));
    }

    #[test]
    fn two_blocks_may_hold_the_same_and_one_is_found() {
        let mut pool = Pool::new(2, 1);
        let hash = Hash::of(None, &[7]);
        let [a, b] = [pool.take().unwrap(), pool.take().unwrap()];
        pool.publish(a, hash);
        pool.publish(b, hash);
        assert_eq!(pool.find(hash), Some(a));
        pool.release([a, b, a].into_iter());
        assert_eq!(pool.num_free(), 2);
        assert_eq!(pool.take(), Some(b), "which nobody would find");
    }

    #[test]
    #[should_panic(expected = "block 0 is held by nobody")]
    fn a_block_is_given_back_once() {
        let mut pool = Pool::new(1, 1);
        pool.take();
        pool.release([0, 0].into_iter());
    }
}
