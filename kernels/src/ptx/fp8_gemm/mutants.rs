//! Mutants of the kernels: each part of their protocols is needed, each scale is where it belongs, and sums are promoted.

use super::{
    Problem, ScaleB,
    harness::{Case, DENSE, Numbers},
    launch, mma,
    wgmma::{self, Tile},
};
use crate::{
    dtype::DType,
    ptx::{
        Launch,
        gemm::{
            harness::{AMPERE, HOPPER, How},
            mutants::{Mistake, each_is_noticed},
        },
    },
};

/// Two stages, so that rounds are short.
const SHORT: Tile = Tile { bm: 128, bn: 64, stages: 2, blocks: 1 };
const PAIR: Tile = Tile { blocks: 2, ..SHORT };

/// The launch with another text.
fn with_text(mut launch: Launch, text: &str) -> Launch {
    let text = text.to_owned();
    launch.kernel.emit = Box::new(move || text.clone());
    launch
}

/// The text of the kernel that a case is solved by.
fn text_of(kernel: &dyn Fn(&Problem) -> Launch, case: &Case) -> String {
    let text = std::cell::RefCell::new(String::new());
    let launches = |problem: &Problem| {
        let launch = kernel(problem);
        *text.borrow_mut() = (launch.kernel.emit)();
        vec![launch]
    };
    case.check_by(&launches, 0);
    text.into_inner()
}

/// The kernel passes with every seed, and no mutant and no mistake does, but for one mutant that says each of `harmless`.
fn check(kernel: &dyn Fn(&Problem) -> Launch, case: &Case, mistakes: &[Mistake], harmless: &[&str]) {
    const SEEDS: std::ops::Range<u64> = 0..4;
    let passes = |text: &str| {
        let launches = |problem: &Problem| vec![with_text(kernel(problem), text)];
        SEEDS.into_iter().all(|seed| case.run(&launches, seed, None).is_ok())
    };
    let text = text_of(kernel, case);
    assert!(passes(&text), "the kernel itself");
    each_is_noticed(&text, mistakes, harmless, passes);
}

fn by_short(problem: &Problem) -> Launch {
    wgmma::launch(HOPPER, problem, SHORT)
}

fn by_pair(problem: &Problem) -> Launch {
    wgmma::launch(HOPPER, problem, PAIR)
}

/// In the interpreter the lanes of a warp meet at each wgmma, which PTX does not promise to order their reads of scales.
const LANES_MEET: &str = "drop `bar.warp.sync";

#[test]
fn a_dense_product_needs_all_its_parts() {
    // Three tiles a block, of two rounds of the stages each; two of the three have other scales of B.
    let case = Case { m: 136, n: 144, k: 400, ..DENSE };
    let mistakes = [
        ("the producer's phase is not inverted", "xor.b32", &[0][..], (", 1;", ", 0;")),
        ("the producer's phase does not flip", "xor.b32", &[1], (", 1;", ", 0;")),
        ("the consumers' phase does not flip", "xor.b32", &[2], (", 1;", ", 0;")),
        ("rows of eight 512 bytes apart", "1073741888;", &[], ("1073741888", "1073741856")),
        ("no swizzle", "1073741888;", &[], ("1073741888", "64")),
        ("products of 128 onto those before", ", 0, 1, 1;", &[], (", 0, 1, 1;", ", 1, 1, 1;")),
        ("A's scales are the first 128 of k's", "shr.u32", &[2], (", 7;", ", 31;")),
        ("A's scales are one stage's", ", 512;", &[], (", 512;", ", 0;")),
        ("A's scale is one for all rows", ", 4, ", &[], (", 4, ", ", 0, ")),
        ("A's second row has the first's scale", "+32];", &[0], ("+32", "+0")),
        ("B's scale is the first columns'", "shr.u32", &[9], (", 7;", ", 31;")),
        ("B's scale is the first 128 of k's", "add.u64", &[1], (", 4;", ", 0;")),
    ];
    check(&by_short, &case, &mistakes, &[LANES_MEET]);
}

#[test]
fn groups_of_rows_need_all_their_parts() {
    let counts = &[200, 3, 0, 64, 70];
    check(&by_short, &Case { n: 64, k: 144, counts, how: How::Offsets, ..DENSE }, &[], &[LANES_MEET]);
}

