//! A model that recalls by construction: its weights are set by formula, not trained.
//!
//! It is the two-head circuit of Olsson et al. 2022 ("In-context learning and induction heads"), spread over four layers with grouped
//! heads. The residual stream has parts for the token's code, the code of the token before it, and the answer. A *previous-token head*
//! in layer 1 attends one position back, by rotation alone, and copies that token's code. *Induction heads* in layers 2 and 3 look for
//! the position whose previous token is the current one and copy the token there: layer 2 the first half of its code, layer 3 the
//! second. So after `… key value … key` comes `value`, at any distance, if both layers find one row among all.

use std::collections::HashMap;

use tokenizers::Tokenizer as Inner;
use tokenizers::models::wordlevel::WordLevel;
use tokenizers::pre_tokenizers::whitespace::WhitespaceSplit;

use super::checkpoint::Checkpoint;
use crate::config::{Architecture, ModelConfig, RopeScaling};
use crate::load::{LayerTensor, TensorName};
use kvoyant_kernels::SplitMix64;

/// Signs in a token's code.
const CODE: usize = 48;
/// Values per head.
const HEAD_DIM: usize = 64;
/// Rotation pairs that measure distance; the other 24 hold a code and turn too slowly to matter.
const POSITION_PAIRS: usize = 8;
/// Base of the rotary frequencies. Pair 8 turns by 1e-6 a position, pairs 0 to 7 by 1 … 6e-6: over 32,768 positions no distance
/// but 1 comes nearer than 0.476 to the sum of eight cosines at distance 1.
const ROPE_THETA: f32 = 1e24;
/// Score of the previous token per cosine: the next best position has `e^(-0.476 * 60)` of its weight.
const POSITION_SCORE: f32 = 60.0;
/// Score of a matching code per sign: random codes differ in 6 signs of 48 or more, so `e^(-2 * 6 * 2.5)` is left for others.
const CODE_SCORE: f32 = 2.5;
/// The constant that every embedding holds.
const CONSTANT: f32 = 4.0;
/// Starts of the parts of the residual stream.
const CURRENT: usize = 0;
const PREVIOUS: usize = CODE;
const ANSWER: usize = 2 * CODE;
const CONSTANT_AT: usize = 3 * CODE;
const HIDDEN: usize = 160;

/// Tokens by role.
const BEGIN: u32 = 0;
const END: u32 = 1;
const KEYS: u32 = 512;
const VALUES: u32 = 512;
const FILLERS: u32 = 126;
const FIRST_KEY: u32 = 2;
const FIRST_VALUE: u32 = FIRST_KEY + KEYS;
const FIRST_FILLER: u32 = FIRST_VALUE + VALUES;
const VOCABULARY: usize = (FIRST_FILLER + FILLERS) as usize;

/// Seed of the codes, found by trying: no two tokens agree in more than 42 of their 48 signs.
const CODE_SEED: u64 = 1;

/// The checkpoint. Load it with [`WeightsMode::F32`](crate::WeightsMode::F32).
pub fn induction() -> Checkpoint {
    let layers = 4;
    let config = ModelConfig {
        architecture: Architecture::Llama,
        hidden_size: HIDDEN,
        intermediate_size: 32,
        layers,
        query_heads: 4,
        kv_heads: 2,
        head_dim: HEAD_DIM,
        vocabulary: VOCABULARY,
        context_tokens: 32_768,
        rms_norm_eps: 1e-6,
        rope_theta: ROPE_THETA,
        rope_scaling: RopeScaling::None,
        sliding_window: vec![None; layers],
        tied_embeddings: false,
        qkv_bias: false,
        output_bias: false,
    };
    let mut checkpoint = Checkpoint::zeros(config, tokenizer(), "<begin>", "<end>");
    for (token, code) in codes().iter().enumerate() {
        for (i, sign) in code.iter().enumerate() {
            *checkpoint.at(TensorName::Embedding, token, CURRENT + i) = *sign;
            *checkpoint.at(TensorName::Head, token, ANSWER + i) = *sign;
        }
        *checkpoint.at(TensorName::Embedding, token, CONSTANT_AT) = CONSTANT;
    }
    previous_token_head(&mut checkpoint, 1, 0);
    induction_head(&mut checkpoint, 2, 1, 0..CODE / 2);
    induction_head(&mut checkpoint, 3, 0, CODE / 2..CODE);
    checkpoint
}

