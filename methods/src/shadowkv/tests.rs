use proptest::prelude::*;

use super::*;
use crate::replay::Replay;
use crate::shape::tests::small;
use crate::testing::Rng;

fn method(options: &str, shape: &Shape) -> ShadowKv {
    let spec: MethodSpec = format!("shadowkv:{options}").parse().unwrap();
    ShadowKv::new(*spec.options().unwrap(), shape).unwrap()
}

fn filled(method: &ShadowKv, shape: &Shape, keys: &[f32], chunk: usize) -> Replay {
    let mut replay = Replay::new(method, shape, 0, keys.len() / 16);
    replay.append(method, keys, chunk);
    replay
}

/// Naive landmarks `[chunks][d]` and smallest cosines of a KV head.
fn landmarks(replay: &Replay, head: usize) -> (Vec<Vec<f32>>, Vec<f32>) {
    let norm = |x: &[f32]| x.iter().map(|x| x * x).sum::<f32>().sqrt();
    replay
        .keys(head)
        .chunks_exact(8 * 8)
        .map(|keys| {
            let mean: Vec<f32> =
                (0..8).map(|j| keys.chunks(8).map(|key| key[j]).sum::<f32>() / 8.0).collect();
            let cosine = |key: &[f32]| {
                key.iter().zip(&mean).map(|(a, b)| a * b).sum::<f32>() / (norm(key) * norm(&mean))
            };
            let least = keys.chunks(8).map(cosine).fold(1.0, f32::min);
            (mean, least)
        })
        .unzip()
}

