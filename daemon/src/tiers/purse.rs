//! What all sessions have together, as one user may draw on it.

use std::sync::Arc;

use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::memory::MemoryError;
use kvoyant_protocol::quota::{OverQuota, Quota};

use crate::quota::Account;
use crate::tiers::budget::ArenaBudget;

/// See the module.
#[derive(Debug, Clone)]
pub struct Purse {
    all: Arc<ArenaBudget>,
    account: Arc<Account>,
}

/// Memory that counts with tables and lies elsewhere ([`Purse::beside`]).
#[derive(Debug)]
pub(crate) struct Beside {
    purse: Purse,
    bytes: u64,
}

impl Drop for Beside {
    fn drop(&mut self) {
        self.purse.give_tables_back(self.bytes);
    }
}

impl Purse {
    /// A user's.
    #[must_use]
    pub fn of(all: &Arc<ArenaBudget>, uid: u32) -> Self {
        Self { all: Arc::clone(all), account: all.ledger().account(uid) }
    }

    /// What all sessions have together.
    #[must_use]
    pub fn all(&self) -> &Arc<ArenaBudget> {
        &self.all
    }

    /// The user's account.
    #[must_use]
    pub fn account(&self) -> &Arc<Account> {
        &self.account
    }

    /// Bytes that the user could have now in extents.
    #[must_use]
    pub fn free_bytes(&self) -> u64 {
        self.account.obtainable(Quota::Host, self.all.total_bytes(), self.all.free_bytes())
    }

    /// Takes so many extents, or none.
    #[must_use]
    pub(crate) fn take_extents(&self, extents: usize) -> bool {
        let Some(bytes) = (extents as u64).checked_mul(EXTENT_BYTES as u64) else { return false };
        if bytes > self.account.room(Quota::Host) || self.account.take(Quota::Host, bytes).is_err() {
            return false;
        }
        let leave = self.account.leaves(Quota::Host, self.all.total_bytes(), self.account.held(Quota::Host));
        let taken = self.all.take_extents(extents, leave);
        if taken {
            self.account.served(Quota::Host);
        } else {
            self.account.give(Quota::Host, bytes);
        }
        taken
    }

    /// Gives extents back.
    pub(crate) fn give_extents(&self, extents: usize) {
        self.all.give_extents(extents);
        self.account.give(Quota::Host, (extents * EXTENT_BYTES) as u64);
    }

    /// What to say when so many bytes of extents cannot be had, if it is not that there are none: a quota, or a share. Otherwise what
    /// is missing from the user's share is kept for them for a while.
    #[must_use]
    pub fn refuse_host(&self, bytes: u64) -> Option<OverQuota> {
        let (quota, total) = (Quota::Host, self.all.total_bytes());
        if bytes <= self.free_bytes() {
            return None;
        }
        if bytes > self.account.room(quota) {
            return Some(self.account.over_quota(quota, bytes));
        }
        // What the user might have had while they were alone with it.
        if bytes <= self.all.free_bytes() {
            return Some(self.account.over_share(quota, bytes, total));
        }
        self.account.wants(quota, bytes, total);
        None
    }

    /// Bytes that the user could have now for page tables, digests and other descriptions of the arena.
    #[must_use]
    pub fn free_table_bytes(&self) -> u64 {
        self.account.obtainable(Quota::Tables, self.all.total_table_bytes(), self.all.free_table_bytes())
    }

    /// Takes memory for tables.
    ///
    /// # Errors
    /// [`MemoryError::Budget`]
    pub fn take_tables(&self, bytes: u64) -> Result<(), MemoryError> {
        let short = || MemoryError::Budget { wanted: bytes, free: self.free_table_bytes() };
        self.account.take(Quota::Tables, bytes).map_err(|_| short())?;
        let held = self.account.held(Quota::Tables);
        let leave = self.account.leaves(Quota::Tables, self.all.total_table_bytes(), held);
        let taken = self.all.take_tables(bytes, leave);
        match &taken {
            Ok(()) => self.account.served(Quota::Tables),
            Err(_) => self.account.give(Quota::Tables, bytes),
        }
        taken
    }

