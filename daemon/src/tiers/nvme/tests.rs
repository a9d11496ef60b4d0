//! The conformance suite: every engine must do all of it.

use std::collections::HashMap;
use std::fs::OpenOptions;
use std::os::unix::fs::{MetadataExt, PermissionsExt};
use std::path::Path;
use std::time::Duration;

use kvoyant_protocol::futex::{Bell, wait_any};
use kvoyant_protocol::memory::Memfd;
use tempfile::TempDir;

use super::faulty::{Fault, Faulty, Plan};
use super::noop::Noop;
use super::operation::Kind;
use super::*;

const PAGE: usize = 8192;
const MIB: usize = 1 << 20;

/// Engines that this machine has.
fn engines() -> Vec<EngineChoice> {
    let folder = tempfile::tempdir().unwrap();
    let mut engines = vec![EngineChoice::Psync];
    match Spill::start(&settings(folder.path(), 1, EngineChoice::Uring)) {
        Ok(_) => engines.push(EngineChoice::Uring),
        Err(error) => eprintln!("SKIPPED: io_uring, because {error}"),
    }
    engines
}

fn settings(path: &Path, chunks: u64, engine: EngineChoice) -> SpillSettings {
    SpillSettings {
        paths: vec![path.to_owned()],
        bytes: chunks * CHUNK_BYTES,
        engine,
        ..SpillSettings::default()
    }
}

fn maker(engine: EngineChoice) -> Make {
    if engine == EngineChoice::Uring { uring() } else { psync() }
}

fn with_faults(settings: &SpillSettings, plan: &Plan) -> Arc<Spill> {
    let (inner, plan) = (maker(settings.engine), plan.clone());
    let make: Make = Arc::new(move |setup| Ok(Box::new(Faulty::new(inner(setup)?, plan.clone())) as _));
    Spill::start_with(settings, "faulty", &make).unwrap()
}

/// A lane with some memory.
struct Lane {
    spill: Arc<Spill>,
    slots: Slots,
    memory: Arc<SharedMapping>,
    report: Arc<SpillReport>,
    bell: Arc<Bell>,
    jobs: Vec<Job>,
}

impl Lane {
    fn new(spill: &Arc<Spill>, bytes: usize) -> Self {
        let memory = Arc::new(Memfd::create("frames", bytes).unwrap().map(true).unwrap());
        let bell = Arc::new(Bell::default());
        let report = Arc::new(SpillReport::new(Arc::clone(&bell)));
        Self { spill: Arc::clone(spill), slots: spill.slots(PAGE), memory, report, bell, jobs: Vec::new() }
    }

    fn add(&mut self, direction: Direction, slot: u32, frame: usize, token: u64, deadline_ns: u64) {
        self.jobs.push(Job {
            direction,
            slot: self.slots.slot(slot),
            memory: Arc::clone(&self.memory),
            offset: frame * PAGE,
            deadline_ns,
            session: 7,
            token,
            report: Arc::clone(&self.report),
        });
    }

    fn submit(&mut self) {
        self.spill.submit(&mut self.jobs);
    }

    /// Sleeps until so many have ended, as a lane does.
    fn wait(&self, count: usize) -> Vec<Ended> {
        wait_for(&self.report, &self.bell, count)
    }

    fn fill(&self, frame: usize, seed: u64) {
        self.memory.write(frame * PAGE, &noise(seed)).unwrap();
    }

    fn holds(&self, frame: usize, seed: u64) -> bool {
        let mut bytes = vec![0; PAGE];
        self.memory.read(frame * PAGE, &mut bytes).unwrap();
        bytes == noise(seed)
    }

    /// Writes pages 0..count of a head from frames of the same number.
    fn spill_pages(&mut self, count: usize) -> Vec<u32> {
        let mut slots: Vec<u32> = Vec::new();
        for page in 0..count {
            let sibling = slots.last().copied().filter(|_| page % GROUP_PAGES != 0);
            slots.push(self.slots.assign(page, sibling, page / GROUP_PAGES).unwrap());
            self.fill(page, page as u64);
            self.add(Direction::Write, slots[page], page, page as u64, 0);
        }
        self.submit();
        slots
    }
}

