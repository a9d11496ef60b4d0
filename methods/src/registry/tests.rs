use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::artifact::{Artifact, ArtifactKind};
use crate::clo::{CloSpec, Head};
use crate::hata::{HashOptions, HataSpec, Weights};
use crate::infinigen::{Amount, InfinigenSpec};
use crate::infinigen::{Count, Granularity, IndexRule};
use crate::louver::{Gate, LouverSpec, Tau};
use crate::method::HintNorm;
use crate::needs::HintSource;
use crate::quest::QuestSpec;
use crate::random::RandomSpec;
use crate::resv::{ResvSpec, Score};
use crate::scout::{Query, ScoutSpec};
use crate::scratch::Scratch;
use crate::shape::Fingerprint;
use crate::shape::tests::small;
use crate::testing::{Rng, Store, random_artifact};
use kvoyant_kernels::Dtype;

fn skew(shape: &Shape) -> Artifacts {
    [Artifact::Skew(Arc::new(random_artifact(shape, 1)))].into_iter().collect()
}

fn budget() -> impl Strategy<Value = Budget> {
    prop_oneof![
        (1e-4_f64..=1.0).prop_map(|share| Budget::share(share).unwrap()),
        (1_usize..5000).prop_map(|rows| Budget::rows(rows).unwrap()),
    ]
}

fn hint_norm() -> impl Strategy<Value = HintNorm> {
    prop::sample::select(vec![HintNorm::Own, HintNorm::Previous, HintNorm::Learned])
}

fn infinigen() -> impl Strategy<Value = MethodSpec> {
    let amount = prop_oneof![
        budget().prop_map(Amount::Budget),
        (prop_oneof![1e-3_f32..100.0, Just(f32::INFINITY)], budget())
            .prop_map(|(alpha, cap)| Amount::Threshold { alpha, cap }),
    ];
    let words = (
        prop::sample::select(vec![Count::Mean, Count::Head]),
        prop::sample::select(vec![Granularity::Row, Granularity::Page]),
        prop::sample::select(vec![IndexRule::Query, IndexRule::Both]),
    );
    let pool = prop_oneof![
        Just(None),
        Just(Some(Budget::rows(64).unwrap())),
        (0.01_f64..=1.0).prop_map(|share| Some(Budget::share(share).unwrap())),
    ];
    let hints = vec![HintSource::Ahead, HintSource::Previous, HintSource::Current];
    let query = (prop::sample::select(hints), hint_norm());
    (amount, 0.01_f64..=1.0, words, any::<bool>(), pool, query).prop_map(
        |(amount, partial, (count, granularity, index), skew, pool, (hint, hint_norm))| {
            let partial = Share::new(partial).unwrap();
            MethodSpec::new(InfinigenSpec {
                amount,
                partial,
                count,
                granularity,
                index,
                skew,
                pool,
                hint,
                hint_norm,
            })
        },
    )
}

fn spec() -> impl Strategy<Value = MethodSpec> {
    prop_oneof![
        Just(MethodSpec::new(full::FullSpec)),
        Just(MethodSpec::new(window::WindowSpec)),
        (budget(), any::<u64>()).prop_map(|(budget, seed)| MethodSpec::new(RandomSpec { budget, seed })),
        (budget(), prop::sample::select(vec![1, 8, 16, 32]), hint_norm()).prop_map(
            |(budget, page, hint_norm)| {
                let (digest, hint) = (crate::quest::Digest::Plain, crate::HintSource::Ahead);
                MethodSpec::new(QuestSpec { budget, page, digest, hint, hint_norm })
            }
        ),
        infinigen(),
        scout(),
        louver(),
        resv(),
        hashed(),
    ]
}

fn hashed() -> impl Strategy<Value = MethodSpec> {
    let hash = (1_usize..300, any::<u64>(), any::<bool>())
        .prop_map(|(bits, seed, norm)| HashOptions { weights: Weights::Random { bits, seed }, norm });
    let hints = vec![HintSource::Ahead, HintSource::Previous, HintSource::Current];
    let words = (prop::sample::select(hints), hint_norm());
    let label = (-1.0_f64..1.5, prop::collection::vec((0_usize..2, 0_usize..2), 0..3), any::<bool>());
    (budget(), hash, label, words).prop_map(|(budget, hash, (tau, heads, sticky), (hint, hint_norm))| {
        if sticky {
            let important = heads.into_iter().map(|(layer, kv_head)| Head { layer, kv_head }).collect();
            MethodSpec::new(CloSpec { budget, tau, important, important_tau: 0.9, hash, hint, hint_norm })
        } else {
            MethodSpec::new(HataSpec { budget, hash, hint, hint_norm })
        }
    })
}

