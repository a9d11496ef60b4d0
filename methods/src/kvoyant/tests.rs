mod late;
mod roles;

use proptest::prelude::*;

use super::*;
use crate::context::InTime;
use crate::rest::Certificate;
use crate::shape::Shape;
use crate::shape::tests::small;
use crate::testing::{Rng, Store as Kept, logits, mean_softmax};

fn method(options: &str) -> Kvoyant {
    let spec: MethodSpec = format!("kvoyant:{options}").parse().unwrap();
    Kvoyant::new(*spec.options::<KvoyantSpec>().unwrap(), &small()).unwrap()
}

/// Dense attention of a query head over rows that are taken, in f64: the answer, its log-sum-exp, and the share of the others.
fn dense(scores: &[f64], values: &[&[f32]], taken: impl Fn(usize) -> bool) -> (Vec<f64>, f64, f64) {
    let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let (mut answer, mut sum, mut others) = (vec![0.0; values[0].len()], 0.0, 0.0);
    for (t, (score, value)) in scores.iter().zip(values).enumerate() {
        let weight = (score - top).exp();
        if taken(t) {
            sum += weight;
            answer.iter_mut().zip(*value).for_each(|(a, v)| *a += weight * f64::from(*v));
        } else {
            others += weight;
        }
    }
    answer.iter_mut().for_each(|a| *a /= if sum > 0.0 { sum } else { 1.0 });
    (answer, top + sum.ln(), others / (sum + others))
}

/// What is wrong with a head's certificate, if anything, and the ratio of the missed mass to the true one.
struct Check {
    fault: Option<String>,
    ratio: f64,
}

/// Attends the rows that a selection names, merges the rest, and compares everything with dense attention in f64.
#[allow(clippy::too_many_arguments)]
fn check(
    kept: &Kept,
    selection: &Selection,
    rest: &Rest,
    hint: &[f32],
    tokens: usize,
    kv_head: usize,
    query_head: usize,
    certify: impl Fn(&RestSums, f32, &[f32]) -> Certificate,
) -> Check {
    let shape = small();
    let (d, g) = (shape.head_dim, shape.group());
    let head = kv_head * g + query_head;
    let query = &hint[head * d..][..d];
    let keys: Vec<&[f32]> = kept.keys(kv_head).chunks_exact(d).collect();
    let values: Vec<&[f32]> = kept.values(kv_head).chunks_exact(d).collect();
    let dot = |k: &[f32]| k.iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>();
    let scores: Vec<f64> = keys.iter().map(|k| dot(k) / f64::from(d as f32).sqrt()).collect();
    let candidates = shape.candidates(tokens);
    let mut taken: Vec<bool> = (0..tokens).map(|t| !candidates.contains(&t)).collect();
    for chosen in [selection, rest.exact()] {
        chosen.tokens(kv_head).for_each(|t| taken[t as usize] = true);
    }
    let (attended, lse, missed) = dense(&scores, &values, |t| taken[t]);
    let (truth, ..) = dense(&scores, &values, |_| true);
    let sums = &rest.sums()[head];
    let mut answer: Vec<f32> = attended.iter().map(|a| *a as f32).collect();
    let mut merged = [lse as f32];
    Kernels::best().merge(&mut answer, &mut merged, rest.mean(head), &[sums.lse()]);
    let certificate = certify(sums, lse as f32, &answer);
    let error = truth.iter().zip(&answer).map(|(t, a)| (t - f64::from(*a)).powi(2)).sum::<f64>().sqrt();
    let largest = values.iter().flat_map(|v| v.iter()).fold(0.0_f64, |most, v| most.max(f64::from(v.abs())));
    // Attention in f32 is off by so much whatever was left out.
    let rounding = 1e-5 * largest * (d as f64).sqrt();
    let fault = if f64::from(certificate.missed_mass) < missed * (1.0 - 1e-12) {
        Some(format!("missed {missed:.3e}, said {:.3e}", certificate.missed_mass))
    } else if f64::from(certificate.error) + rounding < error {
        Some(format!("error {error:.3e}, said {:.3e}", certificate.error))
    } else {
        None
    };
    let ratio = f64::from(certificate.missed_mass) / missed.max(1e-300);
    Check { fault: fault.map(|fault| format!("{fault} with {sums:?} and an lse of {lse}")), ratio }
}

