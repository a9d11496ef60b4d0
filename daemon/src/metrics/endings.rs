//! How sessions end.

use std::sync::atomic::{AtomicU64, Ordering};

/// How a session ended, or an attempt at one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum How {
    /// Its client said goodbye.
    Left,
    /// Its client's socket was closed, or its process ended, without a word: what it had was taken back.
    Reaped,
    /// Its client broke the protocol: a descriptor, a message or a cursor that cannot be.
    Rejected,
    /// Something was refused that it cannot go on without, such as a place.
    Refused,
    /// Its socket or its memory failed.
    Failed,
    /// Its handshake took too long.
    TooSlow,
}

/// All of them, by the name that they have in metrics.
pub const HOWS: [(How, &str); 6] = [
    (How::Left, "left"),
    (How::Reaped, "reaped"),
    (How::Rejected, "rejected"),
    (How::Refused, "refused"),
    (How::Failed, "failed"),
    (How::TooSlow, "too_slow"),
];

/// How many ended in each way.
#[derive(Debug, Default)]
pub struct Endings([AtomicU64; HOWS.len()]);

impl Endings {
    /// One more.
    pub fn add(&self, how: How) {
        self.0[how as usize].fetch_add(1, Ordering::Relaxed);
    }

    /// How many, by name.
    pub fn counts(&self) -> impl Iterator<Item = (&'static str, u64)> + '_ {
        HOWS.iter().map(|(how, name)| (*name, self.0[*how as usize].load(Ordering::Relaxed)))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_is_counted_under_its_own_name() {
        let endings = Endings::default();
        for (times, (how, _)) in HOWS.into_iter().enumerate() {
            (0..=times).for_each(|_| endings.add(how));
        }
        let found: Vec<_> = endings.counts().collect();
        assert_eq!(
            found,
            [("left", 1), ("reaped", 2), ("rejected", 3), ("refused", 4), ("failed", 5), ("too_slow", 6)]
        );
    }
}
