//! Tokenizers from files, text while it is generated, and the generation loop.

use std::collections::HashMap;
use std::ops::ControlFlow;

use kvoyant_engine::synthetic::{Checkpoint, FolderOptions, tiny, tiny_config};
use kvoyant_engine::*;
use proptest::prelude::*;

/// Text that has every kind of trouble: several scripts, digits, contractions, runs of spaces, a special token.
const TEXT: &str = "Hello'Ve world 123\n\n  foo — Grüße, 世界! 🦀 it's 2048<|end|>";

/// Written to disk and read back.
fn from_folder(checkpoint: &Checkpoint) -> (tempfile::TempDir, std::sync::Arc<Model>) {
    let folder = tempfile::tempdir().unwrap();
    checkpoint.write_folder(folder.path(), FolderOptions::default()).unwrap();
    let model = Model::load(folder.path(), &LoadOptions::default()).unwrap();
    (folder, model)
}

#[test]
fn a_text_comes_back_from_its_tokens() {
    let (_folder, model) = from_folder(&Checkpoint::random(tiny_config(), 1));
    let tokenizer = model.tokenizer();
    let tokens = tokenizer.encode(TEXT, false).unwrap();
    assert_eq!(tokens.last(), tokenizer.id("<|end|>").as_ref());
    assert_eq!(tokenizer.decode(&tokens).unwrap(), TEXT.trim_end_matches("<|end|>"));
    assert_eq!(tokenizer.begin(), tokenizer.id("<|begin|>"));
    assert!(tokenizer.is_end(257) && !tokenizer.is_end(256));
    assert_eq!(tokenizer.token(65).as_deref(), Some("A"));
}

#[test]
fn a_folder_keeps_its_chat_template() {
    let (folder, model) = from_folder(&Checkpoint::random(tiny_config(), 1));
    let chat = [Message::system("Be brief."), Message::user("Hi")];
    let text = model.chat_template().unwrap().render(&chat, true).unwrap();
    assert_eq!(text, "<|begin|><|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>");
    // The template may also lie in a file of its own.
    std::fs::write(folder.path().join("tokenizer_config.json"), r#"{"eos_token": "<|end|>"}"#).unwrap();
    std::fs::write(folder.path().join("chat_template.jinja"), "{{ messages[0].content }}{{ eos_token }}")
        .unwrap();
    let model = Model::load(folder.path(), &LoadOptions::default()).unwrap();
    assert_eq!(model.chat_template().unwrap().render(&chat, true).unwrap(), "Be brief.<|end|>");
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]
    #[test]
    fn streamed_text_is_the_whole_text_and_never_half_a_character(text in "\\PC{0,40}") {
        let model = TINY.with(Clone::clone);
        let tokens = model.tokenizer().encode(&text, false).unwrap();
        let mut stream = model.tokenizer().stream();
        let mut streamed = String::new();
        for token in &tokens {
            let piece = stream.push(*token).unwrap();
            prop_assert!(text.contains('\u{FFFD}') || !piece.contains('\u{FFFD}'), "{piece:?}");
            streamed.push_str(&piece);
        }
        streamed.push_str(&stream.finish().unwrap());
        prop_assert_eq!(streamed, model.tokenizer().decode(&tokens).unwrap());
    }
}

thread_local! {
    static TINY: std::sync::Arc<Model> = tiny(1);
}

#[test]
fn what_never_becomes_a_character_comes_at_the_end_with_a_mark() {
    let model = tiny(1);
    let mut stream = model.tokenizer().stream();
    assert_eq!(stream.push(b'a'.into()).unwrap(), "a");
    assert_eq!(stream.push(0xE4).unwrap(), "");
    assert_eq!(stream.finish().unwrap(), "\u{FFFD}");
}

