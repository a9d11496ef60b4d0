//! Checkpoints on disk, in both formats.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{self, BufWriter};
use std::path::Path;

use candle_core::quantized::{GgmlDType, QTensor, gguf_file};
use candle_core::{Device, Tensor};
use kvoyant_kernels::{Dtype, Kernels};
use safetensors::tensor::TensorView;
use serde_json::json;

use super::checkpoint::{Checkpoint, shapes};
use crate::config::{Architecture, RopeScaling};
use crate::load::{LayerTensor, TensorName, interleaved_order};

/// How a folder is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FolderOptions {
    /// Files that the tensors are spread over; more than one come with an index.
    pub shards: usize,
    /// Storage type.
    pub dtype: Dtype,
}

impl Default for FolderOptions {
    fn default() -> Self {
        Self { shards: 1, dtype: Dtype::F32 }
    }
}

impl Checkpoint {
    /// Writes a Hugging Face folder: config.json, safetensors, tokenizer.json, tokenizer_config.json, generation_config.json.
    ///
    /// # Errors
    /// What the file system says.
    pub fn write_folder(&self, folder: &Path, options: FolderOptions) -> io::Result<()> {
        std::fs::create_dir_all(folder)?;
        let write =
            |name: &str, value: &serde_json::Value| std::fs::write(folder.join(name), format!("{value:#}"));
        write("config.json", &self.config_json())?;
        let end = self.tokenizer.token_to_id(&self.end);
        write("generation_config.json", &json!({ "eos_token_id": end }))?;
        write(
            "tokenizer_config.json",
            &json!({ "bos_token": self.begin, "eos_token": { "content": self.end }, "chat_template": self.chat_template }),
        )?;
        self.tokenizer.save(folder.join("tokenizer.json"), false).map_err(io::Error::other)?;

        let stored: BTreeMap<&String, Vec<u8>> = self
            .tensors
            .iter()
            .map(|(name, (_, values))| {
                let mut bytes = vec![0; values.len() * options.dtype.bytes()];
                Kernels::best().from_f32(options.dtype, values, &mut bytes);
                (name, bytes)
            })
            .collect();
        let dtype = match options.dtype {
            Dtype::F32 => safetensors::Dtype::F32,
            Dtype::F16 => safetensors::Dtype::F16,
            Dtype::Bf16 => safetensors::Dtype::BF16,
        };
        let mut index = BTreeMap::new();
        for shard in 0..options.shards {
            let file = match options.shards {
                1 => "model.safetensors".to_owned(),
                all => format!("model-{:05}-of-{all:05}.safetensors", shard + 1),
            };
            let mut views = HashMap::new();
            for (name, bytes) in stored.iter().skip(shard).step_by(options.shards) {
                let shape = self.tensors[*name].0.clone();
                views.insert(*name, TensorView::new(dtype, shape, bytes).map_err(io::Error::other)?);
                index.insert((*name).clone(), file.clone());
            }
            safetensors::serialize_to_file(views, None, &folder.join(file)).map_err(io::Error::other)?;
        }
        if options.shards > 1 {
            write("model.safetensors.index.json", &json!({ "metadata": {}, "weight_map": index }))?;
        }
        Ok(())
    }

    /// The configuration as Hugging Face writes it.
    fn config_json(&self) -> serde_json::Value {
        let config = &self.config;
        let scaling = match &config.rope_scaling {
            RopeScaling::None | RopeScaling::Factors(_) => json!(null),
            RopeScaling::Linear { factor } => json!({ "type": "linear", "factor": factor }),
            RopeScaling::Llama3 { factor, low_freq_factor, high_freq_factor, original_context_tokens } => {
                json!({
                    "rope_type": "llama3",
                    "factor": factor,
                    "low_freq_factor": low_freq_factor,
                    "high_freq_factor": high_freq_factor,
                    "original_max_position_embeddings": original_context_tokens,
                })
            }
        };
        let first_window = config.sliding_window.iter().position(Option::is_some);
        json!({
            "architectures": [config.architecture.hugging_face_name()],
            "hidden_size": config.hidden_size,
            "intermediate_size": config.intermediate_size,
            "num_hidden_layers": config.layers,
            "num_attention_heads": config.query_heads,
            "num_key_value_heads": config.kv_heads,
            "head_dim": config.head_dim,
            "vocab_size": config.vocabulary,
            "max_position_embeddings": config.context_tokens,
            "rms_norm_eps": config.rms_norm_eps,
            "rope_theta": config.rope_theta,
            "rope_scaling": scaling,
            "sliding_window": first_window.and_then(|layer| config.sliding_window[layer]),
            "use_sliding_window": first_window.is_some(),
            "max_window_layers": first_window.unwrap_or(config.layers),
            "tie_word_embeddings": config.tied_embeddings,
            "attention_bias": config.output_bias,
            "hidden_act": "silu",
        })
    }

