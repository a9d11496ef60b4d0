//! Generated traces: attention with one known property each, from a seed.
//!
//! Keys are drawn from a few *topics* that the sequence goes through, queries look for the topic that is under way; what a
//! [`Kind`] adds is its own. The hint is the query with a relative error of [`Generator::hint_error`]. Values are noise, with a part that tells topics apart, so that missed rows show in
//! the output.

use kvoyant_kernels::{Kernels, SplitMix64};
use kvoyant_methods::{Dtype, Fingerprint};

use crate::trace::{Trace, TraceShape};

/// Tokens of a topic before another one begins.
const TOPIC_TOKENS: usize = 48;
/// Kinds of topics.
const TOPICS: usize = 12;
/// Share of the squared norm of a key that is its topic's; the rest is noise.
const TOPIC_SHARE: f32 = 0.6;
/// The score that a query has with keys of its topic, in logits.
const TOPIC_SCORE: f32 = 4.0;
/// Queries kept of the prompt: enough for column sums and for the 64 rows of attention-predictor.
const PROMPT_QUERIES: usize = 128;

/// What a generated trace shows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// The first tokens draw more than half of the attention, whatever the query.
    Sinks,
    /// Three channels of the keys are twenty times as large as the rest, and constant.
    Outliers,
    /// The query goes over from one topic to the next, so that which rows matter changes.
    Drift,
    /// Single rows far back, each wanted by some steps and by no other.
    Needles,
    /// The norms of keys are Pareto distributed and attention is spread: a small share of the rows is never enough.
    HeavyTails,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Sinks, Self::Outliers, Self::Drift, Self::Needles, Self::HeavyTails];

    /// Its name.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Sinks => "sinks",
            Self::Outliers => "outliers",
            Self::Drift => "drift",
            Self::Needles => "needles",
            Self::HeavyTails => "heavy-tails",
        }
    }
}

/// A trace to be made.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Generator {
    /// What it shows.
    pub kind: Kind,
    /// Names its numbers.
    pub seed: u64,
    /// Layers; all of them are selected for.
    pub layers: usize,
    /// Query heads.
    pub query_heads: usize,
    /// KV heads.
    pub kv_heads: usize,
    /// Values of a head.
    pub head_dim: usize,
    /// Tokens when the last step is over.
    pub tokens: usize,
    /// Decode steps.
    pub steps: usize,
    /// `‖hint − q‖ / ‖q‖`.
    pub hint_error: f32,
}

impl Generator {
    /// Two layers of two KV heads with four query heads each, d = 64; 2,048 tokens and 32 steps.
    #[must_use]
    pub fn new(kind: Kind, seed: u64) -> Self {
        Self {
            kind,
            seed,
            layers: 2,
            query_heads: 8,
            kv_heads: 2,
            head_dim: 64,
            tokens: 2048,
            steps: 32,
            hint_error: 0.258,
        }
    }

    /// Makes it.
    #[must_use]
    pub fn trace(&self) -> Trace {
        let prompt_queries = PROMPT_QUERIES.min(self.tokens - self.steps);
        let shape = TraceShape {
            layers: self.layers,
            query_heads: self.query_heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            tokens: self.tokens,
            steps: self.steps,
            prompt_queries,
            sinks: 4,
            window: 64,
            dense_layers: 0,
            dtype: Dtype::F16,
        };
        let mut trace = Trace {
            shape,
            fingerprint: Fingerprint([0; 16]),
            model: "generated".into(),
            source: format!("{}:{}", self.kind.name(), self.seed),
            q: Vec::new(),
            hint: Vec::new(),
            prompt_q: Vec::new(),
            k: Vec::new(),
            v: Vec::new(),
            marks: Vec::new(),
        };
        let mut random = SplitMix64::new(self.seed ^ ((self.kind as u64) << 32));
        for _ in 0..self.layers {
            let heads: Vec<Head> = (0..self.kv_heads).map(|_| Head::new(self, &mut random)).collect();
            heads.iter().for_each(|head| {
                trace.k.extend_from_slice(&head.keys);
                trace.v.extend_from_slice(&head.values);
            });
            let group = self.query_heads / self.kv_heads;
            let prompt = self.tokens - self.steps;
            for token in prompt - prompt_queries..self.tokens {
                for head in &heads {
                    for _ in 0..group {
                        let query = head.query(self, token, &mut random);
                        if token < prompt {
                            trace.prompt_q.extend_from_slice(&query);
                        } else {
                            trace.hint.extend(self.predicted(&query, &mut random));
                            trace.q.extend_from_slice(&query);
                        }
                    }
                }
            }
        }
        // As the storage has them, so that reading the file changes nothing.
        for values in [&mut trace.k, &mut trace.v] {
            let mut stored = vec![0; values.len() * shape.dtype.bytes()];
            Kernels::best().from_f32(shape.dtype, values, &mut stored);
            Kernels::best().to_f32(shape.dtype, &stored, values);
        }
        trace
    }

