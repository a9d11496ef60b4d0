//! What belongs to the process that made it.

use std::ops::Deref;

use crate::errors::{Result, Wrong};

/// A value that only the process that made it lets go of. To drop a session's objects in a child would close those of its parent, whose socket and
/// rings it shares: there they are left as they are.
#[derive(Debug)]
pub(crate) struct Owned<T> {
    value: Option<T>,
    process: u32,
}

impl<T> Owned<T> {
    pub(crate) fn new(value: T) -> Self {
        Self { value: Some(value), process: std::process::id() }
    }

    /// The value, for whoever has checked that this is its process.
    pub(crate) fn into_inner(mut self) -> T {
        self.value.take().expect(THERE)
    }
}

const THERE: &str = "only taken with the whole";

impl<T> Deref for Owned<T> {
    type Target = T;

    fn deref(&self) -> &T {
        self.value.as_ref().expect(THERE)
    }
}

impl<T> Drop for Owned<T> {
    fn drop(&mut self) {
        if self.process != std::process::id() {
            std::mem::forget(self.value.take());
        }
    }
}

/// Checks that this is the process that something was made in.
pub(crate) fn same_process(made_in: u32, what: &str) -> Result<()> {
    if made_in == std::process::id() { Ok(()) } else { Err(Wrong::forked(what)) }
}
