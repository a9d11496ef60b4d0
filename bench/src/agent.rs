//! The other process: this same program, which does what it is told over a socket that is its standard input.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use kvoyant_cuda::{Access, Context, ImportedBuffer, Priority};
use kvoyant_daemon::device::cuda::trial::{self, Offer, Taken};
use kvoyant_protocol::memory::{Memfd, Seals};
use kvoyant_protocol::packet;
use nix::sys::socket::{AddressFamily, SockFlag, SockType, socketpair};
use serde::{Deserialize, Serialize};

use crate::burn::Burn;
use crate::mover::Mover;
use crate::pages::{Pages, Pinning};
use crate::run::Stop;

/// How memory goes from one process to the other.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Way {
    Descriptor,
    Handle,
}

impl Way {
    pub(crate) const BOTH: [Self; 2] = [Self::Descriptor, Self::Handle];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Descriptor => "descriptor",
            Self::Handle => "handle",
        }
    }

    /// Memory of this process that goes this way.
    pub(crate) fn offer(self, context: &Context, bytes: usize) -> Result<Offer, Stop> {
        Ok(match self {
            Self::Descriptor => Offer::by_descriptor(context, bytes)?,
            Self::Handle => Offer::by_handle(context, bytes)?,
        })
    }
}

/// What the agent is told; a descriptor may come along.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Task {
    /// Open memory, read all of it, and close it.
    Take(Shared),
    /// Open memory and keep it.
    Hold(Shared),
    /// Make memory for the other side to open, and keep it.
    Offer { way: Way, bytes: usize },
    /// Map memory read-only and write to it nevertheless.
    Trespass(Shared),
    /// Run the memory-bound kernel for so long; with `gather`, gather meanwhile from the memory that comes along.
    Burn { ms: u64, gather: Option<usize> },
    /// Register memory of such pages.
    Pin { bytes: usize, pages: Pages },
}

/// Memory of the other side.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) struct Shared {
    pub(crate) bytes: usize,
    /// Its handle, unless it comes by descriptor.
    pub(crate) handle: Option<Vec<u8>>,
}

/// What the agent answers.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub(crate) enum Reply {
    /// It is there.
    Here,
    /// What it found.
    Taken { us: f64, read_only: bool, exact: bool },
    /// What it offers.
    Offered(Shared),
    /// What the driver said to a write that is not allowed; `None`: nothing.
    Trespassed(Option<String>),
    /// Passes of the kernel, and what was gathered meanwhile.
    Burned { passes: u64, us_per_pass: f64, gathered_gbps: f64 },
    /// How long it took.
    Pinned(Pinning),
    /// It did not work.
    Failed(String),
    /// It cannot be tried.
    Skipped(String),
}

impl From<Taken> for Reply {
    fn from(taken: Taken) -> Self {
        let Taken { opened_in, read_only, exact } = taken;
        Self::Taken { us: opened_in.as_secs_f64() * 1e6, read_only, exact }
    }
}

/// The other process, from this side. It is killed when this is dropped.
#[derive(Debug)]
pub(crate) struct Agent {
    child: Child,
    socket: OwnedFd,
}

impl Agent {
    /// Starts one on a device, and waits until it has a context there.
    pub(crate) fn start(ordinal: u32) -> Result<Self, Stop> {
        let (socket, its) =
            socketpair(AddressFamily::Unix, SockType::SeqPacket, None, SockFlag::SOCK_CLOEXEC)?;
        let child = Command::new(std::env::current_exe()?)
            .args(["--device", &ordinal.to_string(), "--agent"])
            .stdin(Stdio::from(its))
            .stdout(Stdio::null())
            .stderr(Stdio::inherit())
            .spawn()?;
        let agent = Self { child, socket };
        match agent.answer()?.0 {
            Reply::Here => Ok(agent),
            other => Err(unexpected(&other)),
        }
    }

    /// Tells it something, and goes on.
    pub(crate) fn tell(&self, task: &Task, fd: Option<BorrowedFd<'_>>) -> Result<(), Stop> {
        Ok(packet::send(self.socket.as_fd(), &serde_json::to_vec(task)?, fd.as_slice())?)
    }

    /// Waits for its answer.
    pub(crate) fn answer(&self) -> Result<(Reply, Option<OwnedFd>), Stop> {
        let packet = packet::receive(self.socket.as_fd())?;
        if packet.bytes.is_empty() {
            return Err(Stop::Failed("the other process has ended".into()));
        }
        match serde_json::from_slice(&packet.bytes)? {
            Reply::Failed(reason) => Err(Stop::Failed(format!("in the other process: {reason}"))),
            Reply::Skipped(reason) => Err(Stop::Skipped(reason)),
            reply => Ok((reply, packet.fds.into_iter().next())),
        }
    }

    /// Both.
    pub(crate) fn ask(&self, task: &Task, fd: Option<BorrowedFd<'_>>) -> Result<Reply, Stop> {
        self.tell(task, fd)?;
        Ok(self.answer()?.0)
    }

    /// Has it take, or hold, what this side offers.
    pub(crate) fn ask_with(&self, offer: &Offer, task: fn(Shared) -> Task) -> Result<Reply, Stop> {
        let shared = Shared { bytes: offer.bytes(), handle: offer.handle()?.map(Vec::from) };
        let fd = offer.descriptor()?;
        self.ask(&task(shared), fd.as_ref().map(AsFd::as_fd))
    }

