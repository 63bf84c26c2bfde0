//! The exchange against one rank that has all tokens, for routings of all kinds.

#![expect(clippy::unwrap_used, reason = "tests")]

use half::bf16;
use rand::{RngExt as _, SeedableRng};

use super::*;
use crate::{
    comm::{
        Choice,
        meter::Meter,
        testing::{on_ranks, on_ranks_that},
    },
    device::Device,
    ops::{permute, testing::random},
};

const E: usize = 8;
const K: usize = 3;

/// Experts of each slot, distinct within a token; t tokens on each of n ranks.
type Routing = fn(rank: usize, token: usize) -> [u32; K];

const ROUTINGS: [(&str, Routing); 4] = [
    ("random", |rank, token| {
        let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64((rank * 1000 + token) as u64);
        let mut experts: Vec<u32> = (0..E as u32).collect();
        [(); K].map(|()| experts.swap_remove(rng.random_range(0..experts.len())))
    }),
    // Expert 6 always, 5 nearly always.
    ("skewed", |rank, token| if (rank + token) % 7 == 0 { [6, 0, 3] } else { [6, 5, (token % 5) as u32] }),
    ("experts without rows", |_, token| if token % 2 == 0 { [1, 4, 7] } else { [7, 1, 3] }),
    ("all to one rank", |_, _| [2, 0, 1]),
];

fn order(s: &Stream, num_rows: usize) -> Order {
    let alloc = |n| s.memory().alloc(DType::U32, &[n]);
    Order { offsets: alloc(E + 1), row_of_slot: alloc(num_rows), token_of_row: alloc(num_rows) }
}

/// The first expert of `member` of n, by the definition.
fn first_expert(member: usize, n: usize) -> usize {
    member * E / n
}

fn member_of(expert: u32, n: usize) -> usize {
    (0..n).rfind(|&member| first_expert(member, n) <= expert as usize).unwrap()
}

/// Room for what comes to member `me` of n.
fn received(s: &Stream, dtype: DType, (me, n): (usize, usize), cap: usize, d: usize) -> Received {
    let m = s.memory();
    Received {
        rows: m.alloc(dtype, &[cap, d]),
        offsets: m.alloc(DType::U32, &[first_expert(me + 1, n) - first_expert(me, n) + 1]),
        origin: m.alloc(DType::U32, &[cap, 2]),
    }
}

fn tokens_of(rank: usize) -> usize {
    20 + 3 * rank
}

fn cast<T: Float>(x: Vec<f64>) -> Vec<T> {
    x.into_iter().map(T::of_f64).collect()
}

fn inputs<T: Float>(rank: usize, d: usize, routing: Routing) -> (Vec<T>, Vec<u32>) {
    let t = tokens_of(rank);
    (cast(random(t * d, rank as u64)), (0..t).flat_map(|token| routing(rank, token)).collect())
}

/// What the wire makes of rows.
fn through<T: Float>(wire: Wire, x: &[T], d: usize) -> Vec<T> {
    let (encoded, mut out) = (Rows::encode(wire, x, d), x.to_vec());
    out.chunks_exact_mut(d).enumerate().for_each(|(row, out)| encoded.decode(row, out));
    out
}

/// Rows of all ranks' tokens in expert order, on one rank, and offsets.
fn plain<T: Float>(n: usize, d: usize, routing: Routing, wire: Wire) -> (Vec<T>, Vec<u32>) {
    let mut s = crate::ops::testing::stream();
    let m = s.memory().clone();
    let (x, indices): (Vec<_>, Vec<_>) = (0..n).map(|rank| inputs::<T>(rank, d, routing)).unzip();
    let (x, indices) = (through(wire, &x.concat(), d), indices.concat());
    let t = indices.len() / K;
    let order = order(&s, t * K);
    let rows = m.alloc(T::DTYPE, &[t * K, d]);
    permute::sort(&mut s, m.from_slice(&[t, K], &indices), order).unwrap();
    permute::permute(&mut s, m.from_slice(&[t, d], &x), order, rows).unwrap();
    s.synchronize().unwrap();
    (m.download(rows), m.download(order.offsets))
}

