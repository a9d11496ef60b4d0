//! Which model: a file or folder that the user names, the one in the cache, or the tiny one in memory.

use std::path::Path;
use std::sync::Arc;

use kvoyant_engine::{LoadError, LoadOptions, Model};

use crate::args::ModelArgs;
use crate::fetch::{self, FetchError};
use crate::progress::Progress;

/// The name of the model that needs no file.
const TINY: &str = "tiny";

/// Its weights' seed.
const TINY_SEED: u64 = 1;

/// Why there is no model.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ModelError {
    /// It could not be fetched.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// It could not be loaded.
    #[error(transparent)]
    Load(#[from] LoadError),
}

/// A model, and whether its answers mean anything.
#[derive(Debug)]
pub(crate) struct Chosen {
    /// The model.
    pub(crate) model: Arc<Model>,
    /// Its weights are random.
    pub(crate) tiny: bool,
}

/// Finds, fetches if need be, and loads the model.
///
/// # Errors
/// If it cannot be had or read.
pub(crate) fn open(args: &ModelArgs, progress: Progress) -> Result<Chosen, ModelError> {
    let path = match &args.model {
        Some(name) if name == Path::new(TINY) => {
            return Ok(Chosen { model: kvoyant_engine::synthetic::tiny(TINY_SEED), tiny: true });
        }
        Some(path) => path.clone(),
        None => fetch::model(&fetch::SMOLLM2, progress)?,
    };
    let _step = progress.spinner("loading the model");
    Ok(Chosen { model: Model::load(&path, &LoadOptions::default())?, tiny: false })
}
