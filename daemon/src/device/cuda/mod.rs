//! A GPU: slabs in its memory, copies by its engines, answers made known to the clients' own streams.
//!
//! | room | what lives there |
//! |---|---|
//! | `memory` | what sessions may have on the device, and how it goes to clients |
//! | `quarantine` | memory of ended sessions that somebody may still have open |
//! | `pin` | host memory that the device can read |
//! | `records` | residency records of graph mode, written in stream order |
//! | `board` | timeline words, status words and block tables, written in stream order |
//! | `worker` | the thread that makes the driver's calls |
//! | [`engines`], [`cost`] | three ways to copy, and what each costs |
//! | [`rig`], [`measure`], [`store`], [`calibrate`](mod@calibrate) | where the costs come from, and where they are kept |
//! | [`trial`] | what `kvoyant doctor` tries |
//!
//! The daemon exports and the client imports: an engine that dies takes nothing with it. Lanes never call the driver.

mod board;
mod busy;
pub mod calibrate;
pub mod cost;
pub mod engines;
pub mod measure;
mod memory;
mod pin;
mod quarantine;
mod records;
pub mod rig;
pub mod store;
pub mod trial;
mod worker;

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use crossbeam::channel::{Sender, unbounded};
use kvoyant_cuda::{ComputeMode, Context, CudaError, Driver, KernelCache, Module, Priority, Unavailable};
use kvoyant_protocol::control::{Failure, Mode, features};
use kvoyant_protocol::device::{DeviceExport, Signal, SlabRef};
use thiserror::Error;
use tokio::sync::watch;

use self::board::{Board, SignalKind};
use self::engines::Engines;
use self::memory::{Allocation, Budget, Charge, Way, refused};
use self::pin::{CudaPin, Registered};
use self::quarantine::{Held, Quarantine};
use self::records::Records;
use self::worker::{Work, Worker};
use super::{Device, Importer, Slab, SlabError, SlabMemory, SlabRequest, Transfer};
use crate::status::DeviceReport;
use crate::tiers::pin::Pin;

/// Share of the device memory that is free at start that sessions may have, unless the operator says how much.
const SET_ASIDE: f64 = 0.8;

/// What can be chosen about a GPU.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// The driver's number of the GPU.
    pub ordinal: u32,
    /// Device memory of all sessions together, in bytes; 0: four fifths of what is free at start.
    pub device_memory: u64,
    /// Ways to export memory, as bits of [`features`]; 0: descriptors, or handles where the device has none.
    pub exports: u64,
    /// How streams are signalled: `auto`, `timeline64`, `timeline32`, `events`.
    pub signal: String,
    /// Whether the daemon may run its gather kernel: `auto` (only under MPS, where it takes no time slices from the
    /// engines), `on`, `off`.
    pub zerocopy: String,
    /// Folder of calibrations and compiled kernels.
    pub state: PathBuf,
    /// How long the worker polls for more work before it sleeps: a wake-up costs as much as a small copy.
    pub spin: Duration,
}

