//! Where attention runs, and how bytes get there.
//!
//! A [`Device`] takes [`Transfer`]s and reports each as [`Done`] on the lane's queue; it never blocks a lane.
//! [`host::HostDevice`] is the embedded default; [`cuda`] has what a GPU needs. [`DeviceName`] is what an operator calls
//! them.

pub mod cuda;
pub mod host;
mod name;

use std::fmt::Debug;
use std::sync::Arc;
use std::time::Instant;

use crossbeam::queue::SegQueue;
use kvoyant_kernels::CopyRun;
use kvoyant_protocol::control::Mode;
use kvoyant_protocol::futex::Bell;
use kvoyant_protocol::memory::{Memfd, MemoryError, SharedMapping};

pub use name::{BadDeviceName, DeviceName};

/// Memory that transfers of a session read and write. A transfer holds on to it, so that a session that ends in
/// the middle of one takes nothing away.
#[derive(Debug, Default)]
pub struct SessionMemory {
    /// Every mapping that a copy may touch. Pushed to when an extent is added, never shrunk.
    mappings: std::sync::Mutex<Vec<Arc<SharedMapping>>>,
}

impl SessionMemory {
    /// Keeps a mapping for as long as any transfer of the session runs.
    pub fn keep(&self, mapping: Arc<SharedMapping>) {
        self.mappings.lock().unwrap_or_else(std::sync::PoisonError::into_inner).push(mapping);
    }
}

/// Copies that belong to one answer.
#[derive(Debug)]
pub struct Transfer {
    /// Session of the answer.
    pub session: u64,
    /// Ticket of the answer.
    pub ticket: u64,
    /// What to copy. Every range lies in `memory`.
    pub copies: Vec<CopyRun>,
    /// Bytes in all.
    pub bytes: u64,
    /// What the copies touch.
    pub memory: Arc<SessionMemory>,
    /// Where to report.
    pub report: Arc<Report>,
}

/// A transfer that has ended.
#[derive(Debug)]
pub struct Done {
    /// Session of the answer.
    pub session: u64,
    /// Ticket of the answer.
    pub ticket: u64,
    /// The transfer's list, emptied, to be used again.
    pub copies: Vec<CopyRun>,
    /// When its last byte had arrived.
    pub finished: Instant,
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

/// A session's slab.
#[derive(Debug)]
pub struct Slab {
    /// Its file, which the client maps for reading.
    pub file: Memfd,
    /// The daemon's mapping.
    pub memory: Arc<SharedMapping>,
}

/// Something that attention runs on.
pub trait Device: Send + Sync + Debug {
    /// Its name, as in `--device`.
    fn name(&self) -> &'static str;

    /// How it gives answers.
    fn mode(&self) -> Mode;

    /// Makes a slab for one session.
    fn slab(&self, bytes: usize) -> Result<Slab, MemoryError>;

    /// Takes a transfer, without blocking. Gives it back if the device is overloaded or stopped.
    fn submit(&self, transfer: Transfer) -> Result<(), Transfer>;
}
