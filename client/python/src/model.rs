//! Models: a session's sequences, requests and attention over all of them.

use std::sync::Arc;
use std::time::Duration;

use kvoyant_client::{Mode, SelectedBy, Stat};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::array::Array;
use crate::attend::{Attending, Reach};
use crate::errors::{Result, Wrong};
use crate::request::{Hints, PyPending, members, positions};
use crate::sequence::{Kept, PySequence, Shared, seconds};
use crate::session::Session;

const COUNTERS: [(&str, Stat); 18] = [
    ("speculations", Stat::Speculations),
    ("rows_selected", Stat::RowsSelected),
    ("rows_hit", Stat::RowsHit),
    ("rows_in_place", Stat::RowsInPlace),
    ("bytes_moved", Stat::BytesMoved),
    ("select_ns", Stat::SelectNs),
    ("transfer_ns", Stat::TransferNs),
    ("rows_appended", Stat::RowsAppended),
    ("cpu_rows", Stat::CpuRows),
    ("prefetched_rows", Stat::PrefetchedRows),
    ("prefetch_bytes", Stat::PrefetchBytes),
    ("estimated_rows", Stat::EstimatedRows),
    ("late_rows", Stat::LateRows),
    ("pages_written", Stat::PagesWritten),
    ("pages_read", Stat::PagesRead),
    ("pages_lost", Stat::PagesLost),
    ("page_wait_ns", Stat::PageWaitNs),
    ("pages_spilled", Stat::PagesSpilled),
];

/// A session with its model, from kvoyant.connect(). Several threads may use it at once. Closed by close(), `with`, or when nothing refers to it or
/// to anything that was made of it.
#[pyclass(frozen, module = "kvoyant", name = "Model")]
#[derive(Debug)]
pub(crate) struct PyModel {
    session: Arc<Session>,
}

impl PyModel {
    pub(crate) fn new(session: Session) -> Self {
        Self { session: Arc::new(session) }
    }
}

fn shared(kept: &[Arc<Kept>]) -> Result<Vec<Shared<'_>>> {
    kept.iter().map(|kept| kept.shared()).collect()
}

/// One count for each sequence.
fn each(counts: Option<Vec<usize>>, sequences: usize, what: &str) -> Result<Vec<usize>> {
    let counts = counts.unwrap_or_else(|| vec![1; sequences]);
    if counts.len() == sequences {
        return Ok(counts);
    }
    Err(Wrong::shape(format!("{what}: there are {}, where {sequences} sequences are named", counts.len())))
}

#[pymethods]
impl PyModel {
    fn __repr__(&self) -> String {
        let Session { spec, number, device, .. } = &*self.session;
        let open = if self.session.is_open() { "" } else { ", closed" };
        format!("<kvoyant.Model {} (session {number} on {device}{open})>", spec.name)
    }

    /// Number of the session, as in `kvoyant status`.
    #[getter]
    fn session(&self) -> u64 {
        self.session.number
    }

    /// Name of the daemon's device.
    #[getter]
    fn device(&self) -> &str {
        &self.session.device
    }

