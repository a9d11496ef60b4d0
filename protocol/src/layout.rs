//! Where everything lies in a session's two memfds.
//!
//! Both sides compute the same [`Layout`] from the same [`Limits`], which the client proposes and the daemon
//! accepts or refuses in the handshake; no offset is ever read from shared memory.

use serde::{Deserialize, Serialize};
use thiserror::Error;

use crate::EXTENT_BYTES;

/// Bytes of a request or a completion.
pub const DESCRIPTOR_BYTES: usize = 64;
/// Bytes of one entry of a batch table.
pub const BATCH_ENTRY_BYTES: usize = 16;
/// Bytes of one head's entry at the front of a block table.
pub const HEAD_ENTRY_BYTES: usize = 16;
/// Bytes of one run of a block table.
pub const RUN_BYTES: usize = 12;

const HEADER_BYTES: usize = 4096;
const PAGE: usize = 4096;

/// Offsets of the words in the *client → daemon* header, one cache-line pair apart.
pub mod c2d {
    /// Producer index of the request ring; the lane sleeps on it.
    pub const REQUEST_TAIL: usize = 0;
    /// Consumer index of the completion ring.
    pub const COMPLETION_HEAD: usize = 128;
    /// Not zero while the client sleeps on the completion ring.
    pub const SLEEPING: usize = 256;
    /// Last ticket that a stream of the client's has let go of, low 32 bits; cyclic.
    pub const RELEASED: usize = 384;
    /// Stream doorbells: one 32-bit word per ring slot, from here.
    pub const DOORBELLS: usize = 512;
    /// What the client counts itself: 64-bit counters in the order of [`crate::wire::Told`], behind the doorbells of the largest ring. They
    /// only ever grow, nothing is decided by them, and a client may leave them at 0.
    pub const TOLD: usize = 2048;
}

/// Offsets of the words in the *daemon → client* header.
pub mod d2c {
    /// Consumer index of the request ring.
    pub const REQUEST_HEAD: usize = 0;
    /// Producer index of the completion ring; the client sleeps on it.
    pub const COMPLETION_TAIL: usize = 128;
    /// Not zero while the lane sleeps on the request ring.
    pub const SLEEPING: usize = 256;
    /// Timeline word, 64 bits: `ticket << 8 | status` of the last completion; it never runs backwards.
    pub const TIMELINE: usize = 384;
    /// Boot id of the daemon, 64 bits.
    pub const BOOT_ID: usize = 512;
    /// How many requests, since the session began, no end of the daemon loses any more, 64 bits: the client need not keep them. It is
    /// written where [`KEPT`](crate::control::features::KEPT) is agreed.
    pub const KEPT: usize = 544;
    /// How many daemons have served the session before this one, 64 bits, from before the client gets this memory. It is 0 where
    /// [`GENERATION`](crate::control::features::GENERATION) is not agreed.
    pub const GENERATION: usize = 552;
    /// Last ticket whose copies the device has been given, 64 bits: from here on its event means this ticket.
    pub const PLANNED: usize = 576;
    /// Statistics of the session: 64-bit counters in the order of [`crate::wire::Stat`].
    pub const STATS: usize = 640;
}

/// What a session asks for. Everything else follows from it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Slots of each ring, a power of two in 2..=256. As many speculations may be in flight.
    pub ring_slots: u32,
    /// Sequences in one request, 1..=4096.
    pub batch_max: u32,
    /// Bytes of hints (or other payload) of one request.
    pub hint_bytes: u32,
    /// Bytes of the block table of one answer.
    pub table_bytes: u32,
    /// Sequences open at once, 1..=65,536.
    pub sequences_max: u32,
}

impl Default for Limits {
    fn default() -> Self {
        Self { ring_slots: 16, batch_max: 64, hint_bytes: 1 << 20, table_bytes: 1 << 20, sequences_max: 1024 }
    }
}

/// Limits out of range.
#[derive(Debug, Error, PartialEq, Eq)]
#[error("{name} = {value} is outside {min}..={max}")]
pub struct LimitError {
    /// Which limit.
    pub name: &'static str,
    /// What was asked for.
    pub value: u64,
    /// Smallest value that is allowed.
    pub min: u64,
    /// Largest value that is allowed.
    pub max: u64,
}

