//! Answers: which rows, where they lie, what comes with them.

use std::sync::{Arc, Mutex, PoisonError};

use kvoyant_client::{Mode, Ready};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyTuple};

use crate::array;
use crate::errors::{Result, Wrong};
use crate::owned::Owned;
use crate::rows::{Keeper, Rows};
use crate::sequence::{Kept, View};
use crate::session::Session;

/// An answer, as long as somebody reads it.
#[derive(Debug)]
pub(crate) struct Held {
    ready: Owned<Ready>,
    members: Vec<Arc<Kept>>,
}

/// An answer, until it is released.
#[derive(Debug)]
pub(crate) struct Answered {
    session: Arc<Session>,
    layer: usize,
    held: Mutex<Option<Arc<Held>>>,
}

impl Answered {
    pub(crate) fn new(
        session: &Arc<Session>,
        members: Vec<Arc<Kept>>,
        layer: usize,
        ready: Ready,
    ) -> Arc<Self> {
        let held = Mutex::new(Some(Arc::new(Held { ready: Owned::new(ready), members })));
        let answered = Arc::new(Self { session: Arc::clone(session), layer, held });
        session.keep_answer(&answered);
        answered
    }

    fn held(&self) -> Result<Arc<Held>> {
        self.session.here("answer")?;
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        held.clone().ok_or_else(|| Wrong::closed("answer"))
    }

    pub(crate) fn release(&self) {
        drop(self.held.lock().unwrap_or_else(PoisonError::into_inner).take());
    }

    fn member(&self, held: &Held, member: usize) -> Result<usize> {
        if member < held.ready.members() {
            return Ok(member);
        }
        Err(Wrong::argument(format!("member {member} of an answer for {}", held.ready.members())))
    }
}

/// An answer that has come: for each member of the batch and KV head, the rows to attend to. It holds one of the session's ring_slots until it
/// is released: by release(), `with`, or when neither it nor any view of its rows is referred to.
#[pyclass(frozen, module = "kvoyant", name = "Ready")]
#[derive(Debug)]
pub(crate) struct PyReady {
    pub(crate) answered: Arc<Answered>,
}

