//! Mappings of huge pages that survive a peer who takes the pages away.
//!
//! Whoever may write to a memfd may punch holes into it. In ordinary memory the next access gets a fresh page. Huge
//! pages are counted, so that by then somebody else may have the page, and the access is a SIGBUS, which ends the
//! process: a peer could end the daemon. For mappings that are [guarded](Guard) the signal's handler puts private
//! zeros into the hole instead and marks the mapping, which must not be used again once its owner has gone.
//!
//! The handler takes no lock and allocates nothing: it looks through a table of addresses and maps memory.

use std::io;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::{SaFlags, SigAction, SigHandler, SigSet, Signal, sigaction};

use super::SharedMapping;

/// Bytes that the handler replaces at once: a huge page.
const HOLE_BYTES: usize = 2 << 20;

/// Guarded mappings at once: 1 TiB of extents.
const GUARDS_MAX: usize = 1 << 14;

/// A slot that somebody is filling. No mapping begins there.
const CLAIMED: usize = usize::MAX;

/// Start and length of each guarded mapping. The length is stored first and the start, 0 while there is none, last.
/// The lowest bit of the length says that the mapping had a hole.
struct Slot {
    start: AtomicUsize,
    len: AtomicUsize,
}

static SLOTS: [Slot; GUARDS_MAX] =
    [const { Slot { start: AtomicUsize::new(0), len: AtomicUsize::new(0) } }; GUARDS_MAX];

/// What SIGBUS did before.
static BEFORE: OnceLock<Result<SigAction, nix::errno::Errno>> = OnceLock::new();

/// Keeps a mapping guarded. It is dropped before the mapping is.
#[derive(Debug)]
pub struct Guard {
    slot: usize,
}

impl Guard {
    /// Guards a mapping, whose length is a multiple of two.
    pub fn new(mapping: &SharedMapping) -> io::Result<Self> {
        let installed = BEFORE.get_or_init(|| {
            let flags = SaFlags::SA_SIGINFO | SaFlags::SA_ONSTACK;
            let action = SigAction::new(SigHandler::SigAction(handle), flags, SigSet::empty());
            // SAFETY: the handler only loads atomics and makes system calls, which is safe in a signal handler.
            unsafe { sigaction(Signal::SIGBUS, &action) }
        });
        if let Err(errno) = installed {
            return Err((*errno).into());
        }
        let start = mapping.map.as_mut_ptr() as usize;
        let claim = |slot: &Slot| {
            slot.start.compare_exchange(0, CLAIMED, Ordering::Acquire, Ordering::Relaxed).is_ok()
        };
        let Some(slot) = SLOTS.iter().position(claim) else {
            return Err(io::Error::other(format!("{GUARDS_MAX} mappings are guarded already")));
        };
        SLOTS[slot].len.store(mapping.len() & !1, Ordering::Relaxed);
        SLOTS[slot].start.store(start, Ordering::Release);
        Ok(Self { slot })
    }

    /// Whether a hole was found, so that part of the mapping is nobody else's memory any more.
    #[must_use]
    pub fn had_hole(&self) -> bool {
        SLOTS[self.slot].len.load(Ordering::Acquire) & 1 == 1
    }
}

impl Drop for Guard {
    fn drop(&mut self) {
        SLOTS[self.slot].start.store(0, Ordering::Release);
    }
}

/// Where the replacement for the hole at `address` begins, and how long it is.
fn replacement(address: usize) -> Option<(usize, usize, &'static AtomicUsize)> {
    SLOTS.iter().find_map(|slot| {
        let start = slot.start.load(Ordering::Acquire);
        let len = slot.len.load(Ordering::Acquire) & !1;
        if start == 0 || start == CLAIMED || !(start..start.saturating_add(len)).contains(&address) {
            return None;
        }
        let offset = (address - start) / HOLE_BYTES * HOLE_BYTES;
        Some((start + offset, HOLE_BYTES.min(len - offset), &slot.len))
    })
}

extern "C" fn handle(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    // SAFETY: the kernel gives a handler with SA_SIGINFO a valid pointer, and for SIGBUS `si_addr` is the address.
    let address = unsafe { (*info).si_addr() } as usize;
    if let Some((start, len, mark)) = replacement(address) {
        // SAFETY: `errno` is this thread's own.
        let errno = unsafe { libc::__errno_location() };
        // SAFETY: as above.
        let saved = unsafe { *errno };
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS | libc::MAP_FIXED);
        // SAFETY: the range lies inside a live guarded mapping (a guard goes before its mapping does), of which nobody
        // holds references, only offsets; what is put there is as long and as accessible as what was.
        let mapped = unsafe { libc::mmap(start as *mut libc::c_void, len, protection, flags, -1, 0) };
        // SAFETY: as above.
        unsafe { *errno = saved };
        if mapped != libc::MAP_FAILED {
            mark.fetch_or(1, Ordering::Release);
            return;
        }
    }
    pass_on(signal, info, context);
}

/// A fault that is not ours goes to whoever had the signal before; without one, the access is repeated and ends the
/// process.
fn pass_on(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    match BEFORE.get().and_then(|before| before.as_ref().ok()).map(SigAction::handler) {
        Some(SigHandler::SigAction(before)) => before(signal, info, context),
        Some(SigHandler::Handler(before)) => before(signal),
        _ => {
            let default = SigAction::new(SigHandler::SigDfl, SaFlags::empty(), SigSet::empty());
            // SAFETY: it takes our own handler away, and sets no other.
            let _ = unsafe { sigaction(Signal::SIGBUS, &default) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::memory::Memfd;
    use std::os::fd::AsFd;

    #[test]
    fn an_access_to_memory_that_was_taken_away_reads_zeros_and_is_remembered() {
        let file = Memfd::create("test", 3 * HOLE_BYTES).unwrap();
        let (map, other) = (file.map(false).unwrap(), file.map(false).unwrap());
        let (guard, intact) = (Guard::new(&map).unwrap(), Guard::new(&other).unwrap());
        map.store_u64(HOLE_BYTES, 7);
        map.store_u64(0, 8);
        // Cutting the file short faults just as a hole does that no huge page is left for.
        nix::unistd::ftruncate(file.as_fd(), HOLE_BYTES as i64).unwrap();
        assert!(!guard.had_hole());
        assert_eq!(map.load_u64(HOLE_BYTES), 0);
        assert!(guard.had_hole() && !intact.had_hole());
        map.store_u64(2 * HOLE_BYTES + 8, 9);
        assert_eq!((map.load_u64(2 * HOLE_BYTES + 8), map.load_u64(0)), (9, 8));
        let slot = guard.slot;
        drop(guard);
        assert_eq!(SLOTS[slot].start.load(Ordering::Relaxed), 0);
    }
}
