//! What ends the daemon when one of its threads fails.

/// Ends the process when the thread that holds it panics: a daemon without one of its lanes or copy threads would
/// leave clients waiting, while a dead daemon is an error that they see at once, and its supervisor restarts it.
pub(crate) struct Bomb;

impl Drop for Bomb {
    fn drop(&mut self) {
        if std::thread::panicking() {
            tracing::error!("a thread of the daemon panicked, which is a defect; the daemon ends");
            crate::log::flush(crate::log::LAST_LINES);
            std::process::abort();
        }
    }
}
