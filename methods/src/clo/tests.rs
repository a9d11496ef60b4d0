use proptest::prelude::*;

use super::*;
use crate::budget::Budget;
use crate::hata::{HashOptions, Hata, HataSpec, Weights};
use crate::shape::tests::small;
use crate::testing::{Rng, Store};

const HASH: HashOptions = HashOptions { weights: Weights::Random { bits: 128, seed: 5 }, norm: true };

fn clo(tau: f64, budget: usize) -> Clo {
    let options = CloSpec { budget: Budget::rows(budget).unwrap(), tau, hash: HASH, ..CloSpec::default() };
    Clo::new(options, &small(), &Artifacts::none()).unwrap()
}

fn hata(budget: usize) -> Hata {
    let options = HataSpec { budget: Budget::rows(budget).unwrap(), hash: HASH, ..HataSpec::default() };
    Hata::new(options, &small(), &Artifacts::none()).unwrap()
}

/// A step of a random walk: `a·x + √(1 − a²)·noise`.
fn walk(rng: &mut Rng, x: &[f32], a: f32) -> Vec<f32> {
    x.iter().zip(rng.normal(x.len())).map(|(x, noise)| a * x + (1.0 - a * a).sqrt() * noise).collect()
}

/// Mean over the group of the cosine with the label.
fn likeness(query: &[f32], label: &[f32]) -> f64 {
    let cosine = |(a, b): (&[f32], &[f32])| {
        let dot =
            |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| f64::from(*a) * f64::from(*b)).sum::<f64>();
        dot(a, b) / (dot(a, a) * dot(b, b)).sqrt()
    };
    query.chunks(8).zip(label.chunks(8)).map(cosine).sum::<f64>() / 2.0
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn above_one_every_step_is_a_miss_and_the_selection_that_of_the_codes(
        seed: u64,
        budget in 1_usize..40,
        steps in 1_usize..12,
    ) {
        let (method, plain) = (clo(1.1, budget), hata(budget));
        let shape = small();
        let mut rng = Rng::new(seed);
        let [mut store, mut other] = [Store::new(&method, &shape, 0, 64), Store::new(&plain, &shape, 0, 64)];
        let mut query = rng.normal(32);
        let mut keys = rng.normal(90 * 16);
        for _ in 0..steps {
            store.append(&method, &keys, 7);
            other.append(&plain, &keys, 64);
            let mut scratch = Scratch::new();
            prop_assert_eq!(
                store.select(&method, &query, &mut scratch),
                other.select(&plain, &query, &mut scratch)
            );
            query = walk(&mut rng, &query, 0.99);
            keys = rng.normal(16);
        }
    }

    #[test]
    fn at_minus_one_a_sequence_fetches_once(seed: u64, budget in 1_usize..40, steps in 1_usize..20) {
        let method = clo(-1.0, budget);
        let mut rng = Rng::new(seed);
        let mut store = Store::new(&method, &small(), 0, 64);
        store.append(&method, &rng.normal(90 * 16), 64);
        let mut scratch = Scratch::new();
        let first = store.select(&method, &rng.normal(32), &mut scratch);
        for _ in 0..steps {
            store.append(&method, &rng.normal(16), 64);
            let query = rng.normal(32);
            prop_assert_eq!(&store.select(&method, &query, &mut scratch), &first);
            let opposite: Vec<f32> = query.iter().map(|value| -value).collect();
            prop_assert_eq!(&store.select(&method, &opposite, &mut scratch), &first);
        }
    }

    #[test]
    fn each_head_hits_just_where_its_query_is_close_to_its_label_which_moves_on_a_miss_only(
        seed: u64,
        tau in -0.5_f64..1.0,
    ) {
        let (method, plain) = (clo(tau, 10), hata(10));
        let shape = small();
        let mut rng = Rng::new(seed);
        let keys = rng.normal(120 * 16);
        let [mut store, mut other] = [Store::new(&method, &shape, 0, 120), Store::new(&plain, &shape, 0, 120)];
        store.append(&method, &keys, 64);
        other.append(&plain, &keys, 64);
        let mut scratch = Scratch::new();
        let mut query = rng.normal(32);
        let mut labels: [Option<(Vec<f32>, Vec<u32>)>; 2] = [None, None];
        for _ in 0..15 {
            let before = [store.memory(0).to_vec(), store.memory(1).to_vec()];
            let selection = store.select(&method, &query, &mut scratch);
            let fresh = other.select(&plain, &query, &mut scratch);
            for head in 0..2 {
                let query = &query[head * 16..][..16];
                let rows: Vec<u32> = selection.tokens(head).collect();
                match &labels[head] {
                    Some((label, kept)) if likeness(query, label) >= tau => {
                        prop_assert_eq!(&rows, kept);
                        prop_assert_eq!(store.memory(head), &before[head][..]);
                    }
                    _ => {
                        prop_assert_eq!(&rows, &fresh.tokens(head).collect::<Vec<_>>());
                        labels[head] = Some((query.to_vec(), rows));
                    }
                }
            }
            // Only the first head's query moves every time.
            let moved = walk(&mut rng, &query, 0.9);
            query[..16].copy_from_slice(&moved[..16]);
        }
    }

    #[test]
    fn whatever_a_memory_holds_the_selection_is_sorted_and_within_the_candidates(
        bytes in prop::collection::vec(prop_oneof![Just(0_u8), Just(1), Just(0x3f), any::<u8>()], 0..200),
        tokens in 0_usize..200,
    ) {
        let layout = Layout { group: 1, head_dim: 2 };
        let candidates = small().candidates(tokens);
        let mut out = Selection::new();
        layout.push(&bytes, &candidates, &mut out);
        out.finish_head();
        prop_assert!(out.tokens(0).all(|token| candidates.contains(&(token as usize))));
        prop_assert!(layout.likeness(&bytes, &[1.0, 2.0]).is_none_or(|cosine| cosine.abs() <= 1.0));
        let mut bytes = bytes;
        layout.truncate(tokens, &mut bytes);
    }
}

