//! The engine's attention behind candle's tensors: for models written with candle, which keep the rest of their code.
//!
//! A candle model attends in one place of each layer, with `q`, `k` and `v` of the new tokens at hand. There it calls [`KvPass::attend`]
//! instead of concatenating a cache of its own; K and V then live in whatever [`KvBackend`] keeps them, the daemon
//! ([`DaemonKv`](crate::DaemonKv)) or this process ([`DenseKv`](crate::DenseKv)).
//!
//! A pass is one forward of a model over a batch of sequences: many tokens of a prompt ([`KvPass::prefill`]) or one token each
//! ([`KvPass::step`]). Each layer attends once, in order; the tokens count after [`KvPass::finish`]. A pass that is dropped before
//! leaves every sequence as long as it was.
//!
//! ```
//! use candle_core::{DType, Device, Tensor};
//! use kvoyant_engine::candle::KvPass;
//! use kvoyant_engine::{DenseKv, Dtype, KvBackend, KvShape};
//!
//! let shape = KvShape {
//!     layers: 2,
//!     query_heads: 4,
//!     kv_heads: 2,
//!     head_dim: 32,
//!     sliding_window: vec![None; 2],
//!     format: Dtype::F16.into(),
//! };
//! let mut kv = DenseKv::new(shape);
//! let mut sequence = kv.sequence();
//! let of = |heads: usize, tokens: usize| Tensor::randn(0f32, 1.0, (1, heads, tokens, 32), &Device::Cpu);
//!
//! let mut pass = KvPass::prefill(&mut kv, [&mut sequence], 10)?;
//! for layer in 0..2 {
//!     let attended = pass.attend(layer, &of(4, 10)?, &of(2, 10)?, &of(2, 10)?)?;
//!     assert_eq!(attended.dims(), [1, 4, 10, 32]);
//! }
//! pass.finish()?;
//! assert_eq!(kv.tokens(&sequence), 10);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

use candle_core::{DType, Device, Tensor};

use crate::decoder::causal::{Seen, Stored, attend_stored};
use crate::kv::KvBackend;

/// Why a pass failed; `E` is the backend's own error. It becomes a [`candle_core::Error`] by `?`, so that a model's forward passes it on.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PassError<E: std::error::Error + Send + Sync + 'static> {
    /// A pass over nothing.
    #[error("a pass over {sequences} sequences with {tokens} tokens each: it needs one of each at least")]
    Empty {
        /// Sequences of the batch.
        sequences: usize,
        /// New tokens of each.
        tokens: usize,
    },
    /// A layer out of turn.
    #[error(
        "layer {found} attends where layer {expected} of {layers} should: each layer attends once in a pass, in order"
    )]
    Order {
        /// The layer whose turn it is; `layers` where all have attended.
        expected: usize,
        /// The layer that came.
        found: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A hint for a layer that none can be made for.
    #[error(
        "a hint for layer {found} while layer {next} of {layers} is next: hints are for the layer after the one that attends next, in a step"
    )]
    Hint {
        /// The layer of the hint.
        found: usize,
        /// The layer that attends next.
        next: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A pass that ends too early.
    #[error("{attended} of {layers} layers have attended: finish a pass after the last")]
    Unfinished {
        /// Layers that have attended.
        attended: usize,
        /// Layers of the model.
        layers: usize,
    },
    /// A tensor of another shape.
    #[error(
        "{tensor} has shape {found:?}, and [batch, heads, tokens, head_dim] is {expected:?}: pass K and V as projected, not repeated for the query heads"
    )]
    Shape {
        /// `q`, `k` or `v`.
        tensor: &'static str,
        /// What the pass and the backend's shape make it.
        expected: [usize; 4],
        /// What came.
        found: Vec<usize>,
    },
    /// A tensor of another type.
    #[error("{tensor} is {found:?}: convert it to F32, F16 or BF16 (Tensor::to_dtype)")]
    Dtype {
        /// `q`, `k` or `v`.
        tensor: &'static str,
        /// Its type.
        found: DType,
    },
    /// A tensor in another memory.
    #[error("{tensor} lies on a GPU, and this attention runs on the CPU: move it first (Tensor::to_device)")]
    Device {
        /// `q`, `k` or `v`.
        tensor: &'static str,
    },
    /// Candle's own error.
    #[error(transparent)]
    Candle(#[from] candle_core::Error),
    /// The backend's own error.
    #[error("the KV cache failed: {0}")]
    Backend(#[source] E),
}

impl<E: std::error::Error + Send + Sync + 'static> From<PassError<E>> for candle_core::Error {
    fn from(error: PassError<E>) -> Self {
        match error {
            PassError::Candle(error) => error,
            error => Self::wrap(error),
        }
    }
}

