//! K and V in the Kvoyant daemon.
//!
//! Every row is written through to the session's pages. A decode step attends, in layers that the daemon selects for,
//! over sinks, what the daemon answered with, and the recent window; in dense layers over everything. On a CPU the
//! session's own extents *are* this process's memory, so sinks, window and dense layers are read there and no second
//! copy of them is kept. Where the daemon's device is a GPU, attention runs there: see `device`.
//!
//! | a method's hint | the daemon is asked |
//! |---|---|
//! | `ahead` | while the layer before runs ([`KvBackend::hint`](crate::KvBackend::hint)), with the predicted query |
//! | none, `previous` | at the same moment, without a query or with the layer's true query one step ago |
//! | `current`, ids | when the layer is about to attend, with its true query or what the caller names |
//!
//! In place, and where the engine would only wait for a lane, rows are selected in this process instead ([`Selects`], `here`).
//!
//! An answer is waited for when its layer attends. Members of one step may have methods of different kinds: those that are
//! asked together are one group with one answer.

mod alone;
mod ask;
mod attention;
mod backend;
mod calls;
mod chunk;
mod device;
mod feedback;
mod here;
mod kept;
mod late;
mod lease;
mod measure;
mod options;
mod own;
mod prompt;
mod rebuilt;
mod rest;
mod sequence;
mod stats;
mod still;

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvoyant_client::cuda::KernelError;
use kvoyant_client::local::LocalMethod;
use kvoyant_client::{Client, Fallback, Mode, ModelSpec, Options, SelectedBy, Stat, Taken};
use kvoyant_methods::{MethodError, MethodSpec, Needs, Shape};
use thiserror::Error;

pub use ask::IdsRequest;
pub use lease::Paged;
pub use options::{DaemonOptions, Selects};
pub use sequence::DaemonSequence;
pub use stats::{Certified, Fallbacks, Measured, StepStats};

use self::ask::{Asked, Provider};
use self::device::DeviceAttention;
use self::feedback::Row;
use self::options::Statistics;
use super::{FormatError, KvShape};
use crate::rope::Rope;

/// What can go wrong with the daemon.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The client library's word.
    #[error(transparent)]
    Client(#[from] kvoyant_client::Error),
    /// A method that does not fit the model.
    #[error(transparent)]
    Method(#[from] MethodError),
    /// Rows that cannot be stored.
    #[error(transparent)]
    Format(#[from] FormatError),
    /// Keys that cannot be rebuilt.
    #[error("method `{method}` rebuilds keys, and {why}; use keys=moved")]
    Rebuilt {
        /// The method.
        method: Box<MethodSpec>,
        /// Why that cannot be.
        why: &'static str,
    },
    /// A method of rows that the engine names, and nobody names them.
    #[error("method `{method}` takes the rows that the engine names: say which with `DaemonKv::set_ids`")]
    NoIds {
        /// The method.
        method: Box<MethodSpec>,
    },
    /// Attention on the daemon's GPU needs a kernel that cannot be had.
    #[error("attention on {device} needs its kernel: {error}")]
    Kernel {
        /// The daemon's device.
        device: String,
        /// Why it cannot be had, and what to do.
        error: Box<KernelError>,
    },
    /// The device could not read an answer that the daemon calls ready.
    #[error("the device could not read the answer to layer {layer} (ticket {ticket}): {why}")]
    Table {
        /// The layer.
        layer: usize,
        /// The answer's ticket; 0 for none.
        ticket: u64,
        /// What the kernel found.
        why: &'static str,
    },
    /// A step that failed has left the stream waiting for the daemon.
    #[error(
        "the device has waited {waited:.1?} for the daemon since a step failed; is it stopped or overloaded?"
    )]
    Stuck {
        /// How long this call waited for it.
        waited: Duration,
    },
    /// Rows cannot be selected here that may be on disk.
    #[error(
        "the daemon moves pages to disk, and only it can bring them back: let it select (selects=auto or lane)"
    )]
    Spills,
    /// Methods of one session that want different statistics of a prompt.
    #[error("methods `{a}` and `{b}` want different statistics of a prompt (skew, index); use two sessions")]
    Statistics {
        /// One of them.
        a: Box<MethodSpec>,
        /// The other.
        b: Box<MethodSpec>,
    },
}

