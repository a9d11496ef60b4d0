//! The pool by itself: whose extents are reused, what they hold, how the budget is kept.

use std::sync::atomic::AtomicUsize;

use kvoyant_protocol::memory::SharedMapping;

use super::*;
use crate::tiers::pin::{PinError, PinGuard};

const EXTENT: u64 = EXTENT_BYTES as u64;

fn pool(extents: u64, settings: PoolSettings) -> ExtentPool {
    ExtentPool::start(Arc::new(ArenaBudget::new(extents * EXTENT)), settings).unwrap()
}

fn take(pool: &ExtentPool, uid: u32, extents: usize) -> Result<Supply, Refusal> {
    pool.request(uid, extents)?.blocking_recv().expect("the pool answers")
}

/// Pins only in name, at most so many at once, and counts.
#[derive(Debug, Clone)]
struct FakePin {
    pinned: Arc<AtomicUsize>,
    most: usize,
}

#[derive(Debug)]
struct FakeGuard(Arc<AtomicUsize>);

impl Drop for FakeGuard {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

impl FakePin {
    fn new(most: usize) -> Self {
        Self { pinned: Arc::default(), most }
    }

    fn settings(&self, required: bool) -> PoolSettings {
        PoolSettings { pin: Some(Box::new(self.clone())), pin_required: required, ..PoolSettings::unpinned() }
    }

    fn count(&self) -> usize {
        self.pinned.load(Ordering::Relaxed)
    }
}

impl Pin for FakePin {
    fn name(&self) -> &'static str {
        "fake"
    }

    fn pin(&self, _: &Arc<SharedMapping>) -> Result<Box<dyn PinGuard>, PinError> {
        if self.pinned.fetch_add(1, Ordering::Relaxed) < self.most {
            return Ok(Box::new(FakeGuard(Arc::clone(&self.pinned))));
        }
        self.pinned.fetch_sub(1, Ordering::Relaxed);
        Err(PinError::Registration { reason: format!("the limit is {}", self.most) })
    }
}

