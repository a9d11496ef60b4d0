//! Where attention runs, and how bytes get there.
//!
//! A [`Device`] takes [`Transfer`]s and reports each as [`Done`] on the lane's queue; it never blocks a lane.
//! [`host::HostDevice`] is the embedded default; [`cuda`] has what a GPU needs. [`DeviceName`] is what an operator calls
//! them.

pub mod cuda;
mod fair;
pub mod host;
mod name;
pub mod rows;

use std::fmt::Debug;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Instant;

use crossbeam::queue::SegQueue;
use kvoyant_kernels::CopyRun;
use kvoyant_protocol::control::{Failure, Mode};
use kvoyant_protocol::device::SlabRef;
use kvoyant_protocol::futex::Bell;
use kvoyant_protocol::layout::Layout;
use kvoyant_protocol::memory::{MemoryError, SharedMapping};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};
use thiserror::Error;

use crate::quota::Account;
use crate::status::DeviceReport;
use crate::tiers::pin::Pin;

pub use name::{BadDeviceName, DeviceName};

/// Memory that transfers of a session read and write. A transfer holds on to it, so that a session that ends in
/// the middle of one takes nothing away.
#[derive(Debug, Default)]
pub struct SessionMemory {
    /// Whose session it is.
    uid: u32,
    /// Everything that a copy may touch. Pushed to when an extent is added, never shrunk.
    kept: std::sync::Mutex<Vec<Arc<dyn Memory>>>,
}

/// Memory that goes away when its last owner drops it.
pub trait Memory: Send + Sync + Debug {}

impl<T: Send + Sync + Debug> Memory for T {}

impl SessionMemory {
    /// None yet, of a user's session.
    #[must_use]
    pub fn of(uid: u32) -> Self {
        Self { uid, ..Self::default() }
    }

    /// Whose session it is.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.uid
    }

    /// Keeps memory for as long as any transfer of the session runs.
    pub fn keep(&self, memory: Arc<dyn Memory>) {
        self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(memory);
    }

    /// Lets go of memory that no transfer uses, and none will.
    pub fn forget<T>(&self, memory: &Arc<T>) {
        let same =
            |kept: &Arc<dyn Memory>| Arc::as_ptr(kept).cast::<()>() == Arc::as_ptr(memory).cast::<()>();
        let mut kept = self.kept.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        kept.retain(|kept| !same(kept));
    }
}

/// In a transfer's ticket: it belongs to no answer, and the rest is its number.
pub const BACKGROUND: u64 = 1 << 63;

/// Copies that belong to one answer, to one report of graph mode, or to nobody yet.
#[derive(Debug)]
pub struct Transfer {
    /// Its session.
    pub session: u64,
    /// Ticket of the answer; 0 for a report, [`BACKGROUND`] and a number for rows that nobody has asked for yet.
    pub ticket: u64,
    /// What to copy. Every range lies in `memory`, or in the session's slab.
    pub copies: Vec<CopyRun>,
    /// Bytes in all.
    pub bytes: u64,
    /// What the copies touch.
    pub memory: Arc<SessionMemory>,
    /// What the device is to make known once the copies are there; `None` where [`Device::publishes`] is false.
    pub publish: Option<Publication>,
    /// Where to report.
    pub report: Arc<Report>,
}

/// What a stream of the client's reads.
#[derive(Debug)]
pub enum Publication {
    /// An answer.
    Answer(AnswerWords),
    /// The residency records of one layer of a sequence.
    Records(Box<RecordUpdate>),
}

/// What a stream of the client's reads of an answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct AnswerWords {
    /// Ticket and status, as in the timeline word.
    pub word: u64,
    /// Bytes of the block table, which lies where the session's layout has it.
    pub table_bytes: u32,
}

/// New contents of the residency records of one layer of a sequence. They hold once all of them have the new version.
#[derive(Debug, Default)]
pub struct RecordUpdate {
    /// The sequence's slot of the records.
    pub slot: u32,
    /// The layer.
    pub layer: u32,
    /// Offset of the first record.
    pub offset: u64,
    /// Bytes from record to record.
    pub stride: u64,
    /// How many: one for each KV head.
    pub heads: u32,
    /// The new version.
    pub version: u64,
    /// The records' new contents one behind the other, each with a version that nobody expects; empty if nothing but the
    /// version changes.
    pub image: Vec<u8>,
    /// Where each record's contents end in `image`.
    pub ends: Vec<usize>,
}

/// A transfer that has ended.
#[derive(Debug)]
pub struct Done {
    /// Its session.
    pub session: u64,
    /// Ticket of the answer; 0 for a report.
    pub ticket: u64,
    /// The records that it made known, if those.
    pub records: Option<Box<RecordUpdate>>,
    /// The transfer's list, emptied, to be used again.
    pub copies: Vec<CopyRun>,
    /// When its last byte had arrived.
    pub finished: Instant,
    /// Whether the device could not do it: the slots hold anything.
    pub failed: bool,
}

impl Transfer {
    /// Reports its end to the lane that asked for it.
    pub fn end(mut self, failed: bool) {
        self.copies.clear();
        let records = match self.publish {
            Some(Publication::Records(update)) => Some(update),
            Some(Publication::Answer(_)) | None => None,
        };
        let (session, ticket, copies) = (self.session, self.ticket, self.copies);
        self.report.push(Done { session, ticket, records, copies, finished: Instant::now(), failed });
    }
}

