//! All users' accounts, and what is shared out between them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use kvoyant_protocol::quota::{QUOTAS, Quota};
use schemars::JsonSchema;
use serde::{Deserialize, Serialize};

use super::{Account, Quotas};

/// How long what a user was refused is kept for them: a client that still wants it has asked again by then.
const WANTED_FOR: Duration = Duration::from_secs(10);

/// Something that a user was refused.
#[derive(Debug)]
struct Want {
    uid: u32,
    quota: Quota,
    amount: u64,
    since: Instant,
}

/// What all accounts look at.
#[derive(Debug, Default)]
pub(super) struct Sharing {
    /// Users who have sessions.
    active: AtomicU64,
    /// The part of everything scarce that is kept for newcomers, within `[0, 1]`: the bits of an `f64`.
    held_back: AtomicU64,
    /// Sums of `wants`, so that nobody has to look there while nothing is scarce.
    wanted: [AtomicU64; QUOTAS.len()],
    wants: Mutex<Vec<Want>>,
}

impl Sharing {
    pub(super) fn active(&self) -> u64 {
        self.active.load(Ordering::Relaxed)
    }

    pub(super) fn comes(&self) {
        self.active.fetch_add(1, Ordering::Relaxed);
    }

    pub(super) fn goes(&self, uid: u32) {
        self.active.fetch_sub(1, Ordering::Relaxed);
        self.forget(uid, None);
    }

    pub(super) fn held_back(&self, quota: Quota, capacity: u64) -> u64 {
        let part = (capacity as f64 * f64::from_bits(self.held_back.load(Ordering::Relaxed))) as u64;
        // Host memory goes by extents, and the disk by chunks.
        part / quota.unit() * quota.unit()
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Want>> {
        self.wants.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn sum(&self, wants: &[Want]) {
        for quota in QUOTAS {
            let of = wants.iter().filter(|want| want.quota == quota).map(|want| want.amount);
            self.wanted[quota as usize].store(of.fold(0, u64::saturating_add), Ordering::Relaxed);
        }
    }

    pub(super) fn want(&self, uid: u32, quota: Quota, amount: u64, since: Instant) {
        let mut wants = self.lock();
        wants.retain(|want| (want.uid, want.quota) != (uid, quota));
        wants.push(Want { uid, quota, amount, since });
        self.sum(&wants);
    }

    pub(super) fn forget(&self, uid: u32, quota: Option<Quota>) {
        let mut wants = self.lock();
        wants.retain(|want| want.uid != uid || quota.is_some_and(|quota| want.quota != quota));
        self.sum(&wants);
    }

    pub(super) fn wanted(&self, quota: Quota) -> u64 {
        let wanted = &self.wanted[quota as usize];
        // A lane does not wait for the list: the sum may be a moment old.
        if wanted.load(Ordering::Relaxed) > 0
            && let Ok(mut wants) = self.wants.try_lock()
        {
            wants.retain(|want| want.since.elapsed() < WANTED_FOR);
            self.sum(&wants);
        }
        wanted.load(Ordering::Relaxed)
    }
}

/// In which steps something is taken.
trait Unit {
    fn unit(self) -> u64;
}

impl Unit for Quota {
    fn unit(self) -> u64 {
        match self {
            Self::Host => kvoyant_protocol::EXTENT_BYTES as u64,
            Self::Spill => crate::tiers::nvme::CHUNK_BYTES,
            _ => 1,
        }
    }
}

/// What a user has of one thing, for operators.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UseReport {
    /// What they have.
    pub held: u64,
    /// The most that they ever had.
    pub peak: u64,
    /// Their quota; absent if there is none.
    pub limit: Option<u64>,
    /// How often more was refused.
    pub refused: u64,
}

/// What a user has, for operators.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, JsonSchema)]
pub struct UserReport {
    /// The user, as the kernel says.
    pub uid: u32,
    /// By quota: counts, or bytes.
    #[schemars(with = "BTreeMap<String, UseReport>")]
    pub uses: BTreeMap<Quota, UseReport>,
}

impl UserReport {
    /// What they have of one thing.
    #[must_use]
    pub fn held(&self, quota: Quota) -> u64 {
        self.uses.get(&quota).map_or(0, |used| used.held)
    }
}

/// See the module.
#[derive(Debug, Default)]
pub struct Ledger {
    sharing: Arc<Sharing>,
    accounts: Mutex<Accounts>,
}

#[derive(Debug, Default)]
struct Accounts {
    quotas: Quotas,
    /// Of everybody who ever came: what they had outlives their sessions, and few users have a machine.
    all: BTreeMap<u32, Arc<Account>>,
}

impl Ledger {
    /// Accounts with these quotas, where such a part of everything scarce is kept for newcomers, in percent.
    #[must_use]
    pub fn new(quotas: Quotas, held_back_percent: f64) -> Self {
        let ledger = Self::default();
        ledger.set(quotas, held_back_percent);
        ledger
    }

