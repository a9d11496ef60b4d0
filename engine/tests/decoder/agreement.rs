//! The decoder computes what candle's own models compute, whatever the chunks, batches and forks.

use crate::common::{all_logits, exact_kv, families, some_tokens, worst};
use candle_core::{DType, Device, Tensor};
use candle_nn::VarBuilder;
use candle_transformers::models::{llama, mistral, qwen2};
use kvoyant_engine::synthetic::{Checkpoint, FolderOptions, tiny, tiny_config};
use kvoyant_engine::*;
use serde::de::DeserializeOwned;

/// Rounding of a few layers in f32, summed in another order.
const TOLERANCE: f32 = 2e-4;

/// Candle's logits of the last token.
fn candle_logits(folder: &std::path::Path, architecture: Architecture, tokens: &[u32]) -> Vec<f32> {
    fn config<T: DeserializeOwned>(folder: &std::path::Path) -> T {
        let text = std::fs::read_to_string(folder.join("config.json")).unwrap();
        let mut json: serde_json::Value = serde_json::from_str(&text).unwrap();
        // Candle's Qwen2 wants a number even where no layer has a window.
        if json["sliding_window"].is_null() {
            json["sliding_window"] = 4096.into();
        }
        serde_json::from_value(json).unwrap()
    }
    let tensors = candle_core::safetensors::load(folder.join("model.safetensors"), &Device::Cpu).unwrap();
    let weights = VarBuilder::from_tensors(tensors, DType::F32, &Device::Cpu);
    let input = Tensor::new(tokens, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
    let logits = match architecture {
        Architecture::Llama => {
            let config = config::<llama::LlamaConfig>(folder).into_config(false);
            let mut cache = llama::Cache::new(true, DType::F32, &config, &Device::Cpu).unwrap();
            llama::Llama::load(weights, &config).unwrap().forward(&input, 0, &mut cache)
        }
        Architecture::Mistral => mistral::Model::new(&config(folder), weights).unwrap().forward(&input, 0),
        Architecture::Qwen2 => {
            qwen2::ModelForCausalLM::new(&config(folder), weights).unwrap().forward(&input, 0)
        }
    };
    logits.unwrap().flatten_all().unwrap().to_vec1().unwrap()
}

#[test]
fn logits_equal_those_of_candle_transformers_for_every_family() {
    let tokens = some_tokens(150, 1);
    for checkpoint in families() {
        let folder = tempfile::tempdir().unwrap();
        checkpoint.write_folder(folder.path(), FolderOptions::default()).unwrap();
        let model = Model::load(folder.path(), &LoadOptions::default()).unwrap();
        assert_eq!(model.config(), &checkpoint.config);
        let ours = all_logits(&model, &tokens, 64);
        for length in [1, 2, 65, 150] {
            let theirs = candle_logits(folder.path(), checkpoint.config.architecture, &tokens[..length]);
            let worst = worst(&ours[length - 1], &theirs);
            assert!(worst < TOLERANCE, "{:?} at {length}: {worst}", checkpoint.config.architecture);
        }
    }
}

#[test]
fn the_chunk_size_of_a_prefill_changes_nothing_but_rounding() {
    let model = tiny(4);
    let tokens = some_tokens(140, 2);
    let whole = all_logits(&model, &tokens, 1000);
    for chunk in [1, 7, 64, 139] {
        for (a, b) in whole.iter().zip(all_logits(&model, &tokens, chunk)) {
            assert!(worst(a, &b) < TOLERANCE);
        }
    }
}

#[test]
fn decode_steps_give_the_logits_of_a_prefill() {
    let model = tiny(5);
    let tokens = some_tokens(90, 3);
    let expected = all_logits(&model, &tokens, 64);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut kv = exact_kv(&model);
    let mut sequence = kv.sequence();
    let first = decoder.prefill(&mut kv, &mut sequence, &tokens[..30], PrefillOptions::default()).unwrap();
    assert!(worst(&first, &expected[29]) < TOLERANCE);
    for (index, token) in tokens.iter().enumerate().skip(30) {
        let step = decoder.step(&mut kv, &mut [&mut sequence], &[*token]).unwrap();
        assert!(worst(&step.logits, &expected[index]) < TOLERANCE, "token {index}");
        assert!(step.timing.total >= step.timing.linear + step.timing.attend);
    }
    assert_eq!(kv.tokens(&sequence), tokens.len());
}

#[test]
fn sequences_of_different_lengths_do_not_see_one_another_in_a_batch() {
    let model = tiny(6);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut kv = exact_kv(&model);
    let prompts = [some_tokens(5, 10), some_tokens(70, 11), some_tokens(31, 12)];
    let mut sequences = Vec::new();
    for prompt in &prompts {
        let mut sequence = kv.sequence();
        decoder
            .prefill(&mut kv, &mut sequence, &prompt[..prompt.len() - 1], PrefillOptions::default())
            .unwrap();
        sequences.push(sequence);
    }
    let next: Vec<u32> = prompts.iter().map(|prompt| prompt[prompt.len() - 1]).collect();
    let mut batch: Vec<_> = sequences.iter_mut().collect();
    let step = decoder.step(&mut kv, &mut batch, &next).unwrap();
    for (index, prompt) in prompts.iter().enumerate() {
        let alone = all_logits(&model, prompt, 512);
        assert!(worst(step.of(index, prompts.len()), &alone[prompt.len() - 1]) < TOLERANCE);
    }
}

#[test]
fn forks_share_their_prefix_and_go_their_own_ways() {
    let model = tiny(7);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut kv = exact_kv(&model);
    let context = some_tokens(80, 20);
    let mut root = kv.sequence();
    decoder
        .prefill(
            &mut kv,
            &mut root,
            &context,
            PrefillOptions { logits: Logits::None, ..PrefillOptions::default() },
        )
        .unwrap();
    let mut forks: Vec<_> = (0..3).map(|_| kv.fork(&mut root)).collect();
    // Question tokens are dense too; then one token in a step.
    for (i, fork) in forks.iter_mut().enumerate() {
        let question = some_tokens(10 + i, 30 + i as u64);
        let dense = decoder.prefill(&mut kv, fork, &question, PrefillOptions::default()).unwrap();
        let whole = [context.clone(), question].concat();
        assert!(worst(&dense, &all_logits(&model, &whole, 512)[whole.len() - 1]) < TOLERANCE);
    }
    let mut batch: Vec<_> = forks.iter_mut().collect();
    decoder.step(&mut kv, &mut batch, &[1, 2, 3]).unwrap();
    assert_eq!(kv.tokens(&root), context.len());
    let again = decoder.step(&mut kv, &mut [&mut root], &[9]).unwrap();
    let whole = [context, vec![9]].concat();
    assert!(worst(&again.logits, &all_logits(&model, &whole, 512)[whole.len() - 1]) < TOLERANCE);
}

#[test]
fn a_truncated_sequence_goes_on_as_if_the_rest_had_never_been() {
    let model = tiny(8);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut kv = exact_kv(&model);
    let tokens = some_tokens(40, 40);
    let mut sequence = kv.sequence();
    decoder.prefill(&mut kv, &mut sequence, &tokens, PrefillOptions::default()).unwrap();
    let _shares_the_rows = kv.fork(&mut sequence);
    kv.truncate(&mut sequence, 25);
    let step = decoder.step(&mut kv, &mut [&mut sequence], &[tokens[25]]).unwrap();
    assert!(worst(&step.logits, &all_logits(&model, &tokens, 512)[25]) < TOLERANCE);
}

#[test]
fn a_sliding_window_hides_what_is_behind_it_in_prefill_and_in_decode() {
    let windowed = |window| {
        let config = ModelConfig {
            architecture: Architecture::Mistral,
            sliding_window: vec![window; tiny_config().layers],
            ..tiny_config()
        };
        Checkpoint::random(config, 9).model(WeightsMode::F32)
    };
    let (model, open) = (windowed(Some(16)), windowed(None));
    let tokens = some_tokens(100, 50);
    let logits = all_logits(&model, &tokens, 1000);
    let unlimited = all_logits(&open, &tokens, 1000);
    assert!(
        worst(&logits[15], &unlimited[15]) < TOLERANCE,
        "the window holds 16 tokens, the current one included"
    );
    assert!(worst(&logits[16], &unlimited[16]) > TOLERANCE);
    for (a, b) in logits.iter().zip(all_logits(&model, &tokens, 11)) {
        assert!(worst(a, &b) < TOLERANCE);
    }
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut kv = exact_kv(&model);
    let mut sequence = kv.sequence();
    decoder.prefill(&mut kv, &mut sequence, &tokens[..60], PrefillOptions::default()).unwrap();
    for index in 60..100 {
        let step = decoder.step(&mut kv, &mut [&mut sequence], &[tokens[index]]).unwrap();
        assert!(worst(&step.logits, &logits[index]) < TOLERANCE);
    }
}

#[test]
fn storage_in_half_precision_rounds_and_no_more() {
    let model = tiny(10);
    let tokens = some_tokens(60, 60);
    let exact = &all_logits(&model, &tokens, 512)[59];
    let scale = exact.iter().fold(0.0f32, |most, logit| most.max(logit.abs()));
    for (dtype, tolerance) in [(Dtype::F16, 0.02), (Dtype::Bf16, 0.15)] {
        let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
        let mut kv = DenseKv::new(KvShape::new(model.config(), dtype));
        let mut sequence = kv.sequence();
        let rounded = decoder.prefill(&mut kv, &mut sequence, &tokens, PrefillOptions::default()).unwrap();
        let worst = worst(exact, &rounded) / scale;
        assert!(worst > 0.0 && worst < tolerance, "{dtype}: {worst}");
    }
}
