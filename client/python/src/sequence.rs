//! Sequences: written, appended, read where they lie, forked, cut, closed.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use kvoyant_client::handed_out::{self, HandedOut, NotThere};
use kvoyant_client::{Format, RowLayout, SelectedBy, Sequence};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::array::{self, Array};
use crate::attend::{Attending, Reach};
use crate::errors::{Result, Wrong};
use crate::owned::Owned;
use crate::rows::{Keeper, Rows};
use crate::session::Session;

/// A sequence, and the model that it belongs to. Calls that change its length want it for themselves; all others share it. Nobody waits for
/// that: two threads that meet here have a defect, and one of them is told.
#[derive(Debug)]
pub(crate) struct Kept {
    pub(crate) session: Arc<Session>,
    pub(crate) method: usize,
    sequence: HandedOut<Owned<Sequence>>,
    /// Views of its rows that are alive.
    views: AtomicUsize,
}

/// A view of a sequence's rows: while there is one, the sequence stays open and as it is.
#[derive(Debug)]
pub(crate) struct View(Arc<Kept>);

impl View {
    pub(crate) fn of(kept: &Arc<Kept>) -> Self {
        kept.views.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(kept))
    }
}

impl Drop for View {
    fn drop(&mut self) {
        self.0.views.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A sequence that stays open meanwhile.
pub(crate) type Shared<'a> = handed_out::Shared<'a, Owned<Sequence>>;

/// A sequence that nobody else uses meanwhile.
pub(crate) type Alone<'a> = handed_out::Alone<'a, Owned<Sequence>>;

impl Kept {
    pub(crate) fn new(session: &Arc<Session>, method: usize, sequence: Sequence) -> Arc<Self> {
        let kept = Arc::new(Self {
            session: Arc::clone(session),
            method,
            sequence: HandedOut::new(Owned::new(sequence)),
            views: AtomicUsize::new(0),
        });
        session.keep_sequence(&kept);
        kept
    }

    /// For calls that leave its length as it is.
    pub(crate) fn shared(&self) -> Result<Shared<'_>> {
        self.there(HandedOut::shared)
    }

    /// For calls that change it.
    pub(crate) fn alone(&self) -> Result<Alone<'_>> {
        self.there(HandedOut::alone)
    }

    fn there<'a, T>(
        &'a self,
        how: impl FnOnce(&'a HandedOut<Owned<Sequence>>) -> std::result::Result<T, NotThere>,
    ) -> Result<T> {
        self.session.here("sequence")?;
        match how(&self.sequence) {
            Ok(there) if self.session.is_open() => Ok(there),
            Ok(_) | Err(NotThere::Closed) => Err(Wrong::closed("sequence")),
            Err(NotThere::Changed) => Err(Wrong::concurrent("changed")),
            Err(NotThere::Used) => Err(Wrong::concurrent("used")),
        }
    }

    /// For calls after which views would show something else.
    pub(crate) fn alone_unviewed(&self, what: &str) -> Result<Alone<'_>> {
        let alone = self.alone()?;
        match self.views.load(Ordering::Relaxed) {
            0 => Ok(alone),
            views => Err(Wrong::viewed(views, what)),
        }
    }

    /// The sequence itself, if no other thread is inside a call on it and nobody looks at its rows.
    pub(crate) fn take_if_idle(&self) -> Option<Sequence> {
        let alone = self.sequence.alone().ok()?;
        (self.views.load(Ordering::Relaxed) == 0).then(|| alone.take().into_inner())
    }
}

/// An open sequence. Calls that change its length (append, reserve, truncate, fork, suspend, close) want it for themselves: a thread that
/// finds another one inside gets a ConcurrentError. Closed by close(), `with`, its model's end, or when nothing refers to it.
#[pyclass(frozen, module = "kvoyant", name = "Sequence")]
#[derive(Debug)]
pub(crate) struct PySequence {
    pub(crate) kept: Arc<Kept>,
}

impl PySequence {
    pub(crate) fn new(session: &Arc<Session>, method: usize, sequence: Sequence) -> Self {
        Self { kept: Kept::new(session, method, sequence) }
    }
}