    /// Other quotas from now on, and another part for newcomers. Whoever has more keeps it, and gets no more.
    pub fn set(&self, quotas: Quotas, held_back_percent: f64) {
        let held_back = (held_back_percent / 100.0).clamp(0.0, 1.0);
        self.sharing.held_back.store(held_back.to_bits(), Ordering::Relaxed);
        let mut accounts = self.accounts();
        for (uid, account) in &accounts.all {
            account.set_limits(quotas.of(*uid));
        }
        accounts.quotas = quotas;
    }

    fn accounts(&self) -> MutexGuard<'_, Accounts> {
        self.accounts.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A user's account.
    #[must_use]
    pub fn account(&self, uid: u32) -> Arc<Account> {
        let mut accounts = self.accounts();
        let limits = accounts.quotas.of(uid);
        let new = || Arc::new(Account::new(uid, limits, Arc::clone(&self.sharing)));
        Arc::clone(accounts.all.entry(uid).or_insert_with(new))
    }

    /// Every user's, at this moment.
    #[must_use]
    pub fn report(&self) -> Vec<UserReport> {
        let report = |account: &Arc<Account>| {
            let used = |quota: Quota| {
                let item = &account.items[quota as usize];
                let get = |cell: &AtomicU64| cell.load(Ordering::Relaxed);
                let limit = Some(account.limit(quota)).filter(|limit| *limit != u64::MAX);
                let (held, peak, refused) = (get(&item.held), get(&item.peak), get(&item.refused));
                (quota, UseReport { held, peak, limit, refused })
            };
            UserReport { uid: account.uid(), uses: QUOTAS.into_iter().map(used).collect() }
        };
        self.accounts().all.values().map(report).collect()
    }
}

#[cfg(test)]
mod tests {
    use kvoyant_protocol::control::Failure;
    use proptest::prelude::*;

    use super::super::Limits;
    use super::*;

    fn ledger(held_back: f64) -> Ledger {
        let everyone = Limits::default().with(Quota::Sequences, 3);
        Ledger::new(Quotas { everyone, ..Quotas::default() }, held_back)
    }

    #[test]
    fn a_quota_is_of_all_that_a_user_takes_and_of_nobody_else() {
        let ledger = ledger(0.0);
        let (a, b) = (ledger.account(1), ledger.account(2));
        let first = a.charge(Quota::Sequences, 2).unwrap();
        let over = ledger.account(1).take(Quota::Sequences, 2).unwrap_err();
        assert_eq!((over.uid, over.held, over.asked, over.limit, over.share), (1, 2, 2, 3, false));
        a.note(&Failure::Quota(over));
        b.take(Quota::Sequences, 3).unwrap();
        assert!(b.take(Quota::Sequences, u64::MAX).is_err());
        drop(first);
        a.take(Quota::Sequences, 3).unwrap();
        let report = ledger.report();
        let used = report[0].uses[&Quota::Sequences];
        assert_eq!(used, UseReport { held: 3, peak: 3, limit: Some(3), refused: 1 });
        assert_eq!(report[1].uses[&Quota::Host].limit, None);
    }