/// What the norm before attention multiplies the residual stream with, when `signs` of its values are ±1 beside the constant.
fn norm_factor(signs: usize) -> f32 {
    (HIDDEN as f32 / (signs as f32 + CONSTANT * CONSTANT)).sqrt()
}

/// The two query heads that share a KV head.
fn query_heads(kv_head: usize) -> [usize; 2] {
    [2 * kv_head, 2 * kv_head + 1]
}

/// KV head `kv_head` attends one position back and copies that token's code.
fn previous_token_head(checkpoint: &mut Checkpoint, layer: usize, kv_head: usize) {
    let name = |tensor| TensorName::Layer(layer, tensor);
    let norm = norm_factor(CODE);
    // Query and key of a pair each have this length: their product over √d is `POSITION_SCORE`.
    let length = (POSITION_SCORE * (HEAD_DIM as f32).sqrt()).sqrt() / (CONSTANT * norm);
    for pair in 0..POSITION_PAIRS {
        let frequency = ROPE_THETA.powf(-2.0 * pair as f32 / HEAD_DIM as f32);
        // A key one position back has turned by one frequency less, so the query starts turned back by one.
        for head in query_heads(kv_head) {
            *checkpoint.at(name(LayerTensor::Query), head * HEAD_DIM + pair, CONSTANT_AT) =
                length * frequency.cos();
            *checkpoint.at(name(LayerTensor::Query), head * HEAD_DIM + HEAD_DIM / 2 + pair, CONSTANT_AT) =
                -length * frequency.sin();
        }
        *checkpoint.at(name(LayerTensor::Key), kv_head * HEAD_DIM + pair, CONSTANT_AT) = length;
    }
    copy(checkpoint, layer, kv_head, 0..CODE, PREVIOUS, norm);
}

/// KV head `kv_head` attends to positions whose previous token is the current one and copies a part of their token's code.
fn induction_head(checkpoint: &mut Checkpoint, layer: usize, kv_head: usize, part: std::ops::Range<usize>) {
    let name = |tensor| TensorName::Layer(layer, tensor);
    let norm = norm_factor(2 * CODE + part.start);
    let length = (CODE_SCORE * (HEAD_DIM as f32).sqrt()).sqrt() / norm;
    for i in 0..CODE {
        // Codes lie in the pairs that hardly turn: half in their first values, half in their second.
        let at = if i < CODE / 2 { POSITION_PAIRS + i } else { HEAD_DIM / 2 + POSITION_PAIRS + i - CODE / 2 };
        for head in query_heads(kv_head) {
            *checkpoint.at(name(LayerTensor::Query), head * HEAD_DIM + at, CURRENT + i) = length;
        }
        *checkpoint.at(name(LayerTensor::Key), kv_head * HEAD_DIM + at, PREVIOUS + i) = length;
    }
    copy(checkpoint, layer, kv_head, part, ANSWER, norm);
}

/// Values and output of a head: signs `part` of the attended token's code go to `to`, half by each query head.
fn copy(
    checkpoint: &mut Checkpoint,
    layer: usize,
    kv_head: usize,
    part: std::ops::Range<usize>,
    to: usize,
    norm: f32,
) {
    let name = |tensor| TensorName::Layer(layer, tensor);
    for i in part {
        *checkpoint.at(name(LayerTensor::Value), kv_head * HEAD_DIM + i, CURRENT + i) = 1.0 / norm;
        for head in query_heads(kv_head) {
            *checkpoint.at(name(LayerTensor::Output), to + i, head * HEAD_DIM + i) = 0.5;
        }
    }
}

/// Random signs for every token.
fn codes() -> Vec<Vec<f32>> {
    let mut random = SplitMix64::new(CODE_SEED);
    let mut sign = || if random.bits() >> 63 == 0 { 1.0 } else { -1.0 };
    (0..VOCABULARY).map(|_| (0..CODE).map(|_| sign()).collect()).collect()
}

