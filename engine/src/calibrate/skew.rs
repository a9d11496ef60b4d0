//! InfiniGen's skew matrices: from the queries and keys of the whole text, which need not be kept.

use std::ops::ControlFlow;
use std::sync::Arc;

use kvoyant_methods::infinigen::SkewBuilder;
use kvoyant_methods::{Artifact, Shape};

use super::{CalibrateError, Report};
use crate::decoder::{Decoder, DecoderOptions, Logits, PrefillOptions};
use crate::kv::{DenseKv, KvShape, Observe, Observed};
use crate::model::Model;

struct Builder(SkewBuilder);

impl Observe for Builder {
    fn prompt(&mut self, layer: usize, _start: usize, queries: &[f32], keys: &[f32], _values: &[f32]) {
        self.0.observe(layer, queries, keys);
    }
}

pub(super) fn make(
    model: &Arc<Model>,
    shape: &Shape,
    tokens: &[u32],
    report: &mut Report<'_>,
) -> Result<Artifact, CalibrateError> {
    let dense = DenseKv::new(KvShape::new(model.config(), shape.dtype));
    let mut sequence = dense.sequence();
    let mut kv = Observed::new(dense, Builder(SkewBuilder::new(shape)?));
    let mut progress = |done: usize, all: usize| {
        report("reading the text", done, all);
        ControlFlow::Continue(())
    };
    let options =
        PrefillOptions { logits: Logits::None, progress: Some(&mut progress), ..PrefillOptions::default() };
    Decoder::new(model.clone(), DecoderOptions::default()).prefill(
        &mut kv,
        &mut sequence,
        tokens,
        options,
    )?;
    Ok(Artifact::Skew(Arc::new(kv.observer.0.finish()?)))
}
