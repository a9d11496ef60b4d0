//! How sessions end.

use std::io;
use std::os::fd::OwnedFd;

use kvoyant_protocol::control::Failure;
use kvoyant_protocol::memory::MemoryError;
use thiserror::Error;

use super::HANDSHAKE_TIMEOUT;
use crate::lane::Over;
use crate::metrics::How;

/// Why a session ended.
#[derive(Debug, Error)]
pub(crate) enum Ended {
    #[error("the client has gone")]
    HungUp,
    #[error("{0}")]
    Protocol(String),
    #[error("{0}")]
    Failed(String),
    #[error("{reason}")]
    Surplus { reason: String, fds: Vec<OwnedFd>, ours: bool },
    #[error("{0}")]
    Refused(Failure),
    #[error("socket error: {0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Memory(#[from] MemoryError),
    #[error("the client took more than {} s for the handshake", HANDSHAKE_TIMEOUT.as_secs())]
    TooSlow,
}

impl From<Over> for Ended {
    fn from(Over { reason, ours }: Over) -> Self {
        if ours { Self::Failed(reason) } else { Self::Protocol(reason) }
    }
}

impl Ended {
    /// Descriptors that came where none, or others, were wanted: what closes them is not this thread.
    pub(super) fn take_surplus(&mut self) -> Vec<OwnedFd> {
        if let Self::Surplus { fds, .. } = self { std::mem::take(fds) } else { Vec::new() }
    }

    /// What metrics call it.
    pub(super) fn how(&self) -> How {
        match self {
            Self::HungUp => How::Reaped,
            Self::Protocol(_) | Self::Surplus { ours: false, .. } => How::Rejected,
            Self::Surplus { ours: true, .. } => How::Failed,
            Self::Refused(Failure::Protocol(_)) => How::Rejected,
            Self::Refused(_) => How::Refused,
            Self::Failed(_) | Self::Io(_) | Self::Memory(_) => How::Failed,
            Self::TooSlow => How::TooSlow,
        }
    }
}
