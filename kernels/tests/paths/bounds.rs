//! Bounds of many pages: as one by one where digests are plain, never too low where they have 8 bits a value.

use crate::common::{Draw, paths, rounded, scalar, stored};
use kvoyant_kernels::{Dtype, Kernels};
use proptest::prelude::*;

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop::sample::select(Dtype::ALL.to_vec())
}

/// Keys of a page, with what makes a digest hard: channels far from 0, outliers, constants, zeros, any size.
fn keys(draw: &mut Draw, n: usize, d: usize, size: f32) -> Vec<f32> {
    let kinds: Vec<usize> = (0..d).map(|_| draw.below(8)).collect();
    let offsets = draw.values(d, 40.0 * size);
    (0..n * d)
        .map(|i| match kinds[i % d] {
            0 => draw.value(100.0 * size),
            1 => offsets[i % d] + draw.value(size * 1e-3),
            2 => offsets[i % d],
            3 => 0.0,
            _ => draw.value(size),
        })
        .collect()
}

fn min_max(keys: &[f32], d: usize) -> Vec<f32> {
    let mut minmax: Vec<f32> =
        [f32::INFINITY, f32::NEG_INFINITY].iter().flat_map(|end| vec![*end; d]).collect();
    scalar().min_max_update(keys, d, &mut minmax);
    minmax
}

fn dims() -> impl Strategy<Value = usize> {
    prop_oneof![Just(64_usize), Just(128), 1_usize..140, Just(192), Just(256), Just(320), Just(576)]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn pages_together_get_the_bounds_of_each(
        dtype in dtypes(), group in 1_usize..9, d in dims(), pages in 0_usize..11, skew in 0_usize..4, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let queries = draw.values(group * d, 3.0);
        let ends: Vec<f32> = (0..pages)
            .flat_map(|_| min_max(&rounded(dtype, &keys(&mut draw, 3, d, 2.0)), d))
            .collect();
        let blocks = stored(dtype, &ends, skew);
        let stride = pages + 2;
        for kernels in paths() {
            let mut out = vec![7.0; group * stride];
            kernels.page_bounds_many(dtype, &queries, group, &blocks[skew..], pages, &mut out, stride);
            for (p, ends) in ends.chunks_exact(2 * d).enumerate() {
                let mut bounds = vec![0.0; group];
                kernels.page_bounds(&queries, group, ends, &mut bounds);
                for (h, bound) in bounds.iter().enumerate() {
                    prop_assert_eq!(out[h * stride + p], *bound, "page {} on {}", p, kernels.path());
                }
            }
        }
    }

    #[test]
    fn eight_bits_hold_every_range(d in dims(), exponent in -44_i32..36, seed in any::<u64>()) {
        let size = 10_f32.powi(exponent);
        let minmax = min_max(&keys(&mut Draw::new(seed), 4, d, size), d);
        let mut digest = vec![0; Kernels::bounds_i8_bytes(d)];
        Kernels::best().encode_bounds_i8(&minmax, &mut digest);
        let mut read = vec![0.0; 2 * d];
        Kernels::best().decode_bounds_i8(&digest, &mut read);
        // A scale is shared by at most 16 channels of four adjacent lanes.
        let largest = minmax.iter().fold(0_f32, |largest, end| largest.max(end.abs()));
        for j in 0..d {
            prop_assert!(read[j] <= minmax[j] && read[d + j] >= minmax[d + j], "channel {}", j);
            let widened = (minmax[j] - read[j]).max(read[d + j] - minmax[d + j]);
            prop_assert!(widened <= largest / 126.0 + 1e-44, "channel {} is {} wider", j, widened);
        }
    }

    #[test]
    fn what_was_read_is_stored_as_the_same_bytes(d in dims(), exponent in -44_i32..36, seed in any::<u64>()) {
        let mut draw = Draw::new(seed);
        let ends = min_max(&keys(&mut draw, 5, d, 10_f32.powi(exponent)), d);
        let mut digest = vec![0; Kernels::bounds_i8_bytes(d)];
        scalar().encode_bounds_i8(&ends, &mut digest);
        let mut read = vec![0.0; 2 * d];
        scalar().decode_bounds_i8(&digest, &mut read);
        let mut again = vec![0xff; digest.len()];
        scalar().encode_bounds_i8(&read, &mut again);
        prop_assert_eq!(again, digest);
    }

    #[test]
    fn bounds_of_eight_bits_are_never_too_low(
        group in 1_usize..11, d in dims(), pages in 1_usize..7, q_exponent in -20_i32..12, k_exponent in -22_i32..15, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let (q_size, k_size) = (10_f32.powi(q_exponent), 10_f32.powi(k_exponent));
        let mut queries = draw.values(group * d, q_size);
        for _ in 0..d / 20 {
            let outlier = draw.below(group * d);
            queries[outlier] *= 50.0;
        }
        let page_keys: Vec<Vec<f32>> = (0..pages).map(|_| keys(&mut draw, 5, d, k_size)).collect();
        let minmax: Vec<Vec<f32>> = page_keys.iter().map(|keys| min_max(keys, d)).collect();
        let bytes = Kernels::bounds_i8_bytes(d);
        let mut blocks = vec![0; 1 + pages * bytes];
        for (minmax, digest) in minmax.iter().zip(blocks[1..].chunks_exact_mut(bytes)) {
            scalar().encode_bounds_i8(minmax, digest);
        }
        let mut expected = vec![0.0; group * pages];
        scalar().page_bounds_i8(&queries, group, &blocks[1..], pages, &mut expected, pages);
        for kernels in paths() {
            let stride = pages + 1;
            let mut out = vec![7.0; group * stride];
            kernels.page_bounds_i8(&queries, group, &blocks[1..], pages, &mut out, stride);
            for p in 0..pages {
                let mut exact = vec![0.0; group];
                kernels.page_bounds(&queries, group, &minmax[p], &mut exact);
                for (h, query) in queries.chunks_exact(d).enumerate() {
                    let bound = out[h * stride + p];
                    prop_assert_eq!(bound, expected[h * pages + p], "another bound on {}", kernels.path());
                    prop_assert!(bound >= exact[h], "{} is below the bound {} on {}", bound, exact[h], kernels.path());
                    let ends = minmax[p][..d].iter().zip(&minmax[p][d..]);
                    let real: f64 = query.iter().zip(ends.clone()).map(|(q, (min, max))| {
                        (f64::from(*q) * f64::from(*min)).max(f64::from(*q) * f64::from(*max))
                    }).sum();
                    prop_assert!(f64::from(bound) >= real, "{} is below the real bound {}", bound, real);
                    for key in page_keys[p].chunks_exact(d) {
                        prop_assert!(bound >= kernels.dot(query, key), "a key's score is above the bound");
                    }
                    // Each channel is off by a few hundredths of the largest one that shares its scale at most.
                    let q_top = query.iter().fold(0_f32, |top, q| top.max(q.abs()));
                    let k_top = minmax[p].iter().fold(0_f32, |top, k| top.max(k.abs()));
                    let most = f64::from(q_top) * f64::from(k_top) * d as f64 * 0.02 + 1e-35;
                    prop_assert!(f64::from(bound) - real <= most, "{} is {} above", bound, f64::from(bound) - real);
                }
            }
        }
    }
}

