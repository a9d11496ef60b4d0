//! Connecting, the handshake, and control messages.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use kvoyant_kernels::RowLayout;
use kvoyant_kernels::quantise::Format;
use kvoyant_protocol::control::{Failure, ModelSpec, ToClient, ToDaemon, agreed, decode, encode, features};
use kvoyant_protocol::device::SlabRef;
use kvoyant_protocol::graph::GraphLayout;
use kvoyant_protocol::layout::{Layout, Limits, PageGeometry};
use kvoyant_protocol::memory::{Memfd, Seals};
use kvoyant_protocol::packet;
use kvoyant_protocol::{EXTENT_BYTES, MINOR, VERSION};
use nix::poll::{PollFd, PollFlags, PollTimeout, poll};

use crate::cuda::{self, DeviceSession};
use crate::error::Error;
use crate::fallback::Fallback;
use crate::memory::{Geometry, Memory, Slab};
use crate::model::Model;
use crate::rings::Rings;
use crate::turn::{Turn, Turns};

/// How a client connects.
#[derive(Debug, Clone)]
pub struct Options {
    /// A name for the daemon's logs and `kvoyant status`.
    pub name: String,
    /// Sizes of rings and tables.
    pub limits: Limits,
    /// How long a wait polls before it sleeps. Polling costs the core; a wake-up costs microseconds on bare metal
    /// and tens of them in a virtual machine.
    pub spin: Duration,
    /// How long a speculation waits for earlier answers to be dropped when all tickets are in use.
    pub ticket_timeout: Duration,
    /// How long to wait for the answer to a control message.
    pub control_timeout: Duration,
    /// What stands in for an answer that is late ([`Pending::or_late`](crate::Pending::or_late)).
    pub fallback: Fallback,
    /// How long after it was asked for an answer is late, where the fallback is not to wait for it.
    pub late_after: Duration,
}

impl Default for Options {
    fn default() -> Self {
        let cores = std::thread::available_parallelism().map_or(1, usize::from);
        Self {
            name: std::env::args().next().unwrap_or_default().rsplit('/').next().unwrap_or_default().into(),
            limits: Limits::default(),
            spin: Duration::from_micros(if cores >= 8 { 200 } else { 10 }),
            ticket_timeout: Duration::from_secs(1),
            control_timeout: Duration::from_secs(30),
            fallback: Fallback::Wait,
            late_after: Duration::from_millis(100),
        }
    }
}

/// A message and what came with it.
struct Received {
    message: ToClient,
    fds: Vec<OwnedFd>,
}

/// The control socket: one request at a time.
#[derive(Debug)]
pub(crate) struct Control {
    /// Its sends and receives are given up after `timeout` by the kernel itself.
    socket: OwnedFd,
    turns: Turns,
    /// For looking at the socket without waiting for its turn.
    watch: OwnedFd,
    timeout: Duration,
    /// Set when an answer did not come as it should: the next one on the socket might be its, so there is no next.
    broken: AtomicBool,
}

impl Control {
    /// How long control messages, and requests that find the ring full, may take.
    pub(crate) fn timeout(&self) -> Duration {
        self.timeout
    }

    /// Marks the connection as unusable after anything but an answer.
    fn settle<T>(&self, result: Result<T, Error>) -> Result<T, Error> {
        if !matches!(result, Ok(_) | Err(Error::Failed(_))) {
            self.broken.store(true, Ordering::Relaxed);
        }
        result
    }

