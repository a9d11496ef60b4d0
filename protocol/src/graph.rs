//! Graph mode: where residency records and reports lie.
//!
//! An engine that replays CUDA graphs selects rows on its device. Its kernel looks them up in *records*, which say what
//! of each KV head lies in the slab, reads there what is there and the rest over the link from the session's extents,
//! and writes what was selected into the *mailbox*. The daemon reads the mailbox, brings what was missed into the slab
//! and writes the records anew. Nobody waits for anybody.
//!
//! ```text
//! records   device memory that the daemon exports and alone writes; zeroed
//!           [slots][layers][KV heads] records of `record_bytes`: a header of 16 bytes, then `rows` entries of 8
//! mailbox   a memfd of fixed size that the client alone writes
//!           [reports] slots of `report_stride`: report r lies in slot r % reports
//! ```
//!
//! A report's number is also the *version* of the record that answers it. The kernel uses a record only if its version is
//! the number of the last report of the same sequence and layer, which comes behind every attention in stream order. So
//! from when the daemon sees a report until it has written that version, no kernel reads the slots of that layer, and the
//! daemon may change them; after that it may not, until it sees a later report. A lost report costs misses, never a wrong
//! row.

use serde::{Deserialize, Serialize};

use crate::layout::{LimitError, SESSION_MEMORY_MAX};
use crate::wire::SequenceId;

/// Bytes at the front of a record.
pub const RECORD_HEADER_BYTES: u64 = 16;
/// Bytes of an entry of a record.
pub const RECORD_ENTRY_BYTES: u64 = 8;
/// Bytes at the front of a report.
pub const REPORT_HEADER_BYTES: u64 = 32;

/// A version that no record ever has: with it, everything is read over the link.
pub const NO_VERSION: u64 = u64::MAX;

/// A sequence as reports name it.
#[must_use]
pub fn sequence_word(sequence: SequenceId) -> u64 {
    u64::from(sequence.generation) << 32 | u64::from(sequence.slot)
}

/// The sequence that a report names.
#[must_use]
pub fn sequence_of(word: u64) -> SequenceId {
    SequenceId { slot: word as u32, generation: (word >> 32) as u32 }
}

/// What a session wants of graph mode.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct GraphSpec {
    /// Ids that a KV head selects at most, and rows of it that a record names at most; 1..=65,536.
    pub rows: u32,
    /// Sequences that are served in graph mode at once, 1..=4096.
    pub sequences: u32,
    /// Reports that the mailbox has room for, a power of two in 2..=65,536: best twice as many as a step makes, one for
    /// each layer and sequence.
    pub reports: u32,
}

/// Offsets and sizes in bytes, from a [`GraphSpec`] and a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GraphLayout {
    /// What it was made from.
    pub spec: GraphSpec,
    /// Layers of the model.
    pub layers: u32,
    /// KV heads of the model.
    pub kv_heads: u32,
}

impl GraphLayout {
    /// Checks the specification. The model's own numbers have been checked.
    ///
    /// # Errors
    /// What is out of range.
    pub fn new(spec: GraphSpec, layers: u32, kv_heads: u32) -> Result<Self, LimitError> {
        let check = |name, value: u64, min, max| {
            if (min..=max).contains(&value) { Ok(()) } else { Err(LimitError { name, value, min, max }) }
        };
        check("graph.rows", u64::from(spec.rows), 1, 1 << 16)?;
        check("graph.sequences", u64::from(spec.sequences), 1, 4096)?;
        check("graph.reports", u64::from(spec.reports), 2, 1 << 16)?;
        if !spec.reports.is_power_of_two() {
            let value = u64::from(spec.reports);
            return Err(LimitError { name: "graph.reports (a power of two)", value, min: 2, max: 1 << 16 });
        }
        check("layers", u64::from(layers), 1, 1 << 16)?;
        check("kv_heads", u64::from(kv_heads), 1, 1 << 16)?;
        let layout = Self { spec, layers, kv_heads };
        check("bytes of reports in all", layout.mailbox_bytes(), 0, SESSION_MEMORY_MAX)?;
        check("bytes of records in all", layout.records_bytes(), 0, 1 << 40)?;
        Ok(layout)
    }

    /// Bytes of a record, and from record to record.
    #[must_use]
    pub fn record_bytes(&self) -> u64 {
        RECORD_HEADER_BYTES + u64::from(self.spec.rows) * RECORD_ENTRY_BYTES
    }

    /// Bytes of all records.
    #[must_use]
    pub fn records_bytes(&self) -> u64 {
        self.record(self.spec.sequences, 0)
    }

    /// Offset of the record of KV head 0 of a layer; those of the others follow.
    #[must_use]
    pub fn record(&self, slot: u32, layer: u32) -> u64 {
        let first = u64::from(slot) * u64::from(self.layers) + u64::from(layer);
        first * u64::from(self.kv_heads) * self.record_bytes()
    }

    /// Bytes from report to report.
    #[must_use]
    pub fn report_stride(&self) -> u64 {
        let words = u64::from(self.kv_heads) * (2 + u64::from(self.spec.rows));
        (REPORT_HEADER_BYTES + words * 4).next_multiple_of(64)
    }

    /// Bytes of the mailbox.
    #[must_use]
    pub fn mailbox_bytes(&self) -> u64 {
        u64::from(self.spec.reports) * self.report_stride()
    }

    /// Offset of a report in the mailbox.
    #[must_use]
    pub fn report(&self, number: u64) -> u64 {
        number % u64::from(self.spec.reports) * self.report_stride()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn records_and_reports_lie_one_behind_the_other() {
        let spec = GraphSpec { rows: 100, sequences: 3, reports: 8 };
        let layout = GraphLayout::new(spec, 4, 2).unwrap();
        assert_eq!(layout.record_bytes(), 816);
        assert_eq!(layout.record(0, 1), 2 * 816);
        assert_eq!(layout.record(1, 0), layout.record(0, 3) + 2 * 816);
        assert_eq!(layout.records_bytes(), layout.record(2, 3) + 2 * 816);
        assert!(layout.report_stride() >= 32 + 2 * 4 * 102 && layout.report_stride().is_multiple_of(64));
        assert_eq!(layout.report(11), layout.report(3));
        assert_eq!(layout.report(7) + layout.report_stride(), layout.mailbox_bytes());
    }

    #[test]
    fn a_report_names_any_sequence() {
        for sequence in
            [SequenceId { slot: 0, generation: 7 }, SequenceId { slot: u32::MAX, generation: 1 << 31 }]
        {
            assert_eq!(sequence_of(sequence_word(sequence)), sequence);
        }
    }

    #[test]
    fn sizes_out_of_range_are_refused_by_name() {
        let good = GraphSpec { rows: 64, sequences: 1, reports: 64 };
        let refused = |spec| GraphLayout::new(spec, 32, 8).unwrap_err().name;
        assert_eq!(refused(GraphSpec { rows: 0, ..good }), "graph.rows");
        assert_eq!(refused(GraphSpec { sequences: 5000, ..good }), "graph.sequences");
        assert_eq!(refused(GraphSpec { reports: 48, ..good }), "graph.reports (a power of two)");
        assert_eq!(refused(GraphSpec { rows: 1 << 16, reports: 1 << 16, ..good }), "bytes of reports in all");
    }
}
