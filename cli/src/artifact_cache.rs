//! What methods learn from a model offline: made once for each model and kind, and kept in the cache folder.

use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvoyant_engine::calibrate::{CalibrateError, calibrate};
use kvoyant_engine::{Model, TextError};
use kvoyant_eval::texts::Filler;
use kvoyant_methods::{Artifact, ArtifactKind, Artifacts, Fingerprint, MethodError, Shape};

use crate::cache::{self, CacheError};
use crate::progress::{Progress, Step};

/// Tokens of a calibration text, as in InfiniGen's paper.
const TOKENS: usize = 2048;

/// Tokens that a hint is learnt from: a correction has as many values in a row as the residual stream, and wants several times as
/// many tokens.
const HINT_TOKENS: usize = 4096;

/// The chronicle that is the calibration text; the demo's own seeds are small numbers, so they differ.
const SEED: u64 = 0x6b76_6f79_616e_7421;

/// Why there is no artifact.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArtifactError {
    /// No cache folder.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// The artifact cannot be kept.
    #[error("the calibration cannot be kept in {}: {error}", .path.display())]
    Write {
        /// Where.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// A file that the user names cannot be read.
    #[error("{} cannot be read: {error}", .path.display())]
    Read {
        /// Which one.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// A file that the user names is no artifact for this model.
    #[error("the artifact {} cannot be used: {error}", .path.display())]
    Refused {
        /// Which one.
        path: PathBuf,
        /// Why not.
        error: MethodError,
    },
    /// It could not be made.
    #[error(transparent)]
    Make(#[from] CalibrateError),
    /// The tokenizer refused the text.
    #[error("calibration failed: {0}")]
    Text(#[from] TextError),
    /// It cannot be written down.
    #[error(transparent)]
    Method(#[from] MethodError),
}

/// Reads an artifact that the user names, for that model.
///
/// # Errors
/// If it cannot be read, or belongs to another model.
pub(crate) fn read(path: &Path, shape: &Shape) -> Result<Artifact, ArtifactError> {
    let bytes = std::fs::read(path).map_err(|error| ArtifactError::Read { path: path.into(), error })?;
    Artifact::from_bytes(&bytes)
        .and_then(|artifact| artifact.check(artifact.kind(), shape).map(|()| artifact))
        .map_err(|error| ArtifactError::Refused { path: path.into(), error })
}

/// Those of a model that are in the cache, for traces, whose model is not at hand. A file that is damaged or of another kind
/// counts as none: methods that need it say so.
pub(crate) fn cached(model: Fingerprint) -> Artifacts {
    let mut found = Artifacts::none();
    // A trace has hints of its own.
    for kind in ArtifactKind::ALL.into_iter().filter(|kind| kind.builds_methods()) {
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

/// The model's artifact of a kind: from the cache, or made now and kept there.
///
/// # Errors
/// If it can neither be read nor made.
pub(crate) fn artifact(
    model: &Arc<Model>,
    kind: ArtifactKind,
    shape: &Shape,
    progress: Progress,
) -> Result<Artifact, ArtifactError> {
    let path = cache::folder(kind.name())?.join(format!("{}.safetensors", shape.fingerprint));
    // A file that is damaged, or of another shape, is made anew: it is only a cache.
    if let Some(found) = std::fs::read(&path).ok().and_then(|bytes| Artifact::from_bytes(&bytes).ok())
        && found.check(kind, shape).is_ok()
    {
        return Ok(found);
    }
    let made = make(model, kind, shape, None, progress)?;
    write(&path, &made)?;
    Ok(made)
}

/// Makes an artifact from a text, or from our own.
///
/// # Errors
/// If the model cannot read it, or there is too little of it.
pub(crate) fn make(
    model: &Arc<Model>,
    kind: ArtifactKind,
    shape: &Shape,
    text: Option<&str>,
    progress: Progress,
) -> Result<Artifact, ArtifactError> {
    let tokens = tokens(model, kind, text)?;
    let mut step: Option<(&'static str, Step)> = None;
    let mut report = |what: &'static str, done: usize, all: usize| {
        if step.as_ref().is_none_or(|(name, _)| *name != what) {
            let name = format!("calibrating {kind}: {what}");
            step = Some((what, progress.step(name, all as u64)));
        }
        if let Some((_, step)) = &step {
            step.set(done as u64);
        }
    };
    Ok(calibrate(model, kind, shape, &tokens, &mut report)?)
}

/// Tokens of the calibration text, as many as it takes.
fn tokens(model: &Model, kind: ArtifactKind, text: Option<&str>) -> Result<Vec<u32>, TextError> {
    let tokenizer = model.tokenizer();
    let wanted = if kind == ArtifactKind::Hint { HINT_TOKENS } else { TOKENS };
    let most = wanted.min(model.config().context_tokens);
    let mut tokens = match text {
        Some(text) => tokenizer.encode(text, true)?,
        None => {
            let count =
                |text: &str| tokenizer.encode(text, false).map_or(usize::MAX / 2, |tokens| tokens.len());
            let text = Filler::new(None, SEED).take(most.saturating_sub(1), &count).concat();
            tokenizer.encode(&text, true)?
        }
    };
    tokens.truncate(most);
    Ok(tokens)
}

/// Writes an artifact whole or not at all.
///
/// # Errors
/// If the folder cannot be written to.
pub(crate) fn write(path: &Path, artifact: &Artifact) -> Result<(), ArtifactError> {
    let bytes = artifact.to_bytes()?;
    let whole = || -> io::Result<()> {
        let folder = path.parent().filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
        let mut file = tempfile::NamedTempFile::new_in(folder)?;
        file.write_all(&bytes)?;
        file.as_file().sync_all()?;
        file.persist(path)?;
        Ok(())
    };
    whole().map_err(|error| ArtifactError::Write { path: path.into(), error })
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvoyant_engine::synthetic;

    #[test]
    fn an_artifact_of_another_model_or_kind_is_refused_by_name() {
        let (model, other) = (synthetic::tiny(1), synthetic::tiny(2));
        let [shape, strange] = [&model, &other].map(|model| crate::session::methods_shape(model));
        let text = "One text is as good as another, as long as it is long enough to learn from. ".repeat(4);
        let made = make(&model, ArtifactKind::Skew, &shape, Some(&text), Progress::quiet()).unwrap();
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("skew.safetensors");
        write(&path, &made).unwrap();
        assert_eq!(read(&path, &shape).unwrap().kind(), ArtifactKind::Skew);
        let error = read(&path, &strange).unwrap_err().to_string();
        assert!(error.contains("skew.safetensors"), "{error}");
        assert!(made.check(ArtifactKind::Hash, &shape).unwrap_err().to_string().contains("hash"));
    }

    #[test]
    fn a_text_that_is_too_short_is_no_calibration() {
        let model = synthetic::tiny(1);
        let shape = crate::session::methods_shape(&model);
        let error =
            make(&model, ArtifactKind::Hash, &shape, Some("Too short."), Progress::quiet()).unwrap_err();
        assert!(error.to_string().contains("tokens"), "{error}");
    }
}
