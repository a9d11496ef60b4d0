//! Training of hash weights: codes whose Hamming distance follows `q·k` (HATA, Findings of ACL 2025, arXiv 2506.02572).
//!
//! Per KV head a matrix `W` of shape `[d, r]`; the sign of `x·W` is the code. While training the sign is relaxed,
//! `h(x) = 2·sigmoid(σ·xW) − 1`, and over `n` pairs of a query and a key with labels `s_i`
//!
//! `loss = ε/n · Σ_i s_i·‖h(q_i) − h(k_i)‖²` (near pairs together, others apart)
//! `     + λ · ‖1/(n·r) · Σ_i (h(q_i) + h(k_i))‖²` (every bit is set half of the time)
//! `     + η · ‖WᵀW − I‖_F` (bits differ from each other).
//!
//! Labels: of a query's keys the tenth with the highest scores gets 20 falling to 1 in rank order, all others −1. Stochastic
//! gradient descent with momentum, a random part of one prompt per epoch. The reference takes the last norm over all heads of a
//! layer at once; here heads are trained apart, and in parallel where the caller likes.

use std::collections::BTreeMap;

use kvoyant_kernels::Kernels;

use crate::artifact::{ArtifactKind, Tensor, TensorArtifact};
use crate::error::MethodError;
use crate::random::Draw;
use crate::shape::Fingerprint;

/// How weights are trained. The defaults are the reference's values, but for `chunk`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainOptions {
    /// How often a part of the data is drawn.
    pub epochs: usize,
    /// Steps on each part.
    pub steps: usize,
    /// Keys of a part, at most.
    pub chunk: usize,
    /// Step length.
    pub rate: f32,
    /// Momentum.
    pub momentum: f32,
    /// Weight decay.
    pub decay: f32,
    /// Steepness `σ` of the relaxed sign.
    pub sigma: f32,
    /// Weight `ε` of similarity.
    pub similarity: f32,
    /// Weight `λ` of balance.
    pub balance: f32,
    /// Weight `η` of decorrelation.
    pub decorrelation: f32,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self {
            epochs: 15,
            steps: 20,
            chunk: 4096,
            rate: 0.1,
            momentum: 0.9,
            decay: 1e-6,
            sigma: 0.1,
            similarity: 0.01,
            balance: 1.0,
            decorrelation: 2.0,
        }
    }
}

/// Share of a query's keys that belong to it.
const NEAR: f64 = 0.1;
/// Labels of those, from the best to the last, and of all others.
const NEAREST_LABEL: f32 = 20.0;
const NEAR_LABEL: f32 = 1.0;
const FAR_LABEL: f32 = -1.0;

/// Queries `[q][d]` of one KV head at one position and the keys `[n][d]` before it, with labels `[q][n]`.
#[derive(Debug, Clone)]
struct Batch {
    queries: Vec<f32>,
    keys: Vec<f32>,
    labels: Vec<f32>,
}

/// Trains the weights of one KV head.
#[derive(Debug, Clone)]
pub struct HashTrainer {
    head_dim: usize,
    bits: usize,
    options: TrainOptions,
    seed: u64,
    weights: Vec<f32>,
    batches: Vec<Batch>,
    kernels: Kernels,
}

/// Buffers of one step.
#[derive(Debug, Default)]
struct Work {
    /// `h` of queries and keys.
    query_codes: Vec<f32>,
    key_codes: Vec<f32>,
    /// Derivatives of the loss by them.
    query_slopes: Vec<f32>,
    key_slopes: Vec<f32>,
    mean: Vec<f32>,
    /// `WᵀW − I`.
    gram: Vec<f32>,
}

impl HashTrainer {
    /// Weights of `bits` columns, drawn from a normal distribution by `seed`.
    #[must_use]
    pub fn new(head_dim: usize, bits: usize, seed: u64, options: TrainOptions) -> Self {
        let mut draw = Draw::new(&[seed]);
        let weights = (0..head_dim * bits).map(|_| draw.normal()).collect();
        Self { head_dim, bits, options, seed, weights, batches: Vec::new(), kernels: Kernels::best() }
    }

