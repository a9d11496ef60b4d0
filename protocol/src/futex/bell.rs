//! A bell: a word of this process's own, to wake one sleeper who watches shared words beside it.

#[cfg(loom)]
use crate::simulated::{AtomicBool, Ordering, OwnWord, publish_before_looking};
#[cfg(not(loom))]
use {
    super::publish_before_looking,
    std::sync::atomic::{AtomicBool, AtomicU32, Ordering},
};

/// A word of this process's own that threads ring to wake one sleeper, who can watch it beside shared words.
#[derive(Debug, Default)]
pub struct Bell {
    pub(crate) rung: OwnWord,
    sleeping: AtomicBool,
}

impl Bell {
    /// Rings: what was done before is seen by whoever wakes. A system call only if somebody sleeps.
    pub fn ring(&self) {
        self.rung.add_one();
        publish_before_looking();
        if self.sleeping.load(Ordering::Acquire) {
            self.rung.wake_one();
        }
    }

    /// Value to compare with later.
    #[must_use]
    pub fn seen(&self) -> u32 {
        self.rung.load()
    }

    /// Says whether somebody sleeps on it. Look for work again after saying so.
    pub fn say_sleeping(&self, sleeping: bool) {
        self.sleeping.store(sleeping, Ordering::Release);
        if sleeping {
            publish_before_looking();
        }
    }
}

/// A word that no peer can write.
#[cfg(not(loom))]
#[derive(Debug, Default)]
pub(crate) struct OwnWord(AtomicU32);

#[cfg(not(loom))]
impl OwnWord {
    fn add_one(&self) {
        self.0.fetch_add(1, Ordering::Release);
    }

    fn load(&self) -> u32 {
        self.0.load(Ordering::Acquire)
    }

    fn wake_one(&self) {
        if crate::faults::fires(crate::faults::Point::FutexWake) {
            return;
        }
        // SAFETY: the word lives as long as `self` is borrowed.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.0.as_ptr(),
                libc::FUTEX_WAKE,
                1,
                std::ptr::null::<libc::timespec>(),
                std::ptr::null::<u32>(),
                0,
            )
        };
    }

    /// Its address, for the futex system calls only.
    pub(super) fn address(&self) -> u64 {
        self.0.as_ptr() as u64
    }
}
