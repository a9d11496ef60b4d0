//! A Llama from a GGUF file, as one writes it with candle. Its attention is [`KvPass::attend`]: no cache, no mask, no repeated heads.

use std::io::{Read, Seek};

use candle_core::quantized::{QMatMul, gguf_file};
use candle_core::{D, Device, IndexOp, Module, Result, Tensor, bail};
use candle_nn::Embedding;
use candle_nn::rotary_emb::rope_i;
use candle_transformers::quantized_nn::RmsNorm;
use kvoyant_engine::candle::KvPass;
use kvoyant_engine::{Dtype, KvBackend, KvShape};

struct Layer {
    attention_norm: RmsNorm,
    query: QMatMul,
    key: QMatMul,
    value: QMatMul,
    output: QMatMul,
    feed_forward_norm: RmsNorm,
    gate: QMatMul,
    up: QMatMul,
    down: QMatMul,
}

/// The model.
pub(crate) struct Llama {
    embedding: Embedding,
    layers: Vec<Layer>,
    norm: RmsNorm,
    head: QMatMul,
    /// `[positions, head_dim / 2]`.
    cos: Tensor,
    sin: Tensor,
    shape: KvShape,
}

impl Llama {
    /// Reads a GGUF file of architecture `llama`.
    pub(crate) fn load<R: Read + Seek>(content: &gguf_file::Content, file: &mut R) -> Result<Self> {
        let Some(architecture) = content.metadata.get("general.architecture") else {
            bail!("the file does not name its architecture");
        };
        if architecture.to_string()? != "llama" {
            bail!("architecture {architecture:?}: this example has `llama` only");
        }
        let number = |key: &str| match content.metadata.get(key) {
            Some(value) => Ok(value.to_u32()? as usize),
            None => bail!("the file does not say {key}"),
        };
        let real = |key: &str, default: f32| match content.metadata.get(key) {
            Some(value) => value.to_f32(),
            None => Ok(default),
        };
        let hidden = number("llama.embedding_length")?;
        let query_heads = number("llama.attention.head_count")?;
        let layers = number("llama.block_count")?;
        let head_dim = hidden / query_heads.max(1);
        let epsilon = f64::from(real("llama.attention.layer_norm_rms_epsilon", 1e-5)?);
        let theta = real("llama.rope.freq_base", 10_000.0)?;
        let shape = KvShape {
            layers,
            query_heads,
            kv_heads: number("llama.attention.head_count_kv")?,
            head_dim,
            sliding_window: vec![None; layers],
            // As candle's own cache has it. F16 takes half the memory, and rounds.
            format: Dtype::F32.into(),
        };

        let frequencies: Vec<f32> =
            (0..head_dim).step_by(2).map(|i| theta.powf(i as f32 / head_dim as f32).recip()).collect();
        let positions = number("llama.context_length")?;
        let angles: Vec<f32> =
            (0..positions).flat_map(|t| frequencies.iter().map(move |f| t as f32 * f)).collect();
        let angles = Tensor::from_vec(angles, (positions, head_dim / 2), &Device::Cpu)?;

        let mut tensor = |name: &str| content.tensor(file, name, &Device::Cpu);
        let embedding = tensor("token_embd.weight")?;
        let rows = embedding.dequantize(&Device::Cpu)?;
        let head = if content.tensor_infos.contains_key("output.weight") {
            tensor("output.weight")?
        } else {
            embedding
        };
        let norm = RmsNorm::from_qtensor(tensor("output_norm.weight")?, epsilon)?;
        let layers = (0..layers)
            .map(|i| {
                let mut weights = |name: &str| tensor(&format!("blk.{i}.{name}.weight"));
                Ok(Layer {
                    attention_norm: RmsNorm::from_qtensor(weights("attn_norm")?, epsilon)?,
                    query: QMatMul::from_qtensor(weights("attn_q")?)?,
                    key: QMatMul::from_qtensor(weights("attn_k")?)?,
                    value: QMatMul::from_qtensor(weights("attn_v")?)?,
                    output: QMatMul::from_qtensor(weights("attn_output")?)?,
                    feed_forward_norm: RmsNorm::from_qtensor(weights("ffn_norm")?, epsilon)?,
                    gate: QMatMul::from_qtensor(weights("ffn_gate")?)?,
                    up: QMatMul::from_qtensor(weights("ffn_up")?)?,
                    down: QMatMul::from_qtensor(weights("ffn_down")?)?,
                })
            })
            .collect::<Result<_>>()?;
        Ok(Self {
            embedding: Embedding::new(rows, hidden),
            layers,
            norm,
            head: QMatMul::from_qtensor(head)?,
            cos: angles.cos()?,
            sin: angles.sin()?,
            shape,
        })
    }