/// Dispatch, identity, return and the weighted sum, of ranks against one; ranks that share memory, and ranks that pack, on nodes of one,
/// of two, and of three, which the last has not.
fn check<T: Float>(n: usize, d: usize, routing: (&str, Routing), wire: Wire) {
    for (pack, per_node) in [(false, 2), (true, 2), (true, 1), (true, 3)] {
        check_on::<T>((pack, n, per_node), d, routing, wire);
    }
}

fn check_on<T: Float>((pack, n, per_node): (bool, usize, u32), d: usize, (name, routing): (&str, Routing), wire: Wire) {
    let case = format!("{name}, {n} ranks by {per_node}, pack {pack}, {:?} x {d} as {wire:?}", T::DTYPE);
    let (all_rows, all_offsets) = plain::<T>(n, d, routing, wire);
    let bounds: Vec<usize> = (0..=n).map(|i| all_offsets[first_expert(i, n)] as usize).collect();
    let most = bounds.windows(2).map(|w| w[1] - w[0]).max().unwrap();
    on_ranks_that(pack, n as u32, per_node, |comm, s| {
        let me = comm.rank() as usize;
        let (x, indices) = inputs::<T>(me, d, routing);
        let t = tokens_of(me);
        let m = s.memory().clone();
        let experts = first_expert(me, n)..first_expert(me + 1, n);
        let cap = (0..n).map(tokens_of).sum::<usize>() * K.min(experts.len());
        let (order, to) = (order(s, t * K), received(s, T::DTYPE, (me, n), cap, d));
        let exchange = Exchange { group: comm.everyone(), comm, num_experts: E, tag: 4, wire, reduced: None };
        let exact = Exchange { wire: Wire::Exact, ..exchange.clone() };
        let (x_td, indices) = (m.from_slice(&[t, d], &x), m.from_slice(&[t, K], &indices));
        permute::sort(s, indices, order).unwrap();
        exchange.dispatch(s, x_td, indices, order, Spread::default(), to).unwrap();
        let dispatched = s.record();
        let (back, mine) = (m.alloc(T::DTYPE, &[t * K, d]), m.alloc(T::DTYPE, &[t * K, d]));
        exact.return_rows(s, to.rows, to, back).unwrap();
        let returned = s.record();
        s.synchronize().unwrap();

        // What came is what one rank with all tokens has for these experts, in its order.
        let part = bounds[me]..bounds[me + 1];
        assert!(m.download::<T>(to.rows)[..part.len() * d] == all_rows[part.start * d..part.end * d], "{case}: rows");
        let base = part.start as u32;
        let want: Vec<u32> = all_offsets[experts.start..=experts.end].iter().map(|o| o - base).collect();
        assert_eq!(m.download::<u32>(to.offsets), want, "{case}: offsets");
        for event in [dispatched, returned] {
            assert_eq!(event.waited().load, Some((part.len() as u64, most as u64)), "{case}: load");
        }

        // What comes back is this rank's own permutation, to the bit, and so is the weighted sum.
        let x_wire = m.from_slice(&[t, d], &through(wire, &x, d));
        permute::permute(s, x_wire, order, mine).unwrap();
        let acc = crate::ops::expect::acc_dtype(T::DTYPE);
        let weights = m.alloc(acc, &[t, K]);
        crate::with_float!(acc, A => m.upload::<A>(weights, &cast(random(t * K, 9))));
        let (y, y_back) = (m.alloc(T::DTYPE, &[t, d]), m.alloc(T::DTYPE, &[t, d]));
        permute::combine(s, mine, weights, order, None, y).unwrap();
        permute::combine(s, back, weights, order, None, y_back).unwrap();
        s.synchronize().unwrap();
        assert!(m.download::<T>(back) == m.download::<T>(mine), "{case}: rows that came back");
        assert!(m.download::<T>(y_back) == m.download::<T>(y), "{case}: the sum");

        // Rows sent by row go where dispatch put them, and come back to where they were.
        let (out, again) = (m.alloc(T::DTYPE, &[cap, d]), m.alloc(T::DTYPE, &[t * K, d]));
        exact.send_rows(s, mine, order, to, out).unwrap();
        s.synchronize().unwrap();
        let len = part.len() * d;
        assert!(m.download::<T>(out)[..len] == m.download::<T>(to.rows)[..len], "{case}: rows sent");
        let own = cast::<T>(random(t * K * d, 70 + me as u64));
        let rows = m.from_slice(&[t * K, d], &own);
        exchange.send_rows(s, rows, order, to, out).unwrap();
        exact.return_rows(s, out, to, again).unwrap();
        s.synchronize().unwrap();
        assert!(m.download::<T>(again) == through(wire, &own, d), "{case}: there and back");
    });
}

