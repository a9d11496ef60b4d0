use std::f32::consts::PI;

use proptest::prelude::*;

use super::*;
use crate::artifact::Artifacts;
use crate::build;
use crate::shape::tests::small;
use crate::testing::{Rng, Store};

fn resv(text: &str, shape: &Shape) -> Resv {
    let spec: MethodSpec = text.parse().unwrap();
    Resv::new(*spec.options::<ResvSpec>().unwrap(), shape)
}

/// `tokens` rows `[tokens][2][8]`: neighbours of a few directions, of the given spread.
fn frames(rng: &mut Rng, tokens: usize, spread: f32) -> Vec<f32> {
    let centres = rng.normal(6 * 16);
    let mut keys = rng.normal(tokens * 16);
    for (at, key) in keys.chunks_exact_mut(16).enumerate() {
        let centre = &centres[(at / 7 % 6) * 16..][..16];
        key.iter_mut().zip(centre).for_each(|(value, centre)| *value = 2.0 * centre + spread * *value);
    }
    keys
}

fn filled(method: &Resv, keys: &[f32], chunk: usize, room: usize) -> Store {
    let mut store = Store::new(method, &method.shape, 0, room);
    store.append(method, keys, chunk);
    store
}

/// Tokens of each cluster of KV head 0.
fn members(method: &Resv, memory: &[u8]) -> Vec<Vec<usize>> {
    let mut members = vec![Vec::new(); method.tables.count(memory)];
    (0..Tables::tokens(memory)).for_each(|token| members[Tables::cluster_of(memory, token)].push(token));
    members
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn sizes_sum_to_the_tokens_and_means_and_hashes_are_those_of_the_members(
        tokens in 1_usize..300,
        spread in prop::sample::select(vec![0.0, 0.05, 0.3, 1.0, 30.0]),
        chunk in 1_usize..64,
        seed: u64,
    ) {
        let method = resv("resv:recent=100", &small());
        let store = filled(&method, &frames(&mut Rng::new(seed), tokens, spread), chunk, tokens);
        let memory = store.memory(0);
        prop_assert_eq!(Tables::tokens(memory), tokens);
        let members = members(&method, memory);
        prop_assert!(members.len() <= method.tables.limit(tokens));
        let mut mean = vec![0.0; 8];
        for (cluster, members) in members.iter().enumerate() {
            prop_assert!(!members.is_empty());
            prop_assert_eq!(method.tables.size(memory, cluster) as usize, members.len());
            method.tables.mean(memory, cluster, &mut mean);
            prop_assert_eq!(method.tables.hash_of(memory, cluster), method.tables.hash(&mean));
            for (j, mean) in mean.iter().enumerate() {
                let of = |token: &usize| f64::from(store.keys(0)[token * 8 + j]);
                let (sum, size): (f64, f64) =
                    (members.iter().map(of).sum(), members.iter().map(|t| of(t).abs()).sum());
                let (exact, size) = (sum / members.len() as f64, size / members.len() as f64);
                prop_assert!((f64::from(*mean) - exact).abs() <= 1e-4 * size.max(1e-30), "{mean} is not {exact}");
            }
        }
    }

    #[test]
    fn room_to_grow_chunks_and_a_truncation_leave_no_trace(
        tokens in 2_usize..200,
        cut in 1_usize..200,
        chunk in 1_usize..64,
        seed: u64,
    ) {
        let method = resv("resv:recent=50", &small());
        let mut rng = Rng::new(seed);
        let (keys, hint) = (frames(&mut rng, tokens, 0.3), rng.normal(32));
        let mut at_once = filled(&method, &keys, 64, tokens);
        let mut grown = filled(&method, &keys[..16], 64, 1);
        keys[16..].chunks(16 * chunk).for_each(|keys| grown.append(&method, keys, chunk));
        prop_assert_eq!(members(&method, at_once.memory(1)), members(&method, grown.memory(1)));
        let first = at_once.select(&method, &hint, &mut Scratch::new());
        prop_assert_eq!(&first, &grown.select(&method, &hint, &mut Scratch::new()));

        let cut = cut.min(tokens);
        grown.truncate(&method, cut);
        prop_assert_eq!(members(&method, grown.memory(0)), members(&method, filled(&method, &keys[..cut * 16], 64, cut).memory(0)));
        grown.append(&method, &keys[cut * 16..], chunk);
        prop_assert_eq!(first, grown.select(&method, &hint, &mut Scratch::new()));
    }

    #[test]
    fn a_ratio_of_one_selects_all_and_a_budget_is_never_passed(
        tokens in 0_usize..300,
        budget in 1_usize..200,
        ratio in 0.01_f64..1.0,
        seed: u64,
    ) {
        let shape = small();
        let mut rng = Rng::new(seed);
        let (keys, hint) = (frames(&mut rng, tokens, 0.5), rng.normal(32));
        let rows = |text: &str| {
            let method = resv(text, &shape);
            let mut store = filled(&method, &keys, 64, tokens);
            let selection = store.select(&method, &hint, &mut Scratch::new());
            [selection.rows(0), selection.rows(1)]
        };
        let all = shape.candidates(tokens).len();
        prop_assert_eq!(rows("resv:ratio=100%"), [all, all]);
        let free = rows(&format!("resv:ratio={ratio}"));
        let cut = rows(&format!("resv:ratio={ratio},budget={budget}"));
        prop_assert_eq!(cut, free.map(|free| free.min(budget)));
        prop_assert_eq!(rows(&format!("resv:ratio=100%,budget={budget}")), [all.min(budget); 2]);
    }

    #[test]
    fn a_block_of_queries_selects_what_any_of_them_selects(tokens in 20_usize..300, seed: u64) {
        let shape = small();
        let method = resv("resv", &shape);
        let mut rng = Rng::new(seed);
        let mut store = filled(&method, &frames(&mut rng, tokens, 0.5), 64, tokens);
        let hint = rng.normal(3 * 32);
        let context =
            SelectContext { queries: 3, ..SelectContext::new(&shape, 0, tokens, &hint) };
        let block = store.select_with(&method, &context, &mut Scratch::new());
        for head in 0..2 {
            let mut union: Vec<u32> = hint
                .chunks_exact(32)
                .flat_map(|hint| {
                    store.select(&method, hint, &mut Scratch::new()).tokens(head).collect::<Vec<_>>()
                })
                .collect();
            union.sort_unstable();
            union.dedup();
            prop_assert_eq!(block.tokens(head).collect::<Vec<_>>(), union);
        }
    }
}

