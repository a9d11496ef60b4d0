//! Dense causal attention of a prefill chunk, as matrix products.

use std::cell::RefCell;

use kvoyant_kernels::Kernels;
use rayon::prelude::*;

use crate::config::ModelConfig;
use crate::weights::gemm::{Mat, Threads, product};

/// Queries of one task: their scores against all keys stay in a core's cache.
const QUERY_BLOCK: usize = 64;

/// Where a chunk's queries and the rows that they see lie.
#[derive(Debug, Clone, Copy)]
pub(super) struct Chunk<'a> {
    pub(super) config: &'a ModelConfig,
    pub(super) layer: usize,
    /// Position of the chunk's first query.
    pub(super) start: usize,
    /// Position of the first row in `keys` and `values`.
    pub(super) first_row: usize,
    /// Rows in `keys` and `values`; the last is the chunk's last token.
    pub(super) rows: usize,
    /// `[T][Hq][d]`.
    pub(super) queries: &'a [f32],
    /// `[Hkv][rows][d]`.
    pub(super) keys: &'a [f32],
    /// `[Hkv][rows][d]`.
    pub(super) values: &'a [f32],
}

/// `out[t, h] = softmax(q[t, h] Kᵀ / √d + causal mask) V`, into `out: [T][Hq][d]`.
///
/// A task is a block of queries of one head, so that S = Q Kᵀ and O = S V are matrix products and the heads and blocks spread over all
/// cores.
pub(super) fn attend(chunk: Chunk<'_>, out: &mut [f32]) {
    let width = chunk.config.query_width();
    out.par_chunks_mut(QUERY_BLOCK * width).enumerate().for_each(|(block, out)| {
        // Heads of a block interleave in `out`, so each head's result comes back as its own vector.
        let first = block * QUERY_BLOCK;
        let queries = out.len() / width;
        let d = chunk.config.head_dim;
        let heads: Vec<Vec<f32>> = (0..chunk.config.query_heads)
            .into_par_iter()
            .map(|head| attend_block(chunk, head, first, queries))
            .collect();
        for (t, token) in out.chunks_exact_mut(width).enumerate() {
            for (head, values) in heads.iter().enumerate() {
                token[head * d..(head + 1) * d].copy_from_slice(&values[t * d..(t + 1) * d]);
            }
        }
    });
}

/// Attention of queries `first..first + queries` of one head: `[queries][d]`.
fn attend_block(chunk: Chunk<'_>, head: usize, first: usize, queries: usize) -> Vec<f32> {
    thread_local! {
        static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let config = chunk.config;
    let (d, width) = (config.head_dim, config.query_width());
    let position = |t: usize| chunk.start + first + t;
    // Rows that any query of the block sees, counted from `first_row`.
    let from = config.first_visible(chunk.layer, position(0)) - chunk.first_row;
    let to = position(queries - 1) + 1 - chunk.first_row;
    let columns = to - from;
    let at = ((head / config.group()) * chunk.rows + from) * d;
    let keys = Mat::new(&chunk.keys[at..], columns, d, d);
    let values = Mat::new(&chunk.values[at..], columns, d, d);
    let q = Mat::new(&chunk.queries[first * width + head * d..], queries, d, width);
    let mut out = vec![0.0; queries * d];
    SCORES.with_borrow_mut(|scores| {
        if scores.len() < queries * columns {
            scores.resize(queries * columns, 0.0);
        }
        let scores = &mut scores[..queries * columns];
        product(q, keys.transposed(), 1.0 / (d as f32).sqrt(), scores, columns, Threads::One);
        let kernels = Kernels::best();
        for (t, row) in scores.chunks_exact_mut(columns).enumerate() {
            let visible_from = config.first_visible(chunk.layer, position(t)) - chunk.first_row - from;
            let visible_to = position(t) + 1 - chunk.first_row - from;
            row[..visible_from].fill(0.0);
            kernels.softmax_in_place(&mut row[visible_from..visible_to]);
            row[visible_to..].fill(0.0);
        }
        product(Mat::new(scores, queries, columns, columns), values, 1.0, &mut out, d, Threads::One);
    });
    out
}