/// The backend. See the module.
#[derive(Debug)]
pub struct DaemonKv {
    /// Before the session, whose memory it uses.
    device: Option<Box<DeviceAttention>>,
    shape: KvShape,
    methods_shape: Shape,
    options: DaemonOptions,
    model: kvoyant_client::Model,
    needs: Vec<Needs>,
    /// Methods that select in this process, by index.
    local: Vec<Option<LocalMethod>>,
    /// What was chosen ahead in this process, by layer.
    chosen: Vec<Vec<here::Chosen>>,
    spare: here::Spare,
    /// Sequences whose digests have begun here.
    seeds: u64,
    /// What statistics of a prompt are collected; `None`: no method wants any.
    statistics: Option<Statistics>,
    /// Answers under way, by layer.
    pending: Vec<Vec<Asked>>,
    /// When a layer was asked for ahead of it, in this step.
    asked: Vec<Option<Instant>>,
    /// How long a layer's rows have lately been asked for before it attended.
    hidden: Vec<Option<Duration>>,
    in_step: bool,
    /// Whether a member of this step wants hints ahead of their layers.
    hinted: bool,
    /// Who names rows, for methods that select nothing themselves.
    ids: Option<Provider>,
    /// Attention rows of this step, sent when it is committed.
    rows: Vec<Row>,
    measure: bool,
    stats: StepStats,
    /// Of the newest answer.
    generation: u32,
    /// Of steps whose statistics have been taken.
    fallen_back: Fallbacks,
    /// Rows that the layer's answers named, by index into the batch, until they are kept.
    named: late::NamedRows,
    /// Since when answers are late, if the last one was.
    silent: Option<Instant>,
    /// When an answer was last late.
    last_late: Option<Instant>,
    /// How far the lane had come when the step began.
    begun: Option<Taken>,
    /// How far it has come, if it is not asked for anything before it comes further.
    still: Option<Taken>,
    /// Whether this step asks for nothing, because the end of a prompt could not be told before it.
    unasked: bool,
    /// Why the daemon is not asked any more.
    alone: Option<Arc<str>>,
}

impl DaemonKv {
    /// Connects to a daemon and registers a model.
    ///
    /// # Errors
    /// A daemon that is not there or of another version, or a method or artifact that does not fit.
    pub fn connect(socket: &Path, shape: KvShape, options: DaemonOptions) -> Result<Self, DaemonError> {
        shape.check()?;
        let limits = options.limits(&shape);
        let client = Client::connect(
            socket,
            Options {
                name: options.name.clone(),
                limits,
                control_timeout: options.deadline,
                fallback: options.fallback,
                late_after: options.late_after,
                // A ticket that does not come free is a late answer too.
                ticket_timeout: match options.fallback {
                    Fallback::Wait => options.deadline,
                    Fallback::Partial | Fallback::ResidentOnly => options.late_after,
                },
                ..Options::default()
            },
        )?;
        let sliding = (0..shape.layers).filter(|layer| shape.sliding_window[*layer].is_some());
        let spec = ModelSpec {
            name: options.name.clone(),
            fingerprint: options.fingerprint.to_string(),
            adapter: String::new(),
            rope: options.rope.as_ref().map(Rope::name).unwrap_or_default(),
            layers: shape.layers as u32,
            query_heads: shape.query_heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_dim: shape.head_dim as u32,
            latent_values: 0,
            dtype: shape.format.code(),
            page_rows: 0,
            sinks: options.sinks as u32,
            window: options.window as u32,
            dense_layers: options.dense_layers as u32,
            sliding_layers: sliding.map(|layer| layer as u32).collect(),
            methods: options.methods.iter().map(ToString::to_string).collect(),
            slab_bytes: 0,
            graph: None,
            artifacts: Vec::new(),
        };
        let artifacts = &options.artifacts;
        let for_daemon = artifacts.iter().filter(|artifact| artifact.kind().builds_methods());
        let files = for_daemon.map(kvoyant_methods::Artifact::to_bytes).collect::<Result<Vec<_>, _>>()?;
        let model = client.register(spec, &files)?;
        if model.spills() && options.selects == Selects::Client {
            return Err(DaemonError::Spills);
        }
        let methods_shape = options.shape(&shape, model.page_rows());
        let needs = options
            .methods
            .iter()
            .map(|spec| Ok(kvoyant_methods::build(spec, &methods_shape, artifacts)?.needs()))
            .collect::<Result<Vec<_>, MethodError>>()?;
        let local = here::methods(&options, &model, &methods_shape, artifacts)?;
        let statistics = Statistics::wanted_by(&options.methods)?;
        let device = match model.mode() {
            Mode::Device => Some(Box::new(DeviceAttention::new(&model)?)),
            Mode::InPlace | Mode::Slab => None,
        };
        let generation = model.generation();
        let pending = (0..shape.layers).map(|_| Vec::new()).collect();
        let chosen = (0..shape.layers).map(|_| Vec::new()).collect();
        let (asked, hidden) = (vec![None; shape.layers], vec![None; shape.layers]);
        let made = Self {
            device,
            shape,
            methods_shape,
            options,
            model,
            needs,
            local,
            chosen,
            spare: here::Spare::default(),
            seeds: 0,
            statistics,
            pending,
            asked,
            hidden,
            in_step: false,
            hinted: false,
            ids: None,
            rows: Vec::new(),
            measure: false,
            stats: StepStats::default(),
            generation,
            fallen_back: Fallbacks::default(),
            named: Vec::new(),
            silent: None,
            last_late: None,
            begun: None,
            still: None,
            unasked: false,
            alone: None,
        };
        made.check_rebuilt()?;
        Ok(made)
    }

