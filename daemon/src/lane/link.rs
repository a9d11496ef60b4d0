//! What the device's link has managed lately, to tell what can come by a deadline.

use kvoyant_protocol::futex::now_ns;

/// What an older transfer counts for against the next newer one.
const FADE: f64 = 0.9;

/// Sums over transfers, the newest of which count most: bytes, and the time from plan to the last of them, latency included.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Link {
    bytes: f64,
    nanos: f64,
}

impl Link {
    /// Takes note of a transfer.
    pub(crate) fn took(&mut self, bytes: u64, nanos: u64) {
        if bytes > 0 {
            self.bytes = self.bytes * FADE + bytes as f64;
            self.nanos = self.nanos * FADE + nanos as f64;
        }
    }

    /// Bytes that come until then, on the monotonic clock; none where there is no such time or nothing is known.
    pub(crate) fn bytes_until(&self, deadline_ns: u64) -> Option<u64> {
        if deadline_ns == 0 || self.nanos <= 0.0 {
            return None;
        }
        let left = deadline_ns.saturating_sub(now_ns());
        Some((left as f64 * self.bytes / self.nanos) as u64)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_much_comes_as_came_lately() {
        let mut link = Link::default();
        assert_eq!(link.bytes_until(now_ns() + 1_000_000_000), None, "nothing is known yet");
        (0..100).for_each(|_| link.took(1000, 1_000_000));
        (0..100).for_each(|_| link.took(4000, 1_000_000));
        link.took(0, 5_000_000);
        assert_eq!(link.bytes_until(0), None);
        assert_eq!(link.bytes_until(1), Some(0), "that time is past");
        let bytes = link.bytes_until(now_ns() + 1_000_000_000).unwrap();
        assert!((3_000_000..=4_000_100).contains(&bytes), "{bytes}");
    }
}
