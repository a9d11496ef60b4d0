//! Rows of sequences: written, appended, read where they lie; and what methods learn by.

use std::collections::HashSet;
use std::ffi::c_void;

use crate::handles;
use crate::model::Session;
use crate::raw::{self, Out};
use crate::sequence::{Kept, all_of, tokens};
use crate::status::{Wrong, call};
use crate::types::{kvoyant_model, kvoyant_run, kvoyant_sequence, kvoyant_status, kvoyant_tensor};

/// An array that has to be there.
///
/// # Safety
/// The contract of the header.
unsafe fn needed(tensor: *const kvoyant_tensor, what: &str) -> Result<kvoyant_tensor, Wrong> {
    // SAFETY: the caller's contract.
    let tensor = unsafe { raw::tensor(tensor, what) }?;
    tensor.ok_or_else(|| Wrong::argument(format!("{what}: there is no array, where one is needed")))
}

/// Writes keys and values of one layer from token `position` on, straight into the session's pages, in the format that the model stores.
/// They count once they are appended.
///
/// `keys` is `[KV heads, key_values]` of one token, or `[tokens, KV heads, key_values]`, after RoPE; `values` the same with `value_values`. F32,
/// F16 or BF16. Of latents, `values` is null. Errors: `SHAPE`, `DTYPE`, `NO_ROOM`: reserve first.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_write(
    sequence: kvoyant_sequence,
    layer: u32,
    position: u64,
    keys: *const kvoyant_tensor,
    values: *const kvoyant_tensor,
) -> kvoyant_status {
    call(|| {
        let kept = handles::get::<Kept>(sequence.id)?;
        let layer = kept.session.layer(layer)?;
        let position = tokens(position, "position")?;
        let (layout, latent) = (kept.session.model.layout(), kept.session.model.spec().latent_values > 0);
        let heads = kept.session.kv_heads();
        // SAFETY: the contract of the header, for both.
        let (keys, values) = unsafe { (needed(keys, "keys")?, raw::tensor(values, "values")?) };
        let count = raw::leading(&keys, 2);
        let expect = |tensor: &kvoyant_tensor, what, width: usize| {
            let one = [heads as u64, width as u64];
            let several = [count.unwrap_or(1), one[0], one[1]];
            let shapes = if count.is_some() { [&several[..]] } else { [&one[..]] };
            raw::expect_shape(tensor, (what, "tokens if several, KV heads, values of each"), &shapes)
        };
        let of_keys = expect(&keys, "keys", layout.key_values())?;
        // SAFETY: the contract of the header; the shape was checked.
        let key = unsafe { raw::as_floats(&keys, "keys", of_keys) }?;
        let value = match &values {
            Some(_) if latent => {
                return Err(Wrong::argument(
                    "values: there are none of a latent, of which they are a part; pass null",
                ));
            }
            None if latent => Default::default(),
            None => return Err(Wrong::argument("values: there is no array, where one is needed")),
            Some(values) => {
                let of_values = expect(values, "values", layout.value_values())?;
                // SAFETY: the contract of the header; the shape was checked.
                unsafe { raw::as_floats(values, "values", of_values) }?
            }
        };
        let open = kept.shared()?;
        let (each, width) =
            (heads * layout.key_values(), if latent { 0 } else { heads * layout.value_values() });
        for (at, key) in key.chunks_exact(each).enumerate() {
            open.get().write(layer, position + at, key, &value[at * width..(at + 1) * width])?;
        }
        Ok(())
    })
}

/// Writes rows of one layer and KV head from token `position` on, as they are stored: of keys and values each row is a key and then a value.
///
/// `rows` is `[tokens, values of a row]` in the model's own dtype; values of a row are `key_values + value_values`, of a latent
/// `key_values`. It has `tokens * row_bytes` bytes, whatever the dtype. Errors: `SHAPE`, `DTYPE`, `NO_ROOM`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_write_rows(
    sequence: kvoyant_sequence,
    layer: u32,
    kv_head: u32,
    position: u64,
    rows: *const kvoyant_tensor,
) -> kvoyant_status {
    call(|| {
        let kept = handles::get::<Kept>(sequence.id)?;
        let session = &kept.session;
        let (layer, kv_head) = (session.layer(layer)?, session.kv_head(kv_head)?);
        let position = tokens(position, "position")?;
        // SAFETY: the contract of the header.
        let rows = unsafe { needed(rows, "rows") }?;
        let spec = session.model.spec();
        let width = if spec.latent_values > 0 { spec.head_dim } else { 2 * spec.head_dim };
        let count = raw::leading(&rows, 1).unwrap_or(0);
        let dimensions = "tokens, values of a row";
        raw::expect_shape(&rows, ("rows", dimensions), &[&[count, width.into()]])?;
        raw::expect_dtype(&rows, "rows", spec.dtype.into())?;
        let bytes = tokens(count, "rows.shape[0]")?.checked_mul(session.row_bytes());
        let bytes = bytes.ok_or_else(|| Wrong::shape(format!("{count} rows do not fit into memory")))?;
        // SAFETY: the contract of the header; rows of this format have so many bytes.
        let rows = unsafe { raw::slice(rows.data.cast::<u8>(), bytes, "rows") }?;
        Ok(kept.shared()?.get().write_rows(layer, kv_head, position, rows)?)
    })
}

