use std::collections::BTreeMap;
use std::sync::Arc;

use proptest::prelude::*;

use super::network::{MIDDLE, TAPS, TENSORS, WIDE};
use super::train::{TrainOptions, Trainer};
use super::*;
use crate::artifact::{Artifact, Tensor, TensorArtifact};
use crate::budget::Budget;
use crate::shape::tests::small;
use crate::testing::{Rng, Store};

/// Tensors by name, as a file has them.
type Named = BTreeMap<&'static str, Vec<f32>>;

fn named(mut value: impl FnMut(&str, usize) -> f32) -> Named {
    let of = |(name, shape): (&'static str, &[usize])| {
        (name, (0..shape.iter().product()).map(|at| value(name, at)).collect())
    };
    TENSORS.into_iter().map(of).collect()
}

fn random_weights(rng: &mut Rng) -> Named {
    named(|_, _| 0.3 * rng.normal(1)[0])
}

/// Passes the image on: its scores are the means over time.
fn passing() -> Named {
    const CENTRE: usize = 4;
    named(|name, at| match name {
        "conv1.weight" | "conv2.weight" if at == CENTRE => 1.0,
        "head.weight" if at == 0 => 1.0,
        _ => 0.0,
    })
}

fn artifact(weights: &Named) -> TensorArtifact {
    let tensors = TENSORS.into_iter().map(|(name, shape)| {
        (name.to_owned(), Tensor { shape: shape.to_vec(), values: weights[name].clone() })
    });
    let settings = BTreeMap::from([("history".into(), "64".into()), ("block".into(), "16".into())]);
    TensorArtifact::new(ArtifactKind::Predictor, small().fingerprint, tensors.collect(), settings).unwrap()
}

fn method_of(artifact: TensorArtifact, budget: usize, shape: &Shape) -> AttentionPredictor {
    let artifacts = [Artifact::Tensors(Arc::new(artifact))].into_iter().collect();
    let options = AttentionPredictorSpec { budget: Budget::rows(budget).unwrap(), ..Default::default() };
    AttentionPredictor::new(options, shape, &artifacts).unwrap()
}

fn average(budget: usize, shape: &Shape) -> AttentionPredictor {
    let options = AttentionPredictorSpec {
        budget: Budget::rows(budget).unwrap(),
        weights: Weights::Average,
        calibrate: 5,
    };
    AttentionPredictor::new(options, shape, &Artifacts::none()).unwrap()
}

/// Sinks and window of whole blocks, as in the paper.
fn aligned() -> Shape {
    Shape { sinks: 16, window: 16, ..small() }
}

/// The network as its definition has it, in f64: `image` is `[rows][columns]`.
fn naive(weights: &Named, image: &[f32], columns: usize) -> Vec<f64> {
    let rows = image.len() / columns;
    let conv = |input: &[f64], inputs: usize, name: &str, outputs: usize| {
        let (weight, bias) = (&weights[&*format!("{name}.weight")], &weights[&*format!("{name}.bias")]);
        let mut out = vec![0.0; outputs * rows * columns];
        for o in 0..outputs {
            for t in 0..rows {
                for c in 0..columns {
                    let mut sum = f64::from(bias[o]);
                    for i in 0..inputs {
                        for tap in 0..TAPS {
                            let (at_t, at_c) = (t + tap / 3, c + tap % 3);
                            if (1..=rows).contains(&at_t) && (1..=columns).contains(&at_c) {
                                let x = input[(i * rows + at_t - 1) * columns + at_c - 1];
                                sum += x * f64::from(weight[(o * inputs + i) * TAPS + tap]);
                            }
                        }
                    }
                    out[(o * rows + t) * columns + c] = sum.max(0.0);
                }
            }
        }
        out
    };
    let image: Vec<f64> = image.iter().map(|value| f64::from(*value)).collect();
    let middle = conv(&image, 1, "conv1", MIDDLE);
    let wide = conv(&middle, MIDDLE, "conv2", WIDE);
    let score = |c: usize| {
        let mean =
            |o: usize| (0..rows).map(|t| wide[(o * rows + t) * columns + c]).sum::<f64>() / rows as f64;
        let sum: f64 = (0..WIDE).map(|o| mean(o) * f64::from(weights["head.weight"][o])).sum();
        sum + f64::from(weights["head.bias"][0])
    };
    (0..columns).map(score).collect()
}

