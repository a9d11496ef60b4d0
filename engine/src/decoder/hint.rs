//! How a layer's query is predicted from the input of the layer before it.

use std::sync::Arc;

use kvoyant_kernels::packed::PackedMatrix;
use kvoyant_methods::hint::HintArtifact;
use kvoyant_methods::{MethodError, Shape};

use crate::model::Model;
use crate::weights::Linear;

/// What makes layer `i`'s predicted query out of layer `i - 1`'s input.
#[derive(Debug, Clone, Default)]
pub enum HintNorm {
    /// Layer `i`'s own norm and `W_Q`: nearer to the true query than the paper's on the models tried.
    #[default]
    Own,
    /// Layer `i - 1`'s norm and layer `i`'s `W_Q`, as the InfiniGen paper has it.
    Previous,
    /// Layer `i`'s own norm, and its `W_Q` with a calibrated correction folded in: as fast, and nearer still.
    Learned(Arc<LearnedHints>),
}

/// `W_Q + R` of every layer of a model but its first, where `R` is the layer's calibrated correction
/// ([`kvoyant_methods::hint`]).
#[derive(Debug)]
pub struct LearnedHints {
    /// Of layers 1, 2, …
    queries: Vec<Linear>,
}

impl LearnedHints {
    /// Folds the corrections of `artifact` into the query projections of `model`, whose shape `shape` is. They are stored as the
    /// model's own: in Q8_0 too where those are.
    ///
    /// # Errors
    /// [`MethodError::ArtifactShape`] or [`MethodError::ArtifactFingerprint`]: the artifact is of another model.
    pub fn new(model: &Model, shape: &Shape, artifact: &HintArtifact) -> Result<Self, MethodError> {
        artifact.check_width(shape, model.config().hidden_size)?;
        let fold = |layer: usize| {
            let query = model.query_projection(layer);
            let mut weight = query.weight();
            artifact.fold(layer, &mut weight);
            let bias = query.bias().map(<[f32]>::to_vec);
            let packed = query.is_quantised().then(|| PackedMatrix::quantise(&weight, query.inputs()));
            Linear::new(&weight, bias, query.outputs(), query.inputs(), packed)
        };
        Ok(Self { queries: (1..model.config().layers).map(fold).collect() })
    }

    /// `W_Q + R` of a layer, `[query_width, hidden]`.
    ///
    /// # Panics
    /// For layer 0, which has no hint, and layers that there are none of.
    pub fn query(&self, layer: usize) -> &Linear {
        &self.queries[layer - 1]
    }
}