    /// How the device answers: "in-place" (rows are read in the session's own memory), "slab" (in host memory), "device" (in a GPU's).
    #[getter]
    fn mode(&self) -> &'static str {
        match self.session.mode {
            Mode::InPlace => "in-place",
            Mode::Slab => "slab",
            Mode::Device => "device",
        }
    }

    /// How rows are stored, such as "f16".
    #[getter]
    fn dtype(&self) -> String {
        self.session.layout.format().to_string()
    }

    /// Decoder layers.
    #[getter]
    fn layers(&self) -> u32 {
        self.session.spec.layers
    }

    /// Query heads.
    #[getter]
    fn query_heads(&self) -> u32 {
        self.session.spec.query_heads
    }

    /// KV heads.
    #[getter]
    fn kv_heads(&self) -> u32 {
        self.session.spec.kv_heads
    }

    /// Values of a key, and so of a query.
    #[getter]
    fn key_values(&self) -> usize {
        self.session.layout.key_values()
    }

    /// Values of a value, and so of an attention output.
    #[getter]
    fn value_values(&self) -> usize {
        self.session.layout.value_values()
    }

    /// Rows (tokens) of a page.
    #[getter]
    fn page_rows(&self) -> usize {
        self.session.page_rows
    }

    /// Bytes of a row.
    #[getter]
    fn row_bytes(&self) -> usize {
        self.session.row_bytes
    }

    /// First tokens that are always attended to.
    #[getter]
    fn sinks(&self) -> u32 {
        self.session.spec.sinks
    }

    /// Recent tokens that are always attended to, the current one included.
    #[getter]
    fn window(&self) -> u32 {
        self.session.spec.window
    }

    /// The methods that sequences name by index.
    #[getter]
    fn methods(&self) -> Vec<String> {
        self.session.spec.methods.clone()
    }

    /// Whether the daemon selects rows of a layer; of others attention reads everything.
    fn selects(&self, layer: usize) -> Result<bool> {
        Ok(self.session.selects(self.session.layer(layer)?))
    }

    /// Whether pages may leave host memory: then rows that no answer names are there after fetch() alone.
    #[getter]
    fn spills(&self) -> bool {
        self.session.spills
    }

    /// Version of the protocol that is spoken, and its minor: the smaller one of both sides.
    #[getter]
    fn protocol(&self) -> (u32, u16) {
        self.session.protocol
    }

    /// Whether it can be used no more.
    #[getter]
    fn closed(&self) -> bool {
        !self.session.is_open()
    }

    /// Counters of the session since it began, as the daemon publishes them.
    fn counters<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let model = self.session.model()?;
        let counters = PyDict::new(py);
        for (name, stat) in COUNTERS {
            counters.set_item(name, model.stat(stat))?;
        }
        Ok(counters)
    }

    /// Opens an empty sequence with room for `tokens`. `method` is an index into the registered methods.
    ///
    /// BackpressureError with what is needed, what is free, and what would free enough; QuotaError.
    #[pyo3(signature = (tokens=0, *, method=0))]
    fn open(&self, py: Python<'_>, tokens: usize, method: usize) -> Result<PySequence> {
        let model = self.session.model()?;
        let method = self.session.method(method)?;
        let sequence = py.detach(|| model.open(method, tokens))?;
        Ok(PySequence::new(&self.session, method, sequence))
    }

    /// Opens a sequence as an image has it (Sequence.suspend), which stays, with that method or the image's own.
    #[pyo3(signature = (image, *, method=None))]
    fn resume(&self, py: Python<'_>, image: &str, method: Option<usize>) -> Result<PySequence> {
        let model = self.session.model()?;
        let method = method.map(|method| self.session.method(method)).transpose()?;
        let (sequence, method) = py.detach(|| model.resume(image, method, SelectedBy::Lane))?;
        Ok(PySequence::new(&self.session, method, sequence))
    }

    /// Opens a sequence that begins with the longest published prefix of these tokens (Model.publish); how many that are, its `tokens` says. At
    /// least one is left over, so that there is something to compute.
    #[pyo3(signature = (tokens, *, method=0))]
    fn attach(&self, py: Python<'_>, tokens: Vec<u32>, method: usize) -> Result<PySequence> {
        let model = self.session.model()?;
        let method = self.session.method(method)?;
        let sequence = py.detach(|| model.attach(method, &tokens, SelectedBy::Lane))?;
        Ok(PySequence::new(&self.session, method, sequence))
    }

    /// Publishes the full pages of a sequence's first tokens, which it was made of, for other sequences of this user, or of every user if
    /// `shared`, to begin with. Says how many tokens can be attached to now.
    #[pyo3(signature = (sequence, tokens, *, shared=false))]
    fn publish(
        &self,
        py: Python<'_>,
        sequence: &Bound<'_, PySequence>,
        tokens: Vec<u32>,
        shared: bool,
    ) -> Result<usize> {
        let model = self.session.model()?;
        let kept = members(&self.session, std::slice::from_ref(sequence))?;
        let open = kept[0].alone_unviewed("publish")?;
        let sequence = open.get();
        Ok(py.detach(|| model.publish(sequence, &tokens, shared))?)
    }

    /// Gives sequences room for so many tokens each, in one call: all of them or none (of more than 1024, so many at a time).
    fn reserve(
        &self,
        py: Python<'_>,
        sequences: Vec<Bound<'_, PySequence>>,
        tokens: Vec<usize>,
    ) -> Result<()> {
        let model = self.session.model()?;
        let kept = members(&self.session, &sequences)?;
        let tokens = each(Some(tokens), kept.len(), "tokens")?;
        let open = kept.iter().map(|kept| kept.alone_unviewed("reserve")).collect::<Result<Vec<_>>>()?;
        let list: Vec<_> = open.iter().map(|open| &**open.get()).zip(tokens).collect();
        Ok(py.detach(|| model.reserve(&list))?)
    }

    /// Says that the next rows of every layer have been written: `tokens[i]` of sequence i (default: 1 of each).
    #[pyo3(signature = (sequences, tokens=None))]
    fn append(
        &self,
        py: Python<'_>,
        sequences: Vec<Bound<'_, PySequence>>,
        tokens: Option<Vec<usize>>,
    ) -> Result<()> {
        let model = self.session.model()?;
        let kept = members(&self.session, &sequences)?;
        let tokens = each(tokens, kept.len(), "tokens")?;
        let open = kept.iter().map(|kept| kept.alone()).collect::<Result<Vec<_>>>()?;
        let list: Vec<_> = open.iter().map(|open| &**open.get()).zip(tokens).collect();
        Ok(py.detach(|| model.append(&list))?)
    }

    /// Asks for the rows of a layer for a whole batch, while an earlier layer runs.
    ///
    /// `queries` is float32 `[members, query heads, key_values]`, of the layer after RoPE, not scaled; of blocks of query tokens `[members, query
    /// tokens, query heads, key_values]`; None where the method wants none. `floors` is what they give to rows that are attended anyway: float32
    /// `[members, query heads]` log-sum-exps of scaled scores. `ids`, for methods of rows that the engine names, is for each member and KV
    /// head a list of tokens. `positions` are those of the tokens that are being computed (default: behind what is appended). `within`: in how
    /// many seconds the rows are wanted, for methods that leave late rows out.
    ///
    /// BusyError if as many answers are held or under way as the session has ring_slots.
    #[pyo3(signature = (layer, sequences, queries=None, *, floors=None, ids=None, positions=None, within=None))]
    #[allow(clippy::too_many_arguments, reason = "by keyword in Python")]
    fn speculate<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        sequences: Vec<Bound<'py, PySequence>>,
        queries: Option<&Bound<'py, PyAny>>,
        floors: Option<&Bound<'py, PyAny>>,
        ids: Option<Vec<Vec<Vec<u32>>>>,
        positions: Option<Vec<usize>>,
        within: Option<f64>,
    ) -> PyResult<PyPending> {
        let within = within.map(seconds).transpose()?;
        self.ask(py, layer, &sequences, (queries, floors, ids), positions, |model, layer, members, block| {
            Ok(match within {
                Some(_) if block > 1 => {
                    return Err(Wrong::argument("within is for single query tokens, not for blocks"));
                }
                Some(within) => model.speculate_within(layer, members, within)?,
                None => model.speculate_block(layer, members, block)?,
            })
        })
    }

    /// Asks for an estimate of the rows that a layer's last answer left out, by its true queries: for methods that select by a query known ahead.
    /// Arrays are as in speculate().
    #[pyo3(signature = (layer, sequences, queries, *, floors=None, positions=None))]
    fn rest<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        sequences: Vec<Bound<'py, PySequence>>,
        queries: &Bound<'py, PyAny>,
        floors: Option<&Bound<'py, PyAny>>,
        positions: Option<Vec<usize>>,
    ) -> PyResult<PyPending> {
        self.ask(
            py,
            layer,
            &sequences,
            (Some(queries), floors, None),
            positions,
            |model, layer, members, _| Ok(model.rest(layer, members)?),
        )
    }

    /// Has the daemon bring all pages of a layer of these sequences back to host memory, where the model spills. They stay there until the answer is
    /// released; it names no rows.
    #[pyo3(signature = (layer, sequences, *, positions=None))]
    fn fetch<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        sequences: Vec<Bound<'py, PySequence>>,
        positions: Option<Vec<usize>>,
    ) -> PyResult<PyPending> {
        self.ask(py, layer, &sequences, (None, None, None), positions, |model, layer, members, _| {
            let list: Vec<_> = members.iter().map(|member| (member.sequence, member.position)).collect();
            Ok(model.fetch(layer, &list)?)
        })
    }

    /// Attention of the tokens that are being computed, one of each sequence, whose rows of this layer have been written (Sequence.write): what
    /// the reference engine computes. In layers that the daemon selects for it asks by the true query, waits, and attends to sinks, what was
    /// selected and the window in one softmax, with the method's estimate of the rest; elsewhere to everything, or to the last `reach`
    /// tokens. Other Python threads run meanwhile.
    ///
    /// `queries` is float32 `[members, query heads, key_values]` after RoPE, not scaled: scores are scaled by 1/sqrt(key_values). Returns
    /// Attended: `out` float32 `[members, query heads, value_values]`, `lse` float32 `[members, query heads]`; where the method certifies its
    /// answers, `missed_mass` and `error` float32 `[members, query heads]`.
    #[pyo3(signature = (layer, sequences, queries, *, positions=None, reach=None, timeout=30.0))]
    #[allow(clippy::too_many_arguments, reason = "by keyword in Python")]
    fn attend<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        sequences: Vec<Bound<'py, PySequence>>,
        queries: &Bound<'py, PyAny>,
        positions: Option<Vec<usize>>,
        reach: Option<usize>,
        timeout: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let session = &self.session;
        let layer = session.layer(layer)?;
        let kept = members(session, &sequences)?;
        let queries = Array::of(queries, "queries")?;
        queries.expect_shape(
            "members, query heads, key_values",
            &[&[kept.len(), session.query_heads(), session.layout.key_values()]],
        )?;
        let attending = Attending {
            session,
            layer,
            members: &kept.iter().collect::<Vec<_>>(),
            positions,
            queries: &queries.floats()?,
            reach: Reach::of(reach)?,
            timeout: seconds(timeout)?,
        };
        attending.attend(py)?.into_python(py, session, Some(kept.len()))
    }

    /// Closes sequences in one call. (A sequence that nothing refers to closes by itself.)
    fn close_sequences(&self, py: Python<'_>, sequences: Vec<Bound<'_, PySequence>>) -> Result<()> {
        let model = self.session.model()?;
        let kept = members(&self.session, &sequences)?;
        // All or none: what is looked at, or used by another thread, is found before anything is closed.
        drop(kept.iter().map(|kept| kept.alone_unviewed("close")).collect::<Result<Vec<_>>>()?);
        let list: Vec<_> = kept.iter().filter_map(|kept| kept.take_if_idle()).collect();
        Ok(py.detach(|| model.close(list))?)
    }

    /// Ends the session: its sequences are closed, its requests given up, its answers released. What views show stays until they are gone.
    fn close(&self, py: Python<'_>) -> Result<()> {
        py.detach(|| self.session.close())
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, PyTuple>) -> Result<()> {
        self.close(py)
    }
}

