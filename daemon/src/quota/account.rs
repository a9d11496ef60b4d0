//! What one user has of everything that there are quotas of.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use kvoyant_protocol::control::Failure;
use kvoyant_protocol::quota::{OverQuota, QUOTAS, Quota};

use super::ledger::Sharing;

/// One thing that a user has of which there is a quota.
#[derive(Debug, Default)]
pub(super) struct Item {
    pub(super) held: AtomicU64,
    pub(super) peak: AtomicU64,
    /// How often more was refused.
    pub(super) refused: AtomicU64,
    /// What is missing from the user's share, and kept for them.
    wanting: AtomicU64,
}

/// See the module. Anybody may take and give, on any thread, without a lock.
#[derive(Debug)]
pub struct Account {
    uid: u32,
    limits: [AtomicU64; QUOTAS.len()],
    pub(super) items: [Item; QUOTAS.len()],
    sharing: Arc<Sharing>,
}

impl Account {
    pub(super) fn new(uid: u32, limits: [u64; QUOTAS.len()], sharing: Arc<Sharing>) -> Self {
        Self { uid, limits: limits.map(AtomicU64::new), items: Default::default(), sharing }
    }

    /// Other limits from now on; what is more than they allow is kept.
    pub(super) fn set_limits(&self, limits: [u64; QUOTAS.len()]) {
        for (cell, limit) in self.limits.iter().zip(limits) {
            cell.store(limit, Ordering::Relaxed);
        }
    }

    /// Whose it is.
    #[must_use]
    pub fn uid(&self) -> u32 {
        self.uid
    }

    fn item(&self, quota: Quota) -> &Item {
        &self.items[quota as usize]
    }

    /// What the user has.
    #[must_use]
    pub fn held(&self, quota: Quota) -> u64 {
        self.item(quota).held.load(Ordering::Relaxed)
    }

    /// What the user may have; [`u64::MAX`] if that is not limited.
    #[must_use]
    pub fn limit(&self, quota: Quota) -> u64 {
        self.limits[quota as usize].load(Ordering::Relaxed)
    }

    /// How much more the quota allows.
    #[must_use]
    pub fn room(&self, quota: Quota) -> u64 {
        self.limit(quota).saturating_sub(self.held(quota))
    }

    /// Takes so much, or nothing.
    ///
    /// # Errors
    /// More than the quota leaves.
    pub fn take(&self, quota: Quota, amount: u64) -> Result<(), OverQuota> {
        let (item, limit) = (self.item(quota), self.limit(quota));
        let more = |held: u64| held.checked_add(amount).filter(|after| *after <= limit);
        match item.held.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more) {
            Ok(before) => {
                item.peak.fetch_max(before + amount, Ordering::Relaxed);
                if quota == Quota::Sessions && before == 0 && amount > 0 {
                    self.sharing.comes();
                }
                Ok(())
            }
            Err(_) => Err(self.over_quota(quota, amount)),
        }
    }

    /// Gives back what was taken.
    pub fn give(&self, quota: Quota, amount: u64) {
        let before = self.item(quota).held.fetch_sub(amount, Ordering::Relaxed);
        debug_assert!(before >= amount, "user {} gives back {amount} {quota} of {before}", self.uid);
        if quota == Quota::Sessions && before == amount && amount > 0 {
            self.sharing.goes(self.uid);
            self.items.iter().for_each(|item| item.wanting.store(0, Ordering::Relaxed));
        }
    }

    /// As [`Account::take`], given back by dropping.
    ///
    /// # Errors
    /// More than the quota leaves.
    pub fn charge(self: &Arc<Self>, quota: Quota, amount: u64) -> Result<Charge, OverQuota> {
        self.take(quota, amount)?;
        Ok(Charge { account: Arc::clone(self), quota, amount })
    }

    /// Counts a refusal, as it is told to the user.
    pub fn note(&self, failure: &Failure) {
        let quota = match failure {
            Failure::Quota(over) => over.quota,
            Failure::Backpressure { .. } => Quota::Host,
            Failure::TablesFull { .. } => Quota::Tables,
            Failure::DeviceFull { .. } => Quota::Device,
            Failure::TooManySessions { .. } => Quota::Sessions,
            _ => return,
        };
        self.refused(quota);
    }

    /// Counts a refusal.
    pub fn refused(&self, quota: Quota) {
        self.item(quota).refused.fetch_add(1, Ordering::Relaxed);
    }

    /// What to say when a quota does not leave so much.
    #[must_use]
    pub fn over_quota(&self, quota: Quota, asked: u64) -> OverQuota {
        OverQuota {
            quota,
            uid: self.uid,
            asked,
            held: self.held(quota),
            limit: self.limit(quota),
            share: false,
            closing: Vec::new(),
        }
    }

    /// What to say when there is something left of `capacity`, and it is kept for others.
    #[must_use]
    pub fn over_share(&self, quota: Quota, asked: u64, capacity: u64) -> OverQuota {
        let over = self.over_quota(quota, asked);
        OverQuota { limit: self.share(capacity).max(over.held), share: true, ..over }
    }

    /// The user's equal share of so much, as long as there are as many users as now. Somebody who is alone shares it with whoever comes next.
    #[must_use]
    pub fn share(&self, capacity: u64) -> u64 {
        capacity / self.sharing.active().max(2)
    }

    /// How much of `capacity` must stay free for others if the user comes to have `held`: nothing up to the share; beyond it, what is held back for
    /// newcomers, or what users have been refused who were below theirs, whichever is more.
    #[must_use]
    pub fn leaves(&self, quota: Quota, capacity: u64, held: u64) -> u64 {
        if held <= self.share(capacity) {
            return 0;
        }
        let own = self.item(quota).wanting.load(Ordering::Relaxed);
        self.sharing.held_back(quota, capacity).max(self.sharing.wanted(quota).saturating_sub(own))
    }

    /// How much more of `capacity` the user could have now, of which so much is `free`.
    #[must_use]
    pub fn obtainable(&self, quota: Quota, capacity: u64, free: u64) -> u64 {
        let within = self.share(capacity).saturating_sub(self.held(quota)).min(free);
        let beyond = free.saturating_sub(self.leaves(quota, capacity, u64::MAX));
        within.max(beyond).min(self.room(quota))
    }

    /// Takes note that the user was refused so much of `capacity` for want of room. Up to the share, users who are beyond theirs leave it for them
    /// for a while.
    pub fn wants(&self, quota: Quota, amount: u64, capacity: u64) {
        let due = self.share(capacity).saturating_sub(self.held(quota)).min(amount);
        if due > 0 {
            self.item(quota).wanting.store(due, Ordering::Relaxed);
            self.sharing.want(self.uid, quota, due, Instant::now());
        }
    }

    /// The user got something: whatever was kept for them is kept no longer.
    pub fn served(&self, quota: Quota) {
        if self.item(quota).wanting.swap(0, Ordering::Relaxed) > 0 {
            self.sharing.forget(self.uid, Some(quota));
        }
    }
}

/// Something that a user has, given back when dropped.
#[derive(Debug)]
pub struct Charge {
    account: Arc<Account>,
    quota: Quota,
    amount: u64,
}

impl Drop for Charge {
    fn drop(&mut self) {
        self.account.give(self.quota, self.amount);
    }
}
