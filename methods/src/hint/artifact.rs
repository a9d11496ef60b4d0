//! The corrections of a model's hints, and their file form (safetensors).

use std::collections::HashMap;

use kvoyant_kernels::{Dtype, Kernels};
use safetensors::tensor::{Dtype as FileDtype, SafeTensors, TensorView};

use crate::error::MethodError;
use crate::shape::{Fingerprint, Shape};

/// The name of the one tensor in the file.
const TENSOR: &str = "hint";
/// What the file says it is, under the metadata key `format`.
const FORMAT: &str = "kvoyant-hint-1";
/// Most bytes of the corrections: twice those of a model with 32 layers, a width of 4,096 and as many query values.
const BYTES_MAX: usize = 2 << 30;

/// A correction `R_i` of each layer's hint but the first one's, calibrated on one model ([`super::HintBuilder`]).
#[derive(Clone, PartialEq)]
pub struct HintArtifact {
    sides: Sides,
    model: Fingerprint,
    /// f16, little-endian, `[layers − 1][query_width][hidden]`: what is left of the error after rounding is far below what the
    /// regression leaves.
    bytes: Vec<u8>,
}

/// What a correction fits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Sides {
    layers: usize,
    query_width: usize,
    hidden: usize,
}

impl Sides {
    /// f16 bytes of all corrections, if they are some and not too many.
    fn bytes(self) -> Result<usize, MethodError> {
        let bytes = self
            .layers
            .checked_sub(1)
            .and_then(|layers| layers.checked_mul(self.query_width))
            .and_then(|values| values.checked_mul(self.hidden))
            .and_then(|values| values.checked_mul(Dtype::F16.bytes()));
        match bytes {
            Some(bytes @ 1..=BYTES_MAX) => Ok(bytes),
            _ => Err(MethodError::ArtifactFormat {
                reason: format!("hint corrections for {self} are none, or more than {BYTES_MAX} bytes"),
            }),
        }
    }
}

impl std::fmt::Display for Sides {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{} layers with {} query values of a width of {}",
            self.layers, self.query_width, self.hidden
        )
    }
}

impl std::fmt::Debug for HintArtifact {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("HintArtifact")
            .field("sides", &self.sides)
            .field("model", &self.model)
            .finish_non_exhaustive()
    }
}

