//! The mesh: how ranks are numbered along the three ways of sharing work.
//!
//! A rank holds a part of the layers (pp), a part of each layer's experts (ep), and sees a part of the batch (ep and dp: each
//! combination of the two is a data-parallel rank, so layers without experts are replicated ep x dp times and experts dp
//! times). The expert axis varies fastest, so that an expert-parallel group lies in as few nodes as possible: DeepSeek-V3's
//! 2,048 GPUs are (pp: 16, ep: 64, dp: 2), with a group of 64 in 8 nodes.

use std::sync::Arc;

use serde::{Deserialize, Serialize};

/// Numbers of ranks along each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Mesh {
    /// Pipeline-parallel ranks.
    pub pp: u32,
    /// Expert-parallel ranks.
    pub ep: u32,
    /// Data-parallel copies of the experts.
    pub dp: u32,
    /// Ranks of a node: those that share the fast link.
    pub ranks_per_node: u32,
}

impl Default for Mesh {
    fn default() -> Self {
        Mesh { pp: 1, ep: 1, dp: 1, ranks_per_node: 8 }
    }
}

/// A rank's place on each axis.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Coordinates {
    /// Pipeline-parallel.
    pub pp: u32,
    /// Data-parallel copy of the experts.
    pub dp: u32,
    /// Expert-parallel.
    pub ep: u32,
}

impl Mesh {
    /// Number of ranks.
    pub fn num_ranks(&self) -> u32 {
        self.pp * self.num_data_ranks()
    }

    /// Ranks that see different parts of the batch.
    pub fn num_data_ranks(&self) -> u32 {
        self.ep * self.dp
    }

    /// Number of the rank at `at`.
    pub fn rank(&self, at: Coordinates) -> u32 {
        (at.pp * self.dp + at.dp) * self.ep + at.ep
    }

    /// Where `rank` is.
    pub fn coordinates(&self, rank: u32) -> Coordinates {
        Coordinates { pp: rank / self.num_data_ranks(), dp: rank / self.ep % self.dp, ep: rank % self.ep }
    }

    /// Which part of the batch `rank` sees, below [`Mesh::num_data_ranks`].
    pub fn data_rank(&self, rank: u32) -> u32 {
        rank % self.num_data_ranks()
    }

    /// The rank with the same part of the batch at pipeline position `pp`.
    pub fn at_stage(&self, rank: u32, pp: u32) -> u32 {
        self.rank(Coordinates { pp, ..self.coordinates(rank) })
    }

    /// The ranks among which `rank`'s layers spread their experts, ascending.
    pub fn expert_group(&self, rank: u32) -> Arc<[u32]> {
        let at = self.coordinates(rank);
        (0..self.ep).map(|ep| self.rank(Coordinates { ep, ..at })).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranks_and_coordinates_are_each_others_inverse() {
        let mesh = Mesh { pp: 3, ep: 4, dp: 2, ranks_per_node: 8 };
        assert_eq!((mesh.num_ranks(), mesh.num_data_ranks()), (24, 8));
        for rank in 0..24 {
            assert_eq!(mesh.rank(mesh.coordinates(rank)), rank);
        }
        assert_eq!(mesh.coordinates(13), Coordinates { pp: 1, dp: 1, ep: 1 });
        assert_eq!(mesh.data_rank(13), 5);
        assert_eq!(mesh.at_stage(13, 2), 21);
        assert_eq!(*mesh.expert_group(13), [12, 13, 14, 15]);
    }
}
