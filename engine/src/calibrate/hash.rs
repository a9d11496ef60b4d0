//! HATA's hash weights: one training per KV head, from some queries of the text's second half and the keys before them.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc;

use kvoyant_methods::hata::train::{HashTrainer, TrainOptions, artifact};
use kvoyant_methods::{Artifact, Shape};
use rayon::prelude::*;

use super::{CalibrateError, Report, group, read};
use crate::model::Model;

/// Bits of a code, as in the paper.
const BITS: usize = 128;
/// Query positions that are learnt from.
const POSITIONS: usize = 10;
/// Shorter than the reference's 15 × 20 steps over 4,096 pairs, so that a small model takes seconds; the loss has settled by
/// then.
const OPTIONS: fn() -> TrainOptions =
    || TrainOptions { epochs: 10, steps: 10, chunk: 512, ..TrainOptions::default() };
const SEED: u64 = 0x6861_7368;

pub(super) fn make(
    model: &Arc<Model>,
    shape: &Shape,
    tokens: &[u32],
    report: &mut Report<'_>,
) -> Result<Artifact, CalibrateError> {
    let half = tokens.len() / 2;
    let capture = read(model, shape, tokens, half, report)?;
    let heads = shape.layers * shape.kv_heads;
    let (done, (said, heard)) = (AtomicUsize::new(0), mpsc::channel());
    let train = |head: usize| {
        let (layer, kv_head) = (head / shape.kv_heads, head % shape.kv_heads);
        let mut trainer = HashTrainer::new(shape.head_dim, BITS, SEED + head as u64, OPTIONS());
        let keys = capture.keys(layer, kv_head);
        for at in 0..POSITIONS {
            let index = (at + 1) * half / POSITIONS - 1;
            let queries = group(shape, kv_head, capture.prompt_query(layer, index));
            let seen = &keys[..(tokens.len() - half + index + 1) * shape.head_dim];
            let labels = trainer.labels(queries, seen);
            trainer.batch(queries, seen, &labels);
        }
        trainer.train(|_, _| {})
    };
    let mut weights: Vec<Vec<f32>> = Vec::new();
    std::thread::scope(|scope| {
        let trained = scope.spawn(|| {
            let said = said;
            (0..heads)
                .into_par_iter()
                .map(|head| {
                    let weights = train(head);
                    // Nobody who listens is nobody who minds.
                    let _ = said.send(done.fetch_add(1, Ordering::Relaxed) + 1);
                    weights
                })
                .collect()
        });
        for done in heard {
            report("training hash weights", done, heads);
        }
        weights = trained.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
    });
    let all = weights.concat();
    let made = artifact(shape.fingerprint, shape.layers, shape.kv_heads, shape.head_dim, all)?;
    Ok(Artifact::Tensors(Arc::new(made)))
}
