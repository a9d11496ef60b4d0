use std::sync::Arc;

use proptest::prelude::*;

use super::*;
use crate::artifact::Artifact;
use crate::error::SpecError;
use crate::shape::tests::small;
use crate::testing::{Rng, Store, random_artifact};

fn spec(text: &str) -> MethodSpec {
    text.parse().unwrap()
}

fn build(text: &str, shape: &Shape) -> Result<Box<dyn Method>, MethodError> {
    let artifacts = [Artifact::Skew(Arc::new(random_artifact(shape, 1)))].into_iter().collect();
    crate::build(&spec(text), shape, &artifacts)
}

/// Methods that may stand beside each other, with memory and without, of digests and states of several lengths.
const METHODS: [&str; 7] = [
    "full",
    "window",
    "quest:budget=20",
    "quest:budget=12,page=8",
    "infinigen:budget=9",
    "infinigen:budget=9,pool=50%",
    "resv:budget=30",
];

/// Appends (in two goes, past the first memory), selects, cuts, appends again and selects; all selections.
fn life(
    method: &dyn Method,
    shape: &Shape,
    layer: usize,
    seed: u64,
    tokens: usize,
) -> (Vec<Selection>, Vec<Vec<u32>>) {
    let mut rng = Rng::new(seed);
    let mut store = Store::new(method, shape, layer, tokens / 2 + 1);
    for head in 0..2 {
        store.observe(method, head, &rng.normal(8));
    }
    let mut selections = Vec::new();
    let mut scratch = Scratch::new();
    for count in [tokens / 3, tokens - tokens / 3] {
        store.append(method, &rng.normal(count * 16), 19);
        selections.push(store.select(method, &rng.normal(32), &mut scratch));
    }
    store.truncate(method, tokens / 2);
    store.append(method, &rng.normal(40 * 16), 19);
    let hint = rng.normal(3 * 32);
    let context = SelectContext { queries: 3, ..SelectContext::new(shape, layer, store.tokens(), &hint) };
    selections.push(store.select_with(method, &context, &mut scratch));
    let mut one = Selection::new();
    let context =
        SelectContext { heads: 1..2, ..SelectContext::new(shape, layer, store.tokens(), &hint[..32]) };
    store.with_store(|kept| method.select(&context, kept, &mut scratch, &mut one));
    selections.push(one);
    (selections, store.victims)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(96))]

    #[test]
    fn a_mix_of_one_method_everywhere_equals_that_method(
        method in prop::sample::select(METHODS.to_vec()),
        tokens in 6_usize..200,
        seed: u64,
    ) {
        let shape = small();
        let alone = life(&*build(method, &shape).unwrap(), &shape, 1, seed, tokens);
        let mix = build(&format!("mix:rest=({method})"), &shape).unwrap();
        prop_assert_eq!(&life(&*mix, &shape, 1, seed, tokens), &alone);
        if !method.contains("pool") {
            let halves = build(&format!("mix:*/0=({method}),*/1=({method})"), &shape).unwrap();
            prop_assert_eq!(life(&*halves, &shape, 1, seed, tokens), alone);
        }
    }

    #[test]
    fn every_head_is_answered_for_by_its_part(
        one in prop::sample::select(METHODS.to_vec()),
        two in prop::sample::select(METHODS.to_vec()),
        layer in 0_usize..2,
        tokens in 6_usize..200,
        seed: u64,
    ) {
        // It would be in two parts.
        prop_assume!(!one.contains("pool"));
        let shape = small();
        let mix = build(&format!("mix:0/0=({one}),1/1=({one}),rest=({two})"), &shape).unwrap();
        let (mixed, victims) = life(&*mix, &shape, layer, seed, tokens);
        let [one, two] = [one, two].map(|text| life(&*build(text, &shape).unwrap(), &shape, layer, seed, tokens));
        for head in 0..2 {
            let (alone, alone_victims) = if head == layer { &one } else { &two };
            for (mixed, alone) in mixed.iter().zip(alone).take(3) {
                prop_assert_eq!(mixed.head(head), alone.head(head));
            }
            prop_assert_eq!(&victims[head], &alone_victims[head]);
            if head == 1 {
                prop_assert_eq!(mixed[3].head(0), alone[3].head(0), "asked for one head alone");
            }
        }
    }
}