/// Runs of rows in a sequence's own memory, with their tokens.
fn local_runs(
    kept: &Kept,
    sequence: &Sequence,
    (layer, kv_head): (usize, usize),
    tokens: std::ops::Range<usize>,
) -> Vec<(usize, u64, usize)> {
    let (page_rows, row_bytes) = (kept.session.page_rows, kept.session.row_bytes);
    let mut all: Vec<(usize, u64, usize)> = Vec::new();
    let mut part = Vec::new();
    let mut token = tokens.start;
    while token < tokens.end {
        // Of one page there is one run or none, so that its token is known.
        let next = tokens.end.min((token / page_rows + 1) * page_rows);
        part.clear();
        sequence.local_runs(layer, kv_head, token..next, &mut part);
        if let Some(run) = part.first() {
            let address = run.rows_ptr.addr() as u64;
            match all.last_mut() {
                Some((first, at, count))
                    if *first + *count == token && *at + (*count * row_bytes) as u64 == address =>
                {
                    *count += run.rows;
                }
                _ => all.push((token, address, run.rows)),
            }
        }
        token = next;
    }
    all
}

#[pymethods]
impl PySequence {
    fn __repr__(&self) -> String {
        match self.kept.shared() {
            Ok(open) => {
                let sequence = open.get();
                format!("<kvoyant.Sequence of {} tokens, room for {}>", sequence.tokens(), sequence.room())
            }
            Err(_) => "<kvoyant.Sequence, closed>".into(),
        }
    }

    /// Tokens appended so far.
    #[getter]
    fn tokens(&self) -> Result<usize> {
        Ok(self.kept.shared()?.get().tokens())
    }

    /// Tokens that it has room for.
    #[getter]
    fn room(&self) -> Result<usize> {
        Ok(self.kept.shared()?.get().room())
    }

    /// Index of its method.
    #[getter]
    fn method(&self) -> usize {
        self.kept.method
    }

    /// Whether it can be used no more.
    #[getter]
    fn closed(&self) -> bool {
        self.kept.session.here("sequence").is_err()
            || matches!(self.kept.sequence.shared(), Err(NotThere::Closed))
            || !self.kept.session.is_open()
    }

    /// The first token of which some layer's rows are lost, or None: truncate there, and compute them again.
    #[getter]
    fn first_lost(&self) -> Result<Option<usize>> {
        Ok(self.kept.shared()?.get().first_lost())
    }

