//! Sequences that outlive the daemon, and prefixes that several begin with.

use std::ffi::c_char;
use std::sync::Arc;

use kvoyant_client::SelectedBy;

use crate::handles;
use crate::model::Session;
use crate::raw::{self, Out};
use crate::sequence::{Kept, keep};
use crate::status::{Wrong, call};
use crate::types::{KVOYANT_SAME_METHOD, kvoyant_model, kvoyant_sequence, kvoyant_status};

/// # Safety
/// If it is not null, a text.
unsafe fn image<'a>(image: *const c_char) -> Result<&'a str, Wrong> {
    // SAFETY: the caller's contract.
    let image = unsafe { raw::text(image, "image") }?;
    image.ok_or_else(|| Wrong::argument("image is null: a name is needed"))
}

/// Writes a sequence to an image that outlives the daemon, and closes it. `label` helps to tell it from others in lists, and may be null;
/// `overwrite` other than 0: it may take the place of another image of that name.
///
/// Errors: `IMAGE` if the daemon keeps none, has one of that name, or cannot write it. The sequence is still open then.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_sequence_suspend(
    sequence: kvoyant_sequence,
    image: *const c_char,
    overwrite: u32,
    label: *const c_char,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header, for both.
        let (image, label) = unsafe { (self::image(image)?, raw::text(label, "label")?) };
        let kept = handles::get::<Kept>(sequence.id)?;
        let label = label.unwrap_or_default();
        kept.alone()?.consume(|open| open.suspend(image, overwrite != 0, label).map_err(Box::new))?;
        handles::take::<Kept>(sequence.id).map(drop)
    })
}

/// Opens a sequence as an image has it; the image stays. `method` is an index into the registered methods, or `KVOYANT_SAME_METHOD`: that
/// of the image. `sequence` is all zero unless this succeeds.
///
/// Errors: `IMAGE` if there is none, or it is damaged, or of another model.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_resume(
    model: kvoyant_model,
    image: *const c_char,
    method: u32,
    sequence: *mut kvoyant_sequence,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header, for both.
        let (out, image) = unsafe { (Out::cleared(sequence, "sequence")?, self::image(image)?) };
        let session = handles::get::<Session>(model.id)?;
        let method = (method != KVOYANT_SAME_METHOD).then(|| session.method(method)).transpose()?;
        let (resumed, _) = session.model.resume(image, method, SelectedBy::Lane)?;
        out.set(keep(model.id, Arc::clone(&session), resumed)?);
        Ok(())
    })
}

/// Publishes the full pages of a sequence's first tokens, for other sequences of this user, or of every user if `shared` is not 0, to begin
/// with. `tokens` is `[count]`: the token ids that the sequence was made of. `attachable` is how many tokens can be attached to now; it may be
/// null.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_publish(
    sequence: kvoyant_sequence,
    tokens: *const u32,
    count: usize,
    shared: u32,
    attachable: *mut u64,
) -> kvoyant_status {
    call(|| {
        let kept = handles::get::<Kept>(sequence.id)?;
        // SAFETY: the contract of the header.
        let tokens = unsafe { raw::slice(tokens, count, "tokens") }?;
        let open = kept.shared()?;
        let published = kept.session.model.publish(open.get(), tokens, shared != 0)?;
        if !attachable.is_null() {
            // SAFETY: the contract of the header.
            unsafe { Out::new(attachable, "attachable") }?.set(published as u64);
        }
        Ok(())
    })
}

/// Opens a sequence that begins with the longest published prefix of these tokens, `[count]`; how long that is, `kvoyant_sequence_describe`
/// says. At least one token is left over, so that there is something to compute. `sequence` is all zero unless this succeeds.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn kvoyant_attach(
    model: kvoyant_model,
    method: u32,
    tokens: *const u32,
    count: usize,
    sequence: *mut kvoyant_sequence,
) -> kvoyant_status {
    call(|| {
        // SAFETY: the contract of the header, for both.
        let (out, tokens) =
            unsafe { (Out::cleared(sequence, "sequence")?, raw::slice(tokens, count, "tokens")?) };
        let session = handles::get::<Session>(model.id)?;
        let attached = session.model.attach(session.method(method)?, tokens, SelectedBy::Lane)?;
        out.set(keep(model.id, Arc::clone(&session), attached)?);
        Ok(())
    })
}