    /// The query with an error of the wanted norm.
    fn predicted(&self, query: &[f32], random: &mut SplitMix64) -> Vec<f32> {
        let error = unit(self.head_dim, random);
        let size = self.hint_error * norm(query);
        query.iter().zip(error).map(|(value, error)| value + size * error).collect()
    }
}

/// One KV head of one layer.
struct Head {
    topics: Vec<Vec<f32>>,
    /// Where sinks point to, in every query.
    bias: Vec<f32>,
    /// Rows that single steps want.
    needles: Vec<usize>,
    keys: Vec<f32>,
    values: Vec<f32>,
}

impl Head {
    fn new(generator: &Generator, random: &mut SplitMix64) -> Self {
        let (d, n) = (generator.head_dim, generator.tokens);
        let topics: Vec<Vec<f32>> = (0..TOPICS).map(|_| unit(d, random)).collect();
        let meanings: Vec<Vec<f32>> = (0..TOPICS).map(|_| unit(d, random)).collect();
        let mut head = Self {
            topics,
            bias: unit(d, random),
            needles: Vec::new(),
            keys: Vec::with_capacity(n * d),
            values: Vec::with_capacity(n * d),
        };
        let prompt = n - generator.steps;
        head.needles =
            (0..8).map(|at| prompt / 16 + at * prompt / 10 + random.below((prompt / 16).max(1))).collect();
        // A constant offset in three channels: every score moves alike, and every digest is wider for it.
        let loud: Vec<usize> = (0..3).map(|_| random.below(d)).collect();
        for token in 0..n {
            let topic = topic_of(token);
            let noise = unit(d, random);
            let mut key: Vec<f32> = head.topics[topic]
                .iter()
                .zip(&noise)
                .map(|(topic, noise)| {
                    (d as f32).sqrt() * (TOPIC_SHARE.sqrt() * topic + (1.0 - TOPIC_SHARE).sqrt() * noise)
                })
                .collect();
            match generator.kind {
                Kind::Sinks if token < 4 => {
                    key = head.bias.iter().map(|value| value * (d as f32).sqrt()).collect();
                }
                Kind::Outliers => {
                    for (at, &channel) in loud.iter().enumerate() {
                        key[channel] += 20.0 * if at % 2 == 0 { 1.0 } else { -1.0 };
                    }
                }
                Kind::Needles if head.needles.contains(&token) => {
                    key = unit(d, random).iter().map(|value| value * 2.0 * (d as f32).sqrt()).collect();
                }
                Kind::HeavyTails => {
                    // Pareto with exponent 2.5: some keys are many times as long as most.
                    let length = (1.0 - random.unit()).powf(-1.0 / 2.5) as f32;
                    key.iter_mut().zip(&noise).for_each(|(value, noise)| {
                        *value = (0.15 * *value + 0.6 * (d as f32).sqrt() * noise) * length.min(8.0);
                    });
                }
                _ => {}
            }
            head.keys.extend(key);
            let noise = unit(d, random);
            head.values
                .extend(meanings[topic].iter().zip(noise).map(|(topic, noise)| 2.0 * topic + noise * 3.0));
        }
        head
    }

