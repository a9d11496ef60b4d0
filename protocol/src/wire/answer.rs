//! What lies in the completion ring and in block tables.

use bytemuck::{Pod, Zeroable};
use thiserror::Error;

use crate::layout::{DESCRIPTOR_BYTES, HEAD_ENTRY_BYTES, Limits, RUN_BYTES};
use crate::ring::Descriptor;

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
    /// A hint with a value that is no number, or ids that are none of the sequence's. The session goes on.
    BadHint = 8,
    /// A member's rows are selected by its client: the daemon keeps no digests of it.
    SelectedByClient = 9,
    /// Rows that it needs could not be read back from disk: their tokens have to be computed again. The page table says which.
    RowsLost = 10,
    /// Host memory has no room for the pages that it needs at once.
    HostFull = 11,
    /// The client's user has as many requests under way as their quota `in_flight` allows: nothing was done. Ask again once one is
    /// answered.
    OverQuota = 12,
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
            Self::BadHint,
            Self::SelectedByClient,
            Self::RowsLost,
            Self::HostFull,
            Self::OverQuota,
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
            Self::NoSuchSequence => {
                "a member's sequence is not open: it was closed, or suspended by an operator (`kvoyant sequences` lists images)"
            }
            Self::NotObserved => "the method needs the prompt's query statistics, which were not sent",
            Self::NotAppended => "a member's position lies beyond the rows that were appended",
            Self::Failed => "the daemon failed on it; its log says how",
            Self::SelectedByClient => {
                "a member was opened to be selected by its client, and has no digests in the daemon"
            }
            Self::RowsLost => "rows could not be read back from disk: drop them, and compute them again",
            Self::HostFull => {
                "host memory has no room for the pages that it needs at once: raise the daemon's arena or host_percent, or \
                 ask for fewer rows"
            }
            Self::OverQuota => {
                "the user has as many requests under way as the daemon's quota in_flight allows: ask again once one is answered"
            }
            Self::InGraphMode => "a member is served in graph mode, where rows are selected on the device",
            Self::BadHint => {
                "a hint has a value that is no finite number, or ids that are none of its sequence's"
            }
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

/// Behind the runs lie partial attentions of the daemon's CPU, see [`PartialLayout`].
const FLAG_PARTIALS: u8 = 1;

/// Behind them lies what is known of the rows left out, see [`RestLayout`].
const FLAG_REST: u8 = 1 << 1;

/// Where the low bits of the session's generation lie among the flags.
const GENERATION_SHIFT: u32 = 2;

/// Whose answers a ring brings.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Served {
    /// Low 64 bits of the daemon's boot id.
    pub boot_id: u64,
    /// How many daemons have served the session before it; 0 where [`GENERATION`](crate::control::features::GENERATION) is not agreed.
    pub generation: u32,
}

impl Served {
    /// What of the generation a completion has room for.
    fn low_generation(self) -> u8 {
        (self.generation as u8) << GENERATION_SHIFT
    }
}

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
    /// Whether partial attentions lie behind its runs ([`PartialLayout`]).
    pub partials: bool,
    /// Whether estimates of the rows left out lie behind them ([`RestLayout`]).
    pub rest: bool,
    /// Low 64 bits of the daemon's boot id.
    pub boot_id: u64,
    /// How many daemons have served the session before the one that answers. Whoever compares it with that of an earlier answer notices that
    /// the daemon was restarted or replaced in between.
    pub generation: u32,
}