fn row(rng: &mut Rng, blocks: usize) -> Vec<f32> {
    rng.normal(blocks).into_iter().map(|value| (value.abs() / 6.0).min(1.0)).collect()
}

fn predict(method: &AttentionPredictor, memory: &mut [u8], end: usize) -> Vec<f32> {
    let mut scores = Vec::new();
    method.history(memory).predict(method.network.as_ref().unwrap(), end, &mut scores);
    scores
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(6))]

    #[test]
    fn the_network_equals_a_naive_convolution_whatever_came_in_before(
        rows in prop::sample::select(vec![1_usize, 2, 3, 4, 5, 63, 64, 65, 70]),
        blocks in 2_usize..6,
        growth in prop::sample::select(vec![0_usize, 7, 16]),
        cut in prop::option::of(1_usize..6),
        seed: u64,
    ) {
        let mut rng = Rng::new(seed);
        let weights = random_weights(&mut rng);
        let method = method_of(artifact(&weights), 64, &aligned());
        let mut memory = vec![0; method.memory_bytes(16 * 20)];
        let push = |memory: &mut [u8], row: &[f32]| {
            let tokens = row.len() * BLOCK;
            let feedback = FeedbackRow { layer: 0, kv_head: 0, tokens, blocks: row, full: false };
            method.on_feedback(&feedback, memory);
        };
        for at in 0..rows {
            // Some rows are over more tokens than the ones before.
            let width = blocks + at.checked_div(growth).unwrap_or(0);
            push(&mut memory, &row(&mut rng, width));
        }
        if let Some(cut) = cut {
            method.on_truncate(cut * BLOCK + 3, &mut memory);
            push(&mut memory, &row(&mut rng, cut + 2));
        }
        let columns = method.history(&mut memory).columns();
        for end in [columns, 3.min(columns)] {
            if end < 2 {
                continue;
            }
            let scores = predict(&method, &mut memory, end);
            let image = method.history(&mut memory).image(end);
            let expected = naive(&weights, &image, end - 1);
            prop_assert_eq!(scores.len(), expected.len());
            for (score, expected) in scores.iter().zip(&expected) {
                prop_assert!((f64::from(*score) - expected).abs() < 1e-4 * (1.0 + expected.abs()), "{scores:?} {expected:?}");
            }
        }
    }
}

#[test]
fn the_network_has_4833_parameters_and_each_has_its_own_place() {
    let mut places: Vec<usize> = Vec::new();
    for (at, (_, shape)) in TENSORS.into_iter().enumerate() {
        places.extend((0..shape.iter().product()).map(|index| Network::place(at, index)));
    }
    places.sort_unstable();
    assert_eq!(places, (0..4833).collect::<Vec<_>>());
}

#[test]
fn a_history_shifted_by_blocks_gives_scores_shifted_by_blocks() {
    let mut rng = Rng::new(5);
    let method = method_of(artifact(&random_weights(&mut rng)), 64, &aligned());
    let (blocks, by) = (12, 3);
    let mut memories = [(); 2].map(|()| vec![0; method.memory_bytes(16 * 20)]);
    for _ in 0..8 {
        let mut row = row(&mut rng, blocks);
        // Nothing at either edge, so that the shift loses nothing.
        row[..4].fill(0.0);
        row[8..].fill(0.0);
        let mut shifted = row.clone();
        shifted.rotate_right(by);
        for (memory, row) in memories.iter_mut().zip([row, shifted]) {
            let feedback = FeedbackRow { layer: 0, kv_head: 0, tokens: 192, blocks: &row, full: false };
            method.on_feedback(&feedback, memory);
        }
    }
    let [scores, shifted] = memories.each_mut().map(|memory| predict(&method, memory, blocks));
    // Away from the image's edges, whose padding the network sees two blocks far.
    assert_eq!(scores[2..6], shifted[2 + by..6 + by]);
}

/// A sequence of that many tokens, with rows that are hot in these blocks.
fn stationary(
    method: &AttentionPredictor,
    shape: &Shape,
    tokens: usize,
    rows: usize,
    hot: &[usize],
) -> Store {
    let mut store = Store::new(method, shape, 1, tokens);
    store.append(method, &vec![0.0; tokens * 16], 32);
    let mut row = vec![0.0; tokens.div_ceil(BLOCK)];
    hot.iter().for_each(|block| row[*block] = 0.9 / hot.len() as f32);
    for _ in 0..rows {
        (0..2).for_each(|head| store.feedback(method, head, &row, false));
    }
    store
}

