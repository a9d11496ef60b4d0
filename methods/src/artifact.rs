//! Calibrated artifacts: what was learnt from a model offline, kept in safetensors with the model's fingerprint.

use std::collections::{BTreeMap, HashMap};
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

use safetensors::tensor::{Dtype as FileDtype, SafeTensors, TensorView};

use crate::error::MethodError;
use crate::hint::HintArtifact;
use crate::infinigen::SkewArtifact;
use crate::shape::{Fingerprint, Shape};

/// Kinds of artifacts.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum ArtifactKind {
    /// Orthogonal matrices per layer and KV head ([`SkewArtifact`]).
    Skew,
    /// Trained hash weights per layer and KV head.
    Hash,
    /// Weights of the attention predictor's network.
    Predictor,
    /// Roles and clusters of KV heads.
    Roles,
    /// Corrections of each layer's hint ([`HintArtifact`]): for the engine, which makes hints.
    Hint,
}

impl ArtifactKind {
    /// Every kind.
    pub const ALL: [Self; 5] = [Self::Skew, Self::Hash, Self::Predictor, Self::Roles, Self::Hint];

    /// Its name, which is the file's name too.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Skew => "skew",
            Self::Hash => "hash",
            Self::Predictor => "predictor",
            Self::Roles => "roles",
            Self::Hint => "hint",
        }
    }

    /// Whether methods are built with it; others are the engine's alone, and no daemon is given them.
    #[must_use]
    pub fn builds_methods(self) -> bool {
        self != Self::Hint
    }
}

impl fmt::Display for ArtifactKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

impl FromStr for ArtifactKind {
    type Err = MethodError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        Self::ALL.into_iter().find(|kind| kind.name() == text).ok_or_else(|| {
            let known: Vec<_> = Self::ALL.iter().map(|kind| kind.name()).collect();
            MethodError::ArtifactFormat {
                reason: format!("`{text}` is no kind of artifact; there are {}", known.join(", ")),
            }
        })
    }
}

/// An f32 tensor.
#[derive(Debug, Clone, PartialEq)]
pub struct Tensor {
    /// Its dimensions.
    pub shape: Vec<usize>,
    /// Its values, row-major.
    pub values: Vec<f32>,
}

/// An artifact of named f32 tensors and settings, for one model. What they must be is checked by the method that reads
/// them.
#[derive(Debug, Clone, PartialEq)]
pub struct TensorArtifact {
    kind: ArtifactKind,
    model: Fingerprint,
    tensors: BTreeMap<String, Tensor>,
    settings: BTreeMap<String, String>,
    id: u64,
}

const FORMAT_PREFIX: &str = "kvoyant-";
const FORMAT_VERSION: &str = "-1";

impl TensorArtifact {
    /// An artifact of that kind and model.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`] where a tensor's values do not fill its shape, or are not finite.
    pub fn new(
        kind: ArtifactKind,
        model: Fingerprint,
        tensors: BTreeMap<String, Tensor>,
        settings: BTreeMap<String, String>,
    ) -> Result<Self, MethodError> {
        for (name, tensor) in &tensors {
            let bad = |reason: String| Err(MethodError::ArtifactFormat { reason });
            let wanted = tensor.shape.iter().try_fold(1_usize, |all, side| all.checked_mul(*side));
            if wanted != Some(tensor.values.len()) {
                return bad(format!(
                    "tensor `{name}` has {} values for {:?}",
                    tensor.values.len(),
                    tensor.shape
                ));
            }
            if let Some(at) = tensor.values.iter().position(|value| !value.is_finite()) {
                return bad(format!("tensor `{name}` has {} at {at}", tensor.values[at]));
            }
        }
        let values = tensors.values().flat_map(|tensor| tensor.values.iter().flat_map(|v| v.to_le_bytes()));
        let words = settings.iter().flat_map(|(key, value)| key.bytes().chain(value.bytes()));
        let id = fnv(model.0.iter().copied().chain(kind.name().bytes()).chain(words).chain(values));
        Ok(Self { kind, model, tensors, settings, id })
    }

    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> ArtifactKind {
        self.kind
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

    /// The tensor of that name, if its shape is that one.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`]: there is none, or it has another shape.
    pub fn tensor(&self, name: &str, shape: &[usize]) -> Result<&[f32], MethodError> {
        let bad = |reason: String| MethodError::ArtifactFormat { reason };
        let tensor = self
            .tensors
            .get(name)
            .ok_or_else(|| bad(format!("the {} artifact has no tensor `{name}`", self.kind)))?;
        if tensor.shape != shape {
            return Err(bad(format!(
                "tensor `{name}` of the {} artifact is {:?}, and {shape:?} is wanted",
                self.kind, tensor.shape
            )));
        }
        Ok(&tensor.values)
    }

    /// The values of the tensor of that name; empty where there is none.
    pub(crate) fn values(&self, name: &str) -> &[f32] {
        self.tensors.get(name).map_or(&[], |tensor| &tensor.values)
    }

    /// A setting, by name.
    #[must_use]
    pub fn setting(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str)
    }