/// Keys of kinds that break careless bounds.
fn keys(kind: usize, tokens: usize, rng: &mut Rng) -> Vec<f32> {
    let mut keys = rng.normal(tokens * 16);
    let wave = |t: usize| (t as f32 * 0.1).sin();
    for (t, row) in keys.chunks_exact_mut(16).enumerate() {
        match kind {
            0 => {}
            // Nearly constant, far from 0.
            1 => row.iter_mut().step_by(4).for_each(|k| *k = 1000.0 + *k * 1e-2),
            2 => row.iter_mut().for_each(|k| *k *= 30.0),
            3 => row.fill(0.25),
            4 => row[t % 16] *= 1000.0,
            // The edges of f16.
            5 => row.iter_mut().skip(2).step_by(8).for_each(|k| *k = k.signum() * 65000.0),
            6 => row.iter_mut().for_each(|k| *k *= 1e-7),
            7 if t == 40 => row[3] = f32::NAN,
            8 if t % 50 == 41 => row[3] = 1e6,
            _ => row.iter_mut().for_each(|k| *k += 3.0 * wave(t)),
        }
    }
    keys
}

const KINDS: usize = 10;

struct Case {
    kept: Kept,
    hint: Vec<f32>,
    tokens: usize,
}

fn case(method: &Kvoyant, kind: usize, tokens: usize, scale: f32, seed: u64) -> Case {
    let shape = small();
    let mut rng = Rng::new(seed);
    let mut kept = Kept::new(method, &shape, 1, tokens);
    let mut values = rng.normal(tokens * 16);
    values.chunks_exact_mut(16).for_each(|row| row[0] += 2.0);
    kept.append_rows(method, &keys(kind, tokens, &mut rng), &values, 29);
    let hint = rng.normal(32).into_iter().map(|q| q * scale).collect();
    Case { kept, hint, tokens }
}

/// Log-sum-exps of what is attended in any case.
fn floors(case: &Case) -> Vec<f32> {
    let shape = small();
    let local = |t: &usize| !shape.candidates(case.tokens).contains(t);
    let rows: Vec<usize> = (0..case.tokens).filter(local).collect();
    (0..shape.query_heads)
        .map(|head| {
            let query = &case.hint[head * 8..][..8];
            let keys = case.kept.keys(head / shape.group());
            let score = |t: &usize| {
                let k = &keys[t * 8..][..8];
                k.iter().zip(query).map(|(k, q)| f64::from(*k) * f64::from(*q)).sum::<f64>() / 8_f64.sqrt()
            };
            let scores: Vec<f64> = rows.iter().map(score).collect();
            let top = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            (top + scores.iter().map(|s| (s - top).exp()).sum::<f64>().ln()) as f32
        })
        .collect()
}

fn select(method: &Kvoyant, case: &mut Case, floors: &[f32]) -> (Selection, Rest) {
    let hint = case.hint.clone();
    let context = SelectContext { floors, ..SelectContext::new(&small(), 1, case.tokens, &hint) };
    case.kept.select_with_rest(method, &context, &mut Scratch::new())
}

