//! Where K and V live: the seam between the decoder and whatever keeps its cache.

mod attend;
mod daemon;
mod dense;
mod observed;
mod rows;

use std::ops::Range;

use kvoyant_kernels::RowLayout;

pub use daemon::{
    Certified, DaemonError, DaemonKv, DaemonOptions, DaemonSequence, Fallbacks, IdsRequest, Measured, Paged,
    Selects, StepStats,
};
pub use dense::{DenseKv, DenseSequence};
pub use kvoyant_kernels::Dtype;
pub use kvoyant_kernels::quantise::Format;
pub use observed::{Observe, Observed};
pub use rows::HeadRows;

use crate::config::ModelConfig;

/// Keeps K and V of sequences and attends over them.
///
/// The decoder calls, for every prefill chunk and layer, [`store`](Self::store),
/// [`observe_queries`](Self::observe_queries), [`read`](Self::read) (or [`attend_chunk`](Self::attend_chunk) alone), then
/// [`commit`](Self::commit) once; and for every decode step [`begin_step`](Self::begin_step), then per layer `l` in this order
/// [`hint`](Self::hint) for layer `l + 1`, [`append`](Self::append), [`attend`](Self::attend), and at last `commit` for
/// each sequence and [`end_step`](Self::end_step). So a hint is out for the whole of the layer before its own.
///
/// A step that fails leaves each sequence at its committed length; the next `store` or `append` at that position
/// overwrites what the failed one left behind.
///
/// Shapes: `Hq` query heads, `Hkv` KV heads, `d` values per head, all f32, row-major; K is after RoPE.
///
/// Calls come one at a time, but from whichever of rayon's threads runs the pass: hence `Send`.
pub trait KvBackend: Send {
    /// One sequence's cache.
    type Sequence: Send;
    /// What can go wrong.
    type Error: std::error::Error + Send + Sync + 'static;

    /// The shape of the caches that it keeps.
    fn shape(&self) -> &KvShape;

    /// Tokens that are committed.
    fn tokens(&self, sequence: &Self::Sequence) -> usize;

    /// Takes rows of tokens `start..start + T` of one layer during prefill: `k` and `v` are `[T][Hkv][d]`.
    fn store(
        &mut self,
        layer: usize,
        sequence: &mut Self::Sequence,
        start: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), Self::Error>;

    /// Gives rows of `tokens` back, as rounded by the storage type, for the dense attention of a prefill: `k` and `v`
    /// are `[Hkv][tokens][d]`.
    fn read(
        &mut self,
        layer: usize,
        sequence: &Self::Sequence,
        tokens: Range<usize>,
        k: &mut [f32],
        v: &mut [f32],
    ) -> Result<(), Self::Error>;

    /// Shows the queries of tokens `start..start + T` during prefill, `[T][Hq][d]`, after RoPE.
    fn observe_queries(
        &mut self,
        _layer: usize,
        _sequence: &mut Self::Sequence,
        _start: usize,
        _queries: &[f32],
    ) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Tokens of a prompt to compute at once, of at most so many.
    fn chunk_tokens(&self, most: usize) -> usize {
        most
    }

    /// The first token whose rows are lost, if any are: it and those after it have to be computed again.
    fn first_lost(&self, _sequence: &Self::Sequence) -> Option<usize> {
        None
    }

    /// Drops the rows of tokens from `tokens` on, lost ones among them.
    fn forget_from(&mut self, _sequence: &mut Self::Sequence, _tokens: usize) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Whether [`mark_tokens`](Self::mark_tokens) is wanted.
    fn wants_marks(&self) -> bool {
        false
    }

    /// Says how strong the boundary of the text after each of the tokens from `start` on is
    /// ([`kvoyant_methods::mark`]), before their rows come.
    fn mark_tokens(
        &mut self,
        _sequence: &mut Self::Sequence,
        _start: usize,
        _marks: &[u8],
    ) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Sparse prefill: attention of tokens `start..start + T` over rows that the backend selects for them among the tokens
    /// before `start`, and over one another, causally. `queries` and `out` are `[T][Hq][d]`; the chunk's own rows have been
    /// [stored](Self::store). False where the backend selects nothing for that layer or sequence: then the chunk attends
    /// densely.
    fn attend_chunk(
        &mut self,
        _layer: usize,
        _sequence: &mut Self::Sequence,
        _start: usize,
        _queries: &[f32],
        _out: &mut [f32],
    ) -> Result<bool, Self::Error> {
        Ok(false)
    }

