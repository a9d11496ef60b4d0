//! What lies in the rings: requests and batch entries, and in [`answer`] completions and block tables.
//!
//! The raw forms are plain structs of fixed layout, little endian. A raw form is copied out of shared memory
//! once and parsed into a checked type ([`Request`], [`Completion`]); only that goes further in.

use bytemuck::{Pod, Zeroable};
use thiserror::Error;

use crate::layout::{BATCH_ENTRY_BYTES, DESCRIPTOR_BYTES, Limits};
use crate::ring::Descriptor;

pub mod answer;

pub use answer::{
    BlockRun, Completion, CompletionError, HeadEntry, PartialLayout, RestEntry, RestLayout, STATS, Served,
    Stat, Status, TOLD, Told,
};

/// All layers of the model at once, in [`Append`].
pub const ALL_LAYERS: u16 = u16::MAX;

/// Handle of a sequence: its slot and how often the slot was used before.
#[derive(
    Debug,
    Clone,
    Copy,
    PartialEq,
    Eq,
    Hash,
    PartialOrd,
    Ord,
    Pod,
    Zeroable,
    serde::Serialize,
    serde::Deserialize,
)]
#[repr(C)]
pub struct SequenceId {
    /// Slot in the session's table.
    pub slot: u32,
    /// Generation of the slot; a stale handle has an old one.
    pub generation: u32,
}

impl std::fmt::Display for SequenceId {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}.{}", self.slot, self.generation)
    }
}

/// One member of a batch.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BatchEntry {
    /// Which sequence.
    pub sequence: SequenceId,
    /// In a speculation: the position of the token that is being computed, so that `position + 1` tokens exist; of a
    /// block of query tokens, that of its first one.
    /// In an append, and for marks: the position of the first row. For feedback: how many tokens the rows are over.
    pub position: u32,
    /// In a speculation: offset of this member's hint in the request's hint area, in bytes.
    /// In an append: how many rows.
    pub value: u32,
}

const _: () = assert!(size_of::<BatchEntry>() == BATCH_ENTRY_BYTES);

/// A request as it lies in the ring.
#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RawRequest {
    operation: u8,
    flags: u8,
    layer: u16,
    batch: u32,
    ticket: u64,
    release_through: u64,
    deadline_ns: u64,
    payload_bytes: u32,
    queries: u32,
    reserved: [u32; 5],
    must_be_zero: u32,
}

const _: () = assert!(size_of::<RawRequest>() == DESCRIPTOR_BYTES);

const SPECULATE: u8 = 1;
const APPEND: u8 = 2;
const OBSERVE: u8 = 3;
const RELEASE: u8 = 4;
const FEEDBACK: u8 = 5;
const MARK: u8 = 6;

/// Most query tokens of a block.
pub const QUERIES_MAX: u32 = 1 << 16;

/// Most scores of one KV head that a member of a speculation may come to, `query tokens · query heads of a KV head ·
/// candidates`: 64 MiB of f32.
pub const SCORES_MAX: usize = 1 << 24;

/// Products of a key and a query, 64 values each, that a speculation's candidates may come to ([`work_of`]): of 128 sequences of 128 Ki
/// tokens with 32 query heads of 128 values. A block of query tokens counts once for each of them.
pub const WORK_MAX: usize = 1 << 30;

/// Weights that one report of attention may hold, over all KV heads: blocks of 16 of 128 Ki tokens for 32 heads.
pub const FEEDBACK_MAX: usize = 1 << 18;

/// What a member with so many tokens, a block of so many query tokens, and so many query heads of `head_dim` values counts of [`WORK_MAX`].
#[must_use]
pub fn work_of(tokens: usize, queries: usize, query_heads: usize, head_dim: usize) -> usize {
    const VALUES: usize = 64;
    let products = queries.saturating_mul(query_heads).saturating_mul(head_dim.div_ceil(VALUES));
    tokens.saturating_mul(products)
}

