//! Sequences: opened, forked, cut, closed. Rows are in `rows`.

use std::sync::Arc;

use kvoyant_client::handed_out::{Alone, HandedOut, NotThere, Shared};
use kvoyant_client::{SelectedBy, Sequence};

use crate::handles::{self, Object};
use crate::model::Session;
use crate::raw::{self, Out};
use crate::status::{Wrong, call};
use crate::types::{
    KVOYANT_NO_TOKEN, KVOYANT_SAME_METHOD, kvoyant_model, kvoyant_sequence, kvoyant_sequence_info,
    kvoyant_status,
};

/// A sequence, and the model that it belongs to. Calls that change its length want it for themselves; all others share it. Nobody waits for
/// that: two threads that meet here have a defect, and one of them is told.
#[derive(Debug)]
pub(crate) struct Kept {
    /// Handle of the model.
    pub(crate) model: u64,
    pub(crate) session: Arc<Session>,
    sequence: HandedOut<Sequence>,
}

impl Kept {
    /// For calls that leave its length as it is.
    pub(crate) fn shared(&self) -> Result<Shared<'_, Sequence>, Wrong> {
        self.sequence.shared().map_err(wrong)
    }

    /// For calls that change it.
    pub(crate) fn alone(&self) -> Result<Alone<'_, Sequence>, Wrong> {
        self.sequence.alone().map_err(wrong)
    }

    /// The sequence itself, if no other thread is inside a call on it.
    pub(crate) fn take_if_idle(&self) -> Option<Sequence> {
        self.sequence.alone().ok().map(Alone::take)
    }
}

fn wrong(why: NotThere) -> Wrong {
    let how = match why {
        NotThere::Closed => {
            return Wrong::new(kvoyant_status::Handle, "the sequence was closed by another thread");
        }
        NotThere::Changed => "changed",
        NotThere::Used => "used",
    };
    Wrong::new(
        kvoyant_status::Concurrent,
        format!(
            "the sequence is being {how} by another thread: appending, truncating, forking, suspending and closing a sequence want it \
             for themselves"
        ),
    )
}

/// Gives a sequence its handle.
pub(crate) fn keep(model: u64, session: Arc<Session>, sequence: Sequence) -> Result<kvoyant_sequence, Wrong> {
    let kept = Kept { model, session, sequence: HandedOut::new(sequence) };
    Ok(kvoyant_sequence { id: handles::add(Object::Sequence(Arc::new(kept)))? })
}

/// The kept sequences of handles that must all be of one model.
pub(crate) fn all_of(model: u64, handles: impl Iterator<Item = u64>) -> Result<Vec<Arc<Kept>>, Wrong> {
    handles
        .enumerate()
        .map(|(at, handle)| {
            let kept = handles::get::<Kept>(handle)?;
            if kept.model == model {
                return Ok(kept);
            }
            Err(Wrong::argument(format!("sequence {at} of the call belongs to another model")))
        })
        .collect()
}

/// Tokens as the client counts them.
pub(crate) fn tokens(tokens: u64, what: &str) -> Result<usize, Wrong> {
    // Positions are 32 bits on the wire.
    if tokens <= u64::from(u32::MAX) {
        return Ok(tokens as usize);
    }
    Err(Wrong::argument(format!("{what} is {tokens}; a sequence has less than 2^32 tokens")))
}

/// Opens an empty sequence with room for so many tokens. `method` is an index into the registered methods. `sequence` is all zero unless
/// this succeeds.
///
/// Errors: `BACKPRESSURE` with what is needed, what is free, and what would free enough; `QUOTA`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_open(
    model: kvoyant_model,
    method: u32,
    tokens: u64,
    sequence: *mut kvoyant_sequence,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header.
        let out = unsafe { Out::cleared(sequence, "sequence") }?;
        let session = handles::get::<Session>(model.id)?;
        let tokens = self::tokens(tokens, "tokens")?;
        let opened = session.model.open(session.method(method)?, tokens)?;
        out.set(keep(model.id, session, opened)?);
        Ok(())
    })
}

