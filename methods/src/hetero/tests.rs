use std::sync::Arc;

use proptest::prelude::*;

use super::profile::{Profile, ProfileOptions, overlap, stars};
use super::*;
use crate::artifact::Artifact;
use crate::budget::Budget;
use crate::shape::tests::small;
use crate::testing::{Rng, Store};

/// Six KV heads with one query head each.
fn six() -> Shape {
    Shape { query_heads: 6, kv_heads: 6, layers: 1, ..small() }
}

fn edges(pairs: &[(usize, usize)]) -> impl Fn(usize, usize) -> bool + '_ {
    |a, b| pairs.contains(&(a, b)) || pairs.contains(&(b, a))
}

#[test]
fn graphs_are_covered_by_stars_from_the_highest_degree_on() {
    assert_eq!(stars(4, edges(&[(0, 1), (1, 2), (2, 3)])), [1, 1, 1, 3], "a path: its first inner node");
    assert_eq!(stars(5, edges(&[(0, 4), (1, 4), (2, 4), (3, 4)])), [4; 5], "a star");
    assert_eq!(stars(4, |_, _| true), [0; 4], "a clique: the lowest");
    assert_eq!(stars(3, |_, _| false), [0, 1, 2], "no edge");
    assert_eq!(stars(6, edges(&[(0, 5), (1, 2), (2, 3)])), [0, 2, 2, 2, 4, 0], "two parts, and a node alone");
    assert!(stars(0, |_, _| true).is_empty());
}

proptest! {
    #[test]
    fn a_star_has_a_centre_and_each_of_its_nodes_is_a_neighbour(
        nodes in 1_usize..12,
        pairs in prop::collection::vec((0_usize..12, 0_usize..12), 0..30),
    ) {
        let near = edges(&pairs);
        let centres = stars(nodes, &near);
        for (node, centre) in centres.iter().enumerate() {
            prop_assert_eq!(centres[*centre], *centre);
            prop_assert!(node == *centre || near(node, *centre));
        }
        // Who is left alone has no neighbour that is alone as well.
        let alone: Vec<usize> = (0..nodes).filter(|node| centres.iter().filter(|c| *c == node).count() == 1 && centres[*node] == *node).collect();
        prop_assert!(alone.iter().all(|a| alone.iter().all(|b| a == b || !near(*a, *b))));
    }

    #[test]
    fn budgets_of_a_layer_sum_to_the_layers_and_follow_the_weights(
        budget in 1_usize..200,
        room in 0_usize..300,
        stability in prop::collection::vec(0.0_f32..=1.0, 1..9),
        roles in prop::collection::vec(0_usize..4, 9),
        weights in prop::sample::select(vec![Weights::Stability, Weights::Equal, Weights::Roles([1.0, 0.5, 3.0, 40.0])]),
    ) {
        let all = [Role::Anchor, Role::Satellite, Role::Volatile, Role::Pivot];
        let mut heads: Vec<Head> = stability
            .iter()
            .enumerate()
            .map(|(at, stability)| Head { role: all[roles[at]], pivot: at, stability: *stability, weight: 0.0 })
            .collect();
        weights.fill(&mut heads);
        let most = budget + room;
        let mut shares = Vec::new();
        roles::share(budget, most, &heads, &mut shares);
        prop_assert_eq!(shares.iter().sum::<usize>(), budget * heads.len());
        prop_assert!(shares.iter().all(|rows| (1..=most).contains(rows)));
        for (a, rows) in heads.iter().zip(&shares) {
            for (b, other) in heads.iter().zip(&shares) {
                prop_assert!(a.weight < b.weight || rows + 1 >= *other);
            }
            let full = matches!(a.role, Role::Volatile | Role::Pivot);
            prop_assert!(weights != Weights::Stability || !full || heads.iter().all(|b| a.weight >= b.weight));
        }
        // Where there are fewer candidates than the budget, every head gets all.
        roles::share(budget, budget / 2, &heads, &mut shares);
        prop_assert!(shares.iter().all(|rows| *rows == budget / 2));
    }
}

/// Profile of one layer: heads 0, 2 and 5 choose alike, 1 is stable, 3 and 4 wander.
fn profiled() -> Profile {
    let set = |head: u32, step: u32| -> Vec<u32> {
        let start = match head {
            0 | 2 | 5 => 100 + step,
            1 => 500,
            _ => 1000 * head + 50 * step,
        };
        (start..start + 20).collect()
    };
    let prompt: Vec<Vec<u32>> = (0..6).map(|head| set(head, 0)).collect();
    let steps: Vec<Vec<Vec<u32>>> = (1..6).map(|step| (0..6).map(|head| set(head, step)).collect()).collect();
    let mut profile = Profile::new(ProfileOptions::default());
    let layer = profile.layer(&prompt, &steps).unwrap();
    assert_eq!(layer.pivots, [0, 1, 0, 3, 4, 0]);
    use Role::{Anchor, Pivot, Satellite, Volatile};
    assert_eq!(layer.roles, [Pivot, Anchor, Satellite, Volatile, Volatile, Satellite]);
    assert_eq!((layer.stability[0], layer.stability[1], layer.stability[3]), (0.85, 1.0, 0.0));
    profile
}

