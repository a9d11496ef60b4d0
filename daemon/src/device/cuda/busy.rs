//! Whether a thread that calls the driver comes back from it.
//!
//! A driver waits by itself in places where nothing says so: for a stream that is full, for everything before it frees pinned memory. Where
//! copies do not end any more, the thread that would find that out is inside such a call. So another one looks whether it is.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crossbeam::channel::{RecvTimeoutError, Sender, bounded};

/// Since when a thread has been inside its work.
#[derive(Debug)]
struct Clock {
    start: Instant,
    /// Nanoseconds from the start, plus 1; 0 while it is not inside.
    since: AtomicU64,
}

/// The thread's own end: whoever watches ends when this is dropped.
#[derive(Debug)]
pub(super) struct Busy {
    clock: Arc<Clock>,
    _alive: Sender<()>,
}

impl Busy {
    /// Has `stuck` called once the thread has been inside for longer than `patience`.
    pub(super) fn watched(patience: Duration, stuck: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (sender, alive) = bounded::<()>(0);
        let clock = Arc::new(Clock { start: Instant::now(), since: AtomicU64::new(0) });
        let seen = Arc::clone(&clock);
        // The thread is over when its other end is dropped, and nobody waits for it.
        crate::threads::start("device-watch", move || {
            while alive.recv_timeout(patience / 8) == Err(RecvTimeoutError::Timeout) {
                if seen.inside_for().is_some_and(|inside| inside > patience) {
                    return stuck();
                }
            }
        })?;
        Ok(Self { clock, _alive: sender })
    }

    /// The thread goes inside.
    pub(super) fn begin(&self) {
        let now = u64::try_from(self.clock.start.elapsed().as_nanos()).unwrap_or(u64::MAX - 1);
        self.clock.since.store(now + 1, Ordering::Relaxed);
    }

    /// It has come back.
    pub(super) fn end(&self) {
        self.clock.since.store(0, Ordering::Relaxed);
    }
}

impl Clock {
    fn inside_for(&self) -> Option<Duration> {
        let since = self.since.load(Ordering::Relaxed).checked_sub(1)?;
        Some(self.start.elapsed().saturating_sub(Duration::from_nanos(since)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_comes_back_in_time_is_never_stuck_and_who_does_not_is() {
        let (told, heard) = bounded(1);
        let busy = Busy::watched(Duration::from_millis(400), move || {
            let _ = told.send(());
        })
        .unwrap();
        for _ in 0..6 {
            busy.begin();
            std::thread::sleep(Duration::from_millis(100));
            busy.end();
        }
        assert!(heard.try_recv().is_err(), "six times a quarter of it");
        busy.begin();
        heard.recv_timeout(Duration::from_secs(60)).unwrap();
    }

    #[test]
    fn nobody_watches_who_has_gone() {
        let (told, heard) = bounded(1);
        let busy = Busy::watched(Duration::from_millis(80), move || {
            let _ = told.send(());
        })
        .unwrap();
        busy.begin();
        drop(busy);
        // Dropped with the thread, unsaid.
        assert_eq!(heard.recv_timeout(Duration::from_secs(60)), Err(RecvTimeoutError::Disconnected));
    }
}
