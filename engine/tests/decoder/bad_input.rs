//! Every bad input is a typed error with one clear sentence.

use std::fs;
use std::path::Path;

use crate::common::{exact_kv, some_tokens};
use candle_core::quantized::GgmlDType;
use kvoyant_engine::synthetic::{Checkpoint, FolderOptions, tiny, tiny_config};
use kvoyant_engine::*;

/// What loading a path fails with; the sentence has one line and an end.
fn refused(path: &Path) -> LoadError {
    let error = Model::load(path, &LoadOptions::default()).expect_err("this must not load");
    let sentence = error.to_string();
    assert!(!sentence.contains('\n') && sentence.len() > 20, "{sentence}");
    error
}

/// A whole checkpoint in a folder that goes away with the value.
fn folder(shards: usize) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    let checkpoint = Checkpoint::random(tiny_config(), 1);
    checkpoint.write_folder(folder.path(), FolderOptions { shards, dtype: Dtype::F16 }).unwrap();
    folder
}

/// Changes config.json.
fn edit_config(folder: &Path, edit: impl FnOnce(&mut serde_json::Value)) {
    let path = folder.join("config.json");
    let mut json = serde_json::from_str(&fs::read_to_string(&path).unwrap()).unwrap();
    edit(&mut json);
    fs::write(path, json.to_string()).unwrap();
}

/// A GGUF file of the tiny model.
fn gguf(kind: GgmlDType) -> (tempfile::TempDir, std::path::PathBuf) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("model.gguf");
    Checkpoint::random(tiny_config(), 1).write_gguf(&path, kind).unwrap();
    (folder, path)
}

/// Replaces the only occurrence of some bytes.
fn patch(path: &Path, from: &[u8], to: &[u8]) {
    let mut bytes = fs::read(path).unwrap();
    let at: Vec<usize> = bytes
        .windows(from.len())
        .enumerate()
        .filter(|(_, window)| *window == from)
        .map(|(at, _)| at)
        .collect();
    assert_eq!(at.len(), 1, "the bytes to patch must be unique");
    bytes[at[0]..at[0] + to.len()].copy_from_slice(to);
    fs::write(path, bytes).unwrap();
}

#[test]
fn a_path_with_nothing_there_is_missing() {
    let error = refused(Path::new("/nonexistent/model.gguf"));
    assert!(matches!(&error, LoadError::Missing { path } if path == Path::new("/nonexistent/model.gguf")));
}

#[test]
fn a_folder_without_a_configuration_and_a_file_without_the_magic_are_no_models() {
    let folder = tempfile::tempdir().unwrap();
    assert!(matches!(refused(folder.path()), LoadError::NotAModel { .. }));
    let path = folder.path().join("poem.txt");
    for text in ["", "Tyger Tyger, burning bright"] {
        fs::write(&path, text).unwrap();
        assert!(matches!(refused(&path), LoadError::NotAModel { .. }));
    }
}

#[test]
fn a_missing_weight_file_or_shard_is_named() {
    let whole = folder(1);
    fs::remove_file(whole.path().join("model.safetensors")).unwrap();
    assert!(
        matches!(refused(whole.path()), LoadError::MissingFile { path, .. } if path.ends_with("model.safetensors"))
    );
    let sharded = folder(3);
    let shard = "model-00002-of-00003.safetensors";
    fs::remove_file(sharded.path().join(shard)).unwrap();
    assert!(matches!(refused(sharded.path()), LoadError::MissingFile { path, .. } if path.ends_with(shard)));
}

#[test]
fn a_truncated_safetensors_file_says_how_much_is_missing() {
    let folder = folder(1);
    let path = folder.path().join("model.safetensors");
    let bytes = fs::read(&path).unwrap();
    for length in [3, 100, bytes.len() - 1] {
        fs::write(&path, &bytes[..length]).unwrap();
        let error = refused(folder.path());
        let LoadError::Truncated { needed, found, .. } = error else { panic!("{error}") };
        assert_eq!(found, length as u64);
        assert!(needed > found);
    }
}

#[test]
fn a_safetensors_header_that_is_no_json_is_malformed() {
    let folder = folder(1);
    fs::write(folder.path().join("model.safetensors"), b"\x04\0\0\0\0\0\0\0oops").unwrap();
    assert!(matches!(refused(folder.path()), LoadError::Malformed { .. }));
    fs::write(folder.path().join("model.safetensors"), [0xFF; 64]).unwrap();
    assert!(matches!(refused(folder.path()), LoadError::Malformed { .. }));
}