/// Why a GPU cannot be the daemon's device.
#[derive(Debug, Error)]
pub enum OpenError {
    /// There is no driver to speak of.
    #[error("{0}")]
    Unavailable(#[from] Unavailable),
    /// No GPU has this number.
    #[error("there is no cuda:{ordinal}: the driver shows {found}; see `kvoyant doctor`")]
    Ordinal {
        /// What was asked for.
        ordinal: u32,
        /// What there is, in words.
        found: String,
    },
    /// Nobody, or nobody else, may have a context there.
    #[error(
        "cuda:{ordinal} ({name}) is in compute mode {mode}, and the daemon and every engine need a context of their own: set `nvidia-smi -c 0`, or run them under MPS"
    )]
    ComputeMode {
        /// The device's number.
        ordinal: u32,
        /// Its name.
        name: String,
        /// Its mode.
        mode: &'static str,
    },
    /// It can neither export memory in a way that is allowed here, nor be signalled.
    #[error("cuda:{ordinal} ({name}) cannot {what}; see `kvoyant doctor`")]
    Unable {
        /// The device's number.
        ordinal: u32,
        /// Its name.
        name: String,
        /// What is missing.
        what: &'static str,
    },
    /// The driver refused something.
    #[error(transparent)]
    Cuda(#[from] CudaError),
    /// A thread could not be started.
    #[error("cannot start a thread: {0}")]
    Thread(#[from] std::io::Error),
}

/// What the device, its worker and its slabs share.
#[derive(Debug)]
struct Shared {
    context: Context,
    registered: Arc<Registered>,
    transfers: [AtomicU64; 3],
    spin: Duration,
    lost: watch::Sender<Option<String>>,
}

impl Shared {
    /// The device does not work any more for this process, whose driver state is poisoned.
    fn lose(&self, error: &CudaError) {
        self.lost.send_if_modified(|lost| {
            let first = lost.is_none();
            if first {
                tracing::error!("the device is lost: {error}");
                *lost = Some(error.to_string());
            }
            first
        });
    }

    fn is_lost(&self) -> bool {
        self.lost.borrow().is_some()
    }
}

/// See the module.
#[derive(Debug)]
pub struct CudaDevice {
    name: String,
    shared: Arc<Shared>,
    budget: Arc<Budget>,
    exports: u64,
    signal: SignalKind,
    busy_at_start: u64,
    measured: bool,
    work: Option<Sender<Work>>,
    thread: Option<JoinHandle<()>>,
    /// After the worker, which sends there.
    _quarantine: Quarantine,
}

impl CudaDevice {
    /// Opens a GPU.
    pub fn open(options: &Options) -> Result<Self, OpenError> {
        let driver = kvoyant_cuda::driver()?;
        let ordinal = options.ordinal;
        let devices = driver.devices()?;
        let Some(info) = devices.iter().find(|info| info.ordinal == ordinal) else {
            let found = match devices.len() {
                0 => "no GPU".into(),
                1 => "cuda:0 alone".into(),
                count => format!("cuda:0 to cuda:{}", count - 1),
            };
            return Err(OpenError::Ordinal { ordinal, found });
        };
        let forbidden = |mode| OpenError::ComputeMode { ordinal, name: info.name.clone(), mode };
        match info.compute_mode {
            ComputeMode::Prohibited => return Err(forbidden("prohibited")),
            ComputeMode::ExclusiveProcess if !mps_runs() => return Err(forbidden("exclusive-process")),
            _ => {}
        }
        let unable = |what| OpenError::Unable { ordinal, name: info.name.clone(), what };
        let abilities = info.abilities;
        if !abilities.host_register {
            return Err(unable("read registered host memory, which the arena is"));
        }
        let can = if abilities.posix_fd { features::CUDA_DESCRIPTORS } else { 0 }
            | if abilities.ipc_events { features::CUDA_HANDLES } else { 0 };
        // A handle opens for whoever holds its bytes, and nobody can tell when it has been closed: only where nothing else
        // goes, or where the operator says so.
        let exports = match options.exports {
            0 if can & features::CUDA_DESCRIPTORS != 0 => features::CUDA_DESCRIPTORS,
            0 => can,
            wanted => can & wanted,
        };
        if exports == 0 {
            return Err(unable("export memory to other processes in any way that the configuration allows"));
        }
        let able = |kind: &SignalKind| match kind {
            SignalKind::Timeline64 => abilities.memops_64,
            SignalKind::Timeline32 => abilities.memops_32,
            SignalKind::Events => abilities.ipc_events,
        };
        let wanted = |kind: &SignalKind| {
            matches!(options.signal.as_str(), "" | "auto") || options.signal == kind.name()
        };
        let signal = SignalKind::ALL.into_iter().find(|kind| able(kind) && wanted(kind));
        let signal = signal.ok_or_else(|| {
            unable("signal streams of other processes in any way that the configuration allows")
        })?;
        let context = driver.context(ordinal)?;
        let (free, total) = context.memory()?;
        let gather = gather_kernel(&context, options);
        let identity = store::Identity::new(info, driver.version());
        let measured = store::Calibration::load(&options.state, &identity).is_ok_and(|found| found.is_some());
        let costs = store::costs(&options.state, &identity);
        let engines = Engines::new(&context, gather.as_ref(), costs)?;
        let set_aside = match options.device_memory {
            0 => (free as f64 * SET_ASIDE) as u64,
            bytes => bytes,
        };
        let shared = Arc::new(Shared {
            context,
            registered: Arc::new(Registered::default()),
            transfers: Default::default(),
            spin: options.spin,
            lost: watch::Sender::new(None),
        });
        let quarantine = Quarantine::start()?;
        let worker = Worker::new(Arc::clone(&shared), engines, quarantine.inbox())?;
        let (work, inbox) = unbounded();
        let thread = crate::threads::start(format!("cuda-{ordinal}"), move || {
            let _bomb = crate::lane::Bomb;
            worker.run(&inbox);
        })?;
        tracing::info!(
            device = %format_args!("cuda:{ordinal}"),
            name = info.name,
            driver = %version(driver),
            total_bytes = total,
            busy_bytes = total - free,
            set_aside_bytes = set_aside,
            signal = signal.name(),
            kernels = gather.is_some(),
            "opened; what is busy is this context and whatever else runs there"
        );
        Ok(Self {
            name: format!("cuda:{ordinal}"),
            shared,
            budget: Budget::new(set_aside),
            exports,
            signal,
            busy_at_start: total - free,
            measured,
            work: Some(work),
            thread: Some(thread),
            _quarantine: quarantine,
        })
    }

    /// Hands work to the worker, which only ends with the device.
    fn send(&self, work: Work) {
        if let Some(queue) = &self.work {
            let _ = queue.send(work);
        }
    }
}

impl Drop for CudaDevice {
    fn drop(&mut self) {
        self.work = None;
        if let Some(thread) = self.thread.take() {
            // It cannot have panicked: see `Bomb`.
            let _ = thread.join();
        }
    }
}

/// Ends the process at once. Of a device that hangs, neither streams nor registrations can be given back: whoever tries
/// waits for ever.
pub fn leave(code: i32) -> ! {
    // SAFETY: it runs nothing of ours, and does not return.
    unsafe { nix::libc::_exit(code) }
}

/// Whether NVIDIA's Multi-Process Service serves this process.
#[must_use]
pub fn mps_runs() -> bool {
    let folder =
        std::env::var_os("CUDA_MPS_PIPE_DIRECTORY").map_or_else(|| "/tmp/nvidia-mps".into(), PathBuf::from);
    folder.join("control").exists()
}

/// The gather kernel, where it may run in the daemon's context and can be built.
fn gather_kernel(context: &Context, options: &Options) -> Option<Module> {
    match options.zerocopy.as_str() {
        "off" => return None,
        "on" => {}
        // Without MPS, kernels of two processes take turns on the whole GPU.
        _ if !mps_runs() => return None,
        _ => {}
    }
    let source = kvoyant_kernels::cuda::source("gather")?;
    match KernelCache::new(kernel_folder(&options.state)).module(context, source) {
        Ok(module) => Some(module),
        Err(error) => {
            tracing::warn!("no gather kernel: {error}; going on with the copy engines alone");
            None
        }
    }
}

/// Where compiled kernels are kept below a state folder.
#[must_use]
pub fn kernel_folder(state: &Path) -> PathBuf {
    state.join("kernels")
}

/// The driver's CUDA version in words.
#[must_use]
pub fn version(driver: &Driver) -> String {
    format!("{}.{}", driver.version() / 1000, driver.version() % 1000 / 10)
}

/// One session's memory.
#[derive(Debug)]
struct CudaSlab {
    session: u64,
    uuid: [u8; 16],
    bytes: usize,
    signal: Signal,
    /// Slab, board and in graph mode the records; taken when the session goes.
    memory: Option<(Vec<Allocation>, Charge)>,
    importer: Arc<Importer>,
    /// Whether anybody else can have opened it.
    exported: AtomicBool,
    work: Sender<Work>,
}

impl SlabMemory for CudaSlab {
    fn bytes(&self) -> usize {
        self.bytes
    }

    fn base(&self) -> *mut u8 {
        let address = self.memory.as_ref().and_then(|(all, _)| all.first()).map_or(0, Allocation::ptr);
        std::ptr::without_provenance_mut(address as usize)
    }

    fn is_on_device(&self) -> bool {
        true
    }

    fn export(&self) -> Result<(SlabRef, Vec<OwnedFd>), SlabError> {
        self.exported.store(true, Ordering::Relaxed);
        let mut fds = Vec::new();
        let mut pieces = self.memory.iter().flat_map(|(all, _)| all);
        let mut next = || {
            let Some(piece) = pieces.next() else { return Ok(None) };
            let (export, fd) = piece.export().map_err(|error| refused(&error))?;
            fds.extend(fd);
            Ok::<_, SlabError>(Some(export))
        };
        let (Some(slab), Some(board), records) = (next()?, next()?, next()?) else {
            return Err(SlabError::Refused(Failure::Device("its memory is gone".into())));
        };
        let export = DeviceExport {
            device: self.uuid,
            slab,
            slab_offset: 0,
            slab_bytes: self.bytes as u64,
            board,
            records,
            signal: self.signal.clone(),
        };
        Ok((SlabRef::Device(Box::new(export)), fds))
    }
}

impl Drop for CudaSlab {
    fn drop(&mut self) {
        if let Some((allocations, charge)) = self.memory.take() {
            let importer = if self.exported.load(Ordering::Relaxed) {
                Arc::clone(&self.importer)
            } else {
                // Nobody has heard of it: a registration failed before.
                Arc::new(Importer { process: None, closed: AtomicBool::new(true) })
            };
            let held = Held { allocations, importer, charge, board: None };
            // Without a worker the daemon is ending, and the driver frees everything with the process.
            if let Err(back) = self.work.send(Work::Close(self.session, held))
                && let Work::Close(_, held) = back.0
            {
                held.forget();
            }
        }
    }
}

impl Device for CudaDevice {
    fn name(&self) -> &str {
        &self.name
    }

    fn mode(&self) -> Mode {
        Mode::Device
    }

    fn features(&self) -> u64 {
        self.exports
    }

    fn slab(&self, request: SlabRequest) -> Result<Slab, SlabError> {
        let SlabRequest { session, bytes, records, layout, d2c, features, importer, account } = request;
        if let Some(reason) = self.shared.lost.borrow().clone() {
            return Err(SlabError::Refused(Failure::DeviceLost(reason)));
        }
        let context = &self.shared.context;
        let way = Way::choose(features & self.exports).ok_or_else(|| {
            SlabError::Refused(Failure::Device("no way to share its memory is common to both".into()))
        })?;
        let mut sizes = vec![bytes, layout.board_bytes()];
        if records > 0 {
            sizes.push(usize::try_from(records).unwrap_or(usize::MAX));
        }
        if way == Way::Handle && importer.process.is_none() {
            let reason = "its process cannot be watched, and what it opens by handle could never be freed";
            return Err(SlabError::Refused(Failure::Device(reason.into())));
        }
        let failed = |error: CudaError| {
            if error.is_sticky() {
                self.shared.lose(&error);
            }
            refused(&error)
        };
        let (memory, charge) = memory::allocate(context, &self.budget, way, &sizes, &account, &failed)?;
        let stream = context.stream(Priority::Normal).map_err(failed)?;
        // What another session left there is nobody's business, and a word that was never written must be 0.
        let filled = memory.iter().try_for_each(|allocation| {
            // SAFETY: the whole of an allocation that nobody else knows of yet, and that is not freed before the stream is at rest.
            unsafe { stream.fill(allocation.ptr(), 0, allocation.bytes()) }
        });
        if let Err(error) = stream.synchronize() {
            // Whether anything still writes there nobody can tell.
            memory.into_iter().for_each(std::mem::forget);
            self.shared.lose(&error);
            return Err(refused(&error));
        }
        filled.map_err(failed)?;
        let prepared = (|| {
            let board =
                Board::new(context, &self.shared.registered, self.signal, memory[1].ptr(), layout, &d2c)?;
            Ok((board.signal()?, board))
        })();
        let (signal, board) = prepared.map_err(failed)?;
        let Some(work) = self.work.clone() else {
            return Err(SlabError::Refused(Failure::Device("the daemon is stopping".into())));
        };
        let records = memory.get(2).map(Records::new);
        self.send(Work::Open(session, Box::new(board), records));
        let uuid = context.info().uuid;
        let memory = Some((memory, charge));
        let exported = AtomicBool::new(false);
        Ok(Slab(Arc::new(CudaSlab { session, uuid, bytes, signal, memory, importer, exported, work })))
    }

    fn publishes(&self) -> bool {
        true
    }

    fn has_records(&self) -> bool {
        true
    }

    fn submit(&self, transfer: Transfer) -> Result<(), Transfer> {
        let Some(queue) = &self.work else { return Err(transfer) };
        queue.send(Work::Transfer(Box::new(transfer))).map_err(|back| match back.0 {
            Work::Transfer(transfer) => *transfer,
            _ => unreachable!("what comes back is what was sent"),
        })
    }

    fn pin(&self) -> Option<Box<dyn Pin>> {
        Some(Box::new(CudaPin { shared: Arc::clone(&self.shared) }))
    }

    fn numa_node(&self) -> Option<u32> {
        self.shared.context.info().numa_node
    }

    fn lost(&self) -> Option<watch::Receiver<Option<String>>> {
        Some(self.shared.lost.subscribe())
    }

    fn report(&self) -> Option<DeviceReport> {
        let info = self.shared.context.info();
        let export = match (self.exports & features::CUDA_DESCRIPTORS, self.exports & features::CUDA_HANDLES)
        {
            (0, _) => "handle",
            (_, 0) => "descriptor",
            _ => "descriptor, handle",
        };
        Some(DeviceReport {
            model: info.name.clone(),
            driver: version(self.shared.context.driver()),
            total_bytes: info.total_bytes,
            set_aside_bytes: self.budget.set_aside,
            used_bytes: self.budget.used(),
            quarantined_bytes: self.budget.quarantined(),
            busy_at_start_bytes: self.busy_at_start,
            export: export.into(),
            signal: self.signal.name().into(),
            transfers: std::array::from_fn(|engine| self.shared.transfers[engine].load(Ordering::Relaxed)),
            costs: if self.measured { "measured" } else { "estimated" }.into(),
            lost: self.shared.lost.borrow().clone(),
        })
    }
}