/// The lane waits for the slot's doorbell to carry the ticket's low 32 bits before it looks at batch and hints.
const FLAG_DOORBELL: u8 = 1;

/// Feedback is of full attention.
const FLAG_FULL: u8 = 1 << 1;

/// Behind each member's queries lie floors.
const FLAG_FLOORS: u8 = 1 << 2;

/// Asks for the rest of the last answer.
const FLAG_REST: u8 = 1 << 3;

/// Asks for all pages of a layer to be in host memory.
const FLAG_FETCH: u8 = 1 << 4;

/// Asks for the rows of one layer for a whole batch: *query push*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speculate {
    /// Layer that the rows are for.
    pub layer: u16,
    /// Members in the batch table.
    pub batch: u32,
    /// Consecutive number of this speculation, from 1.
    pub ticket: u64,
    /// Bytes of hints, all members together. A member's hint is `[queries][query heads][head dim]` f32, or ids: for each
    /// KV head a count, then so many tokens, as u32.
    pub hint_bytes: u32,
    /// Query tokens of each member, from its position on: 1 in decode (0 on the wire means 1 too).
    pub queries: u32,
    /// When the rows are wanted, on the monotonic clock; 0: whenever they are ready.
    pub deadline_ns: u64,
    /// Whether the hints are only there once the slot's doorbell rings.
    pub doorbell: bool,
    /// Whether each member's queries are followed by what they give to rows that are attended anyway: `[queries][query heads]` f32, the
    /// log-sum-exps of the scaled scores.
    pub floors: bool,
    /// Asks for no rows, but for an estimate of those that the layer's last answer left out, by the layer's true query: see [`RestLayout`].
    pub rest: bool,
    /// Asks for no rows, but that all pages of the members' first `position` tokens are in host memory until the answer is let go of.
    pub fetch: bool,
}

/// Says that rows have been written to their pages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Append {
    /// Which layer, or `None` for all of them.
    pub layer: Option<u16>,
    /// Members in the batch table.
    pub batch: u32,
}

/// Statistics of a prompt's queries, `[kv heads][head dim]` f32 in the hint area, for one sequence and layer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Observe {
    /// Which layer.
    pub layer: u16,
    /// Bytes of the payload.
    pub payload_bytes: u32,
}

/// Attention rows of one sequence and layer, `[kv heads][blocks]` f32 in the hint area: over so many tokens as the batch
/// entry's position says, the largest weight of each block and of the group's query heads.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FeedbackRows {
    /// Which layer.
    pub layer: u16,
    /// Bytes of the payload.
    pub payload_bytes: u32,
    /// Whether they are of full attention, or of that over the attended rows alone.
    pub full: bool,
}

/// What a request asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// See [`Speculate`].
    Speculate(Speculate),
    /// See [`Append`].
    Append(Append),
    /// See [`Observe`]; its batch table has one entry.
    Observe(Observe),
    /// See [`FeedbackRows`]; its batch table has one entry.
    Feedback(FeedbackRows),
    /// Marks of the text of tokens that have not been appended yet, one byte each in the hint area; its batch table has
    /// one entry.
    Mark {
        /// How many.
        payload_bytes: u32,
    },
    /// Only releases answers.
    Release,
}

/// A request that has been parsed and checked against the session's limits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Answers up to this ticket are not read any more.
    pub release_through: u64,
    /// What is asked.
    pub operation: Operation,
}

