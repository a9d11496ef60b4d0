//! `kvoyant calibrate-model`: what a method learns from a model offline, from a text of the user's.

use std::io;
use std::path::PathBuf;

use kvoyant_methods::ArtifactKind;

use crate::args::CalibrateModelArgs;
use crate::artifact_cache::{self, ArtifactError};
use crate::cache::{self, CacheError};
use crate::model::{self, ModelError};
use crate::progress::Progress;
use crate::session;

/// Why nothing was calibrated.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CalibrateModelError {
    /// The method learns nothing offline.
    #[error("the method {method} needs no calibration")]
    Nothing {
        /// Which method.
        method: &'static str,
    },
    /// The text cannot be read.
    #[error("the text {} cannot be read: {error}", .path.display())]
    Read {
        /// Which file.
        path: PathBuf,
        /// Why not.
        error: io::Error,
    },
    /// No model.
    #[error(transparent)]
    Model(#[from] ModelError),
    /// No cache folder.
    #[error(transparent)]
    Cache(#[from] CacheError),
    /// No artifact.
    #[error(transparent)]
    Artifact(#[from] ArtifactError),
}

/// Calibrates, and says where the artifact lies.
///
/// # Errors
/// If anything is missing or fails.
pub(crate) fn text(args: &CalibrateModelArgs) -> Result<String, CalibrateModelError> {
    let kind: ArtifactKind =
        args.method.artifact().ok_or(CalibrateModelError::Nothing { method: args.method.name() })?;
    let progress = Progress::new();
    let read = |path: &PathBuf| {
        std::fs::read_to_string(path).map_err(|error| CalibrateModelError::Read { path: path.clone(), error })
    };
    let text = args.text.as_ref().map(read).transpose()?;
    let model = model::open(&args.model, progress)?.model;
    let shape = session::methods_shape(&model);
    let path = match &args.out {
        Some(path) => path.clone(),
        None => cache::folder(kind.name())?.join(format!("{}.safetensors", shape.fingerprint)),
    };
    let made = artifact_cache::make(&model, kind, &shape, text.as_deref(), progress)?;
    artifact_cache::write(&path, &made)?;
    Ok(format!("{}\n", path.display()))
}
