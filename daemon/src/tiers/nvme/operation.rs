//! One operation of a device: adjacent pages that go one way, or a chunk that is erased.

use std::sync::Arc;

use kvoyant_protocol::memory::SharedMapping;

use super::job::Job;
use super::raw::{self, Vectors};

/// A job and when it was handed in.
#[derive(Debug)]
pub(super) struct Queued {
    pub(super) job: Job,
    pub(super) since_ns: u64,
}

/// What an operation does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// Pages come in.
    Read,
    /// Pages go out.
    Write,
    /// A range becomes zeros and stays allocated.
    Zero,
    /// A range becomes a hole.
    Punch,
    /// A range is allocated.
    Allocate,
}

/// See the module. It owns what it touches until it has ended: an engine holds on to it for as long as the kernel does.
#[derive(Debug)]
pub(super) struct Operation {
    pub(super) kind: Kind,
    /// Where it begins in the area, in bytes.
    pub(super) offset: u64,
    /// Its length, in bytes.
    pub(super) bytes: usize,
    /// Its pages, in the order in which they lie on disk.
    pub(super) pages: Vec<Queued>,
    /// Bytes that are done.
    pub(super) done: usize,
    /// Bytes at which an attempt stops; for twins that fail on purpose.
    pub(super) cap: usize,
    /// Attempts that the system asked to have again.
    pub(super) retries: u32,
}

/// Bytes of one page's frame.
#[derive(Debug, Clone, Copy)]
pub(super) struct Frame<'a> {
    pub(super) memory: &'a Arc<SharedMapping>,
    pub(super) offset: usize,
    pub(super) bytes: usize,
}

impl Operation {
    /// Of pages, which are added and [sealed](Self::seal).
    pub(super) fn empty() -> Self {
        Self {
            kind: Kind::Read,
            offset: 0,
            bytes: 0,
            pages: Vec::new(),
            done: 0,
            cap: usize::MAX,
            retries: 0,
        }
    }

    /// Makes it ready to move the pages that it has been given.
    pub(super) fn seal(&mut self, kind: Kind) {
        self.kind = kind;
        self.offset = self.pages.first().map_or(0, |page| page.job.slot.offset());
        self.bytes = self.pages.iter().map(|page| page.job.slot.page_bytes()).sum();
        (self.done, self.cap, self.retries) = (0, usize::MAX, 0);
    }

    /// Makes it one that changes a range of the area.
    pub(super) fn set_range(&mut self, kind: Kind, offset: u64, bytes: usize) {
        (self.kind, self.offset, self.bytes) = (kind, offset, bytes);
        (self.done, self.cap, self.retries) = (0, usize::MAX, 0);
    }

    /// Where the rest begins in the area, in bytes.
    pub(super) fn position(&self) -> u64 {
        self.offset + self.done as u64
    }

    /// What is left to move, as frames that join what is adjacent in memory too.
    pub(super) fn frames(&self) -> impl Iterator<Item = Frame<'_>> {
        let mut pages = self.pages.iter().peekable();
        let (mut skip, mut left) = (self.done, self.cap.min(self.bytes - self.done));
        std::iter::from_fn(move || {
            while left > 0 {
                let Job { memory, offset, slot, .. } = &pages.next()?.job;
                let (mut start, mut bytes) = (*offset, slot.page_bytes());
                if skip >= bytes {
                    skip -= bytes;
                    continue;
                }
                (start, bytes) = (start + skip, bytes - skip);
                skip = 0;
                while let Some(Queued { job: next, .. }) = pages.peek()
                    && Arc::ptr_eq(memory, &next.memory)
                    && start + bytes == next.offset
                {
                    bytes += next.slot.page_bytes();
                    pages.next();
                }
                bytes = bytes.min(left);
                left -= bytes;
                return Some(Frame { memory, offset: start, bytes });
            }
            None
        })
    }

    /// The rest's frames as the system wants them.
    pub(super) fn vectors(&self, into: &mut Vectors) {
        into.clear();
        for frame in self.frames() {
            // A frame outside its mapping was refused when it was handed in: no vector for it means a short operation.
            let Ok(address) = frame.memory.address(frame.offset, frame.bytes) else { return };
            into.push(address, frame.bytes);
        }
    }
}

/// An operation that an engine gives back.
#[derive(Debug)]
pub(super) struct Completed {
    pub(super) operation: Operation,
    /// Bytes that were moved, or the negated error number.
    pub(super) result: i32,
}

impl Completed {
    /// Does it here and now, with the system's plain calls.
    pub(super) fn by_hand(operation: Operation, file: &std::fs::File, vectors: &mut Vectors) -> Self {
        let result = match operation.kind {
            Kind::Read | Kind::Write => {
                operation.vectors(vectors);
                raw::transfer(file, operation.kind == Kind::Write, vectors, operation.position())
            }
            kind => raw::change_range(file, kind, operation.offset, operation.bytes),
        };
        Self { operation, result }
    }
}
