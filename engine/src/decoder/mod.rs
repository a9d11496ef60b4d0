//! The forward pass: dense prefill in chunks, and decode steps over a batch of sequences.

pub(crate) mod causal;
mod hint;
mod prefill;
mod step;

use std::sync::Arc;
use std::time::Duration;

use kvoyant_kernels::Kernels;
use rayon::prelude::*;

pub use hint::{HintNorm, LearnedHints};
pub(crate) use prefill::REFILLS;
pub use prefill::{LayerSeen, Logits, PrefillOptions};
pub use step::StepOutput;

use crate::error::ForwardError;
use crate::model::Model;
use crate::weights::{LayerWeights, Precision, forward_all};

/// Tokens of one prefill chunk: large enough for the GEMMs to be near their best, small enough for the scores of a block to stay in
/// cache (see `examples/prefill_speed.rs`).
const DEFAULT_CHUNK_TOKENS: usize = 512;

/// How a decoder works.
#[derive(Debug, Clone)]
pub struct DecoderOptions {
    /// How hints are made. Learned ones must be of the decoder's model.
    pub hint_norm: HintNorm,
    /// Tokens that a prefill takes at a time; at least 1.
    pub chunk_tokens: usize,
    /// Chunks of a prompt beyond its first attend over rows that the backend selects for them
    /// ([`KvBackend::attend_chunk`](crate::KvBackend::attend_chunk)), where it does; chunks should be small then.
    pub sparse_prefill: bool,
}

impl Default for DecoderOptions {
    fn default() -> Self {
        Self { hint_norm: HintNorm::default(), chunk_tokens: DEFAULT_CHUNK_TOKENS, sparse_prefill: false }
    }
}

/// Where the time of a decode step went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StepTiming {
    /// The whole step.
    pub total: Duration,
    /// Linear layers, norms and RoPE, without those of the hints.
    pub linear: Duration,
    /// Computing and sending hints.
    pub hint: Duration,
    /// Writing the new rows.
    pub append: Duration,
    /// Attention, waiting for rows included.
    pub attend: Duration,
}

impl std::ops::AddAssign for StepTiming {
    fn add_assign(&mut self, other: Self) {
        self.total += other.total;
        self.linear += other.linear;
        self.hint += other.hint;
        self.append += other.append;
        self.attend += other.attend;
    }
}

/// Runs one model; holds the memory that a pass needs.
#[derive(Debug)]
pub struct Decoder {
    model: Arc<Model>,
    options: DecoderOptions,
    buffers: Buffers,
}

impl Decoder {
    /// A decoder with its own buffers.
    pub fn new(model: Arc<Model>, options: DecoderOptions) -> Self {
        let options = DecoderOptions { chunk_tokens: options.chunk_tokens.max(1), ..options };
        Self { model, options, buffers: Buffers::default() }
    }

    /// The model that it runs.
    pub fn model(&self) -> &Arc<Model> {
        &self.model
    }

    /// How it works.
    pub fn options(&self) -> &DecoderOptions {
        &self.options
    }

    /// Makes hints that way from the next step on. Learned ones must be of the decoder's model.
    pub fn set_hint_norm(&mut self, hint_norm: HintNorm) {
        self.options.hint_norm = hint_norm;
    }

    /// Refuses tokens that the embedding does not have and lengths that the model has no positions for.
    fn check<E: std::error::Error + 'static>(
        &self,
        tokens: &[u32],
        length: usize,
    ) -> Result<(), ForwardError<E>> {
        let config = self.model.config();
        if length > config.context_tokens {
            return Err(ForwardError::ContextExceeded { tokens: length, context: config.context_tokens });
        }
        match tokens.iter().find(|&&token| token as usize >= config.vocabulary) {
            Some(&token) => Err(ForwardError::TokenOutOfVocabulary { token, vocabulary: config.vocabulary }),
            None => Ok(()),
        }
    }
}

/// Activations of one pass over `rows` tokens, `[rows][width]` each.
#[derive(Debug, Default)]
struct Buffers {
    /// Residual stream.
    x: Vec<f32>,
    /// After a norm.
    normed: Vec<f32>,
    q: Vec<f32>,
    k: Vec<f32>,
    v: Vec<f32>,
    /// Predicted queries of the next layer.
    hint: Vec<f32>,
    attended: Vec<f32>,
    /// What a block adds to the residual stream.
    delta: Vec<f32>,
    gate: Vec<f32>,
    up: Vec<f32>,
    /// Rows of a layer that a chunk attends to.
    seen: causal::Seen,
}