    /// Writes a GGUF file; matrices whose rows are whole blocks are stored as `matrices`, everything else as F32. Files of
    /// architecture `llama` get the rows of q and k in the order of interleaved RoPE, as the format wants it.
    ///
    /// # Errors
    /// What the file system or the quantiser says.
    pub fn write_gguf(&self, path: &Path, matrices: GgmlDType) -> io::Result<()> {
        use LayerTensor as T;
        let config = &self.config;
        let mut tensors = Vec::new();
        let mut add = |name: String, shape: &[usize], values: Vec<f32>| -> candle_core::Result<()> {
            let whole_blocks = shape.len() == 2 && shape[1].is_multiple_of(matrices.block_size());
            let kind = if whole_blocks { matrices } else { GgmlDType::F32 };
            let tensor = Tensor::from_vec(values, shape, &Device::Cpu)?;
            tensors.push((name, QTensor::quantize(&tensor, kind)?));
            Ok(())
        };
        for (name, shape) in shapes(config) {
            let Some((_, values)) = self.tensors.get(&name.hugging_face()) else { continue };
            let rotated = matches!(name, TensorName::Layer(_, T::Query | T::QueryBias | T::Key | T::KeyBias));
            let values = if rotated && config.architecture != Architecture::Qwen2 {
                interleaved_order(values, config.head_dim, values.len() / shape[0])
            } else {
                values.clone()
            };
            add(name.gguf(), &shape, values).map_err(io::Error::other)?;
        }
        if let RopeScaling::Factors(factors) = &config.rope_scaling {
            add("rope_freqs.weight".to_owned(), &[factors.len()], factors.clone())
                .map_err(io::Error::other)?;
        }
        let metadata = self.gguf_metadata();
        let metadata: Vec<(&str, &gguf_file::Value)> =
            metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
        let tensors: Vec<(&str, &QTensor)> =
            tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
        gguf_file::write(&mut BufWriter::new(File::create(path)?), &metadata, &tensors)
            .map_err(io::Error::other)
    }

    fn gguf_metadata(&self) -> Vec<(String, gguf_file::Value)> {
        use gguf_file::Value as V;
        let config = &self.config;
        let name = if config.architecture == Architecture::Qwen2 { "qwen2" } else { "llama" };
        let number = |n: usize| V::U32(n as u32);
        let of_model = [
            ("block_count", number(config.layers)),
            ("context_length", number(config.context_tokens)),
            ("embedding_length", number(config.hidden_size)),
            ("feed_forward_length", number(config.intermediate_size)),
            ("attention.head_count", number(config.query_heads)),
            ("attention.head_count_kv", number(config.kv_heads)),
            ("attention.key_length", number(config.head_dim)),
            ("attention.value_length", number(config.head_dim)),
            ("attention.layer_norm_rms_epsilon", V::F32(config.rms_norm_eps)),
            ("rope.freq_base", V::F32(config.rope_theta)),
            ("rope.dimension_count", number(config.head_dim)),
        ];
        let mut metadata: Vec<(String, V)> = vec![
            ("general.architecture".to_owned(), V::String(name.to_owned())),
            ("general.name".to_owned(), V::String("synthetic".to_owned())),
        ];
        metadata.extend(of_model.map(|(key, value)| (format!("{name}.{key}"), value)));
        if let RopeScaling::Linear { factor } = config.rope_scaling {
            metadata.push((format!("{name}.rope.scaling.type"), V::String("linear".to_owned())));
            metadata.push((format!("{name}.rope.scaling.factor"), V::F32(factor)));
        }
        let added = self.tokenizer.get_added_tokens_decoder();
        let ids = 0..config.vocabulary as u32;
        let token = |id: u32| self.tokenizer.id_to_token(id).unwrap_or_else(|| format!("[unused{id}]"));
        // Token types: 1 normal, 3 control.
        let kind = |id: u32| V::I32(if added.contains_key(&id) { 3 } else { 1 });
        let id = |token: &str| V::U32(self.tokenizer.token_to_id(token).unwrap_or_default());
        let of_tokenizer = [
            ("ggml.model", V::String("gpt2".to_owned())),
            ("ggml.pre", V::String("smollm".to_owned())),
            ("ggml.tokens", V::Array(ids.clone().map(|id| V::String(token(id))).collect())),
            ("ggml.token_type", V::Array(ids.map(kind).collect())),
            ("ggml.merges", V::Array(Vec::new())),
            ("ggml.bos_token_id", id(&self.begin)),
            ("ggml.eos_token_id", id(&self.end)),
            ("ggml.add_bos_token", V::Bool(true)),
        ];
        metadata.extend(of_tokenizer.map(|(key, value)| (format!("tokenizer.{key}"), value)));
        if let Some(template) = &self.chat_template {
            metadata.push(("tokenizer.chat_template".to_owned(), V::String(template.clone())));
        }
        metadata
    }
}
