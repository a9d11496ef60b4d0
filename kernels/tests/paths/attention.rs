//! Attention over runs: against a plain f64 softmax, over every split into runs, and merged from parts.

use crate::common::{Draw, attend, close, cut, paths, rounded, stored};
use kvoyant_kernels::{AttendScratch, Dtype, Kernels, Run};
use proptest::prelude::*;

/// Attention in f64, from rows `[k | v]` as values.
fn plain(queries: &[f32], d: usize, scale: f32, rows: &[f32]) -> (Vec<f32>, Vec<f32>) {
    let (mut out, mut lses) = (Vec::new(), Vec::new());
    for query in queries.chunks_exact(d) {
        let dot =
            |row: &[f32]| row.iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>();
        let scores: Vec<f64> =
            rows.chunks_exact(2 * d).map(|row| f64::from(scale) * dot(&row[..d])).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - top).exp()).sum();
        let mean = |j: usize| {
            let terms = scores.iter().zip(rows.chunks_exact(2 * d));
            (terms.map(|(score, row)| (score - top).exp() * f64::from(row[d + j])).sum::<f64>() / sum) as f32
        };
        out.extend((0..d).map(mean));
        lses.push((top + sum.ln()) as f32);
    }
    (out, lses)
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop::sample::select(Dtype::ALL.to_vec())
}

fn dims() -> impl Strategy<Value = usize> {
    prop_oneof![Just(64_usize), Just(128), 1_usize..100]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn attention_is_softmax_of_scores_times_values(
        dtype in dtypes(), group in 1_usize..9, d in dims(), n in 1_usize..90, skew in 0_usize..4, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let (queries, rows) = (draw.values(group * d, 3.0), rounded(dtype, &draw.values(n * 2 * d, 3.0)));
        let bytes = stored(dtype, &rows, skew);
        let scale = 1.0 / (d as f32).sqrt();
        let (expected, expected_lse) = plain(&queries, d, scale, &rows);
        for kernels in paths() {
            let runs = cut(&mut draw, &bytes[skew..], n, 2 * d * dtype.bytes());
            let (out, lse) = attend(kernels, dtype, &queries, d, scale, &runs);
            close("attention", &out, &expected, 2e-5);
            close("lse", &lse, &expected_lse, 1e-5);
        }
    }

    #[test]
    fn the_split_into_runs_changes_no_bit(
        dtype in dtypes(), group in 1_usize..9, d in dims(), n in 1_usize..200, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let queries = draw.values(group * d, 3.0);
        let bytes = stored(dtype, &draw.values(n * 2 * d, 3.0), 0);
        let row_bytes = 2 * d * dtype.bytes();
        // The same rows once more, far from one another and at odd addresses.
        let far: Vec<Vec<u8>> = bytes.chunks_exact(row_bytes).map(|row| [&[0], row].concat()).collect();
        let singles: Vec<Run> = far.iter().map(|row| Run::new(row[1..].as_ptr(), 1)).collect();
        for kernels in paths() {
            let whole = attend(kernels, dtype, &queries, d, 0.3, &[Run::new(bytes.as_ptr(), n)]);
            prop_assert_eq!(&attend(kernels, dtype, &queries, d, 0.3, &singles), &whole);
            for _ in 0..3 {
                let runs = cut(&mut draw, &bytes, n, row_bytes);
                prop_assert_eq!(&attend(kernels, dtype, &queries, d, 0.3, &runs), &whole);
            }
        }
    }

    #[test]
    fn a_query_gets_the_same_answer_alone_and_in_its_group(
        dtype in dtypes(), group in 2_usize..9, d in dims(), n in 1_usize..60, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let queries = draw.values(group * d, 3.0);
        let bytes = stored(dtype, &draw.values(n * 2 * d, 3.0), 0);
        let runs = [Run::new(bytes.as_ptr(), n)];
        for kernels in paths() {
            let (out, lse) = attend(kernels, dtype, &queries, d, 0.2, &runs);
            for (h, query) in queries.chunks_exact(d).enumerate() {
                let alone = attend(kernels, dtype, query, d, 0.2, &runs);
                prop_assert_eq!(&alone, &(out[h * d..][..d].to_vec(), vec![lse[h]]));
            }
        }
    }

    #[test]
    fn scores_are_the_dots_with_the_keys(
        dtype in dtypes(), group in 1_usize..9, d in dims(), n in 0_usize..60, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let (queries, rows) = (draw.values(group * d, 3.0), rounded(dtype, &draw.values(n * 2 * d, 3.0)));
        let bytes = stored(dtype, &rows, 0);
        for kernels in paths() {
            let runs = cut(&mut draw, &bytes, n, 2 * d * dtype.bytes());
            let mut out = vec![0.0; group * n];
            // SAFETY: the runs are cut from `bytes`.
            unsafe { kernels.scores(dtype, &queries, group, d, &runs, &mut out, n) };
            let dots: Vec<f32> = queries
                .chunks_exact(d)
                .flat_map(|query| rows.chunks_exact(2 * d).map(|row| kernels.dot(query, &row[..d])).collect::<Vec<_>>())
                .collect();
            prop_assert_eq!(out, dots);
        }
    }

    #[test]
    fn merged_parts_equal_attention_over_their_union(
        group in 1_usize..5, d in dims(), n in 1_usize..80, parts in 1_usize..6, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let queries = draw.values(group * d, 4.0);
        let bytes = stored(Dtype::F32, &draw.values(n * 2 * d, 4.0), 0);
        let row_bytes = 8 * d;
        let mut split: Vec<Vec<Run>> = vec![Vec::new(); parts];
        for t in 0..n {
            split[draw.below(parts)].push(Run::new(bytes[t * row_bytes..].as_ptr(), 1));
        }
        for kernels in paths() {
            let (whole, whole_lse) = attend(kernels, Dtype::F32, &queries, d, 0.5, &[Run::new(bytes.as_ptr(), n)]);
            let (mut o, mut lse) = (vec![0.0; group * d], vec![f32::NEG_INFINITY; group]);
            for runs in &split {
                let (part, part_lse) = attend(kernels, Dtype::F32, &queries, d, 0.5, runs);
                kernels.merge(&mut o, &mut lse, &part, &part_lse);
            }
            close("merged output", &o, &whole, 1e-5);
            close("merged lse", &lse, &whole_lse, 1e-5);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(16))]

    #[test]
    fn long_sequences_hold_the_same_promises(
        dtype in dtypes(), group in 1_usize..4, d in prop_oneof![Just(8_usize), Just(64)], n in 500_usize..2500, rising in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let queries = draw.values(group * d, 3.0);
        let mut rows = draw.values(n * 2 * d, 2.0);
        if rising {
            // Keys that look more and more like the first query: the largest score is always a late one.
            for (t, row) in rows.chunks_exact_mut(2 * d).enumerate() {
                row[..d].iter_mut().zip(&queries).for_each(|(k, q)| *k += q * t as f32 / n as f32);
            }
        }
        let rows = rounded(dtype, &rows);
        let bytes = stored(dtype, &rows, 0);
        let (expected, expected_lse) = plain(&queries, d, 0.5, &rows);
        for kernels in paths() {
            let whole = attend(kernels, dtype, &queries, d, 0.5, &[Run::new(bytes.as_ptr(), n)]);
            close("attention", &whole.0, &expected, 2e-5);
            close("lse", &whole.1, &expected_lse, 1e-5);
            let runs = cut(&mut draw, &bytes, n, 2 * d * dtype.bytes());
            prop_assert_eq!(&attend(kernels, dtype, &queries, d, 0.5, &runs), &whole);
        }
    }
}

