//! Whether threads move.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

/// A thread's sign of life: it beats once a round. Lanes sleep for 100 ms at most, so theirs beats all the time.
#[derive(Debug, Default)]
pub(crate) struct Pulse(AtomicU64);

impl Pulse {
    /// One more round. Only one thread may call it.
    pub(crate) fn beat(&self) {
        self.0.store(self.count().wrapping_add(1), Ordering::Relaxed);
    }

    /// Rounds so far.
    pub(crate) fn count(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }
}

#[derive(Debug)]
struct Seen {
    name: String,
    pulse: Arc<Pulse>,
    count: u64,
    /// When it was first seen at this count.
    since: Instant,
    told: bool,
}

/// Looks at pulses every now and then, and says of those that have stood still for too long.
#[derive(Debug)]
pub(crate) struct Watch {
    all: Vec<Seen>,
    patience: Duration,
}

impl Watch {
    /// Over these threads, each of which may stand still for so long.
    pub(crate) fn new(watched: Vec<(String, Arc<Pulse>)>, patience: Duration, now: Instant) -> Self {
        let seen = |(name, pulse): (String, Arc<Pulse>)| {
            let count = pulse.count();
            Seen { name, pulse, count, since: now, told: false }
        };
        Self { all: watched.into_iter().map(seen).collect(), patience }
    }

    /// Whether none has stood still for longer than it may. What changes is logged.
    pub(crate) fn all_move(&mut self, now: Instant) -> bool {
        let mut all = true;
        for seen in &mut self.all {
            let count = seen.pulse.count();
            if count != seen.count {
                (seen.count, seen.since) = (count, now);
            }
            let still = now.saturating_duration_since(seen.since);
            let moves = still < self.patience;
            all &= moves;
            if moves == seen.told {
                seen.told = !moves;
                if moves {
                    tracing::warn!("{} moves again, and the watchdog hears so", seen.name);
                } else {
                    tracing::error!(
                        "{} has stood still for {:.1} s, which is a defect or a machine that thrashes; the watchdog hears \
                         nothing more until it moves",
                        seen.name,
                        still.as_secs_f64()
                    );
                }
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_thread_that_stands_still_for_too_long_is_told_until_it_moves_again() {
        let (a, b) = (Arc::new(Pulse::default()), Arc::new(Pulse::default()));
        let start = Instant::now();
        let at = |seconds| start + Duration::from_secs(seconds);
        let watched = vec![("a".to_owned(), Arc::clone(&a)), ("b".to_owned(), Arc::clone(&b))];
        let mut watch = Watch::new(watched, Duration::from_secs(10), start);
        assert!(watch.all_move(at(9)));
        a.beat();
        assert!(!watch.all_move(at(10)), "b has not moved");
        b.beat();
        assert!(watch.all_move(at(11)));
        assert!(watch.all_move(at(19)));
        assert!(!watch.all_move(at(20)), "a has not moved since 10");
    }
}
