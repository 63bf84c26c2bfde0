//! The mean of a tensor over ranks that are far apart, in few bytes.
//!
//! Each member sends every other its part of x, encoded; who has a part adds all of it in f64 in the order of members, and sends the
//! mean, encoded again, to the others. So an element crosses as often as in a ring, is rounded twice whatever the number of members, and all
//! have the same bits, since each decodes what it sent as the others do.

use std::{ops::Range, sync::Arc};

use half::bf16;

use super::{Comm, LinkBytes, collectives::Member, pack::Addends};
use crate::{
    cost::Cost,
    dtype::DType,
    error::{Error, Result},
    memory::Memory,
    ops::expect::expect_tensor,
    stream::Stream,
    tensor::Tensor,
};

/// How numbers are written on their way.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Coding {
    /// As they are: 4 bytes.
    #[default]
    F32,
    /// Rounded to bfloat16: 2 bytes. An error of at most 2^-8 of the number.
    Bf16,
    /// A signed byte for each, and for each [`BLOCK`] numbers the f32 that it is multiplied by: the largest magnitude over 127. An error of
    /// at most 1/254 of the largest of the block.
    Int8,
}

/// Numbers that share a scale.
pub const BLOCK: usize = 256;
/// The largest code.
const MAX_CODE: f32 = 127.0;

impl Coding {
    /// Bytes of `len` numbers.
    pub fn num_bytes(self, len: usize) -> usize {
        match self {
            Coding::F32 => 4 * len,
            Coding::Bf16 => 2 * len,
            Coding::Int8 => len + 4 * len.div_ceil(BLOCK),
        }
    }

    fn encode(self, x: &[f32], to: &mut Vec<u8>) {
        to.reserve(self.num_bytes(x.len()));
        match self {
            Coding::F32 => to.extend_from_slice(bytemuck::cast_slice(x)),
            Coding::Bf16 => to.extend(x.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes())),
            Coding::Int8 => {
                for block in x.chunks(BLOCK) {
                    // What is not finite must not look as if it were.
                    let is_finite = block.iter().all(|x| x.is_finite());
                    let most = block.iter().fold(0f32, |most, x| most.max(x.abs()));
                    let scale = if is_finite { most / MAX_CODE } else { f32::NAN };
                    to.extend(scale.to_le_bytes());
                    let code = |x: &f32| if scale > 0.0 { (x / scale).round_ties_even() as i8 } else { 0 };
                    to.extend(block.iter().map(|x| code(x) as u8));
                }
            }
        }
    }

    /// Gives each number of `bytes`, which are of `len` of them, with its place.
    fn decode(self, bytes: &[u8], mut take: impl FnMut(usize, f32)) {
        match self {
            Coding::F32 => {
                let numbers = bytes.as_chunks::<4>().0.iter().map(|x| f32::from_le_bytes(*x));
                numbers.enumerate().for_each(|(i, x)| take(i, x));
            }
            Coding::Bf16 => {
                let numbers = bytes.as_chunks::<2>().0.iter().map(|x| bf16::from_le_bytes(*x).to_f32());
                numbers.enumerate().for_each(|(i, x)| take(i, x));
            }
            Coding::Int8 => {
                for (b, block) in bytes.chunks(BLOCK + 4).enumerate() {
                    let Some((scale, codes)) = block.split_first_chunk() else { continue };
                    let scale = f32::from_le_bytes(*scale);
                    for (i, &code) in codes.iter().enumerate() {
                        take(b * BLOCK + i, f32::from(code as i8) * scale);
                    }
                }
            }
        }
    }
}

impl Comm {
    /// Assigns x (f32) the mean of all members' x, each encoded on its way there and on its way back. Counted as what that takes.
    ///
    /// # Errors
    /// If x is of another type, this rank is not in the group, or a rank is lost.
    pub fn all_reduce_mean(
        &self,
        s: &mut Stream,
        group: &Arc<[u32]>,
        x: Tensor,
        coding: Coding,
        tag: u64,
    ) -> Result<()> {
        const OP: &str = "all_reduce_mean";
        let (me, n, len) = (self.place_in(OP, group)?, group.len(), x.len());
        let dims: Vec<usize> = x.shape.dims().collect();
        expect_tensor(OP, "x", x, DType::F32, &dims)?;
        let parts: Vec<Range<usize>> = (0..n).map(|i| len * i / n..len * (i + 1) / n).collect();
        let sizes: Vec<usize> = parts.iter().map(|part| coding.num_bytes(part.len())).collect();
        let to = |(i, &to): (usize, &u32)| self.link_bytes(to, (sizes[i] + sizes[me]) as u64);
        let bytes: LinkBytes = group.iter().enumerate().map(to).sum();
        let cost = Cost::stream((n * parts[me].len()) as u64, x.size_bytes(), x.size_bytes());
        self.collective(s, (OP, tag), group, x, cost + bytes.cost(), move |member, here| {
            mean(&member, here.host()?, x, coding, &parts)?;
            member.finish(bytes)
        })
    }
}