impl Buffers {
    /// Makes room for `rows` tokens.
    fn resize(&mut self, model: &Model, rows: usize) {
        let config = model.config();
        let widths = [
            (&mut self.x, config.hidden_size),
            (&mut self.normed, config.hidden_size),
            (&mut self.delta, config.hidden_size),
            (&mut self.q, config.query_width()),
            (&mut self.hint, config.query_width()),
            (&mut self.attended, config.query_width()),
            (&mut self.k, config.kv_width()),
            (&mut self.v, config.kv_width()),
            (&mut self.gate, config.intermediate_size),
            (&mut self.up, config.intermediate_size),
        ];
        for (buffer, width) in widths {
            buffer.resize(rows * width, 0.0);
        }
    }

    /// The residual stream begins as the tokens' embeddings.
    fn embed(&mut self, model: &Model, tokens: &[u32]) {
        let hidden = model.config.hidden_size;
        for (row, &token) in self.x.chunks_exact_mut(hidden).zip(tokens) {
            row.copy_from_slice(&model.weights.embedding[token as usize * hidden..][..hidden]);
        }
    }

    /// Queries, keys and values of what is normed.
    fn project(&mut self, weights: &LayerWeights, rows: usize, precision: Precision) {
        let all = [
            (&weights.query, &mut self.q[..]),
            (&weights.key, &mut self.k[..]),
            (&weights.value, &mut self.v[..]),
        ];
        forward_all(all, &self.normed, rows, precision);
    }

    /// The feed-forward of a layer and both of its additions: `x += delta; x += mlp(norm(x))`.
    fn add_and_feed_forward(&mut self, model: &Model, layer: usize, rows: usize, precision: Precision) {
        let weights = &model.weights.layers[layer];
        let config = &model.config;
        let kernels = Kernels::best();
        for_rows(&mut self.x, config.hidden_size, &self.delta, |x, delta| kernels.add(x, delta));
        norm_rows(model, &self.x, &weights.mlp_norm, &mut self.normed);
        let both = [(&weights.gate, &mut self.gate[..]), (&weights.up, &mut self.up[..])];
        forward_all(both, &self.normed, rows, precision);
        for_rows(&mut self.gate, config.intermediate_size, &self.up, |gate, up| kernels.silu_mul(gate, up));
        weights.down.forward(&self.gate, rows, &mut self.delta, precision);
        for_rows(&mut self.x, config.hidden_size, &self.delta, |x, delta| kernels.add(x, delta));
    }
}

/// Rows from which elementwise work is spread over threads.
const PARALLEL_ROWS: usize = 64;

/// `f(a[r], b[r])` for every row of two arrays of one shape.
fn for_rows(a: &mut [f32], width: usize, b: &[f32], f: impl Fn(&mut [f32], &[f32]) + Sync) {
    if a.len() / width < PARALLEL_ROWS {
        a.chunks_exact_mut(width).zip(b.chunks_exact(width)).for_each(|(a, b)| f(a, b));
    } else {
        a.par_chunks_exact_mut(width).zip(b.par_chunks_exact(width)).for_each(|(a, b)| f(a, b));
    }
}

/// RMS norm of every row.
fn norm_rows(model: &Model, x: &[f32], weight: &[f32], out: &mut [f32]) {
    let kernels = Kernels::best();
    let eps = model.config.rms_norm_eps;
    for_rows(out, model.config.hidden_size, x, |out, x| kernels.rms_norm(x, weight, eps, out));
}

/// Final norm and output matrix of `rows` rows of the residual stream.
fn logits(model: &Model, x: &[f32], rows: usize, precision: Precision) -> Vec<f32> {
    let mut normed = vec![0.0; x.len()];
    norm_rows(model, x, &model.weights.final_norm, &mut normed);
    let mut logits = vec![0.0; rows * model.config.vocabulary];
    model.weights.head.forward(&normed, rows, &mut logits, precision);
    logits
}