/// A lane's queue of ended transfers, and the bell that wakes the lane.
#[derive(Debug)]
pub struct Report {
    queue: SegQueue<Done>,
    bell: Arc<Bell>,
}

impl Report {
    /// A queue that rings `bell`.
    #[must_use]
    pub fn new(bell: Arc<Bell>) -> Self {
        Self { queue: SegQueue::new(), bell }
    }

    /// Reports the end of a transfer. It never waits for the lane: a lane may be waiting for the device.
    pub fn push(&self, done: Done) {
        self.queue.push(done);
        self.bell.ring();
    }

    /// Takes one.
    #[must_use]
    pub fn pop(&self) -> Option<Done> {
        self.queue.pop()
    }
}

/// Memory of one session's slab.
pub trait SlabMemory: Memory {
    /// Its length in bytes.
    fn bytes(&self) -> usize;

    /// Its address, as destinations of copies have it. The host may not follow it unless the device is the host.
    fn base(&self) -> *mut u8;

    /// Writes there, where the host can and nobody else does.
    ///
    /// # Errors
    /// Bytes outside of it.
    fn write(&self, offset: usize, bytes: &[u8]) -> Result<(), MemoryError> {
        Err(MemoryError::OutOfBounds { offset, bytes: bytes.len(), len: 0 })
    }

    /// Whether it is a GPU's.
    fn is_on_device(&self) -> bool {
        false
    }

    /// How the client gets at it, with the descriptors that go along.
    fn export(&self) -> Result<(SlabRef, Vec<OwnedFd>), SlabError>;
}

/// A session's slab.
#[derive(Debug, Clone)]
pub struct Slab(pub Arc<dyn SlabMemory>);

impl Slab {
    /// Address of a range, for copies into it.
    pub fn address(&self, offset: usize, bytes: usize) -> Result<*mut u8, MemoryError> {
        let len = self.0.bytes();
        match offset.checked_add(bytes) {
            Some(end) if end <= len => Ok(self.0.base().wrapping_add(offset)),
            _ => Err(MemoryError::OutOfBounds { offset, bytes, len }),
        }
    }
}

/// The process that may open a session's device memory.
#[derive(Debug)]
pub struct Importer {
    /// Readable once the process has ended; `None` if the system cannot say.
    pub process: Option<OwnedFd>,
    /// The client has said that it has closed everything.
    pub closed: AtomicBool,
}

impl Importer {
    /// Whether nothing of it can have device memory open any more.
    #[must_use]
    pub fn gone(&self) -> bool {
        self.closed.load(Ordering::Acquire) || self.has_ended()
    }

    /// Whether its process has ended.
    #[must_use]
    pub fn has_ended(&self) -> bool {
        let Some(process) = &self.process else { return false };
        let mut fds = [PollFd::new(process.as_fd(), PollFlags::POLLIN)];
        matches!(poll(&mut fds, PollTimeout::ZERO), Ok(1))
    }
}

/// What a session's slab is made for.
#[derive(Debug)]
pub struct SlabRequest {
    /// The session.
    pub session: u64,
    /// Bytes of the slab.
    pub bytes: usize,
    /// Bytes of the residency records; 0: no graph mode.
    pub records: u64,
    /// Where everything lies in the session's memory.
    pub layout: Layout,
    /// The daemon → client memfd, from which block tables are published.
    pub d2c: Arc<SharedMapping>,
    /// Abilities that client and daemon have in common.
    pub features: u64,
    /// Who will open it.
    pub importer: Arc<Importer>,
    /// Whose it is.
    pub account: Arc<Account>,
}

/// Why there is no slab.
#[derive(Debug, Error)]
pub enum SlabError {
    /// Host memory that could not be had.
    #[error(transparent)]
    Memory(#[from] MemoryError),
    /// The device has no room, or cannot serve this client.
    #[error("{0}")]
    Refused(Failure),
}

impl From<SlabError> for Failure {
    fn from(error: SlabError) -> Self {
        match error {
            SlabError::Memory(error) => error.into(),
            SlabError::Refused(failure) => failure,
        }
    }
}

/// Something that attention runs on.
pub trait Device: Send + Sync + Debug {
    /// Its name, as in `--device`.
    fn name(&self) -> &str;

    /// How it gives answers.
    fn mode(&self) -> Mode;

    /// Features of which a client must have at least one.
    fn features(&self) -> u64;

    /// Makes a slab for one session. It may take a while, and is never called on a lane.
    fn slab(&self, request: SlabRequest) -> Result<Slab, SlabError>;

    /// Whether it makes answers known to the client's streams, so that every answer goes through [`Device::submit`].
    fn publishes(&self) -> bool {
        false
    }

    /// Whether sessions can be served in graph mode.
    fn has_records(&self) -> bool {
        false
    }

    /// Takes a transfer, without blocking. Gives it back if the device is overloaded or stopped.
    fn submit(&self, transfer: Transfer) -> Result<(), Transfer>;

    /// The daemon ends: what waits for a simulated link waits no longer.
    fn hurry(&self) {}

    /// How extents are pinned for it, if that is its business: then no extent is used that could not be.
    fn pin(&self) -> Option<Box<dyn Pin>> {
        None
    }

    /// The host's NUMA node that it hangs on.
    fn numa_node(&self) -> Option<u32> {
        None
    }

    /// Becomes something once the device is lost for this process, with the reason.
    fn lost(&self) -> Option<tokio::sync::watch::Receiver<Option<String>>> {
        None
    }

    /// What to say of it in the status.
    fn report(&self) -> Option<DeviceReport> {
        None
    }
}