    /// The query of one head for `token`: it scores [`TOPIC_SCORE`] with keys of its topic.
    fn query(&self, generator: &Generator, token: usize, random: &mut SplitMix64) -> Vec<f32> {
        let d = generator.head_dim;
        let prompt = generator.tokens - generator.steps;
        let noise = unit(d, random);
        // q·k/√d with ‖k‖ = √d along the topic is the query's length along it.
        let toward = |direction: &[f32], score: f32| -> Vec<f32> {
            direction.iter().zip(&noise).map(|(value, noise)| score * value + 0.4 * score * noise).collect()
        };
        match generator.kind {
            Kind::Sinks => {
                let topic = toward(&self.topics[topic_of(token)], 2.0);
                // Enough for four keys against all others: ln n and a margin.
                let sink = (generator.tokens as f32).ln() + 1.5;
                topic.iter().zip(&self.bias).map(|(value, bias)| value + sink * bias).collect()
            }
            Kind::Outliers | Kind::HeavyTails => toward(&self.topics[topic_of(token)], TOPIC_SCORE),
            Kind::Drift => {
                // From one topic to the next over the steps, in full once for every eight of them.
                let at = token.saturating_sub(prompt) as f32 / 8.0;
                let (from, part) = (at as usize % TOPICS, at.fract());
                let to = (from + 1) % TOPICS;
                let mixed: Vec<f32> = self.topics[from]
                    .iter()
                    .zip(&self.topics[to])
                    .map(|(a, b)| (1.0 - part) * a + part * b)
                    .collect();
                let length = norm(&mixed).max(f32::MIN_POSITIVE);
                let direction: Vec<f32> = mixed.iter().map(|value| value / length).collect();
                toward(&direction, 2.0 * TOPIC_SCORE)
            }
            Kind::Needles => {
                let needle = self.needles[(token % self.needles.len()).min(self.needles.len() - 1)];
                let key = &self.keys[needle * d..][..d];
                let length = norm(key).max(f32::MIN_POSITIVE);
                let direction: Vec<f32> = key.iter().map(|value| value / length).collect();
                // Twice √d long: the needle scores twice as much as a topic's key would.
                toward(&direction, 0.75 * (generator.tokens as f32).ln())
            }
        }
    }
}

fn topic_of(token: usize) -> usize {
    // Topics come back, in another order each time.
    let block = token / TOPIC_TOKENS;
    (block * 5 + block / TOPICS) % TOPICS
}

/// A direction, uniformly drawn.
fn unit(d: usize, random: &mut SplitMix64) -> Vec<f32> {
    let values: Vec<f32> = (0..d).map(|_| random.normal()).collect();
    let length = norm(&values).max(f32::MIN_POSITIVE);
    values.iter().map(|value| value / length).collect()
}

