//! From a configuration and named tensors to weights: the same for every file format.

use rayon::prelude::*;

use super::names::{LayerTensor, TensorName};
use crate::chat::ChatTemplate;
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::model::Model;
use crate::rope::Rope;
use crate::tokenizer::Tokenizer;
use crate::weights::{LayerWeights, Linear, Weights, WeightsMode};

/// Gives tensors by name as f32, in rotate-half order.
pub(crate) trait TensorSource: Sync {
    /// The tensor's values; its shape must be `shape`.
    fn tensor(&self, name: TensorName, shape: &[usize]) -> Result<Vec<f32>, LoadError>;
    /// Whether there is such a tensor.
    fn has(&self, name: TensorName) -> bool;
    /// Whether the file's matrices were quantised.
    fn is_quantised(&self) -> bool;
}

/// What a model is made of besides its weights.
pub(crate) struct Parts {
    pub(crate) name: String,
    pub(crate) config: ModelConfig,
    pub(crate) tokenizer: Tokenizer,
    pub(crate) chat_template: Option<ChatTemplate>,
}

/// Reads every weight and puts the model together.
pub(crate) fn assemble(
    parts: Parts,
    source: &dyn TensorSource,
    mode: WeightsMode,
) -> Result<Model, LoadError> {
    let Parts { name, config, tokenizer, chat_template } = parts;
    let q8 = match mode {
        WeightsMode::Auto => source.is_quantised(),
        WeightsMode::F32 => false,
        WeightsMode::Q8_0 => true,
    };
    let (vocabulary, hidden) = (config.vocabulary, config.hidden_size);
    let embedding = source.tensor(TensorName::Embedding, &[vocabulary, hidden])?;
    let head = if config.tied_embeddings {
        Linear::new(&embedding, None, vocabulary, hidden, q8)
    } else {
        Linear::new(&source.tensor(TensorName::Head, &[vocabulary, hidden])?, None, vocabulary, hidden, q8)
    };
    let layers = (0..config.layers)
        .into_par_iter()
        .map(|layer| read_layer(&config, source, layer, q8))
        .collect::<Result<_, _>>()?;
    let final_norm = source.tensor(TensorName::FinalNorm, &[hidden])?;
    let rope = Rope::new(&config);
    let weights = Weights { embedding, layers, final_norm, head };
    Ok(Model { name, config, rope, weights, tokenizer, chat_template })
}

fn read_layer(
    config: &ModelConfig,
    source: &dyn TensorSource,
    layer: usize,
    q8: bool,
) -> Result<LayerWeights, LoadError> {
    use LayerTensor as T;
    let read = |tensor, shape: &[usize]| source.tensor(TensorName::Layer(layer, tensor), shape);
    let linear = |tensor, bias: Option<LayerTensor>, outputs, inputs| -> Result<Linear, LoadError> {
        let bias = bias.map(|bias| read(bias, &[outputs])).transpose()?;
        Ok(Linear::new(&read(tensor, &[outputs, inputs])?, bias, outputs, inputs, q8))
    };
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let (query, kv) = (config.query_width(), config.kv_width());
    Ok(LayerWeights {
        attention_norm: read(T::AttentionNorm, &[hidden])?,
        query: linear(T::Query, config.qkv_bias.then_some(T::QueryBias), query, hidden)?,
        key: linear(T::Key, config.qkv_bias.then_some(T::KeyBias), kv, hidden)?,
        value: linear(T::Value, config.qkv_bias.then_some(T::ValueBias), kv, hidden)?,
        output: linear(T::Output, config.output_bias.then_some(T::OutputBias), hidden, query)?,
        mlp_norm: read(T::MlpNorm, &[hidden])?,
        gate: linear(T::Gate, None, intermediate, hidden)?,
        up: linear(T::Up, None, intermediate, hidden)?,
        down: linear(T::Down, None, hidden, intermediate)?,
    })
}
