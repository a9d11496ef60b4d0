//! Attention over digests in codes: every path gives the twin's scores, margins hold whatever the pages and queries, and what is left out
//! is summed to the safe side.

use crate::common::{Draw, close, paths, scalar};
use half::f16;
use kvoyant_kernels::{
    CodeBits, CodeLayout, CodeOut, CodeScan, CodeSums, CodeTaken, CodeTotal, CodeWeighing, CodeWeights,
    Kernels,
};
use proptest::prelude::*;

fn layouts() -> impl Strategy<Value = CodeLayout> {
    let bits = prop::sample::select(vec![CodeBits::Four, CodeBits::Six]);
    let shapes = vec![(16, 16), (32, 16), (32, 32), (64, 16), (64, 32), (64, 64), (96, 96), (192, 64)];
    let dims = prop_oneof![1_usize..80, prop::sample::select(vec![64, 96, 128, 192, 250])];
    (dims, 1_usize..40, prop::sample::select(shapes), bits)
        .prop_map(|(d, dv, (rows, group), bits)| CodeLayout::new(d, dv, rows, bits, group).unwrap())
}

/// Kinds of channels: offset and range.
fn channel(draw: &mut Draw, kind: usize) -> (f32, f32) {
    match (kind, draw.below(8)) {
        // Next to nothing, and the edges of f16.
        (1, 0..3) => (draw.value(1e-6), draw.value(1e-7)),
        (1, _) => ([6e-8, 6.1e-5, -6e-8, 65504.0, -65504.0][draw.below(5)], 0.0),
        // Large offsets: constant ones, and nearly so.
        (2, 0..4) => ((draw.value(60e3) / 64.0).round() * 64.0, 0.0),
        (2, _) => (draw.value(4e3), draw.value(1e-2)),
        // One of eight dominates.
        (3, 0) => (draw.value(3e4), draw.value(3e4)),
        (3, _) => (draw.value(0.1), draw.value(0.1)),
        (4, _) => (0.0, 0.0),
        _ => (draw.value(2.0), 1.0 + draw.value(2.0)),
    }
}

/// Pages of keys, `[pages][rows][d]`.
fn keys(draw: &mut Draw, layout: &CodeLayout, pages: usize, kind: usize) -> Vec<f32> {
    let mut keys = Vec::new();
    for _ in 0..pages {
        let channels: Vec<_> = (0..layout.head_dim()).map(|_| channel(draw, kind)).collect();
        for _ in 0..layout.rows() {
            keys.extend(
                channels.iter().map(|(offset, range)| (offset + draw.value(*range)).clamp(-65504.0, 65504.0)),
            );
        }
    }
    keys
}

/// The blocks of pages, `skew` bytes into the vector.
fn digest(draw: &mut Draw, layout: &CodeLayout, keys: &[f32], skew: usize) -> Vec<u8> {
    let pages = keys.len() / (layout.rows() * layout.head_dim());
    let mut blocks = vec![0; skew + pages * layout.bytes()];
    for (keys, block) in keys
        .chunks_exact(layout.rows() * layout.head_dim())
        .zip(blocks[skew..].chunks_exact_mut(layout.bytes()))
    {
        let values = draw.values(layout.rows() * layout.value_dim(), 3.0);
        layout.encode(keys, &values, block);
    }
    blocks
}

/// Offsets and steps of a page's group.
fn ranges(layout: &CodeLayout, block: &[u8], group: usize) -> (Vec<f32>, Vec<f32>) {
    let width = layout.head_dim().next_multiple_of(16);
    let codes = if layout.bits() == CodeBits::Four { 8 } else { 12 } * width;
    let at = group * (4 * width + layout.group() / 16 * codes);
    let read = |at: usize| f16::from_le_bytes([block[at], block[at + 1]]).to_f32();
    let all = |at: usize| (0..layout.head_dim()).map(|j| read(at + 2 * j)).collect();
    (all(at), all(at + 2 * width))
}