#[test]
fn padded_weight_gradients_need_all_their_parts() {
    let counts = &[40, 300, 0, 128];
    let case =
        Case { tiled: true, m: 136, n: 64, counts, how: How::Offsets, accumulate: true, output: DType::F32, ..DENSE };
    let mistakes = [
        ("columns have the first eight's scales", "ld.shared.v2.f32", &[1][..], ("+32]", "+0]")),
        ("B's scales lie where A's do", ", 66048;", &[], (", 66048;", ", 65536;")),
        ("groups are not padded", "redux", &[], ("redux", "// redux")),
    ];
    check(&by_short, &case, &mistakes, &[LANES_MEET]);
}

#[test]
fn a_cluster_needs_all_its_parts() {
    let case = Case { m: 264, n: 144, k: 400, ..DENSE };
    let mistakes = [
        ("B goes to one block", "mov.u16", &[][..], (", 3;", ", 1;")),
        ("warps arrive at one block", "setp.lt.u32", &[1], (", 2;", ", 1;")),
    ];
    check(&by_pair, &case, &mistakes, &[LANES_MEET]);
}

#[test]
fn stages_of_mma_need_all_their_parts() {
    let case = Case { m: 64, n: 64, k: 272, ..DENSE };
    check(&mma::launch, &case, &[("one of the 16 of k", "mma.sync", &[0], ("mma.sync", "// "))], &[]);
}

/// What a kernel would be that lets tensor cores sum over all of k, and scales once.
fn without_promotion(text: &str) -> String {
    let mut acc = vec![];
    let mut changed = vec![];
    for line in text.lines() {
        if let Some((head, _)) = line.split_once(", 0, 1, 1;") {
            let registers = head.split(['{', '}']).nth(1).unwrap_or_default();
            acc = registers.split(", ").collect();
            changed.push(format!("{head}, 1, 1, 1;"));
        } else if let Some(operands) = line.trim().strip_prefix("fma.rn.f32 ") {
            let operands: Vec<&str> = operands.split(", ").collect();
            changed.push(format!("mul.rn.f32 {};", operands[..3].join(", ")));
        } else {
            changed.push(line.to_owned());
        }
    }
    let zeros: String = acc.iter().map(|x| format!("mov.f32 {x}, 0f00000000;\n")).collect();
    let first = changed.iter().position(|line| line.starts_with("$MULTIPLY")).unwrap_or_default();
    changed.insert(first, zeros);
    changed.join("\n")
}

/// DeepSeek-V3's report (section 3.3.2) names the loss, nearly 2% at k = 4096; here all numbers are positive.
#[test]
fn sums_over_a_long_k_are_wrong_on_short_accumulators_unless_promoted() {
    let case = Case { m: 64, n: 64, k: 4096, numbers: Numbers::Positive, output: DType::F32, ..DENSE };
    let whole = |problem: &Problem| vec![by_short(problem)];
    let text = without_promotion(&text_of(&by_short, &case));
    let unpromoted = |problem: &Problem| vec![with_text(by_short(problem), &text)];
    let bits = Some(13);
    assert_eq!(case.run(&whole, 1, bits), Ok(()));
    assert_eq!(case.run(&unpromoted, 1, None), Ok(()), "sums are long enough");
    let failed = case.run(&unpromoted, 1, bits);
    assert!(failed.is_err(), "no promotion goes unnoticed");
    // The bits that are kept matter to no other kernel.
    assert_eq!(case.run(&|problem| launch(AMPERE, problem), 1, bits), Ok(()));
}

#[test]
fn scales_in_each_others_place_are_noticed() {
    let case = Case { tiled: true, m: 80, n: 80, k: 272, accumulate: true, output: DType::F32, ..DENSE };
    for on in [AMPERE, HOPPER] {
        let swapped = |problem: &Problem| {
            let ScaleB::Tiles(scale_b) = problem.scale_b else { return vec![] };
            launch(on, &Problem { scale_a: scale_b, scale_b: ScaleB::Tiles(problem.scale_a), ..*problem })
        };
        assert!(case.run(&swapped, 1, None).is_err());
    }
}