    /// Waits for this thread's turn at the socket.
    fn turn(&self, timeout: Duration) -> Result<Turn<'_>, Error> {
        self.turns.take(timeout).ok_or(Error::Deadline { ticket: 0, waited: timeout })
    }

    fn send(&self, socket: BorrowedFd<'_>, message: &ToDaemon, fds: &[BorrowedFd<'_>]) -> Result<(), Error> {
        if self.broken.load(Ordering::Relaxed) {
            return Err(Error::DaemonGone);
        }
        let since = Instant::now();
        packet::send(socket, &encode(message), fds).map_err(|error| match error.kind() {
            std::io::ErrorKind::BrokenPipe | std::io::ErrorKind::ConnectionReset => Error::DaemonGone,
            std::io::ErrorKind::WouldBlock => Error::Deadline { ticket: 0, waited: since.elapsed() },
            _ => Error::Io(error),
        })
    }

    fn receive(&self, socket: BorrowedFd<'_>, timeout: Duration) -> Result<Received, Error> {
        let since = Instant::now();
        let mut fds = [PollFd::new(socket, PollFlags::POLLIN)];
        loop {
            let waited = since.elapsed();
            let left = timeout.saturating_sub(waited);
            // In whole milliseconds, the last of which counts.
            let pause = PollTimeout::try_from(left.as_nanos().div_ceil(1_000_000) as i128);
            match poll(&mut fds, pause.unwrap_or(PollTimeout::MAX)) {
                Ok(0) if left.is_zero() => return Err(Error::Deadline { ticket: 0, waited }),
                Ok(0) | Err(nix::errno::Errno::EINTR) => {}
                Ok(_) => break,
                Err(errno) => return Err(Error::Io(errno.into())),
            }
        }
        let packet = packet::receive(socket).map_err(|error| match error.kind() {
            std::io::ErrorKind::ConnectionReset => Error::DaemonGone,
            std::io::ErrorKind::WouldBlock => Error::Deadline { ticket: 0, waited: since.elapsed() },
            _ => Error::Io(error),
        })?;
        if packet.bytes.is_empty() {
            return Err(Error::DaemonGone);
        }
        match decode(&packet.bytes)? {
            ToClient::Failed(failure) => Err(Error::Failed(failure)),
            message => Ok(Received { message, fds: packet.fds }),
        }
    }

    fn call(&self, message: &ToDaemon, fds: &[BorrowedFd<'_>]) -> Result<Received, Error> {
        let _turn = self.turn(self.timeout)?;
        let socket = self.socket.as_fd();
        // If the daemon has said why it ends the session, that is what the caller should hear.
        if let Err(error) = self.send(socket, message, fds) {
            return Err(self.last_words(socket).unwrap_or(error));
        }
        self.settle(self.receive(socket, self.timeout))
    }

    /// Sends what is not answered. A daemon that has gone need not hear it.
    pub(crate) fn say(&self, message: &ToDaemon) {
        let Ok(_turn) = self.turn(self.timeout) else { return };
        let _ = self.send(self.socket.as_fd(), message, &[]);
    }

    fn last_words(&self, socket: BorrowedFd<'_>) -> Option<Error> {
        match self.receive(socket, Duration::ZERO) {
            Err(error @ Error::Failed(_)) => Some(error),
            _ => None,
        }
    }

    /// Sends a request, takes in new memory, and returns the answer.
    pub(crate) fn request(&self, message: &ToDaemon, memory: &Memory) -> Result<ToClient, Error> {
        self.request_within(message, memory, self.timeout)
    }

    /// As [`Control::request`], with a deadline of its own.
    pub(crate) fn request_within(
        &self,
        message: &ToDaemon,
        memory: &Memory,
        timeout: Duration,
    ) -> Result<ToClient, Error> {
        self.request_with(message, memory, None, timeout)
    }

    /// The same with a file beside the message.
    pub(crate) fn request_with(
        &self,
        message: &ToDaemon,
        memory: &Memory,
        file: Option<&Memfd>,
        timeout: Duration,
    ) -> Result<ToClient, Error> {
        let since = Instant::now();
        let _turn = self.turn(timeout)?;
        let socket = self.socket.as_fd();
        let fds: Vec<_> = file.iter().map(|file| file.as_fd()).collect();
        if let Err(error) = self.send(socket, message, &fds) {
            return Err(self.last_words(socket).unwrap_or(error));
        }
        loop {
            // Of all that comes together, however much memory is announced before the answer.
            let left = timeout.saturating_sub(since.elapsed());
            let Received { message, fds } = self.settle(self.receive(socket, left))?;
            match message {
                ToClient::Memory { kind, first, bytes } => {
                    self.settle(memory.add(kind, first, bytes, fds))?;
                }
                answer => return Ok(answer),
            }
        }
    }

    /// Whether the daemon has hung up; if it said why, that.
    pub(crate) fn gone(&self) -> Option<Error> {
        let mut fds = [PollFd::new(self.watch.as_fd(), PollFlags::POLLIN)];
        let polled = poll(&mut fds, PollTimeout::ZERO);
        let events = fds[0].revents().unwrap_or(PollFlags::empty());
        if !matches!(polled, Ok(1)) || !events.intersects(PollFlags::POLLHUP | PollFlags::POLLERR) {
            return None;
        }
        let _turn = self.turns.take(Duration::ZERO)?;
        Some(self.last_words(self.socket.as_fd()).unwrap_or(Error::DaemonGone))
    }
}

