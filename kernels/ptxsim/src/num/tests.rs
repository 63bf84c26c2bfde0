//! Formats as a specification: ties, subnormals, overflow, NaN, and every e4m3 code.

use super::*;

#[test]
fn e4m3_has_256_codes() {
    for code in 0..=255u64 {
        let (s, e, m) = (code >> 7, code >> 3 & 15, (code & 7) as f64);
        let want = if e == 0 { m / 8.0 * 2f64.powi(-6) } else { (1.0 + m / 8.0) * 2f64.powi(e as i32 - 7) };
        let want = if s == 1 { -want } else { want };
        let got = decode(code, Ty::E4m3);
        if code & 0x7f == 0x7f {
            assert!(got.is_nan());
            continue;
        }
        assert_eq!(got, want, "{code:#x}");
        assert_eq!(encode(round_to(got, format(Ty::E4m3), Round::Nearest), Ty::E4m3), code);
    }
}

#[test]
fn rounds_to_nearest_even() {
    let cases: &[(f64, Ty, f64)] = &[
        (1.0 + 1.0 / 256.0, Ty::Bf16, 1.0),
        (1.0 + 3.0 / 256.0, Ty::Bf16, 1.0 + 4.0 / 256.0),
        (1.0 + 1.0 / 2048.0, Ty::F16, 1.0),
        (65519.0, Ty::F16, 65504.0),
        (65520.0, Ty::F16, f64::INFINITY),
        (2f64.powi(-25), Ty::F16, 0.0),
        (1.5 * 2f64.powi(-24), Ty::F16, 2f64.powi(-23)),
        (17.0, Ty::E4m3, 16.0),
        (19.0, Ty::E4m3, 20.0),
        (2f64.powi(-10), Ty::E4m3, 0.0),
        (1.5 * 2f64.powi(-9), Ty::E4m3, 2f64.powi(-8)),
    ];
    for (x, ty, want) in cases {
        assert_eq!(round_to(*x, format(*ty), Round::Nearest), *want, "{x} {ty:?}");
        assert_eq!(round_to(-*x, format(*ty), Round::Nearest), -*want, "-{x} {ty:?}");
    }
}

#[test]
fn rounds_in_a_direction() {
    let f = format(Ty::Bf16);
    let x = 1.0 + 1.0 / 1024.0;
    let up = 1.0 + 1.0 / 128.0;
    assert_eq!(round_to(x, f, Round::Zero), 1.0);
    assert_eq!(round_to(x, f, Round::Minus), 1.0);
    assert_eq!(round_to(x, f, Round::Plus), up);
    assert_eq!(round_to(-x, f, Round::Minus), -up);
    assert_eq!(round_to(1e39, f, Round::Zero), f.max);
    assert_eq!(round_to(1e39, f, Round::Plus), f64::INFINITY);
}

#[test]
fn bf16_of_f32_agrees_with_the_general_rounding() {
    for i in 0..200_000u32 {
        let x = f32::from_bits(i.wrapping_mul(21_474));
        let want = if x.is_nan() {
            0x7fff
        } else {
            encode(round_to(f64::from(x), format(Ty::Bf16), Round::Nearest), Ty::Bf16)
        };
        assert_eq!(u64::from(f32_to_bf16(x)), want, "{x}");
    }
    assert_eq!(f32_to_bf16(f32::NAN), 0x7fff);
    assert_eq!(f32_to_bf16(-0.0), 0x8000);
}

#[test]
fn approximations_stay_within_their_bounds() {
    use crate::inst::Alu;
    for seed in 0..4 {
        for i in 1..2000 {
            let x = i as f32 * 0.013;
            let w = f64::from(x);
            let ulps = |kind, exact: f64| {
                let got = approx::approximate(kind, x, 1.0, true, seed);
                (f64::from(got) - exact).abs() / (f64::from((exact as f32).next_up()) - f64::from(exact as f32))
            };
            assert!(ulps(Alu::Ex2, w.exp2()) <= 2.0);
            assert!(ulps(Alu::Rcp, 1.0 / w) <= 1.0);
            assert!(ulps(Alu::Sqrt, w.sqrt()) <= 1.0);
        }
        assert_eq!(approx::approximate(Alu::Ex2, 0.0, 0.0, true, seed), 1.0);
        assert_eq!(approx::approximate(Alu::Ex2, f32::NEG_INFINITY, 0.0, true, seed), 0.0);
        assert_eq!(approx::approximate(Alu::Rcp, 0.0, 0.0, true, seed), f32::INFINITY);
        assert_eq!(approx::approximate(Alu::Lg2, 0.0, 0.0, true, seed), f32::NEG_INFINITY);
    }
}
