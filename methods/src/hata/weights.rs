//! Hash weights: a matrix `[d][bits]` per layer and KV head, trained or drawn.

use std::sync::Arc;

use super::spec::Weights;
use crate::artifact::{ArtifactKind, Artifacts, TensorArtifact};
use crate::error::MethodError;
use crate::random::Draw;
use crate::shape::Shape;

/// The artifact's tensor.
const TENSOR: &str = "hash";

/// Most bytes of random matrices: 80 layers of 8 KV heads with 128 values and 512 bits take 160 MiB.
const RANDOM_MAX: usize = 256 << 20;

/// The matrices of one model.
#[derive(Debug, Clone)]
pub(crate) struct HashWeights {
    /// Bits of a code.
    pub(crate) bits: usize,
    /// Differs where the weights do.
    pub(crate) id: u64,
    kv_heads: usize,
    head_dim: usize,
    values: Values,
}

/// `[layers][Hkv][d][bits]`.
#[derive(Debug, Clone)]
enum Values {
    /// [`TENSOR`] of the artifact, which all methods share.
    Trained(Arc<TensorArtifact>),
    Random(Arc<[f32]>),
}

impl HashWeights {
    /// Those that `weights` names, for `method`.
    ///
    /// # Errors
    /// Trained ones that are missing, of another model, or of a shape that is not the model's; random ones that would take more
    /// than 256 MiB.
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
                artifact.tensor(TENSOR, &[layers, kv_heads, head_dim, bits])?;
                (bits, artifact.id(), Values::Trained(Arc::clone(artifact)))
            }
            Weights::Random { bits, seed } => {
                let sides = [layers, kv_heads, head_dim, bits];
                let count = sides.into_iter().try_fold(1, usize::checked_mul);
                let count = count.filter(|count| *count <= RANDOM_MAX / size_of::<f32>());
                let count = count.ok_or_else(|| MethodError::Unsuitable {
                    method,
                    reason: format!(
                        "random weights of {bits} bits for {layers} layers of {kv_heads} KV heads with {head_dim} values take \
                         more than {RANDOM_MAX} bytes; set fewer `bits`"
                    ),
                })?;
                let mut draw = Draw::new(&[seed]);
                (bits, seed, Values::Random((0..count).map(|_| draw.normal()).collect()))
            }
        };
        Ok(Self { bits, id, kv_heads, head_dim, values })
    }

    /// `[d][bits]` of one KV head.
    pub(crate) fn of(&self, layer: usize, kv_head: usize) -> &[f32] {
        let values = match &self.values {
            Values::Trained(artifact) => artifact.values(TENSOR),
            Values::Random(values) => values,
        };
        let width = self.head_dim * self.bits;
        &values[(layer * self.kv_heads + kv_head) * width..][..width]
    }
}