    /// Kills it, and waits until it is gone.
    pub(crate) fn kill(mut self) -> Result<(), Stop> {
        self.child.kill()?;
        self.child.wait()?;
        Ok(())
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An answer that does not belong to what was asked.
pub(crate) fn unexpected(reply: &Reply) -> Stop {
    Stop::Failed(format!("the other process answered {reply:?}"))
}

/// Opens memory of the other side.
pub(crate) fn open(
    context: &Context,
    shared: &Shared,
    fd: Option<&OwnedFd>,
    access: Access,
) -> Result<ImportedBuffer, Stop> {
    match (&shared.handle, fd) {
        (Some(handle), _) => Ok(context.open_ipc(&handle_of(handle)?, shared.bytes)?),
        (None, Some(fd)) => Ok(context.import_fd(fd, shared.bytes, access)?),
        (None, None) => Err(Stop::Failed("no descriptor came".into())),
    }
}

/// Opens, reads and closes memory of the other side.
pub(crate) fn take(context: &Context, shared: &Shared, fd: Option<&OwnedFd>) -> Result<Taken, Stop> {
    match (&shared.handle, fd) {
        (Some(handle), _) => Ok(trial::take_handle(context, &handle_of(handle)?, shared.bytes)?),
        (None, Some(fd)) => Ok(trial::take_descriptor(context, fd, shared.bytes)?),
        (None, None) => Err(Stop::Failed("no descriptor came".into())),
    }
}

fn handle_of(bytes: &[u8]) -> Result<[u8; 64], Stop> {
    bytes.try_into().map_err(|_| Stop::Failed(format!("a handle has 64 bytes, and {} came", bytes.len())))
}

/// What the agent keeps.
#[derive(Default)]
struct Kept {
    offers: Vec<Offer>,
    imports: Vec<ImportedBuffer>,
    burn: Option<Burn>,
}

/// The agent's side: obeys until the other side is gone.
pub(crate) fn serve(ordinal: u32) -> Result<(), Stop> {
    let socket = io::stdin();
    let context = kvoyant_cuda::driver()?.context(ordinal)?;
    let say = |reply: &Reply, fd: Option<BorrowedFd<'_>>| -> Result<(), Stop> {
        Ok(packet::send(socket.as_fd(), &serde_json::to_vec(reply)?, fd.as_slice())?)
    };
    say(&Reply::Here, None)?;
    let mut kept = Kept::default();
    loop {
        let packet = packet::receive(socket.as_fd())?;
        if packet.bytes.is_empty() {
            return Ok(());
        }
        let task = serde_json::from_slice(&packet.bytes)?;
        let fd = packet.fds.into_iter().next();
        match work(&context, task, fd, &mut kept) {
            Ok((reply, fd)) => say(&reply, fd.as_ref().map(AsFd::as_fd))?,
            Err(Stop::Failed(reason)) => say(&Reply::Failed(reason), None)?,
            Err(Stop::Skipped(reason)) => say(&Reply::Skipped(reason), None)?,
        }
    }
}

fn work(
    context: &Context,
    task: Task,
    fd: Option<OwnedFd>,
    kept: &mut Kept,
) -> Result<(Reply, Option<OwnedFd>), Stop> {
    let mut back = None;
    let reply = match task {
        Task::Take(shared) => take(context, &shared, fd.as_ref())?.into(),
        Task::Hold(shared) => {
            kept.imports.push(open(context, &shared, fd.as_ref(), Access::Read)?);
            Reply::Here
        }
        Task::Offer { way, bytes } => {
            let offer = way.offer(context, bytes)?;
            let shared = Shared { bytes: offer.bytes(), handle: offer.handle()?.map(Vec::from) };
            back = offer.descriptor()?;
            kept.offers.push(offer);
            Reply::Offered(shared)
        }
        Task::Trespass(shared) => {
            let memory = open(context, &shared, fd.as_ref(), Access::Read)?;
            if !memory.read_only() {
                return Err(Stop::Skipped("the driver maps shared memory writable only".into()));
            }
            let stream = context.stream(Priority::Normal)?;
            // SAFETY: within the mapping; that it must not be written is what is tried, in a process for that.
            let written = unsafe { stream.fill(memory.ptr(), 0, memory.len()) };
            let said = written.and_then(|()| stream.synchronize()).err().map(|error| error.to_string());
            // The context is poisoned if all is well: nothing can be released in it any more.
            std::mem::forget(memory);
            Reply::Trespassed(said)
        }
        Task::Burn { ms, gather } => {
            if kept.burn.is_none() {
                kept.burn = Some(Burn::new(context)?);
            }
            let burn = kept.burn.as_ref().ok_or_else(|| Stop::Failed("there is no kernel".into()))?;
            let time = Duration::from_millis(ms);
            match (gather, fd) {
                (Some(bytes), Some(fd)) => {
                    let memory = Memfd::from_peer(fd, bytes, Seals::size_only())?;
                    let mut mover = Mover::over(context, true, memory.map(true)?)?;
                    beside(burn, &mut mover, time)?
                }
                _ => {
                    let (passes, us_per_pass) = burn.run(time)?;
                    Reply::Burned { passes, us_per_pass, gathered_gbps: 0.0 }
                }
            }
        }
        Task::Pin { bytes, pages } => Reply::Pinned(crate::pages::pin(context, bytes, pages)?),
    };
    Ok((reply, back))
}

/// The kernel on one stream and gathering on another, in one context.
fn beside(burn: &Burn, mover: &mut Mover, time: Duration) -> Result<Reply, Stop> {
    std::thread::scope(|scope| {
        let burning = scope.spawn(|| burn.run(time));
        let (since, mut bytes) = (Instant::now(), 0);
        while since.elapsed() < time {
            bytes += mover.gather_some()?;
        }
        let gathered_gbps = bytes as f64 / since.elapsed().as_secs_f64() / 1e9;
        let (passes, us_per_pass) =
            burning.join().map_err(|_| Stop::Failed("the kernel's thread panicked".into()))??;
        Ok(Reply::Burned { passes, us_per_pass, gathered_gbps })
    })
}