impl HintArtifact {
    /// From the corrections of layers 1, 2, …, each `[query_width][hidden]`, row-major, for a model of width `hidden`.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`]: another number of layers or values, more than 2 GiB, or a value that f16 cannot hold.
    pub fn new<'a>(
        shape: &Shape,
        hidden: usize,
        corrections: impl IntoIterator<Item = &'a [f32]>,
    ) -> Result<Self, MethodError> {
        let bad = |reason: String| MethodError::ArtifactFormat { reason };
        let sides = Sides { layers: shape.layers, query_width: shape.query_heads * shape.head_dim, hidden };
        let all = sides.bytes()?;
        let of_layer = all / (sides.layers - 1);
        let mut bytes = Vec::with_capacity(all);
        for (at, correction) in corrections.into_iter().enumerate() {
            if correction.len() * Dtype::F16.bytes() != of_layer || bytes.len() == all {
                return Err(bad(format!(
                    "{} values for layer {} are none of {sides}",
                    correction.len(),
                    at + 1
                )));
            }
            let first = bytes.len();
            bytes.resize(first + of_layer, 0);
            Kernels::best().from_f32(Dtype::F16, correction, &mut bytes[first..]);
        }
        if bytes.len() != all {
            return Err(bad(format!("corrections of {} layers are not {sides}", bytes.len() / of_layer)));
        }
        Self::checked(sides, shape.fingerprint, bytes)
    }

    fn checked(sides: Sides, model: Fingerprint, bytes: Vec<u8>) -> Result<Self, MethodError> {
        /// All bits of an f16's exponent: infinite, or no number.
        const EXPONENT: u16 = 0x7c00;
        let bad = |reason: String| MethodError::ArtifactFormat { reason };
        let wanted = sides.bytes()?;
        if bytes.len() != wanted {
            return Err(bad(format!("{} bytes are not the {wanted} of {sides}", bytes.len())));
        }
        let values = bytes.as_chunks().0.iter().map(|value| u16::from_le_bytes(*value));
        if let Some(at) = values.into_iter().position(|bits| bits & EXPONENT == EXPONENT) {
            let layer = 1 + at / (sides.query_width * sides.hidden);
            return Err(bad(format!("the correction of layer {layer} has a value that is no finite number")));
        }
        Ok(Self { sides, model, bytes })
    }

    /// Adds the correction of a layer's hint to `weight`, the layer's `W_Q` `[query_width][hidden]`.
    ///
    /// # Panics
    /// Where there is no such layer, layer 0 among them, or `weight` has another size: see [`Self::check`].
    pub fn fold(&self, layer: usize, weight: &mut [f32]) {
        assert!((1..self.sides.layers).contains(&layer), "layer {layer} of {}", self.sides);
        assert_eq!(weight.len(), self.sides.query_width * self.sides.hidden, "W_Q of {}", self.sides);
        let of_layer = weight.len() * Dtype::F16.bytes();
        let kernels = Kernels::best();
        let mut row = vec![0.0; self.sides.hidden];
        let bytes = &self.bytes[(layer - 1) * of_layer..layer * of_layer];
        let rows = bytes.chunks_exact(self.sides.hidden * Dtype::F16.bytes());
        for (weight, bytes) in weight.chunks_exact_mut(self.sides.hidden).zip(rows) {
            kernels.to_f32(Dtype::F16, bytes, &mut row);
            kernels.add(weight, &row);
        }
    }

    /// The model it was calibrated on.
    #[must_use]
    pub fn model(&self) -> Fingerprint {
        self.model
    }

    /// Values of the model's residual stream that it was made for.
    #[must_use]
    pub fn hidden(&self) -> usize {
        self.sides.hidden
    }

    /// Whether it is for that model, as far as `shape` says: it does not know the residual stream's width ([`Self::hidden`]).
    ///
    /// # Errors
    /// [`MethodError::ArtifactShape`] or [`MethodError::ArtifactFingerprint`], each with both sides.
    pub fn check(&self, shape: &Shape) -> Result<(), MethodError> {
        self.check_width(shape, self.sides.hidden)
    }

    /// As [`Self::check`], and for a residual stream of `hidden` values.
    ///
    /// # Errors
    /// As [`Self::check`].
    pub fn check_width(&self, shape: &Shape, hidden: usize) -> Result<(), MethodError> {
        let wanted = Sides { layers: shape.layers, query_width: shape.query_heads * shape.head_dim, hidden };
        if self.sides != wanted {
            return Err(MethodError::ArtifactShape {
                expected: wanted.to_string(),
                found: self.sides.to_string(),
            });
        }
        if self.model != shape.fingerprint {
            return Err(MethodError::ArtifactFingerprint { expected: shape.fingerprint, found: self.model });
        }
        Ok(())
    }

    /// The file form: safetensors with one f16 tensor `hint` `[layers − 1, query_width, hidden]` and the model's fingerprint
    /// in the metadata.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`] where the library refuses, which no valid artifact makes it do.
    pub fn to_bytes(&self) -> Result<Vec<u8>, MethodError> {
        let bad =
            |error: safetensors::SafeTensorError| MethodError::ArtifactFormat { reason: error.to_string() };
        let Sides { layers, query_width, hidden } = self.sides;
        let view = TensorView::new(FileDtype::F16, vec![layers - 1, query_width, hidden], &self.bytes)
            .map_err(bad)?;
        let metadata = HashMap::from([
            ("format".to_owned(), FORMAT.to_owned()),
            ("model".to_owned(), self.model.to_string()),
        ]);
        safetensors::serialize([(TENSOR, view)], Some(metadata)).map_err(bad)
    }

    /// Reads the file form, given its metadata.
    pub(crate) fn from_bytes(metadata: &HashMap<String, String>, bytes: &[u8]) -> Result<Self, MethodError> {
        let bad = |reason: String| MethodError::ArtifactFormat { reason };
        let library = |error: safetensors::SafeTensorError| bad(error.to_string());
        let model = metadata.get("model").ok_or_else(|| bad("it does not name its model".into()))?.parse()?;
        let tensors = SafeTensors::deserialize(bytes).map_err(library)?;
        let tensor = tensors.tensor(TENSOR).map_err(library)?;
        let (FileDtype::F16, &[corrected, query_width, hidden]) = (tensor.dtype(), tensor.shape()) else {
            return Err(bad(format!(
                "it holds {:?} of {:?}, not f16 of [layers − 1, query values, width]",
                tensor.dtype(),
                tensor.shape()
            )));
        };
        let sides = Sides { layers: corrected.saturating_add(1), query_width, hidden };
        Self::checked(sides, model, tensor.data().to_vec())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::artifact::{Artifact, ArtifactKind, Artifacts};
    use crate::shape::tests::small;
    use crate::testing::{Rng, relative_error};

    const HIDDEN: usize = 12;

    fn width() -> usize {
        small().query_heads * small().head_dim
    }

    fn corrections(seed: u64) -> Vec<Vec<f32>> {
        let mut rng = Rng::new(seed);
        (1..small().layers).map(|_| rng.normal(width() * HIDDEN)).collect()
    }

    fn made(corrections: &[Vec<f32>]) -> Result<HintArtifact, MethodError> {
        HintArtifact::new(&small(), HIDDEN, corrections.iter().map(Vec::as_slice))
    }

    #[test]
    fn an_artifact_reads_back_from_its_bytes_and_says_what_it_is() {
        let artifact = made(&corrections(1)).unwrap();
        let bytes = artifact.to_bytes().unwrap();
        assert_eq!(Artifact::kind_of(&bytes).unwrap(), ArtifactKind::Hint);
        let artifacts: Artifacts = [Artifact::from_bytes(&bytes).unwrap()].into_iter().collect();
        assert_eq!(**artifacts.hint().unwrap(), artifact);
        for length in [0, 7, 8, 40, bytes.len() - 1] {
            assert!(Artifact::from_bytes(&bytes[..length]).is_err(), "cut to {length} bytes");
        }
    }

    #[test]
    fn folding_adds_the_correction_to_within_half_precision() {
        let corrections = corrections(2);
        let artifact = made(&corrections).unwrap();
        let weight = Rng::new(3).normal(width() * HIDDEN);
        let mut folded = weight.clone();
        artifact.fold(1, &mut folded);
        let expected: Vec<f32> = weight.iter().zip(&corrections[0]).map(|(w, r)| w + r).collect();
        assert!(relative_error(&folded, &expected) < 1e-3);
        assert_ne!(folded, weight);
    }

    #[test]
    fn another_shape_width_or_model_is_refused_and_both_are_named() {
        let artifact = made(&corrections(1)).unwrap();
        assert_eq!(artifact.check(&small()), Ok(()));
        assert_eq!(artifact.check_width(&small(), HIDDEN), Ok(()));
        let layers = artifact.check(&Shape { layers: 3, ..small() }).unwrap_err().to_string();
        assert!(layers.contains("2 layers") && layers.contains("3 layers"), "{layers}");
        let width = artifact.check_width(&small(), 13).unwrap_err().to_string();
        assert!(width.contains("width of 12") && width.contains("width of 13"), "{width}");
        let other = Fingerprint([9; 16]);
        let error = artifact.check(&Shape { fingerprint: other, ..small() }).unwrap_err();
        assert_eq!(error, MethodError::ArtifactFingerprint { expected: other, found: small().fingerprint });
    }

    #[test]
    fn corrections_of_another_number_or_size_or_beyond_half_precision_are_refused() {
        let good = corrections(1);
        assert!(made(&[]).is_err() && made(&[good[0].clone(), good[0].clone()]).is_err());
        assert!(made(&[good[0][1..].to_vec()]).is_err());
        for wrong in [f32::NAN, f32::INFINITY, 1e6] {
            let mut corrections = good.clone();
            corrections[0][width() * HIDDEN - 1] = wrong;
            let error = made(&corrections).unwrap_err().to_string();
            assert!(error.contains("layer 1") && error.contains("finite"), "{error}");
        }
    }

    #[test]
    fn sizes_that_no_model_has_are_refused_before_anything_is_allocated() {
        let huge = Shape { layers: 1000, query_heads: 1 << 20, ..small() };
        let error = HintArtifact::new(&huge, 1 << 20, []).unwrap_err().to_string();
        assert!(error.contains("1000 layers") && error.contains(&BYTES_MAX.to_string()), "{error}");
        assert!(HintArtifact::new(&small(), 0, []).is_err());
        let one = Shape { layers: 1, ..small() };
        assert!(HintArtifact::new(&one, HIDDEN, []).is_err(), "a model of one layer has no hint");
    }

    #[test]
    fn bytes_of_another_type_or_rank_are_refused_with_the_reason() {
        let with = |dtype: FileDtype, shape: Vec<usize>, metadata: &[(&str, &str)]| {
            let data = vec![0_u8; shape.iter().product::<usize>() * dtype.bitsize() / 8];
            let view = TensorView::new(dtype, shape, &data).unwrap();
            let metadata = metadata.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect();
            let bytes = safetensors::serialize([(TENSOR, view)], Some(metadata)).unwrap();
            Artifact::from_bytes(&bytes).map(|artifact| artifact.kind()).map_err(|error| error.to_string())
        };
        let good = [("format", FORMAT), ("model", "00000000000000000000000000000000")];
        assert_eq!(with(FileDtype::F16, vec![1, 2, 3], &good), Ok(ArtifactKind::Hint));
        assert!(with(FileDtype::F32, vec![1, 2, 3], &good).unwrap_err().contains("F32"));
        assert!(with(FileDtype::F16, vec![2, 3], &good).unwrap_err().contains("[2, 3]"));
        assert!(with(FileDtype::F16, vec![1, 0, 3], &good).unwrap_err().contains("none"));
        assert!(with(FileDtype::F16, vec![1, 2, 3], &good[..1]).unwrap_err().contains("model"));
    }
}
