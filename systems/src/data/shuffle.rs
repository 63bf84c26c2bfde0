//! The order of rows in an epoch: a permutation that is a pure function of seed and epoch. The Fisher-Yates loop is written out
//! here, on ChaCha words, so that an update of a library can never change what an old checkpoint resumes to.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// A permutation of `0..num_rows`.
#[derive(Clone, Debug)]
pub struct Order {
    rows: Vec<u32>,
}

impl Order {
    /// The order of `num_rows` (below 2^32) rows in `epoch`.
    pub fn new(seed: u64, epoch: u64, num_rows: u32) -> Order {
        let mut key = *b"................hadal row order.";
        key[..8].copy_from_slice(&seed.to_le_bytes());
        key[8..16].copy_from_slice(&epoch.to_le_bytes());
        let mut rng = ChaCha8Rng::from_seed(key);
        let mut rows: Vec<u32> = (0..num_rows).collect();
        for last in (1..num_rows).rev() {
            rows.swap(last as usize, below(&mut rng, last + 1) as usize);
        }
        Order { rows }
    }

    /// The row at `index`.
    pub fn row(&self, index: u64) -> u64 {
        u64::from(self.rows[index as usize])
    }
}

/// A uniform number below `bound` (above 0), without bias: the high half of a product, drawn again where it would favour some
/// numbers (Lemire, "Fast Random Integer Generation in an Interval", 2019).
fn below(rng: &mut ChaCha8Rng, bound: u32) -> u32 {
    let threshold = bound.wrapping_neg() % bound;
    loop {
        let product = u64::from(rng.next_u32()) * u64::from(bound);
        if product as u32 >= threshold {
            return (product >> 32) as u32;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(seed: u64, epoch: u64, num_rows: u32) -> Vec<u64> {
        let order = Order::new(seed, epoch, num_rows);
        (0..u64::from(num_rows)).map(|index| order.row(index)).collect()
    }

    #[test]
    fn every_row_comes_once() {
        for num_rows in [0, 1, 2, 3, 100, 1000] {
            let mut sorted = rows(1, 2, num_rows);
            sorted.sort_unstable();
            assert_eq!(sorted, (0..u64::from(num_rows)).collect::<Vec<_>>());
        }
    }

    #[test]
    fn seed_and_epoch_alone_decide() {
        assert_eq!(rows(1, 2, 100), rows(1, 2, 100));
        let mut seen = vec![(0..100).collect::<Vec<u64>>()];
        for (seed, epoch) in [(0, 0), (0, 1), (1, 0), (1, 1), (u64::MAX, 0), (0, u64::MAX)] {
            let order = rows(seed, epoch, 100);
            assert!(!seen.contains(&order), "seed {seed}, epoch {epoch} repeats an order");
            seen.push(order);
        }
    }

    #[test]
    fn the_order_never_changes_between_versions() {
        // From a separate implementation of ChaCha8 and of the loop.
        assert_eq!(rows(42, 0, 12), [1, 10, 0, 11, 8, 7, 3, 2, 4, 5, 9, 6]);
    }

    #[test]
    fn all_permutations_are_equally_likely() {
        let mut counts = std::collections::BTreeMap::new();
        for seed in 0..24_000 {
            *counts.entry(rows(seed, 0, 4)).or_insert(0) += 1;
        }
        assert_eq!(counts.len(), 24);
        // 1000 expected, standard deviation 31.
        assert!(counts.values().all(|count| (850..1150).contains(count)), "{counts:?}");
    }
}