/// One forward of a model over a batch. See the [module](self).
///
/// Tensors are `[batch, heads, tokens, head_dim]`, on the CPU, F32, F16 or BF16, contiguous or not; K after RoPE, K and V as
/// projected and not repeated for their groups of query heads. Scores are scaled by `1/√head_dim`. RoPE may pair values in either
/// of the two customary ways, so long as it is the same for queries and keys.
#[derive(Debug)]
pub struct KvPass<'a, B: KvBackend> {
    backend: &'a mut B,
    batch: Vec<&'a mut B::Sequence>,
    /// Length of each sequence before.
    positions: Vec<usize>,
    tokens: usize,
    /// Whether it is a step of a decode.
    step: bool,
    /// The layer that attends next.
    next: usize,
    seen: Seen,
}

impl<'a, B: KvBackend> KvPass<'a, B> {
    /// Begins to add `tokens` tokens of a prompt to each sequence; each attends to all that the sequence has before it.
    ///
    /// # Errors
    /// [`PassError::Empty`].
    pub fn prefill(
        backend: &'a mut B,
        batch: impl IntoIterator<Item = &'a mut B::Sequence>,
        tokens: usize,
    ) -> Result<Self, PassError<B::Error>> {
        let batch: Vec<_> = batch.into_iter().collect();
        if batch.is_empty() || tokens == 0 {
            return Err(PassError::Empty { sequences: batch.len(), tokens });
        }
        let positions = batch.iter().map(|sequence| backend.tokens(sequence)).collect();
        Ok(Self { backend, batch, positions, tokens, step: false, next: 0, seen: Seen::default() })
    }

    /// Begins to add one token to each sequence, which attends to what the backend selects for it.
    ///
    /// # Errors
    /// [`PassError::Empty`], or the backend's own.
    pub fn step(
        backend: &'a mut B,
        batch: impl IntoIterator<Item = &'a mut B::Sequence>,
    ) -> Result<Self, PassError<B::Error>> {
        let mut pass = Self::prefill(backend, batch, 1)?;
        pass.step = true;
        pass.backend.begin_step(&mut pass.batch, &pass.positions).map_err(PassError::Backend)?;
        Ok(pass)
    }

    /// The position of each sequence's first new token: what RoPE turns by.
    #[must_use]
    pub fn positions(&self) -> &[usize] {
        &self.positions
    }

    /// Whether a method asks for the layer after the one that attends next by a prediction of its query ([`Self::hint`]).
    #[must_use]
    pub fn wants_hint(&self, layer: usize) -> bool {
        self.step && layer < self.backend.shape().layers && self.backend.wants_hint(layer)
    }

    /// Predicts the queries of layer `layer`, `q` as in [`Self::attend`], before the layer ahead of it attends: the layer's input goes
    /// through the *next* layer's norm and `W_Q`, and RoPE (InfiniGen, Lee et al. 2024). Without it such methods attend to everything.
    ///
    /// # Errors
    /// [`PassError::Hint`], as for [`Self::attend`] a tensor that does not fit, or the backend's own.
    pub fn hint(&mut self, layer: usize, q: &Tensor) -> Result<(), PassError<B::Error>> {
        let layers = self.backend.shape().layers;
        if !self.step || layer != self.next + 1 || layer >= layers {
            return Err(PassError::Hint { found: layer, next: self.next, layers });
        }
        let queries = self.rows("q", q, self.backend.shape().query_heads)?;
        self.backend.hint(layer, &mut self.batch, &self.positions, &queries).map_err(PassError::Backend)
    }