/// A connection to the daemon, without a model yet.
#[derive(Debug)]
pub struct Client {
    control: Control,
    rings: Rings,
    session: u64,
    late: (Fallback, Duration),
    minor: u16,
}

impl Client {
    /// Connects and goes through the handshake.
    ///
    /// The CUDA driver is loaded only if the daemon's device is a GPU, for that is slow, and a process that has a driver
    /// cannot use it after a fork: a daemon that refuses a client without one ([`Failure::Device`]) is asked once more,
    /// with what the driver can do.
    ///
    /// # Errors
    /// [`Error::Connect`] if nobody listens there or we may not; [`Error::Control`] if the daemon is of another
    /// version (it says both); [`Error::Failed`] if it has no room for another session, or a GPU that this process has
    /// no driver for.
    pub fn connect(path: &Path, options: Options) -> Result<Self, Error> {
        let refused = match Self::connect_as(path, options.clone(), features::COMMON) {
            Err(Error::Failed(failure @ Failure::Device(_))) => failure,
            other => return other,
        };
        match cuda::features() {
            0 => Err(Error::Failed(refused)),
            driver => Self::connect_as(path, options, features::COMMON | driver),
        }
    }

    /// Connects as a client with these features.
    fn connect_as(path: &Path, options: Options, features: u64) -> Result<Self, Error> {
        let layout = Layout::new(options.limits)?;
        let socket = packet::connect_within(path, options.control_timeout)
            .map_err(|source| Error::Connect { path: path.to_path_buf(), source })?;
        let watch = socket.try_clone()?;
        let control = Control {
            socket,
            turns: Turns::default(),
            watch,
            timeout: options.control_timeout,
            broken: AtomicBool::new(false),
        };
        let hello = ToDaemon::Hello { features, name: options.name, limits: options.limits, minor: MINOR };
        let Received { message, fds } = control.call(&hello, &[])?;
        let ToClient::Welcome { session, boot_id, limits, minor, .. } = message else {
            return Err(Error::Broken(format!("{message:?} came instead of a welcome")));
        };
        if limits != options.limits {
            return Err(Error::Broken(format!("the daemon changed the limits to {limits:?}")));
        }
        let [c2d, d2c] = <[OwnedFd; 2]>::try_from(fds)
            .map_err(|fds| Error::Broken(format!("a welcome came with {} descriptors", fds.len())))?;
        // Its size is sealed; the daemon forbids further writable mappings once we have ours.
        let c2d = Memfd::from_peer(c2d, layout.c2d_bytes, Seals::size_only())?.map(true)?;
        let d2c = Memfd::from_peer(d2c, layout.d2c_bytes, Seals::frozen_for_readers())?.map_read_only()?;
        match control.call(&ToDaemon::Mapped, &[])?.message {
            ToClient::Sealed => {}
            other => return Err(Error::Broken(format!("{other:?} came instead of the seal"))),
        }
        Ok(Self {
            control,
            rings: Rings::new(
                layout,
                Arc::new(c2d),
                Arc::new(d2c),
                boot_id,
                (options.spin, options.ticket_timeout),
            ),
            session,
            late: (options.fallback, options.late_after),
            minor: agreed(minor),
        })
    }

