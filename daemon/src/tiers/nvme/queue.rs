//! What waits for a device: reads by deadline, writes in the order in which they came.
//!
//! Jobs that came together and have the same deadline are ordered by where they lie, so that adjacent ones meet and go
//! in one operation. Jobs that came later never overtake them, so nothing waits forever at the end of the disk.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, VecDeque};

use super::job::Direction;
use super::operation::Queued;

/// The most bytes of one operation, unless a single page has more: beyond it a device gains nothing, and what is behind
/// waits.
const OPERATION_BYTES: usize = 256 << 10;

/// A read, with what it is ordered by.
#[derive(Debug)]
struct Waiting {
    /// Deadline, batch, place.
    key: (u64, u64, u64),
    queued: Queued,
}

impl PartialEq for Waiting {
    fn eq(&self, other: &Self) -> bool {
        self.key == other.key
    }
}

impl Eq for Waiting {}

impl PartialOrd for Waiting {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for Waiting {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.key.cmp(&other.key)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub(super) struct Queue {
    reads: BinaryHeap<Reverse<Waiting>>,
    writes: VecDeque<Queued>,
    /// Writes of the batch that is coming in.
    incoming: Vec<Queued>,
    batch: u64,
    /// What has to wait for something else in its slot.
    parked: Vec<Queued>,
}

impl Queue {
    /// Adds a job to the batch that is coming in.
    pub(super) fn push(&mut self, queued: Queued) {
        match queued.job.direction {
            Direction::Read => {
                let key = (queued.job.deadline_ns, self.batch, queued.job.slot.offset());
                self.reads.push(Reverse(Waiting { key, queued }));
            }
            Direction::Write => self.incoming.push(queued),
        }
    }

    /// What comes from now on came later.
    pub(super) fn end_batch(&mut self) {
        self.batch += 1;
        self.incoming.sort_by_key(|queued| queued.job.slot.offset());
        self.writes.extend(self.incoming.drain(..));
    }

    /// Whether reads wait.
    pub(super) fn has_reads(&self) -> bool {
        !self.reads.is_empty()
    }

    /// Whether writes wait.
    pub(super) fn has_writes(&self) -> bool {
        !self.writes.is_empty()
    }

    /// Takes the next read, with what is adjacent to it and next too; nothing if all of them have to wait for writes.
    pub(super) fn take_reads(&mut self, pages: &mut Vec<Queued>) {
        while let Some(Reverse(next)) = self.reads.peek() {
            if !joins(pages, &next.queued) {
                return;
            }
            let Some(Reverse(Waiting { queued, .. })) = self.reads.pop() else { return };
            let slot = &queued.job.slot;
            if slot.chunk.index.begin_read(slot.index) {
                pages.push(queued);
            } else {
                self.parked.push(queued);
            }
        }
    }

    /// Takes the next write, with what is adjacent to it and next too.
    pub(super) fn take_writes(&mut self, pages: &mut Vec<Queued>) {
        while let Some(next) = self.writes.front() {
            if !joins(pages, next) {
                return;
            }
            let Some(queued) = self.writes.pop_front() else { return };
            let slot = &queued.job.slot;
            if slot.chunk.index.begin_write(slot.index) {
                pages.push(queued);
            } else {
                self.parked.push(queued);
            }
        }
    }

    /// Something has ended: whoever waited for it may try again, and first.
    pub(super) fn unpark(&mut self) {
        if self.parked.is_empty() {
            return;
        }
        let mut first = VecDeque::new();
        for queued in std::mem::take(&mut self.parked) {
            match queued.job.direction {
                Direction::Read => self.push(queued),
                Direction::Write => first.push_back(queued),
            }
        }
        first.append(&mut self.writes);
        self.writes = first;
    }

    /// Takes all writes that have not begun.
    pub(super) fn take_all_writes(&mut self, into: &mut Vec<Queued>) {
        into.extend(self.writes.drain(..));
        self.take_parked(Direction::Write, into);
    }

    /// Takes all reads that have not begun.
    pub(super) fn take_all_reads(&mut self, into: &mut Vec<Queued>) {
        into.extend(self.reads.drain().map(|Reverse(waiting)| waiting.queued));
        self.take_parked(Direction::Read, into);
    }

    fn take_parked(&mut self, direction: Direction, into: &mut Vec<Queued>) {
        let (taken, left) = std::mem::take(&mut self.parked)
            .into_iter()
            .partition(|queued| queued.job.direction == direction);
        self.parked = left;
        into.extend::<Vec<_>>(taken);
    }
}

/// Whether a page goes in the same operation as those before it.
fn joins(pages: &[Queued], next: &Queued) -> bool {
    let Some(last) = pages.last() else { return true };
    let bytes = next.job.slot.page_bytes();
    last.job.slot.is_followed_by(&next.job.slot) && (pages.len() + 1) * bytes <= OPERATION_BYTES
}
