//! Why something was not done, in sentences that say what to do.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::memory::MemoryError;
use crate::quota::OverQuota;
use crate::wire::SequenceId;

/// Why a control request was not done.
#[derive(Debug, Clone, PartialEq, Eq, Error, Serialize, Deserialize)]
pub enum Failure {
    /// No room in the arena.
    #[error(
        "the arena is full: {} more are needed and {} of {} are free; {}", mib(.needed_bytes), mib(.free_bytes), mib(.arena_bytes), advice(.closing)
    )]
    Backpressure {
        /// Bytes that the request needs beyond what the session has.
        needed_bytes: u64,
        /// Bytes that are free for it.
        free_bytes: u64,
        /// Bytes of the whole arena.
        arena_bytes: u64,
        /// Sequences of this session which, closed, would free enough; empty if none would.
        closing: Vec<SequenceId>,
    },
    /// No room for page tables and digests.
    #[error(
        "tables and digests need {wanted_bytes} bytes more and {free_bytes} are free for them; close sequences, or raise the daemon's arena size"
    )]
    TablesFull {
        /// Bytes that would be needed, at most.
        wanted_bytes: u64,
        /// Bytes that are left.
        free_bytes: u64,
    },
    /// A handle that is not open.
    #[error("sequence {0} is not open")]
    NoSuchSequence(SequenceId),
    /// The limit of open sequences is reached.
    #[error("{max} sequences are open, which is this session's limit")]
    TooManySequences {
        /// The limit.
        max: u32,
    },
    /// A model that cannot be served.
    #[error("the model cannot be registered: {0}")]
    BadModel(String),
    /// A method, or its artifact, that cannot be used.
    #[error("{0}")]
    BadMethod(String),
    /// No room on the device.
    #[error(
        "the device has no room for this session: {} are needed and {} of the {} set aside for sessions are free ({} wait for dead \
         processes to let go); close sessions, ask for a smaller slab, or raise the daemon's device_memory", mib(.needed_bytes), mib(.free_bytes), mib(.set_aside_bytes), mib(.quarantined_bytes)
    )]
    DeviceFull {
        /// Bytes that the session needs.
        needed_bytes: u64,
        /// Bytes that are free for it.
        free_bytes: u64,
        /// Bytes that the operator has set aside for all sessions.
        set_aside_bytes: u64,
        /// Bytes of ended sessions whose importers may not have gone yet.
        quarantined_bytes: u64,
    },
    /// The device is there, and cannot serve this client.
    #[error("the device cannot serve this client: {0}")]
    Device(String),
    /// A sequence that cannot be served in graph mode.
    #[error("sequence {sequence} cannot be served in graph mode: {reason}")]
    Graph {
        /// Which sequence.
        sequence: SequenceId,
        /// Why.
        reason: String,
    },
    /// The device is gone for this daemon; its supervisor starts another one.
    #[error(
        "the device is lost: {0}; the session's rows are still in its own memory, and a restarted daemon takes new sessions"
    )]
    DeviceLost(String),
    /// No more sessions.
    #[error("{max} sessions are open, which is the daemon's limit (max_sessions)")]
    TooManySessions {
        /// The limit.
        max: u32,
    },
    /// The client broke the protocol; the session ends.
    #[error("protocol error: {0}")]
    Protocol(String),
    /// The daemon failed inside.
    #[error("the daemon failed: {0}")]
    Internal(String),
    /// An image that cannot be written, or read.
    #[error("image {image:?}: {reason}")]
    Image {
        /// What it is called.
        image: String,
        /// Why not.
        reason: String,
    },
    /// Rows that are to stay were lost with their page.
    #[error(
        "the rows of sequence {sequence} from token {token} on are lost: drop them, and compute them again"
    )]
    RowsLost {
        /// Which sequence.
        sequence: SequenceId,
        /// First token that is lost.
        token: u32,
    },
    /// Host memory that the budget has could not be made ready.
    #[error("host memory cannot be made ready: {0}")]
    NotReady(String),
    /// The daemon serves others.
    #[error(
        "user {uid} may not connect: neither it nor a group of its is in the daemon's allow_users and allow_groups"
    )]
    NotAllowed {
        /// The client's user, as the kernel says.
        uid: u32,
    },
    /// More connections than the daemon keeps before they are sessions.
    #[error(
        "{max} connections of this user have yet to finish their handshake, which is the daemon's limit; finish or close them, \
         and try again"
    )]
    TooManyConnections {
        /// The limit.
        max: u32,
    },
    /// A quota of the client's user is reached. What it has it keeps.
    #[error(transparent)]
    Quota(OverQuota),
    /// The daemon takes no new sessions. Since minor 1.
    #[error("the daemon is being drained and takes no new sessions; try again later, or use another one")]
    Draining,
    /// A claim of a session that this daemon does not keep for this client. Since minor 1.
    #[error(
        "session {session} is not kept for you here: it has ended, or its token or its user is another one; connect again"
    )]
    NotKept {
        /// Which session.
        session: u64,
    },
}

impl From<MemoryError> for Failure {
    fn from(error: MemoryError) -> Self {
        Self::Internal(error.to_string())
    }
}

pub(crate) fn mib(bytes: &u64) -> String {
    format!("{:.1} MiB", *bytes as f64 / f64::from(1 << 20))
}

fn advice(closing: &[SequenceId]) -> String {
    if closing.is_empty() {
        return "no other sequence of this session would free enough: raise the daemon's arena size (--arena), or use shorter \
                prompts"
            .into();
    }
    let names: Vec<_> = closing.iter().map(ToString::to_string).collect();
    format!("closing {} would free enough", names.join(", "))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn backpressure_says_what_would_help() {
        let mut failure = Failure::Backpressure {
            needed_bytes: 100,
            free_bytes: 5,
            arena_bytes: 200,
            closing: vec![SequenceId { slot: 3, generation: 1 }],
        };
        assert!(failure.to_string().ends_with("closing 3.1 would free enough"));
        if let Failure::Backpressure { closing, .. } = &mut failure {
            closing.clear();
        }
        assert!(failure.to_string().contains("raise the daemon's arena size"));
    }
}
