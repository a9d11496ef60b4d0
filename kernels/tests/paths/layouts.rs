//! Attention over rows of every layout and format: what the dequantised values give, whatever the runs; how far from the values that
//! were stored; and by heads.

use crate::common::{Draw, attend, close, cut, paths, scalar, stored};
use kvoyant_kernels::quantise::Format;
use kvoyant_kernels::{AttendScratch, Dtype, Kernels, RowLayout, Run};
use proptest::prelude::*;

fn layouts() -> impl Strategy<Value = RowLayout> {
    let formats = prop::sample::select(Format::ALL.to_vec());
    let kv = (formats.clone(), 1_usize..3).prop_map(|(format, n)| RowLayout::KeyValue { d: 64 * n, format });
    let odd = (formats.clone(), 1_usize..30).prop_map(|(format, n)| match format {
        Format::Plain(_) => RowLayout::KeyValue { d: n, format },
        Format::Int4 { .. } => RowLayout::Latent { dim: 64, value: 64, format },
        _ => RowLayout::KeyValue { d: 4 * n, format },
    });
    let latent = (formats, 1_usize..3, 0_usize..2).prop_map(|(format, value, rope)| RowLayout::Latent {
        dim: 64 * (value + rope),
        value: 64 * value,
        format,
    });
    prop_oneof![kv, odd, latent]
}

/// `n` rows as bytes.
fn encoded(layout: RowLayout, draw: &mut Draw, n: usize, size: f32) -> Vec<u8> {
    let mut rows = vec![0; n * layout.row_bytes().unwrap()];
    for row in rows.chunks_exact_mut(layout.row_bytes().unwrap()) {
        let key = draw.values(layout.key_values(), size);
        let value = match layout {
            RowLayout::KeyValue { d, .. } => draw.values(d, size),
            RowLayout::Latent { .. } => Vec::new(),
        };
        layout.encode(&key, &value, row);
    }
    rows
}

/// Attention over runs that live as long as what they were cut from.
fn attend_layout(
    kernels: Kernels,
    layout: RowLayout,
    queries: &[f32],
    scale: f32,
    runs: &[Run],
) -> (Vec<f32>, Vec<f32>) {
    let group = queries.len() / layout.key_values();
    let (mut out, mut lse) = (vec![f32::NAN; group * layout.value_values()], vec![f32::NAN; group]);
    let mut scratch = AttendScratch::default();
    // SAFETY: the tests cut runs from vectors that outlive the call.
    unsafe { kernels.attend_layout(layout, queries, group, scale, runs, &mut scratch, &mut out, &mut lse) };
    (out, lse)
}