    /// Takes K and V of the new tokens in one layer, and attends: as `q`, `[batch, query heads, tokens, head_dim]`, in its type, and not
    /// contiguous.
    ///
    /// # Errors
    /// A layer out of turn, a tensor of another shape, type or device, or the backend's own.
    pub fn attend(
        &mut self,
        layer: usize,
        q: &Tensor,
        k: &Tensor,
        v: &Tensor,
    ) -> Result<Tensor, PassError<B::Error>> {
        let shape = self.backend.shape();
        let (layers, query_heads, kv_heads, d) =
            (shape.layers, shape.query_heads, shape.kv_heads, shape.head_dim);
        if layer != self.next || layer >= layers {
            return Err(PassError::Order { expected: self.next, found: layer, layers });
        }
        let queries = self.rows("q", q, query_heads)?;
        let keys = self.rows("k", k, kv_heads)?;
        let values = self.rows("v", v, kv_heads)?;
        let mut out = vec![0.0; queries.len()];
        let attended = if self.step {
            self.attend_step(layer, &queries, &keys, &values, &mut out)
        } else {
            self.attend_prompt(layer, &queries, &keys, &values, &mut out)
        };
        attended.map_err(PassError::Backend)?;
        self.next += 1;
        let out = Tensor::from_vec(out, (self.batch.len(), self.tokens, query_heads, d), &Device::Cpu)?;
        Ok(out.to_dtype(q.dtype())?.transpose(1, 2)?)
    }

    /// Ends the pass: its tokens count from now on.
    ///
    /// # Errors
    /// [`PassError::Unfinished`], or the backend's own.
    pub fn finish(self) -> Result<(), PassError<B::Error>> {
        let layers = self.backend.shape().layers;
        if self.next < layers {
            return Err(PassError::Unfinished { attended: self.next, layers });
        }
        let Self { backend, mut batch, positions, tokens, step, .. } = self;
        for (sequence, position) in batch.iter_mut().zip(&positions) {
            backend.commit(sequence, position + tokens).map_err(PassError::Backend)?;
        }
        if step {
            backend.end_step(&mut batch).map_err(PassError::Backend)?;
        }
        Ok(())
    }

    fn attend_step(
        &mut self,
        layer: usize,
        queries: &[f32],
        keys: &[f32],
        values: &[f32],
        out: &mut [f32],
    ) -> Result<(), B::Error> {
        self.backend.append(layer, &mut self.batch, &self.positions, keys, values)?;
        self.backend.attend(layer, &mut self.batch, &self.positions, queries, out)
    }

    fn attend_prompt(
        &mut self,
        layer: usize,
        queries: &[f32],
        keys: &[f32],
        values: &[f32],
        out: &mut [f32],
    ) -> Result<(), B::Error> {
        let members = self.batch.len();
        let rows = (queries.chunks_exact(queries.len() / members))
            .zip(keys.chunks_exact(keys.len() / members))
            .zip(values.chunks_exact(values.len() / members))
            .zip(out.chunks_exact_mut(queries.len() / members));
        for ((sequence, &start), (((queries, keys), values), out)) in
            self.batch.iter_mut().zip(&self.positions).zip(rows)
        {
            self.backend.store(layer, sequence, start, keys, values)?;
            self.backend.observe_queries(layer, sequence, start, queries)?;
            let chunk = Stored { layer, start, queries };
            attend_stored(self.backend, sequence, chunk, &mut self.seen, out)?;
        }
        Ok(())
    }

    /// A tensor's values, `[batch][tokens][heads][d]`.
    fn rows(
        &self,
        name: &'static str,
        tensor: &Tensor,
        heads: usize,
    ) -> Result<Vec<f32>, PassError<B::Error>> {
        let expected = [self.batch.len(), heads, self.tokens, self.backend.shape().head_dim];
        if tensor.dims() != expected {
            return Err(PassError::Shape { tensor: name, expected, found: tensor.dims().to_vec() });
        }
        if !matches!(tensor.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            return Err(PassError::Dtype { tensor: name, found: tensor.dtype() });
        }
        if !tensor.device().is_cpu() {
            return Err(PassError::Device { tensor: name });
        }
        Ok(tensor.transpose(1, 2)?.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?)
    }
}
