//! How widely a token's copies are spread, which is what an exchange costs on links: expected by a plan, or measured.
//!
//! Under uniform choice a token's k experts are drawn without replacement from the experts of its kept groups, and the groups
//! from all. A set of c_1, c_2, .. experts in the groups is missed if no expert of it is drawn: with M candidates of which c are
//! in the set, C(M - c, k) / C(M, k). A rank's or a node's experts are neighbours, so they are at most two parts of groups and
//! some whole ones; how many of them are kept is hypergeometric.

use std::ops::Range;

use super::shares::experts_of;

/// Uniform choice of a token's experts: `top_k` of those of `groups_kept` groups, of `num_groups` equal ones (1: no limit).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Choice {
    /// Experts of a layer.
    pub num_experts: usize,
    /// Experts of a token.
    pub top_k: usize,
    /// Groups of as many experts each.
    pub num_groups: usize,
    /// Groups that a token's experts are in.
    pub groups_kept: usize,
}

/// Where the copies of a token go as a rank sees it, on average over tokens, whichever rank they are of.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// Other ranks of this rank's node that have an expert of a token.
    pub ranks_near: f64,
    /// Other nodes than this rank's that have an expert of a token.
    pub nodes_afar: f64,
    /// Whether this rank has one.
    pub this_rank: f64,
    /// Whether a rank of this node has one.
    pub this_node: f64,
}

impl Spread {
    /// Of uniform choice, for member `me` of a group whose members are on `nodes`, ascending, and have experts as
    /// [`shares`](super::shares) says.
    ///
    /// # Panics
    /// If groups do not divide experts, a token's candidates are fewer than `top_k`, or members are more than experts.
    pub fn expected(choice: Choice, nodes: &[u32], me: usize) -> Self {
        let Choice { num_experts, top_k, num_groups, groups_kept } = choice;
        let (n, group_len) = (nodes.len(), choice.group_len());
        assert!(
            group_len * num_groups == num_experts && n <= num_experts,
            "{num_experts} experts are in {num_groups} equal groups and on {n} ranks"
        );
        assert!(
            (1..=num_groups).contains(&groups_kept) && top_k <= groups_kept * group_len,
            "{groups_kept} of {num_groups} groups of {group_len} have {top_k} experts"
        );
        let first = |member| experts_of(member, n, num_experts).start;
        let hit = |members: Range<usize>| 1.0 - choice.missed(first(members.start), first(members.end));
        let mut spread = Spread { this_rank: hit(me..me + 1), ..Spread::default() };
        let mut start = 0;
        for node in nodes.chunk_by(|a, b| a == b) {
            let members = start..start + node.len();
            start = members.end;
            if members.contains(&me) {
                spread.this_node = hit(members.clone());
                spread.ranks_near = members.filter(|&member| member != me).map(|member| hit(member..member + 1)).sum();
            } else {
                spread.nodes_afar += hit(members);
            }
        }
        spread
    }
}

impl Choice {
    fn group_len(self) -> usize {
        self.num_experts / self.num_groups
    }

    /// Probability that no expert of `start..end` is chosen.
    fn missed(self, start: usize, end: usize) -> f64 {
        let len = self.group_len();
        let overlap = |g: usize| end.min((g + 1) * len).saturating_sub(start.max(g * len));
        let overlaps: Vec<usize> = (start / len..end.div_ceil(len)).map(overlap).collect();
        let whole = overlaps.iter().filter(|&&c| c == len).count();
        let parts: Vec<usize> = overlaps.iter().copied().filter(|&c| c < len).collect();
        let rest = self.num_groups - overlaps.len();
        let all = binomial(self.num_groups, self.groups_kept);
        let mut missed = 0.0;
        // Which of the parts are kept, as bits, and how many of the whole groups.
        for kept_parts in 0..1usize << parts.len() {
            let num_parts = kept_parts.count_ones() as usize;
            let in_parts: usize =
                parts.iter().enumerate().filter(|(i, _)| kept_parts >> i & 1 == 1).map(|(_, c)| c).sum();
            for num_whole in 0..=whole.min(self.groups_kept.saturating_sub(num_parts)) {
                let Some(others) = self.groups_kept.checked_sub(num_parts + num_whole) else { continue };
                let probability = binomial(whole, num_whole) * binomial(rest, others) / all;
                missed += probability * self.missed_of(in_parts + num_whole * len);
            }
        }
        missed
    }

    /// Probability that none of `c` of the candidates is chosen: C(M - c, k) / C(M, k).
    fn missed_of(self, c: usize) -> f64 {
        let candidates = self.groups_kept * self.group_len();
        let factor = |i: usize| candidates.saturating_sub(c + i) as f64 / (candidates - i) as f64;
        (0..self.top_k).map(factor).product()
    }
}

