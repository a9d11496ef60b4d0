//! How a lane sleeps where it may not sleep on many words at once: on a kernel before Linux 5.16, and in a container whose seccomp profile is
//! older than that. It looks at its rings every so often then, less often the longer nothing comes; its bell it hears at once.

use std::io;
use std::time::Duration;

use kvoyant_protocol::futex::{Bell, wait_for_bell};

/// From look to look, while something has come lately.
const SOON: Duration = Duration::from_micros(100);

/// After so many looks in vain they come half as often, and again after as many more, …
const VAIN: u32 = 1000;

/// … but no less often than a sixteenth: every 1.6 ms.
const HALVINGS: u32 = 4;

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Naps {
    in_vain: u32,
    said: bool,
}

impl Naps {
    /// Something has come.
    pub(super) fn found(&mut self) {
        self.in_vain = 0;
    }

    /// How long to sleep until the next look, on the way to which there is nothing to look at without rings.
    fn pause(&self, rings: bool, most: Duration) -> Duration {
        if rings { SOON * (1 << (self.in_vain / VAIN).min(HALVINGS)) } else { most }
    }

    /// Sleeps until the next look, or the bell. `error`: why it may not sleep on all of its words.
    pub(super) fn sleep(&mut self, bell: (&Bell, u32), rings: bool, most: Duration, error: &io::Error) {
        if !std::mem::replace(&mut self.said, true) {
            tracing::warn!(
                "a lane looks at its rings every 0.1 to 1.6 ms, and takes processor time for it, since it may not sleep on them ({error}): \
                 allow futex_waitv in the container's seccomp profile, or run Linux 5.16 or newer"
            );
        }
        let pause = self.pause(rings, most);
        self.in_vain = self.in_vain.saturating_add(1);
        wait_for_bell(bell, pause);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn looks_come_less_often_the_longer_nothing_comes_and_not_at_all_without_rings() {
        let most = Duration::from_millis(100);
        let mut naps = Naps::default();
        assert_eq!((naps.pause(true, most), naps.pause(false, most)), (SOON, most));
        let pauses: Vec<Duration> = [999, 1000, 2500, 4000, u32::MAX]
            .map(|in_vain| Naps { in_vain, said: true }.pause(true, most))
            .to_vec();
        assert_eq!(pauses, [SOON, 2 * SOON, 4 * SOON, 16 * SOON, 16 * SOON]);
        naps.in_vain = 5000;
        naps.found();
        assert_eq!(naps.pause(true, most), SOON);
    }
}
