//! The skew matrices of a model, and their file form (safetensors).

use std::collections::HashMap;

use safetensors::tensor::{Dtype as FileDtype, SafeTensors, TensorView};

use crate::error::MethodError;
use crate::shape::{Fingerprint, Shape};

/// The name of the one tensor in the file.
const TENSOR: &str = "skew";
/// What the file says it is, under the metadata key `format`.
const FORMAT: &str = "kvoyant-skew-1";
/// How far `AᵀA` may be from the identity: f32 rounding of the decomposition is two orders below.
const ORTHOGONAL: f32 = 1e-3;

/// An orthogonal matrix per layer and KV head, calibrated on one model ([`super::SkewBuilder`]).
#[derive(Debug, Clone, PartialEq)]
pub struct SkewArtifact {
    layers: usize,
    kv_heads: usize,
    head_dim: usize,
    model: Fingerprint,
    /// `[layers][kv_heads][d][d]`
    matrices: Vec<f32>,
    id: u64,
}

impl SkewArtifact {
    /// From matrices `[layers][kv_heads][d][d]`, row-major: `q̃_j = Σ_i q_i·A_ij`.
    ///
    /// # Errors
    /// Another number of values, or a matrix that is not orthogonal: it would change every score.
    pub fn new(shape: &Shape, matrices: Vec<f32>) -> Result<Self, MethodError> {
        Self::checked(shape.layers, shape.kv_heads, shape.head_dim, shape.fingerprint, matrices)
    }

    fn checked(
        layers: usize,
        kv_heads: usize,
        head_dim: usize,
        model: Fingerprint,
        matrices: Vec<f32>,
    ) -> Result<Self, MethodError> {
        let bad = |reason: String| MethodError::ArtifactFormat { reason };
        let square = head_dim * head_dim;
        if square == 0 || matrices.len() != layers * kv_heads * square {
            let found = matrices.len();
            return Err(bad(format!("{found} values are not {}", words(layers, kv_heads, head_dim))));
        }
        for (at, a) in matrices.chunks_exact(square).enumerate() {
            let error = orthogonality_error(a, head_dim);
            // Written so that NaN is refused too.
            if !matches!(error.partial_cmp(&ORTHOGONAL), Some(std::cmp::Ordering::Less)) {
                let (layer, head) = (at / kv_heads, at % kv_heads);
                return Err(bad(format!(
                    "the matrix of layer {layer}, KV head {head} is not orthogonal ({error:e})"
                )));
            }
        }
        let id = fnv(model.0.iter().copied().chain(matrices.iter().flat_map(|value| value.to_le_bytes())));
        Ok(Self { layers, kv_heads, head_dim, model, matrices, id })
    }

    /// The matrix of one KV head, `[d][d]` row-major.
    ///
    /// # Panics
    /// Where there is no such layer or head.
    #[must_use]
    pub fn matrix(&self, layer: usize, kv_head: usize) -> &[f32] {
        assert!(kv_head < self.kv_heads, "KV head {kv_head} of {}", self.kv_heads);
        let square = self.head_dim * self.head_dim;
        &self.matrices[(layer * self.kv_heads + kv_head) * square..][..square]
    }

    /// The model it was calibrated on.
    #[must_use]
    pub fn model(&self) -> Fingerprint {
        self.model
    }

    /// A number that differs between artifacts that differ.
    #[must_use]
    pub fn id(&self) -> u64 {
        self.id
    }

    /// Whether it fits that model.
    ///
    /// # Errors
    /// [`MethodError::ArtifactShape`] or [`MethodError::ArtifactFingerprint`], each with both sides.
    pub fn check(&self, shape: &Shape) -> Result<(), MethodError> {
        if (self.layers, self.kv_heads, self.head_dim) != (shape.layers, shape.kv_heads, shape.head_dim) {
            return Err(MethodError::ArtifactShape {
                expected: words(shape.layers, shape.kv_heads, shape.head_dim),
                found: words(self.layers, self.kv_heads, self.head_dim),
            });
        }
        if self.model != shape.fingerprint {
            return Err(MethodError::ArtifactFingerprint { expected: shape.fingerprint, found: self.model });
        }
        Ok(())
    }

