//! Promises of single kernels: Quest's bound, the exponential, conversions, the override of the path.

use crate::common::{Draw, paths, rounded, scalar};
use kvoyant_kernels::{Dtype, Kernels, Path, PathError};
use proptest::prelude::*;

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn a_pages_bound_is_never_below_one_of_its_scores(
        group in 1_usize..6, d in 1_usize..140, n in 1_usize..40, size in 1e-3_f32..1e4, offset in -1e3_f32..1e3, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let queries = draw.values(group * d, 5.0);
        // Channels that are nearly constant, far from 0: where a careless bound fails.
        let keys: Vec<f32> = draw.values(n * d, size).iter().map(|value| value + offset).collect();
        let keys = rounded(Dtype::F16, &keys.iter().map(|value| value.clamp(-6e4, 6e4)).collect::<Vec<_>>());
        for kernels in paths() {
            let mut minmax: Vec<f32> = [f32::INFINITY, f32::NEG_INFINITY].iter().flat_map(|end| vec![*end; d]).collect();
            kernels.min_max_update(&keys, d, &mut minmax);
            let mut bounds = vec![0.0; group];
            kernels.page_bounds(&queries, group, &minmax, &mut bounds);
            for (query, bound) in queries.chunks_exact(d).zip(&bounds) {
                for key in keys.chunks_exact(d) {
                    prop_assert!(kernels.dot(query, key) <= *bound, "on {}", kernels.path());
                }
            }
        }
    }

    #[test]
    fn a_page_of_one_row_is_bounded_by_its_score(group in 1_usize..6, d in 1_usize..140, seed in any::<u64>()) {
        let mut draw = Draw::new(seed);
        let (queries, key) = (draw.values(group * d, 5.0), draw.values(d, 5.0));
        for kernels in paths() {
            let mut bounds = vec![0.0; group];
            kernels.page_bounds(&queries, group, &[key.clone(), key.clone()].concat(), &mut bounds);
            for (query, bound) in queries.chunks_exact(d).zip(&bounds) {
                prop_assert_eq!(kernels.dot(query, &key), *bound, "on {}", kernels.path());
            }
        }
    }
}

#[test]
fn the_exponential_is_within_two_ulp() {
    for kernels in paths() {
        for i in 0..200_000_u32 {
            let x = -(i as f32) * 4.3e-4;
            let exact = f64::from(x).exp();
            let ulp = f64::from((exact as f32).next_up() - exact as f32);
            let error = (f64::from(kernels.exp_sum(&[x], 0.0)) - exact).abs() / ulp;
            assert!(error <= 2.0, "exp({x}) is off by {error} ulp on {}", kernels.path());
        }
        assert_eq!(kernels.exp_sum(&[f32::NEG_INFINITY, 0.0], 0.0), 1.0);
        assert_eq!(kernels.exp_sum(&[f32::NEG_INFINITY], f32::NEG_INFINITY), 0.0);
        assert!(kernels.exp_sum(&[f32::NAN, 0.0], 0.0).is_nan());
    }
}

#[test]
fn every_half_comes_back_as_itself() {
    let bytes: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
    for dtype in [Dtype::F16, Dtype::Bf16] {
        for kernels in paths() {
            let mut values = vec![0.0; 1 << 16];
            kernels.to_f32(dtype, &bytes, &mut values);
            let mut back = vec![0; bytes.len()];
            kernels.from_f32(dtype, &values, &mut back);
            for (i, (bits, value)) in back.chunks_exact(2).zip(&values).enumerate() {
                let bits = u16::from_le_bytes([bits[0], bits[1]]);
                // A signalling NaN may come back as a quiet one.
                assert!(
                    usize::from(bits) == i || value.is_nan(),
                    "{i:#06x} became {bits:#06x} on {}",
                    kernels.path()
                );
            }
        }
    }
}

#[test]
fn values_between_two_halves_go_to_the_even_one() {
    let cases = [
        (Dtype::F16, 1.0 + 0.5_f32.powi(11), 1.0),
        (Dtype::F16, 1.0 + 3.0 * 0.5_f32.powi(11), 1.0 + 0.5_f32.powi(9)),
        (Dtype::F16, 65_519.0, 65_504.0),
        (Dtype::F16, 65_520.0, f32::INFINITY),
        (Dtype::F16, 0.5_f32.powi(25), 0.0),
        (Dtype::Bf16, 1.0 + 0.5_f32.powi(8), 1.0),
        (Dtype::Bf16, 1.0 + 3.0 * 0.5_f32.powi(8), 1.0 + 0.5_f32.powi(6)),
        (Dtype::Bf16, f32::MAX, f32::INFINITY),
    ];
    for (dtype, value, expected) in cases {
        for kernels in paths() {
            let (mut bytes, mut back) = ([0; 2], [0.0]);
            kernels.from_f32(dtype, &[value], &mut bytes);
            kernels.to_f32(dtype, &bytes, &mut back);
            assert_eq!(back, [expected], "{value} as {dtype} on {}", kernels.path());
        }
    }
}

#[test]
fn nothing_of_all_minus_infinity() {
    for kernels in paths() {
        let (mut values, mut acc) = ([f32::NEG_INFINITY; 5], [1.0; 5]);
        kernels.softmax_add(&values, 1.0, &mut acc);
        kernels.softmax_in_place(&mut values);
        assert_eq!((values, acc), ([0.0; 5], [1.0; 5]));
        assert_eq!(kernels.max(&[]), f32::NEG_INFINITY);
        assert_eq!(kernels.max(&[f32::NAN, 1.0, f32::NAN]), 1.0);
        kernels.softmax_in_place(&mut []);
        kernels.softmax_add(&[], 1.0, &mut []);
    }
}

#[test]
fn paths_have_names_and_scalar_is_everywhere() {
    for path in Path::ALL {
        assert_eq!(path.to_string().parse(), Ok(path));
        assert_eq!(Kernels::on(path).is_ok(), path.is_available());
    }
    assert_eq!(scalar().path(), Path::Scalar);
    assert!(Path::best().is_available());
    assert_eq!("sse9".parse::<Path>(), Err(PathError::Unknown { text: "sse9".to_owned() }));
}

#[test]
#[should_panic(expected = "score_columns: block of 4 bytes")]
fn a_block_that_is_too_short_is_refused() {
    Kernels::best().score_columns(Dtype::F16, &[1.0, 2.0], 1, &[0; 4], 4, &mut [0.0; 4], 4);
}

#[test]
#[should_panic(expected = "score_columns: 8 places")]
fn a_stride_that_would_wrap_around_is_refused() {
    Kernels::best().score_columns(Dtype::F16, &[1.0; 3], 3, &[0; 8], 4, &mut [0.0; 8], 1 << 63);
}
