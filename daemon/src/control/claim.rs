//! Sessions that another daemon has left: restored when this one starts, kept for their clients for a while, and claimed by them.

use std::collections::{BTreeMap, HashMap};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use kvoyant_methods::Artifacts;
use kvoyant_protocol::control::{Failure, ToClient, ToDaemon, features};
use kvoyant_protocol::device::SlabRef;
use kvoyant_protocol::layout::{Layout, LimitError};
use kvoyant_protocol::memory::{Memfd, MemoryError};
use kvoyant_protocol::wire::Served;
use thiserror::Error;
use tokio::sync::oneshot;

use super::images::Registered;
use super::place::Place;
use super::register::placement;
use super::{Ended, Plane, RingFiles, SLAB_MAX, Session, Socket, peer, step};
use crate::artifacts;
use crate::device::{Importer, SlabRequest};
use crate::journal::{self, FrameLog, Journal, JournalError, VERSION};
use crate::keep::{Keep, Named, Piece, SEVERAL};
use crate::lane::keeping::{About, HeldExtent, Keeping, Left, Progress, Unfit};
use crate::lane::model::{ModelState, shape_of};
use crate::lane::session::LaneSession;
use crate::lane::{Command, Ending};
use crate::prefixes::Prefixes;
use crate::quota::Account;
use crate::status::SessionStatus;
use crate::tiers::extent::Extent;
use crate::tiers::pool::Refusal;
use crate::tiers::shared::SharedExtent;

