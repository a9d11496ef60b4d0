//! A checkpoint in memory, and random ones.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;

use tokenizers::models::bpe::{BPE, Vocab};
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::{AddedToken, Tokenizer as Inner};

use crate::chat::ChatTemplate;
use crate::config::ModelConfig;
use crate::error::LoadError;
use crate::load::{LayerTensor, Parts, TensorName, TensorSource, assemble};
use crate::model::Model;
use crate::tokenizer::Tokenizer;
use crate::weights::WeightsMode;
use kvoyant_kernels::SplitMix64;

/// 256 bytes and four special tokens.
pub(super) const BYTE_LEVEL_TOKENS: usize = 260;
/// Begins a text.
const BEGIN: &str = "<|begin|>";
/// Ends a turn.
const END: &str = "<|end|>";
/// Special tokens of the byte-level tokenizer, from id 256.
const SPECIAL: [&str; 4] = [BEGIN, END, "<|user|>", "<|assistant|>"];
/// The template of synthetic models.
const TEMPLATE: &str = "{{ bos_token }}{% for message in messages %}{{ '<|' + message.role + '|>' + message.content + eos_token }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}";
/// Standard deviation of random attention scores: with 3, as in trained models, an eighth of the keys has nearly all of the mass.
const SCORE_DEVIATION: f32 = 3.0;

/// Configuration, weights under their Hugging Face names, and a tokenizer.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Shape and constants.
    pub config: ModelConfig,
    /// Shape and values of every tensor.
    pub tensors: BTreeMap<String, (Vec<usize>, Vec<f32>)>,
    /// Text to tokens.
    pub tokenizer: Inner,
    /// How a conversation is written, if at all.
    pub chat_template: Option<String>,
    /// The token that begins a text.
    pub begin: String,
    /// The token that ends one.
    pub end: String,
}

impl Checkpoint {
    /// Random weights that keep activations near 1 and attention peaked; a byte-level tokenizer.
    ///
    /// # Panics
    /// When the vocabulary is smaller than the tokenizer's 260.
    pub fn random(config: ModelConfig, seed: u64) -> Self {
        assert!(config.vocabulary >= BYTE_LEVEL_TOKENS, "the tokenizer has {BYTE_LEVEL_TOKENS} tokens");
        let mut random = SplitMix64::new(seed);
        let mut tensors = BTreeMap::new();
        for (name, shape) in shapes(&config) {
            let values: usize = shape.iter().product();
            let inputs = shape.last().copied().unwrap_or(1) as f32;
            let deviation = match name {
                // Norms and biases scatter, so that a test sees one that is left out.
                _ if shape.len() == 1 => 0.1,
                TensorName::Embedding => 1.0,
                // A score is a product of two projections.
                TensorName::Layer(_, LayerTensor::Query | LayerTensor::Key) => {
                    (SCORE_DEVIATION / inputs).sqrt()
                }
                _ => inputs.sqrt().recip(),
            };
            let is_bias = matches!(
                name,
                TensorName::Layer(
                    _,
                    LayerTensor::QueryBias
                        | LayerTensor::KeyBias
                        | LayerTensor::ValueBias
                        | LayerTensor::OutputBias
                )
            );
            let mean = if shape.len() == 1 && !is_bias { 1.0 } else { 0.0 };
            let values = (0..values).map(|_| mean + deviation * random.normal()).collect();
            tensors.insert(name.hugging_face(), (shape, values));
        }
        Self {
            config,
            tensors,
            tokenizer: byte_level_tokenizer(),
            chat_template: Some(TEMPLATE.to_owned()),
            begin: BEGIN.to_owned(),
            end: END.to_owned(),
        }
    }

    /// All tensors 0 but norms, which are 1; for weights that are set by formula.
    pub(super) fn zeros(config: ModelConfig, tokenizer: Inner, begin: &str, end: &str) -> Self {
        let tensors = shapes(&config)
            .into_iter()
            .map(|(name, shape)| {
                let fill = if shape.len() == 1 { 1.0 } else { 0.0 };
                let values = vec![fill; shape.iter().product()];
                (name.hugging_face(), (shape, values))
            })
            .collect();
        Self { config, tensors, tokenizer, chat_template: None, begin: begin.to_owned(), end: end.to_owned() }
    }

    /// Value `(row, column)` of a matrix, to be set.
    pub(super) fn at(&mut self, name: TensorName, row: usize, column: usize) -> &mut f32 {
        let (shape, values) =
            self.tensors.get_mut(&name.hugging_face()).expect("a tensor of the architecture");
        &mut values[row * shape[1] + column]
    }

