//! The attention behind candle's tensors computes what candle's own operations do, and says what is wrong with a wrong use.

#[path = "../../examples/candle_llama/model.rs"]
mod model;

use std::fs::File;

use candle_core::quantized::{GgmlDType, gguf_file};
use candle_core::{D, DType, Device, IndexOp, Tensor};
use candle_transformers::models::quantized_llama::ModelWeights;
use candle_transformers::utils::repeat_kv;
use kvoyant_engine::candle::{KvPass, PassError};
use kvoyant_engine::synthetic::{Checkpoint, tiny_config};
use kvoyant_engine::{DenseKv, DenseSequence, Dtype, KvBackend, KvShape};
use model::{Llama, most_probable};

const LAYERS: usize = 2;
const QUERY_HEADS: usize = 6;
const KV_HEADS: usize = 2;
const HEAD_DIM: usize = 32;

fn shape() -> KvShape {
    KvShape {
        layers: LAYERS,
        query_heads: QUERY_HEADS,
        kv_heads: KV_HEADS,
        head_dim: HEAD_DIM,
        sliding_window: vec![None, Some(5)],
        format: Dtype::F32.into(),
    }
}

fn random(batch: usize, heads: usize, tokens: usize) -> Tensor {
    Tensor::randn(0f32, 1.0, (batch, heads, tokens, HEAD_DIM), &Device::Cpu).unwrap()
}

/// Causal attention of the last tokens of one sequence, by candle's operations.
fn candle_attention(q: &Tensor, k: &Tensor, v: &Tensor, window: Option<usize>) -> Tensor {
    let (tokens, seen) = (q.dim(2).unwrap(), k.dim(2).unwrap());
    let k = repeat_kv(k.clone(), QUERY_HEADS / KV_HEADS).unwrap();
    let v = repeat_kv(v.clone(), QUERY_HEADS / KV_HEADS).unwrap();
    let scores = (q.matmul(&k.t().unwrap()).unwrap() / (HEAD_DIM as f64).sqrt()).unwrap();
    let mask: Vec<f32> = (0..tokens)
        .flat_map(|t| {
            let at = seen - tokens + t;
            let first = window.map_or(0, |window| (at + 1).saturating_sub(window));
            (0..seen).map(move |row| if (first..=at).contains(&row) { 0.0 } else { f32::NEG_INFINITY })
        })
        .collect();
    let mask = Tensor::from_vec(mask, (tokens, seen), &Device::Cpu).unwrap();
    let weights = candle_nn::ops::softmax_last_dim(&scores.broadcast_add(&mask).unwrap()).unwrap();
    weights.matmul(&v.contiguous().unwrap()).unwrap()
}

fn worst(a: &Tensor, b: &Tensor) -> f32 {
    assert_eq!(a.dims(), b.dims());
    let difference = (a - b).unwrap().abs().unwrap().flatten_all().unwrap();
    difference.max(D::Minus1).unwrap().to_scalar().unwrap()
}

/// Keys and values of each layer of one sequence, so far.
type History = Vec<(Tensor, Tensor)>;

/// One pass over sequences, and what candle's operations make of the same.
fn agree(kv: &mut DenseKv, batch: Vec<&mut DenseSequence>, histories: &mut [History], tokens: Option<usize>) {
    let members = batch.len();
    let count = tokens.unwrap_or(1);
    let mut pass = match tokens {
        Some(tokens) => KvPass::prefill(kv, batch, tokens).unwrap(),
        None => KvPass::step(kv, batch).unwrap(),
    };
    for layer in 0..LAYERS {
        // As projections leave them: heads and tokens the other way round in memory.
        let [q, k, v] = [QUERY_HEADS, KV_HEADS, KV_HEADS]
            .map(|heads| random(members, heads, count).transpose(1, 2).unwrap().contiguous().unwrap())
            .map(|x| x.transpose(1, 2).unwrap());
        assert!(count == 1 || !q.is_contiguous());
        let attended = pass.attend(layer, &q, &k, &v).unwrap();
        for (member, history) in histories.iter_mut().enumerate() {
            let own = |x: &Tensor| x.i(member..=member).unwrap().contiguous().unwrap();
            let (keys, values) = match history.get(layer) {
                Some((before, values)) => (
                    Tensor::cat(&[before, &own(&k)], 2).unwrap(),
                    Tensor::cat(&[values, &own(&v)], 2).unwrap(),
                ),
                None => (own(&k), own(&v)),
            };
            let expected = candle_attention(&own(&q), &keys, &values, shape().sliding_window[layer]);
            assert!(worst(&own(&attended), &expected) < 1e-5, "layer {layer}, member {member}");
            if layer < history.len() {
                history[layer] = (keys, values);
            } else {
                history.push((keys, values));
            }
        }
    }
    pass.finish().unwrap();
}

