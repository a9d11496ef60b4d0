//! A model's weights: f32 for the GEMMs of a prefill, quantised beside them where decode is to read fewer bytes.

pub(crate) mod gemm;
mod linear;
mod packed;

pub(crate) use linear::forward_all;
pub use linear::{Linear, Precision};

/// How linear layers are stored and multiplied.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum WeightsMode {
    /// If the file was quantised, small batches multiply with its blocks as they are (Q4_0, Q4_1, Q8_0), or with Q8_0 made of them (all
    /// others); else [`WeightsMode::F32`].
    #[default]
    Auto,
    /// f32 everywhere: exact with respect to the file.
    F32,
    /// Q8_0 for small batches, whatever the file has, f32 for large ones: a decode step reads a quarter of the bytes.
    Q8_0,
}

/// One decoder layer.
#[derive(Debug)]
pub(crate) struct LayerWeights {
    /// Norm before attention, `[hidden]`.
    pub(crate) attention_norm: Vec<f32>,
    /// `[query_width, hidden]`.
    pub(crate) query: Linear,
    /// `[kv_width, hidden]`.
    pub(crate) key: Linear,
    /// `[kv_width, hidden]`.
    pub(crate) value: Linear,
    /// `[hidden, query_width]`.
    pub(crate) output: Linear,
    /// Norm before the feed-forward, `[hidden]`.
    pub(crate) mlp_norm: Vec<f32>,
    /// `[intermediate, hidden]`.
    pub(crate) gate: Linear,
    /// `[intermediate, hidden]`.
    pub(crate) up: Linear,
    /// `[hidden, intermediate]`.
    pub(crate) down: Linear,
}

impl LayerWeights {
    /// Its matrices, in the order in which they are used.
    pub(crate) fn linears_mut(&mut self) -> [&mut Linear; 7] {
        let Self { query, key, value, output, gate, up, down, .. } = self;
        [query, key, value, output, gate, up, down]
    }
}

/// All weights of a model.
#[derive(Debug)]
pub(crate) struct Weights {
    /// `[vocabulary, hidden]`.
    pub(crate) embedding: Vec<f32>,
    /// In order.
    pub(crate) layers: Vec<LayerWeights>,
    /// Norm before the output matrix, `[hidden]`.
    pub(crate) final_norm: Vec<f32>,
    /// `[vocabulary, hidden]`.
    pub(crate) head: Linear,
}
