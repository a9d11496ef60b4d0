//! K and V in the Kvoyant daemon.
//!
//! Every row is written through to the session's pages. A decode step attends, in layers that the daemon selects for,
//! over sinks, what the daemon answered with, and the recent window; in dense layers over everything. On a CPU the
//! session's own extents *are* this process's memory, so sinks, window and dense layers are read there and no second
//! copy of them is kept.
//!
//! The hint of layer `l + 1` leaves while layer `l` runs ([`KvBackend::hint`]); methods that need none are asked at the
//! same moment. The answer is waited for when that layer attends.

mod attention;
mod sequence;
mod stats;

use std::ops::Range;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvoyant_client::{Client, Limits, Member, ModelSpec, Options, Pending};
use kvoyant_kernels::Kernels;
use kvoyant_methods::infinigen::{self, SkewArtifact};
use kvoyant_methods::{Fingerprint, MethodError, MethodSpec, Needs, Shape};
use rayon::prelude::*;
use thiserror::Error;

pub use sequence::DaemonSequence;
pub use stats::StepStats;

use super::{KvBackend, KvShape};

/// What can go wrong with the daemon.
#[derive(Debug, Error)]
pub enum DaemonError {
    /// The client library's word.
    #[error(transparent)]
    Client(#[from] kvoyant_client::Error),
    /// A method that does not fit the model.
    #[error(transparent)]
    Method(#[from] MethodError),
    /// Methods of one session that want different statistics of a prompt.
    #[error("methods `{a}` and `{b}` want different statistics of a prompt (skew, index); use two sessions")]
    Statistics {
        /// One of them.
        a: Box<MethodSpec>,
        /// The other.
        b: Box<MethodSpec>,
    },
}

/// What a model registers with.
#[derive(Debug, Clone)]
pub struct DaemonOptions {
    /// A name for `kvoyant status`.
    pub name: String,
    /// Fingerprint of the weights.
    pub fingerprint: Fingerprint,
    /// Methods that sequences may use, by index.
    pub methods: Vec<MethodSpec>,
    /// InfiniGen's skew matrices, where a method needs them.
    pub skew: Option<Arc<SkewArtifact>>,
    /// First tokens that are always attended.
    pub sinks: usize,
    /// Recent tokens that are always attended, the current one included.
    pub window: usize,
    /// Layers `0..dense_layers` attend to everything.
    pub dense_layers: usize,
    /// Longest sequence, in tokens; sizes the answers.
    pub context_tokens: usize,
    /// Most sequences in one step.
    pub batch_max: usize,
    /// How long to wait for an answer before giving up.
    pub deadline: Duration,
}

impl Default for DaemonOptions {
    fn default() -> Self {
        Self {
            name: "kvoyant-engine".into(),
            fingerprint: Fingerprint::default(),
            methods: vec![MethodSpec::Full],
            skew: None,
            sinks: 4,
            window: 64,
            dense_layers: 2,
            context_tokens: 8192,
            batch_max: 32,
            deadline: Duration::from_secs(30),
        }
    }
}

impl DaemonOptions {
    /// The shape that methods and artifacts are made for.
    #[must_use]
    pub fn shape(&self, kv: &KvShape, page_rows: usize) -> Shape {
        Shape {
            layers: kv.layers,
            query_heads: kv.query_heads,
            kv_heads: kv.kv_heads,
            head_dim: kv.head_dim,
            page_rows,
            sinks: self.sinks,
            window: self.window,
            dense_layers: self.dense_layers,
            dtype: kv.dtype,
            fingerprint: self.fingerprint,
        }
    }

    /// Rings for a few answers under way, each with a block table for the worst case: every second row selected.
    fn limits(&self, kv: &KvShape) -> Limits {
        let heads = self.batch_max * kv.kv_heads;
        let table = heads * (16 + 12 * (self.context_tokens / 2 + 2));
        let hints = self.batch_max * kv.query_heads * kv.head_dim * 4;
        Limits {
            ring_slots: 8,
            batch_max: self.batch_max as u32,
            hint_bytes: hints.max(kv.kv_heads * kv.head_dim * 4).max(64) as u32,
            // A session's answers may take 256 MiB in all; longer contexts with that many members end in a typed error.
            table_bytes: table.clamp(4096, 24 << 20) as u32,
            sequences_max: 4096,
        }
    }
}

/// Which statistics of a prompt are collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Statistics {
    /// In the calibrated basis.
    skew: bool,
    /// Of the keys too.
    keys: bool,
}

impl Statistics {
    /// What all methods that want any agree on.
    fn wanted_by(methods: &[MethodSpec]) -> Result<Option<Self>, DaemonError> {
        let mut found: Option<(Self, &MethodSpec)> = None;
        for method in methods {
            let MethodSpec::Infinigen(spec) = method else { continue };
            let wanted = Self { skew: spec.skew, keys: spec.index == infinigen::IndexRule::Both };
            match found {
                Some((other, a)) if other != wanted => {
                    return Err(DaemonError::Statistics {
                        a: Box::new(a.clone()),
                        b: Box::new(method.clone()),
                    });
                }
                _ => found = Some((wanted, method)),
            }
        }
        Ok(found.map(|(wanted, _)| wanted))
    }
}

/// The backend. See the module.
#[derive(Debug)]
pub struct DaemonKv {
    shape: KvShape,
    methods_shape: Shape,
    options: DaemonOptions,
    model: kvoyant_client::Model,
    needs: Vec<Needs>,
    /// What statistics of a prompt are collected; `None`: no method wants any.
    statistics: Option<Statistics>,
    /// Answers under way, by layer.
    pending: Vec<Option<Pending>>,
    in_step: bool,
    hinted: bool,
    measure_mass: bool,
    stats: StepStats,
}

impl DaemonKv {
    /// Connects to a daemon and registers a model.
    ///
    /// # Errors
    /// A daemon that is not there or of another version, or a method or artifact that does not fit.
    pub fn connect(socket: &Path, shape: KvShape, options: DaemonOptions) -> Result<Self, DaemonError> {
        let limits = options.limits(&shape);
        let client =
            Client::connect(socket, Options { name: options.name.clone(), limits, ..Options::default() })?;
        let sliding = (0..shape.layers).filter(|layer| shape.sliding_window[*layer].is_some());
        let spec = ModelSpec {
            name: options.name.clone(),
            fingerprint: options.fingerprint.to_string(),
            layers: shape.layers as u32,
            query_heads: shape.query_heads as u32,
            kv_heads: shape.kv_heads as u32,
            head_dim: shape.head_dim as u32,
            dtype: shape.dtype.code(),
            page_rows: 0,
            sinks: options.sinks as u32,
            window: options.window as u32,
            dense_layers: options.dense_layers as u32,
            sliding_layers: sliding.map(|layer| layer as u32).collect(),
            methods: options.methods.iter().map(ToString::to_string).collect(),
            slab_bytes: 0,
            artifact_bytes: None,
        };
        let artifact = options.skew.as_ref().map(|skew| skew.to_bytes()).transpose()?;
        let model = client.register(spec, artifact.as_deref())?;
        let methods_shape = options.shape(&shape, model.page_rows());
        let skew = options.skew.clone().map(kvoyant_methods::Artifact::Skew);
        let needs = options
            .methods
            .iter()
            .map(|spec| Ok(kvoyant_methods::build(spec, &methods_shape, skew.as_ref())?.needs()))
            .collect::<Result<Vec<_>, MethodError>>()?;
        let statistics = Statistics::wanted_by(&options.methods)?;
        let pending = (0..shape.layers).map(|_| None).collect();
        Ok(Self {
            shape,
            methods_shape,
            options,
            model,
            needs,
            statistics,
            pending,
            in_step: false,
            hinted: false,
            measure_mass: false,
            stats: StepStats::default(),
        })
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

    /// Also measure how much of the true attention the attended rows cover. It scans every row, so the step's times
    /// mean nothing while it is on.
    pub fn measure_mass(&mut self, on: bool) {
        self.measure_mass = on;
    }

    /// What the steps since the last call did.
    pub fn take_stats(&mut self) -> StepStats {
        std::mem::take(&mut self.stats)
    }

    /// Opens an empty sequence with a method, by index.
    pub fn sequence(&self, method: usize) -> Result<DaemonSequence, DaemonError> {
        Ok(DaemonSequence::new(self.model.open(method, 0)?, method))
    }

    /// A second sequence with the same tokens, perhaps with another method. The prompt counts as complete with the
    /// first fork: its statistics are sent now.
    pub fn fork(
        &self,
        sequence: &mut DaemonSequence,
        method: Option<usize>,
    ) -> Result<DaemonSequence, DaemonError> {
        self.finish_prompt(sequence)?;
        Ok(sequence.fork(method)?)
    }

    /// Drops the tokens at and after `tokens`.
    pub fn truncate(&self, sequence: &mut DaemonSequence, tokens: usize) -> Result<(), DaemonError> {
        Ok(sequence.truncate(tokens)?)
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

    /// Sends the statistics of the prompt's queries, once per sequence.
    fn finish_prompt(&self, sequence: &mut DaemonSequence) -> Result<(), DaemonError> {
        let Some(sums) = sequence.take_sums() else { return Ok(()) };
        let width = self.shape.kv_heads * self.shape.head_dim;
        for (layer, sums) in sums.chunks_exact(width).enumerate() {
            self.model.observe(sequence.inner(), layer, sums)?;
        }
        Ok(())
    }

    /// Adds rows of a prompt, per KV head, to a layer's statistics, until they have been sent.
    fn add_sums<'r>(
        &self,
        layer: usize,
        sequence: &mut DaemonSequence,
        rows: impl Fn(&Shape, usize) -> infinigen::HeadRows<'r> + Sync,
    ) {
        let (shape, d) = (&self.methods_shape, self.shape.head_dim);
        let width = shape.kv_heads * d;
        let Some(sums) = sequence.sums_mut(self.shape.layers * width) else { return };
        let turned = self.statistics.is_some_and(|statistics| statistics.skew);
        let skew = self.options.skew.as_deref().filter(|_| turned);
        sums[layer * width..(layer + 1) * width].par_chunks_exact_mut(d).enumerate().for_each(
            |(head, sums)| {
                let matrix = skew.map_or(&[][..], |skew| skew.matrix(layer, head));
                infinigen::column_sums(matrix, &rows(shape, head), sums);
            },
        );
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

    fn speculate(
        &mut self,
        layer: usize,
        batch: &[&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
    ) -> Result<(), DaemonError> {
        let width = self.shape.query_heads * self.shape.head_dim;
        let members: Vec<_> = batch
            .iter()
            .zip(positions)
            .enumerate()
            .map(|(i, (sequence, position))| {
                let hint = if self.needs[sequence.method()].hint {
                    &queries[i * width..(i + 1) * width]
                } else {
                    &[]
                };
                Member { sequence: sequence.inner(), position: *position, hint }
            })
            .collect();
        self.pending[layer] = Some(self.model.speculate(layer, &members)?);
        Ok(())
    }
}

impl KvBackend for DaemonKv {
    type Sequence = DaemonSequence;
    type Error = DaemonError;

    fn tokens(&self, sequence: &DaemonSequence) -> usize {
        sequence.tokens()
    }

    fn store(
        &mut self,
        layer: usize,
        sequence: &mut DaemonSequence,
        start: usize,
        k: &[f32],
        v: &[f32],
    ) -> Result<(), DaemonError> {
        let KvShape { kv_heads, head_dim: d, dtype, .. } = self.shape;
        let row_bytes = self.shape.row_bytes();
        let tokens = k.len() / (kv_heads * d);
        // A step that failed before this prefill is over.
        self.in_step = false;
        if self.statistics.is_some_and(|statistics| statistics.keys) {
            self.add_sums(layer, sequence, |shape, head| infinigen::HeadRows::keys(k, shape, head));
        }
        self.make_room(&[(sequence, start + tokens)])?;
        let sequence = sequence.inner();
        (0..kv_heads).into_par_iter().try_for_each(|head| {
            let kernels = Kernels::best();
            let mut rows = vec![0; tokens * row_bytes];
            for (t, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
                let at = (t * kv_heads + head) * d;
                let (key, value) = row.split_at_mut(row_bytes / 2);
                kernels.from_f32(dtype, &k[at..at + d], key);
                kernels.from_f32(dtype, &v[at..at + d], value);
            }
            Ok(sequence.write_rows(layer, head, start, &rows)?)
        })
    }

    fn read(
        &mut self,
        layer: usize,
        sequence: &DaemonSequence,
        tokens: Range<usize>,
        k: &mut [f32],
        v: &mut [f32],
    ) -> Result<(), DaemonError> {
        let KvShape { head_dim: d, dtype, .. } = self.shape;
        let row_bytes = self.shape.row_bytes();
        let head_values = tokens.len() * d;
        let sequence = sequence.inner();
        k.par_chunks_mut(head_values).zip(v.par_chunks_mut(head_values)).enumerate().try_for_each(
            |(head, (k, v))| {
                let kernels = Kernels::best();
                let mut rows = vec![0; tokens.len() * row_bytes];
                sequence.read_rows(layer, head, tokens.clone(), &mut rows)?;
                let rows = rows.chunks_exact(row_bytes);
                for ((row, k), v) in rows.zip(k.chunks_exact_mut(d)).zip(v.chunks_exact_mut(d)) {
                    let (key, value) = row.split_at(row_bytes / 2);
                    kernels.to_f32(dtype, key, k);
                    kernels.to_f32(dtype, value, v);
                }
                Ok(())
            },
        )
    }

    fn observe_queries(
        &mut self,
        layer: usize,
        sequence: &mut DaemonSequence,
        _start: usize,
        queries: &[f32],
    ) -> Result<(), DaemonError> {
        if self.statistics.is_some() {
            self.add_sums(layer, sequence, |shape, head| infinigen::HeadRows::queries(queries, shape, head));
        }
        Ok(())
    }

    fn commit(&mut self, sequence: &mut DaemonSequence, tokens: usize) -> Result<(), DaemonError> {
        let new = tokens - sequence.tokens();
        sequence.set_tokens(tokens);
        if !self.in_step && new > 0 {
            self.model.append(&[(sequence.inner(), new)])?;
        }
        Ok(())
    }

    fn begin_step(
        &mut self,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
    ) -> Result<(), DaemonError> {
        self.in_step = false;
        self.pending.iter_mut().for_each(|pending| *pending = None);
        for sequence in batch.iter_mut() {
            self.finish_prompt(sequence)?;
        }
        let wanted: Vec<_> =
            batch.iter().zip(positions).map(|(sequence, position)| (&**sequence, position + 1)).collect();
        self.make_room(&wanted)?;
        self.in_step = true;
        self.hinted = batch.iter().any(|sequence| self.needs[sequence.method()].hint);
        self.stats.begin(batch.len(), positions);
        // A first layer that is not dense has nothing before it to be predicted from: only methods without hints
        // can be asked.
        if self.speculates(0) && !self.hinted {
            self.speculate(0, batch, positions, &[])?;
        }
        Ok(())
    }

    fn wants_hint(&self, layer: usize) -> bool {
        self.hinted && self.speculates(layer)
    }

    fn hint(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
    ) -> Result<(), DaemonError> {
        self.speculate(layer, batch, positions, queries)
    }

    fn append(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        k: &[f32],
        v: &[f32],
    ) -> Result<(), DaemonError> {
        let next = layer + 1;
        if !self.hinted && next < self.shape.layers && self.speculates(next) {
            self.speculate(next, batch, positions, &[])?;
        }
        let width = self.shape.kv_heads * self.shape.head_dim;
        for (i, sequence) in batch.iter().enumerate() {
            let range = i * width..(i + 1) * width;
            sequence.inner().write(layer, positions[i], &k[range.clone()], &v[range])?;
        }
        Ok(())
    }

    fn attend(
        &mut self,
        layer: usize,
        batch: &mut [&mut DaemonSequence],
        positions: &[usize],
        queries: &[f32],
        out: &mut [f32],
    ) -> Result<(), DaemonError> {
        let ready = match self.pending[layer].take() {
            None => None,
            Some(pending) => {
                let since = Instant::now();
                let ready = pending.wait(self.options.deadline)?;
                self.stats.answered(since.elapsed(), ready.completion());
                Some(ready)
            }
        };
        let pass = attention::Pass {
            shape: &self.shape,
            sinks: self.options.sinks,
            window: self.options.window,
            layer,
            ready: ready.as_ref(),
        };
        let batch: Vec<&DaemonSequence> = batch.iter().map(|sequence| &**sequence).collect();
        pass.attend(&batch, positions, queries, out);
        if self.measure_mass && ready.is_some() {
            pass.add_mass(&batch, positions, queries, &mut self.stats);
        }
        Ok(())
    }

    fn end_step(&mut self, batch: &mut [&mut DaemonSequence]) -> Result<(), DaemonError> {
        self.in_step = false;
        let appended: Vec<_> = batch.iter().map(|sequence| (sequence.inner(), 1)).collect();
        Ok(self.model.append(&appended)?)
    }
}