#[test]
fn a_missing_tensor_is_named() {
    let mut checkpoint = Checkpoint::random(tiny_config(), 1);
    let name = "model.layers.2.mlp.up_proj.weight";
    checkpoint.tensors.remove(name);
    let folder = tempfile::tempdir().unwrap();
    checkpoint.write_folder(folder.path(), FolderOptions::default()).unwrap();
    assert!(matches!(refused(folder.path()), LoadError::MissingTensor { tensor, .. } if tensor == name));
    let path = folder.path().join("model.gguf");
    checkpoint.write_gguf(&path, GgmlDType::F32).unwrap();
    assert!(
        matches!(refused(&path), LoadError::MissingTensor { tensor, .. } if tensor == "blk.2.ffn_up.weight")
    );
}

#[test]
fn a_wrong_shape_names_the_tensor_and_both_shapes() {
    let folder = folder(1);
    edit_config(folder.path(), |json| json["intermediate_size"] = 300.into());
    let error = refused(folder.path());
    let LoadError::WrongShape { tensor, expected, found } = &error else { panic!("{error}") };
    assert!(tensor.contains("mlp"));
    assert_eq!(expected.iter().sum::<usize>() - 300, found.iter().sum::<usize>() - 256);
    assert!(error.to_string().contains(&format!("{found:?}")));
}

#[test]
fn a_dtype_that_is_no_float_is_refused() {
    let folder = folder(1);
    let path = folder.path().join("model.safetensors");
    let mut bytes = fs::read(&path).unwrap();
    let at = bytes.windows(3).position(|window| window == b"F16").unwrap();
    bytes[at..at + 3].copy_from_slice(b"I16");
    fs::write(&path, bytes).unwrap();
    assert!(matches!(refused(folder.path()), LoadError::UnknownDtype { dtype, .. } if dtype == "I16"));
}

#[test]
fn architectures_and_settings_that_are_not_implemented_are_named() {
    let with = |edit: &dyn Fn(&mut serde_json::Value)| {
        let folder = folder(1);
        edit_config(folder.path(), edit);
        refused(folder.path())
    };
    let error = with(&|json| json["architectures"] = serde_json::json!(["MambaForCausalLM"]));
    assert!(matches!(error, LoadError::UnknownArchitecture { name } if name == "MambaForCausalLM"));
    for (key, value) in [
        ("rope_scaling", serde_json::json!({ "rope_type": "yarn", "factor": 4.0 })),
        ("rope_scaling", serde_json::json!({ "type": "linear" })),
        ("hidden_act", "gelu".into()),
        ("mlp_bias", true.into()),
        ("partial_rotary_factor", 0.5.into()),
        ("quantization_config", serde_json::json!({ "quant_method": "gptq" })),
    ] {
        let error = with(&|json| json[key] = value.clone());
        assert!(matches!(&error, LoadError::UnsupportedConfig { key: named, .. } if named == key), "{error}");
    }
    for (key, value) in [
        ("num_attention_heads", serde_json::json!(3)),
        ("num_hidden_layers", 0.into()),
        ("num_hidden_layers", 100_000_000.into()),
        ("head_dim", 200_000_000.into()),
        ("rope_theta", (-1.0).into()),
        ("vocab_size", u64::MAX.into()),
        ("hidden_size", "wide".into()),
    ] {
        let error = with(&|json| json[key] = value.clone());
        assert!(matches!(error, LoadError::Malformed { .. }), "{key}: {error}");
    }
}

#[test]
fn a_missing_or_broken_tokenizer_is_said_to_be_so() {
    let folder = folder(1);
    let path = folder.path().join("tokenizer.json");
    fs::write(&path, "{}").unwrap();
    assert!(matches!(refused(folder.path()), LoadError::Tokenizer { .. }));
    fs::remove_file(&path).unwrap();
    assert!(matches!(refused(folder.path()), LoadError::TokenizerMissing { .. }));
}

#[test]
fn a_gguf_file_cut_anywhere_is_truncated() {
    let (_folder, path) = gguf(GgmlDType::Q8_0);
    let bytes = fs::read(&path).unwrap();
    for length in [4, 23, 200, 5000, bytes.len() / 2, bytes.len() - 32] {
        fs::write(&path, &bytes[..length]).unwrap();
        let error = refused(&path);
        assert!(
            matches!(error, LoadError::Truncated { found, .. } if found == length as u64),
            "{length}: {error}"
        );
    }
}