fn faults(case: &Case, selection: &Selection, rest: &Rest) -> Vec<String> {
    let all = (0..2).flat_map(|kv_head| (0..2).map(move |query| (kv_head, query)));
    let check = |(kv_head, query)| {
        check(&case.kept, selection, rest, &case.hint, case.tokens, kv_head, query, RestSums::certify)
    };
    all.filter_map(|at| check(at).fault).collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(400))]

    #[test]
    fn no_answer_misses_more_than_its_certificate_says(
        kind in 0..KINDS, tokens in 45_usize..300, budget in 1_usize..40, scale in 0.01_f32..4.0, seed: u64,
        options in prop::sample::select(vec!["", ",bits=4", ",bits=4,group=16", ",scope=head", ",scope=layer"]),
    ) {
        let method = method(&format!("budget={budget}{options}"));
        let mut case = case(&method, kind, tokens, scale, seed);
        let (selection, rest) = select(&method, &mut case, &[]);
        prop_assert_eq!(rest.heads(), 4);
        if kind != 7 {
            let faults = faults(&case, &selection, &rest);
            prop_assert!(faults.is_empty(), "{:?}", faults);
        }
    }

    #[test]
    fn no_query_head_misses_more_than_it_may(
        kind in 0..7_usize, tokens in 45_usize..300, missed in 0.0_f64..0.5, scale in 0.01_f32..4.0, seed: u64,
        bits in prop::sample::select(vec![4, 6]),
    ) {
        let method = method(&format!("max_missed_mass={missed},bits={bits}"));
        let mut case = case(&method, kind, tokens, scale, seed);
        let floors = floors(&case);
        let (selection, rest) = select(&method, &mut case, &floors);
        let faults = faults(&case, &selection, &rest);
        prop_assert!(faults.is_empty(), "{:?}", faults);
        for kv_head in 0..2 {
            for query in 0..2 {
                let said = std::cell::Cell::new(0.0);
                check(&case.kept, &selection, &rest, &case.hint, tokens, kv_head, query, |sums, lse, answer| {
                    let certificate = sums.certify(lse, answer);
                    said.set(f64::from(certificate.missed_mass));
                    certificate
                });
                prop_assert!(said.get() <= missed + 1e-3 * missed + 1e-30, "{} of {missed}", said.get());
            }
        }
    }

    #[test]
    fn a_second_look_by_the_true_query_adds_what_the_first_missed_and_bounds_what_is_left(
        kind in 0..7_usize, tokens in 14_usize..300, budget in 2_usize..30, seed: u64,
        options in prop::sample::select(vec!["", ",correct=0", ",max"]),
    ) {
        second_look(kind, tokens, budget, seed, options)?;
    }
}

fn second_look(
    kind: usize,
    tokens: usize,
    budget: usize,
    seed: u64,
    options: &str,
) -> Result<(), TestCaseError> {
    let text = if options == ",max" {
        "max_missed_mass=0.05,hint=ahead".to_owned()
    } else {
        format!("budget={budget},hint=ahead{options}")
    };
    let method = method(&text);
    let mut case = case(&method, kind, tokens, 1.0, seed);
    let ahead: Vec<f32> =
        Rng::new(seed ^ 1).normal(32).iter().zip(&case.hint).map(|(n, q)| q + 0.3 * n).collect();
    let context = SelectContext::new(&small(), 1, tokens, &ahead);
    let selection = case.kept.select_with(&method, &context, &mut Scratch::new());
    let hint = case.hint.clone();
    let floors = floors(&case);
    let context = SelectContext { floors: &floors, ..SelectContext::new(&small(), 1, tokens, &hint) };
    let rest = case.kept.rest(&method, &context, &selection, &mut Scratch::new());
    for head in 0..2 {
        let exact: Vec<u32> = rest.exact().tokens(head).collect();
        prop_assert!(selection.tokens(head).all(|token| !exact.contains(&token)));
        if !options.contains("max") {
            prop_assert!(exact.len() <= spec::part_of(budget, method.options.correct));
        }
    }
    let faults = faults(&case, &selection, &rest);
    prop_assert!(faults.is_empty(), "{:?}", faults);
    Ok(())
}

#[test]
fn rows_that_are_rounded_to_nothing_count_with_their_margins() {
    second_look(4, 148, 21, 9_819_725_876_182_557_673, "").unwrap();
}

