//! The same model from every kind of file.

use crate::common::{all_logits, families, some_tokens, worst};
use candle_core::quantized::GgmlDType;
use kvoyant_engine::synthetic::{Checkpoint, FolderOptions, tiny_config};
use kvoyant_engine::*;

fn load(path: &std::path::Path) -> std::sync::Arc<Model> {
    Model::load(path, &LoadOptions::default()).unwrap()
}

#[test]
fn a_gguf_file_equals_its_safetensors_twin() {
    let tokens = some_tokens(50, 1);
    for mut checkpoint in families() {
        // GGUF knows Mistral as llama, without a window, and Llama 3's scaling as a tensor of factors.
        checkpoint.config.sliding_window.fill(None);
        if checkpoint.config.architecture == Architecture::Mistral {
            checkpoint.config.architecture = Architecture::Llama;
        }
        if let RopeScaling::Llama3 { .. } = checkpoint.config.rope_scaling {
            let scaled = checkpoint.model(WeightsMode::F32);
            let plain = Checkpoint::random(tiny_config(), 0).model(WeightsMode::F32);
            let frequencies =
                plain.rope().inverse_frequencies().iter().zip(scaled.rope().inverse_frequencies());
            checkpoint.config.rope_scaling =
                RopeScaling::Factors(frequencies.map(|(f, by)| f / by).collect());
        }
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.gguf");
        checkpoint.write_gguf(&path, GgmlDType::F32).unwrap();
        let model = load(&path);
        assert_eq!(model.config(), &checkpoint.config);
        assert!(!model.decodes_quantised());
        let twin = checkpoint.model(WeightsMode::F32);
        assert_eq!(all_logits(&model, &tokens, 512), all_logits(&twin, &tokens, 512));
        let text = "Grüße, 世界!\n 42";
        assert_eq!(
            model.tokenizer().encode(text, true).unwrap(),
            twin.tokenizer().encode(text, true).unwrap()
        );
        assert_eq!(model.tokenizer().ends(), twin.tokenizer().ends());
        let chat = [Message::user("hi")];
        assert_eq!(
            model.chat_template().unwrap().render(&chat, true).unwrap(),
            twin.chat_template().unwrap().render(&chat, true).unwrap()
        );
    }
}

#[test]
fn linear_rope_scaling_survives_both_formats() {
    let config = ModelConfig { rope_scaling: RopeScaling::Linear { factor: 4.0 }, ..tiny_config() };
    let checkpoint = Checkpoint::random(config, 2);
    let folder = tempfile::tempdir().unwrap();
    checkpoint.write_folder(folder.path(), FolderOptions::default()).unwrap();
    let path = folder.path().join("model.gguf");
    checkpoint.write_gguf(&path, GgmlDType::F32).unwrap();
    for model in [load(folder.path()), load(&path)] {
        assert_eq!(model.config().rope_scaling, RopeScaling::Linear { factor: 4.0 });
        assert_eq!(model.rope().inverse_frequencies()[0], 0.25);
    }
}

#[test]
fn every_storage_type_of_gguf_is_read_within_its_rounding() {
    let config = ModelConfig { hidden_size: 256, head_dim: 64, ..tiny_config() };
    let checkpoint = Checkpoint::random(config, 3);
    let exact = checkpoint.model(WeightsMode::F32);
    let folder = tempfile::tempdir().unwrap();
    let kinds = [
        (GgmlDType::F16, 0.001),
        (GgmlDType::BF16, 0.01),
        (GgmlDType::Q8_0, 0.01),
        (GgmlDType::Q6K, 0.04),
        (GgmlDType::Q5K, 0.07),
        (GgmlDType::Q5_1, 0.07),
        (GgmlDType::Q5_0, 0.08),
        (GgmlDType::Q4K, 0.13),
        (GgmlDType::Q4_1, 0.13),
        (GgmlDType::Q4_0, 0.15),
        (GgmlDType::Q3K, 0.3),
        (GgmlDType::Q2K, 0.5),
    ];
    for (kind, tolerance) in kinds {
        let path = folder.path().join("model.gguf");
        checkpoint.write_gguf(&path, kind).unwrap();
        let model = load(&path);
        let (a, b) = (exact.query_projection(1).weight(), model.query_projection(1).weight());
        let error: f32 = a.iter().zip(b).map(|(a, b)| (a - b).powi(2)).sum();
        let scale: f32 = a.iter().map(|a| a.powi(2)).sum();
        let relative = (error / scale).sqrt();
        assert!(relative > 0.0 && relative < tolerance, "{kind:?}: {relative}");
        let quantised = !matches!(kind, GgmlDType::F16 | GgmlDType::BF16);
        assert_eq!(model.decodes_quantised(), quantised, "{kind:?}");
    }
}