    /// The model, without a detour over files.
    ///
    /// # Panics
    /// When tensors were removed or reshaped since the checkpoint was made.
    pub fn model(&self, mode: WeightsMode) -> Arc<Model> {
        self.try_model(mode).expect("a synthetic checkpoint is whole")
    }

    /// The model, or what is wrong with the tensors.
    ///
    /// # Errors
    /// As for files: a tensor is missing or has another shape.
    pub fn try_model(&self, mode: WeightsMode) -> Result<Arc<Model>, LoadError> {
        let id = |token: &str| self.tokenizer.token_to_id(token);
        let ends = id(&self.end).into_iter().collect();
        let tokenizer = Tokenizer::new(self.tokenizer.clone(), id(&self.begin), ends, true);
        let template = self.chat_template.as_deref();
        let chat_template =
            template.map(|source| ChatTemplate::new(source, &self.begin, &self.end)).transpose()?;
        let parts =
            Parts { name: "synthetic".to_owned(), config: self.config.clone(), tokenizer, chat_template };
        assemble(parts, self, mode).map(Model::shared)
    }
}

impl TensorSource for Checkpoint {
    fn tensor(&self, name: TensorName, shape: &[usize]) -> Result<Vec<f32>, LoadError> {
        let tensor = name.hugging_face();
        match self.tensors.get(&tensor) {
            None => Err(LoadError::MissingTensor { tensor, path: "a synthetic checkpoint".into() }),
            Some((found, _)) if found != shape => {
                Err(LoadError::WrongShape { tensor, expected: shape.into(), found: found.clone() })
            }
            Some((_, values)) => Ok(values.clone()),
        }
    }

    fn has(&self, name: TensorName) -> bool {
        self.tensors.contains_key(&name.hugging_face())
    }

    fn is_quantised(&self) -> bool {
        false
    }
}

/// Every tensor of a configuration with its shape.
pub(super) fn shapes(config: &ModelConfig) -> Vec<(TensorName, Vec<usize>)> {
    use LayerTensor as T;
    let (hidden, intermediate) = (config.hidden_size, config.intermediate_size);
    let (query, kv) = (config.query_width(), config.kv_width());
    let mut shapes =
        vec![(TensorName::Embedding, vec![config.vocabulary, hidden]), (TensorName::FinalNorm, vec![hidden])];
    if !config.tied_embeddings {
        shapes.push((TensorName::Head, vec![config.vocabulary, hidden]));
    }
    for layer in 0..config.layers {
        let mut add = |tensor, shape| shapes.push((TensorName::Layer(layer, tensor), shape));
        add(T::AttentionNorm, vec![hidden]);
        add(T::Query, vec![query, hidden]);
        add(T::Key, vec![kv, hidden]);
        add(T::Value, vec![kv, hidden]);
        add(T::Output, vec![hidden, query]);
        add(T::MlpNorm, vec![hidden]);
        add(T::Gate, vec![intermediate, hidden]);
        add(T::Up, vec![intermediate, hidden]);
        add(T::Down, vec![hidden, intermediate]);
        if config.qkv_bias {
            add(T::QueryBias, vec![query]);
            add(T::KeyBias, vec![kv]);
            add(T::ValueBias, vec![kv]);
        }
        if config.output_bias {
            add(T::OutputBias, vec![hidden]);
        }
    }
    shapes
}

/// One token per byte, then the special ones.
fn byte_level_tokenizer() -> Inner {
    // Byte-level tokenizers write bytes that cannot be shown as characters from 256 on, in order.
    let shown = |byte: &u8| matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
    let mut next = 256u32;
    let mut vocabulary: HashMap<String, u32> = HashMap::new();
    for byte in 0..=255u8 {
        let written = if shown(&byte) {
            char::from(byte)
        } else {
            next += 1;
            char::from_u32(next - 1).expect("below the surrogates")
        };
        vocabulary.insert(written.to_string(), byte.into());
    }
    vocabulary.extend(SPECIAL.iter().map(|token| (*token).to_owned()).zip(256..));
    let bpe = BPE::builder()
        .vocab_and_merges(vocabulary.into_iter().collect::<Vocab>(), Vec::new())
        .build()
        .expect("a vocabulary without merges is consistent");
    let mut inner = Inner::new(bpe);
    inner.with_pre_tokenizer(Some(ByteLevel::new(false, true, true)));
    inner.with_decoder(Some(ByteLevel::new(false, true, true)));
    let special = SPECIAL.iter().map(|token| AddedToken::from(*token, true));
    inner.add_special_tokens(special).expect("they are in the vocabulary");
    inner
}