fn resv() -> impl Strategy<Value = MethodSpec> {
    let share = || (0.01_f64..=1.0).prop_map(|share| Share::new(share).unwrap());
    let score = prop::sample::select(vec![Score::Softmax, Score::Raw]);
    let numbers = (1_u32..=33, 1_usize..3000, any::<u64>());
    let hints = vec![HintSource::Ahead, HintSource::Previous, HintSource::Current];
    let words = (score, prop::sample::select(hints), hint_norm());
    (prop::option::of(budget()), share(), share(), numbers, words).prop_map(
        |(budget, ratio, clusters, (distance, recent, seed), (score, hint, hint_norm))| {
            let options =
                ResvSpec { budget, ratio, score, distance, recent, clusters, seed, hint, hint_norm };
            MethodSpec::new(options)
        },
    )
}

fn louver() -> impl Strategy<Value = MethodSpec> {
    let tau = prop_oneof![budget().prop_map(Tau::Budget), Just(Tau::SampleMax), Just(Tau::SampleGap)];
    let sizes = (prop::sample::select(vec![1, 8, 32]), 1_usize..300);
    let gate = prop::sample::select(vec![Gate::Sound, Gate::Centre]);
    let hints = [HintSource::Ahead, HintSource::Previous, HintSource::Current];
    (tau, prop::option::of(budget()), sizes, gate, prop::sample::select(hints.to_vec()), hint_norm())
        .prop_map(|(tau, cap, (group, sample), gate, hint, hint_norm)| {
            MethodSpec::new(LouverSpec { tau, cap, group, sample, gate, hint, hint_norm })
        })
}

fn scout() -> impl Strategy<Value = MethodSpec> {
    let words = (prop::sample::select(vec![Query::Predicted, Query::True]), hint_norm());
    (budget(), prop::sample::select(vec![8, 16, 32]), 0.0_f32..=1.0, 0_u64..100, words).prop_map(
        |(budget, page, beta, every, (query, hint_norm))| {
            // A true query needs no norm to be made with.
            let hint_norm = if query == Query::True { HintNorm::Own } else { hint_norm };
            MethodSpec::new(ScoutSpec { budget, page, beta, every, query, hint_norm })
        },
    )
}

proptest! {
    #[test]
    fn a_specification_reads_back_from_its_text_and_from_json(spec in spec()) {
        prop_assert_eq!(spec.to_string().parse::<MethodSpec>(), Ok(spec.clone()));
        let json = serde_json::to_string(&spec).unwrap();
        prop_assert_eq!(serde_json::from_str::<MethodSpec>(&json).unwrap(), spec);
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(192))]

    #[test]
    fn every_selection_is_sorted_distinct_and_within_the_candidates_and_repeats(
        spec in spec(),
        tokens in 0_usize..150,
        dtype in prop::sample::select(Dtype::ALL.to_vec()),
        seed: u64,
        broken in prop::option::weighted(0.2, prop::sample::select(vec![f32::NAN, f32::INFINITY, -0.0])),
    ) {
        let shape = Shape { dtype, ..small() };
        let artifacts = skew(&shape);
        let method = build(&spec, &shape, &artifacts).unwrap();
        let mut rng = Rng::new(seed);
        let mut store = Store::new(&*method, &shape, 1, tokens);
        store.append(&*method, &rng.normal(tokens * 16), 37);
        let mut hint = rng.normal(32);
        if let Some(value) = broken {
            hint[seed as usize % 32] = value;
        }
        let mut scratch = Scratch::new();
        let selection = store.select(&*method, &hint, &mut scratch);
        prop_assert_eq!(selection.heads(), 2);
        let candidates = shape.candidates(tokens);
        for head in 0..2 {
            let ranges = selection.head(head);
            prop_assert!(ranges.iter().all(|range| range.count > 0));
            prop_assert!(ranges.windows(2).all(|pair| pair[0].end() < pair[1].first));
            for token in selection.tokens(head) {
                prop_assert!(candidates.contains(&(token as usize)));
                prop_assert!(!store.victims[head].contains(&token), "an evicted row was selected");
            }
            // How many rows are above a threshold no budget says.
            if let (Some(budget), None) = (method.spec().budget().filter(|_| spec.name() != louver::NAME), broken) {
                // A page is the least that a page-wise method can take.
                let page = if method.spec().to_string().contains("granularity=page") { 32 } else { 16 };
                let rowwise = ![quest::NAME, scout::NAME].contains(&spec.name()) && page == 16;
                let most = budget.rows_of(tokens).max(if rowwise { 0 } else { 32 });
                prop_assert!(selection.rows(head) <= most);
            }
        }
        // Pools have counted the first selection, which changes none of the second.
        prop_assert_eq!(store.select(&*method, &hint, &mut scratch), selection);
    }

    #[test]
    fn a_budget_of_everything_selects_every_candidate(
        name in prop::sample::select(vec!["quest", "infinigen", "scout", "louver", "random"]),
        page in any::<bool>(),
        tokens in 0_usize..150,
        seed: u64,
    ) {
        let options = if page && name == "infinigen" { ",granularity=page" } else { "" };
        let shape = small();
        let artifacts = skew(&shape);
        let spec: MethodSpec = format!("{name}:budget=100%{options}").parse().unwrap();
        let method = build(&spec, &shape, &artifacts).unwrap();
        let mut rng = Rng::new(seed);
        let mut store = Store::new(&*method, &shape, 1, tokens);
        store.append(&*method, &rng.normal(tokens * 16), 64);
        let selection = store.select(&*method, &rng.normal(32), &mut Scratch::new());
        prop_assert_eq!(selection.rows(0), shape.candidates(tokens).len());
        prop_assert_eq!(selection.rows(1), shape.candidates(tokens).len());
    }
}