fn wait_for(report: &SpillReport, bell: &Bell, count: usize) -> Vec<Ended> {
    let mut ended = Vec::new();
    while ended.len() < count {
        bell.say_sleeping(true);
        let seen = bell.seen();
        let before = ended.len();
        ended.extend(std::iter::from_fn(|| report.pop()));
        if ended.len() == before {
            wait_any((bell, seen), &[], Duration::from_secs(60)).unwrap();
        }
        bell.say_sleeping(false);
    }
    ended
}

fn noise(seed: u64) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let words = (0..PAGE / 8).flat_map(|_| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    });
    words.collect()
}

fn results(ended: &[Ended]) -> HashMap<u64, Result<(), PageError>> {
    ended.iter().map(|ended| (ended.token, ended.result)).collect()
}

#[test]
fn pages_come_back_as_they_were_in_any_order_and_into_any_frame() {
    for engine in engines() {
        for registered in [false, true] {
            let folder = tempfile::tempdir().unwrap();
            let spill = Spill::start(&settings(folder.path(), 4, engine)).unwrap();
            let mut lane = Lane::new(&spill, 16 * MIB);
            if registered {
                spill.register(&lane.memory);
            }
            let pages = 1000;
            let slots = lane.spill_pages(pages);
            assert!(lane.wait(pages).iter().all(|ended| ended.result == Ok(())), "{engine:?}");
            // 613 and 1000 have no common divisor: every page, far from its neighbours.
            for step in 0..pages {
                let page = step * 613 % pages;
                lane.add(Direction::Read, slots[page], 1000 + step, page as u64, step as u64);
            }
            lane.submit();
            let ended = lane.wait(pages);
            assert!(ended.iter().all(|ended| ended.result == Ok(()) && ended.session == 7), "{engine:?}");
            for step in 0..pages {
                assert!(lane.holds(1000 + step, (step * 613 % pages) as u64), "{engine:?}, step {step}");
            }
            let report = &spill.report()[0];
            assert_eq!((report.reads, report.writes), (1000, 1000));
            assert_eq!(report.read_latency.iter().sum::<u64>(), 1000);
            assert_eq!(report.state, DeviceState::Serving);
            spill.forget(&lane.memory);
        }
    }
}

#[test]
fn adjacent_pages_go_in_one_operation_whether_their_frames_are_adjacent_or_not() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let spill = Spill::start(&settings(folder.path(), 1, engine)).unwrap();
        let mut lane = Lane::new(&spill, 8 * MIB);
        spill.register(&lane.memory);
        let slots = lane.spill_pages(64);
        lane.wait(64);
        assert_eq!(spill.report()[0].write_operations, 2, "64 pages of 8 KiB are two operations of 256 KiB");
        for (at, slot) in slots.iter().enumerate().rev() {
            lane.add(Direction::Read, *slot, 100 + (at * 37) % 64, at as u64, 0);
        }
        lane.submit();
        assert!(lane.wait(64).iter().all(|ended| ended.result == Ok(())));
        assert_eq!(spill.report()[0].read_operations, 2);
        assert!((0..64).all(|at| lane.holds(100 + (at * 37) % 64, at as u64)), "{engine:?}");
    }
}

/// Pages at the first place of a group each, so that each is an operation of its own.
fn apart(lane: &mut Lane, count: usize) -> Vec<u32> {
    let slots: Vec<u32> = (0..count).map(|_| lane.slots.assign(0, None, 0).unwrap()).collect();
    for (at, slot) in slots.iter().enumerate() {
        lane.fill(at, at as u64);
        lane.add(Direction::Write, *slot, at, at as u64, 0);
    }
    lane.submit();
    slots
}