#[test]
fn a_query_or_label_without_direction_is_a_miss() {
    let method = clo(-1.0, 10);
    let mut rng = Rng::new(1);
    let mut store = Store::new(&method, &small(), 0, 120);
    store.append(&method, &rng.normal(120 * 16), 64);
    let mut scratch = Scratch::new();
    let query = rng.normal(32);
    for broken in [0.0, f32::NAN, f32::INFINITY] {
        store.select(&method, &[broken; 32], &mut scratch);
        // The broken query is the label now, so that this is a miss, too.
        let before = store.memory(0).to_vec();
        store.select(&method, &query, &mut scratch);
        assert_ne!(store.memory(0), before, "{broken}");
    }
}

#[test]
fn a_selection_of_rows_that_are_gone_is_forgotten_and_one_in_the_window_clipped() {
    let method = clo(-1.0, 60);
    let mut rng = Rng::new(2);
    let mut store = Store::new(&method, &small(), 0, 120);
    let keys = rng.normal(120 * 16);
    store.append(&method, &keys, 64);
    let mut scratch = Scratch::new();
    let query = rng.normal(32);
    let all = store.select(&method, &query, &mut scratch);
    let last = all.tokens(0).max().unwrap() as usize;
    // The rows stay, and some of them are in the window now.
    store.truncate(&method, last + 1);
    let clipped = store.select(&method, &query, &mut scratch);
    let kept: Vec<u32> = all.tokens(0).filter(|token| (*token as usize) < last + 1 - 8).collect();
    assert_eq!(clipped.tokens(0).collect::<Vec<_>>(), kept);
    store.truncate(&method, last);
    assert!(store.memory(0).iter().all(|byte| *byte == 0));
}

#[test]
fn important_heads_have_a_threshold_of_their_own() {
    let spec: MethodSpec =
        "clo:budget=8,tau=-1,important=0.1,important_tau=2,weights=random".parse().unwrap();
    assert_eq!(spec.to_string().parse::<MethodSpec>().unwrap(), spec);
    let method = crate::build(&spec, &small(), &Artifacts::none()).unwrap();
    let mut rng = Rng::new(3);
    let mut store = Store::new(&*method, &small(), 0, 120);
    store.append(&*method, &rng.normal(120 * 16), 64);
    let mut scratch = Scratch::new();
    let first = store.select(&*method, &rng.normal(32), &mut scratch);
    let second = store.select(&*method, &rng.normal(32), &mut scratch);
    assert_eq!(first.head(0), second.head(0));
    assert_ne!(first.head(1), second.head(1));

    let wrong: MethodSpec = "clo:important=0.1+2.0,weights=random".parse().unwrap();
    let message = crate::build(&wrong, &small(), &Artifacts::none()).unwrap_err().to_string();
    assert!(message.contains("2.0") && message.contains("2 layers"), "{message}");
    assert!("clo:important=2".parse::<MethodSpec>().unwrap_err().to_string().contains("layer.head"));
    assert!("clo:tau=NaN".parse::<MethodSpec>().is_err());
}

