//! A server that has failed several times in a row is left alone for a while: whoever waits for it would wait for nothing.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::tiers::store::Unanswered;

/// Counts failures in a row.
#[derive(Debug)]
pub(super) struct Breaker {
    most: u32,
    rest: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    failures: u32,
    /// Nobody asks before.
    until: Option<Instant>,
}

impl Breaker {
    /// After `most` failures in a row the server has a rest.
    pub(super) fn new(most: u32, rest: Duration) -> Self {
        Self { most, rest, state: Mutex::default() }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Refuses while the server rests. Afterwards one caller may try; the others are refused until it has succeeded.
    pub(super) fn admit(&self, now: Instant) -> Result<(), Unanswered> {
        let mut state = self.lock();
        let Some(until) = state.until else { return Ok(()) };
        if now < until {
            return Err(Unanswered::LeftAlone { failures: state.failures, retry_in: until - now });
        }
        state.until = Some(now + self.rest);
        Ok(())
    }

    /// It answered.
    pub(super) fn answered(&self) {
        *self.lock() = State::default();
    }

    /// It did not; whether it is left alone now.
    pub(super) fn failed(&self, now: Instant) -> bool {
        let mut state = self.lock();
        state.failures = state.failures.saturating_add(1);
        let open = state.failures >= self.most;
        if open {
            state.until = Some(now + self.rest);
        }
        open
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn three_failures_give_a_rest_and_one_caller_tries_after_it() {
        let (rest, start) = (Duration::from_secs(10), Instant::now());
        let at = |seconds| start + Duration::from_secs(seconds);
        let breaker = Breaker::new(3, rest);
        assert!(!breaker.failed(start) && !breaker.failed(start));
        breaker.answered();
        assert!(!breaker.failed(start) && !breaker.failed(start) && breaker.failed(start));
        let refused = breaker.admit(at(4));
        assert_eq!(refused, Err(Unanswered::LeftAlone { failures: 3, retry_in: Duration::from_secs(6) }));
        assert_eq!(breaker.admit(at(10)), Ok(()));
        assert!(breaker.admit(at(11)).is_err(), "a second caller");
        assert!(breaker.failed(at(12)), "one more failure is enough");
        assert!(breaker.admit(at(21)).is_err());
        assert_eq!(breaker.admit(at(22)), Ok(()));
        breaker.answered();
        assert_eq!(breaker.admit(at(22)), Ok(()));
        assert!(!breaker.failed(at(22)));
    }
}