#[test]
fn each_fault_at_each_operation_fails_that_page_only_or_is_healed() {
    const COUNT: usize = 6;
    let io = |errno: i32| move |error: PageError| matches!(error, PageError::Io { errno: found, .. } if found == errno);
    type Expected = Option<Box<dyn Fn(PageError) -> bool>>;
    let checksum =
        |error: PageError| matches!(error, PageError::Checksum { expected, found, .. } if expected != found);
    let short = |error: PageError| matches!(error, PageError::Short { done: 0, wanted: PAGE, .. });
    let never = |error: PageError| matches!(error, PageError::NeverWritten { .. });
    let cases = || -> Vec<(Kind, Fault, Expected, Expected)> {
        let some = |check: Box<dyn Fn(PageError) -> bool>| Some(check);
        vec![
            (Kind::Write, Fault::Error(libc::EIO), some(Box::new(io(libc::EIO))), some(Box::new(never))),
            (
                Kind::Write,
                Fault::Error(libc::ENOSPC),
                some(Box::new(io(libc::ENOSPC))),
                some(Box::new(never)),
            ),
            (Kind::Write, Fault::Error(libc::EINTR), None, None),
            (Kind::Write, Fault::Error(libc::EAGAIN), None, None),
            (Kind::Write, Fault::Short(4096), None, None),
            (Kind::Write, Fault::Nothing, some(Box::new(short)), some(Box::new(never))),
            (Kind::Write, Fault::Torn(4096), None, some(Box::new(checksum))),
            (Kind::Read, Fault::Error(libc::EIO), None, some(Box::new(io(libc::EIO)))),
            (Kind::Read, Fault::Error(libc::EINTR), None, None),
            (Kind::Read, Fault::Short(4096), None, None),
            (Kind::Read, Fault::Nothing, None, some(Box::new(short))),
            (Kind::Read, Fault::Torn(4096), None, some(Box::new(checksum))),
            (Kind::Read, Fault::Flip, None, some(Box::new(checksum))),
        ]
    };
    for engine in engines() {
        for nth in 0..COUNT {
            for (kind, fault, written, read) in cases() {
                let folder = tempfile::tempdir().unwrap();
                let plan = Plan { faults: vec![(kind, nth as u64, fault)], ..Plan::default() };
                let spill = with_faults(&settings(folder.path(), 1, engine), &plan);
                let mut lane = Lane::new(&spill, MIB);
                let slots = apart(&mut lane, COUNT);
                let check = |ended: &[Ended], expected: &Expected, what: &str| {
                    for (token, result) in results(ended) {
                        let right = match (expected, result) {
                            (Some(expected), Err(error)) => token == nth as u64 && expected(error),
                            (Some(_), Ok(())) => token != nth as u64,
                            (None, result) => result == Ok(()),
                        };
                        assert!(
                            right,
                            "{engine:?}, {what} of {kind:?} {fault:?} at {nth}: page {token} {result:?}"
                        );
                    }
                };
                check(&lane.wait(COUNT), &written, "write");
                for (at, slot) in slots.iter().enumerate() {
                    lane.add(Direction::Read, *slot, 32 + at, at as u64, 1 + at as u64);
                }
                lane.submit();
                let ended = lane.wait(COUNT);
                check(&ended, &read, "read");
                for (token, result) in results(&ended) {
                    assert!(
                        result.is_err() || lane.holds(32 + token as usize, token),
                        "wrong bytes of page {token}"
                    );
                }
            }
        }
    }
}

#[test]
fn one_bad_page_of_an_operation_of_many_does_not_spoil_the_others() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        // The first read is that of all pages; its third page alone is the fourth.
        let faults = vec![(Kind::Read, 0, Fault::Error(libc::EIO)), (Kind::Read, 3, Fault::Error(libc::EIO))];
        let spill = with_faults(&settings(folder.path(), 1, engine), &Plan { faults, ..Plan::default() });
        let mut lane = Lane::new(&spill, MIB);
        let slots = lane.spill_pages(16);
        lane.wait(16);
        for (at, slot) in slots.iter().enumerate() {
            lane.add(Direction::Read, *slot, 32 + at, at as u64, 0);
        }
        lane.submit();
        let results = results(&lane.wait(16));
        assert_eq!(results.values().filter(|result| result.is_err()).count(), 1, "{results:?}");
        for (token, result) in results {
            assert!(result.is_err() || lane.holds(32 + token as usize, token));
        }
    }
}

