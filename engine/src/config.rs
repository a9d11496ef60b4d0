//! What a model's files say about its shape.

/// Family of checkpoints; it decides tensor names, biases and windows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Architecture {
    /// `LlamaForCausalLM`, GGUF `llama`.
    Llama,
    /// `MistralForCausalLM`: Llama with a sliding window.
    Mistral,
    /// `Qwen2ForCausalLM`, GGUF `qwen2`: Llama with biases on q, k and v.
    Qwen2,
}

impl Architecture {
    /// The name in config.json.
    pub fn hugging_face_name(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
        }
    }
}

/// How the rotary frequencies differ from `theta^(-2j/d)`.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// Not at all.
    None,
    /// Every frequency divided by `factor` (position interpolation, Chen et al. 2023).
    Linear {
        /// Divisor of every frequency.
        factor: f32,
    },
    /// Llama 3.1: long wavelengths divided by `factor`, short ones kept, a ramp between.
    Llama3 {
        /// Divisor of the low frequencies.
        factor: f32,
        /// Wavelengths above `original_context_tokens / low_freq_factor` are divided.
        low_freq_factor: f32,
        /// Wavelengths below `original_context_tokens / high_freq_factor` are kept.
        high_freq_factor: f32,
        /// Context of the pre-training.
        original_context_tokens: usize,
    },
    /// One divisor per frequency, `[head_dim / 2]` (GGUF `rope_freqs.weight`).
    Factors(Vec<f32>),
}

/// Shape and constants of a model.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Family.
    pub architecture: Architecture,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward.
    pub intermediate_size: usize,
    /// Decoder layers.
    pub layers: usize,
    /// Query heads per layer.
    pub query_heads: usize,
    /// KV heads per layer; divides `query_heads`.
    pub kv_heads: usize,
    /// Values per head.
    pub head_dim: usize,
    /// Rows of the embedding.
    pub vocabulary: usize,
    /// Positions that the model was trained for.
    pub context_tokens: usize,
    /// ε of the RMS norms.
    pub rms_norm_eps: f32,
    /// Base of the rotary frequencies.
    pub rope_theta: f32,
    /// Deviation of the rotary frequencies.
    pub rope_scaling: RopeScaling,
    /// Per layer: attention reaches back this many tokens, the current one included; `None` is all.
    pub sliding_window: Vec<Option<usize>>,
    /// The output matrix is the embedding.
    pub tied_embeddings: bool,
    /// q, k and v have biases.
    pub qkv_bias: bool,
    /// The attention output has a bias.
    pub output_bias: bool,
}

impl ModelConfig {
    /// Query heads per KV head.
    pub fn group(&self) -> usize {
        self.query_heads / self.kv_heads
    }

    /// Values of all query heads of a token.
    pub fn query_width(&self) -> usize {
        self.query_heads * self.head_dim
    }

    /// Values of all KV heads of a token, of K or of V.
    pub fn kv_width(&self) -> usize {
        self.kv_heads * self.head_dim
    }

    /// First token that position `position` may attend to in `layer`.
    pub fn first_visible(&self, layer: usize, position: usize) -> usize {
        self.sliding_window[layer].map_or(0, |window| (position + 1).saturating_sub(window))
    }
}