/// Queries, floors and named rows as they come.
type Given<'a, 'py> =
    (Option<&'a Bound<'py, PyAny>>, Option<&'a Bound<'py, PyAny>>, Option<Vec<Vec<Vec<u32>>>>);

impl PyModel {
    /// Asks. Other threads of Python go on meanwhile: a request waits where the ring is full, or all tickets are in use.
    fn ask<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        sequences: &[Bound<'py, PySequence>],
        (queries, floors, ids): Given<'_, 'py>,
        at: Option<Vec<usize>>,
        ask: impl FnOnce(
            &kvoyant_client::Model,
            usize,
            &[kvoyant_client::Member<'_>],
            usize,
        ) -> Result<kvoyant_client::Pending>
        + Send,
    ) -> PyResult<PyPending> {
        let model = self.session.model()?;
        let layer = self.session.layer(layer)?;
        let kept = members(&self.session, sequences)?;
        let open = shared(&kept)?;
        let at = positions(&open, at)?;
        let hints = Hints::of(&self.session, kept.len(), queries, floors, ids)?;
        let block = hints.block;
        let pending = hints.with(py, &open, &at, |members| ask(&model, layer, members, block))?;
        drop(open);
        Ok(PyPending::new(&self.session, kept, layer, pending))
    }
}

/// What is left of a `Duration` option: its default, or so many seconds.
pub(crate) fn or_default(given: Option<f64>, default: Duration) -> Result<Duration> {
    given.map_or(Ok(default), seconds)
}