#[test]
fn a_device_that_keeps_failing_gets_no_more_writes_and_is_still_read() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        // The first 20 go well.
        let faults = (20..60).map(|nth| (Kind::Write, nth, Fault::Error(libc::EIO))).collect();
        let spill = with_faults(&settings(folder.path(), 1, engine), &Plan { faults, ..Plan::default() });
        let mut lane = Lane::new(&spill, MIB);
        let good = apart(&mut lane, 20);
        assert!(lane.wait(20).iter().all(|ended| ended.result == Ok(())));
        apart(&mut lane, 20);
        assert!(lane.wait(20).iter().all(|ended| ended.result.is_err()));
        assert!(spill.is_failed());
        let bad = lane.slots.slot(good[0]);
        assert!(lane.slots.assign(0, None, 0).is_err(), "no slots for what cannot be written");
        lane.jobs.push(Job {
            direction: Direction::Write,
            slot: bad,
            memory: Arc::clone(&lane.memory),
            offset: 0,
            deadline_ns: 0,
            session: 7,
            token: 1,
            report: Arc::clone(&lane.report),
        });
        lane.submit();
        assert_eq!(lane.wait(1)[0].result, Err(PageError::Failed));
        let DeviceState::Failed(reason) = &spill.report()[0].state else { panic!("it has failed") };
        assert!(reason.contains("8 writes in a row"), "{reason}");
        lane.add(Direction::Read, good[3], 50, 3, 0);
        lane.submit();
        assert_eq!(lane.wait(1)[0].result, Ok(()));
        assert!(lane.holds(50, 3));
    }
}

#[test]
fn a_file_that_somebody_cuts_short_costs_its_pages_and_no_others() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let spill = Spill::start(&settings(folder.path(), 1, engine)).unwrap();
        let mut lane = Lane::new(&spill, MIB);
        let slots = lane.spill_pages(16);
        lane.wait(16);
        let path = &spill.report()[0].path;
        let end = super::device::HEAD_BYTES + 5 * PAGE as u64 + 4096;
        OpenOptions::new().write(true).open(path).unwrap().set_len(end).unwrap();
        for (at, slot) in slots.iter().enumerate() {
            lane.add(Direction::Read, *slot, 32 + at, at as u64, 0);
        }
        lane.submit();
        for (token, result) in results(&lane.wait(16)) {
            match (token, result) {
                (0..5, result) => assert!(result == Ok(()) && lane.holds(32 + token as usize, token)),
                (5, Err(PageError::Short { done: 4096, .. }))
                | (6.., Err(PageError::Short { done: 0, .. })) => {}
                other => panic!("{engine:?}: {other:?}"),
            }
        }
        // A page that is written again is there again.
        lane.fill(0, 99);
        lane.add(Direction::Write, slots[9], 0, 9, 0);
        lane.add(Direction::Read, slots[9], 1, 10, 0);
        lane.submit();
        assert!(lane.wait(2).iter().all(|ended| ended.result == Ok(())), "the read waits for the write");
        assert!(lane.holds(1, 99));
    }
}

#[test]
fn bytes_that_somebody_changes_on_disk_are_never_reported_as_read() {
    let folder = tempfile::tempdir().unwrap();
    let spill = Spill::start(&settings(folder.path(), 1, EngineChoice::Auto)).unwrap();
    let mut lane = Lane::new(&spill, MIB);
    let slots = lane.spill_pages(2);
    lane.wait(2);
    let file = OpenOptions::new().write(true).open(&spill.report()[0].path).unwrap();
    // A stale block: page 0 where page 1 is to be.
    std::os::unix::fs::FileExt::write_all_at(&file, &noise(0), super::device::HEAD_BYTES + PAGE as u64)
        .unwrap();
    file.sync_all().unwrap();
    for (at, slot) in slots.iter().enumerate() {
        lane.add(Direction::Read, *slot, 32 + at, at as u64, 0);
    }
    lane.submit();
    let results = results(&lane.wait(2));
    assert_eq!(results[&0], Ok(()));
    assert!(matches!(results[&1], Err(PageError::Checksum { .. })));
    let error = results[&1].unwrap_err().to_string();
    assert!(error.contains("checksum"), "{error}");
}