/// Says that the next rows of every layer have been written: `counts[i]` tokens of `sequences[i]`. All are of one model, and none comes twice.
///
/// Both are `[count]`. Errors: `NO_ROOM`; `CONCURRENT` if another thread is inside a call on one of them.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_append(
    model: kvoyant_model,
    sequences: *const kvoyant_sequence,
    counts: *const u64,
    count: usize,
) -> kvoyant_status {
    call(|| {
        let session = handles::get::<Session>(model.id)?;
        // SAFETY: the contract of the header, for both.
        let (sequences, counts) =
            unsafe { (raw::slice(sequences, count, "sequences")?, raw::slice(counts, count, "counts")?) };
        let mut seen = HashSet::with_capacity(count);
        if let Some(twice) = sequences.iter().position(|sequence| !seen.insert(sequence.id)) {
            return Err(Wrong::argument(format!(
                "sequence {twice} of the call came before; append all of its tokens at once"
            )));
        }
        let kept = all_of(model.id, sequences.iter().map(|sequence| sequence.id))?;
        let open = kept.iter().map(|kept| kept.alone()).collect::<Result<Vec<_>, _>>()?;
        let list = open.iter().zip(counts).map(|(open, count)| Ok((open.get(), tokens(*count, "a count")?)));
        Ok(session.model.append(&list.collect::<Result<Vec<_>, Wrong>>()?)?)
    })
}

/// Copies rows out of the session's own memory, as they are stored: `rows` is `[count]` rows, `bytes` must be `count * row_bytes`.
///
/// Errors: `NO_ROOM` where the sequence has no rows; `SPILLED` and `LOST` where they are not in host memory.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_read(
    sequence: kvoyant_sequence,
    layer: u32,
    kv_head: u32,
    first_token: u64,
    count: u64,
    rows: *mut c_void,
    bytes: usize,
) -> kvoyant_status {
    call(|| {
        let kept = handles::get::<Kept>(sequence.id)?;
        let (layer, kv_head) = (kept.session.layer(layer)?, kept.session.kv_head(kv_head)?);
        let (first, count) = (tokens(first_token, "first_token")?, tokens(count, "count")?);
        // Room for another number of bytes is an error of its own.
        // SAFETY: the contract of the header.
        let rows = unsafe { raw::slice_mut(rows.cast::<u8>(), bytes, "rows") }?;
        Ok(kept.shared()?.get().read_rows(layer, kv_head, first..first + count, rows)?)
    })
}

/// Where the rows of tokens lie in the session's own memory: sinks and window, dense and sliding layers, and everything when the daemon is
/// late. Rows that are not there, because a method has dropped them or they lie on disk, are in no run
/// (`kvoyant_sequence_take_missed`).
///
/// `runs` is room for `capacity` runs, in rising order of tokens; `found` is how many there are. Errors: `SHAPE` if they do not fit: a run for
/// each page, `count / page_rows + 2`, always does. The addresses are good until the sequence is truncated, suspended or closed, or reserved
/// after a fork, which moves what both share; where the model `spills`, those of rows beyond sinks and window only while an answer to
/// `KVOYANT_ASK_PAGES` is held.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_local_runs(
    sequence: kvoyant_sequence,
    layer: u32,
    kv_head: u32,
    first_token: u64,
    count: u64,
    runs: *mut kvoyant_run,
    capacity: usize,
    found: *mut usize,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header, for both.
        let (out, room) = unsafe { (Out::new(found, "found")?, raw::slice_mut(runs, capacity, "runs")?) };
        let kept = handles::get::<Kept>(sequence.id)?;
        let (layer, kv_head) = (kept.session.layer(layer)?, kept.session.kv_head(kv_head)?);
        let (first, count) = (tokens(first_token, "first_token")?, tokens(count, "count")?);
        let (page_rows, row_bytes) = (kept.session.model.page_rows(), kept.session.row_bytes());
        let open = kept.shared()?;
        let mut all: Vec<kvoyant_run> = Vec::new();
        let mut part = Vec::new();
        let (mut token, end) = (first, (first + count).min(open.get().room()));
        while token < end {
            // Of one page there is one run or none, so that its token is known.
            let next = end.min((token / page_rows + 1) * page_rows);
            part.clear();
            open.get().local_runs(layer, kv_head, token..next, &mut part);
            if let Some(run) = part.first() {
                let (rows, count) = (run.rows_ptr.cast::<c_void>(), run.rows as u32);
                let joins = all.last_mut().filter(|last| {
                    let end = last.rows.cast::<u8>().wrapping_add(last.count as usize * row_bytes);
                    last.token + u64::from(last.count) == token as u64 && end.cast() == rows
                });
                match joins {
                    Some(last) => last.count += count,
                    None => all.push(kvoyant_run { rows, token: token as u64, count, in_slab: 0 }),
                }
            }
            token = next;
        }
        out.set(all.len());
        let room_for = room.len();
        let room = room.get_mut(..all.len()).ok_or_else(|| {
            Wrong::shape(format!("there are {} runs, and runs has room for {room_for}", all.len()))
        })?;
        room.copy_from_slice(&all);
        Ok(())
    })
}

