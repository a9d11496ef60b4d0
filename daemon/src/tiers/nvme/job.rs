//! What a lane hands in, and what it gets back.

use std::sync::Arc;

use crossbeam::queue::SegQueue;
use kvoyant_protocol::futex::Bell;
use kvoyant_protocol::memory::SharedMapping;
use thiserror::Error;

use super::slots::SlotRef;

/// Which way a page goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Direction {
    /// From its slot into memory.
    Read,
    /// From memory into its slot.
    Write,
}

/// One page to move.
///
/// The memory must stay the page's until the job has ended: what a failed read leaves there may be anything, and what
/// changes under a write is found out when the page is read.
#[derive(Debug)]
pub struct Job {
    /// Which way.
    pub direction: Direction,
    /// Where on disk.
    pub slot: SlotRef,
    /// The mapping that holds the page's frame.
    pub memory: Arc<SharedMapping>,
    /// Where in it, in bytes; a multiple of 4096, else direct I/O is refused.
    pub offset: usize,
    /// When a read is wanted, on the monotonic clock, in nanoseconds; 0: as soon as possible, before all others. Writes
    /// go in the order in which they come.
    pub deadline_ns: u64,
    /// The session, as the caller counts them.
    pub session: u64,
    /// Whatever the caller knows the page by.
    pub token: u64,
    /// Where to report.
    pub report: Arc<SpillReport>,
}

/// Why a page was not moved. Nothing is ever reported as read that is not exactly what was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Error)]
pub enum PageError {
    /// The system refused.
    #[error("{} a page at byte {offset} of the spill area failed: {}", verb(*.direction), std::io::Error::from_raw_os_error(*.errno))]
    Io {
        /// Which way it was to go.
        direction: Direction,
        /// Where in the area, in bytes.
        offset: u64,
        /// The system's error number.
        errno: i32,
    },
    /// The area ended in the middle of the page: somebody has made it shorter.
    #[error("{} a page at byte {offset} of the spill area stopped after {done} of {wanted} bytes", verb(*.direction))]
    Short {
        /// Which way it was to go.
        direction: Direction,
        /// Where in the area, in bytes.
        offset: u64,
        /// Bytes that were moved.
        done: usize,
        /// Bytes of the page.
        wanted: usize,
    },
    /// What was read is not what was written.
    #[error(
        "the page at byte {offset} of the spill area has checksum {found:#010x} where {expected:#010x} was written"
    )]
    Checksum {
        /// Where in the area, in bytes.
        offset: u64,
        /// CRC-32C of what was written.
        expected: u32,
        /// CRC-32C of what was read.
        found: u32,
    },
    /// The device takes no more writes, or the daemon stops.
    #[error("the spill area takes no more: it has failed, or the daemon stops")]
    Failed,
    /// The slot holds nothing, because nothing was written or the write failed.
    #[error("the slot at byte {offset} of the spill area was never written")]
    NeverWritten {
        /// Where in the area, in bytes.
        offset: u64,
    },
}

fn verb(direction: Direction) -> &'static str {
    match direction {
        Direction::Read => "reading",
        Direction::Write => "writing",
    }
}

/// A job that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Ended {
    /// As in the job.
    pub session: u64,
    /// As in the job.
    pub token: u64,
    /// As in the job.
    pub direction: Direction,
    /// Whether the page is where it was to go.
    pub result: Result<(), PageError>,
}

/// A lane's queue of ended jobs, and the bell that wakes the lane.
#[derive(Debug)]
pub struct SpillReport {
    queue: SegQueue<Ended>,
    bell: Arc<Bell>,
}

impl SpillReport {
    /// A queue that rings `bell`.
    #[must_use]
    pub fn new(bell: Arc<Bell>) -> Self {
        Self { queue: SegQueue::new(), bell }
    }

    /// Reports an end, and rings.
    pub fn push(&self, ended: Ended) {
        self.add(ended);
        self.ring();
    }

    /// Takes one.
    #[must_use]
    pub fn pop(&self) -> Option<Ended> {
        self.queue.pop()
    }

    /// Reports an end; [`SpillReport::ring`] follows once for all that ended together.
    pub(super) fn add(&self, ended: Ended) {
        self.queue.push(ended);
    }

    pub(super) fn ring(&self) {
        self.bell.ring();
    }
}
