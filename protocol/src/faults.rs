//! Faults on purpose, for tests: the n-th call of a kind fails as the system would have it fail.
//!
//! Builds without debug assertions have none of this, unless the feature `faults` says otherwise: then [`fires`] is false and costs nothing.
//! Else the environment chooses one fault for the process:
//!
//! `KVOYANT_FAULTS=memfd:3` has the third memfd fail to be made, `memfd:3+` that one and all that follow, and
//! `KVOYANT_FAULTS_SEEN=FILE` has a file made when that happens, so that who counts up knows where to stop.

use std::io;

/// A kind of call that can be made to fail.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Point {
    /// A memfd is made.
    Memfd,
    /// It gets its size.
    MemfdSize,
    /// It gets its seals.
    Seal,
    /// It is mapped.
    Map,
    /// It is locked into memory.
    Lock,
    /// A descriptor is duplicated.
    Duplicate,
    /// A sleep on a word, which ends at once.
    FutexWait,
    /// A sleep on many words, which the system refuses.
    FutexWaitMany,
    /// A wake-up, which is lost.
    FutexWake,
    /// A connection is accepted.
    Accept,
    /// A message is sent.
    Send,
    /// A message is received.
    Receive,
    /// A thread is started.
    Thread,
    /// Rows are copied to a slab.
    Copy,
    /// A page is read from the spill tier.
    SpillRead,
    /// It comes torn.
    SpillTorn,
    /// A page is written to the spill tier.
    SpillWrite,
    /// A file or folder of an image is opened or made.
    ImageOpen,
    /// Bytes of an image are written.
    ImageWrite,
    /// Bytes of an image are read.
    ImageRead,
    /// An image is synced, or gets its name.
    ImageSync,
    /// A canary, no call: a copied row is wrong, which a sweep must find.
    WrongByte,
    /// A canary, no call: a session leaves a descriptor behind, which a sweep must find.
    Leak,
    /// A canary, no call: a session's answer never comes, which a sweep must find.
    Hang,
    /// A canary, no call: a lane stands still with its command, which a watchdog must find.
    Wedge,
}

impl Point {
    /// All that a system does to programs.
    pub const ALL: [Self; 21] = [
        Self::Memfd,
        Self::MemfdSize,
        Self::Seal,
        Self::Map,
        Self::Lock,
        Self::Duplicate,
        Self::FutexWait,
        Self::FutexWaitMany,
        Self::FutexWake,
        Self::Accept,
        Self::Send,
        Self::Receive,
        Self::Thread,
        Self::Copy,
        Self::SpillRead,
        Self::SpillTorn,
        Self::SpillWrite,
        Self::ImageOpen,
        Self::ImageWrite,
        Self::ImageRead,
        Self::ImageSync,
    ];

    /// Defects that no system causes: whoever does not find them does not look.
    pub const CANARIES: [Self; 4] = [Self::WrongByte, Self::Leak, Self::Hang, Self::Wedge];

    /// Its name in the environment.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Memfd => "memfd",
            Self::MemfdSize => "memfd-size",
            Self::Seal => "seal",
            Self::Map => "map",
            Self::Lock => "lock",
            Self::Duplicate => "duplicate",
            Self::FutexWait => "futex-wait",
            Self::FutexWaitMany => "futex-wait-many",
            Self::FutexWake => "futex-wake",
            Self::Accept => "accept",
            Self::Send => "send",
            Self::Receive => "receive",
            Self::Thread => "thread",
            Self::Copy => "copy",
            Self::SpillRead => "spill-read",
            Self::SpillTorn => "spill-torn",
            Self::SpillWrite => "spill-write",
            Self::ImageOpen => "image-open",
            Self::ImageWrite => "image-write",
            Self::ImageRead => "image-read",
            Self::ImageSync => "image-sync",
            Self::WrongByte => "wrong-byte",
            Self::Leak => "leak",
            Self::Hang => "hang",
            Self::Wedge => "wedge",
        }
    }

    /// What the system says when it fails.
    fn errno(self) -> i32 {
        match self {
            Self::Memfd | Self::Accept | Self::Duplicate => libc::EMFILE,
            Self::MemfdSize | Self::ImageWrite => libc::ENOSPC,
            Self::Seal => libc::EBUSY,
            Self::Thread => libc::EAGAIN,
            Self::Map | Self::Lock | Self::FutexWaitMany | Self::Receive => libc::ENOMEM,
            Self::Send => libc::ENOBUFS,
            _ => libc::EIO,
        }
    }
}

