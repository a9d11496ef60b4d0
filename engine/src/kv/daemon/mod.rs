//! K and V in the Kvoyant daemon.
//!
//! Every row is written through to the session's pages. A decode step attends, in layers that the daemon selects for,
//! over sinks, what the daemon answered with, and the recent window; in dense layers over everything. On a CPU the
//! session's own extents *are* this process's memory, so sinks, window and dense layers are read there and no second
//! copy of them is kept. Where the daemon's device is a GPU, attention runs there: see `device`.
//!
//! The hint of layer `l + 1` leaves while layer `l` runs ([`KvBackend::hint`]); methods that need none are asked at the
//! same moment. The answer is waited for when that layer attends.

mod attention;
mod device;
mod options;
mod sequence;
mod stats;

use std::ops::Range;
use std::path::Path;
use std::time::{Duration, Instant};

use kvoyant_client::cuda::{KernelError, StreamMember, StreamPending};
use kvoyant_client::{Client, Hint, Member, Mode, ModelSpec, Options, Pending};
use kvoyant_kernels::Kernels;
use kvoyant_methods::infinigen;
use kvoyant_methods::{MethodError, MethodSpec, Needs, Shape};
use rayon::prelude::*;
use thiserror::Error;

pub use options::DaemonOptions;
pub use sequence::DaemonSequence;
pub use stats::StepStats;

use self::attention::Pass;
use self::device::{DeviceAttention, Layer};
use self::options::Statistics;
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
    /// Methods of one session that want different statistics of a prompt.
    #[error("methods `{a}` and `{b}` want different statistics of a prompt (skew, index); use two sessions")]
    Statistics {
        /// One of them.
        a: Box<MethodSpec>,
        /// The other.
        b: Box<MethodSpec>,
    },
}

/// An answer under way.
#[derive(Debug)]
enum Asked {
    /// That this process waits for and reads.
    Host(Pending),
    /// That a stream waits for.
    Stream(StreamPending),
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
    /// What statistics of a prompt are collected; `None`: no method wants any.
    statistics: Option<Statistics>,
    /// Answers under way, by layer.
    pending: Vec<Option<Asked>>,
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
            graph: None,
            latent_values: 0,
            artifacts: Vec::new(),
        };
        let artifacts = &options.artifacts;
        let files =
            artifacts.iter().map(|artifact| artifact.to_bytes()).collect::<Result<Vec<_>, MethodError>>()?;
        let model = client.register(spec, &files)?;
        let methods_shape = options.shape(&shape, model.page_rows());
        let needs = options
            .methods
            .iter()
            .map(|spec| Ok(kvoyant_methods::build(spec, &methods_shape, artifacts)?.needs()))
            .collect::<Result<Vec<_>, MethodError>>()?;
        let statistics = Statistics::wanted_by(&options.methods)?;
        let device = match model.mode() {
            Mode::Device => Some(Box::new(DeviceAttention::new(&model)?)),
            Mode::InPlace | Mode::Slab => None,
        };
        let pending = (0..shape.layers).map(|_| None).collect();
        Ok(Self {
            device,
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
        let skew = self.options.artifacts.skew().filter(|_| turned);
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
        if self.hinted
            && let Some(device) = &mut self.device
        {
            let members: Vec<_> = batch
                .iter()
                .zip(positions)
                .map(|(sequence, position)| StreamMember { sequence: sequence.inner(), position: *position })
                .collect();
            let deadline = self.options.deadline;
            let pending = device.speculate(&self.model, layer, &members, queries, deadline)?;
            self.pending[layer] = Some(Asked::Stream(pending));
            return Ok(());
        }
        let width = self.shape.query_heads * self.shape.head_dim;
        let members: Vec<_> = batch
            .iter()
            .zip(positions)
            .enumerate()
            .map(|(i, (sequence, position))| {
                let hint = if self.needs[sequence.method()].hint.is_query() {
                    Hint::Query(&queries[i * width..(i + 1) * width])
                } else {
                    Hint::None
                };
                Member { sequence: sequence.inner(), position: *position, hint }
            })
            .collect();
        let pending = self.model.speculate(layer, &members)?;
        self.pending[layer] = Some(match &self.device {
            Some(_) => Asked::Stream(pending.on_stream()?),
            None => Asked::Host(pending),
        });
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
        self.hinted = batch.iter().any(|sequence| self.needs[sequence.method()].hint.is_query());
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
        let batch: Vec<&DaemonSequence> = batch.iter().map(|sequence| &**sequence).collect();
        let asked = self.pending[layer].take();
        let pass = Pass {
            shape: &self.shape,
            sinks: self.options.sinks,
            window: self.options.window,
            layer,
            selects: asked.is_some(),
        };
        let deadline = self.options.deadline;
        if let Some(device) = &mut self.device {
            let asked = match asked {
                None => None,
                Some(Asked::Stream(pending)) => Some(pending),
                Some(Asked::Host(pending)) => Some(pending.on_stream()?),
            };
            let attended = Layer { pass, batch: &batch, positions, queries };
            let Some(answered) = device.attend(attended, asked, deadline, self.measure_mass, out)? else {
                return Ok(());
            };
            self.stats.answered(answered.waited, &answered.completion);
            if let Some(answer) = &answered.answer {
                pass.add_mass(answer, &batch, positions, queries, &mut self.stats);
            }
            return Ok(());
        }
        let ready = match asked {
            Some(Asked::Host(pending)) => {
                let since = Instant::now();
                let ready = pending.wait(deadline)?;
                self.stats.answered(since.elapsed(), ready.completion());
                Some(ready)
            }
            // Streams are asked for where there is a device alone.
            Some(Asked::Stream(_)) | None => None,
        };
        pass.attend(ready.as_ref(), &batch, positions, queries, out);
        if self.measure_mass
            && let Some(ready) = &ready
        {
            pass.add_mass(ready, &batch, positions, queries, &mut self.stats);
        }
        Ok(())
    }

    fn end_step(&mut self, batch: &mut [&mut DaemonSequence]) -> Result<(), DaemonError> {
        self.in_step = false;
        let appended: Vec<_> = batch.iter().map(|sequence| (sequence.inner(), 1)).collect();
        Ok(self.model.append(&appended)?)
    }
}
