//! HeteroCache's roles: which KV heads look at the same rows, and which keep looking at them, over the text's last tokens.

use std::sync::Arc;

use kvoyant_methods::hetero::profile::{Profile, ProfileOptions};
use kvoyant_methods::{Artifact, Shape};
use rayon::prelude::*;

use super::{CalibrateError, Report, attention, group, read};
use crate::capture::Capture;
use crate::model::Model;

/// Rows of a head's set, as in the reference, but at most an eighth of the text.
const ROWS: usize = 1024;
/// Tokens whose sets are compared with the first one's.
const STEPS: usize = 64;
/// Weights are averaged over so many neighbours before the best are taken.
const NEIGHBOURS: usize = 5;

/// The best rows of a KV head at the token of that index, sorted: by attention averaged over its query heads and over
/// neighbouring tokens, among the `prompt` first tokens.
fn best(
    shape: &Shape,
    capture: &Capture,
    (layer, kv_head): (usize, usize),
    index: usize,
    prompt: usize,
) -> Vec<u32> {
    let keys = &capture.keys(layer, kv_head)[..prompt * shape.head_dim];
    let mut mean = vec![0.0_f32; prompt];
    for weights in attention(shape, group(shape, kv_head, capture.prompt_query(layer, index)), keys) {
        mean.iter_mut().zip(&weights).for_each(|(sum, weight)| *sum += weight);
    }
    let pooled: Vec<f32> = (0..prompt)
        .map(|token| {
            let from = token.saturating_sub(NEIGHBOURS / 2);
            let to = (token + NEIGHBOURS / 2 + 1).min(prompt);
            mean[from..to].iter().sum()
        })
        .collect();
    let mut order: Vec<u32> = (0..prompt as u32).collect();
    let rows = ROWS.min(prompt / 8).max(1);
    if rows < order.len() {
        order.select_nth_unstable_by(rows - 1, |a, b| {
            pooled[*b as usize].total_cmp(&pooled[*a as usize]).then(a.cmp(b))
        });
        order.truncate(rows);
    }
    order.sort_unstable();
    order
}

pub(super) fn make(
    model: &Arc<Model>,
    shape: &Shape,
    tokens: &[u32],
    report: &mut Report<'_>,
) -> Result<Artifact, CalibrateError> {
    let steps = STEPS.min(tokens.len() / 4);
    let capture = read(model, shape, tokens, steps + 1, report)?;
    let prompt = tokens.len() - steps;
    let mut profile = Profile::new(ProfileOptions::default());
    for layer in 0..shape.layers {
        let sets: Vec<Vec<Vec<u32>>> = (0..=steps)
            .into_par_iter()
            .map(|index| {
                let heads = 0..shape.kv_heads;
                heads.map(|head| best(shape, &capture, (layer, head), index, prompt)).collect()
            })
            .collect();
        profile.layer(&sets[0], &sets[1..])?;
        report("comparing heads", layer + 1, shape.layers);
    }
    Ok(Artifact::Tensors(Arc::new(profile.finish(shape.fingerprint)?)))
}