fn blocks_of(selection: &Selection) -> Vec<usize> {
    let mut blocks: Vec<usize> = selection.tokens(0).map(|token| token as usize / BLOCK).collect();
    blocks.dedup();
    blocks
}

#[test]
fn a_one_hot_stationary_history_selects_exactly_those_blocks() {
    let shape = aligned();
    let passing = method_of(artifact(&passing()), 48, &shape);
    for method in [passing, average(48, &shape)] {
        for hot in [[2, 7, 11], [1, 2, 3], [1, 10, 14]] {
            for rows in [1, 5, 64, 100] {
                let mut store = stationary(&method, &shape, 256, rows, &hot);
                let selection = store.select(&method, &[], &mut Scratch::new());
                assert_eq!((blocks_of(&selection), selection.rows(1)), (hot.to_vec(), 48));
            }
        }
    }
}

#[test]
fn a_trained_network_selects_the_blocks_of_a_one_hot_stationary_history_too() {
    let options = TrainOptions { learning_rate: 3e-3, batch: 2, crop: 16, ..TrainOptions::default() };
    let mut trainer = Trainer::new(11, options);
    let mut rng = Rng::new(3);
    for _ in 0..10 {
        let mut row = [0.0; 15];
        (0..3).for_each(|_| row[rng.next() as usize % 15] = 0.3);
        trainer.sample(&row.repeat(HISTORY), &row).unwrap();
    }
    let mut losses = Vec::new();
    for _ in 0..12 {
        losses.push(trainer.epoch(&mut |done, total| assert!(done <= total && total == 10)));
    }
    assert!(losses[11] < 0.2 * losses[0], "{losses:?}");
    let shape = aligned();
    let method = method_of(trainer.finish(shape.fingerprint).unwrap(), 48, &shape);
    for hot in [[2, 7, 11], [1, 2, 3], [4, 10, 14]] {
        let mut store = stationary(&method, &shape, 256, 64, &hot);
        assert_eq!(blocks_of(&store.select(&method, &[], &mut Scratch::new())), hot);
    }
}

#[test]
fn gradients_equal_finite_differences() {
    let options = TrainOptions { crop: 5, gain: 4.0, ..TrainOptions::default() };
    let mut trainer = Trainer::new(1, options);
    let mut rng = Rng::new(2);
    let history: Vec<f32> = (0..HISTORY).flat_map(|_| row(&mut rng, 7)).collect();
    trainer.sample(&history, &row(&mut rng, 7)).unwrap();
    assert_eq!(trainer.crops(), 2, "seven blocks are two crops of five, which overlap");
    // Of every tensor a few parameters, the edges of each among them.
    let places = [0, 77, 143, 144, 159, 160, 1111, 3000, 4767, 4768, 4799, 4800, 4831, 4832];
    for place in places {
        let step = 1e-3;
        let difference = (trainer.error_with(place, step, 1) - trainer.error_with(place, -step, 1))
            / f64::from(2.0 * step);
        let slope = f64::from(trainer.slope(place, 1));
        // A ReLU may turn on the way; everything else is smooth.
        assert!((difference - slope).abs() < 0.02 * slope.abs() + 1e-2, "{place}: {difference} and {slope}");
    }
}