    /// Version of the protocol that this session speaks, and its minor: the smaller one of both sides.
    #[must_use]
    pub fn protocol(&self) -> (u32, u16) {
        (VERSION, self.minor)
    }

    /// Number of the session, as in `kvoyant status`.
    #[must_use]
    pub fn session(&self) -> u64 {
        self.session
    }

    /// Registers the session's model. `artifacts` are what its methods were calibrated to, as safetensors: at most one of
    /// each kind.
    ///
    /// # Errors
    /// [`Error::Failed`] with [`Failure::BadModel`] or [`Failure::BadMethod`] that say what does not fit.
    pub fn register(self, spec: ModelSpec, artifacts: &[Vec<u8>]) -> Result<Model, Error> {
        let format = Format::from_code(spec.dtype).ok_or_else(|| {
            Error::Failed(Failure::BadModel(format!("storage format {} is not known", spec.dtype)))
        })?;
        let d = spec.head_dim as usize;
        let layout = match spec.latent_values as usize {
            0 => RowLayout::KeyValue { d, format },
            value => RowLayout::Latent { dim: d, value, format },
        };
        let row_bytes = layout
            .row_bytes()
            .ok_or_else(|| Error::Failed(Failure::BadModel(format!("there are no rows {layout}"))))?;
        let mut spec = spec;
        let graph =
            spec.graph.map(|graph| GraphLayout::new(graph, spec.layers, spec.kv_heads)).transpose()?;
        spec.artifacts = artifacts.iter().map(|bytes| bytes.len() as u64).collect();
        let files = artifacts.iter().map(|bytes| artifact_file(bytes)).collect::<Result<Vec<_>, _>>()?;
        let fds: Vec<_> = files.iter().map(AsFd::as_fd).collect();
        let Received { message, fds } = self.control.call(&ToDaemon::Register(spec.clone()), &fds)?;
        let ToClient::Registered { device, mode, page_rows, slab, spills, scarce } = message else {
            return Err(Error::Broken(format!("{message:?} came instead of a registration")));
        };
        let slab = match slab {
            SlabRef::None => Slab::None,
            SlabRef::Host { bytes } => {
                let fd = fds.into_iter().next();
                let fd = fd.ok_or_else(|| Error::Broken("no slab came with the registration".into()))?;
                let file = Memfd::from_peer(fd, bytes as usize, Seals::frozen_for_readers())?;
                Slab::Host(file.map_read_only()?)
            }
            SlabRef::Device(export) => {
                let watch = self.control.watch.try_clone()?;
                let layouts = (self.rings.layout(), graph);
                let session = DeviceSession::open(&export, fds, layouts, self.rings.mappings(), watch)?;
                Slab::Device(session)
            }
        };
        let geometry = Geometry {
            layers: spec.layers as usize,
            query_heads: spec.query_heads as usize,
            kv_heads: spec.kv_heads as usize,
            head_dim: d,
            layout,
            pages: PageGeometry { page_rows: page_rows as usize, row_bytes },
        };
        if !(1..=EXTENT_BYTES).contains(&geometry.pages.page_bytes()) {
            return Err(Error::Broken(format!("the daemon gave pages of {page_rows} rows")));
        }
        let memory = Memory::new(geometry, slab);
        Ok(Model::new(Arc::new(crate::model::Inner {
            control: self.control,
            rings: self.rings,
            late: self.late,
            memory,
            geometry,
            spec,
            device,
            mode,
            spills,
            scarce,
        })))
    }
}

fn artifact_file(bytes: &[u8]) -> Result<Memfd, Error> {
    let file = Memfd::create("kvoyant-artifact", bytes.len())?;
    file.map(false)?.write(0, bytes)?;
    file.seal(Seals::fixed_size())?;
    Ok(file)
}
