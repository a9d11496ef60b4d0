//! What lies in the rings: requests, batch entries, completions and block tables.
//!
//! The raw forms are plain structs of fixed layout, little endian. A raw form is copied out of shared memory
//! once and parsed into a checked type ([`Request`], [`Completion`]); only that goes further in.

use bytemuck::{Pod, Zeroable};
use thiserror::Error;

use crate::layout::{BATCH_ENTRY_BYTES, DESCRIPTOR_BYTES, HEAD_ENTRY_BYTES, Limits, RUN_BYTES};
use crate::ring::Descriptor;

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
    /// In a speculation: the position of the token that is being computed, so that `position + 1` tokens exist.
    /// In an append: the position of the first row.
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
    reserved: [u32; 6],
    must_be_zero: u32,
}

const _: () = assert!(size_of::<RawRequest>() == DESCRIPTOR_BYTES);

const SPECULATE: u8 = 1;
const APPEND: u8 = 2;
const OBSERVE: u8 = 3;
const RELEASE: u8 = 4;

/// The lane waits for the slot's doorbell to carry the ticket's low 32 bits before it looks at batch and hints.
const FLAG_DOORBELL: u8 = 1;

/// Asks for the rows of one layer for a whole batch: *query push*.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Speculate {
    /// Layer that the rows are for.
    pub layer: u16,
    /// Members in the batch table.
    pub batch: u32,
    /// Consecutive number of this speculation, from 1.
    pub ticket: u64,
    /// Bytes of hints, all members together.
    pub hint_bytes: u32,
    /// When the rows are wanted, on the monotonic clock; 0: whenever they are ready.
    pub deadline_ns: u64,
    /// Whether the hints are only there once the slot's doorbell rings.
    pub doorbell: bool,
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

/// What a request asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// See [`Speculate`].
    Speculate(Speculate),
    /// See [`Append`].
    Append(Append),
    /// See [`Observe`]; its batch table has one entry.
    Observe(Observe),
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
}

impl Request {
    /// Parses a private copy of a descriptor.
    pub fn parse(descriptor: &Descriptor, limits: &Limits) -> Result<Self, RequestError> {
        let raw: RawRequest = bytemuck::pod_read_unaligned(descriptor);
        let known = if raw.operation == SPECULATE { FLAG_DOORBELL } else { 0 };
        if raw.flags & !known != 0 || raw.reserved != [0; 6] || raw.must_be_zero != 0 {
            return Err(RequestError::ReservedBits { flags: raw.flags });
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
                deadline_ns: raw.deadline_ns,
                doorbell: raw.flags & FLAG_DOORBELL != 0,
            }),
            APPEND => Operation::Append(Append {
                layer: (raw.layer != ALL_LAYERS).then_some(raw.layer),
                batch: raw.batch,
            }),
            OBSERVE if raw.batch == 1 => {
                Operation::Observe(Observe { layer: raw.layer, payload_bytes: raw.payload_bytes })
            }
            OBSERVE => return Err(RequestError::BatchSize { batch: raw.batch, max: 1 }),
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
                raw.flags = if s.doorbell { FLAG_DOORBELL } else { 0 };
                raw.layer = s.layer;
                raw.batch = s.batch;
                raw.ticket = s.ticket;
                raw.deadline_ns = s.deadline_ns;
                raw.payload_bytes = s.hint_bytes;
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
            Operation::Release => raw.operation = RELEASE,
        }
        bytemuck::cast(raw)
    }
}

/// How a speculation ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Status {
    /// The block table is complete.
    Ready = 1,
    /// The block table does not fit: split the batch, or connect with larger `table_bytes`.
    TableFull = 2,
    /// A member names a sequence that is not open (any more).
    NoSuchSequence = 3,
    /// The method needs the prompt's statistics, which were never sent.
    NotObserved = 4,
    /// A member's position lies beyond what was appended.
    NotAppended = 5,
    /// The daemon failed inside; its log says how.
    Failed = 6,
    /// A member is served in graph mode, where rows are selected on the device.
    InGraphMode = 7,
}

impl Status {
    fn from_code(code: u8) -> Option<Self> {
        [
            Self::Ready,
            Self::TableFull,
            Self::NoSuchSequence,
            Self::NotObserved,
            Self::NotAppended,
            Self::Failed,
            Self::InGraphMode,
        ]
        .into_iter()
        .find(|status| *status as u8 == code)
    }
}