/// A request that breaks the protocol. It ends the session.
#[derive(Debug, Error, PartialEq, Eq, Clone)]
pub enum RequestError {
    /// No such operation.
    #[error("operation {0} is not known")]
    UnknownOperation(u8),
    /// Flags or reserved fields of a later version.
    #[error("flags {flags:#x} or reserved fields are set, which this version does not know")]
    ReservedBits {
        /// The flags of the request.
        flags: u8,
    },
    /// A batch that is empty or too large.
    #[error("a batch of {batch} members is outside 1..={max}")]
    BatchSize {
        /// Members that it claims.
        batch: u32,
        /// Members allowed.
        max: u32,
    },
    /// A payload beyond the hint area.
    #[error("a payload of {bytes} bytes is larger than the hint area of {max}")]
    PayloadSize {
        /// Bytes that it claims.
        bytes: u32,
        /// Bytes allowed.
        max: u32,
    },
    /// More query tokens than a block may have.
    #[error("a block of {queries} query tokens is larger than {QUERIES_MAX}")]
    Queries {
        /// Query tokens that it claims.
        queries: u32,
    },
}

impl Request {
    /// Parses a private copy of a descriptor.
    pub fn parse(descriptor: &Descriptor, limits: &Limits) -> Result<Self, RequestError> {
        let raw: RawRequest = bytemuck::pod_read_unaligned(descriptor);
        let known = match raw.operation {
            SPECULATE => FLAG_DOORBELL | FLAG_FLOORS | FLAG_REST | FLAG_FETCH,
            FEEDBACK => FLAG_FULL,
            _ => 0,
        };
        let queries = raw.operation == SPECULATE || raw.queries == 0;
        if raw.flags & !known != 0 || !queries || raw.reserved != [0; 5] || raw.must_be_zero != 0 {
            return Err(RequestError::ReservedBits { flags: raw.flags });
        }
        if raw.queries > QUERIES_MAX {
            return Err(RequestError::Queries { queries: raw.queries });
        }
        if raw.operation != RELEASE && !(1..=limits.batch_max).contains(&raw.batch) {
            return Err(RequestError::BatchSize { batch: raw.batch, max: limits.batch_max });
        }
        if raw.payload_bytes > limits.hint_bytes {
            return Err(RequestError::PayloadSize { bytes: raw.payload_bytes, max: limits.hint_bytes });
        }
        let operation = match raw.operation {
            SPECULATE => Operation::Speculate(Speculate {
                layer: raw.layer,
                batch: raw.batch,
                ticket: raw.ticket,
                hint_bytes: raw.payload_bytes,
                queries: raw.queries.max(1),
                deadline_ns: raw.deadline_ns,
                doorbell: raw.flags & FLAG_DOORBELL != 0,
                floors: raw.flags & FLAG_FLOORS != 0,
                rest: raw.flags & FLAG_REST != 0,
                fetch: raw.flags & FLAG_FETCH != 0,
            }),
            APPEND => Operation::Append(Append {
                layer: (raw.layer != ALL_LAYERS).then_some(raw.layer),
                batch: raw.batch,
            }),
            OBSERVE | FEEDBACK | MARK if raw.batch != 1 => {
                return Err(RequestError::BatchSize { batch: raw.batch, max: 1 });
            }
            OBSERVE => Operation::Observe(Observe { layer: raw.layer, payload_bytes: raw.payload_bytes }),
            FEEDBACK => Operation::Feedback(FeedbackRows {
                layer: raw.layer,
                payload_bytes: raw.payload_bytes,
                full: raw.flags & FLAG_FULL != 0,
            }),
            MARK => Operation::Mark { payload_bytes: raw.payload_bytes },
            RELEASE => Operation::Release,
            other => return Err(RequestError::UnknownOperation(other)),
        };
        Ok(Self { release_through: raw.release_through, operation })
    }