#[test]
fn the_best_chunks_and_the_worst_described_ones_are_selected() {
    let shape = small();
    let method = method("budget=40,outliers=3", &shape);
    let mut rng = Rng::new(1);
    for tokens in [120, 203, 400] {
        let (keys, hint) = (rng.normal(tokens * 16), rng.normal(32));
        let mut replay = filled(&method, &shape, &keys, 50);
        let selection = replay.select(&method, &hint, &mut Scratch::new());
        let candidates = shape.candidates(tokens);
        let count = candidates.end.div_ceil(8);
        for head in 0..2 {
            let (means, cosines) = landmarks(&replay, head);
            let mut order: Vec<usize> = (0..count).collect();
            order.sort_by(|a, b| cosines[*a].total_cmp(&cosines[*b]));
            let outliers = &order[..3];
            let mut best = vec![0.0_f64; count];
            for query in hint[head * 16..(head + 1) * 16].chunks(8) {
                let logit = |chunk: usize| {
                    query.iter().zip(&means[chunk]).map(|(a, b)| f64::from(a * b)).sum::<f64>() / 8_f64.sqrt()
                };
                let others = (0..count).filter(|chunk| !outliers.contains(chunk));
                let total: f64 = others.clone().map(|chunk| logit(chunk).exp()).sum();
                others.for_each(|chunk| best[chunk] = best[chunk].max(logit(chunk).exp() / total));
            }
            let mut others: Vec<usize> = (0..count).filter(|chunk| !outliers.contains(chunk)).collect();
            others.sort_by(|a, b| best[*b].total_cmp(&best[*a]));
            let mut expected: Vec<usize> = outliers.iter().chain(&others[..5]).copied().collect();
            expected.sort_unstable();
            let rows: Vec<u32> = expected
                .iter()
                .flat_map(|chunk| chunk * 8..(chunk + 1) * 8)
                .filter(|token| candidates.contains(token))
                .map(|token| token as u32)
                .collect();
            assert_eq!(selection.tokens(head).collect::<Vec<_>>(), rows, "{tokens} tokens, head {head}");
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn rows_one_by_one_and_after_a_truncation_give_the_digest_of_all_at_once(
        tokens in 1_usize..150, chunk in 1_usize..40, cut in 0_usize..150, seed: u64,
    ) {
        let shape = small();
        let method = method("budget=8", &shape);
        let mut rng = Rng::new(seed);
        let keys = rng.normal(tokens * 16);
        let whole = filled(&method, &shape, &keys, 64);
        let mut parts = filled(&method, &shape, &keys, chunk);
        let cut = cut.min(tokens);
        parts.truncate(&method, cut);
        parts.append(&method, &keys[cut * 16..], chunk);
        for head in 0..2 {
            for page in 0..tokens / 32 {
                prop_assert_eq!(whole.page(head, page), parts.page(head, page));
            }
        }
        let hint = rng.normal(32);
        let mut scratch = Scratch::new();
        let (mut whole, mut parts) = (whole, parts);
        prop_assert_eq!(whole.select(&method, &hint, &mut scratch), parts.select(&method, &hint, &mut scratch));
    }

    #[test]
    fn odd_keys_never_break_a_selection(
        kind in 0_usize..4, tokens in 13_usize..160, seed: u64,
    ) {
        let shape = small();
        let method = method("budget=16", &shape);
        let mut rng = Rng::new(seed);
        let mut keys = rng.normal(tokens * 16);
        match kind {
            0 => keys.fill(0.0),
            1 => keys.fill(1.0),
            2 => keys.iter_mut().for_each(|value| *value *= 1e30),
            _ => keys.iter_mut().step_by(7).for_each(|value| *value = 1e-40),
        }
        let mut replay = filled(&method, &shape, &keys, 64);
        let selection = replay.select(&method, &rng.normal(32), &mut Scratch::new());
        let candidates = shape.candidates(tokens);
        for head in 0..2 {
            let most = (16 + 8).min(candidates.len());
            prop_assert!(selection.rows(head) <= most && (selection.rows(head) > 0 || candidates.is_empty()));
            prop_assert!(selection.tokens(head).all(|token| candidates.contains(&(token as usize))));
        }
    }
}

#[test]
fn a_chunk_of_equal_keys_has_its_key_as_landmark_and_is_no_outlier() {
    let shape = small();
    let method = method("budget=8,outliers=1", &shape);
    let mut rng = Rng::new(5);
    // Every chunk repeats one key, but for chunk 4, whose keys differ.
    let mut keys: Vec<f32> = (0..20)
        .flat_map(|_| rng.normal(16))
        .collect::<Vec<_>>()
        .chunks(16)
        .flat_map(|k| k.repeat(8))
        .collect();
    keys[4 * 8 * 16..5 * 8 * 16].copy_from_slice(&rng.normal(8 * 16));
    let mut replay = filled(&method, &shape, &keys, 64);
    let selection = replay.select(&method, &rng.normal(32), &mut Scratch::new());
    for head in 0..2 {
        let tokens: Vec<u32> = selection.tokens(head).collect();
        assert!((32..40).all(|token| tokens.contains(&token)), "{tokens:?}");
    }
}

#[test]
fn only_values_move_unless_keys_are_to() {
    let shape = small();
    assert_eq!(method("budget=8", &shape).needs().part, RowPart::Values);
    assert_eq!(method("keys=moved", &shape).needs().part, RowPart::Whole);
}

#[test]
fn outliers_follow_the_budget_and_everything_is_one_range() {
    let spec = |text: &str| *text.parse::<MethodSpec>().unwrap().options::<ShadowKvSpec>().unwrap();
    assert_eq!(spec("shadowkv").outliers(2048), 48);
    assert_eq!(spec("shadowkv").outliers(100), 2);
    assert_eq!(spec("shadowkv").outliers(8), 1);
    assert_eq!(spec("shadowkv:outliers=0").outliers(2048), 0);
    let shape = small();
    let all = method("budget=100%", &shape);
    let mut replay = filled(&all, &shape, &Rng::new(7).normal(100 * 16), 64);
    let selection = replay.select(&all, &Rng::new(8).normal(32), &mut Scratch::new());
    assert_eq!(selection.head(0).len(), 1);
    assert_eq!(selection.rows(0), shape.candidates(100).len());
}

#[test]
fn chunks_that_do_not_fit_pages_or_window_are_refused() {
    let spec = |chunk| ShadowKvSpec {
        chunk,
        ..*"shadowkv".parse::<MethodSpec>().unwrap().options::<ShadowKvSpec>().unwrap()
    };
    assert!(ShadowKv::new(spec(24), &small()).unwrap_err().to_string().contains("24"));
    assert!(ShadowKv::new(spec(16), &small()).unwrap_err().to_string().contains("window of 8"));
    let text = "shadowkv:budget=12%,outliers=3,rank=50%,keys=moved,hint=ahead";
    assert_eq!(text.parse::<MethodSpec>().unwrap().to_string(), text);
}
