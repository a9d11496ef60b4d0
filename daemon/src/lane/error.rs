//! Why a lane ends a session.

use kvoyant_protocol::control::Failure;
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::ring::RingError;
use kvoyant_protocol::wire::{FEEDBACK_MAX, RequestError, SCORES_MAX, SequenceId, WORK_MAX};
use thiserror::Error;

use crate::lane::mailbox::ReportError;
use crate::metrics::Rejection;

/// Why a session ends.
#[derive(Debug, Error)]
pub enum SessionError {
    /// Ring indices that cannot be.
    #[error(transparent)]
    Ring(#[from] RingError),
    /// A descriptor that cannot be.
    #[error(transparent)]
    Request(#[from] RequestError),
    /// Memory that could not be had, or an access outside it.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// A request before a model was registered.
    #[error("a request came before a model was registered")]
    NoModel,
    /// A sequence that is not open.
    #[error("{0}")]
    Sequence(Failure),
    /// A layer that the model does not have.
    #[error("layer {layer} is not one of those that can be {verb} (the model has {layers})")]
    Layer {
        /// The layer.
        layer: u16,
        /// What was to be done.
        verb: &'static str,
        /// Layers of the model.
        layers: usize,
    },
    /// Tickets out of order.
    #[error(
        "ticket {ticket} with release through {released} cannot follow ticket {last} with {released_before}"
    )]
    Ticket {
        /// The ticket.
        ticket: u64,
        /// What it releases.
        released: u64,
        /// The ticket before.
        last: u64,
        /// What was released before.
        released_before: u64,
    },
    /// Rows appended elsewhere than at the end, or beyond the room.
    #[error(
        "{count} rows at {position} of sequence {sequence} cannot be appended in layer {layer}: it has {len} and room for {room}"
    )]
    Append {
        /// Which sequence.
        sequence: SequenceId,
        /// Which layer.
        layer: usize,
        /// First row.
        position: u32,
        /// Rows.
        count: u32,
        /// Rows it has.
        len: u32,
        /// Rows it has room for.
        room: usize,
    },
    /// Rows for a sequence that is being written to an image, or filled from one, or cut.
    #[error("rows came for sequence {sequence} before its control request was answered")]
    Stays {
        /// Which sequence.
        sequence: SequenceId,
    },
    /// A hint or other payload of the wrong size or place.
    #[error("a payload of {bytes} bytes at {offset} does not fit: {wanted} bytes within {have} are needed")]
    Payload {
        /// Where it is said to begin.
        offset: usize,
        /// Its size.
        bytes: usize,
        /// What its size must be.
        wanted: usize,
        /// Bytes of all payloads.
        have: usize,
    },
    /// Attention rows for a method that learns from none.
    #[error("feedback came for sequence {sequence}, whose method learns from none")]
    NoFeedback {
        /// Which sequence.
        sequence: SequenceId,
    },
    /// An attention weight that is none.
    #[error("feedback for sequence {sequence} has a weight of {weight}, which is not within 0..=1")]
    Weight {
        /// Which sequence.
        sequence: SequenceId,
        /// The weight.
        weight: f32,
    },
    /// A mark that is none.
    #[error("a mark of sequence {sequence} is {mark}, and the largest is {}", kvoyant_methods::mark::LINE)]
    Mark {
        /// Which sequence.
        sequence: SequenceId,
        /// The mark.
        mark: u8,
    },
    /// Marks or attention rows of tokens that cannot be, or marks of tokens that have been appended already.
    #[error("marks or feedback up to token {end} do not fit sequence {sequence}, which has room for {room}")]
    Tokens {
        /// Which sequence.
        sequence: SequenceId,
        /// Tokens up to which they go.
        end: usize,
        /// Tokens that it has room for.
        room: usize,
    },
    /// A batch with more candidates than a lane can be asked to look at in one go.
    #[error(
        "a speculation of {products} products of 64 values and more is larger than {WORK_MAX}; split the batch, or the \
         block of query tokens"
    )]
    Work {
        /// Products so far: tokens by query heads and query tokens, heads of more than 64 values counted by their length.
        products: usize,
    },
    /// More scores than a method may keep at a time.
    #[error(
        "{queries} query tokens with {group} query heads each for {tokens} tokens have more than {SCORES_MAX} scores; \
         send fewer query tokens at once"
    )]
    Scores {
        /// Query tokens.
        queries: usize,
        /// Query heads of a KV head.
        group: usize,
        /// Tokens of the member.
        tokens: usize,
    },
    /// A longer attention row than a lane takes in at a time.
    #[error("feedback of {weights} weights for all KV heads is longer than {FEEDBACK_MAX}")]
    Feedback {
        /// Weights.
        weights: usize,
    },
    /// A control request that failed after it had begun.
    #[error("a request failed half way: {0}")]
    HalfWay(String),
    /// A report of graph mode that cannot be.
    #[error(transparent)]
    Report(#[from] ReportError),
    /// Copies that the device could not do: what lies in their slots is not what the lane believes.
    #[error("the device could not copy the rows of ticket {ticket}; the log says why")]
    Transfer {
        /// The answer's ticket.
        ticket: u64,
    },
    /// Completions that nobody reads.
    #[error("the completion ring is full: answers were released without being read")]
    CompletionsFull,
}

impl SessionError {
    /// Whether it is the daemon that failed, and not the client that asked for what cannot be.
    pub(crate) fn is_ours(&self) -> bool {
        matches!(self, Self::HalfWay(_) | Self::Transfer { .. })
    }

    /// What metrics call it, where it is a descriptor of the client's that was refused.
    pub(crate) fn rejection(&self) -> Option<Rejection> {
        match self {
            Self::Ring(_) | Self::CompletionsFull => Some(Rejection::Ring),
            Self::Request(_) => Some(Rejection::Format),
            Self::Ticket { .. } | Self::Append { .. } | Self::Stays { .. } => Some(Rejection::Order),
            Self::NoModel
            | Self::Sequence(_)
            | Self::Layer { .. }
            | Self::Payload { .. }
            | Self::NoFeedback { .. }
            | Self::Weight { .. }
            | Self::Mark { .. }
            | Self::Tokens { .. }
            | Self::Report(_) => Some(Rejection::Contents),
            Self::Work { .. } | Self::Scores { .. } | Self::Feedback { .. } => Some(Rejection::Work),
            Self::Memory(_) | Self::HalfWay(_) | Self::Transfer { .. } => None,
        }
    }
}