    /// Writes keys and values of one layer from token `position` on (default: behind those appended), straight into the session's pages,
    /// in the format that the model stores. They count once they are appended.
    ///
    /// `keys` is `[KV heads, key_values]` of one token or `[tokens, KV heads, key_values]`, after RoPE; `values` the same with value_values;
    /// float32, float16 or bfloat16. Of latents, `values` is None. NoRoomError: reserve first.
    #[pyo3(signature = (layer, keys, values=None, *, position=None))]
    fn write<'py>(
        &self,
        layer: usize,
        keys: &Bound<'py, PyAny>,
        values: Option<&Bound<'py, PyAny>>,
        position: Option<usize>,
    ) -> PyResult<()> {
        let session = &self.kept.session;
        let open = self.kept.shared()?;
        let layer = session.layer(layer)?;
        let layout = session.layout;
        let (heads, latent) = (session.kv_heads(), matches!(layout, RowLayout::Latent { .. }));
        let keys = Array::of(keys, "keys")?;
        let several = (keys.shape().len() == 3).then(|| keys.shape()[0]);
        let expect = |array: &Array<'_>, width: usize| match several {
            None => array.expect_shape("KV heads, values of each", &[&[heads, width]]),
            Some(count) => array.expect_shape("tokens, KV heads, values of each", &[&[count, heads, width]]),
        };
        expect(&keys, layout.key_values())?;
        let key = keys.floats()?;
        let values = match values {
            Some(_) if latent => {
                return Err(Wrong::argument(
                    "values: there are none of a latent, of which they are a part; pass None",
                )
                .into());
            }
            None if latent => None,
            None => {
                return Err(Wrong::argument("values: there is no array, where one is needed").into());
            }
            Some(values) => {
                let values = Array::of(values, "values")?;
                expect(&values, layout.value_values())?;
                Some(values)
            }
        };
        let value = values.as_ref().map(Array::floats).transpose()?.unwrap_or_default();
        let sequence = open.get();
        let position = position.unwrap_or_else(|| sequence.tokens());
        write_tokens(session, sequence, layer, position, (&key, &value))?;
        Ok(())
    }

    /// Writes rows of one layer and KV head from token `position` on, as they are stored: each is a key and then a value.
    ///
    /// `rows` is `[tokens, key_values + value_values]` (of a latent `[tokens, key_values]`) in the model's own dtype; of formats other than f32,
    /// f16 and bf16 uint8 `[tokens, row_bytes]`.
    #[pyo3(signature = (layer, kv_head, rows, *, position=None))]
    fn write_rows<'py>(
        &self,
        layer: usize,
        kv_head: usize,
        rows: &Bound<'py, PyAny>,
        position: Option<usize>,
    ) -> PyResult<()> {
        let session = &self.kept.session;
        let open = self.kept.shared()?;
        let (layer, kv_head) = (session.layer(layer)?, session.kv_head(kv_head)?);
        let rows = Array::of(rows, "rows")?;
        let dtype = match session.layout.format() {
            Format::Plain(dtype) => Some(dtype),
            _ => None,
        };
        let width = dtype.map_or(session.row_bytes, |dtype| session.row_bytes / dtype.bytes());
        let count = rows.shape().first().copied().unwrap_or(0);
        rows.expect_shape("tokens, values of a row", &[&[count, width]])?;
        let bytes = rows.as_stored(dtype)?;
        let sequence = open.get();
        let position = position.unwrap_or_else(|| sequence.tokens());
        Ok(sequence.write_rows(layer, kv_head, position, bytes).map_err(Wrong::from)?)
    }

    /// Gives it room for so many tokens in all. Room never shrinks by this. BackpressureError says what is needed and what would free enough.
    fn reserve(&self, py: Python<'_>, tokens: usize) -> Result<()> {
        let model = self.kept.session.model()?;
        let open = self.kept.alone_unviewed("reserve")?;
        let sequence = open.get();
        py.detach(|| model.reserve(&[(sequence, tokens)])).map_err(Wrong::from)
    }

    /// Says that the next `tokens` rows of every layer have been written.
    #[pyo3(signature = (tokens=1))]
    fn append(&self, py: Python<'_>, tokens: usize) -> Result<()> {
        let model = self.kept.session.model()?;
        let open = self.kept.alone()?;
        let sequence = open.get();
        py.detach(|| model.append(&[(sequence, tokens)])).map_err(Wrong::from)
    }

    /// Copies rows of a layer out of the session's own memory: `keys` float32 `[KV heads, tokens, key_values]` and `values` float32 `[KV heads,
    /// tokens, value_values]` of tokens `first..end` (default: all that are appended).
    ///
    /// SpilledError and LostError where they are not in host memory.
    #[pyo3(signature = (layer, first=0, end=None))]
    fn read<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        first: usize,
        end: Option<usize>,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let session = &self.kept.session;
        let layer = session.layer(layer)?;
        let open = self.kept.shared()?;
        let sequence = open.get();
        let end = end.unwrap_or_else(|| sequence.tokens());
        let count = end.checked_sub(first).ok_or_else(|| {
            Wrong::argument(format!("tokens {first}..{end}: the first comes behind the end"))
        })?;
        let (k, v, heads) = (session.layout.key_values(), session.layout.value_values(), session.kv_heads());
        let read = py.detach(|| {
            let (mut keys, mut values) = (vec![0.0; heads * count * k], vec![0.0; heads * count * v]);
            if count > 0 {
                for (head, (keys, values)) in
                    keys.chunks_exact_mut(count * k).zip(values.chunks_exact_mut(count * v)).enumerate()
                {
                    sequence.read(layer, head, first..end, keys, values)?;
                }
            }
            Ok((keys, values))
        });
        let (keys, values) = read.map_err(|error: kvoyant_client::Error| Wrong::from(error))?;
        Ok((array::floats(py, &[heads, count, k], &keys)?, array::floats(py, &[heads, count, v], &values)?))
    }

    /// Views of the rows of tokens `first..end` (default: all that are appended) of one layer and KV head where they lie in the session's own
    /// memory: a list of Rows, by token. Rows that are not there, because a method has dropped them, are in none.
    ///
    /// While a view (or an array made of it) is alive, the sequence cannot be reserved, truncated, forked, suspended or closed.
    #[pyo3(signature = (layer, kv_head, first=0, end=None))]
    fn rows(&self, layer: usize, kv_head: usize, first: usize, end: Option<usize>) -> Result<Vec<Rows>> {
        let session = &self.kept.session;
        let (layer, kv_head) = (session.layer(layer)?, session.kv_head(kv_head)?);
        let open = self.kept.shared()?;
        let sequence = open.get();
        let needs = &session.needs[self.kept.method];
        if session.spills || needs.drops_rows {
            return Err(Wrong::unsupported(
                "rows of this session may leave host memory, so there are no views of them: read() copies them",
            ));
        }
        // Rows that are written and not yet appended can be looked at, too.
        let end = end.unwrap_or_else(|| sequence.tokens()).min(sequence.room());
        let runs = local_runs(&self.kept, sequence, (layer, kv_head), first..end);
        Ok(runs
            .into_iter()
            .map(|(token, address, count)| Rows {
                keeper: Arc::new(Keeper::Sequence(View::of(&self.kept))),
                address,
                layout: session.layout,
                device: None,
                token,
                count,
                in_slab: false,
            })
            .collect())
    }

    /// Attention of the token that is being computed, whose rows of this layer have been written: see Model.attend, of which this is the case of one
    /// sequence. `query` is float32 `[query heads, key_values]`; `out` is `[query heads, value_values]`, `lse` `[query heads]`.
    #[pyo3(signature = (layer, query, *, position=None, reach=None, timeout=30.0))]
    fn attend<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        query: &Bound<'py, PyAny>,
        position: Option<usize>,
        reach: Option<usize>,
        timeout: f64,
    ) -> PyResult<Bound<'py, PyAny>> {
        let session = &self.kept.session;
        let query = Array::of(query, "query")?;
        query.expect_shape(
            "query heads, key_values",
            &[&[session.query_heads(), session.layout.key_values()]],
        )?;
        let layer = session.layer(layer)?;
        let attending = Attending {
            session,
            layer,
            members: &[&self.kept],
            positions: position.map(|position| vec![position]),
            queries: &query.floats()?,
            reach: Reach::of(reach)?,
            timeout: seconds(timeout)?,
        };
        attending.attend(py)?.into_python(py, session, None)
    }

    /// Whether rows were left out of attention or views, since this was last asked, that are not gone for good: they lie on disk (Model.fetch).
    fn take_missed(&self) -> Result<bool> {
        Ok(self.kept.shared()?.get().take_missed())
    }

    /// Sends the statistics of a prompt's queries for one layer, for methods that want them: float32 `[KV heads, key_values]`.
    fn observe<'py>(&self, py: Python<'py>, layer: usize, sums: &Bound<'py, PyAny>) -> PyResult<()> {
        let session = &self.kept.session;
        let model = session.model()?;
        let open = self.kept.shared()?;
        let layer = session.layer(layer)?;
        let sums = Array::of(sums, "sums")?;
        sums.expect_shape("KV heads, key_values", &[&[session.kv_heads(), session.spec.head_dim as usize]])?;
        let (sums, open) = (sums.floats()?.into_owned(), open.get());
        Ok(py.detach(|| model.observe(open, layer, &sums)).map_err(Wrong::from)?)
    }

    /// Sends an attention row of each KV head over the first `tokens` tokens, for methods that learn from them: float32 `[KV heads, blocks]`, the
    /// largest weight of each block of tokens and of the group's query heads, within 0 and 1. `full`: of attention over all tokens.
    #[pyo3(signature = (layer, tokens, rows, *, full=false))]
    fn feedback<'py>(
        &self,
        py: Python<'py>,
        layer: usize,
        tokens: usize,
        rows: &Bound<'py, PyAny>,
        full: bool,
    ) -> PyResult<()> {
        let session = &self.kept.session;
        let model = session.model()?;
        let open = self.kept.shared()?;
        let layer = session.layer(layer)?;
        let rows = Array::of(rows, "rows")?;
        let blocks = rows.shape().get(1).copied().unwrap_or(1);
        rows.expect_shape("KV heads, blocks", &[&[session.kv_heads(), blocks]])?;
        let (rows, open) = (rows.floats()?.into_owned(), open.get());
        Ok(py.detach(|| model.feedback(open, layer, tokens, full, &rows)).map_err(Wrong::from)?)
    }

    /// Marks the text of tokens that have room and have not been appended yet, one byte each from `first_token` on.
    fn mark(&self, py: Python<'_>, first_token: usize, marks: &[u8]) -> Result<()> {
        let model = self.kept.session.model()?;
        let open = self.kept.shared()?;
        let sequence = open.get();
        Ok(py.detach(|| model.mark(sequence, first_token, marks))?)
    }

    /// Opens a copy of it, with its own method or another one, by index. Pages are shared until one of the two writes, so both must reserve before
    /// they do.
    #[pyo3(signature = (method=None))]
    fn fork(&self, py: Python<'_>, method: Option<usize>) -> Result<Self> {
        let session = &self.kept.session;
        let method = method.map(|method| session.method(method)).transpose()?;
        let open = self.kept.alone_unviewed("fork")?;
        let sequence = open.get();
        let fork = py.detach(|| sequence.fork_selected_by(method, SelectedBy::Lane))?;
        Ok(Self::new(session, method.unwrap_or(self.kept.method), fork))
    }

    /// Drops every row from token `tokens` on: rejected drafts, or rows that are lost.
    fn truncate(&self, py: Python<'_>, tokens: usize) -> Result<()> {
        let open = self.kept.alone_unviewed("truncate")?;
        let sequence = open.get();
        Ok(py.detach(|| sequence.truncate(tokens))?)
    }

    /// Writes it to an image that outlives the daemon, and closes it: see Model.resume. `label` helps to tell it from others in lists. If that
    /// fails, the sequence is still open.
    #[pyo3(signature = (image, *, overwrite=false, label=""))]
    fn suspend(&self, py: Python<'_>, image: &str, overwrite: bool, label: &str) -> Result<()> {
        let open = self.kept.alone_unviewed("suspend")?;
        let suspend = |sequence: Owned<Sequence>| {
            let sequence = sequence.into_inner();
            py.detach(|| sequence.suspend(image, overwrite, label).map_err(Box::new)).map_err(|back| {
                let (sequence, error) = *back;
                Box::new((Owned::new(sequence), error))
            })
        };
        Ok(open.consume(suspend)?)
    }

    /// Closes it; to close it twice is no error.
    fn close(&self, py: Python<'_>) -> Result<()> {
        self.kept.session.here("sequence")?;
        if self.closed() {
            return Ok(());
        }
        let open = self.kept.alone_unviewed("close")?;
        let sequence = open.take().into_inner();
        Ok(py.detach(|| sequence.close())?)
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    /// Views that are alive keep it open until they are gone.
    #[pyo3(signature = (*_error))]
    fn __exit__(&self, py: Python<'_>, _error: &Bound<'_, PyTuple>) -> Result<()> {
        self.kept.session.here("sequence")?;
        match self.kept.take_if_idle() {
            Some(sequence) => Ok(py.detach(|| sequence.close())?),
            None => Ok(()),
        }
    }
}

/// Writes tokens of one layer: `keys` `[tokens][KV heads][key_values]`, `values` likewise, or nothing of latents.
fn write_tokens(
    session: &Session,
    sequence: &Sequence,
    layer: usize,
    position: usize,
    (keys, values): (&[f32], &[f32]),
) -> Result<()> {
    let (layout, heads, row_bytes) = (session.layout, session.kv_heads(), session.row_bytes);
    let k = layout.key_values();
    let v = match layout {
        RowLayout::KeyValue { d, .. } => d,
        RowLayout::Latent { .. } => 0,
    };
    let tokens = keys.len() / (heads * k);
    let mut rows = vec![0; tokens * row_bytes];
    for head in 0..heads {
        for (token, row) in rows.chunks_exact_mut(row_bytes).enumerate() {
            let at = token * heads + head;
            layout.encode(&keys[at * k..][..k], &values[at * v..][..v], row);
        }
        sequence.write_rows(layer, head, position, &rows)?;
    }
    Ok(())
}

/// A time as Python has it.
pub(crate) fn seconds(value: f64) -> Result<Duration> {
    Duration::try_from_secs_f64(value)
        .map_err(|_| Wrong::argument(format!("a time of {value} s: 0 or more seconds are needed")))
}
