//! A model's session with a daemon, and how large a daemon of our own must be.

use std::path::Path;
use std::sync::Arc;

use kvoyant_engine::{DaemonError, DaemonKv, DaemonOptions, Dtype, KvShape, Model};
use kvoyant_methods::{Artifact, ArtifactKind, MethodSpec};

use crate::fingerprint;
use crate::progress::Progress;
use crate::skew_cache::{self, SkewError};

/// What K and V are stored as.
const STORAGE: Dtype = Dtype::F16;

/// Rows of a page, for making artifacts, which do not depend on it.
const ANY_PAGE_ROWS: usize = 32;

/// Why there is no session.
#[derive(Debug, thiserror::Error)]
pub(crate) enum SessionError {
    /// The daemon's word.
    #[error(transparent)]
    Daemon(#[from] DaemonError),
    /// A method needs an artifact that could not be made.
    #[error(transparent)]
    Calibrate(#[from] SkewError),
}

/// The shape of a model's KV.
pub(crate) fn shape(model: &Model) -> KvShape {
    KvShape::new(model.config(), STORAGE)
}

/// What a session registers: the methods, with what they need, calibrated now if it is not in the cache.
///
/// # Errors
/// If the calibration fails.
pub(crate) fn options(
    model: &Arc<Model>,
    methods: Vec<MethodSpec>,
    context_tokens: usize,
    batch_max: usize,
    progress: Progress,
) -> Result<DaemonOptions, SkewError> {
    let mut options = DaemonOptions {
        name: model.name().to_owned(),
        fingerprint: fingerprint::of(model),
        methods,
        context_tokens,
        batch_max,
        ..DaemonOptions::default()
    };
    if options.methods.iter().any(|method| method.artifact() == Some(ArtifactKind::Skew)) {
        let shape = options.shape(&shape(model), ANY_PAGE_ROWS);
        let skew = skew_cache::skew(model, &shape, progress)?;
        options.artifacts.insert(Artifact::Skew(Arc::new(skew)));
    }
    Ok(options)
}

/// Connects and registers.
///
/// # Errors
/// If the daemon is not there, or refuses.
pub(crate) fn connect(
    model: &Model,
    socket: &Path,
    options: DaemonOptions,
) -> Result<DaemonKv, SessionError> {
    Ok(DaemonKv::connect(socket, shape(model), options)?)
}

/// The daemon's device in words: `host`, or `cuda:0` with the GPU's name.
pub(crate) fn device(kv: &DaemonKv) -> String {
    let model = kv.model();
    match model.device_session() {
        Some(session) => format!("{} ({})", model.device(), session.context().info().name),
        None => model.device().to_owned(),
    }
}

/// `serve`'s arguments for a daemon that can hold `tokens` tokens in an arena and a share of them in a slab.
pub(crate) fn sizes(shape: &KvShape, tokens: usize, slab_tokens: usize) -> Vec<String> {
    // Pages are not all full, and an extent is 64 MiB.
    const SLACK_BYTES: usize = 512 << 20;
    const SMALLEST_SLAB: usize = 4 << 20;
    let arena = tokens * shape.token_bytes() * 5 / 4 + SLACK_BYTES;
    let slab = (slab_tokens * shape.token_bytes()).max(SMALLEST_SLAB);
    vec!["--arena".into(), format!("{arena}B"), "--slab".into(), format!("{slab}B")]
}