    /// Whether it is of that kind and was made from that model's weights.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`] or [`MethodError::ArtifactFingerprint`], each with both sides.
    pub fn check(&self, kind: ArtifactKind, shape: &Shape) -> Result<(), MethodError> {
        if self.kind != kind {
            return Err(MethodError::ArtifactFormat {
                reason: format!("it is a {} artifact, and a {kind} artifact is wanted", self.kind),
            });
        }
        if self.model != shape.fingerprint {
            return Err(MethodError::ArtifactFingerprint { expected: shape.fingerprint, found: self.model });
        }
        Ok(())
    }

    /// The file form: safetensors with f32 tensors; the metadata has `format` (`kvoyant-<kind>-1`), `model` (the
    /// fingerprint) and the settings.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`] where the library refuses.
    pub fn to_bytes(&self) -> Result<Vec<u8>, MethodError> {
        let bad =
            |error: safetensors::SafeTensorError| MethodError::ArtifactFormat { reason: error.to_string() };
        let data: Vec<(&String, &Tensor, Vec<u8>)> = self
            .tensors
            .iter()
            .map(|(name, tensor)| {
                (name, tensor, tensor.values.iter().flat_map(|value| value.to_le_bytes()).collect())
            })
            .collect();
        let views = data
            .iter()
            .map(|(name, tensor, bytes)| {
                Ok((
                    name.as_str(),
                    TensorView::new(FileDtype::F32, tensor.shape.clone(), bytes).map_err(bad)?,
                ))
            })
            .collect::<Result<Vec<_>, MethodError>>()?;
        let mut metadata: HashMap<String, String> =
            self.settings.iter().map(|(key, value)| (key.clone(), value.clone())).collect();
        metadata.insert("format".into(), format!("{FORMAT_PREFIX}{}{FORMAT_VERSION}", self.kind));
        metadata.insert("model".into(), self.model.to_string());
        safetensors::serialize(views, Some(metadata)).map_err(bad)
    }

    fn from_bytes(
        kind: ArtifactKind,
        metadata: HashMap<String, String>,
        bytes: &[u8],
    ) -> Result<Self, MethodError> {
        let bad = |reason: String| MethodError::ArtifactFormat { reason };
        let model = metadata.get("model").ok_or_else(|| bad("it does not name its model".into()))?.parse()?;
        let file = SafeTensors::deserialize(bytes).map_err(|error| bad(error.to_string()))?;
        let mut tensors = BTreeMap::new();
        for (name, view) in file.tensors() {
            if view.dtype() != FileDtype::F32 {
                return Err(bad(format!("tensor `{name}` holds {:?}, not f32", view.dtype())));
            }
            let values = view.data().as_chunks().0.iter().map(|bytes| f32::from_le_bytes(*bytes)).collect();
            tensors.insert(name, Tensor { shape: view.shape().to_vec(), values });
        }
        let settings =
            metadata.into_iter().filter(|(key, _)| !matches!(key.as_str(), "format" | "model")).collect();
        Self::new(kind, model, tensors, settings)
    }
}

/// A calibrated artifact, read from a file.
#[derive(Debug, Clone)]
pub enum Artifact {
    /// Of [`ArtifactKind::Skew`].
    Skew(Arc<SkewArtifact>),
    /// Of [`ArtifactKind::Hint`].
    Hint(Arc<HintArtifact>),
    /// Of any other kind.
    Tensors(Arc<TensorArtifact>),
}

