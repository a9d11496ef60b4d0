//! A model from one GGUF file: configuration, tokenizer and template from its metadata.

use std::fs::File;
use std::io::BufReader;
use std::path::Path;

use super::LoadOptions;
use super::assemble::{Parts, TensorSource, assemble};
use super::folder::{MAX_LAYERS, MAX_SIZE, check_heads};
use super::gguf_header::{Header, Value};
use super::gguf_tensors::{GgufTensors, HeadCounts};
use super::names::TensorName;
use crate::chat::ChatTemplate;
use crate::config::{Architecture, ModelConfig, RopeScaling};
use crate::error::LoadError;
use crate::model::Model;
use crate::tokenizer::{Tokenizer, VocabularySpec};

/// Base of the rotary frequencies when a file names none.
const DEFAULT_ROPE_THETA: f64 = 10_000.0;
/// Divisors of Llama 3's rotary frequencies, `[head_dim / 2]`.
const ROPE_FACTORS: &str = "rope_freqs.weight";

/// Loads a file.
pub(super) fn load(path: &Path, options: &LoadOptions) -> Result<Model, LoadError> {
    let io = |source| LoadError::Io { path: path.into(), source };
    let file = File::open(path).map_err(io)?;
    let length = file.metadata().map_err(io)?.len();
    let header = Header::read(BufReader::with_capacity(1 << 20, &file), length, path)?;
    let mut tensors = GgufTensors { path: path.into(), file, length, header, interleaved: None };
    let mut config = Metadata { header: &tensors.header, path }.config(&tensors)?;
    if tensors.header.tensors.contains_key(ROPE_FACTORS) {
        let factors = tensors.read(ROPE_FACTORS, &[config.head_dim / 2])?;
        config.rope_scaling = RopeScaling::Factors(factors);
    }
    tensors.interleaved = HeadCounts::of(&config);
    let metadata = Metadata { header: &tensors.header, path };
    let (tokenizer, chat_template) = metadata.texts()?;
    let name = metadata.text("general.name").unwrap_or("model").to_owned();
    assemble(Parts { name, config, tokenizer, chat_template }, &tensors, options.weights)
}

/// Typed look-ups.
#[derive(Clone, Copy)]
struct Metadata<'a> {
    header: &'a Header,
    path: &'a Path,
}

