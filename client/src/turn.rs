//! Whose turn it is at something that one thread at a time may use, with a deadline for those who wait: a lock would have none.

use std::sync::{Condvar, Mutex, PoisonError};
use std::time::{Duration, Instant};

/// Something that one thread at a time may use.
#[derive(Debug, Default)]
pub(crate) struct Turns {
    taken: Mutex<bool>,
    free: Condvar,
}

/// A turn. Dropping it lets the next one have theirs.
#[derive(Debug)]
pub(crate) struct Turn<'a>(&'a Turns);

impl Turns {
    /// Waits for a turn; none if that takes longer than `timeout`.
    pub(crate) fn take(&self, timeout: Duration) -> Option<Turn<'_>> {
        let since = Instant::now();
        let mut taken = self.taken.lock().unwrap_or_else(PoisonError::into_inner);
        while *taken {
            let left = timeout.checked_sub(since.elapsed()).filter(|left| !left.is_zero())?;
            (taken, _) = self.free.wait_timeout(taken, left).unwrap_or_else(PoisonError::into_inner);
        }
        *taken = true;
        Some(Turn(self))
    }
}

impl Drop for Turn<'_> {
    fn drop(&mut self) {
        *self.0.taken.lock().unwrap_or_else(PoisonError::into_inner) = false;
        self.0.free.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_turn_that_does_not_come_is_given_up_and_one_that_is_given_back_is_had_by_who_waits() {
        let turns = Turns::default();
        let held = turns.take(Duration::ZERO).unwrap();
        assert!(turns.take(Duration::from_millis(1)).is_none());
        std::thread::scope(|scope| {
            let waiter = scope.spawn(|| turns.take(Duration::from_secs(60)).is_some());
            drop(held);
            assert!(waiter.join().unwrap());
        });
        assert!(turns.take(Duration::ZERO).is_some());
    }
}
