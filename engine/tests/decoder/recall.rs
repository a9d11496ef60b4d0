//! The induction circuit recalls, and needs its far rows to do so.

use kvoyant_engine::synthetic::{induction, recall_task};
use kvoyant_engine::*;

/// Share of keys whose value comes out right after a context that was stored in `dtype`.
fn recalled(context: usize, pairs: usize, dtype: Dtype, window: Option<usize>) -> f64 {
    let mut checkpoint = induction();
    if let Some(window) = window {
        // Only the layers that recall lose sight of the context.
        checkpoint.config.sliding_window[2..].fill(Some(window));
    }
    let model = checkpoint.model(WeightsMode::F32);
    let mut decoder = Decoder::new(model.clone(), DecoderOptions::default());
    let mut kv = DenseKv::new(KvShape::new(model.config(), dtype));
    let task = recall_task(9, context, pairs);
    let mut root = kv.sequence();
    decoder
        .prefill(
            &mut kv,
            &mut root,
            &task.tokens,
            PrefillOptions { logits: Logits::None, ..PrefillOptions::default() },
        )
        .unwrap();
    let mut forks: Vec<_> = task.pairs.iter().map(|_| kv.fork(&mut root)).collect();
    let mut batch: Vec<_> = forks.iter_mut().collect();
    let keys: Vec<u32> = task.pairs.iter().map(|(key, _)| *key).collect();
    let step = decoder.step(&mut kv, &mut batch, &keys).unwrap();
    let right = task.pairs.iter().enumerate().filter(|(i, (_, value))| argmax(step.of(*i, pairs)) == *value);
    right.count() as f64 / pairs as f64
}

#[test]
fn every_key_of_a_long_context_gives_its_value() {
    for dtype in [Dtype::F32, Dtype::F16, Dtype::Bf16] {
        assert_eq!(recalled(1200, 200, dtype, None), 1.0, "{dtype}");
    }
    assert_eq!(recalled(4000, 100, Dtype::F16, None), 1.0);
}

#[test]
fn a_window_alone_recalls_next_to_nothing() {
    assert!(recalled(1200, 200, Dtype::F16, Some(64)) < 0.1);
}

#[test]
fn its_words_are_its_tokens() {
    let model = induction().model(WeightsMode::F32);
    let tokens = model.tokenizer().encode("k0 v511 f3", true).unwrap();
    assert_eq!(tokens, [0, 2, 1025, 1029]);
    assert_eq!(model.tokenizer().decode(&tokens[1..]).unwrap(), "k0 v511 f3");
}
