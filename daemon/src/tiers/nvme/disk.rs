//! What lanes and the I/O thread of a device share.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use crossbeam::queue::SegQueue;
use kvoyant_protocol::futex::publish_before_looking;
use kvoyant_protocol::memory::SharedMapping;

use super::CHUNK_BYTES;
use super::device::{Area, HEAD_BYTES};
use super::engine::Wake;
use super::free_map::FreeMap;
use super::operation::Queued;
use super::stats::{Counters, DeviceReport, DeviceState};

/// Most chunks that are erased by one call: the daemon's end waits for it.
const ERASED_AT_ONCE: u32 = 64;

/// What the I/O thread is asked to do.
#[derive(Debug)]
pub(super) enum Message {
    /// Move a page.
    Move(Queued),
    /// Register memory.
    Register(Arc<SharedMapping>),
    /// Undo that.
    Forget(Arc<SharedMapping>),
}

/// See the module.
#[derive(Debug)]
pub(super) struct Disk {
    /// Its place among the devices.
    pub(super) number: usize,
    pub(super) area: Area,
    pub(super) counters: Counters,
    pub(super) inbox: SegQueue<Message>,
    /// Chunks that nobody has any more and that hold somebody's text: the first of them, and how many.
    pub(super) returned: SegQueue<(u32, u32)>,
    pub(super) free: FreeMap,
    /// Chunks that another daemon has left and nobody has claimed yet.
    unclaimed: Mutex<BTreeSet<u32>>,
    /// What is in it stays, for those who have yet to claim it, or for the next daemon.
    leaving: AtomicBool,
    pub(super) stopping: AtomicBool,
    pub(super) registered: AtomicU64,
    pub(super) engine: OnceLock<(&'static str, Arc<dyn Wake>)>,
    sleeping: AtomicBool,
    failed: AtomicBool,
    reason: Mutex<String>,
}

impl Disk {
    pub(super) fn new(number: usize, area: Area) -> Self {
        let chunks = u32::try_from(area.bytes / CHUNK_BYTES).unwrap_or(u32::MAX);
        let left = area.left;
        let (free, unclaimed) = match left {
            true => (FreeMap::none(chunks), (0..chunks).collect()),
            false => (FreeMap::new(chunks), BTreeSet::new()),
        };
        Self {
            number,
            area,
            counters: Counters::default(),
            inbox: SegQueue::new(),
            returned: SegQueue::new(),
            free,
            unclaimed: Mutex::new(unclaimed),
            leaving: AtomicBool::new(left),
            stopping: AtomicBool::new(false),
            registered: AtomicU64::new(0),
            engine: OnceLock::new(),
            sleeping: AtomicBool::new(false),
            failed: AtomicBool::new(false),
            reason: Mutex::default(),
        }
    }

    /// Where a chunk begins in the area, in bytes.
    pub(super) fn chunk_offset(&self, chunk: u32) -> u64 {
        HEAD_BYTES + u64::from(chunk) * CHUNK_BYTES
    }

    pub(super) fn take_chunk(&self) -> Option<u32> {
        self.free.take()
    }

    /// A chunk's last owner is gone. It is erased before anybody else gets it, or stays for the next daemon.
    pub(super) fn give_back(&self, chunk: u32) {
        let mut unclaimed = self.unclaimed();
        // Under the lock: whoever settles what is unclaimed looks once.
        if self.leaving.load(Ordering::Acquire) {
            unclaimed.insert(chunk);
            return;
        }
        drop(unclaimed);
        self.returned.push((chunk, 1));
        self.wake();
    }

    fn unclaimed(&self) -> MutexGuard<'_, BTreeSet<u32>> {
        self.unclaimed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a chunk that another daemon has left; false if it has left none of that number, or somebody has it already.
    pub(super) fn claim(&self, chunk: u32) -> bool {
        self.unclaimed().remove(&chunk)
    }

