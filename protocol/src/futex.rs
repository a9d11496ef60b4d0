//! Sleeping on a word of shared memory, and waking whoever sleeps on it.
//!
//! Waiting is adaptive: a waiter polls for a while, then says in memory of its own that it sleeps, looks once
//! more, and sleeps. The other side publishes first and then looks whether anybody sleeps. Both put a
//! sequentially consistent fence between their store and their load, so at least one of them sees the other's
//! store and no wake-up is lost.

#[cfg(not(loom))]
mod any;
mod bell;

use std::sync::atomic::{Ordering, fence};
use std::time::{Duration, Instant};

#[cfg(not(loom))]
pub use any::{WAIT_ANY_MAX, wait_any, wait_for_bell};
pub use bell::Bell;

use crate::faults::{self, Point};
use crate::memory::SharedMapping;

/// A word of shared memory that can be slept on.
#[derive(Debug, Clone, Copy)]
pub struct Word<'a> {
    /// The mapping that holds it.
    pub memory: &'a SharedMapping,
    /// Its offset in bytes, a multiple of four.
    pub offset: usize,
}

impl Word<'_> {
    /// Its value, with acquire ordering.
    #[must_use]
    pub fn load(&self) -> u32 {
        self.memory.load_u32(self.offset)
    }

    /// Sleeps while the word has the value `seen`, for at most `timeout`.
    ///
    /// Returns on a wake-up, on a changed value, on the timeout and on signals: callers look again in any case.
    pub fn wait(&self, seen: u32, timeout: Duration) {
        if faults::fires(Point::FutexWait) {
            return;
        }
        let timeout = timespec(timeout);
        // SAFETY: the word is aligned and mapped for as long as `self.memory` is borrowed; the kernel only reads
        // it, and the timeout outlives the call.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.memory.futex_word(self.offset),
                libc::FUTEX_WAIT,
                seen,
                &raw const timeout,
                std::ptr::null::<u32>(),
                0,
            )
        };
    }

    /// Wakes everybody who sleeps on the word.
    pub fn wake(&self) {
        if faults::fires(Point::FutexWake) {
            return;
        }
        // SAFETY: the word is aligned and mapped for as long as `self.memory` is borrowed.
        unsafe {
            libc::syscall(
                libc::SYS_futex,
                self.memory.futex_word(self.offset),
                libc::FUTEX_WAKE,
                i32::MAX,
                std::ptr::null::<libc::timespec>(),
                std::ptr::null::<u32>(),
                0,
            )
        };
    }
}

/// Orders a store before a later load, as both sides of a sleep need.
pub fn publish_before_looking() {
    fence(Ordering::SeqCst);
}

fn timespec(duration: Duration) -> libc::timespec {
    libc::timespec {
        tv_sec: libc::time_t::try_from(duration.as_secs()).unwrap_or(libc::time_t::MAX),
        tv_nsec: libc::c_long::from(duration.subsec_nanos() as i32),
    }
}

fn now() -> libc::timespec {
    let mut now = libc::timespec { tv_sec: 0, tv_nsec: 0 };
    // SAFETY: `now` is a valid timespec to write to.
    unsafe { libc::clock_gettime(libc::CLOCK_MONOTONIC, &raw mut now) };
    now
}

/// Nanoseconds on the monotonic clock, which all processes of a machine share.
#[must_use]
pub fn now_ns() -> u64 {
    let now = now();
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Polls `ready` for at most `budget`, with pauses that leave the core to a sibling thread.
pub fn spin(budget: Duration, mut ready: impl FnMut() -> bool) -> bool {
    if ready() {
        return true;
    }
    if budget.is_zero() {
        return false;
    }
    let start = Instant::now();
    loop {
        for _ in 0..32 {
            std::hint::spin_loop();
        }
        if ready() {
            return true;
        }
        if start.elapsed() >= budget {
            return false;
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use super::*;
    use crate::memory::Memfd;

    #[test]
    fn a_sleeper_is_woken_through_another_mapping_of_the_same_memory() {
        let file = Memfd::create("test", 4096).unwrap();
        let (ours, theirs) = (file.map(false).unwrap(), file.map_read_only().unwrap());
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let word = Word { memory: &theirs, offset: 8 };
                while word.load() == 0 {
                    word.wait(0, Duration::from_secs(60));
                }
            });
            std::thread::sleep(Duration::from_millis(20));
            ours.store_u32(8, 1);
            Word { memory: &ours, offset: 8 }.wake();
        });
        assert_eq!(theirs.load_u32(8), 1);
    }

    #[test]
    fn waiting_on_many_words_ends_when_one_of_them_changes() {
        let file = Memfd::create("test", 4096).unwrap();
        let map = file.map(false).unwrap();
        let bell = Bell::default();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                loop {
                    let words: Vec<_> = (0..5).map(|i| (Word { memory: &map, offset: i * 64 }, 0)).collect();
                    if words.iter().any(|(word, _)| word.load() != 0) {
                        break;
                    }
                    if wait_any((&bell, 0), &words, Duration::from_secs(60)).is_err() {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(20));
            map.store_u32(3 * 64, 9);
            Word { memory: &map, offset: 3 * 64 }.wake();
        });
        assert_eq!(map.load_u32(3 * 64), 9);
    }

    #[test]
    fn a_bell_wakes_its_sleeper() {
        let bell = Bell::default();
        std::thread::scope(|scope| {
            scope.spawn(|| {
                loop {
                    bell.say_sleeping(true);
                    let seen = bell.seen();
                    if seen != 0 {
                        break;
                    }
                    if wait_any((&bell, seen), &[], Duration::from_secs(60)).is_err() {
                        std::thread::sleep(Duration::from_millis(1));
                    }
                }
            });
            std::thread::sleep(Duration::from_millis(20));
            bell.ring();
        });
        assert_eq!(bell.seen(), 1);
    }

    #[test]
    fn waiting_ends_at_the_timeout() {
        let map = Memfd::create("test", 4096).unwrap().map(false).unwrap();
        let word = Word { memory: &map, offset: 0 };
        word.wait(0, Duration::from_millis(5));
        let _ = wait_any((&Bell::default(), 0), &[(word, 0)], Duration::from_millis(5));
        assert!(!spin(Duration::from_millis(1), || false));
    }
}