fn wait_for(pool: &ExtentPool, what: &str, so: impl Fn(&PoolReport) -> bool) -> PoolReport {
    let since = Instant::now();
    loop {
        let report = pool.report();
        if so(&report) {
            return report;
        }
        assert!(since.elapsed() < Duration::from_secs(30), "{what} never came: {report:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn mark(supply: &Supply) {
    for extent in supply.extents() {
        for offset in [0, 4096, EXTENT_BYTES / 2, EXTENT_BYTES - 8] {
            extent.memory().store_u64(offset, 0x5ec2e7);
        }
    }
}

fn is_clean(supply: &Supply) -> bool {
    let mut bytes = vec![0; EXTENT_BYTES];
    supply.extents().iter().all(|extent| {
        extent.memory().read(0, &mut bytes).unwrap();
        bytes.iter().all(|byte| *byte == 0)
    })
}

fn addresses(supply: &Supply) -> Vec<usize> {
    let address = |extent: &Extent| extent.memory().address(0, 0).unwrap() as usize;
    let mut list: Vec<_> = supply.extents().iter().map(address).collect();
    list.sort_unstable();
    list
}

#[test]
fn the_same_user_gets_the_same_extents_again_still_pinned_and_without_their_bytes() {
    let pin = FakePin::new(9);
    let pool = pool(2, pin.settings(true));
    let first = take(&pool, 7, 2).unwrap();
    mark(&first);
    let before = addresses(&first);
    drop(first);
    let second = take(&pool, 7, 2).unwrap();
    assert_eq!(addresses(&second), before);
    assert_eq!(pin.count(), 2);
    assert!(is_clean(&second));
}

#[test]
fn another_user_never_gets_them_they_are_destroyed_and_others_made() {
    let pin = FakePin::new(9);
    let pool = pool(2, pin.settings(true));
    let first = take(&pool, 7, 2).unwrap();
    mark(&first);
    // A former owner's mapping, which shows what it still shares with whom.
    let old: Vec<_> = first.extents().iter().map(|extent| Arc::clone(extent.memory())).collect();
    drop(first);
    wait_for(&pool, "idle extents", |report| {
        report.state == PoolState::Idle && report.ready_bytes == 2 * EXTENT
    });
    let second = take(&pool, 8, 2).unwrap();
    assert!(is_clean(&second));
    mark(&second);
    for memory in &old {
        memory.store_u64(64, 1);
    }
    assert!(second.extents().iter().all(|extent| extent.memory().load_u64(64) == 0));
    assert_eq!((pin.count(), pool.report().made_bytes), (2, 2 * EXTENT));
}

#[test]
fn users_whom_the_kernel_cannot_tell_apart_get_nothing_that_anybody_had() {
    let pin = FakePin::new(9);
    let pool = pool(1, pin.settings(true));
    for uid in NOBODY {
        let supply = take(&pool, uid, 1).unwrap();
        let old = Arc::clone(supply.extents()[0].memory());
        drop(supply);
        let next = take(&pool, uid, 1).unwrap();
        old.store_u64(0, 1);
        assert_eq!(next.extents()[0].memory().load_u64(0), 0);
        drop(next);
        wait_for(&pool, "nothing", |report| report.made_bytes == 0);
        assert_eq!(pin.count(), 0);
    }
}

#[test]
fn memory_that_nobody_pinned_and_nobody_wants_ahead_goes_back_to_the_system() {
    let pool = pool(4, PoolSettings::unpinned());
    drop(take(&pool, 7, 3).unwrap());
    let report = wait_for(&pool, "nothing", |report| report.made_bytes == 0);
    assert_eq!((report.ready_bytes, report.state), (0, PoolState::Idle));
}

#[test]
fn what_comes_back_is_wiped_and_destroyed_by_several_threads_and_handed_on_to_nobody_else() {
    const EXTENTS: usize = 6;
    let pin = FakePin::new(EXTENTS);
    let pool = pool(EXTENTS as u64, PoolSettings { returning: 3, ..pin.settings(true) });
    for round in 0..3 {
        // The same user gets them again, clean and as often as they come back.
        let supply = take(&pool, 7, EXTENTS).unwrap();
        assert!(is_clean(&supply), "round {round}");
        mark(&supply);
        let old: Vec<_> = supply.extents().iter().map(|extent| Arc::clone(extent.memory())).collect();
        drop(supply);
        let others = take(&pool, 8 + round, EXTENTS / 2).unwrap();
        assert!(is_clean(&others), "round {round}");
        mark(&others);
        for memory in &old {
            memory.store_u64(64, 1);
        }
        assert!(others.extents().iter().all(|extent| extent.memory().load_u64(64) == 0), "round {round}");
        old.iter().for_each(|memory| memory.store_u64(64, 0));
        drop((others, old));
        let idle = |report: &PoolReport| report.state == PoolState::Idle;
        let report = wait_for(&pool, "rest", idle);
        assert_eq!((report.ready_bytes, report.made_bytes), (report.made_bytes, report.pinned_bytes));
        assert!(pin.count() <= EXTENTS, "round {round}");
    }
    let plain = self::pool(4, PoolSettings { returning: 2, ..PoolSettings::unpinned() });
    drop(take(&plain, 7, 4).unwrap());
    wait_for(&plain, "nothing", |report| report.made_bytes == 0 && report.state == PoolState::Idle);
}

#[test]
fn what_is_wanted_ahead_is_made_unasked_and_made_again_when_it_was_destroyed() {
    let settings = PoolSettings { ahead_bytes: 2 * EXTENT, threads: 2, ..PoolSettings::unpinned() };
    let pool = pool(4, settings);
    let ready = |report: &PoolReport| report.state == PoolState::Idle && report.ready_bytes == 2 * EXTENT;
    wait_for(&pool, "two extents", ready);
    drop(take(&pool, NOBODY[0], 2).unwrap());
    wait_for(&pool, "two others", ready);
    let supply = take(&pool, 7, 4).unwrap();
    assert_eq!((supply.extents().len(), pool.report().made_bytes), (4, 4 * EXTENT));
}

#[test]
fn a_claim_is_never_more_than_the_budget_and_whoever_has_one_is_served() {
    let pool = Arc::new(pool(5, PoolSettings { threads: 3, ..FakePin::new(99).settings(true) }));
    let served = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for uid in 1..=6 {
            let (pool, served) = (&pool, &served);
            scope.spawn(move || {
                for round in 0..12 {
                    let wanted = 1 + (uid as usize + round) % 3;
                    match take(pool, uid % 3, wanted) {
                        Ok(supply) => {
                            assert_eq!(supply.extents().len(), wanted);
                            assert!(supply.extents().iter().all(|extent| extent.memory().load_u64(0) == 0));
                            mark(&supply);
                            served.fetch_add(1, Ordering::Relaxed);
                        }
                        Err(refusal) => assert_eq!(refusal, Refusal::Full),
                    }
                    let report = pool.report();
                    assert!(report.made_bytes <= 5 * EXTENT, "{report:?}");
                    assert!(pool.budget().used_bytes() <= 5 * EXTENT);
                }
            });
        }
    });
    assert!(served.into_inner() >= 12, "one at least is always served");
    assert_eq!(pool.budget().used_bytes(), 0);
    wait_for(&pool, "rest", |report| {
        report.state == PoolState::Idle && report.made_bytes == report.ready_bytes
    });
}

