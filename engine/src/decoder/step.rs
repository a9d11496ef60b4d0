//! Decode: one token each of a batch of sequences.

use std::time::{Duration, Instant};

use super::prefill::rotate_rows;
use super::{Decoder, HintNorm, StepTiming, logits, norm_rows};
use crate::awake::awake;
use crate::error::ForwardError;
use crate::kv::KvBackend;
use crate::weights::Precision;

/// What a decode step gives.
#[derive(Debug, Clone, Default)]
pub struct StepOutput {
    /// `[batch][vocabulary]`.
    pub logits: Vec<f32>,
    /// Where the time went.
    pub timing: StepTiming,
}

impl StepOutput {
    /// Logits of sequence `index` of a batch of `batch`.
    pub fn of(&self, index: usize, batch: usize) -> &[f32] {
        let vocabulary = self.logits.len() / batch;
        &self.logits[index * vocabulary..(index + 1) * vocabulary]
    }
}

/// Time since the last lap.
struct Stopwatch(Instant);

impl Stopwatch {
    fn lap(&mut self) -> Duration {
        let now = Instant::now();
        now - std::mem::replace(&mut self.0, now)
    }
}

impl Decoder {
    /// Appends `tokens[i]` to sequence `i` and returns every sequence's next logits. Sequences may differ in length, and the batch
    /// from step to step.
    ///
    /// # Errors
    /// Not one token per sequence, unknown tokens, a full context, or the backend's own; no sequence is longer then.
    pub fn step<B: KvBackend>(
        &mut self,
        backend: &mut B,
        batch: &mut [&mut B::Sequence],
        tokens: &[u32],
    ) -> Result<StepOutput, ForwardError<B::Error>> {
        if batch.len() != tokens.len() || batch.is_empty() {
            return Err(ForwardError::BatchMismatch { sequences: batch.len(), tokens: tokens.len() });
        }
        let positions: Vec<usize> = batch.iter().map(|sequence| backend.tokens(sequence)).collect();
        self.check(tokens, positions.iter().max().map_or(0, |longest| longest + 1))?;

        // On one of rayon's own threads a product begins at once, and another thread joins in when it can.
        awake(|| self.step_here(backend, batch, tokens, &positions))
    }

    fn step_here<B: KvBackend>(
        &mut self,
        backend: &mut B,
        batch: &mut [&mut B::Sequence],
        tokens: &[u32],
        positions: &[usize],
    ) -> Result<StepOutput, ForwardError<B::Error>> {
        let begin = Instant::now();
        let mut watch = Stopwatch(begin);
        let mut timing = StepTiming::default();
        let model = &*self.model;
        let config = model.config();
        let buffers = &mut self.buffers;
        let rows = tokens.len();
        let table = model.rope.table(positions.iter().copied());
        buffers.resize(model, rows);
        buffers.embed(model, tokens);
        if backend.wants_marks() {
            for ((sequence, position), token) in batch.iter_mut().zip(positions).zip(tokens) {
                backend.mark_tokens(sequence, *position, &model.tokenizer.marks(&[*token]))?;
            }
        }
        backend.begin_step(batch, positions)?;
        for (layer, weights) in model.weights.layers.iter().enumerate() {
            // The next layer's hint goes first, so that it has the whole of this layer to be answered.
            let next = layer + 1;
            if next < config.layers && backend.wants_hint(next) {
                timing.linear += watch.lap();
                let ahead = &model.weights.layers[next];
                let (norm, query) = match &self.options.hint_norm {
                    HintNorm::Own => (&ahead.attention_norm, &ahead.query),
                    HintNorm::Previous => (&weights.attention_norm, &ahead.query),
                    HintNorm::Learned(learned) => (&ahead.attention_norm, learned.query(next)),
                };
                norm_rows(model, &buffers.x, norm, &mut buffers.normed);
                query.forward(&buffers.normed, rows, &mut buffers.hint, Precision::Fast);
                rotate_rows(&table, &mut buffers.hint, config.query_width());
                backend.hint(next, batch, positions, &buffers.hint)?;
                timing.hint += watch.lap();
            }
            norm_rows(model, &buffers.x, &weights.attention_norm, &mut buffers.normed);
            buffers.project(weights, rows, Precision::Fast);
            rotate_rows(&table, &mut buffers.q, config.query_width());
            rotate_rows(&table, &mut buffers.k, config.kv_width());
            timing.linear += watch.lap();

            backend.append(layer, batch, positions, &buffers.k, &buffers.v)?;
            timing.append += watch.lap();
            backend.attend(layer, batch, positions, &buffers.q, &mut buffers.attended)?;
            timing.attend += watch.lap();

            weights.output.forward(&buffers.attended, rows, &mut buffers.delta, Precision::Fast);
            buffers.add_and_feed_forward(model, layer, rows, Precision::Fast);
        }
        for (sequence, position) in batch.iter_mut().zip(positions) {
            backend.commit(sequence, position + 1)?;
        }
        backend.end_step(batch)?;
        let logits = logits(model, &buffers.x, rows, Precision::Fast);
        timing.linear += watch.lap();
        timing.total = begin.elapsed();
        Ok(StepOutput { logits, timing })
    }
}