#[test]
fn an_outlier_channel_leaves_the_others_their_precision() {
    let d = 128;
    let mut draw = Draw::new(3);
    let mut minmax = min_max(&draw.values(8 * d, 1.0), d);
    // A rotary pair with a hundred times the size.
    for j in [5, 69] {
        minmax[j] *= 100.0;
        minmax[d + j] *= 100.0;
    }
    let mut digest = vec![0; Kernels::bounds_i8_bytes(d)];
    scalar().encode_bounds_i8(&minmax, &mut digest);
    let mut read = vec![0.0; 2 * d];
    scalar().decode_bounds_i8(&digest, &mut read);
    let widened = |j: usize| (minmax[j] - read[j]).max(read[d + j] - minmax[d + j]);
    let spoiled = (0..d).filter(|j| widened(*j) > 0.01).count();
    assert!(spoiled <= 16, "{spoiled} channels share the outliers' scale");
}

#[test]
fn digests_have_the_bytes_that_are_said() {
    let bytes = [64, 80, 128, 192, 256, 576].map(Kernels::bounds_i8_bytes);
    assert_eq!(bytes, [144, 288, 288, 448, 576, 1296]);
    assert_eq!(Kernels::bounds_i8_bytes(0), 0);
}

#[test]
fn nothing_that_is_stored_or_asked_breaks_anything() {
    let d = 70;
    for odd in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::MAX, f32::MIN] {
        let mut digest = vec![0; Kernels::bounds_i8_bytes(d)];
        Kernels::best().encode_bounds_i8(&vec![odd; 2 * d], &mut digest);
        let rubbish = vec![0xff; Kernels::bounds_i8_bytes(d)];
        for kernels in paths() {
            let mut out = [0.0];
            for digest in [&digest, &rubbish] {
                kernels.page_bounds_i8(&vec![1.0; d], 1, digest, 1, &mut out, 1);
                kernels.page_bounds_i8(&vec![odd; d], 1, digest, 1, &mut out, 1);
            }
            let mut fine = vec![0; Kernels::bounds_i8_bytes(d)];
            kernels.encode_bounds_i8(&vec![1.0; 2 * d], &mut fine);
            kernels.page_bounds_i8(&vec![odd; d], 1, &fine, 1, &mut out, 1);
            assert!(out[0].is_nan() != odd.is_finite(), "{odd} gave {}", out[0]);
        }
    }
}