#[test]
fn slots_that_were_never_written_and_frames_outside_their_memory_are_errors() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let spill = Spill::start(&settings(folder.path(), 1, engine)).unwrap();
        let mut lane = Lane::new(&spill, MIB);
        let slot = lane.slots.assign(0, None, 0).unwrap();
        lane.add(Direction::Read, slot, 0, 0, 0);
        lane.add(Direction::Write, slot, MIB / PAGE, 1, 0);
        lane.submit();
        let results = results(&lane.wait(2));
        assert!(matches!(results[&1], Err(PageError::Io { errno: libc::EFAULT, .. })));
        assert!(matches!(results[&0], Err(PageError::NeverWritten { .. })));
    }
}

#[test]
fn reads_come_in_the_order_of_their_deadlines_and_before_writes() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan { latency: Duration::from_millis(2), ..Plan::default() };
        let shallow = SpillSettings { depth: 2, write_depth: 1, ..settings(folder.path(), 1, engine) };
        let spill = with_faults(&shallow, &plan);
        let mut lane = Lane::new(&spill, 2 * MIB);
        let slots = apart(&mut lane, 40);
        lane.wait(40);
        // Twenty rewrites wait; then reads with deadlines that fall, and one that is wanted now.
        for at in 20..40 {
            lane.add(Direction::Write, slots[at], at, 100 + at as u64, 0);
        }
        for at in 0..19 {
            lane.add(Direction::Read, slots[at], 50 + at, at as u64, 1000 - at as u64);
        }
        lane.add(Direction::Read, slots[19], 69, 19, 0);
        lane.submit();
        let ended = lane.wait(40);
        assert!(ended.iter().all(|ended| ended.result == Ok(())));
        let reads: Vec<u64> = ended.iter().map(|ended| ended.token).filter(|token| *token < 100).collect();
        let expected: Vec<u64> = std::iter::once(19).chain((0..19).rev()).collect();
        assert_eq!(reads, expected, "{engine:?}");
        let last_read = ended.iter().rposition(|ended| ended.token < 100).unwrap();
        let writes_before = ended[..last_read].iter().filter(|ended| ended.token >= 100).count();
        assert!(writes_before > 0, "writes do not starve");
        assert!(last_read < 39, "reads do not wait for all writes");
    }
}

#[test]
fn dropping_the_tier_ends_every_job_and_removes_the_area() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let plan = Plan { latency: Duration::from_millis(5), ..Plan::default() };
        let shallow = SpillSettings { depth: 4, ..settings(folder.path(), 1, engine) };
        let spill = with_faults(&shallow, &plan);
        let path = spill.report()[0].path.clone();
        let mut lane = Lane::new(&spill, MIB);
        apart(&mut lane, 40);
        let Lane { spill: other, slots, report, bell, .. } = lane;
        drop(other);
        assert!(path.exists());
        drop(spill);
        let ended = wait_for(&report, &bell, 40);
        assert_eq!(ended.len(), 40);
        assert!(ended.iter().all(|ended| matches!(ended.result, Ok(()) | Err(PageError::Failed))));
        assert!(!path.exists());
        drop(slots);
    }
}

#[test]
fn what_a_session_leaves_is_erased_before_anybody_else_gets_it() {
    for engine in engines() {
        let folder = tempfile::tempdir().unwrap();
        let spill = Spill::start(&settings(folder.path(), 1, engine)).unwrap();
        let mut lane = Lane::new(&spill, MIB);
        lane.spill_pages(16);
        lane.wait(16);
        let path = spill.report()[0].path.clone();
        let read = || {
            let mut bytes = vec![0; 16 * PAGE];
            let file = std::fs::File::open(&path).unwrap();
            std::os::unix::fs::FileExt::read_exact_at(&file, &mut bytes, super::device::HEAD_BYTES).unwrap();
            bytes
        };
        assert!(read().iter().any(|byte| *byte != 0));
        let before = std::fs::metadata(&path).unwrap().blocks();
        drop(lane);
        let until = std::time::Instant::now() + Duration::from_secs(60);
        while spill.report()[0].used_bytes > 0 {
            assert!(std::time::Instant::now() < until, "the chunk does not come back");
            std::thread::sleep(Duration::from_millis(1));
        }
        assert!(read().iter().all(|byte| *byte == 0), "{engine:?}");
        assert_eq!(std::fs::metadata(&path).unwrap().blocks(), before, "its space stays set aside");
    }
}

