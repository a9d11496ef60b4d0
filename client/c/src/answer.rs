//! Answers: the block table, where rows lie, what comes with them.

use std::ffi::c_void;
use std::sync::Arc;

use kvoyant_client::Ready;

use crate::handles;
use crate::model::Session;
use crate::raw::{self, Out};
use crate::status::{Wrong, call};
use crate::types::{
    kvoyant_answer, kvoyant_partial, kvoyant_ready, kvoyant_rest, kvoyant_run, kvoyant_status, kvoyant_table,
};

/// An answer, with its block table as a C program reads it.
#[derive(Debug)]
pub(crate) struct Answered {
    /// Handle of the model.
    pub(crate) model: u64,
    session: Arc<Session>,
    ready: Ready,
    runs: Vec<kvoyant_run>,
    /// `[members][KV heads]` and one more.
    offsets: Vec<usize>,
}

// SAFETY: the addresses in `runs` are of mappings that live as long as `ready`, are read by whoever holds the answer, and are followed by
// nothing here; everything else is Send and Sync by itself.
unsafe impl Send for Answered {}
// SAFETY: as above; nothing in it changes.
unsafe impl Sync for Answered {}

impl Answered {
    pub(crate) fn new(model: u64, session: Arc<Session>, ready: Ready) -> Result<Self, Wrong> {
        let (members, heads) = (ready.members(), session.kv_heads());
        let mut offsets = Vec::with_capacity(members * heads + 1);
        offsets.push(0);
        let (mut runs, mut addresses) = (Vec::new(), Vec::new());
        let (mut here, mut on_device) = (Vec::new(), Vec::new());
        for (member, head) in (0..members).flat_map(|member| (0..heads).map(move |head| (member, head))) {
            addresses.clear();
            if session.on_device() {
                on_device.clear();
                ready.device_runs(member, head, &mut on_device)?;
                let address = |(address, _): &(u64, u32)| std::ptr::without_provenance(*address as usize);
                addresses.extend(on_device.iter().map(address));
            } else {
                here.clear();
                ready.runs(member, head, &mut here)?;
                addresses.extend(here.iter().map(|run| run.rows_ptr.cast::<c_void>()));
            }
            let blocks = ready.tokens(member, head).zip(&addresses);
            runs.extend(blocks.map(|(run, rows)| kvoyant_run {
                rows: *rows,
                token: run.token as u64,
                count: run.rows as u32,
                in_slab: run.in_slab.into(),
            }));
            offsets.push(runs.len());
        }
        Ok(Self { model, session, ready, runs, offsets })
    }

    fn member(&self, member: u32) -> Result<usize, Wrong> {
        if (member as usize) < self.ready.members() {
            return Ok(member as usize);
        }
        Err(Wrong::argument(format!("member {member} of an answer for {}", self.ready.members())))
    }
}

/// The block table: for each member and KV head, where the rows lie that are to be attended. Set `table->size` before. What it points to
/// stays until the answer is released; rows may change once their sequence is truncated or closed.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_ready_table(
    ready: kvoyant_ready,
    table: *mut kvoyant_table,
) -> kvoyant_status {
    call(|| {
        let answered = handles::get::<Answered>(ready.id)?;
        let described = kvoyant_table {
            size: 0,
            runs: answered.runs.as_ptr(),
            runs_count: answered.runs.len(),
            offsets: answered.offsets.as_ptr(),
            members: answered.ready.members() as u32,
            kv_heads: answered.session.kv_heads() as u32,
            row_bytes: answered.session.row_bytes() as u64,
        };
        // SAFETY: the contract of the header.
        unsafe { raw::fill(table, described) }
    })
}

/// Copies the rows of one member's KV head out, by token, as they are stored: `[rows]` rows of `row_bytes`. `written` is how many bytes that
/// is; with `bytes` 0 that alone is said. Works wherever rows lie.
///
/// Errors: `SHAPE` if they do not fit into `bytes`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_ready_copy(
    ready: kvoyant_ready,
    member: u32,
    kv_head: u32,
    rows: *mut c_void,
    bytes: usize,
    written: *mut usize,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header.
        let out = unsafe { Out::new(written, "written") }?;
        let answered = handles::get::<Answered>(ready.id)?;
        let (member, kv_head) = (answered.member(member)?, answered.session.kv_head(kv_head)?);
        let wanted = answered.ready.rows(member, kv_head) * answered.session.row_bytes();
        out.set(wanted);
        if bytes == 0 {
            return Ok(());
        }
        if bytes < wanted {
            return Err(Wrong::shape(format!("the rows have {wanted} bytes, and there is room for {bytes}")));
        }
        // SAFETY: the contract of the header.
        let room = unsafe { raw::slice_mut(rows.cast::<u8>(), bytes, "rows") }?;
        let mut copied = Vec::with_capacity(wanted);
        answered.ready.copy_rows(member, kv_head, &mut copied)?;
        let room = room.get_mut(..copied.len());
        room.ok_or_else(|| Wrong::shape("an answer has more rows than it said"))?.copy_from_slice(&copied);
        Ok(())
    })
}