impl Artifact {
    /// Its kind.
    #[must_use]
    pub fn kind(&self) -> ArtifactKind {
        match self {
            Self::Skew(_) => ArtifactKind::Skew,
            Self::Hint(_) => ArtifactKind::Hint,
            Self::Tensors(tensors) => tensors.kind,
        }
    }

    /// What kind the file form says that it is, from its header alone.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`]: not safetensors, or no kind of ours.
    pub fn kind_of(bytes: &[u8]) -> Result<ArtifactKind, MethodError> {
        header(bytes).map(|(kind, _)| kind)
    }

    /// Reads the file form of any kind.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`]: not safetensors, no artifact of ours, or one that makes no sense.
    pub fn from_bytes(bytes: &[u8]) -> Result<Self, MethodError> {
        match header(bytes)? {
            (ArtifactKind::Skew, _) => SkewArtifact::from_bytes(bytes).map(|skew| Self::Skew(Arc::new(skew))),
            (ArtifactKind::Hint, metadata) => {
                HintArtifact::from_bytes(&metadata, bytes).map(|hint| Self::Hint(Arc::new(hint)))
            }
            (kind, metadata) => TensorArtifact::from_bytes(kind, metadata, bytes)
                .map(|tensors| Self::Tensors(Arc::new(tensors))),
        }
    }

    /// The file form.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`] where the library refuses.
    pub fn to_bytes(&self) -> Result<Vec<u8>, MethodError> {
        match self {
            Self::Skew(skew) => skew.to_bytes(),
            Self::Hint(hint) => hint.to_bytes(),
            Self::Tensors(tensors) => tensors.to_bytes(),
        }
    }

    /// Whether it is of that kind and was made from that model's weights.
    ///
    /// # Errors
    /// [`MethodError::ArtifactFormat`] for another kind, else what the artifact itself says of another model or shape.
    pub fn check(&self, kind: ArtifactKind, shape: &Shape) -> Result<(), MethodError> {
        match self {
            Self::Skew(skew) if kind == ArtifactKind::Skew => skew.check(shape),
            Self::Hint(hint) if kind == ArtifactKind::Hint => hint.check(shape),
            Self::Tensors(tensors) => tensors.check(kind, shape),
            Self::Skew(_) | Self::Hint(_) => Err(MethodError::ArtifactFormat {
                reason: format!("it is a {} artifact, and a {kind} artifact is wanted", self.kind()),
            }),
        }
    }
}

/// The kind and the metadata of a file.
fn header(bytes: &[u8]) -> Result<(ArtifactKind, HashMap<String, String>), MethodError> {
    let bad = |error: safetensors::SafeTensorError| MethodError::ArtifactFormat { reason: error.to_string() };
    let (_, metadata) = SafeTensors::read_metadata(bytes).map_err(bad)?;
    let metadata = metadata.metadata().clone().unwrap_or_default();
    let format = metadata.get("format").map_or("", String::as_str);
    let named = format.strip_prefix(FORMAT_PREFIX).and_then(|rest| rest.strip_suffix(FORMAT_VERSION));
    // The skew artifact is older than the common form and says itself what it is.
    let kind = named.map_or(Ok(ArtifactKind::Skew), str::parse)?;
    Ok((kind, metadata))
}

/// The artifacts of one model, at most one of each kind.
#[derive(Debug, Clone, Default)]
pub struct Artifacts(Vec<Artifact>);

impl Artifacts {
    /// None at all.
    #[must_use]
    pub fn none() -> Self {
        Self::default()
    }

