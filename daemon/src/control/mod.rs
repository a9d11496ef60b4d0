//! The control plane's side of a session: handshake, registration, and passing control messages to the lane.
//!
//! Everything here runs on one thread and waits for nobody but its own client and its own lane.

mod asking;
mod claim;
mod door;
mod ended;
mod evict;
mod images;
mod orders;
mod peer;
mod place;
mod prefix;
mod register;
mod rings;
mod socket;
mod surplus;
mod workers;

pub(crate) use images::now_unix;

use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use kvoyant_protocol::control::{Failure, Mode, ToClient, ToDaemon, agreed, encode, features};
use kvoyant_protocol::faults::{self, Point};
use kvoyant_protocol::layout::{Layout, Limits};
use kvoyant_protocol::memory::SharedMapping;
use kvoyant_protocol::packet;
use kvoyant_protocol::wire::Served;
use kvoyant_protocol::{MINOR, VERSION};
use tokio::net::UnixStream;
use tokio::sync::{Notify, Semaphore, oneshot};

use self::asking::{ask, ask_lane, settle};
use self::claim::{Claim, Kept, claim};
pub(crate) use self::door::Door;
pub(crate) use self::ended::Ended;
pub(crate) use self::images::{LABEL_MAX, image_id};
use self::images::{Registered as RegisteredModel, Resume, Suspend};
pub(crate) use self::orders::OrderError;
use self::orders::Orders;
use self::place::Place;
use self::prefix::{Publish, ToAttach};
use self::register::register;
use self::rings::RingFiles;
use self::socket::Socket;
use crate::config::{Config, Loaded};
use crate::device::{Device, Importer};
use crate::keep::Keep;
use crate::keeper::Keeper;
use crate::lane::session::LaneSession;
use crate::lane::spill::SpillTo;
use crate::lane::{Command, Ending, LaneHandle};
use crate::metrics::How;
use crate::prefixes::Prefixes;
use crate::quota::{Access, Account};
use crate::settings::Settings;
use crate::status::{Registry, SessionStatus};
use crate::tiers::nvme::Spill;
use crate::tiers::pool::ExtentPool;

/// How long a client may take for each step of the handshake.
const HANDSHAKE_TIMEOUT: Duration = Duration::from_secs(10);

/// Connections that may be in their handshake at a time: of everybody, and of one user, who could else keep all others out.
const HANDSHAKES_MAX: u32 = 256;
const HANDSHAKES_OF_A_USER: u32 = 64;

/// Largest slab that a session may ask for.
const SLAB_MAX: u64 = 1 << 40;

/// What all sessions share.
#[derive(Debug)]
pub struct Plane {
    settings: Arc<Settings>,
    lanes: Vec<LaneHandle>,
    device: Arc<dyn Device>,
    pool: Arc<ExtentPool>,
    registry: Arc<Registry>,
    spill: Option<Arc<Spill>>,
    keeper: Option<Arc<Keeper>>,
    prefixes: Arc<Prefixes>,
    /// What operators want of sessions.
    orders: Orders,
    boot_id: u64,
    next_session: AtomicU64,
    /// How many sessions have one.
    places: Arc<AtomicU64>,
    /// Whose turn it is to have artifacts read.
    readings: Arc<Semaphore>,
    /// Who may connect.
    access: Arc<Access>,
    /// Where connections are until they are sessions.
    door: Door,
    /// Sessions that outlast their daemons, if any do.
    kept: Option<Kept>,
    /// The connection of a daemon that takes over.
    successor: Mutex<Option<OwnedFd>>,
    takes_over: Notify,
}