#[test]
fn many_ranks_are_one_to_the_bit() {
    for routing in ROUTINGS {
        for n in [1, 2, 3, 4, 5, 7, 8] {
            check::<f32>(n, 5, routing, Wire::Exact);
            check::<f64>(n, 33, routing, Wire::Exact);
            check::<bf16>(n, 8, routing, Wire::Exact);
        }
    }
}

#[test]
fn an_encoded_row_is_the_row_quantized_on_any_number_of_ranks() {
    for n in [1, 2, 3, 4, 5, 8] {
        for wire in [Wire::Bf16, Wire::Fp8] {
            for routing in ROUTINGS {
                check::<f32>(n, 300, routing, wire);
                check::<f64>(n, 130, routing, wire);
                check::<bf16>(n, 64, routing, wire);
            }
        }
    }
}

/// Copies of tokens and rows between the members of a group by their definitions, one token at a time.
fn counted(group: &[u32], per_node: u32, routing: Routing, row_bytes: u64) -> Vec<Meter> {
    let n = group.len();
    let node_of = |member: usize| group[member] / per_node;
    let node_members = |node: u32| (0..n).filter(|&i| node_of(i) == node).collect::<Vec<_>>();
    let nodes: std::collections::BTreeSet<u32> = (0..n).map(node_of).collect();
    let mut meters = vec![Meter::default(); n];
    for source in 0..n {
        let place = node_members(node_of(source)).iter().position(|&i| i == source).unwrap();
        for token in 0..tokens_of(group[source] as usize) {
            let experts = routing(group[source] as usize, token);
            let members: std::collections::BTreeSet<usize> = experts.map(|expert| member_of(expert, n)).into();
            for &node in &nodes {
                let (all, here) = (node_members(node), members.iter().filter(|&&m| node_of(m) == node));
                let from = if node == node_of(source) { source } else { all[place % all.len()] };
                if node != node_of(source) && here.clone().count() > 0 {
                    meters[source].dispatch.inter_node += row_bytes;
                }
                meters[from].dispatch.intra_node += here.filter(|&&m| m != from).count() as u64 * row_bytes;
            }
            for expert in experts {
                let member = member_of(expert, n);
                let combine = &mut meters[member].combine;
                if node_of(member) != node_of(source) {
                    combine.inter_node += row_bytes;
                } else if member != source {
                    combine.intra_node += row_bytes;
                }
            }
        }
    }
    meters
}

/// Groups of some of the ranks, and how many of all are on a node: some nodes have more members than others, some members more experts.
const GROUPS: [(&[u32], u32); 15] = [
    (&[0], 1),
    (&[0, 1], 1),
    (&[0, 1], 2),
    (&[0, 1, 2, 3], 2),
    (&[0, 1, 2, 3, 4, 5, 6, 7], 4),
    (&[0, 1, 2, 3, 4, 5, 6, 7], 2),
    (&[0, 1, 2, 3, 4, 5, 6, 7], 8),
    (&[0, 1, 2, 3, 4, 5, 6, 7], 3),
    (&[0, 1, 2, 4], 4),
    (&[1, 2, 3, 7], 2),
    (&[2, 5, 6, 7], 4),
    (&[0, 1, 2], 2),
    (&[0, 1, 2, 3, 4], 2),
    (&[1, 2, 3, 5, 6, 7], 4),
    (&[0, 1, 2, 4, 5, 6, 7], 3),
];