/// Greedy text of a tiny model, with its own chat template.
fn answer(options: GenerateOptions, stop_after: usize) -> (Generated, String) {
    let model = tiny(2);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut kv = DenseKv::new(KvShape::new(model.config(), Dtype::F16));
    let mut sequence = kv.sequence();
    let prompt = model.chat_template().unwrap().render(&[Message::user("Hi")], true).unwrap();
    let prompt = model.tokenizer().encode(&prompt, false).unwrap();
    assert_eq!(prompt[0], model.tokenizer().begin().unwrap());
    let logits = decoder.prefill(&mut kv, &mut sequence, &prompt, PrefillOptions::default()).unwrap();
    let mut streamed = String::new();
    let mut calls = 0;
    let mut on_text = |text: &str, _: &StepTiming| {
        streamed.push_str(text);
        calls += 1;
        if calls < stop_after { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    };
    let read = Prompt { tokens: &prompt, logits };
    let answer =
        generate(&mut decoder, &mut kv, &mut sequence, read, &mut Sampler::greedy(), options, &mut on_text);
    (answer.unwrap(), streamed)
}

#[test]
fn an_answer_streams_the_text_it_returns_and_stops_where_it_is_told() {
    let options = GenerateOptions { max_tokens: 12, ignore_end: true };
    let (whole, streamed) = answer(options, usize::MAX);
    assert_eq!(whole.tokens.len(), 12);
    assert_eq!(whole.stop, StopReason::MaxTokens);
    assert_eq!(whole.steps, 11);
    assert_eq!(whole.text, streamed);
    let (short, _) = answer(options, 3);
    assert_eq!(short.stop, StopReason::Interrupted);
    assert_eq!(short.tokens, whole.tokens[..3]);
}

/// A GGUF header with a vocabulary of our own: the tiny model's file with other tokenizer metadata.
fn gguf_with(
    edit: impl FnOnce(&mut HashMap<String, candle_core::quantized::gguf_file::Value>),
    vocabulary: usize,
) -> Result<std::sync::Arc<Model>, LoadError> {
    use candle_core::quantized::{GgmlDType, gguf_file};
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    let config = ModelConfig {
        vocabulary: 260.max(vocabulary),
        layers: 1,
        sliding_window: vec![None],
        ..tiny_config()
    };
    let mut checkpoint = Checkpoint::random(config, 1);
    checkpoint.config.vocabulary = vocabulary;
    for (shape, values) in checkpoint.tensors.values_mut() {
        if shape[0] == 260.max(vocabulary) && shape.len() == 2 {
            shape[0] = vocabulary;
            values.truncate(vocabulary * shape[1]);
        }
    }
    checkpoint.write_gguf(&path, GgmlDType::F32).unwrap();
    let mut file = std::fs::File::open(&path).unwrap();
    let content = gguf_file::Content::read(&mut file).unwrap();
    let tensors: Vec<_> = content
        .tensor_infos
        .keys()
        .map(|name| (name.clone(), content.tensor(&mut file, name, &candle_core::Device::Cpu).unwrap()))
        .collect();
    let mut metadata = content.metadata.clone();
    edit(&mut metadata);
    let metadata: Vec<_> = metadata.iter().map(|(key, value)| (key.as_str(), value)).collect();
    let tensors: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
    gguf_file::write(&mut std::fs::File::create(&path).unwrap(), &metadata, &tensors).unwrap();
    Model::load(&path, &LoadOptions::default())
}

/// How a text is cut by a GGUF file's pre-tokenizer, over a vocabulary in which whole words are tokens only if the cut allows them.
fn pieces(pre: &str, text: &str) -> Vec<String> {
    use candle_core::quantized::gguf_file::Value;
    let model = gguf_with(
        |metadata| {
            let mut tokens = match &metadata["tokenizer.ggml.tokens"] {
                Value::Array(tokens) => tokens.clone(),
                _ => panic!("tokens are a list"),
            };
            // Digits join to pairs and triples, letters to "ab", and a space ("Ġ") with a digit.
            let extra = ["11", "111", "ab", "Ġ1"];
            tokens.truncate(260);
            tokens.extend(extra.map(|token| Value::String(token.to_owned())));
            metadata.insert("tokenizer.ggml.tokens".to_owned(), Value::Array(tokens));
            metadata.insert(
                "tokenizer.ggml.token_type".to_owned(),
                Value::Array(
                    (0..264).map(|id| Value::I32(if (256..260).contains(&id) { 3 } else { 1 })).collect(),
                ),
            );
            let merges = ["Ġ 1", "1 1", "11 1", "a b"];
            metadata.insert(
                "tokenizer.ggml.merges".to_owned(),
                Value::Array(merges.map(|merge| Value::String(merge.to_owned())).into()),
            );
            metadata.insert("tokenizer.ggml.pre".to_owned(), Value::String(pre.to_owned()));
        },
        264,
    )
    .unwrap();
    let tokens = model.tokenizer().encode(text, false).unwrap();
    assert_eq!(model.tokenizer().decode(&tokens).unwrap(), text);
    tokens.iter().map(|token| model.tokenizer().token(*token).unwrap()).collect()
}

#[test]
fn each_pre_tokenizer_cuts_digits_in_its_own_way() {
    let text = "ab 1111";
    assert_eq!(pieces("smollm", text), ["ab", "Ġ", "1", "1", "1", "1"]);
    assert_eq!(pieces("qwen2", text), ["ab", "Ġ", "1", "1", "1", "1"]);
    assert_eq!(pieces("llama-bpe", text), ["ab", "Ġ", "111", "1"]);
    assert_eq!(pieces("default", text), ["ab", "Ġ1", "111"]);
}

#[test]
fn a_sentence_piece_vocabulary_joins_by_score_and_falls_back_to_bytes() {
    use candle_core::quantized::gguf_file::Value;
    let mut tokens: Vec<String> = ["<unk>", "<s>", "</s>"].map(str::to_owned).into();
    tokens.extend((0..=255u8).map(|byte| format!("<0x{byte:02X}>")));
    let words =
        [("▁", -10.0), ("a", -11.0), ("b", -12.0), ("c", -13.0), ("bc", -1.0), ("ab", -2.0), ("▁a", -3.0)];
    tokens.extend(words.iter().map(|(word, _)| (*word).to_owned()));
    let scores = std::iter::repeat_n(0.0, 259).chain(words.iter().map(|(_, score)| *score));
    let kinds = (0..tokens.len()).map(|id| match id {
        0 => 2,
        1 | 2 => 3,
        3..259 => 6,
        _ => 1,
    });
    let count = tokens.len();
    let model = gguf_with(
        |metadata| {
            let mut set = |key: &str, value| metadata.insert(format!("tokenizer.ggml.{key}"), value);
            set("scores", Value::Array(scores.map(Value::F32).collect()));
            set("token_type", Value::Array(kinds.map(Value::I32).collect()));
            set("tokens", Value::Array(tokens.into_iter().map(Value::String).collect()));
            set("model", Value::String("llama".to_owned()));
            set("unknown_token_id", Value::U32(0));
            set("bos_token_id", Value::U32(1));
            set("eos_token_id", Value::U32(2));
        },
        count,
    )
    .unwrap();
    let tokenizer = model.tokenizer();
    let written = |text: &str| -> Vec<String> {
        tokenizer.encode(text, true).unwrap().iter().map(|token| tokenizer.token(*token).unwrap()).collect()
    };
    // "bc" has the best score, so "ab" never forms.
    assert_eq!(written("abc"), ["<s>", "▁a", "bc"]);
    assert_eq!(written("é"), ["<s>", "▁", "<0xC3>", "<0xA9>"]);
    let tokens = tokenizer.encode("abc é abc", false).unwrap();
    assert_eq!(tokenizer.decode(&tokens).unwrap(), "abc é abc");
}