impl<'a> Metadata<'a> {
    fn get(self, key: &str) -> Option<&'a Value> {
        self.header.metadata.get(key)
    }

    fn text(self, key: &str) -> Option<&'a str> {
        match self.get(key) {
            Some(Value::Text(text)) => Some(text),
            _ => None,
        }
    }

    fn float(self, key: &str) -> Option<f64> {
        match self.get(key) {
            Some(Value::Float(number)) => Some(*number),
            _ => None,
        }
    }

    fn flag(self, key: &str) -> Option<bool> {
        match self.get(key) {
            Some(Value::Bool(flag)) => Some(*flag),
            _ => None,
        }
    }

    fn id(self, key: &str) -> Option<u32> {
        match self.get(key) {
            Some(Value::Integer(number)) => u32::try_from(*number).ok(),
            _ => None,
        }
    }

    fn missing(self, key: &str) -> LoadError {
        LoadError::MissingKey { key: key.to_owned(), path: self.path.into() }
    }

    /// A positive size.
    fn size(self, key: &str) -> Result<Option<usize>, LoadError> {
        match self.get(key) {
            None => Ok(None),
            Some(Value::Integer(number)) if (1..=MAX_SIZE as i128).contains(number) => {
                Ok(Some(*number as usize))
            }
            Some(other) => {
                let value = match other {
                    Value::Integer(number) => number.to_string(),
                    Value::Integers(_) => "a list".to_owned(),
                    other => format!("{other:?}"),
                };
                let supported = "one positive number for all layers is".to_owned();
                Err(LoadError::UnsupportedConfig { key: key.to_owned(), value, supported })
            }
        }
    }

    fn needed_size(self, key: &str) -> Result<usize, LoadError> {
        self.size(key)?.ok_or_else(|| self.missing(key))
    }

    fn config(self, tensors: &dyn TensorSource) -> Result<ModelConfig, LoadError> {
        let name = self.text("general.architecture").ok_or_else(|| self.missing("general.architecture"))?;
        let architecture = match name {
            "llama" => Architecture::Llama,
            "qwen2" => Architecture::Qwen2,
            other => return Err(LoadError::UnknownArchitecture { name: other.to_owned() }),
        };
        let key = |suffix: &str| format!("{name}.{suffix}");
        let unsupported = |suffix: &str, value: String, supported: &str| {
            Err(LoadError::UnsupportedConfig { key: key(suffix), value, supported: supported.to_owned() })
        };
        if let Some(experts) = self.size(&key("expert_count"))? {
            return unsupported("expert_count", experts.to_string(), "only models without experts are");
        }
        let hidden_size = self.needed_size(&key("embedding_length"))?;
        let query_heads = self.needed_size(&key("attention.head_count"))?;
        let kv_heads = self.size(&key("attention.head_count_kv"))?.unwrap_or(query_heads);
        let head_dim = self.size(&key("attention.key_length"))?.unwrap_or(hidden_size / query_heads);
        check_heads(query_heads, kv_heads, head_dim)
            .map_err(|reason| LoadError::Malformed { path: self.path.into(), reason })?;
        for suffix in ["attention.value_length", "rope.dimension_count"] {
            if let Some(width) = self.size(&key(suffix))?.filter(|width| *width != head_dim) {
                return unsupported(suffix, width.to_string(), &format!("only the head's {head_dim} is"));
            }
        }
        let layers = self.needed_size(&key("block_count"))?;
        if layers > MAX_LAYERS {
            return unsupported(
                "block_count",
                layers.to_string(),
                &format!("at most {MAX_LAYERS} layers are"),
            );
        }
        let vocabulary = match self.get("tokenizer.ggml.tokens") {
            Some(Value::Texts(tokens)) => tokens.len(),
            _ => self.needed_size(&key("vocab_size"))?,
        };
        let eps_key = key("attention.layer_norm_rms_epsilon");
        let eps = self.float(&eps_key).ok_or_else(|| self.missing(&eps_key))? as f32;
        let theta = self.float(&key("rope.freq_base")).unwrap_or(DEFAULT_ROPE_THETA) as f32;
        if !(theta.is_finite() && theta > 0.0 && eps.is_finite() && eps >= 0.0) {
            let reason = format!("rope.freq_base is {theta}, layer_norm_rms_epsilon is {eps}");
            return Err(LoadError::Malformed { path: self.path.into(), reason });
        }
        Ok(ModelConfig {
            architecture,
            hidden_size,
            intermediate_size: self.needed_size(&key("feed_forward_length"))?,
            layers,
            query_heads,
            kv_heads,
            head_dim,
            vocabulary,
            context_tokens: self.needed_size(&key("context_length"))?,
            rms_norm_eps: eps,
            rope_theta: theta,
            rope_scaling: self.rope_scaling(&key)?,
            sliding_window: vec![None; layers],
            tied_embeddings: !tensors.has(TensorName::Head),
            qkv_bias: tensors.has(TensorName::Layer(0, super::LayerTensor::QueryBias)),
            output_bias: tensors.has(TensorName::Layer(0, super::LayerTensor::OutputBias)),
        })
    }

    fn rope_scaling(self, key: &dyn Fn(&str) -> String) -> Result<RopeScaling, LoadError> {
        let factor = self.float(&key("rope.scaling.factor")).or(self.float(&key("rope.scale_linear")));
        match (self.text(&key("rope.scaling.type")), factor) {
            (None | Some("linear"), Some(factor)) if factor > 0.0 => {
                Ok(RopeScaling::Linear { factor: factor as f32 })
            }
            (None | Some("none"), _) => Ok(RopeScaling::None),
            (Some(kind), _) => Err(LoadError::UnsupportedConfig {
                key: key("rope.scaling.type"),
                value: kind.to_owned(),
                supported: "linear with a positive factor is".to_owned(),
            }),
        }
    }

    fn texts(self) -> Result<(Tokenizer, Option<ChatTemplate>), LoadError> {
        let key = |suffix: &str| format!("tokenizer.ggml.{suffix}");
        let Some(model) = self.text(&key("model")) else {
            return Err(LoadError::TokenizerMissing { path: self.path.into() });
        };
        let texts = |suffix: &str| match self.get(&key(suffix)) {
            Some(Value::Texts(texts)) => texts.clone(),
            _ => Vec::new(),
        };
        let tokens = texts("tokens");
        if tokens.is_empty() {
            return Err(self.missing(&key("tokens")));
        }
        let types = match self.get(&key("token_type")) {
            Some(Value::Integers(types)) => types.iter().map(|&kind| kind as u32).collect(),
            _ => Vec::new(),
        };
        let scores = match self.get(&key("scores")) {
            Some(Value::Floats(scores)) => scores.clone(),
            _ => Vec::new(),
        };
        let written =
            |id: Option<u32>| id.and_then(|id| tokens.get(id as usize)).cloned().unwrap_or_default();
        let (begin, end) = (self.id(&key("bos_token_id")), self.id(&key("eos_token_id")));
        let template = self
            .text("tokenizer.chat_template")
            .map(|template| ChatTemplate::new(template, &written(begin), &written(end)))
            .transpose()?;
        let spec = VocabularySpec {
            model: model.to_owned(),
            pre: self.text(&key("pre")).map(str::to_owned),
            types,
            scores,
            merges: texts("merges"),
            begin,
            end,
            end_of_turn: self.id(&key("eot_token_id")),
            unknown: self.id(&key("unknown_token_id")),
            add_begin: self.flag(&key("add_bos_token")),
            add_space_prefix: self.flag(&key("add_space_prefix")),
            tokens,
        };
        Ok((spec.build(self.path)?, template))
    }
}