/// Opens a copy of a sequence, with another method or, by `KVOYANT_SAME_METHOD`, its own. Pages are shared until one of the two writes, so
/// both must reserve before they do. `copy` is all zero unless this succeeds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_fork(
    sequence: kvoyant_sequence,
    method: u32,
    copy: *mut kvoyant_sequence,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header.
        let out = unsafe { Out::cleared(copy, "copy") }?;
        let kept = handles::get::<Kept>(sequence.id)?;
        let method = (method != KVOYANT_SAME_METHOD).then(|| kept.session.method(method)).transpose()?;
        let forked = kept.alone()?.get().fork_selected_by(method, SelectedBy::Lane)?;
        out.set(keep(kept.model, Arc::clone(&kept.session), forked)?);
        Ok(())
    })
}

/// Gives sequences of one model room for so many tokens each, in one call: all of them or none (of more than 1024, so many at a time). Room never shrinks by this.
///
/// `sequences` and `tokens` are `[count]`. Errors: `BACKPRESSURE`, `QUOTA`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_reserve(
    model: kvoyant_model,
    sequences: *const kvoyant_sequence,
    tokens: *const u64,
    count: usize,
) -> kvoyant_status {
    call(|| {
        let session = handles::get::<Session>(model.id)?;
        // SAFETY: the contract of the header, for both.
        let (sequences, counts) =
            unsafe { (raw::slice(sequences, count, "sequences")?, raw::slice(tokens, count, "tokens")?) };
        let kept = all_of(model.id, sequences.iter().map(|sequence| sequence.id))?;
        let open = kept.iter().map(|kept| kept.shared()).collect::<Result<Vec<_>, _>>()?;
        let list =
            open.iter().zip(counts).map(|(open, count)| Ok((open.get(), self::tokens(*count, "tokens")?)));
        Ok(session.model.reserve(&list.collect::<Result<Vec<_>, Wrong>>()?)?)
    })
}

/// How a sequence stands. Set `info->size` before.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_describe(
    sequence: kvoyant_sequence,
    info: *mut kvoyant_sequence_info,
) -> kvoyant_status {
    call(|| {
        let kept = handles::get::<Kept>(sequence.id)?;
        let open = kept.shared()?;
        let sequence = open.get();
        let described = kvoyant_sequence_info {
            size: 0,
            tokens: sequence.tokens() as u64,
            room: sequence.room() as u64,
            first_lost: sequence.first_lost().map_or(KVOYANT_NO_TOKEN, |token| token as u64),
        };
        // SAFETY: the contract of the header.
        unsafe { raw::fill(info, described) }
    })
}

/// Drops every row from token `tokens` on: rejected drafts, or rows that are lost. Runs that point there are not to be read any more. The
/// sequence has room for `tokens` afterwards: reserve before more are written.
#[unsafe(no_mangle)]
pub extern "C" fn kvoyant_sequence_truncate(sequence: kvoyant_sequence, tokens: u64) -> kvoyant_status {
    call(|| {
        let kept = handles::get::<Kept>(sequence.id)?;
        let open = kept.alone()?;
        Ok(open.get().truncate(self::tokens(tokens, "tokens")?)?)
    })
}

/// Closes a sequence: its handle is stale from then on, whether this succeeds or not, unless it says `CONCURRENT`. Answers that name its
/// rows are to be released before.
#[unsafe(no_mangle)]
pub extern "C" fn kvoyant_sequence_close(sequence: kvoyant_sequence) -> kvoyant_status {
    call(|| {
        let kept = handles::get::<Kept>(sequence.id)?;
        let open = kept.alone()?;
        handles::take::<Kept>(sequence.id)?;
        Ok(open.take().close()?)
    })
}
