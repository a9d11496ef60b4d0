//! What a decode step would take on a GPU, from what a method reads and moves: a roofline, not a measurement.
//!
//! A layer takes the time to read its weights and the rows that it attends from the GPU's memory. What a method moves crosses a
//! link, and how much of that is hidden depends on when the method can name its rows:
//!
//! | hint | selection and transfer hide behind |
//! |---|---|
//! | none, ids, ahead | the layer before |
//! | previous | the step before |
//! | current | nothing |
//!
//! Whatever hides behind what, a step is never shorter than its transfers together. The time to select is the one measured for
//! a layer, scaled by the bytes of its rows (digests grow with them) and divided by the cores that share the work. Batch 1, f16, one token a
//! step.

use kvoyant_methods::HintSource;
use serde::{Deserialize, Serialize};

/// Bandwidth of the GPU's memory in bytes per second: H100 SXM (NVIDIA data sheet, 2023).
pub const HBM_BYTES_PER_S: f64 = 3.35e12;
/// The share of it that reading weights and rows reaches (assumed).
pub const HBM_SHARE: f64 = 0.8;
/// Seconds until the first byte of a layer's transfer has come (assumed: a request, a copy and a flag).
pub const LINK_LATENCY_S: f64 = 10e-6;
/// Bandwidth of the host's memory for CPU attention, in bytes per second (assumed: eight channels of DDR5, half of the peak).
pub const HOST_BYTES_PER_S: f64 = 150e9;
/// Cores that share a selection: the measured time is one core's (assumed: one for each KV head).
pub const SELECT_CORES: f64 = 8.0;
/// Bytes of a stored value: f16.
const VALUE_BYTES: f64 = 2.0;
/// Links that are modelled, in GB/s: PCIe 4.0 x16 and 5.0 x16 as copies reach them (assumed).
pub const LINKS_GBPS: [f64; 2] = [25.0, 55.0];
/// Contexts that are modelled, in tokens.
pub const CONTEXTS: [usize; 3] = [32 << 10, 64 << 10, 128 << 10];

/// A model's sizes, as its configuration file has them.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ModelShape {
    /// Its name.
    pub name: &'static str,
    /// Layers.
    pub layers: usize,
    /// KV heads of a layer.
    pub kv_heads: usize,
    /// Values of a key.
    pub head_dim: usize,
    /// Query heads of a layer.
    pub query_heads: usize,
    /// Width.
    pub width: usize,
    /// Width of the feed-forward layers.
    pub feed_forward: usize,
    /// Tokens of the vocabulary.
    pub vocabulary: usize,
}

/// meta-llama/Meta-Llama-3-8B, config.json.
pub const LLAMA_3_8B: ModelShape = ModelShape {
    name: "Llama-3-8B",
    layers: 32,
    kv_heads: 8,
    head_dim: 128,
    query_heads: 32,
    width: 4096,
    feed_forward: 14336,
    vocabulary: 128_256,
};

/// Qwen/Qwen2.5-14B, config.json.
pub const QWEN_2_5_14B: ModelShape = ModelShape {
    name: "Qwen2.5-14B",
    layers: 48,
    kv_heads: 8,
    head_dim: 128,
    query_heads: 40,
    width: 5120,
    feed_forward: 13824,
    vocabulary: 152_064,
};

impl ModelShape {
    /// Weights of a layer: four projections and a gated feed-forward layer.
    #[must_use]
    pub fn layer_weights(&self) -> f64 {
        let attention = 2 * self.width * self.head_dim * (self.query_heads + self.kv_heads);
        (attention + 3 * self.width * self.feed_forward) as f64
    }

    /// Weights of the output projection.
    #[must_use]
    pub fn output_weights(&self) -> f64 {
        (self.width * self.vocabulary) as f64
    }

    /// Bytes of a row: K and V of one token and KV head.
    #[must_use]
    pub fn row_bytes(&self) -> f64 {
        2.0 * self.head_dim as f64 * VALUE_BYTES
    }
}

/// What a method was seen to do, per KV head and step, as shares of the sequence's tokens.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Seen {
    /// Which query it wants, which says what its transfers hide behind.
    pub hint: HintSource,
    /// Bytes moved, as a share of the bytes of the head's rows.
    pub moved_share: f64,
    /// Of these, the part that was brought ahead of its step: it has a whole step to arrive.
    pub ahead_share: f64,
    /// Rows attended on the device besides sinks and window, as a share of the tokens.
    pub attended_share: f64,
    /// Rows attended by the CPU, as a share of the tokens.
    pub cpu_share: f64,
    /// Seconds that one core took to select, per byte of the rows that it selected from.
    pub select_s_per_byte: f64,
}