    /// The file form: safetensors with one f32 tensor `skew` `[layers, kv_heads, d, d]` and the model's
    /// fingerprint in the metadata.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`] where the library refuses, which no valid artifact makes it do.
    pub fn to_bytes(&self) -> Result<Vec<u8>, MethodError> {
        let bad =
            |error: safetensors::SafeTensorError| MethodError::ArtifactFormat { reason: error.to_string() };
        let data: Vec<u8> = self.matrices.iter().flat_map(|value| value.to_le_bytes()).collect();
        let shape = vec![self.layers, self.kv_heads, self.head_dim, self.head_dim];
        let view = TensorView::new(FileDtype::F32, shape, &data).map_err(bad)?;
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("model".to_owned(), self.model.to_string()),
        ]);
        safetensors::serialize([(TENSOR, view)], Some(metadata)).map_err(bad)
    }

    /// Reads the file form.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`]: not safetensors, another format, a missing or wrong-shaped tensor, or
    /// matrices that are not orthogonal.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MethodError> {
        let bad = |reason: String| MethodError::ArtifactFormat { reason };
        let library = |error: safetensors::SafeTensorError| bad(error.to_string());
        let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(library)?;
        let metadata = metadata.metadata().clone().unwrap_or_default();
        match metadata.get("format").map(String::as_str) {
            Some(FORMAT) => {}
            Some(other) => {
                return Err(bad(format!("its format is `{other}`, this program reads `{FORMAT}`")));
            }
            None => return Err(bad(format!("it does not say that its format is `{FORMAT}`"))),
        }
        let model = metadata.get("model").ok_or_else(|| bad("it does not name its model".into()))?.parse()?;
        let tensors = SafeTensors::deserialize(bytes).map_err(library)?;
        let tensor = tensors.tensor(TENSOR).map_err(library)?;
        let &[layers, kv_heads, rows, columns] = tensor.shape() else {
            return Err(bad(format!("its shape {:?} is not [layers, kv_heads, d, d]", tensor.shape())));
        };
        if tensor.dtype() != FileDtype::F32 || rows != columns {
            return Err(bad(format!(
                "it holds {:?} of {:?}, not f32 of [layers, kv_heads, d, d]",
                tensor.dtype(),
                tensor.shape()
            )));
        }
        let values = tensor.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
        Self::checked(layers, kv_heads, rows, model, values)
    }
}

fn words(layers: usize, kv_heads: usize, head_dim: usize) -> String {
    format!("{layers} layers of {kv_heads} KV heads of {head_dim}")
}

/// The largest deviation of `AᵀA` from the identity; NaN where a value is.
pub(crate) fn orthogonality_error(a: &[f32], d: usize) -> f32 {
    let mut gram = vec![0.0_f32; d * d];
    for row in a.chunks_exact(d) {
        for (i, x) in row.iter().enumerate() {
            gram[i * d..(i + 1) * d].iter_mut().zip(row).for_each(|(sum, y)| *sum += x * y);
        }
    }
    gram.iter().enumerate().fold(0.0, |worst: f32, (at, value)| {
        let error = (value - if at / d == at % d { 1.0 } else { 0.0 }).abs();
        if error.is_nan() || error > worst { error } else { worst }
    })
}

/// FNV-1a, 64 bits: not against forgers, only to tell artifacts apart.
fn fnv(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::small;
    use crate::testing::random_artifact;

    #[test]
    fn an_artifact_reads_back_from_its_bytes() {
        let artifact = random_artifact(&small(), 4);
        let bytes = artifact.to_bytes().unwrap();
        assert_eq!(SkewArtifact::from_bytes(&bytes).unwrap(), artifact);
        assert_ne!(artifact.id(), random_artifact(&small(), 5).id());
    }

    #[test]
    fn another_shape_or_another_model_is_refused_and_both_are_named() {
        let artifact = random_artifact(&small(), 4);
        assert_eq!(artifact.check(&small()), Ok(()));
        let message = artifact.check(&Shape { layers: 3, ..small() }).unwrap_err().to_string();
        assert!(message.contains("2 layers") && message.contains("3 layers"), "{message}");
        let other = Fingerprint([9; 16]);
        let error = artifact.check(&Shape { fingerprint: other, ..small() }).unwrap_err();
        assert_eq!(error, MethodError::ArtifactFingerprint { expected: other, found: small().fingerprint });
        let message = error.to_string();
        assert!(message.contains("0909") && message.contains("0707"), "{message}");
    }

    #[test]
    fn bytes_that_hold_no_artifact_are_refused_with_the_reason() {
        let artifact = random_artifact(&small(), 4);
        let bytes = artifact.to_bytes().unwrap();
        for length in [0, 7, 8, 40, bytes.len() - 1] {
            assert!(SkewArtifact::from_bytes(&bytes[..length]).is_err(), "cut to {length} bytes");
        }
        let with = |shape: Vec<usize>, metadata: &[(&str, &str)]| {
            let data = vec![0_u8; shape.iter().product::<usize>() * 4];
            let view = TensorView::new(FileDtype::F32, shape, &data).unwrap();
            let metadata = metadata.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
            let bytes = safetensors::serialize([(TENSOR, view)], Some(metadata)).unwrap();
            SkewArtifact::from_bytes(&bytes).unwrap_err().to_string()
        };
        let good = [("format", FORMAT), ("model", "00000000000000000000000000000000")];
        assert!(with(vec![1, 1, 2, 2], &[]).contains("format"));
        assert!(with(vec![1, 1, 2, 2], &[("format", "other")]).contains("other"));
        assert!(with(vec![1, 1, 2, 2], &[good[0], ("model", "xyz")]).contains("xyz"));
        assert!(with(vec![1, 1, 2, 3], &good).contains("[1, 1, 2, 3]"));
        assert!(with(vec![4, 2], &good).contains("[4, 2]"));
        assert!(with(vec![1, 1, 2, 2], &good).contains("not orthogonal"), "all zeros");
    }

    #[test]
    fn a_matrix_with_nan_is_refused() {
        let mut matrices = vec![0.0; 2 * 2 * 64];
        matrices[3] = f32::NAN;
        assert!(SkewArtifact::new(&small(), matrices).is_err());
        assert!(SkewArtifact::new(&small(), vec![1.0; 5]).is_err());
    }
}