/// Largest memfd that a session may ask for, in each direction.
pub const SESSION_MEMORY_MAX: u64 = 256 << 20;

/// Offsets and sizes in bytes, from [`Limits`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Layout {
    /// The limits that it was made from.
    pub limits: Limits,
    /// Bytes of the *client → daemon* memfd.
    pub c2d_bytes: usize,
    /// Bytes of the *daemon → client* memfd.
    pub d2c_bytes: usize,
    batch_stride: usize,
    batches: usize,
    hint_stride: usize,
    hints: usize,
    table_stride: usize,
    tables: usize,
}

impl Layout {
    /// Checks the limits and computes the layout.
    pub fn new(limits: Limits) -> Result<Self, LimitError> {
        let check = |name, value: u64, min, max| {
            if (min..=max).contains(&value) { Ok(()) } else { Err(LimitError { name, value, min, max }) }
        };
        check("ring_slots", u64::from(limits.ring_slots), 2, 256)?;
        if !limits.ring_slots.is_power_of_two() {
            let value = u64::from(limits.ring_slots);
            return Err(LimitError { name: "ring_slots (a power of two)", value, min: 2, max: 256 });
        }
        check("batch_max", u64::from(limits.batch_max), 1, 4096)?;
        check("hint_bytes", u64::from(limits.hint_bytes), 64, 1 << 28)?;
        check("table_bytes", u64::from(limits.table_bytes), 4096, 1 << 28)?;
        check("sequences_max", u64::from(limits.sequences_max), 1, 1 << 16)?;
        let slots = limits.ring_slots as usize;
        let page = |bytes: usize| bytes.next_multiple_of(PAGE);
        let ring_end = HEADER_BYTES + page(slots * DESCRIPTOR_BYTES);
        let batch_stride = (limits.batch_max as usize * BATCH_ENTRY_BYTES).next_multiple_of(64);
        let hint_stride = (limits.hint_bytes as usize).next_multiple_of(64);
        let table_stride = (limits.table_bytes as usize).next_multiple_of(64);
        let hints = ring_end + page(slots * batch_stride);
        let layout = Self {
            limits,
            c2d_bytes: page(hints + slots * hint_stride),
            d2c_bytes: page(ring_end + slots * table_stride),
            batch_stride,
            batches: ring_end,
            hint_stride,
            hints,
            table_stride,
            tables: ring_end,
        };
        check("bytes of hints in all", layout.c2d_bytes as u64, 0, SESSION_MEMORY_MAX)?;
        check("bytes of block tables in all", layout.d2c_bytes as u64, 0, SESSION_MEMORY_MAX)?;
        Ok(layout)
    }

    fn slot(&self, index: u32) -> usize {
        (index & (self.limits.ring_slots - 1)) as usize
    }

    /// Offset of the descriptor with this running index, in either memfd.
    #[must_use]
    pub fn descriptor(&self, index: u32) -> usize {
        HEADER_BYTES + self.slot(index) * DESCRIPTOR_BYTES
    }

    /// Offset of the batch table of the request with this running index.
    #[must_use]
    pub fn batch(&self, index: u32) -> usize {
        self.batches + self.slot(index) * self.batch_stride
    }

    /// Offset of the hints of the request with this running index.
    #[must_use]
    pub fn hints(&self, index: u32) -> usize {
        self.hints + self.slot(index) * self.hint_stride
    }

    /// Offset of the doorbell of the request with this running index.
    #[must_use]
    pub fn doorbell(&self, index: u32) -> usize {
        c2d::DOORBELLS + self.slot(index) * 4
    }

    /// Offset of the block table of the answer to this ticket. Tickets are consecutive, so at most
    /// `ring_slots` of them can be in use at a time.
    #[must_use]
    pub fn table(&self, ticket: u64) -> usize {
        self.tables + self.answer_slot(ticket) * self.table_stride
    }

    /// Runs that the block table of an answer for so many heads has room for.
    #[must_use]
    pub fn table_runs(&self, heads: usize) -> usize {
        (self.limits.table_bytes as usize).saturating_sub(heads * HEAD_ENTRY_BYTES) / RUN_BYTES
    }