#[test]
fn a_gguf_file_of_another_version_architecture_type_or_tokenizer_is_refused() {
    let (_folder, path) = gguf(GgmlDType::F32);
    let whole = fs::read(&path).unwrap();
    let change = |from: &[u8], to: &[u8]| {
        fs::write(&path, &whole).unwrap();
        patch(&path, from, to);
        refused(&path)
    };
    assert!(matches!(change(b"GGUF\x02", b"GGUF\x07"), LoadError::Malformed { .. }));
    let error = change(b"\x05\0\0\0\0\0\0\0llama", b"\x05\0\0\0\0\0\0\0mamba");
    assert!(matches!(error, LoadError::UnknownArchitecture { name } if name == "mamba"));
    // After a norm's name: one dimension of 128, then the type.
    let entry =
        |kind: u8| [b"output_norm.weight\x01\0\0\0\x80\0\0\0\0\0\0\0".as_slice(), &[kind, 0, 0, 0]].concat();
    let error = change(&entry(0), &entry(99));
    assert!(matches!(error, LoadError::UnknownGgmlType { tensor, id: 99 } if tensor == "output_norm.weight"));
    let error = change(b"\x04\0\0\0\0\0\0\0gpt2", b"\x04\0\0\0\0\0\0\0bert");
    assert!(matches!(error, LoadError::UnsupportedTokenizer { kind } if kind == "bert"));
    let error = change(b"\x06\0\0\0\0\0\0\0smollm", b"\x06\0\0\0\0\0\0\0strang");
    assert!(matches!(error, LoadError::UnsupportedTokenizer { kind } if kind.contains("strang")));
    let error = change(b"tokenizer.ggml.model", b"tokenizer.ggml.mudel");
    assert!(matches!(error, LoadError::TokenizerMissing { .. }));
    let error = change(b"llama.block_count", b"llama.black_count");
    assert!(matches!(error, LoadError::MissingKey { key, .. } if key == "llama.block_count"));
    let error = change(b"blk.0.ffn_down.weight\x02", b"blk.0.ffn_down.weight\x09");
    assert!(matches!(error, LoadError::Malformed { .. }));
}

#[test]
fn a_checksum_is_compared_before_anything_is_believed() {
    let (_folder, path) = gguf(GgmlDType::F32);
    let sum = sha256_file(&path).unwrap();
    let load = |sha256: &str| {
        Model::load(&path, &LoadOptions { sha256: Some(sha256.to_owned()), ..LoadOptions::default() })
    };
    assert!(load(&sum.to_uppercase()).is_ok());
    let wrong = "0".repeat(64);
    let error = load(&wrong).unwrap_err();
    assert!(
        matches!(error, LoadError::Checksum { expected, found, .. } if expected == wrong && found == sum)
    );
    fs::write(&path, "abc").unwrap();
    assert_eq!(
        sha256_file(&path).unwrap(),
        "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    );
}

#[test]
fn prompts_that_do_not_fit_and_tokens_that_do_not_exist_are_refused_without_harm() {
    let config = ModelConfig { context_tokens: 20, ..tiny_config() };
    let model = Checkpoint::random(config, 1).model(WeightsMode::F32);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut kv = exact_kv(&model);
    let mut sequence = kv.sequence();
    let mut prefill = |kv: &mut DenseKv, sequence: &mut DenseSequence, tokens: &[u32]| {
        decoder.prefill(kv, sequence, tokens, PrefillOptions::default())
    };
    let error = prefill(&mut kv, &mut sequence, &some_tokens(21, 1)).unwrap_err();
    assert!(matches!(error, ForwardError::ContextExceeded { tokens: 21, context: 20 }));
    let error = prefill(&mut kv, &mut sequence, &[1, 260]).unwrap_err();
    assert!(matches!(error, ForwardError::TokenOutOfVocabulary { token: 260, vocabulary: 260 }));
    assert!(matches!(prefill(&mut kv, &mut sequence, &[]), Err(ForwardError::BatchMismatch { .. })));
    assert_eq!(kv.tokens(&sequence), 0);
    prefill(&mut kv, &mut sequence, &some_tokens(20, 1)).unwrap();
    let error = decoder.step(&mut kv, &mut [&mut sequence], &[1]).unwrap_err();
    assert!(matches!(error, ForwardError::ContextExceeded { tokens: 21, context: 20 }));
    assert!(matches!(
        decoder.step(&mut kv, &mut [&mut sequence], &[]),
        Err(ForwardError::BatchMismatch { .. })
    ));
}

#[test]
fn a_prefill_can_be_stopped_between_chunks() {
    let model = tiny(1);
    let mut decoder =
        Decoder::new(model.clone(), DecoderOptions { chunk_tokens: 8, ..DecoderOptions::default() });
    let mut kv = exact_kv(&model);
    let mut sequence = kv.sequence();
    let mut seen = Vec::new();
    let mut progress = |done, total| {
        seen.push((done, total));
        if done < 16 { std::ops::ControlFlow::Continue(()) } else { std::ops::ControlFlow::Break(()) }
    };
    let options = PrefillOptions { progress: Some(&mut progress), ..PrefillOptions::default() };
    let error = decoder.prefill(&mut kv, &mut sequence, &some_tokens(40, 1), options).unwrap_err();
    assert!(matches!(error, ForwardError::Interrupted { done: 16, total: 40 }));
    assert_eq!(seen, [(8, 40), (16, 40)]);
    assert_eq!(kv.tokens(&sequence), 16);
}