#[test]
fn a_block_of_queries_is_a_miss_and_leaves_the_label_of_its_last_token() {
    let (method, plain) = (clo(-1.0, 10), hata(10));
    let mut rng = Rng::new(11);
    let mut store = Store::new(&method, &small(), 0, 64);
    store.append(&method, &rng.normal(112 * 16), 64);
    let mut scratch = Scratch::new();
    store.select(&method, &rng.normal(32), &mut scratch);
    let hint = rng.normal(3 * 32);
    let context = SelectContext { queries: 3, ..SelectContext::new(&small(), 0, 112, &hint) };
    let block = store.select_with(&method, &context, &mut scratch);
    assert_eq!(block, store.select_with(&plain, &context, &mut scratch), "hata's, on the same digests");
    for head in 0..2 {
        let last: Vec<u8> =
            hint[64 + head * 16..][..16].iter().flat_map(|value| value.to_le_bytes()).collect();
        assert_eq!(store.memory(head)[8..8 + 64], last);
    }
    assert_eq!(store.select(&method, &rng.normal(32), &mut scratch), block);
}

#[test]
fn a_fork_goes_on_with_the_label_and_the_rows() {
    let method = clo(-1.0, 10);
    let mut rng = Rng::new(12);
    let mut parent = Store::new(&method, &small(), 0, 64);
    parent.append(&method, &rng.normal(100 * 16), 64);
    let mut scratch = Scratch::new();
    let chosen = parent.select(&method, &rng.normal(32), &mut scratch);
    let mut fork = parent.clone();
    parent.truncate(&method, 0);
    // Long enough for its memory to move.
    fork.append(&method, &rng.normal(200 * 16), 64);
    assert_eq!(fork.select(&method, &rng.normal(32), &mut scratch), chosen);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn a_head_decides_by_its_own_queries_alone(head in 0_usize..2, keep in 0.5_f32..1.0, seed: u64) {
        let method = clo(0.8, 10);
        let mut rng = Rng::new(seed);
        let mut one = Store::new(&method, &small(), 0, 64);
        one.append(&method, &rng.normal(150 * 16), 64);
        let mut other = one.clone();
        let mut query = rng.normal(32);
        let mut scratch = Scratch::new();
        for _ in 0..10 {
            let mut perturbed = query.clone();
            perturbed[head * 16..][..16].copy_from_slice(&rng.normal(16));
            let a = one.select(&method, &query, &mut scratch);
            let b = other.select(&method, &perturbed, &mut scratch);
            prop_assert_eq!(a.head(1 - head), b.head(1 - head));
            prop_assert_eq!(one.memory(1 - head), other.memory(1 - head));
            query = walk(&mut rng, &query, keep);
        }
    }

    #[test]
    fn a_truncation_keeps_what_is_whole_and_forgets_what_is_not(
        cut in 0_usize..150, zeros: bool, seed: u64,
    ) {
        let (method, plain) = (clo(-1.0, 15), hata(15));
        let mut rng = Rng::new(seed);
        let mut keys = rng.normal(150 * 16);
        if zeros {
            keys.fill(0.0);
        }
        let mut store = Store::new(&method, &small(), 0, 64);
        store.append(&method, &keys, 64);
        let mut scratch = Scratch::new();
        let chosen = store.select(&method, &rng.normal(32), &mut scratch);
        store.truncate(&method, cut);
        let hint = rng.normal(32);
        let fresh = store.clone().select(&plain, &hint, &mut scratch);
        let selection = store.select(&method, &hint, &mut scratch);
        let candidates = small().candidates(cut);
        for head in 0..2 {
            let kept: Vec<u32> = chosen.tokens(head).collect();
            let all = candidates.len() <= 15 || kept.iter().any(|token| *token as usize >= cut);
            let expected: Vec<u32> = if all {
                fresh.tokens(head).collect()
            } else {
                kept.into_iter().filter(|token| candidates.contains(&(*token as usize))).collect()
            };
            prop_assert_eq!(selection.tokens(head).collect::<Vec<_>>(), expected);
        }
    }
}
