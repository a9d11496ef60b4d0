//! The mailbox that a client's device writes its reports into.
//!
//! The memory is the client's, so it is hostile: a report is copied out once, its number is looked at before and after,
//! and only then is anything in it believed, and checked.

use std::os::fd::OwnedFd;
use std::sync::atomic::{Ordering, fence};

use kvoyant_kernels::cuda::params::{ReportHeader, ResidencyEntry, ResidencyHeader};
use kvoyant_protocol::graph::{
    GraphLayout, RECORD_ENTRY_BYTES, RECORD_HEADER_BYTES, REPORT_HEADER_BYTES, sequence_of,
};
use kvoyant_protocol::memory::{Memfd, MemoryError, Seals, SharedMapping};
use kvoyant_protocol::wire::SequenceId;
use thiserror::Error;

const _: () = {
    assert!(size_of::<ReportHeader>() as u64 == REPORT_HEADER_BYTES);
    assert!(size_of::<ResidencyHeader>() as u64 == RECORD_HEADER_BYTES);
    assert!(size_of::<ResidencyEntry>() as u64 == RECORD_ENTRY_BYTES);
};

/// No engine makes so many reports; a client that counts up to here by leaps is not let any further.
const NUMBER_MAX: u64 = 1 << 62;

/// More reports than this cannot have been lost.
const LOST_MAX: u64 = 1 << 48;

/// How often a report that is overwritten while it is read is followed before the lane does something else.
const TRIES: u32 = 4;

/// A report that cannot be. It ends the session.
#[derive(Debug, Error)]
pub enum ReportError {
    /// A number that cannot stand where it stands.
    #[error("report {number} cannot lie where report {expected} was to come")]
    Number {
        /// The number.
        number: u64,
        /// The one that was to come.
        expected: u64,
    },
    /// Another shape than the session's.
    #[error(
        "report {number} has {heads} KV heads of {rows} ids, where the session has {kv_heads} of {capacity}"
    )]
    Shape {
        /// Which report.
        number: u64,
        /// KV heads in it.
        heads: u32,
        /// Ids of each.
        rows: u32,
        /// KV heads of the model.
        kv_heads: u32,
        /// Ids that were registered.
        capacity: u32,
    },
    /// More ids than there is room for.
    #[error("report {number} has {count} ids of one KV head, more than {max}")]
    Count {
        /// Which report.
        number: u64,
        /// How many ids.
        count: u32,
        /// How many there may be.
        max: u32,
    },
    /// A sequence that is not served in graph mode.
    #[error("report {number} is of sequence {sequence}, which is not served in graph mode")]
    Sequence {
        /// Which report.
        number: u64,
        /// Its sequence.
        sequence: SequenceId,
    },
    /// A layer that rows are not selected in.
    #[error(
        "report {number} is of layer {layer}, which is not one of those that rows are selected in (the model has {layers})"
    )]
    Layer {
        /// Which report.
        number: u64,
        /// Its layer.
        layer: u32,
        /// Layers of the model.
        layers: usize,
    },
    /// A token that does not exist.
    #[error("report {number} selects token {token} of sequence {sequence}, which has room for {room}")]
    Token {
        /// Which report.
        number: u64,
        /// Its sequence.
        sequence: SequenceId,
        /// The token.
        token: u32,
        /// Tokens that the sequence has room for.
        room: usize,
    },
    /// An access outside the mailbox.
    #[error(transparent)]
    Memory(#[from] MemoryError),
}

/// A report, copied out.
#[derive(Debug, Default)]
pub struct Report {
    /// Its number, which is the version of its answer.
    pub number: u64,
    /// Its sequence, as reports name it.
    sequence: u64,
    /// Its layer.
    pub layer: u32,
    /// Tokens of the sequence, with the one that was computed.
    pub tokens: u32,
    /// How many ids each KV head has, then how many of them were not in the slab.
    numbers: Vec<u32>,
    /// Ids of each KV head, `rows` apart.
    ids: Vec<u32>,
    rows: usize,
    /// KV heads and ids of each, as it says.
    shape: (u32, u32),
}

impl Report {
    /// Its sequence.
    #[must_use]
    pub fn sequence(&self) -> SequenceId {
        sequence_of(self.sequence)
    }

    fn heads(&self) -> usize {
        self.numbers.len() / 2
    }

    /// What a KV head selected; in any order, and to be changed.
    pub fn ids(&mut self, head: usize) -> &mut [u32] {
        let count = (self.numbers[head] as usize).min(self.rows);
        &mut self.ids[head * self.rows..][..count]
    }