#[test]
fn wrong_bounds_are_caught() {
    let (mut half_steps, mut unrounded) = (0, 0);
    for seed in 0..400 {
        let method = method("budget=8,bits=4");
        // Digests whose errors are said to be half as large as they are.
        let mut case = case(&method, (seed % 3) as usize, 200, 2.0, seed);
        let (selection, rest) = select(&method, &mut case, &[]);
        for (kv_head, query) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let spoilt = |certify: &dyn Fn(&RestSums, f32, &[f32]) -> Certificate| {
                check(&case.kept, &selection, &rest, &case.hint, 200, kv_head, query, certify).fault.is_some()
            };
            // Margins left out altogether: ε is that of the estimated scores.
            half_steps += usize::from(spoilt(&|sums, lse, answer| {
                RestSums { upper: sums.weight, ..*sums }.certify(lse, answer)
            }));
            // The spread of values forgotten.
            unrounded += usize::from(spoilt(&|sums, lse, answer| {
                RestSums { spread: 0.0, scatter: 0.0, upper: sums.weight, ..*sums }.certify(lse, answer)
            }));
        }
    }
    assert!(half_steps > 100 && unrounded > 100, "{half_steps} {unrounded}");
}

#[test]
fn nearly_all_of_what_an_ordinary_head_misses_is_really_missed() {
    let method = method("budget=16");
    let mut ratios = Vec::new();
    for seed in 0..60 {
        let mut case = case(&method, 0, 280, 1.0, seed);
        let (selection, rest) = select(&method, &mut case, &[]);
        for (kv_head, query) in [(0, 0), (0, 1), (1, 0), (1, 1)] {
            let certify = RestSums::certify;
            ratios.push(check(&case.kept, &selection, &rest, &case.hint, 280, kv_head, query, certify).ratio);
        }
    }
    ratios.sort_by(f64::total_cmp);
    let median = ratios[ratios.len() / 2];
    assert!((1.0..1.15).contains(&median), "{median}");
}

#[test]
fn rows_are_nearly_those_with_the_largest_true_shares() {
    let shape = small();
    let (mut found, mut wanted) = (0, 0);
    for seed in 0..30 {
        let method = method("budget=20,scope=head");
        let mut case = case(&method, 0, 270, 2.0, seed);
        let (selection, _) = select(&method, &mut case, &[]);
        // Rows without a digest are selected besides.
        let sealed = shape.candidates(270).start..256;
        for kv_head in 0..2 {
            let shares = true_shares(&case, kv_head, sealed.clone())[sealed.clone()].to_vec();
            let mut best: Vec<usize> = (0..sealed.len()).collect();
            best.sort_by(|a, b| shares[*b].total_cmp(&shares[*a]));
            let chosen: Vec<usize> = selection.tokens(kv_head).map(|t| t as usize - sealed.start).collect();
            assert_eq!(selection.rows(kv_head), 20 + shape.candidates(270).end - 256);
            found += best[..20].iter().filter(|id| chosen.contains(id)).count();
            wanted += 20;
        }
    }
    assert!(found * 100 > wanted * 93, "{found} of {wanted}");
}

#[test]
fn steps_get_the_budget_in_the_mean_and_each_head_its_least() {
    let shape = small();
    let method = method("budget=20,floor=0.5");
    let mut rng = Rng::new(5);
    let mut kept = Kept::new(&method, &shape, 1, 600);
    kept.append_rows(&method, &rng.normal(300 * 16), &rng.normal(300 * 16), 64);
    let mut rows = [0; 2];
    for step in 0..200 {
        // One head attends sharply, the other to nearly everything.
        let hint: Vec<f32> =
            rng.normal(32).iter().enumerate().map(|(j, q)| if j < 16 { q * 4.0 } else { *q }).collect();
        let context = SelectContext::new(&shape, 1, kept.tokens(), &hint);
        let selection = kept.select_with(&method, &context, &mut Scratch::new());
        let unsealed = |selection: &Selection, head: usize| {
            let full = (context.tokens - 1) / 32 * 32;
            selection.tokens(head).filter(|t| *t as usize >= full).count()
        };
        for (head, rows) in rows.iter_mut().enumerate() {
            assert!(step == 0 || selection.rows(head) - unsealed(&selection, head) >= 10);
            *rows += selection.rows(head);
        }
        kept.append_rows(&method, &rng.normal(16), &rng.normal(16), 64);
    }
    let mean = rows.iter().sum::<usize>() as f64 / 400.0;
    assert!((18.0..26.0).contains(&mean), "{mean} of 20, unsealed rows included");
}

