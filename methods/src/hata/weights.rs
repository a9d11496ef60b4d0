//! Hash weights: a matrix `[d][bits]` per layer and KV head, trained or drawn.

use std::sync::Arc;

use super::spec::Weights;
use crate::artifact::{ArtifactKind, Artifacts};
use crate::error::MethodError;
use crate::random::Draw;
use crate::shape::Shape;

/// The matrices of one model.
#[derive(Debug, Clone)]
pub(crate) struct HashWeights {
    /// Bits of a code.
    pub(crate) bits: usize,
    /// Differs where the weights do.
    pub(crate) id: u64,
    kv_heads: usize,
    head_dim: usize,
    /// `[layers][Hkv][d][bits]`.
    values: Arc<[f32]>,
}

impl HashWeights {
    /// Those that `weights` names, for `method`.
    ///
    /// # Errors
    /// Trained ones that are missing, of another model, or of a shape that is not the model's.
    pub(crate) fn new(
        method: &'static str,
        weights: Weights,
        shape: &Shape,
        artifacts: &Artifacts,
    ) -> Result<Self, MethodError> {
        let Shape { layers, kv_heads, head_dim, .. } = *shape;
        let (bits, id, values) = match weights {
            Weights::Trained => {
                let artifact = artifacts.tensors(method, ArtifactKind::Hash, shape)?;
                let setting = artifact.setting("bits").unwrap_or("none");
                let bits = setting.parse().ok().filter(|bits| *bits > 0);
                let bits: usize = bits.ok_or_else(|| MethodError::ArtifactFormat {
                    reason: format!("setting `bits` of the hash artifact is {setting}; calibrate again"),
                })?;
                let values = artifact.tensor("hash", &[layers, kv_heads, head_dim, bits])?;
                (bits, artifact.id(), values.into())
            }
            Weights::Random { bits, seed } => {
                let mut draw = Draw::new(&[seed]);
                let values = (0..layers * kv_heads * head_dim * bits).map(|_| draw.normal()).collect();
                (bits, seed, values)
            }
        };
        Ok(Self { bits, id, kv_heads, head_dim, values })
    }

    /// `[d][bits]` of one KV head.
    pub(crate) fn of(&self, layer: usize, kv_head: usize) -> &[f32] {
        let width = self.head_dim * self.bits;
        &self.values[(layer * self.kv_heads + kv_head) * width..][..width]
    }
}