/// Ranks that pack check each meeting by what they packed.
#[test]
fn meters_are_what_counting_copies_gives_and_what_is_packed() {
    let d = 200;
    for ((group, per_node), (name, routing)) in GROUPS.into_iter().flat_map(|g| ROUTINGS.map(|r| (g, r))) {
        let group: Arc<[u32]> = group.into();
        let n = group.len();
        for (wire, row_bytes) in [(Wire::Exact, 800), (Wire::Bf16, 400), (Wire::Fp8, 202)] {
            for pack in [false, true] {
                let got = on_ranks_that(pack, 8, per_node, |comm, s| {
                    let me = comm.rank() as usize;
                    let at = (group.iter().position(|&rank| rank == comm.rank())?, n);
                    let (x, indices) = inputs::<f32>(me, d, routing);
                    let (t, m) = (tokens_of(me), s.memory().clone());
                    let (order, to) = (order(s, t * K), received(s, DType::F32, at, 2000, d));
                    let (x, indices) = (m.from_slice(&[t, d], &x), m.from_slice(&[t, K], &indices));
                    let back = m.alloc(DType::F32, &[t * K, d]);
                    let (group, comm) = (group.clone(), comm.clone());
                    let exchange = Exchange { group, comm: comm.clone(), num_experts: E, tag: 0, wire, reduced: None };
                    permute::sort(s, indices, order).unwrap();
                    exchange.dispatch(s, x, indices, order, Spread::default(), to).unwrap();
                    exchange.return_rows(s, to.rows, to, back).unwrap();
                    s.synchronize().unwrap();
                    Some(comm.meter())
                });
                let got: Vec<Meter> = got.into_iter().flatten().collect();
                let want = counted(&group, per_node, routing, row_bytes);
                assert_eq!(got, want, "{name}, {group:?} by {per_node}, {wire:?}, pack {pack}");
            }
        }
    }
}

const CHOICE: Choice = Choice { num_experts: E, top_k: K, num_groups: 1, groups_kept: 1 };

/// What `comm` expects of tokens of three of all experts.
fn spread(comm: &Comm) -> Spread {
    let nodes: Vec<u32> = comm.everyone().iter().map(|&rank| comm.node_of(rank)).collect();
    Spread::expected(CHOICE, &nodes, comm.rank() as usize)
}

#[test]
fn a_plan_expects_the_bytes_that_random_routing_makes() {
    for (n, per_node) in [(8, 4), (3, 2), (5, 2), (7, 3)] {
        plan_and_meter(n, per_node);
    }
}