    /// Labels `[q][n]` of queries `[q][d]` and keys `[n][d]` by their true scores. Of equal scores the first key ranks first.
    ///
    /// # Panics
    /// Where a slice is no whole number of vectors.
    #[must_use]
    pub fn labels(&self, queries: &[f32], keys: &[f32]) -> Vec<f32> {
        let d = self.head_dim;
        assert!(queries.len().is_multiple_of(d) && keys.len().is_multiple_of(d), "vectors of {d} values");
        let count = keys.len() / d;
        let near = (count as f64 * NEAR).ceil() as usize;
        let mut labels = vec![FAR_LABEL; queries.len() / d * count];
        for (query, labels) in queries.chunks_exact(d).zip(labels.chunks_exact_mut(count.max(1))) {
            let scores: Vec<f32> = keys.chunks_exact(d).map(|key| self.kernels.dot(query, key)).collect();
            let mut order: Vec<usize> = (0..count).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            for (rank, key) in order.into_iter().take(near).enumerate() {
                let along = rank as f32 / (near - 1).max(1) as f32;
                labels[key] = NEAREST_LABEL + along * (NEAR_LABEL - NEAREST_LABEL);
            }
        }
        labels
    }

    /// Adds training data: queries `[q][d]` of the KV head's group at one position, keys `[n][d]` up to it (both after RoPE), and
    /// labels `[q][n]`, say those of [`Self::labels`].
    ///
    /// # Panics
    /// Where lengths do not fit together.
    pub fn batch(&mut self, queries: &[f32], keys: &[f32], labels: &[f32]) {
        let d = self.head_dim;
        assert!(queries.len().is_multiple_of(d) && keys.len().is_multiple_of(d), "vectors of {d} values");
        assert_eq!(labels.len(), queries.len() / d * (keys.len() / d), "one label per query and key");
        if !labels.is_empty() {
            let (queries, keys, labels) = (queries.to_vec(), keys.to_vec(), labels.to_vec());
            self.batches.push(Batch { queries, keys, labels });
        }
    }

    /// Trains; after every epoch `progress` gets how many are done and the loss of the last step. The result, `[d, bits]`, depends
    /// on the data, the options and the seed alone. Without data it is what the training would have begun with.
    pub fn train(mut self, mut progress: impl FnMut(usize, f32)) -> Vec<f32> {
        let mut draw = Draw::new(&[self.seed, 1]);
        let (mut work, mut velocity) = (Work::default(), vec![0.0; self.weights.len()]);
        let mut slopes = vec![0.0; self.weights.len()];
        let epochs = if self.batches.is_empty() { 0 } else { self.options.epochs };
        for epoch in 0..epochs {
            let at = draw.below(self.batches.len() as u64) as usize;
            let part = self.part(&self.batches[at], &mut draw);
            let mut loss = 0.0;
            for _ in 0..self.options.steps {
                loss = self.slopes(&part, &mut slopes, &mut work);
                let TrainOptions { rate, momentum, decay, .. } = self.options;
                for ((weight, velocity), slope) in self.weights.iter_mut().zip(&mut velocity).zip(&slopes) {
                    *velocity = momentum * *velocity + slope + decay * *weight;
                    *weight -= rate * *velocity;
                }
            }
            progress(epoch + 1, loss);
        }
        self.weights
    }

    /// At most `chunk` of a batch's keys, drawn by selection sampling (Knuth, TAOCP 2, 3.4.2, algorithm S).
    fn part(&self, batch: &Batch, draw: &mut Draw) -> Batch {
        let d = self.head_dim;
        let count = batch.keys.len() / d;
        let wanted = self.options.chunk.clamp(1, count);
        let mut chosen = Vec::with_capacity(wanted);
        for key in 0..count {
            if draw.below((count - key) as u64) < (wanted - chosen.len()) as u64 {
                chosen.push(key);
            }
        }
        let keys = chosen.iter().flat_map(|key| &batch.keys[key * d..(key + 1) * d]).copied().collect();
        let of_query = |labels: &[f32]| chosen.iter().map(|key| labels[*key]).collect::<Vec<_>>();
        let labels = batch.labels.chunks_exact(count).flat_map(of_query).collect();
        Batch { queries: batch.queries.clone(), keys, labels }
    }