#[test]
fn a_second_selection_as_long_as_the_first_grows_no_buffer() {
    let shape = small();
    let artifacts = skew(&shape);
    for text in ["quest:budget=6%", "infinigen", "infinigen:budget=6%,granularity=page,pool=80%"] {
        let method = build(&text.parse().unwrap(), &shape, &artifacts).unwrap();
        let mut rng = Rng::new(3);
        let mut store = Store::new(&*method, &shape, 0, 500);
        store.append(&*method, &rng.normal(500 * 16), 64);
        let mut scratch = Scratch::new();
        store.select(&*method, &rng.normal(32), &mut scratch);
        // A threshold may let more rows through than the first time; a list of ids holds all of them at most.
        scratch.ids.reserve(500);
        let capacities = |scratch: &Scratch| {
            [
                scratch.rows.capacity(),
                scratch.matrix.capacity(),
                scratch.scores.capacity(),
                scratch.group.capacity(),
                scratch.pages.capacity(),
                scratch.counts.capacity(),
                scratch.ids.capacity(),
            ]
        };
        let before = capacities(&scratch);
        for _ in 0..20 {
            store.select(&*method, &rng.normal(32), &mut scratch);
        }
        assert_eq!(capacities(&scratch), before, "{text}");
    }
}

#[test]
fn the_forms_that_the_documentation_shows_are_read() {
    let parse = |text: &str| text.parse::<MethodSpec>().unwrap();
    assert_eq!(parse(" full "), MethodSpec::new(full::FullSpec));
    assert_eq!(parse("quest:budget=6%").to_string(), "quest:budget=6%");
    assert_eq!(parse("infinigen").to_string(), "infinigen:alpha=5,cap=20%");
    assert_eq!(
        parse("infinigen:granularity=page, budget=0.12,").to_string(),
        "infinigen:budget=12%,granularity=page"
    );
    let all = "infinigen:alpha=5,cap=20%,partial=0.3,hint_norm=own,count=mean,pool=80%";
    assert_eq!(parse(all).to_string(), "infinigen:alpha=5,cap=20%,pool=80%");
    assert_eq!(parse("random:budget=12%,seed=7").name(), "random");
    let twelve = Budget::share(0.12).unwrap();
    assert_eq!(parse("infinigen").with_budget(twelve), parse("infinigen:budget=12%"));
    assert_eq!(parse("full").with_budget(twelve), MethodSpec::new(full::FullSpec));
}

