//! Descriptors that a service manager hands to a process which it starts: `LISTEN_PID`, `LISTEN_FDS` and `LISTEN_FDNAMES`, as systemd has it.

use std::io;
use std::os::fd::{FromRawFd, OwnedFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};

/// Number of the first of them.
const FIRST: RawFd = 3;

/// More than any manager hands over.
const MOST: u32 = 1 << 20;

/// Takes what was handed to this process, each with its name; from now on it is closed where this process starts another program. Only the
/// first call gets any, whoever it is for: sockets and stored files come together.
///
/// # Errors
/// A descriptor that is said to be there and is not open.
pub fn take() -> io::Result<Vec<(String, OwnedFd)>> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let number = |key| std::env::var(key).ok().and_then(|text| text.parse::<u32>().ok());
    let ours = number("LISTEN_PID") == Some(std::process::id());
    let count = number("LISTEN_FDS").unwrap_or(0).min(MOST);
    if !ours || count == 0 || TAKEN.swap(true, Ordering::Relaxed) {
        return Ok(Vec::new());
    }
    let names = std::env::var("LISTEN_FDNAMES").unwrap_or_default();
    let mut names = names.split(':');
    let mut all = Vec::with_capacity(count as usize);
    for fd in FIRST..FIRST + count as RawFd {
        // SAFETY: a system call on plain numbers.
        if unsafe { libc::fcntl(fd, libc::F_SETFD, libc::FD_CLOEXEC) } != 0 {
            return Err(io::Error::last_os_error());
        }
        // SAFETY: it is open, as was just seen; whoever started this process opened it for us, and nobody else in it takes it: this runs once.
        all.push((names.next().unwrap_or_default().to_owned(), unsafe { OwnedFd::from_raw_fd(fd) }));
    }
    Ok(all)
}