/// Why a session that was left cannot go on.
#[derive(Debug, Error)]
enum Lost {
    #[error("of its journal there is only a part")]
    NoJournal,
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error(transparent)]
    Unfit(#[from] Unfit),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("{0}")]
    Memory(#[from] MemoryError),
    #[error("its rings cannot be made: {0}")]
    Limits(#[from] LimitError),
    #[error("host memory for it cannot be had: {0}")]
    Refused(#[from] Refusal),
    #[error("{0}")]
    Ended(#[from] Ended),
    #[error("{0}")]
    Failure(#[from] Failure),
    #[error("a file of it cannot be used: {0}")]
    Io(#[from] std::io::Error),
}

/// A session that waits for its client.
#[derive(Debug)]
struct Waiting {
    about: About,
    progress: Progress,
    answer: Vec<u8>,
    layout: Layout,
    model: Box<ModelState>,
    keeping: Box<Keeping>,
    account: Arc<Account>,
    place: Place,
}

impl Waiting {
    /// How its client knows this daemon from those before.
    fn served(&self, plane: &Plane) -> Served {
        let counted = self.about.features & features::GENERATION != 0;
        let generation = if counted { self.progress.generation.wrapping_add(1) } else { 0 };
        Served { boot_id: plane.boot_id, generation }
    }
}

/// What outlasts a daemon, and who waits.
#[derive(Debug)]
pub(super) struct Kept {
    pub(super) keep: Arc<Keep>,
    waiting: Mutex<HashMap<u64, Waiting>>,
    /// Sessions that a newer daemon has left, which may come back as long.
    newer: Mutex<Vec<u64>>,
    /// How long sessions wait.
    pub(super) patience: Duration,
    /// Until when they wait, once somebody is let in.
    until: OnceLock<Instant>,
}

impl Kept {
    pub(super) fn new(keep: Arc<Keep>, patience: Duration) -> Self {
        let (waiting, newer) = (Mutex::default(), Mutex::default());
        Self { keep, waiting, newer, patience, until: OnceLock::new() }
    }

    fn until(&self) -> Instant {
        *self.until.get_or_init(|| Instant::now() + self.patience)
    }

    fn newer(&self) -> std::sync::MutexGuard<'_, Vec<u64>> {
        self.newer.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn waiting(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Waiting>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Extents of prefixes that were left, each of which several sessions may have.
#[derive(Debug, Default)]
struct Several {
    files: BTreeMap<u64, OwnedFd>,
    adopted: BTreeMap<u64, Arc<SharedExtent>>,
}

impl Several {
    fn of(pieces: Vec<(Piece, OwnedFd)>) -> Self {
        let shared = |(piece, file)| match piece {
            Piece::Shared(number) => Some((number, file)),
            _ => None,
        };
        Self { files: pieces.into_iter().filter_map(shared).collect(), adopted: BTreeMap::new() }
    }

    /// The extent with this file's number.
    fn extent(&mut self, number: u64, prefixes: &Prefixes) -> Result<Arc<SharedExtent>, Lost> {
        if let Some(extent) = self.adopted.get(&number) {
            return Ok(Arc::clone(extent));
        }
        let file = self.files.remove(&number).ok_or(Lost::Missing("an extent of a published prefix"))?;
        let extent = prefixes.adopt(file)?;
        self.adopted.insert(number, Arc::clone(&extent));
        Ok(extent)
    }
}

/// A token that nobody guesses.
pub(super) fn token() -> std::io::Result<[u64; 2]> {
    use std::io::Read;
    let mut bytes = [0; 16];
    std::fs::File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytemuck::cast(bytes))
}

impl Plane {
    /// Makes sessions again that another daemon has left, if this one keeps any; `stored`: the supervisor has these files already. To be
    /// called before anybody is let in.
    pub(crate) fn restore(&self, left: Vec<Named>, stored: bool) {
        let Some(kept) = &self.kept else { return };
        let mut sessions: BTreeMap<u64, Vec<(Piece, OwnedFd)>> = BTreeMap::new();
        for (name, file) in left {
            let known = file.try_clone().and_then(|copy| kept.keep.has(name, copy, stored));
            if let Err(error) = known {
                tracing::warn!("{name} will not outlast this daemon: {error}");
            }
            sessions.entry(name.session).or_default().push((name.piece, file));
        }
        let mut several = Several::of(sessions.remove(&SEVERAL).unwrap_or_default());
        let last = sessions.keys().next_back().copied().unwrap_or(0);
        self.next_session.fetch_max(last + 1, Ordering::Relaxed);
        for (session, pieces) in sessions {
            let is_journal = |(piece, _): &&(Piece, OwnedFd)| matches!(piece, Piece::Journal(_));
            let journals: Vec<_> =
                pieces.iter().filter(is_journal).filter_map(|(_, file)| file.try_clone().ok()).collect();
            match self.restore_one(kept, &mut several, session, pieces) {
                Ok(waiting) => {
                    let (uid, client) = (waiting.about.uid, &waiting.about.client);
                    let sequences = waiting.model.open_sequences();
                    let seconds = kept.patience.as_secs();
                    tracing::info!(session, uid, client, sequences, "waits {seconds} s for its client");
                    kept.waiting().insert(session, waiting);
                }
                Err(Lost::Journal(error @ JournalError::OtherVersion { theirs })) if theirs > VERSION => {
                    tracing::warn!("session {session} cannot go on here: {error}");
                    kept.newer().push(session);
                }
                Err(error) => {
                    tracing::warn!("session {session} cannot go on, and its client begins anew: {error}");
                    // Whoever holds these files longer than they should finds nothing in them: what they name may be another's then.
                    for journal in journals {
                        if let Err(error) = std::fs::File::from(journal).set_len(0) {
                            tracing::warn!("a journal of session {session} cannot be erased: {error}");
                        }
                    }
                    kept.keep.forget(session);
                }
            }
        }
        // Those who can have said what they have; of others it is not known.
        if kept.newer().is_empty() {
            kept.keep.forget(SEVERAL);
        }
    }

    fn restore_one(
        &self,
        kept: &Kept,
        several: &mut Several,
        session: u64,
        pieces: Vec<(Piece, OwnedFd)>,
    ) -> Result<Waiting, Lost> {
        let mut files: BTreeMap<Piece, OwnedFd> = pieces.into_iter().collect();
        let journals = [0, 1].map(|index| files.remove(&Piece::Journal(index)));
        let [Some(first), Some(second)] = journals else { return Err(Lost::NoJournal) };
        let found = journal::read([&first, &second].map(AsFd::as_fd))?;
        if found.session != session {
            return Err(Lost::Missing("its own journal"));
        }
        let (current, number) = (found.current, found.number);
        let left = Left::of(found)?;
        let about = &left.about;
        let layout = Layout::new(about.limits)?;
        let (shape, rows) = shape_of(&about.spec)?;
        let account = self.pool.budget().ledger().account(about.uid);
        let place = Place::take(self, &account, layout.c2d_bytes + layout.d2c_bytes)?;
        let (mut extents, mut shared) = (Vec::new(), Vec::new());
        for held in left.held.extents.iter().flatten() {
            match held {
                HeldExtent::Own(_) => {
                    let file = files.remove(&held.piece()).ok_or(Lost::Missing("an extent"))?;
                    extents.push(Extent::adopt(file)?);
                }
                HeldExtent::Shared(number) => {
                    let extent = several.extent(*number, &self.prefixes)?;
                    // It is handed on as long as this session has it.
                    kept.keep.add(session, held.piece(), extent.fd()?)?;
                    shared.push(extent);
                }
            }
        }
        let artifact =
            |number: &u64| files.remove(&Piece::Artifact(*number)).ok_or(Lost::Missing("an artifact"));
        let artifacts = about.artifacts.iter().map(artifact).collect::<Result<Vec<_>, _>>()?;
        let artifacts = match artifacts.is_empty() {
            true => Artifacts::none(),
            false => artifacts::read(artifacts::files(&about.spec, artifacts)?, &about.spec)?,
        };
        let log = files.remove(&Piece::Frames).ok_or(Lost::Missing("the log of its frames"))?;
        let log = FrameLog::over(log)?;
        let supply = self.pool.adopt(about.uid, extents)?;
        // As large as it was, for what is in it depends on that. The host's slab needs neither rings nor a process.
        let page_bytes = (shape.page_rows * rows.row_bytes().unwrap_or(0)) as u64;
        let slab_bytes = left.held.slab.map_or(0, |slab| u64::from(slab.pages).saturating_mul(page_bytes));
        let slab = SlabRequest {
            session,
            bytes: usize::try_from(slab_bytes.min(SLAB_MAX)).unwrap_or(usize::MAX),
            records: 0,
            layout,
            d2c: Arc::new(Memfd::create("kvoyant-none", 4096)?.map(false)?),
            features: about.features,
            importer: Arc::new(Importer { process: None, closed: AtomicBool::new(false) }),
            account: Arc::clone(&account),
        };
        let mut model = ModelState::new(
            about.spec.clone(),
            &artifacts,
            about.limits.sequences_max,
            supply.empty(),
            &*self.device,
            slab,
            placement(self),
        )?;
        left.fill(&mut model, supply, shared, log)?;
        let journal = Journal::over(session, [first, second], current, number);
        let controls = (left.progress.controls, left.answer.clone());
        let keeping =
            Keeping::over(Arc::clone(&kept.keep), journal, &left.about, controls, left.held.extents.clone());
        Ok(Waiting {
            layout,
            model: Box::new(model),
            keeping: Box::new(keeping),
            account,
            place,
            about: left.about,
            progress: left.progress,
            answer: left.answer,
        })
    }

    /// This daemon ends. What clients have mapped stays as it is: they go on with the next one, or read it alone.
    pub(crate) fn leave(&self) {
        self.pool.leave();
    }

    /// Lets go of sessions whose clients have not come.
    pub(crate) async fn expire(&self) {
        let Some(kept) = &self.kept else { return };
        tokio::time::sleep_until(kept.until().into()).await;
        let late: Vec<_> = kept.waiting().drain().collect();
        let newer = std::mem::take(&mut *kept.newer());
        newer.into_iter().chain([SEVERAL]).for_each(|session| kept.keep.forget(session));
        for (session, mut waiting) in late {
            tracing::warn!(
                session,
                uid = waiting.about.uid,
                "nobody came back for it within {:?}",
                kept.patience
            );
            waiting.keeping.let_go();
            let _ = tokio::task::spawn_blocking(move || drop(waiting)).await;
        }
        self.settle_disk();
    }

    /// All who could claim what another daemon has left on disk have done so, unless it is not known who that is: of a newer daemon's sessions,
    /// which may go on with that one as long as sessions wait.
    pub(crate) fn has_restored(&self) {
        if self.kept.as_ref().is_none_or(|kept| kept.newer().is_empty()) {
            self.settle_disk();
        }
    }
}

/// What a client claims.
pub(super) struct Claim {
    pub(super) session: u64,
    pub(super) token: [u64; 2],
    pub(super) extents: u32,
}

/// Gives a session back to its client.
pub(super) async fn claim(
    plane: &Plane,
    socket: &Socket,
    (pid, uid): (i32, u32),
    claim: Claim,
) -> Result<Session, Ended> {
    let Claim { session, token, extents } = claim;
    let refused = || Ended::Refused(Failure::NotKept { session });
    if !plane.access.admits(socket.0.as_fd(), uid) {
        return Err(Ended::Refused(Failure::NotAllowed { uid }));
    }
    let kept = plane.kept.as_ref().ok_or_else(refused)?;
    let process = peer::process(socket)?;
    let mut waiting = {
        let mut all = kept.waiting();
        let its = all.get(&session).is_some_and(|waiting| {
            // As long as whatever was guessed.
            let differ = (waiting.about.token[0] ^ token[0]) | (waiting.about.token[1] ^ token[1]);
            waiting.about.uid == uid && differ == 0
        });
        if its { all.remove(&session).ok_or_else(refused)? } else { return Err(refused()) }
    };
    let greeted = greet(plane, socket, &mut waiting, extents as usize).await;
    let rings = match greeted {
        Ok(rings) => rings,
        Err(error) => {
            // It may come again.
            if Instant::now() < kept.until() {
                kept.waiting().insert(session, waiting);
            } else {
                waiting.keeping.let_go();
                let _ = tokio::task::spawn_blocking(move || drop(waiting)).await;
            }
            return Err(error);
        }
    };
    attach(plane, socket, (pid, process), waiting, rings).await
}

/// As far as a client can still go away, and come again.
async fn greet(
    plane: &Plane,
    socket: &Socket,
    waiting: &mut Waiting,
    extents: usize,
) -> Result<RingFiles, Ended> {
    if !waiting.model.has_announced(extents) {
        let have = waiting.model.arena.extents();
        return Err(Ended::Protocol(format!("a claim with {extents} extents of a session that has {have}")));
    }
    let rings = RingFiles::make(waiting.layout, waiting.served(plane)).await?;
    let (slab, slab_fds) = match &waiting.model.slab {
        None => (SlabRef::None, Vec::new()),
        Some(slab) => slab.slab.0.export().map_err(|error| Ended::Refused(error.into()))?,
    };
    let message = ToClient::Claimed {
        boot_id: plane.boot_id,
        requests: waiting.progress.requests,
        tickets: waiting.progress.tickets,
        controls: waiting.progress.controls,
        answered: !waiting.answer.is_empty(),
        slab,
    };
    let mut fds = Vec::from(rings.fds()?);
    fds.extend(slab_fds);
    step(socket.send(&message, &fds)).await?;
    let (message, _) = step(socket.receive()).await?;
    if message != ToDaemon::Mapped {
        return Err(Ended::Protocol(
            "after a claim, the client must say that it has mapped its memory".into(),
        ));
    }
    rings.freeze()?;
    Ok(rings)
}

async fn attach(
    plane: &Plane,
    socket: &Socket,
    (pid, process): (i32, Option<OwnedFd>),
    waiting: Waiting,
    rings: RingFiles,
) -> Result<Session, Ended> {
    let served = waiting.served(plane);
    let Waiting { about, progress, answer, layout, model, keeping, account, place } = waiting;
    let id = about.session;
    let lane = (id % plane.lanes.len() as u64) as usize;
    let status = Arc::new(SessionStatus::new(id, about.client, pid, about.uid, lane));
    if let Ok(mut name) = status.model.lock() {
        name.clone_from(&about.spec.name);
    }
    let registered = Registered {
        key: model.model_key(),
        rope: model.spec.rope.clone(),
        methods: model.spec.methods.clone(),
    };
    let d2c = Arc::clone(&rings.d2c);
    let session = LaneSession::new(
        id,
        Arc::clone(&status),
        layout,
        rings.c2d,
        Arc::clone(&d2c),
        served,
        Arc::clone(&account),
    );
    let session = session.going_on(&progress, model);
    let ending = Arc::new(Ending::default());
    plane.lanes[lane].send(Command::Attach(Box::new(session), Arc::clone(&ending)));
    plane.registry.add(Arc::clone(&status));
    let importer = Arc::new(Importer { process, closed: AtomicBool::new(false) });
    let session = Session {
        status,
        ending,
        sequences_max: about.limits.sequences_max,
        layout,
        d2c,
        features: about.features,
        importer,
        account,
        registered: registered.into(),
        token: Some(about.token),
        _place: place,
    };
    let welcomed = async {
        step(socket.send(&ToClient::Sealed, &[])).await?;
        let (reply, announced) = oneshot::channel();
        plane.lanes[lane].send(Command::Resume(id, keeping, reply));
        let announced = announced.await.map_err(|_| Ended::Protocol("the session has ended".into()))?;
        let announced = announced?;
        // All of it is one step of the client's: with one for each message, a client could take hours.
        step(async {
            for announcement in &announced {
                socket.send(&announcement.message, &announcement.fds).await?;
            }
            socket.send(&ToClient::Done, &[]).await?;
            if !answer.is_empty() {
                socket.send_bytes(&answer, &[]).await?;
            }
            Ok(())
        })
        .await
    };
    // Whoever does not read, or has ended while a child of theirs holds the socket, has left, as at any other moment of a session.
    let welcomed = peer::while_there(&session, welcomed).await;
    match welcomed {
        Ok(()) => {
            plane.lanes[lane].send(Command::Claimed(id));
            tracing::info!(
                session = id,
                pid,
                uid = session.status.uid,
                client = session.status.client,
                "session goes on"
            );
            Ok(session)
        }
        Err(error) => {
            plane.end(id, lane).await;
            Err(error)
        }
    }
}
