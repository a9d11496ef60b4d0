//! Models without a download: random ones from a seed, one that recalls by construction, and writers that put either on disk.

mod checkpoint;
mod induction;
mod write;

use std::sync::Arc;

pub use checkpoint::Checkpoint;
pub use induction::{RecallTask, induction, recall_task};
pub use write::FolderOptions;

use crate::config::{Architecture, ModelConfig, RopeScaling};
use crate::model::Model;

/// Shape of [`tiny`]: small enough for tests, with grouped heads and enough layers for prediction to matter.
pub fn tiny_config() -> ModelConfig {
    let layers = 4;
    ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: 128,
        intermediate_size: 256,
        layers,
        query_heads: 4,
        kv_heads: 2,
        head_dim: 32,
        vocabulary: checkpoint::BYTE_LEVEL_TOKENS,
        context_tokens: 32_768,
        rms_norm_eps: 1e-5,
        rope_theta: 10_000.0,
        rope_scaling: RopeScaling::None,
        sliding_window: vec![None; layers],
        tied_embeddings: false,
        qkv_bias: false,
        output_bias: false,
    }
}

/// A Llama with random weights: the same model for the same seed, for ever. It says nothing sensible, but its attention is as peaked
/// as a trained one's, so agreement, bytes and timings mean something.
pub fn tiny(seed: u64) -> Arc<Model> {
    Checkpoint::random(tiny_config(), seed).model(crate::WeightsMode::F32)
}
