//! How calls end: a code for the caller's program, a sentence for its user.

use std::cell::RefCell;
use std::ffi::{CString, c_char};
use std::panic::{AssertUnwindSafe, catch_unwind};

use kvoyant_client::{Error, Kind};

use crate::types::kvoyant_status;

thread_local! {
    static LAST: RefCell<CString> = RefCell::default();
}

/// An error on its way to the caller.
#[derive(Debug)]
pub(crate) struct Wrong {
    status: kvoyant_status,
    text: String,
}

impl Wrong {
    pub(crate) fn new(status: kvoyant_status, text: impl Into<String>) -> Self {
        Self { status, text: text.into() }
    }

    pub(crate) fn argument(text: impl Into<String>) -> Self {
        Self::new(kvoyant_status::Argument, text)
    }

    pub(crate) fn shape(text: impl Into<String>) -> Self {
        Self::new(kvoyant_status::Shape, text)
    }
}

impl From<Error> for Wrong {
    fn from(error: Error) -> Self {
        Self { status: code(error.kind()), text: error.to_string() }
    }
}

fn code(kind: Kind) -> kvoyant_status {
    use kvoyant_status as S;
    match kind {
        Kind::Argument => S::Argument,
        Kind::Shape => S::Shape,
        Kind::Connect => S::Connect,
        Kind::Version => S::Version,
        Kind::Refused => S::Refused,
        Kind::NotAllowed => S::NotAllowed,
        Kind::Backpressure => S::Backpressure,
        Kind::Quota => S::Quota,
        Kind::Gone => S::Gone,
        Kind::Deadline => S::Deadline,
        Kind::NotReady => S::NotReady,
        Kind::Busy => S::Busy,
        Kind::NoRoom => S::NoRoom,
        Kind::Spilled => S::Spilled,
        Kind::Lost => S::Lost,
        Kind::Device => S::Device,
        Kind::Image => S::Image,
        Kind::Protocol => S::Protocol,
        Kind::System => S::System,
    }
}

fn keep(text: &str) {
    // A zero in the middle would end the sentence there; a C string cannot hold one.
    let text = CString::new(text.replace('\0', "\u{fffd}")).unwrap_or_default();
    // A thread that ends has nobody left to read it.
    let _ = LAST.try_with(|last| last.replace(text));
}

/// Runs a call. What it says of an error is kept for this thread; a panic ends here.
pub(crate) fn call(body: impl FnOnce() -> Result<(), Wrong>) -> kvoyant_status {
    match catch_unwind(AssertUnwindSafe(body)) {
        Ok(Ok(())) => kvoyant_status::Ok,
        Ok(Err(Wrong { status, text })) => {
            keep(&text);
            status
        }
        Err(panic) => {
            let said = panic.downcast_ref::<&str>().copied();
            let said = said.or_else(|| panic.downcast_ref::<String>().map(String::as_str));
            keep(&format!(
                "the library failed inside, which is a defect of it: {}",
                said.unwrap_or("no reason")
            ));
            kvoyant_status::Internal
        }
    }
}

/// The sentence of the last call of this thread that failed, in UTF-8; empty if none has. It stays until this thread's next call that
/// fails. Never null.
#[unsafe(no_mangle)]
pub extern "C" fn kvoyant_last_error() -> *const c_char {
    // Not to be freed: the thread owns it.
    LAST.try_with(|last| last.borrow().as_ptr()).unwrap_or(c"".as_ptr())
}

/// A code's name, such as `KVOYANT_STATUS_SHAPE`. Never null.
#[unsafe(no_mangle)]
pub extern "C" fn kvoyant_status_name(status: u32) -> *const c_char {
    const NAMES: [&std::ffi::CStr; 25] = [
        c"KVOYANT_STATUS_OK",
        c"KVOYANT_STATUS_ARGUMENT",
        c"KVOYANT_STATUS_SHAPE",
        c"KVOYANT_STATUS_DTYPE",
        c"KVOYANT_STATUS_HANDLE",
        c"KVOYANT_STATUS_FORKED",
        c"KVOYANT_STATUS_CONCURRENT",
        c"KVOYANT_STATUS_CONNECT",
        c"KVOYANT_STATUS_VERSION",
        c"KVOYANT_STATUS_REFUSED",
        c"KVOYANT_STATUS_NOT_ALLOWED",
        c"KVOYANT_STATUS_BACKPRESSURE",
        c"KVOYANT_STATUS_QUOTA",
        c"KVOYANT_STATUS_GONE",
        c"KVOYANT_STATUS_DEADLINE",
        c"KVOYANT_STATUS_NOT_READY",
        c"KVOYANT_STATUS_BUSY",
        c"KVOYANT_STATUS_NO_ROOM",
        c"KVOYANT_STATUS_SPILLED",
        c"KVOYANT_STATUS_LOST",
        c"KVOYANT_STATUS_DEVICE",
        c"KVOYANT_STATUS_IMAGE",
        c"KVOYANT_STATUS_PROTOCOL",
        c"KVOYANT_STATUS_SYSTEM",
        c"KVOYANT_STATUS_INTERNAL",
    ];
    NAMES.get(status as usize).copied().unwrap_or(c"unknown to this library").as_ptr()
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::ffi::CStr;

    fn last_error() -> String {
        // SAFETY: the text of this thread, which no call changes before it is copied.
        unsafe { CStr::from_ptr(kvoyant_last_error()) }.to_string_lossy().into_owned()
    }

    #[test]
    fn a_panic_becomes_a_code_and_a_sentence_and_every_thread_has_its_own() {
        assert_eq!(last_error(), "");
        let status = call(|| panic!("page {} of {}", 3, 2));
        assert_eq!(status, kvoyant_status::Internal);
        assert_eq!(last_error(), "the library failed inside, which is a defect of it: page 3 of 2");
        std::thread::spawn(|| assert_eq!(last_error(), "")).join().unwrap();
        assert_eq!(call(|| Err(Wrong::shape("a\0b"))), kvoyant_status::Shape);
        assert_eq!(last_error(), "a\u{fffd}b");
        assert_eq!(call(|| Ok(())), kvoyant_status::Ok);
        assert_eq!(last_error(), "a\u{fffd}b", "a call that goes well leaves it");
    }
}
