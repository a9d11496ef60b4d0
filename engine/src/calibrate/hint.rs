//! Corrections of the hints: from the inputs and true queries of the whole text, which need not be kept.

use std::ops::ControlFlow;
use std::sync::Arc;

use kvoyant_kernels::Kernels;
use kvoyant_methods::hint::{HintArtifact, HintBuilder, RIDGE};
use kvoyant_methods::{Artifact, Shape};
use rayon::prelude::*;

use super::{CalibrateError, Report};
use crate::decoder::{Decoder, DecoderOptions, LayerSeen, Logits, PrefillOptions};
use crate::kv::{DenseKv, Dtype, KvShape};
use crate::model::Model;
use crate::weights::{Linear, Precision};

/// Two layers of a chunk of text, one after the other.
pub(super) struct Pair<'a> {
    /// The second one, `i`.
    pub(super) layer: usize,
    /// The input of layer `i − 1`'s attention, before its norm: `[T][hidden]`.
    pub(super) before: &'a [f32],
    /// Layer `i`'s true queries before RoPE, `[T][query_width]`.
    pub(super) queries: &'a [f32],
}

/// Lets the model read a text and shows every pair of layers, chunk by chunk, until `look` has seen enough.
pub(super) fn pairs(
    model: &Arc<Model>,
    tokens: &[u32],
    report: &mut Report<'_>,
    mut look: impl FnMut(Pair<'_>) + Send,
) -> Result<(), CalibrateError> {
    let mut kv = DenseKv::new(KvShape::new(model.config(), Dtype::F16));
    let mut sequence = kv.sequence();
    let mut progress = |done: usize, all: usize| {
        report("reading the text", done, all);
        ControlFlow::Continue(())
    };
    let mut before: Vec<f32> = Vec::new();
    let mut layers = |seen: LayerSeen<'_>| {
        if seen.layer > 0 {
            look(Pair { layer: seen.layer, before: &before, queries: seen.queries });
        }
        before.clear();
        before.extend_from_slice(seen.input);
    };
    let options =
        PrefillOptions { logits: Logits::None, progress: Some(&mut progress), layers: Some(&mut layers) };
    Decoder::new(model.clone(), DecoderOptions::default()).prefill(
        &mut kv,
        &mut sequence,
        tokens,
        options,
    )?;
    Ok(())
}

/// A predicted query and what it is made of.
#[derive(Default)]
pub(super) struct Predicted {
    /// After the norm, `[T][hidden]`.
    pub(super) normed: Vec<f32>,
    /// Before RoPE, `[T][query_width]`.
    pub(super) query: Vec<f32>,
}

impl Predicted {
    /// `query · norm(before)`.
    pub(super) fn make(&mut self, model: &Model, norm: &[f32], query: &Linear, before: &[f32]) {
        let (hidden, eps) = (query.inputs(), model.config().rms_norm_eps);
        let rows = before.len() / hidden;
        self.normed.resize(before.len(), 0.0);
        for (normed, before) in self.normed.chunks_exact_mut(hidden).zip(before.chunks_exact(hidden)) {
            Kernels::best().rms_norm(before, norm, eps, normed);
        }
        self.query.resize(rows * query.outputs(), 0.0);
        query.forward(&self.normed, rows, &mut self.query, Precision::F32);
    }
}

pub(super) fn make(
    model: &Arc<Model>,
    shape: &Shape,
    tokens: &[u32],
    report: &mut Report<'_>,
) -> Result<Artifact, CalibrateError> {
    let hidden = model.config().hidden_size;
    let mut builder = HintBuilder::new(shape, hidden, RIDGE)?;
    let (mut predicted, mut errors, mut failed) = (Predicted::default(), Vec::new(), None);
    pairs(model, tokens, report, |pair| {
        if failed.is_some() {
            return;
        }
        let norm = model.attention_norm(pair.layer);
        predicted.make(model, norm, model.query_projection(pair.layer), pair.before);
        errors.clear();
        errors.extend(pair.queries.iter().zip(&predicted.query).map(|(truth, hint)| truth - hint));
        failed = builder.observe(pair.layer, &predicted.normed, &errors).err();
    })?;
    if let Some(error) = failed {
        return Err(error.into());
    }
    let layers: Vec<usize> = (1..shape.layers).collect();
    let mut corrections: Vec<Vec<f32>> = Vec::with_capacity(layers.len());
    // As many systems at a time as there are threads: each is one thread's work.
    for some in layers.chunks(rayon::current_num_threads()) {
        let solved = some.par_iter().map(|layer| builder.solve(*layer)).collect::<Result<Vec<_>, _>>()?;
        corrections.extend(solved);
        report("solving for corrections", corrections.len(), layers.len());
    }
    let made = HintArtifact::new(shape, hidden, corrections.iter().map(Vec::as_slice))?;
    Ok(Artifact::Hint(Arc::new(made)))
}