#[test]
fn a_table_with_numbers_is_read_like_the_text() {
    let read = |json: &str| serde_json::from_str::<MethodSpec>(json);
    let expected = "infinigen:alpha=4.5,cap=400,granularity=page,skew=off".parse().unwrap();
    let json = r#"{"method": "infinigen", "alpha": 4.5, "cap": 400, "granularity": "page", "skew": false}"#;
    assert_eq!(read(json).unwrap(), expected);
    assert!(read(r#"{"alpha": 4.5}"#).unwrap_err().to_string().contains("method"));
    assert!(read(r#"{"method": "quest", "budget": "101%"}"#).unwrap_err().to_string().contains("101%"));
    assert!(read("7").unwrap_err().to_string().contains("quest:budget=6%"));
}

#[test]
fn what_is_no_specification_is_refused_and_says_what_would_be() {
    let message = |text: &str| text.parse::<MethodSpec>().unwrap_err().to_string();
    assert!(names().all(|name| message("fortune").contains(name)));
    assert!(message("quest:alpha=5").contains("budget, page, digest, hint, hint_norm"));
    assert!(message("full:budget=6%").contains("it has none"));
    assert!(message("quest:budget").contains("key=value"));
    assert!(message("quest:budget=6%,budget=7%").contains("twice"));
    assert!(message("quest:budget=0").contains("budget 0"));
    assert!(message("quest:page=0").contains("`0`"));
    assert!(message("infinigen:alpha=0").contains("above 0"));
    assert!(message("infinigen:alpha=NaN").contains("NaN"));
    assert!(message("infinigen:partial=120%").contains("120%"));
    assert!(message("infinigen:count=median").contains("mean, head"));
    assert!(message("infinigen:budget=6%,alpha=5").contains("exclude"));
    assert!(message("infinigen:budget=6%,cap=5").contains("exclude"));
}

#[test]
fn an_artifact_that_is_missing_or_of_another_model_is_refused() {
    let shape = small();
    let spec = MethodSpec::new(InfinigenSpec::default());
    let error = build(&spec, &shape, &Artifacts::none()).unwrap_err().to_string();
    assert!(error.contains("skew artifact"), "{error}");
    let artifacts = skew(&shape);
    let other = Shape { fingerprint: Fingerprint([1; 16]), ..shape };
    assert!(matches!(build(&spec, &other, &artifacts).unwrap_err(), MethodError::ArtifactFingerprint { .. }));
    let other = Shape { kv_heads: 4, ..shape };
    assert!(matches!(build(&spec, &other, &artifacts).unwrap_err(), MethodError::ArtifactShape { .. }));
    assert!(build(&"infinigen:skew=off".parse().unwrap(), &shape, &Artifacts::none()).is_ok());
    assert!(
        build(&MethodSpec::new(full::FullSpec), &Shape { layers: 0, ..shape }, &Artifacts::none()).is_err()
    );
}

#[test]
fn a_learned_hint_asks_for_its_artifact_and_the_method_is_built_without_it() {
    let wanted = |text: &str| text.parse::<MethodSpec>().unwrap().artifacts();
    assert_eq!(wanted("infinigen:hint_norm=learned"), [ArtifactKind::Skew, ArtifactKind::Hint]);
    assert_eq!(wanted("quest:hint=ahead,hint_norm=learned"), [ArtifactKind::Hint]);
    assert_eq!(wanted("scout:hint_norm=learned"), [ArtifactKind::Hint]);
    assert_eq!(wanted("infinigen:hint_norm=previous,skew=off"), []);
    assert_eq!(wanted("infinigen:hint=current,hint_norm=learned,skew=off"), [], "no hint goes ahead");
    let mix = "mix:0-5=(quest:hint=ahead,hint_norm=learned),rest=(infinigen:skew=off,hint_norm=learned)";
    assert!(wanted(mix).iter().all(|kind| *kind == ArtifactKind::Hint) && !wanted(mix).is_empty());
    let spec: MethodSpec = "infinigen:skew=off,hint_norm=learned".parse().unwrap();
    assert_eq!(spec.to_string(), "infinigen:alpha=5,cap=20%,skew=off,hint_norm=learned");
    assert!(build(&spec, &small(), &Artifacts::none()).is_ok());
}

#[test]
fn digests_are_shared_between_budgets_and_not_between_what_shapes_them() {
    let shape = small();
    let artifacts = skew(&shape);
    let key = |text: &str| build(&text.parse().unwrap(), &shape, &artifacts).unwrap().digest_key();
    assert_eq!(key("infinigen:budget=6%"), key("infinigen:alpha=5,granularity=page,pool=80%"));
    assert_ne!(key("infinigen"), key("infinigen:partial=50%"));
    assert_ne!(key("infinigen"), key("infinigen:skew=off"));
    assert_eq!(key("quest:budget=6%"), key("quest:budget=12%"));
    assert_ne!(key("quest"), key("quest:page=8"));
    assert_eq!(key("full"), None);
}

#[test]
fn options_that_cost_time_or_memory_have_limits() {
    let parts = |count: usize| {
        let parts: Vec<_> = (0..count).map(|layer| format!("{layer}=(full)")).collect();
        format!("mix:{}", parts.join(","))
    };
    for (within, beyond) in [
        ("resv:recent=4096".to_owned(), "resv:recent=4097".to_owned()),
        ("louver:sample=65536".to_owned(), "louver:sample=65537".to_owned()),
        ("louver:group=4096".to_owned(), "louver:group=4097".to_owned()),
        (parts(64), parts(65)),
    ] {
        assert!(within.parse::<MethodSpec>().is_ok(), "{within}");
        assert!(matches!(beyond.parse::<MethodSpec>(), Err(SpecError::BadValue { .. })), "{beyond}");
    }
}
