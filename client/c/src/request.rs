//! Requests: what is asked of a layer, and waiting for it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use kvoyant_client::{Hint, Member, Pending};

use crate::answer::Answered;
use crate::handles::{self, Object};
use crate::model::Session;
use crate::raw::{self, Out};
use crate::sequence::{all_of, tokens};
use crate::status::{Wrong, call};
use crate::types::{
    kvoyant_ask, kvoyant_member, kvoyant_model, kvoyant_pending, kvoyant_ready, kvoyant_request,
    kvoyant_status,
};

/// A request under way.
#[derive(Debug)]
pub(crate) struct Asked {
    /// Handle of the model.
    pub(crate) model: u64,
    session: Arc<Session>,
    pending: Mutex<Option<Pending>>,
}

impl Asked {
    fn take(&self) -> Result<Pending, Wrong> {
        let pending = self.pending.lock().unwrap_or_else(PoisonError::into_inner).take();
        pending.ok_or_else(|| {
            Wrong::new(
                kvoyant_status::Handle,
                "the request is being waited for by another thread, or was given up by one",
            )
        })
    }
}

/// What a member's method selects by.
///
/// # Safety
/// The contract of `kvoyant_speculate`.
unsafe fn hint<'a>(
    session: &Session,
    member: &kvoyant_member,
    (at, queries): (usize, u32),
) -> Result<Hint<'a>, Wrong> {
    let name = |field: &str| format!("members[{at}].{field}");
    if member.ids_count > 0 {
        if !raw::is_none(&member.query) || !raw::is_none(&member.floors) {
            return Err(Wrong::argument(format!(
                "{} come with a query: a method selects by one or the other",
                name("ids")
            )));
        }
        // SAFETY: the caller's contract.
        return Ok(Hint::Ids(unsafe { raw::slice(member.ids, member.ids_count, &name("ids")) }?));
    }
    let (heads, width) = (session.query_heads() as u64, u64::from(session.model.spec().head_dim));
    let block = [u64::from(queries), heads, width];
    // Of one query token its dimension may be left out.
    let first = usize::from(queries == 1);
    if raw::is_none(&member.query) {
        if !raw::is_none(&member.floors) {
            return Err(Wrong::argument(format!("{} come without a query", name("floors"))));
        }
        return Ok(Hint::None);
    }
    let what = name("query");
    let of = ("queries of a block, query heads, key_values", "queries of a block, query heads");
    let values = raw::expect_shape(&member.query, (&what, of.0), &[&block[first..], &block])?;
    // SAFETY: the caller's contract; the shape was checked.
    let query = unsafe { raw::floats(&member.query, &what, values) }?;
    if raw::is_none(&member.floors) {
        return Ok(Hint::Query(query));
    }
    let what = name("floors");
    let values = raw::expect_shape(&member.floors, (&what, of.1), &[&block[first..2], &block[..2]])?;
    // SAFETY: the caller's contract; the shape was checked.
    let floors = unsafe { raw::floats(&member.floors, &what, values) }?;
    Ok(Hint::Beside { query, floors })
}

/// Asks for a layer of a whole batch, while an earlier layer runs. What is pointed to is copied before this returns. `pending` is all zero
/// unless it succeeds; it ends with `kvoyant_wait` or `kvoyant_give_up`.
///
/// Errors: `SHAPE`, `DTYPE`; `ARGUMENT` of a layer that is attended whole (`dense_layers`, `sliding_layers`), and of a member without what
/// its method selects by; `BUSY` if as many answers are held or under way as the session has `ring_slots`. Nothing has been asked then, and
/// the session goes on.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_speculate(
    model: kvoyant_model,
    request: *const kvoyant_request,
    pending: *mut kvoyant_pending,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header, for all three.
        let (out, request) = unsafe { (Out::cleared(pending, "pending")?, raw::read(request)?) };
        let session = handles::get::<Session>(model.id)?;
        // SAFETY: the contract of the header.
        let given = unsafe { raw::slice(request.members, request.members_count, "request.members") }?;
        let layer = session.layer(request.layer)?;
        let queries = request.queries.max(1);
        let kept = all_of(model.id, given.iter().map(|member| member.sequence.id))?;
        let open = kept.iter().map(|kept| kept.shared()).collect::<Result<Vec<_>, _>>()?;
        let mut members = Vec::with_capacity(given.len());
        for (at, (open, member)) in open.iter().zip(given).enumerate() {
            // SAFETY: the contract of the header.
            let hint = unsafe { hint(&session, member, (at, queries)) }?;
            let position = tokens(member.position, "a member's position")?;
            members.push(Member { sequence: open.get(), position, hint });
        }
        let rows = request.ask == kvoyant_ask::Rows as u32;
        if (queries > 1 || request.within_ns > 0) && !rows || queries > 1 && request.within_ns > 0 {
            return Err(Wrong::argument(
                "request.queries and request.within_ns are for rows, and only one of them at a time: leave the other 0",
            ));
        }
        let serve = &session.model;
        let asked = match request.ask {
            ask if ask == kvoyant_ask::Rest as u32 => serve.rest(layer, &members)?,
            ask if ask == kvoyant_ask::Pages as u32 => {
                let list: Vec<_> = members.iter().map(|member| (member.sequence, member.position)).collect();
                serve.fetch(layer, &list)?
            }
            _ if !rows => {
                return Err(Wrong::argument(format!(
                    "request.ask is {}; it is 0 to 2 (kvoyant_ask)",
                    request.ask
                )));
            }
            _ if request.within_ns > 0 => {
                serve.speculate_within(layer, &members, Duration::from_nanos(request.within_ns))?
            }
            _ => serve.speculate_block(layer, &members, queries as usize)?,
        };
        let pending = Mutex::new(Some(asked));
        let asked = Asked { model: model.id, session: Arc::clone(&session), pending };
        out.set(kvoyant_pending { id: handles::add(Object::Pending(Arc::new(asked)))? });
        Ok(())
    })
}

/// Waits for an answer. Whatever this returns, the request is over and its handle stale: an answer that does not come within `timeout_ns`
/// nanoseconds is given up, so that the caller goes on without it, or asks again. `ready` is all zero unless this succeeds; release it with
/// `kvoyant_ready_release`.
///
/// Errors: `DEADLINE`; `GONE` within 50 ms or so of the daemon's end; `NOT_READY`, `LOST` or `QUOTA` with the daemon's reason.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_wait(
    pending: kvoyant_pending,
    timeout_ns: u64,
    ready: *mut kvoyant_ready,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header.
        let out = unsafe { Out::cleared(ready, "ready") }?;
        let asked = handles::take::<Asked>(pending.id)?;
        let ready = asked.take()?.wait(Duration::from_nanos(timeout_ns))?;
        let answered = Answered::new(asked.model, Arc::clone(&asked.session), ready)?;
        out.set(kvoyant_ready { id: handles::add(Object::Ready(Arc::new(answered)))? });
        Ok(())
    })
}

/// Gives a request up: nobody waits for its answer.
#[unsafe(no_mangle)]
pub extern "C" fn kvoyant_give_up(pending: kvoyant_pending) -> kvoyant_status {
    call(|| handles::take::<Asked>(pending.id).map(drop))
}