    /// Selected rows that were on the device, and those that were not.
    #[must_use]
    pub fn found(&self) -> (u64, u64) {
        let (counts, misses) = self.numbers.split_at(self.heads());
        let pairs = counts.iter().zip(misses).map(|(count, misses)| (*count, (*misses).min(*count)));
        pairs.fold((0, 0), |(hits, missed), (count, misses)| {
            (hits + u64::from(count - misses), missed + u64::from(misses))
        })
    }
}

/// What a look into the mailbox found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Look {
    /// Whether there was a report.
    pub found: bool,
    /// Reports that were overwritten before they were read.
    pub lost: u64,
}

/// See the module.
#[derive(Debug)]
pub struct Mailbox {
    layout: GraphLayout,
    file: Memfd,
    memory: SharedMapping,
    next: u64,
}

impl Mailbox {
    /// An empty mailbox.
    pub fn create(layout: GraphLayout) -> Result<Self, MemoryError> {
        let file = Memfd::create("kvoyant-mailbox", layout.mailbox_bytes() as usize)?;
        let memory = file.map_read_only()?;
        file.seal(Seals::fixed_size())?;
        Ok(Self { layout, file, memory, next: 1 })
    }

    /// A descriptor for the client, which maps it for writing.
    pub fn fd(&self) -> Result<OwnedFd, MemoryError> {
        self.file.try_clone()
    }

    /// Reports that it has room for.
    #[must_use]
    pub fn slots(&self) -> u32 {
        self.layout.spec.reports
    }

    /// Copies the next report out. One that was overwritten meanwhile is passed over, and so are those up to half a
    /// mailbox before the newest: the client's device is about to overwrite the oldest.
    pub fn take(&mut self, report: &mut Report) -> Result<Look, ReportError> {
        let mut lost = 0;
        for _ in 0..TRIES {
            let (slots, expected) = (u64::from(self.layout.spec.reports), self.next);
            let at = self.layout.report(expected) as usize;
            let number = self.memory.load_u64(at);
            if number < expected {
                return Ok(Look { found: false, lost });
            }
            if number > expected {
                let ahead = number - expected;
                if !ahead.is_multiple_of(slots) || ahead > LOST_MAX || number > NUMBER_MAX {
                    return Err(ReportError::Number { number, expected });
                }
                self.next = number - slots / 2;
                lost += self.next - expected;
                continue;
            }
            self.copy(at, report)?;
            // What was copied must not be read later than the second look at the number.
            fence(Ordering::Acquire);
            if self.memory.load_u64(at) != number {
                continue;
            }
            self.next = number + 1;
            report.number = number;
            self.check(report)?;
            return Ok(Look { found: true, lost });
        }
        Ok(Look { found: false, lost })
    }

    /// Copies as much as the layout says, whatever is written there.
    fn copy(&self, at: usize, report: &mut Report) -> Result<(), MemoryError> {
        let (heads, rows) = (self.layout.kv_heads as usize, self.layout.spec.rows as usize);
        report.rows = rows;
        report.numbers.resize(2 * heads, 0);
        report.ids.resize(heads * rows, 0);
        let words = at + size_of::<ReportHeader>();
        self.memory.read(words, bytemuck::cast_slice_mut(&mut report.numbers))?;
        for head in 0..heads {
            let offset = words + (2 * heads + head * rows) * 4;
            self.memory.read(offset, bytemuck::cast_slice_mut(report.ids(head)))?;
        }
        let header: ReportHeader = self.memory.read_pod(at)?;
        (report.sequence, report.layer, report.tokens) = (header.sequence, header.layer, header.tokens);
        report.shape = (header.heads, header.capacity);
        Ok(())
    }

