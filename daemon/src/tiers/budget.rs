//! What all sessions may have of the arena together, and of the tables that describe it.

use std::sync::atomic::{AtomicU64, Ordering};

use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::memory::MemoryError;

use crate::quota::Ledger;

/// Tables and digests of all sessions may take this share of the arena's size beside it: partial keys at a ratio of
/// 0.3 are 0.15 of the KV that they describe, page tables a thousandth.
const TABLES_SHARE: u64 = 4;

/// … and this much more, so that a small arena can still have many sequences.
const TABLES_LEAST: u64 = 512 << 20;

/// What all sessions may have together.
#[derive(Debug)]
pub struct ArenaBudget {
    total_bytes: u64,
    used_bytes: AtomicU64,
    tables_bytes: AtomicU64,
    tables_total: u64,
    ledger: Ledger,
}

impl ArenaBudget {
    /// A budget of `total_bytes`.
    #[must_use]
    pub fn new(total_bytes: u64) -> Self {
        Self::beside_disk(total_bytes, 0)
    }

    /// The same where so much more can lie on disk: tables and digests of that are in memory all the same.
    #[must_use]
    pub fn beside_disk(total_bytes: u64, disk_bytes: u64) -> Self {
        Self {
            total_bytes,
            used_bytes: AtomicU64::new(0),
            tables_bytes: AtomicU64::new(0),
            tables_total: total_bytes.saturating_add(disk_bytes) / TABLES_SHARE + TABLES_LEAST,
            ledger: Ledger::default(),
        }
    }

    /// The same with these users' accounts.
    #[must_use]
    pub fn shared_by(self, ledger: Ledger) -> Self {
        Self { ledger, ..self }
    }

    /// Accounts of those who share it.
    #[must_use]
    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// Bytes of the whole arena.
    #[must_use]
    pub fn total_bytes(&self) -> u64 {
        self.total_bytes
    }

    /// Bytes in extents that sessions have.
    #[must_use]
    pub fn used_bytes(&self) -> u64 {
        self.used_bytes.load(Ordering::Relaxed)
    }

    /// Extents of the whole arena.
    #[must_use]
    pub fn extents(&self) -> usize {
        (self.total_bytes / EXTENT_BYTES as u64) as usize
    }

    /// Bytes that are left.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.total_bytes.saturating_sub(self.used_bytes())
    }

    /// Bytes that are left for page tables, digests and other descriptions of the arena.
    #[must_use]
    pub fn free_table_bytes(&self) -> u64 {
        self.tables_total.saturating_sub(self.tables_bytes.load(Ordering::Relaxed))
    }

    /// Bytes of page tables, digests and other descriptions of the arena that there may be.
    #[must_use]
    pub fn total_table_bytes(&self) -> u64 {
        self.tables_total
    }

    /// Takes memory for tables, if so much stays free.
    pub(crate) fn take_tables(&self, bytes: u64, leave: u64) -> Result<(), MemoryError> {
        let fits = |after: &u64| after.saturating_add(leave) <= self.tables_total;
        let take = |used: u64| used.checked_add(bytes).filter(fits);
        match self.tables_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take) {
            Ok(_) => Ok(()),
            Err(_) => Err(MemoryError::Budget { wanted: bytes, free: self.free_table_bytes() }),
        }
    }

    /// Gives memory for tables back.
    pub(crate) fn give_tables_back(&self, bytes: u64) {
        self.tables_bytes.fetch_sub(bytes, Ordering::Relaxed);
    }

    /// Takes so many extents, if so many bytes stay free, or none.
    pub(crate) fn take_extents(&self, extents: usize, leave: u64) -> bool {
        let bytes = (extents as u64).checked_mul(EXTENT_BYTES as u64);
        let fits = |after: &u64| after.saturating_add(leave) <= self.total_bytes;
        let take = |used: u64| used.checked_add(bytes?).filter(fits);
        self.used_bytes.fetch_update(Ordering::Relaxed, Ordering::Relaxed, take).is_ok()
    }

    /// Gives extents back.
    pub(crate) fn give_extents(&self, extents: usize) {
        self.used_bytes.fetch_sub((extents * EXTENT_BYTES) as u64, Ordering::Relaxed);
    }
}
