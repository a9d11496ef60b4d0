//! GGUF files of models.

use std::cell::RefCell;
use std::io::{Seek, Write};

use kvoyant_engine::{
    Decoder, DecoderOptions, DenseKv, Dtype, KvShape, LoadOptions, Model, PrefillOptions, WeightsMode,
};
use tempfile::NamedTempFile;

/// Any file is a model or a sentence that says what is wrong; a model that loads takes a text, and computes.
///
/// # Panics
/// If it does not.
pub fn run(bytes: &[u8]) {
    thread_local!(static FILE: RefCell<NamedTempFile> = RefCell::new(NamedTempFile::new().expect("a file")));
    FILE.with_borrow_mut(|file| {
        file.as_file_mut().set_len(0).expect("an empty file");
        file.rewind().expect("its beginning");
        file.write_all(bytes).expect("a file");
        let options = LoadOptions { weights: WeightsMode::Auto, sha256: None };
        let model = match Model::load(file.path(), &options) {
            Ok(model) => model,
            Err(error) => return assert!(!error.to_string().is_empty()),
        };
        let Ok(tokens) = model.tokenizer().encode("ab a", true) else { return };
        let _ = model.tokenizer().decode(&tokens);
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        let mut kv = DenseKv::new(KvShape::new(model.config(), Dtype::F16));
        let mut sequence = kv.sequence();
        if let Ok(logits) = decoder.prefill(&mut kv, &mut sequence, &tokens, PrefillOptions::default()) {
            assert_eq!(logits.len(), model.config().vocabulary);
        }
    });
}

/// A file under construction.
#[derive(Default)]
struct Gguf {
    metadata: Vec<u8>,
    keys: u64,
    tensors: Vec<(String, Vec<u64>)>,
}

impl Gguf {
    fn text(into: &mut Vec<u8>, text: &str) {
        into.extend_from_slice(&(text.len() as u64).to_le_bytes());
        into.extend_from_slice(text.as_bytes());
    }

    fn key(&mut self, key: &str, kind: u32, value: &[u8]) {
        Self::text(&mut self.metadata, key);
        self.metadata.extend_from_slice(&kind.to_le_bytes());
        self.metadata.extend_from_slice(value);
        self.keys += 1;
    }

    fn string(&mut self, key: &str, value: &str) {
        let mut bytes = Vec::new();
        Self::text(&mut bytes, value);
        self.key(key, 8, &bytes);
    }

    fn number(&mut self, key: &str, value: u32) {
        self.key(key, 4, &value.to_le_bytes());
    }

    fn strings(&mut self, key: &str, values: &[&str]) {
        let mut bytes = 8_u32.to_le_bytes().to_vec();
        bytes.extend_from_slice(&(values.len() as u64).to_le_bytes());
        values.iter().for_each(|value| Self::text(&mut bytes, value));
        self.key(key, 9, &bytes);
    }

    /// The file, all of whose tensors are f32 and small.
    fn bytes(&self) -> Vec<u8> {
        let mut out = b"GGUF".to_vec();
        out.extend_from_slice(&3_u32.to_le_bytes());
        out.extend_from_slice(&(self.tensors.len() as u64).to_le_bytes());
        out.extend_from_slice(&self.keys.to_le_bytes());
        out.extend_from_slice(&self.metadata);
        let mut offset = 0_u64;
        for (name, shape) in &self.tensors {
            Self::text(&mut out, name);
            out.extend_from_slice(&(shape.len() as u32).to_le_bytes());
            shape.iter().rev().for_each(|side| out.extend_from_slice(&side.to_le_bytes()));
            out.extend_from_slice(&0_u32.to_le_bytes());
            out.extend_from_slice(&offset.to_le_bytes());
            offset += (shape.iter().product::<u64>() * 4).next_multiple_of(32);
        }
        out.resize(out.len().next_multiple_of(32), 0);
        out.extend((0..offset / 4).flat_map(|at| (at as f32 / 100.0).to_le_bytes()));
        out
    }
}

/// A model of one layer and six tokens, with each kind of tokenizer.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    ["llama", "qwen2"].map(small).to_vec()
}

fn small(architecture: &str) -> Vec<u8> {
    let mut file = Gguf::default();
    file.string("general.architecture", architecture);
    for (suffix, value) in [
        ("block_count", 1),
        ("context_length", 16),
        ("embedding_length", 4),
        ("feed_forward_length", 4),
        ("attention.head_count", 2),
        ("attention.head_count_kv", 1),
    ] {
        file.number(&format!("{architecture}.{suffix}"), value);
    }
    let epsilon = format!("{architecture}.attention.layer_norm_rms_epsilon");
    file.key(&epsilon, 6, &1e-5_f32.to_le_bytes());
    let spm = architecture == "llama";
    file.string("tokenizer.ggml.model", if spm { "llama" } else { "gpt2" });
    let tokens: [&str; 6] = if spm {
        ["<unk>", "<s>", "\u{2581}", "a", "b", "ab"]
    } else {
        ["<|endoftext|>", "!", "\u{120}", "a", "b", "ab"]
    };
    file.strings("tokenizer.ggml.tokens", &tokens);
    if spm {
        file.number("tokenizer.ggml.unknown_token_id", 0);
        file.number("tokenizer.ggml.bos_token_id", 1);
        file.string("tokenizer.chat_template", "{{ messages[0].content }}");
    } else {
        file.string("tokenizer.ggml.pre", "qwen2");
        file.strings("tokenizer.ggml.merges", &["a b"]);
        file.number("tokenizer.ggml.eos_token_id", 0);
    }
    let (hidden, kv) = (4, 2);
    for (name, shape) in [
        ("token_embd.weight", vec![6, hidden]),
        ("output_norm.weight", vec![hidden]),
        ("blk.0.attn_norm.weight", vec![hidden]),
        ("blk.0.attn_q.weight", vec![hidden, hidden]),
        ("blk.0.attn_k.weight", vec![kv, hidden]),
        ("blk.0.attn_v.weight", vec![kv, hidden]),
        ("blk.0.attn_output.weight", vec![hidden, hidden]),
        ("blk.0.ffn_norm.weight", vec![hidden]),
        ("blk.0.ffn_gate.weight", vec![4, hidden]),
        ("blk.0.ffn_up.weight", vec![4, hidden]),
        ("blk.0.ffn_down.weight", vec![hidden, 4]),
    ] {
        file.tensors.push((name.to_owned(), shape));
    }
    file.bytes()
}