    /// What has not been claimed is nobody's.
    pub(super) fn settle(&self) {
        let nobodys = {
            let mut unclaimed = self.unclaimed();
            if !self.leaving.swap(false, Ordering::AcqRel) {
                return;
            }
            std::mem::take(&mut *unclaimed)
        };
        // Many at once, where many lie side by side: most of them nobody has ever had.
        let mut runs: Vec<(u32, u32)> = Vec::new();
        for chunk in nobodys {
            match runs.last_mut() {
                Some((first, count)) if *first + *count == chunk && *count < ERASED_AT_ONCE => *count += 1,
                _ => runs.push((chunk, 1)),
            }
        }
        runs.into_iter().for_each(|run| self.returned.push(run));
        self.wake();
    }

    /// From here on nothing is erased: the next daemon finds it.
    pub(super) fn leave(&self) {
        self.leaving.store(true, Ordering::Release);
    }

    /// Makes an end of the area, unless it is left.
    pub(super) fn close(&self) {
        if !self.leaving.load(Ordering::Acquire) {
            self.area.close();
        }
    }

    pub(super) fn free_bytes(&self) -> u64 {
        u64::from(self.free.free()) * CHUNK_BYTES
    }

    pub(super) fn total_bytes(&self) -> u64 {
        u64::from(self.free.chunks()) * CHUNK_BYTES
    }

    /// Whether pages can be written.
    pub(super) fn takes_writes(&self) -> bool {
        !self.failed.load(Ordering::Relaxed) && !self.stopping.load(Ordering::Relaxed)
    }

    pub(super) fn has_failed(&self) -> bool {
        self.failed.load(Ordering::Relaxed)
    }

    /// No more writes are taken.
    pub(super) fn fail(&self, reason: String) {
        *self.reason.lock().unwrap_or_else(PoisonError::into_inner) = reason;
        self.failed.store(true, Ordering::Release);
    }

    /// Wakes the I/O thread if it sleeps: what was done before is seen by it. See [`kvoyant_protocol::futex`].
    pub(super) fn wake(&self) {
        publish_before_looking();
        if self.sleeping.load(Ordering::Relaxed)
            && self.sleeping.swap(false, Ordering::AcqRel)
            && let Some((_, waker)) = self.engine.get()
        {
            waker.wake();
        }
    }

    /// Says that the I/O thread sleeps, and whether it may: it has nothing to do that it has not seen.
    pub(super) fn fall_asleep(&self, has_seen: impl Fn(&Self) -> bool) -> bool {
        self.sleeping.store(true, Ordering::Relaxed);
        publish_before_looking();
        let may = has_seen(self);
        if !may {
            self.wake_up();
        }
        may
    }

    pub(super) fn wake_up(&self) {
        self.sleeping.store(false, Ordering::Relaxed);
    }

    pub(super) fn report(&self) -> DeviceReport {
        let counters = &self.counters;
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        DeviceReport {
            path: self.area.path.clone(),
            engine: self.engine.get().map_or("none", |(name, _)| name).into(),
            direct: self.area.direct,
            total_bytes: self.total_bytes(),
            used_bytes: self.total_bytes() - self.free_bytes().min(self.total_bytes()),
            reads: read(&counters.reads),
            writes: read(&counters.writes),
            read_operations: read(&counters.read_operations),
            write_operations: read(&counters.write_operations),
            read_bytes: read(&counters.read_bytes),
            written_bytes: read(&counters.written_bytes),
            late_reads: read(&counters.late_reads),
            read_failures: read(&counters.read_failures),
            write_failures: read(&counters.write_failures),
            read_latency: counters.latency(),
            registered: read(&self.registered),
            state: if self.failed.load(Ordering::Acquire) {
                DeviceState::Failed(self.reason.lock().unwrap_or_else(PoisonError::into_inner).clone())
            } else {
                DeviceState::Serving
            },
        }
    }
}