#[test]
fn training_repeats_and_can_be_spread_over_threads() {
    let make = || {
        let mut trainer = Trainer::new(9, TrainOptions { batch: 4, crop: 6, ..TrainOptions::default() });
        let mut rng = Rng::new(4);
        for _ in 0..4 {
            let history: Vec<f32> = (0..HISTORY).flat_map(|_| row(&mut rng, 6)).collect();
            trainer.sample(&history, &row(&mut rng, 6)).unwrap();
        }
        trainer
    };
    let (mut one, mut other, mut halves) = (make(), make(), make());
    one.epoch(&mut |_, _| ());
    other.epoch(&mut |_, _| ());
    assert_eq!(one.network(), other.network());
    for batch in halves.batches() {
        let (first, second) = batch.split_at(2);
        let gradients = [halves.gradient(first), halves.gradient(second)];
        assert!(gradients.iter().all(|gradient| gradient.loss() > 0.0));
        halves.apply(&gradients);
    }
    let values = one.network().values().iter().zip(halves.network().values());
    assert!(values.into_iter().all(|(a, b)| (a - b).abs() < 1e-4));
    assert!(one.sample(&[0.0; 63], &[0.0]).is_err() && one.sample(&[f32::NAN; 64], &[0.0]).is_err());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    #[test]
    fn nothing_is_left_out_between_the_last_block_and_the_window_and_the_budget_holds(
        tokens in 20_usize..300,
        seen in 0_usize..20,
        budget in 16_usize..200,
        seed: u64,
    ) {
        let shape = small();
        let method = average(budget, &shape);
        let mut store = Store::new(&method, &shape, 0, tokens);
        store.append(&method, &vec![0.0; tokens * 16], 32);
        let mut rng = Rng::new(seed);
        if seen > 0 {
            let row = row(&mut rng, seen.min(tokens.div_ceil(BLOCK)));
            store.feedback(&method, 0, &row, true);
        }
        let selection = store.select(&method, &[], &mut Scratch::new());
        let candidates = shape.candidates(tokens);
        prop_assert!(selection.rows(0) <= budget.min(candidates.len()));
        let chosen: Vec<usize> = selection.tokens(0).map(|token| token as usize).collect();
        // Whatever is whole blocks that rows have covered can be left out; what is newer only where the budget is spent.
        let covered = (seen.min(candidates.end / BLOCK) * BLOCK).max(candidates.start);
        let newest = (candidates.end - covered).min(budget);
        prop_assert!((candidates.end - newest..candidates.end).all(|token| chosen.contains(&token)));
        // The second head has no row: the newest candidates.
        let expected = candidates.end - budget.min(candidates.len())..candidates.end;
        prop_assert_eq!(selection.tokens(1).map(|token| token as usize).collect::<Vec<_>>(), expected.collect::<Vec<_>>());
    }
}

#[test]
fn what_is_prefetched_is_what_the_next_step_selects_and_changes_nothing_of_it() {
    let shape = small();
    let mut rng = Rng::new(8);
    let method = method_of(artifact(&random_weights(&mut rng)), 40, &shape);
    let mut store = Store::new(&method, &shape, 0, 8);
    store.append(&method, &vec![0.0; 200 * 16], 64);
    for step in 0..70 {
        for head in 0..2 {
            let row = row(&mut rng, store.tokens().div_ceil(BLOCK));
            store.feedback(&method, head, &row, step % 5 == 0);
        }
        // A twin that never prefetches: the choice is the same.
        let mut twin = store.clone();
        let ahead = store.prefetch(&method, &mut Scratch::new()).expect("it always has a choice");
        // The next token comes, now and then to memory that has to grow.
        let key = vec![0.0; 16];
        store.append(&method, &key, 1);
        twin.append(&method, &key, 1);
        let selection = store.select(&method, &[], &mut Scratch::new());
        assert_eq!(selection, ahead);
        assert_eq!(selection, twin.select(&method, &[], &mut Scratch::new()));
    }
}

#[test]
fn an_artifact_of_another_history_or_without_a_tensor_is_refused() {
    let build = |artifact: TensorArtifact| {
        let artifacts = [Artifact::Tensors(Arc::new(artifact))].into_iter().collect();
        AttentionPredictor::new(AttentionPredictorSpec::default(), &small(), &artifacts).map(|_| ())
    };
    assert_eq!(build(artifact(&passing())), Ok(()));
    let make = |tensors, history: &str| {
        let settings = BTreeMap::from([("history".into(), history.into()), ("block".into(), "16".into())]);
        TensorArtifact::new(ArtifactKind::Predictor, small().fingerprint, tensors, settings).unwrap()
    };
    let message = build(make(BTreeMap::new(), "32")).unwrap_err().to_string();
    assert!(message.contains("32") && message.contains("64"), "{message}");
    let message = build(make(BTreeMap::new(), "64")).unwrap_err().to_string();
    assert!(message.contains("conv1.weight"), "{message}");
    let missing = AttentionPredictor::new(AttentionPredictorSpec::default(), &small(), &Artifacts::none());
    assert!(missing.unwrap_err().to_string().contains("predictor"));
}
