//! How sessions end.

use std::io;

use kvoyant_protocol::control::Failure;
use kvoyant_protocol::memory::MemoryError;
use thiserror::Error;

use super::HANDSHAKE_TIMEOUT;
use crate::metrics::How;

/// Why a session ended.
#[derive(Debug, Error)]
pub(crate) enum Ended {
    #[error("the client has gone")]
    HungUp,
    #[error("{0}")]
    Protocol(String),
    #[error("{0}")]
    Refused(Failure),
    #[error("socket error: {0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Memory(#[from] MemoryError),
    #[error("the client took more than {} s for the handshake", HANDSHAKE_TIMEOUT.as_secs())]
    TooSlow,
}

impl Ended {
    /// What metrics call it.
    pub(super) fn how(&self) -> How {
        match self {
            Self::HungUp => How::Reaped,
            Self::Protocol(_) => How::Rejected,
            Self::Refused(Failure::Protocol(_)) => How::Rejected,
            Self::Refused(_) => How::Refused,
            Self::Io(_) | Self::Memory(_) => How::Failed,
            Self::TooSlow => How::TooSlow,
        }
    }
}