    /// Shape of the cache.
    #[must_use]
    pub fn shape(&self) -> &KvShape {
        &self.shape
    }

    /// The session's model.
    #[must_use]
    pub fn model(&self) -> &kvoyant_client::Model {
        &self.model
    }

    /// Methods that sequences may use.
    #[must_use]
    pub fn methods(&self) -> &[MethodSpec] {
        &self.options.methods
    }

    /// Also measure how far selected layers are from dense attention ([`Measured`]). It scans every row, so the step's times
    /// mean nothing while it is on.
    pub fn measure(&mut self, on: bool) {
        self.measure = on;
    }

    /// Who names the rows, for methods that select nothing themselves: for each request the tokens of each KV head, all
    /// below the request's position.
    pub fn set_ids(&mut self, name: impl FnMut(&IdsRequest<'_>) -> Vec<Vec<u32>> + Send + 'static) {
        self.ids = Some(Provider::new(name));
    }

    /// Bytes that the daemon has moved ahead of any step that asked for them, since the session began.
    #[must_use]
    pub fn ahead_bytes(&self) -> u64 {
        self.model.stat(Stat::PrefetchBytes)
    }

    /// What the steps since the last call did.
    pub fn take_stats(&mut self) -> StepStats {
        self.fallen_back += self.stats.fallbacks;
        std::mem::take(&mut self.stats)
    }

    /// What was attended by other rows than its method's since the session began.
    #[must_use]
    pub fn fallbacks(&self) -> Fallbacks {
        let mut all = self.fallen_back;
        all += self.stats.fallbacks;
        all
    }

    /// Opens an empty sequence with a method, by index.
    pub fn sequence(&mut self, method: usize) -> Result<DaemonSequence, DaemonError> {
        // An index that is none of the session's is the daemon's to refuse.
        let by = if method < self.local.len() { self.selector(method) } else { SelectedBy::Lane };
        let inner = self.model.open_selected_by(method, 0, by)?;
        let mut sequence = DaemonSequence::new(inner, method, self.shape.layers);
        self.begin_digests(&mut sequence, None);
        Ok(sequence)
    }

    /// Who selects a sequence's rows: the daemon's lane, or this process itself.
    #[must_use]
    pub fn selected_by(&self, sequence: &DaemonSequence) -> SelectedBy {
        sequence.inner().selected_by()
    }

    /// A second sequence with the same tokens, perhaps with another method. The prompt counts as complete with the
    /// first fork: its statistics are sent now.
    pub fn fork(
        &mut self,
        sequence: &mut DaemonSequence,
        method: Option<usize>,
    ) -> Result<DaemonSequence, DaemonError> {
        self.tell(sequence)?;
        self.finish_prompt(sequence)?;
        let index = method.unwrap_or(sequence.method());
        let by = if index < self.local.len() { self.selector(index) } else { SelectedBy::Lane };
        let mut fork = sequence.fork(method, by)?;
        self.begin_digests(&mut fork, Some(sequence));
        // So that its own forks share them.
        self.digest(&mut fork, sequence.tokens())?;
        Ok(fork)
    }

    /// Drops the tokens at and after `tokens`.
    pub fn truncate(&mut self, sequence: &mut DaemonSequence, tokens: usize) -> Result<(), DaemonError> {
        self.cut(sequence, tokens)?;
        if tokens == 0 {
            // What comes now is another prompt.
            sequence.forget_statistics();
        }
        Ok(())
    }

    fn cut(&mut self, sequence: &mut DaemonSequence, tokens: usize) -> Result<(), DaemonError> {
        if self.is_served() {
            let told = self.tell(sequence);
            let truncated = told.and_then(|()| Ok(sequence.truncate(tokens)?));
            if let Some(truncated) = self.or_alone(truncated) {
                return truncated;
            }
        }
        self.truncate_alone(sequence, tokens);
        Ok(())
    }

    /// Closes sequences in one message.
    pub fn close(&self, sequences: Vec<DaemonSequence>) -> Result<(), DaemonError> {
        Ok(self.model.close(sequences.into_iter().map(DaemonSequence::into_inner).collect())?)
    }

    /// Whether the daemon selects rows of this layer.
    #[must_use]
    pub fn speculates(&self, layer: usize) -> bool {
        layer >= self.options.dense_layers && self.shape.sliding_window[layer].is_none()
    }

    /// What a sequence's method needs.
    fn needs_of(&self, sequence: &DaemonSequence) -> &Needs {
        &self.needs[sequence.method()]
    }

    /// Makes room for `tokens` tokens, of several sequences in one call.
    fn make_room(&self, wanted: &[(&DaemonSequence, usize)]) -> Result<(), DaemonError> {
        let short: Vec<_> = wanted
            .iter()
            .filter(|(sequence, tokens)| sequence.inner().room() < *tokens)
            .map(|(sequence, tokens)| (sequence.inner(), *tokens))
            .collect();
        if short.is_empty() {
            return Ok(());
        }
        Ok(self.model.reserve(&short)?)
    }
}
