use std::collections::BTreeMap;
use std::sync::Arc;

use kvoyant_kernels::Dtype;
use proptest::prelude::*;

use super::*;
use crate::artifact::{Artifact, ArtifactKind, Tensor, TensorArtifact};
use crate::budget::Budget;
use crate::shape::tests::small;
use crate::testing::{Rng, Store, matmul};

fn hata(budget: usize, bits: usize, norm: bool, shape: &Shape) -> Hata {
    let hash = HashOptions { weights: Weights::Random { bits, seed: 5 }, norm };
    let options = HataSpec { budget: Budget::rows(budget).unwrap(), hash, ..HataSpec::default() };
    Hata::new(options, shape, &Artifacts::none()).unwrap()
}

/// The bits of a vector, by the definition.
fn naive_code(method: &Hata, layer: usize, head: usize, x: &[f32]) -> Vec<bool> {
    let bits = method.codes.weights.bits;
    let mut projected = vec![0.0; bits];
    kvoyant_kernels::Kernels::best().project(x, method.codes.weights.of(layer, head), &mut projected);
    projected.iter().map(|value| *value > 0.0).collect()
}

/// Scores of all keys (`[n][Hkv][d]`) for one KV head, by the definition.
fn naive_scores(method: &Hata, hint: &[f32], keys: &[f32], head: usize, norm: bool) -> Vec<f32> {
    let queries: Vec<_> =
        (0..2).map(|query| naive_code(method, 0, head, &hint[(head * 2 + query) * 8..][..8])).collect();
    keys.chunks(16)
        .map(|token| {
            let key = &token[head * 8..][..8];
            let code = naive_code(method, 0, head, key);
            let apart = |query: &Vec<bool>| query.iter().zip(&code).filter(|(a, b)| a != b).count();
            let sum: usize = queries.iter().map(apart).sum();
            let length = key.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt();
            let like = 2.0 - 2.0 * sum as f64 / method.codes.weights.bits as f64;
            if norm { (like * length.min(65504.0)) as f32 } else { -(sum as f32) }
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn the_rows_are_the_best_by_naive_hamming_distances(
        seed: u64,
        tokens in 14_usize..150,
        budget in 1_usize..40,
        bits in prop::sample::select(vec![1_usize, 63, 64, 128, 200]),
        norm: bool,
        // All equal, tiny, ordinary, and beyond f16.
        scale in prop::sample::select(vec![0.0_f32, 1e-6, 1.0, 1e6]),
    ) {
        let shape = small();
        let mut rng = Rng::new(seed);
        let keys: Vec<f32> = rng.normal(tokens * 16).iter().map(|value| value * scale).collect();
        let hint = rng.normal(32);
        let method = hata(budget, bits, norm, &shape);
        let mut store = Store::new(&method, &shape, 0, tokens);
        store.append(&method, &keys, 50);
        let selection = store.select(&method, &hint, &mut Scratch::new());
        let candidates = shape.candidates(tokens);
        for head in 0..2 {
            let scores = naive_scores(&method, &hint, &keys, head, norm);
            let chosen: Vec<usize> = selection.tokens(head).map(|token| token as usize).collect();
            prop_assert_eq!(chosen.len(), budget.min(candidates.len()));
            // Norms are kept in f16: 1/1024, and half of the smallest number.
            let worst = chosen.iter().map(|token| scores[*token]).fold(f32::INFINITY, f32::min);
            let slack = if norm { 2e-3 * worst.abs() + 2e-7 } else { 0.0 };
            for token in candidates.clone().filter(|token| !chosen.contains(token)) {
                let slack = if norm { slack + 2e-3 * scores[token].abs() } else { 0.0 };
                prop_assert!(scores[token] <= worst + slack, "row {} has {} and {worst} was taken", token, scores[token]);
            }
        }
    }

    #[test]
    fn rows_one_by_one_give_the_digest_of_all_at_once(
        seed: u64,
        chunk in 1_usize..40,
        dtype in prop::sample::select(Dtype::ALL.to_vec()),
    ) {
        let shape = Shape { dtype, ..small() };
        let keys = Rng::new(seed).normal(64 * 16);
        let method = hata(8, 128, true, &shape);
        let [one, all] = [chunk, 64].map(|chunk| {
            let mut store = Store::new(&method, &shape, 1, 64);
            store.append(&method, &keys, chunk);
            (0..2).map(|page| store.page(1, page).to_vec()).collect::<Vec<_>>()
        });
        prop_assert_eq!(one, all);
    }

    #[test]
    fn codes_keep_under_a_positive_factor_and_turn_around_with_the_key(seed: u64, factor in 1e-3_f32..1e3) {
        let shape = small();
        let method = hata(8, 128, true, &shape);
        let key = Rng::new(seed).normal(8);
        let code = |factor: f32| {
            let key: Vec<f32> = key.iter().map(|value| value * factor).collect();
            let mut store = Store::new(&method, &shape, 0, 1);
            store.append(&method, &[key.clone(), key].concat(), 1);
            store.page(0, 0)[..16].to_vec()
        };
        // A power of two scales every product exactly.
        let factor = 2.0_f32.powi(factor.log2() as i32);
        prop_assert_eq!(code(1.0), code(factor));
        let apart: u32 = code(1.0).iter().zip(code(-factor)).map(|(a, b)| (a ^ b).count_ones()).sum();
        prop_assert_eq!(apart, 128);
    }
}

#[test]
fn a_planted_key_has_no_distance_and_is_taken_first() {
    let shape = small();
    let mut rng = Rng::new(2);
    for token in [4, 33, 77, 91] {
        let mut keys = rng.normal(100 * 16);
        let query = rng.normal(8);
        for head in 0..2 {
            let key = &mut keys[token * 16 + head * 8..][..8];
            key.iter_mut().zip(&query).for_each(|(key, value)| *key = value * 0.25);
        }
        let method = hata(1, 128, false, &shape);
        let mut store = Store::new(&method, &shape, 0, 100);
        store.append(&method, &keys, 100);
        let selection = store.select(&method, &query.repeat(4), &mut Scratch::new());
        for head in 0..2 {
            assert_eq!(selection.tokens(head).collect::<Vec<_>>(), [token as u32]);
        }
    }
}

#[test]
fn bits_of_random_weights_differ_as_often_as_the_angle_says() {
    // E[distance]/r = angle/π, with variance p(1 − p)/r.
    let shape = small();
    let method = hata(1, 2048, false, &shape);
    let mut rng = Rng::new(9);
    for _ in 0..40 {
        let (a, b) = (rng.normal(8), rng.normal(8));
        let dot = matmul(&a, &b, 1, 8, 1)[0];
        let length = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
        let p = f64::from(dot / length(&a) / length(&b)).acos() / std::f64::consts::PI;
        let (a, b) = (naive_code(&method, 1, 0, &a), naive_code(&method, 1, 0, &b));
        let apart = a.iter().zip(&b).filter(|(a, b)| a != b).count() as f64 / 2048.0;
        let deviation = (p * (1.0 - p) / 2048.0).sqrt();
        assert!((apart - p).abs() < 5.0 * deviation, "{apart} of the bits differ, the angle says {p}");
    }
}

fn artifact(shape: &Shape, bits: &str, sides: Vec<usize>) -> Artifacts {
    let values = Rng::new(3).normal(sides.iter().product());
    let tensors = BTreeMap::from([("hash".to_owned(), Tensor { shape: sides, values })]);
    let settings = BTreeMap::from([("bits".to_owned(), bits.to_owned())]);
    let made = TensorArtifact::new(ArtifactKind::Hash, shape.fingerprint, tensors, settings).unwrap();
    [Artifact::Tensors(Arc::new(made))].into_iter().collect()
}

#[test]
fn trained_weights_come_from_the_artifact_and_others_are_refused() {
    let shape = small();
    let spec = HataSpec::default();
    let build = |artifacts: &Artifacts| Hata::new(spec, &shape, artifacts);
    let trained = build(&artifact(&shape, "64", vec![2, 2, 8, 64])).unwrap();
    assert_eq!(trained.codes.weights.bits, 64);
    assert_eq!(trained.digest_bytes(), 32 * (8 + 2));
    assert_ne!(trained.codes.weights.of(0, 1), trained.codes.weights.of(1, 0));
    assert!(matches!(build(&Artifacts::none()).unwrap_err(), MethodError::ArtifactMissing { .. }));
    for (bits, sides) in [("64", vec![2, 2, 8, 128]), ("0", vec![2, 2, 8, 0]), ("many", vec![2, 2, 8, 64])] {
        let error = build(&artifact(&shape, bits, sides)).unwrap_err();
        assert!(matches!(error, MethodError::ArtifactFormat { .. }), "{error}");
    }
    let other = Shape { fingerprint: crate::Fingerprint([1; 16]), ..shape };
    let error = build(&artifact(&other, "64", vec![2, 2, 8, 64])).unwrap_err();
    assert!(matches!(error, MethodError::ArtifactFingerprint { .. }), "{error}");
}

#[test]
fn digests_are_shared_where_the_weights_are_the_same() {
    let shape = small();
    let key = |budget, bits, norm| hata(budget, bits, norm, &shape).digest_key();
    assert_eq!(key(8, 128, true), key(9, 128, false));
    assert_ne!(key(8, 128, true), key(8, 64, true));
    let trained =
        Hata::new(HataSpec::default(), &shape, &artifact(&shape, "128", vec![2, 2, 8, 128])).unwrap();
    assert_ne!(trained.digest_key(), key(8, 128, true));
}

#[test]
fn options_that_do_not_go_together_are_refused() {
    let message = |text: &str| text.parse::<MethodSpec>().unwrap_err().to_string();
    assert!(message("hata:bits=64").contains("weights=random"));
    assert!(message("hata:seed=64").contains("weights=random"));
    assert!(message("hata:weights=random,bits=0").contains("2048"));
    assert!(message("hata:norm=yes").contains("on, off"));
    let text = "hata:budget=6%,weights=random,bits=64,seed=3,norm=off,hint=ahead";
    assert_eq!(text.parse::<MethodSpec>().unwrap().to_string(), text);
}

#[test]
fn a_block_of_queries_is_scored_by_all_of_them_together() {
    let (shape, tokens) = (small(), 140);
    let mut rng = Rng::new(21);
    let (keys, hint) = (rng.normal(tokens * 16), rng.normal(3 * 32));
    let method = hata(20, 128, false, &shape);
    let mut store = Store::new(&method, &shape, 0, tokens);
    store.append(&method, &keys, 64);
    let context = SelectContext { queries: 3, ..SelectContext::new(&shape, 0, tokens, &hint) };
    let selection = store.select_with(&method, &context, &mut Scratch::new());
    for head in 0..2 {
        let mut scores = vec![0.0; tokens];
        for query in hint.chunks(32) {
            let one = naive_scores(&method, query, &keys, head, false);
            scores.iter_mut().zip(one).for_each(|(sum, score)| *sum += score);
        }
        // Of equal scores the older row.
        let mut order: Vec<usize> = shape.candidates(tokens).collect();
        order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]).then(a.cmp(b)));
        let mut best: Vec<u32> = order[..20].iter().map(|token| *token as u32).collect();
        best.sort_unstable();
        assert_eq!(selection.tokens(head).collect::<Vec<_>>(), best);
    }
}

#[test]
fn keys_that_are_no_numbers_break_no_selection() {
    let shape = small();
    let method = hata(20, 128, true, &shape);
    let mut keys = Rng::new(22).normal(120 * 16);
    keys[40 * 16..60 * 16].fill(f32::NAN);
    keys[60 * 16..70 * 16].fill(f32::INFINITY);
    let mut store = Store::new(&method, &shape, 0, 120);
    store.append(&method, &keys, 64);
    let selection = store.select(&method, &Rng::new(23).normal(32), &mut Scratch::new());
    assert_eq!((selection.rows(0), selection.rows(1)), (20, 20));
}

#[test]
fn random_weights_that_would_take_too_much_memory_are_refused() {
    let huge = Shape { layers: 1 << 10, kv_heads: 1 << 4, query_heads: 1 << 4, head_dim: 1 << 10, ..small() };
    let build = |text: &str| crate::build(&text.parse().unwrap(), &huge, &Artifacts::none());
    let error = build("hata:weights=random,bits=2048").unwrap_err();
    assert!(matches!(error, MethodError::Unsuitable { .. }), "{error}");
    assert!(error.to_string().contains("fewer `bits`"), "{error}");
}