/// Whether rows were left out of local runs, since this was last asked, that are not gone for good: `missed` is 1 then. What was attended
/// without them is not what was asked for: ask for their layer's pages (`KVOYANT_ASK_PAGES`), and again.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_take_missed(
    sequence: kvoyant_sequence,
    missed: *mut u32,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header.
        let out = unsafe { Out::new(missed, "missed") }?;
        let kept = handles::get::<Kept>(sequence.id)?;
        out.set(kept.shared()?.get().take_missed().into());
        Ok(())
    })
}

/// Sends the statistics of a prompt's queries for one layer; methods say what they want there. `sums` is F32 `[KV heads, key_values]`.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_observe(
    sequence: kvoyant_sequence,
    layer: u32,
    sums: *const kvoyant_tensor,
) -> kvoyant_status {
    call(|| {
        let kept = handles::get::<Kept>(sequence.id)?;
        let layer = kept.session.layer(layer)?;
        // SAFETY: the contract of the header.
        let sums = unsafe { needed(sums, "sums") }?;
        let shape = [kept.session.kv_heads() as u64, u64::from(kept.session.model.spec().head_dim)];
        let values = raw::expect_shape(&sums, ("sums", "KV heads, key_values"), &[&shape])?;
        // SAFETY: the contract of the header; the shape was checked.
        let sums = unsafe { raw::floats(&sums, "sums", values) }?;
        Ok(kept.session.model.observe(kept.shared()?.get(), layer, sums)?)
    })
}

/// Sends an attention row of each KV head over the first `tokens` tokens: F32 `[KV heads, blocks]`, the largest weight of each block of
/// tokens and of the group's query heads, within 0 and 1. `full` other than 0: of attention over all tokens, and not only over those attended.
/// Errors: `SHAPE` of other blocks than the sequence's method asks for; `ARGUMENT` if that learns from no attention, of a layer that is
/// attended whole, and of a weight that is none.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_feedback(
    sequence: kvoyant_sequence,
    layer: u32,
    tokens: u64,
    full: u32,
    rows: *const kvoyant_tensor,
) -> kvoyant_status {
    call(|| {
        let kept = handles::get::<Kept>(sequence.id)?;
        let layer = kept.session.layer(layer)?;
        let tokens = self::tokens(tokens, "tokens")?;
        // SAFETY: the contract of the header.
        let rows = unsafe { needed(rows, "rows") }?;
        let blocks = if rows.dims == 2 { rows.shape[1] } else { 1 };
        let shape = [kept.session.kv_heads() as u64, blocks];
        let values = raw::expect_shape(&rows, ("rows", "KV heads, blocks"), &[&shape])?;
        // SAFETY: the contract of the header; the shape was checked.
        let rows = unsafe { raw::floats(&rows, "rows", values) }?;
        Ok(kept.session.model.feedback(kept.shared()?.get(), layer, tokens, full != 0, rows)?)
    })
}

/// Marks the text of tokens that have room and have not been appended yet: `marks` is `[count]` bytes, from `first_token` on: what ends after
/// each token. 0: nothing; 1: a word; 2: a part of a sentence, at a comma, colon, semicolon or bracket; 3: a sentence; 4: a line or a
/// paragraph. Errors: `NO_ROOM`; `SHAPE` of another mark, and of tokens that have been appended.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_mark(
    sequence: kvoyant_sequence,
    first_token: u64,
    marks: *const u8,
    count: usize,
) -> kvoyant_status {
    call(|| {
        let kept = handles::get::<Kept>(sequence.id)?;
        let first = tokens(first_token, "first_token")?;
        // SAFETY: the contract of the header.
        let marks = unsafe { raw::slice(marks, count, "marks") }?;
        Ok(kept.session.model.mark(kept.shared()?.get(), first, marks)?)
    })
}
