//! A model's session with a daemon, and how large a daemon of our own must be.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvoyant_engine::{
    DaemonError, DaemonKv, DaemonOptions, Dtype, Format, HintNorm, KvShape, LearnedHints, Model,
};
use kvoyant_methods::{ArtifactKind, Artifacts, HintNorm as MethodNorm, MethodError, MethodSpec, Shape};

use crate::artifact_cache::{self, ArtifactError};
use crate::fingerprint;
use crate::progress::Progress;

/// What K and V are stored as, where the user says nothing.
const STORAGE: Format = Format::Plain(Dtype::F16);

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
    Calibrate(#[from] ArtifactError),
}

/// The shape of a model's KV.
pub(crate) fn shape(model: &Model) -> KvShape {
    KvShape::new(model.config(), STORAGE)
}

/// The shape that methods and artifacts of a model are made for.
pub(crate) fn methods_shape(model: &Model) -> Shape {
    let options = DaemonOptions { fingerprint: fingerprint::of(model), ..DaemonOptions::default() };
    options.shape(&shape(model), ANY_PAGE_ROWS)
}

/// What a session registers: the methods, with what they need: `own` artifacts of the user's, and what is calibrated now if
/// it is not in the cache.
///
/// # Errors
/// If the calibration fails.
pub(crate) fn options_with(
    model: &Arc<Model>,
    methods: Vec<MethodSpec>,
    context_tokens: usize,
    batch_max: usize,
    own: &[PathBuf],
    progress: Progress,
) -> Result<DaemonOptions, ArtifactError> {
    let mut options = DaemonOptions {
        name: model.name().to_owned(),
        fingerprint: fingerprint::of(model),
        methods,
        context_tokens,
        batch_max,
        rope: Some(model.rope().clone()),
        ..DaemonOptions::default()
    };
    let shape = options.shape(&shape(model), ANY_PAGE_ROWS);
    for artifact in own {
        options.artifacts.insert(artifact_cache::read(artifact, &shape)?);
    }
    let wanted: BTreeSet<ArtifactKind> = options.methods.iter().flat_map(MethodSpec::artifacts).collect();
    for kind in wanted {
        if options.artifacts.iter().all(|artifact| artifact.kind() != kind) {
            options.artifacts.insert(artifact_cache::artifact(model, kind, &shape, progress)?);
        }
    }
    Ok(options)
}

/// The same without artifacts of the user's.
///
/// # Errors
/// If the calibration fails.
pub(crate) fn options(
    model: &Arc<Model>,
    methods: Vec<MethodSpec>,
    context_tokens: usize,
    batch_max: usize,
    progress: Progress,
) -> Result<DaemonOptions, ArtifactError> {
    options_with(model, methods, context_tokens, batch_max, &[], progress)
}

/// How a model's hints are made, of methods that may want them made differently.
#[derive(Debug)]
pub(crate) struct Hints(Option<Arc<LearnedHints>>);

impl Hints {
    /// With the corrections among the artifacts of a session, if there are any.
    ///
    /// # Errors
    /// They are of another model.
    pub(crate) fn new(model: &Model, artifacts: &Artifacts) -> Result<Self, MethodError> {
        let shape = methods_shape(model);
        let learned = artifacts.hint().map(|hint| LearnedHints::new(model, &shape, hint)).transpose()?;
        Ok(Self(learned.map(Arc::new)))
    }

    /// Those that a method wants.
    pub(crate) fn of(&self, method: &MethodSpec) -> HintNorm {
        match (method.hint_norm(), &self.0) {
            (Some(MethodNorm::Learned), Some(learned)) => HintNorm::Learned(Arc::clone(learned)),
            (Some(MethodNorm::Previous), _) => HintNorm::Previous,
            // No corrections were asked for where no hint goes ahead of its layer: any way will do.
            (Some(MethodNorm::Learned), None) | (Some(MethodNorm::Own) | None, _) => HintNorm::Own,
        }
    }
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
    connect_as(STORAGE, model, socket, options)
}

/// Connects and registers with rows in another format than our own.
///
/// # Errors
/// As [`connect`], or a format that such heads cannot have.
pub(crate) fn connect_as(
    format: Format,
    model: &Model,
    socket: &Path,
    options: DaemonOptions,
) -> Result<DaemonKv, SessionError> {
    Ok(DaemonKv::connect(socket, KvShape::new(model.config(), format), options)?)
}

/// The daemon's device in words: `host`, or `cuda:0` with the GPU's name.
pub(crate) fn device(kv: &DaemonKv) -> String {
    let model = kv.model();
    match model.device_session() {
        Some(session) => format!("{} ({})", model.device(), session.context().info().name),
        None => model.device().to_owned(),
    }
}

/// `serve`'s arguments for a daemon that can hold `tokens` tokens in an arena, or `host_percent` of them there and the rest on disk, and a
/// share of them in a slab.
pub(crate) fn sizes(
    shape: &KvShape,
    tokens: usize,
    slab_tokens: usize,
    host_percent: Option<f64>,
) -> Vec<String> {
    // Pages are not all full, and an extent is 64 MiB.
    const SLACK_BYTES: usize = 512 << 20;
    const SMALLEST_SLAB: usize = 4 << 20;
    // Of host memory that is scarce, the least that has room for a prompt's chunk, windows, and a layer as a whole.
    const SPILLING_SLACK_BYTES: usize = 192 << 20;
    let bytes = tokens * shape.token_bytes();
    let (arena, spill) = match host_percent {
        None => (bytes * 5 / 4 + SLACK_BYTES, None),
        Some(percent) => {
            ((bytes as f64 * percent / 100.0) as usize + SPILLING_SLACK_BYTES, Some(2 * bytes + SLACK_BYTES))
        }
    };
    let slab = (slab_tokens * shape.token_bytes()).max(SMALLEST_SLAB);
    let mut all = vec!["--arena".into(), format!("{arena}B"), "--slab".into(), format!("{slab}B")];
    if let Some(spill) = spill {
        all.extend(["--spill-bytes".into(), format!("{spill}B")]);
    }
    all
}
