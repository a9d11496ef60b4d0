//! A Hugging Face checkpoint folder.

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::assemble::{Parts, assemble};
use super::names::{LayerTensor, TensorName};
use super::safetensors_files::SafetensorsFiles;
use super::{LoadOptions, TensorSource};
use crate::chat::ChatTemplate;
use crate::config::{Architecture, ModelConfig, RopeScaling};
use crate::error::LoadError;
use crate::model::Model;
use crate::tokenizer::Tokenizer;

/// Base of the rotary frequencies when a configuration names none (Su et al. 2021).
const DEFAULT_ROPE_THETA: f32 = 10_000.0;

/// No size in a configuration is larger; so products of two do not overflow.
pub(super) const MAX_SIZE: usize = 1 << 28;
/// No model has more layers; so a file that says so is not believed before its tensors are looked for.
pub(super) const MAX_LAYERS: usize = 1 << 14;

/// config.json, as far as it matters here.
#[derive(Deserialize)]
struct ConfigJson {
    #[serde(default)]
    architectures: Vec<String>,
    hidden_size: usize,
    intermediate_size: usize,
    num_hidden_layers: usize,
    num_attention_heads: usize,
    num_key_value_heads: Option<usize>,
    head_dim: Option<usize>,
    vocab_size: usize,
    max_position_embeddings: usize,
    rms_norm_eps: f32,
    rope_theta: Option<f32>,
    rope_scaling: Option<Value>,
    /// Newer files keep base and scaling here.
    rope_parameters: Option<Value>,
    sliding_window: Option<usize>,
    use_sliding_window: Option<bool>,
    max_window_layers: Option<usize>,
    layer_types: Option<Vec<String>>,
    tie_word_embeddings: Option<bool>,
    attention_bias: Option<bool>,
    mlp_bias: Option<bool>,
    hidden_act: Option<String>,
    partial_rotary_factor: Option<f32>,
    quantization_config: Option<Value>,
}

/// Loads a folder.
pub(super) fn load(folder: &Path, options: &LoadOptions) -> Result<Model, LoadError> {
    let config_path = folder.join("config.json");
    if !config_path.exists() {
        let reason = "the folder has no config.json".to_owned();
        return Err(LoadError::NotAModel { path: folder.into(), reason });
    }
    let text = std::fs::read_to_string(&config_path)
        .map_err(|source| LoadError::Io { path: config_path.clone(), source })?;
    let mut config = config_from_json(&text, &config_path)?;
    let tensors = SafetensorsFiles::open(folder)?;
    // Llama and Mistral say in a flag what Qwen2 always has; the files decide where the flag is silent.
    config.output_bias &= tensors.has(TensorName::Layer(0, LayerTensor::OutputBias));
    let (tokenizer, chat_template) = texts(folder, &text)?;
    let name =
        folder.file_name().map_or_else(|| "model".to_owned(), |name| name.to_string_lossy().into_owned());
    assemble(Parts { name, config, tokenizer, chat_template }, &tensors, options.weights)
}

