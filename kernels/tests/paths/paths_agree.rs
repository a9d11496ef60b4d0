//! Every path computes what the scalar twin computes: bit for bit where that is promised, else up to rounding.

use crate::common::{Draw, close, paths, scalar, stored};
use kvoyant_kernels::{CopyRun, Dtype, TopKScratch};
use proptest::prelude::*;

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop::sample::select(Dtype::ALL.to_vec())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn stored_values_are_read_exactly(dtype in dtypes(), bits in prop::collection::vec(any::<u8>(), 0..400), skew in 0_usize..4) {
        let n = bits.len().saturating_sub(skew) / dtype.bytes();
        let bytes = &bits[skew.min(bits.len())..][..n * dtype.bytes()];
        let mut expected = vec![0.0; n];
        scalar().to_f32(dtype, bytes, &mut expected);
        for kernels in paths() {
            let mut values = vec![0.0; n];
            kernels.to_f32(dtype, bytes, &mut values);
            for (value, expected) in values.iter().zip(&expected) {
                prop_assert_eq!(value.to_bits(), expected.to_bits(), "{} on {}", dtype, kernels.path());
            }
        }
    }

    #[test]
    fn values_are_stored_exactly(dtype in dtypes(), bits in prop::collection::vec(any::<u32>(), 0..100), skew in 0_usize..4) {
        let values: Vec<f32> = bits.iter().map(|bits| f32::from_bits(*bits)).collect();
        let expected = stored(dtype, &values, skew);
        for kernels in paths() {
            let mut bytes = vec![0; expected.len()];
            kernels.from_f32(dtype, &values, &mut bytes[skew..]);
            prop_assert_eq!(&bytes, &expected, "{} on {}", dtype, kernels.path());
        }
    }

    #[test]
    fn columns_get_the_twins_scores(
        dtype in dtypes(), group in 1_usize..9, dims in 0_usize..80, tokens in 0_usize..100, skew in 0_usize..4, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let (queries, block) = (draw.values(group * dims, 3.0), stored(dtype, &draw.values(dims * tokens, 3.0), skew));
        let stride = tokens + 5;
        let mut expected = vec![f32::INFINITY; group * stride];
        scalar().score_columns(dtype, &queries, group, &block[skew..], tokens, &mut expected, stride);
        for kernels in paths() {
            let mut out = vec![f32::INFINITY; group * stride];
            kernels.score_columns(dtype, &queries, group, &block[skew..], tokens, &mut out, stride);
            // Sums of up to 80 products of up to 9: an error of 80 · 2⁻²⁴ · 720 at the very worst.
            close("scores, and what lies between them untouched", &out, &expected, 1e-4);
        }
    }

    #[test]
    fn digests_get_the_twins_values(
        dtype in dtypes(), n in 0_usize..40, d_in in 1_usize..70, d_out in 1_usize..90, first in 0_usize..5, seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let (rows, a) = (draw.values(n * d_in, 2.0), draw.values(d_in * d_out, 1.0));
        let tokens = first + n + 3;
        let before = stored(dtype, &draw.values(d_out * tokens, 1.0), 1);
        let read = |block: &[u8]| {
            let mut values = vec![0.0; d_out * tokens];
            scalar().to_f32(dtype, &block[1..], &mut values);
            values
        };
        let mut expected = before.clone();
        scalar().project_columns(&rows, &a, d_out, dtype, &mut expected[1..], tokens, first);
        // Sums may differ by rounding, and then be stored as neighbours.
        let step = match dtype { Dtype::F32 => 1e-4, Dtype::F16 => 2e-3, Dtype::Bf16 => 1e-2 };
        for kernels in paths() {
            let mut block = before.clone();
            kernels.project_columns(&rows, &a, d_out, dtype, &mut block[1..], tokens, first);
            close("projected columns, others untouched", &read(&block), &read(&expected), step);
            if n > 0 {
                let mut out = vec![0.0; d_out];
                kernels.project(&rows[..d_in], &a, &mut out);
                let mut twin = vec![0.0; d_out];
                scalar().project(&rows[..d_in], &a, &mut twin);
                close("a projected row", &out, &twin, 1e-4);
            }
        }
    }

    #[test]
    fn digests_have_the_largest_number_for_what_f16_cannot_hold(n in 1_usize..20, d in 1_usize..40, seed in any::<u64>()) {
        let mut draw = Draw::new(seed);
        let rows: Vec<f32> = draw.values(n * d, 2.0).iter().map(|value| value * 1e6).collect();
        let a: Vec<f32> = (0..d * d).map(|at| if at % (d + 1) == 0 { 1.0 } else { 0.0 }).collect();
        for kernels in paths() {
            let (mut block, mut values) = (vec![0; 2 * d * n], vec![0.0; d * n]);
            kernels.project_columns(&rows, &a, d, Dtype::F16, &mut block, n, 0);
            scalar().to_f32(Dtype::F16, &block, &mut values);
            for (at, value) in values.iter().enumerate() {
                let wanted = rows[at % n * d + at / n].clamp(-65504.0, 65504.0);
                prop_assert!((value - wanted).abs() <= 32.0 + wanted.abs() / 1024.0, "{value} for {wanted} on {}", kernels.path());
            }
        }
    }

    #[test]
    fn bounds_and_ranges_are_the_twins(group in 1_usize..9, d in 1_usize..150, n in 0_usize..20, seed in any::<u64>()) {
        let mut draw = Draw::new(seed);
        let (queries, rows) = (draw.values(group * d, 3.0), draw.values(n * d, 3.0));
        let fresh: Vec<f32> = [f32::INFINITY, f32::NEG_INFINITY].iter().flat_map(|end| vec![*end; d]).collect();
        let mut expected = fresh.clone();
        scalar().min_max_update(&rows, d, &mut expected);
        for kernels in paths() {
            let mut minmax = fresh.clone();
            kernels.min_max_update(&rows, d, &mut minmax);
            prop_assert_eq!(&minmax, &expected);
            if n > 0 {
                let (mut bounds, mut twin) = (vec![0.0; group], vec![0.0; group]);
                kernels.page_bounds(&queries, group, &minmax, &mut bounds);
                scalar().page_bounds(&queries, group, &minmax, &mut twin);
                close("bounds", &bounds, &twin, 1e-4);
            }
        }
    }

    #[test]
    fn reductions_are_the_twins(n in 0_usize..300, holes in 0_usize..4, threshold in -2.0_f32..2.0, skew in 0_usize..3, seed in any::<u64>()) {
        let mut draw = Draw::new(seed);
        let mut values = draw.values(n + skew, 6.0);
        for _ in 0..holes.min(n) {
            let at = draw.below(n);
            values[skew + at] = f32::NEG_INFINITY;
        }
        let others = draw.values(n, 2.0);
        let values = &values[skew..];
        let max = scalar().max(values);
        for kernels in paths() {
            prop_assert_eq!(kernels.max(values), max);
            prop_assert_eq!(kernels.count_above(values, threshold), scalar().count_above(values, threshold));
            close("exp_sum", &[kernels.exp_sum(values, max)], &[scalar().exp_sum(values, max)], 2e-6);
            close("dot", &[kernels.dot(&others, &others)], &[scalar().dot(&others, &others)], 2e-6);
            let (mut acc, mut twin) = (others.clone(), others.clone());
            kernels.softmax_add(values, 0.7, &mut acc);
            scalar().softmax_add(values, 0.7, &mut twin);
            close("softmax_add", &acc, &twin, 1e-6);
            let (mut soft, mut twin) = (values.to_vec(), values.to_vec());
            kernels.softmax_in_place(&mut soft);
            scalar().softmax_in_place(&mut twin);
            close("softmax_in_place", &soft, &twin, 1e-6);
        }
    }

    #[test]
    fn elementwise_helpers_are_the_twins(n in 0_usize..200, heads in 0_usize..4, half in 1_usize..70, seed in any::<u64>()) {
        let mut draw = Draw::new(seed);
        let (x, y, size) = (draw.values(n, 40.0), draw.values(n, 2.0), 2 * half);
        let (angles, turned) = (draw.values(half, 3.0), draw.values(heads * size, 2.0));
        let (cos, sin): (Vec<f32>, Vec<f32>) = angles.iter().map(|angle| (angle.cos(), angle.sin())).unzip();
        let run = |kernels: kvoyant_kernels::Kernels| {
            let (mut normed, mut gate, mut sum, mut scaled) = (vec![0.0; n], x.clone(), x.clone(), x.clone());
            let mut rope = turned.clone();
            kernels.rms_norm(&x, &y, 1e-5, &mut normed);
            kernels.silu_mul(&mut gate, &y);
            kernels.add(&mut sum, &y);
            kernels.axpy(&mut scaled, -0.3, &y);
            kernels.rope_halves(&mut rope, size, &cos, &sin);
            [normed, gate, sum, scaled, rope].concat()
        };
        for kernels in paths() {
            close("elementwise", &run(kernels), &run(scalar()), 2e-6);
        }
    }

    #[test]
    fn copies_are_exact_at_any_size_and_alignment(sizes in prop::collection::vec(0_usize..3000, 0..30), skew in 0_usize..64) {
        let total: usize = sizes.iter().map(|size| size + 3).sum::<usize>() + skew;
        let source: Vec<u8> = (0..total).map(|i| (i * 31 % 251) as u8).collect();
        for kernels in paths() {
            let (mut copy, mut expected) = (vec![0_u8; total], vec![0_u8; total]);
            let (mut runs, mut at) = (Vec::new(), skew);
            for bytes in &sizes {
                let from = total - at - bytes;
                runs.push(CopyRun { src: source[from..].as_ptr(), dst: copy[at..].as_mut_ptr(), bytes: *bytes });
                expected[at..at + bytes].copy_from_slice(&source[from..from + bytes]);
                at += bytes + 3;
            }
            // SAFETY: the runs lie within the two vectors, and their destinations are apart.
            unsafe { kernels.copy_runs(&runs) };
            prop_assert_eq!(&copy, &expected, "on {}", kernels.path());
        }
    }
}

