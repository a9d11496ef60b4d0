//! Sequences of noise, of which every row can be told from its place: for tests that look at what is selected.

use kvoyant_client::{Error, Hint, Member, Model, Ready, RowLayout, Sequence};

use crate::{PATIENCE, fake};

/// Values of a query of all heads.
pub const QUERY: usize = fake::QUERY_HEADS * fake::HEAD_DIM;

/// Numbers in `[-1, 1)` that depend on where they belong.
#[must_use]
pub fn noise(count: usize, seed: usize) -> Vec<f32> {
    let mut state = seed as u64 ^ 0x9e37_79b9_7f4a_7c15;
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

/// A sequence whose keys and values are noise: `[token][KV head · d]` of each layer.
///
/// # Panics
/// If the daemon refuses.
#[must_use]
pub fn noisy(model: &Model, tokens: usize) -> Sequence {
    let sequence = model.open(0, tokens).expect("a sequence");
    append_noise(model, &sequence, tokens);
    sequence
}

/// Makes a sequence `tokens` tokens long.
///
/// # Panics
/// If the daemon refuses.
pub fn append_noise(model: &Model, sequence: &Sequence, tokens: usize) {
    let first = sequence.tokens();
    model.reserve(&[(sequence, tokens)]).expect("room");
    let layout = model.layout();
    let heads = model.spec().kv_heads as usize;
    for layer in 0..fake::LAYERS {
        for token in first..tokens {
            let (keys, values) = of_token(layout, heads, layer, token);
            sequence.write(layer, token, &keys, &values).expect("a row");
        }
    }
    model.append(&[(sequence, tokens - first)]).expect("rows");
}

/// Key and value of a token, all heads.
#[must_use]
pub fn of_token(layout: RowLayout, heads: usize, layer: usize, token: usize) -> (Vec<f32>, Vec<f32>) {
    let keys = noise(heads * layout.key_values(), 1 + 2 * (layer * 10_000 + token));
    match layout {
        RowLayout::KeyValue { d, .. } => (keys, noise(heads * d, 2 * (layer * 10_000 + token))),
        RowLayout::Latent { .. } => (keys, Vec::new()),
    }
}

/// Asks for a sequence's next token by a hint, and waits.
///
/// # Errors
/// The client's.
pub fn ask(model: &Model, sequence: &Sequence, layer: usize, hint: Hint<'_>) -> Result<Ready, Error> {
    let member = Member { sequence, position: sequence.tokens(), hint };
    model.speculate(layer, &[member])?.wait(PATIENCE)
}

/// What the only member's head selected.
#[must_use]
pub fn tokens_of(ready: &Ready, head: usize) -> Vec<usize> {
    ready.tokens(0, head).flat_map(|run| run.token..run.token + run.rows).collect()
}

/// `count` tokens of each head in rising order, as ids go over the wire.
#[must_use]
pub fn some_ids(seed: usize, count: usize, below: usize) -> Vec<u32> {
    let mut words = Vec::new();
    for head in 0..fake::KV_HEADS {
        let last = (below - fake::WINDOW - 1) as f32;
        let mut ids: Vec<u32> = noise(count, seed * 7 + head)
            .iter()
            .map(|value| fake::SINKS as u32 + ((value.abs() * 1e4) % (last - fake::SINKS as f32)) as u32)
            .collect();
        ids.sort_unstable();
        ids.dedup();
        words.push(ids.len() as u32);
        words.extend(ids);
    }
    words
}
