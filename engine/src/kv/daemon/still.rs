//! A lane that takes no requests, where the engine chose not to wait for answers: it is asked for nothing until it goes on, so that no step
//! waits for room in its ring. What it has to be told meanwhile is held back, and told first then.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvoyant_client::Fallback;

use super::{DaemonError, DaemonKv, DaemonSequence};

/// How often a full ring is looked at.
const LOOK_EVERY: Duration = Duration::from_micros(50);

/// What a lane has yet to be told of a sequence.
#[derive(Debug, Default)]
pub(super) struct Held {
    /// Rows that have been written behind those that it knows of.
    rows: usize,
    /// Marks of tokens from a position on.
    marks: Vec<(usize, Vec<u8>)>,
}

/// The same, of a sequence that others may look at meanwhile.
#[derive(Debug, Default)]
pub(super) struct HeldBack(Mutex<Held>);

impl HeldBack {
    fn lock(&self) -> MutexGuard<'_, Held> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// One more token's rows have been written.
    pub(super) fn row(&self) {
        self.lock().rows += 1;
    }

    /// Tokens from a position on have these marks.
    pub(super) fn marks(&self, start: usize, marks: &[u8]) {
        let mut held = self.lock();
        // A step that failed marks its token once more.
        held.marks.retain(|(marked, _)| *marked < start);
        held.marks.push((start, marks.to_vec()));
    }
}

impl DaemonKv {
    /// Whether the lane is to be asked for nothing now, for it takes nothing. A daemon that has been silent for the engine's deadline is lost.
    pub(super) fn stands_still(&mut self) -> Result<bool, DaemonError> {
        if self.options.fallback == Fallback::Wait {
            return Ok(false);
        }
        if let Some(seen) = self.still {
            if self.model.backlog()?.taken == seen {
                self.model.check_served()?;
                self.late(Duration::ZERO)?;
                return Ok(true);
            }
            self.still = None;
        }
        let since = Instant::now();
        loop {
            let backlog = self.model.backlog()?;
            if backlog.room > 0 {
                return Ok(false);
            }
            // A lane that is only behind has milliseconds of work in its ring.
            if since.elapsed() >= self.options.late_after {
                self.still = Some(backlog.taken);
                self.late(since.elapsed())?;
                return Ok(true);
            }
            std::thread::sleep(LOOK_EVERY);
        }
    }

    /// A step begins, which asks for nothing if `unasked`.
    pub(super) fn begin_asking(&mut self, unasked: bool) -> Result<(), DaemonError> {
        self.unasked = unasked;
        if self.options.fallback != Fallback::Wait {
            self.begun = Some(self.model.backlog()?.taken);
        }
        Ok(())
    }

    /// An answer is late: if the lane has taken nothing since the step began, it is not asked again before it does.
    pub(super) fn suspect(&mut self) -> Result<(), DaemonError> {
        let backlog = self.model.backlog()?;
        if backlog.waiting > 0 && self.begun == Some(backlog.taken) {
            self.still = Some(backlog.taken);
        }
        Ok(())
    }

    /// Tells what was held back of a sequence.
    pub(super) fn tell(&self, sequence: &DaemonSequence) -> Result<(), DaemonError> {
        let mut held = sequence.held_back().lock();
        for (start, marks) in std::mem::take(&mut held.marks) {
            self.model.mark(sequence.inner(), start, &marks)?;
        }
        let rows = std::mem::take(&mut held.rows);
        if rows > 0 {
            self.model.append(&[(sequence.inner(), rows)])?;
        }
        Ok(())
    }

    /// The same of several.
    pub(super) fn tell_all(&self, batch: &[&DaemonSequence]) -> Result<(), DaemonError> {
        batch.iter().try_for_each(|sequence| self.tell(sequence))
    }
}