/// One token per word: `k0 … v0 … f0 …`.
fn tokenizer() -> Inner {
    let mut vocabulary: HashMap<String, u32> =
        [("<begin>", BEGIN), ("<end>", END)].map(|(token, id)| (token.to_owned(), id)).into();
    for (letter, first, count) in
        [('k', FIRST_KEY, KEYS), ('v', FIRST_VALUE, VALUES), ('f', FIRST_FILLER, FILLERS)]
    {
        vocabulary.extend((0..count).map(|i| (format!("{letter}{i}"), first + i)));
    }
    let words = WordLevel::builder()
        .vocab(vocabulary.into_iter().collect())
        .unk_token("f0".to_owned())
        .build()
        .expect("the vocabulary has its unknown token");
    let mut inner = Inner::new(words);
    inner.with_pre_tokenizer(Some(WhitespaceSplit));
    inner
}

/// A text for [`induction`] with its right answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RecallTask {
    /// The context: keys, each followed by its value, among filler.
    pub tokens: Vec<u32>,
    /// Every key with its value. Appending a key must give its value.
    pub pairs: Vec<(u32, u32)>,
}

/// A context of `tokens` tokens with `pairs` pairs at random depths.
///
/// # Panics
/// When there are more pairs than keys (512) or than fit the context.
pub fn recall_task(seed: u64, tokens: usize, pairs: usize) -> RecallTask {
    assert!(pairs <= KEYS as usize, "there are {KEYS} keys");
    assert!(tokens > 2 * pairs, "{pairs} pairs do not fit {tokens} tokens");
    let mut random = SplitMix64::new(seed);
    let mut keys: Vec<u32> = (FIRST_KEY..FIRST_VALUE).collect();
    let mut values: Vec<u32> = (FIRST_VALUE..FIRST_FILLER).collect();
    random.shuffle(&mut keys);
    random.shuffle(&mut values);
    let pairs: Vec<(u32, u32)> = keys.into_iter().zip(values).take(pairs).collect();
    // What stands in the context: pairs as one item each, filler as single tokens, in random order.
    let filler = tokens - 1 - 2 * pairs.len();
    let mut items: Vec<Option<(u32, u32)>> = pairs.iter().copied().map(Some).collect();
    items.resize(pairs.len() + filler, None);
    random.shuffle(&mut items);
    let mut context = vec![BEGIN];
    for item in items {
        match item {
            Some((key, value)) => context.extend([key, value]),
            None => context.push(FIRST_FILLER + random.below(FILLERS as usize) as u32),
        }
    }
    RecallTask { tokens: context, pairs }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_two_codes_are_too_alike_to_tell_apart() {
        let codes = codes();
        for (i, a) in codes.iter().enumerate() {
            for b in &codes[..i] {
                let agreeing = a.iter().zip(b).filter(|(x, y)| x == y).count();
                assert!(agreeing <= 42, "{agreeing}");
            }
        }
    }

    #[test]
    fn only_the_previous_position_lines_up_with_the_query() {
        let cosines = |distance: f64| -> f64 {
            (0..POSITION_PAIRS)
                .map(|pair| {
                    (f64::from(ROPE_THETA).powf(-2.0 * pair as f64 / HEAD_DIM as f64) * (distance - 1.0))
                        .cos()
                })
                .sum()
        };
        let best = cosines(1.0);
        let next =
            (0..32_768).filter(|&distance| distance != 1).map(|d| cosines(f64::from(d))).fold(0.0, f64::max);
        assert!(best - next > 0.47, "{}", best - next);
    }

    #[test]
    fn a_task_holds_every_pair_side_by_side() {
        let task = recall_task(3, 1000, 200);
        assert_eq!(task.tokens.len(), 1000);
        for (key, value) in &task.pairs {
            let at: Vec<usize> = (0..1000).filter(|&i| task.tokens[i] == *key).collect();
            assert_eq!(at.len(), 1);
            assert_eq!(task.tokens[at[0] + 1], *value);
        }
    }
}