    #[test]
    fn whoever_has_more_than_an_equal_share_leaves_room_for_newcomers() {
        let ledger = ledger(25.0);
        let (a, b) = (ledger.account(1), ledger.account(2));
        a.take(Quota::Sessions, 1).unwrap();
        // Alone, one shares with whoever comes.
        assert_eq!(a.leaves(Quota::Tables, 1000, 500), 0);
        assert_eq!(a.leaves(Quota::Tables, 1000, 501), 250);
        b.take(Quota::Sessions, 1).unwrap();
        ledger.account(3).take(Quota::Sessions, 2).unwrap();
        assert_eq!(b.leaves(Quota::Tables, 1000, 333), 0);
        assert_eq!(b.leaves(Quota::Tables, 1000, 334), 250);
        ledger.account(3).give(Quota::Sessions, 1);
        assert_eq!(b.share(1000), 333, "one of its sessions is still there");
        ledger.account(3).give(Quota::Sessions, 1);
        assert_eq!(b.share(1000), 500);
    }

    #[test]
    fn what_a_user_below_their_share_was_refused_is_kept_for_them_until_they_have_it_or_go() {
        let ledger = ledger(0.0);
        let (a, b) = (ledger.account(1), ledger.account(2));
        a.take(Quota::Sessions, 1).unwrap();
        b.take(Quota::Sessions, 1).unwrap();
        a.take(Quota::Tables, 900).unwrap();
        b.take(Quota::Tables, 100).unwrap();
        b.wants(Quota::Tables, 700, 1000);
        // No more than what is missing from the share.
        assert_eq!(a.leaves(Quota::Tables, 1000, 901), 400);
        assert_eq!(b.leaves(Quota::Tables, 1000, 500), 0);
        b.served(Quota::Tables);
        assert_eq!(a.leaves(Quota::Tables, 1000, 901), 0);
        // Whoever has their share already has nothing kept for them.
        a.wants(Quota::Tables, 100, 1000);
        assert_eq!(b.leaves(Quota::Tables, 1000, 501), 0);
        b.wants(Quota::Tables, 10, 1000);
        assert_eq!(a.leaves(Quota::Tables, 1000, 901), 10);
        assert_eq!(b.leaves(Quota::Tables, 1000, 501), 0, "nobody leaves anything for themselves");
        b.give(Quota::Sessions, 1);
        assert_eq!(a.leaves(Quota::Tables, 1000, 901), 0);
    }

    #[test]
    fn a_want_that_nobody_repeats_is_forgotten() {
        let sharing = Sharing::default();
        let since = Instant::now();
        sharing.want(1, Quota::Host, 5, since);
        assert_eq!(sharing.wanted(Quota::Host), 5);
        if let Some(long_ago) = since.checked_sub(WANTED_FOR) {
            sharing.want(1, Quota::Host, 5, long_ago);
            assert_eq!(sharing.wanted(Quota::Host), 0);
        }
        assert_eq!(sharing.held_back(Quota::Host, u64::MAX), 0);
    }

    proptest! {
        #[test]
        fn whatever_is_taken_and_given_comes_to_nothing_in_the_end(
            moves in proptest::collection::vec((0u32..3, 0usize..QUOTAS.len(), 0u64..5, any::<bool>()), 1..200),
        ) {
            let ledger = ledger(10.0);
            let mut charges = Vec::new();
            for (uid, quota, amount, take) in moves {
                if take || charges.is_empty() {
                    charges.extend(ledger.account(uid).charge(QUOTAS[quota], amount));
                } else {
                    charges.swap_remove(amount as usize % charges.len());
                }
                for user in ledger.report() {
                    prop_assert!(user.held(Quota::Sequences) <= 3);
                }
            }
            drop(charges);
            for user in ledger.report() {
                prop_assert!(user.uses.values().all(|used| used.held == 0), "{:?}", user);
            }
            prop_assert_eq!(ledger.sharing.active(), 0);
        }
    }
}
