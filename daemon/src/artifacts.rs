//! Artifacts of a registration: a peer's memfds, checked, and read one after the other, so that no more of them lies in
//! memory than the methods keep.

use std::os::fd::OwnedFd;

use kvoyant_methods::{Artifact, ArtifactKind, Artifacts, MethodSpec};
use kvoyant_protocol::control::{Failure, ModelSpec};
use kvoyant_protocol::memory::{Memfd, Seals};

use crate::control::Ended;
use crate::lane::model::METHODS_MAX;

/// What an artifact may have beside its matrices, in bytes.
const HEADER_MAX: u64 = 1 << 20;

/// Most bytes of all artifacts of a model: skew matrices of 64 layers with 64 KV heads of 128 values in f32.
pub(crate) const ARTIFACTS_MAX: u64 = 256 << 20;

fn refused(reason: String) -> Ended {
    Ended::Refused(Failure::BadMethod(reason))
}

/// The memfds of the artifacts, each as large as the client says and no larger than one can be.
pub(crate) fn files(spec: &ModelSpec, fds: Vec<OwnedFd>) -> Result<Vec<Memfd>, Ended> {
    let (wanted, most) = (spec.artifacts.len(), ArtifactKind::ALL.len());
    if wanted > most {
        return Err(refused(format!("{wanted} artifacts were registered, and there are {most} kinds")));
    }
    if fds.len() < wanted {
        return Err(Ended::Protocol(format!("{} memfds came for {wanted} artifacts", fds.len())));
    }
    let heads = u64::from(spec.layers).saturating_mul(u64::from(spec.query_heads));
    let matrix = u64::from(spec.head_dim).saturating_mul(u64::from(spec.head_dim)).saturating_mul(4);
    let max = heads.saturating_mul(matrix).saturating_add(HEADER_MAX).min(ARTIFACTS_MAX);
    if let Some(bytes) = spec.artifacts.iter().find(|bytes| !(1..=max).contains(*bytes)) {
        return Err(refused(format!("an artifact of {bytes} bytes is outside 1..={max} for this model")));
    }
    let all: u64 = spec.artifacts.iter().sum();
    if all > ARTIFACTS_MAX {
        return Err(refused(format!(
            "artifacts of {all} bytes together are more than {ARTIFACTS_MAX}; register those that the methods need"
        )));
    }
    let file = |(bytes, fd): (&u64, OwnedFd)| Ok(Memfd::from_peer(fd, *bytes as usize, Seals::fixed_size())?);
    spec.artifacts.iter().zip(fds).map(file).collect()
}

/// What the methods were calibrated to, at most one of each kind, and only those that one of them is built with.
pub(crate) fn read(files: Vec<Memfd>, spec: &ModelSpec) -> Result<Artifacts, Ended> {
    // What is no specification is refused when the methods are built.
    let methods = spec.methods.iter().take(METHODS_MAX).filter_map(|text| text.parse::<MethodSpec>().ok());
    let wanted: Vec<ArtifactKind> =
        methods.flat_map(|method| method.artifacts()).filter(|kind| kind.builds_methods()).collect();
    let (mut artifacts, mut seen) = (Artifacts::none(), Vec::new());
    for file in files {
        let bytes = file.read_out()?;
        drop(file);
        let kind = Artifact::kind_of(&bytes).map_err(|error| refused(error.to_string()))?;
        if seen.contains(&kind) {
            return Err(refused(format!("two {kind} artifacts were registered; a model has one")));
        }
        seen.push(kind);
        if wanted.contains(&kind) {
            artifacts.insert(Artifact::from_bytes(&bytes).map_err(|error| refused(error.to_string()))?);
        }
    }
    Ok(artifacts)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use kvoyant_methods::{Fingerprint, Tensor, TensorArtifact};

    use super::*;

    fn spec(methods: &[&str], artifacts: Vec<u64>) -> ModelSpec {
        ModelSpec {
            name: "test".into(),
            layers: 1 << 10,
            query_heads: 1 << 10,
            kv_heads: 1,
            head_dim: 128,
            dtype: 1,
            latent_values: 0,
            fingerprint: Fingerprint([0; 16]).to_string(),
            adapter: String::new(),
            rope: String::new(),
            page_rows: 0,
            sinks: 0,
            window: 1,
            dense_layers: 0,
            sliding_layers: Vec::new(),
            methods: methods.iter().map(|method| (*method).into()).collect(),
            artifacts,
            slab_bytes: 0,
            graph: None,
        }
    }

    fn file(kind: ArtifactKind) -> (Memfd, u64) {
        let tensors = BTreeMap::from([("hash".to_owned(), Tensor { shape: vec![1], values: vec![1.0] })]);
        let artifact = TensorArtifact::new(kind, Fingerprint([0; 16]), tensors, BTreeMap::new()).unwrap();
        let bytes = artifact.to_bytes().unwrap();
        let file = Memfd::create("test", bytes.len()).unwrap();
        file.map(true).unwrap().write(0, &bytes).unwrap();
        (file, bytes.len() as u64)
    }

    #[test]
    fn artifacts_that_are_too_much_together_are_refused_before_any_is_read() {
        let each = ARTIFACTS_MAX / 2 + 1;
        let fds = || (0..2).map(|_| file(ArtifactKind::Hash).0.try_clone().unwrap()).collect();
        let error = files(&spec(&["hata"], vec![each, each]), fds()).unwrap_err().to_string();
        assert!(error.contains(&ARTIFACTS_MAX.to_string()), "{error}");
    }

    #[test]
    fn only_what_a_method_wants_is_kept_and_two_of_a_kind_are_refused() {
        let kinds = |methods: &[&str], registered: &[ArtifactKind]| {
            let files = registered.iter().map(|kind| file(*kind).0).collect();
            read(files, &spec(methods, Vec::new()))
                .map(|artifacts| artifacts.iter().map(Artifact::kind).collect::<Vec<_>>())
                .map_err(|error| error.to_string())
        };
        let both = [ArtifactKind::Hash, ArtifactKind::Roles];
        assert_eq!(kinds(&["full"], &both).unwrap(), []);
        assert_eq!(kinds(&["full", "hata"], &both).unwrap(), [ArtifactKind::Hash]);
        let mix = "mix:0=(hata),rest=(hetero)";
        assert_eq!(kinds(&[mix], &both).unwrap(), both);
        let twice = kinds(&["full"], &[ArtifactKind::Hash; 2]).unwrap_err();
        assert!(twice.contains("two hash"), "{twice}");
    }
}