    /// The descriptor that parses to this request.
    #[must_use]
    pub fn encode(&self) -> Descriptor {
        let mut raw = RawRequest { release_through: self.release_through, ..Zeroable::zeroed() };
        match self.operation {
            Operation::Speculate(s) => {
                raw.operation = SPECULATE;
                let flags = [
                    (s.doorbell, FLAG_DOORBELL),
                    (s.floors, FLAG_FLOORS),
                    (s.rest, FLAG_REST),
                    (s.fetch, FLAG_FETCH),
                ];
                raw.flags = flags.iter().filter(|(set, _)| *set).map(|(_, flag)| flag).sum();
                raw.layer = s.layer;
                raw.batch = s.batch;
                raw.ticket = s.ticket;
                raw.deadline_ns = s.deadline_ns;
                raw.payload_bytes = s.hint_bytes;
                raw.queries = s.queries;
            }
            Operation::Append(a) => {
                raw.operation = APPEND;
                raw.layer = a.layer.unwrap_or(ALL_LAYERS);
                raw.batch = a.batch;
            }
            Operation::Observe(o) => {
                raw.operation = OBSERVE;
                raw.layer = o.layer;
                raw.batch = 1;
                raw.payload_bytes = o.payload_bytes;
            }
            Operation::Feedback(f) => {
                raw.operation = FEEDBACK;
                raw.flags = if f.full { FLAG_FULL } else { 0 };
                raw.layer = f.layer;
                raw.batch = 1;
                raw.payload_bytes = f.payload_bytes;
            }
            Operation::Mark { payload_bytes } => {
                raw.operation = MARK;
                raw.batch = 1;
                raw.payload_bytes = payload_bytes;
            }
            Operation::Release => raw.operation = RELEASE,
        }
        bytemuck::cast(raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn limits() -> Limits {
        Limits { batch_max: 8, hint_bytes: 4096, ..Limits::default() }
    }

    proptest! {
        #[test]
        fn a_request_parses_to_what_was_encoded(
            layer in 0u16..1000, batch in 1u32..=8, ticket: u64, through: u64, bytes in 0u32..=4096,
            deadline: u64, doorbell: bool, floors: bool, rest: bool, fetch: bool, queries in 1u32..=QUERIES_MAX, kind in 0..6,
        ) {
            let operation = match kind {
                0 => Operation::Speculate(Speculate {
                    layer, batch, ticket, hint_bytes: bytes, queries, deadline_ns: deadline, doorbell, floors, rest, fetch,
                }),
                1 => Operation::Append(Append { layer: (layer % 2 == 0).then_some(layer), batch }),
                2 => Operation::Observe(Observe { layer, payload_bytes: bytes }),
                3 => Operation::Feedback(FeedbackRows { layer, payload_bytes: bytes, full: doorbell }),
                4 => Operation::Mark { payload_bytes: bytes },
                _ => Operation::Release,
            };
            let request = Request { release_through: through, operation };
            prop_assert_eq!(Request::parse(&request.encode(), &limits()), Ok(request));
        }

        #[test]
        fn any_bytes_parse_to_something_within_the_limits_or_to_an_error(
            bytes in proptest::array::uniform32(any::<[u8; 2]>()),
        ) {
            let descriptor: Descriptor = bytemuck::cast(bytes);
            if let Ok(request) = Request::parse(&descriptor, &limits()) {
                if let Operation::Speculate(s) = request.operation {
                    prop_assert!((1..=8).contains(&s.batch) && s.hint_bytes <= 4096);
                }
                prop_assert_eq!(Request::parse(&request.encode(), &limits()), Ok(request));
            }
        }
    }

    #[test]
    fn reserved_bits_and_unknown_operations_are_refused() {
        let good = Request { release_through: 0, operation: Operation::Release }.encode();
        let mut reserved = good;
        reserved[63] = 1;
        assert!(matches!(Request::parse(&reserved, &limits()), Err(RequestError::ReservedBits { .. })));
        let mark = Request { release_through: 0, operation: Operation::Mark { payload_bytes: 1 } };
        let mut queries = mark.encode();
        queries[36] = 1;
        assert!(matches!(Request::parse(&queries, &limits()), Err(RequestError::ReservedBits { .. })));
        let mut unknown = good;
        (unknown[0], unknown[4]) = (99, 1);
        assert_eq!(Request::parse(&unknown, &limits()), Err(RequestError::UnknownOperation(99)));
    }
}