impl Plane {
    /// Puts it together.
    #[must_use]
    pub(crate) fn new(
        settings: Arc<Settings>,
        lanes: Vec<LaneHandle>,
        device: Arc<dyn Device>,
        pool: Arc<ExtentPool>,
        registry: Arc<Registry>,
        spill: Option<Arc<Spill>>,
        (keeper, prefixes): (Option<Arc<Keeper>>, Arc<Prefixes>),
    ) -> Self {
        let boot_id = registry.boot_id();
        let places = Arc::default();
        let (next_session, readings) = (AtomicU64::new(1), Arc::new(Semaphore::new(1)));
        let (orders, access) = (Orders::default(), registry.access());
        Self {
            settings,
            lanes,
            device,
            pool,
            registry,
            spill,
            keeper,
            prefixes,
            orders,
            boot_id,
            next_session,
            places,
            readings,
            access,
            door: Door::new(HANDSHAKES_MAX, HANDSHAKES_OF_A_USER),
            kept: None,
            successor: Mutex::default(),
            takes_over: Notify::new(),
        }
    }

    /// Has sessions outlast this daemon, and the next one wait so long for their clients.
    #[must_use]
    pub(crate) fn keeping(self, keep: Option<Arc<Keep>>, patience: Duration) -> Self {
        Self { kept: keep.map(|keep| Kept::new(keep, patience)), ..self }
    }

    /// Waits for a daemon that takes over, and gives its connection.
    pub(crate) async fn successor(&self) -> OwnedFd {
        loop {
            let asked = self.successor.lock().unwrap_or_else(PoisonError::into_inner).take();
            if let Some(socket) = asked {
                return socket;
            }
            self.takes_over.notified().await;
        }
    }

    /// Takes a session apart, and lets go of what it would have left.
    async fn end(&self, session: u64, lane: usize) {
        let (done, gone) = oneshot::channel();
        self.lanes[lane].send(Command::Detach(session, done));
        let _ = gone.await;
        self.registry.remove(session);
        if let Some(kept) = &self.kept {
            kept.keep.forget(session);
        }
    }

    /// The configuration, as it is at this moment.
    pub(crate) fn config(&self) -> Arc<Loaded> {
        self.settings.now()
    }

    /// What changes it.
    pub(crate) fn settings(&self) -> &Arc<Settings> {
        &self.settings
    }

    /// Where pages of a session that registers now go, if they can leave host memory.
    /// What nobody has claimed on disk is nobody's.
    fn settle_disk(&self) {
        if let Some(spill) = &self.spill {
            spill.settle();
        }
    }

    fn spill(&self, config: &Config) -> Option<SpillTo> {
        let spill = Arc::clone(self.spill.as_ref()?);
        Some(SpillTo { spill, host_share: config.host_percent / 100.0 })
    }

    /// Has work on images end soon, for the daemon stops.
    pub(crate) fn hurry(&self) {
        if let Some(keeper) = &self.keeper {
            keeper.hurry();
        }
    }

    /// Who may connect.
    pub(crate) fn access(&self) -> &Access {
        &self.access
    }

    /// Whether what a user publishes for everybody may be believed.
    fn may_publish_for_all(&self, uid: u32) -> bool {
        uid == 0 || uid == nix::unistd::geteuid().as_raw() || self.config().config.publishers.contains(&uid)
    }

    /// What has been published.
    fn prefixes(&self) -> Arc<Prefixes> {
        Arc::clone(&self.prefixes)
    }

    /// Waits until the device is lost, and says why. For ever, where that cannot be.
    pub async fn lost(&self) -> String {
        let Some(mut lost) = self.device.lost() else { return std::future::pending().await };
        loop {
            if let Some(reason) = lost.borrow_and_update().clone() {
                return reason;
            }
            if lost.changed().await.is_err() {
                return std::future::pending().await;
            }
        }
    }
}

