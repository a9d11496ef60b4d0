//! Sleeping on many words at once.

use std::io;
use std::time::Duration;

use crate::faults::{self, Point};

use super::{Bell, Word, now, timespec};

/// How many words [`wait_any`] can watch at once (the kernel's limit).
pub const WAIT_ANY_MAX: usize = 128;

#[repr(C)]
#[derive(Clone, Copy)]
struct FutexWaitv {
    value: u64,
    address: u64,
    flags: u32,
    reserved: u32,
}

/// Sleeps until the bell or any word differs from the value seen, a wake-up comes, or the timeout passes. The bell
/// and the first [`WAIT_ANY_MAX`]` - 1` words are watched. Needs Linux 5.16; on an older kernel, and where a
/// container may not ask for it, it returns `Unsupported` or what the container's runtime says.
pub fn wait_any(bell: (&Bell, u32), words: &[(Word<'_>, u32)], timeout: Duration) -> io::Result<()> {
    const FUTEX_32: u32 = 2;
    faults::check(Point::FutexWaitMany)?;
    let mut waiters = [FutexWaitv { value: 0, address: 0, flags: FUTEX_32, reserved: 0 }; WAIT_ANY_MAX];
    let count = (words.len() + 1).min(WAIT_ANY_MAX);
    waiters[0].value = u64::from(bell.1);
    waiters[0].address = bell.0.rung.address();
    for (waiter, (word, seen)) in waiters[1..].iter_mut().zip(words) {
        waiter.value = u64::from(*seen);
        waiter.address = word.memory.futex_word(word.offset) as u64;
    }
    // The system call takes an absolute time.
    let now = now();
    let wait = timespec(timeout);
    let mut until = libc::timespec {
        tv_sec: now.tv_sec.saturating_add(wait.tv_sec),
        tv_nsec: now.tv_nsec + wait.tv_nsec,
    };
    if until.tv_nsec >= 1_000_000_000 {
        until.tv_nsec -= 1_000_000_000;
        until.tv_sec = until.tv_sec.saturating_add(1);
    }
    // SAFETY: `waiters[..count]` is initialised and every address is an aligned word that the borrows of
    // `bell` and `words` keep alive; `until` outlives the call.
    let result = unsafe {
        libc::syscall(
            libc::SYS_futex_waitv,
            waiters.as_ptr(),
            count as libc::c_uint,
            0,
            &raw const until,
            libc::CLOCK_MONOTONIC,
        )
    };
    if result >= 0 {
        return Ok(());
    }
    let error = io::Error::last_os_error();
    match error.raw_os_error() {
        Some(libc::EAGAIN | libc::ETIMEDOUT | libc::EINTR) => Ok(()),
        Some(libc::ENOSYS) => Err(io::Error::new(io::ErrorKind::Unsupported, "there is no futex_waitv here")),
        _ => Err(error),
    }
}

/// Sleeps until the bell differs from the value seen, a wake-up comes, or the timeout passes: what is left where [`wait_any`] cannot be had.
pub fn wait_for_bell((bell, seen): (&Bell, u32), timeout: Duration) {
    let timeout = timespec(timeout);
    // SAFETY: the address is of an aligned word that the borrow of `bell` keeps alive; the kernel only reads it, and the timeout outlives
    // the call.
    unsafe {
        libc::syscall(
            libc::SYS_futex,
            bell.rung.address(),
            libc::FUTEX_WAIT,
            seen,
            &raw const timeout,
            std::ptr::null::<u32>(),
            0,
        )
    };
}
