//! The conformance suite: every engine must do all of it.

mod areas;
mod faults;
mod moves;

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
    Spill::start_with(settings, false, "faulty", &make).unwrap()
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
        self.page(frame) == noise(seed)
    }

    fn is_blank(&self, frame: usize) -> bool {
        self.page(frame).iter().all(|byte| *byte == 0)
    }

    fn page(&self, frame: usize) -> Vec<u8> {
        let mut bytes = vec![0; PAGE];
        self.memory.read(frame * PAGE, &mut bytes).unwrap();
        bytes
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
        let unmounted = std::process::Command::new("umount").arg(self.0.path()).status();
        // A tier that is gone has nothing open there any more.
        let free = unmounted.is_ok_and(|status| status.success());
        assert!(free || std::thread::panicking(), "the file system is still in use");
    }
}
