//! Memory that is read in order, asked for ahead where the processor does not do so itself.
//!
//! A processor's prefetcher stops where a page of 4 KiB ends, and starts anew behind it. A loop of loads and little else hides that: many
//! of its loads are under way at any time. One that works on what it loads does not look as far ahead, and waits at every page. On
//! Intel's (measured on Sapphire Rapids) requests for what lies a page ahead of the loop, evenly spread over its work and in order, keep
//! memory busy. On AMD's (Zen 4) they got into the way of the processor's own, and loops took half as long again.

use std::arch::x86_64::__cpuid;
use std::sync::OnceLock;

/// How far ahead, in bytes: a page.
const AHEAD: usize = 4 << 10;
/// Bytes that one request is for.
pub(super) const LINE: usize = 64;

/// Whether this processor gains from being asked.
pub(super) fn asks() -> bool {
    // Found once: under a hypervisor the instruction takes microseconds.
    static ASKS: OnceLock<bool> = OnceLock::new();
    *ASKS.get_or_init(|| {
        // SAFETY: every x86-64 has the instruction. In newer versions of Rust it needs no such promise.
        #[allow(unused_unsafe)]
        let vendor = unsafe { __cpuid(0) };
        [vendor.ebx, vendor.edx, vendor.ecx].map(u32::to_le_bytes) == [*b"Genu", *b"ineI", *b"ntel"]
    })
}

/// A stretch of memory.
#[derive(Clone, Copy)]
pub(super) struct Stream {
    /// From here on there is nothing to ask for any more: [`AHEAD`] before the end.
    until: *const u8,
}

impl Stream {
    /// Nothing, or what was asked for already.
    pub(super) const NOTHING: Self = Self { until: std::ptr::null() };

    /// All of it, if this processor gains from being asked.
    pub(super) fn new(bytes: &[u8]) -> Self {
        match bytes.len().checked_sub(AHEAD) {
            Some(until) if asks() => Self { until: bytes[until..].as_ptr() },
            _ => Self::NOTHING,
        }
    }

    /// Whether there is nothing to ask for anywhere.
    #[inline(always)]
    pub(super) fn is_nothing(self) -> bool {
        self.until.is_null()
    }

    /// The address that is [`AHEAD`] of this one; this one, where there is nothing to ask for.
    #[inline(always)]
    pub(super) fn ahead(self, at: *const u8) -> *const u8 {
        if at < self.until { at.wrapping_add(AHEAD) } else { at }
    }

    /// Asks for so many lines, those that are [`AHEAD`] of the address, unless there is nothing to ask for.
    #[inline(always)]
    pub(super) fn ask(self, at: *const u8, lines: usize) {
        if at < self.until {
            ask(at.wrapping_add(AHEAD), lines);
        }
    }
}

/// Asks for so many lines, into the second-level cache; any address will do.
#[inline(always)]
pub(super) fn ask(at: *const u8, lines: usize) {
    for line in 0..lines {
        super::prefetch::<false>(at.wrapping_add(line * LINE));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_asked_for_lies_a_page_ahead_and_begins_before_the_end() {
        let bytes = vec![0_u8; 3 * AHEAD + 5];
        let stream = Stream::new(&bytes);
        assert_eq!(stream.is_nothing(), !asks());
        for at in (0..bytes.len()).step_by(37) {
            let ahead = stream.ahead(bytes[at..].as_ptr()).addr() - bytes.as_ptr().addr();
            let expected = if asks() && at + AHEAD < bytes.len() { at + AHEAD } else { at };
            assert_eq!(ahead, expected);
        }
    }

    #[test]
    fn of_less_than_a_page_nothing_is_asked_for() {
        let bytes = [0_u8; AHEAD - 1];
        assert!(Stream::new(&bytes).is_nothing());
        assert_eq!(Stream::new(&bytes).ahead(bytes.as_ptr()), bytes.as_ptr());
    }
}
