//! Descriptors that nobody asked for. To close one may take as long as its sender likes: a socket that lingers, a file of a user's own file
//! system whose server does not answer; and so may closing a client's socket, in which messages with such descriptors lie unread. So they are
//! closed by a thread of their own, and until that is done their connection counts among its user's.
//!
//! A file system that never answers keeps such a thread for good, and keeps the process from ending until its server has gone. No system
//! call takes a message and leaves its descriptors.

use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::fcntl::{FcntlArg, fcntl};

use crate::artifacts::ARTIFACTS_MAX;

/// Bytes of memory that what comes beside one message may hold: huge pages round up.
const HELD_MAX: u64 = 2 * ARTIFACTS_MAX;

/// Threads that may be closing something at a time.
const AT_ONCE: usize = 1024;

static CLOSING: AtomicUsize = AtomicUsize::new(0);

/// Why these are nothing that a message brings; none if they are memfds, or other files in memory, and hold no more of it all together than
/// artifacts may have: to close such waits for nobody, and frees what is freed in no time.
pub(super) fn not_wanted(fds: &[OwnedFd]) -> Option<String> {
    let mut held = 0_u64;
    for fd in fds {
        if fcntl(fd, FcntlArg::F_GET_SEALS).is_err() {
            return Some("a descriptor that is no memfd".into());
        }
        match nix::sys::stat::fstat(fd) {
            Ok(found) => held = held.saturating_add(found.st_blocks.unsigned_abs().saturating_mul(512)),
            Err(error) => return Some(format!("a memfd of which nothing can be said ({error})")),
        }
    }
    (held > HELD_MAX).then(|| format!("{held} bytes of memfds, where {HELD_MAX} are the most,"))
}

/// Closes descriptors elsewhere, and then lets go of what stands for their connection.
pub(super) fn close(fds: Vec<OwnedFd>, connection: impl Send + 'static) {
    if fds.is_empty() {
        return;
    }
    struct Counted;
    impl Drop for Counted {
        fn drop(&mut self) {
            CLOSING.fetch_sub(1, Ordering::Relaxed);
        }
    }
    if CLOSING.fetch_add(1, Ordering::Relaxed) >= AT_ONCE {
        let _counted = Counted;
        tracing::warn!("{AT_ONCE} connections are being closed, and one more waits for its client");
        return drop((fds, connection));
    }
    let counted = Counted;
    let closing = std::thread::Builder::new().name("closing".into()).stack_size(64 << 10).spawn(move || {
        let _counted = counted;
        drop(fds);
        drop(connection);
    });
    if let Err(error) = closing {
        // The closure has gone with the error, and what it held.
        tracing::warn!("descriptors of a client were closed by the control thread: {error}");
    }
}

#[cfg(test)]
mod tests {
    use std::os::fd::AsFd;
    use std::sync::Arc;
    use std::time::{Duration, Instant};

    use kvoyant_protocol::memory::Memfd;

    use super::*;

    #[test]
    fn files_in_memory_are_told_from_all_others() {
        let memory = Memfd::create("test", 4096).unwrap();
        assert_eq!(not_wanted(&[memory.as_fd().try_clone_to_owned().unwrap()]), None);
        // What has no memory yet is refused by who knows how large it may be.
        assert_eq!(
            not_wanted(&[Memfd::create("test", 1 << 40).unwrap().as_fd().try_clone_to_owned().unwrap()]),
            None
        );
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for other in [OwnedFd::from(std::fs::File::open("/dev/null").unwrap()), OwnedFd::from(socket)] {
            assert!(not_wanted(&[other]).unwrap().contains("no memfd"));
        }
    }

    #[test]
    fn a_connection_counts_until_its_descriptors_are_closed() {
        let connection = Arc::new(());
        let (a, b) = std::os::unix::net::UnixStream::pair().unwrap();
        close(vec![a.into()], Arc::clone(&connection));
        // Its other end sees that it has been closed.
        let mut byte = [0];
        assert_eq!(std::io::Read::read(&mut &b, &mut byte).unwrap(), 0);
        let since = Instant::now();
        while Arc::strong_count(&connection) > 1 {
            assert!(since.elapsed() < Duration::from_secs(60));
            std::thread::yield_now();
        }
    }
}
