//! Starting and stopping: the runtime folder, the lock, the sockets, the lanes, the control plane.

use std::io::{self, IsTerminal};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::rc::Rc;
use std::sync::Arc;
use std::time::{Duration, Instant};

use kvoyant_protocol::EXTENT_BYTES;
use kvoyant_protocol::control::Mode;
use kvoyant_protocol::faults::{self, Point};
use nix::sys::socket::SockType;
use thiserror::Error;
use tokio::net::TcpListener;
use tokio::signal::unix::{SignalKind, signal};

use crate::admin::{self, Token, TokenError};
use crate::config::{Config, ConfigError};
use crate::control::{Plane, serve_session};
use crate::device::Device;
use crate::device::DeviceName;
use crate::device::cuda::{CudaDevice, OpenError, leave};
use crate::device::host::HostDevice;
use crate::endpoint::Endpoint;
use crate::keep::{self, takeover};
use crate::keeper::Keeper;
use crate::lane::LaneHandle;
use crate::metrics;
use crate::notify::{self, InheritError, Inherited, Listener, Manager, Pulse, Subject};
use crate::prefixes::Prefixes;
use crate::quota::Ledger;
use crate::settings::{Changes, Settings};
use crate::stats_page::{self, StatsPage};
use crate::status::Registry;
use crate::tiers::budget::ArenaBudget;
use crate::tiers::cgroup::{Limits, TooLarge};
use crate::tiers::host_memory::{HUGE_PAGE_BYTES, HugePages, free_huge_pages};
use crate::tiers::nvme::{Spill, SpillError};
use crate::tiers::pin::{MlockPin, Pin};
use crate::tiers::pool::{ExtentPool, PoolSettings};
use crate::tiers::store::StoreError;

