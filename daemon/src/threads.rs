//! Starting threads: in one place, so that tests can have it fail.

use std::io;
use std::thread::{Builder, JoinHandle};

use kvoyant_protocol::faults::{self, Point};

/// Starts a thread with a name.
///
/// # Errors
/// What the system says; the work is dropped then.
pub(crate) fn start<T: Send + 'static>(
    name: impl Into<String>,
    work: impl FnOnce() -> T + Send + 'static,
) -> io::Result<JoinHandle<T>> {
    faults::check(Point::Thread)?;
    Builder::new().name(name.into()).spawn(work)
}
