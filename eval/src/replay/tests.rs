use super::*;
use crate::generate::{Generator, Kind};

fn small(kind: Kind) -> Trace {
    let mut trace = Generator { tokens: 768, steps: 12, ..Generator::new(kind, 5) }.trace();
    trace.shape.window = 16;
    trace
}

fn run(prepared: &Prepared<'_>, spec: &str, keep: usize) -> Outcome {
    let mut artifacts = Artifacts::none();
    artifacts.insert(prepared.skew().unwrap());
    let spec: MethodSpec = spec.parse().unwrap();
    let budget = spec.budget().or_else(|| Budget::share(0.12).ok());
    prepared.run(&spec, &artifacts, budget, keep).unwrap()
}

#[test]
fn full_misses_nothing_and_moves_everything_that_does_not_fit() {
    let trace = small(Kind::Drift);
    let prepared = Prepared::new(&trace).unwrap();
    let full = run(&prepared, "full", 100);
    assert!(full.missed_mass.abs() < 1e-5 && full.output_error < 1e-4, "{full:?}");
    // Of some 740 candidates the first hundred stay.
    assert!((0.1..0.15).contains(&full.hit_rate.unwrap()), "{full:?}");
    assert!(full.bytes_per_token > 0.8 * prepared.kv_bytes(), "{}", full.bytes_per_token);
    let resident = run(&prepared, "full", 10_000);
    assert!(resident.hit_rate.unwrap() > 0.9);
}

#[test]
fn a_window_moves_nothing_and_a_budget_moves_little() {
    let trace = small(Kind::Drift);
    let prepared = Prepared::new(&trace).unwrap();
    let window = run(&prepared, "window", 100);
    assert_eq!((window.bytes_per_token, window.resident_bytes, window.hit_rate), (0.0, 0.0, None));
    let quest = run(&prepared, "quest:budget=12%", 200);
    assert!(quest.bytes_per_token > 0.0 && quest.bytes_per_token < 0.12 * prepared.kv_bytes());
    assert!(quest.digest_bytes > 0.0 && quest.select_us > 0.0);
}

#[test]
fn scored_rows_find_more_than_random_ones_on_every_generated_trace_with_structure() {
    for kind in [Kind::Sinks, Kind::Outliers, Kind::Drift, Kind::Needles] {
        let trace = small(kind);
        let prepared = Prepared::new(&trace).unwrap();
        let scored = run(&prepared, "infinigen:budget=12%", 200);
        let random = run(&prepared, "random:budget=12%", 200);
        assert!(
            scored.top_k_recall > 2.0 * random.top_k_recall && scored.attention_mass > random.attention_mass,
            "{}: {scored:?} {random:?}",
            kind.name()
        );
    }
}

#[test]
fn the_rows_that_an_engine_names_are_the_true_best() {
    let trace = small(Kind::Drift);
    let prepared = Prepared::new(&trace).unwrap();
    let given = run(&prepared, "given", 200);
    assert_eq!(given.top_k_recall, 1.0);
    assert!(given.attention_mass >= run(&prepared, "infinigen:budget=12%", 200).attention_mass);
}

#[test]
fn the_first_step_of_a_trace_is_not_in_the_steady_state() {
    let trace = small(Kind::Drift);
    let prepared = Prepared::new(&trace).unwrap();
    let quest = run(&prepared, "quest:budget=12%", 10_000);
    // What is selected again is resident from the second step on.
    assert!(quest.bytes_per_token_steady < quest.bytes_per_token, "{quest:?}");
    let random = run(&prepared, "random:budget=12%", 0);
    assert!((random.bytes_per_token_steady / random.bytes_per_token - 1.0).abs() < 0.02, "{random:?}");
    assert_eq!(run(&prepared, "window", 100).bytes_per_token_steady, 0.0);
}

#[test]
fn attention_rows_over_all_tokens_cost_the_keys_that_were_not_attended() {
    let trace = small(Kind::Drift);
    let prepared = Prepared::new(&trace).unwrap();
    let learning = run(&prepared, "attention-predictor:budget=12%,weights=average", 200);
    let share = learning.feedback_bytes_per_token / prepared.kv_bytes();
    // Every fifth row: two of twelve, keys alone, and what was attended was there.
    assert!((0.8..0.95).contains(&(share / (2.0 / 12.0 / 2.0))), "{share}");
    assert!(learning.bytes_per_token > learning.feedback_bytes_per_token);
    assert_eq!(run(&prepared, "quest:budget=12%", 200).feedback_bytes_per_token, 0.0);
}

