//! Prefill: many tokens of one sequence, attended densely.

use std::ops::ControlFlow;

use rayon::prelude::*;

use super::causal::{Stored, attend_stored};
use super::{Decoder, PARALLEL_ROWS, logits, norm_rows};
use crate::error::ForwardError;
use crate::kv::KvBackend;
use crate::rope::RopeTable;
use crate::weights::Precision;

/// Rows of logits computed at a time when all are wanted: 32 × a vocabulary of 50,000 is 6 MB.
const LOGIT_ROWS: usize = 32;

/// How often rows that were lost on the way are computed again.
pub(crate) const REFILLS: usize = 8;

/// Which logits a prefill computes.
#[derive(Default)]
pub enum Logits<'a> {
    /// None; the result is empty.
    None,
    /// Those of the last token, `[vocabulary]`.
    #[default]
    Last,
    /// Those of every token, handed over as `(index in the prompt, [vocabulary])`; the last is the result too.
    Each(&'a mut dyn FnMut(usize, &[f32])),
}

impl std::fmt::Debug for Logits<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::None => "None",
            Self::Last => "Last",
            Self::Each(_) => "Each",
        })
    }
}

/// What a layer makes of a chunk of a prompt, before it attends.
#[derive(Debug, Clone, Copy)]
pub struct LayerSeen<'a> {
    /// The layer.
    pub layer: usize,
    /// The residual stream before the layer, `[T][hidden]`, not normalised.
    pub input: &'a [f32],
    /// Its queries before RoPE, `[T][Hq][d]`.
    pub queries: &'a [f32],
}

/// What a prefill computes and reports.
#[derive(Default)]
pub struct PrefillOptions<'a> {
    /// Logits wanted.
    pub logits: Logits<'a>,
    /// Called after every chunk with (tokens done, tokens in all); [`ControlFlow::Break`] stops there.
    pub progress: Option<&'a mut dyn FnMut(usize, usize) -> ControlFlow<()>>,
    /// Called for every chunk and layer, in order; from whichever of rayon's threads runs the pass.
    pub layers: Option<&'a mut (dyn FnMut(LayerSeen<'_>) + Send)>,
}

impl std::fmt::Debug for PrefillOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PrefillOptions").field("logits", &self.logits).finish_non_exhaustive()
    }
}

impl Decoder {
    /// Adds `tokens` to a sequence, attending densely over all that it has (but see
    /// [`DecoderOptions::sparse_prefill`](super::DecoderOptions)), and returns the last token's logits.
    ///
    /// # Errors
    /// No tokens, unknown tokens, more than the context holds, a progress callback that stopped, or the backend's own. What was
    /// committed before stays.
    pub fn prefill<B: KvBackend>(
        &mut self,
        backend: &mut B,
        sequence: &mut B::Sequence,
        tokens: &[u32],
        options: PrefillOptions<'_>,
    ) -> Result<Vec<f32>, ForwardError<B::Error>> {
        let begun = backend.tokens(sequence);
        self.read(backend, sequence, (tokens, begun), options)
    }

    /// Adds to a sequence what it lacks of `tokens`, which begin with those that it was made of, as [`Self::prefill`] does. What of the others
    /// is lost on the way, for its disk has lost it or its daemon died, is computed again too.
    ///
    /// # Errors
    /// As for [`Self::prefill`]; [`ForwardError::BatchMismatch`] if the sequence has them all.
    pub fn prefill_rest<B: KvBackend>(
        &mut self,
        backend: &mut B,
        sequence: &mut B::Sequence,
        tokens: &[u32],
        options: PrefillOptions<'_>,
    ) -> Result<Vec<f32>, ForwardError<B::Error>> {
        self.read(backend, sequence, (tokens, 0), options)
    }