/// The configuration in a config.json.
fn config_from_json(text: &str, path: &Path) -> Result<ModelConfig, LoadError> {
    let malformed = |reason: String| LoadError::Malformed { path: path.into(), reason };
    let json: ConfigJson = serde_json::from_str(text).map_err(|error| malformed(error.to_string()))?;
    let name = json.architectures.first().cloned().unwrap_or_default();
    let architecture = [Architecture::Llama, Architecture::Mistral, Architecture::Qwen2]
        .into_iter()
        .find(|architecture| architecture.hugging_face_name() == name)
        .ok_or(LoadError::UnknownArchitecture { name })?;
    let unsupported = |key: &str, value: String, supported: &str| LoadError::UnsupportedConfig {
        key: key.to_owned(),
        value,
        supported: supported.to_owned(),
    };
    if let Some(act) = json.hidden_act.as_ref().filter(|act| !matches!(act.as_str(), "silu" | "swish")) {
        return Err(unsupported("hidden_act", act.clone(), "silu is"));
    }
    if json.mlp_bias == Some(true) {
        return Err(unsupported("mlp_bias", "true".to_owned(), "only feed-forwards without biases are"));
    }
    if let Some(share) = json.partial_rotary_factor.filter(|share| *share != 1.0) {
        return Err(unsupported("partial_rotary_factor", share.to_string(), "only 1 is"));
    }
    if let Some(quantised) = &json.quantization_config {
        let method = quantised.get("quant_method").unwrap_or(quantised).to_string();
        return Err(unsupported(
            "quantization_config",
            method,
            "use the unquantised checkpoint or a GGUF file",
        ));
    }
    let sizes = [
        ("hidden_size", json.hidden_size),
        ("intermediate_size", json.intermediate_size),
        ("num_hidden_layers", json.num_hidden_layers),
        ("num_attention_heads", json.num_attention_heads),
        ("num_key_value_heads", json.num_key_value_heads.unwrap_or(1)),
        ("head_dim", json.head_dim.unwrap_or(2)),
        ("vocab_size", json.vocab_size),
        ("max_position_embeddings", json.max_position_embeddings),
    ];
    if let Some((key, value)) = sizes.into_iter().find(|(_, value)| !(1..=MAX_SIZE).contains(value)) {
        return Err(malformed(format!("{key} is {value}")));
    }
    if json.num_hidden_layers > MAX_LAYERS {
        return Err(malformed(format!("num_hidden_layers is {}", json.num_hidden_layers)));
    }
    let query_heads = json.num_attention_heads;
    let kv_heads = json.num_key_value_heads.unwrap_or(query_heads);
    let head_dim = json.head_dim.unwrap_or(json.hidden_size / query_heads);
    check_heads(query_heads, kv_heads, head_dim).map_err(malformed)?;
    let rope = json.rope_parameters.as_ref();
    let theta = json.rope_theta.or_else(|| float(rope?, "rope_theta")).unwrap_or(DEFAULT_ROPE_THETA);
    let eps = json.rms_norm_eps;
    if !(theta.is_finite() && theta > 0.0 && eps.is_finite() && eps >= 0.0) {
        return Err(malformed(format!("rope_theta is {theta}, rms_norm_eps is {}", json.rms_norm_eps)));
    }
    let attention_bias = json.attention_bias.unwrap_or(false);
    Ok(ModelConfig {
        architecture,
        hidden_size: json.hidden_size,
        intermediate_size: json.intermediate_size,
        layers: json.num_hidden_layers,
        query_heads,
        kv_heads,
        head_dim,
        vocabulary: json.vocab_size,
        context_tokens: json.max_position_embeddings,
        rms_norm_eps: json.rms_norm_eps,
        rope_theta: theta,
        rope_scaling: rope_scaling(json.rope_scaling.as_ref().or(rope))?,
        sliding_window: windows(&json, architecture),
        tied_embeddings: json.tie_word_embeddings.unwrap_or(false),
        qkv_bias: architecture == Architecture::Qwen2 || attention_bias,
        output_bias: architecture != Architecture::Qwen2 && attention_bias,
    })
}

/// Head counts and width that attention can work with, else why not.
pub(super) fn check_heads(query_heads: usize, kv_heads: usize, head_dim: usize) -> Result<(), String> {
    if kv_heads == 0 || !query_heads.is_multiple_of(kv_heads) {
        return Err(format!("{query_heads} query heads cannot share {kv_heads} KV heads"));
    }
    if head_dim == 0 || !head_dim.is_multiple_of(2) {
        return Err(format!("a head of {head_dim} values cannot be rotated in pairs"));
    }
    if query_heads.checked_mul(head_dim).is_none_or(|width| width > MAX_SIZE) {
        return Err(format!("{query_heads} heads of {head_dim} values are too wide"));
    }
    Ok(())
}

