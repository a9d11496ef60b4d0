//! Training on captured attention: the mean squared error of the next row, Adam (Kingma and Ba, ICLR'15), backpropagation by hand.
//!
//! Samples are cut into crops of some blocks: the network sees five blocks at a time, so that a crop teaches what a whole row
//! would. Rows and targets are taken times [`TrainOptions::gain`], which the head's weights and bias give back in the artifact: a
//! score stays the expected weight.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::artifact::{ArtifactKind, Tensor, TensorArtifact};
use crate::error::MethodError;
use crate::random::Draw;
use crate::shape::Fingerprint;

use super::BLOCK;
use super::network::{HISTORY, MIDDLE, Network, PARAMETERS, TAPS, TENSORS, WIDE, axpy};

/// How to train.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct TrainOptions {
    /// Step size of Adam.
    pub learning_rate: f32,
    /// Crops of a step.
    pub batch: usize,
    /// Blocks of a crop.
    pub crop: usize,
    /// Factor of the targets: attention weights of blocks are small, and so would be the errors.
    pub gain: f32,
}

impl Default for TrainOptions {
    fn default() -> Self {
        Self { learning_rate: 1e-3, batch: 16, crop: 32, gain: 16.0 }
    }
}

/// A crop: rows `[64][blocks]` and the row that came next.
#[derive(Debug, Clone)]
struct Crop {
    rows: Vec<f32>,
    target: Vec<f32>,
}

/// Sums over some crops.
#[derive(Debug, Clone, PartialEq)]
pub struct Gradient {
    /// Of the squared errors by each parameter.
    values: Vec<f32>,
    /// Of squared errors.
    error: f64,
    /// Blocks that were predicted.
    blocks: usize,
}

impl Gradient {
    /// Mean squared error of the crops.
    #[must_use]
    pub fn loss(&self) -> f64 {
        self.error / self.blocks.max(1) as f64
    }
}

/// What Adam keeps of one parameter.
#[derive(Debug, Clone, Copy, Default)]
struct Moments {
    first: f32,
    second: f32,
}

/// Trains a network; the same seed, samples and calls give the same network.
#[derive(Debug, Clone)]
pub struct Trainer {
    options: TrainOptions,
    network: Network,
    crops: Vec<Crop>,
    moments: Vec<Moments>,
    steps: i32,
    draw: Draw,
}

impl Trainer {
    /// A network with random weights (He et al., ICCV'15, uniform) and biases of 0.
    #[must_use]
    pub fn new(seed: u64, options: TrainOptions) -> Self {
        let mut draw = Draw::new(&[seed]);
        let mut values = vec![0.0; PARAMETERS];
        for (at, (_, shape)) in
            TENSORS.into_iter().enumerate().filter(|(_, (name, _))| name.ends_with("weight"))
        {
            let inputs: usize = if shape.len() == 1 { WIDE } else { shape[1..].iter().product() };
            let bound = (6.0 / inputs as f32).sqrt();
            for index in 0..shape.iter().product() {
                values[Network::place(at, index)] = draw.uniform() * bound;
            }
        }
        let options = TrainOptions { batch: options.batch.max(1), crop: options.crop.max(1), ..options };
        Self {
            options,
            network: Network::new(values),
            crops: Vec::new(),
            moments: vec![Moments::default(); PARAMETERS],
            steps: 0,
            draw,
        }
    }

    /// The network as it is, for rows and scores times [`TrainOptions::gain`].
    #[must_use]
    pub fn network(&self) -> &Network {
        &self.network
    }

    /// Takes in a sample: `history` `[64][blocks]`, the oldest row first, and the row after them, `[blocks]`.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`] where they do not fit together, or hold what is no number.
    pub fn sample(&mut self, history: &[f32], target: &[f32]) -> Result<(), MethodError> {
        let blocks = target.len();
        let bad = |reason: String| Err(MethodError::ArtifactFormat { reason });
        if blocks == 0 || history.len() != HISTORY * blocks {
            return bad(format!(
                "a sample of the predictor has {} values of {HISTORY} rows for a target of {blocks} blocks",
                history.len()
            ));
        }
        if !history.iter().chain(target).all(|value| value.is_finite()) {
            return bad("a sample of the predictor holds what is no number".into());
        }
        let (crop, gain) = (self.options.crop.min(blocks), self.options.gain);
        for start in (0..blocks).step_by(crop) {
            let columns = start.min(blocks - crop)..(start + crop).min(blocks);
            let cut = |row: &[f32]| row[columns.clone()].iter().map(|value| value * gain).collect::<Vec<_>>();
            let rows = history.chunks_exact(blocks).flat_map(cut).collect();
            self.crops.push(Crop { rows, target: cut(target) });
        }
        Ok(())
    }

    /// Crops that the samples were cut into; their ids are `0..crops()`.
    #[must_use]
    pub fn crops(&self) -> usize {
        self.crops.len()
    }

