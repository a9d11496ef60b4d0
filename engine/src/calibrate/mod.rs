//! Artifacts that methods, or the engine for them, learn from a model offline, by letting it read a text.

mod hash;
mod hint;
mod hint_error;
mod predictor;
mod roles;
mod skew;

use std::convert::Infallible;
use std::ops::ControlFlow;
use std::sync::Arc;

pub use hint_error::{HintError, hint_errors};
use kvoyant_kernels::Kernels;
use kvoyant_methods::{Artifact, ArtifactKind, MethodError, Shape};

use crate::capture::{Capture, CaptureOptions};
use crate::error::ForwardError;
use crate::model::Model;

/// Why there is no artifact.
#[derive(Debug, thiserror::Error)]
pub enum CalibrateError {
    /// The model could not read the text, or the caller stopped.
    #[error("calibration failed: {0}")]
    Forward(#[from] ForwardError<Infallible>),
    /// What was learnt makes no artifact.
    #[error(transparent)]
    Method(#[from] MethodError),
    /// There is not enough to learn from.
    #[error("a {kind} artifact wants a text of at least {wanted} tokens, and this one has {found}")]
    Short {
        /// Which artifact.
        kind: ArtifactKind,
        /// Least tokens.
        wanted: usize,
        /// Tokens of the text.
        found: usize,
    },
}

/// Called with what is being done, and how much of it, of how much.
pub type Report<'a> = dyn FnMut(&'static str, usize, usize) + 'a;

/// Least tokens of a text that anything can be learnt from.
const LEAST_TOKENS: usize = 128;

/// Makes an artifact for a model of that shape from its reading of `tokens`. The same text gives the same artifact.
///
/// On two cores, for SmolLM2-135M and 2,048 tokens: skew matrices take some seconds, the others up to a minute each.
///
/// # Errors
/// A text that is too short, or does not fit the model.
pub fn calibrate(
    model: &Arc<Model>,
    kind: ArtifactKind,
    shape: &Shape,
    tokens: &[u32],
    report: &mut Report<'_>,
) -> Result<Artifact, CalibrateError> {
    if tokens.len() < LEAST_TOKENS {
        return Err(CalibrateError::Short { kind, wanted: LEAST_TOKENS, found: tokens.len() });
    }
    match kind {
        ArtifactKind::Skew => skew::make(model, shape, tokens, report),
        ArtifactKind::Hash => hash::make(model, shape, tokens, report),
        ArtifactKind::Predictor => predictor::make(model, shape, tokens, report),
        ArtifactKind::Roles => roles::make(model, shape, tokens, report),
        ArtifactKind::Hint => hint::make(model, shape, tokens, report),
    }
}

/// Queries of the text's last `queries` tokens, and all keys.
fn read(
    model: &Arc<Model>,
    shape: &Shape,
    tokens: &[u32],
    queries: usize,
    report: &mut Report<'_>,
) -> Result<Capture, CalibrateError> {
    let options = CaptureOptions { steps: 0, prompt_queries: queries, format: shape.dtype.into() };
    let mut progress = |done: usize, all: usize| {
        report("reading the text", done, all);
        ControlFlow::Continue(())
    };
    Ok(Capture::take(model, tokens, options, &mut progress)?)
}

/// The group of query heads of a KV head in a query `[Hq][d]`.
fn group<'a>(shape: &Shape, kv_head: usize, query: &'a [f32]) -> &'a [f32] {
    let values = shape.group() * shape.head_dim;
    &query[kv_head * values..(kv_head + 1) * values]
}

/// Softmaxed attention of each query `[g][d]` of a group over keys `[n][d]`: `[g]` of `[n]`.
fn attention(shape: &Shape, queries: &[f32], keys: &[f32]) -> Vec<Vec<f32>> {
    let (d, kernels) = (shape.head_dim, Kernels::best());
    let scale = 1.0 / (d as f32).sqrt();
    let row = |query: &[f32]| {
        let mut row: Vec<f32> = keys.chunks_exact(d).map(|key| kernels.dot(query, key) * scale).collect();
        kernels.softmax_in_place(&mut row);
        row
    };
    queries.chunks_exact(d).map(row).collect()
}