#[test]
fn no_rows_give_nothing() {
    for kernels in paths() {
        let (out, lse) = attend(kernels, Dtype::F16, &[1.0; 6], 3, 1.0, &[Run::new(std::ptr::null(), 0)]);
        assert_eq!(out, [0.0; 6]);
        assert_eq!(lse, [f32::NEG_INFINITY; 2]);
    }
}

#[test]
fn a_nan_in_a_key_reaches_the_answer() {
    for kernels in paths() {
        let rows = stored(Dtype::F32, &[1.0, 2.0, f32::NAN, 3.0], 0);
        let (out, _) = attend(kernels, Dtype::F32, &[1.0], 1, 1.0, &[Run::new(rows.as_ptr(), 2)]);
        assert!(out[0].is_nan(), "on {}", kernels.path());
    }
}

#[test]
fn a_scratch_that_was_used_for_more_rows_does_no_harm() {
    let mut draw = Draw::new(5);
    let bytes = stored(Dtype::F16, &draw.values(50 * 32, 2.0), 0);
    let query = draw.values(16, 2.0);
    let mut scratch = AttendScratch::default();
    let answer = |scratch: &mut AttendScratch, kernels: Kernels, n: usize| {
        let (mut out, mut lse) = ([0.0; 16], [0.0]);
        let runs = [Run::new(bytes.as_ptr(), n)];
        // SAFETY: the run lies within `bytes`.
        unsafe { kernels.attend(Dtype::F16, &query, 1, 16, 0.25, &runs, scratch, &mut out, &mut lse) };
        (out, lse)
    };
    for kernels in paths() {
        let fresh = answer(&mut AttendScratch::default(), kernels, 7);
        answer(&mut scratch, kernels, 50);
        assert_eq!(answer(&mut scratch, kernels, 7), fresh);
    }
}