    /// The loss, and its derivatives by the weights in `out`.
    fn slopes(&self, batch: &Batch, out: &mut [f32], work: &mut Work) -> f32 {
        let (d, r) = (self.head_dim, self.bits);
        let TrainOptions { sigma, similarity, balance, .. } = self.options;
        let Work { query_codes, key_codes, query_slopes, key_slopes, mean, .. } = work;
        self.codes(&batch.queries, query_codes);
        self.codes(&batch.keys, key_codes);
        let (queries, keys) = (batch.queries.len() / d, batch.keys.len() / d);
        let pairs = (queries * keys) as f32;

        // Balance: a query is in as many pairs as there are keys, and the other way round.
        mean.clear();
        mean.resize(r, 0.0);
        let share = 1.0 / (pairs * r as f32);
        for (codes, weight) in [(&*query_codes, keys), (&*key_codes, queries)] {
            codes.chunks_exact(r).for_each(|code| self.kernels.axpy(mean, weight as f32 * share, code));
        }
        let mut loss = balance * mean.iter().map(|mean| mean * mean).sum::<f32>();
        for (slopes, count, weight) in
            [(&mut *query_slopes, queries, keys), (&mut *key_slopes, keys, queries)]
        {
            slopes.clear();
            let factor = 2.0 * balance * weight as f32 * share;
            (0..count).for_each(|_| slopes.extend(mean.iter().map(|mean| factor * mean)));
        }

        let factor = similarity / pairs;
        let mut distances = 0.0_f64;
        for (query, labels) in batch.labels.chunks_exact(keys).enumerate() {
            let of_query = &query_codes[query * r..(query + 1) * r];
            let slope = &mut query_slopes[query * r..(query + 1) * r];
            for (key, label) in labels.iter().enumerate() {
                let of_key = &key_codes[key * r..(key + 1) * r];
                let key_slope = &mut key_slopes[key * r..(key + 1) * r];
                let weight = 2.0 * factor * label;
                let mut distance = 0.0;
                for bit in 0..r {
                    let apart = of_query[bit] - of_key[bit];
                    distance += apart * apart;
                    slope[bit] += weight * apart;
                    key_slope[bit] -= weight * apart;
                }
                distances += f64::from(label * distance);
            }
        }
        loss += factor * distances as f32;

        out.fill(0.0);
        for (vectors, codes, slopes) in
            [(&batch.queries, &*query_codes, &mut *query_slopes), (&batch.keys, &*key_codes, key_slopes)]
        {
            for ((x, code), slope) in
                vectors.chunks_exact(d).zip(codes.chunks_exact(r)).zip(slopes.chunks_exact_mut(r))
            {
                // dh/dz = σ/2·(1 − h²).
                slope.iter_mut().zip(code).for_each(|(slope, h)| *slope *= 0.5 * sigma * (1.0 - h * h));
                for (x, out) in x.iter().zip(out.chunks_exact_mut(r)) {
                    self.kernels.axpy(out, *x, slope);
                }
            }
        }
        loss + self.decorrelate(out, &mut work.gram)
    }

    /// The third term: its value, and `2η·W(WᵀW − I)/‖WᵀW − I‖` added to `out`.
    fn decorrelate(&self, out: &mut [f32], gram: &mut Vec<f32>) -> f32 {
        let r = self.bits;
        gram.clear();
        gram.resize(r * r, 0.0);
        for row in self.weights.chunks_exact(r) {
            for (x, gram) in row.iter().zip(gram.chunks_exact_mut(r)) {
                self.kernels.axpy(gram, *x, row);
            }
        }
        (0..r).for_each(|bit| gram[bit * r + bit] -= 1.0);
        let norm = gram.iter().map(|value| f64::from(*value).powi(2)).sum::<f64>().sqrt() as f32;
        if norm > 0.0 {
            let factor = 2.0 * self.options.decorrelation / norm;
            for (row, out) in self.weights.chunks_exact(r).zip(out.chunks_exact_mut(r)) {
                row.iter().zip(gram.chunks_exact(r)).for_each(|(x, gram)| {
                    self.kernels.axpy(out, factor * x, gram);
                });
            }
        }
        self.options.decorrelation * norm
    }

    /// `h` of vectors `[n][d]`, as `[n][bits]`.
    fn codes(&self, vectors: &[f32], out: &mut Vec<f32>) {
        let (d, r) = (self.head_dim, self.bits);
        out.resize(vectors.len() / d * r, 0.0);
        for (x, out) in vectors.chunks_exact(d).zip(out.chunks_exact_mut(r)) {
            self.kernels.project(x, &self.weights, out);
            out.iter_mut().for_each(|z| *z = 2.0 / (1.0 + (-self.options.sigma * *z).exp()) - 1.0);
        }
    }
}

