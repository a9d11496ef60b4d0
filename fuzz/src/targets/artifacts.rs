//! Artifacts of models, as files have them and peers send them.

use std::sync::OnceLock;

use kvoyant_methods::hint::HintArtifact;
use kvoyant_methods::infinigen::SkewArtifact;
use kvoyant_methods::{
    Artifact, ArtifactKind, Artifacts, Dtype, Fingerprint, MethodSpec, Shape, Tensor, TensorArtifact, build,
    registry,
};

/// A small model.
fn shape() -> Shape {
    Shape {
        layers: 2,
        query_heads: 2,
        kv_heads: 1,
        head_dim: 4,
        value_dim: 4,
        page_rows: 16,
        sinks: 1,
        window: 2,
        dense_layers: 0,
        dtype: Dtype::F32,
        fingerprint: Fingerprint([7; 16]),
    }
}

/// Every method that takes an artifact, of each kind.
fn methods() -> &'static [MethodSpec] {
    static METHODS: OnceLock<Vec<MethodSpec>> = OnceLock::new();
    METHODS.get_or_init(|| {
        let all = registry::names().map(str::to_owned).chain([
            "hata:weights=trained".to_owned(),
            "hetero:profile=trained".to_owned(),
            "attention-predictor:weights=trained".to_owned(),
        ]);
        let all = all.filter_map(|name| name.parse::<MethodSpec>().ok());
        all.filter(|method| !method.artifacts().is_empty()).collect()
    })
}

/// Any bytes are an artifact or an error; one that is accepted says itself again, and methods take it or say why not.
///
/// # Panics
/// If it is not so.
pub fn run(bytes: &[u8]) {
    let kind = Artifact::kind_of(bytes);
    let Ok(artifact) = Artifact::from_bytes(bytes) else { return };
    assert_eq!(kind.as_ref(), Ok(&artifact.kind()));
    let again = artifact.to_bytes().expect("what was read can be written");
    let again = Artifact::from_bytes(&again).expect("what was written can be read");
    assert_eq!(again.kind(), artifact.kind());
    let shape = shape();
    let fits = artifact.check(artifact.kind(), &shape).is_ok();
    if let (Artifact::Hint(hint), true) = (&artifact, fits) {
        let mut weight = vec![0.0; shape.query_heads * shape.head_dim * hint.hidden()];
        hint.fold(1, &mut weight);
    }
    let artifacts: Artifacts = [artifact].into_iter().collect();
    for method in methods() {
        if let Ok(method) = build(method, &shape, &artifacts) {
            drop(method);
        }
    }
}

/// One of each kind.
///
/// # Panics
/// If the library refuses one.
#[must_use]
pub fn seeds() -> Vec<Vec<u8>> {
    let shape = shape();
    let square = shape.head_dim * shape.head_dim;
    let identity = (0..shape.layers * shape.kv_heads * square)
        .map(|at| if (at % square).is_multiple_of(shape.head_dim + 1) { 1.0 } else { 0.0 })
        .collect();
    let skew = SkewArtifact::new(&shape, identity).expect("a skew artifact").to_bytes();
    let correction = vec![0.5; shape.query_heads * shape.head_dim * 3];
    let hint = HintArtifact::new(&shape, 3, [correction.as_slice()]).expect("a hint artifact").to_bytes();
    let mut seeds = vec![skew.expect("bytes"), hint.expect("bytes")];
    let tensor = |shape: &[usize], value: fn(usize) -> f32| {
        let values = (0..shape.iter().product()).map(value).collect();
        Tensor { shape: shape.to_vec(), values }
    };
    let of = |kind, tensors: &[(&str, Tensor)], settings: &[(&str, &str)]| {
        let tensors = tensors.iter().map(|(name, tensor)| ((*name).to_owned(), tensor.clone())).collect();
        let settings = settings.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect();
        let artifact = TensorArtifact::new(kind, shape.fingerprint, tensors, settings);
        artifact.expect("an artifact").to_bytes().expect("bytes")
    };
    let heads = [shape.layers, shape.kv_heads];
    let volatile: fn(usize) -> f32 = |_| 0.0;
    seeds.push(of(ArtifactKind::Hash, &[("hash", tensor(&[2, 1, 4, 8], |at| at as f32))], &[("bits", "8")]));
    let roles = ["role", "pivot", "stability"].map(|name| (name, tensor(&heads, volatile)));
    seeds.push(of(ArtifactKind::Roles, &roles, &[]));
    let network = [
        ("conv1.weight", tensor(&[16, 1, 3, 3], volatile)),
        ("conv1.bias", tensor(&[16], volatile)),
        ("conv2.bias", tensor(&[32], volatile)),
        ("head.weight", tensor(&[32], volatile)),
        ("head.bias", tensor(&[1], volatile)),
    ];
    seeds.push(of(ArtifactKind::Predictor, &network, &[("history", "64"), ("block", "16")]));
    seeds
}