fn hetero(options: &str, shape: &Shape) -> Hetero {
    let artifact = profiled().finish(shape.fingerprint).unwrap();
    let artifacts = [Artifact::Tensors(Arc::new(artifact))].into_iter().collect();
    let spec: MethodSpec = format!("{NAME}:{options}").parse().unwrap();
    Hetero::new(*spec.options::<HeteroSpec>().unwrap(), shape, &artifacts).unwrap()
}

#[test]
fn identical_heads_end_in_one_cluster() {
    let sets = vec![vec![3, 5, 9]; 4];
    let mut profile = Profile::new(ProfileOptions { stable: 0.5, similar: 1.0 });
    let layer = profile.layer(&sets, &vec![sets.clone(); 3]).unwrap();
    assert_eq!(layer.pivots, [0; 4]);
    assert_eq!(layer.roles, [Role::Pivot, Role::Satellite, Role::Satellite, Role::Satellite]);
    assert!(profile.layer(&sets[..3], &[]).is_err() && profile.layer(&sets, &[vec![vec![1]]]).is_err());
    assert!(Profile::default().finish(small().fingerprint).is_err());
}

#[test]
fn overlap_is_a_share_of_the_smaller_set() {
    assert_eq!(overlap(&[1, 2, 3, 4], &[2, 4]), 1.0);
    assert_eq!(overlap(&[1, 2, 3, 4], &[4, 5, 6, 7]), 0.25);
    assert_eq!(overlap(&[], &[4]), 1.0);
}

/// Keys whose channel 0 is hot in `0..half` and channel 1 in the rest, for each head alike.
fn two_topics(shape: &Shape, tokens: usize) -> Vec<f32> {
    let mut rng = Rng::new(7);
    let mut keys = Vec::new();
    for token in 0..tokens {
        for _ in 0..shape.kv_heads {
            let mut key: Vec<f32> = rng.normal(shape.head_dim).iter().map(|x| 0.1 * x).collect();
            key[usize::from(token >= tokens / 2)] += 1.0;
            keys.extend(key);
        }
    }
    keys
}

/// Every query looks at one channel.
fn looking_at(shape: &Shape, channel: usize) -> Vec<f32> {
    let mut hint = vec![0.0; shape.query_heads * shape.head_dim];
    hint.iter_mut().skip(channel).step_by(shape.head_dim).for_each(|x| *x = 8.0);
    hint
}

#[test]
fn a_drift_is_recalled_at_the_first_look_and_used_from_the_next_step_on_by_all_but_anchors() {
    let shape = six();
    let (first, second) = (looking_at(&shape, 0), looking_at(&shape, 1));
    for asks in [true, false] {
        let method = hetero("budget=16,every=5,weights=equal", &shape);
        let mut store = Store::new(&method, &shape, 0, 256);
        store.append(&method, &two_topics(&shape, 200), 64);
        let mut scratch = Scratch::new();
        let before = store.select(&method, &first, &mut scratch);
        // A row that has left the window since is no part of the choice.
        let left_since = shape.candidates(200).end as u32;
        let old = |selection: &Selection, head| {
            selection.tokens(head).filter(|token| *token < left_since).all(|token| token < 100)
        };
        assert!((0..6).all(|head| before.rows(head) == 16 && old(&before, head)));
        // The query turns at once; the look comes at the fifth step after the choice.
        for step in 1..=5 {
            assert!(store.prefetch(&method, &mut scratch).is_none(), "step {step}");
            assert_eq!(store.select(&method, &second, &mut scratch), before, "step {step}");
        }
        let ahead = asks.then(|| store.prefetch(&method, &mut scratch).expect("a recall"));
        store.append(&method, &[0.0; 48], 1);
        let after = store.select(&method, &second, &mut scratch);
        for head in 0..6 {
            let anchor = head == 1;
            assert_eq!(old(&after, head), anchor, "head {head}");
            assert_eq!(after.rows(head), 16);
            if let Some(ahead) = &ahead {
                assert_eq!(ahead.head(head), if anchor { &[][..] } else { after.head(head) });
            }
        }
        // Satellites take their pivot's choice.
        assert_eq!((after.head(2), after.head(5)), (after.head(0), after.head(0)));
        assert_ne!(after.head(3), after.head(0));
    }
}