    /// Counts memory that lies elsewhere with tables, for as long as what comes back lives.
    ///
    /// # Errors
    /// As for [`Purse::take_tables`].
    pub(crate) fn beside(&self, bytes: u64) -> Result<Beside, MemoryError> {
        self.take_tables(bytes)?;
        Ok(Beside { purse: self.clone(), bytes })
    }

    /// Gives memory for tables back.
    pub fn give_tables_back(&self, bytes: u64) {
        self.all.give_tables_back(bytes);
        self.account.give(Quota::Tables, bytes);
    }

    /// As [`Purse::refuse_host`], of tables.
    #[must_use]
    pub fn refuse_tables(&self, bytes: u64) -> Option<OverQuota> {
        let (quota, total) = (Quota::Tables, self.all.total_table_bytes());
        if bytes <= self.free_table_bytes() {
            return None;
        }
        if bytes > self.account.room(quota) {
            return Some(self.account.over_quota(quota, bytes));
        }
        if bytes <= self.all.free_table_bytes() {
            return Some(self.account.over_share(quota, bytes, total));
        }
        self.account.wants(quota, bytes, total);
        None
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::quota::{Ledger, Limits, Quotas};

    const EXTENT: u64 = EXTENT_BYTES as u64;

    fn purses(extents: u64, limits: Limits, newcomers_percent: f64) -> [Purse; 2] {
        let ledger = Ledger::new(Quotas { everyone: limits, ..Quotas::default() }, newcomers_percent);
        let all = Arc::new(ArenaBudget::new(extents * EXTENT).shared_by(ledger));
        let purses = [1, 2].map(|uid| Purse::of(&all, uid));
        purses.iter().for_each(|purse| purse.account().take(Quota::Sessions, 1).unwrap());
        purses
    }

    #[test]
    fn a_quota_bounds_a_user_and_leaves_the_rest_to_others() {
        let [a, b] = purses(8, Limits::default().with(Quota::Host, 3 * EXTENT), 0.0);
        assert_eq!(a.free_bytes(), 3 * EXTENT);
        assert!(a.take_extents(2) && !a.take_extents(2) && !a.take_extents(usize::MAX));
        let over = a.refuse_host(2 * EXTENT).unwrap();
        assert_eq!((over.held, over.limit, over.share), (2 * EXTENT, 3 * EXTENT, false));
        assert!(b.take_extents(3));
        a.give_extents(2);
        b.give_extents(3);
        assert_eq!((a.all().used_bytes(), a.account().held(Quota::Host)), (0, 0));
    }

    #[test]
    fn beyond_the_share_a_part_stays_free_for_whoever_has_less() {
        let [a, b] = purses(8, Limits::default(), 25.0);
        assert!(a.take_extents(4), "half is the share of one of two");
        assert_eq!(a.free_bytes(), 2 * EXTENT);
        assert!(!a.take_extents(3) && a.take_extents(2));
        assert_eq!((a.free_bytes(), b.free_bytes()), (0, 2 * EXTENT));
        let over = a.refuse_host(EXTENT).unwrap();
        assert!(over.share && over.limit == 6 * EXTENT, "{over}");
        assert!(b.take_extents(2));
        assert!(b.refuse_host(EXTENT).is_none(), "there is nothing: that is no matter of shares");
        // What comes back is for whoever was refused below their share.
        a.give_extents(1);
        assert!(!a.take_extents(1) && b.take_extents(1));
    }

    #[test]
    fn tables_are_counted_and_shared_out_in_the_same_way() {
        let [a, b] = purses(8, Limits::default().with(Quota::Tables, 100), 10.0);
        a.take_tables(60).unwrap();
        assert!(matches!(a.take_tables(60), Err(MemoryError::Budget { wanted: 60, free: 40 })));
        assert_eq!(a.refuse_tables(60).unwrap().quota, Quota::Tables);
        b.take_tables(100).unwrap();
        a.give_tables_back(60);
        b.give_tables_back(100);
        assert_eq!(a.account().held(Quota::Tables), 0);
        assert_eq!(a.all().free_table_bytes(), a.all().total_table_bytes());
    }
}
