//! What holds for every method that the registry lists.

use proptest::prelude::*;

use super::*;
use crate::context::SelectContext;
use crate::scratch::Scratch;
use crate::shape::tests::small;
use crate::testing::{Rng, Store};

/// Every method, in a form that needs no artifact and whose pages fit the small shape's window.
fn every_method() -> Vec<MethodSpec> {
    let options = |name: &str| match name {
        "infinigen" => "skew=off,budget=24",
        "hata" | "clo" => "weights=random,budget=24",
        "attention-predictor" => "weights=average,budget=24",
        "hetero" => "roles=none,budget=24",
        "freekv" => "page=4,budget=24",
        "shadowkv" | "dynsplit" | "quest" | "scout" | "random" | "oracle" | "kvoyant" => "budget=24",
        "mix" => {
            "0/0=(quest:budget=24),0/1=(attention-predictor:weights=average,budget=24),rest=(quest:budget=12)"
        }
        _ => "",
    };
    names().map(|name| format!("{name}:{}", options(name)).parse().unwrap()).collect()
}

/// Keys of the kinds that break careless arithmetic.
fn odd_keys(kind: usize, tokens: usize, rng: &mut Rng) -> Vec<f32> {
    let mut keys = rng.normal(tokens * 16);
    match kind {
        0 => {}
        1 => keys.fill(0.0),
        2 => keys.fill(0.5),
        3 => keys.iter_mut().for_each(|value| *value *= 1e15),
        4 => keys.iter_mut().for_each(|value| *value *= 1e-40),
        _ => keys.iter_mut().step_by(16).for_each(|value| *value = 1e4),
    }
    keys
}

/// Attention rows over so many blocks, whose largest weight is anywhere.
fn weights(rows: usize, blocks: usize, rng: &mut Rng) -> Vec<Vec<f32>> {
    let weight = |rng: &mut Rng| (rng.next() >> 40) as f32 / (1 << 24) as f32;
    (0..rows).map(|_| (0..blocks).map(|_| weight(rng)).collect()).collect()
}

/// Gives a method that learns from attention the first `most` blocks of these rows.
fn feed(method: &dyn Method, store: &mut Store, rows: &[Vec<f32>], most: usize) {
    for row in rows {
        for kv_head in 0..2 {
            store.feedback(method, kv_head, &row[..row.len().min(most)], true);
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn every_method_selects_candidates_in_order_for_any_keys_blocks_of_queries_and_parts_of_the_heads(
        kind in 0_usize..6, tokens in 1_usize..150, queries in 1_usize..4, seed: u64,
    ) {
        let shape = small();
        for spec in every_method() {
            let method = build(&spec, &shape, &Artifacts::none()).unwrap();
            let mut rng = Rng::new(seed);
            let mut store = Store::new(&*method, &shape, 1, 16);
            store.append(&*method, &odd_keys(kind, tokens, &mut rng), 37);
            let hint = rng.normal(queries * 32);
            let ids = [3, 0, (tokens - 1) as u32, (tokens / 2) as u32, 1, (tokens / 3) as u32];
            let context = SelectContext { queries, ids: &ids, ..SelectContext::new(&shape, 1, tokens, &hint) };
            let one = SelectContext { heads: 1..2, ..context.clone() };
            let mut scratch = Scratch::new();
            let part = store.clone().select_with(&*method, &one, &mut scratch);
            let whole = store.select_with(&*method, &context, &mut scratch);
            prop_assert_eq!(whole.heads(), 2, "{}", &spec);
            let candidates = shape.candidates(tokens);
            for head in 0..2 {
                let ranges = whole.head(head);
                prop_assert!(ranges.iter().all(|range| range.count > 0), "{}", &spec);
                prop_assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].first), "{}", &spec);
                let inside = whole.tokens(head).all(|token| candidates.contains(&(token as usize)));
                prop_assert!(inside, "{}: {:?} of {:?}", &spec, ranges, &candidates);
            }
            // The threshold rule averages over the heads that are asked for, and only it looks at others.
            prop_assert_eq!(part.heads(), 1);
            prop_assert_eq!(part.head(0), whole.head(1), "{}", &spec);
        }
    }

    #[test]
    fn every_method_goes_on_after_a_truncation_and_regrowth(tokens in 20_usize..120, cut in 0_usize..120, seed: u64) {
        let shape = small();
        let cut = cut.min(tokens);
        for spec in every_method() {
            let method = build(&spec, &shape, &Artifacts::none()).unwrap();
            let mut rng = Rng::new(seed);
            let (keys, hint) = (rng.normal(tokens * 16), rng.normal(32));
            let ids = [1, 5, 0];
            let mut scratch = Scratch::new();
            let mut pick = |store: &mut Store| {
                let context = SelectContext { ids: &ids, ..SelectContext::new(&shape, 0, tokens, &hint) };
                store.select_with(&*method, &context, &mut scratch)
            };
            // Of attention before the cut, what is known of blocks that were not wholly cut off stays.
            let block = method.needs().feedback.map(|feedback| feedback.block);
            let (before, after) = block.map_or((vec![], vec![]), |block| {
                let mut rows = |count| weights(count, tokens.div_ceil(block), &mut rng);
                (rows(5), rows(2))
            });
            let mut cut_and_grown = Store::new(&*method, &shape, 0, 16);
            cut_and_grown.append(&*method, &keys, 37);
            feed(&*method, &mut cut_and_grown, &before, usize::MAX);
            cut_and_grown.truncate(&*method, cut);
            cut_and_grown.append(&*method, &keys[cut * 16..], 5);
            let mut whole = Store::new(&*method, &shape, 0, 16);
            whole.append(&*method, &keys, 64);
            feed(&*method, &mut whole, &before, block.map_or(0, |block| cut / block));
            prop_assert_eq!(pick(&mut cut_and_grown), pick(&mut whole), "{} before it learns on", &spec);
            feed(&*method, &mut cut_and_grown, &after, usize::MAX);
            feed(&*method, &mut whole, &after, usize::MAX);
            prop_assert_eq!(pick(&mut cut_and_grown), pick(&mut whole), "{}", &spec);
        }
    }
}