#[test]
fn its_text_reads_back_in_one_order_and_from_a_table() {
    let text = "mix:2-9=(quest:budget=6%,page=8),10-/0-1=(full),rest=(infinigen:alpha=5,cap=20%)";
    assert_eq!(spec(text).to_string(), text);
    assert_eq!(spec("mix: rest = infinigen , 10-/0-1=(full), 2-9=(quest:page=8, budget=6%)"), spec(text));
    assert_eq!(spec("mix:3/0=(full),*/2=(window)").to_string(), "mix:*/2=(window),3/0=(full)");
    let table =
        r#"{"method": "mix", "rest": "infinigen", "10-/0-1": "full", "2-9": "(quest:budget=6%,page=8)"}"#;
    assert_eq!(serde_json::from_str::<MethodSpec>(table).unwrap(), spec(text));
    let json = serde_json::to_string(&spec(text)).unwrap();
    assert_eq!(serde_json::from_str::<MethodSpec>(&json).unwrap(), spec(text));
    let twelve = spec(text).with_budget("12%".parse().unwrap());
    assert_eq!(
        twelve.to_string(),
        "mix:2-9=(quest:budget=12%,page=8),10-/0-1=(full),rest=(infinigen:budget=12%)"
    );
    assert_eq!(
        (twelve.budget(), spec(text).budget()),
        (Some("12%".parse().unwrap()), Some("6%".parse().unwrap()))
    );
}

#[test]
fn what_is_no_mix_is_refused_and_says_why() {
    let error = |text: &str| text.parse::<MethodSpec>().unwrap_err();
    for text in ["mix", "mix:", "mix:2-9=()", "mix:two=(full)", "mix:9-2=(full)", "mix:0=(full"] {
        assert!(!error(text).to_string().is_empty(), "{text}");
    }
    assert!(error("mix:rest=(mix:rest=(full))").to_string().contains("no mix itself"));
    assert!(error("mix:rest=(fortune)").to_string().contains("fortune"));
    let conflict = error("mix:2-9=(full),5-=(window)");
    assert!(matches!(conflict, SpecError::Parts { .. }), "{conflict}");
    assert!(conflict.to_string().contains("2-9=(full)") && conflict.to_string().contains("5-=(window)"));
    assert!(matches!(
        error("mix:0=(quest:hint_norm=own),1=(scout:hint_norm=previous)"),
        SpecError::Parts { .. }
    ));
    assert!("mix:2-9/0=(full),5-/1=(window)".parse::<MethodSpec>().is_ok(), "other heads");
}

#[test]
fn parts_that_exclude_each_other_are_named() {
    let shape = small();
    let conflict = |text: &str| match build(text, &shape) {
        Err(MethodError::Parts { first, second, reason }) => {
            assert!(text.contains(&first) && text.contains(&second), "{first}, {second}");
            reason
        }
        other => panic!("{text}: {other:?}"),
    };
    assert!(conflict("mix:0=(quest:budget=6%),1=(louver:budget=6%)").contains("queries"));
    assert!(conflict("mix:0=(quest:budget=6%),1=(scout:budget=6%)").contains("missing"));
    let pool = "(infinigen:budget=6%,pool=80%)";
    assert!(conflict(&format!("mix:0={pool},1={pool}")).contains("drop"));
    assert!(build("mix:0=(full),1=(louver)", &shape).is_ok(), "full wants no query at all");
    let message = |text: &str| build(text, &shape).unwrap_err().to_string();
    assert!(message("mix:0=(full)").contains("layer 1, KV head 0"));
    assert!(message("mix:*=(full),rest=(window)").contains("rest=(window)"));
    assert!(message("mix:0-1=(full),7=(window)").contains("7=(window)"));
    assert!(message("mix:rest=(quest:page=24)").contains("24"), "a part's own refusal");
}

#[test]
fn needs_are_the_union_and_digests_are_shared_by_what_shapes_them() {
    let shape = small();
    let mix = build("mix:0=(resv),rest=(infinigen)", &shape).unwrap();
    let needs = mix.needs();
    assert!(needs.memory && needs.observe && needs.digest && !needs.drops_rows);
    assert_eq!(needs.hint, HintSource::Ahead);
    assert_eq!(mix.digest_bytes(), build("infinigen", &shape).unwrap().digest_bytes());
    let key = |text: &str| build(text, &shape).unwrap().digest_key();
    assert_eq!(key("mix:0=(quest:budget=6%),rest=(full)"), key("mix:0=(quest:budget=9%),rest=(window)"));
    assert_ne!(key("mix:0=(quest),rest=(full)"), key("mix:1=(quest),rest=(full)"));
    assert_ne!(key("mix:rest=(quest)"), key("mix:rest=(quest:page=8)"));
    assert_eq!(key("mix:0=(full),1=(window)"), None);
    assert_eq!(build("mix:0=(full),1=(window)", &shape).unwrap().memory_bytes(1000), 0);
}

#[test]
fn what_one_part_needs_the_mix_needs_wherever_it_stands() {
    let shape = Shape { head_dim: 32, value_dim: 32, ..small() };
    let needs = |text: &str| build(text, &shape).unwrap().needs();
    let both =
        |part: &str| [format!("mix:0=(window),rest=({part})"), format!("mix:0=({part}),rest=(window)")];
    for text in both("kvoyant:scope=layer") {
        assert!(needs(&text).heads_together, "{text}");
    }
    for text in both("kvoyant:late=leave") {
        assert!(needs(&text).leaves_late, "{text}");
    }
    for text in both("kvoyant:reuse=5%") {
        assert!(needs(&text).sees_resident, "{text}");
    }
}
