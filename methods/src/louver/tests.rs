use proptest::prelude::*;

use super::*;
use crate::artifact::Artifacts;
use crate::budget::Budget;
use crate::build;
use crate::shape::tests::small;
use crate::store::RowSource;
use crate::testing::{Rng, Store};
use kvoyant_kernels::Dtype;

/// One layer of two KV heads with two query heads each, d = 8, without sinks and with a window of one token.
fn shape(dtype: Dtype) -> Shape {
    Shape { dtype, sinks: 0, window: 1, layers: 1, ..small() }
}

fn louver(text: &str, shape: &Shape) -> Louver {
    let spec: MethodSpec = text.parse().unwrap();
    Louver::new(*spec.options::<LouverSpec>().unwrap(), shape).unwrap()
}

/// Keys of all heads as stored, to be read as the daemon reads host pages.
struct Rows(Vec<Vec<f32>>);

impl Rows {
    fn of(store: &Store) -> Self {
        Self((0..2).map(|head| store.keys(head).to_vec()).collect())
    }
}

impl RowSource for Rows {
    fn scores(&self, kv_head: usize, tokens: Range<usize>, queries: &[f32], out: &mut [f32]) {
        for (query, out) in queries.chunks_exact(8).zip(out.chunks_exact_mut(tokens.len())) {
            for (token, score) in tokens.clone().zip(out) {
                *score = Kernels::best().dot(query, &self.0[kv_head][token * 8..][..8]);
            }
        }
    }

    fn keys(&self, kv_head: usize, tokens: Range<usize>, out: &mut [f32]) {
        out.copy_from_slice(&self.0[kv_head][tokens.start * 8..tokens.end * 8]);
    }
}

fn above(method: &Louver, store: &mut Store, hint: &[f32], tau: &[f32]) -> Selection {
    let rows = Rows::of(store);
    let context = SelectContext { rows: &rows, ..SelectContext::new(&method.shape, 0, store.tokens(), hint) };
    let mut out = Selection::new();
    store.with_store(|kept| method.select_above(&context, kept, tau, &mut Scratch::new(), &mut out));
    out
}

/// Every candidate of KV head `head` that is at or above the threshold of any of its queries.
fn brute_force(shape: &Shape, store: &Store, hint: &[f32], tau: &[f32], head: usize) -> Vec<u32> {
    let candidates = shape.candidates(store.tokens());
    let keys = store.keys(head);
    let queries = &hint[head * 16..][..16];
    candidates
        .filter(|token| {
            let key = &keys[token * 8..][..8];
            let mut scores = queries.chunks_exact(8).map(|query| Kernels::best().dot(query, key));
            tau[head * 2..][..2].iter().any(|tau| scores.next().is_some_and(|score| score >= *tau))
        })
        .map(|token| token as u32)
        .collect()
}

/// `tokens` rows of two KV heads, `[tokens][2][8]`, of one of [`KINDS`] kinds.
fn adversarial(kind: usize, tokens: usize, dtype: Dtype, rng: &mut Rng) -> Vec<f32> {
    let mut keys = rng.normal(tokens * 16);
    // Far from the largest value, so that scores stay finite.
    let huge = if dtype == Dtype::F16 { 3e4 } else { 1e18 };
    match kind {
        // As they are.
        0 => {}
        // A few distinct keys: ties everywhere.
        1 => {
            let few = keys[..16 * tokens.min(4)].to_vec();
            keys.chunks_exact_mut(16).for_each(|key| {
                let at = rng.next() as usize % (few.len() / 16) * 16;
                key.copy_from_slice(&few[at..at + 16]);
            });
        }
        // Denormals of the storage type, and of f32.
        2 => {
            let scale = if dtype == Dtype::F16 { 1e-7 } else { 1e-41 };
            keys.iter_mut().for_each(|key| *key *= scale);
        }
        // Zero vectors among others.
        3 => keys.chunks_exact_mut(8).for_each(|key| {
            if rng.next().is_multiple_of(2) {
                key.fill(if rng.next().is_multiple_of(2) { 0.0 } else { -0.0 });
            }
        }),
        // Outliers of huge norm.
        4 => keys.chunks_exact_mut(8).for_each(|key| {
            if rng.next().is_multiple_of(50) {
                key.iter_mut().for_each(|value| *value *= huge / 8.0);
            }
        }),
        // Channels that are nearly constant, with a large offset.
        5 => keys.chunks_exact_mut(8).for_each(|key| {
            key.iter_mut()
                .enumerate()
                .for_each(|(at, value)| *value = 900.0 * (at as f32 - 3.0) + *value * 1e-3);
        }),
        // Drifting, with strong neighbours: groups that prune well.
        6 => keys.chunks_exact_mut(16).enumerate().for_each(|(at, key)| {
            let angle = at as f32 / 300.0;
            key.iter_mut().enumerate().for_each(|(j, value)| {
                *value = *value * 0.02 + 3.0 * (angle * (1 + j % 8) as f32).sin();
            });
        }),
        // Values that lie between two of the storage type, of all magnitudes.
        _ => keys.iter_mut().for_each(|value| *value *= 10.0_f32.powi((rng.next() % 9) as i32 - 5)),
    }
    keys
}