    /// Adds one, in place of any other of its kind.
    pub fn insert(&mut self, artifact: Artifact) {
        self.0.retain(|known| known.kind() != artifact.kind());
        self.0.push(artifact);
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = &Artifact> {
        self.0.iter()
    }

    /// The skew matrices, where there are any.
    #[must_use]
    pub fn skew(&self) -> Option<&Arc<SkewArtifact>> {
        self.0.iter().find_map(|artifact| match artifact {
            Artifact::Skew(skew) => Some(skew),
            _ => None,
        })
    }

    /// The corrections of hints, where there are any.
    #[must_use]
    pub fn hint(&self) -> Option<&Arc<HintArtifact>> {
        self.0.iter().find_map(|artifact| match artifact {
            Artifact::Hint(hint) => Some(hint),
            _ => None,
        })
    }

    /// The artifact of another kind, checked against the model.
    ///
    /// # Errors
    /// [`MethodError::ArtifactMissing`] for `method`, or an artifact of another model.
    pub fn tensors(
        &self,
        method: &'static str,
        kind: ArtifactKind,
        shape: &Shape,
    ) -> Result<&Arc<TensorArtifact>, MethodError> {
        let found = self.0.iter().find_map(|artifact| match artifact {
            Artifact::Tensors(tensors) if tensors.kind == kind => Some(tensors),
            _ => None,
        });
        let found = found.ok_or(MethodError::ArtifactMissing { method, artifact: kind.name() })?;
        found.check(kind, shape)?;
        Ok(found)
    }
}

impl FromIterator<Artifact> for Artifacts {
    fn from_iter<I: IntoIterator<Item = Artifact>>(artifacts: I) -> Self {
        let mut all = Self::default();
        artifacts.into_iter().for_each(|artifact| all.insert(artifact));
        all
    }
}

/// FNV-1a, 64 bits: not against forgers, only to tell artifacts apart.
pub(crate) fn fnv(bytes: impl Iterator<Item = u8>) -> u64 {
    bytes.fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::shape::tests::small;

    fn hash() -> TensorArtifact {
        let tensor = Tensor { shape: vec![2, 3], values: vec![1.0, -2.0, 0.5, 3.0, 4.0, 5.0] };
        let settings = BTreeMap::from([("bits".to_owned(), "3".to_owned())]);
        let tensors = BTreeMap::from([("hash".to_owned(), tensor)]);
        TensorArtifact::new(ArtifactKind::Hash, small().fingerprint, tensors, settings).unwrap()
    }

    #[test]
    fn a_tensor_artifact_reads_back_from_its_bytes() {
        let artifact = hash();
        let Artifact::Tensors(read) = Artifact::from_bytes(&artifact.to_bytes().unwrap()).unwrap() else {
            panic!("it is no skew artifact")
        };
        assert_eq!(*read, artifact);
        assert_eq!(read.setting("bits"), Some("3"));
        assert!(read.tensor("hash", &[3, 2]).unwrap_err().to_string().contains("[2, 3]"));
        assert!(read.tensor("other", &[1]).unwrap_err().to_string().contains("other"));
    }

    #[test]
    fn an_artifact_of_another_model_or_kind_is_refused_by_name() {
        let mut artifacts = Artifacts::none();
        let missing = artifacts.tensors("hata", ArtifactKind::Hash, &small()).unwrap_err();
        assert!(missing.to_string().contains("hata"), "{missing}");
        artifacts.insert(Artifact::Tensors(Arc::new(hash())));
        assert!(artifacts.tensors("hata", ArtifactKind::Hash, &small()).is_ok());
        let other = Shape { fingerprint: Fingerprint([9; 16]), ..small() };
        let error = artifacts.tensors("hata", ArtifactKind::Hash, &other).unwrap_err();
        assert!(matches!(error, MethodError::ArtifactFingerprint { .. }), "{error}");
        let kind = hash().check(ArtifactKind::Roles, &small()).unwrap_err().to_string();
        assert!(kind.contains("hash") && kind.contains("roles"), "{kind}");
    }

    #[test]
    fn values_that_do_not_fill_the_shape_or_are_no_numbers_are_refused() {
        let make = |values: Vec<f32>| {
            let tensors = BTreeMap::from([("t".to_owned(), Tensor { shape: vec![2], values })]);
            TensorArtifact::new(ArtifactKind::Roles, small().fingerprint, tensors, BTreeMap::new())
        };
        assert!(
            make(vec![1.0]).is_err() && make(vec![1.0, f32::NAN]).is_err() && make(vec![1.0, 2.0]).is_ok()
        );
        assert!(Artifact::from_bytes(b"no safetensors").is_err());
    }
}
