//! Binary codes: exact on every path, at any width, group and alignment.

use crate::common::{Draw, paths, scalar};
use proptest::prelude::*;

/// Distances bit by bit.
fn naive(queries: &[u64], words: usize, codes: &[u64]) -> Vec<Vec<u32>> {
    let differ = |a: &[u64], b: &[u64]| {
        let bit = |words: &[u64], i: usize| words[i / 64] >> (i % 64) & 1;
        (0..64 * words).map(|i| u32::from(bit(a, i) != bit(b, i))).sum()
    };
    let of = |query: &[u64]| codes.chunks_exact(words).map(|code| differ(query, code)).collect();
    queries.chunks_exact(words).map(of).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn distances_and_their_sums_are_the_naive_ones(
        words in prop_oneof![3 => Just(2_usize), 1 => 1_usize..6], group in 1_usize..20, rows in 0_usize..120, skew in 0_usize..8,
        same in any::<bool>(), seed in any::<u64>(),
    ) {
        let mut draw = Draw::new(seed);
        let mut word = || draw.bits() << 40 ^ draw.bits();
        let queries: Vec<u64> = (0..group * words).map(|_| word()).collect();
        let mut codes: Vec<u64> = (0..rows * words).map(|_| word()).collect();
        if same && rows > 0 {
            codes[..words].copy_from_slice(&queries[..words]);
            codes[(rows - 1) * words..].iter_mut().zip(&queries).for_each(|(code, query)| *code = !query);
        }
        let expected = naive(&queries, words, &codes);
        let mut bytes = vec![0_u8; skew];
        bytes.extend(codes.iter().flat_map(|word| word.to_le_bytes()));
        let stride = rows + 3;
        for kernels in paths() {
            let (mut out, mut from_bytes) = (vec![7; group * stride], vec![7; group * stride]);
            kernels.hamming(&queries, group, &codes, &mut out, stride);
            kernels.hamming_bytes(&queries, group, &bytes[skew..], &mut from_bytes, stride);
            prop_assert_eq!(&out, &from_bytes);
            for (h, expected) in expected.iter().enumerate() {
                prop_assert_eq!(&out[h * stride..][..rows], &expected[..], "on {}", kernels.path());
                prop_assert!(h + 1 == group || out[h * stride + rows..][..3] == [7; 3], "between the rows of distances");
            }
            let sums: Vec<u32> = (0..rows).map(|t| expected.iter().map(|query| query[t]).sum()).collect();
            let (mut out, mut from_bytes) = (vec![7; rows], vec![7; rows]);
            kernels.hamming_sum(&queries, group, &codes, &mut out);
            kernels.hamming_sum_bytes(&queries, group, &bytes[skew..], &mut from_bytes);
            prop_assert_eq!(&out, &sums, "a group of {} on {}", group, kernels.path());
            prop_assert_eq!(&from_bytes, &sums);
        }
    }

    #[test]
    fn a_bit_is_set_where_a_value_is_above_0(n in 0_usize..300, seed in any::<u64>()) {
        let mut draw = Draw::new(seed);
        let odd_ones = [0.0, -0.0, f32::NAN, -f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e-45, -1e-45];
        let values: Vec<f32> = (0..n)
            .map(|_| if draw.below(3) == 0 { odd_ones[draw.below(8)] } else { draw.value(2.0) })
            .collect();
        for kernels in paths() {
            let mut code = vec![0xaa; n.div_ceil(64) * 8];
            kernels.sign_bits(&values, &mut code);
            for bit in 0..8 * code.len() {
                let expected = values.get(bit).is_some_and(|value| *value > 0.0);
                prop_assert_eq!(code[bit / 8] >> (bit % 8) & 1 == 1, expected, "bit {} on {}", bit, kernels.path());
            }
        }
    }
}

#[test]
fn large_groups_are_summed_over_many_blocks_of_codes() {
    let mut draw = Draw::new(11);
    let queries: Vec<u64> = (0..33 * 2).map(|_| draw.bits() << 40 ^ draw.bits()).collect();
    let codes: Vec<u64> = (0..5_003 * 2).map(|_| draw.bits() << 40 ^ draw.bits()).collect();
    let mut expected = vec![0; 5_003];
    scalar().hamming_sum(&queries, 33, &codes, &mut expected);
    for kernels in paths() {
        let mut out = vec![0; 5_003];
        kernels.hamming_sum(&queries, 33, &codes, &mut out);
        assert!(out == expected, "on {}", kernels.path());
    }
}

#[test]
#[should_panic(expected = "hamming_sum: codes are [rows][2] words")]
fn codes_that_are_cut_off_are_refused() {
    scalar().hamming_sum_bytes(&[0; 2], 1, &[0; 17], &mut [0]);
}