/// Why the daemon could not start or go on.
#[derive(Debug, Error)]
pub enum ServerError {
    /// A folder, lock or socket that cannot be made.
    #[error("cannot {what} {}: {source}; {advice}", path.display())]
    Path {
        /// What was tried.
        what: &'static str,
        /// On which path.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
        /// What to do.
        advice: &'static str,
    },
    /// Another daemon has the socket.
    #[error("another daemon serves {} already; stop it, or give this one another socket with {flag}", path.display())]
    InUse {
        /// The socket.
        path: PathBuf,
        /// The flag that names it.
        flag: &'static str,
    },
    /// The GPU cannot be used.
    #[error("cannot use the device: {0}")]
    Device(#[from] OpenError),
    /// The GPU does not work any more for this process.
    #[error(
        "the device is lost: {0}; sessions were told, and the daemon ends so that its supervisor starts another one"
    )]
    DeviceLost(String),
    /// Threads or the runtime could not be started.
    #[error("cannot start: {0}")]
    Start(io::Error),
    /// Pages could not leave host memory.
    #[error("cannot use the places in `spill`: {0}")]
    Spill(#[from] SpillError),
    /// An address that cannot be listened on.
    #[error("cannot serve metrics at {address}: {source}; choose another address with --monitor")]
    Monitor {
        /// Which.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
    /// A token that cannot be used.
    #[error(transparent)]
    Token(#[from] TokenError),
    /// Images cannot be kept.
    #[error("cannot keep images: {0}")]
    Store(#[from] StoreError),
    /// What the service manager handed over cannot be used.
    #[error(transparent)]
    Inherit(#[from] InheritError),
    /// Another daemon's sessions cannot be had.
    #[error(transparent)]
    Takeover(#[from] takeover::TakeoverError),
    /// Sessions cannot be kept.
    #[error(transparent)]
    Keep(#[from] keep::KeepError),
    /// The arena is larger than what may be had.
    #[error(transparent)]
    TooLarge(#[from] TooLarge),
    /// Something that is named in it is not what it must be.
    #[error(transparent)]
    Config(#[from] ConfigError),
}

/// The part of the arena that published prefixes may take unless somebody says how much, as a divisor.
const PREFIXES_SHARE: u64 = 8;

/// How long files of a daemon that was killed may still be locked.
const PREDECESSOR: Duration = Duration::from_secs(3);

/// Descriptors that the daemon needs beside those of extents.
const OTHER_FDS: u64 = 2048;

/// Descriptors that a daemon needs: of its extents, once more of those of sessions that outlast it, and beside them.
#[must_use]
pub fn open_files(config: &Config, keeps: bool) -> u64 {
    let copies = if keeps { 2 } else { 1 };
    copies * (config.arena.as_u64() / EXTENT_BYTES as u64) + OTHER_FDS
}

/// Raises the limit of open files as far as it goes, and says if the arena's extents could not all be open.
fn raise_open_files(arena_bytes: u64, wanted: u64) {
    use nix::sys::resource::{Resource, getrlimit, setrlimit};
    let Ok((soft, hard)) = getrlimit(Resource::RLIMIT_NOFILE) else { return };
    if soft < wanted {
        let _ = setrlimit(Resource::RLIMIT_NOFILE, wanted.min(hard), hard);
    }
    if hard < wanted {
        tracing::warn!(
            "the limit of open files is {hard} and an arena of {arena_bytes} bytes needs {wanted}; raise it with \
             LimitNOFILE= in the unit or `ulimit -n`"
        );
    }
}

/// How long sessions are given to hear that the device is lost.
const FAREWELL: Duration = Duration::from_millis(300);

/// How long a daemon whose device is lost tries to end in good order.
const LEAVE_AFTER: Duration = Duration::from_secs(5);

impl ServerError {
    /// What the process ends with: 75 ("try again", `EX_TEMPFAIL`) where another start may help, 69 (`EX_UNAVAILABLE`)
    /// where there is no such device, else 1.
    #[must_use]
    pub fn exit_code(&self) -> u8 {
        match self {
            Self::DeviceLost(_) => 75,
            Self::Device(_) => 69,
            _ => 1,
        }
    }
}

/// How extents are made. For the host they are locked if they are to be, and nothing is made ahead of time unless that is
/// asked for; for a GPU they are registered with its driver, all of them ahead of time, near to it.
fn pool_settings(config: &Config, arena_bytes: u64, device: &dyn Device) -> PoolSettings {
    let device_pin = if config.pin { device.pin() } else { None };
    let on_device = device_pin.is_some();
    let lock = || config.pin.then(|| Box::new(MlockPin::new(arena_bytes)) as Box<dyn Pin>);
    PoolSettings {
        ahead_bytes: config.pin_ahead.bytes(arena_bytes, if on_device { arena_bytes } else { 0 }),
        threads: config.pin_threads,
        // Freeing and wiping memory is the kernel's and the memory's work, of which several cores do more.
        returning: std::thread::available_parallelism().map_or(1, usize::from).div_ceil(2).min(4),
        huge_pages: config.huge_pages,
        numa_node: device.numa_node(),
        pin: device_pin.or_else(lock),
        pin_required: on_device,
        ..PoolSettings::unpinned()
    }
}

/// Refuses an arena that the memory limits of this process do not leave room for.
pub fn check_room(config: &Config) -> Result<(), TooLarge> {
    let set_aside = match config.huge_pages {
        HugePages::Off => 0,
        HugePages::Auto | HugePages::Require => free_huge_pages() * HUGE_PAGE_BYTES,
    };
    Limits::default().check(config.arena.as_u64(), set_aside)
}

/// Runs a daemon for a program that has it in itself, until SIGTERM or SIGINT, or until its device is lost. The log is the program's.
///
/// # Errors
/// If it cannot start or go on.
pub fn run(config: &Config) -> Result<(), ServerError> {
    serve(&Arc::new(Settings::of_program(config.clone())), false)
}

/// Runs the daemon until SIGTERM or SIGINT, or until its device is lost; if it takes over, with the sessions of the daemon that serves the
/// control socket now, which ends.
pub(crate) fn serve(settings: &Arc<Settings>, takes_over: bool) -> Result<(), ServerError> {
    let loaded = settings.now();
    let config = &loaded.config;
    check_room(config)?;
    let mut inherited = Inherited::take()?;
    let left = inherited.sessions();
    let keep = keep::choose(config)?.map(Arc::new);
    if takes_over {
        // Whatever can be found wrong before is: from here on there is no way back for the other daemon.
        config.look_around()?;
    }
    let taken = if takes_over { takeover::take_over(&config.socket)? } else { Vec::new() };
    // With its sessions here already, there is nothing left but to wait.
    let predecessor = if takes_over { takeover::PATIENCE } else { PREDECESSOR };
    let claim = |path: &Path, flag, mut given: Option<Listener>| {
        let patient = takes_over && given.is_none();
        patiently(
            predecessor,
            || Endpoint::claim(path, flag, given.take()),
            |error| patient && matches!(error, ServerError::InUse { .. }),
        )
    };
    // The admin socket comes first, so that whoever finds the control socket finds a whole daemon.
    let mut admin_end =
        claim(&config.admin_socket, "--admin-socket", inherited.listener("admin", SockType::Stream)?)?;
    let mut control_end =
        claim(&config.socket, "--socket", inherited.listener("control", SockType::SeqPacket)?)?;
    for name in inherited.names() {
        tracing::warn!("the service manager handed over `{name}`, which nothing here is for");
    }
    drop(inherited);
    let device: Arc<dyn Device> = match config.device_name() {
        DeviceName::Host => Arc::new(
            HostDevice::new(config.mode(), config.copy_threads, config.shape())
                .map_err(ServerError::Start)?,
        ),
        DeviceName::Cuda(ordinal) => Arc::new(CudaDevice::open(&config.cuda(ordinal))?),
    };
    if device.mode() == Mode::Device && !config.pin {
        tracing::warn!(
            "pin = false: extents are not registered with the driver, and every copy goes through staging buffers"
        );
    }
    for doubt in config.doubts() {
        tracing::warn!("{doubt}");
    }
    let arena = config.arena.as_u64() / EXTENT_BYTES as u64 * EXTENT_BYTES as u64;
    raise_open_files(arena, open_files(config, keep.is_some()));
    let spill = config.spill().map(|settings| {
        // What those sessions have on disk is theirs until they are here again.
        let claimed = keep.is_some() && !(left.is_empty() && taken.is_empty());
        patiently(
            predecessor,
            || Spill::start_over(&settings, claimed),
            |error| matches!(error, SpillError::Busy { .. }),
        )
    });
    let spill = spill.transpose()?;
    let disk = spill.as_ref().map_or(0, |spill| spill.report().iter().map(|device| device.total_bytes).sum());
    let ledger = Ledger::new(config.quotas.clone(), config.newcomers_percent.percent(control_end.path()));
    let budget = Arc::new(ArenaBudget::beside_disk(arena, disk).shared_by(ledger));
    let pool = ExtentPool::start(budget, pool_settings(config, arena, &*device));
    let pool = Arc::new(pool.map_err(ServerError::Start)?);
    let lanes: Vec<_> = (0..config.lanes)
        .map(|index| {
            let cpu = config.lane_cpus.get(index).copied();
            LaneHandle::start(index, cpu, Duration::from_micros(config.spin_us), Arc::clone(&device))
        })
        .collect::<Result<_, _>>()
        .map_err(ServerError::Start)?;
    let keeper = match config.store.as_os_str().is_empty() {
        true => None,
        false => Some(Arc::new(patiently(
            predecessor,
            || Keeper::start(&config.store, &config.remote),
            |error| matches!(error, StoreError::Locked { .. }),
        )?)),
    };
    let prefix_bytes = match config.prefixes.as_u64() {
        // Pages of each size are in extents of their own: in one alone, there is place for one size.
        0 => (arena / PREFIXES_SHARE).max((2 * EXTENT_BYTES as u64).min(arena / 2)),
        bytes => bytes.min(arena),
    };
    let prefixes = Prefixes::start(Arc::clone(pool.budget()), prefix_bytes, keeper.clone())?;
    let mut watched: Vec<_> =
        lanes.iter().enumerate().map(|(index, lane)| (format!("lane {index}"), lane.pulse())).collect();
    let control_pulse = Arc::new(Pulse::default());
    watched.push(("the control plane".to_owned(), Arc::clone(&control_pulse)));
    let boot_id = boot_id();
    let mode = match device.mode() {
        Mode::InPlace => "in-place",
        Mode::Slab => "slab",
        Mode::Device => "device",
    };
    let registry = Registry::new(Arc::clone(&pool), Arc::clone(&device), mode.into(), lanes.len(), boot_id);
    let registry = registry.with_stores(spill.clone(), keeper.clone()).with_access(config.access());
    let registry = Arc::new(registry);
    settings.used_by(registry.access(), Arc::clone(pool.budget()), control_end.path().to_path_buf());
    let line = {
        let registry = Arc::clone(&registry);
        Box::new(move || registry.line())
    };
    let link = Arc::clone(&device);
    let disk_of = spill.clone();
    let plane = Plane::new(Arc::clone(settings), lanes, device, pool, registry, spill, (keeper, prefixes));
    let patience = Duration::from_secs(u64::from(config.reattach_seconds));
    let plane = Arc::new(plane.keeping(keep.clone(), patience));
    // Also where this daemon cannot start: what clients have mapped stays as it is for the next one.
    let leaves = Leaves(Arc::clone(&plane));
    if keep.is_none() {
        keep::discard(&left);
    } else {
        plane.restore(left, true);
        plane.restore(taken, false);
    }
    let mut successor = None;
    let manager = Rc::new(Manager::start(Subject { line, watched }).map_err(ServerError::Start)?);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(ServerError::Start)?;
    let ended = runtime.block_on(async {
        let admin = admin_end.stream()?;
        let listener = control_end.packets()?;
        let monitor = match config.monitor_address().ok().flatten() {
            None => None,
            Some(address) => listen(address, takes_over).await?,
        };
        let token = &config.monitor_token;
        let token = if token.as_os_str().is_empty() { None } else { Some(Token::read(token)?) };
        let mut terminate = signal(SignalKind::terminate()).map_err(ServerError::Start)?;
        let mut interrupt = signal(SignalKind::interrupt()).map_err(ServerError::Start)?;
        let mut hangup = signal(SignalKind::hangup()).map_err(ServerError::Start)?;
        // A terminal that is closed ends what was started in it; a service's configuration is read again.
        let in_terminal = io::stderr().is_terminal();
        tracing::info!(
            socket = %control_end.path().display(),
            arena = %config.arena,
            device = config.device,
            mode,
            "ready"
        );
        let sessions = tokio::task::LocalSet::new();
        sessions
            .run_until(async {
                stats_page::sweep();
                // Before anybody can ask how much the daemon holds.
                if config.stats_page {
                    let make = {
                        let (socket, access) = (admin_end.path().to_path_buf(), plane.registry().access());
                        move || StatsPage::create(&socket, boot_id, access.is_open())
                    };
                    let page = make();
                    tokio::task::spawn_local(stats_page::keep(page, make, Arc::clone(plane.registry())));
                }
                tokio::task::spawn_local(admin::serve(admin, Arc::clone(&plane)));
                let waits = Arc::clone(&plane);
                tokio::task::spawn_local(async move { waits.expire().await });
                if let Ok(collector) = metrics::collector(&config.otlp) {
                    tokio::task::spawn_local(metrics::export(collector, Arc::clone(plane.registry())));
                }
                if let Some(listener) = monitor {
                    tokio::task::spawn_local(admin::serve_tcp(listener, Arc::clone(&plane), token));
                }
                if let Some(period) = notify::watchdog() {
                    tokio::task::spawn_local(beat(control_pulse, period / 8));
                }
                if manager.is_there() {
                    let (manager, path) = (Rc::clone(&manager), admin_end.path().to_path_buf());
                    tokio::task::spawn_local(async move {
                        while let Err(reason) = admin::answers(&path).await {
                            tracing::warn!("the admin socket does not answer yet: {reason}");
                            tokio::time::sleep(Duration::from_secs(1)).await;
                        }
                        manager.ready();
                    });
                }
                // From here on nothing keeps this daemon from serving those whose pages these are.
                plane.has_restored();
                loop {
                    tokio::select! {
                        _ = terminate.recv() => break,
                        _ = interrupt.recv() => break,
                        _ = hangup.recv() => {
                            if in_terminal {
                                break;
                            }
                            tokio::task::spawn_local(reload(Arc::clone(settings), Rc::clone(&manager)));
                        }
                        socket = plane.successor() => {
                            tracing::info!("another daemon takes over");
                            successor = Some(socket);
                            break;
                        }
                        reason = plane.lost() => {
                            // The sessions' own tasks tell their clients meanwhile. Going in good order may take for ever.
                            let leaves = crate::threads::start("leave", || {
                                std::thread::sleep(FAREWELL + LEAVE_AFTER);
                                crate::log::flush(crate::log::LAST_LINES);
                                leave(75);
                            });
                            if let Err(error) = leaves {
                                tracing::warn!("nothing bounds how long it takes to end: {error}");
                            }
                            tokio::time::sleep(FAREWELL).await;
                            return Err(ServerError::DeviceLost(reason));
                        }
                        accepted = listener.accept() => match faults::check(Point::Accept).and(accepted) {
                            Ok((socket, _)) => {
                                tokio::task::spawn_local(serve_session(Arc::clone(&plane), socket));
                            }
                            Err(error) => {
                                tracing::warn!("cannot accept a connection: {error}");
                                tokio::time::sleep(Duration::from_millis(50)).await;
                            }
                        },
                    }
                }
                Ok(())
            })
            .await?;
        // Before anything of any session is dropped, one that is just being claimed among them.
        if let (Some(spill), Some(keep)) = (disk_of, &keep)
            && keep.leaves_any(successor.is_some())
        {
            spill.leave();
        }
        tracing::info!("stopping");
        manager.stopping();
        Ok(())
    });
    link.hurry();
    drop(link);
    // Sessions' tasks end with the runtime, and lanes with the plane, once they have written down what their clients were told.
    drop(leaves);
    // The runtime waits for what is at work beside it.
    plane.hurry();
    drop(runtime);
    drop(plane);
    if let (Some(socket), Some(keep)) = (successor, keep)
        && let Err(error) = takeover::hand_over(&keep, &socket)
    {
        tracing::error!("the other daemon gets only a part of the sessions: {error}");
    }
    ended
    // Leaving drops every session's socket, then (with the last reference to the plane) the lanes, which wait for
    // transfers under way, then the device, and at last the sockets' names.
}

/// Has sessions' memory left as it is when this is dropped.
struct Leaves(Arc<Plane>);

impl Drop for Leaves {
    fn drop(&mut self) {
        self.0.leave();
    }
}

/// Tries again for a while what a daemon that has just been killed still holds: the kernel lets go of its files some time after its end.
fn patiently<T, E>(
    patience: Duration,
    mut work: impl FnMut() -> Result<T, E>,
    busy: impl Fn(&E) -> bool,
) -> Result<T, E> {
    let since = Instant::now();
    loop {
        match work() {
            Err(error) if busy(&error) && since.elapsed() < patience => {
                std::thread::sleep(Duration::from_millis(20));
            }
            result => return result,
        }
    }
}

/// Where metrics are had over TCP. Whoever has taken over has sessions to serve: it waits until the daemon before it has let go, and does
/// without if it cannot be had.
async fn listen(address: SocketAddr, takes_over: bool) -> Result<Option<TcpListener>, ServerError> {
    let since = Instant::now();
    loop {
        match TcpListener::bind(address).await {
            Ok(listener) => return Ok(Some(listener)),
            Err(source) if !takes_over => return Err(ServerError::Monitor { address, source }),
            Err(_) if since.elapsed() < PREDECESSOR => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(error) => {
                tracing::error!("no metrics at {address}, only at the admin socket: {error}");
                return Ok(None);
            }
        }
    }
}

/// Reads the configuration again, and says what came of it.
async fn reload(settings: Arc<Settings>, manager: Rc<Manager>) {
    manager.reloading();
    // Files and names of users may be on a network.
    match tokio::task::spawn_blocking(move || settings.reload()).await {
        Ok(Ok(changes)) => tell(&changes),
        Ok(Err(error)) => tracing::error!("the configuration stays as it was: {error}"),
        Err(error) => tracing::error!("the configuration stays as it was, by a defect: {error}"),
    }
    manager.ready();
}

fn tell(changes: &Changes) {
    tracing::info!(changed = changes.made.len(), "the configuration has been read again");
    changes.log();
}

/// Shows that the control plane moves.
async fn beat(pulse: Arc<Pulse>, every: Duration) {
    loop {
        pulse.beat();
        tokio::time::sleep(every).await;
    }
}

fn boot_id() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    // The standard library's hasher keys are random for each process.
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}