#[test]
fn rows_taken_and_the_rest_estimated_at_once_are_as_one_after_the_other() {
    let shape = small();
    let method = method("budget=20,floor=0.5");
    let mut rng = Rng::new(6);
    let mut both = [0, 1].map(|_| Kept::new(&method, &shape, 1, 400));
    // How many heads got the least that they may, and how many got more.
    let (mut least, mut more) = (0, 0);
    let mut scratch = Scratch::new();
    for step in 0..40 {
        let (keys, values) = (rng.normal(7 * 16), rng.normal(7 * 16));
        both.iter_mut().for_each(|kept| kept.append_rows(&method, &keys, &values, 64));
        // One head attends sharply, the other to nearly everything.
        let hint: Vec<f32> =
            rng.normal(32).iter().enumerate().map(|(j, q)| if j < 16 { q * 4.0 } else { *q }).collect();
        let [once, twice] = &mut both;
        let context = SelectContext::new(&shape, 1, once.tokens(), &hint);
        let (chosen, rest) = once.select_with_rest(&method, &context, &mut scratch);
        assert_eq!(chosen, twice.select_with(&method, &context, &mut scratch), "step {step}");
        let second = twice.rest(&method, &context, &chosen, &mut scratch);
        assert_eq!(rest.sums(), second.sums(), "step {step}");
        for head in 0..4 {
            assert_eq!(rest.mean(head), second.mean(head), "step {step}");
        }
        let sealed = (context.tokens - 1) / 32 * 32;
        for head in 0..2 {
            let rows = chosen.tokens(head).filter(|t| (*t as usize) < sealed).count();
            least += usize::from(rows == 10);
            more += usize::from(rows > 10);
        }
    }
    assert!(least > 5 && more > 5, "{least} and {more} heads");
}

#[test]
fn a_missed_mass_of_0_is_everything_and_of_1_nothing_but_rows_without_digests() {
    let candidates = small().candidates(270);
    for (missed, rows) in [("0", candidates.len()), ("1", candidates.end - 256)] {
        let method = method(&format!("max_missed_mass={missed}"));
        let mut case = case(&method, 0, 270, 1.0, 3);
        let (selection, rest) = select(&method, &mut case, &[]);
        assert_eq!(selection.rows(0), rows);
        assert_eq!(rest.sums()[0].rows as usize + rows, candidates.len());
    }
}

#[test]
fn keys_of_which_nothing_is_known_are_selected_first() {
    let method = method("budget=40,scope=head");
    let mut case = case(&method, 7, 200, 1.0, 9);
    let (selection, rest) = select(&method, &mut case, &[]);
    // Row 40 of KV head 0 is no number: its page's 32 rows come before all others.
    assert!((32..64).all(|token| selection.tokens(0).any(|t| t == token)));
    assert!(rest.sums().iter().all(RestSums::is_certified));
    let few = Kvoyant::new(
        *"kvoyant:budget=8,scope=head".parse::<MethodSpec>().unwrap().options().unwrap(),
        &small(),
    )
    .unwrap();
    let (_, rest) = select(&few, &mut case, &[]);
    assert!(!rest.sums()[0].is_certified() && rest.sums()[2].is_certified());
}

#[test]
fn certificates_come_when_they_are_asked_for() {
    for (options, certified) in
        [("", [true, true]), (",certificate=off", [false, false]), (",certificate=2", [true, false])]
    {
        let method = method(&format!("budget=8{options}"));
        let mut case = case(&method, 0, 200, 1.0, 1);
        let hint = case.hint.clone();
        for (step, certified) in certified.into_iter().enumerate() {
            let context = SelectContext { step: step as u64, ..SelectContext::new(&small(), 1, 200, &hint) };
            let (_, rest) = case.kept.select_with_rest(&method, &context, &mut Scratch::new());
            assert_eq!(rest.sums()[1].is_certified(), certified, "{options}");
            assert!(rest.sums()[1].weight > 0.0);
        }
    }
    let method = method("budget=8,tail=off");
    let mut case = case(&method, 0, 200, 1.0, 1);
    let (_, rest) = select(&method, &mut case, &[]);
    assert_eq!(rest.sums()[0].lse(), f32::NEG_INFINITY);
    assert!(rest.sums()[0].certify(0.0, &[0.0; 8]).missed_mass < 1.0);
}