#[test]
fn an_area_belongs_to_one_daemon_and_only_its_owner_may_read_it() {
    let folder = tempfile::tempdir().unwrap();
    let settings = settings(folder.path(), 1, EngineChoice::Psync);
    let first = Spill::start(&settings).unwrap();
    let path = first.report()[0].path.clone();
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o600);
    match Spill::start(&settings) {
        Err(SpillError::Busy { path: busy }) => assert_eq!(busy, path),
        other => panic!("{other:?}"),
    }
    assert!(path.exists(), "the loser leaves the winner's area alone");
    drop(first);
    drop(Spill::start(&settings).unwrap());
}

#[test]
fn what_is_not_ours_is_refused_and_left_as_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("letters");
    std::fs::write(&file, "Dear Sir").unwrap();
    let refused = Spill::start(&settings(&file, 1, EngineChoice::Psync)).unwrap_err();
    assert!(matches!(refused, SpillError::Foreign { .. }), "{refused:?}");
    assert!(refused.to_string().contains("rm"), "{refused}");
    assert_eq!(std::fs::read(&file).unwrap(), b"Dear Sir");
    std::fs::write(&file, [0; 9000]).unwrap();
    assert!(matches!(
        Spill::start(&settings(&file, 1, EngineChoice::Psync)),
        Err(SpillError::Foreign { .. })
    ));
    let link = folder.path().join("kvoyant-spill-0");
    std::os::unix::fs::symlink(&file, &link).unwrap();
    assert!(matches!(
        Spill::start(&settings(folder.path(), 1, EngineChoice::Psync)),
        Err(SpillError::Io { what: "open", .. })
    ));
    assert!(matches!(
        Spill::start(&settings(Path::new("/dev/null"), 1, EngineChoice::Psync)),
        Err(SpillError::Unusable { .. } | SpillError::Io { .. })
    ));
    let small = SpillSettings { bytes: 100, ..settings(&folder.path().join("new"), 1, EngineChoice::Psync) };
    assert!(matches!(Spill::start(&small), Err(SpillError::TooSmall { bytes: 100, .. })));
    assert!(matches!(Spill::start(&SpillSettings::default()), Err(SpillError::NoPaths)));
}

#[test]
fn an_area_that_a_killed_daemon_left_is_taken_over_empty() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("kvoyant-spill-0");
    let mut left = superblock::encode(1 << 30);
    left.resize(3 * MIB, 0x55);
    std::fs::write(&path, left).unwrap();
    let spill = Spill::start(&settings(folder.path(), 2, EngineChoice::Auto)).unwrap();
    assert_eq!(spill.report()[0].used_bytes, 0);
    let bytes = std::fs::read(&path).unwrap();
    assert_eq!(bytes.len(), MIB + 2 * CHUNK_BYTES as usize);
    assert!(bytes[4096..].iter().all(|byte| *byte == 0), "nothing of the old text is there");
}

/// A small file system in memory, unmounted at the end; `None` where we may not mount.
struct Tiny(TempDir);

impl Tiny {
    fn mount(bytes: usize) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let mounted = std::process::Command::new("mount")
            .args(["-t", "tmpfs", "-o", &format!("size={bytes}"), "tmpfs"])
            .arg(folder.path())
            .output();
        match mounted {
            Ok(output) if output.status.success() => Some(Self(folder)),
            other => {
                eprintln!("SKIPPED: no file system could be mounted: {other:?}");
                None
            }
        }
    }
}

impl Drop for Tiny {
    fn drop(&mut self) {
        let _ = std::process::Command::new("umount").arg(self.0.path()).status();
    }
}

#[test]
fn an_area_that_does_not_fit_is_refused_with_what_there_is() {
    let Some(tiny) = Tiny::mount(24 * MIB) else { return };
    match Spill::start(&settings(tiny.0.path(), 4, EngineChoice::Psync)) {
        Err(SpillError::NoSpace { wanted, free, .. }) => {
            assert_eq!(wanted, MIB as u64 + 4 * CHUNK_BYTES);
            assert!(free <= 24 * MIB as u64, "{free}");
        }
        other => panic!("{other:?}"),
    }
    assert_eq!(std::fs::read_dir(tiny.0.path()).unwrap().count(), 0, "nothing is left behind");
    drop(Spill::start(&settings(tiny.0.path(), 1, EngineChoice::Auto)).unwrap());
}

