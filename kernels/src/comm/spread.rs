//! How widely a token's copies are spread, which is what an exchange costs on links: expected by a plan, or measured.
//!
//! Under uniform choice a token's k experts are drawn without replacement from the experts of its kept groups, and the groups
//! from all. A set of c_1, c_2, .. experts in the groups is missed if no expert of it is drawn: with M candidates of which c are
//! in the set, C(M - c, k) / C(M, k). A rank's or a node's experts are neighbours, so they are at most two parts of groups and
//! some whole ones; how many of them are kept is hypergeometric.

/// Where the copies of a token go, on average over tokens.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct Spread {
    /// Other ranks than the token's that have an expert of it.
    pub ranks_per_token: f64,
    /// Other nodes than the token's that have an expert of it.
    pub nodes_per_token: f64,
}

impl Spread {
    /// Of uniform choice: `top_k` of `num_experts` experts in `num_groups` equal groups (1: no limit) of which `groups_kept` are
    /// kept, over `num_members` ranks, `members_per_node` of them neighbours on a node. Tokens are alike on all ranks.
    ///
    /// # Panics
    /// If the counts do not divide each other, or there are less candidates than `top_k`.
    pub fn expected(
        num_experts: usize,
        top_k: usize,
        num_groups: usize,
        groups_kept: usize,
        num_members: usize,
        members_per_node: usize,
    ) -> Self {
        let group_len = num_experts / num_groups;
        assert!(
            group_len * num_groups == num_experts && num_experts.is_multiple_of(num_members),
            "{num_experts} experts are in {num_groups} equal groups and on {num_members} ranks alike"
        );
        assert!(
            (1..=num_groups).contains(&groups_kept) && top_k <= groups_kept * group_len,
            "{groups_kept} of {num_groups} groups of {group_len} have {top_k} experts"
        );
        let choice = Choice { top_k, num_groups, groups_kept, group_len };
        let per_member = num_experts / num_members;
        let share = 1.0 / num_members as f64;
        let (mut ranks_per_token, mut nodes_per_token) = (0.0, 0.0);
        for member in 0..num_members {
            let hit = 1.0 - choice.missed(member * per_member, (member + 1) * per_member);
            ranks_per_token += hit * (1.0 - share);
        }
        for first in (0..num_members).step_by(members_per_node.max(1)) {
            let end = (first + members_per_node.max(1)).min(num_members);
            let hit = 1.0 - choice.missed(first * per_member, end * per_member);
            nodes_per_token += hit * (1.0 - (end - first) as f64 * share);
        }
        Spread { ranks_per_token, nodes_per_token }
    }
}

#[derive(Clone, Copy)]
struct Choice {
    top_k: usize,
    num_groups: usize,
    groups_kept: usize,
    group_len: usize,
}

impl Choice {
    /// Probability that no expert of `start..end` is chosen.
    fn missed(self, start: usize, end: usize) -> f64 {
        let len = self.group_len;
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
        let candidates = self.groups_kept * self.group_len;
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
    use rand::{RngExt as _, SeedableRng};

    use super::*;

    /// Draws without replacement.
    fn draw(rng: &mut impl rand::Rng, from: &mut Vec<usize>, k: usize) -> Vec<usize> {
        (0..k).map(|_| from.swap_remove(rng.random_range(0..from.len()))).collect()
    }

    fn simulated(e: usize, k: usize, groups: usize, kept: usize, n: usize, per_node: usize) -> Spread {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(5);
        let (mut ranks, mut nodes) = (0, 0);
        const TOKENS: usize = 100_000;
        for token in 0..TOKENS {
            let mine = token % n;
            let groups_of_token = draw(&mut rng, &mut (0..groups).collect(), kept);
            let len = e / groups;
            let mut candidates = groups_of_token.into_iter().flat_map(|g| g * len..(g + 1) * len).collect();
            let members = draw(&mut rng, &mut candidates, k).into_iter().map(|expert| expert * n / e);
            let to: std::collections::BTreeSet<usize> = members.filter(|&m| m != mine).collect();
            ranks += to.len();
            let to_nodes: std::collections::BTreeSet<usize> = to.iter().map(|m| m / per_node).collect();
            nodes += to_nodes.iter().filter(|&&node| node != mine / per_node).count();
        }
        let mean = |sum: usize| sum as f64 / TOKENS as f64;
        Spread { ranks_per_token: mean(ranks), nodes_per_token: mean(nodes) }
    }

    #[test]
    fn the_expectation_is_what_a_simulation_counts() {
        for (e, k, groups, kept, n, per_node) in [
            (64, 6, 1, 1, 8, 4),
            (256, 8, 8, 4, 64, 8), // DeepSeek-V3 with a group to a node
            (256, 8, 8, 4, 32, 8), // two groups to a node
            (256, 8, 8, 3, 16, 1), // half a group to a node
            (160, 6, 8, 3, 4, 2),  // two groups to a rank
            (48, 4, 4, 2, 6, 3),   // ranks across groups
            (48, 4, 12, 3, 6, 4),  // nodes of unequal size
            (8, 2, 1, 1, 1, 1),    // nobody else
        ] {
            let (got, want) =
                (Spread::expected(e, k, groups, kept, n, per_node), simulated(e, k, groups, kept, n, per_node));
            // Four standard errors of a mean of 1e5 counts whose deviation is below 1.5.
            let close = |a: f64, b: f64| (a - b).abs() < 4.0 * 1.5 / 1e5f64.sqrt();
            let fits =
                close(got.ranks_per_token, want.ranks_per_token) && close(got.nodes_per_token, want.nodes_per_token);
            assert!(fits, "{:?}: expected {want:?}, found {got:?}", (e, k, groups, kept, n, per_node));
        }
    }

    #[test]
    fn known_cases_are_exact() {
        // Every group is a node and holds as many experts as are drawn of it: all kept nodes are hit.
        let all = Spread::expected(8, 4, 4, 2, 4, 1);
        assert!((all.nodes_per_token - 2.0 * 0.75).abs() < 1e-12, "{all:?}");
        let one = Spread::expected(4, 1, 1, 1, 4, 2);
        assert!((one.ranks_per_token - 0.75).abs() < 1e-12 && (one.nodes_per_token - 0.5).abs() < 1e-12, "{one:?}");
    }
}