#[test]
fn options_are_read_back_and_wrong_ones_refused_with_what_would_do() {
    let parse = |text: &str| text.parse::<MethodSpec>();
    for text in [
        "kvoyant:budget=2%",
        "kvoyant:max_missed_mass=0.01,bits=4,group=16",
        "kvoyant:budget=64,scope=layer,floor=0,multiple=2,tail=off,resident=off,correct=0.25,certificate=8,hint=ahead",
        "kvoyant:budget=2%,late=leave,reuse=0.9",
        "kvoyant:max_missed_mass=0.1,late=leave,reuse=0.9,hint=ahead",
    ] {
        assert_eq!(parse(text).unwrap().to_string(), text);
    }
    assert_eq!(parse("kvoyant").unwrap().to_string(), "kvoyant:budget=2%");
    let refused = |text: &str| parse(text).unwrap_err().to_string();
    assert!(refused("kvoyant:budget=0").contains("budget 0"));
    assert!(refused("kvoyant:budget=101%").contains("101%"));
    for missed in ["-0.1", "1.5", "NaN"] {
        assert!(refused(&format!("kvoyant:max_missed_mass={missed}")).contains("0 to 1"), "{missed}");
    }
    assert!(refused("kvoyant:budget=2%,max_missed_mass=0.1").contains("exclude"));
    for left in ["late=leave", "reuse=0.9"] {
        assert!(refused(&format!("kvoyant:max_missed_mass=0.1,{left}")).contains("exclude"), "{left}");
    }
    assert!(refused("kvoyant:late=never").contains("wait, leave"));
    assert!(refused("kvoyant:reuse=2").contains("0 to 1"));
    assert!(refused("kvoyant:bits=5").contains("4, 6"));
    assert!(refused("kvoyant:group=24").contains("multiple of 16"));
    assert!(refused("kvoyant:certificate=0").contains("number of steps"));
    let wide = *parse("kvoyant:group=64").unwrap().options::<KvoyantSpec>().unwrap();
    let error = Kvoyant::new(wide, &small()).unwrap_err().to_string();
    assert!(error.contains("groups of 64"), "{error}");
}

#[test]
fn a_page_of_several_blocks_is_as_so_many_pages() {
    let long = Shape { page_rows: 128, ..small() };
    for options in
        ["budget=12,bits=4,group=16", "max_missed_mass=0.02", "budget=9,scope=layer", "budget=20,hint=ahead"]
    {
        let spec: MethodSpec = format!("kvoyant:{options}").parse().unwrap();
        let spec = *spec.options::<KvoyantSpec>().unwrap();
        let answers = [small(), long].map(|shape| {
            let method = Kvoyant::new(spec, &shape).unwrap();
            let mut rng = Rng::new(5);
            let (first, second) = (keys(9, 200, &mut rng), keys(9, 97, &mut rng));
            let values = rng.normal(297 * 16);
            let mut kept = Kept::new(&method, &shape, 1, 500);
            kept.append_rows(&method, &first, &values[..200 * 16], 29);
            // Within a page and within a block.
            kept.truncate(&method, 171);
            kept.append_rows(&method, &second, &values[200 * 16..], 1);
            let hint = rng.normal(32);
            let context = SelectContext::new(&shape, 1, 268, &hint);
            let chosen = kept.select_with(&method, &context, &mut Scratch::new());
            let rest = kept.rest(&method, &context, &chosen, &mut Scratch::new());
            (kept.select_with_rest(&method, &context, &mut Scratch::new()), rest)
        });
        let [((chosen, whole), rest), ((chosen_long, whole_long), rest_long)] = answers;
        assert_eq!(chosen, chosen_long, "{options}");
        for (rest, long) in [(whole, whole_long), (rest, rest_long)] {
            assert_eq!(rest.exact(), long.exact(), "{options}");
            for (a, b) in rest.sums().iter().zip(long.sums()) {
                assert_eq!(a.rows, b.rows, "{options}");
                assert!((a.upper - b.upper).abs() <= 1e-5 * a.upper, "{options}: {a:?} {b:?}");
            }
        }
    }
}