/// What the daemon says of an answer. Set `answer->size` before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_ready_describe(
    ready: kvoyant_ready,
    answer: *mut kvoyant_answer,
) -> kvoyant_status {
    call(|| {
        let answered = handles::get::<Answered>(ready.id)?;
        let completion = answered.ready.completion();
        let described = kvoyant_answer {
            size: 0,
            ticket: completion.ticket,
            layer: completion.layer.into(),
            members: completion.batch,
            rows_selected: completion.rows_selected,
            rows_hit: completion.rows_hit,
            rows_in_place: completion.rows_in_place,
            rows_resident: completion.rows_resident,
            bytes_moved: completion.bytes_moved,
            queue_ns: completion.queue_ns.into(),
            select_ns: completion.select_ns.into(),
            transfer_ns: completion.transfer_ns.into(),
            boot_id: completion.boot_id,
            generation: completion.generation.into(),
        };
        // SAFETY: the contract of the header.
        unsafe { raw::fill(answer, described) }
    })
}

/// What the daemon's CPU has attended for a member; `partial->rows` is 0 if nothing. Set `partial->size` before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_ready_partial(
    ready: kvoyant_ready,
    member: u32,
    partial: *mut kvoyant_partial,
) -> kvoyant_status {
    call(|| {
        let answered = handles::get::<Answered>(ready.id)?;
        let member = answered.member(member)?;
        let mut described =
            kvoyant_partial { size: 0, rows: 0, out: std::ptr::null(), lse: std::ptr::null() };
        if let Some(partial) = answered.ready.partial(member) {
            described.rows = partial.rows.into();
            (described.out, described.lse) = (partial.out.as_ptr(), partial.lse.as_ptr());
        }
        // SAFETY: the contract of the header.
        unsafe { raw::fill(partial, described) }
    })
}

/// What is known of the rows that were left out for a member, if its method estimates them: `known` is 1 then, else 0 and nothing is
/// written.
///
/// `sums` is `[query heads]`; `means` is `[query heads, value_values]`, the estimated mean value of what each query head left out; either may
/// be null, which is not written. Errors: `SHAPE` if `heads` is not the model's query heads.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_ready_rest(
    ready: kvoyant_ready,
    member: u32,
    heads: u32,
    sums: *mut kvoyant_rest,
    means: *mut f32,
    known: *mut u32,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header.
        let out = unsafe { Out::new(known, "known") }?;
        let answered = handles::get::<Answered>(ready.id)?;
        let member = answered.member(member)?;
        let (query_heads, width) =
            (answered.session.query_heads(), answered.session.model.layout().value_values());
        if heads as usize != query_heads {
            return Err(Wrong::shape(format!(
                "there is room for {heads} query heads, and the model has {query_heads}"
            )));
        }
        let rest = answered.ready.rest(member);
        out.set(rest.is_some().into());
        let Some(rest) = rest else { return Ok(()) };
        if !sums.is_null() {
            // SAFETY: the contract of the header.
            let sums = unsafe { raw::slice_mut(sums, query_heads, "sums") }?;
            for (into, head) in sums.iter_mut().zip(rest.sums()) {
                *into = kvoyant_rest {
                    max: head.max,
                    weight: head.weight,
                    upper: head.upper,
                    lower: head.lower,
                    scatter: head.scatter,
                    spread: head.spread,
                    rows: head.rows,
                    reserved: 0,
                };
            }
        }
        if !means.is_null() {
            // SAFETY: the contract of the header.
            let means = unsafe { raw::slice_mut(means, query_heads * width, "means") }?;
            for (head, mean) in means.chunks_exact_mut(width).enumerate() {
                rest.mean(head, mean);
            }
        }
        Ok(())
    })
}

/// Releases an answer: its slots may be used for others, and what it pointed to is not to be read any more.
#[unsafe(no_mangle)]
pub extern "C" fn kvoyant_ready_release(ready: kvoyant_ready) -> kvoyant_status {
    call(|| handles::take::<Answered>(ready.id).map(drop))
}