fn mean(member: &Member, m: &Memory, x: Tensor, coding: Coding, parts: &[Range<usize>]) -> Result<()> {
    let what = format!("[{}] as {coding:?}", x.len());
    let (mut data, mut places) = (Vec::new(), Vec::new());
    {
        let x = m.read::<f32>(x);
        for part in parts {
            let begin = data.len();
            coding.encode(&x[part.clone()], &mut data);
            places.push(begin..data.len());
        }
    }
    let (mine, place) = (parts[member.me].len(), places[member.me].clone());
    let all = member.meet(what.clone(), Addends { first: 0, data, parts: Some(places.into()) })?;
    let mut sums = vec![0f64; mine];
    for one in &all {
        coding.decode(&one.data[place.start - one.first..place.end - one.first], |i, x| sums[i] += f64::from(x));
    }
    drop(all);
    let n = parts.len() as f64;
    let means: Vec<f32> = sums.into_iter().map(|sum| (sum / n) as f32).collect();
    let mut encoded = Vec::new();
    coding.encode(&means, &mut encoded);
    let all = member.meet(what, encoded)?;
    let mut x = m.write::<f32>(x);
    for (i, (part, bytes)) in parts.iter().zip(&all).enumerate() {
        if bytes.len() != coding.num_bytes(part.len()) {
            let message = format!("member {i} sent {} bytes for {} numbers as {coding:?}", bytes.len(), part.len());
            return Err(Error::Comm { op: member.op, message });
        }
        let x = &mut x[part.clone()];
        coding.decode(bytes, |i, number| x[i] = number);
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    #![expect(clippy::unwrap_used, reason = "tests")]
    use super::*;
    use crate::{comm::testing::on_ranks, ops::testing::random};

    fn data(len: usize, rank: u32) -> Vec<f32> {
        // Of sizes that differ from block to block.
        let size = |i: usize| 10f64.powi((i / 100 % 5) as i32 - 3);
        random(len, 7 + u64::from(rank)).into_iter().enumerate().map(|(i, x)| (x * size(i)) as f32).collect()
    }

    /// What each of n ranks has, and what it sent.
    fn run(n: u32, group: &[u32], len: usize, coding: Coding) -> Vec<(Vec<f32>, LinkBytes)> {
        let group: Arc<[u32]> = group.into();
        on_ranks(n, 2, |comm, s| {
            let x = s.memory().from_slice(&[len], &data(len, comm.rank()));
            if group.contains(&comm.rank()) {
                comm.all_reduce_mean(s, &group, x, coding, 3).unwrap();
            }
            s.synchronize().unwrap();
            (s.memory().download::<f32>(x), comm.meter().reduce)
        })
    }

    #[test]
    fn the_mean_is_as_near_as_its_coding_says_and_the_same_on_all() {
        for (n, group) in [(1, &[0][..]), (2, &[0, 1]), (4, &[0, 1, 3]), (4, &[0, 1, 2, 3])] {
            for len in [1, 255, 1000, 5003] {
                let all: Vec<Vec<f32>> = group.iter().map(|&rank| data(len, rank)).collect();
                let mean = |i: usize| all.iter().map(|x| f64::from(x[i])).sum::<f64>() / all.len() as f64;
                for coding in [Coding::F32, Coding::Bf16, Coding::Int8] {
                    let got = run(n, group, len, coding);
                    for rank in 0..n {
                        let got = &got[rank as usize].0;
                        if !group.contains(&rank) {
                            assert_eq!(got, &data(len, rank), "who is not in the group keeps its own");
                        }
                    }
                    let first = &got[group[0] as usize].0;
                    assert!(group.iter().all(|&rank| &got[rank as usize].0 == first), "{coding:?} of {len}");
                    // A block is at most so long; where it begins depends on the parts.
                    let most_around = |i: usize| {
                        let near = i.saturating_sub(BLOCK)..(i + BLOCK).min(len);
                        all.iter().flat_map(|x| &x[near.clone()]).fold(0f64, |most, x| most.max(f64::from(x.abs())))
                    };
                    for (i, &x) in first.iter().enumerate() {
                        let most = match coding {
                            Coding::F32 => mean(i).abs() * 2f64.powi(-24),
                            Coding::Bf16 => {
                                let sizes = all.iter().map(|x| f64::from(x[i].abs())).sum::<f64>();
                                (2.0 + 2f64.powi(-8)) * 2f64.powi(-8) * sizes / all.len() as f64
                            }
                            Coding::Int8 => 2.0 * most_around(i) / 254.0,
                        };
                        let error = (f64::from(x) - mean(i)).abs();
                        assert!(
                            error <= most * 1.001,
                            "{coding:?} of {len}, element {i}: off by {error}, at most {most}"
                        );
                    }
                }
            }
        }
    }

    #[test]
    fn bytes_are_those_of_a_ring_in_the_codings_size() {
        let (n, len) = (4, 4 * 2560);
        for (coding, bytes) in [(Coding::F32, 4 * len), (Coding::Bf16, 2 * len), (Coding::Int8, len + len / 64)] {
            // There and back, all but a rank's own quarter; two ranks are on each node.
            let to_each = 2 * bytes as u64 / 4;
            let want = LinkBytes { intra_node: to_each, inter_node: 2 * to_each };
            for (rank, (_, sent)) in run(n, &[0, 1, 2, 3], len, coding).into_iter().enumerate() {
                assert_eq!(sent, want, "{coding:?}, rank {rank}");
            }
        }
    }

    #[test]
    fn numbers_of_any_size_are_encoded() {
        let round = |coding: Coding, x: &[f32]| {
            let (mut bytes, mut got) = (Vec::new(), vec![f32::INFINITY; x.len()]);
            coding.encode(x, &mut bytes);
            assert_eq!(bytes.len(), coding.num_bytes(x.len()));
            coding.decode(&bytes, |i, x| got[i] = x);
            got
        };
        assert_eq!(round(Coding::Int8, &[]), [0f32; 0]);
        assert_eq!(round(Coding::Int8, &[0.0; 300]), [0.0; 300]);
        assert_eq!(round(Coding::Int8, &[127.0, -127.0, 1.0, 0.4]), [127.0, -127.0, 1.0, 0.0]);
        assert_eq!(round(Coding::Int8, &[1e-38, -1e-41])[1], 0.0, "beside a small one a tiny one is nothing");
        assert!(round(Coding::Int8, &[1.0, f32::NAN]).iter().all(|x| x.is_nan()), "and no number comes from none");
        assert!(round(Coding::Int8, &[1.0, f32::INFINITY]).iter().all(|x| x.is_nan()));
        assert_eq!(round(Coding::F32, &[f32::MIN_POSITIVE, -0.1]), [f32::MIN_POSITIVE, -0.1]);
        assert_eq!(round(Coding::Bf16, &[1.0, 0.5 + 2f32.powi(-12)]), [1.0, 0.5]);
    }

    #[test]
    fn a_window_is_a_run_of_its_own() {
        let got = on_ranks(4, 1, |comm, s| {
            let (first, group) = (comm.rank() / 2 * 2, Arc::from([0, 1]));
            let pair = comm.window(first, 2);
            assert_eq!((pair.rank(), pair.num_ranks(), pair.node_of(0)), (comm.rank() - first, 2, first));
            let x = s.memory().from_slice(&[1], &[comm.rank() as f32]);
            pair.all_reduce_sum(s, &group, x, 1).unwrap();
            let y = s.memory().from_slice(&[1], &[0f32]);
            if pair.rank() == 0 {
                pair.send(s, x, 1, 9).unwrap();
            } else {
                pair.receive(s, y, 0, 9).unwrap();
            }
            s.start_recording();
            pair.all_reduce_sum(s, &group, x, 1).unwrap();
            let recording = s.finish_recording();
            let place = crate::stream::Rendezvous::Collective { group: Arc::from([first, first + 1]), tag: 1 };
            assert_eq!(recording.rendezvous, [place], "in the numbers of the run");
            s.synchronize().unwrap();
            let told = pair.all_gather_bytes(vec![comm.rank() as u8]).unwrap();
            assert_eq!(told, [[first as u8], [first as u8 + 1]]);
            assert_eq!(comm.metered_apart().meter().total(), LinkBytes::default());
            assert_eq!(pair.meter(), comm.meter(), "a window's bytes are counted with the end's");
            (s.memory().download::<f32>(x)[0], s.memory().download::<f32>(y)[0])
        });
        assert_eq!(got, [(1.0, 0.0), (1.0, 1.0), (5.0, 0.0), (5.0, 5.0)]);
    }
}