/// A query for a page: of ordinary size, huge, tiny, of one channel, none; or all that takes one row's score off.
fn query(draw: &mut Draw, layout: &CodeLayout, keys: &[f32], block: &[u8], kind: usize) -> Vec<f32> {
    let d = layout.head_dim();
    let size = [3.0, 1e-3, 1e-20, 1e-42, 1e25, 3e38][draw.below(6)];
    match kind {
        0 => draw.values(d, 3.0),
        1 => draw.values(d, size),
        2 => {
            let mut one = vec![0.0; d];
            one[draw.below(d)] = size;
            one
        }
        3 => vec![0.0; d],
        _ => {
            let row = draw.below(layout.rows());
            let mut decoded = vec![0.0; layout.rows() * d];
            layout.decode_keys(block, &mut decoded);
            let (_, steps) = ranges(layout, block, row / layout.group());
            let off = |j: usize| keys[row * d + j] - decoded[row * d + j];
            let along = |j: usize| if steps[j] > 0.0 { off(j) / steps[j] / steps[j] } else { 0.0 };
            // So that margins are some tenths.
            let largest = (0..d).map(|j| (along(j) * steps[j]).abs()).fold(1e-9, f32::max);
            (0..d).map(|j| along(j) / largest).collect()
        }
    }
}

fn scores(
    kernels: Kernels,
    layout: &CodeLayout,
    queries: &[f32],
    scale: f32,
    blocks: &[u8],
) -> (Vec<f32>, Vec<f32>) {
    let (group, pages) = (queries.len() / layout.head_dim(), blocks.len() / layout.bytes());
    // A little more than there must be: what lies between is left alone.
    let (stride, margin_stride) = (pages * layout.rows() + 3, pages * layout.groups() + 1);
    let (mut out, mut margins) = (vec![7.0; group * stride], vec![7.0; group * margin_stride]);
    let scan = CodeScan { layout, queries, group, scale, blocks };
    let mut into = CodeOut { rows: &mut out, stride, margins: &mut margins, margin_stride };
    kernels.code_scores(&scan, &mut into);
    (out, margins)
}

/// A margin and what it was made for.
struct Margin<'a> {
    of_layout: &'a CodeLayout,
    scale: f32,
    query: &'a [f32],
    offsets: &'a [f32],
    steps: &'a [f32],
    error: f32,
    margin: f32,
}

fn norm(values: impl Iterator<Item = f32>) -> f32 {
    values.map(|value| f64::from(value).powi(2)).sum::<f64>().sqrt() as f32
}

