//! `kvoyant calibrate-model`: what a method learns from a model offline, from a text of the user's.

use std::collections::BTreeSet;
use std::io;
use std::path::PathBuf;

use kvoyant_methods::ArtifactKind;

use crate::args::CalibrateModelArgs;
use crate::artifact_cache::{self, ArtifactError};
use crate::cache::{self, CacheError};
use crate::model::{self, ModelError};
use crate::output;
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
    /// One file for several artifacts.
    #[error(
        "the method {method} needs several artifacts ({kinds}) and --out names one file: name a folder that there is, or leave \
         --out away"
    )]
    Several {
        /// Which method.
        method: &'static str,
        /// Which artifacts.
        kinds: String,
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

/// Calibrates all that the method needs, and says where it lies.
///
/// # Errors
/// If anything is missing or fails.
pub(crate) fn text(args: &CalibrateModelArgs) -> Result<String, CalibrateModelError> {
    let method = args.method.name();
    // A mix may want one kind for several of its parts.
    let kinds: BTreeSet<ArtifactKind> = args.method.artifacts().into_iter().collect();
    if kinds.is_empty() {
        return Err(CalibrateModelError::Nothing { method });
    }
    let folder = args.out.as_deref().filter(|out| out.is_dir());
    if args.out.is_some() && folder.is_none() && kinds.len() > 1 {
        let names: Vec<_> = kinds.iter().map(|kind| kind.name()).collect();
        return Err(CalibrateModelError::Several { method, kinds: names.join(", ") });
    }
    if let Some(out) = &args.out {
        let checked = folder.map_or_else(|| output::check_replaced(out), output::check_folder);
        checked.map_err(|error| ArtifactError::Write { path: out.clone(), error })?;
    }
    let progress = Progress::new();
    let read = |path: &PathBuf| {
        std::fs::read_to_string(path).map_err(|error| CalibrateModelError::Read { path: path.clone(), error })
    };
    let text = args.text.as_ref().map(read).transpose()?;
    let model = model::open(&args.model, progress)?.model;
    let shape = session::methods_shape(&model);
    let mut written = Vec::new();
    for kind in kinds {
        let path = match (&args.out, folder) {
            (_, Some(folder)) => folder.join(format!("{kind}.safetensors")),
            (Some(path), None) => path.clone(),
            (None, None) => cache::folder(kind.name())?.join(format!("{}.safetensors", shape.fingerprint)),
        };
        let made = artifact_cache::make(&model, kind, &shape, text.as_deref(), progress)?;
        artifact_cache::write(&path, &made)?;
        written.push((kind.to_string(), path));
    }
    if args.json {
        let all = written.iter().map(|(kind, path)| serde_json::json!({"kind": kind, "path": path}));
        return Ok(format!("{:#}\n", serde_json::Value::from(all.collect::<Vec<_>>())));
    }
    Ok(written.iter().map(|(_, path)| format!("{}\n", path.display())).collect())
}
