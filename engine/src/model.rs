//! A loaded model: shape, weights, tokenizer, template.

use std::sync::Arc;

use crate::chat::ChatTemplate;
use crate::config::ModelConfig;
use crate::rope::Rope;
use crate::tokenizer::Tokenizer;
use crate::weights::{Linear, Weights};

/// A model that is ready to run. Immutable; shared by decoders.
#[derive(Debug)]
pub struct Model {
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    pub(crate) rope: Rope,
    pub(crate) weights: Weights,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) chat_template: Option<ChatTemplate>,
}

impl Model {
    /// A name for people: from the file's metadata, else the file's own.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Shape and constants.
    pub fn config(&self) -> &ModelConfig {
        &self.config
    }

    /// Rotary frequencies.
    pub fn rope(&self) -> &Rope {
        &self.rope
    }

    /// Text to tokens and back.
    pub fn tokenizer(&self) -> &Tokenizer {
        &self.tokenizer
    }

    /// How the model wants a conversation written, if its files say.
    pub fn chat_template(&self) -> Option<&ChatTemplate> {
        self.chat_template.as_ref()
    }

    /// `W_Q` of a layer, `[query_width, hidden]`, rows in rotate-half order.
    pub fn query_projection(&self, layer: usize) -> &Linear {
        &self.weights.layers[layer].query
    }

    /// `W_K` of a layer, `[kv_width, hidden]`, rows in rotate-half order.
    pub fn key_projection(&self, layer: usize) -> &Linear {
        &self.weights.layers[layer].key
    }

    /// Weight of the norm before a layer's attention, `[hidden]`.
    pub fn attention_norm(&self, layer: usize) -> &[f32] {
        &self.weights.layers[layer].attention_norm
    }

    /// Whether decode steps multiply with quantised weights.
    pub fn decodes_quantised(&self) -> bool {
        self.weights.layers.iter().any(|layer| layer.query.is_quantised())
    }

    /// Parameters, a tied embedding counted once.
    pub fn parameters(&self) -> usize {
        let config = &self.config;
        let layer = 2 * config.hidden_size * (config.query_width() + config.kv_width())
            + 3 * config.hidden_size * config.intermediate_size;
        let tables = if config.tied_embeddings { 1 } else { 2 };
        config.layers * layer + tables * config.vocabulary * config.hidden_size
    }

    /// Shared by several decoders.
    pub(crate) fn shared(self) -> Arc<Self> {
        Arc::new(self)
    }
}
