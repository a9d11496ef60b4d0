//! From a configuration and named tensors to weights: the same for every file format.

use kvoyant_kernels::packed::{BLOCK, PackedMatrix, gather};
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
    /// A matrix as the file has it quantised, in rotate-half order; none, where it is not, or in blocks of another kind than products are
    /// made for.
    fn packed(&self, _name: TensorName, _shape: [usize; 2]) -> Result<Option<PackedMatrix>, LoadError> {
        Ok(None)
    }
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
    let (vocabulary, hidden) = (config.vocabulary, config.hidden_size);
    let embedding = source.tensor(TensorName::Embedding, &[vocabulary, hidden])?;
    let mut head = if config.tied_embeddings {
        let packed = packed(source, mode, TensorName::Embedding, &embedding, [vocabulary, hidden])?;
        Linear::new(&embedding, None, vocabulary, hidden, packed)
    } else {
        read_linear(source, mode, TensorName::Head, None, [vocabulary, hidden])?
    };
    let mut layers = (0..config.layers)
        .into_par_iter()
        .map(|layer| read_layer(&config, source, layer, mode))
        .collect::<Result<Vec<_>, _>>()?;
    // In the order in which a step reads them.
    let all = layers.iter_mut().flat_map(LayerWeights::linears_mut).chain([&mut head]);
    gather(all.filter_map(Linear::packed_mut));
    let final_norm = source.tensor(TensorName::FinalNorm, &[hidden])?;
    let rope = Rope::new(&config);
    let weights = Weights { embedding, layers, final_norm, head };
    Ok(Model { name, config, rope, weights, tokenizer, chat_template })
}

fn read_linear(
    source: &dyn TensorSource,
    mode: WeightsMode,
    name: TensorName,
    bias: Option<Vec<f32>>,
    [outputs, inputs]: [usize; 2],
) -> Result<Linear, LoadError> {
    let weight = source.tensor(name, &[outputs, inputs])?;
    let packed = packed(source, mode, name, &weight, [outputs, inputs])?;
    Ok(Linear::new(&weight, bias, outputs, inputs, packed))
}

/// What small batches are to multiply with, if not with f32. Rows that are no whole blocks stay f32.
fn packed(
    source: &dyn TensorSource,
    mode: WeightsMode,
    name: TensorName,
    weight: &[f32],
    [outputs, inputs]: [usize; 2],
) -> Result<Option<PackedMatrix>, LoadError> {
    let quantised = || inputs.is_multiple_of(BLOCK).then(|| PackedMatrix::quantise(weight, inputs));
    Ok(match mode {
        WeightsMode::F32 => None,
        WeightsMode::Q8_0 => quantised(),
        WeightsMode::Auto if !source.is_quantised() => None,
        WeightsMode::Auto => source.packed(name, [outputs, inputs])?.or_else(quantised),
    })
}

fn read_layer(
    config: &ModelConfig,
    source: &dyn TensorSource,
    layer: usize,
    mode: WeightsMode,
) -> Result<LayerWeights, LoadError> {
    use LayerTensor as T;
    let read = |tensor, shape: &[usize]| source.tensor(TensorName::Layer(layer, tensor), shape);
    let linear = |tensor, bias: Option<LayerTensor>, outputs, inputs| -> Result<Linear, LoadError> {
        let bias = bias.map(|bias| read(bias, &[outputs])).transpose()?;
        read_linear(source, mode, TensorName::Layer(layer, tensor), bias, [outputs, inputs])
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