#[test]
fn prompts_in_chunks_and_steps_of_batches_attend_as_candles_own_operations_do() {
    let mut kv = DenseKv::new(shape());
    let (mut a, mut b) = (kv.sequence(), kv.sequence());
    let mut histories = [History::new(), History::new()];
    agree(&mut kv, vec![&mut a], &mut histories[..1], Some(11));
    agree(&mut kv, vec![&mut b], &mut histories[1..], Some(3));
    // From here on in one batch, at different lengths.
    agree(&mut kv, vec![&mut a, &mut b], &mut histories, Some(7));
    for _ in 0..3 {
        agree(&mut kv, vec![&mut a, &mut b], &mut histories, None);
    }
    assert_eq!([kv.tokens(&a), kv.tokens(&b)], [21, 13]);
}

#[test]
fn half_precision_comes_back_as_half_precision() {
    for dtype in [DType::F16, DType::BF16] {
        let mut kv = DenseKv::new(shape());
        let mut sequence = kv.sequence();
        let [q, k, v] =
            [QUERY_HEADS, KV_HEADS, KV_HEADS].map(|heads| random(1, heads, 4).to_dtype(dtype).unwrap());
        let mut pass = KvPass::prefill(&mut kv, [&mut sequence], 4).unwrap();
        let attended = pass.attend(0, &q, &k, &v).unwrap();
        assert_eq!(attended.dtype(), dtype);
        let [q, k, v, attended] = [q, k, v, attended].map(|x| x.to_dtype(DType::F32).unwrap());
        assert!(worst(&attended, &candle_attention(&q, &k, &v, None)) < 0.03);
    }
}

#[test]
fn a_pass_that_is_dropped_leaves_nothing_behind() {
    let mut kv = DenseKv::new(shape());
    let mut sequence = kv.sequence();
    let mut history = [History::new()];
    agree(&mut kv, vec![&mut sequence], &mut history, Some(9));
    for step in [false, true] {
        let mut pass = if step {
            KvPass::step(&mut kv, [&mut sequence]).unwrap()
        } else {
            KvPass::prefill(&mut kv, [&mut sequence], 1).unwrap()
        };
        pass.attend(0, &random(1, QUERY_HEADS, 1), &random(1, KV_HEADS, 1), &random(1, KV_HEADS, 1)).unwrap();
        drop(pass);
        assert_eq!(kv.tokens(&sequence), 9);
    }
    agree(&mut kv, vec![&mut sequence], &mut history, None);
    assert_eq!(kv.tokens(&sequence), 10);
}