/// Serves one client until it leaves, breaks the protocol, or the daemon stops.
pub async fn serve_session(plane: Arc<Plane>, socket: UnixStream) {
    let socket = Socket(socket);
    let (pid, uid) = packet::peer(socket.0.as_fd()).unwrap_or((0, u32::MAX));
    let Some(inside) = plane.door.enter(uid) else {
        let failure = Failure::TooManyConnections { max: plane.door.of_a_user() };
        tracing::debug!(pid, uid, "{failure}");
        let _ = packet::send(socket.0.as_fd(), &encode(&ToClient::Failed(failure)), &[]);
        return socket.close(Vec::new(), ());
    };
    // What counts the connection among its user's.
    let counted: Box<dyn Send>;
    let mut result = match greet(&plane, &socket, pid, uid).await {
        Ok(None) => {
            // Another daemon's: this one ends now.
            let socket = socket.0.as_fd().try_clone_to_owned();
            *plane.successor.lock().unwrap_or_else(PoisonError::into_inner) = socket.ok();
            plane.takes_over.notify_one();
            return;
        }
        Ok(Some(session)) => {
            drop(inside);
            let result = match peer::while_there(&session, run(&plane, &socket, &session)).await {
                Err(Ended::HungUp) if session.importer.closed.load(Ordering::Acquire) => Ok(()),
                result => result,
            };
            let Session { status, d2c, _place: place, .. } = session;
            // Its rings go with the lane's side of it: to give their memory back takes longer than others may wait for this thread.
            drop(d2c);
            plane.end(status.id, status.lane).await;
            counted = Box::new(place);
            if faults::fires(Point::Leak) {
                std::mem::forget(socket.0.as_fd().try_clone_to_owned());
            }
            result
        }
        Err(error) => {
            counted = Box::new(inside);
            Err(error)
        }
    };
    let surplus = result.as_mut().err().map(Ended::take_surplus).unwrap_or_default();
    let counted = if surplus.is_empty() && !socket.has_unread() {
        // Nothing of it is left that would take a while: whoever hears of the end can have the place at once.
        drop(counted);
        None
    } else {
        Some(counted)
    };
    plane.registry.ended(result.as_ref().map_or_else(Ended::how, |()| How::Left));
    match result {
        Ok(()) | Err(Ended::HungUp) => tracing::info!(pid, uid, "session ended"),
        // A client asks for its driver only when it is told that it needs one.
        Err(Ended::Refused(failure @ Failure::Device(_))) => {
            tracing::info!(pid, uid, "{failure}");
            let _ = packet::send(socket.0.as_fd(), &encode(&ToClient::Failed(failure)), &[]);
        }
        Err(error) => {
            tracing::warn!(pid, uid, "session ended: {error}");
            let failure = match error {
                Ended::Refused(failure) => failure,
                other => Failure::Protocol(other.to_string()),
            };
            // It may be gone, or not read: this is a courtesy.
            let bytes = encode(&ToClient::Failed(failure));
            let _ = packet::send(socket.0.as_fd(), &bytes, &[]);
        }
    }
    socket.close(surplus, counted);
}

struct Session {
    status: Arc<SessionStatus>,
    ending: Arc<Ending>,
    sequences_max: u32,
    layout: Layout,
    d2c: Arc<SharedMapping>,
    /// Abilities that the client and the daemon have in common.
    features: u64,
    importer: Arc<Importer>,
    account: Arc<Account>,
    /// What it has registered.
    registered: OnceLock<RegisteredModel>,
    /// What its client proves itself by to the next daemon, if it is to outlast this one.
    token: Option<[u64; 2]>,
    /// Its place among `max_sessions`, and those of its user.
    _place: Place,
}

/// Runs what may take a while beside the control thread, which serves everybody.
async fn beside<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, Ended> + Send + 'static,
) -> Result<T, Ended> {
    let done = tokio::task::spawn_blocking(work).await;
    done.unwrap_or_else(|error| Err(Ended::Failed(format!("the daemon failed: {error}"))))
}

async fn step<T>(future: impl Future<Output = Result<T, Ended>>) -> Result<T, Ended> {
    tokio::time::timeout(HANDSHAKE_TIMEOUT, future).await.unwrap_or(Err(Ended::TooSlow))
}