    fn check(&self, report: &Report) -> Result<(), ReportError> {
        let number = report.number;
        let (kv_heads, capacity) = (self.layout.kv_heads, self.layout.spec.rows);
        let (heads, rows) = report.shape;
        if (heads, rows) != (kv_heads, capacity) {
            return Err(ReportError::Shape { number, heads, rows, kv_heads, capacity });
        }
        match report.numbers[..kv_heads as usize].iter().find(|count| **count > capacity) {
            Some(count) => Err(ReportError::Count { number, count: *count, max: capacity }),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use kvoyant_protocol::graph::{GraphSpec, sequence_word};
    use proptest::prelude::*;

    const SPEC: GraphSpec = GraphSpec { rows: 4, sequences: 1, reports: 8 };

    fn mailbox() -> (Mailbox, SharedMapping, GraphLayout) {
        let layout = GraphLayout::new(SPEC, 3, 2).unwrap();
        let mailbox = Mailbox::create(layout).unwrap();
        let bytes = layout.mailbox_bytes() as usize;
        let file = Memfd::from_peer(mailbox.fd().unwrap(), bytes, Seals::fixed_size()).unwrap();
        (mailbox, file.map(false).unwrap(), layout)
    }

    fn write(memory: &SharedMapping, layout: &GraphLayout, number: u64, words: &[u32]) {
        let at = layout.report(number) as usize;
        let sequence = sequence_word(SequenceId { slot: 2, generation: 1 });
        let header = ReportHeader { number, sequence, layer: 1, heads: 2, capacity: 4, tokens: 9 };
        memory.write_pod(at, &header).unwrap();
        memory.write(at + size_of::<ReportHeader>(), bytemuck::cast_slice(words)).unwrap();
    }

    #[test]
    fn reports_are_read_in_order_and_whole() {
        let (mut mailbox, memory, layout) = mailbox();
        let mut report = Report::default();
        assert_eq!(mailbox.take(&mut report).unwrap(), Look { found: false, lost: 0 });
        write(&memory, &layout, 1, &[3, 1, 2, 5, 30, 10, 20, 0, 7]);
        write(&memory, &layout, 2, &[0, 0, 0, 0]);
        assert_eq!(mailbox.take(&mut report).unwrap(), Look { found: true, lost: 0 });
        assert_eq!((report.number, report.layer, report.tokens), (1, 1, 9));
        assert_eq!(report.sequence(), SequenceId { slot: 2, generation: 1 });
        assert_eq!((report.ids(0).to_vec(), report.ids(1).to_vec()), (vec![30, 10, 20], vec![7]));
        // No more can have been missed than were selected.
        assert_eq!(report.found(), (1, 3));
        assert!(mailbox.take(&mut report).unwrap().found && report.number == 2);
        assert!(!mailbox.take(&mut report).unwrap().found);
    }

    #[test]
    fn a_mailbox_that_was_lapped_goes_on_with_its_newer_half() {
        let (mut mailbox, memory, layout) = mailbox();
        (1..=21).for_each(|number| write(&memory, &layout, number, &[0; 4]));
        let mut report = Report::default();
        let mut numbers = Vec::new();
        let mut lost = 0;
        loop {
            let look = mailbox.take(&mut report).unwrap();
            lost += look.lost;
            if !look.found {
                break;
            }
            numbers.push(report.number);
        }
        assert_eq!(numbers, (13..=21).filter(|n| *n > lost).collect::<Vec<_>>());
        assert_eq!(lost as usize + numbers.len(), 21);
        assert!(!numbers.is_empty());
    }

    #[test]
    fn what_cannot_be_is_refused_with_its_numbers() {
        let refused = |number: u64, words: &[u32]| {
            let (mut mailbox, memory, layout) = mailbox();
            write(&memory, &layout, 1, words);
            memory.store_u64(layout.report(1) as usize, number);
            mailbox.take(&mut Report::default()).unwrap_err()
        };
        assert!(matches!(refused(2, &[0; 4]), ReportError::Number { number: 2, expected: 1 }));
        assert!(matches!(refused(u64::MAX, &[0; 4]), ReportError::Number { .. }));
        assert!(matches!(refused(1, &[0, 5, 0, 0]), ReportError::Count { count: 5, max: 4, .. }));
        let (mut mailbox, memory, layout) = mailbox();
        let header = ReportHeader { number: 1, heads: 3, capacity: 4, ..ReportHeader::default() };
        memory.write_pod(layout.report(1) as usize, &header).unwrap();
        let error = mailbox.take(&mut Report::default()).unwrap_err();
        assert!(matches!(error, ReportError::Shape { heads: 3, kv_heads: 2, .. }), "{error}");
    }

    proptest! {
        #[test]
        fn any_memory_is_a_report_or_an_error(
            bytes in proptest::collection::vec(any::<u8>(), 128), number in 0u64..64, tail in any::<u8>(),
        ) {
            let (mut mailbox, memory, layout) = mailbox();
            for slot in 0..8 {
                memory.write(slot * layout.report_stride() as usize, &bytes[..layout.report_stride().min(128) as usize]).unwrap();
            }
            memory.store_u64(layout.report(1) as usize, number);
            memory.write(layout.mailbox_bytes() as usize - 1, &[tail]).unwrap();
            let mut report = Report::default();
            for _ in 0..20 {
                match mailbox.take(&mut report) {
                    Ok(look) if look.found => {
                        prop_assert!(report.ids(0).len() <= 4 && report.ids(1).len() <= 4);
                        let (hits, misses) = report.found();
                        prop_assert!(hits + misses <= 8);
                    }
                    Ok(_) | Err(_) => break,
                }
            }
        }
    }
}