    /// What a backend must know of it.
    pub(crate) fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// Logits of each sequence's last token, `[batch, vocabulary]`, of `tokens` `[batch, T]`. The pass says where each sequence is.
    pub(crate) fn forward<B: KvBackend>(&self, tokens: &Tensor, mut pass: KvPass<'_, B>) -> Result<Tensor> {
        let count = tokens.dim(1)?;
        let mut x = self.embedding.forward(tokens)?;
        for (i, layer) in self.layers.iter().enumerate() {
            // The next layer's query, predicted from this layer's input, gives the daemon a whole layer's time to fetch its rows.
            if let Some(next) = self.layers.get(i + 1)
                && pass.wants_hint(i + 1)
            {
                let query = next.query.forward(&next.attention_norm.forward(&x)?)?;
                let query = self.heads(&query, self.shape.query_heads)?;
                pass.hint(i + 1, &self.rotate(&query, pass.positions())?)?;
            }
            let normed = layer.attention_norm.forward(&x)?;
            let q = self.heads(&layer.query.forward(&normed)?, self.shape.query_heads)?;
            let k = self.heads(&layer.key.forward(&normed)?, self.shape.kv_heads)?;
            let v = self.heads(&layer.value.forward(&normed)?, self.shape.kv_heads)?;
            let q = self.rotate(&q, pass.positions())?;
            let k = self.rotate(&k, pass.positions())?;

            let attended = pass.attend(i, &q, &k, &v)?;

            let attended = attended.transpose(1, 2)?.flatten_from(2)?;
            x = (x + layer.output.forward(&attended)?)?;
            let normed = layer.feed_forward_norm.forward(&x)?;
            let gated =
                (candle_nn::ops::silu(&layer.gate.forward(&normed)?)? * layer.up.forward(&normed)?)?;
            x = (x + layer.down.forward(&gated)?)?;
        }
        pass.finish()?;
        let last = self.norm.forward(&x.i((.., count - 1, ..))?.contiguous()?)?;
        self.head.forward(&last)
    }

    /// `[batch, T, heads · d]` to `[batch, heads, T, d]`.
    fn heads(&self, x: &Tensor, heads: usize) -> Result<Tensor> {
        let (batch, count, _) = x.dims3()?;
        x.reshape((batch, count, heads, self.shape.head_dim))?.transpose(1, 2)?.contiguous()
    }

    /// RoPE, each sequence from its own position on.
    fn rotate(&self, x: &Tensor, positions: &[usize]) -> Result<Tensor> {
        let count = x.dim(D::Minus2)?;
        let of = |table: &Tensor| {
            let rows =
                positions.iter().map(|first| table.narrow(0, *first, count)).collect::<Result<Vec<_>>>()?;
            Tensor::stack(&rows, 0)
        };
        rope_i(x, &of(&self.cos)?, &of(&self.sin)?)
    }
}

/// The most probable token of each row of logits.
pub(crate) fn most_probable(logits: &Tensor) -> Result<Vec<u32>> {
    logits.argmax(D::Minus1)?.to_vec1()
}
