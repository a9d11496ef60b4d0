//! The I/O thread of a device: takes jobs in, keeps the device busy, and says how each page ended.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use kvoyant_protocol::futex::now_ns;
use kvoyant_protocol::memory::{MemoryError, SharedMapping};

use super::CHUNK_BYTES;
use super::disk::{Disk, Message};
use super::engine::Engine;
use super::index::never_zero;
use super::job::{Direction, Ended, Job, PageError, SpillReport};
use super::operation::{Completed, Kind, Operation, Queued};
use super::queue::Queue;
use super::raw;
use super::stats::add;

/// How often an operation is tried again when the system asks for it.
const RETRIES: u32 = 64;

/// After so many failed writes in a row a device gets no more.
const FAILURES: u32 = 8;

/// How much goes on at a time.
#[derive(Debug, Clone, Copy)]
pub(super) struct Depths {
    /// Operations in flight.
    pub(super) all: u32,
    /// Writes among them, while there are reads.
    pub(super) writes: u32,
}

/// See the module.
#[derive(Debug)]
pub(super) struct Worker {
    disk: Arc<Disk>,
    engine: Box<dyn Engine>,
    depths: Depths,
    queue: Queue,
    reads: u32,
    writes: u32,
    /// The chunks that are being erased: the first of them, and how many.
    erasing: Option<(u32, u32)>,
    /// Whether the area can be zeroed in place.
    can_zero: bool,
    failures: u32,
    said_unregistered: bool,
    said_unerased: bool,
    /// To be used again.
    spare: Vec<Operation>,
    ended: Vec<Completed>,
    /// Pages that have been moved, or not, and are to be looked at.
    moved: Vec<(Queued, Result<(), PageError>)>,
    refused: Vec<Queued>,
    /// Pages, begun, that another of their operation may have spoilt: each is tried by itself.
    alone: Vec<Queued>,
    /// Reports that are to be rung.
    touched: Vec<Arc<SpillReport>>,
}

impl Worker {
    pub(super) fn new(disk: Arc<Disk>, engine: Box<dyn Engine>, depths: Depths) -> Self {
        Self {
            disk,
            engine,
            depths,
            queue: Queue::default(),
            reads: 0,
            writes: 0,
            erasing: None,
            can_zero: true,
            failures: 0,
            said_unregistered: false,
            said_unerased: false,
            spare: Vec::new(),
            ended: Vec::new(),
            moved: Vec::new(),
            refused: Vec::new(),
            alone: Vec::new(),
            touched: Vec::new(),
        }
    }

    /// Works until it is told to stop and nothing is in flight.
    pub(super) fn run(mut self) {
        loop {
            let stopping = self.disk.stopping.load(Ordering::Acquire);
            self.take_in();
            if stopping {
                self.queue.take_all_reads(&mut self.refused);
            }
            if stopping || self.disk.has_failed() {
                self.queue.take_all_writes(&mut self.refused);
            }
            self.refuse();
            self.pump();
            self.erase_next(stopping);
            if !self.moved.is_empty() {
                // The device gets its next work before we look at what it has brought, which takes longer.
                self.engine.wait(&mut self.ended, false);
                self.settle_all();
            }
            self.ring();
            if self.ended.is_empty() {
                if stopping
                    && self.reads + self.writes == 0
                    && self.alone.is_empty()
                    && self.erasing.is_none()
                {
                    return;
                }
                // What was parked, or is to be refused now, has nothing in flight that would wake us.
                let idle = self.reads + self.writes == 0;
                let left = self.queue.has_reads() || self.queue.has_writes() || !self.alone.is_empty();
                let may_sleep = self.disk.fall_asleep(|disk| {
                    !(idle && left)
                        && disk.inbox.is_empty()
                        && (disk.returned.is_empty() || self.erasing.is_some() || stopping)
                        && disk.stopping.load(Ordering::Relaxed) == stopping
                });
                self.engine.wait(&mut self.ended, may_sleep);
                self.disk.wake_up();
            }
            self.finish();
        }
    }

