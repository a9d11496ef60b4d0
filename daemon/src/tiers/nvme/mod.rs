//! The spill tier: pages of rows go to slots on disk, and come back straight into the arena's frames.
//!
//! | room | what lives there |
//! |---|---|
//! | `job` | what a lane hands in, and what it gets back |
//! | `slots` | where a session's pages lie: chunks, groups, slots |
//! | `index` | checksums of what was written, and what is under way where |
//! | `free_map` | which chunks are free |
//! | `device`, `superblock`, `recovery` | the file or block device, its first block, what is done with one that is found |
//! | `left` | what one daemon leaves there for the next |
//! | `disk` | what lanes and a device's thread share |
//! | `queue`, `worker` | what waits and in which order; the thread that moves it |
//! | `operation`, `raw` | adjacent pages that go at once; their frames' addresses and checksums |
//! | `engine` | io_uring and its twins |
//! | `stats` | what operators see |
//!
//! Each device has one thread and one ring. A lane hands in jobs and never waits; the thread gives each its checksum,
//! puts it in order, continues what stops short, and reports a page as read only if it is exactly what was written.
//! Everything that goes wrong ends in an error of that page, for which the lane has a fallback.

mod device;
mod disk;
mod engine;
#[cfg(any(test, debug_assertions, feature = "faults"))]
mod faulty;
mod free_map;
mod index;
mod job;
mod left;
#[cfg(test)]
mod noop;
mod operation;
mod psync;
mod queue;
mod raw;
mod recovery;
mod slots;
mod stats;
mod superblock;
mod uring;
mod worker;

use std::io;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use kvoyant_protocol::futex::now_ns;
use kvoyant_protocol::memory::SharedMapping;
use thiserror::Error;

use self::device::Area;
use self::disk::{Disk, Message};
use self::engine::{Engine, Make, Setup};
use self::operation::Queued;
use self::worker::{Depths, Worker};
use crate::lane::Bomb;

pub use self::job::{Direction, Ended, Job, PageError, SpillReport};
pub use self::left::LeftChunk;
pub use self::slots::{GROUP_PAGES, SlotRef, Slots, SpillFull};
pub use self::stats::{DeviceReport, DeviceState, LATENCY_BUCKETS_US, Latency};

/// What a session takes from a device at a time, in bytes.
pub const CHUNK_BYTES: u64 = 16 << 20;

/// Operations in flight on a device, at least and at most.
const DEPTHS: (u32, u32) = (2, 4096);

/// What moves bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum EngineChoice {
    /// io_uring if the system has it, else threads, with a warning.
    #[default]
    Auto,
    /// io_uring or an error.
    Uring,
    /// Threads with preadv and pwritev.
    Psync,
}

/// How the spill tier is to be.
#[derive(Debug, Clone)]
pub struct SpillSettings {
    /// Folders, files or block devices, each of which becomes a device.
    pub paths: Vec<PathBuf>,
    /// Bytes of each, rounded down to chunks; 0 for a block device: all of it.
    pub bytes: u64,
    /// What moves bytes.
    pub engine: EngineChoice,
    /// Operations in flight on each device.
    pub depth: u32,
    /// The most writes among them while reads wait or are in flight.
    pub write_depth: u32,
    /// Has a kernel thread take submissions: fewer system calls, at a core's cost while there is work.
    pub sq_poll: bool,
    /// Polls for completions instead of waiting for interrupts, where the device has queues for it.
    pub io_poll: bool,
}

impl Default for SpillSettings {
    fn default() -> Self {
        Self {
            paths: Vec::new(),
            bytes: 0,
            engine: EngineChoice::Auto,
            depth: 128,
            write_depth: 16,
            sq_poll: false,
            io_poll: false,
        }
    }
}

