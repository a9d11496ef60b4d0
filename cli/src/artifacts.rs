//! Calibrated artifacts in the cache folder: one folder a kind, one file a model.

use kvoyant_methods::{Artifact, ArtifactKind, Artifacts, Fingerprint};

use crate::cache;

/// Those of a model that are there. A file that is damaged or of another kind counts as none: methods that need it say so.
pub(crate) fn cached(model: Fingerprint) -> Artifacts {
    let mut found = Artifacts::none();
    for kind in ArtifactKind::ALL {
        let Ok(folder) = cache::folder(kind.name()) else { continue };
        let bytes = std::fs::read(folder.join(format!("{model}.safetensors")));
        if let Some(artifact) = bytes.ok().and_then(|bytes| Artifact::from_bytes(&bytes).ok())
            && artifact.kind() == kind
        {
            found.insert(artifact);
        }
    }
    found
}