/// A modelled step.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Modelled {
    /// The model's name.
    pub model: String,
    /// Tokens of the context.
    pub tokens: usize,
    /// The link's bandwidth in GB/s.
    pub link_gbps: f64,
    /// Milliseconds a token.
    pub ms_per_token: f64,
    /// Share of them in which the GPU waits for rows or a selection (0–1).
    pub stall_share: f64,
}

/// The step of one model, context and link.
#[must_use]
pub fn step(model: &ModelShape, tokens: usize, link_gbps: f64, seen: &Seen) -> Modelled {
    let hbm = HBM_BYTES_PER_S * HBM_SHARE;
    let layers = model.layers as f64;
    let head_bytes = tokens as f64 * model.row_bytes();
    let rows_bytes = head_bytes * model.kv_heads as f64;
    let on_device = seen.attended_share * rows_bytes;
    let compute = (model.layer_weights() * VALUE_BYTES + on_device) / hbm;
    let moved = seen.moved_share * rows_bytes;
    let transfer = if moved > 0.0 { LINK_LATENCY_S + moved / (link_gbps * 1e9) } else { 0.0 };
    let on_cpu = seen.cpu_share * rows_bytes / HOST_BYTES_PER_S;
    let select = seen.select_s_per_byte * rows_bytes / SELECT_CORES;
    let at_once = if seen.moved_share > 0.0 { 1.0 - seen.ahead_share / seen.moved_share } else { 1.0 };
    let needed = select + (transfer * at_once).max(on_cpu);
    let hidden = match seen.hint {
        HintSource::None | HintSource::Ids | HintSource::Ahead => compute,
        HintSource::Previous => compute * layers,
        HintSource::Current => 0.0,
    };
    let busy = compute * layers + model.output_weights() * VALUE_BYTES / hbm;
    let late = (needed - hidden).max(0.0) * layers;
    // Transfers share one link, and cores one memory: a step cannot be shorter than either.
    let bound = (layers * transfer.max(on_cpu).max(select) - busy).max(0.0);
    let stalled = late.max(bound);
    Modelled {
        model: model.name.to_owned(),
        tokens,
        link_gbps,
        ms_per_token: (busy + stalled) * 1e3,
        stall_share: stalled / (busy + stalled),
    }
}

/// Every model, context and link.
#[must_use]
pub fn all(seen: &Seen) -> Vec<Modelled> {
    let mut rows = Vec::new();
    for model in [&LLAMA_3_8B, &QWEN_2_5_14B] {
        for tokens in CONTEXTS {
            rows.extend(LINKS_GBPS.map(|link| step(model, tokens, link, seen)));
        }
    }
    rows
}

#[cfg(test)]
mod tests {
    use super::*;

    fn seen(hint: HintSource, moved_share: f64) -> Seen {
        Seen {
            hint,
            moved_share,
            ahead_share: 0.0,
            attended_share: 0.06,
            cpu_share: 0.0,
            select_s_per_byte: 0.0,
        }
    }

    #[test]
    fn the_shapes_have_as_many_weights_as_their_names_say() {
        let billions = |model: &ModelShape| {
            (model.layers as f64 * model.layer_weights() + 2.0 * model.output_weights()) / 1e9
        };
        assert!((billions(&LLAMA_3_8B) - 8.03).abs() < 0.01, "{}", billions(&LLAMA_3_8B));
        assert!((billions(&QWEN_2_5_14B) - 14.77).abs() < 0.02, "{}", billions(&QWEN_2_5_14B));
    }

    #[test]
    fn moving_everything_takes_what_the_link_takes() {
        let full = step(&LLAMA_3_8B, 128 << 10, 25.0, &seen(HintSource::None, 1.0));
        // 32 layers of 128K tokens of 8 heads of 512 bytes, at 25 GB/s.
        let wire = 32.0 * 131_072.0 * 8.0 * 512.0 / 25e9 * 1e3;
        assert!(full.ms_per_token >= wire && full.ms_per_token < wire * 1.05, "{} {wire}", full.ms_per_token);
        assert!(full.stall_share > 0.9);
    }

    #[test]
    fn nothing_to_move_never_stalls_and_a_faster_link_is_never_slower() {
        assert_eq!(step(&QWEN_2_5_14B, 64 << 10, 25.0, &seen(HintSource::Current, 0.0)).stall_share, 0.0);
        for moved in [0.001, 0.01, 0.1] {
            let of = |hint, link| step(&QWEN_2_5_14B, 64 << 10, link, &seen(hint, moved)).ms_per_token;
            assert!(of(HintSource::Ahead, 55.0) <= of(HintSource::Ahead, 25.0));
            assert!(of(HintSource::Previous, 25.0) <= of(HintSource::Ahead, 25.0));
            assert!(of(HintSource::Ahead, 25.0) <= of(HintSource::Current, 25.0));
        }
        assert_eq!(all(&seen(HintSource::Ahead, 0.01)).len(), 12);
    }
}
