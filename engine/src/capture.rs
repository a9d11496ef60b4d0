//! What attention saw while the model read a text: queries, keys and values, as plain arrays.

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;

use crate::decoder::{Decoder, DecoderOptions, Logits, PrefillOptions};
use crate::error::ForwardError;
use crate::kv::{DenseKv, Dtype, Format, KvBackend, KvShape, Observe, Observed};
use crate::model::Model;

/// What is captured.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct CaptureOptions {
    /// The text's last tokens that are decoded one by one, with their queries, true and predicted.
    pub steps: usize,
    /// Queries kept of the tokens before them.
    pub prompt_queries: usize,
    /// How keys and values are stored while the model reads, and so how they are rounded.
    pub format: Format,
}

impl Default for CaptureOptions {
    fn default() -> Self {
        Self { steps: 64, prompt_queries: 0, format: Format::Plain(Dtype::F16) }
    }
}

/// Queries, keys and values of one sequence, row-major; queries and keys are after RoPE.
#[derive(Debug, Clone, PartialEq)]
pub struct Capture {
    /// The model's KV.
    pub shape: KvShape,
    /// Tokens of the sequence, those of the steps among them, `n`.
    pub tokens: usize,
    /// Decode steps; step `s` is the decoding of token `n − steps + s`.
    pub steps: usize,
    /// Queries kept of the tokens before the first step's.
    pub prompt_queries: usize,
    /// True queries of the steps, `[layers][steps][Hq][d]`.
    pub q: Vec<f32>,
    /// The same as predicted one layer ahead, `[layers][steps][Hq][d]`; those of layer 0 are the true ones.
    pub hint: Vec<f32>,
    /// True queries of the last tokens before the steps, `[layers][prompt_queries][Hq][d]`.
    pub prompt_q: Vec<f32>,
    /// Keys as stored, `[layers][Hkv][n][d]`.
    pub k: Vec<f32>,
    /// Values as stored, `[layers][Hkv][n][d]`.
    pub v: Vec<f32>,
    /// How strong the boundary of the text after each token is, `[n]` ([`kvoyant_methods::mark`]).
    pub marks: Vec<u8>,
}

/// Writes queries into a [`Capture`].
struct Collector<'a> {
    capture: &'a mut Capture,
}

impl Collector<'_> {
    fn width(&self) -> usize {
        self.capture.shape.query_heads * self.capture.shape.head_dim
    }

    fn step_at(&self, layer: usize, position: usize) -> std::ops::Range<usize> {
        let (width, steps) = (self.width(), self.capture.steps);
        let at = (layer * steps + position - (self.capture.tokens - steps)) * width;
        at..at + width
    }
}

impl Observe for Collector<'_> {
    fn prompt(&mut self, layer: usize, start: usize, queries: &[f32], _keys: &[f32], _values: &[f32]) {
        let (width, kept) = (self.width(), self.capture.prompt_queries);
        let first = self.capture.tokens - self.capture.steps - kept;
        for (t, query) in queries.chunks_exact(width).enumerate() {
            if let Some(at) = (start + t).checked_sub(first).filter(|at| *at < kept) {
                self.capture.prompt_q[(layer * kept + at) * width..][..width].copy_from_slice(query);
            }
        }
    }

    fn wants_hints(&self) -> bool {
        true
    }

    fn hint(&mut self, layer: usize, positions: &[usize], queries: &[f32]) {
        let at = self.step_at(layer, positions[0]);
        self.capture.hint[at].copy_from_slice(queries);
    }

    fn step(&mut self, layer: usize, positions: &[usize], queries: &[f32]) {
        let at = self.step_at(layer, positions[0]);
        self.capture.q[at.clone()].copy_from_slice(queries);
        if layer == 0 {
            self.capture.hint[at].copy_from_slice(queries);
        }
    }
}

impl Capture {
    /// Lets the model read `tokens`: all but the last `steps` as a prompt, those one by one. `progress` is called with
    /// (tokens done, tokens in all) and may stop.
    ///
    /// There are fewer steps and prompt queries where there are not so many tokens: at least one token is the prompt.
    ///
    /// # Errors
    /// As [`Decoder::prefill`].
    ///
    /// # Panics
    /// Where [`KvShape::check`] refuses the format.
    pub fn take(
        model: &Arc<Model>,
        tokens: &[u32],
        options: CaptureOptions,
        progress: &mut dyn FnMut(usize, usize) -> ControlFlow<()>,
    ) -> Result<Self, ForwardError<Infallible>> {
        let shape = KvShape::new(model.config(), options.format);
        let n = tokens.len();
        let steps = options.steps.min(n.saturating_sub(1));
        let prompt_queries = options.prompt_queries.min(n - steps);
        let query_values = shape.layers * shape.query_heads * shape.head_dim;
        let row_values = shape.layers * shape.kv_heads * n * shape.head_dim;
        let mut capture = Self {
            tokens: n,
            steps,
            prompt_queries,
            q: vec![0.0; steps * query_values],
            hint: vec![0.0; steps * query_values],
            prompt_q: vec![0.0; prompt_queries * query_values],
            k: vec![0.0; row_values],
            v: vec![0.0; row_values],
            marks: model.tokenizer().marks(tokens),
            shape: shape.clone(),
        };
        let dense = DenseKv::new(shape.clone());
        let mut sequence = dense.sequence();
        let mut kv = Observed::new(dense, Collector { capture: &mut capture });
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        let (prompt, rest) = tokens.split_at(n - steps);
        let mut report = |done: usize, _: usize| progress(done, n);
        let options =
            PrefillOptions { logits: Logits::None, progress: Some(&mut report), ..PrefillOptions::default() };
        decoder.prefill(&mut kv, &mut sequence, prompt, options)?;
        for (done, token) in rest.iter().enumerate() {
            decoder.step(&mut kv, &mut [&mut sequence], &[*token])?;
            let done = prompt.len() + done + 1;
            if done < n && progress(done, n).is_break() {
                return Err(ForwardError::Interrupted { done, total: n });
            }
        }
        let layer_values = shape.kv_heads * n * shape.head_dim;
        let (mut k, mut v) = (vec![0.0; row_values], vec![0.0; row_values]);
        for (layer, (k, v)) in
            k.chunks_exact_mut(layer_values).zip(v.chunks_exact_mut(layer_values)).enumerate()
        {
            kv.read(layer, &sequence, 0..n, k, v)?;
        }
        (capture.k, capture.v) = (k, v);
        Ok(capture)
    }

    /// Keys of a layer and KV head, `[n][d]`.
    #[must_use]
    pub fn keys(&self, layer: usize, kv_head: usize) -> &[f32] {
        let values = self.tokens * self.shape.head_dim;
        &self.k[(layer * self.shape.kv_heads + kv_head) * values..][..values]
    }

    /// Queries of a prompt token of a layer, `[Hq][d]`; `index` counts from the first one that was kept.
    #[must_use]
    pub fn prompt_query(&self, layer: usize, index: usize) -> &[f32] {
        let width = self.shape.query_heads * self.shape.head_dim;
        &self.prompt_q[(layer * self.prompt_queries + index) * width..][..width]
    }
}