    fn take_in(&mut self) {
        while let Some(message) = self.disk.inbox.pop() {
            match message {
                Message::Move(queued) => match objection(&queued.job) {
                    None => self.queue.push(queued),
                    Some(error) => self.reject(queued, error),
                },
                Message::Register(memory) => self.register(&memory),
                Message::Forget(memory) => self.engine.forget(&memory),
            }
            self.disk.registered.store(self.engine.registered() as u64, Ordering::Relaxed);
        }
        self.queue.end_batch();
    }

    fn register(&mut self, memory: &Arc<SharedMapping>) {
        if let Err(error) = self.engine.register(memory)
            && !self.said_unregistered
        {
            self.said_unregistered = true;
            tracing::warn!(
                "an extent cannot be registered for {}: {error}; I/O goes on without, at a little more cost each (the \
                 memlock limit, `ulimit -l` or LimitMEMLOCK=, is the usual cause)",
                self.disk.area.path.display()
            );
        }
    }

    /// Ends what is not begun any more.
    fn refuse(&mut self) {
        for queued in std::mem::take(&mut self.refused) {
            self.reject(queued, PageError::Failed);
        }
    }

    /// Ends what has not begun.
    fn reject(&mut self, queued: Queued, error: PageError) {
        let slot = &queued.job.slot;
        let failures = match queued.job.direction {
            Direction::Read => &self.disk.counters.read_failures,
            Direction::Write => {
                slot.chunk.index.withdraw_write(slot.index);
                &self.disk.counters.write_failures
            }
        };
        add(failures, 1);
        self.report(queued, Err(error));
    }

    /// Begins as much as may be in flight: a write if there is none, then reads, then writes.
    fn pump(&mut self) {
        let Depths { all, writes } = self.depths;
        if self.writes == 0 {
            self.begin(Direction::Write);
        }
        let room_for_writes = u32::from(self.writes == 0 && self.queue.has_writes());
        while self.reads + self.writes + room_for_writes < all && self.begin(Direction::Read) {}
        let most = if self.reads > 0 || self.queue.has_reads() { writes.max(1) } else { all };
        while self.reads + self.writes < all && self.writes < most && self.begin(Direction::Write) {}
    }

    /// Begins the next operation of a direction; false if there is none.
    fn begin(&mut self, direction: Direction) -> bool {
        if self.reads + self.writes >= self.depths.all {
            return false;
        }
        let mut operation = self.spare.pop().unwrap_or_else(Operation::empty);
        let of_it = |page: &Queued| page.job.direction == direction;
        match (self.alone.iter().position(of_it), direction) {
            (Some(at), _) => operation.pages.push(self.alone.swap_remove(at)),
            (None, Direction::Read) => self.queue.take_reads(&mut operation.pages),
            (None, Direction::Write) => self.queue.take_writes(&mut operation.pages),
        }
        if operation.pages.is_empty() {
            self.spare.push(operation);
            return false;
        }
        self.start(operation, direction);
        true
    }

    /// Begins an operation with the pages that it has, whose slots are marked.
    fn start(&mut self, mut operation: Operation, direction: Direction) {
        let counters = &self.disk.counters;
        match direction {
            Direction::Read => {
                operation.seal(Kind::Read);
                self.reads += 1;
                add(&counters.read_operations, 1);
            }
            Direction::Write => {
                for page in &operation.pages {
                    note_checksum(&page.job);
                }
                operation.seal(Kind::Write);
                self.writes += 1;
                add(&counters.write_operations, 1);
            }
        }
        self.engine.push(operation);
    }

    /// Erases the next chunk that nobody has any more.
    fn erase_next(&mut self, stopping: bool) {
        if self.erasing.is_some() || stopping {
            return;
        }
        let Some(chunks) = self.disk.returned.pop() else { return };
        self.erasing = Some(chunks);
        self.change(chunks, if self.can_zero { Kind::Zero } else { Kind::Punch });
    }

    fn change(&mut self, (first, count): (u32, u32), kind: Kind) {
        let mut operation = self.spare.pop().unwrap_or_else(Operation::empty);
        operation.set_range(kind, self.disk.chunk_offset(first), count as usize * CHUNK_BYTES as usize);
        self.engine.push(operation);
    }

