//! Whether there is room for what a sequence needs beside its rows: page tables, digests, memories, marks.

use kvoyant_protocol::control::Failure;

use crate::lane::model::{HEAP_FILE_BYTES, ModelState};

impl ModelState {
    /// Bytes that a sequence's table of `pages` pages, its marks and statistics, and its digests for each of these methods
    /// may take.
    pub(super) fn tables_of(&self, methods: impl IntoIterator<Item = usize>, pages: usize) -> u64 {
        let capacity = pages.next_power_of_two().max(8);
        let kept = |method: usize| {
            let method = &self.methods[method];
            let per_page = 4 + method.digest_bytes() + 4;
            let memory = method.memory_bytes(capacity * self.shape.page_rows);
            (per_page * capacity + method.head_state_bytes()).saturating_add(memory) as u64
        };
        let kept = methods.into_iter().map(kept).fold(0, u64::saturating_add);
        let per_head = kept.saturating_add((4 * capacity + self.shape.head_dim * 4) as u64);
        let marks = (capacity * self.shape.page_rows) as u64;
        per_head.saturating_mul(self.heads() as u64).saturating_add(marks)
    }

    /// Whether the daemon's memory for tables and digests would hold so many bytes more. What follows relies on it: an
    /// allocation that fails half way ends the session.
    pub(super) fn check_tables(&self, wanted: u64) -> Result<(), Failure> {
        // Either new files can be had, or what is wanted fits into free spans of those that are there.
        let new = self.arena.budget().free_table_bytes().saturating_sub(2 * HEAP_FILE_BYTES as u64);
        let free = new.max(self.tables.longest_span().min(self.meta.longest_span()));
        if wanted <= free {
            return Ok(());
        }
        Err(Failure::TablesFull { wanted_bytes: wanted, free_bytes: free })
    }
}