#[test]
fn an_excursion_of_fewer_than_half_of_the_looks_recalls_nothing_and_one_of_half_does() {
    let shape = six();
    let (first, second) = (looking_at(&shape, 0), looking_at(&shape, 1));
    // Which of the five steps after the choice look elsewhere, and whether a recall follows, by how many looks.
    for (away, looks, recalled) in [
        (&[4, 5][..], 5, false),
        (&[1, 3][..], 5, false),
        (&[1, 2, 5][..], 5, true),
        (&[1, 2, 3, 4][..], 5, true),
        (&[5][..], 1, true),
        (&[1, 2, 3, 4][..], 1, false),
        (&[4][..], 2, true),
        (&[1, 2, 3][..], 2, false),
        // Of more steps than there are, all look.
        (&[1, 2][..], 9, false),
        (&[3, 4, 5][..], 9, true),
    ] {
        let method = hetero(&format!("budget=16,every=5,looks={looks},weights=equal"), &shape);
        let mut store = Store::new(&method, &shape, 0, 256);
        store.append(&method, &two_topics(&shape, 200), 64);
        let mut scratch = Scratch::new();
        store.select(&method, &first, &mut scratch);
        for step in 1..=5 {
            assert!(store.prefetch(&method, &mut scratch).is_none());
            store.select(&method, if away.contains(&step) { &second } else { &first }, &mut scratch);
        }
        let ahead = store.prefetch(&method, &mut scratch).filter(|ahead| ahead.total_rows() > 0);
        assert_eq!(ahead.is_some(), recalled, "{away:?} with {looks} looks");
        let Some(ahead) = ahead else { continue };
        // By the last query, whatever the others were.
        let elsewhere = away.contains(&5);
        let old = shape.candidates(200).end - 16;
        let rows: Vec<_> = ahead.tokens(0).filter(|token| (*token as usize) < old).collect();
        assert!(!rows.is_empty() && rows.iter().all(|token| (*token >= 100) == elsewhere), "{rows:?}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(32))]

    #[test]
    fn identical_queries_never_recall_while_the_sequence_grows(
        tokens in 40_usize..150,
        every in 1_usize..6,
        budget in 20_usize..40,
        seed: u64,
    ) {
        let shape = six();
        let method = hetero(&format!("budget={budget},every={every},weights=equal"), &shape);
        let mut rng = Rng::new(seed);
        let mut store = Store::new(&method, &shape, 0, 32);
        store.append(&method, &rng.normal(tokens * 48), 64);
        let hint = rng.normal(48);
        let mut scratch = Scratch::new();
        let first = store.select(&method, &hint, &mut scratch);
        // As many as are kept beside the choice.
        for _ in 0..budget / 2 {
            prop_assert!(store.prefetch(&method, &mut scratch).is_none());
            store.append(&method, &rng.normal(48), 1);
            let selection = store.select(&method, &hint, &mut scratch);
            let candidates = shape.candidates(store.tokens());
            for head in 0..6 {
                prop_assert_eq!(selection.rows(head), budget.min(candidates.len()));
                let new = shape.candidates(tokens).end as u32;
                prop_assert!(first.rows(head) < budget || selection.tokens(head).filter(|token| *token < new).all(|token| first.tokens(head).any(|old| old == token)));
            }
        }
    }

    #[test]
    fn parts_of_the_heads_get_what_the_whole_request_gives_them(
        tokens in 20_usize..150,
        start in 0_usize..6,
        count in 1_usize..6,
        budget in 1_usize..60,
        seed: u64,
    ) {
        let shape = six();
        let method = hetero(&format!("budget={budget}"), &shape);
        let mut rng = Rng::new(seed);
        let mut store = Store::new(&method, &shape, 0, 16);
        store.append(&method, &rng.normal(tokens * 48), 64);
        let hint = rng.normal(48);
        let context = SelectContext { heads: start..(start + count).min(6), ..SelectContext::new(&shape, 0, tokens, &hint) };
        let mut scratch = Scratch::new();
        let part = store.clone().select_with(&method, &context, &mut scratch);
        let whole = store.select(&method, &hint, &mut scratch);
        prop_assert_eq!(whole.total_rows(), 6 * budget.min(shape.candidates(tokens).len()));
        for (at, head) in context.heads.enumerate() {
            prop_assert_eq!(part.head(at), whole.head(head));
        }
    }
}

#[test]
fn a_prompt_is_chosen_from_anew_and_a_block_of_queries_makes_no_lasting_choice() {
    let shape = six();
    let method = hetero("budget=16,every=0", &shape);
    let keys = two_topics(&shape, 200);
    let (first, second) = (looking_at(&shape, 0), looking_at(&shape, 1));
    let mut scratch = Scratch::new();
    let mut store = Store::new(&method, &shape, 0, 256);
    store.append(&method, &keys[..150 * 48], 64);
    let block = first.repeat(3);
    let context = SelectContext { queries: 3, ..SelectContext::new(&shape, 0, 150, &block) };
    assert!(store.select_with(&method, &context, &mut scratch).tokens(1).all(|token| token < 100));
    // Decoding begins: the anchor chooses by its own query, and stays with that.
    assert!(store.select(&method, &second, &mut scratch).tokens(1).all(|token| token >= 100));
    assert!(store.select(&method, &first, &mut scratch).tokens(1).all(|token| token >= 100));
    // More than a window of new tokens is a prompt.
    store.append(&method, &keys[150 * 48..], 64);
    assert!(store.select(&method, &first, &mut scratch).tokens(1).all(|token| token < 100));
    store.truncate(&method, 120);
    assert!(store.select(&method, &second, &mut scratch).tokens(1).all(|token| token >= 100));
}

#[test]
fn roles_that_do_not_fit_together_are_refused_and_options_read_back() {
    let shape = six();
    let good = profiled().finish(shape.fingerprint).unwrap();
    assert_eq!(good.tensor("role", &[1, 6]).unwrap(), [3.0, 0.0, 1.0, 2.0, 2.0, 1.0]);
    let refused = |name: &str, values: [f32; 6], word: &str| {
        let tensors = ["role", "pivot", "stability"].map(|of| {
            let values =
                if of == name { values.to_vec() } else { good.tensor(of, &[1, 6]).unwrap().to_vec() };
            (of.to_owned(), crate::Tensor { shape: vec![1, 6], values })
        });
        let artifact = crate::TensorArtifact::new(
            ArtifactKind::Roles,
            shape.fingerprint,
            tensors.into(),
            Default::default(),
        );
        let artifacts = [Artifact::Tensors(Arc::new(artifact.unwrap()))].into_iter().collect();
        let message = Hetero::new(HeteroSpec::default(), &shape, &artifacts).unwrap_err().to_string();
        assert!(message.contains(word), "{message}");
    };
    refused("role", [3.0, 0.0, 1.0, 2.0, 2.0, 7.0], "role");
    refused("pivot", [0.0, 1.0, 0.0, 3.0, 4.0, 6.0], "pivot");
    refused("pivot", [0.0, 1.0, 3.0, 3.0, 4.0, 0.0], "satellite");
    refused("pivot", [0.0, 1.0, 2.0, 3.0, 4.0, 0.0], "pivot");
    refused("stability", [0.0, 1.0, 2.0, 3.0, 4.0, 0.0], "stability");
    let text = "hetero:budget=6%,roles=none,weights=1/0.5/2/4,every=9,looks=3,drift=0.25,hint=current,hint_norm=previous";
    assert_eq!(text.parse::<MethodSpec>().unwrap().to_string(), text);
    for wrong in ["weights=1/2", "weights=1/2/0/4", "drift=2", "looks=0", "roles=some"] {
        assert!(format!("hetero:{wrong}").parse::<MethodSpec>().is_err(), "{wrong}");
    }
    let spec = HeteroSpec { budget: Budget::rows(5).unwrap(), ..HeteroSpec::default() };
    assert!(Hetero::new(spec, &shape, &Artifacts::none()).unwrap_err().to_string().contains("roles"));
}

#[test]
fn a_request_for_fewer_tokens_than_the_choice_was_made_for_names_none_beyond_its_candidates() {
    let shape = six();
    let method = hetero("budget=16,every=1", &shape);
    let mut store = Store::new(&method, &shape, 0, 256);
    store.append(&method, &two_topics(&shape, 200), 64);
    let mut scratch = Scratch::new();
    let second = looking_at(&shape, 1);
    assert!(store.select(&method, &second, &mut scratch).tokens(1).any(|token| token >= 100));
    // The sequence was not cut: the same rows are asked for at an earlier place.
    for tokens in [110, 60, 20, 2] {
        let context = SelectContext::new(&shape, 0, tokens, &second);
        let candidates = shape.candidates(tokens);
        let selection = store.select_with(&method, &context, &mut scratch);
        for head in 0..6 {
            assert!(
                selection.tokens(head).all(|token| candidates.contains(&(token as usize))),
                "{tokens} tokens"
            );
            assert_eq!(selection.rows(head) == 0, candidates.is_empty());
        }
        if let Some(ahead) = store.prefetch(&method, &mut scratch) {
            assert!((0..6).all(|head| ahead.tokens(head).all(|token| token < 200)));
        }
    }
}
