use proptest::prelude::*;

use super::*;
use crate::needs::mark;
use crate::quest::NAME as QUEST;
use crate::registry::build;
use crate::shape::tests::small;
use crate::testing::{Rng, Store};
use crate::{Artifacts, Dtype};
use kvoyant_kernels::Kernels;

fn dynsplit(options: &str, shape: &Shape) -> Dynsplit {
    let spec: MethodSpec = format!("{NAME}:{options}").parse().unwrap();
    Dynsplit::new(*spec.options::<DynsplitSpec>().unwrap(), shape)
}

/// Ends of a head's blocks, the open one's among them.
fn ends(method: &Dynsplit, store: &Store, head: usize) -> Vec<usize> {
    let memory = store.memory(head);
    (0..method.layout.blocks(memory)).map(|block| method.layout.block(memory, block).end).collect()
}

fn grown(method: &Dynsplit, shape: &Shape, keys: &[f32], marks: &[u8], chunk: usize) -> Store {
    let mut store = Store::new(method, shape, 0, 16);
    store.mark(marks);
    store.append(method, keys, chunk);
    store
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn blocks_partition_the_tokens_in_order_within_the_limits_however_appends_are_cut(
        marks in prop::collection::vec(0_u8..5, 0..300),
        limits in prop::sample::select(vec![(1, 1), (1, 7), (8, 64), (8, 8), (3, 40)]),
        score in prop::sample::select(vec!["keys", "marks"]),
        least in prop::sample::select(vec!["word", "clause", "line"]),
        digest in prop::sample::select(vec!["bounds", "mean"]),
        chunk in 1_usize..80,
        zero: bool,
        seed: u64,
    ) {
        let shape = small();
        let (min, max) = limits;
        let method = dynsplit(&format!("min={min},max={max},score={score},candidates={least},digest={digest}"), &shape);
        let tokens = marks.len();
        let keys = if zero { vec![0.0; tokens * 16] } else { Rng::new(seed).normal(tokens * 16) };
        let store = grown(&method, &shape, &keys, &marks, chunk);
        let at_once = grown(&method, &shape, &keys, &marks, usize::MAX);
        for head in 0..2 {
            let ends = ends(&method, &store, head);
            prop_assert_eq!(ends.last().copied().unwrap_or(0), tokens);
            let starts = std::iter::once(0).chain(ends.iter().copied());
            let lengths: Vec<usize> = ends.iter().zip(starts).map(|(end, start)| end - start).collect();
            let (last, closed) = lengths.split_last().unwrap_or((&0, &[]));
            prop_assert!(closed.iter().all(|length| (min..=max).contains(length)), "{:?}", lengths);
            prop_assert!(*last <= method.layout.waiting());
            let memory = store.memory(head);
            for token in 0..tokens {
                prop_assert!(method.layout.block(memory, method.layout.block_of(memory, token)).contains(&token));
            }
            let used = method.layout.bytes(tokens).min(at_once.memory(head).len()).min(memory.len());
            prop_assert_eq!(&memory[..16], &at_once.memory(head)[..16]);
            let records = method.layout.bytes(0);
            prop_assert_eq!(&memory[records..used], &at_once.memory(head)[records..used]);
        }
    }

    #[test]
    fn without_delimiters_blocks_are_pages_of_the_longest_length(
        tokens in 1_usize..300,
        max in 8_usize..64,
        marked: bool,
        score in prop::sample::select(vec!["keys", "marks"]),
        seed: u64,
    ) {
        let shape = small();
        let method = dynsplit(&format!("max={max},score={score}"), &shape);
        let marks = vec![mark::WORD; if marked { tokens } else { 0 }];
        let store = grown(&method, &shape, &Rng::new(seed).normal(tokens * 16), &marks, 29);
        let ends = ends(&method, &store, 1);
        let (_, closed) = ends.split_last().unwrap();
        prop_assert!(closed.iter().enumerate().all(|(at, end)| *end == (at + 1) * max), "{:?}", ends);
    }

    #[test]
    fn fixed_boundaries_select_what_quest_selects(
        tokens in 1_usize..250,
        page in prop::sample::select(vec![1_usize, 4, 8, 16, 32]),
        budget in 1_usize..120,
        dtype in prop::sample::select(Dtype::ALL.to_vec()),
        queries in 1_usize..3,
        equal: bool,
        seed: u64,
    ) {
        let shape = Shape { dtype, ..small() };
        let method = dynsplit(&format!("boundary=fixed,page={page},budget={budget}"), &shape);
        let quest = build(&format!("{QUEST}:page={page},budget={budget}").parse().unwrap(), &shape, &Artifacts::none()).unwrap();
        let mut rng = Rng::new(seed);
        let keys = if equal { vec![0.5; tokens * 16] } else { rng.normal(tokens * 16) };
        let hint = rng.normal(queries * 32);
        let context = SelectContext { queries, ..SelectContext::new(&shape, 0, tokens, &hint) };
        let mut ours = Store::new(&method, &shape, 0, tokens);
        ours.append(&method, &keys, 13);
        let mut theirs = Store::new(&*quest, &shape, 0, tokens);
        theirs.append(&*quest, &keys, 64);
        let mut scratch = Scratch::new();
        let selection = ours.select_with(&method, &context, &mut scratch);
        prop_assert_eq!(selection, theirs.select_with(&*quest, &context, &mut scratch));
    }

    #[test]
    fn the_budget_is_never_exceeded_and_a_block_is_taken_whole(
        marks in prop::collection::vec(0_u8..5, 30..300),
        budget in 1_usize..150,
        digest in prop::sample::select(vec!["bounds", "mean"]),
        seed: u64,
    ) {
        let shape = small();
        let method = dynsplit(&format!("budget={budget},digest={digest}"), &shape);
        let mut rng = Rng::new(seed);
        let mut store = grown(&method, &shape, &rng.normal(marks.len() * 16), &marks, 29);
        let selection = store.select(&method, &rng.normal(32), &mut Scratch::new());
        let candidates = shape.candidates(marks.len());
        for head in 0..2 {
            let rows = selection.rows(head);
            prop_assert!(rows > 0 && rows <= budget.min(candidates.len()));
            let chosen: Vec<usize> = selection.tokens(head).map(|token| token as usize).collect();
            let memory = store.memory(head);
            let mut parts = 0;
            for block in 0..method.layout.blocks(memory) {
                let tokens = method.layout.block(memory, block);
                let inside: Vec<usize> = tokens.filter(|token| candidates.contains(token)).collect();
                let hits = inside.iter().filter(|token| chosen.contains(token)).count();
                parts += usize::from(hits > 0 && hits < inside.len());
            }
            // Only where not a single block fits is one taken in part.
            prop_assert!(parts == 0 || (parts == 1 && rows == budget));
        }
    }

    #[test]
    fn the_bound_of_a_block_is_never_below_a_score_in_it(
        marks in prop::collection::vec(0_u8..5, 1..200),
        dtype in prop::sample::select(vec![Dtype::F32, Dtype::F16, Dtype::Bf16]),
        seed: u64,
    ) {
        let shape = Shape { dtype, ..small() };
        let method = dynsplit("", &shape);
        let mut rng = Rng::new(seed);
        let store = grown(&method, &shape, &rng.normal(marks.len() * 16), &marks, 29);
        let query = rng.normal(8);
        let (memory, mut digest, mut bound) = (store.memory(0), vec![0.0; 16], [0.0]);
        for block in 0..method.layout.blocks(memory) {
            method.layout.digest(memory, block, &mut Vec::new(), &mut digest);
            Kernels::best().page_bounds(&query, 1, &digest, &mut bound);
            for token in method.layout.block(memory, block) {
                let score = Kernels::best().dot(&query, &store.keys(0)[token * 8..][..8]);
                prop_assert!(bound[0] >= score, "block {}, token {}", block, token);
            }
        }
    }
}