/// Ordinal of the GPU that a device's name says, such as that of `cuda:1`.
fn ordinal(device: &str) -> i32 {
    let digits = device.strip_prefix("cuda:").unwrap_or_default();
    digits.split(|c: char| !c.is_ascii_digit()).next().and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

#[pymethods]
impl PyReady {
    fn __repr__(&self) -> String {
        match self.answered.held() {
            Ok(held) => format!(
                "<kvoyant.Ready, layer {}, {} members, {} rows>",
                self.answered.layer,
                held.ready.members(),
                held.ready.completion().rows_selected
            ),
            Err(_) => "<kvoyant.Ready, released>".into(),
        }
    }

    /// The layer.
    #[getter]
    fn layer(&self) -> usize {
        self.answered.layer
    }

    /// Members of the batch.
    #[getter]
    fn members(&self) -> Result<usize> {
        Ok(self.answered.held()?.ready.members())
    }

    /// What the daemon says of it: ticket, rows_selected, rows_hit, rows_in_place, rows_resident, bytes_moved, queue_ns, select_ns, transfer_ns, boot_id, and
    /// generation: how many daemons had served the session before the one that answered. Where that differs from an earlier answer's, the
    /// daemon was restarted or replaced in between.
    fn describe<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let held = self.answered.held()?;
        let completion = held.ready.completion();
        let said = PyDict::new(py);
        said.set_item("ticket", completion.ticket)?;
        said.set_item("rows_selected", completion.rows_selected)?;
        said.set_item("rows_hit", completion.rows_hit)?;
        said.set_item("rows_in_place", completion.rows_in_place)?;
        said.set_item("rows_resident", completion.rows_resident)?;
        said.set_item("bytes_moved", completion.bytes_moved)?;
        said.set_item("queue_ns", completion.queue_ns)?;
        said.set_item("select_ns", completion.select_ns)?;
        said.set_item("transfer_ns", completion.transfer_ns)?;
        said.set_item("boot_id", completion.boot_id)?;
        said.set_item("generation", completion.generation)?;
        Ok(said)
    }

    /// The tokens of one member's KV head, in rising order: a list of (first token, how many).
    fn tokens(&self, member: usize, kv_head: usize) -> Result<Vec<(usize, usize)>> {
        let held = self.answered.held()?;
        let (member, kv_head) =
            (self.answered.member(&held, member)?, self.answered.session.kv_head(kv_head)?);
        Ok(held.ready.tokens(member, kv_head).map(|run| (run.token, run.rows)).collect())
    }

    /// Views of the rows of one member's KV head where they lie: a list of Rows, by token. They hold the answer; those in the session's own
    /// memory also keep the sequence from being changed.
    fn rows(&self, member: usize, kv_head: usize) -> Result<Vec<Rows>> {
        let held = self.answered.held()?;
        let session = &self.answered.session;
        let (member, kv_head) = (self.answered.member(&held, member)?, session.kv_head(kv_head)?);
        let (addresses, device) = if session.mode == Mode::Device {
            let mut runs = Vec::new();
            held.ready.device_runs(member, kv_head, &mut runs)?;
            let addresses: Vec<u64> = runs.iter().map(|(address, _)| *address).collect();
            (addresses, Some(ordinal(&session.device)))
        } else {
            let mut runs = Vec::new();
            held.ready.runs(member, kv_head, &mut runs)?;
            (runs.iter().map(|run| run.rows_ptr.addr() as u64).collect(), None)
        };
        let blocks = held.ready.tokens(member, kv_head).zip(addresses);
        Ok(blocks
            .map(|(run, address)| {
                let view = held.members.get(member).filter(|_| !run.in_slab).map(View::of);
                Rows {
                    keeper: Arc::new(Keeper::Answer(Arc::clone(&held), view)),
                    address,
                    layout: session.layout,
                    device,
                    token: run.token,
                    count: run.rows,
                    in_slab: run.in_slab,
                }
            })
            .collect())
    }

    /// Copies the rows of one member's KV head out, by token: keys float32 `[rows, key_values]` and values float32 `[rows, value_values]`.
    /// Works wherever they lie, in whatever format.
    fn read<'py>(
        &self,
        py: Python<'py>,
        member: usize,
        kv_head: usize,
    ) -> PyResult<(Bound<'py, PyAny>, Bound<'py, PyAny>)> {
        let held = self.answered.held()?;
        let session = &self.answered.session;
        let (member, kv_head) = (self.answered.member(&held, member)?, session.kv_head(kv_head)?);
        let mut rows = Vec::new();
        held.ready.copy_rows(member, kv_head, &mut rows).map_err(Wrong::from)?;
        let count = rows.len() / session.row_bytes.max(1);
        let (k, v) = (session.layout.key_values(), session.layout.value_values());
        let (mut keys, mut values) = (vec![0.0; count * k], vec![0.0; count * v]);
        session.layout.decode_keys(&rows, &mut keys);
        session.layout.decode_values(&rows, &mut values);
        Ok((array::floats(py, &[count, k], &keys)?, array::floats(py, &[count, v], &values)?))
    }

    /// What the daemon's CPU has attended for a member, or None: (out float32 `[query heads, value_values]`, lse float32 `[query heads]`,
    /// rows). The softmax over those rows alone, which are in none of rows(): merge it by lse.
    fn partial<'py>(&self, py: Python<'py>, member: usize) -> PyResult<Option<Bound<'py, PyAny>>> {
        let held = self.answered.held()?;
        let session = &self.answered.session;
        let member = self.answered.member(&held, member)?;
        let Some(partial) = held.ready.partial(member) else { return Ok(None) };
        let heads = session.query_heads();
        let out = array::floats(py, &[heads, session.layout.value_values()], partial.out)?;
        let lse = array::floats(py, &[heads], partial.lse)?;
        Ok(Some((out, lse, partial.rows).into_pyobject(py)?.into_any()))
    }

    /// What is known of the rows that were left out for a member, or None: a dict of float32 `[query heads]` max, weight, upper, lower,
    /// scatter, spread and uint32 rows, and means float32 `[query heads, value_values]`. Weights are relative to exp(max); the mean is to be
    /// merged with log-sum-exp max + log(weight).
    fn rest<'py>(&self, py: Python<'py>, member: usize) -> PyResult<Option<Bound<'py, PyDict>>> {
        let held = self.answered.held()?;
        let session = &self.answered.session;
        let member = self.answered.member(&held, member)?;
        let Some(rest) = held.ready.rest(member) else { return Ok(None) };
        let (heads, width) = (session.query_heads(), session.layout.value_values());
        let sums: Vec<_> = rest.sums().collect();
        let found = PyDict::new(py);
        let add = |name: &str, of: fn(&kvoyant_kernels::RestSums) -> f32| {
            let values: Vec<f32> = sums.iter().map(of).collect();
            found.set_item(name, array::floats(py, &[heads], &values)?)
        };
        add("max", |sums| sums.max)?;
        add("weight", |sums| sums.weight)?;
        add("upper", |sums| sums.upper)?;
        add("lower", |sums| sums.lower)?;
        add("scatter", |sums| sums.scatter)?;
        add("spread", |sums| sums.spread)?;
        let rows: Vec<u8> = sums.iter().flat_map(|sums| sums.rows.to_ne_bytes()).collect();
        found.set_item("rows", array::numpy(py, "uint32", &[heads], &rows)?)?;
        let mut means = vec![0.0; heads * width];
        for (head, mean) in means.chunks_exact_mut(width).enumerate() {
            rest.mean(head, mean);
        }
        found.set_item("means", array::floats(py, &[heads, width], &means)?)?;
        Ok(Some(found))
    }

    /// Releases it; to release it twice is no error. Its slot is free once no view of its rows is alive.
    fn release(&self) -> Result<()> {
        self.answered.session.here("answer")?;
        self.answered.release();
        Ok(())
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, _error: &Bound<'_, PyTuple>) -> Result<()> {
        self.release()
    }
}
