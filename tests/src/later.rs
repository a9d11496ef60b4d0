//! A daemon of a later minor of the protocol, as far as a client can tell: this side's daemon behind a relay that says so.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use kvoyant_protocol::MINOR;
use kvoyant_protocol::control::{ToClient, decode, encode};
use kvoyant_protocol::packet::{self, Packet};
use nix::sys::socket::{Shutdown, shutdown};

use crate::Daemon;

/// What a later minor's `Welcome` has behind the fields that this one knows.
const UNKNOWN_FIELDS: [u8; 5] = [3, 1, 4, 1, 5];

/// Listens at a socket of its own, and hands everything on to the daemon and back.
#[derive(Debug)]
pub struct Later {
    folder: tempfile::TempDir,
}

impl Later {
    /// In front of this daemon. Its threads end with their connections, and with the test.
    ///
    /// # Panics
    /// If there is no socket to be had.
    #[must_use]
    pub fn before(daemon: &Daemon) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let listener = packet::listen_at(&folder.path().join("later.sock"), 0o600).expect("a socket");
        // It is one of whole messages; accepting is the same.
        let listener = UnixListener::from(listener);
        let daemon = daemon.socket();
        std::thread::spawn(move || {
            for client in listener.incoming().map_while(Result::ok) {
                relay(client.into(), &daemon);
            }
        });
        Self { folder }
    }

    /// Its socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.folder.path().join("later.sock")
    }
}

/// Two threads for one client, which end when either side hangs up.
fn relay(client: OwnedFd, daemon: &Path) {
    let Ok(daemon) = packet::connect_to(daemon) else { return };
    let (client, daemon) = (Arc::new(client), Arc::new(daemon));
    for (from, to, welcomes) in [(&client, &daemon, false), (&daemon, &client, true)] {
        let (from, to) = (Arc::clone(from), Arc::clone(to));
        std::thread::spawn(move || {
            while let Ok(Packet { bytes, fds }) = packet::receive(from.as_fd()) {
                let bytes = if welcomes { of_a_later_minor(bytes) } else { bytes };
                let fds: Vec<_> = fds.iter().map(AsFd::as_fd).collect();
                if bytes.is_empty() || packet::send(to.as_fd(), &bytes, &fds).is_err() {
                    break;
                }
            }
            // The other thread sees that, too.
            for socket in [&from, &to] {
                let _ = shutdown(socket.as_raw_fd(), Shutdown::Both);
            }
        });
    }
}

/// A welcome as the next minor could say it; anything else as it is.
fn of_a_later_minor(bytes: Vec<u8>) -> Vec<u8> {
    match decode(&bytes) {
        Ok(ToClient::Welcome { features, session, boot_id, limits, .. }) => {
            let mut bytes =
                encode(&ToClient::Welcome { features, session, boot_id, limits, minor: MINOR + 1 });
            bytes.extend(UNKNOWN_FIELDS);
            bytes
        }
        _ => bytes,
    }
}