fn norm(values: &[f32]) -> f32 {
    values.iter().map(|value| value * value).sum::<f32>().sqrt()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::truth::{LayerTruth, mean_of_group};

    fn truths(kind: Kind) -> (Trace, Vec<LayerTruth>) {
        let generator = Generator { tokens: 1024, steps: 16, ..Generator::new(kind, 11) };
        let trace = generator.trace();
        trace.check().unwrap();
        let truths = (0..trace.shape.layers).map(|layer| LayerTruth::of(&trace, layer)).collect();
        (trace, truths)
    }

    /// Mean over all heads and steps of what `of` makes of the attention `[tokens]`.
    fn mean(truths: &[LayerTruth], of: impl Fn(&[f32]) -> f64) -> f64 {
        let all: Vec<f64> = truths
            .iter()
            .flat_map(|truth| truth.steps.iter())
            .flat_map(|step| step.probabilities.iter().map(|row| of(row)))
            .collect();
        all.iter().sum::<f64>() / all.len() as f64
    }

    fn top_share(row: &[f32], share: f64) -> f64 {
        let mut sorted = row.to_vec();
        sorted.sort_by(|a, b| b.total_cmp(a));
        sorted[..(row.len() as f64 * share) as usize].iter().map(|p| f64::from(*p)).sum()
    }

    #[test]
    fn sinks_draw_more_than_half_of_the_attention() {
        let (_, truths) = truths(Kind::Sinks);
        let share = mean(&truths, |row| row[..4].iter().map(|p| f64::from(*p)).sum());
        assert!(share > 0.5, "{share}");
    }

    #[test]
    fn outlier_channels_are_many_times_as_large_as_the_rest() {
        let (trace, _) = truths(Kind::Outliers);
        let (d, keys) = (trace.shape.head_dim, trace.keys(0, 0));
        let mut sizes: Vec<f32> = (0..d)
            .map(|channel| {
                keys.chunks(d).map(|key| key[channel].abs()).sum::<f32>() / trace.shape.tokens as f32
            })
            .collect();
        sizes.sort_by(f32::total_cmp);
        assert!(sizes[d - 1] > 8.0 * sizes[d / 2], "{sizes:?}");
    }

    #[test]
    fn under_drift_the_rows_that_matter_are_others_eight_steps_later() {
        let (trace, truths) = truths(Kind::Drift);
        let best = |step: usize| -> Vec<usize> {
            let row = mean_of_group(&truths[0].steps[step].probabilities[..4]);
            let mut order: Vec<usize> = (0..1000).collect();
            order.sort_by(|a, b| row[*b].total_cmp(&row[*a]));
            order.truncate(40);
            order
        };
        let common = |a: usize, b: usize| best(a).iter().filter(|t| best(b).contains(t)).count();
        assert!(common(0, 1) > 2 * common(0, 8), "{} {}", common(0, 1), common(0, 8));
        assert!(trace.shape.steps > 8);
    }

    #[test]
    fn each_step_wants_one_needle_far_back() {
        let (trace, truths) = truths(Kind::Needles);
        let prompt = trace.shape.prompt();
        for (at, step) in truths[0].steps.iter().enumerate() {
            let row = mean_of_group(&step.probabilities[..4]);
            let best = (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap();
            assert!(best < prompt - 64 && row[best] > 0.3, "step {at}: {best} with {}", row[best]);
        }
        let first = |step: usize| {
            let row = &truths[0].steps[step].probabilities[0];
            (0..row.len()).max_by(|a, b| row[*a].total_cmp(&row[*b])).unwrap()
        };
        assert_ne!(first(0), first(1));
    }

    #[test]
    fn heavy_tails_leave_much_of_the_attention_outside_any_small_share() {
        let (trace, heavy) = truths(Kind::HeavyTails);
        let share = mean(&heavy, |row| top_share(row, 0.06));
        assert!(share < 0.75, "{share}");
        let mut norms: Vec<f32> = trace.keys(0, 0).chunks(64).map(norm).collect();
        norms.sort_by(f32::total_cmp);
        assert!(norms[norms.len() - 5] > 3.0 * norms[norms.len() / 2], "the longest keys are not long");
    }

    #[test]
    fn hints_have_the_wanted_error_and_a_seed_its_own_numbers() {
        let (trace, _) = truths(Kind::Drift);
        let d = trace.shape.head_dim;
        for (hint, query) in trace.hint.chunks(d).zip(trace.q.chunks(d)) {
            let error: Vec<f32> = hint.iter().zip(query).map(|(a, b)| a - b).collect();
            assert!((norm(&error) / norm(query) - 0.258).abs() < 1e-3);
        }
        let made = |seed| Generator { tokens: 200, steps: 4, ..Generator::new(Kind::Drift, seed) }.trace();
        assert_eq!(made(1), made(1));
        assert_ne!(made(1).k, made(2).k);
    }
}
