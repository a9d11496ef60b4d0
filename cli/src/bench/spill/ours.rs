//! The spill tier as a lane drives it: jobs are handed in ahead, and what has ended is taken every now and then.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvoyant_daemon::tiers::nvme::{
    CHUNK_BYTES, DeviceReport, Direction, GROUP_PAGES, Job, PageError, Slots, Spill, SpillReport,
    SpillSettings,
};
use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::futex::{Bell, now_ns};
use kvoyant_protocol::memory::{Memfd, SharedMapping};
use nix::sys::resource::{UsageWho, getrusage};
use nix::time::{ClockId, clock_gettime};
use serde::Serialize;

use super::{Moved, SpillBenchError};

/// How often the lane looks. It does other work meanwhile; that is not measured here, so it sleeps.
const LOOK: Duration = Duration::from_micros(500);

/// Jobs that are handed in and have not ended, as a multiple of the depth: the device is never out of work between looks.
const AHEAD: usize = 3;

/// Layers of the model whose predicted reads are imitated, and how long each takes: a step of 160 ms.
const LAYERS: u32 = 32;
const LAYER: Duration = Duration::from_millis(5);

/// How long it is measured before and after each step what the disk has to give.
const PROBE: Duration = Duration::from_millis(100);

/// Pages of which the lane's cost is taken at once, and how often.
const COST_PAGES: usize = 256;
const COST_ROUNDS: usize = 64;

/// Pages of one step, and those of them that came after their layer had begun.
#[derive(Clone, Copy, Debug)]
pub(super) struct Step {
    pub(super) pages: u64,
    pub(super) late: u64,
}

/// What became of predicted reads.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize)]
pub(super) struct Predicted {
    steps: u64,
    pages: u64,
    late: u64,
    /// Of those, steps in which the disk had no less to give than before them.
    held_steps: u64,
    held_pages: u64,
    held_late: u64,
}

impl Predicted {
    pub(super) fn add(&mut self, step: &Step, held: bool) {
        self.steps += 1;
        self.pages += step.pages;
        self.late += step.late;
        if held {
            self.held_steps += 1;
            self.held_pages += step.pages;
            self.held_late += step.late;
        }
    }

    /// The share of pages that were there in time, of all steps.
    pub(super) fn in_time(&self) -> f64 {
        1.0 - self.late as f64 / self.pages.max(1) as f64
    }

    /// Of steps in which the disk held what it had; no number if there were none.
    pub(super) fn held_in_time(&self) -> f64 {
        1.0 - self.held_late as f64 / self.held_pages as f64
    }
}

/// A lane, its frames and slots, and the tier.
#[derive(Debug)]
pub(super) struct Ours {
    slots: Slots,
    /// Slots of all pages, in the order of the disk.
    pages: Vec<u32>,
    memory: Arc<SharedMapping>,
    report: Arc<SpillReport>,
    spill: Arc<Spill>,
    page_bytes: usize,
    depth: usize,
    jobs: Vec<Job>,
    random: u64,
    /// Frames that no job has. They lie about, as a session's do; the last one is taken first, so that no more are used
    /// than jobs are handed in: fio has as many buffers as it has operations in flight.
    free: Vec<usize>,
    bytes: u64,
}