/// What a client says first. `None`: it is a daemon that takes over.
async fn greet(plane: &Plane, socket: &Socket, pid: i32, uid: u32) -> Result<Option<Session>, Ended> {
    let (message, _) = step(socket.receive()).await?;
    match message {
        ToDaemon::Hello { features, name, limits, minor } => {
            handshake(plane, socket, (pid, uid), (features, name, limits, minor)).await.map(Some)
        }
        ToDaemon::Claim { session, token, extents } => {
            claim(plane, socket, (pid, uid), Claim { session, token, extents }).await.map(Some)
        }
        ToDaemon::Takeover if uid != 0 && uid != nix::unistd::geteuid().as_raw() => {
            Err(Ended::Refused(Failure::NotAllowed { uid }))
        }
        ToDaemon::Takeover if plane.kept.is_none() => {
            let reason = "it keeps no sessions: start it with keep_sessions = \"on\"";
            Err(Ended::Refused(Failure::NotReady(reason.into())))
        }
        ToDaemon::Takeover => Ok(None),
        _ => Err(Ended::Protocol("the first message must be a hello".into())),
    }
}

async fn handshake(
    plane: &Plane,
    socket: &Socket,
    (pid, uid): (i32, u32),
    (theirs, name, limits, minor): (u64, String, Limits, u16),
) -> Result<Session, Ended> {
    if !plane.access.admits(socket.0.as_fd(), uid) {
        return Err(Ended::Refused(Failure::NotAllowed { uid }));
    }
    if plane.registry.is_draining() {
        let failure = Failure::Draining;
        let known = agreed(minor) >= 1;
        return Err(Ended::Refused(if known { failure } else { Failure::Internal(failure.to_string()) }));
    }
    let wanted = plane.device.features();
    let kept = if plane.kept.is_some() && agreed(minor) >= 1 { features::KEPT } else { 0 };
    let counted = if agreed(minor) >= 2 { features::GENERATION } else { 0 };
    let common = theirs & (wanted | features::DOORBELLS | kept | counted);
    if common & wanted == 0 {
        let failure = match plane.device.mode() {
            Mode::Device => Failure::Device(format!(
                "{} is a GPU, and the client has no CUDA driver that it could open its memory with",
                plane.device.name()
            )),
            _ => Failure::Protocol(format!(
                "the client cannot read answers of this device (features {wanted:#x})"
            )),
        };
        return Err(Ended::Refused(failure));
    }
    let process = peer::process(socket)?;
    let layout = Layout::new(limits).map_err(|error| Ended::Protocol(error.to_string()))?;
    let account = plane.pool.budget().ledger().account(uid);
    let place = Place::take(plane, &account, layout.c2d_bytes + layout.d2c_bytes).map_err(|failure| {
        account.note(&failure);
        Ended::Refused(failure)
    })?;
    let served = Served { boot_id: plane.boot_id, generation: 0 };
    let rings = RingFiles::make(layout, served).await?;
    let id = plane.next_session.fetch_add(1, Ordering::Relaxed);
    let welcome =
        ToClient::Welcome { features: common, session: id, boot_id: plane.boot_id, limits, minor: MINOR };
    socket.send(&welcome, &rings.fds()?).await?;
    let (message, _) = step(socket.receive()).await?;
    if message != ToDaemon::Mapped {
        return Err(Ended::Protocol(
            "after the welcome, the client must say that it has mapped its memory".into(),
        ));
    }
    rings.freeze()?;
    let token = if common & features::KEPT == 0 { None } else { Some(claim::token()?) };
    let lane = (id % plane.lanes.len() as u64) as usize;
    let name = printable(&name);
    let status = Arc::new(SessionStatus::new(id, name, pid, uid, lane));
    let session = LaneSession::new(
        id,
        Arc::clone(&status),
        layout,
        rings.c2d,
        Arc::clone(&rings.d2c),
        served,
        Arc::clone(&account),
    );
    let ending = Arc::new(Ending::default());
    plane.lanes[lane].send(Command::Attach(Box::new(session), Arc::clone(&ending)));
    plane.registry.add(Arc::clone(&status));
    let protocol = format!("{VERSION}.{}", agreed(minor));
    tracing::info!(session = id, pid, uid, client = status.client, protocol, "session began");
    let importer = Arc::new(Importer { process, closed: AtomicBool::new(false) });
    let (features, sequences_max) = (common, limits.sequences_max);
    let session = Session {
        status,
        ending,
        sequences_max,
        layout,
        d2c: rings.d2c,
        features,
        importer,
        account,
        registered: OnceLock::new(),
        token,
        _place: place,
    };
    match socket.send(&ToClient::Sealed, &[]).await {
        Ok(()) => Ok(session),
        Err(error) => {
            plane.end(id, lane).await;
            Err(error)
        }
    }
}

