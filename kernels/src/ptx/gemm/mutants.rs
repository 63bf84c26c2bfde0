//! Mutants of the kernels: each part of their protocols is needed, and the interpreter says so where it is missing.

use std::cell::RefCell;

use half::bf16;

use super::{
    Layout, Problem,
    harness::{Case, DENSE, HOPPER, How},
    mma,
    wgmma::{self, Tile},
};
use crate::{dtype::DType, ptx::Launch};

/// Two stages, so that rounds are short.
const SHORT: Tile = Tile { bn: 128, stages: 2 };

/// The only launch of a problem.
type Kernel = fn(&Problem) -> Launch;

fn by_wgmma(problem: &Problem) -> Launch {
    wgmma::launch(HOPPER, problem, SHORT)
}

fn by_mma(problem: &Problem) -> Launch {
    mma::launch(problem, mma::SMALL)
}

/// A mistake that the interpreter's own mutants do not make: what is wrong, lines with what, which of those (from 0; all if empty),
/// and what in them becomes what.
pub(in crate::ptx) type Mistake = (&'static str, &'static str, &'static [usize], (&'static str, &'static str));

/// The text with a mistake.
fn mistaken(text: &str, (what, pattern, nth, (from, to)): Mistake) -> String {
    let (mut found, mut changed) = (0, String::new());
    for line in text.lines() {
        let here = line.contains(pattern) && (nth.is_empty() || nth.contains(&found));
        found += usize::from(line.contains(pattern));
        assert!(!here || line.contains(from), "{what}: `{line}` has `{from}`");
        changed += &if here { line.replacen(from, to, 1) } else { line.to_owned() };
        changed.push('\n');
    }
    assert!(found > nth.last().copied().unwrap_or(0), "{what}: `{pattern}` is in the kernel");
    changed
}

/// The kernel passes with every seed, and no mutant and no mistake does, but for one mutant that says each of `harmless`.
fn check(kernel: Kernel, case: &Case, mistakes: &[Mistake], harmless: &[&str]) {
    const SEEDS: std::ops::Range<u64> = 0..6;
    let text = RefCell::new(String::new());
    for seed in SEEDS {
        let launches = |problem: &Problem| {
            let launch = kernel(problem);
            *text.borrow_mut() = (launch.kernel.emit)();
            vec![launch]
        };
        case.check_by::<bf16>(&launches, seed);
    }
    each_is_noticed(&text.into_inner(), mistakes, harmless, |text| {
        let launches = |problem: &Problem| {
            let (mut launch, text) = (kernel(problem), text.to_owned());
            launch.kernel.emit = Box::new(move || text.clone());
            vec![launch]
        };
        SEEDS.into_iter().all(|seed| case.run::<bf16>(&launches, seed).is_ok())
    });
}

/// No mutant of the text and no mistake passes, but for one mutant that says each of `harmless`.
pub(in crate::ptx) fn each_is_noticed(
    text: &str,
    mistakes: &[Mistake],
    harmless: &[&str],
    passes: impl Fn(&str) -> bool,
) {
    let mut harmless = harmless.to_vec();
    let mutants = ptxsim::mutants(text).into_iter().map(|mutant| (mutant.what, mutant.text));
    let mistakes = mistakes.iter().map(|mistake| (mistake.0.to_owned(), mistaken(text, *mistake)));
    for (what, text) in mutants.chain(mistakes) {
        if passes(&text) {
            let place = harmless.iter().position(|harmless| what.contains(harmless));
            harmless.remove(place.unwrap_or_else(|| panic!("{what}: goes unnoticed")));
        }
    }
    assert!(harmless.is_empty(), "{harmless:?} are noticed");
}

#[test]
fn a_dense_product_needs_all_its_parts() {
    // Two tiles a block, of eight rounds of the stages; of two panels.
    let case = Case { layout: Layout::Nt, m: 136, n: 200, k: 456, output: DType::Bf16, ..DENSE };
    let mistakes = [
        ("slots given back in flight", "wgmma.wait_group.sync.aligned 1;", &[][..], (" 1;", " 2;")),
        ("arrivals of one consumer", "], 8;", &[], ("], 8;", "], 4;")),
        ("a panel more than comes", "expect_tx", &[], ("32768", "40960")),
        ("a panel not waited for", "expect_tx", &[], ("32768", "24576")),
        ("the producer's phase is not inverted", "xor.b32", &[0], (", 1;", ", 0;")),
        ("the producer's phase does not flip", "xor.b32", &[1], (", 1;", ", 0;")),
        ("the consumers' phase does not flip", "xor.b32", &[2], (", 1;", ", 0;")),
        ("rows of eight 512 bytes apart", "1073741888;", &[], ("1073741888", "1073741856")),
        ("no swizzle", "1073741888;", &[], ("1073741888", "64")),
    ];
    check(by_wgmma, &case, &mistakes, &[]);
}

#[test]
fn groups_of_rows_need_all_their_parts() {
    // A consumer writes tiles by TMA, then part of one by rows.
    let counts = &[200, 3, 0, 64, 70];
    let case = Case { layout: Layout::Nn, n: 128, k: 72, counts, how: How::Offsets, output: DType::Bf16, ..DENSE };
    check(by_wgmma, &case, &[], &[]);
}

#[test]
fn the_tail_of_k_needs_all_its_parts() {
    let counts = &[40, 70, 0, 9, 130];
    let case = Case { layout: Layout::Tn, m: 128, n: 128, counts, how: How::Offsets, accumulate: true, ..DENSE };
    let mistakes = [
        ("no zeros", "st.shared.v4", &[][..], ("st.shared.v4.b32", "// ")),
        ("panels of the wrong distance", "33554432", &[1], ("33554432", "16777216")),
        ("k not turned", "1, 1, 1, 1, 1;", &[], ("1, 1, 1, 1, 1;", "1, 1, 1, 0, 1;")),
    ];
    // Before a tile's first rows: in the interpreter a warpgroup's warps meet at each wgmma, which PTX does not promise.
    check(by_wgmma, &case, &mistakes, &["drop `bar.sync %"]);
}

#[test]
fn the_stages_of_mma_need_all_their_parts() {
    let case = Case { layout: Layout::Nt, m: 64, n: 64, k: 328, ..DENSE };
    check(by_mma, &case, &[("one of the 16 of k", "mma.sync", &[0], ("mma.sync", "// "))], &[]);
}