#[test]
fn equal_keys_share_a_cluster_and_opposite_ones_never_do() {
    let method = resv("resv", &small());
    let mut rng = Rng::new(1);
    let key = rng.normal(16);
    let keys: Vec<f32> = (0..60)
        .flat_map(|at| key.iter().map(move |value| if at % 2 == 0 { *value } else { -value }))
        .collect();
    let store = filled(&method, &keys, 64, 60);
    let members = members(&method, store.memory(0));
    assert_eq!(members.len(), 2);
    assert!(members[0].iter().all(|token| token % 2 == 0));
}

#[test]
fn a_hash_knows_directions_only_and_its_distance_is_the_angle() {
    let shape = Shape { head_dim: 64, ..small() };
    let method = resv("resv", &shape);
    let mut rng = Rng::new(2);
    let (mut sum, mut variance) = (0.0, 0.0);
    for _ in 0..2000 {
        let (x, y) = (rng.normal(64), rng.normal(64));
        let scaled: Vec<f32> = x.iter().map(|x| x * 8.0).collect();
        assert_eq!(method.tables.hash(&x), method.tables.hash(&scaled));
        let kernels = Kernels::best();
        let cosine = kernels.dot(&x, &y) / (kernels.dot(&x, &x) * kernels.dot(&y, &y)).sqrt();
        let share = cosine.acos() / PI;
        sum += (method.tables.hash(&x) ^ method.tables.hash(&y)).count_ones() as f32 - 32.0 * share;
        variance += 32.0 * share * (1.0 - share);
    }
    // The planes are the same for every pair: their own error is that of 32 of them, on top of that of the pairs.
    let allowed = 6.0 * variance.sqrt() + 2000.0 * 0.3;
    assert!(sum.abs() < allowed, "{sum} is not within {allowed}");
    assert_ne!(method.tables.planes, resv("resv:seed=1", &shape).tables.planes);
}

#[test]
fn keys_that_never_cluster_fill_the_limit_and_then_join_the_nearest() {
    let tokens = 400;
    let mut rng = Rng::new(3);
    let keys = rng.normal(tokens * 16);
    let clusters = |text: &str| {
        let method = resv(text, &small());
        let store = filled(&method, &keys, 64, tokens);
        let memory = store.memory(0);
        assert_eq!(members(&method, memory).iter().map(Vec::len).sum::<usize>(), tokens);
        method.tables.count(memory)
    };
    assert_eq!(clusters("resv:distance=1,clusters=25%"), 100);
    assert!(clusters("resv:distance=1,clusters=100%") > 390, "almost every key is alone");
    assert_eq!(clusters("resv:distance=33"), 1);
}

#[test]
fn a_cluster_without_a_recent_key_is_closed() {
    let mut rng = Rng::new(4);
    let (a, b) = (rng.normal(16), rng.normal(16));
    // Forty times a, then forty times b, then a again.
    let keys: Vec<f32> =
        (0..81).flat_map(|at| if (40..80).contains(&at) { b.clone() } else { a.clone() }).collect();
    let clusters = |recent: usize| {
        let method = resv(&format!("resv:recent={recent}"), &small());
        let store = filled(&method, &keys, 64, 81);
        Tables::cluster_of(store.memory(0), 80)
    };
    assert_eq!(clusters(41), 0, "a's cluster still counts");
    assert_eq!(clusters(40), 2, "it is closed, and a new one opened");
}

/// Keys of which the sinks score far above all others.
#[test]
fn sinks_and_window_do_not_use_up_the_share() {
    let shape = small();
    let method = resv("resv:ratio=50%", &shape);
    let mut rng = Rng::new(5);
    let mut keys = frames(&mut rng, 200, 0.1);
    let hint = vec![1.0; 32];
    for token in (0..4).chain(192..200) {
        keys[token * 16..(token + 1) * 16].fill(9.0);
    }
    let mut store = filled(&method, &keys, 64, 200);
    let selection = store.select(&method, &hint, &mut Scratch::new());
    assert!(selection.rows(0) > 0 && selection.rows(1) > 0);
}

#[test]
fn its_options_are_checked_and_shape_its_memory() {
    let message = |text: &str| text.parse::<MethodSpec>().unwrap_err().to_string();
    assert!(message("resv:distance=34").contains("1 to 33"));
    assert!(message("resv:ratio=0").contains("ratio"));
    assert!(message("resv:score=other").contains("softmax, raw"));
    let key = |text: &str| build(&text.parse().unwrap(), &small(), &Artifacts::none()).unwrap().digest_key();
    assert_eq!(key("resv"), key("resv:ratio=50%,budget=6%,score=raw"));
    assert_ne!(key("resv"), key("resv:seed=1"));
    assert_ne!(key("resv"), key("resv:recent=10"));
}
