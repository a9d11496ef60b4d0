//! What the service manager hands over: sockets that it made, and that somebody may have connected to already, and files of sessions that it
//! stored for an earlier daemon.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};

use kvoyant_protocol::inherited;
use nix::sys::socket::{SockType, UnixAddr, getsockname, getsockopt, sockopt};
use thiserror::Error;

use crate::keep::{self, Named};

/// What a socket unit calls its descriptors unless it has `FileDescriptorName=`: then the kind of socket says which it is.
const UNIT: &str = "kvoyantd.socket";

/// What cannot be taken over.
#[derive(Debug, Error)]
pub enum InheritError {
    /// The environment is not as the manager would make it.
    #[error(
        "cannot take what the service manager handed over: {0}; unset LISTEN_PID, LISTEN_FDS and LISTEN_FDNAMES to start without them"
    )]
    Environment(io::Error),
    /// Something else than a listening socket of the right kind.
    #[error(
        "the service manager's descriptor `{name}` is not what it is to be: {reason}; see systemd/kvoyantd.socket"
    )]
    Kind {
        /// What it is called.
        name: String,
        /// What is wrong with it.
        reason: String,
    },
}

/// A socket that listens already, and where.
#[derive(Debug)]
pub(crate) struct Listener {
    pub(crate) socket: OwnedFd,
    pub(crate) path: PathBuf,
}

/// Everything that was handed over, until somebody takes it.
#[derive(Debug, Default)]
pub(crate) struct Inherited(Vec<(String, OwnedFd)>);

impl Inherited {
    /// Takes what was handed over to this process. Only the first call gets something.
    ///
    /// # Errors
    /// An environment that makes no sense.
    pub(crate) fn take() -> Result<Self, InheritError> {
        inherited::take().map(Self).map_err(InheritError::Environment)
    }

    /// Takes files of sessions.
    pub(crate) fn sessions(&mut self) -> Vec<Named> {
        keep::ours(&mut self.0)
    }

    /// Takes the listening socket of this name, or of the socket unit's, that is of this kind.
    ///
    /// # Errors
    /// One of the name that is something else.
    pub(crate) fn listener(&mut self, name: &str, kind: SockType) -> Result<Option<Listener>, InheritError> {
        let fits = |(its, fd): &(String, OwnedFd)| {
            its == name || its == UNIT && getsockopt(fd, sockopt::SockType) == Ok(kind)
        };
        let Some(at) = self.0.iter().position(fits) else { return Ok(None) };
        let (name, socket) = self.0.remove(at);
        match listens_at(socket.as_fd(), kind) {
            Ok(path) => Ok(Some(Listener { socket, path })),
            Err(reason) => Err(InheritError::Kind { name, reason }),
        }
    }

    /// What nobody has taken.
    pub(crate) fn names(&self) -> impl Iterator<Item = &str> {
        self.0.iter().map(|(name, _)| name.as_str())
    }
}

fn listens_at(socket: BorrowedFd<'_>, kind: SockType) -> Result<PathBuf, String> {
    let said = |errno: nix::errno::Errno| errno.desc().to_owned();
    if getsockopt(&socket, sockopt::SockType).map_err(said)? != kind {
        return Err(match kind {
            SockType::SeqPacket => "it must be ListenSequentialPacket=".into(),
            _ => "it must be ListenStream=".into(),
        });
    }
    if !getsockopt(&socket, sockopt::AcceptConn).map_err(said)? {
        return Err("it does not listen".into());
    }
    let address: UnixAddr = getsockname(socket.as_raw_fd()).map_err(said)?;
    address.path().map(Path::to_path_buf).ok_or_else(|| "it has no path".into())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    fn sockets_are_found_by_name_or_by_the_units_name_and_their_kind() {
        let folder = tempfile::tempdir().unwrap();
        let listening = |name: &str| UnixListener::bind(folder.path().join(name)).unwrap().into();
        let control = kvoyant_protocol::packet::listen_at(&folder.path().join("c"), 0o600).unwrap();
        let all = vec![
            ("other".to_owned(), listening("o")),
            (UNIT.to_owned(), listening("a")),
            (UNIT.to_owned(), control),
            ("odd".to_owned(), UnixStream::pair().unwrap().0.into()),
        ];
        let mut inherited = Inherited(all);
        let control = inherited.listener("control", SockType::SeqPacket).unwrap().unwrap();
        assert_eq!(control.path, folder.path().join("c.new"), "where it was bound");
        let admin = inherited.listener("admin", SockType::Stream).unwrap().unwrap();
        assert_eq!(admin.path, folder.path().join("a"));
        assert!(inherited.listener("admin", SockType::Stream).unwrap().is_none());
        let error = inherited.listener("other", SockType::SeqPacket).unwrap_err().to_string();
        assert!(error.contains("ListenSequentialPacket"), "{error}");
        let error = inherited.listener("odd", SockType::Stream).unwrap_err().to_string();
        assert!(error.contains("does not listen"), "{error}");
        assert_eq!(inherited.names().count(), 0);
    }

    #[test]
    fn what_was_handed_over_is_had_once() {
        assert_eq!(Inherited::take().unwrap().names().count(), 0, "no manager started this test");
        assert_eq!(Inherited::take().unwrap().names().count(), 0);
    }
}