    /// All crops in a new order, in batches: one epoch for callers that spread [`Self::gradient`] over threads.
    #[must_use]
    pub fn batches(&mut self) -> Vec<Vec<usize>> {
        let mut order: Vec<usize> = (0..self.crops.len()).collect();
        for last in (1..order.len()).rev() {
            order.swap(last, self.draw.below(last as u64 + 1) as usize);
        }
        order.chunks(self.options.batch).map(<[usize]>::to_vec).collect()
    }

    /// Gradient of the crops of these ids, in this order.
    ///
    /// # Panics
    /// Where an id is none.
    #[must_use]
    pub fn gradient(&self, crops: &[usize]) -> Gradient {
        let mut gradient = Gradient { values: vec![0.0; PARAMETERS], error: 0.0, blocks: 0 };
        let mut pass = Pass::default();
        let mut of = Network::new(vec![0.0; PARAMETERS]);
        for crop in crops {
            let crop = &self.crops[*crop];
            gradient.error += pass.run(&self.network, &crop.rows, &crop.target, Some(&mut of));
            gradient.blocks += crop.target.len();
        }
        gradient.values.copy_from_slice(of.values());
        gradient
    }

    /// One step of Adam along the mean of the gradients, which together are a batch.
    pub fn apply(&mut self, gradients: &[Gradient]) {
        const KEEP_FIRST: f32 = 0.9;
        const KEEP_SECOND: f32 = 0.999;
        const LEAST: f32 = 1e-10;
        let blocks = gradients.iter().map(|gradient| gradient.blocks).sum::<usize>();
        if blocks == 0 {
            return;
        }
        self.steps += 1;
        let (bias_first, bias_second) =
            (1.0 - KEEP_FIRST.powi(self.steps), 1.0 - KEEP_SECOND.powi(self.steps));
        let values = self.network.values_mut();
        for (at, (value, moments)) in values.iter_mut().zip(&mut self.moments).enumerate() {
            let mean = gradients.iter().map(|gradient| gradient.values[at]).sum::<f32>() / blocks as f32;
            moments.first = KEEP_FIRST * moments.first + (1.0 - KEEP_FIRST) * mean;
            moments.second = KEEP_SECOND * moments.second + (1.0 - KEEP_SECOND) * mean * mean;
            let step = moments.first / bias_first / ((moments.second / bias_second).sqrt() + LEAST);
            *value -= self.options.learning_rate * step;
        }
    }

    /// Goes through all crops once, on this thread; `progress` hears how many of how many are done. Gives the mean squared error on
    /// the way, of values times [`TrainOptions::gain`].
    pub fn epoch(&mut self, progress: &mut dyn FnMut(usize, usize)) -> f64 {
        let (mut error, mut blocks, mut done) = (0.0, 0, 0);
        for batch in self.batches() {
            let gradient = self.gradient(&batch);
            error += gradient.error;
            blocks += gradient.blocks;
            done += batch.len();
            self.apply(&[gradient]);
            progress(done, self.crops.len());
        }
        error / blocks.max(1) as f64
    }

    /// The network for rows as they are.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`] where training came to values that are no numbers.
    pub fn finish(&self, model: Fingerprint) -> Result<TensorArtifact, MethodError> {
        let mut tensors = BTreeMap::new();
        for (at, (name, shape)) in TENSORS.into_iter().enumerate() {
            let gain = match name {
                // Rows come in without the gain: the first layer gives it, the head takes it back.
                "conv1.weight" => self.options.gain,
                "head.weight" | "head.bias" => 1.0 / self.options.gain,
                _ => 1.0,
            };
            let count = shape.iter().product();
            let values =
                (0..count).map(|index| self.network.values()[Network::place(at, index)] * gain).collect();
            tensors.insert(name.to_owned(), Tensor { shape: shape.to_vec(), values });
        }
        let settings = [("history", HISTORY), ("block", BLOCK), ("steps", self.steps as usize)];
        let settings = settings.into_iter().map(|(key, value)| (key.to_owned(), value.to_string())).collect();
        TensorArtifact::new(ArtifactKind::Predictor, model, tensors, settings)
    }
}

/// Buffers of one pass forward and back: `[64][blocks]` of channels.
#[derive(Debug, Default)]
struct Pass {
    middle: Vec<[f32; MIDDLE]>,
    wide: Vec<[f32; WIDE]>,
    middle_gradient: Vec<[f32; MIDDLE]>,
    scores: Vec<f32>,
}

/// Places around `at`, of `count`, that a tap of 0, 1 or 2 reaches.
fn around(at: usize, count: usize) -> Range<usize> {
    usize::from(at == 0)..if at + 1 == count { 2 } else { 3 }
}

/// Calls `visit` with tap and place for all places of an image around `(time, block)`.
fn taps(time: usize, block: usize, blocks: usize, mut visit: impl FnMut(usize, usize)) {
    for dt in around(time, HISTORY) {
        for dc in around(block, blocks) {
            visit(dt * 3 + dc, (time + dt - 1) * blocks + block + dc - 1);
        }
    }
}

