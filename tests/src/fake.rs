//! A model that is only numbers: every value says where it belongs, so that any row can be checked by itself.

use std::time::{Duration, Instant};

use kvoyant_client::{
    Client, Dtype, Error, Hint, Member, Model, ModelSpec, Options, Ready, Sequence, Status,
};

use crate::{Daemon, PATIENCE};

/// Decoder layers.
pub const LAYERS: usize = 3;
/// KV heads.
pub const KV_HEADS: usize = 2;
/// Query heads.
pub const QUERY_HEADS: usize = 4;
/// Values of a head.
pub const HEAD_DIM: usize = 32;
/// First tokens that are never selected.
pub const SINKS: usize = 4;
/// Recent tokens that are never selected.
pub const WINDOW: usize = 16;

/// What to register.
#[must_use]
pub fn spec(methods: &[&str]) -> ModelSpec {
    ModelSpec {
        name: "fake".into(),
        fingerprint: "0".repeat(32),
        adapter: String::new(),
        rope: String::new(),
        layers: LAYERS as u32,
        query_heads: QUERY_HEADS as u32,
        kv_heads: KV_HEADS as u32,
        head_dim: HEAD_DIM as u32,
        dtype: Dtype::F32.code(),
        page_rows: 0,
        sinks: SINKS as u32,
        window: WINDOW as u32,
        dense_layers: 1,
        sliding_layers: Vec::new(),
        methods: methods.iter().map(ToString::to_string).collect(),
        slab_bytes: 0,
        graph: None,
        latent_values: 0,
        artifacts: Vec::new(),
    }
}

/// The row of a token: K then V, exact in f32.
#[must_use]
pub fn row(seed: usize, layer: usize, head: usize, token: usize) -> Vec<f32> {
    (0..2 * HEAD_DIM)
        .map(|j| (seed * 1_000_003 + layer * 100_003 + head * 50_021 + token * 67 + j) as f32)
        .collect()
}

/// Writes rows `sequence.tokens()..tokens` of all layers and appends them. The sequence has room.
///
/// # Errors
/// The client's.
pub fn fill(model: &Model, sequence: &Sequence, seed: usize, tokens: usize) -> Result<(), Error> {
    let first = sequence.tokens();
    for layer in 0..LAYERS {
        for head in 0..KV_HEADS {
            let rows: Vec<u8> = (first..tokens)
                .flat_map(|token| row(seed, layer, head, token))
                .flat_map(f32::to_le_bytes)
                .collect();
            sequence.write_rows(layer, head, first, &rows)?;
        }
    }
    model.append(&[(sequence, tokens - first)])
}

/// Tokens of a prompt that are written at once.
pub const CHUNK: usize = 100;

/// The same as an engine writes a prompt: room for some tokens, then their rows.
///
/// # Panics
/// If the daemon refuses.
pub fn fill_as_prompt(model: &Model, sequence: &Sequence, seed: usize, tokens: usize) {
    while sequence.tokens() < tokens {
        let end = (sequence.tokens() + CHUNK).min(tokens);
        model.reserve(&[(sequence, end)]).expect("room");
        fill(model, sequence, seed, end).expect("rows");
    }
}

/// Checks every row of one member's answer against what was written, and returns how many there were.
///
/// # Errors
/// What is wrong.
pub fn check(ready: &Ready, member: usize, seed: usize, layer: usize) -> Result<usize, String> {
    let mut rows = 0;
    for head in 0..KV_HEADS {
        let mut bytes = Vec::new();
        ready.copy_rows(member, head, &mut bytes).map_err(|error| error.to_string())?;
        let values: Vec<f32> =
            bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect();
        let tokens = ready.tokens(member, head).flat_map(|run| run.token..run.token + run.rows);
        for (token, found) in tokens.zip(values.chunks_exact(2 * HEAD_DIM)) {
            if found != row(seed, layer, head, token) {
                return Err(format!("head {head} token {token} holds {:?} …", &found[..2]));
            }
            rows += 1;
        }
        if rows == 0 || values.len() != ready.rows(member, head) * 2 * HEAD_DIM {
            return Err(format!("head {head} has {} values", values.len()));
        }
    }
    Ok(rows)
}

/// A session with the fake model.
///
/// # Panics
/// If the daemon refuses.
#[must_use]
pub fn connect(daemon: &Daemon, methods: &[&str]) -> Model {
    connect_at(&daemon.socket(), methods)
}

/// The same with whoever listens at a socket.
///
/// # Panics
/// If the daemon refuses.
#[must_use]
pub fn connect_at(socket: &std::path::Path, methods: &[&str]) -> Model {
    let client = Client::connect(socket, Options::default()).expect("a connection");
    client.register(spec(methods), &[]).expect("a registration")
}

/// Asks for one sequence's next token, and waits.
///
/// # Panics
/// If there is no answer.
#[must_use]
pub fn ask(model: &Model, sequence: &Sequence, layer: usize) -> Ready {
    ask_with(model, sequence, layer, Hint::None)
}

/// As [`ask`], by a hint.
///
/// # Panics
/// If there is no answer.
#[must_use]
pub fn ask_with(model: &Model, sequence: &Sequence, layer: usize, hint: Hint<'_>) -> Ready {
    let member = Member { sequence, position: sequence.tokens(), hint };
    model.speculate(layer, &[member]).expect("a request").wait(PATIENCE).expect("an answer")
}

/// Tokens of a text.
#[must_use]
pub fn text(seed: u32, tokens: usize) -> Vec<u32> {
    (0..tokens as u32).map(|i| i.wrapping_mul(2_654_435_761).rotate_left(7) ^ seed).collect()
}

/// Looks at every row of these tokens, wherever its page is.
///
/// # Panics
/// If one is not what was written.
pub fn check_rows(model: &Model, sequence: &Sequence, tokens: std::ops::Range<usize>, seed: usize) {
    let mut rows = vec![0; 2 * HEAD_DIM * 4 * tokens.len()];
    for layer in 0..LAYERS {
        let since = Instant::now();
        // Where there is little room others' pages are written first: whoever asks again finds it.
        let lease = loop {
            let asked = model.fetch(layer, &[(sequence, sequence.tokens())]).expect("a request");
            match asked.wait(PATIENCE) {
                Err(Error::NotReady { status: Status::HostFull, .. }) if since.elapsed() < PATIENCE => {
                    std::thread::sleep(Duration::from_millis(1));
                }
                lease => break lease.expect("its pages"),
            }
        };
        for head in 0..KV_HEADS {
            sequence.read_rows(layer, head, tokens.clone(), &mut rows).expect("rows");
            for (token, found) in tokens.clone().zip(rows.chunks_exact(2 * HEAD_DIM * 4)) {
                let wanted: Vec<u8> =
                    row(seed, layer, head, token).into_iter().flat_map(f32::to_le_bytes).collect();
                assert_eq!(found, wanted, "layer {layer} head {head} token {token}");
            }
        }
        drop(lease);
    }
}
