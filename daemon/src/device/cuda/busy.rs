//! Whether a thread that calls the driver comes back from it.
//!
//! A driver waits by itself in places where nothing says so: for a stream that is full, for everything before it frees pinned memory. Where
//! copies do not end any more, the thread that would find that out is inside such a call. So another one looks whether it is.

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use crossbeam::channel::{RecvTimeoutError, Sender, bounded};

/// How often it is looked at while its patience lasts.
const LOOKS: u32 = 8;

/// The thread's own end: whoever watches ends when this is dropped.
#[derive(Debug)]
pub(super) struct Busy {
    /// Odd while the thread is inside its work; no two times alike.
    turn: Arc<AtomicU64>,
    _alive: Sender<()>,
}

impl Busy {
    /// Has `stuck` called once the thread has been inside for longer than `patience`. A process that stands still does not look either, so that
    /// the time in which it does counts for nothing.
    pub(super) fn watched(patience: Duration, stuck: impl FnOnce() + Send + 'static) -> io::Result<Self> {
        let (sender, alive) = bounded::<()>(0);
        let turn = Arc::new(AtomicU64::new(0));
        let seen = Arc::clone(&turn);
        // The thread is over when its other end is dropped, and nobody waits for it.
        crate::threads::start("device-watch", move || {
            let (mut last, mut looks) = (0, 0);
            while alive.recv_timeout(patience / LOOKS) == Err(RecvTimeoutError::Timeout) {
                let now = seen.load(Ordering::Relaxed);
                looks = if now == last && now % 2 == 1 { looks + 1 } else { 0 };
                last = now;
                if looks > LOOKS {
                    return stuck();
                }
            }
        })?;
        Ok(Self { turn, _alive: sender })
    }

    /// The thread goes inside.
    pub(super) fn begin(&self) {
        self.turn.fetch_add(1, Ordering::Relaxed);
    }

    /// It has come back.
    pub(super) fn end(&self) {
        self.turn.fetch_add(1, Ordering::Relaxed);
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
