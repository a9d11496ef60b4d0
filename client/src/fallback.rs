//! What stands in for an answer that does not come in time.

use std::time::Duration;

/// What an engine does about a layer whose rows are not there by the time that it wants them. It is chosen for a session
/// ([`Options::fallback`](crate::Options::fallback)) or a request ([`Pending::or_late`](crate::Pending::or_late)).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fallback {
    /// Wait for it: until the engine's own deadline, which is an error. What is selected never depends on the clock then.
    #[default]
    Wait,
    /// Attend to what is there: sinks, the recent window, and the rows that the layer's last answer named, all of which this process can
    /// read in the session's extents. The rest is left out.
    Partial,
    /// Attend to sinks and the recent window alone, which the engine holds itself.
    ResidentOnly,
}

impl std::fmt::Display for Fallback {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Wait => "wait",
            Self::Partial => "partial",
            Self::ResidentOnly => "resident-only",
        })
    }
}

/// What a session has asked for, and its lane has not taken yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Backlog {
    /// Another one once the lane has taken a request, or another daemon serves the session.
    pub taken: Taken,
    /// Requests that wait in the ring.
    pub waiting: u32,
    /// How many more it has room for.
    pub room: u32,
}

/// How far a lane has come, to be compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Taken {
    pub(crate) boot_id: u64,
    pub(crate) head: u32,
}

/// What came of waiting for an answer for as long as a [`Fallback`] allows.
#[derive(Debug)]
pub enum InTime<T> {
    /// It came.
    Answered(T),
    /// It did not, and has been given up: the engine goes on with what it has.
    Late {
        /// How long was waited for it.
        waited: Duration,
    },
}