/// Why there is no spill tier.
#[derive(Debug, Error)]
pub enum SpillError {
    /// No place for it.
    #[error("the spill tier needs at least one folder, file or block device")]
    NoPaths,
    /// Somebody else has it.
    #[error("the spill area {} is in use, by another daemon or as a file system: give each its own", .path.display())]
    Busy {
        /// The file or device.
        path: PathBuf,
    },
    /// It holds what is not ours.
    #[error(
        "{} is no spill area: {what}. Nothing was changed. Name another place, or remove it (a file: rm; a block device: \
         wipefs -a, or blkdiscard)", .path.display()
    )]
    Foreign {
        /// The file or device.
        path: PathBuf,
        /// What is there.
        what: &'static str,
    },
    /// The file system has not so much.
    #[error(
        "the spill area {} is to have {wanted} bytes and its file system has {free} free: ask for less, or make room",
        .path.display()
    )]
    NoSpace {
        /// The file.
        path: PathBuf,
        /// Bytes that it would need.
        wanted: u64,
        /// Bytes that there are.
        free: u64,
    },
    /// Not even one chunk.
    #[error("the spill area {} would have {bytes} bytes; the least is {CHUNK_BYTES}", .path.display())]
    TooSmall {
        /// The file or device.
        path: PathBuf,
        /// Bytes that it would have.
        bytes: u64,
    },
    /// Neither a file nor a block device.
    #[error("{} is neither a folder, nor a regular file, nor a block device", .path.display())]
    Unusable {
        /// What was named.
        path: PathBuf,
    },
    /// The system refused.
    #[error("cannot {what} the spill area {}: {source}", .path.display())]
    Io {
        /// The file or device.
        path: PathBuf,
        /// What was tried.
        what: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// What is to move bytes cannot.
    #[error("cannot drive the spill area {} with {engine}: {source}; the engine psync works everywhere", .path.display())]
    Engine {
        /// The file or device.
        path: PathBuf,
        /// The engine.
        engine: &'static str,
        /// What the system said.
        source: io::Error,
    },
}

/// See the module. Dropping it waits for what is in flight, ends the rest with [`PageError::Failed`], and removes the
/// areas, unless they are [left](Spill::leave).
#[derive(Debug)]
pub struct Spill {
    disks: Arc<[Arc<Disk>]>,
    threads: Vec<JoinHandle<()>>,
}

impl Spill {
    /// Opens the areas and starts a thread for each.
    ///
    /// # Errors
    /// See [`SpillError`]. Nothing is left behind then.
    pub fn start(settings: &SpillSettings) -> Result<Arc<Self>, SpillError> {
        Self::start_over(settings, false)
    }

    /// The same; if what another daemon has left there is yet to be claimed ([`Slots::claim`]), it stays until [`Spill::settle`].
    ///
    /// # Errors
    /// As [`Spill::start`].
    pub fn start_over(settings: &SpillSettings, claimed: bool) -> Result<Arc<Self>, SpillError> {
        let (name, make) = match settings.engine {
            EngineChoice::Psync => ("psync", psync()),
            EngineChoice::Uring => ("io_uring", uring()),
            EngineChoice::Auto => ("psync", or_threads(uring())),
        };
        Self::start_with(settings, claimed, name, &make)
    }

    /// As [`Spill::start_over`], with an engine of one's own.
    fn start_with(
        settings: &SpillSettings,
        claimed: bool,
        name: &'static str,
        make: &Make,
    ) -> Result<Arc<Self>, SpillError> {
        if settings.paths.is_empty() {
            return Err(SpillError::NoPaths);
        }
        let depth = settings.depth.clamp(DEPTHS.0, DEPTHS.1);
        let depths = Depths { all: depth, writes: settings.write_depth.clamp(1, depth) };
        let mut spill = Self { disks: Arc::new([]), threads: Vec::new() };
        for (number, path) in settings.paths.iter().enumerate() {
            let disk = Arc::new(Disk::new(number, Area::open(path, settings.bytes, claimed)?));
            // From here on dropping it leaves nothing behind.
            spill.disks = spill.disks.iter().cloned().chain([Arc::clone(&disk)]).collect();
            let setup = Setup {
                file: Arc::clone(&disk.area.file),
                // One for what erases.
                capacity: depth + 1,
                sq_poll: settings.sq_poll,
                io_poll: settings.io_poll,
            };
            let thread = launch(&disk, setup, depths, make).map_err(|source| SpillError::Engine {
                path: disk.area.path.clone(),
                engine: name,
                source,
            })?;
            spill.threads.push(thread);
        }
        Ok(Arc::new(spill))
    }

    /// Slots for pages of `page_bytes` bytes, a multiple of 4096 and at most a chunk, of one session.
    #[must_use]
    pub fn slots(self: &Arc<Self>, page_bytes: usize) -> Slots {
        Slots::new(Arc::clone(&self.disks), page_bytes)
    }

    /// All have claimed what another daemon had left them: the rest is erased.
    pub fn settle(&self) {
        self.disks.iter().for_each(|disk| disk.settle());
    }

    /// The areas stay, with what is in them, for the next daemon.
    pub fn leave(&self) {
        self.disks.iter().for_each(|disk| disk.leave());
    }