#[test]
fn a_topic_that_changes_at_a_delimiter_is_cut_there() {
    let shape = small();
    // One change lies within the limits of each block.
    let method = dynsplit("max=32", &shape);
    // Topics of 24, 17 and 25 tokens, a delimiter every five tokens and one at each topic's end.
    let edges = [24, 41, 66];
    let tokens = 120;
    let mut rng = Rng::new(6);
    let topics: Vec<Vec<f32>> = (0..4).map(|_| rng.normal(8)).collect();
    let mut keys = Vec::new();
    let mut marks = vec![mark::NONE; tokens];
    for (token, boundary) in marks.iter_mut().enumerate() {
        let topic = edges.iter().filter(|edge| **edge <= token).count();
        for _ in 0..2 {
            keys.extend(topics[topic].iter().zip(rng.normal(8)).map(|(mean, noise)| mean + 0.01 * noise));
        }
        if token % 5 == 4 || edges.contains(&(token + 1)) {
            *boundary = mark::SENTENCE;
        }
    }
    let store = grown(&method, &shape, &keys, &marks, 10);
    let found = ends(&method, &store, 0);
    assert_eq!(found[..3], edges);
    // A strong mark wins where marks are the score.
    marks.fill(mark::CLAUSE);
    marks[29] = mark::LINE;
    let method = dynsplit("score=marks", &shape);
    let store = grown(&method, &shape, &keys, &marks, 10);
    assert_eq!(ends(&method, &store, 0)[..2], [30, 94]);
}

#[test]
fn limits_that_exclude_each_other_are_refused() {
    let message = |text: &str| text.parse::<MethodSpec>().unwrap_err().to_string();
    assert!(message("dynsplit:min=9,max=8").contains("exclude"));
    assert!(message("dynsplit:max=0").contains("1024"));
    let text = "dynsplit:budget=6%,boundary=fixed,min=4,max=32,page=8,score=marks,candidates=word,digest=mean,hint=current,hint_norm=previous";
    assert_eq!(text.parse::<MethodSpec>().unwrap().to_string(), text);
}

#[test]
fn a_truncation_to_what_is_there_keeps_the_blocks_and_a_shorter_one_makes_them_anew() {
    let shape = small();
    let method = dynsplit("budget=16", &shape);
    let mut store = grown(&method, &shape, &Rng::new(2).normal(100 * 16), &[], 50);
    let mut memory = store.memory(0).to_vec();
    let before = memory.clone();
    for tokens in [100, 101, usize::MAX] {
        assert_eq!(method.on_truncate(tokens, &mut memory), Truncated::Kept);
    }
    assert_eq!(memory, before);
    assert_eq!(method.on_truncate(99, &mut memory), Truncated::Rebuild);
    store.truncate(&method, 60);
    assert_eq!(*ends(&method, &store, 0).last().unwrap(), 60);
}