    /// A step of erasing has ended: zeros in place, or else a hole that is filled up again.
    fn erased(&mut self, kind: Kind, result: i32) {
        let Some(chunks) = self.erasing else { return };
        match (kind, result) {
            (Kind::Zero, 0..) | (Kind::Allocate, _) => {}
            (Kind::Zero, _) => {
                self.can_zero = result != -libc::EOPNOTSUPP;
                return self.change(chunks, Kind::Punch);
            }
            (Kind::Punch, 0..) if self.disk.area.allocated => return self.change(chunks, Kind::Allocate),
            (_, 0..) => {}
            (_, errno) => {
                if !self.said_unerased {
                    self.said_unerased = true;
                    tracing::warn!(
                        "{} does not erase ranges ({}): what sessions leave there stays until it is overwritten, though \
                         nobody can read it through the daemon",
                        self.disk.area.path.display(),
                        std::io::Error::from_raw_os_error(-errno)
                    );
                }
            }
        }
        self.erasing = None;
        (chunks.0..chunks.0 + chunks.1).for_each(|chunk| self.disk.free.give(chunk));
    }

    /// Goes on with, or reports, what has ended.
    fn finish(&mut self) {
        let mut ended = std::mem::take(&mut self.ended);
        for Completed { operation, result } in ended.drain(..) {
            match operation.kind {
                Kind::Read | Kind::Write => self.progress(operation, result),
                kind => {
                    self.spare.push(operation);
                    self.erased(kind, result);
                }
            }
        }
        self.ended = ended;
    }

    /// Looks at what has been moved, and reports it.
    fn settle_all(&mut self) {
        let mut moved = std::mem::take(&mut self.moved);
        let now = now_ns();
        for (page, result) in moved.drain(..) {
            self.settle(page, result, now);
        }
        self.moved = moved;
        self.queue.unpark();
    }

    /// What an attempt at pages came to.
    fn progress(&mut self, mut operation: Operation, result: i32) {
        let left = operation.bytes - operation.done;
        let failure = match result {
            1.. => {
                let moved = (result as usize).min(left);
                operation.done += moved;
                if moved < left {
                    // What moves nothing ends this.
                    return self.engine.push(operation);
                }
                None
            }
            0 => Some(None),
            errno => {
                let again = matches!(-errno, libc::EINTR | libc::EAGAIN);
                if again && operation.retries < RETRIES {
                    operation.retries += 1;
                    return self.engine.push(operation);
                }
                Some(Some(-errno))
            }
        };
        let kind = operation.kind;
        match kind {
            Kind::Read => self.reads -= 1,
            _ => self.writes -= 1,
        }
        let (done, alone) = (operation.done, operation.pages.len() == 1);
        let mut end = 0;
        for page in operation.pages.drain(..) {
            let begin = end;
            end += page.job.slot.page_bytes();
            match failure {
                Some(_) if end > done && !alone => self.alone.push(page),
                Some(errno) if end > done => {
                    let error = failed(&page.job, errno, done.saturating_sub(begin));
                    self.moved.push((page, Err(error)));
                }
                _ => self.moved.push((page, Ok(()))),
            }
        }
        self.spare.push(operation);
    }

    /// A page has come or gone, or will not.
    fn settle(&mut self, page: Queued, moved: Result<(), PageError>, now: u64) {
        let Job { slot, direction, deadline_ns, .. } = &page.job;
        let (index, counters) = (&slot.chunk.index, &self.disk.counters);
        let bytes = slot.page_bytes() as u64;
        let result = match direction {
            Direction::Read => {
                let result = moved.and_then(|()| verify(&page.job));
                index.end_read(slot.index);
                if result.is_ok() {
                    add(&counters.reads, 1);
                    add(&counters.read_bytes, bytes);
                    add(&counters.late_reads, u64::from(*deadline_ns != 0 && now > *deadline_ns));
                    counters.read_took(now.saturating_sub(page.since_ns));
                } else {
                    add(&counters.read_failures, 1);
                    blank(&page.job);
                }
                result
            }
            Direction::Write => {
                if moved.is_err() {
                    index.clear(slot.index);
                    add(&counters.write_failures, 1);
                } else {
                    add(&counters.writes, 1);
                    add(&counters.written_bytes, bytes);
                }
                index.end_write(slot.index);
                self.note(moved);
                moved
            }
        };
        self.report(page, result);
    }

