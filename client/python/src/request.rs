//! Requests: what is asked of a layer, and waiting for it.

use std::sync::{Arc, Mutex, PoisonError};

use kvoyant_client::{Hint, Member, Pending};
use pyo3::prelude::*;
use pyo3::types::PyTuple;

use crate::answer::{Answered, PyReady};
use crate::array::Array;
use crate::errors::{Result, Wrong};
use crate::owned::Owned;
use crate::sequence::{Kept, PySequence, Shared, seconds};
use crate::session::Session;

/// A request under way.
#[derive(Debug)]
pub(crate) struct Asked {
    session: Arc<Session>,
    members: Vec<Arc<Kept>>,
    layer: usize,
    pending: Mutex<Option<Owned<Pending>>>,
}

impl Asked {
    pub(crate) fn take(&self) -> Option<Owned<Pending>> {
        self.pending.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// A request under way: wait() for its answer, or give it up. Dropping it gives it up.
#[pyclass(frozen, module = "kvoyant", name = "Pending")]
#[derive(Debug)]
pub(crate) struct PyPending {
    asked: Arc<Asked>,
}

impl PyPending {
    pub(crate) fn new(
        session: &Arc<Session>,
        members: Vec<Arc<Kept>>,
        layer: usize,
        pending: Pending,
    ) -> Self {
        let pending = Mutex::new(Some(Owned::new(pending)));
        let asked = Arc::new(Asked { session: Arc::clone(session), members, layer, pending });
        session.keep_asked(&asked);
        Self { asked }
    }
}

#[pymethods]
impl PyPending {
    /// Waits for the answer, up to `timeout` seconds; other Python threads run meanwhile. Whatever this comes to, the request is over: an answer
    /// that does not come in time is given up.
    ///
    /// DeadlineError; GoneError soon after the daemon's end; NotReadyError, LostError or QuotaError with the daemon's reason.
    #[pyo3(signature = (timeout=30.0))]
    fn wait(&self, py: Python<'_>, timeout: f64) -> Result<PyReady> {
        self.asked.session.here("request")?;
        let timeout = seconds(timeout)?;
        let pending = self.asked.take().ok_or_else(|| Wrong::closed("request"))?.into_inner();
        let ready = py.detach(|| pending.wait(timeout))?;
        Ok(PyReady {
            answered: Answered::new(&self.asked.session, self.asked.members.clone(), self.asked.layer, ready),
        })
    }

    /// Gives it up: nobody waits for its answer.
    fn give_up(&self) -> Result<()> {
        self.asked.session.here("request")?;
        drop(self.asked.take());
        Ok(())
    }

    fn __enter__(slf: Bound<'_, Self>) -> Bound<'_, Self> {
        slf
    }

    #[pyo3(signature = (*_error))]
    fn __exit__(&self, _error: &Bound<'_, PyTuple>) -> Result<()> {
        self.give_up()
    }
}

/// The sequences of a call, all of one model and none of them twice.
pub(crate) fn members(session: &Arc<Session>, sequences: &[Bound<'_, PySequence>]) -> Result<Vec<Arc<Kept>>> {
    let mut kept: Vec<Arc<Kept>> = Vec::with_capacity(sequences.len());
    for (at, sequence) in sequences.iter().enumerate() {
        let one = &sequence.get().kept;
        if !Arc::ptr_eq(&one.session, session) {
            return Err(Wrong::argument(format!("sequence {at} of the call belongs to another model")));
        }
        if kept.iter().any(|other| Arc::ptr_eq(other, one)) {
            return Err(Wrong::argument(format!("sequence {at} of the call came before")));
        }
        kept.push(Arc::clone(one));
    }
    Ok(kept)
}

/// Positions of the tokens that are being computed: given, or behind what is appended.
pub(crate) fn positions(open: &[Shared<'_>], given: Option<Vec<usize>>) -> Result<Vec<usize>> {
    let Some(given) = given else {
        return Ok(open.iter().map(|open| open.get().tokens()).collect());
    };
    if given.len() != open.len() {
        return Err(Wrong::shape(format!(
            "positions: there are {}, where {} sequences are asked for",
            given.len(),
            open.len()
        )));
    }
    match given.iter().find(|position| u32::try_from(**position).is_err()) {
        Some(position) => {
            Err(Wrong::argument(format!("position {position}: a sequence has less than 2^32 tokens")))
        }
        None => Ok(given),
    }
}

/// What the members of a request are asked by.
#[derive(Debug)]
pub(crate) struct Hints<'py> {
    queries: Option<Array<'py>>,
    floors: Option<Array<'py>>,
    /// Words of each member.
    ids: Option<Vec<Vec<u32>>>,
    /// Query tokens of each member.
    pub(crate) block: usize,
}

impl<'py> Hints<'py> {
    pub(crate) fn of(
        session: &Session,
        members: usize,
        queries: Option<&Bound<'py, PyAny>>,
        floors: Option<&Bound<'py, PyAny>>,
        ids: Option<Vec<Vec<Vec<u32>>>>,
    ) -> PyResult<Self> {
        let (heads, width) = (session.query_heads(), session.spec.head_dim as usize);
        let queries = queries.map(|queries| Array::of(queries, "queries")).transpose()?;
        let floors = floors.map(|floors| Array::of(floors, "floors")).transpose()?;
        let mut block = 1;
        if let Some(queries) = &queries {
            if queries.shape().len() == 4 {
                block = queries.shape()[1];
            }
            queries.expect_shape(
                "members, query tokens if several, query heads, key_values",
                &[&[members, heads, width][..], &[members, block, heads, width]],
            )?;
        }
        if let Some(floors) = &floors {
            if queries.is_none() {
                return Err(Wrong::argument("floors come without queries").into());
            }
            floors.expect_shape(
                "members, query tokens if several, query heads",
                &[&[members, heads][usize::from(block > 1) * 2..], &[members, block, heads]],
            )?;
        }
        let ids = ids.map(|ids| words(session, members, ids)).transpose()?;
        if ids.is_some() && queries.is_some() {
            return Err(Wrong::argument("ids come with queries: a method selects by one or the other").into());
        }
        Ok(Self { queries, floors, ids, block })
    }

    /// Calls `ask` with the members, without Python: it may wait for other threads, which release the answers that it waits for. So arrays
    /// are copied before.
    pub(crate) fn with<T: Send>(
        &self,
        py: Python<'_>,
        open: &[Shared<'_>],
        positions: &[usize],
        ask: impl FnOnce(&[Member<'_>]) -> Result<T> + Send,
    ) -> Result<T> {
        let copied = |array: &Array<'_>| Ok::<Vec<f32>, Wrong>(array.floats()?.into_owned());
        let queries = self.queries.as_ref().map(copied).transpose()?;
        let floors = self.floors.as_ref().map(copied).transpose()?;
        let count = open.len().max(1);
        let part = |values: &'_ [f32], at: usize| {
            let width = values.len() / count;
            at * width..(at + 1) * width
        };
        let members: Vec<Member<'_>> = open
            .iter()
            .zip(positions)
            .enumerate()
            .map(|(at, (open, position))| {
                let hint = match (&queries, &floors, &self.ids) {
                    (Some(queries), Some(floors), _) => {
                        Hint::Beside { query: &queries[part(queries, at)], floors: &floors[part(floors, at)] }
                    }
                    (Some(queries), None, _) => Hint::Query(&queries[part(queries, at)]),
                    (None, _, Some(ids)) => Hint::Ids(&ids[at]),
                    (None, _, None) => Hint::None,
                };
                Member { sequence: open.get(), position: *position, hint }
            })
            .collect();
        py.detach(|| ask(&members))
    }
}

/// Tokens that the caller chose, in the form of the wire: for each KV head how many, then so many.
fn words(session: &Session, members: usize, ids: Vec<Vec<Vec<u32>>>) -> Result<Vec<Vec<u32>>> {
    if ids.len() != members {
        return Err(Wrong::shape(format!(
            "ids: there are lists of {} members, where {members} are asked for",
            ids.len()
        )));
    }
    ids.into_iter()
        .map(|heads| {
            if heads.len() != session.kv_heads() {
                return Err(Wrong::shape(format!(
                    "ids: there are lists of {} KV heads, where the model has {}",
                    heads.len(),
                    session.kv_heads()
                )));
            }
            Ok(heads
                .into_iter()
                .flat_map(|tokens| std::iter::once(tokens.len() as u32).chain(tokens))
                .collect())
        })
        .collect()
}