    /// The sequence now has `tokens` tokens in every layer.
    fn commit(&mut self, sequence: &mut Self::Sequence, tokens: usize) -> Result<(), Self::Error>;

    /// A decode step begins: sequence `i` gets a token at `positions[i]`.
    fn begin_step(
        &mut self,
        _batch: &mut [&mut Self::Sequence],
        _positions: &[usize],
    ) -> Result<(), Self::Error> {
        Ok(())
    }

    /// Whether [`hint`](Self::hint) is wanted for `layer`; never asked for layer 0.
    fn wants_hint(&self, _layer: usize) -> bool {
        false
    }

    /// Predicted queries of `layer`, `[batch][Hq][d]`, after RoPE at the true positions, while layer `layer - 1` has
    /// not begun (InfiniGen's speculation, Lee et al. 2024).
    fn hint(
        &mut self,
        _layer: usize,
        _batch: &mut [&mut Self::Sequence],
        _positions: &[usize],
        _queries: &[f32],
    ) -> Result<(), Self::Error> {
        Ok(())
    }

    /// The new token's rows: `k` and `v` are `[batch][Hkv][d]`.
    fn append(
        &mut self,
        layer: usize,
        batch: &mut [&mut Self::Sequence],
        positions: &[usize],
        k: &[f32],
        v: &[f32],
    ) -> Result<(), Self::Error>;

    /// Attention of the new tokens, themselves included: `queries` and `out` are `[batch][Hq][d]`; scores are scaled
    /// by `1/√d`.
    fn attend(
        &mut self,
        layer: usize,
        batch: &mut [&mut Self::Sequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<(), Self::Error>;

    /// A decode step is over, and committed.
    fn end_step(&mut self, _batch: &mut [&mut Self::Sequence]) -> Result<(), Self::Error> {
        Ok(())
    }
}

/// What a place for K and V must know of a model.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KvShape {
    /// Decoder layers.
    pub layers: usize,
    /// Query heads per layer.
    pub query_heads: usize,
    /// KV heads per layer.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Per layer: how many tokens attention reaches back, the current one included.
    pub sliding_window: Vec<Option<usize>>,
    /// How K and V are stored.
    pub format: Format,
}

/// Heads whose rows a format cannot store.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("there are no rows of {head_dim} values as {format}: choose another format, such as f16")]
pub struct FormatError {
    /// Values per head.
    pub head_dim: usize,
    /// The format.
    pub format: Format,
}

impl KvShape {
    /// Shape of a model's cache.
    pub fn new(config: &ModelConfig, format: impl Into<Format>) -> Self {
        Self {
            layers: config.layers,
            query_heads: config.query_heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            sliding_window: config.sliding_window.clone(),
            format: format.into(),
        }
    }

    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Whether the format can store such heads.
    ///
    /// # Errors
    /// [`FormatError`], if it cannot.
    pub fn check(&self) -> Result<(), FormatError> {
        let error = FormatError { head_dim: self.head_dim, format: self.format };
        self.layout().row_bytes().map(drop).ok_or(error)
    }

    /// What a row is made of.
    pub fn layout(&self) -> RowLayout {
        RowLayout::KeyValue { d: self.head_dim, format: self.format }
    }

    /// Bytes of one row, `[k(d) | v(d)]`; 0 for a shape that [`Self::check`] refuses.
    pub fn row_bytes(&self) -> usize {
        self.layout().row_bytes().unwrap_or(0)
    }

    /// Bytes of one token in all layers and heads.
    pub fn token_bytes(&self) -> usize {
        self.layers * self.kv_heads * self.row_bytes()
    }

    /// First token that position `position` attends to in `layer`.
    pub fn first_visible(&self, layer: usize, position: usize) -> usize {
        self.sliding_window[layer].map_or(0, |window| (position + 1).saturating_sub(window))
    }
}