    /// Counts failed writes in a row.
    fn note(&mut self, result: Result<(), PageError>) {
        let Err(error) = result else {
            self.failures = 0;
            return;
        };
        self.failures += 1;
        if self.failures == FAILURES && !self.disk.has_failed() {
            let reason = format!("{FAILURES} writes in a row have failed, the last one because {error}");
            tracing::error!(
                "{}: {reason}. Nothing more is spilled there; what it holds is still read. Mend the device and start \
                 the daemon again",
                self.disk.area.path.display()
            );
            self.disk.fail(reason);
        }
    }

    fn report(&mut self, page: Queued, result: Result<(), PageError>) {
        let Job { slot, memory, report, session, token, direction, .. } = page.job;
        // Whoever hears of the end may take the slot and the frame for something else.
        drop((slot, memory));
        report.add(Ended { session, token, direction, result });
        if !self.touched.iter().any(|touched| Arc::ptr_eq(touched, &report)) {
            self.touched.push(report);
        }
    }

    fn ring(&mut self) {
        for report in self.touched.drain(..) {
            report.ring();
        }
    }
}

fn failed(job: &Job, errno: Option<i32>, done: usize) -> PageError {
    let (direction, offset, wanted) = (job.direction, job.slot.offset(), job.slot.page_bytes());
    match errno {
        Some(errno) => PageError::Io { direction, offset, errno },
        None => PageError::Short { direction, offset, done, wanted },
    }
}

/// Why a job cannot be begun at all.
fn objection(job: &Job) -> Option<PageError> {
    let Job { slot, memory, offset, .. } = job;
    if memory.address(*offset, slot.page_bytes()).is_err() {
        return Some(failed(job, Some(libc::EFAULT), 0));
    }
    let index = &slot.chunk.index;
    let empty = job.direction == Direction::Read
        && !index.awaits_write(slot.index)
        && index.checksum(slot.index).is_none();
    empty.then(|| PageError::NeverWritten { offset: slot.offset() })
}

/// CRC-32C of a frame, which is never 0, so that 0 may mean that there is none.
fn checksum(memory: &SharedMapping, offset: usize, bytes: usize) -> Result<u32, MemoryError> {
    raw::checksum(memory, offset, bytes).map(never_zero)
}

/// Notes the checksum of what is about to be written.
fn note_checksum(job: &Job) {
    let Job { slot, memory, offset, .. } = job;
    match checksum(memory, *offset, slot.page_bytes()) {
        Ok(sum) => slot.chunk.index.set(slot.index, sum),
        // It has been looked at when it was handed in. Without a checksum it is not read.
        Err(_) => slot.chunk.index.clear(slot.index),
    }
}

/// Leaves nothing of what should not have come: a client sees the frame, and it may be somebody else's text.
fn blank(job: &Job) {
    const ZEROS: [u8; 4096] = [0; 4096];
    let bytes = job.slot.page_bytes();
    for at in (0..bytes).step_by(ZEROS.len()) {
        // It has been looked at when it was handed in.
        let _ = job.memory.write(job.offset + at, &ZEROS[..ZEROS.len().min(bytes - at)]);
    }
}

/// Whether what was read is what was written.
fn verify(job: &Job) -> Result<(), PageError> {
    let Job { slot, memory, offset: frame, .. } = job;
    let offset = slot.offset();
    let expected = slot.chunk.index.checksum(slot.index).ok_or(PageError::NeverWritten { offset })?;
    let found = checksum(memory, *frame, slot.page_bytes());
    let found = found.map_err(|_| failed(job, Some(libc::EFAULT), 0))?;
    if found == expected { Ok(()) } else { Err(PageError::Checksum { offset, expected, found }) }
}