#[test]
fn wrong_uses_say_what_is_wrong() {
    let mut kv = DenseKv::new(shape());
    let mut sequence = kv.sequence();
    let (q, k) = (random(1, QUERY_HEADS, 4), random(1, KV_HEADS, 4));
    assert!(matches!(KvPass::prefill(&mut kv, [], 4), Err(PassError::Empty { sequences: 0, tokens: 4 })));
    assert!(matches!(KvPass::prefill(&mut kv, [&mut sequence], 0), Err(PassError::Empty { .. })));

    let mut pass = KvPass::prefill(&mut kv, [&mut sequence], 4).unwrap();
    let said = |error: PassError<_>| error.to_string();
    let repeated = repeat_kv(k.clone(), QUERY_HEADS / KV_HEADS).unwrap();
    assert_eq!(
        said(pass.attend(0, &q, &repeated, &k).unwrap_err()),
        "k has shape [1, 6, 4, 32], and [batch, heads, tokens, head_dim] is [1, 2, 4, 32]: pass K and V as projected, not repeated for the query heads"
    );
    let flat = q.flatten_from(2).unwrap();
    assert!(matches!(pass.attend(0, &flat, &k, &k), Err(PassError::Shape { tensor: "q", .. })));
    let double = k.to_dtype(DType::F64).unwrap();
    assert!(matches!(
        pass.attend(0, &q, &k, &double),
        Err(PassError::Dtype { tensor: "v", found: DType::F64 })
    ));
    assert!(matches!(
        pass.attend(1, &q, &k, &k),
        Err(PassError::Order { expected: 0, found: 1, layers: LAYERS })
    ));
    // None of these has counted.
    pass.attend(0, &q, &k, &k).unwrap();
    assert!(matches!(pass.attend(0, &q, &k, &k), Err(PassError::Order { expected: 1, found: 0, .. })));
    assert!(!pass.wants_hint(1), "prompts want none");
    assert!(matches!(pass.hint(1, &q), Err(PassError::Hint { found: 1, next: 1, layers: LAYERS })));
    let error: candle_core::Error = pass.finish().unwrap_err().into();
    assert!(error.to_string().contains("1 of 2 layers have attended"), "{error}");

    let mut pass = KvPass::prefill(&mut kv, [&mut sequence], 4).unwrap();
    for layer in 0..LAYERS {
        pass.attend(layer, &q, &k, &k).unwrap();
    }
    assert!(matches!(
        pass.attend(LAYERS, &q, &k, &k),
        Err(PassError::Order { expected: LAYERS, found: LAYERS, layers: LAYERS })
    ));
    pass.finish().unwrap();
    assert_eq!(kv.tokens(&sequence), 4);
}

#[test]
fn the_examples_llama_gives_the_tokens_of_candles_quantised_llama() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("tiny.gguf");
    // Products with quantised weights round activations to 8 bits, which makes steps of rounding errors.
    for (seed, matrices, tolerance) in [(1, GgmlDType::F32, 1e-3), (2, GgmlDType::Q8_0, 0.1)] {
        Checkpoint::random(tiny_config(), seed).write_gguf(&path, matrices).unwrap();
        let mut file = File::open(&path).unwrap();
        let llama = Llama::load(&gguf_file::Content::read(&mut file).unwrap(), &mut file).unwrap();
        let mut file = File::open(&path).unwrap();
        let content = gguf_file::Content::read(&mut file).unwrap();
        let mut theirs = ModelWeights::from_gguf(content, &mut file, &Device::Cpu).unwrap();

        let mut kv = DenseKv::new(KvShape { format: Dtype::F32.into(), ..llama.shape().clone() });
        let mut sequence = kv.sequence();
        let prompt: Vec<u32> = (0..70).map(|i| (i * 37 + 11) % 256).collect();
        let mut input = Tensor::new(prompt, &Device::Cpu).unwrap().unsqueeze(0).unwrap();
        for step in 0..20 {
            let at = kv.tokens(&sequence);
            let pass = match step {
                0 => KvPass::prefill(&mut kv, [&mut sequence], 70).unwrap(),
                _ => KvPass::step(&mut kv, [&mut sequence]).unwrap(),
            };
            let ours = llama.forward(&input, pass).unwrap();
            let expected = theirs.forward(&input, at).unwrap();
            let worst = worst(&ours, &expected);
            assert!(worst < tolerance, "{matrices:?} at step {step}: {worst}");
            let token = most_probable(&ours).unwrap()[0];
            if matrices == GgmlDType::F32 {
                assert_eq!(token, most_probable(&expected).unwrap()[0], "step {step}");
            }
            input = Tensor::new(&[[token]], &Device::Cpu).unwrap();
        }
    }
}