/// Attention in f64 over keys and values.
fn plain(queries: &[f32], keys: &[f32], values: &[f32], (dk, dv): (usize, usize), scale: f32) -> Vec<f64> {
    let mut out = Vec::new();
    for query in queries.chunks_exact(dk) {
        let dot =
            |key: &[f32]| key.iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>();
        let scores: Vec<f64> = keys.chunks_exact(dk).map(|key| f64::from(scale) * dot(key)).collect();
        let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let sum: f64 = scores.iter().map(|score| (score - top).exp()).sum();
        for j in 0..dv {
            let terms = scores.iter().zip(values.chunks_exact(dv));
            out.push(
                terms.map(|(score, value)| (score - top).exp() * f64::from(value[j])).sum::<f64>() / sum,
            );
        }
    }
    out
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn rows_are_attended_as_their_values(
        layout in layouts(), group in 1_usize..6, n in prop_oneof![1_usize..40, 100_usize..300], seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let (dk, dv) = (layout.key_values(), layout.value_values());
        let queries = draw.values(group * dk, 2.0);
        let bytes = [&[0_u8][..], &encoded(layout, &mut draw, n, 2.0)].concat();
        let (mut keys, mut values) = (vec![0.0; n * dk], vec![0.0; n * dv]);
        layout.decode_keys(&bytes[1..], &mut keys);
        layout.decode_values(&bytes[1..], &mut values);
        let scale = 1.0 / (dk as f32).sqrt();
        let expected: Vec<f32> = plain(&queries, &keys, &values, (dk, dv), scale).iter().map(|o| *o as f32).collect();
        for kernels in paths() {
            let (whole, lse) = attend_layout(kernels, layout, &queries, scale, &[Run::new(bytes[1..].as_ptr(), n)]);
            close("attention", &whole, &expected, 2e-5);
            let runs = cut(&mut draw, &bytes[1..], n, layout.row_bytes().unwrap());
            prop_assert_eq!(&attend_layout(kernels, layout, &queries, scale, &runs), &(whole, lse), "cut into runs");
            let mut scores = vec![0.0; group * (n + 1)];
            // SAFETY: the runs are cut from `bytes`.
            unsafe {
                let mut scratch = AttendScratch::default();
                kernels.scores_layout(layout, &queries, group, &runs, &mut scratch, &mut scores, n + 1);
            }
            for (h, query) in queries.chunks_exact(dk).enumerate() {
                for (t, key) in keys.chunks_exact(dk).enumerate() {
                    let (score, dot) = (scores[h * (n + 1) + t], kernels.dot(query, key));
                    if matches!(layout, RowLayout::KeyValue { format: Format::Int8, .. }) {
                        // A product with the scale more or less.
                        let size: f32 = query.iter().zip(key).map(|(q, k)| (q * k).abs()).sum();
                        prop_assert!((score - dot).abs() <= 2e-6 * size, "{score} {dot} as {layout} on {}", kernels.path());
                    } else {
                        prop_assert_eq!(score, dot, "{} on {}", layout, kernels.path());
                    }
                }
            }
        }
    }

    #[test]
    fn plain_pairs_are_attended_to_the_last_bit_as_ever(
        dtype in prop::sample::select(Dtype::ALL.to_vec()), group in 1_usize..6, d in 1_usize..130, n in 1_usize..90, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let queries = draw.values(group * d, 2.0);
        let bytes = stored(dtype, &draw.values(n * 2 * d, 2.0), 0);
        let layout = RowLayout::KeyValue { d, format: Format::Plain(dtype) };
        for kernels in paths() {
            let runs = cut(&mut draw, &bytes, n, 2 * d * dtype.bytes());
            let expected = attend(kernels, dtype, &queries, d, 0.2, &runs);
            prop_assert_eq!(attend_layout(kernels, layout, &queries, 0.2, &runs), expected);
        }
    }

    #[test]
    fn heads_get_what_each_gets_alone(layout in layouts(), heads in 0_usize..5, group in 1_usize..4, seed in any::<u64>()) {
        let mut draw = Draw::new(seed);
        let (dk, dv) = (layout.key_values(), layout.value_values());
        let queries = draw.values(heads * group * dk, 2.0);
        let counts: Vec<usize> = (0..heads).map(|_| draw.below(30)).collect();
        let rows: Vec<Vec<u8>> = counts.iter().map(|n| encoded(layout, &mut draw, *n, 2.0)).collect();
        let runs: Vec<Vec<Run>> =
            rows.iter().zip(&counts).map(|(rows, n)| vec![Run::new(rows.as_ptr(), *n)]).collect();
        let runs: Vec<&[Run]> = runs.iter().map(Vec::as_slice).collect();
        for kernels in paths() {
            let (mut out, mut lse) = (vec![f32::NAN; heads * group * dv], vec![f32::NAN; heads * group]);
            // SAFETY: the runs lie within `rows`.
            unsafe {
                let mut scratch = AttendScratch::default();
                kernels.attend_heads(layout, &queries, group, 0.1, &runs, &mut scratch, &mut out, &mut lse);
            }
            for (i, runs) in runs.iter().enumerate() {
                let alone = attend_layout(kernels, layout, &queries[i * group * dk..][..group * dk], 0.1, runs);
                let here = (out[i * group * dv..][..group * dv].to_vec(), lse[i * group..][..group].to_vec());
                prop_assert_eq!(here, alone);
            }
        }
    }

    #[test]
    fn dequantised_rows_are_the_twins(format in prop::sample::select(Format::ALL.to_vec()), n in 0_usize..5, bytes in prop::collection::vec(any::<u8>(), 2000)) {
        let n = 64 * n + if matches!(format, Format::Int4 { .. }) { 0 } else { 12 };
        let row = &bytes[1..][..format.row_bytes(n).unwrap()];
        let mut expected = vec![0.0; n];
        scalar().dequantise(format, row, &mut expected);
        for kernels in paths() {
            let mut values = vec![7.0; n];
            kernels.dequantise(format, row, &mut values);
            for (value, expected) in values.iter().zip(&expected) {
                let same = value.to_bits() == expected.to_bits() || (value.is_nan() && expected.is_nan());
                prop_assert!(same, "{} and {} as {} on {}", value, expected, format, kernels.path());
            }
        }
    }

    #[test]
    fn any_split_merges_to_the_whole_also_with_empty_sides(
        layout in layouts(), group in 1_usize..4, n in 1_usize..60, parts in 1_usize..6, huge in any::<bool>(), seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let (dk, dv) = (layout.key_values(), layout.value_values());
        let queries = draw.values(group * dk, if huge { 60.0 } else { 2.0 });
        let bytes = encoded(layout, &mut draw, n, 2.0);
        let row_bytes = layout.row_bytes().unwrap();
        let mut split: Vec<Vec<Run>> = vec![Vec::new(); parts];
        for t in 0..n {
            split[draw.below(parts)].push(Run::new(bytes[t * row_bytes..].as_ptr(), 1));
        }
        // At least one side covers nothing.
        split.insert(draw.below(parts + 1), Vec::new());
        for kernels in paths() {
            let (whole, whole_lse) = attend_layout(kernels, layout, &queries, 0.5, &[Run::new(bytes.as_ptr(), n)]);
            let (mut o, mut lse) = (vec![0.0; group * dv], vec![f32::NEG_INFINITY; group]);
            for runs in &split {
                let (part, part_lse) = attend_layout(kernels, layout, &queries, 0.5, runs);
                kernels.merge(&mut o, &mut lse, &part, &part_lse);
            }
            for (o, whole) in o.chunks_exact(dv).zip(whole.chunks_exact(dv)) {
                let norm = |values: &mut dyn Iterator<Item = f32>| values.map(|v| f64::from(v).powi(2)).sum::<f64>().sqrt();
                // The terms that are added may be larger than their sum.
                let size = norm(&mut whole.iter().copied()).max(2.0);
                let error = norm(&mut o.iter().zip(whole).map(|(a, b)| a - b));
                prop_assert!(error <= 1e-5 * size, "off by {} of {}", error, size);
            }
            close("lse", &lse, &whole_lse, 1e-5);
        }
    }
}

