//! Which experts a token goes to: a group limit, and rounds of the largest corrected score. See the module above for the encoding.

use super::{BLOCK, Experts};
use crate::{
    ops::gate::{GroupScore, Groups},
    ptx,
    ptx::{
        asm::{Assembler, B32, F32, Pred, Reg},
        parts::{self, special},
    },
};

/// A warp's part of shared memory.
pub(super) struct Choice {
    lane: Reg<B32>,
    groups: Option<Groups>,
    e: usize,
    /// Scores [e]; then, under a group limit, corrected scores (padded), scores of groups, and whether they are kept.
    base: Reg<B32>,
}

/// Word of expert `e` among corrected scores.
fn padded(e: usize) -> usize {
    e + e / 32 * 4
}

impl Choice {
    pub(super) fn new(k: &mut Assembler, lane: Reg<B32>, e: usize, groups: Option<Groups>) -> Self {
        let words = e + groups.map_or(0, |g| padded(e) + 2 * g.num);
        let shared = k.shared(16, "tokens", 4 * words * (BLOCK / 32) as usize);
        let (base, tid, warp) = (special(k, &shared), special(k, "%tid.x"), k.reg::<B32>());
        ptx!(k, "shr.u32 {warp}, {tid}, 5;");
        ptx!(k, "mad.lo.u32 {base}, {warp}, {}, {base};", 4 * words);
        Choice { lane, groups, e, base }
    }

    fn corrected_at(&self) -> usize {
        4 * self.e
    }

    fn group_scores_at(&self) -> usize {
        4 * (self.e + padded(self.e))
    }

    fn kept_at(&self) -> usize {
        self.group_scores_at() + 4 * self.groups.map_or(0, |g| g.num)
    }

    pub(super) fn share_scores(&self, k: &mut Assembler, experts: &Experts, s: &[Reg<F32>]) {
        let at = self.lane_at(k);
        for (i, s) in s.iter().enumerate() {
            ptx!(k, "{}st.shared.f32 [{at}+{}], {s};", experts.guard(i), 128 * i);
        }
        // A group limit has barriers of its own before scores are read.
        if self.groups.is_none() {
            ptx!(k, "bar.warp.sync 0xffffffff;");
        }
    }

    fn lane_at(&self, k: &mut Assembler) -> Reg<B32> {
        let at = k.reg::<B32>();
        ptx!(k, "mad.lo.u32 {at}, {}, 4, {};", self.lane, self.base);
        at
    }

    /// The score of an expert below e; anything is one for lanes without a slot.
    pub(super) fn score_of(&self, k: &mut Assembler, expert: Reg<B32>) -> Reg<F32> {
        let (at, s) = (k.reg::<B32>(), k.reg::<F32>());
        ptx!(k, "mad.lo.u32 {at}, {expert}, 4, {};", self.base);
        ptx!(k, "ld.shared.f32 {s}, [{at}];");
        s
    }