/// By rank, since they are not alike, and in sum, which is less of a chance.
fn plan_and_meter(n: usize, per_node: u32) {
    let (t, d) = (2000, 4);
    let routing = ROUTINGS[0].1;
    let run = |comm: Comm, s: &mut Stream| {
        let m = s.memory().clone();
        let me = comm.rank() as usize;
        let indices: Vec<u32> = (0..t).flat_map(|token| routing(me, token)).collect();
        let (order, to) = (order(s, t * K), received(s, DType::F32, (me, n), n * t * K, d));
        let (x, indices) = (m.alloc(DType::F32, &[t, d]), m.from_slice(&[t, K], &indices));
        let [rows, back, sent] = [t * K, t * K, n * t * K].map(|rows| m.alloc(DType::F32, &[rows, d]));
        let (group, wire) = (comm.everyone(), Wire::Exact);
        let exchange = Exchange { group, comm: comm.clone(), num_experts: E, tag: 0, wire, reduced: None };
        let spread = spread(&comm);
        permute::sort(s, indices, order).unwrap();
        s.start_recording();
        exchange.dispatch(s, x, indices, order, spread, to).unwrap();
        let dispatch = s.finish_recording();
        assert_eq!(dispatch.rendezvous, [Rendezvous::Collective { group: comm.everyone(), tag: 0 }]);
        s.start_recording();
        exchange.return_rows(s, to.rows, to, back).unwrap();
        let combine = s.finish_recording();
        s.start_recording();
        exchange.send_rows(s, rows, order, to, sent).unwrap();
        let send = s.finish_recording();
        exchange.dispatch(s, x, indices, order, spread, to).unwrap();
        exchange.return_rows(s, to.rows, to, back).unwrap();
        s.synchronize().unwrap();
        let meter = comm.meter();
        exchange.send_rows(s, rows, order, to, sent).unwrap();
        s.synchronize().unwrap();
        let both = comm.meter().dispatch;
        let sent = LinkBytes {
            intra_node: both.intra_node - meter.dispatch.intra_node,
            inter_node: both.inter_node - meter.dispatch.inter_node,
        };
        [(meter.dispatch, dispatch.cost), (meter.combine, combine.cost), (sent, send.cost)]
    };
    let all = on_ranks(n as u32, per_node, run);
    type Of = fn(&(LinkBytes, Cost)) -> (u64, u64);
    let links: [Of; 2] = [
        |(bytes, cost)| (bytes.intra_node, cost.intra_node_bytes),
        |(bytes, cost)| (bytes.inter_node, cost.inter_node_bytes),
    ];
    for (kind, of) in (0..3).flat_map(|kind| links.map(|of| (kind, of))) {
        let figures: Vec<(u64, u64)> = all.iter().map(|rank| of(&rank[kind])).collect();
        let near =
            |metered: u64, expected: u64, part: f64| (metered as f64 - expected as f64).abs() <= part * expected as f64;
        for (rank, &(metered, expected)) in figures.iter().enumerate() {
            let what = format!("{n} ranks by {per_node}, rank {rank}, kind {kind}");
            assert!(near(metered, expected, 0.1), "{what}: metered {metered}, expected {expected}");
        }
        let (metered, expected) = figures.iter().fold((0, 0), |sum, of| (sum.0 + of.0, sum.1 + of.1));
        assert!(near(metered, expected, 0.04), "{n} ranks, kind {kind}: metered {metered}, expected {expected}");
    }
}

/// Where sums of a token's rows go back, they take the links that the token took: in all, since ranks take turns at them.
#[test]
fn sums_on_their_way_back_take_as_many_bytes_as_tokens_on_theirs() {
    for (n, per_node) in [(8u32, 4), (8, 3), (3, 2), (5, 2), (7, 3)] {
        let (mut there, mut back) = (Cost::default(), Cost::default());
        for rank in 0..n {
            let comm = Comm::planned(rank, n, per_node);
            let mut s = Stream::new("meta", &Memory::new(Device::Meta), &Arc::default()).unwrap();
            let (t, d) = (1000, 4);
            let m = s.memory().clone();
            let to = received(&s, DType::F32, (rank as usize, n as usize), t, d);
            let (rows, spread) = (m.alloc(DType::F32, &[t * K, d]), spread(&comm));
            let reduced = Some((t as u64, spread));
            let exchange =
                Exchange { group: comm.everyone(), comm, num_experts: E, tag: 0, wire: Wire::Exact, reduced };
            let order = order(&s, t * K);
            s.start_recording();
            exchange.send_rows(&mut s, rows, order, to, to.rows).unwrap();
            there += s.finish_recording().cost;
            s.start_recording();
            exchange.return_rows(&mut s, to.rows, to, rows).unwrap();
            back += s.finish_recording().cost;
        }
        for (there, back) in
            [(there.intra_node_bytes, back.intra_node_bytes), (there.inter_node_bytes, back.inter_node_bytes)]
        {
            assert!(there > 0 && there.abs_diff(back) <= u64::from(n), "{n} by {per_node}: {there} and {back}");
        }
    }
}

