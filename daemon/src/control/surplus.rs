//! Descriptors that nobody asked for. To close one may take as long as its sender likes: a socket that lingers, a file of a user's own file
//! system whose server does not answer. So they are closed by a thread of their own, and until that is done their connection
//! counts among its user's.
//!
//! A file system that never answers keeps such a thread for good, and keeps the process from ending until its server has gone. No system
//! call takes a message and leaves its descriptors.

use std::os::fd::OwnedFd;

use nix::fcntl::{FcntlArg, fcntl};

/// Whether it is a memfd, or another file in memory: to close one waits for nobody.
pub(super) fn is_memory(fd: &OwnedFd) -> bool {
    fcntl(fd, FcntlArg::F_GET_SEALS).is_ok()
}

/// Closes descriptors elsewhere, and then lets go of what stands for their connection.
pub(super) fn close(fds: Vec<OwnedFd>, connection: impl Send + 'static) {
    if fds.is_empty() {
        return;
    }
    let closing = std::thread::Builder::new().name("closing".into()).stack_size(64 << 10).spawn(move || {
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
        assert!(is_memory(&memory.as_fd().try_clone_to_owned().unwrap()));
        let socket = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        for other in [OwnedFd::from(std::fs::File::open("/dev/null").unwrap()), OwnedFd::from(socket)] {
            assert!(!is_memory(&other));
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