/// The artifact of all heads' weights, `[layers, kv_heads, d, bits]`: tensor `hash`, setting `bits`.
///
/// # Errors
/// [`MethodError::ArtifactFormat`] where the weights are no such tensor, or not finite.
pub fn artifact(
    model: Fingerprint,
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    weights: Vec<f32>,
) -> Result<TensorArtifact, MethodError> {
    let heads = (layers * kv_heads * head_dim).max(1);
    let bits = weights.len() / heads;
    let tensor = Tensor { shape: vec![layers, kv_heads, head_dim, bits], values: weights };
    let settings = BTreeMap::from([("bits".to_owned(), bits.to_string())]);
    TensorArtifact::new(ArtifactKind::Hash, model, BTreeMap::from([("hash".to_owned(), tensor)]), settings)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::Rng;

    /// The loss as it is written, over pairs, in f64.
    fn naive_loss(trainer: &HashTrainer, weights: &[f64], batch: &Batch) -> f64 {
        let (d, r) = (trainer.head_dim, trainer.bits);
        let options = trainer.options;
        let code = |x: &[f32]| -> Vec<f64> {
            (0..r)
                .map(|bit| {
                    let z: f64 = (0..d).map(|j| f64::from(x[j]) * weights[j * r + bit]).sum();
                    2.0 / (1.0 + (-f64::from(options.sigma) * z).exp()) - 1.0
                })
                .collect()
        };
        let (queries, keys) = (batch.queries.len() / d, batch.keys.len() / d);
        let pairs = (queries * keys) as f64;
        let (mut similarity, mut mean) = (0.0, vec![0.0; r]);
        for query in 0..queries {
            for key in 0..keys {
                let (q, k) = (code(&batch.queries[query * d..][..d]), code(&batch.keys[key * d..][..d]));
                let distance: f64 = q.iter().zip(&k).map(|(q, k)| (q - k).powi(2)).sum();
                similarity += f64::from(batch.labels[query * keys + key]) * distance;
                mean.iter_mut()
                    .zip(q.iter().zip(&k))
                    .for_each(|(m, (q, k))| *m += (q + k) / (pairs * r as f64));
            }
        }
        let mut gram = 0.0;
        for a in 0..r {
            for b in 0..r {
                let dot: f64 = (0..d).map(|j| weights[j * r + a] * weights[j * r + b]).sum();
                gram += (dot - f64::from(u8::from(a == b))).powi(2);
            }
        }
        f64::from(options.similarity) / pairs * similarity
            + f64::from(options.balance) * mean.iter().map(|m| m * m).sum::<f64>()
            + f64::from(options.decorrelation) * gram.sqrt()
    }

    #[test]
    fn the_slopes_are_those_of_finite_differences() {
        let mut rng = Rng::new(1);
        // Each term alone, then all.
        for (similarity, balance, decorrelation) in
            [(1.0, 0.0, 0.0), (0.0, 50.0, 0.0), (0.0, 0.0, 1.0), (0.01, 1.0, 2.0)]
        {
            let options = TrainOptions { similarity, balance, decorrelation, ..TrainOptions::default() };
            let trainer = HashTrainer::new(5, 8, 3, options);
            let (queries, keys) = (rng.normal(2 * 5), rng.normal(12 * 5));
            let labels = trainer.labels(&queries, &keys);
            let batch = Batch { queries, keys, labels };
            let mut slopes = vec![0.0; 40];
            let loss = trainer.slopes(&batch, &mut slopes, &mut Work::default());
            let mut weights: Vec<f64> = trainer.weights.iter().map(|w| f64::from(*w)).collect();
            let expected = naive_loss(&trainer, &weights, &batch);
            assert!((f64::from(loss) - expected).abs() <= 1e-4 * expected.abs(), "{loss} is not {expected}");
            let largest = slopes.iter().fold(0.0_f32, |most, slope| most.max(slope.abs()));
            for at in 0..40 {
                const STEP: f64 = 1e-5;
                let weight = weights[at];
                let mut beside = |step: f64| {
                    weights[at] = weight + step;
                    naive_loss(&trainer, &weights, &batch)
                };
                let slope = (beside(STEP) - beside(-STEP)) / (2.0 * STEP);
                weights[at] = weight;
                let error = (f64::from(slopes[at]) - slope).abs();
                assert!(error <= 1e-3 * f64::from(largest), "weight {at}: {} is not {slope}", slopes[at]);
            }
        }
    }

    #[test]
    fn the_best_tenth_gets_twenty_falling_to_one() {
        let trainer = HashTrainer::new(1, 4, 0, TrainOptions::default());
        let keys: Vec<f32> = (0..30).map(|key| key as f32).collect();
        let labels = trainer.labels(&[1.0, -1.0], &keys);
        assert_eq!(labels[27..30], [1.0, 10.5, 20.0]);
        assert!(labels[..27].iter().all(|label| *label == -1.0));
        assert_eq!(labels[30..33], [20.0, 10.5, 1.0]);
        assert_eq!(trainer.labels(&[1.0], &[2.0]), [20.0]);
        assert!(trainer.labels(&[1.0], &[]).is_empty());
    }

    /// Keys with a few directions that queries look at, and others of more variance that they do not.
    fn data(rng: &mut Rng, count: usize, of: usize, loud: f32, quiet: f32) -> Vec<f32> {
        let mut rows = rng.normal(count * of);
        for row in rows.chunks_exact_mut(of) {
            let (seen, unseen) = row.split_at_mut(of / 4);
            seen.iter_mut().for_each(|value| *value *= loud);
            unseen.iter_mut().for_each(|value| *value *= quiet);
        }
        rows
    }

    /// Mean share of the true best `k` keys among the `k` nearest codes.
    fn recall(weights: &[f32], bits: usize, queries: &[f32], keys: &[f32], d: usize, k: usize) -> f64 {
        let kernels = Kernels::best();
        let code = |x: &[f32]| {
            let mut z = vec![0.0; bits];
            kernels.project(x, weights, &mut z);
            z.iter().map(|z| *z > 0.0).collect::<Vec<bool>>()
        };
        let best = |scores: Vec<f32>| {
            let mut order: Vec<usize> = (0..scores.len()).collect();
            order.sort_by(|a, b| scores[*b].total_cmp(&scores[*a]));
            order.truncate(k);
            order
        };
        let codes: Vec<Vec<bool>> = keys.chunks_exact(d).map(code).collect();
        let shares = queries.chunks_exact(d).map(|query| {
            let near = code(query);
            let agree = |key: &Vec<bool>| key.iter().zip(&near).filter(|(a, b)| a == b).count() as f32;
            let truth = best(keys.chunks_exact(d).map(|key| kernels.dot(query, key)).collect());
            let found = best(codes.iter().map(agree).collect());
            found.iter().filter(|key| truth.contains(key)).count() as f64 / k as f64
        });
        let queries = queries.len() / d;
        shares.sum::<f64>() / queries as f64
    }

    #[test]
    fn trained_codes_recall_more_of_the_true_best_keys_than_random_ones_and_repeat() {
        const D: usize = 16;
        const BITS: usize = 32;
        let mut rng = Rng::new(5);
        let options = TrainOptions { chunk: 400, ..TrainOptions::default() };
        let mut trainer = HashTrainer::new(D, BITS, 7, options);
        for _ in 0..8 {
            let (queries, keys) = (data(&mut rng, 4, D, 3.0, 0.1), data(&mut rng, 600, D, 2.0, 2.0));
            let labels = trainer.labels(&queries, &keys);
            trainer.batch(&queries, &keys, &labels);
        }
        let random = trainer.weights.clone();
        let mut losses = Vec::new();
        let trained = trainer.clone().train(|_, loss| losses.push(loss));
        assert_eq!(trained, trainer.train(|_, _| {}), "the same seed, the same weights");
        assert_eq!(losses.len(), 15);
        assert!(losses[14] < losses[0], "{losses:?}");
        let (queries, keys) = (data(&mut rng, 40, D, 3.0, 0.1), data(&mut rng, 600, D, 2.0, 2.0));
        let [random, trained] =
            [random, trained].map(|weights| recall(&weights, BITS, &queries, &keys, D, 60));
        assert!(trained > random + 0.05, "trained codes recall {trained}, random ones {random}");
    }

    #[test]
    fn the_artifact_names_its_tensor_and_its_bits() {
        let model = Fingerprint([3; 16]);
        let made = artifact(model, 2, 3, 4, vec![0.5; 2 * 3 * 4 * 8]).unwrap();
        assert_eq!(made.tensor("hash", &[2, 3, 4, 8]).unwrap().len(), 192);
        assert_eq!(made.setting("bits"), Some("8"));
        assert!(artifact(model, 2, 3, 4, vec![f32::NAN; 24]).is_err());
        assert!(artifact(model, 2, 3, 4, vec![1.0; 25]).is_err());
        let empty = HashTrainer::new(4, 8, 1, TrainOptions::default());
        assert_eq!(empty.weights.clone(), empty.train(|_, _| {}), "without data nothing is learnt");
    }
}
