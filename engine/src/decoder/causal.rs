//! Dense causal attention of a prefill chunk, as matrix products.

use std::cell::RefCell;
use std::ops::Range;

use kvoyant_kernels::Kernels;
use rayon::prelude::*;

use crate::kv::{KvBackend, KvShape};
use crate::weights::gemm::{Mat, Threads, product};

/// Queries of one task: their scores against all keys stay in a core's cache.
const QUERY_BLOCK: usize = 64;

/// A chunk of a sequence whose rows have been stored.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Stored<'a> {
    pub(crate) layer: usize,
    /// Position of the chunk's first token.
    pub(crate) start: usize,
    /// `[T][Hq][d]`.
    pub(crate) queries: &'a [f32],
}

/// Rows that came back from a backend; kept, so that they are allocated once.
#[derive(Debug, Default)]
pub(crate) struct Seen {
    /// `[Hkv][n][d]`.
    keys: Vec<f32>,
    values: Vec<f32>,
}

/// Attention of a chunk over what its tokens see, as the backend has it, into `out: [T][Hq][d]`.
pub(crate) fn attend_stored<B: KvBackend>(
    backend: &mut B,
    sequence: &B::Sequence,
    Stored { layer, start, queries }: Stored<'_>,
    seen: &mut Seen,
    out: &mut [f32],
) -> Result<(), B::Error> {
    let shape = backend.shape();
    let end = start + queries.len() / (shape.query_heads * shape.head_dim);
    let first_row = shape.first_visible(layer, start);
    let values = (end - first_row) * shape.kv_heads * shape.head_dim;
    seen.keys.resize(values, 0.0);
    seen.values.resize(values, 0.0);
    backend.read(layer, sequence, first_row..end, &mut seen.keys, &mut seen.values)?;
    let (keys, values) = (&seen.keys, &seen.values);
    let rows = end - first_row;
    attend(Chunk { shape: backend.shape(), layer, start, first_row, rows, queries, keys, values }, out);
    Ok(())
}

/// Where a chunk's queries and the rows that they see lie.
#[derive(Debug, Clone, Copy)]
struct Chunk<'a> {
    shape: &'a KvShape,
    layer: usize,
    /// Position of the chunk's first query.
    start: usize,
    /// Position of the first row in `keys` and `values`.
    first_row: usize,
    /// Rows in `keys` and `values`; the last is the chunk's last token.
    rows: usize,
    /// `[T][Hq][d]`.
    queries: &'a [f32],
    /// `[Hkv][rows][d]`.
    keys: &'a [f32],
    /// `[Hkv][rows][d]`.
    values: &'a [f32],
}

/// `out[t, h] = softmax(q[t, h] Kᵀ / √d + causal mask) V`, into `out: [T][Hq][d]`.
///
/// A task is a block of queries of one head, so that S = Q Kᵀ and O = S V are matrix products and the heads and blocks spread over all
/// cores.
fn attend(chunk: Chunk<'_>, out: &mut [f32]) {
    let width = chunk.shape.query_heads * chunk.shape.head_dim;
    out.par_chunks_mut(QUERY_BLOCK * width).enumerate().for_each(|(block, out)| {
        // Heads of a block interleave in `out`, so each head's result comes back as its own vector.
        let first = block * QUERY_BLOCK;
        let queries = out.len() / width;
        let d = chunk.shape.head_dim;
        let heads: Vec<Vec<f32>> = (0..chunk.shape.query_heads)
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
    let shape = chunk.shape;
    let (d, width) = (shape.head_dim, shape.query_heads * shape.head_dim);
    let position = |t: usize| chunk.start + first + t;
    // Rows that any query of the block sees, counted from `first_row`.
    let from = shape.first_visible(chunk.layer, position(0)) - chunk.first_row;
    let to = position(queries - 1) + 1 - chunk.first_row;
    let columns = to - from;
    let at = ((head / shape.group()) * chunk.rows + from) * d;
    let keys = Mat::new(&chunk.keys[at..], columns, d, d);
    let values = Mat::new(&chunk.values[at..], columns, d, d);
    let q = Mat::new(&chunk.queries[first * width + head * d..], queries, d, width);
    attend_visible(q, keys, values, (queries, columns, d), |t| {
        let visible_from = shape.first_visible(chunk.layer, position(t)) - chunk.first_row - from;
        visible_from..position(t) + 1 - chunk.first_row - from
    })
}

/// Softmax attention of `queries` over the rows that `visible` gives for each: `[queries][d]`.
fn attend_visible(
    q: Mat<'_>,
    keys: Mat<'_>,
    values: Mat<'_>,
    (queries, columns, d): (usize, usize, usize),
    visible: impl Fn(usize) -> Range<usize>,
) -> Vec<f32> {
    thread_local! {
        static SCORES: RefCell<Vec<f32>> = const { RefCell::new(Vec::new()) };
    }
    let mut out = vec![0.0; queries * d];
    SCORES.with_borrow_mut(|scores| {
        if scores.len() < queries * columns {
            scores.resize(queries * columns, 0.0);
        }
        let scores = &mut scores[..queries * columns];
        product(q, keys.transposed(), 1.0 / (d as f32).sqrt(), scores, columns, Threads::One);
        let kernels = Kernels::best();
        for (t, row) in scores.chunks_exact_mut(columns).enumerate() {
            let visible = visible(t);
            row[..visible.start].fill(0.0);
            kernels.softmax_in_place(&mut row[visible.clone()]);
            row[visible.end..].fill(0.0);
        }
        product(Mat::new(scores, queries, columns, columns), values, 1.0, &mut out, d, Threads::One);
    });
    out
}

/// A chunk whose KV heads each attend over rows of their own.
#[derive(Debug)]
pub(crate) struct Gathered<'a> {
    /// Query heads.
    pub(crate) query_heads: usize,
    /// Values per head.
    pub(crate) d: usize,
    /// `[T][Hq][d]`.
    pub(crate) queries: &'a [f32],
    /// Per KV head keys and values `[rows][d]`: rows that every query sees, then the chunk's own.
    pub(crate) heads: &'a [(Vec<f32>, Vec<f32>)],
}

/// Attention over earlier rows, and causally over the chunk's own, into `out: [T][Hq][d]`.
pub(crate) fn attend_gathered(chunk: &Gathered<'_>, out: &mut [f32]) {
    let (d, width) = (chunk.d, chunk.query_heads * chunk.d);
    let group = chunk.query_heads / chunk.heads.len();
    let tokens = chunk.queries.len() / width;
    let heads: Vec<Vec<f32>> = (0..chunk.query_heads)
        .into_par_iter()
        .map(|head| {
            let (keys, values) = &chunk.heads[head / group];
            let rows = keys.len() / d;
            let mut attended = Vec::with_capacity(tokens * d);
            for first in (0..tokens).step_by(QUERY_BLOCK) {
                let queries = QUERY_BLOCK.min(tokens - first);
                let columns = rows - tokens + first + queries;
                attended.extend(attend_visible(
                    Mat::new(&chunk.queries[first * width + head * d..], queries, d, width),
                    Mat::new(keys, columns, d, d),
                    Mat::new(values, columns, d, d),
                    (queries, columns, d),
                    |t| 0..columns - queries + t + 1,
                ));
            }
            attended
        })
        .collect();
    for (t, token) in out.chunks_exact_mut(width).enumerate() {
        for (head, values) in heads.iter().enumerate() {
            token[head * d..(head + 1) * d].copy_from_slice(&values[t * d..(t + 1) * d]);
        }
    }
}
