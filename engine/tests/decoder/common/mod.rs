//! What several tests need.

use std::sync::Arc;

use kvoyant_engine::synthetic::{Checkpoint, tiny_config};
use kvoyant_engine::*;

/// Some tokens of the byte-level vocabulary.
pub(crate) fn some_tokens(count: usize, seed: u64) -> Vec<u32> {
    let mut random = SplitMix64::new(seed);
    (0..count).map(|_| random.below(256) as u32).collect()
}

/// A backend in f32, so that nothing is rounded.
pub(crate) fn exact_kv(model: &Model) -> DenseKv {
    DenseKv::new(KvShape::new(model.config(), Dtype::F32))
}

/// Logits of every token of a prompt, prefilled in chunks.
pub(crate) fn all_logits(model: &Arc<Model>, tokens: &[u32], chunk_tokens: usize) -> Vec<Vec<f32>> {
    let mut decoder =
        Decoder::new(model.clone(), DecoderOptions { chunk_tokens, ..DecoderOptions::default() });
    let mut kv = exact_kv(model);
    let mut sequence = kv.sequence();
    let mut all = Vec::new();
    let mut take = |index: usize, logits: &[f32]| {
        assert_eq!(index, all.len());
        all.push(logits.to_vec());
    };
    let options = PrefillOptions { logits: Logits::Each(&mut take), ..PrefillOptions::default() };
    let last = decoder.prefill(&mut kv, &mut sequence, tokens, options).unwrap();
    assert_eq!(all.last(), Some(&last));
    all
}

/// Largest difference of two vectors.
pub(crate) fn worst(a: &[f32], b: &[f32]) -> f32 {
    assert_eq!(a.len(), b.len());
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
}

/// Checkpoints of every family, with what sets them apart.
pub(crate) fn families() -> [Checkpoint; 3] {
    let llama = ModelConfig {
        rope_scaling: RopeScaling::Llama3 {
            factor: 8.0,
            low_freq_factor: 1.0,
            high_freq_factor: 4.0,
            original_context_tokens: 256,
        },
        ..tiny_config()
    };
    let mistral = ModelConfig {
        architecture: Architecture::Mistral,
        sliding_window: vec![Some(4096); llama.layers],
        rope_scaling: RopeScaling::None,
        ..tiny_config()
    };
    let qwen2 = ModelConfig {
        architecture: Architecture::Qwen2,
        qkv_bias: true,
        tied_embeddings: true,
        rope_theta: 1_000_000.0,
        ..tiny_config()
    };
    [llama, mistral, qwen2].map(|config| Checkpoint::random(config, 3))
}