#[test]
fn a_file_system_that_fills_up_fails_the_pages_that_do_not_fit() {
    for engine in engines() {
        let Some(tiny) = Tiny::mount(20 * MIB) else { return };
        let spill = Spill::start(&settings(tiny.0.path(), 1, engine)).unwrap();
        // Somebody takes the space away, and somebody else uses it.
        let path = &spill.report()[0].path;
        let file = OpenOptions::new().write(true).open(path).unwrap();
        file.set_len(4096).unwrap();
        file.set_len(MIB as u64 + CHUNK_BYTES).unwrap();
        std::fs::write(tiny.0.path().join("other"), vec![1; 18 * MIB]).unwrap();
        let mut lane = Lane::new(&spill, 8 * MIB);
        let pages = 512;
        let slots = lane.spill_pages(pages);
        let written = results(&lane.wait(pages));
        let failed = written.values().filter(|result| result.is_err()).count();
        assert!(failed > 0 && failed < pages, "{engine:?}: {failed}");
        assert!(written.values().all(|result| {
            matches!(result, Ok(()) | Err(PageError::Io { errno: libc::ENOSPC, .. } | PageError::Failed))
        }));
        assert!(spill.is_failed());
        for (at, slot) in slots.iter().enumerate() {
            lane.add(Direction::Read, *slot, 512 + at, at as u64, 0);
        }
        lane.submit();
        for (token, result) in results(&lane.wait(pages)) {
            assert_eq!(result.is_ok(), written[&token].is_ok(), "page {token}");
            assert!(result.is_err() || lane.holds(512 + token as usize, token));
        }
    }
}

#[test]
fn without_io_uring_threads_take_over_or_the_reason_is_said() {
    let folder = tempfile::tempdir().unwrap();
    let refused: Make = Arc::new(|_| Err(io::Error::from_raw_os_error(libc::EPERM)));
    let settings = settings(folder.path(), 1, EngineChoice::Uring);
    let error = Spill::start_with(&settings, "io_uring", &refused).unwrap_err();
    assert!(error.to_string().contains("psync works everywhere"), "{error}");
    assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    let spill = Spill::start_with(&settings, "psync", &or_threads(refused)).unwrap();
    assert_eq!(spill.report()[0].engine, "psync");
}

#[test]
fn the_twin_that_moves_nothing_ends_every_job() {
    let folder = tempfile::tempdir().unwrap();
    let make: Make = Arc::new(|_| Ok(Box::new(Noop::new()) as _));
    let spill = Spill::start_with(&settings(folder.path(), 1, EngineChoice::Auto), "noop", &make).unwrap();
    let mut lane = Lane::new(&spill, MIB);
    let slots = lane.spill_pages(64);
    assert!(lane.wait(64).iter().all(|ended| ended.result == Ok(())));
    // The frame still holds what was written.
    lane.add(Direction::Read, slots[5], 5, 5, 0);
    lane.submit();
    assert_eq!(lane.wait(1)[0].result, Ok(()));
}

#[test]
fn lanes_share_several_devices() {
    let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let settings = SpillSettings {
        paths: folders.iter().map(|folder| folder.path().to_owned()).collect(),
        bytes: 2 * CHUNK_BYTES,
        ..SpillSettings::default()
    };
    let spill = Spill::start(&settings).unwrap();
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                let mut lane = Lane::new(&spill, 4 * MIB);
                for _ in 0..5 {
                    let slots = lane.spill_pages(200);
                    assert!(lane.wait(200).iter().all(|ended| ended.result == Ok(())));
                    for (at, slot) in slots.iter().enumerate() {
                        lane.add(Direction::Read, *slot, 256 + at, at as u64, 1);
                    }
                    lane.submit();
                    // Released while its reads are under way: they get what was written nevertheless.
                    for slot in slots {
                        lane.slots.release(slot);
                    }
                    assert!(lane.wait(200).iter().all(|ended| ended.result == Ok(())));
                    assert!((0..200).all(|at| lane.holds(256 + at, at as u64)));
                }
            });
        }
    });
    assert!(spill.report().iter().all(|report| report.writes > 0 && report.reads > 0));
}