const KINDS: usize = 8;

/// A threshold that is hard to get right: exactly a score, next to one, none, all.
fn thresholds(store: &Store, hint: &[f32], rng: &mut Rng) -> Vec<f32> {
    (0..4)
        .map(|query| {
            let token = rng.next() as usize % (store.tokens() - 1);
            let key = &store.keys(query / 2)[token * 8..][..8];
            let mut scores: Vec<f32> = (0..64)
                .map(|_| {
                    let token = rng.next() as usize % (store.tokens() - 1);
                    Kernels::best().dot(&hint[query * 8..][..8], &store.keys(query / 2)[token * 8..][..8])
                })
                .collect();
            scores.sort_by(f32::total_cmp);
            match rng.next() % 8 {
                0 => Kernels::best().dot(&hint[query * 8..][..8], key),
                1 => scores[63].next_up(),
                2 => scores[63].next_down(),
                3 => f32::INFINITY,
                4 => 0.0,
                5 => scores[32],
                _ => scores[62],
            }
        })
        .collect()
}

/// More than a million keys, each compared with brute force.
#[test]
fn no_row_at_or_above_the_threshold_is_missed_and_no_other_is_taken() {
    let (mut keys_seen, mut kept, mut rng) = (0, 0, Rng::new(11));
    while keys_seen < 1_100_000 {
        for dtype in Dtype::ALL {
            let shape = shape(dtype);
            for kind in 0..KINDS {
                let group = [1, 4, 8, 32][(rng.next() % 4) as usize];
                let method = louver(&format!("louver:group={group}"), &shape);
                let tokens = 4000 + (rng.next() % 200) as usize;
                let mut store = Store::new(&method, &shape, 0, tokens);
                let keys = adversarial(kind, tokens, dtype, &mut rng);
                store.append(&method, &keys, 1 + (rng.next() % 64) as usize);
                let mut hint = rng.normal(32);
                if rng.next().is_multiple_of(16) {
                    hint[..8].fill(0.0);
                }
                if rng.next().is_multiple_of(8) {
                    hint.iter_mut().for_each(|value| *value *= 1e-30);
                }
                let tau = thresholds(&store, &hint, &mut rng);
                let found = above(&method, &mut store, &hint, &tau);
                for head in 0..2 {
                    let expected = brute_force(&shape, &store, &hint, &tau, head);
                    let found: Vec<u32> = found.tokens(head).collect();
                    assert_eq!(found, expected, "{dtype}, kind {kind}, groups of {group}, tau {tau:?}");
                    kept += found.len();
                }
                keys_seen += 2 * tokens;
            }
        }
    }
    assert!(kept > 1000 && kept < keys_seen, "{kept} of {keys_seen} rows were at or above a threshold");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn the_bound_of_a_group_is_never_below_a_score_of_its_rows_summed_in_any_order(
        kind in 0..KINDS,
        rows in 1_usize..=32,
        chunk in 1_usize..=32,
        group in prop::sample::select(vec![1, 2, 8, 32]),
        dtype in prop::sample::select(Dtype::ALL.to_vec()),
        seed: u64,
    ) {
        let shape = shape(dtype);
        let method = louver(&format!("louver:group={group}"), &shape);
        let mut rng = Rng::new(seed);
        let mut store = Store::new(&method, &shape, 0, rows);
        store.append(&method, &adversarial(kind, rows, dtype, &mut rng), chunk);
        let query = rng.normal(8);
        let norms = [digest::norm(&query)];
        for (row, key) in store.keys(0).chunks_exact(8).enumerate() {
            let block = &store.page(0, 0)[row / group * method.groups.bytes()..][..method.groups.bytes()];
            let mut bound = [0.0];
            method.groups.bounds(block, &query, &norms, &mut Vec::new(), &mut bound);
            let products = query.iter().zip(key).map(|(q, k)| q * k);
            let exact: f64 = query.iter().zip(key).map(|(q, k)| f64::from(*q) * f64::from(*k)).sum();
            let (forward, back): (f32, f32) = (products.clone().sum(), products.rev().sum());
            for score in [f64::from(forward), f64::from(back), exact] {
                prop_assert!(bound[0] >= score, "row {row}: bound {} below {score}", bound[0]);
            }
        }
    }

    #[test]
    fn a_lower_threshold_finds_more_and_scaling_query_and_threshold_changes_nothing(
        kind in 0..KINDS,
        tokens in 2_usize..300,
        seed: u64,
    ) {
        let shape = shape(Dtype::F32);
        let method = louver("louver", &shape);
        let mut rng = Rng::new(seed);
        let mut store = Store::new(&method, &shape, 0, tokens);
        store.append(&method, &adversarial(kind, tokens, Dtype::F32, &mut rng), 64);
        let hint = rng.normal(32);
        let tau = thresholds(&store, &hint, &mut rng);
        let lower: Vec<f32> = tau.iter().map(|tau| tau - 0.5).collect();
        let found = above(&method, &mut store, &hint, &tau);
        let more = above(&method, &mut store, &hint, &lower);
        for head in 0..2 {
            let more: Vec<u32> = more.tokens(head).collect();
            prop_assert!(found.tokens(head).all(|token| more.binary_search(&token).is_ok()));
        }
        if kind != 2 {
            // By a power of two, which is exact where nothing is denormal.
            let scale = |values: &[f32]| values.iter().map(|value| value * 4.0).collect::<Vec<_>>();
            prop_assert_eq!(above(&method, &mut store, &scale(&hint), &scale(&tau)), found);
        }
    }
}