    /// Reads on in `known`, the sequence's tokens from a position on.
    fn read<B: KvBackend>(
        &mut self,
        backend: &mut B,
        sequence: &mut B::Sequence,
        (known, base): (&[u32], usize),
        mut options: PrefillOptions<'_>,
    ) -> Result<Vec<f32>, ForwardError<B::Error>> {
        // What comes before was there when this began, and counts as no part of the prompt.
        let begun = backend.tokens(sequence).saturating_sub(base);
        if begun >= known.len() {
            return Err(ForwardError::BatchMismatch { sequences: 1, tokens: 0 });
        }
        self.check(known, base + known.len())?;
        let total = known.len() - begun;
        let (mut done, mut refilled) = (begun, 0);
        let mut last = Vec::new();
        let at_once = backend.chunk_tokens(self.options.chunk_tokens).max(1);
        while done < known.len() {
            let chunk = &known[done..(done + at_once).min(known.len())];
            let layers = &mut options.layers;
            if let Err(error) = rayon::scope(|_| self.prefill_chunk(backend, sequence, chunk, layers)) {
                // Rows that a disk has lost, or that only a daemon could read that is dead, are computed again.
                match backend.first_lost(sequence) {
                    Some(token) if token >= base && refilled < REFILLS => {
                        backend.forget_from(sequence, token)?;
                        done = token - base;
                        refilled += 1;
                        continue;
                    }
                    _ => return Err(error),
                }
            }
            let first = done;
            done += chunk.len();
            match &mut options.logits {
                Logits::None => {}
                Logits::Last if done < known.len() => {}
                Logits::Last => last = self.logits_of(chunk.len() - 1, 1),
                Logits::Each(take) => {
                    for row in (0..chunk.len()).step_by(LOGIT_ROWS) {
                        last = self.logits_of(row, LOGIT_ROWS.min(chunk.len() - row));
                        let rows = last.chunks_exact(self.model.config().vocabulary).enumerate();
                        rows.filter_map(|(i, logits)| Some(((first + row + i).checked_sub(begun)?, logits)))
                            .for_each(|(index, logits)| take(index, logits));
                    }
                    last.drain(..last.len() - self.model.config().vocabulary);
                }
            }
            let read = done.saturating_sub(begun);
            let stop = options.progress.as_mut().is_some_and(|report| report(read, total).is_break());
            if stop && done < known.len() {
                return Err(ForwardError::Interrupted { done: read, total });
            }
        }
        Ok(last)
    }

    /// Computes again what a sequence has lost: `tokens` are all those that it was made of. How many were computed; 0 if none were lost.
    ///
    /// # Errors
    /// As for [`Self::prefill`].
    pub fn refill<B: KvBackend>(
        &mut self,
        backend: &mut B,
        sequence: &mut B::Sequence,
        tokens: &[u32],
    ) -> Result<usize, ForwardError<B::Error>> {
        let committed = backend.tokens(sequence);
        let Some(lost) = backend.first_lost(sequence).filter(|lost| *lost < committed.min(tokens.len()))
        else {
            return Ok(0);
        };
        backend.forget_from(sequence, lost)?;
        let all = &tokens[..committed.min(tokens.len())];
        let options = PrefillOptions { logits: Logits::None, ..PrefillOptions::default() };
        self.prefill_rest(backend, sequence, all, options)?;
        Ok(all.len() - lost)
    }

    /// Logits of rows `first..first + rows` of the chunk whose residual stream is in the buffers.
    fn logits_of(&self, first: usize, rows: usize) -> Vec<f32> {
        let hidden = self.model.config().hidden_size;
        logits(&self.model, &self.buffers.x[first * hidden..(first + rows) * hidden], rows, Precision::F32)
    }

    fn prefill_chunk<B: KvBackend>(
        &mut self,
        backend: &mut B,
        sequence: &mut B::Sequence,
        tokens: &[u32],
        layers: &mut Option<&mut (dyn FnMut(LayerSeen<'_>) + Send)>,
    ) -> Result<(), ForwardError<B::Error>> {
        let model = &*self.model;
        let config = model.config();
        let sparse = self.options.sparse_prefill;
        let buffers = &mut self.buffers;
        let start = backend.tokens(sequence);
        let rows = tokens.len();
        if backend.wants_marks() {
            backend.mark_tokens(sequence, start, &model.tokenizer.marks(tokens))?;
        }
        let table = model.rope.table(start..start + rows);
        buffers.resize(model, rows);
        buffers.embed(model, tokens);
        for (layer, weights) in model.weights.layers.iter().enumerate() {
            norm_rows(model, &buffers.x, &weights.attention_norm, &mut buffers.normed);
            buffers.project(weights, rows, Precision::F32);
            if let Some(look) = layers {
                look(LayerSeen { layer, input: &buffers.x, queries: &buffers.q });
            }
            rotate_rows(&table, &mut buffers.q, config.query_width());
            rotate_rows(&table, &mut buffers.k, config.kv_width());

            backend.store(layer, sequence, start, &buffers.k, &buffers.v)?;
            backend.observe_queries(layer, sequence, start, &buffers.q)?;
            let selected = sparse
                && start > 0
                && backend.attend_chunk(layer, sequence, start, &buffers.q, &mut buffers.attended)?;
            if !selected {
                let chunk = Stored { layer, start, queries: &buffers.q };
                attend_stored(backend, sequence, chunk, &mut buffers.seen, &mut buffers.attended)?;
            }
            weights.output.forward(&buffers.attended, rows, &mut buffers.delta, Precision::F32);
            buffers.add_and_feed_forward(model, layer, rows, Precision::F32);
        }
        backend.commit(sequence, start + rows)?;
        Ok(())
    }
}

/// RoPE of every row: row `t` by the table's entry `t`.
pub(super) fn rotate_rows(table: &RopeTable, rows: &mut [f32], width: usize) {
    if rows.len() / width < PARALLEL_ROWS {
        rows.chunks_exact_mut(width).enumerate().for_each(|(t, row)| table.rotate(t, row));
    } else {
        rows.par_chunks_exact_mut(width).enumerate().for_each(|(t, row)| table.rotate(t, row));
    }
}