#[test]
fn a_request_that_nobody_waits_for_any_more_gives_everything_back() {
    let pin = FakePin::new(9);
    let pool = pool(3, pin.settings(true));
    drop(pool.request(7, 3).unwrap());
    wait_for(&pool, "rest", |report| report.state == PoolState::Idle);
    // What the abandoned request had claimed is free once a thread has looked.
    let since = Instant::now();
    let supply = loop {
        match take(&pool, 8, 3) {
            Ok(supply) => break supply,
            Err(refusal) => assert!(since.elapsed() < Duration::from_secs(30), "{refusal}"),
        }
    };
    drop(supply);
    assert_eq!(pool.budget().used_bytes(), 0);
}

#[test]
fn a_pin_that_is_not_required_fails_once_and_the_pool_goes_on() {
    let pin = FakePin::new(1);
    let pool = pool(3, pin.settings(false));
    let supply = take(&pool, 7, 3).unwrap();
    assert_eq!(supply.extents().iter().filter(|extent| extent.is_pinned()).count(), 1);
    let report = wait_for(&pool, "rest", |report| report.state != PoolState::Filling);
    assert_eq!((report.state, report.pin.as_str(), report.pinned_bytes), (PoolState::Failed, "none", EXTENT));
    assert!(report.trouble.unwrap().contains("the limit is 1"));
}

#[test]
fn a_pin_that_is_required_refuses_with_its_limit_and_gives_the_claim_back() {
    let pin = FakePin::new(1);
    let pool = pool(3, PoolSettings { ahead_bytes: 3 * EXTENT, ..pin.settings(true) });
    let Err(Refusal::Failed(reason)) = take(&pool, 7, 2) else { panic!("there is one extent at most") };
    assert!(reason.contains("the limit is 1"), "{reason}");
    assert_eq!(pool.budget().used_bytes(), 0);
    let one = take(&pool, 7, 1).unwrap();
    assert!(one.extents()[0].is_pinned());
    let report = pool.report();
    assert_eq!(report.made_bytes, EXTENT, "no unpinned extent stays: {report:?}");
}

#[test]
fn a_memory_limit_ends_making_ahead_before_it_is_reached_and_is_named() {
    let folder = tempfile::tempdir().unwrap();
    let cgroup = folder.path().join("cgroup");
    std::fs::create_dir_all(folder.path().join("proc/self")).unwrap();
    std::fs::create_dir_all(&cgroup).unwrap();
    std::fs::write(folder.path().join("proc/self/cgroup"), "0::/\n").unwrap();
    std::fs::write(cgroup.join("memory.max"), "200000000").unwrap();
    std::fs::write(cgroup.join("memory.current"), "0").unwrap();
    let limits = || Limits::at(&folder.path().join("proc"), &cgroup);
    let full = pool(2, PoolSettings { ahead_bytes: EXTENT, limits: limits(), ..PoolSettings::unpinned() });
    let report = wait_for(&full, "an end", |report| report.state == PoolState::Failed);
    assert!(report.trouble.unwrap().contains("memory.max is 0.19 GiB"));
    assert_eq!(report.made_bytes, 0);
    // On demand, the limit may be gone closer to, but not beyond.
    let pin = FakePin::new(9);
    let pool = pool(2, PoolSettings { limits: limits(), ..pin.settings(true) });
    let supply = take(&pool, 7, 1).unwrap();
    std::fs::write(cgroup.join("memory.current"), "100000000").unwrap();
    let Err(Refusal::Failed(reason)) = take(&pool, 7, 1) else { panic!("it is beyond the limit") };
    assert!(reason.contains("memory.max"), "{reason}");
    drop(supply);
    take(&pool, 7, 1).unwrap();
}