    /// Slot of the answer to this ticket.
    #[must_use]
    pub fn answer_slot(&self, ticket: u64) -> usize {
        (ticket % u64::from(self.limits.ring_slots)) as usize
    }

    pub(crate) fn table_stride(&self) -> usize {
        self.table_stride
    }
}

/// Sizes of one model's rows, pages and extents.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct PageGeometry {
    /// Rows of a page, P.
    pub page_rows: usize,
    /// Bytes of a row: K then V.
    pub row_bytes: usize,
}

impl PageGeometry {
    /// Bytes of a page.
    #[must_use]
    pub fn page_bytes(&self) -> usize {
        self.page_rows * self.row_bytes
    }

    /// Pages of an extent. What does not divide is left over at its end.
    #[must_use]
    pub fn pages_per_extent(&self) -> usize {
        EXTENT_BYTES / self.page_bytes()
    }

    /// Extent and offset in it of a row, from its locator (page id times P plus row in page).
    #[must_use]
    pub fn locate(&self, row: u32) -> (usize, usize) {
        let row = row as usize;
        let (page, row_in_page) = (row / self.page_rows, row % self.page_rows);
        let per_extent = self.pages_per_extent();
        let offset = (page % per_extent) * self.page_bytes() + row_in_page * self.row_bytes;
        (page / per_extent, offset)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn regions_of_a_layout_never_overlap_and_lie_inside(
            slots in (1u32..9).prop_map(|bits| 1 << bits), batch in 1u32..200,
            hints in 64u32..100_000, tables in 4096u32..100_000,
        ) {
            let limits = Limits {
                ring_slots: slots, batch_max: batch, hint_bytes: hints, table_bytes: tables, sequences_max: 8,
            };
            let layout = Layout::new(limits).unwrap();
            let doorbells = c2d::DOORBELLS + 4 * slots as usize;
            let mut regions = vec![(0, doorbells), (c2d::TOLD, 8 * crate::wire::TOLD)];
            for i in 0..slots {
                regions.push((layout.descriptor(i), DESCRIPTOR_BYTES));
                regions.push((layout.batch(i), batch as usize * BATCH_ENTRY_BYTES));
                regions.push((layout.hints(i), hints as usize));
            }
            regions.sort_unstable();
            prop_assert!(regions.windows(2).all(|w| w[0].0 + w[0].1 <= w[1].0));
            let last = regions[regions.len() - 1];
            prop_assert!(last.0 + last.1 <= layout.c2d_bytes);
            let mut tables_at: Vec<_> = (0..u64::from(slots)).map(|t| layout.table(t)).collect();
            tables_at.sort_unstable();
            prop_assert!(tables_at[0] >= layout.descriptor(slots - 1) + DESCRIPTOR_BYTES);
            prop_assert!(tables_at.windows(2).all(|w| w[0] + tables as usize <= w[1]));
            prop_assert!(tables_at[slots as usize - 1] + tables as usize <= layout.d2c_bytes);
            prop_assert_eq!(layout.table(0), layout.table(u64::from(slots)));
        }
    }

    #[test]
    fn a_locator_leads_to_its_row() {
        let geometry = PageGeometry { page_rows: 32, row_bytes: 320 };
        assert_eq!(geometry.pages_per_extent(), 6553);
        assert_eq!(geometry.locate(33), (0, 32 * 320 + 320));
        assert_eq!(geometry.locate(6553 * 32), (1, 0));
    }

    #[test]
    fn limits_out_of_range_are_named_with_their_value() {
        let error = Layout::new(Limits { ring_slots: 12, ..Limits::default() }).unwrap_err();
        assert_eq!(error.value, 12);
        let error = Layout::new(Limits { batch_max: 0, ..Limits::default() }).unwrap_err();
        assert_eq!(error.to_string(), "batch_max = 0 is outside 1..=4096");
        let huge = Limits { ring_slots: 256, hint_bytes: 1 << 28, ..Limits::default() };
        assert!(Layout::new(huge).is_err());
    }
}