/// A completion that makes no sense.
#[derive(Debug, Error, PartialEq, Eq)]
pub enum CompletionError {
    /// Another generation's answer.
    #[error(
        "completion of ticket {ticket} is of generation …{theirs} of its session, which is served in generation {ours}"
    )]
    OtherGeneration {
        /// Ticket of the answer.
        ticket: u64,
        /// The low six bits that came.
        theirs: u8,
        /// The generation that the session is in.
        ours: u32,
    },
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
    pub fn parse(descriptor: &Descriptor, limits: &Limits, served: Served) -> Result<Self, CompletionError> {
        let raw: RawCompletion = bytemuck::pod_read_unaligned(descriptor);
        let ticket = raw.ticket;
        let status = Status::from_code(raw.status)
            .ok_or(CompletionError::UnknownStatus { code: raw.status, ticket })?;
        if raw.table_bytes > limits.table_bytes {
            let (bytes, max) = (raw.table_bytes, limits.table_bytes);
            return Err(CompletionError::TableSize { ticket, bytes, max });
        }
        if raw.boot_id != served.boot_id {
            return Err(CompletionError::OtherBoot { ticket });
        }
        if raw.flags & !(FLAG_PARTIALS | FLAG_REST) != served.low_generation() {
            let theirs = raw.flags >> GENERATION_SHIFT;
            return Err(CompletionError::OtherGeneration { ticket, theirs, ours: served.generation });
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
            partials: raw.flags & FLAG_PARTIALS != 0,
            rest: raw.flags & FLAG_REST != 0,
            boot_id: raw.boot_id,
            generation: served.generation,
        })
    }

    /// The descriptor that parses to this completion.
    #[must_use]
    pub fn encode(&self) -> Descriptor {
        let served = Served { boot_id: self.boot_id, generation: self.generation };
        let behind = (u8::from(self.partials) * FLAG_PARTIALS) | (u8::from(self.rest) * FLAG_REST);
        bytemuck::cast(RawCompletion {
            status: self.status as u8,
            flags: behind | served.low_generation(),
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

/// Where the partial attentions of an answer lie: behind the runs of its block table, one for each member. What the
/// daemon's CPU attended for a member is a count of rows (u32, all KV heads together), then for each query head the
/// logarithm of the sum of its exponentials (f32, `−∞` where there were no rows), then `[query heads][values]` f32: the
/// softmax over those rows alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PartialLayout {
    /// Query heads.
    pub query_heads: usize,
    /// Values of a row's value part.
    pub values: usize,
}

impl PartialLayout {
    /// Words of 32 bits of one member's.
    #[must_use]
    pub fn words(self) -> usize {
        1 + self.query_heads * (1 + self.values)
    }

    /// Bytes of one member's.
    #[must_use]
    pub fn bytes(self) -> usize {
        self.words() * 4
    }
}

/// What one query head left out, relative to `e^max`: sums of estimated weights, and bounds of them.
#[derive(Debug, Clone, Copy, PartialEq, Pod, Zeroable)]
#[repr(C)]
pub struct RestEntry {
    /// What weights are relative to; `−∞` where nothing was left out.
    pub max: f32,
    /// Sum of the estimated weights: that of the mean that comes with it.
    pub weight: f32,
    /// At least the sum of the true weights; `+∞` where it is not known.
    pub upper: f32,
    /// At most that sum.
    pub lower: f32,
    /// At least the sum of what weights may have changed, times the norms of their means.
    pub scatter: f32,
    /// At least the sum of true weights times the distances of values from their means.
    pub spread: f32,
    /// Rows left out.
    pub rows: u32,
}

/// Where estimates of the rows left out lie: behind the partial attentions, one for each member. For each query head a [`RestEntry`],
/// then `[query heads]` of `values` f16 and up to a whole word: the estimated mean value of what it left out. What its rounding changed is
/// part of [`RestEntry::scatter`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RestLayout {
    /// Query heads.
    pub query_heads: usize,
    /// Values of a row's value part.
    pub values: usize,
}

impl RestLayout {
    /// Words of 32 bits of one member's.
    #[must_use]
    pub fn words(self) -> usize {
        self.query_heads * (size_of::<RestEntry>() / 4 + self.mean_words())
    }

    /// Words of 32 bits of one mean value.
    #[must_use]
    pub fn mean_words(self) -> usize {
        self.values.div_ceil(2)
    }

    /// Bytes of one member's.
    #[must_use]
    pub fn bytes(self) -> usize {
        self.words() * 4
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
    /// Rows attended by the daemon's CPU.
    CpuRows,
    /// Rows brought to the device ahead of any request.
    PrefetchedRows,
    /// Bytes copied for them.
    PrefetchBytes,
    /// Rows that answers left out and estimated, all query heads together.
    EstimatedRows,
    /// Query heads of which an answer says how much they may have missed.
    CertifiedHeads,
    /// Of these, by the attention that they may have missed at most, as the lane can tell: up to 0.1 %.
    MissedTo0001,
    /// Up to 1 %.
    MissedTo001,
    /// Up to 5 %.
    MissedTo005,
    /// Up to 20 %.
    MissedTo02,
    /// More.
    MissedMore,
    /// Rows that were left out of answers because they would have come after their deadline.
    LateRows,
    /// Pages written to disk.
    PagesWritten,
    /// Pages read back from disk.
    PagesRead,
    /// Pages that could not be read back whole.
    PagesLost,
    /// Time that answers waited for pages from disk, ns.
    PageWaitNs,
    /// Most pages that were in host memory at a time, where pages can leave it.
    PagesPeak,
    /// Most pages that there were at a time, in host memory or on disk.
    PagesMost,
    /// Pages on disk alone, now.
    PagesSpilled,
}

/// How many counters there are.
pub const STATS: usize = Stat::PagesSpilled as usize + 1;

/// What a client counts itself, for whoever operates the daemon: only it knows how long its threads stood still, and what it did without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Told {
    /// Time that its threads waited for answers, ns.
    WaitedNs = 0,
    /// Answers that it waited for in vain, until its own deadline.
    GaveUp,
    /// Answers that it did not wait for, and attended to what the last one named instead.
    Partial,
    /// Answers that it did not wait for, and attended to sinks and window alone.
    ResidentOnly,
    /// Selections that it made itself, of one sequence and layer each.
    SelectedHere,
}

/// How many there are.
pub const TOLD: usize = Told::SelectedHere as usize + 1;

#[cfg(test)]
mod tests {
    use super::*;

    fn limits() -> Limits {
        Limits { batch_max: 8, hint_bytes: 4096, ..Limits::default() }
    }

    #[test]
    fn a_completion_of_another_boot_or_generation_or_an_oversized_table_is_refused() {
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
            partials: true,
            rest: true,
            boot_id: 77,
            generation: 66,
        };
        let limits = limits();
        let served = Served { boot_id: 77, generation: 66 };
        assert_eq!(Completion::parse(&completion.encode(), &limits, served), Ok(completion));
        let other = Completion::parse(&completion.encode(), &limits, Served { boot_id: 78, ..served });
        assert_eq!(other, Err(CompletionError::OtherBoot { ticket: 9 }));
        let huge = Completion { table_bytes: limits.table_bytes + 1, ..completion };
        assert!(Completion::parse(&huge.encode(), &limits, served).is_err());
        assert_eq!(completion.timeline() >> 8, 9);
        let before = Completion { generation: 65, ..completion };
        let error = Completion::parse(&before.encode(), &limits, served).unwrap_err();
        assert_eq!(error, CompletionError::OtherGeneration { ticket: 9, theirs: 1, ours: 66 });
        // A side that does not know of generations has zeros there.
        let first = Completion { generation: 0, partials: true, rest: false, ..completion };
        assert_eq!(first.encode()[1], 1);
        assert_eq!(
            Completion::parse(&first.encode(), &limits, Served { generation: 0, ..served }),
            Ok(first)
        );
    }
}