    /// Hands jobs in, all of them. It never blocks, and wakes each device's thread at most once.
    pub fn submit(&self, jobs: &mut Vec<Job>) {
        let since_ns = now_ns();
        // Devices beyond the 64th are woken whether they have got anything or not.
        let mut touched = 0u64;
        for job in jobs.drain(..) {
            let chunk = Arc::clone(&job.slot.chunk);
            if job.direction == Direction::Write {
                chunk.index.announce_write(job.slot.index);
            }
            touched |= 1 << (chunk.disk.number % 64);
            chunk.disk.inbox.push(Message::Move(Queued { job, since_ns }));
        }
        for disk in self.disks.iter().filter(|disk| touched & (1 << (disk.number % 64)) != 0) {
            disk.wake();
        }
    }

    /// Makes memory known to every ring, which saves work for each page moved there. It is done beside what goes on, and
    /// as far as the memlock limit goes.
    pub fn register(&self, memory: &Arc<SharedMapping>) {
        self.tell(|| Message::Register(Arc::clone(memory)));
    }

    /// Undoes [`Spill::register`], before memory is destroyed.
    pub fn forget(&self, memory: &Arc<SharedMapping>) {
        self.tell(|| Message::Forget(Arc::clone(memory)));
    }

    fn tell(&self, message: impl Fn() -> Message) {
        for disk in self.disks.iter() {
            disk.inbox.push(message());
            disk.wake();
        }
    }

    /// What each device has done and how it is.
    #[must_use]
    pub fn report(&self) -> Vec<DeviceReport> {
        self.disks.iter().map(|disk| disk.report()).collect()
    }

    /// Whether no device takes writes any more.
    #[must_use]
    pub fn is_failed(&self) -> bool {
        self.disks.iter().all(|disk| disk.has_failed())
    }
}

impl Drop for Spill {
    fn drop(&mut self) {
        for disk in self.disks.iter() {
            disk.stopping.store(true, Ordering::Release);
            disk.wake();
        }
        for thread in self.threads.drain(..) {
            // It cannot have panicked: see `Bomb`.
            let _ = thread.join();
        }
        for disk in self.disks.iter() {
            disk.close();
        }
    }
}

/// Starts a device's thread and waits until its engine is there.
fn launch(disk: &Arc<Disk>, setup: Setup, depths: Depths, make: &Make) -> io::Result<JoinHandle<()>> {
    let (said, hear) = mpsc::sync_channel(1);
    let (disk, make) = (Arc::clone(disk), Arc::clone(make));
    let thread = crate::threads::start(format!("spill-{}", disk.number), move || {
        let _bomb = Bomb;
        match make(&setup).map(failing) {
            Ok(engine) => {
                let _ = disk.engine.set((engine.name(), engine.waker()));
                // The other side waits for it.
                let _ = said.send(Ok(()));
                Worker::new(disk, engine, depths).run();
            }
            Err(error) => drop(said.send(Err(error))),
        }
    })?;
    let made = hear.recv().unwrap_or_else(|_| Err(io::Error::other("its thread has ended")));
    made.map(|()| thread)
}

/// The engine, failing where the environment of a test build says so.
#[cfg(any(debug_assertions, feature = "faults"))]
fn failing(engine: Box<dyn Engine>) -> Box<dyn Engine> {
    use kvoyant_protocol::faults::{Point, chose};
    if chose(&[Point::SpillRead, Point::SpillTorn, Point::SpillWrite]) {
        Box::new(faulty::Faulty::new(engine, faulty::Plan::default()))
    } else {
        engine
    }
}

/// The engine as it is.
#[cfg(not(any(debug_assertions, feature = "faults")))]
fn failing(engine: Box<dyn Engine>) -> Box<dyn Engine> {
    engine
}

/// Makes rings.
fn uring() -> Make {
    Arc::new(|setup| Ok(Box::new(uring::Uring::new(setup)?) as Box<dyn Engine>))
}

/// Makes threads.
fn psync() -> Make {
    Arc::new(|setup| Ok(Box::new(psync::Psync::new(setup)?) as Box<dyn Engine>))
}

/// Makes threads, and says so, where `make` makes nothing.
fn or_threads(make: Make) -> Make {
    Arc::new(move |setup| match make(setup) {
        Ok(engine) => Ok(engine),
        Err(error) => {
            tracing::warn!(
                "io_uring cannot be used ({error}): spilled pages are moved by threads, at several times the cost (see \
                 kernel.io_uring_disabled, and seccomp in containers)"
            );
            psync()(setup)
        }
    })
}

#[cfg(test)]
mod tests;