impl std::fmt::Display for Status {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Ready => "ready",
            Self::TableFull => "the block table does not fit into the session's table_bytes: split the batch",
            Self::NoSuchSequence => "a member's sequence is not open",
            Self::NotObserved => "the method needs the prompt's query statistics, which were not sent",
            Self::NotAppended => "a member's position lies beyond the rows that were appended",
            Self::Failed => "the daemon failed on it; its log says how",
            Self::InGraphMode => "a member is served in graph mode, where rows are selected on the device",
        })
    }
}

#[derive(Debug, Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct RawCompletion {
    status: u8,
    flags: u8,
    layer: u16,
    batch: u32,
    ticket: u64,
    bytes_moved: u64,
    rows_selected: u32,
    rows_hit: u32,
    rows_in_place: u32,
    rows_resident: u32,
    select_ns: u32,
    transfer_ns: u32,
    queue_ns: u32,
    table_bytes: u32,
    boot_id: u64,
}

const _: () = assert!(size_of::<RawCompletion>() == DESCRIPTOR_BYTES);

/// The answer to a speculation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Completion {
    /// How it ended.
    pub status: Status,
    /// Layer that the rows are for.
    pub layer: u16,
    /// Members.
    pub batch: u32,
    /// Ticket of the speculation.
    pub ticket: u64,
    /// Bytes that were copied for it.
    pub bytes_moved: u64,
    /// Rows selected, all members and heads together.
    pub rows_selected: u32,
    /// Of these, rows that were on the device already.
    pub rows_hit: u32,
    /// Of these, rows that are to be read from the session's own extents, because the device reads in place or
    /// had no room.
    pub rows_in_place: u32,
    /// Rows that the members' heads keep on the device in this layer, selected or not.
    pub rows_resident: u32,
    /// Time from the request's arrival at the lane until its selection began, in ns.
    pub queue_ns: u32,
    /// Time that selection and planning took, in ns.
    pub select_ns: u32,
    /// Time from the plan until its last byte had arrived, in ns.
    pub transfer_ns: u32,
    /// Bytes of the block table.
    pub table_bytes: u32,
    /// Low 64 bits of the daemon's boot id.
    pub boot_id: u64,
}

/// A completion that makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CompletionError {
    /// No such status.
    #[error("completion of ticket {ticket} has status {code}, which is not known")]
    UnknownStatus {
        /// The code that came.
        code: u8,
        /// Ticket of the answer.
        ticket: u64,
    },
    /// More table than the session has.
    #[error("completion of ticket {ticket} claims a block table of {bytes} bytes, more than {max}")]
    TableSize {
        /// Ticket of the answer.
        ticket: u64,
        /// Bytes that it claims.
        bytes: u32,
        /// Bytes that there are.
        max: u32,
    },
    /// Another daemon's answer.
    #[error("completion of ticket {ticket} comes from another start of the daemon")]
    OtherBoot {
        /// Ticket of the answer.
        ticket: u64,
    },
}

impl Completion {
    /// Parses a private copy of a descriptor.
    pub fn parse(descriptor: &Descriptor, limits: &Limits, boot_id: u64) -> Result<Self, CompletionError> {
        let raw: RawCompletion = bytemuck::pod_read_unaligned(descriptor);
        let ticket = raw.ticket;
        let status = Status::from_code(raw.status)
            .ok_or(CompletionError::UnknownStatus { code: raw.status, ticket })?;
        if raw.table_bytes > limits.table_bytes {
            let (bytes, max) = (raw.table_bytes, limits.table_bytes);
            return Err(CompletionError::TableSize { ticket, bytes, max });
        }
        if raw.boot_id != boot_id {
            return Err(CompletionError::OtherBoot { ticket });
        }
        Ok(Self {
            status,
            layer: raw.layer,
            batch: raw.batch,
            ticket,
            bytes_moved: raw.bytes_moved,
            rows_selected: raw.rows_selected,
            rows_hit: raw.rows_hit,
            rows_in_place: raw.rows_in_place,
            rows_resident: raw.rows_resident,
            queue_ns: raw.queue_ns,
            select_ns: raw.select_ns,
            transfer_ns: raw.transfer_ns,
            table_bytes: raw.table_bytes,
            boot_id: raw.boot_id,
        })
    }

    /// The descriptor that parses to this completion.
    #[must_use]
    pub fn encode(&self) -> Descriptor {
        bytemuck::cast(RawCompletion {
            status: self.status as u8,
            flags: 0,
            layer: self.layer,
            batch: self.batch,
            ticket: self.ticket,
            bytes_moved: self.bytes_moved,
            rows_selected: self.rows_selected,
            rows_hit: self.rows_hit,
            rows_in_place: self.rows_in_place,
            rows_resident: self.rows_resident,
            select_ns: self.select_ns,
            transfer_ns: self.transfer_ns,
            queue_ns: self.queue_ns,
            table_bytes: self.table_bytes,
            boot_id: self.boot_id,
        })
    }