async fn run(plane: &Plane, socket: &Socket, session: &Session) -> Result<(), Ended> {
    let (mut registered, mut left) = (session.registered.get().is_some(), false);
    let mut inbox = plane.orders.open(session.status.id);
    loop {
        let (message, fds) = tokio::select! {
            received = socket.receive() => received?,
            order = inbox.next() => {
                orders::serve(plane, session, order).await?;
                continue;
            }
            over = session.ending.ended() => return Err(over.into()),
            reason = plane.lost() => return Err(Ended::Refused(Failure::DeviceLost(reason))),
        };
        let lane = &plane.lanes[session.status.lane];
        let (answer, answered) = oneshot::channel();
        match message {
            _ if left => return Err(Ended::Protocol("a message came after the goodbye".into())),
            ToDaemon::Hello { .. } | ToDaemon::Mapped | ToDaemon::Claim { .. } | ToDaemon::Takeover => {
                return Err(Ended::Protocol("the handshake is over".into()));
            }
            ToDaemon::Goodbye => {
                left = true;
                session.importer.closed.store(true, Ordering::Release);
            }
            ToDaemon::Keep => {
                let (Some(token), Some(kept)) = (session.token, &plane.kept) else {
                    return Err(Ended::Protocol("it was not agreed that the session is kept".into()));
                };
                let seconds = kept.patience.as_secs() as u32;
                socket.send(&ToClient::Kept { token, seconds }, &[]).await?;
            }
            ToDaemon::Register(_) if registered => {
                return Err(Ended::Protocol("a session registers one model, once".into()));
            }
            ToDaemon::Register(spec) => match register(plane, session, spec, fds).await {
                Err(Ended::Refused(failure)) => {
                    session.account.note(&failure);
                    socket.send(&ToClient::Failed(failure), &[]).await?;
                }
                Err(ended) => return Err(ended),
                Ok((model, keeping, message, slab)) => {
                    registered = true;
                    lane.send(Command::Register(session.status.id, model, keeping, answer));
                    answered.await.map_err(|_| Ended::Protocol("the session has ended".into()))?;
                    socket.send(&message, &slab).await?;
                }
            },
            ToDaemon::Suspend { sequence, image, overwrite, label } => {
                let asked = Suspend { sequence, image, overwrite, label };
                let message = images::answer(session, images::suspend(plane, socket, session, asked).await)?;
                settle(plane, session, Some(&message)).await?;
                socket.send(&message, &[]).await?;
            }
            ToDaemon::Publish { sequence, tokens, shared } => {
                let asked = Publish { sequence, tokens, shared, fds };
                let message = images::answer(session, prefix::publish(plane, session, asked).await)?;
                settle(plane, session, Some(&message)).await?;
                socket.send(&message, &[]).await?;
            }
            ToDaemon::Attach { method, by, tokens } => {
                let asked = ToAttach { method, by, tokens, fds };
                let message = images::answer(session, prefix::attach(plane, socket, session, asked).await)?;
                settle(plane, session, Some(&message)).await?;
                socket.send(&message, &[]).await?;
            }
            ToDaemon::Resume { image, method, by } => {
                let asked = Resume { image, method, by };
                let message = images::answer(session, images::resume(plane, socket, session, asked).await)?;
                settle(plane, session, Some(&message)).await?;
                socket.send(&message, &[]).await?;
            }
            message => {
                let reply = ask(plane, socket, session, message).await?;
                session.note(&reply.message);
                settle(plane, session, Some(&reply.message)).await?;
                socket.reply(reply).await?;
            }
        }
    }
}

/// A name that a peer gave, fit for logs and terminals.
fn printable(name: &str) -> String {
    name.chars().filter(|c| !c.is_control()).take(64).collect()
}