impl Ours {
    /// A tier with one area in `folder`, in which every page has a slot, but for a chunk that [`Ours::lane_cost`] uses.
    pub(super) fn start(folder: &Path, bytes: u64, page: u64, depth: u32) -> Result<Self, SpillBenchError> {
        let sizes = |why| SpillBenchError::Sizes { bytes, page, why };
        if page == 0 || !page.is_multiple_of(4096) || page > 1 << 20 {
            return Err(sizes("a page is a multiple of 4096 bytes and at most 1 MiB"));
        }
        let area = bytes - bytes % CHUNK_BYTES;
        if area == 0 {
            return Err(sizes("the least is 16 MiB"));
        }
        let settings = SpillSettings {
            paths: vec![folder.to_owned()],
            bytes: area + CHUNK_BYTES,
            depth,
            ..SpillSettings::default()
        };
        let spill = Spill::start(&settings)?;
        let memory = Arc::new(Memfd::create("kvoyant-bench-spill", EXTENT_BYTES)?.map(false)?);
        // As the daemon does for its extents; where the system takes no advice, pages are small.
        let _ = memory.advise_huge();
        memory.populate()?;
        let mut words = 0x9e37_79b9_7f4a_7c15u64;
        for offset in (0..EXTENT_BYTES).step_by(8) {
            words = next(words);
            memory.store_u64(offset, words);
        }
        spill.register(&memory);
        let frames = EXTENT_BYTES / page as usize;
        let mut free: Vec<usize> = (0..frames).collect();
        free.sort_by_key(|frame| next(*frame as u64 + 1).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        let mut slots = spill.slots(page as usize);
        let mut pages: Vec<u32> = Vec::new();
        let whole = CHUNK_BYTES / page / GROUP_PAGES as u64 * GROUP_PAGES as u64 * (area / CHUNK_BYTES);
        for at in 0..whole as usize {
            let sibling = pages.last().copied().filter(|_| !at.is_multiple_of(GROUP_PAGES));
            pages.push(slots.assign(at, sibling, 0)?);
        }
        Ok(Self {
            slots,
            pages,
            memory,
            report: Arc::new(SpillReport::new(Arc::new(Bell::default()))),
            spill,
            page_bytes: page as usize,
            depth: depth as usize,
            jobs: Vec::new(),
            random: 1,
            free,
            bytes: area,
        })
    }

    /// Bytes that are written and read.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// What the tier says of itself.
    pub(super) fn report(&self) -> DeviceReport {
        self.spill.report().swap_remove(0)
    }

    /// Writes all pages in order, again and again, at least once, for so long.
    pub(super) fn write(&mut self, time: Duration) -> Result<Moved, SpillBenchError> {
        let (mut at, count) = (0, self.pages.len());
        self.keep_busy(Direction::Write, |begun, began| {
            if begun >= count && began.elapsed() >= time {
                return None;
            }
            at = (at + 1) % count;
            Some(at)
        })
    }

    /// Reads pages by chance, for so long.
    pub(super) fn read(&mut self, time: Duration) -> Result<Moved, SpillBenchError> {
        let (mut random, count) = (self.random, self.pages.len());
        let moved = self.keep_busy(Direction::Read, |_, began| {
            random = next(random);
            (began.elapsed() < time).then_some((random % count as u64) as usize)
        });
        self.random = random;
        moved
    }

    /// Has jobs handed in for the pages that `pick` names until it names none, and waits for all.
    fn keep_busy(
        &mut self,
        direction: Direction,
        mut pick: impl FnMut(usize, Instant) -> Option<usize>,
    ) -> Result<Moved, SpillBenchError> {
        let most = (AHEAD * self.depth).min(self.free.len());
        let (cpu, began) = (cpu_time()?, Instant::now());
        let (mut begun, mut ended, mut more) = (0, 0, true);
        while more || ended < begun {
            while more && begun - ended < most {
                match pick(begun, began) {
                    Some(page) => self.add(direction, self.pages[page], 0),
                    None => more = false,
                }
                begun += usize::from(more);
            }
            self.spill.submit(&mut self.jobs);
            std::thread::sleep(LOOK);
            ended += self.take_ended()?;
        }
        let (took, cpu) = (began.elapsed(), cpu_time()? - cpu);
        Ok(Moved::new(begun as u64, self.page_bytes as u64, took, cpu))
    }

    /// Reads as a predictor does, step by step. The disk is others' too and may be slower from one moment to the next, so that what it has to give is
    /// measured before and after each step, which asks for `load` of that.
    pub(super) fn predicted(&mut self, time: Duration, load: f64) -> Result<Predicted, SpillBenchError> {
        let began = Instant::now();
        let mut all = Predicted::default();
        let mut before = [self.read(PROBE)?.pages_per_second, self.read(PROBE)?.pages_per_second];
        while began.elapsed() < time || all.steps == 0 {
            let there = before[0].min(before[1]);
            let step = self.step(load * there)?;
            let after = self.read(PROBE)?.pages_per_second;
            all.add(&step, there <= after);
            before = [before[1], after];
        }
        Ok(all)
    }

    /// One step: every layer hands in the pages of the next one, which are wanted when that begins, so many pages a second.
    fn step(&mut self, pages_per_second: f64) -> Result<Step, SpillBenchError> {
        let batch = (pages_per_second * LAYER.as_secs_f64()).round() as usize;
        let batch = batch.clamp(1, self.free.len());
        let before = self.report();
        let (began, start_ns) = (Instant::now(), now_ns());
        let (mut begun, mut ended) = (0, 0);
        for layer in 0..LAYERS {
            let due = LAYER * layer;
            std::thread::sleep(due.saturating_sub(began.elapsed()));
            ended += self.take_ended()?;
            // A device that is far behind: its pages are late already.
            while self.free.len() < batch {
                std::thread::sleep(LOOK);
                ended += self.take_ended()?;
            }
            let deadline_ns = start_ns + (due + LAYER).as_nanos() as u64;
            for _ in 0..batch {
                self.random = next(self.random);
                let page = (self.random % self.pages.len() as u64) as usize;
                self.add(Direction::Read, self.pages[page], deadline_ns);
            }
            begun += batch;
            self.spill.submit(&mut self.jobs);
        }
        while ended < begun {
            std::thread::sleep(LOOK);
            ended += self.take_ended()?;
        }
        let after = self.report();
        Ok(Step { pages: after.reads - before.reads, late: after.late_reads - before.late_reads })
    }

    /// What a page costs the lane that spills it, in nanoseconds of its own processor time: its slot, its job, handing in, and taking the report.
    pub(super) fn lane_cost(&mut self) -> Result<f64, SpillBenchError> {
        let fits = CHUNK_BYTES as usize / self.page_bytes / GROUP_PAGES * GROUP_PAGES;
        let count = COST_PAGES.min(fits).min(self.free.len());
        let mut costs = Vec::with_capacity(COST_ROUNDS);
        for _ in 0..COST_ROUNDS {
            let written = |report: DeviceReport| report.writes + report.write_failures;
            let before = written(self.report());
            let mut assigned: Vec<u32> = Vec::with_capacity(count);
            let began = thread_time()?;
            for at in 0..count {
                let sibling = assigned.last().copied().filter(|_| !at.is_multiple_of(GROUP_PAGES));
                // It fails while the last turn's chunk is being erased.
                let Ok(slot) = self.slots.assign(at, sibling, 0) else { break };
                assigned.push(slot);
                self.add(Direction::Write, slot, 0);
            }
            self.spill.submit(&mut self.jobs);
            let handed_in = thread_time()? - began;
            // Those that fail are told below.
            while written(self.report()) < before + assigned.len() as u64 {
                std::thread::sleep(LOOK);
            }
            let (began, mut taken) = (thread_time()?, 0);
            while taken < assigned.len() {
                taken += self.take_ended()?;
            }
            let taking = thread_time()? - began;
            let whole = assigned.len() == count;
            for slot in assigned {
                self.slots.release(slot);
            }
            if whole {
                costs.push((handed_in + taking).as_nanos() as f64 / count as f64);
            }
            std::thread::sleep(LOOK);
        }
        Ok(super::median(&costs, |ns| *ns))
    }

    /// Takes what has ended, and its frames back. A page that failed ends the measurement.
    fn take_ended(&mut self) -> Result<usize, PageError> {
        let mut count = 0;
        while let Some(ended) = self.report.pop() {
            ended.result?;
            self.free.push(ended.token as usize);
            count += 1;
        }
        Ok(count)
    }

    /// Adds a job with a free frame; there is one.
    fn add(&mut self, direction: Direction, slot: u32, deadline_ns: u64) {
        let Some(frame) = self.free.pop() else { return };
        self.jobs.push(Job {
            direction,
            slot: self.slots.slot(slot),
            memory: Arc::clone(&self.memory),
            offset: frame * self.page_bytes,
            deadline_ns,
            session: 1,
            token: frame as u64,
            report: Arc::clone(&self.report),
        });
    }
}

/// The next number of a sequence that looks like chance.
fn next(mut state: u64) -> u64 {
    state ^= state << 13;
    state ^= state >> 7;
    state ^ state << 17
}

/// Processor time of this process so far, of all its threads, the kernel's for them among them.
fn cpu_time() -> Result<Duration, nix::Error> {
    let usage = getrusage(UsageWho::RUSAGE_SELF)?;
    let time = |value: nix::sys::time::TimeVal| {
        Duration::from_micros((value.tv_sec() * 1_000_000 + value.tv_usec()) as u64)
    };
    Ok(time(usage.user_time()) + time(usage.system_time()))
}

/// Processor time of this thread so far, to the nanosecond.
fn thread_time() -> Result<Duration, nix::Error> {
    Ok(clock_gettime(ClockId::CLOCK_THREAD_CPUTIME_ID)?.into())
}