#[test]
fn one_key_is_found_at_its_own_score_and_not_above_it() {
    for dtype in Dtype::ALL {
        let shape = shape(dtype);
        let method = louver("louver", &shape);
        let mut store = Store::new(&method, &shape, 0, 2);
        let mut rng = Rng::new(3);
        store.append(&method, &rng.normal(2 * 16), 1);
        let hint = rng.normal(32);
        let score = |query: usize| Kernels::best().dot(&hint[query * 8..][..8], &store.keys(query / 2)[..8]);
        let exact: Vec<f32> = (0..4).map(score).collect();
        let beyond: Vec<f32> = exact.iter().map(|score| score.next_up()).collect();
        assert_eq!(above(&method, &mut store, &hint, &exact).total_rows(), 2);
        assert_eq!(above(&method, &mut store, &hint, &beyond).total_rows(), 0);
        assert_eq!(above(&method, &mut store, &hint, &[f32::NEG_INFINITY; 4]).total_rows(), 2);
    }
}

#[test]
fn centres_without_radii_lose_rows() {
    let shape = shape(Dtype::F32);
    let (sound, centre) = (louver("louver", &shape), louver("louver:gate=centre", &shape));
    let mut rng = Rng::new(7);
    let (keys, hint) = (rng.normal(4000 * 16), rng.normal(32));
    let mut store = Store::new(&sound, &shape, 0, 4000);
    store.append(&sound, &keys, 64);
    let tau = [4.0; 4];
    let all = above(&sound, &mut store, &hint, &tau);
    let some = above(&centre, &mut store, &hint, &tau);
    assert_eq!(all.tokens(0).collect::<Vec<_>>(), brute_force(&shape, &store, &hint, &tau, 0));
    assert!(some.rows(0) < all.rows(0), "{} of {} rows: nothing was lost", some.rows(0), all.rows(0));
}