/// Fails if this call is the one that was chosen.
///
/// # Errors
/// What the system would say.
#[inline]
pub fn check(point: Point) -> io::Result<()> {
    if fires(point) { Err(io::Error::from_raw_os_error(point.errno())) } else { Ok(()) }
}

#[cfg(any(debug_assertions, feature = "faults"))]
pub use chosen::{chose, fires};

/// Whether this call is the one that was chosen: never, in this build.
#[cfg(not(any(debug_assertions, feature = "faults")))]
#[inline]
#[must_use]
pub fn fires(_: Point) -> bool {
    false
}

#[cfg(any(debug_assertions, feature = "faults"))]
mod chosen {
    use std::sync::OnceLock;
    use std::sync::atomic::{AtomicU64, Ordering};

    use super::Point;

    /// A call, and whether those that follow it fail, too.
    #[derive(Debug, Clone, Copy, PartialEq, Eq)]
    pub(super) struct Nth {
        pub(super) of: Point,
        pub(super) nth: u64,
        pub(super) onwards: bool,
    }

    static CHOSEN: OnceLock<Option<Nth>> = OnceLock::new();
    static CALLS: AtomicU64 = AtomicU64::new(0);

    fn chosen() -> Option<Nth> {
        *CHOSEN.get_or_init(|| {
            let text = std::env::var("KVOYANT_FAULTS").ok().filter(|text| !text.is_empty())?;
            match parse(&text) {
                Some(chosen) => Some(chosen),
                None => panic!("KVOYANT_FAULTS={text:?} is not POINT:N or POINT:N+, as memfd:3"),
            }
        })
    }

    /// Whether this call is the one that was chosen.
    ///
    /// # Panics
    /// If the environment chooses what is none: a test that chose nothing would pass.
    #[must_use]
    pub fn fires(point: Point) -> bool {
        match chosen() {
            Some(Nth { of, nth, onwards }) if of == point => {
                let call = CALLS.fetch_add(1, Ordering::Relaxed) + 1;
                let fires = call == nth || onwards && call > nth;
                if fires && let Some(file) = std::env::var_os("KVOYANT_FAULTS_SEEN") {
                    let _ = std::fs::write(file, point.name());
                }
                fires
            }
            _ => false,
        }
    }

    /// Whether one of these kinds is the one that was chosen.
    #[must_use]
    pub fn chose(points: &[Point]) -> bool {
        chosen().is_some_and(|chosen| points.contains(&chosen.of))
    }

    pub(super) fn parse(text: &str) -> Option<Nth> {
        let (name, nth) = text.split_once(':')?;
        let (nth, onwards) = nth.strip_suffix('+').map_or((nth, false), |nth| (nth, true));
        let all = Point::ALL.into_iter().chain(Point::CANARIES);
        let of = all.into_iter().find(|point| point.name() == name)?;
        Some(Nth { of, nth: nth.parse().ok().filter(|nth| *nth > 0)?, onwards })
    }
}

#[cfg(all(test, any(debug_assertions, feature = "faults")))]
mod tests {
    use super::*;

    #[test]
    fn a_fault_is_chosen_by_name_and_number_and_by_nothing_else() {
        let nth = |of, nth, onwards| Some(chosen::Nth { of, nth, onwards });
        assert_eq!(chosen::parse("memfd:3"), nth(Point::Memfd, 3, false));
        assert_eq!(chosen::parse("memfd:3+"), nth(Point::Memfd, 3, true));
        assert_eq!(chosen::parse("leak:1"), nth(Point::Leak, 1, false));
        for wrong in [
            "",
            "memfd",
            "memfd:",
            "memfd:0",
            "memfd:+",
            "memfd:0+",
            "memfd:1++",
            "memfd:x",
            "memfds:1",
            ":1",
        ] {
            assert_eq!(chosen::parse(wrong), None, "{wrong}");
        }
        for point in Point::ALL {
            assert_eq!(chosen::parse(&format!("{}:7", point.name())), nth(point, 7, false));
        }
    }

    #[test]
    fn nothing_fails_where_nothing_was_chosen() {
        assert!(Point::ALL.into_iter().all(|point| check(point).is_ok()));
    }
}
