//! What is known of each slot of a chunk: the checksum of what it holds, and what is under way in it.
//!
//! The index lives in memory only, beside no data: a block that was torn, flipped, written elsewhere or left over from
//! an earlier owner does not match it. 12 bytes for each slot.

use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};

/// In a mark: one [`SlotRef`](super::SlotRef).
const HELD: u64 = 1;
const HELD_MASK: u64 = (1 << 24) - 1;
/// In a mark: one write that waits or is in flight.
const PENDING: u64 = 1 << 24;
const PENDING_MASK: u64 = ((1 << 24) - 1) << 24;
/// In a mark: a write is in flight.
const WRITING: u64 = 1 << 48;
/// In a mark: one read in flight.
const READING: u64 = 1 << 49;

/// A page's checksum where 0 means none: one page in four thousand millions shares its own with another one.
pub(super) fn never_zero(checksum: u32) -> u32 {
    checksum.max(1)
}

/// See the module.
#[derive(Debug)]
pub(super) struct Index {
    /// 0: the slot holds nothing.
    sums: Box<[AtomicU32]>,
    marks: Box<[AtomicU64]>,
}

impl Index {
    /// Of so many empty slots.
    pub(super) fn new(slots: usize) -> Self {
        let sums = (0..slots).map(|_| AtomicU32::new(0)).collect();
        Self { sums, marks: (0..slots).map(|_| AtomicU64::new(0)).collect() }
    }

    /// The checksum of what the slot holds, if anything.
    pub(super) fn checksum(&self, slot: u32) -> Option<u32> {
        let sum = self.sums[slot as usize].load(Ordering::Acquire);
        (sum != 0).then_some(sum)
    }

    /// The slot holds a page with this checksum.
    pub(super) fn set(&self, slot: u32, checksum: u32) {
        self.sums[slot as usize].store(checksum, Ordering::Release);
    }

    /// The slot holds nothing.
    pub(super) fn clear(&self, slot: u32) {
        self.sums[slot as usize].store(0, Ordering::Release);
    }

    /// Somebody refers to the slot.
    pub(super) fn hold(&self, slot: u32) {
        self.marks[slot as usize].fetch_add(HELD, Ordering::Relaxed);
    }

    /// … and no longer does. What was done before is seen by whoever finds it unheld.
    pub(super) fn let_go(&self, slot: u32) {
        self.marks[slot as usize].fetch_sub(HELD, Ordering::Release);
    }

    /// Whether anybody refers to it.
    pub(super) fn is_held(&self, slot: u32) -> bool {
        self.marks[slot as usize].load(Ordering::Acquire) & HELD_MASK != 0
    }

    /// A write has been handed in: reads that come later wait for it.
    pub(super) fn announce_write(&self, slot: u32) {
        self.marks[slot as usize].fetch_add(PENDING, Ordering::Relaxed);
    }

    /// Whether a write of the slot waits or is in flight.
    pub(super) fn awaits_write(&self, slot: u32) -> bool {
        self.marks[slot as usize].load(Ordering::Relaxed) & PENDING_MASK != 0
    }

    /// Begins a read, unless a write of the slot waits or is in flight.
    pub(super) fn begin_read(&self, slot: u32) -> bool {
        if self.awaits_write(slot) {
            return false;
        }
        self.marks[slot as usize].fetch_add(READING, Ordering::Relaxed);
        true
    }

    /// Ends a read.
    pub(super) fn end_read(&self, slot: u32) {
        self.marks[slot as usize].fetch_sub(READING, Ordering::Relaxed);
    }

    /// Begins an announced write, unless anything of the slot is in flight.
    pub(super) fn begin_write(&self, slot: u32) -> bool {
        let mark = &self.marks[slot as usize];
        if mark.load(Ordering::Relaxed) >= WRITING {
            return false;
        }
        mark.fetch_add(WRITING, Ordering::Relaxed);
        true
    }

    /// Ends a write that was begun.
    pub(super) fn end_write(&self, slot: u32) {
        self.marks[slot as usize].fetch_sub(WRITING + PENDING, Ordering::Relaxed);
    }

    /// An announced write that will not begin.
    pub(super) fn withdraw_write(&self, slot: u32) {
        self.marks[slot as usize].fetch_sub(PENDING, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_slot_has_a_checksum_once_it_was_written_and_none_after_it_was_cleared() {
        let index = Index::new(2);
        assert_eq!(index.checksum(1), None);
        index.set(1, never_zero(0));
        assert_eq!((index.checksum(0), index.checksum(1)), (None, Some(1)));
        index.clear(1);
        assert_eq!(index.checksum(1), None);
    }

    #[test]
    fn reads_wait_for_writes_that_were_handed_in_and_writes_for_whatever_is_in_flight() {
        let index = Index::new(1);
        assert!(index.begin_read(0) && index.begin_read(0), "reads do not wait for one another");
        index.announce_write(0);
        assert!(!index.begin_read(0));
        assert!(!index.begin_write(0), "two reads are in flight");
        index.end_read(0);
        index.end_read(0);
        assert!(index.begin_write(0));
        index.announce_write(0);
        assert!(!index.begin_write(0), "one write at a time");
        index.end_write(0);
        index.withdraw_write(0);
        assert!(index.begin_read(0));
    }

    #[test]
    fn a_slot_is_held_until_the_last_reference_is_gone() {
        let index = Index::new(1);
        index.hold(0);
        index.hold(0);
        index.let_go(0);
        assert!(index.is_held(0));
        index.let_go(0);
        assert!(!index.is_held(0));
    }
}