/// How many scores are further from those of the keys, in f64, than a margin that `spoil` has changed.
fn violations(
    layout: &CodeLayout,
    (keys, blocks): (&[f32], &[u8]),
    queries: &[f32],
    scale: f32,
    spoil: impl Fn(&Margin<'_>) -> f32,
) -> usize {
    let (d, rows, groups) = (layout.head_dim(), layout.rows(), layout.groups());
    let pages = blocks.len() / layout.bytes();
    let (out, margins) = scores(Kernels::best(), layout, queries, scale, blocks);
    let (stride, margin_stride) = (pages * rows + 3, pages * groups + 1);
    let mut count = 0;
    for (h, query) in queries.chunks_exact(d).enumerate() {
        for (page, block) in blocks.chunks_exact(layout.bytes()).enumerate() {
            for g in 0..groups {
                let (offsets, steps) = ranges(layout, block, g);
                let margin = spoil(&Margin {
                    of_layout: layout,
                    scale,
                    query,
                    offsets: &offsets,
                    steps: &steps,
                    error: layout.error(block, g),
                    margin: margins[h * margin_stride + page * groups + g],
                });
                for row in page * rows + g * layout.group()..page * rows + (g + 1) * layout.group() {
                    let key = &keys[row * d..][..d];
                    let dot: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
                    let off = (f64::from(scale) * dot - f64::from(out[h * stride + row])).abs();
                    count += usize::from(off.is_nan() || margin.is_nan() || off > f64::from(margin));
                }
            }
        }
    }
    count
}

/// Without what the sum with the offsets may have lost.
fn without_rounding(m: &Margin<'_>) -> f32 {
    let terms = f32::EPSILON * (m.of_layout.head_dim().next_multiple_of(16) as f32 / 16.0 + 8.0);
    m.margin - m.scale * terms * norm(m.query.iter().copied()) * norm(m.offsets.iter().copied())
}

/// As if no row were further from its codes than a quarter of a step in each channel.
fn with_quarter_steps(m: &Margin<'_>) -> f32 {
    let weights = norm(m.query.iter().zip(m.steps).map(|(q, step)| q * step));
    m.margin - m.scale * weights * (m.error - 0.25 * (m.of_layout.head_dim() as f32).sqrt())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn scores_and_margins_are_the_twins_to_the_last_bit(
        layout in layouts(), group in 1_usize..10, pages in 0_usize..5, skew in 0_usize..3, kind in 0_usize..5, odd in any::<bool>(),
        seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let keys = keys(&mut draw, &layout, pages, kind);
        let blocks = digest(&mut draw, &layout, &keys, skew);
        let mut queries = draw.values(group * layout.head_dim(), 3.0);
        if odd {
            let at = draw.below(queries.len());
            queries[at] = [f32::NAN, f32::INFINITY, -3e38, 1e30, 1e-41][draw.below(5)];
        }
        let expected = scores(scalar(), &layout, &queries, 0.125, &blocks[skew..]);
        let bits = |values: &[f32]| values.iter().map(|value| value.to_bits()).collect::<Vec<_>>();
        for kernels in paths() {
            let found = scores(kernels, &layout, &queries, 0.125, &blocks[skew..]);
            prop_assert_eq!(bits(&found.0), bits(&expected.0), "scores on {}", kernels.path());
            prop_assert_eq!(bits(&found.1), bits(&expected.1), "margins on {}", kernels.path());
        }
    }

    #[test]
    fn no_score_is_further_off_than_its_margin(
        layout in layouts(), kind in 0_usize..5, queried in prop::collection::vec(0_usize..6, 1..6), seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let keys = keys(&mut draw, &layout, 1, kind);
        let blocks = digest(&mut draw, &layout, &keys, 0);
        let queries: Vec<f32> = queried.iter().flat_map(|kind| query(&mut draw, &layout, &keys, &blocks, *kind)).collect();
        let scale = 1.0 / (layout.head_dim() as f32).sqrt();
        prop_assert_eq!(violations(&layout, (&keys, &blocks), &queries, scale, |m| m.margin), 0);
    }
}

#[test]
fn margins_of_a_quarter_step_are_found_too_narrow() {
    let mut draw = Draw::new(11);
    for bits in [CodeBits::Four, CodeBits::Six] {
        let layout = CodeLayout::new(64, 4, 32, bits, 16).unwrap();
        let keys = keys(&mut draw, &layout, 1, 0);
        let blocks = digest(&mut draw, &layout, &keys, 0);
        let queries: Vec<f32> = (0..40).flat_map(|_| query(&mut draw, &layout, &keys, &blocks, 4)).collect();
        let count =
            |spoil: fn(&Margin<'_>) -> f32| violations(&layout, (&keys, &blocks), &queries, 0.125, spoil);
        assert_eq!(count(|m| m.margin), 0);
        assert!(count(with_quarter_steps) > 0, "{bits:?}");
    }
}

#[test]
fn margins_without_roundings_are_found_too_narrow() {
    let mut draw = Draw::new(12);
    let layout = CodeLayout::new(64, 4, 32, CodeBits::Four, 16).unwrap();
    // Nothing but offsets.
    let channels: Vec<f32> = (0..64).map(|_| (draw.value(60e3) / 64.0).round() * 64.0).collect();
    let keys: Vec<f32> = (0..32).flat_map(|_| channels.clone()).collect();
    let blocks = digest(&mut draw, &layout, &keys, 0);
    let queries = draw.values(64 * 40, 3e-3);
    let count = |spoil: fn(&Margin<'_>) -> f32| violations(&layout, (&keys, &blocks), &queries, 0.125, spoil);
    assert_eq!(count(|m| m.margin), 0);
    assert!(count(without_rounding) > 0);
}

#[test]
fn margins_of_ordinary_pages_are_of_use() {
    let mut draw = Draw::new(13);
    for (bits, most) in [(CodeBits::Four, 0.6), (CodeBits::Six, 0.15)] {
        let layout = CodeLayout::new(64, 4, 32, bits, 32).unwrap();
        let keys = keys(&mut draw, &layout, 20, 0);
        let blocks = digest(&mut draw, &layout, &keys, 0);
        let queries = draw.values(64 * 4, 3.0);
        let (_, margins) = scores(Kernels::best(), &layout, &queries, 0.125, &blocks);
        let mean = margins.iter().filter(|margin| **margin != 7.0).sum::<f32>() / 80.0;
        assert!(mean < most, "{bits:?}: {mean}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn weights_are_exponentials_of_the_scores_of_the_rows_that_count(
        layout in layouts(), group in 1_usize..10, pages in 1_usize..7, cut in 0_usize..7, rise in 0_usize..3, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let (d, all) = (layout.head_dim(), pages * layout.rows());
        let mut keys = keys(&mut draw, &layout, pages, 0);
        // Scores that rise from page to page, by less and by more than what references allow for.
        for (page, keys) in keys.chunks_exact_mut(layout.rows() * d).enumerate() {
            keys.iter_mut().step_by(d).for_each(|k| *k += (page * rise * 15) as f32);
        }
        let blocks = digest(&mut draw, &layout, &keys, 0);
        let mut queries = draw.values(group * d, 1.0);
        queries.iter_mut().step_by(d).for_each(|q| *q = 2.0);
        let from = draw.below(layout.rows());
        let rows = from..all - draw.below(layout.rows().min(all - from));
        let (scores, margins) = scores(scalar(), &layout, &queries, 0.5, &blocks);
        let (stride, margin_stride) = (all + 3, pages * layout.groups() + 1);
        let run = |kernels: Kernels, cut: usize| {
            let (mut weights, mut found) = (vec![7.0; group * stride], vec![7.0; group * margin_stride]);
            let mut totals = vec![CodeTotal::default(); group];
            let (first, rest) = blocks.split_at(cut * layout.bytes());
            for (blocks, before) in [(first, 0), (rest, cut)] {
                let scan = CodeScan { layout: &layout, queries: &queries, group, scale: 0.5, blocks };
                let mut out = CodeOut { rows: &mut weights, stride, margins: &mut found, margin_stride };
                kernels.code_weights(&scan, &mut CodeWeighing { before, rows: &rows, totals: &mut totals }, &mut out);
            }
            assert_eq!(found, margins, "on {}", kernels.path());
            (weights, totals)
        };
        let (twin, twin_totals) = run(scalar(), 0);
        for h in 0..group {
            let total = twin_totals[h];
            let counted = &scores[h * stride..][rows.clone()];
            let top = counted.iter().copied().fold(f32::NEG_INFINITY, f32::max);
            prop_assert!(top >= total.reference && top <= total.reference + 20.0, "{top} {total:?}");
            let exact: f64 = counted.iter().map(|score| f64::from(score - total.reference).exp()).sum();
            prop_assert!((total.sum - exact).abs() <= 1e-5 * exact, "{exact} {total:?}");
            for t in 0..all {
                let weight = f64::from(twin[h * stride + t]);
                let exact = f64::from(scores[h * stride + t] - total.reference).exp();
                let exact = if rows.contains(&t) { exact } else { 0.0 };
                prop_assert!((weight - exact).abs() <= 1e-5 * exact + 3e-38, "{weight} for {exact}");
            }
        }
        for kernels in paths() {
            for cut in [0, cut.min(pages)] {
                let (weights, totals) = run(kernels, cut);
                for (total, twin) in totals.iter().zip(&twin_totals) {
                    prop_assert_eq!(total.reference.to_bits(), twin.reference.to_bits(), "on {}", kernels.path());
                    prop_assert!((total.sum - twin.sum).abs() <= 2e-6 * twin.sum, "{total:?} {twin:?} on {}", kernels.path());
                }
                for (weight, twin) in weights.iter().zip(&twin) {
                    prop_assert!((weight - twin).abs() <= 2e-6 * twin + 3e-38, "{weight} {twin} on {}", kernels.path());
                }
            }
        }
    }

    #[test]
    fn rows_are_mixed_as_the_twin_mixes_them(n in 0_usize..100, factors in prop::collection::vec(-2.0_f32..2.0, 1..9), seed in any::<u64>()) {
        let rows = Draw::new(seed).values(factors.len() * (n + 3), 3.0);
        let mut twin = vec![9.0; n];
        scalar().mix_rows(&rows, n + 3, &factors, &mut twin);
        for kernels in paths() {
            let mut out = vec![8.0; n];
            kernels.mix_rows(&rows, n + 3, &factors, &mut out);
            close("mixed rows", &out, &twin, 1e-5);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn exponentials_and_ids_are_the_twins(n in 0_usize..200, threshold in -3.0_f32..3.0, odd in any::<bool>(), seed in any::<u64>()) {
        let mut draw = Draw::new(seed);
        let mut values = draw.values(n, 4.0);
        if odd && n > 0 {
            let at = draw.below(n);
            values[at] = [f32::NAN, f32::INFINITY, threshold, -3e38][draw.below(4)];
        }
        let finite: Vec<f32> = values.iter().map(|value| if value.is_finite() { *value } else { -9.0 }).collect();
        let plain: Vec<u32> = (0..n as u32).filter(|id| values[*id as usize] > threshold).collect();
        for kernels in paths() {
            let mut ids = vec![1, 2];
            kernels.indices_above(&values, threshold, &mut ids);
            prop_assert_eq!(&ids, &plain, "on {}", kernels.path());
            let (mut weights, mut twin) = (finite.clone(), finite.clone());
            let (sum, twin_sum) = (kernels.exp_in_place(&mut weights, 5.0), scalar().exp_in_place(&mut twin, 5.0));
            close("exponentials", &weights, &twin, 1e-6);
            close("their sum", &[sum], &[twin_sum], 1e-5);
        }
    }

    #[test]
    fn what_is_left_out_is_summed_to_the_safe_side(
        layout in layouts(), group in 1_usize..11, pages in 0_usize..12, holes in 0_usize..4, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let keys = keys(&mut draw, &layout, pages, 0);
        let blocks = digest(&mut draw, &layout, &keys, 0);
        let (dv, rows, groups) = (layout.value_dim(), pages * layout.rows(), pages * layout.groups());
        let (stride, margin_stride) = (rows + 2, groups + 2);
        let mut weights: Vec<f32> = draw.values(group * stride, 40.0).iter().map(|w| (w - 40.0).exp()).collect();
        let mut margins: Vec<f32> = draw.values(group * margin_stride, 3.0).iter().map(|m| m.abs()).collect();
        for _ in 0..holes * rows.min(20) {
            let at = draw.below(weights.len());
            weights[at..].iter_mut().take(33).for_each(|w| *w = 0.0);
        }
        if holes == 3 {
            let at = draw.below(margins.len());
            margins[at] = f32::INFINITY;
        }
        let begin = CodeSums { weight: 1e-3, upper: 2e-3, lower: 5e-4, scatter: 1e-3, spread: 1e-4 };
        let run = |kernels: Kernels| {
            let (mut sums, mut means) = (vec![begin; group], vec![0.5; group * dv]);
            let of = CodeWeights { rows: &weights, stride, margins: &margins, margin_stride };
            kernels.code_rest(&layout, &blocks, &of, &mut sums, &mut means);
            (sums, means)
        };
        let (expected, means) = run(scalar());
        for kernels in paths() {
            let (sums, found) = run(kernels);
            for (sums, twin) in sums.iter().zip(&expected) {
                let is = |what: &str, value: f64, twin: f64, below: f64, above: f64| {
                    let same = value == twin || (value >= twin * (1.0 - below) && value <= twin * (1.0 + above));
                    assert!(same, "{what}: {value} for {twin} on {}", kernels.path());
                };
                is("weight", sums.weight, twin.weight, 1e-6, 1e-6);
                is("upper", sums.upper, twin.upper, 1e-5, 1e-5);
                is("lower", sums.lower, twin.lower, 1e-5, 1e-5);
                // `e^m − 1` is rounded up.
                let small = if twin.upper.is_finite() { 1e-6 * 6.0 * twin.upper } else { 0.0 };
                is("scatter", sums.scatter, twin.scatter, 1e-5, 1e-5 + small / twin.scatter);
                is("spread", sums.spread, twin.spread, 1e-5, 1e-5);
            }
            close("means", &found, &means, 1e-5);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn taking_rows_and_summing_the_rest_at_once_is_doing_so_one_after_the_other(
        layout in layouts(), group in 1_usize..11, pages in 0_usize..12, part in 0_usize..5, odd in any::<bool>(), seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let keys = keys(&mut draw, &layout, pages, 0);
        let blocks = digest(&mut draw, &layout, &keys, 0);
        let (dv, rows, groups) = (layout.value_dim(), pages * layout.rows(), pages * layout.groups());
        let (stride, margin_stride) = (rows + 2, groups + 2);
        let mut weights: Vec<f32> = draw.values(group * stride, 10.0).iter().map(|w| (w - 10.0).exp()).collect();
        let margins: Vec<f32> = draw.values(group * margin_stride, 3.0).iter().map(|m| m.abs()).collect();
        let factors: Vec<f32> = draw.values(group, 2.0).iter().map(|f| f.abs()).collect();
        if odd && rows > 0 {
            weights[draw.below(rows)] = f32::NAN;
        }
        let shares: Vec<f32> =
            (0..rows).map(|t| factors.iter().enumerate().map(|(h, f)| f * weights[h * stride + t]).sum()).collect();
        let mut ordered: Vec<f32> = shares.iter().copied().filter(|share| !share.is_nan()).collect();
        ordered.sort_by(f32::total_cmp);
        // In the middle between two shares, below all, above all.
        let threshold = match (part, ordered.len()) {
            (0, _) | (_, 0 | 1) => -1.0,
            (4, _) => f32::INFINITY,
            (part, n) => f32::midpoint(ordered[n * part / 4 - usize::from(n * part / 4 == n)], ordered[(n * part / 4).max(1) - 1]),
        };
        let close_by = |share: f32| (share - threshold).abs() <= 1e-5 * share.abs();
        prop_assume!(!shares.iter().any(|share| close_by(*share)));
        let expected: Vec<u32> = (0..rows as u32).filter(|t| shares[*t as usize] > threshold).collect();
        let mut left = weights.clone();
        for weights in left.chunks_exact_mut(stride) {
            expected.iter().for_each(|t| weights[*t as usize] = 0.0);
        }
        for kernels in paths() {
            let (mut sums, mut means) = (vec![CodeSums::default(); group], vec![0.5; group * dv]);
            let (mut twins, mut twin_means, mut ids) = (sums.clone(), means.clone(), vec![3]);
            let of = CodeWeights { rows: &left, stride, margins: &margins, margin_stride };
            kernels.code_rest(&layout, &blocks, &of, &mut twins, &mut twin_means);
            let of = CodeWeights { rows: &weights, ..of };
            let mut taken = CodeTaken { factors: &factors, threshold, first: 5, ids: &mut ids };
            kernels.code_rest_below(&layout, &blocks, &of, &mut taken, &mut sums, &mut means);
            prop_assert_eq!(ids[0], 3);
            prop_assert!(ids[1..].iter().map(|id| id - 5).eq(expected.iter().copied()), "on {}", kernels.path());
            if !odd {
                // The very same sums in the very same order.
                prop_assert_eq!(&sums, &twins, "on {}", kernels.path());
                prop_assert_eq!(&means, &twin_means, "on {}", kernels.path());
            }
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn a_row_at_the_threshold_is_taken_in_one_pass_if_it_is_in_two(
        layout in layouts(), group in 1_usize..9, pages in 1_usize..5, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let keys = keys(&mut draw, &layout, pages, 0);
        let blocks = digest(&mut draw, &layout, &keys, 0);
        let rows = pages * layout.rows();
        let weights: Vec<f32> = draw.values(group * rows, 3.0).iter().map(|w| w.exp()).collect();
        let margins = vec![0.5; group * pages * layout.groups()];
        let factors: Vec<f32> = draw.values(group, 2.0).iter().map(|f| f.abs()).collect();
        for kernels in paths() {
            let mut shares = vec![0.0; rows];
            kernels.mix_rows(&weights, rows, &factors, &mut shares);
            let threshold = shares[draw.below(rows)];
            let (mut two, mut one) = (Vec::new(), Vec::new());
            kernels.indices_above(&shares, threshold, &mut two);
            let (mut sums, mut means) = (vec![CodeSums::default(); group], vec![0.0; group * layout.value_dim()]);
            let of = CodeWeights { rows: &weights, stride: rows, margins: &margins, margin_stride: pages * layout.groups() };
            let mut taken = CodeTaken { factors: &factors, threshold, first: 0, ids: &mut one };
            kernels.code_rest_below(&layout, &blocks, &of, &mut taken, &mut sums, &mut means);
            prop_assert_eq!(&one, &two, "on {}", kernels.path());
        }
    }
}

#[test]
fn a_step_that_is_no_number_gives_the_twins_scores_and_no_margin() {
    for (bits, group) in [(CodeBits::Four, 16), (CodeBits::Six, 32)] {
        let layout = CodeLayout::new(48, 8, 32, bits, group).unwrap();
        let mut draw = Draw::new(3);
        let keys = keys(&mut draw, &layout, 2, 0);
        let mut blocks = digest(&mut draw, &layout, &keys, 0);
        // The step of a channel of the first group, after 48 offsets.
        blocks[2 * 48 + 2 * 5..][..2].copy_from_slice(&f16::NAN.to_le_bytes());
        let queries = draw.values(3 * 48, 1.0);
        let bits_of = |values: Vec<f32>| values.into_iter().map(f32::to_bits).collect::<Vec<_>>();
        let (expected, margins) = scores(scalar(), &layout, &queries, 0.3, &blocks);
        assert!(margins[0] == f32::INFINITY && margins[layout.groups()].is_finite(), "{margins:?}");
        let expected = bits_of(expected);
        for kernels in paths() {
            let (found, _) = scores(kernels, &layout, &queries, 0.3, &blocks);
            assert_eq!(bits_of(found), expected, "{bits:?} on {}", kernels.path());
        }
    }
}

#[test]
fn what_nothing_is_known_of_is_bounded_by_nothing_and_spoils_no_mean() {
    let layout = CodeLayout::new(16, 20, 32, CodeBits::Four, 16).unwrap();
    let mut draw = Draw::new(14);
    let keys = keys(&mut draw, &layout, 2, 0);
    let mut blocks = digest(&mut draw, &layout, &keys, 0);
    // The second page's values have no mean in f16.
    let values = vec![3e38; 32 * 20];
    layout.encode(&keys[32 * 16..], &values, &mut blocks[layout.bytes()..]);
    for kernels in paths() {
        let run = |weights: &[f32], margins: &[f32]| {
            let (mut sums, mut means) = ([CodeSums::default()], vec![0.0; 20]);
            let of = CodeWeights { rows: weights, stride: 64, margins, margin_stride: 4 };
            kernels.code_rest(&layout, &blocks, &of, &mut sums, &mut means);
            assert!(means.iter().all(|mean| mean.is_finite()), "{means:?} on {}", kernels.path());
            sums[0]
        };
        let ones = [1.0; 64];
        let first: Vec<f32> = (0..64).map(|row| if row < 32 { 1.0 } else { 0.0 }).collect();
        let sums = run(&ones, &[0.5; 4]);
        assert!(sums.upper.is_finite() && sums.spread == f64::INFINITY, "{sums:?}");
        // What is not left out does not matter.
        let sums = run(&first, &[0.5, 0.5, f32::INFINITY, 0.5]);
        assert!(sums.upper.is_finite() && sums.spread.is_finite() && sums.scatter.is_finite(), "{sums:?}");
        let sums = run(&first, &[0.5, f32::INFINITY, 0.5, 0.5]);
        assert!(sums.upper == f64::INFINITY && sums.lower.is_finite(), "{sums:?}");
        assert_eq!(run(&[0.0; 64], &[0.5; 4]), CodeSums::default());
    }
}