#[test]
fn rows_on_the_cpu_are_judged_with_the_query_that_it_has() {
    let mut trace = small(Kind::Drift);
    // Nothing is resident, so that the CPU attends all that is selected: here everything, by a predicted query.
    let error = |trace: &Trace, spec: &str| run(&Prepared::new(trace).unwrap(), spec, 0).output_error;
    assert!(error(&trace, "scout:budget=100%,query=true") < 1e-4);
    let predicted = error(&trace, "scout:budget=100%");
    assert!(predicted > 0.01, "{predicted}");
    trace.hint.clone_from(&trace.q);
    assert!(error(&trace, "scout:budget=100%") < 1e-4, "a perfect prediction is no error");
}

#[test]
fn an_index_of_queries_and_keys_sees_keys_in_a_replay_too() {
    let trace = small(Kind::Outliers);
    let prepared = Prepared::new(&trace).unwrap();
    let of = |index: &str| {
        let spec = format!("infinigen:budget=6%,skew=off,index={index}");
        run(&prepared, &spec, 90).attention_mass
    };
    // Channels in which all keys are large alike say nothing about which key is best: an index that counts keys takes them.
    assert!(of("both") < of("query"), "{} {}", of("both"), of("query"));
}

#[test]
fn the_same_run_gives_the_same_numbers() {
    let trace = small(Kind::HeavyTails);
    let prepared = Prepared::new(&trace).unwrap();
    let strip = |outcome: Outcome| Outcome { select_us: 0.0, ..outcome };
    let once = || strip(run(&prepared, "infinigen:budget=6%", 90));
    assert_eq!(once(), once());
}

#[test]
fn a_trace_of_dense_layers_alone_is_refused() {
    let mut trace = small(Kind::Sinks);
    trace.shape.dense_layers = 2;
    assert!(matches!(Prepared::new(&trace), Err(ReplayError::Dense { layers: 2, dense: 2 })));
}

#[test]
fn an_answer_is_judged_with_all_that_is_said_of_what_it_left_out() {
    let trace = small(Kind::HeavyTails);
    let prepared = Prepared::new(&trace).unwrap();
    let of = |options: &str| run(&prepared, &format!("kvoyant:budget=6%{options}"), 90);
    let (whole, alone) = (of(""), of(",tail=off,resident=off"));
    assert!(whole.output_error < 0.8 * alone.output_error, "{whole:?} {alone:?}");
    assert!(whole.attention_mass > alone.attention_mass, "resident rows are attended");
    // An estimate is handed over for each query head: sums, and a mean in f16.
    let estimates = (prepared.trace().shape.query_heads * prepared.truths.len() * (28 + 64 * 2)) as f64;
    let rows = |outcome: &Outcome| outcome.rows_moved;
    assert!(rows(&whole) <= rows(&alone) && whole.bytes_per_token > estimates, "{whole:?}");
    // What is chosen ahead is looked at again by the true query: some rows are attended after all.
    let (ahead, trusting) = (of(",hint=ahead"), of(",hint=ahead,correct=0"));
    assert!(ahead.rows_on_cpu > 0.0 && trusting.rows_on_cpu == 0.0, "{ahead:?} {trusting:?}");
    assert!(ahead.output_error <= trusting.output_error, "{ahead:?} {trusting:?}");
}

#[test]
fn no_method_that_takes_as_many_rows_covers_more_than_the_oracle() {
    for kind in [Kind::Sinks, Kind::Drift, Kind::Needles, Kind::HeavyTails] {
        let trace = small(kind);
        let prepared = Prepared::new(&trace).unwrap();
        let oracle = run(&prepared, "oracle:budget=12%", 200);
        assert_eq!(oracle.top_k_recall, 1.0, "{}", kind.name());
        for other in ["infinigen:budget=12%", "given", "hata:budget=12%,weights=random"] {
            let mass = run(&prepared, other, 200).attention_mass;
            assert!(oracle.attention_mass >= mass - 1e-6, "{}: {other}", kind.name());
        }
    }
}