#[test]
fn more_rows_than_there_is_room_for_are_refused_on_all_ranks() {
    let errors = on_ranks(2, 2, |comm, s| {
        let m = s.memory().clone();
        let (order, to) = (order(s, 4 * K), received(s, DType::F32, (comm.rank() as usize, 2), 20, 1));
        let (x, indices) = (m.alloc(DType::F32, &[4, 1]), m.from_slice(&[4, K], &[0u32, 1, 2].repeat(4)));
        permute::sort(s, indices, order).unwrap();
        Exchange { group: comm.everyone(), comm, num_experts: E, tag: 31, wire: Wire::Exact, reduced: None }
            .dispatch(s, x, indices, order, Spread::default(), to)
            .unwrap();
        s.synchronize()
    });
    let error = errors[0].as_ref().unwrap_err().to_string();
    assert!(error.contains("dispatch: tag 31: 24 rows come to rank 0, which has room for 20"), "{error}");
}

#[test]
fn ranks_that_differ_in_wire_or_width_are_told() {
    for (d, wire) in [([4, 4], [Wire::Exact, Wire::Fp8]), ([4, 5], [Wire::Exact; 2])] {
        let errors = on_ranks(2, 2, |comm, s| {
            let m = s.memory().clone();
            let me = comm.rank() as usize;
            let (order, to) = (order(s, K), received(s, DType::F32, (me, 2), 9, d[me]));
            let (x, indices) = (m.alloc(DType::F32, &[1, d[me]]), m.from_slice(&[1, K], &[0u32, 1, 2]));
            permute::sort(s, indices, order).unwrap();
            Exchange { group: comm.everyone(), comm, num_experts: E, tag: 2, wire: wire[me], reduced: None }
                .dispatch(s, x, indices, order, Spread::default(), to)
                .unwrap();
            s.synchronize().unwrap_err().to_string()
        });
        assert!(errors.iter().all(|error| error.contains("dispatch with tag 2 of F32 rows of 4")), "{errors:?}");
    }
}

#[test]
fn contracts_are_checked() {
    let comm = Comm::planned(0, 2, 2);
    let mut s = Stream::new("meta", &Memory::new(Device::Meta), &Arc::default()).unwrap();
    let m = s.memory().clone();
    let (order, to) = (order(&s, 2 * K), received(&s, DType::F32, (0, 2), 12, 4));
    let (x, indices) = (m.alloc(DType::F32, &[2, 4]), m.alloc(DType::U32, &[2, K]));
    let exchange = Exchange { group: comm.everyone(), comm, num_experts: E, tag: 0, wire: Wire::Exact, reduced: None };
    let spread = Spread::default();
    exchange.dispatch(&mut s, x, indices, order, spread, to).unwrap();
    let wide = Received { rows: m.alloc(DType::F32, &[12, 5]), ..to };
    let error = exchange.dispatch(&mut s, x, indices, order, spread, wide).unwrap_err().to_string();
    assert_eq!(error, "dispatch: `rows` should be F32 of [12, 4], found F32 of [12, 5]");
    let few = Received { offsets: m.alloc(DType::U32, &[4]), ..to };
    let error = exchange.dispatch(&mut s, x, indices, order, spread, few).unwrap_err().to_string();
    assert_eq!(error, "dispatch: `received offsets` should be U32 of [5], found U32 of [4]");
    let many = Exchange { num_experts: 9, ..exchange.clone() };
    let error = many.dispatch(&mut s, x, indices, order, spread, to).unwrap_err().to_string();
    assert_eq!(error, "dispatch: `offsets` should be U32 of [10], found U32 of [9]");
    let none = Exchange { num_experts: 1, ..exchange.clone() };
    let error = none.return_rows(&mut s, to.rows, to, x).unwrap_err().to_string();
    assert!(error.contains("at least one expert for each of 2 ranks, of 1 in all"), "{error}");
    let error = exchange.return_rows(&mut s, x, to, x).unwrap_err().to_string();
    assert_eq!(error, "return_rows: `rows` should be F32 of [12, 4], found F32 of [2, 4]");
    let error = exchange.send_rows(&mut s, x, order, to, to.rows).unwrap_err().to_string();
    assert_eq!(error, "send_rows: `token_of_row` should be U32 of [2], found U32 of [6]");
}