#[test]
fn quantised_products_are_those_of_the_same_rows_in_f32() {
    // q and k rows change their order when they are read.
    let config = ModelConfig { hidden_size: 256, head_dim: 64, ..tiny_config() };
    let checkpoint = Checkpoint::random(config, 6);
    let folder = tempfile::tempdir().unwrap();
    let x: Vec<f32> = (0..256).map(|i| (i as f32 * 0.7).sin()).collect();
    for kind in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q5_1, GgmlDType::Q6K] {
        let path = folder.path().join("model.gguf");
        checkpoint.write_gguf(&path, kind).unwrap();
        let model = load(&path);
        for linear in [model.query_projection(1), model.key_projection(0)] {
            assert!(linear.is_quantised());
            let products = |precision| {
                let mut out = vec![0.0; linear.outputs()];
                linear.forward(&x, 1, &mut out, precision);
                out
            };
            let (exact, fast) = (products(Precision::F32), products(Precision::Fast));
            let size = exact.iter().map(|a| a * a).sum::<f32>().sqrt();
            let error = exact.iter().zip(&fast).map(|(a, b)| (a - b).powi(2)).sum::<f32>().sqrt();
            assert!(error > 0.0 && error < 0.02 * size, "{kind:?}: {error} of {size}");
        }
    }
}

#[test]
fn weights_can_be_kept_in_f32_or_requantised_by_choice() {
    let checkpoint = Checkpoint::random(tiny_config(), 4);
    let folder = tempfile::tempdir().unwrap();
    checkpoint.write_folder(folder.path(), FolderOptions::default()).unwrap();
    for (mode, q8) in [(WeightsMode::Auto, false), (WeightsMode::F32, false), (WeightsMode::Q8_0, true)] {
        let options = LoadOptions { weights: mode, ..LoadOptions::default() };
        assert_eq!(Model::load(folder.path(), &options).unwrap().decodes_quantised(), q8);
    }
}

#[test]
fn shards_and_half_precision_hold_the_same_model() {
    let checkpoint = Checkpoint::random(tiny_config(), 5);
    let tokens = some_tokens(40, 2);
    let whole = all_logits(&checkpoint.model(WeightsMode::F32), &tokens, 512);
    for (shards, dtype, tolerance) in [(3, Dtype::F32, 0.0), (1, Dtype::F16, 0.1), (2, Dtype::Bf16, 1.0)] {
        let folder = tempfile::tempdir().unwrap();
        checkpoint.write_folder(folder.path(), FolderOptions { shards, dtype }).unwrap();
        assert_eq!(folder.path().join("model.safetensors.index.json").exists(), shards > 1);
        let logits = all_logits(&load(folder.path()), &tokens, 512);
        let worst = whole.iter().zip(&logits).map(|(a, b)| worst(a, b)).fold(0.0, f32::max);
        assert!(worst <= tolerance, "{shards} shards of {dtype}: {worst}");
    }
}

#[test]
fn a_head_may_be_wider_than_its_share_of_the_residual_stream() {
    let config = ModelConfig { head_dim: 48, query_heads: 6, kv_heads: 3, ..tiny_config() };
    let checkpoint = Checkpoint::random(config, 6);
    let folder = tempfile::tempdir().unwrap();
    checkpoint.write_folder(folder.path(), FolderOptions::default()).unwrap();
    let tokens = some_tokens(20, 3);
    let model = load(folder.path());
    assert_eq!(model.config().head_dim, 48);
    assert_eq!(
        all_logits(&model, &tokens, 512),
        all_logits(&checkpoint.model(WeightsMode::F32), &tokens, 512)
    );
}
