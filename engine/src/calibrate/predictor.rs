//! The attention predictor's network: one for all layers and heads, from the attention of the text's last tokens.

use std::sync::Arc;

use kvoyant_methods::attention_predictor::train::{TrainOptions, Trainer};
use kvoyant_methods::attention_predictor::{BLOCK, HISTORY};
use kvoyant_methods::{Artifact, ArtifactKind, Shape};
use rayon::prelude::*;

use super::{CalibrateError, Report, attention, group, read};
use crate::capture::Capture;
use crate::model::Model;

/// Rows that are predicted, of each KV head that is learnt from.
const TARGETS: usize = 2;
/// About so many samples, spread over layers and heads: an epoch takes seconds.
const SAMPLES: usize = 96;
const EPOCHS: usize = 6;
/// Parts of a batch that threads share.
const PARTS: usize = 4;
const SEED: u64 = 0x7072_6564;

/// The attention of a KV head's group at a position, the largest of each block of tokens: `[blocks]`, zeros behind the position.
fn row(
    shape: &Shape,
    capture: &Capture,
    (layer, kv_head): (usize, usize),
    index: usize,
    blocks: usize,
) -> Vec<f32> {
    let position = capture.tokens - capture.prompt_queries + index;
    let keys = &capture.keys(layer, kv_head)[..(position + 1) * shape.head_dim];
    let mut row = vec![0.0_f32; blocks];
    for weights in attention(shape, group(shape, kv_head, capture.prompt_query(layer, index)), keys) {
        for (block, weights) in row.iter_mut().zip(weights.chunks(BLOCK)) {
            *block = weights.iter().copied().fold(*block, f32::max);
        }
    }
    row
}

pub(super) fn make(
    model: &Arc<Model>,
    shape: &Shape,
    tokens: &[u32],
    report: &mut Report<'_>,
) -> Result<Artifact, CalibrateError> {
    let rows = HISTORY + TARGETS;
    if tokens.len() < 2 * rows {
        let (wanted, found) = (2 * rows, tokens.len());
        return Err(CalibrateError::Short { kind: ArtifactKind::Predictor, wanted, found });
    }
    let capture = read(model, shape, tokens, rows, report)?;
    let blocks = tokens.len().div_ceil(BLOCK);
    let heads = shape.layers * shape.kv_heads;
    let every = (heads * TARGETS).div_ceil(SAMPLES).max(1);
    let chosen: Vec<usize> = (0..heads).step_by(every).collect();
    let images: Vec<Vec<f32>> = chosen
        .par_iter()
        .map(|head| {
            let head = (head / shape.kv_heads, head % shape.kv_heads);
            (0..rows).flat_map(|index| row(shape, &capture, head, index, blocks)).collect()
        })
        .collect();
    let mut trainer = Trainer::new(SEED, TrainOptions::default());
    for image in &images {
        for target in 0..TARGETS {
            let at = |row: usize| (target + row) * blocks;
            trainer.sample(&image[at(0)..at(HISTORY)], &image[at(HISTORY)..at(HISTORY + 1)])?;
        }
    }
    let (mut done, all) = (0, EPOCHS * trainer.crops());
    for _ in 0..EPOCHS {
        for batch in trainer.batches() {
            let parts = batch.par_chunks(batch.len().div_ceil(PARTS).max(1));
            let gradients: Vec<_> = parts.map(|crops| trainer.gradient(crops)).collect();
            trainer.apply(&gradients);
            done += batch.len();
            report("training the predictor", done, all);
        }
    }
    Ok(Artifact::Tensors(Arc::new(trainer.finish(shape.fingerprint)?)))
}