    /// The `num` best experts: slot j in lane j % 32 of register j / 32. Lanes without a slot hold 0.
    pub(super) fn choose(
        &self,
        k: &mut Assembler,
        experts: &Experts,
        corrected: &[Reg<F32>],
        num: usize,
    ) -> Vec<Reg<B32>> {
        let allowed = self.groups.map(|groups| self.allowed(k, groups, experts, corrected));
        let words: Vec<Reg<B32>> = corrected
            .iter()
            .enumerate()
            .map(|(i, c)| {
                let (bits, flip) = (k.reg::<B32>(), k.reg::<B32>());
                ptx!(k, "mov.b32 {bits}, {c};");
                ptx!(k, "shr.s32 {flip}, {bits}, 31;");
                ptx!(k, "or.b32 {flip}, {flip}, 0x80000000;");
                ptx!(k, "xor.b32 {bits}, {bits}, {flip};");
                if let Some(allowed) = &allowed {
                    ptx!(k, "selp.u32 {bits}, {bits}, 0, {};", allowed[i]);
                }
                if let Some(live) = experts.live[i] {
                    ptx!(k, "selp.u32 {bits}, {bits}, 0, {live};");
                }
                bits
            })
            .collect();
        let chosen: Vec<Reg<B32>> = (0..num.div_ceil(32)).map(|_| special(k, "0")).collect();
        for j in 0..num {
            let (best, index, more) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<Pred>());
            ptx!(k, "mov.u32 {best}, {};", words[0]);
            ptx!(k, "mov.u32 {index}, {};", self.lane);
            for (i, word) in words.iter().enumerate().skip(1) {
                ptx!(k, "setp.gt.u32 {more}, {word}, {best};");
                ptx!(k, "@{more} mov.u32 {best}, {word};");
                ptx!(k, "@{more} add.u32 {index}, {}, {};", self.lane, 32 * i);
            }
            let (top, here) = (k.reg::<B32>(), k.reg::<Pred>());
            ptx!(k, "redux.sync.max.u32 {top}, {best}, 0xffffffff;");
            ptx!(k, "setp.eq.u32 {here}, {best}, {top};");
            ptx!(k, "selp.u32 {index}, {index}, 0xffffffff, {here};");
            ptx!(k, "redux.sync.min.u32 {index}, {index}, 0xffffffff;");
            ptx!(k, "setp.eq.u32 {here}, {}, {};", self.lane, j % 32);
            ptx!(k, "@{here} mov.u32 {}, {index};", chosen[j / 32]);
            ptx!(k, "sub.u32 {index}, {index}, {};", self.lane);
            for (i, word) in words.iter().enumerate() {
                ptx!(k, "setp.eq.u32 {here}, {index}, {};", 32 * i);
                ptx!(k, "@{here} mov.u32 {word}, 0;");
            }
        }
        chosen
    }

    /// Whether each of the lane's experts is in a kept group.
    fn allowed(&self, k: &mut Assembler, groups: Groups, experts: &Experts, corrected: &[Reg<F32>]) -> Vec<Reg<Pred>> {
        let at = self.lane_at(k);
        for (i, c) in corrected.iter().enumerate() {
            let offset = self.corrected_at() + 4 * padded(32 * i);
            ptx!(k, "{}st.shared.f32 [{at}+{offset}], {c};", experts.guard(i));
        }
        ptx!(k, "bar.warp.sync 0xffffffff;");
        self.keep_groups(k, groups);
        let size = self.e / groups.num;
        (0..corrected.len())
            .map(|i| {
                let (group, kept, allowed) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<Pred>());
                ptx!(k, "add.u32 {group}, {}, {};", self.lane, 32 * i);
                ptx!(k, "div.u32 {group}, {group}, {size};");
                // The last lanes may have no expert, and then no group.
                ptx!(k, "min.u32 {group}, {group}, {};", groups.num - 1);
                ptx!(k, "mad.lo.u32 {group}, {group}, 4, {};", self.base);
                ptx!(k, "ld.shared.u32 {kept}, [{group}+{}];", self.kept_at());
                ptx!(k, "setp.ne.u32 {allowed}, {kept}, 0;");
                allowed
            })
            .collect()
    }

    /// Scores the groups, as many lanes to each as there are, and marks those that are kept.
    fn keep_groups(&self, k: &mut Assembler, groups: Groups) {
        let size = self.e / groups.num;
        // The largest power of two that is at most 32 / num.
        let team = 1usize << (32 / groups.num).max(1).ilog2();
        let per_round = 32 / team;
        let (sub, first_group) = (k.reg::<B32>(), k.reg::<B32>());
        ptx!(k, "and.b32 {sub}, {}, {};", self.lane, team - 1);
        ptx!(k, "shr.u32 {first_group}, {}, {};", self.lane, team.ilog2());
        let mut mine = vec![];
        for round in 0..groups.num.div_ceil(per_round) {
            let (group, writes, leads) = (k.reg::<B32>(), k.reg::<Pred>(), k.reg::<Pred>());
            ptx!(k, "add.u32 {group}, {first_group}, {};", round * per_round);
            ptx!(k, "setp.eq.u32 {leads}, {sub}, 0;");
            ptx!(k, "setp.lt.and.u32 {writes}, {group}, {}, {leads};", groups.num);
            // Lanes past the last group score it again.
            ptx!(k, "min.u32 {group}, {group}, {};", groups.num - 1);
            let score = self.group_score(k, group, sub, (size, team), groups.score);
            let at = k.reg::<B32>();
            ptx!(k, "mad.lo.u32 {at}, {group}, 4, {};", self.base);
            ptx!(k, "@{writes} st.shared.f32 [{at}+{}], {score};", self.group_scores_at());
            mine.push((group, score, at, writes));
        }
        ptx!(k, "bar.warp.sync 0xffffffff;");
        for (group, score, at, writes) in mine {
            let (ahead, other) = (special(k, "0"), k.reg::<F32>());
            for h in 0..groups.num {
                let (more, tie, lower) = (k.reg::<Pred>(), k.reg::<Pred>(), k.reg::<Pred>());
                ptx!(k, "ld.shared.f32 {other}, [{}+{}];", self.base, self.group_scores_at() + 4 * h);
                ptx!(k, "setp.gt.u32 {lower}, {group}, {h};");
                ptx!(k, "setp.eq.and.f32 {tie}, {other}, {score}, {lower};");
                ptx!(k, "setp.gt.or.f32 {more}, {other}, {score}, {tie};");
                ptx!(k, "@{more} add.u32 {ahead}, {ahead}, 1;");
            }
            let (kept, keep) = (k.reg::<B32>(), k.reg::<Pred>());
            ptx!(k, "setp.lt.u32 {keep}, {ahead}, {};", groups.keep);
            ptx!(k, "selp.u32 {kept}, 1, 0, {keep};");
            ptx!(k, "@{writes} st.shared.u32 [{at}+{}], {kept};", self.kept_at());
        }
        ptx!(k, "bar.warp.sync 0xffffffff;");
    }

    /// The best, or the sum of the two best, of `size` corrected scores, by `team` neighbouring lanes.
    fn group_score(
        &self,
        k: &mut Assembler,
        group: Reg<B32>,
        sub: Reg<B32>,
        (size, team): (usize, usize),
        score: GroupScore,
    ) -> Reg<F32> {
        let first = parts::constant(k, f32::NEG_INFINITY);
        let second = parts::constant(k, f32::NEG_INFINITY);
        let (start, less) = (k.reg::<B32>(), k.reg::<F32>());
        ptx!(k, "mad.lo.u32 {start}, {group}, {size}, {sub};");
        for i in 0..size.div_ceil(team) {
            let (member, at, c, inside) = (k.reg::<B32>(), k.reg::<B32>(), k.reg::<F32>(), k.reg::<Pred>());
            ptx!(k, "setp.lt.u32 {inside}, {sub}, {};", size - team * i);
            ptx!(k, "add.u32 {member}, {start}, {};", team * i);
            ptx!(k, "shr.u32 {at}, {member}, 5;");
            ptx!(k, "mad.lo.u32 {member}, {at}, 4, {member};");
            ptx!(k, "mad.lo.u32 {at}, {member}, 4, {};", self.base);
            ptx!(k, "mov.f32 {c}, {};", ptx::asm::f32_literal(f32::NEG_INFINITY));
            ptx!(k, "@{inside} ld.shared.f32 {c}, [{at}+{}];", self.corrected_at());
            ptx!(k, "min.f32 {less}, {first}, {c};");
            ptx!(k, "max.f32 {second}, {second}, {less};");
            ptx!(k, "max.f32 {first}, {first}, {c};");
        }
        let mut mask = team / 2;
        while mask > 0 {
            let (x, y) = (k.reg::<F32>(), k.reg::<F32>());
            ptx!(k, "shfl.sync.bfly.b32 {x}, {first}, {mask}, 31, 0xffffffff;");
            ptx!(k, "shfl.sync.bfly.b32 {y}, {second}, {mask}, 31, 0xffffffff;");
            ptx!(k, "min.f32 {less}, {first}, {x};");
            ptx!(k, "max.f32 {second}, {second}, {y};");
            ptx!(k, "max.f32 {second}, {second}, {less};");
            ptx!(k, "max.f32 {first}, {first}, {x};");
            mask /= 2;
        }
        if score == GroupScore::Top2Sum && size > 1 {
            ptx!(k, "add.rn.f32 {first}, {first}, {second};");
        }
        first
    }
}