#[test]
fn a_budget_is_about_met_for_each_query_and_a_cap_never_passed() {
    let shape = Shape { query_heads: 2, ..shape(Dtype::F32) };
    let rows = |text: &str| {
        let method = build(&text.parse().unwrap(), &shape, &Artifacts::none()).unwrap();
        let mut rng = Rng::new(9);
        let mut store = Store::new(&*method, &shape, 0, 5000);
        store.append(&*method, &rng.normal(5000 * 16), 64);
        let selection = store.select(&*method, &rng.normal(16), &mut Scratch::new());
        [selection.rows(0), selection.rows(1)]
    };
    // 10 % of 5,000 by the 25th of 256 scores: a standard deviation of a fifth.
    assert!(rows("louver:budget=10%").iter().all(|rows| (200..=1000).contains(rows)));
    assert_eq!(rows("louver:budget=10%,cap=100"), [100, 100]);
    assert_eq!(rows("louver:budget=100%"), [4999, 4999]);
    assert!(rows("louver:tau=sample-max").iter().all(|rows| (1..=250).contains(rows)));
    assert!(rows("louver:tau=sample-gap").iter().all(|rows| (1..=2500).contains(rows)));
}

#[test]
fn beyond_the_cap_the_best_by_exact_score_stay() {
    let shape = Shape { query_heads: 2, ..shape(Dtype::F32) };
    let method = build(&"louver:budget=50%,cap=20".parse().unwrap(), &shape, &Artifacts::none()).unwrap();
    let mut rng = Rng::new(13);
    let mut store = Store::new(&*method, &shape, 0, 600);
    store.append(&*method, &rng.normal(600 * 16), 64);
    let hint = rng.normal(16);
    let selection = store.select(&*method, &hint, &mut Scratch::new());
    for head in 0..2 {
        let scores: Vec<f32> = store.keys(head)[..599 * 8]
            .chunks_exact(8)
            .map(|key| Kernels::best().dot(&hint[head * 8..][..8], key))
            .collect();
        let mut order: Vec<u32> = (0..599).collect();
        order.sort_by(|a, b| scores[*b as usize].total_cmp(&scores[*a as usize]));
        order.truncate(20);
        order.sort_unstable();
        assert_eq!(selection.tokens(head).collect::<Vec<_>>(), order);
    }
}

#[test]
fn a_block_of_queries_finds_what_each_of_them_finds() {
    let shape = shape(Dtype::F16);
    let method = louver("louver", &shape);
    let mut rng = Rng::new(17);
    let mut store = Store::new(&method, &shape, 0, 500);
    store.append(&method, &rng.normal(500 * 16), 64);
    let hint = rng.normal(3 * 32);
    let rows = Rows::of(&store);
    let context =
        SelectContext { rows: &rows, queries: 3, ..SelectContext::new(&shape, 0, store.tokens(), &hint) };
    let mut block = Selection::new();
    let tau = [3.0; 12];
    store.with_store(|kept| method.select_above(&context, kept, &tau, &mut Scratch::new(), &mut block));
    for head in 0..2 {
        let mut union: Vec<u32> = hint
            .chunks_exact(32)
            .flat_map(|hint| above(&method, &mut store, hint, &tau[..4]).tokens(head).collect::<Vec<_>>())
            .collect();
        union.sort_unstable();
        union.dedup();
        assert_eq!(block.tokens(head).collect::<Vec<_>>(), union);
    }
}

#[test]
fn a_budget_beside_another_threshold_is_refused() {
    let message = |text: &str| text.parse::<MethodSpec>().unwrap_err().to_string();
    assert!(message("louver:tau=sample-max,budget=6%").contains("exclude"));
    assert!(message("louver:tau=median").contains("sample-gap"));
    assert!(message("louver:group=0").contains("from 1 to 4096"));
    let error = build(&"louver:group=24".parse().unwrap(), &small(), &Artifacts::none()).unwrap_err();
    assert!(error.to_string().contains("24"), "{error}");
    let spec: MethodSpec = "louver:tau=sample-max".parse().unwrap();
    assert_eq!(spec.with_budget(Budget::rows(7).unwrap()).to_string(), "louver:budget=7");
}