#[test]
fn two_sides_of_nothing_are_nothing() {
    for kernels in paths() {
        let (mut o, mut lse) = ([0.0; 4], [f32::NEG_INFINITY; 2]);
        kernels.merge(&mut o, &mut lse, &[0.0; 4], &[f32::NEG_INFINITY; 2]);
        assert_eq!((o, lse), ([0.0; 4], [f32::NEG_INFINITY; 2]));
        kernels.merge(&mut o, &mut lse, &[1.0, 2.0, 3.0, 4.0], &[0.5, f32::NEG_INFINITY]);
        assert_eq!((o, lse), ([1.0, 2.0, 0.0, 0.0], [0.5, f32::NEG_INFINITY]));
    }
}

/// The relative error of attention's answer over rows as stored, against the values before, and the most that is accepted.
fn error(format: Format, outliers: bool) -> f64 {
    let (d, group, n) = (128, 4, 512);
    let mut draw = Draw::new(42);
    let bell = |draw: &mut Draw| (0..4).map(|_| (draw.bits() & 0xffff) as f32 / 32_768.0 - 1.0).sum::<f32>();
    let channel: Vec<f32> = (0..d).map(|j| if outliers && j % 64 == 7 { 20.0 } else { 1.0 }).collect();
    let rows = |draw: &mut Draw| -> Vec<f32> { (0..n * d).map(|i| bell(draw) * channel[i % d]).collect() };
    let (keys, values) = (rows(&mut draw), rows(&mut draw));
    // Queries that do not use the outliers more than the others, or every score would be theirs.
    let queries: Vec<f32> = (0..group * d).map(|i| bell(&mut draw) / channel[i % d]).collect();
    let layout = RowLayout::KeyValue { d, format };
    let mut bytes = vec![0; n * layout.row_bytes().unwrap()];
    for (t, row) in bytes.chunks_exact_mut(layout.row_bytes().unwrap()).enumerate() {
        layout.encode(&keys[t * d..][..d], &values[t * d..][..d], row);
    }
    let scale = 1.0 / (d as f32).sqrt();
    let exact = plain(&queries, &keys, &values, (d, d), scale);
    let (out, _) = attend_layout(Kernels::best(), layout, &queries, scale, &[Run::new(bytes.as_ptr(), n)]);
    let difference: f64 = out.iter().zip(&exact).map(|(o, exact)| (f64::from(*o) - exact).powi(2)).sum();
    (difference / exact.iter().map(|o| o * o).sum::<f64>()).sqrt()
}

#[test]
fn the_error_of_each_format_is_what_its_bits_allow() {
    // For values drawn from a bell, and with two channels twenty times as large; int8 has one scale per row, and int4 one per group,
    // which those channels spoil.
    let most = [
        (Format::Plain(Dtype::F32), 1e-5, 1e-5),
        (Format::Plain(Dtype::F16), 1e-3, 1e-3),
        (Format::Plain(Dtype::Bf16), 8e-3, 8e-3),
        (Format::Fp8, 0.06, 0.06),
        (Format::Int8, 0.01, 0.07),
        (Format::Int4 { group: 32 }, 0.13, 0.4),
        (Format::Int4 { group: 64 }, 0.18, 0.85),
    ];
    let mut before = 0.0;
    for (format, plain_most, outlier_most) in most {
        let (plain, outliers) = (error(format, false), error(format, true));
        println!("{format}: relative error {plain:.2e}, with outlier channels {outliers:.2e}");
        assert!(plain <= plain_most, "{format}: {plain}");
        assert!(outliers <= outlier_most, "{format} with outliers: {outliers}");
        if let Format::Plain(_) | Format::Int4 { .. } = format {
            assert!(
                plain > before,
                "{format} has fewer bits than the one before and yet {plain} is no larger"
            );
            before = plain;
        }
    }
}