#[test]
fn copies_around_the_cache_are_exact() {
    let source: Vec<u8> = (0..10 << 20).map(|i: u32| (i.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    for kernels in paths() {
        let mut copy = vec![0_u8; source.len()];
        let mut runs = Vec::new();
        for (src, dst) in source.chunks(1_000_003).zip(copy.chunks_mut(1_000_003)) {
            runs.push(CopyRun { src: src.as_ptr(), dst: dst.as_mut_ptr(), bytes: src.len() });
        }
        // SAFETY: the runs lie within the two vectors, and their destinations are apart.
        unsafe { kernels.copy_runs(&runs) };
        assert!(copy == source, "on {}", kernels.path());
    }
}

/// The k best by a plain sort.
fn sorted_top(scores: &[f32], k: usize) -> Vec<u32> {
    let value = |id: &u32| {
        let score = scores[*id as usize];
        if score.is_nan() { f32::NEG_INFINITY } else { score + 0.0 }
    };
    let mut ids: Vec<u32> = (0..scores.len() as u32).collect();
    ids.sort_by(|a, b| value(b).total_cmp(&value(a)).then(a.cmp(b)));
    ids.truncate(k);
    ids.sort_unstable();
    ids
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(256))]

    #[test]
    fn top_k_is_the_head_of_a_stable_sort(n in 0_usize..5000, share in 0.0_f64..1.1, levels in 1_u64..3000, odd in any::<bool>(), seed in any::<u64>()) {
        let mut draw = Draw::new(seed);
        // Few levels make many ties; the odd values are what may break an order.
        let odd_ones = [f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 0.0, -0.0, 1e-40, f32::MAX, f32::MIN];
        let scores: Vec<f32> = (0..n)
            .map(|_| match draw.below(8) {
                0 if odd => odd_ones[draw.below(odd_ones.len())],
                _ => (draw.bits() % levels) as f32 / 17.0 - levels as f32 / 40.0,
            })
            .collect();
        let k = (n as f64 * share * share) as usize;
        let (mut scratch, mut out) = (TopKScratch::default(), vec![7]);
        for kernels in paths() {
            kernels.top_k(&scores, k, &mut scratch, &mut out);
            prop_assert_eq!(&out, &sorted_top(&scores, k), "{} of {} on {}", k, n, kernels.path());
        }
    }
}

#[test]
fn top_k_holds_where_a_strided_sample_misleads() {
    let n = 40_000;
    for period in [2, 8, 16, 39, 156] {
        // The places that a stride lands on are the best ones, or the worst.
        for sign in [1.0, -1.0] {
            let scores: Vec<f32> = (0..n)
                .map(|i| if i % period == 0 { sign * (i + 1) as f32 } else { (i % 97) as f32 * 1e-3 })
                .collect();
            for k in [1, 5, 300, 4000, 39_999] {
                for kernels in paths() {
                    let mut out = Vec::new();
                    kernels.top_k(&scores, k, &mut TopKScratch::default(), &mut out);
                    assert_eq!(out, sorted_top(&scores, k), "{k}, period {period}, on {}", kernels.path());
                }
            }
        }
    }
}
