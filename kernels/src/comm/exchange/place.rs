//! Where the members of an exchange and their experts are, and which way a token takes to them.
//!
//! A token goes once to each other node that has an expert of it, to the member that has the same place there as its source, and
//! from that one to the others of the node (DeepEP; DeepSeek-V3 technical report, section 3.2.2). Where a node has fewer members,
//! places are counted round.

use std::ops::Range;

use super::super::shares;

/// Where this rank and its experts are.
pub(in crate::comm) struct Place {
    pub me: usize,
    /// Of all members.
    pub num_experts: usize,
    pub cap: usize,
    /// Of each member; ascending, as members are.
    pub nodes: Vec<u32>,
}

impl Place {
    /// Experts that this rank has.
    pub fn num_local(&self) -> usize {
        self.experts_of(self.me).len()
    }

    pub fn experts_of(&self, member: usize) -> Range<usize> {
        shares::experts_of(member, self.nodes.len(), self.num_experts)
    }

    /// Rows of a source with these offsets that are for these members.
    pub fn rows_for(&self, offsets: &[u32], members: Range<usize>) -> Range<u32> {
        let first = |member| offsets[self.experts_of(member).start];
        first(members.start)..first(members.end)
    }

    /// How many of them are for `member`.
    pub fn rows_to(&self, offsets: &[u32], member: usize) -> usize {
        self.rows_for(offsets, member..member + 1).len()
    }

    /// Rows for this rank's experts, and the most for any member's, of sources with these offsets.
    pub fn load(&self, offsets: &[&[u32]]) -> (u64, u64) {
        let rows = |member| offsets.iter().map(|offsets| self.rows_to(offsets, member) as u64).sum::<u64>();
        (rows(self.me), (0..offsets.len()).map(rows).max().unwrap_or(0))
    }

    /// Where rows of sources with these offsets lie here: where each expert's begin and the last one's end, and the source and the
    /// source's row of each, as [`super::Received`] has them.
    pub fn lay_out(&self, offsets: &[&[u32]]) -> (Vec<u32>, Vec<[u32; 2]>) {
        let (mut begin, mut origin) = (vec![0], Vec::new());
        for expert in self.experts_of(self.me) {
            for (member, offsets) in (0..).zip(offsets) {
                origin.extend((offsets[expert]..offsets[expert + 1]).map(|row| [member, row]));
            }
            begin.push(origin.len() as u32);
        }
        (begin, origin)
    }

    /// Members of this rank's node.
    pub fn here(&self) -> Range<usize> {
        self.node_members(self.nodes[self.me])
    }

    fn node_members(&self, node: u32) -> Range<usize> {
        self.nodes.partition_point(|&other| other < node)..self.nodes.partition_point(|&other| other <= node)
    }

    /// The member of `node` that `source`'s tokens arrive at: the one with the same place in its node.
    fn arrival(&self, source: usize, node: u32) -> usize {
        let place = source - self.node_members(self.nodes[source]).start;
        let members = self.node_members(node);
        members.start + place % members.len()
    }

    /// Members of other nodes whose tokens arrive at this rank.
    pub fn arriving(&self) -> impl Iterator<Item = usize> + '_ {
        let node = self.nodes[self.me];
        (0..self.nodes.len()).filter(move |&i| self.nodes[i] != node && self.arrival(i, node) == self.me)
    }

    /// Which of this rank's rows go to each member by themselves: all that are for it.
    pub fn direct(&self, offsets: &[u32]) -> Vec<Range<u32>> {
        (0..self.nodes.len()).map(|to| self.rows_for(offsets, to..to + 1)).collect()
    }

    /// Which of this rank's rows go to each member by their tokens: in its own node all that are for it; in another, all that are for
    /// the node go to the member that they arrive at, and none to the others.
    pub fn by_node(&self, offsets: &[u32]) -> Vec<Range<u32>> {
        let here = self.here();
        let members = |to: usize| match self.nodes[to] {
            _ if here.contains(&to) => to..to + 1,
            node if self.arrival(self.me, node) == to => self.node_members(node),
            _ => to..to,
        };
        (0..self.nodes.len()).map(|to| self.rows_for(offsets, members(to))).collect()
    }

    /// Copies that this rank makes of tokens that arrived at it from other nodes, for other ranks of its node, where each source has so
    /// many tokens for each member.
    pub fn passed_on(&self, tokens_to: &[&[u64]]) -> u64 {
        let others = |i: usize| self.here().filter(|&j| j != self.me).map(move |j| tokens_to[i][j]);
        self.arriving().flat_map(others).sum()
    }

    /// Of this rank's tokens, given the experts of their `k` slots.
    pub fn copies(&self, indices: &[u32], k: usize) -> Copies {
        let mut copies = Copies { tokens_to: vec![0; self.nodes.len()], to_nodes: 0, to_node_members: 0 };
        let (mut members, mut nodes) = (Vec::with_capacity(k), Vec::with_capacity(k));
        for token in indices.chunks_exact(k.max(1)) {
            members.clear();
            nodes.clear();
            for &expert in token {
                let member = shares::member_of(expert as usize, self.nodes.len(), self.num_experts);
                if !members.contains(&member) {
                    members.push(member);
                    copies.tokens_to[member] += 1;
                    let node = self.nodes[member];
                    if node != self.nodes[self.me] && !nodes.contains(&node) {
                        nodes.push(node);
                        copies.to_nodes += 1;
                    }
                }
            }
        }
        copies.to_node_members = self.here().filter(|&i| i != self.me).map(|i| copies.tokens_to[i]).sum();
        copies
    }
}

/// How often a rank's tokens are sent by it.
pub(in crate::comm) struct Copies {
    /// Tokens that have an expert at each member.
    pub tokens_to: Vec<u64>,
    /// Once to each other node.
    pub to_nodes: u64,
    /// Once to each other member of its node.
    pub to_node_members: u64,
}