/// The mean share in its group that each row of a sealed range has of the range's attention, by its exact key; 0 elsewhere.
fn true_shares(case: &Case, kv_head: usize, sealed: std::ops::Range<usize>) -> Vec<f32> {
    let rows: Vec<f32> = (0..case.tokens)
        .flat_map(|t| (0..2).flat_map(move |head| (0..8).map(move |j| (t, head, j))))
        .map(|(t, head, j)| case.kept.keys(head)[t * 8 + j])
        .collect();
    let all = logits(&small(), &case.hint, &rows, kv_head);
    let scores: Vec<f32> = all.chunks(case.tokens).flat_map(|row| row[sealed.clone()].to_vec()).collect();
    let mut shares = vec![0.0; sealed.start];
    shares.extend(mean_softmax(&scores, sealed.len()));
    shares.resize(case.tokens, 0.0);
    shares
}

#[test]
fn nothing_is_owed_while_everything_is_selected_anyway() {
    let (shape, method) = (small(), method("budget=64"));
    let mut rng = Rng::new(6);
    let mut kept = Kept::new(&method, &shape, 1, 100);
    kept.append_rows(&method, &rng.normal(40 * 16), &rng.normal(40 * 16), 64);
    for _ in 0..20 {
        let hint = rng.normal(32);
        let context = SelectContext::new(&shape, 1, kept.tokens(), &hint);
        kept.select_with(&method, &context, &mut Scratch::new());
        kept.append_rows(&method, &rng.normal(16), &rng.normal(16), 64);
    }
    let debt = f64::from_le_bytes(*kept.sequence()[32..].first_chunk().unwrap());
    assert!(debt.abs() < 1.0, "{debt} rows are owed");
}

#[test]
fn a_head_whose_queries_are_near_its_last_ones_takes_nothing_that_is_not_there() {
    let method = method("budget=24,reuse=0.95");
    assert!(method.needs().sees_resident);
    assert_ne!(method.digest_key(), self::method("budget=24").digest_key(), "notes are of another length");
    let mut case = case(&method, 0, 280, 1.0, 3);
    let mut resident = Selection::new();
    let ask = |kept: &mut Kept, tokens: usize, hint: &[f32], resident: &Selection| {
        let in_time = Some(InTime { resident, first_head: 0, room: usize::MAX });
        let context = SelectContext { in_time, ..SelectContext::new(&small(), 1, tokens, hint) };
        kept.select_with(&method, &context, &mut Scratch::new())
    };
    (0..2).for_each(|_| resident.finish_head());
    let hint = case.hint.clone();
    let first = ask(&mut case.kept, 280, &hint, &resident);
    assert_eq!((first.wanted(), first.late()), (first.total_rows(), 0));
    // The second head turns away, the first one hardly.
    let mut next = hint.clone();
    next.iter_mut()
        .enumerate()
        .for_each(|(j, q)| *q += if j < 16 { 0.15 } else { 2.0 * (j % 3) as f32 - 2.0 });
    let second = ask(&mut case.kept, 280, &next, &first);
    assert!(second.tokens(0).all(|t| first.tokens(0).any(|f| f == t)), "all of it is there");
    assert!(second.tokens(1).any(|t| first.tokens(1).all(|f| f != t)), "some of it is new");
    assert!(second.wanted() > second.total_rows() && second.late() == 0);
    // Near to what the head last chose by, not to what it last was asked by.
    let third = ask(&mut case.kept, 280, &hint, &first);
    assert!(third.tokens(0).all(|t| first.tokens(0).any(|f| f == t)));
}
