//! How far predicted queries are from the true ones.

use std::sync::Arc;

use super::hint::{Predicted, pairs};
use super::{CalibrateError, Report};
use crate::decoder::{HintNorm, LearnedHints};
use crate::model::Model;

/// How far a layer's predicted queries are from the true ones.
#[derive(Debug, Clone, PartialEq)]
pub struct HintError {
    /// The layer.
    pub layer: usize,
    /// `‖q̃ − q‖ / ‖q‖` of its queries `[Hq][d]`, mean over the tokens; one for each kind of hint asked for.
    pub relative: Vec<f64>,
}

/// Lets the model read a text and compares each kind of hint with the true query, layer by layer, from layer 1 on. RoPE turns both
/// alike, so that the error is the same before and after it.
///
/// # Errors
/// A text that does not fit the model.
///
/// # Panics
/// Where [`HintNorm::Learned`] is of another model.
pub fn hint_errors(
    model: &Arc<Model>,
    kinds: &[HintNorm],
    tokens: &[u32],
    report: &mut Report<'_>,
) -> Result<Vec<HintError>, CalibrateError> {
    let width = model.config().query_width();
    let mut predicted = Predicted::default();
    let mut sums = vec![vec![0.0; kinds.len()]; model.config().layers.saturating_sub(1)];
    pairs(model, tokens, report, |pair| {
        let (own, plain) = (model.attention_norm(pair.layer), model.query_projection(pair.layer));
        for (sum, kind) in sums[pair.layer - 1].iter_mut().zip(kinds) {
            let (norm, query) = match kind {
                HintNorm::Own => (own, plain),
                HintNorm::Previous => (model.attention_norm(pair.layer - 1), plain),
                HintNorm::Learned(learned) => (own, LearnedHints::query(learned, pair.layer)),
            };
            predicted.make(model, norm, query, pair.before);
            let rows = predicted.query.chunks_exact(width).zip(pair.queries.chunks_exact(width));
            *sum += rows.map(|(hint, truth)| relative_error(hint, truth)).sum::<f64>();
        }
    })?;
    let mean = |sums: Vec<f64>| sums.into_iter().map(|sum| sum / tokens.len().max(1) as f64).collect();
    Ok(sums
        .into_iter()
        .enumerate()
        .map(|(at, sums)| HintError { layer: at + 1, relative: mean(sums) })
        .collect())
}

/// `‖hint − truth‖ / ‖truth‖`.
fn relative_error(hint: &[f32], truth: &[f32]) -> f64 {
    let square =
        |values: &mut dyn Iterator<Item = f32>| -> f64 { values.map(|v| f64::from(v).powi(2)).sum() };
    let error = square(&mut hint.iter().zip(truth).map(|(hint, truth)| hint - truth));
    let truth = square(&mut truth.iter().copied());
    (error / truth.max(f64::MIN_POSITIVE)).sqrt()
}