    /// The timeline word that says this completion is there: waiters compare it with `ticket << 8`.
    #[must_use]
    pub fn timeline(&self) -> u64 {
        self.ticket << 8 | u64::from(self.status as u8)
    }
}

/// Front of a block table: `[member][KV head]` of these, then the runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct HeadEntry {
    /// Index of the head's first run.
    pub first_run: u32,
    /// How many runs.
    pub runs: u32,
    /// Rows in all of them.
    pub rows: u32,
    /// Rows that this head keeps on the device in this layer, selected or not.
    pub resident: u32,
}

const _: () = assert!(size_of::<HeadEntry>() == HEAD_ENTRY_BYTES);

/// Rows of one head that lie one behind the other, both in memory and in the sequence.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Pod, Zeroable)]
#[repr(C)]
pub struct BlockRun {
    /// Row locator of the first row: page id times rows per page, plus the row in the page.
    pub row: u32,
    /// Position of the first row's token in the sequence.
    pub token: u32,
    rows_and_space: u32,
}

const _: () = assert!(size_of::<BlockRun>() == RUN_BYTES);

const IN_SLAB: u32 = 1 << 31;

impl BlockRun {
    /// A run of `rows` rows, in the device slab or in the session's extents.
    #[must_use]
    pub fn new(row: u32, token: u32, rows: u32, in_slab: bool) -> Self {
        debug_assert!(rows < IN_SLAB, "a run of {rows} rows");
        Self { row, token, rows_and_space: rows | if in_slab { IN_SLAB } else { 0 } }
    }

    /// How many rows.
    #[must_use]
    pub fn rows(&self) -> u32 {
        self.rows_and_space & !IN_SLAB
    }

    /// Whether they lie in the device slab; else they lie in the session's extents.
    #[must_use]
    pub fn in_slab(&self) -> bool {
        self.rows_and_space & IN_SLAB != 0
    }
}

/// Counters of a session, in the order in which they lie in the daemon → client memfd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(usize)]
pub enum Stat {
    /// Speculations answered.
    Speculations = 0,
    /// Rows selected.
    RowsSelected,
    /// Rows found on the device.
    RowsHit,
    /// Rows read in place.
    RowsInPlace,
    /// Bytes copied.
    BytesMoved,
    /// Time in selection and planning, ns.
    SelectNs,
    /// Time from plan to the last byte, ns.
    TransferNs,
    /// Rows appended, all layers and heads together.
    RowsAppended,
    /// Reports of graph mode that were read.
    GraphReports,
    /// Rows that kernels of graph mode found on the device.
    GraphHits,
    /// Rows that kernels of graph mode read over the link.
    GraphMisses,
    /// Reports of graph mode that were overwritten before they were read, or outrun by the next one.
    GraphLost,
}

/// How many counters there are.
pub const STATS: usize = Stat::GraphLost as usize + 1;

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
            deadline: u64, doorbell: bool, kind in 0..4,
        ) {
            let operation = match kind {
                0 => Operation::Speculate(Speculate {
                    layer, batch, ticket, hint_bytes: bytes, deadline_ns: deadline, doorbell,
                }),
                1 => Operation::Append(Append { layer: (layer % 2 == 0).then_some(layer), batch }),
                2 => Operation::Observe(Observe { layer, payload_bytes: bytes }),
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
        let mut unknown = good;
        (unknown[0], unknown[4]) = (99, 1);
        assert_eq!(Request::parse(&unknown, &limits()), Err(RequestError::UnknownOperation(99)));
    }

    #[test]
    fn a_completion_of_another_boot_or_an_oversized_table_is_refused() {
        let completion = Completion {
            status: Status::Ready,
            layer: 3,
            batch: 2,
            ticket: 9,
            bytes_moved: 1 << 40,
            rows_selected: 5,
            rows_hit: 4,
            rows_in_place: 1,
            rows_resident: 6,
            queue_ns: 1,
            select_ns: 2,
            transfer_ns: 3,
            table_bytes: 128,
            boot_id: 77,
        };
        let limits = limits();
        assert_eq!(Completion::parse(&completion.encode(), &limits, 77), Ok(completion));
        let other = Completion::parse(&completion.encode(), &limits, 78);
        assert_eq!(other, Err(CompletionError::OtherBoot { ticket: 9 }));
        let huge = Completion { table_bytes: limits.table_bytes + 1, ..completion };
        assert!(Completion::parse(&huge.encode(), &limits, 77).is_err());
        assert_eq!(completion.timeline() >> 8, 9);
    }
}
