//! Which member of a group has which experts of a layer: the one rule that exchanges, layouts, plans and placements go by.
//!
//! Member i of n has experts `i e/n..(i + 1) e/n` of e, in whole numbers: in order, and as even as can be. Where n does not divide
//! e, some have one expert more than others, and the last always does. No member is without any as long as n is at most e.

use std::ops::Range;

/// The experts of `num_experts` that `member` of `num_members` has.
pub fn experts_of(member: usize, num_members: usize, num_experts: usize) -> Range<usize> {
    member * num_experts / num_members..(member + 1) * num_experts / num_members
}

/// The member that has `expert`: the last whose experts begin at it or before.
pub fn member_of(expert: usize, num_members: usize, num_experts: usize) -> usize {
    ((expert + 1) * num_members - 1) / num_experts
}

/// The first of the members that have most experts.
pub fn fullest(num_members: usize, num_experts: usize) -> usize {
    let most = num_experts.div_ceil(num_members);
    let has_most = |&member: &usize| experts_of(member, num_members, num_experts).len() == most;
    (0..num_members).find(has_most).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_expert_has_one_member_and_members_are_as_even_as_can_be() {
        for e in 1..=40 {
            for n in 1..=e {
                let mut next = 0;
                for member in 0..n {
                    let range = experts_of(member, n, e);
                    assert_eq!(range.start, next, "member {member} of {n}, {e} experts");
                    assert!((e / n..=e.div_ceil(n)).contains(&range.len()), "member {member} of {n}, {e} experts");
                    assert!(range.clone().all(|expert| member_of(expert, n, e) == member), "{range:?} of {member}");
                    next = range.end;
                }
                assert_eq!(next, e);
                assert_eq!(experts_of(n - 1, n, e).len(), e.div_ceil(n), "the last of {n} has most of {e}");
                let fullest = fullest(n, e);
                assert_eq!(experts_of(fullest, n, e).len(), e.div_ceil(n));
                assert!((0..fullest).all(|member| experts_of(member, n, e).len() < e.div_ceil(n)));
            }
        }
    }

    #[test]
    fn eight_experts_on_three_and_on_five() {
        assert_eq!([0, 1, 2].map(|member| experts_of(member, 3, 8)), [0..2, 2..5, 5..8]);
        assert_eq!([0, 1, 2, 3, 4].map(|member| experts_of(member, 5, 8)), [0..1, 1..3, 3..4, 4..6, 6..8]);
    }
}