#[test]
fn a_pool_that_ends_lets_go_of_everything_and_of_whoever_waits() {
    let pin = FakePin::new(99);
    let pool = pool(40, PoolSettings { ahead_bytes: 40 * EXTENT, ..pin.settings(true) });
    let supply = take(&pool, 7, 1).unwrap();
    let waiting = pool.request(8, 39).unwrap();
    drop(pool);
    assert!(!matches!(waiting.blocking_recv(), Ok(Ok(supply)) if supply.extents().len() != 39));
    drop(supply);
    assert_eq!(pin.count(), 0);
}

#[test]
fn what_is_made_for_somebody_who_has_gone_goes_too() {
    let pool = pool(8, PoolSettings::unpinned());
    for extents in [1, 3] {
        // Gone before anything is made: its thread is at it all the same.
        drop(pool.request(7, extents).unwrap());
        wait_for(&pool, "an empty pool", |report| {
            pool.budget().used_bytes() == 0 && report.made_bytes == 0 && report.state == PoolState::Idle
        });
    }
    // What somebody waits for is not taken for a leftover.
    let supply = take(&pool, 7, 8).unwrap();
    assert_eq!(supply.extents().len(), 8);
}

#[test]
fn extents_that_a_client_may_have_mapped_are_let_go_of_as_they_are() {
    let pool = pool(2, PoolSettings::unpinned());
    let kept = |supply: &Supply| Arc::clone(supply.extents()[0].memory());
    let words = |memory: &SharedMapping| [0, 4096, EXTENT_BYTES - 8].map(|offset| memory.load_u64(offset));
    // Of a session whose client never came.
    let made = take(&pool, 7, 1).unwrap();
    mark(&made);
    let file = made.extents()[0].fd().unwrap();
    let mut adopted = pool.adopt(7, vec![Extent::adopt(file.try_clone().unwrap()).unwrap()]).unwrap();
    let memory = kept(&adopted);
    assert!(matches!(pool.adopt(7, vec![Extent::adopt(file).unwrap()]), Err(Refusal::Full)));
    drop(adopted);
    assert_eq!(pool.budget().used_bytes(), EXTENT);
    assert_eq!(words(&memory), [0x5ec2e7; 3]);
    // Once the client has come and gone, nothing of it stays.
    adopted = pool.adopt(7, vec![Extent::adopt(made.extents()[0].fd().unwrap()).unwrap()]).unwrap();
    adopted.claimed();
    drop(adopted);
    wait_for(&pool, "nothing dirty", |_| words(&memory) == [0; 3]);
    // A daemon that ends wipes nothing.
    mark(&made);
    pool.leave();
    let memory = kept(&made);
    drop(made);
    drop(pool);
    assert_eq!(words(&memory), [0x5ec2e7; 3]);
}

#[test]
fn what_was_made_ahead_makes_room_for_what_is_adopted() {
    let pins = FakePin::new(usize::MAX);
    let pool = pool(3, PoolSettings { ahead_bytes: 3 * EXTENT, ..pins.settings(true) });
    wait_for(&pool, "all of it", |report| report.ready_bytes == 3 * EXTENT);
    // As another daemon left them.
    let left = self::pool(2, PoolSettings::unpinned());
    let files = take(&left, 7, 2).unwrap();
    let files = files.extents().iter().map(|extent| Extent::adopt(extent.fd().unwrap()).unwrap());
    let adopted = pool.adopt(7, files.collect()).unwrap();
    let report = wait_for(&pool, "no more than may be", |report| report.made_bytes == 3 * EXTENT);
    assert_eq!((report.ready_bytes, pins.count()), (EXTENT, 3));
    let more = take(&pool, 7, 1).unwrap();
    assert_eq!((adopted.extents().len(), more.extents().len()), (2, 1));
}