impl Pass {
    /// Scores the blocks of `rows`, and adds the gradient of the squared errors to `gradient`. Gives their sum.
    fn run(
        &mut self,
        network: &Network,
        rows: &[f32],
        target: &[f32],
        gradient: Option<&mut Network>,
    ) -> f64 {
        let blocks = target.len();
        self.middle.clear();
        self.wide.clear();
        self.scores.clear();
        self.scores.resize(blocks, 0.0);
        for place in 0..rows.len() {
            let mut sums = *network.bias1();
            taps(place / blocks, place % blocks, blocks, |tap, at| {
                axpy(&mut sums, rows[at], &network.conv1()[tap]);
            });
            self.middle.push(sums.map(|sum| sum.max(0.0)));
        }
        for place in 0..rows.len() {
            let mut sums = *network.bias2();
            taps(place / blocks, place % blocks, blocks, |tap, at| {
                for (x, weights) in self.middle[at].iter().zip(&network.conv2()[tap * MIDDLE..]) {
                    if *x != 0.0 {
                        axpy(&mut sums, *x, weights);
                    }
                }
            });
            let wide = sums.map(|sum| sum.max(0.0));
            self.scores[place % blocks] +=
                wide.iter().zip(network.head()).map(|(x, head)| x * head).sum::<f32>();
            self.wide.push(wide);
        }
        for score in &mut self.scores {
            *score = *score / HISTORY as f32 + network.bias();
        }
        let error = |(score, target): (&f32, &f32)| f64::from(score - target).powi(2);
        let sum = self.scores.iter().zip(target).map(error).sum();
        if let Some(gradient) = gradient {
            self.back(network, rows, target, gradient.values_mut());
        }
        sum
    }

    fn back(&mut self, network: &Network, rows: &[f32], target: &[f32], gradient: &mut [f32]) {
        let blocks = target.len();
        let (conv1, rest) = gradient.split_at_mut(TAPS * MIDDLE);
        let (bias1, rest) = rest.split_at_mut(MIDDLE);
        let (conv2, rest) = rest.split_at_mut(TAPS * MIDDLE * WIDE);
        let (bias2, rest) = rest.split_at_mut(WIDE);
        let (head, bias) = rest.split_at_mut(WIDE);
        let (conv1, _) = conv1.as_chunks_mut::<MIDDLE>();
        let (conv2, _) = conv2.as_chunks_mut::<WIDE>();
        self.middle_gradient.clear();
        self.middle_gradient.resize(rows.len(), [0.0; MIDDLE]);
        for (score, target) in self.scores.iter().zip(target) {
            bias[0] += 2.0 * (score - target);
        }
        for (place, wide) in self.wide.iter().enumerate() {
            let slope = 2.0 * (self.scores[place % blocks] - target[place % blocks]) / HISTORY as f32;
            let mut of_sums = [0.0; WIDE];
            for channel in 0..WIDE {
                head[channel] += slope * wide[channel];
                if wide[channel] > 0.0 {
                    of_sums[channel] = slope * network.head()[channel];
                }
                bias2[channel] += of_sums[channel];
            }
            taps(place / blocks, place % blocks, blocks, |tap, at| {
                let weights = &network.conv2()[tap * MIDDLE..][..MIDDLE];
                for (channel, x) in self.middle[at].iter().enumerate() {
                    // A channel that the ReLU cut off takes no part in either gradient.
                    if *x != 0.0 {
                        axpy(&mut conv2[tap * MIDDLE + channel], *x, &of_sums);
                        self.middle_gradient[at][channel] += dot(&weights[channel], &of_sums);
                    }
                }
            });
        }
        for (place, of_sums) in self.middle_gradient.iter().enumerate() {
            bias1.iter_mut().zip(of_sums).for_each(|(bias, value)| *bias += value);
            taps(place / blocks, place % blocks, blocks, |tap, at| axpy(&mut conv1[tap], rows[at], of_sums));
        }
    }
}

/// In eight lanes, which compilers turn into vectors.
fn dot(a: &[f32; WIDE], b: &[f32; WIDE]) -> f32 {
    let mut lanes = [0.0_f32; 8];
    for (a, b) in a.as_chunks::<8>().0.iter().zip(b.as_chunks::<8>().0) {
        for lane in 0..8 {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    lanes.iter().sum()
}

#[cfg(test)]
impl Trainer {
    /// The error of one crop with one parameter moved by `by`.
    pub(super) fn error_with(&self, parameter: usize, by: f32, crop: usize) -> f64 {
        let mut network = self.network.clone();
        network.values_mut()[parameter] += by;
        let crop = &self.crops[crop];
        Pass::default().run(&network, &crop.rows, &crop.target, None)
    }

    pub(super) fn slope(&self, parameter: usize, crop: usize) -> f32 {
        self.gradient(&[crop]).values[parameter]
    }
}