/// Which layers have a sliding window.
fn windows(json: &ConfigJson, architecture: Architecture) -> Vec<Option<usize>> {
    let layers = json.num_hidden_layers;
    let window = json.sliding_window.filter(|window| *window > 0);
    if let Some(types) = &json.layer_types {
        let of = |layer| types.get(layer).is_some_and(|kind: &String| kind == "sliding_attention");
        return (0..layers).map(|layer| window.filter(|_| of(layer))).collect();
    }
    match architecture {
        Architecture::Llama => vec![None; layers],
        Architecture::Mistral => vec![window; layers],
        Architecture::Qwen2 => {
            let first = json.max_window_layers.unwrap_or(layers);
            let used = json.use_sliding_window.unwrap_or(false);
            (0..layers).map(|layer| window.filter(|_| used && layer >= first)).collect()
        }
    }
}

fn float(value: &Value, key: &str) -> Option<f32> {
    value.get(key).and_then(Value::as_f64).map(|number| number as f32)
}

/// `rope_scaling` by its type.
fn rope_scaling(value: Option<&Value>) -> Result<RopeScaling, LoadError> {
    let Some(value) = value.filter(|value| !value.is_null()) else { return Ok(RopeScaling::None) };
    let kind =
        value.get("rope_type").or_else(|| value.get("type")).and_then(Value::as_str).unwrap_or("default");
    let unsupported = |what: &str| LoadError::UnsupportedConfig {
        key: "rope_scaling".to_owned(),
        value: value.to_string(),
        supported: what.to_owned(),
    };
    let number = |key: &str| {
        let positive = float(value, key).filter(|number| *number > 0.0);
        positive.ok_or_else(|| unsupported(&format!("{kind} needs a positive {key}")))
    };
    match kind {
        "default" => Ok(RopeScaling::None),
        "linear" => Ok(RopeScaling::Linear { factor: number("factor")? }),
        "llama3" => Ok(RopeScaling::Llama3 {
            factor: number("factor")?,
            low_freq_factor: number("low_freq_factor")?,
            high_freq_factor: number("high_freq_factor")?,
            original_context_tokens: number("original_max_position_embeddings")? as usize,
        }),
        _ => Err(unsupported("types llama3 and linear are")),
    }
}

/// The tokenizer and the chat template of a folder.
fn texts(folder: &Path, config: &str) -> Result<(Tokenizer, Option<ChatTemplate>), LoadError> {
    let read = |name: &str| std::fs::read_to_string(folder.join(name)).ok();
    let json = |name: &str| {
        read(name).and_then(|text| serde_json::from_str::<Value>(&text).ok()).unwrap_or_default()
    };
    let tokenizer_config = json("tokenizer_config.json");
    let generation = json("generation_config.json");
    let config: Value = serde_json::from_str(config).unwrap_or_default();
    let named = |key: &str| match &tokenizer_config[key] {
        Value::String(token) => Some(token.clone()),
        token => token["content"].as_str().map(str::to_owned),
    };
    let mut ends = Vec::new();
    for source in [&generation["eos_token_id"], &config["eos_token_id"]] {
        match source {
            Value::Array(ids) => ends.extend(ids.iter().filter_map(Value::as_u64).map(|id| id as u32)),
            id => ends.extend(id.as_u64().map(|id| id as u32)),
        }
    }
    let (begin, end) = (named("bos_token"), named("eos_token"));
    let tokenizer =
        Tokenizer::from_json(&folder.join("tokenizer.json"), begin.as_deref(), end.as_deref(), ends)?;
    let template = match &tokenizer_config["chat_template"] {
        Value::String(template) => Some(template.clone()),
        Value::Array(several) => several
            .iter()
            .find(|template| template["name"] == "default")
            .and_then(|template| template["template"].as_str())
            .map(str::to_owned),
        _ => read("chat_template.jinja"),
    };
    let template = template
        .map(|template| ChatTemplate::new(&template, &begin.unwrap_or_default(), &end.unwrap_or_default()))
        .transpose()?;
    Ok((tokenizer, template))
}