fn binomial(n: usize, k: usize) -> f64 {
    if k > n {
        return 0.0;
    }
    (0..k.min(n - k)).map(|i| (n - i) as f64 / (i + 1) as f64).product()
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use rand::{RngExt as _, SeedableRng};

    use super::*;

    /// Draws without replacement.
    fn draw(rng: &mut impl rand::Rng, from: &mut Vec<usize>, k: usize) -> Vec<usize> {
        (0..k).map(|_| from.swap_remove(rng.random_range(0..from.len()))).collect()
    }

    /// Members to nodes, `per_node` after each other on each.
    fn nodes(n: usize, per_node: usize) -> Vec<u32> {
        (0..n).map(|member| (member / per_node) as u32).collect()
    }

    /// Counted one token at a time.
    fn simulated(choice: Choice, nodes: &[u32], me: usize) -> Spread {
        let Choice { num_experts: e, top_k, num_groups, groups_kept } = choice;
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        let n = nodes.len();
        let member_of: Vec<usize> = (0..n).flat_map(|i| vec![i; (i + 1) * e / n - i * e / n]).collect();
        let mut sum = [0u32; 4];
        for _ in 0..TOKENS {
            let groups = draw(&mut rng, &mut (0..num_groups).collect(), groups_kept);
            let len = e / num_groups;
            let mut candidates = groups.into_iter().flat_map(|g| g * len..(g + 1) * len).collect();
            let to: BTreeSet<usize> =
                draw(&mut rng, &mut candidates, top_k).into_iter().map(|x| member_of[x]).collect();
            let to_nodes: BTreeSet<u32> = to.iter().map(|&member| nodes[member]).collect();
            sum[0] += to.iter().filter(|&&member| member != me && nodes[member] == nodes[me]).count() as u32;
            sum[1] += to_nodes.iter().filter(|&&node| node != nodes[me]).count() as u32;
            sum[2] += u32::from(to.contains(&me));
            sum[3] += u32::from(to_nodes.contains(&nodes[me]));
        }
        let [ranks_near, nodes_afar, this_rank, this_node] = sum.map(|sum| f64::from(sum) / f64::from(TOKENS));
        Spread { ranks_near, nodes_afar, this_rank, this_node }
    }

    const TOKENS: u32 = 100_000;

    #[test]
    fn the_expectation_is_what_a_simulation_counts() {
        for (e, top_k, num_groups, groups_kept, n, per_node) in [
            (64, 6, 1, 1, 8, 4),
            (256, 8, 8, 4, 64, 8), // DeepSeek-V3 with a group to a node
            (256, 8, 8, 4, 32, 8), // two groups to a node
            (256, 8, 8, 3, 16, 1), // half a group to a node
            (160, 6, 8, 3, 4, 2),  // two groups to a rank
            (48, 4, 4, 2, 6, 3),   // ranks across groups
            (48, 4, 12, 3, 6, 4),  // nodes of unequal size
            (8, 2, 1, 1, 1, 1),    // nobody else
            (8, 3, 4, 2, 3, 2),    // two experts, three and three
            (256, 8, 8, 4, 48, 8), // five or six experts
            (8, 2, 4, 2, 5, 5),    // one expert or two
        ] {
            let choice = Choice { num_experts: e, top_k, num_groups, groups_kept };
            let nodes = nodes(n, per_node);
            for me in [0, n / 2, n - 1] {
                let (got, want) = (Spread::expected(choice, &nodes, me), simulated(choice, &nodes, me));
                // Four standard errors of a mean of 1e5 counts whose deviation is below 1.5.
                let close =
                    |of: fn(&Spread) -> f64| (of(&got) - of(&want)).abs() < 4.0 * 1.5 / f64::from(TOKENS).sqrt();
                let fits = close(|s| s.ranks_near)
                    && close(|s| s.nodes_afar)
                    && close(|s| s.this_rank)
                    && close(|s| s.this_node);
                assert!(fits, "{choice:?} on {n} by {per_node}, member {me}: expected {want:?}, found {got:?}");
            }
        }
    }

    #[test]
    fn known_cases_are_exact() {
        // Every group is a node and holds as many experts as are drawn of it: all kept nodes are hit.
        let choice = Choice { num_experts: 8, top_k: 4, num_groups: 4, groups_kept: 2 };
        let all = Spread::expected(choice, &[0, 1, 2, 3], 1);
        assert!((all.nodes_afar - 3.0 * 0.5).abs() < 1e-12 && (all.this_node - 0.5).abs() < 1e-12, "{all:?}");
        let choice = Choice { num_experts: 5, top_k: 1, num_groups: 1, groups_kept: 1 };
        let one = Spread::expected(choice, &[0, 0, 1], 0);
        let want = Spread { ranks_near: 0.4, nodes_afar: 0.4, this_rank: 0.2, this_node: 0.6 };
        let differ = [one.ranks_near - want.ranks_near, one.nodes_afar - want.nodes_afar];
        let differ = [differ, [one.this_rank - want.this_rank, one.this_node - want.this_node]].concat();
        assert!(differ.iter().all(|x| x.abs() < 1e-12), "one, two and two of five: {one:?}");
    }
}
