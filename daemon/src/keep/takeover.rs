//! One daemon's sessions handed to another one, over the control socket.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use kvoyant_protocol::control::{ControlError, Failure, ToClient, ToDaemon, decode, encode};
use kvoyant_protocol::packet::{self, FDS_MAX};
use nix::fcntl::{FcntlArg, OFlag, fcntl};
use nix::sys::socket::{setsockopt, sockopt};
use nix::sys::time::{TimeVal, TimeValLike};
use thiserror::Error;

use super::{Keep, Named};

/// How long the other daemon may take for its next word: its lanes end what they are at, and so does whoever reads or writes an image.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// Why nothing is taken over.
#[derive(Debug, Error)]
pub enum TakeoverError {
    /// It cannot be asked.
    #[error("cannot take over from the daemon at {}: {source}; is it running, and are you root or its user?", path.display())]
    Socket {
        /// Its socket.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It refused.
    #[error("the daemon at {} leaves nothing to this one: {}", path.display(), reason(.failure))]
    Refused {
        /// Its socket.
        path: PathBuf,
        /// Why.
        failure: Failure,
    },
    /// It is of another version.
    #[error("cannot take over from the daemon at {}: {error}", path.display())]
    Control {
        /// Its socket.
        path: PathBuf,
        /// What it is.
        error: ControlError,
    },
}

/// A daemon that keeps no sessions says so as a failure of another kind.
fn reason(failure: &Failure) -> String {
    match failure {
        Failure::NotReady(reason) => reason.clone(),
        other => other.to_string(),
    }
}

/// Asks the daemon at this socket for all that it has, and waits until it has ended.
///
/// # Errors
/// If it is not there, refuses, or takes too long. It may have ended all the same.
pub fn take_over(path: &Path) -> Result<Vec<Named>, TakeoverError> {
    let fail = |source| TakeoverError::Socket { path: path.to_path_buf(), source };
    let socket = packet::connect_within(path, PATIENCE).map_err(fail)?;
    packet::send(socket.as_fd(), &encode(&ToDaemon::Takeover), &[]).map_err(fail)?;
    let mut all = Vec::new();
    loop {
        let packet = match packet::receive(socket.as_fd()) {
            Err(error) if error.kind() == io::ErrorKind::ConnectionReset => return Ok(all),
            packet => packet.map_err(fail)?,
        };
        if packet.bytes.is_empty() {
            return Ok(all);
        }
        let message = decode(&packet.bytes)
            .map_err(|error| TakeoverError::Control { path: path.to_path_buf(), error })?;
        match message {
            ToClient::Handed { names } => {
                for (name, fd) in names.into_iter().zip(packet.fds) {
                    match name.parse() {
                        Ok(name) => all.push((name, fd)),
                        Err(()) => tracing::warn!("the other daemon handed over `{name}`, which is nothing"),
                    }
                }
            }
            ToClient::Failed(failure) => {
                return Err(TakeoverError::Refused { path: path.to_path_buf(), failure });
            }
            other => tracing::warn!("the other daemon said {other:?} while it handed over"),
        }
    }
}

/// Hands everything to the daemon at the other end. Lanes have ended.
pub(crate) fn hand_over(keep: &Keep, socket: &OwnedFd) -> io::Result<()> {
    // It was the control plane's: here it is waited until there is room for the next message.
    fcntl(socket, FcntlArg::F_SETFL(OFlag::empty()))?;
    let patience = TimeVal::seconds(PATIENCE.as_secs() as i64);
    setsockopt(socket, sockopt::SendTimeout, &patience)?;
    let all: Vec<_> = keep.take().into_iter().collect();
    for part in all.chunks(FDS_MAX) {
        let names = part.iter().map(|(name, _)| name.to_string()).collect();
        let fds: Vec<_> = part.iter().map(|(_, fd)| fd.as_fd()).collect();
        packet::send(socket.as_fd(), &encode(&ToClient::Handed { names }), &fds)?;
    }
    Ok(())
}
